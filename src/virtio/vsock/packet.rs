//! The vsock packet header (virtio 1.2, 5.10.6): 44 bytes, little-endian. It is decoded once, from a
//! copy, so that it cannot change between check and use.

/// Bytes of a header on the queue.
pub const HEADER_LEN: usize = 44;
/// Most data in one packet, in bytes (Linux's `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PACKET: usize = 64 * 1024;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// The guest's address (contract §3).
pub const GUEST_CID: u64 = 3;
/// The one socket type offered.
const TYPE_STREAM: u16 = 1;

/// The sender will not receive any more (flag of [`Op::Shutdown`]).
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for (`VIRTIO_VSOCK_OP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Open a connection.
    Request = 1,
    /// Accept one.
    Response = 2,
    /// Refuse or abort one.
    Reset = 3,
    /// Announce the end of one or both directions.
    Shutdown = 4,
    /// Carry data.
    Data = 5,
    /// Tell the peer how much it may send.
    CreditUpdate = 6,
    /// Ask for a credit update.
    CreditRequest = 7,
}

impl Op {
    fn from_u16(value: u16) -> Option<Op> {
        Some(match value {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// A connection's two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

/// A packet's header, without the addresses, which are always host and guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The connection.
    pub ports: Ports,
    /// Bytes of data that follow.
    pub len: u32,
    /// What the packet is for.
    pub op: Op,
    /// Flags of [`Op::Shutdown`].
    pub flags: u32,
    /// The sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of that buffer so far, wrapping.
    pub fwd_cnt: u32,
}

/// A packet from the guest that is not for a stream between guest and host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// To be answered with a reset (5.10.6.4.1): the ports are valid, the rest is not.
    Refuse(Ports),
    /// Not to be answered: a reset itself, or for an address that is not the host's.
    Ignore,
}

impl Header {
    /// Reads a header sent by the guest.
    ///
    /// # Errors
    /// This device does not serve such a packet; [`Foreign`] says how to answer it.
    pub fn from_guest(bytes: &[u8; HEADER_LEN]) -> Result<Header, Foreign> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let ports = Ports { guest: u32_at(16), host: u32_at(20) };
        if u64_at(0) != GUEST_CID || u64_at(8) != HOST_CID {
            return Err(Foreign::Ignore);
        }
        match (u16_at(28), Op::from_u16(u16_at(30))) {
            (TYPE_STREAM, Some(op)) => Ok(Header {
                ports,
                len: u32_at(24),
                op,
                flags: u32_at(32),
                buf_alloc: u32_at(36),
                fwd_cnt: u32_at(40),
            }),
            (_, Some(Op::Reset)) => Err(Foreign::Ignore),
            _ => Err(Foreign::Refuse(ports)),
        }
    }

    /// Writes a header for the guest.
    pub fn to_guest(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&HOST_CID.to_le_bytes());
        bytes[8..16].copy_from_slice(&GUEST_CID.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.ports.host.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.ports.guest.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&TYPE_STREAM.to_le_bytes());
        bytes[30..32].copy_from_slice(&(self.op as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// A reset for a connection that this side does not know.
    pub fn reset(ports: Ports) -> Header {
        Header { ports, len: 0, op: Op::Reset, flags: 0, buf_alloc: 0, fwd_cnt: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same packet as the other side would send it.
    fn mirrored(header: Header) -> [u8; HEADER_LEN] {
        let mut bytes = header.to_guest();
        bytes[0..8].copy_from_slice(&GUEST_CID.to_le_bytes());
        bytes[8..16].copy_from_slice(&HOST_CID.to_le_bytes());
        let swapped: [u8; 8] = bytes[16..24].try_into().expect("8 bytes");
        bytes[16..20].copy_from_slice(&swapped[4..]);
        bytes[20..24].copy_from_slice(&swapped[..4]);
        bytes
    }

    #[test]
    fn headers_round_trip() {
        let header = Header {
            ports: Ports { host: 0x0102_0304, guest: 0x0506_0708 },
            len: 9,
            op: Op::Data,
            flags: 3,
            buf_alloc: u32::MAX,
            fwd_cnt: 0x8000_0001,
        };
        assert_eq!(Header::from_guest(&mirrored(header)), Ok(header));
    }

    #[test]
    fn foreign_packets_are_told_apart() {
        let ports = Ports { host: 1, guest: 2 };
        let good = mirrored(Header { op: Op::Request, ..Header::reset(ports) });
        let changed = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            Header::from_guest(&bytes)
        };
        assert_eq!(changed(0, 9), Err(Foreign::Ignore), "wrong source");
        assert_eq!(changed(8, 1), Err(Foreign::Ignore), "wrong destination");
        assert_eq!(changed(28, 2), Err(Foreign::Refuse(ports)), "seqpacket");
        assert_eq!(changed(30, 0), Err(Foreign::Refuse(ports)), "no such operation");
        assert_eq!(changed(31, 1), Err(Foreign::Refuse(ports)), "no such operation");
    }
}
