//! Thin, safe wrappers over the system calls the agent needs, those of networking in [`net`], some about
//! files in [`files`], capabilities in [`capabilities`], namespaces in [`namespaces`] and `bpf(2)` in [`bpf`]; with [`crate::spawn`] the agent's only unsafe code.
//!
//! Each wrapper does one call (or one inseparable group).
//!
//! # Errors
//! All return the call's `io::Error` unchanged: callers add what was being done and to what.

#![allow(unsafe_code, reason = "the module that talks to libc")]

pub mod bpf;
pub mod capabilities;
pub mod files;
pub mod mailbox;
pub mod namespaces;
pub mod net;
pub mod ring_buffer;

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::time::{Duration, Instant};

pub(crate) fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

pub(crate) fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: every caller passes a descriptor that a system call has just returned, so it is open
    // and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// What Rust's runtime does first in a program, as far as it matters here: writing to a pipe that nobody reads is an error and
/// not the agent's end. The runtime also reads and parses /proc/self/maps, to say where a stack has overflown: each start would
/// wait for that twice.
pub fn start() {
    // SAFETY: plain system call, with no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
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

/// Takes a file system out of the tree; what is open on it stays usable (`MNT_DETACH`).
pub fn unmount(target: &str) -> io::Result<()> {
    let target = c_string(target)?;
    // SAFETY: `target` is a NUL-terminated string that outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) })?;
    Ok(())
}

/// Opens a file below an open directory for writing.
pub fn open_below(directory: &impl AsRawFd, name: &str) -> io::Result<File> {
    let name = c_string(name)?;
    let flags = libc::O_WRONLY | libc::O_CLOEXEC;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    Ok(File::from(owned(check(unsafe {
        libc::openat(directory.as_raw_fd(), name.as_ptr(), flags)
    })?)))
}

/// Creates a directory, mode 0755, below an open one.
pub fn create_directory_below(directory: &impl AsRawFd, name: &str) -> io::Result<()> {
    let name = c_string(name)?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    check(unsafe { libc::mkdirat(directory.as_raw_fd(), name.as_ptr(), 0o755) })?;
    Ok(())
}

/// Removes an empty directory below an open one.
pub fn remove_directory_below(directory: &impl AsRawFd, name: &str) -> io::Result<()> {
    let name = c_string(name)?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    check(unsafe { libc::unlinkat(directory.as_raw_fd(), name.as_ptr(), libc::AT_REMOVEDIR) })?;
    Ok(())
}

/// `chroot(2)`.
pub fn chroot(path: impl AsRef<OsStr>) -> io::Result<()> {
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

/// `setdomainname(2)`.
pub fn set_domainname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe `name`.
    check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) })?;
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

/// How much longer to wait for a deadline.
pub fn until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
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

/// Mounts an open file or directory, whatever tree it is in, over the one at `target`, which is no
/// symbolic link (open_tree(2)).
pub fn mount_file_over(file: &impl AsRawFd, target: &Path) -> io::Result<()> {
    // include/uapi/linux/mount.h
    const OPEN_TREE_CLONE: libc::c_int = 1;
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC | libc::AT_EMPTY_PATH;
    let (fd, empty) = (file.as_raw_fd(), c"".as_ptr());
    // SAFETY: system call on an open descriptor and a NUL-terminated string.
    let copy = unsafe { libc::syscall(libc::SYS_open_tree, fd, empty, flags) };
    move_mount(&owned(check(copy as libc::c_int)?), target)
}

/// Moves the mount whose root is open, with all that is mounted below it, to `target` (move_mount(2)).
pub fn move_mount(mount: &impl AsRawFd, target: &Path) -> io::Result<()> {
    // include/uapi/linux/mount.h
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_int = 4;
    let target = c_string(target)?;
    let (from, to, flags) = (mount.as_raw_fd(), libc::AT_FDCWD, MOVE_MOUNT_F_EMPTY_PATH);
    // SAFETY: system call on an open descriptor, and on NUL-terminated strings that outlive it.
    check(unsafe {
        let (empty, target) = (c"".as_ptr(), target.as_ptr());
        libc::syscall(libc::SYS_move_mount, from, empty, to, target, flags) as libc::c_int
    })?;
    Ok(())
}

/// A pipe, closed on exec: (read end, non-blocking; write end, blocking).
pub fn pipe() -> io::Result<(File, OwnedFd)> {
    let (read, write) = pipe_ends()?;
    set_nonblocking(&read)?;
    Ok((File::from(read), write))
}

fn pipe_ends() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok((owned(fds[0]), owned(fds[1])))
}

/// A pipe, closed on exec: (read end, blocking; write end, non-blocking).
pub fn input_pipe() -> io::Result<(OwnedFd, File)> {
    let (read, write) = pipe_ends()?;
    set_nonblocking(&write)?;
    Ok((read, File::from(write)))
}

/// Makes reads and writes return instead of waiting.
pub fn set_nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })?;
    Ok(())
}

/// How many bytes wait in a pipe (`FIONREAD`).
pub fn bytes_waiting(pipe: &impl AsRawFd) -> usize {
    let mut waiting: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int, which `waiting` is.
    unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
    waiting.max(0) as usize
}

/// A new terminal: (master, non-blocking; slave).
pub fn open_terminal() -> io::Result<(File, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: system calls on a NUL-terminated literal, on a descriptor that lives to the end of the
    // block, and with an int to read for TIOCSPTLCK.
    unsafe {
        let master = owned(check(libc::open(c"/dev/ptmx".as_ptr(), flags | libc::O_NONBLOCK))?);
        let unlocked: libc::c_int = 0;
        check(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked))?;
        // By descriptor, whatever the box has done to /dev/pts.
        let slave = owned(check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))?);
        Ok((File::from(master), slave))
    }
}

/// Sets a terminal's size in characters (`TIOCSWINSZ`); its foreground process gets `SIGWINCH`.
pub fn resize_terminal(terminal: &impl AsRawFd, cols: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, which `size` is.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    Ok(())
}

/// Raises the limit on open files: every connection is one.
pub fn raise_open_file_limit(limit: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: `limit` outlives the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })?;
    Ok(())
}

/// `oom_score_adj` of the agent's forks (proc_pid_oom_score_adj(5)): the last to be killed. With -1000 they
/// never were, and a kernel that has nobody left to kill panics. PID 1 it never kills.
const SPARED: &CStr = c"-999";

/// That of every program of the box, unless it changes it.
const NOT_SPARED: &CStr = c"0";

/// Sets this process's `oom_score_adj`. In a box that hides /proc, it stays as it is. Makes only
/// async-signal-safe calls.
fn set_oom_score(score: &CStr) {
    // SAFETY: system calls on NUL-terminated strings that outlive them, and on a descriptor of this
    // function's own; after a failed open they are refused.
    unsafe {
        let file =
            libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        libc::write(file, score.as_ptr().cast(), score.count_bytes());
        libc::close(file);
    }
}

/// Makes this process, which may be a [`fork`], as good as any program of the box to kill for want of
/// memory, for good unless it is root. Makes only async-signal-safe calls.
pub fn no_longer_spare() {
    set_oom_score(NOT_SPARED);
}

/// Continues as two processes; the new one runs `work` and ends. In it only the descriptors of
/// `keep` and the standard streams are open, all signals are blocked, its `comm` is `name`, and it is the
/// last that the kernel kills for want of memory. Returns the new process's id.
pub fn fork(keep: &[BorrowedFd<'_>], name: &CStr, work: impl FnOnce()) -> io::Result<i32> {
    // SAFETY: the agent has one thread, so the child is a whole copy of it and may do anything. It
    // never returns: nothing of the parent's is dropped in it, and descriptors of the parent's that
    // are closed in it are not used in it.
    unsafe {
        let pid = check(libc::fork())?;
        if pid != 0 {
            return Ok(pid);
        }
        let mut all: libc::sigset_t = zeroed();
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &all, ptr::null_mut());
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        let mut kept: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).collect();
        kept.sort_unstable();
        let mut first = 3;
        for fd in kept {
            if fd > first {
                libc::syscall(libc::SYS_close_range, first, fd - 1, 0);
            }
            first = first.max(fd + 1);
        }
        libc::syscall(libc::SYS_close_range, first, u32::MAX, 0);
        set_oom_score(SPARED);
        work();
        libc::_exit(0)
    }
}

/// A descriptor that becomes readable when the process ends.
pub fn process_file(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    Ok(owned(check(fd as libc::c_int)?))
}

/// How a process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// It called `exit` with this status.
    Exited(u8),
    /// This signal killed it.
    Signaled(u8),
}

/// Waits for the end of a child.
pub fn wait_for(pid: i32) -> io::Result<ExitStatus> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    check(unsafe { libc::waitpid(pid, &mut status, 0) })?;
    Ok(exit_status(status))
}

fn exit_status(status: libc::c_int) -> ExitStatus {
    if libc::WIFSIGNALED(status) {
        ExitStatus::Signaled(libc::WTERMSIG(status) as u8)
    } else {
        ExitStatus::Exited(libc::WEXITSTATUS(status) as u8)
    }
}

/// Signals a process. One that is gone is no error.
pub fn signal(pid: i32, signal: i32) {
    // SAFETY: plain system call.
    unsafe { libc::kill(pid, signal) };
}

/// Signals the process group that a process leads. One that is gone is no error.
pub fn signal_group(leader: i32, signal: i32) {
    // SAFETY: plain system call.
    unsafe { libc::kill(-leader, signal) };
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

/// What to wait for on one descriptor.
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

    /// The file's content has changed since the last time (proc_sysctl.c's poll).
    pub fn news(fd: BorrowedFd<'a>) -> Self {
        Interest { fd, events: libc::POLLPRI }
    }

    /// Writable, or refused.
    pub fn write(fd: BorrowedFd<'a>) -> Self {
        Interest { fd, events: libc::POLLOUT }
    }
}

/// Waits until one of the descriptors is ready or the time is over (`None`: no limit). Says which
/// are ready, in the order of `interests`.
pub fn poll(interests: &[Interest<'_>], limit: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut fds: Vec<libc::pollfd> = interests
        .iter()
        .map(|interest| libc::pollfd {
            fd: interest.fd.as_raw_fd(),
            events: interest.events,
            revents: 0,
        })
        .collect();
    // Rounded up: waking early would only mean waking again.
    let timeout_ms = limit.map_or(-1, |limit| {
        i32::try_from(limit.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
    });
    // SAFETY: pointer and length describe `fds`.
    let ret = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
    match check(ret) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(fds.iter().map(|fd| fd.revents != 0).collect()),
    }
}

/// A child that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Reaped {
    /// Its process id.
    pub pid: i32,
    /// How it has ended.
    pub status: ExitStatus,
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
        pid if pid > 0 => Reap::Ended(Reaped { pid, status: exit_status(status) }),
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

/// Makes a pipe or terminal belong to a user.
pub fn change_owner(fd: &impl AsRawFd, uid: u32) -> io::Result<()> {
    const SAME_GROUP: libc::gid_t = libc::gid_t::MAX;
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fchown(fd.as_raw_fd(), uid, SAME_GROUP) })?;
    Ok(())
}
