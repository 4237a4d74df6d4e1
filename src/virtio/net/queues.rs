//! The queues of the network device: frames between the driver's buffers and the connections.

use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};

use super::filter::{FrameFilter, Side};
use super::passt::{Connection, FRAME_LEN, Lost};
use super::peers::{Peers, Way};
use crate::memory::GuestRam;
use crate::virtio::buffers::{Reader, Writer};
use crate::virtio::device::ConfigSpace;
use crate::virtio::queue::{Chain, ServedQueue};

/// Receive, transmit.
pub(super) const QUEUE_SIZES: [u16; 2] = [256, 256];
/// `struct virtio_net_hdr_v1` (5.1.6): the same length with and without merged buffers.
const HEADER_LEN: usize = 12;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;
/// Most frames to the guest before the main loop turns to other work.
const RECEIVE_BATCH: usize = 128;
/// How often the outgoing buffer may be filled, or the whole queue emptied, before the main loop turns
/// to other work.
const TRANSMIT_BATCH: usize = 8;

/// The queues, from activation to reset.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) ram: GuestRam,
    pub(super) receive: ServedQueue,
    pub(super) transmit: ServedQueue,
    pub(super) config: ConfigSpace,
    /// Whether a frame may fill several receive buffers.
    pub(super) merge: bool,
    /// First byte of each received frame's header.
    pub(super) header_flags: u8,
}

/// A receive buffer that a frame has filled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filled {
    /// Its descriptor chain.
    head: u16,
    /// How many bytes were written into it.
    len: u32,
}

/// Whose fault it is that frames cannot be moved.
#[derive(Debug)]
pub(super) enum Fault {
    /// The driver broke its own queue: the device stops.
    Driver(anyhow::Error),
    /// The connection to passt is lost: the link goes down.
    Passt(Lost),
    /// The connection to the switch is lost: the box has no peers any more.
    Peers(Lost),
}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Self {
        Fault::Driver(error)
    }
}

impl From<Lost> for Fault {
    fn from(lost: Lost) -> Self {
        Fault::Passt(lost)
    }
}

impl Queues {
    pub(super) fn receive_from(
        &mut self,
        passt: &mut Connection,
        peers: Option<&mut Peers>,
        filter: &mut FrameFilter,
        filled: &mut Vec<Filled>,
    ) -> Result<(), Fault> {
        while let Some(answer) = filter.answer() {
            if !self.deliver(answer, filled)? {
                return Ok(());
            }
            filter.take_answer();
        }
        let peers = peers.map(|peers| (Side::Peers, &mut peers.connection));
        let mut sides = [Some((Side::Passt, passt)), peers];
        for _ in 0..RECEIVE_BATCH {
            let mut is_over = true;
            for (side, connection) in sides.iter_mut().flatten() {
                let lost = |lost| match side {
                    Side::Passt => Fault::Passt(lost),
                    Side::Peers => Fault::Peers(lost),
                };
                let Some(frame) = connection.frame().map_err(lost)? else { continue };
                let len = frame.len();
                if !self.deliver(frame, filled)? {
                    return Ok(());
                }
                filter.note(frame, *side);
                connection.take_frame(len);
                is_over = false;
            }
            if is_over {
                return Ok(());
            }
        }
        // There may be more frames: they wait until all others had their turn.
        Ok(self.receive.kick().write(1).context("go on receiving")?)
    }

    pub(super) fn transmit_to(
        &mut self,
        passt: &mut Connection,
        mut peers: Option<&mut Peers>,
        filter: &mut FrameFilter,
    ) -> Result<(), Fault> {
        let Queues { ram, transmit, .. } = self;
        for _ in 0..TRANSMIT_BATCH {
            // A socket is full: epoll reports when it has room again.
            if !passt.flush()? || !flush(&mut peers)? {
                return Ok(());
            }
            // This loop needs a bound of its own: invalid frames are dropped and take no room, so that
            // a driver could keep it going for ever.
            for _ in 0..QUEUE_SIZES[1] {
                if !passt.has_room() || peers.as_ref().is_some_and(|p| !p.connection.has_room()) {
                    break;
                }
                let Some(chain) = transmit.pop_or_wait(ram)? else {
                    flush(&mut peers)?;
                    passt.flush()?;
                    return Ok(());
                };
                let head = chain.head_index();
                // An invalid frame is dropped, and one that is refused.
                let _ = put(chain, ram, passt, peers.as_deref_mut(), filter);
                transmit.push(ram, head, 0)?;
            }
        }
        Ok(transmit.kick().write(1).context("go on sending")?)
    }

    /// Copies a frame into receive buffers. `false` when there are not enough of them yet. Without
    /// merged buffers, a frame that is too long for its one buffer is dropped.
    fn deliver(&mut self, frame: &[u8], filled: &mut Vec<Filled>) -> Result<bool> {
        let Queues { ram, receive, .. } = self;
        filled.clear();
        let mut rest = frame;
        let mut header = None;
        while header.is_none() || !rest.is_empty() {
            let Some(chain) = receive.pop_or_wait(ram)? else {
                for _ in filled.drain(..) {
                    receive.unpop();
                }
                return Ok(false);
            };
            // The driver may offer empty buffers: no number of those would be enough.
            ensure!(
                filled.len() < QUEUE_SIZES[0].into(),
                "a frame fills more buffers than there are"
            );
            let head = chain.head_index();
            let mut writer = Writer::new(chain, ram)?;
            let mut len = 0;
            if header.is_none() {
                let front = writer.split_off_front(HEADER_LEN);
                header = Some(front.context("a receive buffer without a header")?);
                len = HEADER_LEN;
            }
            if !self.merge && writer.available_bytes() < rest.len() {
                receive.unpop();
                return Ok(true);
            }
            let written = writer.write(rest)?;
            rest = &rest[written..];
            filled.push(Filled { head, len: (len + written) as u32 });
        }
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.header_flags;
        bytes[NUM_BUFFERS..].copy_from_slice(&(filled.len() as u16).to_le_bytes());
        if let Some(mut header) = header {
            header.write_all(&bytes)?;
        }
        for Filled { head, len } in filled.drain(..) {
            receive.push(ram, head, len)?;
        }
        Ok(true)
    }
}

/// Writes the frames for peers; `false` when their switch takes no more at the moment.
fn flush(peers: &mut Option<&mut Peers>) -> Result<bool, Fault> {
    peers.as_mut().map_or(Ok(true), |peers| peers.connection.flush().map_err(Fault::Peers))
}

/// Adds the driver's frame to what is sent to passt or to peers, without its header, which neither needs. It is
/// judged after it was copied: the driver can change it no more.
fn put(
    chain: Chain<'_>,
    ram: &GuestRam,
    passt: &mut Connection,
    peers: Option<&mut Peers>,
    filter: &mut FrameFilter,
) -> Result<()> {
    let mut reader = Reader::new(chain, ram)?;
    reader.read_exact(&mut [0; HEADER_LEN])?;
    let len = reader.available_bytes();
    ensure!(FRAME_LEN.contains(&len), "a frame of {len} bytes");
    passt.put_frame(len, |bytes| {
        reader.read_exact(bytes)?;
        let Some(peers) = peers else {
            ensure!(filter.admits(bytes, Side::Passt), "a frame that is refused");
            return Ok(());
        };
        let way = peers.way(bytes);
        let side = if way == Way::Passt { Side::Passt } else { Side::Peers };
        ensure!(filter.admits(bytes, side), "a frame that is refused");
        if side == Side::Peers {
            peers.connection.put_copy(bytes);
        }
        ensure!(way != Way::Peers, "a frame that is not for passt");
        Ok(())
    })
}
