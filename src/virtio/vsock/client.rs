//! The clients of published UDP ports. A client's datagrams come to the port's socket with everybody else's, and
//! wait here for the guest; it counts as a client until nothing has been carried for some time.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::UdpSocket;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::sys::socket::{self, Ends};

/// Most clients of UDP ports at once; a new one takes the place of another. Anybody can send in the name of many, so
/// they leave room for the flows of TCP.
const MAX_CLIENTS: usize = 1024;
/// How long a client counts as one whom the server has not answered.
const UNANSWERED_LIMIT: Duration = Duration::from_secs(30);
/// How long one counts whom the server has answered (RFC 4787, REQ-5: at least two minutes).
const ANSWERED_LIMIT: Duration = Duration::from_secs(180);
/// Most bytes that wait for the guest, of one client and of all: as a socket's buffer, which they have left.
const MAX_WAITING: usize = 256 << 10;
const MAX_WAITING_OF_ALL: usize = 8 << 20;
/// Most datagrams of one client that wait: each takes some memory beside its bytes.
const MAX_DATAGRAMS: usize = 1024;

/// Which client: by the listener's number too, since a client may use several ports of a box.
pub type Name = (usize, Ends);

/// All clients.
#[derive(Debug, Default)]
pub struct Clients {
    slots: HashMap<Name, usize>,
    /// How many bytes wait for the guest.
    waiting: Rc<Cell<usize>>,
}

impl Clients {
    /// Whether there is no room for another.
    pub fn is_full(&self) -> bool {
        self.slots.len() >= MAX_CLIENTS
    }

    /// The slots of all clients' connections.
    pub fn slots(&self) -> impl Iterator<Item = usize> {
        self.slots.values().copied()
    }

    /// The slot of this client's connection.
    pub fn slot(&self, name: &Name) -> Option<usize> {
        self.slots.get(name).copied()
    }

    /// Notes the slot of a client's connection.
    pub fn insert(&mut self, name: Name, slot: usize) {
        self.slots.insert(name, slot);
    }

    /// Forgets a client.
    pub fn remove(&mut self, client: &Client) {
        self.slots.remove(&client.name);
    }

    /// A client of this socket, of which nothing waits yet.
    pub fn client(&self, name: Name, socket: Rc<UdpSocket>, now: Instant) -> Client {
        Client {
            name,
            socket,
            datagrams: VecDeque::new(),
            waiting: 0,
            waiting_of_all: Rc::clone(&self.waiting),
            is_answered: false,
            last_use: now,
        }
    }
}

/// A client.
#[derive(Debug)]
pub struct Client {
    name: Name,
    /// The port's, shared by all its clients.
    socket: Rc<UdpSocket>,
    datagrams: VecDeque<Box<[u8]>>,
    waiting: usize,
    waiting_of_all: Rc<Cell<usize>>,
    is_answered: bool,
    last_use: Instant,
}

impl Client {
    /// Whom a new client displaces is least by this: those that the server has not answered first, then whoever
    /// has been silent for longest.
    pub fn standing(&self) -> (bool, Instant) {
        (self.is_answered, self.last_use)
    }

    /// When it counts no more, unless something is carried.
    pub fn idle_at(&self) -> Instant {
        self.last_use + if self.is_answered { ANSWERED_LIMIT } else { UNANSWERED_LIMIT }
    }

    /// Takes a datagram of the client's for the guest, or loses it if too much waits.
    pub fn take(&mut self, datagram: &[u8], now: Instant) {
        let (waiting, of_all) =
            (self.waiting + datagram.len(), self.waiting_of_all.get() + datagram.len());
        let is_full = waiting > MAX_WAITING || self.datagrams.len() >= MAX_DATAGRAMS;
        if is_full || of_all > MAX_WAITING_OF_ALL {
            return;
        }
        self.last_use = now;
        self.waiting = waiting;
        self.waiting_of_all.set(of_all);
        self.datagrams.push_back(datagram.into());
    }

    /// Puts the next datagram that waits at the start of `buffer`; its length.
    ///
    /// # Errors
    /// `WouldBlock` if none waits.
    pub fn next(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let datagram = self.datagrams.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        self.forget(datagram.len());
        buffer[..datagram.len()].copy_from_slice(&datagram);
        Ok(datagram.len())
    }

    /// Sends the guest's answer, or loses it, as on any network.
    pub fn answer(&mut self, datagram: &[u8]) {
        self.is_answered = true;
        self.last_use = Instant::now();
        let _ = socket::answer(&self.socket, datagram, &self.name.1);
    }

    fn forget(&mut self, len: usize) {
        self.waiting -= len;
        self.waiting_of_all.set(self.waiting_of_all.get() - len);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.forget(self.waiting);
    }
}
