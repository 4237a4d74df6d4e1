//! The host's routing: where a packet to an address would go at this moment, and which addresses are the host's
//! (rtnetlink(7)).

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::cell::Cell;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use super::{check, owned};

/// `struct nlmsghdr` and `struct rtmsg` (linux/netlink.h, linux/rtnetlink.h).
const HEADER_LEN: usize = 16;
const ROUTE_LEN: usize = 12;
/// Offset of `nlmsg_seq`.
const SEQUENCE: usize = 8;
/// Offset of `rtm_type` in an answer.
const ROUTE_TYPE: usize = HEADER_LEN + 7;
/// Offsets of `rtm_family`, `rtm_dst_len` and `rtm_table`.
const FAMILY: usize = HEADER_LEN;
const PREFIX_LEN: usize = HEADER_LEN + 1;
const TABLE: usize = HEADER_LEN + 4;
/// More than an answer's attributes take, and as much as the kernel puts into one part of an answer about all routes
/// (`NLMSG_GOODSIZE`).
const ANSWER_LEN: usize = 8192;

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
        let sequence = self.next_sequence();
        (&self.socket).write_all(&question(ip, sequence))?;
        let mut answer = [0; ANSWER_LEN];
        let len = self.read(&mut answer, sequence)?;
        parse(&answer[..len])
    }

    /// The prefixes of which [`Routes::is_local`] holds, as the table for local addresses has them.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn local(&self) -> io::Result<Vec<(IpAddr, u8)>> {
        self.all(is_to_local)
    }

    /// Those among them that are the host's own addresses.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn own(&self) -> io::Result<Vec<IpAddr>> {
        let own = self.all(|route_type| route_type == libc::RTN_LOCAL)?;
        let is_single = |(ip, len): &(IpAddr, u8)| *len == if ip.is_ipv4() { 32 } else { 128 };
        Ok(own.into_iter().filter(is_single).map(|(ip, _)| ip).collect())
    }

    fn all(&self, is_wanted: fn(u8) -> bool) -> io::Result<Vec<(IpAddr, u8)>> {
        // Linux before 4.20 does not know it, and tells of all tables.
        let strictly: libc::c_int = 1;
        // SAFETY: the option's value is an int that outlives the call.
        unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_NETLINK,
                libc::NETLINK_GET_STRICT_CHK,
                (&raw const strictly).cast(),
                size_of_val(&strictly) as libc::socklen_t,
            )
        };
        let sequence = self.next_sequence();
        (&self.socket).write_all(&question_for_all(sequence))?;
        let mut prefixes = Vec::new();
        let mut answer = [0; ANSWER_LEN];
        loop {
            let len = self.read(&mut answer, sequence)?;
            if !parse_all(&answer[..len], is_wanted, &mut prefixes) {
                return Ok(prefixes);
            }
        }
    }

    fn next_sequence(&self) -> u32 {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        sequence
    }

    /// Reads the next answer to this question.
    fn read(&self, answer: &mut [u8], sequence: u32) -> io::Result<usize> {
        loop {
            match (&self.socket).read(answer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // One to an earlier question, which could not be read then.
                Ok(len)
                    if word(&answer[..len], SEQUENCE).is_some_and(|other| other != sequence) => {}
                len => return len,
            }
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn half_word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// `RTM_GETROUTE` for one address.
fn question(ip: IpAddr, sequence: u32) -> Vec<u8> {
    let (family, address) = match ip {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let attribute_len = 4 + address.len();
    let mut bytes = header(HEADER_LEN + ROUTE_LEN + attribute_len, libc::NLM_F_REQUEST, sequence);
    // Family, length of the destination's prefix in bits; the rest is for the kernel to choose.
    bytes.extend([family as u8, (address.len() * 8) as u8]);
    bytes.extend([0; ROUTE_LEN - 2]);
    bytes.extend((attribute_len as u16).to_ne_bytes());
    bytes.extend(libc::RTA_DST.to_ne_bytes());
    bytes.extend(address);
    bytes
}

/// `RTM_GETROUTE` for all routes, of any family, of the table for local addresses.
fn question_for_all(sequence: u32) -> Vec<u8> {
    let mut bytes =
        header(HEADER_LEN + ROUTE_LEN, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, sequence);
    bytes.extend([0; ROUTE_LEN]);
    bytes[TABLE] = libc::RT_TABLE_LOCAL;
    bytes
}

/// The header of a question with this length in all.
fn header(len: usize, flags: libc::c_int, sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    bytes.extend((len as u32).to_ne_bytes());
    bytes.extend(libc::RTM_GETROUTE.to_ne_bytes());
    bytes.extend((flags as u16).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    // The kernel knows whom to answer.
    bytes.extend([0; 4]);
    bytes
}

/// Takes the prefixes of an answer whose type is wanted; `false` if it is the last.
fn parse_all(
    mut answer: &[u8],
    is_wanted: fn(u8) -> bool,
    prefixes: &mut Vec<(IpAddr, u8)>,
) -> bool {
    while let Some(len) = word(answer, 0).map(|len| len as usize)
        && len >= HEADER_LEN
        && let Some(message) = answer.get(..len)
    {
        if half_word(message, 4) != Some(libc::RTM_NEWROUTE) {
            return false;
        }
        prefixes.extend(local_prefix(message, is_wanted));
        answer = answer.get(aligned(len)..).unwrap_or_default();
    }
    answer.is_empty()
}

/// The destinations of a route to local addresses, of a type that is wanted.
fn local_prefix(message: &[u8], is_wanted: fn(u8) -> bool) -> Option<(IpAddr, u8)> {
    if !is_wanted(*message.get(ROUTE_TYPE)?) {
        return None;
    }
    let mut attributes = message.get(HEADER_LEN + ROUTE_LEN..)?;
    while let Some(len) = half_word(attributes, 0).filter(|len| *len >= 4) {
        let value = attributes.get(4..len.into())?;
        if half_word(attributes, 2) == Some(libc::RTA_DST) {
            let ip = match i32::from(*message.get(FAMILY)?) {
                libc::AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into(),
                libc::AF_INET6 => Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into(),
                _ => return None,
            };
            return Some((ip, *message.get(PREFIX_LEN)?));
        }
        attributes = attributes.get(aligned(len.into())..)?;
    }
    None
}

/// Where the next message or attribute begins (`NLMSG_ALIGN`, `RTA_ALIGN`).
fn aligned(len: usize) -> usize {
    len.next_multiple_of(4)
}

fn is_to_local(route_type: u8) -> bool {
    [libc::RTN_LOCAL, libc::RTN_BROADCAST, libc::RTN_ANYCAST, libc::RTN_MULTICAST]
        .contains(&route_type)
}

fn parse(answer: &[u8]) -> io::Result<bool> {
    let malformed = || io::Error::from(ErrorKind::InvalidData);
    match half_word(answer, 4).ok_or_else(malformed)? {
        libc::RTM_NEWROUTE => Ok(is_to_local(*answer.get(ROUTE_TYPE).ok_or_else(malformed)?)),
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
        let local = routes.local().expect("an answer");
        assert!(local.contains(&("127.0.0.0".parse().expect("an address"), 8)), "{local:?}");
        for (ip, _) in local {
            assert!(routes.is_local(ip).expect("an answer"), "{ip}");
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
