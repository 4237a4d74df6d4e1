//! A client's connection in a session: frames in, frames out, bounded in both directions.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mote_agent::frame::{Decoder, Frame};

use crate::sys::{self, Interest, net, until};

/// How long a client may take to send the next byte of a request, or, once the command is over, to
/// take the next byte of the reply.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often to look whether a client that has ended its input is still there: its full close is no
/// event that can be waited for.
pub const HANG_UP_CHECK: Duration = Duration::from_secs(1);

/// Unsent bytes above which no more output is produced.
const FULL: usize = 256 * 1024;

/// A connection, non-blocking.
#[derive(Debug)]
pub struct Connection {
    socket: File,
    decoder: Decoder,
    unsent: VecDeque<u8>,
    ended: bool,
    broken: bool,
}

/// What a client had to say.
#[derive(Debug)]
pub enum Received {
    /// A frame.
    Frame(Frame),
    /// Nothing for now.
    Nothing,
    /// Nothing any more: it has closed its sending direction, or broken the framing.
    End,
}

impl Connection {
    /// Continues a connection of which `header`, the first frame's, has been read.
    pub fn new(socket: File, header: &[u8], max_payload: usize) -> Self {
        let mut decoder = Decoder::new(max_payload);
        decoder.feed(header);
        Connection { socket, decoder, unsent: VecDeque::new(), ended: false, broken: false }
    }

    /// Waits for a whole frame. `None` when there will be none.
    pub fn wait_for_frame(&mut self) -> Option<Frame> {
        loop {
            match self.receive() {
                Received::Frame(frame) => return Some(frame),
                Received::End => return None,
                Received::Nothing => {
                    let ready = sys::poll(&[Interest::read(self.socket.as_fd())], Some(PATIENCE));
                    if !ready.is_ok_and(|ready| ready[0]) {
                        return None;
                    }
                }
            }
        }
    }

    /// The next frame, if one has arrived.
    pub fn receive(&mut self) -> Received {
        let mut bytes = [0; 16 * 1024];
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) => return Received::Frame(frame),
                Ok(None) if self.ended => return Received::End,
                Ok(None) => {}
                Err(_) => {
                    self.ended = true;
                    self.broken = true;
                    return Received::End;
                }
            }
            match self.socket.read(&mut bytes) {
                Ok(0) => self.ended = true,
                Ok(read) => self.decoder.feed(&bytes[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Received::Nothing;
                }
                Err(_) => {
                    self.ended = true;
                    self.broken = true;
                }
            }
        }
    }

    /// Whether nothing more will be received.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the client is gone altogether, rather than only done with sending.
    pub fn is_hung_up(&self) -> bool {
        self.broken || net::is_hung_up(&self.socket)
    }

    /// Sends what the socket takes, and queues the rest.
    pub fn send(&mut self, mut bytes: &[u8]) {
        self.flush();
        if self.unsent.is_empty() {
            bytes = &bytes[self.write(bytes)..];
        }
        if !self.broken {
            self.unsent.extend(bytes);
        }
    }

    /// Sends what is queued, as far as the socket takes it.
    pub fn flush(&mut self) {
        let unsent = std::mem::take(&mut self.unsent);
        let (head, tail) = unsent.as_slices();
        let mut sent = self.write(head);
        if sent == head.len() {
            sent += self.write(tail);
        }
        self.unsent = unsent;
        self.unsent.drain(..sent);
    }

    /// Hands bytes to the socket, as far as it takes them, and says how many that are.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while sent < bytes.len() && !self.broken {
            match self.socket.write(&bytes[sent..]) {
                Ok(more) => sent += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.broken = true,
            }
        }
        sent
    }

    /// Whether the client is so far behind that no more output should be produced.
    pub fn is_full(&self) -> bool {
        self.unsent.len() >= FULL
    }

    /// Whether everything has been handed to the socket.
    pub fn is_flushed(&self) -> bool {
        self.unsent.is_empty() || self.broken
    }

    /// What to wait for, given whether frames are wanted.
    pub fn interests(&self, receiving: bool) -> impl Iterator<Item = Interest<'_>> {
        let read = (receiving && !self.ended).then(|| Interest::read(self.socket.as_fd()));
        let write = (!self.is_flushed()).then(|| Interest::write(self.socket.as_fd()));
        read.into_iter().chain(write)
    }

    /// Sends the rest, for as long as the client takes some of it.
    pub fn finish(mut self) {
        let mut left = self.unsent.len();
        let mut deadline = Instant::now() + PATIENCE;
        loop {
            self.flush();
            if self.is_flushed() {
                break;
            }
            if self.unsent.len() < left {
                left = self.unsent.len();
                deadline = Instant::now() + PATIENCE;
            }
            let limit = until(deadline);
            if limit.is_zero() {
                break;
            }
            // In steps: a client that goes away altogether may cause no event.
            let limit = limit.min(HANG_UP_CHECK);
            let _ = sys::poll(&[Interest::write(self.socket.as_fd())], Some(limit));
        }
        let _ = net::shutdown_write(&self.socket);
    }
}
