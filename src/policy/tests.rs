//! What policies allow.

use mote_agent::instance::Prefix;

use super::*;

const HOST: &str = "# a comment\nsearch example.org\nnameserver 127.0.0.53\n\
    nameserver 2001:db8::53 trailing\nnameserver nonsense\nnameserver 192.0.2.53\nnameserver";

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn of_host(resolv_conf: &str) -> Policy {
    Policy::of_host(resolv_conf, Rules::default())
}

fn with_rules(resolv_conf: &str, texts: &[&str], default: Action) -> Policy {
    let rules = texts.iter().map(|text| text.parse().expect("a rule")).collect();
    Policy::of_host(resolv_conf, Rules { rules, default })
}

/// A host with these addresses, and no route to anywhere in 203.0.113.0/24 and 64:ff9b:1::/48.
fn is_local(ip: IpAddr) -> Result<bool, i32> {
    let own = ["198.51.100.1", "2001:db8:5::1", "10.9.8.7"].map(|ip| ip.parse::<IpAddr>());
    match ip {
        IpAddr::V4(ip) if ip.octets().starts_with(&[203, 0, 113]) => Err(libc::ENETUNREACH),
        IpAddr::V6(ip) if ip.segments()[..3] == [0x64, 0xff9b, 1] => Err(libc::ENETUNREACH),
        _ => Ok(own.contains(&Ok(ip))),
    }
}

/// What both protocols get.
fn resolve(policy: &Policy, destination: &str) -> Result<String, i32> {
    let [tcp, udp] = [Protocol::Tcp, Protocol::Udp]
        .map(|protocol| policy.resolve(protocol, address(destination), is_local));
    // A refusal has another errno for datagrams.
    let same = |errno| if errno == libc::EACCES { libc::EHOSTUNREACH } else { errno };
    assert_eq!(tcp.map_err(Refusal::errno), udp.map_err(|refusal| same(refusal.errno())));
    tcp.map(|address| address.to_string()).map_err(Refusal::errno)
}

#[test]
fn the_outside_is_reached_as_named() {
    let policy = of_host(HOST);
    for destination in
        ["192.0.2.1:80", "[2001:db8::1]:443", "10.0.0.1:53", "[64:ff9b::c000:201]:80"]
    {
        assert_eq!(resolve(&policy, destination), Ok(destination.into()));
    }
    assert_eq!(resolve(&policy, "[::ffff:192.0.2.1]:80"), Ok("192.0.2.1:80".into()));
}

#[test]
fn the_hosts_loopback_is_out_of_reach_however_it_is_spelled() {
    let policy = of_host(HOST);
    for destination in [
        "127.0.0.1:80",
        "127.255.255.254:22",
        "[::1]:80",
        "0.0.0.0:80",
        "0.0.0.0:53",
        "[::]:80",
        "[::]:53",
        "[::ffff:127.0.0.1]:80",
        "[::ffff:0.0.0.0]:80",
    ] {
        assert_eq!(resolve(&policy, destination), Err(libc::ECONNREFUSED), "{destination}");
    }
    for destination in ["[::127.0.0.1]:80", "[::7f00:1]:53", "0.0.0.1:80"] {
        assert_eq!(resolve(&policy, destination), Err(libc::ENETUNREACH), "{destination}");
    }
}

#[test]
fn addresses_of_many_or_of_none_are_unreachable() {
    let policy = of_host(HOST);
    for destination in [
        "224.0.0.251:5353",
        "255.255.255.255:67",
        "[ff02::fb]:5353",
        "[fe80::1]:80",
        "[::ffff:224.0.0.1]:80",
    ] {
        assert_eq!(resolve(&policy, destination), Err(libc::ENETUNREACH), "{destination}");
    }
    for destination in ["192.0.2.1:0", "127.0.0.1:0"].map(address) {
        for (protocol, errno) in
            [(Protocol::Tcp, libc::ECONNREFUSED), (Protocol::Udp, libc::EINVAL)]
        {
            let refused = policy.resolve(protocol, destination, is_local);
            assert_eq!(refused, Err(Refusal::NoWay(errno)));
        }
    }
    assert_eq!(resolve(&policy, "203.0.113.1:80"), Err(libc::ENETUNREACH));
}

#[test]
fn a_name_server_on_loopback_is_the_hosts() {
    let policy = of_host(HOST);
    for (destination, expected) in [
        ("127.0.0.53:53", "127.0.0.53:53"),
        ("127.0.0.1:53", "127.0.0.53:53"),
        ("[::1]:53", "127.0.0.53:53"),
        ("[::ffff:127.0.0.11]:53", "127.0.0.53:53"),
    ] {
        assert_eq!(resolve(&policy, destination), Ok(expected.into()));
    }
    let policy = of_host("nameserver 192.0.2.53\nnameserver ::1\n");
    assert_eq!(resolve(&policy, "127.0.0.1:53"), Ok("192.0.2.53:53".into()));
    assert_eq!(resolve(&policy, "[::1]:53"), Ok("[::1]:53".into()));
    assert_eq!(resolve(&policy, "127.0.0.1:54"), Err(libc::ECONNREFUSED));
    assert_eq!(resolve(&of_host(""), "127.0.0.1:53"), Err(libc::ECONNREFUSED));
}

#[test]
fn name_servers_are_addresses() {
    let servers = ["127.0.0.53:53", "[2001:db8::53]:53", "192.0.2.53:53"].map(address);
    assert_eq!(of_host(HOST).resolvers, servers);
    let scoped = "nameserver fe80::1%lo\nnameserver fe80::2%no-such0\nnameserver fe80::3%7";
    let scopes: Vec<u32> = of_host(scoped)
        .resolvers
        .into_iter()
        .map(|address| match address {
            SocketAddr::V6(address) => address.scope_id(),
            SocketAddr::V4(_) => panic!("not IPv4"),
        })
        .collect();
    assert_eq!(scopes, [1, 7]);
}

#[test]
fn the_host_itself_is_not_the_outside() {
    let policy = of_host(HOST);
    for destination in [
        "198.51.100.1:80",
        "[::ffff:198.51.100.1]:80",
        "[2001:db8:5::1]:80",
        "[64:ff9b::198.51.100.1]:80",
        "[2002:c633:6401::1]:80",
        "169.254.169.254:80",
        "169.254.0.1:53",
        "[::ffff:169.254.169.254]:80",
        "[64:ff9b::169.254.169.254]:80",
        "[64:ff9b::127.0.0.1]:80",
        "[2002:7f00:1::]:22",
        "[fd00:ec2::254]:80",
        // No route to them is no news.
        "[64:ff9b:1::169.254.169.254]:80",
    ] {
        assert_eq!(resolve(&policy, destination), Err(libc::EHOSTUNREACH), "{destination}");
    }
    // An IPv4 address without a route is no reason not to reach it by a translator.
    let translated = "[64:ff9b::cb00:7101]:80";
    assert_eq!(resolve(&policy, translated), Ok(translated.into()));
}

#[test]
fn name_servers_are_above_the_floor_at_their_port_alone() {
    let policy = of_host("nameserver 198.51.100.1\nnameserver 169.254.169.254\n");
    for server in ["198.51.100.1:53", "169.254.169.254:53"] {
        assert_eq!(resolve(&policy, server), Ok(server.into()));
    }
    for other in ["198.51.100.1:80", "169.254.169.254:80", "10.9.8.7:53"] {
        assert_eq!(resolve(&policy, other), Err(libc::EHOSTUNREACH), "{other}");
    }
    assert_eq!(resolve(&policy, "127.0.0.1:53"), Ok("198.51.100.1:53".into()));
}

#[test]
fn the_first_rule_that_matches_decides() {
    let rules = ["deny:192.0.2.128/25", "allow:192.0.2.0/24:tcp:443", "deny:192.0.2.0/24"];
    let policy = with_rules("", &rules, Action::Allow);
    let tcp = |destination: &str| {
        let resolved = policy.resolve(Protocol::Tcp, address(destination), is_local);
        resolved.map(drop).map_err(Refusal::errno)
    };
    assert_eq!(tcp("192.0.2.1:443"), Ok(()));
    assert_eq!(tcp("192.0.2.129:443"), Err(libc::EHOSTUNREACH));
    assert_eq!(tcp("192.0.2.1:80"), Err(libc::EHOSTUNREACH));
    assert_eq!(resolve(&policy, "192.0.3.1:80"), Ok("192.0.3.1:80".into()));
    // A rule that denies IPv4 addresses counts for all their spellings; one that allows some does not open
    // other addresses that look like them.
    assert_eq!(tcp("[::ffff:192.0.2.1]:443"), Ok(()));
    assert_eq!(tcp("[64:ff9b::c000:201]:443"), Err(libc::EHOSTUNREACH));
    let policy = with_rules("", &["allow:192.0.2.0/24"], Action::Deny);
    assert_eq!(resolve(&policy, "[2001:db8::5efe:c000:201]:443"), Err(libc::EHOSTUNREACH));
    // A denied destination is refused as such even without a route.
    let policy = with_rules("", &["allow:192.0.2.0/24"], Action::Deny);
    assert_eq!(resolve(&policy, "203.0.113.1:80"), Err(libc::EHOSTUNREACH));
    assert_eq!(resolve(&policy, "192.0.2.1:80"), Ok("192.0.2.1:80".into()));
}

#[test]
fn only_a_rule_that_names_an_address_of_the_floor_opens_it() {
    let host = "198.51.100.1:80";
    let errno = Err(libc::EHOSTUNREACH);
    for (rules, expected) in [
        (&["allow:198.51.100.1"][..], Ok(host.into())),
        (&["allow:0.0.0.0/0"], errno.clone()),
        (&["allow:198.51.100.0/24"], errno.clone()),
        (&["allow:198.51.100.0/24", "allow:198.51.100.1/32"], Ok(host.into())),
        (&["deny:198.51.100.0/24", "allow:198.51.100.1/32"], errno.clone()),
    ] {
        for default in [Action::Allow, Action::Deny] {
            let policy = with_rules("", rules, default);
            assert_eq!(resolve(&policy, host), expected, "{rules:?}");
        }
    }
    let metadata = "169.254.169.254:80";
    let policy = with_rules("", &["allow:169.254.0.0/16"], Action::Allow);
    assert_eq!(resolve(&policy, metadata), Ok(metadata.into()));
    let policy = with_rules("", &["allow:169.0.0.0/8"], Action::Allow);
    assert_eq!(resolve(&policy, metadata), errno);
    let policy = with_rules("", &["allow:127.0.0.0/8", "allow:::1"], Action::Allow);
    assert_eq!(resolve(&policy, "127.0.0.1:80"), Err(libc::ECONNREFUSED));
    assert_eq!(resolve(&policy, "[64:ff9b::7f00:1]:80"), Err(libc::EHOSTUNREACH));
}

#[test]
fn rules_bind_name_servers_too() {
    let policy = with_rules(HOST, &["allow:192.0.2.0/24"], Action::Deny);
    assert_eq!(resolve(&policy, "192.0.2.53:53"), Ok("192.0.2.53:53".into()));
    assert_eq!(resolve(&policy, "127.0.0.53:53"), Err(libc::EHOSTUNREACH));
    let policy = with_rules(HOST, &["allow:127.0.0.53"], Action::Deny);
    assert_eq!(resolve(&policy, "127.0.0.53:53"), Ok("127.0.0.53:53".into()));
}

#[test]
fn on_a_network_of_its_own_the_gateway_is_the_host() {
    let gateway = Ipv4Addr::new(10, 88, 0, 1);
    let policy = |resolvers: &[Ipv4Addr], rules: &[&str]| {
        let rules = rules.iter().map(|text| text.parse().expect("a rule")).collect();
        Policy::of_own_network(gateway, resolvers, Rules { rules, default: Action::Allow })
    };
    let admits = |policy: &Policy, protocol: Option<Protocol>, port: u16| {
        let destination = Destination { protocol, ip: gateway.into(), port };
        policy.admit(destination, is_local).is_ok()
    };
    let (tcp, udp) = (Some(Protocol::Tcp), Some(Protocol::Udp));
    let plain = policy(&[], &[]);
    assert!(!admits(&plain, tcp, 80) && !admits(&plain, udp, 53));
    // ICMP reaches no service.
    assert!(admits(&plain, None, 0));
    assert!(admits(&policy(&[gateway], &[]), udp, 53));
    assert!(!admits(&policy(&[], &["allow:10.88.0.1:tcp:80"]), tcp, 80));
    assert!(!admits(&policy(&[], &["deny:10.88.0.0/24"]), None, 0));
}

/// What the guest's kernel says of a datagram to there.
fn is_refused_beforehand(prefixes: &[Prefix], destination: SocketAddr) -> bool {
    let ip = match destination.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let common = |prefix: &&Prefix| {
        (prefix.ip.to_bits() ^ ip.to_bits()).leading_zeros() >= prefix.len.into()
    };
    let longest = prefixes.iter().filter(common).max_by_key(|prefix| prefix.len);
    longest.is_some_and(|prefix| prefix.refused ^ prefix.except.contains(&destination.port()))
}

#[test]
fn datagrams_are_refused_beforehand_where_they_are_refused() {
    let ips = [
        "127.0.0.53",
        "::1",
        "198.51.100.1",
        "2001:db8:5::1",
        "10.9.8.7",
        "10.9.8.6",
        "10.9.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "169.254.10.1",
        "192.0.2.53",
        "192.0.2.1",
        "2001:db8::53",
        "2001:db8::1",
        "2001:db9::1",
        "fd00:ec2::254",
    ];
    let of_host = ["198.51.100.1", "2001:db8:5::1", "10.9.8.7", "127.0.0.0/8", "::1"]
        .map(|cidr| cidr.parse().expect("a prefix"));
    let allow = Action::Allow;
    for (rules, default) in [
        (&[][..], allow),
        (&[], Action::Deny),
        (&["deny:10.0.0.0/8", "allow:10.9.8.0/24"], allow),
        (&["allow:10.9.8.0/24", "deny:10.0.0.0/8:udp", "allow:10.0.0.0/8"], allow),
        (&["allow:10.9.8.7:udp:9", "deny:10.9.0.0/16:udp:7777"], allow),
        (&["allow:0.0.0.0/0:udp:53", "allow:10.9.8.7:tcp:9", "allow:2000::/3"], Action::Deny),
        (&["deny:0.0.0.0/0:udp:53", "deny:192.0.2.53:udp:9", "allow:169.254.0.0/16:udp"], allow),
        (&["allow:169.254.10.0/24:udp:9", "deny:169.254.10.0/24:udp:7777"], allow),
        (&["deny:::/0"], allow),
        (&["allow:::/0"], Action::Deny),
        (&["deny:2001:db8::/32:udp:53", "allow:2001:db8:5::1", "allow:192.0.2.53"], Action::Deny),
    ] {
        let policy = with_rules(HOST, rules, default);
        let prefixes = policy.datagrams(&of_host);
        for (ip, port) in ips.iter().flat_map(|ip| [53, 9, 7777].map(|port| (ip, port))) {
            let destination = SocketAddr::new(ip.parse().expect("an address"), port);
            let beforehand = is_refused_beforehand(&prefixes, destination);
            let refused = policy.resolve(Protocol::Udp, destination, is_local).is_err();
            // What loopback stands for, only the host knows.
            let expected = refused && !destination.ip().is_loopback();
            assert_eq!(beforehand, expected, "{destination} by {rules:?}");
        }
    }
}

#[test]
fn what_has_no_room_in_the_guest_is_left_to_the_host() {
    let rules: Vec<String> = (1..=9)
        .map(|port| format!("deny:10.0.0.0/8:udp:{port}"))
        .chain(["deny:0.0.0.0/0:udp:1".into()])
        .collect();
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let policy = with_rules("", &rules, Action::Allow);
    let prefixes = policy.datagrams(&[]);
    assert!(is_refused_beforehand(&prefixes, address("192.0.2.1:1")));
    assert!(!is_refused_beforehand(&prefixes, address("10.0.0.7:1")));
    assert!(policy.resolve(Protocol::Udp, address("10.0.0.7:1"), is_local).is_err());
}
