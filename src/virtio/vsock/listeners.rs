//! The host's listening sockets: accepts their clients, and rests a listener when the host has no room.
//!
//! Listeners are level-triggered: epoll reports a client as long as it waits. A listener that rests is
//! not watched.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Result;
use event_manager::EventSet;
use mote_agent::flow::{Protocol, Published};
use mote_agent::protocol::PUBLISH_PORT;

use super::endpoint::Endpoint;
use super::source::Source;
use crate::virtio::main_loop::Watcher;

/// How long a listener rests when the host has no descriptor or memory for its next client. The client
/// waits; trying again at once would keep the main loop from everything else.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listening host socket, non-blocking, whose clients are connected to the guest.
#[derive(Debug)]
pub enum Listener {
    /// One of the box's own sockets.
    Unix {
        /// The socket.
        socket: UnixListener,
        /// The guest's vsock port; with `None`, clients are closed at once.
        guest_port: Option<u32>,
        /// The vsock port to try when the guest refuses the first.
        fallback_port: Option<u32>,
    },
    /// A published port. Its clients wait to be accepted until the guest's servers listen.
    Published {
        /// The socket.
        socket: TcpListener,
        /// The guest's TCP port.
        guest_port: u16,
    },
    /// A published UDP port, with the datagrams of all its clients. It may be that nobody waits for them.
    Datagrams {
        /// The socket, made by [`bind_udp`](crate::sys::socket::bind_udp).
        socket: Rc<UdpSocket>,
        /// The guest's UDP port.
        guest_port: u16,
    },
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Listener::Unix { socket, .. } => socket.as_raw_fd(),
            Listener::Published { socket, .. } => socket.as_raw_fd(),
            Listener::Datagrams { socket, .. } => socket.as_raw_fd(),
        }
    }
}

/// A client that has been accepted.
#[derive(Debug)]
pub struct Accepted {
    /// Its socket, unless it has gone already.
    pub endpoint: io::Result<Endpoint>,
    /// The guest's vsock port.
    pub guest_port: u32,
    /// The vsock port to try when the guest refuses the first.
    pub fallback_port: Option<u32>,
}

/// All of a box's listeners.
#[derive(Debug)]
pub struct Listeners {
    /// By number; one that was removed is not there.
    listeners: Vec<Option<Listener>>,
    /// The listeners that are not watched, and until when; in order of that time.
    resting: VecDeque<(Instant, usize)>,
}

impl Listeners {
    /// All listeners of a box; none is watched yet.
    pub fn new(listeners: Vec<Listener>) -> Self {
        Listeners { listeners: listeners.into_iter().map(Some).collect(), resting: VecDeque::new() }
    }

    /// Starts watching the box's own sockets.
    ///
    /// # Errors
    /// The host has no room to watch another.
    pub fn watch_sockets(&self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.watch_all(|listener| matches!(listener, Listener::Unix { .. }), watcher)
    }

    /// Starts watching the published ports.
    ///
    /// # Errors
    /// The host has no room to watch another.
    pub fn watch_ports(&self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.watch_all(|listener| !matches!(listener, Listener::Unix { .. }), watcher)
    }

    fn watch_all(
        &self,
        which: impl Fn(&Listener) -> bool,
        watcher: &mut Watcher<'_, '_>,
    ) -> Result<()> {
        (0..self.listeners.len())
            .filter(|index| self.listeners[*index].as_ref().is_some_and(&which))
            .try_for_each(|index| self.watch(index, watcher))
    }

    fn watch(&self, index: usize, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Some(listener) = &self.listeners[index] else { return Ok(()) };
        let source = Source::Listener(index).to_number();
        Ok(watcher.add(listener, source, EventSet::IN)?)
    }

    /// Adds a listener, which is watched at once; its number.
    ///
    /// # Errors
    /// The host has no room to watch another.
    pub fn add(&mut self, listener: Listener, watcher: &mut Watcher<'_, '_>) -> Result<usize> {
        let free = self.listeners.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.listeners.push(None);
            self.listeners.len() - 1
        });
        self.listeners[index] = Some(listener);
        self.watch(index, watcher).inspect_err(|_| self.listeners[index] = None)?;
        Ok(index)
    }

    /// Closes the listener of this number.
    pub fn remove(&mut self, index: usize, watcher: &mut Watcher<'_, '_>) {
        if let Some(listener) = self.listeners.get_mut(index).and_then(Option::take) {
            // Fails for one that rests.
            let _ = watcher.remove(&listener);
            self.resting.retain(|(_, resting)| *resting != index);
        }
    }

    /// When [`Listeners::wake`] has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.resting.front().map(|(until, _)| *until)
    }

    /// Watches listeners again whose rest is over by `now`.
    pub fn wake(&mut self, now: Instant, watcher: &mut Watcher<'_, '_>) {
        while let Some((until, index)) = self.resting.front().copied()
            && now >= until
        {
            self.resting.pop_front();
            if self.watch(index, watcher).is_err() {
                // The host still has no room.
                self.resting.push_back((now + ACCEPT_PAUSE, index));
            }
        }
    }

    /// Accepts the next client of the listener of this number, if there is one and there is room for
    /// it; otherwise the client waits in the listener's queue.
    ///
    /// # Errors
    /// The main loop cannot stop watching a listener.
    pub fn accept(
        &mut self,
        index: usize,
        has_room_for_flow: bool,
        watcher: &mut Watcher<'_, '_>,
    ) -> Result<Option<Accepted>> {
        // After `close` there are no listeners.
        let Some(Some(listener)) = self.listeners.get(index) else { return Ok(None) };
        let accepted = match listener {
            Listener::Unix { socket, guest_port, fallback_port } => {
                let fallback_port = *fallback_port;
                socket.accept().map(|(socket, _)| {
                    let endpoint = Endpoint::unix(socket);
                    guest_port.map(|guest_port| Accepted { endpoint, guest_port, fallback_port })
                })
            }
            Listener::Datagrams { .. } => return Ok(None),
            Listener::Published { .. } if !has_room_for_flow => {
                Err(ErrorKind::QuotaExceeded.into())
            }
            Listener::Published { socket, guest_port } => {
                socket.accept().map(|(socket, client)| {
                    let protocol = Protocol::Tcp;
                    let header = Published { protocol, guest_port: *guest_port, client };
                    Some(Accepted {
                        endpoint: Endpoint::published(socket, header),
                        guest_port: PUBLISH_PORT,
                        fallback_port: None,
                    })
                })
            }
        };
        match accepted {
            Ok(client) => Ok(client),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(_) => {
                watcher.remove(listener)?;
                self.resting.push_back((Instant::now() + ACCEPT_PAUSE, index));
                Ok(None)
            }
        }
    }

    /// The listener of this number, if it is a published UDP port: its socket, and the guest's port.
    pub fn datagrams(&self, index: usize) -> Option<(&Rc<UdpSocket>, u16)> {
        match self.listeners.get(index)?.as_ref()? {
            Listener::Datagrams { socket, guest_port } => Some((socket, *guest_port)),
            _ => None,
        }
    }

    /// Closes all listeners: later clients are refused.
    pub fn close(&mut self, watcher: &mut Watcher<'_, '_>) {
        for listener in self.listeners.drain(..).flatten() {
            // Fails for those not watched: they rest, or are ports and the guest was never ready.
            let _ = watcher.remove(&listener);
        }
        self.resting.clear();
    }
}
