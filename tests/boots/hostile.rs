//! Guests that are out to harm: a kernel of our own in place of Linux (`hostile.c`), whose every
//! access to mote's devices is malicious. Whatever it does, mote ends with one of its own exit codes
//! and says why, or goes on: small, at rest when the guest is, and at its caller's command.
//!
//! A failure names the guest's order; the same order makes the same guest do the same again.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::OnceLock;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client;
use crate::commands::exec;
use crate::common::{Finished, Started, TestBox, compile, eventually};
use crate::passt::network;
use crate::processes::own_memory_kib;

/// mote's own memory whatever its guest does, in KiB: it starts with some 3 MiB, and what a guest
/// can make it hold without a peer outside is a few hundred bytes for each of 4,096 connections.
const MEMORY_LIMIT_KIB: u64 = 16 * 1024;
/// Lines on stderr that a guest can provoke besides the last one: for each of four devices, that it
/// cannot be started and that it is broken.
const MOST_COMPLAINTS: usize = 8;

/// What the guest shall do; `hostile.c` says what that means.
#[derive(Debug, Clone, Copy)]
struct Order {
    mode: &'static str,
    seed: u32,
    /// 0: for ever.
    rounds: u32,
    /// `reset` or `halt`.
    end: &'static str,
    vcpus: u8,
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Order { mode, seed, rounds, end, vcpus } = self;
        write!(f, "{mode} {seed} {rounds} {end} {vcpus}")
    }
}

/// The kernel, compiled once.
fn kernel() -> &'static [u8] {
    static KERNEL: OnceLock<Vec<u8>> = OnceLock::new();
    KERNEL.get_or_init(|| {
        let output = std::env::temp_dir().join(format!("mote-hostile-{}", std::process::id()));
        // It is linked at 16 MiB, where mote's page tables reach. gcc must not make a loop a call of
        // memset or memcpy, since those are such loops here, and must not use SSE.
        let options = "-O1 -static -nostdlib -ffreestanding -fno-stack-protector -mno-red-zone \
            -mgeneral-regs-only -fno-pie -no-pie -fno-tree-loop-distribute-patterns \
            -fcf-protection=none -Wl,-Ttext=0x1000000 -Wl,--build-id=none -Wall -Werror";
        compile("gcc", options, "hostile.c", &output);
        let bytes = fs::read(&output).expect("compiled");
        let _ = fs::remove_file(&output);
        bytes
    })
}

/// A box whose guest has this order.
fn hostile(order: Order) -> TestBox {
    TestBox::busybox()
        .with("memory_mib", json!(128))
        .with("vcpus", json!(order.vcpus))
        .booting(kernel(), format!("{order}\n").as_bytes())
}

/// Stands in for passt: reads what comes, and answers now and then with a frame, to the end.
struct Peer(JoinHandle<()>);

impl Peer {
    /// The box gets a network, of which this is the other end.
    fn of(test: TestBox) -> (TestBox, Peer) {
        let socket = test.path("passt.sock");
        let listener = UnixListener::bind(&socket).expect("binds");
        let peer = thread::spawn(move || {
            let (stream, _) = listener.accept().expect("mote connects");
            serve(stream);
        });
        (test.with("network", network(&socket)), Peer(peer))
    }

    /// Waits until mote has gone.
    fn end(self) {
        self.0.join().expect("the peer ends with mote");
    }
}

fn serve(mut stream: UnixStream) {
    stream.set_write_timeout(Some(Duration::from_millis(100))).expect("set");
    let frame = [&100u32.to_be_bytes()[..], &[0xa5; 100]].concat();
    let mut bytes = vec![0; 1 << 16];
    // After half a frame nothing more is sent: what followed would be this peer's error, not the guest's.
    let mut whole = true;
    while stream.read(&mut bytes).is_ok_and(|read| read > 0) {
        whole = whole && stream.write(&frame).is_ok_and(|written| written == frame.len());
    }
}

/// What a failed assertion shows: the guest's order, and how mote ended.
fn report(order: Order, ran: &Finished) -> String {
    format!("{order}: code {}, outcome {}, stderr: {}", ran.code, ran.outcome, ran.stderr)
}

/// Fails unless mote has ended with one of these codes, and said why in one line.
fn assert_ended(order: Order, ran: &Finished, codes: &[i32]) {
    let report = report(order, ran);
    assert!(codes.contains(&ran.code), "{report}");
    assert_eq!(ran.outcome["exit_code"], ran.code, "{report}");
    let message = ran.outcome["message"].as_str().expect("a reason");
    let lines: Vec<&str> = ran.stderr.lines().collect();
    // It need not be the last line: vCPUs may complain until the process is gone.
    let said = lines.iter().filter(|line| **line == format!("mote: {message}")).count();
    assert_eq!(said, 1, "{report}");
    assert!(lines.iter().all(|line| line.starts_with("mote: ")), "{report}");
    assert!(lines.len() <= MOST_COMPLAINTS + 1, "{report}");
    assert!(ran.console.starts_with(&format!("hostile: {order}\n")), "{report}");
}

/// A hostile guest at work.
struct Running {
    order: Order,
    test: TestBox,
    started: Started,
}

impl Running {
    fn start(order: Order, test: TestBox) -> Self {
        let started = test.start();
        let mut running = Running { order, test, started };
        running.wait_for(&format!("hostile: {order}"));
        running
    }

    /// Waits until the guest has said this.
    fn wait_for(&mut self, line: &str) {
        let console = self.test.path("out/console.log");
        eventually(&format!("{}: says {line:?}", self.order), || {
            fs::read(&console)
                .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).lines().any(|l| l == line))
        });
    }

    fn pid(&self) -> u32 {
        self.started.pid()
    }

    /// Waits until mote has ended, has used so much more processor time (in clock ticks), or has used none
    /// for two seconds.
    fn watch(&mut self, enough_ticks: u64) -> Life {
        let first = ticks(self.pid());
        let (mut last, mut since) = (first, Instant::now());
        while self.started.child.try_wait().expect("waits").is_none() {
            let now = ticks(self.pid());
            if now != last {
                (last, since) = (now, Instant::now());
            }
            if now - first >= enough_ticks {
                return Life::Works;
            }
            if since.elapsed() > Duration::from_secs(2) {
                return Life::Rests;
            }
            thread::sleep(Duration::from_millis(20));
        }
        Life::Over
    }

    fn assert_small(&self) {
        let kib = own_memory_kib(self.pid());
        assert!(kib < MEMORY_LIMIT_KIB, "{}: mote's own memory is {kib} KiB", self.order);
    }

    /// Waits for the end of a box that ends by itself, with one of these codes.
    fn over(self, codes: &[i32]) -> Finished {
        let Running { order, started, .. } = self;
        let ran = started.wait();
        assert_ended(order, &ran, codes);
        ran
    }

    /// Stops the box hard by these signals; mote's message has these words. The guest may have ended by itself at this
    /// very moment, if it can, with one of the codes `own`.
    fn stop(self, signals: &[i32], words: &str, own: &[i32]) {
        for signal in signals {
            self.started.signal(*signal);
        }
        let order = self.order;
        let ran = self.over(&[&[121], own].concat());
        assert!(ran.code != 121 || ran.stderr.contains(words), "{}", report(order, &ran));
    }
}

/// A guest that has used so much processor time, 20 s, and has not ended counts as hanging.
const HANGS_TICKS: u64 = 20 * A_SECOND_TICKS;
const A_SECOND_TICKS: u64 = 100;

/// What has become of a box that was watched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Over,
    Works,
    Rests,
}

/// Processor time that a process has used, in clock ticks, all its threads together.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("runs");
    let (_, fields) = stat.rsplit_once(')').expect("a name");
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // utime and stime, fields 14 and 15 (proc_pid_stat(5)); the first here is field 3.
    [fields[11], fields[12]].map(|ticks| ticks.parse::<u64>().expect("a number")).iter().sum()
}

/// The codes of a guest that ends by itself: a reset, or a crash.
const OWN_ENDS: [i32; 2] = [122, 123];

/// Runs guests with these orders to their ends, each with and without a network of its own. A guest whose
/// devices write where it has told them to may destroy itself before its work is done: it then crashes,
/// or hangs until it is told to stop.
fn assert_ends(orders: &[Order]) {
    let mut reset = false;
    for order in orders {
        let (with_network, peer) = Peer::of(hostile(*order));
        let with_network = end_of(*order, with_network, &OWN_ENDS);
        peer.end();
        let without = end_of(*order, hostile(*order), &OWN_ENDS);
        let mut ran = with_network.into_iter().chain(without);
        reset |= ran.any(|ran| ran.code == 122);
    }
    assert!(reset, "none of the guests with {orders:?} came as far as a reset");
}

/// Waits for a guest's own end, which has one of these codes; stops one that hangs.
fn end_of(order: Order, test: TestBox, codes: &[i32]) -> Option<Finished> {
    let mut running = Running::start(order, test);
    if running.watch(HANGS_TICKS) == Life::Over {
        return Some(running.over(codes));
    }
    running.stop(&[libc::SIGTERM, libc::SIGINT], "stopped hard by a second signal", &OWN_ENDS);
    None
}

// ---- guests that end ---------------------------------------------------------------------------

const RESET: Order = Order { mode: "", seed: 0, rounds: 0, end: "reset", vcpus: 1 };

#[test]
fn random_accesses_to_registers_ports_and_nothing_harm_nobody() {
    let order = Order { mode: "registers", rounds: 1_500, ..RESET };
    let orders = [(1, 1), (2, 2)].map(|(seed, vcpus)| Order { seed, vcpus, ..order });
    assert_ends(&orders);
}

#[test]
fn malicious_chains_and_rings_harm_nobody() {
    let order = Order { mode: "queues", rounds: 100, ..RESET };
    let orders = [(1, 1), (2, 1), (3, 2)].map(|(seed, vcpus)| Order { seed, vcpus, ..order });
    assert_ends(&orders);
}

#[test]
fn virtiofsd_may_end_of_what_its_guest_does_and_that_is_told() {
    let order = Order { mode: "files", rounds: 100, ..RESET };
    for seed in [1, 2, 3, 4] {
        let order = Order { seed, ..order };
        // Such a guest has no agent to say that its file systems are mounted.
        let ran = end_of(order, hostile(order), &[122, 123, 125]);
        if let Some(ran) = ran.filter(|ran| ran.code == 125) {
            let said = ran.stderr.contains("mote: virtiofsd for the root file system (");
            assert!(said, "{}", report(order, &ran));
        }
    }
}

#[test]
fn a_vsock_driver_that_lies_harms_nobody() {
    let order = Order { mode: "vsock", rounds: 300, ..RESET };
    let orders = [(1, 1), (2, 1), (3, 2)].map(|(seed, vcpus)| Order { seed, vcpus, ..order });
    assert_ends(&orders);
}

#[test]
fn a_triple_fault_is_a_crash() {
    let order = Order { mode: "crash", ..RESET };
    let ran = hostile(order).run();
    assert_ended(order, &ran, &[123]);
    assert_eq!(ran.stderr, "mote: the guest kernel crashed (triple fault)\n");
}

#[test]
fn a_broken_ring_ends_its_own_box_only() {
    for seed in 1..=6 {
        let order = Order { mode: "broken", seed, rounds: 300, ..RESET };
        let (test, peer) = Peer::of(hostile(order));
        end_of(order, test, &OWN_ENDS);
        peer.end();
    }
}

// ---- guests that do not ------------------------------------------------------------------------

#[test]
fn when_a_hostile_guest_halts_mote_rests() {
    for (mode, rounds) in [("halt", 0), ("registers", 1000), ("queues", 100), ("vsock", 200)] {
        let order = Order { mode, seed: 5, rounds, end: "halt", vcpus: 2 };
        let mut running = Running::start(order, hostile(order));
        match running.watch(HANGS_TICKS) {
            Life::Works => panic!("{order}: mote never rests"),
            Life::Over => drop(running.over(&OWN_ENDS)),
            Life::Rests => {
                running.assert_small();
                let words = "stopped hard by a second signal (SIGINT)";
                running.stop(&[libc::SIGTERM, libc::SIGINT], words, &[]);
            }
        }
    }
}

#[test]
fn a_guest_that_hangs_with_interrupts_off_is_stopped_hard() {
    let order = Order { mode: "spin", end: "halt", ..RESET };
    let mut running = Running::start(order, hostile(order));
    running.wait_for("hostile: done");
    running.stop(&[libc::SIGTERM], "the guest did not stop within 8 s of SIGTERM", &[]);
}

/// Guests that never end, and the network that each has or has not.
const ENDLESS: [(&str, bool); 4] =
    [("registers", true), ("queues", false), ("vsock", false), ("vsock", true)];

#[test]
fn mote_stays_small_and_heeds_signals_whatever_its_guest_does() {
    for (index, (mode, network)) in ENDLESS.into_iter().enumerate() {
        let order = Order { mode, seed: 7, rounds: 0, end: "halt", vcpus: 2 };
        let (test, peer) = match network {
            true => Some(Peer::of(hostile(order))).unzip(),
            false => (Some(hostile(order)), None),
        };
        let test = test.expect("a box");
        let mut running = Running::start(order, test);
        let mut life = Life::Works;
        for _ in 0..5 {
            life = running.watch(A_SECOND_TICKS);
            if life == Life::Over {
                break;
            }
            running.assert_small();
            // Clients come and go meanwhile.
            for _ in 0..20 {
                let _ = UnixStream::connect(running.test.path("sock/exec.sock"));
            }
        }
        // One that has ended cannot be watched any more.
        if life != Life::Over {
            life = running.watch(0);
        }
        // Alternately by two signals and by one, which takes 8 seconds.
        match index % 2 {
            _ if life == Life::Over => drop(running.over(&OWN_ENDS)),
            0 => running.stop(
                &[libc::SIGTERM, libc::SIGINT],
                "stopped hard by a second signal",
                &OWN_ENDS,
            ),
            _ => running.stop(
                &[libc::SIGTERM],
                "the guest did not stop within 8 s of SIGTERM",
                &OWN_ENDS,
            ),
        }
        if let Some(peer) = peer {
            peer.end();
        }
    }
}

// ---- an ordinary program in an ordinary guest ----------------------------------------------------

#[test]
fn commands_are_served_while_a_program_floods_the_host() {
    let test = TestBox::busybox()
        .with("vcpus", json!(2))
        .without_console_file()
        .with_entrypoint("executable", json!("/bin/flood"));
    let program = test.path("root/bin/flood");
    compile("musl-gcc", "-O1 -static -Wall -Werror", "flood.c", &program);
    let mut started = test.start();
    started.wait_for_line("flooding");
    for turn in 0..5 {
        let output = exec(&test, &[], &["echo", "served"]).output().expect("mote runs");
        assert_eq!(output.stdout, b"served\n", "command {turn}: {output:?}");
        assert_eq!(output.status.code(), Some(0));
        let kib = own_memory_kib(started.pid());
        assert!(kib < MEMORY_LIMIT_KIB, "mote's own memory is {kib} KiB");
    }
    started.stop();
}

#[test]
fn pids_limit_holds_against_a_fork_bomb_and_the_box_still_answers() {
    let test = TestBox::streaming("echo ready; bomb() { bomb | bomb & }; bomb; exec sleep 10000")
        .with("resource_limits", json!({"pids_limit": 50}));
    let started = test.ready();
    // These run as root, whom RLIMIT_NPROC does not limit.
    for _ in 0..5 {
        let said = client::run(&test, &["cat", "/sys/fs/cgroup/pids.max"]);
        assert_eq!((said.stdout.as_str(), said.code), ("50\n", 0), "{}", said.stderr);
        let count = client::run(&test, &["cat", "/sys/fs/cgroup/pids.current"]).stdout;
        // A process that entered from outside is not refused, and counts: this very command.
        let count: u32 = count.trim().parse().expect("a number");
        assert!(count <= 51, "{count} processes");
    }
    let refused = client::run(&test, &["cat", "/sys/fs/cgroup/pids.events"]).stdout;
    assert!(refused.starts_with("max ") && refused != "max 0\n", "{refused}");
    // A command's own children count against the limit.
    let forks = "for i in $(seq 60); do sleep 10000 & done";
    let refused = client::run(&test, &["sh", "-c", forks]);
    assert!(refused.stderr.contains("can't fork"), "{refused:?}");
    // It is stopped hard if the bomb keeps it from ending in time.
    started.signal(libc::SIGTERM);
    started.wait();
}
