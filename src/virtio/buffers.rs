//! The buffers of a descriptor chain, as one stream of bytes to read or to fill.
//!
//! The chain is walked once, and at most [`MAX_CHAIN`] buffers far. A guest that changes its descriptors
//! meanwhile, on another vCPU, may change what the walk finds, but never makes it longer.
//! virtio-queue's own reader and writer follow a chain to its end, which only the size of an indirect
//! table bounds.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use anyhow::{Result, anyhow, ensure};
use vm_memory::{Bytes, GuestMemoryBackend, VolatileSlice};

use super::queue::Chain;
use crate::memory::GuestRam;

/// Most buffers in one chain: a driver must not make it longer than its queue (virtio 1.2,
/// 2.7.5.3.1), and our queues have no more entries than this. An indirect table can have 65,535, and a
/// queue full of such tables would keep the main loop from its other work for half a second.
pub const MAX_CHAIN: usize = 256;

/// What is left of a chain's buffers.
#[derive(Debug)]
struct Buffers<'a>(VecDeque<VolatileSlice<'a>>);

impl<'a> Buffers<'a> {
    /// The chain's buffers for the device to write to, or those to read.
    fn of(chain: Chain<'_>, ram: &'a GuestRam, to_write: bool) -> Result<Self> {
        let mut slices = VecDeque::new();
        for (index, descriptor) in chain.enumerate() {
            ensure!(index < MAX_CHAIN, "a chain of more buffers than its queue has");
            if descriptor.is_write_only() == to_write {
                for slice in ram.get_slices(descriptor.addr(), descriptor.len() as usize) {
                    slices.push_back(slice.map_err(|e| anyhow!("a buffer: {e}"))?);
                }
            }
        }
        Ok(Buffers(slices))
    }

    fn len(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// Moves `wanted` bytes, or all if there are fewer, and returns how many.
    fn transfer(
        &mut self,
        wanted: usize,
        mut copy: impl FnMut(&VolatileSlice<'a>, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<usize> {
        let mut done = 0;
        while done < wanted
            && let Some(slice) = self.0.pop_front()
        {
            let len = slice.len().min(wanted - done);
            let (part, rest) = slice.split_at(len).map_err(io::Error::other)?;
            copy(&part, done..done + len)?;
            done += len;
            if !rest.is_empty() {
                self.0.push_front(rest);
            }
        }
        Ok(done)
    }
}

/// What the driver wrote for the device.
#[derive(Debug)]
pub struct Reader<'a>(Buffers<'a>);

impl<'a> Reader<'a> {
    /// The chain's buffers for the device to read.
    ///
    /// # Errors
    /// More than [`MAX_CHAIN`] buffers, or one that is not all in RAM.
    pub fn new(chain: Chain<'_>, ram: &'a GuestRam) -> Result<Self> {
        Ok(Reader(Buffers::of(chain, ram, false)?))
    }

    /// Bytes left to read.
    pub fn available_bytes(&self) -> usize {
        self.0.len()
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.0.transfer(to.len(), |from, range| {
            from.read_slice(&mut to[range], 0).map_err(io::Error::other)
        })
    }
}

/// Room for what the device writes for the driver.
#[derive(Debug)]
pub struct Writer<'a>(Buffers<'a>);

impl<'a> Writer<'a> {
    /// The chain's buffers for the device to write to.
    ///
    /// # Errors
    /// More than [`MAX_CHAIN`] buffers, or one that is not all in RAM.
    pub fn new(chain: Chain<'_>, ram: &'a GuestRam) -> Result<Self> {
        Ok(Writer(Buffers::of(chain, ram, true)?))
    }

    /// Bytes of room left.
    pub fn available_bytes(&self) -> usize {
        self.0.len()
    }

    /// Splits off the first `len` bytes of room, so that they can be written last.
    ///
    /// # Errors
    /// There is less room.
    pub fn split_off_front(&mut self, len: usize) -> Result<Writer<'a>> {
        ensure!(self.available_bytes() >= len, "room for fewer than {len} bytes");
        let mut front = VecDeque::new();
        self.0.transfer(len, |part, _| {
            front.push_back(*part);
            Ok(())
        })?;
        Ok(Writer(Buffers(front)))
    }
}

impl Write for Writer<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.transfer(from.len(), |to, range| {
            to.write_slice(&from[range], 0).map_err(io::Error::other)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::device::ReadyQueue;
    use crate::virtio::queue::ServedQueue;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EventFd;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("2 MiB")
    }

    /// A queue with one chain of these buffers available.
    fn queue_of(ram: &GuestRam, buffers: &[(u64, u32, u16)]) -> ServedQueue {
        let mock = MockSplitQueue::new(ram, 16);
        let chain: Vec<_> = buffers
            .iter()
            .enumerate()
            .map(|(index, &(address, len, flags))| {
                let next = if index + 1 < buffers.len() { NEXT } else { 0 };
                let at = index as u16 + 1;
                RawDescriptor::from(Descriptor::new(address, len, flags | next, at))
            })
            .collect();
        mock.build_desc_chain(&chain).expect("a chain");
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let ready = ReadyQueue { queue: mock.create_queue().expect("a queue"), kick: eventfd() };
        ServedQueue::new(ready, 0, &eventfd()).expect("served")
    }

    fn chain<'a>(queue: &mut ServedQueue, ram: &'a GuestRam) -> Chain<'a> {
        queue.pop_or_wait(ram).expect("a ring").expect("a chain")
    }

    #[test]
    fn buffers_are_one_stream_each_way() {
        let ram = ram();
        ram.write_slice(b"abcdefgh", GuestAddress(0x8000)).expect("in RAM");
        let buffers = [
            (0x8000, 3, 0),
            (0x9000, 2, WRITE),
            (0x8003, 0, 0),
            (0x8003, 5, 0),
            (0x9002, 4, WRITE),
        ];
        let mut reader =
            Reader::new(chain(&mut queue_of(&ram, &buffers), &ram), &ram).expect("all in RAM");
        assert_eq!(reader.available_bytes(), 8);
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).expect("there are that many");
        assert_eq!((&bytes, reader.available_bytes()), (b"abcd", 4));
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).expect("to the end");
        assert_eq!(rest, b"efgh");

        let mut writer =
            Writer::new(chain(&mut queue_of(&ram, &buffers), &ram), &ram).expect("all in RAM");
        assert!(writer.split_off_front(7).is_err());
        let mut front = writer.split_off_front(3).expect("room");
        assert_eq!((front.available_bytes(), writer.available_bytes()), (3, 3));
        assert_eq!(writer.write(b"4567").expect("as far as there is room"), 3);
        front.write_all(b"123").expect("room");
        let mut written = [0; 6];
        ram.read_slice(&mut written, GuestAddress(0x9000)).expect("in RAM");
        assert_eq!(&written, b"123456");
    }

    #[test]
    fn a_buffer_must_be_all_in_ram() {
        let ram = ram();
        for (address, len) in [((2 << 20) - 1, 2), (u64::MAX, 1), (4 << 30, 1)] {
            let mut queue = queue_of(&ram, &[(address, len, 0)]);
            assert!(Reader::new(chain(&mut queue, &ram), &ram).is_err(), "{address:#x}");
        }
    }

    #[test]
    fn a_chain_that_grows_while_it_is_walked_is_no_longer_for_that() {
        // An indirect table of the greatest size, whose chain ends at 200 or goes on to its last.
        const TABLE: u64 = 0x10_0000 - 0x1_0000;
        const ENTRIES: u64 = 65_535;
        let ram = ram();
        let mut queue = queue_of(&ram, &[(TABLE, ENTRIES as u32 * 16, INDIRECT)]);
        let describe = |index: u64, flags: u16| {
            let descriptor =
                RawDescriptor::from(Descriptor::new(0x8000, 1, flags, index as u16 + 1));
            ram.write_obj(descriptor, GuestAddress(TABLE + 16 * index)).expect("in RAM");
        };
        (0..ENTRIES).for_each(|index| describe(index, NEXT));
        std::thread::scope(|scope| {
            let walks = scope.spawn(|| {
                let (mut short, mut long) = (0, 0);
                while short == 0 || long == 0 {
                    match Reader::new(chain(&mut queue, &ram), &ram) {
                        Ok(reader) => {
                            assert_eq!(reader.available_bytes(), 201);
                            short += 1;
                        }
                        Err(error) => {
                            assert!(error.to_string().contains("more buffers"), "{error}");
                            long += 1;
                        }
                    }
                    queue.unpop();
                }
            });
            while !walks.is_finished() {
                describe(200, 0);
                describe(200, NEXT);
            }
        });
    }

    const RAM_LEN: u64 = 2 << 20;
    /// Where the queue's own table is, and an indirect one.
    const DIRECT: u64 = 0x1000;
    const INDIRECT_TABLE: u64 = 0x6000;

    /// A descriptor as the driver writes it.
    #[derive(Debug, Clone, Copy)]
    struct Entry {
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    }

    /// Every kind of descriptor in a table of two: a buffer in RAM or beyond all bounds, for either side,
    /// the last or with a next one before, behind or outside of the table; and these.
    fn entries(more: &[(u64, u32, u16)]) -> Vec<Entry> {
        let mut all = Vec::new();
        for (address, len) in [(0x8000, 3), (RAM_LEN - 1, u32::MAX)] {
            for flags in [0, WRITE] {
                all.push(Entry { address, len, flags, next: 0 });
                for next in 0..3 {
                    all.push(Entry { address, len, flags: flags | NEXT, next });
                }
            }
        }
        let more = more.iter().map(|&(address, len, flags)| Entry { address, len, flags, next: 0 });
        all.extend(more);
        all
    }

    /// The buffers of a chain by the specification (virtio 1.2, 2.7.5): as many as its table has, one
    /// indirect table, less than 4 GiB.
    fn walk<'a>(direct: &'a [Entry; 2], indirect: &'a [Entry; 2]) -> Vec<&'a Entry> {
        let (mut table, mut is_indirect) = (direct, false);
        let (mut at, mut left, mut total) = (0, 2, 0);
        let mut found = Vec::new();
        while left > 0
            && let Some(entry) = table.get(at)
        {
            if entry.flags & INDIRECT != 0 {
                table = match entry {
                    _ if is_indirect => break,
                    Entry { address: DIRECT, len: 32, .. } => direct,
                    Entry { address: INDIRECT_TABLE, len: 32, .. } => indirect,
                    _ => break,
                };
                (is_indirect, at, left) = (true, 0, 2);
                continue;
            }
            total += u64::from(entry.len);
            if total > u32::MAX.into() {
                break;
            }
            found.push(entry);
            (at, left) =
                if entry.flags & NEXT != 0 { (entry.next.into(), left - 1) } else { (0, 0) };
        }
        found
    }

    /// All chains that two descriptors and an indirect table of two can make.
    #[test]
    fn every_chain_is_bounded_by_its_table_and_by_ram() {
        let ram = ram();
        let mut queue = Queue::new(2).expect("a queue");
        queue.set_desc_table_address(Some(DIRECT as u32), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_ready(true);
        ram.write_obj(1u16, GuestAddress(0x2002)).expect("in RAM");
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let ready = ReadyQueue { queue, kick: eventfd() };
        let mut queue = ServedQueue::new(ready, 0, &eventfd()).expect("served");
        let write = |table: u64, entries: &[Entry; 2]| {
            for (at, entry) in (0..).zip(entries) {
                let Entry { address, len, flags, next } = *entry;
                let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags, next));
                ram.write_obj(descriptor, GuestAddress(table + 16 * at)).expect("in RAM");
            }
        };
        let tables = [
            (INDIRECT_TABLE, 32, INDIRECT),
            (INDIRECT_TABLE, 33, INDIRECT),
            (INDIRECT_TABLE, 0, INDIRECT),
            (DIRECT, 32, INDIRECT),
            (u64::MAX - 15, 32, INDIRECT),
        ];
        let direct = entries(&tables);
        let indirect = entries(&tables[..1]);
        for indirect in pairs(&indirect) {
            write(INDIRECT_TABLE, &indirect);
            for direct in pairs(&direct) {
                write(DIRECT, &direct);
                let walked = walk(&direct, &indirect);
                for to_write in [false, true] {
                    let wanted = walked.iter().filter(|e| (e.flags & WRITE != 0) == to_write);
                    let inside = wanted.clone().all(|e| e.address + u64::from(e.len) <= RAM_LEN);
                    let expected = inside.then(|| wanted.map(|e| e.len as usize).sum::<usize>());
                    let buffers = Buffers::of(chain(&mut queue, &ram), &ram, to_write);
                    queue.unpop();
                    let found = buffers.ok().map(|buffers| buffers.len());
                    assert_eq!(found, expected, "{direct:?}, {indirect:?}, to write: {to_write}");
                }
            }
        }
    }

    fn pairs(of: &[Entry]) -> impl Iterator<Item = [Entry; 2]> {
        of.iter().flat_map(|a| of.iter().map(|b| [*a, *b]))
    }
}
