//! Callers and clients that go away, that have their streams closed, or that name another box's sockets
//! or no valid cgroup.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use serde_json::json;

use crate::client;
use crate::commands::exec;
use crate::common::{TestBox, eventually};
use crate::processes::kill;

#[test]
fn a_client_killed_in_mid_stream_takes_its_command_along() {
    let (test, started) = TestBox::busybox().idle();
    for _ in 0..3 {
        let mut client = exec(&test, &[], &["dd", "if=/dev/zero", "bs=65537"])
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
    started.stop();
}

#[test]
fn a_caller_that_closes_its_ends_still_gets_the_exit_code() {
    let test = TestBox::streaming(
        "echo ready; until [ -e /closed ]; do sleep 0.1; done; seq 50000; seq 50000 >&2; touch /done; exit 7",
    );
    let mut started = test.ready();
    started.close_output();
    fs::write(test.path("root/closed"), "").expect("file");
    let ran = started.wait();
    ran.assert_ended(7, "exited");
    assert!(test.path("root/done").exists());
}

#[test]
fn a_caller_that_never_had_open_ends_gets_the_exit_code() {
    let test = TestBox::streaming("echo lost; echo lost >&2; exit 7");
    let closed = ["sh", "-c", "exec \"$@\" <&- >&- 2>&-", "sh"];
    let ran = test.run_by(&mut test.mote_within(&closed));
    ran.assert_ended(7, "exited");
}

#[test]
fn a_second_box_on_the_same_sockets_leaves_the_first_untouched() {
    let (first, running) = TestBox::busybox().idle();
    for socket in ["exec", "pty"] {
        let second = TestBox::streaming("exit 0");
        let path = first.path(&format!("sock/{socket}.sock"));
        let second = second.with(&format!("{socket}_socket_path"), json!(path));
        let ran = second.run();
        let line = format!("listen on {}: another process listens on it", path.display());
        ran.assert_not_started(&[&line, "is this box running already?"]);
    }
    assert_eq!(client::shell(&first, "echo served"), "served\n");
    assert!(first.path("sock/pty.sock").exists());
    running.stop();
}

#[test]
fn a_box_id_is_no_path() {
    for id in ["a/b", "../../up", ".", "..", "/", "/run/x", "a\u{0}b"] {
        let test = TestBox::streaming("hostname; exit 3").with("box_id", json!(id));
        let ran = test.run();
        assert_eq!((ran.code, ran.stderr.as_str(), ran.stdout.as_str()), (3, "", "localhost\n"));

        let limited = test.with("resource_limits", json!({"cpu_shares": 1024}));
        let ran = limited.run();
        ran.assert_not_started(&["spec: box_id: is \"", "it is the name of a cgroup"]);
    }
    for outside in ["/sys/fs/cgroup/up", "/sys/fs/cgroup/run", "/sys/fs/cgroup/a3s-box/a"] {
        assert!(!Path::new(outside).exists(), "{outside}");
    }
}
