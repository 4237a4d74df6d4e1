//! The process that writes a box's logs. It is a child of mote's, which may write nothing but what it is given
//! and, confined, could not put full logs away.
//!
//! ```text
//! mote       output threads ── a socket pair for each stream ┐
//! mote-logs                  files of both streams, container.json or syslog
//! ```
//!
//! It ends when mote's ends of the sockets are closed, however that came about, and all that was in them is
//! written. It is confined, too: it may make and rename files in the logs' directory, and nothing else.

mod json_file;
mod lines;

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};

use super::helper;
use crate::confine::{self, Isolation};
use crate::console::{Sinks, write_patiently};
use crate::log::{self, LogOnce};
use crate::output_file::OutputFile;
use crate::plan::{JsonFile, LogDriver, Logs, Syslog};
use crate::sys::{self, Interest};
pub use json_file::rfc3339;
use json_file::{JsonLog, len_of_log};
use lines::Lines;

/// How long mote waits at its end for what is still to be written, or packed: as long as a disk may take that
/// is busy, and not for one that is gone.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// A box's logs. Dropping it closes them, and waits until they are written.
#[derive(Debug)]
pub struct LogWriter {
    pid: u32,
    /// mote's ends: stdout's, on which the process answers once, and stderr's.
    streams: [UnixStream; 2],
    limit_bytes: u64,
}

impl LogWriter {
    /// Opens the files and starts the process. Must be called before there are threads. Gives up when `stop` is
    /// readable.
    ///
    /// # Errors
    /// A file cannot be opened, or the host refuses a process or a descriptor.
    pub fn start(logs: &Logs, isolation: Isolation, stop: &File) -> Result<LogWriter> {
        let mut streams = Vec::new();
        let mut pairs = Vec::new();
        for (name, file) in [("stdout", &logs.stdout), ("stderr", &logs.stderr)] {
            let (ours, from) = UnixStream::pair().context("create a socket pair")?;
            pairs.push(ours);
            let to = ConsoleLog::open(file, logs.limit_bytes, stop)?;
            streams.push(Stream { name, from, is_over: false, to, lines: Lines::default() });
        }
        let streams: [Stream; 2] = streams.try_into().map_err(|_| anyhow!("two streams"))?;
        let driver = Driver::open(&logs.driver)?;
        let files = streams.iter().flat_map(|s| [s.from.as_raw_fd(), s.to.file.as_raw_fd()]);
        let keep: Vec<RawFd> =
            files.chain(driver.descriptors()).chain([log::descriptor()]).collect();
        let mut writer = Some(Writer { streams, driver });
        let pid = sys::process::start_detached(c"mote-logs", &keep, || {
            if let Some(writer) = writer.take() {
                writer.work(isolation);
            }
        })
        .context("start the process that writes logs")?;
        let streams = pairs.try_into().map_err(|_| anyhow!("two streams"))?;
        Ok(LogWriter { pid, streams, limit_bytes: logs.limit_bytes })
    }

    /// Where the guest's output goes then.
    ///
    /// # Errors
    /// The host has no descriptor.
    pub fn sinks(&self) -> Result<Sinks> {
        let [stdout, stderr] = &self.streams;
        let duplicate = |stream: &UnixStream| {
            let stream = stream.try_clone().context("duplicate a log's socket")?;
            Ok::<_, anyhow::Error>(OwnedFd::from(stream))
        };
        Sinks::of_others([duplicate(stdout)?, duplicate(stderr)?], self.limit_bytes)
    }

    /// Waits until the process is confined, or `stop` is readable.
    ///
    /// # Errors
    /// It could not be confined, or could not work then.
    pub fn wait_until_confined(&self, stop: &File) -> Result<()> {
        helper::wait_until_confined("that writes logs", &self.streams[0], stop)
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        // Other threads may have duplicates.
        for stream in &self.streams {
            let _ = stream.shutdown(Shutdown::Write);
        }
        sys::process::reap(self.pid, WRITE_LIMIT);
    }
}

/// What the process has.
#[derive(Debug)]
struct Writer {
    streams: [Stream; 2],
    driver: Driver,
}

/// One of the entrypoint's streams.
#[derive(Debug)]
struct Stream {
    name: &'static str,
    from: UnixStream,
    is_over: bool,
    to: ConsoleLog,
    lines: Lines,
}

impl Writer {
    /// All that the process does.
    fn work(mut self, isolation: Isolation) {
        let directory = match &self.driver {
            Driver::JsonFile(log) => Some(log.directory()),
            Driver::Syslog(_) | Driver::None => None,
        };
        let confined = confine::confine_log_writer(isolation, directory)
            .and_then(|()| self.driver.check().context("make files beside container.json"));
        if !helper::tell(&self.streams[0].from, confined.as_ref().err()) || confined.is_err() {
            return;
        }
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let waiting = self.streams.each_ref().map(|stream| {
                if stream.is_over { Interest::NONE } else { Interest::read(&stream.from) }
            });
            if self.streams.iter().all(|stream| stream.is_over) {
                break;
            }
            let Ok(ready) = sys::poll(waiting, None) else { break };
            for (stream, _) in self.streams.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
                stream.pass_on(&mut buffer, &mut self.driver);
            }
        }
        self.driver.flush();
    }
}

impl Stream {
    fn pass_on(&mut self, buffer: &mut [u8], driver: &mut Driver) {
        let Stream { name, from, is_over, to, lines } = self;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = |line: &[u8]| driver.add(line, name, now);
        match from.read(buffer) {
            Ok(read @ 1..) => {
                to.write(&buffer[..read], name);
                lines.take(&buffer[..read], line);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => {
                *is_over = true;
                lines.finish(line);
            }
        }
        driver.flush();
    }
}

/// The file that gets a stream's bytes as they are.
#[derive(Debug)]
struct ConsoleLog {
    file: File,
    /// Bytes in it.
    len: u64,
    /// With more it is emptied.
    limit_bytes: u64,
    failed: bool,
}

impl ConsoleLog {
    fn open(file: &OutputFile, limit_bytes: u64, stop: &File) -> Result<ConsoleLog> {
        let open = || {
            let file = file.append(Some(stop))?;
            let len = len_of_log(&file)?;
            Ok::<_, io::Error>(ConsoleLog { file, len, limit_bytes, failed: false })
        };
        open().with_context(|| format!("console_output: open {}", file.path.display()))
    }

    /// Writes, after it has emptied a file that would become too long. One that fails is given up.
    fn write(&mut self, mut bytes: &[u8], name: &str) {
        if self.failed {
            return;
        }
        if self.len + bytes.len() as u64 > self.limit_bytes && self.file.set_len(0).is_ok() {
            self.len = 0;
            let most = usize::try_from(self.limit_bytes).unwrap_or(usize::MAX);
            bytes = &bytes[bytes.len().saturating_sub(most)..];
        }
        self.len += bytes.len() as u64;
        if let Err(error) = write_patiently(&self.file, bytes) {
            self.failed = true;
            log::error(&format!(
                "{name}: write the guest's output: {error}; the rest of it is lost"
            ));
        }
    }
}

/// What gets the lines.
#[derive(Debug)]
enum Driver {
    JsonFile(JsonLog),
    Syslog(SyslogSocket),
    None,
}

#[derive(Debug)]
struct SyslogSocket {
    socket: UdpSocket,
    to: Syslog,
    complaint: LogOnce,
}

/// Most bytes of a message to syslog: what a UDP datagram can hold, over IPv4.
const MAX_MESSAGE: usize = 65_507;

impl Driver {
    fn open(driver: &LogDriver) -> Result<Driver> {
        match driver {
            LogDriver::None => Ok(Driver::None),
            LogDriver::JsonFile(JsonFile { file, max_bytes, max_files }) => {
                let name = file.path.file_name().unwrap_or_default().to_string_lossy();
                let log = file.directory().and_then(|directory| {
                    JsonLog::open(directory, name.into_owned(), *max_bytes, *max_files)
                });
                let log = log.with_context(|| format!("log_config: open {}", file.path.display()));
                Ok(Driver::JsonFile(log?))
            }
            LogDriver::Syslog(to) => {
                let connect = || {
                    let socket = match to.address.is_ipv6() {
                        true => UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)),
                        false => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)),
                    }?;
                    socket.connect(to.address)?;
                    socket.set_nonblocking(true)?;
                    Ok::<_, io::Error>(socket)
                };
                let socket = connect().with_context(|| {
                    format!("log_config.options.syslog-address: reach {}", to.address)
                })?;
                let complaint = LogOnce::default();
                Ok(Driver::Syslog(SyslogSocket { socket, to: to.clone(), complaint }))
            }
        }
    }

    fn descriptors(&self) -> Vec<RawFd> {
        match self {
            Driver::JsonFile(log) => vec![log.directory().as_raw_fd(), log.file().as_raw_fd()],
            Driver::Syslog(syslog) => vec![syslog.socket.as_raw_fd()],
            Driver::None => Vec::new(),
        }
    }

    /// Checks that it can do all that it will have to.
    fn check(&self) -> io::Result<()> {
        match self {
            Driver::JsonFile(log) => log.check_directory(),
            Driver::Syslog(_) | Driver::None => Ok(()),
        }
    }

    /// Takes a line of this stream.
    fn add(&mut self, line: &[u8], stream: &str, now: Duration) {
        match self {
            Driver::JsonFile(log) => log.add(line, stream, now),
            Driver::Syslog(SyslogSocket { socket, to, complaint }) => {
                let mut message = format!("<{}>{}: ", to.priority, to.tag).into_bytes();
                message.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
                message.truncate(MAX_MESSAGE);
                if let Err(error) = socket.send(&message) {
                    complaint.error(&format!(
                        "syslog: send to {}: {error}; lines are lost while it does not take them",
                        to.address
                    ));
                }
            }
            Driver::None => {}
        }
    }

    /// Writes all that has been added.
    fn flush(&mut self) {
        if let Driver::JsonFile(log) = self {
            log.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::path::PathBuf;

    use crate::plan::Syslog;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let dir =
                std::env::temp_dir().join(format!("mote-writer-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).expect("directory");
            Scratch(dir)
        }

        fn file(&self, name: &str) -> OutputFile {
            OutputFile::new(&self.0.join(name), Some(&[]))
        }

        /// What a box with these logs leaves, whose streams were these.
        fn written(
            &self,
            limit_bytes: u64,
            driver: LogDriver,
            stdout: &[&str],
            stderr: &str,
        ) -> [String; 2] {
            let logs = Logs {
                stdout: self.file("console.log"),
                stderr: self.file("console.err.log"),
                limit_bytes,
                driver,
            };
            let never = sys::signal_file(&[]).expect("a file");
            // Not confined: a test's thread has a heap of its own, for which glibc opens files.
            let writer = LogWriter::start(&logs, Isolation::Off, &never).expect("started");
            writer.wait_until_confined(&never).expect("confined");
            for text in stdout {
                (&writer.streams[0]).write_all(text.as_bytes()).expect("written");
            }
            (&writer.streams[1]).write_all(stderr.as_bytes()).expect("written");
            drop(writer);
            ["console.log", "console.err.log"].map(|name| self.text(name))
        }

        fn text(&self, name: &str) -> String {
            fs::read_to_string(self.0.join(name)).expect(name)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn lines_are_written_and_full_logs_put_away() {
        let scratch = Scratch::new("json");
        let driver = LogDriver::JsonFile(JsonFile {
            file: scratch.file("container.json"),
            max_bytes: 1,
            max_files: 3,
        });
        let [out, err] = scratch.written(1 << 20, driver, &["a\nb\nc\n"], "tail");
        assert_eq!((out.as_str(), err.as_str()), ("a\nb\nc\n", "tail"));
        let mut names: Vec<_> = fs::read_dir(&scratch.0).expect("directory").flatten().collect();
        names.sort_by_key(fs::DirEntry::file_name);
        let names: Vec<_> = names.iter().map(fs::DirEntry::file_name).collect();
        assert_eq!(
            names,
            [
                "console.err.log",
                "console.log",
                "container.json",
                "container.json.1.gz",
                "container.json.2.gz"
            ]
        );
        assert_eq!(scratch.text("container.json"), "");
    }

    #[test]
    fn console_files_are_appended_to_and_emptied_when_they_are_full() {
        let scratch = Scratch::new("console");
        for expected in ["12345678", "1234567812345678", "12345678"] {
            let [out, _] = scratch.written(20, LogDriver::None, &["12345678"], "");
            assert_eq!(out, expected);
        }
        let [out, _] = scratch.written(5, LogDriver::None, &["12345678"], "");
        assert_eq!(out, "45678");
        assert!(!scratch.0.join("container.json").exists());
    }

    #[test]
    fn syslog_gets_each_line_with_priority_and_tag() {
        let scratch = Scratch::new("syslog");
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let address = server.local_addr().expect("an address");
        let driver = LogDriver::Syslog(Syslog { address, priority: 30, tag: "web".into() });
        scratch.written(1 << 20, driver, &["one\ntw", "o\n"], "");
        let mut buffer = [0; 64];
        for expected in ["<30>web: one", "<30>web: two"] {
            let len = server.recv(&mut buffer).expect("a message");
            assert_eq!(&buffer[..len], expected.as_bytes());
        }
    }
}
