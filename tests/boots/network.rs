//! A network of a test's own: a namespace where mote runs, the host, and one where the servers are that the
//! guest talks to, with a cable between them and no way to anywhere else. When it is dropped, all of it goes.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;

use crate::client::{self, Done};
use crate::common::TestBox;

/// Addresses of the host, and of what is outside. The python programs contain them literally.
const HOST: &str = "
link set lo up
link set outside up
address add 198.51.100.100/24 dev outside
address add 2001:db8::100/64 dev outside nodad
";
const OUTSIDE: &str = "
link set lo up
link set inside addrgenmode none up
address add 198.51.100.1/24 dev inside
address add 198.51.100.2/24 dev inside
address add 2001:db8::1/64 dev inside nodad
address add 2001:db8::2/64 dev inside nodad
";

/// Far beyond anything a test does: a helper that takes longer hangs, and its test fails by name.
const DEADLINE_S: &str = "170";

/// The network.
pub struct Network {
    /// Where mote runs.
    pub host: Namespace,
    /// Where the servers run.
    pub outside: Namespace,
    /// For the servers' files.
    pub dir: PathBuf,
}

impl Network {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("mote-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from("/run").join(&name);
        fs::create_dir(&dir).expect("directory");
        let namespace = |role: &str| Namespace::new(format!("{name}-{role}"), dir.clone());
        let (host, outside) = (namespace("host"), namespace("outside"));
        host.ip(&format!("link add outside type veth peer name inside netns {}", outside.name));
        host.ip(HOST);
        outside.ip(OUTSIDE);
        Network { host, outside, dir }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A network namespace.
pub struct Namespace {
    name: String,
    dir: PathBuf,
}

impl Namespace {
    fn new(name: String, dir: PathBuf) -> Self {
        let status = Command::new("ip").args(["netns", "add", &name]).status().expect("ip runs");
        assert!(status.success(), "make a network namespace");
        Namespace { name, dir }
    }

    /// Gives commands to ip(8), one a line.
    pub fn ip(&self, batch: &str) {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("ip runs");
        child.stdin.take().expect("stdin").write_all(batch.as_bytes()).expect("writes");
        assert!(child.wait().expect("waits").success(), "{batch}");
    }

    /// The words in front of a command that is to run here. They exec it, so that its process is theirs.
    pub fn enter(&self) -> Vec<String> {
        vec!["nsenter".into(), format!("--net=/run/netns/{}", self.name)]
    }

    /// A command that is to run here.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--signal=KILL", DEADLINE_S])
            .args(self.enter())
            .args(words)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command here, which must succeed, and returns its output.
    pub fn run(&self, words: &[&str]) -> String {
        let output = self.command(words).output().expect("runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {}, {stderr}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a python script here, which must succeed, and returns its output.
    pub fn python(&self, script: &str) -> String {
        self.python_with(script, &[])
    }

    /// The same with arguments.
    pub fn python_with(&self, script: &str, arguments: &[&str]) -> String {
        self.run(&[&["/usr/bin/python3", "-c", script], arguments].concat())
    }

    /// Starts a python script that serves here, and waits until it prints `ready`.
    pub fn serve(&self, script: &str) -> Server {
        self.serve_with(script, &[])
    }

    /// The same with arguments.
    pub fn serve_with(&self, script: &str, arguments: &[&str]) -> Server {
        let mut child = self
            .command(&[&["/usr/bin/python3", "-u", "-c", script], arguments].concat())
            .current_dir(&self.dir)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let mut server = Server { child, stdout };
        assert_eq!(server.line(), "ready");
        server
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A server beside the box; ended when dropped.
pub struct Server {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Server {
    /// The next line that it prints.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.stdout.read_line(&mut line).expect("stdout") > 0, "the server ended");
        line.trim_end().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // `timeout` passes this signal on to the server; it could not pass on SIGKILL.
        crate::processes::kill(self.child.id(), libc::SIGTERM);
        let _ = self.child.wait();
    }
}

/// Runs a command in the box, with time enough for slow machines.
pub fn run(test: &TestBox, cmd: &[&str]) -> Done {
    client::run_with(test, cmd, json!({"timeout_ns": 170_000_000_000u64}))
}

/// Runs a shell script in the box, which must succeed, and returns its output.
pub fn shell(test: &TestBox, script: &str) -> String {
    let done = run(test, &["sh", "-c", script]);
    assert_eq!(done.code, 0, "{script}: {}{}", done.stdout, done.stderr);
    done.stdout
}

/// Runs a python script in the box, which must succeed, and returns its output.
pub fn python(test: &TestBox, script: &str) -> String {
    python_with(test, script, &[])
}

/// The same with arguments.
pub fn python_with(test: &TestBox, script: &str, arguments: &[&str]) -> String {
    let done = run(test, &[&["python3", "-c", script], arguments].concat());
    assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
    done.stdout
}
