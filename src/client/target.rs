//! The box that a command is for: connecting to its socket, and waiting until the guest answers.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use mote_agent::frame::Frame;

use super::channel::{Channel, Reply};
use super::stop::Stop;

/// How long a box may take to answer if `--wait` does not say.
const DEFAULT_WAIT: Duration = Duration::from_secs(10);

/// Time between two attempts to reach a guest that is still booting.
const RETRY: Duration = Duration::from_millis(20);

/// A box's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its path.
    pub socket: PathBuf,
    /// How long the box may take to answer, and until then to have a socket at all. Without this it may
    /// take 10 s to answer, and must have its socket: most paths that name none are mistakes.
    pub wait: Option<Duration>,
}

/// Why there is no connection.
enum NoConnection {
    /// Nobody listens there; somebody may a little later.
    Absent(anyhow::Error),
    Failed(anyhow::Error),
}

impl From<NoConnection> for Stop {
    fn from(no: NoConnection) -> Self {
        let (NoConnection::Absent(error) | NoConnection::Failed(error)) = no;
        Stop::Failed(error)
    }
}

impl Target {
    /// Connects.
    ///
    /// # Errors
    /// The path names no socket that somebody listens on.
    pub fn connect(&self) -> Result<Channel, Stop> {
        Ok(self.try_connect()?)
    }

    fn try_connect(&self) -> Result<Channel, NoConnection> {
        let path = self.socket.display();
        // Not what is gone meanwhile: a box that starts removes what an earlier one has left.
        let is_something_else =
            || fs::metadata(&self.socket).is_ok_and(|metadata| !metadata.file_type().is_socket());
        Channel::connect(&self.socket).map_err(|error| match error.kind() {
            ErrorKind::NotFound => NoConnection::Absent(anyhow!(
                "no such socket: {path}: the box is not running, or the path is wrong"
            )),
            ErrorKind::ConnectionRefused if is_something_else() => {
                NoConnection::Failed(anyhow!("{path} is not a socket; name the box's"))
            }
            ErrorKind::ConnectionRefused => NoConnection::Absent(anyhow!(
                "nobody listens on {path}: the box is gone and left the file behind"
            )),
            _ => NoConnection::Failed(
                anyhow::Error::new(error).context(format!("connect to {path}")),
            ),
        })
    }

    /// Waits until the guest answers a frame that has no effect, and returns the answer. mote closes
    /// connections that the guest cannot take yet, which looks the same as a box that ends while it
    /// runs a command. So only this frame is sent again and again; the command is then sent once.
    ///
    /// # Errors
    /// There is no box, or it takes longer than [`Target::wait`].
    pub fn knock(&self, kind: u8, payload: &[u8]) -> Result<Frame, Stop> {
        let wait = self.wait.unwrap_or(DEFAULT_WAIT);
        let deadline = Instant::now() + wait;
        loop {
            let too_late = Instant::now() + RETRY >= deadline;
            match self.try_connect() {
                Ok(mut channel) => {
                    channel.send(kind, payload);
                    match channel.reply(Some(deadline), None)? {
                        Reply::Frame(frame) => return Ok(frame),
                        Reply::Closed if !too_late => {}
                        Reply::Closed | Reply::Late => {
                            let path = self.socket.display();
                            return Err(Stop::Failed(anyhow!(
                                "the guest did not answer on {path} within {wait:?}; --wait DURATION waits longer"
                            )));
                        }
                    }
                }
                Err(NoConnection::Absent(error)) if self.wait.is_some() => {
                    if too_late {
                        return Err(error.context(format!("waited {wait:?}")).into());
                    }
                }
                Err(no) => return Err(no.into()),
            }
            thread::sleep(RETRY);
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
        let target = Target { socket, wait: Some(Duration::from_millis(150)) };
        let (code, message) = said(target.knock(3, b"").map(|_| 0));
        assert_eq!(code, 125);
        assert!(message.contains("did not answer") && message.contains("150ms"), "{message}");
        std::fs::remove_file(&target.socket).expect("removed");
    }

    #[test]
    fn a_box_that_is_not_there_fails_at_once() {
        let target = Target { socket: scratch("absent"), wait: None };
        let knock = |target: &Target| said(target.knock(3, b"").map(|_| 0));
        let (code, message) = knock(&target);
        assert_eq!(code, 125);
        assert!(message.starts_with("no such socket"), "{message}");
        let short = Target { wait: Some(Duration::from_millis(50)), ..target.clone() };
        let (code, message) = knock(&short);
        assert_eq!(code, 125);
        assert!(message.starts_with("waited 50ms: no such socket"), "{message}");

        drop(UnixListener::bind(&target.socket).expect("leaves a file behind"));
        let (code, message) = knock(&target);
        assert_eq!(code, 125);
        assert!(message.contains("the box is gone"), "{message}");
        assert!(knock(&short).1.starts_with("waited 50ms: nobody listens"));
        std::fs::remove_file(&target.socket).expect("removed");

        // Nobody will ever listen on a file.
        std::fs::write(&target.socket, "").expect("written");
        let patient = Target { wait: Some(Duration::from_secs(600)), ..target };
        let (code, message) = knock(&patient);
        assert_eq!((code, message.contains("is not a socket")), (125, true), "{message}");
        std::fs::remove_file(&patient.socket).expect("removed");
    }

    #[test]
    fn a_socket_that_is_not_there_yet_is_waited_for() {
        let socket = scratch("late");
        let target = Target { socket: socket.clone(), wait: Some(Duration::from_secs(600)) };
        let waiting =
            thread::spawn(move || target.knock(9, b"?").map_err(|stop| format!("{stop:?}")));
        // One that an earlier run has left behind, and then the box's own.
        drop(UnixListener::bind(&socket).expect("binds"));
        std::fs::remove_file(&socket).expect("removed");
        let listener = UnixListener::bind(&socket).expect("binds");
        let (mut client, _) = listener.accept().expect("a client");
        assert_eq!(read_frame(&mut client).expect("asks").payload, b"?");
        write_frame(&mut client, 9, b"!");
        let answer = waiting.join().expect("ends").expect("answers");
        assert_eq!(answer, Frame { kind: 9, payload: b"!".into() });
        std::fs::remove_file(&socket).expect("removed");
    }
}
