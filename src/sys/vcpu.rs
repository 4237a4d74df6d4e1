//! What kvm-ioctls has no safe call for: a vCPU's time stamp counter, and its extended state.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_xsave};
use kvm_ioctls::VcpuFd;

use super::check;

// include/uapi/linux/kvm.h; of structures of 24 bytes.
const KVM_SET_DEVICE_ATTR: libc::Ioctl = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::Ioctl = 0x4018_aee2;

fn offset_at(address: u64) -> kvm_device_attr {
    let (group, attr) = (KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into());
    kvm_device_attr { group, attr, addr: address, flags: 0 }
}

/// What is added to the host's time stamp counter to have the guest's (Documentation/virt/kvm/devices/vcpu.rst, 4.1).
///
/// # Errors
/// This KVM has no such attribute (before Linux 5.16).
pub fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0u64;
    let attribute = offset_at(&raw mut offset as u64);
    // SAFETY: KVM writes 64 bits to the address, which is a local's.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &attribute) })?;
    Ok(offset)
}

/// Sets it.
///
/// # Errors
/// As for [`tsc_offset`].
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute = offset_at(&raw const offset as u64);
    // SAFETY: KVM reads 64 bits from the address, which is a local's.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &attribute) })?;
    Ok(())
}

/// Sets floating-point and vector registers, of a vCPU whose extended state is no larger than the structure.
///
/// # Errors
/// KVM refuses the state.
pub fn set_xsave(vcpu: &VcpuFd, state: &kvm_xsave) -> io::Result<()> {
    // SAFETY: KVM reads `struct kvm_xsave` and, by this function's contract, nothing behind it: more it reads only if the
    // guest may have states that this process had to ask for (arch_prctl(2)), and it has not.
    unsafe { vcpu.set_xsave(state) }.map_err(Into::into)
}
