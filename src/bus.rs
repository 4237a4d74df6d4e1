//! Where a vCPU's port and MMIO accesses go. Called on the vCPU threads.

use std::sync::{Mutex, PoisonError};

use mote_agent::mailbox::DOOR;
use vm_superio::SerialState;

use crate::console::KernelConsole;
use crate::layout;
use crate::virtio::mmio::{self, MmioDevice, Registers};

/// How far there are places for devices, most of which a box has not.
const PLACES: u64 = (DOOR as u64 + 1) * layout::MMIO_PAGE;
const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = 0x3ff;
/// Keyboard controller command and status port.
const KEYBOARD_COMMAND: u16 = 0x64;
/// The command that pulses the reset line (`reboot=k`).
const PULSE_RESET: u8 = 0xfe;

/// All devices that the guest reaches by address.
#[derive(Debug)]
pub struct Bus {
    serial: Mutex<KernelConsole>,
    /// By register page. Each has its own lock: two vCPUs may configure two devices at once.
    devices: Vec<Mutex<MmioDevice>>,
}

/// What an access means for the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Go on.
    None,
    /// The guest asked for a reset: its way to power off.
    Reset,
}

impl Bus {
    /// Assembles the bus; the position of a device decides its address.
    pub fn new(serial: KernelConsole, devices: Vec<MmioDevice>) -> Self {
        Bus { serial: Mutex::new(serial), devices: devices.into_iter().map(Mutex::new).collect() }
    }

    /// What the guest has left in the registers: of the serial port, and of each device.
    pub fn registers(&self) -> (SerialState, Vec<Registers>) {
        let serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner).state();
        let devices = self.devices.iter();
        let devices = devices.map(|d| d.lock().unwrap_or_else(PoisonError::into_inner).registers());
        (serial, devices.collect())
    }

    /// `out`.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        match (port, data) {
            (SERIAL..=SERIAL_END, [value]) => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                // Fails only if the interrupt cannot be raised, and the kernel polls.
                let _ = serial.write((port - SERIAL) as u8, *value);
            }
            (KEYBOARD_COMMAND, [PULSE_RESET, ..]) => return Effect::Reset,
            _ => {}
        }
        Effect::None
    }

    /// `in`. Ports without a device read as all ones, like an empty ISA bus.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            (SERIAL..=SERIAL_END, [value]) => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                *value = serial.read((port - SERIAL) as u8);
            }
            // Says that the controller's buffers are empty: the kernel waits for that before it resets.
            (KEYBOARD_COMMAND, [value, ..]) => *value = 0,
            _ => {}
        }
    }

    /// A store to an address without memory behind it.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        let Some(offset) = address.checked_sub(layout::MMIO) else { return };
        let Some(device) = self.devices.get((offset / layout::MMIO_PAGE) as usize) else { return };
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.write(offset % layout::MMIO_PAGE, data);
    }

    /// A load from an address without memory behind it: register pages are memory, so there is no
    /// device here, but perhaps the place of one that other boxes from the same template have.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(offset) = address.checked_sub(layout::MMIO).filter(|offset| *offset < PLACES) {
            let value = mmio::placeholder_register(offset % layout::MMIO_PAGE).to_le_bytes();
            data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
        }
    }
}
