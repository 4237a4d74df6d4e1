//! mote's own virtiofsd: mote's file, executed again under that name, which is `main`'s second way to go. Its arguments
//! are what all shares have in common, and then two for each share. It gets ready to serve one when it is asked for
//! something. With several it becomes a process for each first, since most of a start is the same for all: the program's
//! own, the network namespace, the filter.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use vmm_sys_util::eventfd::EventFd;

use super::{Started, Task, wait_in_time};
use crate::confine::Isolation;
use crate::confine::virtiofsd::{self, Confined};
use crate::sys::{self, Interest, arguments};

/// The name under which mote is a virtiofsd.
pub const NAME: &str = "virtiofsd";

/// For how many open files there is room from the start on, at eight bytes of the kernel's each: virtiofsd keeps those
/// open that the guest knows.
const DESCRIPTORS: u16 = 4096;

/// How many descriptors of each share's the starter is started with: the listening socket, the event that it is asked for,
/// and the pipe for errors. The process for one share has the first two there, and the third as its standard error.
const OF_EACH: usize = 3;
const ASKED: usize = 1;

/// What it writes to its standard error when it can serve, before any words.
pub(super) const READY: u8 = 0;

/// Length of a process number, as the starter tells it.
const NUMBER_LEN: usize = size_of::<u32>();

const READ_ONLY: &str = "read-only";
const READ_WRITE: &str = "read-write";

/// Starts it, with the listening socket. It does nothing before `asked` is readable.
///
/// # Errors
/// The host permits no such process, or no pipe.
pub(super) fn start(task: &Task<'_>, listener: BorrowedFd<'_>, asked: &EventFd) -> Result<Started> {
    let (stderr, theirs) = std::io::pipe().context("make a pipe")?;
    let arguments = words(std::slice::from_ref(task))?;
    let namespaces = virtiofsd::namespaces(task.isolation);
    let capabilities = virtiofsd::capabilities(task.read_only);
    let theirs = theirs.as_fd();
    let inherited: [&dyn AsRawFd; 2] = [&listener, asked];
    // Before the guest runs: see `hold_share`.
    let held = CString::new(task.directory.as_os_str().as_bytes())?;
    let (pid, ended) = sys::process::start_again(
        &arguments,
        &inherited,
        theirs,
        namespaces,
        capabilities,
        Some(&held),
    )?;
    Ok(Started { pid, stderr: OwnedFd::from(stderr).into(), ended })
}

/// Starts one for each task, with its listening socket, by one process that becomes them. Each does nothing for its share
/// before its `asked` is readable. All have the same isolation, which has namespaces.
///
/// # Errors
/// The host permits no such process, or no pipe, or refuses a step that it had permitted when the plan was made.
pub(super) fn start_several(
    tasks: &[Task<'_>],
    listeners: &[BorrowedFd<'_>],
    asked: &[EventFd],
) -> Result<Vec<Started>> {
    let [first, ..] = tasks else { return Ok(Vec::new()) };
    let pipes = tasks.iter().map(|_| std::io::pipe()).collect::<std::io::Result<Vec<_>>>();
    let (stderrs, theirs): (Vec<_>, Vec<_>) = pipes.context("make a pipe")?.into_iter().unzip();
    let (report, reporting) = std::io::pipe().context("make a pipe")?;
    // As `become_several` takes them over.
    let of_each = listeners.iter().zip(asked).zip(&theirs);
    let of_each = of_each.flat_map(|((socket, asked), pipe)| [socket as &dyn AsRawFd, asked, pipe]);
    let inherited: Vec<_> = of_each.chain([&reporting as &dyn AsRawFd]).collect();
    let stderr = theirs.first().context("there is a share")?.as_fd();
    let writable = tasks.iter().find(|task| !task.read_only).unwrap_or(first);
    let (starter, ended) = sys::process::start_again(
        &words(tasks)?,
        &inherited,
        stderr,
        first.isolation.user_namespace().unwrap_or(0),
        virtiofsd::capabilities(writable.read_only),
        None,
    )?;
    drop(reporting);
    let numbers = read_numbers(&mut OwnedFd::from(report).into(), starter, tasks.len());
    if numbers.is_err() {
        sys::process::kill_process(&ended);
    }
    drop(theirs);
    // It ends when all are started.
    let _ = sys::process::wait(starter);
    let mut started = Vec::new();
    for (index, stderr) in stderrs.into_iter().enumerate() {
        let mut stderr = File::from(OwnedFd::from(stderr));
        let number = match &numbers {
            Ok(numbers) => numbers.get(index).copied().context("a number for each")?,
            Err(error) => {
                // What went wrong before there was one for each is in the first one's.
                let mut said = String::new();
                // Those that were started still have it open.
                let _ = sys::set_nonblocking(&stderr).map(|()| stderr.read_to_string(&mut said));
                bail!("{} ({error})", said.trim());
            }
        };
        let ended = sys::process::process_file(number).context("watch virtiofsd")?;
        started.push(Started { pid: number, stderr, ended });
    }
    Ok(started)
}

/// The numbers of the processes that the starter has become.
fn read_numbers(report: &mut File, starter: u32, count: usize) -> Result<Vec<u32>> {
    let in_time = wait_in_time([Interest::read(&*report)], &[starter])?;
    ensure!(in_time == [true], "virtiofsd took too long to start");
    let mut bytes = vec![0; count * NUMBER_LEN];
    report.read_exact(&mut bytes).context("virtiofsd did not start")?;
    Ok(bytes.as_chunks().0.iter().map(|number| u32::from_ne_bytes(*number)).collect())
}

/// The arguments for these tasks, which have isolation and limit in common.
fn words(tasks: &[Task<'_>]) -> Result<Vec<CString>> {
    let [Task { isolation, open_files, .. }, ..] = tasks else { bail!("there is a share") };
    let open_files = open_files.to_string();
    let mut words = vec![NAME.as_bytes(), isolation.word().as_bytes(), open_files.as_bytes()];
    for task in tasks {
        words.push(task.directory.as_os_str().as_bytes());
        words.push(access(task.read_only).as_bytes());
    }
    words.into_iter().map(|word| CString::new(word).map_err(Into::into)).collect()
}

fn access(read_only: bool) -> &'static str {
    if read_only { READ_ONLY } else { READ_WRITE }
}

/// Serves the shares that the arguments behind the name tell of, until mote ends, and returns the exit code. mote reads what goes to stderr.
pub fn main(arguments: impl Iterator<Item = OsString>) -> u8 {
    let arguments: Vec<_> = arguments.collect();
    match serve(&arguments) {
        Ok(()) => 0,
        Err(error) => {
            // Nobody reads it if mote is gone.
            let _ = writeln!(std::io::stderr(), "{error:#}");
            1
        }
    }
}

fn serve(arguments: &[OsString]) -> Result<()> {
    let Tasks { isolation, open_files, shares } = parse(arguments)
        .context("mote starts this itself, to serve shares, under the name virtiofsd")?;
    sys::process::name(c"virtiofsd");
    // Who stops all processes of a box at once, as systemd does with a scope, must not take its files away first.
    sys::process::become_helper(&sys::STOP_SIGNALS).context("become mote's helper")?;
    match &shares[..] {
        [(_, read_only)] => {
            wait_until_asked(0)?;
            let confined =
                virtiofsd::confine_virtiofsd(isolation, HELD.as_ref(), *read_only, open_files)?;
            serve_share(confined, *read_only)
        }
        _ => become_several(isolation, open_files, &shares),
    }
}

/// What [`hold_share`] has made the share.
const HELD: &str = ".";

/// Makes a share's directory the working directory, and so the share, whatever has its path when it is used: a guest may
/// have it in another of its shares, and put a link in its place.
fn hold_share(directory: &Path) -> Result<()> {
    std::env::set_current_dir(directory)
        .with_context(|| format!("open the share {}", directory.display()))
}

/// Waits until there is work for the share at this place, or mote is gone: it may have ended before this process was to
/// end with it.
fn wait_until_asked(place: usize) -> Result<()> {
    let asked = ManuallyDrop::new(sys::process::inherited_file(OF_EACH * place + ASKED));
    let stderr = std::io::stderr();
    loop {
        match sys::poll([Interest::read(&*asked), Interest::read(&stderr)], None) {
            Ok([true, _]) => return Ok(()),
            // Nobody reads it any more.
            Ok([false, true]) => bail!("mote has ended"),
            // A signal.
            Ok([false, false]) => {}
            Err(error) => return Err(error).context("wait until there is work"),
        }
    }
}

/// Becomes a process for each share, and tells mote their numbers.
fn become_several(isolation: Isolation, open_files: u64, shares: &[(PathBuf, bool)]) -> Result<()> {
    let open_files = virtiofsd::confine_starter(isolation, open_files)?;
    // Behind what is each share's.
    let mut report = sys::process::inherited_file(OF_EACH * shares.len());
    let mut numbers = Vec::with_capacity(NUMBER_LEN * shares.len());
    for (place, (directory, read_only)) in shares.iter().enumerate() {
        // The copy begins there.
        hold_share(directory)?;
        match sys::process::copy_beside(libc::CLONE_NEWPID).context("make a process for a share")? {
            Some(number) => numbers.extend_from_slice(&number.to_ne_bytes()),
            None => {
                drop(report);
                // First: whatever a copy touches of the starter's memory costs a start, and many a share is never used.
                wait_until_asked(place)?;
                sys::process::keep_inherited(OF_EACH * place).context("keep what is its own")?;
                sys::process::become_helper(&sys::STOP_SIGNALS).context("become mote's helper")?;
                show_as(isolation, open_files, directory, *read_only);
                let confined = virtiofsd::confine_copy(HELD.as_ref(), *read_only, open_files)?;
                return serve_share(confined, *read_only);
            }
        }
    }
    // At once, and so whole.
    report.write_all(&numbers).context("tell mote")
}

/// Makes the command line that of a virtiofsd for this share alone.
fn show_as(isolation: Isolation, open_files: u64, directory: &Path, read_only: bool) {
    let open_files = open_files.to_string();
    // What cannot be shown is no error.
    arguments::replace(&[
        NAME.as_bytes(),
        isolation.word().as_bytes(),
        open_files.as_bytes(),
        directory.as_os_str().as_bytes(),
        access(read_only).as_bytes(),
    ]);
}

fn serve_share(confined: Confined<'_>, read_only: bool) -> Result<()> {
    let listener = sys::process::inherited_listener().context("take over mote's socket")?;
    let directory = confined.directory.to_str().context("the share's path is no UTF-8")?.into();
    let (descriptors, open_files) = (confined.descriptors, confined.open_files);
    sys::process::reserve_descriptors(DESCRIPTORS);
    let clock = sys::file_clock;
    let share = mote_virtiofsd::Share { directory, read_only, descriptors, open_files, clock };
    let ready = || std::io::stderr().write_all(&[READY]);
    mote_virtiofsd::serve(listener, share, ready).map_err(|error| anyhow!(error))
}

/// What the arguments say.
#[derive(Debug, PartialEq, Eq)]
struct Tasks {
    isolation: Isolation,
    open_files: u64,
    /// The directories, and whether they are read-only.
    shares: Vec<(PathBuf, bool)>,
}

fn parse(arguments: &[OsString]) -> Result<Tasks> {
    let [isolation, open_files, shares @ ..] = arguments else {
        bail!("it takes two arguments, and two for each share");
    };
    let isolation = isolation.to_str().and_then(Isolation::from_word).context("the first one")?;
    let open_files = open_files.to_str().and_then(|number| number.parse().ok());
    let open_files = open_files.context("the second one")?;
    let (pairs, rest) = shares.as_chunks::<2>();
    ensure!(rest.is_empty() && !pairs.is_empty(), "there are two arguments for each share");
    let shares = pairs.iter().map(|[directory, access]| {
        let read_only = match access.to_str() {
            Some(READ_ONLY) => true,
            Some(READ_WRITE) => false,
            _ => bail!("a share's second argument is neither {READ_ONLY} nor {READ_WRITE}"),
        };
        Ok((directory.into(), read_only))
    });
    Ok(Tasks { isolation, open_files, shares: shares.collect::<Result<_>>()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn tasks_come_through_their_arguments() {
        for isolation in Isolation::ALL {
            let task = |directory, read_only| Task {
                directory: Path::new(directory),
                read_only,
                isolation,
                open_files: 65_536,
            };
            for tasks in [
                vec![task("/srv/a b", true)],
                vec![task("/", false), task("/srv/a b", true), task("/c", false)],
            ] {
                let words = words(&tasks).expect("no NUL");
                assert_eq!(words[0].as_bytes(), NAME.as_bytes());
                let words = words.into_iter().skip(1);
                let words: Vec<_> = words.map(|w| OsString::from_vec(w.into_bytes())).collect();
                let shares = tasks.iter().map(|task| (task.directory.into(), task.read_only));
                let wanted = Tasks { isolation, open_files: 65_536, shares: shares.collect() };
                assert_eq!(parse(&words).expect("parses"), wanted);
            }
        }
        assert!(parse(&["namespaces".into(), "65536".into()]).is_err());
        assert!(parse(&["namespaces".into(), "65536".into(), "/".into()]).is_err());
    }
}
