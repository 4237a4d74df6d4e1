//! What the programs of a box give up: `A3S_SEC_*` (contract §2.10, §7.2 step 8), where mote's agent is the init.

use mote_agent::instance::Security;

use super::variables::Variables;
use crate::spec::json::Report;

/// Capabilities by number, without `CAP_` (linux/capability.h).
pub const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Reads `A3S_SEC_*`. A capability that is both dropped and added is kept; the reference's init
/// ignores what is added.
pub(super) fn plan(vars: &Variables<'_>, report: &mut Report) -> Security {
    if vars.value("A3S_SEC_PRIVILEGED") == Some("1") {
        return Security::default();
    }
    let mut complain = |name: &str, problem: String| vars.complain(name, &problem, report);
    let seccomp = match vars.value("A3S_SEC_SECCOMP") {
        Some("default") => true,
        None | Some("" | "unconfined") => false,
        Some(other) => {
            complain("A3S_SEC_SECCOMP", format!("is \"{other}\", must be default or unconfined"));
            false
        }
    };
    let mut capabilities = |name: &str| {
        let mut numbers = Vec::new();
        let words = vars.value(name).unwrap_or("").split(',').map(str::trim);
        for word in words.filter(|word| !word.is_empty()) {
            let word = word.to_ascii_uppercase();
            match CAPABILITIES.iter().position(|known| *known == word) {
                Some(number) => numbers.push(number as u32),
                None if word == "ALL" => numbers.extend(0..CAPABILITIES.len() as u32),
                None => complain(name, format!("has \"{word}\", which is no capability")),
            }
        }
        numbers
    };
    let added = capabilities("A3S_SEC_CAP_ADD");
    let mut drop_capabilities = capabilities("A3S_SEC_CAP_DROP");
    drop_capabilities.retain(|number| !added.contains(number));
    let no_new_privs = vars.value("A3S_SEC_NO_NEW_PRIVS") != Some("0");
    Security { no_new_privs, seccomp, drop_capabilities }
}
