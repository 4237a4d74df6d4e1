//! An exec session (contract §4): one request, its command or file, and the reply.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use mote_agent::exec::{
    self, DEFAULT_TIMEOUT_NS, ExecRequest, MAX_CHUNK, Request, Stream, TIMEOUT_NOTE, control, kind,
};
use mote_agent::frame::{self, Frame};

use crate::cgroup::CommandCgroup;
use crate::connection::{Connection, HANG_UP_CHECK, Received};
use crate::launch::{self, Refusal, SETUP_FAILED, doing};
use crate::session::{Context, environment, exit_code, program, working_dir};
use crate::sys::{self, Interest, until};
use crate::transfer;

/// Exit code of a command that could not be started (contract §4.4).
const NOT_STARTED: i32 = 127;
/// Exit code of a command that was killed at its time limit (contract §4.4).
const TIMED_OUT: u8 = 137;
/// Input that waits for the command; above it the client's frames are left in the socket.
const INPUT_FULL: usize = 256 * 1024;
/// Most characters of a client's own words in a message to it.
const QUOTED: usize = 1024;
/// Reads of one stream before the session looks at its other work.
const ROUNDS: usize = 16;

/// Serves one connection to its end.
pub fn session(mut connection: Connection, context: &Context<'_>) {
    let Some(request) = connection.wait_for_frame() else { return };
    if request.kind == kind::HEARTBEAT {
        connection.send(&frame::encode(kind::HEARTBEAT, &request.payload));
        return connection.finish();
    }
    match Request::parse(&request.payload) {
        Ok(Request::File(request)) => {
            let response = transfer::carry_out(&request);
            // A response is plain data, which always serialises.
            let json = serde_json::to_vec(&response).unwrap_or_default();
            connection.send(&frame::encode(kind::DATA, &json));
        }
        Ok(Request::Exec(request)) => {
            let mut reply = Reply::new(request.streaming);
            match run(&request, &mut connection, &mut reply, context) {
                Ended::Code(code) => reply.finish(code, None, &mut connection),
                Ended::ByAgent(end) if request.streaming && request.explain => {
                    reply.finish(end.shell_code.into(), Some(end.reason), &mut connection);
                }
                Ended::ByAgent(end) => {
                    reply.push(Stream::Stderr, &end.note, &mut connection);
                    reply.finish(end.code, None, &mut connection);
                }
                Ended::HungUp => return,
            }
        }
        Err(text) => connection.send(&frame::encode(kind::ERROR, text.as_bytes())),
    }
    connection.finish();
}

/// How a command's session ends.
enum Ended {
    /// With this exit code.
    Code(i32),
    /// Not by what the command did itself.
    ByAgent(EndByAgent),
    /// Without anybody to tell.
    HungUp,
}

/// Why there is no exit code of the command's own.
struct EndByAgent {
    /// The exit code in its place (contract §4.4).
    code: i32,
    /// What standard error says of it (contract §4.4).
    note: Vec<u8>,
    /// The exit code for a client that wants an explanation.
    shell_code: u8,
    /// The explanation.
    reason: String,
}

fn run(
    request: &ExecRequest,
    connection: &mut Connection,
    reply: &mut Reply,
    context: &Context<'_>,
) -> Ended {
    if request.cmd.is_empty() {
        return Ended::ByAgent(EndByAgent {
            code: 1,
            note: b"Empty command".to_vec(),
            shell_code: SETUP_FAILED,
            reason: "the command is empty".into(),
        });
    }
    match Command::start(request, context) {
        Ok(command) => command.serve(connection, reply, context),
        Err(Refusal { code, reason }) => {
            let name: String = request.cmd[0].to_string_lossy().chars().take(QUOTED).collect();
            let reason: String = reason.chars().take(4 * QUOTED).collect();
            Ended::ByAgent(EndByAgent {
                code: NOT_STARTED,
                note: format!("Failed to spawn command '{name}': {reason}").into_bytes(),
                shell_code: code,
                reason,
            })
        }
    }
}

/// One of a command's two outputs.
#[derive(Debug)]
struct Output {
    stream: Stream,
    /// The pipe, until its end.
    from: Option<File>,
}

impl Output {
    /// How many bytes wait in the pipe.
    fn waiting(&self) -> usize {
        self.from.as_ref().map_or(0, sys::bytes_waiting)
    }
}

/// A running command.
#[derive(Debug)]
struct Command {
    pid: i32,
    ended: OwnedFd,
    cgroup: CommandCgroup,
    /// Where its input goes, until that has ended.
    stdin: Option<File>,
    input: VecDeque<u8>,
    /// Whether more input may come.
    input_open: bool,
    /// Whether frames from the client are input.
    input_from_client: bool,
    outputs: [Output; 2],
    /// What a read of them fills.
    buffer: Vec<u8>,
    deadline: Option<Instant>,
    time_limit: Duration,
    timed_out: bool,
    hung_up: bool,
}

impl Command {
    fn start(request: &ExecRequest, context: &Context<'_>) -> Result<Self, Refusal> {
        let cgroup =
            context.cgroup.create_command(context.session).map_err(doing("create its cgroup"))?;
        let (stdout, stdout_end) = sys::pipe().map_err(doing("create a pipe"))?;
        let (stderr, stderr_end) = sys::pipe().map_err(doing("create a pipe"))?;
        let has_input = request.stdin.is_some() || request.stdin_streaming;
        let (stdin_end, stdin) = if has_input {
            let (read, write) = sys::input_pipe().map_err(doing("create a pipe"))?;
            (read, Some(write))
        } else {
            (File::open("/dev/null").map_err(doing("open /dev/null"))?.into(), None)
        };
        let env = environment(&request.env, context);
        let workdir = working_dir(request.working_dir.as_ref(), context);
        let program = program(&request.cmd, &env, &workdir, request.user.as_deref(), context);
        let stdio = [stdin_end.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()];
        let pid = launch::start(&program, stdio, cgroup.procs())?;
        let ended =
            sys::process_file(pid).inspect_err(|_| cgroup.kill()).map_err(doing("watch it"))?;
        let time_limit = Duration::from_nanos(match request.timeout_ns {
            0 => DEFAULT_TIMEOUT_NS,
            other => other,
        });
        Ok(Command {
            pid,
            ended,
            cgroup,
            stdin,
            input: request.stdin.iter().flatten().copied().collect(),
            input_open: request.stdin_streaming,
            input_from_client: request.stdin_streaming,
            outputs: [
                Output { stream: Stream::Stdout, from: Some(stdout) },
                Output { stream: Stream::Stderr, from: Some(stderr) },
            ],
            buffer: vec![0; MAX_CHUNK],
            // A limit beyond the clock's range is none.
            deadline: Instant::now().checked_add(time_limit),
            time_limit,
            timed_out: false,
            hung_up: false,
        })
    }

    fn serve(
        mut self,
        connection: &mut Connection,
        reply: &mut Reply,
        context: &Context<'_>,
    ) -> Ended {
        loop {
            let receiving = self.wants_frames(connection);
            if receiving && !connection.has_ended() {
                self.receive(connection, reply, context);
            }
            self.feed();
            for at in 0..self.outputs.len() {
                self.pump(at, None, connection, reply);
            }
            connection.flush();
            let listening = receiving && !connection.has_ended();
            if !listening && !self.hung_up && connection.is_hung_up() {
                self.hung_up = true;
                self.cgroup.kill();
            }
            let now = Instant::now();
            if self.deadline.is_some_and(|deadline| now >= deadline) {
                self.deadline = None;
                self.timed_out = true;
                self.cgroup.kill();
            }
            let check = (!listening && !self.hung_up).then_some(HANG_UP_CHECK);
            let limit = self.deadline.map(until).into_iter().chain(check).min();
            let mut interests = vec![Interest::read(self.ended.as_fd())];
            interests.extend(connection.interests(receiving));
            if reply.has_room(connection) {
                let open = self.outputs.iter().filter_map(|output| output.from.as_ref());
                interests.extend(open.map(|from| Interest::read(from.as_fd())));
            }
            if !self.input.is_empty() {
                interests.extend(self.stdin.iter().map(|to| Interest::write(to.as_fd())));
            }
            let ready = sys::poll(&interests, limit);
            if ready.is_ok_and(|ready| ready[0]) {
                return self.finish(connection, reply);
            }
        }
    }

    /// Whether frames are read from the client: not while the command has yet to take earlier input,
    /// nor while the client is behind with output, to which answers to its frames would add.
    fn wants_frames(&self, connection: &Connection) -> bool {
        self.input.len() < INPUT_FULL && !connection.is_full()
    }

    /// Handles what the client sends while the command runs.
    fn receive(&mut self, connection: &mut Connection, reply: &mut Reply, context: &Context<'_>) {
        while self.wants_frames(connection) {
            match connection.receive() {
                Received::Frame(Frame { kind: kind::DATA, payload }) if self.input_from_client => {
                    if self.stdin.is_some() && self.input_open {
                        self.input.extend(payload);
                    }
                }
                Received::Frame(Frame { kind: kind::CONTROL, payload }) => {
                    self.control(&payload, connection, reply, context);
                }
                Received::Frame(Frame { kind: kind::HEARTBEAT, payload }) => {
                    connection.send(&frame::encode(kind::HEARTBEAT, &payload));
                }
                Received::Frame(Frame { kind: kind::CLOSE, .. }) | Received::End => {
                    self.input_open = false;
                    return;
                }
                Received::Frame(_) => {}
                Received::Nothing => return,
            }
        }
    }

    fn control(
        &mut self,
        instruction: &[u8],
        connection: &mut Connection,
        reply: &mut Reply,
        context: &Context<'_>,
    ) {
        match instruction {
            control::CANCEL => self.cgroup.kill(),
            control::STDIN_CLOSE => self.input_open = false,
            control::FLUSH => {
                for at in 0..self.outputs.len() {
                    let waiting = self.outputs[at].waiting();
                    self.pump(at, Some(waiting), connection, reply);
                }
                connection.send(&frame::encode(kind::CONTROL, control::FLUSH_ACK));
            }
            other => {
                let number = other.strip_prefix(control::SIGNAL_MAIN);
                let number =
                    number.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
                if let Some(number) = number.filter(|number| (1..=64).contains(number)) {
                    sys::signal(context.entrypoint, number);
                    connection.send(&frame::encode(kind::CONTROL, control::SIGNAL_MAIN_ACK));
                }
            }
        }
    }

    /// Gives the command what input it takes, and its end.
    fn feed(&mut self) {
        while let Some(stdin) = &mut self.stdin {
            let (head, _) = self.input.as_slices();
            if head.is_empty() {
                if !self.input_open {
                    self.stdin = None;
                }
                return;
            }
            match stdin.write(head) {
                Ok(taken) => drop(self.input.drain(..taken)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // It reads no more; what follows goes nowhere, like into a closed pipe.
                Err(_) => {
                    self.stdin = None;
                    self.input.clear();
                }
            }
        }
    }

    /// Passes output on, as far as there is room; with `exactly`, that many bytes, room or not.
    fn pump(
        &mut self,
        at: usize,
        exactly: Option<usize>,
        connection: &mut Connection,
        reply: &mut Reply,
    ) {
        let Output { stream, from } = &mut self.outputs[at];
        let mut left = exactly.unwrap_or(ROUNDS * MAX_CHUNK);
        let buffer = &mut self.buffer;
        while left > 0 && (exactly.is_some() || reply.has_room(connection)) {
            let Some(file) = from else { return };
            let room = left.min(buffer.len());
            match file.read(&mut buffer[..room]) {
                Ok(0) => *from = None,
                Ok(read) => {
                    left -= read;
                    reply.push(*stream, &buffer[..read], connection);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => *from = None,
            }
        }
    }

    /// The command has ended: passes on what it has written, not what a process that it left behind
    /// goes on to write.
    fn finish(mut self, connection: &mut Connection, reply: &mut Reply) -> Ended {
        let status = sys::wait_for(self.pid);
        if self.hung_up {
            return Ended::HungUp;
        }
        for at in 0..self.outputs.len() {
            let waiting = self.outputs[at].waiting();
            self.pump(at, Some(waiting), connection, reply);
        }
        if self.timed_out {
            return Ended::ByAgent(EndByAgent {
                code: TIMED_OUT.into(),
                note: TIMEOUT_NOTE.to_vec(),
                shell_code: TIMED_OUT,
                reason: format!(
                    "the command was killed at its time limit of {:?}",
                    self.time_limit
                ),
            });
        }
        match status {
            Ok(status) => Ended::Code(exit_code(status)),
            Err(error) => Ended::ByAgent(EndByAgent {
                code: 1,
                note: format!("Failed to wait for command: {error}").into_bytes(),
                shell_code: SETUP_FAILED,
                reason: format!("wait for the command: {error}"),
            }),
        }
    }
}

/// Where output goes: out at once, or into one reply at the end.
#[derive(Debug)]
enum Reply {
    Streaming,
    /// The arrays of [`exec::ExecOutput`], as JSON text already: they are nearly all of the reply.
    Whole {
        stdout: Vec<u8>,
        stderr: Vec<u8>,
        truncated: bool,
    },
}

/// Characters of a whole reply that only one stream's output may use, so that a flood on the other
/// cannot hide it.
const RESERVED: usize = 1 << 20;
/// Characters for everything else in the reply, with the note about a time limit.
const AROUND: usize = 512;

impl Reply {
    fn new(streaming: bool) -> Self {
        match streaming {
            true => Reply::Streaming,
            false => Reply::Whole { stdout: Vec::new(), stderr: Vec::new(), truncated: false },
        }
    }

    /// Whether output should be read: always, if it is kept or dropped here.
    fn has_room(&self, connection: &Connection) -> bool {
        match self {
            Reply::Streaming => !connection.is_full(),
            Reply::Whole { .. } => true,
        }
    }

    fn push(&mut self, stream: Stream, bytes: &[u8], connection: &mut Connection) {
        match self {
            Reply::Streaming => connection.send(&exec::chunk_frame(stream, bytes)),
            Reply::Whole { stdout, stderr, truncated } => {
                let (to, other) = match stream {
                    Stream::Stdout => (stdout, stderr),
                    Stream::Stderr => (stderr, stdout),
                };
                let limit = exec::MAX_PAYLOAD - AROUND - other.len().max(RESERVED);
                let note = if bytes == TIMEOUT_NOTE { AROUND / 2 } else { 0 };
                let mut rest = bytes;
                while !rest.is_empty() {
                    // At most four characters a byte.
                    let room = (limit + note).saturating_sub(to.len()) / 4;
                    if room == 0 {
                        *truncated = true;
                        break;
                    }
                    let (now, later) = rest.split_at(room.min(rest.len()));
                    exec::push_numbers(to, now, to.is_empty());
                    rest = later;
                }
            }
        }
    }

    /// Ends the reply; only a streaming one has a `reason`.
    fn finish(self, exit_code: i32, reason: Option<String>, connection: &mut Connection) {
        match self {
            Reply::Streaming => connection.send(&exec::exit_frame(exit_code, reason)),
            Reply::Whole { stdout, stderr, truncated } => {
                let end = if truncated { ",\"truncated\":true}" } else { "}" };
                let end = format!("],\"exit_code\":{exit_code}{end}");
                let (start, middle) = (b"{\"stdout\":[", b"],\"stderr\":[");
                let length = start.len() + stdout.len() + middle.len() + stderr.len() + end.len();
                // Piece by piece: a whole copy of this may be more memory than the box has.
                connection.send(&frame::header(kind::DATA, length as u32));
                connection.send(start);
                connection.send(&stdout);
                drop(stdout);
                connection.send(middle);
                connection.send(&stderr);
                connection.send(end.as_bytes());
            }
        }
    }
}
