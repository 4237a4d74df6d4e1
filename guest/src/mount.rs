//! The guest's mounts: the root share, and the kernel file systems every program expects
//! (contract §7.1).

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};

use mote_agent::instance::ROOT_TAG;

use crate::sys;

const NEW_ROOT: &str = "/newroot";

/// One mount below the root: file system, directory, flags, options.
type Mount = (&'static str, &'static str, libc::c_ulong, &'static str);

const NOSUID_NODEV_NOEXEC: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

/// In this order; the directories are made when the image lacks them.
const MOUNTS: [Mount; 7] = [
    ("devtmpfs", "/dev", libc::MS_NOSUID, ""),
    ("proc", "/proc", NOSUID_NODEV_NOEXEC, ""),
    ("sysfs", "/sys", NOSUID_NODEV_NOEXEC, ""),
    ("cgroup2", "/sys/fs/cgroup", NOSUID_NODEV_NOEXEC, "nsdelegate"),
    ("devpts", "/dev/pts", libc::MS_NOSUID | libc::MS_NOEXEC, "mode=620,ptmxmode=666,gid=5"),
    ("tmpfs", "/dev/shm", NOSUID_NODEV_NOEXEC, "mode=1777"),
    ("mqueue", "/dev/mqueue", NOSUID_NODEV_NOEXEC, ""),
];

/// Mounts the root share and makes it `/`.
pub fn root() -> Result<(), String> {
    fs::create_dir_all(NEW_ROOT).map_err(|e| format!("create {NEW_ROOT} in the initramfs: {e}"))?;
    sys::mount(ROOT_TAG, NEW_ROOT, "virtiofs", 0, "")
        .map_err(|e| format!("mount the root file system (virtiofs tag {ROOT_TAG}): {e}"))?;
    // The initramfs cannot be pivoted away from (it is the kernel's rootfs): move the share over it.
    std::env::set_current_dir(NEW_ROOT)
        .and_then(|()| sys::mount(".", "/", "", libc::MS_MOVE, ""))
        .and_then(|()| sys::chroot("."))
        .and_then(|()| std::env::set_current_dir("/"))
        .map_err(|e| format!("make the root share the root directory: {e}"))
}

/// Mounts the kernel file systems and makes the usual links in `/dev`.
pub fn kernel_file_systems() -> Result<(), String> {
    for (fstype, target, flags, options) in MOUNTS {
        ensure_directory(target).map_err(|e| {
            format!("create the mount point {target} in the root file system (rootfs_path): {e}")
        })?;
        sys::mount(fstype, target, fstype, flags, options)
            .map_err(|e| format!("mount {fstype} on {target}: {e}"))?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, link).map_err(|e| format!("create the link {link}: {e}"))?;
    }
    Ok(())
}

fn ensure_directory(path: &str) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}
