//! Flows, outgoing and published, between a hostile guest and real sockets on loopback.

use std::net::{Ipv4Addr, SocketAddr as InetAddr, TcpListener, TcpStream, UdpSocket};
use std::thread::sleep;

use mote_agent::flow::{DATAGRAM_HEADER_LEN, MAX_DATAGRAM_LEN, PUBLISHED_LEN, Published};
use mote_agent::protocol::PUBLISH_PORT;

use super::super::super::conn::BUFFER_LEN;
use super::*;
use crate::sys;

/// A time limit far longer than anything on loopback takes.
const PATIENCE: Duration = Duration::from_secs(10);
const OK: [u8; 2] = [0, 0];
/// The chunk that ends a stream.
const END: [u8; 4] = [0; 4];

type Received = (u16, Ports, Vec<u8>);

/// Runs the device until `done` gives something: what happens on loopback may take a moment.
#[track_caller]
fn until<T>(bench: &mut Bench, mut done: impl FnMut(&mut Bench) -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        bench.run();
        if let Some(result) = done(bench) {
            return result;
        }
        assert!(Instant::now() < deadline, "nothing comes of it");
        sleep(Duration::from_millis(1));
    }
}

/// Expects exactly these packets next, however long each takes.
#[track_caller]
fn expect(bench: &mut Bench, packets: &[Received]) {
    let mut all = Vec::new();
    until(bench, |bench| {
        all.extend(bench.collect());
        (all.len() >= packets.len()).then_some(())
    });
    assert_eq!(all, packets);
}

/// What a peer reads until there are `len` bytes, or the end.
#[track_caller]
fn read_until(bench: &mut Bench, peer: &mut TcpStream, len: usize) -> (Vec<u8>, Tail) {
    let mut all = Vec::new();
    until(bench, |_| {
        let (bytes, tail) = read_all(peer);
        all.extend(bytes);
        (all.len() >= len || tail != Tail::More).then(|| (std::mem::take(&mut all), tail))
    })
}

fn chunk(data: &[u8]) -> Vec<u8> {
    [&(data.len() as u32).to_be_bytes(), data].concat()
}

fn datagram(data: &[u8]) -> Vec<u8> {
    [&(data.len() as u16).to_be_bytes(), data].concat()
}

fn shutdown(ports: Ports, flags: u32) -> Packet {
    Packet { flags, ..Packet::new(Op::Shutdown, ports) }
}

fn request(protocol: Protocol, destination: InetAddr) -> [u8; REQUEST_LEN] {
    Request { protocol, destination }.encode()
}

fn server() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound")
}

/// A flow to `server`, connected, and the other end.
#[track_caller]
fn connected_to(bench: &mut Bench, server: &TcpListener) -> (Ports, TcpStream) {
    let ports = bench.open_flow();
    bench.tell(data(ports), &request(Protocol::Tcp, server.local_addr().expect("bound")));
    expect(bench, &[(DATA, ports, OK.into())]);
    let (peer, _) = server.accept().expect("a client");
    peer.set_nonblocking(true).expect("non-blocking");
    (ports, peer)
}

#[track_caller]
fn connected(bench: &mut Bench) -> (Ports, TcpStream) {
    connected_to(bench, &server())
}

/// Closes a socket so that the device's end gets a reset.
fn reset(peer: TcpStream) {
    sys::socket::set_reset_on_close(&peer, true).expect("set");
    drop(peer);
}

/// The flags of the shutdowns that the guest gets from now on, until it is told of both directions.
#[track_caller]
fn shutdowns(bench: &mut Bench) -> Vec<(Vec<u8>, u32)> {
    let mut all = Vec::new();
    until(bench, |bench| {
        let room = bench.rx.room();
        bench.post(room, 4096);
        all.extend(bench.received().into_iter().map(|(packet, data)| (data, packet.flags)));
        all.last().is_some_and(|(_, flags)| *flags == SEND | RECEIVE).then_some(())
    });
    all
}

// ---- TCP ---------------------------------------------------------------------------------------

#[test]
fn a_flow_that_the_guest_ends_first_keeps_the_peers_half() {
    let mut bench = Bench::started();
    let (ports, mut peer) = connected(&mut bench);
    bench.tell(data(ports), b"question");
    assert_eq!(read_until(&mut bench, &mut peer, 8), (b"question".to_vec(), Tail::More));
    bench.tell(shutdown(ports, SEND), &[]);
    assert_eq!(read_until(&mut bench, &mut peer, 1), (vec![], Tail::End));
    peer.write_all(b"answer").expect("written");
    expect(&mut bench, &[(DATA, ports, chunk(b"answer"))]);
    drop(peer);
    expect(
        &mut bench,
        &[(DATA, ports, END.into()), (SHUTDOWN, ports, vec![]), (RST, ports, vec![])],
    );
    assert_eq!(bench.look().connections, 0);
}

#[test]
fn a_flow_that_the_peer_ends_first_keeps_the_guests_half() {
    let mut bench = Bench::started();
    let (ports, mut peer) = connected(&mut bench);
    peer.write_all(b"greeting").expect("written");
    peer.shutdown(Shutdown::Write).expect("shut");
    let mut stream = Vec::new();
    until(&mut bench, |bench| {
        let packets = bench.collect();
        stream.extend(packets.iter().flat_map(|(.., data)| data.clone()));
        packets.last().is_some_and(|(op, ..)| *op == SHUTDOWN).then_some(())
    });
    assert_eq!(stream, [chunk(b"greeting"), END.into()].concat());
    bench.tell(data(ports), b"reply");
    assert_eq!(read_until(&mut bench, &mut peer, 5), (b"reply".to_vec(), Tail::More));
    bench.tell(shutdown(ports, SEND), &[]);
    assert_eq!(read_until(&mut bench, &mut peer, 1), (vec![], Tail::End));
    assert_eq!(bench.ops(), [RST]);
    assert_eq!(bench.look().connections, 0);
}

#[test]
fn a_guest_that_ends_both_at_once_or_resets_resets_the_peer() {
    for last in [
        |ports| shutdown(ports, SEND | RECEIVE),
        |ports| Packet::new(Op::Reset, ports),
        // Nothing a guest may do to an open connection.
        |ports| Packet::new(Op::Request, ports),
    ] {
        for peer_ended in [false, true] {
            let mut bench = Bench::started();
            let (ports, mut peer) = connected(&mut bench);
            bench.tell(data(ports), b"some");
            assert_eq!(read_until(&mut bench, &mut peer, 4).0, b"some");
            if peer_ended {
                peer.shutdown(Shutdown::Write).expect("shut");
                expect(&mut bench, &[(DATA, ports, END.into()), (SHUTDOWN, ports, vec![])]);
            }
            bench.tell(last(ports), &[]);
            bench.collect();
            assert_eq!(read_until(&mut bench, &mut peer, 1), (vec![], Tail::Reset));
            assert_eq!(bench.look().connections, 0);
        }
    }
}

#[test]
fn a_guest_that_closes_after_its_own_end_does_not_reset_the_peer() {
    for last in [
        |ports| shutdown(ports, SEND | RECEIVE),
        |ports| shutdown(ports, RECEIVE),
        |ports| Packet::new(Op::Reset, ports),
    ] {
        let mut bench = Bench::started();
        let (ports, mut peer) = connected(&mut bench);
        bench.send(data(ports), b"all there is");
        bench.send(shutdown(ports, SEND), &[]);
        bench.tell(last(ports), &[]);
        bench.collect();
        assert_eq!(read_until(&mut bench, &mut peer, 99), (b"all there is".to_vec(), Tail::End));
        assert_eq!(bench.look().connections, 0);
    }
}

#[test]
fn an_abort_overtakes_what_the_peer_has_not_read() {
    let mut bench = Bench::started();
    let (ports, mut peer) = connected(&mut bench);
    while bench.look().most_bytes == 0 {
        bench.tell(data(ports), &[1; MAX_PACKET]);
    }
    bench.collect();
    bench.tell(shutdown(ports, SEND | RECEIVE), &[]);
    assert_eq!(bench.look().most_bytes, 0);
    assert!(bench.ops().contains(&RST));
    assert_eq!(read_until(&mut bench, &mut peer, usize::MAX).1, Tail::Reset);
}

#[test]
fn a_stream_that_is_cut_off_by_the_end_of_the_box_is_reset() {
    for end in [Mux::close, Mux::reset] {
        let mut bench = Bench::started();
        let (cut, mut reset) = connected(&mut bench);
        let (whole, mut ended) = connected(&mut bench);
        bench.tell(data(cut), b"not all");
        bench.send(data(whole), b"all");
        bench.send(shutdown(whole, SEND), &[]);
        bench.call(end);
        assert_eq!(read_until(&mut bench, &mut reset, 99).1, Tail::Reset);
        assert_eq!(read_until(&mut bench, &mut ended, 99), (b"all".to_vec(), Tail::End));
        assert_eq!(bench.look().connections, 0);
    }
}

#[test]
fn a_peer_that_resets_is_no_end_in_order() {
    // Cases: what the guest and the peer had done before.
    for (guest_ended, bytes) in [(false, 0), (false, 4), (true, 0), (true, 4)] {
        let mut bench = Bench::started();
        let (ports, mut peer) = connected(&mut bench);
        if guest_ended {
            bench.tell(shutdown(ports, SEND), &[]);
            assert_eq!(read_until(&mut bench, &mut peer, 1).1, Tail::End);
        }
        peer.write_all(&[7; 4][..bytes]).expect("written");
        reset(peer);
        let mut packets = Vec::new();
        until(&mut bench, |bench| {
            packets.extend(bench.collect());
            packets.iter().any(|(op, ..)| *op == SHUTDOWN).then_some(())
        });
        let stream: Vec<u8> = packets.iter().flat_map(|(.., data)| data.clone()).collect();
        assert!(!stream.ends_with(&END) || stream.is_empty(), "{packets:?}");
        if !guest_ended {
            bench.tell(Packet::new(Op::Reset, ports), &[]);
        }
        assert_eq!(bench.look().connections, 0);
    }
}

#[test]
fn a_reset_that_writing_finds_first_is_no_end_in_order_either() {
    let mut bench = Bench::started();
    let (ports, peer) = connected(&mut bench);
    reset(peer);
    // In the same turn as the event of the reset, and before that event.
    bench.send(data(ports), b"into the void");
    bench.call_only(|mux, watcher| mux.handle(Source::Transmit.to_number(), EventSet::IN, watcher));
    assert!(shutdowns(&mut bench).iter().all(|(data, _)| data.is_empty()));
}

#[test]
fn a_peer_that_ends_and_then_resets_had_ended() {
    let mut bench = Bench::started();
    let (ports, peer) = connected(&mut bench);
    // Closed, with nothing unread: an end, until the guest sends more.
    drop(peer);
    expect(&mut bench, &[(DATA, ports, END.into()), (SHUTDOWN, ports, vec![])]);
    bench.tell(data(ports), b"is anybody there");
    assert_eq!(shutdowns(&mut bench), [(vec![], SEND | RECEIVE)]);
}

#[test]
fn thousands_of_connections_have_small_buffers() {
    let mut bench = Bench::started();
    let mut rooms = Vec::new();
    for guest in 0..LARGE_BUFFERS as u32 + 50 {
        bench.tell(Packet::new(Op::Request, Ports { host: FLOW_PORT, guest }), &[]);
        bench.post(1, 64);
        rooms.extend(bench.received().into_iter().map(|(packet, _)| packet.buf_alloc as usize));
    }
    let expected = [vec![BUFFER_LEN; LARGE_BUFFERS], vec![SMALL_BUFFER_LEN; 50]].concat();
    assert_eq!(rooms, expected);
}

#[test]
fn a_peer_that_does_not_read_holds_up_its_own_flow_only() {
    let mut bench = Bench::started();
    let (slow, mut reader) = connected(&mut bench);
    let (quick, mut peer) = connected(&mut bench);
    let (mut sent, mut taken) = (REQUEST_LEN, 0);
    for _ in 0..1000 {
        let len = (BUFFER_LEN - (sent - taken)).min(MAX_PACKET);
        if len == 0 {
            break;
        }
        bench.tell(data(slow), &vec![3; len]);
        sent += len;
        let room = bench.rx.room();
        bench.post(room, 64);
        for (packet, _) in bench.received() {
            assert_eq!(packet.ports(), slow);
            taken = packet.fwd_cnt as usize;
        }
    }
    assert!(sent - taken > BUFFER_LEN / 2, "the credit is used up");
    for _ in 0..10 {
        bench.tell(data(quick), b"ping");
        assert_eq!(read_until(&mut bench, &mut peer, 4).0, b"ping");
        peer.write_all(b"pong").expect("written");
        expect(&mut bench, &[(DATA, quick, chunk(b"pong"))]);
    }
    let (received, _) = read_until(&mut bench, &mut reader, sent - REQUEST_LEN);
    assert_eq!(received.len(), sent - REQUEST_LEN);
}

#[test]
fn a_peer_that_takes_nothing_does_not_keep_what_the_guest_has_closed() {
    let mut bench = Bench::started();
    let (ports, mut peer) = connected(&mut bench);
    let mut sent = 0;
    while bench.look().most_bytes < BUFFER_LEN / 2 {
        bench.tell(data(ports), &[7; 65_536]);
        sent += 65_536;
    }
    // As Linux closes a socket whose peer does not: both directions, and at last a reset.
    bench.tell(Packet { flags: SEND, ..Packet::new(Op::Shutdown, ports) }, &[]);
    bench.tell(Packet::new(Op::Reset, ports), &[]);
    bench.collect();
    assert_eq!(bench.look().connections, 1, "bytes are left to deliver");
    let due = bench.deadline().expect("not for good");
    bench.call(|mux, watcher| mux.end_round(due - Duration::from_secs(1), watcher));
    assert_eq!(bench.look().connections, 1, "not before its time");
    bench.call(|mux, watcher| mux.end_round(due, watcher));
    assert_eq!((bench.look().connections, bench.deadline()), (0, None));
    assert_eq!(bench.ops(), [0; 0], "the guest knows of none");
    let (received, tail) = read_until(&mut bench, &mut peer, sent);
    assert!(tail == Tail::Reset && received.len() < sent);
}

#[test]
fn clients_of_the_boxs_sockets_leave_room_for_its_flows() {
    sys::process::raise_open_file_limit();
    let mut bench = Bench::started();
    let clients: Vec<_> = (0..MAX_CLIENTS + 5).map(|_| bench.connect(0)).collect();
    bench.run();
    let tails = clients.into_iter().map(|mut client| read_all(&mut client).1);
    assert_eq!(tails.filter(|tail| *tail == Tail::End).count(), 5);
    while !bench.collect().is_empty() {}
    let (ports, mut peer) = connected(&mut bench);
    bench.tell(data(ports), b"through");
    assert_eq!(read_until(&mut bench, &mut peer, 7).0, b"through");
}

#[test]
fn chunks_arrive_whole_however_little_room_there_is() {
    for buffer in [45, 46, 48, 49, 50, 100] {
        let mut bench = Bench::started();
        let (ports, mut peer) = connected(&mut bench);
        bench.use_up_buffers();
        let sent: Vec<u8> = (0..200).collect();
        peer.write_all(&sent).expect("written");
        peer.shutdown(Shutdown::Write).expect("shut");
        let mut stream = Vec::new();
        until(&mut bench, |bench| {
            bench.post(10, buffer);
            let packets = bench.received();
            stream.extend(packets.iter().flat_map(|(_, data)| data.clone()));
            packets.iter().any(|(packet, _)| packet.op == SHUTDOWN).then_some(())
        });
        assert_eq!(joined(&stream), sent, "buffers of {buffer}");
        assert_serves_flow(&mut bench, ports, &mut peer);
    }
}

#[test]
fn chunks_keep_to_the_guests_credit() {
    let mut bench = Bench::started();
    let (ports, mut peer) = connected(&mut bench);
    let sent: Vec<u8> = (0..100).collect();
    bench.tell(Packet { buf_alloc: 1, fwd_cnt: 2, ..Packet::new(Op::CreditUpdate, ports) }, &[]);
    peer.write_all(&sent).expect("written");
    peer.shutdown(Shutdown::Write).expect("shut");
    let (mut stream, mut step) = (Vec::new(), 0);
    until(&mut bench, |bench| {
        let packets = bench.collect();
        let new: Vec<u8> = packets.iter().flat_map(|(.., data)| data.clone()).collect();
        assert!(new.len() <= 1 + step % 7, "{} bytes", new.len());
        stream.extend(new);
        // Room for one byte more, or a few.
        step += 1;
        let fwd_cnt = 2 + stream.len() as u32;
        let buf_alloc = 1 + step as u32 % 7;
        bench.tell(Packet { buf_alloc, fwd_cnt, ..Packet::new(Op::CreditUpdate, ports) }, &[]);
        packets.iter().any(|(op, ..)| *op == SHUTDOWN).then_some(())
    });
    assert_eq!(joined(&stream), sent);
}

/// The bytes of a stream of chunks that must end with the empty one.
fn joined(mut stream: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let (header, rest) = stream.split_first_chunk::<4>().expect("a header");
        let (data, rest) = rest.split_at(u32::from_be_bytes(*header) as usize);
        if data.is_empty() {
            assert!(rest.is_empty());
            return all;
        }
        all.extend(data);
        stream = rest;
    }
}

fn assert_serves_flow(bench: &mut Bench, ports: Ports, peer: &mut TcpStream) {
    bench.tell(data(ports), b"still there");
    assert_eq!(read_until(bench, peer, 11).0, b"still there");
}

#[test]
fn a_megabyte_each_way_arrives() {
    let mut bench = Bench::started();
    let (ports, mut peer) = connected(&mut bench);
    let mut dice = Dice(7);
    let [up, down] = [0; 2].map(|_| dice.bytes(1 << 20));
    let (mut said, mut written, mut taken, mut shut) = (0, 0, 0, false);
    let (mut heard, mut stream) = (Vec::new(), Vec::new());
    let (mut peer_ended, mut guest_heard_end) = (false, false);
    until(&mut bench, |bench| {
        let credit = BUFFER_LEN - (said - taken);
        let len = dice.up_to(MAX_PACKET).min(credit).min(up.len() - said);
        let fwd_cnt = 2 + stream.len() as u32;
        let about = |packet: Packet| Packet { fwd_cnt, ..packet };
        if len > 0 {
            bench.tell(about(data(ports)), &up[said..said + len]);
            said += len;
        } else if said == up.len() && !std::mem::replace(&mut shut, true) {
            bench.tell(about(shutdown(ports, SEND)), &[]);
        }
        bench.tell(about(Packet::new(Op::CreditUpdate, ports)), &[]);
        let rest = &down[written..];
        if rest.is_empty() && !peer_ended {
            peer.shutdown(Shutdown::Write).expect("shut");
            peer_ended = true;
        }
        written += peer.write(&rest[..dice.up_to(200_000).min(rest.len())]).unwrap_or(0);
        let (bytes, _) = read_all(&mut peer);
        heard.extend(bytes);
        for _ in 0..bench.rx.room().min(100) {
            bench.rx.add(&[Buffer::Empty(45 + dice.up_to(8000) as u32)]);
        }
        bench.run();
        for (packet, data) in bench.received() {
            stream.extend(data);
            taken = taken.max((packet.fwd_cnt as usize).saturating_sub(REQUEST_LEN));
            guest_heard_end |= packet.op == SHUTDOWN;
        }
        (guest_heard_end && heard.len() == up.len()).then_some(())
    });
    assert!(heard == up);
    assert!(joined(&stream) == down);
}

// ---- requests ----------------------------------------------------------------------------------

#[test]
fn a_request_may_come_in_pieces_and_with_the_first_bytes() {
    let server = server();
    let request = request(Protocol::Tcp, server.local_addr().expect("bound"));
    for (size, end) in [(1, SEND), (19, SEND), (20, SEND), (99, SEND)] {
        let mut bench = Bench::started();
        let ports = bench.open_flow();
        let all = [&request[..], b"first bytes"].concat();
        for piece in all.chunks(size) {
            bench.send(data(ports), piece);
        }
        bench.tell(shutdown(ports, end), &[]);
        expect(&mut bench, &[(DATA, ports, OK.into())]);
        let (mut peer, _) = server.accept().expect("a client");
        peer.set_nonblocking(true).expect("non-blocking");
        assert_eq!(read_until(&mut bench, &mut peer, 99), (b"first bytes".to_vec(), Tail::End));
    }
}

#[test]
fn what_cannot_be_connected_gets_the_reason_and_an_end() {
    let closed = server().local_addr().expect("bound");
    let closed_ipv6 = InetAddr::from((std::net::Ipv6Addr::LOCALHOST, closed.port()));
    for (protocol, destination, errno) in [
        (Protocol::Tcp, closed, libc::ECONNREFUSED),
        (Protocol::Tcp, closed_ipv6, libc::ECONNREFUSED),
        (Protocol::Tcp, "0.0.0.0:80".parse().expect("an address"), libc::ECONNREFUSED),
        (Protocol::Udp, "224.0.0.1:80".parse().expect("an address"), libc::ENETUNREACH),
        (Protocol::Udp, "192.0.2.1:0".parse().expect("an address"), libc::EINVAL),
    ] {
        let mut bench = Bench::started();
        let ports = bench.open_flow();
        bench.send(data(ports), &request(protocol, destination));
        bench.tell(data(ports), b"for nobody");
        let status = vec![0, errno as u8];
        expect(&mut bench, &[(DATA, ports, status), (SHUTDOWN, ports, vec![])]);
        bench.tell(data(ports), b"more");
        assert_eq!(bench.ops(), [0; 0]);
        bench.tell(shutdown(ports, SEND | RECEIVE), &[]);
        assert_eq!(bench.ops(), [RST]);
        assert_eq!(bench.look().connections, 0);
    }
}

#[test]
fn requests_that_say_nothing_are_reset() {
    let good = request(Protocol::Tcp, server().local_addr().expect("bound"));
    let unknown = [&[1][..], &good[1..]].concat();
    let (zero, ones) = ([0; REQUEST_LEN], [0xff; 60_000]);
    for nonsense in [&unknown[..], &zero, &ones] {
        let mut bench = Bench::started();
        let ports = bench.open_flow();
        bench.tell(data(ports), nonsense);
        assert_eq!(bench.ops(), [RST]);
        assert_eq!(bench.look().connections, 0);
    }
    for len in [0, 1, 19] {
        for (last, answer) in [
            (shutdown(STRAY, SEND), &[RST][..]),
            (shutdown(STRAY, SEND | RECEIVE), &[RST]),
            (Packet::new(Op::Reset, STRAY), &[]),
        ] {
            let mut bench = Bench::started();
            let ports = bench.open_flow();
            if len > 0 {
                bench.tell(data(ports), &good[..len]);
            }
            bench.tell(Packet { from: (3, ports.guest), to: (2, ports.host), ..last }, &[]);
            assert_eq!(bench.ops(), answer);
            assert_eq!(bench.look().connections, 0);
        }
    }
}

#[test]
fn a_flow_that_does_not_say_where_to_is_closed_in_time() {
    let mut bench = Bench::started();
    let silent = bench.open_flow();
    let half = bench.open_flow();
    bench.tell(data(half), &[6, 0, 0, 80]);
    let (used, mut peer) = connected(&mut bench);
    assert!(bench.deadline().is_some_and(|at| at <= Instant::now() + FLOW_LIMIT));
    bench.let_requests_expire();
    assert_eq!(bench.look().connections, 3, "not before its time");
    bench.let_flows_expire();
    assert_eq!(bench.collect(), [(RST, silent, vec![]), (RST, half, vec![])]);
    assert_serves_flow(&mut bench, used, &mut peer);
    assert_eq!(bench.deadline(), None);
}

#[test]
fn without_a_policy_there_are_no_flows() {
    let mut bench = Bench::started();
    bench.call(|mux, _| {
        mux.outgoing = None;
        Ok(())
    });
    let ports = Ports { host: FLOW_PORT, guest: 5000 };
    bench.tell(Packet::new(Op::Request, ports), &[]);
    assert_eq!(bench.collect(), [(RST, ports, vec![])]);
}

#[test]
fn as_many_flows_as_there_may_be_leave_room_for_clients() {
    let mut bench = Bench::started();
    let flow = |guest| Ports { host: FLOW_PORT, guest };
    let mut answers = Vec::new();
    for guest in 0..MAX_FLOWS as u32 + 5 {
        bench.tell(Packet::new(Op::Request, flow(guest)), &[]);
        answers.extend(bench.ops());
    }
    let refused = answers.iter().filter(|op| **op == RST).count();
    assert_eq!((bench.look().connections, refused), (MAX_FLOWS, 5));
    let (ports, mut client) = bench.open_client();
    assert_serves(&mut bench, ports, &mut client);
    bench.let_flows_expire();
    assert_eq!(bench.look().connections, 1);
    bench.collect();
    connected(&mut bench);
}

// ---- UDP ---------------------------------------------------------------------------------------

fn udp_server() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    socket
}

/// A UDP flow and its peer, which is connected to it.
#[track_caller]
fn udp_connected(bench: &mut Bench) -> (Ports, UdpSocket) {
    let peer = udp_server();
    let ports = bench.open_flow();
    bench.tell(data(ports), &request(Protocol::Udp, peer.local_addr().expect("bound")));
    expect(bench, &[(DATA, ports, OK.into())]);
    bench.tell(data(ports), &datagram(b"hello"));
    let mut bytes = [0; 9];
    let (len, from) = peer.recv_from(&mut bytes).expect("a datagram");
    assert_eq!(bytes[..len], *b"hello");
    peer.connect(from).expect("connected");
    (ports, peer)
}

fn receive(peer: &UdpSocket) -> Vec<u8> {
    let mut bytes = vec![0; 70_000];
    let len = peer.recv(&mut bytes).expect("a datagram");
    bytes.truncate(len);
    bytes
}

#[test]
fn datagrams_travel_both_ways_however_they_are_cut() {
    let mut bench = Bench::started();
    let (ports, peer) = udp_connected(&mut bench);
    let long = vec![9; 65_507];
    let datagrams = [&b"one"[..], b"", b"three", &long];
    let all: Vec<u8> = datagrams.iter().flat_map(|bytes| datagram(bytes)).collect();
    for size in [10_001, MAX_PACKET] {
        for piece in all.chunks(size) {
            bench.tell(data(ports), piece);
        }
        for expected in datagrams {
            assert_eq!(receive(&peer), expected);
        }
    }
    for bytes in datagrams {
        peer.send(bytes).expect("sent");
    }
    let mut stream = Vec::new();
    until(&mut bench, |bench| {
        stream.extend(bench.collect().into_iter().flat_map(|(op, _, data)| {
            assert!([DATA, CREDIT_UPDATE].contains(&op));
            data
        }));
        (stream.len() >= all.len()).then_some(())
    });
    assert!(stream == all);
}

#[test]
fn datagrams_wait_in_their_socket_for_credit() {
    let mut bench = Bench::started();
    let (ports, peer) = udp_connected(&mut bench);
    // Three bytes of credit: the first datagram is begun, and nothing else taken.
    bench.tell(Packet { buf_alloc: 3, fwd_cnt: 2, ..Packet::new(Op::CreditUpdate, ports) }, &[]);
    for _ in 0..2000 {
        // What does not fit into the socket's buffer is dropped by the kernel.
        let _ = peer.send(&[8; 1000]);
    }
    let begun: Vec<u8> = bench.collect().into_iter().flat_map(|(.., data)| data).collect();
    assert_eq!(begun, [3, 232, 8]);
    let update = Packet { fwd_cnt: 5, ..Packet::new(Op::CreditUpdate, ports) };
    bench.tell(update, &[]);
    let stream: Vec<u8> = bench.collect().into_iter().flat_map(|(.., data)| data).collect();
    let stream = [begun, stream].concat();
    assert!(stream.len() > 10 * 1002, "{}", stream.len());
    // One may be on its way in part, when the guest's buffer is full.
    assert!(stream.chunks(1002).all(|bytes| bytes[..2] == [3, 232]));
}

#[test]
fn errors_of_datagrams_are_reported_and_end_nothing() {
    let mut bench = Bench::started();
    let (ports, peer) = udp_connected(&mut bench);
    let address = peer.local_addr().expect("bound");
    // Longer than IPv4 allows.
    bench.tell(data(ports), &datagram(&vec![1; MAX_DATAGRAM_LEN]));
    let too_long = [0xff, 0xff, 0, libc::EMSGSIZE as u8];
    expect(&mut bench, &[(DATA, ports, too_long.into())]);
    // The peer has gone, which the host finds out after sending.
    drop(peer);
    bench.tell(data(ports), &datagram(b"lost"));
    let refused = [0xff, 0xff, 0, libc::ECONNREFUSED as u8];
    expect(&mut bench, &[(DATA, ports, refused.into())]);
    // The error of one datagram does not lose the next.
    bench.send(data(ports), &datagram(b"lost"));
    bench.call_only(|mux, watcher| mux.handle(Source::Transmit.to_number(), EventSet::IN, watcher));
    let peer = UdpSocket::bind(address).expect("free again");
    peer.set_read_timeout(Some(PATIENCE)).expect("set");
    bench.tell(data(ports), &datagram(b"found"));
    assert_eq!(receive(&peer), b"found");
}

#[test]
fn a_flow_that_breaks_its_framing_and_is_reset_leaves_nothing() {
    let mut bench = Bench::started();
    let (ports, _peer) = udp_connected(&mut bench);
    // Both in one batch: the device sees the impossible length when the guest has already forgotten
    // the connection.
    bench.send(data(ports), &[0xff; DATAGRAM_HEADER_LEN]);
    bench.tell(Packet::new(Op::Reset, ports), &[]);
    assert_eq!((bench.look().connections, bench.deadline()), (0, None));
    expect(&mut bench, &[]);
}

#[test]
fn errors_that_nobody_takes_stay_bounded() {
    let mut bench = Bench::started();
    let (ports, peer) = udp_connected(&mut bench);
    drop(peer);
    bench.tell(Packet { buf_alloc: 2, fwd_cnt: 2, ..Packet::new(Op::CreditUpdate, ports) }, &[]);
    let stingy = Packet { buf_alloc: 2, fwd_cnt: 2, ..data(ports) };
    for _ in 0..100 {
        bench.tell(stingy, &datagram(b"lost"));
        sleep(Duration::from_micros(100));
    }
    let update = Packet { fwd_cnt: 4, ..Packet::new(Op::CreditUpdate, ports) };
    bench.tell(update, &[]);
    let stream: Vec<u8> = bench.collect().into_iter().flat_map(|(.., data)| data).collect();
    assert!(stream.len() <= 12, "{stream:?}");
}

#[test]
fn a_flood_of_empty_datagrams_is_cut_into_turns() {
    let mut bench = Bench::started();
    let (ports, _peer) = udp_connected(&mut bench);
    let (other, mut stream) = connected(&mut bench);
    let flood = vec![0; MAX_PACKET];
    bench.send(data(ports), &flood);
    bench.send(data(other), b"in between");
    bench.tx.kick_anyway();
    bench.turn();
    assert!(bench.look().most_bytes > MAX_PACKET / 2, "one turn sends few");
    assert_eq!(read_until(&mut bench, &mut stream, 10).0, b"in between");
    bench.run();
    assert_eq!(bench.look().most_bytes, 0, "all are sent in time");
    bench.collect();

    // The end of the connection does not lose them; a reset of the device does.
    bench.send(data(ports), &flood);
    bench.tell(shutdown(ports, SEND | RECEIVE), &[]);
    assert_eq!(bench.collect().last(), Some(&(RST, ports, vec![])));
    assert_eq!(bench.look().connections, 1);
    let (ports, _peer) = udp_connected(&mut bench);
    bench.send(data(ports), &flood);
    bench.tx.kick_anyway();
    bench.turn();
    bench.call(Mux::reset);
    assert_eq!(bench.look().connections, 0);
}

#[test]
fn a_length_that_no_datagram_has_is_reset() {
    for header in [[0xff, 0xf8], [0xff, 0xff]] {
        let mut bench = Bench::started();
        let (ports, peer) = udp_connected(&mut bench);
        bench.send(data(ports), &datagram(b"before"));
        bench.tell(data(ports), &[&header[..], &[0; 100]].concat());
        assert_eq!(bench.ops(), [RST]);
        assert_eq!(receive(&peer), b"before");
        assert_eq!(bench.look().connections, 0);
    }
}

#[test]
fn datagrams_sent_before_the_end_arrive_and_half_of_one_does_not_stay() {
    for last in [|ports| shutdown(ports, SEND | RECEIVE), |ports| Packet::new(Op::Reset, ports)] {
        let mut bench = Bench::started();
        let (ports, peer) = udp_connected(&mut bench);
        bench.send(data(ports), &datagram(b"last words"));
        bench.send(data(ports), &datagram(b"half")[..DATAGRAM_HEADER_LEN + 2]);
        bench.tell(last(ports), &[]);
        bench.collect();
        assert_eq!(receive(&peer), b"last words");
        assert_eq!(bench.look().connections, 0);
    }
}

#[test]
fn a_guest_that_ends_its_half_still_receives_datagrams() {
    let mut bench = Bench::started();
    let (ports, peer) = udp_connected(&mut bench);
    bench.tell(shutdown(ports, SEND), &[]);
    peer.send(b"reply").expect("sent");
    expect(&mut bench, &[(DATA, ports, datagram(b"reply"))]);
}

// ---- published ports ---------------------------------------------------------------------------

const GUEST_PORT: u16 = 80;

/// A device with one published port, in service, its guest not ready; and where that port is.
fn published() -> (Bench, InetAddr) {
    let socket = server();
    socket.set_nonblocking(true).expect("non-blocking");
    let address = socket.local_addr().expect("bound");
    let listeners = vec![Listener::Published { socket, guest_port: GUEST_PORT }];
    let mut bench = Bench::with(HashMap::new(), listeners, HashMap::new(), Vec::new());
    bench.activate();
    (bench, address)
}

fn client(address: InetAddr) -> TcpStream {
    let client = TcpStream::connect(address).expect("connected");
    client.set_nonblocking(true).expect("non-blocking");
    client
}

#[track_caller]
fn requested(bench: &mut Bench) -> Ports {
    let (op, ports, _) = until(bench, |bench| bench.collect().pop());
    assert_eq!((op, ports.guest), (REQUEST, PUBLISH_PORT));
    ports
}

#[test]
fn clients_of_published_ports_wait_for_the_guest_and_are_announced() {
    let (mut bench, address) = published();
    let mut early = client(address);
    early.write_all(b"GET").expect("written");
    bench.let_requests_expire();
    assert_eq!((bench.look().connections, bench.ops()), (0, vec![]));
    bench.call(Mux::guest_is_ready);
    let ports = requested(&mut bench);
    bench.tell(Packet::new(Op::Response, ports), &[]);
    let client = early.local_addr().expect("bound");
    let header = Published { protocol: Protocol::Tcp, guest_port: GUEST_PORT, client };
    assert_eq!(header.encode().len(), PUBLISHED_LEN);
    expect(&mut bench, &[(DATA, ports, header.encode().into()), (DATA, ports, chunk(b"GET"))]);

    // Half-close, both ways.
    early.shutdown(Shutdown::Write).expect("shut");
    expect(&mut bench, &[(DATA, ports, END.into()), (SHUTDOWN, ports, vec![])]);
    bench.send(data(ports), b"200 OK");
    bench.tell(shutdown(ports, SEND), &[]);
    assert_eq!(read_until(&mut bench, &mut early, 99), (b"200 OK".to_vec(), Tail::End));
    assert_eq!(bench.ops(), [RST]);
    assert_eq!(bench.look().connections, 0);
}

#[test]
fn clients_that_the_guest_cannot_serve_are_reset() {
    let (mut bench, address) = published();
    bench.call(Mux::guest_is_ready);
    // Nobody listens in the guest; the agent is not there; nobody answers.
    for case in 0..3 {
        let mut client = client(address);
        let ports = requested(&mut bench);
        match case {
            0 => {
                bench.tell(Packet::new(Op::Response, ports), &[]);
                assert_eq!(bench.ops(), [DATA]);
                bench.tell(shutdown(ports, SEND | RECEIVE), &[]);
                bench.collect();
            }
            1 => bench.tell(Packet::new(Op::Reset, ports), &[]),
            _ => bench.let_flows_expire(),
        }
        assert_eq!(read_until(&mut bench, &mut client, 1), (vec![], Tail::Reset), "case {case}");
        assert_eq!(bench.look().connections, 0);
        bench.collect();
    }
}

#[test]
fn clients_beyond_the_limit_wait_for_room() {
    let (mut bench, address) = published();
    bench.call(|mux, watcher| {
        mux.table.flows += MAX_FLOWS;
        mux.guest_is_ready(watcher)
    });
    let mut client = client(address);
    until(&mut bench, |bench| bench.deadline());
    assert_eq!((bench.look().connections, read_all(&mut client)), (0, (vec![], Tail::More)));
    bench.call(|mux, _| {
        mux.table.flows -= MAX_FLOWS;
        Ok(())
    });
    bench.call(|mux, watcher| mux.end_round(Instant::now() + ACCEPT_PAUSE, watcher));
    requested(&mut bench);
}

#[test]
fn a_client_that_resets_before_the_guest_answers_is_announced_as_gone() {
    let (mut bench, address) = published();
    bench.call(Mux::guest_is_ready);
    let client = client(address);
    let ports = requested(&mut bench);
    reset(client);
    bench.run();
    bench.tell(Packet::new(Op::Response, ports), &[]);
    let packets = shutdowns(&mut bench);
    let [(header, _), (nothing, _)] = &packets[..] else { panic!("{packets:?}") };
    assert_eq!((header.len(), nothing.len()), (PUBLISHED_LEN, 0));
}

#[test]
fn a_second_ready_mark_changes_nothing() {
    let (mut bench, address) = published();
    bench.call(Mux::guest_is_ready);
    bench.call(Mux::guest_is_ready);
    let _client = client(address);
    requested(&mut bench);
}

// ---- everything at random ----------------------------------------------------------------------

fn disturb(seed: u64) {
    let mut dice = Dice(seed);
    let (tcp, udp) = (server(), udp_server());
    tcp.set_nonblocking(true).expect("non-blocking");
    let requests = [
        request(Protocol::Tcp, tcp.local_addr().expect("bound")).to_vec(),
        [
            &request(Protocol::Udp, udp.local_addr().expect("bound"))[..],
            &datagram(b"fine"),
            &datagram(&[1; 40]),
        ]
        .concat(),
        request(Protocol::Udp, server().local_addr().expect("closed")).to_vec(),
        vec![],
    ];
    let mut bench = Bench::started();
    let body = |number: u64| (1 + number) << 20;
    for (number, bytes) in requests.iter().enumerate() {
        bench.ram().write_slice(bytes, GuestAddress(body(number as u64))).expect("in RAM");
    }
    let mut peers: Vec<TcpStream> = Vec::new();
    for _ in 0..3000 {
        let ports = Ports { host: FLOW_PORT, guest: dice.next() as u32 % 30 };
        match dice.next() % 64 {
            0 => bench.activate(),
            1 => bench.call_only(Mux::reset),
            2 => bench.let_flows_expire(),
            3..10 => peers.extend(tcp.accept().map(|(peer, _)| {
                peer.set_nonblocking(true).expect("non-blocking");
                peer
            })),
            10..18 if !peers.is_empty() => {
                let index = dice.next() as usize % peers.len();
                let peer = &mut peers[index];
                match dice.next() % 8 {
                    0 => drop(peers.swap_remove(index)),
                    1 => reset(peers.swap_remove(index)),
                    2 => peer.shutdown(Shutdown::Write).unwrap_or(()),
                    3 | 4 => drop(peer.read(&mut [0; 5000])),
                    _ => drop(peer.write(&[1; 5000])),
                }
            }
            18..28 => bench.send(Packet::new(Op::Request, ports), &[]),
            28..34 => {
                let bytes = &requests[dice.next() as usize % requests.len()];
                bench.send(data(ports), bytes);
            }
            34..44 if bench.tx.room() > 2 => {
                let packet = odd_packet(&mut dice, &[ports]);
                let at = body(dice.next() % requests.len() as u64);
                let body = Buffer::Raw(at, packet.len.min(100_000), 0);
                bench.tx.add(&[Buffer::Full(&packet.bytes()), body]);
            }
            44..52 => {
                for _ in 0..bench.rx.room().min(dice.up_to(20)) {
                    bench.rx.add(&[Buffer::Empty(dice.next() as u32 % 500)]);
                }
            }
            _ => {
                bench.run();
                bench.tx.returned();
                bench.rx.returned();
            }
        }
        assert_eq!(bench.failure(), None, "seed {seed}");
        assert!(bench.look().most_bytes <= BUFFER_LEN);
    }
    // Nothing is left.
    bench.call(Mux::reset);
    drop((peers, tcp));
    until(&mut bench, |bench| (bench.look().connections == 0).then_some(()));
    bench.call(|mux, _| {
        assert_eq!((mux.table.flows, mux.table.deadlines.len()), (0, 0));
        Ok(())
    });
    bench.activate();
    let (ports, mut peer) = connected(&mut bench);
    assert_serves_flow(&mut bench, ports, &mut peer);
}

#[test]
fn no_mixture_of_odd_flows_and_peers_does_lasting_harm() {
    for seed in 0..16 {
        disturb(seed);
    }
}

/// A device with a published UDP port, in service, its guest ready; and where that port is.
fn published_datagrams() -> (Bench, InetAddr) {
    let socket = sys::socket::bind_udp("127.0.0.1:0".parse().expect("an address")).expect("bound");
    let address = socket.local_addr().expect("bound");
    let listeners = vec![Listener::Datagrams { socket: Rc::new(socket), guest_port: GUEST_PORT }];
    let mut bench = Bench::with(HashMap::new(), listeners, HashMap::new(), Vec::new());
    bench.activate();
    bench.call(Mux::guest_is_ready);
    (bench, address)
}

fn datagram_client(address: InetAddr) -> UdpSocket {
    let client = UdpSocket::bind("127.0.0.1:0").expect("bound");
    client.connect(address).expect("connected");
    client.set_nonblocking(true).expect("non-blocking");
    client
}

#[test]
fn each_client_of_a_udp_port_is_a_flow() {
    let (mut bench, address) = published_datagrams();
    let clients = [datagram_client(address), datagram_client(address)];
    let flows = [b"one", b"two"].map(|text| {
        let client = &clients[usize::from(text == b"two")];
        client.send(text).expect("sent");
        client.send(b"").expect("sent");
        let ports = requested(&mut bench);
        bench.tell(Packet::new(Op::Response, ports), &[]);
        let client = client.local_addr().expect("bound");
        let header = Published { protocol: Protocol::Udp, guest_port: GUEST_PORT, client };
        let expected = [header.encode().into(), datagram(text), datagram(b"")];
        expect(&mut bench, &expected.map(|bytes| (DATA, ports, bytes)));
        ports
    });
    // Each gets its own answers, from the port to which it sent.
    for (client, ports) in clients.iter().zip(flows).rev() {
        bench.send(data(ports), &datagram(&ports.host.to_be_bytes()));
        let mut buffer = [0; 16];
        let len = until(&mut bench, |_| client.recv(&mut buffer).ok());
        assert_eq!(buffer[..len], ports.host.to_be_bytes());
    }
    // What comes later belongs to the same flow.
    clients[0].send(b"again").expect("sent");
    expect(&mut bench, &[(DATA, flows[0], datagram(b"again"))]);
}

#[test]
fn a_client_of_a_udp_port_is_forgotten_when_idle() {
    let (mut bench, address) = published_datagrams();
    let client = datagram_client(address);
    client.send(b"ask").expect("sent");
    let ports = requested(&mut bench);
    bench.tell(Packet::new(Op::Response, ports), &[]);
    until(&mut bench, |bench| (bench.ops() == [DATA, DATA]).then_some(()));
    bench.let_flows_expire();
    assert_eq!((bench.look().connections, bench.ops()), (0, vec![RST]));
    // It is a new one then.
    client.send(b"ask").expect("sent");
    assert_ne!(requested(&mut bench), ports);
}

#[test]
fn a_guest_that_takes_nothing_does_not_make_mote_keep_everything() {
    let (mut bench, address) = published_datagrams();
    let client = datagram_client(address);
    client.send(b"ask").expect("sent");
    let ports = requested(&mut bench);
    for _ in 0..100 {
        client.send(&[7; 8192]).expect("sent");
        bench.look();
    }
    bench.tell(Packet::new(Op::Response, ports), &[]);
    let mut received = 0;
    until(&mut bench, |bench| {
        let new = bench.collect().iter().map(|(_, _, bytes)| bytes.len()).sum::<usize>();
        received += new;
        (new == 0).then_some(())
    });
    assert!(received <= 257 << 10, "{received} bytes");
}

#[test]
fn a_new_client_takes_the_place_of_one_that_has_not_been_answered() {
    let (mut bench, address) = published_datagrams();
    let answered = datagram_client(address);
    answered.send(b"ask").expect("sent");
    let ports = requested(&mut bench);
    bench.tell(Packet::new(Op::Response, ports), &[]);
    bench.send(data(ports), &datagram(b"answer"));
    until(&mut bench, |_| answered.recv(&mut [0; 9]).ok());
    for _ in 0..1100 {
        datagram_client(address).send(b"ask").expect("sent");
        bench.run();
        bench.collect();
    }
    assert_eq!(bench.look().connections, 1024);
    // The one whom the server has answered is there.
    answered.send(b"again").expect("sent");
    let (op, of, bytes) = until(&mut bench, |bench| bench.collect().pop());
    assert_eq!((op, of, bytes), (DATA, ports, datagram(b"again")));
}
