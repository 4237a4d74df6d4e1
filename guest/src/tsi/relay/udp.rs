//! UDP: datagrams between the box's applications and the outside. Each pair of a socket and a
//! destination is a flow ([`Datagrams`]), which lasts until the socket is closed or nothing has been
//! carried for some time.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Instant;

use mote_agent::flow::Request;
use mote_agent::protocol::FLOW_PORT;
use vmm_sys_util::epoll::EventSet;

use super::flows::{Flows, Key, Kind};
use super::shared::{BATCH, Injector, Shared, Token, Wake};
use crate::sys::net::{self, ReceivedDatagram};
use crate::tsi::datagrams::{Datagrams, Received};
use crate::tsi::packet::{self, Unreachable};
use crate::tsi::program::{AGENT_PORT, Id, Original};

/// Flows of datagrams.
#[derive(Debug)]
pub struct Udp {
    /// Where applications are redirected to, if they are.
    socket: Option<UdpSocket>,
    flows: Flows<Flow>,
    /// By what datagrams say.
    by_ends: HashMap<Ends, Key>,
    /// By the application's socket.
    by_cookie: HashMap<u64, Vec<Key>>,
}

/// The two ends of a flow, as its datagrams name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ends {
    /// Stands for the destination.
    id: Id,
    /// The application's address, of IPv4 as IPv4-mapped.
    source: SocketAddrV6,
}

#[derive(Debug)]
struct Flow {
    datagrams: Datagrams,
    /// `None` for one that was refused before it began: it goes to the host only to be counted.
    ends: Option<Ends>,
    /// Names the application's socket.
    cookie: u64,
    /// Nothing more comes from the application.
    released: bool,
    /// Has a turn to come.
    queued: bool,
}

impl Udp {
    /// With the socket that applications are redirected to, if they are.
    pub fn new(socket: Option<UdpSocket>) -> Self {
        Udp {
            socket,
            flows: Flows::new(Kind::Udp),
            by_ends: HashMap::new(),
            by_cookie: HashMap::new(),
        }
    }

    /// Has what comes to the socket reported.
    ///
    /// # Errors
    /// As [`Shared::watch`].
    pub fn watch(&self, shared: &Shared) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        shared.watch(socket.as_raw_fd(), EventSet::IN, Token::Datagrams)
    }

    /// Takes applications' datagrams; `false` once none is left.
    pub fn take(&mut self, shared: &mut Shared) -> bool {
        for _ in 0..BATCH {
            let Some(socket) = &self.socket else { return false };
            let mut scratch = std::mem::take(&mut shared.scratch);
            let received = net::receive_datagram(socket, &mut scratch);
            let failed = match &received {
                &Ok(ReceivedDatagram { len, source, destination }) => Id::of(destination)
                    .and_then(|id| self.send(Ends { id, source }, &scratch[..len], shared)),
                Err(_) => None,
            };
            shared.scratch = scratch;
            if let Some(key) = failed {
                // Whatever the host has said about it is read first.
                self.advance(key, shared);
                self.forget(key);
            }
            if received.is_err() {
                return false;
            }
        }
        true
    }

    /// Sends a datagram on its way; the flow that turns out to have failed.
    fn send(&mut self, ends: Ends, datagram: &[u8], shared: &mut Shared) -> Option<Key> {
        let now = Instant::now();
        let key = match self.by_ends.get(&ends) {
            Some(key) => *key,
            None => self.begin(ends, now, shared)?,
        };
        let flow = self.flows.get_mut(key)?;
        flow.datagrams.send(datagram, now).err().map(|_| key)
    }

    fn begin(&mut self, ends: Ends, now: Instant, shared: &mut Shared) -> Option<Key> {
        let original = shared.programs.original(ends.id)?;
        let key = self.place(original, Some(ends), now, shared)?;
        self.by_ends.insert(ends, key);
        self.by_cookie.entry(original.cookie).or_default().push(key);
        Some(key)
    }

    /// Connects to the host.
    fn place(
        &mut self,
        Original { cookie, destination, protocol }: Original,
        ends: Option<Ends>,
        now: Instant,
        shared: &mut Shared,
    ) -> Option<Key> {
        let vsock = net::vsock_connect(FLOW_PORT).ok()?;
        let key = shared.place(&mut self.flows, vsock.as_raw_fd()).ok()?;
        let datagrams = Datagrams::new(vsock, Request { protocol, destination }.encode(), now);
        let released = ends.is_none();
        self.flows.put(key, Flow { datagrams, ends, cookie, released, queued: false });
        shared.limit_time();
        Some(key)
    }

    /// An application was refused a datagram. The host says so again, and counts it.
    pub fn refused(&mut self, original: Original, shared: &mut Shared) {
        // One for which there is no room is not counted.
        let _ = self.place(original, None, Instant::now(), shared);
    }

    /// Serves a flow.
    pub fn wake(&mut self, key: Key, wake: Wake, shared: &mut Shared) {
        if let Wake::Turn = wake
            && let Some(flow) = self.flows.get_mut(key)
        {
            flow.queued = false;
        }
        self.advance(key, shared);
    }

    fn advance(&mut self, key: Key, shared: &mut Shared) {
        if let (Some(socket), Some(flow)) = (&self.socket, self.flows.get_mut(key))
            && !flow.step(key, socket, shared)
        {
            self.forget(key);
        }
    }

    fn forget(&mut self, key: Key) {
        let Some(Flow { ends, cookie, .. }) = self.flows.take(key) else { return };
        self.flows.remove(key);
        if let Some(ends) = ends {
            self.by_ends.remove(&ends);
        }
        if let Some(keys) = self.by_cookie.get_mut(&cookie) {
            keys.retain(|known| *known != key);
            if keys.is_empty() {
                self.by_cookie.remove(&cookie);
            }
        }
    }

    /// An application has closed its socket.
    pub fn released(&mut self, cookie: u64, shared: &mut Shared) {
        for key in self.by_cookie.get(&cookie).cloned().unwrap_or_default() {
            self.release(key, shared);
        }
    }

    /// An application's socket has connected anew, to somewhere else.
    pub fn replaced(&mut self, id: Id, shared: &mut Shared) {
        let of_id = self.by_ends.iter().filter(|(ends, _)| ends.id == id);
        let keys: Vec<Key> = of_id.map(|(_, key)| *key).collect();
        for key in keys {
            self.release(key, shared);
        }
    }

    fn release(&mut self, key: Key, shared: &mut Shared) {
        if let Some(flow) = self.flows.get_mut(key) {
            flow.released = true;
            self.advance(key, shared);
        }
    }

    /// Gives up what has not been used for long.
    pub fn sweep(&mut self, now: Instant, shared: &mut Shared) {
        for slot in self.flows.slots() {
            let key = self.flows.key(slot);
            if let Some(flow) = self.flows.get_mut(key) {
                shared.limit_time();
                if now >= flow.datagrams.idle_at() {
                    self.forget(key);
                }
            }
        }
    }

    /// Whether everything that applications have sent has gone to the host.
    pub fn has_sent_all(&self) -> bool {
        self.flows.iter().all(|flow| flow.datagrams.has_sent_all())
    }
}

impl Flow {
    /// Moves what can be moved, `socket` being the one to the applications; `false` at the flow's end.
    fn step(&mut self, key: Key, socket: &UdpSocket, shared: &mut Shared) -> bool {
        let Shared { scratch, injector, programs, .. } = shared;
        let received = self.datagrams.receive(scratch, Instant::now(), |received| {
            let Some(ends @ Ends { id, source }) = self.ends else { return };
            match received {
                Received::Datagram(bytes) => {
                    let from = if source.ip().to_ipv4_mapped().is_some() {
                        id.ip4().to_ipv6_mapped()
                    } else {
                        id.ip6()
                    };
                    // As on any network, a receiver without room loses it.
                    let _ = net::send_datagram(socket, bytes, from, source);
                }
                Received::Error(errno) => tell_sender(ends, errno, injector),
                Received::Refused(errno) => {
                    tell_sender(ends, errno, injector);
                    // As ICMP over IPv4 would say it.
                    let is_prohibited = i32::from(errno) == libc::EACCES;
                    let errno = if is_prohibited { libc::EHOSTUNREACH as u16 } else { errno };
                    programs.refuse(id, errno);
                }
            }
        });
        let sent = self.datagrams.flush();
        if self.released && self.datagrams.has_sent_all() {
            // In order, so that the host sends them all.
            let _ = net::shutdown_write(self.datagrams.socket());
            return false;
        }
        if received.as_ref().is_ok_and(|more| *more) && !std::mem::replace(&mut self.queued, true) {
            shared.queue_turn(key);
        }
        received.is_ok() && sent.is_ok()
    }
}

/// Has the next call on the application's socket fail.
fn tell_sender(Ends { id, source }: Ends, errno: u16, injector: &Injector) {
    let Some(why) = Unreachable::from_errno(errno) else { return };
    let ip = source.ip().to_canonical();
    let flow = match ip {
        IpAddr::V4(_) => IpAddr::V4(id.ip4()),
        IpAddr::V6(_) => IpAddr::V6(id.ip6()),
    };
    let (source, flow) = (SocketAddr::new(ip, source.port()), SocketAddr::new(flow, AGENT_PORT));
    if let Some(headers) = packet::datagram_headers(source, flow)
        && let Some(packet) = packet::unreachable(&headers, why)
    {
        injector.inject(&packet);
    }
}
