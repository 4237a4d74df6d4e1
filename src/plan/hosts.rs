//! The box's `/etc/hosts` (hosts(5)).

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use crate::sys;

const PATH: &str = "etc/hosts";
/// Most of an image's file that is looked at.
const MAX_LEN: u64 = 64 * 1024;
const LOCALHOST: &str = "localhost";
/// Address of a host name that has no network of its own to be on (Debian Policy, and hosts(5)).
const OF_HOST_NAME: Ipv4Addr = Ipv4Addr::new(127, 0, 1, 1);

/// The text that the guest is to see: the one that is given, or else the image's, with `localhost` and the box's own
/// host name, if that is left out. Distroless images have no file, and exported containers an empty one. `None` if the
/// image's is right as it is. `own` is the box's address on a network of its own.
pub(super) fn plan(
    given: Option<String>,
    rootfs: &Path,
    hostname: &str,
    own: Option<Ipv4Addr>,
) -> Option<String> {
    let is_given = given.is_some();
    let text = given.unwrap_or_else(|| {
        let of_image = sys::read_below(rootfs, Path::new(PATH), MAX_LEN).unwrap_or_default();
        String::from_utf8_lossy(&of_image).into_owned()
    });
    let mut missing = String::new();
    if !has_name(&text, LOCALHOST) {
        missing += "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
    }
    if hostname != LOCALHOST && is_name(hostname) && !has_name(&text, hostname) {
        missing += &format!("{}\t{hostname}\n", own.unwrap_or(OF_HOST_NAME));
    }
    if missing.is_empty() {
        return Some(text).filter(|_| is_given);
    }
    let line_end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    Some(format!("{text}{line_end}{missing}"))
}

/// Whether the text has an address for a name.
fn has_name(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        let mut words = line.split('#').next().unwrap_or("").split_whitespace();
        words.next().is_some_and(|word| word.parse::<IpAddr>().is_ok())
            && words.any(|word| word.eq_ignore_ascii_case(name))
    })
}

/// Whether this can stand in the file: a host name may have any bytes.
fn is_name(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_an_image_leaves_out_is_added() {
        let root = std::env::temp_dir().join(format!("mote-hosts-{}", std::process::id()));
        fs::create_dir_all(root.join("etc")).expect("directory");
        let of_localhost = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
        let own = Some(Ipv4Addr::new(10, 88, 0, 2));
        let plan = |hostname: &str, own| super::plan(None, &root, hostname, own);
        assert_eq!(plan("localhost", None).as_deref(), Some(of_localhost));
        let expected = format!("{of_localhost}127.0.1.1\tbox-1\n");
        assert_eq!(plan("box-1", None), Some(expected));
        // Nobody can write lines of the file by a host name.
        assert_eq!(plan("a\n192.0.2.1 b", None).as_deref(), Some(of_localhost));

        fs::write(root.join("etc/hosts"), "#127.0.0.1 box\n127.0.0.1 LocalHost").expect("file");
        assert_eq!(plan("localhost", None), None);
        let expected = "#127.0.0.1 box\n127.0.0.1 LocalHost\n10.88.0.2\tbox\n";
        assert_eq!(plan("box", own).as_deref(), Some(expected));
        // A link leads to where it does inside, and a pipe is not waited for.
        fs::rename(root.join("etc/hosts"), root.join("hosts")).expect("renamed");
        std::os::unix::fs::symlink("/hosts", root.join("etc/hosts")).expect("link");
        assert_eq!(plan("localhost", None), None);
        fs::remove_file(root.join("hosts")).expect("removed");
        std::process::Command::new("mkfifo").arg(root.join("hosts")).status().expect("mkfifo");
        assert_eq!(plan("localhost", None).as_deref(), Some(of_localhost));
        fs::remove_dir_all(&root).expect("removed");
    }
}
