//! Packets that the agent sends in the name of others: a connection request that was held back, and
//! the errors (ICMP) that tell an application what the host has met. Pure; checksums included.
//!
//! Packets are IPv4 without options or IPv6 without extension headers, and go no further than the
//! loopback interface.

use std::net::{IpAddr, SocketAddr};

const IP4_LEN: usize = 20;
const IP6_LEN: usize = 40;
const TCP_MIN_LEN: usize = 20;
const UDP_LEN: usize = 8;
const TCP_CHECKSUM: usize = 16;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// "Destination unreachable", of ICMP and ICMPv6.
const ICMP_UNREACHABLE: u8 = 3;
const ICMPV6_UNREACHABLE: u8 = 1;

/// Why something cannot be reached, as far as ICMP can say it (RFC 792, RFC 4443) and Linux turns it
/// into an errno again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// `ENETUNREACH`.
    Network,
    /// `EHOSTUNREACH`.
    Host,
    /// `ECONNREFUSED`.
    Port,
    /// `EHOSTUNREACH` over IPv4, `EACCES` over IPv6.
    Prohibited,
}

impl Unreachable {
    /// The nearest to an errno of the host's connect(2); `None` for a time-out, which the guest's
    /// own TCP comes to by itself.
    pub fn from_errno(errno: u16) -> Option<Self> {
        match i32::from(errno) {
            libc::ETIMEDOUT => None,
            libc::EHOSTUNREACH | libc::EHOSTDOWN => Some(Unreachable::Host),
            libc::ECONNREFUSED | libc::ECONNRESET => Some(Unreachable::Port),
            libc::EACCES | libc::EPERM => Some(Unreachable::Prohibited),
            _ => Some(Unreachable::Network),
        }
    }

    fn code4(self) -> u8 {
        match self {
            Unreachable::Network => 0,
            Unreachable::Host => 1,
            Unreachable::Port => 3,
            Unreachable::Prohibited => 13,
        }
    }

    fn code6(self) -> u8 {
        match self {
            Unreachable::Network => 0,
            Unreachable::Prohibited => 1,
            Unreachable::Host => 3,
            Unreachable::Port => 4,
        }
    }
}

/// A whole packet, ready for a raw socket, and where to send it.
#[derive(Debug, PartialEq, Eq)]
pub struct Packet {
    /// From the IP header on.
    pub bytes: Vec<u8>,
    /// The destination of the IP header.
    pub destination: IpAddr,
}

/// What matters of an IP header.
struct IpHeader {
    source: IpAddr,
    destination: IpAddr,
    /// Its length in bytes.
    len: usize,
}

/// The header that a packet begins with. `None` for what is not a whole one.
fn parse_ip_header(packet: &[u8]) -> Option<IpHeader> {
    match packet.first()? >> 4 {
        4 if packet.len() >= IP4_LEN => {
            let ip = |at: usize| -> Option<IpAddr> {
                Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into())
            };
            Some(IpHeader { source: ip(12)?, destination: ip(16)?, len: IP4_LEN })
        }
        6 if packet.len() >= IP6_LEN => {
            let ip = |at: usize| -> Option<IpAddr> {
                Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into())
            };
            Some(IpHeader { source: ip(8)?, destination: ip(24)?, len: IP6_LEN })
        }
        _ => None,
    }
}

/// A TCP packet as it would have left the socket: with its checksum, which the kernel leaves to the
/// interface.
pub fn complete_tcp(packet: &[u8]) -> Option<Packet> {
    let IpHeader { source, destination, len } = parse_ip_header(packet)?;
    let mut bytes = packet.to_vec();
    let segment = bytes.get_mut(len..).filter(|s| s.len() >= TCP_MIN_LEN)?;
    segment[TCP_CHECKSUM..TCP_CHECKSUM + 2].fill(0);
    let sum = !fold(sum(segment) + pseudo_header_sum(source, destination, TCP, segment.len()));
    segment[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
    Some(Packet { bytes, destination })
}

/// Who has sent a TCP packet.
pub fn tcp_source(packet: &[u8]) -> Option<SocketAddr> {
    let IpHeader { source, len, .. } = parse_ip_header(packet)?;
    let port = packet.get(len..len + 2)?.try_into().ok()?;
    Some(SocketAddr::new(source, u16::from_be_bytes(port)))
}

/// The answer to a SYN where nobody listens (RFC 9293, 3.5.2): `ECONNREFUSED`.
pub fn reset(syn: &[u8]) -> Option<Packet> {
    const RST_ACK: u8 = 0x14;
    let IpHeader { source: client, destination: server, len } = parse_ip_header(syn)?;
    let asked = syn.get(len..).filter(|segment| segment.len() >= TCP_MIN_LEN)?;
    let sequence = u32::from_be_bytes(asked[4..8].try_into().ok()?);
    let mut segment = Vec::with_capacity(TCP_MIN_LEN);
    segment.extend(&asked[2..4]);
    segment.extend(&asked[..2]);
    segment.extend([0; 4]);
    segment.extend(sequence.wrapping_add(1).to_be_bytes());
    segment.extend([(TCP_MIN_LEN as u8 / 4) << 4, RST_ACK, 0, 0, 0, 0, 0, 0]);
    let mut bytes = ip_header(server, client, TCP, segment.len())?;
    bytes.extend(segment);
    complete_tcp(&bytes)
}

/// The error that tells the sender of a packet, quoted whole, that it has not arrived. For a SYN, Linux
/// wakes those who wait for the socket a moment before it sets the errno, so [`reset`] is better where
/// it says the same.
pub fn unreachable(packet: &[u8], why: Unreachable) -> Option<Packet> {
    let IpHeader { source: sender, destination: receiver, .. } = parse_ip_header(packet)?;
    let (protocol, kind, code) = match sender {
        IpAddr::V4(_) => (ICMP, ICMP_UNREACHABLE, why.code4()),
        IpAddr::V6(_) => (ICMPV6, ICMPV6_UNREACHABLE, why.code6()),
    };
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend(packet);
    let pseudo_header = match sender {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) => pseudo_header_sum(receiver, sender, ICMPV6, message.len()),
    };
    let checksum = !fold(sum(&message) + pseudo_header);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    // As if the unreachable destination had said so: an address that the sender's side routes.
    let mut bytes = ip_header(receiver, sender, protocol, message.len())?;
    bytes.extend(message);
    Some(Packet { bytes, destination: sender })
}

/// The headers of a datagram, for an error to quote.
pub fn datagram_headers(source: SocketAddr, destination: SocketAddr) -> Option<Vec<u8>> {
    let mut bytes = ip_header(source.ip(), destination.ip(), UDP, UDP_LEN)?;
    bytes.extend(source.port().to_be_bytes());
    bytes.extend(destination.port().to_be_bytes());
    bytes.extend((UDP_LEN as u16).to_be_bytes());
    bytes.extend([0; 2]);
    Some(bytes)
}

/// An IP header for a payload of this length; `None` for addresses of two families.
fn ip_header(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> Option<Vec<u8>> {
    const HOPS: u8 = 64;
    let mut header = Vec::with_capacity(IP6_LEN + len);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let total = u16::try_from(IP4_LEN + len).ok()?;
            header.extend([0x45, 0]);
            header.extend(total.to_be_bytes());
            header.extend([0, 0, 0, 0, HOPS, protocol, 0, 0]);
            header.extend(source.octets());
            header.extend(destination.octets());
            let checksum = !fold(sum(&header));
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            header.extend([0x60, 0, 0, 0]);
            header.extend(u16::try_from(len).ok()?.to_be_bytes());
            header.extend([protocol, HOPS]);
            header.extend(source.octets());
            header.extend(destination.octets());
        }
        _ => return None,
    }
    Some(header)
}

/// The part of a checksum that comes from the addresses (RFC 9293, 3.1; RFC 8200, 8.1).
fn pseudo_header_sum(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> u32 {
    let address = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => sum(&ip.octets()),
        IpAddr::V6(ip) => sum(&ip.octets()),
    };
    address(source) + address(destination) + u32::from(protocol) + len as u32
}

/// Sum of 16-bit words (RFC 1071), for no more bytes than a packet has.
fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A SYN that Linux sent over its loopback interface, with the checksum that it has on a wire.
    const SYN4: [u8; 40] = [
        0x45, 0, 0, 40, 0x1c, 0x46, 0x40, 0, 0x40, 6, 0, 0, 127, 0, 0, 1, 127, 128, 0, 1, 0x9c,
        0x40, 0, 1, 0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xd7, 0xfe, 0x28, 0, 0,
    ];

    /// What a receiver does: everything summed, checksum included, is all ones.
    fn is_valid(packet: &[u8], protocol: u8) -> bool {
        let header = parse_ip_header(packet).expect("a packet");
        let IpHeader { source, destination, len } = header;
        let payload = &packet[len..];
        let pseudo = match (source, protocol) {
            (IpAddr::V4(_), ICMP) => 0,
            _ => pseudo_header_sum(source, destination, protocol, payload.len()),
        };
        fold(sum(payload) + pseudo) == 0xffff
    }

    #[test]
    fn a_held_back_syn_gets_its_checksum() {
        let packet = complete_tcp(&SYN4).expect("a packet");
        assert_eq!(packet.destination, "127.128.0.1".parse::<IpAddr>().expect("an address"));
        assert!(is_valid(&packet.bytes, TCP));
        assert_eq!(packet.bytes[..36], SYN4[..36], "nothing else changes");
    }

    #[test]
    fn a_refused_syn_is_reset() {
        let packet = reset(&SYN4).expect("a reset");
        assert_eq!(packet.destination, "127.0.0.1".parse::<IpAddr>().expect("an address"));
        assert!(is_valid(&packet.bytes, TCP));
        let segment = &packet.bytes[IP4_LEN..];
        assert_eq!(segment[..4], [0, 1, 0x9c, 0x40], "from the flow to the application");
        assert_eq!(segment[8..14], [0x12, 0x34, 0x56, 0x79, 0x50, 0x14]);
    }

    #[test]
    fn errors_quote_the_packet_and_name_the_reason() {
        let packet = unreachable(&SYN4, Unreachable::Host).expect("an error");
        assert_eq!(packet.destination, "127.0.0.1".parse::<IpAddr>().expect("an address"));
        assert_eq!(packet.bytes[IP4_LEN..IP4_LEN + 2], [3, 1]);
        assert!(is_valid(&packet.bytes, ICMP) && fold(sum(&packet.bytes[..IP4_LEN])) == 0xffff);
        assert_eq!(packet.bytes[IP4_LEN + 8..], SYN4);

        let source: SocketAddr = "[::1]:4000".parse().expect("an address");
        let flow: SocketAddr = "[fd54:5349::7]:1".parse().expect("an address");
        let quoted = datagram_headers(source, flow).expect("headers");
        let packet = unreachable(&quoted, Unreachable::Port).expect("an error");
        assert_eq!(packet.destination, source.ip());
        assert_eq!(packet.bytes[IP6_LEN..IP6_LEN + 2], [1, 4]);
        assert!(is_valid(&packet.bytes, ICMPV6));
    }

    #[test]
    fn what_is_no_packet_is_left_alone() {
        for bytes in [&[][..], &SYN4[..19], &[0x60; 39], &[0x15; 60]] {
            assert_eq!(complete_tcp(bytes), None);
            assert_eq!(unreachable(bytes, Unreachable::Port), None);
        }
        assert_eq!(complete_tcp(&SYN4[..30]), None);
        let v4: SocketAddr = "127.0.0.1:1".parse().expect("an address");
        let v6: SocketAddr = "[::1]:1".parse().expect("an address");
        assert_eq!(datagram_headers(v4, v6), None);
    }

    #[test]
    fn errnos_become_what_linux_turns_back() {
        let from = |errno: i32| Unreachable::from_errno(errno as u16);
        assert_eq!(from(libc::ECONNREFUSED), Some(Unreachable::Port));
        assert_eq!(from(libc::ENETUNREACH), Some(Unreachable::Network));
        assert_eq!(from(libc::EHOSTUNREACH), Some(Unreachable::Host));
        assert_eq!(from(libc::EACCES), Some(Unreachable::Prohibited));
        assert_eq!(from(libc::ETIMEDOUT), None);
        assert_eq!(from(libc::EMFILE), Some(Unreachable::Network));
    }
}
