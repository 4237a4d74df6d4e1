//! How the entrypoint starts, as whom, and what it sees, where the spec says more than the contract.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::client::{Client, run};
use crate::commands::exec;
use crate::common::TestBox;

/// A frame of the exec protocol that is an instruction, one that refuses, and one that only asks who is there.
const CONTROL: u8 = 2;
const HEARTBEAT: u8 = 3;
const ERROR: u8 = 4;

/// Gives the box's entrypoint these bytes, and returns what it has written.
fn fed(test: &TestBox, input: &[u8]) -> String {
    let mut child = test.command().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().expect("mote ends");
    feeder.join().expect("ends").expect("all is taken");
    let finished = test.finished(output);
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    finished.stdout
}

#[test]
fn standard_input_arrives_whole_and_ends() {
    let test = TestBox::streaming("md5sum; echo over").with_entrypoint("stdin", json!(true));
    // More than all buffers on the way hold together.
    let bytes: Vec<u8> = (0u32..3_000_000).flat_map(u32::to_le_bytes).collect();
    let expected = {
        let file = test.path("input");
        fs::write(&file, &bytes).expect("written");
        let sum = Command::new("md5sum").stdin(File::open(&file).unwrap()).output().unwrap();
        String::from_utf8(sum.stdout).expect("a text")
    };
    assert_eq!(fed(&test, &bytes), format!("{expected}over\n"));
    assert_eq!(fed(&test.shell("cat"), b""), "");
    // A file needs no waiting for, and nobody reads what is behind the first line.
    let test =
        TestBox::streaming("read line; echo \"$line\"").with_entrypoint("stdin", json!(true));
    let file = test.path("input");
    fs::write(&file, format!("first\n{}", "x\n".repeat(1 << 20))).expect("written");
    let ran = test.run_by(test.command().stdin(File::open(file).expect("there")));
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "first\n"));
}

#[test]
fn without_stdin_there_is_none() {
    let test = TestBox::streaming("wc -c");
    let ran = test.run_by(test.command().stdin(File::open("/dev/zero").expect("there")));
    assert_eq!((ran.code, ran.stdout.trim()), (0, "0"));
}

/// What runs mote on a terminal of this size, with a program of python's.
const ON_TERMINAL: &str = r#"
import os, pty, sys, fcntl, termios, struct, time, select, signal
def size(fd, rows, cols): fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
pid, master = pty.fork()
if pid == 0:
    size(0, 33, 99)
    os.execvp(sys.argv[1], sys.argv[1:])
shown = b""
def until(wanted):
    global shown
    while wanted not in shown:
        if not select.select([master], [], [], 120)[0]: sys.exit(f"no {wanted} in {shown}")
        shown += os.read(master, 4096)
until(b"size 33 99\r\n")
size(master, 20, 70)
until(b"size 20 70\r\n")
os.write(master, b"hello\r")
until(b"hello\r\nline hello\r\n")
os.write(master, b"\x03")
until(b"interrupted\r\n")
try:
    while True:
        data = os.read(master, 4096)
        if not data: break
        shown += data
except OSError: pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"#;

#[test]
fn a_terminal_follows_that_of_mote() {
    // A signal that comes just before the shell waits for a line is noticed when it waits no more.
    let script = "trap 'echo size $(stty size)' WINCH; trap 'echo interrupted; exit 6' INT; \
         echo size $(stty size); while :; do read -t 1 line && echo line $line; done";
    let test = TestBox::streaming(script)
        .with_entrypoint("stdin", json!(true))
        .with_entrypoint("terminal", json!(true));
    let mut on_terminal = Command::new("python3");
    let mote = test.mote();
    on_terminal.args(["-c", ON_TERMINAL]).arg(mote.get_program()).args(mote.get_args());
    for (name, value) in mote.get_envs() {
        on_terminal.env(name, value.unwrap_or_default());
    }
    let ran = test.run_by(&mut on_terminal);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (6, "", ""));
}

#[test]
fn a_held_entrypoint_waits_for_its_start() {
    let test = TestBox::streaming("echo ready; trap 'exit 5' USR1; while :; do sleep 0.1; done")
        .with_entrypoint("start", json!("on-request"))
        .with_entrypoint("pid1", json!(true));
    let mut started = test.start();
    let ask = |kind, payload: &[u8]| {
        let mut client = Client::connect(&test, "exec");
        client.send(kind, payload);
        client.receive()
    };
    // While the guest boots, nobody answers, and a question may be thrown away.
    let waited = exec(&test, &["--wait", "60"], &["true"]).status().expect("mote runs");
    assert!(waited.success());
    assert!(ask(HEARTBEAT, b"").is_some());
    // Commands run, and see that nothing does yet but the process that is to become it.
    assert_ne!(run(&test, &["cat", "/proc/1/comm"]).stdout, "sh\n");
    assert_eq!(ask(CONTROL, b"start-entrypoint"), Some((CONTROL, b"start-entrypoint-ack".into())));
    started.wait_for_line("ready");
    let again = (ERROR, b"The entrypoint has been started before".into());
    assert_eq!(ask(CONTROL, b"start-entrypoint"), Some(again));
    assert_eq!(ask(CONTROL, b"signal-main:10"), Some((CONTROL, b"signal-main-ack".into())));
    assert_eq!(started.wait().code, 5);
}

#[test]
fn a_missing_program_is_told_of_before_the_start() {
    let held = |executable: &str| {
        TestBox::busybox()
            .with_entrypoint("executable", json!(executable))
            .with_entrypoint("start", json!("on-request"))
            .run()
    };
    let ran = held("/bin/nope");
    assert_eq!(ran.code, 127);
    assert!(ran.stderr.contains("'/bin/nope' is not in the root file system"), "{}", ran.stderr);
    let ran = held("/etc");
    assert_eq!(ran.code, 126);
    assert!(ran.stderr.contains("'/etc' is a directory"), "{}", ran.stderr);
}

#[test]
fn exact_ids_and_rights() {
    let script = "id -u; id -g; id -G; umask; grep -E '^(Cap(Bnd|Amb|Eff)|NoNewPrivs)' /proc/self/status; \
         echo $$; pwd; env | sort";
    let test = TestBox::streaming(script)
        .with_entrypoint("pid1", json!(true))
        .with("workdir", json!("/made/dir"));
    let ran = test
        .with_entrypoint("env", json!([["PATH", "/bin"], ["A", "b"]]))
        .with(
            "process",
            json!({
                "uid": 1234, "gid": 77, "additional_gids": [5, 6], "umask": 0o27,
                "capabilities": {
                    "bounding": ["CAP_CHOWN", "CAP_KILL"], "effective": ["CAP_CHOWN", "CAP_KILL"],
                    "permitted": ["CAP_CHOWN", "CAP_KILL"], "inheritable": ["CAP_KILL"],
                    "ambient": ["CAP_KILL"]
                },
                "no_new_privileges": true
            }),
        )
        .run();
    let expected = "1234\n77\n77 5 6\n0027\nCapEff:\t0000000000000020\nCapBnd:\t0000000000000021\n\
         CapAmb:\t0000000000000020\nNoNewPrivs:\t1\n1\n/made/dir\nA=b\nHOME=/\nPATH=/bin\nPWD=/made/dir\nSHLVL=1\n";
    assert_eq!((ran.code, ran.stdout.as_str()), (0, expected), "{}", ran.stderr);
}

#[test]
fn what_the_programs_see() {
    let script = "cat /proc/sys/kernel/hostname /proc/sys/kernel/domainname /proc/sys/net/core/somaxconn; \
         cat /proc/sys/kernel/version | wc -c; ls /etc | wc -l; ls -d /t; echo 2>&1 x >/proc/sys/net/core/somaxconn; \
         echo 2>&1 x >/root-file; touch /t/file && ls /t; cat /etc/seen /tools/tool; mount | grep -c ' /proc '";
    let test = TestBox::streaming(script);
    fs::write(test.path("root/etc/seen"), "of the image\n").expect("written");
    fs::create_dir_all(test.path("root/dev/tools")).expect("made");
    fs::write(test.path("root/dev/tools/tool"), "hidden\n").expect("written");
    let ran = test
        .with("hostname", json!("host"))
        .with("domainname", json!("domain"))
        .with("sysctls", json!([["net.core.somaxconn", "77"]]))
        .with(
            "guest_mounts",
            json!([
                {"type": "tmpfs", "destination": "/t", "options": ["size=64k", "mode=1777"]},
                {"type": "tmpfs", "destination": "/etc", "options": ["tmpcopyup"]},
                {"type": "bind", "source": "/dev/tools", "destination": "/tools"},
            ]),
        )
        .with("masked_paths", json!(["/proc/sys/kernel/version", "/no/such"]))
        .with("readonly_paths", json!(["/proc/sys"]))
        .with("read_only_root", json!(true))
        .run();
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    assert_eq!(lines[..4], ["host", "domain", "77", "0"], "{lines:?}");
    for expected in ["/t", "file", "of the image", "hidden"] {
        assert!(lines.contains(&expected), "{expected}: {lines:?}");
    }
    assert_eq!(lines.iter().filter(|line| line.ends_with("Read-only file system")).count(), 2);
}

#[test]
fn a_device_that_the_kernel_lacks_is_named() {
    let twice = json!(["/dev/fuse", "/dev/null", "/dev/fuse"]);
    let ran = TestBox::streaming("test -c /dev/fuse && exit 7").with("devices", twice).run();
    assert_eq!(ran.code, 7, "{}", ran.stderr);
    let ran = TestBox::streaming("exit 0").with("devices", json!(["/dev/fuse", "/dev/nope"])).run();
    assert_eq!(ran.code, 125, "{}", ran.stderr);
    assert!(ran.stderr.contains("devices: give the box /dev/nope: "), "{}", ran.stderr);
}

#[test]
fn signals_are_the_entrypoints_where_the_spec_says_so() {
    let script = "trap 'echo term' TERM; trap 'echo hup' HUP; trap 'exit 9' USR2; echo ready; \
         while :; do sleep 0.1; done";
    let test = TestBox::streaming(script).with("signals", json!("entrypoint"));
    let mut started = test.ready();
    // Twice within a second would stop a box hard.
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGTERM] {
        started.signal(signal);
        started.wait_for_line(if signal == libc::SIGTERM { "term" } else { "hup" });
    }
    started.signal(libc::SIGUSR2);
    assert_eq!(started.wait().code, 9);
}

#[test]
fn the_log_has_what_is_motes_own() {
    let test = TestBox::streaming("echo out; echo err >&2").with("unknown_field", json!(1));
    let log = test.path("mote.log");
    let ran = test.run_by(test.command().arg("--log").arg(&log));
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("out\n", "err\n"));
    let log = fs::read_to_string(log).expect("written");
    assert!(log.starts_with("mote: warning: unknown_field: "), "{log}");
}
