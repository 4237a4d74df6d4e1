//! Virtio-fs shares beside the root.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::client;
use crate::common::TestBox;
use crate::processes::virtiofsd_of;

/// An ext4 file system of its own below a test's directory: what others can do with attributes depends on where
/// tests run (tmpfs has none of users before Linux 6.6).
struct Ext4(PathBuf);

impl Ext4 {
    fn new(test: &TestBox) -> Self {
        let (image, mounted) = (test.path("out/ext4.img"), test.path("out/ext4"));
        fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("file");
        fs::create_dir(&mounted).expect("directory");
        let run = |program: &str, arguments: &[&str]| {
            let done = Command::new(program).args(arguments).arg(&image).arg(&mounted).output();
            let done = done.expect("runs");
            assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        };
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).status();
        assert!(made.expect("e2fsprogs is installed").success());
        // A module where it is not part of the kernel.
        let _ = Command::new("modprobe").arg("loop").output();
        run("mount", &["-t", "ext4", "-o", "loop"]);
        Ext4(mounted)
    }

    /// The box with this as a writable share at `/s`.
    fn shared(&self, test: TestBox) -> TestBox {
        let share = json!([{"tag": "s", "host_path": self.0, "read_only": false}]);
        test.with("fs_mounts", share).with_entrypoint("env", json!([["BOX_VOL_0", "s:/s"]]))
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

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
    assert!(ran.console.contains("refused\n"), "{}", ran.console);
    assert_eq!(fs::read_to_string(test.path("out/data/new")).expect("written"), "new\n");
    assert!(!test.path(&format!("out/{long_tag}/new")).exists());
}

/// How many bytes the virtiofsd of a box's root has read.
fn bytes_served(test: &TestBox) -> u64 {
    let pids = virtiofsd_of(&test.path("root"));
    let read = |pid: u32| {
        let io = fs::read_to_string(format!("/proc/{pid}/io")).expect("io");
        let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("rchar");
        line.parse::<u64>().expect("a number")
    };
    pids.into_iter().map(read).sum()
}

#[test]
fn a_file_that_has_not_changed_is_read_once() {
    let len = 4_u64 << 20;
    let test = TestBox::busybox();
    fs::write(test.path("root/large"), vec![b'x'; len as usize]).expect("file");
    let (test, started) = test.idle();
    let sum = || client::shell(&test, "sha256sum </large");
    let first = sum();
    let before = bytes_served(&test);
    assert!(before > len, "{before}");
    // The first open of a file that has just been written may be followed by one that is not believed either.
    sum();
    let before = bytes_served(&test);
    for _ in 0..4 {
        assert_eq!(sum(), first);
    }
    let read = bytes_served(&test) - before;
    assert!(read < len / 4, "{read} bytes were read again");
    started.stop();
}

/// Whoever changes it: the same number of bytes, in place, at once after the guest has read it.
#[test]
fn a_change_on_the_host_shows_when_a_file_is_opened() {
    let test = TestBox::busybox();
    let file = test.path("root/file");
    fs::write(&file, "0000").expect("file");
    let (test, started) = test.idle();
    for number in 1..=40 {
        let text = format!("{number:04}");
        fs::write(&file, &text).expect("file");
        assert_eq!(client::shell(&test, "cat /file"), text);
        // From its second time on, what is unchanged is kept.
        assert_eq!(client::shell(&test, "cat /file; cat /file"), format!("{text}{text}"));
    }
    started.stop();
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

#[test]
fn a_share_is_what_it_was_when_the_box_started() {
    let test = TestBox::busybox();
    let outer = share(&test, "outer", false, "outer");
    for (directory, contents) in [("out/outer/inner", "inner"), ("out/secret", "secret")] {
        fs::create_dir(test.path(directory)).expect("directory");
        fs::write(test.path(directory).join("file"), contents).expect("file");
    }
    let inner = test.path("out/outer/inner");
    let shares = json!([outer, {"tag": "inner", "host_path": inner, "read_only": true}]);
    let volumes = json!([["BOX_VOL_0", "outer:/outer"], ["BOX_VOL_1", "inner:/in:ro"]]);
    // Before anything has looked into the inner one.
    let script = "mv /outer/inner /outer/moved && ln -s ../secret /outer/inner && cat /in/file";
    let test = test.with("fs_mounts", shares).with_entrypoint("env", volumes).shell(script);
    let ran = test.run();
    assert_eq!((ran.code, ran.console.as_str()), (0, "inner"), "{}", ran.stderr);
    assert!(test.path("out/outer/moved/file").exists(), "the guest has moved it");
}

#[test]
fn trusted_attributes_are_roots_alone_and_the_host_believes_none() {
    let test = TestBox::debian();
    let script = r#"
import os
def told(attempt):
    try: return attempt()
    except OSError as e: return e.strerror
f = "/s/file"
open(f, "w").close()
os.chown(f, 1000, 1000)
os.setxattr(f, "trusted.a", b"1")
os.setxattr(f, "user.b", b"2")
print(os.listxattr(f), os.getxattr(f, "trusted.a"))
os.setuid(1000)
print(told(lambda: os.getxattr(f, "trusted.a")))
print(told(lambda: os.setxattr(f, "trusted.a", b"3")))
print(told(lambda: os.setxattr(f, "user.virtiofs.trusted.a", b"3")))
print(told(lambda: os.getxattr(f, "user.virtiofs.trusted.a")))
"#;
    let disk = Ext4::new(&test);
    let ran = disk.shared(test).python(script, &[]).run();
    assert_eq!(
        ran.console,
        "['trusted.a', 'user.b'] b'1'\nNo data available\nOperation not permitted\n\
            Operation not permitted\nNo data available\n",
        "{}",
        ran.stderr
    );
}

#[test]
fn overlayfs_has_its_upper_layer_on_a_share() {
    let script = r#"
set -e
mkdir -p /s/low/deep /s/up /s/work /s/merged
echo low >/s/low/file; echo low >/s/low/deep/file; ln -s file /s/low/link
mount -t overlay overlay -o lowerdir=/s/low,upperdir=/s/up,workdir=/s/work /s/merged
cd /s/merged
echo up >>file; rm deep/file; mv link moved; mkdir new; mv new newer
rm -r deep; mkdir deep
cat file; ls -A . deep
cd /; umount /s/merged
mount -t overlay overlay -o lowerdir=/s/low,upperdir=/s/up,workdir=/s/work /s/merged
ls -A /s/merged/deep | wc -l
"#;
    let test = TestBox::debian();
    let disk = Ext4::new(&test);
    let ran = disk.shared(test).shell(script).run();
    let listed = ".:\ndeep\nfile\nmoved\nnewer\n\ndeep:\n";
    assert_eq!(ran.console, format!("low\nup\n{listed}0\n"), "{}", ran.stderr);
    assert_eq!(ran.code, 0);
}

#[test]
fn what_shares_cannot_do_fails_as_the_readme_says() {
    let script = r#"
import ctypes, fcntl, os, stat, struct
def told(attempt):
    try: return attempt() and None
    except OSError as e: return e.strerror
open("/file", "w").close()
print("tmpfile:", told(lambda: os.open("/", os.O_TMPFILE | os.O_RDWR)))
print("device:", told(lambda: os.mknod("/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))))
print("pipe:", told(lambda: os.mkfifo("/pipe")))
FS_IOC_SETFLAGS, FS_IMMUTABLE_FL = 0x40086602, 0x10
# Version 2, without entries.
print("acl:", told(lambda: os.setxattr("/file", "system.posix_acl_access", struct.pack("<I", 2))))
with open("/file") as f:
    print("chattr:", told(lambda: fcntl.ioctl(f, FS_IOC_SETFLAGS, struct.pack("l", FS_IMMUTABLE_FL))))
"#;
    let ran = TestBox::debian().python(script, &[]).run();
    assert_eq!(
        ran.console,
        "tmpfile: Operation not supported\ndevice: Operation not permitted\npipe: None\n\
            acl: Operation not supported\nchattr: Inappropriate ioctl for device\n",
        "{}",
        ran.stderr
    );
}

#[test]
fn a_lock_on_a_share_ends_at_the_box() {
    let script = r#"
import fcntl, time
f = open("/shared/lock", "w")
fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("ready", flush=True)
time.sleep(1000)
"#;
    let dir = TestBox::busybox();
    let shared = json!([{"tag": "shared", "host_path": dir.path("out"), "read_only": false}]);
    let boxes = [(); 2].map(|()| {
        TestBox::debian()
            .without_console_file()
            .with("fs_mounts", shared.clone())
            .with_entrypoint("env", json!([["BOX_VOL_0", "shared:/shared"]]))
            .python(script, &[])
    });
    // Both hold it, which the README warns of.
    for started in boxes.iter().map(TestBox::ready).collect::<Vec<_>>() {
        started.kill();
    }
}
