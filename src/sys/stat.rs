//! What the kernel says of other processes.

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

/// What the kernel says of a process (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
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
        let has_ended = matches!(fields.next()?, "Z" | "X");
        let flags = fields.nth(5)?.parse().ok()?;
        Some(Stat { has_ended, flags, start_time: fields.nth(12)?.parse().ok()? })
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
        let expected = Stat { has_ended: false, flags: 99, start_time: 123 };
        assert_eq!(stat("S"), Some(expected));
        assert_eq!(stat("Z").map(|stat| stat.has_ended), Some(true));
        assert_eq!(Stat::parse("7 (a) S 1"), None);
        assert_eq!(Stat::parse(""), None);
        assert!(start_time(std::process::id()).is_some());
        assert!(!is_kernel_thread(std::process::id()));
    }
}
