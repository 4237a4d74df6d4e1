//! Virtio-fs shares beside the root.

use std::fs;

use serde_json::{Value, json};

use crate::client;
use crate::common::TestBox;

/// A share of a new directory in the test's `out`, with a file in it.
fn share(test: &TestBox, tag: &str, read_only: bool, contents: &str) -> Value {
    let host = test.path("out").join(tag);
    fs::create_dir(&host).expect("directory");
    fs::write(host.join("file"), contents).expect("file");
    json!({"tag": tag, "host_path": host, "read_only": read_only})
}

#[test]
fn shares_can_be_mounted_by_their_tags() {
    let test = TestBox::busybox();
    let long_tag = "t".repeat(36);
    let shares = [("data", false), (long_tag.as_str(), true)]
        .map(|(tag, read_only)| share(&test, tag, read_only, tag));
    let script = format!(
        "mkdir /a /b; mount -t virtiofs data /a && mount -t virtiofs {long_tag} /b; cat /a/file /b/file; \
         echo new >/a/new; mount -o remount,rw /b; echo x >/b/new || echo refused"
    );
    let test = test.shell(&script).with("fs_mounts", json!(shares));
    let ran = test.run();
    assert!(ran.console.starts_with(&format!("data{long_tag}")), "{} {}", ran.console, ran.stderr);
    assert!(ran.console.ends_with("refused\n"), "{}", ran.console);
    assert_eq!(fs::read_to_string(test.path("out/data/new")).expect("written"), "new\n");
    assert!(!test.path(&format!("out/{long_tag}/new")).exists());
}

#[test]
fn twenty_devices_share_the_interrupt_pins() {
    let test = TestBox::busybox();
    let shares: Vec<_> =
        (0..20).map(|i| share(&test, &format!("vol{i}"), false, &format!("{i} "))).collect();
    let script =
        "for i in $(seq 0 19); do mkdir /m$i; mount -t virtiofs vol$i /m$i; cat /m$i/file; done";
    let ran = test.shell(script).with("fs_mounts", json!(shares)).run();
    let expected: String = (0..20).map(|i| format!("{i} ")).collect();
    assert_eq!(ran.console, expected, "{}", ran.stderr);
}

#[test]
fn the_agent_mounts_what_the_environment_asks_for() {
    let test = TestBox::busybox();
    let shares = [("workspace", false), ("vol0", true), ("vol1", false)]
        .map(|(tag, read_only)| share(&test, tag, read_only, &format!("{tag} ")));
    let script = "cat /workspace/file /data/file /srv/deep/file; echo; \
        for f in /workspace/new /data/new /srv/deep/new /scratch/new /new; do \
        echo x >$f && echo $f written; done 2>/dev/null; \
        mount -o remount,rw /data; { echo x >/data/new; } 2>/dev/null || echo /data refused after a remount; \
        grep -o 'scratch tmpfs.*' /proc/mounts | cut -d, -f1-3; df -k /scratch | tail -n 1 | tr -s ' ' | cut -d' ' -f2";
    let ran = test
        .shell(script)
        .with("fs_mounts", json!(shares))
        .with_entrypoint(
            "env",
            json!([
                ["BOX_VOL_0", "vol0:/data:ro"],
                ["BOX_VOL_1", "vol1:/srv/deep"],
                ["BOX_TMPFS_0", "/scratch:size=1m,noexec"],
                ["BOX_READONLY", "1"],
            ]),
        )
        .run();
    let expected = "workspace vol0 vol1 \n/workspace/new written\n/srv/deep/new written\n/scratch/new written\n\
        /data refused after a remount\nscratch tmpfs rw,noexec,relatime\n1024\n";
    assert_eq!(ran.console, expected, "{}", ran.stderr);
}

#[test]
fn the_agent_stands_in_for_a_guest_init_that_the_image_lacks() {
    let test = TestBox::busybox();
    fs::create_dir(test.path("root/srv")).expect("directory");
    let ran = test
        .with_entrypoint("executable", json!("/sbin/init"))
        .with_entrypoint(
            "env",
            json!([
                ["BOX_EXEC_EXEC", "sh"],
                ["BOX_EXEC_ARGC", "2"],
                ["BOX_EXEC_ARG_0", "-c"],
                ["BOX_EXEC_ARG_1", "pwd; echo $MODE $IMAGE; env | grep -c BOX_; grep -E '^(NoNewPrivs|Seccomp|CapBnd):' /proc/self/status; exit 3"],
                ["BOX_EXEC_WORKDIR", "/srv"],
                ["BOX_EXEC_ENV_IMAGE", "yes"],
                ["A3S_SEC_SECCOMP", "default"],
                ["A3S_SEC_NO_NEW_PRIVS", "1"],
                ["A3S_SEC_CAP_DROP", "ALL"],
                ["A3S_SEC_CAP_ADD", "CHOWN"],
                ["BOX_EXEC_ENV_MODE", "dev"],
                ["MODE", "prod"],
            ]),
        )
        .run();
    let expected = "/srv\nprod yes\n0\nCapBnd:\t0000000000000001\nNoNewPrivs:\t1\nSeccomp:\t2\n";
    assert_eq!((ran.code, ran.console.as_str()), (3, expected), "{}", ran.stderr);
}

#[test]
fn a_share_that_disappears_gives_errors_and_nothing_hangs() {
    let test = TestBox::busybox();
    let host = test.path("out/gone");
    fs::create_dir_all(host.join("dir")).expect("directory");
    fs::write(host.join("dir/file"), "x").expect("file");
    let test = test
        .with("fs_mounts", json!([{"tag": "vol0", "host_path": host, "read_only": false}]))
        .with_entrypoint("env", json!([["BOX_VOL_0", "vol0:/data"]]))
        .without_console_file()
        .shell("cat /data/dir/file; echo; echo ready; exec sleep 10000");
    let started = test.ready();
    fs::remove_dir_all(&host).expect("removed");
    let tried = client::run(&test, &["sh", "-c", "echo y >/data/dir/new"]);
    assert_ne!(tried.code, 0, "{tried:?}");
    let tried = client::run(&test, &["cat", "/data/dir/other"]);
    assert_ne!(tried.code, 0, "{tried:?}");
    assert_eq!(client::shell(&test, "echo alive"), "alive\n");
    started.stop();
}
