//! How a guest that starts from a template learns what its box is: the VMM writes a [`Letter`] into memory that the
//! agent set aside before the template was made, and whose pages the VMM has found by their [`TAG`]. There is no device
//! and no exit in it.

/// What a page of the mailbox starts with: chosen at random, so that nothing else looks like one.
pub const TAG: [u8; 16] = *b"\xd1\x5e\x8f\x03mote-mail\x9a\x2c\xe7";

/// Length of a page.
pub const PAGE_LEN: usize = 4096;

/// How many pages the mailbox has.
pub const PAGES: usize = 64;

/// Where a page's part of the letter starts: behind the tag and the page's number (32 bits), on a whole word.
pub const PART_START: usize = 24;

/// How many bytes of a letter a page has room for.
pub const PART_LEN: usize = PAGE_LEN - PART_START;

/// Where in the first page the letter's wall clock is: the VMM writes it last, just before the guest runs.
pub const REALTIME_AT: usize = PART_START + 4;

/// How many bytes of randomness a guest gets from its host.
pub const SEED_LEN: usize = 64;

/// The number of the register page that is the door: the agent has its driver look at it when the template is to be
/// made. No device is ever there.
pub const DOOR: usize = 39;

/// What a guest is told when it goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    /// The host's wall clock, in nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Fresh randomness.
    pub seed: [u8; SEED_LEN],
    /// The register pages that have become devices since: the first of them, and how many.
    pub devices: (u16, u16),
    /// The box, as JSON ([`crate::instance::Instance`]).
    pub instance: Vec<u8>,
}

/// Bytes of a letter before its instance: its length, the clock, the devices, the seed.
const HEAD_LEN: usize = 4 + 8 + 4 + SEED_LEN;

impl Letter {
    /// Most bytes that an instance may have.
    pub const MAX_INSTANCE: usize = PAGES * PART_LEN - HEAD_LEN;

    /// What each page gets behind [`PART_START`], from the first page on; `None` if the instance is too long.
    pub fn parts(&self) -> Option<Vec<Vec<u8>>> {
        if self.instance.len() > Self::MAX_INSTANCE {
            return None;
        }
        let mut bytes = Vec::with_capacity(HEAD_LEN + self.instance.len());
        bytes.extend((self.instance.len() as u32).to_le_bytes());
        bytes.extend(self.realtime_ns.to_le_bytes());
        bytes.extend(self.devices.0.to_le_bytes());
        bytes.extend(self.devices.1.to_le_bytes());
        bytes.extend(self.seed);
        bytes.extend(&self.instance);
        Some(bytes.chunks(PART_LEN).map(<[u8]>::to_vec).collect())
    }

    /// The letter in these pages; `None` if there is none yet.
    pub fn read(pages: &[u8]) -> Option<Letter> {
        let parts = pages.chunks_exact(PAGE_LEN).flat_map(|page| page.iter().skip(PART_START));
        let mut bytes = parts.copied();
        let len = u32::from_le_bytes(take(&mut bytes)?) as usize;
        let realtime_ns = u64::from_le_bytes(take(&mut bytes)?);
        let devices =
            (u16::from_le_bytes(take(&mut bytes)?), u16::from_le_bytes(take(&mut bytes)?));
        let seed = take(&mut bytes)?;
        if len == 0 {
            return None;
        }
        let instance: Vec<u8> = bytes.take(len).collect();
        (instance.len() == len).then_some(Letter { realtime_ns, seed, devices, instance })
    }
}

fn take<const N: usize>(bytes: &mut impl Iterator<Item = u8>) -> Option<[u8; N]> {
    let mut taken = [0; N];
    for byte in &mut taken {
        *byte = bytes.next()?;
    }
    Some(taken)
}

/// Writes tag and number into a page of the mailbox, whose other bytes are zero.
pub fn mark(page: &mut [u8], number: usize) {
    page[..TAG.len()].copy_from_slice(&TAG);
    page[TAG.len()..TAG.len() + 4].copy_from_slice(&(number as u32).to_le_bytes());
}

/// Which page of the mailbox this is, if it is one that nothing was written into.
pub fn number(page: &[u8]) -> Option<usize> {
    let rest = page.strip_prefix(&TAG)?;
    let (number, rest) = rest.split_first_chunk::<4>()?;
    let number = u32::from_le_bytes(*number) as usize;
    (number < PAGES && rest.iter().all(|byte| *byte == 0)).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter(len: usize) -> Letter {
        let instance = (0..len).map(|index| index as u8).collect();
        Letter { realtime_ns: 1 << 60, seed: [7; SEED_LEN], devices: (3, 2), instance }
    }

    fn deliver(letter: &Letter) -> Option<Letter> {
        let mut pages = vec![0; PAGES * PAGE_LEN];
        for (index, page) in pages.chunks_exact_mut(PAGE_LEN).enumerate() {
            mark(page, index);
            assert_eq!(number(page), Some(index));
        }
        assert_eq!(Letter::read(&pages), None);
        for (part, page) in letter.parts()?.iter().zip(pages.chunks_exact_mut(PAGE_LEN)) {
            page[PART_START..PART_START + part.len()].copy_from_slice(part);
            assert_eq!(number(page), None);
        }
        assert!(pages[REALTIME_AT..].starts_with(&letter.realtime_ns.to_le_bytes()));
        Letter::read(&pages)
    }

    #[test]
    fn letters_arrive_as_they_were_sent() {
        for len in [1, PART_LEN, 5 * PART_LEN, Letter::MAX_INSTANCE] {
            assert_eq!(deliver(&letter(len)), Some(letter(len)));
        }
        assert_eq!(deliver(&letter(Letter::MAX_INSTANCE + 1)), None);
    }

    #[test]
    fn a_letter_that_says_more_than_there_is_is_none() {
        let mut pages = vec![0xff; PAGE_LEN];
        mark(&mut pages, 0);
        assert_eq!(Letter::read(&pages), None);
        assert_eq!(Letter::read(&[]), None);
    }
}
