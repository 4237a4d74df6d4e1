//! Containers with an interface of their own, by passt in their network namespace.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use serde_json::json;

use crate::common::{TestBox, eventually};
use crate::oci::{Container, name};
use crate::processes::processes_with;

/// In the guest: says its address, and answers datagrams in capitals.
const SERVER: &str = "
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(('', 5353))
open('/ready', 'w').close()
text, client = server.recvfrom(100)
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
probe.connect(client)
print(probe.getsockname()[0], flush=True)
while True:
    server.sendto(text.upper(), client)
    text, client = server.recvfrom(100)
";

/// Outside: sends a datagram until it has an answer, and prints that.
const CLIENT: &str = "
import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(1)
answer = None
while not answer:
    client.sendto(b'datagram', (sys.argv[1], 5353))
    try:
        answer = client.recv(100)
    except TimeoutError:
        pass
print(answer.decode())
";

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).status().expect("ip runs");
    assert!(done.success(), "ip {words}");
}

#[test]
fn a_udp_server_is_reached_at_the_namespaces_address() {
    let test = TestBox::debian();
    let [inside, outside] = ["in", "out"].map(|side| format!("{}-{side}", name(&test)));
    for words in [
        format!("netns add {inside}"),
        format!("netns add {outside}"),
        format!("link add cable netns {inside} type veth peer name cable netns {outside}"),
        format!("-n {inside} address add 10.79.0.2/24 dev cable"),
        format!("-n {outside} address add 10.79.0.1/24 dev cable"),
        format!("-n {outside} address add 10.79.0.3/24 dev cable"),
        format!("-n {inside} link set lo up"),
        format!("-n {inside} link set cable up"),
        format!("-n {outside} link set cable up"),
    ] {
        ip(&words);
    }
    let path = format!("/run/netns/{inside}");
    let container = Container::on(test, "")
        .with("/process/args", json!(["python3", "-c", SERVER]))
        .with("/linux/namespaces", json!([{"type": "network", "path": path}]))
        .with("/annotations", json!({"mote.passt": "5353/udp"}));
    let error = container.refused();
    assert!(error.contains("has no IPv4 default route"), "{error}");

    ip(&format!("-n {inside} route add default via 10.79.0.1"));
    let made = container.make(&[]);
    made.start();
    eventually("it serves", || container.test.path("root/ready").exists());
    // Others may join it by its process.
    let pid = fs::read_to_string(container.test.path("bundle/pid")).expect("there");
    let identity =
        |path: &str| fs::metadata(path).map(|file| (file.dev(), file.ino())).expect("there");
    assert_eq!(identity(&format!("/proc/{pid}/ns/net")), identity(&path));
    let asked = Command::new("ip")
        .args(["netns", "exec", &outside, "python3", "-c", CLIENT, "10.79.0.2"])
        .output()
        .expect("ip runs");
    let answer = String::from_utf8_lossy(&asked.stdout).into_owned();
    assert_eq!(answer, "DATAGRAM\n", "{}", String::from_utf8_lossy(&asked.stderr));
    container.done(&["delete", "--force"]);
    assert_eq!(made.end(), (137, "10.79.0.2\n".into()));
    container.assert_nothing_left();
    for namespace in [&inside, &outside] {
        // passt is in one of them, and goes with its container.
        eventually("nobody is there", || {
            let there = Command::new("ip").args(["netns", "pids", namespace]).output();
            there.expect("ip runs").stdout.is_empty()
        });
        ip(&format!("netns del {namespace}"));
    }
    assert!(processes_with(&container.test.dir).is_empty());
}
