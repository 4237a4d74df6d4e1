//! The vsock device with any guest and any clients: valid and invalid packets and rings, resets of the
//! driver, and time that passes.
//!
//! Whatever they do, the bench checks that the device does not loop for ever, and that its state is
//! consistent. On connections where the guest itself makes no mistake, every byte arrives, in order and
//! within credit, and so does the end.

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::Input;
use crate::virtio::vsock::conn::BUFFER_LEN;
use crate::virtio::vsock::mux::Mux;
use crate::virtio::vsock::mux::bench::*;
use crate::virtio::vsock::packet::{Op, Ports};

const OPS: [Op; 7] = [
    Op::Request,
    Op::Response,
    Op::Reset,
    Op::Shutdown,
    Op::Data,
    Op::CreditUpdate,
    Op::CreditRequest,
];

/// A connection from the guest to a reserved port, on which the guest makes no mistakes.
struct Link {
    ports: Ports,
    far: UnixStream,
    /// Bytes that the guest has sent, and that the far end has read.
    sent: usize,
    read: usize,
    /// Bytes that the far end has written, and that the guest has received.
    written: usize,
    received: usize,
    /// Up to which byte the guest has granted credit.
    granted: u64,
    /// Whether each end goes on sending, and the guest goes on receiving.
    guest_sends: bool,
    guest_receives: bool,
    far_sends: bool,
    /// The guest was told that nothing more comes, or knows the connection no more.
    told_end: bool,
    gone: bool,
    /// A packet was forged for it, or lost with a ring, so that nothing is known of it.
    tainted: bool,
}

struct Fuzz {
    bench: Bench,
    links: Vec<Link>,
    clients: Vec<UnixStream>,
    /// Ports that have been in use.
    known: Vec<Ports>,
    next_guest_port: u32,
}

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut bench = Bench::new_with(None);
    let early = usize::from(input.u8() % 4);
    let clients = (0..early).map(|number| bench.connect(number % 2)).collect();
    bench.activate();
    let known = vec![
        Ports { host: RESERVED, guest: 2000 },
        Ports { host: 9, guest: 8 },
        Ports { host: 1024, guest: SERVER },
        Ports { host: 1024, guest: LONE_SERVER },
    ];
    let mut fuzz = Fuzz { bench, links: Vec::new(), clients, known, next_guest_port: 3000 };
    while !input.is_empty() {
        fuzz.step(&mut input);
        if fuzz.bench.failure().is_some() {
            // As a driver does when its device stops; the bench keeps only the first failure.
            return fuzz.restart_and_leave();
        }
    }
    fuzz.finish();
}

/// The byte at this position of a link, in either direction.
fn pattern(place: usize) -> u8 {
    (place % 251) as u8
}

fn patterned(start: usize, len: usize) -> Vec<u8> {
    (start..start + len).map(pattern).collect()
}

impl Fuzz {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 24 {
            0 | 1 => self.open_link(input),
            2..=4 => self.send_on_link(input),
            5 | 6 => self.write_to_link(input),
            7 => self.end_link(input),
            8 => self.grant(input),
            9..=11 => self.hostile_packet(input),
            12 => self.hostile_chain(input),
            13 => {
                let client = self.bench.connect(usize::from(input.flag()));
                self.clients.push(client);
                self.bench.run();
            }
            14 => self.client(input),
            15..=17 => {
                let count = usize::from(input.u8()).min(self.bench.rx.room());
                let len = input.choose(&[4096, 45, 44, 43, 1, 0, 44 + 65536, 300]);
                self.bench.post(count, len);
                self.receive();
            }
            18 => self.answer(input),
            19 => {
                self.bench.call(Mux::guest_is_ready);
            }
            20 => match input.flag() {
                true => self.bench.let_requests_expire(),
                false => self.bench.let_flows_expire(),
            },
            21 => self.restart(),
            22 => self.corrupt_ring(input),
            _ => self.read_links(),
        }
        self.receive();
    }

    fn open_link(&mut self, input: &mut Input<'_>) {
        let host = if input.flag() { RESERVED } else { OTHER_RESERVED };
        let Some(far) = self.bench.reserved.remove(&host) else { return };
        self.next_guest_port += 1;
        let ports = Ports { host, guest: self.next_guest_port };
        let buf_alloc = input.edge();
        self.bench.tell(Packet { buf_alloc, ..Packet::new(Op::Request, ports) }, &[]);
        self.known.push(ports);
        self.links.push(Link {
            ports,
            far,
            sent: 0,
            read: 0,
            written: 0,
            received: 0,
            granted: buf_alloc.into(),
            guest_sends: true,
            guest_receives: true,
            far_sends: true,
            told_end: false,
            gone: false,
            tainted: false,
        });
    }

    fn link(&self, input: &mut Input<'_>) -> Option<usize> {
        let index = usize::from(input.u8());
        (!self.links.is_empty()).then(|| index % self.links.len())
    }

    fn send_on_link(&mut self, input: &mut Input<'_>) {
        let Some(index) = self.link(input) else { return };
        let len = 16 * usize::from(input.u16() % 4097);
        let link = &mut self.links[index];
        if !link.guest_sends || link.gone || link.sent - link.read + len > BUFFER_LEN {
            return;
        }
        let packet = Packet { fwd_cnt: link.received as u32, ..Packet::new(Op::Data, link.ports) };
        link.granted = link.granted.max(link.received as u64 + u64::from(packet.buf_alloc));
        let data = patterned(link.sent, len);
        link.sent += len;
        self.bench.tell(packet, &data);
    }

    fn write_to_link(&mut self, input: &mut Input<'_>) {
        let Some(index) = self.link(input) else { return };
        let len = 16 * usize::from(input.u16());
        let link = &mut self.links[index];
        if link.far_sends {
            match link.far.write(&patterned(link.written, len)) {
                Ok(len) => link.written += len,
                Err(error) => assert!(
                    error.kind() == ErrorKind::WouldBlock
                        || !link.guest_receives
                        || link.gone
                        || link.tainted,
                    "{error}"
                ),
            }
        }
        self.bench.run();
    }

    fn end_link(&mut self, input: &mut Input<'_>) {
        let Some(index) = self.link(input) else { return };
        let how = input.u8() % 4;
        let link = &mut self.links[index];
        let mut packet = Packet::new(Op::Shutdown, link.ports);
        packet.fwd_cnt = link.received as u32;
        link.granted = link.granted.max(link.received as u64 + u64::from(packet.buf_alloc));
        match how {
            0 if !link.gone => {
                link.guest_sends = false;
                self.bench.tell(Packet { flags: SEND, ..packet }, &[]);
            }
            1 if !link.gone => {
                link.guest_receives = false;
                self.bench.tell(Packet { flags: RECEIVE, ..packet }, &[]);
            }
            2 if !link.gone => {
                (link.gone, link.guest_sends) = (true, false);
                self.bench.tell(Packet { op: Op::Reset as u16, ..packet }, &[]);
            }
            _ => {
                link.far_sends = false;
                let _ = link.far.shutdown(Shutdown::Write);
                self.bench.run();
            }
        }
    }

    /// Tells how much room the guest has, or asks how much the host has.
    fn grant(&mut self, input: &mut Input<'_>) {
        let Some(index) = self.link(input) else { return };
        let op = input.choose(&[Op::CreditUpdate, Op::CreditRequest]);
        let buf_alloc = input.edge();
        self.tell_credit(index, op, buf_alloc);
    }

    fn tell_credit(&mut self, index: usize, op: Op, buf_alloc: u32) {
        let link = &mut self.links[index];
        if link.gone {
            return;
        }
        link.granted = link.granted.max(link.received as u64 + u64::from(buf_alloc));
        let packet = Packet::new(op, link.ports);
        self.bench.tell(Packet { buf_alloc, fwd_cnt: link.received as u32, ..packet }, &[]);
    }

    /// A packet of any kind, on connections that are there or not.
    fn hostile_packet(&mut self, input: &mut Input<'_>) {
        let ports = match input.u8() {
            255 => Ports { host: input.u32(), guest: input.u32() },
            index => self.known[usize::from(index) % self.known.len()],
        };
        let mut packet = Packet::new(input.choose(&OPS), ports);
        packet.flags = u32::from(input.u8() % 4);
        packet.buf_alloc = input.edge();
        packet.fwd_cnt = input.edge();
        match input.u8() {
            0 => packet.op = input.u16(),
            1 => packet.kind = input.u16(),
            2 => packet.from.0 = input.u64(),
            3 => packet.to.0 = input.u64(),
            4 => packet.flags = input.u32(),
            _ => {}
        }
        let data = vec![0xee; input.edge().min(65 * 1024) as usize];
        let carries = packet.op == Op::Data as u16 || input.u8() == 0;
        self.taint(ports);
        self.give_up_offer(ports.host);
        self.note(ports);
        self.bench.tell(packet, if carries { &data } else { &[] });
    }

    /// A header with a wrong length, or buffers that are not valid.
    fn hostile_chain(&mut self, input: &mut Input<'_>) {
        let ports = self.known[usize::from(input.u8()) % self.known.len()];
        let op = input.choose(&OPS) as u16;
        let packet = Packet { op, len: input.edge(), ..Packet::new(Op::Data, ports) };
        let bytes = packet.bytes();
        let cut = usize::from(input.u8()) % (bytes.len() + 1);
        let (head, tail) = bytes.split_at(cut);
        let raw = Buffer::Raw(input.u64() >> (input.u8() % 64), input.edge(), input.u32() & 7);
        let chain = match input.u8() % 5 {
            0 => vec![Buffer::Full(head)],
            1 => vec![Buffer::Full(head), Buffer::Full(tail)],
            2 => vec![Buffer::Full(&bytes), raw],
            3 => vec![raw],
            _ => vec![Buffer::Full(head), Buffer::Empty(9), Buffer::Full(tail)],
        };
        // An indirect table made of the guest's other memory could lead to any packet.
        self.taint_all();
        self.bench.run();
        self.bench.tx.returned();
        self.bench.tx.add(&chain);
        self.bench.run();
        self.bench.tx.returned();
    }

    fn client(&mut self, input: &mut Input<'_>) {
        if self.clients.is_empty() {
            return;
        }
        let index = usize::from(input.u8()) % self.clients.len();
        match input.u8() % 4 {
            0 => {
                let _ = self.clients[index].write(&vec![7; 16 * usize::from(input.u16())]);
            }
            1 => {
                let _ = self.clients[index].shutdown(Shutdown::Write);
            }
            2 => drop(read_all(&mut self.clients[index])),
            _ => drop(self.clients.remove(index)),
        }
        self.bench.run();
    }

    /// The guest's answers to connections that the host requests.
    fn answer(&mut self, input: &mut Input<'_>) {
        let index = usize::from(input.u8()) % self.known.len();
        let ports = self.known[self.known.len() - 1 - index];
        let op = input.choose(&[Op::Response, Op::Reset]);
        self.taint(ports);
        self.bench.tell(Packet::new(op, ports), &[]);
    }

    /// Resets the driver: what it had sent arrives, and the connections are over.
    fn restart(&mut self) {
        self.receive();
        self.bench.activate();
        for link in &mut self.links {
            (link.gone, link.guest_sends) = (true, false);
        }
    }

    fn corrupt_ring(&mut self, input: &mut Input<'_>) {
        let avail = input.u16();
        let ring = if input.flag() { &self.bench.rx } else { &self.bench.tx };
        ring.set_avail(avail);
        ring.kick_anyway();
        self.taint_all();
        self.bench.run();
        self.bench.activate();
        self.links.iter_mut().for_each(|link| link.gone = true);
    }

    fn restart_and_leave(mut self) {
        self.bench.activate();
        self.bench.call(Mux::close);
    }

    fn taint(&mut self, ports: Ports) {
        for link in self.links.iter_mut().filter(|link| link.ports == ports) {
            link.tainted = true;
        }
    }

    fn taint_all(&mut self) {
        self.links.iter_mut().for_each(|link| link.tainted = true);
        for host in [RESERVED, OTHER_RESERVED] {
            self.give_up_offer(host);
        }
    }

    /// The device may have it no more.
    fn give_up_offer(&mut self, host: u32) {
        self.clients.extend(self.bench.reserved.remove(&host));
    }

    fn note(&mut self, ports: Ports) {
        if self.known.len() < 64 && !self.known.contains(&ports) {
            self.known.push(ports);
        }
    }

    /// Takes the packets that the guest has got.
    fn receive(&mut self) {
        for (_, len, bytes) in self.bench.rx.returned() {
            if len == 0 {
                continue;
            }
            assert!(len >= 44, "a packet of {len} bytes");
            let (packet, data) = (Packet::from_bytes(&bytes), &bytes[44..]);
            assert_eq!((packet.from.0, packet.to.0, packet.kind), (2, 3, 1));
            assert_eq!(packet.len as usize, data.len());
            let ports = packet.ports();
            self.note(ports);
            let Some(link) = self.links.iter_mut().find(|l| l.ports == ports && !l.gone) else {
                continue;
            };
            if !link.tainted {
                link.on_packet(&packet, data);
            }
        }
    }

    fn read_links(&mut self) {
        for link in &mut self.links {
            link.read_far();
        }
        self.bench.run();
    }

    /// Checks that every link has delivered all its bytes and its end.
    fn finish(&mut self) {
        for index in 0..self.links.len() {
            self.tell_credit(index, Op::CreditUpdate, 1 << 30);
        }
        loop {
            let before: Vec<_> = self.links.iter().map(|l| (l.read, l.received)).collect();
            self.read_links();
            let room = self.bench.rx.room();
            self.bench.post(room, 4096);
            self.receive();
            let after: Vec<_> = self.links.iter().map(|l| (l.read, l.received)).collect();
            if before == after && self.bench.rx.room() < RING.into() {
                break;
            }
        }
        for link in self.links.iter_mut().filter(|link| !link.tainted) {
            link.check_delivered();
        }
        self.bench.call(Mux::close);
        self.receive();
    }
}

impl Link {
    fn on_packet(&mut self, packet: &Packet, data: &[u8]) {
        match packet.op {
            op if op == Op::Data as u16 => {
                assert!(!self.told_end, "nothing follows the end");
                assert!(self.guest_receives, "nothing comes that is not wanted");
                assert_eq!(data, patterned(self.received, data.len()));
                self.received += data.len();
                assert!(self.received <= self.written);
                assert!(self.received as u64 <= self.granted, "credit is kept");
            }
            op if op == Op::Shutdown as u16 => {
                if packet.flags & SEND != 0 {
                    assert!(!self.far_sends, "it goes on sending");
                    assert!(self.received == self.written || !self.guest_receives);
                    self.told_end = true;
                }
                assert_eq!(packet.flags & RECEIVE, 0, "the far end goes on reading");
            }
            op if op == Op::Reset as u16 => {
                assert!(!self.guest_sends, "not while the guest sends");
                assert!(self.told_end || !self.guest_receives, "not while the far end sends");
                self.gone = true;
            }
            op if op == Op::Request as u16 => panic!("this one is open"),
            _ => {}
        }
        assert!(packet.fwd_cnt as usize <= self.sent, "not more is taken than was sent");
        assert!(packet.buf_alloc as usize == BUFFER_LEN || packet.op == Op::Reset as u16);
    }

    fn read_far(&mut self) -> Tail {
        let (bytes, tail) = read_all(&mut self.far);
        if !self.tainted {
            assert!(bytes == patterned(self.read, bytes.len()), "as the guest has sent it");
            self.read += bytes.len();
            assert!(self.read <= self.sent);
            assert!(tail == Tail::More || !self.guest_sends, "no end that is none");
        }
        tail
    }

    fn check_delivered(&mut self) {
        let tail = self.read_far();
        assert_eq!(self.read, self.sent, "all that the guest has sent is delivered");
        if !self.guest_sends {
            assert_ne!(tail, Tail::More, "so is its end");
        }
        if self.guest_receives && !self.gone {
            assert_eq!(
                self.received, self.written,
                "all that the far end has written is delivered"
            );
            assert_eq!(self.told_end, !self.far_sends, "so is its end");
        }
    }
}
