//! What a guest needs that becomes another: pages that the VMM finds and writes into, and fresh randomness.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::slice;

use mote_agent::mailbox::{PAGE_LEN, PAGES, SEED_LEN, mark};

use super::{check, owned};

const LEN: usize = PAGES * PAGE_LEN;

/// The mailbox: pages that stay where they are in the guest's memory.
#[derive(Debug)]
pub struct Mailbox {
    start: NonNull<u8>,
}

impl Mailbox {
    /// Sets the pages aside, and marks them.
    pub fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | libc::MAP_LOCKED;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), LEN, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut mailbox = Mailbox { start };
        for (number, page) in mailbox.bytes_mut().chunks_exact_mut(PAGE_LEN).enumerate() {
            mark(page, number);
        }
        Ok(mailbox)
    }

    /// What is in it. The VMM writes only while the agent is in a system call that stops the VM.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has this length, is initialised, and lives as long as the process.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), LEN) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; this is the only reference to it.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), LEN) }
    }

    /// Leaves nothing of a letter in the guest's memory.
    pub fn wipe(&mut self) {
        self.bytes_mut().fill(0);
        // What is never read again may not be written either, but for this.
        std::hint::black_box(self.bytes());
    }
}

/// How much is given back at once when free memory has been cleared: so many pages that the kernel needs none to note them.
const PART_LEN: usize = 4 * PAGE_LEN;

/// Has the kernel overwrite this much of the memory that is free by zeros: what it was used for during the boot, the
/// initramfs above all, would be part of every template.
pub fn clear_free_memory(len: usize) -> io::Result<()> {
    let (access, none) = (libc::PROT_READ | libc::PROT_WRITE, ptr::null_mut());
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice, which nothing refers to, is filled, given back part by
    // part, and goes away. Small pages come from where something has been before.
    unsafe {
        let start = libc::mmap(none, len, access, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        libc::madvise(start, len, libc::MADV_NOHUGEPAGE);
        let populated = check(libc::madvise(start, len, libc::MADV_POPULATE_WRITE));
        // The kernel hands out first what came back last. That should be what it handed out first here, the smallest
        // gaps between what is in use: a box that starts there needs no more of the host's huge pages.
        for at in (0..len).step_by(PART_LEN).rev() {
            let part = PART_LEN.min(len - at);
            check(libc::madvise(start.byte_add(at), part, libc::MADV_DONTNEED))?;
        }
        check(libc::munmap(start, len))?;
        populated.map(drop)
    }
}

/// Has a descriptor stay open when this process executes itself anew.
pub fn keep_through_exec(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) })?;
    Ok(())
}

/// A descriptor that this process was executed with. Must be called once for each.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain system call; what it refuses is not open.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(owned(number))
}

/// `struct rand_pool_info` (include/uapi/linux/random.h) with the bytes behind it.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    len: libc::c_int,
    bytes: [u8; SEED_LEN],
}

/// Mixes bytes of full entropy into the kernel's generator, and has every generator of random numbers start anew from
/// there (random(4)).
pub fn add_entropy(bytes: &[u8; SEED_LEN]) -> io::Result<()> {
    // include/uapi/linux/random.h
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203_u32 as libc::Ioctl;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    let file = File::open("/dev/urandom")?;
    let (entropy_bits, len) = (8 * SEED_LEN as libc::c_int, SEED_LEN as libc::c_int);
    let info = RandPoolInfo { entropy_bits, len, bytes: *bytes };
    // SAFETY: the kernel reads the structure, which is as long as it says.
    check(unsafe { libc::ioctl(file.as_raw_fd(), RNDADDENTROPY, &info) })?;
    // SAFETY: plain system call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG) })?;
    Ok(())
}
