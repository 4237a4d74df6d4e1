//! Which of the guest's frames may go out, to passt or to other boxes: the box's egress policy ([`crate::policy`]), for frames.
//!
//! - TCP: passt makes a connection for a SYN and for nothing else, so only a SYN is judged.
//! - UDP and ICMP, and TCP to other boxes, which may take anything for data: every packet is judged, unless its
//!   destination was allowed, or has itself sent to this port of the guest, a short time ago.
//! - What keeps the link going (ARP, neighbour discovery, DHCP) passes.
//! - Nothing else does: no other protocol, no fragment, no extension header of IPv6. What comes after one of
//!   these passt may find in another place than this filter would, and it uses none of them.
//!
//! Who asks for a destination that is refused is told by ICMP that the host is unreachable, at once.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use mote_agent::flow::Protocol;

use super::remembered::Remembered;
pub use super::remembered::Side;
use crate::policy::destination::Destination;
use crate::policy::filter::Filter;

/// Of an Ethernet header.
const ETHERNET_LEN: usize = 14;
/// Kinds of frames (IEEE 802 numbers).
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Protocols above IP (IANA's numbers), where they have a part to play.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Lengths of headers without options.
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const ICMP_LEN: usize = 8;
/// Ports of DHCP servers.
const DHCP_PORT: u16 = 67;
const DHCPV6_PORT: u16 = 547;

/// How long a destination of UDP that was allowed is not judged again; and one that has sent something
/// itself (RFC 4787, REQ-5: at least two minutes).
const ALLOWED: Duration = Duration::from_secs(10);
const HEARD: Duration = Duration::from_secs(180);
/// Most answers that wait for the guest to take them.
const ANSWERS: usize = 64;
/// How much of a refused packet its answer quotes: any IP header, and what identifies a socket.
const QUOTED: usize = 128;

/// Judges the frames of a guest.
#[derive(Debug)]
pub struct FrameFilter {
    filter: Filter,
    remembered: Remembered,
    answers: VecDeque<Vec<u8>>,
    /// For tests and fuzzers, whose frames are of any kind.
    #[cfg(any(test, fuzzing))]
    pub passes_all: bool,
}

/// What a packet says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    source: IpAddr,
    pub(super) source_port: u16,
    destination: Destination,
    /// The protocol's number.
    number: u8,
    /// The first byte of its header: ICMP's type.
    first: u8,
    /// Whether it asks for a TCP connection.
    connects: bool,
}

/// What a frame is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Arp,
    Packet(Packet),
    /// Nothing that anybody needs.
    Other,
}

impl FrameFilter {
    /// A filter for a guest that has sent nothing yet.
    pub fn new(filter: Filter) -> Self {
        FrameFilter {
            filter,
            remembered: Remembered::new(),
            answers: VecDeque::new(),
            #[cfg(any(test, fuzzing))]
            passes_all: false,
        }
    }

    /// Whether a frame of the guest's may go on, to other boxes or else to passt. If not, there may be an
    /// [answer](Self::answer).
    pub fn admits(&mut self, frame: &[u8], to: Side) -> bool {
        #[cfg(any(test, fuzzing))]
        if self.passes_all {
            return true;
        }
        let packet = match parse(frame) {
            Frame::Arp => return true,
            Frame::Other => return false,
            Frame::Packet(packet) => packet,
        };
        if packet.keeps_link() {
            return true;
        }
        let destination = packet.destination;
        let admitted = if destination.protocol == Some(Protocol::Tcp) && to == Side::Passt {
            !packet.connects || self.filter.admit(destination).is_ok()
        } else {
            let now = Instant::now();
            self.remembered.has(to, destination, packet.source_port, now)
                || self.filter.admit(destination).is_ok_and(|()| {
                    self.remembered.add(to, destination, packet.source_port, now + ALLOWED);
                    true
                })
        };
        if !admitted && packet.wants_answer() && self.answers.len() < ANSWERS {
            self.answers.push_back(unreachable(frame, packet.number));
        }
        admitted
    }

    /// Takes note of a frame to the guest, from another box or else from passt: its sender may be answered.
    pub fn note(&mut self, frame: &[u8], from: Side) {
        if let Frame::Packet(Packet { source, source_port, destination, number, .. }) = parse(frame)
            && (number == UDP || number == TCP && from == Side::Peers)
        {
            let sender = Destination { ip: source, port: source_port, ..destination };
            self.remembered.add(from, sender, destination.port, Instant::now() + HEARD);
        }
    }

    /// The first frame for the guest that says that a frame of its own was refused.
    pub fn answer(&self) -> Option<&[u8]> {
        self.answers.front().map(Vec::as_slice)
    }

    /// Takes this frame.
    pub fn take_answer(&mut self) {
        self.answers.pop_front();
    }
}

impl Packet {
    pub(super) fn source(&self) -> IpAddr {
        self.source
    }

    pub(super) fn destination(&self) -> IpAddr {
        self.destination.ip
    }

    /// Whether it has the guest send what is for others to a router of the sender's choice.
    pub(super) fn is_redirect(&self) -> bool {
        const REDIRECT: u8 = 5;
        self.number == ICMP && self.first == REDIRECT
    }

    pub(super) fn is_udp(&self) -> bool {
        self.number == UDP
    }

    /// Whether it is part of the link's own workings, and goes nowhere beyond it.
    fn keeps_link(&self) -> bool {
        let Destination { ip, port, .. } = self.destination;
        match (self.number, ip) {
            // Neighbour discovery (RFC 4861), by its types; all else as far as the link reaches.
            (ICMPV6, IpAddr::V6(ip)) => {
                matches!(self.first, 133..=137) || ip.is_multicast() || ip.is_unicast_link_local()
            }
            (UDP, IpAddr::V4(ip)) => ip == Ipv4Addr::BROADCAST && port == DHCP_PORT,
            (UDP, IpAddr::V6(ip)) => ip.is_multicast() && port == DHCPV6_PORT,
            _ => false,
        }
    }

    /// Whether its refusal is told: errors are not answered with errors (RFC 1122, 3.2.2), nor what went to
    /// many.
    fn wants_answer(&self) -> bool {
        const ECHO: u8 = 8;
        const ECHO_V6: u8 = 128;
        let to_one = match self.destination.ip {
            IpAddr::V4(ip) => !ip.is_multicast() && !ip.is_broadcast(),
            IpAddr::V6(ip) => !ip.is_multicast(),
        };
        let asks = match self.number {
            ICMP => self.first == ECHO,
            ICMPV6 => self.first == ECHO_V6,
            _ => true,
        };
        to_one && asks && !self.source.is_unspecified() && !self.source.is_multicast()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn parse(frame: &[u8]) -> Frame {
    let packet = match word(frame, ETHERNET_LEN - 2) {
        Some(ETHERTYPE_ARP) => return Frame::Arp,
        Some(ETHERTYPE_IPV4) => parse_ipv4(&frame[ETHERNET_LEN..]),
        Some(ETHERTYPE_IPV6) => parse_ipv6(&frame[ETHERNET_LEN..]),
        _ => None,
    };
    packet.map_or(Frame::Other, Frame::Packet)
}

/// An IPv4 packet (RFC 791, 3.1); `None` if it is none, or a fragment.
fn parse_ipv4(packet: &[u8]) -> Option<Packet> {
    const MORE_FRAGMENTS_OR_OFFSET: u16 = 0x3fff;
    let header: &[u8; IPV4_LEN] = packet.first_chunk()?;
    let header_len = usize::from(header[0] & 0xf) * 4;
    if header[0] >> 4 != 4
        || header_len < IPV4_LEN
        || word(header, 6)? & MORE_FRAGMENTS_OR_OFFSET != 0
    {
        return None;
    }
    let ip = |at: usize| Some(IpAddr::V4(Ipv4Addr::from(*header[at..].first_chunk::<4>()?)));
    parse_payload(ip(12)?, ip(16)?, header[9], packet.get(header_len..)?)
}

/// An IPv6 packet (RFC 8200); `None` if it is none, or has extension headers.
fn parse_ipv6(packet: &[u8]) -> Option<Packet> {
    let header: &[u8; IPV6_LEN] = packet.first_chunk()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let ip = |at: usize| Some(IpAddr::V6(Ipv6Addr::from(*header[at..].first_chunk::<16>()?)));
    parse_payload(ip(8)?, ip(24)?, header[6], &packet[IPV6_LEN..])
}

fn parse_payload(source: IpAddr, destination: IpAddr, number: u8, rest: &[u8]) -> Option<Packet> {
    const FLAGS: usize = 13;
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    let protocol = match number {
        TCP => Some(Protocol::Tcp),
        UDP => Some(Protocol::Udp),
        ICMP | ICMPV6 => None,
        _ => return None,
    };
    let has_ports = protocol.is_some();
    let port = |at| if has_ports { word(rest, at) } else { Some(0) };
    let connects = match protocol {
        Some(Protocol::Tcp) => rest.get(FLAGS)? & (SYN | ACK) == SYN,
        _ => false,
    };
    let ip = destination.to_canonical();
    Some(Packet {
        source: source.to_canonical(),
        source_port: port(0)?,
        destination: Destination { protocol, ip, port: port(2)? },
        number,
        first: rest.first().copied().unwrap_or(0),
        connects,
    })
}

/// The frame that says of this one, which has an IP packet of this protocol, that its host cannot be reached.
fn unreachable(frame: &[u8], number: u8) -> Vec<u8> {
    let (ethernet, packet) = frame.split_at(ETHERNET_LEN);
    let quoted = &packet[..packet.len().min(QUOTED)];
    let mut answer = [&ethernet[6..12], &ethernet[..6], &ethernet[12..]].concat();
    let mut icmp = vec![0; ICMP_LEN];
    icmp.extend(quoted);
    if packet[0] >> 4 == 4 {
        // Destination unreachable, administratively prohibited (RFC 1812, 5.2.7.1): EHOSTUNREACH, also for a
        // datagram's socket, which is not told of other codes.
        icmp[..2].copy_from_slice(&[3, 13]);
        let sum = checksum(&icmp);
        icmp[2..4].copy_from_slice(&sum);
        let mut header = [0; IPV4_LEN];
        header[0] = 0x45;
        header[2..4].copy_from_slice(&((IPV4_LEN + icmp.len()) as u16).to_be_bytes());
        header[8..10].copy_from_slice(&[64, ICMP]);
        header[12..16].copy_from_slice(&packet[16..20]);
        header[16..20].copy_from_slice(&packet[12..16]);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum);
        answer.extend(header);
    } else {
        // Destination unreachable (RFC 4443, 3.1): the address, EHOSTUNREACH; but for datagrams' sockets, which
        // are not told of that, administratively prohibited, EACCES.
        icmp[..2].copy_from_slice(&[1, if number == TCP { 3 } else { 1 }]);
        let mut header = [0; IPV6_LEN];
        header[0] = 0x60;
        header[4..6].copy_from_slice(&(icmp.len() as u16).to_be_bytes());
        header[6..8].copy_from_slice(&[ICMPV6, 64]);
        header[8..24].copy_from_slice(&packet[24..40]);
        header[24..40].copy_from_slice(&packet[8..24]);
        // Its checksum covers addresses, length and protocol too (RFC 8200, 8.1).
        let pseudo = [&header[8..], &[0, 0], &header[4..6], &[0, 0, 0, ICMPV6], &icmp[..]].concat();
        let sum = checksum(&pseudo);
        icmp[2..4].copy_from_slice(&sum);
        answer.extend(header);
    }
    answer.extend(icmp);
    answer
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::rules::{Action, Rules};
    use crate::virtio::net::bench::frame_filter;

    const GUEST: &str = "10.88.0.2";
    const SYN: u8 = 2;

    /// A filter that lets the guest reach 192.0.2.0/24, 2001:db8::/32, and nobody else. No address of these is
    /// asked for on this host.
    fn filter() -> FrameFilter {
        let rules = ["allow:192.0.2.0/24", "allow:2001:db8::/32"];
        let rules = rules.iter().map(|text| text.parse().expect("a rule")).collect();
        let rules = Rules { rules, default: Action::Deny };
        frame_filter(rules)
    }

    fn header(ethertype: u16) -> Vec<u8> {
        [&[2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4][..], &ethertype.to_be_bytes()].concat()
    }

    fn ipv4(source: &str, destination: &str, number: u8, payload: &[u8]) -> Vec<u8> {
        let ip = |text: &str| text.parse::<Ipv4Addr>().expect("an address").octets();
        let mut packet = [0; IPV4_LEN];
        packet[0] = 0x45;
        packet[9] = number;
        packet[12..16].copy_from_slice(&ip(source));
        packet[16..20].copy_from_slice(&ip(destination));
        [&header(ETHERTYPE_IPV4), &packet[..], payload].concat()
    }

    fn ipv6(destination: &str, number: u8, payload: &[u8]) -> Vec<u8> {
        let ip: Ipv6Addr = destination.parse().expect("an address");
        let mut packet = [0; IPV6_LEN];
        packet[0] = 0x60;
        packet[6] = number;
        packet[8] = 0x20;
        packet[24..40].copy_from_slice(&ip.octets());
        [&header(ETHERTYPE_IPV6), &packet[..], payload].concat()
    }

    fn tcp(port: u16, flags: u8) -> Vec<u8> {
        let mut header = vec![0; 20];
        header[..2].copy_from_slice(&4444_u16.to_be_bytes());
        header[2..4].copy_from_slice(&port.to_be_bytes());
        header[13] = flags;
        header
    }

    fn udp(from: u16, to: u16) -> Vec<u8> {
        [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 8, 0, 0]].concat()
    }

    #[test]
    fn a_connection_to_where_the_guest_may_not_go_is_refused_and_answered() {
        let mut filter = filter();
        let refused = ipv4(GUEST, "198.51.100.1", TCP, &tcp(80, SYN));
        assert!(!filter.admits(&refused, Side::Passt));
        let answer = filter.answer().expect("an answer").to_vec();
        assert_eq!(answer[..12], [4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2]);
        assert_eq!(answer[14 + 9], ICMP);
        assert_eq!(answer[14 + 12..14 + 20], [198, 51, 100, 1, 10, 88, 0, 2]);
        assert_eq!(answer[34..36], [3, 13]);
        assert_eq!(answer[42..], refused[14..]);
        for part in [&answer[14..34], &answer[34..]] {
            assert_eq!(checksum(part), [0, 0]);
        }
        filter.take_answer();
        assert_eq!(filter.answer(), None);
        // The rest of a connection that somebody outside has begun.
        for flags in [SYN | 0x10, 0x10, 0x04] {
            assert!(filter.admits(&ipv4(GUEST, "198.51.100.1", TCP, &tcp(80, flags)), Side::Passt));
        }
        // A SYN with flags of other uses is one.
        assert!(
            !filter.admits(&ipv4(GUEST, "198.51.100.1", TCP, &tcp(80, SYN | 0xc0)), Side::Passt)
        );
    }

    #[test]
    fn over_ipv6_nothing_comes_between() {
        let mut filter = filter();
        let syn = tcp(80, SYN);
        let refused = ipv6("2001:db9::1", TCP, &syn);
        assert!(!filter.admits(&refused, Side::Passt));
        let answer = filter.answer().expect("an answer").to_vec();
        assert_eq!(answer[54..56], [1, 3]);
        let sum = [&answer[22..54], &[0, 0], &answer[18..20], &[0, 0, 0, ICMPV6], &answer[54..]];
        assert_eq!(checksum(&sum.concat()), [0, 0]);
        assert!(filter.admits(&ipv6("2001:db8::1", TCP, &syn), Side::Passt));
        // passt takes the first two bytes of an extension header for ports, if TCP is next, and a header of ESP
        // or AH for an extension header.
        for number in [0, 43, 44, 50, 51, 60, 135, 139, 140, 253, 254] {
            let hidden = [&[TCP, 0, 0, 80, 0, 0, 0, 0][..], &syn].concat();
            assert!(!filter.admits(&ipv6("2001:db8::1", number, &hidden), Side::Passt), "{number}");
        }
        assert!(!filter.admits(&ipv6("::ffff:198.51.100.1", TCP, &syn), Side::Passt));
    }

    #[test]
    fn datagrams_go_to_who_may_be_sent_to_or_has_asked() {
        let mut filter = filter();
        let reply = ipv4(GUEST, "198.51.100.1", UDP, &udp(5000, 6000));
        assert!(!filter.admits(&reply, Side::Passt));
        filter.note(&ipv4("198.51.100.1", GUEST, UDP, &udp(6000, 5000)), Side::Passt);
        assert!(filter.admits(&reply, Side::Passt));
        for (from, to) in [(5001, 6000), (5000, 6001)] {
            assert!(!filter.admits(&ipv4(GUEST, "198.51.100.1", UDP, &udp(from, to)), Side::Passt));
        }
        assert!(!filter.admits(&ipv4(GUEST, "198.51.100.2", UDP, &udp(5000, 6000)), Side::Passt));
        assert!(!filter.admits(&ipv4(GUEST, "198.51.100.1", ICMP, &[8, 0]), Side::Passt));
    }

    #[test]
    fn another_box_gets_no_segment_of_a_connection_that_may_not_be() {
        let mut filter = filter();
        let segment = |from, to, ports: [u16; 2]| {
            let mut tcp = tcp(ports[1], 0x10);
            tcp[..2].copy_from_slice(&ports[0].to_be_bytes());
            ipv4(from, to, TCP, &tcp)
        };
        let answer = segment(GUEST, "198.51.100.1", [80, 5000]);
        assert!(!filter.admits(&answer, Side::Peers));
        // Nor because something came from outside that says so, nor the other way round.
        let asked = segment("198.51.100.1", GUEST, [5000, 80]);
        filter.note(&asked, Side::Passt);
        assert!(!filter.admits(&answer, Side::Peers));
        filter.note(&asked, Side::Peers);
        assert!(filter.admits(&answer, Side::Peers));
        assert!(!filter.admits(&segment(GUEST, "198.51.100.1", [81, 5000]), Side::Peers));
        filter.note(&ipv4("198.51.100.1", GUEST, UDP, &udp(6000, 5000)), Side::Peers);
        assert!(!filter.admits(&ipv4(GUEST, "198.51.100.1", UDP, &udp(5000, 6000)), Side::Passt));
    }

    #[test]
    fn the_link_works_and_nothing_hides() {
        let mut filter = filter();
        assert!(filter.admits(&header(ETHERTYPE_ARP), Side::Passt));
        assert!(filter.admits(&ipv4("0.0.0.0", "255.255.255.255", UDP, &udp(68, 67)), Side::Passt));
        assert!(filter.admits(&ipv6("ff02::1:2", UDP, &udp(546, 547)), Side::Passt));
        assert!(filter.admits(&ipv6("ff02::1:ff00:1", ICMPV6, &[135]), Side::Passt));
        assert!(filter.admits(&ipv6("2001:db9::1", ICMPV6, &[135]), Side::Passt));
        assert!(!filter.admits(&ipv6("2001:db9::1", ICMPV6, &[128]), Side::Passt));
        let mut fragment = ipv4(GUEST, "192.0.2.1", UDP, &udp(1, 2));
        assert!(filter.admits(&fragment, Side::Passt));
        for field in [[0x20, 0], [0, 1]] {
            fragment[20..22].copy_from_slice(&field);
            assert!(!filter.admits(&fragment, Side::Passt));
        }
        for ethertype in [0x8100, 0x88a8, 0x8864, 0] {
            let hidden = [header(ethertype), ipv4(GUEST, "198.51.100.1", TCP, &tcp(80, SYN))];
            assert!(!filter.admits(&hidden.concat(), Side::Passt), "{ethertype:#x}");
        }
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let mut filter = filter();
        for whole in [
            ipv4(GUEST, "192.0.2.1", TCP, &tcp(80, SYN)[..14]),
            ipv4(GUEST, "192.0.2.1", UDP, &udp(1, 2)[..4]),
            ipv6("2001:db8::1", TCP, &tcp(80, SYN)[..14]),
        ] {
            assert!(filter.admits(&whole, Side::Passt));
            for len in 0..whole.len() {
                assert!(!filter.admits(&whole[..len], Side::Passt), "{len} of {whole:?}");
            }
        }
        assert_eq!(filter.answer(), None);
    }

    #[test]
    fn answers_are_bounded() {
        let mut filter = filter();
        for _ in 0..2 * ANSWERS {
            assert!(!filter.admits(&ipv4(GUEST, "198.51.100.1", TCP, &tcp(80, SYN)), Side::Passt));
        }
        assert_eq!(filter.answers.len(), ANSWERS);
    }
}
