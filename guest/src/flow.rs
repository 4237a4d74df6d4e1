//! Flows: the guest's connections to the outside (TSI, contract §8), and the outside's to published
//! ports of the guest (contract §1.6). Each is one vsock stream between agent and VMM.
//!
//! ```text
//!   outgoing:   agent ── Request ──▶ host FLOW_PORT      host connects    ◀── status ── host
//!   published:  host ── Published ──▶ guest PUBLISH_PORT   agent connects
//!
//!   then, TCP:  agent ── bytes ─────▶ host     orderly end: shutdown of this direction alone;
//!                                              both directions shut at once: reset
//!               agent ◀── chunks ──── host     orderly end: an empty chunk; an end without: reset
//!         UDP:  datagrams both ways, as chunks with 16-bit lengths; the host may report an error
//!               of an outgoing one, and ends a published one when it is no more used
//! ```
//!
//! A vsock stream cannot tell its reader a reset from an end, hence the chunks towards the guest. The
//! host sees the packets themselves, so the other direction needs none. Integers are big-endian. The
//! host treats every byte as hostile.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Length of a [`Request`].
pub const REQUEST_LEN: usize = 20;
/// Length of a [`Published`].
pub const PUBLISHED_LEN: usize = 22;
/// Length of the host's answer to a [`Request`]: an errno, 0 for success.
pub const STATUS_LEN: usize = 2;
/// Length of the header of a chunk of TCP data towards the guest.
pub const CHUNK_HEADER_LEN: usize = 4;
/// Length of the header of a datagram, in either direction.
pub const DATAGRAM_HEADER_LEN: usize = 2;
/// Longest datagram: the largest IPv6 payload without its UDP header.
pub const MAX_DATAGRAM_LEN: usize = 65_527;
/// In place of a datagram's length, towards the guest: an errno of [`STATUS_LEN`] bytes follows.
pub const DATAGRAM_ERROR: u16 = u16::MAX;

/// The protocols that are carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

impl Protocol {
    /// By its number (IANA's); `None` for one that is not carried.
    pub fn decode(number: u8) -> Option<Self> {
        match number {
            6 => Some(Protocol::Tcp),
            17 => Some(Protocol::Udp),
            _ => None,
        }
    }
}

/// First bytes of an outgoing flow: where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The destination, as the application named it.
    pub destination: SocketAddr,
}

impl Request {
    /// The bytes on the wire: protocol, zero, port, address (IPv4 as IPv4-mapped).
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        bytes[0] = self.protocol as u8;
        bytes[2..].copy_from_slice(&encode_address(self.destination));
        bytes
    }

    /// From the wire; `None` for an unknown protocol.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let [protocol, _, address @ ..] = bytes;
        let protocol = Protocol::decode(*protocol)?;
        Some(Request { protocol, destination: decode_address(address) })
    }
}

/// A TCP socket of the box listens, or does not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listens {
    /// Where.
    pub address: SocketAddr,
    /// Whether it does from now on.
    pub starts: bool,
}

/// Length of a [`Listens`].
pub const LISTENS_LEN: usize = 20;

impl Listens {
    /// The bytes on the wire: whether it starts, zero, port, address (IPv4 as IPv4-mapped).
    pub fn encode(&self) -> [u8; LISTENS_LEN] {
        let mut bytes = [0; LISTENS_LEN];
        bytes[0] = self.starts.into();
        bytes[2..].copy_from_slice(&encode_address(self.address));
        bytes
    }

    /// From the wire; `None` if it says neither.
    pub fn decode(bytes: &[u8; LISTENS_LEN]) -> Option<Self> {
        let [starts @ 0..=1, _, address @ ..] = bytes else { return None };
        Some(Listens { address: decode_address(address), starts: *starts == 1 })
    }
}

/// First bytes of a flow to a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port of the guest.
    pub guest_port: u16,
    /// The client on the outside.
    pub client: SocketAddr,
}

impl Published {
    /// The bytes on the wire: protocol, zero, guest port, client port, client address (IPv4 as IPv4-mapped).
    pub fn encode(&self) -> [u8; PUBLISHED_LEN] {
        let mut bytes = [0; PUBLISHED_LEN];
        bytes[0] = self.protocol as u8;
        bytes[2..4].copy_from_slice(&self.guest_port.to_be_bytes());
        bytes[4..].copy_from_slice(&encode_address(self.client));
        bytes
    }

    /// From the wire; `None` for an unknown protocol.
    pub fn decode(bytes: &[u8; PUBLISHED_LEN]) -> Option<Self> {
        let [protocol, _, high, low, client @ ..] = bytes;
        Some(Published {
            protocol: Protocol::decode(*protocol)?,
            guest_port: u16::from_be_bytes([*high, *low]),
            client: decode_address(client),
        })
    }
}

/// As IPv6 has it: an address of IPv4 as IPv4-mapped.
pub fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// Port and address, the address [`mapped`].
fn encode_address(address: SocketAddr) -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..2].copy_from_slice(&address.port().to_be_bytes());
    bytes[2..].copy_from_slice(&mapped(address.ip()).octets());
    bytes
}

/// The reverse; an IPv4-mapped address is one of IPv4.
fn decode_address(bytes: &[u8; 18]) -> SocketAddr {
    let [high, low, ip @ ..] = bytes;
    SocketAddr::new(Ipv6Addr::from(*ip).to_canonical(), u16::from_be_bytes([*high, *low]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip() {
        for address in ["192.0.2.1:80", "[2001:db8::1]:65535", "[::1]:0"] {
            let address: SocketAddr = address.parse().expect("an address");
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let request = Request { protocol, destination: address };
                assert_eq!(Request::decode(&request.encode()), Some(request));
                let published = Published { protocol, guest_port: 8080, client: address };
                assert_eq!(Published::decode(&published.encode()), Some(published));
            }
        }
        assert_eq!(Request::decode(&[1; REQUEST_LEN]), None);
        assert_eq!(Published::decode(&[1; PUBLISHED_LEN]), None);
    }

    /// One address must not have two spellings, of which a policy knows one.
    #[test]
    fn mapped_addresses_are_those_of_ipv4() {
        let request = Request {
            protocol: Protocol::Tcp,
            destination: "[::ffff:127.0.0.1]:53".parse().expect("an address"),
        };
        let decoded = Request::decode(&request.encode()).expect("a request");
        assert_eq!(decoded.destination, "127.0.0.1:53".parse().expect("an address"));
    }
}
