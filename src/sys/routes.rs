//! The host's routing: where a packet to an address would go at this moment (rtnetlink(7)).

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::cell::Cell;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::IpAddr;

use super::{check, owned};

/// `struct nlmsghdr` and `struct rtmsg` (linux/netlink.h, linux/rtnetlink.h).
const HEADER_LEN: usize = 16;
const ROUTE_LEN: usize = 12;
/// Offset of `nlmsg_seq`.
const SEQUENCE: usize = 8;
/// Offset of `rtm_type` in an answer.
const ROUTE_TYPE: usize = HEADER_LEN + 7;
/// Far more than an answer's attributes take.
const ANSWER_LEN: usize = 4096;

/// A socket to ask for routes: of the network namespace that it was opened in, whichever its owner is in.
#[derive(Debug)]
pub struct Routes {
    socket: File,
    /// Of the last question.
    sequence: Cell<u32>,
}

impl Routes {
    /// Opens the socket.
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn open() -> io::Result<Routes> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: plain system call.
        let socket = check(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) })?;
        Ok(Routes { socket: owned(socket).into(), sequence: Cell::new(0) })
    }

    /// Whether a packet to this address would not leave the host: it is the host's own, a broadcast or an
    /// anycast address of it. Does not wait: the kernel answers before the question has been sent.
    ///
    /// # Errors
    /// The one that connecting to an address without a route has; or the kernel does not answer.
    pub fn is_local(&self, ip: IpAddr) -> io::Result<bool> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        (&self.socket).write_all(&question(ip, sequence))?;
        let mut answer = [0; ANSWER_LEN];
        loop {
            match (&self.socket).read(&mut answer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // One to an earlier question, which could not be read then.
                Ok(len)
                    if word(&answer[..len], SEQUENCE).is_some_and(|other| other != sequence) => {}
                len => return parse(&answer[..len?]),
            }
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// `RTM_GETROUTE` for one address.
fn question(ip: IpAddr, sequence: u32) -> Vec<u8> {
    let (family, address) = match ip {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let attribute_len = 4 + address.len();
    let mut bytes = Vec::with_capacity(HEADER_LEN + ROUTE_LEN + attribute_len);
    bytes.extend(((HEADER_LEN + ROUTE_LEN + attribute_len) as u32).to_ne_bytes());
    bytes.extend(libc::RTM_GETROUTE.to_ne_bytes());
    bytes.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    // The kernel knows whom to answer.
    bytes.extend([0; 4]);
    // Family, length of the destination's prefix in bits; the rest is for the kernel to choose.
    bytes.extend([family as u8, (address.len() * 8) as u8]);
    bytes.extend([0; ROUTE_LEN - 2]);
    bytes.extend((attribute_len as u16).to_ne_bytes());
    bytes.extend(libc::RTA_DST.to_ne_bytes());
    bytes.extend(address);
    bytes
}

fn parse(answer: &[u8]) -> io::Result<bool> {
    let malformed = || io::Error::from(ErrorKind::InvalidData);
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    match kind.ok_or_else(malformed)? {
        libc::RTM_NEWROUTE => {
            let kind = *answer.get(ROUTE_TYPE).ok_or_else(malformed)?;
            Ok([libc::RTN_LOCAL, libc::RTN_BROADCAST, libc::RTN_ANYCAST, libc::RTN_MULTICAST]
                .contains(&kind))
        }
        kind if i32::from(kind) == libc::NLMSG_ERROR => {
            let errno = answer.get(HEADER_LEN..HEADER_LEN + 4).and_then(|b| b.try_into().ok());
            let errno = errno.map(i32::from_ne_bytes).filter(|errno| *errno < 0);
            Err(errno.map_or_else(malformed, |errno| io::Error::from_raw_os_error(-errno)))
        }
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_addresses_are_local() {
        let routes = Routes::open().expect("a socket");
        for ip in ["127.0.0.1", "127.1.2.3"] {
            assert!(routes.is_local(ip.parse().expect("an address")).expect("an answer"), "{ip}");
        }
        // A host without a route to it says so.
        let elsewhere = routes.is_local("192.0.2.1".parse().expect("an address"));
        let errno = elsewhere.as_ref().map_err(|error| error.raw_os_error());
        assert!(matches!(errno, Ok(false) | Err(Some(libc::ENETUNREACH))), "{elsewhere:?}");
    }

    #[test]
    fn answers_that_are_none_are_errors() {
        for answer in [&[][..], &[0; 5], &[0; 40]] {
            assert!(parse(answer).is_err());
        }
        let mut refusal = [0; 36];
        refusal[4] = libc::NLMSG_ERROR as u8;
        assert!(parse(&refusal).is_err());
        refusal[16..20].copy_from_slice(&(-libc::ENETUNREACH).to_ne_bytes());
        let errno = parse(&refusal).expect_err("an error").raw_os_error();
        assert_eq!(errno, Some(libc::ENETUNREACH));
    }
}
