//! What all flows are served with: the epoll that watches their sockets, the BPF programs that know
//! where they go, and the means to send packets to applications.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::flows::{Flows, Key, Side};
use crate::sys::net::RawSockets;
use crate::tsi::packet::Packet;
use crate::tsi::program::Programs;
use crate::tsi::stream::SCRATCH_LEN;

/// Most events, connections and datagrams handled before others get their turn.
pub const BATCH: usize = 64;
/// How long a client of a published port may take to be named by the host, and an application to
/// answer its own SYN's answer: at once, unless there is too much else to do.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
/// How often time limits are looked after, while there are any.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// The BPF programs have something to report.
    Events,
    /// An application's connection has come to the listener.
    Listener,
    /// An application's datagram has come.
    Datagrams,
    /// A client of a published port has come.
    Published,
    /// PID 1 asks the process to finish.
    Lifeline,
    /// A socket of a flow is ready.
    Flow(Key, Side),
}

/// Set in addition to a flow's key: the event is about its inner side. Keys do not use this bit.
const INNER_BIT: u64 = 1 << 31;

impl Token {
    /// As epoll keeps it.
    pub fn to_data(self) -> u64 {
        match self {
            Token::Events => Key::END,
            Token::Listener => Key::END + 1,
            Token::Datagrams => Key::END + 2,
            Token::Published => Key::END + 3,
            Token::Lifeline => Key::END + 4,
            Token::Flow(key, Side::Vsock) => key.to_data(),
            Token::Flow(key, Side::Inner) => key.to_data() | INNER_BIT,
        }
    }

    /// From epoll, which returns what it was given.
    pub fn from_data(data: u64) -> Self {
        match data.wrapping_sub(Key::END) {
            0 => Token::Events,
            1 => Token::Listener,
            2 => Token::Datagrams,
            3 => Token::Published,
            4 => Token::Lifeline,
            _ if data & INNER_BIT != 0 => {
                Token::Flow(Key::from_data(data & !INNER_BIT), Side::Inner)
            }
            _ => Token::Flow(Key::from_data(data), Side::Vsock),
        }
    }
}

/// Why a flow is served now.
#[derive(Debug, Clone, Copy)]
pub enum Wake {
    /// One of its sockets has become ready for this.
    Ready(Side, EventSet),
    /// It had more to do, and others have had their turn.
    Turn,
}

/// Sends packets to applications, in the name of what they talk to.
#[derive(Debug)]
pub struct Injector(pub Option<RawSockets>);

impl Injector {
    /// Sends one. What is lost here is lost as on any network: the sender tries again.
    pub fn inject(&self, packet: &Packet) {
        if let Some(raw) = &self.0 {
            let _ = raw.send(&packet.bytes, packet.destination);
        }
    }
}

/// What all flows are served with.
pub struct Shared {
    /// The BPF programs.
    pub programs: Programs,
    /// To applications.
    pub injector: Injector,
    /// Where programs of the box listen, but for all addresses and loopback's: on those that it shares with others; and with
    /// how many sockets.
    pub servers: BTreeMap<SocketAddr, usize>,
    /// Room for one read, of [`SCRATCH_LEN`] bytes.
    pub scratch: Vec<u8>,
    epoll: Epoll,
    /// Flows that have more to do once the others have had their turn.
    turns: VecDeque<Key>,
    /// When time limits are looked after next.
    sweep_at: Option<Instant>,
}

impl Shared {
    /// With an epoll that watches nothing yet.
    ///
    /// # Errors
    /// If there is none to be had.
    pub fn new(programs: Programs, injector: Injector) -> io::Result<Self> {
        Ok(Shared {
            programs,
            injector,
            servers: BTreeMap::new(),
            scratch: vec![0; SCRATCH_LEN],
            epoll: Epoll::new()?,
            turns: VecDeque::new(),
            sweep_at: None,
        })
    }

    /// Has events of a descriptor reported.
    ///
    /// # Errors
    /// If the kernel has no room for it (epoll_ctl(2)).
    pub fn watch(&self, fd: RawFd, set: EventSet, token: Token) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token.to_data()))
    }

    /// Has every change of a flow's socket reported.
    ///
    /// # Errors
    /// As [`Shared::watch`].
    pub fn watch_flow(&self, fd: RawFd, key: Key, side: Side) -> io::Result<()> {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.watch(fd, set, Token::Flow(key, side))
    }

    /// Finds a place for a flow with this vsock side, and watches that.
    ///
    /// # Errors
    /// As [`Shared::watch`].
    pub fn place<F>(&self, flows: &mut Flows<F>, vsock: RawFd) -> io::Result<Key> {
        let key = flows.reserve();
        self.watch_flow(vsock, key, Side::Vsock).inspect_err(|_| flows.remove(key))?;
        Ok(key)
    }

    /// Waits for events, for this long (-1: without limit); says how many there are.
    ///
    /// # Errors
    /// Those of epoll_wait(2), `EINTR` among them.
    pub fn wait(&self, timeout_ms: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
        self.epoll.wait(timeout_ms, events)
    }

    /// Has a flow served again after the others. To be called once until it has had its turn.
    pub fn queue_turn(&mut self, key: Key) {
        self.turns.push_back(key);
    }

    /// How many flows have a turn.
    pub fn turns(&self) -> usize {
        self.turns.len()
    }

    /// The next flow that has one.
    pub fn next_turn(&mut self) -> Option<Key> {
        self.turns.pop_front()
    }

    /// Has time limits looked after.
    pub fn limit_time(&mut self) {
        self.sweep_at.get_or_insert_with(|| Instant::now() + SWEEP_INTERVAL);
    }

    /// When time limits are to be looked after, if any flow has one.
    pub fn sweep_at(&self) -> Option<Instant> {
        self.sweep_at
    }

    /// Notes that time limits are being looked after; those that are left call for it again
    /// ([`Shared::limit_time`]).
    pub fn begin_sweep(&mut self) {
        self.sweep_at = None;
    }
}

/// Reads until `bytes` has `len` bytes, at most 64; `false` while more are to come.
///
/// # Errors
/// If there is an end or an error before.
pub fn fill(from: &mut File, bytes: &mut Vec<u8>, len: usize) -> io::Result<bool> {
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

#[cfg(test)]
mod tests {
    use super::super::flows::Kind;
    use super::*;

    #[test]
    fn tokens_come_back_as_they_were() {
        let mut flows = Flows::<()>::new(Kind::Published);
        let key = flows.reserve();
        for token in [
            Token::Events,
            Token::Listener,
            Token::Datagrams,
            Token::Published,
            Token::Lifeline,
            Token::Flow(key, Side::Vsock),
            Token::Flow(key, Side::Inner),
        ] {
            assert_eq!(Token::from_data(token.to_data()), token);
        }
    }
}
