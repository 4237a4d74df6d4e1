//! [`Vm::build`] assembles the whole VM, step by step. A failure anywhere drops what was made so far,
//! which ends the back-ends. [`Vm::start`] starts and confines the threads, and then the guest.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;

use anyhow::{Context, Result, anyhow};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use mote_agent::protocol::{CONTROL_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Bus;
use crate::confine::{Sandbox, ThreadKind};
use crate::console::{
    self, FirstOutput, InputStream, KernelLog, OutputStream, PanicMessage, Sinks,
};
use crate::event_channel::{Receiver, Sender, event_channel};
use crate::host::janitor::Janitor;
use crate::host::logs::LogWriter;
use crate::host::publisher::Publisher;
use crate::host::switch::SwitchProcess;
use crate::host::virtiofsd::{self, Virtiofsd};
use crate::kvm::vcpu::{self, Exit, Start};
use crate::kvm::{Machine, self_test};
use crate::memory::{GuestRam, RegisterPages};
use crate::plan::{Network, Networking, Output, PasstSocket, Plan};
use crate::policy::Policy;
use crate::policy::filter::Filter;
use crate::policy::refusals::SharedRefusals;
use crate::template::{self, LetterClock, Resumed};
use crate::timeline::{ExitCounts, Timeline};
use crate::virtio::device::VirtioDevice;
use crate::virtio::devices::Devices;
use crate::virtio::fs::Fs;
use crate::virtio::main_loop::{DeviceEvent, Forwarder, MainLoopDevice};
use crate::virtio::mmio::{LateDevice, MmioDevice};
use crate::virtio::net::Net;
use crate::virtio::net::filter::FrameFilter;
use crate::virtio::net::passt::{self, Connection, Reconnect};
use crate::virtio::net::peers::Peers;
use crate::virtio::vsock::listeners::Listener;
use crate::virtio::vsock::mux::Mux;
use crate::{boot, kvm, layout, log, sys};

/// A VM that is ready to start.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    vcpus: Vec<VcpuFd>,
    /// Where the guest is told the time, if it starts from a template; else it boots.
    letter_clock: Option<LetterClock>,
    outputs: Vec<OutputStream>,
    input: Option<InputStream>,
    bus: Arc<Bus>,
    exits: Sender<Exit>,
}

/// What the main loop needs to serve a VM.
#[derive(Debug)]
pub struct Served {
    /// The devices whose queues the main loop serves.
    pub devices: Devices,
    /// mote's end of the control channel.
    pub control: UnixStream,
    /// Activations and resets of these devices.
    pub device_events: Receiver<DeviceEvent>,
    /// Reasons why vCPUs stopped.
    pub exits: Receiver<Exit>,
    /// Written to once for each output stream that is complete.
    pub output_done: EventFd,
    /// When the first byte of output was written.
    pub first_output: FirstOutput,
    /// The message of a kernel panic.
    pub panic: PanicMessage,
    /// Devices that the guest is to find only when the entrypoint runs.
    pub late: Vec<LateDevice>,
    /// The virtio-fs back-ends.
    pub backends: Vec<Virtiofsd>,
    /// What the box was not let connect to.
    pub refusals: SharedRefusals,
    /// What publishes the ports on which the box listens, if it shall.
    pub publisher: Option<Publisher>,
    /// Who exchanges frames with other boxes.
    pub switch: Option<SwitchProcess>,
    /// Who writes the box's logs. Last: it ends when nobody has anything to write any more.
    pub logs: Option<LogWriter>,
}

/// A running VM. It must be kept as long as the VM runs: closing the descriptor would disconnect every
/// interrupt, although the vCPUs still hold the VM, and the last vCPU to drop the bus would end the
/// back-ends' connections on its own thread.
#[derive(Debug)]
pub struct Running {
    _fd: VmFd,
    _bus: Arc<Bus>,
}

impl Vm {
    /// Builds the VM that the plan describes, on the sockets that were bound for it, those that listen and the
    /// one for other boxes' frames. No thread that this
    /// starts outlives the call. It stops waiting, with an error, when `stop` is readable.
    ///
    /// # Errors
    /// The host refuses something, a back-end does not come up, or mote was told to stop.
    pub fn build(
        plan: &Plan,
        kvm: Kvm,
        listeners: Vec<Listener>,
        datagrams: Option<UnixDatagram>,
        janitor: &Janitor,
        stop: &File,
        timeline: &mut Timeline,
    ) -> Result<(Vm, Served)> {
        // Host resources. The back-ends start while the kernel is being loaded.
        let (sinks, logs) = match &plan.output {
            Output::Streams => (Sinks::of_mote()?, None),
            Output::File(file) => (Sinks::file(file, stop)?, None),
            Output::Logs(logs) => {
                let writer = LogWriter::start(logs, plan.sandbox.isolation, stop)?;
                (writer.sinks()?, Some(writer))
            }
        };
        let refusals = SharedRefusals::default();
        let filter = |policy: &Policy| {
            Filter::new(policy.clone(), Rc::clone(&refusals))
                .context("open a socket to ask for the host's routes")
        };
        let (outgoing, mut net) = match &plan.networking {
            Networking::Hosts(policy) => (Some(filter(policy)?), None),
            Networking::Own(network) => {
                let filter = FrameFilter::new(filter(&network.policy)?);
                (None, Some(connect_network(network, filter, janitor, stop)?))
            }
            Networking::None => (None, None),
        };
        let switch = match (plan.networking.switch(), &mut net, datagrams) {
            (Some(switch), Some(net), Some(socket)) => {
                let isolation = plan.sandbox.isolation;
                let (process, connection) = SwitchProcess::start(switch, isolation, socket)?;
                janitor.kill_at_end([process.process()])?;
                let connection =
                    Connection::new(connection).context("prepare the connection to mote-switch")?;
                net.connect_peers(Peers::new(connection, switch.subnet.clone()));
                Some(process)
            }
            _ => None,
        };
        let (mut backends, connections) = spawn_backends(plan)?;
        timeline.mark("backends_spawned");

        // The agent's streams: each is a socket pair, and the vsock device has one end of it.
        let output_done = eventfd()?;
        let first_output = FirstOutput::default();
        let mut reserved_ports = HashMap::new();
        let mut outputs = Vec::new();
        for (name, port, to) in
            [("stdout", STDOUT_PORT, sinks.stdout), ("stderr", STDERR_PORT, sinks.stderr)]
        {
            let (from, theirs) = UnixStream::pair().context("create a socket pair")?;
            reserved_ports.insert(port, theirs);
            let (first_output, done) = (Arc::clone(&first_output), output_done.try_clone()?);
            outputs.push(OutputStream { name, from, to, first_output, done });
        }
        let input = if plan.instance.start.stdin {
            let (to, theirs) = UnixStream::pair().context("create a socket pair")?;
            reserved_ports.insert(STDIN_PORT, theirs);
            Some(InputStream::of_mote(to)?)
        } else {
            None
        };
        let (control, theirs) = UnixStream::pair().context("create a socket pair")?;
        control.set_nonblocking(true).context("prepare the control channel")?;
        reserved_ports.insert(CONTROL_PORT, theirs);
        let vsock = Mux::new(reserved_ports, listeners, outgoing);
        let devices = Devices::new(vsock, net);

        let device_count = devices.iter().count() + plan.shares.len();
        let late_count = devices.iter().filter(|device| device.properties().late).count();
        let (machine, resumed) =
            ready_to_run(plan, &kvm, [device_count, late_count], janitor, timeline)?;
        let Machine { vm, ram, free_slot, vcpus } = machine;
        janitor.hold(&vm)?;

        // The transports' side of the devices, in the order of their addresses: those that every box has, which are
        // in every template; and then the others.
        let (device_sender, device_events) = event_channel(DEVICE_EVENTS)?;
        let forwarder = |(number, device): (u8, &dyn MainLoopDevice)| {
            let (properties, events) = (device.properties(), device_sender.clone());
            Box::new(Forwarder { device: number, properties, events }) as Box<dyn VirtioDevice>
        };
        let mut forwarders = (0..).zip(devices.iter()).map(forwarder);
        let mut front_ends: Vec<_> = forwarders.by_ref().take(Devices::OF_EVERY_BOX).collect();
        let shares = connect_shares(plan, &mut backends, connections, stop, &ram)?;
        let mut shares = shares.into_iter().map(|share| Box::new(share) as Box<dyn VirtioDevice>);
        front_ends.extend(shares.next());
        front_ends.extend(forwarders.chain(shares));
        // Last: a guest that starts from a template starts all that come before them at once.
        front_ends.sort_by_key(|device| device.is_late());
        for backend in &backends {
            janitor.kill_at_end(backend.processes())?;
        }
        timeline.mark("backends_connected");
        let pages = RegisterPages::new(&vm, free_slot, device_count)?;
        let mut transports = front_ends
            .into_iter()
            .enumerate()
            .map(|(index, device)| {
                let id = device.id();
                MmioDevice::attach(device, index, pages.page(index), &vm, &ram)
                    .with_context(|| format!("attach virtio device {index} (type {id})"))
            })
            .collect::<Result<Vec<_>>>()?;
        let late = transports.iter().enumerate().filter_map(|(index, device)| device.late(index));
        let late = late.collect();
        let serial_irq = eventfd()?;
        vm.register_irqfd(&serial_irq, layout::SERIAL_IRQ).context("connect the serial port")?;
        let panic = PanicMessage::default();
        let log = KernelLog::new(sinks.kernel, Arc::clone(&panic));
        let (serial, letter_clock) = match resumed {
            None => (console::kernel_console(serial_irq, log), None),
            Some(Resumed { serial, devices, clock }) => {
                for (transport, registers) in transports.iter_mut().zip(&devices) {
                    transport.resume(registers).context("go on with a virtio device")?;
                }
                (console::resumed_console(serial_irq, log, &serial)?, Some(clock))
            }
        };
        let bus = Arc::new(Bus::new(serial, transports));

        // Each vCPU stops once.
        let (exit_sender, exits) = event_channel(plan.vcpus.into())?;
        let vm = Vm { fd: vm, vcpus, letter_clock, outputs, input, bus, exits: exit_sender };
        let served = Served {
            devices,
            control,
            device_events,
            exits,
            output_done,
            first_output,
            panic,
            late,
            backends,
            refusals,
            publisher: plan
                .instance
                .published
                .listeners
                .then(|| janitor.publisher())
                .transpose()?,
            switch,
            logs,
        };
        Ok((vm, served))
    }

    /// Starts the threads and confines each of them and this one; then starts the guest, whose exits are
    /// counted in `counts`. Must be called after [`Sandbox::enter`].
    ///
    /// # Errors
    /// The host refuses a thread or its filter, or KVM cannot run the guest.
    pub fn start(self, sandbox: &Sandbox, counts: &Arc<ExitCounts>) -> Result<Running> {
        let (ready, confined) = mpsc::channel();
        for stream in self.outputs {
            let name = stream.name.to_owned();
            sandbox.spawn(name, ThreadKind::Output, ready.clone(), || stream.copy())?;
        }
        if let Some(input) = self.input {
            sandbox.spawn("stdin".into(), ThreadKind::Input, ready.clone(), || input.copy())?;
        }
        let boots = self.letter_clock.is_none();
        let (result, tested) = mpsc::channel();
        let mut gates = Vec::new();
        for (index, vcpu) in self.vcpus.into_iter().enumerate() {
            let (gate, opened) = mpsc::channel();
            gates.push(gate);
            let start = match index {
                0 if boots => Start::Boot { result: result.clone() },
                _ => Start::Run,
            };
            let index = index as u8;
            let (bus, counts) = (Arc::clone(&self.bus), Arc::clone(counts));
            let exits = self.exits.clone();
            let work = move || vcpu::serve(index, vcpu, start, opened, bus, counts, exits);
            sandbox.spawn(format!("vcpu{index}"), ThreadKind::Vcpu, ready.clone(), work)?;
        }
        drop(ready);
        // Ends when every thread has sent its result.
        confined.iter().collect::<Result<()>>()?;
        sandbox.confine_main()?;
        self.letter_clock.map_or(Ok(()), |clock| clock.set())?;
        for (index, gate) in gates.iter().enumerate() {
            gate.send(()).ok().with_context(|| format!("vCPU {index} has ended"))?;
            if index == 0 && boots {
                self_test::wait(&tested)?;
            }
        }
        Ok(Running { _fd: self.fd, _bus: self.bus })
    }
}

/// Most activations and resets that wait for the main loop.
const DEVICE_EVENTS: usize = 16;

fn eventfd() -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("create an eventfd")
}

/// Connects the box to its passt. Called before back-ends start, which would inherit the descriptor that
/// mote was started with.
fn connect_network(
    network: &Network,
    filter: FrameFilter,
    janitor: &Janitor,
    stop: &File,
) -> Result<Net> {
    match &network.passt {
        PasstSocket::Path(path) => {
            let mut line = janitor.passt_line()?;
            let again = Reconnect { path: path.clone(), connect: Box::new(move || line.connect()) };
            Net::new(network.mac_address, passt::connect(path, stop)?, filter, Some(again))
        }
        PasstSocket::Inherited(fd) => {
            let socket = sys::socket::inherited_stream(*fd);
            let socket = socket.context("take over the network's socket")?;
            Net::new(network.mac_address, socket, filter, None)
        }
    }
}

fn spawn_backends(plan: &Plan) -> Result<(Vec<Virtiofsd>, Vec<UnixStream>)> {
    let (named, isolation) = (plan.virtiofsd.as_deref(), plan.sandbox.isolation);
    let started = Virtiofsd::start_all(named, &plan.shares, isolation, plan.memory_bytes)?;
    Ok(started.into_iter().unzip())
}

/// A VM that starts from a template, with what it goes on with, if there is one for it, and else with its kernel. It has
/// so many virtio devices, and so many of them are late.
fn ready_to_run(
    plan: &Plan,
    kvm: &Kvm,
    [devices, late]: [usize; 2],
    janitor: &Janitor,
    timeline: &mut Timeline,
) -> Result<(Machine, Option<Resumed>)> {
    let cpuids = kvm::cpuids(kvm, plan.vcpus)?;
    let instance =
        serde_json::to_vec(&plan.instance).context("encode the instance configuration")?;
    let empty = || Machine::new(kvm, plan.memory_bytes, plan.cold_text(), &cpuids);
    let mut machine = empty()?;
    timeline.mark("memory_ready");
    let more = devices.saturating_sub(template::device_count() + late);
    let why = match template::find(plan, kvm, &machine.vcpus[0], &cpuids[0], || {
        janitor.make_template()
    }) {
        Err(why) => why,
        Ok(found) => {
            let why = match found.restore(&machine, &instance, more) {
                Ok(resumed) if !plan.debug => {
                    timeline.template = Some("used".into());
                    timeline.mark("template_restored");
                    return Ok((machine, Some(resumed)));
                }
                Ok(_) => anyhow!(template::WHY_DEBUG_BOOTS),
                Err(why) => why,
            };
            // What has been written stays in neither VM nor RAM.
            machine = empty()?;
            why
        }
    };
    let why = format!("{why:#}");
    if plan.debug {
        log::info(&format!("no template is used: {why}"));
    }
    timeline.template = Some(why);
    let guest = boot::Guest {
        kernel: &plan.kernel,
        initramfs: &plan.initramfs,
        attests: plan.attestation.is_some(),
        instance: Some(&instance),
        vcpus: plan.vcpus,
        memory_bytes: plan.memory_bytes,
        devices,
        debug: plan.debug,
    };
    let entry = guest.load(&machine.ram)?;
    vcpu::prepare_boot(&machine.vcpus[0], &cpuids[0], &machine.ram, entry)?;
    timeline.mark("kernel_loaded");
    Ok((machine, None))
}

/// Makes a virtio-fs device per share. A virtiofsd that the user has named is waited for: if it has ended, the error quotes its
/// own message. mote's own gets ready while the guest boots.
fn connect_shares(
    plan: &Plan,
    backends: &mut [Virtiofsd],
    connections: Vec<UnixStream>,
    stop: &File,
    ram: &GuestRam,
) -> Result<Vec<Fs>> {
    if plan.virtiofsd.is_none() {
        let shares = plan.shares.iter().zip(backends);
        let connected = shares.zip(connections).map(|((share, backend), connection)| {
            let asked = backend.asked().map(EventFd::try_clone).transpose();
            let asked = asked.context("duplicate an eventfd")?;
            Fs::new(&share.tag, connection, ram, asked)
        });
        return connected.collect();
    }
    let pids: Vec<u32> = backends.iter().map(Virtiofsd::pid).collect();
    let shares = plan.shares.iter().zip(backends);
    virtiofsd::talk_in_time(connections, &pids, stop, |connections| {
        let connected = shares.zip(connections).map(|((share, backend), connection)| {
            let negotiated = Fs::negotiate(&share.tag, connection, ram);
            let device = negotiated.with_context(|| backend.describe_end())?;
            backend.has_answered();
            Ok(device)
        });
        connected.collect()
    })
}
