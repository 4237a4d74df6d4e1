//! The state of a VM that KVM has, out of one VM and into another of the same shape: vCPUs, interrupt controllers, clock.
//!
//! Guest time stands still between the two: neither the time stamp counter nor KVM's clock has the time that passed
//! (else the guest finds that its CPUs were stalled). Order and choice of what is set follow Documentation/virt/kvm/api.rst.

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    CpuId, KVM_CAP_XSAVE2, KVM_CLOCK_HOST_TSC, Msrs, kvm_clock_data, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::kvm::vcpu;
use crate::sys;

// Intel SDM volume 4, chapter 2.
const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// How many interrupt controllers a VM has: two 8259 and the IO-APIC.
const IRQCHIPS: u32 = 3;

/// A VM's state.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// KVM's clock in nanoseconds, and the vCPUs' time stamp counters at the same moment: the guest watches the one by
    /// the other.
    clock_ns: u64,
    tsc: u64,
    irqchips: Vec<kvm_irqchip>,
    vcpus: Vec<VcpuState>,
}

/// A vCPU's state.
#[derive(Debug, Serialize, Deserialize)]
struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    /// Those whose values differ from a new vCPU's.
    msrs: Vec<kvm_msr_entry>,
    /// When the local APIC's timer is due, 0 if it is not.
    tsc_deadline: u64,
}

/// Whether a vCPU's extended state has its place in `struct kvm_xsave`.
///
/// # Errors
/// This host's vCPUs have more, which is not kept.
pub fn check_host(kvm: &Kvm) -> Result<()> {
    let len = kvm.check_extension_raw(KVM_CAP_XSAVE2.into());
    let most = size_of::<kvm_xsave>();
    ensure!(
        len <= most as i32,
        "vCPUs here have {len} bytes of extended state, and {most} are kept"
    );
    Ok(())
}

impl MachineState {
    /// Reads the state of a VM, on a host that [`check_host`] has passed, whose vCPUs stand still, each with no access of its own pending, and which have this
    /// CPUID but for their numbers.
    ///
    /// # Errors
    /// KVM refuses something.
    pub fn read(kvm: &Kvm, vm: &VmFd, vcpus: &[VcpuFd], cpuid: &CpuId) -> Result<MachineState> {
        let first = vcpus.first().context("there is no vCPU")?;
        let read_clock = || vm.get_clock().context("read the VM's clock");
        let (tsc, clock) = at_one_moment(first, |_, _| read_clock())?;
        let tsc = if clock.flags & KVM_CLOCK_HOST_TSC == 0 {
            tsc
        } else {
            let offset = sys::vcpu::tsc_offset(first);
            offset
                .map(|offset| clock.host_tsc.wrapping_add(offset))
                .context("read the offset of the time stamp counter")?
        };
        let known = kvm.get_msr_index_list().context("list the MSRs that KVM knows")?;
        let fresh = vcpu::create(vm, vcpus.len() as u8, cpuid).context("for comparison")?;
        let state = |vcpu| VcpuState::read(vcpu, &fresh, known.as_slice());
        let irqchip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).context("read an interrupt controller")?;
            Ok(chip)
        };
        let vcpus = vcpus.iter().map(state).collect::<Result<_>>()?;
        let irqchips = (0..IRQCHIPS).map(irqchip).collect::<Result<_>>()?;
        Ok(MachineState { clock_ns: clock.clock, tsc, irqchips, vcpus })
    }

    /// A state that no VM has.
    #[cfg(any(test, fuzzing))]
    pub fn blank(vcpus: usize) -> MachineState {
        let blank = |_| VcpuState {
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Default::default(),
            xcrs: Default::default(),
            debug_regs: Default::default(),
            lapic: Default::default(),
            events: Default::default(),
            msrs: vec![kvm_msr_entry::default(); 3],
            tsc_deadline: 1,
        };
        let irqchips = vec![kvm_irqchip::default(); IRQCHIPS as usize];
        MachineState { clock_ns: 1, tsc: 2, irqchips, vcpus: (0..vcpus).map(blank).collect() }
    }

    /// Sets the state of a new VM, whose vCPUs have their CPUID.
    ///
    /// # Errors
    /// KVM refuses something: the VM is of no use then.
    pub fn write(&self, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<()> {
        ensure!(self.vcpus.len() == vcpus.len(), "it is of another number of vCPUs");
        ensure!(self.irqchips.len() == IRQCHIPS as usize, "interrupt controllers are missing");
        for chip in &self.irqchips {
            vm.set_irqchip(chip).context("set an interrupt controller")?;
        }
        let first = vcpus.first().context("there is no vCPU")?;
        // One offset for all, so that their counters agree as they did.
        let old =
            sys::vcpu::tsc_offset(first).context("read the offset of the time stamp counter")?;
        let offset = old.wrapping_add(self.tsc.wrapping_sub(tsc(first)?));
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            state.write(vcpu, offset)?;
        }
        // Last: what vCPUs were told before starts anew from here. The counters run since they were set.
        at_one_moment(first, |tsc, khz| {
            let counted = u128::from(tsc.wrapping_sub(self.tsc));
            let passed_ns = counted.saturating_mul(1_000_000) / u128::from(khz.max(1));
            let clock_ns = self.clock_ns.saturating_add(u64::try_from(passed_ns).unwrap_or(0));
            let clock = kvm_clock_data { clock: clock_ns, ..Default::default() };
            vm.set_clock(&clock).context("set the VM's clock")
        })?;
        Ok(())
    }
}

/// How many moments a millisecond has: two reads of the counter in one are 0.2 ms apart at most. The guest's kernel takes its
/// counter for unstable if its clock differs by 0.5 ms (kernel/time/clocksource.c, `uncertainty_margin`), to which the
/// VM that is read and the one that is written both add.
const MOMENTS_PER_MS: u64 = 5;
/// How often to try for one, on a host where others run meanwhile.
const MOMENT_ATTEMPTS: usize = 50;

/// Does something with the VM's clock at the moment of a read of the counter, whose value and rate it gets. It is done again if the
/// host has taken this thread's processor away meanwhile.
fn at_one_moment<T>(
    vcpu: &VcpuFd,
    mut with_clock: impl FnMut(u64, u32) -> Result<T>,
) -> Result<(u64, T)> {
    let khz = vcpu.get_tsc_khz().context("read the rate of the time stamp counter")?;
    let most = u64::from(khz) / MOMENTS_PER_MS;
    let mut attempt = 1;
    loop {
        let before = tsc(vcpu)?;
        let done = with_clock(before, khz)?;
        if tsc(vcpu)?.wrapping_sub(before) <= most || attempt == MOMENT_ATTEMPTS {
            return Ok((before, done));
        }
        attempt += 1;
    }
}

impl VcpuState {
    fn read(vcpu: &VcpuFd, fresh: &VcpuFd, known_msrs: &[u32]) -> Result<VcpuState> {
        let differs = |&index: &u32| {
            let value = msr(vcpu, index)?;
            (msr(fresh, index) != Some(value)).then_some(kvm_msr_entry {
                index,
                data: value,
                ..Default::default()
            })
        };
        let kept = |index: &&u32| ![MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE].contains(*index);
        Ok(VcpuState {
            mp_state: vcpu.get_mp_state().context("read whether a vCPU runs")?,
            regs: vcpu.get_regs().context("read general registers")?,
            sregs: vcpu.get_sregs().context("read special registers")?,
            xsave: vcpu.get_xsave().context("read the extended state")?,
            xcrs: vcpu.get_xcrs().context("read the extended control registers")?,
            debug_regs: vcpu.get_debug_regs().context("read the debug registers")?,
            lapic: vcpu.get_lapic().context("read the local APIC")?,
            msrs: known_msrs.iter().filter(kept).filter_map(differs).collect(),
            tsc_deadline: msr(vcpu, MSR_IA32_TSC_DEADLINE).unwrap_or(0),
            events: vcpu.get_vcpu_events().context("read pending events")?,
        })
    }

    fn write(&self, vcpu: &VcpuFd, tsc_offset: u64) -> Result<()> {
        vcpu.set_mp_state(self.mp_state).context("set whether a vCPU runs")?;
        vcpu.set_sregs(&self.sregs).context("set special registers")?;
        vcpu.set_regs(&self.regs).context("set general registers")?;
        sys::vcpu::set_xsave(vcpu, &self.xsave).context("set the extended state")?;
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).context("set the extended control registers")?;
        }
        vcpu.set_debug_regs(&self.debug_regs).context("set the debug registers")?;
        sys::vcpu::set_tsc_offset(vcpu, tsc_offset).context("set the time stamp counter")?;
        set_msrs(vcpu, &self.msrs)?;
        vcpu.set_lapic(&self.lapic).context("set the local APIC")?;
        if self.tsc_deadline != 0 {
            // Behind the APIC's registers, which say whether it counts.
            let (index, data) = (MSR_IA32_TSC_DEADLINE, self.tsc_deadline);
            set_msrs(vcpu, &[kvm_msr_entry { index, data, ..Default::default() }])?;
        }
        vcpu.set_vcpu_events(&self.events).context("set pending events")
    }
}

fn tsc(vcpu: &VcpuFd) -> Result<u64> {
    msr(vcpu, MSR_IA32_TSC).context("read the time stamp counter")
}

/// `None` for one that this vCPU does not have.
fn msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).ok()?;
    let read = vcpu.get_msrs(&mut msrs).ok()?;
    (read == 1).then(|| msrs.as_slice()[0].data)
}

fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<()> {
    let msrs = Msrs::from_entries(entries).context("list MSRs")?;
    let written = vcpu.set_msrs(&msrs).context("set MSRs")?;
    let refused = entries.get(written).map_or(0, |entry| entry.index);
    ensure!(written == entries.len(), "KVM refused MSR {refused:#x}");
    Ok(())
}
