//! Callers and clients that go away, that have closed what others keep open, or that name what is not
//! theirs.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::json;

use super::{assert_not_started, box_that, finished};
use crate::client;
use crate::common::{Started, TestBox, eventually, mote};
use crate::processes::kill;

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
