//! Paths that the spec names on the host, checked before anything is opened.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::spec::json::Report;

/// Longest Unix socket path in bytes (`sun_path` less its terminator, unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// An existing directory that can be read, as an absolute path.
pub(super) fn directory(path: &Path, field: &str, report: &mut Report) -> Option<PathBuf> {
    let shown = path.display();
    let checked = fs::metadata(path).and_then(|metadata| {
        if metadata.is_dir() {
            fs::read_dir(path).map(drop)
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        }
    });
    match checked.and_then(|()| fs::canonicalize(path)) {
        Ok(absolute) => Some(absolute),
        Err(error) => {
            report.error(
                field,
                match error.kind() {
                    _ if path.as_os_str().is_empty() => "is empty, must be a host directory".into(),
                    io::ErrorKind::NotFound => format!("{shown} does not exist; name a host directory"),
                    io::ErrorKind::NotADirectory => format!("{shown} is not a directory; name one"),
                    io::ErrorKind::PermissionDenied => {
                        format!("{shown} may not be read by this user; change its permissions or run as its owner")
                    }
                    _ => format!("{shown} cannot be read: {error}"),
                },
            );
            None
        }
    }
}

/// Why mote cannot listen on a Unix socket at `path`, as far as its name and directory tell.
pub(super) fn socket_problem(path: &Path) -> Option<String> {
    let len = path.as_os_str().len();
    if len > MAX_SOCKET_PATH {
        return Some(format!(
            "has {len} bytes, a Unix socket's path can have {MAX_SOCKET_PATH}; use a shorter directory"
        ));
    }
    // A socket of an earlier run is replaced; anything else is somebody's file.
    if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.file_type().is_socket()) {
        return Some(format!(
            "{} exists and is not a socket; remove it or choose another path",
            path.display()
        ));
    }
    parent_problem(path)
}

/// Why a file cannot be created at `path`, as far as its directory tells.
pub(super) fn parent_problem(path: &Path) -> Option<String> {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Some("is not the path of a file".into()),
    };
    match fs::metadata(parent) {
        Ok(metadata) if metadata.is_dir() => None,
        Ok(_) => Some(format!("{} is not a directory; name a file in one", parent.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some(format!("its directory {} does not exist; create it first", parent.display()))
        }
        Err(error) => Some(format!("its directory {} cannot be used: {error}", parent.display())),
    }
}
