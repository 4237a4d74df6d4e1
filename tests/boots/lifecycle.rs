//! Stopping, killing, dying back-ends, and many boxes.

use std::os::unix::net::UnixListener;
use std::process::Command;

use serde_json::json;

use crate::client;
use crate::common::{TestBox, eventually, mote, now_s};
use crate::processes::{kill, processes_with, virtiofsd_of};

#[test]
fn a_stop_signal_reaches_the_entrypoint() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let name = if signal == libc::SIGTERM { "TERM" } else { "INT" };
        let test = TestBox::streaming(&format!(
            "trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 1; done"
        ));
        let started = test.ready();
        started.signal(signal);
        let ran = started.wait();
        assert_eq!(
            (ran.code, ran.stdout.as_str()),
            (9, format!("got {name}\n").as_str()),
            "{}",
            ran.stderr
        );
    }
}

#[test]
fn an_entrypoint_that_ignores_the_signal_is_killed_after_the_grace() {
    let test = TestBox::streaming("trap '' TERM; echo ready; while :; do sleep 1; done");
    let started = test.ready();
    started.signal(libc::SIGTERM);
    assert_eq!(started.wait().code, 137);
}

#[test]
fn the_same_signal_at_once_is_one_request() {
    let test = TestBox::streaming(
        "trap 'echo got TERM; exit 9' TERM; echo ready; while :; do sleep 1; done",
    );
    let started = test.ready();
    // As timeout(1) and supervisors do, which signal a process and its group. Many, so that some come one by
    // one and not as one pending signal; from one process, since starting others takes long here.
    let kills = "for i in $(seq 100); do kill -TERM $0 || exit 0; done";
    let status = Command::new("sh").args(["-c", kills, &started.pid().to_string()]).status();
    assert!(status.expect("sh runs").success());
    let ran = started.wait();
    assert_eq!((ran.code, ran.stdout.as_str()), (9, "got TERM\n"), "{}", ran.stderr);
}

#[test]
fn a_second_signal_stops_hard() {
    let test = TestBox::streaming("trap '' TERM; echo ready; while :; do sleep 1; done");
    let started = test.ready();
    started.signal(libc::SIGTERM);
    started.signal(libc::SIGINT);
    let ran = started.wait();
    ran.assert_ended(121, "stopped");
    assert!(ran.stderr.contains("stopped hard by a second signal"), "{}", ran.stderr);
}

#[test]
fn a_signal_during_boot_is_not_lost() {
    let test = TestBox::streaming("echo ready; while :; do sleep 1; done");
    let started = test.start();
    // The socket is bound before the guest runs.
    eventually("the file appears", || test.path("sock/exec.sock").exists());
    started.signal(libc::SIGTERM);
    let ran = started.wait();
    assert_eq!(ran.code, 143, "{}", ran.stderr);
}

#[test]
fn a_killed_mote_leaves_nothing() {
    let test = TestBox::streaming("echo ready; while :; do sleep 1; done");
    let started = test.ready();
    assert!(!virtiofsd_of(&test.dir).is_empty());
    started.kill();
    // The death of mote signals its children, which end a moment later.
    eventually("its processes end", || processes_with(&test.dir).is_empty());
    test.assert_nothing_left();
    // A socket file that nobody serves, as after a loss of power, does not hinder the next start.
    drop(UnixListener::bind(test.path("sock/exec.sock")).expect("bound"));
    let again = test.shell("exit 4");
    assert_eq!(again.run().code, 4);
}

#[test]
fn a_killed_back_end_ends_the_box_with_its_name() {
    let test = TestBox::streaming("echo ready; while :; do sleep 1; done");
    let started = test.ready();
    kill(virtiofsd_of(&test.dir)[0], libc::SIGKILL);
    let ran = started.wait();
    ran.assert_ended(124, "backend-died");
    assert!(ran.stderr.contains("virtiofsd for the root file system ("), "{}", ran.stderr);
}

#[test]
fn a_paused_box_goes_on() {
    let test = TestBox::streaming("echo ready; sleep 1; echo alive; exit 6");
    let started = test.ready();
    started.signal(libc::SIGSTOP);
    started.signal(libc::SIGCONT);
    let ran = started.wait();
    assert_eq!((ran.code, ran.stdout.as_str()), (6, "alive\n"));
}

#[test]
fn the_clock_is_right_at_the_start_and_after_a_pause() {
    let test = TestBox::streaming("date +%s; echo ready; exec sleep 10000");
    let before = now_s();
    let mut started = test.start();
    let at_start: u64 = started.line().expect("a line").parse().expect("seconds");
    // Both clocks are read in whole seconds.
    assert!((before..=now_s() + 1).contains(&at_start), "{before} {at_start}");
    started.wait_for_line("ready");

    let date = |script: &str| client::shell(&test, script).trim().parse::<u64>().expect("seconds");
    let wrong = date("date -s 2001-01-01 >/dev/null; date +%s");
    assert!(wrong < before - 3600);
    started.signal(libc::SIGSTOP);
    started.signal(libc::SIGCONT);
    eventually("the clock is right again", || date("date +%s").abs_diff(now_s()) <= 1);
    started.stop();
}

#[test]
fn twenty_boxes_in_a_row() {
    let mut test = TestBox::busybox();
    for code in 0..20 {
        test = test.shell(&format!("echo run {code}; exit {code}"));
        let ran = test.run();
        assert_eq!((ran.code, ran.console), (code, format!("run {code}\n")), "{}", ran.stderr);
    }
}

#[test]
fn four_boxes_at_once() {
    std::thread::scope(|scope| {
        for code in 10..14 {
            scope.spawn(move || {
                let test = TestBox::busybox()
                    .shell(&format!("sleep 1; exit {code}"))
                    .with("vcpus", json!(2));
                let ran = test.run();
                assert_eq!(ran.code, code, "{}{}", ran.stderr, ran.console);
            });
        }
    });
}

#[test]
fn probe_says_ready_where_boxes_run() {
    let output = std::process::Command::new(mote()).arg("probe").output().expect("mote runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.ends_with("ready\n") && !text.contains("NOT"),
        "{text}"
    );
}
