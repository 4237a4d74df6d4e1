//! Exit codes, output and the outcome file: what the caller of a box sees.

use serde_json::json;

use crate::common::{TestBox, seq};

#[test]
fn output_and_exit_code_reach_the_caller() {
    let ran = TestBox::busybox().shell("echo hi; echo err >&2; exit 7").run();
    assert_eq!(ran.code, 7, "{}", ran.stderr);
    let mut lines: Vec<&str> = ran.console.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["err", "hi"]);
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", ""));
    assert_eq!(ran.outcome, json!({"kind": "exited", "exit_code": 7, "code": 7}));
}

#[test]
fn without_a_console_file_the_streams_stay_apart() {
    let ran = TestBox::streaming("echo out; echo err >&2").run();
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "out\n", "err\n"));
}

#[test]
fn every_exit_code_passes_through() {
    for code in [0, 1, 125, 255] {
        let ran = TestBox::busybox().shell(&format!("exit {code}")).run();
        assert_eq!(ran.code, code);
        assert_eq!(ran.outcome["kind"], "exited");
    }
}

#[test]
fn a_killed_entrypoint_is_128_plus_signal() {
    let ran = TestBox::busybox().shell("kill -9 $$").run();
    assert_eq!(ran.code, 137);
    assert_eq!(ran.outcome, json!({"kind": "signaled", "exit_code": 137, "signal": 9}));
}

#[test]
fn output_of_the_last_instruction_is_not_lost() {
    // More than all buffers on the way hold together.
    let ran = TestBox::streaming("seq 1 400000; seq 1 400000 >&2; printf end").run();
    assert_eq!(ran.code, 0);
    let numbers = seq(400_000);
    assert!(ran.stdout == format!("{numbers}end"), "{} bytes of stdout", ran.stdout.len());
    assert!(ran.stderr == numbers, "{} bytes of stderr", ran.stderr.len());
}

#[test]
fn a_process_left_behind_does_not_hold_the_box() {
    let ran = TestBox::busybox().shell("sleep 100000 & echo done; exit 3").run();
    assert_eq!((ran.code, ran.console.as_str()), (3, "done\n"));
}

#[test]
fn console_file_and_reports_are_private_and_emptied() {
    use std::os::unix::fs::PermissionsExt;
    let test = TestBox::busybox().shell("echo first run with a long line");
    assert_eq!(test.run().code, 0);
    let test = test.shell("echo second");
    assert_eq!(test.run().console, "second\n");
    for file in ["console.log", "outcome.json", "timeline.json"] {
        let file = std::fs::metadata(test.path("out").join(file)).expect("there");
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn the_timeline_is_in_order() {
    let test = TestBox::busybox().shell("echo hi").with_variable("MOTE_TEMPLATES", "off");
    let ran = test.run();
    let at = |name: &str| {
        ran.timeline["marks_us"][name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name}: {}", ran.timeline))
    };
    let marks = [
        "spec_parsed",
        "plan_ready",
        "backends_spawned",
        "memory_ready",
        "kernel_loaded",
        "first_kvm_run",
        "agent_started",
        "root_mounted",
        "entrypoint_started",
        "first_output",
        "exit",
    ];
    let times: Vec<u64> = marks.map(at).to_vec();
    assert!(times.is_sorted(), "{}", ran.timeline);
    assert!(ran.timeline["exits"]["mmio"].as_u64() > Some(0));
}

#[test]
fn a_kernel_panic_is_a_crash_and_quoted() {
    // The guest's root can crash its own kernel; only its own box notices.
    let ran = TestBox::busybox().shell("echo c >/proc/sysrq-trigger; sleep 1000").run();
    assert_eq!(ran.code, 123, "{}", ran.stderr);
    assert_eq!(ran.outcome["kind"], "guest-crashed");
    assert!(ran.console.contains("Kernel panic - not syncing: "), "{}", ran.console);
    assert!(ran.stderr.contains("the guest kernel panicked: "), "{}", ran.stderr);
}

#[test]
fn a_guest_that_resets_itself_has_no_status() {
    let ran = TestBox::busybox().shell("echo kept; echo b >/proc/sysrq-trigger; sleep 1000").run();
    assert_eq!(ran.code, 122, "{}", ran.stderr);
    assert_eq!(ran.outcome["kind"], "no-status");
    assert!(ran.stderr.contains("without reporting how the entrypoint did"), "{}", ran.stderr);
}

#[test]
fn an_entrypoint_without_output_streams_ends_too() {
    let ran = TestBox::busybox().shell("exec >&- 2>&-; exit 5").run();
    assert_eq!((ran.code, ran.console.as_str()), (5, ""));
}
