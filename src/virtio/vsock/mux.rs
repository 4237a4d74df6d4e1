//! The vsock device at work, in the main loop: moves packets between the queues and the
//! connections, and bytes between the connections and their host ends.
//!
//! Connections' sockets are non-blocking and registered once, edge-triggered; one that has said "no
//! more for now" is left alone until epoll speaks of it again. Listeners are level-triggered, and
//! taken out while they rest. Everything a guest or a client can
//! make this hold is bounded: connections, bytes per connection, waiting resets.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use event_manager::{EventOps, EventSet, Events};
use mote_agent::flow::{FLOW_PORT, PUBLISH_PORT, Protocol, Published, REQUEST_LEN, Request};
use vmm_sys_util::eventfd::EventFd;

use super::conn::Conn;
use super::host_end::HostEnd;
use super::packet::{Foreign, HEADER_LEN, Header, Op, Ports};
use crate::memory::GuestRam;
use crate::policy::Policy;
use crate::token::Token;
use crate::virtio::Activation;
use crate::virtio::buffers::{Reader, Writer};
use crate::virtio::queue::{Chain, ServedQueue};

/// Most connections at once; clients beyond are refused. The agent's own connections always find
/// room, of which there are no more than offers: without them there is no agent.
pub const MAX_CONNECTIONS: usize = 4096;
/// Most of them that are flows, outgoing and published: the rest is for the clients of the box's own
/// sockets, who must get in whatever the box does on the network.
const MAX_FLOWS: usize = 3072;
/// Most of them that are the clients': they cannot take its flows from the box.
const MAX_CLIENTS: usize = MAX_CONNECTIONS - MAX_FLOWS;
/// Most flows while clients of published ports are accepted: they cannot take the box's own
/// connections from it.
const MAX_FLOWS_FOR_CLIENTS: usize = MAX_FLOWS / 2;
/// How many connections may have [`conn::BUFFER_LEN`](super::conn::BUFFER_LEN) bytes each on the way to
/// their host sockets. Those beyond have [`SMALL_BUFFER_LEN`]: a guest that fills every buffer, which
/// takes thousands of peers that do not read or do not answer, costs mote some 125 MiB rather than a
/// GiB. The other way, to a guest that has no room for what came, it is some 75 MiB, or 200 MiB of the
/// largest datagrams.
const LARGE_BUFFERS: usize = 256;
/// See [`LARGE_BUFFERS`]. Four packets of Linux's.
const SMALL_BUFFER_LEN: usize = 16 * 1024;
/// Most resets that wait for room in the receive queue. A guest that provokes more and takes none
/// loses them.
const MAX_RESETS: usize = 1024;
/// Most data in one packet (Linux's `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PACKET: usize = 64 * 1024;
/// Most packets per queue before the main loop turns to other work.
const BATCH: usize = 256;
/// How long a client of the box's own sockets waits for a guest that is not up (contract §3).
const BOOT_LIMIT: Duration = Duration::from_secs(2);
/// How long it waits for one that is to answer: its kernel does so at once, when it runs.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long the guest may take to answer for a published port, or to say where an outgoing flow shall
/// go. It does so at once, too; but on a host with too much to do, a client that is only slow to
/// be served must not be reset.
const FLOW_LIMIT: Duration = Duration::from_secs(30);
/// How long a peer on the network may take nothing of what a flow has left that the guest has closed and
/// forgotten: there are only so many.
const ORPHAN_LIMIT: Duration = Duration::from_secs(600);
/// How long a listener rests when the host has no descriptor or memory for its next client: the
/// client goes on waiting, and asking again at once would be all that the main loop does.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// First port given to connections from the host; the guest's own start at 1024 too, but those are
/// a different set.
const FIRST_HOST_PORT: u32 = 1024;

/// The queues, while the driver lends them.
#[derive(Debug)]
struct Queues {
    ram: GuestRam,
    receive: ServedQueue,
    transmit: ServedQueue,
    /// Never used: it announces migrations.
    _event: ServedQueue,
}

/// A connection and its host end.
#[derive(Debug)]
struct Entry {
    conn: Conn,
    end: HostEnd,
    /// Stands in `Mux::ready`.
    queued: bool,
    /// Was an orphan when it was looked at last.
    orphaned: bool,
    /// Until when the guest may owe an answer, or a flow's request; or a peer may take nothing.
    due: Option<Instant>,
    /// The guest port to ask when the guest refuses the first one.
    fallback_port: Option<u32>,
}

impl Entry {
    /// Whether what `due` is for is still to come.
    fn is_owed(&self) -> bool {
        self.conn.is_requested() || self.end.is_awaiting() || self.is_orphan()
    }

    /// Whether this is a flow that only waits for its peer. A client of the box's own sockets may take
    /// as long as it likes.
    fn is_orphan(&self) -> bool {
        self.end.is_flow() && self.conn.is_forgotten()
    }
}

/// A listening host socket, non-blocking, whose clients are connected to the guest.
#[derive(Debug)]
pub enum Listener {
    /// One of the box's own sockets.
    Unix {
        /// The socket.
        socket: UnixListener,
        /// The guest's vsock port.
        guest_port: u32,
        /// The one to try when the guest refuses that.
        fallback_port: Option<u32>,
    },
    /// A published port. Its clients wait to be accepted until the guest's servers listen.
    Published {
        /// The socket.
        socket: TcpListener,
        /// The guest's TCP port.
        guest_port: u16,
    },
}

impl Listener {
    fn fd(&self) -> RawFd {
        match self {
            Listener::Unix { socket, .. } => socket.as_raw_fd(),
            Listener::Published { socket, .. } => socket.as_raw_fd(),
        }
    }
}

/// The device.
#[derive(Debug)]
pub struct Mux {
    queues: Option<Queues>,
    entries: Vec<Option<Entry>>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, usize>,
    /// Connections that may have something for the guest, first come first served.
    ready: VecDeque<usize>,
    resets: VecDeque<Header>,
    /// Connections that have more to write to their host sockets than one turn may take.
    unfinished: BTreeSet<usize>,
    /// Sockets for guest connections to these host ports, one each.
    offers: HashMap<u32, UnixStream>,
    /// Where outgoing flows may go; without, there are none.
    outgoing: Option<Policy>,
    /// How many of the connections are flows.
    flows: usize,
    listeners: Vec<Listener>,
    /// Which listeners are not watched, and until when; the one that is first comes first.
    resting: VecDeque<(Instant, usize)>,
    /// By when which slots are owed something; some have it already.
    deadlines: BTreeSet<(Instant, usize)>,
    /// Whether the guest's servers listen; until then clients' connections wait.
    guest_ready: bool,
    next_host_port: u32,
    buffer: Vec<u8>,
}

impl Mux {
    /// A device that connects the guest to `offers` (one connection per host port) and to where
    /// `outgoing` lets it go, and the clients of `listeners` to the guest.
    pub fn new(
        offers: HashMap<u32, UnixStream>,
        listeners: Vec<Listener>,
        outgoing: Option<Policy>,
    ) -> Self {
        Mux {
            queues: None,
            entries: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            unfinished: BTreeSet::new(),
            offers,
            outgoing,
            flows: 0,
            listeners,
            resting: VecDeque::new(),
            deadlines: BTreeSet::new(),
            guest_ready: false,
            next_host_port: FIRST_HOST_PORT,
            buffer: vec![0; MAX_PACKET],
        }
    }

    /// Starts watching the box's own sockets.
    pub fn register(&self, ops: &mut EventOps<'_>) -> Result<()> {
        self.watch_listeners(|listener| matches!(listener, Listener::Unix { .. }), ops)
    }

    fn watch_listeners(
        &self,
        which: impl Fn(&Listener) -> bool,
        ops: &mut EventOps<'_>,
    ) -> Result<()> {
        (0..self.listeners.len())
            .filter(|index| which(&self.listeners[*index]))
            .try_for_each(|index| self.watch_listener(index, ops))
    }

    fn watch_listener(&self, index: usize, ops: &mut EventOps<'_>) -> Result<()> {
        let token = Token::VsockListener(index as u32);
        let fd = self.listeners[index].fd();
        Ok(ops.add(Events::with_data_raw(fd, token.to_data(), EventSet::IN))?)
    }

    /// The guest's servers listen: asks for the connections of all clients that wait.
    pub fn guest_is_ready(&mut self, ops: &mut EventOps<'_>) -> Result<()> {
        if std::mem::replace(&mut self.guest_ready, true) {
            return Ok(());
        }
        self.watch_listeners(|listener| matches!(listener, Listener::Published { .. }), ops)?;
        // In the order they came, which is not that of the slots.
        let waiting: Vec<usize> = self.deadlines.iter().map(|(_, index)| *index).collect();
        for index in waiting {
            self.queue(index);
        }
        self.deliver(ops)
    }

    /// Takes the queues over.
    pub fn activate(&mut self, activation: Activation, ops: &mut EventOps<'_>) -> Result<()> {
        self.reset(ops)?;
        let Activation { ram, features, queues, interrupt, .. } = activation;
        let served: Vec<ServedQueue> = queues
            .into_iter()
            .map(|queue| ServedQueue::new(queue, features, &interrupt))
            .collect::<Result<_>>()?;
        let Ok([receive, transmit, event]) = <[ServedQueue; 3]>::try_from(served) else {
            bail!("the vsock device has three queues");
        };
        watch_kick(receive.kick(), Token::VsockReceive, ops)?;
        watch_kick(transmit.kick(), Token::VsockTransmit, ops)?;
        self.queues = Some(Queues { ram, receive, transmit, _event: event });
        self.transmit(ops)?;
        self.deliver(ops)
    }

    /// Gives the queues back. The guest knows no connection any more: all end, each once its host
    /// socket has been given all the guest had sent, except that clients which wait for an answer
    /// wait for the next driver's.
    pub fn reset(&mut self, ops: &mut EventOps<'_>) -> Result<()> {
        // What is left in a ring that is broken stays there.
        let _ = self.transmit(ops);
        if let Some(queues) = self.queues.take() {
            for queue in [&queues.receive, &queues.transmit] {
                ops.remove(Events::empty(queue.kick()))?;
            }
            self.on_each_connection(Conn::on_driver_reset, ops)?;
            self.resets.clear();
        }
        Ok(())
    }

    fn on_each_connection(
        &mut self,
        change: impl Fn(&mut Conn),
        ops: &mut EventOps<'_>,
    ) -> Result<()> {
        for index in 0..self.entries.len() {
            if let Some(entry) = &mut self.entries[index] {
                change(&mut entry.conn);
                self.flush_to_host(index, ops)?;
            }
        }
        Ok(())
    }

    /// Handles an event of the main loop. Errors are the device's end, not the process's: the
    /// guest's own doing, or a host without descriptors.
    pub fn handle(&mut self, token: Token, set: EventSet, ops: &mut EventOps<'_>) -> Result<()> {
        match token {
            Token::VsockTransmit => self.transmit(ops)?,
            Token::VsockReceive => {
                if let Some(queues) = &self.queues {
                    queues.receive.clear_kick();
                }
            }
            Token::VsockListener(index) => self.accept(index as usize, ops)?,
            Token::VsockConnection(index) => self.note_socket(index as usize, set, ops)?,
            _ => {}
        }
        Ok(())
    }

    /// Ends a round of events: does what is due by `now`, and gives the guest what there is for it.
    /// Once for all of them, because a guest can have each of very many events cost a full batch.
    pub fn end_round(&mut self, now: Instant, ops: &mut EventOps<'_>) -> Result<()> {
        self.expire(now, ops)?;
        self.deliver(ops)
    }

    /// When [`Mux::end_round`] has something to do next, whatever events come.
    pub fn next_deadline(&self) -> Option<Instant> {
        let owed = self.deadlines.first().map(|(due, _)| *due);
        let rested = self.resting.front().map(|(until, _)| *until);
        owed.into_iter().chain(rested).min()
    }

    /// Closes connections for which the guest, or an orphan's peer, has not done its part in time, and
    /// listens again where that had to rest.
    fn expire(&mut self, now: Instant, ops: &mut EventOps<'_>) -> Result<()> {
        while let Some((until, index)) = self.resting.front().copied()
            && now >= until
        {
            self.resting.pop_front();
            if self.watch_listener(index, ops).is_err() {
                // The host still has no room.
                self.resting.push_back((now + ACCEPT_PAUSE, index));
            }
        }
        while let Some((due, index)) = self.deadlines.first().copied()
            && now >= due
        {
            self.deadlines.pop_first();
            if let Some(entry) = &mut self.entries[index]
                && entry.is_orphan()
            {
                entry.end.try_to_write();
                self.flush_to_host(index, ops)?;
            }
            if let Some(entry) = &mut self.entries[index]
                && entry.is_owed()
                // Otherwise the peer has taken something.
                && entry.due == Some(due)
            {
                // At once, whether or not the guest ever takes the reset.
                entry.conn.vanish();
                let ports = entry.conn.ports();
                if entry.conn.is_announced() && !entry.conn.is_forgotten() {
                    self.refuse(ports);
                }
                self.remove_if_closed(index, ops)?;
            }
        }
        Ok(())
    }

    /// Gives up on offers that the guest has not taken, and on everything else: each host socket is
    /// closed once it has been given all the guest had sent; TCP connections that the guest has not
    /// ended are reset. Later clients find nobody.
    pub fn close(&mut self, ops: &mut EventOps<'_>) -> Result<()> {
        // What is left in a ring that is broken stays there.
        let _ = self.transmit(ops);
        self.offers.clear();
        self.outgoing = None;
        // Not watched: those that rest, and published ports before the guest was ready.
        for listener in self.listeners.drain(..) {
            let _ = ops.remove(Events::empty_raw(listener.fd()));
        }
        self.resting.clear();
        self.on_each_connection(Conn::on_reset, ops)
    }

    /// Whether all host sockets have been given all that the guest has sent.
    pub fn is_drained(&self) -> bool {
        self.entries.iter().flatten().all(|entry| entry.conn.for_host().is_empty())
    }

    // ---- from the guest ----------------------------------------------------------------------

    fn transmit(&mut self, ops: &mut EventOps<'_>) -> Result<()> {
        // Taken out while packets are handled: a packet may change anything else of the device.
        let Some(mut queues) = self.queues.take() else { return Ok(()) };
        let mut touched: BTreeSet<usize> =
            std::mem::take(&mut self.unfinished).into_iter().collect();
        let served = queues.transmit.serve(&queues.ram, BATCH, |chain| {
            touched.extend(self.take_packet(chain, &queues.ram, ops));
            0
        });
        self.queues = Some(queues);
        served?;
        for index in touched {
            self.flush_to_host(index, ops)?;
        }
        Ok(())
    }

    /// Handles one packet; returns the connection that may now have bytes for its host socket.
    fn take_packet(
        &mut self,
        chain: Chain<'_>,
        ram: &GuestRam,
        ops: &mut EventOps<'_>,
    ) -> Option<usize> {
        let mut reader = Reader::new(chain, ram).ok()?;
        let mut bytes = [0; HEADER_LEN];
        reader.read_exact(&mut bytes).ok()?;
        let header = match Header::from_guest(&bytes) {
            Ok(header) => header,
            Err(Foreign::Refuse(ports)) => {
                self.refuse(ports);
                return None;
            }
            Err(Foreign::Ignore) => return None,
        };
        let len = header.len as usize;
        let mut data = std::mem::take(&mut self.buffer);
        let complete = match header.op {
            Op::Data => {
                len <= MAX_PACKET && reader.read_exact(&mut data[..len.min(MAX_PACKET)]).is_ok()
            }
            _ => len == 0,
        };
        let touched = match self.by_ports.get(&header.ports).copied() {
            Some(index) if header.op == Op::Reset && self.ask_elsewhere(index) => Some(index),
            Some(index) if self.is_forgotten(index) => {
                if header.op != Op::Reset {
                    self.refuse(header.ports);
                }
                None
            }
            Some(index) => {
                if let Some(entry) = &mut self.entries[index] {
                    if complete {
                        let data = if header.op == Op::Data { &data[..len] } else { &[] };
                        entry.conn.on_packet(&header, data);
                    } else {
                        entry.conn.abort();
                    }
                }
                // At once: what comes next in the queue may depend on it.
                self.take_flow_request(index, ops);
                Some(index)
            }
            None => {
                let refused = match header.op {
                    Op::Request => self.accept_guest(&header, ops).is_err(),
                    Op::Reset => false,
                    _ => true,
                };
                if refused {
                    self.refuse(header.ports);
                }
                None
            }
        };
        self.buffer = data;
        touched
    }

    /// Makes a connection that the guest asks for.
    fn accept_guest(&mut self, request: &Header, ops: &mut EventOps<'_>) -> Result<()> {
        let host_port = request.ports.host;
        let mut conn = Conn::accepted(request);
        let end = if host_port == FLOW_PORT
            && self.outgoing.is_some()
            && self.has_room_for_flow(MAX_FLOWS)
        {
            conn.set_abortable(true);
            HostEnd::awaiting()
        } else {
            let socket = self.offers.remove(&host_port).context("nobody listens on this port")?;
            HostEnd::unix(socket)?
        };
        self.insert(conn, end, None, ops)
    }

    /// Connects an outgoing flow, if this is one and it has come to be known where to.
    fn take_flow_request(&mut self, index: usize, ops: &mut EventOps<'_>) {
        let (Some(entry), Some(policy)) = (&mut self.entries[index], &self.outgoing) else {
            return;
        };
        let Entry { conn, end, .. } = entry;
        if !end.is_awaiting() || conn.is_closed() {
            return;
        }
        let request = match conn.all_for_host().first_chunk::<REQUEST_LEN>().copied() {
            Some(bytes) => Request::decode(&bytes),
            None if conn.guest_sends() => return,
            None => None,
        };
        let Some(Request { protocol, destination }) = request else { return conn.abort() };
        conn.host_took(REQUEST_LEN);
        // A datagram is sent when it is there: nothing later undoes it.
        conn.set_abortable(protocol == Protocol::Tcp);
        let connected = policy
            .resolve(protocol, destination)
            .map_err(io::Error::from_raw_os_error)
            .and_then(|destination| end.connect(protocol, destination))
            .and_then(|()| watch(end, index, ops));
        if let Err(error) = connected {
            end.refuse(&error, conn);
        }
    }

    fn has_room_for_flow(&self, limit: usize) -> bool {
        self.flows < limit && self.by_ports.len() < MAX_CONNECTIONS
    }

    /// Sends a request that the guest has refused to its other port, if it has one.
    fn ask_elsewhere(&mut self, index: usize) -> bool {
        let Some(entry) = self.entries[index].as_mut().filter(|e| e.conn.is_requested()) else {
            return false;
        };
        let Some(guest) = entry.fallback_port.take() else { return false };
        let refused = entry.conn.ports();
        let ports = Ports { host: self.free_host_port(guest), guest };
        self.by_ports.remove(&refused);
        self.by_ports.insert(ports, index);
        if let Some(entry) = &mut self.entries[index] {
            entry.conn.redirect(ports);
        }
        true
    }

    /// Whether the guest has reset this connection, which exists only for its host socket.
    fn is_forgotten(&self, index: usize) -> bool {
        self.entries[index].as_ref().is_some_and(|entry| entry.conn.is_forgotten())
    }

    fn refuse(&mut self, ports: Ports) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(Header::reset(ports));
        }
    }

    /// Writes what the guest sent to the host socket, as far as it takes it, and closes each
    /// direction that is over.
    fn flush_to_host(&mut self, index: usize, ops: &mut EventOps<'_>) -> Result<()> {
        let Some(entry) = self.entries.get_mut(index).and_then(Option::as_mut) else {
            return Ok(());
        };
        let left = entry.conn.len_for_host();
        let unfinished = entry.end.flush(&mut entry.conn);
        let made_progress = entry.conn.len_for_host() < left;
        let waits_anew = entry.is_orphan() && (made_progress || !entry.orphaned);
        entry.orphaned = entry.is_orphan();
        if unfinished {
            match &self.queues {
                Some(queues) => {
                    self.unfinished.insert(index);
                    queues.transmit.kick().write(1)?;
                }
                // The driver is gone, and what is left are datagrams, which may be lost.
                None => entry.conn.vanish(),
            }
        }
        if waits_anew {
            self.set_due(index, Instant::now() + ORPHAN_LIMIT);
        }
        self.queue(index);
        self.remove_if_closed(index, ops)
    }

    fn set_due(&mut self, index: usize, due: Instant) {
        let Some(entry) = &mut self.entries[index] else { return };
        if let Some(before) = entry.due.replace(due) {
            self.deadlines.remove(&(before, index));
        }
        self.deadlines.insert((due, index));
    }

    // ---- to the guest ------------------------------------------------------------------------

    fn deliver(&mut self, ops: &mut EventOps<'_>) -> Result<()> {
        let Some(mut queues) = self.queues.take() else { return Ok(()) };
        let delivered = self.deliver_to(&mut queues, ops);
        self.queues = Some(queues);
        delivered
    }

    fn deliver_to(&mut self, queues: &mut Queues, ops: &mut EventOps<'_>) -> Result<()> {
        let Queues { ram, receive, .. } = queues;
        let mut used = 0;
        while !(self.resets.is_empty() && self.ready.is_empty()) {
            if used == BATCH {
                // Come back after everybody else's turn.
                receive.kick().write(1)?;
                break;
            }
            let Some(chain) = receive.pop_or_wait(ram)? else { break };
            used += 1;
            let head = chain.head_index();
            let Ok(mut writer) = Writer::new(chain, ram) else {
                receive.push(ram, head, 0)?;
                continue;
            };
            // One that holds a header and no data would hold up those that have data to send.
            let space = writer.available_bytes().saturating_sub(HEADER_LEN).min(MAX_PACKET);
            if space == 0 {
                receive.push(ram, head, 0)?;
                continue;
            }
            let Some(header) = self.next_packet(space, ops)? else {
                receive.unpop();
                used -= 1;
                break;
            };
            let data = &self.buffer[..header.len as usize];
            let written =
                writer.write_all(&header.to_guest()).and_then(|()| writer.write_all(data));
            let len = if written.is_ok() { HEADER_LEN + data.len() } else { 0 };
            receive.push(ram, head, len as u32)?;
        }
        if used > 0 { receive.notify(ram) } else { Ok(()) }
    }

    /// The next packet for the guest; its data is at the start of `self.buffer`.
    fn next_packet(&mut self, space: usize, ops: &mut EventOps<'_>) -> Result<Option<Header>> {
        if let Some(reset) = self.resets.pop_front() {
            return Ok(Some(reset));
        }
        while let Some(index) = self.ready.pop_front() {
            let Some(entry) = self.entries[index].as_mut() else { continue };
            entry.queued = false;
            let Entry { conn, end, .. } = entry;
            let buffer = &mut self.buffer;
            let header = conn.next(space, |room| end.read(buffer, room));
            if header.is_some() {
                // There may be more; at the end of the line, so that nobody starves.
                self.queue(index);
            }
            self.remove_if_closed(index, ops)?;
            if header.is_some() {
                return Ok(header);
            }
        }
        Ok(None)
    }

    // ---- host sockets ------------------------------------------------------------------------

    fn note_socket(&mut self, index: usize, set: EventSet, ops: &mut EventOps<'_>) -> Result<()> {
        let Some(entry) = self.entries.get_mut(index).and_then(Option::as_mut) else {
            return Ok(());
        };
        let Entry { conn, end, .. } = entry;
        if let Err(error) = end.check_connecting() {
            unwatch(end, ops)?;
            end.refuse(&error, conn);
        }
        end.note_events(set, conn);
        self.flush_to_host(index, ops)
    }

    fn accept(&mut self, index: usize, ops: &mut EventOps<'_>) -> Result<()> {
        // None are left once the box is over.
        let Some(listener) = self.listeners.get(index) else { return Ok(()) };
        let accepted = match listener {
            Listener::Unix { socket, guest_port, fallback_port } => socket
                .accept()
                .map(|(socket, _)| (HostEnd::unix(socket), *guest_port, *fallback_port)),
            // The clients wait where they are.
            Listener::Published { .. } if !self.has_room_for_flow(MAX_FLOWS_FOR_CLIENTS) => {
                Err(ErrorKind::QuotaExceeded.into())
            }
            Listener::Published { socket, guest_port } => {
                socket.accept().map(|(socket, client)| {
                    let header = Published { guest_port: *guest_port, client };
                    (HostEnd::published(socket, header), PUBLISH_PORT, None)
                })
            }
        };
        let (end, guest, fallback_port) = match accepted {
            Ok(accepted) => accepted,
            // Level-triggered: what is still waiting comes again.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted
                ) =>
            {
                return Ok(());
            }
            Err(_) => {
                ops.remove(Events::empty_raw(listener.fd()))?;
                self.resting.push_back((Instant::now() + ACCEPT_PAUSE, index));
                return Ok(());
            }
        };
        // Dropped, so the client sees the end: there are too many, or it has gone already, or the
        // host cannot watch it.
        let has_room = match end {
            Ok(ref end) if end.is_flow() => self.by_ports.len() < MAX_CONNECTIONS,
            _ => self.by_ports.len() - self.flows < MAX_CLIENTS,
        };
        if has_room && let Ok(end) = end {
            let mut conn = Conn::requested(Ports { host: self.free_host_port(guest), guest });
            conn.set_abortable(end.is_flow());
            let _ = self.insert(conn, end, fallback_port, ops);
        }
        Ok(())
    }

    /// There is always one: ports are many more than connections.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = match host.wrapping_add(1) {
                next if next < FIRST_HOST_PORT => FIRST_HOST_PORT,
                next => next,
            };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn insert(
        &mut self,
        mut conn: Conn,
        mut end: HostEnd,
        fallback_port: Option<u32>,
        ops: &mut EventOps<'_>,
    ) -> Result<()> {
        if self.by_ports.len() >= LARGE_BUFFERS {
            conn.set_buffer_len(SMALL_BUFFER_LEN as u32);
            end.set_read_ahead(SMALL_BUFFER_LEN);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        if let Err(error) = watch(&end, index, ops) {
            self.free.push(index);
            return Err(error).context("watch a connection");
        }
        let limit = match end.is_flow() {
            true => FLOW_LIMIT,
            false if self.guest_ready => ANSWER_LIMIT,
            false => BOOT_LIMIT,
        };
        let entry = Entry { conn, end, queued: false, orphaned: false, due: None, fallback_port };
        let is_owed = entry.is_owed();
        self.flows += usize::from(entry.end.is_flow());
        self.by_ports.insert(entry.conn.ports(), index);
        self.entries[index] = Some(entry);
        if is_owed {
            self.set_due(index, Instant::now() + limit);
        }
        self.queue(index);
        Ok(())
    }

    /// Puts a connection in line for the guest, unless it waits for the guest's servers.
    fn queue(&mut self, index: usize) {
        if let Some(entry) = &mut self.entries[index]
            && (self.guest_ready || !entry.conn.is_requested())
            && !std::mem::replace(&mut entry.queued, true)
        {
            self.ready.push_back(index);
        }
    }

    fn remove_if_closed(&mut self, index: usize, ops: &mut EventOps<'_>) -> Result<()> {
        if !self.entries[index].as_ref().is_some_and(|entry| entry.conn.is_closed()) {
            return Ok(());
        }
        if let Some(entry) = self.entries[index].take() {
            unwatch(&entry.end, ops)?;
            self.flows -= usize::from(entry.end.is_flow());
            if let Some(due) = entry.due {
                self.deadlines.remove(&(due, index));
            }
            self.by_ports.remove(&entry.conn.ports());
            self.ready.retain(|ready| *ready != index);
            self.free.push(index);
        }
        Ok(())
    }
}

/// Starts watching a connection's host socket, if it has one by now.
fn watch(end: &HostEnd, index: usize, ops: &mut EventOps<'_>) -> io::Result<()> {
    let Some(fd) = end.fd() else { return Ok(()) };
    let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    let token = Token::VsockConnection(index as u32);
    ops.add(Events::with_data_raw(fd, token.to_data(), events)).map_err(|error| match error {
        event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(other),
    })
}

fn unwatch(end: &HostEnd, ops: &mut EventOps<'_>) -> Result<()> {
    end.fd().map_or(Ok(()), |fd| Ok(ops.remove(Events::empty_raw(fd))?))
}

fn watch_kick(kick: &EventFd, token: Token, ops: &mut EventOps<'_>) -> Result<()> {
    Ok(ops.add(Events::with_data(kick, token.to_data(), EventSet::IN))?)
}

#[cfg(any(test, fuzzing))]
#[path = "bench.rs"]
pub(crate) mod bench;
#[cfg(test)]
#[path = "mux_test.rs"]
mod tests;
