//! Devices: a box has those of its own kernel, of which a container gets the standard ones and what it asks for, and none of
//! the host's. Engines ask for them by `linux.devices`; in a user namespace, where nobody can make a device file, by binding
//! the host's.

use crate::spec::json::Node;

/// How many devices an engine asks for because it asks for all of them.
const MANY: usize = 20;

/// Devices that every container has (runtime specification, "Default Devices").
const STANDARD: [&str; 8] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/console",
    "/dev/ptmx",
];

/// Devices that stand for nothing of the host: the guest's do the same.
const OF_ANY_KERNEL: [&str; 2] = ["/dev/fuse", "/dev/net/tun"];

/// What a container has of its guest's devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Devices {
    /// All of them.
    All,
    /// The standard ones, and these.
    Standard(Vec<String>),
}

impl Default for Devices {
    fn default() -> Self {
        Devices::Standard(Vec::new())
    }
}

impl Devices {
    /// Both.
    pub fn and(self, other: Devices) -> Devices {
        match (self, other) {
            (Devices::Standard(these), Devices::Standard(those)) => {
                Devices::Standard([these, those].concat())
            }
            _ => Devices::All,
        }
    }
}

/// Judges the devices that a list asks for, by the item of each and its path: an error for each that no box has, unless
/// they are all of the host's (`--privileged`), which nobody has chosen.
pub fn judge(list: &Node<'_>, devices: &[(Node<'_>, String)]) -> Devices {
    if devices.len() > MANY {
        list.warn("asks for all of the host's devices: a box gets all of its own kernel's");
        return Devices::All;
    }
    let (own, others): (Vec<_>, Vec<_>) = devices
        .iter()
        .filter(|(_, path)| !STANDARD.contains(&path.as_str()))
        .partition(|(_, path)| OF_ANY_KERNEL.contains(&path.as_str()));
    for (item, path) in others {
        item.error(format!(
            "{path} is a device of the host, and a box has those of its own kernel alone; leave it out"
        ));
    }
    Devices::Standard(own.into_iter().map(|(_, path)| path.clone()).collect())
}
