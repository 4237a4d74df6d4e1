//! What the kernel says of other processes.

use std::path::Path;

/// When a process started, in clock ticks since the host's start; `None` if it has ended, even if its parent has not
/// asked yet.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = Stat::of(pid)?;
    (!stat.has_ended).then_some(stat.start_time)
}

/// Whether this is the number of a thread of the kernel's own.
pub fn is_kernel_thread(pid: u32) -> bool {
    // include/linux/sched.h
    const PF_KTHREAD: u64 = 0x20_0000;
    Stat::of(pid).is_some_and(|stat| stat.flags & PF_KTHREAD != 0)
}

/// Whether a thread of a process runs or could run, as far as it is not this one.
pub fn is_at_work(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let number = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
    let this = std::fs::read_link("/proc/thread-self").ok().and_then(|link| number(&link));
    let numbers = threads.filter_map(|thread| number(&thread.ok()?.path()));
    numbers.filter(|thread| Some(*thread) != this).filter_map(Stat::of).any(|stat| stat.can_run)
}

/// What the kernel says of a process or thread (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    can_run: bool,
    has_ended: bool,
    flags: u64,
    start_time: u64,
}

impl Stat {
    fn of(pid: u32) -> Option<Stat> {
        Stat::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The second field is the program's name in parentheses, which may contain anything.
    fn parse(stat: &str) -> Option<Stat> {
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        // The third field, the ninth and the 22nd.
        let state = fields.next()?;
        let (can_run, has_ended) = (state == "R", matches!(state, "Z" | "X"));
        let flags = fields.nth(5)?.parse().ok()?;
        let start_time = fields.nth(12)?.parse().ok()?;
        Some(Stat { can_run, has_ended, flags, start_time })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_process_is_found_behind_any_name() {
        let stat = |state: &str| {
            Stat::parse(&format!("7 (a) b) {state} 0 0 0 0 0 99 {}123 5", "0 ".repeat(12)))
        };
        let expected = Stat { can_run: false, has_ended: false, flags: 99, start_time: 123 };
        assert_eq!(stat("S"), Some(expected));
        assert_eq!(stat("Z").map(|stat| stat.has_ended), Some(true));
        assert_eq!(Stat::parse("7 (a) S 1"), None);
        assert_eq!(Stat::parse(""), None);
        assert!(start_time(std::process::id()).is_some());
        assert!(!is_kernel_thread(std::process::id()));
        assert_eq!(stat("R").map(|stat| stat.can_run), Some(true));
    }

    #[test]
    fn work_is_others_work() {
        let asleep = std::process::Command::new("sleep").arg("600").spawn();
        let mut asleep = asleep.expect("starts");
        while is_at_work(asleep.id()) {}
        let mut busy = std::process::Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .expect("starts");
        while !is_at_work(busy.id()) {}
        for child in [&mut asleep, &mut busy] {
            child.kill().and_then(|()| child.wait()).expect("ends");
            assert!(!is_at_work(child.id()));
        }
    }
}
