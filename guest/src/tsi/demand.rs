//! Whether a program of the box wants a socket for IPv4 or IPv6, which then waits until it may have it
//! (`resources/kernel/sockets-on-demand.patch`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::sys::Interest;

/// The sysctl that has sockets wait, and whose file tells of it.
const PATH: &str = "/proc/sys/net/core/inet_on_demand";

/// That file, open since before the box's programs could put anything in its place.
#[derive(Debug)]
pub struct Demand(File);

impl Demand {
    /// Opens it; `None` if this kernel cannot have sockets wait, as one of the user's own.
    ///
    /// # Errors
    /// If it is there and cannot be opened.
    pub fn open() -> io::Result<Option<Self>> {
        match OpenOptions::new().read(true).write(true).open(PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(|file| Some(Demand(file))),
        }
    }

    /// Has the box's sockets wait from now on.
    ///
    /// # Errors
    /// If the kernel does not take the word for it.
    pub fn hold(&self) -> io::Result<()> {
        self.say(b"1")
    }

    /// Ready once, in one call of poll(2), when a socket begins to wait.
    pub fn interest(&self) -> Interest<'_> {
        Interest::news(self.0.as_fd())
    }

    /// Lets sockets that wait come into being, and all others from now on.
    ///
    /// # Errors
    /// If the kernel does not take the word for it.
    pub fn release(&self) -> io::Result<()> {
        self.say(b"0")
    }

    fn say(&self, word: &[u8]) -> io::Result<()> {
        // Elsewhere than at its beginning a sysctl takes no word (sysctl_writes_strict).
        self.0.write_all_at(word, 0)
    }
}
