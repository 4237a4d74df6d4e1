//! A container's terminal: made here, used by mote or by the relay of an exec, and shown by the engine, which gets the
//! other side of it over its console socket.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::sys::container;
use crate::sys::terminal::{self, DEFAULT_SIZE, TerminalSize};

/// Refuses a console socket without a terminal, and a terminal that nobody would see.
///
/// # Errors
/// In words that runc has, too.
pub fn check(terminal: bool, socket: Option<&Path>, has_own: bool) -> Result<()> {
    match (terminal, socket) {
        (true, None) if !has_own => bail!(
            "cannot allocate tty if runc will detach without setting console socket: process.terminal is true, so give --console-socket"
        ),
        (false, Some(_)) => bail!(
            "cannot use console socket if runc will not detach or allocate tty: process.terminal is false, so leave --console-socket out"
        ),
        _ => Ok(()),
    }
}

/// Makes a terminal and gives the engine its side. Returns the side that programs use.
///
/// # Errors
/// Nobody takes it.
pub fn open(socket: &Path, size: Option<TerminalSize>) -> Result<File> {
    let made = terminal::pseudo_terminal(size.unwrap_or(DEFAULT_SIZE));
    let (master, slave) = made.context("make a terminal")?;
    let name = container::terminal_path(&slave).context("name the terminal")?;
    let connected = UnixStream::connect(socket);
    let connected =
        connected.with_context(|| format!("connect to the console socket {}", socket.display()))?;
    // The whole conversation is one message: the descriptor, with the terminal's name as text.
    container::send_descriptor(&connected, &master, name.as_os_str().as_bytes())
        .with_context(|| format!("send the terminal over {}", socket.display()))?;
    Ok(slave)
}

/// Makes a terminal this session's, and its standard streams. The process must lead a session without one.
///
/// # Errors
/// The kernel refuses.
pub fn adopt(terminal: &File) -> Result<()> {
    container::take_terminal(terminal).context("take the terminal for this session")?;
    container::use_as_standard_streams(terminal).context("use the terminal as standard streams")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_engine_gets_the_terminals_name() {
        let path = std::env::temp_dir().join(format!("mote-oci-console-{}", std::process::id()));
        let listener = UnixListener::bind(&path).expect("binds");
        let size = Some(TerminalSize { cols: 100, rows: 30 });
        let slave = open(&path, size).expect("opened");
        assert_eq!(sys::terminal::terminal_size(&slave), size);
        let mut name = String::new();
        listener.accept().expect("a client").0.read_to_string(&mut name).expect("read");
        assert!(name.starts_with("/dev/pts/"), "{name}");
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn a_terminal_and_a_socket_go_together() {
        let socket = Some(Path::new("/s"));
        for (terminal, socket, has_own, is_right) in [
            (true, socket, false, true),
            (true, None, false, false),
            (true, None, true, true),
            (false, None, false, true),
            (false, socket, false, false),
        ] {
            assert_eq!(check(terminal, socket, has_own).is_ok(), is_right);
        }
    }
}
