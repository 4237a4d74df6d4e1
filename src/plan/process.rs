//! How the entrypoint starts, as whom, and what it sees: the members of the spec that are mote's own.

use std::io;
use std::path::Path;

use mote_agent::instance::{self, Mount, TerminalSize};

use super::security::CAPABILITIES;
use crate::spec::Spec;
use crate::spec::json::Report;
use crate::spec::process::{Capabilities, GuestMount, Process};
use crate::sys::terminal::{self, DEFAULT_SIZE};

/// The option of engines by which a tmpfs gets what the image has where it is mounted.
const COPY_UP: &str = "tmpcopyup";

/// Options that a mount of `guest_mounts` with the type `bind` may have: what the guest's kernel refuses there.
pub const BIND_OPTIONS: [&str; 5] = ["ro", "nosuid", "nodev", "noexec", "nosymfollow"];
/// Longest NIS domain name (setdomainname(2)).
const MAX_DOMAINNAME: usize = 64;
/// All mode bits of permissions.
const PERMISSIONS: u32 = 0o777;

/// How the entrypoint starts. The terminal has the size of mote's own, if that has one.
pub(super) fn start(spec: &Spec) -> instance::Start {
    let start = &spec.entrypoint.start;
    let size = || terminal::terminal_size(&io::stdin()).unwrap_or(DEFAULT_SIZE);
    let terminal = start.terminal.then(size);
    instance::Start {
        stdin: start.stdin,
        terminal: terminal.map(|size| TerminalSize { cols: size.cols, rows: size.rows }),
        on_request: start.on_request,
        pid1: start.pid1,
    }
}

/// Who it runs as, if that is given exactly.
pub(super) fn plan(spec: &Spec, report: &mut Report) -> Option<instance::Process> {
    if spec.entrypoint.start.on_request && spec.exec_socket_path.as_os_str().is_empty() {
        report.error(
            "entrypoint.start",
            "is \"on-request\", but without exec_socket_path nobody can ask for the start; name a socket",
        );
    }
    let Process { uid, gid, additional_gids, umask, capabilities, no_new_privileges } =
        spec.process.as_ref()?;
    if spec.user.as_ref().is_some_and(|user| !user.is_empty()) {
        report.error("user", "is given beside process.uid; keep one");
    }
    if let Some(umask) = umask.filter(|umask| *umask > PERMISSIONS) {
        report
            .error("process.umask", format!("is {umask}, must be from 0 to {PERMISSIONS} (0777)"));
    }
    Some(instance::Process {
        uid: *uid,
        gid: *gid,
        groups: additional_gids.clone(),
        umask: *umask,
        capabilities: capabilities.as_ref().map(|sets| capability_sets(sets, report)),
        no_new_privs: *no_new_privileges,
    })
}

fn capability_sets(sets: &Capabilities, report: &mut Report) -> instance::Capabilities {
    let mut bits = |set: &str, names: &[String]| {
        names.iter().enumerate().fold(0, |bits, (index, name)| match capability(name) {
            Some(number) => bits | 1 << number,
            None => {
                report.error(
                    format!("process.capabilities.{set}[{index}]"),
                    format!("is \"{name}\", which is no capability; write it as in capabilities(7), like CAP_CHOWN"),
                );
                bits
            }
        })
    };
    instance::Capabilities {
        bounding: bits("bounding", &sets.bounding),
        effective: bits("effective", &sets.effective),
        inheritable: bits("inheritable", &sets.inheritable),
        permitted: bits("permitted", &sets.permitted),
        ambient: bits("ambient", &sets.ambient),
    }
}

/// The number of the capability with this name, `CAP_…`.
pub fn capability(name: &str) -> Option<usize> {
    let name = name.strip_prefix("CAP_")?;
    CAPABILITIES.iter().position(|known| *known == name)
}

/// What the guest mounts for the spec.
pub(super) fn mounts(spec: &Spec, report: &mut Report) -> Vec<Mount> {
    let planned = spec.guest_mounts.iter().enumerate().filter_map(|(index, mount)| {
        let field = format!("guest_mounts[{index}]");
        let (GuestMount::Tmpfs { destination, .. } | GuestMount::Bind { destination, .. }) = mount;
        check_path(&format!("{field}.destination"), destination, report);
        if Path::new(destination) == Path::new("/") {
            report.error(format!("{field}.destination"), "is the root directory; choose another");
            return None;
        }
        Some(match mount {
            GuestMount::Bind { source, options, .. } => {
                check_path(&format!("{field}.source"), source, report);
                for (number, option) in options.iter().enumerate() {
                    if !BIND_OPTIONS.contains(&option.as_str()) {
                        report.error(
                            format!("{field}.options[{number}]"),
                            format!("is \"{option}\", must be one of {}", BIND_OPTIONS.join(", ")),
                        );
                    }
                }
                let options = options.join(",");
                Mount::Bind { source: source.clone(), path: destination.clone(), options }
            }
            GuestMount::Tmpfs { options, .. } => {
                for (number, option) in options.iter().enumerate() {
                    if option.contains(',') || option.contains('\0') {
                        report.error(
                            format!("{field}.options[{number}]"),
                            format!("is \"{option}\", must be one option"),
                        );
                    }
                }
                let others: Vec<&str> = options
                    .iter()
                    .map(String::as_str)
                    .filter(|option| *option != COPY_UP)
                    .collect();
                Mount::Tmpfs {
                    path: destination.clone(),
                    options: others.join(","),
                    copy_up: others.len() < options.len(),
                }
            }
        })
    });
    planned.collect()
}

/// Checks the paths that are hidden or kept as they are, and the names of the guest.
pub(super) fn check(spec: &Spec, report: &mut Report) {
    for (field, paths) in
        [("masked_paths", &spec.masked_paths), ("readonly_paths", &spec.readonly_paths)]
    {
        for (index, path) in paths.iter().enumerate() {
            check_path(&format!("{field}[{index}]"), path, report);
        }
    }
    for (index, path) in spec.devices.iter().flatten().enumerate() {
        let name = path.strip_prefix("/dev/").unwrap_or_default();
        if name.is_empty() || name.contains("..") || name.contains('\0') {
            report.error(
                format!("devices[{index}]"),
                format!("is \"{path}\", must be a device of the guest's kernel, like /dev/fuse"),
            );
        }
    }
    if let Some(name) = spec.domainname.as_ref()
        && (name.len() > MAX_DOMAINNAME || name.contains('\0'))
    {
        let len = name.len();
        report.error(
            "domainname",
            format!("has {len} bytes, must have at most {MAX_DOMAINNAME} without NUL"),
        );
    }
    for (index, (name, value)) in spec.sysctls.iter().enumerate() {
        let is_path = name.contains("..") || name.starts_with(['/', '.']);
        if name.is_empty() || is_path || name.contains('\0') || value.contains('\0') {
            report.error(
                format!("sysctls[{index}]"),
                format!(
                    "has the name \"{name}\", must be a name of sysctl(8) like net.core.somaxconn"
                ),
            );
        }
    }
}

fn check_path(field: &str, path: &str, report: &mut Report) {
    if !path.starts_with('/') || path.contains('\0') {
        report.error(field, format!("is \"{path}\", must be an absolute path in the guest"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing::{errors, plan};

    #[test]
    fn capabilities_become_bits() {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        let process = |bounding: &[&str]| Process {
            capabilities: Some(Capabilities { bounding: names(bounding), ..Default::default() }),
            ..Process::default()
        };
        let planned = plan(|s| s.process = Some(process(&["CAP_CHOWN", "CAP_BPF"])));
        let process_of = planned.expect("a plan").instance.process.expect("a process");
        assert_eq!(process_of.capabilities.expect("sets").bounding, 1 | 1 << 39);
        let problem =
            "is \"CHOWN\", which is no capability; write it as in capabilities(7), like CAP_CHOWN";
        assert_eq!(
            errors(|s| s.process = Some(process(&["CHOWN"]))),
            [format!("process.capabilities.bounding[0]: {problem}")]
        );
    }

    #[test]
    fn mounts_have_options() {
        let mount = |destination: &str, options: &[&str]| GuestMount::Tmpfs {
            destination: destination.into(),
            options: options.iter().map(|option| option.to_string()).collect(),
        };
        let planned =
            plan(|s| s.guest_mounts = vec![mount("/t", &["size=1m", "tmpcopyup", "nosuid"])]);
        let expected =
            Mount::Tmpfs { path: "/t".into(), options: "size=1m,nosuid".into(), copy_up: true };
        assert!(planned.expect("a plan").instance.mounts.contains(&expected));
        assert_eq!(
            errors(|s| s.guest_mounts = vec![mount("t", &["a,b"])]),
            [
                "guest_mounts[0].destination: is \"t\", must be an absolute path in the guest",
                "guest_mounts[0].options[0]: is \"a,b\", must be one option",
            ]
        );
    }

    #[test]
    fn a_bind_has_a_source() {
        let bind = |source: &str, options: &[&str]| GuestMount::Bind {
            source: source.into(),
            destination: "/dev/log".into(),
            options: options.iter().map(|option| option.to_string()).collect(),
        };
        let planned = plan(|s| s.guest_mounts = vec![bind("/dev/log", &["ro", "noexec"])]);
        let expected = Mount::Bind {
            source: "/dev/log".into(),
            path: "/dev/log".into(),
            options: "ro,noexec".into(),
        };
        assert!(planned.expect("a plan").instance.mounts.contains(&expected));
        assert_eq!(
            errors(|s| s.guest_mounts = vec![bind("x", &["size=1m"])]),
            [
                "guest_mounts[0].source: is \"x\", must be an absolute path in the guest",
                "guest_mounts[0].options[0]: is \"size=1m\", must be one of ro, nosuid, nodev, noexec, nosymfollow"
            ]
        );
    }

    #[test]
    fn a_start_on_request_needs_somebody_to_ask() {
        let errors = errors(|s| s.entrypoint.start.on_request = true);
        assert!(errors[0].starts_with("entrypoint.start: is \"on-request\""), "{errors:?}");
        assert!(
            plan(|s| {
                s.entrypoint.start.on_request = true;
                s.exec_socket_path = "/tmp/exec.sock".into();
            })
            .is_ok()
        );
    }
}
