//! Starting the entrypoint: user, limits, working directory, environment, standard streams, and a
//! reason a person can act on when it cannot be started.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use mote_agent::instance::{DEFAULT_PATH, Entrypoint, Instance};
use mote_agent::protocol::EntrypointEnd;

use crate::sys::{self, SpawnError, Step};
use crate::user;

/// Exit codes of an entrypoint that never ran (design §5).
const SETUP_FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// The running entrypoint, with the reading ends of its output.
#[derive(Debug)]
pub struct Workload {
    /// Its process id.
    pub pid: i32,
    /// What it writes to standard output; non-blocking.
    pub stdout: File,
    /// What it writes to standard error; non-blocking.
    pub stderr: File,
}

/// Starts the entrypoint.
///
/// # Errors
/// The `NotStarted` that the host should report.
pub fn start(instance: &Instance) -> Result<Workload, EntrypointEnd> {
    let setup = |reason: String| EntrypointEnd::NotStarted { code: SETUP_FAILED, reason };
    let io = |doing: &'static str| move |e: io::Error| setup(format!("{doing}: {e}"));

    let identity =
        user::resolve(instance.user.as_deref()).map_err(|e| setup(format!("user: {e}")))?;
    let stdin = File::open("/dev/null").map_err(io("open /dev/null for the entrypoint's input"))?;
    let (stdout, stdout_end) = sys::pipe().map_err(io("create the pipe for standard output"))?;
    let (stderr, stderr_end) = sys::pipe().map_err(io("create the pipe for standard error"))?;
    for end in [&stdout_end, &stderr_end] {
        sys::change_owner(end, identity.uid, identity.gid)
            .map_err(io("give the output pipes to the user"))?;
    }

    let entrypoint = &instance.entrypoint;
    let candidates = candidates(entrypoint);
    let strings = |texts: Vec<String>| -> Result<Vec<CString>, EntrypointEnd> {
        texts.iter().map(sys::c_string).collect::<io::Result<_>>().map_err(io("entrypoint strings"))
    };
    let argv = [&entrypoint.executable].into_iter().chain(&entrypoint.args).cloned().collect();
    let pid = sys::spawn(&sys::Spawn {
        candidates: &strings(candidates.clone())?,
        argv: &strings(argv)?,
        envp: &strings(environment(entrypoint))?,
        workdir: &sys::c_string(&instance.workdir).map_err(io("workdir"))?,
        rlimits: &instance.rlimits,
        uid: identity.uid,
        gid: identity.gid,
        groups: &identity.groups,
        stdio: [stdin.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()],
    })
    .map_err(|error| explain(instance, &candidates, error))?;
    Ok(Workload { pid, stdout, stderr })
}

fn path(entrypoint: &Entrypoint) -> &str {
    let last = entrypoint.env.iter().rev().find(|(name, _)| name == "PATH");
    last.map_or(DEFAULT_PATH, |(_, value)| value)
}

/// The files that `executable` can mean, in order.
fn candidates(entrypoint: &Entrypoint) -> Vec<String> {
    let name = &entrypoint.executable;
    if name.contains('/') {
        return vec![name.clone()];
    }
    path(entrypoint)
        .split(':')
        .map(|dir| if dir.is_empty() { format!("./{name}") } else { format!("{dir}/{name}") })
        .collect()
}

/// `NAME=value` strings, each name once with its last value, in order of first appearance.
fn environment(entrypoint: &Entrypoint) -> Vec<String> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in &entrypoint.env {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let last = |name: &str| entrypoint.env.iter().rev().find(|(n, _)| n == name);
    names.into_iter().filter_map(last).map(|(name, value)| format!("{name}={value}")).collect()
}

fn explain(instance: &Instance, candidates: &[String], failure: SpawnError) -> EntrypointEnd {
    let SpawnError { step, at, error } = failure;
    let name = &instance.entrypoint.executable;
    let setup = |reason| EntrypointEnd::NotStarted { code: SETUP_FAILED, reason };
    match step {
        Step::Fork => setup(format!("start a process for the entrypoint: {error}")),
        Step::Workdir => setup(format!(
            "workdir: enter '{}' in the guest: {error}; name a directory of the root file system",
            instance.workdir
        )),
        Step::Rlimit => {
            let number = instance.rlimits.get(at).map_or(0, |limit| limit.resource);
            setup(format!("resource_limits: set resource limit {number}: {error}"))
        }
        Step::User => setup(format!("user: switch to the entrypoint's user: {error}")),
        Step::Exec => {
            let file = candidates.get(at).unwrap_or(name);
            let found = candidates.iter().find(|c| Path::new(c).symlink_metadata().is_ok());
            match (error.raw_os_error(), found) {
                (Some(libc::ENOENT | libc::ENOTDIR), None) if name.contains('/') => {
                    EntrypointEnd::NotStarted {
                        code: NOT_FOUND,
                        reason: format!("entrypoint: '{name}' is not in the root file system"),
                    }
                }
                (Some(libc::ENOENT | libc::ENOTDIR), None) => EntrypointEnd::NotStarted {
                    code: NOT_FOUND,
                    reason: format!(
                        "entrypoint: '{name}' is in no directory of PATH ({})",
                        path(&instance.entrypoint)
                    ),
                },
                (errno, found) => {
                    let file =
                        if errno == Some(libc::ENOENT) { found.unwrap_or(file) } else { file };
                    EntrypointEnd::NotStarted {
                        code: NOT_EXECUTABLE,
                        reason: format!("entrypoint: '{file}' {}", defect(Path::new(file), &error)),
                    }
                }
            }
        }
    }
}

/// Why a file that is there cannot be executed.
fn defect(file: &Path, error: &io::Error) -> String {
    let Ok(metadata) = fs::metadata(file) else {
        return "is a symbolic link to something that is not there".into();
    };
    if metadata.is_dir() {
        return "is a directory".into();
    }
    if error.raw_os_error() == Some(libc::EACCES) {
        return "may not be executed by this user (chmod +x it, and check the directories above)"
            .into();
    }
    let mut head = Vec::new();
    let _ = File::open(file).and_then(|f| f.take(4096).read_to_end(&mut head));
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|&b| b == b'\n').next().unwrap_or(line).trim_ascii();
        let interpreter = line.split(u8::is_ascii_whitespace).next().unwrap_or(line);
        return match interpreter {
            b"" => "is a script whose #! line names no interpreter".into(),
            _ => format!(
                "is a script whose interpreter '{}' cannot be run: {error}",
                Path::new(std::ffi::OsStr::from_bytes(interpreter)).display()
            ),
        };
    }
    match (elf_machine(&head), error.raw_os_error()) {
        (Some(62), Some(libc::ENOENT)) => {
            "needs a dynamic loader that is not in the root file system".into()
        }
        (Some(62), _) => format!("is an x86-64 program that cannot be started: {error}"),
        (Some(machine), _) => {
            format!("is a program for {}, and this VM is x86-64", machine_name(machine))
        }
        (None, Some(libc::ENOEXEC)) => {
            "is neither a program nor a script with a #! line naming its interpreter".into()
        }
        (None, _) => format!("cannot be executed: {error}"),
    }
}

/// `e_machine` of an ELF file.
fn elf_machine(head: &[u8]) -> Option<u16> {
    if !head.starts_with(b"\x7fELF") {
        return None;
    }
    let big_endian = head.get(5) == Some(&2);
    let bytes = [*head.get(18)?, *head.get(19)?];
    Some(if big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "x86 (32-bit)".into(),
        40 => "ARM (32-bit)".into(),
        183 => "ARM (aarch64)".into(),
        243 => "RISC-V".into(),
        21 => "PowerPC".into(),
        22 => "S390".into(),
        other => format!("another architecture (ELF machine {other})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entrypoint(executable: &str, env: &[(&str, &str)]) -> Entrypoint {
        Entrypoint {
            executable: executable.into(),
            args: vec![],
            env: env.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect(),
        }
    }

    #[test]
    fn a_name_is_looked_up_in_the_last_path() {
        let program = entrypoint("sh", &[("PATH", "/no"), ("PATH", "/bin::/sbin")]);
        assert_eq!(candidates(&program), ["/bin/sh", "./sh", "/sbin/sh"]);
        assert_eq!(candidates(&entrypoint("./sh", &[])), ["./sh"]);
    }

    #[test]
    fn later_environment_entries_win_in_place() {
        let program = entrypoint("x", &[("A", "1"), ("B", "2"), ("A", "3")]);
        assert_eq!(environment(&program), ["A=3", "B=2"]);
    }

    #[test]
    fn elf_machines_are_read_in_both_byte_orders() {
        let mut head = vec![0; 64];
        head[..4].copy_from_slice(b"\x7fELF");
        (head[5], head[18]) = (1, 183);
        assert_eq!(elf_machine(&head), Some(183));
        (head[5], head[18], head[19]) = (2, 0, 22);
        assert_eq!(elf_machine(&head), Some(22));
        assert_eq!(elf_machine(&head[..19]), None);
    }
}
