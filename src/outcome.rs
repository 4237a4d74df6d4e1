//! How a box ended, and the exit code that says so. The table is part of the interface (README):
//!
//! | code | meaning |
//! |---|---|
//! | 0–255 | the entrypoint's own exit code |
//! | 128+n | signal n killed the entrypoint |
//! | 127 | the entrypoint was not found |
//! | 126 | the entrypoint is not executable |
//! | 125 | mote or the guest could not start it: spec, host, back-end, set-up |
//! | 124 | a back-end process died after the box's file systems were mounted |
//! | 123 | the guest kernel panicked or crashed |
//! | 122 | the guest ended without an exit status |
//! | 121 | stopped hard: a second signal, or the grace was over |
//! | 120 | mote itself is broken, or broken into: it made a system call that it never makes, or came upon a fault of its own; or the host took guest memory away |
//! | 2 | wrong command line, or `mote check` found errors |
//!
//! A guest program can exit with any of these numbers itself; `--outcome FILE` tells them apart.

use std::io::{self, Write};

use serde_json::json;

use crate::policy::refusals::Refusals;

/// Exit code for a wrong command line and for errors that `mote check` finds.
pub const USAGE: u8 = 2;

/// Exit code when mote itself breaks. After a refused system call, a fatal signal or a panic the process
/// ends at once, without an [`Outcome`] ([`crate::confine::sudden_end::end`]).
pub const BROKEN: u8 = 120;

/// Why guest memory may be gone, and what to change.
pub const MEMORY_GONE: &str = "the host, its tmpfs or its huge pages have run out, or a back-end has cut it short; give the host more memory, or the box less";

/// How a box ended.
#[derive(Debug)]
pub enum Outcome {
    /// The entrypoint called `exit`.
    Exited(u8),
    /// A signal killed the entrypoint.
    Signaled(u8),
    /// The guest started, but the entrypoint did not.
    EntrypointNotStarted {
        /// 125, 126 or 127.
        code: u8,
        /// What is wrong with it.
        reason: String,
    },
    /// mote could not start the box.
    NotStarted(anyhow::Error),
    /// The box is to be protected from its host, by what the host or mote lacks.
    TeeUnavailable(String),
    /// A back-end process died after the box's file systems were mounted (`on_backend_end` in `run.rs`).
    BackendDied(String),
    /// The guest kernel panicked or crashed.
    GuestCrashed(String),
    /// The guest ended, and no exit status of the entrypoint arrived.
    NoStatus(String),
    /// Stopped hard.
    Stopped(String),
    /// The host took guest memory away.
    MemoryGone(String),
    /// A fault of mote itself, or of the host, while the guest ran.
    InternalError(String),
}

impl Outcome {
    /// The process exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Outcome::Exited(code) => *code,
            Outcome::Signaled(signal) => 128 + signal,
            Outcome::EntrypointNotStarted { code, .. } => *code,
            Outcome::NotStarted(_) | Outcome::TeeUnavailable(_) => 125,
            Outcome::BackendDied(_) => 124,
            Outcome::GuestCrashed(_) => 123,
            Outcome::NoStatus(_) => 122,
            Outcome::Stopped(_) => 121,
            Outcome::MemoryGone(_) | Outcome::InternalError(_) => BROKEN,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Outcome::Exited(_) => "exited",
            Outcome::Signaled(_) => "signaled",
            Outcome::EntrypointNotStarted { .. } => "entrypoint-not-started",
            Outcome::NotStarted(_) => "not-started",
            Outcome::TeeUnavailable(_) => "tee-unavailable",
            Outcome::BackendDied(_) => "backend-died",
            Outcome::GuestCrashed(_) => "guest-crashed",
            Outcome::NoStatus(_) => "no-status",
            Outcome::Stopped(_) => "stopped",
            Outcome::MemoryGone(_) => "memory-gone",
            Outcome::InternalError(_) => "internal-error",
        }
    }

    /// One line for stderr, when the exit code alone is not the whole story.
    pub fn message(&self) -> Option<String> {
        match self {
            Outcome::Exited(_) | Outcome::Signaled(_) => None,
            Outcome::EntrypointNotStarted { reason, .. } => Some(reason.clone()),
            Outcome::NotStarted(error) => Some(format!("{error:#}")),
            Outcome::TeeUnavailable(reason)
            | Outcome::BackendDied(reason)
            | Outcome::GuestCrashed(reason)
            | Outcome::NoStatus(reason)
            | Outcome::Stopped(reason)
            | Outcome::MemoryGone(reason)
            | Outcome::InternalError(reason) => Some(reason.clone()),
        }
    }

    fn to_json(&self) -> serde_json::Value {
        let mut object = json!({ "kind": self.kind(), "exit_code": self.exit_code() });
        match self {
            Outcome::Exited(code) => object["code"] = json!(code),
            Outcome::Signaled(signal) => object["signal"] = json!(signal),
            _ => {}
        }
        if let Some(message) = self.message() {
            object["message"] = json!(message);
        }
        object
    }
}

/// How a box ended, and what is to be told of its life.
#[derive(Debug)]
pub struct Record {
    /// How it ended.
    pub outcome: Outcome,
    /// What it was not let connect to.
    pub refusals: Refusals,
    /// Whether the reports about it that its clients may have got were made up.
    pub simulated_attestation: bool,
}

impl From<Outcome> for Record {
    /// Of a box that has not run.
    fn from(outcome: Outcome) -> Self {
        Record { outcome, refusals: Refusals::default(), simulated_attestation: false }
    }
}

impl Record {
    /// The object that `--outcome FILE` receives.
    pub fn to_json(&self) -> serde_json::Value {
        let mut object = self.outcome.to_json();
        if !self.refusals.is_empty() {
            object["refused"] = self.refusals.to_json();
        }
        if self.simulated_attestation {
            object["attestation"] = json!("simulated");
        }
        object
    }

    /// Writes [`Record::to_json`] to a file, as a line.
    ///
    /// # Errors
    /// The writer fails.
    pub fn write_to(&self, mut to: impl Write) -> io::Result<()> {
        to.write_all(format!("{}\n", self.to_json()).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_code_cannot_be_taken_for_motes() {
        let own = Outcome::NotStarted(anyhow::anyhow!("inner").context("outer"));
        let guests = Outcome::Exited(125);
        assert_eq!(own.exit_code(), guests.exit_code());
        assert_eq!(guests.to_json(), json!({"kind": "exited", "exit_code": 125, "code": 125}));
        assert_eq!(
            own.to_json(),
            json!({"kind": "not-started", "exit_code": 125, "message": "outer: inner"})
        );
        assert_eq!(
            Outcome::Signaled(9).to_json(),
            json!({"kind": "signaled", "exit_code": 137, "signal": 9})
        );
    }
}
