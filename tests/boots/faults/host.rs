//! A host that runs out of something, takes it away or changes it: disks, open files, memory, its
//! clock.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::client::{self, HEARTBEAT};
use crate::common::{Finished, TestBox, eventually, mote, seq};
use crate::processes::processes_with;

// ---- full disks ---------------------------------------------------------------------------------

/// A small file system in memory, mounted on a directory of the test's.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn on(dir: &Path, options: &str) -> Self {
        fs::create_dir_all(dir).expect("directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir);
        assert!(mount.status().expect("mount runs").success());
        SmallDisk(dir.into())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_under_console_output_costs_output_only() {
    let test = TestBox::busybox().shell("seq 100000; echo more; exit 6");
    let _disk = SmallDisk::on(&test.path("small"), "size=64k");
    let log = test.path("small/console.log");
    let test = test.with("console_output", json!(log));
    let ran = test.run();
    ran.assert_ended(6, "exited");
    assert_eq!(
        ran.stderr,
        "mote: stdout: write the guest's output: No space left on device (os error 28); the rest of it is lost\n"
    );
    let all = seq(100_000);
    let kept = fs::read_to_string(log).expect("there");
    assert!(kept.len() >= 60 * 1024 && all.starts_with(&kept), "{} bytes", kept.len());
}

#[test]
fn a_full_disk_under_logs_leaves_whole_objects() {
    let test = TestBox::busybox().shell("seq 10000; exit 6");
    let _disk = SmallDisk::on(&test.path("small"), "size=64k");
    let console = test.path("small/console.log");
    let test = test
        .with("console_output", json!(console))
        .with("log_config", json!({"driver": "json-file"}));
    let ran = test.run();
    ran.assert_ended(6, "exited");
    let expected = "mote: container.json: write: No space left on device (os error 28); the rest of the log is lost\n";
    assert!(ran.stderr.contains(expected), "{}", ran.stderr);
    let log = fs::read_to_string(test.path("small/container.json")).expect("there");
    for (line, number) in log.lines().zip(1..) {
        let object: serde_json::Value = serde_json::from_str(line).expect(line);
        assert_eq!(object["log"], format!("{number}\n"));
    }
}

#[test]
fn output_beyond_its_limit_is_dropped_with_one_line() {
    let test = TestBox::busybox()
        .shell("(seq 100000; echo more) & seq 100000 >&2; wait; exit 6")
        .with("console_limit_bytes", json!(100_000));
    let ran = test.run();
    ran.assert_ended(6, "exited");
    assert_eq!(
        ran.stderr,
        "mote: console_output has 100000 bytes, its limit (console_limit_bytes); the rest of the guest's output is lost\n"
    );
    assert_eq!(ran.console.len(), 100_000);
}

#[test]
fn a_link_that_a_guest_has_left_is_not_followed() {
    let test = TestBox::busybox();
    let precious = test.path("precious");
    fs::write(&precious, "precious").expect("file");
    let [log, outcome] = ["root/log", "root/outcome"].map(|name| test.path(name));
    let links = ["/log", "/outcome"];
    let links =
        links.map(|link| format!("rm -f {link}; busybox ln -s {} {link};", precious.display()));
    let test = test.shell(&links.concat()).with("console_output", json!(log));
    let warning = |field: &str, file: &Path| {
        let (file, root) = (file.display(), test.path("root"));
        let root = root.display();
        format!(
            "mote: warning: {field}: {file} is inside {root}, where the guest can change and replace it; choose a path outside\n"
        )
    };
    let warnings = [warning("--outcome", &outcome), warning("console_output", &log)];
    let ran = reporting_to(&test, &outcome);
    assert_eq!((ran.code, ran.stderr), (0, warnings.concat()));

    for (file, error) in [
        (
            &outcome,
            format!("create the outcome file {}: a symbolic link is in the way", outcome.display()),
        ),
        (
            &test.path("out/outcome"),
            format!("console_output: create {}: a symbolic link is in the way", log.display()),
        ),
    ] {
        let ran = reporting_to(&test, file);
        assert!(ran.code == 125 && ran.stderr.contains(&error), "{}: {}", ran.code, ran.stderr);
    }
    assert_eq!(fs::read_to_string(precious).expect("there"), "precious");
}

#[test]
fn reports_to_a_fifo_need_a_reader() {
    let test = TestBox::streaming("exit 6");
    let fifo = test.path("out/fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo runs").success());
    let ran = reporting_to(&test, &fifo);
    let expected = format!(
        "mote: create the outcome file {}: nobody reads this FIFO; start its reader before the box\n",
        fifo.display()
    );
    assert_eq!((ran.code, ran.stderr), (125, expected));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read_to_string(&fifo).expect("text"));
        assert_eq!(reporting_to(&test, &fifo).code, 6);
        assert!(reader.join().expect("reads").contains("\"exit_code\":6"));
    });
}

#[test]
fn a_full_root_share_is_the_guests_to_handle() {
    let test = TestBox::streaming(
        "dd if=/dev/zero of=/small/big bs=64k 2>&1 | grep -o 'No space.*'
         rm /small/big; echo again >/small/file && cat /small/file; exit 6",
    );
    let _disk = SmallDisk::on(&test.path("root/small"), "size=1m");
    let ran = test.run();
    assert_eq!(ran.code, 6);
    assert_eq!(
        (ran.stdout.as_str(), ran.stderr.as_str()),
        ("No space left on device\nagain\n", "")
    );
}

/// Runs the box with this as its outcome file.
fn reporting_to(test: &TestBox, file: &Path) -> Finished {
    let mut command = Command::new(mote());
    command.args(["--config", &test.spec.to_string(), "--outcome"]).arg(file);
    test.run_by(command.env("TMPDIR", test.path("tmp")))
}

#[test]
fn an_outcome_file_that_cannot_be_written_costs_one_line() {
    let test = TestBox::streaming("exit 6");
    let _disk = SmallDisk::on(&test.path("small"), "size=4k,nr_inodes=3");
    fs::write(test.path("small/all"), [0; 4096]).expect("room for this");
    let file = test.path("small/outcome.json");
    let ran = reporting_to(&test, &file);
    assert_eq!(ran.code, 6);
    let expected = format!("mote: write the outcome to {}: No space left", file.display());
    assert!(ran.stderr.starts_with(&expected), "{}", ran.stderr);
}

#[test]
fn an_outcome_file_that_cannot_be_created_is_said_before_anything_runs() {
    let test = TestBox::streaming("exit 6");
    let file = test.path("no/outcome.json");
    let ran = reporting_to(&test, &file);
    let expected = format!("mote: create the outcome file {}: No such file", file.display());
    assert!(ran.code == 125 && ran.stderr.starts_with(&expected), "{} {}", ran.code, ran.stderr);
}

#[test]
fn a_socket_directory_that_is_full_is_named() {
    let test = TestBox::streaming("exit 0");
    let _disk = SmallDisk::on(&test.path("full"), "size=4k,nr_inodes=1");
    let socket = test.path("full/exec.sock");
    let ran = test.with("exec_socket_path", json!(socket)).run();
    let said = format!("listen on {}: No space left on device", socket.display());
    ran.assert_not_started(&[&said]);
}

// ---- files and memory ---------------------------------------------------------------------------

/// Runs the box under a limit of prlimit(1).
fn under_limit(test: &TestBox, limit: &str) -> Finished {
    test.start_within(&["prlimit", limit]).wait()
}

#[test]
fn with_too_few_open_files_a_box_does_not_start_or_runs() {
    let test = TestBox::streaming("exit 9");
    let mut refused = 0;
    for files in (8..).step_by(3) {
        let ran = under_limit(&test, &format!("--nofile={files}"));
        if ran.code == 9 {
            assert_eq!(ran.stderr, "", "{files} files");
            break;
        }
        ran.assert_not_started(&["Too many open files"]);
        assert!(files < 128, "it never runs");
        refused += 1;
    }
    assert!(refused > 0);
}

#[test]
fn clients_beyond_the_open_file_limit_harm_nobody() {
    let test = TestBox::streaming("echo ready; exec sleep 10000");
    let mut started = test.start_within(&["prlimit", "--nofile=76"]);
    started.wait_for_line("ready");
    // More clients than mote has descriptors for: they wait in the socket's queue, or are closed.
    let clients: Vec<_> = (0..100).map(|_| client::Client::connect(&test, "exec")).collect();
    let mut served = 0;
    for mut client in clients {
        // A connection that is closed with the request unread gives a reset or a broken pipe.
        let _ = client.0.write_all(&[HEARTBEAT, 0, 0, 0, 0]);
        let mut answer = Vec::new();
        let _ = client.0.read_to_end(&mut answer);
        served += usize::from(answer == [HEARTBEAT, 0, 0, 0, 0]);
    }
    assert!(served > 10, "{served} of 100");
    assert_eq!(client::shell(&test, "echo served"), "served\n");
    started.stop();
}

#[test]
fn no_room_for_the_guests_memory_is_said() {
    let test = TestBox::streaming("exit 0");
    let ran = under_limit(&test, &format!("--as={}", 200 << 20));
    ran.assert_not_started(&["map 256 MiB of guest memory: Cannot allocate memory"]);
}

/// The host's setting for huge pages of shared memory, restored when this is dropped.
struct HugePagesSetting(String);

impl HugePagesSetting {
    const FILE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

    fn never() -> Self {
        let before = fs::read_to_string(Self::FILE).expect("a kernel with huge pages");
        let before = before.split(['[', ']']).nth(1).expect("a setting").to_owned();
        fs::write(Self::FILE, "never").expect("set");
        HugePagesSetting(before)
    }
}

impl Drop for HugePagesSetting {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, &self.0);
    }
}

#[test]
fn memory_that_the_host_takes_away_ends_the_box_with_the_reason() {
    // With this setting mote keeps guest memory in a file that is not sealed, so it can be cut short.
    let _never = HugePagesSetting::never();
    let test = TestBox::streaming("echo ready; while :; do :; done");
    let started = test.ready();
    let files = fs::read_dir(format!("/proc/{}/fd", started.pid())).expect("descriptors");
    let len = 256 << 20;
    let memory = files
        .flatten()
        .map(|entry| entry.path())
        .find(|path| fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == len));
    let memory = fs::OpenOptions::new().write(true).open(memory.expect("guest memory"));
    memory.and_then(|file| file.set_len(0)).expect("cut short");
    let ran = started.wait();
    ran.assert_ended(120, "memory-gone");
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("found no memory behind guest memory"), "{}", ran.stderr);
}

/// A cgroup of the test's own, with a limit on memory.
struct MemoryCgroup(PathBuf);

impl MemoryCgroup {
    fn new(max_mib: u64) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory").expect("cgroup v2 with memory");
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = root.join(format!("mote-test-{}-{count:04}", std::process::id()));
        fs::create_dir(&dir).expect("cgroup");
        fs::write(dir.join("memory.max"), (max_mib << 20).to_string()).expect("a limit");
        MemoryCgroup(dir)
    }

    /// Words in front of a command that start it in this cgroup.
    fn enter(&self) -> [String; 5] {
        let script = "echo $$ >\"$0\" && exec \"$@\"";
        let procs = self.0.join("cgroup.procs");
        let procs = procs.to_str().expect("text").to_owned();
        ["sh".into(), "-c".into(), script.into(), procs, "env".into()]
    }

    fn was_exceeded(&self) -> bool {
        let events = fs::read_to_string(self.0.join("memory.events")).expect("events");
        events.lines().any(|line| line.starts_with("oom_kill ") && line != "oom_kill 0")
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_box_beyond_memory_max_ends_and_leaves_nothing() {
    // Too little for mote's start; and less than the spec grants, of which the guest makes use.
    for (max_mib, script) in [
        (12, "exit 0"),
        (160, "echo ready; dd if=/dev/zero of=/dev/shm/all bs=1M count=200; exit 0"),
    ] {
        let cgroup = MemoryCgroup::new(max_mib);
        let test = TestBox::streaming(script).with("memory_mib", json!(512));
        let words = cgroup.enter();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let started = test.start_within(&words);
        let output = started.wait_with_output();
        // The host's kernel kills the largest process, which is mote. It has no exit code then, and the
        // outcome file stays empty.
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{:?}", output);
        assert!(cgroup.was_exceeded());
        assert_eq!(fs::read(test.path("out/outcome.json")).expect("the file"), b"");
        eventually("its processes end", || processes_with(&test.dir).is_empty());
        // A cgroup can be removed when no process is in it.
        eventually("nothing runs in the cgroup", || fs::remove_dir(&cgroup.0).is_ok());
        let again = test.shell("exit 4");
        assert_eq!(again.run().code, 4);
    }
}

// ---- clock --------------------------------------------------------------------------------------

/// What the machine's clock would show without the test's jumps. When this is dropped, it shows that.
struct Clock {
    wall: SystemTime,
    steady: Instant,
}

impl Clock {
    fn right(&self) -> Duration {
        (self.wall + self.steady.elapsed()).duration_since(UNIX_EPOCH).expect("after 1970")
    }

    /// Sets the machine's clock to the right time plus this many seconds.
    fn jump(&self, by_s: i64) {
        let now = self.right();
        let to = format!("@{}.{:09}", now.as_secs() as i64 + by_s, now.subsec_nanos());
        let status = Command::new("date").args(["-s", &to]).stdout(Stdio::null()).status();
        assert!(status.expect("date runs").success());
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.jump(0);
    }
}

#[test]
fn the_guests_clock_follows_the_hosts_jumps() {
    // A test may set the clock of no machine but the lab: elsewhere, this one starts a lab for itself.
    if std::env::var_os("MOTE_LAB").is_none() {
        let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/lab.sh");
        let test = std::env::current_exe().expect("this program");
        let name = std::any::type_name_of_val(&the_guests_clock_follows_the_hosts_jumps);
        let (_, name) = name.split_once("::").expect("behind the name of this program");
        let status = Command::new(lab).arg(test).args(["--exact", name]).status();
        assert!(status.expect("the lab starts").success(), "failed in the lab");
        return;
    }
    let (test, started) = TestBox::busybox().idle();
    let clock = Clock { wall: SystemTime::now(), steady: Instant::now() };
    for by_s in [86_400, -86_400, 3, -3, 400_000_000, 0] {
        clock.jump(by_s);
        eventually(&format!("the guest's clock is {by_s} s from the right time"), || {
            let said = client::shell(&test, "date +%s");
            let guest: i64 = said.trim().parse().expect("seconds");
            (clock.right().as_secs() as i64 + by_s).abs_diff(guest) <= 1
        });
    }
    started.stop();
}
