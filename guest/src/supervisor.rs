//! The life of a box from its entrypoint's start to the end of everything that runs in it: one thread
//! around one poll(2), which must not end by accident nor wait for anybody else.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use mote_agent::protocol::{EntrypointEnd, FromGuest, FromHost, Mark};

use crate::attest::Attest;
use crate::cgroup::{BoxCgroup, CONTROLLERS_DELAY};
use crate::host::{Control, Pump, Received};
use crate::launch::{self, Program};
use crate::prepare::Prepared;
use crate::server::Server;
use crate::session::Context;
use crate::spawn::{Held, Release};
use crate::sys::{self, ExitStatus, Interest, Reap, Reaped, until};
use crate::template;
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
/// Difference from the host's wall clock that is left alone, and how long the host's answer may be under way. Together they
/// are how far the clock may be off.
const CLOCK_TOLERANCE_NS: u64 = 10_000_000;
/// How often the host is asked for the time until an answer is that quick.
const CLOCK_QUESTIONS: u32 = 8;

/// What looks after a box whose entrypoint has been started.
pub struct Supervisor<'a> {
    context: Context<'a>,
    /// Readable while children have ended.
    children: &'a File,
    control: &'a mut Control,
    streams: Streams,
    server: &'a mut Server,
    tsi: Option<&'a mut Tsi>,
    phase: Phase,
    /// When the box gets the files of all cgroup controllers, unless it has them before.
    controllers_due: Instant,
    /// How often the host may still be asked for the time.
    clock_questions: u32,
}

/// The entrypoint's streams.
pub struct Streams {
    /// Its output and its errors.
    pub outputs: [Pump; 2],
    /// Its input, if the host gives it one.
    pub input: Option<Pump>,
    /// The terminal that it runs on, and its programs' end.
    pub terminal: Option<(File, OwnedFd)>,
}

/// What phase the box is in.
#[derive(Debug)]
enum Phase {
    /// The entrypoint runs.
    Running,
    /// It was told to stop; SIGKILL follows.
    Stopping { kill_at: Instant },
    /// It has ended and everything else was killed.
    Draining {
        /// How it has ended.
        end: EntrypointEnd,
        /// When the rest is given up.
        give_up_at: Instant,
        /// The agent has no children left.
        is_alone: bool,
    },
}

impl<'a> Supervisor<'a> {
    /// To supervise the box that was prepared, of which `entrypoint` is the process id, and which may be `held`.
    pub fn new(
        prepared: &'a mut Prepared,
        entrypoint: i32,
        held: Option<&'a Held>,
        streams: Streams,
        control: &'a mut Control,
    ) -> Self {
        let Prepared { instance, cgroup, children, server, tsi, attest, .. } = prepared;
        let attest = attest.as_ref();
        Supervisor {
            context: Context { instance, cgroup, attest, entrypoint, held, session: 0 },
            children,
            control,
            streams,
            server,
            tsi: tsi.as_mut(),
            phase: Phase::Running,
            controllers_due: Instant::now() + CONTROLLERS_DELAY,
            clock_questions: CLOCK_QUESTIONS,
        }
    }

    /// Runs until the entrypoint has ended, every other process is gone and all output is handed
    /// over. Returns the entrypoint's end, `None` when the host is lost and nobody is left to tell;
    /// and the outputs, whose connections are not to be closed before that is told.
    pub fn run(mut self) -> (Option<EntrypointEnd>, [Pump; 2]) {
        loop {
            drain(self.children);
            self.reap();
            if !self.heed_host() {
                return (None, self.streams.outputs);
            }
            self.control.flush();
            let now = Instant::now();
            let is_last = self.check_deadline(now);
            for output in &mut self.streams.outputs {
                output.pump(is_last);
            }
            if is_last && self.streams.outputs.iter().all(Pump::is_done) {
                return (self.phase.into_end(), self.streams.outputs);
            }
            if let Some(input) = &mut self.streams.input {
                input.pump(false);
                if input.is_done() {
                    self.streams.input = None;
                }
            }
            self.note_start();
            while !self.control.is_behind()
                && let Some(listens) = self.tsi.as_ref().and_then(|tsi| tsi.next_listens())
            {
                self.control.send(&FromGuest::Listens(listens));
            }
            if now >= self.controllers_due {
                self.context.cgroup.enable_controllers();
            }
            self.wait_and_serve(is_last);
        }
    }

    /// Collects the children that have ended.
    fn reap(&mut self) {
        while !matches!(self.phase, Phase::Draining { is_alone: true, .. }) {
            match sys::reap() {
                Reap::Ended(child) if child.pid == self.context.entrypoint => {
                    self.entrypoint_ended(child);
                }
                Reap::Ended(child) => self.child_ended(child),
                Reap::NoneYet => return,
                Reap::NoChildren => {
                    if let Phase::Draining { is_alone, .. } = &mut self.phase {
                        *is_alone = true;
                    }
                    return;
                }
            }
        }
    }

    /// Tells the host of the start of an entrypoint that was held.
    fn note_start(&mut self) {
        if let Some(held) = self.context.held
            && let Release::Running = held.state()
        {
            self.context.held = None;
            let (mark, at_ns) = (Mark::EntrypointStarted, sys::monotonic_ns());
            self.control.send(&FromGuest::Reached { mark, at_ns });
        }
    }

    fn entrypoint_ended(&mut self, child: Reaped) {
        let end = match (self.context.held.map(Held::state), child.status) {
            (Some(Release::Failed(error)), _) => {
                let program = Program::of_entrypoint(self.context.instance);
                let refusal = launch::explain_held(&program, error);
                let reason = format!("entrypoint: {}", refusal.reason);
                EntrypointEnd::NotStarted { code: refusal.code, reason }
            }
            (_, ExitStatus::Exited(code)) => EntrypointEnd::Exited(code),
            (_, ExitStatus::Signaled(signal)) => EntrypointEnd::Signaled(signal),
        };
        kill_box(self.context.cgroup);
        if let Some(attest) = self.context.attest {
            attest.finish();
        }
        let mut limit = REAP_LIMIT;
        if let Some(tsi) = &mut self.tsi {
            tsi.finish();
            limit = CONNECTIONS_LIMIT;
        }
        let give_up_at = Instant::now() + limit;
        self.phase = Phase::Draining { end, give_up_at, is_alone: false };
    }

    fn child_ended(&mut self, child: Reaped) {
        if let Some(tsi) = &mut self.tsi {
            tsi.child_ended(child);
            if let Phase::Draining { give_up_at, .. } = &mut self.phase
                && !tsi.is_running()
            {
                *give_up_at = (Instant::now() + REAP_LIMIT).min(*give_up_at);
            }
        }
        if let Some(attest) = self.context.attest {
            attest.child_ended(child);
        }
        self.server.child_ended(child, self.context.cgroup);
    }

    /// Asks the host for the time, unless it was asked often enough: on a busy machine no answer comes at once.
    fn ask_for_time(&mut self) {
        if let Some(left) = self.clock_questions.checked_sub(1) {
            self.clock_questions = left;
            self.control.send(&FromGuest::ClockReads { now_ns: sys::monotonic_ns() });
        }
    }

    /// Does what the host has asked for; `false` if it is lost.
    fn heed_host(&mut self) -> bool {
        loop {
            match self.control.receive() {
                Received::Message(FromHost::Stop { signal }) => {
                    sys::signal_all(i32::from(signal));
                    if let Phase::Running = self.phase {
                        self.phase = Phase::Stopping { kill_at: Instant::now() + GRACE };
                    }
                }
                Received::Message(FromHost::ReadClock) => {
                    self.clock_questions = CLOCK_QUESTIONS;
                    self.ask_for_time();
                }
                Received::Message(FromHost::Clock { realtime_ns, guest_ns }) => {
                    let age_ns = sys::monotonic_ns().saturating_sub(guest_ns);
                    if let Some(right_ns) = corrected(sys::realtime_ns(), realtime_ns, age_ns) {
                        // PID 1 may set the clock, and the host's time is valid.
                        let _ = sys::set_realtime(right_ns);
                    }
                    if age_ns > CLOCK_TOLERANCE_NS {
                        self.ask_for_time();
                    }
                }
                Received::Message(FromHost::Signal { signal }) => {
                    if let Phase::Running | Phase::Stopping { .. } = self.phase {
                        sys::signal(self.context.entrypoint, i32::from(signal));
                    }
                }
                Received::Message(FromHost::Resize { cols, rows }) => {
                    if let Some((terminal, _)) = &self.streams.terminal {
                        // It is open, so this cannot fail.
                        let _ = sys::resize_terminal(terminal, cols, rows);
                    }
                }
                Received::Message(FromHost::DeviceIsThere { index }) => {
                    // What does not work is for the host to notice: a device that nobody drives.
                    let _ = template::bind(index.into());
                }
                Received::Lost => return false,
                Received::Nothing => return true,
            }
        }
    }

    /// Does what is due; `true` if only the output that is there already is still waited for.
    fn check_deadline(&mut self, now: Instant) -> bool {
        match &mut self.phase {
            Phase::Running => false,
            Phase::Stopping { kill_at } => {
                if now >= *kill_at {
                    kill_box(self.context.cgroup);
                    *kill_at = now + GRACE;
                }
                false
            }
            Phase::Draining { give_up_at, is_alone, .. } => *is_alone || now >= *give_up_at,
        }
    }

    /// Waits until there is something to do, and serves clients.
    fn wait_and_serve(&mut self, is_last: bool) {
        // New clients are served while there is a box.
        let serving = !matches!(self.phase, Phase::Draining { .. });
        let attest = self.context.attest.filter(|_| serving);
        let deadlines = [
            self.phase.deadline().filter(|_| !is_last),
            self.server.next_deadline().filter(|_| serving),
            attest.and_then(Attest::next_deadline),
            self.context.cgroup.lacks_controllers().then_some(self.controllers_due),
        ];
        let limit = deadlines.into_iter().flatten().min().map(until);
        let mut interests: Vec<Interest<'_>> = Vec::new();
        if serving {
            interests.extend(self.server.interests());
        }
        let clients = interests.len();
        interests.extend(attest.and_then(Attest::interest));
        let of_attest = clients..interests.len();
        let tsi = self.tsi.as_ref();
        interests.extend(tsi.filter(|_| serving).into_iter().flat_map(|tsi| tsi.interests()));
        let of_tsi = of_attest.end..interests.len();
        interests.push(Interest::read(self.children.as_fd()));
        interests.extend(self.control.interests());
        interests.extend(self.context.held.map(Held::interest));
        let tsi = tsi.filter(|_| !self.control.is_behind());
        interests.extend(tsi.and_then(|tsi| tsi.listens_interest()));
        interests.extend(self.streams.outputs.iter().filter_map(Pump::interest));
        interests.extend(self.streams.input.iter().filter_map(Pump::interest));
        // A failing poll would make the agent spin, but every descriptor is open, so it cannot fail.
        let Ok(ready) = sys::poll(&interests, limit) else { return };
        if serving {
            self.server.serve(&ready[..clients], &self.context);
        }
        if let Some(attest) = attest {
            attest.serve(ready[of_attest].contains(&true));
        }
        if let Some(tsi) = self.tsi.as_mut().filter(|_| ready[of_tsi].contains(&true)) {
            tsi.serve();
        }
    }
}

impl Phase {
    fn deadline(&self) -> Option<Instant> {
        match self {
            Phase::Running => None,
            Phase::Stopping { kill_at } => Some(*kill_at),
            Phase::Draining { give_up_at, .. } => Some(*give_up_at),
        }
    }

    fn into_end(self) -> Option<EntrypointEnd> {
        match self {
            Phase::Running | Phase::Stopping { .. } => None,
            Phase::Draining { end, .. } => Some(end),
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

/// What a wall clock is to be set to that reads `own_ns`, when the host's has read `realtime_ns` within the last `age_ns`:
/// nothing, if it may be right. The message has waited for this agent, rather than for the host, which answers at once.
fn corrected(own_ns: u64, realtime_ns: u64, age_ns: u64) -> Option<u64> {
    let latest_ns = realtime_ns.saturating_add(age_ns);
    let from_ns = realtime_ns.saturating_sub(CLOCK_TOLERANCE_NS);
    let may_be_right = (from_ns..=latest_ns.saturating_add(CLOCK_TOLERANCE_NS)).contains(&own_ns);
    (!may_be_right).then_some(latest_ns)
}

/// Empties the child-signal descriptor; which children ended is `reap`'s to say.
fn drain(mut children: &File) {
    let mut buffer = [0; 128];
    while matches!(children.read(&mut buffer), Ok(read) if read > 0) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_may_be_right_is_left_alone() {
        const MS: u64 = 1_000_000;
        let host = 1_000_000 * MS;
        // However long the message has waited: the clock went on meanwhile.
        for age in [0, 5 * MS, 3_000 * MS] {
            for own in [host - 10 * MS, host, host + age / 2, host + age, host + age + 10 * MS] {
                assert_eq!(corrected(own, host, age), None);
            }
            for own in [0, host - 11 * MS, host + age + 11 * MS] {
                assert_eq!(corrected(own, host, age), Some(host + age));
            }
        }
        assert_eq!(corrected(0, u64::MAX, u64::MAX), Some(u64::MAX));
    }
}
