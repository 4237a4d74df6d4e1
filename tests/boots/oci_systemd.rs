//! Containers whose cgroups systemd makes: by a real systemd, which is the first process of namespaces of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::json;

use crate::common::{eventually, mote};
use crate::oci::{Container, name};

/// What systemd's namespaces get before it: nothing but its D-Bus.
const SET_UP: &str = r#"
mount -t proc proc /proc
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for own in /run/systemd /run/dbus; do mkdir -p $own; mount -t tmpfs tmpfs $own; done
mkdir /run/systemd/system
cd /run/systemd/system
printf '[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n' >dbus.socket
printf '[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nExecStart=%s\n' \
    '/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation' >dbus.service
printf '[Unit]\nDefaultDependencies=no\nRequires=dbus.service\nAfter=dbus.service\n' >test.target
container=test exec /lib/systemd/systemd --system --unit=test.target --log-target=console --log-level=warning
"#;

/// Runs a script as the first process of namespaces, in a cgroup of its own.
const UNSHARED: &str = r#"
mkdir -p "$1"
exec unshare --pid --mount --fork --kill-child sh -c \
    'echo 0 >"$1/cgroup.procs"; exec unshare --cgroup sh -c "$2" sh' sh "$1" "$2"
"#;

/// A systemd.
struct Systemd {
    outside: Child,
    /// Its own number on the host.
    pid: String,
    cgroup: PathBuf,
}

impl Systemd {
    fn start(name: &str) -> Systemd {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+cpu +io +memory +pids").expect("written");
        let cgroup = root.join(format!("systemd-{name}"));
        let outside = Command::new("sh")
            .args(["-c", UNSHARED, "sh"])
            .arg(&cgroup)
            .arg(SET_UP)
            .stdin(Stdio::null())
            .spawn()
            .expect("sh runs");
        let children = format!("/proc/{0}/task/{0}/children", outside.id());
        let child = || fs::read_to_string(&children).unwrap_or_default().trim().to_owned();
        eventually("systemd runs", || {
            let name = fs::read_to_string(format!("/proc/{}/comm", child()));
            name.is_ok_and(|name| name == "systemd\n")
        });
        let systemd = Systemd { pid: child(), outside, cgroup };
        eventually("systemd answers", || {
            systemd
                .run("busctl", &["--quiet", "status", "org.freedesktop.systemd1"])
                .status
                .success()
        });
        systemd
    }

    fn run(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Output {
        self.command(program, arguments).output().expect("nsenter runs")
    }

    /// A command beside systemd.
    fn command(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid, "-p", "-m", "-C", "--"]).arg(program.as_ref());
        command.args(arguments);
        command
    }

    fn text(&self, program: impl AsRef<Path>, arguments: &[&str]) -> String {
        let output = self.run(program, arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // systemd ends with it, and all in its namespace with systemd.
        let _ = self.outside.kill();
        let _ = self.outside.wait();
        let _ = Command::new("find")
            .arg(&self.cgroup)
            .args(["-depth", "-type", "d", "-delete"])
            .status();
    }
}

#[test]
fn systemd_makes_a_containers_scope() {
    let script = "trap 'echo stopped >/said; exit 9' TERM; while :; do sleep 0.1; done";
    let container = Container::new(script);
    let name = name(&container.test);
    let container = container
        .with("/linux/cgroupsPath", json!(format!("mote-test.slice:mote:{name}")))
        .with("/annotations", json!({"org.systemd.property.TimeoutStopUSec": "uint64 30000000"}));
    let unit = format!("mote-{name}.scope");
    container.write_config();
    let (state, bundle) = (container.test.path("state"), container.test.path("bundle"));
    let systemd = Systemd::start(&name);
    let words = |words: &[&str]| -> Vec<String> {
        let root = ["oci", "--root", state.to_str().expect("text")];
        root.iter().chain(words).map(|word| (*word).to_owned()).collect()
    };
    let oci = |given: &[&str]| {
        let given = words(given);
        let given: Vec<&str> = given.iter().map(String::as_str).collect();
        systemd.run(mote(), &given)
    };
    let bundle = bundle.to_str().expect("text");

    // The engine says whether it uses systemd.
    let refused = oci(&["create", "--bundle", bundle, &name]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(message.contains("with --systemd-cgroup only"), "{message}");

    let run = words(&["--systemd-cgroup", "run", "--detach", "--bundle", bundle, &name]);
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    let ran = systemd.command(mote(), &run).stdin(Stdio::null()).status().expect("nsenter runs");
    assert!(ran.success());
    let show = |property: &str| {
        systemd.text("systemctl", &["show", "--value", "--property", property, &unit])
    };
    assert_eq!(show("Slice"), "mote-test.slice\n");
    assert_eq!(show("TimeoutStopUSec"), "30s\n");
    let cgroup = systemd.cgroup.join("mote.slice/mote-test.slice").join(&unit);
    let limit = |file: &str| fs::read_to_string(cgroup.join(file)).expect("there");
    let overhead = (64 << 20) + (128 << 20) + (128 << 20) / 128;
    assert_eq!(limit("memory.max"), format!("{}\n", (128 << 20) + overhead));
    assert_eq!(show("MemoryMax"), limit("memory.max"));
    assert_eq!(show("TasksMax"), limit("pids.max"));

    // What is changed stays so when systemd reads its units again.
    let resources = container.test.path("resources.json");
    fs::write(&resources, json!({"cpu": {"quota": 50_000, "period": 100_000}}).to_string())
        .expect("written");
    let updated = oci(&["update", "--resources", resources.to_str().expect("text"), &name]);
    assert!(updated.status.success(), "{}", String::from_utf8_lossy(&updated.stderr));
    systemd.text("systemctl", &["daemon-reload"]);
    assert_eq!(limit("cpu.max"), "50000 100000\n");

    // Not by systemd, which cannot signal a scope with a thread of KVM's in it that its namespace does not show.
    assert!(oci(&["kill", &name, "TERM"]).status.success());
    eventually("it ends", || {
        String::from_utf8_lossy(&oci(&["state", &name]).stdout).contains("\"stopped\"")
    });
    let said = fs::read_to_string(container.test.path("root/said"));
    assert_eq!(said.expect("written"), "stopped\n");
    assert!(oci(&["delete", &name]).status.success());
    assert_eq!(
        systemd.text("systemctl", &["list-units", "--all", "--no-legend", "mote-*.scope"]),
        ""
    );
    assert!(!cgroup.exists());
    drop(systemd);
    container.assert_nothing_left();
}
