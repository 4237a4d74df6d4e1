//! The attestation server (contract §6): who it is, what it answers, what it keeps, and whom it withstands.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::client;
use crate::common::{Started, TestBox};

/// A client of the attestation socket.
const CLIENT: &str = include_str!("python/attestation.py");

/// Asks a box for an attestation server, with this value.
fn attesting(test: TestBox, value: &str) -> TestBox {
    let socket = test.path("sock/attest.sock");
    test.with("attest_socket_path", json!(socket))
        .with_entrypoint("env", json!([["A3S_TEE_SIMULATE", value]]))
}

/// A small box with simulated attestation that does nothing.
fn idle() -> (TestBox, Started) {
    attesting(TestBox::busybox(), "1").idle()
}

/// What the client prints.
fn attestation(test: &TestBox, words: &[&str]) -> String {
    let output = Command::new("python3")
        .args(["-c", CLIENT])
        .arg(test.path("sock/attest.sock"))
        .args(words)
        .output()
        .expect("python runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// One request and its answer: the words of an error, or JSON.
fn ask(test: &TestBox, route: &str, payload: &Value) -> Result<Value, String> {
    let said = attestation(test, &["ask", route, &payload.to_string()]);
    match said.trim_end().split_once(' ') {
        Some(("DATA", json)) => Ok(serde_json::from_str(json).expect("JSON")),
        Some(("ERROR", text)) => Err(text.into()),
        _ => panic!("{said}"),
    }
}

#[test]
fn an_independent_client_verifies_who_answers() {
    let (test, started) = idle();
    assert_eq!(attestation(&test, &["verify"]), "verified\n");
    assert_eq!(ask(&test, "status", &Value::Null), Ok(json!({"status": "ok", "tee": true})));
    let ended = started.stop();
    assert_eq!(ended.outcome["attestation"], "simulated");
    let lines: Vec<&str> =
        ended.stderr.lines().filter(|line| line.contains("mote-attest")).collect();
    assert!(!lines.is_empty(), "{}", ended.stderr);
    assert!(lines.iter().all(|line| line.contains("mote-attest (SIMULATED): ")), "{lines:?}");
}

#[test]
fn secrets_are_files_in_memory_and_variables_of_commands() {
    let (test, started) = idle();
    let value = "a-value-that-is-nowhere-else";
    let secrets = json!({"secrets": [
        {"name": "TOKEN", "value": value},
        {"name": "file.only", "value": "x\0y", "set_env": false},
        {"name": "NUL", "value": "x\0y"},
        {"name": "../up", "value": value},
        {"name": "a/b", "value": value},
        {"name": "..", "value": value},
        {"name": "a\0b", "value": value},
        {"name": "n".repeat(300), "value": value},
    ]});
    let answer = ask(&test, "secrets", &secrets).expect("an answer");
    assert_eq!(answer["injected"], 3);
    let long = "n".repeat(300);
    let errors = [
        "Failed to set NUL for commands: its value has a NUL character, which no variable can have"
            .to_owned(),
        "Invalid secret name: ../up".into(),
        "Invalid secret name: a/b".into(),
        "Invalid secret name: ..".into(),
        "Invalid secret name: a\0b".into(),
        format!("Invalid secret name: {long}"),
    ];
    assert_eq!(answer["errors"], json!(errors));

    let said = client::shell(
        &test,
        "cd /run/secrets; ls -A; stat -c '%a %u:%g' . *; stat -f -c %T .; cat TOKEN; echo; echo $TOKEN
         tr '\\0' '\\n' </proc/1/mounts | grep -c ' /run/secrets tmpfs '; cat /run/secrets/file.only | wc -c",
    );
    let expected = format!(
        "NUL\nTOKEN\nfile.only\n700 0:0\n400 0:0\n400 0:0\n400 0:0\ntmpfs\n{value}\n{value}\n1\n3\n"
    );
    assert_eq!(said, expected);
    let as_user = "cat /run/secrets/TOKEN 2>&1";
    let done = client::run_with(&test, &["sh", "-c", as_user], json!({"user": "app"}));
    assert!(done.stdout.contains("Permission denied"), "{}", done.stdout);
    // A new value takes the place of the old one; the entrypoint's variables stay as they are.
    let again = json!({"secrets": [{"name": "TOKEN", "value": "new"}]});
    assert_eq!(ask(&test, "secrets", &again), Ok(json!({"injected": 1})));
    assert_eq!(client::shell(&test, "cat /run/secrets/TOKEN; echo $TOKEN"), "newnew\n");
    let entrypoint = "tr '\\0' '\\n' </proc/$(pidof sleep | tr -d '\\n')/environ | grep -c TOKEN";
    assert_eq!(client::shell(&test, entrypoint), "0\n");

    // Nothing of it is on the host: not below the box's directory, and not in what mote says of the box.
    let found = Command::new("grep").args(["-rlF", value]).arg(&test.dir).output().expect("grep");
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    let ended = started.stop();
    assert!(!format!("{}{}{}", ended.stderr, ended.console, ended.outcome).contains(value));
}

#[test]
fn secrets_have_room_and_no_more() {
    let (test, started) = idle();
    let requests = test.path("requests");
    fs::create_dir(&requests).expect("directory");
    let secrets = |named: &str, count: usize, len: usize, set_env: bool| {
        let secret = |at| json!({"name": format!("{named}{at}"), "value": "v".repeat(len), "set_env": set_env});
        let secrets: Vec<Value> = (0..count).map(secret).collect();
        json!({"route": "secrets", "payload": {"secrets": secrets}}).to_string()
    };
    for (name, request) in [
        ("1", secrets("many", 1000, 10, true)),
        ("2", secrets("large", 1, 10 << 20, true)),
        ("3", secrets("larger", 1, 10 << 20, false)),
        ("4", secrets("more", 100, 1, false)),
        ("5", r#"{"route":"status"}"#.into()),
    ] {
        fs::write(requests.join(name), request).expect("file");
    }
    let said = attestation(&test, &["files", requests.to_str().expect("text")]);
    let said: Vec<&str> = said.lines().collect();
    assert_eq!(said[0], r#"DATA {"injected":1000}"#);
    assert_eq!(
        said[1],
        r#"DATA {"injected":1,"errors":["Failed to set large0 for commands: a variable has at most 131071 bytes"]}"#
    );
    assert!(
        said[2].starts_with(r#"DATA {"injected":0,"errors":["Failed to write larger0: No space"#),
        "{}",
        said[2]
    );
    assert!(
        said[3].starts_with(r#"DATA {"injected":24,"errors":["Failed to write more24: No space"#),
        "{}",
        said[3]
    );
    assert_eq!(said[4], r#"DATA {"status":"ok","tee":true}"#);
    let counted = "ls -A /run/secrets | wc -l; env | grep -c ^many; wc -c </run/secrets/large0";
    assert_eq!(client::shell(&test, counted), "1025\n1000\n10485760\n");
    started.stop();
}

#[test]
fn secrets_are_put_on_no_share_and_through_no_link() {
    let test = attesting(TestBox::busybox(), "1");
    std::os::unix::fs::symlink("/tmp", test.path("root/run")).expect("link");
    let (test, started) = test.idle();
    let secrets = json!({"secrets": [{"name": "A", "value": "b"}]});
    let error = ask(&test, "secrets", &secrets).expect_err("refused");
    assert_eq!(
        error,
        "Failed to create secrets dir: 'run' of /run/secrets is no directory (links are not followed)"
    );
    started.stop();
    assert_eq!(fs::read_dir(test.path("root/tmp")).expect("directory").count(), 0);

    // A share that is there already, and a root that is read-only.
    let test = attesting(TestBox::busybox(), "1");
    let share = test.path("share");
    fs::create_dir(&share).expect("directory");
    let env = json!([
        ["A3S_TEE_SIMULATE", "1"],
        ["BOX_VOL_0", "vol0:/run/secrets"],
        ["BOX_READONLY", "1"]
    ]);
    let mount = json!([{"tag": "vol0", "host_path": share, "read_only": false}]);
    let (test, started) = test.with("fs_mounts", mount).with_entrypoint("env", env).idle();
    assert_eq!(ask(&test, "secrets", &secrets), Ok(json!({"injected": 1})));
    assert_eq!(client::shell(&test, "cat /run/secrets/A; stat -f -c %T /run/secrets"), "btmpfs\n");
    started.stop();
    assert_eq!(fs::read_dir(share).expect("directory").count(), 0);
}

#[test]
fn what_was_sealed_opens_after_a_restart() {
    let (test, started) = idle();
    let sealed =
        ask(&test, "seal", &json!({"data": "c2VjcmV0", "context": "c", "policy": "ChipOnly"}));
    let sealed = sealed.expect("sealed");
    started.stop();
    let started = test.ready();
    assert_eq!(ask(&test, "unseal", &sealed), Ok(json!({"data": "c2VjcmV0"})));
    let failed = Err("Unseal failed: TEE identity mismatch or data corrupted".to_owned());
    for (member, value) in [("context", "d"), ("policy", "MeasurementOnly")] {
        let mut other = sealed.clone();
        other[member] = json!(value);
        assert_eq!(ask(&test, "unseal", &other), failed);
    }
    let mut flipped = sealed.clone();
    let blob = sealed["blob"].as_str().expect("text");
    let first = if blob.starts_with('A') { "B" } else { "A" };
    flipped["blob"] = json!(format!("{first}{}", &blob[1..]));
    assert_eq!(ask(&test, "unseal", &flipped), failed);
    for (route, payload, expected) in [
        ("seal", json!({"data": "%", "context": "c"}), "Invalid base64 data: "),
        ("unseal", json!({"blob": "%", "context": "c"}), "Invalid base64 blob: "),
        ("unseal", json!({"blob": "", "context": "c"}), "Sealed blob too short"),
        ("nothing", Value::Null, "Invalid request JSON: unknown variant `nothing`"),
        (
            "process",
            json!({"session_id": "s", "content": "c"}),
            r#"{"session_id":"s","content":"","success":false,"error":"Cannot connect to agent at 127.0.0.1:8080: "#,
        ),
    ] {
        let error = ask(&test, route, &payload).expect_err("refused");
        assert!(error.starts_with(expected), "{error}");
    }
    started.stop();
}

#[test]
fn messages_reach_a_program_of_the_box() {
    let program = "
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        answer = json.dumps({'content': ' '.join([self.path, *map(asked.get, sorted(asked))])})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())
server = http.server.HTTPServer(('127.0.0.1', 8080), Handler)
print('ready', flush=True)
server.serve_forever()";
    let test = attesting(TestBox::debian().python(program, &[]), "true").without_console_file();
    let started = test.ready();
    let answer = ask(&test, "process", &json!({"session_id": "s1", "content": "hello"}));
    let content = "/process hello process_message s1";
    assert_eq!(answer, Ok(json!({"session_id": "s1", "content": content, "success": true})));
    started.stop();
}

#[test]
fn clients_that_keep_to_nothing_keep_nobody_out() {
    let (test, started) = idle();
    let said = attestation(&test, &["hostile"]);
    let expected = "\
garbage is closed
plain text is closed
a frame without TLS is closed
a handshake that is too long is closed
(4, b'Frame of 4294967295 bytes is too long (limit 16777216)')
(4, b'Frame of 16777217 bytes is too long (limit 16777216)')
(4, b'Expected Data frame') (4, b'Expected Data frame')
None
None
None
long [(1, True), (1, True), (1, True)]
('DATA', {'status': 'ok', 'tee': True})
";
    assert_eq!(said, expected);
    let said = attestation(&test, &["stuck"]);
    assert_eq!(said, "200 DATA {'status': 'ok', 'tee': True}\nall are closed in time\n");
    let ended = started.stop();
    ended.assert_ended(143, "signaled");
}

#[test]
fn a_server_that_was_killed_is_replaced() {
    let (test, started) = idle();
    let secrets = json!({"secrets": [{"name": "KEPT", "value": "kept"}]});
    assert_eq!(ask(&test, "secrets", &secrets), Ok(json!({"injected": 1})));
    let kill = "for p in /proc/[0-9]*; do grep -q '^mote-attest$' $p/comm && kill -9 ${p#/proc/} && echo killed; done";
    assert_eq!(client::shell(&test, kill), "killed\n");
    assert_eq!(ask(&test, "status", &Value::Null), Ok(json!({"status": "ok", "tee": true})));
    let secrets = json!({"secrets": [{"name": "NEW", "value": "new"}]});
    assert_eq!(ask(&test, "secrets", &secrets), Ok(json!({"injected": 1})));
    assert_eq!(client::shell(&test, "echo $KEPT $NEW; cat /run/secrets/*"), "kept new\nkeptnew");
    started.stop();
}

/// Takes what ports it can get, and says which.
const TAKER: &str = "
import os, socket, sys
kept = []
for user in [1000, 0]:
    os.seteuid(user)
    for port in [4091, 0x6d6f7465 + 7]:
        try:
            taker = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            taker.bind((socket.VMADDR_CID_ANY, port))
            taker.listen()
            kept.append(taker)
            print(user, hex(port), 'taken')
        except OSError as error:
            print(user, hex(port), error.strerror)
    os.seteuid(0)
print('ready', flush=True)
client, _ = kept[0].accept()
print('a client came', flush=True)";

#[test]
fn nobody_in_the_box_takes_the_servers_place() {
    let test = attesting(TestBox::debian().python(TAKER, &[]), "1").without_console_file();
    let mut started = test.start();
    let said: Vec<String> = std::iter::from_fn(|| started.line()).take(5).collect();
    let expected = [
        "1000 0xffb taken",
        "1000 0x6d6f746c Address already in use",
        "0 0xffb Address already in use",
        "0 0x6d6f746c Address already in use",
        "ready",
    ];
    assert_eq!(said, expected);
    assert_eq!(attestation(&test, &["verify"]), "verified\n");
    assert_eq!(started.stop().stdout, "", "the taker got nobody");
}

#[test]
fn a_box_that_has_no_reports_closes_its_clients() {
    let (test, started) = attesting(TestBox::busybox(), "0").idle();
    for _ in 0..2 {
        assert_eq!(attestation(&test, &["closed"]), "closed\n");
    }
    let ended = started.stop();
    assert!(ended.outcome.get("attestation").is_none(), "{}", ended.outcome);
    assert!(ended.stderr.contains("A3S_TEE_SIMULATE is \"0\""), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("mote-attest: there are no attestation reports"),
        "{}",
        ended.stderr
    );

    // Without the variable there is not even the program.
    let (test, started) = TestBox::busybox().idle();
    assert_eq!(client::shell(&test, "grep -l mote-attest /proc/[0-9]*/comm; echo none"), "none\n");
    assert!(started.stop().outcome.get("attestation").is_none());
}
