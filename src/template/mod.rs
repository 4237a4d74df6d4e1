//! Starting a box from the state of a VM that has booted, instead of booting one.
//!
//! ```text
//! first start of a shape     boots cold ─▶ box            maker ─ boots, no box ─▶ the door ─▶ file in the cache
//! later ones                 file ─▶ memory, vCPUs, devices ─▶ the mailbox ─▶ box
//! ```
//!
//! The state is that of a guest whose kernel and agent are up and know nothing of any box (`guest/src/template.rs`): it
//! is made by a VM of its own ([`maker`]), never by one that has had a box. What a box is comes in a letter
//! ([`mote_agent::mailbox`]), and with fresh randomness.
//!
//! A template is used only by the same mote on the same host for a VM of the same shape ([`Key`]). Whatever does not
//! fit, or fails before the guest runs, is a cold boot, and the timeline says why. The files ([`cache`]) are as much to be trusted as
//! mote's own: they decide the guest's kernel. What can happen to them by accident is found out ([`mod@file`]).

pub mod cache;
pub mod file;
pub mod key;
pub mod maker;
pub mod memory;
pub mod shape;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd};
use mote_agent::instance::ROOT_TAG;
use mote_agent::mailbox::{DOOR, Letter, PART_START, REALTIME_AT, SEED_LEN};
use vm_memory::{Bytes, GuestAddress};
use vm_superio::SerialState;

use crate::kvm::Machine;
use crate::memory::GuestRam;
use crate::plan::{Plan, Templates};
use crate::sys;
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::devices::Devices;
use crate::virtio::fs;
use crate::virtio::main_loop::Properties;
use crate::virtio::mmio::{MmioDevice, Registers};
use cache::Cache;
pub use file::Template;
pub use key::Key;
pub use shape::Shape;

/// How many places for devices a VM has that starts from a template: the door is the last.
pub const PAGES: usize = DOOR + 1;

/// The devices that are in every template, with drivers that have started them, in the order of their addresses. Those that
/// only some boxes have come behind them, and are started when the box is known.
fn devices() -> Vec<Unserved> {
    let mut devices: Vec<_> = Devices::of_every_box().into();
    devices.push(fs::properties(ROOT_TAG));
    devices.into_iter().map(Unserved).collect()
}

/// How many those are.
pub fn device_count() -> usize {
    devices().len()
}

/// A device that takes nothing from its queues: what is in them is there for the VM that goes on.
#[derive(Debug)]
struct Unserved(Properties);

impl VirtioDevice for Unserved {
    fn id(&self) -> u32 {
        self.0.id
    }

    fn features(&self) -> u64 {
        self.0.features
    }

    fn queue_sizes(&self) -> &[u16] {
        self.0.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.0.config
    }

    fn activate(&mut self, _activation: Activation) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}
}

/// What a VM goes on with that is not KVM's.
#[derive(Debug)]
pub struct Resumed {
    /// The serial port.
    pub serial: SerialState,
    /// The registers of the devices that are in every template.
    pub devices: Vec<Registers>,
    /// Without the time yet.
    pub clock: LetterClock,
}

/// Where the letter's wall clock is in the guest's memory.
#[derive(Debug)]
pub struct LetterClock {
    ram: GuestRam,
    at: GuestAddress,
}

impl LetterClock {
    /// Writes the time there. What is done before the guest runs takes longer than the guest, which would be slow by that.
    ///
    /// # Errors
    /// It is not in RAM.
    pub fn set(&self) -> Result<()> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let realtime_ns = since_1970.as_nanos() as u64;
        self.ram.write_slice(&realtime_ns.to_le_bytes(), self.at).context("write the time")
    }
}

/// A template for a box, and where it is from.
#[derive(Debug)]
pub struct Found {
    template: Template,
    cache: Cache,
    key: Vec<u8>,
}

/// Says whether a start of this box would use a template.
pub fn describe(plan: &Plan) -> String {
    let directory = match &plan.templates {
        Templates::Off(why) => return format!("none: {why}"),
        Templates::In(directory) => directory,
    };
    if plan.debug {
        return format!("none: {WHY_DEBUG_BOOTS}");
    }
    let shape = Shape::of(plan);
    let looked = maker::key_of(&shape).and_then(|key| look(directory, &key, shape.memory_bytes));
    let directory = directory.display();
    match looked {
        Ok(Some((template, _))) => format!("in {directory}, {} KiB", template.file_len() >> 10),
        Ok(None) => format!("none in {directory} yet: the first start makes it"),
        Err(why) => format!("none: {why:#}"),
    }
}

/// Why a box boots, although its template could be used, if its kernel is to print all its messages.
pub const WHY_DEBUG_BOOTS: &str = "MOTE_DEBUG has the kernel print all its messages";

/// Looks for a template in this directory; `None` if there is none yet, and it can be made.
fn look(directory: &Path, key: &[u8], memory_bytes: u64) -> Result<Option<(Template, Cache)>> {
    if let Some(cache) = Cache::open(directory)?
        && let Some(template) = cache.find(key, memory_bytes)?
    {
        return Ok(Some((template, cache)));
    }
    cache::takes_templates(directory)?;
    Ok(None)
}

/// Looks for this box's template, whose VM has this vCPU as its first. If there is none that could be made, calls `make`.
///
/// # Errors
/// Why there is none to be used.
pub fn find(
    plan: &Plan,
    kvm: &Kvm,
    vcpu: &VcpuFd,
    cpuid: &CpuId,
    make: impl FnOnce() -> Result<()>,
) -> Result<Found> {
    let directory = match &plan.templates {
        Templates::Off(why) => bail!("{why}"),
        Templates::In(directory) => directory,
    };
    let shape = Shape::of(plan);
    let key = Key::new(&shape, kvm, vcpu, cpuid)?.encode()?;
    let Some((template, cache)) = look(directory, &key, shape.memory_bytes)? else {
        make().context("there is none")?;
        bail!("there is none; it is being made")
    };
    Ok(Found { template, cache, key })
}

impl Found {
    /// Puts a VM into the template's state, with this configuration for its agent, as JSON, and `more` devices behind
    /// those of the template.
    ///
    /// # Errors
    /// Something does not fit: the VM and its RAM are of no use then.
    pub fn restore(&self, to: &Machine, instance: &[u8], more: usize) -> Result<Resumed> {
        let restored = self.template.restore(to, instance, more);
        match restored {
            Err(_) => self.cache.failed(&self.key),
            Ok(_) if !self.template.is_checked() => self.cache.checked(&self.key, &self.template),
            Ok(_) => {}
        }
        restored.context("start from the template")
    }
}

impl Template {
    fn restore(&self, to: &Machine, instance: &[u8], more: usize) -> Result<Resumed> {
        let Machine { vm, vcpus, ram, .. } = to;
        let devices = devices();
        ensure!(self.head.devices.len() == devices.len(), "it has other devices");
        self.fill(ram)?;
        for (device, registers) in devices.iter().zip(&self.head.devices) {
            MmioDevice::check(device, registers, ram)
                .with_context(|| format!("virtio device {}", device.id()))?;
        }
        let clock = self.deliver(ram, instance.to_vec(), (devices.len() as u16, more as u16))?;
        self.head.machine.write(vm, vcpus)?;
        let (serial, devices) = (self.head.serial.clone().into(), self.head.devices.clone());
        Ok(Resumed { serial, devices, clock })
    }

    fn deliver(
        &self,
        ram: &GuestRam,
        instance: Vec<u8>,
        devices: (u16, u16),
    ) -> Result<LetterClock> {
        let mut seed = [0; SEED_LEN];
        sys::fill_random(&mut seed).context("get randomness for the guest")?;
        let letter = Letter { realtime_ns: 0, seed, devices, instance };
        let parts =
            letter.parts().context("the box's configuration is too long for its mailbox")?;
        for (part, page) in parts.iter().zip(&self.head.mailbox) {
            ram.write_slice(part, GuestAddress(page + PART_START as u64))
                .context("write into the mailbox")?;
        }
        let first = self.head.mailbox.first().context("it has no mailbox")?;
        Ok(LetterClock { ram: ram.clone(), at: GuestAddress(first + REALTIME_AT as u64) })
    }
}
