//! mote's own messages: lines on stderr that start with `mote:`. stdout belongs to the guest.
//! Nothing here can fail, panic or wait for long: if stderr is closed or full, messages are lost and
//! the box goes on.

use std::io::{self, Write};
use std::time::Duration;

use crate::sys::{self, Interest};

/// Bytes that a writable pipe takes without waiting (`PIPE_BUF`, pipe(7)).
const PIPE_BUF: usize = 4096;
/// How long to wait for a full stderr.
const PATIENCE: Duration = Duration::from_millis(500);

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
    let mut stderr = io::stderr();
    let ready = sys::poll([Interest::write(&stderr)], Some(PATIENCE));
    if ready.is_ok_and(|[ready]| ready) {
        let _ = stderr.write_all(text.as_bytes());
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
