//! The guest-physical map: every address constant of the VM, in one place.
//!
//! ```text
//! 0x0000_0000 ┌──────────────────────────────┐
//!             │ boot parameters, page tables │ written by `boot`, read once by the kernel
//! 0x0009_e000 ├──────────────────────────────┤
//!             │ MP table, random seed        │ read once too; not RAM in the e820 map
//! 0x000a_0000 ├──────────────────────────────┤
//!             │ (nothing)                    │
//! 0x0020_0000 ├──────────────────────────────┤
//!             │ RAM: kernel from 2 MiB,      │ its first 6 MiB a file's
//!             │ then the initramfs           │
//! 0x8000_0000 ├──────────────────────────────┤ or less
//!             │ (nothing)                    │
//! 0xd000_0000 ├──────────────────────────────┤
//!             │ virtio-mmio register pages   │ read-only memory slot: reads do not exit
//! 0xfec0_0000 │ IO-APIC, local APICs         │ in KVM
//! 0x1_0000_0000 ├────────────────────────────┤
//!             │ the rest of RAM              │
//!             └──────────────────────────────┘
//! ```

use std::ops::Range;

/// Most virtual CPUs: the kernel is built for 64 and the MP table's APIC ids are 8 bits wide.
pub const MAX_VCPUS: u8 = 64;
/// Most shares beside the root: each device takes about 34 of the 2,048 bytes of command line.
pub const MAX_SHARES: usize = 32;

/// Global descriptor table for the entry into the kernel.
pub const GDT: u64 = 0x500;
/// `struct boot_params`, one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Stack pointer at kernel entry; the kernel sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables that map the first GiB one to one: one page each of PML4, PDPT and PD.
pub const PML4: u64 = 0x9000;
/// See [`PML4`].
pub const PDPT: u64 = 0xa000;
/// See [`PML4`].
pub const PD: u64 = 0xb000;
/// The program of [`crate::kvm::self_test`], which the kernel may overwrite.
pub const SELF_TEST: u64 = 0x1_0000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its terminator (x86 `COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_LEN: usize = 2048;
/// MP configuration table; up to 64 CPUs, one IO-APIC and 24 pins take 1.6 KiB. RAM that the kernel may use ends here.
pub const MP_TABLE: u64 = 0x9_e000;
/// `setup_data` list. In RAM that the kernel may use it would be two more entries of its memory map, which it walks for each
/// entry of its page tables: half a million instructions of a start.
pub const SETUP_DATA: u64 = 0x9_f000;
/// MP floating pointer, in the last KiB of base memory where the kernel looks for it.
pub const MP_POINTER: u64 = 0x9_fc00;
/// End of base memory.
pub const BASE_MEMORY_END: u64 = 0xa_0000;
/// Start of memory above the legacy hole, as far as the kernel learns of it. The few pages below that are used are no huge
/// page, which the host would clear for them, and in the MiB before the kernel there would be hundreds.
pub const HIGH_MEMORY: u64 = 0x20_0000;
/// What boxes hardly run of the built-in kernel's text: whole huge pages, which are mapped from mote's own file
/// (`resources/kernel/cold-text.patch`; `resources/kernel.sh` checks the end).
pub const COLD_TEXT: Range<u64> = 0x20_0000..0x80_0000;

/// First byte that is not RAM below 4 GiB; virtio-mmio pages start here.
pub const MMIO: u64 = 0xd000_0000;
/// Size of a device's register page.
pub const MMIO_PAGE: u64 = 0x1000;
/// IO-APIC registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel without unrestricted guest, and one identity map page.
pub const KVM_TSS: usize = 0xfffb_d000;
/// See [`KVM_TSS`].
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// RAM up to here is all below 4 GiB.
pub const LITTLE_RAM: u64 = 2 << 30;
/// RAM below 4 GiB of a guest that has more than [`LITTLE_RAM`]: room for what is loaded before the kernel runs. At its
/// start the kernel sets up its records of all pages here and of 32 MiB above, and of the others when it needs them
/// (`resources/kernel/pages-on-demand.patch`).
pub const LOW_RAM: u64 = 128 << 20;
/// Second part of RAM.
pub const RAM_ABOVE_4_GIB: u64 = 1 << 32;

/// Pins of KVM's IO-APIC.
pub const IRQ_PINS: u8 = 24;
/// Interrupt of the serial port.
pub const SERIAL_IRQ: u32 = 4;
/// First interrupt of the virtio devices; the pins from here to the last are handed out in turn.
const FIRST_DEVICE_IRQ: u32 = 5;

const _: () = {
    assert!(BOOT_PARAMS + 0x1000 <= BOOT_STACK);
    assert!(PD + 0x1000 <= SELF_TEST && SELF_TEST + 0x1000 <= COMMAND_LINE);
    assert!(COMMAND_LINE + COMMAND_LINE_LEN as u64 <= MP_TABLE);
    assert!(MP_TABLE + 44 + 20 * MAX_VCPUS as u64 + 8 * (IRQ_PINS as u64 + 4) <= SETUP_DATA);
    assert!(SETUP_DATA + 0x100 <= MP_POINTER);
    assert!(LITTLE_RAM <= MMIO);
    assert!(MMIO + (MAX_SHARES as u64 + 8) * MMIO_PAGE < IO_APIC as u64);
};

/// A range of RAM, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Guest address.
    pub start: u64,
    /// Length.
    pub len: u64,
    /// Offset in the memory file.
    pub offset: u64,
}

/// RAM: one range from 0 and, when there is more, one from 4 GiB.
pub fn ram_ranges(memory_bytes: u64) -> Vec<RamRange> {
    let below = if memory_bytes > LITTLE_RAM { LOW_RAM } else { memory_bytes };
    let mut ranges = vec![RamRange { start: 0, len: below, offset: 0 }];
    if memory_bytes > below {
        let len = memory_bytes - below;
        ranges.push(RamRange { start: RAM_ABOVE_4_GIB, len, offset: below });
    }
    ranges
}

/// Register page of the `index`-th virtio device.
pub fn device_page(index: usize) -> u64 {
    MMIO + index as u64 * MMIO_PAGE
}

/// Interrupt of the `index`-th virtio device. Devices share pins once all are taken: the kernel's
/// driver asks for shared, edge-triggered interrupts.
pub fn device_irq(index: usize) -> u32 {
    let pins = u32::from(IRQ_PINS) - FIRST_DEVICE_IRQ;
    FIRST_DEVICE_IRQ + index as u32 % pins
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_ram_is_below_4_gib() {
        let range = |start, len, offset| RamRange { start, len, offset };
        assert_eq!(ram_ranges(64 << 20), [range(0, 64 << 20, 0)]);
        assert_eq!(ram_ranges(LITTLE_RAM), [range(0, LITTLE_RAM, 0)]);
        let above = range(RAM_ABOVE_4_GIB, (6 << 30) - LOW_RAM, LOW_RAM);
        assert_eq!(ram_ranges(6 << 30), [range(0, LOW_RAM, 0), above]);
    }

    #[test]
    fn devices_stay_on_io_apic_pins() {
        assert!((0..100).all(|i| (FIRST_DEVICE_IRQ..u32::from(IRQ_PINS)).contains(&device_irq(i))));
    }
}
