//! Virtio devices (OASIS virtio 1.2) and the contract between a device and its transport.
//!
//! To add a device: implement [`VirtioDevice`], or use [`MainLoopDevice`] and serve its queues in
//! the main loop, and add one line to the list in `vm.rs`.
//!
//! ```text
//!   vCPU thread                                    main thread, or a back-end process
//!   mmio::MmioDevice ── activate(Activation) ──▶ device: owns its queues until reset
//!        registers                                 ▲ kick: ioeventfd    │ interrupt: irqfd
//! ```

pub mod buffers;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod vsock;

use std::convert::Infallible;
use std::sync::mpsc::{self, SyncSender};

use anyhow::{Context, Result};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::virtio::mmio::ConfigSpace;

/// `VIRTIO_F_VERSION_1` (6.1): every device offers it, every driver must accept it.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_RING_INDIRECT_DESC` (2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_RING_EVENT_IDX` (2.7.7.1).
pub const F_EVENT_IDX: u64 = 1 << 29;

/// What a device gets when the driver is ready. Dropping it closes the device's side of the queues.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory, where queues and buffers are.
    pub ram: GuestRam,
    /// The features that both sides agreed on.
    pub features: u64,
    /// The queues, all valid, in the device's order.
    pub queues: Vec<ReadyQueue>,
    /// The device's interrupt line.
    pub interrupt: EventFd,
    /// To change what [`VirtioDevice::config`] said at first.
    pub config: ConfigSpace,
}

/// A queue that the driver has set up.
#[derive(Debug)]
pub struct ReadyQueue {
    /// Addresses, size and positions.
    pub queue: Queue,
    /// Written when the driver has made buffers available.
    pub kick: EventFd,
}

/// A device, as its transport sees it. All calls come from vCPU threads, one at a time.
///
/// `activate` is called once the driver sets DRIVER_OK; after it come either nothing or `reset`,
/// and then perhaps `activate` again. An error from `activate` makes the transport ask for a reset
/// (DEVICE_NEEDS_RESET); it never ends the process.
pub trait VirtioDevice: Send + std::fmt::Debug {
    /// Device type (virtio 1.2, section 5).
    fn id(&self) -> u32;
    /// Features offered.
    fn features(&self) -> u64;
    /// Largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// The device's configuration space, as it is before the first activation.
    fn config(&self) -> &[u8];
    /// Takes over the queues.
    fn activate(&mut self, activation: Activation) -> Result<()>;
    /// Gives the queues up.
    fn reset(&mut self);
}

/// Which device of the main loop is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MainLoopDeviceKind {
    /// virtio-vsock.
    Vsock,
    /// virtio-rng.
    Rng,
    /// virtio-net.
    Net,
}

/// News from the vCPU threads for the main loop.
#[derive(Debug)]
pub enum DeviceEvent {
    /// This device's driver is ready.
    Activated(MainLoopDeviceKind, Activation),
    /// This device is being reset: once the event is dropped, its queues are the driver's again.
    Reset(MainLoopDeviceKind, SyncSender<Infallible>),
}

/// The vCPU side of a device whose queues are served in the main loop: passes activation and reset
/// on. A reset is waited for (virtio 1.2, 2.4.1): the main loop, which never waits for a vCPU, must not
/// read the driver's next queues as the last ones, nor write into memory that these had.
#[derive(Debug)]
pub struct MainLoopDevice {
    /// Which one.
    pub kind: MainLoopDeviceKind,
    /// See [`VirtioDevice::id`].
    pub id: u32,
    /// See [`VirtioDevice::features`].
    pub features: u64,
    /// See [`VirtioDevice::queue_sizes`].
    pub queue_sizes: &'static [u16],
    /// See [`VirtioDevice::config`].
    pub config: Vec<u8>,
    /// To the main loop; a full channel holds the vCPU back.
    pub sender: SyncSender<DeviceEvent>,
    /// Written after each event.
    pub event: EventFd,
}

impl MainLoopDevice {
    fn send(&self, event: DeviceEvent) -> Result<()> {
        self.sender.send(event).ok().context("the main loop has ended")?;
        self.event.write(1).context("wake the main loop")
    }
}

impl VirtioDevice for MainLoopDevice {
    fn id(&self) -> u32 {
        self.id
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        // Failing, here and below, means a main loop that has ended, and with it the box: that has its
        // own last word.
        let _ = self.send(DeviceEvent::Activated(self.kind, activation));
        Ok(())
    }

    fn reset(&mut self) {
        let (done, over) = mpsc::sync_channel(0);
        if self.send(DeviceEvent::Reset(self.kind, done)).is_ok() {
            // Nothing is ever sent.
            let _ = over.recv();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn device(sender: SyncSender<DeviceEvent>) -> MainLoopDevice {
        let event = EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        rng::device(sender, event)
    }

    #[test]
    fn a_reset_returns_when_the_queues_are_out_of_use() {
        let (sender, events) = mpsc::sync_channel(1);
        let mut device = device(sender);
        let out_of_use = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let event = events.recv().expect("an event");
                assert!(matches!(event, DeviceEvent::Reset(MainLoopDeviceKind::Rng, _)));
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
        let (sender, events) = mpsc::sync_channel(1);
        let mut device = device(sender);
        drop(events);
        device.reset();
    }
}
