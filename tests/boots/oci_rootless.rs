//! Containers of a user who is not root: by the root of a user namespace, as podman makes one for a user, and by what
//! else such a user has.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, chown};
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::oci::{Container, name};
use crate::sandbox::{USER, give_to_user, words_of_user};

const USER_NAMESPACE: &str = include_str!("python/user.py");

/// A user namespace, whose root is [`USER`] on the host. It ends with this.
struct UserNamespace(Child);

impl UserNamespace {
    fn new() -> (Self, String) {
        let mut holder = Command::new("python3");
        holder.args(["-c", USER_NAMESPACE, "hold", &USER.to_string()]);
        holder.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = holder.spawn().expect("python runs");
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        (UserNamespace(holder), line.trim().to_owned())
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A container without a cgroup, which engines do not ask for where they could not have one.
fn without_cgroup(script: &str) -> Container {
    let mut container = Container::new(script);
    container.config["linux"].as_object_mut().expect("an object").remove("cgroupsPath");
    container
}

/// A container of a user namespace's root.
fn of_user(script: &str) -> (Container, UserNamespace) {
    let mut container = without_cgroup(script);
    give_to_user(&container.test);
    let (namespace, number) = UserNamespace::new();
    container.within = ["python3", "-c", USER_NAMESPACE, &number].map(str::to_owned).into();
    (container, namespace)
}

#[test]
fn the_root_of_a_user_namespace_has_containers() {
    let script = "id -u; touch /of-root /of-app; chown 1000:2000 /of-app; cat /sys/fs/cgroup/pids.max /data/file; \
        echo 2>&1 >/data/new; [ -d /host/kernel ] && read line && echo $line; exit 3";
    let (container, _namespace) = of_user(script);
    let data = container.test.path("data");
    fs::create_dir(&data).expect("made");
    fs::write(data.join("file"), "of the host\n").expect("written");
    chown(&data, Some(USER), Some(USER)).expect("given");
    let mut mounts = container.config["mounts"].as_array().expect("an array").clone();
    mounts.extend([
        json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind", "ro"]}),
        // What the host has mounted below cannot be left out there, nor be permitted what it has forbidden.
        json!({"destination": "/host", "type": "bind", "source": "/sys", "options": ["bind", "rw", "suid", "exec"]}),
    ]);
    let mut container = container.with("/mounts", json!(mounts));
    for set in ["bounding", "effective", "permitted"] {
        container.config["process"]["capabilities"][set] = json!(["CAP_CHOWN"]);
    }
    let mut made = container.make(&[]);
    made.start();
    let process = container.test.path("bundle/process.json");
    let wanted = json!({"args": ["sh", "-c", "id -u; exit 5"], "cwd": "/", "env": ["PATH=/bin"],
        "user": {"uid": 1000, "gid": 0}});
    fs::write(&process, wanted.to_string()).expect("written");
    let ran = container.run(&["exec", "--process", process.to_str().expect("text")]);
    assert_eq!((ran.status.code(), &ran.stdout[..]), (Some(5), &b"1000\n"[..]));
    made.engine.stdin.take().expect("a pipe").write_all(b"end\n").expect("written");
    let (code, output) = made.end();
    let lines: Vec<&str> = output.lines().collect();
    let [own @ .., refused, last] = &lines[..] else { panic!("{output}") };
    assert_eq!((code, own, *last), (3, &["0", "100", "of the host"][..], "end"), "{output}");
    assert!(refused.ends_with("Read-only file system"), "{output}");
    let owner = |name: &str| {
        let file = fs::metadata(container.test.path("root").join(name)).expect("there");
        (file.uid(), file.gid())
    };
    assert_eq!((owner("of-root"), owner("of-app")), ((USER, USER), (100_999, 101_999)));
    container.done(&["delete"]);
    container.assert_nothing_left();
}

#[test]
fn a_user_runs_a_container_in_a_namespace_of_one() {
    let container = without_cgroup("id -u; exit 3");
    container.write_config();
    let bundle = container.test.path("bundle");
    let runtime = container.test.path("runtime");
    fs::create_dir(&runtime).expect("made");
    let binary = give_to_user(&container.test);
    let run = |within: &[&str]| {
        let words = words_of_user(true);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(within).arg(&binary).args(["oci", "run", "--bundle"]);
        command.arg(&bundle).arg(name(&container.test)).env("XDG_RUNTIME_DIR", &runtime);
        command.env_remove("MOTE_TEMPLATES").output().expect("runs")
    };
    let refused = run(&[]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1));
    assert!(error.contains("the host's or that of a user namespace"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    let ran = run(&["unshare", "--user", "--map-root-user"]);
    let error = String::from_utf8_lossy(&ran.stderr);
    assert_eq!((ran.status.code(), &ran.stdout[..]), (Some(3), &b"0\n"[..]), "{error}");
    assert_eq!(fs::read_dir(runtime.join("mote-oci")).expect("the states'").count(), 0);
    container.assert_nothing_left();
}
