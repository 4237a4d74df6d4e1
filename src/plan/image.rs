//! The guest kernel and the initramfs, inside this binary: one file is the whole install, and there is no search path
//! to get wrong. `resources/build.rs` makes them. `MOTE_KERNEL` and `MOTE_INITRAMFS` name files to use instead.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::spec::json::Report;
use crate::sys::file_part::FilePart;

/// Page-aligned, so that reading into guest memory starts on a page of the page cache, and that it can be mapped.
#[repr(C, align(4096))]
struct PageAligned<T: ?Sized>(T);

static KERNEL: &PageAligned<[u8]> = &PageAligned(*include_bytes!(env!("MOTE_BUILT_KERNEL")));
static COLD_TEXT: &PageAligned<[u8]> = &PageAligned(*include_bytes!(env!("MOTE_BUILT_COLD_TEXT")));
static INITRAMFS: &PageAligned<[u8]> = &PageAligned(*include_bytes!(env!("MOTE_BUILT_INITRAMFS")));
static ATTEST: &PageAligned<[u8]> = &PageAligned(*include_bytes!(env!("MOTE_BUILT_ATTEST")));

/// A second archive, with the attestation server, for boxes that have one.
pub fn attest() -> Image {
    Image::BuiltIn(&ATTEST.0)
}

/// What the built-in kernel has in [`COLD_TEXT`](crate::layout::COLD_TEXT).
pub fn cold_text() -> &'static [u8] {
    &COLD_TEXT.0
}

/// What is built in, or a file in its place.
#[derive(Clone)]
pub enum Image {
    /// It is in this program.
    BuiltIn(&'static [u8]),
    /// It is a file.
    File(PathBuf),
}

impl Image {
    /// The built-in kernel, an uncompressed ELF vmlinux without its [`cold_text`].
    pub fn kernel() -> Image {
        Image::BuiltIn(&KERNEL.0)
    }

    /// The built-in initramfs, an uncompressed cpio archive with the agent as `/init`.
    pub fn initramfs() -> Image {
        Image::BuiltIn(&INITRAMFS.0)
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// The file, the program's own if it is built in, cannot be opened.
    pub fn open(&self) -> Result<FilePart> {
        let opened = match self {
            Image::BuiltIn(bytes) => FilePart::of_program(bytes),
            Image::File(path) => FilePart::whole(path),
        };
        opened.with_context(|| match self {
            Image::BuiltIn(_) => "open this program's own file, /proc/self/exe".into(),
            Image::File(path) => format!("open {}", path.display()),
        })
    }
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Image::BuiltIn(_) => f.write_str("built in"),
            Image::File(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({self})")
    }
}

/// The built-in image, or the file at `path`, which the environment variable `variable` has named.
pub(super) fn plan(
    path: Option<&Path>,
    built_in: Image,
    variable: &str,
    report: &mut Report,
) -> Option<Image> {
    let Some(path) = path else { return Some(built_in) };
    let image = Image::File(path.into());
    match FilePart::whole(path) {
        Ok(_) => Some(image),
        Err(error) => {
            report.error(
                variable,
                format!(
                    "{} cannot be read: {error}; unset it to use the built-in one",
                    path.display()
                ),
            );
            None
        }
    }
}
