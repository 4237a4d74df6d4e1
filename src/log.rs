//! mote's own messages: lines on stderr that start with `mote:`. stdout belongs to the guest.
//! Nothing here can fail or panic; a closed stderr loses messages, not boxes.

use std::io::{self, Write};

/// Something failed.
pub fn error(message: &str) {
    line("", message);
}

/// Something is probably not meant.
pub fn warn(message: &str) {
    line("warning: ", message);
}

fn line(kind: &str, message: &str) {
    // One write, so that lines of several threads do not mix; no control characters, so that text
    // from a guest cannot move the cursor.
    let message: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let _ = io::stderr().write_all(format!("mote: {kind}{message}\n").as_bytes());
}
