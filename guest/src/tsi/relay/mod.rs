//! The process that serves the box's flows: one thread around one epoll, apart from PID 1, so that
//! a box's traffic never keeps it from its other work, nor takes it along.
//!
//! ```text
//!   outgoing TCP:  Asking ── the host has connected ──▶ Answered ── accept ──▶ Stream
//!   published:     Greeting ── client known ──▶ Connecting ── server found ──▶ Stream
//!   UDP:           Datagrams
//! ```

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket,
};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use mote_agent::flow::{FLOW_PORT, PUBLISHED_LEN, Published, REQUEST_LEN, Request, STATUS_LEN};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::datagrams::{Datagrams, Received};
use super::packet::{self, Unreachable};
use super::program::{AGENT_PORT, Event, Id, Original, Programs};
use super::stream::{Progress, SCRATCH_LEN, Stream};
use crate::sys::net;

/// How long a client of a published port may take to be named by the host, and an application to
/// answer its own SYN's answer: at once, unless there is too much else to do.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
/// How long the host may take nothing before the rest of what the box has sent is given up.
const DRAIN_PATIENCE: Duration = Duration::from_millis(400);
/// How often that is looked at, in milliseconds.
const DRAIN_STEP_MS: i32 = 50;
/// How often time limits are looked after, while there are any.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Most events, connections and datagrams handled before others get their turn.
const BATCH: usize = 64;

/// Everything that comes from one application's socket, or one client.
#[derive(Debug)]
enum Flow {
    /// The host is being asked to connect; the application waits.
    Asking { vsock: File, id: Id, original: Original, syn: Vec<u8>, asked: bool, status: Vec<u8> },
    /// The host has connected; the application's SYN is on its way to the listener.
    Answered { vsock: File, id: Id, since: Instant },
    /// The host has yet to say who the client is, and for which port.
    Greeting { vsock: File, greeting: Vec<u8>, since: Instant },
    /// The box's server is being looked for.
    Connecting { vsock: File, tcp: TcpStream, published: Published, id: Id, over_ip6: bool },
    /// Bytes flow.
    Stream { stream: Box<Stream>, id: Id, is_published: bool },
    /// Datagrams flow.
    Datagrams { flow: Box<Datagrams>, id: Id, source: SocketAddrV6, cookie: u64, released: bool },
}

/// Which of a flow's sockets an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Vsock,
    Tcp,
}

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Events,
    Listener,
    Datagrams,
    Published,
    Lifeline,
    Flow { slot: usize, generation: u32, side: Side },
}

const SIDE_BIT: u64 = 1 << 31;
const FIRST_FIXED: u64 = SIDE_BIT - 16;

impl Token {
    fn to_data(self) -> u64 {
        match self {
            Token::Events => FIRST_FIXED,
            Token::Listener => FIRST_FIXED + 1,
            Token::Datagrams => FIRST_FIXED + 2,
            Token::Published => FIRST_FIXED + 3,
            Token::Lifeline => FIRST_FIXED + 4,
            Token::Flow { slot, generation, side } => {
                let side = if side == Side::Tcp { SIDE_BIT } else { 0 };
                u64::from(generation) << 32 | side | slot as u64
            }
        }
    }

    fn from_data(data: u64) -> Self {
        match data {
            FIRST_FIXED => Token::Events,
            n if n == FIRST_FIXED + 1 => Token::Listener,
            n if n == FIRST_FIXED + 2 => Token::Datagrams,
            n if n == FIRST_FIXED + 3 => Token::Published,
            n if n == FIRST_FIXED + 4 => Token::Lifeline,
            _ => Token::Flow {
                slot: (data & (SIDE_BIT - 1)) as usize,
                generation: (data >> 32) as u32,
                side: if data & SIDE_BIT != 0 { Side::Tcp } else { Side::Vsock },
            },
        }
    }
}

/// A place for a flow. Events of an earlier one have an earlier generation.
#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    flow: Option<Flow>,
    /// Stands in `Relay::again`.
    queued: bool,
}

/// Where applications are redirected to, and what sends packets to them.
#[derive(Debug)]
pub struct Sockets {
    listener: TcpListener,
    datagrams: UdpSocket,
    raw: net::RawSockets,
}

impl Sockets {
    /// Opens them all; the listeners are bound to the agent's port.
    ///
    /// # Errors
    /// If the kernel refuses one of them.
    pub fn open() -> io::Result<Self> {
        Ok(Sockets {
            listener: net::tcp_listen(AGENT_PORT)?,
            datagrams: net::datagram_socket(AGENT_PORT)?,
            raw: net::RawSockets::open()?,
        })
    }
}

/// The process's state.
pub struct Relay<'a> {
    programs: Programs,
    outgoing: Option<&'a Sockets>,
    published: Option<&'a File>,
    epoll: Epoll,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Outgoing TCP flows, from SYN to end.
    by_id: HashMap<Id, usize>,
    /// UDP flows by what datagrams say, and by socket.
    by_source: HashMap<(Id, SocketAddrV6), usize>,
    by_cookie: HashMap<u64, Vec<usize>>,
    /// Flows whose turn comes again.
    again: VecDeque<usize>,
    sweep_at: Option<Instant>,
    last_published: u32,
    draining: bool,
    /// While draining: how much the host has taken, and since when no more.
    progress: Option<(u64, Instant)>,
    scratch: Vec<u8>,
}

impl<'a> Relay<'a> {
    /// Prepares to serve the flows that `programs` know of.
    pub fn new(
        programs: Programs,
        outgoing: Option<&'a Sockets>,
        published: Option<&'a File>,
        lifeline: &File,
    ) -> io::Result<Self> {
        let relay = Relay {
            programs,
            outgoing,
            published,
            epoll: Epoll::new()?,
            slots: Vec::new(),
            free: Vec::new(),
            by_id: HashMap::new(),
            by_source: HashMap::new(),
            by_cookie: HashMap::new(),
            again: VecDeque::new(),
            sweep_at: None,
            last_published: 0,
            draining: false,
            progress: None,
            scratch: vec![0; SCRATCH_LEN],
        };
        if let Some(Sockets { listener, datagrams, .. }) = outgoing {
            relay.watch(relay.programs.events(), EventSet::IN, Token::Events)?;
            relay.watch(listener.as_raw_fd(), EventSet::IN, Token::Listener)?;
            relay.watch(datagrams.as_raw_fd(), EventSet::IN, Token::Datagrams)?;
        }
        if let Some(published) = published {
            relay.watch(published.as_raw_fd(), EventSet::IN, Token::Published)?;
        }
        // Once: its end would stay readable.
        let once = EventSet::IN | EventSet::EDGE_TRIGGERED;
        relay.watch(lifeline.as_raw_fd(), once, Token::Lifeline)?;
        Ok(relay)
    }

    /// Serves until PID 1 closes its end of the lifeline, and then until everything that
    /// applications have sent has gone to the host.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = vec![EpollEvent::default(); BATCH];
        while !(self.draining && self.is_drained()) {
            let count = match self.epoll.wait(self.timeout_ms(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                self.handle(Token::from_data(event.data()), event.event_set());
            }
            for _ in 0..self.again.len() {
                if let Some(slot) = self.again.pop_front() {
                    self.slots[slot].queued = false;
                    self.advance(slot);
                }
            }
            let now = Instant::now();
            if self.sweep_at.is_some_and(|at| now >= at) {
                self.sweep(now);
            }
        }
        Ok(())
    }

    fn timeout_ms(&self) -> i32 {
        if !self.again.is_empty() {
            return 0;
        }
        if self.draining {
            return DRAIN_STEP_MS;
        }
        self.sweep_at.map_or(-1, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
            i32::try_from(left).unwrap_or(i32::MAX)
        })
    }

    fn handle(&mut self, token: Token, set: EventSet) {
        match token {
            Token::Events => self.take_events(),
            Token::Listener => drop(self.accept_applications()),
            Token::Datagrams => drop(self.take_datagrams()),
            Token::Published => self.accept_clients(),
            Token::Lifeline => self.draining = true,
            Token::Flow { slot, generation, side } => {
                let Some(at) = self.slots.get_mut(slot) else { return };
                if at.generation != generation {
                    return;
                }
                if let Some(Flow::Stream { stream, .. }) = &mut at.flow {
                    let ready = match side {
                        Side::Vsock => &mut stream.vsock_ready,
                        Side::Tcp => &mut stream.tcp_ready,
                    };
                    let over = EventSet::HANG_UP | EventSet::ERROR;
                    ready.readable |= set.intersects(EventSet::IN | EventSet::READ_HANG_UP | over);
                    ready.writable |= set.intersects(EventSet::OUT | over);
                }
                self.advance(slot);
            }
        }
    }

    // ---- flows and their places --------------------------------------------------------------

    fn watch(&self, fd: RawFd, set: EventSet, token: Token) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token.to_data()))
    }

    fn watch_flow(&self, fd: RawFd, slot: usize, side: Side) -> io::Result<()> {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let generation = self.slots[slot].generation;
        self.watch(fd, set, Token::Flow { slot, generation, side })
    }

    /// Finds a place for a flow with this vsock side, and watches that.
    fn place(&mut self, vsock: RawFd) -> io::Result<usize> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        self.slots[slot].generation = self.slots[slot].generation.wrapping_add(1);
        if let Err(error) = self.watch_flow(vsock, slot, Side::Vsock) {
            self.free.push(slot);
            return Err(error);
        }
        Ok(slot)
    }

    /// Clears up after a flow that is gone.
    fn release(&mut self, slot: usize) {
        self.slots[slot].generation = self.slots[slot].generation.wrapping_add(1);
        self.free.push(slot);
    }

    fn call_again(&mut self, slot: usize) {
        if !std::mem::replace(&mut self.slots[slot].queued, true) {
            self.again.push_back(slot);
        }
    }

    fn forget_datagrams(&mut self, slot: usize, id: Id, source: SocketAddrV6, cookie: u64) {
        self.by_source.remove(&(id, source));
        if let Some(slots) = self.by_cookie.get_mut(&cookie) {
            slots.retain(|known| *known != slot);
            if slots.is_empty() {
                self.by_cookie.remove(&cookie);
            }
        }
    }

    /// Has time limits looked after.
    fn limit_time(&mut self) {
        self.sweep_at.get_or_insert_with(|| Instant::now() + SWEEP_INTERVAL);
    }

    /// Does what there is to do for a flow.
    fn advance(&mut self, slot: usize) {
        let Some(flow) = self.slots[slot].flow.take() else { return };
        match self.step(slot, flow) {
            Some(flow) => self.slots[slot].flow = Some(flow),
            None => self.release(slot),
        }
    }

    /// A flow after what can be done for it; `None` once it is gone.
    fn step(&mut self, slot: usize, flow: Flow) -> Option<Flow> {
        match flow {
            Flow::Asking { vsock, id, original, syn, asked, status } => {
                self.ask(vsock, id, original, syn, asked, status)
            }
            // Whatever comes from the host is for the application, once that is there.
            Flow::Answered { .. } => Some(flow),
            Flow::Greeting { vsock, greeting, since } => self.greet(slot, vsock, greeting, since),
            Flow::Connecting { vsock, tcp, published, id, over_ip6 } => {
                self.connect(slot, vsock, tcp, published, id, over_ip6)
            }
            Flow::Stream { mut stream, id, is_published } => {
                let progress = stream.pump(&mut self.scratch);
                match progress {
                    Progress::Waiting => {}
                    Progress::More => self.call_again(slot),
                    Progress::Over | Progress::Broken => {
                        if is_published {
                            self.programs.forget(id);
                        } else {
                            self.by_id.remove(&id);
                        }
                        if progress == Progress::Broken {
                            stream.break_off();
                        }
                        return None;
                    }
                }
                Some(Flow::Stream { stream, id, is_published })
            }
            Flow::Datagrams { mut flow, id, source, cookie, released } => {
                if self.move_datagrams(slot, &mut flow, id, source, released) {
                    return Some(Flow::Datagrams { flow, id, source, cookie, released });
                }
                self.forget_datagrams(slot, id, source, cookie);
                None
            }
        }
    }

    // ---- outgoing TCP --------------------------------------------------------------------------

    fn take_events(&mut self) {
        for _ in 0..BATCH {
            match self.programs.next_event() {
                Some(Event::Syn { id, original, packet }) => self.ask_host(id, original, packet),
                Some(Event::Released { id, cookie }) => self.released(id, cookie),
                Some(Event::Replaced(id)) => self.replaced(id),
                None => return,
            }
        }
    }

    fn ask_host(&mut self, id: Id, original: Original, syn: Vec<u8>) {
        if self.draining {
            return;
        }
        let placed = net::vsock_connect(FLOW_PORT).and_then(|vsock| {
            let slot = self.place(vsock.as_raw_fd())?;
            Ok((vsock, slot))
        });
        match placed {
            Ok((vsock, slot)) => {
                self.by_id.insert(id, slot);
                let status = Vec::with_capacity(STATUS_LEN);
                let flow = Flow::Asking { vsock, id, original, syn, asked: false, status };
                self.slots[slot].flow = Some(flow);
            }
            Err(_) => self.refuse(id, &syn, Unreachable::Network),
        }
    }

    fn ask(
        &mut self,
        mut vsock: File,
        id: Id,
        original: Original,
        syn: Vec<u8>,
        mut asked: bool,
        mut status: Vec<u8>,
    ) -> Option<Flow> {
        if !asked {
            let Original { destination, protocol, .. } = original;
            match vsock.write(&Request { protocol, destination }.encode()) {
                // A new connection has room for this much.
                Ok(_) => asked = true,
                Err(error) if net::is_connecting(&vsock, &error) => {}
                Err(_) => {
                    // No host port, or no room for more flows.
                    self.by_id.remove(&id);
                    self.refuse(id, &syn, Unreachable::Network);
                    return None;
                }
            }
        }
        if asked {
            match fill(&mut vsock, &mut status, STATUS_LEN) {
                Ok(true) => {
                    let errno = u16::from_be_bytes([status[0], status[1]]);
                    if errno == 0 {
                        self.programs.open(id);
                        if let Some(packet) = packet::complete_tcp(&syn) {
                            self.inject(&packet);
                        }
                        self.limit_time();
                        return Some(Flow::Answered { vsock, id, since: Instant::now() });
                    }
                    self.by_id.remove(&id);
                    if let Some(why) = Unreachable::from_errno(errno) {
                        self.refuse(id, &syn, why);
                    }
                    return None;
                }
                Ok(false) => {}
                Err(_) => {
                    self.by_id.remove(&id);
                    self.refuse(id, &syn, Unreachable::Network);
                    return None;
                }
            }
        }
        Some(Flow::Asking { vsock, id, original, syn, asked, status })
    }

    /// Has connect(2) fail.
    fn refuse(&mut self, id: Id, syn: &[u8], why: Unreachable) {
        // Should the socket be busy at this moment, its next SYN asks again.
        self.programs.rearm(id);
        let answer = match why {
            Unreachable::Port => packet::reset(syn),
            _ => packet::unreachable(syn, why),
        };
        if let Some(packet) = answer {
            self.inject(&packet);
        }
    }

    fn inject(&self, packet: &packet::Packet) {
        if let Some(outgoing) = self.outgoing {
            // What is lost here is lost as on any network: the sender tries again.
            let _ = outgoing.raw.send(&packet.bytes, packet.destination);
        }
    }

    /// Takes applications' connections; `false` once none is left.
    fn accept_applications(&mut self) -> bool {
        let Some(outgoing) = self.outgoing else { return false };
        for _ in 0..BATCH {
            let Ok(tcp) = net::accept(&outgoing.listener) else { return false };
            let tcp = TcpStream::from(OwnedFd::from(tcp));
            let slot = tcp.local_addr().ok().and_then(|address| {
                let SocketAddr::V6(address) = address else { return None };
                let id = Id::of(*address.ip())?;
                self.by_id.get(&id).copied()
            });
            match slot.map(|slot| (slot, self.slots[slot].flow.take())) {
                Some((slot, Some(Flow::Answered { vsock, id, .. }))) => {
                    if self.watch_flow(tcp.as_raw_fd(), slot, Side::Tcp).is_err() {
                        self.by_id.remove(&id);
                        self.release(slot);
                        continue;
                    }
                    let mut stream = Box::new(Stream::new(vsock, tcp));
                    if self.programs.original(id).is_none() {
                        // The application has closed its socket already.
                        stream.desert();
                    }
                    self.slots[slot].flow = Some(Flow::Stream { stream, id, is_published: false });
                    self.advance(slot);
                }
                other => {
                    if let Some((slot, flow)) = other {
                        self.slots[slot].flow = flow;
                    }
                    // Nobody was asked for this one.
                    let _ = net::reset_on_close(&tcp);
                }
            }
        }
        true
    }

    /// An application has closed a socket.
    fn released(&mut self, id: Option<Id>, cookie: u64) {
        // What it sent before counts.
        while self.take_datagrams() {}
        if let Some(id) = id {
            self.programs.forget(id);
        }
        if let Some(slot) = id.and_then(|id| self.by_id.get(&id).copied()) {
            match &mut self.slots[slot].flow {
                Some(Flow::Stream { stream, .. }) => {
                    stream.desert();
                    self.advance(slot);
                }
                Some(Flow::Asking { .. }) => self.drop_asking(slot),
                // It may have connected, sent something, and be waiting to be accepted.
                _ => {}
            }
        }
        for slot in self.by_cookie.get(&cookie).cloned().unwrap_or_default() {
            self.end_datagrams(slot);
        }
    }

    /// A socket has connected anew, to somewhere else.
    fn replaced(&mut self, id: Id) {
        while self.take_datagrams() {}
        self.programs.forget(id);
        if let Some(slot) = self.by_id.get(&id).copied() {
            self.drop_asking(slot);
        }
        let slots: Vec<usize> = self
            .by_source
            .iter()
            .filter(|((known, _), _)| *known == id)
            .map(|(_, slot)| *slot)
            .collect();
        for slot in slots {
            self.end_datagrams(slot);
        }
    }

    /// Nobody waits for the host's answer any more.
    fn drop_asking(&mut self, slot: usize) {
        if let Some(Flow::Asking { id, .. }) = &self.slots[slot].flow {
            let id = *id;
            self.slots[slot].flow = None;
            self.by_id.remove(&id);
            self.release(slot);
        }
    }

    /// Nothing more comes from the application.
    fn end_datagrams(&mut self, slot: usize) {
        if let Some(Flow::Datagrams { released, .. }) = &mut self.slots[slot].flow {
            *released = true;
            self.advance(slot);
        }
    }

    // ---- UDP -----------------------------------------------------------------------------------

    /// Takes applications' datagrams; `false` once none is left.
    fn take_datagrams(&mut self) -> bool {
        let Some(outgoing) = self.outgoing else { return false };
        for _ in 0..BATCH {
            let mut scratch = std::mem::take(&mut self.scratch);
            let received = net::receive_datagram(&outgoing.datagrams, &mut scratch);
            let failed = match &received {
                Ok((len, source, destination)) => Id::of(*destination)
                    .and_then(|id| self.send_datagram(id, *source, &scratch[..*len])),
                Err(_) => None,
            };
            self.scratch = scratch;
            if let Some(slot) = failed {
                // Whatever the host has said about it is read first.
                self.advance(slot);
                self.drop_datagrams(slot);
            }
            if received.is_err() {
                return false;
            }
        }
        true
    }

    /// Sends a datagram on its way; the flow that turns out to have failed.
    fn send_datagram(&mut self, id: Id, source: SocketAddrV6, datagram: &[u8]) -> Option<usize> {
        let now = Instant::now();
        let slot = match self.by_source.get(&(id, source)) {
            Some(slot) => *slot,
            None => self.new_datagrams(id, source, now)?,
        };
        match &mut self.slots[slot].flow {
            Some(Flow::Datagrams { flow, .. }) => flow.send(datagram, now).err().map(|_| slot),
            _ => None,
        }
    }

    fn drop_datagrams(&mut self, slot: usize) {
        if let Some(Flow::Datagrams { id, source, cookie, .. }) = &self.slots[slot].flow {
            let (id, source, cookie) = (*id, *source, *cookie);
            self.slots[slot].flow = None;
            self.forget_datagrams(slot, id, source, cookie);
            self.release(slot);
        }
    }

    fn new_datagrams(&mut self, id: Id, source: SocketAddrV6, now: Instant) -> Option<usize> {
        let Original { cookie, destination, protocol } = self.programs.original(id)?;
        let vsock = net::vsock_connect(FLOW_PORT).ok()?;
        let slot = self.place(vsock.as_raw_fd()).ok()?;
        let request: [u8; REQUEST_LEN] = Request { protocol, destination }.encode();
        let flow = Box::new(Datagrams::new(vsock, request, now));
        self.by_source.insert((id, source), slot);
        self.by_cookie.entry(cookie).or_default().push(slot);
        self.slots[slot].flow = Some(Flow::Datagrams { flow, id, source, cookie, released: false });
        self.limit_time();
        Some(slot)
    }

    /// Serves a flow of datagrams; `false` at its end.
    fn move_datagrams(
        &mut self,
        slot: usize,
        flow: &mut Datagrams,
        id: Id,
        source: SocketAddrV6,
        released: bool,
    ) -> bool {
        let Some(outgoing) = self.outgoing else { return false };
        let mut scratch = std::mem::take(&mut self.scratch);
        let received = flow.receive(&mut scratch, Instant::now(), |received| match received {
            Received::Datagram(bytes) => {
                let from = if source.ip().to_ipv4_mapped().is_some() {
                    id.ip4().to_ipv6_mapped()
                } else {
                    id.ip6()
                };
                // As on any network, a receiver without room loses it.
                let _ = net::send_datagram(&outgoing.datagrams, bytes, from, source);
            }
            Received::Error(errno) => {
                if let Some(why) = Unreachable::from_errno(errno) {
                    self.tell_sender(id, source, why);
                }
            }
        });
        self.scratch = scratch;
        let sent = flow.flush();
        if released && flow.has_sent_all() {
            // In order, so that the host sends them all.
            let _ = net::shutdown_write(flow.socket());
            return false;
        }
        if received.as_ref().is_ok_and(|more| *more) {
            self.call_again(slot);
        }
        received.is_ok() && sent.is_ok()
    }

    /// Has the next call on the application's socket fail.
    fn tell_sender(&self, id: Id, source: SocketAddrV6, why: Unreachable) {
        let ip = source.ip().to_canonical();
        let flow = match ip {
            IpAddr::V4(_) => IpAddr::V4(id.ip4()),
            IpAddr::V6(_) => IpAddr::V6(id.ip6()),
        };
        let (source, flow) =
            (SocketAddr::new(ip, source.port()), SocketAddr::new(flow, AGENT_PORT));
        if let Some(headers) = packet::datagram_headers(source, flow)
            && let Some(packet) = packet::unreachable(&headers, why)
        {
            self.inject(&packet);
        }
    }

    // ---- published ports -----------------------------------------------------------------------

    fn accept_clients(&mut self) {
        let Some(listener) = self.published else { return };
        for _ in 0..BATCH {
            let Ok(vsock) = net::accept(listener) else { return };
            let Ok(slot) = self.place(vsock.as_raw_fd()) else { continue };
            let greeting = Vec::with_capacity(PUBLISHED_LEN);
            let since = Instant::now();
            self.slots[slot].flow = Some(Flow::Greeting { vsock, greeting, since });
            self.limit_time();
            self.advance(slot);
        }
    }

    fn greet(
        &mut self,
        slot: usize,
        mut vsock: File,
        mut greeting: Vec<u8>,
        since: Instant,
    ) -> Option<Flow> {
        match fill(&mut vsock, &mut greeting, PUBLISHED_LEN) {
            Ok(false) => return Some(Flow::Greeting { vsock, greeting, since }),
            Ok(true) => {}
            Err(_) => return None,
        }
        let published = Published::decode(greeting.as_slice().try_into().ok()?);
        self.last_published = self.last_published.wrapping_add(1);
        let id = Id::published(self.last_published);
        self.programs.name_client(id, published.client);
        self.seek_server(slot, vsock, published, id, false)
    }

    /// Tries to connect to the server on one of the box's own addresses.
    fn seek_server(
        &mut self,
        slot: usize,
        vsock: File,
        published: Published,
        id: Id,
        over_ip6: bool,
    ) -> Option<Flow> {
        let (from, to): (IpAddr, IpAddr) = if over_ip6 {
            (id.ip6().into(), Ipv6Addr::LOCALHOST.into())
        } else {
            (id.ip4().into(), Ipv4Addr::LOCALHOST.into())
        };
        let to = SocketAddr::new(to, published.guest_port);
        let connecting = net::tcp_connect(from, to).and_then(|tcp| {
            self.watch_flow(tcp.as_raw_fd(), slot, Side::Tcp)?;
            Ok(TcpStream::from(tcp))
        });
        match connecting {
            Ok(tcp) => Some(Flow::Connecting { vsock, tcp, published, id, over_ip6 }),
            Err(_) if !over_ip6 => self.seek_server(slot, vsock, published, id, true),
            Err(_) => {
                self.programs.forget(id);
                None
            }
        }
    }

    fn connect(
        &mut self,
        slot: usize,
        vsock: File,
        tcp: TcpStream,
        published: Published,
        id: Id,
        over_ip6: bool,
    ) -> Option<Flow> {
        match (tcp.take_error(), tcp.peer_addr()) {
            (Ok(None), Ok(_)) => {
                let stream = Box::new(Stream::new(vsock, tcp));
                self.call_again(slot);
                Some(Flow::Stream { stream, id, is_published: true })
            }
            (Ok(None), Err(_)) => Some(Flow::Connecting { vsock, tcp, published, id, over_ip6 }),
            _ if !over_ip6 => {
                // A server may listen on IPv6 alone.
                drop(tcp);
                self.seek_server(slot, vsock, published, id, true)
            }
            _ => {
                // Dropping the vsock tells the host that nobody listens.
                self.programs.forget(id);
                None
            }
        }
    }

    // ---- ends ----------------------------------------------------------------------------------

    /// Gives up what has taken too long.
    fn sweep(&mut self, now: Instant) {
        self.sweep_at = None;
        for slot in 0..self.slots.len() {
            let expired = match &self.slots[slot].flow {
                Some(Flow::Answered { since, .. } | Flow::Greeting { since, .. }) => {
                    now >= *since + HANDSHAKE_LIMIT
                }
                Some(Flow::Datagrams { flow, .. }) => now >= flow.idle_at(),
                _ => continue,
            };
            self.limit_time();
            if !expired {
                continue;
            }
            match self.slots[slot].flow.take() {
                Some(Flow::Answered { id, .. }) => drop(self.by_id.remove(&id)),
                Some(Flow::Datagrams { id, source, cookie, .. }) => {
                    self.forget_datagrams(slot, id, source, cookie);
                }
                // A client that was not named in time.
                _ => {}
            }
            self.release(slot);
        }
    }

    /// Whether everything that applications have sent has gone to the host, or it takes nothing.
    fn is_drained(&mut self) -> bool {
        while self.accept_applications() {}
        while self.take_datagrams() {}
        let now = Instant::now();
        let mut sent_all = true;
        let mut unsent = 0;
        for slot in &self.slots {
            match &slot.flow {
                Some(Flow::Stream { stream, .. }) => {
                    sent_all &= stream.has_sent_all();
                    unsent += stream.taken();
                }
                Some(Flow::Datagrams { flow, .. }) => sent_all &= flow.has_sent_all(),
                Some(Flow::Answered { .. }) => sent_all = false,
                _ => {}
            }
        }
        if sent_all {
            return true;
        }
        let (progress, at) = self.progress.get_or_insert((unsent, now));
        if *progress != unsent {
            (*progress, *at) = (unsent, now);
        }
        now >= *at + DRAIN_PATIENCE
    }
}

/// Reads until `bytes` has `len` bytes; `false` while more are to come.
fn fill(from: &mut File, bytes: &mut Vec<u8>, len: usize) -> io::Result<bool> {
    let mut buffer = [0; 64];
    while bytes.len() < len {
        match from.read(&mut buffer[..len - bytes.len()]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => bytes.extend(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
