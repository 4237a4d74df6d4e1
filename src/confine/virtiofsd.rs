//! Confinement of virtiofsd, of mote's own and of one that the user has named, so that under an attacker's control it
//! can do no more than its share allows.
//!
//! mote's own starts in a new pid namespace, and there:
//!
//! ```text
//!  1  a limit on open files; no other groups
//!  2  new mount and network namespaces: the share, restricted, is its root, and the only mount that is left
//!  3  no new privileges, and of the capabilities those for the guest's file operations
//!  4  the filter of all its threads ([`ThreadKind::Virtiofsd`])
//! ```
//!
//! Several of one box share what does not depend on the share: one process makes the network namespace (and user namespace),
//! loads their filter, and copies itself for each, in a pid namespace of its own again. A second filter of the copy refuses
//! what the first one permits for step 2.
//!
//! Where there are no namespaces, step 2 is Landlock, with a chroot where that is permitted. A named one is given the
//! same share, and enters its own sandbox then.

use std::ffi::CString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope, path_beneath_rules,
};

use super::{Isolation, ThreadKind, seccomp, sudden_end};
use crate::sys::capabilities::{self, Capabilities};
use crate::sys::confine::{self, Namespaces};

/// What is left of the host to a virtiofsd that is confined.
#[derive(Debug)]
pub struct Confined<'a> {
    /// The share's directory, as it sees it.
    pub directory: &'a Path,
    /// Its own `/proc/self/fd`.
    pub descriptors: File,
    /// Its limit on open files.
    pub open_files: u64,
}

/// The namespaces that mote's own virtiofsd is started in; it makes the others itself.
pub fn namespaces(isolation: Isolation) -> Namespaces {
    isolation.user_namespace().map_or(0, |user| user | libc::CLONE_NEWPID)
}

/// The capabilities that it is started with in a user namespace of its own: what it serves with, and what
/// `confine_virtiofsd` takes.
pub fn capabilities(read_only: bool) -> Capabilities {
    served_with(read_only) | capabilities::SYS_ADMIN | capabilities::SYS_CHROOT
}

/// The capabilities that the guest's file operations take, as the host's root.
fn served_with(read_only: bool) -> Capabilities {
    if read_only {
        return capabilities::DAC_OVERRIDE;
    }
    let owner = capabilities::CHOWN
        | capabilities::DAC_OVERRIDE
        | capabilities::FOWNER
        | capabilities::FSETID;
    owner | capabilities::SETGID | capabilities::SETUID | capabilities::SETFCAP
}

/// Confines this process, mote's own virtiofsd, which has one thread and was started in [`namespaces`].
///
/// # Errors
/// The host refuses a step that it had permitted when the plan was made.
pub fn confine_virtiofsd(
    isolation: Isolation,
    directory: &Path,
    read_only: bool,
    open_files: u64,
) -> Result<Confined<'_>> {
    let open_files = limit_resources(open_files)?;
    let (directory, descriptors) = if isolation.user_namespace().is_some() {
        leave_groups_and_network(isolation)?;
        (Path::new("/"), enter_share(directory, read_only)?)
    } else {
        let descriptors = confine::own_descriptors().context("open /proc/self/fd")?;
        if isolation == Isolation::Landlock {
            landlock_rules(directory, read_only, &[])?.restrict_self()?;
        }
        confine::drop_groups().context("give up other groups")?;
        if capabilities::may_chroot() {
            let share = File::open(directory).context("open the share")?;
            confine::enter_directory(&share).context("enter the share")?;
            confine::make_root().context("make the share the root")?;
            (Path::new("/"), descriptors)
        } else {
            (directory, descriptors)
        }
    };
    if isolation != Isolation::Off {
        confine::no_new_privileges().context("forgo new privileges")?;
        capabilities::drop_all_but(served_with(read_only)).context("drop capabilities")?;
        seccomp::confine_thread("virtiofsd", ThreadKind::Virtiofsd)?;
    }
    Ok(Confined { directory, descriptors, open_files })
}

/// The first steps of several virtiofsd of one box, taken once, by the process whose copies they become: all that does
/// not depend on the share. What [`confine_copy`] still calls is permitted until then. Returns the limit on open files.
///
/// # Errors
/// The host refuses a step that it had permitted when the plan was made.
pub fn confine_starter(isolation: Isolation, open_files: u64) -> Result<u64> {
    let open_files = limit_resources(open_files)?;
    leave_groups_and_network(isolation)?;
    confine::no_new_privileges().context("forgo new privileges")?;
    // No more than what serves a share that is not read-only.
    capabilities::bound(served_with(false));
    seccomp::confine_thread("virtiofsd", ThreadKind::VirtiofsdStarter)?;
    Ok(open_files)
}

/// The other steps, for one share, in a copy of that process in a pid namespace of its own. Its two filters together permit
/// what that of [`confine_virtiofsd`] permits.
///
/// # Errors
/// The host refuses a step that it had permitted when the plan was made.
pub fn confine_copy(
    directory: &Path,
    read_only: bool,
    open_files: u64,
) -> Result<Confined<'static>> {
    let descriptors = enter_share(directory, read_only)?;
    capabilities::keep(served_with(read_only)).context("drop capabilities")?;
    seccomp::confine_thread("virtiofsd", ThreadKind::VirtiofsdStarted)?;
    Ok(Confined { directory: Path::new("/"), descriptors, open_files })
}

fn limit_resources(open_files: u64) -> Result<u64> {
    sudden_end::report(None)?;
    confine::limit_open_files_anew(open_files).context("limit open files")?;
    confine::share_heap();
    confine::open_files().context("ask for the limit on open files")
}

fn leave_groups_and_network(isolation: Isolation) -> Result<()> {
    if isolation == Isolation::Namespaces {
        confine::drop_groups().context("give up other groups")?;
    }
    confine::unshare(libc::CLONE_NEWNET).context("make a network namespace")
}

/// Makes a share the root, and the only mount, of this process. Returns its `/proc/self/fd`.
fn enter_share(directory: &Path, read_only: bool) -> Result<File> {
    let path = CString::new(directory.as_os_str().as_bytes())?;
    confine::unshare(libc::CLONE_NEWNS).context("make a mount namespace")?;
    confine::detach_mounts().context("detach the mounts")?;
    let descriptors = confine::own_descriptors_alone().context("keep /proc/self/fd alone")?;
    confine::enter_share(&path, read_only).context("make the share the root")?;
    Ok(descriptors)
}

/// Landlock rules that allow virtiofsd its share, and to open a file again (/proc/self/fd); no network, and no signals
/// to other processes. `programs` are what it may execute, and the libraries for that.
///
/// # Errors
/// The host has no Landlock, or one that would keep files from being moved (before Linux 5.19).
pub fn landlock_rules(
    directory: &Path,
    read_only: bool,
    programs: &[&Path],
) -> Result<RulesetCreated> {
    let rules = || {
        let abi = ABI::V6;
        let all = AccessFs::from_all(abi);
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let devices = AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev;
        let access = if read_only { read } else { all & !AccessFs::Execute & !devices };
        Ruleset::default()
            .handle_access(all)?
            // Without `Refer` the guest could not move files from one directory to another.
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::Refer)?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessNet::from_all(abi))?
            .scope(Scope::AbstractUnixSocket | Scope::Signal)?
            .create()?
            .add_rules(path_beneath_rules(programs, read | AccessFs::Execute))?
            .add_rules(path_beneath_rules(["/proc"], read))?
            .add_rules(path_beneath_rules([directory], access))
    };
    rules().context(
        "restrict virtiofsd by Landlock (it takes Linux 5.19; or allow this user namespaces)",
    )
}
