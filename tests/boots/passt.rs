//! A network of the box's own: on the real passt between two network namespaces, and on peers in its
//! place that are late, dead or hostile.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client;
use crate::common::{TestBox, eventually};
use crate::network::{Network, shell};
use crate::{ports, tsi};

const MAC: [u8; 6] = [2, 66, 10, 88, 0, 2];

/// A spec's `network` on this socket.
pub fn network(socket: &Path) -> Value {
    json!({
        "passt_socket_path": socket, "ip_address": "10.88.0.2", "gateway": "10.88.0.1",
        "prefix_len": 24, "mac_address": MAC, "dns_servers": ["192.0.2.2"],
    })
}

/// The same network as options of passt.
const PASSTS_OPTIONS: &str = "--address 10.88.0.2 --gateway 10.88.0.1 --netmask 255.255.255.0";

/// A directory for passt's socket, where the user that passt becomes may create it.
pub struct SocketDir(PathBuf);

impl SocketDir {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = PathBuf::from(format!("/run/mote-passt-{}-{count}", std::process::id()));
        fs::create_dir(&dir).expect("directory");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).expect("mode");
        SocketDir(dir)
    }

    pub fn socket(&self) -> PathBuf {
        self.0.join("passt.sock")
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

// ---- the real passt ----------------------------------------------------------------------------

/// Two namespaces with a cable between them. passt runs in the first; the servers that it reaches are in
/// the second, at 192.0.2.2 and at the gateway's address, 10.88.0.1.
struct Outside {
    dir: SocketDir,
    names: [String; 2],
    children: Vec<Child>,
}

/// The servers: TCP connections send a size and get so many bytes and a hash of what they sent,
/// datagrams come back in capitals, and every name is 192.0.2.7.
const SERVERS: &str = include_str!("python/passt_servers.py");

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip runs");
    assert!(status.success(), "ip {arguments}");
}

impl Outside {
    fn new() -> Self {
        let dir = SocketDir::new();
        let name = dir.0.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        let names = ["passt", "server"].map(|role| format!("{name}-{role}"));
        let [passt, server] = &names;
        for line in [
            format!("netns add {passt}"),
            format!("netns add {server}"),
            format!("link add cable netns {passt} type veth peer name cable netns {server}"),
            format!("-n {passt} address add 192.0.2.1/24 dev cable"),
            format!("-n {server} address add 192.0.2.2/24 dev cable"),
            format!("-n {server} address add 10.88.0.1/32 dev lo"),
            format!("-n {passt} link set lo up"),
            format!("-n {server} link set lo up"),
            format!("-n {passt} link set cable up"),
            format!("-n {server} link set cable up"),
            format!("-n {passt} route add default via 192.0.2.2"),
        ] {
            ip(&line);
        }
        let mut outside = Outside { dir, names, children: Vec::new() };
        // passt sends ICMP as an ordinary user, which this permits.
        let range = "echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range";
        assert!(outside.spawn(0, &["sh", "-c", range]).wait().expect("waits").success());
        let mut servers = outside.spawn(1, &["python3", "-u", "-c", SERVERS]);
        let mut serving = [0; 8];
        servers.stdout.take().expect("stdout").read_exact(&mut serving).expect("servers start");
        outside.children.push(servers);
        outside.start_passt();
        outside
    }

    fn spawn(&self, namespace: usize, command: &[&str]) -> Child {
        let mut exec = Command::new("ip");
        exec.args(["netns", "exec", &self.names[namespace]]).args(command);
        exec.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        exec.spawn().expect("ip runs")
    }

    /// Starts passt as the box runtime does, except for the pid file, which nobody reads here.
    fn start_passt(&mut self) {
        let socket = self.dir.socket();
        let _ = fs::remove_file(&socket);
        let path = socket.to_str().expect("text");
        let command = ["passt", "--foreground", "--socket", path].into_iter();
        let command = command.chain(PASSTS_OPTIONS.split(' '));
        let passt = self.spawn(0, &command.collect::<Vec<_>>());
        self.children.push(passt);
    }

    fn end_passt(&mut self) {
        let mut passt = self.children.pop().expect("passt runs");
        passt.kill().expect("kills");
        passt.wait().expect("waits");
    }

    fn debian(&self) -> TestBox {
        TestBox::debian().without_console_file().with("network", network(&self.dir.socket()))
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

/// What a user of the box tries: a name, bytes to a server and back, datagrams.
const USER: &str = include_str!("python/passt_user.py");

#[test]
fn a_box_on_passt_has_the_network_of_its_spec() {
    let outside = Outside::new();
    let test = outside.debian().shell(
        "cat /etc/resolv.conf; ip -o address show eth0; ip -o link show eth0; ip route
         ping -c 3 -i 0.2 -W 20 10.88.0.1 >/dev/null && echo gateway answers
         getent ahostsv4 other.test | head -n 1
         python3 /user.py",
    );
    let of_image = "# of the image\nnameserver 198.51.100.1\n";
    fs::write(test.path("root/etc/resolv.conf"), of_image).expect("written");
    fs::write(test.path("root/user.py"), USER).expect("written");
    let ran = test.run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for wanted in [
        "nameserver 192.0.2.2\n",
        "inet 10.88.0.2/24 brd 10.88.0.255 ",
        "mtu 65520 ",
        "state UP",
        "link/ether 02:42:0a:58:00:02 ",
        "default via 10.88.0.1 dev eth0 \n",
        "gateway answers\n",
        "192.0.2.7 ",
        "name 192.0.2.7 True\n",
        "tcp True\n",
        "udp True\nudp True\nudp True\n",
    ] {
        assert!(ran.stdout.contains(wanted), "{wanted}: {} {}", ran.stdout, ran.stderr);
    }
    assert!(!ran.stdout.contains("198.51.100.1"), "{}", ran.stdout);
    let left = fs::read_to_string(test.path("root/etc/resolv.conf")).expect("there");
    assert_eq!(left, of_image, "the image's own file");
    assert_eq!(ran.stderr, "");
}

/// Runs a passt in a network, for boxes there.
pub fn passt_in(network: &Network, socket: &Path) -> Child {
    passt_with(network, socket, PASSTS_OPTIONS, &[])
}

/// The same with these options, as a line of words, and more of them.
pub fn passt_with(network: &Network, socket: &Path, line: &str, options: &[&str]) -> Child {
    network.host.ip("route replace default dev outside\n");
    let mut words = network.host.enter();
    words.extend(["passt", "--foreground", "--socket"].map(String::from));
    words.push(socket.to_str().expect("text").into());
    words.extend(line.split(' ').map(String::from));
    words.extend(options.iter().map(|option| (*option).to_owned()));
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("passt starts")
}

/// As the runtime of today has it.
#[test]
fn ports_that_passt_publishes_are_left_to_it() {
    let network = Network::new();
    let dir = SocketDir::new();
    let options = ["--tcp-ports", "18001:8001", "--udp-ports", "19001:9001"];
    let mut passt = passt_with(&network, &dir.socket(), PASSTS_OPTIONS, &options);
    let map = json!(["18001:8001", "19001:9001/udp", "18002:8002"]);
    let test = TestBox::debian().inside(&network).with("port_map", map);
    let test = test.with("network", self::network(&dir.socket()));
    eventually("passt serves", || dir.socket().exists());
    let (test, started) = test.idle();
    shell(
        &test,
        "python3 - >/dev/shm/said 2>&1 <<'end' &
import socket, threading
tcp, other = [socket.create_server(('0.0.0.0', port)) for port in (8001, 8002)]
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(('0.0.0.0', 9001))
def answer():
    while True:
        data, client = udp.recvfrom(99)
        udp.sendto(data.upper(), client)
def serve(listener):
    while True:
        client = listener.accept()[0]
        client.sendall(client.recv(3).upper())
for target, arguments in (answer, ()), (serve, (tcp,)), (serve, (other,)):
    threading.Thread(target=target, args=arguments).start()
end
until grep -q :2329 /proc/net/udp && grep -q :1F42 /proc/net/tcp; do :; done",
    );
    let said = network.outside.python(
        // The client speaks first: a passt of 2023 ends no handshake before it has data to send.
        "import socket
host = '198.51.100.100'
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect((host, 19001))
udp.settimeout(60)
for s in *(socket.create_connection((host, port), 60) for port in (18001, 18002)), udp:
    s.send(b'ask')
    print(s.recv(9).decode())",
    );
    assert_eq!(said, "ASK\nASK\nASK\n");
    let ended = started.stop();
    let left = |index: u8, port: u16| {
        format!(
            "mote: warning: port_map[{index}]: host port {port} is published by the box's passt, and left to it\n"
        )
    };
    assert_eq!(ended.stderr, left(0, 18001) + &left(1, 19001));
    // Not to anybody else.
    let _taken = network.host.serve_with(
        "import socket; s = socket.create_server(('0.0.0.0', 18003)); print('ready'); s.accept()",
        &[],
    );
    let test = TestBox::busybox().inside(&network).with("port_map", json!(["18003:80"]));
    let ran = test.with("network", self::network(&dir.socket())).run();
    ran.assert_not_started(&["port_map[0]: host port 18003 is in use by another program"]);
    passt.kill().expect("kills");
    passt.wait().expect("waits");
}

#[test]
fn usual_clients_fetch_while_a_server_stands_a_load() {
    let (outside, _web) = tsi::web();
    let _servers = outside.outside.serve(tsi::SERVERS);
    let dir = SocketDir::new();
    let mut passt = passt_in(&outside, &dir.socket());
    let test = TestBox::debian().inside(&outside).with("network", network(&dir.socket()));
    fs::copy(outside.dir.join("cert.pem"), test.path("root/ca.pem")).expect("copied");
    let (test, started) = ports::nginx(test);
    std::thread::scope(|scope| {
        scope.spawn(|| ports::assert_stands_a_load(&outside, 300));
        tsi::usual_clients_fetch(&test, &["198.51.100.1"]);
        // Without half-closes: after one, a passt of 2023 closes its socket with the answer unread.
        tsi::two_hundred_connections(&test, &["198.51.100.1"], "close");
    });
    started.stop();
    passt.kill().expect("kills");
    passt.wait().expect("waits");
}

#[test]
fn a_passt_that_is_started_again_serves_the_box_again() {
    let mut outside = Outside::new();
    let test = outside.debian();
    let (test, started) = test.idle();
    let fetch = "python3 -c 'import socket
conn = socket.create_connection((\"192.0.2.2\", 8000), 20)
conn.sendall(b\"%-16d\" % 5)
conn.shutdown(socket.SHUT_WR)
print(conn.recv(5, socket.MSG_WAITALL).decode())'";
    let carrier = || client::shell(&test, "cat /sys/class/net/eth0/carrier");
    assert_eq!(client::shell(&test, fetch), "xxxxx\n");
    outside.end_passt();
    eventually("the link is down", || carrier() == "0\n");
    outside.start_passt();
    eventually("the link is up", || carrier() == "1\n");
    assert_eq!(client::shell(&test, fetch), "xxxxx\n");
    let ran = started.stop();
    let socket = outside.dir.socket();
    let socket = socket.display();
    assert_eq!(
        ran.stderr.lines().filter(|line| line.contains("net: ")).collect::<Vec<_>>(),
        [
            format!(
                "mote: warning: net: passt closed its connection; the link is down until somebody serves {socket} again"
            ),
            format!("mote: net: passt serves {socket} again; the link is up"),
        ]
    );
}

// ---- others in its place -----------------------------------------------------------------------

/// A directory for passt's socket, and a box that is to connect to it.
pub fn small_box() -> (SocketDir, TestBox) {
    let dir = SocketDir::new();
    let test = TestBox::busybox().with("network", network(&dir.socket()));
    (dir, test)
}

pub fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).expect("set");
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).expect("set");
                stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
                return stream;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("mote does not connect: {error}"),
        }
    }
}

/// Asks the guest for its hardware address, as its gateway would, until it answers.
pub fn assert_frames_pass(passt: &mut UnixStream) {
    const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const ARP: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    let question = [
        &[0xff; 6][..],
        &GATEWAY,
        &[8, 6],
        &ARP,
        &GATEWAY,
        &[10, 88, 0, 1],
        &[0; 6],
        &[10, 88, 0, 2],
    ];
    let question = question.concat();
    passt.write_all(&(question.len() as u32).to_be_bytes()).expect("sent");
    passt.write_all(&question).expect("sent");
    loop {
        let mut len = [0; 4];
        passt.read_exact(&mut len).expect("the guest sends something");
        let mut frame = vec![0; u32::from_be_bytes(len) as usize];
        passt.read_exact(&mut frame).expect("all of it");
        if frame[12..14] == [8, 6] && frame[21] == 2 {
            assert_eq!(frame[..6], GATEWAY);
            assert_eq!(frame[22..32], [&MAC[..], &[10, 88, 0, 2]].concat());
            return;
        }
    }
}

/// Prints each change of the link.
const WATCH: &str = "while :; do
    now=$(cat /sys/class/net/eth0/carrier)
    [ \"$now\" = \"$was\" ] || echo link $now
    was=$now
    sleep 0.1
done";

#[test]
fn a_peer_that_breaks_the_protocol_takes_the_link_down_and_no_more() {
    let (dir, test) = small_box();
    let listener = UnixListener::bind(dir.socket()).expect("binds");
    let test = test.shell(WATCH).without_console_file();
    let mut started = test.start();
    let mut passt = accept(&listener);
    started.wait_for_line("link 1");
    assert_frames_pass(&mut passt);

    // Half of a frame's length, and then nothing: everything else goes on.
    passt.write_all(&[0, 0]).expect("sent");
    assert_eq!(client::shell(&test, "echo alive; cat /sys/class/net/eth0/carrier"), "alive\n1\n");

    // The other half makes it a length that no frame has. The box connects again each time.
    let breaches = [
        (&[0, 0][..], "announced a frame of 0 bytes"),
        (&[0, 0, 0, 13], "announced a frame of 13 bytes"),
        (&[0, 1, 0, 0, 7, 7, 7], "announced a frame of 65536 bytes"),
        (&[0xff; 4], "announced a frame of 4294967295 bytes"),
        (&[], "closed its connection"),
    ];
    for (rest, _) in breaches {
        // The guest looks at its link ten times a second: nobody serves until it has seen it down.
        fs::remove_file(dir.socket()).expect("removed");
        passt.write_all(rest).expect("sent");
        if rest.is_empty() {
            drop(passt);
        }
        started.wait_for_line("link 0");
        passt = accept(&UnixListener::bind(dir.socket()).expect("binds"));
        started.wait_for_line("link 1");
        assert_frames_pass(&mut passt);
    }
    let ran = started.stop();
    let told: Vec<&str> = ran.stderr.lines().filter(|line| line.contains("net: ")).collect();
    assert_eq!(told.len(), 2 * breaches.len(), "{told:?}");
    for (lines, (_, breach)) in told.chunks(2).zip(breaches) {
        assert!(lines[0].contains(&format!("passt {breach}")), "{lines:?}");
        assert!(lines[1].ends_with(" again; the link is up"), "{lines:?}");
    }
}

#[test]
fn a_box_without_passt_does_not_start() {
    let (dir, test) = small_box();
    let ran = test.run();
    assert_eq!(ran.code, 125);
    let socket = dir.socket();
    let socket = socket.display();
    assert!(
        ran.stderr.contains(&format!(
            "connect to passt (network.passt_socket_path): nobody serves {socket}; run 'passt --socket {socket}' before the box"
        )),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_passt_that_is_late_is_waited_for() {
    let (dir, test) = small_box();
    let test = test.shell(WATCH).without_console_file();
    let mut started = test.start();
    std::thread::sleep(Duration::from_millis(1500));
    let listener = UnixListener::bind(dir.socket()).expect("binds");
    let mut passt = accept(&listener);
    started.wait_for_line("link 1");
    assert_frames_pass(&mut passt);
    assert_eq!(started.stop().stderr, "");
}

#[test]
fn a_socket_that_mote_is_started_with_is_passts() {
    let (ours, mut passt) = UnixStream::pair().expect("a pair");
    passt.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    let mut test = TestBox::busybox().shell(WATCH).without_console_file();
    test.spec["network"] = network(Path::new(""));
    test.spec["network"]["net_socket_fd"] = json!(3);
    // The socket is standard input at first, and descriptor 3 for mote.
    let words = ["sh", "-c", "exec \"$@\" 3<&0 </dev/null", "sh"];
    let mut started = test.start_by(test.mote_within(&words).stdin(OwnedFd::from(ours)));
    started.wait_for_line("link 1");
    assert_frames_pass(&mut passt);
    drop(passt);
    started.wait_for_line("link 0");
    let ran = started.stop();
    assert!(ran.stderr.contains("the link is down for good"), "{}", ran.stderr);
}

// ---- name servers ------------------------------------------------------------------------------

/// The second line counts what is mounted over it.
const LOOK: &str =
    "cat /etc/resolv.conf; grep ^rootfs /proc/mounts | grep -vc /etc/hosts; touch /x";

#[test]
fn name_servers_reach_a_read_only_root_behind_a_dangling_link() {
    let (dir, test) = small_box();
    let _listener = UnixListener::bind(dir.socket()).expect("binds");
    symlink("../run/resolve/stub.conf", test.path("root/etc/resolv.conf")).expect("link");
    let test = test.shell(LOOK).with_entrypoint("env", json!([["BOX_READONLY", "1"]]));
    let ran = test.run();
    assert!(ran.console.starts_with("nameserver 192.0.2.2\n1\n"), "{} {}", ran.console, ran.stderr);
    assert!(ran.console.contains("Read-only file system"), "{}", ran.console);
    assert_eq!(fs::read(test.path("root/run/resolve/stub.conf")).expect("there"), b"");
}

#[test]
fn without_a_network_the_images_name_servers_count_and_then_the_hosts() {
    let test = TestBox::busybox().shell(LOOK);
    let own = "options timeout:1\nnameserver 127.0.0.53\n";
    fs::write(test.path("root/etc/resolv.conf"), own).expect("written");
    assert_eq!(test.run().console, format!("{own}0\n"));

    fs::write(test.path("root/etc/resolv.conf"), "# nothing\n").expect("written");
    let host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let mut servers: String = host
        .lines()
        .filter(|line| line.starts_with("nameserver "))
        .map(|line| format!("{line}\n"))
        .collect();
    if servers.is_empty() {
        servers = "nameserver 8.8.8.8\nnameserver 8.8.4.4\n".into();
    }
    assert_eq!(test.run().console, format!("{servers}1\n"));
    assert_eq!(
        fs::read_to_string(test.path("root/etc/resolv.conf")).expect("there"),
        "# nothing\n",
        "the image's own file"
    );
}
