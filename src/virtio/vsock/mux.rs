//! The vsock device at work, in the main loop: moves packets between the queues and the
//! connections, and bytes between the connections and their endpoints.
//!
//! Connections' sockets are non-blocking and registered once, edge-triggered; a socket that would have
//! blocked is not used until epoll reports it again. Everything that a guest or a client can make the
//! device hold is bounded: connections, bytes per connection, waiting resets.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use event_manager::EventSet;
use mote_agent::flow::{
    DATAGRAM_HEADER_LEN, MAX_DATAGRAM_LEN, Protocol, Published, REQUEST_LEN, Request,
};
use mote_agent::protocol::{FLOW_PORT, PUBLISH_PORT};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::client::{Client, Clients, Name};
use super::conn::Conn;
use super::endpoint::Endpoint;
use super::listeners::{Accepted, Listener, Listeners};
use super::packet::{Foreign, GUEST_CID, HEADER_LEN, Header, MAX_PACKET, Op, Ports};
use super::source::Source;
use super::table::{Entry, MAX_FLOWS, Table};
use crate::memory::GuestRam;
use crate::policy::filter::Filter;
use crate::sys;
use crate::virtio::buffers::{Reader, Writer};
use crate::virtio::device::{Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::virtio::main_loop::{MainLoopDevice, Properties, Watcher};
use crate::virtio::queue::{Chain, ServedQueue};

/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [128, 256, 16];
/// Clients of published ports are accepted while there are fewer flows than this: they must not use up
/// the flows that the box itself needs.
const MAX_FLOWS_FOR_CLIENTS: usize = MAX_FLOWS / 2;
/// How many connections may have [`conn::BUFFER_LEN`](super::conn::BUFFER_LEN) bytes each on the way to
/// their host sockets. Connections beyond these have [`SMALL_BUFFER_LEN`], or [`DATAGRAM_BUFFER_LEN`]: a guest
/// that fills every buffer, with thousands of peers that do not read or do not answer, costs mote some 125 MiB, or
/// 260 with datagrams, rather than a GiB. Data towards a guest that has no room for it costs at most some 75 MiB, or 200 MiB if
/// it is the largest datagrams.
const LARGE_BUFFERS: usize = 256;
/// Of the buffer for a packet in work: longer than any, since the C library maps what is as long as this, and no page of it
/// is there before a packet needs it.
const WORK_LEN: usize = 128 * 1024;
const _: () = assert!(WORK_LEN >= MAX_PACKET);
/// See [`LARGE_BUFFERS`]. Four of the packets that Linux sends.
const SMALL_BUFFER_LEN: usize = 16 * 1024;
/// See [`LARGE_BUFFERS`]. A datagram is sent once it is whole, however large.
const DATAGRAM_BUFFER_LEN: u32 = (DATAGRAM_HEADER_LEN + MAX_DATAGRAM_LEN) as u32;
/// Most resets that wait for room in the receive queue. If a guest causes more and takes none, the rest
/// are lost.
const MAX_RESETS: usize = 1024;
/// Most packets per queue before the main loop turns to other work.
const BATCH: usize = 256;
/// Most datagrams of a published port's clients before the main loop turns to other work.
const DATAGRAM_BATCH: usize = 64;
/// How long a client of the box's own sockets waits for a guest that is still booting (contract §3).
const BOOT_LIMIT: Duration = Duration::from_secs(2);
/// How long such a client waits for an answer of a guest that is up: a guest kernel that runs answers
/// at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long the guest may take to answer for a published port, or to say where an outgoing flow goes.
/// It does so at once, too; but on an overloaded host, a flow that is only slow must not be reset.
const FLOW_LIMIT: Duration = Duration::from_secs(30);
/// How long a peer on the network may take none of the data left in a flow that the guest has closed and
/// forgotten: such a flow takes the room of another.
const ORPHAN_LIMIT: Duration = Duration::from_secs(600);

/// The queues, from activation to reset.
#[derive(Debug)]
struct Queues {
    ram: GuestRam,
    receive: ServedQueue,
    transmit: ServedQueue,
    /// Never used: it is for announcing migrations.
    _event: ServedQueue,
}

/// The device.
#[derive(Debug)]
pub struct Mux {
    queues: Option<Queues>,
    table: Table,
    resets: VecDeque<Header>,
    /// Connections that have more to write to their host sockets than one turn may take.
    unfinished: BTreeSet<usize>,
    /// Sockets for the guest's connections to these host ports, one each.
    reserved_ports: HashMap<u32, UnixStream>,
    /// What judges where outgoing flows go; with `None`, there are no outgoing flows.
    outgoing: Option<Filter>,
    listeners: Listeners,
    /// Of published UDP ports.
    clients: Clients,
    /// Whether the guest's servers listen; until they do, clients' connections wait.
    guest_ready: bool,
    buffer: Vec<u8>,
}

impl Mux {
    /// A device that connects the guest to `reserved_ports` (one connection per host port) and to
    /// destinations that `outgoing` allows, and clients of `listeners` to the guest.
    pub fn new(
        reserved_ports: HashMap<u32, UnixStream>,
        listeners: Vec<Listener>,
        outgoing: Option<Filter>,
    ) -> Self {
        Mux {
            queues: None,
            table: Table::default(),
            resets: VecDeque::new(),
            unfinished: BTreeSet::new(),
            reserved_ports,
            outgoing,
            listeners: Listeners::new(listeners),
            clients: Clients::default(),
            guest_ready: false,
            buffer: vec![0; WORK_LEN],
        }
    }

    /// Called when the guest's servers listen: requests connections for all clients that wait.
    ///
    /// # Errors
    /// The queues are broken, or the host has no room to watch a listener.
    pub fn guest_is_ready(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        if std::mem::replace(&mut self.guest_ready, true) {
            return Ok(());
        }
        self.listeners.watch_ports(watcher)?;
        // In the order in which the clients came, which is not that of the slots.
        for index in self.table.owed() {
            self.queue(index);
        }
        self.deliver(watcher)
    }

    /// Connects the clients of a further listener to this port of the guest; the listener's number.
    ///
    /// # Errors
    /// The host has no room to watch another.
    pub fn listen(
        &mut self,
        socket: TcpListener,
        guest_port: u16,
        watcher: &mut Watcher<'_, '_>,
    ) -> Result<usize> {
        self.listeners.add(Listener::Published { socket, guest_port }, watcher)
    }

    /// Closes such a listener. Its clients stay connected.
    pub fn stop_listening(&mut self, listener: usize, watcher: &mut Watcher<'_, '_>) {
        self.listeners.remove(listener, watcher);
    }

    fn on_each_connection(
        &mut self,
        change: impl Fn(&mut Conn),
        watcher: &mut Watcher<'_, '_>,
    ) -> Result<()> {
        for index in self.table.slots() {
            if let Some(entry) = self.table.get_mut(index) {
                change(&mut entry.conn);
                self.flush_to_host(index, watcher)?;
            }
        }
        Ok(())
    }

    /// Closes connections whose guest, or whose peer for an orphan, has missed its deadline, and watches
    /// listeners again that have rested.
    fn expire(&mut self, now: Instant, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.listeners.wake(now, watcher);
        while let Some((due, index)) = self.table.take_due(now) {
            if let Some(entry) = self.table.get_mut(index)
                && entry.is_orphan()
            {
                entry.endpoint.try_to_write();
                self.flush_to_host(index, watcher)?;
            }
            let Some(entry) = self.table.get(index) else { continue };
            let idle_at = entry.endpoint.as_client().map(Client::idle_at);
            match idle_at {
                Some(idle_at) if idle_at > now && !entry.is_owed() => {
                    self.table.set_due(index, idle_at);
                }
                // If it is not, the peer has taken something, and has a new deadline.
                _ if entry.is_due(due) && (entry.is_owed() || idle_at.is_some()) => {
                    self.drop_connection(index, watcher)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes a connection at once, whether or not the guest ever takes the reset.
    fn drop_connection(&mut self, index: usize, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Some(entry) = self.table.get_mut(index) else { return Ok(()) };
        let ports = entry.conn.ports();
        let guest_knows = entry.conn.is_announced() && !entry.conn.is_forgotten();
        entry.conn.vanish();
        if guest_knows {
            self.refuse(ports);
        }
        self.remove_if_closed(index, watcher)
    }

    /// Closes everything at the end of the box. Reserved ports that the guest has not used are dropped.
    /// Each host socket is closed when it has been given all that the guest had sent; TCP connections
    /// that the guest has not ended are reset. Later clients are refused.
    ///
    /// # Errors
    /// A connection cannot be unwatched.
    pub fn close(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        // An error means a broken ring: what is left in it is lost.
        let _ = self.transmit(watcher);
        self.reserved_ports.clear();
        self.outgoing = None;
        self.listeners.close(watcher);
        self.on_each_connection(Conn::on_reset, watcher)
    }

    /// Whether all host sockets have been given all that the guest has sent.
    pub fn is_drained(&self) -> bool {
        self.table.iter().all(|entry| entry.conn.for_host().is_empty())
    }

    // ---- from the guest ----------------------------------------------------------------------

    fn transmit(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        // Taken out of `self` meanwhile: handling a packet may change anything else in it.
        let Some(mut queues) = self.queues.take() else { return Ok(()) };
        let mut touched: BTreeSet<usize> =
            std::mem::take(&mut self.unfinished).into_iter().collect();
        let served = queues.transmit.serve(&queues.ram, BATCH, |chain| {
            touched.extend(self.take_packet(chain, &queues.ram, watcher));
            0
        });
        self.queues = Some(queues);
        served?;
        for index in touched {
            self.flush_to_host(index, watcher)?;
        }
        Ok(())
    }

    /// Handles one packet; returns the connection that may now have bytes for its host socket.
    fn take_packet(
        &mut self,
        chain: Chain<'_>,
        ram: &GuestRam,
        watcher: &mut Watcher<'_, '_>,
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
        let touched = match self.table.find(header.ports) {
            Some(index) if header.op == Op::Reset && self.table.ask_elsewhere(index) => Some(index),
            Some(index) if self.is_unknown_to_guest(index) => {
                if header.op != Op::Reset {
                    self.refuse(header.ports);
                }
                None
            }
            Some(index) => {
                if let Some(entry) = self.table.get_mut(index) {
                    if complete {
                        let data = if header.op == Op::Data { &data[..len] } else { &[] };
                        entry.conn.on_packet(&header, data);
                    } else {
                        entry.conn.abort();
                    }
                }
                // At once: the next packet in the queue may depend on it.
                self.take_flow_request(index, watcher);
                Some(index)
            }
            None => {
                let refused = match header.op {
                    Op::Request => self.accept_guest(&header, watcher).is_err(),
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
    fn accept_guest(&mut self, request: &Header, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let host_port = request.ports.host;
        let mut conn = Conn::accepted(request);
        let endpoint = if host_port == FLOW_PORT
            && self.outgoing.is_some()
            && self.table.has_room_for_flow(MAX_FLOWS)
        {
            conn.set_abortable(true);
            Endpoint::awaiting()
        } else {
            let socket =
                self.reserved_ports.remove(&host_port).context("nobody listens on this port")?;
            Endpoint::unix(socket)?
        };
        self.insert(Entry::new(conn, endpoint, None), watcher)
    }

    /// Connects an outgoing flow, once the guest's request for it is complete.
    fn take_flow_request(&mut self, index: usize, watcher: &mut Watcher<'_, '_>) {
        let (Some(entry), Some(filter)) = (self.table.get_mut(index), &self.outgoing) else {
            return;
        };
        let Entry { conn, endpoint, .. } = entry;
        if !endpoint.is_awaiting() || conn.is_closed() {
            return;
        }
        let request = match conn.all_for_host().first_chunk::<REQUEST_LEN>().copied() {
            Some(bytes) => Request::decode(&bytes),
            None if conn.guest_sends() => return,
            None => None,
        };
        let Some(Request { protocol, destination }) = request else { return conn.abort() };
        conn.host_took(REQUEST_LEN);
        // A complete datagram is always sent: an abort that comes later does not drop it.
        conn.set_abortable(protocol == Protocol::Tcp);
        if protocol == Protocol::Udp {
            conn.grow_buffer(DATAGRAM_BUFFER_LEN);
        }
        let connected = filter
            .resolve(protocol, destination)
            .map_err(io::Error::from_raw_os_error)
            .and_then(|destination| endpoint.connect(protocol, destination))
            .and_then(|()| watch(endpoint, index, watcher));
        if let Err(error) = connected {
            endpoint.refuse(&error, conn);
        }
    }

    /// Whether this connection exists only for its host socket, or is about to be removed.
    fn is_unknown_to_guest(&self, index: usize) -> bool {
        self.table.get(index).is_some_and(|e| e.conn.is_forgotten() || e.conn.is_closed())
    }

    fn refuse(&mut self, ports: Ports) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(Header::reset(ports));
        }
    }

    /// Writes to the host socket as much of the guest's data as it takes, and closes each direction
    /// that is over.
    fn flush_to_host(&mut self, index: usize, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Some(entry) = self.table.get_mut(index) else { return Ok(()) };
        let left = entry.conn.len_for_host();
        let unfinished = entry.endpoint.flush(&mut entry.conn);
        let made_progress = entry.conn.len_for_host() < left;
        let waits_anew = entry.is_orphan() && (made_progress || !entry.orphaned);
        entry.orphaned = entry.is_orphan();
        if unfinished {
            match &self.queues {
                Some(queues) => {
                    self.unfinished.insert(index);
                    queues.transmit.kick().write(1)?;
                }
                // The driver is gone, and only datagrams are left, which may be lost.
                None => entry.conn.vanish(),
            }
        }
        if waits_anew {
            self.table.set_due(index, Instant::now() + ORPHAN_LIMIT);
        }
        self.queue(index);
        self.remove_if_closed(index, watcher)
    }

    // ---- to the guest ------------------------------------------------------------------------

    fn deliver(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Some(mut queues) = self.queues.take() else { return Ok(()) };
        let delivered = self.deliver_to(&mut queues, watcher);
        self.queues = Some(queues);
        delivered
    }

    fn deliver_to(&mut self, queues: &mut Queues, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Queues { ram, receive, .. } = queues;
        let mut used = 0;
        while !(self.resets.is_empty() && self.table.is_idle()) {
            if used == BATCH {
                // The rest waits until all others had their turn.
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
            // A chain with room for a header only would hold up connections that have data.
            let space = writer.available_bytes().saturating_sub(HEADER_LEN).min(MAX_PACKET);
            if space == 0 {
                receive.push(ram, head, 0)?;
                continue;
            }
            let Some(header) = self.next_packet(space, watcher)? else {
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
    fn next_packet(
        &mut self,
        space: usize,
        watcher: &mut Watcher<'_, '_>,
    ) -> Result<Option<Header>> {
        if let Some(reset) = self.resets.pop_front() {
            return Ok(Some(reset));
        }
        while let Some(index) = self.table.next_in_line() {
            let Some(entry) = self.table.get_mut(index) else { continue };
            let Entry { conn, endpoint, .. } = entry;
            let buffer = &mut self.buffer;
            let header = conn.next(space, |room| endpoint.read(buffer, room));
            if header.is_some() {
                // There may be more; it goes to the end of the line, so that no other starves.
                self.queue(index);
            }
            self.remove_if_closed(index, watcher)?;
            if header.is_some() {
                return Ok(header);
            }
        }
        Ok(None)
    }

    // ---- host sockets ------------------------------------------------------------------------

    fn note_socket(
        &mut self,
        index: usize,
        events: EventSet,
        watcher: &mut Watcher<'_, '_>,
    ) -> Result<()> {
        let Some(entry) = self.table.get_mut(index) else { return Ok(()) };
        let Entry { conn, endpoint, .. } = entry;
        if let Err(error) = endpoint.check_connecting() {
            unwatch(endpoint, watcher)?;
            endpoint.refuse(&error, conn);
        }
        endpoint.note_events(events, conn);
        self.flush_to_host(index, watcher)
    }

    fn accept(&mut self, index: usize, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let has_room = self.table.has_room_for_flow(MAX_FLOWS_FOR_CLIENTS);
        let Some(client) = self.listeners.accept(index, has_room, watcher)? else { return Ok(()) };
        let Accepted { endpoint, guest_port: guest, fallback_port } = client;
        // Otherwise the socket is dropped, which ends the client's connection: there are too many,
        // or the client has gone already, or the host cannot watch the socket.
        if let Ok(endpoint) = endpoint
            && self.table.has_room_for_client(&endpoint)
        {
            let ports = Ports { host: self.table.free_host_port(guest), guest };
            let mut conn = Conn::requested(ports);
            conn.set_abortable(endpoint.is_flow());
            let _ = self.insert(Entry::new(conn, endpoint, fallback_port), watcher);
        }
        Ok(())
    }

    /// Takes datagrams of the clients of a published UDP port, as many as have their turn.
    fn take_datagrams(&mut self, listener: usize, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..DATAGRAM_BATCH {
            let Some((socket, guest_port)) = self.listeners.datagrams(listener) else { break };
            let socket = Rc::clone(socket);
            let (len, ends) = match sys::socket::receive_from(&socket, &mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => continue,
            };
            let name = (listener, ends);
            let now = Instant::now();
            let index = match self.clients.slot(&name) {
                Some(index) => index,
                None => match self.add_client(name, socket, guest_port, now, watcher) {
                    Some(index) => index,
                    // There is no room for another.
                    None => continue,
                },
            };
            if let Some(entry) = self.table.get_mut(index) {
                entry.endpoint.take_datagram(&buffer[..len], now);
            }
            self.queue(index);
        }
        self.buffer = buffer;
        Ok(())
    }

    /// Makes a flow for a new client of a published UDP port, if there is room for it; its slot.
    fn add_client(
        &mut self,
        name: Name,
        socket: Rc<UdpSocket>,
        guest_port: u16,
        now: Instant,
        watcher: &mut Watcher<'_, '_>,
    ) -> Option<usize> {
        if self.clients.is_full() {
            let standing = |index: &usize| {
                self.table.get(*index).and_then(|e| e.endpoint.as_client()).map(Client::standing)
            };
            let least = self.clients.slots().min_by_key(standing)?;
            self.drop_connection(least, watcher).ok()?;
        }
        if !self.table.has_room_for_flow(MAX_FLOWS_FOR_CLIENTS) {
            return None;
        }
        let header = Published { protocol: Protocol::Udp, guest_port, client: name.1.client };
        let endpoint = Endpoint::client(self.clients.client(name, socket, now), header);
        let host = self.table.free_host_port(PUBLISH_PORT);
        let ports = Ports { host, guest: PUBLISH_PORT };
        self.insert(Entry::new(Conn::requested(ports), endpoint, None), watcher).ok()?;
        let index = self.table.find(ports)?;
        self.clients.insert(name, index);
        Some(index)
    }

    fn insert(&mut self, mut entry: Entry, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        if self.table.count() >= LARGE_BUFFERS {
            let is_client = entry.endpoint.as_client().is_some();
            let len = if is_client { DATAGRAM_BUFFER_LEN } else { SMALL_BUFFER_LEN as u32 };
            entry.conn.set_buffer_len(len);
            entry.endpoint.set_read_ahead(SMALL_BUFFER_LEN);
        }
        let index = self.table.take_slot();
        if let Err(error) = watch(&entry.endpoint, index, watcher) {
            self.table.give_back(index);
            return Err(error).context("watch a connection");
        }
        let limit = match entry.endpoint.is_flow() {
            true => FLOW_LIMIT,
            false if self.guest_ready => ANSWER_LIMIT,
            false => BOOT_LIMIT,
        };
        let is_owed = entry.is_owed();
        self.table.insert(index, entry);
        if is_owed {
            self.table.set_due(index, Instant::now() + limit);
        }
        self.queue(index);
        Ok(())
    }

    /// Puts a connection in line for the guest, unless it waits for the guest's servers.
    fn queue(&mut self, index: usize) {
        let waits = |entry: &Entry| entry.conn.is_requested() && !self.guest_ready;
        if !self.table.get(index).is_none_or(waits) {
            self.table.line_up(index);
        }
    }

    fn remove_if_closed(&mut self, index: usize, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        match self.table.remove_closed(index) {
            Some(entry) => {
                if let Some(client) = entry.endpoint.as_client() {
                    self.clients.remove(client);
                }
                unwatch(&entry.endpoint, watcher)
            }
            None => Ok(()),
        }
    }
}

/// What the driver reads of the device.
pub fn properties() -> Properties {
    Properties {
        id: VIRTIO_ID_VSOCK,
        features: F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX,
        queue_sizes: &QUEUE_SIZES,
        config: GUEST_CID.to_le_bytes().to_vec(),
        late: false,
        busy: true,
    }
}

impl MainLoopDevice for Mux {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn properties(&self) -> Properties {
        properties()
    }

    /// Starts watching the box's own sockets.
    fn register(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.listeners.watch_sockets(watcher)
    }

    fn activate(&mut self, activation: Activation, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.reset(watcher)?;
        let Activation { ram, features, queues, interrupt, .. } = activation;
        let [receive, transmit, event] = ServedQueue::take_over(queues, features, &interrupt)?;
        watcher.add(receive.kick(), Source::Receive.to_number(), EventSet::IN)?;
        watcher.add(transmit.kick(), Source::Transmit.to_number(), EventSet::IN)?;
        self.queues = Some(Queues { ram, receive, transmit, _event: event });
        self.transmit(watcher)?;
        self.deliver(watcher)
    }

    /// Gives the queues back. The guest has lost all its connections: each ends when its host socket
    /// has been given all that the guest had sent. Only clients that wait for an answer go on
    /// waiting, for the next driver.
    fn reset(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        // An error means a broken ring: what is left in it is lost.
        let _ = self.transmit(watcher);
        if let Some(queues) = self.queues.take() {
            for queue in [&queues.receive, &queues.transmit] {
                watcher.remove(queue.kick())?;
            }
            self.on_each_connection(Conn::on_driver_reset, watcher)?;
            self.resets.clear();
        }
        Ok(())
    }

    /// An error ends the device: the guest has broken its queues, or the host is out of descriptors.
    fn handle(
        &mut self,
        source: u32,
        events: EventSet,
        watcher: &mut Watcher<'_, '_>,
    ) -> Result<()> {
        match Source::from_number(source) {
            Some(Source::Transmit) => self.transmit(watcher)?,
            Some(Source::Receive) => {
                if let Some(queues) = &self.queues {
                    queues.receive.clear_kick();
                }
            }
            Some(Source::Listener(index)) if self.listeners.datagrams(index).is_some() => {
                self.take_datagrams(index, watcher)?;
            }
            Some(Source::Listener(index)) => self.accept(index, watcher)?,
            Some(Source::Connection(index)) => self.note_socket(index, events, watcher)?,
            None => {}
        }
        Ok(())
    }

    fn next_deadline(&self) -> Option<Instant> {
        let owed = self.table.next_deadline();
        owed.into_iter().chain(self.listeners.next_deadline()).min()
    }

    /// Does what is due by `now`, and delivers packets to the guest. It delivers once a round, not at
    /// every event, because a guest could make each of very many events cost a full batch.
    fn end_round(&mut self, now: Instant, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.expire(now, watcher)?;
        self.deliver(watcher)
    }
}

/// Starts watching a connection's host socket, if it has one already.
fn watch(endpoint: &Endpoint, index: usize, watcher: &mut Watcher<'_, '_>) -> io::Result<()> {
    let Some(fd) = endpoint.fd() else { return Ok(()) };
    let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    let source = Source::Connection(index).to_number();
    watcher.add(&fd, source, events).map_err(|error| match error {
        event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(other),
    })
}

fn unwatch(endpoint: &Endpoint, watcher: &mut Watcher<'_, '_>) -> Result<()> {
    endpoint.fd().map_or(Ok(()), |fd| Ok(watcher.remove(&fd)?))
}

#[cfg(any(test, fuzzing))]
#[path = "bench.rs"]
pub(crate) mod bench;
#[cfg(test)]
#[path = "mux_test.rs"]
mod tests;
