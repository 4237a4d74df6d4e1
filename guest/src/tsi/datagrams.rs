//! Datagrams between one socket of an application and one destination, over the vsock stream of
//! their flow.
//!
//! As on any network, what cannot be taken now is lost, and only whole datagrams are.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use mote_agent::flow::{
    DATAGRAM_ERROR, DATAGRAM_HEADER_LEN, MAX_DATAGRAM_LEN, REQUEST_LEN, STATUS_LEN,
};

use crate::sys::net;

/// How long a flow is kept that carries nothing (RFC 4787, REQ-5: at least two minutes).
pub const IDLE_LIMIT: Duration = Duration::from_secs(150);
/// Most reads before other flows get their turn.
const ROUNDS: usize = 8;
/// Most bytes kept for the host while it takes none.
const KEPT_LEN: usize = 4 * MAX_DATAGRAM_LEN;

/// What comes from the host.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// A datagram.
    Datagram(&'a [u8]),
    /// An errno: an earlier datagram has not arrived.
    Error(u16),
    /// An errno: the host does not carry the flow.
    Refused(u16),
}

/// A flow of datagrams.
#[derive(Debug)]
pub struct Datagrams {
    vsock: File,
    /// For the host: the request, then datagrams.
    unsent: Vec<u8>,
    /// From the host, not a whole message yet.
    incoming: Vec<u8>,
    /// The host has said whether it carries the flow.
    accepted: bool,
    last_use: Instant,
}

impl Datagrams {
    /// A flow over a vsock connection that is being made, which begins with `request`.
    pub fn new(vsock: File, request: [u8; REQUEST_LEN], now: Instant) -> Self {
        Datagrams {
            vsock,
            unsent: request.to_vec(),
            incoming: Vec::new(),
            accepted: false,
            last_use: now,
        }
    }

    /// The flow of a client of a published port, over a vsock connection of the host's.
    pub fn of_client(vsock: File, now: Instant) -> Self {
        let (unsent, incoming) = (Vec::new(), Vec::new());
        Datagrams { vsock, unsent, incoming, accepted: true, last_use: now }
    }

    /// The vsock, to watch.
    pub fn socket(&self) -> &File {
        &self.vsock
    }

    /// When the flow is given up unless it is used.
    pub fn idle_at(&self) -> Instant {
        self.last_use + IDLE_LIMIT
    }

    /// Whether everything of the application's has gone to the host.
    pub fn has_sent_all(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Sends a datagram to the host, or loses it.
    ///
    /// # Errors
    /// If the host has ended the flow.
    pub fn send(&mut self, datagram: &[u8], now: Instant) -> io::Result<()> {
        self.last_use = now;
        let Ok(len) = u16::try_from(datagram.len()) else { return Ok(()) };
        if self.unsent.len() + DATAGRAM_HEADER_LEN + datagram.len() > KEPT_LEN {
            return Ok(());
        }
        self.unsent.extend(len.to_be_bytes());
        self.unsent.extend(datagram);
        self.flush()
    }

    /// Gives the vsock what is kept, as far as it takes it.
    ///
    /// # Errors
    /// As [`Datagrams::send`].
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.vsock.write(&self.unsent) {
                Ok(len) => drop(self.unsent.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if net::is_connecting(&self.vsock, &error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads from the host and hands on what is whole; `scratch` holds a read. `true` if there may be
    /// more, after others' turn.
    ///
    /// # Errors
    /// If the host has ended the flow or refused it.
    pub fn receive(
        &mut self,
        scratch: &mut [u8],
        now: Instant,
        mut hand_on: impl FnMut(Received<'_>),
    ) -> io::Result<bool> {
        for _ in 0..ROUNDS {
            let len = match self.vsock.read(scratch) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if net::is_connecting(&self.vsock, &error) => return Ok(false),
                Err(error) => return Err(error),
            };
            self.last_use = now;
            self.incoming.extend(&scratch[..len]);
            let mut taken = 0;
            while let Some(Parsed { message, len }) = self.parse(&self.incoming[taken..]) {
                let start = taken;
                taken += len;
                match message {
                    Message::Accepted => self.accepted = true,
                    Message::Refused(errno) => {
                        hand_on(Received::Refused(errno));
                        return Err(io::Error::from_raw_os_error(errno.into()));
                    }
                    Message::Error(errno) => hand_on(Received::Error(errno)),
                    Message::Datagram(range) => {
                        let bytes = &self.incoming[start + range.start..start + range.end];
                        hand_on(Received::Datagram(bytes));
                    }
                }
            }
            self.incoming.drain(..taken);
        }
        Ok(true)
    }

    /// The first message of `bytes`; `None` for a part of one.
    fn parse(&self, bytes: &[u8]) -> Option<Parsed> {
        let word = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let first = word(0)?;
        if !self.accepted {
            let message = if first == 0 { Message::Accepted } else { Message::Refused(first) };
            return Some(Parsed { message, len: STATUS_LEN });
        }
        if first == DATAGRAM_ERROR {
            let message = Message::Error(word(DATAGRAM_HEADER_LEN)?);
            return Some(Parsed { message, len: DATAGRAM_HEADER_LEN + STATUS_LEN });
        }
        let end = DATAGRAM_HEADER_LEN + usize::from(first);
        bytes.get(..end)?;
        Some(Parsed { message: Message::Datagram(DATAGRAM_HEADER_LEN..end), len: end })
    }
}

/// A message, and how many bytes it takes.
struct Parsed {
    message: Message,
    len: usize,
}

/// A message of the host's.
enum Message {
    Accepted,
    Refused(u16),
    Error(u16),
    /// Where in the parsed bytes the datagram is.
    Datagram(std::ops::Range<usize>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    fn flow() -> (Datagrams, UnixStream) {
        let (vsock, host) = UnixStream::pair().expect("a pair");
        vsock.set_nonblocking(true).expect("non-blocking");
        host.set_nonblocking(true).expect("non-blocking");
        let vsock = File::from(OwnedFd::from(vsock));
        (Datagrams::new(vsock, [6; REQUEST_LEN], Instant::now()), host)
    }

    #[derive(Debug, PartialEq, Eq)]
    enum Seen {
        Datagram(Vec<u8>),
        Error(u16),
        Refused(u16),
    }

    fn receive(flow: &mut Datagrams) -> (Vec<Seen>, io::Result<bool>) {
        let mut seen = Vec::new();
        let result = flow.receive(&mut [0; 64], Instant::now(), |received| {
            seen.push(match received {
                Received::Datagram(bytes) => Seen::Datagram(bytes.to_vec()),
                Received::Error(errno) => Seen::Error(errno),
                Received::Refused(errno) => Seen::Refused(errno),
            });
        });
        (seen, result)
    }

    #[test]
    fn the_request_precedes_the_datagrams() {
        let (mut flow, mut host) = flow();
        flow.send(b"early", Instant::now()).expect("sent");
        flow.send(b"", Instant::now()).expect("sent");
        assert!(flow.has_sent_all());
        let mut wire = vec![0; 64];
        let len = host.read(&mut wire).expect("bytes");
        assert_eq!(wire[..len], [&[6; REQUEST_LEN][..], b"\0\x05early\0\0"].concat());
    }

    #[test]
    fn datagrams_and_errors_arrive_whole() {
        let (mut flow, mut host) = flow();
        host.write_all(b"\0\0\0\x0ctwelve bytes\0\0\xff\xff\0\x6f\0\x03cu").expect("written");
        let (seen, result) = receive(&mut flow);
        result.expect("a flow that goes on");
        let datagram = |bytes: &[u8]| Seen::Datagram(bytes.to_vec());
        assert_eq!(seen, [datagram(b"twelve bytes"), datagram(b""), Seen::Error(111)]);
        host.write_all(b"t").expect("written");
        assert_eq!(receive(&mut flow).0, [datagram(b"cut")]);
    }

    #[test]
    fn what_the_host_does_not_take_is_lost() {
        let (mut flow, _host) = flow();
        for _ in 0..64 {
            flow.send(&[0; 60_000], Instant::now()).expect("kept or lost");
        }
        assert!(flow.unsent.len() <= KEPT_LEN);
    }

    #[test]
    fn a_clients_flow_begins_with_its_datagrams() {
        let (vsock, mut host) = UnixStream::pair().expect("a pair");
        vsock.set_nonblocking(true).expect("non-blocking");
        let mut flow = Datagrams::of_client(File::from(OwnedFd::from(vsock)), Instant::now());
        host.write_all(b"\0\x03ask\0").expect("written");
        assert_eq!(receive(&mut flow).0, [Seen::Datagram(b"ask".to_vec())]);
        flow.send(b"answer", Instant::now()).expect("sent");
        let mut wire = vec![0; 64];
        let len = host.read(&mut wire).expect("bytes");
        assert_eq!(wire[..len], *b"\0\x06answer");
    }

    #[test]
    fn a_refusal_ends_the_flow() {
        let (mut flow, mut host) = flow();
        host.write_all(&[0, 111]).expect("written");
        let (seen, result) = receive(&mut flow);
        assert_eq!(seen, [Seen::Refused(111)]);
        assert!(result.is_err());
    }
}
