//! What this host offers for confidential VMs, and what it lacks. mote starts none: it has no way to launch one, and
//! a box that asks for one is refused, with what is said here.

use std::fs::{self, OpenOptions};

use kvm_bindings::{
    KVM_CAP_VM_TYPES, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_X86_SNP_VM, KVM_X86_TDX_VM,
};
use kvm_ioctls::Cap;

use crate::kvm;
use crate::plan::Technology;
use crate::sys::tee::{Sev, platform_status, sev};

/// The oldest firmware that Linux takes for SEV-SNP (`SNP_MIN_API_MAJOR`, drivers/crypto/ccp/sev-dev.c).
const FIRMWARE: (u8, u8) = (1, 51);

/// What this host lacks for it, and may do something about.
fn lacking(technology: Technology) -> Vec<String> {
    let processor = match technology {
        Technology::SevSnp => sev_lacks(),
        Technology::Tdx => tdx_lacks(),
    };
    processor.into_iter().chain(kvm_lacks(technology)).collect()
}

/// Why no VM is protected by it here, in one line.
pub fn missing(technology: Technology) -> String {
    const NO_LAUNCH: &str = "mote has no way to launch one";
    let lacking = lacking(technology);
    if lacking.is_empty() {
        return format!("this host has all that it takes, but {NO_LAUNCH}");
    }
    format!("this host lacks {}; and {NO_LAUNCH}", lacking.join("; "))
}

/// Why a box that asks for it does not start, in one line.
pub fn refusal(technology: Technology) -> String {
    format!("tee_config: {technology}: {}: leave it null", missing(technology))
}

fn sev_lacks() -> Vec<String> {
    let Some(Sev { sev, es, snp, guests }) = sev() else {
        return vec!["a CPU with memory encryption (AMD; CPUID has no leaf 0x8000001f)".into()];
    };
    let mut lacking: Vec<String> = [("SEV", sev), ("SEV-ES", es), ("SEV-SNP", snp)]
        .into_iter()
        .filter(|(_, has)| !has)
        .map(|(name, _)| format!("the CPU's {name} (CPUID 0x8000001f)"))
        .collect();
    if sev && guests == 0 {
        lacking.push("keys for encrypted guests (the firmware's number of SEV ASIDs is 0)".into());
    }
    match parameter_lacks("kvm_amd", "sev_snp") {
        // Newer kernels would set the security processor up, only to answer.
        Some(lack) => lacking.push(lack),
        None => lacking.extend(firmware_lacks()),
    }
    lacking
}

/// What is lacking of the security processor, which Linux offers as `/dev/sev`.
fn firmware_lacks() -> Option<String> {
    const DEVICE: &str = "/dev/sev";
    let device = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => device,
        Err(error) => return Some(format!("{DEVICE}, the security processor ({error})")),
    };
    let (major, minor) = FIRMWARE;
    match platform_status(&device) {
        Ok(version) if version >= FIRMWARE => None,
        Ok((has_major, has_minor)) => Some(format!(
            "firmware {major}.{minor} of the security processor ({DEVICE} has {has_major}.{has_minor})"
        )),
        Err(error) => Some(format!(
            "an initialised security processor (SNP_PLATFORM_STATUS on {DEVICE}: {error})"
        )),
    }
}

fn tdx_lacks() -> Vec<String> {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = flags.split_whitespace().any(|word| word == "tdx_host_platform");
    let cpu = (!has).then(|| {
        "a CPU and firmware with TDX switched on (/proc/cpuinfo has no tdx_host_platform)".into()
    });
    cpu.into_iter().chain(parameter_lacks("kvm_intel", "tdx")).collect()
}

/// A parameter of KVM's module that must be on.
fn parameter_lacks(module: &str, name: &str) -> Option<String> {
    let path = format!("/sys/module/{module}/parameters/{name}");
    let value = fs::read_to_string(&path).ok();
    match value.as_deref().map(str::trim) {
        Some("Y" | "1") => None,
        Some(other) => Some(format!("{module}.{name}=1 ({path} is {other})")),
        None => Some(format!("a {module} with the parameter {name} ({path} is not there)")),
    }
}

fn kvm_lacks(technology: Technology) -> Vec<String> {
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => return vec![format!("KVM ({error:#})")],
    };
    let (vm_type, name) = match technology {
        Technology::SevSnp => (KVM_X86_SNP_VM, "KVM_X86_SNP_VM"),
        Technology::Tdx => (KVM_X86_TDX_VM, "KVM_X86_TDX_VM"),
    };
    // Bits; none on a KVM that does not know the question.
    let types = kvm.check_extension_raw(KVM_CAP_VM_TYPES.into());
    let has = |cap, bit: u32| kvm.check_extension_int(cap) & bit as i32 != 0;
    [
        (types & 1 << vm_type != 0, format!("VMs of the type {name} (KVM_CAP_VM_TYPES)")),
        (has(Cap::GuestMemfd, 1), "guest_memfd (KVM_CAP_GUEST_MEMFD)".into()),
        (
            has(Cap::MemoryAttributes, KVM_MEMORY_ATTRIBUTE_PRIVATE),
            "private memory (KVM_CAP_MEMORY_ATTRIBUTES)".into(),
        ),
    ]
    .into_iter()
    .filter(|(has, _)| !has)
    .map(|(_, what)| what)
    .collect()
}
