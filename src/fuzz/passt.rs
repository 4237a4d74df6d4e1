//! The framing towards passt: frames arrive as they were sent, wherever they are cut, up to the first
//! impossible length; and frames are sent as they were put.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use event_manager::EventSet;

use super::Input;
use crate::virtio::net::passt::{Connection, FRAME_LEN, Lost};

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (ours, mut passt) = UnixStream::pair().expect("a pair");
    passt.set_nonblocking(true).expect("non-blocking");
    let mut connection = Connection::new(ours).expect("a connection");
    connection.note(EventSet::IN | EventSet::OUT);

    let mut sent = Vec::new();
    let mut received = Vec::new();
    let mut put = Vec::new();
    let mut left = Vec::new();
    let mut lost = false;
    while !input.is_empty() && !lost {
        match input.u8() % 6 {
            // Any bytes, and also whole frames, so that some are valid.
            0 => write(&mut passt, input.short(), &mut sent),
            1 => {
                let len = frame_len(&mut input);
                write(&mut passt, &(len as u32).to_be_bytes(), &mut sent);
                write(&mut passt, &vec![input.u8(); len], &mut sent);
            }
            2 => {
                connection.note(EventSet::IN);
                lost = take(&mut connection, &mut received, usize::from(input.u8()));
            }
            3 if connection.has_room() => {
                let len = frame_len(&mut input);
                if FRAME_LEN.contains(&len) {
                    let (fill, fails) = (input.u8(), input.flag());
                    let result = connection.put_frame(len, |bytes| {
                        assert_eq!(bytes.len(), len);
                        bytes.fill(fill);
                        if fails { Err(()) } else { Ok(()) }
                    });
                    if result.is_ok() {
                        put.extend((len as u32).to_be_bytes());
                        put.extend(vec![fill; len]);
                    }
                }
            }
            4 => {
                connection.note(EventSet::OUT);
                connection.flush().expect("passt reads");
            }
            _ => read(&mut passt, &mut left),
        }
    }
    connection.note(EventSet::IN);
    lost = lost || take(&mut connection, &mut received, usize::MAX);
    let (expected, bad) = frames(&sent);
    assert_eq!(lost, bad, "only a length that no frame has ends the connection");
    assert_eq!(received, expected);

    loop {
        connection.note(EventSet::OUT);
        let flushed = connection.flush().expect("passt reads");
        read(&mut passt, &mut left);
        if flushed {
            break;
        }
    }
    assert!(left == put, "what was put leaves, in order and whole");
}

fn frame_len(input: &mut Input<'_>) -> usize {
    match input.u8() {
        0 => *FRAME_LEN.end(),
        1 => FRAME_LEN.end() + 1,
        2 => input.u16().into(),
        len => len.into(),
    }
}

/// Writes as much as fits.
fn write(passt: &mut UnixStream, mut bytes: &[u8], sent: &mut Vec<u8>) {
    while !bytes.is_empty() {
        match passt.write(bytes) {
            Ok(len) => {
                sent.extend(&bytes[..len]);
                bytes = &bytes[len..];
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("write: {error}"),
        }
    }
}

fn read(passt: &mut UnixStream, left: &mut Vec<u8>) {
    match passt.read_to_end(left) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        other => panic!("the connection lives: {other:?}"),
    }
}

/// Takes at most this many frames. Returns whether the connection is lost.
fn take(connection: &mut Connection, received: &mut Vec<Vec<u8>>, count: usize) -> bool {
    for _ in 0..count {
        match connection.frame() {
            Ok(Some(frame)) => {
                let len = frame.len();
                received.push(frame.into());
                connection.take_frame(len);
            }
            Ok(None) => return false,
            Err(Lost::BadLength(len)) => {
                assert!(!FRAME_LEN.contains(&(len as usize)));
                return true;
            }
            Err(lost) => panic!("the connection lives: {lost}"),
        }
    }
    false
}

/// The whole frames of a stream, and whether an impossible length follows them.
fn frames(mut stream: &[u8]) -> (Vec<Vec<u8>>, bool) {
    let mut frames = Vec::new();
    while stream.len() >= 4 {
        let len = u32::from_be_bytes([stream[0], stream[1], stream[2], stream[3]]) as usize;
        if !FRAME_LEN.contains(&len) {
            return (frames, true);
        }
        let Some(frame) = stream.get(4..4 + len) else { break };
        frames.push(frame.into());
        stream = &stream[4 + len..];
    }
    (frames, false)
}
