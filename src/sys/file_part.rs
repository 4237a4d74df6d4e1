//! A part of a file, read as if it were all of it; and where this program's own file has what is built in.

#![allow(unsafe_code, reason = "part of the module that talks to libc")]

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::slice;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// A part of a file. Reading it costs no memory of this process, as its mapping would.
#[derive(Debug)]
pub struct FilePart {
    file: File,
    start: u64,
    len: u64,
}

impl FilePart {
    /// All of the regular file at this path.
    ///
    /// # Errors
    /// Those of open(2), or it is no regular file.
    pub fn whole(path: &Path) -> io::Result<FilePart> {
        // Not to wait for the other end of a FIFO.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        Ok(FilePart { file, start: 0, len: metadata.len() })
    }

    /// These bytes, which are part of this program, in its file.
    ///
    /// # Errors
    /// The file cannot be opened: there is no /proc.
    pub fn of_program(bytes: &'static [u8]) -> io::Result<FilePart> {
        let start = offset_in_program(bytes).ok_or(ErrorKind::NotFound)?;
        let mut file = File::open("/proc/self/exe")?;
        file.seek(SeekFrom::Start(start))?;
        Ok(FilePart { file, start, len: bytes.len() as u64 })
    }

    /// The file, and where in it the part starts.
    pub fn place(&self) -> (&File, u64) {
        (&self.file, self.start)
    }

    /// How many bytes it has.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Where in the program's file these bytes of it are.
fn offset_in_program(bytes: &'static [u8]) -> Option<u64> {
    // SAFETY: plain calls. The kernel has put there where the program headers are and how many, in a part of the
    // program that stays mapped and that nobody writes.
    let headers = unsafe {
        let headers = libc::getauxval(libc::AT_PHDR) as *const libc::Elf64_Phdr;
        let count = libc::getauxval(libc::AT_PHNUM) as usize;
        if headers.is_null() {
            return None;
        }
        slice::from_raw_parts(headers, count)
    };
    let own = headers.iter().find(|header| header.p_type == libc::PT_PHDR)?;
    let loaded_at = (headers.as_ptr() as u64).checked_sub(own.p_vaddr)?;
    let address = (bytes.as_ptr() as u64).checked_sub(loaded_at)?;
    let mut loads = headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
    let has = |load: &&libc::Elf64_Phdr| {
        let start = address.checked_sub(load.p_vaddr);
        start.is_some_and(|start| start + bytes.len() as u64 <= load.p_filesz)
    };
    loads.find(has).map(|load| load.p_offset + address - load.p_vaddr)
}

// The end of the part is not looked at: who reads knows how much there is.
impl Read for FilePart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl ReadVolatile for FilePart {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.file.read_volatile(buffer)
    }
}

impl Seek for FilePart {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let from_start = |at: u64| SeekFrom::Start(self.start + at);
        let to = match to {
            SeekFrom::Start(at) => from_start(at),
            SeekFrom::End(by) => from_start(self.len.saturating_add_signed(by)),
            SeekFrom::Current(by) => SeekFrom::Current(by),
        };
        Ok(self.file.seek(to)?.saturating_sub(self.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static BUILT_IN: &[u8] = b"these bytes are in the program's file, and nowhere else: 4d6f7465";

    #[test]
    fn what_is_built_in_is_found_in_the_file() {
        let mut part = FilePart::of_program(BUILT_IN).expect("found");
        assert_eq!(part.len(), BUILT_IN.len() as u64);
        let mut read = vec![0; BUILT_IN.len()];
        part.read_exact(&mut read).expect("read");
        assert_eq!(read, BUILT_IN);
        for (to, expected) in
            [(SeekFrom::Start(6), 6), (SeekFrom::Current(5), 12), (SeekFrom::End(-8), 57)]
        {
            assert_eq!(part.seek(to).expect("in it"), expected);
            part.read_exact(&mut read[..1]).expect("read");
            assert_eq!(read[0], BUILT_IN[expected as usize]);
        }
    }
}
