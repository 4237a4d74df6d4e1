//! The framing of flows ([`mote_agent::flow`]): the headers that go to the guest with the bytes, and
//! where a datagram ends in the guest's bytes. Pure, like [`super::conn`].

use mote_agent::flow::{
    CHUNK_HEADER_LEN, DATAGRAM_ERROR, DATAGRAM_HEADER_LEN, MAX_DATAGRAM_LEN, STATUS_LEN,
};

/// Length of an error in place of a datagram: a header and an errno.
const ERROR_LEN: usize = DATAGRAM_HEADER_LEN + STATUS_LEN;

/// Bytes that go to the guest before anything else: a header, or the rest of what was read when a
/// packet had room only for the first part.
#[derive(Debug, Default)]
pub struct Rest {
    bytes: Vec<u8>,
    sent: usize,
}

impl Rest {
    /// A rest of these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        Rest { bytes: bytes.to_vec(), sent: 0 }
    }

    /// Moves as many bytes as there are and fit to the start of `packet`. Returns how many.
    pub fn take(&mut self, packet: &mut [u8]) -> usize {
        let left = &self.bytes[self.sent..];
        let len = left.len().min(packet.len());
        packet[..len].copy_from_slice(&left[..len]);
        self.sent += len;
        if self.sent == self.bytes.len() {
            // Frees the memory too: thousands of flows may each have had a large datagram.
            *self = Rest::default();
        }
        len
    }

    /// Keeps the part of `framed` beyond `room`, and returns the length of the part before. Must be
    /// called only when everything earlier has been taken.
    pub fn keep(&mut self, framed: &[u8], room: usize) -> usize {
        let Some((now, later)) = framed.split_at_checked(room) else { return framed.len() };
        if !later.is_empty() {
            *self = Rest::new(later);
        }
        now.len()
    }
}

/// Makes a chunk of `len` bytes in `buffer`, which leave room for the header before them. A chunk of no
/// bytes ends the stream.
pub fn chunk(buffer: &mut [u8], len: usize) -> &[u8] {
    buffer[..CHUNK_HEADER_LEN].copy_from_slice(&(len as u32).to_be_bytes());
    &buffer[..CHUNK_HEADER_LEN + len]
}

/// Makes a framed datagram of `len` bytes in `buffer`, which leave room for the header before them.
pub fn datagram(buffer: &mut [u8], len: usize) -> &[u8] {
    buffer[..DATAGRAM_HEADER_LEN].copy_from_slice(&(len as u16).to_be_bytes());
    &buffer[..DATAGRAM_HEADER_LEN + len]
}

/// Makes a report of an error in place of a datagram, at the start of `buffer`.
pub fn datagram_error(buffer: &mut [u8], errno: i32) -> &[u8] {
    buffer[..DATAGRAM_HEADER_LEN].copy_from_slice(&DATAGRAM_ERROR.to_be_bytes());
    buffer[DATAGRAM_HEADER_LEN..ERROR_LEN].copy_from_slice(&status(errno));
    &buffer[..ERROR_LEN]
}

/// The answer to a request. If the host lacks something for another socket, the guest gets an errno
/// that connect(2) has: the host's descriptors and memory are not its business.
pub fn status(errno: i32) -> [u8; STATUS_LEN] {
    let errno = match errno {
        libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC => libc::ENOBUFS,
        // The host has no IPv6 at all.
        libc::EAFNOSUPPORT => libc::ENETUNREACH,
        other => other,
    };
    (errno as u16).to_be_bytes()
}

/// A datagram that is longer than [`MAX_DATAGRAM_LEN`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong;

/// The first datagram in what the guest has sent, once it is complete.
///
/// # Errors
/// Its length is more than a datagram can have.
pub fn first_datagram(bytes: &[u8]) -> Result<Option<&[u8]>, TooLong> {
    let Some((header, rest)) = bytes.split_first_chunk::<DATAGRAM_HEADER_LEN>() else {
        return Ok(None);
    };
    let len = usize::from(u16::from_be_bytes(*header));
    if len > MAX_DATAGRAM_LEN { Err(TooLong) } else { Ok(rest.get(..len)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_follows_in_order() {
        for room in 0..12 {
            let mut rest = Rest::default();
            let mut all = b"0123456789"[..rest.keep(b"0123456789", room)].to_vec();
            assert_eq!(all.len(), room.min(10));
            let mut packet = [0; 3];
            loop {
                let len = rest.take(&mut packet);
                if len == 0 {
                    break;
                }
                all.extend(&packet[..len]);
            }
            assert_eq!(all, b"0123456789", "room {room}");
        }
    }

    #[test]
    fn frames_say_their_lengths() {
        let mut buffer = *b"....hello";
        assert_eq!(chunk(&mut buffer, 5), b"\0\0\0\x05hello");
        assert_eq!(chunk(&mut buffer, 0), [0; 4]);
        let mut buffer = *b"..hello";
        assert_eq!(datagram(&mut buffer, 5), b"\0\x05hello");
        assert_eq!(datagram(&mut buffer, 0), [0; 2]);
        assert_eq!(datagram_error(&mut buffer, libc::ECONNREFUSED), [0xff, 0xff, 0, 111]);
    }

    #[test]
    fn what_the_host_lacks_is_said_in_the_applications_words() {
        assert_eq!(status(0), [0, 0]);
        assert_eq!(status(libc::ETIMEDOUT), [0, 110]);
        assert_eq!(status(libc::EMFILE), [0, 105]);
        assert_eq!(status(libc::EAFNOSUPPORT), [0, 101]);
    }

    #[test]
    fn datagrams_are_found_once_complete() {
        for incomplete in [&b""[..], b"\0", b"\0\x01", b"\x01\x00....."] {
            assert_eq!(first_datagram(incomplete), Ok(None));
        }
        assert_eq!(first_datagram(b"\0\0"), Ok(Some(&b""[..])));
        assert_eq!(first_datagram(b"\0\x02abc"), Ok(Some(&b"ab"[..])));
        let longest = [&[0xff, 0xf7][..], &[7; MAX_DATAGRAM_LEN]].concat();
        assert_eq!(first_datagram(&longest), Ok(Some(&longest[2..])));
        assert_eq!(first_datagram(&longest[..65_528]), Ok(None));
        for too_long in [[0xff, 0xf8], [0xff, 0xff]] {
            assert_eq!(first_datagram(&too_long), Err(TooLong));
        }
    }
}
