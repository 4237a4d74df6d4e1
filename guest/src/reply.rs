//! What a command's client gets: output as it comes, or one reply at the end (contract §4.3).

use mote_agent::exec::{self, ExecExit, Stream, TIMEOUT_NOTE, kind};
use mote_agent::frame;

use crate::connection::Connection;

/// Where output goes.
#[derive(Debug)]
pub enum Reply {
    /// Out at once.
    Streaming,
    /// Into one reply at the end.
    Whole(Whole),
}

/// A reply at the end.
#[derive(Debug)]
pub struct Whole {
    /// Output and errors, the arrays of [`exec::ExecOutput`], as JSON text already: they are nearly all of the
    /// reply.
    outputs: [Kept; 2],
    /// Most bytes of each.
    bound: usize,
    truncated: bool,
}

/// What is kept of one of a command's two outputs.
#[derive(Debug, Default)]
struct Kept {
    json: Vec<u8>,
    /// How many bytes of output that is.
    bytes: usize,
}

/// Characters of a whole reply that only one stream's output may use, so that a flood on the other
/// cannot hide it.
const RESERVED: usize = 1 << 20;
/// Characters for everything else in the reply, with the note about a time limit.
const AROUND: usize = 512;

impl Reply {
    /// One reply with as much output as it can carry.
    pub fn whole() -> Self {
        Self::bounded(usize::MAX)
    }

    /// One reply with at most so many bytes of each output.
    pub fn bounded(bound: usize) -> Self {
        Reply::Whole(Whole { outputs: Default::default(), bound, truncated: false })
    }

    /// Whether output should be read: always, if it is kept or dropped here.
    pub fn has_room(&self, connection: &Connection) -> bool {
        match self {
            Reply::Streaming => !connection.is_full(),
            Reply::Whole(_) => true,
        }
    }

    /// Adds what the command has written, or what is said in its place.
    pub fn push(&mut self, stream: Stream, bytes: &[u8], connection: &mut Connection) {
        match self {
            Reply::Streaming => connection.send(&exec::chunk_frame(stream, bytes)),
            Reply::Whole(whole) => whole.push(stream, bytes),
        }
    }

    /// Ends the reply, and gives what is yet to be sent piece by piece: a whole copy of it may be more
    /// memory than the box has. Only a streaming one has more than an exit code.
    pub fn finish(self, exit: &ExecExit, mut send: impl FnMut(&[u8])) {
        let Whole { outputs: [stdout, stderr], truncated, .. } = match self {
            Reply::Streaming => return send(&exec::exit_frame(exit)),
            Reply::Whole(whole) => whole,
        };
        let end = if truncated { ",\"truncated\":true}" } else { "}" };
        let end = format!("],\"exit_code\":{}{end}", exit.exit_code);
        let (start, middle) = (b"{\"stdout\":[", b"],\"stderr\":[");
        let output = stdout.json.len() + stderr.json.len();
        let length = start.len() + middle.len() + output + end.len();
        send(&frame::header(kind::DATA, length as u32));
        send(start);
        send(&stdout.json);
        drop(stdout);
        send(middle);
        send(&stderr.json);
        send(end.as_bytes());
    }
}

impl Whole {
    fn push(&mut self, stream: Stream, bytes: &[u8]) {
        let [stdout, stderr] = &mut self.outputs;
        let (to, other) = match stream {
            Stream::Stdout => (stdout, stderr),
            Stream::Stderr => (stderr, stdout),
        };
        let limit = exec::MAX_PAYLOAD - AROUND - other.json.len().max(RESERVED);
        let is_note = bytes == TIMEOUT_NOTE;
        let (limit, bound) =
            if is_note { (limit + AROUND / 2, usize::MAX) } else { (limit, self.bound) };
        let mut rest = bytes;
        while !rest.is_empty() {
            // At most four characters a byte.
            let room = limit.saturating_sub(to.json.len()) / 4;
            let room = room.min(bound.saturating_sub(to.bytes));
            if room == 0 {
                self.truncated = true;
                break;
            }
            let (now, later) = rest.split_at(room.min(rest.len()));
            exec::push_numbers(&mut to.json, now, to.bytes == 0);
            to.bytes += now.len();
            rest = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exec::ExecOutput;

    #[test]
    fn each_output_has_its_bound_and_the_note_comes_on_top() {
        let mut whole = Whole { outputs: Default::default(), bound: 5, truncated: false };
        whole.push(Stream::Stdout, b"abc");
        whole.push(Stream::Stderr, b"12345");
        assert!(!whole.truncated);
        whole.push(Stream::Stdout, b"defg");
        whole.push(Stream::Stderr, TIMEOUT_NOTE);
        let mut frame = Vec::new();
        let exit = ExecExit { exit_code: 137, ..ExecExit::default() };
        Reply::Whole(whole).finish(&exit, |piece| frame.extend_from_slice(piece));
        let output: ExecOutput = serde_json::from_slice(&frame[5..]).expect("parses");
        let stderr = [b"12345", TIMEOUT_NOTE].concat();
        let expected =
            ExecOutput { stdout: b"abcde".to_vec(), stderr, exit_code: 137, truncated: true };
        assert_eq!(output, expected);
        assert_eq!(
            frame.len() - 5,
            u32::from_be_bytes([frame[1], frame[2], frame[3], frame[4]]) as usize
        );
    }
}
