//! Moves a command's data: standard input to the box, the command's output to standard output and error,
//! in one loop for both directions. Each side is read only when everything read before is written, so
//! that only one piece of input and the output of one frame are held, and neither direction holds up
//! the other.
//!
//! The caller's other processes share standard input and output: so they are polled, and never made
//! non-blocking.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, anyhow};
use mote_agent::exec::Stream;

use super::channel::Channel;
use super::stop::Stop;
use crate::sys::{self, Interest};

/// The exit code when nobody reads the output: that of SIGPIPE, which would end the command itself if
/// it ran outside of a box.
const NOBODY_READS: u8 = 128 + libc::SIGPIPE as u8;

/// Where a command's input comes from and its output goes to.
#[derive(Debug)]
pub struct Stdio {
    /// Its standard input.
    pub input: File,
    /// Its standard output.
    pub output: Sink,
    /// Its standard error.
    pub error: Sink,
}

impl Stdio {
    /// The process's own standard streams.
    ///
    /// # Errors
    /// The host has no descriptor for them.
    pub fn of_process() -> io::Result<Self> {
        Ok(Stdio {
            input: File::from(io::stdin().as_fd().try_clone_to_owned()?),
            output: Sink::new(own(io::stdout().as_fd())?),
            error: Sink::new(own(io::stderr().as_fd())?),
        })
    }
}

/// Another descriptor for the same file. For a terminal, it is opened anew as non-blocking: a terminal
/// that polls as writable may have room for one byte only, and while a write waits, mote cannot handle
/// signals.
fn own(fd: BorrowedFd<'_>) -> io::Result<File> {
    if fd.is_terminal() {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        // Fails without /proc, or if another user owns the terminal: then a duplicate must do.
        if let Ok(file) = options.open(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
            return Ok(file);
        }
    }
    Ok(File::from(fd.try_clone_to_owned()?))
}

/// A file to write to in pieces that do not block.
#[derive(Debug)]
pub struct Sink {
    file: File,
    /// Most bytes to write at once when it polls as writable.
    piece: usize,
}

impl Sink {
    /// Writes to this file.
    pub fn new(file: File) -> Self {
        // A writable pipe takes PIPE_BUF bytes without waiting (pipe(7)). A regular file is always
        // writable, and many small writes would only be slow.
        let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
        Sink { file, piece: if is_file { usize::MAX } else { libc::PIPE_BUF } }
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes some of these bytes, and returns how many.
    ///
    /// # Errors
    /// The reader has gone, or the file cannot be written.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Stop> {
        match (&self.file).write(&bytes[..bytes.len().min(self.piece)]) {
            Ok(written) => Ok(written),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Ok(0)
            }
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Stop::Quiet(NOBODY_READS)),
            Err(error) => Err(anyhow::Error::new(error).context("write the output").into()),
        }
    }

    /// Writes all of these bytes, however long that takes.
    ///
    /// # Errors
    /// As for [`Sink::write`].
    pub fn write_all(&self, mut bytes: &[u8]) -> Result<(), Stop> {
        while !bytes.is_empty() {
            sys::poll([Interest::write(&self.file)], None).context("wait to write")?;
            bytes = &bytes[self.write(bytes)?..];
        }
        Ok(())
    }
}

/// Output on its way, in the order in which it came.
#[derive(Debug, Default)]
pub struct Output {
    pieces: VecDeque<(Stream, Vec<u8>)>,
    /// How much of the first piece is written.
    written: usize,
}

impl Output {
    /// Adds output.
    pub fn push(&mut self, stream: Stream, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.pieces.push_back((stream, bytes));
        }
    }

    fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    fn interest<'a>(&self, stdio: &'a Stdio) -> Interest<'a> {
        match self.pieces.front() {
            Some((Stream::Stdout, _)) => Interest::write(&stdio.output.file),
            Some((Stream::Stderr, _)) => Interest::write(&stdio.error.file),
            None => Interest::NONE,
        }
    }

    fn write(&mut self, stdio: &Stdio) -> Result<(), Stop> {
        let Some((stream, bytes)) = self.pieces.front() else { return Ok(()) };
        let sink = match stream {
            Stream::Stdout => &stdio.output,
            Stream::Stderr => &stdio.error,
        };
        self.written += sink.write(&bytes[self.written..])?;
        if self.written == bytes.len() {
            self.pieces.pop_front();
            self.written = 0;
        }
        Ok(())
    }
}

/// What the frames of a command's connection mean.
pub trait Session {
    /// Most bytes of input in one frame.
    const INPUT_PIECE: usize;

    /// Sends input; an empty piece means the end of the input.
    fn input(&mut self, bytes: &[u8], channel: &mut Channel);

    /// Takes a frame in, and returns the exit code if it is the last.
    ///
    /// # Errors
    /// The frame says that the command cannot run, or makes no sense.
    fn frame(&mut self, kind: u8, payload: &[u8], output: &mut Output) -> Result<Option<u8>, Stop>;

    /// Handles a signal.
    ///
    /// # Errors
    /// The signal ends the session.
    fn signal(&mut self, number: i32, channel: &mut Channel) -> Result<(), Stop>;
}

/// Moves data until the command has ended and its output is written; returns its exit code. Signals
/// from `signals` go to [`Session::signal`].
///
/// # Errors
/// The connection ends before the command does, or a signal ends the session.
pub fn relay<S: Session>(
    session: &mut S,
    mut channel: Channel,
    stdio: &Stdio,
    signals: Option<&File>,
) -> Result<u8, Stop> {
    let mut output = Output::default();
    let mut code = None;
    let mut input_ended = false;
    let mut piece = vec![0; S::INPUT_PIECE];
    loop {
        while code.is_none() && output.is_empty() {
            let Some((kind, payload)) = channel.next_frame()? else { break };
            code = session.frame(kind, payload, &mut output)?;
        }
        if let (Some(code), true) = (code, output.is_empty()) {
            return Ok(code);
        }
        let receiving = output.is_empty();
        let sending = channel.is_sending();
        let taking = !input_ended && !sending && !channel.is_refused() && code.is_none();
        let [peer, input, writable, signal] = sys::poll(
            [
                Interest::new(&channel, receiving, sending),
                Interest::new(&stdio.input, taking, false),
                output.interest(stdio),
                signals.map_or(Interest::NONE, Interest::read),
            ],
            None,
        )
        .context("wait for the box, input and output")?;
        if signal && let Some(number) = signals.and_then(sys::next_signal) {
            session.signal(number, &mut channel)?;
        }
        if writable {
            output.write(stdio)?;
        }
        if input {
            match (&stdio.input).read(&mut piece) {
                Ok(read) => {
                    input_ended = read == 0;
                    session.input(&piece[..read], &mut channel);
                }
                // Another process has read the input first.
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => {
                    return Err(anyhow::Error::new(error).context("read standard input").into());
                }
            }
        }
        if peer {
            channel.flush();
            if receiving && !channel.receive()? {
                return Err(Stop::Failed(anyhow!(
                    "the box ended, or its agent died, before the command's exit code arrived"
                )));
            }
        }
    }
}
