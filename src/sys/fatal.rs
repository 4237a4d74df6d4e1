//! Fatal signals: how mote catches them, and the few calls that their handler may make.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::OnceLock;
use std::time::Duration;

use super::check;

/// Why the kernel stops a thread for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fatal {
    /// A filter has refused the system call of this number.
    Refused(libc::c_int),
    /// There is no memory behind an address that is mapped (SIGBUS).
    MemoryGone,
    /// There is nothing at an address (SIGSEGV).
    BadAddress,
}

/// What to do about it before the process ends. Runs in a signal handler, in a thread that may make
/// hardly any system calls.
pub type FatalHandler = fn(Fatal) -> !;

static FATAL_HANDLER: OnceLock<FatalHandler> = OnceLock::new();

/// Makes fatal signals call `handler`. Must be called once, before there are other threads.
///
/// # Errors
/// Those of sigaction(2).
pub fn on_fatal(handler: FatalHandler) -> io::Result<()> {
    FATAL_HANDLER.get_or_init(|| handler);
    for signal in [libc::SIGSYS, libc::SIGBUS, libc::SIGSEGV] {
        // SAFETY: an all-zero sigaction is valid; `on_signal` has the signature that SA_SIGINFO needs,
        // takes no locks and does not return.
        unsafe {
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            // The thread's own stack may have overflowed: see `HandlerStack`.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            check(libc::sigaction(signal, &action, ptr::null_mut()))?;
        }
    }
    Ok(())
}

/// A stack for a thread's handlers of fatal signals. Without one, a thread whose own stack has overflowed ends the process
/// by SIGSEGV, without a word.
#[derive(Debug)]
pub struct HandlerStack(Box<[MaybeUninit<u8>]>);

impl HandlerStack {
    /// What a CPU's state takes when a signal comes is up to 11 KiB (AMX; Documentation/arch/x86/elf_auxvec.rst), and the
    /// handler formats a line.
    const LEN: usize = 64 << 10;

    /// Memory that nobody touches before the stack is needed.
    pub fn new() -> HandlerStack {
        HandlerStack(Box::new_uninit_slice(HandlerStack::LEN))
    }

    /// Has the calling thread use it, for as long as the process lives.
    ///
    /// # Errors
    /// Those of sigaltstack(2).
    pub fn take(self) -> io::Result<()> {
        let memory = Box::leak(self.0);
        let stack =
            libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() };
        // SAFETY: the memory is leaked, is as long as is said, and nobody else knows of it.
        check(unsafe { libc::sigaltstack(&stack, ptr::null_mut()) }).map(drop)
    }
}

impl Default for HandlerStack {
    fn default() -> HandlerStack {
        HandlerStack::new()
    }
}

/// `si_code` of a SIGSYS from seccomp (sigaction(2)).
const SYS_SECCOMP: libc::c_int = 1;

/// The start of a `siginfo_t` about a system call (include/uapi/asm-generic/siginfo.h).
#[repr(C)]
struct SystemCallInfo {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    number: libc::c_int,
    architecture: libc::c_uint,
}

extern "C" fn on_signal(
    signal: libc::c_int,
    info: *const libc::siginfo_t,
    _context: *const libc::c_void,
) {
    // SAFETY: the kernel passes an aligned siginfo_t, which is larger than this start of one.
    let info = unsafe { &*info.cast::<SystemCallInfo>() };
    let fatal = match signal {
        libc::SIGSYS if info.code == SYS_SECCOMP => Some(Fatal::Refused(info.number)),
        // Codes of the kernel are positive; others come from a process that sent the signal.
        libc::SIGBUS if info.code > 0 => Some(Fatal::MemoryGone),
        libc::SIGSEGV if info.code > 0 => Some(Fatal::BadAddress),
        _ => None,
    };
    match (FATAL_HANDLER.get(), fatal) {
        (Some(handler), Some(fatal)) => handler(fatal),
        // The code that a shell gives for this signal: the process can no longer end by the signal.
        _ => exit_now(128 + signal),
    }
}

/// Writes as many bytes as the descriptor takes at once, and drops the rest; a full pipe takes none.
/// For signal handlers.
pub fn write_once(fd: RawFd, bytes: &[u8]) {
    let mut ready = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: pointers and lengths describe `ready` and `bytes`; a number that is not open is refused.
    unsafe {
        if libc::poll(&mut ready, 1, 0) == 1 {
            libc::write(fd, bytes.as_ptr().cast(), bytes.len());
        }
    }
}

/// Waits. For signal handlers: poll is the only call for waiting that every thread may make.
pub fn wait(time: Duration) {
    let time_ms = libc::c_int::try_from(time.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: with a count of zero, poll does not use the pointer.
    unsafe { libc::poll(ptr::null_mut(), 0, time_ms) };
}

/// Ends the process at once: no destructor runs, nothing is flushed.
pub fn exit_now(code: libc::c_int) -> ! {
    // SAFETY: plain system call.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process;
    use std::hint::black_box;

    fn deeper(depth: u64) -> u64 {
        let frame = black_box([depth; 128]);
        if depth == u64::MAX { 0 } else { frame[0] ^ deeper(depth + 1) }
    }

    #[test]
    fn an_overflown_stack_calls_the_handler() {
        // SAFETY: the child only sets handlers, and ends in one.
        let pid = check(unsafe { libc::fork() }).expect("a child");
        if pid == 0 {
            let set = on_fatal(|fatal| exit_now(if fatal == Fatal::BadAddress { 42 } else { 1 }))
                .and_then(|()| HandlerStack::new().take());
            exit_now(if set.is_ok() { deeper(0) as libc::c_int } else { 2 });
        }
        let status = process::wait(pid as u32).expect("its end");
        assert_eq!(status.code(), Some(42), "{status}");
    }
}
