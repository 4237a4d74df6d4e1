//! The host CPUs that a box may use: the list of `resource_limits.cpuset_cpus`, and its effect on
//! this process.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, Result, bail};

use crate::sys;

/// Numbers of host CPUs, each below [`sys::process::MAX_CPUS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuSet(BTreeSet<u16>);

impl CpuSet {
    /// Reads a list like `0-3,6` (contract §1.4); the error says what it must be.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<CpuSet, String> {
        let malformed = || format!("is \"{text}\", must be a list of CPUs like \"0-3,6\"");
        let number = |text: &str| {
            if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(malformed());
            }
            text.parse().ok().filter(|cpu| *cpu < sys::process::MAX_CPUS).ok_or_else(|| {
                format!("has the CPU {text}, must have CPUs below {}", sys::process::MAX_CPUS)
            })
        };
        let mut cpus = BTreeSet::new();
        for item in text.split(',').map(str::trim) {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let (first, last): (u16, u16) = (number(first)?, number(last)?);
            if first > last {
                return Err(malformed());
            }
            cpus.extend(first..=last);
        }
        Ok(CpuSet(cpus))
    }

    /// The online CPUs that this process may run on.
    ///
    /// # Errors
    /// The host refuses to say.
    pub fn available() -> Result<CpuSet> {
        sys::process::cpu_affinity()
            .map(CpuSet)
            .context("ask for the CPUs that this process may run on")
    }

    /// The first CPU of this set that is not in the other.
    pub fn first_missing(&self, available: &CpuSet) -> Option<u16> {
        self.0.difference(&available.0).next().copied()
    }

    /// Binds the calling thread, and all threads and processes that it will start, to these CPUs.
    ///
    /// # Errors
    /// The host refuses these CPUs.
    pub fn bind(&self) -> Result<()> {
        sys::process::set_cpu_affinity(&self.0).with_context(|| {
            format!("bind mote to the CPUs {self} (change resource_limits.cpuset_cpus)")
        })?;
        // The kernel silently leaves out CPUs that a cpuset cgroup does not allow.
        let effective = CpuSet::available()?;
        if effective != *self {
            bail!(
                "bind mote to the CPUs {self}: the kernel allowed only {effective}; change resource_limits.cpuset_cpus or the cpuset of mote's cgroup"
            );
        }
        Ok(())
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = left.next() {
            let mut last = first;
            while let Some(next) = left.next_if_eq(&(last + 1)) {
                last = next;
            }
            write!(f, "{separator}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_follow_the_contract() {
        for (text, shown) in [
            ("0", "0"),
            ("0-3,6", "0-3,6"),
            (" 7 , 1-2 ", "1-2,7"),
            ("3,2,1,1-1", "1-3"),
            ("1023", "1023"),
            ("0-1023", "0-1023"),
        ] {
            assert_eq!(CpuSet::parse(text).expect(text).to_string(), shown);
        }
        for text in ["", " ", ",", "0,", "a", "-1", "1-", "3-2", "0-1-2", "0 - 1", "+1", "0x1"] {
            let error = CpuSet::parse(text).expect_err(text);
            assert_eq!(
                error,
                format!("is \"{text}\", must be a list of CPUs like \"0-3,6\""),
                "{text}"
            );
        }
        for text in ["1024", "0-1024", "99999999999999999999"] {
            let error = CpuSet::parse(text).expect_err(text);
            assert!(error.ends_with("must have CPUs below 1024"), "{error}");
        }
    }

    #[test]
    fn a_thread_can_be_bound() {
        // Affinity is a thread's own: other tests do not notice.
        std::thread::spawn(|| {
            let available = CpuSet::available().expect("affinity");
            let first = CpuSet(available.0.iter().take(1).copied().collect());
            first.bind().expect("bound");
            assert_eq!(CpuSet::available().expect("affinity"), first);
            assert_eq!(first.first_missing(&available), None);
            if available != first {
                assert!(available.first_missing(&first).is_some());
            }
        })
        .join()
        .expect("no panic");
    }
}
