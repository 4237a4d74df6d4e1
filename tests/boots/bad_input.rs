//! Specs, guests and hosts that are wrong: one clear line, the right code, nothing left behind.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::{TestBox, executable, mote};

/// Runs a box that cannot start and checks the form of the refusal: one line on stderr.
fn refused(test: &TestBox, code: i32) -> String {
    let ran = test.run();
    ran.assert_one_line();
    assert_eq!(ran.code, code, "{}", ran.stderr);
    assert_eq!(ran.outcome["exit_code"], code);
    assert_ne!(ran.outcome["kind"], "exited");
    ran.stderr.trim_end().trim_start_matches("mote: ").to_owned()
}

#[test]
fn bad_specs_name_the_field() {
    let long_socket = format!("/run/{}", "s".repeat(103));
    let cases: [(&str, Value, &str); 19] = [
        ("vcpus", json!(0), "spec: vcpus: is 0, must be from 1 to 64"),
        ("vcpus", json!(65), "spec: vcpus: is 65, must be from 1 to 64"),
        ("vcpus", json!("2"), "spec: vcpus: is a string, must be a whole number"),
        ("memory_mib", json!(0), "spec: memory_mib: is 0, must be at least 64"),
        ("memory_mib", json!(1), "spec: memory_mib: is 1, must be at least 64"),
        ("memory_mib", json!(4_000_000), "spec: memory_mib: is 4000000, but this host has "),
        ("rootfs_path", json!("/no/such"), "spec: rootfs_path: /no/such does not exist"),
        ("rootfs_path", json!("/etc/passwd"), "spec: rootfs_path: /etc/passwd is not a directory"),
        (
            "console_output",
            json!("/no/such/log"),
            "spec: console_output: its directory /no/such does not exist",
        ),
        ("exec_socket_path", json!(long_socket), "spec: exec_socket_path: has 108 bytes"),
        (
            "fs_mounts",
            json!([{"tag": "", "host_path": "/", "read_only": true}]),
            "spec: fs_mounts[0].tag: is empty",
        ),
        (
            "fs_mounts",
            json!([{"tag": "t".repeat(37), "host_path": "/", "read_only": true}]),
            "spec: fs_mounts[0].tag: has 37 bytes",
        ),
        (
            "fs_mounts",
            json!([{"tag": "a", "host_path": "/", "read_only": true}, {"tag": "a", "host_path": "/", "read_only": true}]),
            "spec: fs_mounts[1].tag: \"a\" is used by an earlier share",
        ),
        (
            "fs_mounts",
            json!([{"tag": "a", "host_path": "/no/such", "read_only": true}]),
            "spec: fs_mounts[0].host_path: /no/such does not exist",
        ),
        ("port_map", json!(["8080"]), "spec: port_map[0]: is \"8080\", must be HOST:GUEST"),
        (
            "port_map",
            json!(["80:80/sctp"]),
            "spec: port_map[0]: is \"80:80/sctp\", but only ports of",
        ),
        ("port_map", json!(["80:0"]), "spec: port_map[0]: is \"80:0\", but 0 is not a port"),
        ("port_map", json!(["1:65536"]), "spec: port_map[0]: is \"1:65536\", but 65536 is not"),
        (
            "port_map",
            json!(["8080:80", "8080:81"]),
            "spec: port_map[1]: is \"8080:81\", but host port 8080 is in port_map[0] already",
        ),
    ];
    for (field, value, expected) in cases {
        let message = refused(&TestBox::busybox().with(field, value), 125);
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn not_json_and_missing_fields_are_refused() {
    let run = |config: &str| {
        let output = Command::new(mote()).args(["--config", config]).output().expect("mote runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, stderr) = run("{nonsense");
    assert_eq!(code, Some(125));
    assert!(
        stderr.starts_with("mote: --config is not JSON: key must be a string at line 1"),
        "{stderr}"
    );
    let (code, stderr) = run("{}");
    assert_eq!((code, stderr.lines().count()), (Some(125), 1));
    assert!(
        stderr.contains("workdir: is missing") && stderr.contains("box_id: is missing"),
        "{stderr}"
    );
}

#[test]
fn without_a_spec_the_outcome_goes_through_no_link() {
    let test = TestBox::busybox();
    let [precious, link] = ["precious", "link"].map(|name| test.path(name));
    fs::write(&precious, "precious").expect("file");
    symlink(&precious, &link).expect("link");
    let mut command = Command::new(mote());
    let ran = test.run_by(command.args(["--config", "{nonsense", "--outcome"]).arg(&link));
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!((ran.code, lines.len()), (125, 2), "{lines:?}");
    assert!(lines[0].contains("a symbolic link is in the way"), "{lines:?}");
    assert!(lines[1].starts_with("mote: --config is not JSON"), "{lines:?}");
    assert_eq!(fs::read_to_string(&precious).expect("there"), "precious");
}

#[test]
fn check_lists_every_error_and_exits_2() {
    // Of value, of type, and one that is missing.
    let mut test = TestBox::busybox().with("vcpus", json!(0)).with("workdir", json!(7));
    test.spec.as_object_mut().expect("an object").remove("fs_mounts");
    let check = |spec: &Value| {
        Command::new(mote())
            .args(["check", "--config", &spec.to_string()])
            .output()
            .expect("mote runs")
    };
    let output = check(&test.spec);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 3), "{stderr}");
    for error in ["vcpus: is 0", "workdir: is a number", "fs_mounts: is missing"] {
        assert!(stderr.contains(error), "{stderr}");
    }
    // A start says the same.
    let message = refused(&test, 125);
    assert!(message.contains("vcpus: is 0") && message.contains("fs_mounts: is"), "{message}");
    // What is no spec at all is named.
    for (args, expected) in [
        (["--config", "[]"], "mote: --config is an array, must be an object\n"),
        (["--config-file", "/etc/hostname"], "mote: /etc/hostname is not JSON: "),
        (["--config-file", "/dev/null"], "mote: /dev/null is not JSON: EOF"),
        (["--config-file", "-"], "mote: standard input is not JSON: EOF"),
    ] {
        let mut command = Command::new(mote());
        let output = command.arg("check").args(args).stdin(Stdio::null()).output().expect("runs");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{stderr}");
        assert!(stderr.starts_with(expected), "{stderr}");
    }
    let output = check(&TestBox::busybox().spec);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"/bin/true\""));
}

#[test]
fn a_published_port_that_is_taken_is_named() {
    let listener = TcpListener::bind("0.0.0.0:0").expect("bound");
    let port = listener.local_addr().expect("bound").port();
    let taken = format!("port_map[1]: host port {port} is in use by another program; ");
    let test = TestBox::busybox().with("port_map", json!(["4321:80", format!("{port}:81")]));
    let message = refused(&test, 125);
    assert!(message.starts_with(&taken), "{message}");
    drop(listener);
    assert_eq!(test.run().code, 0);
}

#[test]
fn two_boxes_cannot_publish_one_port() {
    let (_first, running) = TestBox::busybox().with("port_map", json!(["4322:80"])).idle();
    let second = TestBox::busybox().with("port_map", json!(["4322:8080"]));
    let message = refused(&second, 125);
    assert!(message.starts_with("port_map[0]: host port 4322 is in use"), "{message}");
    running.stop();
    assert_eq!(second.run().code, 0);
}

#[test]
fn a_privileged_port_says_what_to_change() {
    let test = TestBox::busybox().with("port_map", json!(["81:80"]));
    let user = ["setpriv", "--bounding-set=-net_bind_service"];
    let ran = test.run_by(&mut test.mote_within(&user));
    ran.assert_not_started(&[
        "port_map[0]: host port 81 may not be used by this user; choose a port above 1023,",
    ]);
}

#[test]
fn unknown_fields_are_warned_of_and_ignored() {
    let ran = TestBox::busybox().shell("exit 3").with("work_dir", json!("/x")).run();
    assert_eq!(ran.code, 3);
    assert_eq!(
        ran.stderr,
        "mote: warning: work_dir: is not a field of the spec and is ignored; did you mean workdir?\n"
    );
}

#[test]
fn entrypoints_that_cannot_run_say_why() {
    let mut test = TestBox::busybox();
    let root = test.path("root");
    fs::create_dir(root.join("directory")).expect("directory");
    fs::write(root.join("plain"), "data").expect("file");
    executable(&root.join("garbage"), b"neither this nor that");
    executable(&root.join("script"), b"#!/no/interpreter -x\n");
    executable(&root.join("empty-script"), b"#!\n");
    let mut arm = fs::read("/bin/busybox").expect("busybox");
    arm[18..20].copy_from_slice(&183u16.to_le_bytes());
    executable(&root.join("arm"), &arm);
    for (program, code, expected) in [
        ("/missing", 127, "entrypoint: '/missing' is not in the root file system"),
        ("missing", 127, "entrypoint: 'missing' is in no directory of PATH (/usr/local/sbin:"),
        ("/directory", 126, "entrypoint: '/directory' is a directory"),
        ("/plain", 126, "entrypoint: '/plain' may not be executed by this user (chmod +x it"),
        (
            "/garbage",
            126,
            "entrypoint: '/garbage' is neither a program nor a script with a #! line",
        ),
        (
            "/script",
            126,
            "entrypoint: '/script' is a script whose interpreter '/no/interpreter' cannot be run",
        ),
        (
            "/empty-script",
            126,
            "entrypoint: '/empty-script' is a script whose #! line names no interpreter",
        ),
        ("/arm", 126, "entrypoint: '/arm' is a program for ARM (aarch64), and this VM is x86-64"),
    ] {
        test = test.with_entrypoint("executable", json!(program));
        let message = refused(&test, code);
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn a_missing_workdir_or_user_is_named() {
    let message = refused(&TestBox::busybox().with("workdir", json!("/no/such")), 125);
    assert!(
        message.starts_with("workdir: enter '/no/such' in the guest: No such file"),
        "{message}"
    );
    let message = refused(&TestBox::busybox().with("user", json!("ghost")), 125);
    assert!(
        message.starts_with("user: user 'ghost' is not in the guest's /etc/passwd"),
        "{message}"
    );
}

#[test]
fn a_root_that_is_no_system_is_explained() {
    let test = TestBox::busybox();
    let root = test.path("root");
    fs::remove_dir_all(&root).expect("removed");
    fs::create_dir(&root).expect("empty");
    let message = refused(&test, 127);
    assert!(
        message.starts_with("entrypoint: '/bin/true' is not in the root file system"),
        "{message}"
    );
}

#[test]
fn virtiofsd_missing_or_dying_is_explained() {
    let test = TestBox::busybox();
    let ran = test.run_by(test.command().env("MOTE_VIRTIOFSD", "/no/virtiofsd"));
    assert_eq!(
        (ran.code, ran.stderr.as_str()),
        (125, "mote: spec: MOTE_VIRTIOFSD: /no/virtiofsd is not an executable file\n")
    );

    let script = test.path("out/virtiofsd");
    executable(&script, b"#!/bin/sh\necho cannot do this >&2\nexit 9\n");
    let ran = test.run_by(test.command().env("MOTE_VIRTIOFSD", script));
    ran.assert_not_started(&[
        "virtiofsd for the root file system (",
        "(exit status: 9): cannot do this",
    ]);

    // Neither is needed.
    let test = TestBox::busybox().shell("exit 3");
    assert_eq!(test.run_by(test.command().env("PATH", "/usr/bin:/bin")).code, 3);
}

/// The host lacks something, or mote does: both are said.
#[test]
fn a_confidential_box_is_refused_with_what_the_host_lacks() {
    let probe = Command::new(mote()).arg("probe").output().expect("mote runs").stdout;
    let probe = String::from_utf8_lossy(&probe).into_owned();
    for (tee_type, name) in [("snp", "SEV-SNP"), ("tdx", "TDX")] {
        let test = TestBox::busybox();
        let file = test.path("out/tee.json");
        let data = r#"{"gen":"genoa"}"#;
        let tee = json!({
            "workload_id": "w", "cpus": 1, "ram_mib": 256, "tee": tee_type, "tee_data": data,
            "attestation_url": "",
        });
        fs::write(&file, tee.to_string()).expect("written");
        let test = test.with("memory_mib", json!(256)).with("vcpus", json!(1));
        let test = test.with("tee_config", json!({"config_path": file, "tee_type": tee_type}));
        let ran = test.run();
        ran.assert_ended(125, "tee-unavailable");
        ran.assert_one_line();
        assert!(ran.stderr.starts_with(&format!("mote: tee_config: {name}: ")), "{}", ran.stderr);
        assert!(ran.stderr.contains("mote has no way to launch one"), "{}", ran.stderr);
        let line = probe.lines().find(|line| line.starts_with(&name.to_lowercase()));
        let line = line.expect("probe speaks of it");
        // A host that has everything lacks nothing.
        let lacking = line.split(" lacks ").nth(1).unwrap_or("mote has no way to launch one");
        assert!(ran.stderr.contains(lacking), "{line}: {}", ran.stderr);
        let checked =
            test.run_by(Command::new(mote()).args(["check", "--config", &test.spec.to_string()]));
        assert_eq!((checked.code, &checked.stderr), (2, &ran.stderr));
        // The file contradicts the spec.
        let test = test.with("vcpus", json!(2));
        test.run().assert_not_started(&["tee.json says cpus 1, but vcpus of the spec is 2"]);
    }
}

#[test]
fn a_kernel_that_is_none_is_named() {
    let test = TestBox::busybox();
    let ran = test.run_by(test.command().env("MOTE_KERNEL", "/etc/passwd"));
    ran.assert_not_started(&["load the guest kernel (/etc/passwd) as an uncompressed ELF vmlinux"]);
}

#[test]
fn kvm_missing_or_unreadable_is_explained() {
    // In a mount namespace of the test's own, where /dev/kvm is something else.
    for (setup, expected) in [
        ("mount -t tmpfs none /dev", "open /dev/kvm: No such file or directory"),
        ("mount --bind /dev/null /dev/kvm", "/dev/kvm: API version is "),
    ] {
        let script = format!("{setup} && exec \"$0\" \"$@\"");
        let test = TestBox::busybox();
        let within = ["unshare", "--mount", "sh", "-c", &script];
        let ran = test.run_by(&mut test.mote_within(&within));
        ran.assert_not_started(&[expected]);
    }
}

#[test]
fn a_wrong_command_line_exits_2() {
    for arguments in [&[][..], &["--nonsense"], &["--config"], &["nonsense"]] {
        let output = Command::new(mote()).args(arguments).output().expect("mote runs");
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    }
}
