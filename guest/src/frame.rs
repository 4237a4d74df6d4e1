//! The framing that all channels between host and guest share (contract §4.1):
//! `type: u8 | length: u32 big-endian | payload`.

/// Length of what precedes a payload.
pub const HEADER_LEN: usize = 5;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its type; the numbers are each protocol's own.
    pub kind: u8,
    /// What it carries.
    pub payload: Vec<u8>,
}

/// The header of a frame: its type and the length of its payload.
pub fn parse_header(header: [u8; HEADER_LEN]) -> (u8, u32) {
    let [kind, length @ ..] = header;
    (kind, u32::from_be_bytes(length))
}

/// What precedes a payload of this length.
pub fn header(kind: u8, length: u32) -> [u8; HEADER_LEN] {
    let [a, b, c, d] = length.to_be_bytes();
    [kind, a, b, c, d]
}

/// The bytes of a frame. Payloads are far shorter than 4 GiB.
pub fn encode(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend(header(kind, payload.len() as u32));
    bytes.extend(payload);
    bytes
}

/// A frame whose payload is longer than its channel allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong {
    /// The length it claims.
    pub length: u32,
}

/// Cuts a byte stream into frames, whatever the boundaries it arrives in. Holds at most one frame
/// and what was fed at once.
#[derive(Debug)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// Start of what has not been cut yet.
    start: usize,
    max_payload: usize,
}

impl Decoder {
    /// A decoder that refuses payloads longer than `max_payload` bytes.
    pub fn new(max_payload: usize) -> Self {
        Decoder { bytes: Vec::new(), start: 0, max_payload }
    }

    /// Adds what was read.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether all that was fed has been cut into frames.
    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// The next whole frame, `None` when more bytes are needed.
    ///
    /// # Errors
    /// If the next frame's payload is longer than the decoder allows. The stream cannot go on then.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, TooLong> {
        let frame = self.next_slice()?;
        Ok(frame.map(|(kind, payload)| Frame { kind, payload: payload.to_vec() }))
    }

    /// The same without a copy: type and payload.
    ///
    /// # Errors
    /// As [`Decoder::next_frame`].
    pub fn next_slice(&mut self) -> Result<Option<(u8, &[u8])>, TooLong> {
        let Some((header, rest)) = self.bytes[self.start..].split_first_chunk() else {
            return Ok(None);
        };
        let (kind, length) = parse_header(*header);
        if length as usize > self.max_payload {
            return Err(TooLong { length });
        }
        let Some(payload) = rest.get(..length as usize) else { return Ok(None) };
        self.start += HEADER_LEN + length as usize;
        Ok(Some((kind, payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_fragmentation() {
        let frames = [(3, ""), (1, "abc"), (9, "x")]
            .map(|(kind, text)| Frame { kind, payload: text.into() });
        let wire: Vec<u8> = frames.iter().flat_map(|f| encode(f.kind, &f.payload)).collect();
        for piece in 1..=wire.len() {
            let mut decoder = Decoder::new(3);
            let mut seen = Vec::new();
            for chunk in wire.chunks(piece) {
                decoder.feed(chunk);
                while let Some(frame) = decoder.next_frame().expect("valid") {
                    seen.push(frame);
                }
            }
            assert_eq!(seen, frames, "in pieces of {piece}");
            assert!(decoder.is_empty());
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_payload() {
        let mut decoder = Decoder::new(16);
        decoder.feed(&[1, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(decoder.next_frame(), Err(TooLong { length: u32::MAX }));
        let mut decoder = Decoder::new(16);
        decoder.feed(&[1, 0, 0, 0, 17]);
        assert_eq!(decoder.next_frame(), Err(TooLong { length: 17 }));
    }
}
