//! A mote that is killed or told to stop at any moment of its life.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::back_ends::{GET_FEATURES, dies_at, started_on_back_end};
use crate::common::{Started, TestBox, eventually, eventually_nothing};
use crate::passt::small_box;
use crate::processes::{children_of, has_vcpu, is_frozen, name_of, processes_with, virtiofsd_of};
use crate::traced::confined_before;

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
    eventually("its janitor is there", || {
        children_of(started.pid()).into_iter().any(|pid| name_of(pid) == "mote-janitor")
    });
    started.kill();
    assert!(!test.path("sock/exec.sock").exists() && !test.cgroup().exists());
    drop(busy);
    let again = test.run();
    assert_eq!((again.code, again.stderr.as_str()), (0, ""));
    eventually_nothing("of both", || left_of(&test));
}

// ---- a signal to stop, before there is a guest --------------------------------------------------

#[test]
fn a_box_that_waits_for_something_when_it_is_stopped_ends_by_that_signal() {
    let has_socket = |test: &TestBox, _: &Started| test.path("sock/exec.sock").exists();
    let has_janitor = |_: &TestBox, started: &Started| {
        children_of(started.pid()).into_iter().any(|pid| name_of(pid) == "mote-janitor")
    };
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
