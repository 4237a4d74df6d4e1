//! mote as an OCI runtime, by the commands that container engines give. `python/engine.py` is what an engine keeps beside a
//! container; podman and containerd themselves are tried by hand.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

use crate::common::{TestBox, eventually, mote};

const ENGINE: &str = include_str!("python/engine.py");

/// A container on a small image.
pub struct Container {
    pub test: TestBox,
    pub config: Value,
    /// What runs the runtime's commands and the engine, if not the test itself.
    pub within: Vec<String>,
}

/// A container that has been made, with the engine's process beside it.
pub struct Made<'a> {
    container: &'a Container,
    pub engine: Child,
}

impl Container {
    /// One that runs this shell script.
    pub fn new(script: &str) -> Self {
        Self::on(TestBox::busybox(), script)
    }

    /// The same on the root file system of this box.
    pub fn on(test: TestBox, script: &str) -> Self {
        fs::create_dir(test.path("bundle")).expect("made");
        let config = json!({
            "ociVersion": "1.0.2",
            "root": {"path": test.path("root")},
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin:/usr/bin"],
                "args": ["sh", "-c", script],
                "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            ],
            "linux": {
                "cgroupsPath": format!("/mote-oci-test/{}", name(&test)),
                "resources": {"memory": {"limit": 128 << 20}, "pids": {"limit": 100}},
                "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "mount"}],
            },
        });
        Container { test, config, within: Vec::new() }
    }

    /// A program, by whatever runs it for this container.
    fn program(&self, program: &Path) -> Command {
        match self.within.split_first() {
            None => Command::new(program),
            Some((first, words)) => {
                let mut command = Command::new(first);
                command.args(words).arg(program);
                command
            }
        }
    }

    /// mote's file, where whoever runs it finds it.
    fn binary(&self) -> PathBuf {
        if self.within.is_empty() { mote() } else { self.test.path("mote") }
    }

    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        let (parent, key) = pointer.rsplit_once('/').expect("a path");
        self.config.pointer_mut(parent).expect("there")[key] = value;
        self
    }

    /// A command of the runtime's, with the container's name behind it.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.program(&self.binary());
        command.args(["oci", "--root"]).arg(self.test.path("state")).args(words);
        command
    }

    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).arg(name(&self.test)).output().expect("mote runs")
    }

    /// The same, which must succeed; what it has printed.
    pub fn done(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn status(&self) -> Value {
        let state: Value = serde_json::from_str(&self.done(&["state"])).expect("JSON");
        state["status"].clone()
    }

    pub fn write_config(&self) {
        let path = self.test.path("bundle/config.json");
        fs::write(path, self.config.to_string()).expect("written");
    }

    fn engine(&self, more: &[&str]) -> Child {
        let bundle = self.test.path("bundle");
        let _ = fs::remove_file(bundle.join("pid"));
        self.write_config();
        let mut engine = self.program(Path::new("python3"));
        engine.args(["-c", ENGINE]).arg(self.binary()).arg(self.test.path("state"));
        engine.arg(name(&self.test)).arg(bundle).args(more);
        engine.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        engine.spawn().expect("python runs")
    }

    /// Makes it, and waits until it is made.
    pub fn make(&self, more: &[&str]) -> Made<'_> {
        let mut made = Made { container: self, engine: self.engine(more) };
        let pid_file = self.test.path("bundle/pid");
        eventually("it is made", || pid_file.exists());
        assert_eq!(made.engine.try_wait().expect("asked"), None);
        made
    }

    /// The error with which it cannot be made.
    pub fn refused(&self) -> String {
        let output = self.engine(&[]).wait_with_output().expect("ends");
        assert_eq!(output.status.code(), Some(1));
        let log = fs::read_to_string(self.test.path("bundle/log")).expect("a log");
        let line: Value = serde_json::from_str(log.lines().last().expect("a line")).expect("JSON");
        assert_eq!(line["level"], "error");
        self.assert_nothing_left();
        line["msg"].as_str().expect("a text").to_owned()
    }

    fn cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup/mote-oci-test").join(name(&self.test))
    }

    pub fn assert_nothing_left(&self) {
        let state = self.test.path("state");
        let left: Result<Vec<PathBuf>, _> =
            fs::read_dir(&state).map(|entries| entries.flatten().map(|e| e.path()).collect());
        assert_eq!(left.unwrap_or_default(), Vec::<PathBuf>::new());
        eventually("the cgroup goes", || !self.cgroup().exists());
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read");
        assert!(!mounts.contains(state.to_str().expect("text")), "{mounts}");
        self.test.assert_nothing_left();
    }
}

impl Made<'_> {
    pub fn start(&self) {
        self.container.done(&["start"]);
    }

    /// Its exit code, and what it has written.
    pub fn end(mut self) -> (i32, String) {
        drop(self.engine.stdin.take());
        let output = self.engine.wait_with_output().expect("ends");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code().expect("a code"), text)
    }
}

pub fn name(test: &TestBox) -> String {
    test.dir.file_name().expect("a name").to_string_lossy().into_owned()
}

#[test]
fn a_containers_life() {
    let script = "touch /started; trap 'exit 7' USR1; echo ready; while :; do sleep 0.1; done";
    let container = Container::new(script);
    let made = container.make(&[]);
    assert_eq!(container.status(), "created");
    assert!(!container.test.path("root/started").exists());
    let again =
        container.run(&["create", "--bundle", container.test.path("bundle").to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(1));
    made.start();
    eventually("it runs", || container.test.path("root/started").exists());
    assert_eq!(container.status(), "running");
    let process = container.test.path("bundle/process.json");
    let exec = |script: &str| {
        let wanted = json!({"args": ["sh", "-c", script], "cwd": "/tmp", "env": ["PATH=/bin", "A=b"],
            "user": {"uid": 1000, "gid": 7, "additionalGids": [8]}});
        fs::write(&process, wanted.to_string()).expect("written");
        container.run(&["exec", "--process", process.to_str().expect("text")])
    };
    let ran = exec("id -u; id -G; pwd; echo $A; cat /proc/1/comm; exit 5");
    assert_eq!(ran.status.code(), Some(5), "{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "1000\n7 8\n/tmp\nb\nsh\n");
    assert_eq!(container.run(&["delete"]).status.code(), Some(1));
    let kill = container.command(&["kill", &name(&container.test), "USR1"]).status().expect("runs");
    assert!(kill.success());
    assert_eq!(made.end(), (7, "ready\n".into()));
    assert_eq!(container.status(), "stopped");
    container.done(&["delete"]);
    assert_eq!(container.run(&["delete"]).status.code(), Some(1));
    container.done(&["delete", "--force"]);
    container.assert_nothing_left();
}

#[test]
fn input_output_and_an_end_of_its_own() {
    let container = Container::new("read line; echo got $line; cat | wc -c; exit 3");
    let mut made = container.make(&[]);
    made.start();
    let mut stdin = made.engine.stdin.take().expect("a pipe");
    stdin.write_all(b"hello\n").expect("written");
    stdin.write_all(&[b'x'; 100_000]).expect("written");
    drop(stdin);
    assert_eq!(made.end(), (3, "got hello\n100000\n".into()));
    container.done(&["delete"]);
    container.assert_nothing_left();
}

#[test]
fn a_terminal_has_the_engines_size() {
    let script = "stty size; read line; echo line $line >/dev/console; exit 4";
    let container = Container::new(script).with("/process/terminal", json!(true));
    let mut made = container.make(&["terminal"]);
    made.start();
    let stdin = made.engine.stdin.as_mut().expect("a pipe");
    stdin.write_all(b"hi\r").expect("written");
    let output = made.engine.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(4));
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("31 91\r\n") && shown.contains("line hi\r\n"), "{shown}");
    container.done(&["delete"]);
    container.assert_nothing_left();
}

#[test]
fn a_container_has_the_standard_devices_and_what_it_asks_for() {
    let script =
        "cd /dev; echo *; stat -c '%n %F %t:%T %a' null net/tun; readlink ptmx; echo x >null";
    let standard =
        "core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero";
    let mut listed: Vec<&str> = standard.split(' ').chain(["net"]).collect();
    listed.sort();
    let tun = json!([{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200}]);
    let container = Container::new(script).with("/linux/devices", tun);
    let made = container.make(&[]);
    made.start();
    let (code, output) = made.end();
    let devices =
        "null character special file 1:3 666\nnet/tun character special file a:c8 666\npts/ptmx";
    assert_eq!((code, output.trim()), (0, &*format!("{}\n{devices}", listed.join(" "))));
    container.done(&["delete"]);
    container.assert_nothing_left();
}

#[test]
fn what_cannot_run_is_told_by_create() {
    for (arguments, expected) in [
        (json!(["/nope"]), "no such file or directory"),
        (json!(["nope"]), "no such file or directory"),
        (json!(["/etc/passwd"]), "permission denied"),
        (json!(["/etc"]), "permission denied"),
    ] {
        let error = Container::new("").with("/process/args", arguments).refused();
        assert!(error.contains(expected), "{error}");
    }
    let error = Container::new("")
        .with("/linux/devices", json!([{"path": "/dev/sda", "type": "b"}]))
        .refused();
    assert!(error.contains("linux.devices[0]"), "{error}");
    let error = Container::new("").with("/process/args", json!("sh")).refused();
    assert!(error.contains("process.args: is a string, must be an array"), "{error}");
}

#[test]
fn mounts_are_resolved_in_the_image() {
    let script = "cat /link/file /data/file; echo why >/dev/termination-log; echo x 2>&1 >/data/new; echo 2>&1 >/root-file; echo x >/tmpfs/x && ls /tmpfs";
    let container = Container::new(script);
    let (root, outside) = (container.test.path("root"), container.test.path("outside"));
    fs::create_dir(&outside).expect("made");
    // Where the image's link leads on the host, and in the image.
    symlink(&outside, root.join("link")).expect("made");
    let [file, data, log] = ["a-file", "data", "log"].map(|name| container.test.path(name));
    fs::write(&file, "of the host\n").expect("written");
    fs::write(&log, "").expect("written");
    fs::create_dir(&data).expect("made");
    fs::write(data.join("file"), "data\n").expect("written");
    let mut mounts = container.config["mounts"].as_array().expect("an array").clone();
    mounts.extend([
        json!({"destination": "/link/file", "type": "bind", "source": file, "options": ["bind", "ro"]}),
        // Where Kubernetes looks for a container's last words.
        json!({"destination": "/dev/termination-log", "type": "bind", "source": log, "options": ["rbind", "rprivate", "rw"]}),
        json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind", "ro"]}),
        json!({"destination": "/tmpfs", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}),
    ]);
    let container = container.with("/mounts", json!(mounts)).with("/root/readonly", json!(true));
    let made = container.make(&[]);
    made.start();
    let (code, output) = made.end();
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!((code, &lines[..2]), (0, &["of the host", "data"][..]), "{output}");
    assert_eq!(lines.iter().filter(|line| line.ends_with("Read-only file system")).count(), 2);
    assert_eq!(lines.last(), Some(&"x"));
    assert_eq!(fs::read_to_string(&log).expect("there"), "why\n");
    assert_eq!(
        fs::read_dir(&outside).expect("there").count(),
        0,
        "the link was followed on the host"
    );
    container.done(&["delete"]);
    container.assert_nothing_left();
}

#[test]
fn the_guests_kernel_heeds_what_a_mount_forbids() {
    let script = "exec 2>&1; cat /limited/inner/file; /limited/program; cat /limited/link; \
        for at in /limited /limited/inner /once-tmpfs; do grep \" $at \" /proc/mounts | tail -n 1 | cut -d' ' -f4; done";
    let container = Container::new(script);
    let [limited, inner] = ["limited", "inner"].map(|name| container.test.path(name));
    fs::create_dir_all(limited.join("inner")).expect("made");
    fs::create_dir(&inner).expect("made");
    fs::write(inner.join("file"), "of the inner one\n").expect("written");
    let program = limited.join("program");
    fs::write(&program, "#!/bin/sh\necho ran\n").expect("written");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("set");
    symlink("program", limited.join("link")).expect("made");
    let mut mounts = container.config["mounts"].as_array().expect("an array").clone();
    mounts.extend([
        json!({"destination": "/limited", "type": "bind", "source": limited,
            "options": ["rbind", "nosuid", "nodev", "noexec", "nosymfollow"]}),
        json!({"destination": "/limited/inner", "type": "bind", "source": inner, "options": ["rbind"]}),
        json!({"destination": "/once-tmpfs", "type": "tmpfs", "source": "tmpfs", "options": ["noexec", "size=1m"]}),
        // For it the tmpfs is made on the host.
        json!({"destination": "/once-tmpfs/program", "type": "bind", "source": program, "options": ["bind"]}),
    ]);
    let container = container.with("/mounts", json!(mounts));
    let made = container.make(&[]);
    made.start();
    let (_, output) = made.end();
    let lines: Vec<&str> = output.lines().collect();
    let [inner, program, link, limited, unlimited, tmpfs] = lines[..] else { panic!("{output}") };
    assert_eq!(inner, "of the inner one");
    assert!(program.ends_with("Permission denied"), "{output}");
    assert!(link.ends_with("Too many levels of symbolic links"), "{output}");
    assert_eq!(limited, "rw,nosuid,nodev,noexec,relatime,nosymfollow");
    assert_eq!(unlimited, "rw,relatime");
    assert_eq!(tmpfs, "rw,noexec,relatime");
    container.done(&["delete"]);
    container.assert_nothing_left();
}

#[test]
fn a_container_is_paused_and_killed_with_its_cgroup() {
    let container = Container::new("echo ready; while :; do sleep 0.1; done");
    let made = container.make(&[]);
    made.start();
    let limit = fs::read_to_string(container.cgroup().join("memory.max")).expect("there");
    assert!(limit.trim().parse::<u64>().expect("a number") > 128 << 20, "{limit}");
    container.done(&["pause"]);
    assert_eq!(container.status(), "paused");
    container.done(&["resume"]);
    assert_eq!(container.status(), "running");
    let pids = container.done(&["ps", "--format", "json"]);
    assert!(
        pids.contains(fs::read_to_string(container.test.path("bundle/pid")).expect("there").trim())
    );
    container.done(&["delete", "--force"]);
    assert_eq!(made.end().0, 137);
    container.assert_nothing_left();
}

#[test]
fn a_killed_create_leaves_what_delete_removes() {
    let container = Container::new("true");
    let mut engine = container.engine(&[]);
    let state = container.test.path("state").join(name(&container.test)).join("state.json");
    eventually("it is being made", || state.exists());
    engine.kill().expect("killed");
    engine.wait().expect("ended");
    // Create itself goes on, or is over; either way.
    container.done(&["delete", "--force"]);
    container.assert_nothing_left();
    // And of the box's process.
    let made = container.make(&[]);
    let pid = fs::read_to_string(container.test.path("bundle/pid")).expect("there");
    let killed = Command::new("kill").args(["-9", pid.trim()]).status().expect("runs");
    assert!(killed.success());
    assert_eq!(made.end().0, 137);
    assert_eq!(container.status(), "stopped");
    container.done(&["delete"]);
    container.assert_nothing_left();
}

#[test]
fn containers_that_are_made_and_deleted_at_once_leave_nothing() {
    // For a closer look: MOTE_TEST_AT_ONCE=100.
    let count =
        std::env::var("MOTE_TEST_AT_ONCE").map_or(4, |text| text.parse().expect("a number"));
    let container = || {
        let limit = json!({"limit": 64 << 20});
        Container::new("sleep 1000").with("/linux/resources/memory", limit)
    };
    let containers: Vec<Container> = (0..count).map(|_| container()).collect();
    let engines: Vec<Child> = containers.iter().map(|container| container.engine(&[])).collect();
    for container in &containers {
        let pid_file = container.test.path("bundle/pid");
        eventually("it is made", || pid_file.exists());
        assert_eq!(container.status(), "created");
    }
    let delete = |container: &Container| {
        let name = name(&container.test);
        container.command(&["delete", "--force"]).arg(name).spawn().expect("mote runs")
    };
    let deletes: Vec<Child> = containers.iter().map(delete).collect();
    for mut process in deletes {
        assert!(process.wait().expect("ends").success());
    }
    for mut engine in engines {
        engine.wait().expect("ends");
    }
    containers.iter().for_each(Container::assert_nothing_left);
}

#[test]
fn two_containers_share_a_network_namespace() {
    let namespace = format!("mote-{}", std::process::id());
    let ip = |words: &str| {
        let done = Command::new("ip").args(words.split(' ')).status().expect("ip runs");
        assert!(done.success(), "ip {words}");
    };
    ip(&format!("netns add {namespace}"));
    let inside = |words: &str| ip(&format!("-n {namespace} {words}"));
    inside("link set lo up");
    inside("link add d0 type dummy");
    inside("addr add 10.77.0.9/24 dev d0");
    inside("link set d0 up");
    let setting = "net.ipv4.ip_unprivileged_port_start";
    ip(&format!("netns exec {namespace} busybox sysctl -q -w {setting}=80"));
    let joined = json!([{"type": "network", "path": format!("/run/netns/{namespace}")}]);
    let serve = "mkdir /www; echo page >/www/page; httpd -p 8080 -h /www; httpd -p 10.77.0.9:8081 -h /www; \
         exec sleep 10000";
    let server = Container::new(serve).with("/linux/namespaces", joined.clone());
    let made = server.make(&[]);
    made.start();
    let from_namespace = |to: &str| {
        let fetch = Command::new("ip")
            .args([
                "netns",
                "exec",
                &namespace,
                "busybox",
                "wget",
                "-qO-",
                &format!("http://{to}/page"),
            ])
            .output()
            .expect("wget runs");
        String::from_utf8_lossy(&fetch.stdout) == "page\n"
    };
    let servers = ["127.0.0.1:8080", "10.77.0.9:8080", "10.77.0.9:8081"];
    for to in servers {
        eventually("the server answers", || from_namespace(to));
    }
    let [first, second, third] = servers;
    let ask = format!(
        "for to in {first} {second} {third} 127.0.0.1:8082; do wget -qO- http://$to/page || echo refused; done; \
         sysctl -n {setting}"
    );
    let ask = ask.as_str();
    let client = Container::new(ask).with("/linux/namespaces", joined);
    let asking = client.make(&[]);
    asking.start();
    assert_eq!(asking.end(), (0, "page\npage\npage\nrefused\n80\n".into()));
    client.done(&["delete"]);
    server.done(&["delete", "--force"]);
    drop(made.end());
    assert!(!from_namespace("127.0.0.1:8080"));
    ip(&format!("netns del {namespace}"));
    server.assert_nothing_left();
}

#[test]
fn a_pods_sandbox_is_no_box() {
    let pod = json!({"io.kubernetes.cri.container-type": "sandbox"});
    let sandbox = Container::new("echo never").with("/annotations", pod);
    let made = sandbox.make(&[]);
    made.start();
    assert_eq!(sandbox.status(), "running");
    let pid = fs::read_to_string(sandbox.test.path("bundle/pid")).expect("there");
    let namespace = format!("/proc/{}/ns/net", pid.trim());
    let joined = json!([{"type": "network", "path": namespace}]);
    let serve = "mkdir /www; echo page >/www/page; httpd -p 8080 -h /www; exec sleep 10000";
    let [server, client] = [
        serve,
        "for i in $(seq 300); do wget -qO- http://127.0.0.1:8080/page && exit 8; sleep 0.1; done",
    ]
    .map(|script| Container::new(script).with("/linux/namespaces", joined.clone()));
    let serving = server.make(&[]);
    serving.start();
    let asking = client.make(&[]);
    asking.start();
    let (code, output) = asking.end();
    assert_eq!((code, output.lines().last()), (8, Some("page")));
    assert_eq!(sandbox.run(&["exec", "--process", "/nope"]).status.code(), Some(1));
    client.done(&["delete"]);
    server.done(&["delete", "--force"]);
    drop(serving.end());
    let kill = sandbox.command(&["kill", &name(&sandbox.test), "15"]).status().expect("runs");
    assert!(kill.success());
    assert_eq!(made.end(), (0, String::new()));
    sandbox.done(&["delete"]);
    for container in [&sandbox, &server, &client] {
        container.assert_nothing_left();
    }
}

#[test]
fn inherited_descriptors_are_the_engines_alone() {
    let container = Container::new("ls -l /proc/self/fd; sleep 1000");
    let engine = format!(
        "import os\nfor _ in range(20): os.set_inheritable(os.open('/dev/null', os.O_RDONLY), True)\n{ENGINE}"
    );
    let engine = engine.replace(
        "subprocess.Popen(create + [name])",
        "subprocess.Popen(create + [name], close_fds=False)",
    );
    container.write_config();
    let child = Command::new("python3")
        .args(["-c", &engine])
        .arg(mote())
        .arg(container.test.path("state"))
        .arg(name(&container.test))
        .arg(container.test.path("bundle"))
        .stdin(Stdio::piped())
        .stdout(File::create(container.test.path("out.log")).expect("made"))
        .spawn()
        .expect("python runs");
    let made = Made { container: &container, engine: child };
    let pid_file = container.test.path("bundle/pid");
    eventually("it is made", || pid_file.exists());
    let pid = fs::read_to_string(pid_file).expect("there");
    let descriptors = fs::read_dir(format!("/proc/{}/fd", pid.trim())).expect("it runs").flatten();
    let of_engine = descriptors
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter(|target| target == Path::new("/dev/null"))
        .count();
    assert!(of_engine < 5, "{of_engine} descriptors of the engine's");
    container.done(&["delete", "--force"]);
    drop(made.end());
    container.assert_nothing_left();
}
