//! Making a template: a VM that has no box boots to the door, and what it is then goes into a file.
//!
//! ```text
//! mote, after a miss ─▶ janitor ─▶ maker (mote's own file, executed again, lowest priority) ── names the file
//!                          └─ child, confined: boots the VM, writes its state to the open file
//! ```
//!
//! `mote template` does the same in the foreground.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use mote_agent::mailbox::DOOR;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_MAGIC_VALUE;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::cache::Cache;
use super::file::{Head, Template};
use super::key::Key;
use super::shape::Shape;
use super::{PAGES, devices, memory as pages};
use crate::boot;
use crate::bus::{Bus, Effect};
use crate::confine::{Isolation, NetworkAccess, Sandbox, ThreadKind};
use crate::console::{self, KernelLog, PanicMessage, Sink};
use crate::kvm::state::MachineState;
use crate::kvm::{self, Machine, self_test, vcpu};
use crate::layout;
use crate::memory::{ColdText, GuestRam, RegisterPages};
use crate::plan::{self, Image};
use crate::sys::{self, Interest};
use crate::virtio::mmio::MmioDevice;

/// The name under which mote is a maker.
pub const NAME: &str = "mote-template";

/// How long the VM may take to the door: it runs only when no CPU has anything else to do.
const LIMIT: Duration = Duration::from_secs(900);
/// How often a vCPU that is to stop is told so: it may just be about to run.
const KICK_STEP: Duration = Duration::from_millis(1);
/// Descriptors that the confined child may have.
const OPEN_FILES: u64 = 1024;

/// A template that is there.
#[derive(Debug)]
pub struct Made {
    /// Its file.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
}

/// Starts a maker for this shape that nobody waits for. Must be called while there is one thread.
///
/// # Errors
/// The host permits no more processes.
pub fn start(shape: &Shape, directory: &Path) -> io::Result<()> {
    let arguments = arguments(shape, directory);
    sys::process::start_detached(c"mote-template", &[], || {
        // An error is nobody's to read. The next start finds no template, and tries again.
        drop(Command::new("/proc/self/exe").arg0(NAME).args(&arguments).env_clear().exec());
    })?;
    Ok(())
}

fn arguments(shape: &Shape, directory: &Path) -> Vec<OsString> {
    let attests = if shape.attests { "attests" } else { "" };
    vec![
        directory.into(),
        shape.vcpus.to_string().into(),
        shape.memory_bytes.to_string().into(),
        attests.into(),
    ]
}

fn parse(arguments: &[OsString]) -> Option<(Shape, PathBuf)> {
    let [directory, vcpus, memory_bytes, attests] = arguments else { return None };
    let shape = Shape {
        vcpus: vcpus.to_str()?.parse().ok()?,
        memory_bytes: memory_bytes.to_str()?.parse().ok()?,
        attests: !attests.is_empty(),
    };
    Some((shape, directory.into()))
}

/// Makes the template that the arguments behind the name tell of, in the background, and returns the exit code.
pub fn main(arguments: impl Iterator<Item = OsString>) -> u8 {
    let arguments: Vec<_> = arguments.collect();
    let Some((shape, directory)) = parse(&arguments) else {
        eprintln!("mote starts this itself, to make a template, under the name {NAME}");
        return 1;
    };
    sys::process::name(c"mote-template");
    sys::process::yield_to_others();
    // What it says, `mote template` says again: nobody reads it here.
    match make(&shape, &directory) {
        Ok(_) => 0,
        Err(_) => 1,
    }
}

/// Makes the template for this shape, unless it is there, or another process is making it: then there is none to tell of. Must be called
/// while there is one thread.
///
/// # Errors
/// The VM does not get to the door, or the template cannot be written.
pub fn make(shape: &Shape, directory: &Path) -> Result<Option<Made>> {
    let cache = Cache::create(directory)?;
    let key = key_of(shape)?;
    if let Some((path, bytes)) = cache.whole(&key, shape.memory_bytes) {
        return Ok(Some(Made { path, bytes }));
    }
    let made = make_with_key(shape, &cache, &key);
    if made.is_err() {
        cache.failed(&key);
    }
    made
}

fn make_with_key(shape: &Shape, cache: &Cache, key: &[u8]) -> Result<Option<Made>> {
    let Some(begun) = cache.begin(key)? else { return Ok(None) };
    let written = write_in_child(shape, key, begun.file());
    let bytes = begun.file().metadata().map_or(0, |metadata| metadata.len());
    match written {
        Ok(()) => Ok(Some(Made { path: begun.publish()?, bytes })),
        Err(error) => {
            begun.abandon();
            Err(error)
        }
    }
}

/// The key of this shape's template on this host.
///
/// # Errors
/// KVM refuses something.
pub fn key_of(shape: &Shape) -> Result<Vec<u8>> {
    let kvm = kvm::open()?;
    let vm = kvm::create_vm(&kvm)?;
    let cpuids = kvm::cpuids(&kvm, shape.vcpus)?;
    let cpuid = cpuids.first().context("a VM needs a vCPU")?;
    let vcpu = vcpu::create(&vm, 0, cpuid)?;
    Key::new(shape, &kvm, &vcpu, cpuid)?.encode()
}

/// Has a child, which confines itself, write the template to the file.
fn write_in_child(shape: &Shape, key: &[u8], file: &File) -> Result<()> {
    let (mut says, to_say) = io::pipe().context("make a pipe")?;
    let keep = [file.as_raw_fd(), to_say.as_raw_fd()];
    let pid = sys::process::start_detached(c"mote-template", &keep, || {
        // What it has locked is to be free again when the maker is killed.
        let written = sys::process::end_with_parent().map_err(Into::into);
        let text = match written.and_then(|()| write(shape, key, file)) {
            Ok(()) => DONE.to_owned(),
            Err(error) => format!("{error:#}"),
        };
        // If nobody reads it, the maker has ended.
        let _ = (&to_say).write_all(text.as_bytes());
    })
    .context("start a process for the VM")?;
    drop(to_say);
    let child = sys::process::process_file(pid).context("watch the VM's process")?;
    let ended = sys::poll([Interest::read(&child)], Some(LIMIT));
    sys::process::kill_process(&child);
    sys::process::wait(pid).context("wait for the VM's process")?;
    let [in_time] = ended.context("watch the VM's process")?;
    ensure!(in_time, "the VM did not get to the door within {} s", LIMIT.as_secs());
    let mut said = String::new();
    says.read_to_string(&mut said).context("hear from the VM's process")?;
    match said.as_str() {
        DONE => Ok(()),
        "" => bail!("the VM's process was killed"),
        why => Err(anyhow!("{why}")),
    }
}

/// What the child says when the file is complete.
const DONE: &str = "done";

/// Boots a VM of this shape, confined, and writes it to the file when it is at the door.
fn write(shape: &Shape, key: &[u8], file: &File) -> Result<()> {
    let vm = TemplateVm::build(shape)?;
    let isolation = Isolation::of_host(NetworkAccess::NONE);
    let sandbox = Sandbox { isolation, network: NetworkAccess::NONE, open_files: OPEN_FILES };
    sandbox.enter(&[])?;
    let (vm, vcpus) = vm.run(sandbox)?;
    let machine = MachineState::read(&vm.kvm, &vm.fd, &vcpus, &vm.cpuid)?;
    let kept = pages::look_through(&vm.ram, plan::cold_text())?;
    let (serial, registers) = vm.bus.registers();
    let head = Head::new(key.to_vec(), machine, serial, registers, &kept);
    Template::write(&head, &kept.words, &vm.ram, file)
}

/// A VM that is to become a template.
struct TemplateVm {
    kvm: Kvm,
    fd: VmFd,
    ram: GuestRam,
    /// Of the first vCPU.
    cpuid: CpuId,
    vcpus: Vec<VcpuFd>,
    bus: Arc<Bus>,
    panic: PanicMessage,
}

/// The same, with its vCPUs on threads.
struct Stopped {
    kvm: Kvm,
    fd: VmFd,
    ram: GuestRam,
    cpuid: CpuId,
    bus: Arc<Bus>,
}

impl TemplateVm {
    fn build(shape: &Shape) -> Result<TemplateVm> {
        let kvm = kvm::open()?;
        let cpuids = kvm::cpuids(&kvm, shape.vcpus)?;
        let machine = Machine::new(
            &kvm,
            shape.memory_bytes,
            Some(ColdText::Shared(plan::cold_text())),
            &cpuids,
        )?;
        let Machine { vm: fd, ram, free_slot, vcpus } = machine;
        let (Some(first), Some(cpuid)) = (vcpus.first(), cpuids.into_iter().next()) else {
            bail!("a VM needs a vCPU");
        };
        let guest = boot::Guest {
            kernel: &Image::kernel(),
            initramfs: &Image::initramfs(),
            attests: shape.attests,
            instance: None,
            vcpus: shape.vcpus,
            memory_bytes: shape.memory_bytes,
            devices: PAGES,
            debug: false,
        };
        let entry = guest.load(&ram)?;
        vcpu::prepare_boot(first, &cpuid, &ram, entry)?;
        // Not for the door and the other places: reading there is an exit.
        let devices = devices();
        let register_pages = RegisterPages::new(&fd, free_slot, devices.len())?;
        let devices = devices.into_iter().enumerate().map(|(index, device)| {
            let page = register_pages.page(index);
            MmioDevice::attach(Box::new(device), index, page, &fd, &ram)
        });
        let devices = devices.collect::<Result<Vec<_>>>().context("attach the virtio devices")?;
        let irq =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("make an eventfd")?;
        fd.register_irqfd(&irq, layout::SERIAL_IRQ).context("connect the serial port")?;
        let panic = PanicMessage::default();
        let log = KernelLog::new(Sink::nowhere()?, Arc::clone(&panic));
        let bus = Arc::new(Bus::new(console::kernel_console(irq, log), devices));
        Ok(TemplateVm { kvm, fd, ram, cpuid, vcpus, bus, panic })
    }

    /// Runs the VM until it is at the door, with all vCPUs standing still.
    fn run(self, sandbox: Sandbox) -> Result<(Stopped, Vec<VcpuFd>)> {
        let TemplateVm { kvm, fd, ram, cpuid, vcpus, bus, panic } = self;
        register_signal_handler(SIGRTMIN(), do_nothing).context("handle a signal")?;
        let progress = Arc::new(Progress::default());
        let threads = vcpus.into_iter().enumerate().map(|(index, vcpu)| {
            let (bus, progress) = (Arc::clone(&bus), Arc::clone(&progress));
            let name = format!("vcpu{index}");
            let thread = thread::Builder::new().name(name.clone());
            thread
                .spawn(move || {
                    sandbox.confine(&name, ThreadKind::Maker)?;
                    serve(index == 0, vcpu, &bus, &progress)
                })
                .context("start a vCPU's thread")
        });
        let threads = threads.collect::<Result<Vec<_>>>()?;
        sandbox.confine("main", ThreadKind::Maker)?;
        let vcpus =
            threads.into_iter().map(|thread| join(thread, &progress)).collect::<Result<_>>();
        let vcpus = vcpus.map_err(|error| {
            let panic = panic.lock().unwrap_or_else(PoisonError::into_inner).take();
            panic.map_or(error, |panic| anyhow!("the guest kernel panicked: {panic}"))
        })?;
        Ok((Stopped { kvm, fd, ram, cpuid, bus }, vcpus))
    }
}

extern "C" fn do_nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Waits for a vCPU, which is interrupted once all are to stop.
fn join(thread: JoinHandle<Result<VcpuFd>>, progress: &Progress) -> Result<VcpuFd> {
    while !thread.is_finished() {
        if progress.stop.load(Ordering::Acquire) {
            thread.kill(SIGRTMIN()).context("interrupt a vCPU")?;
        }
        thread::sleep(KICK_STEP);
    }
    thread.join().map_err(|_| anyhow!("a vCPU's thread has panicked"))?
}

/// How far the VM is, for all its vCPUs: each may run the agent.
#[derive(Debug, Default)]
struct Progress {
    /// How often the driver has looked at the door.
    looks_at_door: AtomicU32,
    /// Whether all are to stop.
    stop: AtomicBool,
}

/// Runs a vCPU until the VM is at the door. The first tests KVM and enters the kernel; the one at the door has all others
/// stop.
fn serve(is_first: bool, mut vcpu: VcpuFd, bus: &Bus, progress: &Progress) -> Result<VcpuFd> {
    let served = (|| {
        if is_first {
            self_test::run(&mut vcpu)?;
        }
        run(&mut vcpu, bus, progress)?;
        settle(&mut vcpu)
    })();
    // An error stops the others, too.
    progress.stop.store(true, Ordering::Release);
    served.map(|()| vcpu)
}

fn run(vcpu: &mut VcpuFd, bus: &Bus, progress: &Progress) -> Result<()> {
    while !progress.stop.load(Ordering::Acquire) {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                ensure!(bus.port_write(port, data) == Effect::None, "the guest has ended");
            }
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.mmio_read(address, data);
                let looks = &progress.looks_at_door;
                // The first time is the driver's at boot, the second the agent's.
                if address == layout::device_page(DOOR) + u64::from(VIRTIO_MMIO_MAGIC_VALUE)
                    && looks.fetch_add(1, Ordering::AcqRel) == 1
                {
                    return Ok(());
                }
            }
            Ok(VcpuExit::Intr) => {}
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Ok(exit) => bail!("KVM stopped a vCPU with {exit:?}"),
            Err(error) => return Err(error).context("run a vCPU"),
        }
    }
    Ok(())
}

/// Ends what the vCPU's last exit has begun (Documentation/virt/kvm/api.rst, 5, `immediate_exit`).
fn settle(vcpu: &mut VcpuFd) -> Result<()> {
    vcpu.set_kvm_immediate_exit(1);
    let settled = match vcpu.run() {
        Ok(VcpuExit::Intr) => Ok(()),
        Err(error) if error.errno() == libc::EINTR => Ok(()),
        Ok(exit) => Err(anyhow!("KVM stopped a vCPU with {exit:?} at the door")),
        Err(error) => Err(error).context("settle a vCPU"),
    };
    vcpu.set_kvm_immediate_exit(0);
    settled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_comes_through_its_arguments() {
        for attests in [false, true] {
            let shape = Shape { vcpus: 3, memory_bytes: 300 << 20, attests };
            let words = arguments(&shape, Path::new("/srv/a b"));
            assert_eq!(parse(&words), Some((shape, "/srv/a b".into())));
            assert_eq!(parse(&words[1..]), None);
        }
    }
}
