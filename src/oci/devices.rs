//! Devices of the host, of which a box gets none. Engines ask for them by `linux.devices`; in a user namespace, where
//! nobody can make a device file, by binding the host's.

use crate::spec::json::Node;

/// How many devices an engine asks for because it asks for all of them.
const MANY: usize = 20;

/// Devices that every box has (runtime specification, "Default Devices").
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

/// Judges the devices that a list asks for, by the item of each and its path: an error for each that no box has, unless
/// they are all of the host's (`--privileged`), which nobody has chosen.
pub fn judge(list: &Node<'_>, devices: &[(Node<'_>, String)]) {
    if devices.len() > MANY {
        list.warn("asks for all of the host's devices, of which a box gets none");
        return;
    }
    for (item, path) in devices.iter().filter(|(_, path)| !STANDARD.contains(&path.as_str())) {
        item.error(format!(
            "{path} is a device of the host, and a box has those of its own kernel alone; leave it out"
        ));
    }
}
