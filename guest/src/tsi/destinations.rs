//! What becomes of what applications send to an address, as the BPF programs look it up (`destinations` in
//! `guest/bpf/tsi.bpf.c`): by the longest prefix. To have the programs compare addresses would cost each start more.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mote_agent::flow::mapped;
use mote_agent::instance::{MAX_EXCEPTIONS, Prefix};

/// Network of the IPv6 addresses that name flows (`FLOW_NET6`).
pub const FLOW_NET6: Ipv6Addr = Ipv6Addr::new(0xfd54, 0x5349, 0, 0, 0, 0, 0, 0);
/// Its prefix length.
pub const FLOW_NET6_LEN: u8 = 64;
/// Network of the IPv4 addresses that name flows (`FLOW_NET4`).
pub const FLOW_NET4: Ipv4Addr = Ipv4Addr::new(127, 128, 0, 0);
/// The guest's own address beside loopback's: one that is nobody's elsewhere (RFC 7600).
pub const OWN_IP4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);

/// `struct prefix`, as bytes.
pub type RawPrefix = [u8; PREFIX_LEN];
/// Its length.
pub const PREFIX_LEN: usize = 20;
/// `struct destination`, as bytes.
pub type RawDestination = [u8; DESTINATION_LEN];
/// Its length.
pub const DESTINATION_LEN: usize = 8 + 2 * MAX_EXCEPTIONS;
/// Most loopback resolvers: resolv.conf(5) has three that count.
const MAX_RESOLVERS: usize = 4;

/// `enum kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Inside,
    Outside,
    Flow,
    Resolver,
}

/// What leaves the guest, and what names flows. The kernel has no route to the rest (multicast, broadcast,
/// link-local), which is the answer that applications get, or it is the guest itself. Prefixes within others come
/// behind them.
const KINDS: [(Ipv6Addr, u8, Kind); 12] = [
    (Ipv6Addr::UNSPECIFIED, 0, Kind::Outside),
    // Unspecified and loopback.
    (Ipv6Addr::UNSPECIFIED, 127, Kind::Inside),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10, Kind::Inside),
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8, Kind::Inside),
    // The guest's own address is in it, too.
    (FLOW_NET6, FLOW_NET6_LEN, Kind::Inside),
    (FLOW_NET6, 96, Kind::Flow),
    (Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(), 96, Kind::Outside),
    (Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(), 96 + 8, Kind::Inside),
    (Ipv4Addr::new(127, 0, 0, 0).to_ipv6_mapped(), 96 + 8, Kind::Inside),
    (FLOW_NET4.to_ipv6_mapped(), 96 + 10, Kind::Flow),
    (OWN_IP4.to_ipv6_mapped(), 96 + 32, Kind::Inside),
    (Ipv4Addr::new(224, 0, 0, 0).to_ipv6_mapped(), 96 + 3, Kind::Inside),
];

/// The entries of the map. `resolvers` are the loopback addresses that stand for the host's resolver (IPv4 as
/// IPv4-mapped); those beyond [`MAX_RESOLVERS`] do not. `shared` are the addresses that the box has in common with others,
/// if it shares their network and its loopback, too. `prefixes` say where no datagrams may go.
pub fn destinations(
    resolvers: &[Ipv6Addr],
    shared: Option<&[IpAddr]>,
    prefixes: &[Prefix],
) -> Vec<(RawPrefix, RawDestination)> {
    let kind = |ip, len| {
        let around = KINDS.iter().rfind(|(around, bits, _)| covers(*around, *bits, ip, len));
        around.map_or(Kind::Outside, |(.., kind)| *kind)
    };
    let outlook = |ip, len| {
        let around = prefixes.iter().filter(|around| covers(around.ip, around.len, ip, len));
        around.max_by_key(|around| around.len)
    };
    // A prefix of one has what the longest around it has of the other.
    let mut entries = BTreeMap::new();
    for Prefix { ip, len, .. } in prefixes {
        entries.insert((*ip, *len), kind(*ip, *len));
    }
    entries.extend(KINDS.map(|(ip, len, kind)| ((ip, len), kind)));
    entries.extend(resolvers.iter().take(MAX_RESOLVERS).map(|ip| ((*ip, 128), Kind::Resolver)));
    if let Some(addresses) = shared {
        let loopback =
            [(Ipv4Addr::new(127, 0, 0, 0).to_ipv6_mapped(), 96 + 8), (Ipv6Addr::LOCALHOST, 128)];
        let addresses = addresses.iter().map(|ip| (mapped(*ip), 128));
        entries.extend(addresses.chain(loopback).map(|prefix| (prefix, Kind::Resolver)));
    }
    let raw = entries
        .into_iter()
        .map(|((ip, len), kind)| (raw_prefix(ip, len), raw_destination(kind, outlook(ip, len))));
    raw.collect()
}

/// Whether all addresses of the second prefix are in the first.
fn covers(ip: Ipv6Addr, len: u8, other: Ipv6Addr, other_len: u8) -> bool {
    let different = u128::from(ip) ^ u128::from(other);
    len <= other_len && different.leading_zeros() >= len.into()
}

fn raw_prefix(ip: Ipv6Addr, len: u8) -> RawPrefix {
    let mut raw = [0; PREFIX_LEN];
    raw[..4].copy_from_slice(&u32::from(len).to_ne_bytes());
    raw[4..].copy_from_slice(&ip.octets());
    raw
}

fn raw_destination(kind: Kind, outlook: Option<&Prefix>) -> RawDestination {
    let mut raw = [0; DESTINATION_LEN];
    raw[..4].copy_from_slice(&(kind as u32).to_ne_bytes());
    if let Some(Prefix { refused, except, .. }) = outlook {
        raw[4..8].copy_from_slice(&u32::from(*refused).to_ne_bytes());
        for (place, port) in raw[8..].chunks_exact_mut(2).zip(except) {
            place.copy_from_slice(&port.to_be_bytes());
        }
    }
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Ipv6Addr {
        mote_agent::flow::mapped(text.parse().expect("an address"))
    }

    /// As the kernel looks it up.
    fn look_up(entries: &[(RawPrefix, RawDestination)], to: &str) -> RawDestination {
        let covering = entries.iter().filter(|(prefix, _)| {
            let len = prefix[0];
            covers(
                Ipv6Addr::from(<[u8; 16]>::try_from(&prefix[4..]).expect("16")),
                len,
                ip(to),
                128,
            )
        });
        covering.max_by_key(|(prefix, _)| prefix[0]).expect("everything is covered").1
    }

    #[test]
    fn addresses_have_the_kind_of_the_longest_prefix() {
        let entries = destinations(&[ip("127.0.0.53")], None, &[]);
        for (kind, all) in [
            (Kind::Outside, &["192.0.2.1", "10.0.0.1", "126.255.255.255", "223.255.255.255"][..]),
            (Kind::Outside, &["2001:db8::1", "::2", "fd54:5349:0:1::1", "fec0::1", "::fffe:0:0"]),
            (Kind::Inside, &["0.0.0.0", "127.0.0.1", "127.192.0.0", "127.127.255.255"]),
            (Kind::Inside, &["192.0.0.8", "224.0.0.1", "255.255.255.255", "::", "::1"]),
            (Kind::Inside, &["fe80::1", "febf::1", "ff02::1", "fd54:5349::8000:0:0:1"]),
            (Kind::Flow, &["127.128.0.1", "127.191.255.255", "fd54:5349::1"]),
            (Kind::Resolver, &["127.0.0.53"]),
        ] {
            for to in all {
                assert_eq!(look_up(&entries, to)[..4], (kind as u32).to_ne_bytes(), "{to}");
            }
        }
    }

    #[test]
    fn what_the_host_refuses_is_said_of_all_that_is_within() {
        let prefix = |text, len, refused, except: &[u16]| Prefix {
            ip: ip(text),
            len,
            refused,
            except: except.to_vec(),
        };
        let prefixes = [
            prefix("0.0.0.0", 96, true, &[53, 443]),
            prefix("10.0.0.0", 96 + 8, false, &[]),
            prefix("192.0.0.8", 128, false, &[]),
            prefix("127.0.0.0", 96 + 9, false, &[]),
        ];
        let entries = destinations(&[ip("127.0.0.53")], None, &prefixes);
        for (to, kind, is_refused, except) in [
            ("192.0.2.1", Kind::Outside, true, [0, 53, 1, 187]),
            ("10.1.2.3", Kind::Outside, false, [0; 4]),
            ("192.0.0.8", Kind::Inside, false, [0; 4]),
            ("192.0.0.9", Kind::Outside, true, [0, 53, 1, 187]),
            ("127.0.0.1", Kind::Inside, false, [0; 4]),
            ("127.0.0.53", Kind::Resolver, false, [0; 4]),
            ("127.128.0.1", Kind::Flow, true, [0, 53, 1, 187]),
            ("2001:db8::1", Kind::Outside, false, [0; 4]),
        ] {
            let raw = look_up(&entries, to);
            assert_eq!(raw[..4], (kind as u32).to_ne_bytes(), "{to}");
            assert_eq!(raw[4..8], u32::from(is_refused).to_ne_bytes(), "{to}");
            assert_eq!(raw[8..12], except, "{to}");
        }
    }
}
