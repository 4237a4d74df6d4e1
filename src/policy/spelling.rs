//! IPv6 addresses that stand for IPv4 addresses: what a host, a router or a translator on the way may make
//! an IPv4 packet of.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The IPv4 addresses that an address may lead to: none for an IPv4 address itself. IPv4-mapped addresses are
/// written as IPv4 everywhere ([`IpAddr::to_canonical`]), so they are none of these.
pub fn embedded(ip: IpAddr) -> Vec<Ipv4Addr> {
    let IpAddr::V6(ip) = ip else { return Vec::new() };
    let bytes = ip.octets();
    let at = |places: [usize; 4]| Ipv4Addr::from(places.map(|place| bytes[place]));
    match ip.segments() {
        // NAT64 (RFC 6052, 2.1).
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => vec![at([12, 13, 14, 15])],
        // A NAT64 of the site's own (RFC 8215), with a prefix of 48, 56, 64 or 96 bits (RFC 6052, 2.2).
        [0x64, 0xff9b, 1, ..] => {
            vec![at([6, 7, 9, 10]), at([7, 9, 10, 11]), at([9, 10, 11, 12]), at([12, 13, 14, 15])]
        }
        // 6to4 (RFC 3056, 2).
        [0x2002, ..] => vec![at([2, 3, 4, 5])],
        // Teredo (RFC 4380, 4): its server, and the client, with all bits inverted.
        [0x2001, 0, ..] => {
            vec![at([4, 5, 6, 7]), Ipv4Addr::from_bits(!at([12, 13, 14, 15]).to_bits())]
        }
        // ISATAP (RFC 5214, 6.1).
        [_, _, _, _, 0 | 0x200, 0x5efe, ..] => vec![at([12, 13, 14, 15])],
        // IPv4-translated (RFC 2765, 2.1).
        [0, 0, 0, 0, 0xffff, 0, ..] => vec![at([12, 13, 14, 15])],
        // IPv4-compatible.
        [0, 0, 0, 0, 0, 0, ..] => vec![at([12, 13, 14, 15])],
        _ => Vec::new(),
    }
}

/// Whether this is an IPv4-compatible address (`::127.0.0.1`, RFC 4291, 2.5.5.1). They are deprecated; an old
/// tunnel interface would still take one for the IPv4 address.
pub fn is_ipv4_compatible(ip: Ipv6Addr) -> bool {
    ip.segments()[..6] == [0; 6]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_understood() {
        let target = Ipv4Addr::new(169, 254, 169, 254);
        for spelling in [
            "64:ff9b::169.254.169.254",
            "64:ff9b:1:a9fe:a9:fe00::",
            "64:ff9b:1:ffa9:fe:a9fe::",
            "64:ff9b:1:ffff:a9:fea9:fe00:0",
            "64:ff9b:1::169.254.169.254",
            "2002:a9fe:a9fe::1",
            "2001:0:a9fe:a9fe::",
            "2001:0:1:1:1:1:5601:5601",
            "2001:db8::5efe:169.254.169.254",
            "2001:db8::200:5efe:169.254.169.254",
            "::169.254.169.254",
            "::ffff:0:169.254.169.254",
        ] {
            let ip: IpAddr = spelling.parse().expect("an address");
            assert!(embedded(ip).contains(&target), "{spelling}: {:?}", embedded(ip));
        }
        for other in ["169.254.169.254", "2001:db8::a9fe:a9fe", "fe80::1"] {
            assert!(embedded(other.parse().expect("an address")).is_empty(), "{other}");
        }
    }
}
