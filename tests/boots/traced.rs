//! ptrace(2): makes a thread of mote do a system call, kills mote between two calls, and takes what a mote
//! that was broken into could use.
#![allow(unsafe_code, reason = "ptrace is not in std")]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
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

/// A duplicate of another process's descriptor (pidfd_getfd(2)).
pub fn descriptor(pid: u32, fd: i32) -> OwnedFd {
    // SAFETY: plain system calls; what they return is open and nobody else's.
    unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(process >= 0, "{}", io::Error::last_os_error());
        let process = OwnedFd::from_raw_fd(process as i32);
        let fd = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// What waits to be read from a socket, at most so many bytes, and stays there.
pub fn peek(socket: &impl AsRawFd, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: pointer and length describe `bytes`.
    let got = unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), len, flags) };
    bytes.truncate(usize::try_from(got).unwrap_or(0));
    bytes
}

/// Has the close of a connection wait, for so many seconds, until its peer has taken everything.
pub fn linger(connection: &TcpStream, l_linger: i32) {
    let value = libc::linger { l_onoff: 1, l_linger };
    let (fd, len) = (connection.as_raw_fd(), size_of::<libc::linger>() as u32);
    let pointer = (&raw const value).cast();
    // SAFETY: pointer and length describe `value`.
    let ret = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, pointer, len) };
    assert_eq!(ret, 0);
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
