//! Files below open directories, a directory of memory, and whose rights count.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr;

use super::{c_string, check, owned};

// include/uapi/linux/mount.h
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
/// `MOUNT_ATTR_NOSUID`, `_NODEV` and `_NOEXEC`.
const SEALED: libc::c_uint = 2 | 4 | 8;

/// A directory in memory that is in nobody's tree and root's alone, with room for that much (tmpfs).
pub fn memory_directory(bytes: u64, files: u64) -> io::Result<File> {
    // SAFETY: system calls on NUL-terminated strings that outlive them, and on descriptors that live to the
    // end of the block.
    unsafe {
        let fs = libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC);
        let fs = owned(check(fs as libc::c_int)?);
        let (bytes, files) = (bytes.to_string(), files.to_string());
        for (name, value) in [("size", &*bytes), ("nr_inodes", &*files), ("mode", "0700")] {
            let (name, value) = (c_string(name)?, c_string(value)?);
            let (name, value) = (name.as_ptr(), value.as_ptr());
            let fd = fs.as_raw_fd();
            let set = libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_SET_STRING, name, value, 0);
            check(set as libc::c_int)?;
        }
        let none = ptr::null::<libc::c_char>();
        let made =
            libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0);
        check(made as libc::c_int)?;
        let mount = libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, SEALED);
        Ok(File::from(owned(check(mount as libc::c_int)?)))
    }
}

/// Opens a place in the tree, whatever is there: not to read it, but to have it when its name leads elsewhere.
pub fn open_place(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)
}

/// Makes the file of a device (mknod(2)).
pub fn make_device(path: &Path, mode: u32, device: u64) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    check(unsafe { libc::mknod(path.as_ptr(), mode, device) }).map(drop)
}

/// Opens a file below an open directory for reading.
pub fn read_below(directory: &impl AsRawFd, name: &str) -> io::Result<File> {
    open(directory, name, libc::O_RDONLY)
}

/// Opens a file below an open directory for reading and writing; one that is not there is made, for root
/// alone.
pub fn open_or_create_below(directory: &impl AsRawFd, name: &str) -> io::Result<File> {
    open(directory, name, libc::O_RDWR | libc::O_CREAT)
}

fn open(directory: &impl AsRawFd, name: &str, flags: libc::c_int) -> io::Result<File> {
    const MODE: libc::c_uint = 0o600;
    let name = c_string(name)?;
    let flags = flags | libc::O_CLOEXEC;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    Ok(File::from(owned(check(unsafe {
        libc::openat(directory.as_raw_fd(), name.as_ptr(), flags, MODE)
    })?)))
}

/// Removes a file below an open directory.
pub fn remove_below(directory: &impl AsRawFd, name: &str) -> io::Result<()> {
    let name = c_string(name)?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    check(unsafe { libc::unlinkat(directory.as_raw_fd(), name.as_ptr(), 0) })?;
    Ok(())
}

/// Takes the file for this process alone (flock(2)), waiting for whoever has it.
pub fn lock(file: &File) -> io::Result<()> {
    flock(file.as_fd(), libc::LOCK_EX)
}

/// The same without waiting: `false` if another process has it.
pub fn try_lock(file: &File) -> io::Result<bool> {
    match flock(file.as_fd(), libc::LOCK_EX | libc::LOCK_NB) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        taken => taken.map(|()| true),
    }
}

fn flock(file: BorrowedFd<'_>, operation: libc::c_int) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::flock(file.as_raw_fd(), operation) })?;
    Ok(())
}

/// Gives this process, which has one thread, the rights of a user, until [`become_root`]. Its real user stays root:
/// that user's processes may send it no signals.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: pointer and length describe `groups`.
    check(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) })?;
    // SAFETY: plain system calls.
    check(unsafe { libc::setresgid(gid, gid, gid) })?;
    // SAFETY: as above.
    check(unsafe { libc::setresuid(0, uid, 0) })?;
    Ok(())
}

/// Gives this process root's rights again.
pub fn become_root() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::seteuid(0) })?;
    Ok(())
}
