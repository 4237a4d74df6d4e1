//! Processes: starting helpers, watching, killing and reaping them; the CPUs they run on.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::ptr;
use std::time::{Duration, Instant};

use vm_memory::MmapRegion;

use super::capabilities::{self, Capabilities};
use super::confine::{self, Namespaces};
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
            // First: entering a new user namespace would undo that it ends with mote.
            prepare()?;
            become_helper(&[])?;
            // The parent may have died before the line above took effect.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            hand_on(source)?;
            Ok(())
        });
    }
}

/// The number under which a [`helper`] finds its descriptor.
pub const INHERITED_FD: RawFd = 3;

/// The environment of what [`start_again`] starts: the stacks of its threads are less than a huge page, which the kernel
/// would give them whole.
const ENVIRONMENT: &CStr = c"RUST_MIN_STACK=1048576";

/// Executes this program again as a child with these arguments, of which the first is its name, in new `namespaces`
/// beside its parent's. It finds `inherited` from [`INHERITED_FD`] on, has `stderr` as its standard error, and the other
/// standard streams are empty; of its parent's environment it has nothing. In a new user namespace its user and group do not change, and it
/// has these `capabilities` there, a bit for each. It begins in `directory`, if there is one, which is found before this
/// returns. Returns its number and a [`process_file`].
///
/// Must be called while there is one thread.
///
/// # Errors
/// Those of clone(2). If the child cannot go on, it says why on `stderr`, and ends.
pub fn start_again(
    arguments: &[CString],
    inherited: &[&dyn AsRawFd],
    stderr: BorrowedFd<'_>,
    namespaces: Namespaces,
    capabilities: Capabilities,
    directory: Option<&CStr>,
) -> io::Result<(u32, OwnedFd)> {
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    let user = confine::Identity::own();
    // Its descriptors are above the standard streams', which std has seen to.
    start_in_own_memory(namespaces, || {
        let error = (|| {
            if let Some(directory) = directory {
                // SAFETY: plain system call on a NUL-terminated string that outlives it.
                check(unsafe { libc::chdir(directory.as_ptr()) }).map_err(|error| {
                    let directory = directory.to_string_lossy();
                    io::Error::new(error.kind(), format!("enter {directory}: {error}"))
                })?;
            }
            if namespaces & libc::CLONE_NEWUSER != 0 {
                user.map()?;
                capabilities::keep_through_exec(capabilities)?;
            }
            for (from, to) in [(nothing.as_fd(), 0), (nothing.as_fd(), 1), (stderr, 2)] {
                // SAFETY: plain system call on an open descriptor; nothing owns the standard streams.
                check(unsafe { libc::dup2(from.as_raw_fd(), to) })?;
            }
            hand_all_on(inherited)?;
            let mut pointers: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
            pointers.push(ptr::null());
            let environment = [ENVIRONMENT.as_ptr(), ptr::null()];
            let program = c"/proc/self/exe".as_ptr();
            // SAFETY: both lists are of NUL-terminated strings and end with a null pointer, and outlive the call.
            check(unsafe { libc::execve(program, pointers.as_ptr(), environment.as_ptr()) })
        })();
        if let Err(error) = error {
            let text = format!("start mote's own file again, /proc/self/exe: {error}\n");
            // SAFETY: plain system call on a buffer of this length.
            unsafe { libc::write(stderr.as_raw_fd(), text.as_ptr().cast(), text.len()) };
        }
        1
    })
}

/// Room for what a child of [`start_in_own_memory`] does, of which it touches little.
const CHILD_STACK: usize = 256 << 10;

/// Starts a child in new `namespaces` beside its parent's, which does `work` in this process's own memory while this thread
/// waits, as vfork(2) has it: until the child executes a program, or ends with the code that `work` returns. To copy the
/// memory would cost ten times as much, now and whenever a page that both have is written. The child has descriptors and a
/// working directory of its own. Returns its number and a [`process_file`].
///
/// # Errors
/// Those of clone(2).
fn start_in_own_memory<F: FnOnce() -> libc::c_int>(
    namespaces: Namespaces,
    work: F,
) -> io::Result<(u32, OwnedFd)> {
    extern "C" fn run<F: FnOnce() -> libc::c_int>(work: *mut libc::c_void) -> libc::c_int {
        // SAFETY: it is the caller's `Some(work)`, which waits for the end of this call and does not look at it.
        let work = unsafe { &mut *work.cast::<Option<F>>() };
        work.take().map_or(1, |work| work())
    }
    // A mapping of its own: what the heap has never touched is still all zeros.
    let stack = MmapRegion::<()>::new(CHILD_STACK).map_err(io::Error::other)?;
    let (mut work, mut file): (_, RawFd) = (Some(work), -1);
    let flags = namespaces | libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: the stack is the child's alone, and large enough. While the child uses this thread's memory, its
    // thread-local variables among it, this thread does not run; others may, and find each lock held by who holds it. The
    // only handlers of signals (`sys::fatal`) end the process they run in. `file` takes the descriptor that CLONE_PIDFD
    // makes.
    let pid = unsafe {
        let top = stack.as_ptr().add(CHILD_STACK);
        libc::clone(run::<F>, top.cast(), flags, (&raw mut work).cast(), &raw mut file)
    };
    Ok((check(pid)? as u32, owned(file)))
}

/// Whether `work` succeeds in a child process: for finding out what is permitted.
pub fn succeeds_in_child(work: impl FnOnce() -> io::Result<()>) -> bool {
    start_in_own_memory(0, || if work().is_ok() { 0 } else { 1 })
        .and_then(|(child, _)| wait(child))
        .is_ok_and(|status| status.success())
}

/// Gives a descriptor the number [`INHERITED_FD`], and has it stay open on exec. Async-signal-safe.
fn hand_on(fd: RawFd) -> io::Result<()> {
    // SAFETY: plain system calls. What may have had the number is not used any more: a program is executed next.
    unsafe {
        if fd == INHERITED_FD {
            check(libc::fcntl(fd, libc::F_SETFD, 0))?;
        } else {
            check(libc::dup2(fd, INHERITED_FD))?;
        }
    }
    Ok(())
}

/// Gives descriptors the numbers from [`INHERITED_FD`] on, and has them stay open on exec.
fn hand_all_on(inherited: &[&dyn AsRawFd]) -> io::Result<()> {
    if let [one] = inherited {
        return hand_on(one.as_raw_fd());
    }
    // First out of the way of one another. What else has these numbers is not used any more: a program is executed next.
    let above = INHERITED_FD + inherited.len() as RawFd;
    let mut copies = Vec::with_capacity(inherited.len());
    for fd in inherited {
        // SAFETY: plain system call on an open descriptor.
        copies.push(check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, above) })?);
    }
    for (number, copy) in (INHERITED_FD..).zip(copies) {
        // SAFETY: plain system call on an open descriptor.
        check(unsafe { libc::dup2(copy, number) })?;
    }
    Ok(())
}

/// Goes on in a copy of this process, in new `namespaces` beside its own: a child of this one's parent, not of this one.
/// Returns the copy's number here, and `None` in the copy.
///
/// Must be called while there is one thread. glibc does not learn of it, and takes the copy's thread for its original where
/// it asks for no number: neither can send itself a signal by glibc (raise(3)), and an abort ends it all the same.
///
/// # Errors
/// Those of clone(2).
pub fn copy_beside(namespaces: Namespaces) -> io::Result<Option<u32>> {
    let flags = namespaces | libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: no memory is shared and no pointer passed; there is one thread, so no lock is held by another.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) as libc::c_int })?;
    Ok((pid > 0).then_some(pid as u32))
}

/// Leaves this process three of the descriptors that it was started with: the one at this place among them and the next
/// from [`INHERITED_FD`] on, and the third as its standard error. Everything else but the standard streams is closed.
///
/// Must be called when nothing owns a descriptor.
///
/// # Errors
/// Those of dup2(2) and close_range(2).
pub fn keep_inherited(place: usize) -> io::Result<()> {
    let first = INHERITED_FD + place as RawFd;
    // SAFETY: plain system calls; by this function's contract nothing owns what is closed.
    unsafe {
        check(libc::dup2(first + 2, libc::STDERR_FILENO))?;
        check(libc::dup2(first, INHERITED_FD))?;
        check(libc::dup2(first + 1, INHERITED_FD + 1))?;
        let (from, to) = (INHERITED_FD as libc::c_uint + 2, libc::c_uint::MAX);
        check(libc::syscall(libc::SYS_close_range, from, to, 0) as libc::c_int)?;
    }
    Ok(())
}

/// The file that this process was started with at this place among its descriptors. Must be called once for each.
pub fn inherited_file(place: usize) -> File {
    // SAFETY: by this function's contract nobody owns the number; a file that is not open fails when it is used.
    unsafe { File::from_raw_fd(INHERITED_FD + place as RawFd) }
}

/// The socket that this process was started with as [`INHERITED_FD`]. Must be called once.
///
/// # Errors
/// There is none.
pub fn inherited_listener() -> io::Result<UnixListener> {
    // SAFETY: plain system call; what it refuses is not open.
    check(unsafe { libc::fcntl(INHERITED_FD, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the number is open, and by this function's contract nobody owns it.
    Ok(unsafe { UnixListener::from_raw_fd(INHERITED_FD) })
}

/// What a process that mote has started does first: ends with mote, is in a process group of its own, since a
/// terminal's Ctrl-C must reach mote only, and gets the signals that mote has blocked, but for those `blocked` here.
///
/// # Errors
/// Those of prctl(2) and setpgid(2).
pub fn become_helper(blocked: &[libc::c_int]) -> io::Result<()> {
    end_with_parent()?;
    // SAFETY: plain system calls; an all-zero set is valid until it is emptied.
    unsafe {
        check(libc::setpgid(0, 0))?;
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut set);
        for signal in blocked {
            libc::sigaddset(&mut set, *signal);
        }
        check(libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut()))?;
    }
    Ok(())
}

/// Has this process end with its parent, whatever ends that.
///
/// # Errors
/// Those of prctl(2).
pub fn end_with_parent() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
    Ok(())
}

/// Sets the name of this process, of which the first 15 bytes count.
pub fn name(name: &CStr) {
    // SAFETY: plain system call; the string outlives it.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Where a process is in the hierarchy of cgroup v2, from its root on (cgroups(7)).
///
/// # Errors
/// The process is gone, or there is no cgroup v2.
pub fn cgroup(pid: u32) -> io::Result<PathBuf> {
    let all = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let unified = all.lines().find_map(|line| line.strip_prefix("0::/"));
    unified.map(PathBuf::from).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// How a child has ended, `None` if it has not yet. Must not be called again once it has ended.
///
/// # Errors
/// Those of waitpid(2).
pub fn ended(pid: u32) -> io::Result<Option<ExitStatus>> {
    waited(pid, libc::WNOHANG)
}

/// Waits for a child's end. Must not be called again.
///
/// # Errors
/// Those of waitpid(2).
pub fn wait(pid: u32) -> io::Result<ExitStatus> {
    waited(pid, 0)?.ok_or_else(|| io::ErrorKind::Other.into())
}

fn waited(pid: u32, flags: libc::c_int) -> io::Result<Option<ExitStatus>> {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to a local.
        match check(unsafe { libc::waitpid(pid as libc::pid_t, &mut status, flags) }) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(ExitStatus::from_raw(status))),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
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

/// Makes room for this many descriptors in this process's table. The kernel doubles a full one, and where a process has
/// threads it waits then until no processor may still look at the old one (fs/file.c, `expand_fdtable`): for some
/// milliseconds in which the thread does nothing else. So this must be called while there is one thread. A limit on open files
/// that is lower is no error.
pub fn reserve_descriptors(count: u16) {
    let last = libc::c_int::from(count) - 1;
    // SAFETY: plain system calls; std has seen to it that standard error is open, and nothing owns the duplicate.
    unsafe {
        let duplicate = libc::fcntl(libc::STDERR_FILENO, libc::F_DUPFD_CLOEXEC, last);
        if duplicate >= 0 {
            libc::close(duplicate);
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

/// Has this process run only when a CPU has nothing else to do (sched(7), `SCHED_IDLE`). A host that refuses it has it
/// run like any other.
pub fn yield_to_others() {
    // SAFETY: all zeros are valid, and plain system calls.
    unsafe {
        let parameters: libc::sched_param = zeroed();
        libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameters);
        libc::setpriority(libc::PRIO_PROCESS, 0, 19);
    }
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

/// Whether two threads of this process can run at the same time.
pub fn has_several_cpus() -> bool {
    cpu_affinity().is_ok_and(|cpus| cpus.len() > 1)
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
