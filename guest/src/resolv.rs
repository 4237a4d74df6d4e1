//! `/etc/resolv.conf`. If the guest is to see another text than the image's, a file of the initramfs is
//! mounted over the image's, which is the host's and stays as it is. An image without one gets an empty
//! file to mount on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mote_agent::instance::ResolvConf;

use crate::sys;

const PATH: &str = "/etc/resolv.conf";
/// Where the text is kept, in the initramfs.
const STAGED: &str = "/mote/resolv.conf";
/// Most of an image's file that is looked at.
const MAX_LEN: u64 = 64 * 1024;
/// Most symbolic links that are followed (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// The text that the guest is to see, and a file in the initramfs that has it.
pub struct NameServers<'a> {
    wanted: &'a ResolvConf,
    file: File,
}

impl<'a> NameServers<'a> {
    /// Writes the text down; to be called while the initramfs is still the root.
    ///
    /// # Errors
    /// If the initramfs cannot be written to.
    pub fn stage(wanted: &'a ResolvConf) -> Result<Self, String> {
        let (ResolvConf::Always(text) | ResolvConf::IfUnserved(text)) = wanted;
        let file = fs::write(STAGED, text).and_then(|()| File::open(STAGED));
        let file = file.map_err(|e| format!("write {STAGED} in the initramfs: {e}"))?;
        Ok(NameServers { wanted, file })
    }

    /// Lets the guest see the text, if it shall. Returns what it sees.
    ///
    /// # Errors
    /// If a text that the guest must see cannot be put in place.
    pub fn provide(self) -> Result<String, String> {
        let path = Path::new(PATH);
        match self.wanted {
            ResolvConf::Always(text) => mount_over(&self.file, path)
                .map(|()| text.clone())
                .map_err(|e| format!("replace {PATH} (network): {e}")),
            ResolvConf::IfUnserved(text) => {
                let of_image = read(path);
                if names_server(&of_image) {
                    return Ok(of_image);
                }
                if let Err(error) = mount_over(&self.file, path) {
                    // A box that asks for no network may well do without names.
                    let mut stderr = io::stderr();
                    let _ = writeln!(
                        stderr,
                        "mote-agent: {PATH} names no server, and cannot be replaced: {error}"
                    );
                    return Ok(of_image);
                }
                Ok(text.clone())
            }
        }
    }
}

fn mount_over(staged: &File, path: &Path) -> io::Result<()> {
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
    sys::mount_file_over(staged, &target)
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

/// The image's file. One that cannot be read is empty.
fn read(path: &Path) -> String {
    let mut text = Vec::new();
    // An image may have a pipe here, and nobody who writes to it.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let _ = file.and_then(|file| file.take(MAX_LEN).read_to_end(&mut text));
    String::from_utf8_lossy(&text).into_owned()
}

/// Whether a resolv.conf(5) names a server.
fn names_server(text: &str) -> bool {
    text.lines().any(|line| {
        let rest = line.strip_prefix("nameserver").unwrap_or("");
        rest.starts_with([' ', '\t']) && !rest.trim().is_empty()
    })
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

    #[test]
    fn a_text_names_a_server_or_not() {
        for (text, expected) in [
            ("search x\nnameserver 1.1.1.1\n", true),
            ("nameserver\t::1", true),
            ("", false),
            ("#nameserver 1.1.1.1\nnameserver\nnameservers 1.1.1.1\n", false),
        ] {
            assert_eq!(names_server(text), expected, "{text:?}");
        }
        assert_eq!(read(Path::new("/no/such/file")), "");
    }
}
