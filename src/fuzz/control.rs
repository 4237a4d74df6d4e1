//! The control channel: any bytes decode to the same messages, wherever they are cut; a message that was
//! decoded encodes to the same bytes.

use mote_agent::protocol::{Decoder, EntrypointEnd, FromGuest, FromHost, MAX_PAYLOAD, Malformed};

use super::Input;

type Next<M> = fn(&mut Decoder) -> Result<Option<M>, Malformed>;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let step = usize::from(input.u8()).max(1);
    let stream = input.0;
    let guest = both_ways(stream, step, Decoder::next_from_guest);
    for message in &guest {
        if let FromGuest::Ended(EntrypointEnd::NotStarted { reason, .. }) = message {
            // A byte that is not UTF-8 becomes three bytes.
            assert!(reason.len() <= 3 * MAX_PAYLOAD);
            if reason.len() >= MAX_PAYLOAD {
                continue;
            }
        }
        assert_eq!(
            decode(&message.encode(), Decoder::next_from_guest),
            (vec![message.clone()], None)
        );
    }
    let host = both_ways(stream, step, Decoder::next_from_host);
    let encoded: Vec<u8> = host.iter().flat_map(FromHost::encode).collect();
    assert!(stream.starts_with(&encoded), "the host's messages have one spelling");
}

/// The messages of a stream, which must not depend on how it is cut.
fn both_ways<M: PartialEq + std::fmt::Debug>(stream: &[u8], step: usize, next: Next<M>) -> Vec<M> {
    let (whole, end) = decode(stream, next);
    let mut decoder = Decoder::default();
    let mut cut = Vec::new();
    for piece in stream.chunks(step) {
        decoder.feed(piece);
        let cut_end = drain(&mut decoder, next, &mut cut);
        if cut_end.is_some() {
            assert_eq!(cut_end, end);
            break;
        }
    }
    assert_eq!(cut, whole);
    whole
}

fn decode<M>(stream: &[u8], next: Next<M>) -> (Vec<M>, Option<Malformed>) {
    let mut decoder = Decoder::default();
    decoder.feed(stream);
    let mut messages = Vec::new();
    let end = drain(&mut decoder, next, &mut messages);
    (messages, end)
}

fn drain<M>(decoder: &mut Decoder, next: Next<M>, messages: &mut Vec<M>) -> Option<Malformed> {
    loop {
        match next(decoder) {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => return None,
            Err(malformed) => return Some(malformed),
        }
    }
}
