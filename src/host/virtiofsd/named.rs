//! A virtiofsd that the user has named: its command line, and what it may reach before it enters its own sandbox.

use std::ffi::CString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use landlock::RulesetCreated;
use mote_virtiofsd::ATTRIBUTES;

use super::{Started, Task};
use crate::confine::{Isolation, virtiofsd};
use crate::sys::{self, capabilities, confine};

/// Starts it. It finds the listening socket as its descriptor [`sys::process::INHERITED_FD`].
///
/// # Errors
/// The program cannot be started, or the host cannot confine it.
pub(super) fn start(program: &Path, task: &Task<'_>, listener: BorrowedFd<'_>) -> Result<Started> {
    let mut command = Command::new(program);
    command
        .arg0("virtiofsd")
        .arg(format!("--fd={}", sys::process::INHERITED_FD))
        .arg("--shared-dir")
        .arg(task.directory)
        .args(["--cache=auto", "--inode-file-handles=never", "--log-level=error"])
        .args(["--xattr", &format!("--xattrmap={ATTRIBUTES}")])
        .args(task.read_only.then_some("--readonly"))
        .args(own_sandbox(task.isolation))
        .arg(format!("--modcaps={}", needless_capabilities(task.read_only)))
        // virtiofsd keeps the limit that `prepare` below has set.
        .arg("--rlimit-nofile=0")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut restrict = restriction(program, task)?;
    let open_files = task.open_files;
    let prepare = move || confine::limit_open_files_anew(open_files).and_then(|()| restrict());
    sys::process::helper(&mut command, listener, prepare);
    let mut child =
        command.spawn().with_context(|| format!("start virtiofsd ({})", program.display()))?;
    let ended = sys::process::process_file(child.id()).context("watch virtiofsd")?;
    let stderr = child.stderr.take().context("virtiofsd's standard error")?;
    Ok(Started { pid: child.id(), stderr: OwnedFd::from(stderr).into(), ended })
}

/// Capabilities that virtiofsd keeps as root and does not need.
fn needless_capabilities(read_only: bool) -> &'static str {
    if read_only { "-chown:-fowner:-fsetid:-setgid:-setuid:-mknod:-setfcap" } else { "-mknod" }
}

/// What the child does before it executes virtiofsd. This is in addition to virtiofsd's own sandbox, which it enters
/// later. A read-only share becomes a read-only mount, or a tree that Landlock allows only to read.
fn restriction(
    program: &Path,
    task: &Task<'_>,
) -> Result<Box<dyn FnMut() -> io::Result<()> + Send + Sync>> {
    let Task { directory, read_only, isolation, .. } = *task;
    if isolation == Isolation::Landlock {
        let needed = LIBRARIES.map(Path::new).into_iter().chain([program]);
        let needed: Vec<_> = needed.filter(|path| path.exists()).collect();
        let mut rules = Some(virtiofsd::landlock_rules(directory, read_only, &needed)?);
        return Ok(Box::new(move || {
            let enforced = rules.take().map(RulesetCreated::restrict_self);
            enforced.transpose().map(drop).map_err(io::Error::other)
        }));
    }
    let path = CString::new(directory.as_os_str().as_bytes())
        .with_context(|| format!("share {}", directory.display()))?;
    Ok(Box::new(move || {
        let Some(user) = isolation.user_namespace() else { return Ok(()) };
        confine::unshare(user | libc::CLONE_NEWNS)?;
        confine::detach_mounts()?;
        confine::restrict_mount(&path, read_only).map(drop)
    }))
}

/// The option for the sandbox that virtiofsd enters itself; `None` for its default, namespaces.
fn own_sandbox(isolation: Isolation) -> Option<&'static str> {
    match isolation {
        Isolation::Namespaces | Isolation::UserNamespaces | Isolation::Off => None,
        _ if capabilities::may_chroot() => Some("--sandbox=chroot"),
        _ => Some("--sandbox=none"),
    }
}

/// Where it finds the libraries that it is linked with.
const LIBRARIES: [&str; 7] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/local/lib",
    "/etc/ld.so.cache",
    "/nix/store",
    "/gnu/store",
];
