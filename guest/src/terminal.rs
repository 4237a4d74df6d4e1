//! A terminal session (contract §5): one command on a terminal of its own.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use mote_agent::exec::control;
use mote_agent::frame::{self, Frame};
use mote_agent::pty::{MAX_DATA, PtyExit, PtyRequest, PtyResize, kind};

use crate::cgroup::CommandCgroup;
use crate::connection::{Connection, Received};
use crate::launch::{self, Program, Refusal, SETUP_FAILED, doing};
use crate::session::{Context, Root, environment, exit_code, join_programs, program, working_dir};
use crate::spawn::Spawned;
use crate::sys::{self, Interest};

/// Exit code of a command that could not be started (contract §5).
const NOT_STARTED: i32 = 127;
/// Output taken from the terminal before the session looks at its other work.
const ROUND: usize = 64 * 1024;
/// Keystrokes that wait for the terminal; above it the client's frames are left in the socket.
const INPUT_FULL: usize = 64 * 1024;
/// Most output taken from a terminal whose command has ended: others may go on writing to it.
const LAST_OUTPUT: usize = 1 << 20;
/// How often to look for what no event tells: that a client which has ended its input is gone
/// altogether, that somebody has opened the terminal again.
const CHECK: Duration = Duration::from_millis(500);
/// How long a command may take to end after its terminal hung up.
const HANG_UP_GRACE: Duration = Duration::from_secs(2);

/// Serves one connection to its end.
pub fn session(mut connection: Connection, context: &Context<'_>) {
    let Some(request) = connection.wait_for_frame() else { return };
    // Contract §5: what is no request is not answered.
    let Ok(request) = serde_json::from_slice::<PtyRequest>(&request.payload) else { return };
    if request.cmd.is_empty() {
        connection.send(&frame::encode(kind::ERROR, b"Empty command"));
        return connection.finish();
    }
    let root = match Root::new(request.rootfs.as_ref(), request.working_dir.as_ref()) {
        Ok(root) => root,
        Err(reason) if request.explain => {
            exit(SETUP_FAILED.into(), false, Some(reason), &mut connection);
            return connection.finish();
        }
        Err(reason) => {
            connection.send(&frame::encode(kind::ERROR, reason.as_bytes()));
            return connection.finish();
        }
    };
    let oom_kills = context.cgroup.oom_kills();
    match Terminal::open(&request, root, context) {
        Ok(terminal) => {
            if request.announce {
                connection.send(&frame::encode(kind::STARTED, b""));
            }
            if let Some(code) = terminal.serve(&mut connection) {
                let oom_killed = context.cgroup.oom_kills() > oom_kills;
                exit(code, oom_killed, None, &mut connection);
            }
        }
        Err(Refusal { code, reason }) if request.explain => {
            exit(code.into(), false, Some(reason), &mut connection);
        }
        Err(Refusal { reason, .. }) => {
            let text = format!("{}: {reason}\r\n", request.cmd[0]);
            for part in text.as_bytes().chunks(MAX_DATA) {
                connection.send(&frame::encode(kind::DATA, part));
            }
            exit(NOT_STARTED, false, None, &mut connection);
        }
    }
    connection.finish();
}

fn exit(exit_code: i32, oom_killed: bool, reason: Option<String>, connection: &mut Connection) {
    // Plain data, which always serialises.
    let json = serde_json::to_vec(&PtyExit { exit_code, oom_killed, reason }).unwrap_or_default();
    connection.send(&frame::encode(kind::EXIT, &json));
}

/// A terminal and the command on it.
#[derive(Debug)]
struct Terminal {
    master: File,
    input: Vec<u8>,
    pid: i32,
    ended: OwnedFd,
    cgroup: CommandCgroup,
}

impl Terminal {
    /// Starts the command.
    fn open(
        request: &PtyRequest,
        root: Option<Root<'_>>,
        context: &Context<'_>,
    ) -> Result<Self, Refusal> {
        let cgroup =
            context.cgroup.create_command(context.session).map_err(doing("create its cgroup"))?;
        let (master, slave) = sys::open_terminal().map_err(doing("open a terminal"))?;
        sys::resize_terminal(&master, request.cols, request.rows)
            .map_err(doing("size the terminal"))?;
        join_programs(context)?;
        let env = environment(&request.env, request.process.as_ref(), context);
        let mut workdir = working_dir(request.working_dir.as_ref(), root.as_ref(), context);
        if let Some(root) = root {
            root.enter().map_err(doing("enter its root"))?;
        } else if !request.explain && !workdir.is_dir() {
            // Contract §5: a directory that cannot be entered is ignored.
            workdir = "/".into();
        }
        let user = request.user.as_deref();
        let program =
            program(&request.cmd, &env, &workdir, user, request.process.as_ref(), context);
        let stdio = [slave.as_fd(); 3];
        let program = Program { terminal: true, ..program };
        let Spawned { pid, .. } = launch::start(&program, stdio, cgroup.procs())?;
        let ended =
            sys::process_file(pid).inspect_err(|_| cgroup.kill()).map_err(doing("watch it"))?;
        Ok(Terminal { master, input: Vec::new(), pid, ended, cgroup })
    }

    /// Relays until the command has ended; `None` if the client went away first.
    fn serve(mut self, connection: &mut Connection) -> Option<i32> {
        loop {
            let receiving = self.input.len() < INPUT_FULL;
            if receiving && !connection.has_ended() {
                self.receive(connection);
            }
            let listening = receiving && !connection.has_ended();
            if !listening && connection.is_hung_up() {
                self.hang_up();
                return None;
            }
            self.feed();
            let open = self.pump(ROUND, false, connection);
            connection.flush();
            let mut interests = vec![Interest::read(self.ended.as_fd())];
            interests.extend(connection.interests(receiving));
            if open && !connection.is_full() {
                interests.push(Interest::read(self.master.as_fd()));
            }
            if !self.input.is_empty() {
                interests.push(Interest::write(self.master.as_fd()));
            }
            let check = (!listening || !open).then_some(CHECK);
            if sys::poll(&interests, check).is_ok_and(|ready| ready[0]) {
                let status = sys::wait_for(self.pid);
                self.pump(LAST_OUTPUT, true, connection);
                return Some(status.map_or(1, exit_code));
            }
        }
    }

    /// Handles what the client sends.
    fn receive(&mut self, connection: &mut Connection) {
        while self.input.len() < INPUT_FULL {
            match connection.receive() {
                Received::Frame(Frame { kind: kind::REQUEST | kind::DATA, payload }) => {
                    self.input.extend(payload);
                }
                Received::Frame(Frame { kind: kind::RESIZE, payload }) => {
                    if let Ok(PtyResize { cols, rows }) = serde_json::from_slice(&payload) {
                        // The master is open, so this cannot fail.
                        let _ = sys::resize_terminal(&self.master, cols, rows);
                    }
                }
                Received::Frame(Frame { kind: kind::ERROR, payload }) => {
                    if payload.is_empty() {
                        self.cgroup.kill();
                    } else if let Some(number) = control::signal(&payload, control::SIGNAL) {
                        sys::signal_group(self.pid, number);
                    }
                }
                Received::Frame(_) => {}
                Received::Nothing | Received::End => return,
            }
        }
    }

    fn feed(&mut self) {
        while !self.input.is_empty() {
            match self.master.write(&self.input) {
                Ok(taken) => drop(self.input.drain(..taken)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.input.clear(),
            }
        }
    }

    /// Passes at most about `limit` bytes of output on, with `last` whether there is room or not.
    /// `false` while nobody has the terminal open.
    fn pump(&mut self, limit: usize, last: bool, connection: &mut Connection) -> bool {
        let mut left = limit;
        let mut buffer = [0; MAX_DATA];
        while left > 0 && (last || !connection.is_full()) {
            match self.master.read(&mut buffer) {
                Ok(0) => return false,
                Ok(read) => {
                    left = left.saturating_sub(read);
                    connection.send(&frame::encode(kind::DATA, &buffer[..read]));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// Closes the terminal, which signals its processes (SIGHUP), and sees that the command ends.
    fn hang_up(self) {
        let Terminal { master, pid, ended, cgroup, .. } = self;
        drop(master);
        let ended = sys::poll(&[Interest::read(ended.as_fd())], Some(HANG_UP_GRACE));
        if !ended.is_ok_and(|ready| ready[0]) {
            cgroup.kill();
        }
        let _ = sys::wait_for(pid);
    }
}
