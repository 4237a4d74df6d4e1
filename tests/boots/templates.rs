//! Starting from a template: a box is not to be told from one that has booted, and whatever is wrong with a template is a
//! cold boot.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::common::{Finished, TestBox, eventually, mote, now_s};
use crate::processes::processes_with;

/// A directory for templates. It is no box's: a maker may be at work when a box has ended.
struct Templates(PathBuf);

impl Templates {
    fn new() -> Templates {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("/run/mote-templates-{}-{count:04}", std::process::id()));
        Templates(path)
    }

    /// A box with these templates.
    fn busybox(&self, script: &str) -> TestBox {
        TestBox::busybox().shell(script).with_variable("MOTE_TEMPLATES", &self.0)
    }

    /// Makes the template of this box, and returns its file.
    fn make(&self, test: &TestBox) -> PathBuf {
        let output = test.command_of("template").output().expect("mote runs");
        assert!(output.status.success(), "{output:?}");
        self.only("template")
    }

    fn files(&self, suffix: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path());
        paths.filter(|path| path.extension().is_some_and(|end| end == suffix)).collect()
    }

    fn only(&self, suffix: &str) -> PathBuf {
        let files = self.files(suffix);
        let [only] = &files[..] else { panic!("{files:?}") };
        only.clone()
    }
}

impl Drop for Templates {
    fn drop(&mut self) {
        eventually("makers end", || processes_with(&self.0).is_empty());
        let _ = Command::new("umount").arg(&self.0).stderr(Stdio::null()).status();
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What the timeline says of the template.
fn template_of(ran: &Finished) -> &str {
    ran.timeline["template"].as_str().expect("the timeline says so")
}

fn assert_used(ran: &Finished) {
    assert_eq!(template_of(ran), "used", "{}", ran.stderr);
}

/// Runs the box, which says `fine` and ends with 7, and fails unless it boots, because of this.
fn assert_boots(test: &TestBox, why: &str) {
    let ran = test.run();
    assert_eq!((ran.code, ran.console.as_str()), (7, "fine\n"), "{why}: {}", ran.stderr);
    let told = template_of(&ran);
    assert!(told.contains(why), "{why}: {told}");
    assert_eq!(ran.stderr, "", "{why}: a cold boot is no reason to complain");
}

#[test]
fn boxes_of_one_template_share_nothing_that_is_to_be_ones_own() {
    let templates = Templates::new();
    let script = "
        cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid
        dd if=/dev/urandom bs=32 count=1 2>/dev/null | sha256sum
        dd if=/proc/self/auxv bs=4096 2>/dev/null | sha256sum
        dd if=/proc/1/auxv bs=4096 2>/dev/null | sha256sum
        cut -d' ' -f28,45 /proc/1/stat
        date +%s
        dmesg | grep -E 'stall|unstable|skew|WARNING|BUG|lockup|backwards'
        exit $1";
    // For a closer look: MOTE_TEST_STARTS=200.
    let starts =
        std::env::var("MOTE_TEST_STARTS").map_or(12, |text| text.parse().expect("a number"));
    let mut told = BTreeSet::new();
    for number in 0..starts {
        let mut test = templates.busybox(script);
        test.spec["entrypoint"]["args"] = json!(["-c", script, "sh", number.to_string()]);
        if number == 0 {
            templates.make(&test);
        }
        let before = now_s();
        let ran = test.run();
        assert_used(&ran);
        assert_eq!(ran.code, number, "{}", ran.stderr);
        let lines: Vec<&str> = ran.console.lines().collect();
        let [random @ .., at] = &lines[..] else { panic!("{}", ran.console) };
        for line in random {
            assert!(told.insert((*line).to_owned()), "twice: {line}");
        }
        // Else it is a complaint of the kernel's.
        let at: u64 = at.parse().expect(at);
        assert!((before..=now_s()).contains(&at), "{at} is not in {before}..={}", now_s());
    }
}

#[test]
fn clocks_are_right_to_20_ms_whatever_a_start_takes() {
    const TOLERANCE: Duration = Duration::from_millis(20);
    let templates = Templates::new();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    for (place, told) in [(templates.0.as_path(), "used"), (Path::new("off"), "is off")] {
        let test = TestBox::debian()
            .python("import time\nwhile input(): print(time.time_ns())", &[])
            .with_entrypoint("stdin", json!(true))
            .without_console_file()
            .with_variable("MOTE_TEMPLATES", place);
        if told == "used" {
            templates.make(&test);
        }
        let mut mote = test
            .command()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("mote runs");
        let (mut ask, answers) = (mote.stdin.take().unwrap(), mote.stdout.take().unwrap());
        let mut answers = BufReader::new(answers).lines();
        // How far it is off at least, and how long the answer took, of which that is known no better.
        let look = RefCell::new(|| {
            let before = now();
            ask.write_all(b"time?\n").expect("asked");
            let time = answers.next().expect("a line").expect("read").parse().expect("a number");
            let (time, after) = (Duration::from_nanos(time), now());
            (before.saturating_sub(time).max(time.saturating_sub(after)), after - before)
        });
        eventually("the clock is right, and that is seen", || {
            let (off, took) = look.borrow_mut()();
            off <= TOLERANCE && took <= TOLERANCE
        });
        let (off, _) = look.borrow_mut()();
        assert!(off <= TOLERANCE, "off by {off:?} or more");
        drop(ask);
        // The program ends by an error: there is no more input.
        let ran = test.finished(mote.wait_with_output().expect("mote ends"));
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        assert!(template_of(&ran).contains(told), "{}", template_of(&ran));
    }
}

#[test]
fn a_box_with_all_there_is_starts_from_a_template() {
    let templates = Templates::new();
    for vcpus in [2, 4] {
        let mut test = templates.busybox(
            "cat /mnt/*/name; for cpu in 0 1; do taskset -c $cpu true || grep -c . /proc/cpuinfo; done
            nproc; a=$(cut -d. -f1 /proc/uptime); sleep 2; b=$(cut -d. -f1 /proc/uptime)
            [ $((b - a)) -ge 2 ] && [ $((b - a)) -le 3 ] && echo slept; free -m | awk '/^Mem:/ { print ($4 > 400) }'",
        );
        let mut env = Vec::new();
        for number in 0..12 {
            let tag = format!("vol{number}");
            let path = test.path(&tag);
            fs::create_dir(&path).expect("directory");
            fs::write(path.join("name"), format!("{tag}\n")).expect("file");
            env.push(json!([format!("BOX_VOL_{number}"), format!("{tag}:/mnt/{number:02}")]));
            let mount = json!({ "tag": tag, "host_path": path, "read_only": number % 2 == 0 });
            test.spec["fs_mounts"].as_array_mut().expect("a list").push(mount);
        }
        let test = test
            .with("vcpus", json!(vcpus))
            .with("memory_mib", json!(512))
            .with_entrypoint("env", json!(env));
        templates.make(&test);
        let ran = test.run();
        assert_used(&ran);
        let shares: String = (0..12).map(|number| format!("vol{number}\n")).collect();
        // busybox has no taskset: then there are as many lines of /proc/cpuinfo.
        let rest = ran.console.strip_prefix(&shares);
        let rest = rest.unwrap_or_else(|| panic!("{}\n{}", ran.console, ran.stderr));
        assert!(rest.ends_with(&format!("{vcpus}\nslept\n1\n")), "{rest}");
        for template in templates.files("template") {
            fs::remove_file(template).expect("removed");
        }
    }
}

#[test]
fn the_first_box_boots_and_the_next_starts_from_what_it_left() {
    let templates = Templates::new();
    let test = templates.busybox("echo fine; exit 7");
    assert_boots(&test, "there is none; it is being made");
    eventually("the template is made", || !templates.files("template").is_empty());
    let directory = fs::metadata(&templates.0).expect("directory").permissions().mode();
    let file = fs::metadata(templates.only("template")).expect("file").permissions().mode();
    assert_eq!((directory & 0o7777, file & 0o7777), (0o700, 0o600));
    let ran = test.run();
    assert_eq!((ran.code, ran.console.as_str()), (7, "fine\n"), "{}", ran.stderr);
    assert_used(&ran);
    // Another shape is another template.
    assert_boots(
        &templates.busybox("echo fine; exit 7").with("memory_mib", json!(300)),
        "there is none",
    );
}

#[test]
fn what_is_not_a_whole_template_of_this_users_is_not_used() {
    let templates = Templates::new();
    let test = templates.busybox("echo fine; exit 7");
    let file = templates.make(&test);
    let whole = fs::read(&file).expect("file");
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        fs::write(&file, bytes).expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("mode");
    };
    let flip = |at: usize| move |bytes: &mut Vec<u8>| bytes[at] ^= 4;
    let middle = whole.len() / 2;
    type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
    let damage: [(&str, Change<'_>); 8] = [
        ("does not start as one", &flip(0)),
        ("has version 6 of the format", &flip(8)),
        ("state is damaged", &flip(200)),
        ("not those that were written", &flip(middle)),
        ("not those that were written", &flip(whole.len() - 1)),
        ("read its header", &|bytes| bytes.clear()),
        ("bytes, and should have", &|bytes| bytes.truncate(5000)),
        ("bytes, and should have", &|bytes| bytes.push(0)),
    ];
    for (why, change) in damage {
        with(change);
        assert_boots(&test, why);
        // Twice is enough.
        if file.exists() {
            assert_boots(&test, "");
        }
        assert!(!file.exists(), "{why}");
        for left in [templates.files("failed"), templates.files("new")].concat() {
            let _ = fs::remove_file(left);
        }
    }

    let debugged = templates.busybox("echo fine; exit 7").with_variable("MOTE_DEBUG", "1");
    let says = |why: &str| {
        let ran = debugged.run();
        assert_eq!(ran.code, 7, "{}", ran.stderr);
        assert!(
            ran.stderr.contains(&format!("mote: no template is used: {why}")),
            "{}",
            ran.stderr
        );
    };
    with(&|_| ());
    says("MOTE_DEBUG has the kernel print all its messages");
    with(&flip(middle));
    says("start from the template: its pages are not those that were written");

    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
    };
    with(&|_| ());
    mode(&file, 0o666);
    assert_boots(&test, "has mode 666");
    with(&|_| ());
    mode(&file, 0o600);
    std::os::unix::fs::chown(&file, Some(1000), Some(1000)).expect("chown");
    assert_boots(&test, "belongs to another user");

    let elsewhere = test.path("out/elsewhere");
    fs::write(&elsewhere, &whole).expect("written");
    mode(&elsewhere, 0o600);
    let _ = fs::remove_file(&file);
    symlink(&elsewhere, &file).expect("link");
    assert_boots(&test, "symbolic links");
    fs::remove_file(&file).expect("removed");

    mode(&templates.0, 0o777);
    assert_boots(&test, "has mode 777");
    mode(&templates.0, 0o700);
}

#[test]
fn what_was_found_whole_is_checked_again_when_somebody_has_changed_it() {
    let templates = Templates::new();
    let test = templates.busybox("echo fine; exit 7");
    let file = templates.make(&test);
    let used = || assert_used(&test.run());
    // One that was written just now could be written once more at the same time.
    eventually("its pages are noted to be whole", || {
        used();
        !templates.files("checked").is_empty()
    });
    used();
    let written = fs::metadata(&file).and_then(|metadata| metadata.modified()).expect("a time");
    let template = fs::File::options().read(true).write(true).open(&file).expect("opened");
    let mut byte = [0];
    let middle = template.metadata().expect("there").len() / 2;
    template.read_exact_at(&mut byte, middle).expect("read");
    template.write_all_at(&[byte[0] ^ 4], middle).expect("written");
    template.set_modified(written).expect("set");
    assert_boots(&test, "not those that were written");
}

#[test]
fn a_cache_that_takes_no_template_is_no_harm() {
    let templates = Templates::new();
    let test = templates.busybox("echo fine; exit 7");
    fs::create_dir(&templates.0).expect("directory");
    let mount = |options: &str| {
        let _ = Command::new("umount").arg(&templates.0).stderr(Stdio::null()).status();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&templates.0)
            .status();
        assert!(mount.expect("mount runs").success());
    };
    mount("size=4m,mode=700");
    let made: Output = test.command_of("template").output().expect("mote runs");
    let told = String::from_utf8_lossy(&made.stderr).into_owned();
    assert_eq!(made.status.code(), Some(1), "{told}");
    assert!(told.contains("No space left on device") && told.lines().count() == 1, "{told}");
    assert!(templates.files("new").is_empty() && templates.files("template").is_empty());
    assert_boots(&test, "has failed within the last hour");
    mount("ro,mode=700");
    let read_only = "cannot be written to";
    assert_boots(&test, read_only);
    let made = test.command_of("check").output().expect("mote runs");
    assert!(String::from_utf8_lossy(&made.stdout).contains(read_only), "{made:?}");
    let below = templates.0.join("not/there");
    let below =
        TestBox::busybox().shell("echo fine; exit 7").with_variable("MOTE_TEMPLATES", below);
    assert_boots(&below, read_only);
    let off = TestBox::busybox().shell("echo fine; exit 7").with_variable("MOTE_TEMPLATES", "off");
    assert_boots(&off, "MOTE_TEMPLATES is off");
}

#[test]
fn many_first_starts_make_one_template() {
    let templates = Templates::new();
    let boxes: Vec<TestBox> = (0..4).map(|_| templates.busybox("exit 7")).collect();
    let started: Vec<_> = boxes.iter().map(TestBox::start).collect();
    for started in started {
        assert_eq!(started.wait().code, 7);
    }
    eventually("makers end", || processes_with(&templates.0).is_empty());
    templates.only("template");
    assert_eq!((templates.files("new").len(), templates.files("failed").len()), (0, 0));
    assert_used(&boxes[0].run());
}

#[test]
fn a_maker_that_is_killed_leaves_nothing_that_is_used() {
    let templates = Templates::new();
    let test = templates.busybox("exit 7");
    // When it is at the file, at its first bytes, and late.
    let at_len = [0, 1 << 20, 8 << 20];
    for least in at_len {
        let mut maker =
            test.command_of("template").stdout(Stdio::null()).spawn().expect("mote runs");
        let is_there = || {
            let len = templates.files("new").first().and_then(|new| fs::metadata(new).ok());
            len.is_some_and(|new| new.len() >= least) || !templates.files("template").is_empty()
        };
        eventually("the maker writes", is_there);
        maker.kill().expect("killed");
        maker.wait().expect("waits");
        // Its child ends with it, or has ended already.
        eventually("its VM's process ends", || processes_with(&templates.0).is_empty());
    }
    assert_eq!(test.run().code, 7);
    eventually("the template is made", || !templates.files("template").is_empty());
    eventually("makers end", || processes_with(&templates.0).is_empty());
    assert_eq!(templates.files("new").len(), 0);
    let ran = test.run();
    assert_eq!(ran.code, 7);
    assert_used(&ran);
}

#[test]
fn another_mote_and_another_host_make_their_own() {
    let templates = Templates::new();
    let test = templates.busybox("echo fine; exit 7");
    let first = templates.make(&test);
    let copy = test.path("out/mote");
    fs::copy(mote(), &copy).expect("copied");
    // Its kernel says that it is another.
    let mut on_another_host = Command::new("setarch");
    on_another_host.arg("--uname-2.6").arg(mote());
    for (count, mut command) in [(2, Command::new(&copy)), (3, on_another_host)] {
        command
            .arg("--config")
            .arg(test.spec.to_string())
            .arg("--timeline")
            .arg(test.path("out/timeline.json"))
            .env("MOTE_TEMPLATES", &templates.0);
        let ran = test.run_by(&mut command);
        assert_eq!((ran.code, template_of(&ran)), (7, "there is none; it is being made"));
        eventually("the other's is made", || templates.files("template").len() == count);
    }
    // A name says nothing: the whole key is in the file.
    let others = templates.files("template").into_iter().filter(|file| *file != first);
    for other in others.collect::<Vec<_>>() {
        fs::rename(other, &first).expect("renamed");
        assert_boots(&test, "is for another key");
    }
}

#[test]
fn check_says_whether_a_start_would_use_one() {
    let templates = Templates::new();
    let test = templates.busybox("exit 7");
    let line = || {
        let output = test.command_of("check").output().expect("mote runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().find_map(|line| line.strip_prefix("template   ")).expect(&text).to_owned()
    };
    let place = templates.0.display().to_string();
    assert_eq!(line(), format!("none in {place} yet: the first start makes it"));
    templates.make(&test);
    assert!(line().starts_with(&format!("in {place}, ")), "{}", line());
}
