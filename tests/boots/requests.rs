//! What the runtime of 3.2 and 3.3 asks of a box's sockets, and 0.8.0 does not (contract §4.6, §4.7).

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::thread;

use serde_json::{Value, json};

use crate::client::{CONTROL, Client, DATA, ERROR, Frame, request, run_with, shell, text};
use crate::common::{Started, TestBox, eventually};

/// A box that stays, in which `app` has a home.
fn idle() -> (TestBox, Started) {
    let test = TestBox::busybox();
    let passwd = "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n";
    fs::write(test.path("root/etc/passwd"), passwd).expect("passwd");
    fs::create_dir_all(test.path("root/home/app")).expect("home");
    std::os::unix::fs::chown(test.path("root/home/app"), Some(1000), Some(1000)).expect("chown");
    test.idle()
}

/// Asks for something in an envelope and returns the response.
fn ask(test: &TestBox, kind: &str, members: Value) -> Value {
    let frames = request(test, &json!({"request_type": kind, "request": members}));
    let [(DATA, payload)] = &frames[..] else { panic!("one response, not {frames:?}") };
    serde_json::from_slice(payload).expect("JSON")
}

fn file(test: &TestBox, members: Value) -> Value {
    ask(test, "file", members)
}

fn filesystem(test: &TestBox, members: Value) -> Value {
    ask(test, "filesystem", members)
}

/// Fails unless the response is an error that contains this.
fn assert_refused(response: &Value, part: &str) {
    let error = response["error"].as_str().unwrap_or_default();
    assert!(response["success"] == json!(false) && error.contains(part), "{part}: {response}");
}

/// The names of a list.
fn names(response: &Value) -> Vec<&str> {
    assert_eq!(response["success"], json!(true), "{response}");
    let entries = response["entries"].as_array().expect("an array");
    entries.iter().map(|entry| entry["name"].as_str().expect("text")).collect()
}

#[test]
fn enveloped_requests_answer_by_the_byte() {
    let (test, started) = idle();
    shell(&test, "echo hello >/tmp/f; chmod 640 /tmp/f; touch -d @7 /tmp/f");
    for (sent, expected) in [
        (
            r#"{"request_type":"file","request":{"op":"Upload","guest_path":"/tmp/new/g","data":"aGkK","user":null}}"#,
            r#"{"success":true,"data":null,"size":3,"error":null}"#,
        ),
        (
            r#"{"request_type":"file","request":{"op":"Download","guest_path":"/tmp/new/g","data":null,"user":null,"max_bytes":3}}"#,
            r#"{"success":true,"data":"aGkK","size":3,"error":null}"#,
        ),
        (
            r#"{"request_type":"filesystem","request":{"op":"Stat","path":"/tmp/f","destination":null,"depth":0,"user":null}}"#,
            r#"{"success":true,"entry":{"name":"f","kind":"File","path":"/tmp/f","size":6,"mode":416,"permissions":"-rw-r-----","owner":"root","group":"root","modified_seconds":7,"modified_nanos":0,"symlink_target":null,"metadata":{}},"entries":[],"error":null}"#,
        ),
        (
            r#"{"request_type":"filesystem","request":{"op":"Remove","path":"/tmp/new"}}"#,
            r#"{"success":true,"entry":null,"entries":[],"error":null}"#,
        ),
        (
            r#"{"request_type":"filesystem","request":{"op":"ListDir","path":"/tmp/new"}}"#,
            r#"{"success":false,"entry":null,"entries":[],"error":"directory not found: /tmp/new"}"#,
        ),
    ] {
        let mut client = Client::connect(&test, "exec");
        client.send(DATA, sent.as_bytes());
        let [(DATA, answer)] = &client.rest()[..] else { panic!("one response to {sent}") };
        assert_eq!(String::from_utf8_lossy(answer), expected, "{sent}");
    }
    for payload in [json!({"request_type": "other"}), json!({"request_type": "file", "request": 1})]
    {
        let frames = request(&test, &payload);
        let [(ERROR, text)] = &frames[..] else { panic!("{frames:?}") };
        assert!(text.starts_with(b"Invalid guest session request: "), "{frames:?}");
    }
    started.stop();
}

#[test]
fn a_named_user_has_that_users_home_and_rights() {
    let (test, started) = idle();
    let upload = |path: &str, user: Value| {
        file(&test, json!({"op": "Upload", "guest_path": path, "data": "aGkK", "user": user}))
    };
    let download = |path: &str, user: Value| {
        file(&test, json!({"op": "Download", "guest_path": path, "user": user}))
    };
    fs::write(test.path("root/secret"), "hidden").expect("file");
    fs::set_permissions(test.path("root/secret"), fs::Permissions::from_mode(0o600)).expect("mode");
    symlink("/secret", test.path("root/home/app/link")).expect("link");

    assert_eq!(upload("~/new/file", json!("app"))["size"], json!(3));
    let owner = |name: &str| {
        let metadata = fs::metadata(test.path("root").join(name)).expect("there");
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("home/app/new/file"), (1000, 1000));
    assert_eq!(owner("home/app/new"), (1000, 1000));
    let described = filesystem(&test, json!({"op": "Stat", "path": "new", "user": "1000"}));
    assert_eq!(described["entry"]["path"], json!("/home/app/new"));
    assert_eq!(described["entry"]["owner"], json!("app"));
    // No user is root.
    assert_eq!(upload("~/file", json!(null))["success"], json!(true));
    assert_eq!(owner("root/file"), (0, 0));
    assert_eq!(download("/secret", json!(null))["data"], json!("aGlkZGVu"));

    for path in ["/secret", "~/link", "/proc/1/environ"] {
        assert_refused(&download(path, json!("app")), "Permission denied");
    }
    for path in ["/secret", "~/link", "/etc/new", "/newdir/file", "/proc/sys/kernel/hostname"] {
        assert_refused(&upload(path, json!("app")), "Permission denied");
    }
    assert_eq!(shell(&test, "cat /secret"), "hidden");
    for op in ["Move", "Remove"] {
        let members = json!({"op": op, "path": "/secret", "destination": "~/x", "user": "app"});
        assert_refused(&filesystem(&test, members), "Permission denied");
    }
    for op in ["Stat", "MakeDir", "ListDir", "Remove"] {
        let ghost = filesystem(&test, json!({"op": op, "path": "/tmp", "user": "ghost"}));
        assert_refused(&ghost, "user 'ghost' is not in the guest's /etc/passwd");
    }
    assert_refused(&upload("~/x", json!("4242")), "has no valid home directory");
    assert_eq!(upload("/tmp/x", json!("4242"))["success"], json!(false), "/tmp is root's here");
    started.stop();
}

#[test]
fn what_would_keep_the_agent_waiting_or_fill_it_is_refused() {
    let (test, started) = idle();
    shell(&test, "busybox mkfifo /tmp/pipe; dd if=/dev/zero of=/tmp/huge bs=1M count=1 seek=1023");
    let download = |path: &str, more: Value| {
        let mut members = json!({"op": "Download", "guest_path": path});
        for (name, value) in more.as_object().expect("an object") {
            members[name] = value.clone();
        }
        file(&test, members)
    };
    assert_refused(&download("/tmp/pipe", json!({})), "path is not a regular file: /tmp/pipe");
    assert_refused(&download("/dev/zero", json!({})), "path is not a regular file: /dev/zero");
    assert_refused(&download("/tmp/huge", json!({})), "more than the 12533760 bytes");
    let bounded = download("/tmp/huge", json!({"max_bytes": 100}));
    assert_refused(&bounded, "download target is 1073741824 bytes; max_bytes is 100");
    let grown = download("/proc/kallsyms", json!({"max_bytes": 100}));
    assert_refused(&grown, "grew beyond max_bytes (100)");
    // What the kernel makes up has no size.
    let described = download("/proc/cmdline", json!({"max_bytes": 4096}));
    assert_eq!(described["success"], json!(true), "{described}");
    // Nobody writes; it answers all the same.
    let kernels = download("/proc/kmsg", json!({}));
    assert!(kernels["success"].is_boolean(), "{kernels}");
    let pipe = json!({"op": "Upload", "guest_path": "/tmp/pipe", "data": ""});
    assert_refused(&file(&test, pipe), "failed to open /tmp/pipe");
    // An account file that is a pipe.
    shell(&test, "mv /etc/group /etc/group.old; busybox mkfifo /etc/group");
    let described = filesystem(&test, json!({"op": "Stat", "path": "/", "user": "app"}));
    assert_eq!(described["entry"]["group"], json!("0"), "{described}");
    started.stop();
}

#[test]
fn lists_are_bounded_and_bear_whatever_is_there() {
    let (test, started) = idle();
    let list = |path: &str, depth: u32| {
        filesystem(&test, json!({"op": "ListDir", "path": path, "depth": depth}))
    };
    let script = "mkdir -p /l/d/e; cd /l; ln -s loop loop; ln -s .. d/up; touch d/e/f
        touch \"$(printf 'b\\377')\"";
    shell(&test, script);
    fs::create_dir(test.path("root/m")).expect("directory");
    for at in 0..5000 {
        fs::write(test.path(&format!("root/m/{at}")), "").expect("file");
    }
    assert_eq!(names(&list("/l", 0)), ["b\u{fffd}", "d", "loop"]);
    assert_eq!(names(&list("/l", 64)), ["b\u{fffd}", "d", "e", "f", "up", "loop"]);
    let told = filesystem(&test, json!({"op": "Stat", "path": "/l/loop"}));
    assert_eq!(told["entry"]["kind"], json!("Unspecified"), "{told}");
    assert_refused(&list("/l/loop", 1), "Too many levels of symbolic links");
    assert_refused(&list("/l", 65), "directory depth exceeds the 64-level limit");
    assert_refused(&list("/m", 1), "directory listing exceeds the 4096-entry limit");
    assert_refused(&list("/", 2), "directory listing exceeds the 4096-entry limit");
    let long = format!("/l/{}", "x".repeat(256));
    let stat = filesystem(&test, json!({"op": "Stat", "path": long}));
    assert_refused(&stat, "File name too long");
    // Bytes that are no text reach what is there.
    let bytes = b"/l/b\xff".to_vec();
    let stat = filesystem(&test, json!({"op": "Stat", "path": bytes}));
    assert_eq!(stat["entry"]["kind"], json!("File"), "{stat}");

    // Against somebody who makes and removes the same things all the time.
    let mut churn = Client::connect(&test, "exec");
    let script = "mkdir /r; cd /r; while :; do mkdir -p a/b; touch a/f a/b/g; rm -r a; done";
    churn.send_json(DATA, &json!({"cmd": ["sh", "-c", script], "timeout_ns": u64::MAX}));
    eventually("it runs", || list("/r", 1)["success"] == json!(true));
    for _ in 0..50 {
        names(&list("/r", 64));
        let removed = filesystem(&test, json!({"op": "Remove", "path": "/r/a/f"}));
        assert_eq!(removed["success"], json!(true), "{removed}");
    }
    drop(churn);
    let removed = filesystem(&test, json!({"op": "Remove", "path": "/m"}));
    assert_eq!(removed["success"], json!(true), "{removed}");
    assert!(!test.path("root/m").exists());
    started.stop();
}

#[test]
fn the_entrypoint_gets_a_signal_without_a_command() {
    let acknowledged: Frame = (CONTROL, b"signal-main-ack".to_vec());
    for (instruction, code) in
        [("signal-main:10", 42), ("signal-main:15", 43), ("signal-main:", 43)]
    {
        let script = "trap 'exit 42' USR1; trap 'exit 43' TERM; echo ready; sleep 10000 & wait";
        let test = TestBox::busybox().shell(script).without_console_file();
        let started = test.ready();
        for other in ["cancel", "spawn-main:", "archive-rootfs-v1", "signal:15"] {
            let mut client = Client::connect(&test, "exec");
            client.send(CONTROL, other.as_bytes());
            assert_eq!(client.rest(), [(ERROR, b"Expected Data frame".to_vec())], "{other}");
        }
        let mut client = Client::connect(&test, "exec");
        client.send(CONTROL, instruction.as_bytes());
        assert_eq!(client.receive(), Some(acknowledged.clone()), "{instruction}");
        assert_eq!(started.wait().code, code, "{instruction}");
    }
}

#[test]
fn a_command_and_a_terminals_command_get_signals() {
    let (test, started) = idle();
    let script =
        "trap '' TERM; sleep 10000 & trap 'echo heard' TERM; echo armed; while :; do wait; done";
    let mut client = Client::connect(&test, "exec");
    let cmd = json!({"cmd": ["sh", "-c", script], "timeout_ns": u64::MAX, "streaming": true});
    client.send_json(DATA, &cmd);
    let line = |client: &mut Client| {
        let (kind, payload) = client.receive().expect("a frame");
        assert_eq!(kind, DATA);
        text(&serde_json::from_slice::<Value>(&payload).expect("JSON")["data"])
    };
    assert_eq!(line(&mut client), "armed\n");
    // The second is none.
    client.send(CONTROL, b"signal:15");
    client.send(CONTROL, b"signal:99");
    assert_eq!(line(&mut client), "heard\n");
    client.send(CONTROL, b"signal:9");
    assert_eq!(client.rest(), [(CONTROL, br#"{"exit_code":137}"#.to_vec())]);

    const END: u8 = 5;
    let open = || {
        let mut client = Client::connect(&test, "pty");
        let cmd = json!({"cmd": ["sh", "-c", script], "cols": 80, "rows": 24});
        client.send_json(1, &cmd);
        assert_eq!(client.receive(), Some((2, b"armed\r\n".to_vec())));
        client
    };
    let mut client = open();
    client.send(END, b"signal:15");
    assert_eq!(client.receive(), Some((2, b"heard\r\n".to_vec())));
    client.send(END, b"signal:9");
    assert_eq!(client.rest(), [(4, br#"{"exit_code":137}"#.to_vec())]);
    let mut client = open();
    client.send(END, b"");
    assert_eq!(client.rest(), [(4, br#"{"exit_code":137}"#.to_vec())]);
    started.stop();
}

/// A request for a shell script, with this id.
fn keyed(script: &str, id: &str) -> Value {
    json!({"cmd": ["sh", "-c", script], "timeout_ns": 60_000_000_000u64, "request_id": id})
}

#[test]
fn a_request_with_an_id_runs_once() {
    let (test, started) = idle();
    let script = "echo ran >>/tmp/log; while [ ! -e /tmp/go ]; do sleep 1; done; echo out; exit 3";
    // The first client goes away while the command runs, and the others come meanwhile.
    let mut first = Client::connect(&test, "exec");
    first.send_json(DATA, &keyed(script, "a"));
    eventually("it runs", || test.path("root/tmp/log").exists());
    drop(first);
    let answers: Vec<Vec<Frame>> = thread::scope(|scope| {
        let waiting: Vec<_> =
            (0..3).map(|_| scope.spawn(|| request(&test, &keyed(script, "a")))).collect();
        let conflict = request(&test, &keyed("true", "a"));
        let expected = br#"exec request ID "a" conflicts with in-flight content"#.to_vec();
        assert_eq!(conflict, [(ERROR, expected)]);
        fs::write(test.path("root/tmp/go"), "").expect("file");
        waiting.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    let expected = (DATA, br#"{"stdout":[111,117,116,10],"stderr":[],"exit_code":3}"#.to_vec());
    for answer in answers.into_iter().chain([request(&test, &keyed(script, "a"))]) {
        assert_eq!(answer, std::slice::from_ref(&expected));
    }
    assert_eq!(shell(&test, "cat /tmp/log"), "ran\n");
    for (members, told) in [
        (keyed("true", "a"), r#"exec request ID "a" conflicts with cached content"#),
        (keyed("true", ""), "exec request ID is invalid"),
        (
            json!({"cmd": ["true"], "timeout_ns": 0, "streaming": true, "request_id": "s"}),
            "Idempotent request IDs are supported only for one-shot exec",
        ),
    ] {
        assert_eq!(request(&test, &members), [(ERROR, told.as_bytes().to_vec())]);
    }

    // Files and directories have ids of their own.
    let upload = json!({"op": "Upload", "guest_path": "/tmp/f", "data": "aGkK", "request_id": "a"});
    let answer = file(&test, upload.clone());
    assert_eq!(answer["success"], json!(true), "{answer}");
    let away = json!({"op": "Move", "path": "/tmp/f", "destination": "/tmp/g", "request_id": "a"});
    let moved = filesystem(&test, away.clone());
    assert_eq!(moved["entry"]["path"], json!("/tmp/g"), "{moved}");
    assert_eq!(filesystem(&test, away), moved);
    assert_eq!(file(&test, upload), answer);
    assert_eq!(shell(&test, "ls /tmp/f /tmp/g 2>/dev/null"), "/tmp/g\n");
    // A user's, too.
    let of_user = json!({"op": "MakeDir", "path": "~/dir", "user": "app", "request_id": "u"});
    let made = filesystem(&test, of_user.clone());
    assert_eq!(made["entry"]["owner"], json!("app"), "{made}");
    assert_eq!(filesystem(&test, of_user), made);
    let other = json!({"op": "Upload", "guest_path": "/tmp/h", "data": "", "request_id": "a"});
    assert_refused(&file(&test, other), r#"file request ID "a" conflicts with cached content"#);
    started.stop();
}

#[test]
fn answers_that_are_kept_have_bounds() {
    let (test, started) = idle();
    // More than a MiB of each, and of the bytes that take the most room.
    let flood = "for to in 1 2; do dd if=/dev/zero bs=65536 count=17 2>/dev/null | tr '\\0' '\\377' >&$to; done";
    let script = format!("echo ran >>/tmp/log; {flood}");
    let answer = |asked: &Value| {
        let frames = request(&test, asked);
        let [(DATA, payload)] = &frames[..] else { panic!("one reply") };
        serde_json::from_slice::<Value>(payload).expect("JSON")
    };
    let whole = |id: &str| answer(&keyed(&script, id));
    let output = whole("0");
    for stream in ["stdout", "stderr"] {
        assert_eq!(output[stream].as_array().expect("an array").len(), 1 << 20, "{stream}");
    }
    assert_eq!(output["truncated"], json!(true));
    // Without an id, for clients that know of the bound; they all say this.
    let mut known = keyed(flood, "");
    let members = known.as_object_mut().expect("an object");
    members.remove("request_id");
    members.insert("stdin_streaming".into(), json!(false));
    assert_eq!(answer(&known), output);
    // Two of them fit.
    for id in ["1", "2", "2", "1"] {
        assert_eq!(whole(id), output, "{id}");
    }
    assert_eq!(shell(&test, "cat /tmp/log"), "ran\n".repeat(3));
    assert_eq!(whole("0"), output);
    assert_eq!(shell(&test, "cat /tmp/log"), "ran\n".repeat(4), "it was forgotten");
    // No program finds them.
    assert!(!shell(&test, "cat /proc/mounts").contains("20480k"));
    started.stop();
}

#[test]
fn commands_have_the_root_that_they_ask_for() {
    let (test, started) = idle();
    shell(
        &test,
        "mkdir -p /r/bin /r/etc /r/home; cp /bin/busybox /r/bin; cd /r/bin
        for name in sh id pwd cat ls; do ln -s busybox $name; done
        echo inner:x:77:78::/home:/bin/sh >/r/etc/passwd; echo inner:x:78: >/r/etc/group",
    );
    let inner = json!({"rootfs": "/r", "user": "inner", "working_dir": "/home"});
    let script = "id; pwd; echo $HOME; ls /; cat /proc/self/oom_score_adj; echo >/dev/null";
    let ran = run_with(&test, &["sh", "-c", script], inner);
    let expected = "uid=77(inner) gid=78(inner)\n/home\n/home\nbin\ndev\netc\nhome\nproc\nsys\n0\n";
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str(), ran.code), (expected, "", 0));
    assert_eq!(run_with(&test, &["pwd"], json!({"rootfs": "/r"})).stdout, "/\n");
    // Nobody else is behind it.
    assert_eq!(shell(&test, "ls -d /home/app"), "/home/app\n");
    for (rootfs, told) in [
        ("", "Invalid rootfs path: "),
        ("r", "Invalid rootfs path: r"),
        ("/r\0", "Invalid rootfs path: /r\0"),
        ("/r/bin/busybox", "Rootfs path is not a directory: /r/bin/busybox"),
        ("/no", "Rootfs path is unavailable: /no (No such file or directory (os error 2))"),
    ] {
        let ran = run_with(&test, &["pwd"], json!({ "rootfs": rootfs }));
        assert_eq!((ran.stderr.as_str(), ran.code), (told, 1));
        let mut client = Client::connect(&test, "pty");
        client.send_json(1, &json!({"cmd": ["pwd"], "rootfs": rootfs, "cols": 80, "rows": 24}));
        assert_eq!(client.rest(), [(5, told.as_bytes().to_vec())]);
    }
    let mut client = Client::connect(&test, "pty");
    client.send_json(1, &json!({"cmd": ["ls", "/"], "rootfs": "/r", "cols": 80, "rows": 24}));
    let frames = client.rest();
    assert_eq!(frames.last(), Some(&(4, br#"{"exit_code":0}"#.to_vec())));
    let shown: Vec<u8> =
        frames.into_iter().filter(|(kind, _)| *kind == 2).flat_map(|f| f.1).collect();
    assert!(!String::from_utf8_lossy(&shown).contains("home/app"));
    assert!(String::from_utf8_lossy(&shown).contains("proc"));
    started.stop();
}

#[test]
fn an_end_for_want_of_memory_is_told() {
    let (test, started) = TestBox::busybox().with("memory_mib", json!(128)).idle();
    shell(&test, "echo 1 >/proc/sys/vm/overcommit_memory");
    let eat = ["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"];
    let ask = |cmd: &[&str]| {
        let cmd = json!({"cmd": cmd, "timeout_ns": 60_000_000_000u64, "streaming": true});
        request(&test, &cmd).pop().expect("an end")
    };
    let told = br#"{"exit_code":137,"oom_killed":true}"#.to_vec();
    assert_eq!(ask(&eat), (CONTROL, told.clone()));
    // What comes after it has nothing to do with it.
    assert_eq!(ask(&["sh", "-c", "kill -9 $$"]), (CONTROL, br#"{"exit_code":137}"#.to_vec()));
    let mut client = Client::connect(&test, "pty");
    client.send_json(1, &json!({"cmd": eat, "cols": 80, "rows": 24}));
    assert_eq!(client.rest().last(), Some(&(4, told)));
    started.stop();
}
