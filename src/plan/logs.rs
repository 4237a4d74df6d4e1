//! Logs as the runtime of 3.2 and 3.3 wants them (contract §2.11): the files of both streams, and what else
//! gets their lines.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use crate::output_file::OutputFile;
use crate::spec::json::Report;
use crate::spec::{self, LogConfig};

/// Name of the file for stderr, beside `console_output`.
const STDERR_FILE: &str = "console.err.log";
/// Name of the log, beside `console_output`.
const JSON_FILE: &str = "container.json";

/// The files for a box's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logs {
    /// Gets the entrypoint's standard output.
    pub stdout: OutputFile,
    /// Gets its standard error.
    pub stderr: OutputFile,
    /// Bytes with which each of these two is emptied.
    pub limit_bytes: u64,
    /// What else gets the lines.
    pub driver: LogDriver,
}

/// What gets the entrypoint's lines beside the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogDriver {
    /// A file of JSON objects.
    JsonFile(JsonFile),
    /// A syslog server.
    Syslog(Syslog),
    /// Nothing.
    None,
}

/// A log of JSON objects, one a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonFile {
    /// The log.
    pub file: OutputFile,
    /// Bytes with which it is put away, at least 1.
    pub max_bytes: u64,
    /// Most files, with those that were put away, at least 1.
    pub max_files: u32,
}

/// A syslog server, and what it is told with each line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Syslog {
    /// Its UDP port.
    pub address: SocketAddr,
    /// Facility and severity (RFC 3164 §4.1.1).
    pub priority: u8,
    /// The program's name.
    pub tag: String,
}

/// Severity "informational" (RFC 3164 §4.1.1).
const INFORMATIONAL: u8 = 6;

/// Most files of one log: each time one is put away, all are renamed.
const MOST_FILES: u32 = 1000;

/// The logs beside this `console_output`, if they can be written; `guests` as in [`OutputFile::new`].
pub(super) fn plan(
    console: &Path,
    config: &LogConfig,
    guests: &[PathBuf],
    report: &mut Report,
) -> Option<Logs> {
    let [stderr, json] = [STDERR_FILE, JSON_FILE].map(|name| console.with_file_name(name));
    if [&stderr, &json].into_iter().any(|other| other.file_name() == console.file_name()) {
        report.error(
            "console_output",
            "has the name of a log that lies beside it; choose another, such as console.log",
        );
    }
    let has_json = config.driver == spec::LogDriver::JsonFile;
    let files = [Some(console), Some(&stderr), Some(json.as_path()).filter(|_| has_json)];
    let is_other = |path: &&Path| path.metadata().is_ok_and(|other| !other.is_file());
    for path in files.into_iter().flatten().filter(is_other) {
        let problem = format!("{} is no regular file, as logs must be", path.display());
        report.error("console_output", problem);
    }
    let value = |option: &Option<String>, name, default| Value {
        path: format!("log_config.options.{name}"),
        text: option.clone().unwrap_or_else(|| String::from(default)),
    };
    // All are judged, whatever the driver is.
    let max_bytes = value(&config.max_size, "max-size", "10m").read(
        "bytes, at least 1, such as \"10m\" (b, k, m and g are units)",
        report,
        |text| bytes(text).filter(|bytes| *bytes > 0),
    );
    let max_files = value(&config.max_file, "max-file", "3").read(
        &format!("a number from 1 to {MOST_FILES}"),
        report,
        |text| text.parse().ok().filter(|files| (1..=MOST_FILES).contains(files)),
    );
    let address = value(&config.syslog_address, "syslog-address", "udp://localhost:514").read(
        "udp://ADDRESS:PORT, with an IP address or localhost: mote asks no name server, and speaks no other protocol",
        report,
        udp_address,
    );
    let facility = value(&config.syslog_facility, "syslog-facility", "daemon").read(
        &format!("one of {}", FACILITIES.map(|(name, _)| name).join(", ")),
        report,
        |text| FACILITIES.iter().find(|(name, _)| *name == text).map(|(_, number)| *number),
    );
    let file = |path: &Path| OutputFile::new(path, Some(guests));
    let (max_bytes, max_files) = (max_bytes?, max_files?);
    Some(Logs {
        stdout: file(console),
        stderr: file(&stderr),
        limit_bytes: max_bytes.saturating_mul(max_files.into()),
        driver: match config.driver {
            spec::LogDriver::None => LogDriver::None,
            spec::LogDriver::JsonFile => {
                LogDriver::JsonFile(JsonFile { file: file(&json), max_bytes, max_files })
            }
            spec::LogDriver::Syslog => LogDriver::Syslog(Syslog {
                address: address?,
                priority: facility? * 8 + INFORMATIONAL,
                tag: config.tag.clone().unwrap_or_else(|| "a3s-box".into()),
            }),
        },
    })
}

/// An option's value, and where it stands.
struct Value {
    path: String,
    text: String,
}

impl Value {
    /// What `read` makes of it; nothing is an error that says what is wanted.
    fn read<T>(
        self,
        wanted: &str,
        report: &mut Report,
        read: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let value = read(&self.text);
        if value.is_none() {
            report.error(self.path, format!("is \"{}\", must be {wanted}", self.text));
        }
        value
    }
}

/// A number of bytes as the runtime writes it: `4096`, `10m`, `1GB`.
fn bytes(text: &str) -> Option<u64> {
    let text = text.trim().to_lowercase();
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[number.len()..] {
        "" | "b" => 1,
        "k" | "kb" => 1 << 10,
        "m" | "mb" => 1 << 20,
        "g" | "gb" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// `udp://ADDRESS:PORT`, or without the scheme.
fn udp_address(text: &str) -> Option<SocketAddr> {
    let address = text.strip_prefix("udp://").unwrap_or(text);
    match address.strip_prefix("localhost:") {
        Some(port) => Some((Ipv4Addr::LOCALHOST, port.parse().ok()?).into()),
        None => address.parse().ok(),
    }
}

/// Syslog's facilities (syslog(3)) by their names in syslog.conf(5).
const FACILITIES: [(&str, u8); 20] = [
    ("kern", 0),
    ("user", 1),
    ("mail", 2),
    ("daemon", 3),
    ("auth", 4),
    ("syslog", 5),
    ("lpr", 6),
    ("news", 7),
    ("uucp", 8),
    ("cron", 9),
    ("authpriv", 10),
    ("ftp", 11),
    ("local0", 16),
    ("local1", 17),
    ("local2", 18),
    ("local3", 19),
    ("local4", 20),
    ("local5", 21),
    ("local6", 22),
    ("local7", 23),
];

impl fmt::Display for Logs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Logs { stdout, stderr, limit_bytes, driver } = self;
        let [stdout, stderr] = [stdout, stderr].map(|file| file.path.display());
        writeln!(f, "{stdout}, stderr {stderr} (each emptied at {limit_bytes} bytes)")?;
        write!(f, "log        ")?;
        match driver {
            LogDriver::JsonFile(JsonFile { file, max_bytes, max_files }) => {
                let path = file.path.display();
                write!(f, "{path} (put away at {max_bytes} bytes, {max_files} files)")
            }
            LogDriver::Syslog(Syslog { address, .. }) => write!(f, "syslog at {address}"),
            LogDriver::None => f.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Output;
    use crate::plan::testing::{errors, plan};
    use crate::spec::Spec;

    fn config(driver: spec::LogDriver) -> LogConfig {
        LogConfig {
            driver,
            max_size: None,
            max_file: None,
            syslog_address: None,
            syslog_facility: None,
            tag: None,
        }
    }

    fn logs(change: impl FnOnce(&mut LogConfig)) -> Logs {
        let mut config = config(spec::LogDriver::JsonFile);
        change(&mut config);
        let with = |spec: &mut Spec| {
            spec.console_output = Some("/tmp/console.log".into());
            spec.log_config = Some(config);
        };
        match plan(with).expect("a plan").output {
            Output::Logs(logs) => logs,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn logs_lie_beside_console_output() {
        let logs = logs(|_| ());
        assert_eq!(logs.stderr.path, Path::new("/tmp/console.err.log"));
        assert_eq!(logs.limit_bytes, 30 << 20);
        let LogDriver::JsonFile(JsonFile { file, max_bytes, max_files }) = logs.driver else {
            panic!("{logs:?}")
        };
        assert_eq!(file.path, Path::new("/tmp/container.json"));
        assert_eq!((max_bytes, max_files), (10 << 20, 3));
    }

    #[test]
    fn without_a_console_file_nothing_is_logged() {
        let plan = plan(|s| s.log_config = Some(config(spec::LogDriver::JsonFile)));
        assert_eq!(plan.expect("a plan").output, Output::Streams);
    }

    #[test]
    fn syslog_has_an_address_and_a_priority() {
        let driver = logs(|c| c.driver = spec::LogDriver::Syslog).driver;
        let (address, tag) = ("127.0.0.1:514".parse().expect("one"), "a3s-box".into());
        assert_eq!(driver, LogDriver::Syslog(Syslog { address, priority: 30, tag }));
        let driver = logs(|c| {
            c.driver = spec::LogDriver::Syslog;
            c.syslog_address = Some("udp://[::1]:5140".into());
            c.syslog_facility = Some("local7".into());
            c.tag = Some("web".into());
        })
        .driver;
        let (address, tag) = ("[::1]:5140".parse().expect("one"), "web".into());
        assert_eq!(driver, LogDriver::Syslog(Syslog { address, priority: 190, tag }));
    }

    #[test]
    fn sizes_are_the_runtimes() {
        for (text, expected) in [
            ("4096", Some(4096)),
            ("5b", Some(5)),
            ("10m", Some(10 << 20)),
            (" 2KB ", Some(2 << 10)),
            ("1G", Some(1 << 30)),
            ("ten", None),
            ("", None),
            ("m", None),
            ("-1", None),
            ("1.5m", None),
            ("1t", None),
            ("20000000000g", None),
        ] {
            assert_eq!(bytes(text), expected, "{text}");
        }
    }

    #[test]
    fn options_that_cannot_be_honoured_are_refused_by_their_names() {
        type Change = fn(&mut LogConfig);
        let changes: [(Change, &str); 8] = [
            (|c| c.max_size = Some("ten".into()), "max-size: is \"ten\", must be bytes"),
            (|c| c.max_size = Some("0".into()), "max-size: is \"0\", must be bytes, at least 1"),
            (|c| c.max_file = Some("0".into()), "max-file: is \"0\", must be a number from 1"),
            (|c| c.max_file = Some("many".into()), "max-file: is \"many\", must be a number"),
            (
                |c| c.syslog_address = Some("tcp://10.0.0.1:514".into()),
                "syslog-address: is \"tcp://10.0.0.1:514\", must be udp://ADDRESS:PORT",
            ),
            (
                |c| c.syslog_address = Some("udp://logs.example:514".into()),
                "syslog-address: is \"udp://logs.example:514\", must be udp://",
            ),
            (|c| c.syslog_address = Some("10.0.0.1".into()), "syslog-address: is \"10.0.0.1\""),
            (
                |c| c.syslog_facility = Some("local8".into()),
                "syslog-facility: is \"local8\", must be one of kern",
            ),
        ];
        for (change, expected) in changes {
            let mut config = config(spec::LogDriver::None);
            change(&mut config);
            let errors = errors(|s| {
                s.console_output = Some("/tmp/console.log".into());
                s.log_config = Some(config);
            });
            let expected = format!("log_config.options.{expected}");
            assert!(matches!(&errors[..], [e] if e.starts_with(&expected)), "{errors:?}");
        }
    }

    #[test]
    fn what_does_not_go_with_logs_is_refused() {
        for (console, limit, expected) in [
            ("/tmp/container.json", None, "console_output: has the name of a log"),
            ("/tmp/console.err.log", None, "console_output: has the name of a log"),
            ("/dev/null", None, "console_output: /dev/null is no regular file, as logs must be"),
            ("/tmp/console.log", Some(5), "console_limit_bytes: is for boxes without log_config"),
        ] {
            let errors = errors(|s| {
                s.console_output = Some(console.into());
                s.console_limit_bytes = limit;
                s.log_config = Some(config(spec::LogDriver::JsonFile));
            });
            assert!(matches!(&errors[..], [e] if e.starts_with(expected)), "{errors:?}");
        }
    }
}
