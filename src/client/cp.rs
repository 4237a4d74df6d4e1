//! `mote cp`: one file into a box or out of it (contract §4.2, §4.3). A file is copied in parts, one
//! connection each, with members of [`FileRequest`] that only mote's agent knows. With another agent,
//! only files that fit one part can be copied.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use mote_agent::exec::{
    FileOp, FileRequest, FileResponse, MAX_PAYLOAD, from_base64, kind, to_base64,
};
use mote_agent::text::Text;

use super::channel::{Reply, request};
use super::exec;
use super::relay::{Sink, Stdio};
use super::stop::Stop;
use super::target::Target;
use crate::sys::{self, Interest};

/// Most bytes of a file in one part. Both ends have several copies of a part in memory, so it is well
/// below what a frame could carry.
const PART: usize = 4 << 20;

/// The permission bits that are copied. Not set-user-ID: the file's owner in the guest is root.
const MODE_BITS: u32 = 0o777;

/// A file to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cp {
    /// The box's exec socket.
    pub target: Target,
    /// From where to where.
    pub route: Route,
}

/// From where to where; `-` on the host is standard input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// Into the guest.
    Upload {
        /// On the host.
        from: PathBuf,
        /// In the guest.
        to: Text,
    },
    /// Out of the guest.
    Download {
        /// In the guest.
        from: Text,
        /// On the host.
        to: PathBuf,
    },
}

impl Route {
    /// Reads the two arguments, of which one starts with `:` and is a path in the guest.
    ///
    /// # Errors
    /// What is wrong, for one line on stderr.
    pub fn parse(source: OsString, destination: OsString) -> Result<Route, String> {
        match (guest_path(&source)?, guest_path(&destination)?) {
            (None, Some(mut to)) => {
                if to.as_bytes().ends_with(b"/") {
                    let name = Path::new(&source).file_name().filter(|_| source != "-");
                    to.push(name.ok_or_else(|| {
                        let to = to.display();
                        format!("{to} is a directory, and the file has no name: name it there")
                    })?);
                }
                Ok(Route::Upload { from: source.into(), to: to.into() })
            }
            (Some(from), None) => Ok(Route::Download { from: from.into(), to: destination.into() }),
            (None, None) => {
                Err("one of the two paths must start with ':', which means the guest's".into())
            }
            (Some(_), Some(_)) => Err("only one of the two paths may be the guest's".into()),
        }
    }
}

fn guest_path(argument: &OsStr) -> Result<Option<OsString>, String> {
    let Some(path) = argument.as_bytes().strip_prefix(b":") else { return Ok(None) };
    if !path.starts_with(b"/") {
        let shown = argument.display();
        return Err(format!("'{shown}' is not an absolute path, as paths in the guest must be"));
    }
    Ok(Some(OsStr::from_bytes(path).to_owned()))
}

impl Cp {
    /// Copies and returns exit code 0.
    ///
    /// # Errors
    /// The box cannot be reached, or the box or this host refuses the file.
    pub fn run(&self, stdio: &Stdio) -> Result<u8, Stop> {
        match &self.route {
            Route::Upload { from, to } => self.upload(from, to, stdio)?,
            Route::Download { from, to } => self.download(from, to, stdio)?,
        }
        Ok(0)
    }

    fn upload(&self, from: &Path, to: &Text, stdio: &Stdio) -> Result<(), Stop> {
        let (source, mode) = open_source(from, stdio).map_err(Stop::Refused)?;
        exec::knock(&self.target)?;
        let mut part = vec![0; PART];
        let mut offset = 0;
        loop {
            let read = read_part(&source, &mut part)
                .with_context(|| format!("read {}", from.display()))
                .map_err(Stop::Refused)?;
            // The first part creates the file, even if it is empty.
            if read == 0 && offset > 0 {
                return Ok(());
            }
            if offset == PART as u64 {
                self.require_parts(to)?;
            }
            let request = FileRequest {
                data: Some(to_base64(&part[..read])),
                offset: Some(offset),
                mode: mode.filter(|_| offset == 0),
                ..file_request(FileOp::Upload, to)
            };
            self.ask(&request, None).map_err(|stop| match offset {
                0 => stop.context(format!("upload to :{to}")),
                _ => stop
                    .context(format!("upload to :{to}, which has only the first {offset} bytes")),
            })?;
            offset += read as u64;
            if read < part.len() {
                return Ok(());
            }
        }
    }

    /// Makes sure that the agent knows parts. Another agent would replace the first part by the second.
    fn require_parts(&self, path: &Text) -> Result<(), Stop> {
        let request = FileRequest {
            offset: Some(0),
            length: Some(1),
            ..file_request(FileOp::Download, path)
        };
        match self.ask(&request, None)?.mode {
            Some(_) => Ok(()),
            None => Err(no_parts(path)),
        }
    }

    fn download(&self, from: &Text, to: &Path, stdio: &Stdio) -> Result<(), Stop> {
        exec::knock(&self.target)?;
        let ask = |offset, signals: Option<&File>| {
            let request = FileRequest {
                offset: Some(offset),
                length: Some(PART as u64),
                ..file_request(FileOp::Download, from)
            };
            self.ask(&request, signals).map_err(|stop| stop.context(format!("download :{from}")))
        };
        // What the guest refuses is told before what is wrong with the destination, and leaves nothing there.
        let mut reply = ask(0, None)?;
        let destination = Destination::open(from, to, stdio).map_err(Stop::Refused)?;
        let mut offset = 0;
        loop {
            let data = from_base64(reply.data.as_deref().unwrap_or_default())
                .map_err(|error| anyhow!("download :{from}: {error}"))?;
            let in_parts = reply.mode.is_some() && data.len() <= PART;
            if !in_parts && offset > 0 {
                return Err(no_parts(from));
            }
            destination.write(&data)?;
            offset += data.len() as u64;
            if !in_parts || data.len() < PART {
                return destination.finish(reply.mode).map_err(Stop::Refused);
            }
            reply = ask(offset, destination.signals())?;
        }
    }

    /// Sends a request on a connection of its own, and returns the reply if it says success.
    fn ask(&self, members: &FileRequest, signals: Option<&File>) -> Result<FileResponse, Stop> {
        let mut channel = self.target.connect()?;
        channel.send(kind::DATA, &request(members, MAX_PAYLOAD)?);
        let frame = match channel.reply(None, signals)? {
            Reply::Frame(frame) => frame,
            Reply::Closed | Reply::Late => {
                return Err(Stop::Failed(anyhow!("the box ended, or its agent died, half-way")));
            }
        };
        match frame.kind {
            kind::DATA => {
                let reply: FileResponse =
                    serde_json::from_slice(&frame.payload).context("read the box's answer")?;
                if reply.success {
                    return Ok(reply);
                }
                let reason = reply.error.unwrap_or_else(|| "no reason given".into());
                let hint = match members.op {
                    _ if !reason.to_lowercase().contains("is a directory") => "",
                    FileOp::Upload => UPLOAD_HINT,
                    FileOp::Download => DOWNLOAD_HINT,
                };
                Err(Stop::Refused(anyhow!("{reason}{hint}")))
            }
            kind::ERROR => Err(Stop::Refused(exec::refusal(&frame.payload))),
            other => {
                Err(Stop::Failed(anyhow!("the box sent a frame of unknown type {other:#04x}")))
            }
        }
    }
}

const UPLOAD_HINT: &str = " (end its path with / to copy into it)";
const DOWNLOAD_HINT: &str = " (for all that is in it, use mote exec SOCKET -- tar -c -C DIR .)";

fn no_parts(path: &Text) -> Stop {
    Stop::Refused(anyhow!(
        "copy :{path}: the box's agent is not mote's and cannot copy files of more than {} MiB; \
         use 'mote exec SOCKET -- cat'",
        PART >> 20
    ))
}

fn file_request(op: FileOp, path: &Text) -> FileRequest {
    FileRequest { op, guest_path: path.clone(), data: None, offset: None, length: None, mode: None }
}

fn open_source(path: &Path, stdio: &Stdio) -> Result<(File, Option<u32>)> {
    if path == "-" {
        return Ok((stdio.input.try_clone().context("open standard input")?, None));
    }
    let open = || -> Result<_> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        ensure!(
            !metadata.is_dir(),
            "is a directory; use tar -c -C DIR . | mote exec SOCKET -- tar -x -C GUEST_DIR"
        );
        let mode = metadata.is_file().then(|| metadata.permissions().mode() & MODE_BITS);
        Ok((file, mode))
    };
    open().with_context(|| path.display().to_string())
}

/// Fills `part`, or as much of it as the file still has.
fn read_part(mut file: &File, part: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < part.len() {
        match file.read(&mut part[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Another process may have made standard input non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                sys::poll([Interest::read(&file)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Where a download goes.
struct Destination {
    sink: Sink,
    path: PathBuf,
    partial: Option<Partial>,
}

impl Destination {
    fn open(from: &Text, to: &Path, stdio: &Stdio) -> Result<Self> {
        if to == "-" {
            let sink = Sink::new(stdio.output.file().try_clone().context("open standard output")?);
            return Ok(Destination { sink, path: "standard output".into(), partial: None });
        }
        let mut path = to.to_path_buf();
        let into_directory = path.is_dir();
        if into_directory {
            path.push(Path::new(&**from).file_name().context("the guest's path names no file")?);
        }
        match fs::metadata(&path) {
            // A device, for example, is written to, not replaced.
            Ok(metadata) if !metadata.is_file() => {
                let file = OpenOptions::new().write(true).open(&path);
                let sink = Sink::new(file.with_context(|| path.display().to_string())?);
                return Ok(Destination { sink, path, partial: None });
            }
            // If the path is a link, the file that it leads to is replaced, not the link.
            Ok(_) => path = fs::canonicalize(&path).context("follow the destination's links")?,
            Err(_) => {
                let shown = path.display();
                let names_directory = to.as_os_str().as_encoded_bytes().ends_with(b"/");
                ensure!(
                    into_directory || !names_directory,
                    "{shown} is no directory; create it first"
                );
                let link = fs::symlink_metadata(&path).is_ok();
                ensure!(!link, "{shown} is a link to something that is not there");
            }
        }
        let (file, partial) = Partial::create(&path)?;
        Ok(Destination { sink: Sink::new(file), path, partial: Some(partial) })
    }

    fn signals(&self) -> Option<&File> {
        self.partial.as_ref().map(|partial| &partial.signals)
    }

    fn write(&self, bytes: &[u8]) -> Result<(), Stop> {
        self.sink.write_all(bytes).map_err(|stop| match stop {
            Stop::Failed(error) => Stop::Refused(error.context(self.path.display().to_string())),
            other => other,
        })
    }

    /// Gives the whole file its mode and its name.
    fn finish(self, mode: Option<u32>) -> Result<()> {
        let Some(partial) = self.partial else { return Ok(()) };
        if let Some(mode) = mode {
            let permissions = Permissions::from_mode(mode & MODE_BITS);
            self.sink.file().set_permissions(permissions).context("set the file's mode")?;
        }
        fs::rename(&partial.path, &self.path).with_context(|| self.path.display().to_string())
    }
}

/// An incomplete file, in the directory of the final one. Dropping it removes the file, also when one
/// of `signals` ends the copy.
struct Partial {
    path: PathBuf,
    signals: File,
}

impl Partial {
    fn create(beside: &Path) -> Result<(File, Partial)> {
        let signals = sys::signal_file(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
        let mut random = [0; 4];
        sys::fill_random(&mut random)?;
        let path = beside.with_file_name(format!(".mote-cp-{:08x}", u32::from_ne_bytes(random)));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("create {}", path.display()))?;
        Ok((file, Partial { path, signals }))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Fails after success, when the file has its final name.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::{Agent, read_frame, said, scratch, stdio, write_frame};
    use mote_agent::exec::Request;

    /// A guest with one file, whatever name is asked for.
    struct Guest {
        file: Vec<u8>,
        mode: u32,
        /// Whether it knows mote's own members.
        extended: bool,
        /// Whether it refuses the last request.
        full: bool,
    }

    impl Guest {
        fn agent(mut self, name: &str, connections: usize) -> Agent {
            Agent::new(name, connections, move |number, mut client| {
                let frame = read_frame(&mut client).expect("a frame");
                if frame.kind == kind::HEARTBEAT {
                    return write_frame(&mut client, kind::HEARTBEAT, b"");
                }
                let Ok(Request::File(request)) = Request::parse(&frame.payload) else {
                    panic!("a file request");
                };
                let reply = if self.full && number + 1 == connections {
                    FileResponse { error: Some("disk full".into()), ..Default::default() }
                } else {
                    self.answer(&request)
                };
                let reply = serde_json::to_vec(&reply).expect("serialises");
                write_frame(&mut client, kind::DATA, &reply);
            })
        }

        fn answer(&mut self, request: &FileRequest) -> FileResponse {
            let mut reply = FileResponse { success: true, ..Default::default() };
            let offset = request.offset.filter(|_| self.extended).unwrap_or(0) as usize;
            match request.op {
                FileOp::Upload => {
                    assert_eq!(request.mode.is_some(), request.offset == Some(0));
                    let data = from_base64(request.data.as_ref().expect("data")).expect("base64");
                    self.file.truncate(offset);
                    self.file.extend(data);
                    self.mode = request.mode.unwrap_or(self.mode);
                }
                FileOp::Download => {
                    let rest = &self.file[offset.min(self.file.len())..];
                    let asked = request.length.filter(|_| self.extended).unwrap_or(u64::MAX);
                    reply.data = Some(to_base64(&rest[..rest.len().min(asked as usize)]));
                    reply.mode = self.extended.then_some(0o100_000 | self.mode);
                }
            }
            reply
        }
    }

    fn guest(file: Vec<u8>) -> Guest {
        Guest { file, mode: 0o640, extended: true, full: false }
    }

    fn run(agent: &Agent, route: Route) -> (u8, String) {
        said(Cp { target: agent.target.clone(), route }.run(&stdio().0))
    }

    fn up(from: &Path, to: &str) -> Route {
        Route::Upload { from: from.into(), to: to.into() }
    }

    fn down(from: &str, to: &Path) -> Route {
        Route::Download { from: from.into(), to: to.into() }
    }

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|at| ((at * at) >> 8) as u8).collect()
    }

    /// A directory for a test's own use.
    fn directory(name: &str) -> PathBuf {
        let path = scratch(name);
        fs::create_dir_all(&path).expect("created");
        path
    }

    fn mode_of(path: &Path) -> u32 {
        fs::metadata(path).expect("there").permissions().mode() & 0o7777
    }

    #[test]
    fn a_file_of_several_parts_goes_in_and_comes_back() {
        // Connections: one heartbeat each way; going in, one more to learn whether parts are known.
        for (length, connections) in [(0, 2 + 2), (PART, 2 + 3), (2 * PART + 3, 5 + 4)] {
            let here = directory(&format!("parts-{length}"));
            let (original, copy) = (here.join("original"), here.join("copy"));
            fs::write(&original, bytes(length)).expect("written");
            fs::set_permissions(&original, Permissions::from_mode(0o4751)).expect("set");

            let agent = guest(b"old".to_vec()).agent(&format!("agent-{length}"), connections);
            assert_eq!(run(&agent, up(&original, "/f")), (0, String::new()));
            assert_eq!(run(&agent, down("/f", &copy)), (0, String::new()));
            assert!(fs::read(&copy).expect("there") == bytes(length));
            assert_eq!(mode_of(&copy), 0o751);
            agent.join();
            fs::remove_dir_all(here).expect("removed");
        }
    }

    #[test]
    fn a_download_replaces_what_was_there() {
        let here = directory("replace");
        let (link, file) = (here.join("link"), here.join("file"));
        fs::write(&file, "old").expect("written");
        std::os::unix::fs::symlink("file", &link).expect("linked");
        let agent = guest(b"new".to_vec()).agent("replacing", 8);
        assert_eq!(run(&agent, down("/f", &link)), (0, String::new()));
        assert!(fs::symlink_metadata(&link).expect("there").is_symlink());
        assert_eq!((fs::read(&file).expect("there"), mode_of(&file)), (b"new".to_vec(), 0o640));
        // Into a directory, however that is written, and to a device.
        for (name, directory) in [("f", here.clone()), ("g", here.join(""))] {
            let from = format!("/etc/{name}");
            assert_eq!(run(&agent, down(&from, &directory)), (0, String::new()));
            assert_eq!(fs::read(here.join(name)).expect("there"), b"new");
        }
        assert_eq!(run(&agent, down("/f", Path::new("/dev/null"))), (0, String::new()));
        agent.join();
        fs::remove_dir_all(here).expect("removed");
    }

    #[test]
    fn a_download_that_fails_leaves_what_was_there() {
        let here = directory("failing");
        let file = here.join("file");
        fs::write(&file, "old").expect("written");
        let agent = Guest { full: true, ..guest(bytes(PART + 1)) }.agent("full", 3);
        assert_eq!(run(&agent, down("/f", &file)), (1, "download :/f: disk full".into()));
        assert_eq!(fs::read(&file).expect("there"), b"old");
        assert_eq!(fs::read_dir(&here).expect("there").count(), 1);
        agent.join();
        fs::remove_dir_all(here).expect("removed");
    }

    #[test]
    fn what_the_guest_refuses_comes_before_what_is_wrong_here() {
        let absent = scratch("absent-directory").join("");
        let agent = Guest { full: true, ..guest(vec![]) }.agent("refusing", 2);
        assert_eq!(run(&agent, down("/f", &absent)), (1, "download :/f: disk full".into()));
        agent.join();
        let agent = guest(vec![]).agent("giving", 2);
        let (code, message) = run(&agent, down("/f", &absent));
        let expected = format!("{} is no directory; create it first", absent.display());
        assert_eq!((code, message), (1, expected));
        agent.join();
    }

    #[test]
    fn an_upload_that_fails_says_how_far_it_got() {
        let here = directory("half");
        let file = here.join("file");
        fs::write(&file, bytes(PART + 1)).expect("written");
        let agent = Guest { full: true, ..guest(vec![]) }.agent("filling", 4);
        let (code, message) = run(&agent, up(&file, "/f"));
        assert_eq!(code, 1);
        assert!(message.contains("only the first 4194304 bytes: disk full"), "{message}");
        agent.join();

        let unused = Agent::new("unused", 0, |_, _| {});
        let (code, message) = run(&unused, up(&here.join("absent"), "/f"));
        assert_eq!((code, message.contains("absent: No such file")), (1, true), "{message}");
        let (code, message) = run(&unused, up(&here, "/f"));
        assert_eq!((code, message.contains("tar")), (1, true), "{message}");
        unused.join();
        fs::remove_dir_all(here).expect("removed");
    }

    #[test]
    fn an_agent_without_parts_moves_small_files_whole() {
        let here = directory("foreign");
        let file = here.join("file");
        let foreign = |file| Guest { extended: false, ..guest(file) };

        // Just as long as a part: asking for the next would bring the same again.
        let agent = foreign(bytes(PART)).agent("foreign-down", 2);
        assert_eq!(run(&agent, down("/f", &file)), (0, String::new()));
        assert!(fs::read(&file).expect("there") == bytes(PART));
        agent.join();

        let agent = foreign(vec![]).agent("foreign-up", 2);
        assert_eq!(run(&agent, up(&file, "/f")), (0, String::new()));
        agent.join();

        fs::write(&file, bytes(PART + 1)).expect("written");
        let agent = foreign(vec![]).agent("foreign-more", 3);
        let (code, message) = run(&agent, up(&file, "/f"));
        assert_eq!((code, message.contains("not mote's")), (1, true), "{message}");
        agent.join();
        fs::remove_dir_all(here).expect("removed");
    }
}
