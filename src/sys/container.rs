//! What a process does to become a container's: a copy that goes on alone, its session and terminal, its
//! descriptors, its network namespace; and what it says to the engine that asked for it.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::ptr;

use super::{check, owned};

/// Goes on with `work` in a copy of this process, which ends with the code that `work` returns. Returns the copy's
/// number. Must be called while there is one thread.
///
/// # Errors
/// Those of fork(2).
pub fn fork(work: impl FnOnce() -> u8) -> io::Result<u32> {
    // SAFETY: plain system call; there is one thread, so that the copy has everything that runs here.
    let pid = check(unsafe { libc::fork() })?;
    if pid > 0 {
        return Ok(pid as u32);
    }
    let code = work();
    // SAFETY: plain system call. Nothing is flushed and no destructor runs: the parent does both.
    unsafe { libc::_exit(code.into()) }
}

/// Makes this process the first of a new session, without a terminal.
///
/// # Errors
/// Those of setsid(2).
pub fn new_session() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::setsid() })?;
    Ok(())
}

/// Makes a terminal this session's.
///
/// # Errors
/// Those of ioctl_tty(2), `TIOCSCTTY`.
pub fn take_terminal(terminal: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
    Ok(())
}

/// Gives this file the numbers of all three standard streams.
///
/// # Errors
/// Those of dup2(2).
pub fn use_as_standard_streams(file: &impl AsRawFd) -> io::Result<()> {
    for number in libc::STDIN_FILENO..=libc::STDERR_FILENO {
        // SAFETY: plain system call; nothing owns the standard streams.
        check(unsafe { libc::dup2(file.as_raw_fd(), number) })?;
    }
    Ok(())
}

/// Keeps all descriptors but the standard streams from the program that this process executes next.
///
/// # Errors
/// Those of close_range(2), which Linux has since 5.9, with this flag since 5.11.
pub fn close_all_on_exec() -> io::Result<()> {
    let (first, last) = (libc::STDERR_FILENO as libc::c_uint + 1, libc::c_uint::MAX);
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: plain system call.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) as libc::c_int })?;
    Ok(())
}

/// Keeps a descriptor open in the program that this process executes next.
///
/// # Errors
/// Those of fcntl(2).
pub fn keep_on_exec(file: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) })?;
    Ok(())
}

/// Lets all signals through that this process has blocked.
///
/// # Errors
/// Those of sigprocmask(2).
pub fn unblock_signals() -> io::Result<()> {
    // SAFETY: an all-zero set is valid until it is emptied, and lives on this stack.
    unsafe {
        let mut none: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut()))?;
    }
    Ok(())
}

/// Enters the network namespace that a file stands for.
///
/// # Errors
/// Those of setns(2); EINVAL for a file of another kind.
pub fn join_network(namespace: &File) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })?;
    Ok(())
}

/// Whether this process's network namespace belongs to a user namespace that somebody has made (ioctl_ns(2)), and so is not
/// the host's own network.
///
/// # Errors
/// Those of the ioctl: EPERM if it belongs to a user namespace around this process's.
pub fn network_is_of_a_user() -> io::Result<bool> {
    // include/uapi/linux/nsfs.h; PROC_USER_INIT_INO of include/linux/proc_ns.h.
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    const HOSTS_USERS: u64 = 0xefff_fffd;
    let network = File::open("/proc/self/ns/net")?;
    // SAFETY: plain system call on an open descriptor; the command has no argument.
    let owner = owned(check(unsafe { libc::ioctl(network.as_raw_fd(), NS_GET_USERNS) })?);
    Ok(File::from(owner).metadata()?.ino() != HOSTS_USERS)
}

/// Brings up the loopback interface of this process's network namespace (netdevice(7)).
///
/// # Errors
/// Those of socket(2) and ioctl(2).
pub fn raise_loopback() -> io::Result<()> {
    // SAFETY: plain system call.
    let socket = owned(check(unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)
    })?);
    // SAFETY: all zeros are a valid request; it lives on this stack, and its name is terminated.
    unsafe {
        let mut request: libc::ifreq = zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request))?;
    }
    Ok(())
}

/// Sends a signal to the process behind a [`super::process::process_file`].
///
/// # Errors
/// Those of pidfd_send_signal(2): ESRCH if it has ended.
pub fn send_signal(process: &impl AsRawFd, signal: i32) -> io::Result<()> {
    let (fd, info) = (process.as_raw_fd(), ptr::null::<libc::siginfo_t>());
    // SAFETY: plain system call; without an info the kernel fills in kill(2)'s.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, info, 0) };
    check(sent as libc::c_int)?;
    Ok(())
}

/// Room for one control message with one descriptor (unix(7), `SCM_RIGHTS`).
#[repr(C, align(8))]
struct Rights([u8; 24]);

/// Sends a descriptor over a Unix socket, with some text: as an engine's console socket takes a terminal.
///
/// # Errors
/// Those of sendmsg(2); `WriteZero` if not all of the text was taken.
pub fn send_descriptor(socket: &UnixStream, fd: &impl AsFd, text: &[u8]) -> io::Result<()> {
    let mut control = Rights([0; 24]);
    let part = IoSlice::new(text);
    // SAFETY: all zeros are a valid message; it points to buffers of the lengths it says, which live to the end of
    // the block. The control buffer has room for the one message that is written into it.
    let sent = unsafe {
        let mut message: libc::msghdr = zeroed();
        // std's IoSlice has the layout of iovec.
        message.msg_iov = (&raw const part).cast_mut().cast();
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as libc::c_uint) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as libc::c_uint) as usize;
        let data = libc::CMSG_DATA(header).cast::<RawFd>();
        data.write_unaligned(fd.as_fd().as_raw_fd());
        libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
    };
    match usize::try_from(sent) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(sent) if sent < text.len() => Err(io::ErrorKind::WriteZero.into()),
        Ok(_) => Ok(()),
    }
}

/// The number of the signal of this name, as kill(1) writes it, with or without `SIG`.
pub fn signal_number(name: &str) -> Option<i32> {
    let name = name.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let (min, max) = (libc::SIGRTMIN(), libc::SIGRTMAX());
    let real_time = |base: i32, sign: i32, rest: &str| {
        let offset: i32 = if rest.is_empty() { 0 } else { rest[1..].parse().ok()? };
        let number = base.checked_add(sign.checked_mul(offset)?)?;
        (min..=max).contains(&number).then_some(number)
    };
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return (rest.is_empty() || rest.starts_with('+')).then(|| real_time(min, 1, rest))?;
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return (rest.is_empty() || rest.starts_with('-')).then(|| real_time(max, -1, rest))?;
    }
    SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

/// The signals by name (signal(7)).
const SIGNALS: [(&str, i32); 35] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("IOT", libc::SIGIOT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("POLL", libc::SIGIO),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
    ("UNUSED", libc::SIGSYS),
];

/// The path of the terminal that a descriptor is for, by which others name it.
///
/// # Errors
/// Those of readlink(2).
pub fn terminal_path(terminal: &impl AsRawFd) -> io::Result<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", terminal.as_raw_fd()))
}

/// Whether this process is root outside all user namespaces, as far as it can see (user_namespaces(7)).
pub fn is_hosts_root() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    is_root() && map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Whether this process is root.
fn is_root() -> bool {
    // SAFETY: plain system call.
    unsafe { libc::geteuid() == 0 }
}
