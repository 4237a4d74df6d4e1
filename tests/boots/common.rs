//! A box under test: a directory of its own, a spec to change, ways to run it, and how it ended.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::network::Network;
use crate::processes::{kill, processes_beside_janitors, processes_with};

/// Far beyond any boot: a run that takes longer hangs.
const DEADLINE_S: &str = "180";

const APPLETS: &str = "\
    sh cat echo ls mkdir mount umount sleep kill pwd env id hostname head tail wc seq dd \
    grep touch rm true false ip ps uname nproc free sha256sum stat test date awk sync chmod \
    cut tr printf readlink setsid stty df less top vi clear ifconfig nc nslookup timeout \
    wget httpd";

/// The binary under test: the one that is shipped, which the tests' own profile does not build.
pub fn mote() -> PathBuf {
    std::env::var_os("MOTE_TEST_BINARY").expect("tests/boots.sh sets MOTE_TEST_BINARY").into()
}

/// A box's directory and spec.
pub struct TestBox {
    pub dir: PathBuf,
    pub spec: Value,
    /// Words in front of the command: the network or namespace that mote runs in, if not the test's.
    within: Vec<String>,
    /// Environment variables for mote.
    env: Vec<(&'static str, PathBuf)>,
    mounted: bool,
}

/// A box that has ended: its exit code, its output and its reports.
pub struct Finished {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub console: String,
    pub outcome: Value,
    pub timeline: Value,
}

impl Finished {
    /// Fails unless the box ended with this code, and its outcome file says this kind of end.
    pub fn assert_ended(&self, code: i32, kind: &str) {
        assert_eq!((self.code, &self.outcome["kind"]), (code, &json!(kind)), "{}", self.stderr);
    }

    /// Fails unless the box did not start, and one line on stderr says why, with these parts.
    pub fn assert_not_started(&self, parts: &[&str]) {
        assert_eq!(self.code, 125, "{}", self.stderr);
        self.assert_one_line();
        for part in parts {
            assert!(self.stderr.contains(part), "{part}: {}", self.stderr);
        }
    }

    /// Fails unless the only output is one line of mote's on stderr.
    pub fn assert_one_line(&self) {
        assert_eq!(self.stdout, "");
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        assert!(self.stderr.starts_with("mote: "), "{}", self.stderr);
    }
}

impl TestBox {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // /run is a tmpfs on every Linux, so an overlay can be made there. No name is the beginning of
        // another one, since tests look for theirs in command lines.
        let dir = PathBuf::from(format!("/run/mote-test-{}-{count:04}", std::process::id()));
        for sub in ["root", "tmp", "sock", "out"] {
            fs::create_dir_all(dir.join(sub)).expect("directory");
        }
        let spec = json!({
            "box_id": format!("test-{count}"),
            "vcpus": 1,
            "memory_mib": 256,
            "rootfs_path": dir.join("root"),
            "exec_socket_path": dir.join("sock/exec.sock"),
            "fs_mounts": [],
            "entrypoint": { "executable": "/bin/true", "args": [], "env": [] },
            "console_output": dir.join("out/console.log"),
            "workdir": "/",
        });
        TestBox { dir, spec, within: Vec::new(), env: Vec::new(), mounted: false }
    }

    /// A box on a small tree: busybox and little else, made in an instant.
    pub fn busybox() -> Self {
        let new = Self::new();
        let root = new.dir.join("root");
        for sub in ["bin", "etc", "tmp"] {
            fs::create_dir(root.join(sub)).expect("directory");
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        for applet in APPLETS.split(' ') {
            symlink("busybox", root.join("bin").join(applet)).expect("link");
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\napp:x:1000:1000::/:/bin/sh\n")
            .expect("passwd");
        fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\nextra:x:2000:app\n")
            .expect("group");
        new
    }

    /// A box on an overlay of the Debian tree, which itself stays as it is.
    pub fn debian() -> Self {
        Self::on_tree("MOTE_TEST_DEBIAN")
    }

    /// The same on the tree that has container engines, too, and with the memory that they take.
    pub fn containers() -> Self {
        Self::on_tree("MOTE_TEST_CONTAINERS").with("memory_mib", json!(1024))
    }

    fn on_tree(variable: &str) -> Self {
        let mut new = Self::new();
        let lower =
            std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is set by `make boots`"));
        let [upper, work] = ["upper", "work"].map(|name| new.dir.join(name));
        fs::create_dir(&upper).expect("directory");
        fs::create_dir(&work).expect("directory");
        let options =
            format!("lowerdir={lower},upperdir={},workdir={}", upper.display(), work.display());
        let status = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(new.dir.join("root"))
            .status()
            .expect("mount runs");
        assert!(status.success(), "mount the overlay");
        new.mounted = true;
        new
    }

    /// Runs this shell script as the entrypoint.
    pub fn shell(mut self, script: &str) -> Self {
        self.spec["entrypoint"]["executable"] = json!("/bin/sh");
        self.spec["entrypoint"]["args"] = json!(["-c", script]);
        self
    }

    /// A small box that runs this shell script, with its output on mote's own streams.
    pub fn streaming(script: &str) -> Self {
        Self::busybox().shell(script).without_console_file()
    }

    /// Runs this python script, with these arguments, as the entrypoint.
    pub fn python(mut self, script: &str, arguments: &[&str]) -> Self {
        self.spec["entrypoint"]["executable"] = json!("python3");
        self.spec["entrypoint"]["args"] = json!([&["-u", "-c", script], arguments].concat());
        self
    }

    /// Puts the output on mote's own streams.
    pub fn without_console_file(self) -> Self {
        self.with("console_output", json!(null))
    }

    /// Sets a field of the spec.
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.spec[field] = value;
        self
    }

    /// Leaves a field of the spec out.
    pub fn without(mut self, field: &str) -> Self {
        self.spec.as_object_mut().expect("an object").remove(field);
        self
    }

    /// Sets a field of the spec's entrypoint.
    pub fn with_entrypoint(mut self, field: &str, value: Value) -> Self {
        self.spec["entrypoint"][field] = value;
        self
    }

    /// Boots this kernel in place of Linux, with this initramfs.
    pub fn booting(mut self, kernel: &[u8], initramfs: &[u8]) -> Self {
        for (name, file, bytes) in
            [("MOTE_KERNEL", "kernel", kernel), ("MOTE_INITRAMFS", "initramfs", initramfs)]
        {
            let path = self.path(file);
            fs::write(&path, bytes).expect("file");
            self.env.push((name, path));
        }
        self
    }

    /// Runs mote in this network.
    pub fn inside(mut self, network: &Network) -> Self {
        self.within.extend(network.host.enter());
        self
    }

    /// Shows mote, and no other process, this text as the host's resolv.conf.
    pub fn with_host_resolver(mut self, text: &str) -> Self {
        let file = self.path("host-resolv.conf");
        fs::write(&file, text).expect("file");
        let script = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
        self.within.extend(["unshare", "--mount", "sh", "-c", script].map(String::from));
        self.within.push(file.to_str().expect("text").into());
        self
    }

    /// Sets an environment variable for mote.
    pub fn with_variable(mut self, name: &'static str, value: impl Into<PathBuf>) -> Self {
        self.env.push((name, value.into()));
        self
    }

    /// `mote template`, or another command that takes a spec, with this box's.
    pub fn command_of(&self, verb: &str) -> Command {
        let mut command = Command::new(mote());
        command.args([verb, "--config"]).arg(self.spec.to_string()).envs(self.env.iter().cloned());
        command
    }

    /// Where all tests run from templates (`tests/boots.sh`), makes this box's first. Which boxes have none, and why, is for the
    /// tests of templates to see.
    fn make_template(&self) {
        /// Who finds that another makes it does not wait.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        if templates_come_first() {
            let _one = ONE_AT_A_TIME.lock();
            let _ = self.command_of("template").output().expect("mote runs");
        }
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.join(relative)
    }

    /// The command that runs the box. It ends at a deadline, its reports go to `out`, and its TMPDIR
    /// shows whether it leaves temporary files.
    pub fn command(&self) -> Command {
        self.make_template();
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "--signal=KILL", DEADLINE_S])
            .args(&self.within)
            .arg(mote())
            .arg("--config")
            .arg(self.spec.to_string())
            .arg("--outcome")
            .arg(self.path("out/outcome.json"))
            .arg("--timeline")
            .arg(self.path("out/timeline.json"))
            .env("TMPDIR", self.path("tmp"))
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null());
        command
    }

    /// The command that is mote itself, with its output on pipes: its process is mote's, so it can get
    /// signals.
    pub fn mote(&self) -> Command {
        self.mote_within(&[])
    }

    /// The same with these words in front, which must exec mote.
    pub fn mote_within(&self, words: &[&str]) -> Command {
        self.make_template();
        let mut command = Command::new(words.first().map_or_else(mote, PathBuf::from));
        if let [_, words @ ..] = words {
            command.args(words).arg(mote());
        }
        command
            .arg("--config")
            .arg(self.spec.to_string())
            .arg("--outcome")
            .arg(self.path("out/outcome.json"))
            .env("TMPDIR", self.path("tmp"))
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs the box to its end, and checks that it left nothing behind.
    pub fn run(&self) -> Finished {
        self.run_by(&mut self.command())
    }

    /// The same by a command of the test's making.
    pub fn run_by(&self, command: &mut Command) -> Finished {
        self.finished(command.output().expect("mote runs"))
    }

    /// What a run left, given its output; fails if it left a process, socket or temporary file.
    pub fn finished(&self, output: Output) -> Finished {
        self.traces().finished(output)
    }

    /// Starts the box in the background.
    pub fn start(&self) -> Started {
        let words: Vec<&str> = self.within.iter().map(String::as_str).collect();
        self.start_within(&words)
    }

    /// Starts the box in the background, with these words in front of mote's own.
    pub fn start_within(&self, words: &[&str]) -> Started {
        self.start_by(&mut self.mote_within(words))
    }

    /// Starts the box in the background, by a command of the test's making.
    pub fn start_by(&self, command: &mut Command) -> Started {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("mote starts");
        let stdout = child.stdout.take().map(BufReader::new);
        Started { child, stdout, traces: self.traces() }
    }

    /// Starts the box and waits until its script has said `ready`.
    pub fn ready(&self) -> Started {
        let mut started = self.start();
        started.wait_for_line("ready");
        started
    }

    /// Starts a box that does nothing, with both servers' sockets, and waits until it is up.
    pub fn idle(self) -> (TestBox, Started) {
        let pty = self.path("sock/pty.sock");
        let test = self
            .shell("echo ready; exec sleep 10000")
            .without_console_file()
            .with("pty_socket_path", json!(pty));
        let started = test.ready();
        (test, started)
    }

    /// The box's cgroup, which it has if its spec has limits for it.
    pub fn cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup/a3s-box").join(self.spec["box_id"].as_str().expect("text"))
    }

    /// Fails if anything that belongs to this box is still there.
    pub fn assert_nothing_left(&self) {
        self.traces().assert_nothing_left();
    }

    fn traces(&self) -> Traces {
        Traces { dir: self.dir.clone() }
    }
}

impl Drop for TestBox {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg(self.path("root")).status();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn templates_come_first() -> bool {
    std::env::var_os("MOTE_TEST_TEMPLATES_FIRST").is_some()
}

/// Where a box leaves what can be seen of it.
#[derive(Clone)]
struct Traces {
    dir: PathBuf,
}

impl Traces {
    fn finished(&self, output: Output) -> Finished {
        self.assert_nothing_left();
        let text = |name: &str| {
            let bytes = fs::read(self.dir.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let json = |name: &str| serde_json::from_str(&text(name)).unwrap_or(Value::Null);
        let booted = json("out/timeline.json")["template"] == "there is none; it is being made";
        assert!(!(booted && templates_come_first()), "the template was not made first");
        Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            console: text("out/console.log"),
            outcome: json("out/outcome.json"),
            timeline: json("out/timeline.json"),
        }
    }

    fn assert_nothing_left(&self) {
        for sub in ["tmp", "sock"] {
            let left = fs::read_dir(self.dir.join(sub)).expect("directory").flatten();
            let left: Vec<_> = left.collect();
            assert!(left.is_empty(), "left in {sub}: {left:?}");
        }
        // The janitor ends after mote, when it has closed the VM and removed the cgroup.
        let left = processes_beside_janitors(&self.dir);
        assert_eq!(left, Vec::<String>::new(), "processes left");
        eventually("the janitor ends", || processes_with(&self.dir).is_empty());
    }
}

/// A box that runs in the background; killed when dropped.
pub struct Started {
    pub child: Child,
    stdout: Option<BufReader<ChildStdout>>,
    traces: Traces,
}

impl Started {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many descriptors mote has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("a process").count()
    }

    /// The next line that the guest writes to stdout (the spec needs `console_output` null); `None` at
    /// the end.
    pub fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let stdout = self.stdout.as_mut().expect("not closed");
        (stdout.read_line(&mut line).expect("stdout") > 0).then(|| line.trim_end().to_owned())
    }

    /// Waits until the guest has written this line to stdout.
    pub fn wait_for_line(&mut self, wanted: &str) {
        while let Some(line) = self.line() {
            if line == wanted {
                return;
            }
        }
        let mut stderr = String::new();
        let _ = self.child.stderr.take().expect("stderr").read_to_string(&mut stderr);
        panic!("the guest ended before it said {wanted:?}; stderr: {stderr}");
    }

    /// Closes the ends of mote's output that the test holds.
    pub fn close_output(&mut self) {
        drop(self.stdout.take());
        drop(self.child.stderr.take());
    }

    /// Sends mote a signal.
    pub fn signal(&self, signal: i32) {
        kill(self.pid(), signal);
    }

    /// Sends SIGTERM, waits for the end, and checks that the box ended by that signal.
    pub fn stop(self) -> Finished {
        self.signal(libc::SIGTERM);
        let ran = self.wait();
        assert_eq!(ran.code, 143, "{}", ran.stderr);
        ran
    }

    /// Kills mote. Its janitor and its children need a moment to end, for which the test waits.
    pub fn kill(self) {
        self.signal(libc::SIGKILL);
        let output = self.wait_with_output();
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{output:?}");
    }

    /// Waits for the end, and checks that the box left no process, socket or temporary file.
    pub fn wait(self) -> Finished {
        let traces = self.traces.clone();
        traces.finished(self.wait_with_output())
    }

    /// Waits for the end, and does not look at what the box left.
    pub fn wait_with_output(mut self) -> Output {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        if let Some(mut stream) = self.stdout.take() {
            stream.read_to_end(&mut stdout).expect("stdout");
        }
        if let Some(mut stream) = self.child.stderr.take() {
            stream.read_to_end(&mut stderr).expect("stderr");
        }
        let status = self.child.wait().expect("waits");
        Output { status, stdout, stderr }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again until it is so. What never becomes so fails here by its name, before the lab's time limit.
pub fn eventually(what: &str, so: impl Fn() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what}: not after a minute");
        // What is waited for may be a process that runs when nobody else wants to, as the maker of a template does.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Asks again until nothing is left of something, and otherwise says what is.
pub fn eventually_nothing(of: &str, left: impl Fn() -> Vec<String>) {
    let started = Instant::now();
    loop {
        let left = left();
        if left.is_empty() {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "left {of}: {left:?}");
        std::thread::yield_now();
    }
}

/// Writes an executable file.
pub fn executable(path: &Path, contents: &[u8]) {
    fs::write(path, contents).expect("file");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("mode");
}

/// Compiles one of the programs in C beside the tests.
pub fn compile(compiler: &str, options: &str, source: &str, output: &Path) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/boots");
    let status = Command::new(compiler)
        .args(options.split_whitespace())
        .arg("-o")
        .args([output, &sources.join(source)])
        .status();
    let status = status.unwrap_or_else(|error| panic!("{compiler}: {error}"));
    assert!(status.success(), "{compiler} {source}");
}

/// The digest of a file's bytes.
pub fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum runs");
    String::from_utf8_lossy(&output.stdout)[..64].to_owned()
}

/// The numbers from 1 on, one a line, as seq(1) says them.
pub fn seq(last: usize) -> String {
    (1..=last).map(|number| format!("{number}\n")).collect()
}

/// The host's time in seconds.
pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}
