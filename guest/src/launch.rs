//! Starting a program of the box, the entrypoint or an exec'd command: user, limits, working
//! directory, environment, standard streams, and a reason that a person can act on when it cannot be
//! started.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use mote_agent::instance::{Rlimit, Security};

use crate::seccomp;
use crate::spawn::{self, Spawn, SpawnError, Step};
use crate::sys;
use crate::user::{self, Identity};

/// Exit code of a program that could not be set up; this and the next two are those of shells and
/// container runtimes.
pub const SETUP_FAILED: u8 = 125;
/// Exit code of a program that is not executable.
const NOT_EXECUTABLE: u8 = 126;
/// Exit code of a program that is not there.
const NOT_FOUND: u8 = 127;

/// `PATH` of a program whose environment names none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program to start.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// Path, or a name that is looked up in the environment's `PATH`.
    pub executable: &'a str,
    /// Arguments after `argv[0]`.
    pub args: &'a [String],
    /// Environment in order, over the defaults; a later entry for a name wins.
    pub env: &'a [(String, String)],
    /// Directory to start in.
    pub workdir: &'a str,
    /// Who runs it (contract §1.5); root by default.
    pub user: Option<&'a str>,
    /// Limits, in order.
    pub rlimits: &'a [Rlimit],
    /// Whether its standard streams are a terminal.
    pub terminal: bool,
    /// Whether a session starts it, and not the agent itself.
    pub by_session: bool,
    /// What it gives up.
    pub security: &'a Security,
}

/// Why a program could not be started.
#[derive(Debug)]
pub struct Refusal {
    /// 125, 126 or 127.
    pub code: u8,
    /// What was being done, to what, and what the reader can change.
    pub reason: String,
}

fn refusal(code: u8, reason: String) -> Refusal {
    Refusal { code, reason }
}

/// The refusal for something that the guest could not set up.
pub fn doing(what: &'static str) -> impl FnOnce(io::Error) -> Refusal + Copy {
    move |error| refusal(SETUP_FAILED, format!("{what}: {error}"))
}

/// Starts a program in the cgroup whose `cgroup.procs` is given; returns its process id.
///
/// # Errors
/// The exit code that tells of it, and the reason, which names the spec's field or the program.
pub fn start(
    program: &Program<'_>,
    stdio: [BorrowedFd<'_>; 3],
    cgroup: BorrowedFd<'_>,
) -> Result<i32, Refusal> {
    let identity = user::resolve(program.user)
        .map_err(|reason| refusal(SETUP_FAILED, format!("user: {reason}")))?;
    // So that the program can open /dev/stdin, /dev/stdout, /dev/stderr or its terminal again. An
    // input that is no pipe of its own, /dev/null, stays as it is.
    let owned = if is_pipe(stdio[0]) { &stdio[..] } else { &stdio[1..] };
    for stream in owned {
        sys::change_owner(stream, identity.uid).map_err(doing("give the streams to the user"))?;
    }
    let environment = environment(program, &identity);
    let candidates = candidates(program.executable, &environment);
    let strings = |texts: &[String]| -> Result<Vec<CString>, Refusal> {
        let strings = texts.iter().map(sys::c_string).collect::<io::Result<_>>();
        strings.map_err(|_| {
            let reason =
                "a program's name, arguments, environment and directory cannot contain NUL";
            refusal(SETUP_FAILED, reason.into())
        })
    };
    let executable = program.executable.to_owned();
    let argv: Vec<String> = [executable].into_iter().chain(program.args.iter().cloned()).collect();
    let workdir = strings(&[program.workdir.to_owned()])?;
    let envp: Vec<String> = environment.iter().map(|(n, v)| format!("{n}={v}")).collect();
    spawn::spawn(&Spawn {
        candidates: &strings(&candidates)?,
        argv: &strings(&argv)?,
        envp: &strings(&envp)?,
        workdir: &workdir[0],
        rlimits: program.rlimits,
        uid: identity.uid,
        gid: identity.gid,
        groups: &identity.groups,
        stdio,
        terminal: program.terminal,
        cgroup,
        spared: program.by_session,
        no_new_privs: program.security.no_new_privs,
        drop_capabilities: &program.security.drop_capabilities,
        filter: &if program.security.seccomp { seccomp::filter() } else { Vec::new() },
    })
    .map_err(|error| explain(program, &candidates, &environment, error))
}

/// Each name once with its last value, in order of first appearance: the defaults of contract §7.1
/// first, with a `PATH`, and the home of a user that was named.
fn environment<'a>(program: &Program<'a>, identity: &'a Identity) -> Vec<(&'a str, &'a str)> {
    let home = identity.home.as_deref().filter(|_| program.user.is_some()).unwrap_or("/");
    let term = if program.terminal { "xterm-256color" } else { "linux" };
    let mut entries = vec![("HOME", home), ("TERM", term), ("PATH", DEFAULT_PATH)];
    for (name, value) in program.env {
        match entries.iter_mut().find(|(known, _)| known == name) {
            Some(entry) => entry.1 = value,
            None => entries.push((name, value)),
        }
    }
    entries
}

fn is_pipe(fd: BorrowedFd<'_>) -> bool {
    let metadata = fd.try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
    metadata.is_ok_and(|metadata| metadata.file_type().is_fifo())
}

fn path<'a>(environment: &[(&'a str, &'a str)]) -> &'a str {
    environment.iter().find(|(name, _)| *name == "PATH").map_or("", |(_, value)| value)
}

/// The files that an executable's name can mean, in order.
fn candidates(name: &str, environment: &[(&str, &str)]) -> Vec<String> {
    if name.contains('/') {
        return vec![name.to_owned()];
    }
    path(environment)
        .split(':')
        .map(|dir| if dir.is_empty() { format!("./{name}") } else { format!("{dir}/{name}") })
        .collect()
}

fn explain(
    program: &Program<'_>,
    candidates: &[String],
    environment: &[(&str, &str)],
    failure: SpawnError,
) -> Refusal {
    let SpawnError { step, at, error } = failure;
    let name = program.executable;
    let setup = |reason| refusal(SETUP_FAILED, reason);
    match step {
        Step::Fork => setup(format!("start a process: {error}")),
        Step::Confine => setup(format!("give up privileges (A3S_SEC_*): {error}")),
        Step::Cgroup => setup(format!("join the box's cgroup: {error}")),
        Step::Workdir => setup(format!(
            "workdir: enter '{}' in the guest: {error}; name a directory of the root file system",
            program.workdir
        )),
        Step::Rlimit => {
            let number = program.rlimits.get(at).map_or(0, |limit| limit.resource);
            setup(format!("resource_limits: set resource limit {number}: {error}"))
        }
        Step::User => setup(format!("user: switch to the program's user: {error}")),
        Step::Exec => {
            let file = candidates.get(at).map_or(name, String::as_str);
            // Where the program would have looked.
            let place = |candidate: &str| Path::new(program.workdir).join(candidate);
            let found = candidates.iter().find(|c| place(c).symlink_metadata().is_ok());
            match (error.raw_os_error(), found) {
                (Some(libc::ENOENT | libc::ENOTDIR), None) if name.contains('/') => {
                    refusal(NOT_FOUND, format!("'{name}' is not in the root file system"))
                }
                (Some(libc::ENOENT | libc::ENOTDIR), None) => refusal(
                    NOT_FOUND,
                    format!("'{name}' is in no directory of PATH ({})", path(environment)),
                ),
                (errno, found) => {
                    let missing = errno == Some(libc::ENOENT);
                    let file = found.filter(|_| missing).map_or(file, String::as_str);
                    let defect = defect(&place(file), &error);
                    refusal(NOT_EXECUTABLE, format!("'{file}' {defect}"))
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
        (Some(libc::EM_X86_64), Some(libc::ENOENT)) => {
            "needs a dynamic loader that is not in the root file system".into()
        }
        (Some(libc::EM_X86_64), _) => {
            format!("is an x86-64 program that cannot be started: {error}")
        }
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
    let big_endian = head.get(libc::EI_DATA) == Some(&libc::ELFDATA2MSB);
    let bytes = [*head.get(18)?, *head.get(19)?];
    Some(if big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
}

fn machine_name(machine: u16) -> String {
    let name = match machine {
        libc::EM_386 => "x86 (32-bit)",
        libc::EM_ARM => "ARM (32-bit)",
        libc::EM_AARCH64 => "ARM (aarch64)",
        libc::EM_RISCV => "RISC-V",
        libc::EM_PPC64 => "PowerPC",
        libc::EM_S390 => "S390",
        other => return format!("another architecture (ELF machine {other})"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    static NONE: Security =
        Security { no_new_privs: false, seccomp: false, drop_capabilities: Vec::new() };

    fn owned(env: &[(&str, &str)]) -> Vec<(String, String)> {
        env.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect()
    }

    fn program<'a>(env: &'a [(String, String)], user: Option<&'a str>) -> Program<'a> {
        let executable = "sh";
        Program {
            executable,
            args: &[],
            env,
            workdir: "/",
            user,
            rlimits: &[],
            terminal: false,
            by_session: false,
            security: &NONE,
        }
    }

    #[test]
    fn a_name_is_looked_up_in_path() {
        let environment = [("PATH", "/bin::/sbin")];
        assert_eq!(candidates("sh", &environment), ["/bin/sh", "./sh", "/sbin/sh"]);
        assert_eq!(candidates("./sh", &environment), ["./sh"]);
    }

    #[test]
    fn later_environment_entries_win_in_place() {
        let env = owned(&[("A", "1"), ("B", "2"), ("A", "3"), ("PATH", "/x")]);
        let app = Identity { home: Some("/home/app".into()), ..Identity::ROOT };
        let defaults = |home| [("HOME", home), ("TERM", "linux"), ("PATH", "/x")];
        let own = [("A", "3"), ("B", "2")];
        assert_eq!(environment(&program(&env, None), &app), [&defaults("/")[..], &own].concat());
        assert_eq!(
            environment(&program(&env, Some("app")), &app),
            [&defaults("/home/app")[..], &own].concat()
        );
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
