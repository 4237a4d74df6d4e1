//! What mote's `main` does in the place of Rust's own.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::io;

use super::check;

/// What Rust's runtime does first in a program, where a `main` of the program's own takes its place: standard streams that
/// are closed are opened, so that no other file gets their numbers, and writing to a pipe that nobody reads is an error
/// and not the process's end. The runtime also reads /proc/self/maps, to tell overflown stacks by their addresses, which
/// [`super::fatal`] does without, and which was a fiftieth of a box's start.
///
/// # Errors
/// Those of opening `/dev/null`.
pub fn start() -> io::Result<()> {
    let mut streams = [0, 1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: pointer and length describe `streams`.
    check(unsafe { libc::poll(streams.as_mut_ptr(), streams.len() as libc::nfds_t, 0) })?;
    for _ in streams.iter().filter(|stream| stream.revents & libc::POLLNVAL != 0) {
        // SAFETY: plain system call; the lowest number that is free is the stream's.
        check(unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) })?;
    }
    // SAFETY: plain system call, with no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    Ok(())
}
