//! Devices whose queues are served in the main loop. Each has two halves:
//!
//! ```text
//!   vCPU threads                                     main loop
//!   mmio::MmioDevice ──▶ Forwarder ── DeviceEvent ──▶ MainLoopDevice ── Watcher ──▶ epoll
//! ```
//!
//! The transport talks to a [`Forwarder`], which is the same type for all devices; the device itself is a
//! type that implements [`MainLoopDevice`].

use std::convert::Infallible;
use std::fmt::Debug;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, SyncSender};
use std::time::Instant;

use anyhow::Result;
use event_manager::{EventOps, EventSet, Events};

use super::device::{Activation, VirtioDevice};
use crate::event_channel::Sender;
use crate::token::Token;

/// What the driver reads before it activates a device; see the methods of [`VirtioDevice`].
#[derive(Debug, Clone)]
pub struct Properties {
    /// Device type (virtio 1.2, section 5).
    pub id: u32,
    /// Features offered.
    pub features: u64,
    /// Largest size of each queue.
    pub queue_sizes: &'static [u16],
    /// The configuration space.
    pub config: Vec<u8>,
    /// Whether the driver is to find it only after the start: [`VirtioDevice::is_late`].
    pub late: bool,
    /// Whether it has much to do with its driver: [`VirtioDevice::is_busy`].
    pub busy: bool,
}

/// A device at work, in the main loop. All calls come from the main loop's thread, and none may wait.
///
/// [`register`](Self::register) is called once, before the guest runs; [`activate`](Self::activate) when
/// the driver is ready; [`reset`](Self::reset) may follow, and then `activate` again. Events of
/// descriptors that the device watches with its [`Watcher`] come to [`handle`](Self::handle).
///
/// A fault of the driver stops the device, which logs it once. Methods return an error when the host
/// refuses something.
pub trait MainLoopDevice: Debug {
    /// Its name in messages.
    fn name(&self) -> &'static str;
    /// What the driver reads before it activates the device.
    fn properties(&self) -> Properties;
    /// Starts watching the device's descriptors on the host.
    ///
    /// # Errors
    /// The host refuses to watch it: the box does not start.
    fn register(&mut self, _watcher: &mut Watcher<'_, '_>) -> Result<()> {
        Ok(())
    }
    /// Takes the queues over.
    ///
    /// # Errors
    /// The device cannot start: the box ends.
    fn activate(&mut self, activation: Activation, watcher: &mut Watcher<'_, '_>) -> Result<()>;
    /// Gives the queues back, if it has any.
    ///
    /// # Errors
    /// The queues cannot be unwatched: the box ends.
    fn reset(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()>;
    /// Handles an event of the descriptor that is watched as `source`.
    ///
    /// # Errors
    /// What the host refuses; for vsock, also that its driver broke it.
    fn handle(
        &mut self,
        source: u32,
        events: EventSet,
        watcher: &mut Watcher<'_, '_>,
    ) -> Result<()>;
    /// When [`end_round`](Self::end_round) has something to do, even if no event comes.
    fn next_deadline(&self) -> Option<Instant> {
        None
    }
    /// Ends a round of events: does what is due by `now`.
    ///
    /// # Errors
    /// As for [`handle`](Self::handle).
    fn end_round(&mut self, _now: Instant, _watcher: &mut Watcher<'_, '_>) -> Result<()> {
        Ok(())
    }
}

/// Watches descriptors for one device in the main loop: their events go to [`MainLoopDevice::handle`],
/// with the number that the device has given the descriptor.
pub struct Watcher<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    device: u8,
}

impl<'a, 'b> Watcher<'a, 'b> {
    /// The watcher of the device of this number.
    pub fn new(ops: &'a mut EventOps<'b>, device: u8) -> Self {
        Watcher { ops, device }
    }

    /// Watches a descriptor, as `source` of at most [`Token::MAX_INDEX`].
    ///
    /// # Errors
    /// The host has no room for another, or the descriptor is watched already.
    pub fn add(
        &mut self,
        fd: &impl AsRawFd,
        source: u32,
        events: EventSet,
    ) -> Result<(), event_manager::Error> {
        let token = Token::Device { device: self.device, source };
        self.ops.add(Events::with_data(fd, token.to_data(), events))
    }

    /// Stops watching a descriptor.
    ///
    /// # Errors
    /// It is not watched.
    pub fn remove(&mut self, fd: &impl AsRawFd) -> Result<(), event_manager::Error> {
        self.ops.remove(Events::empty(fd))
    }
}

/// A message from a vCPU thread to the main loop, with the number of the device.
#[derive(Debug)]
pub enum DeviceEvent {
    /// This device's driver is ready.
    Activated(u8, Activation),
    /// This device is being reset: when the event is dropped, its queues belong to the driver again.
    Reset(u8, SyncSender<Infallible>),
}

/// The vCPU side of a device: passes activation and reset on. It waits until a reset is done (virtio
/// 1.2, 2.4.1): afterwards the main loop must not use the old queues, nor write into their memory. The
/// main loop never waits for a vCPU, so this cannot deadlock.
#[derive(Debug)]
pub struct Forwarder {
    /// The device's number in the main loop.
    pub device: u8,
    /// What the driver reads before it activates the device.
    pub properties: Properties,
    /// To the main loop; a full channel holds the vCPU back.
    pub events: Sender<DeviceEvent>,
}

impl VirtioDevice for Forwarder {
    fn id(&self) -> u32 {
        self.properties.id
    }

    fn features(&self) -> u64 {
        self.properties.features
    }

    fn queue_sizes(&self) -> &[u16] {
        self.properties.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.properties.config
    }

    fn is_late(&self) -> bool {
        self.properties.late
    }

    fn is_busy(&self) -> bool {
        self.properties.busy
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        // Sending fails, here and below, only when the main loop has ended, and with it the box: the
        // box's outcome is then known already.
        let _ = self.events.send(DeviceEvent::Activated(self.device, activation));
        Ok(())
    }

    fn reset(&mut self) {
        let (done, over) = mpsc::sync_channel(0);
        if self.events.send(DeviceEvent::Reset(self.device, done)).is_ok() {
            // Nothing is ever sent: this returns when the main loop has dropped the event.
            let _ = over.recv();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_channel::{Receiver, event_channel};
    use std::sync::atomic::{AtomicBool, Ordering};

    const DEVICE: u8 = 1;

    fn forwarder() -> (Forwarder, Receiver<DeviceEvent>) {
        let (events, receiver) = event_channel(1).expect("a channel");
        let properties = Properties {
            id: 0,
            features: 0,
            queue_sizes: &[1],
            config: Vec::new(),
            late: false,
            busy: true,
        };
        (Forwarder { device: DEVICE, properties, events }, receiver)
    }

    #[test]
    fn a_reset_returns_when_the_queues_are_out_of_use() {
        let (mut device, events) = forwarder();
        let out_of_use = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let event = loop {
                    match events.take() {
                        Some(event) => break event,
                        None => std::thread::yield_now(),
                    }
                };
                assert!(matches!(event, DeviceEvent::Reset(DEVICE, _)));
                // As long as it takes.
                for _ in 0..1000 {
                    std::thread::yield_now();
                }
                out_of_use.store(true, Ordering::Release);
                drop(event);
            });
            device.reset();
            assert!(out_of_use.load(Ordering::Acquire));
        });
    }

    #[test]
    fn a_reset_after_the_end_returns() {
        let (mut device, events) = forwarder();
        drop(events);
        device.reset();
    }
}
