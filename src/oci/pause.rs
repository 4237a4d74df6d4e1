//! The process of a pod's sandbox: the container that an engine makes first of all, only so that the pod's namespaces and
//! its cgroup are there before the others and as long as they.
//!
//! No program of the image runs, and there is no box: this is mote's own file under another name, which waits for the
//! signal to end. It is in the pod's network namespace, by which the pod's boxes and its engine find it
//! (`/proc/PID/ns/net`).

use anyhow::{Context, Result};

use crate::sys::{capabilities, confine};
use crate::{log, sys};

/// The name of the program under which mote's file is this.
pub const NAME: &str = "mote-pause";

/// The signals that end it.
const SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT];

/// Waits for the end, and returns the exit code.
pub fn main() -> u8 {
    match wait() {
        Ok(()) => 0,
        Err(error) => {
            log::error(&format!("{error:#}"));
            1
        }
    }
}

fn wait() -> Result<()> {
    let signals = sys::signal_file(&SIGNALS).context("take signals")?;
    confine::unshare(libc::CLONE_NEWNS)
        .and_then(|()| confine::enter_empty_root())
        .and_then(|()| confine::drop_groups())
        .and_then(|()| capabilities::drop_all_but(0))
        .and_then(|()| confine::no_new_privileges())
        .context("give up the host's files and privileges")?;
    while sys::next_signal(&signals).is_none() {
        sys::poll([sys::Interest::read(&signals)], None).context("wait for a signal")?;
    }
    Ok(())
}
