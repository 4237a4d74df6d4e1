//! The box that a command is for: connecting to its socket, and waiting until the guest answers.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use mote_agent::frame::Frame;

use super::channel::{Channel, Reply};
use super::stop::Stop;

/// How long a box may take to answer if `--wait` does not say.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(10);

/// Time between two attempts to reach a guest that is still booting.
const RETRY: Duration = Duration::from_millis(100);

/// A box's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its path.
    pub socket: PathBuf,
    /// How long the guest may take to answer.
    pub wait: Duration,
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

    /// Waits until the guest answers a frame that has no effect, and returns the answer. mote closes
    /// connections that the guest cannot take yet, which looks the same as a box that ends while it
    /// runs a command. So only this frame is sent again and again; the command is then sent once.
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
    use super::super::testing::{Agent, read_frame, said, scratch, write_frame};
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
