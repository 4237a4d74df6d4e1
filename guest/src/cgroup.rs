//! The box's cgroups (cgroup-v2): one for everything that runs in the box, with its process limit,
//! and one below it per exec'd command, so that a command can be killed with all it has started.
//!
//! The agent and its sessions stay outside, in the hierarchy's real root: the box's limits are not
//! theirs. What runs in the box sees its own cgroup as `/sys/fs/cgroup`, as in a container; the
//! contract's resource update writes there (contract §4.5).

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::sys::{self, files};

/// Where programs look for the hierarchy.
const MOUNT_POINT: &str = "/sys/fs/cgroup";
/// Mount flags of the hierarchy (contract §7.1).
const FLAGS: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_RELATIME;
/// Name of the box's cgroup in the real root.
const NAME: &str = "box";
/// Controllers whose files the box has. One that the kernel lacks is left out.
const CONTROLLERS: [&str; 5] = ["pids", "cpu", "memory", "cpuset", "io"];
/// How long after the entrypoint's start they are enabled, when nobody asks for them before: they
/// cost a third of the agent's part of the start.
pub const CONTROLLERS_DELAY: Duration = Duration::from_millis(50);

/// The box's cgroup.
#[derive(Debug)]
pub struct BoxCgroup {
    directory: File,
    procs: File,
    /// The controllers to enable; `None` once that is done.
    controllers: RefCell<Option<Controllers>>,
}

/// Controllers that are yet to be enabled.
#[derive(Debug)]
struct Controllers {
    /// As `cgroup.subtree_control` takes them.
    names: String,
    /// That file, in the real root.
    control: File,
}

impl BoxCgroup {
    /// Creates it, and mounts the hierarchy as the box shall see it.
    ///
    /// # Errors
    /// If the kernel lacks cgroup-v2 or a part of it that is needed, or refuses the limit.
    pub fn set_up(pids_limit: Option<u64>) -> Result<Self, String> {
        let failed = |what: &'static str| {
            move |e: io::Error| format!("set up the box's cgroup: {what}: {e}")
        };
        mount()?;
        let at = |path: &str| format!("{MOUNT_POINT}/{path}");
        let available = fs::read_to_string(at("cgroup.controllers"))
            .map_err(failed("read cgroup.controllers"))?;
        let mut names = String::new();
        for name in CONTROLLERS {
            if available.split_whitespace().any(|word| word == name) {
                names.push_str(if names.is_empty() { "+" } else { " +" });
                names.push_str(name);
            }
        }
        let mut control = open_for_writing(&at("cgroup.subtree_control"))
            .map_err(failed("open cgroup.subtree_control"))?;
        fs::create_dir(at(NAME)).map_err(failed("create it"))?;
        if let Some(limit) = pids_limit {
            control
                .write_all(b"+pids")
                .and_then(|()| fs::write(at(&format!("{NAME}/pids.max")), pids_max(limit)))
                .map_err(|e| format!("resource_limits.pids_limit: set it in the guest: {e}"))?;
        }
        let directory = File::open(at(NAME)).map_err(failed("open it"))?;
        let procs = sys::open_below(&directory, "cgroup.procs").map_err(failed("open it"))?;
        // A cgroup namespace's root is the cgroup that its creator is in: enter the box's, then leave.
        let outside = open_for_writing(&at("cgroup.procs")).map_err(failed("open cgroup.procs"))?;
        (&procs).write_all(b"0").map_err(failed("enter it"))?;
        sys::namespaces::new_cgroup_namespace().map_err(failed("create its namespace"))?;
        (&outside).write_all(b"0").map_err(failed("leave it"))?;
        sys::unmount(MOUNT_POINT).map_err(failed("mount its view"))?;
        mount()?;
        let controllers = RefCell::new(Some(Controllers { names, control }));
        Ok(BoxCgroup { directory, procs, controllers })
    }

    /// Whether [`BoxCgroup::enable_controllers`] has yet to be called.
    pub fn lacks_controllers(&self) -> bool {
        self.controllers.borrow().is_some()
    }

    /// Gives the box the files of all controllers. A failure goes to the console: the box runs
    /// without them.
    pub fn enable_controllers(&self) {
        if let Some(Controllers { names, mut control }) = self.controllers.take()
            && let Err(error) = control.write_all(names.as_bytes())
        {
            eprintln!("mote-agent: enable {names} for the box's cgroup: {error}");
        }
    }

    /// Where a process writes `0` to join.
    pub fn procs(&self) -> BorrowedFd<'_> {
        self.procs.as_fd()
    }

    /// The cgroup itself, to attach programs to.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Every descriptor of this, for a process that closes all others.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.directory.as_fd(), self.procs.as_fd()]
    }

    /// Kills everything in the box.
    ///
    /// # Errors
    /// If the kernel lacks `cgroup.kill`, or there are no descriptors left.
    pub fn kill(&self) -> io::Result<()> {
        sys::open_below(&self.directory, "cgroup.kill")?.write_all(b"1")
    }

    /// How many of the box's processes its kernel has killed for want of memory, so far as that is known.
    pub fn oom_kills(&self) -> u64 {
        let mut text = String::new();
        let events = files::read_below(&self.directory, "memory.events");
        let _ = events.and_then(|mut file| file.read_to_string(&mut text));
        let counts = text.lines().filter_map(|line| line.strip_prefix("oom_kill "));
        counts.filter_map(|count| count.parse().ok()).next().unwrap_or(0)
    }

    /// Creates the cgroup of the command that a session runs.
    ///
    /// # Errors
    /// If there is no room for another cgroup, or there are no descriptors left.
    pub fn create_command(&self, session: u64) -> io::Result<CommandCgroup> {
        let name = command_name(session);
        sys::create_directory_below(&self.directory, &name)?;
        let open = |file: &str| sys::open_below(&self.directory, &format!("{name}/{file}"));
        Ok(CommandCgroup { procs: open("cgroup.procs")?, kill: open("cgroup.kill")? })
    }

    /// Removes the cgroup of the command that a session ran; `false` while something of it still
    /// runs.
    pub fn remove_command(&self, session: u64) -> bool {
        match sys::remove_directory_below(&self.directory, &command_name(session)) {
            Err(error) => error.raw_os_error() != Some(libc::EBUSY),
            Ok(()) => true,
        }
    }

    /// Kills what the command of a session left behind.
    ///
    /// # Errors
    /// If it has no cgroup any more, or there are no descriptors left.
    pub fn kill_command(&self, session: u64) -> io::Result<()> {
        sys::open_below(&self.directory, &format!("{}/cgroup.kill", command_name(session)))?
            .write_all(b"1")
    }
}

fn command_name(session: u64) -> String {
    format!("exec-{session}")
}

/// The text of `pids.max`: a limit beyond the kernel's own (`PID_MAX_LIMIT`) is none.
fn pids_max(limit: u64) -> String {
    if limit > 4 << 20 { "max".into() } else { limit.to_string() }
}

fn open_for_writing(path: &str) -> io::Result<File> {
    fs::OpenOptions::new().write(true).open(path)
}

fn mount() -> Result<(), String> {
    sys::mount("cgroup2", MOUNT_POINT, "cgroup2", FLAGS, "")
        .map_err(|e| format!("mount cgroup2 on {MOUNT_POINT}: {e}"))
}

/// The cgroup of one exec'd command.
#[derive(Debug)]
pub struct CommandCgroup {
    procs: File,
    kill: File,
}

impl CommandCgroup {
    /// Where the command writes `0` to join.
    pub fn procs(&self) -> BorrowedFd<'_> {
        self.procs.as_fd()
    }

    /// Kills the command with everything it has started.
    pub fn kill(&self) {
        // The file is open and takes this; what is being killed already is no error.
        let _ = (&self.kill).write_all(b"1");
    }
}
