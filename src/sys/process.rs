//! Processes: starting helpers, watching, killing and reaping them; the CPUs they run on.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::ptr;
use std::time::{Duration, Instant};

use super::file_part::FilePart;
use super::{check, owned};

/// A descriptor that becomes readable when the process ends.
///
/// # Errors
/// Those of pidfd_open(2).
pub fn process_file(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    Ok(owned(check(fd as libc::c_int)?))
}

/// Makes a child die with the thread that starts it, and hands it one descriptor as number
/// [`INHERITED_FD`]; everything else is closed on exec as usual. The child calls `prepare` first, which
/// must make only async-signal-safe calls if this process has other threads.
pub fn helper(
    command: &mut Command,
    inherited: BorrowedFd<'_>,
    mut prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    let source = inherited.as_raw_fd();
    let parent = std::process::id();
    // SAFETY: the closure runs in the forked child and, beside `prepare`, only makes async-signal-safe
    // system calls on plain integers. `source` is open when the command is spawned: callers hold the
    // descriptor until then.
    unsafe {
        command.pre_exec(move || {
            // First: entering a new user namespace would undo the next line.
            prepare()?;
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            // A group of its own: a terminal's Ctrl-C must reach mote only.
            check(libc::setpgid(0, 0))?;
            // The parent may have died before the line above took effect.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            // mote blocks the signals that it reads from a descriptor; programs expect none blocked.
            let mut none: libc::sigset_t = zeroed();
            libc::sigemptyset(&mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut()))?;
            if source == INHERITED_FD {
                check(libc::fcntl(source, libc::F_SETFD, 0))?;
            } else {
                check(libc::dup2(source, INHERITED_FD))?;
            }
            Ok(())
        });
    }
}

/// The number under which a [`helper`] finds its descriptor.
pub const INHERITED_FD: RawFd = 3;

/// A program in a memory file that nobody can change, at least as long as this lives.
#[derive(Debug)]
pub struct MemoryProgram(File);

impl MemoryProgram {
    /// Copies a program into a memory file.
    ///
    /// # Errors
    /// Those of memfd_create(2), which a host may forbid (`vm.memfd_noexec`), and of writing.
    pub fn new(name: &CStr, program: FilePart) -> io::Result<MemoryProgram> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: plain system calls; the string outlives them.
        let create = |more| check(unsafe { libc::memfd_create(name.as_ptr(), flags | more) });
        let created = create(libc::MFD_EXEC).or_else(|error| match error.raw_os_error() {
            // Linux before 6.3, where every one can be executed.
            Some(libc::EINVAL) => create(0),
            _ => Err(error),
        });
        let file = File::from(owned(created?));
        program.copy_to(&file)?;
        let seals =
            libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
        // SAFETY: plain system calls on an open descriptor. The second is out of a helper's way, whose own one
        // has a low number.
        let fd = unsafe {
            check(libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals))?;
            check(libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, INHERITED_FD + 1))?
        };
        Ok(MemoryProgram(File::from(owned(fd))))
    }

    /// A path by which this process and those that it forks can execute it.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// Kills the process behind a [`process_file`]. One that has ended is no error.
pub fn kill_process(process: &impl AsRawFd) {
    let (fd, info) = (process.as_raw_fd(), ptr::null::<libc::siginfo_t>());
    // SAFETY: plain system call; without an info the kernel fills in kill(2)'s.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, info, 0) };
}

/// Makes the orphans of this process's children its own children, so that [`reap`] sees them:
/// virtiofsd forks.
///
/// # Errors
/// Those of prctl(2).
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) })?;
    Ok(())
}

/// Waits, at most for `limit`, until a child that is about to end has ended, and so have those of the
/// process group it leads that are children of this process too.
pub fn reap(pid: u32, limit: Duration) {
    let deadline = Instant::now() + limit;
    for who in [pid as libc::pid_t, -(pid as libc::pid_t)] {
        loop {
            // SAFETY: plain system call; a null status pointer is allowed.
            match unsafe { libc::waitpid(who, ptr::null_mut(), libc::WNOHANG) } {
                0 if Instant::now() < deadline => std::thread::sleep(REAP_STEP),
                reaped if reaped > 0 => {}
                _ => break,
            }
        }
    }
}

/// How often [`reap`] looks. Short: the processes that it waits for have been killed already.
const REAP_STEP: Duration = Duration::from_micros(200);

/// Raises the limit on open files as far as it goes: each connection is one (contract §1.3 step 4).
/// A host that does not allow it has fewer connections. [`super::confine::limit`] lowers it again.
pub fn raise_open_file_limit() {
    // SAFETY: an all-zero rlimit is valid, and both calls take a pointer to one.
    unsafe {
        let mut limit: libc::rlimit = zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// Forks a process under this name that does `work` and ends, and returns its number. It is a child of
/// this one, but in a session of its own, with no descriptors but those to `keep`, and with memory that
/// other processes of the user cannot read. Signals that are blocked in this thread are blocked in the
/// child.
///
/// `work` must not panic, and must not take a lock that another thread may hold: fork does not copy
/// other threads.
///
/// # Errors
/// Those of fork(2).
pub fn start_detached(name: &CStr, keep: &[RawFd], work: impl FnOnce()) -> io::Result<u32> {
    let mut keep: Vec<libc::c_uint> = keep.iter().map(|fd| *fd as libc::c_uint).collect();
    keep.sort_unstable();
    // Closes nothing: it checks that the call exists (Linux 5.9) while an error can still be returned.
    let none = libc::c_uint::MAX;
    // SAFETY: plain system call.
    check(unsafe { libc::syscall(libc::SYS_close_range, none, none, 0) as libc::c_int })?;
    // SAFETY: plain system call. The child is a copy of this thread with all its memory; nothing else
    // runs on that copy until the child calls `_exit`, and glibc's fork resets glibc's own locks.
    let pid = check(unsafe { libc::fork() })?;
    if pid > 0 {
        return Ok(pid as u32);
    }
    // From here on this is the child.
    let mut from = 0;
    for fd in keep.into_iter().chain([libc::c_uint::MAX]) {
        if fd > from {
            // SAFETY: plain system call. Whatever owns these descriptors in this copy of the
            // process is never used or dropped: only `work` runs, and it uses only those kept.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd.saturating_add(1);
    }
    // SAFETY: plain system calls; the strings are NUL-terminated and outlive the calls.
    unsafe {
        // A copy of its parent's memory, with the secrets of the box's spec in it.
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        // Fills 0 to 2, so that no file that the child opens becomes a standard stream.
        while (0..=2).contains(&libc::open(c"/dev/null".as_ptr(), libc::O_RDWR)) {}
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
    }
    work();
    // SAFETY: plain system call. Nothing is flushed and no destructor runs: the parent does both.
    unsafe { libc::_exit(0) }
}

/// CPU numbers are below this: what glibc's `cpu_set_t` can hold.
pub const MAX_CPUS: u16 = libc::CPU_SETSIZE as u16;

/// The online CPUs that the calling thread may run on (sched_getaffinity(2)).
///
/// # Errors
/// Those of sched_getaffinity(2).
pub fn cpu_affinity() -> io::Result<BTreeSet<u16>> {
    // SAFETY: an all-zero cpu_set_t is valid and of the size given; the numbers looked up are below
    // CPU_SETSIZE.
    unsafe {
        let mut set: libc::cpu_set_t = zeroed();
        check(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set))?;
        Ok((0..MAX_CPUS).filter(|&cpu| libc::CPU_ISSET(cpu.into(), &set)).collect())
    }
}

/// Limits the calling thread, and what it starts, to these CPUs below [`MAX_CPUS`]
/// (sched_setaffinity(2)). The kernel may take fewer: see [`cpu_affinity`].
///
/// # Errors
/// Those of sched_setaffinity(2).
pub fn set_cpu_affinity(cpus: &BTreeSet<u16>) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is valid and of the size given; libc's CPU_SET checks the
    // number's bounds.
    unsafe {
        let mut set: libc::cpu_set_t = zeroed();
        for &cpu in cpus {
            libc::CPU_SET(cpu.into(), &mut set);
        }
        check(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set))?;
    }
    Ok(())
}
