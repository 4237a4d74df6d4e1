//! The spec's `resource_limits`: those on the host for mote and its back-ends, and those in the guest.

use std::fs;
use std::ops::RangeInclusive;

use mote_agent::instance::Rlimit;

use super::guest_init::GuestInit;
use crate::cgroup::{Cgroup, Limit};
use crate::cpuset::CpuSet;
use crate::layout;
use crate::spec::json::Report;
use crate::spec::{ResourceLimits, Spec};

/// The host CPUs to run on; `None` means all that mote may use.
pub(super) fn plan_cpus(spec: &Spec, report: &mut Report) -> Option<CpuSet> {
    let text = spec.resource_limits.cpuset_cpus.as_deref()?;
    let planned = CpuSet::parse(text).and_then(|cpus| {
        let available = CpuSet::available().map_err(|error| format!("{error:#}"))?;
        match cpus.first_missing(&available) {
            None => Ok(cpus),
            Some(cpu) => Err(format!(
                "has the CPU {cpu}, which is offline or not allowed to this process; available are {available}"
            )),
        }
    });
    planned.map_err(|problem| report.error("resource_limits.cpuset_cpus", problem)).ok()
}

/// Quotas that the kernel accepts in `cpu.max`, in microseconds (kernel/sched/core.c,
/// `tg_set_cfs_bandwidth`).
const CPU_QUOTA_US: RangeInclusive<i64> = 1_000..=(1 << 44) - 1;

const CPU_PERIOD_US: RangeInclusive<u64> = 1_000..=1_000_000;

/// The default of the kernel and of the contract.
const DEFAULT_CPU_PERIOD_US: u64 = 100_000;

/// Variable by which the runtime of 3.x tells the image's guest init of a limit, which that enforces in the guest
/// (contract §2.10).
fn init_variable(limit: &Limit) -> &'static str {
    match limit {
        Limit::CpuWeight(_) => "A3S_SEC_CPU_SHARES",
        Limit::CpuMax { .. } => "A3S_SEC_CPU_QUOTA",
        Limit::MemoryLow(_) => "A3S_SEC_MEM_LOW",
        Limit::MemorySwapMax(_) => "A3S_SEC_MEM_SWAP",
    }
}

/// The cgroup that enforces the limits on the host; `None` when there are none. `init` says whether the image's own
/// guest init runs.
pub(super) fn plan_cgroup(spec: &Spec, init: &GuestInit, report: &mut Report) -> Option<Cgroup> {
    let limits = &spec.resource_limits;
    // As the runtime has it, and container engines.
    let cpu_quota = limits.cpu_quota.filter(|us| *us != 0);
    if let Some(quota) = cpu_quota.filter(|us| *us >= 0 && !CPU_QUOTA_US.contains(us)) {
        report.error(
            "resource_limits.cpu_quota",
            format!(
                "is {quota} microseconds, must be from {} to {}, or 0 or -1 for no limit",
                CPU_QUOTA_US.start(),
                CPU_QUOTA_US.end()
            ),
        );
    }
    if let Some(period) = limits.cpu_period.filter(|us| !CPU_PERIOD_US.contains(us)) {
        report.error(
            "resource_limits.cpu_period",
            format!(
                "is {period} microseconds, must be from {} to {}",
                CPU_PERIOD_US.start(),
                CPU_PERIOD_US.end()
            ),
        );
    }
    let cpu_max = (cpu_quota.is_some() || limits.cpu_period.is_some()).then(|| {
        let quota_us = cpu_quota.and_then(unless_negative);
        Limit::CpuMax { quota_us, period_us: limits.cpu_period.unwrap_or(DEFAULT_CPU_PERIOD_US) }
    });
    let planned: Vec<Limit> = [
        limits.cpu_shares.map(Limit::from_shares),
        cpu_max,
        limits.memory_reservation.map(Limit::MemoryLow),
        limits.memory_swap.map(|bytes| Limit::MemorySwapMax(unless_negative(bytes))),
    ]
    .into_iter()
    .flatten()
    .collect();
    if planned.is_empty() {
        return None;
    }
    let told = |limit: &Limit| spec.entrypoint.variable(init_variable(limit)).is_some();
    let others_do = init.image_init && planned.iter().all(|limit| told(limit) || limit.is_none());
    Cgroup::new(&spec.box_id, planned, others_do)
        .map_err(|problem| report.error("box_id", problem))
        .ok()
}

/// A limit for which every negative value means no limit.
fn unless_negative(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok()
}

/// Names of `ulimits` and their resources (contract §1.4; `as` is not one of them).
pub(super) const ULIMITS: [(&str, u32); 15] = [
    ("cpu", libc::RLIMIT_CPU),
    ("fsize", libc::RLIMIT_FSIZE),
    ("data", libc::RLIMIT_DATA),
    ("stack", libc::RLIMIT_STACK),
    ("core", libc::RLIMIT_CORE),
    ("rss", libc::RLIMIT_RSS),
    ("nproc", libc::RLIMIT_NPROC),
    ("nofile", libc::RLIMIT_NOFILE),
    ("memlock", libc::RLIMIT_MEMLOCK),
    ("locks", libc::RLIMIT_LOCKS),
    ("sigpending", libc::RLIMIT_SIGPENDING),
    ("msgqueue", libc::RLIMIT_MSGQUEUE),
    ("nice", libc::RLIMIT_NICE),
    ("rtprio", libc::RLIMIT_RTPRIO),
    ("rttime", libc::RLIMIT_RTTIME),
];

/// The limits of the entrypoint, in the order in which they are set: a later one replaces an earlier.
pub(super) fn plan_rlimits(limits: &ResourceLimits, report: &mut Report) -> Vec<Rlimit> {
    // Contract §1.4: always set, in this order, before the spec's own.
    let (soft, hard) = limits.pids_limit.map_or((4096, 8192), |limit| (limit, limit));
    let mut rlimits = vec![
        Rlimit { resource: libc::RLIMIT_NOFILE, soft: 1 << 20, hard: 1 << 20 },
        Rlimit { resource: libc::RLIMIT_NPROC, soft, hard },
    ];
    for (index, text) in limits.ulimits.iter().enumerate() {
        match parse_ulimit(text) {
            Ok(rlimit) => rlimits.push(rlimit),
            Err(problem) => report.error(format!("resource_limits.ulimits[{index}]"), problem),
        }
    }
    rlimits
}

fn parse_ulimit(text: &str) -> Result<Rlimit, String> {
    let wanted = "must be NAME=SOFT:HARD or NAME=LIMIT, each a number, -1 or unlimited";
    let (name, limits) = text.split_once('=').ok_or_else(|| format!("is \"{text}\", {wanted}"))?;
    let known = ULIMITS.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
    let (_, resource) = known.ok_or_else(|| {
        let names: Vec<&str> = ULIMITS.iter().map(|(name, _)| *name).collect();
        format!("\"{name}\" is not a limit; known are {}", names.join(", "))
    })?;
    let limit = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        text => text.parse().map_err(|_| format!("is \"{name}={limits}\", {wanted}")),
    };
    let (soft, hard) = match limits.split_once(':') {
        Some((soft, hard)) => (limit(soft)?, limit(hard)?),
        None => (limit(limits)?, limit(limits)?),
    };
    if soft > hard {
        return Err(format!("is \"{text}\", but the soft limit must not exceed the hard limit"));
    }
    Ok(Rlimit { resource: *resource, soft, hard })
}

/// A limit, as a spec writes it.
pub(super) fn limit_text(limit: u64) -> String {
    if limit == u64::MAX { "unlimited".into() } else { limit.to_string() }
}

/// Smallest guest memory in which kernel, agent and a small program fit.
const MIN_MEMORY_MIB: u32 = 64;

/// Checks how many vCPUs and how much memory there are to be.
pub(super) fn check_size(spec: &Spec, report: &mut Report) {
    let max = layout::MAX_VCPUS;
    if !(1..=max).contains(&spec.vcpus) {
        report.error("vcpus", format!("is {}, must be from 1 to {max}", spec.vcpus));
    }
    let mib = spec.memory_mib;
    if mib < MIN_MEMORY_MIB {
        report.error("memory_mib", format!("is {mib}, must be at least {MIN_MEMORY_MIB}"));
    } else if let Some(host_mib) = host_memory_mib().filter(|host| u64::from(mib) > *host) {
        report.error("memory_mib", format!("is {mib}, but this host has {host_mib} MiB of memory"));
    }
}

/// `MemTotal` of proc(5); `None` if it cannot be read.
fn host_memory_mib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing::{errors, plan};

    #[test]
    fn ulimits_follow_the_defaults() {
        let limits = |text: &str| plan(|s| s.resource_limits.ulimits = vec![text.into()]);
        for (text, soft, hard) in [
            ("NoFile=10:20", 10, 20),
            ("nofile=5", 5, 5),
            ("nofile=-1:unlimited", u64::MAX, u64::MAX),
        ] {
            let plan = limits(text).expect(text);
            assert_eq!(
                plan.instance.rlimits[2],
                Rlimit { resource: libc::RLIMIT_NOFILE, soft, hard }
            );
        }
        for text in ["nofile", "as=1:1", "nofile=x", "nofile=2:1", "nofile=1:2:3"] {
            let errors = limits(text).expect_err(text);
            assert!(errors[0].starts_with("resource_limits.ulimits[0]: "), "{errors:?}");
        }
    }

    #[test]
    fn cpus_are_checked_against_the_host() {
        let cpus = |text: &str| plan(|s| s.resource_limits.cpuset_cpus = Some(text.into()));
        let available = CpuSet::available().expect("affinity");
        let all = cpus(&available.to_string()).expect("a plan");
        assert!(all.to_string().contains(&format!("\nhost cpus  {available}\n")), "{all}");
        for (text, problem) in [
            ("", "is \"\", must be a list of CPUs like \"0-3,6\"".into()),
            (
                "0-1023",
                format!(
                    "which is offline or not allowed to this process; available are {available}"
                ),
            ),
        ] {
            let errors = cpus(text).expect_err(text);
            assert!(errors[0].starts_with("resource_limits.cpuset_cpus: "), "{errors:?}");
            assert!(errors[0].ends_with(&problem), "{errors:?}");
        }
    }

    #[test]
    fn limits_that_the_images_init_enforces_are_dispensable_on_the_host() {
        let dispensable = |executable: &str, quota, variables: &[&str]| {
            let plan = plan(|s| {
                s.entrypoint.executable = executable.into();
                s.entrypoint.env =
                    variables.iter().map(|name| (name.to_string(), "50000".into())).collect();
                s.resource_limits.cpu_quota = quota;
                s.resource_limits.cpu_shares = Some(2);
            });
            plan.expect("a plan").cgroup.expect("a cgroup").is_dispensable()
        };
        let told = ["BOX_EXEC_EXEC", "A3S_SEC_CPU_SHARES", "A3S_SEC_CPU_QUOTA"];
        assert!(dispensable("/bin/sh", Some(50_000), &told));
        // Nobody is told to limit what has no limit.
        assert!(dispensable("/bin/sh", Some(-1), &told[..2]));
        assert!(!dispensable("/bin/sh", Some(50_000), &told[..2]));
        assert!(!dispensable("/bin/sh", Some(50_000), &told[1..]));
        assert!(!dispensable("/no/such/init", Some(50_000), &told));
    }

    #[test]
    fn cgroup_limits_are_judged() {
        let shown = |change: fn(&mut ResourceLimits)| {
            let plan = plan(|s| change(&mut s.resource_limits)).expect("a plan");
            plan.cgroup.map(|cgroup| cgroup.to_string())
        };
        assert_eq!(shown(|_| ()), None);
        assert_eq!(
            shown(|l| {
                (l.cpu_shares, l.cpu_quota) = (Some(0), Some(50_000));
                (l.memory_reservation, l.memory_swap) = (Some(1 << 20), Some(-5));
            })
            .expect("a cgroup"),
            "/sys/fs/cgroup/a3s-box/b, cpu.weight = 1, cpu.max = 50000 100000, memory.low = 1048576, memory.swap.max = max"
        );
        for (quota, period, expected) in [
            (Some(-1), None, "cpu.max = max 100000"),
            (None, Some(1_000), "cpu.max = max 1000"),
            (Some(1_000), Some(1_000_000), "cpu.max = 1000 1000000"),
        ] {
            let limited = |s: &mut Spec| {
                (s.resource_limits.cpu_quota, s.resource_limits.cpu_period) = (quota, period);
            };
            let cgroup = plan(limited).expect("a plan").cgroup.expect("a cgroup");
            assert!(cgroup.to_string().ends_with(expected), "{cgroup}");
        }
        for (quota, period, field) in [
            (Some(999), None, "quota: is 999 microseconds, must be from 1000 to "),
            (Some(1 << 44), None, "quota: is 17592186044416 "),
            (None, Some(999), "period: is 999 microseconds, must be from 1000 to 1000000"),
            (None, Some(1_000_001), "period: is 1000001 "),
        ] {
            let errors = errors(|s| {
                (s.resource_limits.cpu_quota, s.resource_limits.cpu_period) = (quota, period);
            });
            assert!(errors[0].starts_with(&format!("resource_limits.cpu_{field}")), "{errors:?}");
        }
        let errors = errors(|s| {
            s.box_id = "../b".into();
            s.resource_limits.memory_swap = Some(0);
        });
        assert!(errors[0].starts_with("box_id: is \"../b\", but with limits"), "{errors:?}");
        assert!(plan(|s| s.box_id = "../b".into()).is_ok(), "a name only matters with limits");
    }
}
