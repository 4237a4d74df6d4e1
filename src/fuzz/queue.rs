//! A queue whose rings and descriptors are any bytes, anywhere, also in each other.
//!
//! Whatever they are: no more chains are handled than asked for, each handled chain is returned once,
//! and only the used ring and device-writable buffers are written. Unless the ring is found broken, no
//! available chain is left without a kick.

use std::io::{Read, Write};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::Input;
use crate::memory::GuestRam;
use crate::virtio::buffers::{Reader, Writer};
use crate::virtio::device::{F_EVENT_IDX, ReadyQueue};
use crate::virtio::queue::{Chain, ServedQueue};

const RAM: usize = 64 * 1024;
/// Most bytes that the handler reads or writes per chain.
const MOVED: usize = 4096;
/// Memory is compared in pieces of this size.
const PIECE: usize = 256;

struct Bench {
    ram: GuestRam,
    queue: ServedQueue,
    kick: EventFd,
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    /// Chains returned so far.
    returned: u16,
    /// Whether a chain could write into the rings, or rings into each other.
    entangled: bool,
}

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let Some(mut bench) = Bench::new(&mut input) else { return };
    while !input.is_empty() {
        match input.u8() % 8 {
            0 => {
                let (at, bytes) = (u64::from(input.u16()), input.short());
                bench.write(at, bytes);
                // The driver only reads the used ring.
                bench.entangled |= at < bench.used_end() && at + bytes.len() as u64 > bench.used;
            }
            1 | 2 => bench.describe(&mut input),
            3 | 4 => bench.announce(&mut input),
            5 => bench.pop_twice(),
            // The device stops.
            writes if bench.serve(usize::from(input.u8()), writes == 6).is_err() => return,
            _ => {}
        }
    }
}

impl Bench {
    fn new(input: &mut Input<'_>) -> Option<Self> {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).expect("RAM");
        let size = 1 << (input.u8() % 9);
        let event_idx = if input.flag() { F_EVENT_IDX } else { 0 };
        // Mostly apart from each other, but sometimes anywhere.
        let (table, avail, used) = match input.u8() {
            0 => (u32::from(input.u16()), u32::from(input.u16()), u32::from(input.u16())),
            _ => (0x1000, 0x3000, 0x4000),
        };
        let mut queue = Queue::new(256).expect("a queue");
        queue.set_size(size);
        queue.set_desc_table_address(Some(table), None);
        queue.set_avail_ring_address(Some(avail), None);
        queue.set_used_ring_address(Some(used), None);
        queue.set_ready(true);
        if !queue.is_valid(&ram) {
            return None;
        }
        // Addresses that are not aligned are refused.
        let (table, avail, used) = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
        let kick = EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let ready = ReadyQueue { queue, kick: kick.try_clone().expect("eventfd") };
        let queue = ServedQueue::new(ready, event_idx, &interrupt).expect("served");
        let entangled = (table, avail, used) != (0x1000, 0x3000, 0x4000);
        Some(Bench { ram, queue, kick, size, table, avail, used, returned: 0, entangled })
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let len = bytes.len().min(RAM - at as usize);
        self.ram.write_slice(&bytes[..len], GuestAddress(at)).expect("in RAM");
    }

    /// A descriptor: mostly with a buffer inside memory, and followed by the next descriptor.
    fn describe(&self, input: &mut Input<'_>) {
        let index = u64::from(input.u8());
        let (addr, len) = match input.u8() {
            0 => (input.u64(), input.edge()),
            1 => (0x1000 * u64::from(input.u8() % 16), 16 * u32::from(input.u16())),
            page => (0x8000 + 0x80 * u64::from(page), u32::from(input.u8())),
        };
        let flags = u16::from(input.u8() % 8);
        let next = match input.u8() {
            0 => input.u16(),
            step => index as u16 + u16::from(step),
        };
        let mut bytes = Vec::new();
        bytes.extend(addr.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write((self.table + 16 * index) & 0xffff, &bytes);
    }

    /// Writes heads into the ring, and an index that mostly fits them.
    fn announce(&self, input: &mut Input<'_>) {
        let count = input.u8() % 16;
        let heads = input.bytes(count.into());
        let index: u16 = self.ram.read_obj(GuestAddress(self.avail + 2)).expect("in RAM");
        for (offset, head) in (0..).zip(heads) {
            let slot = index.wrapping_add(offset) % self.size;
            self.write(self.avail + 4 + 2 * u64::from(slot), &u16::from(*head).to_le_bytes());
        }
        let index = match input.u8() {
            0 => input.u16(),
            _ => index.wrapping_add(heads.len() as u16),
        };
        self.write(self.avail + 2, &index.to_le_bytes());
    }

    fn pop_twice(&mut self) {
        let Ok(Some(chain)) = self.queue.pop_or_wait(&self.ram) else { return };
        let head = chain.head_index();
        self.queue.unpop();
        let again = self.queue.pop_or_wait(&self.ram).map(|c| c.map(|c| c.head_index()));
        if !self.entangled {
            assert_eq!(again.ok(), Some(Some(head)), "what was put back is there");
        }
        self.queue.unpop();
    }

    fn serve(&mut self, limit: usize, writes: bool) -> anyhow::Result<()> {
        let before = self.contents();
        let _ = self.kick.read();
        let ram = self.ram.clone();
        let mut handled = 0;
        let mut writable = Vec::new();
        let served = self.queue.serve(&ram, limit, |chain| {
            handled += 1;
            if writes { fill(chain, &ram, &mut writable) } else { drain(chain, &ram) }
        });
        assert!(handled <= limit);
        self.returned = self.returned.wrapping_add(handled as u16);
        let kicked = self.kick.read().is_ok();
        let used_end = self.used_end();
        let may_change = |at: u64| {
            (self.used..used_end).contains(&at) || writable.iter().any(|range| range.contains(&at))
        };
        // Most pieces have not changed, and comparing byte by byte would take most of the time.
        for (piece, (old, new)) in
            before.chunks(PIECE).zip(self.contents().chunks(PIECE)).enumerate()
        {
            if old != new {
                for (offset, (old, new)) in old.iter().zip(new).enumerate() {
                    let at = (piece * PIECE + offset) as u64;
                    assert!(old == new || may_change(at), "{at:#x} was written");
                }
            }
        }
        self.entangled |= writable.iter().any(|range| range.start < 0x8000);
        if !self.entangled && served.is_ok() {
            let index = |at| self.ram.read_obj::<u16>(GuestAddress(at)).expect("in RAM");
            assert_eq!(index(self.used + 2), self.returned, "each chain is returned once");
            assert!(kicked == (handled == limit), "a kick goes with what is cut, and nothing else");
            assert!(kicked || index(self.avail + 2) == self.returned, "nothing stays behind");
        }
        served
    }

    fn used_end(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size)
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM];
        self.ram.read_slice(&mut bytes, GuestAddress(0)).expect("in RAM");
        bytes
    }
}

fn drain(chain: Chain<'_>, ram: &GuestRam) -> u32 {
    if let Ok(mut reader) = Reader::new(chain, ram) {
        let len = reader.available_bytes().min(MOVED);
        reader.read_exact(&mut vec![0; len]).expect("there are that many");
    }
    0
}

fn fill(chain: Chain<'_>, ram: &GuestRam, writable: &mut Vec<std::ops::Range<u64>>) -> u32 {
    let buffers = chain.clone().filter(|descriptor| descriptor.is_write_only());
    let ranges: Vec<_> =
        buffers.map(|d| d.addr().0..d.addr().0.saturating_add(d.len().into())).collect();
    let Ok(mut writer) = Writer::new(chain, ram) else { return 0 };
    let len = writer.available_bytes().min(MOVED);
    writer.write_all(&vec![0xa5; len]).expect("there is that much room");
    writable.extend(ranges);
    len as u32
}
