//! A writer for cpio archives in the "newc" format, the one that Linux unpacks as initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Also used by the build script.

/// An archive under construction. Linux unpacks several archives that follow each other.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
/// A page of the guest's.
const PAGE_LEN: usize = 4096;
/// Length of an entry's fields, which its name follows.
const HEADER_LEN: usize = 110;

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory.
    pub fn directory(&mut self, name: &str, mode: u32) {
        self.entry(name, DIRECTORY | mode, (0, 0), &[]);
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.entry(name, REGULAR | mode, (0, 0), contents);
    }

    /// Begins the archive with a file whose contents begin at a page: if the archive does, too, mote's guest kernel takes
    /// pages of it for the file, instead of copying them (resources/kernel/packed-memory.patch).
    pub fn of_file(name: &str, mode: u32, contents: &[u8]) -> Self {
        // What is behind a name's end belongs to it in the archive only.
        let mut padded = name.to_owned();
        padded.extend(std::iter::repeat_n('\0', PAGE_LEN - HEADER_LEN - 1 - name.len()));
        let mut archive = Self::new();
        archive.entry(&padded, REGULAR | mode, (0, 0), contents);
        archive
    }

    /// Adds a character device node (major, minor).
    pub fn character_device(&mut self, name: &str, mode: u32, device: (u32, u32)) {
        self.entry(name, CHARACTER_DEVICE | mode, device, &[]);
    }

    /// Closes the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        // Owner root, one link, time zero, so that the same contents give the same bytes.
        let links = 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            contents.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.inode += 1;
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_lists_what_was_added() {
        let mut archive = Archive::of_file("whole", 0o755, b"begins at a page");
        assert!(archive.bytes[PAGE_LEN..].starts_with(b"begins"));
        archive.directory("dev", 0o755);
        archive.character_device("dev/console", 0o600, (5, 1));
        archive.file("init", 0o755, b"#!/bin/sh\n");
        let mut child = std::process::Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("cpio runs");
        std::io::Write::write_all(&mut child.stdin.take().expect("stdin"), &archive.finish())
            .expect("cpio reads");
        let output = child.wait_with_output().expect("cpio ends");
        let listing = String::from_utf8(output.stdout).expect("text");
        let lines: Vec<&str> = listing.lines().collect();
        assert!(output.status.success());
        assert!(lines[0].starts_with("-rwxr-xr-x") && lines[0].ends_with(" whole"), "{listing}");
        assert!(lines[1].starts_with("drwxr-xr-x") && lines[1].ends_with(" dev"), "{listing}");
        assert!(lines[2].starts_with("crw-------") && lines[2].contains("5,   1"), "{listing}");
        assert!(lines[3].starts_with("-rwxr-xr-x") && lines[3].contains(" 10 "), "{listing}");
    }
}
