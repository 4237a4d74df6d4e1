//! What the main loop's events are about: a typed value in place of epoll's 32 bits of user data.

/// The source of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// A signal that asks to stop.
    Stop,
    /// SIGCONT.
    Continued,
    /// SIGWINCH.
    Resized,
    /// The timer for telling the guest the time of day.
    Clock,
    /// A vCPU has stopped for good.
    VcpuExit,
    /// A device of the main loop was activated or reset.
    DeviceEvent,
    /// Bytes on the control channel to the agent.
    Control,
    /// An output stream has been written out.
    OutputDone,
    /// The back-end of this number has ended.
    Backend(u32),
    /// The back-end of this number has been asked for something.
    BackendAsked(u32),
    /// The back-end of this number has written to its standard error.
    BackendStderr(u32),
    /// Something that a device watches.
    Device {
        /// The device's number.
        device: u8,
        /// What the device watches, by a number of its own choice, at most [`Token::MAX_INDEX`].
        source: u32,
    },
}

const INDEX_BITS: u32 = 24;
/// Kinds from this one on are devices.
const FIRST_DEVICE: u32 = 128;

impl Token {
    /// Largest number of a back-end, or of a device's source.
    pub const MAX_INDEX: u32 = (1 << INDEX_BITS) - 1;

    /// As epoll user data.
    pub fn to_data(self) -> u32 {
        let (kind, index) = match self {
            Token::Stop => (0, 0),
            Token::Continued => (1, 0),
            Token::Clock => (2, 0),
            Token::VcpuExit => (3, 0),
            Token::DeviceEvent => (4, 0),
            Token::Control => (5, 0),
            Token::OutputDone => (6, 0),
            Token::Backend(index) => (7, index),
            Token::BackendStderr(index) => (8, index),
            Token::Resized => (9, 0),
            Token::BackendAsked(index) => (10, index),
            Token::Device { device, source } => (FIRST_DEVICE + u32::from(device), source),
        };
        kind << INDEX_BITS | index & Token::MAX_INDEX
    }

    /// From epoll user data that [`Token::to_data`] made.
    pub fn from_data(data: u32) -> Option<Token> {
        let index = data & Token::MAX_INDEX;
        Some(match data >> INDEX_BITS {
            0 => Token::Stop,
            1 => Token::Continued,
            2 => Token::Clock,
            3 => Token::VcpuExit,
            4 => Token::DeviceEvent,
            5 => Token::Control,
            6 => Token::OutputDone,
            7 => Token::Backend(index),
            8 => Token::BackendStderr(index),
            9 => Token::Resized,
            10 => Token::BackendAsked(index),
            kind => {
                let device = kind.checked_sub(FIRST_DEVICE)? as u8;
                Token::Device { device, source: index }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_epoll() {
        for token in [
            Token::Stop,
            Token::Continued,
            Token::Resized,
            Token::Clock,
            Token::VcpuExit,
            Token::DeviceEvent,
            Token::Control,
            Token::OutputDone,
            Token::Backend(7),
            Token::BackendStderr(8),
            Token::BackendAsked(9),
            Token::Device { device: 0, source: 0 },
            Token::Device { device: 127, source: Token::MAX_INDEX },
        ] {
            assert_eq!(Token::from_data(token.to_data()), Some(token));
        }
        assert_eq!(Token::from_data((FIRST_DEVICE - 1) << INDEX_BITS), None);
    }
}
