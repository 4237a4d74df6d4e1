//! Connections to passt while the box runs: mote asks the janitor for them, which can reach passt's socket.

use std::io::{self, ErrorKind, PipeWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::sys::{self, Interest};
use crate::virtio::net::passt;

/// How long mote waits for an answer while the box runs. The janitor answers without waiting, but may
/// have to wait for a CPU.
const ANSWER_LIMIT: Duration = Duration::from_millis(100);

/// The byte that is sent with a connection.
const CONNECTED: u8 = 0;

/// Connects to passt, and answers with the connection, or with an errno in a byte. An answer for which
/// the line has no room is not given: mote does not read.
pub(super) fn answer(mut line: &UnixStream, passt: Option<&Path>) -> io::Result<()> {
    match passt.map_or(Err(ErrorKind::Unsupported.into()), passt::connect_now) {
        Ok(socket) => {
            line.send_with_fd(&[CONNECTED][..], socket.as_raw_fd())?;
            // Closed by the end of this process.
            std::mem::forget(socket);
        }
        Err(error) => {
            line.write_all(&[error.raw_os_error().unwrap_or(libc::EIO) as u8])?;
        }
    }
    Ok(())
}

/// The way to the janitor and back, used to ask for connections to passt.
#[derive(Debug)]
pub struct PasstLine {
    pub(super) requests: PipeWriter,
    pub(super) answers: UnixStream,
}

impl PasstLine {
    /// A new connection to the box's passt, if passt listens at this moment. Waits for the janitor, not
    /// for passt.
    ///
    /// # Errors
    /// Nobody listens, or the janitor does not answer in time.
    pub fn connect(&mut self) -> io::Result<UnixStream> {
        let mut byte = [0];
        // A late answer to an earlier request is dropped: its connection is old.
        while let Ok((1, _)) = self.answers.recv_with_fd(&mut byte) {}
        self.requests.write_all(&[0])?;
        let [ready] = sys::poll([Interest::read(&self.answers)], Some(ANSWER_LIMIT))?;
        if !ready {
            return Err(ErrorKind::TimedOut.into());
        }
        match self.answers.recv_with_fd(&mut byte) {
            Ok((1, Some(socket))) => Ok(UnixStream::from(OwnedFd::from(socket))),
            Ok((1, None)) => Err(io::Error::from_raw_os_error(byte[0].into())),
            Ok(_) => Err(ErrorKind::BrokenPipe.into()),
            Err(error) => Err(io::Error::from_raw_os_error(error.errno())),
        }
    }
}
