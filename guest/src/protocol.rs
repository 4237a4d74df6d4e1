//! Messages between VMM and agent, and the vsock ports they travel on.
//!
//! The agent connects to the host (CID 2) on three ports before it starts anything else: the
//! control channel and the entrypoint's two output streams; and on a fourth for its input, if it has one. The host accepts one connection per
//! port for the life of the VM, so nothing that runs later in the guest can take them.
//!
//! A message is a [`frame`]; integers are big-endian. The host treats every message as hostile.

use crate::flow::Listens;
use crate::frame::{self, TooLong};

/// Version of this protocol. Host and agent are shipped in one binary; a mismatch means that
/// `MOTE_INITRAMFS` names an archive of another build.
pub const VERSION: u32 = 7;

/// Host port of the control channel ("mote" in ASCII, plus an index).
pub const CONTROL_PORT: u32 = 0x6d6f_7465;
/// Host port of the entrypoint's standard output.
pub const STDOUT_PORT: u32 = CONTROL_PORT + 1;
/// Host port of the entrypoint's standard error.
pub const STDERR_PORT: u32 = CONTROL_PORT + 2;

/// Host port of the entrypoint's standard input, for boxes that have one.
pub const STDIN_PORT: u32 = CONTROL_PORT + 8;

/// Guest port of the agent's exec server. The contract's own port (4089) stays free for an agent of
/// the image's own, which the host prefers.
pub const EXEC_SERVER_PORT: u32 = CONTROL_PORT + 3;
/// Guest port of the agent's terminal server, beside the contract's 4090.
pub const PTY_SERVER_PORT: u32 = CONTROL_PORT + 4;
/// Guest port of the attestation server, beside the contract's 4091.
pub const ATTEST_SERVER_PORT: u32 = CONTROL_PORT + 7;

/// Host port of outgoing flows.
pub const FLOW_PORT: u32 = CONTROL_PORT + 5;
/// Guest port of connections to published ports.
pub const PUBLISH_PORT: u32 = CONTROL_PORT + 6;

/// Longest payload of a message: a failure text, with room to spare.
pub const MAX_PAYLOAD: usize = 4096;

/// Types of messages from the guest.
mod from_guest {
    pub const HELLO: u8 = 1;
    pub const REACHED: u8 = 2;
    pub const EXITED: u8 = 3;
    pub const SIGNALED: u8 = 4;
    pub const NOT_STARTED: u8 = 5;
    pub const LISTENS: u8 = 6;
    pub const CLOCK_READS: u8 = 7;
}

/// Types of messages from the host.
mod from_host {
    pub const STOP: u8 = 1;
    pub const CLOCK: u8 = 2;
    pub const DEVICE_IS_THERE: u8 = 3;
    pub const SIGNAL: u8 = 4;
    pub const RESIZE: u8 = 5;
    pub const READ_CLOCK: u8 = 6;
}

/// A point in the guest's start that the timeline records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// The kernel has started PID 1.
    AgentStarted = 0,
    /// The root share is mounted.
    RootMounted = 1,
    /// The exec and terminal servers listen.
    ServersReady = 2,
    /// The entrypoint's `execve` succeeded.
    EntrypointStarted = 3,
}

impl Mark {
    /// All marks, in the order in which they happen.
    pub const ALL: [Mark; 4] =
        [Mark::AgentStarted, Mark::RootMounted, Mark::ServersReady, Mark::EntrypointStarted];

    fn from_u8(value: u8) -> Option<Mark> {
        Mark::ALL.into_iter().find(|mark| *mark as u8 == value)
    }
}

/// How the entrypoint ended. There is no "unknown": an agent that cannot tell sends nothing, and
/// the host reports that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntrypointEnd {
    /// It called `exit` with this status.
    Exited(u8),
    /// This signal killed it.
    Signaled(u8),
    /// It never ran: the exit code the caller sees, and why.
    NotStarted {
        /// 125 (set-up in the guest failed), 126 (not executable) or 127 (not found).
        code: u8,
        /// What was being done, to what, and what the reader can change.
        reason: String,
    },
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromGuest {
    /// First message, once the entrypoint has been started, or cannot be: the version, and the guest's monotonic clock as it
    /// was sent, so that the host can place the marks in its own time, and answer with the wall clock.
    Hello {
        /// [`VERSION`] of the agent.
        version: u32,
        /// Guest monotonic clock now, in nanoseconds.
        now_ns: u64,
    },
    /// Something was reached at this guest monotonic time.
    Reached {
        /// What was reached.
        mark: Mark,
        /// Guest monotonic clock then, in nanoseconds.
        at_ns: u64,
    },
    /// A TCP socket of the box listens, or does not any more: of boxes whose listeners are published.
    Listens(Listens),
    /// What is the time?
    ClockReads {
        /// Guest monotonic clock now, in nanoseconds.
        now_ns: u64,
    },
    /// The entrypoint is over, all its output has been sent and all files are synced.
    Ended(EntrypointEnd),
}

/// Host to guest. There is no "done": once the host has the end and all output, it drops the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromHost {
    /// Send this signal to every process of the box, and end it when the entrypoint has gone.
    Stop {
        /// Signal number.
        signal: u8,
    },
    /// Ask for the time: the VM may have stood still, or the host's clock was set.
    ReadClock,
    /// The time, at once after the guest has said what its clock reads.
    Clock {
        /// Host wall clock, in nanoseconds since 1970.
        realtime_ns: u64,
        /// What the guest has said: the message is no older than since then.
        guest_ns: u64,
    },
    /// Where the kernel has found a placeholder at its start there is a device now: have its driver look again.
    DeviceIsThere {
        /// Its register page's position, from which the kernel's name for it follows.
        index: u8,
    },
    /// Send this signal to the entrypoint, whatever becomes of it.
    Signal {
        /// Signal number.
        signal: u8,
    },
    /// The terminal that shows the entrypoint's has this size now.
    Resize {
        /// Columns.
        cols: u16,
        /// Rows.
        rows: u16,
    },
}

/// Why bytes on the control channel are not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// No message has this type.
    Type(u8),
    /// A length that the type does not have, or more than [`MAX_PAYLOAD`].
    Length(u32),
    /// A field outside its range.
    Value,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Malformed::Type(t) => write!(f, "unknown message type {t:#04x}"),
            Malformed::Length(len) => write!(f, "message length {len} is out of range"),
            Malformed::Value => write!(f, "message field out of range"),
        }
    }
}

impl FromGuest {
    /// The bytes on the wire. A reason longer than [`MAX_PAYLOAD`] allows is cut.
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        let kind = match self {
            FromGuest::Hello { version, now_ns } => {
                payload.extend(version.to_be_bytes());
                payload.extend(now_ns.to_be_bytes());
                from_guest::HELLO
            }
            FromGuest::Reached { mark, at_ns } => {
                payload.push(*mark as u8);
                payload.extend(at_ns.to_be_bytes());
                from_guest::REACHED
            }
            FromGuest::Listens(listens) => {
                payload.extend(listens.encode());
                from_guest::LISTENS
            }
            FromGuest::ClockReads { now_ns } => {
                payload.extend(now_ns.to_be_bytes());
                from_guest::CLOCK_READS
            }
            FromGuest::Ended(EntrypointEnd::Exited(code)) => {
                payload.push(*code);
                from_guest::EXITED
            }
            FromGuest::Ended(EntrypointEnd::Signaled(signal)) => {
                payload.push(*signal);
                from_guest::SIGNALED
            }
            FromGuest::Ended(EntrypointEnd::NotStarted { code, reason }) => {
                payload.push(*code);
                let mut end = reason.len().min(MAX_PAYLOAD - 1);
                while !reason.is_char_boundary(end) {
                    end -= 1;
                }
                payload.extend(&reason.as_bytes()[..end]);
                from_guest::NOT_STARTED
            }
        };
        frame::encode(kind, &payload)
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, Malformed> {
        let length = Malformed::Length(payload.len() as u32);
        match kind {
            from_guest::HELLO => {
                let (version, now_ns) = payload.split_at_checked(4).ok_or(length)?;
                Ok(FromGuest::Hello {
                    version: u32::from_be_bytes(version.try_into().map_err(|_| length)?),
                    now_ns: u64::from_be_bytes(now_ns.try_into().map_err(|_| length)?),
                })
            }
            from_guest::REACHED => {
                let (mark, at_ns) = payload.split_first().ok_or(length)?;
                Ok(FromGuest::Reached {
                    mark: Mark::from_u8(*mark).ok_or(Malformed::Value)?,
                    at_ns: u64::from_be_bytes(at_ns.try_into().map_err(|_| length)?),
                })
            }
            from_guest::LISTENS => {
                let bytes = payload.try_into().map_err(|_| length)?;
                Listens::decode(bytes).map(FromGuest::Listens).ok_or(Malformed::Value)
            }
            from_guest::CLOCK_READS => {
                let now_ns = payload.try_into().map_err(|_| length)?;
                Ok(FromGuest::ClockReads { now_ns: u64::from_be_bytes(now_ns) })
            }
            from_guest::EXITED | from_guest::SIGNALED => {
                let [value] = payload.try_into().map_err(|_| length)?;
                Ok(FromGuest::Ended(match kind {
                    from_guest::EXITED => EntrypointEnd::Exited(value),
                    _ if (1..=64).contains(&value) => EntrypointEnd::Signaled(value),
                    _ => return Err(Malformed::Value),
                }))
            }
            from_guest::NOT_STARTED => {
                let (code, reason) = payload.split_first().ok_or(length)?;
                if !(125..=127).contains(code) {
                    return Err(Malformed::Value);
                }
                Ok(FromGuest::Ended(EntrypointEnd::NotStarted {
                    code: *code,
                    reason: String::from_utf8_lossy(reason).into_owned(),
                }))
            }
            _ => Err(Malformed::Type(kind)),
        }
    }
}

impl FromHost {
    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            FromHost::Stop { signal } => frame::encode(from_host::STOP, &[*signal]),
            FromHost::ReadClock => frame::encode(from_host::READ_CLOCK, &[]),
            FromHost::Clock { realtime_ns, guest_ns } => {
                let times = [realtime_ns.to_be_bytes(), guest_ns.to_be_bytes()];
                frame::encode(from_host::CLOCK, times.as_flattened())
            }
            FromHost::DeviceIsThere { index } => {
                frame::encode(from_host::DEVICE_IS_THERE, &[*index])
            }
            FromHost::Signal { signal } => frame::encode(from_host::SIGNAL, &[*signal]),
            FromHost::Resize { cols, rows } => {
                let [[a, b], [c, d]] = [cols.to_be_bytes(), rows.to_be_bytes()];
                frame::encode(from_host::RESIZE, &[a, b, c, d])
            }
        }
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, Malformed> {
        match (kind, payload) {
            (from_host::STOP, [signal]) => Ok(FromHost::Stop { signal: *signal }),
            (from_host::READ_CLOCK, []) => Ok(FromHost::ReadClock),
            (from_host::CLOCK, bytes) if bytes.len() == 16 => {
                let time = |bytes: &[u8]| bytes.try_into().map_err(|_| Malformed::Value);
                Ok(FromHost::Clock {
                    realtime_ns: u64::from_be_bytes(time(&bytes[..8])?),
                    guest_ns: u64::from_be_bytes(time(&bytes[8..])?),
                })
            }
            (from_host::DEVICE_IS_THERE, [index]) => Ok(FromHost::DeviceIsThere { index: *index }),
            (from_host::SIGNAL, [signal]) => Ok(FromHost::Signal { signal: *signal }),
            (from_host::RESIZE, [a, b, c, d]) => Ok(FromHost::Resize {
                cols: u16::from_be_bytes([*a, *b]),
                rows: u16::from_be_bytes([*c, *d]),
            }),
            (from_host::STOP..=from_host::READ_CLOCK, _) => {
                Err(Malformed::Length(payload.len() as u32))
            }
            _ => Err(Malformed::Type(kind)),
        }
    }
}

/// Cuts a byte stream into messages, whatever the boundaries it arrives in. Holds at most one
/// message and one read's worth of bytes.
#[derive(Debug)]
pub struct Decoder(frame::Decoder);

impl Default for Decoder {
    fn default() -> Self {
        Decoder(frame::Decoder::new(MAX_PAYLOAD))
    }
}

impl Decoder {
    /// Adds what was read.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.0.feed(bytes);
    }

    /// The next whole message from the guest, `None` when more bytes are needed.
    ///
    /// # Errors
    /// If the bytes are no message. The stream cannot go on then.
    pub fn next_from_guest(&mut self) -> Result<Option<FromGuest>, Malformed> {
        self.next_with(FromGuest::decode)
    }

    /// The next whole message from the host, `None` when more bytes are needed.
    ///
    /// # Errors
    /// As [`Decoder::next_from_guest`].
    pub fn next_from_host(&mut self) -> Result<Option<FromHost>, Malformed> {
        self.next_with(FromHost::decode)
    }

    fn next_with<T>(
        &mut self,
        decode: fn(u8, &[u8]) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        match self.0.next_frame() {
            Ok(Some(frame)) => decode(frame.kind, &frame.payload).map(Some),
            Ok(None) => Ok(None),
            Err(TooLong { length }) => Err(Malformed::Length(length)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<FromGuest> {
        vec![
            FromGuest::Hello { version: VERSION, now_ns: u64::MAX },
            FromGuest::ClockReads { now_ns: 1 << 40 },
            FromGuest::Reached { mark: Mark::RootMounted, at_ns: 7 },
            FromGuest::Listens(Listens {
                address: "[::1]:80".parse().expect("an address"),
                starts: false,
            }),
            FromGuest::Ended(EntrypointEnd::Exited(255)),
            FromGuest::Ended(EntrypointEnd::Signaled(9)),
            FromGuest::Ended(EntrypointEnd::NotStarted {
                code: 127,
                reason: "no such program".into(),
            }),
        ]
    }

    #[test]
    fn guest_messages_round_trip() {
        let mut decoder = Decoder::default();
        for message in samples() {
            decoder.feed(&message.encode());
            assert_eq!(decoder.next_from_guest(), Ok(Some(message)));
        }
    }

    #[test]
    fn host_messages_round_trip() {
        let mut decoder = Decoder::default();
        for message in [
            FromHost::Stop { signal: 15 },
            FromHost::ReadClock,
            FromHost::Clock { realtime_ns: 1 << 60, guest_ns: 7 },
            FromHost::DeviceIsThere { index: 39 },
            FromHost::Signal { signal: 64 },
            FromHost::Resize { cols: 258, rows: 3 },
        ] {
            decoder.feed(&message.encode());
            assert_eq!(decoder.next_from_host(), Ok(Some(message)));
        }
    }

    #[test]
    fn hostile_bytes_are_refused() {
        let cases: [(&[u8], Malformed); 6] = [
            (&[9, 0, 0, 0, 0], Malformed::Type(9)),
            (&[3, 0xff, 0xff, 0xff, 0xff], Malformed::Length(u32::MAX)),
            (&[3, 0, 0, 0, 2, 1, 1], Malformed::Length(2)),
            (&[4, 0, 0, 0, 1, 0], Malformed::Value),
            (&[5, 0, 0, 0, 1, 0], Malformed::Value),
            (&[2, 0, 0, 0, 9, 200, 0, 0, 0, 0, 0, 0, 0, 0], Malformed::Value),
        ];
        for (bytes, expected) in cases {
            let mut decoder = Decoder::default();
            decoder.feed(bytes);
            assert_eq!(decoder.next_from_guest(), Err(expected), "{bytes:?}");
        }
    }

    #[test]
    fn long_reasons_are_cut_at_a_character() {
        let reason = "é".repeat(MAX_PAYLOAD);
        let wire = FromGuest::Ended(EntrypointEnd::NotStarted { code: 125, reason }).encode();
        let mut decoder = Decoder::default();
        decoder.feed(&wire);
        let Ok(Some(FromGuest::Ended(EntrypointEnd::NotStarted { reason, .. }))) =
            decoder.next_from_guest()
        else {
            panic!("cut message does not decode");
        };
        assert!(reason.chars().all(|c| c == 'é') && reason.len() > MAX_PAYLOAD - 4);
    }
}
