//! Opening KVM, and finding out whether it can run a guest at all.
//!
//! Some KVMs accept every call and then cannot run Linux (software KVMs that emulate a subset).
//! So a tiny built-in guest, [`self_test`], does what Linux cannot do without: a locked 16-byte
//! compare-and-exchange (where CPUID offers it), and a visit to user mode with CPUID and SYSCALL. It
//! runs on the boot vCPU of every VM before the kernel is entered, which costs one exit, and alone for
//! `mote probe`.

pub mod cpu;
pub mod vcpu;

use std::io::{self, ErrorKind};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::memory::{self, GuestRam};

/// The device file.
pub const DEVICE: &str = "/dev/kvm";

/// How long the self-test may take: a few hundred instructions, but perhaps on a host with much else to
/// do, or under a limit on CPU time.
const SELF_TEST_LIMIT: Duration = Duration::from_secs(5);

/// What mote cannot do without, all present on x86 since Linux 4.x.
const REQUIRED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// Opens KVM and checks its version and capabilities.
pub fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| {
        let error = io::Error::from_raw_os_error(error.errno());
        let remedy = match error.kind() {
            ErrorKind::NotFound => {
                "this host offers no hardware virtualisation here: load kvm_intel or kvm_amd, enable it in the firmware or, in a VM, nested virtualisation, and pass the device into a container"
            }
            ErrorKind::PermissionDenied => {
                "add this user to the group that owns it, usually 'kvm' (usermod -aG kvm USER), and log in again"
            }
            _ => "check the host's KVM module",
        };
        anyhow!("open {DEVICE}: {error}; {remedy}")
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        bail!(
            "{DEVICE}: API version is {version}, mote needs {KVM_API_VERSION}; use a current host kernel"
        );
    }
    let missing: Vec<&str> = REQUIRED
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        bail!(
            "{DEVICE}: this KVM lacks {}; use a current host kernel's own KVM",
            missing.join(", ")
        );
    }
    Ok(kvm)
}

/// Creates a VM with interrupt controllers in the kernel.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error).context("create a VM"),
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .context("place KVM's identity map page")?;
    vm.set_tss_address(layout::KVM_TSS).context("place KVM's task state segment")?;
    vm.create_irq_chip().context("create the interrupt controllers in KVM")?;
    Ok(vm)
}

/// CPUID that KVM supports on this host.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("read the CPUID that KVM supports")
}

// The self-test's page: code at its start, page tables behind it. Addresses are guest-physical.
const CODE: u64 = layout::SELF_TEST;
const TABLES: [u64; 3] = [CODE + 0x1000, CODE + 0x2000, CODE + 0x3000];
/// Offset into [`PROGRAM`] behind CMPXCHG16B, where a vCPU without it starts: Linux does without.
const AFTER_CMPXCHG16B: u64 = 0x06;
/// Where SYSCALL enters; offset into [`PROGRAM`].
const SYSCALL_ENTRY: u64 = 0x30;
/// The port that reports success.
const REPORT_PORT: u16 = 0xf4;

/// ```text
/// ring 0, 64-bit:
/// 00: f0 48 0f c7 0c 24      lock cmpxchg16b [rsp]  ; the slab allocator's; emulators lack it
/// 06: 48 c7 c1 20 00 01 00   mov   rcx, 0x10020
/// 0d: 41 bb 02 00 00 00      mov   r11d, 2
/// 13: 48 0f 07               sysretq
/// ring 3:
/// 20: 31 c0                  xor   eax, eax
/// 22: 0f a2                  cpuid
/// 24: 0f 05                  syscall
/// ring 0 again, where LSTAR points:
/// 30: b8 4f 4b 00 00         mov   eax, 0x4b4f
/// 35: e7 f4                  out   0xf4, eax
/// 37: f4                     hlt
/// ```
#[rustfmt::skip]
const PROGRAM: [u8; 0x38] = [
    0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x24, 0x48, 0xc7, 0xc1, 0x20, 0x00, 0x01, 0x00, 0x41, 0xbb, 0x02,
    0x00, 0x00, 0x00, 0x48, 0x0f, 0x07, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4,
    0x31, 0xc0, 0x0f, 0xa2, 0x0f, 0x05, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4,
    0xb8, 0x4f, 0x4b, 0x00, 0x00, 0xe7, 0xf4, 0xf4,
];
const REPORT_VALUE: [u8; 4] = 0x4b4fu32.to_le_bytes();

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const EFER_SCE: u64 = 1;

/// Runs the self-test on a vCPU that has this CPUID, in the first MiB of `ram`, before it is set up for
/// the kernel. May never return: a KVM can hang in KVM_RUN; see [`wait_for_self_test`].
pub fn self_test(vcpu: &mut VcpuFd, cpuid: &CpuId, ram: &GuestRam) -> Result<()> {
    prepare_self_test(vcpu, cpuid, ram).context("set up the KVM self-test")?;
    run_self_test(vcpu).map_err(unfit)
}

/// Waits for the result of a self-test that another thread runs, at most as long as it may take.
pub fn wait_for_self_test(result: &Receiver<Result<()>>) -> Result<()> {
    result.recv_timeout(SELF_TEST_LIMIT).unwrap_or_else(|_| {
        Err(unfit(format!("it did not finish in {} s", SELF_TEST_LIMIT.as_secs())))
    })
}

fn unfit(reason: String) -> anyhow::Error {
    anyhow!(
        "{DEVICE}: this KVM cannot run an unmodified Linux guest: a tiny test guest (CMPXCHG16B, SYSRET, CPUID, SYSCALL) failed: {reason}; use a host with hardware virtualisation, or nested virtualisation enabled"
    )
}

fn prepare_self_test(vcpu: &VcpuFd, cpuid: &CpuId, ram: &GuestRam) -> Result<()> {
    const USER_PAGE: u64 = 0b111;
    const HUGE: u64 = 1 << 7;
    ram.write_slice(&PROGRAM, GuestAddress(CODE))?;
    for (table, entry) in [
        (TABLES[0], TABLES[1] | USER_PAGE),
        (TABLES[1], TABLES[2] | USER_PAGE),
        (TABLES[2], USER_PAGE | HUGE),
    ] {
        ram.write_obj(entry, GuestAddress(table))?;
    }

    let mut sregs = cpu::long_mode_sregs(&vcpu.get_sregs()?);
    sregs.cr3 = TABLES[0];
    sregs.efer |= EFER_SCE;
    vcpu.set_sregs(&sregs)?;
    let start = if cpu::has_cmpxchg16b(cpuid) { CODE } else { CODE + AFTER_CMPXCHG16B };
    vcpu.set_regs(&kvm_regs { rip: start, rsp: CODE + 0x800, rflags: 2, ..Default::default() })?;
    // STAR: SYSCALL loads CS 0x10 and SS 0x18, SYSRET CS 0x23 and SS 0x1b.
    set_syscall_msrs(vcpu, 0x13 << 48 | 0x10 << 32, CODE + SYSCALL_ENTRY)
}

fn set_syscall_msrs(vcpu: &VcpuFd, star: u64, lstar: u64) -> Result<()> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry(MSR_STAR, star), entry(MSR_LSTAR, lstar)])
        .map_err(|e| anyhow!("{e:?}"))?;
    if vcpu.set_msrs(&msrs)? != 2 {
        bail!("KVM refuses the SYSCALL MSRs");
    }
    Ok(())
}

fn run_self_test(vcpu: &mut VcpuFd) -> Result<(), String> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(REPORT_PORT, data)) if data == REPORT_VALUE => break,
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::Shutdown) => {
                return Err("it crashed (triple fault), so SYSCALL is not delivered".into());
            }
            Ok(VcpuExit::InternalError) => {
                return Err("it stopped at an instruction that this KVM cannot execute".into());
            }
            Ok(exit) => return Err(format!("it stopped with {exit:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(format!("KVM_RUN: {error}")),
        }
    }
    // KVM finishes the OUT at the next entry: make it do so before the registers change (KVM API
    // 4.35, "before saving state"). With immediate_exit set the entry goes no further.
    vcpu.set_kvm_immediate_exit(1);
    match vcpu.run().map(|exit| format!("{exit:?}")) {
        Err(error) if error.errno() == libc::EINTR => {}
        other => return Err(format!("KVM does not finish an OUT: {other:?}")),
    }
    vcpu.set_kvm_immediate_exit(0);
    // The vCPU goes on to boot Linux: leave nothing behind in its MSRs.
    set_syscall_msrs(vcpu, 0, 0).map_err(|e| format!("{e:#}"))
}

/// Everything `mote probe` wants to know of KVM: opens it and runs the self-test in a VM of its own.
pub fn check() -> Result<()> {
    let kvm = open()?;
    let vm = create_vm(&kvm)?;
    let ram = memory::create_ram(2 << 20)?;
    memory::add_ram(&vm, &ram)?;
    let cpuid = cpu::cpuid(&supported_cpuid(&kvm)?, 0, 1, true);
    let mut vcpu = vcpu::create(&vm, 0, &cpuid)?;
    let (sender, result) = mpsc::channel();
    thread::Builder::new()
        .name("kvm-self-test".into())
        // Nobody listens any more when the time was over.
        .spawn(move || drop(sender.send(self_test(&mut vcpu, &cpuid, &ram))))
        .context("start the KVM self-test")?;
    wait_for_self_test(&result)
}
