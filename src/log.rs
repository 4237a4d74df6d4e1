//! mote's own messages: lines that start with `mote:`, on stderr unless `--log` names a file. stdout belongs to the guest.
//! Nothing here can fail, panic or wait for long: if stderr is closed or full, messages are lost and
//! the box goes on.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::OnceLock;
use std::time::Duration;

use crate::sys::{self, Interest};

/// Bytes that a writable pipe takes without waiting (`PIPE_BUF`, pipe(7)).
const PIPE_BUF: usize = 4096;
/// How long to wait for a full stderr.
const PATIENCE: Duration = Duration::from_millis(500);

/// The file that messages go to in place of stderr.
static FILE: OnceLock<File> = OnceLock::new();

/// Has messages go to this file from now on; only the first counts.
pub fn to(file: File) {
    let _ = FILE.set(file);
}

/// Whether messages go to a file of their own.
pub fn is_file() -> bool {
    FILE.get().is_some()
}

/// Where messages go.
pub fn target() -> BorrowedFd<'static> {
    static STDERR: OnceLock<io::Stderr> = OnceLock::new();
    match FILE.get() {
        Some(file) => file.as_fd(),
        None => STDERR.get_or_init(io::stderr).as_fd(),
    }
}

/// The same by number. It may be called in a signal handler.
pub fn descriptor() -> RawFd {
    FILE.get().map_or(libc::STDERR_FILENO, AsRawFd::as_raw_fd)
}

/// Something failed.
pub fn error(message: &str) {
    line("", message);
}

/// Something is probably a mistake.
pub fn warn(message: &str) {
    line("warning: ", message);
}

/// Something that a reader of an earlier message wants to know.
pub fn info(message: &str) {
    line("", message);
}

/// For errors that a guest could cause again and again: only the first is logged.
#[derive(Debug, Default)]
pub struct LogOnce {
    made: bool,
}

impl LogOnce {
    /// Logs an error, unless one was logged before. Returns whether it did.
    pub fn error(&mut self, message: &str) -> bool {
        let first = !std::mem::replace(&mut self.made, true);
        if first {
            error(message);
        }
        first
    }
}

fn line(kind: &str, message: &str) {
    if cfg!(fuzzing) {
        // A fuzzer would log thousands of errors a second.
        return;
    }
    // One write, so that lines of several threads do not mix; no control characters, so that text
    // from a guest cannot move the cursor.
    let message: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut text = format!("mote: {kind}{message}");
    while text.len() >= PIPE_BUF {
        text.pop();
    }
    text.push('\n');
    // If stderr is full and nobody reads it, the line is lost: it must not hold up the end of a box.
    let ready = sys::poll([Interest::write(&target())], Some(PATIENCE));
    if ready.is_ok_and(|[ready]| ready) {
        let _ = match FILE.get() {
            Some(mut file) => file.write_all(text.as_bytes()),
            None => io::stderr().write_all(text.as_bytes()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_complained_of_once() {
        let mut complaint = LogOnce::default();
        assert!(complaint.error("a test complains of a guest"));
        assert!(!complaint.error("and once more"));
    }
}
