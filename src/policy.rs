//! Where the guest may connect to: the one place that says yes or no to a destination. A pure
//! function of protocol and destination.
//!
//! The host's loopback is out of reach (contract §9.4), however it is spelled, and so are addresses that
//! have no meaning outside the guest. The one exception is port 53 on loopback: a resolv.conf copied
//! from the host may name such a server, and the host's own name server answers in its place.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use mote_agent::flow::Protocol;

use crate::resolv_conf;
use crate::sys;

/// The port of name servers.
const DNS_PORT: u16 = 53;

/// What the guest may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The host's name servers, in its order.
    resolvers: Vec<SocketAddr>,
    #[cfg(any(test, fuzzing))]
    servers: TestServers,
}

/// Where the servers of tests are.
#[cfg(any(test, fuzzing))]
#[derive(Debug, Clone, PartialEq, Eq)]
enum TestServers {
    /// There are none.
    None,
    /// On loopback, at the address that the guest names.
    Loopback,
    /// At these addresses, whatever the guest names: a fuzzer must not reach anybody else.
    StandIns { tcp: SocketAddr, udp: SocketAddr },
}

impl Policy {
    /// The usual policy on a host with this resolv.conf.
    pub fn new(resolv_conf: &str) -> Self {
        Policy {
            resolvers: resolv_conf::name_servers(resolv_conf)
                .filter_map(parse_name_server)
                .collect(),
            #[cfg(any(test, fuzzing))]
            servers: TestServers::None,
        }
    }

    /// A policy that lets the guest reach the host's loopback.
    #[cfg(any(test, fuzzing))]
    pub fn with_loopback() -> Self {
        Policy { servers: TestServers::Loopback, ..Policy::new("") }
    }

    /// A policy that turns every destination into one of these two.
    #[cfg(any(test, fuzzing))]
    pub fn with_stand_ins(tcp: SocketAddr, udp: SocketAddr) -> Self {
        Policy { servers: TestServers::StandIns { tcp, udp }, ..Policy::new("") }
    }

    #[cfg(any(test, fuzzing))]
    fn test_server(&self, protocol: Protocol, destination: SocketAddr) -> Option<SocketAddr> {
        match (&self.servers, protocol) {
            (TestServers::None, _) => None,
            (TestServers::Loopback, _) => destination.ip().is_loopback().then_some(destination),
            (TestServers::StandIns { tcp, .. }, Protocol::Tcp) => Some(*tcp),
            (TestServers::StandIns { udp, .. }, Protocol::Udp) => Some(*udp),
        }
    }

    /// The address to connect to for a destination that the guest has named.
    ///
    /// # Errors
    /// The errno for the application: the one that a host without a route or listener would give.
    pub fn resolve(&self, protocol: Protocol, destination: SocketAddr) -> Result<SocketAddr, i32> {
        let ip = destination.ip().to_canonical();
        if destination.port() == 0 {
            return Err(match protocol {
                Protocol::Tcp => libc::ECONNREFUSED,
                Protocol::Udp => libc::EINVAL,
            });
        }
        #[cfg(any(test, fuzzing))]
        if let Some(server) = self.test_server(protocol, destination) {
            return Ok(server);
        }
        if ip.is_loopback() {
            return match destination.port() {
                DNS_PORT => self.resolver_for(ip).ok_or(libc::ECONNREFUSED),
                _ => Err(libc::ECONNREFUSED),
            };
        }
        match ip {
            // Linux takes the unspecified address for loopback.
            _ if ip.is_unspecified() => Err(libc::ECONNREFUSED),
            _ if is_out_of_reach(ip) => Err(libc::ENETUNREACH),
            _ => Ok(SocketAddr::new(ip, destination.port())),
        }
    }

    /// The host's name server for a loopback address: the one with this address, or else the first.
    fn resolver_for(&self, ip: IpAddr) -> Option<SocketAddr> {
        let same = self.resolvers.iter().find(|resolver| resolver.ip() == ip);
        same.or(self.resolvers.first()).copied()
    }
}

/// Addresses that name no single host, or none that mote can reach.
fn is_out_of_reach(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [first, ..] = ip.octets();
            first == 0 || ip.is_multicast() || ip == Ipv4Addr::BROADCAST
        }
        IpAddr::V6(ip) => {
            // A link-local address needs an interface, and the guest has none on that link. The
            // IPv4-compatible form (`::127.0.0.1`, RFC 4291, 2.5.5.1) is deprecated; an old tunnel
            // interface would still take it for the IPv4 address.
            let is_ipv4_compatible = ip.segments()[..6] == [0; 6];
            ip.is_multicast() || ip.is_unicast_link_local() || is_ipv4_compatible
        }
    }
}

/// An address, or an IPv6 address with the interface to reach it by (`fe80::1%eth0`).
fn parse_name_server(text: &str) -> Option<SocketAddr> {
    let Some((ip, interface)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse().ok()?, DNS_PORT));
    };
    let ip: Ipv6Addr = ip.parse().ok()?;
    let scope = interface.parse().ok().or_else(|| sys::socket::interface_index(interface))?;
    Some(SocketAddrV6::new(ip, DNS_PORT, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "# a comment\nsearch example.org\nnameserver 127.0.0.53\n\
        nameserver 2001:db8::53 trailing\nnameserver nonsense\nnameserver 192.0.2.53\nnameserver";

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    /// What both protocols get.
    fn resolve(policy: &Policy, destination: &str) -> Result<String, i32> {
        let [tcp, udp] = [Protocol::Tcp, Protocol::Udp]
            .map(|protocol| policy.resolve(protocol, address(destination)));
        assert_eq!(tcp, udp);
        tcp.map(|address| address.to_string())
    }

    #[test]
    fn the_outside_is_reached_as_named() {
        let policy = Policy::new(HOST);
        for destination in
            ["192.0.2.1:80", "[2001:db8::1]:443", "10.0.0.1:53", "[64:ff9b::7f00:1]:80"]
        {
            assert_eq!(resolve(&policy, destination), Ok(destination.into()));
        }
        assert_eq!(resolve(&policy, "[::ffff:192.0.2.1]:80"), Ok("192.0.2.1:80".into()));
    }

    #[test]
    fn the_hosts_loopback_is_out_of_reach_however_it_is_spelled() {
        let policy = Policy::new(HOST);
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
        let policy = Policy::new(HOST);
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
            assert_eq!(policy.resolve(Protocol::Tcp, destination), Err(libc::ECONNREFUSED));
            assert_eq!(policy.resolve(Protocol::Udp, destination), Err(libc::EINVAL));
        }
    }

    #[test]
    fn a_name_server_on_loopback_is_the_hosts() {
        let policy = Policy::new(HOST);
        for (destination, expected) in [
            ("127.0.0.53:53", "127.0.0.53:53"),
            ("127.0.0.1:53", "127.0.0.53:53"),
            ("[::1]:53", "127.0.0.53:53"),
            ("[::ffff:127.0.0.11]:53", "127.0.0.53:53"),
        ] {
            assert_eq!(resolve(&policy, destination), Ok(expected.into()));
        }
        let policy = Policy::new("nameserver 192.0.2.53\nnameserver ::1\n");
        assert_eq!(resolve(&policy, "127.0.0.1:53"), Ok("192.0.2.53:53".into()));
        assert_eq!(resolve(&policy, "[::1]:53"), Ok("[::1]:53".into()));
        assert_eq!(resolve(&policy, "127.0.0.1:54"), Err(libc::ECONNREFUSED));
        assert_eq!(resolve(&Policy::new(""), "127.0.0.1:53"), Err(libc::ECONNREFUSED));
    }

    #[test]
    fn name_servers_are_addresses() {
        let servers = ["127.0.0.53:53", "[2001:db8::53]:53", "192.0.2.53:53"].map(address);
        assert_eq!(Policy::new(HOST).resolvers, servers);
        let scoped = "nameserver fe80::1%lo\nnameserver fe80::2%no-such0\nnameserver fe80::3%7";
        let scopes: Vec<u32> = Policy::new(scoped)
            .resolvers
            .into_iter()
            .map(|address| match address {
                SocketAddr::V6(address) => address.scope_id(),
                SocketAddr::V4(_) => panic!("not IPv4"),
            })
            .collect();
        assert_eq!(scopes, [1, 7]);
    }
}
