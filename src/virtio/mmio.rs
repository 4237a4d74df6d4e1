//! The virtio-mmio transport (virtio 1.2, 4.2): one device's register file.
//!
//! Reads never come here. The guest reads the device's register page directly (a read-only memory
//! slot), so this side keeps the page up to date on every write that changes what a read returns.
//! Writes arrive as exits, except for the two that happen at run time, of a device that is busy: QueueNotify is an ioeventfd
//! per queue, and InterruptACK of "used buffer" is an ioeventfd that nobody reads. InterruptStatus always
//! says "used buffer": the driver looks at its rings on every interrupt. Devices whose back-end raises
//! the interrupt need that, and for the others it does no harm.
//!
//! "Configuration changed" is rare, and its acknowledgement is an exit, which clears the bit. No change
//! is lost, because the driver acknowledges before it reads the configuration: it reads every change
//! that was announced before.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};
use kvm_ioctls::{IoEventAddress, VmFd};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::*;
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::device::{
    Activation, CONFIG_CHANGED, ConfigSpace, F_VERSION_1, ReadyQueue, VirtioDevice,
};
use crate::layout;
use crate::log::LogOnce;
use crate::memory::{GuestRam, RegisterPage};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"mote");
/// What says that a page is one of virtio-mmio's.
const ID_REGISTERS: [(u32, u32); 3] = [
    (VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
    (VIRTIO_MMIO_VERSION, VERSION),
    (VIRTIO_MMIO_VENDOR_ID, VENDOR),
];
/// DeviceID of a page behind which there is nothing (4.2.2): its driver goes on at once, without an error.
const PLACEHOLDER: u32 = 0;
/// SHMLen of a region that does not exist (4.2.2).
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// One device behind its registers.
#[derive(Debug)]
pub struct MmioDevice {
    device: Box<dyn VirtioDevice>,
    page: RegisterPage,
    ram: GuestRam,
    interrupt: EventFd,
    kicks: Vec<EventFd>,
    /// Descriptors that activation closes to have room for as many of its own: by then connections may
    /// have taken all others, and a driver whose device does not start waits for ever.
    spare: Vec<EventFd>,
    state: State,
    /// For failed activations.
    complaint: LogOnce,
}

/// A device's registers as its driver has left them, to go on from in another VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

/// A queue's part of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

/// A device that is there from the start, but for its DeviceID: the driver finds a placeholder (4.2.2), which costs a
/// start next to nothing. When the device is wanted, [`appear`](Self::appear) shows the true number, and
/// then the guest is asked to look again ([`FromHost::DeviceIsThere`]). Only that one register changes, once; a driver
/// that does not care for it has the same device all the time.
///
/// [`FromHost::DeviceIsThere`]: mote_agent::protocol::FromHost::DeviceIsThere
#[derive(Debug)]
pub struct LateDevice {
    /// Its register page's position, which is its number for the guest, too.
    pub index: u8,
    id: u32,
    page: RegisterPage,
}

impl LateDevice {
    /// Shows the driver which device it is.
    pub fn appear(&self) {
        self.page.set(VIRTIO_MMIO_DEVICE_ID.into(), self.id);
    }
}

/// What the driver has negotiated so far; a reset clears it.
#[derive(Debug)]
struct State {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: usize,
    queues: Vec<Queue>,
}

impl State {
    fn new(queue_sizes: &[u16]) -> Result<Self> {
        let queues = queue_sizes.iter().map(|size| Queue::new(*size));
        Ok(State {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: queues.collect::<Result<_, _>>().context("create the queues")?,
        })
    }
}

impl State {
    fn from(queue_sizes: &[u16], registers: &Registers) -> Result<Self> {
        ensure!(registers.queues.len() == queue_sizes.len(), "there are other queues");
        let queues = queue_sizes.iter().zip(&registers.queues).map(|(max_size, saved)| {
            let QueueRegisters { size, ready, desc_table, avail_ring, used_ring } = *saved;
            Queue::try_from(QueueState {
                max_size: *max_size,
                next_avail: 0,
                next_used: 0,
                event_idx_enabled: false,
                size,
                ready,
                desc_table,
                avail_ring,
                used_ring,
            })
        });
        let queues = queues.collect::<Result<_, _>>().context("set up the queues as they were")?;
        let Registers { status, device_features_sel, driver_features_sel, driver_features, .. } =
            *registers;
        let queue_sel = registers.queue_sel as usize;
        Ok(State {
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        })
    }
}

impl MmioDevice {
    /// Puts a device behind the `index`-th register page and connects its interrupt and
    /// notifications to the VM.
    ///
    /// # Errors
    /// The host has no descriptor, or KVM refuses one.
    pub fn attach(
        device: Box<dyn VirtioDevice>,
        index: usize,
        page: RegisterPage,
        vm: &VmFd,
        ram: &GuestRam,
    ) -> Result<Self> {
        let mmio = Self::new(device, page, ram)?;
        vm.register_irqfd(&mmio.interrupt, layout::device_irq(index))
            .context("connect the interrupt")?;
        if !mmio.device.is_busy() {
            return Ok(mmio);
        }
        let base = layout::device_page(index);
        let register = |offset: u32| IoEventAddress::Mmio(base + u64::from(offset));
        for (queue, kick) in mmio.kicks.iter().enumerate() {
            vm.register_ioevent(kick, &register(VIRTIO_MMIO_QUEUE_NOTIFY), queue as u32)
                .context("connect a queue's notification")?;
        }
        let ignored = EventFd::new(libc::EFD_NONBLOCK).context("create an eventfd")?;
        vm.register_ioevent(&ignored, &register(VIRTIO_MMIO_INTERRUPT_ACK), VIRTIO_MMIO_INT_VRING)
            .context("connect the interrupt acknowledgement")?;
        Ok(mmio)
    }

    pub(crate) fn new(
        mut device: Box<dyn VirtioDevice>,
        page: RegisterPage,
        ram: &GuestRam,
    ) -> Result<Self> {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).context("create an eventfd");
        let kicks = (0..device.queue_sizes().len())
            .map(|queue| device.take_kick(queue).map_or_else(eventfd, Ok))
            .collect::<Result<_>>()?;
        let state = State::new(device.queue_sizes())?;
        let set = |register: u32, value| page.set(register.into(), value);
        ID_REGISTERS.into_iter().for_each(|(register, value)| set(register, value));
        set(VIRTIO_MMIO_DEVICE_ID, if device.is_late() { PLACEHOLDER } else { device.id() });
        set(VIRTIO_MMIO_SHM_LEN_LOW, NO_SHARED_MEMORY);
        set(VIRTIO_MMIO_SHM_LEN_HIGH, NO_SHARED_MEMORY);
        set(VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_INT_VRING);
        page.set_bytes(VIRTIO_MMIO_CONFIG.into(), device.config());
        let mut mmio = MmioDevice {
            device,
            page,
            ram: ram.clone(),
            interrupt: eventfd()?,
            kicks,
            spare: Vec::new(),
            state,
            complaint: LogOnce::default(),
        };
        mmio.keep_spare().context("keep files for the device's start (see ulimit -n)")?;
        mmio.show_state();
        Ok(mmio)
    }

    /// The registers. What the device itself does with its queues is not in them: they are to go on from only while it
    /// has taken nothing from any.
    pub fn registers(&self) -> Registers {
        let State { status, device_features_sel, driver_features_sel, driver_features, .. } =
            self.state;
        let queues = self.state.queues.iter().map(|queue| QueueRegisters {
            size: queue.size(),
            ready: queue.ready(),
            desc_table: queue.desc_table(),
            avail_ring: queue.avail_ring(),
            used_ring: queue.used_ring(),
        });
        Registers {
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel: self.state.queue_sel as u32,
            queues: queues.collect(),
        }
    }

    /// Whether a driver that has left a device like this with these registers can go on.
    ///
    /// # Errors
    /// It has agreed to something that the device does not offer, or has not started it, or its queues are not in this
    /// RAM.
    pub fn check(device: &dyn VirtioDevice, registers: &Registers, ram: &GuestRam) -> Result<()> {
        let unknown = registers.driver_features & !device.features();
        ensure!(
            unknown == 0,
            "the driver has agreed to features that are not offered: {unknown:#x}"
        );
        ensure!(registers.status & DRIVER_OK != 0, "the driver has not started the device");
        ensure!(registers.status & NEEDS_RESET == 0, "the device needs a reset");
        let valid = State::from(device.queue_sizes(), registers)?;
        ensure!(valid.queues.iter().all(|queue| queue.is_valid(ram)), "a queue is not valid");
        Ok(())
    }

    /// Goes on from these registers: the device takes its queues over, and is told of those that have buffers.
    ///
    /// # Errors
    /// As for [`MmioDevice::check`], or the device cannot start.
    pub fn resume(&mut self, registers: &Registers) -> Result<()> {
        Self::check(&*self.device, registers, &self.ram)?;
        self.state = State::from(self.device.queue_sizes(), registers)?;
        self.show_state();
        self.activate()?;
        for (queue, kick) in self.state.queues.iter().zip(&self.kicks) {
            let made_available = queue.avail_idx(&self.ram, Ordering::Acquire);
            if made_available.context("look at a queue")?.0 != 0 {
                kick.write(1).context("have the device look at a queue")?;
            }
        }
        Ok(())
    }

    /// What shows the driver the device behind the `index`-th register page, if it does not see it yet.
    pub fn late(&self, index: usize) -> Option<LateDevice> {
        let (id, page) = (self.device.id(), self.page.clone());
        self.device.is_late().then_some(LateDevice { index: index as u8, id, page })
    }

    /// Opens as many descriptors as activation needs: for each queue a notification and an interrupt,
    /// and two more interrupts.
    fn keep_spare(&mut self) -> Result<()> {
        let spare = (0..2 * self.kicks.len() + 2).map(|_| self.interrupt.try_clone());
        self.spare = spare.collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Updates every register that depends on the state.
    fn show_state(&self) {
        let state = &self.state;
        let set = |register: u32, value| self.page.set(register.into(), value);
        set(VIRTIO_MMIO_STATUS, state.status);
        set(VIRTIO_MMIO_DEVICE_FEATURES, half(self.device.features(), state.device_features_sel));
        let queue = state.queues.get(state.queue_sel);
        set(VIRTIO_MMIO_QUEUE_NUM_MAX, queue.map_or(0, |q| q.max_size().into()));
        set(VIRTIO_MMIO_QUEUE_READY, queue.is_some_and(Queue::ready).into());
    }

    /// A driver's store to the register page. Registers are 32 bits wide (4.2.2.2); anything else
    /// is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        let Ok(register) = u32::try_from(offset) else { return };
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.state.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.state.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.state.status & FEATURES_OK == 0 => {
                set_half(&mut self.state.driver_features, self.state.driver_features_sel, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.state.queue_sel = value as usize,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    // Fails only if it is readable anyway.
                    let _ = kick.write(1);
                }
                return;
            }
            VIRTIO_MMIO_STATUS if value == 0 => self.reset(),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_INTERRUPT_ACK if value & VIRTIO_MMIO_INT_CONFIG != 0 => {
                self.page.set(VIRTIO_MMIO_INTERRUPT_STATUS.into(), VIRTIO_MMIO_INT_VRING);
            }
            _ => self.set_up_queue(register, value),
        }
        self.show_state();
    }

    /// Sets up a queue, which is allowed between FEATURES_OK and DRIVER_OK (3.1.1, steps 6 and 7).
    fn set_up_queue(&mut self, register: u32, value: u32) {
        if self.state.status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK {
            return;
        }
        let Some(queue) = self.state.queues.get_mut(self.state.queue_sel) else { return };
        match register {
            VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            // 4.2.2.2: nothing else may change while the queue is ready.
            _ if queue.ready() => {}
            // `set_size` ignores a size that is not valid, and the largest stays.
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, wanted: u32) {
        let state = &mut self.state;
        // The driver may only add bits (2.1.1), and NEEDS_RESET is the device's to set.
        let added = wanted & !state.status & !NEEDS_RESET;
        state.status |= added;
        if added & FEATURES_OK != 0 {
            let unknown = state.driver_features & !self.device.features();
            if unknown != 0 || state.driver_features & F_VERSION_1 == 0 {
                state.status &= !FEATURES_OK;
            }
        }
        if added & DRIVER_OK != 0
            && let Err(error) = self.activate()
        {
            let id = self.device.id();
            self.complaint.error(&format!("virtio device {id}: activate: {error:#}"));
            self.state.status |= NEEDS_RESET;
            self.show_state();
            self.page.set(VIRTIO_MMIO_INTERRUPT_STATUS.into(), CONFIG_CHANGED);
            let _ = self.interrupt.write(1);
        }
    }

    fn activate(&mut self) -> Result<()> {
        ensure!(self.state.status & FEATURES_OK != 0, "the driver skipped feature negotiation");
        self.spare.clear();
        let mut queues = Vec::with_capacity(self.kicks.len());
        for (index, kick) in self.kicks.iter().enumerate() {
            let template = &self.state.queues[index];
            if !template.is_valid(&self.ram) {
                bail!("the driver's set-up of queue {index} is not valid");
            }
            // A copy: the transport's own queue stays as the driver has set it up.
            let queue = Queue::try_from(template.state()).context("take over a queue")?;
            queues.push(ReadyQueue { queue, kick: kick.try_clone()? });
        }
        self.device.activate(Activation {
            ram: self.ram.clone(),
            features: self.state.driver_features,
            queues,
            interrupt: self.interrupt.try_clone()?,
            config: ConfigSpace { page: self.page.clone(), interrupt: self.interrupt.try_clone()? },
        })
    }

    fn reset(&mut self) {
        if self.state.status & DRIVER_OK != 0 {
            self.device.reset();
            // Without spare descriptors the next activation may fail, and then logs that.
            let _ = self.keep_spare();
        }
        self.page.set(VIRTIO_MMIO_INTERRUPT_STATUS.into(), VIRTIO_MMIO_INT_VRING);
        // The sizes were accepted when the device was attached.
        if let Ok(state) = State::new(self.device.queue_sizes()) {
            self.state = state;
        }
    }
}

/// What a driver reads where there is no device (4.2.2: its id is 0, and the driver leaves it alone).
pub fn placeholder_register(offset: u64) -> u32 {
    let at = |(register, _): &&(u32, u32)| u64::from(*register) == offset;
    ID_REGISTERS.iter().find(at).map_or(0, |(_, value)| *value)
}

/// The low (0) or high (1) word; other selections read as zero.
fn half(value: u64, sel: u32) -> u32 {
    match sel {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, sel: u32, word: u32) {
    match sel {
        0 => *value = *value & !0xffff_ffff | u64::from(word),
        1 => *value = *value & 0xffff_ffff | u64::from(word) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use vm_memory::GuestAddress;

    /// Records what the transport tells it.
    #[derive(Debug, Default)]
    struct Fake {
        late: bool,
        log: Arc<Mutex<Vec<String>>>,
        config: Arc<Mutex<Option<ConfigSpace>>>,
    }

    impl VirtioDevice for Fake {
        fn id(&self) -> u32 {
            4
        }
        fn features(&self) -> u64 {
            F_VERSION_1 | 1
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }
        fn config(&self) -> &[u8] {
            b"conf"
        }
        fn is_late(&self) -> bool {
            self.late
        }
        fn activate(&mut self, activation: Activation) -> Result<()> {
            let line = format!("activate {:#x}", activation.features);
            self.log.lock().expect("lock").push(line);
            *self.config.lock().expect("lock") = Some(activation.config);
            Ok(())
        }
        fn reset(&mut self) {
            self.log.lock().expect("lock").push("reset".into());
        }
    }

    struct Driver {
        device: MmioDevice,
        log: Arc<Mutex<Vec<String>>>,
        config: Arc<Mutex<Option<ConfigSpace>>>,
    }

    impl Driver {
        fn new() -> Self {
            let fake = Fake::default();
            let (log, config) = (Arc::clone(&fake.log), Arc::clone(&fake.config));
            let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("ram");
            let device = MmioDevice::new(Box::new(fake), RegisterPage::unattached(), &ram);
            Driver { device: device.expect("a device"), log, config }
        }
        fn write(&mut self, register: u32, value: u32) {
            self.device.write(register.into(), &value.to_le_bytes());
        }
        fn read(&self, register: u32) -> u32 {
            self.device.page.value(register.into())
        }
        fn negotiate(&mut self, low: u32, high: u32) {
            self.write(VIRTIO_MMIO_STATUS, 3);
            for (sel, word) in [(0, low), (1, high)] {
                self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
                self.write(VIRTIO_MMIO_DRIVER_FEATURES, word);
            }
            self.write(VIRTIO_MMIO_STATUS, 3 | FEATURES_OK);
        }
        fn set_up_queue(&mut self, size: u32) {
            self.write(VIRTIO_MMIO_QUEUE_SEL, 0);
            self.write(VIRTIO_MMIO_QUEUE_NUM, size);
            self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
            self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
            self.write(VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        fn log(&self) -> Vec<String> {
            self.log.lock().expect("lock").clone()
        }
    }

    #[test]
    fn a_well_behaved_driver_gets_its_device() {
        let mut driver = Driver::new();
        assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(driver.read(VIRTIO_MMIO_CONFIG), u32::from_le_bytes(*b"conf"));
        driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 1);
        driver.negotiate(1, 1);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 3 | FEATURES_OK);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 16);
        driver.set_up_queue(16);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 1);
        driver.write(VIRTIO_MMIO_STATUS, 3 | FEATURES_OK | DRIVER_OK);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 3 | FEATURES_OK | DRIVER_OK);
        driver.write(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
        assert_eq!(driver.log(), ["activate 0x100000001", "reset"]);
    }

    #[test]
    fn a_notification_that_comes_as_a_store_wakes_the_device() {
        let mut driver = Driver::new();
        // There is no such queue.
        driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
        assert!(driver.device.kicks[0].read().is_err());
        driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert_eq!(driver.device.kicks[0].read().expect("it was written"), 1);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        for (low, high) in [(2, 1), (1, 0)] {
            let mut driver = Driver::new();
            driver.negotiate(low, high);
            assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 3);
            driver.set_up_queue(16);
            driver.write(VIRTIO_MMIO_STATUS, 3 | DRIVER_OK);
            assert_eq!(driver.log(), Vec::<String>::new());
        }
    }

    #[test]
    fn an_invalid_queue_asks_for_a_reset() {
        // Not ready; and a ring that is not in memory.
        for (ready, desc_high) in [(0, 0), (1, 0xffff)] {
            let mut driver = Driver::new();
            driver.negotiate(1, 1);
            driver.write(VIRTIO_MMIO_QUEUE_DESC_HIGH, desc_high);
            driver.set_up_queue(16);
            driver.write(VIRTIO_MMIO_QUEUE_READY, ready);
            driver.write(VIRTIO_MMIO_STATUS, 3 | FEATURES_OK | DRIVER_OK);
            assert_ne!(driver.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
            assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
            assert_eq!(driver.log(), Vec::<String>::new());
            driver.write(VIRTIO_MMIO_STATUS, 0);
            assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
            assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        }
    }

    #[test]
    fn a_change_of_the_configuration_is_announced_until_acknowledged() {
        let mut driver = Driver::new();
        driver.negotiate(1, 1);
        driver.set_up_queue(16);
        driver.write(VIRTIO_MMIO_STATUS, 3 | FEATURES_OK | DRIVER_OK);
        let config = driver.config.lock().expect("lock").take().expect("activated");
        config.change(2, b"NF").expect("changed");
        assert_eq!(driver.device.interrupt.read().expect("interrupted"), 1);
        assert_eq!(driver.read(VIRTIO_MMIO_CONFIG), u32::from_le_bytes(*b"coNF"));
        assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), 1);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
        driver.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
        driver.write(VIRTIO_MMIO_INTERRUPT_ACK, 3);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        config.change(2, b"nf").expect("changed");
        driver.write(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    }

    #[test]
    fn a_ready_queue_does_not_change() {
        let mut driver = Driver::new();
        driver.negotiate(1, 1);
        driver.set_up_queue(16);
        driver.write(VIRTIO_MMIO_QUEUE_DESC_HIGH, 0xffff);
        driver.write(VIRTIO_MMIO_STATUS, 3 | FEATURES_OK | DRIVER_OK);
        assert_eq!(driver.log(), ["activate 0x100000001"]);
    }

    #[test]
    fn a_late_device_is_a_placeholder_until_it_appears() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("ram");
        let (page, fake) = (RegisterPage::unattached(), Fake { late: true, ..Fake::default() });
        let device = MmioDevice::new(Box::new(fake), page.clone(), &ram).expect("a device");
        assert_eq!(page.value(VIRTIO_MMIO_DEVICE_ID.into()), 0);
        device.late(0).expect("late").appear();
        assert_eq!(page.value(VIRTIO_MMIO_DEVICE_ID.into()), 4);
        assert!(Driver::new().device.late(0).is_none());
    }

    #[test]
    fn nonsense_is_ignored() {
        let mut driver = Driver::new();
        driver.device.write(VIRTIO_MMIO_STATUS.into(), &[1]);
        driver.device.write(u64::MAX, &[1, 0, 0, 0]);
        driver.write(VIRTIO_MMIO_QUEUE_SEL, 99);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
        driver.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 7);
        driver.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(driver.log(), Vec::<String>::new());
    }
}
