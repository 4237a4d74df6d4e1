//! Takes clients, each into a thread of its own.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustls::ServerConfig;

use crate::budget::Budget;
use crate::client;
use crate::request::Service;

/// Most clients at once: more than the 200 that may be stuck in a handshake. Others wait to be accepted.
const MAX_CLIENTS: usize = 256;
/// A thread's stack, of which a client uses a part.
const STACK_LEN: usize = 256 * 1024;
/// How long no client is accepted after one could not be.
const REST: Duration = Duration::from_millis(100);

static CLIENTS: Budget = Budget::new(MAX_CLIENTS);

/// Accepts clients on the standard input, a listening socket, for as long as there is one.
///
/// # Errors
/// If the standard input is no such socket.
pub fn run(
    config: Arc<ServerConfig>,
    service: Arc<Service>,
) -> io::Result<std::convert::Infallible> {
    let listener = io::stdin();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        let Some(part) = CLIENTS.take(1, None) else { continue };
        let accepted = loop {
            match rustix::net::accept_with(listener.as_fd(), flags) {
                Err(Errno::AGAIN) => {
                    let interest = PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN);
                    match rustix::event::poll(&mut [interest], None) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                accepted => break accepted,
            }
        };
        let socket = match accepted {
            Ok(socket) => socket,
            Err(error @ (Errno::BADF | Errno::NOTSOCK | Errno::INVAL | Errno::OPNOTSUPP)) => {
                return Err(error.into());
            }
            // The client is gone, or there are no descriptors or no memory.
            Err(_) => {
                thread::sleep(REST);
                continue;
            }
        };
        let (config, service) = (Arc::clone(&config), Arc::clone(&service));
        let serve = move || {
            let _part = part;
            // Nobody is told: a line for each bad client would be one more thing that clients can fill.
            let _ = client::serve(socket, config, &service);
        };
        // Without a thread the client is closed.
        if thread::Builder::new().stack_size(STACK_LEN).spawn(serve).is_err() {
            thread::sleep(REST);
        }
    }
}
