//! The vsock device against guests and clients that are hostile, or only unusual.

#[path = "flow_test.rs"]
mod flows;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Bytes, GuestAddress};

use super::super::conn::BUFFER_LEN;
use super::super::listeners::ACCEPT_PAUSE;
use super::super::table::MAX_CLIENTS;
use super::*;
use bench::*;

const REQUEST: u16 = Op::Request as u16;
const RST: u16 = Op::Reset as u16;
const SHUTDOWN: u16 = Op::Shutdown as u16;
const DATA: u16 = Op::Data as u16;
const CREDIT_UPDATE: u16 = Op::CreditUpdate as u16;
const CREDIT_REQUEST: u16 = Op::CreditRequest as u16;

/// Ports of a connection that does not exist.
const STRAY: Ports = Ports { host: 9, guest: 8 };

fn data(ports: Ports) -> Packet {
    Packet::new(Op::Data, ports)
}

/// Asserts that the guest can still send to this client.
fn assert_serves(bench: &mut Bench, ports: Ports, client: &mut UnixStream) {
    bench.tell(data(ports), b"still there");
    assert_eq!(read_all(client), (b"still there".to_vec(), Tail::More));
}

/// All that a client reads, and how the connection ends, if it does.
fn read_to_the_end(bench: &mut Bench, client: &mut UnixStream) -> (Vec<u8>, Tail) {
    let mut all = Vec::new();
    loop {
        let (bytes, tail) = read_all(client);
        let stuck = bytes.is_empty();
        all.extend(bytes);
        if tail != Tail::More || stuck {
            return (all, tail);
        }
        bench.run();
    }
}

// ---- packets for nobody ------------------------------------------------------------------------

#[test]
fn packets_for_unknown_connections_get_one_reset_each() {
    let mut bench = Bench::started();
    for op in
        [Op::Request, Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest]
    {
        bench.tell(Packet::new(op, STRAY), &[]);
        bench.post(2, 4096);
        let [(reset, _)] = bench.received()[..] else { panic!("one answer to {op:?}") };
        let expected = Packet {
            from: (2, STRAY.host),
            to: (3, STRAY.guest),
            buf_alloc: 0,
            ..Packet::new(Op::Reset, STRAY)
        };
        assert_eq!(reset, expected, "the answer to {op:?}");
    }
}

#[test]
fn resets_for_unknown_connections_get_silence() {
    let mut bench = Bench::started();
    bench.tell(Packet::new(Op::Reset, STRAY), &[]);
    bench.tell(Packet { kind: 2, ..Packet::new(Op::Reset, STRAY) }, &[]);
    assert_eq!(bench.collect(), []);
}

#[test]
fn packets_with_other_addresses_get_silence() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    for cid in [0, 1, 2, 4, u64::from(u32::MAX), 3 << 32 | 3, u64::MAX] {
        bench.tell(Packet { from: (cid, ports.guest), ..data(ports) }, b"forged");
    }
    for cid in [0, 1, 3, u64::from(u32::MAX), 3 << 32 | 2, u64::MAX] {
        bench.tell(Packet { to: (cid, ports.host), ..data(ports) }, b"astray");
        bench.tell(Packet { to: (cid, STRAY.host), ..Packet::new(Op::Request, STRAY) }, &[]);
    }
    assert_eq!(bench.collect(), []);
    assert_serves(&mut bench, ports, &mut client);
}

#[test]
fn unknown_types_and_operations_get_a_reset_and_harm_nobody() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    for kind in [0, 2, 3, u16::MAX] {
        bench.tell(Packet { kind, ..Packet::new(Op::Request, STRAY) }, &[]);
    }
    for op in [0, 8, 0x101, u16::MAX] {
        bench.tell(Packet { op, ..Packet::new(Op::Request, STRAY) }, &[]);
    }
    assert_eq!(bench.collect(), vec![(RST, STRAY, vec![]); 8]);
    assert_serves(&mut bench, ports, &mut client);
}

#[test]
fn requests_to_host_ports_that_take_none_are_reset() {
    let mut bench = Bench::started();
    let (taken, mut client) = bench.open_offer(RESERVED);
    for host in [4089, 4090, 4091, 0, 1024, u32::MAX, RESERVED] {
        let ports = Ports { host, guest: 1 };
        bench.tell(Packet::new(Op::Request, ports), &[]);
        assert_eq!(bench.collect(), [(RST, ports, vec![])], "port {host}");
    }
    assert_serves(&mut bench, taken, &mut client);
}

// ---- credit ------------------------------------------------------------------------------------

#[test]
fn a_guest_that_overruns_its_credit_loses_that_connection_only() {
    let mut bench = Bench::started();
    let (greedy, mut first) = bench.open_offer(RESERVED);
    let (modest, mut second) = bench.open_client();
    // Nobody reads `first`: what its socket does not hold, the device must.
    let mut refused = Vec::new();
    for _ in 0..64 {
        bench.tell(data(greedy), &[7; MAX_PACKET]);
        assert!(bench.look().most_bytes <= BUFFER_LEN);
        refused.extend(bench.collect().into_iter().filter(|(op, ..)| *op != CREDIT_UPDATE));
        if !refused.is_empty() {
            break;
        }
    }
    assert_eq!(refused, [(RST, greedy, vec![])]);
    let (received, tail) = read_all(&mut first);
    assert_eq!(tail, Tail::End);
    assert!(received.iter().all(|byte| *byte == 7));
    assert_serves(&mut bench, modest, &mut second);
    bench.tell(data(greedy), b"more");
    assert_eq!(bench.ops(), [RST], "the connection is unknown now");
}

#[test]
fn a_guest_that_keeps_to_its_credit_loses_nothing_to_a_slow_reader() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    let (mut sent, mut taken, mut read) = (0usize, 0usize, 0usize);
    let pattern: Vec<u8> = (0..=250).cycle().take(1 << 20).collect();
    for _ in 0..1000 {
        let credit = BUFFER_LEN - (sent - taken);
        let len = credit.min(MAX_PACKET).min(pattern.len() - sent);
        if len > 0 {
            bench.tell(data(ports), &pattern[sent..sent + len]);
            sent += len;
        } else {
            let mut bytes = vec![0; 100_000];
            let len = client.read(&mut bytes).unwrap_or(0);
            assert_eq!(bytes[..len], pattern[read..read + len]);
            read += len;
        }
        bench.run();
        let room = bench.rx.room();
        bench.post(room, 64);
        for (packet, _) in bench.received() {
            assert_eq!((packet.op, packet.buf_alloc), (CREDIT_UPDATE, BUFFER_LEN as u32));
            taken = packet.fwd_cnt as usize;
        }
    }
    assert_eq!((sent, read), (pattern.len(), pattern.len()));
    assert_eq!(read_all(&mut client), (vec![], Tail::More));
}

#[test]
fn the_guest_gets_no_more_than_it_says_it_has_room_for() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    let mut sent = 0_u32;
    for (buf_alloc, fwd_cnt) in [
        (0, 0),
        (1, 0),
        (1000, 0),
        // Less than what is on the way already.
        (10, 0),
        (1000, 900),
        // Backwards.
        (1000, 500),
        // More than was ever sent.
        (1000, 100_000),
        (u32::MAX, 1 << 31),
        (0, u32::MAX),
        (u32::MAX, u32::MAX),
        (5000, 1900),
        (u32::MAX, 0),
    ] {
        bench.tell(Packet { buf_alloc, fwd_cnt, ..Packet::new(Op::CreditUpdate, ports) }, &[]);
        while client.write(&[1; 65536]).is_ok() {}
        let room = u64::from(buf_alloc).saturating_sub(u64::from(sent.wrapping_sub(fwd_cnt)));
        let before = sent;
        for (op, _, bytes) in bench.collect() {
            assert!([DATA, CREDIT_REQUEST].contains(&op), "operation {op}");
            sent += bytes.len() as u32;
        }
        assert!(u64::from(sent - before) <= room, "buf_alloc {buf_alloc}, fwd_cnt {fwd_cnt}");
    }
    assert!(sent > 5000, "an honest answer at the end is used");
    let (other, mut client) = bench.open_client();
    assert_serves(&mut bench, other, &mut client);
}

#[test]
fn a_guest_without_room_is_asked_for_it_once() {
    // The answer to a credit request may be the same credit again. This once caused an endless
    // exchange with any guest whose reader was slow.
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_client();
    client.write_all(b"hello").expect("written");
    bench.run();
    let full = Packet { buf_alloc: 0, ..Packet::new(Op::CreditUpdate, ports) };
    bench.ops();
    bench.tell(full, &[]);
    assert_eq!(bench.ops(), [CREDIT_REQUEST]);
    for _ in 0..3 {
        bench.tell(full, &[]);
        assert_eq!(bench.ops(), [0; 0]);
    }
    bench.tell(Packet { buf_alloc: 7, ..full }, &[]);
    client.write_all(b"world").expect("written");
    bench.run();
    assert_eq!(bench.collect().last(), Some(&(CREDIT_REQUEST, ports, vec![])));
}

// ---- descriptor chains -------------------------------------------------------------------------

#[test]
fn packets_may_be_split_over_descriptors_in_any_way() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    let packet = [Packet { len: 5, ..data(ports) }.bytes(), b"hello".to_vec()].concat();
    for size in [1, 2, 43, 44, 45, 100] {
        let buffers: Vec<Buffer<'_>> = packet.chunks(size).map(Buffer::Full).collect();
        bench.tx.add(&buffers);
        bench.run();
        assert_eq!(read_all(&mut client), (b"hello".to_vec(), Tail::More), "pieces of {size}");
        assert_eq!(bench.tx.returned()[0].1, 0);
    }
    // Empty descriptors, one the device may not read, and bytes beyond the packet's end.
    let (head, tail) = packet.split_at(20);
    let end = Buffer::Full(b"padding");
    let none = Buffer::Raw(0x1000, 0, 0);
    let chain = [none, Buffer::Full(head), Buffer::Empty(9), none, Buffer::Full(tail), end];
    bench.tx.add(&chain);
    bench.run();
    assert_eq!(read_all(&mut client), (b"hello".to_vec(), Tail::More));
}

#[test]
fn chains_without_a_whole_header_are_returned_and_forgotten() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    let packet = data(ports).bytes();
    let beyond = 1 << 40;
    let cases: [&[Buffer<'_>]; 11] = [
        &[Buffer::Full(&packet[..43])],
        &[Buffer::Full(&packet[..1])],
        &[Buffer::Raw(0x1000, 0, 0)],
        &[Buffer::Full(&packet[..20]), Buffer::Full(&packet[20..43])],
        &[Buffer::Empty(44)],
        &[Buffer::Full(&packet[..20]), Buffer::Empty(24)],
        &[Buffer::Raw(beyond, 44, 0)],
        &[Buffer::Raw(u64::MAX - 3, 44, 0)],
        &[Buffer::Raw((128 << 20) - 4, 44, 0)],
        &[Buffer::Raw(0x1000, u32::MAX, 0)],
        &[Buffer::Full(&packet), Buffer::Raw(beyond, 1, 0)],
    ];
    for (case, buffers) in cases.iter().enumerate() {
        let head = bench.tx.add(buffers);
        bench.run();
        let returned: Vec<_> = bench.tx.returned().iter().map(|r| (r.0, r.1)).collect();
        assert_eq!(returned, [(head, 0)], "case {case}");
        assert_serves(&mut bench, ports, &mut client);
    }
    assert_eq!(bench.ops(), [0; 0]);
}

#[test]
fn chains_without_all_their_data_end_their_connection_only() {
    let beyond = 1 << 40;
    let cases: [(u32, &[Buffer<'_>]); 7] = [
        (1, &[]),
        (6, &[Buffer::Full(b"short")]),
        (5, &[Buffer::Empty(5)]),
        (u32::MAX, &[Buffer::Full(b"short")]),
        (MAX_PACKET as u32 + 1, &[Buffer::Full(&[0; MAX_PACKET + 1])]),
        (u32::MAX, &[Buffer::Raw(0, 64 << 20, 0)]),
        (100, &[Buffer::Full(b"half"), Buffer::Raw(beyond, 0, 0)]),
    ];
    for (case, (len, buffers)) in cases.iter().enumerate() {
        let mut bench = Bench::started();
        let (victim, mut client) = bench.open_offer(RESERVED);
        let (other, mut bystander) = bench.open_offer(OTHER_RESERVED);
        let header = Packet { len: *len, ..data(victim) }.bytes();
        bench.tx.add(&[&[Buffer::Full(&header)], *buffers].concat());
        bench.run();
        assert_eq!(bench.collect(), [(RST, victim, vec![])], "case {case}");
        assert_eq!(read_all(&mut client), (vec![], Tail::End));
        assert_serves(&mut bench, other, &mut bystander);
    }
}

#[test]
fn control_packets_that_claim_data_end_their_connection_only() {
    let mut bench = Bench::started();
    let (victim, mut client) = bench.open_offer(RESERVED);
    let (other, mut bystander) = bench.open_offer(OTHER_RESERVED);
    bench.tell(Packet::new(Op::CreditUpdate, victim), b"surprise");
    assert_eq!(bench.collect(), [(RST, victim, vec![])]);
    assert_eq!(read_all(&mut client), (vec![], Tail::End));
    assert_serves(&mut bench, other, &mut bystander);
}

/// Writes an indirect table and returns the buffer that refers to it.
fn indirect(bench: &Bench, table: u64, descriptors: &[(u64, u32, u32, u16)]) -> Buffer<'static> {
    for (index, (addr, len, flags, next)) in descriptors.iter().enumerate() {
        let descriptor = RawDescriptor::from(Descriptor::new(*addr, *len, *flags as u16, *next));
        let at = GuestAddress(table + 16 * index as u64);
        bench.ram().write_obj(descriptor, at).expect("in RAM");
    }
    Buffer::Raw(table, 16 * descriptors.len() as u32, VRING_DESC_F_INDIRECT)
}

#[test]
fn indirect_chains_are_served_and_strange_ones_survived() {
    const TABLE: u64 = 1 << 20;
    const BYTES: u64 = 2 << 20;
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    let packet = [Packet { len: 5, ..data(ports) }.bytes(), b"hello".to_vec()].concat();
    bench.ram().write_slice(&packet, GuestAddress(BYTES)).expect("in RAM");
    let next = VRING_DESC_F_NEXT;
    let good = indirect(&bench, TABLE, &[(BYTES, 44, next, 1), (BYTES + 44, 5, 0, 0)]);
    bench.tx.add(&[good]);
    bench.run();
    assert_eq!(read_all(&mut client), (b"hello".to_vec(), Tail::More));
    bench.tx.returned();

    let nested = indirect(&bench, TABLE + 0x1000, &[(TABLE, 32, VRING_DESC_F_INDIRECT, 0)]);
    let itself =
        indirect(&bench, TABLE + 0x2000, &[(TABLE + 0x2000, 16, VRING_DESC_F_INDIRECT, 0)]);
    let astray = indirect(&bench, TABLE + 0x3000, &[(BYTES, 20, next, 99)]);
    for strange in [
        nested,
        itself,
        astray,
        Buffer::Raw(TABLE, 33, VRING_DESC_F_INDIRECT),
        Buffer::Raw(TABLE, 0, VRING_DESC_F_INDIRECT),
        Buffer::Raw(1 << 40, 32, VRING_DESC_F_INDIRECT),
        Buffer::Raw(TABLE, u32::MAX - 15, VRING_DESC_F_INDIRECT),
    ] {
        bench.tx.add(&[strange]);
        bench.run();
        assert_eq!(bench.tx.returned().len(), 1);
        assert_serves(&mut bench, ports, &mut client);
    }
    assert_eq!(bench.ops(), [0; 0]);
}

#[test]
fn chains_longer_than_their_queue_are_not_served() {
    const TABLE: u64 = 1 << 20;
    const BYTES: u64 = 2 << 20;
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    let packet = Packet { len: 212, ..data(ports) }.bytes();
    bench.ram().write_slice(&packet, GuestAddress(BYTES)).expect("in RAM");
    // A byte each: as long as the queue, then longer, then with each descriptor leading to itself.
    let byte = |n: u16| (BYTES + u64::from(n), 1, VRING_DESC_F_NEXT, n + 1);
    let mut table: Vec<_> = (0..RING).map(byte).collect();
    let served = indirect(&bench, TABLE, &table);
    table.push((BYTES, 1, 0, 0));
    let too_long = indirect(&bench, TABLE + 0x2000, &table);
    let _ = indirect(&bench, TABLE + 0x4000, &[(BYTES, 1, VRING_DESC_F_NEXT, 0)]);
    let endless = Buffer::Raw(TABLE + 0x4000, 16 * 65_535, VRING_DESC_F_INDIRECT);
    bench.tx.add(&[served]);
    bench.run();
    assert_eq!(read_all(&mut client), (vec![0; 212], Tail::More));
    for _ in 0..RING / 2 {
        bench.tx.add(&[too_long]);
        bench.tx.add(&[endless]);
        bench.run();
        bench.tx.returned();
    }
    assert_eq!(read_all(&mut client), (vec![], Tail::More));
    assert_serves(&mut bench, ports, &mut client);

    bench.use_up_buffers();
    let _ = indirect(&bench, TABLE, &[(BYTES, 1, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 0)]);
    let head = bench.rx.add(&[Buffer::Raw(TABLE, 16 * 65_535, VRING_DESC_F_INDIRECT)]);
    bench.tell(data(STRAY), &[]);
    assert_eq!(bench.rx.returned(), [(head, 0, vec![])]);
    assert_eq!(bench.collect(), [(RST, STRAY, vec![])]);
}

#[test]
fn chains_that_loop_end() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    // As many bytes as a header has, but not a valid one, again and again.
    let slot = 1 << 20;
    for (len, flags) in [(44, 0), (0, 0), (1 << 20, 0), (44, VRING_DESC_F_WRITE)] {
        let head = bench.tx.add(&[Buffer::Raw(slot, len, flags)]);
        bench.tx.describe(head, slot, len, flags | VRING_DESC_F_NEXT, head);
        bench.run();
        assert_eq!(bench.tx.returned().len(), 1, "{len} bytes");
        assert_serves(&mut bench, ports, &mut client);
    }
    // A looping chain to receive into, too: the packet is written over itself, as the guest asked.
    bench.use_up_buffers();
    let head = bench.rx.add(&[Buffer::Raw(slot, 64, VRING_DESC_F_WRITE)]);
    bench.rx.describe(head, slot, 64, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, head);
    client.write_all(&[0; 5000]).expect("written");
    bench.run();
    assert_eq!(bench.rx.returned()[0].1, 44 + 5000);
    assert_serves(&mut bench, ports, &mut client);
}

#[test]
fn receive_buffers_that_hold_no_packet_come_back_empty() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    bench.use_up_buffers();
    client.write_all(b"wait for me").expect("written");
    bench.run();
    let write = VRING_DESC_F_WRITE;
    let bad: [&[Buffer<'_>]; 8] = [
        &[Buffer::Empty(0)],
        &[Buffer::Empty(1)],
        &[Buffer::Empty(43)],
        &[Buffer::Empty(20), Buffer::Empty(23)],
        &[Buffer::Full(&[0; 4096])],
        &[Buffer::Raw(1 << 40, 4096, write)],
        &[Buffer::Raw((128 << 20) - 50, 4096, write)],
        &[Buffer::Empty(4096), Buffer::Raw(u64::MAX - 1, 100, write)],
    ];
    let heads = bad.map(|buffers| bench.rx.add(buffers));
    bench.run();
    assert_eq!(bench.rx.returned(), heads.map(|head| (head, 0, vec![])));
    assert_eq!(bench.collect(), [(DATA, ports, b"wait for me".to_vec())]);
}

#[test]
fn a_receive_buffer_without_room_for_data_holds_nobody_up() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    bench.use_up_buffers();
    client.write_all(b"wait for me").expect("written");
    bench.post(1, 44);
    assert_eq!(bench.rx.returned().len(), 1);
    assert_eq!(bench.collect(), [(DATA, ports, b"wait for me".to_vec())]);
}

#[test]
fn a_broken_transmit_ring_ends_the_device_after_what_was_sent() {
    for broken in 0..2 {
        let mut bench = Bench::started();
        let (ports, mut client) = bench.open_offer(RESERVED);
        bench.send(data(ports), b"last words");
        match broken {
            0 => bench.tx.announce(RING),
            _ => bench.tx.announce(u16::MAX),
        }
        bench.run();
        assert!(bench.failure().is_some_and(|error| error.contains("return a buffer")));
        assert_eq!(read_all(&mut client), (b"last words".to_vec(), Tail::End));
        assert_eq!(bench.look().connections, 0);
    }
}

#[test]
fn an_available_index_out_of_range_ends_the_device() {
    for jump in [RING + 1, 1 << 15, u16::MAX] {
        let mut bench = Bench::started();
        bench.tx.set_avail(jump);
        bench.tx.kick_anyway();
        bench.run();
        assert!(bench.failure().is_some(), "transmit");

        let mut bench = Bench::started();
        bench.rx.set_avail(jump);
        bench.tell(Packet::new(Op::Request, STRAY), &[]);
        assert!(bench.failure().is_some(), "receive");
    }
}

#[test]
fn a_device_that_ended_serves_its_next_driver() {
    let mut bench = Bench::started();
    bench.tx.announce(u16::MAX);
    bench.run();
    assert!(bench.failure().is_some());
    bench.activate();
    let (ports, mut client) = bench.open_offer(RESERVED);
    assert_serves(&mut bench, ports, &mut client);
}

// ---- floods ------------------------------------------------------------------------------------

#[test]
fn resets_that_nobody_takes_stay_bounded() {
    let mut bench = Bench::started();
    for number in 0..100_000 {
        bench.send(data(Ports { host: 9, guest: number }), &[]);
    }
    bench.run();
    let holdings = bench.look();
    assert_eq!((holdings.resets, holdings.slots), (MAX_RESETS, 0));
    assert!(holdings.resets_capacity <= 2 * MAX_RESETS);
    let resets = bench.collect();
    assert_eq!(resets.len(), MAX_RESETS);
    let oldest = (0..).map(|guest| (RST, Ports { host: 9, guest }, vec![]));
    assert!(resets.into_iter().eq(oldest.take(MAX_RESETS)));
    bench.tell(data(STRAY), &[]);
    assert_eq!(bench.collect(), [(RST, STRAY, vec![])], "and the device goes on");
}

#[test]
fn clients_beyond_the_limit_are_closed_and_the_guest_keeps_its_own() {
    crate::sys::process::raise_open_file_limit();
    const BEYOND: usize = 904;
    let mut bench = Bench::new();
    let connect = |bench: &mut Bench| {
        let client = bench.connect(0);
        bench.run();
        client
    };
    // Their connections stay: a request still waits for its answer when its client has gone.
    for _ in 0..MAX_CLIENTS {
        drop(connect(&mut bench));
    }
    for _ in 0..BEYOND {
        assert_eq!(read_all(&mut connect(&mut bench)), (vec![], Tail::End));
    }
    assert_eq!(bench.look().connections, MAX_CLIENTS);
    // The agent's own streams must not depend on how many clients there are.
    bench.activate();
    let (ports, mut stream) = bench.open_offer(RESERVED);
    assert_serves(&mut bench, ports, &mut stream);

    bench.let_requests_expire();
    assert_eq!(bench.look().connections, 1);
    let mut late = connect(&mut bench);
    assert_eq!(read_all(&mut late), (vec![], Tail::More), "there is room again");
}

#[test]
fn clients_that_the_guest_does_not_answer_are_closed() {
    let mut bench = Bench::started();
    let mut clients = [0, 1, 0].map(|listener| bench.connect(listener));
    clients[1].write_all(b"never read").expect("written");
    bench.run();
    assert_eq!(bench.ops(), [REQUEST; 3]);
    bench.call(|mux, watcher| mux.end_round(Instant::now(), watcher));
    for client in &mut clients {
        assert_eq!(read_all(client), (vec![], Tail::More), "not before their time");
    }
    bench.let_requests_expire();
    assert_eq!(
        clients.map(|mut client| read_all(&mut client).1),
        [Tail::End, Tail::Reset, Tail::End]
    );
    assert_eq!(bench.ops(), [RST; 3], "the guest hears of it");
    assert_eq!(bench.look().connections, 0);
    assert_eq!(bench.deadline(), None, "nothing is left to wait for");
}

#[test]
fn an_answer_in_time_keeps_the_client_for_good() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_client();
    bench.let_requests_expire();
    assert_serves(&mut bench, ports, &mut client);
}

#[test]
fn the_time_of_a_refused_request_is_not_that_of_the_next_one_in_its_slot() {
    let mut bench = Bench::started();
    let refused = bench.connect(1);
    bench.run();
    let first = bench.deadline().expect("a time for the answer");
    let [(REQUEST, ports, _)] = bench.collect()[..] else { panic!("a request") };
    bench.tell(Packet::new(Op::Reset, ports), &[]);
    drop(refused);
    let mut client = bench.connect(1);
    bench.run();
    assert_eq!(bench.look().slots, 1, "the same slot");
    bench.call(|mux, watcher| mux.end_round(first, watcher));
    assert_eq!(read_all(&mut client), (vec![], Tail::More));
    let second = bench.deadline().expect("a time for the answer");
    assert!(second > first);
    bench.call(|mux, watcher| mux.end_round(second, watcher));
    assert_eq!(read_all(&mut client), (vec![], Tail::End));
}

#[test]
fn a_listener_that_cannot_accept_rests_for_a_while() {
    // A socket that does not listen fails as for lack of descriptors: the client, and so the event,
    // is still there. This once caused a loop at full speed.
    let (near, mut far) = UnixStream::pair().expect("a pair");
    far.write_all(b"knock").expect("written");
    let listeners = vec![Listener::Unix {
        socket: UnixListener::from(OwnedFd::from(near)),
        guest_port: Some(SERVER),
        fallback_port: None,
    }];
    let mut bench = Bench::with(HashMap::new(), listeners, HashMap::new(), Vec::new());
    bench.run();
    let deadline = bench.deadline().expect("tries again");
    assert!(deadline <= Instant::now() + ACCEPT_PAUSE);
    bench.call_only(|mux, watcher| mux.end_round(deadline, watcher));
    assert_eq!(bench.turn(), 1, "it tries again");
    assert_eq!(bench.turn(), 0, "and rests again");
}

// ---- deaths ------------------------------------------------------------------------------------

#[test]
fn a_client_that_dies_with_unread_bytes_is_announced_and_forgotten() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_client();
    bench.tell(data(ports), b"never read");
    client.write_all(b"last words").expect("written");
    drop(client);
    bench.run();
    let packets = bench.collect();
    assert_eq!(packets, [(DATA, ports, b"last words".to_vec()), (SHUTDOWN, ports, vec![])]);
    bench.tell(data(ports), b"to nobody");
    assert_eq!(bench.ops(), [0; 0]);
    let both = Packet { flags: RECEIVE | SEND, ..Packet::new(Op::Shutdown, ports) };
    bench.tell(both, &[]);
    assert_eq!(bench.ops(), [RST]);
    assert_eq!(bench.look().connections, 0);
}

#[test]
fn what_a_guest_sent_before_its_reset_is_delivered() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    let mut sent = Vec::new();
    // More than the socket holds at once.
    while bench.look().most_bytes == 0 || sent.len() % 4 != 0 {
        let part = [sent.len() as u8; 65_535];
        bench.tell(data(ports), &part);
        sent.extend(part);
    }
    bench.collect();
    bench.tell(Packet::new(Op::Reset, ports), &[]);
    assert_eq!(bench.look().connections, 1, "bytes are left to deliver");
    let (received, tail) = read_to_the_end(&mut bench, &mut client);
    assert_eq!(tail, Tail::End);
    assert!(received == sent);
    assert_eq!(bench.look().connections, 0);
    assert_eq!(bench.ops(), [0; 0], "a reset gets no answer");
}

/// A connection that the guest has reset while its client has not read everything.
fn forgotten_with_bytes_left(bench: &mut Bench) -> (Ports, UnixStream, usize) {
    let (ports, client) = bench.open_offer(RESERVED);
    let mut sent = 0;
    while bench.look().most_bytes == 0 {
        bench.tell(data(ports), &[5; 65_536]);
        sent += 65_536;
    }
    bench.collect();
    bench.tell(Packet::new(Op::Reset, ports), &[]);
    (ports, client, sent)
}

#[test]
fn after_its_reset_a_connection_is_unknown_and_its_bytes_are_safe() {
    let mut bench = Bench::started();
    let (ports, mut client, sent) = forgotten_with_bytes_left(&mut bench);
    bench.tell(data(ports), b"more");
    bench.tell(Packet::new(Op::Request, ports), &[]);
    bench.tell(Packet::new(Op::CreditUpdate, ports), b"incomplete");
    bench.tell(Packet::new(Op::Reset, ports), &[]);
    assert_eq!(bench.collect(), vec![(RST, ports, vec![]); 3]);
    let (received, tail) = read_to_the_end(&mut bench, &mut client);
    assert_eq!((received.len(), tail), (sent, Tail::End));
    assert_eq!(bench.look().connections, 0);
}

#[test]
fn a_client_that_dies_takes_its_forgotten_connection_along() {
    let mut bench = Bench::started();
    let (_, client, _) = forgotten_with_bytes_left(&mut bench);
    drop(client);
    bench.run();
    assert_eq!(bench.look().connections, 0);
}

#[test]
fn a_device_reset_ends_streams_after_what_was_sent() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_offer(RESERVED);
    let (_, mut other) = bench.open_client();
    other.write_all(b"lost on the way").expect("written");
    bench.tell(data(ports), b"delivered ");
    // In the ring, but without a kick.
    bench.send(data(ports), b"before the reset");
    bench.call(Mux::reset);
    assert_eq!(read_all(&mut client), (b"delivered before the reset".to_vec(), Tail::End));
    assert_ne!(read_all(&mut other).1, Tail::More);
    assert_eq!(bench.look().connections, 0);

    bench.activate();
    assert_eq!(bench.ops(), [0; 0], "the new driver hears nothing of the old connections");
    let (ports, mut client) = bench.open_client();
    assert_serves(&mut bench, ports, &mut client);
    bench.tell(data(Ports { host: RESERVED, guest: 1025 }), b"from before");
    assert_eq!(bench.ops(), [RST]);
}

#[test]
fn a_request_is_made_again_to_the_next_driver() {
    let mut bench = Bench::started();
    let mut client = bench.connect(1);
    client.write_all(b"patience").expect("written");
    bench.run();
    let [(REQUEST, ports, _)] = bench.collect()[..] else { panic!("a request") };
    bench.call(Mux::reset);
    assert_eq!(read_all(&mut client), (vec![], Tail::More));
    bench.activate();
    assert_eq!(bench.collect(), [(REQUEST, ports, vec![])]);
    bench.tell(Packet::new(Op::Response, ports), &[]);
    assert_eq!(bench.collect(), [(DATA, ports, b"patience".to_vec())]);
}

#[test]
fn a_second_activation_without_a_reset_is_a_reset() {
    let mut bench = Bench::started();
    let (_, mut client) = bench.open_client();
    bench.activate();
    assert_eq!(read_all(&mut client), (vec![], Tail::End));
    let (ports, mut client) = bench.open_client();
    assert_serves(&mut bench, ports, &mut client);
}

#[test]
fn closing_the_device_closes_everything_after_what_was_sent() {
    let mut bench = Bench::started();
    let (ports, mut stream) = bench.open_offer(RESERVED);
    let mut waiting = bench.connect(0);
    bench.send(data(ports), b"the end");
    bench.call(Mux::close);
    assert_eq!(read_all(&mut stream), (b"the end".to_vec(), Tail::End));
    assert_ne!(read_all(&mut waiting).1, Tail::More, "nobody will accept it");
    let mut offer = bench.reserved.remove(&OTHER_RESERVED).expect("not taken");
    assert_eq!(read_all(&mut offer), (vec![], Tail::End));
}

#[test]
fn events_of_a_closed_socket_do_not_reach_the_next_one_in_its_slot() {
    let mut bench = Bench::started();
    let (ports, old) = bench.open_client();
    // All three wait for the same turn of the loop, in this order.
    bench.send(Packet::new(Op::Reset, ports), &[]);
    bench.tx.kick_anyway();
    let mut new = bench.connect(1);
    drop(old);
    assert_eq!(bench.turn(), 3);
    assert_eq!(bench.look().slots, 1, "the same slot");
    let [(REQUEST, ports, _)] = bench.collect()[..] else { panic!("one request") };
    bench.tell(Packet::new(Op::Response, ports), &[]);
    assert_eq!(bench.ops(), [0; 0], "nobody has hung up");
    assert_serves(&mut bench, ports, &mut new);
}

// ---- halves ------------------------------------------------------------------------------------

#[test]
fn a_client_that_ends_its_half_still_gets_the_guests() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_client();
    client.write_all(b"question").expect("written");
    client.shutdown(Shutdown::Write).expect("shut");
    bench.run();
    let packets = bench.collect();
    assert_eq!(packets, [(DATA, ports, b"question".to_vec()), (SHUTDOWN, ports, vec![])]);
    bench.tell(data(ports), b"answer");
    assert_eq!(read_all(&mut client), (b"answer".to_vec(), Tail::More));
    bench.tell(Packet { flags: SEND, ..Packet::new(Op::Shutdown, ports) }, &[]);
    assert_eq!(read_all(&mut client), (vec![], Tail::End));
    assert_eq!(bench.ops(), [RST]);
}

#[test]
fn a_guest_that_ends_its_half_still_gets_the_clients() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_client();
    bench.send(data(ports), b"question");
    bench.tell(Packet { flags: SEND, ..Packet::new(Op::Shutdown, ports) }, &[]);
    assert_eq!(read_all(&mut client), (b"question".to_vec(), Tail::End));
    client.write_all(b"answer").expect("written");
    bench.run();
    assert_eq!(bench.collect(), [(DATA, ports, b"answer".to_vec())]);
    drop(client);
    bench.run();
    assert_eq!(bench.ops(), [SHUTDOWN, RST]);
}

#[test]
fn a_guest_that_stops_receiving_stops_its_clients_writes_only() {
    let mut bench = Bench::started();
    let (ports, mut client) = bench.open_client();
    bench.tell(Packet { flags: RECEIVE, ..Packet::new(Op::Shutdown, ports) }, &[]);
    let refused = client.write(b"into the void").map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::BrokenPipe));
    assert_eq!(bench.ops(), [0; 0]);
    assert_serves(&mut bench, ports, &mut client);
    bench.tell(Packet { flags: SEND, ..Packet::new(Op::Shutdown, ports) }, &[]);
    assert_eq!(read_all(&mut client), (vec![], Tail::End));
    assert_eq!(bench.ops(), [RST]);
}

// ---- fallback and readiness --------------------------------------------------------------------

#[test]
fn a_refused_client_is_passed_to_the_fallback_port_with_all_its_bytes() {
    let mut bench = Bench::started();
    let mut client = bench.connect(0);
    client.write_all(b"early bytes").expect("written");
    bench.run();
    let [(REQUEST, first, _)] = bench.collect()[..] else { panic!("a request") };
    assert_eq!(first.guest, SERVER);
    bench.tell(Packet::new(Op::Reset, first), &[]);
    let [(REQUEST, second, _)] = bench.collect()[..] else { panic!("another request") };
    assert_eq!(second.guest, FALLBACK);
    bench.tell(Packet::new(Op::Response, second), &[]);
    assert_eq!(bench.collect(), [(DATA, second, b"early bytes".to_vec())]);
    assert_serves(&mut bench, second, &mut client);
    bench.tell(Packet::new(Op::Response, first), &[]);
    assert_eq!(bench.collect(), [(RST, first, vec![])], "the first is unknown now");
}

#[test]
fn a_client_that_goes_before_the_fallback_answers_is_known_to_have_gone() {
    let mut bench = Bench::started();
    let mut client = bench.connect(0);
    client.write_all(b"a command").expect("written");
    bench.run();
    let [(REQUEST, first, _)] = bench.collect()[..] else { panic!("a request") };
    drop(client);
    bench.run();
    bench.tell(Packet::new(Op::Reset, first), &[]);
    let [(REQUEST, second, _)] = bench.collect()[..] else { panic!("another request") };
    bench.tell(Packet::new(Op::Response, second), &[]);
    let packets = bench.received();
    let [(request, bytes), (shutdown, _)] = &packets[..] else { panic!("{packets:?}") };
    assert_eq!((request.op, &bytes[..]), (DATA, &b"a command"[..]));
    assert_eq!((shutdown.op, shutdown.flags), (SHUTDOWN, RECEIVE | SEND));
}

#[test]
fn a_client_refused_everywhere_is_closed_at_once() {
    let mut bench = Bench::started();
    let mut client = bench.connect(0);
    bench.run();
    for guest in [SERVER, FALLBACK] {
        assert_eq!(read_all(&mut client), (vec![], Tail::More));
        let [(REQUEST, ports, _)] = bench.collect()[..] else { panic!("a request") };
        assert_eq!(ports.guest, guest);
        bench.tell(Packet::new(Op::Reset, ports), &[]);
    }
    assert_eq!(read_all(&mut client), (vec![], Tail::End));
    assert_eq!(bench.ops(), [0; 0]);
    assert_eq!(bench.look().connections, 0);
}

#[test]
fn a_reset_after_the_answer_is_an_end_and_not_a_refusal() {
    let mut bench = Bench::started();
    let mut client = bench.connect(0);
    bench.run();
    let [(REQUEST, ports, _)] = bench.collect()[..] else { panic!("a request") };
    bench.tell(Packet::new(Op::Response, ports), &[]);
    bench.tell(Packet::new(Op::Reset, ports), &[]);
    assert_eq!(read_all(&mut client), (vec![], Tail::End));
    assert_eq!(bench.ops(), [0; 0]);
}

#[test]
fn the_fallback_works_with_as_many_clients_as_there_may_be() {
    crate::sys::process::raise_open_file_limit();
    let mut bench = Bench::started();
    let mut client = bench.connect(0);
    bench.run();
    let [(REQUEST, first, _)] = bench.collect()[..] else { panic!("a request") };
    for _ in 1..MAX_CLIENTS {
        bench.connect(1);
        bench.run();
    }
    assert_eq!(bench.look().connections, MAX_CLIENTS);
    bench.tell(Packet::new(Op::Reset, first), &[]);
    assert_eq!(read_all(&mut client), (vec![], Tail::More));
    let requests = bench.collect();
    assert!(requests.iter().any(|(op, ports, _)| (*op, ports.guest) == (REQUEST, FALLBACK)));
}

#[test]
fn clients_of_a_guest_that_is_not_ready_wait_and_are_then_requested_in_order() {
    let mut bench = Bench::new();
    // Two slots that are free again, so that slots and ages differ.
    let gone = [bench.connect(1), bench.connect(1)];
    bench.run();
    bench.let_requests_expire();
    drop(gone);
    let mut clients = Vec::new();
    for number in 0..4_u8 {
        let mut client = bench.connect(1);
        client.write_all(&[number]).expect("written");
        bench.run();
        clients.push(client);
    }
    bench.activate();
    bench.collect();
    let (ports, mut stream) = bench.open_offer(RESERVED);
    assert_serves(&mut bench, ports, &mut stream);
    assert_eq!(bench.ops(), [0; 0], "nothing before the guest is ready");

    bench.call(Mux::guest_is_ready);
    let requests = bench.collect();
    assert_eq!(requests.len(), 4);
    for (number, (op, ports, _)) in requests.into_iter().enumerate() {
        assert_eq!((op, ports.guest), (REQUEST, LONE_SERVER));
        bench.tell(Packet::new(Op::Response, ports), &[]);
        assert_eq!(bench.collect(), [(DATA, ports, vec![number as u8])]);
    }
}

#[test]
fn the_guest_does_not_hear_of_clients_that_gave_up_before_it_was_ready() {
    let mut bench = Bench::new();
    let mut client = bench.connect(0);
    bench.run();
    bench.let_requests_expire();
    assert_eq!(read_all(&mut client), (vec![], Tail::End));
    bench.activate();
    bench.call(Mux::guest_is_ready);
    assert_eq!(bench.ops(), [0; 0]);
}

// ---- everything at random ----------------------------------------------------------------------

/// splitmix64: the same numbers for the same seed, everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// At least one; often few, seldom `most`.
    fn up_to(&mut self, most: usize) -> usize {
        let most = if self.next().is_multiple_of(4) { most } else { most.min(100) };
        1 + self.next() as usize % most.max(1)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// One stream with an honest guest at one end and an honest client at the other.
struct Stream {
    ports: Ports,
    client: UnixStream,
    /// The bytes that each end sends, and how many are sent.
    client_says: Vec<u8>,
    client_said: usize,
    client_ended: bool,
    guest_says: Vec<u8>,
    guest_said: usize,
    guest_ended: bool,
    /// The bytes that each end has received.
    client_heard: Vec<u8>,
    client_heard_end: bool,
    guest_heard: Vec<u8>,
    guest_heard_end: bool,
    reset: bool,
    /// The guest's receive buffer, what its reader has taken, and what of that the device knows.
    alloc: usize,
    taken: usize,
    told_taken: usize,
    /// The device's.
    device_taken: usize,
}

impl Stream {
    fn new(dice: &mut Dice, largest: u32, (ports, client): (Ports, UnixStream)) -> Self {
        // In proportion to the receive buffers, so that each run takes as many.
        let lens = [dice.up_to(50 * (largest as usize - 44)), dice.up_to(400_000)];
        let [client_says, guest_says] = lens.map(|len| dice.bytes(len));
        Stream {
            ports,
            client,
            client_says,
            client_said: 0,
            client_ended: false,
            guest_says,
            guest_said: 0,
            guest_ended: false,
            client_heard: Vec::new(),
            client_heard_end: false,
            guest_heard: Vec::new(),
            guest_heard_end: false,
            reset: false,
            // The device knows GUEST_ALLOC so far, and learns this only with the first packet.
            alloc: GUEST_ALLOC as usize,
            taken: 0,
            told_taken: 0,
            device_taken: 0,
        }
    }

    fn is_done(&self) -> bool {
        self.reset && self.client_heard_end
    }

    fn packet(&mut self, op: Op) -> Packet {
        self.told_taken = self.taken;
        let (buf_alloc, fwd_cnt) = (self.alloc as u32, self.taken as u32);
        Packet { buf_alloc, fwd_cnt, ..Packet::new(op, self.ports) }
    }

    /// Sends a packet, cut into descriptors at random.
    fn send(&mut self, dice: &mut Dice, bench: &mut Bench, packet: Packet, data: &[u8]) {
        let packet = Packet { len: data.len() as u32, ..packet };
        let bytes = [packet.bytes(), data.to_vec()].concat();
        let size = bytes.len().div_ceil(3).max(dice.up_to(bytes.len()));
        let buffers: Vec<Buffer<'_>> = bytes.chunks(size).map(Buffer::Full).collect();
        if bench.tx.room() < buffers.len() {
            bench.run();
            bench.tx.returned();
        }
        bench.tx.add(&buffers);
    }

    fn client_writes(&mut self, dice: &mut Dice) {
        let rest = &self.client_says[self.client_said..];
        if !rest.is_empty() {
            let len = dice.up_to(50_000).min(rest.len());
            self.client_said += self.client.write(&rest[..len]).unwrap_or(0);
        } else if !self.client_ended {
            self.client_ended = true;
            self.client.shutdown(Shutdown::Write).expect("shut");
        }
    }

    fn client_reads(&mut self, dice: &mut Dice) {
        let mut bytes = vec![0; dice.up_to(50_000)];
        match self.client.read(&mut bytes) {
            Ok(0) => {
                assert!(self.guest_ended && self.client_heard == self.guest_says);
                self.client_heard_end = true;
            }
            Ok(read) => {
                let at = self.client_heard.len();
                assert!(self.guest_says[at..self.guest_said].starts_with(&bytes[..read]));
                self.client_heard.extend(&bytes[..read]);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    fn guest_writes(&mut self, dice: &mut Dice, bench: &mut Bench) {
        let credit = BUFFER_LEN - (self.guest_said - self.device_taken);
        let rest = &self.guest_says[self.guest_said..];
        let len = dice.up_to(MAX_PACKET).min(rest.len()).min(credit);
        if len > 0 {
            let data = rest[..len].to_vec();
            let packet = self.packet(Op::Data);
            self.guest_said += len;
            self.send(dice, bench, packet, &data);
        } else if rest.is_empty() && !self.guest_ended {
            self.guest_ended = true;
            let packet = Packet { flags: SEND, ..self.packet(Op::Shutdown) };
            self.send(dice, bench, packet, &[]);
        }
    }

    fn guest_reads(&mut self, dice: &mut Dice, bench: &mut Bench) {
        self.taken = self.guest_heard.len().min(self.taken + dice.up_to(50_000));
        if self.taken - self.told_taken > self.alloc / 2 {
            let packet = self.packet(Op::CreditUpdate);
            self.send(dice, bench, packet, &[]);
        }
    }

    fn guest_hears(&mut self, dice: &mut Dice, bench: &mut Bench, packet: Packet, data: &[u8]) {
        if packet.op == RST {
            // After the first there may be more, for packets that crossed it.
            assert!(self.guest_ended && self.guest_heard_end);
            self.reset = true;
            return;
        }
        assert!(!self.reset);
        assert!(packet.fwd_cnt as usize >= self.device_taken);
        self.device_taken = packet.fwd_cnt as usize;
        match packet.op {
            DATA => {
                assert!(!self.guest_heard_end && !data.is_empty());
                let at = self.guest_heard.len();
                assert!(self.client_says[at..self.client_said].starts_with(data));
                self.guest_heard.extend(data);
                assert!(self.guest_heard.len() - self.told_taken <= self.alloc);
            }
            SHUTDOWN => {
                assert_eq!(packet.flags, SEND);
                assert!(self.client_ended && self.guest_heard == self.client_says);
                self.guest_heard_end = true;
            }
            CREDIT_REQUEST => {
                let packet = self.packet(Op::CreditUpdate);
                self.send(dice, bench, packet, &[]);
            }
            CREDIT_UPDATE => {}
            op => panic!("operation {op}"),
        }
    }
}

fn exchange(seed: u64) {
    let mut dice = Dice(seed);
    let largest = [45, 64, 1500, 4096][seed as usize % 4];
    let mut bench = Bench::started();
    let mut streams = Vec::new();
    for host in [RESERVED, OTHER_RESERVED] {
        let stream = bench.open_offer(host);
        streams.push(Stream::new(&mut dice, largest, stream));
    }
    for _ in 0..3 {
        let stream = bench.open_client();
        streams.push(Stream::new(&mut dice, largest, stream));
    }
    bench.use_up_buffers();
    for stream in &mut streams {
        stream.alloc = 500 + dice.up_to(100_000);
        let packet = stream.packet(Op::CreditUpdate);
        bench.tell(packet, &[]);
    }
    for _ in 0..500_000 {
        if streams.iter().all(Stream::is_done) {
            assert_eq!(bench.look().connections, 0);
            return;
        }
        let index = dice.next() as usize % streams.len();
        let stream = &mut streams[index];
        match dice.next() % 8 {
            0 => stream.client_writes(&mut dice),
            1 if !stream.client_heard_end => stream.client_reads(&mut dice),
            2 if !stream.reset => stream.guest_writes(&mut dice, &mut bench),
            3 if !stream.reset => stream.guest_reads(&mut dice, &mut bench),
            4 | 5 => {
                for _ in 0..bench.rx.room().min(dice.up_to(200)) {
                    let len = 45.max(dice.next() as u32 % (largest + 1));
                    bench.rx.add(&[Buffer::Empty(len)]);
                }
            }
            _ => {
                bench.run();
                bench.tx.returned();
                for (packet, data) in bench.received() {
                    let stream = streams.iter_mut().find(|s| s.ports == packet.ports());
                    let stream = stream.expect("a stream of ours");
                    stream.guest_hears(&mut dice, &mut bench, packet, &data);
                }
            }
        }
    }
    panic!("seed {seed}: the streams do not come to their ends");
}

#[test]
fn streams_arrive_exactly_however_they_are_cut() {
    for seed in 0..8 {
        exchange(seed);
    }
}

/// A packet with something wrong, or nothing, for one of these connections.
fn odd_packet(dice: &mut Dice, known: &[Ports]) -> Packet {
    let any = |dice: &mut Dice, values: &[u32]| values[dice.next() as usize % values.len()];
    let ports = match dice.next() % 8 {
        0 => Ports { host: any(dice, &[RESERVED, OTHER_RESERVED, 4089, 9]), guest: 1 },
        _ => known.get(dice.next() as usize % known.len().max(1)).copied().unwrap_or(STRAY),
    };
    let ops = [Op::Response, Op::Response, Op::Data, Op::Data, Op::Shutdown, Op::CreditUpdate];
    let op = match dice.next() % 8 {
        0 => dice.next() as u16 % 9,
        _ => ops[dice.next() as usize % ops.len()] as u16,
    };
    Packet {
        op,
        kind: if dice.next().is_multiple_of(32) { 2 } else { 1 },
        len: any(dice, &[0, 0, 0, 1, 100, 65_536, 65_537, u32::MAX]),
        flags: any(dice, &[0, RECEIVE, SEND, RECEIVE | SEND, u32::MAX]),
        buf_alloc: any(dice, &[0, 1, 4096, GUEST_ALLOC, u32::MAX]),
        fwd_cnt: any(dice, &[0, 0, 100, 1 << 31, u32::MAX]),
        ..Packet::new(Op::Data, ports)
    }
}

fn disturb(seed: u64) {
    let mut dice = Dice(seed);
    let mut bench = Bench::new();
    let mut clients: Vec<UnixStream> = Vec::new();
    let mut known: Vec<Ports> = Vec::new();
    for _ in 0..3000 {
        match dice.next() % 64 {
            0 => bench.activate(),
            1 => bench.call_only(Mux::reset),
            2 => bench.call_only(Mux::guest_is_ready),
            3 => bench.let_requests_expire(),
            4..16 if clients.len() < 50 => {
                let client = bench.connect(dice.next() as usize % 2);
                clients.push(client);
            }
            4..24 if !clients.is_empty() => {
                let index = dice.next() as usize % clients.len();
                let client = &mut clients[index];
                match dice.next() % 8 {
                    0 => drop(clients.swap_remove(index)),
                    1 => client.shutdown(Shutdown::Write).unwrap_or(()),
                    2 => client.shutdown(Shutdown::Read).unwrap_or(()),
                    3 | 4 => drop(client.read(&mut [0; 5000])),
                    _ => drop(client.write(&[1; 5000])),
                }
            }
            24..44 if bench.tx.room() > 2 => {
                let packet = odd_packet(&mut dice, &known);
                let header = &packet.bytes()[..[44, 44, 44, 43][dice.next() as usize % 4]];
                let body = Buffer::Raw(1 << 20, packet.len.min(100_000), 0);
                match dice.next() % 16 {
                    0 => bench.tx.add(&[Buffer::Full(header)]),
                    1 => bench.tx.add(&[Buffer::Full(header), Buffer::Empty(100)]),
                    _ => bench.tx.add(&[Buffer::Full(header), body]),
                };
            }
            44..52 => {
                for _ in 0..bench.rx.room().min(dice.up_to(20)) {
                    bench.rx.add(&[Buffer::Empty(dice.next() as u32 % 500)]);
                }
            }
            _ => {
                bench.run();
                bench.tx.returned();
                for (_, _, bytes) in bench.rx.returned() {
                    if bytes.len() >= 44 {
                        known.push(Packet::from_bytes(&bytes).ports());
                    }
                }
                known.drain(..known.len().saturating_sub(20));
            }
        }
        assert_eq!(bench.failure(), None, "seed {seed}");
        assert!(bench.look().most_bytes <= BUFFER_LEN);
    }
    // Nothing stays behind.
    drop(clients);
    bench.call(Mux::guest_is_ready);
    bench.call(Mux::reset);
    bench.let_requests_expire();
    bench.reserved.clear();
    bench.run();
    assert_eq!(bench.look().connections, 0, "seed {seed}");
    bench.activate();
    let (ports, mut client) = bench.open_client();
    assert_serves(&mut bench, ports, &mut client);
}

#[test]
fn no_mixture_of_odd_packets_and_clients_does_lasting_harm() {
    for seed in 0..16 {
        disturb(seed);
    }
}
