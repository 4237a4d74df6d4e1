//! `exec`: a program in a container that runs. On the host a relay stands for it, which moves its data, passes signals
//! on and ends with its exit code. Without `--detach` that is this process; with it, a copy that goes on alone.

use std::ffi::OsString;
use std::io::{PipeWriter, Read, Write, pipe};
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, Result, anyhow, bail, ensure};
use mote_agent::instance;
use mote_agent::text::Text;

use super::arguments;
use super::create::read_config;
use super::process::{Process, User};
use super::state::{Container, Status, Store, write_whole};
use super::{console, report};
use crate::client::exec::{Exec, NO_TIMEOUT, Program};
use crate::client::pty::Pty;
use crate::client::{Stdio, Stop, Target};
use crate::plan::capability;
use crate::spec::json::Report;
use crate::sys::{self, container};

/// The exit code when there is no program that has one.
const FAILED: u8 = 125;
/// Others may read a pid-file.
const PID_FILE_MODE: u32 = 0o644;
/// What a relay says first, once the program runs. Anything else is why it does not.
const RUNS: &[u8] = b"+";

/// Runs a program in a container. Returns the program's exit code, or 0 if it is left alone.
///
/// # Errors
/// The container does not run, or the program cannot be started.
pub fn exec(store: &Store, wanted: &arguments::Exec) -> Result<u8> {
    let container = store.find(&wanted.id)?;
    ensure!(
        !container.state.is_sandbox,
        "{} is a pod's sandbox, in which no program can run: name one of the pod's containers",
        container.state.id
    );
    let status = container.status();
    ensure!(
        status == Status::Running,
        "cannot exec in a container that is not running: {} is {}",
        wanted.id,
        status.word()
    );
    ensure!(
        wanted.preserve_fds == 0,
        "--preserve-fds is {}, and descriptors of the host cannot be passed into a box; leave it out",
        wanted.preserve_fds
    );
    let task = task(&container, wanted)?;
    let socket = wanted.console_socket.as_deref();
    console::check(task.process.terminal, socket, !wanted.detach)?;
    if !wanted.detach && socket.is_none() {
        write_pid_file(wanted, std::process::id())?;
        return relay(&container, &task, || ()).map_err(Fault::into_error);
    }
    let (mut reader, writer) = pipe().context("make a pipe")?;
    let pid = container::fork(|| stand_in(&container, &task, wanted, writer));
    let pid = pid.context("start a process that stands for the program")?;
    let mut said = Vec::new();
    reader.read_to_end(&mut said).context("wait for the program's start")?;
    if said != RUNS {
        bail!("{}", String::from_utf8_lossy(&said));
    }
    write_pid_file(wanted, pid)?;
    if wanted.detach {
        return Ok(0);
    }
    let status = sys::process::wait(pid).context("wait for the program")?;
    Ok(status.code().map_or(u8::MAX, |code| code as u8))
}

fn write_pid_file(wanted: &arguments::Exec, pid: u32) -> Result<()> {
    let Some(path) = &wanted.pid_file else { return Ok(()) };
    write_whole(path, &pid.to_string(), PID_FILE_MODE)
}

/// What to run, and its words as they were written.
struct Task {
    process: Process,
    args: Vec<Text>,
    env: Vec<Text>,
    cwd: Text,
}

fn task(container: &Container, wanted: &arguments::Exec) -> Result<Task> {
    let texts = |words: &[String]| words.iter().map(Text::from).collect::<Vec<_>>();
    let entries = |env: &[(String, String)]| {
        env.iter().map(|(name, value)| Text::from(format!("{name}={value}"))).collect::<Vec<_>>()
    };
    if let Some(path) = &wanted.process {
        let name = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("read {name}"))?;
        let mut report = Report::default();
        let process =
            Process::parse(&text, &mut report).map_err(|error| anyhow!("{name} {error}"))?;
        let faults: Vec<String> = report.errors.iter().map(ToString::to_string).collect();
        ensure!(faults.is_empty(), "{name}: {}", faults.join("; "));
        let process = Process { terminal: process.terminal || wanted.tty, ..process };
        let (args, env, cwd) =
            (texts(&process.args), entries(&process.env), Text::from(&process.cwd));
        return Ok(Task { process, args, env, cwd });
    }
    // What is not told is the container's own.
    let config = read_config(&container.file("config.json"))?.0;
    let mut process = Process { terminal: wanted.tty, ..config.process };
    if let Some(user) = &wanted.user {
        process.user = parse_user(user, process.user.umask)?;
    }
    let mut env = entries(&process.env);
    for entry in &wanted.env {
        ensure!(
            entry.as_bytes().iter().position(|byte| *byte == b'=').is_some_and(|at| at > 0),
            "--env is {entry:?}, must be NAME=VALUE"
        );
        env.push(entry.into());
    }
    let cwd = wanted.cwd.clone().unwrap_or_else(|| OsString::from(&process.cwd));
    let args = wanted.args.iter().map(Text::from).collect();
    Ok(Task { process, args, env, cwd: cwd.into() })
}

fn parse_user(text: &str, umask: u32) -> Result<User> {
    let number = |text: &str| {
        text.parse::<u32>()
            .map_err(|_| anyhow!("--user is {text:?}, must be UID or UID:GID, in numbers"))
    };
    let (uid, gid) = match text.split_once(':') {
        Some((uid, gid)) => (number(uid)?, number(gid)?),
        None => (number(text)?, 0),
    };
    Ok(User { uid, gid, umask, additional_gids: Vec::new() })
}

/// Why there is no exit code of the program's own.
enum Fault {
    /// The reader has gone, or the like.
    Quiet(u8),
    /// The program was not started or did not end by itself: the exit code that stands for that, and why.
    Told(u8, String),
}

impl Fault {
    fn into_error(self) -> anyhow::Error {
        match self {
            Fault::Quiet(code) => anyhow!("the program's output has no reader ({code})"),
            Fault::Told(code, reason) => {
                anyhow!("{}", report::in_engines_words(Some(code), &reason))
            }
        }
    }
}

impl From<Stop> for Fault {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Quiet(code) => Fault::Quiet(code),
            Stop::Ended(code, reason) => Fault::Told(code, reason),
            Stop::Failed(error) | Stop::Refused(error) => Fault::Told(FAILED, format!("{error:#}")),
        }
    }
}

/// The copy of this process that goes on alone; returns its exit code.
fn stand_in(
    container: &Container,
    task: &Task,
    wanted: &arguments::Exec,
    mut writer: PipeWriter,
) -> u8 {
    let prepare = || -> Result<()> {
        container::new_session().context("start a session")?;
        if let Some(socket) = &wanted.console_socket {
            console::adopt(&console::open(socket, task.process.size)?)?;
        }
        // It ends with the container, and is stopped with it.
        container.cgroup().map_or(Ok(()), |cgroup| cgroup.join())
    };
    if let Err(error) = prepare() {
        // Nobody reads it if exec was killed meanwhile.
        let _ = write!(writer, "{error:#}");
        return FAILED;
    }
    let mut line = Some(writer);
    let result = relay(container, task, || {
        // Closes the line, for whose end exec waits.
        if let Some(mut writer) = line.take() {
            let _ = writer.write_all(RUNS);
        }
    });
    match (result, line) {
        (Ok(code) | Err(Fault::Quiet(code)), _) => code,
        (Err(fault @ Fault::Told(code, _)), Some(mut writer)) => {
            let _ = write!(writer, "{:#}", fault.into_error());
            code
        }
        (Err(Fault::Told(code, _)), None) => code,
    }
}

/// Signals that are not for the program: of the relay's own terminal and children, and what cannot be caught or is its
/// own fault.
const OWN_SIGNALS: [i32; 12] = [
    libc::SIGKILL,
    libc::SIGSTOP,
    libc::SIGCHLD,
    libc::SIGWINCH,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGPIPE,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

/// Moves the program's data until it ends; `started` is called once it runs.
fn relay(container: &Container, task: &Task, mut started: impl FnMut()) -> Result<u8, Fault> {
    let failed = |error: std::io::Error| Fault::Told(FAILED, error.to_string());
    let stdio = Stdio::of_process().map_err(failed)?;
    let program = Program {
        cmd: task.args.clone(),
        env: task.env.clone(),
        user: None,
        workdir: Some(task.cwd.clone()),
        process: Some(identity(&task.process)),
    };
    let target = |name| Target { socket: container.socket(name), wait: None };
    if task.process.terminal {
        let pty = Pty { target: target("pty.sock"), program };
        return Ok(pty.run_with(&stdio, None, Some(&mut started))?);
    }
    let exec = Exec { target: target("exec.sock"), program, timeout: NO_TIMEOUT };
    let passed_on = (1..=libc::SIGSYS).filter(|number| !OWN_SIGNALS.contains(number));
    let signals = sys::signal_file(&passed_on.collect::<Vec<_>>()).map_err(failed)?;
    Ok(exec.run_with(&stdio, Some(&signals), Some(&mut started))?)
}

/// As whom a program runs and what it may do, in the agent's words.
fn identity(process: &Process) -> instance::Process {
    let (user, sets) = (&process.user, &process.capabilities);
    let bits = |names: &[String]| {
        let numbers = names.iter().filter_map(|name| capability(name));
        numbers.fold(0, |bits, number| bits | 1 << number)
    };
    instance::Process {
        uid: user.uid,
        gid: user.gid,
        groups: user.additional_gids.clone(),
        umask: Some(user.umask),
        capabilities: Some(instance::Capabilities {
            bounding: bits(&sets.bounding),
            effective: bits(&sets.effective),
            inheritable: bits(&sets.inheritable),
            permitted: bits(&sets.permitted),
            ambient: bits(&sets.ambient),
        }),
        no_new_privs: process.no_new_privileges,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers() {
        let user = parse_user("5:6", 0o22).expect("numbers");
        assert_eq!((user.uid, user.gid, user.umask), (5, 6, 0o22));
        assert_eq!(parse_user("7", 0).expect("a number").gid, 0);
        for text in ["", "root", "1:", ":1", "-1", "1:2:3"] {
            assert!(parse_user(text, 0).is_err(), "{text}");
        }
    }
}
