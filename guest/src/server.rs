//! The exec and terminal servers: accept connections, look at the first frame's header, and hand
//! each request to a session, a process of its own.
//!
//! A session is a fork of the agent, so it starts in a fraction of a millisecond, may wait for its
//! client and read the guest's files as it likes, and takes nobody with it when it fails. A client
//! that has not asked for anything yet costs no process, and a heartbeat neither.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mote_agent::exec;
use mote_agent::frame::{self, HEADER_LEN};
use mote_agent::protocol::{EXEC_SERVER_PORT, PTY_SERVER_PORT};
use mote_agent::pty;

use crate::attest::Attest;
use crate::cgroup::BoxCgroup;
use crate::connection::{Connection, PATIENCE};
use crate::journal::Journal;
use crate::session::Context;
use crate::spawn::Held;
use crate::sys::{self, ExitStatus, Interest, Reaped, net};
use crate::{request, terminal};

/// Connections accepted before the agent looks at its other work.
const ACCEPTS: usize = 64;
/// How long no connection is accepted after one could not be.
const REST: Duration = Duration::from_millis(100);

/// What a port serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Service {
    /// Contract §4.
    Exec,
    /// Contract §5.
    Pty,
}

/// A socket on which clients of a service come.
#[derive(Debug)]
struct Listener {
    service: Service,
    socket: File,
}

/// A connection whose first frame's header has not arrived yet.
#[derive(Debug)]
struct PendingClient {
    service: Service,
    socket: File,
    header: [u8; HEADER_LEN],
    filled: usize,
    deadline: Instant,
}

/// A session that has not ended.
#[derive(Debug)]
struct Session {
    /// Of its process.
    pid: i32,
    /// Names its command's cgroup.
    number: u64,
}

/// What to do with a connection, after its first header.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Send these bytes and close it.
    Reply(Vec<u8>),
    /// Give it a session.
    Session,
}

/// The two servers.
#[derive(Debug)]
pub struct Server {
    listeners: [Listener; 2],
    /// Until when no connection is accepted, for want of descriptors or memory.
    resting_until: Option<Instant>,
    pending: Vec<PendingClient>,
    sessions: Vec<Session>,
    last_session: u64,
    /// What sessions share, once there is one.
    journal: Option<Journal>,
    /// Sessions that have ended while something of their command still ran.
    survived: Vec<u64>,
}

impl Server {
    /// Starts to listen.
    ///
    /// # Errors
    /// If the kernel refuses a socket or its port.
    pub fn listen() -> Result<Self, String> {
        let listen = |service, port| {
            let socket = net::vsock_listen(port)
                .map_err(|e| format!("listen on vsock port {port:#x} of the guest: {e}"))?;
            Ok::<_, String>(Listener { service, socket })
        };
        Ok(Server {
            listeners: [
                listen(Service::Exec, EXEC_SERVER_PORT)?,
                listen(Service::Pty, PTY_SERVER_PORT)?,
            ],
            resting_until: None,
            pending: Vec::new(),
            sessions: Vec::new(),
            last_session: 0,
            journal: None,
            survived: Vec::new(),
        })
    }

    /// What to wait for.
    pub fn interests(&self) -> impl Iterator<Item = Interest<'_>> {
        let pending = self.pending.iter().map(|client| &client.socket);
        let listeners = self.listeners.iter().map(|listener| &listener.socket);
        let listeners = listeners.filter(|_| self.resting_until.is_none());
        pending.chain(listeners).map(|socket| Interest::read(socket.as_fd()))
    }

    /// When the time of the first pending client is over, or a rest.
    pub fn next_deadline(&self) -> Option<Instant> {
        // In order of arrival, and all have the same time.
        let first = self.pending.first().map(|client| client.deadline);
        first.into_iter().chain(self.resting_until).min()
    }

    /// Serves what is ready; `ready` answers [`Server::interests`] in its order.
    pub fn serve(&mut self, ready: &[bool], context: &Context<'_>) {
        let now = Instant::now();
        let mut ready = ready.iter().copied();
        for client in std::mem::take(&mut self.pending) {
            let ready = ready.next().unwrap_or(false);
            self.serve_pending(client, ready, now, context);
        }
        self.resting_until = self.resting_until.filter(|until| now < *until);
        for (at, _) in ready.enumerate().filter(|(_, ready)| *ready) {
            self.accept(at, now, context);
        }
    }

    fn accept(&mut self, at: usize, now: Instant, context: &Context<'_>) {
        for _ in 0..ACCEPTS {
            let Listener { service, socket } = &self.listeners[at];
            let service = *service;
            let socket = match net::accept(socket) {
                Ok(socket) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.resting_until = Some(now + REST);
                    return;
                }
            };
            let deadline = now + PATIENCE;
            let header = [0; HEADER_LEN];
            let client = PendingClient { service, socket, header, filled: 0, deadline };
            self.serve_pending(client, true, now, context);
        }
    }

    /// Reads what there is of the header and keeps, answers or hands on the connection.
    fn serve_pending(
        &mut self,
        mut client: PendingClient,
        ready: bool,
        now: Instant,
        context: &Context<'_>,
    ) {
        while ready && client.filled < HEADER_LEN {
            match client.socket.read(&mut client.header[client.filled..]) {
                // A close before any request; contract §4.1 has no answer to it.
                Ok(0) => return,
                Ok(read) => client.filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return,
            }
        }
        let PendingClient { service, header, filled, deadline, .. } = client;
        let verdict = if filled == HEADER_LEN {
            judge(service, header)
        } else if now >= deadline {
            let text = format!("No request within {} s", PATIENCE.as_secs());
            Verdict::Reply(error_frame(service, &text))
        } else {
            self.pending.push(client);
            return;
        };
        let answer = match verdict {
            Verdict::Reply(bytes) => bytes,
            Verdict::Session => match self.start_session(&client, context) {
                Ok(()) => return,
                Err(error) => error_frame(service, &format!("Failed to start a session: {error}")),
            },
        };
        // A new connection has room for so little; a client that is gone needs no answer.
        let _ = client.socket.write(&answer);
    }

    fn start_session(&mut self, client: &PendingClient, context: &Context<'_>) -> io::Result<()> {
        const NAME: &CStr = c"mote-session";
        context.cgroup.enable_controllers();
        self.last_session += 1;
        let context = &Context { session: self.last_session, ..*context };
        let PendingClient { service, socket, header, .. } = client;
        if self.journal.is_none() {
            // A kernel of the user's own may be without tmpfs: then no request can have an id.
            self.journal = Journal::new().ok();
        }
        let journal = self.journal.as_ref();
        let mut keep = vec![socket.as_fd()];
        keep.extend(context.cgroup.descriptors());
        keep.extend(journal.map(Journal::descriptor));
        keep.extend(context.attest.map(Attest::descriptor));
        keep.extend(context.held.map(Held::descriptors).into_iter().flatten());
        let pid = sys::fork(&keep, NAME, || {
            let Ok(socket) = socket.try_clone() else { return };
            match service {
                Service::Exec => {
                    let connection = Connection::new(socket, header, exec::MAX_PAYLOAD);
                    request::session(connection, context, journal);
                }
                Service::Pty => {
                    terminal::session(Connection::new(socket, header, pty::MAX_PAYLOAD), context);
                }
            }
        })?;
        self.sessions.push(Session { pid, number: self.last_session });
        Ok(())
    }

    /// Takes note of a child's end, which may be a session's.
    pub fn child_ended(&mut self, child: Reaped, cgroup: &BoxCgroup) {
        let of_child = |session: &Session| session.pid == child.pid;
        let Some(at) = self.sessions.iter().position(of_child) else { return };
        let Session { number, .. } = self.sessions.swap_remove(at);
        if let ExitStatus::Signaled(_) = child.status {
            // Nobody looks after its command any more. There may be none.
            let _ = cgroup.kill_command(number);
        }
        self.survived.push(number);
        self.survived.retain(|number| !cgroup.remove_command(*number));
    }
}

/// Contract §4.2 and §5: what a first frame may be.
fn judge(service: Service, header: [u8; HEADER_LEN]) -> Verdict {
    let (kind, length) = frame::parse_header(header);
    let too_long = |limit| length as usize > limit;
    match (service, kind) {
        (Service::Exec, exec::kind::HEARTBEAT) if length == 0 => Verdict::Reply(header.to_vec()),
        (Service::Exec, exec::kind::HEARTBEAT | exec::kind::DATA) => {
            if too_long(exec::MAX_PAYLOAD) {
                let limit = exec::MAX_PAYLOAD;
                let text = format!("Frame of {length} bytes is too long (limit {limit})");
                Verdict::Reply(error_frame(service, &text))
            } else {
                Verdict::Session
            }
        }
        (Service::Exec, exec::kind::CONTROL)
            if (exec::control::SIGNAL_MAIN.len()..=exec::control::MAX_FIRST)
                .contains(&(length as usize)) =>
        {
            Verdict::Session
        }
        (Service::Exec, _) => Verdict::Reply(error_frame(service, "Expected Data frame")),
        (Service::Pty, pty::kind::REQUEST) if !too_long(pty::MAX_PAYLOAD) => Verdict::Session,
        (Service::Pty, pty::kind::DATA..=pty::kind::ERROR) if !too_long(pty::MAX_PAYLOAD) => {
            Verdict::Reply(error_frame(service, "Expected PtyRequest frame"))
        }
        (Service::Pty, _) => Verdict::Reply(Vec::new()),
    }
}

fn error_frame(service: Service, text: &str) -> Vec<u8> {
    let kind = match service {
        Service::Exec => exec::kind::ERROR,
        Service::Pty => pty::kind::ERROR,
    };
    frame::encode(kind, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contract §4.5 and §5.
    #[test]
    fn first_frames_are_judged_by_the_contract() {
        let reply = |bytes: &[u8]| Verdict::Reply(bytes.to_vec());
        let exec = |header| judge(Service::Exec, header);
        assert_eq!(exec([3, 0, 0, 0, 0]), reply(&[3, 0, 0, 0, 0]));
        assert_eq!(exec([3, 0, 0, 0, 9]), Verdict::Session);
        assert_eq!(exec([1, 0, 0, 0, 0x6b]), Verdict::Session);
        assert_eq!(exec([1, 1, 0, 0, 0]), Verdict::Session);
        let expected = reply(b"\x04\0\0\0\x13Expected Data frame");
        for kind in [0, 2, 4, 5, 6, 0xff] {
            assert_eq!(exec([kind, 0, 0, 0, 0]), expected);
        }
        // What may be `signal-main:`, with a number behind it.
        for (length, verdict) in
            [(11, &expected), (12, &Verdict::Session), (64, &Verdict::Session), (65, &expected)]
        {
            assert_eq!(exec([2, 0, 0, 0, length]), *verdict, "{length}");
        }
        assert_eq!(exec([2, 0, 1, 0, 12]), expected);
        let Verdict::Reply(refused) = exec([1, 1, 0, 0, 1]) else { panic!("too long") };
        assert!(refused.ends_with(b"Frame of 16777217 bytes is too long (limit 16777216)"));

        let pty = |header| judge(Service::Pty, header);
        assert_eq!(pty([1, 0, 0, 0, 0x4f]), Verdict::Session);
        let expected = reply(b"\x05\0\0\0\x19Expected PtyRequest frame");
        assert_eq!(pty([2, 0, 0, 0, 1]), expected);
        assert_eq!(pty([5, 0, 0, 0, 0]), expected);
        assert_eq!(pty([9, 0, 0, 0, 0]), reply(b""));
        assert_eq!(pty([1, 0, 1, 0, 1]), reply(b""));
    }
}
