//! Output: where the entrypoint's streams and the kernel's messages go, and the 8250 serial port
//! that carries the kernel's messages.
//!
//! The vsock device writes each of the entrypoint's streams into a socket pair. One thread per stream
//! reads from it and writes to the sink, so that a slow reader of mote's stdout slows down that stream
//! and nothing else. A thread ends at end of file, when everything has been written: nothing is
//! lost at exit.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::log;
use crate::plan::ConsoleFile;
use crate::sys::{self, Interest};

/// What the kernel prints first when it gives up (kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing: ";
/// Most bytes of the kernel's messages in the file of `--log`, which the guest's root can write as well.
const LOG_LIMIT_BYTES: u64 = 1 << 20;
/// Longest line, in bytes, that is searched as a whole; the kernel's own limit is 1,024.
const MAX_LINE: usize = 1024;

/// Where output goes.
#[derive(Debug)]
pub struct Sinks {
    /// The entrypoint's standard output.
    pub stdout: Sink,
    /// The entrypoint's standard error.
    pub stderr: Sink,
    /// Kernel messages.
    pub kernel: Sink,
}

impl Sinks {
    /// mote's own streams, with the kernel where mote's messages go. A log of these gets only so much from a guest.
    ///
    /// # Errors
    /// The host has no descriptor.
    pub fn of_mote() -> Result<Sinks> {
        let mut kernel = Sink::of_mote(&log::target())?;
        if log::is_file() {
            let told = format!(
                "the kernel's messages have {LOG_LIMIT_BYTES} bytes, the limit of --log; the rest of them is lost"
            );
            kernel = Sink::new(kernel.file, LOG_LIMIT_BYTES, told).context("look at the log")?;
        }
        let (stdout, stderr) = (Sink::of_mote(&io::stdout())?, Sink::of_mote(&io::stderr())?);
        Ok(Sinks { stdout, stderr, kernel })
    }

    /// One file for all: `console_output`, created 0600, or emptied (contract §2.5). Gives up when `stop` is
    /// readable.
    ///
    /// # Errors
    /// The file cannot be created or emptied, or the host has no descriptor.
    pub fn file(ConsoleFile { file, limit_bytes }: &ConsoleFile, stop: &File) -> Result<Sinks> {
        let told = format!(
            "console_output has {limit_bytes} bytes, its limit (console_limit_bytes); the rest of the guest's output is lost"
        );
        let opened = file
            .open(Some(stop))
            .and_then(|opened| Sink::new(opened, *limit_bytes, told))
            .with_context(|| format!("console_output: create {}", file.path.display()))?;
        // Appending: the three writers never overwrite each other.
        let sink = || {
            let file = opened.file.try_clone().context("duplicate the console file")?;
            Ok::<_, anyhow::Error>(Sink { file, limit: opened.limit.clone() })
        };
        Ok(Sinks { stdout: sink()?, stderr: sink()?, kernel: sink()? })
    }

    /// Other processes' ends for the entrypoint's streams. The kernel's messages go to mote's stderr, at most
    /// this many bytes.
    ///
    /// # Errors
    /// The host has no descriptor.
    pub fn of_others([stdout, stderr]: [OwnedFd; 2], kernel_limit_bytes: u64) -> Result<Sinks> {
        let told = format!(
            "the kernel's messages have {kernel_limit_bytes} bytes, the limit of each log (max-size times max-file); the rest of them is lost"
        );
        let kernel = Sink::of_mote(&log::target())?;
        let kernel = Sink::new(kernel.file, kernel_limit_bytes, told).context("look at stderr")?;
        let [stdout, stderr] =
            [stdout, stderr].map(|fd| Sink { file: File::from(fd), limit: None });
        Ok(Sinks { stdout, stderr, kernel })
    }
}

/// Where one stream goes.
#[derive(Debug)]
pub struct Sink {
    file: File,
    /// Shared by all that write to the file.
    limit: Option<Arc<Limit>>,
}

impl Sink {
    /// A file that gets at most so many bytes, if it is a regular one: others keep nothing that fills a disk.
    /// What is told when it has them is one line.
    fn new(file: File, limit_bytes: u64, told: String) -> io::Result<Sink> {
        let is_kept = file.metadata()?.is_file();
        Ok(Sink { file, limit: is_kept.then(|| Arc::new(Limit::new(limit_bytes, told))) })
    }

    /// What is written is lost.
    ///
    /// # Errors
    /// There is no /dev/null.
    pub fn nowhere() -> Result<Sink> {
        let file = File::options().write(true).open("/dev/null").context("open /dev/null")?;
        Ok(Sink { file, limit: None })
    }

    fn of_mote(stream: &impl AsFd) -> Result<Sink> {
        let file = stream.as_fd().try_clone_to_owned().map(File::from);
        Ok(Sink { file: file.context("duplicate mote's own output streams")?, limit: None })
    }

    /// Writes everything, even if the descriptor does not wait: another process may have made it so, since
    /// mote shares its stdout with the process that started it. Beyond the limit nothing is written.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = self.limit.as_ref().map_or(bytes.len(), |limit| limit.take(bytes.len()));
        write_patiently(&self.file, &bytes[..room])
    }
}

/// Writes everything, however long that takes.
///
/// # Errors
/// Those of write(2), but for those that say to try again.
pub fn write_patiently(mut file: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let _ = sys::poll([Interest::write(file)], None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// How much more a file may get from its writers.
#[derive(Debug)]
struct Limit {
    left: AtomicU64,
    told: String,
    is_told: AtomicBool,
}

impl Limit {
    fn new(bytes: u64, told: String) -> Limit {
        Limit { left: AtomicU64::new(bytes), told, is_told: AtomicBool::new(false) }
    }

    /// How many of so many bytes may still be written. The first that may not are told of.
    fn take(&self, wanted: usize) -> usize {
        let less = |left: u64| Some(left.saturating_sub(wanted as u64));
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        let (Ok(left) | Err(left)) = left;
        let taken = usize::try_from(left).map_or(wanted, |left| wanted.min(left));
        if taken < wanted && !self.is_told.swap(true, Ordering::Relaxed) {
            log::error(&self.told);
        }
        taken
    }
}

/// The entrypoint's input, on its way to the guest.
#[derive(Debug)]
pub struct InputStream {
    from: File,
    to: File,
}

impl InputStream {
    /// mote's own standard input, which goes into a socket.
    ///
    /// # Errors
    /// The host has no descriptor.
    pub fn of_mote(to: UnixStream) -> Result<InputStream> {
        let from = sys::standard_input().context("duplicate standard input")?;
        Ok(InputStream { from, to: OwnedFd::from(to).into() })
    }

    /// Copies to the end of the input, or until the guest takes no more. Then the guest sees the end.
    pub fn copy(mut self) {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match self.from.read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => {
                    if write_patiently(&self.to, &buffer[..read]).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another process has made it so.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let _ = sys::poll([Interest::read(&self.from)], None);
                }
                // A terminal that has gone is an end, too.
                Err(_) => return,
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
    pub to: Sink,
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
        // No buffer before there is something: most programs leave one of the streams alone.
        let _ = sys::poll([Interest::read(&from)], None);
        let mut buffer = vec![0; 64 * 1024];
        let mut failed = false;
        loop {
            let read = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            if !failed && let Err(error) = to.write_all(&buffer[..read]) {
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

/// Creates it as it was in another VM.
///
/// # Errors
/// No serial port can be like that.
pub fn resumed_console(irq: EventFd, log: KernelLog, state: &SerialState) -> Result<KernelConsole> {
    Serial::from_state(state, SerialIrq(irq), NoEvents, log)
        .map_err(|e| anyhow!("set up the serial port as it was: {e:?}"))
}

/// The message of a kernel panic, which the console sets and the main loop reads.
pub type PanicMessage = Arc<Mutex<Option<String>>>;

/// Takes the kernel's bytes, passes whole lines on, and notices a panic.
#[derive(Debug)]
pub struct KernelLog {
    line: Vec<u8>,
    to: Sink,
    panic: PanicMessage,
}

impl KernelLog {
    /// Writes to `to`, noting a panic in `panic`.
    pub fn new(to: Sink, panic: PanicMessage) -> Self {
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
        let _ = self.to.write_all(&self.line);
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

    fn sink(to: io::PipeWriter) -> Sink {
        Sink { file: File::from(std::os::fd::OwnedFd::from(to)), limit: None }
    }

    #[test]
    fn a_limit_holds_for_all_writers_together() {
        let (mut reader, writer) = io::pipe().expect("pipe");
        let limit = Some(Arc::new(Limit::new(10, String::new())));
        let file = File::from(std::os::fd::OwnedFd::from(writer));
        let other = Sink { file: file.try_clone().expect("clone"), limit: limit.clone() };
        for mut sink in [Sink { file, limit }, other] {
            sink.write_all(b"seven b").expect("written, or dropped");
        }
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("text");
        assert_eq!(text, "seven bsev");
    }

    #[test]
    fn a_panic_is_noticed_and_lines_pass_through() {
        let (mut reader, writer) = io::pipe().expect("pipe");
        let panic = PanicMessage::default();
        let mut log = KernelLog::new(sink(writer), panic.clone());
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
        let file = File::options().write(true).open("/dev/null").expect("null");
        let mut log = KernelLog::new(Sink { file, limit: None }, PanicMessage::default());
        log.write_all(&vec![b'x'; 10 * MAX_LINE]).expect("writes");
        assert!(log.line.len() < MAX_LINE);
    }

    #[test]
    fn writers_drain_everything_before_they_signal() {
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        let (mut reader, writer) = io::pipe().expect("pipe");
        let done = EventFd::new(0).expect("eventfd");
        let first = FirstOutput::default();
        let stream = OutputStream {
            name: "test",
            from: theirs,
            to: sink(writer),
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
