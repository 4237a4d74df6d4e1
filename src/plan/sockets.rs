//! The Unix sockets of the host whose clients are connected to the guest.

use std::path::PathBuf;

use mote_agent::protocol::{ATTEST_SERVER_PORT, EXEC_SERVER_PORT, PTY_SERVER_PORT};

use super::guest_init;
use super::paths::socket_problem;
use crate::spec::json::Report;
use crate::spec::{GuestAgent, Spec};

/// Guest vsock ports of the box services (contract §3), where an agent of the image's own listens.
const EXEC_PORT: u32 = 4089;
const PTY_PORT: u32 = 4090;
const ATTEST_PORT: u32 = 4091;
const PORT_FORWARD_PORT: u32 = 4093;

/// A Unix socket whose connections go to a port of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSocket {
    /// Where mote listens.
    pub path: PathBuf,
    /// Guest vsock port to connect clients to; `None` closes them at once.
    pub guest_port: Option<u32>,
    /// Guest vsock port to try when nobody listens on the first.
    pub fallback_port: Option<u32>,
}

/// The sockets that the spec has a path for. Any program in the box can listen on the contract's ports, and
/// would be sent commands, uploads and keystrokes that are meant for root: they are asked only where that
/// program is the image's own guest init, or the spec says so. mote's agent has ports of its own, which it
/// holds before any other program runs. It does not answer for a guest init that is yet to listen: its answer would
/// tell the runtime that the box is ready. `attests` says whether it has an attestation server.
pub(super) fn plan(spec: &Spec, attests: bool, report: &mut Report) -> Vec<HostSocket> {
    let init_is_images = guest_init::is_of_image(spec);
    let images = spec.guest_agent == GuestAgent::Image || init_is_images;
    let attest_port = attests.then_some(ATTEST_SERVER_PORT);
    let mut sockets: Vec<HostSocket> = Vec::new();
    for (field, path, images_port, own_port) in [
        ("exec_socket_path", &spec.exec_socket_path, EXEC_PORT, Some(EXEC_SERVER_PORT)),
        ("pty_socket_path", &spec.pty_socket_path, PTY_PORT, Some(PTY_SERVER_PORT)),
        ("attest_socket_path", &spec.attest_socket_path, ATTEST_PORT, attest_port),
        ("port_forward_socket_path", &spec.port_forward_socket_path, PORT_FORWARD_PORT, None),
    ] {
        let (guest_port, fallback_port) = match images {
            true => (Some(images_port), own_port.filter(|_| !init_is_images)),
            false => (own_port, None),
        };
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
    use super::*;
    use crate::plan::testing::{errors, plan};

    #[test]
    fn only_an_agent_of_the_images_own_gets_the_contracts_ports() {
        let ports = |change: fn(&mut Spec)| {
            let plan = plan(|s| {
                s.exec_socket_path = "/tmp/exec".into();
                s.attest_socket_path = "/tmp/attest".into();
                change(s);
            });
            let sockets = plan.expect("a plan").sockets;
            sockets.into_iter().map(|s| (s.guest_port, s.fallback_port)).collect::<Vec<_>>()
        };
        let own = [(Some(EXEC_SERVER_PORT), None), (None, None)];
        let images = [(Some(EXEC_PORT), Some(EXEC_SERVER_PORT)), (Some(ATTEST_PORT), None)];
        let inits = [(Some(EXEC_PORT), None), (Some(ATTEST_PORT), None)];
        let attesting = |ports: [(_, _); 2], attest| [ports[0], attest];
        fn init(spec: &mut Spec, executable: &str, variable: &str) {
            spec.entrypoint.executable = executable.into();
            spec.entrypoint.env = vec![(variable.into(), "sleep".into())];
        }
        assert_eq!(ports(|_| ()), own);
        assert_eq!(ports(|s| s.guest_agent = GuestAgent::Image), images);
        assert_eq!(ports(|s| init(s, "/bin/sh", "BOX_EXEC_EXEC")), inits);
        assert_eq!(ports(|s| init(s, "/bin/sh", "BOX_EXEC_CONFIG_FILE")), inits);
        assert_eq!(ports(|s| init(s, "/bin/sh", "BOX_BOOT_CONFIG_FILE")), inits);
        assert_eq!(ports(|s| init(s, "/no/such/init", "BOX_EXEC_EXEC")), own);
        fn asking(spec: &mut Spec) {
            spec.entrypoint.env.push(("A3S_TEE_SIMULATE".into(), "1".into()));
        }
        assert_eq!(ports(asking), attesting(own, (Some(ATTEST_SERVER_PORT), None)));
        let either = (Some(ATTEST_PORT), Some(ATTEST_SERVER_PORT));
        let image = |s: &mut Spec| {
            s.guest_agent = GuestAgent::Image;
            asking(s);
        };
        assert_eq!(ports(image), attesting(images, either));
        let with_init = |s: &mut Spec| {
            init(s, "/bin/sh", "BOX_EXEC_EXEC");
            asking(s);
        };
        assert_eq!(ports(with_init), inits);
    }

    #[test]
    fn ports_are_forwarded_by_the_images_init_alone() {
        let port = |executable: &str| {
            let plan = plan(|s| {
                s.port_forward_socket_path = "/tmp/forward".into();
                s.entrypoint.executable = executable.into();
                s.entrypoint.env = vec![("BOX_EXEC_EXEC".into(), "sleep".into())];
            });
            plan.expect("a plan").sockets[0].guest_port
        };
        assert_eq!(port("/bin/sh"), Some(PORT_FORWARD_PORT));
        assert_eq!(port("/no/such/init"), None);
        let errors = errors(|s| {
            s.exec_socket_path = "/tmp/s".into();
            s.port_forward_socket_path = "/tmp/s".into();
        });
        assert!(errors[0].starts_with("port_forward_socket_path: /tmp/s is another socket's"));
    }

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
