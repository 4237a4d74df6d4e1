//! The commands that work with a running box through its sockets (contract §4, §5): `mote exec`,
//! `mote pty` and `mote cp`. They are clients of whatever agent answers there, mote's own or not.
//!
//! [`channel`] is a connection of frames, [`relay`] the traffic of a command between one and the
//! process's own input and output; [`exec`], [`pty`] and [`cp`] say what the frames mean.

pub mod channel;
pub mod cp;
pub mod exec;
pub mod pty;
pub mod relay;
#[cfg(test)]
mod testing;

use std::io::ErrorKind;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use mote_agent::frame::Frame;

use crate::client::channel::{Channel, Reply};
use crate::client::relay::Stdio;
use crate::log;

/// How long a box may take to answer if `--wait` does not say.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(10);

/// Between two attempts to reach a guest that is not up yet.
const RETRY: Duration = Duration::from_millis(100);

/// The exit code when there is no box, or no sense in what it says; what `docker exec` uses.
const FAILED: u8 = 125;
/// The exit code when the box, or this host's file system, refuses to move a file.
const REFUSED: u8 = 1;

/// Why a client command ends without a code from the guest.
#[derive(Debug)]
pub enum Stop {
    /// The box cannot be reached, or broke off.
    Failed(anyhow::Error),
    /// A file cannot be moved.
    Refused(anyhow::Error),
    /// The reader of the output has gone, or a signal came: ends with this code, without a word.
    Quiet(u8),
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Stop::Failed(error)
    }
}

impl Stop {
    /// Adds what was being done.
    fn context(self, what: String) -> Stop {
        match self {
            Stop::Failed(error) => Stop::Failed(error.context(what)),
            Stop::Refused(error) => Stop::Refused(error.context(what)),
            Stop::Quiet(code) => Stop::Quiet(code),
        }
    }
}

/// Carries out a client command on the process's own input and output, says on standard error what
/// went wrong, and returns the exit code.
pub fn run(command: impl FnOnce(&Stdio) -> Result<u8, Stop>) -> u8 {
    let stdio = Stdio::of_process().context("open standard input and output");
    let (code, error) = match stdio.map_err(Stop::from).and_then(|stdio| command(&stdio)) {
        Ok(code) | Err(Stop::Quiet(code)) => return code,
        Err(Stop::Failed(error)) => (FAILED, error),
        Err(Stop::Refused(error)) => (REFUSED, error),
    };
    log::error(&format!("{error:#}"));
    code
}

/// A box's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its path.
    pub socket: PathBuf,
    /// How long the guest may take to answer.
    pub wait: Duration,
}

/// What to run in the guest, on pipes or on a terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Program and arguments.
    pub cmd: Vec<String>,
    /// `NAME=value` entries over the box's own environment.
    pub env: Vec<String>,
    /// `uid`, `uid:gid`, `name` or `name:group`.
    pub user: Option<String>,
    /// Directory to start in.
    pub workdir: Option<String>,
}

impl Target {
    /// Connects.
    ///
    /// # Errors
    /// The path names no socket that somebody listens on.
    pub fn connect(&self) -> Result<Channel, Stop> {
        let path = self.socket.display();
        Channel::connect(&self.socket).map_err(|error| {
            Stop::Failed(match error.kind() {
                ErrorKind::NotFound => {
                    anyhow!("no such socket: {path}: the box is not running, or the path is wrong")
                }
                ErrorKind::ConnectionRefused => {
                    anyhow!("nobody listens on {path}: the box is gone and left the file behind")
                }
                _ => anyhow::Error::new(error).context(format!("connect to {path}")),
            })
        })
    }

    /// Waits until the guest answers a frame that asks for nothing, and returns the answer. mote
    /// closes connections that the guest cannot take yet, which looks the same as a box that ends
    /// while a command runs in it; after this, a command is sent once and never again.
    ///
    /// # Errors
    /// There is no box, or it takes longer than [`Target::wait`].
    pub fn knock(&self, kind: u8, payload: &[u8]) -> Result<Frame, Stop> {
        let deadline = Instant::now() + self.wait;
        loop {
            let mut channel = self.connect()?;
            channel.send(kind, payload);
            match channel.reply(Some(deadline), None)? {
                Reply::Frame(frame) => return Ok(frame),
                Reply::Closed if Instant::now() + RETRY < deadline => thread::sleep(RETRY),
                Reply::Closed | Reply::Late => {
                    let (wait, path) = (self.wait, self.socket.display());
                    return Err(Stop::Failed(anyhow!(
                        "the guest did not answer on {path} within {wait:?}; --wait DURATION waits longer"
                    )));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Agent, read_frame, said, scratch, write_frame};
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_guest_that_is_not_up_yet_is_asked_again() {
        let agent = Agent::new("starting", 3, |number, mut client| {
            if number == 2 {
                assert_eq!(read_frame(&mut client).expect("asks").payload, b"?");
                write_frame(&mut client, 9, b"!");
            }
        });
        let answer = agent.target.knock(9, b"?").expect("answers");
        assert_eq!(answer, Frame { kind: 9, payload: b"!".into() });
        agent.join();
    }

    #[test]
    fn a_guest_that_never_answers_is_given_up() {
        let socket = scratch("silent");
        let _listener = UnixListener::bind(&socket).expect("binds");
        let target = Target { socket, wait: Duration::from_millis(150) };
        let (code, message) = said(target.knock(3, b"").map(|_| 0));
        assert_eq!(code, 125);
        assert!(message.contains("did not answer") && message.contains("150ms"), "{message}");
        std::fs::remove_file(&target.socket).expect("removed");
    }

    #[test]
    fn a_box_that_is_not_there_fails_at_once() {
        let target = Target { socket: scratch("absent"), wait: Duration::from_secs(60) };
        let (code, message) = said(target.knock(3, b"").map(|_| 0));
        assert_eq!(code, 125);
        assert!(message.contains("no such socket"), "{message}");

        drop(UnixListener::bind(&target.socket).expect("leaves a file behind"));
        let (code, message) = said(target.knock(3, b"").map(|_| 0));
        assert_eq!(code, 125);
        assert!(message.contains("the box is gone"), "{message}");
        std::fs::remove_file(&target.socket).expect("removed");
    }
}
