//! How a container ends: what its mote says of that, and the removal of all that it had on the host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::state::Container;
use super::systemd;
use crate::sys::container::send_signal;
use crate::sys::process;
use crate::sys::{self, Interest};

/// How long a process may take to end that was killed: the kernel frees a box's memory then, perhaps that of a hundred at once.
const KILL_LIMIT: Duration = Duration::from_secs(60);

/// What mote writes to `--outcome`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Outcome {
    /// In one word.
    pub kind: String,
    /// mote's exit code.
    pub exit_code: u8,
    /// In a sentence, if it was not the program's own end.
    pub message: Option<String>,
}

impl Outcome {
    /// Whether the program had run.
    pub fn has_run(&self) -> bool {
        ["exited", "signaled", "stopped"].contains(&self.kind.as_str())
    }
}

/// How a container's box has ended; `None` if nothing is known of that.
pub fn outcome(container: &Container) -> Option<Outcome> {
    let text = fs::read(container.file("outcome")).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Ends a container if it runs, and removes all that it has on the host.
///
/// # Errors
/// Its process does not end, or something cannot be removed; what has been removed by then stays so.
pub fn remove(container: &Container) -> Result<()> {
    if let Some(process) = container.process() {
        // ESRCH says that it has ended meanwhile.
        let _ = send_signal(&process, libc::SIGKILL);
        let ended = sys::poll([Interest::read(&process)], Some(KILL_LIMIT));
        let [ended] = ended.context("wait for the container's process")?;
        ensure!(
            ended,
            "the container's process {} did not end within {KILL_LIMIT:?} of SIGKILL: is it stuck in the kernel?",
            container.state.pid.unwrap_or_default()
        );
    }
    if let Some(pid) = container.state.pid {
        // Of a create that fails, it is a child; of others, somebody else's.
        let _ = process::ended(pid);
    }
    if let Some(unit) = &container.state.scope {
        systemd::end(unit);
    }
    match container.cgroup() {
        Some(cgroup) if container.state.owns_cgroup => cgroup.remove()?,
        // Its create was killed before it could write down that it has made it.
        Some(cgroup) => cgroup.remove_if_empty(),
        None => {}
    }
    container.remove()
}
