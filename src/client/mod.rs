//! The commands that work with a running box through its sockets (contract §4, §5): `mote exec`,
//! `mote pty` and `mote cp`. They work with any agent that answers there, mote's own or not.
//!
//! `target` finds the box and waits for it; `channel` is a connection that carries frames; `relay` moves a
//! command's data between a channel and the process's own input and output; [`exec`], [`pty`] and [`cp`]
//! know what the frames mean.

mod channel;
pub mod cp;
pub mod exec;
pub mod pty;
mod relay;
mod stop;
mod target;
#[cfg(test)]
mod testing;

use anyhow::{Context, anyhow};

pub use relay::Stdio;
pub use stop::Stop;
pub use target::Target;

use crate::log;

/// The exit code when there is no box, or its answer makes no sense; `docker exec` uses the same.
const FAILED: u8 = 125;
/// The exit code when the box, or this host's file system, refuses to move a file.
const REFUSED: u8 = 1;

/// Runs a client command on the process's own input and output, writes to standard error what went
/// wrong, and returns the exit code.
pub fn run(command: impl FnOnce(&Stdio) -> Result<u8, Stop>) -> u8 {
    let stdio = Stdio::of_process().context("open standard input and output");
    let (code, error) = match stdio.map_err(Stop::from).and_then(|stdio| command(&stdio)) {
        Ok(code) | Err(Stop::Quiet(code)) => return code,
        Err(Stop::Ended(code, reason)) => (code, anyhow!(reason)),
        Err(Stop::Failed(error)) => (FAILED, error),
        Err(Stop::Refused(error)) => (REFUSED, error),
    };
    log::error(&format!("{error:#}"));
    code
}
