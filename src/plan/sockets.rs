//! The Unix sockets of the host whose clients are connected to the guest.

use std::path::PathBuf;

use mote_agent::protocol::{EXEC_SERVER_PORT, PTY_SERVER_PORT};

use super::paths::socket_problem;
use crate::spec::Spec;
use crate::spec::json::Report;

/// Guest vsock ports of the box services (contract §3).
const EXEC_PORT: u32 = 4089;
const PTY_PORT: u32 = 4090;
const ATTEST_PORT: u32 = 4091;

/// A Unix socket whose connections go to a port of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSocket {
    /// Where mote listens.
    pub path: PathBuf,
    /// Guest vsock port of the contract, on which an agent of the image itself may listen.
    pub guest_port: u32,
    /// Guest vsock port of mote's own agent, used when nobody listens on the first.
    pub fallback_port: Option<u32>,
}

/// The sockets that the spec has a path for.
pub(super) fn plan(spec: &Spec, report: &mut Report) -> Vec<HostSocket> {
    let mut sockets: Vec<HostSocket> = Vec::new();
    for (field, path, guest_port, fallback_port) in [
        ("exec_socket_path", &spec.exec_socket_path, EXEC_PORT, Some(EXEC_SERVER_PORT)),
        ("pty_socket_path", &spec.pty_socket_path, PTY_PORT, Some(PTY_SERVER_PORT)),
        ("attest_socket_path", &spec.attest_socket_path, ATTEST_PORT, None),
    ] {
        if path.as_os_str().is_empty() {
            continue;
        }
        if let Some(problem) = socket_problem(path) {
            report.error(field, problem);
        } else if sockets.iter().any(|socket| socket.path == *path) {
            report.error(
                field,
                format!("{} is another socket's path too; give each its own", path.display()),
            );
        } else {
            sockets.push(HostSocket { path: path.clone(), guest_port, fallback_port });
        }
    }
    sockets
}

#[cfg(test)]
mod tests {
    use crate::plan::testing::errors;

    #[test]
    fn socket_and_console_paths_are_checked() {
        let long = format!("/tmp/{}", "s".repeat(103));
        for (change, expected) in [
            (long.as_str(), "exec_socket_path: has 108 bytes"),
            ("/etc/passwd", "exec_socket_path: /etc/passwd exists and is not a socket"),
            ("/no/such/s", "exec_socket_path: its directory /no/such does not exist"),
        ] {
            let errors = errors(|s| s.exec_socket_path = change.into());
            assert!(errors[0].starts_with(expected), "{errors:?}");
        }
        let errors = errors(|s| {
            s.exec_socket_path = "/tmp/s".into();
            s.pty_socket_path = "/tmp/s".into();
            s.console_output = Some("/no/such/console".into());
        });
        assert!(errors[0].starts_with("pty_socket_path: /tmp/s is another socket's"), "{errors:?}");
        assert!(errors[1].starts_with("console_output: its directory /no/such"), "{errors:?}");
    }
}
