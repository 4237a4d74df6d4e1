//! Clients of published ports: the host hands each on as a vsock stream, and the agent connects it to
//! the box's server.
//!
//! ```text
//!   Greeting ── client known ─┬─ TCP ─▶ Connecting ── server found ──▶ Spliced
//!                             └─ UDP ─▶ Served
//! ```

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Instant;

use mote_agent::flow::{PUBLISHED_LEN, Protocol, Published};
use vmm_sys_util::epoll::EventSet;

use super::flows::{Flows, Key, Kind, Side};
use super::shared::{BATCH, HANDSHAKE_LIMIT, Shared, Token, Wake, fill};
use super::spliced::Spliced;
use crate::sys::{self, net};
use crate::tsi::datagrams::{Datagrams, Received};
use crate::tsi::program::{CLIENT_PORT, Id};
use crate::tsi::stream::Stream;

/// Clients of published ports.
#[derive(Debug)]
pub struct Clients {
    /// Where the host's connections come, if there are published ports.
    listener: Option<File>,
    flows: Flows<Client>,
    /// The number of the last that was named, from which its id follows.
    named: u32,
}

/// The state of a client.
#[derive(Debug)]
enum Client {
    Greeting(Greeting),
    Connecting(Connecting),
    Spliced(Spliced),
    Served(Served),
}

/// The host has yet to say who the client is, and for which port.
#[derive(Debug)]
struct Greeting {
    vsock: File,
    /// What has come of it.
    bytes: Vec<u8>,
    since: Instant,
}

/// The box's server is being looked for.
#[derive(Debug)]
struct Connecting {
    client: Named,
    tcp: TcpStream,
    over: Place,
}

/// A client that the host has named.
#[derive(Debug)]
struct Named {
    vsock: File,
    id: Id,
    guest_port: u16,
}

/// Datagrams pass between the client and the box's server, until the host ends the flow.
#[derive(Debug)]
struct Served {
    datagrams: Datagrams,
    server: Server,
    /// Has a turn to come.
    queued: bool,
}

/// The box's server of a UDP port, as one client has it.
#[derive(Debug)]
struct Server {
    id: Id,
    published: Published,
    /// Connected to the server's port, whether or not there is a server.
    socket: Option<UdpSocket>,
    over: Place,
}

/// The box's own address at which a server is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Ip4,
    /// For TCP after the other: a server may listen on IPv6 alone.
    Ip6,
    /// For TCP after both: one that the box shares with others, where a server is known to be.
    Shared(IpAddr),
}

impl Clients {
    /// With the socket on which the host's connections come, if there are published ports.
    pub fn new(listener: Option<File>) -> Self {
        // An earlier relay may have been killed: sockets that are connected to its clients are not to get others'.
        let named = sys::monotonic_ns() as u32;
        Clients { listener, flows: Flows::new(Kind::Published), named }
    }

    /// Has what comes to the listener reported.
    ///
    /// # Errors
    /// As [`Shared::watch`].
    pub fn watch(&self, shared: &Shared) -> io::Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        shared.watch(listener.as_raw_fd(), EventSet::IN, Token::Published)
    }

    /// Takes clients, as many as have their turn.
    pub fn accept(&mut self, shared: &mut Shared) {
        for _ in 0..BATCH {
            let Some(Ok(vsock)) = self.listener.as_ref().map(net::accept) else { return };
            let Ok(key) = shared.place(&mut self.flows, vsock.as_raw_fd()) else { continue };
            let bytes = Vec::with_capacity(PUBLISHED_LEN);
            let greeting = Greeting { vsock, bytes, since: Instant::now() };
            self.flows.put(key, Client::Greeting(greeting));
            shared.limit_time();
            self.advance(key, shared);
        }
    }

    /// Serves a flow.
    pub fn wake(&mut self, key: Key, wake: Wake, shared: &mut Shared) {
        match self.flows.get_mut(key) {
            Some(Client::Spliced(spliced)) => spliced.note(wake),
            Some(Client::Served(served)) => served.note(wake),
            _ => {}
        }
        self.advance(key, shared);
    }

    fn advance(&mut self, key: Key, shared: &mut Shared) {
        let next = match self.flows.take(key) {
            Some(Client::Greeting(greeting)) => greeting.step(key, &mut self.named, shared),
            Some(Client::Connecting(connecting)) => connecting.step(key, shared),
            Some(Client::Served(served)) => served.step(key, shared).map(Client::Served),
            Some(Client::Spliced(spliced)) => {
                let id = spliced.id();
                let next = spliced.step(key, shared);
                if next.is_none() {
                    shared.programs.forget(id);
                }
                next.map(Client::Spliced)
            }
            None => return,
        };
        match next {
            Some(client) => self.flows.put(key, client),
            None => self.flows.remove(key),
        }
    }

    /// Gives up clients that were not named in time.
    pub fn sweep(&mut self, now: Instant, shared: &mut Shared) {
        for slot in self.flows.slots() {
            let key = self.flows.key(slot);
            if let Some(Client::Greeting(Greeting { since, .. })) = self.flows.get_mut(key) {
                shared.limit_time();
                if now >= *since + HANDSHAKE_LIMIT {
                    self.flows.remove(key);
                }
            }
        }
    }

    /// The connections over which bytes flow.
    pub fn streams(&self) -> impl Iterator<Item = &Stream> {
        self.flows.iter().filter_map(|client| match client {
            Client::Spliced(spliced) => Some(spliced.stream()),
            _ => None,
        })
    }

    /// Whether every datagram of the box's servers has gone to the host.
    pub fn has_sent_all(&self) -> bool {
        self.flows.iter().all(|client| match client {
            Client::Served(served) => served.datagrams.has_sent_all(),
            _ => true,
        })
    }
}

impl Greeting {
    /// Reads what has come of the greeting, and looks for the server once it is whole. `named` is the number of the
    /// client before this one.
    fn step(mut self, key: Key, named: &mut u32, shared: &mut Shared) -> Option<Client> {
        match fill(&mut self.vsock, &mut self.bytes, PUBLISHED_LEN) {
            Ok(false) => return Some(Client::Greeting(self)),
            Ok(true) => {}
            Err(_) => return None,
        }
        let published = Published::decode(self.bytes[..].try_into().ok()?)?;
        let id = loop {
            *named = named.wrapping_add(1);
            let id = Id::published(*named);
            // There are more ids than there can be clients.
            if shared.programs.name_client(id, published) {
                break id;
            }
        };
        match published.protocol {
            Protocol::Tcp => Named { vsock: self.vsock, id, guest_port: published.guest_port }
                .connect(Place::Ip4, key, shared),
            Protocol::Udp => {
                let datagrams = Datagrams::of_client(self.vsock, Instant::now());
                // Its answers go to an address of the client's family, so that is tried first.
                let is_ip4 = published.client.is_ipv4();
                let over = if is_ip4 { Place::Ip4 } else { Place::Ip6 };
                let server = Server { id, published, socket: None, over };
                let served = Served { datagrams, server, queued: false };
                served.step(key, shared).map(Client::Served)
            }
        }
    }
}

impl Place {
    /// Where this client comes from, and its server is.
    fn ends(self, id: Id, guest_port: u16) -> (SocketAddr, SocketAddr) {
        let (from, to): (IpAddr, IpAddr) = match self {
            Place::Ip4 => (id.ip4().into(), Ipv4Addr::LOCALHOST.into()),
            Place::Ip6 => (id.ip6().into(), Ipv6Addr::LOCALHOST.into()),
            Place::Shared(ip @ IpAddr::V4(_)) => (id.ip4().into(), ip),
            Place::Shared(ip) => (id.ip6().into(), ip),
        };
        (SocketAddr::new(from, CLIENT_PORT), SocketAddr::new(to, guest_port))
    }

    fn other(self) -> Self {
        match self {
            Place::Ip4 => Place::Ip6,
            Place::Ip6 | Place::Shared(_) => Place::Ip4,
        }
    }
}

impl Named {
    /// Begins to connect to the server; `None` if nobody listens.
    fn connect(self, over: Place, key: Key, shared: &mut Shared) -> Option<Client> {
        let (from, to) = over.ends(self.id, self.guest_port);
        let connecting = net::tcp_connect(from, to).and_then(|tcp| {
            shared.watch_flow(tcp.as_raw_fd(), key, Side::Inner)?;
            Ok(TcpStream::from(tcp))
        });
        match connecting {
            Ok(tcp) => Some(Client::Connecting(Connecting { client: self, tcp, over })),
            Err(_) => self.connect_elsewhere(over, key, shared),
        }
    }

    /// Goes on to the address after `over`, where nobody listens.
    fn connect_elsewhere(self, over: Place, key: Key, shared: &mut Shared) -> Option<Client> {
        let port = self.guest_port;
        let next = match over {
            Place::Ip4 => Some(Place::Ip6),
            Place::Ip6 => {
                let server = shared.servers.keys().find(|server| server.port() == port);
                server.map(|server| Place::Shared(server.ip()))
            }
            Place::Shared(_) => None,
        };
        if next.is_none() {
            // Dropping the vsock tells the host that nobody listens.
            shared.programs.forget(self.id);
        }
        self.connect(next?, key, shared)
    }
}

impl Connecting {
    fn step(self, key: Key, shared: &mut Shared) -> Option<Client> {
        match (self.tcp.take_error(), self.tcp.peer_addr()) {
            (Ok(None), Ok(_)) => {
                let Connecting { client: Named { vsock, id, .. }, tcp, .. } = self;
                let mut spliced = Spliced::new(Stream::new(vsock, tcp), id);
                spliced.queue_turn(key, shared);
                Some(Client::Spliced(spliced))
            }
            (Ok(None), Err(_)) => Some(Client::Connecting(self)),
            _ => {
                let Connecting { client, tcp, over } = self;
                drop(tcp);
                client.connect_elsewhere(over, key, shared)
            }
        }
    }
}

impl Served {
    /// Takes note of what it is served for.
    fn note(&mut self, wake: Wake) {
        if let Wake::Turn = wake {
            self.queued = false;
        }
    }

    /// Moves what can be moved; `None` at the flow's end.
    fn step(mut self, key: Key, shared: &mut Shared) -> Option<Self> {
        let mut scratch = std::mem::take(&mut shared.scratch);
        let more = self.exchange(&mut scratch, key, shared);
        shared.scratch = scratch;
        match more {
            Ok(more) => {
                if more && !std::mem::replace(&mut self.queued, true) {
                    shared.queue_turn(key);
                }
                Some(self)
            }
            Err(_) => {
                shared.programs.forget_client(self.server.id, self.server.published);
                None
            }
        }
    }

    /// Moves a batch both ways; whether there is more.
    ///
    /// # Errors
    /// The host has ended the flow.
    fn exchange(&mut self, scratch: &mut [u8], key: Key, shared: &mut Shared) -> io::Result<bool> {
        let Served { datagrams, server, .. } = self;
        let now = Instant::now();
        shared.programs.answer_client(server.id, server.published);
        let more = datagrams.receive(scratch, now, |received| {
            if let Received::Datagram(bytes) = received {
                server.deliver(bytes, key, shared);
            }
        })?;
        datagrams.flush()?;
        let Some(socket) = &server.socket else { return Ok(more) };
        for _ in 0..BATCH {
            match socket.recv(scratch) {
                Ok(len) => datagrams.send(&scratch[..len], now)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(more),
                // About an earlier datagram.
                Err(_) => {}
            }
        }
        Ok(true)
    }
}

impl Server {
    /// Gives the server a datagram, over whichever of IPv4 and IPv6 it listens on. If nobody does, the datagram
    /// is lost, as on any network.
    fn deliver(&mut self, datagram: &[u8], key: Key, shared: &Shared) {
        for _ in 0..2 {
            match self.send(datagram, key, shared) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.socket = None;
                    self.over = self.over.other();
                }
                Ok(()) => return,
            }
        }
    }

    /// Sends to the address at which the server was looked for last.
    ///
    /// # Errors
    /// Nobody listens there, which loopback says at once.
    fn send(&mut self, datagram: &[u8], key: Key, shared: &Shared) -> io::Result<()> {
        let Server { id, published, over, .. } = *self;
        let socket = match &mut self.socket {
            Some(socket) => socket,
            none => {
                let (from, to) = over.ends(id, published.guest_port);
                let socket = net::udp_connect(from, to)?;
                shared.watch_flow(socket.as_raw_fd(), key, Side::Inner)?;
                none.insert(socket)
            }
        };
        // An error may be about an earlier datagram: the server has begun to listen since.
        let _ = socket.take_error();
        socket.send(datagram)?;
        socket.take_error()?.map_or(Ok(()), Err)
    }
}
