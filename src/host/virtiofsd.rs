//! The virtio-fs back-end: one virtiofsd process per share, started and owned by mote. The program is in mote's own
//! file, and is run from a memory file.
//!
//! mote makes the listening socket and connects to it before virtiofsd exists, and hands it to virtiofsd
//! as an open descriptor. So mote is always the only client, and there is no socket file to wait for or
//! to leave behind.

use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope, path_beneath_rules,
};
use mote_agent::instance::ROOT_TAG;

use crate::confine::Isolation;
use crate::plan::{Image, Share};
use crate::sys::process::MemoryProgram;
use crate::sys::{self, Interest, confine};

/// How long all virtiofsd processes of a box may take together until they have answered.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Least bytes of memory that each file costs a Linux guest (an inode of FUSE and a directory entry).
/// virtiofsd keeps every file open that the guest knows. The guest's memory limits how many those can be;
/// a malicious guest may claim more, and so virtiofsd's open files are limited to that number.
const INODE_LEN: u64 = 1024;
/// Bounds of virtiofsd's limit on open files, which depends on the guest's memory. The upper bound is
/// virtiofsd's own default.
const OPEN_FILES: RangeInclusive<u64> = 65_536..=1_000_000;

/// Extended attributes, under these names of the host's: `trusted.*`, which only root in the guest may use and
/// which overlayfs keeps its own in, is `user.virtiofs.trusted.*`, which any owner of a file may write on the host, and
/// nobody in the guest may name. So virtiofsd needs no CAP_SYS_ADMIN, and the host believes nothing that it
/// reads there. The host's own `trusted.*` are not the guest's. The rest is as it is.
const ATTRIBUTES: &str = "--xattrmap=:map:trusted.:user.virtiofs.:";

/// How many bytes of its latest error output are kept.
const LAST_WORDS: usize = 4096;

/// How long virtiofsd may take from its first sign of ending to its end.
const ENDING_LIMIT: Duration = Duration::from_millis(200);

/// How long a killed virtiofsd may take to vanish; one that is stuck in the kernel never will.
const REAP_LIMIT: Duration = Duration::from_secs(1);

/// The program, ready to be started for any number of shares.
#[derive(Debug)]
pub enum Program {
    /// mote's own.
    Memory(MemoryProgram),
    /// One that the user has named.
    File(PathBuf),
}

impl Program {
    /// Makes what is built in a program that can be started.
    ///
    /// # Errors
    /// The host permits no such program, or has no memory for it.
    pub fn new(image: &Image) -> Result<Program> {
        if let Image::File(path) = image {
            return Ok(Program::File(path.clone()));
        }
        let memory = MemoryProgram::new(c"virtiofsd", image.open()?).context(
            "put virtiofsd into a memory file (if the sysctl vm.memfd_noexec is 2, set it to 1, or name a virtiofsd in MOTE_VIRTIOFSD)",
        )?;
        Ok(Program::Memory(memory))
    }

    /// A path by which this process and its children can execute it.
    pub fn path(&self) -> PathBuf {
        match self {
            Program::Memory(memory) => memory.path(),
            Program::File(path) => path.clone(),
        }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Program::Memory(_) => f.write_str("built in"),
            Program::File(path) => path.display().fmt(f),
        }
    }
}

/// A running virtiofsd. It is killed when the thread that started it ends, and when this is dropped.
#[derive(Debug)]
pub struct Virtiofsd {
    child: Child,
    ended: OwnedFd,
    /// virtiofsd's child, which serves the guest as the first process of a pid namespace. A virtiofsd
    /// without such a namespace has no child.
    server: Option<OwnedFd>,
    share: String,
    /// virtiofsd's standard error, non-blocking.
    stderr: Option<ChildStderr>,
    /// The last bytes that it wrote there.
    said: Vec<u8>,
}

impl Virtiofsd {
    /// Starts the daemon for a share, for a guest with this much memory. Returns it with the vhost-user
    /// connection, which it may not have accepted yet.
    ///
    /// # Errors
    /// The program cannot be started, or the host cannot confine it.
    pub fn spawn(
        program: &Program,
        share: &Share,
        isolation: Isolation,
        memory_bytes: u64,
    ) -> Result<(Virtiofsd, UnixStream)> {
        let (listener, connection) =
            sys::socket::connected_listener().context("create the vhost-user socket")?;
        let path = program.path();
        let mut command = Command::new(&path);
        command
            .arg0("virtiofsd")
            .arg(format!("--fd={}", sys::process::INHERITED_FD))
            .arg("--shared-dir")
            .arg(&share.host_path)
            .args(["--cache=auto", "--inode-file-handles=never", "--log-level=error"])
            .args(["--xattr", ATTRIBUTES])
            .args(share.read_only.then_some("--readonly"))
            .args(own_sandbox(isolation))
            .arg(format!("--modcaps={}", needless_capabilities(share.read_only)))
            // virtiofsd keeps the limit that `prepare` below has set.
            .arg("--rlimit-nofile=0")
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut restrict = restriction(program, share, isolation)?;
        let open_files = memory_bytes / INODE_LEN;
        let open_files = open_files.clamp(*OPEN_FILES.start(), *OPEN_FILES.end());
        let prepare = move || confine::limit_open_files_anew(open_files).and_then(|()| restrict());
        sys::process::helper(&mut command, listener.as_fd(), prepare);
        let mut child = command.spawn().with_context(|| format!("start virtiofsd ({program})"))?;
        let ended = sys::process::process_file(child.id()).context("watch virtiofsd")?;
        let stderr = child.stderr.take();
        if let Some(pipe) = &stderr {
            sys::set_nonblocking(pipe).context("prepare virtiofsd's standard error")?;
        }
        let share = describe(share);
        Ok((Virtiofsd { child, ended, server: None, share, stderr, said: Vec::new() }, connection))
    }

    /// Looks for the process that serves the guest. Must be called when it has answered, before the guest
    /// runs: then the process exists, and cannot have been attacked yet.
    pub fn find_server(&mut self) {
        let pid = self.child.id();
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

    /// A descriptor that is readable when virtiofsd has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// A descriptor that is readable when virtiofsd has written to its standard error. The caller must then
    /// call [`Virtiofsd::listen`]: a full pipe would stop virtiofsd.
    pub fn stderr(&self) -> Option<BorrowedFd<'_>> {
        self.stderr.as_ref().map(AsFd::as_fd)
    }

    /// Reads what virtiofsd has written to its standard error, at most as much as a pipe holds. `false`
    /// when no more will come.
    pub fn listen(&mut self) -> bool {
        let Some(pipe) = &mut self.stderr else { return false };
        let mut bytes = [0; LAST_WORDS];
        for _ in 0..16 {
            match pipe.read(&mut bytes) {
                Ok(0) => return false,
                Ok(read) => self.said.extend(&bytes[..read]),
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
        let status = match self.child.try_wait() {
            Ok(Some(status)) => status.to_string(),
            _ => {
                sys::process::kill_process(&self.ended);
                self.child.wait().map_or_else(|e| e.to_string(), |_| "it did not answer".into())
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
        // Killing a process that has ended is no error. The server is killed too: under an attacker's
        // control it may not end with its parent.
        self.processes().for_each(sys::process::kill_process);
        // Waits for the processes, its child too, so that none is left as a zombie.
        sys::process::reap(self.child.id(), REAP_LIMIT);
    }
}

/// Capabilities that virtiofsd keeps as root and does not need.
fn needless_capabilities(read_only: bool) -> &'static str {
    if read_only { "-chown:-fowner:-fsetid:-setgid:-setuid:-mknod:-setfcap" } else { "-mknod" }
}

/// What the child does before it executes virtiofsd, so that a virtiofsd under an attacker's control
/// can do no more than its share allows. This is in addition to virtiofsd's own sandbox, which it enters
/// later. A read-only share becomes a read-only mount, or a tree that Landlock allows only to read.
fn restriction(
    program: &Program,
    share: &Share,
    isolation: Isolation,
) -> Result<Box<dyn FnMut() -> io::Result<()> + Send + Sync>> {
    if isolation == Isolation::Landlock {
        let rules = landlock_rules(program, share).with_context(|| {
            "restrict virtiofsd by Landlock (it takes Linux 5.19; or allow this user namespaces)"
        })?;
        let mut rules = Some(rules);
        return Ok(Box::new(move || {
            let enforced = rules.take().map(RulesetCreated::restrict_self);
            enforced.transpose().map(drop).map_err(io::Error::other)
        }));
    }
    let directory = CString::new(share.host_path.as_os_str().as_bytes())
        .with_context(|| format!("share {}", share.host_path.display()))?;
    let read_only = share.read_only;
    Ok(Box::new(move || {
        let Some(user) = isolation.user_namespace() else { return Ok(()) };
        confine::unshare(user | libc::CLONE_NEWNS)?;
        confine::detach_mounts()?;
        match confine::restrict_mount(&directory, read_only) {
            // Linux before 5.12 has no mount_setattr; virtiofsd itself refuses writes in any case.
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
            done => done,
        }
    }))
}

/// The option for the sandbox that virtiofsd enters itself; `None` for its default, namespaces.
fn own_sandbox(isolation: Isolation) -> Option<&'static str> {
    match isolation {
        Isolation::Namespaces | Isolation::UserNamespaces | Isolation::Off => None,
        _ if confine::may_chroot() => Some("--sandbox=chroot"),
        _ => Some("--sandbox=none"),
    }
}

/// Where a virtiofsd of the user's finds the libraries that it is linked with.
const LIBRARIES: [&str; 7] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/local/lib",
    "/etc/ld.so.cache",
    "/nix/store",
    "/gnu/store",
];

/// Landlock rules that allow virtiofsd its share, and what it needs to start and to open a file again
/// (/proc/self/fd); no network, and no signals to other processes.
fn landlock_rules(program: &Program, share: &Share) -> Result<RulesetCreated> {
    let abi = ABI::V6;
    let all = AccessFs::from_all(abi);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let execute = read | AccessFs::Execute;
    let mut rules = Ruleset::default()
        .handle_access(all)?
        // Without `Refer` the guest could not move files from one directory to another.
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Refer)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()?;
    // A memory file is below no directory, and needs no rule.
    if let Program::File(path) = program {
        let needed = LIBRARIES.map(Path::new).into_iter().chain([path.as_path()]);
        rules =
            rules.add_rules(path_beneath_rules(needed.filter(|path| path.exists()), execute))?;
    }
    rules = rules.add_rules(path_beneath_rules(["/proc"], read))?;
    let devices = AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev;
    let access = if share.read_only { read } else { all & !AccessFs::Execute & !devices };
    Ok(rules.add_rules(path_beneath_rules([&share.host_path], access))?)
}

fn describe(share: &Share) -> String {
    if share.tag == ROOT_TAG {
        format!("the root file system ({})", share.host_path.display())
    } else {
        format!("share '{}' ({})", share.tag, share.host_path.display())
    }
}

/// Runs `talk` on connections to back-ends that may hang. After `ANSWER_LIMIT`, or when `stop` is
/// readable, the connections are shut down, so that every wait on them fails. A time-out on the sockets
/// would not do: the vhost crate takes it for an interruption and goes on waiting.
///
/// # Errors
/// `talk` fails, or has taken too long, or mote was told to stop.
pub fn talk_in_time<T>(
    connections: Vec<UnixStream>,
    stop: &File,
    talk: impl FnOnce(Vec<UnixStream>) -> Result<T>,
) -> Result<T> {
    let clones = connections.iter().map(UnixStream::try_clone).collect::<io::Result<Vec<_>>>();
    let watched = clones.context("duplicate the vhost-user connections")?;
    // `talking` is closed when `talk` has returned.
    let (talking, over) = UnixStream::pair().context("create a socket pair")?;
    thread::scope(|scope| {
        let limit = thread::Builder::new()
            .name("answer-limit".into())
            .spawn_scoped(scope, move || {
                let ends = [Interest::read(&over), Interest::read(stop)];
                let in_time = matches!(sys::poll(ends, Some(ANSWER_LIMIT)), Ok([true, _]));
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
        let (mut daemon, mut connection) =
            Virtiofsd::spawn(&Program::File(script.clone()), &share(), Isolation::Off, 1 << 30)
                .expect("starts");
        // Its end closes the listening socket, and with it the waiting connection.
        assert!(matches!(connection.read(&mut [0]), Ok(0) | Err(_)));
        daemon.child.wait().expect("waits");
        assert_eq!(
            daemon.describe_end(),
            "virtiofsd for share 't' (/) ended (exit status: 3): cannot serve"
        );
        fs::remove_file(&script).expect("removed");
        fs::remove_dir(&dir).expect("nothing else is left in the directory");
    }
}
