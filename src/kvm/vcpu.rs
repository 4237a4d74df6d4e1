//! One virtual CPU: its set-up, its thread, and the loop around `KVM_RUN`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};

use anyhow::{Context, Result, bail};
use kvm_bindings::{CpuId, Msrs};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use crate::bus::{Bus, Effect};
use crate::event_channel;
use crate::kvm::{cpu, self_test};
use crate::memory::GuestRam;
use crate::outcome;
use crate::timeline::ExitCounts;

/// Why a vCPU stopped, which ends the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest reset itself, to power off or after a panic.
    Reset,
    /// A triple fault: the guest kernel crashed and could not handle that.
    TripleFault,
    /// The host has no memory behind the guest's.
    MemoryGone(String),
    /// KVM could not run the vCPU any further.
    Failed(String),
}

/// Creates the `index`-th vCPU with its CPUID.
///
/// # Errors
/// KVM refuses.
pub fn create(vm: &VmFd, index: u8, cpuid: &CpuId) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(u64::from(index)).with_context(|| format!("create vCPU {index}"))?;
    vcpu.set_cpuid2(cpuid).with_context(|| format!("set CPUID of vCPU {index}"))?;
    Ok(vcpu)
}

/// Sets the boot vCPU up to run the self-test, which then enters the kernel at `entry`. The other vCPUs
/// wait for a start-up message from it; KVM creates them in that state.
///
/// # Errors
/// KVM refuses.
pub fn prepare_boot(vcpu: &VcpuFd, cpuid: &CpuId, ram: &GuestRam, entry: u64) -> Result<()> {
    self_test::load(ram).context("load the KVM self-test")?;
    let msrs = [cpu::boot_msrs(), self_test::msrs()].concat();
    let msrs = Msrs::from_entries(&msrs).context("list MSRs of the boot vCPU")?;
    let written = vcpu.set_msrs(&msrs).context("set MSRs of the boot vCPU")?;
    if written != msrs.as_slice().len() {
        bail!("set MSRs of the boot vCPU: KVM refused MSR {:#x}", msrs.as_slice()[written].index);
    }
    let fresh = vcpu.get_sregs().context("read special registers of the boot vCPU")?;
    let kernels = cpu::long_mode_sregs(&fresh);
    vcpu.set_sregs(&self_test::sregs(&kernels))
        .context("set special registers of the boot vCPU")?;
    vcpu.set_regs(&self_test::regs(&cpu::boot_regs(entry), kernels.cr3, cpuid))
        .context("set registers of the boot vCPU")?;
    vcpu.set_fpu(&cpu::boot_fpu()).context("set floating-point state of the boot vCPU")?;
    let mut lapic = vcpu.get_lapic().context("read the boot vCPU's APIC")?;
    cpu::connect_local_interrupts(&mut lapic);
    vcpu.set_lapic(&lapic).context("set the boot vCPU's APIC")
}

/// How a vCPU starts.
#[derive(Debug)]
pub enum Start {
    /// As [`prepare_boot`] has left it: finds out whether KVM can run a guest, and enters the kernel.
    Boot {
        /// Receives `Ok` just before the kernel is entered, or the reason why it is not.
        result: Sender<Result<()>>,
    },
    /// Runs as it is: at a boot it waits, in KVM, for the boot vCPU's start-up message.
    Run,
}

/// The work of a vCPU's thread: waits for `gate`, and then runs the vCPU until the VM ends.
pub fn serve(
    index: u8,
    mut vcpu: VcpuFd,
    start: Start,
    gate: Receiver<()>,
    bus: Arc<Bus>,
    counts: Arc<ExitCounts>,
    exits: event_channel::Sender<Exit>,
) {
    if gate.recv().is_err() {
        return;
    }
    if let Start::Boot { result } = start {
        let tested = self_test::run(&mut vcpu);
        let goes_on = tested.is_ok();
        if result.send(tested).is_err() || !goes_on {
            return;
        }
    }
    // Fails only when the main loop has ended.
    let _ = exits.send(run(index, &mut vcpu, &bus, &counts));
}

fn run(index: u8, vcpu: &mut VcpuFd, bus: &Bus, counts: &ExitCounts) -> Exit {
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&counts.port);
                if bus.port_write(port, data) == Effect::Reset {
                    return Exit::Reset;
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&counts.port);
                bus.port_read(port, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&counts.mmio);
                bus.mmio_write(address, data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&counts.mmio);
                bus.mmio_read(address, data);
            }
            Ok(VcpuExit::Shutdown) => return Exit::TripleFault,
            Ok(VcpuExit::Intr) => {
                count(&counts.other);
            }
            Ok(exit) => return Exit::Failed(format!("vCPU {index}: KVM stopped it with {exit:?}")),
            // SIGSTOP and SIGCONT interrupt KVM_RUN; so does a debugger.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                count(&counts.other);
            }
            Err(error) if error.errno() == libc::EFAULT => {
                return Exit::MemoryGone(format!(
                    "vCPU {index} found no memory behind guest memory: {}",
                    outcome::MEMORY_GONE
                ));
            }
            Err(error) => return Exit::Failed(format!("vCPU {index}: run: {error}")),
        }
    }
}
