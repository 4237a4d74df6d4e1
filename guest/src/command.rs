//! A command that a client has asked for (contract §4.4): its start, its input and output, its end.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use mote_agent::exec::{
    DEFAULT_TIMEOUT_NS, ExecExit, ExecRequest, MAX_CHUNK, Stream, TIMEOUT_NOTE, control, kind,
};
use mote_agent::frame::{self, Frame};

use crate::cgroup::CommandCgroup;
use crate::connection::{Connection, HANG_UP_CHECK, Received};
use crate::launch::{self, Refusal, SETUP_FAILED, doing};
use crate::reply::Reply;
use crate::session::{Context, Root, environment, exit_code, join_programs, program, working_dir};
use crate::spawn::Spawned;
use crate::sys::{self, Interest, until};

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

/// Runs a command, whose output goes into the reply; `None` if its client has gone away.
pub fn run(
    request: &ExecRequest,
    connection: &mut Connection,
    reply: &mut Reply,
    context: &Context<'_>,
) -> Option<ExecExit> {
    // Nobody else is told.
    let oom_kills = request.streaming.then(|| context.cgroup.oom_kills());
    let (exit_code, reason) = match attempt(request, connection, reply, context) {
        Ended::Code(code) => (code, None),
        Ended::ByAgent(end) if request.streaming && request.explain => {
            (end.shell_code.into(), Some(end.reason))
        }
        Ended::ByAgent(end) => {
            reply.push(Stream::Stderr, &end.note, connection);
            (end.code, None)
        }
        Ended::HungUp => return None,
    };
    let oom_killed = oom_kills.is_some_and(|before| context.cgroup.oom_kills() > before);
    Some(ExecExit { exit_code, oom_killed, reason })
}

fn attempt(
    request: &ExecRequest,
    connection: &mut Connection,
    reply: &mut Reply,
    context: &Context<'_>,
) -> Ended {
    let refused = |note: &str, reason: &str| {
        Ended::ByAgent(EndByAgent {
            code: 1,
            note: note.into(),
            shell_code: SETUP_FAILED,
            reason: reason.into(),
        })
    };
    if request.cmd.is_empty() {
        return refused("Empty command", "the command is empty");
    }
    let root = match Root::new(request.rootfs.as_ref(), request.working_dir.as_ref()) {
        Ok(root) => root,
        Err(reason) => return refused(&reason, &reason),
    };
    match Command::start(request, root, context) {
        Ok(command) => {
            if request.announce && request.streaming {
                connection.send(&frame::encode(kind::CONTROL, control::STARTED));
            }
            command.serve(connection, reply, context)
        }
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
    /// Whether it runs on when its client goes away, who may ask again.
    outlives_client: bool,
    hung_up: bool,
}

impl Command {
    fn start(
        request: &ExecRequest,
        root: Option<Root<'_>>,
        context: &Context<'_>,
    ) -> Result<Self, Refusal> {
        let cgroup =
            context.cgroup.create_command(context.session).map_err(doing("create its cgroup"))?;
        let (stdout, stdout_end) = sys::pipe().map_err(doing("create a pipe"))?;
        let (stderr, stderr_end) = sys::pipe().map_err(doing("create a pipe"))?;
        let has_input = request.stdin.is_some() || request.has_streaming_input();
        let (stdin_end, stdin) = if has_input {
            let (read, write) = sys::input_pipe().map_err(doing("create a pipe"))?;
            (read, Some(write))
        } else {
            (File::open("/dev/null").map_err(doing("open /dev/null"))?.into(), None)
        };
        join_programs(context)?;
        let env = environment(&request.env, request.process.as_ref(), context);
        let workdir = working_dir(request.working_dir.as_ref(), root.as_ref(), context);
        if let Some(root) = root {
            root.enter().map_err(doing("enter its root"))?;
        }
        let (user, process) = (request.user.as_deref(), request.process.as_ref());
        let program = program(&request.cmd, &env, &workdir, user, process, context);
        let stdio = [stdin_end.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()];
        let Spawned { pid, .. } = launch::start(&program, stdio, cgroup.procs())?;
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
            input_open: request.has_streaming_input(),
            input_from_client: request.has_streaming_input(),
            outputs: [
                Output { stream: Stream::Stdout, from: Some(stdout) },
                Output { stream: Stream::Stderr, from: Some(stderr) },
            ],
            buffer: vec![0; MAX_CHUNK],
            // A limit beyond the clock's range is none.
            deadline: Instant::now().checked_add(time_limit),
            time_limit,
            timed_out: false,
            outlives_client: request.request_id.is_some(),
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
                if !self.outlives_client {
                    self.cgroup.kill();
                }
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
                if let Some(number) = control::signal(other, control::SIGNAL) {
                    sys::signal_group(self.pid, number);
                }
                if let Some(number) = control::signal(other, control::SIGNAL_MAIN) {
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
        if self.hung_up && !self.outlives_client {
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
