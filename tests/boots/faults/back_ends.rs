//! Back-ends that die, freeze or flood: virtiofsd and passt.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use crate::client;
use crate::common::{Started, TestBox, eventually, eventually_nothing, executable, mote, seq};
use crate::passt::{accept, assert_frames_pass, small_box};
use crate::processes::{has_vcpu, is_frozen, own_memory_kib, processes_with, virtiofsd_of};

// ---- virtiofsd ----------------------------------------------------------------------------------

/// As much of a vhost-user back-end as mote's start needs. Its first lines name its settings.
const BACK_END: &str = include_str!("../python/back_end.py");
/// Kinds of message: the first that is answered, the last before the guest runs, and the first that the
/// guest's driver causes.
pub const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;

/// The command that runs a box with this script as its virtiofsd.
fn on_back_end(test: &TestBox, script: &str) -> Command {
    with_back_end(test, script, test.command())
}

/// Starts a box in the background with this script as its virtiofsd.
pub fn started_on_back_end(test: &TestBox, script: &str) -> Started {
    test.start_by(&mut with_back_end(test, script, test.mote()))
}

fn with_back_end(test: &TestBox, script: &str, mut command: Command) -> Command {
    let program = test.path("out/virtiofsd");
    executable(&program, script.as_bytes());
    command.env("MOTE_VIRTIOFSD", program);
    command
}

/// A back-end that a signal hits when the message of this kind arrives.
pub fn dies_at(kind: u32, signal: &str) -> String {
    back_end(&format!("KIND, SIGNAL, STUBBORN = {kind}, '{signal}', False"))
}

fn back_end(settings: &str) -> String {
    format!("#!/usr/bin/python3\n{settings}\n{BACK_END}")
}

#[test]
fn a_virtiofsd_killed_before_the_guest_runs_is_named() {
    for script in ["#!/bin/sh\nkill -9 $$\n", &dies_at(GET_FEATURES, "SIGKILL")] {
        let test = TestBox::streaming("exit 0");
        let ran = test.run_by(&mut on_back_end(&test, script));
        let root = format!("virtiofsd for the root file system ({}", test.path("root").display());
        ran.assert_not_started(&[&root, "ended (signal: 9 (SIGKILL))"]);
        assert_eq!(ran.outcome["kind"], "not-started");
    }
}

#[test]
fn a_virtiofsd_killed_while_the_guest_boots_is_named() {
    for kind in [SET_MEM_TABLE, SET_VRING_NUM] {
        let test = TestBox::streaming("exit 0");
        let ran = test.run_by(&mut on_back_end(&test, &dies_at(kind, "SIGKILL")));
        ran.assert_ended(125, "not-started");
        let last = ran.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("mote: virtiofsd for the root file system ("), "{}", ran.stderr);
        assert!(last.ends_with("ended (signal: 9 (SIGKILL))"), "{}", ran.stderr);
    }
}

#[test]
fn motes_own_virtiofsd_killed_at_its_start_is_named() {
    let test = TestBox::streaming("echo ran");
    let started = test.start();
    // It gets ready while the guest boots, or when that asks for its first file.
    eventually("it is started", || !virtiofsd_of(&test.dir).is_empty());
    hit_virtiofsd(&test, libc::SIGKILL);
    let root = format!("virtiofsd for the root file system ({}", test.path("root").display());
    let ran = started.wait();
    ran.assert_not_started(&[&root, "ended (signal: 9 (SIGKILL))"]);
    assert_eq!(ran.outcome["kind"], "not-started");
}

#[test]
fn motes_own_virtiofsd_ends_if_mote_did_before_there_was_work() {
    // As mote starts it: a socket, what says that there is work, and a standard error, which nobody reads any more.
    let script = r#"mkfifo "$1"; exec 3</dev/null 4<>"$1" 2> >(:); exec -a virtiofsd "$0" off 65536 / read-write"#;
    let test = TestBox::busybox();
    let mut command = Command::new("timeout");
    command.args(["60", "bash", "-c", script]).arg(mote()).arg(test.path("out/work"));
    let status = command.status().expect("runs");
    assert_eq!(status.code(), Some(1), "{status}");
}

#[test]
fn a_virtiofsd_that_freezes_at_its_start_is_given_up() {
    for script in ["#!/bin/sh\nkill -STOP $$\n", &dies_at(GET_FEATURES, "SIGSTOP")] {
        let test = TestBox::streaming("exit 0");
        let ran = test.run_by(&mut on_back_end(&test, script));
        ran.assert_not_started(&[
            "virtiofsd for the root file system (",
            "ended (it did not answer)",
        ]);
    }
}

#[test]
fn a_box_whose_virtiofsd_froze_while_it_booted_can_be_stopped() {
    let test = TestBox::streaming("exit 0");
    let started = started_on_back_end(&test, &dies_at(SET_VRING_NUM, "SIGSTOP"));
    eventually("it is frozen", || virtiofsd_of(&test.dir).into_iter().any(is_frozen));
    started.signal(libc::SIGTERM);
    started.signal(libc::SIGINT);
    let ran = started.wait();
    ran.assert_ended(121, "stopped");
}

#[test]
fn a_virtiofsd_that_has_been_taken_over_ends_with_its_box() {
    let script = back_end("KIND, SIGNAL, STUBBORN = None, None, True");
    for signals in [[libc::SIGKILL].as_slice(), &[libc::SIGTERM, libc::SIGINT]] {
        let test = TestBox::streaming("exit 0");
        let started = started_on_back_end(&test, &script);
        eventually("the guest boots", || has_vcpu(started.pid()));
        assert_eq!(virtiofsd_of(&test.dir).len(), 2);
        signals.iter().for_each(|signal| started.signal(*signal));
        let status = started.wait_with_output().status;
        assert!(status.signal() == Some(libc::SIGKILL) || status.code() == Some(121), "{status}");
        eventually_nothing("of its virtiofsd", || processes_with(&test.dir));
    }
}

/// Sends a signal to all processes of the box's virtiofsd.
fn hit_virtiofsd(test: &TestBox, signal: i32) {
    let pids = virtiofsd_of(&test.dir);
    assert!(!pids.is_empty());
    for pid in pids {
        // It is two processes, and the second may end with the first: an error is expected.
        let mut kill = Command::new("kill");
        let _ = kill.arg(format!("-{signal}")).arg(pid.to_string()).stderr(Stdio::null()).status();
    }
}

#[test]
fn who_stops_all_processes_of_a_box_does_not_take_its_files_away() {
    let test = TestBox::streaming(
        "trap 'cat /bin/busybox | wc -c >/said; exit 7' TERM; echo ready; while :; do sleep 0.1; done",
    );
    let started = test.ready();
    // As systemd does with a scope, in no certain order.
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        hit_virtiofsd(&test, signal);
    }
    started.signal(libc::SIGTERM);
    let ran = started.wait();
    ran.assert_ended(7, "exited");
    let said = fs::read_to_string(test.path("root/said")).expect("written");
    assert!(said.trim().parse::<u64>().expect("a number") > 0);
}

#[test]
fn a_virtiofsd_killed_under_load_ends_the_box() {
    let test = TestBox::streaming(
        "echo ready; while :; do dd if=/dev/zero of=/file bs=64k count=64 2>/dev/null; cat /file >/dev/null; done",
    );
    let started = test.ready();
    eventually("the guest writes", || test.path("root/file").exists());
    hit_virtiofsd(&test, libc::SIGKILL);
    let ran = started.wait();
    ran.assert_ended(124, "backend-died");
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("virtiofsd for the root file system ("), "{}", ran.stderr);
}

#[test]
fn a_virtiofsd_killed_while_the_box_stops_ends_it() {
    let test = TestBox::streaming(
        "trap 'echo stopping; sleep 1000' TERM; echo ready; while :; do sleep 1; done",
    );
    let mut started = test.ready();
    started.signal(libc::SIGTERM);
    // The signal ends the sleep too, and then the shell runs its trap.
    started.wait_for_line("stopping");
    hit_virtiofsd(&test, libc::SIGKILL);
    let ran = started.wait();
    ran.assert_ended(124, "backend-died");
}

#[test]
fn output_from_before_virtiofsds_death_arrives() {
    // More than a pipe holds, and less than all buffers on the way together.
    const LINES: usize = 20_000;
    let test = TestBox::streaming(&format!("seq {LINES}; touch /written; sleep 1000"));
    let started = test.start();
    eventually("all is written", || test.path("root/written").exists());
    // Nobody reads mote's output yet, so the lines stay in mote. The guest answers these commands after
    // it has sent them.
    for _ in 0..3 {
        assert_eq!(client::shell(&test, "echo there"), "there\n");
    }
    hit_virtiofsd(&test, libc::SIGKILL);
    let ran = started.wait();
    ran.assert_ended(124, "backend-died");
    assert!(ran.stdout == seq(LINES), "{} bytes of {}", ran.stdout.len(), seq(LINES).len());
}

#[test]
fn a_box_on_a_frozen_virtiofsd_can_be_stopped() {
    // An entrypoint that waits for the file system, and one that does not.
    for script in ["while :; do cat /etc/passwd >/dev/null; done", "exec sleep 1000"] {
        for signals in [&[libc::SIGTERM][..], &[libc::SIGTERM, libc::SIGINT]] {
            let test = TestBox::streaming(&format!("echo ready; {script}"));
            let started = test.ready();
            hit_virtiofsd(&test, libc::SIGSTOP);
            for signal in signals {
                started.signal(*signal);
            }
            let ran = started.wait();
            ran.assert_ended(121, "stopped");
            let why =
                if signals.len() == 1 { "stop within 8 s of SIGTERM" } else { "second signal" };
            assert!(ran.stderr.contains(why), "{}", ran.stderr);
        }
    }
}

#[test]
fn a_virtiofsd_frozen_for_a_while_costs_only_time() {
    let test = TestBox::streaming("echo ready; until [ -e /over ]; do sleep 0.1; done; exit 8");
    let started = test.ready();
    hit_virtiofsd(&test, libc::SIGSTOP);
    fs::write(test.path("root/over"), "").expect("file");
    hit_virtiofsd(&test, libc::SIGCONT);
    assert_eq!(started.wait().code, 8);
}

// ---- passt --------------------------------------------------------------------------------------

#[test]
fn a_frozen_passt_holds_up_nothing_else() {
    let (dir, test) = small_box();
    let listener = UnixListener::bind(dir.socket()).expect("binds");
    // The guest learns the gateway's hardware address from its question; then it sends large packets.
    let script = "echo ready; until [ -e /go ]; do sleep 0.1; done
        for i in $(seq 40); do busybox ping -s 60000 10.88.0.1 >/dev/null & done; wait";
    let test = test.shell(script).without_console_file();
    let mut started = test.start();
    let mut passt = accept(&listener);
    started.wait_for_line("ready");
    assert_frames_pass(&mut passt);
    fs::write(test.path("root/go"), "").expect("file");
    // From here on nobody reads passt's socket: the guest can send until it is full, and no more.
    let stuck = "sent() { cat /sys/class/net/eth0/statistics/tx_bytes; }
        before=$(sent); sleep 3; [ $before -gt 100000 ] && [ $before = $(sent) ] && echo stuck";
    eventually("nothing is sent any more", || client::shell(&test, stuck) == "stuck\n");
    assert_eq!(client::shell(&test, "echo served"), "served\n");
    let own_kib = own_memory_kib(started.pid());
    assert!(own_kib < 16 * 1024, "{own_kib} KiB of memory");
    assert_eq!(started.stop().stderr, "");
}

#[test]
fn a_flooding_passt_holds_up_nothing_else() {
    let (dir, test) = small_box();
    let listener = UnixListener::bind(dir.socket()).expect("binds");
    let test = test.shell("echo ready; exec sleep 10000").without_console_file();
    let mut started = test.start();
    let mut passt = accept(&listener);
    started.wait_for_line("ready");
    assert_frames_pass(&mut passt);
    // Broadcast frames of several sizes, until mote ends.
    let flood = std::thread::spawn(move || {
        let mut frames = Vec::new();
        for len in [60usize, 1514, 14, 65535, 9000] {
            frames.extend((len as u32).to_be_bytes());
            frames.extend([0xff; 6]);
            frames.resize(frames.len() + len - 6, 0x88);
        }
        let mut floods = 0u64;
        while passt.write_all(&frames).is_ok() {
            floods += 1;
        }
        floods
    });
    let received = || client::shell(&test, "cat /sys/class/net/eth0/statistics/rx_packets");
    let first = received();
    eventually("frames come in", || received() != first);
    for _ in 0..5 {
        assert_eq!(client::shell(&test, "echo served"), "served\n");
    }
    let own_kib = own_memory_kib(started.pid());
    assert!(own_kib < 16 * 1024, "{own_kib} KiB of memory");
    assert_eq!(started.stop().stderr, "");
    assert!(flood.join().expect("ends") > 0);
}
