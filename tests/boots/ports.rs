//! Published ports: `port_map` with `network` null.

use serde_json::json;

use crate::common::{Started, TestBox, eventually};
use crate::network::{Network, python, python_with, run, shell};

/// Serves on every kind of address. Sends each client the address it sees, then sends back what comes,
/// in capitals, and `tail` after its end.
///   8001 0.0.0.0    8002 :: (and IPv4)    8003 127.0.0.1    8004 ::1    8005 ::ffff:127.0.0.1
const SERVERS: &str = include_str!("python/published.py");

/// A box that runs these servers. Host ports 18001 to 18005 lead to them, and 18006 to nobody.
fn serving(network: &Network) -> TestBox {
    let map: Vec<String> = (8001..=8006).map(|port| format!("1{port}:{port}")).collect();
    TestBox::debian()
        .inside(network)
        .without_console_file()
        .with("port_map", json!(map))
        .python(SERVERS, &[])
}

#[test]
fn a_server_sees_the_real_client_wherever_it_listens() {
    let network = Network::new();
    let test = serving(&network);
    let started = test.ready();
    // Clients from outside, and from the host's loopback.
    let clients = r#"
import socket, sys
source, host = sys.argv[1:]
for port in range(18001, 18006):
    conn = socket.create_connection((host, port), timeout=60, source_address=(source, 0))
    print(port, conn.makefile().readline().strip())
"#;
    let seen = [
        network.outside.python_with(clients, &["198.51.100.2", "198.51.100.100"]),
        network.host.python_with(clients, &["127.0.0.1", "127.0.0.1"]),
    ]
    .concat();
    let expected: String = ["198.51.100.2", "127.0.0.1"]
        .iter()
        .flat_map(|ip| {
            [(18001, ""), (18002, "::ffff:"), (18003, ""), (18004, "::ffff:"), (18005, "::ffff:")]
                .map(|(port, mapped)| format!("{port} {mapped}{ip}\n"))
        })
        .collect();
    assert_eq!(seen, expected);
    started.stop();
}

#[test]
fn published_ports_are_there_for_ipv6_clients() {
    let network = Network::new();
    let test = serving(&network);
    let started = test.ready();
    let seen = network.outside.python(
        r#"
import socket
for port in (18002, 18004):
    conn = socket.create_connection(("2001:db8::100", port), timeout=60, source_address=("2001:db8::2", 0))
    print(port, conn.makefile().readline().strip())
# Servers of IPv4 alone cannot name such a client, but serve it.
for port in (18001, 18003):
    conn = socket.create_connection(("2001:db8::100", port), timeout=60)
    conn.sendall(b"abc")
    conn.shutdown(socket.SHUT_WR)
    print(port, conn.makefile().read().splitlines()[1])
"#,
    );
    assert_eq!(seen, "18002 2001:db8::2\n18004 2001:db8::2\n18001 ABCtail\n18003 ABCtail\n");
    started.stop();
}

#[test]
fn halves_close_on_their_own_and_resets_cross() {
    let network = Network::new();
    let test = serving(&network);
    let started = test.ready();
    network.outside.python(
        r#"
import errno, socket
for port in range(18001, 18006):
    # The client ends first, and the answer still comes.
    conn = socket.create_connection(("198.51.100.100", port), timeout=60)
    conn.sendall(b"abc" * 100000)
    conn.shutdown(socket.SHUT_WR)
    reply = conn.makefile("rb").read().split(b"\n")[1]
    assert reply == b"ABC" * 100000 + b"tail", (port, len(reply))
# Nobody listens behind this one: the client hears so, as a reset or an end.
try:
    assert socket.create_connection(("198.51.100.100", 18006), timeout=60).recv(9) == b""
except ConnectionResetError:
    pass
"#,
    );
    // The server ends first, and still receives; the next connection it resets.
    let server = r#"
import errno, socket, struct
server = socket.create_server(("127.0.0.1", 8006))
print("listening", flush=True)
conn, _ = server.accept()
conn.sendall(b"bye")
conn.shutdown(socket.SHUT_WR)
count = 0
while data := conn.recv(65536):
    count += len(data)
print(count)
conn, _ = server.accept()
conn.recv(1)
conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
conn.close()
conn, _ = server.accept()
try:
    while conn.recv(65536):
        pass
    print("end")
except OSError as e:
    print(errno.errorcode[e.errno])
"#;
    std::thread::scope(|scope| {
        let server = scope.spawn(|| python(&test, server));
        network.outside.python(
            r#"
import socket, struct
def reaches():
    # Until the server listens, connections end at once.
    while True:
        try:
            conn = socket.create_connection(("198.51.100.100", 18006), timeout=60)
            if conn.recv(3, socket.MSG_WAITALL) == b"bye":
                return conn
        except ConnectionResetError:
            pass
conn = reaches()
assert conn.recv(1) == b""
conn.sendall(bytes(1 << 20))
conn.close()
conn = socket.create_connection(("198.51.100.100", 18006), timeout=60)
conn.sendall(b"x")
try:
    assert False, conn.recv(9)
except ConnectionResetError:
    pass
conn = socket.create_connection(("198.51.100.100", 18006), timeout=60)
conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
conn.sendall(b"x")
conn.close()
"#,
        );
        assert_eq!(server.join().expect("serves"), "listening\n1048576\nECONNRESET\n");
    });
    started.stop();
}

#[test]
fn nginx_stands_a_load() {
    let network = Network::new();
    let (test, started) = nginx(TestBox::debian().inside(&network));
    assert_stands_a_load(&network, 600);
    let log = shell(&test, "sort /var/log/nginx/access.log | cut -d' ' -f1 | uniq -c");
    let lines: Vec<_> = log.split_whitespace().collect();
    // 1200, the one of `until_answered`, and those that ab had open when it stopped.
    let all_from_here = lines.len() == 2 && lines[1] == "198.51.100.1";
    assert!(all_from_here && lines[0].parse::<u32>().expect("a count") > 1200, "{log}");
    started.stop();
}

/// Starts a box whose nginx is published on port 18080.
pub fn nginx(test: TestBox) -> (TestBox, Started) {
    let test = test.without_console_file().with("port_map", json!(["18080:80"])).shell(
        "echo 'load me' >/var/www/html/index.html; echo ready; nginx -g 'daemon off;' & wait",
    );
    let started = test.ready();
    (test, started)
}

/// Loads [`nginx`] from its box's network, with and without connections that are kept.
pub fn assert_stands_a_load(network: &Network, requests: u32) {
    until_answered(network, 18080);
    let number = requests.to_string();
    for how in [&["-c", "50"][..], &["-c", "50", "-k"]] {
        let ab = [&["ab", "-q", "-n", &number], how, &["http://198.51.100.100:18080/"]].concat();
        let said = network.outside.run(&ab);
        assert!(said.contains(&format!("Complete requests:      {requests}\n")), "{said}");
        assert!(said.contains("Failed requests:        0\n"), "{said}");
        assert!(!said.contains("Non-2xx"), "{said}");
    }
}

/// Waits until a published web server answers. Until then, connections are closed.
fn until_answered(network: &Network, port: u16) {
    let url = format!("http://198.51.100.100:{port}/");
    eventually("the server answers", || {
        let curl = ["curl", "-sf", "--max-time", "60", "-o", "/dev/null", &url];
        network.outside.command(&curl).status().expect("curl runs").success()
    });
}

#[test]
fn five_hundred_clients_at_once() {
    let network = Network::new();
    let test = serving(&network);
    let started = test.ready();
    let before = started.descriptors();
    network.outside.python(
        r#"
import asyncio
async def main():
    pairs = await asyncio.gather(*(
        asyncio.open_connection("198.51.100.100", 18001 + number % 5) for number in range(500)))
    # All are open: each has been greeted before any says a word.
    for reader, _ in pairs:
        assert b"198.51.100.1" in await reader.readline()
    async def talk(number, reader, writer):
        data = f"number {number} ".encode() * 50
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == data.upper() + b"tail", number
        writer.close()
    await asyncio.gather(*(talk(number, *pair) for number, pair in enumerate(pairs)))
asyncio.run(main())
"#,
    );
    eventually("their descriptors go", || started.descriptors() <= before);
    started.stop();
}

#[test]
fn a_server_may_come_late_and_come_again() {
    let network = Network::new();
    let test = TestBox::debian().inside(&network).with("port_map", json!(["18080:8080"]));
    // The port is open before the guest is up: an early client is not refused, and its connection ends.
    let (test, started) = std::thread::scope(|scope| {
        let early = scope.spawn(|| {
            network.outside.python(
                r#"
import socket, time
limit = time.monotonic() + 60
while True:
    assert time.monotonic() < limit, "nobody ever listened"
    try:
        assert socket.create_connection(("198.51.100.100", 18080), timeout=100).recv(9) == b""
        break
    except ConnectionRefusedError:  # mote has not begun
        pass
    except ConnectionResetError:
        break
"#,
            )
        });
        let up = test.idle();
        early.join().expect("an early client");
        up
    });
    let serve = "cd /etc/apt && { python3 -m http.server 8080 >/dev/null 2>&1 & echo $!; }";
    for _ in 0..3 {
        let pid = shell(&test, serve);
        until_answered(&network, 18080);
        shell(&test, &format!("kill -9 {pid}"));
        let curl = ["curl", "-s", "--max-time", "60", "http://198.51.100.100:18080/"];
        let status = network.outside.command(&curl).status().expect("curl runs");
        // Refused, an empty reply, or a reset before the request was sent or after it; not a time-out (28).
        assert!(matches!(status.code(), Some(7 | 52 | 55 | 56)), "{status}");
    }
    started.stop();
}

#[test]
fn only_mapped_ports_are_published() {
    let network = Network::new();
    for (map, expected) in [(json!([]), ""), (json!(["18003:8001"]), "18003")] {
        let test = serving(&network).with("port_map", map);
        let started = test.ready();
        let listening =
            network.host.run(&["ss", "-H", "--listening", "--tcp", "--udp", "--numeric"]);
        let ports: Vec<&str> = listening
            .lines()
            .filter_map(|line| line.split_whitespace().nth(4)?.rsplit(':').next())
            .collect();
        assert!(ports.iter().all(|&port| port == expected), "{listening}");
        assert_eq!(ports.is_empty(), expected.is_empty(), "{listening}");
        started.stop();
        // And no listener is left.
        assert_eq!(network.host.run(&["ss", "-H", "--listening", "--tcp", "--numeric"]), "");
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let network = Network::new();
    let test = serving(&network);
    let started = test.ready();
    let second =
        TestBox::busybox().inside(&network).with("port_map", json!(["18009:1", "18003:80"]));
    let ran = second.run();
    ran.assert_not_started(&["18003"]);
    assert!(!ran.stderr.contains("18009"), "{}", ran.stderr);
    // The first box still works, and when it has ended the port is free at once.
    let greet = "import socket; print(socket.create_connection(('127.0.0.1', 18003), 60).recv(99).decode())";
    assert_eq!(network.host.python(greet).trim(), "127.0.0.1");
    started.stop();
    assert_eq!(second.run().code, 0);
}

#[test]
fn a_port_map_that_cannot_be_is_explained() {
    for entry in
        ["8080", "127.0.0.1:8080:80", "8080:80/sctp", "80:0", "65536:80", "80:65536", ":", ""]
    {
        let ran = TestBox::busybox().with("port_map", json!(["18080:80", entry])).run();
        assert_eq!((ran.code, ran.stderr.lines().count()), (125, 1), "{entry}: {}", ran.stderr);
        assert!(ran.stderr.starts_with("mote: spec: port_map[1]: "), "{entry}: {}", ran.stderr);
    }
    for map in [["8080:80", "8080:81"], ["8080:80", "8081:80"]] {
        let ran = TestBox::busybox().with("port_map", json!(map)).run();
        assert_eq!(ran.code, 125, "{map:?}: {}", ran.stderr);
        assert!(ran.stderr.starts_with("mote: spec: port_map"), "{map:?}: {}", ran.stderr);
    }
    // As the reference does.
    let ran = TestBox::busybox().with("port_map", json!(["18080:80/tcp", "0:80"])).run();
    let passed_over = "port_map[1]: is \"0:80\", which names no port of the host";
    assert!(ran.code == 0 && ran.stderr.contains(passed_over), "{} {}", ran.code, ran.stderr);
}

/// Sends and receives 64 MiB at once, as a client or as a server of one connection.
const PUMP: &str = include_str!("python/pump.py");

#[test]
fn large_transfers_go_both_ways_on_both_kinds_of_connections() {
    let network = Network::new();
    let _outside = network.outside.serve_with(PUMP, &["serve", "198.51.100.1", "7010"]);
    let (test, started) =
        TestBox::debian().inside(&network).with("port_map", json!(["18010:8010"])).idle();
    std::thread::scope(|scope| {
        let outbound =
            scope.spawn(|| python_with(&test, PUMP, &["connect", "198.51.100.1", "7010"]));
        let published =
            scope.spawn(|| python_with(&test, PUMP, &["serve", "0.0.0.0", "8010", "/listens"]));
        eventually("the server listens", || test.path("root/listens").exists());
        network.host.python_with(PUMP, &["connect", "127.0.0.1", "18010"]);
        outbound.join().expect("outbound");
        published.join().expect("published");
    });
    assert_eq!(run(&test, &["true"]).code, 0);
    started.stop();
}
