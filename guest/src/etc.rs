//! Files that are mounted over those of the image, which are the host's and stay as they are. An image without one
//! gets an empty file to mount on. Such are volumes of one file, and files of `/etc` of which the guest is to see another
//! text: those are in the initramfs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::sys;

/// Most symbolic links that are followed (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// A text, in a file of the initramfs.
pub struct Staged(File);

impl Staged {
    /// Writes the text down under this name; to be called while the initramfs is still the root.
    ///
    /// # Errors
    /// If the initramfs cannot be written to.
    pub fn new(name: &str, text: &str) -> Result<Self, String> {
        let path = Path::new("/mote").join(name);
        let file = fs::write(&path, text).and_then(|()| File::open(&path));
        let failed = |e| format!("write {} in the initramfs: {e}", path.display());
        file.map(Staged).map_err(failed)
    }

    /// Lets the guest see the text at this path.
    ///
    /// # Errors
    /// If there is no file, and none can be made; those of mount(2).
    pub fn mount_over(&self, path: &Path) -> io::Result<()> {
        mount_over(&self.0, path).map(drop)
    }
}

/// Mounts an open file over the one that the path leads to, which is made if there is none. Returns where that is.
///
/// # Errors
/// If no file can be made; those of mount(2).
pub fn mount_over(file: &File, path: &Path) -> io::Result<PathBuf> {
    let target = resolve(path)?;
    if let Err(error) = fs::symlink_metadata(&target) {
        if error.kind() != ErrorKind::NotFound {
            return Err(error);
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        OpenOptions::new().write(true).create_new(true).mode(0o644).open(&target)?;
    }
    sys::mount_file_over(file, &target)?;
    Ok(target)
}

/// Where symbolic links lead from here, whether or not anything is there.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path) {
            // An absolute link replaces all, a relative one starts from its own directory.
            Ok(link) => path = path.parent().unwrap_or(Path::new("/")).join(link),
            // Not a link, or not there.
            Err(error)
                if [ErrorKind::InvalidInput, ErrorKind::NotFound].contains(&error.kind()) =>
            {
                return Ok(path);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_to_where_nothing_is_yet() {
        let dir = std::env::temp_dir().join(format!("mote-resolv-{}", std::process::id()));
        fs::create_dir_all(dir.join("etc")).expect("directory");
        let path = dir.join("etc/resolv.conf");
        assert_eq!(resolve(&path).expect("missing"), path);
        symlink("../run/stub.conf", &path).expect("link");
        assert_eq!(resolve(&path).expect("dangling"), dir.join("etc/../run/stub.conf"));
        fs::create_dir(dir.join("run")).expect("directory");
        symlink("/elsewhere/resolv.conf", dir.join("run/stub.conf")).expect("link");
        assert_eq!(resolve(&path).expect("absolute"), Path::new("/elsewhere/resolv.conf"));
        fs::remove_file(&path).expect("removed");
        symlink("resolv.conf", &path).expect("link");
        assert_eq!(resolve(&path).expect_err("a circle").raw_os_error(), Some(libc::ELOOP));
        fs::remove_dir_all(&dir).expect("removed");
    }
}
