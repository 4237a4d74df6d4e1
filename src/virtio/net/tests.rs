//! The network device between guests and passts that are hostile, or only unusual.

use std::os::unix::net::UnixListener;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::bench::*;
use super::*;
use crate::memory::GuestRam;

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
            // Far more than one turn may take: without a bound, the turn would never end.
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
