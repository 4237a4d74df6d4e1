//! A queue that mote serves itself: popping descriptor chains, returning them used, and notifying
//! the driver no more than it asks for.
//!
//! virtio-queue does the ring arithmetic, [`super::buffers`] bounds every chain. A fault in a chain
//! fails that chain, a fault in the ring stops the device, and neither ends the process.

use anyhow::{Result, anyhow};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::virtio::device::{F_EVENT_IDX, ReadyQueue};

/// A chain of guest buffers, to be read once: by a [`super::buffers::Reader`] or
/// [`Writer`](super::buffers::Writer).
pub type Chain<'a> = DescriptorChain<&'a GuestRam>;

/// A queue in service.
#[derive(Debug)]
pub struct ServedQueue {
    queue: Queue,
    kick: EventFd,
    interrupt: EventFd,
}

impl ServedQueue {
    /// Takes a queue into service.
    ///
    /// # Errors
    /// The host has no descriptor for it.
    pub fn new(ready: ReadyQueue, features: u64, interrupt: &EventFd) -> Result<Self> {
        let mut queue = ready.queue;
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        let interrupt = interrupt.try_clone()?;
        Ok(ServedQueue { queue, kick: ready.kick, interrupt })
    }

    /// Takes all `N` queues of a device into service.
    ///
    /// # Errors
    /// There are not `N`, or the host has no descriptor.
    pub fn take_over<const N: usize>(
        queues: Vec<ReadyQueue>,
        features: u64,
        interrupt: &EventFd,
    ) -> Result<[Self; N]> {
        let served: Vec<ServedQueue> = queues
            .into_iter()
            .map(|queue| ServedQueue::new(queue, features, interrupt))
            .collect::<Result<_>>()?;
        served.try_into().map_err(|_| anyhow!("the device has another number of queues"))
    }

    /// Readable when the driver has made buffers available.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes the pending kicks. The caller looks for buffers whether or not there was one.
    pub fn clear_kick(&self) {
        let _ = self.kick.read();
    }

    /// The next chain, or `None` when there is none; a kick then announces the next.
    ///
    /// # Errors
    /// The ring contradicts itself: it announces chains, and none can be read.
    pub fn pop_or_wait<'a>(&mut self, ram: &'a GuestRam) -> Result<Option<Chain<'a>>> {
        if let Some(chain) = self.pop(ram)? {
            return Ok(Some(chain));
        }
        let more =
            self.queue.enable_notification(ram).map_err(|e| anyhow!("ask for a kick: {e}"))?;
        if !more {
            return Ok(None);
        }
        let chain = self.pop(ram)?;
        chain.map(Some).ok_or_else(|| anyhow!("the available ring cannot be read"))
    }

    fn pop<'a>(&mut self, ram: &'a GuestRam) -> Result<Option<Chain<'a>>> {
        // `iter`, unlike `pop_descriptor_chain`, distinguishes a bad index from an empty ring.
        let mut chains =
            self.queue.iter(ram).map_err(|e| anyhow!("read the available ring: {e}"))?;
        Ok(chains.next())
    }

    /// Puts the chain popped last back: it will be popped again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver with `len` bytes written into it.
    ///
    /// # Errors
    /// The used ring is not in RAM.
    pub fn push(&mut self, ram: &GuestRam, head: u16, len: u32) -> Result<()> {
        self.queue.add_used(ram, head, len).map_err(|e| anyhow!("return a buffer: {e}"))
    }

    /// Interrupts the driver, if it wants a notification for the chains returned.
    ///
    /// # Errors
    /// The rings are not in RAM, or the interrupt cannot be raised.
    pub fn notify(&mut self, ram: &GuestRam) -> Result<()> {
        let wanted = self.queue.needs_notification(ram).map_err(|e| anyhow!("notify: {e}"))?;
        if wanted {
            self.interrupt.write(1)?;
        }
        Ok(())
    }

    /// Pops and returns every available chain; `handle` says how many bytes it wrote. Stops after
    /// `limit` chains, so that a driver that adds chains without end cannot keep the caller from its
    /// other work. It then kicks the queue itself, and the rest is served in the next turn.
    ///
    /// # Errors
    /// The ring contradicts itself, or the interrupt cannot be raised.
    pub fn serve(
        &mut self,
        ram: &GuestRam,
        limit: usize,
        mut handle: impl FnMut(Chain<'_>) -> u32,
    ) -> Result<()> {
        self.clear_kick();
        for _ in 0..limit {
            let Some(chain) = self.pop_or_wait(ram)? else {
                return self.notify(ram);
            };
            let head = chain.head_index();
            let len = handle(chain);
            self.push(ram, head, len)?;
        }
        self.kick.write(1)?;
        self.notify(ram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("1 MiB")
    }

    fn served(mock: &MockSplitQueue<'_, GuestRam>) -> ServedQueue {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let ready = ReadyQueue { queue: mock.create_queue().expect("queue"), kick: eventfd() };
        ServedQueue::new(ready, 0, &eventfd()).expect("served")
    }

    fn one_byte_chains(count: u16) -> Vec<RawDescriptor> {
        (0..count)
            .map(|i| RawDescriptor::from(Descriptor::new(0x8000 + u64::from(i), 1, 2, 0)))
            .collect()
    }

    #[test]
    fn every_chain_is_returned_and_the_driver_told_once() {
        let ram = ram();
        let mock = MockSplitQueue::new(&ram, 16);
        mock.build_multiple_desc_chains(&one_byte_chains(5)).expect("chains");
        let mut queue = served(&mock);
        let mut handled = 0;
        queue
            .serve(&ram, 100, |_| {
                handled += 1;
                1
            })
            .expect("served");
        assert_eq!(handled, 5);
        assert_eq!(u16::from_le(mock.used().idx().load()), 5);
        assert_eq!(queue.interrupt.read().expect("interrupt"), 1);
    }

    #[test]
    fn a_ring_that_contradicts_itself_is_an_error() {
        // More chains than the queue holds: once an endless loop.
        let ram = ram();
        let mock = MockSplitQueue::new(&ram, 16);
        mock.avail().idx().store(u16::to_le(17));
        let mut queue = served(&mock);
        assert!(queue.serve(&ram, 100, |_| 0).is_err());
        assert!(queue.pop_or_wait(&ram).is_err());
    }

    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x4000;

    /// A queue at this position of its rings, with as many chains available, each of one descriptor.
    fn served_at(ram: &GuestRam, size: u16, position: u16, chains: u16) -> ServedQueue {
        let mut queue = Queue::new(256).expect("queue");
        queue.set_size(size);
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(AVAIL as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_next_avail(position);
        queue.set_next_used(position);
        queue.set_ready(true);
        assert!(queue.is_valid(ram));
        let write = |value: u16, at: u64| ram.write_obj(value, GuestAddress(at)).expect("in RAM");
        for slot in 0..size {
            let descriptor = RawDescriptor::from(Descriptor::new(0x8000, 1, 2, 0));
            ram.write_obj(descriptor, GuestAddress(0x1000 + 16 * u64::from(slot))).expect("in RAM");
            write(slot, AVAIL + 4 + 2 * u64::from(slot));
        }
        write(position.wrapping_add(chains), AVAIL + 2);
        write(position, USED + 2);
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let ready = ReadyQueue { queue, kick: eventfd() };
        ServedQueue::new(ready, F_EVENT_IDX, &eventfd()).expect("served")
    }

    const POSITIONS: [u16; 7] = [0, 1, 255, 0x7fff, 0x8000, 0xfffe, 0xffff];

    #[test]
    fn positions_wrap_in_rings_of_any_size() {
        for size in (0..=8).map(|log| 1 << log) {
            for position in POSITIONS {
                for chains in [0, 1, size / 2, size - 1, size] {
                    for limit in [0, 1, size - 1, size, size + 1] {
                        let ram = ram();
                        let mut queue = served_at(&ram, size, position, chains);
                        let mut heads = Vec::new();
                        let at = format!("{chains} of {size} at {position}, {limit} at most");
                        queue
                            .serve(&ram, limit.into(), |chain| {
                                heads.push(chain.head_index());
                                0
                            })
                            .expect(&at);
                        let count = chains.min(limit);
                        let expected = (0..count).map(|i| position.wrapping_add(i) % size);
                        assert_eq!(heads, expected.collect::<Vec<_>>(), "{at}");
                        let used: u16 = ram.read_obj(GuestAddress(USED + 2)).expect("in RAM");
                        assert_eq!(used, position.wrapping_add(count), "{at}");
                        assert_eq!(queue.kick.read().is_ok(), count == limit, "{at}");
                    }
                }
                let ram = ram();
                let mut queue = served_at(&ram, size, position, size + 1);
                assert!(queue.serve(&ram, 9, |_| 0).is_err(), "more than {size} at {position}");
            }
        }
    }

    #[test]
    fn what_is_put_back_comes_again_wherever_the_ring_wraps() {
        for position in POSITIONS {
            let ram = ram();
            let mut queue = served_at(&ram, 16, position, 2);
            for _ in 0..3 {
                let chain = queue.pop_or_wait(&ram).expect("popped").expect("there");
                assert_eq!(chain.head_index(), position % 16);
                queue.unpop();
            }
            assert!(queue.pop_or_wait(&ram).expect("popped").is_some());
            assert!(queue.pop_or_wait(&ram).expect("popped").is_some());
            assert!(queue.pop_or_wait(&ram).expect("none").is_none());
        }
    }

    /// virtio 1.2, 2.7.7.2: an interrupt when the used index passes the one that the driver names.
    #[test]
    fn the_driver_is_interrupted_where_it_wants_to_be() {
        for position in POSITIONS {
            for event in (0..32).map(|offset| position.wrapping_sub(8).wrapping_add(offset)) {
                for chains in 1..=16u16 {
                    let ram = ram();
                    let mut queue = served_at(&ram, 16, position, chains);
                    let used_event = GuestAddress(AVAIL + 4 + 2 * 16);
                    ram.write_obj(event, used_event).expect("in RAM");
                    queue.serve(&ram, 17, |_| 0).expect("served");
                    let passed = (0..chains).any(|i| position.wrapping_add(i) == event);
                    let interrupted = queue.interrupt.read().is_ok();
                    assert_eq!(interrupted, passed, "{event}, {chains} chains from {position}");
                }
            }
        }
    }

    /// One queue goes around its rings, and the driver's event is at each distance once.
    #[test]
    fn indices_and_events_hold_at_every_position_and_distance() {
        const SIZE: u16 = 4;
        let ram = ram();
        let write = |value: u16, at: u64| ram.write_obj(value, GuestAddress(at)).expect("in RAM");
        let read = |at: u64| ram.read_obj::<u16>(GuestAddress(at)).expect("in RAM");
        // One and three lead to every position.
        for chains in [1, 3, 4] {
            let mut queue = served_at(&ram, SIZE, 0, 0);
            let mut position = 0u16;
            for distance in 0..=u16::MAX {
                write(position.wrapping_add(chains), AVAIL + 2);
                write(position.wrapping_add(distance), AVAIL + 4 + 2 * u64::from(SIZE));
                let mut heads = 0..chains;
                queue
                    .serve(&ram, SIZE.into(), |chain| {
                        let expected = heads.next().map(|i| position.wrapping_add(i) % SIZE);
                        assert_eq!(Some(chain.head_index()), expected, "at {position}");
                        0
                    })
                    .expect("served");
                assert_eq!(heads.len(), 0, "at {position}");
                let at = format!("{chains} at {position}, event {distance} further");
                position = position.wrapping_add(chains);
                assert_eq!(read(USED + 2), position, "{at}");
                assert_eq!(queue.interrupt.read().is_ok(), distance < chains, "{at}");
                if chains < SIZE {
                    // It has seen that there is no more, and asks for a kick at the next.
                    assert_eq!(read(USED + 4 + 8 * u64::from(SIZE)), position, "{at}");
                }
            }
        }
    }

    #[test]
    fn more_chains_than_the_queue_holds_are_an_error_at_every_distance() {
        let ram = ram();
        for position in [0, 0x7fff, 0xffff] {
            let mut queue = served_at(&ram, 8, position, 0);
            for distance in 9..=u16::MAX {
                let index = position.wrapping_add(distance);
                ram.write_obj(index, GuestAddress(AVAIL + 2)).expect("in RAM");
                assert!(queue.pop_or_wait(&ram).is_err(), "{distance} from {position}");
            }
        }
    }

    #[test]
    fn a_flood_is_cut_and_continued() {
        let ram = ram();
        let mock = MockSplitQueue::new(&ram, 16);
        mock.build_multiple_desc_chains(&one_byte_chains(5)).expect("chains");
        let mut queue = served(&mock);
        queue.serve(&ram, 3, |_| 0).expect("served");
        assert_eq!(u16::from_le(mock.used().idx().load()), 3);
        assert_eq!(queue.kick.read().expect("kicked itself"), 1);
        queue.serve(&ram, 3, |_| 0).expect("served");
        assert_eq!(u16::from_le(mock.used().idx().load()), 5);
        assert!(queue.kick.read().is_err(), "nothing is left");
    }
}
