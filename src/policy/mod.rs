//! Where the guest may connect to: the one place that says yes or no to a destination.
//!
//! Three things count, in this order:
//!
//! - The spec's egress [`rules`]: the first that matches.
//! - The floor, below every rule: the host's loopback is out of reach (contract §9.4), and so are the host's
//!   own addresses, link-local ones and the metadata services of clouds, however they are spelled.
//!   A service there is not meant for boxes, and a connection that mote makes passes the host's firewall. A
//!   rule opens such an address by naming it: it is the address itself, or a range of link-local addresses.
//!   Nothing opens loopback, unless the box shares that of a network namespace (the spec's `loopback`), nor what passt may take for it: the gateway of the box's own network, and
//!   link-local addresses of IPv6.
//! - The host's name servers are above the floor, at their port: a resolv.conf copied from the host may name
//!   one on loopback or another of its addresses. Rules bind them too.
//!
//! [`Policy`] decides, and is a pure function of the destination and of whether it is local to the host;
//! [`filter::Filter`] asks the host that, and counts [`refusals`]. [`Policy::datagrams`] says beforehand what it can of
//! datagrams.

mod datagrams;
pub mod destination;
pub mod filter;
pub mod refusals;
pub mod rules;
mod spelling;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use mote_agent::flow::Protocol;

use crate::resolv_conf;
use crate::sys;
use destination::Destination;
use rules::{Action, Rules};

/// The port of name servers.
pub const DNS_PORT: u16 = 53;
/// What a refused destination looks like: a host that cannot be reached. For datagrams another errno, because
/// Linux tells a socket of a host that cannot be reached only if it asks for such errors: this one is told to
/// every connected socket, as EHOSTUNREACH over IPv4, and over IPv6 as it is.
fn refused(protocol: Option<Protocol>) -> Refusal {
    Refusal::ByPolicy(match protocol {
        Some(Protocol::Udp) => libc::EACCES,
        _ => libc::EHOSTUNREACH,
    })
}
/// The metadata services of clouds that are not link-local: AWS over IPv6.
const METADATA: [Ipv6Addr; 1] = [Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)];

/// Why a destination cannot be reached, with the errno for the application: the one that a host without a
/// route or listener would give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The policy says no.
    ByPolicy(i32),
    /// Nobody could.
    NoWay(i32),
}

impl Refusal {
    /// The errno.
    pub fn errno(self) -> i32 {
        let (Refusal::ByPolicy(errno) | Refusal::NoWay(errno)) = self;
        errno
    }
}

/// What the guest may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The box's name servers on the host, in its order.
    resolvers: Vec<SocketAddr>,
    /// An address of the guest's own network behind which the host's loopback may be.
    gateway: Option<IpAddr>,
    rules: Rules,
    /// Whether the host's loopback and its own addresses are the box's, too: it is a network namespace that boxes share.
    shares_loopback: bool,
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
    /// The policy of a box that uses the sockets of a host with this resolv.conf.
    pub fn of_host(resolv_conf: &str, rules: Rules) -> Self {
        let resolvers = resolv_conf::name_servers(resolv_conf).filter_map(parse_name_server);
        Policy::new(resolvers.collect(), None, rules)
    }

    /// The policy of a box with a network of its own, which has this gateway and these name servers.
    pub fn of_own_network(gateway: Ipv4Addr, resolvers: &[Ipv4Addr], rules: Rules) -> Self {
        let resolvers = resolvers.iter().map(|ip| SocketAddr::new((*ip).into(), DNS_PORT));
        Policy::new(resolvers.collect(), Some(gateway.into()), rules)
    }

    fn new(resolvers: Vec<SocketAddr>, gateway: Option<IpAddr>, rules: Rules) -> Self {
        Policy {
            resolvers,
            gateway,
            rules,
            shares_loopback: false,
            #[cfg(any(test, fuzzing))]
            servers: TestServers::None,
        }
    }

    /// The same for a box that shares the loopback and the addresses of its network namespace with others, or does not.
    pub fn sharing_loopback(self, shares_loopback: bool) -> Self {
        Policy { shares_loopback, ..self }
    }

    /// Whether it does.
    pub fn shares_loopback(&self) -> bool {
        self.shares_loopback
    }

    /// The egress rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// A policy that lets the guest reach the host's loopback.
    #[cfg(any(test, fuzzing))]
    pub fn with_loopback() -> Self {
        let policy = Policy::new(Vec::new(), None, Rules::default());
        Policy { servers: TestServers::Loopback, ..policy }
    }

    /// A policy that turns every destination into one of these two.
    #[cfg(any(test, fuzzing))]
    pub fn with_stand_ins(tcp: SocketAddr, udp: SocketAddr) -> Self {
        let policy = Policy::new(Vec::new(), None, Rules::default());
        Policy { servers: TestServers::StandIns { tcp, udp }, ..policy }
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

    /// The address to connect to, with a socket of the host, for a destination that the guest has named.
    /// `is_local` says of an address whether it is the host's own, or with which errno it has no route.
    ///
    /// # Errors
    /// Why not.
    pub fn resolve(
        &self,
        protocol: Protocol,
        destination: SocketAddr,
        is_local: impl Fn(IpAddr) -> Result<bool, i32>,
    ) -> Result<SocketAddr, Refusal> {
        let ip = destination.ip().to_canonical();
        if destination.port() == 0 {
            return Err(Refusal::NoWay(match protocol {
                Protocol::Tcp => libc::ECONNREFUSED,
                Protocol::Udp => libc::EINVAL,
            }));
        }
        #[cfg(any(test, fuzzing))]
        if let Some(server) = self.test_server(protocol, destination) {
            return Ok(server);
        }
        let address = match ip {
            // Linux takes the unspecified address for loopback.
            _ if ip.is_unspecified() => return Err(Refusal::ByPolicy(libc::ECONNREFUSED)),
            _ if ip.is_loopback() && self.shares_loopback => {
                SocketAddr::new(ip, destination.port())
            }
            _ if ip.is_loopback() && destination.port() == DNS_PORT => {
                self.resolver_for(ip).ok_or(Refusal::ByPolicy(libc::ECONNREFUSED))?
            }
            _ if ip.is_loopback() => return Err(Refusal::ByPolicy(libc::ECONNREFUSED)),
            _ if is_out_of_reach(ip) => return Err(Refusal::NoWay(libc::ENETUNREACH)),
            _ => SocketAddr::new(ip, destination.port()),
        };
        self.admit(Destination::new(protocol, address), is_local)?;
        Ok(address)
    }

    /// Whether the guest may send to this destination. `is_local` is as for [`Policy::resolve`].
    ///
    /// # Errors
    /// Why not.
    pub fn admit(
        &self,
        destination: Destination,
        is_local: impl Fn(IpAddr) -> Result<bool, i32>,
    ) -> Result<(), Refusal> {
        let Destination { protocol, ip, .. } = destination;
        let spellings: Vec<IpAddr> =
            [ip].into_iter().chain(spelling::embedded(ip).into_iter().map(IpAddr::V4)).collect();
        // What is denied anyway needs no route.
        self.apply_rules(destination, &spellings, &[])?;
        // The floor is about services, which have ports.
        if self.is_resolver(destination) || protocol.is_none() {
            return Ok(());
        }
        if self.shares_loopback && ip.is_loopback() {
            return Ok(());
        }
        if spellings.iter().any(|ip| self.is_loopback(*ip)) {
            return Err(refused(protocol));
        }
        let route = is_local(ip);
        let is_on_floor = |spelling: &IpAddr| {
            let route = if *spelling == ip { route } else { is_local(*spelling) };
            route == Ok(true) && !self.shares_loopback || is_reserved(*spelling)
        };
        let on_floor: Vec<IpAddr> = spellings.iter().copied().filter(is_on_floor).collect();
        if on_floor.is_empty() {
            // Only how it is written counts here: a translator may have another way than this host.
            return route.map(drop).map_err(Refusal::NoWay);
        }
        self.apply_rules(destination, &spellings, &on_floor)
    }

    /// Whether this may be the host's loopback, to the host or to passt (`--map-gw`).
    fn is_loopback(&self, ip: IpAddr) -> bool {
        ip.is_loopback()
            || ip.is_unspecified()
            || Some(ip) == self.gateway
            || matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
    }

    /// As [`Rules::apply`], with the errno.
    fn apply_rules(
        &self,
        destination: Destination,
        spellings: &[IpAddr],
        on_floor: &[IpAddr],
    ) -> Result<(), Refusal> {
        match self.rules.apply(destination, spellings, on_floor) {
            Action::Allow => Ok(()),
            Action::Deny => Err(refused(destination.protocol)),
        }
    }

    fn is_resolver(&self, Destination { protocol, ip, port }: Destination) -> bool {
        let is_known = |known: &SocketAddr| known.ip() == ip && known.port() == port;
        protocol.is_some() && self.resolvers.iter().any(is_known)
    }

    /// The host's name server for a loopback address: the one with this address, or else the first.
    fn resolver_for(&self, ip: IpAddr) -> Option<SocketAddr> {
        let same = self.resolvers.iter().find(|resolver| resolver.ip() == ip);
        same.or(self.resolvers.first()).copied()
    }
}

/// Link-local addresses of IPv4, and metadata services elsewhere.
fn is_reserved(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => METADATA.contains(&ip),
    }
}

/// Addresses that name no single host, or none that mote can reach.
fn is_out_of_reach(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [first, ..] = ip.octets();
            first == 0 || ip.is_multicast() || ip == Ipv4Addr::BROADCAST
        }
        // A link-local address needs an interface, and the guest has none on that link.
        IpAddr::V6(ip) => {
            ip.is_multicast() || ip.is_unicast_link_local() || spelling::is_ipv4_compatible(ip)
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
mod tests;
