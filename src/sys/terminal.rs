//! Terminals: their modes and sizes.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::fs::File;
use std::io::{self, IsTerminal};
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::AsRawFd;

use super::check;

/// The settings of a terminal (termios(3)).
#[derive(Debug, Clone, Copy)]
pub struct TerminalMode(libc::termios);

impl TerminalMode {
    /// The settings that a terminal has.
    ///
    /// # Errors
    /// Those of tcgetattr(3); ENOTTY for what is no terminal.
    pub fn of(terminal: &impl AsRawFd) -> io::Result<Self> {
        let mut mode = MaybeUninit::uninit();
        // SAFETY: tcgetattr fills the structure when it succeeds, and only then is it looked at.
        unsafe {
            check(libc::tcgetattr(terminal.as_raw_fd(), mode.as_mut_ptr()))?;
            Ok(TerminalMode(mode.assume_init()))
        }
    }

    /// These settings changed so that every key arrives as it is, at once, and is not echoed.
    pub fn raw(mut self) -> Self {
        // SAFETY: the pointer is to an initialised termios.
        unsafe { libc::cfmakeraw(&mut self.0) };
        self
    }

    /// Gives a terminal these settings.
    ///
    /// # Errors
    /// Those of tcsetattr(3).
    pub fn apply(&self, terminal: &impl AsRawFd) -> io::Result<()> {
        // SAFETY: tcsetattr reads a termios, which the pointer is to.
        check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &self.0) })?;
        Ok(())
    }
}

/// A terminal in raw mode; dropping it restores the earlier mode.
#[derive(Debug)]
pub struct RawMode<'a> {
    terminal: &'a File,
    before: TerminalMode,
}

impl<'a> RawMode<'a> {
    /// `None` for a file that is no terminal.
    ///
    /// # Errors
    /// Those of tcsetattr(3).
    pub fn enter(terminal: &'a File) -> io::Result<Option<Self>> {
        if !terminal.is_terminal() {
            return Ok(None);
        }
        let before = TerminalMode::of(terminal)?;
        before.raw().apply(terminal)?;
        Ok(Some(RawMode { terminal, before }))
    }
}

impl Drop for RawMode<'_> {
    fn drop(&mut self) {
        // Fails only if the terminal has gone, and then nothing needs to be restored.
        let _ = self.before.apply(self.terminal);
    }
}

/// What stands for the size of a terminal that nobody has.
pub const DEFAULT_SIZE: TerminalSize = TerminalSize { cols: 80, rows: 24 };

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A terminal's size; `None` for anything else, and for a terminal that does not know.
pub fn terminal_size(terminal: &impl AsRawFd) -> Option<TerminalSize> {
    // SAFETY: an all-zero winsize is valid.
    let mut size: libc::winsize = unsafe { zeroed() };
    // SAFETY: TIOCGWINSZ writes a winsize, which the pointer is to.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) }).ok()?;
    (size.ws_col > 0 && size.ws_row > 0)
        .then_some(TerminalSize { cols: size.ws_col, rows: size.ws_row })
}

/// Both ends of a new pseudo-terminal: the side of keyboard and screen, and the side that programs use. Neither goes to
/// programs that this process executes.
///
/// # Errors
/// Those of openpty(3).
pub fn pseudo_terminal(TerminalSize { cols, rows }: TerminalSize) -> io::Result<(File, File)> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: openpty writes two descriptors and reads a winsize; null asks for no name and for the
    // usual settings.
    check(unsafe {
        libc::openpty(
            &mut master,
            &mut slave,
            std::ptr::null_mut(),
            std::ptr::null(),
            &raw const size,
        )
    })?;
    let (master, slave) = (super::owned(master), super::owned(slave));
    super::close_on_exec(&master)?;
    super::close_on_exec(&slave)?;
    Ok((master.into(), slave.into()))
}
