//! What an agent can do before it knows its box, and how it goes on when it does.
//!
//! A VM that boots for its box has the box's configuration from the start, and goes on at once. One that boots to become a
//! template (`src/template` of the VMM) has none: it opens the door, where the VMM keeps its state. A VM that starts
//! from that state goes on behind the door, and finds its configuration in the mailbox. What happens before the door is
//! the same for both, and so is everything after [`get_ready`].
//!
//! Before the door nothing may use randomness, open a socket or read `boot_id`: all boxes of the template would have the
//! same. Behind it the kernel's generator gets fresh bytes of the host's, and the agent executes itself anew, which
//! renews what its process has from that generator: address layout, stack canary, the allocator's secret.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use mote_agent::instance;
use mote_agent::mailbox::{self, Letter};

use crate::sys::mailbox::Mailbox;
use crate::tsi::Loaded;
use crate::{mount, sys};

/// Connections, pipes and the like that the agent may have open.
const MAX_OPEN_FILES: u64 = 65_536;

/// Files and directories that the programs of one user may watch (inotify(7)), each for about a KiB. The
/// kernel's own limit is a hundredth of its memory, 8,192 in a box of 512 MiB, and editors, bundlers and
/// test runners that watch a tree ask for this one.
const MAX_INOTIFY_WATCHES: &str = "524288";

/// The part of what is free in small blocks that is left for what clearing takes itself.
const UNCLEARED: usize = 64;

/// The order of a block of free pages that is a huge page.
const HUGE_ORDER: usize = 9;

/// The argument with which the agent executes itself behind the door.
const RESUMED: &str = "resumed";

/// Where the kernel has a driver look at a device again (Documentation/ABI/testing/sysfs-bus-platform).
const BIND: &str = "/sys/bus/platform/drivers/virtio-mmio/bind";

/// What is ready for the box beforehand.
#[derive(Default)]
pub struct Ready {
    /// The programs that carry its connections, unless it needs others.
    pub programs: Option<Loaded>,
}

/// Returns when the box's configuration is there.
///
/// # Errors
/// A text that says what could not be done, to what, and why.
pub fn get_ready() -> Result<Ready, String> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().is_some_and(|argument| argument == RESUMED) {
        return Ok(Ready { programs: inherited_programs(arguments) });
    }
    mount::kernel_file_systems()?;
    sys::raise_open_file_limit(MAX_OPEN_FILES)
        .map_err(|e| format!("raise the limit on open files: {e}"))?;
    // A kernel of the user's own may be without it.
    let _ = fs::write("/proc/sys/fs/inotify/max_user_watches", MAX_INOTIFY_WATCHES);
    grant_tcp_memory();
    if Path::new(instance::PATH).exists() { Ok(Ready::default()) } else { become_box() }
}

/// Grants TCP more of the box's memory. Each byte of a connection through the agent counts twice, in the loopback's two
/// ends, and what Linux grants by itself, a sixteenth of the memory, is used up by 16 busy connections of a box of 256 MiB.
fn grant_tcp_memory() {
    const PATH: &str = "/proc/sys/net/ipv4/tcp_mem";
    const FACTOR: u64 = 4;
    let text = fs::read_to_string(PATH).unwrap_or_default();
    let pages = text.split_whitespace().filter_map(|pages| pages.parse::<u64>().ok());
    let more: Vec<String> = pages.map(|pages| (pages * FACTOR).to_string()).collect();
    // A kernel of the user's own may be without it.
    let _ = fs::write(PATH, more.join(" "));
}

/// `None` if there are none: the box loads its own then.
fn inherited_programs(numbers: impl Iterator<Item = String>) -> Option<Loaded> {
    let descriptors = numbers.map(|number| sys::mailbox::inherited(number.parse().ok()?).ok());
    Loaded::from_descriptors(descriptors.collect::<Option<_>>()?)
}

/// Waits at the door, and does not return unless it fails.
fn become_box() -> Result<Ready, String> {
    let programs = Loaded::usual()?;
    let mut mailbox =
        Mailbox::new().map_err(|e| format!("set pages aside for the mailbox: {e}"))?;
    clear_free_memory();
    // The VMM stops the VM in this call. There is no device: the call fails, in every VM that goes on from here.
    let _ = bind(mailbox::DOOR);
    let woken_ns = sys::monotonic_ns();
    let letter = Letter::read(mailbox.bytes());
    mailbox.wipe();
    let Letter { realtime_ns, seed, devices: (first, count), instance } =
        letter.ok_or("there is no letter in the mailbox")?;
    sys::mailbox::add_entropy(&seed)
        .map_err(|e| format!("give the kernel the host's randomness: {e}"))?;
    let awake_ns = sys::monotonic_ns().saturating_sub(woken_ns);
    sys::set_realtime(realtime_ns.saturating_add(awake_ns))
        .map_err(|e| format!("set the wall clock: {e}"))?;
    for number in first..first.saturating_add(count) {
        bind(number.into()).map_err(|e| format!("start virtio device {number}: {e}"))?;
    }
    let path = Path::new(instance::PATH);
    path.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| fs::write(path, instance))
        .map_err(|e| format!("write {}: {e}", instance::PATH))?;
    let mut again = Command::new("/init");
    again.arg(RESUMED);
    for descriptor in programs.descriptors() {
        sys::mailbox::keep_through_exec(&descriptor)
            .map_err(|e| format!("keep a BPF program: {e}"))?;
        again.arg(descriptor.as_raw_fd().to_string());
    }
    Err(format!("execute the agent anew: {}", again.exec()))
}

/// Overwrites what the boot has left in free memory. If it does not work, the template is larger.
fn clear_free_memory() {
    // Else what is given back would wait in lists of the CPU's, up to an eighth of the memory, and not count as free
    // (Documentation/admin-guide/sysctl/vm.rst).
    let lists = "/proc/sys/vm/percpu_pagelist_high_fraction";
    let _ = fs::write(lists, "1000000");
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let free =
        in_small_blocks(&read("/proc/buddyinfo")) + in_lists_of_cpus(&read("/proc/zoneinfo"));
    let _ = sys::mailbox::clear_free_memory(free - free / UNCLEARED);
    let _ = fs::write(lists, "0");
}

/// How much free memory, in bytes, is in blocks of less than 2 MiB, by /proc/buddyinfo, of which each line counts the blocks
/// of 1, 2, 4 … pages in one zone. The kernel takes from the smallest block that will do, so that in a larger one nothing
/// has ever been, but for an initramfs of more than that.
fn in_small_blocks(buddyinfo: &str) -> usize {
    let zones = buddyinfo.lines().filter_map(|line| line.split_once("zone"));
    let counts = zones.flat_map(|(_, zone)| zone.split_whitespace().skip(1).enumerate());
    let small = counts.filter(|(order, _)| *order < HUGE_ORDER);
    small.map(|(order, count)| count.parse().unwrap_or(0) * (mailbox::PAGE_LEN << order)).sum()
}

/// How much free memory, in bytes, CPUs have in lists of their own, by /proc/zoneinfo: mostly what was freed at the boot's end.
fn in_lists_of_cpus(zoneinfo: &str) -> usize {
    let counts = zoneinfo.lines().filter_map(|line| line.trim().strip_prefix("count:"));
    counts.map(|count| count.trim().parse().unwrap_or(0) * mailbox::PAGE_LEN).sum()
}

/// Has the driver of virtio-mmio look again at a register page, which the kernel has numbered in the order of its command
/// line.
///
/// # Errors
/// There is no device, or it does not start.
pub fn bind(number: usize) -> std::io::Result<()> {
    fs::write(BIND, format!("virtio-mmio.{number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_blocks_of_every_zone_count() {
        let buddyinfo = "Node 0, zone    DMA32      3      1      0\n\
                         Node 0, zone   Normal      0 0 2 0 0 0 0 0 0 1 1\n";
        assert_eq!(in_small_blocks(buddyinfo), (3 + 2 + 8) << 12);
        assert_eq!(in_small_blocks(""), 0);
    }

    #[test]
    fn lists_of_every_cpu_count() {
        let zoneinfo = "  pagesets\n    cpu: 0\n              count: 472\n              high:  972\n    \
                        cpu: 1\n              count: 3\n";
        assert_eq!(in_lists_of_cpus(zoneinfo), 475 << 12);
    }
}
