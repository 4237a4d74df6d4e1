//! Capabilities of processes (capabilities(7)).

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::io;

use super::check;

/// A set of capabilities, a bit for each (include/uapi/linux/capability.h, `CAP_*`).
pub type Capabilities = u32;

/// To be any file's owner.
pub const CHOWN: Capabilities = 1;
/// To read and write files without their permissions.
pub const DAC_OVERRIDE: Capabilities = 1 << 1;
/// To do what only a file's owner may.
pub const FOWNER: Capabilities = 1 << 3;
/// To keep set-user-ID bits of a file that is written to.
pub const FSETID: Capabilities = 1 << 4;
/// To change the group.
pub const SETGID: Capabilities = 1 << 6;
/// To change the user.
pub const SETUID: Capabilities = 1 << 7;
const SETPCAP: Capabilities = 1 << 8;
/// To change the root directory.
pub const SYS_CHROOT: Capabilities = 1 << 18;
/// To mount, among much else.
pub const SYS_ADMIN: Capabilities = 1 << 21;
/// To give files capabilities.
pub const SETFCAP: Capabilities = 1 << 31;

/// `struct __user_cap_header_struct` and two of `struct __user_cap_data_struct` (capset(2)).
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Those that this thread can use now.
pub(super) fn effective() -> Capabilities {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut words = [CapabilityWord::default(); 2];
    // SAFETY: version 3 takes a header and two words, and the pointers point to these.
    let ret = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) };
    if ret == 0 { words[0].effective } else { 0 }
}

fn set_capabilities(word: CapabilityWord) -> io::Result<()> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let words = [word, CapabilityWord::default()];
    // SAFETY: as for capget.
    check(unsafe {
        libc::syscall(libc::SYS_capset, &raw mut header, words.as_ptr()) as libc::c_int
    })?;
    Ok(())
}

/// Has a program that this process executes keep these of its capabilities, and no others, although its user is not root.
///
/// # Errors
/// Those of capset(2) and prctl(2).
pub fn keep_through_exec(kept: Capabilities) -> io::Result<()> {
    let all = effective();
    set_capabilities(CapabilityWord { effective: all, permitted: all, inheritable: kept })?;
    for capability in (0..Capabilities::BITS).filter(|bit| kept & 1 << bit != 0) {
        let raise = libc::PR_CAP_AMBIENT_RAISE;
        // SAFETY: plain system call.
        check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, capability, 0, 0) })?;
    }
    Ok(())
}

/// Whether this process may mount file systems, and leave namespaces without a user namespace.
pub fn is_administrator() -> bool {
    effective() & SYS_ADMIN != 0
}

/// Whether this process may change its root directory.
pub fn may_chroot() -> bool {
    effective() & SYS_CHROOT != 0
}

/// Gives up every capability but those `kept`, now and in programs executed later.
///
/// # Errors
/// Those of prctl(2) and capset(2).
pub fn drop_all_but(kept: Capabilities) -> io::Result<()> {
    bound(kept);
    keep(kept)
}

/// Gives up all but those `kept` in programs executed later, if this process may.
pub fn bound(kept: Capabilities) {
    if effective() & SETPCAP == 0 {
        return;
    }
    for capability in 0.. {
        if capability < Capabilities::BITS && kept & 1 << capability != 0 {
            continue;
        }
        // SAFETY: plain system call; a number beyond the last capability is refused.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
}

/// Gives up all but those `kept` now, for this process alone.
///
/// # Errors
/// Those of prctl(2) and capset(2).
pub fn keep(kept: Capabilities) -> io::Result<()> {
    let own = effective();
    // SAFETY: plain system call.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) })?;
    let kept = own & kept;
    set_capabilities(CapabilityWord { effective: kept, permitted: kept, inheritable: 0 })
}
