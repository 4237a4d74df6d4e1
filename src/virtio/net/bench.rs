//! For tests and fuzzers: the network device between a guest made of two rings and a socket, in a real
//! event loop, without a VM.

#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is how a test fails")]
#![cfg_attr(fuzzing, allow(dead_code, reason = "tests use more of it than fuzzers"))]

use super::*;

use std::cell::RefCell;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::rc::Rc;

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
pub use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT as NEXT, VRING_DESC_F_WRITE as WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{GuestRam, RegisterPage};
use crate::policy::Policy;
use crate::policy::filter::Filter;
use crate::policy::refusals::SharedRefusals;
use crate::policy::rules::Rules;
use crate::token::Token;
use crate::virtio::device::{ConfigSpace, ReadyQueue};

/// The device's number.
const DEVICE: u8 = 3;

pub const FEATURES: u64 = F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_GUEST_CSUM;
/// Addresses of the guest's queues, and offsets of the rings in each.
pub const QUEUES: [GuestAddress; 2] = [GuestAddress(0), GuestAddress(0x1_0000)];
pub const AVAILABLE: u64 = 0x1000;
pub const USED: u64 = 0x2000;
/// Address of the guest's buffers, and their distance.
pub const BUFFERS: u64 = 0x10_0000;
pub const BUFFER_STEP: u64 = 0x1_1000;

pub struct MainLoop {
    pub net: Net,
}

impl MutEventSubscriber for MainLoop {
    fn init(&mut self, ops: &mut EventOps) {
        self.net.register(&mut Watcher::new(ops, DEVICE)).expect("registers");
    }
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let token = Token::from_data(events.data());
        let Some(Token::Device { device: DEVICE, source }) = token else { panic!("{token:?}") };
        let mut watcher = Watcher::new(ops, DEVICE);
        self.net.handle(source, events.event_set(), &mut watcher).expect("handles");
    }
}

/// A filter with these rules, for a guest whose gateway is 10.88.0.1.
pub fn frame_filter(rules: Rules) -> FrameFilter {
    let policy = Policy::of_own_network([10, 88, 0, 1].into(), &[], rules);
    FrameFilter::new(Filter::new(policy, SharedRefusals::default()).expect("a socket"))
}

/// The device between a guest's memory and the other end of its socket.
pub struct Bench {
    pub events: EventManager<Rc<RefCell<MainLoop>>>,
    id: SubscriberId,
    pub device: Rc<RefCell<MainLoop>>,
    pub ram: GuestRam,
    pub passt: UnixStream,
    pub page: RegisterPage,
}

impl Bench {
    pub fn new(path: Option<PathBuf>) -> Self {
        let (ours, passt) = UnixStream::pair().expect("a pair");
        passt.set_nonblocking(true).expect("set");
        let again = path.map(|path| {
            let socket = path.clone();
            Reconnect {
                path,
                connect: Box::new(move || crate::virtio::net::passt::connect_now(&socket)),
            }
        });
        let mut filter = frame_filter(Rules::default());
        filter.passes_all = true;
        let net = Net::new([2; 6], ours, filter, again).expect("a device");
        let device = Rc::new(RefCell::new(MainLoop { net }));
        let mut events = EventManager::new().expect("events");
        let id = events.add_subscriber(Rc::clone(&device));
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("RAM");
        let page = RegisterPage::unattached();
        Bench { events, id, device, ram, passt, page }
    }

    /// Gives the device two queues with these descriptors.
    pub fn activate(
        &mut self,
        features: u64,
        receive: &[RawDescriptor],
        transmit: &[RawDescriptor],
    ) {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let mut queues = Vec::new();
        for (number, descriptors) in [receive, transmit].into_iter().enumerate() {
            let at = |offset| Some((QUEUES[number].0 + offset) as u32);
            self.ram.write_slice(&[0; 0x3000], QUEUES[number]).expect("RAM");
            self.offer(number, 0, descriptors);
            let mut queue = Queue::new(256).expect("a queue");
            queue.set_desc_table_address(at(0), None);
            queue.set_avail_ring_address(at(AVAILABLE), None);
            queue.set_used_ring_address(at(USED), None);
            queue.set_ready(true);
            queues.push(ReadyQueue { queue, kick: eventfd() });
        }
        let (config, page, _) = ConfigSpace::unattached();
        self.page = page;
        let activation =
            Activation { queues, ram: self.ram.clone(), features, interrupt: eventfd(), config };
        self.call(|net, watcher| net.activate(activation, watcher));
        self.run();
    }

    /// Writes descriptors into the table from `first` on, and makes each that starts a chain
    /// available.
    pub fn offer(&self, queue: usize, first: u16, descriptors: &[RawDescriptor]) {
        let table = QUEUES[queue];
        let available = table.unchecked_add(AVAILABLE);
        let mut count: u16 = self.ram.read_obj(available.unchecked_add(2)).expect("RAM");
        let mut continues = false;
        for (index, raw) in (first..).zip(descriptors) {
            let entry = table.unchecked_add(16 * u64::from(index));
            self.ram.write_obj(*raw, entry).expect("RAM");
            if !continues {
                let slot = available.unchecked_add(4 + 2 * u64::from(count % 256));
                self.ram.write_obj(index, slot).expect("RAM");
                count += 1;
            }
            continues = Descriptor::from(*raw).flags() & NEXT as u16 != 0;
        }
        self.ram.write_obj(count, available.unchecked_add(2)).expect("RAM");
    }

    /// Tells the device of new buffers.
    pub fn kick(&mut self, queue: usize) {
        if let Some(queues) = &self.device.borrow().net.queues {
            [&queues.receive, &queues.transmit][queue].kick().write(1).expect("kicked");
        }
        self.run();
    }

    pub fn call(&mut self, f: impl FnOnce(&mut Net, &mut Watcher<'_, '_>) -> Result<()>) {
        let mut ops = self.events.event_ops(self.id).expect("ops");
        f(&mut self.device.borrow_mut().net, &mut Watcher::new(&mut ops, DEVICE))
            .expect("the main loop lives");
    }

    /// Runs the device until it has nothing to do.
    pub fn run(&mut self) {
        for turn in 0.. {
            assert!(turn < 1000, "the device never rests");
            if self.events.run_with_timeout(0).expect("runs") == 0 {
                return;
            }
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.passt.write_all(bytes).expect("sent");
        self.run();
    }

    /// What the device has sent.
    pub fn sent(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = self.passt.read_to_end(&mut bytes);
        bytes
    }

    /// The used ring of a queue: heads and lengths.
    pub fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let used = QUEUES[queue].unchecked_add(USED);
        let count = self.ram.read_obj::<u16>(used.unchecked_add(2)).expect("idx");
        let at = |i: u16| used.unchecked_add(4 + 8 * u64::from(i));
        (0..count).map(|i| self.ram.read_obj::<[u32; 2]>(at(i)).expect("used").into()).collect()
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).expect("memory");
        bytes
    }

    pub fn stopped(&self) -> bool {
        self.device.borrow().net.queues.is_none()
    }

    pub fn link(&self) -> Option<bool> {
        // `None` until the link has changed: an unattached page starts empty.
        let generation = self.page.value(0xfc);
        (generation > 0).then(|| self.page.value(0x104) >> 16 & 1 == 1)
    }
}

pub fn buffer(index: u64, len: u32, flags: u32, next: u16) -> RawDescriptor {
    Descriptor::new(BUFFERS + index * BUFFER_STEP, len, flags as u16, next).into()
}

/// Single receive buffers of these lengths.
pub fn receive(lens: &[u32]) -> Vec<RawDescriptor> {
    (0..).zip(lens).map(|(i, len)| buffer(i, *len, WRITE, 0)).collect()
}

pub fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}
