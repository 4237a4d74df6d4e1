//! The contract between a device and its transport: [`VirtioDevice`], and what passes between the two.

use anyhow::{Context, Result};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG,
    VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_STATUS,
};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{GuestRam, RegisterPage};

/// `VIRTIO_F_VERSION_1` (6.1): every device offers it, every driver must accept it.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_RING_INDIRECT_DESC` (2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_RING_EVENT_IDX` (2.7.7.1).
pub const F_EVENT_IDX: u64 = 1 << 29;

/// InterruptStatus of virtio-mmio (4.2.2) when the configuration has changed.
pub(super) const CONFIG_CHANGED: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

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
    /// The configuration space, to change it from what [`VirtioDevice::config`] gave.
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

/// A device's configuration space, for a device that changes it while the driver runs. It has one
/// owner at a time: the thread that serves the device.
#[derive(Debug)]
pub struct ConfigSpace {
    pub(super) page: RegisterPage,
    pub(super) interrupt: EventFd,
}

impl ConfigSpace {
    /// Changes bytes of the configuration and tells the driver (2.5, 4.2.2.1).
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn change(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        let page = &self.page;
        page.set_bytes(u64::from(VIRTIO_MMIO_CONFIG + offset), bytes);
        let generation = page.value(VIRTIO_MMIO_CONFIG_GENERATION.into());
        page.set(VIRTIO_MMIO_CONFIG_GENERATION.into(), generation.wrapping_add(1));
        page.set(VIRTIO_MMIO_INTERRUPT_STATUS.into(), CONFIG_CHANGED);
        self.interrupt.write(1).context("announce a change of the configuration")
    }

    /// A configuration space that no guest sees, with its register page and its interrupt.
    #[cfg(any(test, fuzzing))]
    #[allow(clippy::expect_used, reason = "a failed expectation is how a test fails")]
    pub fn unattached() -> (Self, RegisterPage, EventFd) {
        let page = RegisterPage::unattached();
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let clone = interrupt.try_clone().expect("clone");
        (ConfigSpace { page: page.clone(), interrupt }, page, clone)
    }
}

/// A device, as its transport sees it. All calls come from vCPU threads, one at a time.
///
/// `activate` is called when the driver sets DRIVER_OK; `reset` may follow, and then `activate`
/// again. An error from `activate` makes the transport ask for a reset (DEVICE_NEEDS_RESET); it
/// never ends the process.
pub trait VirtioDevice: Send + std::fmt::Debug {
    /// Device type (virtio 1.2, section 5).
    fn id(&self) -> u32;
    /// Features offered.
    fn features(&self) -> u64;
    /// Largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// The device's configuration space, as it is before the first activation.
    fn config(&self) -> &[u8];
    /// Whether the driver is to find the device only after the start: see [`super::mmio::LateDevice`].
    fn is_late(&self) -> bool {
        false
    }
    /// Whether its driver and it have much to tell one another: then KVM takes notifications without an exit to this
    /// process. To have it do that costs a start ten times what such an exit does.
    fn is_busy(&self) -> bool {
        true
    }
    /// What is to be written when the driver has made buffers available in this queue, if the device has an own descriptor
    /// for that. Asked for once.
    fn take_kick(&mut self, _queue: usize) -> Option<EventFd> {
        None
    }
    /// Takes over the queues.
    ///
    /// # Errors
    /// The device cannot start; its driver is told to reset it.
    fn activate(&mut self, activation: Activation) -> Result<()>;
    /// Gives the queues up.
    fn reset(&mut self);
}
