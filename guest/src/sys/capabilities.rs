//! Setting a process's capabilities (capabilities(7)) as it is made another user's. All of it may be called between fork and
//! execve, and says by errno why it fails.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::mem::size_of_val;

use mote_agent::instance::Capabilities;

/// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
const VERSION: u32 = 0x2008_0522;

/// What capget(2) and capset(2) are called with.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// One half of the sets: capabilities 0 to 31, or those from 32 on.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The number of the kernel's last capability is below this.
const END: u32 = 64;

/// Drops from the bounding set what is not in it, and has the next change of user leave the permitted set as it is. `false`
/// if the kernel refuses.
pub fn keep_through_setuid(sets: &Capabilities) -> bool {
    // SAFETY: plain system calls.
    unsafe {
        for capability in (0..END).filter(|n| sets.bounding >> n & 1 == 0) {
            let has = libc::prctl(libc::PR_CAPBSET_READ, capability as libc::c_ulong, 0, 0, 0);
            // The kernel has no such capability if it is negative.
            if has > 0
                && libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) < 0
            {
                return false;
            }
        }
        libc::prctl(libc::PR_SET_KEEPCAPS, 1 as libc::c_ulong, 0, 0, 0) == 0
    }
}

/// Takes on the other sets, as far as the process has the capabilities. `false` if the kernel refuses.
pub fn take(sets: &Capabilities) -> bool {
    let header = Header { version: VERSION, pid: 0 };
    let mut halves = [Half::default(); 2];
    debug_assert_eq!(size_of_val(&halves), 24);
    // SAFETY: the pointers are to a header and to the two halves that version 3 has.
    unsafe {
        if libc::syscall(libc::SYS_capget, &raw const header, halves.as_mut_ptr()) < 0 {
            return false;
        }
        for (half, shift) in halves.iter_mut().zip([0, 32]) {
            let had = half.permitted;
            let of = |set: u64| (set >> shift) as u32 & had;
            *half = Half {
                effective: of(sets.effective) & of(sets.permitted),
                permitted: of(sets.permitted),
                inheritable: of(sets.inheritable),
            };
        }
        if libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) < 0 {
            return false;
        }
        let ambient = libc::PR_CAP_AMBIENT;
        let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong;
        libc::prctl(ambient, clear, 0, 0, 0);
        for capability in (0..END).filter(|n| sets.ambient >> n & 1 == 1) {
            // Only what is permitted and inheritable can be ambient; engines ask for more, and mean that.
            let raise = libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong;
            libc::prctl(ambient, raise, capability as libc::c_ulong, 0, 0);
        }
        true
    }
}
