//! What the main loop's events are about: a typed value in place of epoll's 32 bits of user data.

/// The source of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// A signal that asks to stop.
    Stop,
    /// SIGCONT.
    Continued,
    /// It is time to tell the guest the time.
    Clock,
    /// A vCPU has stopped for good.
    VcpuExit,
    /// A device of the main loop was activated or reset.
    Device,
    /// Bytes on the control channel to the agent.
    Control,
    /// An output stream has been written out.
    OutputDone,
    /// The back-end of this number has ended.
    Backend(u32),
    /// The back-end of this number has written to its standard error.
    BackendStderr(u32),
    /// Buffers in the rng device's queue.
    Rng,
    /// Buffers to receive into, for the network device.
    NetReceive,
    /// Frames to send from the network device.
    NetTransmit,
    /// The connection to passt.
    NetPasst,
    /// Buffers to receive into, for the vsock device.
    VsockReceive,
    /// Packets to send from the vsock device.
    VsockTransmit,
    /// A connection waits on the host socket of this number.
    VsockListener(u32),
    /// The host socket of the connection in this slot.
    VsockConnection(u32),
}

const INDEX_BITS: u32 = 24;
const INDEX_MASK: u32 = (1 << INDEX_BITS) - 1;

impl Token {
    /// As epoll user data.
    pub fn to_data(self) -> u32 {
        let (kind, index) = match self {
            Token::Stop => (0, 0),
            Token::Continued => (16, 0),
            Token::VcpuExit => (1, 0),
            Token::Device => (2, 0),
            Token::Control => (3, 0),
            Token::OutputDone => (4, 0),
            Token::Backend(index) => (5, index),
            Token::Rng => (6, 0),
            Token::VsockReceive => (7, 0),
            Token::VsockTransmit => (8, 0),
            Token::VsockListener(index) => (9, index),
            Token::VsockConnection(index) => (10, index),
            Token::Clock => (11, 0),
            Token::BackendStderr(index) => (12, index),
            Token::NetReceive => (13, 0),
            Token::NetTransmit => (14, 0),
            Token::NetPasst => (15, 0),
        };
        kind << INDEX_BITS | index & INDEX_MASK
    }

    /// From epoll user data that [`Token::to_data`] made.
    pub fn from_data(data: u32) -> Option<Token> {
        let index = data & INDEX_MASK;
        Some(match data >> INDEX_BITS {
            0 => Token::Stop,
            16 => Token::Continued,
            1 => Token::VcpuExit,
            2 => Token::Device,
            3 => Token::Control,
            4 => Token::OutputDone,
            5 => Token::Backend(index),
            6 => Token::Rng,
            7 => Token::VsockReceive,
            8 => Token::VsockTransmit,
            9 => Token::VsockListener(index),
            10 => Token::VsockConnection(index),
            11 => Token::Clock,
            12 => Token::BackendStderr(index),
            13 => Token::NetReceive,
            14 => Token::NetTransmit,
            15 => Token::NetPasst,
            _ => return None,
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
            Token::VcpuExit,
            Token::Device,
            Token::Control,
            Token::OutputDone,
            Token::Backend(7),
            Token::BackendStderr(8),
            Token::Clock,
            Token::Rng,
            Token::NetReceive,
            Token::NetTransmit,
            Token::NetPasst,
            Token::VsockReceive,
            Token::VsockTransmit,
            Token::VsockListener(1),
            Token::VsockConnection(INDEX_MASK),
        ] {
            assert_eq!(Token::from_data(token.to_data()), Some(token));
        }
        assert_eq!(Token::from_data(u32::MAX), None);
    }
}
