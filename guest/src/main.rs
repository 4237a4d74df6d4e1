//! `mote-agent`: PID 1 of the guest. Read [`run`] from top to bottom for what a guest does between
//! kernel and power-off, and [`prepare`] for what precedes the entrypoint; everything it is asked to
//! do is in `/mote/instance.json`.
//!
//! One thread, one poll loop; clients' requests are served by processes of their own ([`server`]), and
//! so are network connections ([`tsi`]). Nothing here may end the process by accident: PID 1's death
//! is a kernel panic, so failures become a message to the host and a power-off.
//!
//! Each module uses only those above it, and the library ([`mote_agent`]):
//!
//! - [`sys`]: the system calls
//! - [`sys::net`], [`sys::files`], [`sys::bpf`], [`sys::ring_buffer`], [`sys::mailbox`]: those of networking, some about
//!   files, BPF's, and those of a guest that becomes another
//! - [`etc`], [`copy`]: files in the place of the image's; what the image has, copied into volumes
//! - [`devices`]: a `/dev` that has few of the kernel's devices
//! - [`cgroup`], [`mount`], [`network`], [`resolv`]: what the box is given before anything runs in it
//! - [`user`], [`seccomp`], [`spawn`]: who a program runs as, what it is refused, how it starts
//! - [`launch`]: starting a program, from all of these
//! - [`host`], [`connection`]: the connections to the VMM, and to a client
//! - [`attest`]: the attestation server, and what it leaves for commands
//! - [`session`], [`reply`]: what sessions have in common, and what a command's client gets
//! - [`command`], [`terminal`]: commands, and terminals, one of the two kinds of sessions
//! - [`place`], [`transfer`], [`directory`]: where paths lead, files in and out, and directories
//! - [`journal`], [`request`]: what is done only once, and the other kind of sessions
//! - [`server`]: takes clients, and gives each a session
//! - [`tsi`]: carries the connections of the box's programs
//! - [`template`]: what can be done before the box is known, and going on once it is
//! - [`prepare`]: everything else before the entrypoint
//! - [`supervisor`]: everything after

#![cfg_attr(not(test), no_main)]

mod attest;
mod cgroup;
mod command;
mod connection;
mod copy;
mod devices;
mod directory;
mod etc;
mod host;
mod journal;
mod launch;
mod mount;
mod network;
mod place;
mod prepare;
mod reply;
mod request;
mod resolv;
mod seccomp;
mod server;
mod session;
mod spawn;
mod supervisor;
mod sys;
mod template;
mod terminal;
mod transfer;
mod tsi;
mod user;

use std::ffi::{c_char, c_int};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use mote_agent::instance::TerminalSize;
use mote_agent::protocol::{
    CONTROL_PORT, EntrypointEnd, FromGuest, Mark, STDERR_PORT, STDIN_PORT, STDOUT_PORT, VERSION,
};

use crate::host::{Control, Pump, Received};
use crate::launch::{Program, SETUP_FAILED};
use crate::prepare::Prepared;
use crate::spawn::{Held, Spawned};
use crate::supervisor::{Streams, Supervisor};
use crate::sys::{Interest, net};

/// How long the host may take to answer the first connections.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The program, in place of Rust's own ([`sys::start`] says why).
#[allow(unsafe_code, reason = "the C library calls it by this name")]
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    sys::start();
    if let Err(reason) = run() {
        // Only reached when the host cannot be told: the console is what is left.
        eprintln!("mote-agent: {reason}");
    }
    sys::power_off();
}

fn run() -> Result<(), String> {
    let ready = template::get_ready()?;
    let started_ns = sys::monotonic_ns();
    // The three connections are under way while the root is being mounted.
    let [control, stdout, stderr] = connect_to_host()?;
    let prepared = prepare::prepare(ready);
    wait_until_connected([
        ("control channel", &control),
        ("standard output", &stdout),
        ("standard error", &stderr),
    ])?;

    let started = prepared
        .map_err(|reason| EntrypointEnd::NotStarted { code: SETUP_FAILED, reason })
        .and_then(|prepared| Ok((start_entrypoint(&prepared)?, prepared)));
    let entrypoint_started_ns = sys::monotonic_ns();
    // Now that nobody waits for the entrypoint: each message has the host work on it.
    let mut control = Control::new(control);
    control.send(&FromGuest::Hello { version: VERSION, now_ns: sys::monotonic_ns() });
    control.send(&FromGuest::Reached { mark: Mark::AgentStarted, at_ns: started_ns });
    let (end, outputs) = match started {
        Ok((entrypoint, mut prepared)) => {
            let marks = [
                (Mark::RootMounted, prepared.root_mounted_ns),
                (Mark::ServersReady, prepared.servers_ready_ns),
            ];
            let started = (Mark::EntrypointStarted, entrypoint_started_ns);
            let started = entrypoint.held.is_none().then_some(started);
            for (mark, at_ns) in marks.into_iter().chain(started) {
                control.send(&FromGuest::Reached { mark, at_ns });
            }
            let streams = Streams {
                outputs: [
                    Pump::output(entrypoint.stdout, stdout),
                    Pump::output(entrypoint.stderr, stderr),
                ],
                input: entrypoint.input.map(|(from, to)| Pump::input(from, to)),
                terminal: entrypoint.terminal,
            };
            let Running { pid, held, .. } = entrypoint;
            let supervisor =
                Supervisor::new(&mut prepared, pid, held.as_ref(), streams, &mut control);
            let (end, outputs) = supervisor.run();
            (end, Some(outputs))
        }
        Err(not_started) => {
            // Closing the streams is their end.
            drop((stdout, stderr));
            (Some(not_started), None)
        }
    };
    sys::sync();
    if let Some(end) = end {
        control.send(&FromGuest::Ended(end));
        wait_until_dropped(&mut control);
    }
    drop(outputs);
    Ok(())
}

/// The entrypoint's process, with the agent's ends of its streams, non-blocking.
struct Running {
    pid: i32,
    /// If it waits for a client's word.
    held: Option<Held>,
    stdout: File,
    stderr: File,
    /// The host's stream for its input, and where that goes.
    input: Option<(File, File)>,
    /// The terminal that it runs on, and its programs' end: kept open, so that programs may close theirs and open it again.
    terminal: Option<(File, OwnedFd)>,
}

fn start_entrypoint(prepared: &Prepared) -> Result<Running, EntrypointEnd> {
    let not_started = |reason| EntrypointEnd::NotStarted { code: SETUP_FAILED, reason };
    let setup = |doing: &'static str| {
        move |e: std::io::Error| not_started(format!("{doing} of the entrypoint: {e}"))
    };
    let Prepared { instance, cgroup, .. } = prepared;
    let program = Program::of_entrypoint(instance);
    let start = |stdio| {
        launch::start(&program, stdio, cgroup.procs()).map_err(|refusal| {
            // Set-up failures name their own field of the spec.
            let field = if refusal.code == SETUP_FAILED { "" } else { "entrypoint: " };
            let reason = format!("{field}{}", refusal.reason);
            EntrypointEnd::NotStarted { code: refusal.code, reason }
        })
    };
    let from_host = instance.start.stdin.then(connect_input).transpose().map_err(not_started)?;
    let (stderr, stderr_end) = sys::pipe().map_err(setup("create a pipe for the errors"))?;
    if let Some(TerminalSize { cols, rows }) = instance.start.terminal {
        let (master, slave) = sys::open_terminal().map_err(setup("open the terminal"))?;
        sys::resize_terminal(&master, cols, rows).map_err(setup("size the terminal"))?;
        if instance.devices.is_some() {
            devices::console(&slave).map_err(setup("make the console the terminal"))?;
        }
        let another = || master.try_clone().map_err(setup("duplicate the terminal"));
        let input = from_host.map(|from| Ok((from, another()?))).transpose()?;
        let stdout = another()?;
        let Spawned { pid, held } = start([slave.as_fd(); 3])?;
        let terminal = Some((master, slave));
        // All output is the terminal's: the stream for errors ends at once.
        return Ok(Running { pid, held, stdout, stderr, input, terminal });
    }
    let (stdin_end, input) = match from_host {
        None => {
            let null = File::open("/dev/null");
            (null.map_err(setup("open /dev/null for the input"))?.into(), None)
        }
        Some(from) => {
            let (end, to) = sys::input_pipe().map_err(setup("create a pipe for the input"))?;
            (end, Some((from, to)))
        }
    };
    let (stdout, stdout_end) = sys::pipe().map_err(setup("create a pipe for the output"))?;
    let stdio = [stdin_end.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()];
    let Spawned { pid, held } = start(stdio)?;
    Ok(Running { pid, held, stdout, stderr, input, terminal: None })
}

fn connect_input() -> Result<File, String> {
    let failed = |e: std::io::Error| format!("connect to the host for the entrypoint's input: {e}");
    let input = net::vsock_connect(STDIN_PORT).map_err(failed)?;
    wait_until_connected([("standard input", &input)])?;
    Ok(input)
}

fn connect_to_host() -> Result<[File; 3], String> {
    let connect = |port| {
        net::vsock_connect(port)
            .map_err(|e| format!("connect to vsock port {port:#x} of the host: {e}"))
    };
    Ok([connect(CONTROL_PORT)?, connect(STDOUT_PORT)?, connect(STDERR_PORT)?])
}

fn wait_until_connected<const N: usize>(sockets: [(&str, &File); N]) -> Result<(), String> {
    for (name, socket) in sockets {
        match sys::poll(&[Interest::write(socket.as_fd())], Some(CONNECT_LIMIT)) {
            Ok(ready) if ready[0] => net::socket_error(socket),
            Ok(_) => Err(std::io::ErrorKind::TimedOut.into()),
            Err(error) => Err(error),
        }
        .map_err(|e| format!("connect the {name} to the host: {e}"))?;
    }
    Ok(())
}

/// Waits for the host to drop the VM, which it does once it has the end and all output. Powering
/// off here could overtake them.
fn wait_until_dropped(control: &mut Control) {
    loop {
        control.flush();
        match control.receive() {
            Received::Message(_) => continue,
            Received::Lost => return,
            Received::Nothing => {}
        }
        let interests: Vec<Interest<'_>> = control.interests().collect();
        let _ = sys::poll(&interests, None);
    }
}
