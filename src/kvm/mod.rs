//! Opening KVM and creating a VM with it.

pub mod cpu;
pub mod self_test;
pub mod state;
pub mod vcpu;

use std::io::{self, ErrorKind};

use anyhow::{Context, Result, anyhow, bail};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE,
    kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::layout;
use crate::memory::{self, ColdText, GuestRam};

/// The device file.
pub const DEVICE: &str = "/dev/kvm";

/// Capabilities that mote needs, all present on x86 since Linux 4.x.
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
///
/// # Errors
/// There is no KVM, this user may not use it, or it lacks something.
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

/// Creates a VM with interrupt controllers in the kernel, and without performance counters.
///
/// # Errors
/// KVM refuses.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error).context("create a VM"),
        }
    };
    forgo_pmu(&vm)?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .context("place KVM's identity map page")?;
    vm.set_tss_address(layout::KVM_TSS).context("place KVM's task state segment")?;
    vm.create_irq_chip().context("create the interrupt controllers in KVM")?;
    Ok(vm)
}

/// Has KVM give this VM's vCPUs no performance counters, whatever their CPUID says: AMD's first four have
/// no bit there. An older KVM (before Linux 5.18), or one that gives none to anybody, knows no such request.
fn forgo_pmu(vm: &VmFd) -> Result<()> {
    let mut request = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    request.args[0] = KVM_PMU_CAP_DISABLE.into();
    match vm.enable_cap(&request) {
        Err(error) if error.errno() != libc::EINVAL => {
            Err(error).context("forgo the performance counters")
        }
        _ => Ok(()),
    }
}

/// The CPUID of each of this many vCPUs of a VM.
///
/// # Errors
/// KVM refuses.
pub fn cpuids(kvm: &Kvm, count: u8) -> Result<Vec<CpuId>> {
    let supported = supported_cpuid(kvm)?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    Ok((0..count).map(|index| cpu::cpuid(&supported, index, count, tsc_deadline)).collect())
}

/// A VM with RAM and vCPUs, which has done nothing yet.
#[derive(Debug)]
pub struct Machine {
    /// The VM itself.
    pub vm: VmFd,
    /// Its RAM, all zeros but for the built-in kernel's cold text.
    pub ram: GuestRam,
    /// The first memory slot that is free.
    pub free_slot: u32,
    /// Its vCPUs, with their CPUID.
    pub vcpus: Vec<VcpuFd>,
}

impl Machine {
    /// Makes one with this much RAM and a vCPU for each CPUID, for the built-in kernel if it has this as its cold text.
    ///
    /// # Errors
    /// KVM refuses, or the host has no memory for it.
    pub fn new(
        kvm: &Kvm,
        memory_bytes: u64,
        cold_text: Option<ColdText>,
        cpuids: &[CpuId],
    ) -> Result<Machine> {
        let vm = create_vm(kvm)?;
        let ram = memory::create_ram(memory_bytes)?;
        cold_text.map_or(Ok(()), |text| memory::put_cold_text(&ram, text))?;
        let free_slot = memory::add_ram(&vm, &ram)?;
        let vcpus = (0..).zip(cpuids).map(|(index, cpuid)| vcpu::create(&vm, index, cpuid));
        let vcpus = vcpus.collect::<Result<_>>()?;
        Ok(Machine { vm, ram, free_slot, vcpus })
    }
}

/// CPUID that KVM supports on this host.
///
/// # Errors
/// KVM refuses.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("read the CPUID that KVM supports")
}
