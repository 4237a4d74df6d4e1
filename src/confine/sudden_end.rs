//! Ends of the process without an [`outcome::Outcome`]: a refused system call, a fatal signal, a panic.
//! Each is reported by one line on stderr and in the outcome file, with [`outcome::BROKEN`] as exit code.
//! This works in every thread, wherever it is, although its filter allows hardly any calls.

use std::cell::Cell;
use std::fmt::{Arguments, Write};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use syscalls::Sysno;

use crate::log;
use crate::outcome;
use crate::sys::fatal::{self, Fatal};

/// Where a sudden end is reported besides stderr.
static OUTCOME_FILE: AtomicI32 = AtomicI32::new(NO_FILE);

/// There is no outcome file.
const NO_FILE: RawFd = -1;

/// Some thread has taken over writing the outcome, and is doing so or has done so.
const CLAIMED: RawFd = -2;

/// The exit code of a sudden end.
static EXIT_CODE: AtomicI32 = AtomicI32::new(outcome::BROKEN as i32);

/// Installs the handlers for sudden ends: they report to stderr, and to this descriptor if there is one,
/// which must stay open. Must be called before there are threads and filters.
///
/// # Errors
/// The host refuses a signal handler.
pub fn report(outcome_file: Option<RawFd>) -> Result<()> {
    OUTCOME_FILE.store(outcome_file.unwrap_or(NO_FILE), Ordering::Relaxed);
    fatal::on_fatal(end_fatally).context("watch for fatal signals")
}

/// Decides the exit code; the caller then writes the outcome. A sudden end of another thread can change
/// neither any more. If one has happened already, this waits until that thread ends the process.
pub fn decide(code: u8) {
    if OUTCOME_FILE.swap(CLAIMED, Ordering::Relaxed) == CLAIMED {
        fatal::wait(END_LIMIT);
    }
    EXIT_CODE.store(code.into(), Ordering::Relaxed);
}

/// How long a thread waits for another thread to end the process.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Sets the calling thread's name for reports, of which the first 15 bytes are kept.
pub(super) fn name_thread(name: &str) {
    let mut short = [b' '; MAX_NAME];
    for (to, from) in short.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    NAME.set(short);
}

/// Ends the process at once, with a message for stderr and for the outcome file.
pub fn end(kind: &str, message: Arguments<'_>) -> ! {
    let mut text = Text::new();
    let _ = text.write_fmt(message);
    // Leaves room for the text around it.
    let text = &text.as_bytes()[..text.len.min(900)];
    let mut line = Text::new();
    [b"mote: ", text, b"\n"].iter().for_each(|part| line.push(part));
    let file = OUTCOME_FILE.swap(CLAIMED, Ordering::Relaxed);
    if file == CLAIMED {
        fatal::wait(END_LIMIT);
    }
    if file >= 0 {
        let mut object = Text::new();
        object.push(b"{\"kind\":\"");
        object.push(kind.as_bytes());
        object.push(b"\",\"exit_code\":120,\"message\":\"");
        object.push(text);
        object.push(b"\"}\n");
        fatal::write_once(file, object.as_bytes());
    }
    fatal::write_once(log::descriptor(), line.as_bytes());
    fatal::exit_now(EXIT_CODE.load(Ordering::Relaxed))
}

fn end_fatally(cause: Fatal) -> ! {
    let name = NAME.get();
    let name = std::str::from_utf8(&name).unwrap_or("?").trim_end();
    match cause {
        Fatal::Refused(number) => {
            let call = usize::try_from(number).ok().and_then(Sysno::new);
            let call = call.map_or("unknown", |call| call.name());
            end(
                "refused",
                format_args!(
                    "thread {name} made the system call {call} ({number}), which mote never makes; ended the box at once: either mote has been broken into, or this is a bug to report"
                ),
            )
        }
        Fatal::MemoryGone => end(
            "memory-gone",
            format_args!(
                "thread {name} found no memory behind guest memory (SIGBUS): {}",
                outcome::MEMORY_GONE
            ),
        ),
        Fatal::BadAddress => end(
            "internal-error",
            format_args!("internal error in thread {name} (SIGSEGV), please report it"),
        ),
    }
}

/// Longest thread name in a report, in bytes.
const MAX_NAME: usize = 15;

thread_local! {
    /// The calling thread's name for reports. It has no destructor, so that a signal handler may
    /// read it.
    static NAME: Cell<[u8; MAX_NAME]> = const { Cell::new([b'?'; MAX_NAME]) };
}

/// Text on the stack, because a signal handler must not allocate. Text that does not fit is cut off.
struct Text {
    bytes: [u8; 1024],
    len: usize,
}

impl Text {
    fn new() -> Self {
        Text { bytes: [0; 1024], len: 0 }
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn push(&mut self, bytes: &[u8]) {
        let room = &mut self.bytes[self.len..];
        let len = bytes.len().min(room.len());
        room[..len].copy_from_slice(&bytes[..len]);
        self.len += len;
    }
}

impl Write for Text {
    /// Replaces characters that move a cursor, or need an escape in JSON, by spaces.
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for byte in text.bytes() {
            let plain = (byte == b' ' || byte.is_ascii_graphic()) && !b"\"\\".contains(&byte);
            self.push(&[if plain { byte } else { b' ' }]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_plain_line() {
        let mut text = Text::new();
        write!(text, "at \"a\\b\"\n{}", "x".repeat(5000)).expect("cut");
        assert_eq!(text.len, 1024);
        assert!(text.as_bytes().starts_with(b"at  a b  xx"));
    }
}
