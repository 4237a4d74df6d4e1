//! Files as memory: one that is only read, and which parts of another have anything in them.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::slice;

/// A file's bytes. Whoever shortens the file meanwhile ends this process at the next read (SIGBUS): for files that
/// only ever appear whole, under a name, and are removed.
#[derive(Debug)]
pub struct MappedFile {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, and is only read.
unsafe impl Send for MappedFile {}

impl MappedFile {
    /// The first `len` bytes of the file, which has as many.
    ///
    /// # Errors
    /// Those of mmap(2); a length of 0 is one.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        let (access, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(MappedFile { start, len })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has this length until it is dropped, and by the type's contract nobody writes to the file.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and no reference to it is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// The first part of a file from `from` on that the file system has kept anything of, if there is one (lseek(2)).
///
/// # Errors
/// Those of lseek(2).
pub fn next_data(file: &File, from: u64) -> io::Result<Option<Range<u64>>> {
    let seek = |from: u64, whence| {
        // SAFETY: plain system call.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, whence) };
        if at < 0 { Err(io::Error::last_os_error()) } else { Ok(at as u64) }
    };
    match seek(from, libc::SEEK_DATA) {
        Ok(start) => Ok(Some(start..seek(start, libc::SEEK_HOLE)?)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn data_is_found_between_holes() {
        let file = crate::sys::sealed_memory_file(1 << 20).expect("a file");
        assert_eq!(next_data(&file, 0).expect("looked"), None);
        file.write_all_at(b"x", 3 << 16).expect("written");
        let data = next_data(&file, 0).expect("looked").expect("there");
        assert!(data.contains(&(3 << 16)) && data.end < 1 << 20, "{data:?}");
        assert_eq!(next_data(&file, data.end).expect("looked"), None);
        assert_eq!(MappedFile::new(&file, 1 << 20).expect("mapped")[3 << 16], b'x');
    }
}
