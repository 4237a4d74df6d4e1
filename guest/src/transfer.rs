//! Files in and out: in one piece or in parts (contract §4.2, §4.3), or as the later runtime asks for them
//! (contract §4.6).

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use mote_agent::exec::{self, FileOp, FileRequest, FileResponse, MAX_FILE_PART};
use mote_agent::files::{self, MAX_BOUNDED_BYTES};

use crate::place::{Place, failed, make_directories};

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

/// Carries out a request in the later runtime's envelope; a failure is a response too.
pub fn carry_out_enveloped(request: &files::FileRequest) -> FileResponse {
    let attempt = || {
        let path = Place::of(request.user.as_deref())?.path(&request.guest_path)?;
        match request.op {
            FileOp::Upload => put(&path, request),
            FileOp::Download => get(&path, request.max_bytes),
        }
    };
    attempt().unwrap_or_else(|error| FileResponse { error: Some(error), ..FileResponse::default() })
}

fn put(path: &Path, request: &files::FileRequest) -> Result<FileResponse, String> {
    if request.max_bytes.is_some() {
        return Err("max_bytes is only valid for file downloads".into());
    }
    let data = request.data.as_deref().ok_or("upload request is missing base64 data")?;
    let data = exec::from_base64(data).map_err(|error| format!("upload {error}"))?;
    make_directories(path.parent().ok_or("upload path has no parent directory")?)?;
    if path.is_dir() {
        return Err(format!("path is a directory: {}", path.display()));
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(|error| failed("open", path, &error))?;
    check_regular(&file, path)?;
    file.write_all_at(&data, 0).map_err(|error| failed("write", path, &error))?;
    Ok(FileResponse { success: true, size: data.len() as u64, ..FileResponse::default() })
}

fn get(path: &Path, max_bytes: Option<u64>) -> Result<FileResponse, String> {
    if max_bytes.is_some_and(|limit| !(1..=MAX_BOUNDED_BYTES).contains(&limit)) {
        return Err(format!("download max_bytes must be between 1 and {MAX_BOUNDED_BYTES}"));
    }
    if path.is_dir() {
        return Err(format!("path is a directory: {}", path.display()));
    }
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("file not found: {}", path.display()),
        _ => failed("open", path, &error),
    })?;
    let size = check_regular(&file, path)?;
    let limit = max_bytes.unwrap_or(MAX_FILE_PART as u64);
    if size > limit && max_bytes.is_some() {
        return Err(format!("download target is {size} bytes; max_bytes is {limit}"));
    }
    let mut data = Vec::new();
    // Files of /proc do not tell their size: reading does.
    (&file).take(limit + 1).read_to_end(&mut data).map_err(|error| failed("read", path, &error))?;
    match max_bytes {
        _ if data.len() as u64 <= limit => {}
        Some(limit) => {
            return Err(format!("download target grew beyond max_bytes ({limit}) while reading"));
        }
        None => {
            return Err(format!(
                "download target has more than the {limit} bytes that one reply can carry"
            ));
        }
    }
    let size = data.len() as u64;
    let data = Some(exec::to_base64(&data));
    Ok(FileResponse { success: true, data, size, ..FileResponse::default() })
}

/// The size of a regular file.
fn check_regular(file: &File, path: &Path) -> Result<u64, String> {
    let metadata = file.metadata().map_err(|error| failed("stat", path, &error))?;
    if !metadata.is_file() {
        return Err(format!("path is not a regular file: {}", path.display()));
    }
    Ok(metadata.len())
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
    fn enveloped_requests_have_the_runtimes_words() {
        let dir = std::env::temp_dir().join(format!("mote-transfer-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        let ask = |op, path: &Path, data: Option<&str>, max_bytes| {
            carry_out_enveloped(&files::FileRequest {
                op,
                guest_path: path.into(),
                data: data.map(Into::into),
                user: None,
                max_bytes,
                request_id: None,
            })
        };
        let path = dir.join("new/file");
        let up = ask(FileOp::Upload, &path, Some("aGVsbG8="), None);
        assert_eq!(up, FileResponse { success: true, size: 5, ..FileResponse::default() });
        let down = ask(FileOp::Download, &path, None, Some(5));
        assert_eq!((down.data.as_deref(), down.size, down.error), (Some("aGVsbG8="), 5, None));
        // A pipe that nobody else has open would keep us waiting.
        let pipe = dir.join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("runs");
        assert!(made.success());
        let (upload, download) = (FileOp::Upload, FileOp::Download);
        for (op, path, data, max_bytes, expected) in [
            (download, &path, None, Some(4), "download target is 5 bytes; max_bytes is 4"),
            (download, &path, None, Some(0), "download max_bytes must be between 1 and 8388608"),
            (
                download,
                &path,
                None,
                Some(8 << 20 | 1),
                "download max_bytes must be between 1 and 8388608",
            ),
            (download, &dir, None, None, "path is a directory: "),
            (download, &dir.join("no"), None, None, "file not found: /no"),
            (download, &pipe, None, None, "path is not a regular file: /pipe"),
            (
                download,
                &path.join("x"),
                None,
                None,
                "failed to open /new/file/x: Not a directory (os error 20)",
            ),
            (upload, &path, Some(""), Some(1), "max_bytes is only valid for file downloads"),
            (upload, &path, None, None, "upload request is missing base64 data"),
            (
                upload,
                &path,
                Some("%"),
                None,
                "upload data is not base64: Invalid symbol 37, offset 0.",
            ),
            (upload, &dir, Some(""), None, "path is a directory: "),
            (upload, &path.join("x"), Some(""), None, "path is a file: /new/file"),
            (
                upload,
                &pipe,
                Some(""),
                None,
                "failed to open /pipe: No such device or address (os error 6)",
            ),
        ] {
            let response = ask(op, path, data, max_bytes);
            assert!(!response.success);
            let told = response.error.expect("an error").replace(&dir.display().to_string(), "");
            assert_eq!(told, expected);
        }
        let endless = Path::new("/proc/self/status");
        let told = ask(download, endless, None, Some(100)).error.expect("an error");
        assert_eq!(told, "download target grew beyond max_bytes (100) while reading");
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
