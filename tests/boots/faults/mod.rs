//! The fault matrix: what a failing host, a careless caller or a dying back-end does to a box, and what
//! is promised then: the exit code, a line that says why, and nothing left behind. Rows that belong to
//! one feature are with that feature's tests.

use std::process::Command;

use serde_json::json;

use crate::common::{Ran, TestBox};

mod back_ends;
mod callers;
mod ends;
mod host;

/// A box that runs this script, on mote's own streams.
fn box_that(script: &str) -> TestBox {
    TestBox::busybox().shell(script).with("console_output", json!(null))
}

/// The output of a command that has run mote.
fn finished(test: &TestBox, command: &mut Command) -> Ran {
    test.finished(command.output().expect("mote runs"))
}

/// Fails unless the box did not start and this line, and no other, says why.
fn assert_not_started(ran: &Ran, parts: &[&str]) {
    assert_eq!(ran.code, 125, "{}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.starts_with("mote: "), "{}", ran.stderr);
    for part in parts {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
}
