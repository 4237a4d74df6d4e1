//! Sockets: making, connecting and adjusting them as std cannot.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::ffi::CString;
use std::io;
use std::mem::{offset_of, size_of, zeroed};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket,
};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::OnceLock;

use super::{check, fill_random, owned, set_nonblocking};

/// Sets the mode that a socket's file gets when it is bound to a path: it limits who may connect.
///
/// # Errors
/// Those of fchmod(2).
pub fn set_socket_mode(socket: &impl AsRawFd, mode: libc::mode_t) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fchmod(socket.as_raw_fd(), mode) })?;
    Ok(())
}

/// An unbound Unix stream socket.
///
/// # Errors
/// Those of socket(2).
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

/// Binds a Unix socket to a path of at most 107 bytes.
///
/// # Errors
/// Those of bind(2).
pub fn bind_unix(socket: &impl AsRawFd, path: &[u8]) -> io::Result<()> {
    let (address, len) = unix_address(path)?;
    // SAFETY: pointer and length describe `address`.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(())
}

/// Binds a Unix socket to a path of at most 107 bytes and listens.
///
/// # Errors
/// Those of bind(2) and listen(2).
pub fn bind_and_listen(socket: &impl AsRawFd, path: &[u8], backlog: libc::c_int) -> io::Result<()> {
    bind_unix(socket, path)?;
    listen(socket, backlog)
}

/// Listens on a socket that is bound, or listens already. Clients of a Unix socket see this process as
/// their peer (`SO_PEERCRED`).
///
/// # Errors
/// Those of listen(2).
pub fn listen(socket: &impl AsRawFd, backlog: libc::c_int) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) })?;
    Ok(())
}

/// A non-blocking TCP socket that listens on this address. An IPv6 listener takes no IPv4 clients:
/// those have a listener of their own. Connections of an earlier listener may linger on the port
/// (`SO_REUSEADDR`), but there must be no second listener.
///
/// # Errors
/// Those of socket(2), setsockopt(2), bind(2) and listen(2).
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

/// A non-blocking UDP socket bound to a port of all addresses of this one's family, which tells each datagram's
/// destination ([`receive_from`]). Nobody else can have the port.
///
/// # Errors
/// Those of socket(2), setsockopt(2) and bind(2).
pub fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::from(inet_socket(libc::SOCK_DGRAM, address)?);
    if address.is_ipv6() {
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &ON)?;
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, &ON)?;
    } else {
        set_option(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO, &ON)?;
    }
    let (raw, len) = raw_address(address);
    // SAFETY: `raw` holds an address of `len` bytes.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const raw).cast(), len) })?;
    Ok(socket)
}

/// The two ends of a datagram that came to a socket of [`bind_udp`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ends {
    /// Who sent it.
    pub client: SocketAddr,
    /// To which of the host's addresses; the answer comes from there. Of a datagram to many hosts, that of the one
    /// which got it, or none (`::`).
    pub host: IpAddr,
    /// The interface, if the address means something only there; or 0.
    pub interface: u32,
}

/// Room for one control message with either family's packet information (ip(7), ipv6(7)).
#[repr(C, align(8))]
struct PacketInfo([u8; 40]);

/// Receives a datagram from a socket of [`bind_udp`] into `buffer`; its length and ends.
///
/// # Errors
/// Those of recvmsg(2); `InvalidData` if the kernel does not say the ends.
pub fn receive_from(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Ends)> {
    // SAFETY: all-zero structures are valid; the message points to buffers of the lengths it says, which
    // live to the end of the block. The kernel has written as much of the control buffer as the message
    // then says, in which the macros stay, and what is read has the length that its header says.
    unsafe {
        let mut from: libc::sockaddr_storage = zeroed();
        let mut control = PacketInfo([0; 40]);
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut message: libc::msghdr = zeroed();
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<PacketInfo>();
        let len = libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0);
        if len < 0 {
            return Err(io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let data = libc::CMSG_DATA(header);
        let ends = match ((*header).cmsg_level, (*header).cmsg_type) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                let from = (&raw const from).cast::<libc::sockaddr_in>().read();
                let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                let [client, host] = [from.sin_addr.s_addr, info.ipi_spec_dst.s_addr]
                    .map(|ip| Ipv4Addr::from(ip.to_ne_bytes()));
                let client = SocketAddr::from((client, u16::from_be(from.sin_port)));
                Ends { client, host: host.into(), interface: 0 }
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                let from = (&raw const from).cast::<libc::sockaddr_in6>().read();
                let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                let client = SocketAddrV6::new(
                    from.sin6_addr.s6_addr.into(),
                    u16::from_be(from.sin6_port),
                    0,
                    from.sin6_scope_id,
                );
                let host = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                let host = if host.is_multicast() { Ipv6Addr::UNSPECIFIED } else { host };
                let is_scoped = host.is_unicast_link_local() || from.sin6_scope_id != 0;
                let interface = if is_scoped { info.ipi6_ifindex } else { 0 };
                Ends { client: client.into(), host: host.into(), interface }
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        Ok((len as usize, ends))
    }
}

/// Sends a datagram from a socket of [`bind_udp`] to a client, from the address to which that sent.
///
/// # Errors
/// Those of sendmsg(2).
pub fn answer(socket: &UdpSocket, datagram: &[u8], ends: &Ends) -> io::Result<()> {
    let (mut to, to_len) = raw_address(ends.client);
    let mut control = PacketInfo([0; 40]);
    // SAFETY: an all-zero message is valid; it points to buffers of the lengths it says, which live to the
    // end of the block and of which the kernel only reads. The control buffer has room for the one message
    // that is written into it.
    unsafe {
        let mut part =
            libc::iovec { iov_base: datagram.as_ptr().cast_mut().cast(), iov_len: datagram.len() };
        let mut message: libc::msghdr = zeroed();
        message.msg_name = (&raw mut to).cast();
        message.msg_namelen = to_len;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<PacketInfo>();
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let data = libc::CMSG_DATA(header);
        let info_len = match ends.host {
            IpAddr::V4(ip) => {
                (*header).cmsg_level = libc::IPPROTO_IP;
                (*header).cmsg_type = libc::IP_PKTINFO;
                let s_addr = u32::from_ne_bytes(ip.octets());
                data.cast::<libc::in_pktinfo>().write_unaligned(libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                });
                size_of::<libc::in_pktinfo>()
            }
            IpAddr::V6(ip) => {
                (*header).cmsg_level = libc::IPPROTO_IPV6;
                (*header).cmsg_type = libc::IPV6_PKTINFO;
                data.cast::<libc::in6_pktinfo>().write_unaligned(libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: ip.octets() },
                    ipi6_ifindex: ends.interface,
                });
                size_of::<libc::in6_pktinfo>()
            }
        } as libc::c_uint;
        (*header).cmsg_len = libc::CMSG_LEN(info_len) as usize;
        message.msg_controllen = libc::CMSG_SPACE(info_len) as usize;
        if libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A non-blocking TCP socket that is connecting, or connected already. When it first becomes writable
/// or has an error, the attempt is over.
///
/// # Errors
/// Those of socket(2) and connect(2), but for EINPROGRESS.
pub fn connect_tcp(destination: SocketAddr) -> io::Result<TcpStream> {
    connect(libc::SOCK_STREAM, destination).map(TcpStream::from)
}

/// A non-blocking UDP socket, connected.
///
/// # Errors
/// Those of socket(2) and connect(2).
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
///
/// # Errors
/// Those of setsockopt(2) and of [`fix_linger_values`].
pub fn set_reset_on_close(stream: &TcpStream, reset: bool) -> io::Result<()> {
    let values = fix_linger_values()?;
    set_option(stream, libc::SOL_SOCKET, libc::SO_LINGER, &values[usize::from(reset)])
}

/// Where the two values of `SO_LINGER` are that mote uses. The filters allow these addresses and no others
/// (`resources/seccomp/main.json`), and no call that would change what is there: a filter cannot look at
/// the value itself, and with other values a close waits, in whichever process has the socket last. It is
/// below all other memory, so that the filters can tell it apart.
const LINGER_VALUES: usize = 0x10_0000;

/// Bytes of a page.
const PAGE_LEN: usize = 4096;

/// Puts the values of `SO_LINGER` in their place, read-only: a close ends in order, or resets. Must be
/// called once before the filters, which allow it no more.
///
/// # Errors
/// Those of mmap(2) and mprotect(2): EPERM where the sysctl vm.mmap_min_addr is higher than usual.
pub fn fix_linger_values() -> io::Result<&'static [libc::linger; 2]> {
    static FIXED: OnceLock<Result<&'static [libc::linger; 2], libc::c_int>> = OnceLock::new();
    let fix = || {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let wanted = LINGER_VALUES as *mut libc::c_void;
        // SAFETY: the mapping replaces no other. It is as long and as aligned as the values need, is
        // written before there is a reference to it, and never goes away.
        unsafe {
            let page = libc::mmap(wanted, PAGE_LEN, access, flags, -1, 0);
            if page == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            } else if page != wanted {
                // Linux before 4.17, where the place is taken.
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let values = page.cast::<[libc::linger; 2]>();
            values.write([0, 1].map(|l_onoff| libc::linger { l_onoff, l_linger: 0 }));
            check(libc::mprotect(page, PAGE_LEN, libc::PROT_READ))?;
            Ok(&*values)
        }
    };
    let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EEXIST);
    FIXED.get_or_init(|| fix().map_err(errno)).map_err(io::Error::from_raw_os_error)
}

/// The value of a socket option that is switched on.
const ON: libc::c_int = 1;

/// Has a TCP socket ask a silent peer whether it is there (`SO_KEEPALIVE`, tcp(7)): after `idle_s`
/// seconds, every `interval_s`, and give the connection up after `probes` without an answer.
///
/// # Errors
/// Those of setsockopt(2).
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
/// connect to the socket, neither before nor after. There is no file: the socket's name is an abstract
/// one, which exists as long as the socket (unix(7)).
///
/// # Errors
/// Those of socket(2), bind(2), listen(2) and connect(2).
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
            // Room for one connection: ours, or that of a stranger who has found the name.
            check(libc::listen(listener.as_raw_fd(), 0))?;
            let connected = check(libc::connect(connection.as_raw_fd(), address, len));
            // The connection in the queue stays there; every later one is refused.
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

/// How often [`connected_listener`] tries again after a stranger was faster.
const CONNECT_TRIES: usize = 16;

/// A non-blocking connection to the Unix stream socket at a path of at most 107 bytes. A listener
/// with a full backlog is an error (`WouldBlock`), not a wait.
///
/// # Errors
/// Those of socket(2) and connect(2); EAGAIN when the queue of clients is full.
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
///
/// # Errors
/// The descriptor is not open.
pub fn inherited_stream(fd: RawFd) -> io::Result<UnixStream> {
    if !is_unix_stream(fd) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: plain system call.
    Ok(UnixStream::from(owned(check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?)))
}
