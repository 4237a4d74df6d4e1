//! The exec and terminal protocols: framing, requests, and what a hostile guest may reply to a client.

use mote_agent::exec::{self, ExecChunk, Request, Stream};
use mote_agent::files::FilesystemResponse;
use mote_agent::frame::{self, Decoder, Frame, HEADER_LEN};
use mote_agent::pty::{self, PtyRequest, PtyResize};

use super::Input;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let step = usize::from(input.u8()).max(1);
    let max_payload = input.choose(&[16, 300, pty::MAX_PAYLOAD, exec::MAX_PAYLOAD]);
    let stream = input.0;
    let frames = cut(stream, step, max_payload);
    assert_eq!(frames, cut(stream, usize::MAX, max_payload));
    let encoded: Vec<u8> =
        frames.iter().flat_map(|frame| frame::encode(frame.kind, &frame.payload)).collect();
    assert!(stream.starts_with(&encoded), "frames have one spelling");
    for frame in &frames {
        look_at(&frame.payload);
        chunks(&frame.payload);
    }
}

fn cut(stream: &[u8], step: usize, max_payload: usize) -> Vec<Frame> {
    let mut decoder = Decoder::new(max_payload);
    let mut frames = Vec::new();
    let mut fed = 0;
    for piece in stream.chunks(step) {
        decoder.feed(piece);
        fed += piece.len();
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    assert!(frame.payload.len() <= max_payload);
                    frames.push(frame);
                }
                Ok(None) => break,
                Err(too_long) => {
                    assert!(too_long.length as usize > max_payload);
                    return frames;
                }
            }
        }
    }
    let taken: usize = frames.iter().map(|frame| HEADER_LEN + frame.payload.len()).sum();
    assert_eq!(decoder.is_empty(), taken == fed);
    frames
}

/// Everything that is parsed out of a payload, by either side.
fn look_at(payload: &[u8]) {
    match Request::parse(payload) {
        Ok(Request::Exec(request)) => {
            let again = serde_json::to_vec(&request).expect("serialises");
            assert_eq!(Request::parse(&again), Ok(Request::Exec(request)));
        }
        Ok(Request::File(request)) => {
            let again = serde_json::to_vec(&request).expect("serialises");
            assert_eq!(Request::parse(&again), Ok(Request::File(request.clone())));
            if let Some(Ok(contents)) = request.data.as_deref().map(exec::from_base64) {
                assert_eq!(exec::from_base64(&exec::to_base64(&contents)), Ok(contents));
            }
        }
        Ok(Request::Enveloped(request)) => {
            let again = serde_json::to_vec(&request).expect("serialises");
            assert_eq!(Request::parse(&again), Ok(Request::Enveloped(request)));
        }
        Err(text) => assert!(
            ["Invalid JSON: ", "Invalid guest session request: "]
                .iter()
                .any(|start| text.starts_with(start))
        ),
    }
    if let Ok(request) = serde_json::from_slice::<PtyRequest>(payload) {
        let again = serde_json::to_vec(&request).expect("serialises");
        assert_eq!(serde_json::from_slice::<PtyRequest>(&again).ok(), Some(request));
    }
    let _ = serde_json::from_slice::<PtyResize>(payload);
    let _ = serde_json::from_slice::<exec::ExecOutput>(payload);
    let _ = serde_json::from_slice::<exec::FileResponse>(payload);
    let _ = serde_json::from_slice::<FilesystemResponse>(payload);
    let _ = serde_json::from_slice::<exec::ExecExit>(payload);
    let _ = str::from_utf8(payload).ok().and_then(exec::from_base64url);
    // What the quick parser accepts, the general one parses to the same.
    if let Some(chunk) = exec::parse_chunk(payload) {
        assert_eq!(serde_json::from_slice::<ExecChunk>(payload).ok(), Some(chunk));
    }
}

/// Any bytes as output: both parsers read back what was written.
fn chunks(output: &[u8]) {
    let output = &output[..output.len().min(exec::MAX_CHUNK)];
    let frame = exec::chunk_frame(Stream::Stderr, output);
    let expected = ExecChunk { stream: Stream::Stderr, data: output.into() };
    assert_eq!(
        serde_json::from_slice::<ExecChunk>(&frame[HEADER_LEN..]).ok().as_ref(),
        Some(&expected)
    );
    assert_eq!(exec::parse_chunk(&frame[HEADER_LEN..]), Some(expected));
}
