//! Which parts of a file have anything in them.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

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
    }
}
