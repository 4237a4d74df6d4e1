//! The exec protocol (contract §4): what a client sends to the box's exec socket and what it gets
//! back. Used by the agent's server and by `mote exec` and `mote cp`.
//!
//! Members marked "mote's own" are not in the contract. Servers ignore members that they do not
//! know, and replies carry ours only where the contract has no way to say the same.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::files;
pub use crate::files::FileOp;
use crate::instance::Process;
use crate::text::Text;

/// Frame types (contract §4.1).
pub mod kind {
    /// A request, a reply, a chunk of output, or raw input.
    pub const DATA: u8 = 0x01;
    /// The end of a streaming command, or an instruction about one.
    pub const CONTROL: u8 = 0x02;
    /// Returned as it came.
    pub const HEARTBEAT: u8 = 0x03;
    /// A text: why this connection ends.
    pub const ERROR: u8 = 0x04;
    /// The connection ends.
    pub const CLOSE: u8 = 0x05;
}

/// Instructions, the payloads of [`kind::CONTROL`] frames from the client (contract §4.3, "later
/// additions"): to a command that runs, but for [`control::SIGNAL_MAIN`] and [`control::START`], which may be all
/// that a connection is for.
pub mod control {
    /// Kill the command.
    pub const CANCEL: &[u8] = b"cancel";
    /// No more input follows.
    pub const STDIN_CLOSE: &[u8] = b"stdin-close";
    /// Answer with [`FLUSH_ACK`] once all output so far has been sent.
    pub const FLUSH: &[u8] = b"flush";
    /// The answer to [`FLUSH`].
    pub const FLUSH_ACK: &[u8] = b"flush-ack";
    /// Prefix of a signal number for the command's process group.
    pub const SIGNAL: &[u8] = b"signal:";
    /// Prefix of a signal number for the box's entrypoint.
    pub const SIGNAL_MAIN: &[u8] = b"signal-main:";
    /// The answer to [`SIGNAL_MAIN`].
    pub const SIGNAL_MAIN_ACK: &[u8] = b"signal-main-ack";

    /// mote's own, all that a connection is for: start the entrypoint that was made ready.
    pub const START: &[u8] = b"start-entrypoint";
    /// The answer to [`START`] once the entrypoint runs.
    pub const START_ACK: &[u8] = b"start-entrypoint-ack";
    /// mote's own, to clients that ask for it ([`super::ExecRequest::announce`]): the command runs.
    pub const STARTED: &[u8] = b"started";

    /// Longest instruction that a connection may begin with.
    pub const MAX_FIRST: usize = 64;

    /// The signal that an instruction names behind this prefix; `None` for anything else.
    pub fn signal(instruction: &[u8], prefix: &[u8]) -> Option<i32> {
        let digits = str::from_utf8(instruction.strip_prefix(prefix)?).ok()?;
        digits.parse().ok().filter(|number| (1..=64).contains(number))
    }
}

/// Longest payload in either direction.
pub const MAX_PAYLOAD: usize = 16 << 20;

/// Most bytes of each output in one reply, to clients that know of such a bound ([`ExecRequest::is_bounded`]).
pub const MAX_ONE_SHOT_OUTPUT: usize = 1 << 20;

/// The time limit that `timeout_ns: 0` means.
pub const DEFAULT_TIMEOUT_NS: u64 = 5_000_000_000;

/// What a command that was killed at its time limit says last on standard error.
pub const TIMEOUT_NOTE: &[u8] = b"\nProcess killed: timeout exceeded";

/// Run a command.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments.
    pub cmd: Vec<Text>,
    /// Time limit in nanoseconds; 0 is [`DEFAULT_TIMEOUT_NS`].
    pub timeout_ns: u64,
    /// `NAME=value` entries over the box's own environment.
    #[serde(default)]
    pub env: Vec<Text>,
    /// Directory to start in; the box's own by default.
    #[serde(default)]
    pub working_dir: Option<Text>,
    /// All of its standard input; none is an empty one.
    #[serde(default)]
    pub stdin: Option<Vec<u8>>,
    /// `uid`, `uid:gid`, `name` or `name:group`; root by default.
    #[serde(default)]
    pub user: Option<String>,
    /// Whether output is sent as it comes.
    #[serde(default)]
    pub streaming: bool,
    /// Whether [`kind::DATA`] frames after this one are its standard input. Clients from 3.2 on always say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_streaming: Option<bool>,
    /// Directory of the guest that is the command's root; the box's own by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rootfs: Option<Text>,
    /// What makes a repeated request without `streaming` the same one: it runs once, and has one answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// mote's own: whether an end that is not the command's own is told by [`ExecExit::reason`], not on
    /// its standard error. For commands with `streaming`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub explain: bool,
    /// mote's own: whether [`control::STARTED`] is sent when the command runs. For commands with `streaming`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub announce: bool,
    /// mote's own: who it runs as and what it may do, in place of `user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
}

impl ExecRequest {
    /// Whether input comes after the request.
    pub fn has_streaming_input(&self) -> bool {
        self.stdin_streaming.unwrap_or_default()
    }

    /// Whether the client takes no more than [`MAX_ONE_SHOT_OUTPUT`] of each output in one reply. One of 0.8.0
    /// ignores [`ExecOutput::truncated`], and fetches files so.
    pub fn is_bounded(&self) -> bool {
        self.request_id.is_some() || self.stdin_streaming.is_some()
    }
}

/// Move a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRequest {
    /// In which direction.
    pub op: FileOp,
    /// Where in the guest.
    pub guest_path: Text,
    /// Contents to upload, in base64.
    #[serde(default)]
    pub data: Option<String>,
    /// mote's own: start of this part. An upload of another part than the first neither creates nor
    /// empties the file, and one of any part creates no directory. One of a whole file, without `offset`,
    /// creates those that its path names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// mote's own: most bytes to download. Without it a file that does not fit is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
    /// mote's own: permission bits that the uploaded file gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

/// The reply to a [`FileRequest`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileResponse {
    /// Whether it was done.
    pub success: bool,
    /// Downloaded contents, in base64.
    #[serde(default)]
    pub data: Option<String>,
    /// Bytes moved.
    pub size: u64,
    /// Why it was not done.
    #[serde(default)]
    pub error: Option<String>,
    /// mote's own: permission bits of the downloaded file, for requests with `length`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

/// Most bytes of a file that one frame carries as base64, with room for the members around them.
pub const MAX_FILE_PART: usize = (MAX_PAYLOAD - 64 * 1024) / 4 * 3;

/// The reply to a command without `streaming`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecOutput {
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// Its exit code; 128+n if signal n killed it.
    pub exit_code: i32,
    /// Whether output was left out because the reply would have been too long.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
}

/// Where output was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Output of a streaming command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecChunk {
    /// Where it was written.
    pub stream: Stream,
    /// The bytes.
    pub data: Vec<u8>,
}

/// The end of a streaming command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecExit {
    /// Its exit code; 128+n if signal n killed it.
    pub exit_code: i32,
    /// Whether the box's kernel killed something of the box for want of memory meanwhile.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub oom_killed: bool,
    /// mote's own, for requests with `explain`: why it did not start, with the code 127 (it is not there), 126
    /// (it cannot be executed) or 125 (the guest could not set it up), or why the agent killed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What a first [`kind::DATA`] frame asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Run a command.
    Exec(ExecRequest),
    /// Move a file.
    File(FileRequest),
    /// What came in the later runtime's envelope.
    Enveloped(files::Request),
}

impl Request {
    /// Reads a request. The kinds are told apart by their members alone.
    ///
    /// # Errors
    /// The text for the [`kind::ERROR`] frame.
    pub fn parse(payload: &[u8]) -> Result<Request, String> {
        #[derive(Deserialize)]
        struct Members {
            request_type: Option<IgnoredAny>,
            cmd: Option<IgnoredAny>,
            op: Option<IgnoredAny>,
        }
        let invalid = |error: serde_json::Error| format!("Invalid JSON: {error}");
        match serde_json::from_slice(payload).map_err(invalid)? {
            Members { request_type: Some(_), .. } => serde_json::from_slice(payload)
                .map(Request::Enveloped)
                .map_err(|error| format!("Invalid guest session request: {error}")),
            Members { cmd: None, op: Some(_), .. } => {
                serde_json::from_slice(payload).map(Request::File).map_err(invalid)
            }
            _ => serde_json::from_slice(payload).map(Request::Exec).map_err(invalid),
        }
    }
}

/// Contents as a file request or response carries them.
pub fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// The contents that a file request or response carries.
///
/// # Errors
/// If the text is not base64; the message says so and where.
pub fn from_base64(text: &str) -> Result<Vec<u8>, String> {
    STANDARD.decode(text).map_err(|error| format!("data is not base64: {error}"))
}

/// Text in base64url without padding, as later runtimes write `BOX_EXEC_*` variables (contract
/// §2.10).
pub fn from_base64url(text: &str) -> Option<String> {
    String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()
}

/// A byte's decimal digits with a comma behind them.
#[derive(Clone, Copy)]
struct Number {
    text: [u8; 4],
    /// How many characters that is.
    len: u8,
}

/// Every byte as a number. Nearly all of what a box sends is such numbers, so they are not computed
/// again each time.
const NUMBERS: [Number; 256] = {
    let mut table = [Number { text: [0; 4], len: 0 }; 256];
    let mut byte = 0;
    while byte < 256 {
        let digits = [byte / 100, byte / 10 % 10, byte % 10];
        let first = if byte >= 100 {
            0
        } else if byte >= 10 {
            1
        } else {
            2
        };
        let (mut text, mut len) = ([b','; 4], 0);
        while first + len < 3 {
            text[len] = b'0' + digits[first + len] as u8;
            len += 1;
        }
        table[byte] = Number { text, len: len as u8 + 1 };
        byte += 1;
    }
    table
};

/// Appends bytes as the items of a JSON array of numbers, at most four characters each. `first` says
/// that no item precedes them.
pub fn push_numbers(json: &mut Vec<u8>, bytes: &[u8], first: bool) {
    if !first && !bytes.is_empty() {
        json.push(b',');
    }
    let mut end = json.len();
    json.resize(end + 4 * bytes.len(), 0);
    for byte in bytes {
        let Number { text, len } = &NUMBERS[usize::from(*byte)];
        json[end..end + 4].copy_from_slice(text);
        end += usize::from(*len);
    }
    // Without the last comma.
    json.truncate(end - usize::from(!bytes.is_empty()));
}

/// Longest output that one chunk's frame carries.
pub const MAX_CHUNK: usize = 64 * 1024;

/// The frame of an [`ExecChunk`], at most [`MAX_CHUNK`] bytes of output.
pub fn chunk_frame(stream: Stream, data: &[u8]) -> Vec<u8> {
    let mut json = Vec::with_capacity(64 + 4 * data.len());
    json.extend(match stream {
        Stream::Stdout => &b"{\"stream\":\"Stdout\",\"data\":["[..],
        Stream::Stderr => &b"{\"stream\":\"Stderr\",\"data\":["[..],
    });
    push_numbers(&mut json, data, true);
    json.extend(b"]}");
    crate::frame::encode(kind::DATA, &json)
}

/// Reads the payload of a [`chunk_frame`]. `None` for JSON of any other shape, which is for a JSON
/// parser to look at: that takes four times as long, for what may be hundreds of megabytes.
pub fn parse_chunk(payload: &[u8]) -> Option<ExecChunk> {
    let (stream, mut rest) = match payload.strip_prefix(b"{\"stream\":\"Stdout\",\"data\":[") {
        Some(rest) => (Stream::Stdout, rest),
        None => (Stream::Stderr, payload.strip_prefix(b"{\"stream\":\"Stderr\",\"data\":[")?),
    };
    let mut data = Vec::with_capacity(rest.len() / 2);
    while let Some(&[a, b, c, d]) = rest.first_chunk() {
        let [x, y, z] = [a, b, c].map(|digit| u32::from(digit.wrapping_sub(b'0')));
        let (number, length) = match [b, c, d] {
            [b',', ..] => (x, 2),
            // JSON has no numbers that start with zero.
            [_, b',', _] if x > 0 && y < 10 => (10 * x + y, 3),
            [_, _, b','] if x > 0 && y < 10 && z < 10 => (100 * x + 10 * y + z, 4),
            _ => break,
        };
        if x > 9 {
            return None;
        }
        data.push(u8::try_from(number).ok()?);
        rest = &rest[length..];
    }
    let last = rest.strip_suffix(b"]}")?;
    if !(data.is_empty() && last.is_empty()) {
        // Rust would also take "+1".
        if !last.first()?.is_ascii_digit() || (last[0] == b'0' && last.len() > 1) {
            return None;
        }
        data.push(str::from_utf8(last).ok()?.parse().ok()?);
    }
    Some(ExecChunk { stream, data })
}

/// The frame of an [`ExecExit`].
pub fn exit_frame(exit: &ExecExit) -> Vec<u8> {
    // Plain data, which always serialises.
    let json = serde_json::to_vec(exit).unwrap_or_default();
    crate::frame::encode(kind::CONTROL, &json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::encode;

    fn exec(cmd: &[&str]) -> ExecRequest {
        ExecRequest {
            cmd: cmd.iter().map(Text::from).collect(),
            timeout_ns: 0,
            env: vec![],
            working_dir: None,
            stdin: None,
            user: None,
            streaming: false,
            stdin_streaming: None,
            rootfs: None,
            request_id: None,
            explain: false,
            announce: false,
            process: None,
        }
    }

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).expect("serialises")
    }

    /// The examples of contract §4.5, byte for byte.
    #[test]
    fn the_contracts_bytes() {
        let request = r#"{"cmd":["echo","hi"],"timeout_ns":0,"env":[],"working_dir":null,"stdin":null,"user":null,"streaming":false}"#;
        assert_eq!(json(&exec(&["echo", "hi"])), request);
        assert_eq!(encode(kind::DATA, request.as_bytes())[..5], [1, 0, 0, 0, 0x6b]);
        assert_eq!(Request::parse(request.as_bytes()), Ok(Request::Exec(exec(&["echo", "hi"]))));

        let reply =
            ExecOutput { stdout: b"hi\n".to_vec(), stderr: vec![], exit_code: 0, truncated: false };
        assert_eq!(json(&reply), r#"{"stdout":[104,105,10],"stderr":[],"exit_code":0}"#);
        assert_eq!(
            chunk_frame(Stream::Stdout, b"hi\n"),
            encode(kind::DATA, br#"{"stream":"Stdout","data":[104,105,10]}"#)
        );
        let exit = |oom_killed| ExecExit { exit_code: 0, oom_killed, reason: None };
        assert_eq!(exit_frame(&exit(false)), encode(kind::CONTROL, br#"{"exit_code":0}"#));
        let killed = br#"{"exit_code":0,"oom_killed":true}"#;
        assert_eq!(exit_frame(&exit(true)), encode(kind::CONTROL, killed));

        let upload = r#"{"op":"Upload","guest_path":"/tmp/f","data":"aGkK"}"#;
        let file = FileRequest {
            op: FileOp::Upload,
            guest_path: "/tmp/f".into(),
            data: Some(to_base64(b"hi\n")),
            offset: None,
            length: None,
            mode: None,
        };
        assert_eq!(json(&file), upload);
        assert_eq!(Request::parse(upload.as_bytes()), Ok(Request::File(file)));
        let done = FileResponse { success: true, size: 3, ..FileResponse::default() };
        assert_eq!(json(&done), r#"{"success":true,"data":null,"size":3,"error":null}"#);
    }

    #[test]
    fn what_is_no_request_says_why() {
        for (text, start) in [
            ("", "Invalid JSON: EOF"),
            ("{", "Invalid JSON: EOF"),
            ("{}", "Invalid JSON: missing field `cmd`"),
            ("[1]", "Invalid JSON: "),
            (r#"{"op":"Move","guest_path":"/"}"#, "Invalid JSON: unknown variant `Move`"),
            (r#"{"cmd":["x"],"timeout_ns":-1}"#, "Invalid JSON: "),
            (
                r#"{"request_type":"file","cmd":["x"],"timeout_ns":0}"#,
                "Invalid guest session request: missing field `request`",
            ),
            (
                r#"{"request_type":"other","request":{}}"#,
                "Invalid guest session request: unknown variant `other`",
            ),
        ] {
            let error = Request::parse(text.as_bytes()).expect_err(text);
            assert!(error.starts_with(start), "{text}: {error}");
        }
    }

    #[test]
    fn signals_have_numbers() {
        let signal = |text: &str| control::signal(text.as_bytes(), control::SIGNAL);
        assert_eq!(
            ["signal:1", "signal:15", "signal:64"].map(signal),
            [Some(1), Some(15), Some(64)]
        );
        for text in
            ["signal:0", "signal:65", "signal:-9", "signal:", "signal:TERM", "signal-main:9"]
        {
            assert_eq!(signal(text), None, "{text}");
        }
    }

    #[test]
    fn numbers_are_json() {
        let bytes: Vec<u8> = (0..=255).collect();
        let frame = chunk_frame(Stream::Stderr, &bytes);
        let chunk: ExecChunk = serde_json::from_slice(&frame[5..]).expect("parses");
        assert_eq!(chunk, ExecChunk { stream: Stream::Stderr, data: bytes });
        let mut json = Vec::new();
        push_numbers(&mut json, &[], true);
        push_numbers(&mut json, &[7, 77], true);
        push_numbers(&mut json, &[], false);
        push_numbers(&mut json, &[177], false);
        assert_eq!(json, b"7,77,177");
        assert_eq!(parse_chunk(&frame[5..]), Some(chunk));
        let empty = ExecChunk { stream: Stream::Stdout, data: vec![] };
        assert_eq!(parse_chunk(&chunk_frame(Stream::Stdout, b"")[5..]), Some(empty));
    }

    #[test]
    fn other_json_is_left_to_the_parser() {
        for array in [
            "", "]", "],}", ",]}", "1,]}", "1", "1,", "1]", "1}", "1] }", "1]}}", "1,2", " 1]}",
            "1, 2]}", "-1]}", "256]}", "999]}", "1000]}", "1.5]}", "1e1]}", "\"1\"]}", "/]}",
            ":]}", "1]2]}", "]1]}", "[1]]}", "01]}", "+1]}", "00]}", "01,2]}", "001,2]}", "1,+2]}",
            "1,02]}",
        ] {
            let text = format!("{{\"stream\":\"Stdout\",\"data\":[{array}");
            assert_eq!(parse_chunk(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse_chunk(br#"{"stream":"Other","data":[]}"#), None);
        assert_eq!(parse_chunk(br#"{"data":[1],"stream":"Stdout"}"#), None);
    }
}
