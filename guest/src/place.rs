//! Where the paths of a client's file requests lead, and with whose rights (contract §4.6).

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use mote_agent::text::Text;

use crate::sys::files;
use crate::user;

/// Whose home paths start from when nobody is named.
const ROOTS_HOME: &str = "/root";

/// The starting point of paths.
#[derive(Debug)]
pub struct Place {
    /// `Err` with the user who has none.
    home: Result<PathBuf, String>,
}

impl Place {
    /// Root's, or that of a user whose rights this session has from now on.
    ///
    /// # Errors
    /// The text for the client: there is no such user.
    pub fn of(user: Option<&str>) -> Result<Self, String> {
        let Some(user) = user.filter(|user| !user.is_empty()) else {
            return Ok(Place { home: Ok(ROOTS_HOME.into()) });
        };
        let identity = user::resolve(Some(user))?;
        files::become_user(identity.uid, identity.gid, &identity.groups)
            .map_err(|error| format!("take on the rights of user '{user}': {error}"))?;
        let home = identity.home.filter(|home| home.starts_with('/')).map(PathBuf::from);
        let home = home.or_else(|| (identity.uid == 0).then(|| ROOTS_HOME.into()));
        let home = home.ok_or_else(|| format!("user {user:?} has no valid home directory"));
        Ok(Place { home })
    }

    /// The path that is meant: absolute, without `.` and `..`, whose effect does not depend on symbolic links.
    ///
    /// # Errors
    /// The text for the client.
    pub fn path(&self, named: &Text) -> Result<PathBuf, String> {
        let bytes = named.as_bytes();
        if bytes.contains(&0) {
            return Err("file path contains NUL".into());
        }
        let relative = match bytes {
            [b'/', ..] => return Ok(normal(Path::new(&**named))),
            b"~" => b"",
            [b'~', b'/', rest @ ..] => rest,
            [b'~', ..] => return Err("user-specific home expansion is not supported".into()),
            other => other,
        };
        let home = self.home.as_ref().map_err(Clone::clone)?;
        // Not `join`, by which `~//etc` would be /etc.
        let below = [home.as_os_str().as_bytes(), b"/", relative].concat();
        Ok(normal(Path::new(OsStr::from_bytes(&below))))
    }
}

fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => drop(normal.pop()),
            _ => {}
        }
    }
    normal
}

/// Makes a directory, and those above it, where they are missing.
///
/// # Errors
/// The text for the client.
pub fn make_directories(path: &Path) -> Result<(), String> {
    let mut missing = Vec::new();
    for ancestor in path.ancestors() {
        match fs::metadata(ancestor) {
            Ok(metadata) if metadata.is_dir() => break,
            Ok(_) => return Err(format!("path is a file: {}", ancestor.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => missing.push(ancestor),
            Err(error) => return Err(failed("stat", ancestor, &error)),
        }
    }
    for directory in missing.into_iter().rev() {
        match fs::create_dir(directory) {
            // Somebody else was faster.
            Err(error) if error.kind() == ErrorKind::AlreadyExists && directory.is_dir() => {}
            Err(error) => return Err(failed("create directory", directory, &error)),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// The text for a client about what the kernel refused.
pub fn failed(doing: &str, path: &Path, error: &io::Error) -> String {
    format!("failed to {doing} {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_start_from_the_root_or_from_home() {
        let place = Place { home: Ok("/home/app".into()) };
        for (named, expected) in [
            ("/a/b", "/a/b"),
            ("//a/./b/../c/", "/a/c"),
            ("/../..", "/"),
            ("", "/home/app"),
            ("~", "/home/app"),
            ("~/", "/home/app"),
            ("~//etc", "/home/app/etc"),
            ("x/y", "/home/app/x/y"),
            ("../z", "/home/z"),
            ("a~", "/home/app/a~"),
        ] {
            assert_eq!(place.path(&named.into()), Ok(expected.into()), "{named}");
        }
        let bytes = OsStr::from_bytes(b"/a\xff");
        assert_eq!(place.path(&bytes.into()), Ok(bytes.into()));
        let told = |named: &str| place.path(&named.into()).expect_err(named);
        assert_eq!(told("~root/x"), "user-specific home expansion is not supported");
        assert_eq!(told("/a\0b"), "file path contains NUL");
        let homeless = Place { home: Err("has none".into()) };
        assert_eq!(homeless.path(&"/a".into()), Ok("/a".into()));
        assert_eq!(homeless.path(&"a".into()), Err("has none".into()));
    }
}
