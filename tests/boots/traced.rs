//! ptrace(2): makes a thread of mote do a system call, and kills mote between two calls.
#![allow(unsafe_code, reason = "ptrace is not in std")]

use std::io;
use std::mem::zeroed;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::{null, null_mut};

/// Makes a thread that waits in a system call do this one instead.
pub fn call(tid: i32, number: i64, arguments: [u64; 3]) {
    request(libc::PTRACE_SEIZE, tid, null());
    request(libc::PTRACE_INTERRUPT, tid, null());
    wait(tid);
    let mut registers = registers(tid);
    // Back to the SYSCALL instruction, two bytes long, in which it waits.
    registers.rip -= 2;
    registers.rax = number as u64;
    registers.orig_rax = u64::MAX;
    [registers.rdi, registers.rsi, registers.rdx] = arguments;
    request(libc::PTRACE_SETREGS, tid, (&raw const registers).cast());
    request(libc::PTRACE_DETACH, tid, null());
}

/// Runs a program and kills it right after its first thread's system call of this index, counted from
/// its execve. If it is about to install a seccomp filter before that, kills it there and returns true.
pub fn confined_before(program: &mut Command, index: usize) -> bool {
    // SAFETY: the closure makes one system call, which takes no pointers.
    let traced = unsafe {
        program.pre_exec(|| {
            request(libc::PTRACE_TRACEME, 0, null());
            Ok(())
        })
    };
    let mut child = traced.spawn().expect("the program starts");
    let tid = child.id() as i32;
    let (mut signal, mut returned) = (wait(tid), 0);
    assert_eq!(signal, libc::SIGTRAP, "not at its execve");
    request(
        libc::PTRACE_SETOPTIONS,
        tid,
        (libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL) as *const _,
    );
    let mut inside = false;
    let confined = loop {
        // The program gets neither the trap of its execve nor the stops at its system calls.
        let passed_on = if matches!(signal, libc::SIGTRAP | CALL_STOP) { 0 } else { signal };
        request(libc::PTRACE_SYSCALL, tid, passed_on as usize as *const _);
        signal = wait(tid);
        if signal != CALL_STOP {
            continue;
        }
        inside = !inside;
        if inside && registers(tid).orig_rax == libc::SYS_seccomp as u64 {
            break true;
        }
        if !inside && returned == index {
            break false;
        }
        returned += usize::from(!inside);
    };
    child.kill().expect("killed");
    child.wait().expect("its end");
    confined
}

/// The signal of a stop at the entry to or the return from a system call (`PTRACE_O_TRACESYSGOOD`).
const CALL_STOP: i32 = libc::SIGTRAP | 0x80;

fn request(request: libc::c_uint, tid: i32, data: *const libc::c_void) {
    // SAFETY: the requests made here read or write one user_regs_struct at `data`, or no memory.
    let ret = unsafe { libc::ptrace(request, tid, null_mut::<libc::c_void>(), data) };
    assert!(ret >= 0, "ptrace {request}: {}", io::Error::last_os_error());
}

/// Waits until a thread stops, and returns the signal of that stop.
fn wait(tid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: the pointer is to a local.
    assert_eq!(unsafe { libc::waitpid(tid, &mut status, libc::__WALL) }, tid);
    assert!(libc::WIFSTOPPED(status), "it ended: {status:#x}");
    libc::WSTOPSIG(status)
}

fn registers(tid: i32) -> libc::user_regs_struct {
    // SAFETY: an all-zero structure of integers is valid.
    let mut registers: libc::user_regs_struct = unsafe { zeroed() };
    request(libc::PTRACE_GETREGS, tid, (&raw mut registers).cast());
    registers
}
