//! A client of the exec and terminal sockets, written from the description of the protocols and sharing
//! no code with mote.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::TestBox;

/// Frame types of the exec protocol.
pub const DATA: u8 = 1;
pub const CONTROL: u8 = 2;
pub const HEARTBEAT: u8 = 3;
pub const ERROR: u8 = 4;

/// A frame's type and its payload.
pub type Frame = (u8, Vec<u8>);

/// A connection to one of a box's sockets.
pub struct Client(pub UnixStream);

impl Client {
    /// Connects to `sock/NAME.sock`.
    pub fn connect(test: &TestBox, name: &str) -> Self {
        let path = test.path(&format!("sock/{name}.sock"));
        let stream = UnixStream::connect(path).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(120))).expect("timeout");
        Client(stream)
    }

    pub fn send(&mut self, kind: u8, payload: &[u8]) {
        self.try_send(kind, payload).expect("sends");
    }

    /// The same to a server that may close the connection before it has everything.
    pub fn try_send(&mut self, kind: u8, payload: &[u8]) -> std::io::Result<()> {
        let mut bytes = vec![kind];
        bytes.extend((payload.len() as u32).to_be_bytes());
        bytes.extend(payload);
        self.0.write_all(&bytes)
    }

    pub fn send_json(&mut self, kind: u8, value: &Value) {
        self.send(kind, value.to_string().as_bytes());
    }

    /// The next frame; `None` at the end.
    pub fn receive(&mut self) -> Option<Frame> {
        let mut header = [0; 5];
        match self.0.read(&mut header[..1]).expect("reads") {
            0 => return None,
            _ => self.0.read_exact(&mut header[1..]).expect("a whole header"),
        }
        let length = u32::from_be_bytes(header[1..].try_into().expect("four bytes"));
        assert!(length <= 16 << 20, "a frame of {length} bytes");
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).expect("a whole payload");
        Some((header[0], payload))
    }

    /// All frames to the end.
    pub fn rest(&mut self) -> Vec<Frame> {
        std::iter::from_fn(|| self.receive()).collect()
    }

    /// All bytes to the end.
    pub fn rest_bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).expect("reads");
        bytes
    }
}

/// Sends one request and returns all frames of the answer.
pub fn request(test: &TestBox, request: &Value) -> Vec<Frame> {
    let mut client = Client::connect(test, "exec");
    client.send_json(DATA, request);
    client.rest()
}

/// What a command did.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    pub stdout: String,
    pub stderr: String,
    pub code: i64,
}

/// Runs a command without streaming; `more` are further members of the request.
pub fn run_with(test: &TestBox, cmd: &[&str], more: Value) -> Done {
    let mut members = json!({"cmd": cmd, "timeout_ns": 60_000_000_000u64});
    for (name, value) in more.as_object().expect("an object") {
        members[name] = value.clone();
    }
    let frames = request(test, &members);
    let [(DATA, payload)] = &frames[..] else { panic!("one reply to {cmd:?}, not {frames:?}") };
    let output: Value = serde_json::from_slice(payload).expect("JSON");
    Done {
        stdout: text(&output["stdout"]),
        stderr: text(&output["stderr"]),
        code: output["exit_code"].as_i64().expect("a code"),
    }
}

pub fn run(test: &TestBox, cmd: &[&str]) -> Done {
    run_with(test, cmd, json!({}))
}

/// Runs a shell script and returns what it wrote to standard output.
pub fn shell(test: &TestBox, script: &str) -> String {
    run(test, &["sh", "-c", script]).stdout
}

/// An array of byte values as text.
pub fn text(bytes: &Value) -> String {
    let bytes = bytes.as_array().expect("an array").iter();
    let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().expect("a byte") as u8).collect();
    String::from_utf8(bytes).expect("text")
}
