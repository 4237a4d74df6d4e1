//! A template's file: a header, the head, and the pages.
//!
//! ```text
//! 0   magic, version, length of the head, checksums of the head and of the pages, length of the pages
//! 64  the head: everything but memory ([`Head`], encoded by postcard)
//!     zeros up to a page
//!     the pages, one extent behind the other
//! ```
//!
//! What is read is checked before it is used: lengths and addresses whoever wrote the file, and checksums because disks,
//! and processes that are killed, make mistakes.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use mote_agent::mailbox;
use serde::{Deserialize, Serialize};
use vm_superio::SerialState;

use super::memory::{Extent, Kept, PAGE_LEN, write};
use crate::kvm::state::MachineState;
use crate::layout;
use crate::memory::{Checksum, GuestRam};
use crate::virtio::mmio::Registers;

const MAGIC: [u8; 8] = *b"mote-tpl";
/// Counts the changes of the format.
pub const VERSION: u32 = 1;
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
    /// The checksum of the pages.
    pub(super) sum: u64,
    file: File,
    pages_start: u64,
    len: u64,
}

impl Template {
    /// Writes a template. Until the last byte is written, nothing takes it for one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(head: &Head, ram: &GuestRam, mut file: &File) -> Result<()> {
        let bytes = postcard::to_allocvec(head).context("encode the state")?;
        ensure!(bytes.len() <= MAX_HEAD, "the state is too long: {} bytes", bytes.len());
        let pages_start = pages_start(bytes.len());
        file.seek(SeekFrom::Start(pages_start as u64)).context("find the place for the pages")?;
        let mut to = BufWriter::with_capacity(1 << 20, file);
        let sum = write(ram, &head.extents, &mut to)?;
        to.flush().context("write the pages")?;
        let pages: u64 = head.extents.iter().map(|extent| extent.len).sum();
        let mut start = Vec::with_capacity(HEADER_LEN + bytes.len());
        start.extend(MAGIC);
        start.extend(VERSION.to_le_bytes());
        start.extend((bytes.len() as u32).to_le_bytes());
        start.extend(checksum(&bytes).to_le_bytes());
        start.extend(sum.to_le_bytes());
        start.extend(pages.to_le_bytes());
        start.resize(HEADER_LEN, 0);
        start.extend(bytes);
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
        let number = |at: usize| {
            let bytes = header[at..at + 8].as_array().copied().unwrap_or_default();
            u64::from_le_bytes(bytes)
        };
        let (version, head_len) = (number(8) as u32, (number(8) >> 32) as usize);
        ensure!(
            version == VERSION,
            "it has version {version} of the format, and this is {VERSION}"
        );
        let (head_sum, sum, pages) = (number(16), number(24), number(32));
        ensure!(header[40..].iter().all(|byte| *byte == 0), "its header is damaged");
        ensure!((1..=MAX_HEAD).contains(&head_len), "its state has {head_len} bytes");
        let pages_start = pages_start(head_len);
        ensure!(
            len.checked_sub(pages_start as u64) == Some(pages),
            "it has {len} bytes, and should have {pages} behind {pages_start}"
        );
        let mut bytes = vec![0; head_len];
        file.read_exact(&mut bytes).context("read its state")?;
        ensure!(checksum(&bytes) == head_sum, "its state is damaged");
        let head: Head = postcard::from_bytes(&bytes).context("decode its state")?;
        head.check(memory_bytes, pages)?;
        Ok(Template { head, sum, file, pages_start: pages_start as u64, len })
    }

    /// What it was made for: an encoded [`super::Key`].
    pub fn key(&self) -> &[u8] {
        &self.head.key
    }

    /// The file, where its pages start.
    pub(super) fn pages(&self) -> Result<&File> {
        (&self.file).seek(SeekFrom::Start(self.pages_start)).context("find its pages")?;
        Ok(&self.file)
    }

    /// Notes that it was used now. A file system that refuses that forgets it earlier.
    pub fn touch(&self) {
        let _ = self.file.set_modified(SystemTime::now());
    }

    /// How many bytes its file has.
    pub fn len(&self) -> u64 {
        self.len
    }
}

impl Head {
    /// What is kept of a VM.
    pub fn new(
        key: Vec<u8>,
        machine: MachineState,
        serial: SerialState,
        devices: Vec<Registers>,
        kept: Kept,
    ) -> Head {
        let Kept { extents, mailbox } = kept;
        Head { key, machine, serial: serial.into(), devices, mailbox, extents }
    }

    /// Checks every address. Those of the devices' queues need RAM: see [`crate::virtio::mmio::MmioDevice::check`].
    fn check(&self, memory_bytes: u64, pages: u64) -> Result<()> {
        let is_ram = |start: u64, len: u64| {
            layout::ram_ranges(memory_bytes).iter().any(|range| {
                start >= range.start
                    && start.checked_add(len).is_some_and(|end| end <= range.start + range.len)
            })
        };
        let mut last = 0;
        let mut sum = 0u64;
        for &Extent { start, len } in &self.extents {
            ensure!(start % PAGE_LEN == 0 && len % PAGE_LEN == 0 && len > 0, "an extent is odd");
            ensure!(start >= last && is_ram(start, len), "an extent is in the wrong place");
            last = start + len;
            sum += len;
        }
        ensure!(sum == pages, "its extents have {sum} bytes, and there are {pages}");
        ensure!(
            self.mailbox.len() == mailbox::PAGES,
            "its mailbox has {} pages",
            self.mailbox.len()
        );
        let is_page = |&at: &u64| at % PAGE_LEN == 0 && is_ram(at, PAGE_LEN);
        ensure!(self.mailbox.iter().all(is_page), "its mailbox is in the wrong place");
        Ok(())
    }
}

fn pages_start(head_len: usize) -> usize {
    (HEADER_LEN + head_len).next_multiple_of(PAGE_LEN as usize)
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = Checksum::new();
    sum.add(bytes);
    sum.value()
}
