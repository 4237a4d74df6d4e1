//! A `/dev` of the box's own, with the devices that every program expects (OCI runtime specification, "Default Devices")
//! and those that the spec names, in place of all that the kernel has.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crate::etc;
use crate::sys::{self, files};

const STANDARD: [&str; 6] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

/// File systems below `/dev` that stay, by the names of their directories.
const FILE_SYSTEMS: [&str; 3] = ["pts", "shm", "mqueue"];

/// The usual links in `/dev`: name, target.
pub const LINKS: [(&str, &str); 5] = [
    ("core", "/proc/kcore"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

const DEV: &str = "/dev";
/// Where it is until it is complete.
const STAGING: &str = "/dev/.mote-dev";
const OPTIONS: &str = "mode=755,size=65536k";

/// Puts a `/dev` with the standard devices and `more` over the kernel's.
///
/// # Errors
/// The kernel has no such device, or refuses a step.
pub fn limit(more: &[String]) -> Result<(), String> {
    let failed = |e: io::Error| format!("make a /dev of the box's own: {e}");
    fs::create_dir(STAGING).map_err(failed)?;
    sys::mount("tmpfs", STAGING, "tmpfs", libc::MS_NOSUID, OPTIONS).map_err(failed)?;
    for device in STANDARD.into_iter().chain(more.iter().map(String::as_str)) {
        copy(device).map_err(|e| format!("devices: give the box {device}: {e}"))?;
    }
    rest().map_err(failed)
}

/// Makes the file of a device of the kernel's once more.
fn copy(device: &str) -> io::Result<()> {
    let metadata = fs::symlink_metadata(device)?;
    let kind = metadata.file_type();
    if !kind.is_char_device() && !kind.is_block_device() {
        return Err(io::Error::other("it is no device"));
    }
    let name = Path::new(device).strip_prefix(DEV).map_err(io::Error::other)?;
    let target = Path::new(STAGING).join(name);
    if let Some(parent) = target.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    match files::make_device(&target, metadata.mode(), metadata.rdev()) {
        // Named twice, or a standard one.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made?,
    }
    // Whatever the umask is.
    fs::set_permissions(&target, Permissions::from_mode(metadata.mode() & 0o7777))
}

/// What is no device; then it comes to its place.
fn rest() -> io::Result<()> {
    let staging = Path::new(STAGING);
    for (name, target) in LINKS.into_iter().chain([("ptmx", "pts/ptmx")]) {
        symlink(target, staging.join(name))?;
    }
    for name in FILE_SYSTEMS {
        let mount = files::open_place(&format!("{DEV}/{name}"))?;
        let target = staging.join(name);
        fs::create_dir(&target)?;
        sys::move_mount(&mount, &target)?;
    }
    sys::mount(STAGING, DEV, "", libc::MS_MOVE, "")
}

/// Makes a terminal the box's console, as containers have it.
///
/// # Errors
/// Those of mount(2).
pub fn console(terminal: &impl AsFd) -> io::Result<()> {
    let terminal = terminal.as_fd().try_clone_to_owned()?.into();
    etc::mount_over(&terminal, Path::new("/dev/console")).map(drop)
}
