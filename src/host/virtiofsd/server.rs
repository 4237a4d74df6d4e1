//! mote's own virtiofsd: mote's file, executed again under that name, which is `main`'s second way to go. Its arguments
//! are a `Task`'s members in order.

use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};

use super::{Started, Task};
use crate::confine::{Isolation, virtiofsd};
use crate::sys;

/// The name under which mote is a virtiofsd.
pub const NAME: &str = "virtiofsd";

/// For how many open files there is room from the start on, at eight bytes of the kernel's each: virtiofsd keeps those
/// open that the guest knows.
const DESCRIPTORS: u16 = 4096;

const READ_ONLY: &str = "read-only";
const READ_WRITE: &str = "read-write";

/// Starts it, with the listening socket.
///
/// # Errors
/// The host permits no such process, or no pipe.
pub(super) fn start(task: &Task<'_>, listener: BorrowedFd<'_>) -> Result<Started> {
    let (stderr, theirs) = std::io::pipe().context("make a pipe")?;
    let arguments = arguments(task)?;
    let namespaces = virtiofsd::namespaces(task.isolation);
    let capabilities = virtiofsd::capabilities(task.read_only);
    let (pid, ended) =
        sys::process::start_again(&arguments, listener, theirs.as_fd(), namespaces, capabilities)?;
    Ok(Started { pid, stderr: OwnedFd::from(stderr).into(), ended })
}

fn arguments(task: &Task<'_>) -> Result<Vec<CString>> {
    let access = if task.read_only { READ_ONLY } else { READ_WRITE };
    let open_files = task.open_files.to_string();
    let words = [
        NAME.as_bytes(),
        task.directory.as_os_str().as_bytes(),
        access.as_bytes(),
        task.isolation.word().as_bytes(),
        open_files.as_bytes(),
    ];
    words.into_iter().map(|word| CString::new(word).map_err(Into::into)).collect()
}

/// Serves the share that the arguments behind the name tell of, until mote ends. mote reads what goes to stderr.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<_> = arguments.collect();
    match serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &[OsString]) -> Result<()> {
    let (directory, read_only, isolation, open_files) = parse(arguments)
        .context("mote starts this itself, to serve a share, under the name virtiofsd")?;
    sys::process::name(c"virtiofsd");
    sys::process::become_helper().context("become mote's helper")?;
    let listener = sys::process::inherited_listener().context("take over mote's socket")?;
    let confined = virtiofsd::confine_virtiofsd(isolation, &directory, read_only, open_files)?;
    let directory = confined.directory.to_str().context("the share's path is no UTF-8")?.into();
    let (descriptors, open_files) = (confined.descriptors, confined.open_files);
    sys::process::reserve_descriptors(DESCRIPTORS);
    let clock = sys::file_clock;
    let share = mote_virtiofsd::Share { directory, read_only, descriptors, open_files, clock };
    mote_virtiofsd::serve(listener, share).map_err(|error| anyhow!(error))
}

fn parse(arguments: &[OsString]) -> Result<(PathBuf, bool, Isolation, u64)> {
    let [directory, access, isolation, open_files] = arguments else {
        bail!("it takes four arguments");
    };
    let read_only = match access.to_str() {
        Some(READ_ONLY) => true,
        Some(READ_WRITE) => false,
        _ => bail!("the second argument is neither {READ_ONLY} nor {READ_WRITE}"),
    };
    let isolation = isolation.to_str().and_then(Isolation::from_word).context("the third one")?;
    let open_files = open_files.to_str().and_then(|number| number.parse().ok());
    Ok((Path::new(directory).into(), read_only, isolation, open_files.context("the fourth one")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn a_task_comes_through_its_arguments() {
        for isolation in Isolation::ALL {
            for read_only in [false, true] {
                let directory = Path::new("/srv/a b");
                let task = Task { directory, read_only, isolation, open_files: 65_536 };
                let words = arguments(&task).expect("no NUL");
                assert_eq!(words[0].as_bytes(), NAME.as_bytes());
                let words = words.into_iter().skip(1);
                let words: Vec<_> = words.map(|w| OsString::from_vec(w.into_bytes())).collect();
                let parsed = parse(&words).expect("parses");
                assert_eq!(parsed, (directory.into(), read_only, isolation, 65_536));
            }
        }
        assert!(parse(&["/".into()]).is_err());
    }
}
