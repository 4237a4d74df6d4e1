//! The directories of the host that the guest gets as virtio-fs shares.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use mote_agent::instance::ROOT_TAG;

use super::paths::directory;
use crate::layout;
use crate::output_file::enters;
use crate::spec::Spec;
use crate::spec::json::Report;
use crate::virtio::fs::MAX_TAG;

/// One virtio-fs share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Its tag, 1 to [`MAX_TAG`] bytes.
    pub tag: String,
    /// The host directory, absolute.
    pub host_path: PathBuf,
    /// Whether virtiofsd refuses writes.
    pub read_only: bool,
}

/// The root file system, then the spec's own shares in its order.
pub(super) fn plan(spec: &Spec, report: &mut Report) -> Vec<Share> {
    let mut shares = Vec::new();
    if let Some(host_path) = directory(&spec.rootfs_path, "rootfs_path", report) {
        shares.push(Share { tag: ROOT_TAG.into(), host_path, read_only: false });
    }
    if spec.fs_mounts.len() > layout::MAX_SHARES {
        report.error(
            "fs_mounts",
            format!("has {} shares, mote can have {}", spec.fs_mounts.len(), layout::MAX_SHARES),
        );
    }
    let mut tags = HashSet::from([ROOT_TAG]);
    for (index, mount) in spec.fs_mounts.iter().enumerate() {
        let path = |field| format!("fs_mounts[{index}].{field}");
        let tag = mount.tag.as_str();
        if tag.is_empty() {
            report.error(path("tag"), format!("is empty, must have 1 to {MAX_TAG} bytes"));
        } else if tag.len() > MAX_TAG {
            let len = tag.len();
            report.error(path("tag"), format!("has {len} bytes, must have 1 to {MAX_TAG}"));
        } else if tag.contains('\0') {
            report.error(path("tag"), "contains a NUL character");
        } else if tag == ROOT_TAG {
            report.error(
                path("tag"),
                format!("\"{ROOT_TAG}\" is the root file system's own tag; choose another"),
            );
        } else if !tags.insert(tag) {
            report.error(
                path("tag"),
                format!("\"{tag}\" is used by an earlier share; choose another"),
            );
        }
        if let Some(host_path) = directory(&mount.host_path, &path("host_path"), report) {
            shares.push(Share { tag: tag.into(), host_path, read_only: mount.read_only });
        }
    }
    shares
}

/// The directories that the guest can write to, without symbolic links in their paths. A guest that has
/// all of the host is not among them: there is nothing outside.
pub fn guests_directories(spec: &Spec) -> Vec<PathBuf> {
    let writable = spec.fs_mounts.iter().filter(|mount| !mount.read_only);
    let all = [&spec.rootfs_path].into_iter().chain(writable.map(|mount| &mount.host_path));
    let directories = all.filter_map(|path| fs::canonicalize(path).ok());
    directories.filter(|directory| directory != Path::new("/")).collect()
}

/// Warns of paths that mote opens inside a directory that the guest can write to: the guest can put a
/// symbolic link in their place, which the next start follows with this user's rights.
pub(super) fn warn_of_paths_that_guests_can_move(
    spec: &Spec,
    guests: &[PathBuf],
    report: &mut Report,
) {
    let mounts = spec.fs_mounts.iter().enumerate();
    let mut paths: Vec<(String, &Path)> = mounts
        .map(|(index, mount)| (format!("fs_mounts[{index}].host_path"), mount.host_path.as_path()))
        .collect();
    let network = spec.network.as_ref();
    for (field, path) in [
        ("rootfs_path", Some(spec.rootfs_path.as_path())),
        ("exec_socket_path", Some(spec.exec_socket_path.as_path())),
        ("pty_socket_path", Some(spec.pty_socket_path.as_path())),
        ("attest_socket_path", Some(spec.attest_socket_path.as_path())),
        ("network.passt_socket_path", network.map(|network| network.passt_socket_path.as_path())),
    ] {
        paths.extend(path.map(|path| (field.into(), path)));
    }
    for (field, path) in &paths {
        if let Some((_, directory)) = enters(path, guests) {
            report.warn(
                field,
                format!(
                    "{} is inside {}, where the guest can put a link to another file of yours in its place; choose a path outside",
                    path.display(),
                    directory.display()
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use crate::plan::testing::{environment, errors, plan, spec};
    use crate::spec::FsMount;

    fn share(tag: &str, host_path: &str) -> FsMount {
        FsMount { tag: tag.into(), host_path: host_path.into(), read_only: true }
    }

    #[test]
    fn paths_that_the_guest_can_move_are_warned_of() {
        let root = fs::canonicalize(std::env::temp_dir()).expect("a directory");
        let mut spec = spec();
        spec.rootfs_path.clone_from(&root);
        spec.console_output = Some(root.join("console.log"));
        spec.exec_socket_path = PathBuf::from("/run/mote-outside.sock");
        spec.pty_socket_path = root.join("../mote-outside.sock");
        let mut report = Report::default();
        Plan::new(&spec, &environment(), &mut report).expect("a plan");
        let [warning] = &report.warnings[..] else { panic!("{:?}", report.warnings) };
        let expected = format!("console_output: {}/console.log is inside", root.display());
        assert!(warning.to_string().starts_with(&expected), "{warning}");
    }

    #[test]
    fn paths_that_are_no_directories_are_refused() {
        assert_eq!(
            errors(|s| s.rootfs_path = "/no/such".into()),
            ["rootfs_path: /no/such does not exist; name a host directory"]
        );
        assert_eq!(
            errors(|s| s.rootfs_path = "/etc/passwd".into()),
            ["rootfs_path: /etc/passwd is not a directory; name one"]
        );
        assert_eq!(
            errors(|s| s.fs_mounts = vec![share("a", "/no/such")]),
            ["fs_mounts[0].host_path: /no/such does not exist; name a host directory"]
        );
    }

    #[test]
    fn bad_tags_are_refused_with_their_index() {
        let long = "x".repeat(37);
        let errors = errors(|s| {
            s.fs_mounts = ["a", "", &long, "a", ROOT_TAG].map(|tag| share(tag, "/")).to_vec();
        });
        for (index, start) in [
            (1, "is empty"),
            (2, "has 37 bytes"),
            (3, "\"a\" is used by an earlier share"),
            (4, "\"mote-root\" is the root"),
        ] {
            let expected = format!("fs_mounts[{index}].tag: {start}");
            assert!(errors.iter().any(|e| e.starts_with(&expected)), "{expected}: {errors:?}");
        }
        assert_eq!(errors.len(), 4);
        assert!(plan(|s| s.fs_mounts = vec![share(&long[1..], "/")]).is_ok());
    }
}
