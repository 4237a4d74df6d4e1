//! The janitor: the one process of a box that is not confined. It makes the box's cgroup and sockets on
//! the host and removes them, has the template made that a start has missed, and connects to passt again while the box
//! runs. It handles no data of a guest or a client.
//!
//! ```text
//! mote      start ┐                 ┌ confined, runs the guest ── line closed, reap ── end
//! janitor         └ make resources ─┘ connect to passt when asked …… sockets, virtiofsd …… cgroup
//! ```
//!
//! There are two ways between them. Over the line, a pair of sockets, mote gives the janitor the processes
//! of its virtiofsd and the VM, says whether there is no template, and closes its direction for good before it is confined; the janitor gives mote the
//! sockets and connections. On the pipe mote asks for those. Descriptors do not pass through a pipe, and
//! the janitor never waits for mote to read: closing a descriptor of an attacker's choice could take
//! forever, and so could an answer.
//!
//! Whatever ends mote, even SIGKILL, closes the pipe, and the janitor sees the process's end, too. It then
//! kills the box's virtiofsd processes (one under an attacker's control may not end with mote), and
//! removes what it has made. A mote under an attacker's control can make the janitor connect to the box's
//! passt, and remove the sockets early. It cannot make the janitor remove the cgroup, which limits mote:
//! the janitor waits until mote has ended.
//!
//! mote waits for the sockets' removal, and ends. The janitor is there for some milliseconds more: it holds the VM,
//! so that whoever waits for mote does not wait for the kernel to take the VM apart.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::cgroup::{self, Cgroup, Remains};
use crate::host::passt_line::{self, PasstLine};
use crate::host::publisher::{self, Publisher};
use crate::host::sockets::{self, SocketFile};
use crate::plan::{HostSocket, Plan, Templates};
use crate::sys::{self, Interest};
use crate::template::{Shape, maker};

/// How long the janitor sleeps after each connection to passt: the box's limit on CPU time does not hold
/// for it, so a mote under an attacker's control must not keep it busy. mote asks less often.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// How long the janitor may take to unlink a few files.
const CLEANING_LIMIT: Duration = Duration::from_secs(1);

/// The byte that is sent with a descriptor: to mote; to the janitor with a process to kill.
const GIVEN: u8 = 0;
/// The byte that is sent with a descriptor to hold.
const HELD: u8 = 2;
/// The byte that is sent alone: there is no template.
const MAKE_TEMPLATE: u8 = 3;
/// The byte before the text that says why the resources could not be made.
const NO_RESOURCES: u8 = 1;

/// What the janitor does for a box.
#[derive(Debug, Clone, Copy, Default)]
pub struct Duties<'a> {
    /// The cgroup to create.
    pub cgroup: Option<&'a Cgroup>,
    /// The sockets to listen on.
    pub sockets: &'a [HostSocket],
    /// The socket for datagrams to bind.
    pub switch: Option<&'a Path>,
    /// The passt to connect to when asked.
    pub passt: Option<&'a Path>,
    /// Whether to listen on TCP ports when asked.
    pub publishes: bool,
    /// The template to have made when asked, and the directory for it.
    pub template: Option<(Shape, &'a Path)>,
}

impl<'a> From<&'a Plan> for Duties<'a> {
    fn from(plan: &'a Plan) -> Duties<'a> {
        Duties {
            cgroup: plan.cgroup.as_ref(),
            sockets: &plan.sockets,
            switch: plan.networking.switch().map(|switch| switch.socket.as_path()),
            passt: plan.networking.passt_socket(),
            publishes: plan.instance.published.listeners,
            template: match &plan.templates {
                Templates::In(directory) => Some((Shape::of(plan), directory)),
                Templates::Off(_) => None,
            },
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
    /// The socket for the frames of other boxes.
    pub switch: Option<UnixDatagram>,
}

/// What the janitor must remove at the end of a box. Dropping it does that.
#[derive(Debug, Default)]
struct Leftovers {
    sockets: Vec<SocketFile>,
    /// The box's virtiofsd processes.
    processes: Vec<File>,
    /// What is closed once mote has ended.
    held: Vec<File>,
    cgroup: Option<Remains>,
}

impl Leftovers {
    /// Removes everything but the cgroup.
    fn remove_most(&mut self) {
        self.processes.drain(..).for_each(|process| sys::process::kill_process(&process));
        self.sockets.drain(..).for_each(SocketFile::remove);
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        self.remove_most();
        // KVM may have a thread in the cgroup as long as there is the VM.
        self.held.clear();
        if let Some(cgroup) = &mut self.cgroup {
            cgroup.remove();
        }
    }
}

/// A box's janitor, a child of this process.
#[derive(Debug)]
pub struct Janitor {
    line: UnixStream,
    requests: PipeWriter,
}

/// The janitor's side of what connects it with mote.
#[derive(Debug)]
struct Mote {
    line: UnixStream,
    requests: PipeReader,
    /// Readable when mote has ended.
    process: OwnedFd,
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
        let (read, requests) = io::pipe().context("create the janitor's pipe")?;
        let process =
            sys::process::process_file(std::process::id()).context("watch mote for its janitor")?;
        let mote = Mote { line: theirs, requests: read, process };
        let keep = [mote.line.as_raw_fd(), mote.requests.as_raw_fd(), mote.process.as_raw_fd()];
        sys::process::start_detached(c"mote-janitor", &keep, || work(&duties, &mote))
            .context("start the janitor")?;
        drop(mote);
        let janitor = Janitor { line, requests };
        match HostResources::take(&duties, &janitor.line, stop) {
            Ok(resources) => {
                janitor.line.set_nonblocking(true).context("prepare the janitor's line")?;
                Ok((janitor, resources))
            }
            Err(error) => {
                // It has said why and is ending, unless it waits for a cgroup's lock, which may take long.
                let says = sys::poll([Interest::read(&janitor.line)], Some(Duration::ZERO));
                if duties.cgroup.is_none() || matches!(says, Ok([true])) {
                    janitor.dismiss();
                }
                Err(error)
            }
        }
    }

    /// Makes the janitor kill these processes at the end.
    ///
    /// # Errors
    /// The janitor has ended, or [`Janitor::end_set_up`] was called.
    pub fn kill_at_end<'a>(&self, processes: impl IntoIterator<Item = &'a OwnedFd>) -> Result<()> {
        for process in processes {
            self.hand(GIVEN, process).context("tell the janitor of a process")?;
        }
        Ok(())
    }

    /// Makes the janitor hold this, too, until this process has ended: what the kernel does when it is closed for
    /// the last time then takes nobody's time who waits for this process.
    ///
    /// # Errors
    /// As for [`Janitor::kill_at_end`].
    pub fn hold(&self, descriptor: &impl AsRawFd) -> Result<()> {
        self.hand(HELD, descriptor).context("give the janitor a descriptor to hold")
    }

    /// Makes the janitor have a template made, by a process that is nobody's then: mote is in the box's cgroup, whose limits
    /// and whose end are not the maker's.
    ///
    /// # Errors
    /// As for [`Janitor::kill_at_end`].
    pub fn make_template(&self) -> Result<()> {
        (&self.line)
            .write_all(&[MAKE_TEMPLATE])
            .context("tell the janitor that there is no template")
    }

    fn hand(&self, what: u8, descriptor: &impl AsRawFd) -> io::Result<()> {
        let sent = self.line.send_with_fd(&[what][..], descriptor.as_raw_fd());
        sent.map(drop).map_err(io::Error::from)
    }

    /// Makes it impossible, from now on, to send the janitor a descriptor: what it has been sent, it gets.
    /// Must be called before the guest runs.
    ///
    /// # Errors
    /// Those of shutdown(2).
    pub fn end_set_up(&self) -> Result<()> {
        self.line.shutdown(Shutdown::Write).context("close the way for descriptors to the janitor")
    }

    /// A handle for asking the janitor for connections to passt.
    ///
    /// # Errors
    /// The host has no descriptor for it.
    pub fn passt_line(&self) -> Result<PasstLine> {
        let answers = self.line.try_clone().context("duplicate the janitor's line")?;
        let requests = self.requests.try_clone().context("duplicate the janitor's pipe")?;
        Ok(PasstLine { requests, answers })
    }

    /// What publishes the ports on which the box listens.
    ///
    /// # Errors
    /// The host has no descriptor for it.
    pub fn publisher(&self) -> Result<Publisher> {
        let PasstLine { requests, answers } = self.passt_line()?;
        Ok(Publisher::new(requests, answers))
    }

    /// Makes the janitor clean up, and waits until it has, but for what waits for the end of this process.
    /// Every [`PasstLine`] must be dropped before.
    pub fn dismiss(self) {
        // Of a box that could not be set up, it still waits for descriptors. Fails only if it has ended.
        let _ = self.end_set_up();
        drop(self.requests);
        // It closes the line when it has. Late answers may be in it.
        let deadline = Instant::now() + CLEANING_LIMIT;
        let mut line = &self.line;
        while let Ok([true]) = sys::poll(
            [Interest::read(line)],
            Some(deadline.saturating_duration_since(Instant::now())),
        ) {
            if !matches!(line.read(&mut [0; 64]), Ok(1..)) {
                break;
            }
        }
    }
}

/// All that the janitor's process does.
fn work(duties: &Duties<'_>, mote: &Mote) {
    let mut leftovers = Leftovers::default();
    match HostResources::make(duties, &mote.line, &mut leftovers) {
        Ok(resources) => {
            match resources.give(&mote.line).context("hand a descriptor to mote") {
                Ok(()) => serve(mote, duties, &mut leftovers),
                Err(error) => refuse(&mote.line, &error),
            }
            // At once: clients take an existing socket for a running box (contract §2.8).
            leftovers.remove_most();
            // mote waits for that.
            let _ = mote.line.shutdown(Shutdown::Both);
            let _ = sys::poll([Interest::read(&mote.process)], None);
        }
        Err(error) => {
            drop(leftovers);
            refuse(&mote.line, &error);
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
        let switch = duties
            .switch
            .map(sockets::bind_datagrams)
            .transpose()
            .context("network.bridge_socket_dir")?;
        let switch = switch.map(|(socket, file)| {
            leftovers.sockets.push(file);
            socket
        });
        Ok(HostResources { cgroup, sockets, switch })
    }

    /// Passes the resources on to mote, and closes them here.
    fn give(self, line: &UnixStream) -> io::Result<()> {
        let cgroup = self.cgroup.map(OwnedFd::from);
        let sockets = self.sockets.into_iter().map(OwnedFd::from);
        let switch = self.switch.map(OwnedFd::from);
        for fd in cgroup.into_iter().chain(sockets).chain(switch) {
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
        let sockets = sockets.collect::<Result<_>>()?;
        let switch = duties.switch.map(|_| take()).transpose()?.map(UnixDatagram::from);
        Ok(HostResources { cgroup, sockets, switch })
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

/// Serves mote until it closes the pipe or ends; the pipe alone would not do, because a mote under an
/// attacker's control may have passed its end to another process.
fn serve(mote: &Mote, duties: &Duties<'_>, leftovers: &mut Leftovers) {
    // From here on nothing waits for mote, but for a limited time.
    if mote.line.set_nonblocking(true).is_err() {
        return;
    }
    take_descriptors(mote, duties, leftovers);
    // Any number of requests that wait at once are one.
    let mut bytes = [0; 3 * publisher::REQUEST_LEN];
    loop {
        let both = [Interest::read(&mote.requests), Interest::read(&mote.process)];
        let Ok([true, false]) = sys::poll(both, None) else { return };
        let Ok(len @ 1..) = (&mote.requests).read(&mut bytes) else { return };
        // In a process of its own. The last one to close a connection closes the descriptors that a passt
        // under an attacker's control may have sent over it; that may take long, but not at a process's end.
        sys::process::succeeds_in_child(|| {
            if duties.publishes {
                publisher::answer(&mote.line, &bytes[..len])
            } else {
                passt_line::answer(&mote.line, duties.passt)
            }
        });
        thread::sleep(CONNECT_PAUSE);
    }
}

/// Takes what mote sends, a byte each, most with a descriptor, until it closes that direction or ends.
fn take_descriptors(mote: &Mote, duties: &Duties<'_>, leftovers: &mut Leftovers) {
    let mut what = [0];
    loop {
        match mote.line.recv_with_fd(&mut what) {
            Ok((1, Some(held))) if what == [HELD] => leftovers.held.push(held),
            Ok((1, Some(process))) => leftovers.processes.push(process),
            Ok((1, None)) if what == [MAKE_TEMPLATE] => {
                if let Some((shape, directory)) = &duties.template {
                    // Without it, the next start finds none, either.
                    let _ = maker::start(shape, directory);
                }
            }
            // A descriptor, but the janitor can have no more descriptors.
            Err(error) if error.errno() == libc::ENOBUFS => {}
            Err(error) if error.errno() == libc::EAGAIN => {
                let both = [Interest::read(&mote.line), Interest::read(&mote.process)];
                let Ok([true, _]) = sys::poll(both, None) else { return };
            }
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::os::unix::process::ExitStatusExt;
    use std::path::PathBuf;
    use std::process::Command;
    use std::sync::mpsc;

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
        janitor.end_set_up().expect("closed");
        let mut line = janitor.passt_line().expect("a line");
        // The janitor may have to wait for a CPU.
        let mut connect = || loop {
            match line.connect() {
                Err(error) if error.kind() == ErrorKind::TimedOut => {}
                answer => break answer,
            }
        };
        for text in ["first", "second"] {
            let mut socket = connect().expect("connected");
            socket.write_all(text.as_bytes()).expect("written");
            drop(socket);
            let mut read = String::new();
            listener.accept().expect("a client").0.read_to_string(&mut read).expect("text");
            assert_eq!(read, text);
        }
        drop(listener);
        let error = connect().expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(connect().expect_err("no file").kind(), ErrorKind::NotFound);
    }

    #[test]
    fn processes_are_taken_before_the_guest_runs_and_no_descriptor_after_that() {
        let (janitor, _) = Janitor::start(Duties::default(), &never()).expect("a janitor");
        let mut sleeping = Command::new("sleep").arg("1000").spawn().expect("a process");
        let process = sys::process::process_file(sleeping.id()).expect("it runs");
        janitor.kill_at_end([&process]).expect("before");
        janitor.end_set_up().expect("closed");
        let error = janitor.kill_at_end([&process]).expect_err("after");
        assert!(format!("{error:#}").contains("Broken pipe"), "{error:#}");
        janitor.dismiss();
        assert_eq!(sleeping.wait().expect("its end").signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn a_janitor_that_is_dismissed_before_the_set_up_has_ended_cleans_up() {
        let path = scratch("dismissed");
        let sockets = [HostSocket { path: path.clone(), guest_port: None, fallback_port: None }];
        let duties = Duties { sockets: &sockets, ..Duties::default() };
        let (janitor, _) = Janitor::start(duties, &never()).expect("a janitor");
        assert!(path.exists());
        janitor.dismiss();
        assert!(!path.exists());
    }

    #[test]
    fn a_mote_that_reads_no_answers_does_not_hold_the_janitor() {
        let (mut ours, line) = UnixStream::pair().expect("a pair");
        let (read, mut requests) = io::pipe().expect("a pipe");
        let process = sys::process::process_file(std::process::id()).expect("a process");
        let mote = Mote { line, requests: read, process };
        mote.line.set_nonblocking(true).expect("set");
        while (&mote.line).write(&[0; 4096]).is_ok() {}
        mote.line.set_nonblocking(false).expect("set");
        ours.shutdown(Shutdown::Write).expect("closed");
        let (served, over) = mpsc::channel();
        thread::spawn(move || {
            serve(&mote, &Duties::default(), &mut Leftovers::default());
            served.send(()).expect("somebody waits");
        });
        requests.write_all(&[0]).expect("a request");
        drop(requests);
        over.recv_timeout(Duration::from_secs(30)).expect("it has ended");
        // Nothing was answered: nothing else is in the line.
        let mut answers = Vec::new();
        ours.read_to_end(&mut answers).expect("the end");
        assert_eq!(answers.len() % 4096, 0);
    }

    #[test]
    fn a_box_without_passt_has_nothing_to_connect_to() {
        let (janitor, _) = Janitor::start(Duties::default(), &never()).expect("a janitor");
        janitor.end_set_up().expect("closed");
        assert!(janitor.passt_line().expect("a line").connect().is_err());
    }
}
