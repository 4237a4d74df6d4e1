//! The spec's `network.bridge_socket_dir`, checked: where the boxes of one network exchange frames (contract
//! §2.13).

use std::fs;
use std::path::{Path, PathBuf};

use super::paths::MAX_SOCKET_PATH;
use crate::spec;
use crate::spec::json::Report;
use crate::virtio::net::peers::{Mac, Subnet};

/// Where the box meets the others of its network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    /// The directory of all boxes' sockets. It may not exist yet.
    pub directory: PathBuf,
    /// The box's own socket in it.
    pub socket: PathBuf,
    /// The box's Ethernet address.
    pub mac: Mac,
    /// The box's subnet.
    pub subnet: Subnet,
}

/// The name of the socket at which the box with this Ethernet address takes frames.
pub fn socket_name(mac: Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}-{b:02x}-{c:02x}-{d:02x}-{e:02x}-{f:02x}.sock")
}

/// Whose [socket](socket_name) has this name; `None` if it is no such name.
pub fn owner(name: &[u8]) -> Option<Mac> {
    let text = std::str::from_utf8(name).ok()?;
    let mut mac = Mac::default();
    let mut parts = text.strip_suffix(".sock")?.split('-');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    // The other way round too: "+1" is a number, and so is "1", but neither is part of a name.
    (socket_name(mac) == text).then_some(mac)
}

/// The switch of this network, if it has one, and if it can work.
pub(super) fn plan(network: &spec::Network, report: &mut Report) -> Option<Switch> {
    let directory = network.bridge_socket_dir.as_ref()?;
    let mac = network.mac_address;
    let socket = directory.join(socket_name(mac));
    if let Some(problem) = problem(directory, &socket) {
        report.error("network.bridge_socket_dir", problem);
        return None;
    }
    let of_passt = [&[network.gateway][..], &network.dns_servers].concat();
    let subnet = Subnet { address: network.ip_address, prefix_len: network.prefix_len, of_passt };
    Some(Switch { directory: directory.clone(), socket, mac, subnet })
}

fn problem(directory: &Path, socket: &Path) -> Option<String> {
    let (shown, len) = (directory.display(), socket.as_os_str().len());
    if directory.as_os_str().is_empty() {
        return Some("is empty, must be a host directory".into());
    }
    if len > MAX_SOCKET_PATH {
        return Some(format!(
            "{shown} makes the box's socket in it a path of {len} bytes, a Unix socket's can have {MAX_SOCKET_PATH}; use a shorter directory"
        ));
    }
    match fs::metadata(directory) {
        Ok(found) if !found.is_dir() => Some(format!("{shown} is not a directory; name one")),
        // If it is not there, it is made.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_addresses_and_nothing_else() {
        let mac = [2, 0x42, 10, 0xff, 0, 3];
        assert_eq!(socket_name(mac), "02-42-0a-ff-00-03.sock");
        assert_eq!(owner(b"02-42-0a-ff-00-03.sock"), Some(mac));
        for other in [
            "",
            ".sock",
            "02-42-0a-ff-00.sock",
            "02-42-0a-ff-00-03-04.sock",
            "2-42-0a-ff-00-03.sock",
            "+2-42-0a-ff-00-03.sock",
            "02-42-0A-FF-00-03.sock",
            "02-42-0a-ff-00-03",
            "../02-42-0a-ff-00-03.sock",
        ] {
            assert_eq!(owner(other.as_bytes()), None, "{other}");
        }
    }
}
