//! A channel into the main loop: values from other threads, and an event that says there are some.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, SyncSender};

use anyhow::{Context, Result};
use vmm_sys_util::eventfd::EventFd;

/// The sending end.
#[derive(Debug)]
pub struct Sender<T> {
    values: SyncSender<T>,
    event: EventFd,
}

/// The receiving end; its descriptor is readable when something was sent.
#[derive(Debug)]
pub struct Receiver<T> {
    values: mpsc::Receiver<T>,
    event: EventFd,
}

/// A channel that holds at most `bound` values: when it is full, a sender waits.
///
/// # Errors
/// The host has no descriptor for the event.
pub fn event_channel<T>(bound: usize) -> Result<(Sender<T>, Receiver<T>)> {
    let (sender, receiver) = mpsc::sync_channel(bound);
    let event =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("create an eventfd")?;
    let clone = event.try_clone().context("duplicate an eventfd")?;
    Ok((Sender { values: sender, event: clone }, Receiver { values: receiver, event }))
}

impl<T> Sender<T> {
    /// Another handle to the same receiver.
    ///
    /// # Errors
    /// The host has no descriptor for it.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Sender { values: self.values.clone(), event: self.event.try_clone()? })
    }

    /// Sends a value.
    ///
    /// # Errors
    /// The main loop has ended.
    pub fn send(&self, value: T) -> Result<()> {
        self.values.send(value).ok().context("the main loop has ended")?;
        self.event.write(1).context("wake the main loop")
    }
}

impl<T> Receiver<T> {
    /// Clears the event: a value sent from here on makes the descriptor readable again.
    pub fn clear(&self) {
        let _ = self.event.read();
    }

    /// Makes the descriptor readable although nothing new was sent: for values that are left to take.
    pub fn wake(&self) {
        let _ = self.event.write(1);
    }

    /// The next value, if one has been sent.
    pub fn take(&self) -> Option<T> {
        self.values.try_recv().ok()
    }
}

impl<T> AsRawFd for Receiver<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
