//! `/etc/resolv.conf`.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mote_agent::instance::ResolvConf;

use crate::etc::Staged;

const PATH: &str = "/etc/resolv.conf";
/// Most of an image's file that is looked at.
const MAX_LEN: u64 = 64 * 1024;

/// The text that the guest is to see.
pub struct NameServers<'a> {
    wanted: &'a ResolvConf,
    staged: Staged,
}

impl<'a> NameServers<'a> {
    /// Writes the text down; to be called while the initramfs is still the root.
    ///
    /// # Errors
    /// If the initramfs cannot be written to.
    pub fn stage(wanted: &'a ResolvConf) -> Result<Self, String> {
        let text = match wanted {
            ResolvConf::Always(text) | ResolvConf::IfUnserved(text) => text.as_str(),
            ResolvConf::OfImage => "",
        };
        Ok(NameServers { wanted, staged: Staged::new("resolv.conf", text)? })
    }

    /// Lets the guest see the text, if it shall. Returns what it sees.
    ///
    /// # Errors
    /// If a text that the guest must see cannot be put in place.
    pub fn provide(self) -> Result<String, String> {
        let path = Path::new(PATH);
        match self.wanted {
            ResolvConf::OfImage => Ok(read(path)),
            ResolvConf::Always(text) => self
                .staged
                .mount_over(path)
                .map(|()| text.clone())
                .map_err(|e| format!("replace {PATH}: {e}")),
            ResolvConf::IfUnserved(text) => {
                let of_image = read(path);
                if names_server(&of_image) {
                    return Ok(of_image);
                }
                if let Err(error) = self.staged.mount_over(path) {
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

/// The image's file. One that cannot be read is empty. Many images have an empty one, or none, which is known without opening it.
fn read(path: &Path) -> String {
    let mut text = Vec::new();
    if fs::metadata(path).is_ok_and(|file| file.len() > 0) {
        // An image may have a pipe here, and nobody who writes to it.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let _ = file.and_then(|file| file.take(MAX_LEN).read_to_end(&mut text));
    }
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
