//! Files in and out (contract §4.2, §4.3), in one piece or in parts.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use mote_agent::exec::{self, FileOp, FileRequest, FileResponse, MAX_FILE_PART};

/// Carries out a request; a failure is a response too.
pub fn carry_out(request: &FileRequest) -> FileResponse {
    let done = match request.op {
        FileOp::Upload => upload(request),
        FileOp::Download => download(request),
    };
    done.unwrap_or_else(|error| FileResponse {
        error: Some(format!("{}: {error}", request.guest_path)),
        ..FileResponse::default()
    })
}

fn upload(request: &FileRequest) -> Result<FileResponse, String> {
    let path = absolute(request)?;
    let data = exec::from_base64(request.data.as_deref().unwrap_or(""))?;
    let offset = request.offset.unwrap_or(0);
    let mut options = OpenOptions::new();
    // Opening a pipe or device must not wait.
    options.write(true).custom_flags(libc::O_NONBLOCK);
    if offset == 0 {
        if let Some(parent) = path.parent() {
            match request.offset {
                None => fs::create_dir_all(parent).map_err(text)?,
                Some(_) if parent.exists() => {}
                Some(_) => return Err(format!("no such directory: {}", parent.display())),
            }
        }
        options.create(true).truncate(true);
    }
    let file = regular(options.open(path))?;
    if let Some(mode) = request.mode {
        file.set_permissions(Permissions::from_mode(mode & 0o7777)).map_err(text)?;
    }
    file.write_all_at(&data, offset).map_err(text)?;
    (&file).flush().map_err(text)?;
    Ok(FileResponse { success: true, size: data.len() as u64, ..FileResponse::default() })
}

fn download(request: &FileRequest) -> Result<FileResponse, String> {
    let path = absolute(request)?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let mut file = regular(options.open(path))?;
    if let Some(offset) = request.offset {
        file.seek(SeekFrom::Start(offset)).map_err(text)?;
    }
    let limit = MAX_FILE_PART as u64;
    let part = request.length.map(|length| length.min(limit));
    let mut data = Vec::new();
    // Files of /proc do not tell their size: reading does.
    (&file).take(part.unwrap_or(limit + 1)).read_to_end(&mut data).map_err(text)?;
    if data.len() as u64 > limit {
        return Err(format!(
            "has more than the {limit} bytes that one reply can carry; ask for it in parts"
        ));
    }
    let mode = match part {
        Some(_) => Some(file.metadata().map_err(text)?.permissions().mode() & 0o7777),
        None => None,
    };
    let size = data.len() as u64;
    Ok(FileResponse { success: true, data: Some(exec::to_base64(&data)), size, error: None, mode })
}

fn absolute(request: &FileRequest) -> Result<&Path, String> {
    let path = Path::new(&*request.guest_path);
    if path.is_absolute() { Ok(path) } else { Err("is not an absolute path".into()) }
}

fn regular(opened: io::Result<File>) -> Result<File, String> {
    let file = opened.map_err(text)?;
    let kind = file.metadata().map_err(text)?.file_type();
    if kind.is_file() {
        Ok(file)
    } else if kind.is_dir() {
        Err("is a directory".into())
    } else {
        Err("is not a regular file".into())
    }
}

fn text(error: io::Error) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(op: FileOp, path: &Path, data: Option<&[u8]>) -> FileRequest {
        FileRequest {
            op,
            guest_path: path.into(),
            data: data.map(exec::to_base64),
            offset: None,
            length: None,
            mode: None,
        }
    }

    #[test]
    fn files_go_in_and_out_whole_and_in_parts() {
        let dir = std::env::temp_dir().join(format!("mote-agent-{}", std::process::id()));
        let path = dir.join("new/file");
        let first = FileRequest {
            offset: Some(0),
            mode: Some(0o640),
            ..request(FileOp::Upload, &path, Some(b"hello"))
        };
        // In parts, the caller is somebody who wants to be told of a directory that is not there.
        let expected = format!("{}: no such directory: {}/new", path.display(), dir.display());
        assert_eq!(carry_out(&first).error, Some(expected));
        assert!(!dir.exists());
        assert!(carry_out(&request(FileOp::Upload, &path, Some(b"whole"))).success);
        let up = carry_out(&first);
        assert_eq!(up, FileResponse { success: true, size: 5, ..FileResponse::default() });
        let part = FileRequest { offset: Some(5), ..request(FileOp::Upload, &path, Some(b"!")) };
        assert!(carry_out(&part).success);
        let down = carry_out(&request(FileOp::Download, &path, None));
        assert_eq!((down.data, down.size), (Some(exec::to_base64(b"hello!")), 6));
        let part = FileRequest {
            offset: Some(4),
            length: Some(100),
            ..request(FileOp::Download, &path, None)
        };
        let down = carry_out(&part);
        assert_eq!((down.data, down.mode), (Some(exec::to_base64(b"o!")), Some(0o640)));
        // Uploading anew empties the file first.
        carry_out(&request(FileOp::Upload, &path, Some(b"x")));
        assert_eq!(fs::read(&path).expect("there"), b"x");
        fs::remove_dir_all(&dir).expect("removed");
    }

    #[test]
    fn refusals_name_the_path() {
        for (path, expected) in [
            ("/no/such", "/no/such: No such file or directory (os error 2)"),
            ("/", "/: is a directory"),
            ("/dev/null", "/dev/null: is not a regular file"),
            ("tmp/x", "tmp/x: is not an absolute path"),
        ] {
            let response = carry_out(&request(FileOp::Download, Path::new(path), None));
            assert!(!response.success);
            assert_eq!(response.error.as_deref(), Some(expected));
        }
    }
}
