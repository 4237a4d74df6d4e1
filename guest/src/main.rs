//! `mote-agent`: PID 1 of the guest. Read [`run`] from top to bottom for what a guest does between
//! kernel and power-off; everything it is asked to do is in `/mote/instance.json`.
//!
//! One thread, one poll loop. Nothing here may end the process by accident: PID 1's death is a
//! kernel panic, so failures become a message to the host and a power-off.

mod host;
mod mount;
mod sys;
mod user;
mod workload;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mote_agent::instance::{self, Instance};
use mote_agent::protocol::{
    CONTROL_PORT, EntrypointEnd, FromGuest, FromHost, Mark, STDERR_PORT, STDOUT_PORT, VERSION,
};

use crate::host::{Control, Received, Relay};
use crate::sys::{Interest, Reap};
use crate::workload::Workload;

/// How long processes get between the stop signal and SIGKILL (contract §7.2 step 10).
const GRACE: Duration = Duration::from_secs(5);
/// How long killed processes may take to vanish before their output counts as complete: one that
/// is stuck in the kernel never will.
const REAP_LIMIT: Duration = Duration::from_secs(2);
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
    let root_ns = sys::monotonic_ns();
    wait_until_connected([&control, &stdout, &stderr])?;

    let mut control = Control::new(control);
    control.send(&FromGuest::Hello { version: VERSION, now_ns: sys::monotonic_ns() });
    control.send(&FromGuest::Reached { mark: Mark::AgentStarted, at_ns: started_ns });

    let started = prepared
        .map_err(|reason| EntrypointEnd::NotStarted { code: 125, reason })
        .and_then(|(instance, children)| Ok((workload::start(&instance)?, children)));
    let (end, relays) = match started {
        Ok((workload, children)) => {
            control.send(&FromGuest::Reached { mark: Mark::RootMounted, at_ns: root_ns });
            control.send(&FromGuest::Reached {
                mark: Mark::EntrypointStarted,
                at_ns: sys::monotonic_ns(),
            });
            let Workload { pid, stdout: out, stderr: err } = workload;
            let mut relays = [Relay::new(out, stdout), Relay::new(err, stderr)];
            let end = supervise(pid, &children, &mut control, &mut relays);
            (end, Some(relays))
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
    drop(relays);
    Ok(())
}

/// Everything between the kernel's hand-over and the entrypoint, in order.
fn prepare() -> Result<(Instance, File), String> {
    let json = fs::read(instance::PATH).map_err(|e| format!("read {}: {e}", instance::PATH))?;
    let instance: Instance =
        serde_json::from_slice(&json).map_err(|e| format!("parse {}: {e}", instance::PATH))?;
    mount::root()?;
    mount::kernel_file_systems()?;
    sys::set_hostname(&instance.hostname)
        .map_err(|e| format!("set the host name '{}': {e}", instance.hostname))?;
    sys::interface_up("lo").map_err(|e| format!("bring up the loopback interface: {e}"))?;
    let children = sys::child_signal().map_err(|e| format!("watch for ended processes: {e}"))?;
    Ok((instance, children))
}

fn connect_to_host() -> Result<[File; 3], String> {
    let connect = |port| {
        sys::vsock_connect(port)
            .map_err(|e| format!("connect to vsock port {port:#x} of the host: {e}"))
    };
    Ok([connect(CONTROL_PORT)?, connect(STDOUT_PORT)?, connect(STDERR_PORT)?])
}

fn wait_until_connected(sockets: [&File; 3]) -> Result<(), String> {
    for (name, socket) in
        ["control channel", "standard output", "standard error"].iter().zip(sockets)
    {
        let limit_ms = CONNECT_LIMIT.as_millis() as i32;
        match sys::poll(&[Interest::write(socket.as_fd())], Some(limit_ms)) {
            Ok(true) => sys::socket_error(socket),
            Ok(false) => Err(std::io::ErrorKind::TimedOut.into()),
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

/// Runs until the entrypoint has ended, every other process is gone and all output is handed over.
/// `None` when the host is lost: nobody is left to tell.
fn supervise(
    pid: i32,
    children: &File,
    control: &mut Control,
    relays: &mut [Relay; 2],
) -> Option<EntrypointEnd> {
    let mut phase = Phase::Running;
    let mut end = None;
    let mut alone = false;
    loop {
        drain(children);
        while !alone {
            match sys::reap() {
                Reap::Ended(child) if child.pid == pid => {
                    end = Some(match child.status {
                        Ok(code) => EntrypointEnd::Exited(code),
                        Err(signal) => EntrypointEnd::Signaled(signal),
                    });
                    sys::signal_all(libc::SIGKILL);
                    phase = Phase::Draining(Instant::now() + REAP_LIMIT);
                }
                Reap::Ended(_) => {}
                Reap::NoneYet => break,
                Reap::NoChildren => alone = end.is_some(),
            }
            if end.is_none() && alone {
                break;
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
                    sys::signal_all(libc::SIGKILL);
                    phase = Phase::Stopping(now + GRACE);
                }
                false
            }
            Phase::Draining(deadline) => alone || now >= deadline,
        };
        for relay in relays.iter_mut() {
            relay.pump(last);
        }
        if last && relays.iter().all(Relay::is_done) {
            return end;
        }

        let timeout = match phase {
            Phase::Running => None,
            Phase::Draining(_) if last => None,
            Phase::Stopping(deadline) | Phase::Draining(deadline) => {
                Some(deadline.saturating_duration_since(Instant::now()).as_millis() as i32 + 1)
            }
        };
        let interests: Vec<Interest<'_>> = [Interest::read(children.as_fd())]
            .into_iter()
            .chain(control.interests())
            .chain(relays.iter().filter_map(Relay::interest))
            .collect();
        // A failing poll would spin, but it has no way to fail: every descriptor is open.
        let _ = sys::poll(&interests, timeout);
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
