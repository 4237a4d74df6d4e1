//! Starting a process: everything between `fork` and `execve`, with a report of the step that failed; and making a
//! fork of the agent another program of the agent's own.

#![allow(unsafe_code, reason = "fork, and what may be done before execve")]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use mote_agent::instance::{Capabilities, Rlimit};

use crate::mount;
use crate::sys::{self, Interest, check, owned};

/// A process to start. All strings are ready for the kernel, so that the child allocates nothing.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// Files to try in order (a `PATH` search, or the one path that was named).
    pub candidates: &'a [CString],
    /// `argv`, program name first.
    pub argv: &'a [CString],
    /// `NAME=value` strings.
    pub envp: &'a [CString],
    /// Working directory.
    pub workdir: &'a CStr,
    /// Limits, set in order before privileges are dropped.
    pub rlimits: &'a [Rlimit],
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Ids of the supplementary groups.
    pub groups: &'a [u32],
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Whether these are a terminal, to become the process's controlling one.
    pub terminal: bool,
    /// `cgroup.procs` of the cgroup to join.
    pub cgroup: BorrowedFd<'a>,
    /// Whether this process is a fork of the agent ([`sys::fork`]), and so spared when memory runs out.
    pub spared: bool,
    /// Whether `execve` grants no privileges.
    pub no_new_privs: bool,
    /// Capabilities to drop from the bounding set.
    pub drop_capabilities: &'a [u32],
    /// System call filter; an empty one filters nothing.
    pub filter: &'a [libc::sock_filter],
    /// Its capabilities, if they are not those that the kernel gives to its user.
    pub capabilities: Option<Capabilities>,
    /// Mode bits that its files do not get, if it does not have the agent's.
    pub umask: Option<u32>,
    /// What it sees, if that is not what the agent does.
    pub view: Option<View<'a>>,
    /// Whether it waits for [`Held::release`] before it executes the file.
    pub hold: bool,
}

/// What a process that has mounts of its own does not see as the agent does.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Whether it is process 1, and sees none but its own.
    pub own_pids: bool,
    /// Paths that it finds empty.
    pub masked: &'a [String],
    /// Paths that it cannot change.
    pub read_only: &'a [String],
}

/// A process that was started.
#[derive(Debug)]
pub struct Spawned {
    /// Its id.
    pub pid: i32,
    /// If it waits.
    pub held: Option<Held>,
}

/// A process that is ready to execute its file, and waits. What it tells is only looked at, never taken, so that the agent
/// and its forks all see it.
#[derive(Debug)]
pub struct Held {
    start: OwnedFd,
    report: OwnedFd,
}

/// What has become of a process that was held.
#[derive(Debug)]
pub enum Release {
    /// It executes its file.
    Running,
    /// It waits.
    Waiting,
    /// It could not go on, and has ended.
    Failed(SpawnError),
}

impl Held {
    /// Lets it go on, and waits until it has.
    ///
    /// # Errors
    /// Those of write(2): it has ended.
    pub fn release(&self) -> io::Result<Release> {
        // SAFETY: pointer and length describe a literal.
        let written = unsafe { libc::write(self.start.as_raw_fd(), c"1".as_ptr().cast(), 1) };
        check(written as libc::c_int)?;
        sys::poll(&[self.interest()], None)?;
        Ok(self.state())
    }

    /// What has become of it.
    pub fn state(&self) -> Release {
        let mut message = [0; MESSAGE_LEN];
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: pointer and length describe `message`.
        let read = unsafe {
            libc::recv(self.report.as_raw_fd(), message.as_mut_ptr().cast(), message.len(), flags)
        };
        match read {
            0 => Release::Running,
            read if read < 0 => Release::Waiting,
            _ => Release::Failed(SpawnError::from_message(message)),
        }
    }

    /// Ready once it does not wait any more.
    pub fn interest(&self) -> Interest<'_> {
        Interest::read(self.report.as_fd())
    }

    /// What a fork that calls [`Held::release`] has to keep.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.start.as_fd(), self.report.as_fd()]
    }
}

/// The step of a start that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Creating the process or its standard streams.
    Fork = 0,
    /// Entering the working directory.
    Workdir = 1,
    /// Setting the limit with the index `at`.
    Rlimit = 2,
    /// Switching user, group or supplementary groups.
    User = 3,
    /// `execve`; `at` is the index of the candidate that decided.
    Exec = 4,
    /// Joining the cgroup.
    Cgroup = 5,
    /// Giving up privileges.
    Confine = 6,
    /// Making a view of its own.
    View = 7,
}

/// Why a process could not be started.
#[derive(Debug)]
pub struct SpawnError {
    /// Where it failed.
    pub step: Step,
    /// Index into the list that the step works through.
    pub at: usize,
    /// The kernel's reason.
    pub error: io::Error,
}

/// Step, index and errno of a failure, or only [`READY`].
const MESSAGE_LEN: usize = 9;
/// The message of a process that waits.
const READY: &[u8] = &[0xff];

impl SpawnError {
    fn from_message(message: [u8; MESSAGE_LEN]) -> Self {
        let word = |range: std::ops::Range<usize>| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&message[range]);
            u32::from_ne_bytes(bytes)
        };
        SpawnError {
            step: match message[0] {
                1 => Step::Workdir,
                2 => Step::Rlimit,
                3 => Step::User,
                4 => Step::Exec,
                5 => Step::Cgroup,
                6 => Step::Confine,
                7 => Step::View,
                _ => Step::Fork,
            },
            at: word(1..5) as usize,
            error: io::Error::from_raw_os_error(word(5..9) as i32),
        }
    }
}

/// Starts a process in its own session and returns once `execve` has succeeded, or once it is ready for that if it is
/// held.
///
/// # Errors
/// The step that failed and the kernel's reason. A process that was created has ended then; its status
/// is yet to be collected ([`crate::sys::reap`]).
pub fn spawn(spawn: &Spawn<'_>) -> Result<Spawned, SpawnError> {
    let at_fork = |error| SpawnError { step: Step::Fork, at: 0, error };
    let argv = pointers(spawn.argv);
    let envp = pointers(spawn.envp);
    let (report_in, report_out) = pair(libc::SOCK_SEQPACKET).map_err(at_fork)?;
    let gate = spawn.hold.then(|| pair(libc::SOCK_STREAM)).transpose().map_err(at_fork)?;
    let has_own_pids = spawn.view.is_some_and(|view| view.own_pids);
    let own_pids =
        has_own_pids.then(sys::namespaces::OwnPids::enter).transpose().map_err(at_fork)?;

    // SAFETY: the agent has one thread, so the child is a whole copy of it; it leaves by execve or _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // Else it would never see that the agent's end is closed.
        drop(report_in);
        let waits_on = gate.map(|(opens, waits_on)| {
            drop(opens);
            waits_on
        });
        let gate = waits_on.as_ref().map(|waits_on| (waits_on.as_fd(), report_out.as_fd()));
        // SAFETY: this is the child; the vectors are NULL-terminated and outlive the call.
        let Failure { step, at } = unsafe { child(spawn, gate, &argv, &envp) };
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let mut message = [0u8; MESSAGE_LEN];
        message[0] = step as u8;
        message[1..5].copy_from_slice(&(at as u32).to_ne_bytes());
        message[5..9].copy_from_slice(&errno.to_ne_bytes());
        // SAFETY: pointer and length describe `message`; _exit ends the child without running the
        // parent's destructors.
        unsafe {
            libc::write(report_out.as_raw_fd(), message.as_ptr().cast(), message.len());
            libc::_exit(127);
        }
    }
    drop(own_pids);
    check(pid).map_err(at_fork)?;
    drop(report_out);

    let mut message = [0u8; MESSAGE_LEN];
    let mut report = File::from(report_in);
    let read = io::Read::read(&mut report, &mut message).map_err(at_fork)?;
    match (gate, read) {
        (None, 0) => Ok(Spawned { pid, held: None }),
        (Some((start, _)), 1) => {
            Ok(Spawned { pid, held: Some(Held { start, report: report.into() }) })
        }
        // Killed.
        (Some(_), 0) => Err(at_fork(io::ErrorKind::Interrupted.into())),
        _ => Err(SpawnError::from_message(message)),
    }
}

/// A pair of sockets, closed on exec.
fn pair(kind: libc::c_int) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    check(unsafe {
        libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
    })?;
    Ok((owned(fds[0]), owned(fds[1])))
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

/// Where the child's half of a start failed; errno says why.
struct Failure {
    step: Step,
    /// Index into the list that the step works through.
    at: usize,
}

/// The child's half of [`spawn`]: returns only on failure, with errno set. With a `gate` it says on the second descriptor
/// that it is ready, and goes on when there is something to read from the first.
///
/// # Safety
/// To be called only in a forked child; `argv` and `envp` must be NULL-terminated.
unsafe fn child(
    spawn: &Spawn<'_>,
    gate: Option<(BorrowedFd<'_>, BorrowedFd<'_>)>,
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
) -> Failure {
    let failed = |step, at| Failure { step, at };
    // SAFETY: system calls on descriptors and strings that the caller keeps alive; the sets and
    // limits passed by pointer live on this stack.
    unsafe {
        // sys::start ignores SIGPIPE and child_signal blocks SIGCHLD; programs expect the defaults.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        libc::setsid();
        // From outside, so that a box at its pids limit can still be entered (cgroup-v2: a limit
        // stops forks, not moves).
        if libc::write(spawn.cgroup.as_raw_fd(), c"0".as_ptr().cast(), 1) < 0 {
            return failed(Step::Cgroup, 0);
        }
        // While it is root: then the program cannot take it back, unless it is root, too.
        if spawn.spared {
            sys::no_longer_spare();
        }
        for (target, source) in spawn.stdio.iter().enumerate() {
            if libc::dup2(source.as_raw_fd(), target as libc::c_int) < 0 {
                return failed(Step::Fork, 0);
            }
        }
        if spawn.terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return failed(Step::Fork, 0);
        }
        if let Some(View { own_pids, masked, read_only }) = spawn.view
            && let Err(error) = mount::own_view(own_pids, masked, read_only)
        {
            *libc::__errno_location() = error.raw_os_error().unwrap_or(libc::EIO);
            return failed(Step::View, 0);
        }
        if libc::chdir(spawn.workdir.as_ptr()) < 0 {
            return failed(Step::Workdir, 0);
        }
        let set = |resource, soft, hard| {
            libc::setrlimit(resource, &libc::rlimit { rlim_cur: soft, rlim_max: hard })
        };
        // The process limit comes after the switch of user: at the switch, the kernel compares it
        // with what the user runs already, and would refuse execve.
        let mut processes = None;
        for (at, limit) in spawn.rlimits.iter().enumerate() {
            let (soft, hard) = if limit.resource == libc::RLIMIT_NPROC {
                processes = Some((at, limit));
                (libc::RLIM_INFINITY, libc::RLIM_INFINITY)
            } else {
                (limit.soft, limit.hard)
            };
            if set(limit.resource, soft, hard) < 0 {
                return failed(Step::Rlimit, at);
            }
        }
        // Before the switch of user, which ends the right to do this.
        for capability in spawn.drop_capabilities {
            if libc::prctl(libc::PR_CAPBSET_DROP, *capability as libc::c_ulong, 0, 0, 0) < 0 {
                return failed(Step::Confine, 0);
            }
        }
        let program = libc::sock_fprog {
            len: spawn.filter.len() as libc::c_ushort,
            filter: spawn.filter.as_ptr().cast_mut(),
        };
        let (filtering, yes) = (libc::SECCOMP_MODE_FILTER as libc::c_ulong, 1 as libc::c_ulong);
        if !spawn.filter.is_empty()
            && libc::prctl(libc::PR_SET_SECCOMP, filtering, &raw const program) < 0
            || spawn.no_new_privs && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, yes, 0, 0, 0) < 0
        {
            return failed(Step::Confine, 0);
        }
        if let Some(sets) = &spawn.capabilities
            && !sys::capabilities::keep_through_setuid(sets)
        {
            return failed(Step::Confine, 0);
        }
        if libc::setgroups(spawn.groups.len(), spawn.groups.as_ptr()) < 0
            || libc::setgid(spawn.gid) < 0
            || libc::setuid(spawn.uid) < 0
        {
            return failed(Step::User, 0);
        }
        if let Some(sets) = &spawn.capabilities
            && !sys::capabilities::take(sets)
        {
            return failed(Step::Confine, 0);
        }
        if let Some(umask) = spawn.umask {
            libc::umask(umask);
        }
        if let Some((at, limit)) = processes
            && set(limit.resource, limit.soft, limit.hard) < 0
        {
            return failed(Step::Rlimit, at);
        }
        if let Some((waits_on, ready)) = gate {
            let is_executable = |file: &CString| {
                let (mode, flags) = (libc::X_OK, libc::AT_EACCESS);
                let mut status: libc::stat = zeroed();
                libc::faccessat(libc::AT_FDCWD, file.as_ptr(), mode, flags) == 0
                    && libc::stat(file.as_ptr(), &mut status) == 0
                    && status.st_mode & libc::S_IFMT == libc::S_IFREG
            };
            // Where there is nothing to execute, that is told now, by what execve says of it.
            if spawn.candidates.iter().any(is_executable) {
                let mut byte = 0u8;
                let (ready, waits_on) = (ready.as_raw_fd(), waits_on.as_raw_fd());
                libc::write(ready, READY.as_ptr().cast(), READY.len());
                if libc::read(waits_on, (&raw mut byte).cast(), 1) != 1 {
                    // The agent is gone.
                    libc::_exit(127);
                }
            }
        }
        // execvp's rule without its /bin/sh fallback: skip what is not there, remember what may
        // not be run, stop at anything else.
        let mut refused = None;
        for (at, file) in spawn.candidates.iter().enumerate() {
            libc::execve(file.as_ptr(), argv.as_ptr(), envp.as_ptr());
            match *libc::__errno_location() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => refused = Some(at),
                _ => return failed(Step::Exec, at),
            }
        }
        if let Some(at) = refused {
            *libc::__errno_location() = libc::EACCES;
            return failed(Step::Exec, at);
        }
        failed(Step::Exec, 0)
    }
}

/// Makes this process, which is a fork of the agent ([`sys::fork`]), the program in an open file. Its standard input is `input`; it has the
/// `inherited` descriptors under the numbers that go with them, and otherwise only the standard streams. Returns only
/// if that fails.
pub fn execute(
    program: &impl AsRawFd,
    arguments: &[CString],
    input: BorrowedFd<'_>,
    inherited: &[(RawFd, BorrowedFd<'_>)],
) -> io::Error {
    /// Above all numbers that descriptors are given to.
    const ASIDE: libc::c_int = 64;
    let placed = || -> io::Result<OwnedFd> {
        // SAFETY: plain system calls on open descriptors. First all are put aside, so that none takes another's
        // number; the copies end with the execve.
        unsafe {
            let aside = |fd: RawFd| check(libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, ASIDE)).map(owned);
            let program = aside(program.as_raw_fd())?;
            let input = aside(input.as_raw_fd())?;
            let inherited = inherited.iter().map(|(to, fd)| Ok((*to, aside(fd.as_raw_fd())?)));
            let inherited = inherited.collect::<io::Result<Vec<_>>>()?;
            for (to, fd) in [(0, input)].into_iter().chain(inherited) {
                check(libc::dup2(fd.as_raw_fd(), to))?;
            }
            Ok(program)
        }
    };
    let program = match placed() {
        Ok(program) => program,
        Err(error) => return error,
    };
    let mut argv: Vec<*const libc::c_char> = arguments.iter().map(|a| a.as_ptr()).collect();
    argv.push(ptr::null());
    let envp: [*const libc::c_char; 1] = [ptr::null()];
    // SAFETY: the strings and the lists, which end with a null, outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

/// Ends this process, which is a fork of the agent ([`sys::fork`]), with exit status 1.
pub fn fail() -> ! {
    // SAFETY: it never returns, so nothing of the parent's is dropped.
    unsafe { libc::_exit(1) }
}
