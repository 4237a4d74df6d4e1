//! The BPF programs (`guest/bpf/tsi.bpf.c`, which explains them): loading, attaching, and the maps
//! and events that the agent shares with them.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use mote_agent::flow::{Listens, Protocol, Published, mapped};

use super::destinations::{FLOW_NET4, FLOW_NET6};
use crate::sys::bpf::{Map, Write};
use crate::sys::ring_buffer::RingBuffer;

/// Port of the agent, below what programs usually listen on (`AGENT_PORT`).
pub const AGENT_PORT: u16 = 1;
/// Source port of its connections for clients of published ports (`CLIENT_PORT`).
pub const CLIENT_PORT: u16 = 2;
/// Network of those among them that name clients of published ports.
pub const CLIENT_NET6: Ipv6Addr =
    Ipv6Addr::new(0xfd54, 0x5349, 0, 0, 0, 0, (KIND_PUBLISHED >> 16) as u16, 0);
/// Its prefix length.
pub const CLIENT_NET6_LEN: u8 = 128 - ID_BITS as u8;
/// Bits of an id; those above its number say whose it is (`ID_BITS`).
const ID_BITS: u32 = 20;
const ID_MASK: u32 = (4 << ID_BITS) - 1;
const KIND_DATAGRAM: u32 = 1 << ID_BITS;
const KIND_PUBLISHED: u32 = 2 << ID_BITS;

/// `struct flow`, as bytes.
type RawFlow = [u8; RAW_FLOW_LEN];
/// Its length.
pub const RAW_FLOW_LEN: usize = 32;
const FLOW_IP: usize = 8;
const FLOW_PORT: usize = 24;
const FLOW_PROTOCOL: usize = 26;
const FLOW_STATE: usize = 27;
const FLOW_ERROR: usize = 28;
const FLOW_SERVER_PORT: usize = 30;
/// `NEW`, `OPEN`.
const STATE_NEW: u8 = 0;
const STATE_OPEN: u8 = 2;

/// `struct client_key`, as bytes: address, port, the server's port.
type RawClientKey = [u8; CLIENT_KEY_LEN];
/// Its length.
pub const CLIENT_KEY_LEN: usize = 20;

/// `struct syn_event`, as bytes.
const SYN_LEN: usize = 176;
const SYN_FLOW: usize = 8;
const SYN_PACKET_LEN: usize = 40;
const SYN_PACKET: usize = 44;
const PACKET_MAX: usize = 128;
/// `struct end_event`, as bytes.
const END_LEN: usize = 16;
/// `struct refused_event`, as bytes.
const REFUSED_LEN: usize = 40;
const REFUSED_FLOW: usize = 8;
/// `SYN`, `RELEASED`, `REPLACED`, `REFUSED`.
const EVENT_SYN: u32 = 0;
const EVENT_RELEASED: u32 = 1;
const EVENT_REPLACED: u32 = 2;
const EVENT_REFUSED: u32 = 3;
/// `LISTENS`, `LISTENED`.
const EVENT_LISTENS: u32 = 4;
const EVENT_LISTENED: u32 = 5;
/// `struct listen_event`, as bytes.
const LISTEN_LEN: usize = 24;
const LISTEN_IP: usize = 8;

/// Names a flow, in the address that stands for its destination. 22 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id(u32);

impl Id {
    /// The id that an address names (IPv4 as IPv4-mapped).
    pub fn of(ip: Ipv6Addr) -> Option<Self> {
        let low = u128::from(ip) as u32;
        match ip.to_ipv4_mapped() {
            Some(ip) if u32::from(ip) & !ID_MASK == u32::from(FLOW_NET4) => Some(Id(low & ID_MASK)),
            None if u128::from(ip) & !u128::from(ID_MASK) == u128::from(FLOW_NET6) => {
                Some(Id(low & ID_MASK))
            }
            _ => None,
        }
    }

    /// The id of the `number`-th connection to a published port; numbers come round.
    pub fn published(number: u32) -> Self {
        Id(KIND_PUBLISHED | number & ((1 << ID_BITS) - 1))
    }

    /// Its address among those of IPv4.
    pub fn ip4(self) -> std::net::Ipv4Addr {
        (u32::from(FLOW_NET4) | self.0).into()
    }

    /// Its address among those of IPv6.
    pub fn ip6(self) -> Ipv6Addr {
        (u128::from(FLOW_NET6) | u128::from(self.0)).into()
    }

    /// Its address in one of the families, with the agent's port for clients.
    fn address(self, is_ip4: bool) -> SocketAddr {
        let ip = if is_ip4 { IpAddr::V4(self.ip4()) } else { self.ip6().into() };
        SocketAddr::new(ip, CLIENT_PORT)
    }

    /// As a map's key or value.
    fn key(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }

    fn is_datagram(self) -> bool {
        self.0 & KIND_DATAGRAM != 0
    }
}

/// What an application asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Original {
    /// Names its socket.
    pub cookie: u64,
    /// Where it wanted to go.
    pub destination: SocketAddr,
    /// How.
    pub protocol: Protocol,
}

impl Original {
    fn from_raw(raw: &RawFlow) -> Option<Self> {
        let cookie = u64::from_ne_bytes(raw[..8].try_into().ok()?);
        let ip: [u8; 16] = raw[FLOW_IP..FLOW_IP + 16].try_into().ok()?;
        let port = u16::from_be_bytes([raw[FLOW_PORT], raw[FLOW_PORT + 1]]);
        let protocol = Protocol::decode(raw[FLOW_PROTOCOL])?;
        let destination = SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), port);
        Some(Original { cookie, destination, protocol })
    }

    fn to_raw(self) -> RawFlow {
        let mut raw = [0; 32];
        raw[..8].copy_from_slice(&self.cookie.to_ne_bytes());
        raw[FLOW_IP..FLOW_IP + 16].copy_from_slice(&mapped(self.destination.ip()).octets());
        raw[FLOW_PORT..FLOW_PORT + 2].copy_from_slice(&self.destination.port().to_be_bytes());
        raw[FLOW_PROTOCOL] = self.protocol as u8;
        raw
    }
}

/// What the programs report.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A socket connects: the packet is held back.
    Syn {
        /// Its flow's id.
        id: Id,
        /// Where it wants to go.
        original: Original,
        /// Its SYN, from the IP header on.
        packet: Vec<u8>,
    },
    /// A socket with flows was closed.
    Released {
        /// Its flow's id, unless it had only sent datagrams.
        id: Option<Id>,
        /// Names the socket.
        cookie: u64,
    },
    /// A socket has got a new flow in the place of this one.
    Replaced(Id),
    /// A datagram was refused, by what the host has said beforehand.
    Refused(Original),
    /// A TCP socket of the box listens, or does not any more.
    Listens(Listens),
}

impl Event {
    fn from_raw(raw: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(raw.get(at..at + 4)?.try_into().ok()?));
        let (kind, id) = (word(0)?, word(4)?);
        match (kind, raw.len()) {
            (EVENT_SYN, SYN_LEN) => {
                let flow: &RawFlow = raw[SYN_FLOW..SYN_FLOW + RAW_FLOW_LEN].try_into().ok()?;
                let len = (word(SYN_PACKET_LEN)? as usize).min(PACKET_MAX);
                let packet = raw[SYN_PACKET..SYN_PACKET + len].to_vec();
                Some(Event::Syn { id: Id(id), original: Original::from_raw(flow)?, packet })
            }
            (EVENT_RELEASED, END_LEN) => {
                let cookie = u64::from_ne_bytes(raw[8..].try_into().ok()?);
                Some(Event::Released { id: (id != 0).then_some(Id(id)), cookie })
            }
            (EVENT_REPLACED, END_LEN) => Some(Event::Replaced(Id(id))),
            (EVENT_REFUSED, REFUSED_LEN) => {
                let flow: &RawFlow = raw[REFUSED_FLOW..].try_into().ok()?;
                Some(Event::Refused(Original::from_raw(flow)?))
            }
            (EVENT_LISTENS | EVENT_LISTENED, LISTEN_LEN) => {
                let ip: [u8; 16] = raw[LISTEN_IP..].try_into().ok()?;
                // The second word is the port.
                let address = SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), id as u16);
                Some(Event::Listens(Listens { address, starts: kind == EVENT_LISTENS }))
            }
            _ => None,
        }
    }
}

/// The programs, attached while this lives, and the flows that they know.
pub struct Programs {
    pub(super) _links: Vec<OwnedFd>,
    pub(super) connected: Map<4, RAW_FLOW_LEN>,
    /// Of sockets that are not connected, if they are carried or answered.
    pub(super) datagrams: Option<Map<4, RAW_FLOW_LEN>>,
    /// Who is answered by datagrams, if anybody is.
    pub(super) clients: Option<Map<CLIENT_KEY_LEN, 4>>,
    /// The box's addresses.
    pub(super) own: Vec<IpAddr>,
    pub(super) events: RingBuffer,
}

impl Programs {
    /// Where a flow wanted to go; `None` for one that is forgotten, as TCP's are with their sockets.
    pub fn original(&self, id: Id) -> Option<Original> {
        let raw = if id.is_datagram() {
            self.datagrams.as_ref()?.get(&id.key())
        } else {
            self.connected.get(&id.key())
        };
        Original::from_raw(&raw?)
    }

    /// Lets a flow's SYNs pass from now on.
    pub fn open(&mut self, id: Id) {
        self.set_state(id, STATE_OPEN);
    }

    /// Has a flow's next SYN reported again.
    pub fn rearm(&mut self, id: Id) {
        self.set_state(id, STATE_NEW);
    }

    /// Has the next datagram of a socket that is not connected fail with this errno, once. A connected one is
    /// told by ICMP.
    pub fn refuse(&mut self, id: Id, errno: u16) {
        let Some(datagrams) = &self.datagrams else { return };
        if let Some(mut raw) = datagrams.get(&id.key()) {
            raw[FLOW_ERROR..FLOW_SERVER_PORT].copy_from_slice(&errno.to_ne_bytes());
            // Without it the datagram vanishes.
            let _ = datagrams.set(&id.key(), &raw, Write::Existing);
        }
    }

    fn set_state(&mut self, id: Id, state: u8) {
        if let Some(mut raw) = self.connected.get(&id.key()) {
            raw[FLOW_STATE] = state;
            // A failure is the same as a lost packet: it is asked for again.
            let _ = self.connected.set(&id.key(), &raw, Write::Existing);
        }
    }

    /// Names the client of a published port, for the server to see and, over UDP, to answer. `false` if another has
    /// this id.
    pub fn name_client(&mut self, id: Id, published: Published) -> bool {
        let Published { protocol, guest_port, client } = published;
        let is_nameable = protocol == Protocol::Tcp || self.is_elsewhere(client.ip());
        let destination = if is_nameable { client } else { id.address(client.is_ipv4()) };
        let mut raw = Original { cookie: 0, destination, protocol }.to_raw();
        if protocol == Protocol::Udp {
            raw[FLOW_SERVER_PORT..].copy_from_slice(&guest_port.to_be_bytes());
        }
        match self.connected.set(&id.key(), &raw, Write::New) {
            Ok(()) => self.answer_client(id, published),
            Err(_) if self.connected.get(&id.key()).is_some() => return false,
            // Without it the server sees an address of the agent's.
            Err(_) => {}
        }
        true
    }

    /// Has a server's answers go to this of several flows that the client has, by several addresses of the host.
    pub fn answer_client(&mut self, id: Id, Published { protocol, guest_port, client }: Published) {
        let is_answered = protocol == Protocol::Udp && self.is_elsewhere(client.ip());
        let key = client_key(client, guest_port);
        if let Some(clients) = self.clients.as_ref().filter(|_| is_answered)
            && clients.get(&key) != Some(id.key())
        {
            // Without it the server's answers go to the client as from somebody else.
            let _ = clients.set(&key, &id.key(), Write::Any);
        }
    }

    /// Whether an address is not the box's own, too: a server's answers to that are for programs of the box.
    fn is_elsewhere(&self, ip: IpAddr) -> bool {
        !ip.is_loopback() && !self.own.contains(&ip)
    }

    /// Forgets a client of a published port.
    pub fn forget_client(&mut self, id: Id, Published { guest_port, client, .. }: Published) {
        self.forget(id);
        if let Some(clients) = &self.clients {
            let key = client_key(client, guest_port);
            // It may have come back as another flow.
            if clients.get(&key) == Some(id.key()) {
                let _ = clients.remove(&key);
            }
        }
    }

    /// Forgets a flow: that of a client, or one of datagrams whose socket is gone.
    pub fn forget(&mut self, id: Id) {
        let _ = self.connected.remove(&id.key());
    }

    /// The next event.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.next(Event::from_raw)
    }

    /// Readable when there are events.
    pub fn events(&self) -> RawFd {
        self.events.as_raw_fd()
    }
}

fn client_key(client: SocketAddr, server_port: u16) -> RawClientKey {
    let mut key = [0; 20];
    key[..16].copy_from_slice(&mapped(client.ip()).octets());
    key[16..18].copy_from_slice(&client.port().to_be_bytes());
    key[18..].copy_from_slice(&server_port.to_be_bytes());
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_their_addresses_are_the_same() {
        for id in [Id(1), Id(KIND_DATAGRAM | 7), Id::published(0x12_3456), Id(ID_MASK)] {
            assert_eq!(Id::of(id.ip4().to_ipv6_mapped()), Some(id));
            assert_eq!(Id::of(id.ip6()), Some(id));
        }
        let of_client = u128::from(Id::published(7).ip6()) >> ID_BITS << ID_BITS;
        assert_eq!(Ipv6Addr::from(of_client), CLIENT_NET6);
        for ip in ["::ffff:127.0.0.1", "::1", "::ffff:127.192.0.0", "fd54:5349:0:1::1"] {
            assert_eq!(Id::of(ip.parse().expect("an address")), None, "{ip}");
        }
    }

    #[test]
    fn structures_are_laid_out_as_in_c() {
        let original = Original {
            cookie: 0x0102_0304_0506_0708,
            destination: "198.51.100.7:443".parse().expect("an address"),
            protocol: Protocol::Tcp,
        };
        let raw = original.to_raw();
        assert_eq!(raw[18..28], [0xff, 0xff, 198, 51, 100, 7, 1, 187, 6, 0]);
        assert_eq!(Original::from_raw(&raw), Some(original));

        let mut event = [0; SYN_LEN];
        event[4] = 9;
        event[SYN_FLOW..SYN_FLOW + 32].copy_from_slice(&raw);
        event[SYN_PACKET_LEN] = 2;
        event[SYN_PACKET..SYN_PACKET + 3].copy_from_slice(&[0x45, 1, 2]);
        let syn = Event::Syn { id: Id(9), original, packet: vec![0x45, 1] };
        assert_eq!(Event::from_raw(&event), Some(syn));
        assert_eq!(Event::from_raw(&event[1..]), None);

        let client = "192.0.2.1:258".parse().expect("an address");
        assert_eq!(client_key(client, 53)[10..], [0xff, 0xff, 192, 0, 2, 1, 1, 2, 0, 53]);

        let ip = [&[0; 10][..], &[0xff, 0xff, 127, 0, 0, 1]].concat();
        let listens = [&[4, 0, 0, 0, 80, 0, 0, 0][..], &ip].concat();
        let address = "127.0.0.1:80".parse().expect("an address");
        let expected = Event::Listens(Listens { address, starts: true });
        assert_eq!(Event::from_raw(&listens), Some(expected));

        let refused = [&[3, 0, 0, 0, 0, 0, 0, 0][..], &raw].concat();
        assert_eq!(Event::from_raw(&refused), Some(Event::Refused(original)));

        let mut event = [1, 0, 0, 0, 9, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0];
        let released = Event::Released { id: Some(Id(9)), cookie: 7 };
        assert_eq!(Event::from_raw(&event), Some(released));
        event[0] = 2;
        assert_eq!(Event::from_raw(&event), Some(Event::Replaced(Id(9))));
    }
}
