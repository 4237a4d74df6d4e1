//! Processes beside mote that confine themselves: how one says that it has, or why it could not.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use anyhow::{Context, Result, anyhow, ensure};

use crate::sys::{self, Interest};

/// The byte by which a process says that it is confined. Others are the beginning of why not.
const CONFINED: u8 = 0;

/// Tells mote that this process is confined, or what went wrong. `false` if nobody reads it: mote has ended.
pub(super) fn tell(mut to: impl Write, error: Option<&anyhow::Error>) -> bool {
    let answer = match error {
        None => vec![CONFINED],
        Some(error) => format!("{error:#}").into_bytes(),
    };
    to.write_all(&answer).is_ok()
}

/// Waits until the process, the one "that …", has said that it is confined, or `stop` is readable.
///
/// # Errors
/// It could not be confined, or could not work then.
pub(super) fn wait_until_confined(
    which: &str,
    mut from: impl Read + AsFd,
    stop: &File,
) -> Result<()> {
    let [_, is_stopped] = sys::poll([Interest::read(&from), Interest::read(stop)], None)?;
    ensure!(!is_stopped, "stopped while waiting for the process {which}");
    let mut answer = [CONFINED; 256];
    let read = from.read(&mut answer).with_context(|| format!("read from the process {which}"))?;
    match &answer[..read] {
        [CONFINED] => Ok(()),
        why => Err(anyhow!("start the process {which}: {}", String::from_utf8_lossy(why))),
    }
}
