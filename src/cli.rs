//! The command line (contract §2.2, design §5).

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::prelude::*;

/// `--help`.
pub const HELP: &str = "\
mote: run one sandbox as a virtual machine

usage:
  mote --config JSON         run the box that the InstanceSpec describes
  mote --config-file FILE    the same, from a file (- for standard input)
  mote check --config JSON | --config-file FILE
                             print the plan, or every error in the spec
  mote probe                 say whether this host can run boxes

options for a run:
  --outcome FILE             write how the box ended, as JSON
  --timeline FILE            write when what happened, as JSON (or MOTE_TIMELINE)

  -h, --help                 print this
  -V, --version              print the version

environment: MOTE_VIRTIOFSD, MOTE_KERNEL and MOTE_INITRAMFS name files to use
instead of the ones found or built in; MOTE_DEBUG=1 shows all kernel messages.
";

/// Where the spec's text comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum Config {
    /// On the command line.
    Text(String),
    /// In this file; `-` is standard input.
    File(PathBuf),
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
    },
    /// Print the plan or the errors.
    Check(Config),
    /// Examine the host.
    Probe,
    /// Print the help text.
    Help,
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
    let mut verb: Option<String> = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Long("config") => {
                let text = parser.value()?.string()?;
                once("--config or --config-file", &mut config, Config::Text(text))?;
            }
            Long("config-file") => {
                let file = PathBuf::from(parser.value()?);
                once("--config or --config-file", &mut config, Config::File(file))?;
            }
            Long("outcome") => once("--outcome", &mut outcome, PathBuf::from(parser.value()?))?,
            Long("timeline") => once("--timeline", &mut timeline, PathBuf::from(parser.value()?))?,
            Value(word) if verb.is_none() => verb = Some(word.string()?),
            other => return Err(other.unexpected()),
        }
    }
    let needs_config = "give the spec with --config JSON or --config-file FILE";
    match verb.as_deref() {
        None => Ok(Command::Run { config: config.ok_or(needs_config)?, outcome, timeline }),
        Some(verb) if outcome.is_some() || timeline.is_some() => {
            Err(format!("--outcome and --timeline are for a run, not for '{verb}'").into())
        }
        Some("check") => Ok(Command::Check(config.ok_or(needs_config)?)),
        Some("probe") if config.is_some() => Err("'probe' takes no spec".into()),
        Some("probe") => Ok(Command::Probe),
        Some(other) => Err(format!("'{other}' is not a command; see mote --help").into()),
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

    fn parsed(words: &[&str]) -> Result<Command, String> {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn the_contract_form_runs() {
        let expected =
            Command::Run { config: Config::Text("{}".into()), outcome: None, timeline: None };
        assert_eq!(parsed(&["--config", "{}"]).as_ref(), Ok(&expected));
        assert_eq!(parsed(&["--config={}"]).as_ref(), Ok(&expected));
    }

    #[test]
    fn commands_and_options() {
        let file = || Config::File("-".into());
        assert_eq!(parsed(&["check", "--config-file", "-"]), Ok(Command::Check(file())));
        assert_eq!(parsed(&["probe"]), Ok(Command::Probe));
        assert_eq!(parsed(&["--version"]), Ok(Command::Version));
        assert_eq!(
            parsed(&["--config-file", "-", "--outcome", "o", "--timeline=t"]),
            Ok(Command::Run {
                config: file(),
                outcome: Some("o".into()),
                timeline: Some("t".into())
            })
        );
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
        ] {
            assert!(parsed(words).is_err(), "{words:?}");
        }
    }
}
