//! Confinement: what mote gives up before it runs a guest, in which order, and why in that order.
//!
//! ```text
//!  1  everything is open: KVM, memory, sockets, files, back-ends, passt    (needs the host)
//!  2  inherited descriptors closed, standard input empty, resource limits
//!  3  namespaces of its own; the root an empty directory                   (needs one thread)
//!  4  Landlock: no file, no TCP port to bind, whatever the root is         (before there are threads)
//!  5  no new privileges, no capabilities, memory hidden from other processes
//!  6  every thread: the filter of its kind ([`seccomp`])                   (last: refuses all of the above)
//!  7  the first KVM_RUN
//! ```
//!
//! Namespaces need either a capability or a host that lets every user make user namespaces. Without
//! both, Landlock must do. The system call filters, which allow no call that opens a file, work on every
//! host. There is no private pid namespace: the process that the runtime has started is the VM (contract
//! §2.6), and a process cannot leave its pid namespace. Instead the filters allow no call that names a
//! pid.

pub mod seccomp;
pub mod sudden_end;
pub mod virtiofsd;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};
use std::{fmt, thread};

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use crate::log;
use crate::sys;
use crate::sys::capabilities;
use crate::sys::confine::{self, Namespaces, Resource};
use crate::sys::directory::Directory;
use crate::sys::fatal::HandlerStack;
use crate::sys::process;
pub use seccomp::{NetworkAccess, ThreadKind};

/// By what mote is kept from the host's files, depending on what this host permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// Namespaces, with the capability for them.
    Namespaces,
    /// Namespaces, inside a new user namespace.
    UserNamespaces,
    /// Landlock alone.
    Landlock,
    /// Neither: nothing but system call filters.
    FiltersOnly,
    /// Nothing at all, because the user asked for that.
    Off,
}

impl Isolation {
    /// All there are.
    pub const ALL: [Isolation; 5] = [
        Isolation::Namespaces,
        Isolation::UserNamespaces,
        Isolation::Landlock,
        Isolation::FiltersOnly,
        Isolation::Off,
    ];

    /// A word for it, by which mote tells a process that it starts.
    pub fn word(self) -> &'static str {
        match self {
            Isolation::Namespaces => "namespaces",
            Isolation::UserNamespaces => "user-namespaces",
            Isolation::Landlock => "landlock",
            Isolation::FiltersOnly => "filters",
            Isolation::Off => "off",
        }
    }

    /// What a word is for.
    pub fn from_word(word: &str) -> Option<Isolation> {
        Isolation::ALL.into_iter().find(|isolation| isolation.word() == word)
    }

    /// Finds out what the host permits, by trying it in a child process. But for a network namespace: to make one and have
    /// it taken down again costs more than all else that mote does before a guest runs, and whoever may make the others
    /// may make one, if the host has any.
    pub fn of_host(network: NetworkAccess) -> Isolation {
        let has_network = confine::has_network_namespaces();
        let permitted = |isolation: Isolation| {
            has_network && process::succeeds_in_child(|| isolation.enter_namespaces(0))
        };
        if capabilities::is_administrator() && permitted(Isolation::Namespaces) {
            Isolation::Namespaces
        } else if permitted(Isolation::UserNamespaces) {
            Isolation::UserNamespaces
        } else if process::succeeds_in_child(|| {
            let status = restrict_by_landlock(network).map_err(io::Error::other)?;
            if status == RulesetStatus::NotEnforced {
                Err(io::ErrorKind::Unsupported.into())
            } else {
                Ok(())
            }
        }) {
            Isolation::Landlock
        } else {
            Isolation::FiltersOnly
        }
    }

    /// The flag for a user namespace to unshare with the mount namespace, 0 if it is not needed; `None`
    /// if this host permits no namespaces.
    pub fn user_namespace(self) -> Option<Namespaces> {
        match self {
            Isolation::Namespaces => Some(0),
            Isolation::UserNamespaces => Some(libc::CLONE_NEWUSER),
            Isolation::Landlock | Isolation::FiltersOnly | Isolation::Off => None,
        }
    }

    /// Enters new namespaces, a `network` one among them or none, with an empty root.
    fn enter_namespaces(self, network: Namespaces) -> io::Result<()> {
        let Some(user) = self.user_namespace() else { return Ok(()) };
        let others = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        confine::unshare(user | network | others)?;
        confine::enter_empty_root()
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isolation::Namespaces => "namespaces with an empty root, Landlock, system call filters",
            Isolation::UserNamespaces => {
                "user and other namespaces with an empty root, Landlock, system call filters"
            }
            Isolation::Landlock => {
                "Landlock, system call filters (this host permits no namespaces to this user)"
            }
            Isolation::FiltersOnly => {
                "system call filters (this host permits neither namespaces nor Landlock to this user)"
            }
            Isolation::Off => "NOT AT ALL (MOTE_NO_SANDBOX is set)",
        })
    }
}

/// How long the kernel may still count a thread that has been joined: until it is gone, the process
/// cannot enter a user namespace.
const THREAD_END_LIMIT: Duration = Duration::from_millis(500);

/// Address space that mote may still need while it runs a guest: for threads' stacks, and for data on its
/// connections ([`crate::virtio::vsock::mux`] says how much). It bounds how much memory a guest that has
/// broken into mote can take from the host, beside the box's own.
const ADDRESS_SPACE_ROOM: u64 = 1 << 30;

/// Of a thread's stack: less than a huge page, which the host would clear and give it whole.
const STACK_LEN: usize = 1 << 20;

/// How a box is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sandbox {
    /// What keeps mote from the host's files.
    pub isolation: Isolation,
    /// What mote uses of the host's network.
    pub network: NetworkAccess,
    /// Most descriptors that the box may ever need.
    pub open_files: u64,
}

impl Sandbox {
    /// Steps 2 to 5, for a process with one thread that has opened all it needs. Closes `inherited`, the
    /// descriptors that the process was started with.
    ///
    /// # Errors
    /// The host refuses a step that it had permitted when the plan was made.
    pub fn enter(&self, inherited: &[RawFd]) -> Result<()> {
        if self.isolation == Isolation::Off {
            log::warn("MOTE_NO_SANDBOX is set: this box's mote is not confined at all");
            return Ok(());
        }
        confine::close_inherited(inherited);
        let nothing = File::open("/dev/null").context("open /dev/null")?;
        confine::replace_stdin(&nothing).context("empty standard input")?;
        sys::socket::fix_linger_values()
            .context("map the values of SO_LINGER at 1 MiB (is vm.mmap_min_addr above that?)")?;
        let address_space = confine::address_space().context("read /proc/self/statm")?;
        for (resource, most) in [
            (Resource::AddressSpace, address_space + ADDRESS_SPACE_ROOM),
            (Resource::OpenFiles, self.open_files),
            (Resource::LockedMemory, 0),
            (Resource::MessageQueues, 0),
        ] {
            confine::limit(resource, most).with_context(|| format!("limit {resource:?}"))?;
        }
        self.enter_namespaces().context("enter namespaces of its own, with an empty root")?;
        restrict_by_landlock(self.network).context("restrict mote by Landlock")?;
        if self.isolation == Isolation::FiltersOnly {
            log::warn(
                "this host permits neither namespaces nor Landlock: only system call filters keep this box's mote and virtiofsd from the host's files; allow user namespaces or boot with lsm=landlock,… for more",
            );
        }
        confine::no_new_privileges().context("forgo new privileges")?;
        capabilities::drop_all_but(0).context("drop all capabilities")?;
        confine::hide_memory().context("keep mote's memory from others")
    }

    fn enter_namespaces(&self) -> io::Result<()> {
        // Sockets that are open already stay in the host's network: published ports, passt.
        let stays = self.network.connects || self.network.stays;
        let network = if stays { 0 } else { libc::CLONE_NEWNET };
        let deadline = Instant::now() + THREAD_END_LIMIT;
        loop {
            match self.isolation.enter_namespaces(network) {
                Err(error)
                    if error.raw_os_error() == Some(libc::EINVAL) && Instant::now() < deadline =>
                {
                    thread::yield_now();
                }
                done => return done,
            }
        }
    }

    /// Step 6 for the main thread.
    ///
    /// # Errors
    /// The host refuses the filter.
    pub fn confine_main(&self) -> Result<()> {
        self.confine("main", ThreadKind::Main(self.network))
    }

    /// Step 6 for the calling thread.
    ///
    /// # Errors
    /// The host refuses the filter.
    pub fn confine(&self, name: &str, kind: ThreadKind) -> Result<()> {
        match self.isolation {
            Isolation::Off => Ok(()),
            _ => seccomp::confine_thread(name, kind),
        }
    }

    /// Starts a thread that takes step 6, sends the result to `ready`, and does its work. The thread is
    /// never joined: only the process's exit is sure to stop it wherever it is.
    ///
    /// # Errors
    /// The host refuses a thread. If it refuses the filter, the error goes to `ready`.
    pub fn spawn(
        self,
        name: String,
        kind: ThreadKind,
        ready: Sender<Result<()>>,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        let started = thread::Builder::new().name(name.clone()).stack_size(STACK_LEN);
        let handler_stack = HandlerStack::new();
        started
            .spawn(move || {
                let confined = (handler_stack.take().context("set a stack for signals"))
                    .and_then(|()| self.confine(&thread_name(), kind));
                let goes_on = confined.is_ok();
                // If nobody receives it, the caller has given up the VM.
                if ready.send(confined).is_ok() && goes_on {
                    drop(ready);
                    work();
                }
            })
            .with_context(|| format!("start thread {name}"))?;
        Ok(())
    }
}

/// Confines the process that writes a box's logs, with one thread: it keeps what it has open, and may make and
/// rename files in `directory`, if there is one.
///
/// # Errors
/// The host refuses a step that it had permitted when the plan was made.
pub fn confine_log_writer(isolation: Isolation, directory: Option<&Directory>) -> Result<()> {
    // The outcome is mote's to write, not this process's.
    sudden_end::report(None)?;
    if isolation == Isolation::Off {
        return Ok(());
    }
    let left = directory.map(|directory| (directory, logs_accesses()));
    give_up_the_rest(left, "logs", ThreadKind::Logs)
}

/// To make, write, rename and remove files.
fn logs_accesses() -> BitFlags<AccessFs> {
    let files = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    files | AccessFs::MakeReg | AccessFs::RemoveFile
}

/// Confines the process that exchanges frames with other boxes, with one thread: it keeps what it has open, and
/// may list `directory`, which becomes its working directory and, where the host permits that, its root.
///
/// # Errors
/// The host refuses a step that it had permitted when the plan was made.
pub fn confine_switch(isolation: Isolation, directory: File) -> Result<()> {
    sudden_end::report(None)?;
    confine::enter_directory(&directory).context("enter the directory")?;
    if isolation == Isolation::Off {
        return Ok(());
    }
    if let Some(user) = isolation.user_namespace() {
        let others =
            libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        confine::unshare(user | others).context("enter namespaces of its own")?;
        confine::make_root().context("make the directory its root")?;
    }
    give_up_the_rest(Some((&directory, AccessFs::ReadDir.into())), "switch", ThreadKind::Switch)
}

/// Steps 4 to 6 for a process beside mote with one thread, which keeps these accesses in this directory.
fn give_up_the_rest(
    directory: Option<(impl AsFd, BitFlags<AccessFs>)>,
    name: &str,
    kind: ThreadKind,
) -> Result<()> {
    restrict_to(directory, NetworkAccess::NONE).context("restrict it by Landlock")?;
    confine::no_new_privileges().context("forgo new privileges")?;
    capabilities::drop_all_but(0).context("drop all capabilities")?;
    seccomp::confine_thread(name, kind)
}

fn thread_name() -> String {
    thread::current().name().unwrap_or("?").to_owned()
}

/// Forbids this process, and threads it starts, what Landlock can forbid on this host: opening files by
/// name, binding TCP ports, connecting to other processes' abstract sockets and, in a box with a network
/// of its own, all TCP connections. What is open stays usable.
fn restrict_by_landlock(network: NetworkAccess) -> Result<RulesetStatus> {
    restrict_to(None::<(&Directory, _)>, network)
}

/// The same, but that these accesses are left in this directory.
fn restrict_to(
    directory: Option<(impl AsFd, BitFlags<AccessFs>)>,
    network: NetworkAccess,
) -> Result<RulesetStatus> {
    // The newest ABI that mote knows; older kernels enforce as much of it as they can.
    let abi = ABI::V6;
    let ports = AccessNet::from_all(abi);
    let ports = if network.connects { ports & !AccessNet::ConnectTcp } else { ports };
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(ports)?
        // Signals are not restricted: mote must be able to kill virtiofsd, which is outside.
        .scope(Scope::AbstractUnixSocket)?
        .create()?
        .add_rules(directory.map(|(directory, accesses)| {
            Ok::<_, RulesetError>(PathBeneath::new(directory, accesses))
        }))?
        .restrict_self()?;
    Ok(status.ruleset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Links;

    #[test]
    fn landlock_leaves_the_logs_directory_and_no_other() {
        let dir = std::env::temp_dir().join(format!("mote-landlock-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("logs")).expect("directory");
        let open = |path| Directory::open(path, Links::Any).expect("directory");
        let (logs, other) = (open(&dir.join("logs")), open(&dir));
        let holds = process::succeeds_in_child(|| {
            let status = restrict_to(Some((&logs, logs_accesses())), NetworkAccess::NONE)
                .map_err(io::Error::other)?;
            logs.create_new("new")?;
            logs.rename("new", "old")?;
            logs.append("old")?;
            logs.remove("old")?;
            let is_shut = other.create_new("new").is_err();
            // Not every host has Landlock.
            if is_shut || status == RulesetStatus::NotEnforced {
                Ok(())
            } else {
                Err(io::ErrorKind::Other.into())
            }
        });
        std::fs::remove_dir_all(&dir).expect("removed");
        assert!(holds);
    }
}
