//! Which system calls mote may make once it runs a guest: a filter per kind of thread, compiled when
//! mote is built from `resources/seccomp/*.json`, where every rule has its reason.
//!
//! Whatever a filter does not name ends the process: the kernel refuses the call and raises SIGSYS,
//! whose handler writes one line and exits with [`outcome::BROKEN`]. Should a filter refuse the
//! handler its own calls, or the signal be blocked, the kernel kills the process.

use std::cell::Cell;
use std::fmt::Write;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result};
use seccompiler::{BpfProgram, sock_filter};
use syscalls::Sysno;

use crate::outcome;
use crate::sys::confine;

/// A kind of thread, by what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Serves devices and sockets.
    Main {
        /// Whether it makes the guest's connections with sockets of the host.
        outgoing: bool,
    },
    /// Runs one vCPU.
    Vcpu,
    /// Writes one stream of the guest's output.
    Output,
}

impl ThreadKind {
    fn program(self) -> BpfProgram {
        let bytes: &[u8] = match self {
            ThreadKind::Main { outgoing: false } => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/main.bpf"))
            }
            ThreadKind::Main { outgoing: true } => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/main-outgoing.bpf"))
            }
            ThreadKind::Vcpu => include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/vcpu.bpf")),
            ThreadKind::Output => {
                include_bytes!(concat!(env!("MOTE_BUILT_FILTERS"), "/output.bpf"))
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

/// Longest name of a thread that is reported whole.
const MAX_NAME: usize = 15;

thread_local! {
    /// What the calling thread is called in a report. Without a destructor, so that a signal handler
    /// may look at it.
    static NAME: Cell<[u8; MAX_NAME]> = const { Cell::new([b'?'; MAX_NAME]) };
}

/// Where a refused call is reported besides stderr; -1 for nowhere.
static OUTCOME_FILE: AtomicI32 = AtomicI32::new(-1);

/// Prepares the process for filters: what they refuse is reported on stderr, and to this descriptor
/// if there is one, which must stay open. To be called before there are threads.
pub fn report_refused_calls(outcome_file: Option<RawFd>) -> Result<()> {
    OUTCOME_FILE.store(outcome_file.unwrap_or(-1), Ordering::Relaxed);
    confine::on_refused_system_call(refused).context("watch for refused system calls")
}

/// Limits the calling thread, for good, to the system calls of its kind.
pub fn confine_thread(name: &str, kind: ThreadKind) -> Result<()> {
    let mut short = [b' '; MAX_NAME];
    for (to, from) in short.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    NAME.set(short);
    seccompiler::apply_filter(&kind.program())
        .with_context(|| format!("limit the system calls of thread {name}"))
}

/// Text on the stack: nothing is allocated in a signal handler.
struct Text {
    bytes: [u8; 512],
    len: usize,
}

impl Text {
    fn new() -> Self {
        Text { bytes: [0; 512], len: 0 }
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = self.bytes.get_mut(self.len..self.len + text.len()).ok_or(std::fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}

fn refused(number: libc::c_int) -> ! {
    let name = NAME.get();
    let name = std::str::from_utf8(&name).unwrap_or("?").trim_end();
    let call =
        usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
    let mut message = Text::new();
    // What does not fit, which cannot be, is cut.
    let _ = write!(
        message,
        "thread {name} made the system call {call} ({number}), which mote never makes; ended the box at once: either mote has been broken into, or this is a bug to report"
    );
    let message = std::str::from_utf8(message.as_bytes()).unwrap_or(call);
    let mut line = Text::new();
    let _ = writeln!(line, "mote: {message}");
    confine::write_once(libc::STDERR_FILENO, line.as_bytes());
    let file = OUTCOME_FILE.load(Ordering::Relaxed);
    if file >= 0 {
        let mut object = Text::new();
        // Names and message need no escapes.
        let code = outcome::BROKEN;
        let _ = writeln!(
            object,
            "{{\"kind\":\"refused\",\"exit_code\":{code},\"message\":\"{message}\"}}"
        );
        confine::write_once(file, object.as_bytes());
    }
    confine::exit_now(outcome::BROKEN.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_program_that_ends_in_a_verdict() {
        // BPF_RET | BPF_K (include/uapi/linux/bpf_common.h).
        const RETURN: u16 = 0x06;
        for kind in [
            ThreadKind::Main { outgoing: false },
            ThreadKind::Main { outgoing: true },
            ThreadKind::Vcpu,
            ThreadKind::Output,
        ] {
            let program = kind.program();
            assert_eq!(program.last().map(|last| last.code), Some(RETURN), "{kind:?}");
        }
    }

    #[test]
    fn a_box_with_a_network_of_its_own_may_do_less() {
        let [own, hosts] = [false, true].map(|outgoing| ThreadKind::Main { outgoing }.program());
        assert!(own.len() < hosts.len());
    }
}
