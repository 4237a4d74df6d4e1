//! The network device between guests and passts that are hostile or merely odd.

use super::*;

use std::cell::RefCell;
use std::os::unix::net::UnixListener;
use std::rc::Rc;

use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT as NEXT, VRING_DESC_F_WRITE as WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::memory::RegisterPage;
use crate::virtio::ReadyQueue;

const FEATURES: u64 = F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_GUEST_CSUM;
/// Where the guest's queues are, and in each its rings.
const QUEUES: [GuestAddress; 2] = [GuestAddress(0), GuestAddress(0x1_0000)];
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where its buffers are, and how far apart.
const BUFFERS: u64 = 0x10_0000;
const BUFFER_STEP: u64 = 0x1_1000;

struct MainLoop {
    net: Net,
}

impl MutEventSubscriber for MainLoop {
    fn init(&mut self, ops: &mut EventOps) {
        self.net.register(ops).expect("registers");
    }
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let token = Token::from_data(events.data()).expect("a token");
        self.net.handle(token, events.event_set(), ops).expect("handles");
    }
}

/// The device between a guest's memory and the other end of its socket.
struct Bench {
    events: EventManager<Rc<RefCell<MainLoop>>>,
    id: SubscriberId,
    device: Rc<RefCell<MainLoop>>,
    ram: GuestRam,
    passt: UnixStream,
    page: RegisterPage,
}

impl Bench {
    fn new(path: Option<PathBuf>) -> Self {
        let (ours, passt) = UnixStream::pair().expect("a pair");
        passt.set_nonblocking(true).expect("set");
        let net = Net::new(ours, path).expect("a device");
        let device = Rc::new(RefCell::new(MainLoop { net }));
        let mut events = EventManager::new().expect("events");
        let id = events.add_subscriber(Rc::clone(&device));
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("RAM");
        let page = RegisterPage::unattached();
        Bench { events, id, device, ram, passt, page }
    }

    /// Gives the device two queues with these descriptors.
    fn activate(&mut self, features: u64, receive: &[RawDescriptor], transmit: &[RawDescriptor]) {
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
        self.call(|net, ops| net.activate(activation, ops));
        self.run();
    }

    /// Writes descriptors from this place of the table on, and makes each that starts a chain
    /// available.
    fn offer(&self, queue: usize, first: u16, descriptors: &[RawDescriptor]) {
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
    fn kick(&mut self, queue: usize) {
        if let Some(queues) = &self.device.borrow().net.queues {
            [&queues.receive, &queues.transmit][queue].kick().write(1).expect("kicked");
        }
        self.run();
    }

    fn call(&mut self, f: impl FnOnce(&mut Net, &mut EventOps<'_>) -> Result<()>) {
        let mut ops = self.events.event_ops(self.id).expect("ops");
        f(&mut self.device.borrow_mut().net, &mut ops).expect("the main loop lives");
    }

    /// Lets the device come to rest.
    fn run(&mut self) {
        for turn in 0.. {
            assert!(turn < 1000, "the device never rests");
            if self.events.run_with_timeout(0).expect("runs") == 0 {
                return;
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.passt.write_all(bytes).expect("sent");
        self.run();
    }

    /// What the device has sent.
    fn sent(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = self.passt.read_to_end(&mut bytes);
        bytes
    }

    /// The used ring of a queue: heads and lengths.
    fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let used = QUEUES[queue].unchecked_add(USED);
        let count = self.ram.read_obj::<u16>(used.unchecked_add(2)).expect("idx");
        let at = |i: u16| used.unchecked_add(4 + 8 * u64::from(i));
        (0..count).map(|i| self.ram.read_obj::<[u32; 2]>(at(i)).expect("used").into()).collect()
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).expect("memory");
        bytes
    }

    fn stopped(&self) -> bool {
        self.device.borrow().net.queues.is_none()
    }

    fn link(&self) -> Option<bool> {
        // Nothing, until it changed: an unattached page starts empty.
        let generation = self.page.value(0xfc);
        (generation > 0).then(|| self.page.value(0x104) >> 16 & 1 == 1)
    }
}

fn buffer(index: u64, len: u32, flags: u32, next: u16) -> RawDescriptor {
    Descriptor::new(BUFFERS + index * BUFFER_STEP, len, flags as u16, next).into()
}

/// Single receive buffers of these lengths.
fn receive(lens: &[u32]) -> Vec<RawDescriptor> {
    (0..).zip(lens).map(|(i, len)| buffer(i, *len, WRITE, 0)).collect()
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs() {
    let mut bench = Bench::new(None);
    bench.activate(FEATURES, &receive(&[100, 12 + 20, 4096, 4096]), &[]);
    let frame: Vec<u8> = (0..130).collect();
    bench.send(&[framed(&frame), framed(&frame[..60])].concat());
    assert_eq!(bench.used(0), [(0, 100), (1, 32), (2, 10), (3, 72)]);
    let at = |i: u64| BUFFERS + i * BUFFER_STEP;
    assert_eq!(bench.read(at(0), 12), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    let parts = [bench.read(at(0) + 12, 88), bench.read(at(1), 32), bench.read(at(2), 10)];
    assert_eq!(parts.concat(), frame);
    assert_eq!(bench.read(at(3), 12), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(bench.read(at(3) + 12, 60), frame[..60]);
}

#[test]
fn a_driver_that_never_stops_sending_nothing_holds_nobody_up() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let mut bench = Bench::new(None);
    // One frame that is too short to be one, available over and over.
    bench.activate(FEATURES, &[], &[buffer(0, 13, 0, 0)]);
    let index = |ring: u64| QUEUES[1].unchecked_add(ring + 2);
    let taken = |ram: &GuestRam| ram.read_obj::<u16>(index(USED)).expect("RAM");
    let before = taken(&bench.ram);
    let (ram, over) = (bench.ram.clone(), AtomicBool::new(false));
    let most_taken = std::thread::scope(|scope| {
        let driver = scope.spawn(|| {
            let (mut all, mut last) = (0, before);
            // Far more than one turn may take: whoever takes so much never ends.
            while !over.load(Ordering::Relaxed) && all < 60_000 {
                let now = taken(&ram);
                all += u32::from(now.wrapping_sub(last));
                last = now;
                ram.write_obj(now.wrapping_add(256), index(AVAILABLE)).expect("RAM");
            }
            all
        });
        if let Some(queues) = &bench.device.borrow().net.queues {
            queues.transmit.kick().write(1).expect("kicked");
        }
        // Each is one turn of the main loop.
        for _ in 0..4 {
            bench.events.run_with_timeout(0).expect("runs");
        }
        over.store(true, Ordering::Relaxed);
        driver.join().expect("the driver ends")
    });
    assert!(most_taken < 60_000, "a turn took {most_taken} frames");
    assert!(bench.sent().is_empty());
}

#[test]
fn a_frame_waits_for_buffers_and_nothing_spins() {
    let mut bench = Bench::new(None);
    bench.activate(FEATURES, &receive(&[100]), &[]);
    bench.send(&framed(&[7; 200]));
    assert_eq!(bench.used(0), []);
    // The driver adds a second one, and says so.
    bench.offer(0, 1, &[buffer(1, 200, WRITE, 0)]);
    bench.kick(0);
    assert_eq!(bench.used(0), [(0, 100), (1, 112)]);
}

#[test]
fn without_merging_a_frame_fits_its_buffer_or_is_dropped() {
    let mut bench = Bench::new(None);
    bench.activate(F_VERSION_1, &receive(&[100, 100]), &[]);
    bench.send(&[framed(&[7; 89]), framed(&[8; 88])].concat());
    assert_eq!(bench.used(0), [(0, 100)]);
    assert_eq!(bench.read(BUFFERS, 14), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 8]);
}

#[test]
fn a_largest_frame_arrives() {
    let mut bench = Bench::new(None);
    bench.activate(FEATURES, &receive(&[4096; 20]), &[]);
    let frame: Vec<u8> = (0..65_535u32).map(|i| (i % 251) as u8).collect();
    bench.send(&framed(&frame));
    let used = bench.used(0);
    assert_eq!(used.len(), 17);
    assert_eq!(used.iter().map(|(_, len)| *len as usize).sum::<usize>(), 12 + frame.len());
}

#[test]
fn receive_buffers_that_are_none_stop_the_device() {
    let outside = Descriptor::new(1 << 40, 4096, WRITE as u16, 0).into();
    for bad in [buffer(0, 11, WRITE, 0), buffer(0, 4096, 0, 0), outside] {
        let mut bench = Bench::new(None);
        bench.activate(FEATURES, &[bad, buffer(1, 4096, WRITE, 0)], &[]);
        bench.send(&framed(&[7; 60]));
        assert!(bench.stopped());
        bench.activate(FEATURES, &receive(&[4096]), &[]);
        assert_eq!(bench.used(0), [(0, 72)], "a new driver gets the frame");
    }
}

#[test]
fn buffers_without_room_are_never_enough() {
    let mut bench = Bench::new(None);
    let mut buffers = vec![buffer(0, 100, 0, 0); 256];
    buffers[0] = buffer(0, 12, WRITE, 0);
    bench.activate(FEATURES, &buffers, &[]);
    bench.send(&framed(&[7; 60]));
    assert_eq!(bench.used(0), []);
    // One more than there can be, made from one that the device has.
    bench.offer(0, 255, &buffers[255..]);
    bench.kick(0);
    assert!(bench.stopped());
}

#[test]
fn frames_from_the_driver_go_out_whole() {
    let mut bench = Bench::new(None);
    for (i, byte) in [(0, 1), (1, 2), (2, 3)] {
        bench.ram.write_slice(&[byte; 100], GuestAddress(BUFFERS + i * BUFFER_STEP)).expect("RAM");
    }
    // One in three parts, one in one.
    let chains =
        [buffer(0, 10, NEXT, 1), buffer(1, 12, NEXT, 2), buffer(2, 30, 0, 0), buffer(2, 72, 0, 0)];
    bench.activate(FEATURES, &[], &chains);
    let first = [[2; 10].as_slice(), &[3; 30]].concat();
    assert_eq!(bench.sent(), [framed(&first), framed(&[3; 60])].concat());
    assert_eq!(bench.used(1), [(0, 0), (3, 0)]);
}

#[test]
fn frames_that_cannot_be_are_dropped() {
    let outside = Descriptor::new(1 << 40, 100, 0, 0).into();
    let mut bench = Bench::new(None);
    let chains = [
        buffer(0, 11, 0, 0),
        buffer(0, 12 + 13, 0, 0),
        buffer(0, 12 + 65_536, 0, 0),
        buffer(0, u32::MAX, 0, 0),
        buffer(0, 100, WRITE, 0),
        outside,
        buffer(0, 12 + 14, 0, 0),
    ];
    bench.activate(FEATURES, &[], &chains);
    assert_eq!(bench.sent(), framed(&[0; 14]));
    assert_eq!(bench.used(1), (0..7).map(|head| (head, 0)).collect::<Vec<_>>());
    assert!(!bench.stopped());
}

#[test]
fn a_full_socket_holds_the_driver_up() {
    let mut bench = Bench::new(None);
    let chains = vec![buffer(0, 12 + 60_000, 0, 0); 100];
    bench.activate(FEATURES, &[], &chains);
    let taken = bench.used(1).len();
    assert!((1..100).contains(&taken), "{taken}");
    let mut bytes = 0;
    while bytes < 100 * 60_004 {
        let sent = bench.sent().len();
        assert!(sent > 0, "stuck after {bytes} bytes");
        bytes += sent;
        bench.run();
    }
    assert_eq!(bench.used(1).len(), 100);
}

#[test]
fn a_broken_ring_stops_the_device_only() {
    for queue in [0, 1] {
        let mut bench = Bench::new(None);
        bench.activate(FEATURES, &[], &[]);
        let count = QUEUES[queue].unchecked_add(AVAILABLE + 2);
        bench.ram.write_obj(300u16, count).expect("RAM");
        bench.kick(queue);
        bench.send(&framed(&[7; 60]));
        assert!(bench.stopped());
    }
}

#[test]
fn without_passt_the_link_is_down_until_it_is_back() {
    let path = std::env::temp_dir().join(format!("mote-net-{}", std::process::id()));
    for end in [vec![], 65_536u32.to_be_bytes().to_vec()] {
        let mut bench = Bench::new(Some(path.clone()));
        bench.activate(FEATURES, &receive(&[4096; 4]), &[buffer(5, 72, 0, 0)]);
        assert_eq!(bench.link(), None);
        bench.sent();
        if end.is_empty() {
            bench.passt = UnixStream::pair().expect("another").0;
            bench.run();
        } else {
            bench.send(&end);
        }
        assert_eq!(bench.link(), Some(false));
        let due = |bench: &Bench| bench.device.borrow().net.next_deadline().expect("a deadline");
        let first = due(&bench);
        bench.call(|net, ops| net.retry(first - Duration::from_millis(1), ops));
        assert_eq!(due(&bench), first, "not before it is time");
        bench.call(|net, ops| net.retry(first, ops));
        assert_eq!(due(&bench) - first, RETRY_PAUSE[0] * 2);
        for _ in 0..10 {
            let due = due(&bench);
            bench.call(|net, ops| net.retry(due, ops));
        }
        let listener = UnixListener::bind(&path).expect("binds");
        let last = due(&bench);
        bench.call(|net, ops| net.retry(last, ops));
        assert_eq!(bench.link(), Some(true));
        assert_eq!(bench.device.borrow().net.next_deadline(), None);
        bench.passt = listener.accept().expect("accepted").0;
        bench.send(&framed(&[7; 60]));
        assert_eq!(bench.used(0), [(0, 72)]);
        std::fs::remove_file(&path).expect("removed");
    }
}

#[test]
fn a_link_that_is_down_takes_frames_to_nowhere() {
    let mut bench = Bench::new(None);
    bench.passt = UnixStream::pair().expect("another").0;
    bench.run();
    bench.activate(FEATURES, &receive(&[100]), &[buffer(0, 72, 0, 0), buffer(0, 72, 0, 0)]);
    assert_eq!(bench.link(), Some(false), "a driver that comes later is told");
    assert_eq!(bench.used(1), [(0, 0), (1, 0)]);
    assert_eq!(bench.device.borrow().net.next_deadline(), None, "an inherited socket is gone");
}

#[test]
fn the_configuration_says_address_link_and_mtu() {
    let expected = [2, 66, 10, 88, 0, 2, 1, 0, 0, 0, 0xf0, 0xff];
    assert_eq!(config_space([2, 66, 10, 88, 0, 2]), expected);
}
