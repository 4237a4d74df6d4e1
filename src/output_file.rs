//! Files that mote writes for its user: `console_output`, logs, the outcome, the timeline. They are opened with
//! the user's rights, and perhaps in a directory that a guest has written to.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::sys::directory::Directory;
use crate::sys::{self, Contents, Interest, Links};

/// How long somebody may take to read a FIFO that mote is to write to: as long as passt may take.
const READER_LIMIT: Duration = Duration::from_secs(5);
/// How often mote looks meanwhile.
const READER_STEP: Duration = Duration::from_millis(10);
/// Most symbolic links on the way to a file (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// A file to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputFile {
    /// The file's path, as the user gave it.
    pub path: PathBuf,
    /// The directory that guests can write to, if the path leads into one.
    guests: Option<PathBuf>,
    /// The path to open.
    place: PathBuf,
    /// Which symbolic links in `place` can only be the user's.
    links: Links,
}

impl OutputFile {
    /// A file at this path. `guests` are the directories that guests can write to, without symbolic links
    /// in their paths; `None` if they are not known.
    pub fn new(path: &Path, guests: Option<&[PathBuf]>) -> OutputFile {
        let entered = guests.and_then(|guests| enters(path, guests));
        let (place, entered, links) = match entered {
            Some((place, directory)) => (place, Some(directory.to_owned()), Links::None),
            None if guests.is_some() => (path.to_owned(), None, Links::Any),
            // A guest's link could at most choose the directory.
            None => (path.to_owned(), None, Links::OfDirectories),
        };
        OutputFile { path: path.to_owned(), guests: entered, place, links }
    }

    /// What is wrong with a path that leads to where guests can write.
    pub fn warning(&self) -> Option<String> {
        self.guests.as_ref().map(|guests| {
            format!(
                "{} is inside {}, where the guest can change and replace it; choose a path outside",
                self.path.display(),
                guests.display()
            )
        })
    }

    /// Creates the file, mode 0600, or empties it; what is written is appended. Writing does not wait.
    /// Where a guest may have put a symbolic link, none is followed; where nobody knows that, none to a regular
    /// file. A FIFO needs a reader, for which this waits 5 s, or until `stop` is readable.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn open(&self, stop: Option<&File>) -> io::Result<File> {
        self.open_with(Contents::Dropped, stop)
    }

    /// The same for a file that keeps what it has.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn append(&self, stop: Option<&File>) -> io::Result<File> {
        self.open_with(Contents::Kept, stop)
    }

    /// The directory that the file is in, to make others beside it.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn directory(&self) -> io::Result<Directory> {
        let parent = self.place.parent().filter(|parent| !parent.as_os_str().is_empty());
        Directory::open(parent.unwrap_or(Path::new(".")), self.links)
    }

    fn open_with(&self, contents: Contents, stop: Option<&File>) -> io::Result<File> {
        let deadline = Instant::now() + READER_LIMIT;
        let links = match self.links {
            // Such as /dev/stdout: there is nothing to overwrite.
            Links::OfDirectories if !may_be_regular(&self.place) => Links::Any,
            links => links,
        };
        loop {
            let error = match sys::create(&self.place, links, contents) {
                Ok(file) => return Ok(file),
                Err(error) => error,
            };
            let fault = match error.raw_os_error() {
                Some(libc::ELOOP) if links != Links::Any => {
                    "a symbolic link is in the way, which a guest may have put there; remove it or choose another path"
                }
                Some(libc::ENXIO) if is_fifo(&self.place) => {
                    "nobody reads this FIFO; start its reader before the box"
                }
                _ => return Err(error),
            };
            if error.raw_os_error() == Some(libc::ELOOP) || Instant::now() >= deadline {
                return Err(io::Error::new(error.kind(), fault));
            }
            let stop = stop.map_or(Interest::NONE, Interest::read);
            let [is_stopped] = sys::poll([stop], Some(READER_STEP))?;
            if is_stopped {
                return Err(io::Error::new(
                    ErrorKind::Interrupted,
                    "stopped while waiting for its reader",
                ));
            }
        }
    }
}

/// Whether there is a regular file, or may be made one.
fn may_be_regular(path: &Path) -> bool {
    fs::metadata(path).map_or(true, |file| file.file_type().is_file())
}

fn is_fifo(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.file_type().is_fifo())
}

/// Follows a path, and the symbolic links on its way, as far as it enters one of these directories. Returns
/// where it leads then, with the rest of it as it is, and that directory; `None` if it enters none.
pub fn enters<'a>(path: &Path, directories: &'a [PathBuf]) -> Option<(PathBuf, &'a Path)> {
    let mut at = PathBuf::from("/");
    let mut ahead: VecDeque<OsString> = parts(&std::path::absolute(path).ok()?).into();
    let mut links = 0;
    while let Some(part) = ahead.pop_front() {
        if part == ".." {
            at.pop();
        } else {
            // Begins anew if the part is the root.
            at.push(part);
        }
        let inside = |directory: &&PathBuf| at != **directory && at.starts_with(directory);
        if let Some(directory) = directories.iter().find(inside) {
            at.extend(ahead);
            return Some((at, directory));
        }
        if links < MAX_LINKS
            && let Ok(target) = fs::read_link(&at)
        {
            links += 1;
            at.pop();
            for part in parts(&target).into_iter().rev() {
                ahead.push_front(part);
            }
        }
    }
    None
}

/// A path's parts; the root is the first one of an absolute path.
fn parts(path: &Path) -> Vec<OsString> {
    path.iter().map(OsString::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A directory with `share` in it, without symbolic links in its path.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let dir = fs::canonicalize(std::env::temp_dir()).expect("a directory");
            let dir = dir.join(format!("mote-output-{name}-{}", std::process::id()));
            fs::create_dir_all(dir.join("share/sub")).expect("directory");
            Scratch(dir)
        }

        fn file(&self, path: &str) -> OutputFile {
            OutputFile::new(&self.0.join(path), Some(&[self.0.join("share")]))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_link_that_a_guest_may_have_made_is_not_followed() {
        let scratch = Scratch::new("links");
        let precious = scratch.0.join("precious");
        fs::write(&precious, "precious").expect("written");
        for (link, target) in [
            ("share/file", precious.as_path()),
            ("share/directory", scratch.0.as_path()),
            // The user's own, which lead there.
            ("way", Path::new("share")),
            ("far", &scratch.0.join("way/file")),
        ] {
            symlink(target, scratch.0.join(link)).expect("a link");
        }
        for path in [
            "share/file",
            "share/directory/precious",
            "share/sub/../file",
            "way/file",
            "./way/sub/../directory/precious",
            "far",
        ] {
            let file = scratch.file(path);
            assert_eq!(file.guests, Some(scratch.0.join("share")), "{path}");
            let error = file.open(None).expect_err(path);
            assert!(error.to_string().starts_with("a symbolic link is in the way"), "{error}");
        }
        assert_eq!(fs::read_to_string(&precious).expect("there"), "precious");
        // Where there is none, the file is made.
        drop(scratch.file("way/sub/new").open(None).expect("made"));
        assert!(scratch.0.join("share/sub/new").exists());
    }

    #[test]
    fn the_users_own_links_are_followed() {
        let scratch = Scratch::new("own-links");
        symlink("file", scratch.0.join("link")).expect("a link");
        for path in ["link", "share/../link", "./link"] {
            let file = scratch.file(path);
            assert_eq!(file.guests, None, "{path}");
            file.open(None).expect(path).write_all(b"text").expect("written");
        }
        let made = scratch.0.join("file");
        assert_eq!(fs::read_to_string(&made).expect("there"), "text");
        let mode = fs::metadata(&made).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // As long as nobody knows what a guest can write to, it may be everything.
        let unknown = |path: &Path| OutputFile::new(path, None).open(None);
        assert!(unknown(&scratch.0.join("link")).is_err());
        unknown(&made).expect("no link");
        symlink(".", scratch.0.join("here")).expect("a link");
        unknown(&scratch.0.join("here/file")).expect("a link of a directory");
        let (_reader, writer) = io::pipe().expect("a pipe");
        let link = format!("/proc/self/fd/{}", writer.as_raw_fd());
        unknown(Path::new(&link)).expect("nothing to overwrite");
    }

    #[test]
    fn links_in_a_circle_end() {
        let scratch = Scratch::new("circle");
        symlink("b", scratch.0.join("a")).expect("a link");
        symlink("a", scratch.0.join("b")).expect("a link");
        let error = scratch.file("a").open(None).expect_err("a circle");
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_fifo_waits_for_its_reader_until_mote_is_stopped() {
        let scratch = Scratch::new("fifo");
        let fifo = scratch.0.join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().expect("mkfifo runs");
        assert!(made.success());
        let (stop, stopped) = io::pipe().expect("a pipe");
        let stop = File::from(std::os::fd::OwnedFd::from(stop));
        drop(stopped);
        let error = scratch.file("fifo").open(Some(&stop)).expect_err("stopped");
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| fs::read_to_string(&fifo).expect("text"));
            let mut file = scratch.file("fifo").open(None).expect("a reader comes");
            file.write_all(b"text").expect("written");
            drop(file);
            assert_eq!(reader.join().expect("reads"), "text");
        });
    }
}
