//! Loads guest memory before the first instruction: kernel, initramfs, command line, boot
//! parameters, page tables, MP table.
//!
//! Direct 64-bit boot (Documentation/arch/x86/boot.rst): no firmware, no decompressor, and
//! boot_params can carry a seed for the random number generator.

use std::collections::BTreeSet;

use anyhow::{Context, Result, anyhow, bail};
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::Elf;
use mote_agent::instance;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::kvm::cpu;
use crate::layout::{self, RamRange};
use crate::memory::GuestRam;
use crate::plan::{self, Image};
use crate::sys::file_part::FilePart;
use crate::{cpio, sys};

// include/uapi/asm/bootparam.h, include/uapi/asm/setup_data.h
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
const E820_RAM: u32 = 1;
const SETUP_RNG_SEED: u32 = 9;
/// Most bytes that the kernel mixes in (one ChaCha20 key).
const RNG_SEED_LEN: usize = 32;

/// What a guest boots with.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    /// A vmlinux.
    pub kernel: &'a Image,
    /// The archive with the agent.
    pub initramfs: &'a Image,
    /// Whether it has the attestation server.
    pub attests: bool,
    /// Its configuration, as JSON, if it is known yet.
    pub instance: Option<&'a [u8]>,
    /// How many virtual CPUs.
    pub vcpus: u8,
    /// Its RAM in bytes.
    pub memory_bytes: u64,
    /// How many register pages for virtio devices.
    pub devices: usize,
    /// Whether the kernel prints all its messages.
    pub debug: bool,
}

impl Guest<'_> {
    /// Loads everything and returns the kernel's entry point.
    ///
    /// # Errors
    /// The kernel is no vmlinux, or memory is too small for it and the initramfs.
    pub fn load(&self, ram: &GuestRam) -> Result<u64> {
        let high_memory = Some(GuestAddress(layout::HIGH_MEMORY));
        let kernel = Elf::load(ram, None, &mut self.kernel.open()?, high_memory)
            .map_err(|e| anyhow!("{e}"))
            .with_context(|| {
                format!("load the guest kernel ({}) as an uncompressed ELF vmlinux", self.kernel)
            })?;
        let initramfs = load_initramfs(self, ram, kernel.kernel_end)?;
        write_page_tables(ram).context("write the boot page tables")?;
        write_command_line(self, ram)?;
        write_mp_table(ram, self.vcpus, self.devices).context("write the MP table")?;
        write_boot_params(self, ram, initramfs)?;
        Ok(kernel.kernel_load.0)
    }
}

/// Where the initramfs is: address and length.
struct Initramfs {
    start: u64,
    len: u64,
}

/// Loads the agent's archive, the attestation server's if the box has one, and the archive with the instance
/// configuration, if that is known (Linux unpacks archives that follow each other).
fn load_initramfs(guest: &Guest<'_>, ram: &GuestRam, kernel_end: u64) -> Result<Initramfs> {
    let mut config = Vec::new();
    if let Some(instance) = guest.instance {
        let mut archive = cpio::Archive::new();
        archive.directory("mote", 0o700);
        archive.file(instance::PATH.trim_start_matches('/'), 0o600, instance);
        config = archive.finish();
    }

    let start = kernel_end.next_multiple_of(layout::MMIO_PAGE);
    let attest = guest.attests.then(plan::attest);
    let images = [Some(guest.initramfs), attest.as_ref()].into_iter().flatten();
    let archives = images.map(|image| Ok((image, image.open()?))).collect::<Result<Vec<_>>>()?;
    let padded = |archive: &FilePart| archive.len().next_multiple_of(4);
    let end = start
        + archives.iter().map(|(_, archive)| padded(archive)).sum::<u64>()
        + config.len() as u64;
    if !ram.check_range(GuestAddress(start), usize::try_from(end - start)?) {
        let need_mib = end.next_multiple_of(1 << 20) >> 20;
        bail!(
            "memory_mib: kernel, agent and entrypoint need {need_mib} MiB before anything runs; give more"
        );
    }
    let mut at = start;
    for (image, mut archive) in archives {
        let len = usize::try_from(archive.len())?;
        ram.read_exact_volatile_from(GuestAddress(at), &mut archive, len)
            .with_context(|| format!("load an archive for the initramfs ({image})"))?;
        at += padded(&archive);
    }
    ram.write_slice(&config, GuestAddress(at)).context("load the configuration")?;
    Ok(Initramfs { start, len: end - start })
}

fn write_page_tables(ram: &GuestRam) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE: u64 = 1 << 7;
    ram.write_obj(layout::PDPT | PRESENT_WRITABLE, GuestAddress(layout::PML4))?;
    ram.write_obj(layout::PD | PRESENT_WRITABLE, GuestAddress(layout::PDPT))?;
    for entry in 0..512u64 {
        let page = entry << 21 | PRESENT_WRITABLE | HUGE;
        ram.write_obj(page, GuestAddress(layout::PD + entry * 8))?;
    }
    for (index, descriptor) in cpu::GDT.into_iter().enumerate() {
        ram.write_obj(descriptor, GuestAddress(layout::GDT + index as u64 * 8))?;
    }
    Ok(())
}

/// The kernel command line. It contains nothing of the spec: so the spec's environment cannot inject
/// parameters, and its size is not limited.
fn command_line(guest: &Guest<'_>) -> Result<Cmdline> {
    let mut line = Cmdline::new(layout::COMMAND_LINE_LEN)?;
    for word in [
        "console=ttyS0",
        // PID 1's reboot writes to port 0x64; a panic does the same, without a delay.
        "reboot=k,force",
        "panic=-1",
        // Saves the patching of LOCK prefixes on one vCPU, and a bounce buffer that nothing uses.
        "noreplace-smp",
        "swiotlb=noforce",
        "cgroup_no_v1=all",
        "rcupdate.rcu_expedited=1",
        // Else the driver makes an interface; the guest has only `lo` and what the spec asks for.
        "dummy.numdummies=0",
        // A root whose files may be what is loaded as the initramfs: see cpio::Archive::of_file.
        "rootfstype=ramfs",
        "rdinit=/init",
    ] {
        line.insert_str(word)?;
    }
    // Errors and panics are always printed, everything else on request: each console byte is an
    // exit, and a console file is mainly for the entrypoint's output.
    line.insert_str(if guest.debug { "ignore_loglevel" } else { "quiet" })?;
    if guest.memory_bytes > layout::LITTLE_RAM {
        // The kernel sizes these tables by memory, and clears them: at 8 GiB, for 5 million instructions.
        line.insert_str(
            "dhash_entries=131072 ihash_entries=65536 thash_entries=8192 uhash_entries=1024",
        )?;
    }
    for index in 0..guest.devices {
        line.add_virtio_mmio_device(
            layout::MMIO_PAGE,
            GuestAddress(layout::device_page(index)),
            layout::device_irq(index),
            None,
        )?;
    }
    Ok(line)
}

fn write_command_line(guest: &Guest<'_>, ram: &GuestRam) -> Result<()> {
    let line = command_line(guest)
        .and_then(|line| Ok(line.as_cstring()?))
        .context("compose the kernel command line")?;
    ram.write_slice(line.as_bytes_with_nul(), GuestAddress(layout::COMMAND_LINE))
        .context("write the kernel command line")
}

fn write_boot_params(guest: &Guest<'_>, ram: &GuestRam, initramfs: Initramfs) -> Result<()> {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = layout::COMMAND_LINE_LEN as u32;
    params.hdr.ramdisk_image = u32::try_from(initramfs.start).context("place the initramfs")?;
    params.hdr.ramdisk_size = u32::try_from(initramfs.len).context("place the initramfs")?;
    params.hdr.setup_data = write_rng_seed(ram).context("write the random seed")?;
    for (to, entry) in params.e820_table.iter_mut().zip(e820(guest.memory_bytes)) {
        *to = entry;
        params.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::BOOT_PARAMS)),
        ram,
    )
    .map_err(|e| anyhow!("write the boot parameters: {e}"))
}

/// RAM that the kernel may use: without the MP table's and the seed's pages and the legacy hole.
fn e820(memory_bytes: u64) -> Vec<boot_e820_entry> {
    let ram = |addr, size| boot_e820_entry { addr, size, r#type: E820_RAM };
    let mut map = vec![ram(0, layout::MP_TABLE)];
    for RamRange { start, len, .. } in layout::ram_ranges(memory_bytes) {
        let usable = start.max(layout::HIGH_MEMORY);
        map.push(ram(usable, start + len - usable));
    }
    map
}

/// One `struct setup_data` with a fresh seed, so that the guest's random numbers are ready at once.
fn write_rng_seed(ram: &GuestRam) -> Result<u64> {
    let mut data = Vec::new();
    data.extend(0u64.to_le_bytes()); // next
    data.extend(SETUP_RNG_SEED.to_le_bytes());
    data.extend((RNG_SEED_LEN as u32).to_le_bytes());
    let mut seed = [0; RNG_SEED_LEN];
    sys::fill_random(&mut seed)?;
    data.extend(seed);
    ram.write_slice(&data, GuestAddress(layout::SETUP_DATA))?;
    Ok(layout::SETUP_DATA)
}

/// The MP table (MultiProcessor Specification 1.4): without ACPI the only way to tell Linux of its
/// CPUs and interrupt pins: of those that somebody uses, and the first, at which it looks for a timer. The kernel sets up
/// each that it finds here.
fn write_mp_table(ram: &GuestRam, vcpus: u8, devices: usize) -> Result<()> {
    const SPEC_REVISION: u8 = 4;
    const APIC_VERSION: u8 = 0x14;
    const ENABLED: u8 = 1;
    const BOOT_PROCESSOR: u8 = 2;
    const ENTRY_PROCESSOR: u8 = 0;
    const ENTRY_BUS: u8 = 1;
    const ENTRY_IO_APIC: u8 = 2;
    const ENTRY_IO_INTERRUPT: u8 = 3;
    const ENTRY_LOCAL_INTERRUPT: u8 = 4;
    const TYPE_INT: u8 = 0;
    const TYPE_NMI: u8 = 1;
    const TYPE_EXTINT: u8 = 3;
    const ALL_LOCAL_APICS: u8 = 0xff;

    let io_apic_id = vcpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, id, APIC_VERSION, flags];
        entry.extend(0x600u32.to_le_bytes()); // signature: family 6
        entry.extend(0x201u32.to_le_bytes()); // features: FPU, APIC
        entry.extend([0; 8]);
        entries.push(entry);
    }
    let mut bus = vec![ENTRY_BUS, 0];
    bus.extend(b"ISA   ");
    entries.push(bus);
    let mut io_apic = vec![ENTRY_IO_APIC, io_apic_id, APIC_VERSION, ENABLED];
    io_apic.extend(layout::IO_APIC.to_le_bytes());
    entries.push(io_apic);
    let used: BTreeSet<u32> =
        [0, layout::SERIAL_IRQ].into_iter().chain((0..devices).map(layout::device_irq)).collect();
    for pin in used.into_iter().map(|pin| pin as u8) {
        // Flags 0: polarity and trigger are those of the bus; ISA is edge-triggered, active high.
        entries.push(vec![ENTRY_IO_INTERRUPT, TYPE_INT, 0, 0, 0, pin, io_apic_id, pin]);
    }
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, TYPE_EXTINT, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, TYPE_NMI, 0, 0, 0, 0, ALL_LOCAL_APICS, 1]);

    let length = 44 + entries.iter().map(Vec::len).sum::<usize>();
    let mut table = Vec::with_capacity(length);
    table.extend(b"PCMP");
    table.extend((length as u16).to_le_bytes());
    table.extend([SPEC_REVISION, 0]); // checksum follows
    table.extend(b"MOTE    MICROVM     ");
    table.extend([0; 6]); // no OEM table
    table.extend((entries.len() as u16).to_le_bytes());
    table.extend(layout::LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries.concat());
    table[7] = checksum(&table);
    if table.len() as u64 > layout::SETUP_DATA - layout::MP_TABLE {
        bail!("{vcpus} processors do not fit");
    }
    ram.write_slice(&table, GuestAddress(layout::MP_TABLE))?;

    let mut pointer = Vec::new();
    pointer.extend(b"_MP_");
    pointer.extend((layout::MP_TABLE as u32).to_le_bytes());
    pointer.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]); // length in 16-byte units
    pointer[10] = checksum(&pointer);
    ram.write_slice(&pointer, GuestAddress(layout::MP_POINTER))?;
    Ok(())
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("1 MiB")
    }

    #[test]
    fn mp_table_sums_to_zero_and_lists_every_cpu() {
        for vcpus in [1, 2, layout::MAX_VCPUS] {
            let ram = ram();
            write_mp_table(&ram, vcpus, 40).expect("fits");
            let length: u16 = ram.read_obj(GuestAddress(layout::MP_TABLE + 4)).expect("length");
            let mut table = vec![0; usize::from(length)];
            ram.read_slice(&mut table, GuestAddress(layout::MP_TABLE)).expect("table");
            assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
            let processors = table[44..].chunks(20).take(usize::from(vcpus));
            assert!(processors.enumerate().all(|(id, e)| (e[0], usize::from(e[1])) == (0, id)));
            let mut pointer = [0; 16];
            ram.read_slice(&mut pointer, GuestAddress(layout::MP_POINTER)).expect("pointer");
            assert_eq!(pointer.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        }
    }

    #[test]
    fn e820_leaves_out_table_and_holes() {
        let map = e820(6 << 30);
        assert_eq!(
            map.iter().map(|entry| (entry.addr, entry.size)).collect::<Vec<_>>(),
            [
                (0, layout::MP_TABLE),
                (layout::HIGH_MEMORY, layout::LOW_RAM - layout::HIGH_MEMORY),
                (layout::RAM_ABOVE_4_GIB, (6 << 30) - layout::LOW_RAM),
            ]
        );
    }

    #[test]
    fn every_seed_is_fresh() {
        let ram = ram();
        let mut seeds = [[0u8; 48]; 2];
        for seed in &mut seeds {
            let at = write_rng_seed(&ram).expect("written");
            ram.read_slice(seed, GuestAddress(at)).expect("read");
        }
        assert_eq!(seeds[0][..16], seeds[1][..16]);
        assert_ne!(seeds[0][16..], seeds[1][16..]);
    }
}
