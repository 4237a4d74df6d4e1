//! Requests for files and directories in the envelope of the later runtime (contract §4.6): what a client
//! sends to the box's exec socket, and what it gets back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::text::Text;

/// The envelope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request_type", content = "request", rename_all = "snake_case")]
pub enum Request {
    /// Move a file; answered like one without the envelope.
    File(FileRequest),
    /// Look at directories or change them; answered with a [`FilesystemResponse`].
    Filesystem(FilesystemRequest),
}

/// Direction of a file's move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileOp {
    /// Into the guest.
    Upload,
    /// Out of it.
    Download,
}

/// Move a file.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileRequest {
    /// In which direction.
    pub op: FileOp,
    /// Where in the guest: an absolute path, or one from the user's home, which `~` also names.
    pub guest_path: Text,
    /// Contents to upload, in base64.
    #[serde(default)]
    pub data: Option<String>,
    /// Whose rights and home count; root's by default.
    #[serde(default)]
    pub user: Option<String>,
    /// Most bytes to download, 1 to [`MAX_BOUNDED_BYTES`]; a longer file is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// What makes a repeated upload the same one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// Largest [`FileRequest::max_bytes`]: half of the longest payload.
pub const MAX_BOUNDED_BYTES: u64 = 8 << 20;

/// What to do with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FilesystemOp {
    /// Describe what is there.
    Stat,
    /// Make a directory, and those above it.
    MakeDir,
    /// Rename, and make the directories above the destination.
    Move,
    /// Describe what is in a directory, and in those below it, as deep as `depth`.
    ListDir,
    /// Remove it with all that is in it; nothing there is no error.
    Remove,
}

/// Look at directories or change them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FilesystemRequest {
    /// What to do.
    pub op: FilesystemOp,
    /// With what; as [`FileRequest::guest_path`].
    pub path: Text,
    /// The new path, for [`FilesystemOp::Move`].
    #[serde(default)]
    pub destination: Option<Text>,
    /// How many levels [`FilesystemOp::ListDir`] goes down; 0 is 1.
    #[serde(default)]
    pub depth: u32,
    /// As [`FileRequest::user`].
    #[serde(default)]
    pub user: Option<String>,
    /// What makes a repeated change the same one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    /// Something else, or a symbolic link to nothing.
    Unspecified,
    /// A regular file, or a symbolic link to one.
    File,
    /// A directory, or a symbolic link to one.
    Directory,
}

/// A file, directory or something else, described. What is not UTF-8 is replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Last part of the path.
    pub name: String,
    /// What it is.
    pub kind: EntryKind,
    /// The path that was asked for, or one below it.
    pub path: String,
    /// Bytes; of a symbolic link, its own.
    pub size: i64,
    /// Permission bits; of a symbolic link, its target's.
    pub mode: u32,
    /// As `ls -l` has them; a symbolic link's begin with `L`.
    pub permissions: String,
    /// Name of its user, or the number.
    pub owner: String,
    /// Name of its group, or the number.
    pub group: String,
    /// When it was last modified, in seconds since 1970.
    pub modified_seconds: i64,
    /// The rest of that, in nanoseconds.
    pub modified_nanos: i32,
    /// Where a symbolic link leads.
    #[serde(default)]
    pub symlink_target: Option<String>,
    /// Nothing, in mote.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

/// The reply to a [`FilesystemRequest`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesystemResponse {
    /// Whether it was done.
    pub success: bool,
    /// What is at the path now, but for lists and removals.
    #[serde(default)]
    pub entry: Option<Entry>,
    /// What is in a directory.
    #[serde(default)]
    pub entries: Vec<Entry>,
    /// Why it was not done.
    #[serde(default)]
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of contract §4.6, byte for byte.
    #[test]
    fn the_contracts_bytes() {
        let file = r#"{"request_type":"file","request":{"op":"Download","guest_path":"~/f","data":null,"user":"app","max_bytes":9}}"#;
        let request = Request::File(FileRequest {
            op: FileOp::Download,
            guest_path: "~/f".into(),
            data: None,
            user: Some("app".into()),
            max_bytes: Some(9),
            request_id: None,
        });
        let directory = r#"{"request_type":"filesystem","request":{"op":"Move","path":"/a","destination":"/b","depth":0,"user":null,"request_id":"r1"}}"#;
        let change = Request::Filesystem(FilesystemRequest {
            op: FilesystemOp::Move,
            path: "/a".into(),
            destination: Some("/b".into()),
            depth: 0,
            user: None,
            request_id: Some("r1".into()),
        });
        for (text, request) in [(file, request), (directory, change)] {
            assert_eq!(serde_json::to_string(&request).expect("serialises"), text);
            assert_eq!(serde_json::from_str::<Request>(text).expect("parses"), request);
        }
        let reply = FilesystemResponse {
            success: true,
            entry: Some(Entry {
                name: "b".into(),
                kind: EntryKind::File,
                path: "/b".into(),
                size: 3,
                mode: 0o640,
                permissions: "-rw-r-----".into(),
                owner: "root".into(),
                group: "50".into(),
                modified_seconds: 7,
                modified_nanos: 5,
                symlink_target: None,
                metadata: BTreeMap::new(),
            }),
            ..FilesystemResponse::default()
        };
        let text = r#"{"success":true,"entry":{"name":"b","kind":"File","path":"/b","size":3,"mode":416,"permissions":"-rw-r-----","owner":"root","group":"50","modified_seconds":7,"modified_nanos":5,"symlink_target":null,"metadata":{}},"entries":[],"error":null}"#;
        assert_eq!(serde_json::to_string(&reply).expect("serialises"), text);
    }
}
