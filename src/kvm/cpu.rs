//! The state of a vCPU when the guest starts: CPUID, MSRs, registers, local APIC. Pure functions over
//! kvm-bindings types; [`super::vcpu`] hands the results to KVM.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs,
};

use crate::layout;

// Intel SDM volume 4, chapter 2; AMD APM volume 2, appendix A.
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, memory is write-back by default.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Descriptors of the boot GDT: null, unused, 64-bit code, data (the Linux boot protocol asks for
/// `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18).
pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// What describes performance counters: Intel's (0xa, 0x23), and AMD's second version. A guest gets none:
/// each is an exit at its start, and a clock by which it can measure what others do on the same core.
/// [`super::create_vm`] has KVM refuse them, too.
const PMU_LEAVES: [u32; 3] = [0xa, 0x23, 0x8000_0022];

/// What AMD's virtualisation can do. A guest gets neither it nor Intel's: its kernel has no KVM, and what KVM
/// emulates of them a hostile one could attack. What CPUID does not show, KVM refuses: CR4.VMXE and the VMX
/// registers, EFER.SVME.
const SVM_LEAF: u32 = 0x8000_000a;

/// CPUID of the `index`-th of `count` vCPUs, from what KVM supports on this host.
///
/// `tsc_deadline` is KVM_CAP_TSC_DEADLINE_TIMER: KVM_GET_SUPPORTED_CPUID does not report the bit,
/// and without it the guest calibrates its APIC timer for 240 ms (`resources/guest-kernel.md`, "Timers").
pub fn cpuid(supported: &CpuId, index: u8, count: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    cpuid.retain(|entry| !PMU_LEAVES.contains(&entry.function) && entry.function != SVM_LEAF);
    for entry in cpuid.as_mut_slice() {
        adjust(entry, u32::from(index), u32::from(count), tsc_deadline);
    }
    cpuid
}

/// Whether a vCPU with this CPUID has CMPXCHG16B (leaf 1, ECX bit 13).
pub fn has_cmpxchg16b(cpuid: &CpuId) -> bool {
    cpuid.as_slice().iter().any(|entry| entry.function == 0x1 && entry.ecx & 1 << 13 != 0)
}

fn adjust(entry: &mut kvm_cpuid_entry2, index: u32, count: u32, tsc_deadline: bool) {
    /// Bits of an APIC id below the package number: all vCPUs are cores of one package.
    fn id_bits(count: u32) -> u32 {
        count.next_power_of_two().trailing_zeros()
    }
    match entry.function {
        0x1 => {
            // EBX: APIC id, logical processors in the package, CLFLUSH size.
            let logical = count.next_power_of_two().min(255);
            entry.ebx = entry.ebx & 0xff00 | index << 24 | logical << 16;
            entry.ecx |= 1 << 31; // hypervisor
            if tsc_deadline {
                entry.ecx |= 1 << 24;
            }
            // With the PMU goes what it reports by: PDCM, DS and its 64-bit area.
            entry.ecx &= !(1 << 15 | 1 << 2);
            entry.edx &= !(1 << 21);
            entry.ecx &= !(1 << 5); // VMX
            entry.edx = entry.edx & !(1 << 28) | u32::from(count > 1) << 28; // HTT
        }
        // Deterministic cache parameters (Intel 4, AMD 0x8000_001d): each core has its own first and
        // second level, and all share the third.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { count } else { 1 };
            let cores = if entry.function == 0x4 {
                (count.next_power_of_two() - 1).min(63) << 26
            } else {
                0
            };
            entry.eax = entry.eax & 0x3fff | (sharing.next_power_of_two() - 1) << 14 | cores;
        }
        0x6 => entry.eax |= 1 << 2, // ARAT: the APIC timer never stops
        0xb | 0x1f => {
            // Extended topology: level 0 one thread per core, level 1 all cores of the package.
            entry.edx = index;
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, 1 << 8),
                1 => (id_bits(count), count, 2 << 8 | 1),
                level => (0, 0, level & 0xff),
            };
        }
        0x8000_0001 => {
            // AMD's counters: of the core, of the node, of the third-level cache.
            entry.ecx &= !(1 << 23 | 1 << 24 | 1 << 28);
            entry.ecx &= !(1 << 2 | 1 << 12); // SVM and its SKINIT
        }
        0x8000_0008 => entry.ecx = id_bits(count) << 12 | (count - 1), // AMD: cores, id size
        0x8000_001e => {
            // AMD: extended APIC id; one thread per core, one node.
            (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xff, 0);
        }
        _ => {}
    }
}

/// Model-specific registers that differ from their reset value when the kernel is entered.
pub fn boot_msrs() -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
}

/// General registers at the kernel's 64-bit entry (Documentation/arch/x86/boot.rst, "64-bit boot
/// protocol").
pub fn boot_regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rflags: RFLAGS_RESERVED,
        rip: entry,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::BOOT_PARAMS,
        ..Default::default()
    }
}

/// Special registers for 64-bit mode with paging; the rest stays as KVM has set it for a new vCPU.
pub fn long_mode_sregs(fresh: &kvm_sregs) -> kvm_sregs {
    let segment = |selector: u16| {
        let descriptor = GDT[usize::from(selector / 8)];
        kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_: (descriptor >> 40 & 0xf) as u8,
            present: 1,
            dpl: 0,
            db: (descriptor >> 54 & 1) as u8,
            s: 1,
            l: (descriptor >> 53 & 1) as u8,
            g: 1,
            avl: 0,
            unusable: 0,
            padding: 0,
        }
    };
    let mut sregs = *fresh;
    sregs.cs = segment(0x10);
    let data = segment(0x18);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs
}

/// The x87 and SSE state after FINIT.
pub fn boot_fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// The boot processor's local interrupt pins as firmware leaves them: LINT0 takes the 8259's
/// interrupts, LINT1 is the NMI (MP specification 1.4, 3.6.2.2).
pub fn connect_local_interrupts(lapic: &mut kvm_lapic_state) {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 4;
    const MODE_EXTINT: u32 = 7;
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        let bytes = &mut lapic.regs[register..register + 4];
        let value =
            u32::from_le_bytes([bytes[0] as u8, bytes[1] as u8, bytes[2] as u8, bytes[3] as u8]);
        let value = value & !0x700 | mode << 8;
        for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *to = from as _;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    fn adjusted(entries: &[kvm_cpuid_entry2], index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
        let supported = CpuId::from_entries(entries).expect("few entries");
        cpuid(&supported, index, count, true).as_slice().to_vec()
    }

    #[test]
    fn the_bits_that_save_calibration_are_set() {
        let entries = adjusted(&[entry(1, 0), entry(6, 0)], 0, 1);
        assert_ne!(entries[0].ecx & 1 << 24, 0, "TSC deadline");
        assert_ne!(entries[0].ecx & 1 << 31, 0, "hypervisor");
        assert_ne!(entries[1].eax & 1 << 2, 0, "ARAT");
    }

    #[test]
    fn topology_counts_every_vcpu_as_a_core() {
        let entries = adjusted(&[entry(1, 0), entry(0xb, 0), entry(0xb, 1), entry(0xb, 2)], 3, 6);
        assert_eq!(entries[0].ebx >> 24, 3);
        assert_eq!(entries[0].ebx >> 16 & 0xff, 8);
        assert!(entries[1..].iter().all(|e| e.edx == 3));
        assert_eq!((entries[1].eax, entries[1].ebx), (0, 1));
        assert_eq!((entries[2].eax, entries[2].ebx), (3, 6));
        assert_eq!((entries[3].eax, entries[3].ebx), (0, 0));
    }

    #[test]
    fn there_are_no_performance_counters() {
        let all = |function| kvm_cpuid_entry2 {
            function,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let entries = adjusted(&[0x1, 0xa, 0x23, 0x8000_0001, 0x8000_0022].map(all), 0, 1);
        let left: Vec<u32> = entries.iter().map(|entry| entry.function).collect();
        assert_eq!(left, [0x1, 0x8000_0001]);
        // Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.
        let [pdcm, dtes64, ds] = [entries[0].ecx >> 15, entries[0].ecx >> 2, entries[0].edx >> 21];
        let [core, northbridge, cache] = [23, 24, 28].map(|bit| entries[1].ecx >> bit);
        for (name, bits) in [
            ("PDCM", pdcm),
            ("DTES64", dtes64),
            ("DS", ds),
            ("PerfCtrExtCore", core),
            ("PerfCtrExtNB", northbridge),
            ("PerfCtrExtLLC", cache),
        ] {
            assert_eq!(bits & 1, 0, "{name}");
        }
    }

    #[test]
    fn there_is_no_virtualisation_to_use() {
        let all = |function| kvm_cpuid_entry2 { function, ecx: u32::MAX, ..Default::default() };
        let entries = adjusted(&[0x1, 0x8000_0001, 0x8000_000a].map(all), 0, 1);
        let left: Vec<u32> = entries.iter().map(|entry| entry.function).collect();
        assert_eq!(left, [0x1, 0x8000_0001]);
        // Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.
        for (name, bits) in [
            ("VMX", entries[0].ecx >> 5),
            ("SVM", entries[1].ecx >> 2),
            ("SKINIT", entries[1].ecx >> 12),
        ] {
            assert_eq!(bits & 1, 0, "{name}");
        }
    }

    #[test]
    fn code_segment_is_64_bit() {
        let sregs = long_mode_sregs(&kvm_sregs::default());
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.type_), (1, 0, 0xb));
        assert_eq!((sregs.ds.l, sregs.ds.db, sregs.ds.type_), (0, 1, 0x3));
    }
}
