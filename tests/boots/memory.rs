//! A box's memory: the kernel sets most of it up as it is used (resources/kernel), which nobody is to notice.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::json;

use crate::client::shell;
use crate::common::{Finished, Started, TestBox, eventually};

/// Reads a value of /proc/meminfo, in MiB.
const FREE: &str = "mib() { awk -v name=$1: '$1 == name { print int($2 / 1024) }' /proc/meminfo; }";

fn with_memory(mib: u64, vcpus: u8, script: &str) -> Finished {
    TestBox::busybox()
        .with("memory_mib", json!(mib))
        .with("vcpus", json!(vcpus))
        .shell(&format!("{FREE}\n{script}"))
        .run()
}

#[test]
fn all_of_it_is_free_from_the_start_and_can_be_had_at_once() {
    for (mib, vcpus) in [(4096, 1), (4096, 2), (1024, 2)] {
        let most = mib * 7 / 8;
        let ran = with_memory(
            mib,
            vcpus,
            &format!(
                "before=$(mib MemFree) available=$(mib MemAvailable) total=$(mib MemTotal)
                dd if=/dev/zero of=/dev/null bs={most}M count=1 iflag=fullblock 2>/dev/null || echo failed
                # A processor keeps up to an eighth of what it frees for itself. What is being given back to the host is not
                # free, either, for a moment.
                until after=$(mib MemFree) && [ $after -gt $((before - total / 8 - 48)) ]; do :; done
                echo $before $available $after $total"
            ),
        );
        let what = format!("{mib} MiB, {vcpus} vCPUs: {} {}", ran.console, ran.stderr);
        let numbers: Vec<u64> =
            ran.console.split_whitespace().map(|word| word.parse().expect(&what)).collect();
        let [before, available, after, total] = numbers[..] else { panic!("{what}") };
        assert!(before > total - 48 && available > total - 128, "{what}");
        assert!(after < before + 48, "{what}");
    }
}

#[test]
fn a_program_that_wants_more_than_there_is_is_killed_only_then() {
    let ran = with_memory(
        1024,
        1,
        "echo 1 >/proc/sys/vm/overcommit_memory
        dd if=/dev/zero of=/dev/null bs=1200M count=1 iflag=fullblock 2>/dev/null
        echo $? && awk '$1 == \"oom_kill\" { print $2 }' /proc/vmstat
        dd if=/dev/zero of=/dev/null bs=850M count=1 iflag=fullblock 2>/dev/null && echo again",
    );
    // The kernel's message comes first: what the program had by then.
    let (killed, rest) = ran.console.split_once('\n').expect("lines");
    let had_kib = killed.split("anon-rss:").nth(1).and_then(|text| text.split("kB").next());
    let had_kib: u64 = had_kib.and_then(|number| number.parse().ok()).expect(killed);
    assert!(had_kib >> 10 > 900, "{killed}");
    assert_eq!(rest, "137\n1\nagain\n", "{}", ran.stderr);
}

#[test]
fn a_limit_of_a_cgroups_in_the_box_holds() {
    let ran = with_memory(
        4096,
        1,
        "exec 2>/dev/null; cd /sys/fs/cgroup && mkdir all small && echo 0 >all/cgroup.procs
        until echo +memory >cgroup.subtree_control; do :; done
        echo 64M >small/memory.max
        (echo 0 >small/cgroup.procs && exec dd if=/dev/zero of=/dev/null bs=80M count=1)
        echo $?
        (echo 0 >small/cgroup.procs && exec dd if=/dev/zero of=/dev/null bs=40M count=1)
        echo $? $(awk '$1 == \"oom_kill\" { print $2 }' small/memory.events)",
    );
    // After the kernel's message.
    assert!(ran.console.ends_with("\n137\n0 1\n"), "{} {}", ran.console, ran.stderr);
}

#[test]
fn who_looks_at_every_page_sees_those_that_are_not_set_up_as_none() {
    // One number for each page of RAM, and for none elsewhere; 1 << 20 is KPF_NOPAGE.
    let look = "cat /proc/kpagecount /proc/kpageflags /proc/kpagecgroup /proc/pagetypeinfo /proc/zoneinfo >/dev/null
        echo 1 >/proc/sys/vm/compact_memory";
    let ran = with_memory(
        4096,
        1,
        &format!(
            "{look}
            dd if=/dev/zero of=/dev/null bs=1500M count=1 iflag=fullblock 2>/dev/null
            {look}
            dd if=/dev/zero of=/dev/null bs=3500M count=1 iflag=fullblock 2>/dev/null
            {look}
            echo done"
        ),
    );
    assert_eq!(ran.console, "done\n", "{}", ran.stderr);
}

/// How many MiB the host holds for the guest's memory: what is in the file of that size that mote has open.
fn held_mib(started: &Started, memory_mib: u64) -> u64 {
    let open = fs::read_dir(format!("/proc/{}/fd", started.pid())).expect("a process").flatten();
    let files = open.filter_map(|fd| fs::metadata(fd.path()).ok());
    let ram = files
        .filter(|file| file.is_file() && file.len() == memory_mib << 20)
        .max_by_key(MetadataExt::blocks);
    ram.expect("the guest's memory").blocks() >> 11
}

#[test]
fn what_a_box_has_freed_goes_back_to_the_host() {
    const MIB: u64 = 1024;
    // Less than half of it, which a tmpfs may have.
    const FILE: u64 = 448;
    let (test, started) = TestBox::busybox().with("memory_mib", json!(MIB)).idle();
    let unused = held_mib(&started, MIB);
    // Twice: what was given back can be had again.
    for _ in 0..2 {
        let filled = format!(
            "dd if=/dev/zero of=/dev/shm/file bs=1M count={FILE} 2>/dev/null && echo filled"
        );
        assert_eq!(shell(&test, &filled), "filled\n");
        let full = held_mib(&started, MIB);
        assert!(full >= FILE && full < unused + FILE + 64, "{unused} MiB, then {full}");
        shell(&test, "rm /dev/shm/file");
        // All but what a processor keeps for itself.
        eventually("the host has it back", || held_mib(&started, MIB) < full - FILE + MIB / 8 + 32);
    }
    started.stop();
}

/// Whether a box has text of its kernel mapped from mote's file, which it would change in memory of its own only.
fn shares_text(pid: u32) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    maps.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let ends = fields[0].split_once('-').expect("a range");
        let [start, end] = [ends.0, ends.1].map(|end| u64::from_str_radix(end, 16).expect("hex"));
        // Of the program itself, nothing as long is writable.
        end - start >= 4 << 20 && fields[1] == "rw-p" && fields[4] != "0"
    })
}

#[test]
fn text_of_its_kernel_is_in_memory_of_all_boxes_unless_it_is_to_have_its_own() {
    for templates in ["off", "/dev/shm/mote-templates-of-tests"] {
        for own in ["", "1"] {
            let started = TestBox::streaming("echo ready; exec sleep 1000")
                .with_variable("MOTE_TEMPLATES", templates)
                .with_variable("MOTE_OWN_TEXT", own)
                .ready();
            assert_eq!(shares_text(started.pid()), own.is_empty(), "{templates} {own}");
        }
    }
}
