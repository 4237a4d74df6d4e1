//! `mote exec`: runs a command in a box, on the caller's own input and output (contract §4).

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, anyhow};
use mote_agent::exec::{
    self, ExecChunk, ExecExit, ExecOutput, ExecRequest, MAX_PAYLOAD, Stream, control, kind,
};
use mote_agent::instance::Process;
use mote_agent::text::Text;

use super::channel::{Channel, request};
use super::relay::{Output, Session, Stdio, relay};
use super::stop::Stop;
use super::target::Target;

/// What to run in the guest, on pipes or on a terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Program and arguments.
    pub cmd: Vec<Text>,
    /// `NAME=value` entries, added to the box's own environment.
    pub env: Vec<Text>,
    /// `uid`, `uid:gid`, `name` or `name:group`.
    pub user: Option<String>,
    /// Directory to start in.
    pub workdir: Option<Text>,
    /// Who it runs as and what it may do, in place of `user` and of the box's environment: for mote's own agent.
    pub process: Option<Process>,
}

/// The time limit of a command without one: the protocol's default is 5 s, and it cannot express "no
/// limit". Short enough not to overflow any agent's clock.
pub const NO_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// A command to run in a box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The box's exec socket.
    pub target: Target,
    /// The command.
    pub program: Program,
    /// Its time limit, enforced in the guest; not 0, at most [`NO_TIMEOUT`].
    pub timeout: Duration,
}

impl Exec {
    /// Runs it and returns its exit code.
    ///
    /// # Errors
    /// The box cannot be reached, refuses, or ends first.
    pub fn run(&self, stdio: &Stdio) -> Result<u8, Stop> {
        self.run_with(stdio, None, None)
    }

    /// The same; signals from `signals` go to the command, and `on_start` is called when it runs, by mote's own agent.
    ///
    /// # Errors
    /// As for [`Exec::run`].
    pub fn run_with(
        &self,
        stdio: &Stdio,
        signals: Option<&File>,
        on_start: OnStart<'_>,
    ) -> Result<u8, Stop> {
        knock(&self.target)?;
        let mut channel = self.target.connect()?;
        let request_json = request(&self.request(on_start.is_some()), MAX_PAYLOAD)?;
        channel.send(kind::DATA, &request_json);
        relay(&mut Running { gave_input: false, on_start }, channel, stdio, signals)
    }

    fn request(&self, announce: bool) -> ExecRequest {
        let program = self.program.clone();
        ExecRequest {
            cmd: program.cmd,
            timeout_ns: self.timeout.as_nanos() as u64,
            env: program.env,
            working_dir: program.workdir,
            stdin: None,
            user: program.user,
            streaming: true,
            stdin_streaming: Some(true),
            rootfs: None,
            request_id: None,
            explain: true,
            announce,
            process: program.process,
        }
    }
}

/// What is called once, when a command runs.
pub type OnStart<'a> = Option<&'a mut dyn FnMut()>;

/// The instruction to send a signal to a command's process group.
pub fn signal_instruction(number: i32) -> Vec<u8> {
    [control::SIGNAL, number.to_string().as_bytes()].concat()
}

/// Waits until the guest answers on its exec socket.
///
/// # Errors
/// There is no box, it does not answer in time, or the socket is not an exec socket.
pub fn knock(target: &Target) -> Result<(), Stop> {
    let answer = target.knock(kind::HEARTBEAT, b"")?;
    if answer.kind == kind::HEARTBEAT {
        return Ok(());
    }
    let path = target.socket.display();
    Err(Stop::Failed(anyhow!("{path} answers no heartbeat: it is not a box's exec socket")))
}

/// The error for a box's answer that refuses a request.
pub fn refusal(payload: &[u8]) -> anyhow::Error {
    anyhow!("the box refused: {}", String::from_utf8_lossy(payload))
}

/// What the guest's word of a command's end means.
///
/// # Errors
/// It is not the command's own end.
pub fn ended(exit_code: i32, reason: Option<String>) -> Result<Option<u8>, Stop> {
    let code = exit_code as u8;
    reason.map_or(Ok(Some(code)), |reason| Err(Stop::Ended(code, reason)))
}

struct Running<'a> {
    /// Whether input was sent after the request.
    gave_input: bool,
    on_start: OnStart<'a>,
}

impl Session for Running<'_> {
    const INPUT_PIECE: usize = 64 * 1024;

    fn input(&mut self, bytes: &[u8], channel: &mut Channel) {
        match bytes {
            // Not by closing our half: the agent would think that the client has gone.
            [] => channel.send(kind::CONTROL, control::STDIN_CLOSE),
            _ => {
                self.gave_input = true;
                channel.send(kind::DATA, bytes);
            }
        }
    }

    fn frame(&mut self, kind: u8, payload: &[u8], output: &mut Output) -> Result<Option<u8>, Stop> {
        match kind {
            kind::DATA => {
                let chunk =
                    exec::parse_chunk(payload).or_else(|| serde_json::from_slice(payload).ok());
                if let Some(ExecChunk { stream, data }) = chunk {
                    output.push(stream, data);
                    return Ok(None);
                }
                // The 0.8.0 agent does not stream: this is all of the output.
                let whole: ExecOutput =
                    serde_json::from_slice(payload).context("read the box's answer")?;
                if self.gave_input {
                    return Err(Stop::Failed(anyhow!(
                        "the box's agent gave the command no input: it does not stream; run it without input"
                    )));
                }
                output.push(Stream::Stdout, whole.stdout);
                output.push(Stream::Stderr, whole.stderr);
                Ok(Some(whole.exit_code as u8))
            }
            kind::CONTROL if payload == control::STARTED => {
                if let Some(on_start) = self.on_start.take() {
                    on_start();
                }
                Ok(None)
            }
            kind::CONTROL => {
                let exit: ExecExit =
                    serde_json::from_slice(payload).context("read the command's exit code")?;
                ended(exit.exit_code, exit.reason)
            }
            kind::ERROR => Err(Stop::Failed(refusal(payload))),
            other => {
                Err(Stop::Failed(anyhow!("the box sent a frame of unknown type {other:#04x}")))
            }
        }
    }

    fn signal(&mut self, number: i32, channel: &mut Channel) -> Result<(), Stop> {
        channel.send(kind::CONTROL, &signal_instruction(number));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::{Agent, collect, program, read_frame, said, stdio, write_frame};
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;

    fn exec(target: &Target) -> Exec {
        Exec { target: target.clone(), program: program(&["x"]), timeout: NO_TIMEOUT }
    }

    fn request(client: &mut UnixStream) -> ExecRequest {
        let frame = read_frame(client).expect("a request");
        assert_eq!(frame.kind, kind::DATA);
        serde_json::from_slice(&frame.payload).expect("a request")
    }

    fn write_chunk(client: &mut UnixStream, stream: Stream, data: &[u8]) {
        client.write_all(&exec::chunk_frame(stream, data)).expect("taken");
    }

    fn write_exit(client: &mut UnixStream, code: i32) {
        let exit = ExecExit { exit_code: code, ..ExecExit::default() };
        client.write_all(&exec::exit_frame(&exit)).expect("taken");
    }

    /// Runs with a closed input and returns code and message, output, and errors.
    fn run(
        name: &str,
        script: impl FnOnce(UnixStream) + Send + 'static,
    ) -> ((u8, String), Vec<u8>, Vec<u8>) {
        let agent = Agent::answering(name, kind::HEARTBEAT, script);
        let (stdio, ends) = stdio();
        drop(ends.input);
        let result = exec(&agent.target).run(&stdio);
        drop(stdio);
        agent.join();
        (
            said(result),
            collect(ends.output).join().expect("out"),
            collect(ends.error).join().expect("err"),
        )
    }

    #[test]
    fn output_errors_and_code_arrive() {
        let (end, output, errors) = run("split", |mut client| {
            let request = request(&mut client);
            assert_eq!(request.cmd, ["x"]);
            assert!(request.streaming && request.has_streaming_input() && request.explain);
            assert_eq!(request.timeout_ns, 315_360_000_000_000_000);
            let end = read_frame(&mut client).expect("the input's end");
            assert_eq!((end.kind, &end.payload[..]), (kind::CONTROL, control::STDIN_CLOSE));
            write_chunk(&mut client, Stream::Stdout, b"out ");
            write_chunk(&mut client, Stream::Stderr, b"err");
            // The same in other words.
            write_frame(
                &mut client,
                kind::DATA,
                br#"{ "data": [112, 117, 116], "stream": "Stdout" }"#,
            );
            write_exit(&mut client, -1);
        });
        assert_eq!(
            (end, &output[..], &errors[..]),
            ((255, String::new()), &b"out put"[..], &b"err"[..])
        );
    }

    #[test]
    fn an_agent_that_takes_no_input_is_found_out() {
        let agent = Agent::answering("deaf", kind::HEARTBEAT, |mut client| {
            request(&mut client);
            assert_eq!(read_frame(&mut client).expect("input").payload, b"important");
            let whole = br#"{"stdout":[],"stderr":[],"exit_code":0}"#;
            write_frame(&mut client, kind::DATA, whole);
        });
        let (stdio, mut ends) = stdio();
        ends.input.write_all(b"important").expect("written");
        let (code, message) = said(exec(&agent.target).run(&stdio));
        assert!(code == 125 && message.contains("no input"), "{message}");
        agent.join();
    }

    #[test]
    fn an_agent_that_does_not_stream_is_understood() {
        let (end, output, errors) = run("whole", |mut client| {
            request(&mut client);
            write_frame(
                &mut client,
                kind::DATA,
                br#"{"stdout":[111],"stderr":[101],"exit_code":3}"#,
            );
        });
        assert_eq!((end, &output[..], &errors[..]), ((3, String::new()), &b"o"[..], &b"e"[..]));
    }

    #[test]
    fn what_ends_a_command_early_is_told() {
        let ((code, message), output, _) = run("died", |mut client| {
            request(&mut client);
            write_chunk(&mut client, Stream::Stdout, b"half");
        });
        assert_eq!((code, &output[..]), (125, &b"half"[..]));
        assert!(message.contains("before the command's exit code"), "{message}");

        let ((code, message), _, _) = run("error", |mut client| {
            request(&mut client);
            write_frame(&mut client, kind::ERROR, b"no such user");
        });
        assert_eq!((code, &message[..]), (125, "the box refused: no such user"));

        let ((code, message), _, _) = run("garbage", |mut client| {
            request(&mut client);
            write_frame(&mut client, kind::DATA, b"{}");
        });
        assert_eq!(code, 125);
        assert!(message.starts_with("read the box's answer: "), "{message}");
    }

    #[test]
    fn what_the_guest_says_of_a_commands_end_comes_after_its_output() {
        let (end, output, _) = run("explained", |mut client| {
            request(&mut client);
            write_chunk(&mut client, Stream::Stdout, b"so far");
            let reason = Some("killed at its limit".into());
            let frame = exec::exit_frame(&ExecExit { exit_code: 137, oom_killed: false, reason });
            client.write_all(&frame).expect("taken");
        });
        assert_eq!((end, &output[..]), ((137, "killed at its limit".into()), &b"so far"[..]));
    }

    #[test]
    fn a_socket_of_another_kind_is_found_out() {
        let agent = Agent::new("kind", 1, |_, mut client| {
            read_frame(&mut client).expect("a heartbeat");
            write_frame(&mut client, 5, b"Expected PtyRequest frame");
        });
        let (stdio, _ends) = stdio();
        let (code, message) = said(exec(&agent.target).run(&stdio));
        assert_eq!(code, 125);
        assert!(message.contains("not a box's exec socket"), "{message}");
        agent.join();
    }

    /// Input and four times as many bytes of answers: a client that waits for one direction only hangs.
    #[test]
    fn much_input_is_echoed() {
        const LENGTH: usize = 20 << 20;
        let agent = Agent::answering("echo", kind::HEARTBEAT, |mut client| {
            request(&mut client);
            loop {
                let frame = read_frame(&mut client).expect("input");
                match frame.kind {
                    kind::DATA => write_chunk(&mut client, Stream::Stdout, &frame.payload),
                    _ => break write_exit(&mut client, 0),
                }
            }
        });
        let (stdio, mut ends) = stdio();
        let input: Vec<u8> = (0..LENGTH).map(|at| ((at * at) >> 8) as u8).collect();
        let expected = input.clone();
        let writer = thread::spawn(move || ends.input.write_all(&input));
        let output = collect(ends.output);
        assert_eq!(said(exec(&agent.target).run(&stdio)).0, 0);
        drop(stdio);
        writer.join().expect("ends").expect("taken");
        assert!(output.join().expect("ends") == expected);
        agent.join();
    }

    #[test]
    fn output_that_nobody_takes_does_not_hold_up_input() {
        const LENGTH: usize = 1 << 20;
        let (all_read, may_read_output) = mpsc::channel();
        let agent = Agent::answering("blocked", kind::HEARTBEAT, move |mut client| {
            request(&mut client);
            let mut other = client.try_clone().expect("cloned");
            let output = thread::spawn(move || {
                for _ in 0..16 {
                    write_chunk(&mut other, Stream::Stdout, &[7; 64 * 1024]);
                }
                write_exit(&mut other, 0);
            });
            let mut read = 0;
            while read < LENGTH {
                read += read_frame(&mut client).expect("input").payload.len();
            }
            all_read.send(()).expect("waits");
            output.join().expect("written");
        });
        let (stdio, mut ends) = stdio();
        let writer = thread::spawn(move || ends.input.write_all(&[1; LENGTH]).map(|()| ends.input));
        let reader = thread::spawn(move || {
            may_read_output.recv().expect("the input gets through");
            collect(ends.output).join().expect("ends")
        });
        assert_eq!(said(exec(&agent.target).run(&stdio)).0, 0);
        drop(stdio);
        assert_eq!(reader.join().expect("ends").len(), 16 * 64 * 1024);
        writer.join().expect("ends").expect("taken");
        agent.join();
    }

    #[test]
    fn a_command_that_ends_does_not_wait_for_its_input() {
        let agent = Agent::answering("zero", kind::HEARTBEAT, |mut client| {
            request(&mut client);
            write_exit(&mut client, 4);
        });
        let (mut stdio, _ends) = stdio();
        assert_eq!(said(exec(&agent.target).run(&stdio)).0, 4);
        agent.join();

        // The same with a socket that is full of input.
        let agent = Agent::answering("endless", kind::HEARTBEAT, |mut client| {
            request(&mut client);
            read_frame(&mut client).expect("input");
            write_exit(&mut client, 5);
        });
        stdio.input = File::open("/dev/zero").expect("opens");
        assert_eq!(said(exec(&agent.target).run(&stdio)).0, 5);
        agent.join();
    }

    #[test]
    fn output_without_a_reader_ends_quietly() {
        let agent = Agent::answering("pipe", kind::HEARTBEAT, |mut client| {
            request(&mut client);
            write_chunk(&mut client, Stream::Stdout, b"x");
            while read_frame(&mut client).is_some() {}
        });
        let (stdio, ends) = stdio();
        drop(ends.output);
        assert_eq!(said(exec(&agent.target).run(&stdio)), (141, String::new()));
        agent.join();
    }
}
