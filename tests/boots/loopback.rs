//! What is the guest's own and what is the host's with `network` null: loopback and network namespaces.

use std::fs;

use crate::common::TestBox;
use crate::network::{Network, python, run, shell};
use crate::tsi::web;

/// Serves on these addresses, and prints which of them a client has reached.
const WITNESS: &str = include_str!("python/witness.py");

#[test]
fn the_hosts_loopback_is_out_of_reach() {
    let network = Network::new();
    let mut server = network.host.serve_with(WITNESS, &["127.0.0.1", "::1", "127.1.2.3"]);
    let _outside = network.outside.serve_with(WITNESS, &["198.51.100.1"]);
    let test = TestBox::debian().inside(&network);
    fs::write(test.path("root/etc/hosts"), "127.0.0.1 localhost itself\n::1 localhost itself6\n")
        .expect("hosts");
    let (test, started) = test.idle();
    // Each of these is the guest itself, where nobody listens. The addresses that stand for connections
    // inside the guest lead nowhere when a program names one.
    python(
        &test,
        r#"
import errno, socket
def tcp(family, address):
    with socket.socket(family) as s:
        s.settimeout(60)
        return s.connect_ex((address, 7777))
for address in ("127.0.0.1", "0.0.0.0", "localhost", "itself", "127.1.2.3", "127.255.255.254"):
    assert tcp(socket.AF_INET, address) == errno.ECONNREFUSED, address
for address in ("::1", "::", "itself6", "::ffff:127.0.0.1", "::ffff:0.0.0.0", "::ffff:127.1.2.3"):
    assert tcp(socket.AF_INET6, address) == errno.ECONNREFUSED, address
for family, address in (
    (socket.AF_INET, "127.128.0.1"), (socket.AF_INET, "127.191.255.255"), (socket.AF_INET6, "fd54:5349::1"),
):
    assert tcp(family, address) != 0, address
for family, address in (
    (socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET, "127.1.2.3"),
    (socket.AF_INET6, "::1"), (socket.AF_INET6, "::ffff:127.0.0.1"),
):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(60)
        s.connect((address, 7777))
        s.send(b"x")
        try:
            s.recv(9)
            assert False, address
        except ConnectionRefusedError:
            pass
assert socket.create_connection(("198.51.100.1", 7777)).recv(9) == b"hello"
"#,
    );
    // The host itself reaches it, as the first.
    network.host.python(
        "import socket; assert socket.create_connection(('127.1.2.3', 7777)).recv(9) == b'hello'",
    );
    assert_eq!(server.line(), "reached ('127.1.2.3', 7777)");
    started.stop();
}

#[test]
fn the_guests_loopback_stays_its_own() {
    // Nobody serves outside: these connections never leave the guest.
    let network = Network::new();
    let test = TestBox::debian().inside(&network);
    fs::write(test.path("root/etc/hosts"), "127.0.0.1 localhost\n").expect("hosts");
    let (test, started) = test.idle();
    python(
        &test,
        r#"
import socket
for family, listen, address in (
    (socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET6, "::1", "::1"),
    (socket.AF_INET, "0.0.0.0", "localhost"), (socket.AF_INET6, "::", "::1"),
    (socket.AF_INET, "127.77.0.1", "127.77.0.1"),
):
    server = socket.create_server((listen, 0), family=family)
    port = server.getsockname()[1]
    client = socket.create_connection((address, port), timeout=60)
    conn, peer = server.accept()
    assert peer[:2] == client.getsockname()[:2], (peer, client.getsockname())
    assert client.getpeername()[1] == port
    conn.sendall(b"in here")
    assert client.recv(9) == b"in here"
    client.close(), conn.close(), server.close()
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    server, client = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
    server.bind((address, 0))
    client.settimeout(60)
    client.sendto(b"ping", server.getsockname())
    data, peer = server.recvfrom(100)
    server.sendto(data, peer)
    assert client.recvfrom(100) == (b"ping", server.getsockname())
"#,
    );
    started.stop();
}

#[test]
fn namespaces_of_the_guests_own_are_respected() {
    let (network, _server) = web();
    let (test, started) = TestBox::debian().inside(&network).idle();
    let curl = "curl -sS --max-time 60 http://198.51.100.1/inside";
    for unshare in ["unshare --cgroup", "unshare --mount --pid --fork", "unshare --ipc --uts"] {
        assert_eq!(shell(&test, &format!("{unshare} {curl}")), "hello /inside", "{unshare}");
    }
    let child = format!(
        "mkdir /sys/fs/cgroup/box/own; echo $$ >/sys/fs/cgroup/box/own/cgroup.procs; {curl}"
    );
    assert_eq!(shell(&test, &child.replace("/box/", &box_cgroup(&test))), "hello /inside");
    // A network namespace made in the guest has a loopback of its own that works, and no way out.
    let script = r#"
import errno, socket
server = socket.create_server(("127.0.0.1", 7001))
client = socket.create_connection(("127.0.0.1", 7001), timeout=60)
server.accept()[0].sendall(b"own")
print(client.recv(3).decode(), client.getpeername())
print(errno.errorcode[socket.socket().connect_ex(("198.51.100.1", 80))])
datagrams = socket.socket(type=socket.SOCK_DGRAM)
try:
    datagrams.sendto(b"x", ("198.51.100.1", 80))
except OSError as e:
    print(errno.errorcode[e.errno])
"#;
    let done = run(
        &test,
        &["unshare", "--net", "sh", "-c", "ip link set lo up; python3 -c \"$0\"", script],
    );
    let expected = "own ('127.0.0.1', 7001)\nENETUNREACH\nENETUNREACH\n";
    assert_eq!((done.stdout.as_str(), done.code), (expected, 0), "{}", done.stderr);
    started.stop();
}

/// The path of commands' cgroup in the guest, with a slash at each end.
fn box_cgroup(test: &TestBox) -> String {
    let own = shell(test, "sed -n s/^0::// /proc/self/cgroup");
    format!("{}/", own.trim().trim_end_matches('/'))
}
