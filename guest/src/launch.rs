//! Starting a program of the box, the entrypoint or an exec'd command: user, limits, working
//! directory, environment, standard streams, and a reason that a person can act on when it cannot be
//! started.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use mote_agent::instance::{Entrypoint, Instance, Process, Rlimit, Security};

use crate::seccomp;
use crate::spawn::{self, Spawn, SpawnError, Spawned, Step, View};
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
#[derive(Debug)]
pub struct Program<'a> {
    /// Path, or a name that is looked up in the environment's `PATH`.
    pub executable: &'a OsStr,
    /// Arguments after `argv[0]`.
    pub args: Vec<&'a OsStr>,
    /// Environment in order, over the defaults; a later entry for a name wins.
    pub env: Vec<(&'a OsStr, &'a OsStr)>,
    /// Directory to start in.
    pub workdir: &'a Path,
    /// Who runs it (contract §1.5); root by default.
    pub user: Option<&'a str>,
    /// The same exactly, in place of it.
    pub process: Option<&'a Process>,
    /// Limits, in order.
    pub rlimits: &'a [Rlimit],
    /// Whether its standard streams are a terminal.
    pub terminal: bool,
    /// Whether a session starts it, and not the agent itself.
    pub by_session: bool,
    /// What it gives up.
    pub security: &'a Security,
    /// What it sees, if that is not what whoever starts it does.
    pub view: Option<View<'a>>,
    /// Whether it is only made ready.
    pub hold: bool,
}

impl<'a> Program<'a> {
    /// The box's entrypoint.
    pub fn of_entrypoint(instance: &'a Instance) -> Self {
        let Instance { start, masked_paths, read_only_paths, .. } = instance;
        let Entrypoint { executable, args, env } = &instance.entrypoint;
        Program {
            executable: OsStr::new(executable),
            args: args.iter().map(OsStr::new).collect(),
            env: env.iter().map(|(name, value)| (OsStr::new(name), OsStr::new(value))).collect(),
            workdir: Path::new(&instance.workdir),
            user: instance.user.as_deref(),
            process: instance.process.as_ref(),
            rlimits: &instance.rlimits,
            terminal: start.terminal.is_some(),
            by_session: false,
            security: &instance.security,
            view: instance.has_own_view().then_some(View {
                own_pids: start.pid1,
                masked: masked_paths,
                read_only: read_only_paths,
            }),
            hold: start.on_request,
        }
    }
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

/// Starts a program in the cgroup whose `cgroup.procs` is given.
///
/// # Errors
/// The exit code that tells of it, and the reason, which names the spec's field or the program.
pub fn start(
    program: &Program<'_>,
    stdio: [BorrowedFd<'_>; 3],
    cgroup: BorrowedFd<'_>,
) -> Result<Spawned, Refusal> {
    let identity = identity(program)?;
    // So that the program can open /dev/stdin, /dev/stdout, /dev/stderr or its terminal again. An
    // input that is no pipe of its own, /dev/null, stays as it is.
    let owned = if is_pipe(stdio[0]) { &stdio[..] } else { &stdio[1..] };
    for stream in owned {
        sys::change_owner(stream, identity.uid).map_err(doing("give the streams to the user"))?;
    }
    let environment = environment(program, &identity);
    let candidates = candidates(program.executable, &environment);
    let has_other_process_1 = !program.view.is_some_and(|view| view.own_pids);
    if has_other_process_1
        && !program.by_session
        && candidates.iter().any(|file| is_systemd(Path::new(file)))
    {
        let reason = format!(
            "'{}' is systemd, which works only as process 1, and that is mote's agent in a box; name the program that the box is to run (the ExecStart= of its service)",
            program.executable.display()
        );
        return Err(refusal(SETUP_FAILED, reason));
    }
    let argv: Vec<&OsStr> = [&[program.executable], &program.args[..]].concat();
    let workdir = strings(&[program.workdir])?;
    let entry =
        |(name, value): &(&OsStr, &OsStr)| [*name, OsStr::new("="), *value].into_iter().collect();
    let envp: Vec<OsString> = environment.iter().map(entry).collect();
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
        no_new_privs: program.security.no_new_privs
            || program.process.is_some_and(|process| process.no_new_privs),
        drop_capabilities: &program.security.drop_capabilities,
        filter: &if program.security.seccomp { seccomp::filter() } else { Vec::new() },
        capabilities: program.process.and_then(|process| process.capabilities),
        umask: program.process.and_then(|process| process.umask),
        view: program.view,
        hold: program.hold,
    })
    .map_err(|error| explain(program, &candidates, &environment, error))
}

/// The refusal for a program that was held and could not go on.
pub fn explain_held(program: &Program<'_>, error: SpawnError) -> Refusal {
    match identity(program) {
        Err(refusal) => refusal,
        Ok(identity) => {
            let environment = environment(program, &identity);
            explain(program, &candidates(program.executable, &environment), &environment, error)
        }
    }
}

fn identity(program: &Program<'_>) -> Result<Identity, Refusal> {
    let failed = |reason| refusal(SETUP_FAILED, format!("user: {reason}"));
    let Some(process) = program.process else {
        return user::resolve(program.user).map_err(failed);
    };
    let Process { uid, gid, groups, .. } = process;
    // An account only adds its home.
    let home = user::resolve(Some(&uid.to_string())).map_err(failed)?.home;
    Ok(Identity { uid: *uid, gid: *gid, groups: groups.clone(), home })
}

fn strings(texts: &[impl AsRef<OsStr>]) -> Result<Vec<CString>, Refusal> {
    let strings = texts.iter().map(sys::c_string).collect::<io::Result<_>>();
    strings.map_err(|_| {
        let reason = "a program's name, arguments, environment and directory cannot contain NUL";
        refusal(SETUP_FAILED, reason.into())
    })
}

/// Each name once with its last value, in order of first appearance: the defaults of contract §7.1
/// first, with a `PATH`, and the home of a user that was named.
fn environment<'a>(program: &Program<'a>, identity: &'a Identity) -> Vec<(&'a OsStr, &'a OsStr)> {
    let is_named = program.user.is_some() || program.process.is_some();
    let home = identity.home.as_deref().filter(|_| is_named).unwrap_or("/");
    let term = if program.terminal { "xterm-256color" } else { "linux" };
    let defaults = [("HOME", home), ("TERM", term), ("PATH", DEFAULT_PATH)];
    // Who is given exactly has exactly this environment.
    let count = if program.process.is_some() { 1 } else { defaults.len() };
    let defaults = defaults[..count].iter();
    let mut entries: Vec<_> =
        defaults.map(|(name, value)| (OsStr::new(*name), OsStr::new(*value))).collect();
    for &(name, value) in &program.env {
        match entries.iter_mut().find(|(known, _)| *known == name) {
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

fn path<'a>(environment: &[(&'a OsStr, &'a OsStr)]) -> &'a OsStr {
    let given = environment.iter().find(|(name, _)| *name == "PATH");
    // One whose environment is exact may have none, and its engine expects that it is found all the same.
    given.map_or(OsStr::new(DEFAULT_PATH), |(_, value)| value)
}

/// The files that an executable's name can mean, in order.
fn candidates(name: &OsStr, environment: &[(&OsStr, &OsStr)]) -> Vec<PathBuf> {
    if has_slash(name) {
        return vec![name.into()];
    }
    path(environment)
        .as_bytes()
        .split(|byte| *byte == b':')
        .map(|dir| Path::new(if dir.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(dir) }))
        .map(|dir| dir.join(name))
        .collect()
}

fn has_slash(name: &OsStr) -> bool {
    name.as_bytes().contains(&b'/')
}

/// Whether a file is systemd's manager, under the names that images start it by.
fn is_systemd(file: &Path) -> bool {
    let named = |path: &Path, name: &str| path.file_name().is_some_and(|last| last == name);
    (named(file, "init") || named(file, "systemd"))
        && file.canonicalize().is_ok_and(|target| named(&target, "systemd"))
}

fn explain(
    program: &Program<'_>,
    candidates: &[PathBuf],
    environment: &[(&OsStr, &OsStr)],
    failure: SpawnError,
) -> Refusal {
    let SpawnError { step, at, error } = failure;
    let name = Path::new(program.executable).display();
    let setup = |reason| refusal(SETUP_FAILED, reason);
    match step {
        Step::Fork => setup(format!("start a process: {error}")),
        Step::Confine => setup(format!("give up privileges (A3S_SEC_*): {error}")),
        Step::Cgroup => setup(format!("join the box's cgroup: {error}")),
        Step::View => setup(format!(
            "pid1, masked_paths, readonly_paths: give the program its own view of processes and files: {error}"
        )),
        Step::Workdir => setup(format!(
            "workdir: enter '{}' in the guest: {error}; name a directory of the root file system",
            program.workdir.display()
        )),
        Step::Rlimit => {
            let number = program.rlimits.get(at).map_or(0, |limit| limit.resource);
            setup(format!("resource_limits: set resource limit {number}: {error}"))
        }
        Step::User => setup(format!("user: switch to the program's user: {error}")),
        Step::Exec => {
            let file = candidates.get(at).map_or(Path::new(program.executable), PathBuf::as_path);
            // Where the program would have looked.
            let place = |candidate: &Path| program.workdir.join(candidate);
            let found = candidates.iter().find(|c| place(c).symlink_metadata().is_ok());
            match (error.raw_os_error(), found) {
                (Some(libc::ENOENT | libc::ENOTDIR), None) if has_slash(program.executable) => {
                    refusal(NOT_FOUND, format!("'{name}' is not in the root file system"))
                }
                (Some(libc::ENOENT | libc::ENOTDIR), None) => refusal(
                    NOT_FOUND,
                    format!(
                        "'{name}' is in no directory of PATH ({})",
                        path(environment).display()
                    ),
                ),
                (errno, found) => {
                    let missing = errno == Some(libc::ENOENT);
                    let file = found.filter(|_| missing).map_or(file, PathBuf::as_path);
                    let defect = defect(&place(file), &error);
                    refusal(NOT_EXECUTABLE, format!("'{}' {defect}", file.display()))
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
                OsStr::from_bytes(interpreter).display()
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

    fn variables<'a>(env: &[(&'a str, &'a str)]) -> Vec<(&'a OsStr, &'a OsStr)> {
        env.iter().map(|&(name, value)| (OsStr::new(name), OsStr::new(value))).collect()
    }

    fn program<'a>(env: &[(&'a str, &'a str)], user: Option<&'a str>) -> Program<'a> {
        Program {
            executable: OsStr::new("sh"),
            args: vec![],
            env: variables(env),
            workdir: Path::new("/"),
            user,
            rlimits: &[],
            terminal: false,
            by_session: false,
            security: &NONE,
            process: None,
            view: None,
            hold: false,
        }
    }

    #[test]
    fn a_name_is_looked_up_in_path() {
        let environment = variables(&[("PATH", "/bin::/sbin")]);
        let candidates = |name: &str| candidates(OsStr::new(name), &environment);
        assert_eq!(candidates("sh"), ["/bin/sh", "./sh", "/sbin/sh"].map(PathBuf::from));
        assert_eq!(candidates("./sh"), [PathBuf::from("./sh")]);
    }

    #[test]
    fn later_environment_entries_win_in_place() {
        let env = [("A", "1"), ("B", "2"), ("A", "3"), ("PATH", "/x")];
        let app = Identity { home: Some("/home/app".into()), ..Identity::ROOT };
        let defaults = |home| [("HOME", home), ("TERM", "linux"), ("PATH", "/x")];
        let own = [("A", "3"), ("B", "2")];
        assert_eq!(
            environment(&program(&env, None), &app),
            variables(&[&defaults("/")[..], &own].concat())
        );
        assert_eq!(
            environment(&program(&env, Some("app")), &app),
            variables(&[&defaults("/home/app")[..], &own].concat())
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
