//! A template's memory: which pages of a guest's RAM have anything in them, and how they get into another's.

use std::fs::File;
use std::io::Write;

use anyhow::{Context, Result, ensure};
use mote_agent::mailbox;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{Checksum, GuestRam};
use crate::sys::holes::next_data;

/// How much is read at once.
const PART_LEN: usize = 128 << 10;

/// Length of a page.
pub const PAGE_LEN: u64 = mailbox::PAGE_LEN as u64;

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest address of the first.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What there is to keep of a guest's RAM.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The pages that are not all zeros, in the order of their addresses.
    pub extents: Vec<Extent>,
    /// The addresses of the mailbox's pages, which are not among them.
    pub mailbox: Vec<u64>,
}

/// Looks through a guest's RAM, which nobody writes to meanwhile.
///
/// # Errors
/// The memory file cannot be looked through, or there is not exactly one mailbox.
pub fn look_through(ram: &GuestRam) -> Result<Kept> {
    let mut kept = Kept::default();
    let mut mailbox = vec![None; mailbox::PAGES];
    let mut page = [0; PAGE_LEN as usize];
    for region in ram.iter() {
        let backing = region.file_offset().context("RAM is no file")?;
        let (base, end) = (backing.start(), backing.start() + region.len());
        let mut from = base;
        while let Some(data) = next_data(backing.file(), from).context("find the guest's pages")?
            && data.start < end
        {
            for offset in data.clone().step_by(PAGE_LEN as usize).take_while(|at| *at < end) {
                let address = region.start_addr().0 + (offset - base);
                ram.read_slice(&mut page, GuestAddress(address)).context("read a page")?;
                if let Some(number) = mailbox::number(&page) {
                    ensure!(mailbox[number].is_none(), "there are two mailboxes");
                    mailbox[number] = Some(address);
                } else if page.iter().any(|byte| *byte != 0) {
                    kept.add(address);
                }
            }
            from = data.end;
        }
    }
    let mailbox = mailbox.into_iter().collect::<Option<_>>().context("there is no mailbox")?;
    Ok(Kept { mailbox, ..kept })
}

impl Kept {
    fn add(&mut self, address: u64) {
        match self.extents.last_mut() {
            Some(last) if last.start + last.len == address => last.len += PAGE_LEN,
            _ => self.extents.push(Extent { start: address, len: PAGE_LEN }),
        }
    }
}

/// Writes the pages, one extent behind the other, and returns their checksum.
///
/// # Errors
/// The writer fails.
pub fn write(ram: &GuestRam, extents: &[Extent], mut to: impl Write) -> Result<u64> {
    let mut sum = Checksum::default();
    let mut page = [0; PAGE_LEN as usize];
    let addresses = |extent: &Extent| {
        let end = extent.start + extent.len;
        (extent.start..end).step_by(PAGE_LEN as usize)
    };
    for address in extents.iter().flat_map(addresses) {
        ram.read_slice(&mut page, GuestAddress(address)).context("read a page")?;
        sum.add(&page);
        to.write_all(&page).context("write a page")?;
    }
    Ok(sum.value())
}

/// Fills new RAM with the pages that follow in the file. The extents have their places in it.
///
/// # Errors
/// The file cannot be read, or the pages do not have the checksum that is expected.
pub fn fill(
    ram: &GuestRam,
    extents: &[Extent],
    mut file: &File,
    expected: Option<u64>,
) -> Result<()> {
    let Some(expected) = expected else {
        return extents.iter().try_for_each(|extent| {
            let len = usize::try_from(extent.len)?;
            ram.read_exact_volatile_from(GuestAddress(extent.start), &mut file, len)
                .context("read its pages")
        });
    };
    let mut sum = Checksum::default();
    for extent in extents {
        for at in (extent.start..extent.start + extent.len).step_by(PART_LEN) {
            let len = (extent.start + extent.len - at).min(PART_LEN as u64) as usize;
            ram.read_exact_volatile_from(GuestAddress(at), &mut file, len)
                .context("read its pages")?;
            // While they are in the CPU's cache.
            sum.add_ram(ram, GuestAddress(at), len)?;
        }
    }
    ensure!(sum.value() == expected, "its pages are not those that were written");
    Ok(())
}
