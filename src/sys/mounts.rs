//! Mounts that are made aside and then put into place, and a tree of directories that is walked one name at a
//! time: what it takes to assemble a root file system below which somebody else has put symbolic links.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::ffi::{CStr, CString, OsString};
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::ptr;

use super::{check, owned};

/// Attributes of a mount (mount_setattr(2), `MOUNT_ATTR_*`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Those that it gets.
    pub set: u64,
    /// Those that it loses.
    pub clear: u64,
}

/// How much a change or a copy takes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// One mount.
    One,
    /// It and all below it.
    Tree,
}

impl Extent {
    fn flag(self) -> u32 {
        if self == Extent::Tree { libc::AT_RECURSIVE as u32 } else { 0 }
    }
}

/// A copy of what is mounted at a path, which is not mounted anywhere yet (open_tree(2)).
///
/// # Errors
/// Those of open_tree(2).
pub fn clone_mount(path: &Path, extent: Extent) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | extent.flag();
    // SAFETY: the string is NUL-terminated and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    Ok(owned(check(fd as libc::c_int)?))
}

/// A new tmpfs, which is not mounted anywhere yet, with options such as `("size", "64k")`.
///
/// # Errors
/// Those of fsopen(2) and what follows it; EINVAL for an option that tmpfs does not take.
pub fn new_tmpfs(options: &[(String, String)], attributes: Attributes) -> io::Result<OwnedFd> {
    // include/uapi/linux/mount.h
    const FSOPEN_CLOEXEC: libc::c_int = 1;
    const FSCONFIG_SET_STRING: libc::c_int = 1;
    const FSCONFIG_CMD_CREATE: libc::c_int = 6;
    const FSMOUNT_CLOEXEC: libc::c_int = 1;
    // SAFETY: system calls on descriptors that live to the end of the block, and on NUL-terminated strings that
    // outlive the calls; null is what the command without a value takes.
    unsafe {
        let fs = libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC);
        let fs = owned(check(fs as libc::c_int)?);
        for (key, value) in options {
            let (key, value) = (CString::new(key.as_str())?, CString::new(value.as_str())?);
            let (fd, set) = (fs.as_raw_fd(), FSCONFIG_SET_STRING);
            let set = libc::syscall(libc::SYS_fsconfig, fd, set, key.as_ptr(), value.as_ptr(), 0);
            check(set as libc::c_int)?;
        }
        let (fd, create, none) = (fs.as_raw_fd(), FSCONFIG_CMD_CREATE, ptr::null::<libc::c_char>());
        check(libc::syscall(libc::SYS_fsconfig, fd, create, none, none, 0) as libc::c_int)?;
        let mount = libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes.set);
        Ok(owned(check(mount as libc::c_int)?))
    }
}

/// Changes a mount's attributes, and with `is_private` has its mounts and those of others stay apart.
///
/// # Errors
/// Those of mount_setattr(2), which Linux has since 5.12.
pub fn set_attributes(
    mount: &impl AsRawFd,
    attributes: Attributes,
    is_private: bool,
    extent: Extent,
) -> io::Result<()> {
    // Access times are one field of several bits, which must be cleared as a whole to be set.
    let times = attributes.set & libc::MOUNT_ATTR__ATIME != 0
        || attributes.clear & libc::MOUNT_ATTR__ATIME != 0;
    let attributes = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear | if times { libc::MOUNT_ATTR__ATIME } else { 0 },
        propagation: if is_private { libc::MS_PRIVATE } else { 0 },
        userns_fd: 0,
    };
    let (fd, empty) = (mount.as_raw_fd(), c"".as_ptr());
    let flags = libc::AT_EMPTY_PATH as u32 | extent.flag();
    let (attributes, size) = (&raw const attributes, size_of::<libc::mount_attr>());
    // SAFETY: the structure has the size given and outlives the call, as does the string.
    let set = unsafe { libc::syscall(libc::SYS_mount_setattr, fd, empty, flags, attributes, size) };
    check(set as libc::c_int)?;
    Ok(())
}

/// Changes a mount's attributes as [`set_attributes`] does, but that what the host has forbidden of it stays so in a user
/// namespace, whose root may not permit it again (mount_namespaces(7)).
///
/// # Errors
/// Those of mount_setattr(2).
pub fn change_as_permitted(
    mount: &impl AsRawFd,
    attributes: Attributes,
    is_private: bool,
    extent: Extent,
) -> io::Result<()> {
    const TIMES: u64 = libc::MOUNT_ATTR__ATIME | libc::MOUNT_ATTR_NODIRATIME;
    let is_refused = |set: &io::Result<()>| matches!(set, Err(error) if error.raw_os_error() == Some(libc::EPERM));
    let all = set_attributes(mount, attributes, is_private, extent);
    if !is_refused(&all) {
        return all;
    }
    // To forbid more can always be done, and is not optional.
    let forbidden = Attributes { set: attributes.set & !TIMES, clear: 0 };
    set_attributes(mount, forbidden, is_private, extent)?;
    let cleared = (0..u64::BITS).map(|bit| attributes.clear & !TIMES & 1 << bit);
    let cleared = cleared.filter(|bit| *bit != 0).map(|bit| Attributes { set: 0, clear: bit });
    let times = Attributes { set: attributes.set & TIMES, clear: attributes.clear & TIMES };
    for one in cleared.chain([times]) {
        let set = set_attributes(mount, one, false, extent);
        if !is_refused(&set) {
            set?;
        }
    }
    Ok(())
}

/// Puts a mount that is not mounted anywhere over the file or directory that `place` is.
///
/// # Errors
/// Those of move_mount(2).
pub fn attach(mount: &impl AsRawFd, place: &impl AsRawFd) -> io::Result<()> {
    let empty = c"".as_ptr();
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let (from, to) = (mount.as_raw_fd(), place.as_raw_fd());
    // SAFETY: plain system call on open descriptors and an empty string.
    let moved = unsafe { libc::syscall(libc::SYS_move_mount, from, empty, to, empty, flags) };
    check(moved as libc::c_int)?;
    Ok(())
}

/// Bytes of a tmpfs that a path leads to; `None` if another file system is there.
///
/// # Errors
/// Those of statfs(2).
pub fn tmpfs_size(path: &Path) -> io::Result<Option<u64>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all zeros are valid; the string outlives the call, which fills the structure.
    let stat = unsafe {
        let mut stat: libc::statfs = zeroed();
        check(libc::statfs(path.as_ptr(), &mut stat))?;
        stat
    };
    let bytes = stat.f_blocks.saturating_mul(stat.f_bsize.unsigned_abs());
    Ok((stat.f_type == libc::TMPFS_MAGIC).then_some(bytes))
}

/// Whether cgroup v2 is mounted at this path.
pub fn is_cgroup2(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: as above.
    unsafe {
        let mut stat: libc::statfs = zeroed();
        libc::statfs(path.as_ptr(), &mut stat) == 0 && stat.f_type == libc::CGROUP2_SUPER_MAGIC
    }
}

/// What is at a name in a directory: no link is followed, and nothing is opened by looking.
///
/// # Errors
/// Those of openat(2). The name must be one: no path, and not `..`.
pub fn look_up(directory: &impl AsFd, name: &CStr) -> io::Result<File> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let at = directory.as_fd().as_raw_fd();
    // SAFETY: the string outlives the call.
    Ok(File::from(owned(check(unsafe { libc::openat(at, name.as_ptr(), flags) })?)))
}

/// Where a symbolic link leads that [`look_up`] has found.
///
/// # Errors
/// Those of readlinkat(2).
pub fn read_link(link: &impl AsRawFd) -> io::Result<OsString> {
    let mut target = vec![0_u8; libc::PATH_MAX as usize];
    let (fd, empty) = (link.as_raw_fd(), c"".as_ptr());
    // SAFETY: pointer and length describe `target`; an empty path means the link itself.
    let len = unsafe { libc::readlinkat(fd, empty, target.as_mut_ptr().cast(), target.len()) };
    target.truncate(usize::try_from(len).map_err(|_| io::Error::last_os_error())?);
    Ok(OsString::from_vec(target))
}

/// Makes a directory of this name.
///
/// # Errors
/// Those of mkdirat(2).
pub fn make_directory(directory: &impl AsFd, name: &CStr) -> io::Result<()> {
    let at = directory.as_fd().as_raw_fd();
    // SAFETY: the string outlives the call.
    check(unsafe { libc::mkdirat(at, name.as_ptr(), 0o755) })?;
    Ok(())
}

/// Makes an empty file of this name.
///
/// # Errors
/// Those of openat(2): something of this name is there.
pub fn make_file(directory: &impl AsFd, name: &CStr) -> io::Result<()> {
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let at = directory.as_fd().as_raw_fd();
    // SAFETY: the string outlives the call.
    drop(owned(check(unsafe { libc::openat(at, name.as_ptr(), flags, 0o644) })?));
    Ok(())
}

/// Mounts what is at a path, and below it, at another path as well.
///
/// # Errors
/// Those of mount(2).
pub fn bind(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) =
        (CString::new(from.as_os_str().as_bytes())?, CString::new(to.as_os_str().as_bytes())?);
    let flags = libc::MS_BIND | libc::MS_REC;
    // SAFETY: the strings outlive the call; null is what this kind of mount(2) takes for the rest.
    check(unsafe { libc::mount(from.as_ptr(), to.as_ptr(), ptr::null(), flags, ptr::null()) })?;
    Ok(())
}
