//! A template's file: a header, the head, and the pages.
//!
//! ```text
//! 0   magic, version, length of the head, checksums of the head and of pages and words, length of pages and words
//! 64  the head: everything but memory ([`Head`], encoded by postcard)
//!     zeros up to a page
//!     the pages, one extent behind the other
//!     the words of pages that have few: the address of each, and what is there
//! ```
//!
//! What is read is checked before it is used: lengths and addresses whoever wrote the file, and checksums because disks,
//! and processes that are killed, make mistakes. That of the pages once for as long as nobody changes the file ([`super::cache`]).

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use mote_agent::mailbox;
use serde::{Deserialize, Serialize};
use vm_superio::SerialState;

use super::memory::{self, Extent, Kept, PAGE_LEN, Word};
use crate::kvm::state::MachineState;
use crate::layout::{self, RamRange};
use crate::memory::{Checksum, GuestRam};
use crate::virtio::mmio::Registers;

const MAGIC: [u8; 8] = *b"mote-tpl";
/// Counts the changes of the format.
pub const VERSION: u32 = 2;
const HEADER_LEN: usize = 64;
/// Longest head: a vCPU's state is about 8 KiB, and an extent at most 20 bytes.
const MAX_HEAD: usize = 16 << 20;

/// Everything but memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Head {
    /// The encoded [`super::Key`].
    pub key: Vec<u8>,
    /// What KVM has.
    pub machine: MachineState,
    /// The serial port.
    pub serial: Serial,
    /// The devices, in the order of their addresses.
    pub devices: Vec<Registers>,
    /// The addresses of the mailbox's pages.
    pub mailbox: Vec<u64>,
    /// Where the pages belong.
    pub extents: Vec<Extent>,
}

/// The serial port's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serial {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line: [u8; 2],
    modem: [u8; 2],
    scratch: u8,
    input: Vec<u8>,
}

impl From<SerialState> for Serial {
    fn from(state: SerialState) -> Serial {
        Serial {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line: [state.line_control, state.line_status],
            modem: [state.modem_control, state.modem_status],
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }
}

impl From<Serial> for SerialState {
    fn from(serial: Serial) -> SerialState {
        let Serial { divisor, line, modem, .. } = serial;
        SerialState {
            baud_divisor_low: divisor[0],
            baud_divisor_high: divisor[1],
            interrupt_enable: serial.interrupt_enable,
            interrupt_identification: serial.interrupt_identification,
            line_control: line[0],
            line_status: line[1],
            modem_control: modem[0],
            modem_status: modem[1],
            scratch: serial.scratch,
            in_buffer: serial.input,
        }
    }
}

/// A template that can be used.
#[derive(Debug)]
pub struct Template {
    pub(super) head: Head,
    /// The checksum of pages and words.
    sum: u64,
    file: File,
    pages_start: u64,
    /// Those of pages that have few, as they are in the file, at checked addresses.
    words: Vec<u8>,
    len: u64,
    /// Whether its pages had that checksum when it was last written to or later.
    is_checked: bool,
}

/// Length of [`Template::stamp`].
pub const STAMP_LEN: usize = 56;

impl Template {
    /// Writes a template. Until the last byte is written, nothing takes it for one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(head: &Head, words: &[Word], ram: &GuestRam, mut file: &File) -> Result<()> {
        let bytes = postcard::to_allocvec(head).context("encode the state")?;
        ensure!(bytes.len() <= MAX_HEAD, "the state is too long: {} bytes", bytes.len());
        let pages_start = pages_start(bytes.len());
        file.seek(SeekFrom::Start(pages_start as u64)).context("find the place for the pages")?;
        let mut to = BufWriter::with_capacity(1 << 20, file);
        let sum = memory::write(ram, &head.extents, words, &mut to)?;
        to.flush().context("write the pages")?;
        let len = head.pages_len() + (words.len() * Word::LEN) as u64;
        let start = [header_of(&bytes, sum, len), bytes].concat();
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.write_all(&start))
            .context("write the state")
    }

    /// Reads a template for a VM with this much RAM.
    ///
    /// # Errors
    /// It is none, or not one of this format, or damaged.
    pub fn read(mut file: File, memory_bytes: u64) -> Result<Template> {
        let len = file.metadata().context("look at it")?.len();
        let mut header = [0; HEADER_LEN];
        file.read_exact(&mut header).context("read its header")?;
        ensure!(header[..8] == MAGIC, "it does not start as one");
        let (words, _) = header.as_chunks::<8>();
        let number = |index: usize| u64::from_le_bytes(words[index]);
        let (version, head_len) = (number(1) as u32, (number(1) >> 32) as usize);
        ensure!(
            version == VERSION,
            "it has version {version} of the format, and this is {VERSION}"
        );
        let (head_sum, sum, rest) = (number(2), number(3), number(4));
        ensure!(header[40..].iter().all(|byte| *byte == 0), "its header is damaged");
        ensure!((1..=MAX_HEAD).contains(&head_len), "its state has {head_len} bytes");
        let pages_start = pages_start(head_len);
        ensure!(
            len.checked_sub(pages_start as u64) == Some(rest),
            "it has {len} bytes, and should have {rest} behind {pages_start}"
        );
        let mut bytes = vec![0; head_len];
        file.read_exact(&mut bytes).context("read its state")?;
        ensure!(checksum(&bytes) == head_sum, "its state is damaged");
        let head: Head = postcard::from_bytes(&bytes).context("decode its state")?;
        let ranges = layout::ram_ranges(memory_bytes);
        head.check(&ranges)?;
        let (pages_start, pages) = (pages_start as u64, head.pages_len());
        let most = memory_bytes / PAGE_LEN * (Word::FEW * Word::LEN) as u64;
        let words = match rest.checked_sub(pages) {
            Some(words) if words.is_multiple_of(Word::LEN as u64) && words <= most => words,
            _ => bail!("its extents have {pages} bytes, and there are {rest}"),
        };
        let mut words = vec![0; words as usize];
        file.read_exact_at(&mut words, pages_start + pages).context("read its words")?;
        let is_right = |at: u64| at.is_multiple_of(8) && is_ram(&ranges, at, 8);
        let all_right = Word::all(&words).all(|word| is_right(word.address));
        ensure!(all_right, "a word is in the wrong place");
        Ok(Template { head, sum, file, pages_start, words, len, is_checked: false })
    }

    /// Which file it is and when it was changed: its device, inode and length, and two of its times, of which nobody can set
    /// one. `None` if that was just now: one more change could have the same time.
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub fn stamp(&self) -> io::Result<Option<[u8; STAMP_LEN]>> {
        /// Above the resolution of any file system's times.
        const CLEAR: Duration = Duration::from_secs(2);
        let of = self.file.metadata()?;
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(of.ctime().max(0) as u64);
        if !changed.elapsed().is_ok_and(|age| age > CLEAR) {
            return Ok(None);
        }
        let times = [of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec()].map(|n| n as u64);
        let words = [of.dev(), of.ino(), of.len(), times[0], times[1], times[2], times[3]];
        let mut stamp = [0; STAMP_LEN];
        for (bytes, word) in stamp.chunks_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Ok(Some(stamp))
    }

    /// Takes its pages for whole: it was not changed since they were.
    pub fn believe(&mut self) {
        self.is_checked = true;
    }

    /// Whether they are taken for that.
    pub fn is_checked(&self) -> bool {
        self.is_checked
    }

    /// What it was made for: an encoded [`super::Key`].
    pub fn key(&self) -> &[u8] {
        &self.head.key
    }

    /// Fills new RAM with its pages.
    ///
    /// # Errors
    /// They cannot be read, or are damaged.
    pub fn fill(&self, ram: &GuestRam) -> Result<()> {
        let expected = (!self.is_checked).then_some(self.sum);
        memory::fill(ram, &self.head.extents, &self.words, self.pages()?, expected)
    }

    /// Where it has something in the guest's RAM: addresses and lengths.
    #[cfg(any(test, fuzzing))]
    pub fn places(&self) -> impl Iterator<Item = (u64, u64)> {
        let extents = self.head.extents.iter().map(|extent| (extent.start, extent.len));
        let words = Word::all(&self.words).map(|word| (word.address, 8));
        extents.chain(words).chain(self.head.mailbox.iter().map(|page| (*page, PAGE_LEN)))
    }

    /// The file, where its pages start.
    fn pages(&self) -> Result<&File> {
        (&self.file).seek(SeekFrom::Start(self.pages_start)).context("find its pages")?;
        Ok(&self.file)
    }

    /// How many bytes its file has.
    pub fn file_len(&self) -> u64 {
        self.len
    }
}

impl Head {
    /// What is kept of a VM, but for its words.
    pub fn new(
        key: Vec<u8>,
        machine: MachineState,
        serial: SerialState,
        devices: Vec<Registers>,
        kept: &Kept,
    ) -> Head {
        let (extents, mailbox) = (kept.extents.clone(), kept.mailbox.clone());
        Head { key, machine, serial: serial.into(), devices, mailbox, extents }
    }

    fn pages_len(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// Checks every address. Those of the devices' queues need RAM: see [`crate::virtio::mmio::MmioDevice::check`].
    fn check(&self, ranges: &[RamRange]) -> Result<()> {
        let mut last = 0;
        for &Extent { start, len } in &self.extents {
            ensure!(start % PAGE_LEN == 0 && len % PAGE_LEN == 0 && len > 0, "an extent is odd");
            ensure!(start >= last && is_ram(ranges, start, len), "an extent is in the wrong place");
            last = start + len;
        }
        ensure!(
            self.mailbox.len() == mailbox::PAGES,
            "its mailbox has {} pages",
            self.mailbox.len()
        );
        let is_page = |&at: &u64| at % PAGE_LEN == 0 && is_ram(ranges, at, PAGE_LEN);
        ensure!(self.mailbox.iter().all(is_page), "its mailbox is in the wrong place");
        Ok(())
    }
}

fn is_ram(ranges: &[RamRange], start: u64, len: u64) -> bool {
    ranges.iter().any(|range| {
        let end = start.checked_add(len);
        start >= range.start && end.is_some_and(|end| end <= range.start + range.len)
    })
}

fn header_of(head: &[u8], sum: u64, rest: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_LEN);
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend((head.len() as u32).to_le_bytes());
    header.extend(checksum(head).to_le_bytes());
    header.extend(sum.to_le_bytes());
    header.extend(rest.to_le_bytes());
    header.resize(HEADER_LEN, 0);
    header
}

/// The header of a file with these bytes as its head and as its pages.
#[cfg(any(test, fuzzing))]
pub fn header(head: &[u8], pages: &[u8]) -> Vec<u8> {
    header_of(head, checksum(pages), pages.len() as u64)
}

fn pages_start(head_len: usize) -> usize {
    (HEADER_LEN + head_len).next_multiple_of(PAGE_LEN as usize)
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = Checksum::default();
    sum.add(bytes);
    sum.value()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;
    use vm_memory::{Bytes, GuestAddress};

    const RAM: u64 = 4 << 20;

    fn ram() -> GuestRam {
        crate::memory::create_ram(RAM).expect("RAM")
    }

    /// A template with two extents and a page of few words, and its RAM.
    fn written() -> (File, GuestRam) {
        let ram = ram();
        for (at, byte) in [(0x3000, 1), (0x4000, 2), (0x10_0000, 3)] {
            ram.write_slice(&[byte; 100], GuestAddress(at)).expect("written");
        }
        for at in [0x5000, 0x5ff8] {
            ram.write_obj(at, GuestAddress(at)).expect("written");
        }
        for number in 0..mailbox::PAGES {
            let mut page = [0; mailbox::PAGE_LEN];
            mailbox::mark(&mut page, number);
            let at = 0x20_0000 + number as u64 * PAGE_LEN;
            ram.write_slice(&page, GuestAddress(at)).expect("written");
        }
        let kept = memory::look_through(&ram, &[]).expect("looked through");
        let extent = |start, pages| Extent { start, len: pages * PAGE_LEN };
        assert_eq!(kept.extents, [extent(0x3000, 2), extent(0x10_0000, 1)]);
        let word = |at| Word { address: at, value: at };
        assert_eq!(kept.words, [word(0x5000), word(0x5ff8)]);
        let serial = SerialState { interrupt_enable: 5, in_buffer: vec![7], ..Default::default() };
        let head = Head::new(b"key".into(), MachineState::blank(2), serial, Vec::new(), &kept);
        let file = sys::sealed_memory_file(64 << 20).expect("a file");
        Template::write(&head, &kept.words, &ram, &file).expect("written");
        (copy(&file, 64 << 20), ram)
    }

    /// The first bytes of a file, without the zeros behind a template.
    fn copy(file: &File, len: usize) -> File {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, 0).expect("read");
        let pages = u64::from_le_bytes(bytes[32..40].try_into().expect("eight"));
        let head_len = u32::from_le_bytes(bytes[12..16].try_into().expect("four"));
        bytes.truncate(pages_start(head_len as usize) + pages as usize);
        of_bytes(&bytes)
    }

    fn of_bytes(bytes: &[u8]) -> File {
        let path = std::env::temp_dir().join(format!(
            "mote-template-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::write(&path, bytes).expect("written");
        let file = File::open(&path).expect("opened");
        std::fs::remove_file(&path).expect("removed");
        file
    }

    fn bytes_of(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().expect("metadata").len() as usize];
        file.read_exact_at(&mut bytes, 0).expect("read");
        bytes
    }

    fn restored(bytes: &[u8]) -> Result<GuestRam> {
        let template = Template::read(of_bytes(bytes), RAM)?;
        let ram = ram();
        template.fill(&ram)?;
        Ok(ram)
    }

    #[test]
    fn everything_comes_back() {
        let (file, ram) = written();
        let bytes = bytes_of(&file);
        let template = Template::read(of_bytes(&bytes), RAM).expect("whole");
        assert_eq!((template.key(), template.file_len()), (&b"key"[..], bytes.len() as u64));
        assert_eq!(template.head.mailbox[..2], [0x20_0000, 0x20_1000]);
        let machine = postcard::to_allocvec(&template.head.machine).expect("encoded");
        assert_eq!(machine, postcard::to_allocvec(&MachineState::blank(2)).expect("encoded"));
        let serial = SerialState::from(template.head.serial.clone());
        assert_eq!((serial.interrupt_enable, serial.in_buffer), (5, vec![7]));
        let (mut was, mut is) = (vec![0; 0x20_0000], vec![0; 0x20_0000]);
        ram.read_slice(&mut was, GuestAddress(0)).expect("read");
        let restored = restored(&bytes).expect("whole");
        restored.read_slice(&mut is, GuestAddress(0)).expect("read");
        assert!(was == is);
        let (mut template, again) = (template, self::ram());
        template.believe();
        template.fill(&again).expect("filled");
        again.read_slice(&mut is, GuestAddress(0)).expect("read");
        assert!(was == is);
    }

    #[test]
    fn damage_is_found_wherever_it_is() {
        let bytes = bytes_of(&written().0);
        let mut flipped = bytes.clone();
        // Every byte of the header, some of the state, and some of each page.
        let places = (0..HEADER_LEN).chain((HEADER_LEN..bytes.len()).step_by(509));
        for at in places {
            flipped[at] ^= 1 << (at % 8);
            let is_filler = bytes_of_filler(&bytes).contains(&at);
            assert_eq!(restored(&flipped).is_ok(), is_filler, "{at}");
            flipped[at] = bytes[at];
        }
        for len in [0, 1, HEADER_LEN, HEADER_LEN + 1, 4096, bytes.len() - 4096, bytes.len() - 1] {
            assert!(restored(&bytes[..len]).is_err(), "{len}");
        }
        assert!(restored(&[&bytes[..], &[0]].concat()).is_err());
    }

    /// Between the state and the pages, where nothing is read.
    fn bytes_of_filler(bytes: &[u8]) -> std::ops::Range<usize> {
        let head_len = u32::from_le_bytes(bytes[12..16].try_into().expect("four")) as usize;
        HEADER_LEN + head_len..pages_start(head_len)
    }

    #[test]
    fn other_versions_and_sizes_are_told_from_damage() {
        let mut bytes = bytes_of(&written().0);
        let told = |bytes: &[u8], memory| {
            Template::read(of_bytes(bytes), memory).expect_err("refused").to_string()
        };
        assert!(told(&bytes, 2 << 20).contains("mailbox is in the wrong place"));
        bytes[8] = VERSION as u8 + 1;
        assert_eq!(told(&bytes, RAM), "it has version 3 of the format, and this is 2");
        assert_eq!(told(b"#!/bin/sh\n", RAM), "read its header");
        assert_eq!(told(&[b'x'; 100], RAM), "it does not start as one");
    }

    #[test]
    fn addresses_outside_of_ram_are_refused() {
        let ranges = layout::ram_ranges(RAM);
        let whole = || Head {
            key: Vec::new(),
            machine: MachineState::blank(1),
            serial: SerialState::default().into(),
            devices: Vec::new(),
            mailbox: (0..mailbox::PAGES as u64).map(|page| page * PAGE_LEN).collect(),
            extents: vec![Extent { start: 0x10_0000, len: 2 * PAGE_LEN }],
        };
        whole().check(&ranges).expect("whole");
        type Spoil = fn(&mut Head);
        let spoil: [(&str, Spoil); 8] = [
            ("not a page", |head| head.extents[0].start += 1),
            ("part of a page", |head| head.extents[0].len -= 1),
            ("behind RAM", |head| head.extents[0].start = RAM - PAGE_LEN),
            ("overflows", |head| head.extents[0].start = u64::MAX - PAGE_LEN + 1),
            ("twice", |head| head.extents.push(head.extents[0])),
            ("empty", |head| head.extents[0].len = 0),
            ("mailbox behind RAM", |head| head.mailbox[3] = RAM),
            ("mailbox too short", |head| head.mailbox.truncate(1)),
        ];
        for (what, spoil) in spoil {
            let mut head = whole();
            spoil(&mut head);
            assert!(head.check(&ranges).is_err(), "{what}");
        }
        let head = postcard::to_allocvec(&whole()).expect("encoded");
        let read = |rest: &[u8]| {
            let mut bytes = [&header(&head, rest), &head[..]].concat();
            bytes.resize(pages_start(head.len()), 0);
            bytes.extend(rest);
            Template::read(of_bytes(&bytes), RAM).map(drop)
        };
        let pages = vec![1; 2 * PAGE_LEN as usize];
        let word = |at: u64| [&pages[..], &at.to_le_bytes(), &[1; 8]].concat();
        read(&pages).expect("no words");
        read(&word(RAM - 8)).expect("a word at RAM's end");
        for (what, rest) in [
            ("word behind RAM", &word(RAM)[..]),
            ("word between words", &word(4)),
            ("half a word", &word(0)[..pages.len() + 8]),
            ("too few pages", &pages[1..]),
            ("too many words", &[&pages[..], &vec![0; (RAM / 32) as usize + Word::LEN]].concat()),
        ] {
            assert!(read(rest).is_err(), "{what}");
        }
    }
}
