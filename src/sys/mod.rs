//! Thin, safe wrappers over the libc calls that no dependency covers. Together with
//! [`crate::memory`] this is all the unsafe code of mote.

#![allow(unsafe_code, reason = "the module that talks to libc")]

use std::ffi::{CStr, CString};
use std::fs::{File, TryLockError};
use std::io::{self, Read};
use std::mem::{MaybeUninit, size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

pub mod arguments;
pub mod capabilities;
pub mod confine;
pub mod container;
pub mod directory;
pub mod fatal;
pub mod file_part;
pub mod holes;
pub mod mounts;
pub mod process;
pub mod routes;
pub mod runtime;
pub mod socket;
pub mod stat;
pub mod tee;
pub mod terminal;
pub mod vcpu;

fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: every caller passes a descriptor that a system call has just returned, so it is open
    // and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// An anonymous memory file of a fixed size. It is sealed against growing and shrinking, so that no
/// process that shares the file can take pages away from the others.
///
/// # Errors
/// Those of memfd_create(2), ftruncate(2) and fcntl(2).
pub fn sealed_memory_file(len: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a NUL-terminated literal.
    let file =
        File::from(owned(check(unsafe { libc::memfd_create(c"mote-guest-ram".as_ptr(), flags) })?));
    file.set_len(len)?;
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

/// A memory file of a fixed size on a tmpfs of its own that is mounted nowhere and uses huge pages,
/// whatever the host's setting for memfds. Needs CAP_SYS_ADMIN, and cannot be sealed.
///
/// # Errors
/// Those of fsopen(2) and what follows it; EPERM without the capability.
pub fn huge_memory_file(len: u64) -> io::Result<File> {
    // include/uapi/linux/mount.h
    const FSOPEN_CLOEXEC: libc::c_int = 1;
    const FSCONFIG_SET_STRING: libc::c_int = 1;
    const FSCONFIG_CMD_CREATE: libc::c_int = 6;
    const FSMOUNT_CLOEXEC: libc::c_int = 1;
    const NOSUID_NODEV_NOEXEC: libc::c_int = 2 | 4 | 8;
    let size = CString::new(len.to_string())?;
    // SAFETY: system calls on descriptors that live to the end of the block, and on NUL-terminated
    // strings that outlive the calls; null is what the commands without a value take.
    unsafe {
        let fs = libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC);
        let fs = owned(check(fs as libc::c_int)?);
        let config =
            |command: libc::c_int, key: *const libc::c_char, value: *const libc::c_char| {
                check(libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), command, key, value, 0)
                    as libc::c_int)
            };
        config(FSCONFIG_SET_STRING, c"huge".as_ptr(), c"always".as_ptr())?;
        config(FSCONFIG_SET_STRING, c"size".as_ptr(), size.as_ptr())?;
        config(FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
        let mount =
            libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, NOSUID_NODEV_NOEXEC);
        let mount = owned(check(mount as libc::c_int)?);
        let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
        let file = libc::openat(mount.as_raw_fd(), c".".as_ptr(), flags, 0o600);
        let file = File::from(owned(check(file)?));
        file.set_len(len)?;
        Ok(file)
    }
}

/// Whether a path exists below a root directory; symbolic links do not lead out of it. A path that
/// cannot be examined counts as existing.
pub fn exists_in_root(root: &Path, path: &str) -> bool {
    let Ok(root) = File::open(root) else { return true };
    let Ok(path) = CString::new(path) else { return true };
    // SAFETY: an all-zero open_how is valid; the strings and the structure outlive the call.
    let fd = unsafe {
        let mut how: libc::open_how = zeroed();
        how.flags = (libc::O_PATH | libc::O_CLOEXEC) as u64;
        how.resolve = libc::RESOLVE_IN_ROOT;
        let size = size_of::<libc::open_how>();
        libc::syscall(libc::SYS_openat2, root.as_raw_fd(), path.as_ptr(), &raw const how, size)
    };
    match check(fd as libc::c_int) {
        Ok(fd) => {
            drop(owned(fd));
            true
        }
        Err(error) => !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)),
    }
}

/// Which symbolic links on the way to a file are followed; any other is an error (ELOOP).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// All.
    Any,
    /// Those of directories, but not the file's own.
    OfDirectories,
    /// None.
    None,
}

/// What becomes of what a file holds when it is opened for appending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// They stay.
    Kept,
    /// They go.
    Dropped,
}

/// The mode of a file that mote makes.
const MODE: libc::mode_t = 0o600;

/// Opens a file for appending: creates it, mode 0600, or opens the one that is there. Neither opening nor
/// writing waits; a FIFO that nobody reads is an error (ENXIO).
///
/// # Errors
/// Those of open(2), or of openat2(2) if no link is to be followed.
pub fn create(path: &Path, links: Links, contents: Contents) -> io::Result<File> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let emptied = if contents == Contents::Dropped { libc::O_TRUNC } else { 0 };
    let access = libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT | emptied;
    let flags = access | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the string outlives the calls.
    let fd = unsafe {
        match links {
            Links::Any => libc::open(path.as_ptr(), flags, MODE),
            Links::OfDirectories => libc::open(path.as_ptr(), flags | libc::O_NOFOLLOW, MODE),
            Links::None => {
                return openat2(libc::AT_FDCWD, &path, flags, MODE, libc::RESOLVE_NO_SYMLINKS);
            }
        }
    };
    Ok(File::from(owned(check(fd)?)))
}

/// Finds out whether this user may make files in a directory.
///
/// # Errors
/// Those of access(2), EROFS among them.
pub fn may_write(directory: &Path) -> io::Result<()> {
    let path = CString::new(directory.as_os_str().as_bytes())?;
    // SAFETY: the string outlives the call.
    check(unsafe { libc::access(path.as_ptr(), libc::W_OK | libc::X_OK) })?;
    Ok(())
}

/// Reads a regular file below a directory that somebody else has filled, at most `limit` bytes: links lead to where
/// they do with that directory as the root, and nothing else is opened.
///
/// # Errors
/// Those of openat2(2) and read(2); ENXIO for what is no regular file.
pub fn read_below(directory: &Path, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let directory = File::open(directory)?;
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    let resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    let place = openat2(directory.as_raw_fd(), &path, flags, 0, resolve)?;
    // To open a device may do something.
    if !place.metadata()?.is_file() {
        return Err(io::Error::from_raw_os_error(libc::ENXIO));
    }
    let file = File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn openat2(
    at: RawFd,
    path: &CStr,
    flags: libc::c_int,
    mode: libc::mode_t,
    resolve: u64,
) -> io::Result<File> {
    // SAFETY: all zeros are valid.
    let mut how: libc::open_how = unsafe { zeroed() };
    how.flags = flags as u64;
    how.mode = mode.into();
    how.resolve = resolve;
    let (how, size) = (&raw const how, size_of::<libc::open_how>());
    // SAFETY: the string and the structure outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_openat2, at, path.as_ptr(), how, size) };
    Ok(File::from(owned(check(fd as libc::c_int)?)))
}

/// Name, release and version of the host's kernel (uname(2)).
pub fn kernel_version() -> [String; 3] {
    // SAFETY: all zeros are valid; the kernel writes terminated strings.
    let name = unsafe {
        let mut name: libc::utsname = zeroed();
        libc::uname(&mut name);
        name
    };
    [name.sysname, name.release, name.version].map(|field| {
        let bytes = field.iter().map(|byte| *byte as u8).take_while(|byte| *byte != 0);
        String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
    })
}

/// Fills `buffer` from the kernel's random number generator.
///
/// # Errors
/// Those of getrandom(2).
pub fn fill_random(mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        // SAFETY: pointer and length describe `buffer`.
        let ret = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        match usize::try_from(ret) {
            Ok(filled) => buffer = &mut buffer[filled..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Another descriptor for the process's standard input, which stays what it was started with.
///
/// # Errors
/// Those of fcntl(2): it is closed.
pub fn standard_input() -> io::Result<File> {
    Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?))
}

/// The signals that ask a process to end.
pub const STOP_SIGNALS: [libc::c_int; 4] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Blocks these signals for the calling thread and those it starts, and returns a non-blocking
/// descriptor to read them from.
///
/// # Errors
/// Those of sigprocmask(2) and signalfd(2).
pub fn signal_file(signals: &[libc::c_int]) -> io::Result<File> {
    // SAFETY: an all-zero sigset is a valid argument of sigemptyset, which initialises it.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(File::from(owned(fd)))
    }
}

/// The next signal waiting in a [`signal_file`].
pub fn next_signal(file: &File) -> Option<i32> {
    let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
    let size = size_of::<libc::signalfd_siginfo>();
    // SAFETY: the buffer has the size given; a read of a signalfd fills it whole or not at all.
    unsafe {
        let read = libc::read(file.as_raw_fd(), info.as_mut_ptr().cast(), size);
        (read == size as isize).then(|| info.assume_init().ssi_signo as i32)
    }
}

/// The time since 1970 of the clock by which the kernel gives files their times: its last tick
/// (clock_gettime(2), `CLOCK_REALTIME_COARSE`). 1970 itself if there is none.
pub fn file_clock() -> Duration {
    // SAFETY: an all-zero timespec is valid, and lives on this stack.
    unsafe {
        let mut now: libc::timespec = zeroed();
        libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &mut now);
        Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
    }
}

/// A non-blocking timer that is readable at every `interval`, and when the wall clock is set or
/// makes a jump, as after the host's sleep (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`).
///
/// # Errors
/// Those of timerfd_create(2).
pub fn wall_clock_file(interval: Duration) -> io::Result<File> {
    let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
    // SAFETY: plain system call.
    let fd = check(unsafe { libc::timerfd_create(libc::CLOCK_REALTIME, flags) })?;
    let file = File::from(owned(fd));
    set_wall_clock_file(&file, interval)?;
    Ok(file)
}

/// Starts a [`wall_clock_file`] again: after a jump of the clock it may have stopped, or may expire
/// far in the future.
///
/// # Errors
/// Those of timerfd_settime(2).
pub fn set_wall_clock_file(file: &File, interval: Duration) -> io::Result<()> {
    // SAFETY: plain system calls; the structures live on this stack, and all-zero ones are valid.
    unsafe {
        let mut timer: libc::itimerspec = zeroed();
        check(libc::clock_gettime(libc::CLOCK_REALTIME, &mut timer.it_value))?;
        timer.it_interval.tv_sec = interval.as_secs() as libc::time_t;
        timer.it_value.tv_sec += timer.it_interval.tv_sec;
        let flags = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
        check(libc::timerfd_settime(file.as_raw_fd(), flags, &timer, ptr::null_mut()))?;
        Ok(())
    }
}

/// Keeps programs that this process starts from getting the descriptor.
///
/// # Errors
/// Those of fcntl(2).
pub fn close_on_exec(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(())
}

/// Makes reads and writes on a descriptor return instead of waiting.
///
/// # Errors
/// Those of fcntl(2).
pub fn set_nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system calls on an open descriptor.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    }
    Ok(())
}

/// Locks a file against other processes (flock(2)), until it is closed. Waits for whoever holds the lock,
/// at most for `limit`; `false` if that is over.
///
/// # Errors
/// Those of flock(2).
pub fn lock(file: &File, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    // Locks are held for milliseconds; many that wait must not slow the holder by trying.
    let mut step = Duration::from_millis(1);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                thread::sleep(step);
                step = MAX_LOCK_STEP.min(step * 2);
            }
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Longest time between two attempts of [`lock`].
const MAX_LOCK_STEP: Duration = Duration::from_millis(50);

/// What to wait for on one descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Interest<'a>(Option<(BorrowedFd<'a>, libc::c_short)>);

impl<'a> Interest<'a> {
    /// Nothing: in place of a descriptor that does not matter at the moment.
    pub const NONE: Interest<'static> = Interest(None);

    /// Until it can be read from or is at its end.
    pub fn read(fd: &'a impl AsFd) -> Self {
        Interest::new(fd, true, false)
    }

    /// Until it can be written to or writing fails.
    pub fn write(fd: &'a impl AsFd) -> Self {
        Interest::new(fd, false, true)
    }

    /// Either or both, as wanted.
    pub fn new(fd: &'a impl AsFd, read: bool, write: bool) -> Self {
        let events = if read { libc::POLLIN } else { 0 } | if write { libc::POLLOUT } else { 0 };
        // Even without events, poll returns at once for a descriptor that has hung up.
        Interest((events != 0).then(|| (fd.as_fd(), events)))
    }
}

/// Waits until one of the descriptors is ready or the time is over (`None`: no limit). Says which
/// are ready.
///
/// # Errors
/// Those of poll(2), but for EINTR.
pub fn poll<const N: usize>(
    interests: [Interest<'_>; N],
    limit: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut fds = interests.map(|Interest(interest)| {
        let (fd, events) = interest.map_or((-1, 0), |(fd, events)| (fd.as_raw_fd(), events));
        libc::pollfd { fd, events, revents: 0 }
    });
    // Rounded up: waking early would only mean waking again.
    let timeout_ms = limit.map_or(-1, |limit| {
        i32::try_from(limit.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
    });
    // SAFETY: pointer and length describe `fds`.
    let ret = unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, timeout_ms) };
    match check(ret) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        // Interrupted, poll has written nothing, so nothing is ready.
        _ => Ok(fds.map(|fd| fd.revents != 0)),
    }
}
