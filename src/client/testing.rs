//! A fake agent on a real socket, and pipes in place of the process's own input and output.

use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mote_agent::frame::{self, Frame, HEADER_LEN};
use mote_agent::text::Text;

use super::exec::Program;
use super::relay::{Sink, Stdio};
use super::stop::Stop;
use super::target::Target;

/// An agent that serves a number of connections, one after the other.
pub struct Agent {
    pub target: Target,
    thread: JoinHandle<()>,
}

impl Agent {
    pub fn new(
        name: &str,
        connections: usize,
        mut serve: impl FnMut(usize, UnixStream) + Send + 'static,
    ) -> Self {
        let socket = scratch(name);
        let listener = UnixListener::bind(&socket).expect("binds");
        let thread = thread::spawn(move || {
            for number in 0..connections {
                serve(number, listener.accept().expect("a client").0);
            }
        });
        Agent { target: Target { socket, wait: Some(Duration::from_secs(5)) }, thread }
    }

    /// An agent that answers a first connection with a frame, as agents answer [`Target::knock`], and
    /// runs a script with the second.
    pub fn answering(
        name: &str,
        answer: u8,
        script: impl FnOnce(UnixStream) + Send + 'static,
    ) -> Self {
        let mut script = Some(script);
        Agent::new(name, 2, move |number, mut client| match number {
            0 => {
                read_frame(&mut client).expect("knocks");
                write_frame(&mut client, answer, b"");
            }
            _ => script.take().expect("one command")(client),
        })
    }

    /// Waits for the agent's end, and panics if one of its assertions failed.
    pub fn join(self) {
        self.thread.join().expect("the agent's assertions hold");
        fs::remove_file(self.target.socket).expect("removed");
    }
}

/// A path of a test's own, where no file is.
pub fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("mote-client-{name}-{}", std::process::id()));
    let _ = fs::remove_file(&path);
    path
}

pub fn program(words: &[&str]) -> Program {
    let cmd = words.iter().map(Text::from).collect();
    Program { cmd, env: vec![], user: None, workdir: None, process: None }
}

pub fn read_frame(client: &mut UnixStream) -> Option<Frame> {
    let mut header = [0; HEADER_LEN];
    client.read_exact(&mut header).ok()?;
    let (kind, length) = frame::parse_header(header);
    let mut payload = vec![0; length as usize];
    client.read_exact(&mut payload).ok()?;
    Some(Frame { kind, payload })
}

pub fn write_frame(client: &mut UnixStream, kind: u8, payload: &[u8]) {
    client.write_all(&frame::encode(kind, payload)).expect("taken");
}

fn file(end: impl Into<OwnedFd>) -> File {
    File::from(end.into())
}

/// The other ends of a [`Stdio`].
pub struct Ends {
    pub input: PipeWriter,
    pub output: PipeReader,
    pub error: PipeReader,
}

pub fn stdio() -> (Stdio, Ends) {
    let (input, write_input) = pipe().expect("pipe");
    let (read_output, output) = pipe().expect("pipe");
    let (read_error, error) = pipe().expect("pipe");
    let stdio = Stdio {
        input: file(input),
        output: Sink::new(file(output)),
        error: Sink::new(file(error)),
    };
    (stdio, Ends { input: write_input, output: read_output, error: read_error })
}

/// Reads to the end in a thread of its own.
pub fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).expect("read");
        bytes
    })
}

/// The message and exit code of a failure.
pub fn said(result: Result<u8, Stop>) -> (u8, String) {
    match result {
        Ok(code) | Err(Stop::Quiet(code)) => (code, String::new()),
        Err(Stop::Ended(code, reason)) => (code, reason),
        Err(Stop::Failed(error)) => (super::FAILED, format!("{error:#}")),
        Err(Stop::Refused(error)) => (super::REFUSED, format!("{error:#}")),
    }
}
