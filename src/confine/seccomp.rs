//! Which system calls mote may make while it runs a guest: a filter for each kind of thread. The build
//! script compiles the filters from `resources/seccomp/*.json`, where every rule has its reason.
//!
//! A call that a filter does not allow ends the process: the kernel refuses it and raises SIGSYS,
//! whose handler ([`super::sudden_end`]) writes one line and exits. If a filter refuses the handler's
//! own calls, or the signal is blocked, the kernel kills the process.

use anyhow::{Context, Result};
use seccompiler::{BpfProgram, sock_filter};

use super::sudden_end;

/// What mote itself uses of the host's network while it runs the guest, beside sockets opened before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkAccess {
    /// It makes the guest's connections: the box has no network of its own.
    pub connects: bool,
    /// It sends to the clients of published UDP ports.
    pub answers: bool,
    /// It uses neither, and yet stays in its network namespace, for those who join that by its process.
    pub stays: bool,
}

impl NetworkAccess {
    /// It uses nothing.
    pub const NONE: NetworkAccess = NetworkAccess { connects: false, answers: false, stays: false };
}

/// A kind of thread, by what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Serves devices and sockets.
    Main(NetworkAccess),
    /// Runs one vCPU.
    Vcpu,
    /// Writes one stream of the guest's output.
    Output,
    /// Reads the guest's input.
    Input,
    /// The only thread of the process that writes logs.
    Logs,
    /// The only thread of the process that exchanges frames with other boxes.
    Switch,
    /// All threads of the process that serves a share.
    Virtiofsd,
    /// All threads of the process whose VM becomes a template.
    Maker,
    /// The only thread of the process that becomes several of these: it may also confine them.
    VirtiofsdStarter,
    /// What the starter's copies are refused beside: together with its filter, all but what [`ThreadKind::Virtiofsd`] may.
    VirtiofsdStarted,
}

impl ThreadKind {
    fn program(self) -> BpfProgram {
        let bytes: &[u8] = match self {
            ThreadKind::Main(NetworkAccess { connects: false, answers: false, .. }) => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/main.bpf"))
            }
            ThreadKind::Main(NetworkAccess { connects: true, answers: false, .. }) => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/main-outgoing.bpf"))
            }
            ThreadKind::Main(NetworkAccess { connects: false, answers: true, .. }) => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/main-answers.bpf"))
            }
            ThreadKind::Main(NetworkAccess { connects: true, answers: true, .. }) => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/main-outgoing-answers.bpf"))
            }
            ThreadKind::Vcpu => include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/vcpu.bpf")),
            ThreadKind::Output => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/output.bpf"))
            }
            ThreadKind::Input => include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/input.bpf")),
            ThreadKind::Logs => include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/logs.bpf")),
            ThreadKind::Switch => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/switch.bpf"))
            }
            ThreadKind::Virtiofsd => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/virtiofsd.bpf"))
            }
            ThreadKind::Maker => include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/maker.bpf")),
            ThreadKind::VirtiofsdStarter => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/virtiofsd-starter.bpf"))
            }
            ThreadKind::VirtiofsdStarted => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/virtiofsd-started.bpf"))
            }
        };
        // `struct sock_filter` (include/uapi/linux/filter.h), as the build script wrote it.
        let instructions = bytes.as_chunks::<8>().0.iter();
        instructions
            .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| sock_filter {
                code: u16::from_le_bytes([c0, c1]),
                jt,
                jf,
                k: u32::from_le_bytes([k0, k1, k2, k3]),
            })
            .collect()
    }
}

/// Limits the calling thread, for good, to the system calls of its kind.
///
/// # Errors
/// The host refuses the filter.
pub fn confine_thread(name: &str, kind: ThreadKind) -> Result<()> {
    sudden_end::name_thread(name);
    seccompiler::apply_filter(&kind.program())
        .with_context(|| format!("limit the system calls of thread {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn main_that(connects: bool, answers: bool) -> ThreadKind {
        ThreadKind::Main(NetworkAccess { connects, answers, stays: false })
    }

    #[test]
    fn every_kind_has_a_program_that_ends_in_a_verdict() {
        // BPF_RET | BPF_K (include/uapi/linux/bpf_common.h).
        const RETURN: u16 = 0x06;
        let accesses = [(false, false), (false, true), (true, false), (true, true)];
        let mains = accesses.map(|(connects, answers)| main_that(connects, answers));
        let helpers =
            [ThreadKind::Logs, ThreadKind::Switch, ThreadKind::Virtiofsd, ThreadKind::Maker];
        let starters = [ThreadKind::VirtiofsdStarter, ThreadKind::VirtiofsdStarted];
        let helpers = helpers.into_iter().chain(starters);
        let others =
            [ThreadKind::Vcpu, ThreadKind::Output, ThreadKind::Input].into_iter().chain(helpers);
        for kind in mains.into_iter().chain(others) {
            let program = kind.program();
            assert_eq!(program.last().map(|last| last.code), Some(RETURN), "{kind:?}");
        }
    }

    #[test]
    fn a_box_with_a_network_of_its_own_may_do_less() {
        let len = |connects, answers| main_that(connects, answers).program().len();
        assert!(len(false, false) < len(false, true));
        assert!(len(false, true) < len(true, false));
        assert!(len(true, false) < len(true, true));
    }
}
