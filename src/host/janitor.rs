//! The janitor: the one process of a box that is not confined. It makes the box's cgroup and sockets on
//! the host and removes them, and connects to passt again while the box runs. It handles no data of a
//! guest or a client.
//!
//! ```text
//! mote      start ┐                 ┌ confined, runs the guest ── line closed, reap ── end
//! janitor         └ make resources ─┘ connect to passt when asked …… sockets, virtiofsd …… cgroup
//! ```
//!
//! Whatever ends mote, even SIGKILL, closes the line, a socket pair between mote and the janitor. The
//! janitor then removes what it has made, and kills the box's virtiofsd processes: one under an
//! attacker's control may not end with mote. A mote under an attacker's control can make the janitor
//! connect to the box's passt, and remove the sockets early. It cannot make the janitor remove the
//! cgroup, which limits mote: the janitor waits until mote has ended.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::cgroup::{self, Cgroup, Remains};
use crate::host::sockets::{self, SocketFile};
use crate::layout;
use crate::plan::{HostSocket, Plan};
use crate::sys::{self, Interest};
use crate::virtio::net::passt;

/// How long mote waits for an answer while the box runs. The janitor answers without waiting, but may
/// have to wait for a CPU.
const ANSWER_LIMIT: Duration = Duration::from_millis(100);

/// Most processes that the janitor accepts: two for each share, and two for the root file system.
const MAX_PROCESSES: usize = 2 * (layout::MAX_SHARES + 1);

/// How long the janitor sleeps after each connection to passt: the box's limit on CPU time does not hold
/// for it, so a mote under an attacker's control must not keep it busy. mote asks less often.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// How long the janitor may take to unlink a few files.
const CLEANING_LIMIT: Duration = Duration::from_secs(1);

/// The byte that is sent with a descriptor.
const GIVEN: u8 = 0;
/// The byte before the text that says why the resources could not be made.
const NO_RESOURCES: u8 = 1;

/// What the janitor does for a box.
#[derive(Debug, Default)]
pub struct Duties<'a> {
    /// The cgroup to create.
    pub cgroup: Option<&'a Cgroup>,
    /// The sockets to listen on.
    pub sockets: &'a [HostSocket],
    /// The passt to connect to when asked.
    pub passt: Option<&'a Path>,
}

impl<'a> From<&'a Plan> for Duties<'a> {
    fn from(plan: &'a Plan) -> Duties<'a> {
        Duties {
            cgroup: plan.cgroup.as_ref(),
            sockets: &plan.sockets,
            passt: plan.networking.passt_socket(),
        }
    }
}

/// What the janitor has made for a box, as mote gets it.
#[derive(Debug)]
pub struct HostResources {
    /// The lock to hold while mote joins the cgroup.
    pub cgroup: Option<cgroup::Lock>,
    /// The sockets, in the order in which they were asked for.
    pub sockets: Vec<UnixListener>,
}

/// What the janitor must remove at the end of a box. Dropping it does that.
#[derive(Debug, Default)]
struct Leftovers {
    sockets: Vec<SocketFile>,
    /// The box's virtiofsd processes.
    processes: Vec<File>,
    cgroup: Option<Remains>,
}

impl Leftovers {
    /// Removes everything but the cgroup.
    fn remove_most(&mut self) {
        self.sockets.drain(..).for_each(SocketFile::remove);
        self.processes.drain(..).for_each(|process| sys::process::kill_process(&process));
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        self.remove_most();
        if let Some(cgroup) = &mut self.cgroup {
            cgroup.remove();
        }
    }
}

/// A box's janitor, a child of this process.
#[derive(Debug)]
pub struct Janitor {
    line: UnixStream,
    /// The janitor's process id, if it ends before this process: with a cgroup it does not.
    ends_first: Option<u32>,
}

impl Janitor {
    /// Starts the janitor, and waits until it has made the box's resources or `stop` is readable. Must be
    /// called before there are threads: the janitor would inherit locks that they hold.
    ///
    /// # Errors
    /// The janitor cannot make the resources, or `stop` is readable. What it has made is removed, at
    /// the latest when this process has ended.
    pub fn start(duties: Duties<'_>, stop: &File) -> Result<(Janitor, HostResources)> {
        let (line, theirs) = UnixStream::pair().context("create the janitor's line")?;
        let mote =
            sys::process::process_file(std::process::id()).context("watch mote for its janitor")?;
        let keep = [theirs.as_raw_fd(), mote.as_raw_fd()];
        let work = || work(&duties, &theirs, &mote);
        let pid = sys::process::start_detached(c"mote-janitor", &keep, work)
            .context("start the janitor")?;
        drop(theirs);
        let janitor = Janitor { line, ends_first: duties.cgroup.is_none().then_some(pid) };
        match HostResources::take(&duties, &janitor.line, stop) {
            Ok(resources) => {
                janitor.line.set_nonblocking(true).context("prepare the janitor's line")?;
                Ok((janitor, resources))
            }
            Err(error) => {
                janitor.dismiss();
                Err(error)
            }
        }
    }

    /// Makes the janitor kill these processes when the line closes.
    ///
    /// # Errors
    /// The janitor has ended.
    pub fn kill_at_end<'a>(&self, processes: impl IntoIterator<Item = &'a OwnedFd>) -> Result<()> {
        for process in processes {
            self.line
                .send_with_fd(&[GIVEN][..], process.as_raw_fd())
                .map_err(io::Error::from)
                .context("tell the janitor of a process")?;
        }
        Ok(())
    }

    /// A handle for asking the janitor for connections to passt.
    ///
    /// # Errors
    /// The host has no descriptor for it.
    pub fn passt_line(&self) -> Result<PasstLine> {
        Ok(PasstLine(self.line.try_clone().context("duplicate the janitor's line")?))
    }

    /// Makes the janitor clean up, and waits for its end, unless it waits for the end of this process.
    /// Every [`PasstLine`] must be dropped before.
    pub fn dismiss(self) {
        drop(self.line);
        if let Some(pid) = self.ends_first {
            sys::process::reap(pid, CLEANING_LIMIT);
        }
    }
}

/// All that the janitor's process does.
fn work(duties: &Duties<'_>, line: &UnixStream, mote: &OwnedFd) {
    let mut leftovers = Leftovers::default();
    match HostResources::make(duties, line, &mut leftovers) {
        Ok(resources) => {
            match resources.give(line).context("hand a descriptor to mote") {
                Ok(()) => serve(line, mote, duties.passt, &mut leftovers.processes),
                Err(error) => refuse(line, &error),
            }
            // First, because mote may be waiting for an answer, and the janitor waits for mote below.
            let _ = line.shutdown(Shutdown::Both);
            // At once: clients take an existing socket for a running box (contract §2.8).
            leftovers.remove_most();
            if leftovers.cgroup.is_some() {
                let _ = sys::poll([Interest::read(mote)], None);
            }
        }
        Err(error) => {
            drop(leftovers);
            refuse(line, &error);
        }
    }
}

/// Tells mote why the resources could not be made. The text ends where the line closes.
fn refuse(mut line: &UnixStream, error: &anyhow::Error) {
    let _ = line.write_all(&[NO_RESOURCES]);
    let _ = line.write_all(format!("{error:#}").as_bytes());
}

impl HostResources {
    /// Makes the resources. Each goes into `leftovers` as soon as it is made, whatever fails after that.
    fn make(
        duties: &Duties<'_>,
        line: &UnixStream,
        leftovers: &mut Leftovers,
    ) -> Result<HostResources> {
        let cgroup = duties.cgroup.map(Cgroup::create).transpose()?.map(|(remains, lock)| {
            leftovers.cgroup = Some(remains);
            lock
        });
        let mut sockets = Vec::new();
        for socket in duties.sockets {
            // Waiting for the cgroup may have taken long. If mote has ended, the next start of its box
            // may need these paths already.
            let [has_ended] = sys::poll([Interest::read(line)], Some(Duration::ZERO))?;
            ensure!(!has_ended, "mote has ended");
            let (listener, file) = sockets::listen(socket)?;
            leftovers.sockets.push(file);
            sockets.push(listener);
        }
        Ok(HostResources { cgroup, sockets })
    }

    /// Passes the resources on to mote, and closes them here.
    fn give(self, line: &UnixStream) -> io::Result<()> {
        let cgroup = self.cgroup.map(OwnedFd::from);
        for fd in cgroup.into_iter().chain(self.sockets.into_iter().map(OwnedFd::from)) {
            line.send_with_fd(&[GIVEN][..], fd.as_raw_fd())?;
        }
        Ok(())
    }

    /// Takes the resources that the janitor has made for these duties.
    fn take(duties: &Duties<'_>, line: &UnixStream, stop: &File) -> Result<HostResources> {
        let take = || {
            let both = [Interest::read(line), Interest::read(stop)];
            let [_, is_stopped] = sys::poll(both, None).context("wait for the janitor")?;
            ensure!(!is_stopped, "stopped while waiting for the box's place on the host");
            take_descriptor(line)
        };
        let cgroup = duties.cgroup.map(|_| take()).transpose()?.map(cgroup::Lock::from);
        let sockets = duties.sockets.iter().map(|_| Ok(take()?.into()));
        Ok(HostResources { cgroup, sockets: sockets.collect::<Result<_>>()? })
    }
}

/// Takes a descriptor from the janitor.
fn take_descriptor(mut line: &UnixStream) -> Result<OwnedFd> {
    let mut byte = [0];
    match line.recv_with_fd(&mut byte) {
        Ok((1, Some(fd))) => {
            sys::close_on_exec(&fd).context("prepare a descriptor")?;
            Ok(fd.into())
        }
        Ok((1, None)) => {
            let mut reason = String::new();
            line.read_to_string(&mut reason).context("read from the janitor")?;
            Err(anyhow!(reason))
        }
        Ok(_) => Err(anyhow!("the janitor (process mote-janitor) ended before the box's start")),
        Err(error) => {
            // The kernel drops a descriptor if the process cannot have another.
            let code = if error.errno() == libc::ENOBUFS { libc::EMFILE } else { error.errno() };
            Err(io::Error::from_raw_os_error(code)).context("take a descriptor from the janitor")
        }
    }
}

/// Serves mote until the line closes or mote ends; the line alone would not do, because a mote under an
/// attacker's control may have passed its end to another process. A byte with a descriptor adds a process
/// to kill at the end. A byte without one asks for a connection to passt: the answer is the connection, or
/// an errno in a byte.
fn serve(mut line: &UnixStream, mote: &OwnedFd, passt: Option<&Path>, processes: &mut Vec<File>) {
    loop {
        let both = [Interest::read(line), Interest::read(mote)];
        let Ok([_, false]) = sys::poll(both, None) else {
            // Takes the processes that mote has sent before its end.
            let _ = line.set_nonblocking(true);
            while processes.len() < MAX_PROCESSES
                && let Ok((1, Some(process))) = line.recv_with_fd(&mut [0])
            {
                processes.push(process);
            }
            return;
        };
        match line.recv_with_fd(&mut [0]) {
            Ok((1, Some(process))) if processes.len() < MAX_PROCESSES => {
                processes.push(process);
                continue;
            }
            Ok((1, None)) => {}
            // A process, but the janitor can have no more descriptors.
            Err(error) if error.errno() == libc::ENOBUFS => continue,
            _ => return,
        }
        let connected = passt.map_or(Err(ErrorKind::Unsupported.into()), passt::connect_now);
        let answered = match connected {
            Ok(socket) => line.send_with_fd(&[GIVEN][..], socket.as_raw_fd()).is_ok(),
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                line.write_all(&[errno as u8]).is_ok()
            }
        };
        if !answered {
            return;
        }
        thread::sleep(CONNECT_PAUSE);
    }
}

/// The line to the janitor, used to ask for connections to passt.
#[derive(Debug)]
pub struct PasstLine(UnixStream);

impl PasstLine {
    /// A new connection to the box's passt, if passt listens at this moment. Waits for the janitor, not
    /// for passt.
    ///
    /// # Errors
    /// Nobody listens, or the janitor does not answer in time.
    pub fn connect(&mut self) -> io::Result<UnixStream> {
        let mut byte = [0];
        // A late answer to an earlier request is dropped: its connection is old.
        while let Ok((1, _)) = self.0.recv_with_fd(&mut byte) {}
        self.0.write_all(&[0])?;
        let [ready] = sys::poll([Interest::read(&self.0)], Some(ANSWER_LIMIT))?;
        if !ready {
            return Err(ErrorKind::TimedOut.into());
        }
        match self.0.recv_with_fd(&mut byte) {
            Ok((1, Some(socket))) => Ok(UnixStream::from(OwnedFd::from(socket))),
            Ok((1, None)) => Err(io::Error::from_raw_os_error(byte[0].into())),
            Ok(_) => Err(ErrorKind::BrokenPipe.into()),
            Err(error) => Err(io::Error::from_raw_os_error(error.errno())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// Never readable.
    fn never() -> File {
        sys::signal_file(&[]).expect("a file")
    }

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("mote-janitor-{name}-{}", std::process::id()))
    }

    #[test]
    fn passt_is_connected_to_again_and_again() {
        let path = scratch("passt");
        let listener = UnixListener::bind(&path).expect("bound");
        let duties = Duties { passt: Some(&path), ..Duties::default() };
        let (janitor, _) = Janitor::start(duties, &never()).expect("a janitor");
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
        let (janitor, _) = Janitor::start(Duties::default(), &never()).expect("a janitor");
        assert!(janitor.passt_line().expect("a line").connect().is_err());
    }
}
