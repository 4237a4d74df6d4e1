//! The box's Unix sockets on the host, with an agent of the image's own behind them.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use serde_json::json;

use crate::client;
use crate::common::TestBox;
use crate::processes::own_memory_kib;
use crate::terminal;

/// Serves vsock port 4089: sends everything back in capitals, and `tail` after end of file.
const AGENT: &str = include_str!("python/vsock_agent.py");

fn with_agent() -> TestBox {
    let test = TestBox::debian().without_console_file().python(AGENT, &[]);
    test.with("guest_agent", json!("image"))
}

fn connect(test: &TestBox) -> UnixStream {
    let stream = UnixStream::connect(test.path("sock/exec.sock")).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout");
    stream
}

#[test]
fn bytes_and_ends_of_file_cross_in_both_directions() {
    let test = with_agent();
    let mut started = test.start();
    started.wait_for_line("listening");
    let mode = std::fs::metadata(test.path("sock/exec.sock")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let mut stream = connect(&test);
    stream.write_all(b"abc").expect("sends");
    stream.shutdown(Shutdown::Write).expect("half-closes");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("reads");
    assert_eq!(reply, "ABCtail");

    // Four clients at once, each with more than any buffer holds.
    let payload = b"0123456789abcdef".repeat(256 * 1024);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut stream = connect(&test);
                let mut sender = stream.try_clone().expect("clones");
                let sent = payload.clone();
                let writer = std::thread::spawn(move || {
                    sender.write_all(&sent).expect("sends");
                    sender.shutdown(Shutdown::Write).expect("half-closes");
                });
                let mut reply = Vec::new();
                stream.read_to_end(&mut reply).expect("reads");
                writer.join().expect("writes");
                assert_eq!(reply.len(), payload.len() + 4);
                assert!(reply.starts_with(&payload.to_ascii_uppercase()));
            });
        }
    });
    started.stop();
}

/// Listens where an agent of the image's own would.
const EAVESDROPPER: &str = include_str!("python/eavesdropper.py");

#[test]
fn nobody_in_the_box_gets_what_is_meant_for_its_agent() {
    let test = TestBox::debian().without_console_file().python(EAVESDROPPER, &[]);
    let (pty, attest) = (test.path("sock/pty.sock"), test.path("sock/attest.sock"));
    let test = test
        .with("user", json!("1000"))
        .with("pty_socket_path", json!(pty))
        .with("attest_socket_path", json!(attest));
    let mut started = test.start();
    started.wait_for_line("listening");
    assert_eq!(client::shell(&test, "id -u"), "0\n");
    let mut stream = UnixStream::connect(&attest).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout");
    assert_eq!(stream.read(&mut [0]).expect("the end, not a time-out"), 0);
    let mut terminal = terminal::open(&test, &["sh", "-c", "echo served; exit 5"]);
    assert_eq!(terminal.rest().last(), Some(&terminal::exit(5)));
    assert_eq!(started.stop().stdout, "", "the listener got nobody");
}

#[test]
fn a_port_nobody_serves_closes_promptly() {
    let test = TestBox::streaming("echo ready; sleep 1000");
    let attest = test.path("sock/attest.sock");
    let test = test.with("attest_socket_path", json!(attest));
    let started = test.ready();
    let mut stream = UnixStream::connect(&attest).expect("connects");
    assert_eq!(stream.read(&mut [0]).expect("the end, not a time-out"), 0);
    started.stop();
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let test = TestBox::busybox();
    let path = test.path("sock/exec.sock");
    drop(UnixListener::bind(&path).expect("binds"));
    assert_eq!(test.run().code, 0);

    let live = UnixListener::bind(&path).expect("binds");
    let output = test.command().output().expect("mote runs");
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is this box running already?"));
    UnixStream::connect(&path).expect("still served");
    drop(live);
    std::fs::remove_file(&path).expect("removed");
    test.assert_nothing_left();
}

/// Tries to connect where no guest may, and then floods the host with requests.
const HOSTILE: &str = include_str!("python/vsock_hostile.py");

#[test]
fn a_hostile_guest_gets_nothing_and_holds_up_nobody() {
    let test =
        TestBox::debian().without_console_file().with("vcpus", json!(2)).python(HOSTILE, &[]);
    let mut started = test.start();
    let mut said = String::new();
    while !said.ends_with("flooded\n") {
        let line = started.line();
        said += &line.unwrap_or_else(|| panic!("it ended: {said}"));
        said += "\n";
    }
    for port in ["0x6d6f7465", "0x6d6f7466", "0x6d6f7467", "0xff9", "0x16", "0xfffffffe"] {
        assert!(said.contains(&format!("host {port} ECONNRESET\n")), "{port}: {said}");
    }
    assert_eq!(said.matches("connected").count(), 0, "{said}");
    assert_eq!(said.matches(" True\n").count(), 5, "{said}");
    // The flood goes on during these commands.
    for _ in 0..5 {
        assert_eq!(client::shell(&test, "echo served"), "served\n");
    }
    assert!(own_memory_kib(started.pid()) < 16 * 1024, "mote's own memory stays small");
    started.stop();
}
