//! Thin, safe wrappers over the system calls the agent needs; the agent's only unsafe code.
//!
//! Each wrapper does one call (or one inseparable group) and returns `io::Error` unchanged: callers
//! add what was being done and to what.

#![allow(unsafe_code, reason = "the one module of the agent that talks to libc")]

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use mote_agent::instance::Rlimit;

/// Host end of every vsock connection (`VMADDR_CID_HOST`).
const HOST_CID: u32 = 2;

fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: every caller passes a descriptor that a system call has just returned, so it is open
    // and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A string for the kernel; an interior NUL is reported as invalid input.
pub fn c_string(text: impl AsRef<OsStr>) -> io::Result<CString> {
    CString::new(text.as_ref().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// `mount(2)`.
pub fn mount(
    source: &str,
    target: &str,
    fstype: &str,
    flags: libc::c_ulong,
    data: &str,
) -> io::Result<()> {
    let (source, target) = (c_string(source)?, c_string(target)?);
    let (fstype, data) = (c_string(fstype)?, c_string(data)?);
    // SAFETY: all pointers are NUL-terminated strings that outlive the call.
    check(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), fstype.as_ptr(), flags, data.as_ptr().cast())
    })?;
    Ok(())
}

/// `chroot(2)`.
pub fn chroot(path: &str) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    check(unsafe { libc::chroot(path.as_ptr()) })?;
    Ok(())
}

/// `sethostname(2)`.
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe `name`.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })?;
    Ok(())
}

/// Monotonic clock in nanoseconds.
pub fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// Wall clock in nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    clock_ns(libc::CLOCK_REALTIME)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    // SAFETY: an all-zero timespec is valid, and the kernel only writes to it.
    let now = unsafe {
        let mut now: libc::timespec = zeroed();
        libc::clock_gettime(clock, &mut now);
        now
    };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Sets the wall clock, in nanoseconds since 1970.
pub fn set_realtime(ns: u64) -> io::Result<()> {
    let time = libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: `time` outlives the call.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) })?;
    Ok(())
}

/// Brings a network interface up (`SIOCSIFFLAGS`).
pub fn interface_up(name: &str) -> io::Result<()> {
    // SAFETY: plain socket call.
    let socket = owned(check(unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)
    })?);
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()).take(libc::IFNAMSIZ - 1) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })?;
    Ok(())
}

/// Starts a connection to a vsock port of the host. The socket is non-blocking: it becomes writable
/// when the host has answered, and [`socket_error`] then tells how.
pub fn vsock_connect(port: u32) -> io::Result<File> {
    // SAFETY: plain socket call.
    let socket = owned(check(unsafe {
        libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        )
    })?);
    // SAFETY: an all-zero sockaddr_vm is valid.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = HOST_CID;
    address.svm_port = port;
    // SAFETY: pointer and length describe `address`.
    let ret = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    match check(ret) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(File::from(socket)),
    }
}

/// Takes the pending error of a socket (`SO_ERROR`).
pub fn socket_error(socket: &impl AsRawFd) -> io::Result<()> {
    let mut code: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `code` and `len` describe a buffer of the size SO_ERROR writes.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            (&raw mut code).cast(),
            &mut len,
        )
    })?;
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
}

/// Tells the peer of a stream socket that nothing more will be sent.
pub fn shutdown_write(socket: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) })?;
    Ok(())
}

/// A pipe, closed on exec: (read end, non-blocking; write end, blocking).
pub fn pipe() -> io::Result<(File, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) })?;
    let (read, write) = (owned(fds[0]), owned(fds[1]));
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fcntl(read.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })?;
    Ok((File::from(read), write))
}

/// Blocks `SIGCHLD` and returns a non-blocking descriptor that is readable while one is pending.
pub fn child_signal() -> io::Result<File> {
    // SAFETY: an all-zero sigset is a valid argument of sigemptyset, which initialises it.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(File::from(owned(fd)))
    }
}

/// What to wait for on one descriptor, and what came of it.
#[derive(Debug, Clone, Copy)]
pub struct Interest<'a> {
    fd: BorrowedFd<'a>,
    events: libc::c_short,
}

impl<'a> Interest<'a> {
    /// Readable, or at its end.
    pub fn read(fd: BorrowedFd<'a>) -> Self {
        Interest { fd, events: libc::POLLIN }
    }

    /// Writable, or refused.
    pub fn write(fd: BorrowedFd<'a>) -> Self {
        Interest { fd, events: libc::POLLOUT }
    }
}

/// Waits until one of the descriptors is ready (`true`) or the time is over (`None`: no limit).
pub fn poll(interests: &[Interest<'_>], timeout_ms: Option<i32>) -> io::Result<bool> {
    let mut fds: Vec<libc::pollfd> = interests
        .iter()
        .map(|interest| libc::pollfd {
            fd: interest.fd.as_raw_fd(),
            events: interest.events,
            revents: 0,
        })
        .collect();
    // SAFETY: pointer and length describe `fds`.
    let ret = unsafe {
        libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms.unwrap_or(-1))
    };
    match check(ret) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        other => other.map(|ready| ready > 0),
    }
}

/// A child that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Reaped {
    /// Its process id.
    pub pid: i32,
    /// Its exit status, or the signal that killed it.
    pub status: Result<u8, u8>,
}

/// What [`reap`] found.
#[derive(Debug, Clone, Copy)]
pub enum Reap {
    /// This child has ended.
    Ended(Reaped),
    /// Children are left, none has ended.
    NoneYet,
    /// No children are left.
    NoChildren,
}

/// Collects one ended child without waiting.
pub fn reap() -> Reap {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
        0 => Reap::NoneYet,
        pid if pid > 0 => Reap::Ended(Reaped {
            pid,
            status: if libc::WIFSIGNALED(status) {
                Err(libc::WTERMSIG(status) as u8)
            } else {
                Ok(libc::WEXITSTATUS(status) as u8)
            },
        }),
        _ => Reap::NoChildren,
    }
}

/// Signals every process but this one (`kill(-1)`). Having nobody to signal is no error.
pub fn signal_all(signal: i32) {
    // SAFETY: plain system call.
    unsafe { libc::kill(-1, signal) };
}

/// Writes all dirty data back.
pub fn sync() {
    // SAFETY: plain system call.
    unsafe { libc::sync() };
}

/// Ends the VM (`reboot=k`: the kernel pulses the reset line, which the VMM takes as the end).
pub fn power_off() -> ! {
    loop {
        // SAFETY: plain system call; PID 1 has CAP_SYS_BOOT.
        unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_RESTART) };
    }
}

/// Makes standard streams belong to the user that will use them, so that it can reopen
/// `/dev/stdout`.
pub fn change_owner(fd: &impl AsRawFd, uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fchown(fd.as_raw_fd(), uid, gid) })?;
    Ok(())
}

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
    /// User, group and supplementary groups.
    pub uid: u32,
    /// See `uid`.
    pub gid: u32,
    /// See `uid`.
    pub groups: &'a [u32],
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
}

/// The step of a start that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Creating the process or its standard streams.
    Fork = 0,
    /// Entering the working directory.
    Workdir = 1,
    /// Setting this many-th limit (`at`).
    Rlimit = 2,
    /// Switching user, group or supplementary groups.
    User = 3,
    /// `execve`; `at` is the index of the candidate that decided.
    Exec = 4,
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
        let (step, at) = unsafe { child(spawn, &argv, &envp) };
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
            _ => Step::Fork,
        },
        at: word(1..5) as usize,
        error: io::Error::from_raw_os_error(word(5..9) as i32),
    })
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

/// The child's half of [`spawn`]: returns only on failure, with errno set.
///
/// # Safety
/// To be called only in a forked child; `argv` and `envp` must be NULL-terminated.
unsafe fn child(
    spawn: &Spawn<'_>,
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
) -> (Step, usize) {
    // SAFETY: system calls on descriptors and strings that the caller keeps alive; the sets and
    // limits passed by pointer live on this stack.
    unsafe {
        // Rust ignores SIGPIPE and child_signal blocks SIGCHLD; programs expect the defaults.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        libc::setsid();
        for (target, source) in spawn.stdio.iter().enumerate() {
            if libc::dup2(source.as_raw_fd(), target as libc::c_int) < 0 {
                return (Step::Fork, 0);
            }
        }
        if libc::chdir(spawn.workdir.as_ptr()) < 0 {
            return (Step::Workdir, 0);
        }
        for (at, limit) in spawn.rlimits.iter().enumerate() {
            let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
            if libc::setrlimit(limit.resource, &value) < 0 {
                return (Step::Rlimit, at);
            }
        }
        if libc::setgroups(spawn.groups.len(), spawn.groups.as_ptr()) < 0
            || libc::setgid(spawn.gid) < 0
            || libc::setuid(spawn.uid) < 0
        {
            return (Step::User, 0);
        }
        // execvp's rule without its /bin/sh fallback: skip what is not there, remember what may
        // not be run, stop at anything else.
        let mut refused = None;
        for (at, file) in spawn.candidates.iter().enumerate() {
            libc::execve(file.as_ptr(), argv.as_ptr(), envp.as_ptr());
            match *libc::__errno_location() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => refused = Some(at),
                _ => return (Step::Exec, at),
            }
        }
        if let Some(at) = refused {
            *libc::__errno_location() = libc::EACCES;
            return (Step::Exec, at);
        }
        (Step::Exec, 0)
    }
}
