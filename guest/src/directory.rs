//! Requests about directories and what is in them (contract §4.6).

use std::collections::BTreeMap;
use std::fs::{self, FileType, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mote_agent::files::{Entry, EntryKind, FilesystemOp, FilesystemRequest, FilesystemResponse};

use crate::place::{Place, failed, make_directories};
use crate::user::Names;

/// Deepest list.
const MAX_DEPTH: u32 = 64;
/// Longest list.
const MAX_ENTRIES: usize = 4096;
/// Most bytes of it, so that it fits into a frame.
const MAX_LIST: usize = 12 << 20;

/// How often a removal starts again, against somebody who goes on to make files.
const MAX_PASSES: u32 = 64;

/// Carries out a request; a failure is a response too.
pub fn carry_out(request: &FilesystemRequest) -> FilesystemResponse {
    attempt(request).unwrap_or_else(|error| FilesystemResponse {
        error: Some(error),
        ..FilesystemResponse::default()
    })
}

fn attempt(request: &FilesystemRequest) -> Result<FilesystemResponse, String> {
    let place = Place::of(request.user.as_deref())?;
    let path = place.path(&request.path)?;
    let mut response = FilesystemResponse { success: true, ..FilesystemResponse::default() };
    match request.op {
        FilesystemOp::Stat => response.entry = Some(describe(&path)?),
        FilesystemOp::MakeDir => {
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => {
                    return Err(format!("directory already exists: {}", path.display()));
                }
                Ok(_) => {
                    let path = path.display();
                    return Err(format!("path already exists but is not a directory: {path}"));
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(failed("stat", &path, &error)),
            }
            make_directories(&path)?;
            response.entry = Some(describe(&path)?);
        }
        FilesystemOp::Move => {
            let destination = request.destination.as_ref();
            let destination = destination.ok_or("move request is missing destination")?;
            let destination = place.path(destination)?;
            rename(&path, &destination)?;
            response.entry = Some(describe(&destination)?);
        }
        FilesystemOp::ListDir => response.entries = list(&path, request.depth.max(1))?,
        FilesystemOp::Remove => remove(&path)?,
    }
    Ok(response)
}

fn rename(from: &Path, to: &Path) -> Result<(), String> {
    if from == Path::new("/") {
        return Err("refusing to move the guest root directory".into());
    }
    let parent = to.parent().ok_or("refusing to replace the guest root directory")?;
    make_directories(parent)?;
    fs::rename(from, to).map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!("source file not found: {}", from.display()),
        _ => format!("failed to rename {} to {}: {error}", from.display(), to.display()),
    })
}

fn remove(path: &Path) -> Result<(), String> {
    if path == Path::new("/") {
        return Err("refusing to remove the guest root directory".into());
    }
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => ("remove directory", remove_tree(path)),
        Ok(_) => ("remove file", fs::remove_file(path)),
        Err(error) => ("stat", Err(error)),
    };
    match removed {
        // Whoever was faster: it is gone.
        (_, Err(error)) if error.kind() == ErrorKind::NotFound => Ok(()),
        (doing, Err(error)) => Err(failed(doing, path, &error)),
        (_, Ok(())) => Ok(()),
    }
}

/// Removes a directory with all that is in it. One pass does not do for many files of a share: what is read
/// of a directory skips some of them when others are removed meanwhile.
fn remove_tree(path: &Path) -> io::Result<()> {
    let mut passes = 0..MAX_PASSES;
    loop {
        match fs::remove_dir_all(path) {
            Err(error)
                if error.kind() == ErrorKind::DirectoryNotEmpty && passes.next().is_some() => {}
            done => return done,
        }
    }
}

fn describe(path: &Path) -> Result<Entry, String> {
    let own = fs::symlink_metadata(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!("file not found: {}", path.display()),
        _ => failed("stat", path, &error),
    })?;
    Ok(entry(&own, path, path, &Names::read()))
}

/// Something in a directory that is to be described.
struct Child {
    /// Where it is.
    real: PathBuf,
    /// The same by the name that the client has for the directory.
    shown: PathBuf,
    depth: u32,
}

/// Everything below a directory, each directory before what is in it, in the order of the names. What
/// vanishes meanwhile is left out. Symbolic links are not followed, so there are no circles.
fn list(path: &Path, depth: u32) -> Result<Vec<Entry>, String> {
    if depth > MAX_DEPTH {
        return Err(format!("directory depth exceeds the {MAX_DEPTH}-level limit"));
    }
    let real = fs::canonicalize(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!("directory not found: {}", path.display()),
        _ => failed("resolve directory", path, &error),
    })?;
    if !fs::metadata(&real).map_err(|error| failed("stat directory", path, &error))?.is_dir() {
        return Err(format!("path is not a directory: {}", path.display()));
    }
    let names = Names::read();
    let mut entries = Vec::new();
    let mut bytes = 0;
    let root = Child { real, shown: path.to_owned(), depth: 0 };
    // The last is the next.
    let mut pending = children(&root, MAX_ENTRIES)?;
    while let Some(child) = pending.pop() {
        let own = match fs::symlink_metadata(&child.real) {
            Ok(own) => own,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("stat", &child.shown, &error)),
        };
        let entry = entry(&own, &child.real, &child.shown, &names);
        // Plain data, which always serialises.
        bytes += serde_json::to_vec(&entry).unwrap_or_default().len() + 1;
        if bytes > MAX_LIST {
            return Err(format!("directory listing exceeds the {MAX_LIST}-byte response limit"));
        }
        entries.push(entry);
        if own.is_dir() && child.depth < depth {
            let room = MAX_ENTRIES - entries.len() - pending.len();
            pending.append(&mut children(&child, room)?);
        }
    }
    Ok(entries)
}

/// What is in a directory, the last name first; more than there is room for is an error.
fn children(directory: &Child, room: usize) -> Result<Vec<Child>, String> {
    let Child { real, shown, depth } = directory;
    let failed = |error| failed("read directory", shown, &error);
    let items = match fs::read_dir(real) {
        Ok(items) => items,
        Err(error) if error.kind() == ErrorKind::NotFound && *depth > 0 => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for item in items {
        if names.len() == room {
            return Err(format!("directory listing exceeds the {MAX_ENTRIES}-entry limit"));
        }
        names.push(item.map_err(failed)?.file_name());
    }
    names.sort_unstable_by(|a, b| b.cmp(a));
    let child = |name| Child { real: real.join(&name), shown: shown.join(&name), depth: depth + 1 };
    Ok(names.into_iter().map(child).collect())
}

/// What is at a path, given the metadata of that itself.
fn entry(own: &Metadata, real: &Path, shown: &Path, names: &Names) -> Entry {
    let is_link = own.is_symlink();
    let target = if is_link { fs::metadata(real).ok() } else { None };
    let meant = target.as_ref().unwrap_or(own);
    let symlink_target = is_link.then(|| {
        let target = fs::canonicalize(real).or_else(|_| fs::read_link(real));
        text(&target.unwrap_or_else(|_| real.to_owned()))
    });
    Entry {
        name: shown.file_name().map_or("/".into(), |name| text(Path::new(name))),
        kind: kind(meant.file_type()),
        path: text(shown),
        size: i64::try_from(own.len()).unwrap_or(i64::MAX),
        mode: meant.mode() & 0o7777,
        permissions: permissions(own),
        owner: names.user(own.uid()),
        group: names.group(own.gid()),
        modified_seconds: own.mtime(),
        modified_nanos: own.mtime_nsec() as i32,
        symlink_target,
        metadata: BTreeMap::new(),
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn kind(of: FileType) -> EntryKind {
    if of.is_file() {
        EntryKind::File
    } else if of.is_dir() {
        EntryKind::Directory
    } else {
        EntryKind::Unspecified
    }
}

fn permissions(metadata: &Metadata) -> String {
    let kind = match metadata.file_type() {
        of if of.is_symlink() => 'L',
        of if of.is_dir() => 'd',
        of if of.is_file() => '-',
        _ => '?',
    };
    let letter = |at: u32| {
        if metadata.mode() >> (8 - at) & 1 == 1 { "rwx".as_bytes()[at as usize % 3] } else { b'-' }
    };
    [kind].into_iter().chain((0..9).map(|at| char::from(letter(at)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{PermissionsExt, symlink};

    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("mote-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).expect("directory");
            Tree(path.canonicalize().expect("there"))
        }

        fn ask(&self, op: FilesystemOp, path: impl AsRef<Path>) -> FilesystemResponse {
            self.ask_with(op, path, |_| {})
        }

        fn ask_with(
            &self,
            op: FilesystemOp,
            path: impl AsRef<Path>,
            change: impl Fn(&mut FilesystemRequest),
        ) -> FilesystemResponse {
            let path = self.0.join(path).as_path().into();
            let mut request = FilesystemRequest {
                op,
                path,
                destination: None,
                depth: 0,
                user: None,
                request_id: None,
            };
            change(&mut request);
            carry_out(&request)
        }

        fn list(&self, path: &str, depth: u32) -> Vec<String> {
            let response = self.ask_with(FilesystemOp::ListDir, path, |it| it.depth = depth);
            assert_eq!(response.error, None);
            let start = format!("{}/", self.0.display());
            let shown = |entry: Entry| entry.path.strip_prefix(&start).expect("below").to_owned();
            response.entries.into_iter().map(shown).collect()
        }

        fn error(&self, response: FilesystemResponse) -> String {
            assert!(!response.success && response.entry.is_none() && response.entries.is_empty());
            response.error.expect("an error").replace(&self.0.display().to_string(), "")
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn entries_say_what_is_there() {
        let tree = Tree::new("entries");
        fs::write(tree.0.join("file"), "hello").expect("file");
        fs::set_permissions(tree.0.join("file"), fs::Permissions::from_mode(0o4751)).expect("mode");
        symlink("file", tree.0.join("link")).expect("link");
        symlink("loop", tree.0.join("loop")).expect("link");
        symlink("/no/such", tree.0.join("dangling")).expect("link");
        fs::create_dir(tree.0.join("dir")).expect("directory");
        symlink("dir", tree.0.join("dirlink")).expect("link");
        let stat = |name: &str| tree.ask(FilesystemOp::Stat, name).entry.expect("there");
        let file = stat("file");
        assert_eq!((file.name.as_str(), file.kind, file.size), ("file", EntryKind::File, 5));
        assert_eq!((file.mode, file.permissions.as_str()), (0o4751, "-rwxr-x--x"));
        assert_eq!(file.symlink_target, None);
        assert!(file.modified_seconds > 1_600_000_000);
        let link = stat("link");
        assert_eq!((link.kind, link.mode, link.size), (EntryKind::File, 0o4751, 4));
        assert_eq!(link.permissions, "Lrwxrwxrwx");
        assert_eq!(link.symlink_target, Some(text(&tree.0.join("file"))));
        assert_eq!(
            (stat("dirlink").kind, stat("dir").kind),
            (EntryKind::Directory, EntryKind::Directory)
        );
        for (name, target) in [("loop", "loop"), ("dangling", "/no/such")] {
            let entry = stat(name);
            assert_eq!(entry.kind, EntryKind::Unspecified, "{name}");
            assert_eq!(entry.symlink_target.as_deref(), Some(target));
        }
        assert_eq!(describe(Path::new("/")).expect("there").name, "/");
        assert_eq!(describe(Path::new("/dev/null")).expect("there").permissions, "?rw-rw-rw-");
        for (name, expected) in [
            ("no", "file not found: /no"),
            ("file/x", "failed to stat /file/x: Not a directory (os error 20)"),
            ("loop/x", "failed to stat /loop/x: Too many levels of symbolic links (os error 40)"),
        ] {
            assert_eq!(tree.error(tree.ask(FilesystemOp::Stat, name)), expected);
        }
        let long = "x".repeat(256);
        let told = tree.error(tree.ask(FilesystemOp::Stat, &long));
        assert!(told.ends_with("File name too long (os error 36)"), "{told}");
    }

    #[test]
    fn lists_go_as_deep_as_they_shall_and_follow_no_links() {
        let tree = Tree::new("lists");
        fs::create_dir_all(tree.0.join("b/c/d")).expect("directories");
        let long = "n".repeat(255);
        for name in ["a", "b/z", "b/c/y", &long] {
            fs::write(tree.0.join(name), "").expect("file");
        }
        symlink("..", tree.0.join("b/up")).expect("link");
        symlink("b", tree.0.join("s")).expect("link");
        fs::write(tree.0.join(std::ffi::OsStr::from_bytes(b"t\xff")), "").expect("file");
        let shallow = ["a", "b", &long, "s", "t\u{fffd}"];
        assert_eq!(tree.list("", 0), shallow);
        assert_eq!(tree.list("", 1), shallow);
        let deep = ["a", "b", "b/c", "b/c/d", "b/c/y", "b/up", "b/z", &long, "s", "t\u{fffd}"];
        assert_eq!(tree.list("", 3), deep);
        assert_eq!(tree.list("", 64), deep);
        // By the name that the client has for it.
        assert_eq!(tree.list("s", 1), ["s/c", "s/up", "s/z"]);
        symlink("loop", tree.0.join("loop")).expect("link");
        for (name, depth, expected) in [
            ("a", 1, "path is not a directory: /a"),
            ("no", 1, "directory not found: /no"),
            (
                "loop",
                1,
                "failed to resolve directory /loop: Too many levels of symbolic links (os error 40)",
            ),
            ("", 65, "directory depth exceeds the 64-level limit"),
        ] {
            let response = tree.ask_with(FilesystemOp::ListDir, name, |it| it.depth = depth);
            assert_eq!(tree.error(response), expected);
        }
    }

    #[test]
    fn a_list_that_is_too_long_is_an_error_and_no_longer_than_that() {
        let tree = Tree::new("long");
        fs::create_dir(tree.0.join("d")).expect("directory");
        for at in 0..4095 {
            fs::write(tree.0.join(format!("d/{at}")), "").expect("file");
        }
        assert_eq!(tree.list("", 2).len(), 4096);
        fs::write(tree.0.join("e"), "").expect("file");
        let told = tree.error(tree.ask_with(FilesystemOp::ListDir, "", |it| it.depth = 2));
        assert_eq!(told, "directory listing exceeds the 4096-entry limit");
        // Names that JSON writes at six times their length, 4,096 bytes of them in each path.
        let mut path = tree.0.join("deep");
        for _ in 0..14 {
            path.push("\u{1}".repeat(250));
        }
        fs::create_dir_all(&path).expect("directories");
        for at in 0..1000 {
            fs::write(path.join(at.to_string()), "").expect("file");
        }
        let told = tree.error(tree.ask_with(FilesystemOp::ListDir, "deep", |it| it.depth = 64));
        assert_eq!(told, "directory listing exceeds the 12582912-byte response limit");
    }

    #[test]
    fn directories_are_made_moved_and_removed() {
        let tree = Tree::new("changes");
        let made = tree.ask(FilesystemOp::MakeDir, "a/b/c").entry.expect("made");
        assert_eq!((made.name.as_str(), made.kind), ("c", EntryKind::Directory));
        fs::write(tree.0.join("f"), "").expect("file");
        let to = |name: &str| {
            let path = tree.0.join(name);
            move |request: &mut FilesystemRequest| request.destination = Some(path.as_path().into())
        };
        for (name, expected) in [
            ("a/b", "directory already exists: /a/b"),
            ("f", "path already exists but is not a directory: /f"),
            ("f/x", "failed to stat /f/x: Not a directory (os error 20)"),
        ] {
            assert_eq!(tree.error(tree.ask(FilesystemOp::MakeDir, name)), expected);
        }
        let moved = tree.ask_with(FilesystemOp::Move, "f", to("x/y/f")).entry.expect("moved");
        assert_eq!(moved.path, text(&tree.0.join("x/y/f")));
        for (from, destination, expected) in [
            ("f", "g", "source file not found: /f"),
            ("a", "x/y/f/g", "path is a file: /x/y/f"),
            ("a", "a/b/c/d", "failed to rename /a to /a/b/c/d: Invalid argument (os error 22)"),
            ("/", "g", "refusing to move the guest root directory"),
            ("a", "/", "refusing to replace the guest root directory"),
        ] {
            let response = tree.ask_with(FilesystemOp::Move, from, to(destination));
            assert_eq!(tree.error(response), expected);
        }
        let told = tree.error(tree.ask(FilesystemOp::Move, "a"));
        assert_eq!(told, "move request is missing destination");

        fs::create_dir(tree.0.join("kept")).expect("directory");
        fs::write(tree.0.join("kept/file"), "").expect("file");
        symlink("../../kept", tree.0.join("a/b/link")).expect("link");
        for name in ["a", "x/y/f", "no", "no/such"] {
            assert!(tree.ask(FilesystemOp::Remove, name).success, "{name}");
        }
        assert_eq!(tree.list("", 3), ["kept", "kept/file", "x", "x/y"]);
        let told = tree.error(tree.ask(FilesystemOp::Remove, "/"));
        assert_eq!(told, "refusing to remove the guest root directory");
    }
}
