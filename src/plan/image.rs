//! The guest kernel and the initramfs, inside this binary: one file is the whole install, and there
//! is no search path to get wrong. `resources/build.rs` makes both.

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
