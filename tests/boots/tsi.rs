//! Connections to the outside with `network` null: what programs in the box see of them, and what the
//! servers see of the programs.

use std::fs;
use std::process::Command;

use serde_json::json;

use crate::common::{TestBox, compile, eventually};
use crate::network::{Network, python, python_with, run, shell};
use crate::processes::own_memory_kib;

/// Serves HTTP and HTTPS in both families, and the digest of what comes on port 7010.
const WEB: &str = include_str!("python/web.py");

/// A network with the web server; its certificate authority is `cert.pem` in its directory.
pub fn web() -> (Network, crate::network::Server) {
    let network = Network::new();
    let made = Command::new("openssl")
        .args("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 7".split(' '))
        .args(["-subj", "/CN=mote test", "-keyout", "key.pem", "-out", "cert.pem"])
        .args(["-addext", "subjectAltName=IP:198.51.100.1,IP:2001:db8::1"])
        .current_dir(&network.dir)
        .output()
        .expect("openssl runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let server = network.outside.serve(WEB);
    (network, server)
}

/// What a server may do with a connection, on ports 7001 to 7008.
pub const SERVERS: &str = include_str!("python/servers.py");

#[test]
fn usual_clients_fetch_over_http_and_https() {
    let (network, _server) = web();
    let test = TestBox::debian().inside(&network);
    fs::copy(network.dir.join("cert.pem"), test.path("root/ca.pem")).expect("copied");
    let (test, started) = test.idle();
    usual_clients_fetch(&test, &["198.51.100.1", "2001:db8::1"]);
    let mapped = "curl -sS --max-time 60 http://[::ffff:198.51.100.1]/curl";
    assert_eq!(shell(&test, mapped), "hello /curl");
    started.stop();
}

/// Has python's clients fetch from the addresses that it is given.
const FETCH: &str = include_str!("python/fetch.py");

/// Has curl, python's clients and netcat fetch from these addresses of [`web`]. The certificate is the
/// box's `/ca.pem`.
pub fn usual_clients_fetch(test: &TestBox, addresses: &[&str]) {
    let hosts = addresses.iter().map(|address| match address.contains(':') {
        true => format!("[{address}]"),
        false => (*address).to_owned(),
    });
    let hosts: Vec<String> = hosts.collect();
    for host in &hosts {
        let said = shell(test, &format!("curl -sS --max-time 60 http://{host}/curl"));
        assert_eq!(said, "hello /curl", "{host}");
        let curl = format!("curl -sS --max-time 60 --cacert /ca.pem https://{host}/tls");
        assert_eq!(shell(test, &curl), "hello /tls", "{host}");
    }
    let said = python_with(test, FETCH, addresses);
    let together = vec!["hello /asyncio"; 2 * hosts.len()].join(" ");
    let each = "hello /urllib\nhello /requests\nhello /requests\nhello /requests\n";
    assert_eq!(said, format!("{together}\n{}", each.repeat(hosts.len())));
    let netcat = r"printf 'GET /nc HTTP/1.0\r\n\r\n' | nc -w 60 198.51.100.1 80 | tail -n 1";
    assert_eq!(shell(test, netcat), "hello /nc");
}

#[test]
fn busybox_fetches() {
    let (network, _server) = web();
    let test = TestBox::busybox().inside(&network);
    let (test, started) = test.idle();
    for host in ["198.51.100.1", "[2001:db8::1]"] {
        let said = shell(&test, &format!("timeout 60 wget -q -O - http://{host}/wget"));
        assert_eq!(said, "hello /wget", "{host}");
    }
    let netcat = r"printf 'GET /nc HTTP/1.0\r\n\r\n' | nc -w 60 198.51.100.1 80 | tail -n 1";
    assert_eq!(shell(&test, netcat), "hello /nc");
    started.stop();
}

#[test]
fn an_entrypoint_without_privileges_connects() {
    let (network, _server) = web();
    let ran = TestBox::debian()
        .inside(&network)
        .shell("id -u; exec curl -sS --max-time 60 http://198.51.100.1/user")
        .with("user", json!("1000:1000"))
        .run();
    assert_eq!((ran.code, ran.console.as_str()), (0, "1000\nhello /user"), "{}", ran.stderr);
}

#[test]
fn the_first_sockets_of_a_box_are_carried_like_all_others() {
    // What carries them is started with the first, which waits for it, and so do those that are asked for meanwhile.
    let (network, _server) = web();
    let script = "grep -qx mote-network /proc/[0-9]*/comm 2>/dev/null && echo early
        for i in 1 2 3 4; do curl -sS --max-time 60 http://198.51.100.1/first & done; wait
        exec grep -hx mote-network /proc/[0-9]*/comm 2>/dev/null";
    let ran = TestBox::debian().inside(&network).shell(script).run();
    let expected = format!("{}mote-network", "hello /first".repeat(4));
    assert_eq!(ran.console.replace('\n', ""), expected, "{}", ran.stderr);
}

#[test]
fn a_program_that_makes_its_own_system_calls_connects() {
    let network = Network::new();
    let _servers = network.outside.serve(SERVERS);
    let test = TestBox::busybox().inside(&network);
    let options = "-O1 -static -nostdlib -ffreestanding -fno-stack-protector -Wall -Werror";
    compile("gcc", options, "raw.c", &test.path("root/bin/raw"));
    let (test, started) = test.idle();
    let done = run(&test, &["/bin/raw"]);
    let expected = "\
blocking: connected to 198.51.100.1:7001, said HI
non-blocking: errno 115, then 0, said HI
refused: errno 111
refused, non-blocking: errno 115, then 111
";
    assert_eq!((done.stdout.as_str(), done.code), (expected, 0));
    started.stop();
}

#[test]
fn the_peer_is_who_was_asked_for() {
    let network = Network::new();
    let _servers = network.outside.serve(SERVERS);
    let (test, started) = TestBox::debian().inside(&network).idle();
    let said = python(
        &test,
        r#"
import socket
for family, address in (
    (socket.AF_INET, ("198.51.100.1", 7001)),
    (socket.AF_INET6, ("2001:db8::1", 7001)),
    (socket.AF_INET6, ("::ffff:198.51.100.1", 7001)),
):
    s = socket.socket(family)
    s.connect(address)
    print(*s.getpeername()[:2])
    s.sendall(b"x")
    assert s.recv(1) == b"X" and s.getpeername()[:2] == address
"#,
    );
    assert_eq!(said, "198.51.100.1 7001\n2001:db8::1 7001\n::ffff:198.51.100.1 7001\n");
    started.stop();
}

/// Prints the errors of connects to each destination, blocking and not.
const ATTEMPTS: &str = include_str!("python/attempts.py");

/// The errors of connects to these, blocking and not.
fn errors_of(test: &TestBox, destinations: &[(&str, u16)]) -> String {
    let words =
        destinations.iter().flat_map(|(address, port)| [(*address).into(), port.to_string()]);
    let words: Vec<String> = words.collect();
    python_with(test, ATTEMPTS, &words.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn a_failed_connect_says_why() {
    let network = Network::new();
    let _servers = network.outside.serve(SERVERS);
    // To .9 and ::9, packets are sent and nobody answers. Others on the link do not answer the question for
    // their hardware address.
    network.host.ip("neighbour add 198.51.100.9 lladdr 02:00:00:00:00:09 dev outside nud permanent
        neighbour add 2001:db8::9 lladdr 02:00:00:00:00:09 dev outside nud permanent
        route add unreachable 198.51.100.66
        route add unreachable 2001:db8::66");
    // A connect gives up after seconds instead of two minutes, and a question for an address after one
    // second instead of three.
    network.host.run(&[
        "sh",
        "-c",
        "cd /proc/sys/net/ipv4 && echo 2 >tcp_syn_retries && echo 1 >neigh/outside/mcast_solicit",
    ]);
    let (test, started) = TestBox::debian().inside(&network).idle();
    let said = errors_of(
        &test,
        &[
            ("198.51.100.1", 7001),
            ("198.51.100.1", 1),
            ("203.0.113.1", 80),
            ("198.51.100.66", 80),
            ("198.51.100.70", 80),
            ("198.51.100.9", 80),
            ("2001:db8::1", 7001),
            ("2001:db8::1", 1),
            ("2001:db8:1::1", 80),
            ("2001:db8::66", 80),
            ("2001:db8::9", 80),
            ("::ffff:198.51.100.1", 1),
            ("::ffff:203.0.113.1", 80),
        ],
    );
    let expected = "\
198.51.100.1 7001 0 0
198.51.100.1 1 ECONNREFUSED ECONNREFUSED
203.0.113.1 80 ENETUNREACH ENETUNREACH
198.51.100.66 80 EHOSTUNREACH EHOSTUNREACH
198.51.100.70 80 EHOSTUNREACH EHOSTUNREACH
198.51.100.9 80 ETIMEDOUT ETIMEDOUT
2001:db8::1 7001 0 0
2001:db8::1 1 ECONNREFUSED ECONNREFUSED
2001:db8:1::1 80 ENETUNREACH ENETUNREACH
2001:db8::66 80 EHOSTUNREACH EHOSTUNREACH
2001:db8::9 80 ETIMEDOUT ETIMEDOUT
::ffff:198.51.100.1 1 ECONNREFUSED ECONNREFUSED
::ffff:203.0.113.1 80 ENETUNREACH ENETUNREACH
";
    assert_eq!(said, expected);
    started.stop();
}

/// Errors travel as ICMP. Over IPv4 it has none for these two, and the program gets the nearest.
#[test]
fn a_forbidden_destination_is_named_as_such() {
    let network = Network::new();
    network.host.ip("route add prohibit 198.51.100.67
        route add prohibit 2001:db8::67
        route add blackhole 198.51.100.68");
    let (test, started) = TestBox::debian().inside(&network).idle();
    let destinations = [("198.51.100.67", 80), ("2001:db8::67", 80), ("198.51.100.68", 80)];
    let expected = "198.51.100.67 80 EHOSTUNREACH EHOSTUNREACH\n2001:db8::67 80 EACCES EACCES\n198.51.100.68 80 ENETUNREACH ENETUNREACH\n";
    assert_eq!(errors_of(&test, &destinations), expected);
    started.stop();
}

#[test]
fn ends_and_resets_cross_as_they_are() {
    let network = Network::new();
    let mut servers = network.outside.serve(SERVERS);
    let (test, started) = TestBox::debian().inside(&network).idle();
    for host in ["198.51.100.1", "2001:db8::1"] {
        python_with(&test, ENDS, &[host, "the_guest_ends_first"]);
        python_with(&test, ENDS, &[host, "the_server_ends_first"]);
        assert_eq!(servers.line(), "end 1048576");
        python_with(&test, ENDS, &[host, "the_server_resets"]);
        for (end, reported) in [
            ("sends", "end 1000"),
            ("is_killed", "end 1000"),
            ("resets", "ECONNRESET"),
            ("leaves_something_unread", "ECONNRESET"),
        ] {
            run(&test, &["python3", "-c", ENDS, host, end]);
            assert_eq!(servers.line(), reported, "{host}: {end}");
        }
    }
    started.stop();
}

#[test]
fn the_last_words_of_a_box_arrive() {
    let network = Network::new();
    let mut servers = network.outside.serve(SERVERS);
    let test =
        TestBox::debian().inside(&network).python(ENDS, &["198.51.100.1", "sends", "8388608"]);
    assert_eq!(test.run().code, 0);
    assert_eq!(servers.line(), "end 8388608");
}

/// How a client may end its connection, or see it end.
const ENDS: &str = include_str!("python/ends.py");

/// The most memory of its own, in KiB, that a process had during some work.
fn most_memory_kib(pid: u32, work: impl FnOnce() + Send) -> u64 {
    std::thread::scope(|scope| {
        let work = scope.spawn(work);
        let mut most = own_memory_kib(pid);
        while !work.is_finished() {
            most = most.max(own_memory_kib(pid));
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        work.join().expect("it works");
        most
    })
}

fn available_kib(test: &TestBox) -> i64 {
    let said = shell(
        test,
        "echo 3 >/proc/sys/vm/drop_caches; awk '/^MemAvailable/ {print $2}' /proc/meminfo",
    );
    said.trim().parse().expect("a number")
}

#[test]
fn large_transfers_arrive_whole_in_flat_memory() {
    let (network, _server) = web();
    let (test, started) = TestBox::debian().inside(&network).idle();
    let expected = shell(&test, "curl -sS http://198.51.100.1/sha256/128");
    let mote = started.pid();
    let (before, available) = (own_memory_kib(mote), available_kib(&test));
    let most = most_memory_kib(mote, || {
        let digest = shell(
            &test,
            "curl -sS http://198.51.100.1/mib/128 | openssl dgst -sha256 -r | cut -d' ' -f1",
        );
        assert_eq!(digest.trim(), expected, "download");
        let digest = python(
            &test,
            r#"
import hashlib, random, socket
block = random.Random(2).randbytes(1 << 20)
digest = hashlib.sha256()
conn = socket.create_connection(("198.51.100.1", 7010))
for number in range(128):
    data = number.to_bytes(8, "big") + block[8:]
    digest.update(data)
    conn.sendall(data)
conn.shutdown(socket.SHUT_WR)
print(conn.recv(64, socket.MSG_WAITALL).decode() == digest.hexdigest())
"#,
        );
        assert_eq!(digest, "True\n", "upload");
    });
    assert!(most < before + 16 * 1024, "mote's memory grew from {before} to {most} KiB");
    let left = available_kib(&test);
    assert!(left > available - 16 * 1024, "the guest's memory went from {available} to {left} KiB");
    started.stop();
}

#[test]
fn a_reader_that_stops_holds_up_its_writer_and_nobody_else() {
    let network = Network::new();
    let mut servers = network.outside.serve(SERVERS);
    let (test, started) = TestBox::debian().inside(&network).idle();
    let mote = started.pid();
    let mut sent = String::new();
    let most = most_memory_kib(mote, || {
        sent = python(
            &test,
            r#"
import socket
def connect(port):
    return socket.create_connection(("198.51.100.1", port), timeout=60)
# Towards the server, which does not read.
stalled = connect(7006)
stalled.settimeout(3)
sent = 0
try:
    while sent < 1 << 30:
        sent += stalled.send(bytes(65536))
except TimeoutError:
    pass
# From a server, which is not read.
flooding = connect(7008)
# Meanwhile, others.
for _ in range(10):
    conn = connect(7001)
    conn.sendall(b"abc")
    conn.shutdown(socket.SHUT_WR)
    answer = b""
    while part := conn.recv(65536):
        answer += part
    assert answer == b"ABCtail"
# Nothing is lost: it goes on where it stopped.
import time; time.sleep(6)  # until the flood is stuck too, which shows nowhere in here
connect(7007)
stalled.settimeout(60)
stalled.sendall(b"the end")
stalled.close()
received = 0
while data := flooding.recv(65536):
    received += len(data)
print(sent + 7, received)
"#,
        );
    });
    let mut reports = [servers.line(), servers.line()];
    reports.sort();
    let counts: Vec<u64> = sent.split_whitespace().map(|n| n.parse().expect("a number")).collect();
    assert_eq!(reports, [format!("end {}", counts[0]), format!("sent {}", counts[1])]);
    assert!(counts.iter().all(|&count| count < 64 << 20), "bounded: {counts:?}");
    assert!(most < 32 * 1024, "mote's memory: {most} KiB");
    started.stop();
}

#[test]
fn two_hundred_connections_live_side_by_side() {
    let network = Network::new();
    let _servers = network.outside.serve(SERVERS);
    let (test, started) = TestBox::debian().inside(&network).idle();
    let before = started.descriptors();
    two_hundred_connections(&test, &["198.51.100.1", "2001:db8::1"], "half-close");
    eventually("their descriptors go", || started.descriptors() <= before);
    started.stop();
}

/// Talks over 200 connections at once.
const TWO_HUNDRED: &str = include_str!("python/two_hundred.py");

/// Has the box talk over 200 connections at once to these addresses of [`SERVERS`], each of which ends by
/// `half-close` or by `close`.
pub fn two_hundred_connections(test: &TestBox, addresses: &[&str], ending: &str) {
    let said = python_with(test, TWO_HUNDRED, &[&[ending], addresses].concat());
    assert_eq!(said, "all 200\n");
}

#[test]
fn who_kills_all_processes_keeps_the_network() {
    let (network, _server) = web();
    let test = TestBox::debian()
        .inside(&network)
        .shell(
            "curl -sS --max-time 60 http://198.51.100.1/before; echo; kill -9 -1
            curl -sS --max-time 60 http://198.51.100.1/survivor; echo; echo ready; exec sleep 10000",
        )
        .without_console_file();
    let mut started = test.start();
    started.wait_for_line("hello /before");
    started.wait_for_line("hello /survivor");
    started.wait_for_line("ready");
    assert_eq!(shell(&test, "curl -sS --max-time 60 http://198.51.100.1/later"), "hello /later");
    started.stop();
}
