//! One TCP connection of an application, spliced to the vsock stream of its flow.
//!
//! Bytes, ends and resets pass in both directions as over one connection
//! ([`mote_agent::flow`]); nothing is read that cannot be kept, so a slow reader holds up its writer
//! and nobody else.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};

use mote_agent::flow::CHUNK_HEADER_LEN;

use crate::sys::net;

/// Most bytes read at once, and so the most that one direction of a connection keeps.
pub const SCRATCH_LEN: usize = 64 * 1024;
/// Most reads per direction before other connections get their turn.
const ROUNDS: usize = 8;

/// What became of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It waits for one of its sockets.
    Waiting,
    /// It has more to do, after others' turn.
    More,
    /// Both directions have ended in order, or nobody is left to read.
    Over,
    /// One side was cut off, so the other is to be too.
    Broken,
}

/// A side's readiness, as an edge-triggered epoll tells it.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// Reading may give something.
    pub readable: bool,
    /// Writing may take something.
    pub writable: bool,
}

impl Ready {
    /// As a socket is before anything is known.
    const UNKNOWN: Ready = Ready { readable: true, writable: true };
}

/// How far one direction has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// There may be more.
    Open,
    /// The end was read; it is passed on once everything before it was.
    Ending,
    /// The end was passed on.
    Ended,
}

/// Cuts chunks' headers out of a byte stream.
#[derive(Debug, Default)]
struct Chunks {
    header: [u8; CHUNK_HEADER_LEN],
    filled: usize,
    /// Bytes left in the chunk.
    remaining: usize,
    ended: bool,
}

impl Chunks {
    /// Moves what `bytes` carries to their front; says how much that is.
    fn unwrap(&mut self, bytes: &mut [u8]) -> usize {
        let (mut from, mut to) = (0, 0);
        while from < bytes.len() && !self.ended {
            if self.remaining > 0 {
                let len = self.remaining.min(bytes.len() - from);
                bytes.copy_within(from..from + len, to);
                self.remaining -= len;
                from += len;
                to += len;
                continue;
            }
            self.header[self.filled] = bytes[from];
            self.filled += 1;
            from += 1;
            if self.filled == CHUNK_HEADER_LEN {
                self.filled = 0;
                self.remaining = u32::from_be_bytes(self.header) as usize;
                self.ended = self.remaining == 0;
            }
        }
        to
    }
}

/// A spliced connection.
#[derive(Debug)]
pub struct Stream {
    vsock: File,
    tcp: TcpStream,
    /// Of the vsock side.
    pub vsock_ready: Ready,
    /// Of the TCP side.
    pub tcp_ready: Ready,
    up: Direction,
    /// From the application, not yet taken by the host.
    up_kept: Vec<u8>,
    down: Direction,
    down_kept: Vec<u8>,
    chunks: Chunks,
    /// The application has closed its socket: it reads nothing more.
    app_closed: bool,
    /// The host reads nothing more.
    host_takes_nothing: bool,
    /// Bytes that the host has taken.
    taken: u64,
}

/// What one attempt to move bytes came to.
enum Step {
    Moved,
    Blocked,
    End,
    Failed,
}

impl Stream {
    /// Splices two connected, non-blocking sockets.
    pub fn new(vsock: File, tcp: TcpStream) -> Self {
        // Bytes go on as they come: the application has already decided what a segment is.
        let _ = tcp.set_nodelay(true);
        Stream {
            vsock,
            tcp,
            vsock_ready: Ready::UNKNOWN,
            tcp_ready: Ready::UNKNOWN,
            up: Direction::Open,
            up_kept: Vec::new(),
            down: Direction::Open,
            down_kept: Vec::new(),
            chunks: Chunks::default(),
            app_closed: false,
            host_takes_nothing: false,
            taken: 0,
        }
    }

    /// Notes that the application has closed its socket.
    pub fn note_close(&mut self) {
        self.app_closed = true;
    }

    /// Whether everything of the application's has gone to the host.
    pub fn has_sent_all(&self) -> bool {
        self.up == Direction::Ended
    }

    /// How many bytes of the application's the host has taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Moves what can be moved.
    pub fn pump(&mut self, scratch: &mut [u8]) -> Progress {
        let mut more = false;
        for direction in [Self::pump_up, Self::pump_down] {
            let mut rounds = 0;
            loop {
                match direction(self, scratch) {
                    Step::Moved if rounds == ROUNDS => {
                        more = true;
                        break;
                    }
                    Step::Moved => rounds += 1,
                    Step::Blocked | Step::End => break,
                    Step::Failed => return Progress::Broken,
                }
            }
        }
        let up_over = self.up == Direction::Ended;
        if up_over && (self.down == Direction::Ended || self.app_closed) {
            return Progress::Over;
        }
        if more { Progress::More } else { Progress::Waiting }
    }

    /// Cuts the application off: its socket reports a reset.
    pub fn reset(self) {
        // Nothing is left to say to a socket that cannot even be closed hard.
        let _ = net::reset_on_close(&self.tcp);
    }

    fn pump_up(&mut self, scratch: &mut [u8]) -> Step {
        if !self.up_kept.is_empty() {
            if !self.vsock_ready.writable {
                return Step::Blocked;
            }
            let kept = std::mem::take(&mut self.up_kept);
            return self.write_up(&kept);
        }
        match self.up {
            Direction::Ended => return Step::End,
            Direction::Ending => {
                self.up = Direction::Ended;
                // Failing means that the host is gone, which reading will tell.
                let _ = net::shutdown_write(&self.vsock);
                return Step::End;
            }
            Direction::Open => {}
        }
        if !self.vsock_ready.writable || !self.tcp_ready.readable {
            return Step::Blocked;
        }
        match (&self.tcp).read(scratch) {
            Ok(0) => self.up = Direction::Ending,
            Ok(len) => return self.write_up(&scratch[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.tcp_ready.readable = false;
                return Step::Blocked;
            }
            // A reset; closing the vsock without its half-close tells the host.
            Err(_) => return Step::Failed,
        }
        Step::Moved
    }

    fn write_up(&mut self, bytes: &[u8]) -> Step {
        if !self.host_takes_nothing {
            match write(&self.vsock, bytes) {
                Ok(len) => {
                    self.taken += len as u64;
                    self.up_kept = bytes[len..].to_vec();
                    self.vsock_ready.writable = len == bytes.len();
                    return if len == bytes.len() { Step::Moved } else { Step::Blocked };
                }
                Err(_) => self.host_takes_nothing = true,
            }
        }
        if self.down == Direction::Ended && !self.app_closed {
            // The host's direction has ended in order: nothing that is still to be read tells the application.
            Step::Failed
        } else {
            // What the host has sent, and how it ended, is still to be read.
            Step::Moved
        }
    }

    fn pump_down(&mut self, scratch: &mut [u8]) -> Step {
        if !self.down_kept.is_empty() {
            if !self.tcp_ready.writable {
                return Step::Blocked;
            }
            let kept = std::mem::take(&mut self.down_kept);
            return self.write_down(&kept);
        }
        match self.down {
            Direction::Ended => return Step::End,
            Direction::Ending => {
                self.down = Direction::Ended;
                let _ = self.tcp.shutdown(Shutdown::Write);
                return Step::End;
            }
            Direction::Open => {}
        }
        if !self.tcp_ready.writable || !self.vsock_ready.readable {
            return Step::Blocked;
        }
        match (&self.vsock).read(scratch) {
            Ok(0) => return Step::Failed,
            Ok(len) => {
                let len = self.chunks.unwrap(&mut scratch[..len]);
                if self.chunks.ended {
                    self.down = Direction::Ending;
                }
                return self.write_down(&scratch[..len]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.vsock_ready.readable = false;
                return Step::Blocked;
            }
            Err(_) => return Step::Failed,
        }
        Step::Moved
    }

    fn write_down(&mut self, bytes: &[u8]) -> Step {
        match write(&self.tcp, bytes) {
            Ok(len) => {
                self.down_kept = bytes[len..].to_vec();
                self.tcp_ready.writable = len == bytes.len();
                if len == bytes.len() { Step::Moved } else { Step::Blocked }
            }
            Err(_) => {
                // The application reads no more: as after its close.
                self.down = Direction::Ended;
                self.app_closed = true;
                Step::End
            }
        }
    }
}

/// Writes as much as is taken now.
fn write(mut to: impl Write, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match to.write(&bytes[written..]) {
            Ok(len) => written += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    /// A stream between an application's socket and the host's end of a flow.
    struct Fixture {
        stream: Stream,
        app: TcpStream,
        host: UnixStream,
        scratch: Vec<u8>,
    }

    impl Fixture {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
            let app = TcpStream::connect(listener.local_addr().expect("its address"));
            let (tcp, _) = listener.accept().expect("a connection");
            let (vsock, host) = UnixStream::pair().expect("a pair");
            tcp.set_nonblocking(true).expect("non-blocking");
            vsock.set_nonblocking(true).expect("non-blocking");
            let stream = Stream::new(File::from(OwnedFd::from(vsock)), tcp);
            let scratch = vec![0; SCRATCH_LEN];
            Fixture { stream, app: app.expect("connected"), host, scratch }
        }

        fn pump(&mut self) -> Progress {
            pump(&mut self.stream, &mut self.scratch)
        }

        fn outcome(&mut self) -> Progress {
            outcome(&mut self.stream, &mut self.scratch)
        }
    }

    /// Pumps with both sockets ready for all that is known.
    fn pump(stream: &mut Stream, scratch: &mut [u8]) -> Progress {
        stream.vsock_ready = Ready::UNKNOWN;
        stream.tcp_ready = Ready::UNKNOWN;
        stream.pump(scratch)
    }

    /// Pumps until something else happens than `Waiting` and `More`.
    fn outcome(stream: &mut Stream, scratch: &mut [u8]) -> Progress {
        loop {
            match pump(stream, scratch) {
                Progress::Waiting | Progress::More => std::thread::yield_now(),
                outcome => return outcome,
            }
        }
    }

    fn chunk(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
    }

    #[test]
    fn chunks_survive_any_boundaries() {
        let wire = [chunk(b"hello "), chunk(b"w"), chunk(b"orld"), chunk(b"")].concat();
        for step in 1..=wire.len() {
            let mut chunks = Chunks::default();
            let mut out = Vec::new();
            for piece in wire.chunks(step) {
                let mut piece = piece.to_vec();
                let len = chunks.unwrap(&mut piece);
                out.extend(&piece[..len]);
            }
            assert_eq!((out.as_slice(), chunks.ended), (&b"hello world"[..], true), "{step}");
        }
    }

    #[test]
    fn both_directions_end_on_their_own() {
        let mut f = Fixture::new();
        f.app.write_all(b"question").expect("written");
        f.app.shutdown(Shutdown::Write).expect("half-closed");
        let mut question = Vec::new();
        let mut host = f.host.try_clone().expect("a clone");
        let reader = std::thread::spawn(move || {
            host.read_to_end(&mut question).expect("the end");
            question
        });
        while !f.stream.has_sent_all() {
            assert!(matches!(f.pump(), Progress::Waiting | Progress::More));
        }
        assert_eq!(reader.join().expect("read"), b"question");
        f.host.write_all(&[chunk(b"answer"), chunk(b"")].concat()).expect("written");
        assert_eq!(f.outcome(), Progress::Over);
        drop(f.stream);
        let mut answer = String::new();
        f.app.read_to_string(&mut answer).expect("an orderly end");
        assert_eq!(answer, "answer");
    }

    #[test]
    fn an_end_without_its_chunk_is_a_reset() {
        for half_closed in [false, true] {
            let mut f = Fixture::new();
            if half_closed {
                f.app.shutdown(Shutdown::Write).expect("half-closed");
                while !f.stream.has_sent_all() {
                    f.pump();
                }
            }
            f.host.write_all(&chunk(b"cut")).expect("written");
            drop(f.host);
            assert_eq!(outcome(&mut f.stream, &mut f.scratch), Progress::Broken);
            f.stream.reset();
            let mut bytes = Vec::new();
            let error = f.app.read_to_end(&mut bytes).expect_err("a reset");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
    }

    #[test]
    fn a_host_that_goes_away_cuts_a_writer_off() {
        for end_comes_first in [false, true] {
            let mut f = Fixture::new();
            f.app.write_all(b"some").expect("written");
            for is_end in [end_comes_first, !end_comes_first] {
                if !is_end {
                    f.host.shutdown(Shutdown::Read).expect("shut down");
                    continue;
                }
                f.host.write_all(&chunk(b"")).expect("written");
                while f.stream.down != Direction::Ended {
                    assert!(matches!(f.pump(), Progress::Waiting | Progress::More));
                }
            }
            f.app.write_all(b"more").expect("written");
            assert_eq!(f.outcome(), Progress::Broken, "the end first: {end_comes_first}");
        }
    }

    #[test]
    fn an_applications_reset_breaks_the_flow() {
        let mut f = Fixture::new();
        net::reset_on_close(&f.app).expect("a reset");
        drop(f.app);
        assert_eq!(outcome(&mut f.stream, &mut f.scratch), Progress::Broken);
        assert!(!f.stream.has_sent_all(), "no half-close precedes it");
    }

    #[test]
    fn a_slow_host_stops_the_reading() {
        let mut f = Fixture::new();
        f.app.set_nonblocking(true).expect("non-blocking");
        let block = [7; 4096];
        let mut sent = 0;
        let mut refused = 0;
        while refused < 1000 {
            f.pump();
            match f.app.write(&block) {
                Ok(len) => (sent, refused) = (sent + len, 0),
                Err(_) => refused += 1,
            }
        }
        assert!(f.stream.up_kept.len() <= SCRATCH_LEN);
        // It all arrives once somebody reads.
        let mut received = 0;
        let mut buffer = vec![0; 1 << 16];
        f.host.set_nonblocking(true).expect("non-blocking");
        while received < sent {
            f.pump();
            received += f.host.read(&mut buffer).unwrap_or(0);
        }
        assert_eq!(received, sent);
    }

    #[test]
    fn a_closed_connection_is_over_once_all_was_sent() {
        let mut f = Fixture::new();
        f.app.write_all(b"last words").expect("written");
        drop(f.app);
        f.stream.note_close();
        assert_eq!(outcome(&mut f.stream, &mut f.scratch), Progress::Over);
        drop(f.stream);
        let mut words = String::new();
        f.host.read_to_string(&mut words).expect("an end");
        assert_eq!(words, "last words");
    }
}
