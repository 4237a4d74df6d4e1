//! The virtio-fs back-end: one virtiofsd process per share, started and owned by mote. It is mote's own file, executed
//! again ([`server`]), or a program that the user has named (`named`).
//!
//! mote makes the listening socket and connects to it before virtiofsd exists, and hands it to virtiofsd
//! as an open descriptor. So mote is always the only client, and there is no socket file to wait for or
//! to leave behind.

mod named;
pub mod server;

use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mote_agent::instance::ROOT_TAG;
use vmm_sys_util::eventfd::EventFd;

use crate::confine::Isolation;
use crate::plan::Share;
use crate::sys::{self, Interest, stat};

/// How long all virtiofsd processes of a box may take together until they have answered, or a part of that.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How often that, as long as one of them or mote is at work: they share the host's CPUs, perhaps with a hundred boxes that
/// start at the same time.
const ANSWER_LIMITS_AT_WORK: u32 = 12;

/// How long mote's own may take to get ready while the guest runs.
const READY_LIMIT: Duration = ANSWER_LIMIT.saturating_mul(ANSWER_LIMITS_AT_WORK);

/// Least bytes of memory that each file costs a Linux guest (an inode of FUSE and a directory entry).
/// virtiofsd keeps every file open that the guest knows. The guest's memory limits how many those can be;
/// a malicious guest may claim more, and so virtiofsd's open files are limited to that number.
const INODE_LEN: u64 = 1024;
/// Bounds of virtiofsd's limit on open files, which depends on the guest's memory. The upper bound is
/// virtiofsd's own default.
const OPEN_FILES: RangeInclusive<u64> = 65_536..=1_000_000;

/// How many bytes of its latest error output are kept.
const LAST_WORDS: usize = 4096;

/// How long virtiofsd may take from its first sign of ending to its end.
const ENDING_LIMIT: Duration = Duration::from_millis(200);

/// How long a killed virtiofsd may take to vanish; one that is stuck in the kernel never will.
const REAP_LIMIT: Duration = Duration::from_secs(1);

/// What to serve, and how it is confined.
#[derive(Debug, Clone, Copy)]
struct Task<'a> {
    directory: &'a Path,
    read_only: bool,
    isolation: Isolation,
    /// Its limit on open files.
    open_files: u64,
}

/// A process that has been started.
struct Started {
    pid: u32,
    /// Its standard error.
    stderr: File,
    /// Readable when it has ended.
    ended: OwnedFd,
}

/// Starts mote's own, each with what is readable once it has been asked for something.
fn start_own(
    tasks: &[Task<'_>],
    listeners: &[BorrowedFd<'_>],
) -> Result<Vec<(Started, Option<EventFd>)>> {
    let guest_goes_first = !sys::process::has_several_cpus();
    let asked = tasks.iter().map(|_| {
        let asked = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        if !guest_goes_first {
            asked.write(1)?;
        }
        Ok(asked)
    });
    let asked = asked.collect::<io::Result<Vec<_>>>().context("make an eventfd")?;
    let namespaces = tasks.first().and_then(|task| task.isolation.user_namespace());
    let started = if tasks.len() > 1 && namespaces.is_some() {
        server::start_several(tasks, listeners, &asked)?
    } else {
        let each = tasks.iter().zip(listeners).zip(&asked);
        let each = each.map(|((task, listener), asked)| server::start(task, *listener, asked));
        each.collect::<Result<_>>()?
    };
    Ok(started.into_iter().zip(asked.into_iter().map(Some)).collect())
}

/// A running virtiofsd. It is killed when the thread that started it ends, and when this is dropped.
#[derive(Debug)]
pub struct Virtiofsd {
    pid: u32,
    ended: OwnedFd,
    /// A child of virtiofsd's, which serves the guest in its place: a named one's, as the first process of a pid
    /// namespace.
    server: Option<OwnedFd>,
    share: String,
    /// virtiofsd's standard error, non-blocking.
    stderr: File,
    /// The last bytes that it wrote there.
    said: Vec<u8>,
    /// Whether it has said, or shown, that it can serve.
    is_ready: bool,
    /// Readable when there is work for it, of one that gets ready only then.
    asked: Option<EventFd>,
    /// When it must be ready, if it is to be and has not been late.
    due: Option<Instant>,
}

impl Virtiofsd {
    /// Starts the daemons of a box's shares, mote's own or the program that is `named`, for a guest with this much memory.
    /// Returns each with its vhost-user connection, which it may not have accepted yet. Must be called while there is one
    /// thread.
    ///
    /// mote's own gets ready while the guest boots, where there are CPUs for both. Where there is one, the guest goes first,
    /// and the daemon gets ready when it is asked for something.
    ///
    /// # Errors
    /// The program cannot be started, or the host cannot confine it.
    pub fn start_all(
        named: Option<&Path>,
        shares: &[Share],
        isolation: Isolation,
        memory_bytes: u64,
    ) -> Result<Vec<(Virtiofsd, UnixStream)>> {
        let open_files = memory_bytes / INODE_LEN;
        let open_files = open_files.clamp(*OPEN_FILES.start(), *OPEN_FILES.end());
        let tasks = shares.iter().map(|share| Task {
            directory: &share.host_path,
            read_only: share.read_only,
            isolation,
            open_files,
        });
        let tasks: Vec<_> = tasks.collect();
        let sockets = shares.iter().map(|_| sys::socket::connected_listener());
        let sockets = sockets.collect::<io::Result<Vec<_>>>();
        let (listeners, connections): (Vec<_>, Vec<_>) =
            sockets.context("create the vhost-user sockets")?.into_iter().unzip();
        let listeners: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
        let started: Vec<(Started, Option<EventFd>)> = match named {
            None => start_own(&tasks, &listeners).context("start virtiofsd")?,
            Some(program) => {
                let each = tasks
                    .iter()
                    .zip(&listeners)
                    .map(|(task, listener)| Ok((named::start(program, task, *listener)?, None)));
                each.collect::<Result<_>>()?
            }
        };
        let daemons = started.into_iter().zip(shares).map(|((started, asked), share)| {
            let Started { pid, stderr, ended } = started;
            sys::set_nonblocking(&stderr).context("prepare virtiofsd's standard error")?;
            let (share, said, is_ready) = (describe(share), Vec::new(), false);
            Ok(Virtiofsd {
                pid,
                ended,
                server: None,
                share,
                stderr,
                said,
                is_ready,
                asked,
                due: None,
            })
        });
        let daemons = daemons.collect::<Result<Vec<_>>>()?;
        Ok(daemons.into_iter().zip(connections).collect())
    }

    /// Notes that a named one has answered, and looks for a child of its that serves the guest in its place. Must be called
    /// before the guest runs: the child exists, and cannot have been attacked yet.
    pub fn has_answered(&mut self) {
        self.is_ready = true;
        let pid = self.pid;
        // If the kernel has no such list, only virtiofsd itself can end its child.
        let children = || std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let first = |list: io::Result<String>| list.ok()?.split_whitespace().next()?.parse().ok();
        let Some(child) = first(children()) else { return };
        let Ok(server) = sys::process::process_file(child) else { return };
        // Still the same: so no other process has got the number meanwhile.
        if first(children()) == Some(child) {
            self.server = Some(server);
        }
    }

    /// All its processes. The janitor kills them if this process cannot.
    pub fn processes(&self) -> impl Iterator<Item = &OwnedFd> {
        self.server.iter().chain([&self.ended])
    }

    /// Kills it, and does not wait for its end. One that has ended is no error.
    pub fn kill(&self) {
        // The server too: under an attacker's control it may not end with its parent.
        self.processes().for_each(sys::process::kill_process);
    }

    /// The number of the process that was started.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What is readable once there is work for it, if it gets ready only then: what its guest's requests are announced by.
    pub fn asked(&self) -> Option<&EventFd> {
        self.asked.as_ref()
    }

    /// Has it get ready if it waits for work, although there is none: not every share is used, and what mote has told a
    /// virtiofsd is open for it meanwhile, which counts for all boxes of a user together (unix(7), `ETOOMANYREFS`).
    pub fn ask(&self) {
        if let Some(asked) = self.asked.as_ref().filter(|_| !self.is_ready) {
            // Fails only if it is readable anyway.
            let _ = asked.write(1);
        }
    }

    /// Notes that it has been asked for something, and has so much time to get ready.
    pub fn expect(&mut self) {
        self.due = Some(Instant::now() + READY_LIMIT);
    }

    /// When it must be ready, if it is not and has been asked to be.
    pub fn due(&self) -> Option<Instant> {
        self.due.filter(|_| !self.is_ready)
    }

    /// Whether it should have been ready. Says so once.
    pub fn is_late(&mut self, now: Instant) -> bool {
        self.due().is_some_and(|due| now >= due) && self.due.take().is_some()
    }

    /// A descriptor that is readable when virtiofsd has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// A descriptor that is readable when virtiofsd has written to its standard error. The caller must then
    /// call [`Virtiofsd::listen`]: a full pipe would stop virtiofsd.
    pub fn stderr(&self) -> BorrowedFd<'_> {
        self.stderr.as_fd()
    }

    /// Reads what virtiofsd has written to its standard error, at most as much as a pipe holds. `false`
    /// when no more will come.
    pub fn listen(&mut self) -> bool {
        let mut bytes = [0; LAST_WORDS];
        for _ in 0..16 {
            match self.stderr.read(&mut bytes) {
                Ok(0) => return false,
                Ok(read) => {
                    let said = &bytes[..read];
                    let words = said.strip_prefix(&[server::READY]).filter(|_| !self.is_ready);
                    self.is_ready |= words.is_some();
                    self.said.extend(words.unwrap_or(said));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
            let excess = self.said.len().saturating_sub(LAST_WORDS);
            self.said.drain(..excess);
        }
        true
    }

    /// Says how virtiofsd ended, with the last line of its error output. Must be called only when it has
    /// ended or does not answer: a running one is killed.
    pub fn describe_end(&mut self) -> String {
        // Its sockets close a moment before the process has ended.
        let _ = sys::poll([Interest::read(&self.ended)], Some(ENDING_LIMIT));
        let status = match sys::process::ended(self.pid) {
            Ok(Some(status)) => status.to_string(),
            _ => {
                sys::process::kill_process(&self.ended);
                let ended = sys::process::wait(self.pid);
                ended.map_or_else(|e| e.to_string(), |_| "it did not answer".into())
            }
        };
        // Without waiting for the end of the pipe: virtiofsd's child may still hold it.
        self.listen();
        let text = String::from_utf8_lossy(&self.said);
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        match last {
            Some(last) => format!("virtiofsd for {} ended ({status}): {}", self.share, last.trim()),
            None => format!("virtiofsd for {} ended ({status})", self.share),
        }
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        self.kill();
        // Waits for the processes, its child too, so that none is left as a zombie. First by the descriptor, which wakes
        // this at once: `reap` looks from time to time.
        let _ = sys::poll([Interest::read(&self.ended)], Some(REAP_LIMIT));
        sys::process::reap(self.pid, REAP_LIMIT);
    }
}

fn describe(share: &Share) -> String {
    if share.tag == ROOT_TAG {
        format!("the root file system ({})", share.host_path.display())
    } else {
        format!("share '{}' ({})", share.tag, share.host_path.display())
    }
}

/// Waits until something is ready, for as long as these processes may take to answer. Says what is.
fn wait_in_time<const N: usize>(
    interests: [Interest<'_>; N],
    pids: &[u32],
) -> io::Result<[bool; N]> {
    for _ in 1..ANSWER_LIMITS_AT_WORK {
        let ready = sys::poll(interests, Some(ANSWER_LIMIT))?;
        if ready.contains(&true) || !pids.iter().any(|pid| stat::is_at_work(*pid)) {
            return Ok(ready);
        }
    }
    sys::poll(interests, Some(ANSWER_LIMIT))
}

/// Runs `talk` on connections to back-ends that may hang, which are these processes. When they have taken too long, or `stop`
/// is readable, the connections are shut down, so that every wait on them fails. A time-out on the sockets
/// would not do: the vhost crate takes it for an interruption and goes on waiting.
///
/// # Errors
/// `talk` fails, or has taken too long, or mote was told to stop.
pub fn talk_in_time<T>(
    connections: Vec<UnixStream>,
    back_ends: &[u32],
    stop: &File,
    talk: impl FnOnce(Vec<UnixStream>) -> Result<T>,
) -> Result<T> {
    let clones = connections.iter().map(UnixStream::try_clone).collect::<io::Result<Vec<_>>>();
    let watched = clones.context("duplicate the vhost-user connections")?;
    let pids = [back_ends, &[std::process::id()]].concat();
    // `talking` is closed when `talk` has returned.
    let (talking, over) = UnixStream::pair().context("create a socket pair")?;
    thread::scope(|scope| {
        let limit = thread::Builder::new()
            .name("answer-limit".into())
            .spawn_scoped(scope, move || {
                let ends = [Interest::read(&over), Interest::read(stop)];
                let in_time = matches!(wait_in_time(ends, &pids), Ok([true, _]));
                if !in_time {
                    for connection in &watched {
                        // Fails only if the back-end has closed it already.
                        let _ = connection.shutdown(Shutdown::Both);
                    }
                }
                in_time
            })
            .context("start the thread that limits virtiofsd's time")?;
        let said = talk(connections)?;
        drop(talking);
        // `talk` may have succeeded just before the connections were shut down.
        ensure!(limit.join().unwrap_or(false), "virtiofsd took too long, or mote was told to stop");
        Ok(said)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn share() -> Share {
        Share { tag: "t".into(), host_path: "/".into(), read_only: true }
    }

    #[test]
    fn a_daemon_that_dies_at_start_is_quoted() {
        let dir = std::env::temp_dir().join(format!("mote-test-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("directory");
        let script = dir.join("virtiofsd");
        fs::write(&script, "#!/bin/sh\necho first >&2\necho 'cannot serve' >&2\nexit 3\n")
            .expect("script");
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("mode");
        let mut started = Virtiofsd::start_all(Some(&script), &[share()], Isolation::Off, 1 << 30)
            .expect("starts");
        let (mut daemon, mut connection) = started.pop().expect("one for each share");
        // Its end closes the listening socket, and with it the waiting connection.
        assert!(matches!(connection.read(&mut [0]), Ok(0) | Err(_)));
        sys::poll([Interest::read(&daemon.ended)], None).expect("ended");
        assert_eq!(
            daemon.describe_end(),
            "virtiofsd for share 't' (/) ended (exit status: 3): cannot serve"
        );
        fs::remove_file(&script).expect("removed");
        fs::remove_dir(&dir).expect("nothing else is left in the directory");
    }
}
