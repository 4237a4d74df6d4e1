//! The fault matrix: what a failing host, a careless caller or a dying back-end does to a box, and what
//! is promised then: the exit code, a line that says why, and nothing left behind. Rows that belong to
//! one feature are with that feature's tests.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::client::{self, HEARTBEAT};
use crate::common::{Ran, Started, TestBox, eventually, eventually_nothing, executable, mote};
use crate::passt::{accept, assert_frames_pass, small_box};
use crate::processes::{
    children_of, has_vcpu, is_frozen, kill, name_of, own_memory_kib, processes_with, virtiofsd_of,
};
use crate::traced::confined_before;

/// A box that runs this script, on mote's own streams.
fn box_that(script: &str) -> TestBox {
    TestBox::busybox().shell(script).with("console_output", json!(null))
}

/// The output of a command that has run mote.
fn finished(test: &TestBox, command: &mut Command) -> Ran {
    test.finished(command.output().expect("mote runs"))
}

/// Fails unless the box did not start and this line, and no other, says why.
fn assert_not_started(ran: &Ran, parts: &[&str]) {
    assert_eq!(ran.code, 125, "{}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.starts_with("mote: "), "{}", ran.stderr);
    for part in parts {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
}

/// A file system in memory of this size on a directory of a test's.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn on(dir: &Path, options: &str) -> Self {
        fs::create_dir_all(dir).expect("directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir);
        assert!(mount.status().expect("mount runs").success());
        SmallDisk(dir.into())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

// ---- virtiofsd ---------------------------------------------------------------------------------

/// As much of a vhost-user back-end as mote's start needs (vhost-user.rst), until the message KIND
/// arrives; then a signal of its own hits it.
const BACK_END: &str = r#"#!/usr/bin/python3
import os, signal, socket, struct
conn, _ = socket.socket(fileno=3).accept()
while True:
    kind, _, size = struct.unpack("<III", conn.recv(12, socket.MSG_WAITALL))
    if size:
        conn.recv(size, socket.MSG_WAITALL)
    if kind == KIND:
        os.kill(os.getpid(), signal.SIGNAL)
    answer = {1: 1 << 30 | 1 << 32, 15: 1}.get(kind)
    if answer is not None:
        conn.sendall(struct.pack("<IIIQ", kind, 5, 8, answer))
"#;
/// The kinds of message: the first that is answered, the last before the guest runs, and the first
/// that the guest's driver causes.
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;

/// A box whose virtiofsd is this script, and the command that runs it.
fn on_back_end(test: &TestBox, script: &str) -> Command {
    let program = test.path("out/virtiofsd");
    executable(&program, script.as_bytes());
    let mut command = test.command();
    command.env("MOTE_VIRTIOFSD", program);
    command
}

fn dies_at(kind: u32, signal: &str) -> String {
    BACK_END.replace("KIND", &kind.to_string()).replace("SIGNAL", signal)
}

#[test]
fn a_virtiofsd_killed_before_the_guest_runs_is_named() {
    for script in ["#!/bin/sh\nkill -9 $$\n", &dies_at(GET_FEATURES, "SIGKILL")] {
        let test = box_that("exit 0");
        let ran = finished(&test, &mut on_back_end(&test, script));
        let root = format!("virtiofsd for the root file system ({}", test.path("root").display());
        assert_not_started(&ran, &[&root, "ended (signal: 9 (SIGKILL))"]);
        assert_eq!(ran.outcome["kind"], "not-started");
    }
}

#[test]
fn a_virtiofsd_killed_while_the_guest_boots_is_named() {
    for kind in [SET_MEM_TABLE, SET_VRING_NUM] {
        let test = box_that("exit 0");
        let ran = finished(&test, &mut on_back_end(&test, &dies_at(kind, "SIGKILL")));
        assert_eq!((ran.code, &ran.outcome["kind"]), (124, &json!("backend-died")));
        let last = ran.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("mote: virtiofsd for the root file system ("), "{}", ran.stderr);
        assert!(last.ends_with("ended (signal: 9 (SIGKILL))"), "{}", ran.stderr);
    }
}

#[test]
fn a_virtiofsd_that_freezes_at_its_start_is_given_up() {
    for script in ["#!/bin/sh\nkill -STOP $$\n", &dies_at(GET_FEATURES, "SIGSTOP")] {
        let test = box_that("exit 0");
        let ran = finished(&test, &mut on_back_end(&test, script));
        assert_not_started(
            &ran,
            &["virtiofsd for the root file system (", "ended (it did not answer)"],
        );
    }
}

#[test]
fn a_box_whose_virtiofsd_froze_while_it_booted_can_be_stopped() {
    let test = box_that("exit 0");
    let started = started_on_back_end(&test, &dies_at(SET_VRING_NUM, "SIGSTOP"));
    eventually("it is frozen", || virtiofsd_of(&test.dir).into_iter().any(is_frozen));
    started.signal(libc::SIGTERM);
    started.signal(libc::SIGINT);
    let ran = test.finished(started.finish());
    assert_eq!((ran.code, &ran.outcome["kind"]), (121, &json!("stopped")), "{}", ran.stderr);
}

/// A box whose virtiofsd is this script, in the background.
fn started_on_back_end(test: &TestBox, script: &str) -> Started {
    let program = test.path("out/virtiofsd");
    executable(&program, script.as_bytes());
    test.start_within(&["env", &format!("MOTE_VIRTIOFSD={}", program.display())])
}

#[test]
fn a_virtiofsd_that_has_been_taken_over_ends_with_its_box() {
    // It serves in a child, as the real one does, which heeds no signal and no end of its connection.
    let serving = BACK_END.replace("if kind == KIND:", "if False:").replace("SIGNAL", "SIGKILL");
    let (imports, serve) = serving.split_once("conn, _").expect("a script");
    let script = format!(
        "{imports}if os.fork():\n    os.wait()\n    os._exit(0)\nfor number in (1, 2, 3, 15):\n    signal.signal(number, signal.SIG_IGN)\ntry:\n    conn, _{}\nfinally:\n    signal.pause()\n",
        serve.trim_end().replace('\n', "\n    ")
    );
    for signals in [[libc::SIGKILL].as_slice(), &[libc::SIGTERM, libc::SIGINT]] {
        let test = box_that("exit 0");
        let started = started_on_back_end(&test, &script);
        eventually("the guest boots", || has_vcpu(started.child.id()));
        assert_eq!(virtiofsd_of(&test.dir).len(), 2);
        signals.iter().for_each(|signal| started.signal(*signal));
        let status = started.finish().status;
        assert!(status.signal() == Some(libc::SIGKILL) || status.code() == Some(121), "{status}");
        eventually_nothing("of its virtiofsd", || processes_with(&test.dir));
    }
}

/// Kills all processes of the box's virtiofsd, or stops them.
fn hit_virtiofsd(test: &TestBox, signal: i32) {
    let pids = virtiofsd_of(&test.dir);
    assert!(!pids.is_empty());
    for pid in pids {
        // It is two processes, and one may take the other along.
        let mut kill = Command::new("kill");
        let _ = kill.arg(format!("-{signal}")).arg(pid.to_string()).stderr(Stdio::null()).status();
    }
}

#[test]
fn a_virtiofsd_killed_under_load_ends_the_box() {
    let test = box_that(
        "echo ready; while :; do dd if=/dev/zero of=/file bs=64k count=64 2>/dev/null; cat /file >/dev/null; done",
    );
    let mut started = test.start();
    started.wait_for_line("ready");
    eventually("the guest writes", || test.path("root/file").exists());
    hit_virtiofsd(&test, libc::SIGKILL);
    let ran = test.finished(started.finish());
    assert_eq!((ran.code, &ran.outcome["kind"]), (124, &json!("backend-died")));
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("virtiofsd for the root file system ("), "{}", ran.stderr);
}

#[test]
fn a_virtiofsd_killed_while_the_box_stops_ends_it() {
    let test =
        box_that("trap 'echo stopping; sleep 1000' TERM; echo ready; while :; do sleep 1; done");
    let mut started = test.start();
    started.wait_for_line("ready");
    started.signal(libc::SIGTERM);
    // The shell runs its trap when the sleep, which the signal has hit as well, has ended.
    started.wait_for_line("stopping");
    hit_virtiofsd(&test, libc::SIGKILL);
    let ran = test.finished(started.finish());
    assert_eq!((ran.code, &ran.outcome["kind"]), (124, &json!("backend-died")));
}

/// Lines of output, together more than a pipe holds and less than all buffers on the way.
const LINES: usize = 20_000;

fn lines() -> String {
    (1..=LINES).map(|n| format!("{n}\n")).collect()
}

#[test]
fn output_from_before_virtiofsds_death_arrives() {
    let test = box_that(&format!("seq {LINES}; touch /written; sleep 1000"));
    let started = test.start();
    eventually("all is written", || test.path("root/written").exists());
    // The output is on its way, and goes no further than to mote: nobody reads it. Whoever is asked
    // answers after it.
    for _ in 0..3 {
        assert_eq!(client::shell(&test, "echo there"), "there\n");
    }
    hit_virtiofsd(&test, libc::SIGKILL);
    let ran = test.finished(started.finish());
    assert_eq!((ran.code, &ran.outcome["kind"]), (124, &json!("backend-died")), "{}", ran.stderr);
    assert!(ran.stdout == lines(), "{} bytes of {}", ran.stdout.len(), lines().len());
}

#[test]
fn a_box_on_a_frozen_virtiofsd_can_be_stopped() {
    // One that waits for the file system, and one that does not.
    for script in ["while :; do cat /etc/passwd >/dev/null; done", "exec sleep 1000"] {
        for signals in [&[libc::SIGTERM][..], &[libc::SIGTERM, libc::SIGINT]] {
            let test = box_that(&format!("echo ready; {script}"));
            let mut started = test.start();
            started.wait_for_line("ready");
            hit_virtiofsd(&test, libc::SIGSTOP);
            for signal in signals {
                started.signal(*signal);
            }
            let ran = test.finished(started.finish());
            assert_eq!(
                (ran.code, &ran.outcome["kind"]),
                (121, &json!("stopped")),
                "{}",
                ran.stderr
            );
            let why =
                if signals.len() == 1 { "stop within 8 s of SIGTERM" } else { "second signal" };
            assert!(ran.stderr.contains(why), "{}", ran.stderr);
        }
    }
}

#[test]
fn a_virtiofsd_frozen_for_a_while_costs_only_time() {
    let test = box_that("echo ready; until [ -e /over ]; do sleep 0.1; done; exit 8");
    let mut started = test.start();
    started.wait_for_line("ready");
    hit_virtiofsd(&test, libc::SIGSTOP);
    fs::write(test.path("root/over"), "").expect("file");
    hit_virtiofsd(&test, libc::SIGCONT);
    assert_eq!(test.finished(started.finish()).code, 8);
}

// ---- passt -------------------------------------------------------------------------------------

#[test]
fn a_frozen_passt_holds_up_nothing_else() {
    let (dir, test) = small_box();
    let listener = UnixListener::bind(dir.socket()).expect("binds");
    // The gateway's address is known when it has asked; then large packets go out all the time.
    let script = "echo ready; until [ -e /go ]; do sleep 0.1; done
        for i in $(seq 40); do busybox ping -s 60000 10.88.0.1 >/dev/null & done; wait";
    let test = test.shell(script).with("console_output", json!(null));
    let mut started = test.start();
    let mut passt = accept(&listener);
    started.wait_for_line("ready");
    assert_frames_pass(&mut passt);
    fs::write(test.path("root/go"), "").expect("file");
    // From here on it reads nothing: what fits in the socket has left the guest, and no more will.
    let stuck = "sent() { cat /sys/class/net/eth0/statistics/tx_bytes; }
        before=$(sent); sleep 3; [ $before -gt 100000 ] && [ $before = $(sent) ] && echo stuck";
    eventually("nothing is sent any more", || client::shell(&test, stuck) == "stuck\n");
    assert_eq!(client::shell(&test, "echo served"), "served\n");
    let own_kib = own_memory_kib(started.child.id());
    assert!(own_kib < 16 * 1024, "{own_kib} KiB of memory");
    started.signal(libc::SIGTERM);
    let ran = test.finished(started.finish());
    assert_eq!((ran.code, ran.stderr.as_str()), (143, ""));
}

#[test]
fn a_flooding_passt_holds_up_nothing_else() {
    let (dir, test) = small_box();
    let listener = UnixListener::bind(dir.socket()).expect("binds");
    let test = test.shell("echo ready; exec sleep 10000").with("console_output", json!(null));
    let mut started = test.start();
    let mut passt = accept(&listener);
    started.wait_for_line("ready");
    assert_frames_pass(&mut passt);
    // Broadcasts of all sizes, until mote ends.
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
    let own_kib = own_memory_kib(started.child.id());
    assert!(own_kib < 16 * 1024, "{own_kib} KiB of memory");
    started.signal(libc::SIGTERM);
    let ran = test.finished(started.finish());
    assert_eq!((ran.code, ran.stderr.as_str()), (143, ""));
    assert!(flood.join().expect("ends") > 0);
}

// ---- clients -----------------------------------------------------------------------------------

#[test]
fn a_client_killed_in_mid_stream_takes_its_command_along() {
    let (test, started) = TestBox::busybox().idle();
    for _ in 0..3 {
        let mut client = Command::new(mote())
            .arg("exec")
            .arg(test.path("sock/exec.sock"))
            .args(["--", "dd", "if=/dev/zero", "bs=65537"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("mote starts");
        let mut stream = client.stdout.take().expect("stdout");
        stream.read_exact(&mut vec![0; 1 << 20]).expect("it streams");
        kill(client.id(), libc::SIGKILL);
        client.wait().expect("waits");
        drop(stream);
        eventually("the command ends", || !client::shell(&test, "ps").contains("bs=65537"));
    }
    assert_eq!(client::shell(&test, "echo served"), "served\n");
    started.stop(&test);
}

#[test]
fn a_caller_that_closes_its_ends_still_gets_the_exit_code() {
    let test = box_that(
        "echo ready; until [ -e /closed ]; do sleep 0.1; done; seq 50000; seq 50000 >&2; touch /done; exit 7",
    );
    let mut started = test.start();
    started.wait_for_line("ready");
    let Started { child, .. } = &mut started;
    drop(child.stderr.take());
    drop(std::mem::replace(&mut started.stdout, std::io::BufReader::new(closed_stdout())));
    fs::write(test.path("root/closed"), "").expect("file");
    let status = started.child.wait().expect("waits");
    let ran = test.finished(Output { status, stdout: Vec::new(), stderr: Vec::new() });
    assert_eq!((ran.code, &ran.outcome["kind"]), (7, &json!("exited")));
    assert!(test.path("root/done").exists());
}

/// Somebody else's standard output, at its end.
fn closed_stdout() -> std::process::ChildStdout {
    let mut child = Command::new("true").stdout(Stdio::piped()).spawn().expect("true runs");
    child.wait().expect("waits");
    child.stdout.take().expect("stdout")
}

#[test]
fn a_caller_that_never_had_open_ends_gets_the_exit_code() {
    let test = box_that("echo lost; echo lost >&2; exit 7");
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" <&- >&- 2>&-", "sh"]).arg(mote());
    command
        .args(["--config", &test.spec.to_string(), "--outcome"])
        .arg(test.path("out/outcome.json"));
    let ran = finished(&test, command.env("TMPDIR", test.path("tmp")));
    assert_eq!((ran.code, &ran.outcome["kind"]), (7, &json!("exited")));
}

// ---- full disks --------------------------------------------------------------------------------

#[test]
fn a_full_disk_under_console_output_costs_output_only() {
    let test = TestBox::busybox().shell("seq 100000; echo more; exit 6");
    let _disk = SmallDisk::on(&test.path("small"), "size=64k");
    let log = test.path("small/console.log");
    let test = test.with("console_output", json!(log));
    let ran = test.run();
    assert_eq!((ran.code, &ran.outcome["kind"]), (6, &json!("exited")));
    assert_eq!(
        ran.stderr,
        "mote: stdout: write the guest's output: No space left on device (os error 28); the rest of it is lost\n"
    );
    let all: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    let kept = fs::read_to_string(log).expect("there");
    assert!(kept.len() >= 60 * 1024 && all.starts_with(&kept), "{} bytes", kept.len());
}

#[test]
fn a_full_root_share_is_the_guests_to_handle() {
    let test = box_that(
        "dd if=/dev/zero of=/small/big bs=64k 2>&1 | grep -o 'No space.*'
         rm /small/big; echo again >/small/file && cat /small/file; exit 6",
    );
    let _disk = SmallDisk::on(&test.path("root/small"), "size=1m");
    let ran = test.run();
    assert_eq!(ran.code, 6);
    assert_eq!(
        (ran.stdout.as_str(), ran.stderr.as_str()),
        ("No space left on device\nagain\n", "")
    );
}

/// Runs the box with its outcome in this file.
fn reporting_to(test: &TestBox, file: &Path) -> Ran {
    let mut command = Command::new(mote());
    command.args(["--config", &test.spec.to_string(), "--outcome"]).arg(file);
    finished(test, command.env("TMPDIR", test.path("tmp")))
}

#[test]
fn an_outcome_file_that_cannot_be_written_costs_one_line() {
    let test = box_that("exit 6");
    let _disk = SmallDisk::on(&test.path("small"), "size=4k,nr_inodes=3");
    fs::write(test.path("small/all"), [0; 4096]).expect("room for this");
    let file = test.path("small/outcome.json");
    let ran = reporting_to(&test, &file);
    assert_eq!(ran.code, 6);
    let expected = format!("mote: write the outcome to {}: No space left", file.display());
    assert!(ran.stderr.starts_with(&expected), "{}", ran.stderr);
}

#[test]
fn an_outcome_file_that_cannot_be_created_is_said_before_anything_runs() {
    let test = box_that("exit 6");
    let file = test.path("no/outcome.json");
    let ran = reporting_to(&test, &file);
    let expected = format!("mote: create the outcome file {}: No such file", file.display());
    assert!(ran.code == 125 && ran.stderr.starts_with(&expected), "{} {}", ran.code, ran.stderr);
}

#[test]
fn a_socket_directory_that_is_full_is_named() {
    let test = box_that("exit 0");
    let _disk = SmallDisk::on(&test.path("full"), "size=4k,nr_inodes=1");
    let socket = test.path("full/exec.sock");
    let ran = test.with("exec_socket_path", json!(socket)).run();
    let said = format!("listen on {}: No space left on device", socket.display());
    assert_not_started(&ran, &[&said]);
}

// ---- limits of the host ------------------------------------------------------------------------

/// Runs the box under a limit of prlimit(1).
fn under_limit(test: &TestBox, limit: &str) -> Ran {
    test.finished(test.start_within(&["prlimit", limit]).finish())
}

#[test]
fn with_too_few_open_files_a_box_does_not_start_or_runs() {
    let test = box_that("exit 9");
    let mut refused = 0;
    for files in (8..).step_by(3) {
        let ran = under_limit(&test, &format!("--nofile={files}"));
        if ran.code == 9 {
            assert_eq!(ran.stderr, "", "{files} files");
            break;
        }
        assert_not_started(&ran, &["Too many open files"]);
        assert!(files < 128, "it never runs");
        refused += 1;
    }
    assert!(refused > 0);
}

#[test]
fn clients_beyond_the_open_file_limit_harm_nobody() {
    let test = box_that("echo ready; exec sleep 10000");
    let mut started = test.start_within(&["prlimit", "--nofile=64"]);
    started.wait_for_line("ready");
    // More than there is room for: they wait in the socket's queue, or are closed.
    let clients: Vec<_> = (0..100).map(|_| client::Client::connect(&test, "exec")).collect();
    let mut served = 0;
    for mut client in clients {
        // What is closed at once, with the request unread, is a reset or a broken pipe.
        let _ = client.0.write_all(&[HEARTBEAT, 0, 0, 0, 0]);
        let mut answer = Vec::new();
        let _ = client.0.read_to_end(&mut answer);
        served += usize::from(answer == [HEARTBEAT, 0, 0, 0, 0]);
    }
    assert!(served > 10, "{served} of 100");
    assert_eq!(client::shell(&test, "echo served"), "served\n");
    started.stop(&test);
}

#[test]
fn no_room_for_the_guests_memory_is_said() {
    let test = box_that("exit 0");
    let ran = under_limit(&test, &format!("--as={}", 200 << 20));
    assert_not_started(&ran, &["map 256 MiB of guest memory: Cannot allocate memory"]);
}

/// The host's setting for huge pages of shared memory; set back at the end.
struct HugePagesSetting(String);

impl HugePagesSetting {
    const FILE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

    fn never() -> Self {
        let before = fs::read_to_string(Self::FILE).expect("a kernel with huge pages");
        let before = before.split(['[', ']']).nth(1).expect("a setting").to_owned();
        fs::write(Self::FILE, "never").expect("set");
        HugePagesSetting(before)
    }
}

impl Drop for HugePagesSetting {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, &self.0);
    }
}

#[test]
fn memory_that_the_host_takes_away_ends_the_box_with_the_reason() {
    // A host that says `never` has mote use a file that is not sealed, which can be cut short.
    let _never = HugePagesSetting::never();
    let test = box_that("echo ready; while :; do :; done");
    let mut started = test.start();
    started.wait_for_line("ready");
    let files = fs::read_dir(format!("/proc/{}/fd", started.child.id())).expect("descriptors");
    let len = 256 << 20;
    let memory = files
        .flatten()
        .map(|entry| entry.path())
        .find(|path| fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == len));
    let memory = fs::OpenOptions::new().write(true).open(memory.expect("guest memory"));
    memory.and_then(|file| file.set_len(0)).expect("cut short");
    let ran = test.finished(started.finish());
    assert_eq!((ran.code, &ran.outcome["kind"]), (120, &json!("memory-gone")), "{}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("found no memory behind guest memory"), "{}", ran.stderr);
}

/// A cgroup of the test's own, with a limit on memory.
struct MemoryCgroup(PathBuf);

impl MemoryCgroup {
    fn new(max_mib: u64) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory").expect("cgroup v2 with memory");
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = root.join(format!("mote-test-{}-{count:04}", std::process::id()));
        fs::create_dir(&dir).expect("cgroup");
        fs::write(dir.join("memory.max"), (max_mib << 20).to_string()).expect("a limit");
        MemoryCgroup(dir)
    }

    /// Words in front of a command that start it in here.
    fn enter(&self) -> [String; 5] {
        let script = "echo $$ >\"$0\" && exec \"$@\"";
        let procs = self.0.join("cgroup.procs");
        let procs = procs.to_str().expect("text").to_owned();
        ["sh".into(), "-c".into(), script.into(), procs, "env".into()]
    }

    fn was_exceeded(&self) -> bool {
        let events = fs::read_to_string(self.0.join("memory.events")).expect("events");
        events.lines().any(|line| line.starts_with("oom_kill ") && line != "oom_kill 0")
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_box_beyond_memory_max_ends_and_leaves_nothing() {
    // At its start, and when the guest takes what the spec grants and the cgroup does not.
    for (max_mib, script) in [
        (24, "exit 0"),
        (160, "echo ready; dd if=/dev/zero of=/dev/shm/all bs=1M count=200; exit 0"),
    ] {
        let cgroup = MemoryCgroup::new(max_mib);
        let test = box_that(script).with("memory_mib", json!(512));
        let words = cgroup.enter();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let started = test.start_within(&words);
        let output = started.finish();
        // The host's kernel kills the largest process, which is mote: no code, and an outcome file as it
        // was at the start.
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{:?}", output);
        assert!(cgroup.was_exceeded());
        assert_eq!(fs::read(test.path("out/outcome.json")).expect("the file"), b"");
        eventually("its processes end", || processes_with(&test.dir).is_empty());
        // The cgroup is empty as well.
        eventually("nothing runs in the cgroup", || fs::remove_dir(&cgroup.0).is_ok());
        let again = test.shell("exit 4");
        assert_eq!(again.run().code, 4);
    }
}

// ---- SIGKILL -----------------------------------------------------------------------------------

/// Namespaces that a box's processes have and this process has not.
fn namespaces_of(test: &TestBox) -> BTreeSet<PathBuf> {
    let path = test.dir.to_str().expect("text");
    let pids = fs::read_dir("/proc").expect("proc").flatten();
    let of_box = pids.filter(|entry| {
        fs::read(entry.path().join("cmdline"))
            .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(path))
    });
    let own = namespaces_in(Path::new("/proc/self"));
    of_box.flat_map(|entry| namespaces_in(&entry.path())).filter(|ns| !own.contains(ns)).collect()
}

fn namespaces_in(process: &Path) -> BTreeSet<PathBuf> {
    let links = fs::read_dir(process.join("ns")).into_iter().flatten().flatten();
    links.filter_map(|link| fs::read_link(link.path()).ok()).collect()
}

fn all_namespaces() -> BTreeSet<PathBuf> {
    let pids = fs::read_dir("/proc").expect("proc").flatten();
    pids.flat_map(|entry| namespaces_in(&entry.path())).collect()
}

#[test]
fn a_mote_killed_at_any_stage_leaves_nothing() {
    type Stage = (&'static str, fn(&TestBox, &Started) -> bool);
    let stages: [Stage; 7] = [
        ("at once", |_, _| true),
        ("in its cgroup", |test, _| cgroup_of(test).exists()),
        ("socket bound", |test, _| test.path("sock/exec.sock").exists()),
        ("virtiofsd started", |test, _| !virtiofsd_of(&test.dir).is_empty()),
        ("guest boots", |_, started| has_vcpu(started.child.id())),
        ("entrypoint runs", |test, _| test.path("root/up").exists()),
        ("box stops", |test, started| {
            if !test.path("root/up").exists() {
                return false;
            }
            if !test.path("root/told").exists() {
                fs::write(test.path("root/told"), "").expect("file");
                started.signal(libc::SIGTERM);
            }
            test.path("root/stopping").exists()
        }),
    ];
    for (stage, reached) in stages {
        let script =
            "trap 'touch /stopping; sleep 1000' TERM; touch /up; while :; do sleep 1; done";
        let test = box_that(script).with("resource_limits", json!({"cpu_shares": 1024}));
        let started = test.start();
        eventually(stage, || reached(&test, &started));
        let namespaces = namespaces_of(&test);
        started.signal(libc::SIGKILL);
        let status = started.finish().status;
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{stage}");
        let left = || {
            let mut left = left_of(&test);
            let all = all_namespaces();
            let held = namespaces.iter().filter(|ns| all.contains(*ns));
            left.extend(held.map(|ns| ns.display().to_string()));
            left
        };
        eventually_nothing(&format!("of a mote killed {stage}"), left);
    }
}

/// The box's processes, files and cgroup that are still there.
fn left_of(test: &TestBox) -> Vec<String> {
    let mut left = processes_with(&test.dir);
    for sub in ["sock", "tmp"] {
        let files = fs::read_dir(test.path(sub)).expect("directory").flatten();
        left.extend(files.map(|file| file.path().display().to_string()));
    }
    left.extend(cgroup_of(test).exists().then(|| "a cgroup".into()));
    left
}

/// A box with everything that is on the host beside its processes: two sockets and a cgroup.
fn box_with_a_place() -> TestBox {
    let test = box_that("exit 0").with("resource_limits", json!({"cpu_shares": 1024}));
    let pty = test.path("sock/pty.sock");
    test.with("pty_socket_path", json!(pty))
}

#[test]
fn a_mote_killed_anywhere_in_its_start_leaves_nothing() {
    let test = box_with_a_place();
    let mut calls = 0;
    while !confined_before(&mut test.mote(), calls) {
        eventually_nothing(&format!("of a mote killed after {calls} calls"), || left_of(&test));
        calls += CALLS_STEP;
    }
    eventually_nothing("of a mote killed at its filter", || left_of(&test));
    assert!(calls > 100, "confined after {calls} calls already");
}

/// How many system calls one mote that is killed gets further than the one before it: whatever it might
/// leave behind is there for longer.
const CALLS_STEP: usize = 3;

#[test]
fn a_mote_killed_while_its_place_is_made_leaves_nothing_and_is_in_nobodys_way() {
    let test = box_with_a_place();
    // As another box that is being started.
    let parent = Path::new("/sys/fs/cgroup/a3s-box");
    let _ = fs::create_dir(parent);
    let busy = others_lock(parent);
    let started = test.start();
    eventually("its janitor is there", || {
        children_of(started.child.id()).into_iter().any(|pid| name_of(pid) == "mote-janitor")
    });
    started.signal(libc::SIGKILL);
    assert_eq!(started.finish().status.signal(), Some(libc::SIGKILL));
    assert!(!test.path("sock/exec.sock").exists() && !cgroup_of(&test).exists());
    drop(busy);
    let again = test.run();
    assert_eq!((again.code, again.stderr.as_str()), (0, ""));
    eventually_nothing("of both", || left_of(&test));
}

// ---- a signal to stop, before there is a guest ----------------------------------------------------

#[test]
fn a_box_that_waits_for_something_when_it_is_stopped_ends_by_that_signal() {
    let has_socket = |test: &TestBox, _: &Started| test.path("sock/exec.sock").exists();
    let has_janitor = |_: &TestBox, started: &Started| {
        children_of(started.child.id()).into_iter().any(|pid| name_of(pid) == "mote-janitor")
    };
    let virtiofsd_is_frozen =
        |test: &TestBox, _: &Started| virtiofsd_of(&test.dir).into_iter().any(is_frozen);
    type Waits = fn(&TestBox, &Started) -> bool;
    let stopped = |test: TestBox, started: Started, waits: Waits| {
        eventually("it waits", || waits(&test, &started));
        started.signal(libc::SIGTERM);
        let ran = test.finished(started.finish());
        assert_eq!((ran.code, ran.stderr.as_str()), (143, ""));
        assert_eq!(ran.outcome, json!({"kind": "signaled", "exit_code": 143, "signal": 15}));
    };

    // For other boxes' cgroups.
    let test = box_with_a_place();
    let parent = Path::new("/sys/fs/cgroup/a3s-box");
    let _ = fs::create_dir(parent);
    let others = others_lock(parent);
    let started = test.start();
    eventually("it waits", || has_janitor(&test, &started));
    started.signal(libc::SIGTERM);
    let output = started.finish();
    assert_eq!(output.status.code(), Some(143));
    drop(others);
    test.finished(output);

    let (_passt, test) = small_box();
    let started = test.start();
    stopped(test, started, has_socket);

    // By a second signal hard, as ever.
    let (_passt, test) = small_box();
    let started = test.start();
    eventually("it waits", || has_socket(&test, &started));
    for signal in [libc::SIGSTOP, libc::SIGINT, libc::SIGHUP, libc::SIGCONT] {
        started.signal(signal);
    }
    let ran = test.finished(started.finish());
    assert_eq!((ran.code, &ran.outcome["kind"]), (121, &json!("stopped")), "{}", ran.stderr);

    let test = box_that("exit 0");
    let started = started_on_back_end(&test, &dies_at(GET_FEATURES, "SIGSTOP"));
    stopped(test, started, virtiofsd_is_frozen);
}

/// The lock that a box holds while its cgroup comes or goes.
fn others_lock(parent: &Path) -> fs::File {
    let file = fs::OpenOptions::new().write(true).open(parent.join("cgroup.kill"));
    let file = file.expect("Linux 5.14");
    file.lock().expect("locked");
    file
}

fn cgroup_of(test: &TestBox) -> PathBuf {
    Path::new("/sys/fs/cgroup/a3s-box").join(test.spec["box_id"].as_str().expect("text"))
}

// ---- clock -------------------------------------------------------------------------------------

/// The machine's clock as it would have been without the test's jumps; set again at the end.
struct Clock {
    wall: SystemTime,
    steady: Instant,
}

impl Clock {
    fn right(&self) -> Duration {
        (self.wall + self.steady.elapsed()).duration_since(UNIX_EPOCH).expect("after 1970")
    }

    /// Sets the machine's clock to the right time and this many seconds.
    fn jump(&self, by_s: i64) {
        let now = self.right();
        let to = format!("@{}.{:09}", now.as_secs() as i64 + by_s, now.subsec_nanos());
        let status = Command::new("date").args(["-s", &to]).stdout(Stdio::null()).status();
        assert!(status.expect("date runs").success());
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.jump(0);
    }
}

#[test]
fn the_guests_clock_follows_the_hosts_jumps() {
    // Only in the lab, a machine of the tests' own, may the clock be set: elsewhere this test runs
    // itself there.
    if std::env::var_os("MOTE_LAB").is_none() {
        let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/lab.sh");
        let test = std::env::current_exe().expect("this program");
        let name = "faults::the_guests_clock_follows_the_hosts_jumps";
        let status = Command::new(lab).arg(test).args(["--exact", name]).status();
        assert!(status.expect("the lab starts").success(), "failed in the lab");
        return;
    }
    let (test, started) = TestBox::busybox().idle();
    let clock = Clock { wall: SystemTime::now(), steady: Instant::now() };
    for by_s in [86_400, -86_400, 3, -3, 400_000_000, 0] {
        clock.jump(by_s);
        eventually(&format!("the guest's clock is {by_s} s from the right time"), || {
            let said = client::shell(&test, "date +%s");
            let guest: i64 = said.trim().parse().expect("seconds");
            (clock.right().as_secs() as i64 + by_s).abs_diff(guest) <= 1
        });
    }
    started.stop(&test);
}

// ---- names that clash --------------------------------------------------------------------------

#[test]
fn a_second_box_on_the_same_sockets_leaves_the_first_untouched() {
    let (first, running) = TestBox::busybox().idle();
    for socket in ["exec", "pty"] {
        let second = box_that("exit 0");
        let path = first.path(&format!("sock/{socket}.sock"));
        let second = second.with(&format!("{socket}_socket_path"), json!(path));
        let ran = second.run();
        let line = format!("listen on {}: another process listens on it", path.display());
        assert_not_started(&ran, &[&line, "is this box running already?"]);
    }
    assert_eq!(client::shell(&first, "echo served"), "served\n");
    assert!(first.path("sock/pty.sock").exists());
    running.stop(&first);
}

#[test]
fn a_box_id_is_no_path() {
    for id in ["a/b", "../../up", ".", "..", "/", "/run/x", "a\u{0}b"] {
        let test = box_that("hostname; exit 3").with("box_id", json!(id));
        let ran = test.run();
        assert_eq!((ran.code, ran.stderr.as_str(), ran.stdout.as_str()), (3, "", "localhost\n"));

        let limited = test.with("resource_limits", json!({"cpu_shares": 1024}));
        let ran = limited.run();
        assert_not_started(&ran, &["spec: box_id: is \"", "it is the name of a cgroup"]);
    }
    for outside in ["/sys/fs/cgroup/up", "/sys/fs/cgroup/run", "/sys/fs/cgroup/a3s-box/a"] {
        assert!(!Path::new(outside).exists(), "{outside}");
    }
}
