//! The system calls by which mote gives up what it does not need any more. [`crate::confine`] decides
//! when to make them, and why; none of them can be undone.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr;

use super::{capabilities, check, owned};

/// A set of namespaces to leave for new ones: `CLONE_NEW*` of unshare(2).
pub type Namespaces = libc::c_int;

/// Leaves these namespaces for new ones. If a user namespace is among them, the process must have only
/// one thread, and has every capability in the new user namespace; its user and group do not change.
///
/// # Errors
/// Those of unshare(2); the maps of a user namespace cannot be written.
pub fn unshare(namespaces: Namespaces) -> io::Result<()> {
    let own = Identity::own();
    // SAFETY: plain system call.
    check(unsafe { libc::unshare(namespaces) })?;
    if namespaces & libc::CLONE_NEWUSER != 0 { own.map() } else { Ok(()) }
}

/// As whom a process works.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    user: libc::uid_t,
    group: libc::gid_t,
}

impl Identity {
    /// This process's.
    pub fn own() -> Identity {
        // SAFETY: plain system calls.
        unsafe { Identity { user: libc::geteuid(), group: libc::getegid() } }
    }

    /// Its user.
    pub fn user(self) -> u32 {
        self.user
    }

    /// Keeps it in the user namespace that this process has just entered.
    ///
    /// # Errors
    /// The maps cannot be written.
    pub fn map(self) -> io::Result<()> {
        // user_namespaces(7): an unprivileged process may map itself, once it has given up changing
        // its groups.
        let Identity { user, group } = self;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
    }
}

/// Keeps mounts made in this mount namespace from appearing in others, and those of others from here.
///
/// # Errors
/// Those of mount(2).
pub fn detach_mounts() -> io::Result<()> {
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: the path is NUL-terminated; null is what this kind of mount(2) takes for the rest.
    check(unsafe { libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), flags, ptr::null()) })?;
    Ok(())
}

/// Makes an empty, read-only directory the root and working directory of this process, which must be in
/// a mount namespace of its own. Where possible, nothing else is left in that namespace. Open
/// descriptors stay as they are.
///
/// # Errors
/// Those of the mount calls, pivot_root(2) and chroot(2).
pub fn enter_empty_root() -> io::Result<()> {
    detach_mounts()?;
    // A directory that exists: /dev/kvm has just been opened.
    let place = c"/dev";
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_RDONLY;
    let options = c"size=4k,nr_inodes=1,mode=555";
    // SAFETY: system calls on NUL-terminated strings that outlive them.
    unsafe {
        let tmpfs = c"tmpfs".as_ptr();
        check(libc::mount(tmpfs, place.as_ptr(), tmpfs, flags, options.as_ptr().cast()))?;
        check(libc::chdir(place.as_ptr()))?;
    }
    enter_mount()
}

/// Makes the mount that is the working directory the root. Where possible, nothing else is left in this mount
/// namespace, which must be the process's own.
///
/// # Errors
/// Those of pivot_root(2), umount(2) and chroot(2).
fn enter_mount() -> io::Result<()> {
    let dot = c".".as_ptr();
    // SAFETY: system calls on NUL-terminated strings that outlive them.
    unsafe {
        // pivot_root(2), "NOTES": with "." for both, the old root is mounted over the new one, and
        // umount2 removes the old one.
        match check(libc::syscall(libc::SYS_pivot_root, dot, dot) as libc::c_int) {
            Ok(_) => check(libc::umount2(dot, libc::MNT_DETACH))?,
            // pivot_root refuses to replace the initramfs, and a root below a shared mount. A chroot
            // does as well: without capabilities and descriptors of directories there is no way out.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => check(libc::chroot(dot))?,
            Err(error) => return Err(error),
        };
        check(libc::chdir(c"/".as_ptr()))?;
    }
    Ok(())
}

/// Makes this directory the working directory of this process.
///
/// # Errors
/// Those of fchdir(2).
pub fn enter_directory(directory: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    check(unsafe { libc::fchdir(directory.as_raw_fd()) })?;
    Ok(())
}

/// Makes the working directory the root, too. Without capabilities and descriptors of other directories there is
/// no way out.
///
/// # Errors
/// Those of chroot(2).
pub fn make_root() -> io::Result<()> {
    // SAFETY: the path is NUL-terminated and outlives the call.
    check(unsafe { libc::chroot(c".".as_ptr()) })?;
    Ok(())
}

/// Mounts a restricted copy of a directory's mounts over it: no device files, no set-user-ID, no
/// programs and, if `read_only`, no writing. Makes only async-signal-safe calls: it is for a child in
/// a mount namespace of its own, before the child executes its program. Returns the mount.
///
/// # Errors
/// Those of open_tree(2) and move_mount(2). Before Linux 5.12, which has no mount_setattr(2), the copy is as its
/// original; virtiofsd itself refuses writes in any case.
pub fn restrict_mount(directory: &CStr, read_only: bool) -> io::Result<OwnedFd> {
    let mut attributes: libc::mount_attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    if read_only {
        attributes.attr_set |= libc::MOUNT_ATTR_RDONLY;
    }
    let tree_flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as u32;
    let empty = c"".as_ptr();
    let path = directory.as_ptr();
    // SAFETY: system calls on NUL-terminated strings and a structure of the size given, all of which
    // outlive the calls, and on an open descriptor.
    unsafe {
        let tree = libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path, tree_flags);
        let tree = owned(check(tree as libc::c_int)?);
        let (fd, at) = (tree.as_raw_fd(), libc::AT_EMPTY_PATH | libc::AT_RECURSIVE);
        let size = size_of::<libc::mount_attr>();
        let set =
            libc::syscall(libc::SYS_mount_setattr, fd, empty, at, &raw const attributes, size);
        match check(set as libc::c_int) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
            set => drop(set?),
        }
        let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
        let moved = libc::syscall(libc::SYS_move_mount, fd, empty, libc::AT_FDCWD, path, flags);
        check(moved as libc::c_int)?;
        Ok(tree)
    }
}

/// Makes a restricted copy ([`restrict_mount`]) of a directory's mounts the root of this process, which must be in a
/// mount namespace of its own, and the only mounts there, if that can be.
///
/// # Errors
/// Those of the mount calls, pivot_root(2) and chroot(2).
pub fn enter_share(directory: &CStr, read_only: bool) -> io::Result<()> {
    enter_directory(&restrict_mount(directory, read_only)?)?;
    enter_mount()
}

/// This process's /proc/self/fd.
///
/// # Errors
/// Those of open(2).
pub fn own_descriptors() -> io::Result<File> {
    path_of("/proc/self/fd")
}

fn path_of(directory: &str) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(directory)
}

/// This process's /proc/self/fd, by a mount of its own that nothing leads out of: a name in it is followed to an open
/// file, and `..` nowhere. The process must be in a mount namespace of its own, where this takes the place of /proc.
///
/// # Errors
/// Those of mount(2) and open(2).
pub fn own_descriptors_alone() -> io::Result<File> {
    let (from, to) = (c"/proc/self/fd".as_ptr(), c"/proc".as_ptr());
    // SAFETY: the paths are NUL-terminated; null is what this kind of mount(2) takes for the rest.
    check(unsafe { libc::mount(from, to, ptr::null(), libc::MS_BIND, ptr::null()) })?;
    path_of("/proc")
}

/// Makes sure that no program executed from here on gets more privileges than this one.
///
/// # Errors
/// Those of prctl(2).
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    Ok(())
}

/// Gives up the groups that this process has beside its first, if it may.
///
/// # Errors
/// Those of setgroups(2).
pub fn drop_groups() -> io::Result<()> {
    if capabilities::effective() & capabilities::SETGID == 0 {
        return Ok(());
    }
    // SAFETY: plain system call; an empty list needs no pointer.
    match check(unsafe { libc::setgroups(0, ptr::null()) }) {
        // Whoever has made this user namespace had to deny it that (user_namespaces(7), "/proc/PID/setgroups").
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
        set => set.map(drop),
    }
}

/// Keeps other processes of this user from reading this one's memory, and the kernel from dumping it.
///
/// # Errors
/// Those of prctl(2).
pub fn hide_memory() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })?;
    Ok(())
}

/// Makes all threads allocate from one heap. A heap for each thread would cost more memory, and glibc
/// reads a file to shrink such a heap, which a confined thread cannot.
pub fn share_heap() {
    // SAFETY: plain call; a value that malloc does not take leaves the default.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// A resource of setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Bytes of a core dump.
    CoreDump,
    /// Bytes of address space.
    AddressSpace,
    /// Bytes of locked memory.
    LockedMemory,
    /// Bytes in POSIX message queues.
    MessageQueues,
    /// One more than the highest descriptor.
    OpenFiles,
}

/// Limits a resource of this process, and of programs it starts, for good. A limit that is already
/// lower stays.
///
/// # Errors
/// Those of setrlimit(2).
pub fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let resource = match resource {
        Resource::CoreDump => libc::RLIMIT_CORE,
        Resource::AddressSpace => libc::RLIMIT_AS,
        Resource::LockedMemory => libc::RLIMIT_MEMLOCK,
        Resource::MessageQueues => libc::RLIMIT_MSGQUEUE,
        Resource::OpenFiles => libc::RLIMIT_NOFILE,
    };
    // SAFETY: an all-zero rlimit is valid, and both calls take a pointer to one.
    unsafe {
        let mut limit: libc::rlimit = zeroed();
        check(libc::getrlimit(resource, &mut limit))?;
        limit.rlim_max = limit.rlim_max.min(most);
        limit.rlim_cur = limit.rlim_max;
        check(libc::setrlimit(resource, &limit))?;
    }
    Ok(())
}

/// Sets the limit on open files of this process, and of programs that it starts. Unlike [`limit`], this
/// raises a lower limit if the process may do so. Makes only async-signal-safe calls.
///
/// # Errors
/// Those of setrlimit(2).
pub fn limit_open_files_anew(most: u64) -> io::Result<()> {
    let wanted = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: plain system call with a pointer to a valid rlimit.
    match check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &wanted) }) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => limit(Resource::OpenFiles, most),
        done => done.map(drop),
    }
}

/// This process's limit on open files.
///
/// # Errors
/// Those of getrlimit(2).
pub fn open_files() -> io::Result<u64> {
    // SAFETY: an all-zero rlimit is valid, and the call takes a pointer to one.
    unsafe {
        let mut limit: libc::rlimit = zeroed();
        check(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit))?;
        Ok(limit.rlim_cur)
    }
}

/// Bytes of address space that this process has.
///
/// # Errors
/// /proc/self/statm cannot be read.
pub fn address_space() -> io::Result<u64> {
    // proc_pid_statm(5): the first number, in pages.
    let statm = fs::read_to_string("/proc/self/statm")?;
    let pages: Option<u64> = statm.split(' ').next().and_then(|pages| pages.parse().ok());
    // SAFETY: plain call.
    let page_len = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    pages.map(|pages| pages * page_len).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The descriptors that this process was started with, beyond the standard streams; programs that it
/// starts from now on do not get them. Must be called before the process opens any descriptor that it
/// keeps.
///
/// # Errors
/// /proc/self/fd cannot be read.
pub fn inherited_descriptors() -> io::Result<Vec<RawFd>> {
    let listing = fs::read_dir("/proc/self/fd")?;
    let numbers = listing.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let candidates: Vec<RawFd> = numbers.filter(|fd| *fd > libc::STDERR_FILENO).collect();
    let keep_from_programs = |fd: &RawFd| {
        // SAFETY: plain system call; the listing's own descriptor is closed by now, and so refused.
        unsafe { libc::fcntl(*fd, libc::F_SETFD, libc::FD_CLOEXEC) >= 0 }
    };
    Ok(candidates.into_iter().filter(keep_from_programs).collect())
}

/// Closes descriptors that this process was started with, and that nothing in it owns.
pub fn close_inherited(fds: &[RawFd]) {
    for fd in fds {
        // SAFETY: by this function's contract nothing owns the number.
        unsafe { libc::close(*fd) };
    }
}

/// Gives this descriptor's file the number of standard input.
///
/// # Errors
/// Those of dup2(2).
pub fn replace_stdin(file: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system call; nothing in this process uses standard input's buffer once the spec
    // has been read.
    check(unsafe { libc::dup2(file.as_raw_fd(), libc::STDIN_FILENO) })?;
    Ok(())
}

/// Whether this host has network namespaces, and permits more than none of them (namespaces(7)).
pub fn has_network_namespaces() -> bool {
    let most = fs::read_to_string("/proc/sys/user/max_net_namespaces");
    Path::new("/proc/self/ns/net").exists() && most.map_or(true, |most| most.trim() != "0")
}
