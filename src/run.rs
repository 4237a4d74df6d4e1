//! The main loop: signals, device events, the control channel, and all that can end; and the ordered
//! shutdown that turns them into one [`Outcome`].
//!
//! The box is over when the entrypoint's end and both complete output streams have arrived. The VM is
//! then simply dropped, because the agent has synced the file systems before its report. If the VM ends
//! in another way, its output is still written first.

use std::cell::RefCell;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::mem;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use mote_agent::protocol::{self, Decoder, EntrypointEnd, FromGuest, FromHost, Mark};

use crate::confine::Sandbox;
use crate::host::virtiofsd::Virtiofsd;
use crate::kvm::vcpu::Exit;
use crate::log;
use crate::outcome::{Outcome, Record};
use crate::plan::Plan;
use crate::spec::process::SignalsTo;
use crate::sys;
use crate::sys::terminal::terminal_size;
use crate::timeline::{GuestClock, Timeline};
use crate::token::Token;
use crate::virtio::devices::Devices;
use crate::virtio::main_loop::{DeviceEvent, MainLoopDevice, Watcher};
use crate::vm::{Served, Vm};

/// Further signals that are for an entrypoint which gets them all.
const PASSED_ON: [i32; 2] = [libc::SIGUSR1, libc::SIGUSR2];
/// How long the guest may take to stop: longer than the agent's own grace of 5 s, and well inside
/// the 10 s after which the runtime sends SIGKILL (contract §2.6).
const STOP_LIMIT: Duration = Duration::from_secs(8);
/// How long the same signal is no second request: whoever signals a process and then its group (timeout(1),
/// supervisors, a script's Ctrl-C handler) sends it twice.
const ONE_REQUEST: Duration = Duration::from_secs(1);
/// How often the guest is told the time, against drift. It is also told when its clock may have become
/// wrong at once.
const CLOCK_INTERVAL: Duration = Duration::from_secs(300);
/// How long after the entrypoint's start the guest is told of late devices: their set-up is not to compete with what a
/// program does first, and one that ends soon does without.
const LATE_DEVICES_DELAY: Duration = Duration::from_secs(1);
/// How long the VM may run on without its agent.
const AGENTLESS_LIMIT: Duration = Duration::from_secs(2);
/// Most activations and resets before the main loop turns to other work.
const DEVICE_EVENT_BATCH: usize = 16;
/// How long clients may take to read the last data from the guest.
const CLIENTS_LIMIT: Duration = Duration::from_millis(500);
/// Output streams: stdout and stderr.
const STREAMS: u64 = 2;

/// The signals that mote reads from descriptors.
#[derive(Debug)]
pub struct Signals {
    /// Readable when mote has been asked to stop. Whatever waits during a box's start also waits for
    /// this.
    pub stop: File,
    /// SIGCONT, which continues the process even if it is blocked.
    continued: File,
    /// What shows the entrypoint's terminal.
    screen: Option<Screen>,
    /// What those that ask mote to stop are.
    to: SignalsTo,
}

/// mote's own terminal.
#[derive(Debug)]
struct Screen {
    /// mote's standard input as it was started, if that is one.
    terminal: File,
    /// SIGWINCH.
    resized: File,
}

impl Signals {
    /// Blocks the signals that a box needs. Must be called before any thread is started, so that all threads inherit that.
    ///
    /// # Errors
    /// The host refuses a descriptor for signals.
    pub fn block(plan: &Plan) -> Result<Signals> {
        let file = |signals: &[i32]| sys::signal_file(signals).context("watch for signals");
        let mut stop = sys::STOP_SIGNALS.to_vec();
        if plan.signals == SignalsTo::Entrypoint {
            stop.extend(PASSED_ON);
        }
        let has_terminal = plan.instance.start.terminal.is_some();
        let screen = || -> Result<Screen> {
            let terminal = sys::standard_input().context("duplicate standard input")?;
            Ok(Screen { terminal, resized: file(&[libc::SIGWINCH])? })
        };
        Ok(Signals {
            stop: file(&stop)?,
            continued: file(&[libc::SIGCONT])?,
            screen: has_terminal.then(screen).transpose()?,
            to: plan.signals,
        })
    }

    /// mote's standard input, where that shows the entrypoint's terminal.
    pub fn terminal(&self) -> Option<&File> {
        self.screen.as_ref().map(|screen| &screen.terminal)
    }
}

/// Runs the VM to its end, in this sandbox.
///
/// # Errors
/// The guest could not be started.
pub fn run(
    vm: Vm,
    served: Served,
    sandbox: &Sandbox,
    signals: Rc<Signals>,
    timeline: &mut Timeline,
) -> Result<Record> {
    let counts = timeline.count_exits();
    let state = Rc::new(RefCell::new(MainLoop {
        served,
        signals,
        timeline,
        clock: sys::wall_clock_file(CLOCK_INTERVAL).context("watch the wall clock")?,
        decoder: Decoder::default(),
        guest_clock: None,
        late_due: None,
        streams_done: 0,
        stop: None,
        life: Life::Running { agent_lost: None },
    }));
    let mut manager =
        EventManager::<Rc<RefCell<MainLoop>>>::new().context("create the main loop")?;
    let id = manager.add_subscriber(Rc::clone(&state));
    // Last, because from here on hardly any system call is allowed.
    let _running = vm.start(sandbox, &counts)?;
    state.borrow_mut().timeline.mark("first_kvm_run");
    let outcome = loop {
        if let Some(outcome) = state.borrow_mut().outcome() {
            break outcome;
        }
        let timeout = state.borrow().timeout_ms();
        let mut round = || -> Result<()> {
            manager.run_with_timeout(timeout).context("wait for events")?;
            let mut ops = manager.event_ops(id).context("access the main loop")?;
            let mut state = state.borrow_mut();
            // In every round, so that no number of events from the guest can delay a stop.
            state.on_stop_signals();
            state.end_round(Instant::now(), &mut ops);
            Ok(())
        };
        if let Err(error) = round() {
            break Outcome::InternalError(format!("the main loop failed: {error:#}"));
        }
    };
    let mut state = state.borrow_mut();
    // All of them, and they end while the VM does, before each is waited for.
    for backend in &state.served.backends {
        backend.kill();
    }
    if let Some(at) = state.served.first_output.get().copied() {
        state.timeline.mark_at("first_output", at);
    }
    let refusals = state.served.refusals.take();
    Ok(Record { outcome, refusals, simulated_attestation: false })
}

struct MainLoop<'a> {
    served: Served,
    signals: Rc<Signals>,
    timeline: &'a mut Timeline,
    clock: File,
    decoder: Decoder,
    /// None before the agent's hello.
    guest_clock: Option<GuestClock>,
    /// When the guest is told of late devices, and back-ends that nobody has asked for anything get ready; `None` before the
    /// entrypoint's start, and afterwards.
    late_due: Option<Instant>,
    streams_done: u64,
    stop: Option<StopRequest>,
    life: Life,
}

/// A request to stop the box.
#[derive(Debug, Clone, Copy)]
struct StopRequest {
    signal: i32,
    at: Instant,
}

impl StopRequest {
    /// When the guest must have stopped.
    fn limit(&self) -> Instant {
        self.at + STOP_LIMIT
    }

    /// Whether a later signal is this same request once more.
    fn is_repeated_by(&self, signal: i32, at: Instant) -> bool {
        signal == self.signal && at < self.at + ONE_REQUEST
    }
}

/// Whether the box runs, ends or has ended.
#[derive(Debug)]
enum Life {
    /// Nothing has ended yet.
    Running {
        /// Until when the VM may run on without its control channel; `None` while it has one.
        agent_lost: Option<Instant>,
    },
    /// It is known how the box ended. Data that was sent before the end is still delivered.
    Ending {
        end: End,
        /// Until when clients may read data that the guest has sent them; `None` while there is
        /// output to write.
        draining: Option<Instant>,
    },
    /// The box ends at once, even if there is output to write.
    Over(Outcome),
}

/// Why a box ends.
#[derive(Debug)]
enum End {
    /// The VM ended with this outcome, which counts unless the agent's report still arrives.
    Vm(Outcome),
    /// The agent reported how the entrypoint ended: this is the outcome, whatever ends later.
    Entrypoint(EntrypointEnd),
}

impl From<End> for Outcome {
    fn from(end: End) -> Self {
        match end {
            End::Vm(outcome) => outcome,
            End::Entrypoint(EntrypointEnd::Exited(code)) => Outcome::Exited(code),
            End::Entrypoint(EntrypointEnd::Signaled(signal)) => Outcome::Signaled(signal),
            End::Entrypoint(EntrypointEnd::NotStarted { code, reason }) => {
                Outcome::EntrypointNotStarted { code, reason }
            }
        }
    }
}

impl MainLoop<'_> {
    /// The outcome, once there is one.
    fn outcome(&mut self) -> Option<Outcome> {
        match &self.life {
            Life::Running { .. } | Life::Ending { draining: None, .. } => return None,
            Life::Ending { draining: Some(limit), .. } => {
                if !self.served.devices.vsock.is_drained() && Instant::now() < *limit {
                    return None;
                }
            }
            Life::Over(_) => {}
        }
        match mem::replace(&mut self.life, Life::Running { agent_lost: None }) {
            Life::Ending { end, .. } => Some(end.into()),
            Life::Over(outcome) => Some(outcome),
            Life::Running { .. } => None,
        }
    }

    fn timeout_ms(&self) -> i32 {
        let limit = match self.life {
            Life::Running { agent_lost: limit } | Life::Ending { draining: limit, .. } => limit,
            Life::Over(_) => None,
        };
        let devices = self.served.devices.iter().filter_map(MainLoopDevice::next_deadline);
        let deadlines =
            self.stop.as_ref().map(StopRequest::limit).into_iter().chain(limit).chain(devices);
        let deadlines = deadlines.chain(self.late_due);
        let deadlines = deadlines.chain(self.served.backends.iter().filter_map(Virtiofsd::due));
        let Some(next) = deadlines.min() else { return -1 };
        // Rounded up: waking early would only mean waking again.
        let left = next.saturating_duration_since(Instant::now()).as_millis() + 1;
        i32::try_from(left).unwrap_or(i32::MAX)
    }

    /// Ends a round of events: does what is due by `now`, and what the events have made necessary.
    fn end_round(&mut self, now: Instant, ops: &mut EventOps<'_>) {
        if let Some(stop) = self.stop
            && now >= stop.limit()
        {
            self.fail(Outcome::Stopped(format!(
                "the guest did not stop within {} s of {}; stopped it hard",
                STOP_LIMIT.as_secs(),
                signal_name(stop.signal)
            )));
        }
        if let Life::Running { agent_lost: Some(limit) } = self.life
            && now >= limit
        {
            self.end_vm(
                Outcome::NoStatus(
                    "the guest's agent closed its control channel without an exit status".into(),
                ),
                ops,
            );
        }
        let mut backends = self.served.backends.iter_mut();
        if let Some(late) = backends.find_map(|one| one.is_late(now).then_some(one)) {
            let end = late.describe_end();
            self.fail(Outcome::NotStarted(anyhow::Error::msg(end)));
        }
        if self.late_due.is_some_and(|due| now >= due) {
            self.late_due = None;
            self.served.backends.iter().for_each(Virtiofsd::ask);
            for device in mem::take(&mut self.served.late) {
                device.appear();
                self.send(FromHost::DeviceIsThere { index: device.index });
            }
        }
        for number in self.served.devices.numbers() {
            self.with_device(number, ops, |device, watcher| device.end_round(now, watcher));
        }
        if self.streams_done == STREAMS
            && let Life::Ending { draining: draining @ None, .. } = &mut self.life
        {
            // The guest sent its clients' data before the box's end, so the data has arrived by now.
            *draining = Some(now + CLIENTS_LIMIT);
            // The box has ended in time.
            self.stop = None;
            self.close_vsock(ops);
        }
    }

    /// Ends the box at once.
    fn fail(&mut self, outcome: Outcome) {
        if !matches!(self.life, Life::Over(_)) {
            self.life = Life::Over(outcome);
        }
    }

    /// The agent has reported how the entrypoint ended. Only its first report counts.
    fn on_entrypoint_end(&mut self, entrypoint: EntrypointEnd) {
        let reported = End::Entrypoint(entrypoint);
        match &mut self.life {
            Life::Running { .. } => self.life = Life::Ending { end: reported, draining: None },
            Life::Ending { end: end @ End::Vm(_), .. } => *end = reported,
            Life::Ending { end: End::Entrypoint(_), .. } | Life::Over(_) => {}
        }
    }

    /// The VM is over: takes what the guest had sent; the box ends when that is written.
    fn end_vm(&mut self, outcome: Outcome, ops: &mut EventOps<'_>) {
        match self.life {
            Life::Running { .. } => {
                self.life = Life::Ending { end: End::Vm(outcome), draining: None };
            }
            Life::Ending { end: End::Vm(_), .. } => return,
            Life::Ending { end: End::Entrypoint(_), .. } | Life::Over(_) => {}
        }
        self.close_vsock(ops);
        self.read_control(ops);
    }

    fn close_vsock(&mut self, ops: &mut EventOps<'_>) {
        let mut watcher = Watcher::new(ops, Devices::VSOCK);
        if let Err(error) = self.served.devices.vsock.close(&mut watcher) {
            log::error(&format!("vsock: {error:#}"));
        }
    }

    fn on_continued(&mut self) {
        while sys::next_signal(&self.signals.continued).is_some() {}
        self.check_clock();
    }

    fn on_stop_signals(&mut self) {
        while let Some(signal) = sys::next_signal(&self.signals.stop) {
            if self.signals.to == SignalsTo::Entrypoint {
                self.send(FromHost::Signal { signal: signal as u8 });
                continue;
            }
            let at = Instant::now();
            match self.stop {
                Some(stop) if stop.is_repeated_by(signal, at) => {}
                Some(_) => {
                    let name = signal_name(signal);
                    self.fail(Outcome::Stopped(format!(
                        "stopped hard by a second signal ({name})"
                    )));
                    return;
                }
                None => {
                    self.stop = Some(StopRequest { signal, at });
                    if self.guest_clock.is_some() {
                        self.send_stop(signal);
                    }
                }
            }
        }
    }

    fn send_stop(&mut self, signal: i32) {
        self.send(FromHost::Stop { signal: signal as u8 });
    }

    /// Tells the guest the size of mote's terminal, if it is to know it.
    fn send_size(&mut self) {
        let Some(Screen { terminal, resized }) = &self.signals.screen else { return };
        while sys::next_signal(resized).is_some() {}
        if let Some(size) = terminal_size(terminal) {
            self.send(FromHost::Resize { cols: size.cols, rows: size.rows });
        }
    }

    /// Has the guest's wall clock corrected. An agent that has not said hello gets the time when it does.
    fn check_clock(&mut self) {
        if self.guest_clock.is_some() {
            self.send(FromHost::ReadClock);
        }
    }

    /// Tells the time to a guest whose monotonic clock has just read `guest_ns`.
    fn send_clock(&mut self, guest_ns: u64) {
        if let Ok(since_1970) = SystemTime::now().duration_since(UNIX_EPOCH) {
            self.send(FromHost::Clock { realtime_ns: since_1970.as_nanos() as u64, guest_ns });
        }
    }

    fn on_clock(&mut self) {
        // After a jump of the clock the read fails with ECANCELED, once.
        if self.clock.read(&mut [0; 8]).is_err() {
            // The same call worked at the start, so it works now.
            let _ = sys::set_wall_clock_file(&self.clock, CLOCK_INTERVAL);
        }
        self.check_clock();
    }

    fn send(&mut self, message: FromHost) {
        // The socket pair has room for thousands of messages: if it is full, nobody reads them.
        let _ = self.served.control.write(&message.encode());
    }

    fn on_vcpu_exit(&mut self, ops: &mut EventOps<'_>) {
        self.served.exits.clear();
        let Some(exit) = self.served.exits.take() else { return };
        let panic = self.served.panic.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let outcome = match (exit, panic) {
            (_, Some(panic)) => {
                Outcome::GuestCrashed(format!("the guest kernel panicked: {panic}"))
            }
            (Exit::Reset, None) => {
                Outcome::NoStatus("the guest ended without reporting how the entrypoint did".into())
            }
            (Exit::TripleFault, None) => {
                Outcome::GuestCrashed("the guest kernel crashed (triple fault)".into())
            }
            (Exit::MemoryGone(reason), None) => Outcome::MemoryGone(reason),
            (Exit::Failed(reason), None) => Outcome::GuestCrashed(reason),
        };
        self.end_vm(outcome, ops);
    }

    fn on_device_event(&mut self, ops: &mut EventOps<'_>) {
        self.served.device_events.clear();
        for _ in 0..DEVICE_EVENT_BATCH {
            let Some(event) = self.served.device_events.take() else { return };
            match event {
                DeviceEvent::Activated(Devices::VSOCK, activation) => {
                    self.with_device(Devices::VSOCK, ops, |vsock, watcher| {
                        vsock.activate(activation, watcher)
                    });
                }
                DeviceEvent::Activated(number, activation) => {
                    let activated = self
                        .call(number, ops, |device, watcher| device.activate(activation, watcher));
                    self.check_change(activated);
                }
                // The vCPU waits until `_done` is dropped.
                DeviceEvent::Reset(number, _done) => {
                    let reset = self.call(number, ops, |device, watcher| device.reset(watcher));
                    self.check_change(reset);
                }
            }
        }
        // There may be more events: they wait until all others had their turn.
        self.served.device_events.wake();
    }

    fn call(
        &mut self,
        number: u8,
        ops: &mut EventOps<'_>,
        call: impl FnOnce(&mut dyn MainLoopDevice, &mut Watcher<'_, '_>) -> Result<()>,
    ) -> Result<()> {
        let Some(device) = self.served.devices.device(number) else { return Ok(()) };
        call(device, &mut Watcher::new(ops, number))
    }

    fn check_change(&mut self, changed: Result<()>) {
        if let Err(error) = changed {
            self.fail(Outcome::GuestCrashed(format!("a device of the guest failed: {error:#}")));
        }
    }

    /// Calls a device. An error means that the host refuses something; from vsock, also that the guest
    /// has broken the device. Without vsock there is no agent, and so no exit status: the box ends.
    fn with_device(
        &mut self,
        number: u8,
        ops: &mut EventOps<'_>,
        call: impl FnOnce(&mut dyn MainLoopDevice, &mut Watcher<'_, '_>) -> Result<()>,
    ) {
        let Err(error) = self.call(number, ops, call) else { return };
        if number == Devices::VSOCK {
            self.on_vsock_failure(&error, ops);
        } else if let Some(device) = self.served.devices.device(number) {
            log::error(&format!("{}: {error:#}", device.name()));
        }
    }

    fn on_vsock_failure(&mut self, error: &anyhow::Error, ops: &mut EventOps<'_>) {
        let _ = self.served.devices.vsock.reset(&mut Watcher::new(ops, Devices::VSOCK));
        self.end_vm(Outcome::NoStatus(format!("the guest broke its vsock device: {error:#}")), ops);
    }

    fn on_agent_lost(&mut self) {
        if let Life::Running { agent_lost } = &mut self.life {
            *agent_lost = Some(Instant::now() + AGENTLESS_LIMIT);
        }
    }

    /// Reads and handles all messages that have arrived. `true` when no more will come.
    fn read_control(&mut self, ops: &mut EventOps<'_>) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match self.served.control.read(&mut bytes) {
                Ok(0) => return true,
                Ok(read) => self.decoder.feed(&bytes[..read]),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(_) => return true,
            }
            loop {
                match self.decoder.next_from_guest() {
                    Ok(Some(message)) => self.on_message(message, ops),
                    Ok(None) => break,
                    Err(malformed) => {
                        log::error(&format!("the guest's control channel: {malformed}"));
                        let _ = self.served.control.shutdown(std::net::Shutdown::Both);
                        return true;
                    }
                }
            }
        }
    }

    fn on_message(&mut self, message: FromGuest, ops: &mut EventOps<'_>) {
        match message {
            FromGuest::Hello { version, now_ns } => {
                // Only the first hello counts: after that the box has started.
                if version != protocol::VERSION && self.guest_clock.is_none() {
                    self.fail(Outcome::NotStarted(anyhow::anyhow!(
                        "the guest's agent speaks protocol version {version}, this mote {}; unset MOTE_INITRAMFS or build both together",
                        protocol::VERSION
                    )));
                    return;
                }
                self.guest_clock.get_or_insert(GuestClock::new(now_ns));
                self.send_clock(now_ns);
                // It may have changed since the plan was made.
                self.send_size();
                if let Some(StopRequest { signal, .. }) = self.stop {
                    self.send_stop(signal);
                }
            }
            FromGuest::Reached { mark, at_ns } => {
                if mark == Mark::ServersReady {
                    let mut watcher = Watcher::new(ops, Devices::VSOCK);
                    if let Err(error) = self.served.devices.vsock.guest_is_ready(&mut watcher) {
                        self.on_vsock_failure(&error, ops);
                    }
                }
                if mark == Mark::EntrypointStarted {
                    self.late_due.get_or_insert(Instant::now() + LATE_DEVICES_DELAY);
                }
                let name = match mark {
                    Mark::AgentStarted => "agent_started",
                    Mark::RootMounted => "root_mounted",
                    Mark::ServersReady => "servers_ready",
                    Mark::EntrypointStarted => "entrypoint_started",
                };
                if let Some(clock) = self.guest_clock {
                    self.timeline.mark_at(name, clock.to_host(at_ns));
                }
            }
            FromGuest::ClockReads { now_ns } => self.send_clock(now_ns),
            FromGuest::Listens(listens) => {
                let Served { publisher: Some(publisher), devices, .. } = &mut self.served else {
                    return;
                };
                let mut watcher = Watcher::new(ops, Devices::VSOCK);
                if let Err(error) = publisher.note(listens, &mut devices.vsock, &mut watcher) {
                    log::error(&format!("publish port {}: {error:#}", listens.address.port()));
                }
            }
            FromGuest::Ended(end) => self.on_entrypoint_end(end),
        }
    }

    fn on_backend_end(&mut self, index: usize, ops: &mut EventOps<'_>) {
        let Some(backend) = self.served.backends.get_mut(index) else { return };
        // The descriptor stays readable, so it is not watched any more.
        let _ = ops.remove(Events::empty(&backend.ended()));
        let end = backend.describe_end();
        // What the agent has said before: it says hello when it has started the entrypoint.
        self.read_control(ops);
        let outcome = if self.guest_clock.is_some() {
            Outcome::BackendDied(end)
        } else {
            Outcome::NotStarted(anyhow::Error::msg(end))
        };
        // If the entrypoint's end has been reported, this does not change the outcome.
        self.end_vm(outcome, ops);
    }

    /// The guest has asked a back-end for something, or is about to: now it must get ready.
    fn on_backend_asked(&mut self, index: usize, ops: &mut EventOps<'_>) {
        let Some(backend) = self.served.backends.get_mut(index) else { return };
        backend.expect();
        // The requests that follow are the back-end's alone.
        if let Some(asked) = backend.asked() {
            let _ = ops.remove(Events::empty(asked));
        }
    }
}

impl MutEventSubscriber for MainLoop<'_> {
    fn init(&mut self, ops: &mut EventOps) {
        let watch = |ops: &mut EventOps, fd, token: Token| {
            ops.add(Events::with_data_raw(fd, token.to_data(), EventSet::IN))
        };
        let mut registered = Ok(());
        for number in self.served.devices.numbers() {
            let register = |device: &mut dyn MainLoopDevice, watcher: &mut Watcher<'_, '_>| {
                device.register(watcher)
            };
            registered = registered.and_then(|()| self.call(number, ops, register));
        }
        for (fd, token) in [
            (self.signals.stop.as_raw_fd(), Token::Stop),
            (self.signals.continued.as_raw_fd(), Token::Continued),
            (self.clock.as_raw_fd(), Token::Clock),
            (self.served.exits.as_raw_fd(), Token::VcpuExit),
            (self.served.device_events.as_raw_fd(), Token::DeviceEvent),
            (self.served.control.as_raw_fd(), Token::Control),
            (self.served.output_done.as_raw_fd(), Token::OutputDone),
        ] {
            registered = registered.and_then(|()| Ok(watch(ops, fd, token)?));
        }
        if let Some(Screen { resized, .. }) = &self.signals.screen {
            registered =
                registered.and_then(|()| Ok(watch(ops, resized.as_raw_fd(), Token::Resized)?));
        }
        for (index, backend) in self.served.backends.iter().enumerate() {
            let token = Token::Backend(index as u32);
            let fd = backend.ended().as_raw_fd();
            registered = registered.and_then(|()| Ok(watch(ops, fd, token)?));
            let (fd, token) = (backend.stderr().as_raw_fd(), Token::BackendStderr(index as u32));
            registered = registered.and_then(|()| Ok(watch(ops, fd, token)?));
            if let Some(asked) = backend.asked() {
                let token = Token::BackendAsked(index as u32);
                registered = registered.and_then(|()| Ok(watch(ops, asked.as_raw_fd(), token)?));
            }
        }
        if let Err(error) = registered {
            self.fail(Outcome::NotStarted(error.context("set up the main loop")));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let Some(token) = Token::from_data(events.data()) else { return };
        match token {
            // Handled in every round.
            Token::Stop => {}
            Token::Continued => self.on_continued(),
            Token::Resized => self.send_size(),
            Token::Clock => self.on_clock(),
            Token::VcpuExit => self.on_vcpu_exit(ops),
            Token::DeviceEvent => self.on_device_event(ops),
            Token::Control => {
                if self.read_control(ops) {
                    // At its end the socket stays readable, so it is not watched any more.
                    let _ = ops.remove(Events::empty(&self.served.control));
                    self.on_agent_lost();
                }
            }
            Token::OutputDone => self.streams_done += self.served.output_done.read().unwrap_or(0),
            Token::Backend(index) => self.on_backend_end(index as usize, ops),
            Token::BackendAsked(index) => self.on_backend_asked(index as usize, ops),
            Token::BackendStderr(index) => {
                if let Some(backend) = self.served.backends.get_mut(index as usize)
                    && !backend.listen()
                {
                    let _ = ops.remove(Events::empty(&backend.stderr()));
                }
            }
            Token::Device { device, source } => {
                self.with_device(device, ops, |device, watcher| {
                    device.handle(source, events.event_set(), watcher)
                });
            }
        }
    }
}

fn signal_name(signal: i32) -> String {
    match signal {
        libc::SIGTERM => "SIGTERM".into(),
        libc::SIGINT => "SIGINT".into(),
        libc::SIGHUP => "SIGHUP".into(),
        libc::SIGQUIT => "SIGQUIT".into(),
        other => format!("signal {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_signal_within_a_second_is_one_request() {
        let at = Instant::now();
        let stop = StopRequest { signal: libc::SIGTERM, at };
        for (signal, after_ms, is_one) in [
            (libc::SIGTERM, 0, true),
            (libc::SIGTERM, 999, true),
            (libc::SIGTERM, 1000, false),
            (libc::SIGTERM, 7000, false),
            (libc::SIGINT, 0, false),
            (libc::SIGINT, 999, false),
        ] {
            let later = at + Duration::from_millis(after_ms);
            assert_eq!(stop.is_repeated_by(signal, later), is_one, "{signal} {after_ms}");
        }
        assert_eq!(stop.limit(), at + STOP_LIMIT);
    }
}
