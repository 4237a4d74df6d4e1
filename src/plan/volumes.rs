//! What is mounted in the box: `BOX_VOL_n` and `BOX_TMPFS_n` (contract §2.10).

use std::path::Path;

use mote_agent::instance::Mount;

use super::variables::Variables;
use crate::spec::Spec;
use crate::spec::json::Report;
use crate::sys;

/// Tag and path of the share that is always mounted, if the spec has it.
const WORKSPACE: (&str, &str) = ("workspace", "/workspace");

/// A volume as written: `TAG:PATH`, and then any of `:ro`, `:rw`, `:file` and `:copy`.
struct Volume<'a> {
    tag: &'a str,
    path: &'a str,
    read_only: bool,
    is_file: bool,
    copy_up: bool,
}

impl<'a> Volume<'a> {
    fn parse(text: &'a str) -> Option<Volume<'a>> {
        let mut parts = text.split(':');
        let (tag, path) = (parts.next()?, parts.next()?);
        let mut volume = Volume { tag, path, read_only: false, is_file: false, copy_up: false };
        for option in parts {
            match option {
                "ro" => volume.read_only = true,
                "rw" => {}
                "file" => volume.is_file = true,
                "copy" => volume.copy_up = true,
                _ => return None,
            }
        }
        let has_name = Path::new(path).file_name().is_some();
        is_mount_point(path).then_some(volume).filter(|volume| has_name || !volume.is_file)
    }
}

fn is_mount_point(path: &str) -> bool {
    path.starts_with('/') && path != "/"
}

/// What the variables ask for, in the order in which it is mounted.
pub(super) fn plan(vars: &Variables<'_>, spec: &Spec, report: &mut Report) -> Vec<Mount> {
    let share = |tag: &str| spec.fs_mounts.iter().find(|share| share.tag == tag);
    let (tag, path) = WORKSPACE;
    let workspace = share(tag).map(|share| Mount::Share {
        tag: tag.into(),
        path: path.into(),
        read_only: share.read_only,
        copy_up: false,
    });
    let mut mounts: Vec<Mount> = workspace.into_iter().collect();
    for (index, text) in vars.numbered("BOX_VOL") {
        let mut error = |problem| report.error(format!("entrypoint.env[{index}]"), problem);
        let Some(Volume { tag, path, read_only, is_file, copy_up }) = Volume::parse(text) else {
            error(format!(
                "is \"{text}\", must be TAG:PATH with an absolute path, and then any of :ro, :file and :copy"
            ));
            continue;
        };
        let Some(share) = share(tag) else {
            if report.has_read("fs_mounts") {
                report.error(
                    format!("entrypoint.env[{index}]"),
                    format!("mounts '{tag}', which is no tag of fs_mounts"),
                );
            }
            continue;
        };
        let read_only = read_only || share.read_only;
        let (tag, path) = (tag.to_owned(), path.to_owned());
        if !is_file {
            // What the host does not let the box write stays empty.
            let copy_up = copy_up && !share.read_only;
            mounts.push(Mount::Share { tag, path, read_only, copy_up });
            continue;
        }
        let name = Path::new(&path).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if share.host_path.is_dir() && !sys::exists_in_root(&share.host_path, name) {
            let directory = share.host_path.display();
            error(format!("mounts a file '{name}', which {directory} (share '{tag}') lacks"));
        }
        mounts.push(Mount::File { tag, path, read_only });
    }
    for (index, text) in vars.numbered("BOX_TMPFS") {
        let (path, options) = text.split_once(':').unwrap_or((text, ""));
        if is_mount_point(path) {
            mounts.push(Mount::Tmpfs {
                path: path.into(),
                options: options.into(),
                copy_up: false,
            });
        } else {
            report.error(
                format!("entrypoint.env[{index}]"),
                format!("is \"{text}\", must be PATH or PATH:OPTIONS, with an absolute path"),
            );
        }
    }
    mounts
}
