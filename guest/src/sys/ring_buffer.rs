//! The ring buffer that BPF programs report by, read where the kernel writes it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::bpf::Created;

// include/uapi/linux/bpf.h
const BPF_MAP_TYPE_RINGBUF: u32 = 27;
const BPF_RINGBUF_BUSY_BIT: u32 = 1 << 31;
const BPF_RINGBUF_DISCARD_BIT: u32 = 1 << 30;
const BPF_RINGBUF_HDR_SZ: usize = 8;

/// Of x86-64.
const PAGE_LEN: usize = 4096;

/// The reading side of a ring buffer (Documentation/bpf/ringbuf.rst).
///
/// Its first page is the reader's, with the position up to which it has read. The next has the position up to which
/// programs have reserved records, and then the records follow, mapped twice, so that none is cut by the end.
#[derive(Debug)]
pub struct RingBuffer {
    fd: OwnedFd,
    consumer: Mapping,
    producer: Mapping,
    /// Bytes of the records: a power of two and of pages, or the kernel would not have created it.
    len: usize,
    position: usize,
}

impl RingBuffer {
    /// Maps a ring buffer that nobody has read from yet. Maps of other kinds are refused as invalid input.
    pub fn new(Created { fd, definition }: Created) -> io::Result<Self> {
        let len = definition.max_entries as usize;
        if definition.kind != BPF_MAP_TYPE_RINGBUF {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let consumer = Mapping::new(&fd, 0, PAGE_LEN, libc::PROT_READ | libc::PROT_WRITE)?;
        let producer = Mapping::new(&fd, PAGE_LEN, PAGE_LEN + 2 * len, libc::PROT_READ)?;
        Ok(RingBuffer { fd, consumer, producer, len, position: 0 })
    }

    /// Reads records until something comes of one; `None` if there are no more.
    pub fn next<T>(&mut self, read: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        loop {
            // Whoever has read everything polls before it reads again, which says whether there is more.
            // SAFETY: the mapping is at least a page, begins with this position, which is aligned and which the kernel
            // writes as a whole. It is only loaded here, and not by `SeqCst`: memory may be read-only then.
            let reserved = unsafe { &*self.producer.address.cast::<AtomicUsize>() };
            if reserved.load(Ordering::Acquire) == self.position {
                return None;
            }
            // SAFETY: records begin at multiples of 8, behind the first page and within `len` bytes of it.
            let header = unsafe {
                self.producer.address.byte_add(PAGE_LEN + (self.position & (self.len - 1)))
            };
            // SAFETY: a record begins with its length and two flags, aligned, which the kernel writes as a whole. As above.
            let header_len = unsafe { &*header.cast::<AtomicU32>() }.load(Ordering::Acquire);
            if header_len & BPF_RINGBUF_BUSY_BIT != 0 {
                // The descriptor is readable meanwhile.
                return None;
            }
            let len = (header_len & !BPF_RINGBUF_DISCARD_BIT) as usize;
            let value = if header_len & BPF_RINGBUF_DISCARD_BIT == 0 && len <= self.len {
                let data = header.cast::<u8>().cast_const();
                // SAFETY: the record's bytes follow its header and, mapped twice, are all within the mapping. No
                // program writes to a record that it has submitted, and its room is used again only once the position
                // below is beyond it.
                read(unsafe { std::slice::from_raw_parts(data.byte_add(BPF_RINGBUF_HDR_SZ), len) })
            } else {
                None
            };
            self.position += (BPF_RINGBUF_HDR_SZ + len).next_multiple_of(8);
            // SAFETY: the mapping is a page, which begins with this position, and is aligned. Nobody else writes to it.
            let read_up_to = unsafe { AtomicUsize::from_ptr(self.consumer.address.cast()) };
            read_up_to.store(self.position, Ordering::Release);
            if value.is_some() {
                return value;
            }
        }
    }
}

impl AsRawFd for RingBuffer {
    /// Readable when there are records.
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Memory that is shared with the kernel.
#[derive(Debug)]
struct Mapping {
    address: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    fn new(fd: &OwnedFd, offset: usize, len: usize, protection: libc::c_int) -> io::Result<Self> {
        let (flags, offset) = (libc::MAP_SHARED, offset as libc::off_t);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd.as_raw_fd(), offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { address, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing refers to it any more.
        unsafe { libc::munmap(self.address, self.len) };
    }
}
