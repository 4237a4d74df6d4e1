//! The built-in exec server, held against the bytes of the box runtime's protocol.

use std::net::Shutdown;

use serde_json::{Value, json};

use crate::client::{
    CONTROL, Client, DATA, Done, ERROR, HEARTBEAT, request, run, run_with, shell, text,
};
use crate::common::{Started, TestBox, eventually};

/// A box that stays, with an environment.
fn idle() -> (TestBox, Started) {
    TestBox::busybox()
        .with_entrypoint("env", json!([["COLOR", "blue"], ["BOX_SECRET", "1"]]))
        .idle()
}

fn done(stdout: &str, stderr: &str, code: i64) -> Done {
    Done { stdout: stdout.into(), stderr: stderr.into(), code }
}

#[test]
fn the_contracts_bytes() {
    let (test, started) = idle();
    for (sent, expected) in [
        (&b"\x03\0\0\0\0"[..], &b"\x03\0\0\0\0"[..]),
        (b"\x03\0\0\0\x02ab", b"\x03\0\0\0\x02ab"),
        (
            b"\x01\0\0\0\x6b{\"cmd\":[\"echo\",\"hi\"],\"timeout_ns\":0,\"env\":[],\"working_dir\":null,\"stdin\":null,\"user\":null,\"streaming\":false}",
            b"\x01\0\0\0\x31{\"stdout\":[104,105,10],\"stderr\":[],\"exit_code\":0}",
        ),
        (
            b"\x01\0\0\0\x6a{\"cmd\":[\"echo\",\"hi\"],\"timeout_ns\":0,\"env\":[],\"working_dir\":null,\"stdin\":null,\"user\":null,\"streaming\":true}",
            b"\x01\0\0\0\x27{\"stream\":\"Stdout\",\"data\":[104,105,10]}\x02\0\0\0\x0f{\"exit_code\":0}",
        ),
        (b"\x02\0\0\0\0", b"\x04\0\0\0\x13Expected Data frame"),
        (
            b"\x01\0\0\0\x33{\"op\":\"Upload\",\"guest_path\":\"/tmp/f\",\"data\":\"aGkK\"}",
            b"\x01\0\0\0\x32{\"success\":true,\"data\":null,\"size\":3,\"error\":null}",
        ),
        (
            b"\x01\0\0\0\x33{\"op\":\"Download\",\"guest_path\":\"/tmp/f\",\"data\":null}",
            b"\x01\0\0\0\x34{\"success\":true,\"data\":\"aGkK\",\"size\":3,\"error\":null}",
        ),
    ] {
        let mut client = Client::connect(&test, "exec");
        std::io::Write::write_all(&mut client.0, sent).expect("sends");
        let answer = client.rest_bytes();
        assert_eq!(
            answer,
            expected,
            "{} got {}",
            String::from_utf8_lossy(sent),
            String::from_utf8_lossy(&answer)
        );
    }
    assert_eq!(std::fs::read(test.path("root/tmp/f")).expect("uploaded"), b"hi\n");
    started.stop();
}

#[test]
fn requests_shape_their_command() {
    let (test, started) = idle();
    let environment = run(&test, &["env"]).stdout;
    for line in ["HOME=/", "TERM=linux", "COLOR=blue"] {
        assert!(environment.lines().any(|l| l == line), "{line} in {environment}");
    }
    assert!(environment.contains("PATH=") && !environment.contains("BOX_"), "{environment}");

    let with = |cmd: &[&str], more: Value| run_with(&test, cmd, more);
    let colored = with(&["sh", "-c", "echo $COLOR $X"], json!({"env": ["COLOR=red", "X=a=b"]}));
    assert_eq!(colored, done("red a=b\n", "", 0));
    assert_eq!(with(&["pwd"], json!({"working_dir": "/etc"})), done("/etc\n", "", 0));
    let input: Vec<u8> = b"input".to_vec();
    assert_eq!(with(&["cat"], json!({"stdin": input})), done("input", "", 0));
    assert_eq!(run(&test, &["cat"]), done("", "", 0));
    let as_user = json!({"stdin": b"again".to_vec(), "user": "app"});
    let streams = "cat /dev/stdin >/dev/stdout; echo e >/dev/stderr";
    assert_eq!(with(&["sh", "-c", streams], as_user), done("again", "e\n", 0));
    for (user, expected) in [
        ("app", "uid=1000(app) gid=1000(app) groups=2000(extra)\n"),
        ("1000", "uid=1000(app) gid=1000(app) groups=2000(extra)\n"),
        ("4000:4001", "uid=4000 gid=4001\n"),
        ("app:extra", "uid=1000(app) gid=2000(extra)\n"),
    ] {
        assert_eq!(with(&["id"], json!({"user": user})).stdout, expected, "{user}");
    }
    assert_eq!(run(&test, &["sh", "-c", "echo e >&2; exit 9"]), done("", "e\n", 9));
    assert_eq!(run(&test, &["sh", "-c", "kill -9 $$"]), done("", "", 137));
    assert_eq!(run(&test, &[]), done("", "Empty command", 1));
    for (cmd, more, said) in [
        (&["nothing"][..], json!({}), "is in no directory of PATH"),
        (&["/etc/passwd"], json!({}), "may not be executed"),
        (&["pwd"], json!({"working_dir": "/no"}), "'/no'"),
        (&["./passwd"], json!({"working_dir": "/etc"}), "may not be executed"),
        (&["pwd"], json!({"user": "ghost"}), "'ghost'"),
    ] {
        let refused = with(cmd, more);
        let start = format!("Failed to spawn command '{}': ", cmd[0]);
        assert!(refused.stderr.starts_with(&start), "{refused:?}");
        assert!(refused.stderr.contains(said) && refused.code == 127, "{refused:?}");
    }
    started.stop();
}

#[test]
fn input_streams_in_and_output_streams_out() {
    let (test, started) = idle();
    let mut client = Client::connect(&test, "exec");
    client.send_json(
        DATA,
        &json!({"cmd": ["sh", "-c", "echo start; cat; echo tail; echo err >&2; exit 4"],
                "timeout_ns": 60_000_000_000u64, "streaming": true, "stdin_streaming": true}),
    );
    let start = (DATA, br#"{"stream":"Stdout","data":[115,116,97,114,116,10]}"#.to_vec());
    assert_eq!(client.receive(), Some(start));
    // The command answers before its input has ended: no side waits for the other to finish.
    client.send(DATA, b"one");
    let one = (DATA, br#"{"stream":"Stdout","data":[111,110,101]}"#.to_vec());
    assert_eq!(client.receive(), Some(one));
    client.send(DATA, b"two");
    client.send(CONTROL, b"stdin-close");
    let mut out = String::new();
    let mut err = String::new();
    for (kind, payload) in client.rest() {
        let value: Value = serde_json::from_slice(&payload).expect("JSON");
        match (kind, value["stream"].as_str()) {
            (DATA, Some("Stdout")) => out += &text(&value["data"]),
            (DATA, Some("Stderr")) => err += &text(&value["data"]),
            _ => assert_eq!((kind, value), (CONTROL, json!({"exit_code": 4}))),
        }
    }
    assert_eq!((out.as_str(), err.as_str()), ("twotail\n", "err\n"));
    started.stop();
}

#[test]
fn a_timeout_kills_everything_the_command_started() {
    let (test, started) = idle();
    let script = "setsid sleep 4242 & sleep 4242 & echo begun; sleep 4242";
    // Enough time for the shell to begin, also on a busy host.
    let killed = run_with(&test, &["sh", "-c", script], json!({"timeout_ns": 5_000_000_000u64}));
    assert_eq!(killed, done("begun\n", "\nProcess killed: timeout exceeded", 137));
    assert!(!shell(&test, "ps").contains("sleep 4242"));
    // What a command leaves in the background stays, and delays nobody.
    assert_eq!(shell(&test, "sleep 4343 & echo left"), "left\n");
    assert!(shell(&test, "ps").contains("sleep 4343"));
    started.stop();
}

#[test]
fn a_client_that_goes_takes_its_command_along() {
    let (test, started) = idle();
    for (marker, half_close_first) in [("5151", false), ("5252", true)] {
        let mut client = Client::connect(&test, "exec");
        client.send_json(DATA, &json!({"cmd": ["sleep", marker], "timeout_ns": u64::MAX}));
        if half_close_first {
            client.0.shutdown(Shutdown::Write).expect("half-closes");
        }
        let running = format!("sleep {marker}");
        eventually("the command runs", || shell(&test, "ps").contains(&running));
        drop(client);
        eventually("the command ends", || !shell(&test, "ps").contains(&running));
    }
    started.stop();
}

#[test]
fn a_hundred_commands_at_once() {
    let (test, started) = idle();
    let mut long = Client::connect(&test, "exec");
    long.send_json(DATA, &json!({"cmd": ["sleep", "10000"], "timeout_ns": u64::MAX}));
    std::thread::scope(|scope| {
        for i in 0..100i64 {
            let test = &test;
            scope.spawn(move || {
                let script = format!("echo {i}; cat; echo {i} >&2; exit {i}");
                let input: Vec<u8> = vec![b'x'; 1000];
                let ran = run_with(test, &["sh", "-c", &script], json!({"stdin": input}));
                let expected = format!("{i}\n{}", "x".repeat(1000));
                assert_eq!(ran, done(&expected, &format!("{i}\n"), i));
            });
        }
    });
    drop(long);
    started.stop();
}

#[test]
fn a_thousand_connections_are_open_at_once() {
    mote::sys::process::raise_open_file_limit();
    let (test, started) = idle();
    let mut clients: Vec<Client> = (0..1000).map(|_| Client::connect(&test, "exec")).collect();
    // In reverse order, which works only if all of them are open.
    for client in clients.iter_mut().rev() {
        client.send(HEARTBEAT, b"");
    }
    for client in &mut clients {
        assert_eq!(client.rest(), [(HEARTBEAT, vec![])]);
    }
    started.stop();
}

#[test]
fn a_client_is_served_however_early_it_connects() {
    let test = TestBox::busybox().shell("read line </dev/zero");
    let started = test.start();
    let path = test.path("sock/exec.sock");
    eventually("the file appears", || path.exists());
    // mote holds the connection until the guest is ready, or closes it after 2 s. It never refuses it.
    let answered = || {
        let mut client = Client::connect(&test, "exec");
        client.send(HEARTBEAT, b"");
        // A Unix socket that is closed with bytes unread resets its peer.
        let mut answer = Vec::new();
        let end = std::io::Read::read_to_end(&mut client.0, &mut answer);
        end.is_ok() && answer == [HEARTBEAT, 0, 0, 0, 0]
    };
    eventually("an early client is answered", answered);
    started.kill();
}

#[test]
fn bad_clients_harm_nobody_else() {
    let (test, started) = idle();
    let mut silent = Client::connect(&test, "exec");
    let mut half_a_frame = Client::connect(&test, "exec");
    std::io::Write::write_all(&mut half_a_frame.0, b"\x01\0\0\x10\0{\"cmd\":").expect("sends");
    let mut deaf = Client::connect(&test, "exec");
    let flood = json!({"cmd": ["dd", "if=/dev/zero", "bs=65536"], "timeout_ns": u64::MAX, "streaming": true});
    deaf.send_json(DATA, &flood);

    let expected_data = (ERROR, b"Expected Data frame".to_vec());
    for garbage in [&b"\x09\0\0\0\0"[..], b"\xff\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"] {
        let mut client = Client::connect(&test, "exec");
        std::io::Write::write_all(&mut client.0, garbage).expect("sends");
        assert_eq!(client.rest(), std::slice::from_ref(&expected_data), "{garbage:?}");
    }
    for (payload, start) in [
        (&b"{\"cmd\":[\"ec"[..], "Invalid JSON: EOF"),
        (b"\0\x01\x02", "Invalid JSON: "),
        (b"{}", "Invalid JSON: missing field `cmd`"),
    ] {
        let mut client = Client::connect(&test, "exec");
        client.send(DATA, payload);
        let frames = client.rest();
        let [(ERROR, text)] = &frames[..] else { panic!("{frames:?}") };
        assert!(text.starts_with(start.as_bytes()), "{}", String::from_utf8_lossy(text));
    }
    let mut client = Client::connect(&test, "exec");
    std::io::Write::write_all(&mut client.0, b"\x01\xff\xff\xff\xff").expect("sends");
    let frames = client.rest();
    assert!(matches!(&frames[..], [(ERROR, text)] if text.ends_with(b"(limit 16777216)")));

    assert_eq!(run(&test, &["echo", "fine"]), done("fine\n", "", 0));
    silent.send(HEARTBEAT, b"");
    assert_eq!(silent.rest(), [(HEARTBEAT, vec![])]);
    drop((half_a_frame, deaf));
    started.stop();
}

#[test]
fn output_beyond_a_frame_is_cut_and_said_to_be() {
    let (test, started) = idle();
    let script = "dd if=/dev/zero bs=65536 count=320 2>/dev/null; echo end >&2";
    let frames =
        request(&test, &json!({"cmd": ["sh", "-c", script], "timeout_ns": 60_000_000_000u64}));
    let [(DATA, payload)] = &frames[..] else { panic!("one reply") };
    let head = String::from_utf8_lossy(&payload[..24]).into_owned();
    let tail = String::from_utf8_lossy(&payload[payload.len() - 90..]).into_owned();
    assert!(head.starts_with("{\"stdout\":[0,0,0,"), "{head}");
    let expected = "],\"stderr\":[101,110,100,10],\"exit_code\":0,\"truncated\":true}";
    assert!(tail.ends_with(expected), "{tail}");
    assert!(payload.len() > 14 << 20, "{}", payload.len());
    started.stop();
}

#[test]
fn commands_of_a_box_that_ends_get_their_answer() {
    let (test, started) = idle();
    let mut client = Client::connect(&test, "exec");
    client.send_json(DATA, &json!({"cmd": ["sleep", "6161"], "timeout_ns": u64::MAX}));
    eventually("the command runs", || shell(&test, "ps").contains("sleep 6161"));
    started.signal(libc::SIGTERM);
    let frames = client.rest();
    let expected = br#"{"stdout":[],"stderr":[],"exit_code":143}"#.to_vec();
    assert_eq!(frames, [(DATA, expected)]);
    assert_eq!(started.wait().code, 143);
}

#[test]
fn files_that_cannot_be_moved_say_why() {
    let (test, started) = idle();
    for (members, expected) in [
        (json!({"op": "Download", "guest_path": "/no"}), "/no: No such file or directory"),
        (json!({"op": "Download", "guest_path": "/etc"}), "/etc: is a directory"),
        (json!({"op": "Upload", "guest_path": "x", "data": ""}), "x: is not an absolute path"),
        (json!({"op": "Upload", "guest_path": "/x", "data": "%"}), "/x: data is not base64"),
    ] {
        let frames = request(&test, &members);
        let value: Value = serde_json::from_slice(&frames[0].1).expect("JSON");
        assert_eq!(value["success"], json!(false));
        let error = value["error"].as_str().expect("an error");
        assert!(error.starts_with(expected), "{error}");
    }
    started.stop();
}
