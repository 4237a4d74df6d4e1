//! What the guest may keep of a file when it opens it again: everything, if the file has not changed since.
//!
//! By virtiofsd's own policies the guest drops a file's pages at each open (`auto`), or believes for good what it has
//! (`always`), which a change on the host breaks. [`Unchanged`] decides at each open, by the file's attributes on the
//! host, as NFS does for its close-to-open consistency: an open file shows what was in the file when it was opened, or
//! later, whoever wrote it, and what is unchanged is not read twice.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

/// Most time in which a file system may give two changes one time: a tick of the kernel's clock (`CONFIG_HZ` is 100 at
/// least), and the step of exFAT's times.
const STEP: Duration = Duration::from_millis(10);

/// The same for a file system that only has whole seconds, FAT's being two.
const LONG_STEP: Duration = Duration::from_secs(2);

/// By what a change of a file's contents shows. No program can set the time of the last change (`ctime`), as it can set
/// that of the last writing; file systems without the first have the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    changed: Duration,
    written: Duration,
    len: u64,
}

impl State {
    fn of(attributes: &Attr) -> State {
        State {
            changed: since_1970(attributes.ctime, attributes.ctimensec),
            written: since_1970(attributes.mtime, attributes.mtimensec),
            len: attributes.size,
        }
    }

    /// Whether the next change shows in any case: this one's time has passed.
    fn is_settled(&self, now: Duration) -> bool {
        let step = if self.changed.subsec_nanos() == 0 { LONG_STEP } else { STEP };
        self.changed.checked_add(step).is_some_and(|settled| settled < now)
    }
}

/// One before 1970 becomes one that never passes, so that such a file is not kept.
fn since_1970(seconds: u64, nanoseconds: u32) -> Duration {
    Duration::new(seconds, nanoseconds.min(999_999_999))
}

/// The states in which files were when the guest had to forget their pages. What it has since read is of this state, as
/// long as the file is in it.
#[derive(Debug, Default)]
struct Opened(HashMap<u64, State>);

impl Opened {
    /// Whether the guest may keep the pages of a file that it opens in this state.
    fn may_keep(&mut self, inode: u64, state: State, now: Duration) -> bool {
        if self.0.get(&inode) == Some(&state) {
            return true;
        }
        // A state that is not settled could have a second meaning at the next open.
        if state.is_settled(now) {
            self.0.insert(inode, state);
        } else {
            self.0.remove(&inode);
        }
        false
    }
}

/// A file system whose files keep their pages in the guest from one open to the next, if they have not changed.
pub struct Unchanged<F> {
    inner: F,
    /// At most one for each inode that the guest knows, of which each is an open file of this process.
    opened: Mutex<Opened>,
    clock: fn() -> Duration,
}

impl<F: FileSystem<Inode = u64>> Unchanged<F> {
    /// Of this file system. The clock is that by which the host's kernel gives files their times, since 1970.
    pub fn new(inner: F, clock: fn() -> Duration) -> Unchanged<F> {
        Unchanged { inner, opened: Mutex::default(), clock }
    }

    fn opened(&self) -> MutexGuard<'_, Opened> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Functions that do what the inner file system does.
macro_rules! as_inner {
    ($(fn $name:ident$(<$generic:ident: $bound:path>)?(&self $(, $argument:ident: $type:ty)*) -> $result:ty;)*) => {
        $(
            fn $name$(<$generic: $bound>)?(&self $(, $argument: $type)*) -> $result {
                self.inner.$name($($argument),*)
            }
        )*
    };
}

impl<F: FileSystem<Inode = u64, Handle = u64>> FileSystem for Unchanged<F> {
    type Inode = u64;
    type Handle = u64;
    type DirIter = F::DirIter;

    fn open(
        &self,
        ctx: Context,
        inode: u64,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, mut options) = self.inner.open(ctx, inode, kill_priv, flags)?;
        // After the open: what it has truncated has changed.
        let may_keep = match self.inner.getattr(ctx, inode, handle) {
            Ok((attributes, _)) => {
                let state = State::of(&attributes);
                self.opened().may_keep(inode, state, (self.clock)())
            }
            Err(_) => false,
        };
        options.set(OpenOptions::KEEP_CACHE, may_keep);
        Ok((handle, options))
    }

    fn destroy(&self) {
        self.opened().0.clear();
        self.inner.destroy();
    }

    fn forget(&self, ctx: Context, inode: u64, count: u64) {
        self.opened().0.remove(&inode);
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>) {
        let mut opened = self.opened();
        for (inode, _) in &requests {
            opened.0.remove(inode);
        }
        drop(opened);
        self.inner.batch_forget(ctx, requests);
    }

    as_inner! {
        fn init(&self, capable: FsOptions) -> io::Result<FsOptions>;
        fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry>;
        fn getattr(&self, ctx: Context, inode: u64, handle: Option<u64>) -> io::Result<(Attr, Duration)>;
        fn setattr(&self, ctx: Context, inode: u64, attr: SetattrIn, handle: Option<u64>, valid: SetattrValid)
            -> io::Result<(Attr, Duration)>;
        fn readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>>;
        fn symlink(&self, ctx: Context, target: &CStr, parent: u64, name: &CStr, extensions: Extensions)
            -> io::Result<Entry>;
        fn mknod(&self, ctx: Context, parent: u64, name: &CStr, mode: u32, rdev: u32, umask: u32, extensions: Extensions)
            -> io::Result<Entry>;
        fn mkdir(&self, ctx: Context, parent: u64, name: &CStr, mode: u32, umask: u32, extensions: Extensions)
            -> io::Result<Entry>;
        fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()>;
        fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()>;
        fn rename(&self, ctx: Context, parent: u64, name: &CStr, new_parent: u64, new_name: &CStr, flags: u32)
            -> io::Result<()>;
        fn link(&self, ctx: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry>;
        // A file that is new, or that another has made at the same time: nothing is kept.
        fn create(&self, ctx: Context, parent: u64, name: &CStr, mode: u32, kill_priv: bool, flags: u32, umask: u32,
            extensions: Extensions) -> io::Result<(Entry, Option<u64>, OpenOptions)>;
        fn read<W: ZeroCopyWriter>(&self, ctx: Context, inode: u64, handle: u64, to: W, size: u32, offset: u64,
            lock_owner: Option<u64>, flags: u32) -> io::Result<usize>;
        fn write<R: ZeroCopyReader>(&self, ctx: Context, inode: u64, handle: u64, from: R, size: u32, offset: u64,
            lock_owner: Option<u64>, delayed_write: bool, kill_priv: bool, flags: u32) -> io::Result<usize>;
        fn flush(&self, ctx: Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()>;
        fn fsync(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()>;
        fn fallocate(&self, ctx: Context, inode: u64, handle: u64, mode: u32, offset: u64, length: u64)
            -> io::Result<()>;
        fn release(&self, ctx: Context, inode: u64, flags: u32, handle: u64, flush: bool, flock_release: bool,
            lock_owner: Option<u64>) -> io::Result<()>;
        fn statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64>;
        fn setxattr(&self, ctx: Context, inode: u64, name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags)
            -> io::Result<()>;
        fn getxattr(&self, ctx: Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()>;
        fn opendir(&self, ctx: Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)>;
        fn readdir(&self, ctx: Context, inode: u64, handle: u64, size: u32, offset: u64) -> io::Result<F::DirIter>;
        fn fsyncdir(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()>;
        fn releasedir(&self, ctx: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()>;
        fn access(&self, ctx: Context, inode: u64, mask: u32) -> io::Result<()>;
        fn lseek(&self, ctx: Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64>;
        fn copyfilerange(&self, ctx: Context, inode: u64, handle: u64, offset: u64, to_inode: u64, to_handle: u64,
            to_offset: u64, len: u64, flags: u64) -> io::Result<usize>;
        fn syncfs(&self, ctx: Context, inode: u64) -> io::Result<()>;
    }
}

/// mote moves no running box to another host: what is there for that says so.
impl<F> SerializableFileSystem for Unchanged<F> {}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 7;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn state(changed: Duration) -> State {
        State { changed, written: ms(1), len: 3 }
    }

    #[test]
    fn a_file_is_kept_from_its_second_open_on_until_it_changes() {
        let mut opened = Opened::default();
        let old = state(ms(500_001));
        assert!(!opened.may_keep(FILE, old, ms(900_000)));
        assert!(opened.may_keep(FILE, old, ms(900_001)));
        assert!(opened.may_keep(FILE, old, ms(900_002)));
        assert!(!opened.may_keep(FILE + 1, old, ms(900_002)));
        let new = state(ms(900_003));
        assert!(!opened.may_keep(FILE, new, ms(901_000)));
        assert!(opened.may_keep(FILE, new, ms(901_001)));
    }

    #[test]
    fn each_attribute_shows_a_change() {
        let old = state(ms(500_001));
        for new in [
            State { changed: ms(500_002), ..old },
            State { written: ms(2), ..old },
            State { len: 4, ..old },
        ] {
            let mut opened = Opened::default();
            opened.may_keep(FILE, old, ms(900_000));
            assert!(!opened.may_keep(FILE, new, ms(900_001)), "{new:?}");
        }
    }

    /// A second change in the same tick would have the same time.
    #[test]
    fn what_has_just_changed_is_kept_one_open_later() {
        for (changed, step) in [(ms(500_001), STEP), (ms(500_000), LONG_STEP)] {
            let mut opened = Opened::default();
            let new = state(changed);
            for too_early in [changed - ms(1), changed, changed + step] {
                assert!(!opened.may_keep(FILE, new, too_early));
            }
            let later = changed + step + ms(1);
            assert!(!opened.may_keep(FILE, new, later), "nothing of before is believed");
            assert!(opened.may_keep(FILE, new, later));
        }
    }

    /// What was known of it before a change that is not settled is not believed after it.
    #[test]
    fn a_change_that_is_not_settled_is_no_way_back() {
        let mut opened = Opened::default();
        let old = state(ms(500_001));
        opened.may_keep(FILE, old, ms(900_000));
        assert!(!opened.may_keep(FILE, state(ms(900_001)), ms(900_001)));
        assert!(!opened.may_keep(FILE, old, ms(900_002)));
    }
}
