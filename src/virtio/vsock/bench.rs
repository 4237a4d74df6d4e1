//! For tests and fuzzers: the vsock device between a guest made of two rings and real host sockets, in a real
//! event loop, without a VM.
//!
//! Packets are written and read here byte by byte, not with [`super::super::packet`], so that they can
//! be wrong, and so that a mistake there is not repeated here. The guest kicks only when the device has
//! asked for it: if the device forgets to ask, a packet hangs and the test fails.

#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is how a test fails")]
#![cfg_attr(fuzzing, allow(dead_code, reason = "tests use more of it than fuzzers"))]

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{ErrorKind, Read};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor, split::VirtqUsedElem};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::policy::Policy;
use crate::policy::refusals::SharedRefusals;
use crate::token::Token;
use crate::virtio::device::{ConfigSpace, ReadyQueue};

/// The device's number.
const DEVICE: u8 = 0;
/// Two reserved host ports, each of which takes one connection.
pub const RESERVED: u32 = 7000;
pub const OTHER_RESERVED: u32 = 7001;
/// The guest port of the first listener and its fallback; and that of the second listener, which has no
/// fallback.
pub const SERVER: u32 = 4089;
pub const FALLBACK: u32 = 5089;
pub const LONE_SERVER: u32 = 4090;
/// The guest's credit in bytes, unless a test says otherwise.
pub const GUEST_ALLOC: u32 = 256 * 1024;
/// Entries of a ring: those of the larger queue in `QUEUE_SIZES`.
pub const RING: u16 = 256;
/// `VIRTIO_VSOCK_SHUTDOWN_*`.
pub const RECEIVE: u32 = 1;
pub const SEND: u32 = 2;

/// Guest memory: rings below, then this much for each descriptor of either ring.
const RAM: usize = 128 << 20;
const SLOT: u64 = 128 << 10;
/// Most rounds of the loop until there must be no more events.
const MAX_ROUNDS: usize = 20_000;

/// A packet's header, as its bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Address and port.
    pub from: (u64, u32),
    pub to: (u64, u32),
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Packet {
    /// A proper packet from the guest.
    pub fn new(op: Op, ports: Ports) -> Self {
        let (from, to) = ((3, ports.guest), (2, ports.host));
        let (len, kind, op) = (0, 1, op as u16);
        Packet { from, to, len, kind, op, flags: 0, buf_alloc: GUEST_ALLOC, fwd_cnt: 0 }
    }

    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.from.0.to_le_bytes());
        bytes.extend(self.to.0.to_le_bytes());
        bytes.extend(self.from.1.to_le_bytes());
        bytes.extend(self.to.1.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2"));
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8"));
        Packet {
            from: (u64_at(0), u32_at(16)),
            to: (u64_at(8), u32_at(20)),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// The connection, if this came from the host.
    pub fn ports(&self) -> Ports {
        Ports { host: self.from.1, guest: self.to.1 }
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub enum Buffer<'a> {
    /// For the device to read.
    Full(&'a [u8]),
    /// For the device to write, this long.
    Empty(u32),
    /// A descriptor with this address, length and flags.
    Raw(u64, u32, u32),
}

/// The driver's side of a queue.
#[derive(Debug)]
pub struct Ring {
    ram: GuestRam,
    table: u64,
    slots: u64,
    kick: EventFd,
    free: Vec<u16>,
    /// By head: each descriptor's index, address and length.
    chains: HashMap<u16, Vec<(u16, u64, u32)>>,
    avail: u16,
    used: u16,
    /// `avail` at the last kick.
    kicked: u16,
}

impl Ring {
    fn new(ram: &GuestRam, table: u64, slots: u64) -> Self {
        let ring = Ring {
            ram: ram.clone(),
            table,
            slots,
            kick: EventFd::new(libc::EFD_NONBLOCK).expect("eventfd"),
            free: (0..RING).rev().collect(),
            chains: HashMap::new(),
            avail: 0,
            used: 0,
            kicked: 0,
        };
        ring.ram.write_slice(&[0; 0x3000], GuestAddress(table)).expect("in RAM");
        ring
    }

    fn avail_ring(&self) -> u64 {
        self.table + 0x1000
    }

    fn used_ring(&self) -> u64 {
        self.table + 0x2000
    }

    fn ready_queue(&self) -> ReadyQueue {
        let mut queue = Queue::new(RING).expect("a queue");
        queue.set_desc_table_address(Some(self.table as u32), None);
        queue.set_avail_ring_address(Some(self.avail_ring() as u32), None);
        queue.set_used_ring_address(Some(self.used_ring() as u32), None);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.ram));
        ReadyQueue { queue, kick: self.kick.try_clone().expect("eventfd") }
    }

    /// Address of this descriptor's buffer, unless it is a raw one.
    pub fn slot(&self, index: u16) -> u64 {
        self.slots + u64::from(index) * SLOT
    }

    /// Writes one descriptor.
    pub fn describe(&self, index: u16, addr: u64, len: u32, flags: u32, next: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags as u16, next));
        let at = GuestAddress(self.table + 16 * u64::from(index));
        self.ram.write_obj(descriptor, at).expect("in RAM");
    }

    /// Descriptors that are not in use.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain of these buffers available. Returns its head.
    pub fn add(&mut self, buffers: &[Buffer<'_>]) -> u16 {
        let indices: Vec<u16> =
            buffers.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        let mut chain = Vec::new();
        for (position, buffer) in buffers.iter().enumerate() {
            let index = indices[position];
            let (addr, len, flags) = match *buffer {
                Buffer::Full(bytes) => {
                    let at = GuestAddress(self.slot(index));
                    self.ram.write_slice(bytes, at).expect("in RAM");
                    (at.0, bytes.len() as u32, 0)
                }
                Buffer::Empty(len) => (self.slot(index), len, VRING_DESC_F_WRITE),
                Buffer::Raw(addr, len, flags) => (addr, len, flags),
            };
            let next = indices.get(position + 1).copied();
            let flags = flags | next.map_or(0, |_| VRING_DESC_F_NEXT);
            self.describe(index, addr, len, flags, next.unwrap_or(0));
            chain.push((index, addr, len));
        }
        let head = indices[0];
        self.chains.insert(head, chain);
        self.announce(head);
        head
    }

    /// Puts a head into the available ring.
    pub fn announce(&mut self, head: u16) {
        let at = self.avail_ring() + 4 + 2 * u64::from(self.avail % RING);
        self.ram.write_obj(head, GuestAddress(at)).expect("in RAM");
        self.avail = self.avail.wrapping_add(1);
        self.set_avail(self.avail);
    }

    /// Sets the available ring's index, to a right or a wrong value.
    pub fn set_avail(&self, avail: u16) {
        self.ram.write_obj(avail, GuestAddress(self.avail_ring() + 2)).expect("in RAM");
    }

    /// Kicks if the device has asked for it (virtio 1.2, 2.7.10).
    fn kick(&mut self) {
        let at = self.used_ring() + 4 + 8 * u64::from(RING);
        let avail_event: u16 = self.ram.read_obj(GuestAddress(at)).expect("in RAM");
        let news = self.avail.wrapping_sub(self.kicked);
        if self.avail.wrapping_sub(avail_event).wrapping_sub(1) < news {
            self.kick_anyway();
        }
        self.kicked = self.avail;
    }

    /// Kicks, whether or not the device has asked for it.
    pub fn kick_anyway(&self) {
        self.kick.write(1).expect("kick");
    }

    /// Takes the chains that the device has returned: each one's head, used length and bytes.
    pub fn returned(&mut self) -> Vec<(u16, u32, Vec<u8>)> {
        let used: u16 = self.ram.read_obj(GuestAddress(self.used_ring() + 2)).expect("in RAM");
        let mut returned = Vec::new();
        while self.used != used {
            let at = self.used_ring() + 4 + 8 * u64::from(self.used % RING);
            let element: VirtqUsedElem = self.ram.read_obj(GuestAddress(at)).expect("in RAM");
            let head = u16::try_from(element.id()).expect("a head");
            let chain = self.chains.remove(&head).expect("a chain of ours, once");
            let mut bytes = vec![0; element.len() as usize];
            let mut filled = 0;
            for (index, addr, len) in chain {
                let part = (bytes.len() - filled).min(len as usize);
                let target = &mut bytes[filled..filled + part];
                self.ram.read_slice(target, GuestAddress(addr)).expect("in RAM");
                filled += part;
                self.free.push(index);
            }
            returned.push((head, element.len(), bytes));
            self.used = self.used.wrapping_add(1);
        }
        returned
    }
}

/// The device, in place of the main loop.
#[derive(Debug)]
struct Device {
    mux: Mux,
    failure: Option<anyhow::Error>,
}

impl MutEventSubscriber for Device {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.mux.register(&mut Watcher::new(ops, DEVICE)).expect("registered");
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let token = Token::from_data(events.data());
        let Some(Token::Device { device: DEVICE, source }) = token else { panic!("{token:?}") };
        let mut watcher = Watcher::new(ops, DEVICE);
        let handled = self.mux.handle(source, events.event_set(), &mut watcher);
        self.check(handled, &mut watcher);
    }
}

impl Device {
    /// Handles errors as the main loop does.
    fn check(&mut self, handled: Result<()>, watcher: &mut Watcher<'_, '_>) {
        if let Err(error) = handled {
            self.mux.reset(watcher).expect("reset");
            self.failure.get_or_insert(error);
        }
    }
}

/// What a read found after the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// Nothing yet.
    More,
    /// The end.
    End,
    /// An end that lost bytes on their way to the guest.
    Reset,
}

/// Everything there is to read.
pub fn read_all(socket: &mut impl Read) -> (Vec<u8>, Tail) {
    let mut all = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        match socket.read(&mut bytes) {
            Ok(0) => return (all, Tail::End),
            Ok(read) => all.extend(&bytes[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return (all, Tail::More),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return (all, Tail::Reset),
            Err(error) => panic!("read from the device: {error}"),
        }
    }
}

/// The device, its guest, and the other ends of its host sockets.
pub struct Bench {
    device: Rc<RefCell<Device>>,
    events: EventManager<Rc<RefCell<Device>>>,
    id: SubscriberId,
    ram: GuestRam,
    pub tx: Ring,
    pub rx: Ring,
    /// The other ends of the reserved ports.
    pub reserved: HashMap<u32, UnixStream>,
    addresses: Vec<SocketAddr>,
    next_guest_port: u32,
}

impl Bench {
    /// A device with both reserved ports and both listeners, not activated.
    pub fn new() -> Self {
        Bench::new_with(Some(Policy::with_loopback()))
    }

    /// The same, with flows to destinations that `policy` allows; with `None`, without flows.
    pub fn new_with(policy: Option<Policy>) -> Self {
        let (mut ours, mut theirs) = (HashMap::new(), HashMap::new());
        for port in [RESERVED, OTHER_RESERVED] {
            let (near, far) = UnixStream::pair().expect("a pair");
            near.set_nonblocking(true).expect("non-blocking");
            ours.insert(port, near);
            theirs.insert(port, far);
        }
        let (mut listeners, mut addresses) = (Vec::new(), Vec::new());
        for (guest_port, fallback_port) in
            [(Some(SERVER), Some(FALLBACK)), (Some(LONE_SERVER), None)]
        {
            let address = fresh_address();
            let socket = UnixListener::bind_addr(&address).expect("bound");
            socket.set_nonblocking(true).expect("non-blocking");
            listeners.push(Listener::Unix { socket, guest_port, fallback_port });
            addresses.push(address);
        }
        Bench::with_policy(policy, theirs, listeners, ours, addresses)
    }

    /// A device with these sockets only.
    pub fn with(
        reserved: HashMap<u32, UnixStream>,
        listeners: Vec<Listener>,
        ours: HashMap<u32, UnixStream>,
        addresses: Vec<SocketAddr>,
    ) -> Self {
        Bench::with_policy(Some(Policy::with_loopback()), reserved, listeners, ours, addresses)
    }

    /// The same, with flows to destinations that `policy` allows; with `None`, without flows.
    pub fn with_policy(
        policy: Option<Policy>,
        reserved: HashMap<u32, UnixStream>,
        listeners: Vec<Listener>,
        ours: HashMap<u32, UnixStream>,
        addresses: Vec<SocketAddr>,
    ) -> Self {
        let filter = |policy| Filter::new(policy, SharedRefusals::default()).expect("a socket");
        let mux = Mux::new(reserved, listeners, policy.map(filter));
        let device = Rc::new(RefCell::new(Device { mux, failure: None }));
        let mut events = EventManager::new().expect("an event loop");
        let id = events.add_subscriber(Rc::clone(&device));
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).expect("RAM");
        let (rx, tx) = rings(&ram);
        let next_guest_port = 1024;
        Bench { device, events, id, ram, tx, rx, reserved: ours, addresses, next_guest_port }
    }

    /// A device in service, with a ready guest and no receive buffers.
    pub fn started() -> Self {
        let mut bench = Bench::new();
        bench.activate();
        bench.call(Mux::guest_is_ready);
        bench
    }

    /// Sets up new rings and gives them to the device.
    pub fn activate(&mut self) {
        (self.rx, self.tx) = rings(&self.ram);
        let event = Ring::new(&self.ram, 0x30_000, 0);
        let activation = Activation {
            ram: self.ram.clone(),
            features: F_VERSION_1 | F_EVENT_IDX,
            queues: [&self.rx, &self.tx, &event].map(Ring::ready_queue).into(),
            interrupt: EventFd::new(libc::EFD_NONBLOCK).expect("eventfd"),
            config: ConfigSpace::unattached().0,
        };
        self.call(|mux, watcher| mux.activate(activation, watcher));
    }

    /// Calls the device as the main loop would, then runs the loop until nothing happens any more.
    pub fn call(&mut self, f: impl FnOnce(&mut Mux, &mut Watcher<'_, '_>) -> Result<()>) {
        self.call_only(f);
        self.run();
    }

    /// Calls the device without running the loop.
    pub fn call_only(&mut self, f: impl FnOnce(&mut Mux, &mut Watcher<'_, '_>) -> Result<()>) {
        let mut ops = self.events.event_ops(self.id).expect("ops");
        f(&mut self.device.borrow_mut().mux, &mut Watcher::new(&mut ops, DEVICE))
            .expect("the device lives");
    }

    /// Moves time to when all flows opened so far have waited too long for their request.
    pub fn let_flows_expire(&mut self) {
        self.call(|mux, watcher| mux.end_round(Instant::now() + FLOW_LIMIT, watcher));
    }

    /// Moves time to when all requests made so far have waited too long.
    pub fn let_requests_expire(&mut self) {
        self.call(|mux, watcher| mux.end_round(Instant::now() + ANSWER_LIMIT, watcher));
    }

    /// Kicks as asked, and runs the loop until nothing happens any more.
    pub fn run(&mut self) {
        self.tx.kick();
        self.rx.kick();
        for _ in 0..MAX_ROUNDS {
            if self.turn() == 0 {
                return self.look().check();
            }
        }
        panic!("the loop does not come to rest");
    }

    /// One turn of the loop; returns how many events there were.
    pub fn turn(&mut self) -> usize {
        let events = self.events.run_with_timeout(0).expect("an event loop");
        let mut ops = self.events.event_ops(self.id).expect("ops");
        let mut device = self.device.borrow_mut();
        let mut watcher = Watcher::new(&mut ops, DEVICE);
        let ended = device.mux.end_round(Instant::now(), &mut watcher);
        device.check(ended, &mut watcher);
        events
    }

    /// What ended the device.
    pub fn failure(&self) -> Option<String> {
        self.device.borrow().failure.as_ref().map(|error| format!("{error:#}"))
    }

    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// When the device wants to be woken.
    pub fn deadline(&self) -> Option<Instant> {
        self.device.borrow().mux.next_deadline()
    }

    /// The size of everything the device holds.
    pub fn look(&self) -> Holdings {
        let mux = &self.device.borrow().mux;
        let live: Vec<&Entry> = mux.table.entries.iter().flatten().collect();
        Holdings {
            connections: live.len(),
            known: mux.table.by_ports.len(),
            slots: mux.table.entries.len(),
            free: mux.table.free.len(),
            resets: mux.resets.len(),
            resets_capacity: mux.resets.capacity(),
            ready: mux.table.ready.clone(),
            queued: live.iter().filter(|entry| entry.queued).count(),
            most_bytes: live.iter().map(|entry| entry.conn.for_host().len()).max().unwrap_or(0),
        }
    }

    /// Sends a packet with the header and the data in a descriptor each.
    pub fn send(&mut self, packet: Packet, data: &[u8]) {
        let packet = Packet { len: data.len() as u32, ..packet };
        if self.tx.room() < 2 {
            self.run();
            self.tx.returned();
        }
        match data {
            [] => self.tx.add(&[Buffer::Full(&packet.bytes())]),
            _ => self.tx.add(&[Buffer::Full(&packet.bytes()), Buffer::Full(data)]),
        };
    }

    /// Sends a packet and lets the device handle it.
    pub fn tell(&mut self, packet: Packet, data: &[u8]) {
        self.send(packet, data);
        self.run();
        self.tx.returned();
    }

    /// Offers this many receive buffers, each `len` bytes long.
    pub fn post(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            self.rx.add(&[Buffer::Empty(len)]);
        }
        self.run();
    }

    /// The packets the guest has received; their buffers are not made available again.
    pub fn received(&mut self) -> Vec<(Packet, Vec<u8>)> {
        let returned = self.rx.returned();
        let packets = returned.into_iter().map(|(_, len, bytes)| {
            assert!(len as usize >= 44, "a returned buffer without a packet");
            let packet = Packet::from_bytes(&bytes);
            assert_eq!(packet.len as usize, bytes.len() - 44);
            assert_eq!((packet.from.0, packet.to.0, packet.kind), (2, 3, 1));
            (packet, bytes[44..].to_vec())
        });
        packets.collect()
    }

    /// All packets there are for the guest, given buffers of 4 KiB: operation, connection, data.
    pub fn collect(&mut self) -> Vec<(u16, Ports, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let room = self.rx.room();
            self.post(room, 4096);
            let packets = self.received();
            if packets.is_empty() {
                return all;
            }
            all.extend(packets.into_iter().map(|(packet, data)| (packet.op, packet.ports(), data)));
        }
    }

    /// Makes the device use up the receive buffers that earlier steps have left.
    pub fn use_up_buffers(&mut self) {
        while self.rx.room() < RING.into() {
            self.tell(Packet::new(Op::CreditUpdate, Ports { host: 1, guest: 1 }), &[]);
            assert_eq!(self.received().len(), 1);
        }
    }

    /// As [`Bench::collect`], operations only.
    pub fn ops(&mut self) -> Vec<u16> {
        self.collect().into_iter().map(|(op, ..)| op).collect()
    }

    /// A client of the listener of this number.
    pub fn connect(&mut self, listener: usize) -> UnixStream {
        let client = UnixStream::connect_addr(&self.addresses[listener]).expect("connected");
        client.set_nonblocking(true).expect("non-blocking");
        client
    }

    /// A connection from the guest to a reserved port, accepted.
    pub fn open_offer(&mut self, host: u32) -> (Ports, UnixStream) {
        self.next_guest_port += 1;
        let ports = Ports { host, guest: self.next_guest_port };
        self.tell(Packet::new(Op::Request, ports), &[]);
        assert_eq!(self.collect(), [(Op::Response as u16, ports, vec![])]);
        (ports, self.reserved.remove(&host).expect("not taken yet"))
    }

    /// A connection from the guest for an outgoing flow, accepted.
    pub fn open_flow(&mut self) -> Ports {
        self.next_guest_port += 1;
        let ports = Ports { host: FLOW_PORT, guest: self.next_guest_port };
        self.tell(Packet::new(Op::Request, ports), &[]);
        assert_eq!(self.collect(), [(Op::Response as u16, ports, vec![])]);
        ports
    }

    /// A client's connection to the second listener, accepted by the guest.
    pub fn open_client(&mut self) -> (Ports, UnixStream) {
        let client = self.connect(1);
        self.run();
        let requests = self.collect();
        let [(op, ports, _)] = requests[..] else { panic!("one request: {requests:?}") };
        assert_eq!((op, ports.guest), (Op::Request as u16, LONE_SERVER));
        self.tell(Packet::new(Op::Response, ports), &[]);
        (ports, client)
    }
}

/// Receive and transmit.
fn rings(ram: &GuestRam) -> (Ring, Ring) {
    let slots = 32 << 20;
    (Ring::new(ram, 0x10_000, slots), Ring::new(ram, 0x20_000, slots + u64::from(RING) * SLOT))
}

fn fresh_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("mote-mux-test-{}-{number}", std::process::id());
    SocketAddr::from_abstract_name(name).expect("an address")
}

/// The size of what the device holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    pub connections: usize,
    pub known: usize,
    pub slots: usize,
    pub free: usize,
    pub resets: usize,
    pub resets_capacity: usize,
    ready: VecDeque<usize>,
    queued: usize,
    /// For any one host socket.
    pub most_bytes: usize,
}

impl Holdings {
    /// Checks what must hold at any time.
    fn check(&self) {
        assert_eq!(self.connections, self.known, "each connection is known by its ports");
        assert_eq!(self.connections + self.free, self.slots, "each slot is in use or free");
        assert!(self.resets <= MAX_RESETS, "waiting resets are bounded");
        let mut ready: Vec<usize> = self.ready.iter().copied().collect();
        ready.sort_unstable();
        ready.dedup();
        assert_eq!(ready.len(), self.ready.len(), "nobody stands in line twice");
        assert_eq!(ready.len(), self.queued, "who stands in line knows it");
    }
}
