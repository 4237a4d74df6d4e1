//! `mote exec`, `mote pty` and `mote cp` against the built-in servers, as their users call them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::client;
use crate::common::{TestBox, eventually, mote, sha256};

/// The command that runs `cmd` in the box, with no input.
pub fn exec(test: &TestBox, options: &[&str], cmd: &[&str]) -> Command {
    let mut command = Command::new(mote());
    command.arg("exec").args(options).arg(test.path("sock/exec.sock")).arg("--").args(cmd);
    command.stdin(Stdio::null());
    command
}

fn cp(test: &TestBox, from: &str, to: &str) -> Output {
    let mut command = Command::new(mote());
    command.arg("cp").arg(test.path("sock/exec.sock")).args([from, to]);
    command.stdin(Stdio::null()).output().expect("mote runs")
}

fn texts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Writes 100 MB of pseudo-random bytes: no part repeats, so none can take the place of another.
fn big_file(path: &Path) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    // More than any buffer or frame holds.
    let bytes: Vec<u8> = words.take(24_000_000 / 8).flatten().collect();
    fs::write(path, bytes).expect("written");
}

#[test]
fn exec_is_like_the_command_itself() {
    let (test, started) = TestBox::busybox().idle();
    let run = |options: &[&str], cmd: &[&str]| {
        texts(&exec(&test, options, cmd).output().expect("mote runs"))
    };
    let split = run(&[], &["sh", "-c", "echo out; echo err >&2; exit 42"]);
    assert_eq!(split, (42, "out\n".into(), "err\n".into()));
    let shaped = run(
        &["--env", "X=1 2", "--user", "app", "--workdir", "/etc"],
        &["sh", "-c", "echo \"$X\" $(id -u) $(pwd)"],
    );
    assert_eq!(shaped, (0, "1 2 1000 /etc\n".into(), String::new()));
    let late = run(&["--timeout", "500ms"], &["sleep", "1000"]);
    let said = "mote: the command was killed at its time limit of 500ms\n";
    assert_eq!(late, (137, String::new(), said.into()));
    assert_eq!(run(&[], &["sh", "-c", "kill -15 $$"]).0, 143);

    // The end of the input reaches the command, and its answer to that comes back.
    let mut child = exec(&test, &[], &["sh", "-c", "cat; echo tail"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("mote starts");
    child.stdin.take().expect("stdin").write_all(b"x").expect("written");
    assert_eq!(
        texts(&child.wait_with_output().expect("ends")),
        (0, "xtail\n".into(), String::new())
    );
    started.stop();
}

#[test]
fn commands_that_cannot_start_say_why_in_one_line() {
    let (test, started) = TestBox::busybox().idle();
    for verb in ["exec", "pty"] {
        let socket = test.path(&format!("sock/{verb}.sock"));
        for (options, cmd, code, said) in [
            (&[][..], "nothing", 127, "'nothing' is in no directory of PATH ("),
            (&[], "/no/such", 127, "'/no/such' is not in the root file system"),
            (&[], "/etc/passwd", 126, "'/etc/passwd' may not be executed by this user"),
            (&[], "/etc", 126, "'/etc' is a directory"),
            (&["--user", "ghost"], "id", 125, "user: user 'ghost' is not in the guest's"),
            (&["--workdir", "/no"], "id", 125, "workdir: enter '/no' in the guest: No such file"),
        ] {
            let mut command = Command::new(mote());
            command.arg(verb).args(options).arg(&socket).args(["--", cmd]).stdin(Stdio::null());
            let (ended, out, error) = texts(&command.output().expect("mote runs"));
            assert_eq!((ended, out.as_str()), (code, ""), "{verb} {cmd}: {error}");
            assert!(error.starts_with(&format!("mote: {said}")), "{verb} {cmd}: {error}");
            assert!(error.ends_with('\n') && error.lines().count() == 1, "{verb} {cmd}: {error}");
        }
    }
    started.stop();
}

#[test]
fn bytes_that_are_no_text_reach_the_guest_as_they_are() {
    let (test, started) = TestBox::busybox().idle();
    let bytes = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
    let socket = test.path("sock/exec.sock");
    let run = |words: &[&OsStr]| {
        let output = Command::new(mote()).args(words).stdin(Stdio::null()).output().expect("runs");
        assert!(output.status.success(), "{words:?}: {output:?}");
        output.stdout
    };
    let name = bytes(b"d\xe9");
    fs::create_dir(test.path("root/tmp").join(&name)).expect("created");
    let (variable, directory) = (bytes(b"X=\xfe"), bytes(b"/tmp/d\xe9"));
    let script = "printf '%s %s ' \"$0\" \"$X\"; pwd";
    let mut words: Vec<&OsStr> = ["exec", "--env"].map(OsStr::new).to_vec();
    words.extend([&*variable, OsStr::new("--workdir"), &directory, socket.as_os_str()]);
    let word = bytes(b"\xff");
    words.extend(["--", "sh", "-c", script].map(OsStr::new));
    words.push(&word);
    assert_eq!(run(&words), b"\xff \xfe /tmp/d\xe9\n");

    let [local, back] = ["out", "out/back"].map(|path| test.path(path));
    let local = local.join(&word);
    fs::write(&local, "contents").expect("written");
    let copy = |from: &OsStr, to: &OsStr| run(&[OsStr::new("cp"), socket.as_os_str(), from, to]);
    copy(local.as_os_str(), &bytes(b":/tmp/d\xe9/"));
    copy(&bytes(b":/tmp/d\xe9/\xff"), back.as_os_str());
    assert_eq!(fs::read(&back).expect("copied"), b"contents");
    started.stop();
}

#[test]
fn many_megabytes_cross_in_each_direction() {
    let (test, started) = TestBox::busybox().idle();
    let (root, out) = (test.path("root/big"), test.path("out/big"));
    big_file(&root);
    let expected = sha256(&root);
    let status = exec(&test, &[], &["cat", "/big"])
        .stdout(File::create(&out).expect("file"))
        .status()
        .expect("mote runs");
    assert!(status.success());
    assert_eq!(sha256(&out), expected);

    let input = File::open(&out).expect("file");
    let sum = exec(&test, &[], &["sha256sum"]).stdin(input).output().expect("mote runs");
    assert_eq!(texts(&sum), (0, format!("{expected}  -\n"), String::new()));
    started.stop();
}

#[test]
fn failures_are_explained_in_one_line() {
    let (test, started) = TestBox::busybox().idle();
    let run = |command: &mut Command| texts(&command.output().expect("mote runs"));
    let absent = test.path("sock/absent.sock");
    let mut command = Command::new(mote());
    let (code, _, said) = run(command.arg("exec").arg(&absent).args(["--", "true"]));
    assert_eq!(code, 125);
    assert!(said.contains("the box is not running, or the path is wrong"), "{said}");

    // A box that ends takes its commands with it, and they say so.
    let child =
        exec(&test, &[], &["sleep", "9191"]).stderr(Stdio::piped()).spawn().expect("mote starts");
    eventually("the command runs", || client::shell(&test, "ps").contains("sleep 9191"));
    started.kill();
    let (code, _, said) = texts(&child.wait_with_output().expect("ends"));
    assert_eq!(code, 125);
    assert!(said.contains("the box ended"), "{said}");
    // A socket file that nobody serves, as after a loss of power.
    let socket = test.path("sock/exec.sock");
    eventually("the box's socket goes", || !socket.exists());
    drop(UnixListener::bind(&socket).expect("bound"));
    let (code, _, said) = run(&mut exec(&test, &[], &["true"]));
    assert_eq!(code, 125);
    assert!(said.contains("the box is gone"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn exec_waits_for_a_box_that_starts() {
    let test = TestBox::busybox().shell("exec sleep 10000");
    // It may be looked for before it is started.
    let waiting = exec(&test, &["--wait", "60"], &["echo", "hi"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mote starts");
    let started = test.start();
    let ran = waiting.wait_with_output().expect("ends");
    assert_eq!(texts(&ran), (0, "hi\n".into(), String::new()));
    started.stop();
}

#[test]
fn files_are_copied_both_ways() {
    let (test, started) = TestBox::busybox().idle();
    let (local, back) = (test.path("out/tool"), test.path("out/back"));
    // So large that it is copied in several parts.
    fs::write(&local, b"0123456789".repeat(900_000)).expect("written");
    fs::set_permissions(&local, fs::Permissions::from_mode(0o750)).expect("mode");
    let text = |path: &Path| path.to_str().expect("text").to_owned();
    for guest_path in [":/new/dir/", ":/new/dir"] {
        let (code, _, said) = texts(&cp(&test, &text(&local), guest_path));
        assert!(code == 1 && said.contains("no such directory: /new"), "{said}");
    }
    assert!(!test.path("root/new").exists(), "no directory is made on the way");
    fs::create_dir_all(test.path("root/new/dir")).expect("created");
    assert_eq!(texts(&cp(&test, &text(&local), ":/new/dir/")), (0, String::new(), String::new()));
    let inside = test.path("root/new/dir/tool");
    assert_eq!(sha256(&inside), sha256(&local));
    assert_eq!(fs::metadata(&inside).expect("there").permissions().mode() & 0o777, 0o750);
    assert_eq!(
        texts(&cp(&test, ":/new/dir/tool", &text(&back))),
        (0, String::new(), String::new())
    );
    assert_eq!(sha256(&back), sha256(&local));
    assert_eq!(fs::metadata(&back).expect("there").permissions().mode() & 0o777, 0o750);
    // A file that shows no size.
    let (code, version, _) = texts(&cp(&test, ":/proc/version", "-"));
    assert!(code == 0 && version.starts_with("Linux version 6.12"), "{version}");

    let (code, _, said) = texts(&cp(&test, ":/no/such", &text(&back)));
    assert!(code == 1 && said.contains("/no/such: No such file"), "{said}");
    assert_eq!(sha256(&back), sha256(&local), "a failed copy leaves the destination alone");

    // Into a directory of this host, which is asked for only when the guest has given the file.
    let directory = text(&test.path("out/")) + "/";
    assert_eq!(texts(&cp(&test, ":/etc/passwd", &directory)), (0, String::new(), String::new()));
    assert!(test.path("out/passwd").is_file());
    let absent = directory.clone() + "absent/";
    for (from, to, expected) in [
        (":/etc/no-such", &directory, "/etc/no-such: No such file"),
        (":/etc", &directory, "/etc: is a directory (for all that is in it"),
        (":/etc/no-such", &absent, "/etc/no-such: No such file"),
        (":/etc/passwd", &absent, "absent/ is no directory; create it first"),
    ] {
        let (code, _, said) = texts(&cp(&test, from, to));
        assert!(code == 1 && said.contains(expected) && said.lines().count() == 1, "{said}");
    }
    started.stop();
}

/// Far longer than any program takes to draw.
const HANGING: Duration = Duration::from_secs(30);

/// A terminal multiplexer as the terminal: it can be asked what a person would see.
struct Tmux<'a> {
    test: &'a TestBox,
}

impl Tmux<'_> {
    fn command(&self, words: &[&str]) -> String {
        let output = Command::new("tmux")
            .args(["-u", "-f", "/dev/null", "-L", "mote"])
            .args(words)
            .env("TMUX_TMPDIR", self.test.path("out"))
            .env("LC_ALL", "C.UTF-8")
            .env("TERM", "xterm-256color")
            .output()
            .expect("tmux is installed");
        let (code, text, said) = texts(&output);
        assert_eq!(code, 0, "tmux {words:?}: {said}");
        text
    }

    fn keys(&self, keys: &[&str]) {
        self.command(&[&["send-keys"], keys].concat());
    }

    fn screen(&self) -> String {
        self.command(&["capture-pane", "-p"])
    }

    /// Waits until the screen shows what is wanted.
    fn wait_for(&self, wanted: impl Fn(&str) -> bool) -> String {
        let started = Instant::now();
        loop {
            let screen = self.screen();
            if wanted(&screen) {
                return screen;
            }
            assert!(started.elapsed() < HANGING, "the screen does not change any more:\n{screen}");
        }
    }
}

impl Drop for Tmux<'_> {
    fn drop(&mut self) {
        let _ = Command::new("tmux")
            .args(["-L", "mote", "kill-server"])
            .env("TMUX_TMPDIR", self.test.path("out"))
            .status();
    }
}

#[test]
fn full_screen_programs_work_on_a_terminal() {
    let (test, started) = TestBox::busybox().idle();
    let lines: String = (1..=500).map(|n| format!("line {n}\n")).collect();
    fs::write(test.path("root/tmp/lines"), lines).expect("written");
    let socket = test.path("sock/pty.sock");
    let tmux = Tmux { test: &test };
    // A shell around it, so that what the terminal is like afterwards can be seen.
    tmux.command(&["new-session", "-d", "-x", "120", "-y", "40", "env PS1='host> ' sh"]);
    tmux.wait_for(|screen| screen.contains("host>"));
    let start = format!("{} pty {} -- sh", mote().display(), socket.display());
    tmux.keys(&[&start, "Enter"]);
    tmux.wait_for(|screen| screen.contains("~ #"));
    tmux.keys(&["stty size", "Enter"]);
    tmux.wait_for(|screen| screen.contains("40 120"));

    tmux.keys(&["less /tmp/lines", "Enter"]);
    let screen = tmux.wait_for(|screen| screen.contains("line 39"));
    assert!(screen.starts_with("line 1\n"), "{screen}");
    tmux.keys(&["G"]);
    tmux.wait_for(|screen| screen.contains("line 500"));
    tmux.command(&["resize-window", "-x", "100", "-y", "30"]);
    tmux.keys(&["g"]);
    tmux.wait_for(|screen| screen.starts_with("line 1\n") && screen.contains("line 29\n"));
    tmux.keys(&["q"]);
    tmux.keys(&["clear; stty size", "Enter"]);
    tmux.wait_for(|screen| screen.contains("30 100"));

    tmux.keys(&["top", "Enter"]);
    tmux.wait_for(|screen| screen.contains("Mem:") && screen.contains("%CPU"));
    tmux.keys(&["q"]);
    tmux.keys(&["vi /tmp/edited", "Enter"]);
    tmux.wait_for(|screen| screen.contains("/tmp/edited"));
    tmux.keys(&["i", "typed in a guest", "Escape"]);
    // Keys that follow an Escape at once would be taken for one key together with it.
    tmux.wait_for(|screen| screen.contains("- /tmp/edited"));
    tmux.keys(&[":wq", "Enter"]);
    tmux.keys(&["clear; cat /tmp/edited; exit 3", "Enter"]);
    tmux.wait_for(|screen| screen.contains("typed in a guest\nhost>"));
    tmux.keys(&["echo code $?; stty -a | grep -o ' echo '", "Enter"]);
    // The terminal is as it was before: it echoes.
    tmux.wait_for(|screen| screen.contains("\ncode 3\n echo"));
    drop(tmux);
    started.stop();
}
