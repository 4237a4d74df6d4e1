//! Programs in a box that pose as somebody else, as an ordinary user.

use serde_json::json;

use crate::common::TestBox;
use crate::network::{Network, run};

/// Poses as an outside peer towards a socket that is not connected.
const FORGED_DATAGRAMS: &str = include_str!("python/forged_datagrams.py");

/// Runs a python script in the box, as an ordinary user.
fn as_user(test: &TestBox, script: &str) -> String {
    let user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all"];
    let done = run(test, &[&user[..], &["python3", "-c", script]].concat());
    assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
    done.stdout
}

#[test]
fn nobody_poses_as_a_peer_of_a_datagram_socket() {
    let network = Network::new();
    let (test, started) = TestBox::debian().inside(&network).idle();
    assert_eq!(as_user(&test, FORGED_DATAGRAMS), "over\n");
    started.stop();
}

#[test]
fn nobody_poses_as_a_client_of_a_published_port() {
    let network = Network::new();
    // Says whom it sees, and keeps its clients.
    let server = r#"
import socket
server = socket.create_server(("127.0.0.1", 8001))
clients = []
print("ready", flush=True)
while True:
    client, peer = server.accept()
    clients.append(client)
    client.sendall(peer[0].encode())
"#;
    let test = TestBox::debian().inside(&network).without_console_file();
    let test = test.with("port_map", json!(["18001:8001"])).python(server, &[]);
    let started = test.ready();
    // A client from outside, whose name an impostor wants.
    let client = "import socket; print(socket.create_connection(('198.51.100.100', 18001)).recv(99).decode())";
    assert_eq!(network.outside.python(client), "198.51.100.1\n");
    let impostor = r#"
import errno, socket
for n in range(1, 9):
    for freebind in 0, 1:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_IP, 15, freebind)  # IP_FREEBIND
            try:
                s.bind((f"127.160.0.{n}", 0))
            except OSError as e:
                assert e.errno == errno.EADDRNOTAVAIL, e
                continue
            s.connect(("127.0.0.1", 8001))
            print("taken for", s.recv(99).decode())
print("over")
"#;
    assert_eq!(as_user(&test, impostor), "over\n");
    started.stop();
}

#[test]
fn the_agents_ports_are_never_free() {
    let network = Network::new();
    let test = TestBox::debian().inside(&network).with("port_map", json!(["18001:8001"]));
    let (test, started) = test.idle();
    // The ports of the agent's servers, and of the process that carries the network, which the box's root may
    // kill: another takes its place.
    let script = r#"
import os, signal, socket
def network_process():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm") as comm:
                if comm.read() == "mote-network\n":
                    return int(pid)
        except OSError:
            pass
def attempt(family, kind, address):
    with socket.socket(family, kind) as s:
        try:
            s.bind(address)
            print("free", address)
        except OSError:
            pass
def attempts():
    for port in (3, 4, 6):
        attempt(socket.AF_VSOCK, socket.SOCK_STREAM, (socket.VMADDR_CID_ANY, 0x6d6f7465 + port))
    for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM:
        attempt(socket.AF_INET, kind, ("0.0.0.0", 1))
        attempt(socket.AF_INET6, kind, ("::", 1))
attempts()
for _ in range(3):
    before = network_process()
    os.kill(before, signal.SIGKILL)
    while network_process() in (before, None):
        attempts()
attempts()
print("over")
"#;
    assert_eq!(crate::network::python(&test, script), "over\n");
    started.stop();
}
