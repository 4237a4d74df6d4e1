//! What the vsock device watches in the main loop, and the number for it that an event carries
//! ([`crate::virtio::main_loop::Watcher`]).

/// The source of an event of this device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Notifications of the receive queue.
    Receive,
    /// Notifications of the transmit queue.
    Transmit,
    /// A client waits on the listener of this number.
    Listener(usize),
    /// The host socket of the connection in this slot.
    Connection(usize),
}

/// Bits of an index: far more than there can be listeners or connections.
const INDEX_BITS: u32 = 20;
const INDEX_MASK: u32 = (1 << INDEX_BITS) - 1;

impl Source {
    /// As a number.
    pub fn to_number(self) -> u32 {
        let (kind, index) = match self {
            Source::Receive => (0, 0),
            Source::Transmit => (1, 0),
            Source::Listener(index) => (2, index as u32),
            Source::Connection(index) => (3, index as u32),
        };
        kind << INDEX_BITS | index & INDEX_MASK
    }

    /// From a number that [`Source::to_number`] made.
    pub fn from_number(number: u32) -> Option<Source> {
        let index = (number & INDEX_MASK) as usize;
        Some(match number >> INDEX_BITS {
            0 => Source::Receive,
            1 => Source::Transmit,
            2 => Source::Listener(index),
            3 => Source::Connection(index),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::Token;

    #[test]
    fn sources_survive_epoll() {
        let last = INDEX_MASK as usize;
        for source in [
            Source::Receive,
            Source::Transmit,
            Source::Listener(1),
            Source::Connection(0),
            Source::Connection(last),
        ] {
            assert!(source.to_number() <= Token::MAX_INDEX);
            assert_eq!(Source::from_number(source.to_number()), Some(source));
        }
        assert_eq!(Source::from_number(u32::MAX), None);
    }
}
