//! A template's memory: which pages of a guest's RAM have anything in them, and how they get into another's.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use mote_agent::mailbox;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout;
use crate::memory::{Checksum, GuestRam, HUGE_PAGE};
use crate::sys::holes::next_data;
use crate::sys::process;

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

/// A word that is not zero, of a page that has few of them: such pages are not copied but written to, since the guest's
/// kernel has hundreds with no more than an object's link to the next, and each copy costs as much as a thousand instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// Guest address, a multiple of the word's length.
    pub address: u64,
    /// What is there.
    pub value: u64,
}

impl Word {
    /// Length of one in a template's file: address and value, little-endian.
    pub const LEN: usize = 16;
    /// How many words are few.
    pub const FEW: usize = 8;

    fn to_bytes(self) -> [u8; Word::LEN] {
        (u128::from(self.value) << 64 | u128::from(self.address)).to_le_bytes()
    }

    /// Those that [`write()`] has written.
    pub fn all(bytes: &[u8]) -> impl Iterator<Item = Word> {
        let both = bytes.as_chunks().0.iter().map(|bytes| u128::from_le_bytes(*bytes));
        both.map(|both| Word { address: both as u64, value: (both >> 64) as u64 })
    }
}

/// What there is to keep of a guest's RAM.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The pages that have more than a few words in them, in the order of their addresses.
    pub extents: Vec<Extent>,
    /// The words of the others.
    pub words: Vec<Word>,
    /// The addresses of the mailbox's pages, which are not among them.
    pub mailbox: Vec<u64>,
}

/// Looks through a guest's RAM, which nobody writes to meanwhile, and which began with this cold text.
///
/// # Errors
/// The memory file cannot be looked through, or there is not exactly one mailbox.
pub fn look_through(ram: &GuestRam, cold_text: &[u8]) -> Result<Kept> {
    let mut kept = Kept::default();
    let mut mailbox = vec![None; mailbox::PAGES];
    let mut page = [0; PAGE_LEN as usize];
    // A guest that starts from the template has the text as well: only what was patched is to keep.
    let mut addresses = Vec::new();
    let cold_pages = (layout::COLD_TEXT.start..).step_by(PAGE_LEN as usize);
    for (address, bytes) in cold_pages.zip(cold_text.chunks(PAGE_LEN as usize)) {
        ram.read_slice(&mut page, GuestAddress(address)).context("read a page of text")?;
        if page != *bytes {
            addresses.push(address);
        }
    }
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
                } else {
                    match few_words(address, &page) {
                        // Cold text is not all zeros before it is written to.
                        Some(words)
                            if words.is_empty() || !layout::COLD_TEXT.contains(&address) =>
                        {
                            kept.words.extend(words);
                        }
                        _ => addresses.push(address),
                    }
                }
            }
            from = data.end;
        }
    }
    addresses.sort_unstable();
    addresses.into_iter().for_each(|address| kept.add(address));
    let mailbox = mailbox.into_iter().collect::<Option<_>>().context("there is no mailbox")?;
    Ok(Kept { mailbox, ..kept })
}

/// The words that are not zero, if there are few.
fn few_words(address: u64, page: &[u8]) -> Option<Vec<Word>> {
    let (values, _) = page.as_chunks::<8>();
    let addresses = (address..).step_by(8);
    let words = addresses.zip(values.iter().map(|value| u64::from_le_bytes(*value)));
    let words = words.filter(|(_, value)| *value != 0);
    let few: Vec<_> =
        words.take(Word::FEW + 1).map(|(address, value)| Word { address, value }).collect();
    (few.len() <= Word::FEW).then_some(few)
}

impl Kept {
    fn add(&mut self, address: u64) {
        match self.extents.last_mut() {
            Some(last) if last.start + last.len == address => last.len += PAGE_LEN,
            _ => self.extents.push(Extent { start: address, len: PAGE_LEN }),
        }
    }
}

/// Writes the pages, one extent behind the other, and the words, and returns the checksum of all.
///
/// # Errors
/// The writer fails.
pub fn write(
    ram: &GuestRam,
    extents: &[Extent],
    words: &[Word],
    mut to: impl Write,
) -> Result<u64> {
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
    let words = words.iter().flat_map(|word| word.to_bytes()).collect::<Vec<_>>();
    sum.add(&words);
    to.write_all(&words).context("write the words")?;
    Ok(sum.value())
}

/// Fills new RAM with the pages that follow in the file, and with the words that follow them there. Extents and words have
/// their places in it.
///
/// # Errors
/// The file cannot be read, or pages and words do not have the checksum that is expected.
pub fn fill(
    ram: &GuestRam,
    extents: &[Extent],
    words: &[u8],
    file: &File,
    expected: Option<u64>,
) -> Result<()> {
    match expected {
        Some(sum) => fill_with_sum(ram, extents, words, file, sum)?,
        None => fill_by_halves(ram, extents, file)?,
    }
    for Word { address, value } in Word::all(words) {
        ram.write_obj(value, GuestAddress(address)).context("write a word")?;
    }
    Ok(())
}

fn fill_with_sum(
    ram: &GuestRam,
    extents: &[Extent],
    words: &[u8],
    mut file: &File,
    expected: u64,
) -> Result<()> {
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
    sum.add(words);
    ensure!(sum.value() == expected, "its pages are not those that were written");
    Ok(())
}

/// Does that without a look at the pages, and by two threads where there are CPUs for them: nearly all of it is the host's
/// kernel's work, which clears the memory and copies.
fn fill_by_halves(ram: &GuestRam, extents: &[Extent], mut file: &File) -> Result<()> {
    let copy = |extents: &[Extent], mut file: &File| {
        extents.iter().try_for_each(|extent| {
            let len = usize::try_from(extent.len)?;
            ram.read_exact_volatile_from(GuestAddress(extent.start), &mut file, len)
                .context("read its pages")
        })
    };
    let (first, second) = halves(extents);
    let another = process::has_several_cpus().then(|| {
        let len: u64 = first.iter().map(|extent| extent.len).sum();
        // With a position of its own.
        let mut another = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        another.seek(SeekFrom::Start(file.stream_position()? + len)).map(|_| another)
    });
    let Some(Ok(another)) = another else {
        return copy(&first, file).and_then(|()| copy(&second, file));
    };
    thread::scope(|scope| {
        let helper = thread::Builder::new().spawn_scoped(scope, || copy(&second, &another));
        let copied = copy(&first, file);
        let helped = match helper {
            Ok(helper) => helper.join().unwrap_or_else(|_| bail!("the second thread died")),
            // The host has no room for one more.
            Err(_) => copy(&second, &another),
        };
        copied.and(helped)
    })
}

/// Two halves of them, as far as that goes without one huge page in both.
fn halves(extents: &[Extent]) -> (Vec<Extent>, Vec<Extent>) {
    let mut left = extents.iter().map(|extent| extent.len).sum::<u64>() / 2;
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for &Extent { start, len } in extents {
        let len_first = match left {
            0 => 0,
            _ => ((start + left.min(len)).next_multiple_of(HUGE_PAGE) - start).min(len),
        };
        left = left.saturating_sub(len);
        if len_first > 0 {
            first.push(Extent { start, len: len_first });
        }
        if len_first < len {
            left = 0;
            second.push(Extent { start: start + len_first, len: len - len_first });
        }
    }
    (first, second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, ColdText};
    use crate::plan;

    #[test]
    fn of_cold_text_what_was_patched_is_kept() {
        let text = plan::cold_text();
        let ram = memory::create_ram(32 << 20).expect("RAM");
        memory::put_cold_text(&ram, ColdText::Shared(text)).expect("put there");
        for number in 0..mailbox::PAGES {
            let mut page = [0; mailbox::PAGE_LEN];
            mailbox::mark(&mut page, number);
            let at = layout::COLD_TEXT.end + number as u64 * PAGE_LEN;
            ram.write_slice(&page, GuestAddress(at)).expect("written");
        }
        let patched = layout::COLD_TEXT.start + 5 * PAGE_LEN;
        ram.write_obj(!text[5 * PAGE_LEN as usize + 7], GuestAddress(patched + 7))
            .expect("written");
        ram.write_obj(1u8, GuestAddress(0x1000)).expect("written");
        let kept = look_through(&ram, text).expect("looked through");
        let page = |start| Extent { start, len: PAGE_LEN };
        assert_eq!(kept.extents, [page(patched)]);
        assert_eq!(kept.words, [Word { address: 0x1000, value: 1 }]);
    }

    #[test]
    fn halves_are_parted_between_huge_pages() {
        let extent = |start: u64, pages: u64| Extent { start, len: pages * PAGE_LEN };
        let huge = HUGE_PAGE / PAGE_LEN;
        let whole = [extent(0, 3), extent(HUGE_PAGE, 3 * huge), extent(5 * HUGE_PAGE, 1)];
        let (first, second) = halves(&whole);
        assert_eq!(first, [extent(0, 3), extent(HUGE_PAGE, 2 * huge)]);
        assert_eq!(second, [extent(3 * HUGE_PAGE, huge), extent(5 * HUGE_PAGE, 1)]);
        let two = [extent(0, 1), extent(HUGE_PAGE, 1)];
        assert_eq!(halves(&two), (two[..1].to_vec(), two[1..].to_vec()));
        assert_eq!(halves(&two[..1]), (two[..1].to_vec(), vec![]));
        assert_eq!(halves(&[]), (vec![], vec![]));
    }
}
