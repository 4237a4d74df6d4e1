//! What the host shows of a box's processes, in `/proc` for the most part.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::eventually;

/// Sends a signal.
pub fn kill(pid: u32, signal: i32) {
    let status = Command::new("kill").arg(format!("-{signal}")).arg(pid.to_string()).status();
    assert!(status.expect("kill runs").success());
}

/// Command lines of running processes that mention a path.
pub fn processes_with(path: &Path) -> Vec<String> {
    with_path(path).map(|(_, line)| line).collect()
}

/// The same, but for janitors.
pub fn processes_beside_janitors(path: &Path) -> Vec<String> {
    // One that ends meanwhile has no name.
    let others =
        with_path(path).filter(|(pid, _)| !["mote-janitor", ""].contains(&&*name_of(*pid)));
    others.map(|(_, line)| line).collect()
}

fn with_path(path: &Path) -> impl Iterator<Item = (u32, String)> {
    let path = path.to_str().expect("text").to_owned();
    pids()
        .filter_map(|pid| Some((pid, fs::read(format!("/proc/{pid}/cmdline")).ok()?)))
        .map(|(pid, bytes)| (pid, String::from_utf8_lossy(&bytes).replace('\0', " ")))
        .filter(move |(_, line)| line.contains(&path))
}

/// The numbers of all processes.
fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").expect("proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The numbers of a process's children.
pub fn children_of(pid: u32) -> Vec<u32> {
    let line = format!("\nPPid:\t{pid}\n");
    let status = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    pids().filter(|pid| status(pid).contains(&line)).collect()
}

/// The name of a process; empty when it has ended.
pub fn name_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// The number of a mote's janitor.
pub fn janitor_of(pid: u32) -> Option<u32> {
    children_of(pid).into_iter().find(|pid| name_of(*pid) == "mote-janitor")
}

/// A process's descriptors, and what they are.
pub fn descriptors_of(pid: u32) -> Vec<(i32, String)> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process").flatten();
    fds.filter_map(|fd| {
        let what = fs::read_link(fd.path()).ok()?.display().to_string();
        Some((fd.file_name().to_str()?.parse().ok()?, what))
    })
    .collect()
}

/// The numbers of the virtiofsd processes that serve a directory.
pub fn virtiofsd_of(path: &Path) -> Vec<u32> {
    let path = path.to_str().expect("text").to_owned();
    pids()
        .filter(|pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|bytes| {
                let line = String::from_utf8_lossy(&bytes).replace('\0', " ");
                line.contains("virtiofsd") && line.contains(&path) && !line.contains("--config")
            })
        })
        .collect()
}

/// The number of the one virtiofsd that serves a directory, once it can: on a single CPU it gets ready when the guest asks
/// for something, or a moment after the entrypoint's start, and is confined then.
pub fn ready_virtiofsd_of(path: &Path) -> u32 {
    let threads = |pid| fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    let ready = || match virtiofsd_of(path)[..] {
        [pid] if threads(pid) > 1 => Some(pid),
        _ => None,
    };
    eventually(&format!("a virtiofsd serves {}", path.display()), || ready().is_some());
    ready().expect("it does not end")
}

/// Memory of a process's own, in KiB: guest memory is shared memory and does not count. A process that
/// has ended and has not been waited for has none.
pub fn own_memory_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let Some(line) = status.lines().find(|line| line.starts_with("RssAnon:")) else { return 0 };
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

/// Whether a process is stopped.
pub fn is_frozen(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T"))
}

/// Whether a process has the thread of a vCPU.
pub fn has_vcpu(pid: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .any(|name| name.trim_end() == "vcpu0")
}
