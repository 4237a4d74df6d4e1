//! What mote cannot do while it runs a guest: looked at from outside, and tried by making its own threads
//! do it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::client;
use crate::common::{Finished, Started, TestBox, eventually, executable, mote};
use crate::processes::{
    children_of, descriptors_of, name_of, processes_with, ready_virtiofsd_of, virtiofsd_of,
};
use crate::traced;

/// A box of two vCPUs that has said `ready`.
fn ready() -> (TestBox, Started) {
    TestBox::busybox().with("vcpus", json!(2)).idle()
}

/// The number and name of every thread of a process.
fn threads(pid: u32) -> Vec<(i32, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process").flatten();
    tasks
        .map(|task| {
            let name = fs::read_to_string(task.path().join("comm")).expect("a name");
            (
                task.file_name().to_str().expect("text").parse().expect("a number"),
                name.trim().into(),
            )
        })
        .collect()
}

fn namespace(pid: &str, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace")
}

/// Checks the confinement that a mote has in any case, with or without namespaces.
fn assert_confined(pid: u32) {
    let threads = threads(pid);
    let names: BTreeSet<&str> = threads.iter().map(|(_, name)| name.as_str()).collect();
    assert!(names.is_superset(&["mote", "vcpu0", "vcpu1", "stdout", "stderr"].into()), "{names:?}");
    for (tid, name) in &threads {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).expect("status");
        for line in [
            "Seccomp:\t2",
            "NoNewPrivs:\t1",
            "CapInh:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "CapEff:\t0000000000000000",
            "CapBnd:\t0000000000000000",
            "CapAmb:\t0000000000000000",
        ] {
            // Only root may lower the bounding set.
            if line.starts_with("CapBnd")
                && fs::metadata(format!("/proc/{pid}/task")).expect("it").uid() != 0
            {
                continue;
            }
            assert!(status.contains(&format!("\n{line}\n")), "{name}: no {line} in {status}");
        }
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
    for name in ["Max core file size", "Max locked memory", "Max msgqueue size"] {
        let line = limits.lines().find(|line| line.starts_with(name)).expect(name);
        let values: Vec<&str> = line[name.len()..].split_whitespace().collect();
        assert_eq!(values[..2], ["0", "0"], "{line}");
    }
    let address_space = limits.lines().find(|line| line.starts_with("Max address space"));
    assert!(address_space.is_some_and(|line| !line.contains("unlimited")), "{limits}");
}

/// Checks that the process sees no file system and shares nothing with the host that it need not.
fn assert_in_an_empty_root(pid: u32) {
    for place in ["root", "cwd"] {
        let listing = fs::read_dir(format!("/proc/{pid}/{place}")).expect(place);
        assert_eq!(listing.count(), 0, "{place} is not empty");
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mounts");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,"), "{mounts}");
    for kind in ["mnt", "ipc", "uts"] {
        assert_ne!(namespace(&pid.to_string(), kind), namespace("self", kind), "{kind}");
    }
}

#[test]
fn a_running_box_is_confined() {
    let (test, started) = ready();
    let pid = started.pid();
    assert_confined(pid);
    assert_in_an_empty_root(pid);
    // Its connections are made in the host's network.
    assert_eq!(namespace(&pid.to_string(), "net"), namespace("self", "net"));
    assert_eq!(client::shell(&test, "echo served"), "served\n");
    started.stop();
}

#[test]
fn virtiofsd_sees_its_share_and_nothing_else() {
    let test = TestBox::busybox();
    let data = test.path("data");
    fs::create_dir(&data).expect("directory");
    fs::write(data.join("file"), "precious").expect("file");
    let mounts = json!([{ "tag": "data", "host_path": data, "read_only": true }]);
    let (test, started) = test.with("fs_mounts", mounts).idle();
    for (path, read_only, capabilities) in
        [(test.path("root"), false, "00000000800000db"), (data.clone(), true, "0000000000000002")]
    {
        let pid = ready_virtiofsd_of(&path);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        for line in ["Seccomp:\t2", "NoNewPrivs:\t1", &format!("CapEff:\t{capabilities}")] {
            assert!(status.contains(&format!("\n{line}\n")), "no {line} in {status}");
        }
        let inside = PathBuf::from(format!("/proc/{pid}/root"));
        let (seen, shared) = (fs::metadata(&inside).expect("it"), fs::metadata(&path).expect("it"));
        assert_eq!((seen.dev(), seen.ino()), (shared.dev(), shared.ino()));
        // Through its own mount, as a virtiofsd that was broken into might try. This test is root and may.
        let written = fs::write(inside.join("new"), "x");
        match read_only {
            true => {
                let error = written.expect_err("read-only").raw_os_error();
                assert_eq!(error, Some(libc::EROFS));
            }
            false => written.expect("writable"),
        }
        for kind in ["pid", "mnt", "net"] {
            assert_ne!(namespace(&pid.to_string(), kind), namespace("self", kind), "{kind}");
        }
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mounts");
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        for option in ["nosuid", "nodev", "noexec"] {
            assert!(mounts.lines().all(|line| line.contains(option)), "{mounts}");
        }
    }
    started.stop();
}

/// A box with two more shares, `first` and a read-only `second`.
fn with_shares() -> TestBox {
    let test = TestBox::busybox();
    let shares = [("first", false), ("second", true)].map(|(tag, read_only)| {
        let path = test.path(tag);
        fs::create_dir(&path).expect("directory");
        json!({ "tag": tag, "host_path": path, "read_only": read_only })
    });
    test.shell("echo ready; exec sleep 10000")
        .without_console_file()
        .with("fs_mounts", json!(shares))
}

/// They are copies of one process, and have nothing of one another.
#[test]
fn several_virtiofsd_are_apart_from_one_another() {
    for user in [false, true] {
        let test = with_shares();
        let mut command = if user { unprivileged(&test, true) } else { test.mote() };
        let mut started = test.start_by(&mut command);
        started.wait_for_line("ready");
        let (mut namespaces, mut open) = (BTreeSet::new(), BTreeSet::new());
        for name in ["root", "first", "second"] {
            let path = test.path(name);
            let pid = ready_virtiofsd_of(&path);
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
            for line in ["Name:\tvirtiofsd", "Seccomp:\t2", "NoNewPrivs:\t1"] {
                assert!(status.contains(&format!("{line}\n")), "no {line} in {status}");
            }
            let inside = PathBuf::from(format!("/proc/{pid}/root"));
            let (seen, shared) =
                (fs::metadata(&inside).expect("it"), fs::metadata(&path).expect("it"));
            assert_eq!((seen.dev(), seen.ino()), (shared.dev(), shared.ino()));
            let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mounts");
            assert_eq!(mounts.lines().count(), 1, "{mounts}");
            for kind in ["pid", "mnt"] {
                assert!(namespaces.insert(namespace(&pid.to_string(), kind)), "{name}: {kind}");
            }
            assert_ne!(namespace(&pid.to_string(), "net"), namespace("self", "net"));
            for (fd, what) in descriptors_of(pid) {
                let is_own = !what.starts_with("socket:") && !what.starts_with("pipe:");
                assert!(is_own || open.insert(what.clone()), "{name} has {fd}, {what}, of another");
            }
        }
        assert_eq!(client::shell(&test, "echo served"), "served\n");
        assert_eq!(started.stop().stderr, "", "user: {user}");
    }
}

/// What confined them is not permitted any more.
#[test]
fn a_virtiofsd_cannot_do_what_started_it() {
    // include/uapi/linux/sched.h
    const COPY: u64 = (libc::CLONE_NEWPID | libc::CLONE_PARENT | libc::SIGCHLD) as u64;
    for (call, number, arguments) in [
        ("chroot", libc::SYS_chroot, [0, 0, 0]),
        ("unshare", libc::SYS_unshare, [libc::CLONE_NEWNS as u64, 0, 0]),
        ("clone", libc::SYS_clone, [COPY, 0, 0]),
        ("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0]),
        ("socket", libc::SYS_socket, [libc::AF_UNIX as u64, 1, 0]),
    ] {
        let test = with_shares();
        let started = test.ready();
        let pid = ready_virtiofsd_of(&test.path("first"));
        traced::call(pid as i32, number, arguments);
        let ran = started.wait();
        assert_eq!(ran.code, 124, "{call}: {}", ran.stderr);
        let said = format!("thread virtiofsd made the system call {call} ({number})");
        assert!(ran.stderr.contains("virtiofsd for share 'first' ("), "{}", ran.stderr);
        assert!(ran.stderr.contains(&said), "{}", ran.stderr);
    }
}

#[test]
fn nothing_inherited_is_kept() {
    let test = TestBox::busybox()
        .shell("ls /proc/self/fd | wc -l; env; echo ready; exec sleep 10000")
        .without_console_file();
    let secret = test.path("secret");
    fs::write(&secret, "").expect("file");
    let script = format!("exec 7<{0} 200<{0} <{0}; exec \"$@\"", secret.display());
    let words = ["bash", "-c", &script, "bash"];
    let mut started = test.start_by(test.mote_within(&words).env("SECRET", "host"));
    started.wait_for_line("ready");
    for line in processes_of(&test, &started) {
        let (pid, name) = line;
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").flatten();
        let open: Vec<PathBuf> = fds.flat_map(|fd| fs::read_link(fd.path())).collect();
        // This holds for the janitor and virtiofsd too.
        assert!(!open.contains(&secret), "{name} has {open:?}");
    }
    let environment = client::shell(&test, "env");
    assert!(!environment.contains("SECRET"), "{environment}");
    started.stop();
}

#[test]
fn no_process_shows_the_spec() {
    const SECRET: &str = "hunter2-of-the-spec";
    let test = TestBox::streaming("echo $SECRET; echo ready; exec sleep 10000")
        .with_entrypoint("env", json!([["SECRET", SECRET]]));
    let spec = test.spec.to_string();
    for config in [vec!["--config".into(), spec.clone()], vec![format!("--config={spec}")]] {
        let outcome = test.path("out/outcome.json");
        let mut command = Command::new(mote());
        command.args(config).arg("--outcome").arg(&outcome).env("TMPDIR", test.path("tmp"));
        let mut started = test.start_by(&mut command);
        started.wait_for_line(SECRET);
        started.wait_for_line("ready");
        for (pid, name) in processes_of(&test, &started) {
            let line = fs::read(format!("/proc/{pid}/cmdline")).expect("a process");
            let line = String::from_utf8_lossy(&line);
            assert!(!line.contains(SECRET) && !line.contains("box_id"), "{name}: {line}");
            // Nothing else is hidden, but from those that have arguments of their own.
            let has_its_own = ["virtiofsd", "mote-template"].contains(&name.as_str());
            assert_eq!(has_its_own, !line.contains(outcome.to_str().expect("text")));
        }
        assert_eq!(started.stop().stderr, "");
    }
}

/// A box's processes, by number and command: mote, its janitor and virtiofsd.
fn processes_of(test: &TestBox, mote: &Started) -> Vec<(u32, String)> {
    let daemons = virtiofsd_of(&test.dir);
    let pids: BTreeSet<u32> =
        [mote.pid()].into_iter().chain(children_of(mote.pid())).chain(daemons).collect();
    let all: Vec<_> = pids.into_iter().map(|pid| (pid, name_of(pid))).collect();
    for name in ["mote", "mote-janitor", "virtiofsd"] {
        assert!(all.iter().any(|(_, found)| found == name), "no {name} in {all:?}");
    }
    all
}

/// Runs a box, makes its thread of this name do a system call, and returns how the box ended.
fn broken(thread: &str, number: i64, arguments: [u64; 3]) -> Finished {
    let (test, started) = ready();
    let threads = threads(started.pid());
    let (tid, _) = threads.iter().find(|(_, name)| name == thread).expect("the thread");
    traced::call(*tid, number, arguments);
    let output = started.wait_with_output();
    eventually("its processes end", || processes_with(&test.dir).is_empty());
    test.finished(output)
}

#[test]
fn a_system_call_that_mote_never_makes_ends_it_with_a_message() {
    const EXECUTABLE: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    const UNIX: u64 = libc::AF_UNIX as u64;
    const LINGER: [u64; 3] = [0, libc::SOL_SOCKET as u64, libc::SO_LINGER as u64];
    // include/uapi/linux/kvm.h
    const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    const KVM_SET_REGS: u64 = 0x4090_ae82;
    for (thread, name, call, number, arguments) in [
        ("mote", "main", "openat", libc::SYS_openat, [0, 0, 0]),
        ("mote", "main", "socket", libc::SYS_socket, [UNIX, libc::SOCK_STREAM as u64, 0]),
        ("mote", "main", "mmap", libc::SYS_mmap, [0, 4096, EXECUTABLE]),
        ("mote", "main", "prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0]),
        ("vcpu1", "vcpu1", "socket", libc::SYS_socket, [libc::AF_INET as u64, 1, 0]),
        ("vcpu0", "vcpu0", "ioctl", libc::SYS_ioctl, [0, KVM_SET_USER_MEMORY_REGION, 0]),
        // Was needed once, before the guest ran.
        ("vcpu1", "vcpu1", "ioctl", libc::SYS_ioctl, [0, KVM_SET_REGS, 0]),
        // By this call, the listener of a published port could connect after a shutdown.
        ("vcpu1", "vcpu1", "sendmsg", libc::SYS_sendmsg, [0, 0, libc::MSG_FASTOPEN as u64]),
        // By these calls, the close of a connection could be made to wait.
        ("mote", "main", "setsockopt", libc::SYS_setsockopt, LINGER),
        ("vcpu1", "vcpu1", "mprotect", libc::SYS_mprotect, [0x10_0000, 4096, 3]),
        ("vcpu1", "vcpu1", "munmap", libc::SYS_munmap, [0, 0x20_0000, 0]),
        ("stdout", "stdout", "execve", libc::SYS_execve, [0, 0, 0]),
    ] {
        let ran = broken(thread, number, arguments);
        let message = format!(
            "thread {name} made the system call {call} ({number}), which mote never makes; ended the box at once: either mote has been broken into, or this is a bug to report"
        );
        assert_eq!((ran.code, ran.stderr), (120, format!("mote: {message}\n")));
        let outcome = json!({ "kind": "refused", "exit_code": 120, "message": message });
        assert_eq!(ran.outcome, outcome);
    }
}

#[test]
fn the_sandbox_can_be_left_out_aloud() {
    let test = TestBox::busybox().shell("exit 3");
    let ran = test.run_by(test.command().env("MOTE_NO_SANDBOX", "1"));
    assert_eq!(ran.code, 3);
    let expected =
        "mote: warning: MOTE_NO_SANDBOX is set: this box's mote is not confined at all\n";
    assert_eq!(ran.stderr, expected);
}

/// A user of the group that owns /dev/kvm.
pub const USER: u32 = 4711;

/// A command that runs the box as [`USER`], with or without the right to make namespaces.
pub fn unprivileged(test: &TestBox, namespaces: bool) -> Command {
    let binary = give_to_user(test);
    let words = words_of_user(namespaces);
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .arg(&binary)
        .args(["--config", &test.spec.to_string()])
        .env("TMPDIR", test.path("tmp"));
    command
}

/// Gives the box's directory to [`USER`], with mote's file, which the user may not execute elsewhere. Returns that.
pub fn give_to_user(test: &TestBox) -> PathBuf {
    fn give(path: &Path) {
        chown(path, Some(USER), Some(USER))
            .or_else(|_| std::os::unix::fs::lchown(path, Some(USER), Some(USER)))
            .expect("given");
        if fs::symlink_metadata(path).expect("it").is_dir() {
            for entry in fs::read_dir(path).expect("directory").flatten() {
                give(&entry.path());
            }
        }
    }
    let binary = test.path("mote");
    executable(&binary, &fs::read(mote()).expect("the binary"));
    give(&test.dir);
    let kvm = fs::metadata("/dev/kvm").expect("the device");
    if kvm.mode() & 0o60 != 0o60 {
        // The lab has not set the device's mode; on a booted host it is this.
        fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o660)).expect("mode");
    }
    binary
}

/// Words in front of a command that run it as [`USER`], with or without the right to make namespaces.
pub fn words_of_user(namespaces: bool) -> Vec<String> {
    let kvm = fs::metadata("/dev/kvm").expect("the device");
    let mut words = vec![
        "setpriv".into(),
        format!("--reuid={USER}"),
        format!("--regid={USER}"),
        format!("--groups={}", kvm.gid()),
        "--no-new-privs".into(),
    ];
    if !namespaces {
        // A user namespace in which no further one can be made, without any capability.
        let script = "echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --ambient-caps=-all --inh-caps=-all \"$@\"";
        words.extend(
            ["unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c", script, "sh"]
                .map(String::from),
        );
    }
    words
}

#[test]
fn a_user_of_the_kvm_group_can_run_boxes() {
    for namespaces in [true, false] {
        let test = TestBox::busybox()
            .shell("echo written >/file; cat /file; echo ready; exec sleep 10000")
            .without_console_file()
            .with("vcpus", json!(2));
        let mut started = test.start_by(&mut unprivileged(&test, namespaces));
        started.wait_for_line("written");
        started.wait_for_line("ready");
        let pid = started.pid();
        assert_confined(pid);
        for (pid, name) in processes_of(&test, &started) {
            // The kernel gives what others must not read to root (proc_pid(5)); virtiofsd's is the guest's.
            let owner = fs::metadata(format!("/proc/{pid}/mem")).expect("a process").uid();
            assert!(owner == 0 || name == "virtiofsd", "{name}: {owner}");
        }
        if namespaces {
            assert_in_an_empty_root(pid);
        }
        assert_eq!(client::shell(&test, "echo served"), "served\n");
        assert_eq!(started.stop().stderr, "", "namespaces: {namespaces}");
        assert_eq!(fs::read_to_string(test.path("root/file")).expect("there"), "written\n");
    }
}
