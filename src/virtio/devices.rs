//! The devices that the main loop serves: the one list of them.

use super::balloon::Balloon;
use super::main_loop::{MainLoopDevice, Properties};
use super::net::Net;
use super::rng::Rng;
use super::vsock::mux::{self, Mux};

/// The devices of a box that the main loop serves, numbered in the order of their addresses.
#[derive(Debug)]
pub struct Devices {
    /// The vsock device. The main loop also calls it directly: it leads to the agent.
    pub vsock: Mux,
    others: Vec<Box<dyn MainLoopDevice>>,
}

impl Devices {
    /// The vsock device's number.
    pub const VSOCK: u8 = 0;

    /// How many every box has: they are the first.
    pub const OF_EVERY_BOX: usize = 2;

    /// All of them. A new device is added here.
    pub fn new(vsock: Mux, net: Option<Net>) -> Self {
        let mut others: Vec<Box<dyn MainLoopDevice>> =
            vec![Box::new(Rng::default()), Box::<Balloon>::default()];
        others.extend(net.map(|net| Box::new(net) as Box<dyn MainLoopDevice>));
        Devices { vsock, others }
    }

    /// What drivers read of those that every box has, in the order of their numbers.
    pub fn of_every_box() -> [Properties; Self::OF_EVERY_BOX] {
        [mux::properties(), Rng::default().properties()]
    }

    /// The device of this number.
    pub fn device(&mut self, number: u8) -> Option<&mut dyn MainLoopDevice> {
        match usize::from(number).checked_sub(1) {
            None => Some(&mut self.vsock),
            Some(index) => Some(self.others.get_mut(index)?.as_mut()),
        }
    }

    /// All devices, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = &dyn MainLoopDevice> {
        let others = self.others.iter().map(|device| &**device);
        std::iter::once(&self.vsock as &dyn MainLoopDevice).chain(others)
    }

    /// The numbers of all devices.
    pub fn numbers(&self) -> std::ops::Range<u8> {
        0..1 + self.others.len() as u8
    }
}
