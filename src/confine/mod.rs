//! Confinement: what is taken from mote before it runs a guest, in which order, and why in that order.
//!
//! ```text
//!  1  everything is open: KVM, memory, sockets, files, back-ends, passt    (needs the host)
//!  2  inherited descriptors closed, standard input empty, resource limits
//!  3  namespaces of its own; the root an empty directory                   (needs one thread)
//!  4  Landlock: no file, no TCP port to bind, whatever the root is         (before there are threads)
//!  5  no new privileges, no capabilities, memory out of others' reach
//!  6  every thread: the filter of its kind ([`crate::confine::seccomp`])            (last: refuses all of the above)
//!  7  the first KVM_RUN
//! ```
//!
//! Namespaces need either a capability or a host that lets everybody make user namespaces. Where there
//! is neither, Landlock has to do; the system call filters, under which nothing can be opened, hold
//! everywhere. There is no private pid namespace: the process that the runtime has started is the VM
//! (contract §2.6), and a process cannot leave its own. In its place the filters know no call that
//! names a pid.

pub mod seccomp;
pub mod sudden_end;

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};
use std::{fmt, thread};

use anyhow::{Context, Result};
use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};

use crate::log;
use crate::sys::confine::{self, Namespaces, Resource};
pub use seccomp::{NetworkAccess, ThreadKind};

/// What this host lets mote use to keep itself from the host's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// Namespaces, by capability.
    Namespaces,
    /// Namespaces, below a user namespace.
    UserNamespaces,
    /// Landlock alone.
    Landlock,
    /// Neither: nothing but system call filters.
    FiltersOnly,
    /// Nothing at all, at the user's wish.
    Off,
}

impl Isolation {
    /// Finds out by trying, in a child process, what a box enters.
    pub fn of_host(network: NetworkAccess) -> Isolation {
        let permitted = |isolation: Isolation| {
            confine::succeeds_in_child(|| isolation.enter_namespaces(network))
        };
        if confine::is_administrator() && permitted(Isolation::Namespaces) {
            Isolation::Namespaces
        } else if permitted(Isolation::UserNamespaces) {
            Isolation::UserNamespaces
        } else if confine::succeeds_in_child(|| {
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

    /// What has to be left together with the mount namespace, where that can be.
    pub fn user_namespace(self) -> Option<Namespaces> {
        match self {
            Isolation::Namespaces => Some(0),
            Isolation::UserNamespaces => Some(libc::CLONE_NEWUSER),
            Isolation::Landlock | Isolation::FiltersOnly | Isolation::Off => None,
        }
    }

    fn enter_namespaces(self, network: NetworkAccess) -> io::Result<()> {
        let Some(user) = self.user_namespace() else { return Ok(()) };
        // What mote has opened stays in the host's network: published ports, passt.
        let network = match network {
            NetworkAccess::Sockets => 0,
            NetworkAccess::None => libc::CLONE_NEWNET,
        };
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

/// How long a thread that has been joined may still count as one, which refuses a user namespace.
const THREAD_END_LIMIT: Duration = Duration::from_millis(500);

/// Address space that mote may come to need once it runs a guest: for threads' stacks, and for what is on
/// the way on its connections (`virtio::vsock::mux` says how much that can be). What a guest that has broken
/// into it can take from the host beside the box's memory.
const ADDRESS_SPACE_ROOM: u64 = 1 << 30;

/// How a box is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sandbox {
    /// What keeps it from the host's files.
    pub isolation: Isolation,
    /// What it uses of the host's network.
    pub network: NetworkAccess,
    /// Most descriptors that the box may ever need.
    pub open_files: u64,
}

impl Sandbox {
    /// Steps 2 to 5, for a process with one thread that has opened all it needs. `inherited` are the
    /// descriptors that it was started with, of which nothing is left.
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
        confine::drop_capabilities().context("drop all capabilities")?;
        confine::hide_memory().context("keep mote's memory from others")
    }

    fn enter_namespaces(&self) -> io::Result<()> {
        let deadline = Instant::now() + THREAD_END_LIMIT;
        loop {
            match self.isolation.enter_namespaces(self.network) {
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

    fn confine(&self, name: &str, kind: ThreadKind) -> Result<()> {
        match self.isolation {
            Isolation::Off => Ok(()),
            _ => seccomp::confine_thread(name, kind),
        }
    }

    /// Starts a thread that takes step 6, says in `ready` how that went, and does its work. It is never
    /// joined: the process's exit stops it wherever it is, which no other way can promise.
    ///
    /// # Errors
    /// The host refuses a thread. Its filter is reported in `ready`.
    pub fn spawn(
        self,
        name: String,
        kind: ThreadKind,
        ready: Sender<Result<()>>,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        let started = thread::Builder::new().name(name.clone());
        started
            .spawn(move || {
                let confined = self.confine(&thread_name(), kind);
                let goes_on = confined.is_ok();
                // Whoever does not listen has given the VM up.
                if ready.send(confined).is_ok() && goes_on {
                    drop(ready);
                    work();
                }
            })
            .with_context(|| format!("start thread {name}"))?;
        Ok(())
    }
}

fn thread_name() -> String {
    thread::current().name().unwrap_or("?").to_owned()
}

/// Takes from this process, and threads it starts, what Landlock can take on this host: all files by
/// name, TCP ports to bind, other processes' abstract sockets and, in a box with a network of its own,
/// all TCP connections. What is open stays.
fn restrict_by_landlock(network: NetworkAccess) -> Result<RulesetStatus> {
    // The newest that mote knows; older kernels enforce what they can.
    let abi = ABI::V6;
    let ports = AccessNet::from_all(abi);
    let ports = match network {
        NetworkAccess::Sockets => ports & !AccessNet::ConnectTcp,
        NetworkAccess::None => ports,
    };
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(ports)?
        // Not signals: virtiofsd, which is to be ended, is outside.
        .scope(Scope::AbstractUnixSocket)?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset)
}
