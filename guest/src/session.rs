//! What sessions for commands and for terminals have in common: the box that they work in, the
//! program that a request asks for and its root, and the exit code that the client is told.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use mote_agent::instance::{Instance, Process};
use mote_agent::text::Text;

use crate::attest::Attest;
use crate::cgroup::BoxCgroup;
use crate::launch::{Program, Refusal, doing};
use crate::mount;
use crate::spawn::Held;
use crate::sys::{self, ExitStatus};

/// What a session needs of the box.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// What the box is.
    pub instance: &'a Instance,
    /// Its cgroup.
    pub cgroup: &'a BoxCgroup,
    /// Its attestation server, if it has one.
    pub attest: Option<&'a Attest>,
    /// Process id of the entrypoint.
    pub entrypoint: i32,
    /// If it has yet to start.
    pub held: Option<&'a Held>,
    /// Number of the session, which no other has had.
    pub session: u64,
}

/// The program that a request asks for, with what the box has for all of them.
pub fn program<'a>(
    cmd: &'a [Text],
    env: &'a [(OsString, OsString)],
    workdir: &'a Path,
    user: Option<&'a str>,
    process: Option<&'a Process>,
    context: &Context<'a>,
) -> Program<'a> {
    let mut words = cmd.iter().map(|word| &**word);
    let executable = words.next().unwrap_or_default();
    let (args, env) = (words.collect(), env.iter().map(|(n, v)| (&**n, &**v)).collect());
    let Instance { rlimits, security, .. } = context.instance;
    Program {
        executable,
        args,
        env,
        workdir,
        user: user.filter(|user| !user.is_empty()),
        process,
        rlimits,
        terminal: false,
        by_session: true,
        security,
        view: None,
        hold: false,
    }
}

/// Has this session see what the box's programs do, and its command run among them.
///
/// # Errors
/// The entrypoint has ended.
pub fn join_programs(context: &Context<'_>) -> Result<(), Refusal> {
    if !context.instance.has_own_view() {
        return Ok(());
    }
    let kinds = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    sys::process_file(context.entrypoint)
        .and_then(|entrypoint| sys::namespaces::enter_namespaces(&entrypoint, kinds))
        .map_err(doing("join the box's programs"))
}

/// The box's environment with what secrets add to it, and a request's own entries over both. A command whose `process` is
/// given has the request's only.
pub fn environment(
    request: &[Text],
    process: Option<&Process>,
    context: &Context<'_>,
) -> Vec<(OsString, OsString)> {
    let own = request.iter().map(|entry| {
        let mut parts = entry.as_bytes().splitn(2, |byte| *byte == b'=');
        [parts.next(), parts.next()]
            .map(|part| OsStr::from_bytes(part.unwrap_or_default()).to_owned())
    });
    // The runtime's words to a guest init, which are no business of the program's.
    let is_shown = |name: &OsStr| !name.is_empty() && !name.as_bytes().starts_with(b"A3S_SEC_");
    let own = own.map(|[name, value]| (name, value));
    let own = own.filter(|(name, _)| is_shown(name));
    if process.is_some() {
        return own.collect();
    }
    let of_box = context.instance.exec_env.iter();
    let of_box = of_box.map(|(name, value)| (name.into(), value.into()));
    let secret = context.attest.map(Attest::variables).into_iter().flatten();
    of_box.chain(secret.filter(|(name, _)| is_shown(name))).chain(own).collect()
}

/// A request's directory, seen from the box's own, or from the root that the request names.
pub fn working_dir(
    request: Option<&Text>,
    root: Option<&Root<'_>>,
    context: &Context<'_>,
) -> PathBuf {
    let own = root.map_or(Path::new(&context.instance.exec_workdir), |_| Path::new("/"));
    own.join(request.map_or(OsStr::new(""), |directory| directory))
}

/// A directory of the guest that a request's command has as its root (contract §4.7).
#[derive(Debug)]
pub struct Root<'a>(&'a Path);

impl<'a> Root<'a> {
    /// The one that a request names, if any.
    ///
    /// # Errors
    /// The text for the client: it is no directory, or not to be named.
    pub fn new(request: Option<&'a Text>, workdir: Option<&Text>) -> Result<Option<Self>, String> {
        let Some(named) = request else { return Ok(None) };
        let path = Path::new(&**named);
        let has_nul = |text: &Text| text.as_bytes().contains(&0);
        if !path.is_absolute() || has_nul(named) || workdir.is_some_and(has_nul) {
            return Err(format!("Invalid rootfs path: {named}"));
        }
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Ok(Some(Root(path))),
            Ok(_) => Err(format!("Rootfs path is not a directory: {named}")),
            Err(error) => Err(format!("Rootfs path is unavailable: {named} ({error})")),
        }
    }

    /// Makes it the root of this process, and so of what it starts.
    ///
    /// # Errors
    /// Those of chroot(2) and unshare(2).
    pub fn enter(self) -> io::Result<()> {
        // Behind it there may be no /proc, by which the command is made so.
        sys::no_longer_spare();
        // What is mounted there goes with the command. It would be in the way of whoever removes the directory,
        // or removed with it: the box has only one /dev.
        sys::namespaces::own_mounts()?;
        sys::chroot(self.0)?;
        std::env::set_current_dir("/")?;
        mount::kernel_file_systems_if_missing();
        Ok(())
    }
}

/// As a shell has it: a status, or 128+n for signal n.
pub fn exit_code(status: ExitStatus) -> i32 {
    match status {
        ExitStatus::Exited(code) => i32::from(code),
        ExitStatus::Signaled(signal) => 128 + i32::from(signal),
    }
}
