//! Ports that a box publishes by listening on them: mote hears of each from the guest, asks the janitor for a listener on
//! the same port of its network namespace, and gives that to the vsock device.
//!
//! The guest is hostile: what it says is taken as a wish, for so many ports and no more, and only a box whose spec asks for
//! this has a janitor that listens for it.

use std::collections::HashMap;
use std::io::{self, ErrorKind, PipeWriter, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Result;
use mote_agent::flow::Listens;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::host::sockets::BACKLOG;
use crate::log;
use crate::sys::{self, Interest};
use crate::virtio::main_loop::Watcher;
use crate::virtio::vsock::mux::Mux;

/// How long mote waits for the janitor, which answers without waiting, but may have to wait for a CPU.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// Most addresses by which clients of one box come.
const MAX_ADDRESSES: usize = 512;
/// Most messages about ports that cannot be published.
const MAX_COMPLAINTS: usize = 16;

/// Length of a request: its number, and the rest as [`Listens`] encodes it.
pub(super) const REQUEST_LEN: usize = 20;
/// The byte that is sent with a listener.
const LISTENING: u8 = 0;

/// The janitor's side: answers the last of these requests with a listener, or with an errno in a byte; then follows the
/// request's number. An answer for which the line has no room is not given: mote does not read.
pub(super) fn answer(mut line: &UnixStream, requests: &[u8]) -> io::Result<()> {
    let (records, _) = requests.as_chunks::<REQUEST_LEN>();
    let Some(last) = records.last() else { return Ok(()) };
    let number = last[0];
    let mut record = *last;
    record[0] = 1;
    let listened = Listens::decode(&record)
        .ok_or_else(|| ErrorKind::InvalidInput.into())
        .and_then(|Listens { address, .. }| sys::socket::listen_tcp(address, BACKLOG));
    match listened {
        Ok(socket) => drop(line.send_with_fd(&[LISTENING, number][..], socket.as_raw_fd())?),
        Err(error) => {
            line.write_all(&[error.raw_os_error().unwrap_or(libc::EIO) as u8, number])?;
        }
    }
    Ok(())
}

/// Publishes what the box listens on.
#[derive(Debug)]
pub struct Publisher {
    requests: PipeWriter,
    answers: UnixStream,
    /// Of the last request.
    number: u8,
    /// What is published, by its address here.
    addresses: HashMap<SocketAddr, Published>,
    complaints: usize,
}

/// An address of this network namespace by which clients of the box come.
#[derive(Debug)]
struct Published {
    /// How many of the guest's sockets listen for those.
    sockets: usize,
    /// The vsock device's number of the listener; `None` if there is none to be had.
    listener: Option<usize>,
}

impl Publisher {
    /// With the way to the janitor and back.
    pub(super) fn new(requests: PipeWriter, answers: UnixStream) -> Self {
        Publisher { requests, answers, number: 0, addresses: HashMap::new(), complaints: 0 }
    }

    /// Does what follows from a socket of the guest's that listens, or does not any more.
    ///
    /// # Errors
    /// The main loop cannot watch a listener, or stop watching it.
    pub fn note(
        &mut self,
        Listens { address, starts }: Listens,
        vsock: &mut Mux,
        watcher: &mut Watcher<'_, '_>,
    ) -> Result<()> {
        for here in places(address).filter(|here| here.port() != 0) {
            let has_room = self.addresses.len() < MAX_ADDRESSES;
            match self.addresses.get_mut(&here) {
                Some(known) if starts => known.sockets += 1,
                Some(Published { sockets: 1, .. }) => {
                    let gone =
                        self.addresses.remove(&here).and_then(|published| published.listener);
                    gone.into_iter().for_each(|listener| vsock.stop_listening(listener, watcher));
                }
                Some(known) => known.sockets -= 1,
                None if starts && has_room => {
                    let listener = match self.listen(here) {
                        Ok(socket) => Some(vsock.listen(socket, here.port(), watcher)?),
                        // This host has no IPv6, or there is no such address any more.
                        Err(error) if here.is_ipv6() && is_without_address(&error) => None,
                        Err(error) => {
                            self.complain(here, &error);
                            None
                        }
                    };
                    self.addresses.insert(here, Published { sockets: 1, listener });
                }
                None => {}
            }
        }
        Ok(())
    }

    fn complain(&mut self, address: SocketAddr, error: &io::Error) {
        self.complaints += 1;
        if self.complaints <= MAX_COMPLAINTS {
            let reason = match error.kind() {
                ErrorKind::AddrInUse => "somebody else listens there",
                ErrorKind::TimedOut => "the janitor did not answer in time",
                _ => &error.to_string(),
            };
            log::warn(&format!(
                "the box listens on port {}, but its clients cannot come by {address}: {reason}",
                address.port()
            ));
        }
    }

    /// A listener of this network namespace, non-blocking. Waits for the janitor.
    fn listen(&mut self, address: SocketAddr) -> io::Result<TcpListener> {
        self.number = self.number.wrapping_add(1);
        let mut request = Listens { address, starts: true }.encode();
        request[0] = self.number;
        self.requests.write_all(&request)?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let [ready] = sys::poll([Interest::read(&self.answers)], Some(left))?;
            if !ready {
                return Err(ErrorKind::TimedOut.into());
            }
            let mut answer = [0; 2];
            match self.answers.recv_with_fd(&mut answer) {
                // A late answer to an earlier request is dropped.
                Ok((2, _)) if answer[1] != self.number => {}
                Ok((2, Some(socket))) => return Ok(TcpListener::from(OwnedFd::from(socket))),
                Ok((2, None)) => return Err(io::Error::from_raw_os_error(answer[0].into())),
                Ok(_) => return Err(ErrorKind::BrokenPipe.into()),
                Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
            }
        }
    }
}

/// Where clients of a server can come from that listens on this address of the guest: a socket of IPv6 takes those of IPv4,
/// too.
fn places(address: SocketAddr) -> impl Iterator<Item = SocketAddr> {
    let is_of_both = address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let of_ip4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
    is_of_both.then_some(of_ip4).into_iter().chain([address])
}

fn is_without_address(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}
