//! Logs as the runtime of 3.2 and 3.3 wants them (contract §2.11).

use std::fs::{self, File};
use std::io::Read;
use std::net::UdpSocket;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use flate2::read::GzDecoder;
use serde_json::{Value, json};

use crate::common::{TestBox, eventually, mote, now_s, seq};
use crate::processes::{children_of, name_of};
use crate::sandbox::unprivileged;

/// A small box that runs this shell script, with this driver for its logs and these options.
fn logging(script: &str, driver: &str, options: Value) -> TestBox {
    let config = json!({"driver": driver, "options": options});
    TestBox::busybox().shell(script).with("log_config", config)
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The objects in a log.
fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// The text that a stream has in a log.
fn logged(objects: &[Value], stream: &str) -> String {
    let of_stream = objects.iter().filter(|object| object["stream"] == stream);
    of_stream.map(|object| object["log"].as_str().expect("text")).collect()
}

/// What there is in the directory of the logs, but for the reports.
fn names(test: &TestBox) -> Vec<String> {
    let entries = fs::read_dir(test.path("out")).expect("directory").flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().into_string().expect("text")).collect();
    names.retain(|name| !["outcome.json", "timeline.json"].contains(&name.as_str()));
    names.sort();
    names
}

#[test]
fn streams_have_files_of_their_own_and_the_kernel_has_neither() {
    let script =
        "echo out; echo err >&2; echo '<3>the kernel errs' >/dev/kmsg; printf tail; exit 6";
    let test = logging(script, "json-file", json!({}));
    let before = now_s();
    let ran = test.run();
    ran.assert_ended(6, "exited");
    assert!(ran.stderr.ends_with("the kernel errs\n"), "{}", ran.stderr);
    assert_eq!((ran.stdout.as_str(), ran.stderr.lines().count()), ("", 1), "{}", ran.stderr);
    assert_eq!(ran.console, "out\ntail");
    assert_eq!(text(&test.path("out/console.err.log")), "err\n");
    let log = text(&test.path("out/container.json"));
    let written = objects(&log);
    assert_eq!(logged(&written, "stdout"), "out\ntail\n");
    assert_eq!(logged(&written, "stderr"), "err\n");
    let times = written.iter().map(|object| object["time"].as_str().expect("text"));
    let times: Vec<String> = times.map(String::from).collect();
    assert!(times.is_sorted() && log.starts_with(r#"{"log":""#), "{log}");
    // As date(1) reads them.
    let date = Command::new("date").args(["--date", &times[0], "+%s"]).output().expect("date runs");
    let at: u64 = String::from_utf8_lossy(&date.stdout).trim().parse().expect("seconds");
    assert!((before..=now_s()).contains(&at) && times[0].len() == 30, "{times:?}");
    for name in names(&test) {
        let mode = fs::metadata(test.path("out").join(&name)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    // The next start goes on.
    test.run().assert_ended(6, "exited");
    assert_eq!(text(&test.path("out/console.log")), "out\ntailout\ntail");
    assert_eq!(text(&test.path("out/console.err.log")), "err\nerr\n");
    assert_eq!(objects(&text(&test.path("out/container.json"))).len(), 6);
}

#[test]
fn a_panic_is_in_no_log_but_on_stderr_and_in_the_outcome() {
    let test = logging("echo c >/proc/sysrq-trigger; sleep 1000", "json-file", json!({}));
    let ran = test.run();
    ran.assert_ended(123, "guest-crashed");
    assert_eq!((ran.console.as_str(), text(&test.path("out/container.json"))), ("", "".into()));
    assert!(ran.stderr.contains("Kernel panic - not syncing: "), "{}", ran.stderr);
    assert!(ran.stderr.contains("the guest kernel panicked: "), "{}", ran.stderr);
}

#[test]
fn full_logs_are_packed_and_the_oldest_go() {
    let options = json!({"max-size": "2k", "max-file": "3"});
    let test = logging("seq 2000", "json-file", options);
    let ran = test.run();
    ran.assert_ended(0, "exited");
    assert_eq!(ran.stderr, "");
    let expected = [
        "console.err.log",
        "console.log",
        "container.json",
        "container.json.1.gz",
        "container.json.2.gz",
    ];
    assert_eq!(names(&test), expected);
    // Whole objects, one after the other, up to the last.
    let mut log = String::new();
    for name in ["container.json.2.gz", "container.json.1.gz"] {
        let file = File::open(test.path("out").join(name)).expect(name);
        let from = log.len();
        GzDecoder::new(file).read_to_string(&mut log).expect("whole");
        assert!((2048..2200).contains(&(log.len() - from)), "{name}: {}", log.len() - from);
    }
    log += &text(&test.path("out/container.json"));
    let all = seq(2000);
    let kept = logged(&objects(&log), "stdout");
    assert!(all.ends_with(&kept) && kept.len() > 200, "{kept}");
    // The file of the stream has what these may have at most.
    assert!(all.ends_with(&ran.console) && ran.console.len() <= 6 << 10, "{}", ran.console.len());
}

#[test]
fn no_driver_writes_the_streams_alone() {
    let test = logging("echo out; echo err >&2", "none", json!({}));
    assert_eq!(test.run().console, "out\n");
    assert_eq!(names(&test), ["console.err.log", "console.log"]);
}

#[test]
fn without_logs_there_is_one_file_which_is_emptied() {
    let test = TestBox::busybox().shell("echo out; echo err >&2; echo '<3>kernel' >/dev/kmsg");
    for _ in 0..2 {
        let ran = test.run();
        let mut lines: Vec<&str> = ran.console.lines().collect();
        lines.sort_unstable_by_key(|line| line.len());
        assert!(
            matches!(lines[..], ["out", "err", kernel] | ["err", "out", kernel]
            if kernel.ends_with("kernel")),
            "{}",
            ran.console
        );
        assert_eq!((ran.stderr.as_str(), names(&test)), ("", vec!["console.log".into()]));
    }
}

#[test]
fn syslog_gets_each_line() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("bound");
    let address = format!("udp://localhost:{}", server.local_addr().expect("address").port());
    let options = json!({"syslog-address": address, "syslog-facility": "local0", "tag": "web"});
    let test = logging("echo one; sleep 0; echo two", "syslog", options);
    let ran = test.run();
    assert_eq!((ran.console.as_str(), ran.stderr.as_str()), ("one\ntwo\n", ""));
    let mut buffer = [0; 64];
    for expected in ["<134>web: one", "<134>web: two"] {
        let len = server.recv(&mut buffer).expect("a message");
        assert_eq!(&buffer[..len], expected.as_bytes());
    }
    assert_eq!(names(&test), ["console.err.log", "console.log"]);
}

#[test]
fn what_cannot_be_honoured_is_refused_by_its_name() {
    let options = json!({
        "max-size": "ten", "max-file": "0", "syslog-address": "tcp://10.0.0.1:514",
        "syslog-facility": "x", "compress": "true",
    });
    let ran = logging("true", "json-file", options).run();
    ran.assert_not_started(&[
        "spec: log_config.options.compress: is an option that mote does not have",
        "; log_config.options.max-size: is \"ten\", must be bytes",
        "; log_config.options.max-file: is \"0\", must be a number from 1",
        "; log_config.options.syslog-address: is \"tcp://10.0.0.1:514\", must be udp://",
        "; log_config.options.syslog-facility: is \"x\", must be one of kern",
    ]);
    let test = logging("true", "journald", json!({}));
    test.run().assert_not_started(&["log_config.driver: is \"journald\", must be"]);
    let output = Command::new(mote()).args(["check", "--config", &test.spec.to_string()]).output();
    assert_eq!(output.expect("mote runs").status.code(), Some(2));
}

#[test]
fn a_link_that_a_guest_has_left_for_a_log_is_not_followed() {
    let precious = |test: &TestBox| test.path("precious");
    for name in ["console.log", "console.err.log", "container.json"] {
        let test = logging("true", "json-file", json!({}));
        fs::write(precious(&test), "precious").expect("file");
        symlink(precious(&test), test.path("root").join(name)).expect("link");
        let console = test.path("root/console.log");
        let test = test.with("console_output", json!(console));
        let ran = test.run();
        let place = format!("{}: ", test.path("root").join(name).display());
        assert!(ran.code == 125 && ran.stderr.contains(&place), "{name}: {}", ran.stderr);
        assert_eq!(text(&precious(&test)), "precious");
    }
}

#[test]
fn a_killed_mote_leaves_its_whole_log_and_no_process() {
    let test = logging("echo ready; exec sleep 10000", "json-file", json!({}));
    let started = test.start();
    let log = test.path("out/container.json");
    eventually("the guest is ready", || fs::metadata(&log).is_ok_and(|log| log.len() > 0));
    started.kill();
    eventually("nothing is left", || crate::processes::processes_with(&test.dir).is_empty());
    assert_eq!(logged(&objects(&text(&log)), "stdout"), "ready\n");
}

#[test]
fn a_user_of_the_host_gets_full_logs_packed_by_a_confined_process() {
    for namespaces in [true, false] {
        let options = json!({"max-size": "1k"});
        let test = logging("seq 1000; exec sleep 10000", "json-file", options);
        let started = test.start_by(&mut unprivileged(&test, namespaces));
        let console = test.path("out/console.log");
        let written = || fs::read_to_string(&console).is_ok_and(|text| text.ends_with("\n1000\n"));
        eventually("the guest has written", written);
        let children = children_of(started.pid()).into_iter();
        let writers: Vec<u32> = children.filter(|pid| name_of(*pid) == "mote-logs").collect();
        let [writer] = writers[..] else { panic!("{writers:?}") };
        let status = text(Path::new(&format!("/proc/{writer}/status")));
        for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
            assert!(status.contains(&format!("\n{line}\n")), "no {line} in {status}");
        }
        assert_eq!(started.stop().stderr, "", "namespaces: {namespaces}");
        assert!(names(&test).contains(&"container.json.2.gz".into()), "{:?}", names(&test));
    }
}
