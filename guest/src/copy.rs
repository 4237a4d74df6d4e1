//! Copies of directories: what the image has where a volume is mounted, into a volume that is empty.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::Path;

/// Copies what is in a directory into an empty one: files, directories and symbolic links, with their owners, modes
/// and times. The directory itself becomes like the other, too. After a failure it is empty again.
///
/// # Errors
/// The path that cannot be copied, and the reason.
pub fn fill(empty: &Path, from: &Path) -> io::Result<()> {
    copy_contents(from, empty).inspect_err(|_| clear(empty))
}

fn copy_contents(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from).map_err(at(from))? {
        let name = entry.map_err(at(from))?.file_name();
        copy(&from.join(&name), &to.join(&name))?;
    }
    fs::metadata(from).and_then(|metadata| become_like(&metadata, to)).map_err(at(from))
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from).map_err(at(from))?;
    if metadata.is_dir() {
        fs::create_dir(to).map_err(at(from))?;
        return copy_contents(from, to);
    }
    let copied = if metadata.is_symlink() {
        fs::read_link(from).and_then(|target| symlink(target, to))
    } else if metadata.is_file() {
        let open = || Ok((File::open(from)?, File::create_new(to)?));
        open().and_then(|(mut from, mut to)| io::copy(&mut from, &mut to)).map(drop)
    } else {
        Err(io::Error::other("it is no file, directory or symbolic link"))
    };
    copied.and_then(|()| become_like(&metadata, to)).map_err(at(from))
}

/// Gives a copy the owner, mode and times of what it is a copy of.
fn become_like(original: &Metadata, copy: &Path) -> io::Result<()> {
    let own = fs::symlink_metadata(copy)?;
    let owner = (original.uid(), original.gid());
    // A host where only root may do this needs it only for files of others.
    if (own.uid(), own.gid()) != owner {
        lchown(copy, Some(owner.0), Some(owner.1))?;
    }
    if original.is_symlink() {
        return Ok(());
    }
    // After the change of owner, which takes set-user-id bits away.
    fs::set_permissions(copy, PermissionsExt::from_mode(original.mode() & 0o7777))?;
    let times = fs::FileTimes::new().set_modified(original.modified()?);
    File::open(copy)?.set_times(times.set_accessed(original.accessed()?))
}

/// Removes everything in a directory, as far as that can be done.
fn clear(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let _ = match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(entry.path()),
            _ => fs::remove_file(entry.path()),
        };
    }
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
}
