//! The guest kernel and the initramfs, inside this binary: one file is the whole install, and there
//! is no search path to get wrong. `resources/build.rs` makes both. `MOTE_KERNEL` and `MOTE_INITRAMFS`
//! name files to use instead.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::path::Path;

use crate::spec::json::Report;

/// Page-aligned, so that copying into guest memory starts on a page of the page cache.
#[repr(C, align(4096))]
struct PageAligned<T: ?Sized>(T);

static KERNEL: &PageAligned<[u8]> = &PageAligned(*include_bytes!(env!("MOTE_BUILT_KERNEL")));
static INITRAMFS: &PageAligned<[u8]> = &PageAligned(*include_bytes!(env!("MOTE_BUILT_INITRAMFS")));

/// The guest kernel, an uncompressed ELF vmlinux.
pub fn kernel() -> &'static [u8] {
    &KERNEL.0
}

/// The initramfs, an uncompressed cpio archive with the agent as `/init`.
pub fn initramfs() -> &'static [u8] {
    &INITRAMFS.0
}

/// Bytes to load, and where they come from.
#[derive(Clone)]
pub struct Image {
    /// The bytes.
    pub bytes: Cow<'static, [u8]>,
    /// "built in", or the file's path.
    pub origin: String,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({}, {} bytes)", self.origin, self.bytes.len())
    }
}

/// The built-in image, or the file at `path`, which the environment variable `variable` has named.
pub(super) fn plan(
    path: Option<&Path>,
    built_in: &'static [u8],
    variable: &str,
    report: &mut Report,
) -> Option<Image> {
    let Some(path) = path else {
        return Some(Image { bytes: Cow::Borrowed(built_in), origin: "built in".into() });
    };
    match fs::read(path) {
        Ok(bytes) => Some(Image { bytes: Cow::Owned(bytes), origin: path.display().to_string() }),
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
