//! Datagrams with `network` null: UDP, name servers, and what is not carried.

use std::fs;

use crate::common::{TestBox, compile, eventually};
use crate::network::{Namespace, Network, Server, python, run, shell};

/// Echoes datagrams on two ports of both families, each with the port's last digit in front.
const ECHO: &str = include_str!("python/echo.py");

#[test]
fn datagrams_go_there_and_back() {
    let network = Network::new();
    let _server = network.outside.serve(ECHO);
    let (test, started) = TestBox::debian().inside(&network).idle();
    python(
        &test,
        r#"
import errno, socket
def udp(family):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(60)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    return s
for family, host, longest in (
    (socket.AF_INET, "198.51.100.1", 65507), (socket.AF_INET6, "2001:db8::1", 65507),
    (socket.AF_INET6, "::ffff:198.51.100.1", 65507),
):
    # Of any length, also none; to two places from one socket; and from who it is.
    s = udp(family)
    for size in (0, 1, 2, 512, 1472, 1473, 9000, 32768, 60000, longest):
        for port, digit in ((9001, b"1"), (9002, b"2")):
            data = bytes(i & 255 for i in range(size))
            s.sendto(data, (host, port))
            reply, peer = s.recvfrom(70000)
            assert peer[:2] == (host, port), (host, port, peer)
            assert reply == (digit + data)[:size], (host, port, size, len(reply))
    # The same on a connected socket, which hears nobody else.
    c = udp(family)
    c.connect((host, 9001))
    assert c.getpeername()[:2] == (host, 9001), c.getpeername()
    for size in (0, 1, 1473, 60000):
        c.send(bytes(size))
        reply, peer = c.recvfrom(70000)
        assert len(reply) == size and peer[:2] == (host, 9001)
    # A connected socket can be sent elsewhere by connecting again.
    c.connect((host, 9002))
    c.send(b"ab")
    assert c.recv(9) == b"2a" and c.getpeername()[:2] == (host, 9002)
    # Several on the way at once.
    for number in range(20):
        s.sendto(b"%02d" % number, (host, 9001))
    assert sorted(s.recv(9) for _ in range(20)) == sorted((b"1%02d" % n)[:2] for n in range(20))
"#,
    );
    started.stop();
}

#[test]
fn nobody_there_is_said_to_a_connected_socket() {
    let network = Network::new();
    let (test, started) = TestBox::debian().inside(&network).idle();
    python(
        &test,
        r#"
import socket
for family, host in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(60)
    s.connect((host, 1))
    s.send(b"x")
    try:
        assert False, s.recv(9)
    except ConnectionRefusedError:
        pass
"#,
    );
    started.stop();
}

/// Resolves names below mote.test, and prints each question.
///   host     198.51.100.1 and 2001:db8::1
///   inside   127.0.0.1
///   long     as host, but only over TCP: what fits into a datagram is cut
const RESOLVER: &str = include_str!("python/resolver.py");

fn resolver(at: &Namespace, addresses: &[&str]) -> Server {
    at.serve_with(RESOLVER, addresses)
}

/// Makes this the box's name server. The box repeats a question after 30 s only, and the tests give
/// each less than that: a name that resolves was answered at once.
fn asks(test: &TestBox, server: &str) {
    let text = format!("nameserver {server}\noptions timeout:30 attempts:1\n");
    fs::write(test.path("root/etc/resolv.conf"), text).expect("resolv.conf");
}

/// Gives the box a static program with musl's resolver. It asks from unconnected sockets; glibc's sockets
/// are connected.
fn install_musl_client(test: &TestBox) {
    let program = test.path("root/bin/resolve");
    compile("musl-gcc", "-O1 -static -Wall -Werror", "musl.c", &program);
}

#[test]
fn names_resolve_at_once_or_fail_at_once() {
    let network = Network::new();
    let mut server = resolver(&network.outside, &["198.51.100.1", "2001:db8::1"]);
    let test = TestBox::debian().inside(&network);
    asks(&test, "198.51.100.1");
    install_musl_client(&test);
    let (test, started) = test.idle();
    let getent = |what: &str, name: &str| {
        let done = run(&test, &["timeout", "25", "getent", what, name]);
        (done.code, done.stdout.split_whitespace().next().unwrap_or_default().to_owned())
    };
    let found = |address: &str| (0, address.to_owned());
    let not_found = (2, String::new());

    assert_eq!(getent("ahostsv4", "host.mote.test"), found("198.51.100.1"));
    assert_eq!(server.line(), "udp host.mote.test 1");
    assert_eq!(getent("hosts", "host.mote.test"), found("2001:db8::1"));
    assert_eq!(server.line(), "udp host.mote.test 28");
    assert_eq!(getent("hosts", "nobody.mote.test"), not_found);
    for _ in 0..2 {
        let question = server.line();
        assert!(question.starts_with("udp nobody.mote.test "), "{question}");
    }
    assert_eq!(getent("ahostsv4", "long.mote.test"), found("198.51.100.1"));
    assert_eq!(
        [server.line(), server.line()].join(", "),
        "udp long.mote.test 1, tcp long.mote.test 1"
    );

    let said = shell(&test, "timeout 25 resolve host.mote.test");
    assert_eq!(said, "2001:db8::1\n198.51.100.1\n");
    let done = run(&test, &["timeout", "25", "resolve", "nobody.mote.test"]);
    assert_eq!((done.code, done.stdout.as_str()), (1, "Name does not resolve\n"));
    let said = python(
        &test,
        "import socket\nprint(sorted({a[4][0] for a in socket.getaddrinfo('host.mote.test', 80)}))",
    );
    assert_eq!(said, "['198.51.100.1', '2001:db8::1']\n");

    // Over IPv6, and at addresses where nobody answers. Resolvers read the file again for each question.
    asks(&test, "2001:db8::1");
    assert_eq!(getent("ahostsv4", "host.mote.test"), found("198.51.100.1"));
    asks(&test, "198.51.100.2");
    assert_eq!(getent("hosts", "host.mote.test"), not_found);
    let done = run(&test, &["timeout", "25", "curl", "-sS", "http://host.mote.test/"]);
    assert_eq!(done.code, 6, "curl could not resolve it, in time: {}", done.stderr);
    asks(&test, "203.0.113.53");
    assert_eq!(getent("hosts", "host.mote.test"), not_found, "no route to the resolver");
    started.stop();
}

#[test]
fn busybox_resolves() {
    let network = Network::new();
    let _server = resolver(&network.outside, &["198.51.100.1"]);
    let test = TestBox::busybox().inside(&network);
    asks(&test, "198.51.100.1");
    install_musl_client(&test);
    let (test, started) = test.idle();
    let said = shell(&test, "timeout 25 nslookup host.mote.test");
    for address in ["198.51.100.1", "2001:db8::1"] {
        assert!(said.contains(&format!("Address: {address}\n")), "{said}");
    }
    assert_eq!(shell(&test, "timeout 25 resolve host.mote.test"), "2001:db8::1\n198.51.100.1\n");
    started.stop();
}

#[test]
fn a_loopback_resolver_in_the_box_means_the_hosts() {
    // A resolver of the host's on loopback, like systemd-resolved, one on another of its addresses, and one
    // elsewhere.
    for place in ["127.0.0.53", "198.51.100.100", "198.51.100.1"] {
        let network = Network::new();
        let at = if place == "198.51.100.1" { &network.outside } else { &network.host };
        let mut server = resolver(at, &[place]);
        let test = TestBox::debian()
            .inside(&network)
            .with_host_resolver(&format!("# the host's\nnameserver {place}\noptions edns0\n"));
        asks(&test, "127.0.0.53");
        install_musl_client(&test);
        let (test, started) = test.idle();
        // glibc, then musl, then TCP.
        let said = shell(&test, "timeout 25 getent ahostsv4 host.mote.test | head -n 1");
        assert!(said.starts_with("198.51.100.1 "), "{place}: {said}");
        assert_eq!(server.line(), "udp host.mote.test 1");
        let said = shell(&test, "timeout 25 resolve host.mote.test");
        assert_eq!(said, "2001:db8::1\n198.51.100.1\n", "{place}");
        let said = shell(&test, "timeout 25 getent ahostsv4 long.mote.test | head -n 1");
        assert!(said.starts_with("198.51.100.1 "), "{place}: {said}");
        assert_eq!(run(&test, &["timeout", "25", "getent", "hosts", "nobody.mote.test"]).code, 2);
        // No other port of the host's loopback can be reached, by whatever name.
        let done = run(&test, &["curl", "-sS", "--max-time", "60", "http://inside.mote.test:53/"]);
        assert_eq!(done.code, 7, "{place}: refused: {}", done.stderr);
        started.stop();
    }
}

#[test]
fn five_hundred_questions_leave_nothing_behind() {
    let network = Network::new();
    let _server = network.outside.serve(ECHO);
    let (test, started) = TestBox::debian().inside(&network).idle();
    let before = started.descriptors();
    python(
        &test,
        r#"
import socket
for number in range(500):
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        s.settimeout(60)
        data = b"question %d" % number
        if number % 2:
            s.connect(("198.51.100.1", 9001))
            s.send(data)
        else:
            s.sendto(data, ("198.51.100.1", 9001))
        assert s.recv(100) == (b"1" + data)[:len(data)]
# And at once.
many = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(200)]
for s in many:
    s.settimeout(60)
    s.sendto(b"ab", ("198.51.100.1", 9001))
for s in many:
    assert s.recv(9) == b"1a"
"#,
    );
    eventually("their descriptors go", || started.descriptors() <= before + 8);
    started.stop();
}

/// Prints what comes.
const SINK: &str = r#"
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("198.51.100.1", 9003))
print("ready", flush=True)
while True:
    print(server.recv(100).decode(), flush=True)
"#;

/// Syslog and statsd clients send and close at once. Here the box ends as well.
#[test]
fn what_was_sent_before_a_close_arrives() {
    let network = Network::new();
    let mut server = network.outside.serve(SINK);
    let script = r#"
import socket
for number in range(20):
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        if number % 2:
            s.connect(("198.51.100.1", 9003))
            s.send(b"%d" % number)
        else:
            s.sendto(b"%d" % number, ("198.51.100.1", 9003))
"#;
    let test = TestBox::debian().inside(&network).python(script, &[]);
    assert_eq!(test.run().code, 0);
    // Each has a port of its own on the host, so they may come in another order.
    let mut numbers: Vec<u32> = (0..20).map(|_| server.line().parse().expect("a number")).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, Vec::from_iter(0..20));
}

#[test]
fn what_is_not_carried_fails_at_once() {
    let network = Network::new();
    let (test, started) = TestBox::debian().inside(&network).idle();
    for address in ["198.51.100.1", "2001:db8::1"] {
        let done = run(&test, &["timeout", "25", "ping", "-c", "1", "-W", "20", address]);
        // iputils keeps an error of sendto(2) to itself; it does not wait, though.
        assert!(![0, 124].contains(&done.code), "{done:?}");
        assert!(done.stdout.contains("100% packet loss"), "{done:?}");
    }
    // The guest's own loopback answers.
    assert_eq!(run(&test, &["ping", "-c", "1", "-W", "60", "127.0.0.1"]).code, 0);
    python(
        &test,
        r#"
import errno, socket
CLEAR = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP,
         errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT)
def fails(family, kind, protocol, address, *options):
    try:
        with socket.socket(family, kind, protocol) as s:
            for option in options:
                s.setsockopt(*option)
            s.sendto(b"\x08\x00\x00\x00\x00\x00\x00\x00", address)
        assert False, ("sent", address)
    except OSError as e:
        assert e.errno in CLEAR, (address, e)
        print(kind, address, errno.errorcode[e.errno])
broadcast = (socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
IP_RECVERR = {socket.AF_INET: 11, socket.AF_INET6: 25}
v4, v6, dgram, raw = socket.AF_INET, socket.AF_INET6, socket.SOCK_DGRAM, socket.SOCK_RAW
fails(v4, raw, socket.IPPROTO_ICMP, ("198.51.100.1", 0))
fails(v4, raw, socket.IPPROTO_UDP, ("198.51.100.1", 0))
fails(v4, raw, socket.IPPROTO_RAW, ("198.51.100.1", 0))
fails(v6, raw, socket.IPPROTO_ICMPV6, ("2001:db8::1", 0))
fails(v4, dgram, 0, ("255.255.255.255", 9), broadcast)
fails(v4, dgram, 0, ("224.0.0.251", 5353))
fails(v6, dgram, 0, ("ff02::fb", 5353))
# Datagrams leave without an answer; a connected socket that asks for it is told.
for family, level, address in (
    (v4, socket.SOL_IP, "203.0.113.1"), (v6, socket.IPPROTO_IPV6, "2001:db8:1::1")
):
    with socket.socket(family, dgram) as s:
        s.settimeout(60)
        s.setsockopt(level, IP_RECVERR[family], 1)
        s.connect((address, 9))
        s.send(b"x")
        try:
            assert False, s.recv(1)
        except OSError as e:
            assert e.errno == errno.ENETUNREACH, e
"#,
    );
    started.stop();
}
