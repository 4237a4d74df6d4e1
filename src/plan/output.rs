//! Where the guest's output goes: mote's own streams, one file, or logs.

use std::fmt;
use std::path::PathBuf;

use crate::output_file::OutputFile;
use crate::plan::logs::{self, Logs};
use crate::plan::paths::parent_problem;
use crate::spec::Spec;
use crate::spec::json::Report;

/// Where the guest's output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// To mote's own stdout and stderr.
    Streams,
    /// All of it to one file.
    File(ConsoleFile),
    /// The entrypoint's to its logs.
    Logs(Logs),
}

/// The file for the guest's output, and the most bytes it gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleFile {
    /// The file.
    pub file: OutputFile,
    /// Most bytes, at least 1.
    pub limit_bytes: u64,
}

/// What a console file may have when the spec does not say: more than anybody reads, and less than a disk
/// has that others share.
const CONSOLE_LIMIT_BYTES: u64 = 1 << 30;

/// What the spec says of the output, if that can be done; `guests` as in [`OutputFile::new`].
pub(super) fn plan(spec: &Spec, guests: &[PathBuf], report: &mut Report) -> Option<Output> {
    let Some(path) = &spec.console_output else {
        // There is a placeholder for what could not be read.
        if report.has_read("console_output") {
            if spec.console_limit_bytes.is_some() {
                report.warn("console_limit_bytes", "limits console_output, which is not given");
            }
            if spec.log_config.is_some() {
                report.warn(
                    "log_config",
                    "is about console_output, which is not given: nothing is logged",
                );
            }
        }
        return Some(Output::Streams);
    };
    let problem = match spec.log_config {
        None if path.is_dir() => Some(format!("{} is a directory; name a file", path.display())),
        _ => parent_problem(path),
    };
    if let Some(problem) = problem {
        report.error("console_output", problem);
    }
    let file = OutputFile::new(path, Some(guests));
    if let Some(problem) = file.warning() {
        report.warn("console_output", problem);
    }
    let Some(config) = &spec.log_config else {
        let limit_bytes = spec.console_limit_bytes.unwrap_or(CONSOLE_LIMIT_BYTES);
        if limit_bytes == 0 {
            report.error("console_limit_bytes", "is 0, must be at least 1");
        }
        return Some(Output::File(ConsoleFile { file, limit_bytes }));
    };
    if spec.console_limit_bytes.is_some() {
        report.error(
            "console_limit_bytes",
            "is for boxes without log_config, whose max-size and max-file bound the files; leave it out",
        );
    }
    logs::plan(path, config, guests, report).map(Output::Logs)
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Output::Streams => f.write_str("mote's stdout and stderr"),
            Output::File(ConsoleFile { file, limit_bytes }) => {
                write!(f, "{} (at most {limit_bytes} bytes)", file.path.display())
            }
            Output::Logs(logs) => logs.fmt(f),
        }
    }
}
