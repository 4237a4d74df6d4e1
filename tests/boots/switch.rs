//! Boxes of one network, which meet in `network.bridge_socket_dir`: with each other, each with its passt, and with a
//! program in the place of one that is unusual or hostile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;

use serde_json::json;

use crate::common::{Started, TestBox, eventually};
use crate::network::{Network, Server, python, run, shell};
use crate::passt::{self, SocketDir, passt_with};
use crate::processes::{children_of, kill, name_of};

const OTHER_BOX: &str = include_str!("python/other_box.py");

/// A network of boxes.
struct Boxes {
    network: Network,
    directory: PathBuf,
    passts: Vec<(SocketDir, Child)>,
}

impl Boxes {
    fn new() -> Self {
        let network = Network::new();
        let directory = network.dir.join("switch");
        Boxes { network, directory, passts: Vec::new() }
    }

    /// A box with this last number in its address, and a passt of its own.
    fn join(&mut self, test: TestBox, number: u8) -> TestBox {
        let dir = SocketDir::new();
        let line =
            format!("--address 10.88.0.{number} --gateway 10.88.0.1 --netmask 255.255.255.0");
        let passt = passt_with(&self.network, &dir.socket(), &line, &[]);
        eventually("passt serves", || dir.socket().exists());
        let mut spec = passt::network(&dir.socket());
        spec["ip_address"] = json!(format!("10.88.0.{number}"));
        spec["mac_address"] = json!([2, 66, 10, 88, 0, number]);
        spec["bridge_socket_dir"] = json!(self.directory);
        self.passts.push((dir, passt));
        test.inside(&self.network).with("network", spec)
    }

    fn socket(&self, number: u8) -> PathBuf {
        self.directory.join(format!("02-42-0a-58-00-{number:02x}.sock"))
    }
}

impl Drop for Boxes {
    fn drop(&mut self) {
        for (_, passt) in &mut self.passts {
            let _ = passt.kill();
            let _ = passt.wait();
        }
    }
}

/// Serves the text "served by NAME" over TCP, and datagrams in capitals.
fn serve(test: &TestBox, name: &str) {
    let script = format!(
        "python3 - >/dev/null 2>&1 <<'end' &
import socket, threading
tcp = socket.create_server(('0.0.0.0', 8001))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(('0.0.0.0', 9001))
def answer():
    while True:
        data, client = udp.recvfrom(70000)
        udp.sendto(data.upper(), client)
threading.Thread(target=answer).start()
while True:
    client = tcp.accept()[0]
    client.sendall(b'served by {name}' + bytes(4_000_000))
    client.close()
end
until grep -q :2329 /proc/net/udp && grep -q :1F41 /proc/net/tcp; do :; done"
    );
    shell(test, &script);
}

/// What the box gets of the one with this number: over TCP, all of a long answer, and over UDP, a small datagram and a
/// large one.
fn fetch(test: &TestBox, number: u8) -> String {
    python(
        test,
        &format!(
            "import socket
s = socket.create_connection(('10.88.0.{number}', 8001), 60)
data = b''
while part := s.recv(1 << 20):
    data += part
print(data.rstrip(bytes(1)).decode(), len(data))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.settimeout(60)
udp.connect(('10.88.0.{number}', 9001))
for length in 5, 60000:
    udp.send(b'a' * length)
    print(udp.recv(70000) == b'A' * length)"
        ),
    )
}

fn whole(name: &str) -> String {
    let text = format!("served by {name}");
    format!("{text} {}\nTrue\nTrue\n", text.len() + 4_000_000)
}

#[test]
fn boxes_of_one_network_reach_each_other_and_the_outside() {
    let mut boxes = Boxes::new();
    let _outside = boxes.network.outside.serve(
        "import socket
s = socket.create_server(('198.51.100.1', 80))
print('ready')
while True:
    client = s.accept()[0]
    client.recv(1)
    client.sendall(b'outside')",
    );
    let (one, started_one) = boxes.join(TestBox::debian(), 2).idle();
    let (two, started_two) = boxes.join(TestBox::debian(), 3).idle();
    serve(&one, "one");
    serve(&two, "two");
    assert_eq!(fetch(&one, 3), whole("two"));
    assert_eq!(fetch(&two, 2), whole("one"));
    for test in [&one, &two] {
        let outside = python(
            test,
            "import socket
s = socket.create_connection(('198.51.100.1', 80), 60)
s.send(b'x')
print(s.recv(9).decode())",
        );
        assert_eq!(outside, "outside\n");
    }
    // Nobody is there, and passt does not stand in for anybody.
    let error = python(
        &one,
        "import socket
try:
    socket.create_connection(('10.88.0.4', 8001), 60)
except OSError as error:
    print(error.strerror)",
    );
    assert_eq!(error, "No route to host\n");
    // One ends, and comes again: its peer finds it.
    assert_eq!(started_two.stop().stderr, "");
    assert!(!boxes.socket(3).exists());
    let (two, started_two) = boxes.join(TestBox::debian(), 3).idle();
    serve(&two, "two again");
    assert_eq!(fetch(&one, 3), whole("two again"));
    // One that is killed leaves nothing behind either.
    started_two.kill();
    eventually("its janitor removes the socket", || !boxes.socket(3).exists());
    assert_eq!(started_one.stop().stderr, "");
}

/// A box, and a program in the place of another.
fn beside(how: &str) -> (Boxes, TestBox, Started, Server) {
    let mut boxes = Boxes::new();
    let (test, started) = boxes.join(TestBox::debian(), 2).idle();
    let directory = boxes.directory.to_str().expect("text").to_owned();
    let other = boxes.network.outside.serve_with(OTHER_BOX, &[&directory, how]);
    (boxes, test, started, other)
}

/// Says something to the other box, and prints its answer.
const SPEAK: &str = "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(60)
s.connect(('10.88.0.9', 7))
s.send(b'hello')
print(s.recv(9).decode())";

#[test]
fn a_box_that_poses_as_others_is_not_believed() {
    let (_boxes, test, started, mut other) = beside("");
    assert_eq!(python(&test, SPEAK), "HELLO\n");
    assert_eq!(other.line(), "02420a580002 hello");
    drop(other);
    assert_eq!(started.stop().stderr, "");
    // It speaks before the box listens: what waits in the socket is looked at as well.
    let mut boxes = Boxes::new();
    let (test, started) = boxes.join(TestBox::debian(), 2).idle();
    shell(
        &test,
        "python3 -c \"
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('0.0.0.0', 9))
print(s.recv(99).decode(), flush=True)\" >/dev/shm/heard 2>&1 &
until grep -q :0009 /proc/net/udp; do :; done",
    );
    let before = shell(&test, "cat /proc/net/arp");
    let directory = boxes.directory.to_str().expect("text").to_owned();
    let mut other = boxes.network.outside.serve_with(OTHER_BOX, &[&directory, "posing"]);
    let heard = shell(&test, "until grep -q . /dev/shm/heard; do :; done; cat /dev/shm/heard");
    assert_eq!(heard, "this one\n");
    let table = shell(&test, "cat /proc/net/arp");
    for line in table.lines().filter(|line| line.contains("02:42:0a:58:00:09")) {
        assert!(line.starts_with("10.88.0.9 "), "{before}{table}");
    }
    // A guest speaks for itself alone, too.
    shell(
        &test,
        "python3 -c \"
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(('eth0', 0))
to, other, own = bytes([2, 66, 10, 88, 0, 9]), bytes([2, 66, 10, 88, 0, 8]), bytes([2, 66, 10, 88, 0, 2])
for source in other, own:
    ip = bytes.fromhex('4500002100004000401100000a5800020a580009') + bytes.fromhex('00070007000d0000')
    s.send(to + source + bytes([8, 0]) + ip + (b'wrong' if source == other else b'right'))\"",
    );
    assert_eq!(other.line(), "02420a580002 right");
    assert_eq!(started.stop().stderr, "");
}

#[test]
fn a_box_that_takes_no_frames_holds_nobody_up() {
    let (mut boxes, test, started, mut stuck) = beside("stuck");
    let (two, _started) = boxes.join(TestBox::debian(), 3).idle();
    serve(&two, "two");
    shell(
        &test,
        "python3 -c \"
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(500):
    s.sendto(bytes(9000), ('10.88.0.9', 7))\"",
    );
    assert_eq!(stuck.line(), "stuck");
    assert_eq!(fetch(&test, 3), whole("two"));
    assert_eq!(started.stop().stderr, "");
}

#[test]
fn rules_hold_between_boxes_and_a_lost_switch_is_told() {
    let mut boxes = Boxes::new();
    let test = boxes.join(TestBox::debian(), 2).with("egress", json!(["deny:10.88.0.9", "allow"]));
    let (test, started) = test.idle();
    let directory = boxes.directory.to_str().expect("text").to_owned();
    let _other = boxes.network.outside.serve_with(OTHER_BOX, &[&directory, ""]);
    let refused = run(&test, &["python3", "-c", &format!("{SPEAK}\n")]);
    assert!(refused.stderr.contains("No route to host"), "{}", refused.stderr);
    let children = children_of(started.pid()).into_iter();
    let switches: Vec<u32> = children.filter(|pid| name_of(*pid) == "mote-switch").collect();
    let [switch] = switches[..] else { panic!("{switches:?}") };
    let status = || fs::read_to_string(format!("/proc/{switch}/status")).expect("a process");
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
        assert!(status().contains(&format!("\n{line}\n")), "no {line} in {}", status());
    }
    let root = fs::read_link(format!("/proc/{switch}/root")).expect("a process");
    assert_eq!(root, boxes.directory);
    kill(switch, libc::SIGKILL);
    eventually("it has ended", || status().contains("State:\tZ"));
    let refused = run(&test, &["python3", "-c", SPEAK]);
    assert!(refused.stderr.contains("No route to host"), "{}", refused.stderr);
    assert_eq!(
        started.stop().stderr,
        "mote: warning: net: mote-switch closed its connection; the other boxes of the network are out of reach for good\n"
    );
}

#[test]
fn a_network_that_cannot_be_joined_is_explained() {
    let mut boxes = Boxes::new();
    let (_one, started) = boxes.join(TestBox::busybox(), 2).idle();
    let ran = boxes.join(TestBox::busybox(), 2).run();
    ran.assert_not_started(&[
        "network.bridge_socket_dir: take datagrams at ",
        "02-42-0a-58-00-02.sock: another process listens on it; is this box running already?",
    ]);
    started.stop();
    let file = boxes.network.dir.join("file");
    fs::write(&file, "").expect("written");
    let mut network = passt::network(Path::new("/run/s"));
    network["bridge_socket_dir"] = json!(file);
    let ran = TestBox::busybox().with("network", network).run();
    ran.assert_not_started(&["network.bridge_socket_dir: ", "file is not a directory; name one"]);
}
