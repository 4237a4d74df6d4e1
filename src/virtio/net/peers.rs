//! The other boxes of the same network: which frames of the guest's go to them and not to passt, and which of
//! theirs the guest gets. [`crate::host::switch`] carries the frames.
//!
//! passt answers for every address that is asked for, also for those of the peers, and makes connections to them on
//! the host. So the addresses in a frame decide: those of the box's own subnet are the peers' alone, but for the
//! gateway's and the name servers', and all else is passt's. Between boxes there is IPv4 and ARP, and nothing else:
//! what else there is on an Ethernet is for configuring others.

use std::net::{IpAddr, Ipv4Addr};

use super::filter::{self, Frame, Packet};
use super::passt::{Connection, FRAME_LEN};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// `ar_hrd` to `ar_pln` of ARP for IPv4 over Ethernet (RFC 826).
const ARP_START: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// Where a frame with ARP has what.
const ARP: usize = 14;
const ARP_SENDER_MAC: usize = ARP + 8;
const ARP_SENDER: usize = ARP + 14;
const ARP_TARGET: usize = ARP + 24;
/// UDP port of DHCP servers.
const DHCP_SERVER: u16 = 67;

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
}

impl Peers {
    /// Peers in this subnet, on a connection to the switch.
    pub fn new(connection: Connection, subnet: Subnet) -> Self {
        Peers { connection, subnet }
    }

    /// Whom this frame of the guest's goes to.
    pub fn way(&self, frame: &[u8]) -> Way {
        match filter::parse(frame) {
            // The box's own address is asked for to see whether a peer has it.
            Frame::Arp => match ip_at(frame, ARP_TARGET) {
                Some(ip) if ip == self.subnet.address || self.subnet.has_peer(ip) => Way::Peers,
                _ => Way::Passt,
            },
            Frame::Packet(packet) => match packet.destination() {
                IpAddr::V4(ip) if self.subnet.has_peer(ip) => Way::Peers,
                IpAddr::V4(ip) if ip.is_multicast() || ip.is_broadcast() => Way::Both,
                _ => Way::Passt,
            },
            Frame::Other => Way::Passt,
        }
    }
}

fn ip_at(frame: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(*frame.get(at..)?.first_chunk::<4>()?))
}

/// Destination and source of a frame.
pub fn ends(frame: &[u8]) -> Option<(Mac, Mac)> {
    Some((*frame.first_chunk()?, *frame.get(6..)?.first_chunk()?))
}

/// Whether this is the address of many: broadcast or multicast.
pub fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// Whether a peer may send this frame to the box with this Ethernet address: from an address of a peer's, and not as
/// one who configures the network. Nothing passes that cannot be understood.
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
        Frame::Packet(packet) => is_peers(&packet, subnet),
        Frame::Other => false,
    }
}

/// Whether a peer may send this frame with ARP: about its own address, which must be one of a peer's.
fn may_say(peer: Mac, frame: &[u8], subnet: &Subnet) -> bool {
    let says = || {
        let mac: Mac = *frame.get(ARP_SENDER_MAC..)?.first_chunk()?;
        let ip = ip_at(frame, ARP_SENDER)?;
        // Who does not know yet whether it can have an address asks without one (RFC 5227).
        Some(mac == peer && (ip.is_unspecified() || subnet.has_peer(ip)))
    };
    frame[ARP..].starts_with(&ARP_START) && says() == Some(true)
}

/// Whether a peer may send this packet.
fn is_peers(packet: &Packet, subnet: &Subnet) -> bool {
    let from_peer = matches!(packet.source(), IpAddr::V4(ip) if subnet.has_peer(ip));
    let configures = packet.is_udp() && packet.source_port == DHCP_SERVER || packet.is_redirect();
    from_peer && !configures
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

    /// An IPv4 packet with four bytes behind its header.
    fn ipv4(to: Mac, from: Mac, ips: [[u8; 4]; 2], protocol: u8, payload: [u8; 4]) -> Vec<u8> {
        let mut rest = vec![0; 28];
        (rest[0], rest[9]) = (0x45, protocol);
        rest[12..16].copy_from_slice(&ips[0]);
        rest[16..20].copy_from_slice(&ips[1]);
        rest[20..24].copy_from_slice(&payload);
        frame(to, from, 0x0800, &rest)
    }

    /// UDP from this port.
    fn udp(to: Mac, from: Mac, ips: [[u8; 4]; 2], port: u16) -> Vec<u8> {
        let [a, b] = port.to_be_bytes();
        ipv4(to, from, ips, 17, [a, b, 0, 9])
    }

    const OURS: [u8; 4] = [10, 88, 0, 2];
    const THEIRS: [u8; 4] = [10, 88, 0, 3];

    #[test]
    fn addresses_of_the_subnet_are_the_peers_and_the_rest_is_passts() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let peers = Peers::new(Connection::new(ours).expect("a connection"), subnet());
        let ask = |target| arp(ALL, OWN, OURS, target);
        for (frame, expected) in [
            (ask(THEIRS), Way::Peers),
            (ask([10, 88, 0, 1]), Way::Passt),
            (ask([10, 88, 0, 53]), Way::Passt),
            (ask([10, 88, 1, 3]), Way::Passt),
            // Is it mine? passt does not answer that.
            (ask(OURS), Way::Peers),
            (arp(PEER, OWN, OURS, THEIRS), Way::Peers),
            (arp(PASST, OWN, OURS, [10, 88, 0, 1]), Way::Passt),
            (udp(PEER, OWN, [OURS, THEIRS], 99), Way::Peers),
            // Whatever Ethernet address the guest has for it.
            (udp(PASST, OWN, [OURS, THEIRS], 99), Way::Peers),
            (udp(PASST, OWN, [OURS, [192, 0, 2, 1]], 99), Way::Passt),
            (udp(PASST, OWN, [OURS, [10, 88, 0, 1]], 99), Way::Passt),
            (udp(ALL, OWN, [OURS, [224, 0, 0, 251]], 5353), Way::Both),
            (udp(ALL, OWN, [[0; 4], [255; 4]], 68), Way::Both),
            (frame(ALL, OWN, 0x86dd, &[0x60; 60]), Way::Passt),
        ] {
            assert_eq!(peers.way(&frame), expected, "{frame:x?}");
        }
    }

    #[test]
    fn a_peer_speaks_for_itself_alone() {
        let other: Mac = [2, 0x42, 10, 88, 0, 4];
        let good = arp(OWN, PEER, THEIRS, OURS);
        let tagged = |inner: &[u8]| [&inner[..12], &[0x81, 0, 0, 0], &inner[12..]].concat();
        for (frame, expected) in [
            (good.clone(), true),
            (arp(ALL, PEER, [0; 4], THEIRS), true),
            (udp(OWN, PEER, [THEIRS, OURS], 53), true),
            (udp(ALL, PEER, [THEIRS, [224, 0, 0, 251]], 5353), true),
            (ipv4(OWN, PEER, [THEIRS, OURS], 1, [8, 0, 0, 0]), true),
            // For another one, from nobody, from the box itself.
            (udp(other, PEER, [THEIRS, OURS], 53), false),
            (udp(OWN, ALL, [THEIRS, OURS], 53), false),
            (udp(OWN, OWN, [THEIRS, OURS], 53), false),
            // As the gateway, a name server, the box itself, somebody outside.
            (arp(OWN, PEER, [10, 88, 0, 1], OURS), false),
            (arp(OWN, PEER, [10, 88, 0, 53], OURS), false),
            (arp(ALL, PEER, OURS, OURS), false),
            (arp(OWN, PEER, [192, 0, 2, 1], OURS), false),
            (udp(OWN, PEER, [[10, 88, 0, 1], OURS], 53), false),
            (udp(OWN, PEER, [[192, 0, 2, 1], OURS], 53), false),
            (udp(OWN, PEER, [OURS, OURS], 53), false),
            // As who configures others.
            (udp(OWN, PEER, [THEIRS, OURS], 67), false),
            (ipv4(OWN, PEER, [THEIRS, OURS], 1, [5, 1, 0, 0]), false),
            (frame(OWN, PEER, 0x86dd, &[0x60; 60]), false),
            // Linux would look behind the tag.
            (tagged(&good), false),
            (frame(OWN, PEER, 0x88cc, &[0; 46]), false),
            // Cut off, or no frame.
            (good[..30].to_vec(), false),
            (frame(OWN, PEER, 0x0806, &[0; 46]), false),
            (vec![2; 13], false),
            (frame(OWN, PEER, 0x0800, &vec![0; 65_535]), false),
        ] {
            assert_eq!(may_send(&frame, OWN, &subnet()), expected, "{frame:x?}");
        }
        // With another's address in it.
        let mut stolen = good;
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
