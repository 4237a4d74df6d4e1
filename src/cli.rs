//! The command line: the form that the box runtime uses (contract §2.2), and the commands for people.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::*;
use mote_agent::text::Text;

use crate::client::Target;
use crate::client::cp::{Cp, Route};
use crate::client::exec::{Exec, NO_TIMEOUT, Program};
use crate::client::pty::Pty;
use crate::manual::Document;

/// Where the spec's text comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum Config {
    /// On the command line.
    Text(String),
    /// In this file; `-` is standard input.
    File(PathBuf),
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Config::Text(_) => f.write_str("--config"),
            Config::File(path) if path.as_os_str() == "-" => f.write_str("standard input"),
            Config::File(path) => path.display().fmt(f),
        }
    }
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a box.
    Run {
        /// Its spec.
        config: Config,
        /// `--outcome`.
        outcome: Option<PathBuf>,
        /// `--timeline`.
        timeline: Option<PathBuf>,
        /// `--log`.
        log: Option<PathBuf>,
        /// `--cgroup`.
        cgroup: Option<PathBuf>,
    },
    /// Print the plan or the errors.
    Check(Config),
    /// Make the template that a box starts from.
    Template(Config),
    /// Examine the host.
    Probe,
    /// Run a command in a box.
    Exec(Exec),
    /// Run a command on a terminal in a box.
    Pty(Pty),
    /// Copy a file into a box or out of it.
    Cp(Cp),
    /// Print a text for users, such as the help text.
    Print(Document),
    /// Print the version.
    Version,
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// What is wrong, for one line on stderr.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    parse_with(lexopt::Parser::from_args(arguments)).map_err(|error| error.to_string())
}

fn parse_with(mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut config = None;
    let mut outcome = None;
    let mut timeline = None;
    let mut log = None;
    let mut cgroup = None;
    let mut verb: Option<String> = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(Document::Help)),
            Short('V') | Long("version") => return Ok(Command::Version),
            Long("config") => {
                let text = parsed("--config", parser.value()?, |text| Ok(text.into()))?;
                give_spec(&mut config, Config::Text(text))?;
            }
            Long("config-file") => {
                give_spec(&mut config, Config::File(parser.value()?.into()))?;
            }
            Long("outcome") => once("--outcome", &mut outcome, PathBuf::from(parser.value()?))?,
            Long("log") => once("--log", &mut log, PathBuf::from(parser.value()?))?,
            Long("cgroup") => once("--cgroup", &mut cgroup, PathBuf::from(parser.value()?))?,
            Long("timeline") => once("--timeline", &mut timeline, PathBuf::from(parser.value()?))?,
            Value(word) if verb.is_none() => {
                let word = word.to_string_lossy().into_owned();
                let client = Client::named(&word);
                if client.is_some() || matches!(word.as_str(), "man" | "completions") {
                    let for_run = [&outcome, &timeline, &log, &cgroup];
                    if config.is_some() || for_run.into_iter().any(Option::is_some) {
                        return Err(format!("'{word}' takes no option before it").into());
                    }
                    return match client {
                        Some(kind) => parse_client(kind, parser),
                        None => parse_document(&word, parser),
                    };
                }
                verb = Some(word);
            }
            other => return Err(other.unexpected()),
        }
    }
    let needs_config = "give the spec with --config JSON or --config-file FILE";
    match verb.as_deref() {
        None => {
            Ok(Command::Run { config: config.ok_or(needs_config)?, outcome, timeline, log, cgroup })
        }
        Some(verb) if [&outcome, &timeline, &log, &cgroup].into_iter().any(Option::is_some) => Err(
            format!("--outcome, --timeline, --log and --cgroup are for a run, not for '{verb}'")
                .into(),
        ),
        Some("check") => Ok(Command::Check(config.ok_or(needs_config)?)),
        Some("template") => Ok(Command::Template(config.ok_or(needs_config)?)),
        Some("probe") if config.is_some() => Err("'probe' takes no spec".into()),
        Some("probe") => Ok(Command::Probe),
        Some(other) => Err(format!("'{other}' is not a command; see mote --help").into()),
    }
}

fn parse_document(verb: &str, mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut document = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(Document::Help)),
            Value(word) if document.is_none() => {
                document = Some(word.parse_with(|word| {
                    Document::named(verb, word).ok_or("it must be one that mote --help names")
                })?);
            }
            other => return Err(other.unexpected()),
        }
    }
    Ok(Command::Print(document.ok_or("give its name; see mote --help")?))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Client {
    Exec,
    Pty,
    Cp,
}

impl Client {
    fn named(word: &str) -> Option<Client> {
        match word {
            "exec" => Some(Client::Exec),
            "pty" => Some(Client::Pty),
            "cp" => Some(Client::Cp),
            _ => None,
        }
    }
}

fn parse_client(client: Client, mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut env = Vec::new();
    let (mut user, mut workdir, mut timeout, mut wait, mut socket) = (None, None, None, None, None);
    let mut words: Vec<OsString> = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(Document::Help)),
            Long("wait") => {
                once("--wait", &mut wait, parsed("--wait", parser.value()?, duration)?)?;
            }
            Long("timeout") if client == Client::Exec => {
                once("--timeout", &mut timeout, parsed("--timeout", parser.value()?, duration)?)?;
            }
            Long("env") if client != Client::Cp => env.push(variable(parser.value()?)?),
            Long("user") if client != Client::Cp => {
                once(
                    "--user",
                    &mut user,
                    parsed("--user", parser.value()?, |user| Ok(user.into()))?,
                )?;
            }
            Long("workdir") if client != Client::Cp => {
                once("--workdir", &mut workdir, parser.value()?.into())?;
            }
            Value(word) if socket.is_none() => socket = Some(PathBuf::from(word)),
            Value(word) if client == Client::Cp => words.push(word),
            // Everything after the command's name belongs to the command, options too.
            Value(word) => {
                words.push(word);
                words.extend(parser.raw_args()?);
            }
            other => return Err(other.unexpected()),
        }
    }
    let socket = socket.ok_or("give the path of the box's socket")?;
    let target = Target { socket, wait };
    if client == Client::Cp {
        let [source, destination] =
            <[OsString; 2]>::try_from(words).map_err(|_| "give SOCKET, SRC and DST")?;
        return Ok(Command::Cp(Cp { target, route: Route::parse(source, destination)? }));
    }
    if words.is_empty() {
        return Err("give the command to run after the socket".into());
    }
    let cmd = words.into_iter().map(Text::from).collect();
    let program = Program { cmd, env, user, workdir, process: None };
    Ok(match client {
        Client::Exec => {
            Command::Exec(Exec { target, program, timeout: timeout.unwrap_or(NO_TIMEOUT) })
        }
        _ => Command::Pty(Pty { target, program }),
    })
}

fn variable(entry: OsString) -> Result<Text, String> {
    match entry.as_bytes().iter().position(|byte| *byte == b'=') {
        None | Some(0) => Err(format!("--env is {entry:?}; it must be NAME=VALUE")),
        Some(_) => Ok(entry.into()),
    }
}

/// An option's value, which is text that `parse` reads.
fn parsed<T>(
    name: &str,
    value: OsString,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, String> {
    let text = value.to_str().ok_or_else(|| format!("{name} is {value:?}; it must be UTF-8"))?;
    parse(text).map_err(|problem| format!("{name} is {value:?}; {problem}"))
}

fn duration(text: &str) -> Result<Duration, String> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let scale = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("it must be a number of ms, s, m or h, such as 1.5s".into()),
    };
    let number: f64 =
        text[..text.len() - unit.len()].parse().map_err(|_| "it must start with a number")?;
    Duration::try_from_secs_f64(number * scale)
        .ok()
        .filter(|duration| !duration.is_zero() && *duration <= NO_TIMEOUT)
        .ok_or_else(|| "it must be more than 0 and at most ten years".into())
}

fn give_spec(slot: &mut Option<Config>, config: Config) -> Result<(), String> {
    match (slot.replace(config), &slot) {
        (None, _) => Ok(()),
        (Some(Config::Text(_)), Some(Config::Text(_))) => Err("--config is given twice".into()),
        (Some(Config::File(_)), Some(Config::File(_))) => {
            Err("--config-file is given twice".into())
        }
        _ => Err("--config and --config-file both give the spec; keep one".into()),
    }
}

fn once<T>(name: &str, slot: &mut Option<T>, value: T) -> Result<(), lexopt::Error> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("{name} is given twice").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    fn parsed(words: &[&str]) -> Result<Command, String> {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn the_contract_form_runs() {
        let expected = Command::Run {
            config: Config::Text("{}".into()),
            outcome: None,
            timeline: None,
            log: None,
            cgroup: None,
        };
        assert_eq!(parsed(&["--config", "{}"]).as_ref(), Ok(&expected));
        assert_eq!(parsed(&["--config={}"]).as_ref(), Ok(&expected));
    }

    #[test]
    fn commands_and_options() {
        let file = || Config::File("-".into());
        assert_eq!(parsed(&["check", "--config-file", "-"]), Ok(Command::Check(file())));
        assert_eq!(parsed(&["probe"]), Ok(Command::Probe));
        assert_eq!(parsed(&["--version"]), Ok(Command::Version));
        assert_eq!(parsed(&["man", "mote-spec.5"]), Ok(Command::Print(Document::Spec)));
        assert_eq!(parsed(&["completions", "-h"]), Ok(Command::Print(Document::Help)));
        assert_eq!(
            parsed(&[
                "--config-file",
                "-",
                "--outcome",
                "o",
                "--timeline=t",
                "--log",
                "l",
                "--cgroup=/g"
            ]),
            Ok(Command::Run {
                config: file(),
                outcome: Some("o".into()),
                timeline: Some("t".into()),
                log: Some("l".into()),
                cgroup: Some("/g".into())
            })
        );
    }

    fn program(cmd: &[&str]) -> Program {
        let cmd = cmd.iter().map(Text::from).collect();
        Program { cmd, env: vec![], user: None, workdir: None, process: None }
    }

    fn target() -> Target {
        Target { socket: "s".into(), wait: None }
    }

    fn exec(cmd: &[&str]) -> Command {
        Command::Exec(Exec { target: target(), program: program(cmd), timeout: NO_TIMEOUT })
    }

    #[test]
    fn a_commands_own_options_are_left_alone() {
        let ls = exec(&["ls", "-l", "--user", "x", "--", "y"]);
        assert_eq!(parsed(&["exec", "s", "--", "ls", "-l", "--user", "x", "--", "y"]), Ok(ls));
        let ls = exec(&["ls", "-l", "--help", "--", "y"]);
        assert_eq!(parsed(&["exec", "s", "ls", "-l", "--help", "--", "y"]), Ok(ls));
        assert_eq!(parsed(&["exec", "s", "--", "-x"]), Ok(exec(&["-x"])));
        let shell = Command::Pty(Pty { target: target(), program: program(&["sh"]) });
        assert_eq!(parsed(&["pty", "s", "sh"]), Ok(shell));
    }

    #[test]
    fn client_options_go_before_and_after_the_socket() {
        let expected = Command::Exec(Exec {
            target: Target { socket: "s".into(), wait: Some(Duration::from_secs(120)) },
            program: Program {
                env: vec!["A=1".into(), "B==".into()],
                user: Some("u:g".into()),
                workdir: Some("/w".into()),
                ..program(&["x"])
            },
            timeout: Duration::from_millis(1500),
        });
        let before = ["--env", "A=1", "--user=u:g", "--timeout", "1.5"];
        let after = ["--env=B==", "--workdir", "/w", "--wait=2m", "--", "x"];
        let words = [&["exec"][..], &before, &["s"], &after].concat();
        assert_eq!(parsed(&words), Ok(expected));
    }

    #[test]
    fn one_path_of_a_copy_is_the_guests() {
        let cp = |source: &str, destination: &str| match parsed(&["cp", "s", source, destination]) {
            Ok(Command::Cp(cp)) => Ok(cp.route),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        };
        let up = |from: &str, to: &str| Ok(Route::Upload { from: from.into(), to: to.into() });
        let down = |from: &str, to: &str| Ok(Route::Download { from: from.into(), to: to.into() });
        assert_eq!(cp("a", ":/b"), up("a", "/b"));
        assert_eq!(cp("d/a", ":/b/"), up("d/a", "/b/a"));
        assert_eq!(cp("-", ":/b"), up("-", "/b"));
        assert_eq!(cp(":/a", "-"), down("/a", "-"));
        assert_eq!(cp(":/a", "."), down("/a", "."));
        for (source, destination) in
            [("a", "b"), (":/a", ":/b"), ("a", ":b"), ("a", ":"), ("-", ":/b/"), ("..", ":/b/")]
        {
            assert!(cp(source, destination).is_err(), "{source} {destination}");
        }
    }

    #[test]
    fn bytes_of_the_guest_are_carried_as_they_are() {
        let bytes = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        let parse = |words: &[u8]| parse(words.split(|byte| *byte == b' ').map(bytes));
        let exec = parse(b"exec --env A=\xff --workdir /\xfe s ls \xfd");
        let Ok(Command::Exec(Exec { program, .. })) = exec else { panic!("a command") };
        assert_eq!(program.cmd, [Text::from("ls"), bytes(b"\xfd").into()]);
        assert_eq!(program.env, [Text::from(bytes(b"A=\xff"))]);
        assert_eq!(program.workdir, Some(bytes(b"/\xfe").into()));
        let Ok(Command::Cp(cp)) = parse(b"cp s \xff :/d/") else { panic!("a copy") };
        let to = bytes(b"/d/\xff").into();
        assert_eq!(cp.route, Route::Upload { from: bytes(b"\xff").into(), to });
        // What is text is refused by name.
        for (words, expected) in [
            (&b"--config \xff"[..], r#"--config is "\xFF"; it must be UTF-8"#),
            (b"exec --user \xff s x", r#"--user is "\xFF"; it must be UTF-8"#),
            (b"exec --env \xff s x", r#"--env is "\xFF"; it must be NAME=VALUE"#),
            (b"cp s :\xff x", "':\u{fffd}' is not an absolute path, as paths in the guest must be"),
        ] {
            assert_eq!(parse(words), Err(expected.into()));
        }
    }

    #[test]
    fn durations_have_units() {
        for (text, ms) in
            [("30", 30_000), ("1.5s", 1500), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in
            ["", "s", "-1", "0", "0.0ms", "1d", "1 s", "1e9h", "inf", "NaN", "1.2.3", "99999999h"]
        {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn misuse_names_what_is_wrong() {
        for (words, expected) in [
            (&["--config", "{}", "--config={}"][..], "--config is given twice"),
            (&["--config-file", "a", "--config-file", "b"], "--config-file is given twice"),
            (
                &["--config", "{}", "--config-file", "x"],
                "--config and --config-file both give the spec; keep one",
            ),
            (
                &["exec", "--timeout", "0", "s", "x"],
                "--timeout is \"0\"; it must be more than 0 and at most ten years",
            ),
            (
                &["exec", "--wait", "1d", "s", "x"],
                "--wait is \"1d\"; it must be a number of ms, s, m or h, such as 1.5s",
            ),
            (&["exec", "--env", "x", "s", "ls"], "--env is \"x\"; it must be NAME=VALUE"),
        ] {
            assert_eq!(parsed(words), Err(expected.into()));
        }
    }

    #[test]
    fn misuse_is_refused() {
        for words in [
            &[][..],
            &["--config"],
            &["--config", "{}", "--config", "{}"],
            &["--config", "{}", "--config-file", "x"],
            &["--nonsense"],
            &["run", "--config", "{}"],
            &["probe", "--config", "{}"],
            &["check"],
            &["check", "--config", "{}", "--outcome", "x"],
            &["--config", "{}", "exec", "s", "x"],
            &["exec"],
            &["exec", "s"],
            &["exec", "s", "--"],
            &["exec", "--env", "x", "s", "ls"],
            &["exec", "--env", "=x", "s", "ls"],
            &["exec", "--timeout", "0", "s", "ls"],
            &["exec", "--user", "a", "--user", "b", "s", "ls"],
            &["pty", "--timeout", "1", "s", "ls"],
            &["cp", "s", ":/a"],
            &["cp", "s", ":/a", "b", "c"],
            &["cp", "--user", "u", "s", ":/a", "b"],
            &["man"],
            &["man", "mote.2"],
            &["completions", "bash", "zsh"],
            &["completions", "mote.1"],
            &["--config", "{}", "man", "mote.1"],
        ] {
            assert!(parsed(words).is_err(), "{words:?}");
        }
    }
}
