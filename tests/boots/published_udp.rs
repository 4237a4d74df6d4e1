//! Published UDP ports, with the host's network and with one of the box's own.

use serde_json::json;

use crate::common::TestBox;
use crate::network::{Namespace, Network, shell};
use crate::passt::{self, SocketDir, passt_in};

/// Answers datagrams at ports 9001 to 9005, each of which listens in another way.
const SERVERS: &str = include_str!("python/published_datagrams.py");

/// A client: says what each port answers, and takes answers from the port alone to which it sent.
const CLIENT: &str = r#"
import socket, sys
source, host, length, *ports = sys.argv[1:]
sockets = []
for port in map(int, ports):
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(60)
    s.bind((source, 0))
    s.connect((host, port))
    for word in b"first", b"second":
        s.send(word.ljust(int(length)))
        print(port, s.recv(65536).decode().strip())
"#;

/// A box that runs the servers; host ports 19001 to 19006 lead to them, and the last to nobody.
fn serving(network: &Network) -> TestBox {
    let map: Vec<String> = (9001..=9006).map(|port| format!("1{port}:{port}/udp")).collect();
    TestBox::debian()
        .inside(network)
        .without_console_file()
        .with("port_map", json!(map))
        .python(SERVERS, &[])
}

/// Asks ports of the box from one of the network's ends, in datagrams of so many bytes.
fn ask(end: &Namespace, source: &str, host: &str, len: &str, ports: &[&str]) -> String {
    end.python_with(CLIENT, &[&[source, host, len], ports].concat())
}

/// What these ports then say, each twice, to a client that they see under these names.
fn answers(seen: &[(&str, &str)], len: &str) -> String {
    let line =
        |(port, client): &(&str, &str), word: &str| format!("{port} {client} {word} {len}\n");
    seen.iter().flat_map(|port| ["FIRST", "SECOND"].map(|word| line(port, word))).collect()
}

fn assert_serves(network: &Network) {
    let ports = ["19001", "19002", "19003"];
    let seen = |client: &'static str, mapped: &'static str| {
        [("19001", client), ("19002", mapped), ("19003", client)]
    };
    let said = ask(&network.outside, "198.51.100.2", "198.51.100.100", "9", &ports);
    assert_eq!(said, answers(&seen("198.51.100.2", "::ffff:198.51.100.2"), "9"));
    let named =
        |line: &str, net: &str| line.split(' ').nth(1).is_some_and(|ip| ip.starts_with(net));
    // From the host, at an address of it that is not the first one; the client's is the box's own, too.
    let said = ask(&network.host, "127.0.0.1", "127.0.0.77", "9", &ports);
    let is_named = |line: &str| named(line, "127.1") || named(line, "::ffff:127.1");
    assert!(said.lines().count() == 6 && said.lines().all(is_named), "{said}");
    // By a socket that the server connects to its client.
    let said = ask(&network.outside, "198.51.100.2", "198.51.100.100", "9", &["19005"]);
    assert_eq!(said, answers(&[("19005", "198.51.100.2")], "9").replace(" 9\n", " 9 True\n"));
    // Over IPv6, and as large as a datagram can be.
    let said = ask(&network.outside, "2001:db8::2", "2001:db8::100", "65507", &["19002", "19004"]);
    let seen = [("19002", "2001:db8::2"), ("19004", "2001:db8::2")];
    assert_eq!(said, answers(&seen, "65507"));
    // Servers of one family cannot name a client of the other, but answer it.
    let said = ask(&network.outside, "2001:db8::2", "2001:db8::100", "9", &["19001", "19003"]);
    assert!(said.lines().count() == 4 && said.lines().all(|line| named(line, "127.1")), "{said}");
    let said = ask(&network.outside, "198.51.100.2", "198.51.100.100", "9", &["19004"]);
    assert!(
        said.lines().count() == 2 && said.lines().all(|line| named(line, "fd54:5349:")),
        "{said}"
    );
}

#[test]
fn a_server_sees_and_answers_the_real_client_wherever_it_listens() {
    let network = Network::new();
    let test = serving(&network);
    let started = test.ready();
    assert_serves(&network);
    started.stop();
}

#[test]
fn the_same_holds_in_a_box_with_a_network_of_its_own() {
    let network = Network::new();
    let dir = SocketDir::new();
    let mut passt = passt_in(&network, &dir.socket());
    let test = serving(&network).with("network", passt::network(&dir.socket()));
    let started = test.ready();
    assert_serves(&network);
    started.stop();
    passt.kill().expect("kills");
    passt.wait().expect("waits");
}

#[test]
fn answers_to_a_program_of_the_box_stay_there() {
    let network = Network::new();
    let map = json!(["19001:9001/udp"]);
    let (test, started) = TestBox::debian().inside(&network).with("port_map", map).idle();
    let serve = "python3 - <<'end' >/dev/shm/said 2>&1 &
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('0.0.0.0', 9001))
while True:
    data, client = s.recvfrom(100)
    s.sendto(data.upper(), client)
end
until grep -q ' 00000000:2329 ' /proc/net/udp; do :; done";
    shell(&test, serve);
    // The same address and port, of two machines.
    let client = "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(60)
s.bind(('127.0.0.1', 7001))
s.connect(('127.0.0.1', PORT))
s.send(b'ask')
print(s.recv(9))";
    let on_host = client.replace("PORT", "19001");
    assert_eq!(network.host.python(&on_host), "b'ASK'\n");
    let said = crate::network::python(&test, &client.replace("PORT", "9001"));
    assert_eq!(said, "b'ASK'\n");
    assert_eq!(network.host.python(&on_host), "b'ASK'\n");
    // A client that sends to two addresses of the host is answered by each.
    let said = network.host.python(
        "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(60)
s.bind(('198.51.100.100', 7002))
for to in '198.51.100.100', '127.0.0.5', '198.51.100.100':
    s.sendto(b'ask', (to, 19001))
    print(*s.recvfrom(9))",
    );
    let line = |ip: &str| format!("b'ASK' ('{ip}', 19001)\n");
    let [first, second] = ["198.51.100.100", "127.0.0.5"].map(line);
    assert_eq!(said, format!("{first}{second}{first}"));
    started.stop();
}

#[test]
fn clients_are_apart_and_a_server_may_begin_late() {
    let network = Network::new();
    let map = json!(["19001:9001/udp", "19002:9002/udp"]);
    let (test, started) = TestBox::debian().inside(&network).with("port_map", map).idle();
    // Nobody listens yet: what is sent now is lost.
    network.outside.python(
        "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('198.51.100.2', 8001))
s.sendto(b'lost', ('198.51.100.100', 19001))",
    );
    let serve = "python3 - >/dev/shm/said 2>&1 <<'end' &
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('0.0.0.0', 9001))
known = []
while len(known) < 300:
    data, client = s.recvfrom(100)
    known.append((data, client))
for data, client in reversed(known):
    s.sendto(data[::-1], client)
end
until grep -q ' 00000000:2329 ' /proc/net/udp; do :; done";
    shell(&test, serve);
    let said = network.outside.python(
        "import socket
sockets = []
for n in range(1000, 1300):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(60)
    s.bind(('198.51.100.2', 7001 + n))
    s.connect(('198.51.100.100', 19001))
    s.send(str(n).encode())
    sockets.append((s, str(n)[::-1].encode()))
print(sum(s.recv(9) == answer for s, answer in sockets))",
    );
    assert_eq!(said, "300\n");
    started.stop();
}

#[test]
fn an_answer_is_not_a_way_out() {
    let network = Network::new();
    let map = json!(["19001:9001/udp"]);
    let test = TestBox::debian()
        .inside(&network)
        .with("port_map", map)
        .with("egress", json!(["deny:0.0.0.0/0"]));
    let (test, started) = test.idle();
    // Whoever has asked is answered, and nobody else: no other client, port or socket of the box.
    let serve = "python3 - <<'end' >/dev/shm/said 2>&1 &
import socket
def udp(port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(('0.0.0.0', port))
    return s
server, other = udp(9001), udp(9002)
print('serving', flush=True)
data, client = server.recvfrom(100)
for s, to in (server, client), (other, client), (server, (client[0], client[1] + 1)), (server, ('198.51.100.2', client[1])):
    try:
        print(s.sendto(b'answer', to))
    except OSError as error:
        print(error.strerror)
end
until grep -q serving /dev/shm/said; do :; done";
    shell(&test, serve);
    let said = network.outside.python(
        "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(60)
s.connect(('198.51.100.100', 19001))
s.send(b'ask')
print(s.recv(9))",
    );
    assert_eq!(said, "b'answer'\n");
    let said = shell(&test, "until [ $(wc -l </dev/shm/said) = 5 ]; do :; done; cat /dev/shm/said");
    let no_way = "No route to host\n".repeat(3);
    assert_eq!(said, format!("serving\n6\n{no_way}"));
    started.stop();
}

#[test]
fn a_wireguard_tunnel_joins_two_boxes() {
    let network = Network::new();
    let dir = SocketDir::new();
    let mut passt = passt_in(&network, &dir.socket());
    let map = json!(["51820:51820/udp"]);
    let (one, one_started) = TestBox::containers().inside(&network).with("port_map", map).idle();
    // The other one is on the same host: it needs to be let out to that port there.
    let (two, two_started) = TestBox::containers()
        .inside(&network)
        .with("network", passt::network(&dir.socket()))
        .with("egress", json!(["allow:198.51.100.100:udp:51820"]))
        .idle();
    let key = |test: &TestBox| {
        let script = "cd /dev/shm && (umask 77; wg genkey >private) && wg pubkey <private";
        shell(test, script).trim().to_owned()
    };
    let (key_one, key_two) = (key(&one), key(&two));
    let tunnel = |test: &TestBox, n: u8, own: &str, peer: &str| {
        let script = format!(
            "set -e
ip link add wg0 type wireguard
ip address add 10.9.0.{n}/24 dev wg0
wg set wg0 private-key /dev/shm/private {own} peer {peer}
ip link set wg0 up"
        );
        shell(test, &script);
    };
    tunnel(&one, 1, "listen-port 51820", &format!("{key_two} allowed-ips 10.9.0.2/32"));
    let peer = format!("{key_one} allowed-ips 10.9.0.1/32 endpoint 198.51.100.100:51820");
    tunnel(&two, 2, "", &peer);
    let said = shell(&two, "ping -q -c 3 -i 0.2 -W 60 10.9.0.1");
    assert!(said.contains("3 packets transmitted, 3 received, 0% packet loss"), "{said}");
    // And a connection inside.
    shell(
        &one,
        "echo over the tunnel >/dev/shm/said
timeout 150 nc -N -l -p 7000 -s 10.9.0.1 </dev/shm/said >/dev/null 2>&1 &
until grep -q :1B58 /proc/net/tcp; do :; done",
    );
    let fetched = shell(&two, "timeout 150 nc -N 10.9.0.1 7000 </dev/null");
    assert_eq!(fetched, "over the tunnel\n");
    two_started.stop();
    one_started.stop();
    passt.kill().expect("kills");
    passt.wait().expect("waits");
}
