//! The command line of `mote-oci`, in the forms that podman and containerd use; runc's, as far as it means
//! something here.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::anyhow;
use lexopt::prelude::*;
use lexopt::{Parser, ValueExt};

use crate::sys::container::signal_number;

/// Options before the command.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Global {
    /// Where the containers' directories are; `None` is the default.
    pub root: Option<PathBuf>,
    /// A file for errors, beside standard error.
    pub log: Option<PathBuf>,
    /// How lines of that file are written.
    pub format: Format,
    /// Whether that file gets warnings, too.
    pub debug: bool,
    /// Whether cgroups are systemd's to make.
    pub systemd_cgroup: bool,
}

/// How a line of the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// `time="…" level=error msg="…"`.
    #[default]
    Text,
    /// A JSON object.
    Json,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Print the help text.
    Help,
    /// Print the versions.
    Version,
    /// Print what this runtime can do.
    Features,
    /// Make a container, which waits for its start.
    Create(Create),
    /// Start a container that has been made.
    Start(String),
    /// Make a container, start it and, unless detached, wait for it.
    Run {
        /// As for [`Command::Create`].
        create: Create,
        /// Whether to return once it runs.
        detach: bool,
        /// Whether to leave a container that has ended for `delete`.
        keep: bool,
    },
    /// Print a container's state.
    State(String),
    /// Send a container a signal.
    Kill {
        /// The container.
        id: String,
        /// The signal's number.
        signal: i32,
        /// Whether one that has stopped already is no error.
        all: bool,
    },
    /// Remove a container.
    Delete {
        /// The container.
        id: String,
        /// Whether one that runs is killed, and one that is not there is no error.
        force: bool,
    },
    /// Run a program in a container.
    Exec(Exec),
    /// List the containers.
    List {
        /// Whether as JSON.
        json: bool,
        /// Whether their ids are enough.
        quiet: bool,
    },
    /// List a container's processes on the host.
    Processes {
        /// The container.
        id: String,
        /// Whether as JSON.
        json: bool,
    },
    /// Stop a container's time.
    Pause(String),
    /// Let it go on.
    Resume(String),
    /// Change a container's limits.
    Update {
        /// The container.
        id: String,
        /// The file with the new limits; `-` is standard input.
        resources: PathBuf,
    },
}

/// What `create` and `run` are given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Create {
    /// The container's name.
    pub id: String,
    /// The directory with its `config.json`.
    pub bundle: PathBuf,
    /// A file that gets the number of the container's process.
    pub pid_file: Option<PathBuf>,
    /// A Unix socket that gets the container's terminal.
    pub console_socket: Option<PathBuf>,
    /// How many descriptors the container is to inherit.
    pub preserve_fds: u32,
}

/// What `exec` is given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exec {
    /// The container.
    pub id: String,
    /// The file with the program's `process` object, if it is not told by the rest.
    pub process: Option<PathBuf>,
    /// Program and arguments.
    pub args: Vec<OsString>,
    /// The directory to start in.
    pub cwd: Option<OsString>,
    /// `NAME=value` entries.
    pub env: Vec<OsString>,
    /// `uid` or `uid:gid`.
    pub user: Option<String>,
    /// Whether it has a terminal.
    pub tty: bool,
    /// A Unix socket that gets its terminal.
    pub console_socket: Option<PathBuf>,
    /// Whether to return once it runs.
    pub detach: bool,
    /// A file that gets the number of the process that stands for it on the host.
    pub pid_file: Option<PathBuf>,
    /// How many descriptors it is to inherit.
    pub preserve_fds: u32,
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// What is wrong, for one line. The options that were read before that are good for telling it.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> (Global, anyhow::Result<Command>) {
    let mut global = Global::default();
    let command = parse_with(&mut global, Parser::from_args(arguments));
    // Its text has its cause in it already.
    (global, command.map_err(|error| anyhow!("{error}")))
}

fn parse_with(global: &mut Global, mut parser: Parser) -> Result<Command, lexopt::Error> {
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('v') | Long("version") => return Ok(Command::Version),
            Long("root") => global.root = Some(parser.value()?.into()),
            Long("log") => global.log = Some(parser.value()?.into()),
            Long("log-format") => {
                global.format = parser.value()?.parse_with(|word| match word {
                    "text" => Ok(Format::Text),
                    "json" => Ok(Format::Json),
                    _ => Err("it must be text or json"),
                })?;
            }
            Long("debug") => global.debug = true,
            Long("systemd-cgroup") => {
                // podman gives it a value, too.
                let value = parser.optional_value();
                global.systemd_cgroup = value.is_none_or(|value| value != "false");
            }
            // What rootless engines tell runc: here it follows from the user.
            Long("rootless") => drop(parser.value()?),
            Value(word) => {
                let word = word.string()?;
                return parse_command(&word, parser);
            }
            other => return Err(other.unexpected()),
        }
    }
    Err("give a command; see mote-oci --help".into())
}

fn parse_command(word: &str, parser: Parser) -> Result<Command, lexopt::Error> {
    match word {
        "help" => Ok(Command::Help),
        "features" => no_arguments(parser, Command::Features),
        "create" => Ok(Command::Create(parse_create(parser, None)?)),
        "run" => {
            let mut switches = (false, false);
            let create = parse_create(parser, Some(&mut switches))?;
            Ok(Command::Run { create, detach: switches.0, keep: switches.1 })
        }
        "start" => Ok(Command::Start(one_id(parser)?)),
        "state" => Ok(Command::State(one_id(parser)?)),
        "pause" => Ok(Command::Pause(one_id(parser)?)),
        "resume" => Ok(Command::Resume(one_id(parser)?)),
        "kill" => parse_kill(parser),
        "delete" => parse_delete(parser),
        "exec" => parse_exec(parser).map(Command::Exec),
        "list" => parse_list(parser),
        "ps" => parse_processes(parser),
        "update" => parse_update(parser),
        other => Err(format!("'{other}' is not a command; see mote-oci --help").into()),
    }
}

fn no_arguments(mut parser: Parser, command: Command) -> Result<Command, lexopt::Error> {
    match parser.next()? {
        None => Ok(command),
        Some(other) => Err(other.unexpected()),
    }
}

fn one_id(mut parser: Parser) -> Result<String, lexopt::Error> {
    let mut id = None;
    while let Some(argument) = parser.next()? {
        take_id(argument, &mut id)?;
    }
    needed(id)
}

/// Takes an argument that can only be the container's id.
fn take_id(argument: lexopt::Arg<'_>, id: &mut Option<String>) -> Result<(), lexopt::Error> {
    match argument {
        Value(word) if id.is_none() => {
            *id = Some(word.string()?);
            Ok(())
        }
        other => Err(other.unexpected()),
    }
}

fn needed(id: Option<String>) -> Result<String, lexopt::Error> {
    id.ok_or_else(|| "give the container's id".into())
}

fn parse_create(
    mut parser: Parser,
    mut switches: Option<&mut (bool, bool)>,
) -> Result<Create, lexopt::Error> {
    let mut id = None;
    let mut create = Create { bundle: ".".into(), ..Create::default() };
    while let Some(argument) = parser.next()? {
        match (argument, switches.as_deref_mut()) {
            (Short('b') | Long("bundle"), _) => create.bundle = parser.value()?.into(),
            (Long("pid-file"), _) => create.pid_file = Some(parser.value()?.into()),
            (Long("console-socket"), _) => create.console_socket = Some(parser.value()?.into()),
            (Long("preserve-fds"), _) => create.preserve_fds = parser.value()?.parse()?,
            // The root is never pivoted to, and a box has a kernel's keyrings of its own.
            (Long("no-pivot" | "no-new-keyring"), _) => {}
            (Short('d') | Long("detach"), Some(switches)) => switches.0 = true,
            (Long("keep"), Some(switches)) => switches.1 = true,
            // Orphans are the guest's own init's.
            (Long("no-subreaper"), Some(_)) => {}
            (other, _) => take_id(other, &mut id)?,
        }
    }
    create.id = needed(id)?;
    Ok(create)
}

fn parse_kill(mut parser: Parser) -> Result<Command, lexopt::Error> {
    let (mut id, mut signal, mut all) = (None, None, false);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('a') | Long("all") => all = true,
            Value(word) if id.is_some() && signal.is_none() => {
                signal = Some(word.parse_with(signal_named)?);
            }
            other => take_id(other, &mut id)?,
        }
    }
    Ok(Command::Kill { id: needed(id)?, signal: signal.unwrap_or(libc::SIGTERM), all })
}

/// The number of a signal that is given by number or name.
fn signal_named(word: &str) -> Result<i32, String> {
    let number = word.parse().ok().filter(|number| (1..=64).contains(number));
    number
        .or_else(|| signal_number(word))
        .ok_or_else(|| "it must be a signal: a number from 1 to 64, or a name such as TERM".into())
}

fn parse_delete(mut parser: Parser) -> Result<Command, lexopt::Error> {
    let (mut id, mut force) = (None, false);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('f') | Long("force") => force = true,
            other => take_id(other, &mut id)?,
        }
    }
    Ok(Command::Delete { id: needed(id)?, force })
}

fn parse_exec(mut parser: Parser) -> Result<Exec, lexopt::Error> {
    let mut id = None;
    let mut exec = Exec::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Short('p') | Long("process") => exec.process = Some(parser.value()?.into()),
            Long("pid-file") => exec.pid_file = Some(parser.value()?.into()),
            Long("console-socket") => exec.console_socket = Some(parser.value()?.into()),
            Long("preserve-fds") => exec.preserve_fds = parser.value()?.parse()?,
            Long("cwd") => exec.cwd = Some(parser.value()?),
            Short('e') | Long("env") => exec.env.push(parser.value()?),
            Short('u') | Long("user") => exec.user = Some(parser.value()?.string()?),
            Short('t') | Long("tty") => exec.tty = true,
            Short('d') | Long("detach") => exec.detach = true,
            Value(word) if id.is_none() => id = Some(word.string()?),
            // Everything after the program's name belongs to the program, options too.
            Value(word) => {
                exec.args.push(word);
                exec.args.extend(parser.raw_args()?);
            }
            other => return Err(other.unexpected()),
        }
    }
    exec.id = needed(id)?;
    match (&exec.process, exec.args.is_empty()) {
        (None, true) => Err("give the program to run after the id, or --process FILE".into()),
        (Some(_), false) => {
            Err("--process and the words after the id both say what to run; keep one".into())
        }
        _ => Ok(exec),
    }
}

fn parse_format(parser: &mut Parser) -> Result<bool, lexopt::Error> {
    parser.value()?.parse_with(|word| match word {
        "json" => Ok(true),
        "table" => Ok(false),
        _ => Err("it must be table or json"),
    })
}

fn parse_list(mut parser: Parser) -> Result<Command, lexopt::Error> {
    let (mut json, mut quiet) = (false, false);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('f') | Long("format") => json = parse_format(&mut parser)?,
            Short('q') | Long("quiet") => quiet = true,
            other => return Err(other.unexpected()),
        }
    }
    Ok(Command::List { json, quiet })
}

fn parse_processes(mut parser: Parser) -> Result<Command, lexopt::Error> {
    let (mut id, mut json) = (None, false);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('f') | Long("format") => json = parse_format(&mut parser)?,
            other => take_id(other, &mut id)?,
        }
    }
    Ok(Command::Processes { id: needed(id)?, json })
}

fn parse_update(mut parser: Parser) -> Result<Command, lexopt::Error> {
    let (mut id, mut resources) = (None, None);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('r') | Long("resources") => resources = Some(parser.value()?.into()),
            other => take_id(other, &mut id)?,
        }
    }
    let resources =
        resources.ok_or("give the new limits with --resources FILE, or - for standard input")?;
    Ok(Command::Update { id: needed(id)?, resources })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> (Global, Result<Command, String>) {
        let (global, command) = parse(line.split_whitespace().map(OsString::from));
        (global, command.map_err(|error| format!("{error:#}")))
    }

    fn command(line: &str) -> Result<Command, String> {
        parsed(line).1
    }

    #[test]
    fn the_forms_of_podman() {
        let (global, created) = parsed(
            "--systemd-cgroup --log-format=json --log /l create --bundle /b --pid-file /p --console-socket /c --preserve-fds 2 ID",
        );
        assert!(global.systemd_cgroup && global.format == Format::Json);
        assert_eq!(global.log, Some("/l".into()));
        assert_eq!(
            created,
            Ok(Command::Create(Create {
                id: "ID".into(),
                bundle: "/b".into(),
                pid_file: Some("/p".into()),
                console_socket: Some("/c".into()),
                preserve_fds: 2
            }))
        );
        assert_eq!(command("start ID"), Ok(Command::Start("ID".into())));
        assert_eq!(
            command("kill ID 15"),
            Ok(Command::Kill { id: "ID".into(), signal: 15, all: false })
        );
        assert_eq!(
            command("delete --force ID"),
            Ok(Command::Delete { id: "ID".into(), force: true })
        );
        let exec = command("exec --pid-file /p --process /f --detach --tty --console-socket /c ID");
        let Ok(Command::Exec(exec)) = exec else { panic!("{exec:?}") };
        assert!(exec.detach && exec.tty && exec.args.is_empty());
        assert_eq!((exec.process, exec.id.as_str()), (Some("/f".into()), "ID"));
        assert_eq!(
            command("update --resources=/f ID"),
            Ok(Command::Update { id: "ID".into(), resources: "/f".into() })
        );
        assert_eq!(command("--version"), Ok(Command::Version));
    }

    #[test]
    fn the_forms_of_containerd() {
        let (global, created) = parsed(
            "--root /run/containerd/runc/k8s.io --log /l --log-format json create --bundle /b --pid-file /p ID",
        );
        assert_eq!(global.root, Some("/run/containerd/runc/k8s.io".into()));
        assert!(matches!(created, Ok(Command::Create(_))), "{created:?}");
        assert_eq!(
            command("ps --format json ID"),
            Ok(Command::Processes { id: "ID".into(), json: true })
        );
        assert_eq!(
            command("kill --all ID 9"),
            Ok(Command::Kill { id: "ID".into(), signal: 9, all: true })
        );
        assert_eq!(
            command("update --resources - ID"),
            Ok(Command::Update { id: "ID".into(), resources: "-".into() })
        );
    }

    #[test]
    fn the_forms_of_people() {
        let exec = command("exec -t --cwd /w -e A=1 --env B=2 -u 1:2 ID ls -l --help");
        let Ok(Command::Exec(exec)) = exec else { panic!("{exec:?}") };
        assert_eq!(exec.args, ["ls", "-l", "--help"]);
        assert_eq!(exec.env, ["A=1", "B=2"]);
        assert_eq!((exec.user.as_deref(), exec.tty, exec.detach), (Some("1:2"), true, false));
        let run = command("run -d --keep ID");
        assert!(matches!(run, Ok(Command::Run { detach: true, keep: true, .. })), "{run:?}");
        for (word, number) in
            [("TERM", 15), ("SIGUSR1", 10), ("sigkill", 9), ("RTMIN+1", 35), ("64", 64)]
        {
            let expected = Command::Kill { id: "ID".into(), signal: number, all: false };
            assert_eq!(command(&format!("kill ID {word}")), Ok(expected), "{word}");
        }
        assert_eq!(command("list -q -f json"), Ok(Command::List { json: true, quiet: true }));
    }

    #[test]
    fn misuse_is_refused() {
        for line in [
            "",
            "nonsense",
            "create",
            "create --detach ID",
            "create a b",
            "start",
            "start a b",
            "kill ID 0",
            "kill ID 65",
            "kill ID SIGNONSENSE",
            "kill ID RTMAX-99",
            "kill ID 9 9",
            "exec ID",
            "exec --process f ID ls",
            "update ID",
            "list --format xml",
            "state",
            "--log-format yaml state ID",
            "features now",
            "create --preserve-fds x ID",
        ] {
            assert!(command(line).is_err(), "{line}");
        }
        assert_eq!(command("start"), Err("give the container's id".into()));
    }
}
