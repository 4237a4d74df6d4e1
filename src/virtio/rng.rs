//! virtio-rng (virtio 1.2, 5.4): the host's random numbers for the guest. The boot seed makes the
//! guest's generator ready at once; this keeps it fed.

use std::io::Write;

use anyhow::Result;
use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::buffers::Writer;
use super::device::{Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use super::main_loop::{MainLoopDevice, Properties, Watcher};
use super::queue::{Chain, ServedQueue};
use crate::log::LogOnce;
use crate::memory::GuestRam;
use crate::sys;

const QUEUE_SIZES: [u16; 1] = [16];
/// Most random bytes per request, whatever the buffer's size: Linux asks for at most 64 at a time,
/// and a guest must not make the host's generator its own workload.
const MAX_BYTES: usize = 256;
/// Most requests before the main loop turns to other work.
const BATCH: usize = 64;
/// The only thing watched: the queue's notifications.
const REQUESTS: u32 = 0;

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    /// The queue and the memory that it is in, from activation to reset.
    served: Option<(ServedQueue, GuestRam)>,
    /// For the driver's faults.
    complaint: LogOnce,
}

impl MainLoopDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn properties(&self) -> Properties {
        let features = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
        Properties {
            id: VIRTIO_ID_RNG,
            features,
            queue_sizes: &QUEUE_SIZES,
            config: Vec::new(),
            late: false,
            busy: false,
        }
    }

    fn activate(&mut self, activation: Activation, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.reset(watcher)?;
        let Activation { ram, features, queues, interrupt, .. } = activation;
        let [queue] = ServedQueue::take_over(queues, features, &interrupt)?;
        watcher.add(queue.kick(), REQUESTS, EventSet::IN)?;
        self.served = Some((queue, ram));
        Ok(())
    }

    fn reset(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        match self.served.take() {
            Some((queue, _)) => Ok(watcher.remove(queue.kick())?),
            None => Ok(()),
        }
    }

    fn handle(&mut self, _: u32, _: EventSet, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Some((queue, ram)) = &mut self.served else { return Ok(()) };
        if let Err(error) = queue.serve(ram, BATCH, |chain| fill(chain, ram).unwrap_or(0)) {
            // The driver broke its own queue: this device stops, the guest goes on.
            self.complaint.error(&format!("rng: {error:#}; the device stops"));
            self.reset(watcher)?;
        }
        Ok(())
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
