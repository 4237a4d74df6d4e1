//! virtio-balloon (virtio 1.2, 5.5) for one thing: the guest reports memory that it has free, and the host has it back
//! (5.5.6.7, `VIRTIO_BALLOON_F_REPORTING`). Nothing is ever inflated: `num_pages` stays 0.
//!
//! Linux reports blocks of 2 or 4 MiB, two seconds after it has freed some, 32 in a chain, and keeps them off its free
//! lists until the chain comes back. What it then writes there is in new pages of the host's, which were zeros: the
//! driver does not count on what had been there (5.5.6.7.1).
//!
//! The driver finds the device late ([`LateDevice`](super::mmio::LateDevice)): its set-up is no part of the start, and a
//! box that ends soon goes without.

use anyhow::{Result, ensure};
use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::device::{Activation, F_VERSION_1};
use super::main_loop::{MainLoopDevice, Properties, Watcher};
use super::queue::{Chain, ServedQueue};
use crate::log::LogOnce;
use crate::memory::{self, GuestRam};

/// `VIRTIO_BALLOON_F_REPORTING` (5.5.3).
const F_REPORTING: u64 = 1 << 5;
/// inflateq, deflateq and reporting_vq. The specification (5.5.2) gives the last one the number 4, as if the two between
/// were there, whose features are not; Linux (`vm_find_vqs`) numbers only those that are. Its driver wants a size of at
/// least [`MOST_RANGES`].
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];
/// The number of the last one, in this list and as what is watched.
const REPORTING: usize = 2;
/// `num_pages` and `actual` (5.5.4).
const CONFIG: [u8; 8] = [0; 8];
/// Most ranges in a chain (Linux: `PAGE_REPORTING_CAPACITY`), and most bytes of one (its largest free block): together they
/// bound what one call to the host takes, some milliseconds where guest memory is in small pages.
const MOST_RANGES: usize = 32;
/// See [`MOST_RANGES`].
const MOST_BYTES: u32 = 4 << 20;
/// Most chains of reports, and of the other queues, before the main loop turns to other work.
const BATCH: [usize; 3] = [16, 16, 1];

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {
    /// The queues and the memory that they are in, from activation to reset.
    served: Option<([ServedQueue; 3], GuestRam)>,
    /// For the driver's faults, and for a host that takes nothing back.
    complaint: LogOnce,
}

impl MainLoopDevice for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn properties(&self) -> Properties {
        Properties {
            id: VIRTIO_ID_BALLOON,
            features: F_VERSION_1 | F_REPORTING,
            queue_sizes: &QUEUE_SIZES,
            config: CONFIG.to_vec(),
            late: true,
            busy: false,
        }
    }

    fn activate(&mut self, activation: Activation, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        self.reset(watcher)?;
        let Activation { ram, features, queues, interrupt, .. } = activation;
        let queues = ServedQueue::take_over(queues, features, &interrupt)?;
        for (source, queue) in (0..).zip(&queues) {
            watcher.add(queue.kick(), source, EventSet::IN)?;
        }
        self.served = Some((queues, ram));
        Ok(())
    }

    fn reset(&mut self, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        for queue in self.served.take().iter().flat_map(|(queues, _)| queues) {
            watcher.remove(queue.kick())?;
        }
        Ok(())
    }

    fn handle(&mut self, source: u32, _: EventSet, watcher: &mut Watcher<'_, '_>) -> Result<()> {
        let Some((queues, ram)) = &mut self.served else { return Ok(()) };
        let number = source as usize;
        let (Some(queue), Some(batch)) = (queues.get_mut(number), BATCH.get(number)) else {
            return Ok(());
        };
        let complaint = &mut self.complaint;
        let served = queue.serve(ram, *batch, |chain| {
            if number == REPORTING
                && let Err(error) = give_back(chain, ram)
            {
                // The chain goes back all the same, as a report that had no effect.
                complaint.error(&format!("balloon: reported memory: {error:#}"));
            }
            // What comes to the other queues was not asked for, and stays the guest's.
            0
        });
        if let Err(error) = served {
            // The driver broke its own queue: this device stops, the guest goes on.
            self.complaint.error(&format!("balloon: {error:#}; the device stops"));
            self.reset(watcher)?;
        }
        Ok(())
    }
}

/// Gives the host the ranges of a report, up to the first that is none.
fn give_back(chain: Chain<'_>, ram: &GuestRam) -> Result<()> {
    for (index, range) in chain.enumerate() {
        ensure!(index < MOST_RANGES, "more than {MOST_RANGES} ranges at once");
        ensure!(range.is_write_only(), "a range that the device may not write to");
        let (start, len) = (range.addr(), range.len());
        ensure!(len <= MOST_BYTES, "{len} bytes, more than a free block of the kernel's has");
        memory::give_back(ram, start, len as usize)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EventFd;

    use crate::layout;
    use crate::virtio::device::ReadyQueue;

    const MIB: u32 = 1 << 20;
    const WRITE: u16 = 2;
    /// Where the ranges of these tests are; the queue is in the first MiB.
    const AT: u64 = 8 << 20;

    /// RAM as a box has it, full of ones from `AT` on.
    fn ram() -> GuestRam {
        let ram = memory::create_ram(16 << 20).expect("RAM");
        ram.write_slice(&vec![1; 8 << 20], GuestAddress(AT)).expect("written");
        ram
    }

    /// Reports this chain, and says what came of it.
    fn report(ram: &GuestRam, ranges: &[(u64, u32, u16)]) -> Result<()> {
        let mock = MockSplitQueue::new(ram, 64);
        let last = ranges.len() - 1;
        let descriptors: Vec<RawDescriptor> = (0..)
            .zip(ranges)
            .map(|(index, &(start, len, flags))| {
                let next = if usize::from(index) < last { 1 } else { 0 };
                RawDescriptor::from(Descriptor::new(start, len, flags | next, index + 1))
            })
            .collect();
        mock.build_desc_chain(&descriptors).expect("a chain");
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let ready = ReadyQueue { queue: mock.create_queue().expect("queue"), kick: eventfd() };
        let mut queue = ServedQueue::new(ready, 0, &eventfd()).expect("served");
        let mut result = Ok(());
        queue
            .serve(ram, 2, |chain| {
                result = give_back(chain, ram);
                0
            })
            .expect("the ring is right");
        result
    }

    /// How many bytes of ones are left in the page at this address.
    fn ones(ram: &GuestRam, page: u64) -> usize {
        let mut bytes = [0; 4096];
        ram.read_slice(&mut bytes, GuestAddress(page)).expect("in RAM");
        bytes.iter().filter(|byte| **byte == 1).count()
    }

    #[test]
    fn what_is_reported_is_given_back_and_nothing_else() {
        let ram = ram();
        report(&ram, &[(AT, MIB, WRITE), (AT + 4096 + (2 << 20), MIB, WRITE)]).expect("done");
        for (offset, left) in [
            (0, 0),
            (u64::from(MIB) - 4096, 0),
            (u64::from(MIB), 4096),
            (2 << 20, 4096),
            ((2 << 20) + 4096, 0),
            (3 << 20, 0),
            ((3 << 20) + 4096, 4096),
        ] {
            assert_eq!(ones(&ram, AT + offset), left, "at {offset:#x}");
        }
    }

    #[test]
    fn pages_that_are_reported_in_part_are_kept() {
        let ram = ram();
        report(&ram, &[(AT + 1, 3 * 4096, WRITE), (AT + 0x10_0000, 4095, WRITE)]).expect("done");
        let left = [0, 1, 2, 3, 256].map(|page| ones(&ram, AT + 4096 * page));
        assert_eq!(left, [4096, 0, 0, 4096, 4096]);
    }

    #[test]
    fn hostile_ranges_are_refused() {
        let ram = ram();
        let end = 16 << 20;
        for (what, ranges) in [
            ("no RAM", vec![(layout::MMIO, 4096, WRITE)]),
            ("beyond the end", vec![(end - 4096, 8192, WRITE)]),
            ("beyond the address space", vec![(u64::MAX - 4095, 4096, WRITE)]),
            ("to read", vec![(AT, 4096, 0)]),
            ("too long", vec![(AT, MOST_BYTES + 1, WRITE)]),
            ("too many", vec![(AT + (4 << 20), 4096, WRITE); MOST_RANGES + 1]),
        ] {
            assert!(report(&ram, &ranges).is_err(), "{what}");
        }
        assert_eq!(ones(&ram, AT), 4096);
        assert_eq!(ones(&ram, end - 4096), 4096);
    }
}
