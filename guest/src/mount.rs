//! The guest's mounts: the root share, the kernel file systems every program expects (contract §7.1), and
//! those of the spec.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use mote_agent::attestation;
use mote_agent::instance::{Instance, Mount, ROOT_TAG};

use crate::copy;
use crate::devices;
use crate::etc;
use crate::sys::{self, files};

const NEW_ROOT: &str = "/newroot";
/// Where a share is mounted while it is prepared: in a file system that is not the image's.
const STAGING: &str = "/dev/.mote-share";

/// A file system of the kernel's and where it is mounted.
struct KernelFileSystem {
    fstype: &'static str,
    target: &'static str,
    /// Of mount(2).
    flags: libc::c_ulong,
    options: &'static str,
}

const NOSUID_NODEV_NOEXEC: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

/// In this order.
const KERNEL_FILE_SYSTEMS: [KernelFileSystem; 6] = [
    KernelFileSystem { fstype: "devtmpfs", target: "/dev", flags: libc::MS_NOSUID, options: "" },
    KernelFileSystem { fstype: "proc", target: "/proc", flags: NOSUID_NODEV_NOEXEC, options: "" },
    KernelFileSystem { fstype: "sysfs", target: "/sys", flags: NOSUID_NODEV_NOEXEC, options: "" },
    KernelFileSystem {
        fstype: "devpts",
        target: "/dev/pts",
        flags: libc::MS_NOSUID | libc::MS_NOEXEC,
        options: "mode=620,ptmxmode=666,gid=5",
    },
    KernelFileSystem {
        fstype: "tmpfs",
        target: "/dev/shm",
        flags: NOSUID_NODEV_NOEXEC,
        options: "mode=1777",
    },
    KernelFileSystem {
        fstype: "mqueue",
        target: "/dev/mqueue",
        flags: NOSUID_NODEV_NOEXEC,
        options: "",
    },
];

/// Which of them are moved with the root: the others are below these. The directories are made when the image lacks
/// them.
const MOVED: [&str; 3] = ["/dev", "/proc", "/sys"];

/// Devices that the kernel makes for root alone, and udev for everybody (`50-udev-default.rules`).
const DEVICES_FOR_ALL: [&str; 3] = ["/dev/fuse", "/dev/net/tun", "/dev/kvm"];

/// Mounts the root share and makes it `/`, with the kernel file systems, which are mounted below the initramfs. Returns
/// the sources of the spec's [`Mount::Bind`]s, in order, which cannot be named any more where those are mounted.
///
/// # Errors
/// If the host serves no such share, it cannot become the root directory, it lacks a source, or it lacks a mount point
/// and has no room for one.
pub fn root(mounts: &[Mount]) -> Result<Vec<File>, String> {
    let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    // Afterwards they cannot be named any more.
    let below = MOVED.map(|target| Ok((target, files::open_place(target)?)));
    let below = below.into_iter().collect::<io::Result<Vec<_>>>();
    let below = below.map_err(failed("open the kernel file systems"))?;
    fs::create_dir_all(NEW_ROOT).map_err(failed("create /newroot in the initramfs"))?;
    sys::mount(ROOT_TAG, NEW_ROOT, "virtiofs", 0, "")
        .map_err(|e| format!("mount the root file system (virtiofs tag {ROOT_TAG}): {e}"))?;
    // The initramfs cannot be pivoted away from (it is the kernel's rootfs): move the share over it.
    std::env::set_current_dir(NEW_ROOT)
        .and_then(|()| sys::mount(".", "/", "", libc::MS_MOVE, ""))
        .and_then(|()| sys::chroot("."))
        .and_then(|()| std::env::set_current_dir("/"))
        .map_err(failed("make the root share the root directory"))?;
    let sources = mounts.iter().filter_map(|mount| match mount {
        Mount::Bind { source, path, .. } => Some(open_source(source).map_err(|e| {
            format!("open {source} in the root file system, which is to be mounted on {path}: {e}")
        })),
        _ => None,
    });
    let sources = sources.collect::<Result<_, String>>()?;
    for (target, mount) in below {
        ensure_directory(target).map_err(|e| {
            format!("create the mount point {target} in the root file system (rootfs_path): {e}")
        })?;
        sys::move_mount(&mount, Path::new(target)).map_err(|e| format!("mount {target}: {e}"))?;
    }
    Ok(sources)
}

/// Opens what a bind is of. What the host has mounted on a directory of a share becomes a mount here when something
/// enters that, which opening a place does only of a directory.
fn open_source(path: &str) -> io::Result<File> {
    let place = libc::O_PATH | libc::O_DIRECTORY;
    match OpenOptions::new().read(true).custom_flags(place).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => files::open_place(path),
        other => other,
    }
}

/// Mounts the kernel file systems below the initramfs and makes the usual links in `/dev`.
///
/// # Errors
/// If the kernel refuses to mount.
pub fn kernel_file_systems() -> Result<(), String> {
    for KernelFileSystem { fstype, target, flags, options } in KERNEL_FILE_SYSTEMS {
        ensure_directory(target).map_err(|e| format!("create {target} in the initramfs: {e}"))?;
        sys::mount(fstype, target, fstype, flags, options)
            .map_err(|e| format!("mount {fstype} on {target}: {e}"))?;
    }
    for device in DEVICES_FOR_ALL {
        match fs::set_permissions(device, fs::Permissions::from_mode(0o666)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(format!("let everybody use {device}: {error}"));
            }
            _ => {}
        }
    }
    for (link, target) in devices::LINKS {
        symlink(target, Path::new("/dev").join(link))
            .map_err(|e| format!("create the link /dev/{link}: {e}"))?;
    }
    Ok(())
}

/// Mounts those that hardly any program does without in this process's root, where nothing is mounted yet and its
/// owner has left no link in the way. A failure is the program's to notice.
pub fn kernel_file_systems_if_missing() {
    let device = |path: &str| {
        let metadata = fs::symlink_metadata(path).ok()?;
        metadata.is_dir().then(|| metadata.dev())
    };
    let Some(of_root) = device("/") else { return };
    for (target, fstype, flags) in [
        ("/proc", "proc", NOSUID_NODEV_NOEXEC),
        ("/sys", "sysfs", NOSUID_NODEV_NOEXEC),
        ("/dev", "devtmpfs", libc::MS_NOSUID),
    ] {
        let _ = fs::create_dir(target);
        if device(target) == Some(of_root) {
            let _ = sys::mount(fstype, target, fstype, flags, "");
        }
    }
}

/// Mounts what the spec asks for, with the `sources` from [`root`]; then the root is made read-only, if it shall be.
///
/// # Errors
/// If a mount point cannot be made, the kernel refuses a mount or its options, or has no such device.
pub fn of_the_spec(instance: &Instance, sources: Vec<File>) -> Result<(), String> {
    if let Some(more) = &instance.devices {
        devices::limit(more)?;
    }
    let mut sources = sources.into_iter();
    for mount in &instance.mounts {
        match mount {
            Mount::Share { tag, path, read_only, copy_up: false } => {
                let flags = if *read_only { libc::MS_RDONLY } else { 0 };
                mount_on(path, &format!("share '{tag}'"), "virtiofs", tag, flags, "")?;
            }
            Mount::Share { tag, path, read_only, copy_up: true } => {
                let what = format!("share '{tag}'");
                make_mount_point(path, &what)?;
                mount_on(STAGING, &what, "virtiofs", tag, 0, "")?;
                copy_up(path, *read_only).and_then(|()| fs::remove_dir(STAGING)).map_err(|e| {
                    format!("give {what}, if it is empty, what the image has in {path}: {e}")
                })?;
            }
            Mount::File { tag, path, read_only } => {
                let what = format!("share '{tag}'");
                mount_on(STAGING, &what, "virtiofs", tag, 0, "")?;
                let mounted = mount_file(Path::new(path), *read_only);
                mounted
                    .and_then(|()| sys::unmount(STAGING))
                    .and_then(|()| fs::remove_dir(STAGING))
                    .map_err(|e| format!("mount the file of {what} on {path}: {e}"))?;
            }
            Mount::Bind { source, path, options } => {
                let Some(tree) = sources.next() else { continue };
                bind(&tree, path, options).map_err(|e| format!("mount {source} on {path}: {e}"))?;
            }
            Mount::Tmpfs { path, options, copy_up: false } => {
                let (flags, data) = split_options(options);
                mount_on(path, "a tmpfs", "tmpfs", "tmpfs", flags, &data)?;
            }
            Mount::Tmpfs { path, options, copy_up: true } => {
                let what = "a tmpfs";
                let (flags, data) = split_options(options);
                make_mount_point(path, what)?;
                let (later, now) = (flags & libc::MS_RDONLY, flags & !libc::MS_RDONLY);
                mount_on(STAGING, what, "tmpfs", "tmpfs", now, &data)?;
                copy_up(path, later != 0)
                    .and_then(|()| fs::remove_dir(STAGING))
                    .map_err(|e| format!("give a tmpfs what the image has in {path}: {e}"))?;
            }
        }
    }
    if instance.make_workdir {
        // Entering it names what is wrong with it.
        let _ = fs::create_dir_all(&instance.workdir);
    }
    if instance.read_only_root {
        if instance.attestation.is_some() {
            // Secrets are to have a place all the same; without it they are refused.
            // Through no link, which may lead to a share. Nothing else runs yet.
            let is_directory = |path: &str| fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
            for path in ["/run", attestation::SECRETS] {
                let _ = fs::create_dir(path);
                if !is_directory(path) {
                    break;
                }
            }
        }
        make_read_only("/").map_err(|e| format!("make / read-only: {e}"))?;
    }
    Ok(())
}

/// Gives this process mounts of its own, where these paths are empty, or cannot be changed. One that is not there is none.
/// With `own_pids`, its /proc shows the processes of its namespace.
///
/// # Errors
/// The kernel refuses one of the mounts.
pub fn own_view(own_pids: bool, masked: &[String], read_only: &[String]) -> io::Result<()> {
    sys::namespaces::own_mounts()?;
    if own_pids {
        sys::mount("proc", "/proc", "proc", NOSUID_NODEV_NOEXEC, "")?;
    }
    let kept = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    for path in masked {
        kept(match fs::metadata(path) {
            Err(error) => Err(error),
            Ok(metadata) if metadata.is_dir() => {
                sys::mount("tmpfs", path, "tmpfs", libc::MS_RDONLY, "")
            }
            Ok(_) => sys::mount("/dev/null", path, "", libc::MS_BIND, ""),
        })?;
    }
    for path in read_only {
        let bound = sys::mount(path, path, "", libc::MS_BIND | libc::MS_REC, "");
        kept(bound.and_then(|()| sys::namespaces::make_mount_read_only(path)))?;
    }
    Ok(())
}

/// Brings the share that is staged to its path, which is a directory. Seeds it if it is empty.
fn copy_up(path: &str, read_only: bool) -> io::Result<()> {
    if fs::read_dir(STAGING)?.next().is_none() {
        let image = fs::canonicalize(path)?;
        if Path::new(STAGING).starts_with(&image) {
            return Err(io::Error::other("every box's /dev is in it; choose another path"));
        }
        copy::fill(Path::new(STAGING), &image)?;
    }
    sys::mount(STAGING, path, "", libc::MS_MOVE, "")?;
    if read_only { make_read_only(path) } else { Ok(()) }
}

/// Mounts the file of the staged share that has the name of the path.
fn mount_file(path: &Path, read_only: bool) -> io::Result<()> {
    // Opened as a place only: whoever fills the share cannot make the agent wait, nor follow a link.
    let place = libc::O_PATH | libc::O_NOFOLLOW;
    let source = Path::new(STAGING).join(path.file_name().unwrap_or_default());
    let file = OpenOptions::new().read(true).custom_flags(place).open(source)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let target = etc::mount_over(&file, path)?;
    match target.to_str() {
        Some(target) if read_only => make_read_only(target),
        None if read_only => Err(io::ErrorKind::InvalidInput.into()),
        _ => Ok(()),
    }
}

/// Mounts a file or directory on one of its kind, which is made if need be.
fn bind(tree: &File, path: &str, options: &str) -> io::Result<()> {
    let mut target = PathBuf::from(path);
    if tree.metadata()?.is_dir() {
        fs::create_dir_all(path)?;
        sys::mount_file_over(tree, &target)?;
    } else {
        target = etc::mount_over(tree, &target)?;
    }
    match split_options(options) {
        (0, _) => Ok(()),
        (flags, _) => limit(target.to_str().ok_or(io::ErrorKind::InvalidInput)?, flags),
    }
}

fn make_read_only(mount_point: &str) -> io::Result<()> {
    limit(mount_point, libc::MS_RDONLY)
}

/// Gives a mount these flags, and no others.
fn limit(mount_point: &str, flags: libc::c_ulong) -> io::Result<()> {
    sys::mount("", mount_point, "", libc::MS_REMOUNT | libc::MS_BIND | flags, "")
}

/// Mounts something of the spec's, which errors call `what`, on a directory that is made if need be.
fn mount_on(
    path: &str,
    what: &str,
    fstype: &str,
    source: &str,
    flags: libc::c_ulong,
    data: &str,
) -> Result<(), String> {
    make_mount_point(path, what)?;
    sys::mount(source, path, fstype, flags, data)
        .map_err(|e| format!("mount {what} on {path} (options '{data}'): {e}"))
}

fn make_mount_point(path: &str, what: &str) -> Result<(), String> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(|e| format!("create the mount point {path} for {what}: {e}"))
}

/// include/uapi/linux/mount.h
const MS_NOSYMFOLLOW: libc::c_ulong = 256;

/// Options of mount(8) that are flags of mount(2), and whether they set or clear them.
const FLAG_OPTIONS: [(&str, libc::c_ulong, bool); 13] = [
    ("ro", libc::MS_RDONLY, true),
    ("rw", libc::MS_RDONLY, false),
    ("noexec", libc::MS_NOEXEC, true),
    ("exec", libc::MS_NOEXEC, false),
    ("nosuid", libc::MS_NOSUID, true),
    ("suid", libc::MS_NOSUID, false),
    ("nodev", libc::MS_NODEV, true),
    ("dev", libc::MS_NODEV, false),
    ("nosymfollow", MS_NOSYMFOLLOW, true),
    ("noatime", libc::MS_NOATIME, true),
    ("relatime", libc::MS_RELATIME, true),
    ("sync", libc::MS_SYNCHRONOUS, true),
    ("async", libc::MS_SYNCHRONOUS, false),
];

/// Flags for mount(2), and what is left for the file system.
fn split_options(options: &str) -> (libc::c_ulong, String) {
    let mut flags = 0;
    let mut data = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match FLAG_OPTIONS.iter().find(|(name, ..)| *name == option) {
            Some((_, flag, true)) => flags |= flag,
            Some((_, flag, false)) => flags &= !flag,
            None => data.push(option),
        }
    }
    (flags, data.join(","))
}

fn ensure_directory(path: &str) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_options_are_split_into_flags_and_data() {
        let expected = (libc::MS_NOEXEC | libc::MS_NOSUID, "size=64m,mode=700".to_owned());
        assert_eq!(split_options("ro,noexec,size=64m,nosuid,mode=700,rw"), expected);
        assert_eq!(split_options(""), (0, String::new()));
    }
}
