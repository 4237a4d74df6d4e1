//! Boxes as the runtimes of 3.2 and 3.3 describe them to a guest init: with that init in the image, for which
//! `python/guest_init.py` stands in, and without it, when mote's agent takes its place. What can be seen of a box is the
//! same.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::client::{self, CONTROL, Client, HEARTBEAT};
use crate::common::{Finished, Started, TestBox, executable};

const INIT: &str = include_str!("python/guest_init.py");

/// Which runtime it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Runtime {
    /// 3.2: files in the image.
    Files,
    /// 3.3: a boot config, on a share.
    BootConfig,
}

/// Who the init is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Init {
    OfImage,
    Mote,
}

/// Says who it is, serves what it is sent in capitals on port 8080, and ends with 42 at SIGTERM.
const MAIN: &str = r#"
import os, signal, socket, sys, threading
signal.signal(signal.SIGTERM, lambda *_: os._exit(42))
server = socket.create_server(("127.0.0.1", 8080))
print(os.getuid(), os.getgid(), os.getcwd(), os.environ["GREETING"], sys.argv[1:], flush=True)
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(connection.recv(100).upper())
    connection.close()
"#;

/// A box with volumes of every kind, a tmpfs, a host name and a sysctl; in 3.3's a read-only root, too.
fn described(runtime: Runtime, init: Init) -> TestBox {
    let test = TestBox::debian().without_console_file();
    let directory = |name: &str| {
        fs::create_dir_all(test.path(name)).expect("directory");
        test.path(name)
    };
    for name in ["work", "data", "file", "named", "boot", "terminal", "root/opt/seed/sub"] {
        directory(name);
    }
    let write = |name: &str, text: &str| fs::write(test.path(name), text).expect("file");
    write("data/from-host", "volume");
    write("file/motd", "one file");
    write("root/opt/seed/sub/of-image", "seed");
    write("terminal/status.json", "of an earlier run");
    let init_file = test.path("root/sbin/init");
    match init {
        Init::OfImage => executable(&init_file, INIT.as_bytes()),
        Init::Mote => assert!(fs::symlink_metadata(&init_file).is_err(), "the tree has an init"),
    }
    let main = json!({
        "schema": "a3s.box.guest-exec.v1",
        "executable": "python3",
        "args": ["-u", "-c", MAIN, "a b"],
        "workdir": "/srv/made",
        "user": "1000:1001",
        "stdin_null": true,
    });
    let mut env = vec![
        ["BOX_VOL_0", "vol0:/data:ro"],
        ["BOX_VOL_1", "vol1:/etc/motd:ro:file"],
        ["BOX_VOL_2", "vol2:/opt/seed:copy"],
        ["BOX_TMPFS_0", "/scratch:size=1m"],
        ["BOX_SYSCTL_0", "net.ipv4.ip_default_ttl=77"],
        ["A3S_SEC_SECCOMP", "default"],
        ["A3S_SEC_NO_NEW_PRIVS", "1"],
        ["BOX_CRI_PORT_FWD", "1"],
    ];
    let mut shares =
        vec![("workspace", "work"), ("vol0", "data"), ("vol1", "file"), ("vol2", "named")];
    let environment = json!([["PATH", "/usr/bin:/bin"], ["GREETING", "hello"]]);
    match runtime {
        Runtime::Files => {
            write("root/.a3s-box-exec.json", &main.to_string());
            // In base64: of the paths, and of "hello".
            write("root/.a3s-box-env", "PATH=L3Vzci9iaW46L2Jpbg\nGREETING=aGVsbG8\n");
            env.extend([
                ["BOX_EXEC_B64", "1"],
                ["BOX_EXEC_CONFIG_FILE", "/.a3s-box-exec.json"],
                ["BOX_EXEC_ENV_FILE", "/.a3s-box-env"],
                ["BOX_HOSTNAME", "web"],
            ]);
        }
        Runtime::BootConfig => {
            let config = json!({
                "schema": "a3s.box.guest-boot.v1",
                "exec": main,
                "environment": environment,
                "host": {
                    "hostname": "web",
                    "resolv_conf": "nameserver 192.0.2.53\n",
                    "hosts": "127.0.0.1 localhost web\n192.0.2.7 peer\n",
                },
            });
            write("boot/config.json", &config.to_string());
            shares.extend([("a3s-terminal", "terminal"), ("a3s-boot", "boot")]);
            env.push(["BOX_BOOT_CONFIG_FILE", "/run/a3s-box/boot/config.json"]);
            env.push(["BOX_READONLY", "1"]);
        }
    }
    let read_only = ["data", "boot"];
    let shares: Vec<Value> = shares
        .iter()
        .map(|(tag, name)| {
            json!({"tag": tag, "host_path": test.path(name), "read_only": read_only.contains(name)})
        })
        .collect();
    let (root, forward) = (test.path("root"), test.path("sock/forward.sock"));
    test.without("rootfs_path")
        .with("rootfs", json!({"kind": "directory", "path": root}))
        .with("fs_mounts", json!(shares))
        .with("port_forward_socket_path", json!(forward))
        .with("workdir", json!("/srv/made"))
        .with_entrypoint("executable", json!("/sbin/init"))
        .with_entrypoint("args", json!([]))
        .with_entrypoint("env", json!(env))
}

/// Sends the main process SIGTERM, as the runtime stops a box.
fn stop(test: &TestBox, started: Started) -> Finished {
    let mut client = Client::connect(test, "exec");
    client.send(CONTROL, b"signal-main:15");
    assert_eq!(client.receive(), Some((CONTROL, b"signal-main-ack".to_vec())));
    started.wait()
}

/// What is in the box, as a command sees it.
const LOOK: &str = r#"
cat /data/from-host /etc/motd /opt/seed/sub/of-image; echo
for file in /data/new /etc/motd /opt/seed/new /scratch/new /workspace/new /new; do
    if (echo box >> $file) 2>/dev/null; then echo "$file is written"; else echo "$file is not"; fi
done
stat -f -c %T /scratch
hostname; cat /etc/hostname /proc/sys/net/ipv4/ip_default_ttl
ls /run/a3s-box 2>/dev/null
"#;

fn looks(root: &str) -> String {
    format!(
        "volumeone fileseed\n/data/new is not\n/etc/motd is not\n/opt/seed/new is written\n\
        /scratch/new is written\n/workspace/new is written\n/new {root}\ntmpfs\nweb\nweb\n77\n"
    )
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn a_box_is_the_same_by_the_images_init_and_by_mote() {
    for (runtime, init) in [
        (Runtime::BootConfig, Init::OfImage),
        (Runtime::BootConfig, Init::Mote),
        (Runtime::Files, Init::OfImage),
        (Runtime::Files, Init::Mote),
    ] {
        let test = described(runtime, init);
        let mut started = test.start();
        let case = format!("{runtime:?} {init:?}");
        assert_eq!(started.line().as_deref(), Some("1000 1001 /srv/made hello ['a b']"), "{case}");
        started.wait_for_line("ready");
        let said = client::run(&test, &["sh", "-c", LOOK]);
        let is_3_3 = runtime == Runtime::BootConfig;
        let expected = looks(if is_3_3 { "is not" } else { "is written" });
        assert_eq!(said.stdout, expected, "{case}: {}", said.stderr);
        if is_3_3 {
            let files = client::run(&test, &["cat", "/etc/resolv.conf", "/etc/hosts"]).stdout;
            let expected = "nameserver 192.0.2.53\n127.0.0.1 localhost web\n192.0.2.7 peer\n";
            assert_eq!(files, expected, "{case}");
        }
        let ran = stop(&test, started);
        ran.assert_ended(42, "exited");
        assert_eq!(ran.stderr, "", "{case}");
        let (status, text) = match runtime {
            Runtime::Files => ("root/.a3s_exit_code", "42"),
            Runtime::BootConfig => (
                "terminal/status.json",
                r#"{"schema":"a3s.box.guest-terminal.v1","exit_code":42,"rootfs_quiesced":false}"#,
            ),
        };
        assert_eq!(read(&test.path(status)), text, "{case}");
        assert_eq!(read(&test.path("named/sub/of-image")), "seed", "{case}");
        assert_eq!(read(&test.path("named/new")), "box\n", "{case}");
        assert_eq!(read(&test.path("work/new")), "box\n", "{case}");
        // A volume that has something keeps it: the box starts again.
        fs::remove_file(test.path("named/sub/of-image")).expect("removed");
        if runtime == Runtime::BootConfig {
            let mut started = test.start();
            started.wait_for_line("ready");
            let said = client::run(&test, &["ls", "/opt/seed", "/opt/seed/sub"]).stdout;
            assert_eq!(said, "/opt/seed:\nnew\nsub\n\n/opt/seed/sub:\n", "{case}");
            stop(&test, started).assert_ended(42, "exited");
        }
    }
}

/// A frame of the forwarding protocol: kind, stream, payload.
fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(stream.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

#[test]
fn the_images_init_serves_when_its_main_process_runs_and_forwards_ports() {
    let test = described(Runtime::BootConfig, Init::OfImage);
    fs::write(test.path("work/hold"), "").expect("file");
    let mut started = test.start();
    started.wait_for_line("held");
    let mut client = Client::connect(&test, "exec");
    client.send(HEARTBEAT, b"beat");
    // Nobody forwards yet, and mote's agent answers neither: by the time that this is closed, it would have.
    let mut early = UnixStream::connect(test.path("sock/forward.sock")).expect("connects");
    assert_eq!(early.read(&mut [0]).expect("the end"), 0);
    client.0.set_nonblocking(true).expect("set");
    let answer = client.0.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(answer, Err(ErrorKind::WouldBlock));
    client.0.set_nonblocking(false).expect("set");
    fs::remove_file(test.path("work/hold")).expect("removed");
    started.wait_for_line("ready");
    assert_eq!(client.receive(), Some((HEARTBEAT, b"beat".to_vec())));

    let mut forward = UnixStream::connect(test.path("sock/forward.sock")).expect("connects");
    let (open, opened, data, close) = (1, 2, 3, 4);
    forward.write_all(&frame(open, 7, &8080u16.to_be_bytes())).expect("sent");
    forward.write_all(&frame(data, 7, b"text")).expect("sent");
    let expected = [frame(opened, 7, &[0]), frame(data, 7, b"TEXT"), frame(close, 7, &[])].concat();
    let mut got = vec![0; expected.len()];
    forward.read_exact(&mut got).expect("frames");
    assert_eq!(got, expected);
    stop(&test, started).assert_ended(42, "exited");
}

#[test]
fn limits_that_the_images_init_enforces_need_no_cgroup_on_the_host() {
    let limited = |init| {
        let mut test = described(Runtime::BootConfig, init)
            .with("resource_limits", json!({"cpu_quota": 50_000, "cpu_period": 100_000}));
        let env = test.spec["entrypoint"]["env"].as_array_mut().expect("an array");
        env.push(json!(["A3S_SEC_CPU_QUOTA", "50000"]));
        test
    };
    let script = "mount -t tmpfs none /sys/fs/cgroup && exec \"$0\" \"$@\"";
    let without_cgroups = ["unshare", "--mount", "sh", "-c", script];
    let test = limited(Init::OfImage);
    let mut started = test.start_within(&without_cgroups);
    started.wait_for_line("ready");
    let ran = stop(&test, started);
    ran.assert_ended(42, "exited");
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    let warning = "mote: warning: the cpu_* and memory_* limits hold only inside the box, where its own init enforces them: read /sys/fs/cgroup/cgroup.controllers (";
    assert!(ran.stderr.starts_with(warning), "{}", ran.stderr);
    // Where there is a cgroup, it is used.
    let mut started = test.start();
    started.wait_for_line("ready");
    let limit = read(&test.cgroup().join("cpu.max"));
    assert_eq!(limit, "50000 100000\n");
    stop(&test, started).assert_ended(42, "exited");
    // mote's agent enforces none of them.
    let test = limited(Init::Mote);
    let ran = test.run_by(&mut test.mote_within(&without_cgroups));
    ran.assert_not_started(&["read /sys/fs/cgroup/cgroup.controllers (limits on CPU time"]);
}

#[test]
fn what_takes_the_place_of_an_init_is_refused_by_name() {
    let refused = |change: fn(&TestBox), test: &TestBox, parts: &[&str]| {
        change(test);
        test.run().assert_not_started(parts);
    };
    let test = described(Runtime::BootConfig, Init::Mote);
    fn rewrite(test: &TestBox, change: impl Fn(String) -> String) {
        let path = test.path("boot/config.json");
        fs::write(&path, change(read(&path))).expect("file");
    }
    let config = "mote: spec: entrypoint.env[8]: BOX_BOOT_CONFIG_FILE names ";
    let whole = read(&test.path("boot/config.json"));
    let restore = || fs::write(test.path("boot/config.json"), &whole).expect("file");
    refused(
        |test| rewrite(test, |text| text.replace("guest-boot.v1", "guest-boot.v2")),
        &test,
        &[config, "has the schema \"a3s.box.guest-boot.v2\""],
    );
    restore();
    refused(
        |test| rewrite(test, |text| text[..text.len() / 2].into()),
        &test,
        &[config, "is not JSON: EOF", "have the runtime write it again"],
    );
    restore();
    refused(
        |test| rewrite(test, |text| text + &" ".repeat(4 << 20)),
        &test,
        &[config, "has more than 4194304 bytes; shorten"],
    );
    restore();
    refused(
        |test| fs::remove_file(test.path("file/motd")).expect("removed"),
        &test,
        &["entrypoint.env[1]: mounts a file 'motd', which ", "/file (share 'vol1') lacks"],
    );
    fs::write(test.path("file/motd"), "one file").expect("file");
    // A guest's own link in the place of the status file is not followed.
    let status = test.path("terminal/status.json");
    fs::remove_file(&status).expect("removed");
    std::os::unix::fs::symlink(test.path("data/from-host"), &status).expect("link");
    refused(|_| (), &test, &["create the exit status file ", "a symbolic link is in the way"]);
    assert_eq!(read(&test.path("data/from-host")), "volume");
    fs::remove_file(&status).expect("removed");

    let mut test = test;
    test.spec["fs_mounts"][4]["read_only"] = json!(true);
    refused(|_| (), &test, &["fs_mounts: BOX_BOOT_CONFIG_FILE needs the share 'a3s-terminal'"]);
    test.spec["fs_mounts"].as_array_mut().expect("an array").remove(4);
    refused(|_| (), &test, &["'a3s-terminal' for the exit code, which is missing; add it"]);

    let test = described(Runtime::Files, Init::Mote);
    refused(
        |test| fs::write(test.path("root/.a3s-box-env"), "PATH=L\n").expect("file"),
        &test,
        &["BOX_EXEC_ENV_FILE names ", "which has no variable NAME=VALUE in line 1"],
    );
}

#[test]
fn volumes_that_cannot_be_are_named() {
    let test = described(Runtime::BootConfig, Init::Mote);
    let [pipe, file] = ["root/opt/seed/pipe", "file/motd"].map(|name| test.path(name));
    let make = |program: &str, words: &[&str], place: &Path| {
        let made = Command::new(program).args(words).arg(place).status();
        assert!(made.expect("it runs").success());
    };
    make("mkfifo", &[], &pipe);
    let expected = "give share 'vol2', if it is empty, what the image has in /opt/seed: /opt/seed/pipe: it is no file, directory or symbolic link";
    test.run().assert_not_started(&[expected]);
    let left = fs::read_dir(test.path("named")).expect("a directory").count();
    assert_eq!(left, 0, "a volume that is half copied");
    fs::remove_file(&pipe).expect("removed");
    // Whoever fills a share can make the agent neither wait nor look elsewhere.
    for (program, words) in [("mkfifo", &[][..]), ("ln", &["-s", "."])] {
        fs::remove_file(&file).expect("removed");
        make(program, words, &file);
        let expected = "mount the file of share 'vol1' on /etc/motd: it is no regular file";
        test.run().assert_not_started(&[expected]);
    }
}
