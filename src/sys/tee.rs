//! What the CPU and the security processor say of AMD's memory encryption.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::arch::x86_64::{__cpuid, __get_cpuid_max};
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use super::check;

/// What CPUID says of memory encryption (AMD64 Architecture Programmer's Manual 3, E.4.17).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sev {
    /// Encrypted guests.
    pub sev: bool,
    /// With encrypted registers.
    pub es: bool,
    /// Whose memory the host cannot change either.
    pub snp: bool,
    /// How many there can be at once.
    pub guests: u32,
}

/// What the CPU has of memory encryption; `None` if it knows nothing of it.
pub fn sev() -> Option<Sev> {
    const LEAF: u32 = 0x8000_001f;
    // Intel's CPUs answer an unknown leaf with another one's values.
    let (most, _) = __get_cpuid_max(0x8000_0000);
    if most < LEAF {
        return None;
    }
    let leaf = __cpuid(LEAF);
    let has = |bit: u32| leaf.eax & 1 << bit != 0;
    Some(Sev { sev: has(1), es: has(3), snp: has(4), guests: leaf.ecx })
}

/// `struct sev_issue_cmd` (include/uapi/linux/psp-sev.h).
#[repr(C, packed)]
struct IssueCommand {
    command: u32,
    data: u64,
    error: u32,
}

/// `struct sev_user_data_snp_status` (the same header), with room for later versions of it.
#[repr(C)]
#[derive(Default)]
struct SnpStatus {
    api_major: u8,
    api_minor: u8,
    rest: [u8; 30],
    more: [u64; 4],
}

/// The version of the security processor's firmware, behind an open `/dev/sev`.
///
/// # Errors
/// Those of ioctl(2): the device is no such processor, or not initialised for SEV-SNP.
pub fn platform_status(device: &File) -> io::Result<(u8, u8)> {
    const SNP_PLATFORM_STATUS: u32 = 9;
    // _IOWR('S', 0, struct sev_issue_cmd)
    const SEV_ISSUE_CMD: libc::Ioctl = 0xc010_5300;
    const _: () = assert!(size_of::<IssueCommand>() == 16 && size_of::<SnpStatus>() >= 32);
    let mut status = SnpStatus::default();
    let data = (&raw mut status) as u64;
    let mut command = IssueCommand { command: SNP_PLATFORM_STATUS, data, error: 0 };
    // SAFETY: the command is of the size that the request's number tells, and points to a structure at least as
    // large as what the kernel writes for it; both outlive the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), SEV_ISSUE_CMD, &raw mut command) })?;
    Ok((status.api_major, status.api_minor))
}
