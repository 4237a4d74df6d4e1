//! A directory that is held open, and the files in it by their names alone.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::ffi::CString;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{Links, MODE, check, openat2, owned};

/// A directory. No symbolic link in it is followed, and nothing outside of it is reached.
#[derive(Debug)]
pub struct Directory(File);

impl Directory {
    /// Opens the directory at this path, for nothing but what the other functions do.
    ///
    /// # Errors
    /// Those of open(2), or of openat2(2) if no link is to be followed.
    pub fn open(path: &Path, links: Links) -> io::Result<Directory> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        if links == Links::None {
            let resolve = libc::RESOLVE_NO_SYMLINKS;
            return openat2(libc::AT_FDCWD, &path, flags, 0, resolve).map(Directory);
        }
        // SAFETY: the string outlives the call.
        let fd = check(unsafe { libc::open(path.as_ptr(), flags) })?;
        Ok(Directory(File::from(owned(fd))))
    }

    /// Opens the directory at this path, which no symbolic link stands for, to list it, too.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open_listed(path: &Path) -> io::Result<Directory> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: the string outlives the call.
        let fd = check(unsafe { libc::open(path.as_ptr(), flags) })?;
        Ok(Directory(File::from(owned(fd))))
    }

    /// Owner and mode of the directory.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.0.metadata()
    }

    /// The names of what is in it, of a directory that is opened to be listed.
    ///
    /// # Errors
    /// Those of open(2) and readdir(3).
    pub fn names(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(format!("/proc/self/fd/{}", self.0.as_raw_fd()))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    /// A file to read.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn read(&self, name: &str) -> io::Result<File> {
        self.open_with(name, libc::O_RDONLY)
    }

    /// A file to read and to write anywhere in it, which is created, mode 0600, if it is not there.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn write(&self, name: &str) -> io::Result<File> {
        self.open_with(name, libc::O_RDWR | libc::O_CREAT)
    }

    /// A file to read and to write anywhere in it, if it is there.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn write_there(&self, name: &str) -> io::Result<File> {
        self.open_with(name, libc::O_RDWR)
    }

    /// A file to append to and to read, which is created, mode 0600, if it is not there.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn append(&self, name: &str) -> io::Result<File> {
        self.open_file(name, 0)
    }

    /// A new file to append to and to read, mode 0600.
    ///
    /// # Errors
    /// Those of openat2(2): something of this name is there.
    pub fn create_new(&self, name: &str) -> io::Result<File> {
        self.open_file(name, libc::O_EXCL)
    }

    fn open_file(&self, name: &str, more: libc::c_int) -> io::Result<File> {
        self.open_with(name, libc::O_RDWR | libc::O_APPEND | libc::O_CREAT | more)
    }

    fn open_with(&self, name: &str, access: libc::c_int) -> io::Result<File> {
        let flags = access | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
        let mode = if access & libc::O_CREAT != 0 { MODE } else { 0 };
        let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
        openat2(self.0.as_raw_fd(), &CString::new(name)?, flags, mode, resolve)
    }

    /// Gives a file another name, in the place of what has that one.
    ///
    /// # Errors
    /// Those of renameat(2).
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (CString::new(from)?, CString::new(to)?);
        let at = self.0.as_raw_fd();
        // SAFETY: the strings outlive the call.
        check(unsafe { libc::renameat(at, from.as_ptr(), at, to.as_ptr()) })?;
        Ok(())
    }

    /// Removes a file. One that is not there is no error.
    ///
    /// # Errors
    /// Those of unlinkat(2).
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let name = CString::new(name)?;
        // SAFETY: the string outlives the call.
        match check(unsafe { libc::unlinkat(self.0.as_raw_fd(), name.as_ptr(), 0) }) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Directory {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}
