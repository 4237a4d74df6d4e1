//! A client, from its handshake to its answer: one request for each connection.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mote_agent::exec::{MAX_PAYLOAD, kind};
use mote_agent::frame::{self, HEADER_LEN};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustls::{ServerConfig, ServerConnection, Stream};

use crate::budget::Budget;
use crate::request::{self, Reply, Service};

/// How long a handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long a client may take to send its request, and again to take its answer.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// How long a client whose request is long may have to wait until others' are done, before it sends the rest.
const TURN_LIMIT: Duration = Duration::from_secs(300);

/// Longest request of which any number of clients may have one.
const SHORT: usize = 64 * 1024;
/// What all others may take at once. What is made of a request takes a few times as much, so there is one of the
/// longest at a time.
static LONG_REQUESTS: Budget = Budget::new(MAX_PAYLOAD);

/// Serves a client to its end. An error is the client's own matter: it did not keep to the protocol, or to the time.
///
/// # Errors
/// What ended the connection.
pub fn serve(socket: OwnedFd, config: Arc<ServerConfig>, service: &Service) -> io::Result<()> {
    let mut socket = Deadlined { socket, deadline: Instant::now() + HANDSHAKE_LIMIT };
    let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
    while tls.is_handshaking() {
        if tls.complete_io(&mut socket)? == (0, 0) {
            return Ok(());
        }
    }
    socket.deadline = Instant::now() + REQUEST_LIMIT;
    let mut stream = Stream::new(&mut tls, &mut socket);
    let mut header = [0; HEADER_LEN];
    match stream.read_exact(&mut header) {
        // It wanted to see the certificate.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            stream.conn.send_close_notify();
            return stream.flush();
        }
        read => read?,
    }
    let (answer, part) = match frame::parse_header(header) {
        (kind::DATA, length) if length as usize <= MAX_PAYLOAD => {
            let length = length as usize;
            let share = if length > SHORT { length } else { 0 };
            match LONG_REQUESTS.take(share, Some(Instant::now() + TURN_LIMIT)) {
                Some(part) => {
                    stream.sock.deadline = Instant::now() + REQUEST_LIMIT;
                    let mut request = vec![0; length];
                    stream.read_exact(&mut request)?;
                    match service.answer(&request) {
                        Ok(Reply::Ready(answer)) => (Ok(answer), Some(part)),
                        Ok(Reply::Message(message)) => {
                            drop((request, part));
                            (request::deliver(message), None)
                        }
                        Err(text) => (Err(text), Some(part)),
                    }
                }
                None => (Err("Too many long requests at once".into()), None),
            }
        }
        (kind::DATA, length) => {
            (Err(format!("Frame of {length} bytes is too long (limit {MAX_PAYLOAD})")), None)
        }
        _ => (Err("Expected Data frame".into()), None),
    };
    stream.sock.deadline = Instant::now() + REQUEST_LIMIT;
    let (kind, payload) = match answer {
        Ok(answer) if answer.len() <= MAX_PAYLOAD => (kind::DATA, answer),
        Ok(answer) => (kind::ERROR, format!("Answer of {} bytes is too long", answer.len()).into()),
        // It may have the client's own words.
        Err(text) => {
            let mut text = text.into_bytes();
            text.truncate(MAX_PAYLOAD);
            (kind::ERROR, text)
        }
    };
    stream.write_all(&frame::header(kind, payload.len() as u32))?;
    stream.write_all(&payload)?;
    stream.conn.send_close_notify();
    stream.flush()?;
    drop(part);
    rustix::net::shutdown(&socket.socket, rustix::net::Shutdown::Write)?;
    Ok(())
}

/// A non-blocking socket on which reads and writes wait until the deadline.
struct Deadlined {
    socket: OwnedFd,
    deadline: Instant,
}

impl Deadlined {
    /// Repeats a call that would have to wait.
    fn attempt<T>(
        &self,
        events: PollFlags,
        mut call: impl FnMut(&OwnedFd) -> Result<T, Errno>,
    ) -> io::Result<T> {
        loop {
            match call(&self.socket) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                done => return Ok(done?),
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match rustix::event::poll(&mut [PollFd::new(&self.socket, events)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for Deadlined {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.attempt(PollFlags::IN, |socket| rustix::io::read(socket, &mut *buffer))
    }
}

impl Write for Deadlined {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.attempt(PollFlags::OUT, |socket| rustix::io::write(socket, bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
