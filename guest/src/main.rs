//! `mote-agent`: PID 1 of the guest. Read [`run`] from top to bottom for what a guest does between
//! kernel and power-off; everything it is asked to do is in `/mote/instance.json`.
//!
//! One thread, one poll loop; clients' requests are served by processes of their own ([`server`]).
//! Nothing here may end the process by accident: PID 1's death is a
//! kernel panic, so failures become a message to the host and a power-off.

mod cgroup;
mod command;
mod connection;
mod host;
mod launch;
mod mount;
mod network;
mod prepare;
mod resolv;
mod seccomp;
mod server;
mod session;
mod spawn;
mod sys;
mod terminal;
mod transfer;
mod tsi;
mod user;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mote_agent::protocol::{
    CONTROL_PORT, EntrypointEnd, FromGuest, FromHost, Mark, STDERR_PORT, STDOUT_PORT, VERSION,
};

use crate::cgroup::{BoxCgroup, CONTROLLERS_DELAY};
use crate::host::{Control, OutputPump, Received};
use crate::launch::Program;
use crate::prepare::{Prepared, prepare};
use crate::server::Server;
use crate::session::Context;
use crate::sys::{Interest, Reap, net, until};
use crate::tsi::Tsi;

/// How long processes get between the stop signal and SIGKILL (contract §7.2 step 10).
const GRACE: Duration = Duration::from_secs(5);
/// How long killed processes may take to vanish before their output counts as complete, and sessions
/// to tell their clients: a process that is stuck in the kernel never will, nor will a client that
/// takes nothing.
const REAP_LIMIT: Duration = Duration::from_millis(500);
/// The same for the process that carries connections, which gives up earlier when the host takes
/// nothing. Together with [`GRACE`] it stays below the host's patience.
const CONNECTIONS_LIMIT: Duration = Duration::from_millis(2_500);
/// Difference from the host's wall clock that is left alone.
const CLOCK_TOLERANCE_NS: u64 = 20_000_000;
/// How long the host may take to answer the first connections.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

fn main() {
    if let Err(reason) = run() {
        // Only reached when the host cannot be told: the console is what is left.
        eprintln!("mote-agent: {reason}");
    }
    sys::power_off();
}

fn run() -> Result<(), String> {
    let started_ns = sys::monotonic_ns();
    // The three connections are under way while the root is being mounted.
    let [control, stdout, stderr] = connect_to_host()?;
    let prepared = prepare();
    wait_until_connected([&control, &stdout, &stderr])?;

    let mut control = Control::new(control);
    control.send(&FromGuest::Hello { version: VERSION, now_ns: sys::monotonic_ns() });
    control.send(&FromGuest::Reached { mark: Mark::AgentStarted, at_ns: started_ns });

    let started = prepared
        .map_err(|reason| EntrypointEnd::NotStarted { code: 125, reason })
        .and_then(|prepared| Ok((start_entrypoint(&prepared)?, prepared)));
    let (end, outputs) = match started {
        Ok((entrypoint, prepared)) => {
            let Prepared {
                instance,
                root_mounted_ns,
                children,
                cgroup,
                mut server,
                mut tsi,
                servers_ready_ns,
            } = prepared;
            for (mark, at_ns) in [
                (Mark::RootMounted, root_mounted_ns),
                (Mark::ServersReady, servers_ready_ns),
                (Mark::EntrypointStarted, sys::monotonic_ns()),
            ] {
                control.send(&FromGuest::Reached { mark, at_ns });
            }
            let mut outputs = [
                OutputPump::new(entrypoint.stdout, stdout),
                OutputPump::new(entrypoint.stderr, stderr),
            ];
            let context = Context {
                instance: &instance,
                cgroup: &cgroup,
                entrypoint: entrypoint.pid,
                session: 0,
            };
            let end =
                supervise(&context, &children, &mut control, &mut outputs, &mut server, &mut tsi);
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

/// The running entrypoint, with the reading ends of its output, non-blocking.
struct Running {
    pid: i32,
    stdout: File,
    stderr: File,
}

fn start_entrypoint(prepared: &Prepared) -> Result<Running, EntrypointEnd> {
    let setup = |doing: &'static str| {
        move |e: std::io::Error| EntrypointEnd::NotStarted {
            code: 125,
            reason: format!("{doing} of the entrypoint: {e}"),
        }
    };
    let Prepared { instance, cgroup, .. } = prepared;
    let stdin = File::open("/dev/null").map_err(setup("open /dev/null for the input"))?;
    let (stdout, stdout_end) = sys::pipe().map_err(setup("create a pipe for the output"))?;
    let (stderr, stderr_end) = sys::pipe().map_err(setup("create a pipe for the errors"))?;
    let program = Program {
        executable: &instance.entrypoint.executable,
        args: &instance.entrypoint.args,
        env: &instance.entrypoint.env,
        workdir: &instance.workdir,
        user: instance.user.as_deref(),
        rlimits: &instance.rlimits,
        terminal: false,
        security: &instance.security,
    };
    let stdio = [stdin.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()];
    let pid = launch::start(&program, stdio, cgroup.procs()).map_err(|refusal| {
        // Set-up failures name their own field of the spec.
        let field = if refusal.code == 125 { "" } else { "entrypoint: " };
        let reason = format!("{field}{}", refusal.reason);
        EntrypointEnd::NotStarted { code: refusal.code, reason }
    })?;
    Ok(Running { pid, stdout, stderr })
}

fn connect_to_host() -> Result<[File; 3], String> {
    let connect = |port| {
        net::vsock_connect(port)
            .map_err(|e| format!("connect to vsock port {port:#x} of the host: {e}"))
    };
    Ok([connect(CONTROL_PORT)?, connect(STDOUT_PORT)?, connect(STDERR_PORT)?])
}

fn wait_until_connected(sockets: [&File; 3]) -> Result<(), String> {
    for (name, socket) in
        ["control channel", "standard output", "standard error"].iter().zip(sockets)
    {
        match sys::poll(&[Interest::write(socket.as_fd())], Some(CONNECT_LIMIT)) {
            Ok(ready) if ready[0] => net::socket_error(socket),
            Ok(_) => Err(std::io::ErrorKind::TimedOut.into()),
            Err(error) => Err(error),
        }
        .map_err(|e| format!("connect the {name} to the host: {e}"))?;
    }
    Ok(())
}

/// What phase the box is in; each ends by a deadline.
#[derive(Clone, Copy)]
enum Phase {
    /// The entrypoint runs.
    Running,
    /// It was told to stop; SIGKILL follows at the deadline.
    Stopping(Instant),
    /// It has ended and everything else was killed; at the deadline the rest is given up.
    Draining(Instant),
}

impl Phase {
    fn deadline(self) -> Option<Instant> {
        match self {
            Phase::Running => None,
            Phase::Stopping(deadline) | Phase::Draining(deadline) => Some(deadline),
        }
    }
}

/// Runs until the entrypoint has ended, every other process is gone and all output is handed over.
/// `None` when the host is lost: nobody is left to tell.
fn supervise(
    context: &Context<'_>,
    children: &File,
    control: &mut Control,
    outputs: &mut [OutputPump; 2],
    server: &mut Server,
    tsi: &mut Option<Tsi>,
) -> Option<EntrypointEnd> {
    let controllers_due = Instant::now() + CONTROLLERS_DELAY;
    let mut phase = Phase::Running;
    let mut end = None;
    let mut alone = false;
    loop {
        drain(children);
        while !alone {
            match sys::reap() {
                Reap::Ended(child) if child.pid == context.entrypoint => {
                    end = Some(match child.status {
                        Ok(code) => EntrypointEnd::Exited(code),
                        Err(signal) => EntrypointEnd::Signaled(signal),
                    });
                    kill_box(context.cgroup);
                    let mut limit = REAP_LIMIT;
                    if let Some(tsi) = tsi {
                        tsi.finish();
                        limit = CONNECTIONS_LIMIT;
                    }
                    phase = Phase::Draining(Instant::now() + limit);
                }
                Reap::Ended(child) => {
                    if let Some(tsi) = tsi {
                        tsi.child_ended(child.pid, child.status);
                        if let Phase::Draining(deadline) = &mut phase
                            && !tsi.is_running()
                        {
                            *deadline = (Instant::now() + REAP_LIMIT).min(*deadline);
                        }
                    }
                    server.child_ended(child.pid, child.status.is_ok(), context.cgroup);
                }
                Reap::NoneYet => break,
                Reap::NoChildren => {
                    alone = end.is_some();
                    break;
                }
            }
        }
        loop {
            match control.receive() {
                Received::Message(FromHost::Stop { signal }) => {
                    sys::signal_all(i32::from(signal));
                    if let Phase::Running = phase {
                        phase = Phase::Stopping(Instant::now() + GRACE);
                    }
                }
                Received::Message(FromHost::Clock { realtime_ns }) => correct_clock(realtime_ns),
                Received::Lost => return None,
                Received::Nothing => break,
            }
        }
        control.flush();
        let now = Instant::now();
        let last = match phase {
            Phase::Running => false,
            Phase::Stopping(deadline) => {
                if now >= deadline {
                    kill_box(context.cgroup);
                    phase = Phase::Stopping(now + GRACE);
                }
                false
            }
            Phase::Draining(deadline) => alone || now >= deadline,
        };
        for output in outputs.iter_mut() {
            output.pump(last);
        }
        if last && outputs.iter().all(OutputPump::is_done) {
            return end;
        }

        if now >= controllers_due {
            context.cgroup.enable_controllers();
        }
        // New clients are served while there is a box.
        let serving = end.is_none();
        let deadlines = [
            phase.deadline().filter(|_| !last),
            server.next_deadline().filter(|_| serving),
            context.cgroup.lacks_controllers().then_some(controllers_due),
        ];
        let limit = deadlines.into_iter().flatten().min().map(until);
        let mut interests: Vec<Interest<'_>> = Vec::new();
        if serving {
            interests.extend(server.interests());
        }
        let clients = interests.len();
        interests.push(Interest::read(children.as_fd()));
        interests.extend(control.interests());
        interests.extend(outputs.iter().filter_map(OutputPump::interest));
        // A failing poll would spin, but it has no way to fail: every descriptor is open.
        let Ok(ready) = sys::poll(&interests, limit) else { continue };
        if serving {
            server.serve(&ready[..clients], context);
        }
    }
}

/// Kills everything that runs in the box. Sessions see their commands end, tell their clients, and
/// end by themselves.
fn kill_box(cgroup: &BoxCgroup) {
    if cgroup.kill().is_err() {
        sys::signal_all(libc::SIGKILL);
    }
}

/// Steps the wall clock to the host's, unless the difference is no more than the message's way here.
fn correct_clock(realtime_ns: u64) {
    if sys::realtime_ns().abs_diff(realtime_ns) > CLOCK_TOLERANCE_NS {
        // PID 1 may set the clock, and the host's time is valid.
        let _ = sys::set_realtime(realtime_ns);
    }
}

/// Empties the child-signal descriptor; which children ended is `reap`'s to say.
fn drain(mut children: &File) {
    let mut buffer = [0; 128];
    while matches!(std::io::Read::read(&mut children, &mut buffer), Ok(read) if read > 0) {}
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
