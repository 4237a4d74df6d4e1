//! The other boxes of the same network: which frames of the guest's go to them and not to passt, and which of
//! theirs the guest gets. [`crate::host::switch`] carries the frames.
//!
//! passt answers for every address that is asked for, also for those of the peers. So who owns an address of the
//! box's own subnet is asked of the peers alone, and passt is asked for the rest: the gateway and name servers.
//! After that the Ethernet address says whose a frame is.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use super::filter::{self, Frame, Packet};
use super::passt::{Connection, FRAME_LEN};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// `ar_pro` to `ar_op` of ARP for IPv4 over Ethernet (RFC 826), from the type of the hardware on.
const ARP_START: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// Where a frame with ARP has what.
const ARP: usize = 14;
const ARP_SENDER_MAC: usize = ARP + 8;
const ARP_SENDER: usize = ARP + 14;
const ARP_TARGET: usize = ARP + 24;
/// Where a frame with a neighbour solicitation (RFC 4861, 4.3) has the address that is looked for.
const SOLICITED: usize = 14 + 40 + 8;
/// Messages of ICMPv6 (RFC 4861).
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_MESSAGES: RangeInclusive<u8> = 133..=137;
const REDIRECT: u8 = 137;
/// UDP ports of those who configure others: DHCP and DHCPv6 servers.
const CONFIGURATORS: [u16; 2] = [67, 547];

/// The box's own subnet, and who in it is no peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subnet {
    /// The box's address.
    pub address: Ipv4Addr,
    /// Length of the prefix in bits, at most 32.
    pub prefix_len: u8,
    /// Addresses that passt answers for: the gateway's, and the name servers'.
    pub of_passt: Vec<Ipv4Addr>,
}

impl Subnet {
    /// Whether a peer can have this address.
    pub fn has_peer(&self, ip: Ipv4Addr) -> bool {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_len)).unwrap_or(0);
        let is_inside = (ip.to_bits() ^ self.address.to_bits()) & mask == 0;
        is_inside && ip != self.address && !self.of_passt.contains(&ip)
    }

    /// Whether a peer can have this address: it ends in what Linux makes of an Ethernet address (RFC 4291,
    /// appendix A), which the runtime makes of the address in the subnet.
    fn has_peer_v6(&self, ip: Ipv6Addr) -> bool {
        match ip.octets()[8..] {
            // 02:42, with the "local" bit turned over.
            [0x00, 0x42, a, 0xff, 0xfe, b, c, d] => {
                let ip = Ipv4Addr::new(a, b, c, d);
                ip == self.address || self.has_peer(ip)
            }
            _ => false,
        }
    }
}

/// Whom a frame of the guest's goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To passt alone.
    Passt,
    /// To peers alone.
    Peers,
    /// To both.
    Both,
}

/// What the device has of the peers.
#[derive(Debug)]
pub struct Peers {
    /// The connection to the switch, on which frames come as on that to passt.
    pub connection: Connection,
    subnet: Subnet,
    /// passt's own Ethernet address, once a frame has come from it.
    passt: Option<Mac>,
}

impl Peers {
    /// Peers in this subnet, on a connection to the switch.
    pub fn new(connection: Connection, subnet: Subnet) -> Self {
        Peers { connection, subnet, passt: None }
    }

    /// Takes note of whom a frame of passt's is from.
    pub fn note_passt(&mut self, frame: &[u8]) {
        self.passt = ends(frame).map(|(_, source)| source);
    }

    /// Whom this frame of the guest's goes to.
    pub fn way(&self, frame: &[u8]) -> Way {
        let Some((destination, _)) = ends(frame) else { return Way::Passt };
        if is_group(destination) {
            return match sought(frame) {
                Some(Sought::V4(ip)) if ip == self.subnet.address || self.subnet.has_peer(ip) => {
                    Way::Peers
                }
                Some(Sought::V6(ip)) if self.subnet.has_peer_v6(ip) => Way::Peers,
                Some(_) => Way::Passt,
                None => Way::Both,
            };
        }
        match self.passt {
            Some(passt) if destination == passt => Way::Passt,
            Some(_) => Way::Peers,
            // The guest knows an address that nobody has told it.
            None => Way::Both,
        }
    }
}

/// The address that a frame asks everybody for.
enum Sought {
    V4(Ipv4Addr),
    V6(Ipv6Addr),
}

fn sought(frame: &[u8]) -> Option<Sought> {
    match filter::parse(frame) {
        Frame::Arp => {
            let target = frame.get(ARP_TARGET..)?.first_chunk::<4>()?;
            Some(Sought::V4(Ipv4Addr::from(*target)))
        }
        Frame::Packet(packet) if packet.is_icmpv6() && packet.first == NEIGHBOUR_SOLICITATION => {
            let target = frame.get(SOLICITED..)?.first_chunk::<16>()?;
            Some(Sought::V6(Ipv6Addr::from(*target)))
        }
        _ => None,
    }
}

/// Destination and source of a frame.
pub fn ends(frame: &[u8]) -> Option<(Mac, Mac)> {
    Some((*frame.first_chunk()?, *frame.get(6..)?.first_chunk()?))
}

/// Whether this is the address of many: broadcast or multicast.
pub fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// Whether a peer may send this frame to the box with this Ethernet address: not in the box's own name, and not
/// posing as the gateway, or as another who configures the network.
pub fn may_send(frame: &[u8], to: Mac, subnet: &Subnet) -> bool {
    let Some((destination, source)) = ends(frame).filter(|_| FRAME_LEN.contains(&frame.len()))
    else {
        return false;
    };
    if source == to || is_group(source) || !(destination == to || is_group(destination)) {
        return false;
    }
    match filter::parse(frame) {
        Frame::Arp => may_say(source, frame, subnet),
        Frame::Packet(packet) => !configures(&packet),
        Frame::Other => true,
    }
}

/// Whether a peer may send this frame with ARP: about its own address, which must be one of a peer's.
fn may_say(peer: Mac, frame: &[u8], subnet: &Subnet) -> bool {
    let says = || {
        let mac: Mac = *frame.get(ARP_SENDER_MAC..)?.first_chunk()?;
        let ip = Ipv4Addr::from(*frame.get(ARP_SENDER..)?.first_chunk::<4>()?);
        // Who does not know yet whether it can have an address asks without one (RFC 5227).
        Some(mac == peer && (ip.is_unspecified() || subnet.has_peer(ip)))
    };
    frame[ARP..].starts_with(&ARP_START) && says() == Some(true)
}

fn configures(packet: &Packet) -> bool {
    if packet.is_icmpv6() && NEIGHBOUR_MESSAGES.contains(&packet.first) {
        matches!(packet.first, ROUTER_ADVERTISEMENT | REDIRECT)
    } else {
        packet.is_udp() && CONFIGURATORS.contains(&packet.source_port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    const OWN: Mac = [2, 0x42, 10, 88, 0, 2];
    const PEER: Mac = [2, 0x42, 10, 88, 0, 3];
    const PASST: Mac = [0x9a, 0x55, 0x9a, 0x55, 0x9a, 0x55];
    const ALL: Mac = [0xff; 6];

    fn subnet() -> Subnet {
        Subnet {
            address: [10, 88, 0, 2].into(),
            prefix_len: 24,
            of_passt: vec![[10, 88, 0, 1].into(), [10, 88, 0, 53].into()],
        }
    }

    fn frame(to: Mac, from: Mac, kind: u16, rest: &[u8]) -> Vec<u8> {
        [&to[..], &from, &kind.to_be_bytes(), rest].concat()
    }

    /// ARP of this host, about that one.
    fn arp(to: Mac, from: Mac, ip: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let rest = [&ARP_START[..], &[0, 1], &from, &ip, &[0; 6], &target].concat();
        frame(to, from, 0x0806, &rest)
    }

    fn icmpv6(to: Mac, from: Mac, kind: u8, target: [u8; 16]) -> Vec<u8> {
        let mut rest = vec![0; 40 + 8];
        (rest[0], rest[6], rest[40]) = (0x60, 58, kind);
        rest.extend(target);
        frame(to, from, 0x86dd, &rest)
    }

    fn udp(to: Mac, from: Mac, port: u16) -> Vec<u8> {
        let mut rest = vec![0; 28];
        (rest[0], rest[9]) = (0x45, 17);
        rest[12..16].copy_from_slice(&[10, 88, 0, 3]);
        rest[16..20].copy_from_slice(&[10, 88, 0, 2]);
        rest[20..22].copy_from_slice(&port.to_be_bytes());
        frame(to, from, 0x0800, &rest)
    }

    #[test]
    fn addresses_of_the_subnet_are_asked_of_peers_and_the_rest_of_passt() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let mut peers = Peers::new(Connection::new(ours).expect("a connection"), subnet());
        let ask = |target| arp(ALL, OWN, [10, 88, 0, 2], target);
        let link_local = |end: [u8; 8]| {
            let mut ip = [0; 16];
            ip[..2].copy_from_slice(&[0xfe, 0x80]);
            ip[8..].copy_from_slice(&end);
            icmpv6([0x33, 0x33, 0xff, 0x58, 0, 3], OWN, 135, ip)
        };
        for (frame, expected) in [
            (ask([10, 88, 0, 3]), Way::Peers),
            (ask([10, 88, 0, 1]), Way::Passt),
            (ask([10, 88, 0, 53]), Way::Passt),
            (ask([10, 88, 1, 3]), Way::Passt),
            // Is it mine? passt does not answer that.
            (ask([10, 88, 0, 2]), Way::Peers),
            (link_local([0, 0x42, 10, 0xff, 0xfe, 88, 0, 3]), Way::Peers),
            (link_local([0, 0x42, 10, 0xff, 0xfe, 88, 0, 1]), Way::Passt),
            (link_local([0, 0, 0, 0, 0, 0, 0, 1]), Way::Passt),
            (udp(ALL, OWN, 5353), Way::Both),
            (udp(PASST, OWN, 99), Way::Both),
        ] {
            assert_eq!(peers.way(&frame), expected, "{frame:x?}");
        }
        peers.note_passt(&arp(OWN, PASST, [10, 88, 0, 1], [10, 88, 0, 2]));
        assert_eq!(peers.way(&udp(PASST, OWN, 99)), Way::Passt);
        assert_eq!(peers.way(&udp(PEER, OWN, 99)), Way::Peers);
    }

    #[test]
    fn a_peer_speaks_for_itself_alone() {
        let other: Mac = [2, 0x42, 10, 88, 0, 4];
        for (frame, expected) in [
            (arp(OWN, PEER, [10, 88, 0, 3], [10, 88, 0, 2]), true),
            (arp(ALL, PEER, [0; 4], [10, 88, 0, 3]), true),
            (udp(OWN, PEER, 53), true),
            (icmpv6(OWN, PEER, 136, [0; 16]), true),
            (frame(OWN, PEER, 0x88cc, &[0; 46]), true),
            (udp(ALL, PEER, 53), true),
            // For another one, from nobody, from the box itself.
            (udp(other, PEER, 53), false),
            (udp(OWN, ALL, 53), false),
            (udp(OWN, OWN, 53), false),
            // As the gateway, a name server, the box itself, somebody outside.
            (arp(OWN, PEER, [10, 88, 0, 1], [10, 88, 0, 2]), false),
            (arp(OWN, PEER, [10, 88, 0, 53], [10, 88, 0, 2]), false),
            (arp(ALL, PEER, [10, 88, 0, 2], [10, 88, 0, 2]), false),
            (arp(OWN, PEER, [192, 0, 2, 1], [10, 88, 0, 2]), false),
            (icmpv6(OWN, PEER, 134, [0; 16]), false),
            (icmpv6(OWN, PEER, 137, [0; 16]), false),
            (udp(OWN, PEER, 67), false),
            // Cut off, or no frame.
            (arp(OWN, PEER, [10, 88, 0, 3], [10, 88, 0, 2])[..30].to_vec(), false),
            (frame(OWN, PEER, 0x0806, &[0; 46]), false),
            (vec![2; 13], false),
            (frame(OWN, PEER, 0x0800, &vec![0; 65_535]), false),
        ] {
            assert_eq!(may_send(&frame, OWN, &subnet()), expected, "{frame:x?}");
        }
        // With another's address in it.
        let mut stolen = arp(OWN, PEER, [10, 88, 0, 3], [10, 88, 0, 2]);
        stolen[ARP_SENDER_MAC + 5] = 4;
        assert!(!may_send(&stolen, OWN, &subnet()));
    }

    #[test]
    fn a_prefix_says_who_is_near() {
        let subnet = |prefix_len| Subnet { prefix_len, ..subnet() };
        assert!(subnet(16).has_peer([10, 88, 9, 9].into()));
        assert!(!subnet(24).has_peer([10, 88, 9, 9].into()));
        assert!(subnet(1).has_peer([100, 1, 1, 1].into()));
        assert!(!subnet(32).has_peer([10, 88, 0, 3].into()));
    }
}
