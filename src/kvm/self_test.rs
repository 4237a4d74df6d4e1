//! A tiny guest that finds out whether this KVM can run Linux.
//!
//! Some KVMs accept every call and then cannot run Linux (software KVMs that emulate a subset).
//! So the test executes what Linux needs: a locked 16-byte compare-and-exchange (where CPUID offers
//! it), a switch to user mode, and CPUID and SYSCALL there. It runs on the boot vCPU of every VM, and
//! alone for `mote probe`. When it has reported, it jumps to the kernel by itself: it costs one exit, and
//! no vCPU is set up any more once threads are confined.

use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Result, anyhow};
use kvm_bindings::{CpuId, kvm_msr_entry, kvm_regs, kvm_sregs};
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
/// 37: 0f 22 df               mov   cr3, rdi         ; the kernel's first page tables
/// 3a: 41 ff e0               jmp   r8               ; the kernel, with RSI, RSP and RBP as they are
/// ```
#[rustfmt::skip]
const PROGRAM: [u8; 0x3d] = [
    0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x24, 0x48, 0xc7, 0xc1, 0x20, 0x00, 0x01, 0x00, 0x41, 0xbb, 0x02,
    0x00, 0x00, 0x00, 0x48, 0x0f, 0x07, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4,
    0x31, 0xc0, 0x0f, 0xa2, 0x0f, 0x05, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4,
    0xb8, 0x4f, 0x4b, 0x00, 0x00, 0xe7, 0xf4, 0x0f, 0x22, 0xdf, 0x41, 0xff, 0xe0,
];

const REPORT_VALUE: [u8; 4] = 0x4b4fu32.to_le_bytes();

const MSR_STAR: u32 = 0xc000_0081;

const MSR_LSTAR: u32 = 0xc000_0082;

const EFER_SCE: u64 = 1;

/// Writes the self-test into the first MiB of `ram`.
///
/// # Errors
/// There is no RAM.
pub fn load(ram: &GuestRam) -> Result<()> {
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
    Ok(())
}

/// The MSRs that the self-test needs. Linux sets its own before it has a user mode.
pub fn msrs() -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    // STAR: SYSCALL loads CS 0x10 and SS 0x18, as the kernel's entry wants them; SYSRET CS 0x23 and SS 0x1b.
    [entry(MSR_STAR, 0x13 << 48 | 0x10 << 32), entry(MSR_LSTAR, CODE + SYSCALL_ENTRY)]
}

/// Special registers for the self-test, from those for the kernel.
pub fn sregs(kernel: &kvm_sregs) -> kvm_sregs {
    kvm_sregs { cr3: TABLES[0], efer: kernel.efer | EFER_SCE, ..*kernel }
}

/// General registers for the self-test, from those for the kernel and its page tables.
pub fn regs(kernel: &kvm_regs, kernel_cr3: u64, cpuid: &CpuId) -> kvm_regs {
    let rip = if cpu::has_cmpxchg16b(cpuid) { CODE } else { CODE + AFTER_CMPXCHG16B };
    kvm_regs { rip, rdi: kernel_cr3, r8: kernel.rip, ..*kernel }
}

/// Runs the self-test on a vCPU that is set up for it. The next KVM_RUN enters the kernel. May never
/// return, because a KVM can hang in KVM_RUN; see [`wait`].
///
/// # Errors
/// This KVM cannot run Linux; the message says what to change.
pub fn run(vcpu: &mut VcpuFd) -> Result<()> {
    loop {
        let failure = match vcpu.run() {
            Ok(VcpuExit::IoOut(REPORT_PORT, data)) if data == REPORT_VALUE => return Ok(()),
            Ok(VcpuExit::Intr) => continue,
            Ok(VcpuExit::Shutdown) => {
                "it crashed (triple fault), so SYSCALL is not delivered".into()
            }
            Ok(VcpuExit::InternalError) => {
                "it stopped at an instruction that this KVM cannot execute".into()
            }
            Ok(exit) => format!("it stopped with {exit:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
            Err(error) => format!("KVM_RUN: {error}"),
        };
        return Err(unfit(failure));
    }
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
