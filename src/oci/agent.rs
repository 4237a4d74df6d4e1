//! Short talks with a box's agent over its exec socket: one frame, one answer.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mote_agent::exec::{MAX_PAYLOAD, kind};
use mote_agent::frame::{self, Decoder};

use crate::sys::{self, Interest};

/// Time between two attempts to reach a guest that is still booting.
const RETRY: Duration = Duration::from_millis(10);

/// What came of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// A frame of this type with this payload.
    Frame(u8, Vec<u8>),
    /// Nobody listens, or the connection was closed without an answer.
    None,
    /// The box's process has ended.
    Ended,
    /// Nothing in time.
    Late,
    /// A signal has come.
    Signal(i32),
}

/// A box's agent.
#[derive(Debug)]
pub struct Agent<'a> {
    /// The exec socket.
    pub socket: &'a Path,
    /// Readable when the box's process has ended.
    pub process: &'a OwnedFd,
    /// Signals that end a wait.
    pub signals: Option<&'a File>,
}

impl Agent<'_> {
    /// Waits until the agent answers a heartbeat, which it does once the entrypoint can be started.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub fn wait_until_ready(&self) -> Result<Answer> {
        loop {
            match self.ask(kind::HEARTBEAT, b"", None)? {
                Answer::None => {}
                answer => return Ok(answer),
            }
            match self.rest(RETRY)? {
                Answer::None => {}
                answer => return Ok(answer),
            }
        }
    }

    /// Sends a frame and waits for the answer, at most for `limit`.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub fn ask(&self, kind: u8, payload: &[u8], limit: Option<Duration>) -> Result<Answer> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut connection = match UnixStream::connect(self.socket) {
            Ok(connection) => connection,
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
            {
                return Ok(Answer::None);
            }
            Err(error) => {
                let path = self.socket.display();
                return Err(error).with_context(|| format!("connect to {path}"));
            }
        };
        // A few bytes, for which every socket has room.
        if connection.write_all(&frame::encode(kind, payload)).is_err() {
            return Ok(Answer::None);
        }
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        let mut buffer = [0; 4096];
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let [peer, ended, signal] = self.poll(Interest::read(&connection), left)?;
            if peer {
                match connection.read(&mut buffer) {
                    Ok(read) if read > 0 => decoder.feed(&buffer[..read]),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    _ => return Ok(Answer::None),
                }
                match decoder.next_slice() {
                    Ok(Some((kind, payload))) => return Ok(Answer::Frame(kind, payload.to_vec())),
                    Ok(None) => {}
                    Err(_) => return Ok(Answer::None),
                }
            } else if ended {
                return Ok(Answer::Ended);
            } else if let Some(answer) = self.signal(signal) {
                return Ok(answer);
            } else if left.is_some_and(|left| left.is_zero()) {
                return Ok(Answer::Late);
            }
        }
    }

    /// Waits a moment, or until the box ends or a signal comes.
    fn rest(&self, limit: Duration) -> Result<Answer> {
        let [_, ended, signal] = self.poll(Interest::NONE, Some(limit))?;
        if ended {
            return Ok(Answer::Ended);
        }
        Ok(self.signal(signal).unwrap_or(Answer::None))
    }

    fn poll(&self, peer: Interest<'_>, limit: Option<Duration>) -> Result<[bool; 3]> {
        let signals = self.signals.map_or(Interest::NONE, Interest::read);
        sys::poll([peer, Interest::read(self.process), signals], limit).context("wait for the box")
    }

    fn signal(&self, is_there: bool) -> Option<Answer> {
        self.signals.filter(|_| is_there).and_then(sys::next_signal).map(Answer::Signal)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::Command;
    use std::thread;

    use super::*;
    use crate::sys::process::process_file;

    #[test]
    fn an_agent_is_asked_until_it_answers_and_no_longer_than_its_box_lives() {
        let path = std::env::temp_dir().join(format!("mote-oci-agent-{}", std::process::id()));
        let mut child = Command::new("sleep").arg("600").spawn().expect("starts");
        let process = process_file(child.id()).expect("runs");
        let agent = Agent { socket: &path, process: &process, signals: None };
        assert_eq!(agent.ask(kind::CONTROL, b"x", None).expect("asked"), Answer::None);
        let listener = UnixListener::bind(&path).expect("binds");
        let server = thread::spawn(move || {
            // One that cannot take connections yet, then one that can, then one that never answers.
            drop(listener.accept().expect("a client"));
            let (mut client, _) = listener.accept().expect("a client");
            client.write_all(&frame::encode(kind::HEARTBEAT, b"!")).expect("taken");
            let silent = listener.accept().expect("a client");
            (listener.accept().expect("a client"), silent)
        });
        let answer = agent.wait_until_ready().expect("asked");
        assert_eq!(answer, Answer::Frame(kind::HEARTBEAT, b"!".into()));
        let limit = Some(Duration::from_millis(50));
        assert_eq!(agent.ask(kind::CONTROL, b"x", limit).expect("asked"), Answer::Late);
        child.kill().expect("killed");
        assert_eq!(agent.ask(kind::CONTROL, b"x", None).expect("asked"), Answer::Ended);
        drop(server.join().expect("ends"));
        child.wait().expect("reaped");
        std::fs::remove_file(path).expect("removed");
    }
}
