//! What a program finds in the guest: CPUs, memory, mounts, identity, environment, time, entropy.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::json;

use crate::common::{TestBox, now_s, sha256};

#[test]
fn all_vcpus_are_up() {
    for vcpus in [1, 2, 4] {
        let ran = TestBox::debian()
            .with("vcpus", json!(vcpus))
            .python("import os,platform;print(os.cpu_count(),platform.release())", &[])
            .run();
        assert_eq!(ran.code, 0, "{} {}", ran.stderr, ran.console);
        let words: Vec<&str> = ran.console.split_whitespace().collect();
        assert_eq!(words[0], vcpus.to_string());
        assert!(words[1].starts_with("6.12.") && words[1].ends_with("-mvm"), "{words:?}");
        assert_eq!(
            ran.console.lines().count(),
            1,
            "the kernel has nothing to complain about: {}",
            ran.console
        );
    }
}

#[test]
fn there_are_no_performance_counters() {
    let script = r#"
import ctypes, mmap, os, signal, struct
libc = ctypes.CDLL(None, use_errno=True)

def function(code, *types):
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    function.pages = getattr(function, "pages", []) + [page]
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(None, *types)(address)

# push rbx; mov eax, edi; xor ecx, ecx; mov r8, rsi; cpuid; mov [r8], eax to edx; pop rbx; ret
code = bytes.fromhex("53 89f8 31c9 4989f0 0fa2 418900 41895804 41894808 4189500c 5b c3")
cpuid_into = function(code, ctypes.c_uint, ctypes.c_void_p)
def cpuid(leaf):
    words = (ctypes.c_uint * 4)()
    cpuid_into(leaf, words)
    return list(words)

if cpuid(0)[0] >= 0xa:
    assert cpuid(0xa) == [0, 0, 0, 0], cpuid(0xa)
assert not cpuid(1)[2] >> 15 & 1, "PDCM"
assert not cpuid(0x80000001)[2] & (1 << 23 | 1 << 24 | 1 << 28), "AMD's counters"
if cpuid(0x80000000)[0] >= 0x80000022:
    assert cpuid(0x80000022)[0] & 1 == 0, "PerfMonV2"

def perf_event_open(kind):
    attributes = struct.pack("=IIQ", kind, 112, 0) + bytes(112 - 16)
    fd = libc.syscall(298, attributes, 0, -1, -1, 0)
    return "opened" if fd >= 0 else os.strerror(ctypes.get_errno())
print("cycles", perf_event_open(0))
print("cpu-clock", perf_event_open(1))

# xor ecx, ecx; rdpmc; ret
rdpmc = function(bytes.fromhex("31c9 0f33 c3"))
child = os.fork()
if child == 0:
    rdpmc()
    os._exit(0)
print("rdpmc", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV)
"#;
    let ran = TestBox::debian().python(script, &[]).run();
    let expected = "cycles No such file or directory\ncpu-clock opened\nrdpmc True\n";
    assert_eq!((ran.code, ran.console.as_str()), (0, expected), "{}", ran.stderr);
}

#[test]
fn there_is_no_virtualisation_to_use() {
    let script = "grep -c ^flags /proc/cpuinfo; grep -woE 'vmx|svm' /proc/cpuinfo; ls /dev/kvm";
    let ran = TestBox::busybox().shell(script).run();
    assert_eq!(ran.console, "1\nls: /dev/kvm: No such file or directory\n", "{}", ran.stderr);
}

#[test]
fn memory_is_what_was_asked_for() {
    for mib in [64u64, 256, 3328, 6144] {
        let ran = TestBox::busybox()
            .shell("awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo")
            .with("memory_mib", json!(mib))
            .run();
        assert_eq!(ran.code, 0, "{mib} MiB: {} {}", ran.stderr, ran.console);
        let seen: u64 =
            ran.console.trim().parse().unwrap_or_else(|_| panic!("{mib} MiB: {}", ran.console));
        // The kernel's image and its array of pages take some of it.
        assert!(seen < mib && seen > mib - 40 - mib / 25, "{seen} of {mib} MiB");
    }
}

#[test]
fn the_usual_file_systems_are_mounted() {
    let ran = TestBox::busybox()
        .shell("cat /proc/mounts; ls -l /dev/fd /dev/stdout; ls /sys/fs/cgroup")
        .run();
    for mount in [
        "mote-root / virtiofs rw",
        "/dev devtmpfs",
        "/proc proc",
        "/sys sysfs",
        "/sys/fs/cgroup cgroup2",
        "/dev/pts devpts",
        "/dev/shm tmpfs",
    ] {
        assert!(ran.console.contains(mount), "{mount}: {}", ran.console);
    }
    assert!(ran.console.contains("/dev/fd -> /proc/self/fd"), "{}", ran.console);
    assert!(ran.console.contains("cgroup.controllers"), "{}", ran.console);
}

#[test]
fn loopback_is_up_and_the_only_interface() {
    let ran = TestBox::busybox()
        .shell("ls /sys/class/net; cat /sys/class/net/lo/flags; ip addr show lo")
        .run();
    let lines: Vec<&str> = ran.console.lines().collect();
    assert_eq!(lines[..2], ["lo", "0x9"], "{}", ran.console);
    assert!(ran.console.contains("127.0.0.1/8"), "{}", ran.console);
}

#[test]
fn environment_and_arguments_arrive_intact() {
    let long = "quo\"te's $x `y` \\ \n tab\tü ".repeat(2700);
    assert!(long.len() > 64 * 1024);
    let mut env: Vec<[String; 2]> =
        (0..100).map(|i| [format!("VAR.{i}"), format!("value {i} \"=\n")]).collect();
    env.push(["VAR.0".into(), "the later one wins".into()]);
    let script = r#"
import os, sys
assert sys.argv[1] == sys.argv[2] * 2700, "argument"
for i in range(1, 100):
    assert os.environ[f"VAR.{i}"] == f'value {i} "=\n', i
assert os.environ["VAR.0"] == "the later one wins"
assert os.environ["HOME"] == "/" and os.environ["TERM"] == "linux", os.environ
extra = set(os.environ) - {f"VAR.{i}" for i in range(100)} - {"LC_CTYPE"}  # python's own
assert extra == {"HOME", "TERM", "PATH"}, extra
print("intact")
"#;
    let ran = TestBox::debian()
        .python(script, &[&long, "quo\"te's $x `y` \\ \n tab\tü "])
        .with_entrypoint("env", json!(env))
        .run();
    assert_eq!((ran.code, ran.console.as_str()), (0, "intact\n"), "{}", ran.stderr);
}

#[test]
fn workdir_hostname_and_user_are_as_asked() {
    let ran = TestBox::busybox()
        .shell(
            "pwd; hostname; id -u; id -g; id -G; echo more >/dev/stdout; readlink /proc/self/fd/0",
        )
        .with("workdir", json!("/etc"))
        .with("user", json!("app"))
        .with_entrypoint("env", json!([["HOSTNAME", "box-7"]]))
        .run();
    assert_eq!(ran.code, 0, "{} {}", ran.stderr, ran.console);
    let lines: Vec<&str> = ran.console.lines().collect();
    assert_eq!(lines, ["/etc", "box-7", "1000", "1000", "1000 2000", "more", "/dev/null"]);
}

#[test]
fn limits_are_set() {
    let ran = TestBox::busybox()
        .shell("ulimit -n; ulimit -Hn; ulimit -c; ulimit -u 2>/dev/null || grep processes /proc/self/limits")
        .with("resource_limits", json!({"ulimits": ["core=0", "nofile=500:600"]}))
        .run();
    assert!(ran.console.starts_with("500\n600\n0\n"), "{}", ran.console);
    assert!(ran.console.contains("4096"), "{}", ran.console);
}

#[test]
fn signals_are_at_their_defaults() {
    // Rust programs ignore SIGPIPE. A child that inherited that would not end with its pipe's reader.
    let ran = TestBox::busybox()
        .with_entrypoint("executable", json!("grep"))
        .with_entrypoint("args", json!(["-E", "Sig(Blk|Ign)", "/proc/self/status"]))
        .run();
    assert_eq!(ran.console.lines().count(), 2, "{}", ran.console);
    for line in ran.console.lines() {
        assert!(line.ends_with("\t0000000000000000"), "{}", ran.console);
    }
}

#[test]
fn random_numbers_are_ready_at_once() {
    let ran = TestBox::busybox()
        .shell("dd if=/dev/random bs=64 count=1 2>/dev/null | wc -c; cat /sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c")
        .run();
    let lines: Vec<&str> = ran.console.lines().collect();
    assert_eq!(lines[0], "64");
    assert!(lines[1].starts_with("virtio_rng"), "{}", ran.console);
    assert_eq!(lines[2], "64");
}

#[test]
fn the_clock_is_the_hosts() {
    let before = now_s();
    let ran = TestBox::busybox().shell("date +%s").run();
    let guest: u64 = ran.console.trim().parse().expect("a time");
    assert!((before..=now_s()).contains(&guest), "{guest} is not since {before}");
}

#[test]
fn a_large_file_is_the_same_on_both_sides() {
    let test = TestBox::debian().shell(
        "set -e; dd if=/dev/urandom of=/big bs=1M count=200 2>/dev/null; sync; \
         echo 3 >/proc/sys/vm/drop_caches; sha256sum /big | cut -d' ' -f1",
    );
    let ran = test.run();
    assert_eq!(ran.code, 0, "{} {}", ran.stderr, ran.console);
    let big = test.path("root/big");
    assert_eq!(fs::metadata(&big).expect("there").len(), 200 << 20);
    assert_eq!(ran.console.trim(), sha256(&big));
}

#[test]
fn devices_are_as_udev_would_have_them() {
    let script = r#"
import os, stat
for name in "null zero full random urandom tty ptmx fuse net/tun".split():
    mode = os.stat("/dev/" + name).st_mode
    print(name, stat.filemode(mode))
for name in "fd stdin stdout stderr core".split():
    print(name, os.readlink("/dev/" + name))
print("shm", stat.filemode(os.stat("/dev/shm").st_mode))
os.setuid(1000)
os.open("/dev/fuse", os.O_RDWR); os.open("/dev/net/tun", os.O_RDWR)
"#;
    let ran = TestBox::debian().python(script, &[]).run();
    let everybodys: String = "null zero full random urandom tty ptmx fuse net/tun"
        .split(' ')
        .map(|name| format!("{name} crw-rw-rw-\n"))
        .collect();
    let links = "fd /proc/self/fd\nstdin /proc/self/fd/0\nstdout /proc/self/fd/1\n\
        stderr /proc/self/fd/2\ncore /proc/kcore\nshm drwxrwxrwt\n";
    assert_eq!(ran.console, everybodys + links, "{}", ran.stderr);
}

#[test]
fn an_ordinary_user_mounts_by_fuse() {
    let script = r#"
set -e
echo app:x:1000:1000::/:/bin/sh >>/etc/passwd; ln -sf /proc/self/mounts /etc/mtab
mkdir -p /h/low /h/up /h/work /h/merged; echo low >/h/low/file; chown -R 1000 /h
setpriv --reuid 1000 --clear-groups sh -ec '
    fuse-overlayfs -o lowerdir=/h/low,upperdir=/h/up,workdir=/h/work /h/merged
    echo up >>/h/merged/file; cat /h/merged/file; fusermount3 -u /h/merged; cat /h/up/file'
"#;
    let ran = TestBox::debian().shell(script).run();
    assert_eq!(ran.console, "low\nup\nlow\nup\n", "{}", ran.stderr);
    assert_eq!(ran.code, 0);
}

#[test]
fn localhost_and_the_boxs_own_name_resolve_whatever_the_image_has() {
    let names = "getent hosts localhost; getent ahostsv4 box-7 | head -n 1; cat /etc/hosts | wc -l";
    for (of_image, read_only, expected) in [
        (None, "0", "::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 STREAM box-7\n3\n"),
        (Some(""), "1", "::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 STREAM box-7\n3\n"),
        (
            Some("127.0.0.1 localhost\n192.0.2.7 box-7\n"),
            "0",
            "127.0.0.1 localhost\n192.0.2.7 STREAM box-7\n2\n",
        ),
    ] {
        let test = TestBox::debian();
        let file = test.path("root/etc/hosts");
        match of_image {
            Some(text) => fs::write(&file, text).expect("hosts"),
            None => fs::remove_file(&file).unwrap_or_default(),
        }
        let env = json!([["HOSTNAME", "box-7"], ["BOX_READONLY", read_only]]);
        let test = test.shell(names).with_entrypoint("env", env);
        let ran = test.run();
        let said: Vec<String> = ran
            .console
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(said.join("\n") + "\n", expected, "{}", ran.stderr);
        let after = fs::read_to_string(&file).expect("a file to mount on");
        assert_eq!(after, of_image.unwrap_or_default(), "the image's file stays as it is");
    }
}

#[test]
fn systemd_is_told_that_it_cannot_be_process_1() {
    let mut test = TestBox::busybox();
    let systemd = test.path("root/lib/systemd/systemd");
    fs::create_dir_all(systemd.parent().expect("a directory")).expect("directory");
    fs::write(&systemd, "#!/bin/sh\necho started\n").expect("file");
    fs::set_permissions(&systemd, fs::Permissions::from_mode(0o755)).expect("mode");
    let init = test.path("root/sbin/init");
    fs::create_dir_all(test.path("root/sbin")).expect("directory");
    symlink("/lib/systemd/systemd", &init).expect("link");
    for name in ["/sbin/init", "init", "/lib/systemd/systemd"] {
        test = test.with_entrypoint("executable", json!(name));
        let ran = test.run();
        assert_eq!(ran.code, 125);
        let expected = format!("'{name}' is systemd, which works only as process 1");
        assert!(ran.stderr.contains(&expected), "{}", ran.stderr);
    }
}
