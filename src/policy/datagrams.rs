//! What the policy says of datagrams, for the guest's kernel to apply: it tells a program that sends at once.
//!
//! The agent hears of a datagram only when it has been sent. The host's answer can then fail what a connected
//! socket does next; one that is not connected would never know. So the policy is laid out beforehand by prefixes: all
//! addresses of a prefix that are in no longer one are treated alike. That is a help for programs and no
//! boundary: what the guest sends nevertheless, and what has changed since, is judged when it comes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mote_agent::flow::Protocol;
use mote_agent::instance::{MAX_EXCEPTIONS, Prefix};

use super::destination::Destination;
use super::rules::{Action, Cidr, Rules};
use super::{DNS_PORT, METADATA, Policy};

/// Most of the host's addresses that are told: with the rules' they have room in the guest's map
/// (`PREFIXES_MAX` in `guest/bpf/tsi.bpf.c`).
const MAX_OF_HOST: usize = 2048;

/// What becomes of datagrams.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Outlook {
    refused: bool,
    /// Ports at which it is the other way round.
    except: Vec<u16>,
}

impl Outlook {
    /// They go to the host, which may refuse them.
    const OPEN: Outlook = Outlook { refused: false, except: Vec::new() };
}

/// A prefix, and what is known of it.
struct Node {
    cidr: Cidr,
    is_on_floor: bool,
    outlook: Outlook,
}

impl Policy {
    /// Where the guest's datagrams may not go, on a host with these addresses: nothing is named that
    /// [`Policy::resolve`] would not refuse. Empty if everything may be sent.
    pub fn datagrams(&self, of_host: &[Cidr]) -> Vec<Prefix> {
        let single = |ip: IpAddr| Cidr::new(ip, u8::MAX);
        let loopback =
            [Cidr::new(Ipv4Addr::LOCALHOST.into(), 8), single(Ipv6Addr::LOCALHOST.into())];
        let everything =
            [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()].map(|ip| Cidr::new(ip, 0));
        let rules = self.rules.rules.iter().map(|rule| rule.to);
        let resolvers = self.resolvers.iter().map(|resolver| single(resolver.ip()));
        let above = everything.into_iter().chain(loopback).chain(rules).chain(resolvers);
        let floor = [Cidr::new(Ipv4Addr::new(169, 254, 0, 0).into(), 16)]
            .into_iter()
            .chain(METADATA.map(|ip| single(ip.into())))
            .chain(of_host.iter().filter(|_| !self.shares_loopback).take(MAX_OF_HOST).copied());

        // As the guest's kernel orders them: what is around a prefix comes before it.
        let mut cidrs = BTreeMap::new();
        for (cidr, is_on_floor) in
            above.map(|cidr| (cidr, false)).chain(floor.map(|cidr| (cidr, true)))
        {
            let (ip, len) = match cidr.first() {
                IpAddr::V4(ip) => (ip.to_ipv6_mapped(), 96 + cidr.prefix_len()),
                IpAddr::V6(ip) => (ip, cidr.prefix_len()),
            };
            cidrs.entry((ip, len)).or_insert((cidr, false)).1 |= is_on_floor;
        }
        let mut prefixes = Vec::new();
        let mut around: Vec<(Cidr, Node)> = Vec::new();
        for ((ip, len), (cidr, mut is_on_floor)) in cidrs {
            let mapped = Cidr::new(ip.into(), len);
            while around.pop_if(|(wider, _)| !wider.covers(&mapped)).is_some() {}
            let nearest = around.last().map(|(_, node)| node);
            is_on_floor |= nearest.is_some_and(|node| node.is_on_floor && node.cidr.covers(&cidr));
            // A loopback address may stand for a name server that is elsewhere.
            let outlook = if loopback.iter().any(|range| range.covers(&cidr)) {
                Outlook::OPEN
            } else {
                self.outlook(&cidr, is_on_floor)
            };
            // What says the same as what is around it need not be said.
            if outlook != *nearest.map_or(&Outlook::OPEN, |node| &node.outlook) {
                let Outlook { refused, except } = outlook.clone();
                prefixes.push(Prefix { ip, len, refused, except });
            }
            around.push((mapped, Node { cidr, is_on_floor, outlook }));
        }
        prefixes
    }

    /// What becomes of datagrams to these addresses, without those that have a longer prefix of their own.
    fn outlook(&self, cidr: &Cidr, is_on_floor: bool) -> Outlook {
        let covering = self.rules.rules.iter().filter(|rule| rule.to.covers(cidr)).copied();
        let rules = Rules { rules: covering.collect(), default: self.rules.default };
        let named = rules.rules.iter().filter_map(|rule| match rule.by {
            Some((Protocol::Udp, Some(port))) => Some(port.get()),
            _ => None,
        });
        let mut ports: Vec<u16> = named.chain([DNS_PORT]).collect();
        ports.sort_unstable();
        ports.dedup();
        let refuses = |port: u16| {
            let ip = cidr.first();
            let destination = Destination { protocol: Some(Protocol::Udp), ip, port };
            let is_resolver = cidr.is_single() && self.is_resolver(destination);
            let on_floor: &[IpAddr] = if is_on_floor && !is_resolver { &[ip] } else { &[] };
            // As in `admit`.
            [&[], on_floor]
                .iter()
                .any(|floor| rules.apply(destination, &[ip], floor) == Action::Deny)
        };
        // No rule names this port: none can.
        let refused = refuses(0);
        ports.retain(|port| refuses(*port) != refused);
        // The host knows what has no room.
        if ports.len() > MAX_EXCEPTIONS {
            Outlook::OPEN
        } else {
            Outlook { refused, except: ports }
        }
    }
}
