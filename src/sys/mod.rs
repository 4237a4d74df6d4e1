//! Thin, safe wrappers over the libc calls that no crate of ours covers. Together with
//! [`crate::memory`] this is all the unsafe code of mote.

#![allow(unsafe_code, reason = "the module that talks to libc")]

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::{MaybeUninit, offset_of, size_of, zeroed};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::time::{Duration, Instant};

pub mod confine;

fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: every caller passes a descriptor that a system call has just returned, so it is open
    // and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// An anonymous memory file of a fixed size: sealed against growing and shrinking, so that no
/// process it is shared with can pull pages away from under the others.
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

/// Whether a path exists, seen from a root directory: its symbolic links lead nowhere else. A path
/// that cannot be judged counts as there.
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

/// Fills `buffer` from the kernel's random number generator.
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

/// Blocks these signals for the calling thread and those it starts, and returns a non-blocking
/// descriptor to read them from.
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

/// A non-blocking timer that is readable at every `interval`, and when the wall clock is set or
/// makes a jump, as after the host's sleep (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`).
pub fn wall_clock_file(interval: Duration) -> io::Result<File> {
    let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
    // SAFETY: plain system call.
    let fd = check(unsafe { libc::timerfd_create(libc::CLOCK_REALTIME, flags) })?;
    let file = File::from(owned(fd));
    set_wall_clock_file(&file, interval)?;
    Ok(file)
}

/// Starts a [`wall_clock_file`] anew, which after a jump of the clock may have stopped, or be due at
/// a time far away.
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

/// A descriptor that becomes readable when the process ends.
pub fn process_file(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    Ok(owned(check(fd as libc::c_int)?))
}

/// Makes a child die with the thread that starts it, and hands it one descriptor as number
/// [`INHERITED_FD`]; everything else is closed on exec as usual. `prepare` is what it does before; only
/// async-signal-safe calls, if this process has other threads.
pub fn helper(
    command: &mut Command,
    inherited: BorrowedFd<'_>,
    mut prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    let source = inherited.as_raw_fd();
    let parent = std::process::id();
    // SAFETY: the closure runs in the forked child and, beside `prepare`, only makes async-signal-safe
    // system calls on plain integers. `source` stays open until the command is spawned: callers spawn it while they
    // still hold the descriptor.
    unsafe {
        command.pre_exec(move || {
            // First: a new user namespace takes the next line back.
            prepare()?;
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            // A group of its own: a terminal's Ctrl-C is mote's to handle.
            check(libc::setpgid(0, 0))?;
            // The parent may have died before the line above took effect.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            // Signals that mote takes from a descriptor are blocked; programs expect them open.
            let mut none: libc::sigset_t = zeroed();
            libc::sigemptyset(&mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut()))?;
            if source == INHERITED_FD {
                check(libc::fcntl(source, libc::F_SETFD, 0))?;
            } else {
                check(libc::dup2(source, INHERITED_FD))?;
            }
            Ok(())
        });
    }
}

/// Kills the process behind a [`process_file`]. One that has ended is no error.
pub fn kill_process(process: &impl AsRawFd) {
    let (fd, info) = (process.as_raw_fd(), ptr::null::<libc::siginfo_t>());
    // SAFETY: plain system call; without an info the kernel fills in kill(2)'s.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, info, 0) };
}

/// Makes the orphans of this process's children its own children, so that [`reap`] sees them:
/// virtiofsd forks.
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) })?;
    Ok(())
}

/// Waits for the end of a child that is about to end, and of the rest of the process group that it
/// leads, as far as they are children too; at most this long.
pub fn reap(pid: u32, limit: Duration) {
    let deadline = Instant::now() + limit;
    for who in [pid as libc::pid_t, -(pid as libc::pid_t)] {
        loop {
            // SAFETY: plain system call; a null status pointer is allowed.
            match unsafe { libc::waitpid(who, ptr::null_mut(), libc::WNOHANG) } {
                0 if Instant::now() < deadline => std::thread::sleep(REAP_STEP),
                reaped if reaped > 0 => {}
                _ => break,
            }
        }
    }
}

/// How often [`reap`] looks; what it waits for has been killed already.
const REAP_STEP: Duration = Duration::from_micros(200);

/// The number under which a [`helper`] finds its descriptor.
pub const INHERITED_FD: RawFd = 3;

/// Limits who may connect to a socket that is about to be bound to a path: its file gets this mode.
pub fn set_socket_mode(socket: &impl AsRawFd, mode: libc::mode_t) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fchmod(socket.as_raw_fd(), mode) })?;
    Ok(())
}

/// An unbound Unix stream socket.
pub fn unix_stream_socket() -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    Ok(owned(check(unsafe {
        libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0)
    })?))
}

/// The address of a Unix socket at a path of at most 107 bytes.
fn unix_address(path: &[u8]) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    if path.is_empty() || path.len() >= address.sun_path.len() || path.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}

/// Binds a Unix socket to a path of at most 107 bytes and listens.
pub fn bind_and_listen(socket: &impl AsRawFd, path: &[u8], backlog: libc::c_int) -> io::Result<()> {
    let (address, len) = unix_address(path)?;
    // SAFETY: pointer and length describe `address`.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    listen(socket, backlog)
}

/// Listens on a socket that is bound, or listens already. Clients of a Unix socket see this process as
/// their peer (`SO_PEERCRED`).
pub fn listen(socket: &impl AsRawFd, backlog: libc::c_int) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) })?;
    Ok(())
}

/// A non-blocking TCP socket that listens on this address. One of IPv6 takes no clients of IPv4, for
/// whom there is another. The port may have connections of an earlier listener that linger
/// (`SO_REUSEADDR`), but no second listener.
pub fn listen_tcp(address: SocketAddr, backlog: libc::c_int) -> io::Result<TcpListener> {
    let listener = TcpListener::from(inet_socket(libc::SOCK_STREAM, address)?);
    set_option(&listener, libc::SOL_SOCKET, libc::SO_REUSEADDR, &ON)?;
    if address.is_ipv6() {
        set_option(&listener, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &ON)?;
    }
    let (raw, len) = raw_address(address);
    // SAFETY: `raw` holds an address of `len` bytes.
    check(unsafe { libc::bind(listener.as_raw_fd(), (&raw const raw).cast(), len) })?;
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::listen(listener.as_raw_fd(), backlog) })?;
    Ok(listener)
}

/// A non-blocking TCP socket that is being connected, or is. Its first readiness to write, or its
/// first error, says how that went.
pub fn connect_tcp(destination: SocketAddr) -> io::Result<TcpStream> {
    connect(libc::SOCK_STREAM, destination).map(TcpStream::from)
}

/// A non-blocking UDP socket, connected.
pub fn connect_udp(destination: SocketAddr) -> io::Result<UdpSocket> {
    connect(libc::SOCK_DGRAM, destination).map(UdpSocket::from)
}

fn connect(kind: libc::c_int, destination: SocketAddr) -> io::Result<OwnedFd> {
    let socket = inet_socket(kind, destination)?;
    let (raw, len) = raw_address(destination);
    // SAFETY: `raw` holds an address of `len` bytes.
    match check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const raw).cast(), len) }) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// A non-blocking socket of this kind, for addresses of the same family as this one.
fn inet_socket(kind: libc::c_int, address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain system call.
    Ok(owned(check(unsafe { libc::socket(family, kind, 0) })?))
}

/// An address as the kernel takes it, and its length there.
fn raw_address(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: an all-zero address of any kind is valid.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let len = match address {
        SocketAddr::V4(address) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage is large enough and aligned for every kind of address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(raw) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(address) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(raw) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, len as libc::socklen_t)
}

/// Whether closing a TCP socket resets its connection, and drops what is still to be sent, rather
/// than ending it in order (socket(7), `SO_LINGER` of zero).
pub fn set_reset_on_close(stream: &TcpStream, reset: bool) -> io::Result<()> {
    let linger = libc::linger { l_onoff: reset.into(), l_linger: 0 };
    set_option(stream, libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}

/// The value of a socket option that is switched on.
const ON: libc::c_int = 1;

/// Has a TCP socket ask a silent peer whether it is there (`SO_KEEPALIVE`, tcp(7)): after `idle_s`
/// seconds, every `interval_s`, and give the connection up after `probes` without an answer.
pub fn set_keepalive(
    socket: &impl AsRawFd,
    idle_s: libc::c_int,
    interval_s: libc::c_int,
    probes: libc::c_int,
) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, &idle_s)?;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, &interval_s)?;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, &probes)?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &ON)
}

/// Sets a socket option whose value is a `T`: one of libc's types for it.
fn set_option<T>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    let value = ptr::from_ref(value).cast();
    // SAFETY: pointer and length describe `value`, which the call only reads.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value, len) })?;
    Ok(())
}

/// The number of the network interface of this name.
pub fn interface_index(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name is NUL-terminated and outlives the call.
    Some(unsafe { libc::if_nametoindex(name.as_ptr()) }).filter(|index| *index != 0)
}

/// A listening Unix socket with one connection waiting in its queue, and that connection. Nobody else can
/// connect to it, neither before nor after. There is no file: the name is an abstract one, and lives as
/// long as the socket (unix(7)).
pub fn connected_listener() -> io::Result<(OwnedFd, UnixStream)> {
    let mut tries = 0;
    loop {
        let mut name = [0; 16];
        fill_random(&mut name)?;
        // SAFETY: an all-zero sockaddr_un is valid. The byte before the name stays zero.
        let mut address: libc::sockaddr_un = unsafe { zeroed() };
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in address.sun_path[1..].iter_mut().zip(name) {
            *to = from as libc::c_char;
        }
        let len = offset_of!(libc::sockaddr_un, sun_path) + 1 + name.len();
        let (address, len) = ((&raw const address).cast(), len as libc::socklen_t);
        let listener = unix_stream_socket()?;
        let connection = UnixStream::from(unix_stream_socket()?);
        connection.set_nonblocking(true)?;
        // SAFETY: pointer and length describe the part of `address` that is the name; the rest are plain
        // system calls on open descriptors.
        let connected = unsafe {
            check(libc::bind(listener.as_raw_fd(), address, len))?;
            // Room for one: ours, or a stranger's who has found the name by now.
            check(libc::listen(listener.as_raw_fd(), 0))?;
            let connected = check(libc::connect(connection.as_raw_fd(), address, len));
            // What waits in the queue stays there; whoever comes from now on is refused.
            check(libc::shutdown(listener.as_raw_fd(), libc::SHUT_RD))?;
            connected
        };
        tries += 1;
        match connected {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries < CONNECT_TRIES => {}
            connected => {
                connected?;
                connection.set_nonblocking(false)?;
                return Ok((listener, connection));
            }
        }
    }
}

/// How often [`connected_listener`] lets a stranger be faster.
const CONNECT_TRIES: usize = 16;

/// A non-blocking connection to the Unix stream socket at a path of at most 107 bytes. A listener
/// with a full backlog is an error (`WouldBlock`), not a wait.
pub fn connect_unix(path: &[u8]) -> io::Result<UnixStream> {
    let (address, len) = unix_address(path)?;
    let socket = unix_stream_socket()?;
    set_nonblocking(&socket)?;
    // SAFETY: pointer and length describe `address`.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(UnixStream::from(socket))
}

/// Whether this number is an open Unix stream socket.
pub fn is_unix_stream(fd: RawFd) -> bool {
    let is = |option: libc::c_int, wanted: libc::c_int| {
        let mut value: libc::c_int = 0;
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: `value` and `len` describe a buffer of the size these options write; a number that
        // is no socket is refused.
        let ret = unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, option, (&raw mut value).cast(), &mut len)
        };
        ret == 0 && value == wanted
    };
    is(libc::SO_DOMAIN, libc::AF_UNIX) && is(libc::SO_TYPE, libc::SOCK_STREAM)
}

/// A duplicate of a Unix stream socket that this process was started with, closed on exec.
pub fn inherited_stream(fd: RawFd) -> io::Result<UnixStream> {
    if !is_unix_stream(fd) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: plain system call.
    Ok(UnixStream::from(owned(check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?)))
}

/// Keeps a descriptor from programs that are started.
pub fn close_on_exec(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(())
}

/// Makes reads and writes on a descriptor return instead of waiting.
pub fn set_nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system calls on an open descriptor.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    }
    Ok(())
}

/// Raises the limit on open files as far as it goes: each connection is one (contract §1.3 step 4).
/// A host that does not allow it has fewer connections. [`confine::limit`] lowers it again.
pub fn raise_open_file_limit() {
    // SAFETY: an all-zero rlimit is valid, and both calls take a pointer to one.
    unsafe {
        let mut limit: libc::rlimit = zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// Starts a process under this name that does `work` and ends, and returns its number. It is a child of
/// this one, but in a session of its own and with no descriptors but those to `keep`; signals that are
/// blocked here are blocked there.
///
/// `work` must not panic and must not take a lock that another thread may hold: threads are not
/// copied.
pub fn start_detached(name: &CStr, keep: &[RawFd], work: impl FnOnce()) -> io::Result<u32> {
    let mut keep: Vec<libc::c_uint> = keep.iter().map(|fd| *fd as libc::c_uint).collect();
    keep.sort_unstable();
    // Closes nothing; whether there is such a call is found out where it can be said (Linux 5.9).
    let none = libc::c_uint::MAX;
    // SAFETY: plain system call.
    check(unsafe { libc::syscall(libc::SYS_close_range, none, none, 0) as libc::c_int })?;
    // SAFETY: plain system call. The child is a copy of this thread with all its memory, and is
    // through `_exit` the only thing to run on that copy; glibc puts its own locks in order.
    let pid = check(unsafe { libc::fork() })?;
    if pid > 0 {
        return Ok(pid as u32);
    }
    // From here on in the child.
    let mut from = 0;
    for fd in keep.into_iter().chain([libc::c_uint::MAX]) {
        if fd > from {
            // SAFETY: plain system call. Whatever owns these descriptors in this copy of the
            // process is never used or dropped: only `work` runs, which owns those that are kept.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd.saturating_add(1);
    }
    // SAFETY: plain system calls; the strings are NUL-terminated and live on.
    unsafe {
        // What this process opens shall not be its standard error.
        while (0..=2).contains(&libc::open(c"/dev/null".as_ptr(), libc::O_RDWR)) {}
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
    }
    work();
    // SAFETY: plain system call. Nothing is flushed and no destructor runs: all that is the
    // parent's.
    unsafe { libc::_exit(0) }
}

/// CPU numbers are below this: what glibc's `cpu_set_t` can hold.
pub const MAX_CPUS: u16 = libc::CPU_SETSIZE as u16;

/// The online CPUs that the calling thread may run on (sched_getaffinity(2)).
pub fn cpu_affinity() -> io::Result<BTreeSet<u16>> {
    // SAFETY: an all-zero cpu_set_t is valid and of the size given; the numbers looked up are below
    // CPU_SETSIZE.
    unsafe {
        let mut set: libc::cpu_set_t = zeroed();
        check(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set))?;
        Ok((0..MAX_CPUS).filter(|&cpu| libc::CPU_ISSET(cpu.into(), &set)).collect())
    }
}

/// Limits the calling thread, and what it starts, to these CPUs below [`MAX_CPUS`]
/// (sched_setaffinity(2)). The kernel may take fewer: see [`cpu_affinity`].
pub fn set_cpu_affinity(cpus: &BTreeSet<u16>) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is valid and of the size given; libc's CPU_SET checks the
    // number's bounds.
    unsafe {
        let mut set: libc::cpu_set_t = zeroed();
        for &cpu in cpus {
            libc::CPU_SET(cpu.into(), &mut set);
        }
        check(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set))?;
    }
    Ok(())
}

/// What to wait for on one descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Interest<'a>(Option<(BorrowedFd<'a>, libc::c_short)>);

impl<'a> Interest<'a> {
    /// Nothing; keeps the place of one that does not matter at the moment.
    pub const NONE: Interest<'static> = Interest(None);

    /// Until it can be read from or is at its end, and until it can be written to or refuses that.
    pub fn new(fd: &'a impl AsFd, read: bool, write: bool) -> Self {
        let events = if read { libc::POLLIN } else { 0 } | if write { libc::POLLOUT } else { 0 };
        // Without any events, poll still reports hang-ups: it would not wait.
        Interest((events != 0).then(|| (fd.as_fd(), events)))
    }
}

/// Waits until one of the descriptors is ready or the time is over (`None`: no limit). Says which
/// are ready.
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

/// The settings of a terminal (termios(3)).
#[derive(Debug, Clone, Copy)]
pub struct TerminalMode(libc::termios);

impl TerminalMode {
    /// The settings that a terminal has.
    pub fn of(terminal: &impl AsRawFd) -> io::Result<Self> {
        let mut mode = MaybeUninit::uninit();
        // SAFETY: tcgetattr fills the structure when it succeeds, and only then is it looked at.
        unsafe {
            check(libc::tcgetattr(terminal.as_raw_fd(), mode.as_mut_ptr()))?;
            Ok(TerminalMode(mode.assume_init()))
        }
    }

    /// These settings changed so that every key arrives as it is, at once, and is not echoed.
    pub fn raw(mut self) -> Self {
        // SAFETY: the pointer is to an initialised termios.
        unsafe { libc::cfmakeraw(&mut self.0) };
        self
    }

    /// Gives a terminal these settings.
    pub fn apply(&self, terminal: &impl AsRawFd) -> io::Result<()> {
        // SAFETY: tcsetattr reads a termios, which the pointer is to.
        check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &self.0) })?;
        Ok(())
    }
}

/// A terminal's columns and rows; `None` for anything else, and for a terminal that does not know.
pub fn terminal_size(terminal: &impl AsRawFd) -> Option<(u16, u16)> {
    // SAFETY: an all-zero winsize is valid.
    let mut size: libc::winsize = unsafe { zeroed() };
    // SAFETY: TIOCGWINSZ writes a winsize, which the pointer is to.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) }).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Both ends of a new pseudo-terminal: the keyboard and screen, and what programs use.
#[cfg(test)]
pub fn pseudo_terminal(cols: u16, rows: u16) -> io::Result<(File, File)> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: openpty writes two descriptors and reads a winsize; null asks for no name and for the
    // usual settings.
    check(unsafe {
        libc::openpty(&mut master, &mut slave, ptr::null_mut(), ptr::null(), &raw const size)
    })?;
    Ok((File::from(owned(master)), File::from(owned(slave))))
}
