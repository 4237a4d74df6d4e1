//! The built-in terminal server, held against the box runtime's protocol.

use serde_json::json;

use crate::client::{Client, Frame, shell};
use crate::common::{TestBox, eventually};

const REQUEST: u8 = 1;
const DATA: u8 = 2;
const RESIZE: u8 = 3;
const EXIT: u8 = 4;
const ERROR: u8 = 5;

/// Asks for a terminal with this command.
pub fn open(test: &TestBox, cmd: &[&str]) -> Client {
    let mut client = Client::connect(test, "pty");
    let request = json!({"cmd": cmd, "env": ["PS1=$ "], "working_dir": "/tmp", "user": null, "cols": 80, "rows": 24});
    client.send_json(REQUEST, &request);
    client
}

/// Reads until the terminal has shown `wanted`.
fn wait_for(client: &mut Client, wanted: &str) -> String {
    let mut shown = String::new();
    while !shown.contains(wanted) {
        match client.receive() {
            Some((DATA, bytes)) => shown += &String::from_utf8_lossy(&bytes),
            other => panic!("{other:?} before {wanted:?}; shown: {shown:?}"),
        }
    }
    shown
}

/// The frame that says that the command has exited.
pub fn exit(code: i32) -> Frame {
    (EXIT, format!("{{\"exit_code\":{code}}}").into_bytes())
}

#[test]
fn a_shell_on_a_terminal() {
    let (test, started) = TestBox::busybox().idle();
    let mut client = open(&test, &["sh"]);
    wait_for(&mut client, "$ ");
    client.send(DATA, b"stty size; echo $TERM; pwd\r");
    let shown = wait_for(&mut client, "/tmp\r\n");
    assert!(shown.contains("24 80\r\nxterm-256color\r\n"), "{shown}");
    // The program gets a signal for the new size, and sees it. These keystrokes go in a REQUEST frame, as
    // the box runtime's command line of version 0.8.0 sends them.
    let watch = "sh -c 'trap \"stty size; exit\" WINCH; echo armed; while :; do sleep 1; done'\r";
    client.send(REQUEST, watch.as_bytes());
    wait_for(&mut client, "\narmed\r\n");
    client.send_json(RESIZE, &json!({"cols": 120, "rows": 40}));
    wait_for(&mut client, "40 120\r\n");
    // Ctrl-C reaches the foreground process, not the shell.
    client.send(DATA, b"sleep 7171\r");
    eventually("the command runs", || shell(&test, "ps").contains("sleep 7171"));
    client.send(DATA, b"\x03");
    client.send(DATA, b"exit 5\r");
    assert_eq!(client.rest().last(), Some(&exit(5)));
    started.stop();
}

#[test]
fn the_last_output_precedes_the_exit() {
    let (test, started) = TestBox::busybox().idle();
    let mut client = open(&test, &["sh", "-c", "seq 1 5000; kill -9 $$"]);
    let frames = client.rest();
    let (last, output) = frames.split_last().expect("frames");
    assert_eq!(last, &exit(137));
    let shown: Vec<u8> = output.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
    let expected: String = (1..=5000).map(|n| format!("{n}\r\n")).collect();
    assert_eq!(String::from_utf8_lossy(&shown), expected);
    assert!(output.iter().all(|(kind, bytes)| *kind == DATA && bytes.len() <= 4096));
    started.stop();
}

#[test]
fn what_is_no_session() {
    let (test, started) = TestBox::busybox().idle();
    let mut client = open(&test, &["nothing"]);
    let frames = client.rest();
    let text = String::from_utf8_lossy(&frames[0].1).into_owned();
    assert!(text.starts_with("nothing: ") && text.ends_with("\r\n"), "{text}");
    assert_eq!(frames[1..], [exit(127)]);
    let mut client = Client::connect(&test, "pty");
    let lost = json!({"cmd": ["pwd"], "working_dir": "/no", "cols": 80, "rows": 24});
    client.send_json(REQUEST, &lost);
    assert_eq!(client.rest(), [(DATA, b"/\r\n".to_vec()), exit(0)]);

    assert_eq!(open(&test, &[]).rest(), [(ERROR, b"Empty command".to_vec())]);
    for kind in [DATA, RESIZE, EXIT, ERROR] {
        let mut client = Client::connect(&test, "pty");
        client.send(kind, b"{}");
        assert_eq!(client.rest(), [(ERROR, b"Expected PtyRequest frame".to_vec())]);
    }
    // Unknown types, bad JSON and too long frames are closed without an answer.
    for (kind, payload) in [(9, vec![]), (REQUEST, b"{".to_vec()), (REQUEST, vec![0; 65_537])] {
        let mut client = Client::connect(&test, "pty");
        let _ = client.try_send(kind, &payload);
        assert_eq!(client.rest(), []);
    }
    started.stop();
}

#[test]
fn a_client_that_goes_hangs_up() {
    let (test, started) = TestBox::busybox().idle();
    // A command that ends at the hang-up, and one that ignores it.
    let mut polite = open(&test, &["sh", "-c", "echo $$; sleep 8181"]);
    let mut stubborn = open(&test, &["sh", "-c", "trap '' HUP; echo $$; sleep 8282"]);
    for client in [&mut polite, &mut stubborn] {
        wait_for(client, "\r\n");
    }
    assert!(shell(&test, "ps").contains("sleep 8181"));
    drop((polite, stubborn));
    eventually("the command ends", || !shell(&test, "ps").contains("sleep 8"));
    started.stop();
}
