//! A channel into the main loop: values from other threads, and an event that says there are some.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};

use anyhow::{Context, Result};
use vmm_sys_util::eventfd::EventFd;

/// The sending end. All of them share one descriptor.
#[derive(Debug)]
pub struct Sender<T> {
    values: SyncSender<T>,
    event: Arc<EventFd>,
}

/// The receiving end; its descriptor is readable when something was sent.
#[derive(Debug)]
pub struct Receiver<T> {
    values: mpsc::Receiver<T>,
    event: Arc<EventFd>,
}

/// A channel that holds at most `bound` values: when it is full, a sender waits.
///
/// # Errors
/// The host has no descriptor for the event.
pub fn event_channel<T>(bound: usize) -> Result<(Sender<T>, Receiver<T>)> {
    let (sender, receiver) = mpsc::sync_channel(bound);
    let event =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("create an eventfd")?;
    let event = Arc::new(event);
    let sender = Sender { values: sender, event: Arc::clone(&event) };
    Ok((sender, Receiver { values: receiver, event }))
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender { values: self.values.clone(), event: Arc::clone(&self.event) }
    }
}

impl<T> Sender<T> {
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
