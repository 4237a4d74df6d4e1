//! `mote pty`: runs a command on a terminal of its own in the box, shown on the caller's (contract §5).
//!
//! The caller's terminal is in raw mode as long as the session lasts: every key, even Ctrl-C, goes to
//! the command. Its mode is restored however the session ends, even by a signal.

use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, anyhow};
use mote_agent::exec::Stream;
use mote_agent::pty::{MAX_DATA, MAX_PAYLOAD, PtyExit, PtyRequest, PtyResize, kind};

use super::channel::{Channel, request};
use super::exec::{OnStart, Program, ended, refusal, signal_instruction};
use super::relay::{Output, Session, Stdio, relay};
use super::stop::Stop;
use super::target::Target;
use crate::sys;
use crate::sys::terminal::{DEFAULT_SIZE, RawMode, TerminalSize};

/// The character that ends a terminal's input when typed at the start of a line (Ctrl-D).
const END_OF_INPUT: u8 = 0x04;

/// Signals that would end mote without restoring the terminal, and the one for a change of size.
const SIGNALS: [i32; 8] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGWINCH,
];

/// A command to run on a terminal in a box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pty {
    /// The box's pty socket.
    pub target: Target,
    /// The command.
    pub program: Program,
}

impl Pty {
    /// Runs it and returns its exit code. `term` is the type of the caller's terminal (`TERM`).
    ///
    /// # Errors
    /// The box cannot be reached, refuses, or ends first; or a signal ends the session.
    pub fn run(&self, stdio: &Stdio, term: Option<&str>) -> Result<u8, Stop> {
        self.run_with(stdio, term, None)
    }

    /// The same, but with `on_start`, which mote's own agent has called when the command runs, signals go to the command
    /// and do not end the session.
    ///
    /// # Errors
    /// As for [`Pty::run`].
    pub fn run_with<'a>(
        &self,
        stdio: &'a Stdio,
        term: Option<&str>,
        on_start: OnStart<'a>,
    ) -> Result<u8, Stop> {
        self.knock()?;
        // Before the size is read, so that no later change of size is missed.
        let signals = sys::signal_file(&SIGNALS).context("take signals")?;
        let mut channel = self.target.connect()?;
        let size = terminal_size(stdio).unwrap_or(DEFAULT_SIZE);
        let term = term.filter(|_| stdio.input.is_terminal());
        let is_relay = on_start.is_some();
        let request = request(&self.request(size, term, is_relay), MAX_PAYLOAD)?;
        let _raw = RawMode::enter(&stdio.input).context("set the terminal's mode")?;
        channel.send(kind::REQUEST, &request);
        let mut running = Running { stdio, mid_line: false, is_relay, on_start };
        relay(&mut running, channel, stdio, Some(&signals))
    }

    /// Waits until the guest answers on its pty socket. This protocol has no heartbeat, but a change of
    /// size before a request is answered with an error, and has no other effect.
    fn knock(&self) -> Result<(), Stop> {
        let answer = self.target.knock(kind::RESIZE, &resize(DEFAULT_SIZE))?;
        if answer.kind == kind::ERROR {
            return Ok(());
        }
        let path = self.target.socket.display();
        Err(Stop::Failed(anyhow!("{path} wants no terminal: it is not a box's pty socket")))
    }

    fn request(
        &self,
        TerminalSize { cols, rows }: TerminalSize,
        term: Option<&str>,
        announce: bool,
    ) -> PtyRequest {
        let program = self.program.clone();
        let mut env = program.env;
        if let Some(term) = term
            && !env.iter().any(|entry| entry.as_bytes().starts_with(b"TERM="))
        {
            env.push(format!("TERM={term}").into());
        }
        PtyRequest {
            cmd: program.cmd,
            env,
            working_dir: program.workdir,
            rootfs: None,
            user: program.user,
            cols,
            rows,
            explain: true,
            announce,
            process: program.process,
        }
    }
}

fn terminal_size(stdio: &Stdio) -> Option<TerminalSize> {
    sys::terminal::terminal_size(&stdio.input)
        .or_else(|| sys::terminal::terminal_size(stdio.output.file()))
}

fn resize(TerminalSize { cols, rows }: TerminalSize) -> Vec<u8> {
    serde_json::to_vec(&PtyResize { cols, rows }).unwrap_or_default()
}

struct Running<'a> {
    stdio: &'a Stdio,
    /// Whether the last byte of input did not end a line.
    mid_line: bool,
    /// Whether signals are the command's.
    is_relay: bool,
    on_start: OnStart<'a>,
}

impl Session for Running<'_> {
    const INPUT_PIECE: usize = MAX_DATA;

    fn input(&mut self, bytes: &[u8], channel: &mut Channel) {
        match bytes.last() {
            Some(last) => {
                self.mid_line = *last != b'\n';
                channel.send(kind::DATA, bytes);
            }
            // A terminal has no end of file, but Ctrl-D makes one. In the middle of a line, the first
            // Ctrl-D only passes on the line so far.
            None if self.mid_line => channel.send(kind::DATA, &[END_OF_INPUT; 2]),
            None => channel.send(kind::DATA, &[END_OF_INPUT]),
        }
    }

    fn frame(&mut self, kind: u8, payload: &[u8], output: &mut Output) -> Result<Option<u8>, Stop> {
        match kind {
            kind::DATA => {
                output.push(Stream::Stdout, payload.to_vec());
                Ok(None)
            }
            kind::STARTED => {
                if let Some(on_start) = self.on_start.take() {
                    on_start();
                }
                Ok(None)
            }
            kind::EXIT => {
                let exit: PtyExit =
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
        if number != libc::SIGWINCH {
            if self.is_relay {
                channel.send(kind::ERROR, &signal_instruction(number));
                return Ok(());
            }
            return Err(Stop::Quiet(128 + number as u8));
        }
        if let Some(size) = terminal_size(self.stdio) {
            channel.send(kind::RESIZE, &resize(size));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::{Agent, collect, program, read_frame, said, stdio, write_frame};
    use crate::sys::terminal::TerminalMode;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn request(client: &mut UnixStream) -> PtyRequest {
        let frame = read_frame(client).expect("a request");
        assert_eq!(frame.kind, kind::REQUEST);
        serde_json::from_slice(&frame.payload).expect("a request")
    }

    fn pty(target: &Target) -> Pty {
        Pty { target: target.clone(), program: program(&["sh"]) }
    }

    fn mode(terminal: &File) -> String {
        format!("{:?}", TerminalMode::of(terminal).expect("a terminal"))
    }

    #[test]
    fn a_terminal_is_raw_during_the_session_and_restored_after() {
        for ends_well in [true, false] {
            let (keyboard, terminal) =
                sys::terminal::pseudo_terminal(TerminalSize { cols: 132, rows: 43 }).expect("made");
            let before = mode(&terminal);
            let (seen, cooked) = (terminal.try_clone().expect("cloned"), before.clone());
            let mut user = keyboard.try_clone().expect("cloned");
            let agent = Agent::answering("raw", kind::ERROR, move |mut client| {
                let request = request(&mut client);
                assert_eq!((request.cols, request.rows), (132, 43));
                assert_eq!(request.env, ["TERM=vt100"]);
                assert_ne!(mode(&seen), cooked);
                user.write_all(b"\x03\r").expect("typed");
                let mut keys = Vec::new();
                while keys.len() < 2 {
                    let frame = read_frame(&mut client).expect("keys");
                    assert_eq!(frame.kind, kind::DATA);
                    keys.extend(frame.payload);
                }
                assert_eq!(keys, b"\x03\r");
                write_frame(&mut client, kind::DATA, b"$ \r\n");
                if ends_well {
                    write_frame(&mut client, kind::EXIT, br#"{"exit_code":130}"#);
                }
            });
            let (mut stdio, ends) = stdio();
            stdio.input = terminal.try_clone().expect("cloned");
            let (code, message) = said(pty(&agent.target).run(&stdio, Some("vt100")));
            drop(stdio);
            assert_eq!(
                (code, message.is_empty()),
                if ends_well { (130, true) } else { (125, false) }
            );
            assert_eq!(collect(ends.output).join().expect("ends"), b"$ \r\n");
            assert_eq!(mode(&terminal), before);
            drop(keyboard);
            agent.join();
        }
    }

    #[test]
    fn the_end_of_piped_input_is_typed() {
        for (input, expected) in [("", "\x04"), ("ls\n", "ls\n\x04"), ("ls", "ls\x04\x04")] {
            let agent = Agent::answering("piped", kind::ERROR, move |mut client| {
                let request = request(&mut client);
                assert_eq!((request.cols, request.rows), (80, 24));
                assert!(request.env.is_empty());
                let mut keys = Vec::new();
                while keys.len() < expected.len() {
                    keys.extend(read_frame(&mut client).expect("keys").payload);
                }
                assert_eq!(keys, expected.as_bytes());
                write_frame(&mut client, kind::EXIT, br#"{"exit_code":0}"#);
            });
            let (stdio, mut ends) = stdio();
            ends.input.write_all(input.as_bytes()).expect("taken");
            drop(ends.input);
            assert_eq!(said(pty(&agent.target).run(&stdio, Some("vt100"))), (0, String::new()));
            agent.join();
        }
    }

    #[test]
    fn a_terminal_type_that_was_asked_for_wins() {
        let target = Target { socket: "s".into(), wait: None };
        let mut pty = pty(&target);
        pty.program.env = vec!["TERM=dumb".into()];
        assert_eq!(pty.request(DEFAULT_SIZE, Some("vt100"), false).env, ["TERM=dumb"]);
    }

    #[test]
    fn a_session_that_is_refused_says_why() {
        let agent = Agent::answering("refused", kind::ERROR, |mut client| {
            request(&mut client);
            write_frame(&mut client, kind::ERROR, b"no such user");
        });
        let (ours, _ends) = stdio();
        let refused = said(pty(&agent.target).run(&ours, None));
        assert_eq!(refused, (125, "the box refused: no such user".into()));
        agent.join();

        let agent = Agent::answering("not-started", kind::ERROR, |mut client| {
            assert!(request(&mut client).explain);
            let reason = Some("is a directory".into());
            let exit = PtyExit { exit_code: 126, oom_killed: false, reason };
            let json = serde_json::to_vec(&exit).expect("serialises");
            write_frame(&mut client, kind::EXIT, &json);
        });
        let (stdio, _ends) = stdio();
        let refused = said(pty(&agent.target).run(&stdio, None));
        assert_eq!(refused, (126, "is a directory".into()));
        agent.join();
    }
}
