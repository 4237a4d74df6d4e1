//! [`Vm::build`]: the whole VM, read top to bottom. A failure anywhere drops what was made so far,
//! which removes sockets and ends back-ends.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use anyhow::{Context, Result};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use mote_agent::protocol::{CONTROL_PORT, STDERR_PORT, STDOUT_PORT};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Bus;
use crate::console::{self, FirstOutput, KernelLog, PanicMessage, Sinks};
use crate::memory::{self, GuestRam, RegisterPages};
use crate::network::{Network, PasstSocket};
use crate::plan::{HostSocket, Plan};
use crate::sockets::{self, SocketFile};
use crate::timeline::Timeline;
use crate::vcpu::{self, Exit, ExitCounts, ExitReporter};
use crate::virtio::fs::Fs;
use crate::virtio::mmio::MmioDevice;
use crate::virtio::net::Net;
use crate::virtio::vsock::mux::{Listener, Mux};
use crate::virtio::{DeviceEvent, VirtioDevice, net, rng, vsock};
use crate::virtiofsd::{self, Virtiofsd};
use crate::{boot, cpu, kvm, layout, passt, sys};

/// A VM that is ready to run, and what the main loop serves it with.
#[derive(Debug)]
pub struct Vm {
    /// Closing it would disconnect every interrupt, whatever the vCPUs still hold.
    _fd: VmFd,
    vcpus: Vec<VcpuFd>,
    bus: Arc<Bus>,
    reporter: ExitReporter,
    /// The vsock device.
    pub mux: Mux,
    /// The network device, if the box has a network of its own.
    pub net: Option<Net>,
    /// mote's end of the control channel.
    pub control: UnixStream,
    /// Activations and resets of the main loop's devices, and the event that announces them.
    pub device_events: (Receiver<DeviceEvent>, EventFd),
    /// Reasons why vCPUs stopped, and the event that announces them.
    pub exits: (Receiver<Exit>, EventFd),
    /// Written once per output stream that is complete.
    pub output_done: EventFd,
    /// When the first byte of output was written.
    pub first_output: FirstOutput,
    /// What a panicking kernel said.
    pub panic: PanicMessage,
    /// The virtio-fs back-ends.
    pub backends: Vec<Virtiofsd>,
    /// The box's sockets.
    pub socket_files: Vec<SocketFile>,
    /// Exits to user space so far.
    pub exit_counts: Arc<ExitCounts>,
}

impl Vm {
    /// Builds the VM that the plan describes.
    pub fn build(plan: &Plan, timeline: &mut Timeline) -> Result<Vm> {
        let kvm = kvm::open()?;

        // Host resources. The back-ends start while the kernel is being loaded.
        let sinks = Sinks::open(plan.console_output.as_deref())?;
        let (listeners, socket_files) = bind_sockets(plan)?;
        let net = plan.network.as_ref().map(connect_network).transpose()?;
        let (backends, connections) = spawn_backends(plan)?;
        timeline.mark("backends_spawned");

        // The machine: memory, interrupt controllers, the boot vCPU, and whether KVM can run it.
        let vm = kvm::create_vm(&kvm)?;
        let ram = memory::create_ram(plan.memory_bytes)?;
        let register_slot = memory::add_ram(&vm, &ram)?;
        timeline.mark("memory_ready");
        let supported = kvm::supported_cpuid(&kvm)?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let cpuid = |index| cpu::cpuid(&supported, index, plan.vcpus, tsc_deadline);
        let boot_cpuid = cpuid(0);
        let boot_vcpu = kvm::self_test(vcpu::create(&vm, 0, &boot_cpuid)?, &boot_cpuid, &ram)?;
        timeline.mark("kvm_tested");

        // The guest's first memory.
        let device_count = 2 + usize::from(net.is_some()) + plan.shares.len();
        let entry = boot::load(plan, &ram, device_count)?;
        timeline.mark("kernel_loaded");

        // Devices, in the order of their addresses.
        let (device_sender, device_receiver) = mpsc::sync_channel(DEVICE_EVENTS);
        let device_event = eventfd()?;
        let mut devices: Vec<Box<dyn VirtioDevice>> = vec![
            Box::new(vsock::device(device_sender.clone(), device_event.try_clone()?)),
            Box::new(rng::device(device_sender.clone(), device_event.try_clone()?)),
        ];
        if let Some(network) = &plan.network {
            let event = device_event.try_clone()?;
            devices.push(Box::new(net::device(network.mac_address, device_sender, event)));
        }
        let backends = connect_shares(plan, backends, connections, &ram, &mut devices)?;
        timeline.mark("backends_connected");
        let pages = RegisterPages::new(&vm, register_slot, device_count)?;
        let devices = devices
            .into_iter()
            .enumerate()
            .map(|(index, device)| {
                let id = device.id();
                MmioDevice::attach(device, index, pages.page(index), &vm, &ram)
                    .with_context(|| format!("attach virtio device {index} (type {id})"))
            })
            .collect::<Result<Vec<_>>>()?;
        let serial_irq = eventfd()?;
        vm.register_irqfd(&serial_irq, layout::SERIAL_IRQ).context("connect the serial port")?;
        let panic = PanicMessage::default();
        let serial =
            console::kernel_console(serial_irq, KernelLog::new(sinks.kernel, Arc::clone(&panic)));
        let bus = Arc::new(Bus::new(serial, devices));

        // The remaining vCPUs.
        vcpu::prepare_boot(&boot_vcpu, entry)?;
        let mut vcpus = vec![boot_vcpu];
        for index in 1..plan.vcpus {
            vcpus.push(vcpu::create(&vm, index, &cpuid(index))?);
        }

        // The agent's streams: each ends in a socket pair, one end for the mux.
        let output_done = eventfd()?;
        let first_output = FirstOutput::default();
        let mut offers = HashMap::new();
        for (name, port, sink) in
            [("stdout", STDOUT_PORT, sinks.stdout), ("stderr", STDERR_PORT, sinks.stderr)]
        {
            let (ours, theirs) = UnixStream::pair().context("create a socket pair")?;
            offers.insert(port, theirs);
            let first_output = Arc::clone(&first_output);
            console::spawn_writer(name, ours, sink, first_output, output_done.try_clone()?)?;
        }
        let (control, theirs) = UnixStream::pair().context("create a socket pair")?;
        control.set_nonblocking(true).context("prepare the control channel")?;
        offers.insert(CONTROL_PORT, theirs);

        let (exit_sender, exit_receiver) = mpsc::channel();
        let exit_event = eventfd()?;
        Ok(Vm {
            _fd: vm,
            vcpus,
            bus,
            reporter: ExitReporter { sender: exit_sender, event: exit_event.try_clone()? },
            mux: Mux::new(offers, listeners, plan.outgoing.clone()),
            net,
            control,
            device_events: (device_receiver, device_event),
            exits: (exit_receiver, exit_event),
            output_done,
            first_output,
            panic,
            backends,
            socket_files,
            exit_counts: Arc::default(),
        })
    }

    /// Starts the vCPUs.
    pub fn start(&mut self) -> Result<()> {
        for (index, vcpu) in self.vcpus.drain(..).enumerate() {
            let counts = Arc::clone(&self.exit_counts);
            let reporter = self.reporter.try_clone().context("duplicate an eventfd")?;
            vcpu::spawn(index as u8, vcpu, Arc::clone(&self.bus), counts, reporter)?;
        }
        Ok(())
    }
}

/// Most activations and resets that wait for the main loop.
const DEVICE_EVENTS: usize = 16;

fn eventfd() -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("create an eventfd")
}

fn bind_sockets(plan: &Plan) -> Result<(Vec<Listener>, Vec<SocketFile>)> {
    let mut listeners = Vec::new();
    let mut files = Vec::new();
    for planned in &plan.sockets {
        let (socket, file) = sockets::listen(planned)?;
        let HostSocket { guest_port, fallback_port, .. } = *planned;
        listeners.push(Listener::Unix { socket, guest_port, fallback_port });
        files.push(file);
    }
    for (index, port) in plan.published_ports.iter().enumerate() {
        let sockets = sockets::publish(port).with_context(|| format!("port_map[{index}]"))?;
        let guest_port = port.guest;
        listeners
            .extend(sockets.into_iter().map(|socket| Listener::Published { socket, guest_port }));
    }
    Ok((listeners, files))
}

/// Connects the box to its passt, before there are programs that would inherit its descriptors.
fn connect_network(network: &Network) -> Result<Net> {
    for fd in &network.inherited {
        sys::close_on_exec(*fd).with_context(|| format!("keep descriptor {fd} of the network"))?;
    }
    match &network.passt {
        PasstSocket::Path(path) => Net::new(passt::connect(path)?, Some(path.clone())),
        PasstSocket::Inherited(fd) => {
            let socket = sys::inherited_stream(*fd);
            Net::new(socket.context("take over the network's socket")?, None)
        }
    }
}

fn spawn_backends(plan: &Plan) -> Result<(Vec<Virtiofsd>, Vec<UnixStream>)> {
    let mut backends = Vec::new();
    let mut connections = Vec::new();
    for share in &plan.shares {
        let (backend, connection) = Virtiofsd::spawn(&plan.virtiofsd, share, &plan.temp_dir)?;
        backends.push(backend);
        connections.push(connection);
    }
    Ok((backends, connections))
}

/// Adds a virtio-fs device per share. A back-end that is gone is quoted: its own words say why.
fn connect_shares(
    plan: &Plan,
    mut backends: Vec<Virtiofsd>,
    connections: Vec<UnixStream>,
    ram: &GuestRam,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
) -> Result<Vec<Virtiofsd>> {
    let shares = plan.shares.iter().zip(&mut backends);
    virtiofsd::talk_in_time(connections, |connections| {
        for ((share, backend), connection) in shares.zip(connections) {
            let device =
                Fs::connect(&share.tag, connection, ram).with_context(|| backend.obituary())?;
            devices.push(Box::new(device));
        }
        Ok(())
    })?;
    Ok(backends)
}
