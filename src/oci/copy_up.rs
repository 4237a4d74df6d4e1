//! Gives a tmpfs what an image has where it is mounted (`tmpcopyup`).
//!
//! An image is hostile: no link in it is followed, and nothing in it is opened but directories and regular files.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use anyhow::Result;

use crate::sys::mounts;

/// How deep directories are that are copied: deeper ones are empty.
const MAX_DEPTH: usize = 64;

/// Copies what is in a directory: directories, files and links, with owners and modes. Nothing else of an image is
/// of use in a tmpfs. How much it is, is limited by the size of the tmpfs.
///
/// # Errors
/// Something cannot be read, or does not fit.
pub fn copy(from: &File, to: &(impl AsFd + AsRawFd)) -> Result<()> {
    copy_level(from, to, 0)
}

fn copy_level(from: &File, to: &(impl AsFd + AsRawFd), depth: usize) -> Result<()> {
    if depth >= MAX_DEPTH {
        return Ok(());
    }
    for entry in fs::read_dir(own_path(from))? {
        let name = entry?.file_name();
        let c_name = CString::new(name.as_bytes())?;
        let found = mounts::look_up(from, &c_name)?;
        let metadata = found.metadata()?;
        let target = own_path(to).join(&name);
        if metadata.is_dir() {
            mounts::make_directory(to, &c_name)?;
            let made = mounts::look_up(to, &c_name)?;
            copy_level(&found, &made, depth + 1)?;
            give(&made, &metadata)?;
        } else if metadata.is_file() {
            let mut reader = File::open(own_path(&found))?;
            let mut writer = File::options().write(true).create_new(true).open(&target)?;
            io::copy(&mut reader, &mut writer)?;
            give(&writer, &metadata)?;
        } else if metadata.is_symlink() {
            symlink(mounts::read_link(&found)?, &target)?;
            std::os::unix::fs::lchown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
        }
    }
    Ok(())
}

/// A path by which this process itself gets at what it holds open.
fn own_path(file: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Gives a file owner and mode of another.
///
/// # Errors
/// Those of chown(2) and chmod(2).
pub fn give(file: &impl AsRawFd, metadata: &fs::Metadata) -> io::Result<()> {
    let path = own_path(file);
    std::os::unix::fs::chown(&path, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(metadata.mode() & 0o7777))
}
