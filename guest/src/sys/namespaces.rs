//! Namespaces, and what a process sees in its own (namespaces(7)).

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::{c_string, check, mount, process_file};

/// Makes the calling process's cgroup the root of what it and its children see of the hierarchy.
pub fn new_cgroup_namespace() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) })?;
    Ok(())
}

/// Gives this process mounts of its own: others see nothing of what it mounts, and it sees what they do.
pub fn own_mounts() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    mount("", "/", "", libc::MS_REC | libc::MS_SLAVE, "")
}

/// While it exists, this process's children are in a new namespace of processes: the first is its process 1.
pub struct OwnPids {
    /// The agent itself, in whose namespace they are again afterwards.
    agent: OwnedFd,
}

impl OwnPids {
    /// Begins it.
    pub fn enter() -> io::Result<Self> {
        // SAFETY: plain system calls.
        let agent = process_file(unsafe { libc::getpid() })?;
        // SAFETY: as above.
        check(unsafe { libc::unshare(libc::CLONE_NEWPID) })?;
        Ok(OwnPids { agent })
    }
}

impl Drop for OwnPids {
    fn drop(&mut self) {
        // A process may always go back to its own namespace.
        let _ = enter_namespaces(&self.agent, libc::CLONE_NEWPID);
    }
}

/// Enters these namespaces of a process's (setns(2)); that of processes counts for children to come.
pub fn enter_namespaces(process: &impl AsRawFd, kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::setns(process.as_raw_fd(), kinds) })?;
    Ok(())
}

/// Makes a mount read-only, and leaves its other attributes (mount_setattr(2)).
pub fn make_mount_read_only(path: &str) -> io::Result<()> {
    /// include/uapi/linux/mount.h
    #[repr(C)]
    struct MountAttr {
        attr_set: u64,
        attr_clr: u64,
        propagation: u64,
        userns_fd: u64,
    }
    const MOUNT_ATTR_RDONLY: u64 = 1;
    let path = c_string(path)?;
    let attr = MountAttr { attr_set: MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the pointers are to a NUL-terminated string and to a structure of the length that goes with it.
    check(unsafe {
        let (attr, len) = (&raw const attr, size_of::<MountAttr>());
        libc::syscall(libc::SYS_mount_setattr, libc::AT_FDCWD, path.as_ptr(), 0, attr, len)
            as libc::c_int
    })?;
    Ok(())
}
