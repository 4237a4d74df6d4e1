//! virtio-rng (virtio 1.2, 5.4): the host's random numbers for the guest. The boot seed makes the
//! guest's generator ready at once; this keeps it fed.

use std::io::Write;
use std::sync::mpsc::SyncSender;

use anyhow::Result;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::sys;
use crate::virtio::buffers::Writer;
use crate::virtio::queue::{Chain, ServedQueue};
use crate::virtio::{
    Activation, DeviceEvent, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, MainLoopDevice,
    MainLoopDeviceKind,
};

const QUEUE_SIZES: [u16; 1] = [16];
/// Most random bytes per request, whatever the buffer's size: Linux asks for at most 64 at a time,
/// and a guest must not make the host's generator its own workload.
const MAX_BYTES: usize = 256;
/// Most requests before the main loop turns to other work.
const BATCH: usize = 64;

/// The vCPU side.
pub fn device(sender: SyncSender<DeviceEvent>, event: EventFd) -> MainLoopDevice {
    MainLoopDevice {
        kind: MainLoopDeviceKind::Rng,
        id: VIRTIO_ID_RNG,
        features: F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX,
        queue_sizes: &QUEUE_SIZES,
        config: Vec::new(),
        sender,
        event,
    }
}

/// The device at work, in the main loop.
#[derive(Debug)]
pub struct Rng {
    ram: GuestRam,
    queue: ServedQueue,
}

impl Rng {
    /// Takes the queue over.
    pub fn new(mut activation: Activation) -> Result<Self> {
        let ready = activation.queues.remove(0);
        let queue = ServedQueue::new(ready, activation.features, &activation.interrupt)?;
        Ok(Rng { ram: activation.ram, queue })
    }

    /// Readable when there are requests.
    pub fn kick(&self) -> &EventFd {
        self.queue.kick()
    }

    /// Answers all requests.
    pub fn process(&mut self) -> Result<()> {
        let ram = &self.ram;
        self.queue.serve(ram, BATCH, |chain| fill(chain, ram).unwrap_or(0))
    }
}

fn fill(chain: Chain<'_>, ram: &GuestRam) -> Result<u32> {
    let mut writer = Writer::new(chain, ram)?;
    let mut random = [0; MAX_BYTES];
    let len = writer.available_bytes().min(MAX_BYTES);
    sys::fill_random(&mut random[..len])?;
    writer.write_all(&random[..len])?;
    Ok(len as u32)
}
