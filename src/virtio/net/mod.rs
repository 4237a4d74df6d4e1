//! virtio-net (virtio 1.2, 5.1) on passt: Ethernet frames between the driver's queues and a
//! [`Connection`], in the main loop.
//!
//! The features offered are those that a stream of plain frames can carry:
//!
//! - `CSUM`, without peers: the driver may leave TCP and UDP checksums out. passt terminates the connections and
//!   does not check them.
//! - `GUEST_CSUM`: frames arrive with `DATA_VALID`. passt has just computed their checksums, and there
//!   is no wire between passt and the guest that could change a bit. Peers may have left them out.
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
mod queues;
mod remembered;

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use event_manager::EventSet;
use filter::FrameFilter;
use passt::{Connection, Lost, Reconnect};
use peers::Peers;
use queues::{Fault, Filled, QUEUE_SIZES, Queues};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_S_LINK_UP,
};

use crate::log::{self, LogOnce};
use crate::virtio::device::{Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::virtio::main_loop::{MainLoopDevice, Properties, Watcher};
use crate::virtio::queue::ServedQueue;

/// Largest IP packet: what passt itself announces (`--mtu`), an Ethernet frame of 65,535 bytes less
/// its header, rounded down for alignment. No wire asks for less, and a large frame costs about as
/// much as a small one.
pub const MTU: u16 = 65_520;
/// Offset of `status` in the configuration space (5.1.4).
const STATUS_OFFSET: u32 = 6;
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
        // Peers may check checksums, and nobody would finish them.
        let csum = self.peers.is_none().then_some(VIRTIO_NET_F_CSUM);
        let features = [
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
        ];
        let features = features.into_iter().chain(csum).fold(0, |all, bit| all | 1 << bit);
        Properties {
            id: VIRTIO_ID_NET,
            features: features | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX,
            queue_sizes: &QUEUE_SIZES,
            config: config_space(self.mac),
            late: false,
            busy: true,
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

#[cfg(any(test, fuzzing))]
pub(crate) mod bench;
#[cfg(test)]
mod tests;
