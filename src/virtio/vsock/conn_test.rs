//! One connection, driven by the packets and reads of a test.

use super::*;

const PORTS: Ports = Ports { host: 1024, guest: 4089 };

fn packet(op: Op, flags: u32) -> Header {
    Header { op, flags, buf_alloc: 100, ..Header::reset(PORTS) }
}

fn open() -> Conn {
    let mut conn = Conn::accepted(&packet(Op::Request, 0));
    assert_eq!(next(&mut conn, HostRead::Empty).map(|h| h.op), Some(Op::Response));
    conn
}

fn next(conn: &mut Conn, read: HostRead) -> Option<Header> {
    conn.next(1 << 16, |room| match read {
        HostRead::Data(len) => HostRead::Data(len.min(room)),
        other => other,
    })
}

#[test]
fn a_host_request_waits_for_the_answer() {
    let mut conn = Conn::requested(PORTS);
    assert_eq!(next(&mut conn, HostRead::Data(1)).map(|h| h.op), Some(Op::Request));
    assert_eq!(next(&mut conn, HostRead::Data(1)), None);
    conn.on_packet(&packet(Op::Response, 0), &[]);
    assert_eq!(next(&mut conn, HostRead::Data(1)).map(|h| (h.op, h.len)), Some((Op::Data, 1)));
}

#[test]
fn a_refused_request_is_over_at_once() {
    let mut conn = Conn::requested(PORTS);
    next(&mut conn, HostRead::Empty);
    conn.on_packet(&packet(Op::Reset, 0), &[]);
    assert!(conn.is_closed());
}

#[test]
fn a_connection_that_takes_no_more_holds_no_memory() {
    let mut conn = open();
    conn.on_packet(&packet(Op::Data, 0), &[0; BUFFER_LEN / 4]);
    conn.host_stopped_receiving();
    assert_eq!(conn.to_host.capacity(), 0);
}

#[test]
fn a_smaller_buffer_is_what_the_guest_hears_of_and_gets() {
    let mut conn = Conn::accepted(&packet(Op::Request, 0));
    conn.set_buffer_len(100);
    assert_eq!(next(&mut conn, HostRead::Empty).map(|h| h.buf_alloc), Some(100));
    conn.on_packet(&packet(Op::Data, 0), &[0; 100]);
    conn.host_took(25);
    let update = next(&mut conn, HostRead::Empty).expect("an update");
    assert_eq!((update.op, update.fwd_cnt), (Op::CreditUpdate, 25));
    conn.on_packet(&packet(Op::Data, 0), &[0; 26]);
    assert_eq!(next(&mut conn, HostRead::Empty).map(|h| h.op), Some(Op::Reset));
}

#[test]
fn host_half_close_keeps_guest_reply() {
    let mut conn = open();
    let header = next(&mut conn, HostRead::End).expect("a shutdown");
    assert_eq!((header.op, header.flags), (Op::Shutdown, SHUTDOWN_SEND));
    assert_eq!(next(&mut conn, HostRead::End), None);
    conn.on_packet(&packet(Op::Data, 0), b"reply");
    assert_eq!(conn.for_host(), b"reply");
    conn.host_took(5);
    conn.on_packet(&packet(Op::Shutdown, BOTH), &[]);
    assert!(conn.is_host_direction_over());
    assert_eq!(next(&mut conn, HostRead::End).map(|h| h.op), Some(Op::Reset));
    assert!(conn.is_closed());
}

#[test]
fn guest_half_close_keeps_host_reply() {
    let mut conn = open();
    conn.on_packet(&packet(Op::Data, 0), b"ask");
    conn.on_packet(&packet(Op::Shutdown, SHUTDOWN_SEND), &[]);
    assert!(!conn.is_host_direction_over(), "not before the bytes are delivered");
    conn.host_took(3);
    assert!(conn.is_host_direction_over());
    assert_eq!(next(&mut conn, HostRead::Data(7)).map(|h| h.len), Some(7));
    assert_eq!(next(&mut conn, HostRead::End).map(|h| h.op), Some(Op::Shutdown));
    assert_eq!(next(&mut conn, HostRead::End).map(|h| h.op), Some(Op::Reset));
}

#[test]
fn data_never_exceeds_the_guests_credit() {
    let mut conn = open();
    assert_eq!(next(&mut conn, HostRead::Data(1000)).map(|h| h.len), Some(100));
    assert_eq!(next(&mut conn, HostRead::Data(1000)).map(|h| h.op), Some(Op::CreditRequest));
    assert_eq!(next(&mut conn, HostRead::Data(1000)), None);
    conn.on_packet(&Header { fwd_cnt: 40, ..packet(Op::CreditUpdate, 0) }, &[]);
    assert_eq!(next(&mut conn, HostRead::Data(1000)).map(|h| h.len), Some(40));
    // A guest with a wrong count of what it took gets nothing, rather than too much.
    conn.on_packet(&Header { fwd_cnt: 5000, ..packet(Op::CreditUpdate, 0) }, &[]);
    assert_ne!(next(&mut conn, HostRead::Data(1000)).map(|h| h.op), Some(Op::Data));
}

#[test]
fn a_guest_without_room_is_asked_for_it_once() {
    let mut conn = open();
    assert_eq!(next(&mut conn, HostRead::Data(1000)).map(|h| h.len), Some(100));
    assert_eq!(next(&mut conn, HostRead::Data(1000)).map(|h| h.op), Some(Op::CreditRequest));
    conn.on_packet(&packet(Op::CreditUpdate, 0), &[]);
    assert_eq!(next(&mut conn, HostRead::Data(1000)), None, "the answer was none");
    conn.on_packet(&Header { fwd_cnt: 100, ..packet(Op::CreditUpdate, 0) }, &[]);
    assert_eq!(next(&mut conn, HostRead::Data(1000)).map(|h| h.len), Some(100));
    assert_eq!(next(&mut conn, HostRead::Data(1000)).map(|h| h.op), Some(Op::CreditRequest));
}

#[test]
fn a_guest_that_ignores_our_credit_is_cut_off() {
    let mut conn = open();
    for _ in 0..4 {
        conn.on_packet(&packet(Op::Data, 0), &[0; BUFFER_LEN / 4]);
    }
    assert!(!conn.is_closed());
    conn.on_packet(&packet(Op::Data, 0), &[0]);
    assert_eq!(next(&mut conn, HostRead::Empty).map(|h| h.op), Some(Op::Reset));
    assert!(conn.is_closed() && conn.for_host().is_empty());
}

#[test]
fn an_abort_ends_what_the_guest_has_forgotten() {
    let mut conn = open();
    conn.on_packet(&packet(Op::Data, 0), b"undeliverable");
    conn.on_packet(&packet(Op::Reset, 0), &[]);
    assert!(conn.is_forgotten());
    conn.abort();
    assert!(conn.is_closed() && conn.for_host().is_empty());
    assert_eq!(next(&mut conn, HostRead::Empty), None, "nobody is to be told");
}

#[test]
fn a_reset_from_the_guest_ends_one_that_is_being_reset() {
    let mut conn = open();
    conn.abort();
    conn.on_packet(&packet(Op::Data, 0), b"late");
    assert!(!conn.is_closed());
    conn.on_packet(&packet(Op::Reset, 0), &[]);
    assert!(conn.is_closed());
}

/// Values at which 32-bit counters may go wrong.
const EDGES: [u32; 12] = [
    0,
    1,
    99,
    (BUFFER_LEN / 4) as u32,
    BUFFER_LEN as u32,
    (1 << 31) - 1,
    1 << 31,
    (1 << 31) + 1,
    u32::MAX - BUFFER_LEN as u32,
    u32::MAX - 99,
    u32::MAX - 1,
    u32::MAX,
];

#[test]
fn credit_is_what_the_guest_has_room_for_wherever_the_counters_are() {
    for taken in EDGES {
        for on_the_way in EDGES {
            for alloc in EDGES {
                let mut conn = open();
                conn.sent = taken.wrapping_add(on_the_way);
                let update =
                    Header { buf_alloc: alloc, fwd_cnt: taken, ..packet(Op::CreditUpdate, 0) };
                conn.on_packet(&update, &[]);
                // In numbers that do not wrap: the guest has room for the bytes not sent yet.
                let room = u64::from(alloc).saturating_sub(on_the_way.into()) as usize;
                assert_eq!(conn.credit(), room, "{taken} taken, {on_the_way} on the way, {alloc}");
                let sent = next(&mut conn, HostRead::Data(usize::MAX)).expect("a packet");
                let len = if sent.op == Op::Data { sent.len as usize } else { 0 };
                assert_eq!(len, room.min(1 << 16));
                assert_eq!(conn.credit(), room - len);
            }
        }
    }
}

#[test]
fn streams_go_on_when_their_counters_wrap() {
    // With bytes for the guest, whose packets also report room here, and without.
    for read in [HostRead::Data(30_000), HostRead::Empty] {
        for start in EDGES {
            stream_from(start, read);
        }
    }
}

fn stream_from(start: u32, read: HostRead) {
    let mut conn = open();
    (conn.sent, conn.guest_taken) = (start, start);
    (conn.taken, conn.told_taken) = (start, start);
    let mut guest_taken = start;
    // What the guest knows of the room here, and how much it has sent.
    let (mut told, mut sent) = (start, start);
    let (mut there, mut back) = (0, 0);
    while there < 3 * BUFFER_LEN || (back < 3 * BUFFER_LEN && read != HostRead::Empty) {
        let room = BUFFER_LEN - sent.wrapping_sub(told) as usize;
        let data = vec![0; room.min(50_000)];
        sent = sent.wrapping_add(data.len() as u32);
        let credit = Header { buf_alloc: 70_000, fwd_cnt: guest_taken, ..packet(Op::Data, 0) };
        conn.on_packet(&credit, &data);
        let took = conn.for_host().len().min(40_000);
        conn.host_took(took);
        there += data.len();
        let mut moved = data.len() + took;
        while let Some(header) = next(&mut conn, read) {
            assert_ne!(header.op, Op::Reset, "from {start}");
            told = header.fwd_cnt;
            guest_taken = guest_taken.wrapping_add(header.len);
            back += header.len as usize;
            moved += header.len as usize;
        }
        assert!(moved > 0, "from {start}, {there} there and {back} back");
    }
}

/// Where counters wrap soon, and where they change their sign.
const STARTS: [u32; 3] = [0, u32::MAX - 2, (1 << 31) - 3];

/// Every sequence of a few events of a guest that takes bytes and announces room as it likes, against
/// counts that do not wrap.
#[test]
fn no_order_of_events_sends_more_than_the_guest_has_room_for() {
    const DEPTH: u32 = 5;
    const EVENTS: usize = 8;
    for start in STARTS {
        for sequence in 0..EVENTS.pow(DEPTH) {
            let mut conn = open();
            (conn.sent, conn.guest_taken, conn.guest_alloc) = (start, start, 0);
            let (mut sent, mut taken) = (0u64, 0u64);
            // As announced: the room, and what was taken by then.
            let (mut room, mut told) = (0u64, 0u64);
            for position in 0..DEPTH {
                let event = sequence / EVENTS.pow(position) % EVENTS;
                match event {
                    0..3 => {
                        (room, told) = ([0, 1, 3][event], taken);
                        let fwd_cnt = start.wrapping_add(taken as u32);
                        let credit = packet(Op::CreditUpdate, 0);
                        conn.on_packet(&Header { buf_alloc: room as u32, fwd_cnt, ..credit }, &[]);
                    }
                    3 => taken = sent.min(taken + 1),
                    4 => taken = sent,
                    _ => {
                        let there = [1, 2, 5][event - 5];
                        let left = room.saturating_sub(sent - told);
                        let header = next(&mut conn, HostRead::Data(there));
                        let data = header.filter(|header| header.op == Op::Data);
                        let len = data.map_or(0, |header| u64::from(header.len));
                        assert_eq!(len, left.min(there as u64), "{sequence} from {start}");
                        sent += len;
                    }
                }
            }
        }
    }
}

/// Every sequence of a few events of a guest that keeps to its credit, against counts that do not wrap.
#[test]
fn no_order_of_events_takes_more_than_the_buffer_or_leaves_the_guest_without_credit() {
    const DEPTH: u32 = 6;
    const EVENTS: usize = 6;
    const BUFFER: u64 = 4;
    for start in STARTS {
        for sequence in 0..EVENTS.pow(DEPTH) {
            let mut conn = open();
            conn.set_buffer_len(BUFFER as u32);
            (conn.taken, conn.told_taken) = (start, start);
            // What the guest has sent, what the host took of it, and what the guest knows of that.
            let (mut sent, mut taken, mut told) = (0u64, 0u64, 0u64);
            let receive = |conn: &mut Conn, taken: u64, told: &mut u64| {
                while let Some(header) = next(conn, HostRead::Empty) {
                    assert_eq!(header.op, Op::CreditUpdate, "{sequence} from {start}");
                    assert_eq!(header.fwd_cnt, start.wrapping_add(taken as u32));
                    *told = taken;
                }
            };
            for position in 0..DEPTH {
                let event = sequence / EVENTS.pow(position) % EVENTS;
                match event {
                    0..3 => {
                        let len = (BUFFER - (sent - told)).min([1, 2, BUFFER][event]);
                        conn.on_packet(&packet(Op::Data, 0), &vec![0; len as usize]);
                        sent += len;
                    }
                    3 | 4 => {
                        let len = conn.for_host().len().min([1, BUFFER as usize][event - 3]);
                        conn.host_took(len);
                        taken += len as u64;
                    }
                    _ => receive(&mut conn, taken, &mut told),
                }
                assert_eq!(conn.len_for_host() as u64, sent - taken, "{sequence} from {start}");
                assert!(sent - taken <= BUFFER, "{sequence} from {start}");
            }
            // When all has been taken and told, the guest may go on.
            conn.host_took(conn.len_for_host());
            receive(&mut conn, sent, &mut told);
            assert!(sent - told < BUFFER, "{sequence} from {start}");
            // And when it does not keep to its credit, it is cut off.
            conn.on_packet(&packet(Op::Data, 0), &[0; BUFFER as usize + 1]);
            assert_eq!(next(&mut conn, HostRead::Empty).map(|h| h.op), Some(Op::Reset));
        }
    }
}

/// Every sequence of a few events: checks what must hold for all connections.
#[test]
fn no_order_of_events_breaks_the_rules() {
    const DEPTH: u32 = 4;
    const EVENTS: usize = 17;
    for (kind, abortable) in [(0, false), (0, true), (1, false), (1, true)] {
        for sequence in 0..EVENTS.pow(DEPTH) {
            let mut conn = match kind {
                0 => Conn::accepted(&packet(Op::Request, 0)),
                _ => Conn::requested(PORTS),
            };
            conn.set_abortable(abortable);
            let mut rules = Rules::default();
            for position in 0..DEPTH {
                rules.apply(&mut conn, sequence / EVENTS.pow(position) % EVENTS);
            }
        }
    }
}

/// What a guest has been told so far.
#[derive(Default)]
struct Rules {
    opened: bool,
    shut: u32,
    reset: bool,
    closed: bool,
    sent: usize,
}

impl Rules {
    fn apply(&mut self, conn: &mut Conn, event: usize) {
        match event {
            0 => conn.on_packet(&packet(Op::Request, 0), &[]),
            1 => conn.on_packet(&packet(Op::Response, 0), &[]),
            2 => conn.on_packet(&packet(Op::Reset, 0), &[]),
            3 => conn.on_packet(&packet(Op::Shutdown, SHUTDOWN_SEND), &[]),
            4 => conn.on_packet(&packet(Op::Shutdown, SHUTDOWN_RECEIVE), &[]),
            5 => conn.on_packet(&packet(Op::Shutdown, BOTH), &[]),
            6 => conn.on_packet(&packet(Op::Data, 0), b"data"),
            7 => conn.on_packet(&packet(Op::CreditRequest, 0), &[]),
            8 => conn.on_packet(
                &Header { fwd_cnt: self.sent as u32, ..packet(Op::CreditUpdate, 0) },
                &[],
            ),
            9 => conn.host_took(conn.for_host().len()),
            10 => conn.host_stopped_receiving(),
            11 => conn.on_driver_reset(),
            12 => self.note(next(conn, HostRead::Data(60)), conn),
            13 => self.note(next(conn, HostRead::Empty), conn),
            14 => self.note(next(conn, HostRead::End), conn),
            15 => self.note(next(conn, HostRead::Broken), conn),
            _ => conn.abort(),
        }
        assert!(!self.closed || conn.is_closed(), "what is closed stays closed");
        self.closed = conn.is_closed();
        let undelivered = conn.is_forgotten() && !conn.for_host().is_empty();
        assert!(!conn.is_forgotten() || undelivered, "what is forgotten waits for its delivery");
        assert!(conn.for_host().len() <= BUFFER_LEN);
    }

    fn note(&mut self, header: Option<Header>, conn: &Conn) {
        let Some(header) = header else { return };
        assert!(!self.reset && !self.closed, "nothing follows a reset");
        match header.op {
            // Again, when a new driver is asked.
            Op::Request | Op::Response => self.opened = true,
            Op::Reset => {
                self.reset = true;
                assert!(conn.is_closed());
            }
            _ => assert!(self.opened, "{:?} before the opening", header.op),
        }
        if header.op == Op::Data {
            assert!(self.shut & SHUTDOWN_SEND == 0, "data after the end");
            assert!(conn.guest_receives(), "data that is not wanted");
            self.sent += header.len as usize;
        }
        if header.op == Op::Shutdown {
            assert_ne!(header.flags & !self.shut, 0, "nothing new");
            assert_eq!(self.shut & !header.flags, 0, "taken back");
            self.shut = header.flags;
        }
    }
}

#[test]
fn freed_space_is_announced_in_time() {
    let mut conn = open();
    conn.on_packet(&packet(Op::Data, 0), &[0; BUFFER_LEN]);
    let step = BUFFER_LEN / UPDATE_PART as usize;
    conn.host_took(step - 1);
    assert_eq!(next(&mut conn, HostRead::Empty), None);
    conn.host_took(1);
    let update = next(&mut conn, HostRead::Empty).expect("an update");
    assert_eq!((update.op, update.fwd_cnt), (Op::CreditUpdate, step as u32));
    conn.on_packet(&packet(Op::CreditRequest, 0), &[]);
    assert_eq!(next(&mut conn, HostRead::Empty).map(|h| h.op), Some(Op::CreditUpdate));
}

#[test]
fn what_a_vanished_guest_had_sent_is_delivered() {
    let mut conn = open();
    conn.on_packet(&packet(Op::Data, 0), b"last");
    conn.on_packet(&packet(Op::Reset, 0), &[]);
    assert_eq!(next(&mut conn, HostRead::Data(1)), None);
    assert_eq!(conn.for_host(), b"last");
    conn.host_took(4);
    assert!(conn.is_host_direction_over() && conn.is_closed());
}

#[test]
fn a_host_that_closed_fully_is_announced_fully() {
    let mut conn = open();
    conn.host_stopped_receiving();
    assert_eq!(next(&mut conn, HostRead::Data(3)).map(|h| h.op), Some(Op::Data));
    let header = next(&mut conn, HostRead::End).expect("a shutdown");
    assert_eq!((header.op, header.flags), (Op::Shutdown, BOTH));
    conn.on_packet(&packet(Op::Data, 0), b"to nobody");
    assert!(conn.for_host().is_empty());
    conn.on_packet(&packet(Op::Shutdown, BOTH), &[]);
    assert_eq!(next(&mut conn, HostRead::End).map(|h| h.op), Some(Op::Reset));
}

/// A connection that carries TCP, with undelivered bytes.
fn open_tcp() -> Conn {
    let mut conn = open();
    conn.set_abortable(true);
    conn.on_packet(&packet(Op::Data, 0), b"lost");
    conn
}

#[test]
fn ending_both_directions_at_once_aborts_tcp() {
    let mut conn = open_tcp();
    conn.on_packet(&packet(Op::Shutdown, BOTH), &[]);
    assert!(conn.for_host().is_empty() && !conn.is_host_direction_over());
    assert_eq!(next(&mut conn, HostRead::Data(1)).map(|h| h.op), Some(Op::Reset));
    assert!(conn.is_closed());

    let mut conn = open_tcp();
    conn.on_packet(&packet(Op::Reset, 0), &[]);
    assert!(conn.for_host().is_empty() && conn.is_closed());
    assert!(!conn.is_host_direction_over());
}

#[test]
fn an_abort_is_no_end_for_the_host() {
    let mut conn = open_tcp();
    conn.on_packet(&packet(Op::Shutdown, SHUTDOWN_SEND), &[]);
    conn.on_packet(&packet(Op::Request, 0), &[]);
    assert!(conn.for_host().is_empty() && !conn.is_host_direction_over());
}

#[test]
fn ending_one_direction_after_the_other_ends_tcp_in_order() {
    for last in [packet(Op::Shutdown, BOTH), packet(Op::Reset, 0)] {
        let mut conn = open_tcp();
        conn.on_packet(&packet(Op::Shutdown, SHUTDOWN_SEND), &[]);
        conn.on_packet(&last, &[]);
        assert_eq!(conn.for_host(), b"lost");
        conn.host_took(4);
        assert!(conn.is_host_direction_over());
        let reset = next(&mut conn, HostRead::Data(1)).map(|h| h.op);
        assert_eq!(reset.is_none(), last.op == Op::Reset);
        assert!(conn.is_closed());
    }
}

#[test]
fn packets_out_of_place_reset() {
    for op in [Op::Request, Op::Response] {
        let mut conn = open();
        conn.on_packet(&packet(op, 0), &[]);
        assert_eq!(next(&mut conn, HostRead::Empty).map(|h| h.op), Some(Op::Reset), "{op:?}");
    }
    let mut conn = Conn::requested(PORTS);
    conn.on_packet(&packet(Op::Data, 0), b"early");
    assert_eq!(next(&mut conn, HostRead::Empty).map(|h| h.op), Some(Op::Reset));
}
