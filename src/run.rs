//! The main loop: signals, device events, the control channel, ends of everything; and the ordered
//! shutdown that turns them into one [`Outcome`].
//!
//! The box is over when the entrypoint's end and both complete output streams have arrived; the VM
//! is then simply dropped, because the agent has synced before it reported. Everything that ends
//! the VM otherwise first lets the output drain.

use std::cell::RefCell;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use mote_agent::protocol::{self, Decoder, EntrypointEnd, FromGuest, FromHost, Mark};

use crate::confine::Sandbox;
use crate::kvm::vcpu::Exit;
use crate::log::{self, FirstError};
use crate::outcome::Outcome;
use crate::sys;
use crate::timeline::{GuestClock, Timeline};
use crate::token::Token;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::{Activation, DeviceEvent, MainLoopDeviceKind};
use crate::vm::Vm;

/// The signals that ask for an orderly end.
const STOP_SIGNALS: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];
/// How long the guest may take to stop: longer than the agent's own grace of 5 s, and well inside
/// the 10 s after which the runtime sends SIGKILL (contract §2.6).
const STOP_LIMIT: Duration = Duration::from_secs(8);
/// How often the guest is told the time, against drift; besides whenever its clock may have come to
/// be wrong at once.
const CLOCK_INTERVAL: Duration = Duration::from_secs(300);
/// How long the VM may live on without its agent.
const AGENTLESS_LIMIT: Duration = Duration::from_secs(2);
/// Most activations and resets before the main loop turns to other work.
const DEVICE_EVENT_BATCH: usize = 16;
/// How long clients may take over the last of what the guest has sent them.
const CLIENTS_LIMIT: Duration = Duration::from_millis(500);
/// Output streams: stdout and stderr.
const STREAMS: u64 = 2;

/// The signals that mote takes from descriptors.
#[derive(Debug)]
pub struct Signals {
    /// Readable once mote has been asked to stop: what waits while a box is started looks at it.
    pub stop: File,
    /// SIGCONT, which continues the process whether blocked or not.
    continued: File,
}

impl Signals {
    /// Blocks them. To be called before any thread is started, so that all inherit it.
    pub fn block() -> Result<Signals> {
        let file = |signals: &[i32]| sys::signal_file(signals).context("watch for signals");
        Ok(Signals { stop: file(&STOP_SIGNALS)?, continued: file(&[libc::SIGCONT])? })
    }
}

/// Runs the VM to its end, in this sandbox.
pub fn run(
    vm: Vm,
    sandbox: &Sandbox,
    signals: Rc<Signals>,
    timeline: &mut Timeline,
) -> Result<Outcome> {
    let state = Rc::new(RefCell::new(MainLoop {
        vm,
        signals,
        clock: sys::wall_clock_file(CLOCK_INTERVAL).context("watch the wall clock")?,
        rng: None,
        rng_complaint: FirstError::default(),
        decoder: Decoder::default(),
        guest_clock: None,
        marks: Vec::new(),
        streams_done: 0,
        end: None,
        stop: None,
        agent_lost: None,
        ending: None,
        draining: None,
        failure: None,
    }));
    let mut manager =
        EventManager::<Rc<RefCell<MainLoop>>>::new().context("create the main loop")?;
    let id = manager.add_subscriber(Rc::clone(&state));
    // Last: from here on hardly anything is allowed.
    state.borrow_mut().vm.start(sandbox)?;
    timeline.mark("first_kvm_run");
    let outcome = loop {
        if let Some(outcome) = state.borrow_mut().outcome() {
            break outcome;
        }
        let timeout = state.borrow().timeout_ms();
        let mut round = || -> Result<()> {
            manager.run_with_timeout(timeout).context("wait for events")?;
            let mut ops = manager.event_ops(id).context("access the main loop")?;
            let mut state = state.borrow_mut();
            // However many events of the guest's making come before this one's turn.
            state.on_stop_signals();
            state.end_round(Instant::now(), &mut ops);
            Ok(())
        };
        if let Err(error) = round() {
            break Outcome::InternalError(format!("the main loop failed: {error:#}"));
        }
    };
    let state = state.borrow();
    for (name, at) in &state.marks {
        timeline.mark_at(name, *at);
    }
    if let Some(at) = state.vm.first_output.get() {
        timeline.mark_at("first_output", *at);
    }
    Ok(outcome)
}

struct MainLoop {
    vm: Vm,
    signals: Rc<Signals>,
    clock: File,
    rng: Option<Rng>,
    rng_complaint: FirstError,
    decoder: Decoder,
    guest_clock: Option<GuestClock>,
    marks: Vec<(&'static str, Instant)>,
    streams_done: u64,
    /// How the entrypoint ended.
    end: Option<EntrypointEnd>,
    /// The signal that asked to stop, and until when that may take.
    stop: Option<(i32, Instant)>,
    /// The control channel is gone; until when the VM may live on without it.
    agent_lost: Option<Instant>,
    /// The VM is over; this is the outcome once the output has drained.
    ending: Option<Outcome>,
    /// Until when clients may take what the guest has sent them, once the box is over.
    draining: Option<Instant>,
    /// Ends the box at once, output or not.
    failure: Option<Outcome>,
}

impl MainLoop {
    /// The outcome, once there is one.
    fn outcome(&mut self) -> Option<Outcome> {
        if let Some(failure) = self.failure.take() {
            return Some(failure);
        }
        let limit = self.draining?;
        if !self.vm.mux.is_drained() && Instant::now() < limit {
            return None;
        }
        match self.end.take() {
            Some(EntrypointEnd::Exited(code)) => Some(Outcome::Exited(code)),
            Some(EntrypointEnd::Signaled(signal)) => Some(Outcome::Signaled(signal)),
            Some(EntrypointEnd::NotStarted { code, reason }) => {
                Some(Outcome::EntrypointNotStarted { code, reason })
            }
            None => self.ending.take(),
        }
    }

    fn timeout_ms(&self) -> i32 {
        let deadlines = [
            self.stop.map(|(_, at)| at),
            self.agent_lost,
            self.draining,
            self.vm.mux.next_deadline(),
            self.vm.net.as_ref().and_then(Net::next_deadline),
        ];
        let Some(next) = deadlines.into_iter().flatten().min() else { return -1 };
        // Rounded up: waking early would only mean waking again.
        let left = next.saturating_duration_since(Instant::now()).as_millis() + 1;
        i32::try_from(left).unwrap_or(i32::MAX)
    }

    /// What follows from a round of events, and from the time.
    fn end_round(&mut self, now: Instant, ops: &mut EventOps<'_>) {
        if let Some((signal, limit)) = self.stop
            && now >= limit
        {
            self.fail(Outcome::Stopped(format!(
                "the guest did not stop within {} s of {}; stopped it hard",
                STOP_LIMIT.as_secs(),
                signal_name(signal)
            )));
        }
        if self.agent_lost.is_some_and(|limit| now >= limit) {
            self.agent_lost = None;
            self.end_vm(
                Outcome::NoStatus(
                    "the guest's agent closed its control channel without an exit status".into(),
                ),
                ops,
            );
        }
        let ended = self.vm.mux.end_round(now, ops);
        self.check_vsock(ended, ops);
        let retried = self.with_net(|net| net.retry(now, ops));
        self.check_net(retried);
        let over = self.end.is_some() || self.ending.is_some();
        if over && self.streams_done == STREAMS && self.draining.is_none() {
            // What clients were sent precedes the end of the box, and has arrived by now.
            self.draining = Some(now + CLIENTS_LIMIT);
            // It has ended in time.
            self.stop = None;
            self.close_vsock(ops);
        }
    }

    fn fail(&mut self, outcome: Outcome) {
        self.failure.get_or_insert(outcome);
    }

    /// The VM is over: collect what the guest had sent, and end when it is written out.
    fn end_vm(&mut self, outcome: Outcome, ops: &mut EventOps<'_>) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some(outcome);
        self.close_vsock(ops);
        self.read_control(ops);
        self.agent_lost = None;
    }

    fn close_vsock(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.vm.mux.close(ops) {
            log::error(&format!("vsock: {error:#}"));
        }
    }

    fn on_continued(&mut self) {
        while sys::next_signal(&self.signals.continued).is_some() {}
        self.send_clock();
    }

    fn on_stop_signals(&mut self) {
        while let Some(signal) = sys::next_signal(&self.signals.stop) {
            if self.stop.is_some() {
                let name = signal_name(signal);
                self.fail(Outcome::Stopped(format!("stopped hard by a second signal ({name})")));
                return;
            }
            self.stop = Some((signal, Instant::now() + STOP_LIMIT));
            if self.guest_clock.is_some() {
                self.send_stop(signal);
            }
        }
    }

    fn send_stop(&mut self, signal: i32) {
        self.send(FromHost::Stop { signal: signal as u8 });
    }

    fn send_clock(&mut self) {
        // An agent that has not said hello gets the time when it does.
        if self.guest_clock.is_some()
            && let Ok(since_1970) = SystemTime::now().duration_since(UNIX_EPOCH)
        {
            self.send(FromHost::Clock { realtime_ns: since_1970.as_nanos() as u64 });
        }
    }

    fn on_clock(&mut self) {
        // A jump of the clock makes the read fail, and is read by that.
        if self.clock.read(&mut [0; 8]).is_err() {
            // It worked at the start, so it works now.
            let _ = sys::set_wall_clock_file(&self.clock, CLOCK_INTERVAL);
        }
        self.send_clock();
    }

    fn send(&mut self, message: FromHost) {
        // A socket pair with room for thousands of these: what it does not take, nobody reads.
        let _ = self.vm.control.write(&message.encode());
    }

    fn on_vcpu_exit(&mut self, ops: &mut EventOps<'_>) {
        let _ = self.vm.exits.1.read();
        let Ok(exit) = self.vm.exits.0.try_recv() else { return };
        let panic = self.vm.panic.lock().unwrap_or_else(PoisonError::into_inner).clone();
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
        let _ = self.vm.device_events.1.read();
        for _ in 0..DEVICE_EVENT_BATCH {
            let Ok(event) = self.vm.device_events.0.try_recv() else { return };
            let handled = match event {
                DeviceEvent::Activated(MainLoopDeviceKind::Vsock, activation) => {
                    let activated = self.vm.mux.activate(activation, ops);
                    self.check_vsock(activated, ops);
                    Ok(())
                }
                DeviceEvent::Reset(MainLoopDeviceKind::Vsock, _) => self.vm.mux.reset(ops),
                DeviceEvent::Activated(MainLoopDeviceKind::Rng, activation) => {
                    self.activate_rng(activation, ops)
                }
                DeviceEvent::Reset(MainLoopDeviceKind::Rng, _) => self.stop_rng(ops),
                DeviceEvent::Activated(MainLoopDeviceKind::Net, activation) => {
                    self.with_net(|net| net.activate(activation, ops))
                }
                DeviceEvent::Reset(MainLoopDeviceKind::Net, _) => {
                    self.with_net(|net| net.reset(ops))
                }
            };
            if let Err(error) = handled {
                self.fail(Outcome::GuestCrashed(format!(
                    "a device of the guest failed: {error:#}"
                )));
            }
        }
        // There may be more: after everybody else's turn.
        let _ = self.vm.device_events.1.write(1);
    }

    fn activate_rng(&mut self, activation: Activation, ops: &mut EventOps<'_>) -> Result<()> {
        self.stop_rng(ops)?;
        let rng = Rng::new(activation)?;
        ops.add(Events::with_data(rng.kick(), Token::Rng.to_data(), EventSet::IN))?;
        self.rng = Some(rng);
        Ok(())
    }

    fn stop_rng(&mut self, ops: &mut EventOps<'_>) -> Result<()> {
        match self.rng.take() {
            Some(rng) => Ok(ops.remove(Events::empty(rng.kick()))?),
            None => Ok(()),
        }
    }

    fn on_rng(&mut self, ops: &mut EventOps<'_>) {
        let Some(Err(error)) = self.rng.as_mut().map(Rng::process) else { return };
        // The driver broke its own queue: this device stops, the guest lives on.
        self.rng_complaint.error(&format!("rng: {error:#}; the device stops"));
        let _ = self.stop_rng(ops);
    }

    fn with_net(&mut self, call: impl FnOnce(&mut Net) -> Result<()>) -> Result<()> {
        self.vm.net.as_mut().map_or(Ok(()), call)
    }

    fn check_net(&mut self, handled: Result<()>) {
        if let Err(error) = handled {
            // Neither the guest's fault nor passt's: the host refuses the main loop something.
            log::error(&format!("net: {error:#}"));
        }
    }

    fn check_vsock(&mut self, handled: Result<()>, ops: &mut EventOps<'_>) {
        let Err(error) = handled else { return };
        // Without vsock there is no agent, and so no exit status.
        let _ = self.vm.mux.reset(ops);
        self.end_vm(Outcome::NoStatus(format!("the guest broke its vsock device: {error:#}")), ops);
    }

    fn on_agent_lost(&mut self) {
        if self.end.is_none() && self.ending.is_none() {
            self.agent_lost = Some(Instant::now() + AGENTLESS_LIMIT);
        }
    }

    /// Reads and handles all messages there are. `true` when no more will come.
    fn read_control(&mut self, ops: &mut EventOps<'_>) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match self.vm.control.read(&mut bytes) {
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
                        let _ = self.vm.control.shutdown(std::net::Shutdown::Both);
                        return true;
                    }
                }
            }
        }
    }

    fn on_message(&mut self, message: FromGuest, ops: &mut EventOps<'_>) {
        match message {
            FromGuest::Hello { version, now_ns } => {
                // Only the first says who is there: a box that runs has been started.
                if version != protocol::VERSION && self.guest_clock.is_none() {
                    self.fail(Outcome::NotStarted(anyhow::anyhow!(
                        "the guest's agent speaks protocol version {version}, this mote {}; unset MOTE_INITRAMFS or build both together",
                        protocol::VERSION
                    )));
                    return;
                }
                self.guest_clock.get_or_insert(GuestClock::new(now_ns));
                self.send_clock();
                if let Some((signal, _)) = self.stop {
                    self.send_stop(signal);
                }
            }
            FromGuest::Reached { mark, at_ns } => {
                if mark == Mark::ServersReady {
                    let served = self.vm.mux.guest_is_ready(ops);
                    self.check_vsock(served, ops);
                }
                let name = match mark {
                    Mark::AgentStarted => "agent_started",
                    Mark::RootMounted => "root_mounted",
                    Mark::ServersReady => "servers_ready",
                    Mark::EntrypointStarted => "entrypoint_started",
                };
                // Only the first of each counts, so a guest cannot make this grow.
                if let Some(clock) = self.guest_clock
                    && self.marks.iter().all(|(known, _)| *known != name)
                {
                    self.marks.push((name, clock.to_host(at_ns)));
                }
            }
            FromGuest::Ended(end) => {
                self.end.get_or_insert(end);
            }
        }
    }

    fn on_backend_end(&mut self, index: usize, ops: &mut EventOps<'_>) {
        let Some(backend) = self.vm.backends.get_mut(index) else { return };
        // It stays readable: stop listening to it.
        let _ = ops.remove(Events::empty(&backend.ended()));
        let obituary = backend.obituary();
        // An entrypoint whose end has been reported needs no file system any more.
        self.end_vm(Outcome::BackendDied(obituary), ops);
    }
}

impl MutEventSubscriber for MainLoop {
    fn init(&mut self, ops: &mut EventOps) {
        let watch = |ops: &mut EventOps, fd, token: Token| {
            ops.add(Events::with_data_raw(fd, token.to_data(), EventSet::IN))
        };
        let mut registered = self.vm.mux.register(ops);
        if let Some(net) = &self.vm.net {
            registered = registered.and_then(|()| net.register(ops));
        }
        for (fd, token) in [
            (self.signals.stop.as_raw_fd(), Token::Stop),
            (self.signals.continued.as_raw_fd(), Token::Continued),
            (self.clock.as_raw_fd(), Token::Clock),
            (self.vm.exits.1.as_raw_fd(), Token::VcpuExit),
            (self.vm.device_events.1.as_raw_fd(), Token::Device),
            (self.vm.control.as_raw_fd(), Token::Control),
            (self.vm.output_done.as_raw_fd(), Token::OutputDone),
        ] {
            registered = registered.and_then(|()| Ok(watch(ops, fd, token)?));
        }
        for (index, backend) in self.vm.backends.iter().enumerate() {
            let token = Token::Backend(index as u32);
            let fd = backend.ended().as_raw_fd();
            registered = registered.and_then(|()| Ok(watch(ops, fd, token)?));
            if let Some(stderr) = backend.stderr() {
                let token = Token::BackendStderr(index as u32);
                registered = registered.and_then(|()| Ok(watch(ops, stderr.as_raw_fd(), token)?));
            }
        }
        if let Err(error) = registered {
            self.fail(Outcome::NotStarted(error.context("set up the main loop")));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let Some(token) = Token::from_data(events.data()) else { return };
        match token {
            // Looked for in every round.
            Token::Stop => {}
            Token::Continued => self.on_continued(),
            Token::Clock => self.on_clock(),
            Token::VcpuExit => self.on_vcpu_exit(ops),
            Token::Device => self.on_device_event(ops),
            Token::Control => {
                if self.read_control(ops) {
                    // At its end the socket stays readable: stop listening to it.
                    let _ = ops.remove(Events::empty(&self.vm.control));
                    self.on_agent_lost();
                }
            }
            Token::OutputDone => self.streams_done += self.vm.output_done.read().unwrap_or(0),
            Token::Backend(index) => self.on_backend_end(index as usize, ops),
            Token::BackendStderr(index) => {
                if let Some(backend) = self.vm.backends.get_mut(index as usize)
                    && !backend.listen()
                    && let Some(stderr) = backend.stderr()
                {
                    let _ = ops.remove(Events::empty(&stderr));
                }
            }
            Token::Rng => self.on_rng(ops),
            Token::NetReceive | Token::NetTransmit | Token::NetPasst => {
                let handled = self.with_net(|net| net.handle(token, events.event_set(), ops));
                self.check_net(handled);
            }
            Token::VsockReceive
            | Token::VsockTransmit
            | Token::VsockListener(_)
            | Token::VsockConnection(_) => {
                let handled = self.vm.mux.handle(token, events.event_set(), ops);
                self.check_vsock(handled, ops);
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
