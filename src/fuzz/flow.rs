//! Flows: connections of the guest to the network, and from the network to published ports, with any
//! guest and any peers. Every destination that the guest may reach is one of two sockets here.
//!
//! As long as the guest itself makes no mistake, the framing towards it is right, and bytes arrive in
//! order.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};

use mote_agent::flow::{
    CHUNK_HEADER_LEN, DATAGRAM_ERROR, DATAGRAM_HEADER_LEN, MAX_DATAGRAM_LEN, PUBLISHED_LEN,
    Protocol, Published, REQUEST_LEN, Request, STATUS_LEN,
};
use mote_agent::protocol::{FLOW_PORT, PUBLISH_PORT};

use super::Input;
use crate::policy::Policy;
use crate::policy::rules::Rules;
use crate::sys;
use crate::virtio::vsock::conn::BUFFER_LEN;
use crate::virtio::vsock::flow;
use crate::virtio::vsock::listeners::Listener;
use crate::virtio::vsock::mux::Mux;
use crate::virtio::vsock::mux::bench::*;
use crate::virtio::vsock::packet::{Op, Ports};

/// The guest's published port.
const GUEST_PORT: u16 = 80;
/// Most connections per input: each costs the host a port for a minute.
const MAX_FLOWS: usize = 8;

pub fn run(data: &[u8]) {
    codecs(data);
    let mut input = Input(data);
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    let published = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    for nonblocking in
        [tcp.set_nonblocking(true), udp.set_nonblocking(true), published.set_nonblocking(true)]
    {
        nonblocking.expect("non-blocking");
    }
    let address = |socket: std::io::Result<SocketAddr>| socket.expect("bound");
    let policy = Policy::with_stand_ins(address(tcp.local_addr()), address(udp.local_addr()));
    let entrance = address(published.local_addr());
    let listener = Listener::Published { socket: published, guest_port: GUEST_PORT };
    let mut bench = Bench::with_policy(
        Some(policy),
        HashMap::new(),
        vec![listener],
        HashMap::new(),
        Vec::new(),
    );
    bench.activate();
    bench.call(Mux::guest_is_ready);
    let mut fuzz = Fuzz {
        bench,
        tcp,
        udp,
        entrance,
        flows: Vec::new(),
        peers: Vec::new(),
        next_guest_port: 3000,
    };
    while !input.is_empty() {
        fuzz.step(&mut input);
        fuzz.receive();
    }
    fuzz.bench.call(Mux::close);
}

/// The pure parts, on any bytes.
fn codecs(data: &[u8]) {
    let input = Input(data);
    if let Some(bytes) = data.first_chunk::<REQUEST_LEN>()
        && let Some(request) = Request::decode(bytes)
    {
        assert_eq!(Request::decode(&request.encode()), Some(request));
        let policy = Policy::of_host("nameserver 127.0.0.53", Rules::default());
        let is_local = |_| Ok(false);
        if let Ok(to) = policy.resolve(request.protocol, request.destination, is_local) {
            let ip = to.ip().to_canonical();
            assert!(!ip.is_unspecified() && !ip.is_multicast() && to.port() != 0);
            assert!(!ip.is_loopback() || to.to_string() == "127.0.0.53:53");
            assert!(!matches!(ip, IpAddr::V4(ip) if ip.is_link_local()));
        }
    }
    if let Some(published) = data.first_chunk().and_then(Published::decode) {
        assert_eq!(Published::decode(&published.encode()), Some(published));
    }
    if let Ok(Some(datagram)) = flow::first_datagram(data) {
        assert!(datagram.len() <= MAX_DATAGRAM_LEN);
        let mut buffer = [&[0; DATAGRAM_HEADER_LEN], datagram].concat();
        assert_eq!(flow::datagram(&mut buffer, datagram.len()), &data[..2 + datagram.len()]);
    }
    // Bytes that do not fit are not lost.
    let mut rest = flow::Rest::default();
    let room = data.len() / 2;
    let mut all = data[..rest.keep(data, room)].to_vec();
    let mut packet = vec![0; 1 + usize::from(Input(input.0).u8())];
    loop {
        match rest.take(&mut packet) {
            0 => break,
            len => all.extend(&packet[..len]),
        }
    }
    assert_eq!(all, data);
}

/// What a flow carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The guest has sent no request yet.
    Unsaid,
    Tcp,
    Udp,
    /// A client of the published port.
    Published,
    /// The guest has made a mistake.
    Hostile,
}

struct Flow {
    ports: Ports,
    kind: Kind,
    /// From the guest: how much it has sent, and whether it will send more.
    sent: usize,
    sends: bool,
    /// To the guest: bytes not decoded yet, whether the status has come, the current chunk, how many of
    /// the peer's bytes have come, and whether their end has.
    bytes: Vec<u8>,
    answered: bool,
    refused: bool,
    chunk: usize,
    got: usize,
    ended: bool,
    gone: bool,
}

/// A socket of a peer.
struct Peer {
    socket: TcpStream,
    written: usize,
    read: usize,
    ended: bool,
}

struct Fuzz {
    bench: Bench,
    tcp: TcpListener,
    udp: UdpSocket,
    entrance: SocketAddr,
    flows: Vec<Flow>,
    peers: Vec<Peer>,
    next_guest_port: u32,
}

/// The byte at this position of a TCP connection, in either direction.
fn patterned(start: usize, len: usize) -> Vec<u8> {
    (start..start + len).map(|place| (place % 251) as u8).collect()
}

impl Fuzz {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 16 {
            0 => self.open(),
            1 => self.request(input),
            2..=4 => self.send(input),
            5 => self.shut(input),
            6 => self.hostile(input),
            7 => self.accept(),
            8 | 9 => self.peer(input),
            10 => {
                let len = usize::from(input.u16());
                self.echo(len);
            }
            11 => self.client(),
            12 => self.bench.let_flows_expire(),
            13 if input.u8() == 0 => {
                self.bench.activate();
                self.flows.iter_mut().for_each(|flow| flow.gone = true);
            }
            _ => {
                let count = usize::from(input.u8()).min(self.bench.rx.room());
                let len = input.choose(&[4096, 300, 45, 44, 50, 44 + 65536]);
                self.bench.post(count, len);
            }
        }
    }

    fn tell(&mut self, op: Op, index: usize, flags: u32, data: &[u8]) {
        let packet = Packet::new(op, self.flows[index].ports);
        // Credit for everything: the vsock target tests credit.
        self.bench.tell(Packet { flags, buf_alloc: 1 << 30, ..packet }, data);
    }

    fn open(&mut self) {
        if self.flows.len() < MAX_FLOWS {
            self.next_guest_port += 1;
            let ports = Ports { host: FLOW_PORT, guest: self.next_guest_port };
            self.flows.push(Flow::new(ports, Kind::Unsaid));
            self.tell(Op::Request, self.flows.len() - 1, 0, &[]);
        }
    }

    fn flow(&self, input: &mut Input<'_>) -> Option<usize> {
        let index = usize::from(input.u8());
        let index = (!self.flows.is_empty()).then(|| index % self.flows.len())?;
        (!self.flows[index].gone).then_some(index)
    }

    fn request(&mut self, input: &mut Input<'_>) {
        let Some(index) = self.flow(input) else { return };
        if self.flows[index].kind != Kind::Unsaid {
            return;
        }
        let (protocol, kind) =
            if input.flag() { (Protocol::Udp, Kind::Udp) } else { (Protocol::Tcp, Kind::Tcp) };
        let destination = SocketAddr::from(([192, 0, 2, input.u8()], input.u16().max(1)));
        let bytes = Request { protocol, destination }.encode();
        // In two pieces as well as in one.
        let (first, second) = bytes.split_at(usize::from(input.u8()) % REQUEST_LEN);
        if !first.is_empty() {
            self.tell(Op::Data, index, 0, first);
        }
        self.tell(Op::Data, index, 0, second);
        self.flows[index].kind = kind;
    }

    fn send(&mut self, input: &mut Input<'_>) {
        let Some(index) = self.flow(input) else { return };
        let len = usize::from(input.u16());
        let flow = &mut self.flows[index];
        if !flow.sends {
            return;
        }
        let data = match flow.kind {
            Kind::Tcp | Kind::Published => {
                // Nothing is read at the other end here, so at most as much as always fits.
                let len = len.min(BUFFER_LEN - flow.sent);
                let data = patterned(flow.sent, len);
                flow.sent += len;
                data
            }
            Kind::Udp => {
                let len = len.min(MAX_DATAGRAM_LEN);
                [&(len as u16).to_be_bytes(), &vec![0x55; len][..]].concat()
            }
            Kind::Unsaid | Kind::Hostile => return,
        };
        for packet in data.chunks(65_536) {
            self.tell(Op::Data, index, 0, packet);
        }
    }

    fn shut(&mut self, input: &mut Input<'_>) {
        let Some(index) = self.flow(input) else { return };
        let (op, flags) = input.choose(&[
            (Op::Shutdown, SEND),
            (Op::Shutdown, SEND | RECEIVE),
            (Op::Shutdown, RECEIVE),
            (Op::Reset, 0),
        ]);
        let flow = &mut self.flows[index];
        flow.sends &= flags & SEND == 0;
        flow.gone |= op == Op::Reset;
        self.tell(op, index, flags, &[]);
    }

    /// Any bytes in place of a request, or in the middle of what follows it.
    fn hostile(&mut self, input: &mut Input<'_>) {
        let Some(index) = self.flow(input) else { return };
        self.flows[index].kind = Kind::Hostile;
        // The other end cannot tell which flow they belong to.
        self.peers.clear();
        self.tell(Op::Data, index, 0, input.short());
    }

    fn accept(&mut self) {
        while let Ok((socket, _)) = self.tcp.accept() {
            // With a hostile flow, connections are not checked: they may be made by that flow.
            if self.flows.iter().all(|flow| flow.kind != Kind::Hostile) {
                self.peers.push(Peer::new(socket));
            }
        }
        self.bench.run();
    }

    fn peer(&mut self, input: &mut Input<'_>) {
        if self.peers.is_empty() {
            return;
        }
        let index = usize::from(input.u8()) % self.peers.len();
        let peer = &mut self.peers[index];
        match input.u8() % 8 {
            0..=3 => {
                let len = usize::from(input.u16());
                if !peer.ended {
                    let taken = peer.socket.write(&patterned(peer.written, len));
                    peer.written += taken.unwrap_or(0);
                }
            }
            4 | 5 => peer.read(),
            6 => {
                peer.ended = true;
                let _ = peer.socket.shutdown(Shutdown::Write);
            }
            _ => {
                let peer = self.peers.remove(index);
                sys::socket::set_reset_on_close(&peer.socket, input.flag()).expect("set");
            }
        }
        self.bench.run();
    }

    /// Answers the datagrams that have arrived.
    fn echo(&mut self, len: usize) {
        let mut buffer = vec![0; MAX_DATAGRAM_LEN];
        while let Ok((got, from)) = self.udp.recv_from(&mut buffer) {
            assert!(buffer[..got].iter().all(|byte| *byte == 0x55) || self.is_hostile());
            let _ = self.udp.send_to(&vec![0x66; len.min(60_000)], from);
        }
        self.bench.run();
    }

    fn is_hostile(&self) -> bool {
        self.flows.iter().any(|flow| flow.kind == Kind::Hostile)
    }

    /// A client of the published port.
    fn client(&mut self) {
        if self.flows.len() < MAX_FLOWS
            && let Ok(socket) = TcpStream::connect(self.entrance)
        {
            self.peers.push(Peer::new(socket));
        }
        self.bench.run();
    }

    fn receive(&mut self) {
        for (_, len, bytes) in self.bench.rx.returned() {
            if len == 0 {
                continue;
            }
            let (packet, data) = (Packet::from_bytes(&bytes), &bytes[44..]);
            let ports = packet.ports();
            if packet.op == Op::Request as u16 {
                assert_eq!(ports.guest, PUBLISH_PORT, "the host asks for nothing else");
                self.flows.push(Flow::new(ports, Kind::Published));
                self.tell(Op::Response, self.flows.len() - 1, 0, &[]);
                continue;
            }
            let Some(flow) = self.flows.iter_mut().find(|f| f.ports == ports && !f.gone) else {
                continue;
            };
            match packet.op {
                op if op == Op::Data as u16 => flow.on_data(data),
                op if op == Op::Reset as u16 => flow.gone = true,
                _ => assert!(data.is_empty()),
            }
        }
    }
}

impl Flow {
    fn new(ports: Ports, kind: Kind) -> Self {
        Flow {
            ports,
            kind,
            sent: 0,
            sends: true,
            bytes: Vec::new(),
            answered: false,
            refused: false,
            chunk: 0,
            got: 0,
            ended: false,
            gone: false,
        }
    }

    fn on_data(&mut self, data: &[u8]) {
        assert_ne!(self.kind, Kind::Unsaid, "nothing comes before it is known where from");
        assert!(!data.is_empty());
        assert!(!self.ended && !self.refused, "nothing follows the end");
        if self.kind == Kind::Hostile {
            return;
        }
        self.bytes.extend(data);
        if !self.answered {
            let len = match self.kind {
                Kind::Published => PUBLISHED_LEN,
                _ => STATUS_LEN,
            };
            if self.bytes.len() < len {
                return;
            }
            let head: Vec<u8> = self.bytes.drain(..len).collect();
            match self.kind {
                Kind::Published => {
                    let header = head.first_chunk().expect("as long as one");
                    let published = Published::decode(header).expect("a header");
                    assert_eq!(published.guest_port, GUEST_PORT);
                }
                _ => self.refused = head != [0, 0],
            }
            self.answered = true;
        }
        match self.kind {
            Kind::Udp => self.take_datagrams(),
            _ => self.take_chunks(),
        }
    }

    fn take_datagrams(&mut self) {
        while let Some((header, rest)) = self.bytes.split_first_chunk::<DATAGRAM_HEADER_LEN>() {
            let header = u16::from_be_bytes(*header);
            let len = if header == DATAGRAM_ERROR { STATUS_LEN } else { header.into() };
            let Some(datagram) = rest.get(..len) else { return };
            assert!(header == DATAGRAM_ERROR || datagram.iter().all(|byte| *byte == 0x66));
            self.bytes.drain(..DATAGRAM_HEADER_LEN + len);
        }
    }

    fn take_chunks(&mut self) {
        loop {
            if self.chunk == 0 {
                let Some(header) = self.bytes.first_chunk::<CHUNK_HEADER_LEN>() else { return };
                self.chunk = u32::from_be_bytes(*header) as usize;
                assert!(self.chunk <= 65_536);
                self.bytes.drain(..CHUNK_HEADER_LEN);
                self.ended = self.chunk == 0;
                if self.ended {
                    return assert!(self.bytes.is_empty(), "nothing follows the end");
                }
            }
            let len = self.chunk.min(self.bytes.len());
            let bytes: Vec<u8> = self.bytes.drain(..len).collect();
            assert!(bytes == patterned(self.got, len), "as the peer has sent it");
            self.got += len;
            self.chunk -= len;
            if self.chunk > 0 {
                return;
            }
        }
    }
}

impl Peer {
    fn new(socket: TcpStream) -> Self {
        socket.set_nonblocking(true).expect("non-blocking");
        Peer { socket, written: 0, read: 0, ended: false }
    }

    fn read(&mut self) {
        let mut bytes = vec![0; 64 * 1024];
        while let Ok(len @ 1..) = self.socket.read(&mut bytes) {
            assert!(bytes[..len] == patterned(self.read, len), "as the guest has sent it");
            self.read += len;
        }
    }
}
