//! The agent's side of the connections to the VMM: the control channel, the two output streams, and the input.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use mote_agent::protocol::{Decoder, FromGuest, FromHost};

use crate::sys::{Interest, net};

/// The control channel, non-blocking in both directions.
#[derive(Debug)]
pub struct Control {
    socket: File,
    decoder: Decoder,
    unsent: VecDeque<u8>,
}

/// More than the messages of a box that nobody hurries.
const BEHIND_LEN: usize = 64 * 1024;

/// What the control channel had to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A message.
    Message(FromHost),
    /// Nothing for now.
    Nothing,
    /// The host is gone or does not follow the protocol: there is nobody left to run for.
    Lost,
}

impl Control {
    /// Wraps a connected socket.
    pub fn new(socket: File) -> Self {
        Control { socket, decoder: Decoder::default(), unsent: VecDeque::new() }
    }

    /// Whether the host has yet to take a lot.
    pub fn is_behind(&self) -> bool {
        self.unsent.len() > BEHIND_LEN
    }

    /// Queues a message and sends what the socket takes.
    pub fn send(&mut self, message: &FromGuest) {
        self.unsent.extend(message.encode());
        self.flush();
    }

    /// Sends what is queued, as far as the socket takes it.
    pub fn flush(&mut self) {
        while !self.unsent.is_empty() {
            let (head, _) = self.unsent.as_slices();
            match self.socket.write(head) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A dead host shows itself to `receive`.
                Err(_) => return,
            }
        }
    }

    /// The next message, if one has arrived.
    pub fn receive(&mut self) -> Received {
        loop {
            match self.decoder.next_from_host() {
                Ok(Some(message)) => return Received::Message(message),
                Ok(None) => {}
                Err(_) => return Received::Lost,
            }
            let mut bytes = [0; 256];
            match self.socket.read(&mut bytes) {
                Ok(0) => return Received::Lost,
                Ok(read) => self.decoder.feed(&bytes[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Received::Nothing;
                }
                Err(_) => return Received::Lost,
            }
        }
    }

    /// What to wait for.
    pub fn interests(&self) -> impl Iterator<Item = Interest<'_>> {
        let write = (!self.unsent.is_empty()).then(|| Interest::write(self.socket.as_fd()));
        [Interest::read(self.socket.as_fd())].into_iter().chain(write)
    }
}

/// One of the entrypoint's streams, between a pipe or a terminal of its own and the host, with the receiver's pace as the
/// limit.
#[derive(Debug)]
pub struct Pump {
    from: Option<File>,
    to: Option<File>,
    /// Whether it goes to the host.
    is_output: bool,
    buffer: Box<[u8; Pump::BUFFER_LEN]>,
    filled: std::ops::Range<usize>,
}

impl Pump {
    /// A pipe's capacity: one read empties it.
    const BUFFER_LEN: usize = 64 * 1024;
    /// Buffers to move before the agent looks at its other work.
    const ROUNDS: usize = 16;

    /// Moves bytes from `from` (a pipe or a terminal) to `to` (a connected socket); both must be non-blocking.
    pub fn output(from: File, to: File) -> Self {
        Self::new(from, to, true)
    }

    /// Moves bytes from `from` (a connected socket) to `to` (a pipe or a terminal), and closes that at the end; both must be
    /// non-blocking.
    pub fn input(from: File, to: File) -> Self {
        Self::new(from, to, false)
    }

    fn new(from: File, to: File, is_output: bool) -> Self {
        Pump {
            from: Some(from),
            to: Some(to),
            is_output,
            buffer: Box::new([0; Self::BUFFER_LEN]),
            filled: 0..0,
        }
    }

    /// Moves what can be moved without waiting. With `last`, an empty pipe counts as ended even if
    /// some process still holds its other end.
    pub fn pump(&mut self, last: bool) {
        // A last pump goes to the end; any other leaves the agent time for everything else.
        let rounds = if last { usize::MAX } else { Self::ROUNDS };
        for round in 0.. {
            if round == rounds {
                return;
            }
            while !self.filled.is_empty() {
                let Some(to) = &mut self.to else {
                    self.filled = 0..0;
                    break;
                };
                match to.write(&self.buffer[self.filled.clone()]) {
                    Ok(sent) => self.filled.start += sent,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                    // Nobody reads this stream any more: what follows goes nowhere, like a closed pipe.
                    Err(_) => (self.to, self.from) = (None, None),
                }
            }
            let Some(from) = &mut self.from else { break };
            match from.read(&mut self.buffer[..]) {
                Ok(0) => self.from = None,
                Ok(read) => self.filled = 0..read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !last => return,
                Err(_) => self.from = None,
            }
        }
        if let Some(to) = self.to.take()
            && self.is_output
        {
            // The connection stays open until the power goes: closing it here could overtake data
            // that still waits for credit.
            let _ = net::shutdown_write(&to);
            std::mem::forget(to);
        }
    }

    /// Whether everything has been handed to the socket and its end announced.
    pub fn is_done(&self) -> bool {
        self.from.is_none() && self.to.is_none()
    }

    /// What to wait for.
    pub fn interest(&self) -> Option<Interest<'_>> {
        if self.filled.is_empty() {
            self.from.as_ref().map(|from| Interest::read(from.as_fd()))
        } else {
            self.to.as_ref().map(|to| Interest::write(to.as_fd()))
        }
    }
}
