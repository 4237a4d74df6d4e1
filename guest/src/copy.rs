//! Copies of directories: what the image has where a volume is mounted, into a volume that is empty.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Copies what is in a directory into an empty one: files, directories and symbolic links, with their owners, modes
/// and times. The directory itself becomes like the other, too. Other boxes may have the same share, and be at the same
/// or at something else: what is there already stays, and is theirs. After a failure what this has made is gone again.
///
/// # Errors
/// The path that cannot be copied, and the reason.
pub fn fill(empty: &Path, from: &Path) -> io::Result<()> {
    let to = Rc::new(open_directory(empty).map_err(at(empty))?);
    let mut made = Vec::new();
    copy_contents(from, &to, &mut made).inspect_err(|_| {
        for Made { directory, name, is_directory } in made.into_iter().rev() {
            let path = below(&directory, &name);
            // What others have put into a directory stays, with it.
            let _ = if is_directory { fs::remove_dir(path) } else { fs::remove_file(path) };
        }
    })
}

/// Something that was copied.
struct Made {
    directory: Rc<File>,
    name: OsString,
    is_directory: bool,
}

/// A name in a directory that is open, wherever that is by now: others may move directories, and put links in
/// their places.
fn below(directory: &File, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}

fn open_directory(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path)
}

fn copy_contents(from: &Path, to: &Rc<File>, made: &mut Vec<Made>) -> io::Result<()> {
    for entry in fs::read_dir(from).map_err(at(from))? {
        let name = entry.map_err(at(from))?.file_name();
        copy(&from.join(&name), to, name, made)?;
    }
    fs::metadata(from).and_then(|metadata| become_like(&metadata, to)).map_err(at(from))
}

fn copy(from: &Path, directory: &Rc<File>, name: OsString, made: &mut Vec<Made>) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from).map_err(at(from))?;
    let to = below(directory, &name);
    let mut file = None;
    let created = if metadata.is_dir() {
        fs::create_dir(&to)
    } else if metadata.is_symlink() {
        fs::read_link(from).and_then(|target| symlink(target, &to))
    } else if metadata.is_file() {
        File::create_new(&to).map(|new| file = Some(new))
    } else {
        Err(io::Error::other("it is no file, directory or symbolic link"))
    };
    match created {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
        created => created.map_err(at(from))?,
    }
    let is_directory = metadata.is_dir();
    made.push(Made { directory: Rc::clone(directory), name, is_directory });
    if is_directory {
        return copy_contents(from, &Rc::new(open_directory(&to).map_err(at(from))?), made);
    }
    let mut finish = || match &mut file {
        Some(file) => {
            io::copy(&mut File::open(from)?, file)?;
            become_like(&metadata, file)
        }
        None => own(&metadata, &fs::symlink_metadata(&to)?, |uid, gid| lchown(&to, uid, gid)),
    };
    finish().map_err(at(from))
}

/// Gives a copy the owner, mode and times of what it is a copy of.
fn become_like(original: &Metadata, copy: &File) -> io::Result<()> {
    own(original, &copy.metadata()?, |uid, gid| fchown(copy, uid, gid))?;
    // After the change of owner, which takes set-user-id bits away.
    copy.set_permissions(PermissionsExt::from_mode(original.mode() & 0o7777))?;
    let times = fs::FileTimes::new().set_modified(original.modified()?);
    copy.set_times(times.set_accessed(original.accessed()?))
}

/// Changes the owner of a copy where it is another than the original's: a host where only root may do that needs it
/// only for files of others.
fn own(
    original: &Metadata,
    copy: &Metadata,
    change: impl FnOnce(Option<u32>, Option<u32>) -> io::Result<()>,
) -> io::Result<()> {
    let owner = (original.uid(), original.gid());
    if (copy.uid(), copy.gid()) == owner {
        return Ok(());
    }
    change(Some(owner.0), Some(owner.1))
}

/// Adds to an error which path it is about.
fn at(path: &Path) -> impl FnOnce(io::Error) -> io::Error + Copy + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("mote-copy-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("image/sub")).expect("directory");
        fs::create_dir(dir.join("volume")).expect("directory");
        dir
    }

    fn set_mode(path: PathBuf, mode: u32) {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("set");
    }

    #[test]
    fn an_empty_volume_becomes_what_the_image_has() {
        let dir = scratch("fill");
        let (image, volume) = (dir.join("image"), dir.join("volume"));
        fs::write(image.join("sub/file"), "text").expect("file");
        symlink("sub/file", image.join("link")).expect("link");
        symlink("/no/such", image.join("dangling")).expect("link");
        set_mode(image.join("sub/file"), 0o4751);
        set_mode(image.join("sub"), 0o1570);
        set_mode(image.clone(), 0o711);
        let before =
            fs::metadata(image.join("sub/file")).expect("there").modified().expect("a time");
        fill(&volume, &image).expect("copied");
        let mode = |name: &str| fs::metadata(volume.join(name)).expect(name).mode() & 0o7777;
        assert_eq!([mode("sub/file"), mode("sub"), mode("")], [0o4751, 0o1570, 0o711]);
        let copied = fs::metadata(volume.join("link")).expect("it leads to the copy");
        assert_eq!((copied.len(), copied.modified().expect("a time")), (4, before));
        let target = fs::read_link(volume.join("dangling")).expect("a link");
        assert_eq!(target, Path::new("/no/such"));
        set_mode(image.join("sub"), 0o755);
        set_mode(volume.join("sub"), 0o755);
        fs::remove_dir_all(&dir).expect("removed");
    }

    #[test]
    fn what_cannot_be_copied_is_named_and_leaves_nothing() {
        let dir = scratch("fails");
        let (image, volume) = (dir.join("image"), dir.join("volume"));
        fs::write(image.join("file"), "text").expect("file");
        let socket = image.join("sub/socket");
        let _listener = UnixListener::bind(&socket).expect("bound");
        let error = fill(&volume, &image).expect_err("a socket").to_string();
        let expected = format!("{}: it is no file, directory or symbolic link", socket.display());
        assert_eq!(error, expected);
        assert_eq!(fs::read_dir(&volume).expect("a directory").count(), 0);
        fs::remove_dir_all(&dir).expect("removed");
    }

    #[test]
    fn what_others_have_put_into_a_volume_is_theirs() {
        let dir = scratch("others");
        let (image, volume) = (dir.join("image"), dir.join("volume"));
        for name in ["file", "other"] {
            fs::write(image.join(name), "image").expect("file");
        }
        fs::write(volume.join("file"), "theirs").expect("file");
        fill(&volume, &image).expect("copied");
        let text = |name: &str| fs::read_to_string(volume.join(name)).expect(name);
        assert_eq!((text("file").as_str(), text("other").as_str()), ("theirs", "image"));
        // A failure takes nothing of theirs along.
        fs::remove_file(volume.join("other")).expect("removed");
        let _listener = UnixListener::bind(image.join("socket")).expect("bound");
        fill(&volume, &image).expect_err("a socket");
        assert_eq!(text("file"), "theirs");
        assert!(!volume.join("other").exists());
        fs::remove_dir_all(&dir).expect("removed");
    }
}
