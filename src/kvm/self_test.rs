//! A tiny guest that finds out whether this KVM can run Linux.
//!
//! Some KVMs accept every call and then cannot run Linux (software KVMs that emulate a subset).
//! So the test executes what Linux needs: a locked 16-byte compare-and-exchange (where CPUID offers
//! it), a switch to user mode, and CPUID and SYSCALL there. It runs on the boot vCPU of every VM before
//! the kernel is entered, which costs one exit, and alone for `mote probe`.

use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::{DEVICE, cpu};
use crate::layout;
use crate::memory::GuestRam;

/// How long the self-test may take. It has only a few instructions, but the host may be overloaded, or
/// mote's CPU time limited.
const SELF_TEST_LIMIT: Duration = Duration::from_secs(5);

// The self-test's page: code at its start, page tables behind it. Addresses are guest-physical.
const CODE: u64 = layout::SELF_TEST;

const TABLES: [u64; 3] = [CODE + 0x1000, CODE + 0x2000, CODE + 0x3000];

/// Offset into [`PROGRAM`] behind CMPXCHG16B. A vCPU without that instruction starts here: Linux can do
/// without it.
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

/// Runs the self-test in the first MiB of `ram`, on a vCPU that has this CPUID and is not set up for the
/// kernel yet. May never return, because a KVM can hang in KVM_RUN; see [`wait`].
///
/// # Errors
/// This KVM cannot run Linux; the message says what to change.
pub fn run(vcpu: &mut VcpuFd, cpuid: &CpuId, ram: &GuestRam) -> Result<()> {
    prepare(vcpu, cpuid, ram).context("set up the KVM self-test")?;
    run_program(vcpu).map_err(unfit)
}

/// Waits for the result of a self-test that another thread runs, at most as long as it may take.
///
/// # Errors
/// The self-test failed, or did not end in time.
pub fn wait(result: &Receiver<Result<()>>) -> Result<()> {
    result.recv_timeout(SELF_TEST_LIMIT).unwrap_or_else(|_| {
        Err(unfit(format!("it did not finish in {} s", SELF_TEST_LIMIT.as_secs())))
    })
}

fn unfit(reason: String) -> anyhow::Error {
    anyhow!(
        "{DEVICE}: this KVM cannot run an unmodified Linux guest: a tiny test guest (CMPXCHG16B, SYSRET, CPUID, SYSCALL) failed: {reason}; use a host with hardware virtualisation, or nested virtualisation enabled"
    )
}

fn prepare(vcpu: &VcpuFd, cpuid: &CpuId, ram: &GuestRam) -> Result<()> {
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

fn run_program(vcpu: &mut VcpuFd) -> Result<(), String> {
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
    // KVM finishes the OUT at the next entry, which must be before the registers change (KVM API
    // 4.35, "before saving state"). With immediate_exit set, the entry does nothing else.
    vcpu.set_kvm_immediate_exit(1);
    match vcpu.run().map(|exit| format!("{exit:?}")) {
        Err(error) if error.errno() == libc::EINTR => {}
        other => return Err(format!("KVM does not finish an OUT: {other:?}")),
    }
    vcpu.set_kvm_immediate_exit(0);
    // Cleared, because the vCPU boots Linux next.
    set_syscall_msrs(vcpu, 0, 0).map_err(|e| format!("{e:#}"))
}
