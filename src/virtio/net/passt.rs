//! The connection to passt: a Unix stream on which every Ethernet frame comes after its length, a
//! big-endian u32 (passt's `tap.c`; QEMU's stream netdev). There is one buffer for each direction;
//! [`crate::virtio::net`] takes and puts whole frames. One system call reads many frames, but writes
//! only one: passt of 2023, as in Debian 12, loses all it has read when a frame reaches it in more
//! than two pieces, and loses track of the frames when a length arrives in two. The kernel passes on
//! a write in pieces of some 32 KiB.
//!
//! The socket is non-blocking and registered edge-triggered: after it would have blocked, it is not
//! used until epoll reports it again. While a frame is incomplete, the device waits as if there were none.

use std::convert::Infallible;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use event_manager::EventSet;

use crate::sys::{self, Interest};

/// Length of a frame in bytes: an Ethernet header at least, and what passt takes at most
/// (`ETH_MAX_MTU`).
pub const FRAME_LEN: RangeInclusive<usize> = 14..=65_535;
/// Bytes of the length before each frame.
const PREFIX_LEN: usize = 4;
/// Bytes of buffer per direction: room for three of the largest frames, or hundreds of usual ones. It
/// bounds the memory that a box's network costs mote.
const BUFFER_LEN: usize = 256 * 1024;
/// How long passt may take to create its socket; the runtime waits as long (contract §2.9).
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How often mote tries to connect to the socket meanwhile.
const CONNECT_STEP: Duration = Duration::from_millis(10);

/// Connects to passt's socket, and waits if it does not exist yet. Gives up when `stop` is readable.
///
/// # Errors
/// Nobody listens in time, or mote was told to stop.
pub fn connect(path: &Path, stop: &File) -> Result<UnixStream> {
    let deadline = Instant::now() + CONNECT_LIMIT;
    loop {
        let error = match connect_now(path) {
            Ok(socket) => return Ok(socket),
            Err(error) => error,
        };
        let may_come = matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock
        );
        if !may_come || Instant::now() >= deadline {
            let path = path.display();
            return Err(error).with_context(|| {
                format!("connect to passt (network.passt_socket_path): nobody serves {path}; run 'passt --socket {path}' before the box")
            });
        }
        let [is_stopped] = sys::poll([Interest::read(stop)], Some(CONNECT_STEP))?;
        ensure!(!is_stopped, "stopped while waiting for passt");
    }
}

/// Connects to passt's socket if somebody listens on it at this moment.
///
/// # Errors
/// Nobody listens.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    sys::socket::connect_unix(path.as_os_str().as_bytes())
}

/// How to connect to passt again.
pub struct Reconnect {
    /// Its socket, for messages.
    pub path: PathBuf,
    /// Connects to it if it listens at this moment, without waiting.
    pub connect: Box<dyn FnMut() -> io::Result<UnixStream>>,
}

impl fmt::Debug for Reconnect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reconnect({})", self.path.display())
    }
}

/// Why a connection cannot be used any more. The text fits after "passt".
#[derive(Debug)]
pub enum Lost {
    /// It reached its end.
    Closed,
    /// It failed.
    Failed(io::Error),
    /// A frame has an impossible length: it is unknown where the next one starts.
    BadLength(u32),
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (min, max) = (FRAME_LEN.start(), FRAME_LEN.end());
        match self {
            Lost::Closed => write!(f, "closed its connection"),
            Lost::Failed(error) => write!(f, "lost its connection ({error})"),
            Lost::BadLength(len) => {
                write!(f, "announced a frame of {len} bytes, which must have {min} to {max}")
            }
        }
    }
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    /// Whether a read may find something.
    readable: bool,
    /// Whether a write may find room.
    writable: bool,
    incoming: Buffer,
    outgoing: Buffer,
    /// Bytes left of the first outgoing frame, if it was written in part; else 0.
    torn: usize,
}

impl Connection {
    /// Takes a connected socket. Nothing is read or written before epoll reports it.
    ///
    /// # Errors
    /// The host refuses to adjust the socket.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Connection {
            socket,
            readable: false,
            writable: false,
            incoming: Buffer::new(),
            outgoing: Buffer::new(),
            torn: 0,
        })
    }

    /// The socket, which the caller watches edge-triggered.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Notes what epoll has reported. Returns whether sending, which was stuck, may go on.
    pub fn note(&mut self, set: EventSet) -> bool {
        let speaks = EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        self.readable |= set.intersects(speaks);
        let was_stuck = !self.writable;
        self.writable |= set.contains(EventSet::OUT);
        was_stuck && self.writable
    }

    /// The first frame that was not taken yet; `None` when there is no complete one.
    ///
    /// # Errors
    /// passt has ended, or has sent an impossible length.
    pub fn frame(&mut self) -> Result<Option<&[u8]>, Lost> {
        while self.readable && first_frame(self.incoming.filled())?.is_none() {
            self.read()?;
        }
        first_frame(self.incoming.filled())
    }

    /// Takes the frame that [`Self::frame`] has returned, of this length.
    pub fn take_frame(&mut self, len: usize) {
        self.incoming.take(PREFIX_LEN + len);
    }

    fn read(&mut self) -> Result<(), Lost> {
        let room = self.incoming.room(PREFIX_LEN + FRAME_LEN.end());
        let wanted = room.len();
        match self.socket.read(room) {
            Ok(0) => Err(Lost::Closed),
            Ok(read) => {
                self.incoming.end += read;
                // A stream gives less than the buffer holds only when it has no more.
                self.readable = read == wanted;
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(Lost::Failed(error)),
        }
    }

    /// Whether a frame of any length can be put.
    pub fn has_room(&self) -> bool {
        BUFFER_LEN - self.outgoing.end >= PREFIX_LEN + FRAME_LEN.end()
    }

    /// Adds a frame of a length in [`FRAME_LEN`], which `fill` writes. Must only be called while there
    /// is [room](Self::has_room).
    ///
    /// # Errors
    /// `fill` fails; nothing is added then.
    pub fn put_frame<E>(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = self.outgoing.end;
        let (prefix, rest) = self.outgoing.bytes[end..].split_at_mut(PREFIX_LEN);
        prefix.copy_from_slice(&(len as u32).to_be_bytes());
        fill(&mut rest[..len])?;
        self.outgoing.end = end + PREFIX_LEN + len;
        Ok(())
    }

    /// Adds a copy of a frame; all else is as for [`Self::put_frame`].
    pub fn put_copy(&mut self, frame: &[u8]) {
        let Ok(()) = self.put_frame(frame.len(), |bytes| {
            bytes.copy_from_slice(frame);
            Ok::<_, Infallible>(())
        });
    }

    /// Writes the frames that were put. `false` when the socket is full: epoll reports when it has room.
    ///
    /// # Errors
    /// passt has ended.
    pub fn flush(&mut self) -> Result<bool, Lost> {
        while !self.outgoing.filled().is_empty() {
            if !self.writable {
                return Ok(false);
            }
            let rest = if self.torn > 0 { self.torn } else { self.outgoing.first_len() };
            match self.socket.write(&self.outgoing.filled()[..rest]) {
                Ok(written) => {
                    self.torn = rest - written;
                    self.writable = self.torn == 0;
                    self.outgoing.take(written);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Err(Lost::Closed),
                Err(error) => return Err(Lost::Failed(error)),
            }
        }
        Ok(true)
    }
}

/// The first frame of a stream, if it is complete.
fn first_frame(stream: &[u8]) -> Result<Option<&[u8]>, Lost> {
    let Some((prefix, rest)) = stream.split_first_chunk::<PREFIX_LEN>() else { return Ok(None) };
    let len = u32::from_be_bytes(*prefix);
    if !FRAME_LEN.contains(&(len as usize)) {
        return Err(Lost::BadLength(len));
    }
    Ok(rest.get(..len as usize))
}

/// Bytes between socket and queue: added at the end, taken from the start.
#[derive(Debug)]
struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    fn new() -> Self {
        Buffer { bytes: vec![0; BUFFER_LEN].into(), start: 0, end: 0 }
    }

    fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Length of the first frame with its prefix, in a buffer that [`Connection::put_frame`] fills.
    fn first_len(&self) -> usize {
        let mut prefix = [0; PREFIX_LEN];
        prefix.copy_from_slice(&self.filled()[..PREFIX_LEN]);
        PREFIX_LEN + u32::from_be_bytes(prefix) as usize
    }

    fn take(&mut self, len: usize) {
        self.start += len;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// The free room at the end. Moves the bytes to the start if fewer than `needed`, filled and free
    /// together, would fit behind them.
    fn room(&mut self, needed: usize) -> &mut [u8] {
        if self.bytes.len() - self.start < needed {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut connection = Connection::new(ours).expect("a connection");
        connection.note(EventSet::IN | EventSet::OUT);
        (connection, theirs)
    }

    fn framed(frame: &[u8]) -> Vec<u8> {
        [&(frame.len() as u32).to_be_bytes(), frame].concat()
    }

    #[test]
    fn frames_arrive_however_they_are_cut() {
        let frames: Vec<Vec<u8>> =
            [14, 60, 1500, 65_535].iter().map(|&len| vec![len as u8; len]).collect();
        let stream = frames.iter().flat_map(|frame| framed(frame)).collect::<Vec<u8>>();
        for step in [1, 3, 17, 4096, stream.len()] {
            let (mut connection, mut passt) = pair();
            let mut received = Vec::new();
            for part in stream.chunks(step) {
                passt.write_all(part).expect("written");
                connection.note(EventSet::IN);
                while let Some(frame) = connection.frame().expect("good frames") {
                    received.push(frame.to_vec());
                    let len = frame.len();
                    connection.take_frame(len);
                }
            }
            assert_eq!(received, frames, "in steps of {step}");
        }
    }

    #[test]
    fn more_than_the_buffer_holds_arrives_in_order() {
        let (mut connection, mut passt) = pair();
        let writer = std::thread::spawn(move || {
            for len in (0..100).map(|i| 65_535 - 97 * i) {
                passt.write_all(&framed(&vec![len as u8; len])).expect("written");
            }
        });
        let mut lengths = Vec::new();
        while lengths.len() < 100 {
            connection.note(EventSet::IN);
            if let Some(frame) = connection.frame().expect("good frames") {
                assert!(frame.iter().all(|byte| *byte == frame.len() as u8));
                let len = frame.len();
                lengths.push(len);
                connection.take_frame(len);
            }
        }
        writer.join().expect("writes");
        assert!(lengths.iter().enumerate().all(|(i, len)| *len == 65_535 - 97 * i));
    }

    #[test]
    fn lengths_that_no_frame_has_end_the_connection() {
        for len in [0, 13, 65_536, u32::MAX] {
            let (mut connection, mut passt) = pair();
            passt.write_all(&framed(&[7; 60])).expect("written");
            passt.write_all(&len.to_be_bytes()).expect("written");
            assert_eq!(connection.frame().expect("a good one first").map(<[u8]>::len), Some(60));
            connection.take_frame(60);
            assert!(matches!(connection.frame(), Err(Lost::BadLength(bad)) if bad == len));
        }
    }

    #[test]
    fn half_a_frame_is_waited_for_and_an_end_is_an_end() {
        let (mut connection, mut passt) = pair();
        passt.write_all(&[0, 0]).expect("written");
        assert!(matches!(connection.frame(), Ok(None)));
        assert!(!connection.readable, "left alone until epoll speaks of it");
        drop(passt);
        assert!(matches!(connection.frame(), Ok(None)));
        connection.note(EventSet::IN | EventSet::HANG_UP);
        assert!(matches!(connection.frame(), Err(Lost::Closed)));
    }

    #[test]
    fn a_full_socket_is_waited_for_and_no_frame_is_torn() {
        let (mut connection, mut passt) = pair();
        let mut sent = Vec::new();
        while connection.flush().expect("open") {
            while connection.has_room() {
                let frame = vec![sent.len() as u8; 14 + sent.len() * 1_009 % 60_000];
                connection
                    .put_frame(frame.len(), |bytes| {
                        bytes.copy_from_slice(&frame);
                        Ok::<_, Lost>(())
                    })
                    .expect("put");
                sent.push(frame);
            }
        }
        let failed = connection.has_room() && connection.put_frame(60, |_| Err(())).is_ok();
        assert!(!failed, "what could not be filled is not sent");
        passt.set_nonblocking(true).expect("set");
        let mut stream = Vec::new();
        loop {
            match passt.read_to_end(&mut stream) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => panic!("{other:?}"),
            }
            connection.note(EventSet::OUT);
            if connection.flush().expect("open") {
                break;
            }
        }
        let _ = passt.read_to_end(&mut stream);
        assert_eq!(stream, sent.iter().flat_map(|frame| framed(frame)).collect::<Vec<u8>>());
        drop(passt);
        connection.put_frame(14, |_| Ok::<_, Lost>(())).expect("put");
        assert!(matches!(connection.flush(), Err(Lost::Closed)));
    }

    #[test]
    fn a_socket_that_appears_is_connected_to() {
        let path = std::env::temp_dir().join(format!("mote-passt-{}", std::process::id()));
        let late = path.clone();
        let listener = std::thread::spawn(move || {
            std::thread::sleep(CONNECT_STEP * 3);
            std::os::unix::net::UnixListener::bind(late).expect("binds")
        });
        let never = sys::signal_file(&[]).expect("a file");
        connect(&path, &never).expect("connects");
        drop(listener.join().expect("listens"));
        std::fs::remove_file(&path).expect("removed");
        // Nothing that could change by waiting.
        let error =
            format!("{:#}", connect(Path::new("/etc/passwd/s"), &never).expect_err("no directory"));
        assert!(error.contains("run 'passt --socket /etc/passwd/s' before"), "{error}");
    }
}
