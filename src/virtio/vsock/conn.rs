//! One vsock connection: packets from the guest and bytes from the host socket in, packets for the
//! guest and bytes for the host socket out. No sockets, queues or clocks here: [`super::mux`] owns
//! those, and carries out what this module decides.
//!
//! Each direction ends on its own (virtio 1.2, 5.10.6.5), so that bytes and ends of file arrive as
//! over a Unix socket pair; a reset follows only when both have ended and everything is delivered.
//!
//! ```text
//!   to the host:   Open ──SHUTDOWN(send) from guest──▶ ending ──buffer drained──▶ ended
//!   to the guest:  Open ──end of file from host──────▶ ending ──SHUTDOWN sent───▶ ended
//!   both ended ──▶ RST to the guest ──▶ gone
//! ```
//!
//! When the guest ends both directions at once, or resets, what it had sent is still delivered. In a TCP
//! flow whose guest has not ended its direction before, either is an abort: undelivered data is dropped.
//!
//! The connection as a whole:
//!
//! | state | who knows of it | still delivered | ends by |
//! |---|---|---|---|
//! | `Requested` | a client of the host; the guest, once it was asked | nothing | answer, refusal |
//! | `Open` | both | both directions, as far as each is open | both directions' ends, a reset |
//! | `Resetting` | both; the guest is still to be told of the end | nothing | the RST that is sent, or the guest's own |
//! | `Forgotten` | the host alone | what the guest had sent | its delivery |
//! | `Closed` | nobody | nothing | its removal from the table |

use std::collections::VecDeque;

use super::packet::{Header, Op, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes the guest may have on the way to one host socket: the memory that one slow reader costs mote.
/// More would not help: Linux's default on the guest's side is 256 KiB too.
pub const BUFFER_LEN: usize = 256 * 1024;
/// Bytes of memory that an idle connection may keep: there may be thousands.
const KEPT_CAPACITY: usize = 16 * 1024;
/// The guest is told of freed buffer space at the latest when one in this many parts of it is free.
const UPDATE_PART: u32 = 4;
/// The end of both directions.
const BOTH: u32 = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;

/// What a read from the host socket gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostRead {
    /// This many bytes, at least one.
    Data(usize),
    /// Nothing for now.
    Empty,
    /// The end.
    End,
    /// An error: the peer is gone without a proper end.
    Broken,
}

/// Where a connection is in its life; see the table above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The host asked; the guest has not answered.
    Requested,
    /// Data may flow.
    Open,
    /// A reset is to be sent, after which the connection is gone.
    Resetting,
    /// The guest has no such connection any more; what it sent is still being delivered.
    Forgotten,
    /// Gone: nothing is left to do.
    Closed,
}

/// State of one connection.
#[derive(Debug)]
pub struct Conn {
    ports: Ports,
    state: State,
    /// The packet that opens the connection, until it is sent.
    opening: Option<Op>,
    /// See [`Conn::set_abortable`].
    abortable: bool,

    /// The guest's receive buffer, and how much it has taken out of it.
    guest_alloc: u32,
    guest_taken: u32,
    /// Bytes sent to the guest, wrapping.
    sent: u32,
    credit_requested: bool,
    guest_receives: bool,
    /// The host socket has reached its end.
    host_ended: bool,
    /// Shutdown flags the guest has been told.
    told_shutdown: u32,

    /// From the guest, not yet taken by the host socket; at most `buffer_len`.
    to_host: VecDeque<u8>,
    /// See [`Conn::set_buffer_len`].
    buffer_len: u32,
    /// Bytes the host socket has taken, wrapping, and the last such count the guest was told.
    taken: u32,
    told_taken: u32,
    update_wanted: bool,
    guest_sends: bool,
    /// The host socket still accepts bytes.
    host_receives: bool,
}

impl Conn {
    fn new(ports: Ports, state: State, opening: Op) -> Self {
        Conn {
            ports,
            state,
            opening: Some(opening),
            abortable: false,
            guest_alloc: 0,
            guest_taken: 0,
            sent: 0,
            credit_requested: false,
            guest_receives: true,
            host_ended: false,
            told_shutdown: 0,
            to_host: VecDeque::new(),
            buffer_len: BUFFER_LEN as u32,
            taken: 0,
            told_taken: 0,
            update_wanted: false,
            guest_sends: true,
            host_receives: true,
        }
    }

    /// A connection that the guest asked for with `request`, and that is accepted.
    pub fn accepted(request: &Header) -> Self {
        let mut conn = Conn::new(request.ports, State::Open, Op::Response);
        conn.note_credit(request);
        conn
    }

    /// A connection that a host client asks the guest for.
    pub fn requested(ports: Ports) -> Self {
        Conn::new(ports, State::Requested, Op::Request)
    }

    /// Sets whether the guest aborts the connection by ending both directions at once, or by a
    /// reset before it has ended its own.
    pub fn set_abortable(&mut self, abortable: bool) {
        self.abortable = abortable;
    }

    /// Gives the guest less room than [`BUFFER_LEN`]. Must be called before the first packet is sent.
    pub fn set_buffer_len(&mut self, len: u32) {
        self.buffer_len = len;
    }

    /// Gives the guest at least this much room, and tells it so.
    pub fn grow_buffer(&mut self, len: u32) {
        if self.buffer_len < len {
            self.buffer_len = len;
            self.update_wanted = true;
        }
    }

    /// Makes a request that the guest has refused again, on other ports. What the client has done
    /// meanwhile, such as closing a direction, stays known.
    pub fn redirect(&mut self, ports: Ports) {
        self.ports = ports;
        self.opening = Some(Op::Request);
    }

    /// The connection's ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Whether the guest still owes an answer to a request.
    pub fn is_requested(&self) -> bool {
        self.state == State::Requested
    }

    /// Whether the guest has been told of the connection.
    pub fn is_announced(&self) -> bool {
        self.opening.is_none()
    }

    /// Whether the guest has reset the connection, and what it had sent is still being delivered.
    pub fn is_forgotten(&self) -> bool {
        self.state == State::Forgotten
    }

    /// Whether the guest is still to be told that the connection is reset.
    pub fn is_resetting(&self) -> bool {
        self.state == State::Resetting
    }

    /// Whether nothing is left to do.
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    fn note_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_taken = header.fwd_cnt;
        // Not asked again when the answer is "still none", which would never end: Linux answers each
        // request at once, and reports room by itself when its reader has made some.
        self.credit_requested &= self.credit() == 0;
    }

    /// How many bytes the guest has room for. A guest that contradicts itself has room for none.
    fn credit(&self) -> usize {
        let on_the_way = self.sent.wrapping_sub(self.guest_taken);
        self.guest_alloc.saturating_sub(on_the_way) as usize
    }

    /// Handles a packet from the guest, with its data.
    pub fn on_packet(&mut self, header: &Header, data: &[u8]) {
        match self.state {
            State::Requested | State::Open => {}
            State::Resetting => {
                // The guest has sent a reset itself, and needs none from us.
                if header.op == Op::Reset {
                    self.state = State::Closed;
                }
                return;
            }
            State::Forgotten | State::Closed => return,
        }
        self.note_credit(header);
        let abortable = self.abortable && self.guest_sends;
        match (header.op, self.state) {
            (Op::Reset, _) if abortable => self.vanish(),
            (Op::Reset, _) => self.forget(),
            (Op::Response, State::Requested) => self.state = State::Open,
            (Op::Data, State::Open) if self.guest_sends => {
                if self.to_host.len() + data.len() > self.buffer_len as usize {
                    // More than its credit allows: keeping it would break the bound, dropping it the stream.
                    self.abort();
                } else if self.host_receives {
                    self.to_host.extend(data);
                }
            }
            (Op::Shutdown, State::Open) if abortable && header.flags & BOTH == BOTH => self.abort(),
            (Op::Shutdown, State::Open) => {
                self.guest_sends &= header.flags & SHUTDOWN_SEND == 0;
                self.guest_receives &= header.flags & SHUTDOWN_RECEIVE == 0;
            }
            (Op::CreditUpdate, State::Open) => {}
            (Op::CreditRequest, State::Open) => self.update_wanted = true,
            _ => self.abort(),
        }
        self.settle();
    }

    /// Handles a reset, which ends the guest's side; the host's side ends when all is delivered.
    pub fn on_reset(&mut self) {
        self.on_packet(&Header::reset(self.ports), &[]);
    }

    /// Handles a reset of the device, which ends the guest's side of every connection. A request that
    /// waits for an answer is made again.
    pub fn on_driver_reset(&mut self) {
        if self.state == State::Requested {
            self.opening = Some(Op::Request);
        } else {
            self.on_reset();
        }
    }

    /// The guest's side is gone; deliver what it had sent, then end.
    fn forget(&mut self) {
        self.state = State::Forgotten;
        self.guest_sends = false;
        self.guest_receives = false;
        self.opening = None;
    }

    /// Ends the connection at once, telling the guest if it still knows of it.
    pub fn abort(&mut self) {
        self.end();
        self.drop_for_host();
    }

    /// Ends the connection, once the guest has been told if it still knows of it.
    fn end(&mut self) {
        self.state = match self.state {
            State::Requested | State::Open | State::Resetting => State::Resetting,
            State::Forgotten | State::Closed => State::Closed,
        };
    }

    /// Ends the connection at once, without telling the guest.
    pub fn vanish(&mut self) {
        self.state = State::Closed;
        self.drop_for_host();
    }

    fn drop_for_host(&mut self) {
        self.host_receives = false;
        // Frees the memory too: the connection may exist for as long as the guest likes.
        self.to_host = VecDeque::new();
    }

    /// Notes that the host socket accepts nothing any more.
    pub fn host_stopped_receiving(&mut self) {
        self.drop_for_host();
        self.settle();
    }

    /// How many bytes are left for the host socket.
    pub fn len_for_host(&self) -> usize {
        self.to_host.len()
    }

    /// Bytes for the host socket, oldest first.
    pub fn for_host(&self) -> &[u8] {
        let (head, tail) = self.to_host.as_slices();
        if head.is_empty() { tail } else { head }
    }

    /// All bytes for the host socket; [`Conn::for_host`] may return only the first part.
    pub fn all_for_host(&mut self) -> &[u8] {
        self.to_host.make_contiguous()
    }

    /// Notes that the host socket took `len` bytes of [`Conn::for_host`].
    pub fn host_took(&mut self, len: usize) {
        self.to_host.drain(..len);
        if self.to_host.is_empty() && self.to_host.capacity() > KEPT_CAPACITY {
            self.to_host = VecDeque::new();
        }
        self.taken = self.taken.wrapping_add(len as u32);
        self.settle();
    }

    /// Whether the guest may still send.
    pub fn guest_sends(&self) -> bool {
        self.guest_sends
    }

    /// Whether the host socket has got all it will ever get, and can be told the end.
    pub fn is_host_direction_over(&self) -> bool {
        !self.guest_sends && self.to_host.is_empty() && self.host_receives
    }

    /// Whether bytes from the host socket still have a receiver.
    pub fn guest_receives(&self) -> bool {
        self.guest_receives
    }

    fn settle(&mut self) {
        let to_guest_over = !self.guest_receives || self.told_shutdown & SHUTDOWN_SEND != 0;
        let to_host_over = !self.guest_sends && self.to_host.is_empty();
        if to_guest_over && to_host_over {
            self.end();
        }
    }

    /// The shutdown flags that are true now.
    fn shutdown_flags(&self) -> u32 {
        let send = if self.host_ended { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_receives { 0 } else { SHUTDOWN_RECEIVE };
        send | receive
    }

    /// The next packet for the guest, if there is one to send. Data is read by `read`, which gets
    /// the largest number of bytes to read (at most `space`).
    pub fn next(
        &mut self,
        space: usize,
        mut read: impl FnMut(usize) -> HostRead,
    ) -> Option<Header> {
        match self.state {
            State::Requested => return self.opening.take().map(|op| self.header(op, 0, 0)),
            State::Open => {}
            State::Resetting => {
                self.state = State::Closed;
                return Some(Header::reset(self.ports));
            }
            State::Forgotten | State::Closed => return None,
        }
        if let Some(op) = self.opening.take() {
            return Some(self.header(op, 0, 0));
        }
        if self.guest_receives && !self.host_ended && self.told_shutdown & SHUTDOWN_SEND == 0 {
            match self.credit().min(space) {
                0 if !self.credit_requested && self.credit() == 0 => {
                    self.credit_requested = true;
                    return Some(self.header(Op::CreditRequest, 0, 0));
                }
                0 => {}
                room => match read(room) {
                    HostRead::Data(len) => {
                        self.sent = self.sent.wrapping_add(len as u32);
                        return Some(self.header(Op::Data, len as u32, 0));
                    }
                    HostRead::Empty => {}
                    HostRead::End => self.host_ended = true,
                    HostRead::Broken => {
                        self.host_ended = true;
                        self.drop_for_host();
                    }
                },
            }
        }
        let shutdown = self.shutdown_flags();
        if shutdown & !self.told_shutdown != 0 {
            self.told_shutdown = shutdown;
            let header = self.header(Op::Shutdown, 0, shutdown);
            self.settle();
            return Some(header);
        }
        let freed = self.taken.wrapping_sub(self.told_taken);
        if self.update_wanted || freed >= self.buffer_len / UPDATE_PART {
            return Some(self.header(Op::CreditUpdate, 0, 0));
        }
        None
    }

    fn header(&mut self, op: Op, len: u32, flags: u32) -> Header {
        self.told_taken = self.taken;
        self.update_wanted = false;
        Header {
            ports: self.ports,
            len,
            op,
            flags,
            buf_alloc: self.buffer_len,
            fwd_cnt: self.taken,
        }
    }
}

#[cfg(test)]
#[path = "conn_test.rs"]
mod tests;
