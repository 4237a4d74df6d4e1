//! Assembles a container's root file system on the host, in a mount namespace of its own: the root, and over places
//! in it what is bound there. The box gets all of it as one share.
//!
//! An image is hostile: it may have a symbolic link wherever something is to be mounted. So a destination is walked
//! name by name below a directory that is held open, no name is ever followed by the kernel, and links and `..` are
//! taken as they are meant with that directory as the root. `openat2(RESOLVE_IN_ROOT)` does the same for
//! what is there, but does not say where a link leads to something that is yet to be made, which images have for
//! `/etc/resolv.conf`.

use std::collections::VecDeque;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::copy_up;
use super::mounts::{Bind, Mount, Tmpfs};
use crate::sys::mounts::{self, Attributes, Extent};

/// Most links on the way to a destination, as for the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// Most names on the way to a destination, those of links included.
const MAX_NAMES: usize = 4096;

/// What is wanted.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The directory that becomes the root.
    pub source: &'a Path,
    /// Where it is assembled: an empty directory.
    pub target: &'a Path,
    /// The directory that relative sources are in.
    pub bundle: &'a Path,
    /// What is mounted in it, in order.
    pub mounts: &'a [Mount],
    /// Directories that the guest mounts something on, or works in.
    pub directories: Vec<PathBuf>,
    /// Whether the root itself is read-only.
    pub read_only: bool,
}

/// Assembles it. The process must be in a mount namespace of its own, of which nothing propagates.
///
/// # Errors
/// A source is not there, a destination cannot be made, or the host does not allow a mount.
pub fn assemble(wanted: &Wanted<'_>) -> Result<()> {
    let (source, target) = (wanted.source.display(), wanted.target.display());
    let is_directory = fs::metadata(wanted.source)
        .with_context(|| format!("look at root.path, {source}"))?
        .is_dir();
    ensure!(is_directory, "root.path, {source}, is not a directory");
    mounts::bind(wanted.source, wanted.target)
        .with_context(|| format!("mount root.path, {source}, at {target}"))?;
    let root = File::open(wanted.target).with_context(|| format!("open {target}"))?;
    for directory in &wanted.directories {
        let made = place(&root, directory, Kind::Directory);
        made.with_context(|| format!("create {} in the root file system", directory.display()))?;
    }
    for mount in wanted.mounts {
        match mount {
            Mount::Bind(bind) => {
                put(&root, wanted.bundle, bind).with_context(|| {
                    let (from, to) = (bind.source.display(), bind.destination.display());
                    format!("mount {from} at {to} in the container")
                })?;
            }
            Mount::Tmpfs(tmpfs) if tmpfs.on_host => {
                put_tmpfs(&root, tmpfs).with_context(|| {
                    format!("mount a tmpfs at {} in the container", tmpfs.destination.display())
                })?;
            }
            Mount::Tmpfs(_) | Mount::SharedMemory(_) => {}
        }
    }
    if wanted.read_only {
        let read_only = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
        mounts::set_attributes(&root, read_only, false, Extent::One)
            .with_context(|| format!("make {target} read-only"))?;
    }
    Ok(())
}

fn put(root: &File, bundle: &Path, bind: &Bind) -> Result<()> {
    let source = bundle.join(&bind.source);
    let (tree, extent, own_extent) = match mounts::clone_mount(&source, bind.extent) {
        // In a user namespace, what the host has mounted below is not to be uncovered (mount_namespaces(7)): all of it
        // comes, and what is said of the mount holds for all of it.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            (mounts::clone_mount(&source, Extent::Tree)?, Extent::Tree, Extent::Tree)
        }
        tree => (tree?, bind.extent, Extent::One),
    };
    let tree = File::from(tree);
    let what = tree.metadata()?.file_type();
    ensure!(
        !what.is_char_device() && !what.is_block_device(),
        "it is a device of the host, and a box has those of its own kernel alone; leave it out"
    );
    let kind = if what.is_dir() { Kind::Directory } else { Kind::File };
    mounts::change_as_permitted(&tree, bind.tree_attributes, true, extent)?;
    if bind.attributes != Attributes::default() {
        mounts::change_as_permitted(&tree, bind.attributes, false, own_extent)?;
    }
    let at = place(root, &bind.destination, kind)?;
    Ok(mounts::attach(&tree, &at)?)
}

/// Size of a tmpfs of the host's for which nothing is asked: what engines and images have below /run fits.
const DEFAULT_TMPFS_SIZE: &str = "64m";

fn put_tmpfs(root: &File, tmpfs: &Tmpfs) -> Result<()> {
    let at = place(root, &tmpfs.destination, Kind::Directory)?;
    let mut options = Vec::new();
    let mut attributes = Attributes::default();
    let (mut copies, mut read_only) = (false, false);
    for option in &tmpfs.options {
        match (option.split_once('='), option.as_str()) {
            (Some((name, value)), _) => options.push((name.to_owned(), value.to_owned())),
            (None, "tmpcopyup") => copies = true,
            // Only once what it is to have is in it.
            (None, "ro") => read_only = true,
            (None, "nosuid") => attributes.set |= libc::MOUNT_ATTR_NOSUID,
            (None, "nodev") => attributes.set |= libc::MOUNT_ATTR_NODEV,
            (None, "noexec") => attributes.set |= libc::MOUNT_ATTR_NOEXEC,
            (None, _) => {}
        }
    }
    if !options.iter().any(|(name, _)| name == "size") {
        // Else half of the host's memory.
        options.push(("size".into(), DEFAULT_TMPFS_SIZE.into()));
    }
    let mount = mounts::new_tmpfs(&options, attributes).context("make a tmpfs")?;
    if copies {
        copy_up::copy(&at, &mount).context("copy what the image has there")?;
        if !options.iter().any(|(name, _)| name == "mode") {
            copy_up::give(&mount, &at.metadata()?)?;
        }
    }
    if read_only {
        let read_only = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
        mounts::set_attributes(&mount, read_only, false, Extent::One)?;
    }
    Ok(mounts::attach(&mount, &at)?)
}

/// What is to be mounted over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
}

/// A place below a root: the directories on the way to it, all held open. `..` is the one before.
struct Place<'a> {
    root: &'a File,
    way: Vec<File>,
}

impl Place<'_> {
    fn here(&self) -> &File {
        self.way.last().unwrap_or(self.root)
    }
}

/// The file or directory at a path below a root; what is not there is made.
fn place(root: &File, path: &Path, kind: Kind) -> Result<File> {
    let mut names: VecDeque<Step> = steps(path);
    let mut place = Place { root, way: Vec::new() };
    let (mut links, mut count) = (0, 0);
    while let Some(step) = names.pop_front() {
        count += 1;
        ensure!(count <= MAX_NAMES, "the path has too many names");
        let name = match step {
            Step::Root => {
                place.way.clear();
                continue;
            }
            Step::Up => {
                place.way.pop();
                continue;
            }
            Step::Into(name) => CString::new(name.as_bytes())?,
        };
        let is_last = names.is_empty();
        let found = match mounts::look_up(place.here(), &name) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make(&place, &name, if is_last { kind } else { Kind::Directory })?
            }
            found => found?,
        };
        let what = found.metadata()?.file_type();
        if what.is_symlink() {
            links += 1;
            ensure!(links <= MAX_LINKS, "there are too many symbolic links on the way");
            for step in steps(Path::new(&mounts::read_link(&found)?)).into_iter().rev() {
                names.push_front(step);
            }
        } else if is_last && kind == Kind::File {
            ensure!(!what.is_dir(), "a file cannot be mounted over a directory");
            return Ok(found);
        } else {
            ensure!(what.is_dir(), "{} is not a directory", name.to_string_lossy());
            place.way.push(found);
        }
    }
    if kind == Kind::File {
        bail!("a file cannot be mounted over a directory");
    }
    // Anew, because the root itself may be where it leads.
    Ok(place.here().try_clone()?)
}

fn make(place: &Place<'_>, name: &CString, kind: Kind) -> Result<File> {
    let here = place.here();
    let made = match kind {
        Kind::Directory => mounts::make_directory(here, name),
        Kind::File => mounts::make_file(here, name),
    };
    match made {
        // Another container that shares the directory was faster.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        made => made.with_context(|| format!("create {}", name.to_string_lossy()))?,
    }
    Ok(mounts::look_up(here, name)?)
}

/// One step on the way of a path.
#[derive(Debug)]
enum Step {
    Root,
    Up,
    Into(OsString),
}

fn steps(path: &Path) -> VecDeque<Step> {
    let step = |component| match component {
        Component::RootDir => Some(Step::Root),
        Component::ParentDir => Some(Step::Up),
        Component::Normal(name) => Some(Step::Into(name.to_owned())),
        Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(step).collect()
}

/// Where a path leads in a root file system, whose links are followed as they are meant there; what is not there yet
/// counts as directories.
///
/// # Errors
/// There are too many links on the way, or a directory cannot be looked at.
pub fn resolve(root: &File, path: &Path) -> Result<PathBuf> {
    let mut names = steps(path);
    // Each name on the way, with what is there.
    let mut way: Vec<(OsString, Option<File>)> = Vec::new();
    let (mut links, mut count) = (0, 0);
    while let Some(step) = names.pop_front() {
        count += 1;
        ensure!(count <= MAX_NAMES, "the path has too many names");
        let name = match step {
            Step::Root => {
                way.clear();
                continue;
            }
            Step::Up => {
                way.pop();
                continue;
            }
            Step::Into(name) => name,
        };
        let here = way.last().map_or(Some(root), |(_, here)| here.as_ref());
        let c_name = CString::new(name.as_bytes())?;
        let found = here.and_then(|here| mounts::look_up(here, &c_name).ok());
        match &found {
            Some(link) if link.metadata()?.is_symlink() => {
                links += 1;
                ensure!(links <= MAX_LINKS, "there are too many symbolic links on the way");
                for step in steps(Path::new(&mounts::read_link(link)?)).into_iter().rev() {
                    names.push_front(step);
                }
            }
            _ => way.push((name, found)),
        }
    }
    Ok([OsString::from("/")].into_iter().chain(way.into_iter().map(|(name, _)| name)).collect())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::sys::{capabilities, confine, process};

    /// A root file system, a directory of the host's beside it, and a place to assemble.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let dir =
                std::env::temp_dir().join(format!("mote-oci-root-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            for name in ["rootfs/etc", "host/dir", "root"] {
                fs::create_dir_all(dir.join(name)).expect("directory");
            }
            fs::write(dir.join("host/file"), "of the host").expect("file");
            fs::write(dir.join("rootfs/etc/old"), "of the image").expect("file");
            Scratch(dir)
        }

        fn link(&self, target: &str, link: &str) {
            symlink(target, self.0.join("rootfs").join(link)).expect("link");
        }

        fn wanted<'a>(
            &'a self,
            target: &'a Path,
            source: &'a Path,
            mounts: &'a [Mount],
        ) -> Wanted<'a> {
            Wanted {
                source,
                target,
                bundle: &self.0,
                mounts,
                directories: vec![],
                read_only: false,
            }
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn bind(source: &str, destination: &str) -> Mount {
        Mount::Bind(Bind {
            source: source.into(),
            destination: destination.into(),
            extent: Extent::Tree,
            attributes: Attributes::default(),
            tree_attributes: Attributes::default(),
        })
    }

    #[test]
    fn where_a_path_leads_is_told() {
        let scratch = Scratch::new("resolve");
        scratch.link("../run/resolve/x", "etc/resolv.conf");
        scratch.link("/etc", "absolute");
        scratch.link("loop", "loop");
        let root = File::open(scratch.0.join("rootfs")).expect("directory");
        for (path, expected) in [
            ("/etc/resolv.conf", "/run/resolve/x"),
            ("/absolute/resolv.conf", "/run/resolve/x"),
            ("/absolute/new/../old", "/etc/old"),
            ("/../../x", "/x"),
            ("/", "/"),
        ] {
            assert_eq!(resolve(&root, Path::new(path)).expect(path), Path::new(expected));
        }
        assert!(resolve(&root, Path::new("/loop")).is_err());
    }

    /// Does the work in a mount namespace of its own. Users other than root cannot have one so simply, and the rest
    /// of the test's assertions are of root's alone.
    fn apart(work: impl FnOnce() -> Result<()>) {
        if !capabilities::is_administrator() {
            return println!("skipped: needs CAP_SYS_ADMIN");
        }
        let done = process::succeeds_in_child(|| {
            confine::unshare(libc::CLONE_NEWNS)?;
            confine::detach_mounts()?;
            work().map_err(|error| {
                eprintln!("{error:#}");
                io::Error::other(error)
            })
        });
        assert!(done, "see standard error");
    }

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn links_lead_to_where_they_do_in_the_box() {
        let scratch = Scratch::new("links");
        // To the host, if somebody followed them: by an absolute path, by `..`, to what is not there.
        let outside = scratch.0.join("host").display().to_string();
        scratch.link(&outside, "absolute");
        scratch.link("../../../../../../../..", "up");
        scratch.link("../run/systemd/resolve/stub.conf", "etc/resolv.conf");
        scratch.link("/proc/self/root", "magic");
        let (source, target) = (scratch.0.join("rootfs"), scratch.0.join("root"));
        let mounts = [
            bind("host/file", "/etc/resolv.conf"),
            bind("host/dir", "/absolute/new"),
            bind("host/dir", "/up/up/above"),
            bind("host/file", "/magic/tmp/x"),
            bind("host/file", "/up/etc/old"),
        ];
        apart(|| {
            assemble(&scratch.wanted(&target, &source, &mounts))?;
            for path in ["run/systemd/resolve/stub.conf", "proc/self/root/tmp/x", "etc/old"] {
                ensure!(
                    read(&target.join(path)) == "of the host",
                    "{path}: {}",
                    read(&target.join(path))
                );
            }
            ensure!(target.join("above").is_dir(), "above");
            Ok(())
        });
        // Nothing was made on the host, but the mount points in the image.
        assert!(!scratch.0.join("host/new").exists() && !scratch.0.join("above").exists());
        assert!(!Path::new("/above").exists());
        assert_eq!(read(&source.join("etc/old")), "of the image");
    }

    #[test]
    fn places_that_cannot_be_are_refused() {
        let scratch = Scratch::new("refused");
        scratch.link("loop", "loop");
        let (source, target) = (scratch.0.join("rootfs"), scratch.0.join("root"));
        for (mount, expected) in [
            (bind("host/dir", "/loop/x"), "too many symbolic links"),
            (bind("host/file", "/etc"), "over a directory"),
            (bind("host/dir", "/etc/old"), "is not a directory"),
            (bind("host/dir", "/etc/old/x"), "is not a directory"),
            (bind("host/missing", "/x"), "No such file or directory"),
        ] {
            apart(|| {
                let error = match assemble(&scratch.wanted(&target, &source, &[mount])) {
                    Ok(()) => bail!("{expected}: done"),
                    Err(error) => format!("{error:#}"),
                };
                ensure!(error.contains(expected), "{error}");
                Ok(())
            });
        }
    }

    #[test]
    fn what_is_read_only_is_that_alone() {
        let scratch = Scratch::new("readonly");
        let (source, target) = (scratch.0.join("rootfs"), scratch.0.join("root"));
        let mut kept = bind("host/file", "/file");
        if let Mount::Bind(bind) = &mut kept {
            bind.attributes.set = libc::MOUNT_ATTR_RDONLY;
        }
        let tmpfs = Mount::Tmpfs(Tmpfs {
            destination: "/etc".into(),
            options: ["size=1m", "mode=0711", "tmpcopyup"].map(str::to_owned).into(),
            on_host: true,
        });
        let mounts = [kept, bind("host/dir", "/dir"), tmpfs, bind("host/file", "/etc/bound")];
        apart(|| {
            let mut wanted = scratch.wanted(&target, &source, &mounts);
            wanted.read_only = true;
            wanted.directories = vec!["/proc".into(), "/work/deep".into()];
            assemble(&wanted)?;
            ensure!(target.join("proc").is_dir() && target.join("work/deep").is_dir(), "made");
            for path in ["x", "file"] {
                let error = fs::write(target.join(path), "").expect_err("read-only");
                ensure!(error.kind() == ErrorKind::ReadOnlyFilesystem, "{path}: {error}");
            }
            fs::write(target.join("dir/new"), "")?;
            ensure!(read(&target.join("etc/old")) == "of the image", "copied");
            ensure!(read(&target.join("etc/bound")) == "of the host", "bound over a tmpfs");
            fs::write(target.join("etc/new"), "")?;
            Ok(())
        });
        assert!(!source.join("etc/new").exists() && !source.join("etc/bound").exists());
    }

    #[test]
    fn ten_thousand_mounts_are_made() {
        let scratch = Scratch::new("many");
        let (source, target) = (scratch.0.join("rootfs"), scratch.0.join("root"));
        let mounts: Vec<Mount> =
            (0..10_000).map(|number| bind("host/file", &format!("/many/{number}"))).collect();
        apart(|| {
            assemble(&scratch.wanted(&target, &source, &mounts))?;
            ensure!(read(&target.join("many/9999")) == "of the host", "the last");
            Ok(())
        });
    }
}
