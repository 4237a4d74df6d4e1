//! The process that serves the box's flows: one thread around one epoll, apart from PID 1, so that
//! a box's traffic never keeps it from its other work, nor takes it along.
//!
//! This file waits for events and says whose they are. Each kind of flow keeps its own table and knows
//! its own states. Each module uses only those above it:
//!
//! - [`flows`]: the table of one kind of flow, and the keys that name flows
//! - [`shared`]: what all flows are served with
//! - [`spliced`]: the last state of TCP in either direction
//! - [`outgoing`], [`udp`], [`published`]: the kinds of flows

mod flows;
mod outgoing;
mod published;
mod shared;
mod spliced;
mod udp;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use mote_agent::flow::Listens;
use mote_agent::protocol::PUBLISH_PORT;
use vmm_sys_util::epoll::{EpollEvent, EventSet};

use self::flows::{Key, Kind};
use self::outgoing::Outgoing;
use self::published::Clients;
use self::shared::{BATCH, Injector, Shared, Token, Wake};
use self::udp::Udp;
use crate::sys::net;
use crate::tsi::program::{AGENT_PORT, Event, Id, Programs};

/// How long the host may take nothing before the rest of what the box has sent is given up.
const DRAIN_PATIENCE: Duration = Duration::from_millis(400);
/// Most words of sockets that listen which wait for PID 1.
const MAX_UNTOLD: usize = 4096;
/// How often that is looked at, in milliseconds.
const DRAIN_STEP_MS: i32 = 50;

/// Where the box's connections come to the agent. PID 1 has them too: when a relay is killed, nobody else can
/// have its ports before the next one is there.
#[derive(Debug)]
pub struct Sockets {
    /// Where applications are redirected to, if they are: both on the agent's port.
    applications: Option<(TcpListener, UdpSocket)>,
    /// Where the host's connections come, if there are published ports.
    published: Option<File>,
}

impl Sockets {
    /// Opens those that a box needs.
    ///
    /// # Errors
    /// If the kernel refuses one of them.
    pub fn open(is_outgoing: bool, is_published: bool) -> io::Result<Self> {
        let applications = || {
            Ok::<_, io::Error>((net::tcp_listen(AGENT_PORT)?, net::datagram_socket(AGENT_PORT)?))
        };
        Ok(Sockets {
            applications: is_outgoing.then(applications).transpose()?,
            published: is_published.then(|| net::vsock_listen(PUBLISH_PORT)).transpose()?,
        })
    }

    /// All of their descriptors.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let applications = self.applications.iter();
        applications
            .flat_map(|(listener, datagrams)| [listener.as_fd(), datagrams.as_fd()])
            .chain(self.published.iter().map(AsFd::as_fd))
    }

    /// Ready when the host has a client of a published port, if there are any.
    pub fn clients(&self) -> Option<BorrowedFd<'_>> {
        self.published.as_ref().map(AsFd::as_fd)
    }

    /// The same sockets, on descriptors of their own.
    ///
    /// # Errors
    /// If there is no room for more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let applications = self.applications.as_ref();
        let applications = applications
            .map(|(listener, datagrams)| {
                Ok::<_, io::Error>((listener.try_clone()?, datagrams.try_clone()?))
            })
            .transpose()?;
        let published = self.published.as_ref().map(File::try_clone).transpose()?;
        Ok(Sockets { applications, published })
    }
}

/// The process's state.
pub struct Relay<'a> {
    shared: Shared,
    outgoing: Outgoing,
    udp: Udp,
    clients: Clients,
    /// Where PID 1 reads which sockets listen: a pipe that does not wait.
    listens: &'a File,
    /// What it has had no room for.
    untold: VecDeque<Listens>,
    /// PID 1 wants the process to end.
    draining: bool,
    /// While draining: when the host has last taken something.
    progress: Option<DrainProgress>,
}

/// How far the host has come with what the box has sent.
#[derive(Debug)]
struct DrainProgress {
    /// How many bytes it has taken of the connections that are left.
    taken: u64,
    /// Since when it has taken no more.
    since: Instant,
}

impl<'a> Relay<'a> {
    /// Prepares to serve the flows that `programs` know of and that come to `sockets`; the end of `lifeline`
    /// asks the process to finish. PID 1 reads from `listens`.
    ///
    /// # Errors
    /// If the kernel refuses a raw socket, or has no room for the epoll or for what it is to watch.
    pub fn new(
        programs: Programs,
        sockets: Sockets,
        lifeline: &File,
        listens: &'a File,
    ) -> io::Result<Self> {
        let Sockets { applications, published } = sockets;
        let (listener, datagrams) = applications.unzip();
        let raw = listener.is_some().then(net::RawSockets::open).transpose()?;
        let relay = Relay {
            shared: Shared::new(programs, Injector(raw))?,
            outgoing: Outgoing::new(listener),
            udp: Udp::new(datagrams),
            clients: Clients::new(published),
            listens,
            untold: VecDeque::new(),
            draining: false,
            progress: None,
        };
        relay.outgoing.watch(&relay.shared)?;
        relay.udp.watch(&relay.shared)?;
        relay.clients.watch(&relay.shared)?;
        // Once: its end would stay readable.
        let once = EventSet::IN | EventSet::EDGE_TRIGGERED;
        relay.shared.watch(lifeline.as_raw_fd(), once, Token::Lifeline)?;
        Ok(relay)
    }

    /// Serves until PID 1 closes its end of the lifeline, and then until everything that
    /// applications have sent has gone to the host.
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = vec![EpollEvent::default(); BATCH];
        while !(self.draining && self.is_drained()) {
            let count = match self.shared.wait(self.timeout_ms(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                self.handle(Token::from_data(event.data()), event.event_set());
            }
            for _ in 0..self.shared.turns() {
                if let Some(key) = self.shared.next_turn() {
                    self.wake(key, Wake::Turn);
                }
            }
            self.tell();
            let now = Instant::now();
            if self.shared.sweep_at().is_some_and(|at| now >= at) {
                self.sweep(now);
            }
        }
        Ok(())
    }

    fn timeout_ms(&self) -> i32 {
        if self.shared.turns() > 0 {
            return 0;
        }
        if self.draining || !self.untold.is_empty() {
            return DRAIN_STEP_MS;
        }
        self.shared.sweep_at().map_or(-1, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
            i32::try_from(left).unwrap_or(i32::MAX)
        })
    }

    fn handle(&mut self, token: Token, set: EventSet) {
        match token {
            Token::Events => self.take_events(),
            Token::Listener => drop(self.outgoing.accept(&mut self.shared)),
            Token::Datagrams => drop(self.udp.take(&mut self.shared)),
            Token::Published => self.clients.accept(&mut self.shared),
            Token::Lifeline => self.draining = true,
            Token::Flow(key, side) => self.wake(key, Wake::Ready(side, set)),
        }
    }

    fn wake(&mut self, key: Key, wake: Wake) {
        match key.kind() {
            Kind::Outgoing => self.outgoing.wake(key, wake, &mut self.shared),
            Kind::Udp => self.udp.wake(key, wake, &mut self.shared),
            Kind::Published => self.clients.wake(key, wake, &mut self.shared),
        }
    }

    fn take_events(&mut self) {
        for _ in 0..BATCH {
            match self.shared.programs.next_event() {
                // Nobody is left to wait for the answer.
                Some(Event::Syn { .. }) if self.draining => {}
                Some(Event::Syn { id, original, packet }) => {
                    self.outgoing.ask_host(id, original, packet, &mut self.shared);
                }
                Some(Event::Released { id, cookie }) => self.released(id, cookie),
                Some(Event::Replaced(id)) => self.replaced(id),
                Some(Event::Refused(original)) => self.udp.refused(original, &mut self.shared),
                Some(Event::Listens(listens)) => self.listens(listens),
                None => return,
            }
        }
    }

    /// A socket listens, or does not any more.
    fn listens(&mut self, listens: Listens) {
        let Listens { address, starts } = listens;
        let servers = &mut self.shared.servers;
        let is_single = !address.ip().is_loopback() && !address.ip().is_unspecified();
        let has_room = servers.len() < MAX_UNTOLD;
        match servers.get_mut(&address) {
            Some(sockets) if starts => *sockets += 1,
            Some(1) => drop(servers.remove(&address)),
            Some(sockets) => *sockets -= 1,
            None if starts && is_single && has_room => {
                servers.insert(address, 1);
            }
            None => {}
        }
        // A box that changes its mind so often is not to cost memory.
        if self.untold.len() < MAX_UNTOLD {
            self.untold.push_back(listens);
        }
    }

    /// Tells PID 1 which sockets listen.
    fn tell(&mut self) {
        while let Some(listens) = self.untold.front() {
            // As a whole or not at all (pipe(7)). A failure means that nobody reads any more.
            match self.listens.write(&listens.encode()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                _ => drop(self.untold.pop_front()),
            }
        }
    }

    /// An application has closed a socket.
    fn released(&mut self, id: Option<Id>, cookie: u64) {
        // What it sent before counts.
        while self.udp.take(&mut self.shared) {}
        if let Some(id) = id {
            self.shared.programs.forget(id);
            self.outgoing.released(id, &mut self.shared);
        }
        self.udp.released(cookie, &mut self.shared);
    }

    /// A socket has connected anew, to somewhere else.
    fn replaced(&mut self, id: Id) {
        while self.udp.take(&mut self.shared) {}
        self.shared.programs.forget(id);
        self.outgoing.replaced(id);
        self.udp.replaced(id, &mut self.shared);
    }

    /// Gives up what has taken too long.
    fn sweep(&mut self, now: Instant) {
        self.shared.begin_sweep();
        self.outgoing.sweep(now, &mut self.shared);
        self.udp.sweep(now, &mut self.shared);
        self.clients.sweep(now, &mut self.shared);
    }

    /// Whether everything that applications have sent has gone to the host, or it takes nothing.
    fn is_drained(&mut self) -> bool {
        while self.outgoing.accept(&mut self.shared) {}
        while self.udp.take(&mut self.shared) {}
        let now = Instant::now();
        let mut sent_all =
            self.udp.has_sent_all() && self.clients.has_sent_all() && !self.outgoing.has_answered();
        let mut taken = 0;
        for stream in self.outgoing.streams().chain(self.clients.streams()) {
            sent_all &= stream.has_sent_all();
            taken += stream.taken();
        }
        if sent_all {
            return true;
        }
        let progress = self.progress.get_or_insert(DrainProgress { taken, since: now });
        if progress.taken != taken {
            *progress = DrainProgress { taken, since: now };
        }
        now >= progress.since + DRAIN_PATIENCE
    }
}
