//! A mote that is killed or told to stop at any moment of its life.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::json;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::back_ends::{GET_FEATURES, dies_at, started_on_back_end};
use crate::common::{Started, TestBox, eventually, eventually_nothing};
use crate::passt::{network, small_box};
use crate::processes::{
    descriptors_of, has_vcpu, is_frozen, janitor_of, processes_with, virtiofsd_of,
};
use crate::traced::{confined_before, descriptor, linger, peek};

// ---- SIGKILL ------------------------------------------------------------------------------------

/// Namespaces that a box's processes are in and this process is not.
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
        ("in its cgroup", |test, _| test.cgroup().exists()),
        ("socket bound", |test, _| test.path("sock/exec.sock").exists()),
        ("virtiofsd started", |test, _| !virtiofsd_of(&test.dir).is_empty()),
        ("guest boots", |_, started| has_vcpu(started.pid())),
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
        let test = TestBox::streaming(script).with("resource_limits", json!({"cpu_shares": 1024}));
        let started = test.start();
        eventually(stage, || reached(&test, &started));
        let namespaces = namespaces_of(&test);
        started.kill();
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
    left.extend(test.cgroup().exists().then(|| "a cgroup".into()));
    left
}

/// A box with everything that a box can have on the host beside its processes: two sockets and a cgroup.
fn box_with_a_place() -> TestBox {
    let test = TestBox::streaming("exit 0").with("resource_limits", json!({"cpu_shares": 1024}));
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

/// How many more system calls each mote is let make than the one before it. Nothing that it might leave
/// is there for so few calls that this misses it.
const CALLS_STEP: usize = 3;

#[test]
fn a_mote_killed_while_its_place_is_made_leaves_nothing_and_is_in_nobodys_way() {
    let test = box_with_a_place();
    // The lock is held, as by another box that is being started.
    let parent = Path::new("/sys/fs/cgroup/a3s-box");
    let _ = fs::create_dir(parent);
    let busy = others_lock(parent);
    let started = test.start();
    eventually("its janitor is there", || janitor_of(started.pid()).is_some());
    started.kill();
    assert!(!test.path("sock/exec.sock").exists() && !test.cgroup().exists());
    drop(busy);
    let again = test.run();
    assert_eq!((again.code, again.stderr.as_str()), (0, ""));
    eventually_nothing("of both", || left_of(&test));
}

#[test]
fn a_mote_that_was_broken_into_cannot_hold_its_janitor() {
    let test = TestBox::streaming("echo ready; exec sleep 10000")
        .with("resource_limits", json!({"cpu_shares": 1024}));
    let socket = test.path("out/passt.sock");
    let _passt = UnixListener::bind(&socket).expect("bound");
    let test = test.with("network", network(&socket));
    let started = test.ready();
    let pid = started.pid();
    let janitor = janitor_of(pid).expect("a janitor");

    // What mote could use: its ends of the pipe and of the line. The line's is found by what comes out.
    let theirs = |kind: &str| {
        let all = descriptors_of(janitor);
        let mut of_kind = all.into_iter().filter(|(_, what)| what.starts_with(kind));
        let found = of_kind.next().expect(kind);
        assert!(of_kind.next().is_none(), "two of {kind}");
        found
    };
    let mut line = UnixStream::from(descriptor(janitor, theirs("socket:").0));
    line.write_all(MARK).expect("room");
    let motes = descriptors_of(pid);
    let is_motes = |fd: &OwnedFd| peek(fd, MARK.len()) == MARK;
    let sockets = motes.iter().filter(|(_, what)| what.starts_with("socket:"));
    let found = sockets.map(|(fd, _)| descriptor(pid, *fd)).find(is_motes).expect("the line");
    let motes_line = UnixStream::from(found);
    let pipe = theirs("pipe:").1;
    let (fd, _) = motes.iter().find(|(_, what)| *what == pipe).expect("the pipe");
    let mut requests = fs::File::from(descriptor(pid, *fd));

    // A connection whose close would wait for a quarter of an hour is not taken.
    let server = TcpListener::bind("127.0.0.1:0").expect("bound");
    let mut lingers = TcpStream::connect(server.local_addr().expect("bound")).expect("connected");
    let (peer, _) = server.accept().expect("accepted");
    lingers.set_nonblocking(true).expect("set");
    while lingers.write(&[0; 65536]).is_ok() {}
    linger(&lingers, 900);
    let error = motes_line.send_with_fd(&[0][..], lingers.as_raw_fd()).expect_err("closed");
    assert_eq!(error.errno(), libc::EPIPE);
    drop(peer);

    // Requests for connections without end, and nobody reads the answers. They are served: there is room
    // for more.
    line.set_nonblocking(true).expect("set");
    while line.write(&[0; 4096]).is_ok() {}
    mote::sys::set_nonblocking(&requests).expect("set");
    while requests.write(&[0; 4096]).is_ok() {}
    eventually("the janitor goes on", || (&requests).write(&[0; 4096]).is_ok());

    // The test still holds mote's ends, as another process of the attacker's might.
    let killed = Instant::now();
    started.kill();
    eventually_nothing("of it", || {
        let mut left = left_of(&test);
        left.extend(Path::new(&format!("/proc/{janitor}")).exists().then(|| "a janitor".into()));
        left
    });
    println!("its janitor was gone after {:?}", killed.elapsed());
}

/// What the test writes to the janitor's line, to know it again.
const MARK: &[u8] = b"the line";

// ---- a signal to stop, before there is a guest --------------------------------------------------

#[test]
fn a_box_that_waits_for_something_when_it_is_stopped_ends_by_that_signal() {
    let has_socket = |test: &TestBox, _: &Started| test.path("sock/exec.sock").exists();
    let has_janitor = |_: &TestBox, started: &Started| janitor_of(started.pid()).is_some();
    let virtiofsd_is_frozen =
        |test: &TestBox, _: &Started| virtiofsd_of(&test.dir).into_iter().any(is_frozen);
    type Waits = fn(&TestBox, &Started) -> bool;
    let stopped = |test: TestBox, started: Started, waits: Waits| {
        eventually("it waits", || waits(&test, &started));
        let ran = started.stop();
        assert_eq!(ran.stderr, "");
        assert_eq!(ran.outcome, json!({"kind": "signaled", "exit_code": 143, "signal": 15}));
    };

    // It waits for the lock that another box holds.
    let test = box_with_a_place();
    let parent = Path::new("/sys/fs/cgroup/a3s-box");
    let _ = fs::create_dir(parent);
    let others = others_lock(parent);
    let started = test.start();
    eventually("it waits", || has_janitor(&test, &started));
    started.signal(libc::SIGTERM);
    let output = started.wait_with_output();
    assert_eq!(output.status.code(), Some(143));
    drop(others);
    test.finished(output);

    let (_passt, test) = small_box();
    let started = test.start();
    stopped(test, started, has_socket);

    // It waits for somebody to read its output.
    let test = TestBox::busybox();
    let fifo = test.path("out/fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo runs").success());
    let test = test.with("console_output", json!(fifo));
    let started = test.start();
    stopped(test, started, has_socket);

    // A second signal stops it hard, as later in its life.
    let (_passt, test) = small_box();
    let started = test.start();
    eventually("it waits", || has_socket(&test, &started));
    for signal in [libc::SIGSTOP, libc::SIGINT, libc::SIGHUP, libc::SIGCONT] {
        started.signal(signal);
    }
    let ran = started.wait();
    ran.assert_ended(121, "stopped");

    let test = TestBox::streaming("exit 0");
    let started = started_on_back_end(&test, &dies_at(GET_FEATURES, "SIGSTOP"));
    stopped(test, started, virtiofsd_is_frozen);
}

/// The lock that a box holds while it makes or removes its cgroup.
fn others_lock(parent: &Path) -> fs::File {
    let file = fs::OpenOptions::new().write(true).open(parent.join("cgroup.kill"));
    let file = file.expect("Linux 5.14");
    file.lock().expect("locked");
    file
}
