//! virtio-net (virtio 1.2, 5.1) on passt: Ethernet frames between the driver's queues and a
//! [`Connection`], in the main loop.
//!
//! The features offered are those that a stream of plain frames can carry:
//!
//! - `CSUM`: the driver may leave TCP and UDP checksums out. passt terminates the connections and does
//!   not check them.
//! - `GUEST_CSUM`: frames arrive with `DATA_VALID`. passt has just computed their checksums, and there
//!   is no wire between passt and the guest that could change a bit.
//! - `MRG_RXBUF`: a large frame may fill several small buffers.
//! - `MTU`: see [`MTU`]. With it segmentation offloads would be of no use: a frame is as long as a
//!   segment can be.
//! - `STATUS`: the link goes down when the connection to passt ends.
//!
//! A side that cannot take more holds up the other: no frame is read from passt while the driver has
//! no buffers, and none is taken from the driver while the socket is full. Without passt the link is
//! down: frames from the driver are dropped, and the device tries to connect again. A [`filter`] says
//! which of the driver's frames go out at all; some of them go to [`peers`] in place of passt.

pub mod filter;
pub mod passt;
pub mod peers;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use event_manager::EventSet;
use filter::{FrameFilter, Side};
use passt::{Connection, FRAME_LEN, Lost, Reconnect};
use peers::{Peers, Way};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_S_LINK_UP,
};

use crate::log::{self, LogOnce};
use crate::memory::GuestRam;
use crate::virtio::buffers::{Reader, Writer};
use crate::virtio::device::{Activation, ConfigSpace, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::virtio::main_loop::{MainLoopDevice, Properties, Watcher};
use crate::virtio::queue::{Chain, ServedQueue};

/// Receive, transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Largest IP packet: what passt itself announces (`--mtu`), an Ethernet frame of 65,535 bytes less
/// its header, rounded down for alignment. No wire asks for less, and a large frame costs about as
/// much as a small one.
pub const MTU: u16 = 65_520;
/// `struct virtio_net_hdr_v1` (5.1.6): the same length with and without merged buffers.
const HEADER_LEN: usize = 12;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;
/// Offset of `status` in the configuration space (5.1.4).
const STATUS_OFFSET: u32 = 6;
/// Most frames to the guest before the main loop turns to other work.
const RECEIVE_BATCH: usize = 128;
/// How often the outgoing buffer may be filled, or the whole queue emptied, before the main loop turns
/// to other work.
const TRANSMIT_BATCH: usize = 8;
/// How long to wait before connecting to passt again, at first and after many failures.
const RETRY_PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// What is watched: notifications of both queues, the connection to passt, and that to peers.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const PASST: u32 = 2;
const PEERS: u32 = 3;

/// `struct virtio_net_config` up to the last field that a feature offers: address, status, number of
/// queue pairs (without meaning here), MTU.
fn config_space(mac: [u8; 6]) -> Vec<u8> {
    [&mac[..], &link_status(true), &[0; 2], &MTU.to_le_bytes()].concat()
}

fn link_status(up: bool) -> [u8; 2] {
    (if up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 }).to_le_bytes()
}

/// The queues, from activation to reset.
#[derive(Debug)]
struct Queues {
    ram: GuestRam,
    receive: ServedQueue,
    transmit: ServedQueue,
    config: ConfigSpace,
    /// Whether a frame may fill several receive buffers.
    merge: bool,
    /// First byte of each received frame's header.
    header_flags: u8,
}

/// A receive buffer that a frame has filled.
#[derive(Debug, Clone, Copy)]
struct Filled {
    /// Its descriptor chain.
    head: u16,
    /// How many bytes were written into it.
    len: u32,
}

/// Whose fault it is that frames cannot be moved.
#[derive(Debug)]
enum Fault {
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

/// The device at work.
#[derive(Debug)]
pub struct Net {
    mac: [u8; 6],
    queues: Option<Queues>,
    passt: Option<Connection>,
    /// `None` if there are none, or their switch has ended.
    peers: Option<Peers>,
    filter: FrameFilter,
    /// How to connect to passt again; `None` if the connection was inherited.
    reconnect: Option<Reconnect>,
    linked_at: Instant,
    /// When to connect to passt again.
    retry_at: Option<Instant>,
    /// How long to wait after the next failure.
    pause: Duration,
    /// What the driver's configuration space says.
    shown_up: bool,
    /// Receive buffers that the current frame has filled.
    filled: Vec<Filled>,
    /// For the driver's faults.
    complaint: LogOnce,
}

impl Net {
    /// A device with this hardware address, its link up, on a connection to passt, to which it sends the
    /// frames that `filter` admits; `reconnect` makes a new connection when this one is lost.
    ///
    /// # Errors
    /// The host refuses to adjust the socket.
    pub fn new(
        mac: [u8; 6],
        socket: UnixStream,
        filter: FrameFilter,
        reconnect: Option<Reconnect>,
    ) -> Result<Self> {
        Ok(Net {
            mac,
            queues: None,
            passt: Some(Connection::new(socket).context("prepare the connection to passt")?),
            peers: None,
            filter,
            reconnect,
            linked_at: Instant::now(),
            retry_at: None,
            pause: RETRY_PAUSE[0],
            shown_up: true,
            filled: Vec::new(),
            complaint: LogOnce::default(),
        })
    }

    /// Gives the box peers.
    pub fn connect_peers(&mut self, peers: Peers) {
        self.peers = Some(peers);
    }

    fn on_peers(&mut self, set: EventSet) -> Result<(), Fault> {
        let Some(peers) = &mut self.peers else { return Ok(()) };
        if peers.connection.note(set) {
            self.transmit()?;
        }
        self.receive()?;
        if set.contains(EventSet::HANG_UP) { Err(Fault::Peers(Lost::Closed)) } else { Ok(()) }
    }

    fn on_passt(&mut self, set: EventSet) -> Result<(), Fault> {
        let Some(passt) = &mut self.passt else { return Ok(()) };
        if passt.note(set) {
            self.transmit()?;
        }
        self.receive()?;
        // Frames that the driver cannot take yet are dropped: passt has gone.
        if set.contains(EventSet::HANG_UP) { Err(Lost::Closed.into()) } else { Ok(()) }
    }

    /// Moves frames from passt to the driver.
    fn receive(&mut self) -> Result<(), Fault> {
        let Some(queues) = &mut self.queues else { return Ok(()) };
        queues.receive.clear_kick();
        let Some(passt) = &mut self.passt else { return Ok(()) };
        let moved =
            queues.receive_from(passt, self.peers.as_mut(), &mut self.filter, &mut self.filled);
        queues.receive.notify(&queues.ram)?;
        moved
    }

    /// Moves frames from the driver to passt, or drops them when there is no connection.
    fn transmit(&mut self) -> Result<(), Fault> {
        let Some(queues) = &mut self.queues else { return Ok(()) };
        let Some(passt) = &mut self.passt else {
            return Ok(queues.transmit.serve(&queues.ram, QUEUE_SIZES[1].into(), |_| 0)?);
        };
        queues.transmit.clear_kick();
        let moved = queues.transmit_to(passt, self.peers.as_mut(), &mut self.filter);
        queues.transmit.notify(&queues.ram)?;
        moved?;
        if self.filter.answer().is_some() { self.receive() } else { Ok(()) }
    }

    /// Stops the device or takes the link down, depending on whose fault it is. The errors returned
    /// are those of the main loop.
    fn judge(&mut self, moved: Result<(), Fault>, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        match moved {
            Ok(()) => Ok(()),
            Err(Fault::Driver(error)) => {
                self.complaint.error(&format!("net: {error:#}; the device stops"));
                self.reset(watcher)
            }
            Err(Fault::Passt(lost)) => self.take_link_down(&lost, watcher),
            Err(Fault::Peers(lost)) => self.lose_peers(&lost, watcher),
        }
    }

    fn lose_peers(&mut self, lost: &Lost, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Some(peers) = self.peers.take() else { return Ok(()) };
        watcher.remove(peers.connection.socket())?;
        log::warn(&format!(
            "net: mote-switch {lost}; the other boxes of the network are out of reach for good"
        ));
        // What waited for room there.
        let moved = self.transmit();
        self.judge(moved, watcher)
    }

    fn take_link_down(&mut self, lost: &Lost, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Some(passt) = self.passt.take() else { return Ok(()) };
        watcher.remove(passt.socket())?;
        // Not only closed: the process that mote has inherited the socket from may hold it too.
        let _ = passt.socket().shutdown(Shutdown::Both);
        let now = Instant::now();
        // If connections never last, mote must not connect, and log that, ten times a second.
        if now - self.linked_at >= RETRY_PAUSE[1] {
            self.pause = RETRY_PAUSE[0];
        }
        let outlook = match &self.reconnect {
            Some(again) => format!("until somebody serves {} again", again.path.display()),
            None => "for good, since its socket was inherited".into(),
        };
        log::warn(&format!("net: passt {lost}; the link is down {outlook}"));
        if self.reconnect.is_some() {
            self.retry_in(now);
        }
        self.show_link()?;
        // Returns the buffers with frames that could not be sent to the driver.
        let moved = self.transmit();
        self.judge(moved, watcher)
    }

    fn retry_in(&mut self, now: Instant) {
        self.retry_at = Some(now + self.pause);
        self.pause = (self.pause * 2).min(RETRY_PAUSE[1]);
    }

    /// Connects to passt again, if it is time.
    fn retry(&mut self, now: Instant, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        if self.retry_at.is_none_or(|at| now < at) {
            return Ok(());
        }
        let Some(again) = &mut self.reconnect else { return Ok(()) };
        let connected = (again.connect)().and_then(Connection::new).map_err(Into::into);
        match connected.and_then(|passt| watch(&passt, PASST, watcher).map(|()| passt)) {
            Ok(passt) => {
                let path = again.path.display();
                log::info(&format!("net: passt serves {path} again; the link is up"));
                self.passt = Some(passt);
                (self.retry_at, self.linked_at) = (None, now);
                self.show_link()
            }
            Err(_) => {
                self.retry_in(now);
                Ok(())
            }
        }
    }

    /// Tells the driver whether the link is up.
    fn show_link(&mut self) -> Result<()> {
        let up = self.passt.is_some();
        let Some(queues) = self.queues.as_ref().filter(|_| self.shown_up != up) else {
            return Ok(());
        };
        queues.config.change(STATUS_OFFSET, &link_status(up))?;
        self.shown_up = up;
        Ok(())
    }
}

impl MainLoopDevice for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn properties(&self) -> Properties {
        let features = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
        ];
        let features = features.into_iter().fold(0, |all, bit| all | 1 << bit);
        Properties {
            id: VIRTIO_ID_NET,
            features: features | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX,
            queue_sizes: &QUEUE_SIZES,
            config: config_space(self.mac),
        }
    }

    fn register(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let connections =
            [(self.passt.as_ref(), PASST), (self.peers.as_ref().map(|p| &p.connection), PEERS)];
        for (connection, source) in connections {
            connection.map_or(Ok(()), |connection| watch(connection, source, watcher))?;
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.reset(watcher)?;
        let Activation { ram, features, queues, interrupt, config } = activation;
        let [receive, transmit] = ServedQueue::take_over(queues, features, &interrupt)?;
        for (kick, source) in [(receive.kick(), RECEIVE), (transmit.kick(), TRANSMIT)] {
            watcher.add(kick, source, EventSet::IN)?;
        }
        let agreed = |bit: u32| features & 1 << bit != 0;
        let valid = agreed(VIRTIO_NET_F_GUEST_CSUM);
        self.queues = Some(Queues {
            ram,
            receive,
            transmit,
            config,
            merge: agreed(VIRTIO_NET_F_MRG_RXBUF),
            header_flags: if valid { VIRTIO_NET_HDR_F_DATA_VALID as u8 } else { 0 },
        });
        self.show_link()?;
        let moved = self.transmit().and_then(|()| self.receive());
        self.judge(moved, watcher)
    }

    fn reset(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Some(queues) = self.queues.take() else { return Ok(()) };
        for queue in [&queues.receive, &queues.transmit] {
            watcher.remove(queue.kick())?;
        }
        Ok(())
    }

    fn handle(&mut self, source: u32, set: EventSet, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let moved = match source {
            RECEIVE => self.receive(),
            TRANSMIT => self.transmit(),
            PASST => self.on_passt(set),
            PEERS => self.on_peers(set),
            _ => Ok(()),
        };
        self.judge(moved, watcher)
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.retry_at
    }

    fn end_round(&mut self, now: Instant, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.retry(now, watcher)
    }
}

fn watch(connection: &Connection, source: u32, watcher: &mut Watcher<'_, '_>) -> Result<()> {
    let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    Ok(watcher.add(connection.socket(), source, set)?)
}

impl Queues {
    fn receive_from(
        &mut self,
        passt: &mut Connection,
        mut peers: Option<&mut Peers>,
        filter: &mut FrameFilter,
        filled: &mut Vec<Filled>,
    ) -> Result<(), Fault> {
        while let Some(answer) = filter.answer() {
            if !self.deliver(answer, filled)? {
                return Ok(());
            }
            filter.take_answer();
        }
        for _ in 0..RECEIVE_BATCH {
            let mut is_over = true;
            if let Some(frame) = passt.frame()? {
                let len = frame.len();
                if !self.deliver(frame, filled)? {
                    return Ok(());
                }
                filter.note(frame, Side::Passt);
                if let Some(peers) = &mut peers {
                    peers.note_passt(frame);
                }
                passt.take_frame(len);
                is_over = false;
            }
            if let Some(Peers { connection, .. }) = &mut peers
                && let Some(frame) = connection.frame().map_err(Fault::Peers)?
            {
                let len = frame.len();
                if !self.deliver(frame, filled)? {
                    return Ok(());
                }
                filter.note(frame, Side::Peers);
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

    fn transmit_to(
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

#[cfg(any(test, fuzzing))]
pub(crate) mod bench;
#[cfg(test)]
mod tests;
