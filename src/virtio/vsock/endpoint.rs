//! The host's end of one connection: its socket, and bytes read from it that the guest had no room for.
//! No queues and no event loop: [`super::mux`] calls this when there is something to do. No call waits.
//!
//! Connections of the box's own sockets and published ports have a socket from the start. An outgoing
//! flow ([`mote_agent::flow`]) gets its socket when the guest's request is complete:
//!
//! ```text
//!   outgoing:   Awaiting ──request──▶ Connecting ──▶ Tcp     published:   Tcp, Client
//!                  ├─────request─────────────────▶ Udp
//!                  └─────request──(Connecting)───▶ Refused
//! ```
//!
//! A TCP connection that does not end in order is reset, whatever the reason, even if mote dies: its
//! socket is set to reset on close from the start. It is set to close in order when the guest has ended
//! its direction and all that it sent is delivered.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use event_manager::EventSet;
use mote_agent::flow::{
    CHUNK_HEADER_LEN, DATAGRAM_HEADER_LEN, MAX_DATAGRAM_LEN, Protocol, Published,
};

use super::client::Client;
use super::conn::{Conn, HostRead};
use super::flow::{self, Rest, TooLong};
use super::packet::MAX_PACKET;
use crate::sys;

// The buffer for packets holds any datagram.
const _: () = assert!(DATAGRAM_HEADER_LEN + MAX_DATAGRAM_LEN <= MAX_PACKET);

/// Most datagrams that one flow sends before all others have their turn: a guest's packet may hold 32,768
/// empty datagrams, and its queue 256 such packets.
const DATAGRAM_BATCH: usize = 32;

/// The host's end of a connection.
#[derive(Debug)]
pub struct Endpoint {
    socket: Socket,
    /// Whether there may be something to read, and room to write: true until the socket would have
    /// blocked.
    readable: bool,
    writable: bool,
    read_shut: bool,
    write_shut: bool,
    /// Bytes that go to the guest first; fewer than [`MAX_PACKET`].
    rest: Rest,
    /// Most bytes that are read at once when the guest has room for fewer.
    read_ahead: usize,
    /// TCP: the guest has been sent the chunk that ends the stream.
    end_sent: bool,
    /// TCP: writing failed and so took the socket's error, which reading will not find any more.
    broken: bool,
    /// UDP: an error to report to the guest. Only the latest: a UDP socket keeps only one.
    error: Option<i32>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    /// No socket before the guest's request.
    Awaiting,
    Connecting(TcpStream),
    Tcp(TcpStream),
    Udp(UdpSocket),
    /// Of a published UDP port: it has no socket of its own.
    Client(Client),
    /// Connecting failed: no socket, but the guest is told why.
    Refused,
}

impl Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| match self {
            Socket::Unix(socket) => socket.read(buffer),
            Socket::Tcp(socket) => socket.read(buffer),
            Socket::Udp(socket) => socket.recv(buffer),
            Socket::Client(client) => client.next(buffer),
            Socket::Awaiting | Socket::Connecting(_) | Socket::Refused => {
                Err(ErrorKind::WouldBlock.into())
            }
        })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        uninterrupted(|| match self {
            Socket::Unix(socket) => socket.write(bytes),
            Socket::Tcp(socket) => socket.write(bytes),
            Socket::Udp(socket) => socket.send(bytes),
            Socket::Client(client) => {
                client.answer(bytes);
                Ok(bytes.len())
            }
            Socket::Awaiting | Socket::Connecting(_) | Socket::Refused => {
                Err(ErrorKind::WouldBlock.into())
            }
        })
    }

    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Socket::Unix(socket) => socket.shutdown(how),
            Socket::Tcp(socket) => socket.shutdown(how),
            _ => Ok(()),
        }
    }
}

fn uninterrupted(mut f: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match f() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// An errno for the guest.
fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

impl Endpoint {
    fn new(socket: Socket, rest: Rest) -> Self {
        Endpoint {
            socket,
            readable: true,
            writable: true,
            read_shut: false,
            write_shut: false,
            rest,
            read_ahead: MAX_PACKET,
            end_sent: false,
            broken: false,
            error: None,
        }
    }

    /// A Unix socket, whose bytes and half-closes are passed on as they are.
    ///
    /// # Errors
    /// The host refuses to adjust the socket.
    pub fn unix(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Endpoint::new(Socket::Unix(socket), Rest::default()))
    }

    /// A client of a published port.
    ///
    /// # Errors
    /// The host refuses to adjust the socket, for instance because the client has gone.
    pub fn published(socket: TcpStream, header: Published) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        prepare_tcp(&socket)?;
        Ok(Endpoint::new(Socket::Tcp(socket), Rest::new(&header.encode())))
    }

    /// A client of a published UDP port.
    pub fn client(client: Client, header: Published) -> Self {
        Endpoint::new(Socket::Client(client), Rest::new(&header.encode()))
    }

    /// The client of a published UDP port, if this is one.
    pub fn as_client(&self) -> Option<&Client> {
        match &self.socket {
            Socket::Client(client) => Some(client),
            _ => None,
        }
    }

    /// Takes a datagram of such a client.
    pub fn take_datagram(&mut self, datagram: &[u8], now: Instant) {
        if let Socket::Client(client) = &mut self.socket {
            client.take(datagram, now);
            self.readable = true;
        }
    }

    /// An outgoing flow whose destination is not known yet.
    pub fn awaiting() -> Self {
        Endpoint::new(Socket::Awaiting, Rest::default())
    }

    /// Sets how many bytes are read from a stream at once when the guest has room for fewer.
    pub fn set_read_ahead(&mut self, len: usize) {
        self.read_ahead = len;
    }

    /// Makes the next [`Endpoint::flush`] try to write even though the socket was full: epoll reports room
    /// only when there is much of it.
    pub fn try_to_write(&mut self) {
        self.writable = true;
    }

    /// Whether this is the endpoint of a flow.
    pub fn is_flow(&self) -> bool {
        !matches!(self.socket, Socket::Unix(_))
    }

    /// Whether this is an outgoing flow whose request has not arrived yet.
    pub fn is_awaiting(&self) -> bool {
        matches!(self.socket, Socket::Awaiting)
    }

    /// The descriptor to watch, if there is one.
    pub fn fd(&self) -> Option<RawFd> {
        match &self.socket {
            Socket::Unix(socket) => Some(socket.as_raw_fd()),
            Socket::Connecting(socket) | Socket::Tcp(socket) => Some(socket.as_raw_fd()),
            Socket::Udp(socket) => Some(socket.as_raw_fd()),
            Socket::Client(_) | Socket::Awaiting | Socket::Refused => None,
        }
    }

    /// Starts connecting to the guest's destination.
    ///
    /// # Errors
    /// The host refuses at once; [`Endpoint::check_connecting`] finds errors that come later.
    pub fn connect(&mut self, protocol: Protocol, destination: SocketAddr) -> io::Result<()> {
        match protocol {
            Protocol::Tcp => {
                let socket = sys::socket::connect_tcp(destination)?;
                prepare_tcp(&socket)?;
                self.socket = Socket::Connecting(socket);
            }
            Protocol::Udp => {
                self.socket = Socket::Udp(sys::socket::connect_udp(destination)?);
                self.rest = Rest::new(&flow::status(0));
            }
        }
        Ok(())
    }

    /// Checks whether connecting has succeeded, if the endpoint is connecting.
    ///
    /// # Errors
    /// It failed; the caller passes the error to [`Endpoint::refuse`].
    pub fn check_connecting(&mut self) -> io::Result<()> {
        let Socket::Connecting(socket) = &self.socket else { return Ok(()) };
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
        if socket.peer_addr().is_ok()
            && let Socket::Connecting(socket) = std::mem::replace(&mut self.socket, Socket::Refused)
        {
            self.socket = Socket::Tcp(socket);
            self.rest = Rest::new(&flow::status(0));
        }
        Ok(())
    }

    /// Gives up a flow that could not be connected, and tells the guest the error. This closes the
    /// socket, which must not be watched any more.
    pub fn refuse(&mut self, error: &io::Error, conn: &mut Conn) {
        self.socket = Socket::Refused;
        self.rest = Rest::new(&flow::status(errno(error)));
        conn.host_stopped_receiving();
    }

    /// Notes what epoll has reported.
    pub fn note_events(&mut self, set: EventSet, conn: &mut Conn) {
        let over = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.readable |= over || set.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        self.writable |= set.contains(EventSet::OUT);
        // HANG_UP: both directions are closed. If we closed ours before, only the peer's end is new.
        // An error of a UDP socket concerns one datagram, and reading returns it.
        if over && !self.write_shut && matches!(self.socket, Socket::Unix(_) | Socket::Tcp(_)) {
            conn.host_stopped_receiving();
        }
    }

    /// Writes as much of the guest's data as the socket takes, and closes each direction that is over.
    /// Returns whether to call this again when all others had their turn: epoll will not report it.
    pub fn flush(&mut self, conn: &mut Conn) -> bool {
        match &self.socket {
            Socket::Unix(_) | Socket::Tcp(_) => {
                self.write_stream(conn);
                self.shut(conn);
                false
            }
            Socket::Udp(_) | Socket::Client(_) => self.send_datagrams(conn),
            Socket::Awaiting | Socket::Connecting(_) | Socket::Refused => false,
        }
    }

    fn shut(&mut self, conn: &Conn) {
        if conn.is_host_direction_over() && !std::mem::replace(&mut self.write_shut, true) {
            // Fails only if the peer is gone, which reading will find.
            let _ = self.socket.shutdown(Shutdown::Write);
            if let Socket::Tcp(socket) = &self.socket {
                let _ = sys::socket::set_reset_on_close(socket, false);
            }
        }
        if !conn.guest_receives() && !std::mem::replace(&mut self.read_shut, true) {
            // So that a client's writes fail, rather than fill a buffer that nobody reads.
            let _ = self.socket.shutdown(Shutdown::Read);
        }
    }

    fn write_stream(&mut self, conn: &mut Conn) {
        while self.writable && !conn.for_host().is_empty() {
            match self.socket.write(conn.for_host()) {
                Ok(taken) => conn.host_took(taken),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) => {
                    // EPIPE: the peer had ended its direction in order before, and reading finds that end.
                    self.broken = error.kind() != ErrorKind::BrokenPipe;
                    conn.host_stopped_receiving();
                }
            }
        }
    }

    fn send_datagrams(&mut self, conn: &mut Conn) -> bool {
        for _ in 0..DATAGRAM_BATCH {
            if !self.writable {
                return false;
            }
            let datagram = match flow::first_datagram(conn.all_for_host()) {
                Ok(Some(datagram)) => datagram,
                Ok(None) => {
                    if !conn.guest_sends() {
                        // Half a datagram, whose rest will never come.
                        conn.host_took(conn.for_host().len());
                    }
                    return false;
                }
                Err(TooLong) => {
                    conn.abort();
                    return false;
                }
            };
            let mut sent = self.socket.write(datagram);
            if let Err(error) = &sent
                && error.kind() == ErrorKind::ConnectionRefused
            {
                // The answer to an earlier datagram; this one was not sent.
                self.error = Some(errno(error));
                sent = self.socket.write(datagram);
            }
            let len = DATAGRAM_HEADER_LEN + datagram.len();
            match sent {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.writable = false;
                    return false;
                }
                Err(error) => self.error = Some(errno(&error)),
            }
            conn.host_took(len);
        }
        true
    }

    /// Reads the next bytes for the guest into the start of `buffer`, at most `room`. The buffer has
    /// [`MAX_PACKET`] bytes; a read from the socket may use it as far as the read-ahead allows, and bytes
    /// beyond `room` come first next time. Linux's guests have buffers of 4 KiB, and a read for each of
    /// them was measured to halve the throughput.
    pub fn read(&mut self, buffer: &mut [u8], room: usize) -> HostRead {
        match self.rest.take(&mut buffer[..room]) {
            0 => {}
            len => return HostRead::Data(len),
        }
        let most = buffer.len().min(room.max(self.read_ahead));
        match self.socket {
            Socket::Unix(_) => match self.read_stream(&mut buffer[..most]) {
                HostRead::Data(len) => HostRead::Data(self.rest.keep(&buffer[..len], room)),
                other => other,
            },
            Socket::Tcp(_) => self.read_chunk(&mut buffer[..most], room),
            Socket::Udp(_) | Socket::Client(_) => self.receive_datagram(buffer, room),
            Socket::Awaiting | Socket::Connecting(_) => HostRead::Empty,
            Socket::Refused => HostRead::End,
        }
    }

    fn read_stream(&mut self, buffer: &mut [u8]) -> HostRead {
        if !self.readable {
            return HostRead::Empty;
        }
        match self.socket.read(buffer) {
            Ok(0) => HostRead::End,
            Ok(len) => HostRead::Data(len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                HostRead::Empty
            }
            Err(_) => HostRead::Broken,
        }
    }

    fn read_chunk(&mut self, buffer: &mut [u8], room: usize) -> HostRead {
        if self.end_sent {
            return HostRead::End;
        }
        let len = match self.read_stream(&mut buffer[CHUNK_HEADER_LEN..]) {
            HostRead::Data(len) => len,
            HostRead::End if self.broken => return HostRead::Broken,
            HostRead::End => {
                self.end_sent = true;
                0
            }
            other => return other,
        };
        HostRead::Data(self.rest.keep(flow::chunk(buffer, len), room))
    }

    fn receive_datagram(&mut self, buffer: &mut [u8], room: usize) -> HostRead {
        if let Some(errno) = self.error.take() {
            return HostRead::Data(self.rest.keep(flow::datagram_error(buffer, errno), room));
        }
        if !self.readable {
            return HostRead::Empty;
        }
        let framed = match self.socket.read(&mut buffer[DATAGRAM_HEADER_LEN..]) {
            Ok(len) => flow::datagram(buffer, len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                return HostRead::Empty;
            }
            Err(error) => flow::datagram_error(buffer, errno(&error)),
        };
        HostRead::Data(self.rest.keep(framed, room))
    }
}

/// How long a TCP connection may be silent before its peer is probed, in seconds; how often then; and
/// after how many probes without an answer the connection ends.
const KEEPALIVE_IDLE_S: libc::c_int = 120;
const KEEPALIVE_INTERVAL_S: libc::c_int = 30;
const KEEPALIVE_PROBES: libc::c_int = 4;

/// Sets the options of every TCP connection. No Nagle delay: the guest's own socket has applied it if it
/// was wanted. Keepalive, so that a vanished peer is noticed: a keepalive that the guest's program sets
/// on its own socket only reaches the agent.
fn prepare_tcp(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    sys::socket::set_keepalive(socket, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES)?;
    sys::socket::set_reset_on_close(socket, true)
}
