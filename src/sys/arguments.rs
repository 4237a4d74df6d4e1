//! The command line as other users see it (/proc/PID/cmdline, ps(1)), which is this process's memory.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::os::unix::ffi::OsStrExt;
use std::ptr;

unsafe extern "C" {
    /// glibc's copy of `argv[0]` (program_invocation_name(3)).
    static program_invocation_name: *mut libc::c_char;
}

/// Shows these words in place of the arguments, in /proc/PID/cmdline, and zeros behind them. They must be shorter together.
/// Nothing may ask for the arguments any more. Must be called before there are threads. Returns whether it could.
pub fn replace(words: &[&[u8]]) -> bool {
    let words: Vec<u8> = words.iter().flat_map(|word| word.iter().chain(&[0])).copied().collect();
    let mut arguments = Vec::new();
    for argument in std::env::args_os() {
        arguments.extend_from_slice(argument.as_bytes());
        arguments.push(0);
    }
    // SAFETY: glibc sets the pointer before `main`, and nothing changes it.
    let at: *mut u8 = unsafe { program_invocation_name }.cast();
    // SAFETY: as in `erase`, which looks at the same bytes in the same order: reading stops at the first that differs.
    let is_there =
        unsafe { arguments.iter().enumerate().all(|(index, byte)| *at.add(index) == *byte) };
    if !is_there || words.len() > arguments.len() {
        return false;
    }
    // SAFETY: all these bytes have just been read; the initial stack is writable, and nobody looks there any more.
    unsafe {
        ptr::copy_nonoverlapping(words.as_ptr(), at, words.len());
        ptr::write_bytes(at.add(words.len()), 0, arguments.len() - words.len());
    }
    true
}

/// Overwrites every argument that ends with this text by zeros, so that nobody reads it in
/// /proc/PID/cmdline; processes that are forked afterwards show zeros too. Must be called before there
/// are threads. Returns whether there was such an argument.
pub fn erase(text: &str) -> bool {
    let mut erased = false;
    // SAFETY: glibc sets the pointer before `main`, and nothing changes it.
    let mut at: *mut u8 = unsafe { program_invocation_name }.cast();
    for argument in std::env::args_os() {
        let argument = argument.as_bytes();
        // The kernel puts the arguments one after the other, each with a NUL behind it (fs/exec.c). That
        // it is so is looked at before anything is written.
        // SAFETY: `at` is the start of a string on the initial stack: the first argument, or what comes
        // after an argument, which is another string at least (the program's file name ends that area).
        // Reading stops at the first byte that differs, so at the string's NUL at the latest.
        let is_there = unsafe {
            argument.iter().chain(&[0]).enumerate().all(|(index, byte)| *at.add(index) == *byte)
        };
        if !is_there {
            return false;
        }
        if !text.is_empty() && argument.ends_with(text.as_bytes()) {
            // SAFETY: the bytes have just been read; the initial stack is writable, and std's own view
            // of the arguments, which has no references to them, is used by this thread alone.
            unsafe { ptr::write_bytes(at, 0, argument.len()) };
            erased = true;
        }
        // SAFETY: the NUL has just been read, and another string follows.
        at = unsafe { at.add(argument.len() + 1) };
    }
    erased
}
