//! What the box's passt publishes by itself: the runtime of today has it do so, and says the same ports to mote.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use mote_agent::flow::Protocol;

use crate::plan::PublishedPort;

/// Whether the passt of this socket was told, in its arguments, to publish this port. Asked only when somebody has the
/// port. Another user of the host can have taken it and pose as a passt, which the warning then names.
pub fn publishes(socket: &Path, port: &PublishedPort) -> bool {
    let Ok(processes) = fs::read_dir("/proc") else { return false };
    processes.flatten().any(|process| {
        // Not a process, or gone already.
        let arguments = fs::read(process.path().join("cmdline")).unwrap_or_default();
        is_told_to_publish(&arguments, socket, port)
    })
}

/// The same of a process with these arguments, each ended by a NUL (proc(5)).
fn is_told_to_publish(arguments: &[u8], socket: &Path, port: &PublishedPort) -> bool {
    let words: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
    let is_passt = Path::new(OsStr::from_bytes(words[0]))
        .file_name()
        .is_some_and(|name| name.as_bytes().starts_with(b"passt"));
    // passt(1): an option's value is the next word, or follows a `=`.
    let has = |names: [&str; 2], is: &dyn Fn(&[u8]) -> bool| {
        let pairs = words.iter().zip(words.iter().skip(1));
        let next = pairs.filter(|(name, _)| names.iter().any(|n| n.as_bytes() == **name));
        let joined = words.iter().filter_map(|word| {
            word.strip_prefix(names[0].as_bytes()).and_then(|rest| rest.strip_prefix(b"="))
        });
        next.map(|(_, value)| *value).chain(joined).any(is)
    };
    let ports = match port.protocol {
        Protocol::Tcp => ["--tcp-ports", "-t"],
        Protocol::Udp => ["--udp-ports", "-u"],
    };
    let (pair, single) = (format!("{}:{}", port.host, port.guest), port.host.to_string());
    let names_port = |entry: &[u8]| {
        entry == pair.as_bytes() || (port.host == port.guest && entry == single.as_bytes())
    };
    is_passt
        && has(["--socket", "-s"], &|value| value == socket.as_os_str().as_bytes())
        && has(ports, &|value| value.split(|byte| *byte == b',').any(names_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_say_what_passt_publishes() {
        let says = |arguments: &str, protocol, host, guest| {
            let arguments = arguments.replace(' ', "\0");
            let port = PublishedPort { protocol, host, guest };
            is_told_to_publish(arguments.as_bytes(), Path::new("/run/s"), &port)
        };
        use Protocol::{Tcp, Udp};
        let passt = "/usr/bin/passt --socket /run/s --tcp-ports 8080:80,443 --udp-ports=53:5353 ";
        assert!(says(passt, Tcp, 8080, 80) && says(passt, Tcp, 443, 443));
        assert!(says(passt, Udp, 53, 5353) && says("passt.avx2 -t 1:2 -s /run/s ", Tcp, 1, 2));
        for (protocol, host, guest) in
            [(Udp, 8080, 80), (Tcp, 80, 80), (Tcp, 808, 80), (Tcp, 8080, 8), (Tcp, 443, 44)]
        {
            assert!(!says(passt, protocol, host, guest), "{protocol:?} {host}:{guest}");
        }
        for other in ["sleep -s /run/s -t 1:2 ", "passt -s /run/t -t 1:2 ", "passt -t 1:2 ", ""] {
            assert!(!says(other, Tcp, 1, 2), "{other}");
        }
    }
}
