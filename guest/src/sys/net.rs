//! Sockets, and the addresses and routes of interfaces: the system calls of networking, each
//! wrapped as in [`crate::sys`], errors unchanged.

#![allow(unsafe_code, reason = "the module that talks to libc about networking")]

use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use crate::sys::{c_string, check, owned};

/// Host end of every vsock connection (`VMADDR_CID_HOST`).
const HOST_CID: u32 = 2;

/// A vsock stream socket, non-blocking, and an address for it.
fn vsock_socket(cid: u32, port: u32) -> io::Result<(OwnedFd, libc::sockaddr_vm)> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain socket call.
    let socket = owned(check(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?);
    // SAFETY: an all-zero sockaddr_vm is valid.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    Ok((socket, address))
}

const VSOCK_ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// Starts a connection to a vsock port of the host. The socket is non-blocking: it becomes writable
/// when the host has answered, and [`socket_error`] then tells how.
pub fn vsock_connect(port: u32) -> io::Result<File> {
    let (socket, address) = vsock_socket(HOST_CID, port)?;
    // SAFETY: pointer and length describe `address`.
    let ret = unsafe {
        libc::connect(socket.as_raw_fd(), (&raw const address).cast(), VSOCK_ADDRESS_LEN)
    };
    match check(ret) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(File::from(socket)),
    }
}

/// Whether what failed on a socket of [`vsock_connect`] failed only because the host has yet to
/// answer.
pub fn is_connecting(socket: &impl AsRawFd, error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOTCONN) && socket_error(socket).is_ok()
}

/// A non-blocking socket that listens on a vsock port, for connections from the host.
pub fn vsock_listen(port: u32) -> io::Result<File> {
    let (socket, address) = vsock_socket(libc::VMADDR_CID_ANY, port)?;
    // SAFETY: pointer and length describe `address`.
    check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), VSOCK_ADDRESS_LEN)
    })?;
    // SAFETY: plain system call on an open descriptor. The kernel cuts the backlog to its limit.
    check(unsafe { libc::listen(socket.as_raw_fd(), libc::c_int::MAX) })?;
    Ok(File::from(socket))
}

/// The next connection that waits on a listening socket, non-blocking.
pub fn accept(listener: &impl AsRawFd) -> io::Result<File> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: null pointers are what a caller without interest in the address passes.
    let fd =
        unsafe { libc::accept4(listener.as_raw_fd(), ptr::null_mut(), ptr::null_mut(), flags) };
    Ok(File::from(owned(check(fd)?)))
}

/// Whether the peer of a stream socket has closed it altogether: it takes no bytes any more.
pub fn is_hung_up(socket: &impl AsRawFd) -> bool {
    // SAFETY: zero bytes are sent, so none are read.
    let sent = unsafe {
        libc::send(socket.as_raw_fd(), ptr::null(), 0, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    sent < 0 && io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock
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

/// Has a TCP socket's close cut the connection off (`SO_LINGER` of 0): its peer gets a reset.
pub fn reset_on_close(socket: &impl AsRawFd) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    set_option(socket, libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}

/// `setsockopt(2)` with an option that is a plain value.
fn set_option<T>(socket: &impl AsRawFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: pointer and length describe `value`, which the kernel only reads.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// An IP socket, non-blocking.
fn ip_socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain socket call.
    Ok(owned(check(unsafe { libc::socket(family, kind, protocol) })?))
}

/// An address for the kernel, and the length of its structure.
fn raw_address(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: an all-zero sockaddr_storage is valid; it has room and alignment for either of the
    // structures that are written into it.
    unsafe {
        let mut storage: libc::sockaddr_storage = zeroed();
        let len = match address {
            SocketAddr::V4(address) => {
                let raw = &mut *(&raw mut storage).cast::<libc::sockaddr_in>();
                raw.sin_family = libc::AF_INET as libc::sa_family_t;
                raw.sin_port = address.port().to_be();
                raw.sin_addr.s_addr = u32::from_ne_bytes(address.ip().octets());
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(address) => {
                let raw = &mut *(&raw mut storage).cast::<libc::sockaddr_in6>();
                raw.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                raw.sin6_port = address.port().to_be();
                raw.sin6_addr.s6_addr = address.ip().octets();
                size_of::<libc::sockaddr_in6>()
            }
        };
        (storage, len as libc::socklen_t)
    }
}

fn bind(socket: &OwnedFd, address: SocketAddr) -> io::Result<()> {
    let (raw, len) = raw_address(address);
    // SAFETY: pointer and length describe `raw`.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const raw).cast(), len) })?;
    Ok(())
}

/// A non-blocking TCP socket that listens on a port of all addresses of IPv6 and IPv4.
pub fn tcp_listen(port: u16) -> io::Result<TcpListener> {
    let socket = ip_socket(libc::AF_INET6, libc::SOCK_STREAM, 0)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, &1)?;
    bind(&socket, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))?;
    // SAFETY: plain system call on an open descriptor. The kernel cuts the backlog to its limit.
    check(unsafe { libc::listen(socket.as_raw_fd(), libc::c_int::MAX) })?;
    Ok(TcpListener::from(socket))
}

/// How long a connection to a server of the box may be idle before the kernel probes it.
const KEEPALIVE_IDLE_S: libc::c_int = 90;

/// Starts a TCP connection from one of the machine's addresses, or one that is only routed to it. It
/// becomes writable when there is an answer. The kernel forgets the server's end a minute after its
/// close, without a packet; the answer to a probe is then a reset.
pub fn tcp_connect(from: SocketAddr, to: SocketAddr) -> io::Result<OwnedFd> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = ip_socket(family, libc::SOCK_STREAM, 0)?;
    // For an address that is not on an interface; valid for both families (ip(7)).
    set_option(&socket, libc::SOL_IP, libc::IP_FREEBIND, &1)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1)?;
    set_option(&socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, &KEEPALIVE_IDLE_S)?;
    bind(&socket, from)?;
    let (raw, len) = raw_address(to);
    // SAFETY: pointer and length describe `raw`.
    match check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const raw).cast(), len) }) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// A non-blocking UDP socket from one of the machine's addresses, or one that is only routed to it, connected.
pub fn udp_connect(from: SocketAddr, to: SocketAddr) -> io::Result<UdpSocket> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = ip_socket(family, libc::SOCK_DGRAM, 0)?;
    // As for TCP.
    set_option(&socket, libc::SOL_IP, libc::IP_FREEBIND, &1)?;
    bind(&socket, from)?;
    let socket = UdpSocket::from(socket);
    socket.connect(to)?;
    Ok(socket)
}

/// A non-blocking UDP socket on a port of all addresses, which tells each datagram's destination and
/// may send from any address that is routed to the machine.
pub fn datagram_socket(port: u16) -> io::Result<UdpSocket> {
    /// Room for bursts of all the box's datagrams.
    const RECEIVE_BUFFER_LEN: libc::c_int = 4 << 20;
    let socket = ip_socket(libc::AF_INET6, libc::SOCK_DGRAM, 0)?;
    set_option(&socket, libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, &1)?;
    set_option(&socket, libc::SOL_IPV6, libc::IPV6_FREEBIND, &1)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &RECEIVE_BUFFER_LEN)?;
    bind(&socket, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))?;
    Ok(UdpSocket::from(socket))
}

/// Room for one `IPV6_PKTINFO` control message.
#[repr(C, align(8))]
struct PacketInfo([u8; 40]);

/// A datagram that was received. Addresses of IPv4 are IPv4-mapped.
#[derive(Debug, Clone, Copy)]
pub struct ReceivedDatagram {
    /// Its length in bytes.
    pub len: usize,
    /// Who sent it.
    pub source: SocketAddrV6,
    /// Where it was sent to.
    pub destination: Ipv6Addr,
}

/// Receives a datagram from a [`datagram_socket`] into `buffer`.
pub fn receive_datagram(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<ReceivedDatagram> {
    let mut control = PacketInfo([0; 40]);
    // SAFETY: all-zero structures of these types are valid; the message points to buffers of the
    // lengths it says, which live to the end of the block. A control message is only looked at if
    // the kernel says that it is there, whole, and of the type whose structure is then read.
    unsafe {
        let mut from: libc::sockaddr_in6 = zeroed();
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut message: libc::msghdr = zeroed();
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<PacketInfo>();
        let len = libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0);
        if len < 0 {
            return Err(io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null()
            || (*header).cmsg_level != libc::SOL_IPV6
            || (*header).cmsg_type != libc::IPV6_PKTINFO
        {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let info = libc::CMSG_DATA(header).cast::<libc::in6_pktinfo>().read_unaligned();
        let source = SocketAddrV6::new(
            Ipv6Addr::from(from.sin6_addr.s6_addr),
            u16::from_be(from.sin6_port),
            0,
            0,
        );
        let destination = Ipv6Addr::from(info.ipi6_addr.s6_addr);
        Ok(ReceivedDatagram { len: len as usize, source, destination })
    }
}

/// Sends a datagram from a [`datagram_socket`], from this address.
pub fn send_datagram(
    socket: &UdpSocket,
    bytes: &[u8],
    from: Ipv6Addr,
    to: SocketAddrV6,
) -> io::Result<()> {
    let mut control = PacketInfo([0; 40]);
    let (mut to, to_len) = raw_address(to.into());
    // SAFETY: an all-zero msghdr is valid; the message points to buffers of the lengths it says,
    // which live to the end of the block and of which the kernel only reads. The control buffer has
    // room for the one message that is written into it.
    unsafe {
        let mut part =
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let mut message: libc::msghdr = zeroed();
        message.msg_name = (&raw mut to).cast();
        message.msg_namelen = to_len;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<libc::in6_pktinfo>() as u32) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_IPV6;
        (*header).cmsg_type = libc::IPV6_PKTINFO;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<libc::in6_pktinfo>() as u32) as usize;
        let info = libc::in6_pktinfo {
            ipi6_addr: libc::in6_addr { s6_addr: from.octets() },
            ipi6_ifindex: 0,
        };
        libc::CMSG_DATA(header).cast::<libc::in6_pktinfo>().write_unaligned(info);
        if libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Sockets that send whole IP packets, and receive none.
#[derive(Debug)]
pub struct RawSockets {
    v4: OwnedFd,
    v6: OwnedFd,
}

impl RawSockets {
    /// Opens both.
    pub fn open() -> io::Result<Self> {
        let open = |family| ip_socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW);
        Ok(RawSockets { v4: open(libc::AF_INET)?, v6: open(libc::AF_INET6)? })
    }

    /// Sends a packet that begins with its IP header.
    pub fn send(&self, packet: &[u8], to: IpAddr) -> io::Result<()> {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        let (raw, len) = raw_address(SocketAddr::new(to, 0));
        // SAFETY: pointers and lengths describe `packet` and `raw`.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const raw).cast(),
                len,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

// ---- interfaces and routes -----------------------------------------------------------------

/// A request about a network interface, and the socket to make it with.
fn interface_request(name: &str) -> io::Result<(OwnedFd, libc::ifreq)> {
    // SAFETY: plain socket call.
    let socket = owned(check(unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)
    })?);
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()).take(libc::IFNAMSIZ - 1) {
        *to = from as libc::c_char;
    }
    Ok((socket, request))
}

/// Brings a network interface up; its other flags stay (`SIOCSIFFLAGS`).
pub fn interface_up(name: &str) -> io::Result<()> {
    let (socket, mut request) = interface_request(name)?;
    // SAFETY: both requests take an ifreq, which `request` is; the first has filled the flags in
    // before they are read.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request))?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request))?;
    }
    Ok(())
}

/// An IPv4 address as the requests about interfaces and routes take it.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: a sockaddr_in is one kind of sockaddr, of the same size, and both are plain bytes.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) }
}

/// Gives an interface its only IPv4 address (`SIOCSIFADDR`, `SIOCSIFNETMASK`; netdevice(7)).
pub fn set_interface_address(name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
    let (socket, mut request) = interface_request(name)?;
    for (operation, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
        request.ifr_ifru.ifru_addr = socket_address(value);
        // SAFETY: the requests read an ifreq with an address, which `request` is.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), operation, &request) })?;
    }
    Ok(())
}

/// Makes a router on an interface's subnet the way to everywhere else (`SIOCADDRT`).
pub fn add_default_route(interface: &str, gateway: Ipv4Addr) -> io::Result<()> {
    let (socket, mut request) = interface_request(interface)?;
    // SAFETY: an all-zero rtentry is valid.
    let mut route: libc::rtentry = unsafe { zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = route.rt_dst;
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    route.rt_dev = request.ifr_name.as_mut_ptr();
    // SAFETY: SIOCADDRT reads an rtentry, which `route` is, and the terminated name it points to,
    // which lives in `request`.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &route) })?;
    Ok(())
}

/// Makes a whole network of IPv6 addresses the machine's own (`ip -6 route add local NET dev NAME src SOURCE`).
pub fn add_local_route(
    net: Ipv6Addr,
    prefix_len: u8,
    interface: &str,
    source: Option<Ipv6Addr>,
) -> io::Result<()> {
    // rtmsg: family, destination's length, source's, TOS, table, protocol, scope, type; flags
    let mut body = vec![libc::AF_INET6 as u8, prefix_len, 0, 0];
    body.extend([libc::RT_TABLE_LOCAL, libc::RTPROT_BOOT]);
    body.extend([libc::RT_SCOPE_UNIVERSE, libc::RTN_LOCAL]);
    body.extend([0; 4]);
    add_attribute(&mut body, libc::RTA_DST, &net.octets());
    add_attribute(&mut body, libc::RTA_OIF, &interface_index(interface)?.to_ne_bytes());
    if let Some(source) = source {
        add_attribute(&mut body, libc::RTA_PREFSRC, &source.octets());
    }
    netlink_add(libc::RTM_NEWROUTE, &body)
}

/// Gives an interface an address, beside those it has (`ip address add IP dev NAME`).
pub fn add_address(ip: IpAddr, interface: &str) -> io::Result<()> {
    let (family, octets) = match ip {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let prefix_len = 8 * octets.len() as u8;
    // ifaddrmsg: family, prefix length, flags, scope, interface. Nobody else can have the address.
    let mut body = vec![family as u8, prefix_len, libc::IFA_F_NODAD as u8, libc::RT_SCOPE_UNIVERSE];
    body.extend(interface_index(interface)?.to_ne_bytes());
    add_attribute(&mut body, libc::IFA_LOCAL, &octets);
    add_attribute(&mut body, libc::IFA_ADDRESS, &octets);
    netlink_add(libc::RTM_NEWADDR, &body)
}

fn interface_index(name: &str) -> io::Result<u32> {
    let name = c_string(name)?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Adds an attribute (rtnetlink(7)) whose value is whole words long.
fn add_attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    const HEADER_LEN: usize = 4;
    body.extend(((HEADER_LEN + value.len()) as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}

/// Makes one rtnetlink(7) request to add something. What is there already is no error.
fn netlink_add(kind: u16, body: &[u8]) -> io::Result<()> {
    const HEADER_LEN: usize = 16;
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let mut request = Vec::with_capacity(HEADER_LEN + body.len());
    request.extend(((HEADER_LEN + body.len()) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((flags as u16).to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);
    // SAFETY: plain socket call, then calls with a buffer and its length.
    let reply = unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let socket = owned(check(libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE))?);
        if libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut reply = [0_u8; 128];
        if libc::recv(socket.as_raw_fd(), reply.as_mut_ptr().cast(), reply.len(), 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        reply
    };
    // nlmsgerr: the negative errno follows the header.
    let [a, b, c, d] = [0, 1, 2, 3].map(|at| reply[HEADER_LEN + at]);
    match -i32::from_ne_bytes([a, b, c, d]) {
        0 | libc::EEXIST => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
