//! Where a box may connect to: the host itself is out of reach, and rules decide about the rest.

use std::fs;

use serde_json::{Value, json};

use crate::common::TestBox;
use crate::network::{Network, Server, python_with, run};
use crate::passt::{self, SocketDir, passt_in};

/// Serves on these addresses by TCP and UDP, at port 7777.
const WITNESS: &str = include_str!("python/witness.py");
/// Says what becomes of connections to these addresses.
const REACH: &str = include_str!("python/reach.py");

/// A metadata service outside, the host on a bridge of its own too, and servers everywhere.
fn world(network: &Network) -> [Server; 2] {
    network.outside.ip("address add 169.254.169.254/32 dev inside");
    network.host.ip("link add bridge0 type bridge
        link set bridge0 up
        address add 172.31.0.1/16 dev bridge0
        route add 169.254.0.0/16 dev outside
        route add local 203.0.113.0/24 dev lo");
    [
        network.host.serve_with(WITNESS, &["0.0.0.0", "2001:db8::100"]),
        network.outside.serve_with(
            WITNESS,
            &["198.51.100.1", "198.51.100.2", "2001:db8::1", "169.254.169.254"],
        ),
    ]
}

fn reach(test: &TestBox, addresses: &[&str]) -> String {
    python_with(test, REACH, &[&["7777"], addresses].concat())
}

/// The same by connected sockets alone: on passt Linux tells others nothing.
fn reach_connected(test: &TestBox, addresses: &[&str]) -> String {
    python_with(test, REACH, &[&["7777", "connected"], addresses].concat())
}

/// What `reach` says of addresses that can be reached.
fn reached(addresses: &[&str]) -> String {
    addresses.iter().map(|address| format!("{address} ok ok ok\n")).collect()
}

/// What it says of addresses that are refused. Over IPv6 Linux has no errno for datagrams that is nearer.
fn refused(addresses: &[&str]) -> String {
    let of_udp = |address: &str| {
        let is_ip6 = address.contains(':') && !address.starts_with("::ffff:");
        if is_ip6 { "EACCES" } else { "EHOSTUNREACH" }
    };
    let line =
        |address: &&str| format!("{address} EHOSTUNREACH {} EHOSTUNREACH\n", of_udp(address));
    addresses.iter().map(line).collect()
}

const HOST: [&str; 9] = [
    "198.51.100.100",
    "172.31.0.1",
    // A range that is routed to the host as a whole.
    "203.0.113.7",
    "169.254.169.254",
    "169.254.1.1",
    "2001:db8::100",
    "fd00:ec2::254",
    "::ffff:198.51.100.100",
    "::ffff:169.254.169.254",
];

/// Ways to some of these by a translator or a tunnel.
const SPELLED: [&str; 2] = ["64:ff9b::169.254.169.254", "2002:c633:6464::1"];

#[test]
fn the_host_itself_is_not_the_outside() {
    let network = Network::new();
    let _servers = world(&network);
    let other = TestBox::busybox().inside(&network).with("port_map", json!(["18080:80"]));
    let (_other, published) = other.idle();
    let (test, started) = TestBox::debian().inside(&network).idle();
    assert_eq!(reach(&test, &HOST), refused(&HOST));
    // The guest's kernel does not know these beforehand, and the host is asked with the first datagram.
    assert_eq!(reach(&test, &[&["patient"], &SPELLED[..]].concat()), refused(&SPELLED));
    let outside = ["198.51.100.1", "2001:db8::1", "::ffff:198.51.100.1"];
    assert_eq!(reach(&test, &outside), reached(&outside));
    // Another box's published port, which is there for everybody else; and an address that comes late.
    network.outside.python("import socket; socket.create_connection(('198.51.100.100', 18080))");
    let said = python_with(&test, REACH, &["18080", "198.51.100.100"]);
    assert_eq!(said, "198.51.100.100 EHOSTUNREACH EHOSTUNREACH EHOSTUNREACH\n");
    network.host.ip("address add 192.0.2.77/32 dev bridge0");
    assert_eq!(reach(&test, &["patient", "192.0.2.77"]), refused(&["192.0.2.77"]));
    published.stop();
    let refusals = started.stop().outcome["refused"].take();
    let first = json!({"protocol": "tcp", "destination": "198.51.100.100:7777", "count": 2});
    assert_eq!(refusals["destinations"][0], first, "also by its mapped address");
    let of_udp = json!({"protocol": "udp", "destination": "169.254.169.254:7777", "count": 4});
    let all = refusals["destinations"].as_array().expect("destinations");
    assert!(all.contains(&of_udp), "connected or not, also by its mapped address: {refusals}");
    assert_eq!(refusals["others"], 0);
}

#[test]
fn a_rule_that_names_an_address_of_the_host_opens_it() {
    let network = Network::new();
    let _servers = world(&network);
    let rules = ["allow:172.31.0.1:tcp:7777", "allow:169.254.0.0/16", "allow:0.0.0.0/0"];
    let (test, started) = TestBox::debian().inside(&network).with("egress", json!(rules)).idle();
    assert_eq!(
        reach(&test, &["172.31.0.1", "169.254.169.254", "198.51.100.100", "198.51.100.1"]),
        "172.31.0.1 ok EHOSTUNREACH EHOSTUNREACH\n169.254.169.254 ok ok ok\n\
            198.51.100.100 EHOSTUNREACH EHOSTUNREACH EHOSTUNREACH\n198.51.100.1 ok ok ok\n"
    );
    started.stop();
}

/// A name server at 198.51.100.2, beside the servers.
const RESOLVER: &str = include_str!("python/resolver.py");

/// A box with these rules that asks that name server; its network.
fn ruled(egress: Value) -> (Network, TestBox) {
    let network = Network::new();
    let test = TestBox::debian().inside(&network).with("egress", egress);
    let text = "nameserver 198.51.100.2\noptions timeout:30 attempts:1\n";
    fs::write(test.path("root/etc/resolv.conf"), text).expect("resolv.conf");
    (network, test)
}

#[test]
fn what_no_rule_allows_fails_at_once() {
    let (network, test) = ruled(json!(["allow:198.51.100.1/32"]));
    let _servers = world(&network);
    let _resolver = network.outside.serve_with(RESOLVER, &["198.51.100.2"]);
    let (test, started) = test.idle();
    let others = ["198.51.100.2", "192.0.2.1", "2001:db8::1", "198.51.100.100"];
    assert_eq!(reach(&test, &["198.51.100.1"]), reached(&["198.51.100.1"]));
    assert_eq!(reach(&test, &others), refused(&others));
    // The name server is one of them: a question fails at once, not after 30 s.
    let done = run(&test, &["timeout", "25", "getent", "ahostsv4", "host.mote.test"]);
    assert_eq!(done.code, 2, "{}", done.stderr);
    let refusals = started.stop().outcome["refused"].take();
    let count = |protocol: &str, destination: &str| {
        let all = refusals["destinations"].as_array().expect("destinations");
        let of =
            |entry: &&Value| entry["protocol"] == protocol && entry["destination"] == destination;
        all.iter().find(of).map(|entry| entry["count"].clone())
    };
    assert_eq!(count("tcp", "198.51.100.2:7777"), Some(json!(1)));
    assert_eq!(count("tcp", "[2001:db8::1]:7777"), Some(json!(1)));
    assert_eq!(count("udp", "192.0.2.1:7777"), Some(json!(2)));
    assert!(count("udp", "198.51.100.2:53").is_some(), "{refusals}");
}

#[test]
fn the_first_rule_decides_and_names_resolve_as_ruled() {
    let (network, test) = ruled(json!([
        "allow:198.51.100.2/32:udp:53",
        "deny:198.51.100.2/32",
        "deny:2001:db8::/32:tcp",
        "allow"
    ]));
    let _servers = world(&network);
    let _resolver = network.outside.serve_with(RESOLVER, &["198.51.100.2"]);
    let (test, started) = test.idle();
    let done = run(&test, &["timeout", "25", "getent", "ahostsv4", "host.mote.test"]);
    assert!(done.stdout.starts_with("198.51.100.1 "), "{done:?}");
    assert_eq!(
        reach(&test, &["198.51.100.1", "198.51.100.2", "2001:db8::1", "198.51.100.100"]),
        "198.51.100.1 ok ok ok\n198.51.100.2 EHOSTUNREACH EHOSTUNREACH EHOSTUNREACH\n\
            2001:db8::1 EHOSTUNREACH ok ok\n198.51.100.100 EHOSTUNREACH EHOSTUNREACH EHOSTUNREACH\n"
    );
    started.stop();
}

#[test]
fn on_passt_the_same_holds() {
    let network = Network::new();
    let _servers = world(&network);
    let dir = SocketDir::new();
    let mut passt = passt_in(&network, &dir.socket());
    let on_passt = || {
        let test = TestBox::debian().inside(&network);
        test.with("network", passt::network(&dir.socket()))
    };
    // The gateway's address is the host's loopback to passt.
    let host = ["198.51.100.100", "172.31.0.1", "169.254.169.254", "10.88.0.1"];
    let (test, started) = on_passt().idle();
    let expected: String = host.map(|ip| format!("{ip} EHOSTUNREACH EHOSTUNREACH\n")).concat();
    assert_eq!(reach_connected(&test, &host), expected);
    assert_eq!(reach(&test, &["198.51.100.1"]), reached(&["198.51.100.1"]));
    let refusals = started.stop().outcome["refused"].take();
    let first = json!({"protocol": "tcp", "destination": "198.51.100.100:7777", "count": 1});
    assert_eq!(refusals["destinations"][0], first);

    let rules = ["deny:198.51.100.2", "allow:10.88.0.1:tcp:7777", "allow:198.51.100.0/24:tcp"];
    let (test, started) = on_passt().with("egress", json!(rules)).idle();
    assert_eq!(
        reach_connected(&test, &["198.51.100.1", "198.51.100.2", "10.88.0.1", "203.0.113.1"]),
        "198.51.100.1 ok EHOSTUNREACH\n198.51.100.2 EHOSTUNREACH EHOSTUNREACH\n\
            10.88.0.1 EHOSTUNREACH EHOSTUNREACH\n203.0.113.1 EHOSTUNREACH EHOSTUNREACH\n"
    );
    // Its name server is refused too, and says so at once.
    let asked = "timeout 25 python3 -c 'import socket; socket.gethostbyname(\"host.mote.test\")' 2>&1 | tail -n 1";
    let said = run(&test, &["sh", "-c", asked]).stdout;
    assert!(said.starts_with("socket.gaierror: "), "{said}");
    started.stop();
    passt.kill().expect("kills");
    passt.wait().expect("waits");
}

#[test]
fn rules_that_cannot_be_are_explained() {
    for (egress, expected) in [
        (json!([]), "egress: is empty"),
        (json!("deny"), "egress: is a string, must be an array"),
        (json!([7]), "egress[0]: is a number, must be a string"),
        (json!(["allow:10.0.0.0/8", "drop:10.0.0.0/8"]), "egress[1]: is \"drop:10.0.0.0/8\": "),
        (json!(["allow:example.org"]), "egress[0]: is \"allow:example.org\": "),
        (json!(vec!["deny:10.0.0.0/8"; 5000]), "egress: has 5000 rules, at most 1024"),
    ] {
        let ran = TestBox::busybox().with("egress", egress).run();
        ran.assert_not_started(&[&format!("spec: {expected}")]);
    }
    let shadowed = json!(["deny:10.0.0.0/8", "allow:10.1.0.0/16", "allow"]);
    let ran = TestBox::busybox().with("egress", shadowed).run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let warning = "mote: warning: egress[1]: allow:10.1.0.0/16 has no effect: egress[0], deny:10.0.0.0/8, comes first\n";
    assert_eq!(ran.stderr, warning);
}
