//! Outgoing TCP: connections of the box's applications to the outside.
//!
//! ```text
//!   SYN ──▶ Asking ── the host has connected ──▶ Answered ── accept ──▶ Spliced
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use mote_agent::flow::{Request, STATUS_LEN};
use mote_agent::protocol::FLOW_PORT;
use vmm_sys_util::epoll::EventSet;

use super::flows::{Flows, Key, Kind, Side};
use super::shared::{BATCH, HANDSHAKE_LIMIT, Shared, Token, Wake, fill};
use super::spliced::Spliced;
use crate::sys::net;
use crate::tsi::packet::{self, Unreachable};
use crate::tsi::program::{Id, Original};
use crate::tsi::stream::Stream;

/// Outgoing TCP connections.
#[derive(Debug)]
pub struct Outgoing {
    /// Where applications are redirected to, if they are.
    listener: Option<TcpListener>,
    flows: Flows<Connection>,
    /// Each from its SYN to its end.
    by_id: HashMap<Id, Key>,
}

/// The state of a connection.
#[derive(Debug)]
enum Connection {
    Asking(Asking),
    Answered(Answered),
    Spliced(Spliced),
}

/// The host is being asked to connect; the application waits.
#[derive(Debug)]
struct Asking {
    vsock: File,
    id: Id,
    original: Original,
    /// The application's, held back.
    syn: Vec<u8>,
    /// Whether the host has the request.
    asked: bool,
    /// What has come of its answer.
    status: Vec<u8>,
}

/// The host has connected; the application's SYN is on its way to the listener.
#[derive(Debug)]
struct Answered {
    vsock: File,
    id: Id,
    /// The application's socket, from which the connection must come.
    source: SocketAddr,
    since: Instant,
}

impl Outgoing {
    /// With the listener that applications are redirected to, if they are.
    pub fn new(listener: Option<TcpListener>) -> Self {
        Outgoing { listener, flows: Flows::new(Kind::Outgoing), by_id: HashMap::new() }
    }

    /// Has what comes to the listener reported, and what the BPF programs report.
    ///
    /// # Errors
    /// As [`Shared::watch`].
    pub fn watch(&self, shared: &Shared) -> io::Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        shared.watch(shared.programs.events(), EventSet::IN, Token::Events)?;
        shared.watch(listener.as_raw_fd(), EventSet::IN, Token::Listener)
    }

    /// Begins to ask the host for a connection. `syn` is the application's, from its IP header on.
    pub fn ask_host(&mut self, id: Id, original: Original, syn: Vec<u8>, shared: &mut Shared) {
        let placed = net::vsock_connect(FLOW_PORT).and_then(|vsock| {
            let key = shared.place(&mut self.flows, vsock.as_raw_fd())?;
            Ok((vsock, key))
        });
        match placed {
            Ok((vsock, key)) => {
                self.by_id.insert(id, key);
                let status = Vec::with_capacity(STATUS_LEN);
                let asking = Asking { vsock, id, original, syn, asked: false, status };
                self.flows.put(key, Connection::Asking(asking));
            }
            Err(_) => refuse(id, &syn, Unreachable::Network, shared),
        }
    }

    /// Takes applications' connections; `false` once none is left.
    pub fn accept(&mut self, shared: &mut Shared) -> bool {
        for _ in 0..BATCH {
            let Some(Ok(tcp)) = self.listener.as_ref().map(net::accept) else { return false };
            let tcp = TcpStream::from(OwnedFd::from(tcp));
            let Some((key, Answered { vsock, id, .. })) = self.take_answered(&tcp) else {
                // No flow waits for it.
                let _ = net::reset_on_close(&tcp);
                continue;
            };
            if shared.watch_flow(tcp.as_raw_fd(), key, Side::Inner).is_err() {
                self.forget(key, id);
                continue;
            }
            let mut spliced = Spliced::new(Stream::new(vsock, tcp), id);
            if shared.programs.original(id).is_none() {
                // The application has closed its socket already.
                spliced.note_close();
            }
            self.flows.put(key, Connection::Spliced(spliced));
            self.advance(key, shared);
        }
        true
    }

    /// Takes out the flow that an application's connection belongs to, if it waits for that.
    fn take_answered(&mut self, tcp: &TcpStream) -> Option<(Key, Answered)> {
        let SocketAddr::V6(address) = tcp.local_addr().ok()? else { return None };
        let key = *self.by_id.get(&Id::of(*address.ip())?)?;
        match self.flows.take(key)? {
            Connection::Answered(answered) if is_from(tcp, answered.source) => {
                Some((key, answered))
            }
            other => {
                self.flows.put(key, other);
                None
            }
        }
    }

    /// Serves a flow.
    pub fn wake(&mut self, key: Key, wake: Wake, shared: &mut Shared) {
        if let Some(Connection::Spliced(spliced)) = self.flows.get_mut(key) {
            spliced.note(wake);
        }
        self.advance(key, shared);
    }

    fn advance(&mut self, key: Key, shared: &mut Shared) {
        let Some(connection) = self.flows.take(key) else { return };
        let id = connection.id();
        match connection.step(key, shared) {
            Some(connection) => self.flows.put(key, connection),
            None => self.forget(key, id),
        }
    }

    fn forget(&mut self, key: Key, id: Id) {
        self.by_id.remove(&id);
        self.flows.remove(key);
    }

    /// An application has closed its socket.
    pub fn released(&mut self, id: Id, shared: &mut Shared) {
        let Some(&key) = self.by_id.get(&id) else { return };
        match self.flows.get_mut(key) {
            Some(Connection::Spliced(spliced)) => {
                spliced.note_close();
                self.advance(key, shared);
            }
            Some(Connection::Asking(_)) => self.forget(key, id),
            // It may have connected, sent something, and be waiting to be accepted.
            _ => {}
        }
    }

    /// An application's socket has connected anew: nobody waits for the host's answer any more.
    pub fn replaced(&mut self, id: Id) {
        if let Some(&key) = self.by_id.get(&id)
            && let Some(Connection::Asking(_)) = self.flows.get_mut(key)
        {
            self.forget(key, id);
        }
    }

    /// Gives up what has taken too long.
    pub fn sweep(&mut self, now: Instant, shared: &mut Shared) {
        for slot in self.flows.slots() {
            let key = self.flows.key(slot);
            if let Some(Connection::Answered(Answered { id, since, .. })) = self.flows.get_mut(key)
            {
                shared.limit_time();
                if now >= *since + HANDSHAKE_LIMIT {
                    let id = *id;
                    self.forget(key, id);
                }
            }
        }
    }

    /// The connections over which bytes flow.
    pub fn streams(&self) -> impl Iterator<Item = &Stream> {
        self.flows.iter().filter_map(|connection| match connection {
            Connection::Spliced(spliced) => Some(spliced.stream()),
            _ => None,
        })
    }

    /// Whether a connection that the host has made is still to be accepted.
    pub fn has_answered(&self) -> bool {
        self.flows.iter().any(|connection| matches!(connection, Connection::Answered(_)))
    }
}

impl Connection {
    fn id(&self) -> Id {
        match self {
            Connection::Asking(asking) => asking.id,
            Connection::Answered(answered) => answered.id,
            Connection::Spliced(spliced) => spliced.id(),
        }
    }

    /// The connection after what can be done for it; `None` at its end.
    fn step(self, key: Key, shared: &mut Shared) -> Option<Self> {
        match self {
            Connection::Asking(asking) => asking.step(shared),
            // Whatever comes from the host is for the application, once that is there.
            Connection::Answered(_) => Some(self),
            Connection::Spliced(spliced) => spliced.step(key, shared).map(Connection::Spliced),
        }
    }
}

impl Asking {
    fn step(mut self, shared: &mut Shared) -> Option<Connection> {
        match self.answer() {
            Ok(None) => return Some(Connection::Asking(self)),
            Ok(Some(0)) => {
                shared.programs.open(self.id);
                if let Some(packet) = packet::complete_tcp(&self.syn) {
                    shared.injector.inject(&packet);
                }
                shared.limit_time();
                let Asking { vsock, id, syn, .. } = self;
                let source = packet::tcp_source(&syn)?;
                let since = Instant::now();
                return Some(Connection::Answered(Answered { vsock, id, source, since }));
            }
            Ok(Some(errno)) => {
                if let Some(why) = Unreachable::from_errno(errno) {
                    refuse(self.id, &self.syn, why, shared);
                }
            }
            // The host has no such port, or no room for more flows.
            Err(_) => refuse(self.id, &self.syn, Unreachable::Network, shared),
        }
        None
    }

    /// Asks, and reads the answer: an errno, 0 if the host has connected. `None` until it is there.
    fn answer(&mut self) -> io::Result<Option<u16>> {
        if !self.asked {
            let Original { destination, protocol, .. } = self.original;
            match self.vsock.write(&Request { protocol, destination }.encode()) {
                // A new connection has room for this much.
                Ok(_) => self.asked = true,
                Err(error) if net::is_connecting(&self.vsock, &error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        let is_whole = fill(&mut self.vsock, &mut self.status, STATUS_LEN)?;
        Ok(is_whole.then(|| u16::from_be_bytes([self.status[0], self.status[1]])))
    }
}

/// Whether this is the other end of a connection.
fn is_from(tcp: &TcpStream, source: SocketAddr) -> bool {
    tcp.peer_addr().is_ok_and(|peer| {
        (peer.ip().to_canonical(), peer.port()) == (source.ip().to_canonical(), source.port())
    })
}

/// Has connect(2) fail.
fn refuse(id: Id, syn: &[u8], why: Unreachable, shared: &mut Shared) {
    // Should the socket be busy at this moment, its next SYN asks again.
    shared.programs.rearm(id);
    let answer = match why {
        Unreachable::Port => packet::reset(syn),
        _ => packet::unreachable(syn, why),
    };
    if let Some(packet) = answer {
        shared.injector.inject(&packet);
    }
}
