//! What `mote-oci` says: one line on standard error, and the same in the log that an engine names, as it reads it.
//!
//! podman takes its own exit code from the words of an error in the log, which must then be the only line there: 127
//! for "no such file or directory" and "executable file not found in $PATH", 126 for "permission denied". So warnings
//! are in the log only where somebody asks with `--debug`.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::arguments::{Format, Global};
use crate::host::logs::rfc3339;

/// This moment, as RFC 3339 writes it.
pub fn now() -> String {
    rfc3339(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// A time since 1970, as RFC 3339 writes it.
pub fn time(since_1970: Duration) -> String {
    rfc3339(since_1970)
}

/// Reports what a command fails of.
pub fn error(global: &Global, message: &str) {
    let message = one_line(message);
    // Standard error may be a container's, which nobody has to read.
    let _ = writeln!(std::io::stderr(), "mote-oci: {message}");
    append(global, "error", &message);
}

/// Notes what is probably not as wanted.
pub fn warn(global: &Global, message: &str) {
    if global.debug {
        append(global, "warning", &one_line(message));
    }
}

fn one_line(message: &str) -> String {
    message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn append(global: &Global, level: &str, message: &str) {
    let Some(path) = &global.log else { return };
    let line = line(global.format, level, message, &now());
    // A log that cannot be written to has no other place to say so than standard error, where the message is.
    let opened = File::options().append(true).create(true).open(path);
    if let Err(error) = opened.and_then(|mut file| file.write_all(line.as_bytes())) {
        let _ =
            writeln!(std::io::stderr(), "mote-oci: write to the log {}: {error}", path.display());
    }
}

/// A line as runc and crun write it.
fn line(format: Format, level: &str, message: &str, time: &str) -> String {
    match format {
        Format::Json => format!("{}\n", json!({"level": level, "msg": message, "time": time})),
        Format::Text => format!("time=\"{time}\" level={level} msg={message:?}\n"),
    }
}

/// The words of an error that engines know, where mote's own differ: podman, its tests and containerd look for runc's,
/// which are `exec: "x": permission denied`.
pub fn in_engines_words(code: Option<u8>, message: &str) -> String {
    let has = |words: &str| message.to_ascii_lowercase().contains(words);
    match code {
        Some(127)
            if !has("no such file or directory") && !has("executable file not found in $path") =>
        {
            format!("{message}: no such file or directory")
        }
        Some(126) if !has("permission denied") => format!("exec: {message}: permission denied"),
        _ => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_engines_read_them() {
        let json = line(Format::Json, "error", "say \"x\"", "T");
        assert_eq!(json, "{\"level\":\"error\",\"msg\":\"say \\\"x\\\"\",\"time\":\"T\"}\n");
        let text = line(Format::Text, "error", "say \"x\"", "T");
        assert_eq!(text, "time=\"T\" level=error msg=\"say \\\"x\\\"\"\n");
    }

    #[test]
    fn an_error_is_one_line_of_the_log() {
        let path = std::env::temp_dir().join(format!("mote-oci-log-{}", std::process::id()));
        let global = Global { log: Some(path.clone()), format: Format::Json, ..Global::default() };
        warn(&global, "not here");
        error(&global, "two\nlines");
        let text = std::fs::read_to_string(&path).expect("written");
        assert!(text.starts_with(r#"{"level":"error","msg":"two lines","time":"2"#), "{text}");
        assert_eq!(text.lines().count(), 1);
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn engines_find_their_words() {
        for (code, message, expected) in [
            (Some(127), "x is not there", "x is not there: no such file or directory"),
            (Some(127), "x: No such file or directory", "x: No such file or directory"),
            (Some(126), "x is a directory", "exec: x is a directory: permission denied"),
            (Some(125), "x", "x"),
            (None, "x", "x"),
        ] {
            assert_eq!(in_engines_words(code, message), expected);
        }
    }
}
