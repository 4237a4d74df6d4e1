//! Any stores to a device's register page.
//!
//! Whatever they are: the device gets activations and resets in turn, with only valid queues and
//! features that it has offered, and the page always shows the true state.

use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::*;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;

use super::Input;
use crate::memory::{GuestRam, RegisterPage};
use crate::virtio::device::{Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice};
use crate::virtio::mmio::MmioDevice;
use crate::virtio::queue::ServedQueue;

const FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | 1 << 5;
const QUEUE_SIZES: [u16; 3] = [256, 16, 1];
const CONFIG: &[u8; 12] = b"twelve bytes";
const RAM: usize = 1 << 20;

/// What the device has been told.
#[derive(Debug, Default)]
struct Told {
    activation: Option<Activation>,
    refuses: bool,
}

#[derive(Debug)]
struct Fake(Arc<Mutex<Told>>);

impl VirtioDevice for Fake {
    fn id(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn config(&self) -> &[u8] {
        CONFIG
    }
    fn activate(&mut self, activation: Activation) -> Result<()> {
        let mut told = self.0.lock().expect("lock");
        assert!(told.activation.is_none(), "activated once until reset");
        assert_eq!(activation.features & !FEATURES, 0, "only what was offered");
        assert_ne!(activation.features & F_VERSION_1, 0);
        assert_eq!(activation.queues.len(), QUEUE_SIZES.len());
        for (ready, max) in activation.queues.iter().zip(QUEUE_SIZES) {
            let queue = &ready.queue;
            assert!(queue.ready() && queue.is_valid(&activation.ram));
            assert!(queue.size().is_power_of_two() && queue.size() <= max);
        }
        if told.refuses {
            bail!("the fuzzer says so");
        }
        told.activation = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.0.lock().expect("lock").activation = None;
    }
}

const REGISTERS: [u32; 15] = [
    VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_QUEUE_NOTIFY,
];

struct Bench {
    mmio: MmioDevice,
    page: RegisterPage,
    told: Arc<Mutex<Told>>,
    config: [u8; CONFIG.len()],
}

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let told = Arc::new(Mutex::new(Told::default()));
    let page = RegisterPage::unattached();
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).expect("RAM");
    let mmio = MmioDevice::new(Box::new(Fake(Arc::clone(&told))), page.clone(), &ram);
    let mmio = mmio.expect("a device");
    let mut bench = Bench { mmio, page, told, config: *CONFIG };
    bench.check();
    while !input.is_empty() {
        match input.u8() % 16 {
            0 => bench.mmio.write(input.u64(), input.short()),
            1 => bench.mmio.write(u64::from(input.u16() % 0x200) & !3, &input.u32().to_le_bytes()),
            2 => bench.told.lock().expect("lock").refuses ^= true,
            3 => bench.change_config(&mut input),
            4 => bench.serve(&ram),
            // Stores that a driver makes, with any values.
            5 => bench.negotiate(input.u64()),
            6 => bench.set_up_queue(&mut input),
            7 => bench.store(VIRTIO_MMIO_STATUS, u32::from(input.u8())),
            8 => bench.store(VIRTIO_MMIO_STATUS, 0),
            _ => {
                let register = input.choose(&REGISTERS);
                bench.store(register, input.edge());
            }
        }
        bench.check();
    }
}

impl Bench {
    fn store(&mut self, register: u32, value: u32) {
        self.mmio.write(register.into(), &value.to_le_bytes());
        if (register, value) == (VIRTIO_MMIO_STATUS, 0) {
            assert_eq!(self.read(VIRTIO_MMIO_STATUS), 0);
            assert_eq!(self.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
            assert!(self.told.lock().expect("lock").activation.is_none());
        }
    }

    fn read(&self, register: u32) -> u32 {
        self.page.value(register.into())
    }

    fn negotiate(&mut self, refused: u64) {
        self.store(VIRTIO_MMIO_STATUS, 3);
        let features = FEATURES & !refused;
        for (sel, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.store(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.store(VIRTIO_MMIO_DRIVER_FEATURES, word);
        }
        self.store(VIRTIO_MMIO_STATUS, 3 | FEATURES_OK);
    }

    fn set_up_queue(&mut self, input: &mut Input<'_>) {
        let index = input.u8() % 4;
        self.store(VIRTIO_MMIO_QUEUE_SEL, index.into());
        self.store(VIRTIO_MMIO_QUEUE_NUM, 1 << (input.u8() % 10));
        let base = 0x1000 * u32::from(input.u8());
        self.store(VIRTIO_MMIO_QUEUE_DESC_LOW, base);
        self.store(VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x1000);
        self.store(VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x2000);
        self.store(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn change_config(&mut self, input: &mut Input<'_>) {
        let offset = input.u8() % CONFIG.len() as u8;
        let value = input.u8();
        let told = self.told.lock().expect("lock");
        let Some(activation) = &told.activation else { return };
        let generation = self.read(VIRTIO_MMIO_CONFIG_GENERATION);
        activation.config.change(offset.into(), &[value]).expect("announced");
        self.config[usize::from(offset)] = value;
        assert_ne!(self.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);
        assert_eq!(self.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    }

    /// Serves every queue once, as a device would.
    fn serve(&mut self, ram: &GuestRam) {
        let mut told = self.told.lock().expect("lock");
        let Some(activation) = &mut told.activation else { return };
        for ready in activation.queues.drain(..) {
            let interrupt = &activation.interrupt;
            let mut queue =
                ServedQueue::new(ready, activation.features, interrupt).expect("served");
            let mut handled = 0;
            let _ = queue.serve(ram, 8, |_| {
                handled += 1;
                0
            });
            assert!(handled <= 8);
        }
    }

    /// Checks what the page must show at any time.
    fn check(&mut self) {
        assert_eq!(self.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(self.read(VIRTIO_MMIO_VERSION), 2);
        assert_eq!(self.read(VIRTIO_MMIO_DEVICE_ID), 4);
        let features = self.read(VIRTIO_MMIO_DEVICE_FEATURES);
        assert!([0, FEATURES as u32, (FEATURES >> 32) as u32].contains(&features));
        let status = self.read(VIRTIO_MMIO_STATUS);
        let active = self.told.lock().expect("lock").activation.is_some();
        let wants_device = status & DRIVER_OK != 0;
        let failed = status & NEEDS_RESET != 0;
        assert!(!active || status & FEATURES_OK != 0, "no device without negotiation");
        assert_eq!(active, wants_device && !failed, "status {status:#x}");
        assert!(!failed || wants_device, "only an activation fails");
        assert!([1, 3].contains(&self.read(VIRTIO_MMIO_INTERRUPT_STATUS)));
        // A raw store may have selected another queue.
        let max = self.read(VIRTIO_MMIO_QUEUE_NUM_MAX);
        assert!(max == 0 || QUEUE_SIZES.iter().any(|size| u32::from(*size) == max));
        let ready = self.read(VIRTIO_MMIO_QUEUE_READY);
        assert!(ready <= u32::from(max != 0), "a queue that is not there is not ready");
        let config: Vec<u8> = (0..CONFIG.len() as u32 / 4)
            .flat_map(|word| self.read(VIRTIO_MMIO_CONFIG + 4 * word).to_le_bytes())
            .collect();
        assert_eq!(config, self.config, "only the device changes its configuration");
    }
}
