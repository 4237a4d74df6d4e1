//! A connection that carries frames, without blocking: bytes to send are queued, the owner takes frames
//! that have arrived, and waits on the socket itself.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, anyhow};
use mote_agent::exec::MAX_PAYLOAD;
use mote_agent::frame::{self, Decoder, Frame};
use serde::Serialize;

use super::stop::Stop;
use crate::sys::{self, Interest};

/// Most bytes to read at once: a frame with a full chunk of output.
const READ_SIZE: usize = 256 * 1024;

/// A connection to an agent.
#[derive(Debug)]
pub struct Channel {
    socket: UnixStream,
    decoder: Decoder,
    buffer: Box<[u8]>,
    unsent: Vec<u8>,
    /// How many bytes of `unsent` have been sent by now.
    sent: usize,
    /// Whether the agent takes no more frames. It may still send some.
    refused: bool,
}

/// What follows a request.
#[derive(Debug)]
pub enum Reply {
    /// A frame.
    Frame(Frame),
    /// The end of the connection.
    Closed,
    /// Nothing in time.
    Late,
}

impl Channel {
    /// Connects to a Unix socket.
    ///
    /// # Errors
    /// Those of connect(2).
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Channel {
            socket,
            decoder: Decoder::new(MAX_PAYLOAD),
            buffer: vec![0; READ_SIZE].into(),
            unsent: Vec::new(),
            sent: 0,
            refused: false,
        })
    }

    /// Queues a frame and sends what the socket takes.
    pub fn send(&mut self, kind: u8, payload: &[u8]) {
        self.unsent.extend(frame::encode(kind, payload));
        self.flush();
    }

    /// Sends what is queued, as far as the socket takes it.
    pub fn flush(&mut self) {
        while self.sent < self.unsent.len() && !self.refused {
            match self.socket.write(&self.unsent[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.refused = true,
            }
        }
        self.unsent.clear();
        self.sent = 0;
    }

    /// Whether frames are queued that the socket has not taken.
    pub fn is_sending(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Whether the agent takes no more frames.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Reads once. `false` when nothing will come any more.
    ///
    /// # Errors
    /// Reading fails for another reason than the end of the connection.
    pub fn receive(&mut self) -> Result<bool, Stop> {
        match self.socket.read(&mut self.buffer) {
            Ok(0) => Ok(false),
            Ok(read) => {
                self.decoder.feed(&self.buffer[..read]);
                Ok(true)
            }
            // The agent has closed without reading all that was sent.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(false),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Ok(true)
            }
            Err(error) => Err(anyhow::Error::new(error).context("read from the box").into()),
        }
    }

    /// The next frame that has arrived, type and payload.
    ///
    /// # Errors
    /// The frame is longer than the protocol allows.
    pub fn next_frame(&mut self) -> Result<Option<(u8, &[u8])>, Stop> {
        self.decoder.next_slice().map_err(|too_long| {
            let length = too_long.length;
            anyhow!("the box sent a frame of {length} bytes: its socket speaks another protocol")
                .into()
        })
    }

    /// Waits for one frame, and sends what is queued meanwhile. A signal from `signals` ends the wait.
    ///
    /// # Errors
    /// The connection fails, a frame is too long, or a signal has come.
    pub fn reply(
        &mut self,
        deadline: Option<Instant>,
        signals: Option<&File>,
    ) -> Result<Reply, Stop> {
        loop {
            if let Some((kind, payload)) = self.next_frame()? {
                return Ok(Reply::Frame(Frame { kind, payload: payload.to_vec() }));
            }
            let limit = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let interests = [
                Interest::new(self, true, self.is_sending()),
                signals.map_or(Interest::NONE, Interest::read),
            ];
            let [peer, _] = sys::poll(interests, limit).context("wait for the box")?;
            if let Some(number) = signals.and_then(sys::next_signal) {
                return Err(Stop::Quiet(128 + number as u8));
            }
            if peer {
                self.flush();
                if !self.receive()? {
                    return Ok(Reply::Closed);
                }
            } else if limit.is_some_and(|limit| limit.is_zero()) {
                return Ok(Reply::Late);
            }
        }
    }
}

/// The payload of a request of at most `limit` bytes.
///
/// # Errors
/// The request is longer; an agent would close the connection without an answer.
pub fn request(members: &impl Serialize, limit: usize) -> Result<Vec<u8>, Stop> {
    let payload = serde_json::to_vec(members).context("write a request")?;
    let length = payload.len();
    if length > limit {
        return Err(Stop::Failed(anyhow!(
            "the request takes {length} bytes, and the protocol allows {limit}"
        )));
    }
    Ok(payload)
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
