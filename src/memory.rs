//! Guest RAM and the register pages, and the KVM memory slots that show them to the guest.
//!
//! All RAM but the kernel's cold text is one memory file, and vhost-user back-ends map the same file. What is mapped here
//! stays mapped until the process ends, because KVM and the vCPU threads use it until then.

#![allow(unsafe_code, reason = "maps memory and hands its addresses to KVM")]

use std::arch::x86_64::{_mm256_add_epi64, _mm256_loadu_si256, _mm256_storeu_si256};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, anyhow, ensure};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress,
};

use crate::layout::{self, RamRange};
use crate::sys;
use crate::sys::file_part::FilePart;

/// Guest RAM. Cloning shares it.
pub type GuestRam = GuestMemoryMmap<()>;

/// Size of a page.
const PAGE: u64 = 4096;
/// Size of a huge page on x86-64.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Creates and maps the guest's RAM.
///
/// # Errors
/// The host has no memory, or no address space, for it.
pub fn create_ram(memory_bytes: u64) -> Result<GuestRam> {
    let file = memory_file(memory_bytes)
        .with_context(|| format!("create {} MiB of guest memory", memory_bytes >> 20))?;
    let file = Arc::new(file);
    let regions = layout::ram_ranges(memory_bytes)
        .into_iter()
        .map(|range| map_region(&file, range))
        .collect::<Result<Vec<_>>>()?;
    GuestRam::from_regions(regions).map_err(|e| anyhow!("arrange guest memory: {e}"))
}

/// The file for RAM: a sealed memfd where memfds can have huge pages. Most hosts say `never`; there it is
/// a file on a tmpfs of our own, if mote may mount one. That file is not sealed: a back-end under an
/// attacker's control could shrink it, but would only end its own box. Else a memfd with small pages.
fn memory_file(memory_bytes: u64) -> io::Result<File> {
    let setting = std::fs::read_to_string(SHMEM_HUGE_PAGES).unwrap_or_default();
    if setting.contains("[never]")
        && let Ok(file) = sys::huge_memory_file(memory_bytes)
    {
        return Ok(file);
    }
    sys::sealed_memory_file(memory_bytes)
}

/// Whether memfds get huge pages (Documentation/admin-guide/mm/transhuge.rst).
const SHMEM_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

fn map_region(file: &Arc<File>, range: RamRange) -> Result<GuestRegionMmap<()>> {
    let RamRange { start, len, offset } = range;
    let address = map_aligned(file, len, offset)
        .with_context(|| format!("map {} MiB of guest memory", len >> 20))?;
    let low = layout::HIGH_MEMORY.saturating_sub(start).min(len);
    if low > 0 {
        // SAFETY: advice on the start of the mapping just made. Who refuses it clears one page more.
        unsafe { libc::madvise(address.cast(), low as usize, libc::MADV_NOHUGEPAGE) };
    }
    // SAFETY: `map_aligned` has just mapped `len` bytes at `address`, and nothing ever unmaps them.
    let builder = unsafe { MmapRegionBuilder::new(len as usize).with_raw_mmap_pointer(address) };
    let region = builder
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(|e| anyhow!("describe guest memory: {e}"))?;
    GuestRegionMmap::new(region, GuestAddress(start))
        .ok_or_else(|| anyhow!("guest memory at {start:#x} exceeds the address space"))
}

/// Maps part of the memory file at an address that is aligned like a huge page: the kernel can
/// then back it, and the guest's second-level tables map it, with huge pages. Measured: 4 KiB
/// pages cost over 4,000 more exits in one boot.
fn map_aligned(file: &File, len: u64, offset: u64) -> io::Result<*mut u8> {
    let reserved = (len + HUGE_PAGE) as usize;
    let check = |address: *mut libc::c_void| {
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address) }
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new private mapping at an address of the kernel's choice.
    let base = check(unsafe {
        libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, flags, -1, 0)
    })?;
    let aligned = (base as u64).next_multiple_of(HUGE_PAGE) as *mut libc::c_void;
    // SAFETY: `aligned..aligned + len` lies inside the reservation made above, which nothing else
    // uses; the fixed mapping replaces that part of it.
    check(unsafe {
        libc::mmap(
            aligned,
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    })?;
    // SAFETY: advice on the mapping just made. A host without huge pages for shared memory refuses
    // or ignores it, and then the guest runs on small pages.
    unsafe { libc::madvise(aligned, len as usize, libc::MADV_HUGEPAGE) };
    Ok(aligned.cast())
}

/// How a guest has what is in [`layout::COLD_TEXT`] of the built-in kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColdText {
    /// Mapped from mote's own file: all boxes have the same memory for it, and a page that a guest writes to becomes its
    /// own. Back-ends see zeros there: no buffer is in a kernel's text.
    Shared(&'static [u8]),
    /// Copied into its RAM.
    Own(&'static [u8]),
}

/// Has the guest's RAM begin with this. RAM that ends before stays as it is, and is too small for the kernel.
///
/// # Errors
/// mote's own file cannot be opened or mapped.
pub fn put_cold_text(ram: &GuestRam, text: ColdText) -> Result<()> {
    let (ColdText::Shared(bytes) | ColdText::Own(bytes)) = text;
    let start = GuestAddress(layout::COLD_TEXT.start);
    if !ram.check_range(start, bytes.len()) {
        return Ok(());
    }
    let mut part =
        FilePart::of_program(bytes).context("open this program's own file, /proc/self/exe")?;
    match text {
        ColdText::Shared(_) => map_text(ram, start, &part),
        ColdText::Own(_) => ram
            .read_exact_volatile_from(start, &mut part, bytes.len())
            .context("copy the guest kernel's text"),
    }
}

fn map_text(ram: &GuestRam, start: GuestAddress, part: &FilePart) -> Result<()> {
    let ((file, offset), len) = (part.place(), part.len() as usize);
    let place = ram.get_slice(start, len).context("find the place of the guest kernel's text")?;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: `get_slice` has checked that these bytes are of one region, which stays mapped until the process ends, and so
    // does what takes their place. Nobody uses them yet.
    let mapped = unsafe {
        libc::mmap(
            place.ptr_guard_mut().as_ptr().cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    let error = io::Error::last_os_error();
    ensure!(mapped != libc::MAP_FAILED, "map the guest kernel's text: {error}");
    Ok(())
}

/// Gives the VM its RAM. Returns the number of the first free slot.
///
/// # Errors
/// KVM refuses.
pub fn add_ram(vm: &VmFd, ram: &GuestRam) -> Result<u32> {
    let mut slot = 0;
    for region in ram.iter() {
        let memory = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region stays mapped until the process ends (see the module's first lines).
        unsafe { vm.set_user_memory_region(memory) }
            .with_context(|| format!("give the VM its memory at {:#x}", memory.guest_phys_addr))?;
        slot += 1;
    }
    Ok(slot)
}

/// Gives the host back what is in the whole pages of a range of guest memory, for every process that maps the file:
/// from then on they read as zeros, and take memory again when they are written.
///
/// # Errors
/// The range is not all in RAM, or the host refuses, as it does for kinds of memory files that it cannot punch holes in.
pub fn give_back(ram: &GuestRam, start: GuestAddress, len: usize) -> Result<()> {
    let first = start.0.next_multiple_of(PAGE);
    let end = start.0.checked_add(len as u64).context("a range beyond the address space")?;
    ensure!(ram.check_range(start, len), "{start:#x?} and {len} bytes on are not all RAM");
    let whole = (end / PAGE * PAGE).saturating_sub(first);
    if whole == 0 {
        return Ok(());
    }
    let pages = ram.get_slice(GuestAddress(first), whole as usize)?;
    // SAFETY: `get_slice` has checked that these bytes are of one region, which stays mapped until the process ends.
    // They are the guest's, which may change them at any time, so nobody here relies on what is in them.
    let done = unsafe {
        libc::madvise(pages.ptr_guard_mut().as_ptr().cast(), pages.len(), libc::MADV_REMOVE)
    };
    ensure!(done == 0, "give memory back to the host: {}", io::Error::last_os_error());
    Ok(())
}

/// The register pages of all virtio devices: the guest reads them without an exit, its writes
/// arrive as MMIO exits or ioeventfds (KVM API 4.35, `KVM_MEM_READONLY`).
#[derive(Debug)]
pub struct RegisterPages {
    region: Arc<GuestRegionMmap<()>>,
}

impl RegisterPages {
    /// Maps `count` pages and shows them to the guest, using memory slot `slot`.
    ///
    /// # Errors
    /// The host has no memory for the pages, or KVM refuses them.
    pub fn new(vm: &VmFd, slot: u32, count: usize) -> Result<Self> {
        let len = count * layout::MMIO_PAGE as usize;
        let region = GuestRegionMmap::from_range(GuestAddress(layout::MMIO), len, None)
            .map_err(|e| anyhow!("map {count} register pages: {e}"))?;
        let memory = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::MMIO,
            memory_size: len as u64,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the pages stay mapped while the VM lives: `region` is leaked just below.
        unsafe { vm.set_user_memory_region(memory) }
            .context("show the virtio register pages to the VM (needs KVM_CAP_READONLY_MEM)")?;
        let region = Arc::new(region);
        std::mem::forget(Arc::clone(&region));
        Ok(RegisterPages { region })
    }

    /// The page of the `index`-th device.
    pub fn page(&self, index: usize) -> RegisterPage {
        let base = index as u64 * layout::MMIO_PAGE;
        RegisterPage { region: Arc::clone(&self.region), base }
    }
}

/// One device's register page, as the guest sees it. Cloning shares it.
#[derive(Debug, Clone)]
pub struct RegisterPage {
    region: Arc<GuestRegionMmap<()>>,
    base: u64,
}

impl RegisterPage {
    /// A page that no guest sees.
    #[cfg(any(test, fuzzing))]
    #[allow(clippy::expect_used, reason = "a failed expectation is how a test fails")]
    pub fn unattached() -> Self {
        let region = GuestRegionMmap::from_range(GuestAddress(0), layout::MMIO_PAGE as usize, None);
        RegisterPage { region: Arc::new(region.expect("one page")), base: 0 }
    }

    /// Sets a 32-bit register; `offset` is a multiple of 4 below the page size.
    pub fn set(&self, offset: u64, value: u32) {
        let at = MemoryRegionAddress(self.base + offset);
        // Registers are aligned and inside the page, so this cannot fail; one store, so that the
        // guest never sees half a value.
        let stored = self.region.store(value.to_le(), at, Ordering::Release);
        debug_assert!(stored.is_ok());
    }

    /// Reads a 32-bit register back; the same holds for `offset`.
    pub fn value(&self, offset: u64) -> u32 {
        let at = MemoryRegionAddress(self.base + offset);
        let loaded = self.region.load(at, Ordering::Acquire);
        debug_assert!(loaded.is_ok());
        u32::from_le(loaded.unwrap_or(0))
    }

    /// Sets bytes of the configuration space. Not one store: the guest reads them before the device runs,
    /// or again after it was notified of a change.
    pub fn set_bytes(&self, offset: u64, bytes: &[u8]) {
        let written = self.region.write_slice(bytes, MemoryRegionAddress(self.base + offset));
        debug_assert!(written.is_ok());
    }
}

/// A checksum against accidents: of rows of 32 words of 64 bits, by column, their sum, and of each page the sum of these
/// sums, so that the place of a page counts, and that of a word in its row. Adding once for each 32 bytes is what makes it
/// cheap: each start from a template waits for it.
#[derive(Debug, Clone)]
pub struct Checksum {
    /// How many bytes were added: zeros that fill the last row count for nothing else.
    len: u64,
    /// Rows since the last whole page.
    rows: usize,
    sums: [u64; COLUMNS],
    sums_of_sums: [u64; COLUMNS],
}

/// Words in a row of a [`Checksum`]: as many as eight wide registers hold.
const COLUMNS: usize = 32;
/// Length of a row.
const ROW_LEN: usize = 8 * COLUMNS;
/// Length of what has its place counted: a page.
const BLOCK_LEN: usize = PAGE as usize;
/// Rows of it.
const BLOCK_ROWS: usize = BLOCK_LEN / ROW_LEN;

impl Default for Checksum {
    /// Of nothing.
    fn default() -> Self {
        // So that leading zeros count.
        Checksum { len: 0, rows: 0, sums: [1; COLUMNS], sums_of_sums: [0; COLUMNS] }
    }
}

impl Checksum {
    fn add_row(&mut self, row: &[u8; ROW_LEN]) {
        let (words, _) = row.as_chunks::<8>();
        for (sum, word) in self.sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
        self.rows += 1;
        if self.rows == BLOCK_ROWS {
            self.end_block();
        }
    }

    fn end_block(&mut self) {
        for (sum_of_sums, sum) in self.sums_of_sums.iter_mut().zip(&self.sums) {
            *sum_of_sums = sum_of_sums.wrapping_add(*sum);
        }
        self.rows = 0;
    }

    /// Adds bytes. Fewer than a multiple of 256 count as if zeros followed.
    pub fn add(&mut self, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        let (rows, rest) = bytes.as_chunks::<ROW_LEN>();
        rows.iter().for_each(|row| self.add_row(row));
        if !rest.is_empty() {
            let mut last = [0; ROW_LEN];
            last[..rest.len()].copy_from_slice(rest);
            self.add_row(&last);
        }
    }

    /// The checksum.
    pub fn value(&self) -> u64 {
        // Odd, as of splitmix64: each sum has its own weight.
        const WEIGHT: u64 = 0x9e37_79b9_7f4a_7c15;
        let sums = self.sums.iter().chain(&self.sums_of_sums).chain([&self.len]);
        sums.fold(0, |value: u64, sum| (value ^ sum).wrapping_mul(WEIGHT).rotate_left(29))
    }

    /// Adds pages of a guest's RAM that does not run yet.
    ///
    /// # Errors
    /// The RAM has no such place, or it is not of whole pages.
    pub fn add_ram(&mut self, ram: &GuestRam, at: GuestAddress, len: usize) -> Result<()> {
        let place = ram.get_slice(at, len).context("find pages of RAM")?;
        let guard = place.ptr_guard();
        // SAFETY: the slice has this length, stays mapped until the process ends, and nothing writes to it: the guest
        // does not run yet.
        let bytes = unsafe { slice::from_raw_parts(guard.as_ptr(), len) };
        let (blocks, rest) = bytes.as_chunks::<BLOCK_LEN>();
        ensure!(rest.is_empty(), "{len} bytes are no whole pages");
        if self.rows == 0 && is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the instructions.
            unsafe { self.add_by_avx2(blocks) };
            self.len += len as u64;
        } else {
            self.add(bytes);
        }
        Ok(())
    }

    /// Adds whole pages, with none begun, by wider registers, which the compiler does not come to use by itself.
    #[target_feature(enable = "avx2")]
    fn add_by_avx2(&mut self, blocks: &[[u8; BLOCK_LEN]]) {
        const LANES: usize = 4;
        let (sums, _) = self.sums.as_chunks_mut::<LANES>();
        let (sums_of_sums, _) = self.sums_of_sums.as_chunks_mut::<LANES>();
        // SAFETY: each place is as long as a register.
        let load = |from: *const u8| unsafe { _mm256_loadu_si256(from.cast()) };
        let mut columns = [0, 1, 2, 3, 4, 5, 6, 7].map(|at| load(sums[at].as_ptr().cast()));
        for block in blocks {
            let (rows, _) = block.as_chunks::<ROW_LEN>();
            for row in rows {
                let (words, _) = row.as_chunks::<{ 8 * LANES }>();
                for (column, words) in columns.iter_mut().zip(words) {
                    *column = _mm256_add_epi64(*column, load(words.as_ptr()));
                }
            }
            for (sum_of_sums, column) in sums_of_sums.iter_mut().zip(&columns) {
                let sum = _mm256_add_epi64(load(sum_of_sums.as_ptr().cast()), *column);
                // SAFETY: the place is as long as a register.
                unsafe { _mm256_storeu_si256(sum_of_sums.as_mut_ptr().cast(), sum) };
            }
        }
        for (sum, column) in sums.iter_mut().zip(columns) {
            // SAFETY: the place is as long as a register.
            unsafe { _mm256_storeu_si256(sum.as_mut_ptr().cast(), column) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::cold_text;
    use crate::sys::holes::next_data;

    #[test]
    fn cold_text_is_in_place_and_a_guests_writes_are_its_own() {
        let text = cold_text();
        let start = GuestAddress(layout::COLD_TEXT.start);
        assert_eq!(text.len() as u64, layout::COLD_TEXT.end - layout::COLD_TEXT.start);
        assert_ne!(text[..4096], [0; 4096]);
        for how in [ColdText::Shared(text), ColdText::Own(text)] {
            let [changed, other] = [(), ()].map(|()| {
                let ram = create_ram(16 << 20).expect("RAM");
                put_cold_text(&ram, how).expect("put there");
                ram
            });
            changed.write_obj(!text[0], start).expect("written");
            let mut read = vec![0; text.len()];
            other.read_slice(&mut read, start).expect("read");
            assert!(read == text);
            changed.read_slice(&mut read, start).expect("read");
            assert!(read[0] == !text[0] && read[1..] == text[1..]);
            let region = other.iter().next().expect("one");
            let data = next_data(region.file_offset().expect("a file").file(), start.0);
            let is_in_file = data.expect("looked").is_some_and(|data| data.start == start.0);
            assert_eq!(is_in_file, how == ColdText::Own(text));
        }
        put_cold_text(&create_ram(4 << 20).expect("RAM"), ColdText::Shared(text))
            .expect("left out");
    }

    #[test]
    fn a_checksum_is_the_same_whichever_way_and_notices_any_bit() {
        const LEN: usize = 3 * 4096;
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), LEN)]).expect("pages");
        let mut bytes: Vec<u8> = (0..LEN).map(|at| (at * 7 / 3) as u8).collect();
        ram.write_slice(&bytes, GuestAddress(0)).expect("written");
        let mut of_ram = Checksum::default();
        of_ram.add_ram(&ram, GuestAddress(0), 4096).expect("there");
        of_ram.add_ram(&ram, GuestAddress(4096), LEN - 4096).expect("there");
        assert!(of_ram.add_ram(&ram, GuestAddress(0), 4095).is_err());
        let sum_of = |bytes: &[u8]| {
            let mut sum = Checksum::default();
            sum.add(bytes);
            sum.value()
        };
        let sum = sum_of(&bytes);
        assert_eq!(of_ram.value(), sum);
        for at in (0..LEN).step_by(61) {
            bytes[at] ^= 1 << (at % 8);
            assert_ne!(sum_of(&bytes), sum, "{at}");
            bytes[at] ^= 1 << (at % 8);
        }
        let swapped = |from: usize, to: usize, len: usize| {
            let mut bytes = bytes.clone();
            (0..len).for_each(|at| bytes.swap(from + at, to + at));
            sum_of(&bytes)
        };
        assert_ne!(swapped(8, 40, 8), sum, "two words of a row have changed places");
        assert_ne!(swapped(0, 8192, 4096), sum, "two pages have");
        assert_ne!(sum_of(&[]), sum_of(&[0; 256]));
    }
}
