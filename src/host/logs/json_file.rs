//! The log of JSON objects: one object a line, as the runtime's own shim writes them (contract §2.11), and
//! what becomes of a log that is full.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;

use crate::console::write_patiently;
use crate::log::{self, LogOnce};
use crate::sys::directory::Directory;

/// Most bytes that are packed of a log that is longer than it may be: it may be another's work.
const MAX_PACKED: u64 = 1 << 30;

/// A log that is open, in its directory.
#[derive(Debug)]
pub struct JsonLog {
    directory: Directory,
    name: String,
    file: File,
    /// Bytes in the file.
    written: u64,
    max_bytes: u64,
    max_files: u32,
    /// Objects that are still to be written.
    waiting: Vec<u8>,
    /// The time of the last object: a clock that is set back does not disturb their order.
    last: Duration,
    failed: bool,
    complaint: LogOnce,
}

impl JsonLog {
    /// Opens the log of this name, or makes one. `max_bytes` and `max_files` as in
    /// [`JsonFile`](crate::plan::JsonFile).
    ///
    /// # Errors
    /// Those of openat2(2); `InvalidInput` if what has this name is no regular file.
    pub fn open(
        directory: Directory,
        name: String,
        max_bytes: u64,
        max_files: u32,
    ) -> io::Result<JsonLog> {
        let file = directory.append(&name)?;
        Ok(JsonLog {
            directory,
            name,
            written: len_of_log(&file)?,
            file,
            max_bytes,
            max_files,
            waiting: Vec::new(),
            last: Duration::ZERO,
            failed: false,
            complaint: LogOnce::default(),
        })
    }

    /// The directory that it is in.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The log's file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Adds text of this stream to the log, at this time since 1970. [`JsonLog::flush`] writes it, at the latest.
    pub fn add(&mut self, text: &[u8], stream: &str, now: Duration) {
        if self.failed {
            return;
        }
        self.last = self.last.max(now);
        let (text, time) = (Value::from(String::from_utf8_lossy(text)), rfc3339(self.last));
        let entry = format!("{{\"log\":{text},\"stream\":\"{stream}\",\"time\":\"{time}\"}}\n");
        self.waiting.extend_from_slice(entry.as_bytes());
        if self.written + self.waiting.len() as u64 >= self.max_bytes {
            self.flush();
            if !self.failed {
                self.put_away();
            }
        }
    }

    /// Writes what was added. A file that cannot be written to is given up, with one line on stderr.
    pub fn flush(&mut self) {
        match write_patiently(&self.file, &self.waiting) {
            Ok(()) => self.written += self.waiting.len() as u64,
            Err(error) => {
                self.failed = true;
                // Readers expect whole objects. Nor longer: somebody may have cut it meanwhile.
                if self.file.read_at(&mut [0], self.written).is_ok_and(|read| read > 0) {
                    let _ = self.file.set_len(self.written);
                }
                log::error(&format!("{}: write: {error}; the rest of the log is lost", self.name));
            }
        }
        self.waiting.clear();
    }

    /// Begins anew. What the log has is packed into a file of its own, and those that there are get higher
    /// numbers. Where that fails, it is lost: a log must not outgrow its limit.
    fn put_away(&mut self) {
        match self.pack() {
            Ok(new) => self.file = new,
            Err(error) => {
                self.complaint.error(&format!(
                    "{}: put it away as {}: {error}; what it had is lost",
                    self.name,
                    self.packed(1)
                ));
                if self.file.set_len(0).is_err() {
                    self.failed = true;
                }
            }
        }
        self.written = 0;
    }

    /// Checks that what [`JsonLog::put_away`] does can be done.
    ///
    /// # Errors
    /// Those of openat2(2) and unlinkat(2).
    pub fn check_directory(&self) -> io::Result<()> {
        let part = self.part();
        self.directory.remove(&part)?;
        self.directory.create_new(&part)?;
        self.directory.remove(&part)
    }

    /// Packs what this has written, and returns the new log.
    fn pack(&self) -> io::Result<File> {
        // Complete before it has its name: readers take all files of such names.
        let (part, new) = (self.part(), format!("{}.new", self.name));
        self.directory.remove(&part)?;
        self.directory.remove(&new)?;
        let file = self.directory.create_new(&new)?;
        let mut packer = GzEncoder::new(self.directory.create_new(&part)?, Compression::fast());
        let mut buffer = vec![0; 64 * 1024];
        // No more than was written: others may have made it as long as they like.
        let len = self.written.min(self.max_bytes.max(MAX_PACKED));
        let mut at = 0;
        while at < len {
            let most = (len - at).min(buffer.len() as u64) as usize;
            let read = self.file.read_at(&mut buffer[..most], at)?;
            if read == 0 {
                break;
            }
            packer.write_all(&buffer[..read])?;
            at += read as u64;
        }
        packer.finish()?;
        for number in (1..self.max_files).rev() {
            match self.directory.rename(&self.packed(number), &self.packed(number + 1)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        // The log itself is one of the files.
        self.directory.remove(&self.packed(self.max_files))?;
        self.directory.rename(&part, &self.packed(1))?;
        // At no moment is there no log.
        self.directory.rename(&new, &self.name)?;
        Ok(file)
    }

    fn part(&self) -> String {
        format!("{}.part", self.name)
    }

    fn packed(&self, number: u32) -> String {
        format!("{}.{number}.gz", self.name)
    }
}

/// Bytes in a log. Something other than a file has no limit, and may have to be waited for.
///
/// # Errors
/// Those of fstat(2); `InvalidInput` if it is no regular file.
pub(super) fn len_of_log(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "is no regular file, as logs must be"));
    }
    Ok(metadata.len())
}

/// A time since 1970 as RFC 3339 writes it, with nanoseconds, in UTC.
pub fn rfc3339(since_1970: Duration) -> String {
    let seconds = since_1970.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    // Counted from 1 March 0000, so that leap days are at the end of years, in eras of 400 years, which have
    // 146,097 days (Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days).
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + later;
    let nanoseconds = since_1970.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read;
    use std::path::PathBuf;

    use flate2::read::GzDecoder;

    use crate::sys::Links;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let dir = std::env::temp_dir().join(format!("mote-logs-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).expect("directory");
            Scratch(dir)
        }

        fn log(&self, max_bytes: u64, max_files: u32) -> JsonLog {
            let directory = Directory::open(&self.0, Links::Any).expect("directory");
            JsonLog::open(directory, "container.json".into(), max_bytes, max_files).expect("a log")
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).expect("directory").flatten();
            let mut names: Vec<_> =
                entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            names
        }

        fn text(&self, name: &str) -> String {
            let bytes = fs::read(self.0.join(name)).expect(name);
            if !name.ends_with(".gz") {
                return String::from_utf8(bytes).expect("text");
            }
            let mut text = String::new();
            GzDecoder::new(&bytes[..]).read_to_string(&mut text).expect("whole");
            text
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn times_are_rfc_3339_with_nanoseconds() {
        for (seconds, nanoseconds, expected) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_399, 999_999_999, "2000-02-28T23:59:59.999999999Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
            (951_868_800, 0, "2000-03-01T00:00:00.000000000Z"),
            (1_709_164_800, 0, "2024-02-29T00:00:00.000000000Z"),
            (1_735_689_599, 0, "2024-12-31T23:59:59.000000000Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z"),
        ] {
            assert_eq!(rfc3339(Duration::new(seconds, nanoseconds)), expected);
        }
    }

    #[test]
    fn entries_are_the_runtimes_and_in_order() {
        let scratch = Scratch::new("entries");
        let mut log = scratch.log(1 << 20, 3);
        log.add(b"a \"quoted\" \x1b[1m\ttext \xff\n", "stdout", Duration::from_nanos(5));
        log.add("ä\n".as_bytes(), "stderr", Duration::from_nanos(4));
        log.flush();
        assert_eq!(
            scratch.text("container.json"),
            "{\"log\":\"a \\\"quoted\\\" \\u001b[1m\\ttext \u{fffd}\\n\",\"stream\":\"stdout\",\
                \"time\":\"1970-01-01T00:00:00.000000005Z\"}\n\
                {\"log\":\"ä\\n\",\"stream\":\"stderr\",\"time\":\"1970-01-01T00:00:00.000000005Z\"}\n"
        );
    }

    #[test]
    fn a_log_goes_on_where_it_was() {
        let scratch = Scratch::new("again");
        for text in [b"first\n", b"again\n"] {
            let mut log = scratch.log(1 << 20, 3);
            log.add(text, "stdout", Duration::ZERO);
            log.flush();
        }
        assert_eq!(scratch.text("container.json").lines().count(), 2);
    }

    /// The text of an object, `n` in decimal.
    fn object(n: u32) -> String {
        format!(
            "{{\"log\":\"{n}\\n\",\"stream\":\"stdout\",\"time\":\"1970-01-01T00:00:00.000000000Z\"}}\n"
        )
    }

    #[test]
    fn full_logs_are_packed_and_numbered() {
        let scratch = Scratch::new("rotate");
        // Two objects make it full.
        let mut log = scratch.log(object(1).len() as u64 + 1, 3);
        for n in 1..=7 {
            log.add(format!("{n}\n").as_bytes(), "stdout", Duration::ZERO);
            log.flush();
        }
        let names = ["container.json", "container.json.1.gz", "container.json.2.gz"];
        assert_eq!(scratch.names(), names);
        let pair = |n| object(n) + &object(n + 1);
        assert_eq!(names.map(|name| scratch.text(name)), [object(7), pair(5), pair(3)]);
    }

    #[test]
    fn what_cannot_be_put_away_is_lost_and_the_log_goes_on() {
        let scratch = Scratch::new("stuck");
        fs::create_dir(scratch.0.join("container.json.1.gz")).expect("directory");
        let mut log = scratch.log(1, 1);
        log.add(b"1\n", "stdout", Duration::ZERO);
        assert_eq!(scratch.text("container.json"), "");
        fs::remove_dir(scratch.0.join("container.json.1.gz")).expect("removed");
        log.add(b"2\n", "stdout", Duration::ZERO);
        assert_eq!(scratch.text("container.json.1.gz"), object(2));
    }

    #[test]
    fn no_link_is_followed() {
        let scratch = Scratch::new("link");
        let precious = scratch.0.join("precious");
        fs::write(&precious, "precious").expect("file");
        for name in ["container.json", "container.json.part"] {
            std::os::unix::fs::symlink(&precious, scratch.0.join(name)).expect("link");
        }
        let directory = Directory::open(&scratch.0, Links::Any).expect("directory");
        assert!(JsonLog::open(directory, "container.json".into(), 1, 3).is_err());
        fs::remove_file(scratch.0.join("container.json")).expect("removed");
        scratch.log(1, 3).add(b"1\n", "stdout", Duration::ZERO);
        assert_eq!(scratch.text("container.json.1.gz"), object(1));
        assert_eq!(fs::read_to_string(precious).expect("there"), "precious");
    }
}
