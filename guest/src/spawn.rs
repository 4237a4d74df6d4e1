//! Starting a process: everything between `fork` and `execve`, with a report of the step that failed; and making a
//! fork of the agent another program of the agent's own.

#![allow(unsafe_code, reason = "fork, and what may be done before execve")]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use mote_agent::instance::Rlimit;

use crate::sys::{self, check, owned};

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

/// Starts a process in its own session and returns its pid once `execve` has succeeded.
///
/// # Errors
/// The step that failed and the kernel's reason. A process that was created has ended then; its status
/// is yet to be collected ([`crate::sys::reap`]).
pub fn spawn(spawn: &Spawn<'_>) -> Result<i32, SpawnError> {
    let at_fork = |error| SpawnError { step: Step::Fork, at: 0, error };
    let argv = pointers(spawn.argv);
    let envp = pointers(spawn.envp);
    let mut report = [0; 2];
    // SAFETY: `report` has room for the two descriptors.
    check(unsafe { libc::pipe2(report.as_mut_ptr(), libc::O_CLOEXEC) }).map_err(at_fork)?;
    let (report_in, report_out) = (owned(report[0]), owned(report[1]));

    // SAFETY: the agent has one thread, so the child is a whole copy of it; it only makes system
    // calls on data prepared above and leaves by execve or _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: this is the child; the vectors are NULL-terminated and outlive the call.
        let Failure { step, at } = unsafe { child(spawn, &argv, &envp) };
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let mut message = [0u8; 9];
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
    check(pid).map_err(at_fork)?;
    drop(report_out);

    let mut message = [0u8; 9];
    let read = io::Read::read(&mut File::from(report_in), &mut message).map_err(at_fork)?;
    if read == 0 {
        return Ok(pid);
    }
    let word = |range: std::ops::Range<usize>| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&message[range]);
        u32::from_ne_bytes(bytes)
    };
    Err(SpawnError {
        step: match message[0] {
            1 => Step::Workdir,
            2 => Step::Rlimit,
            3 => Step::User,
            4 => Step::Exec,
            5 => Step::Cgroup,
            6 => Step::Confine,
            _ => Step::Fork,
        },
        at: word(1..5) as usize,
        error: io::Error::from_raw_os_error(word(5..9) as i32),
    })
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

/// The child's half of [`spawn`]: returns only on failure, with errno set.
///
/// # Safety
/// To be called only in a forked child; `argv` and `envp` must be NULL-terminated.
unsafe fn child(
    spawn: &Spawn<'_>,
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
) -> Failure {
    let failed = |step, at| Failure { step, at };
    // SAFETY: system calls on descriptors and strings that the caller keeps alive; the sets and
    // limits passed by pointer live on this stack.
    unsafe {
        // Rust ignores SIGPIPE and child_signal blocks SIGCHLD; programs expect the defaults.
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
        if libc::setgroups(spawn.groups.len(), spawn.groups.as_ptr()) < 0
            || libc::setgid(spawn.gid) < 0
            || libc::setuid(spawn.uid) < 0
        {
            return failed(Step::User, 0);
        }
        if let Some((at, limit)) = processes
            && set(limit.resource, limit.soft, limit.hard) < 0
        {
            return failed(Step::Rlimit, at);
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
