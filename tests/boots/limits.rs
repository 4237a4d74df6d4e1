//! Limits that the host enforces: CPU affinity and the box's cgroup. The host needs two CPUs and
//! cgroup v2 at /sys/fs/cgroup.

use std::fs;

use serde_json::{Value, json};

use crate::client;
use crate::common::{TestBox, eventually};
use crate::processes::{processes_with, virtiofsd_of};

/// A box with limits that says `ready` and then waits for its end.
fn waiting(limits: Value) -> TestBox {
    TestBox::streaming("trap 'exit 5' TERM; echo ready; while :; do sleep 1; done")
        .with("resource_limits", limits)
}

fn all_limits() -> Value {
    json!({
        "cpu_shares": 1024, "cpu_quota": 200_000, "cpu_period": 50_000,
        "memory_reservation": 64 << 20, "memory_swap": 32 << 20,
    })
}

#[test]
fn a_cpuset_binds_every_thread() {
    let test = waiting(json!({"cpuset_cpus": "1"})).with("vcpus", json!(2));
    let started = test.ready();
    let mut pids = virtiofsd_of(&test.dir);
    assert!(!pids.is_empty());
    pids.push(started.pid());
    for pid in pids {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process").flatten();
        // A thread may have ended by now.
        for status in tasks.flat_map(|task| fs::read_to_string(task.path().join("status"))) {
            assert!(status.contains("\nCpus_allowed_list:\t1\n"), "{status}");
        }
    }
    started.signal(libc::SIGTERM);
    let ran = started.wait();
    assert_eq!(ran.code, 5, "{}", ran.stderr);
}

#[test]
fn a_cgroup_holds_the_box_while_it_runs() {
    let test = waiting(all_limits());
    let cgroup = test.cgroup();
    let started = test.ready();
    let read = |name: &str| fs::read_to_string(cgroup.join(name)).expect(name);
    for (name, value) in [
        ("cpu.weight", "39\n"),
        ("cpu.max", "200000 50000\n"),
        ("memory.low", "67108864\n"),
        ("memory.swap.max", "33554432\n"),
    ] {
        assert_eq!(read(name), value, "{name}");
    }
    // The kernel protects a cgroup's memory only as far as its parent's setting allows.
    let covered = fs::read_to_string("/sys/fs/cgroup/a3s-box/memory.low").expect("the parent's");
    assert!(covered.trim().parse::<u64>().is_ok_and(|bytes| bytes >= 64 << 20), "{covered}");

    let inside: Vec<u32> =
        read("cgroup.procs").lines().map(|pid| pid.parse().expect("a pid")).collect();
    let backends = virtiofsd_of(&test.dir);
    assert!(!backends.is_empty() && inside.contains(&started.pid()), "{inside:?}");
    assert!(backends.iter().all(|pid| inside.contains(pid)), "{backends:?} in {inside:?}");

    let second = test.command().output().expect("mote runs");
    let stderr = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(125), "{stderr}");
    assert!(stderr.contains("is this box running already?"), "{stderr}");

    started.signal(libc::SIGTERM);
    let ran = started.wait();
    assert_eq!(ran.code, 5, "{}", ran.stderr);
    eventually("the cgroup goes", || !cgroup.exists());
}

#[test]
fn a_killed_mote_leaves_no_cgroup() {
    let test = waiting(all_limits());
    let cgroup = test.cgroup();
    let kill = || {
        let started = test.ready();
        assert!(cgroup.exists());
        started.kill();
    };
    kill();
    eventually("its processes and cgroup go", || {
        !cgroup.exists() && processes_with(&test.dir).is_empty()
    });
    kill();
    // Without a wait: the old cgroup, which is being removed, does not hinder the new box, and its removal
    // does not kill it.
    let test = test.shell("exit 4");
    let ran = test.run();
    assert_eq!((ran.code, ran.stderr.as_str()), (4, ""));
    eventually("the cgroup goes", || !cgroup.exists());
}

#[test]
fn a_box_that_does_not_start_leaves_no_cgroup() {
    let test = waiting(all_limits());
    let ran = test.run_by(test.command().env("MOTE_VIRTIOFSD", "/bin/false"));
    assert_eq!(ran.code, 125, "{}", ran.stderr);
    assert!(ran.stderr.contains("virtiofsd for the root file system ("), "{}", ran.stderr);
    eventually("the cgroup goes", || !test.cgroup().exists());
}

#[test]
fn limits_that_cannot_be_are_named() {
    for (limits, expected) in [
        (
            json!({"cpuset_cpus": "0-"}),
            "cpuset_cpus: is \"0-\", must be a list of CPUs like \"0-3,6\"\n",
        ),
        (json!({"cpuset_cpus": "1023"}), "cpuset_cpus: has the CPU 1023, which is offline or "),
        (json!({"cpu_quota": 999}), "cpu_quota: is 999 microseconds, must be from 1000 to "),
        (json!({"cpu_period": 999}), "cpu_period: is 999 microseconds, must be from 1000 to "),
    ] {
        let ran = waiting(limits).run();
        assert_eq!(ran.code, 125, "{}", ran.stderr);
        let expected = format!("mote: spec: resource_limits.{expected}");
        assert!(ran.stderr.starts_with(&expected), "{}", ran.stderr);
    }
    let ran = waiting(all_limits()).with("box_id", json!("../up")).run();
    assert!(ran.stderr.starts_with("mote: spec: box_id: is \"../up\", but "), "{}", ran.stderr);
}

#[test]
fn a_host_without_cgroup_v2_is_explained() {
    let test = waiting(all_limits());
    let script = "mount -t tmpfs none /sys/fs/cgroup && exec \"$0\" \"$@\"";
    let ran = test.run_by(&mut test.mote_within(&["unshare", "--mount", "sh", "-c", script]));
    assert_eq!((ran.code, ran.stderr.lines().count()), (125, 1), "{}", ran.stderr);
    assert!(
        ran.stderr.starts_with("mote: read /sys/fs/cgroup/cgroup.controllers (limits on CPU time"),
        "{}",
        ran.stderr
    );
}

#[test]
fn pids_limit_binds_users_by_rlimit_too() {
    let test = TestBox::streaming("echo ready; exec sleep 10000")
        .with("user", json!("app"))
        .with("resource_limits", json!({"pids_limit": 50}));
    let started = test.ready();
    for user in ["app", "root"] {
        let limits = client::run_with(&test, &["cat", "/proc/self/limits"], json!({"user": user}));
        let line = limits.stdout.lines().find(|l| l.starts_with("Max processes")).expect("a line");
        assert_eq!(line.split_whitespace().nth(2), Some("50"), "{line}");
    }
    started.stop();
}
