//! The janitor: the one process of a box that stays outside of its confinement. It does what needs the
//! host's file system while the box runs and when it is over, and runs nothing that a guest or a
//! client has sent.
//!
//! ```text
//! mote     cgroup, sockets, janitor ── confined, runs the guest ── line closed, reap ── end
//! janitor             connect to passt when asked ………………………… remove sockets ……… remove cgroup
//! ```
//!
//! Whatever happens to mote, SIGKILL included, the line between the two closes and the process ends, and
//! the janitor removes what the box has on the host. A mote that has been broken into can have it connect
//! to the box's passt and remove the box's sockets early, and nothing else: a cgroup is a limit, and
//! stays until mote is gone.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::cgroup::Remains;
use crate::passt;
use crate::sockets::SocketFile;
use crate::sys::{self, Interest};

/// How long mote waits for an answer. The janitor never waits itself, but may have to wait for a CPU.
const ANSWER_LIMIT: Duration = Duration::from_millis(100);

/// How long unlinking a few files may take.
const CLEANING_LIMIT: Duration = Duration::from_secs(1);

/// What a box has on the host beside its processes. Removed when dropped, but for a cgroup that this
/// process is in.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Files of the sockets that it listens on.
    pub sockets: Vec<SocketFile>,
    /// Its cgroup.
    pub cgroup: Option<Remains>,
}

impl Leftovers {
    /// Leaves the rest to the janitor.
    fn hand_over(mut self) {
        self.sockets.clear();
        // Closes what it holds, removes nothing.
        self.cgroup = None;
    }

    fn remove_sockets(&mut self) {
        self.sockets.drain(..).for_each(SocketFile::remove);
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        self.remove_sockets();
        if let Some(cgroup) = &mut self.cgroup {
            cgroup.remove();
        }
    }
}

/// A box's janitor, a child of this process.
#[derive(Debug)]
pub struct Janitor {
    line: UnixStream,
    /// The janitor, if it ends before this process does.
    ends_first: Option<u32>,
}

impl Janitor {
    /// Starts the janitor, who connects to this passt when asked. To be called before there are
    /// threads, whose locks it would inherit.
    pub fn start(mut leftovers: Leftovers, passt: Option<PathBuf>) -> Result<Janitor> {
        let (line, theirs) = UnixStream::pair().context("create the janitor's line")?;
        line.set_nonblocking(true).context("prepare the janitor's line")?;
        let mote = sys::process_file(std::process::id()).context("watch mote for its janitor")?;
        let mut keep = vec![theirs.as_raw_fd(), mote.as_raw_fd()];
        keep.extend(leftovers.cgroup.iter().flat_map(Remains::descriptors));
        let pid = sys::start_detached(c"mote-janitor", &keep, || {
            serve(&theirs, passt.as_deref());
            // At once: a socket that is there says that the box runs (contract §2.8).
            leftovers.remove_sockets();
            if leftovers.cgroup.is_some() {
                let _ = sys::poll([Interest::new(&mote, true, false)], None);
            }
            drop(std::mem::take(&mut leftovers));
        })
        .context("start the janitor")?;
        let ends_first = leftovers.cgroup.is_none().then_some(pid);
        leftovers.hand_over();
        Ok(Janitor { line, ends_first })
    }

    /// A way to ask for connections to passt.
    pub fn passt_line(&self) -> Result<PasstLine> {
        Ok(PasstLine(self.line.try_clone().context("duplicate the janitor's line")?))
    }

    /// Has the janitor clean up, and waits for it as far as it does not wait for mote. What was made
    /// from this is to be dropped before.
    pub fn dismiss(self) {
        drop(self.line);
        if let Some(pid) = self.ends_first {
            sys::reap(pid, CLEANING_LIMIT);
        }
    }
}

/// Connects to passt as often as a byte comes, until the line closes. Answers with a byte: 0 and the
/// connection, or an errno.
fn serve(line: &UnixStream, passt: Option<&std::path::Path>) {
    let mut line = line;
    loop {
        match line.read(&mut [0]) {
            Ok(1) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            _ => return,
        }
        let connected = passt.map_or(Err(ErrorKind::Unsupported.into()), passt::connect_now);
        let answered = match connected {
            Ok(socket) => line.send_with_fd(&[0u8][..], socket.as_raw_fd()).is_ok(),
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                line.write_all(&[errno as u8]).is_ok()
            }
        };
        if !answered {
            return;
        }
    }
}

/// The line to the janitor, for asking it to connect to passt.
#[derive(Debug)]
pub struct PasstLine(UnixStream);

impl PasstLine {
    /// A new connection to the box's passt, if that listens at this moment. Waits for the janitor, not
    /// for passt.
    pub fn connect(&mut self) -> io::Result<UnixStream> {
        let mut byte = [0];
        // The answer to an earlier request that came too late is an old connection.
        while let Ok((1, _)) = self.0.recv_with_fd(&mut byte) {}
        self.0.write_all(&[0])?;
        let [ready] = sys::poll([Interest::new(&self.0, true, false)], Some(ANSWER_LIMIT))?;
        if !ready {
            return Err(ErrorKind::TimedOut.into());
        }
        match self.0.recv_with_fd(&mut byte) {
            Ok((1, Some(socket))) => Ok(UnixStream::from(std::os::fd::OwnedFd::from(socket))),
            Ok((1, None)) => Err(io::Error::from_raw_os_error(byte[0].into())),
            Ok(_) => Err(ErrorKind::BrokenPipe.into()),
            Err(error) => Err(io::Error::from_raw_os_error(error.errno())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("mote-janitor-{name}-{}", std::process::id()))
    }

    #[test]
    fn passt_is_connected_to_again_and_again() {
        let path = scratch("passt");
        let listener = UnixListener::bind(&path).expect("bound");
        let janitor = Janitor::start(Leftovers::default(), Some(path.clone())).expect("a janitor");
        let mut line = janitor.passt_line().expect("a line");
        for text in ["first", "second"] {
            let mut socket = line.connect().expect("connected");
            socket.write_all(text.as_bytes()).expect("written");
            drop(socket);
            let mut read = String::new();
            listener.accept().expect("a client").0.read_to_string(&mut read).expect("text");
            assert_eq!(read, text);
        }
        drop(listener);
        let error = line.connect().expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(line.connect().expect_err("no file").kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_box_without_passt_has_nothing_to_connect_to() {
        let janitor = Janitor::start(Leftovers::default(), None).expect("a janitor");
        assert!(janitor.passt_line().expect("a line").connect().is_err());
    }
}
