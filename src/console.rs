//! Output: where the entrypoint's streams and the kernel's messages go, and the 8250 serial port
//! that carries the kernel's messages.
//!
//! The vsock device writes each of the entrypoint's streams into a socket pair. One thread per stream
//! reads from it and writes to the sink, so that a slow reader of mote's stdout slows down that stream
//! and nothing else. A thread ends at end of file, when everything has been written: nothing is
//! lost at exit.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::log;
use crate::output_file::OutputFile;
use crate::sys::{self, Interest};

/// What the kernel prints first when it gives up (kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing: ";
/// Longest line, in bytes, that is searched as a whole; the kernel's own limit is 1,024.
const MAX_LINE: usize = 1024;

/// Where output goes.
#[derive(Debug)]
pub struct Sinks {
    /// The entrypoint's standard output.
    pub stdout: File,
    /// The entrypoint's standard error.
    pub stderr: File,
    /// Kernel messages.
    pub kernel: File,
}

impl Sinks {
    /// Opens `console_output` (created 0600, or emptied; contract §2.5) or mote's own streams. Gives up
    /// when `stop` is readable.
    ///
    /// # Errors
    /// The file cannot be created or emptied, or the host has no descriptor.
    pub fn open(console_output: Option<&OutputFile>, stop: &File) -> Result<Sinks> {
        match console_output {
            Some(output) => {
                // Appending: the three writers never overwrite each other.
                let file = output
                    .open(Some(stop))
                    .with_context(|| format!("console_output: create {}", output.path.display()))?;
                let copy = || file.try_clone().context("duplicate the console file");
                Ok(Sinks { stdout: copy()?, stderr: copy()?, kernel: file })
            }
            None => {
                let duplicate = |fd: io::Result<std::os::fd::OwnedFd>| {
                    fd.map(File::from).context("duplicate mote's own output streams")
                };
                Ok(Sinks {
                    stdout: duplicate(io::stdout().as_fd().try_clone_to_owned())?,
                    stderr: duplicate(io::stderr().as_fd().try_clone_to_owned())?,
                    kernel: duplicate(io::stderr().as_fd().try_clone_to_owned())?,
                })
            }
        }
    }
}

/// When the guest's first byte of output was written, for the timeline.
pub type FirstOutput = Arc<OnceLock<Instant>>;

/// One of the guest's output streams, on its way to its sink.
#[derive(Debug)]
pub struct OutputStream {
    /// `stdout` or `stderr`.
    pub name: &'static str,
    /// Where its bytes come from.
    pub from: UnixStream,
    /// Where they go.
    pub to: File,
    /// Set when the first byte is written.
    pub first_output: FirstOutput,
    /// Written to once, when all bytes have been written.
    pub done: EventFd,
}

impl OutputStream {
    /// Copies until end of file, on a thread of its own. A sink that fails is logged once, and the rest
    /// of the stream is dropped.
    pub fn copy(self) {
        let OutputStream { name, mut from, mut to, first_output, done } = self;
        let mut buffer = vec![0; 64 * 1024];
        let mut failed = false;
        loop {
            let read = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            if !failed && let Err(error) = write_all(&mut to, &buffer[..read]) {
                failed = true;
                log::error(&format!(
                    "{name}: write the guest's output: {error}; the rest of it is lost"
                ));
            }
            first_output.get_or_init(Instant::now);
        }
        // Fails only if the counter overflows: there are two writes at most.
        let _ = done.write(1);
    }
}

/// Writes everything, even if another process has made the descriptor non-blocking: mote shares its
/// stdout with the process that started it.
fn write_all(to: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let _ = sys::poll([Interest::write(to)], None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The serial port's interrupt line.
#[derive(Debug)]
pub struct SerialIrq(pub EventFd);

impl Trigger for SerialIrq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The 8250 serial port: kernel messages out, nothing in.
pub type KernelConsole = Serial<SerialIrq, NoEvents, KernelLog>;

/// Creates the serial port.
pub fn kernel_console(irq: EventFd, log: KernelLog) -> KernelConsole {
    Serial::new(SerialIrq(irq), log)
}

/// The message of a kernel panic, which the console sets and the main loop reads.
pub type PanicMessage = Arc<Mutex<Option<String>>>;

/// Takes the kernel's bytes, passes whole lines on, and notices a panic.
#[derive(Debug)]
pub struct KernelLog {
    line: Vec<u8>,
    to: File,
    panic: PanicMessage,
}

impl KernelLog {
    /// Writes to `to`, noting a panic in `panic`.
    pub fn new(to: File, panic: PanicMessage) -> Self {
        KernelLog { line: Vec::new(), to, panic }
    }

    fn finish_line(&mut self) {
        let text = String::from_utf8_lossy(&self.line);
        if let Some((_, reason)) = text.split_once(PANIC) {
            let mut panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            panic.get_or_insert_with(|| reason.trim_end().to_owned());
        }
        // If writing fails, the guest must not stop. A full pipe slows the guest down, like a real
        // serial line.
        let _ = write_all(&mut self.to, &self.line);
        self.line.clear();
    }
}

impl Write for KernelLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            // The kernel's console writes \r\n; the log is a text file.
            if *byte != b'\r' {
                self.line.push(*byte);
            }
            if *byte == b'\n' || self.line.len() >= MAX_LINE {
                self.finish_line();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_noticed_and_lines_pass_through() {
        let (mut reader, writer) = io::pipe().expect("pipe");
        let panic = PanicMessage::default();
        let mut log = KernelLog::new(File::from(std::os::fd::OwnedFd::from(writer)), panic.clone());
        for byte in b"[    1.0] hello\r\n[    2.0] Kernel panic - not syncing: no root\r\n" {
            log.write_all(&[*byte]).expect("writes");
        }
        drop(log);
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("text");
        assert_eq!(text, "[    1.0] hello\n[    2.0] Kernel panic - not syncing: no root\n");
        assert_eq!(panic.lock().expect("lock").as_deref(), Some("no root"));
    }

    #[test]
    fn an_endless_line_is_bounded() {
        let null = File::options().write(true).open("/dev/null").expect("null");
        let mut log = KernelLog::new(null, PanicMessage::default());
        log.write_all(&vec![b'x'; 10 * MAX_LINE]).expect("writes");
        assert!(log.line.len() < MAX_LINE);
    }

    #[test]
    fn writers_drain_everything_before_they_signal() {
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        let (mut reader, writer) = io::pipe().expect("pipe");
        let done = EventFd::new(0).expect("eventfd");
        let sink = File::from(std::os::fd::OwnedFd::from(writer));
        let first = FirstOutput::default();
        let stream = OutputStream {
            name: "test",
            from: theirs,
            to: sink,
            first_output: first.clone(),
            done: done.try_clone().expect("clone"),
        };
        std::thread::spawn(|| stream.copy());
        ours.write_all(b"last words").expect("writes");
        drop(ours);
        assert_eq!(done.read().expect("signal"), 1);
        assert!(first.get().is_some());
        let mut text = [0; 10];
        reader.read_exact(&mut text).expect("text");
        assert_eq!(&text, b"last words");
    }
}
