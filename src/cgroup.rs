//! The box's cgroup: limits that the host's kernel enforces on mote, its vCPUs and its back-ends
//! together. cgroup v2 only; the files are those of Documentation/admin-guide/cgroup-v2.rst.
//!
//! ```text
//! janitor    create                                                    remove
//! mote               set limits, join … the box's life … end
//! ```
//!
//! The process that has created the cgroup removes it, whatever happens to mote: it is the
//! [`crate::host::janitor`], which is not in the cgroup. mote itself never leaves the cgroup, and has no
//! descriptor with which it could.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sys;

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// The parent of all boxes' cgroups (contract §1.4).
const PARENT: &str = "a3s-box";
/// Longest name of a directory (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// How long to wait for the lock when a box starts.
const LOCK_LIMIT: Duration = Duration::from_secs(60);
/// How long to wait for the lock when a box has ended, and nobody waits for its janitor.
const LEAVE_LIMIT: Duration = Duration::from_secs(600);
/// How long a leftover may stay busy with processes that are being killed.
const LEFTOVER_LIMIT: Duration = Duration::from_secs(1);
/// How long to try to remove a cgroup; a process that is not dead by then is stuck in the kernel.
const REMOVAL_LIMIT: Duration = Duration::from_secs(5);
/// Time between two attempts on a busy cgroup.
const RETRY_STEP: Duration = Duration::from_millis(1);

/// The file of [`Limit::MemoryLow`].
const MEMORY_LOW: &str = "memory.low";

/// What to do when this user may not use cgroups.
const NO_PERMISSION: &str = "run mote as root with /sys/fs/cgroup writable, or have the administrator create /sys/fs/cgroup/a3s-box and delegate it";

/// A limit: one file of a cgroup, and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Share of CPU time under contention, 1 to 10000.
    CpuWeight(u64),
    /// CPU time per period, in microseconds; a quota of `None` is unlimited.
    CpuMax {
        /// Time that all threads together may run in a period.
        quota_us: Option<u64>,
        /// The period.
        period_us: u64,
    },
    /// Bytes of memory to protect from reclaim.
    MemoryLow(u64),
    /// Most bytes of swap; `None` is unlimited.
    MemorySwapMax(Option<u64>),
}

impl Limit {
    /// The weight for a number of cgroup v1 shares, by the contract's formula (§1.4).
    pub fn from_shares(shares: u64) -> Limit {
        Limit::CpuWeight(1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142)
    }

    /// Whether it limits nothing.
    pub fn is_none(&self) -> bool {
        matches!(
            self,
            Limit::CpuMax { quota_us: None, .. } | Limit::MemoryLow(0) | Limit::MemorySwapMax(None)
        )
    }

    fn file(self) -> &'static str {
        match self {
            Limit::CpuWeight(_) => "cpu.weight",
            Limit::CpuMax { .. } => "cpu.max",
            Limit::MemoryLow(_) => MEMORY_LOW,
            Limit::MemorySwapMax(_) => "memory.swap.max",
        }
    }

    fn controller(self) -> &'static str {
        match self {
            Limit::CpuWeight(_) | Limit::CpuMax { .. } => "cpu",
            Limit::MemoryLow(_) | Limit::MemorySwapMax(_) => "memory",
        }
    }

    fn value(self) -> String {
        let or_max = |limit: Option<u64>| limit.map_or("max".into(), |limit| limit.to_string());
        match self {
            Limit::CpuWeight(value) | Limit::MemoryLow(value) => value.to_string(),
            Limit::CpuMax { quota_us, period_us } => format!("{} {period_us}", or_max(quota_us)),
            Limit::MemorySwapMax(value) => or_max(value),
        }
    }

    /// The limit's fields in the spec.
    fn fields(self) -> &'static str {
        match self {
            Limit::CpuWeight(_) => "cpu_shares",
            Limit::CpuMax { .. } => "cpu_quota and cpu_period",
            Limit::MemoryLow(_) => "memory_reservation",
            Limit::MemorySwapMax(_) => "memory_swap",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}", self.file(), self.value())
    }
}

/// A box's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    root: PathBuf,
    name: String,
    limits: Vec<Limit>,
    dispensable: bool,
}

/// Moves this process into the cgroup with this directory, which somebody else has made.
///
/// # Errors
/// There is no such cgroup, or the host refuses to move this process.
pub fn join_directory(directory: &Path) -> Result<()> {
    let remedy = "--cgroup names a directory below /sys/fs/cgroup where this user may write";
    let processes = directory.join(PROCESSES);
    write(&processes, MYSELF, ErrorKind::PermissionDenied, remedy)
}

impl Cgroup {
    /// A cgroup for a box, which can do without if it is `dispensable`: the limits are enforced in the guest, too.
    ///
    /// # Errors
    /// The box's id cannot be the name of a cgroup's directory.
    pub fn new(box_id: &str, limits: Vec<Limit>, dispensable: bool) -> Result<Cgroup, String> {
        let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=MAX_NAME).contains(&box_id.len())
            || !box_id.bytes().all(safe)
            || [".", ".."].contains(&box_id)
        {
            return Err(format!(
                "is \"{box_id}\", but with limits on the host it is the name of a cgroup: must be 1 to {MAX_NAME} of a-z, A-Z, 0-9, \".\", \"_\" and \"-\", and not \".\" or \"..\""
            ));
        }
        Ok(Cgroup { root: ROOT.into(), name: box_id.into(), limits, dispensable })
    }

    /// Whether the box can do without.
    pub fn is_dispensable(&self) -> bool {
        self.dispensable
    }

    /// Creates the cgroup, still empty. Returns the [`Remains`] to remove at the end, and the [`Lock`] that
    /// keeps others from removing the empty cgroup as a leftover.
    ///
    /// # Errors
    /// The host has no cgroup v2 or lacks the controllers, this user may not use them, or the box is
    /// running already.
    pub fn create(&self) -> Result<(Remains, Lock)> {
        let controllers = self.limits.iter().map(|limit| limit.controller()).collect();
        offer(&self.root, &controllers)?;
        let parent = self.parent();
        if let Err(error) = fs::create_dir(&parent)
            && error.kind() != ErrorKind::AlreadyExists
        {
            let step = format!("create the cgroup {}", parent.display());
            return Err(explained(error, step, ErrorKind::PermissionDenied, NO_PERMISSION));
        }
        offer(&parent, &controllers)?;
        let dir = self.dir();
        let locked = create(&parent, &dir, LEFTOVER_LIMIT)?;
        let remains = Remains::of(&dir, self.reserves())
            .inspect_err(|_| drop(fs::remove_dir(&dir)))
            .with_context(|| format!("look at the cgroup {}", dir.display()))?;
        Ok((remains, locked))
    }

    fn parent(&self) -> PathBuf {
        self.root.join(PARENT)
    }

    fn dir(&self) -> PathBuf {
        self.parent().join(&self.name)
    }

    fn reserves(&self) -> bool {
        self.limits.iter().any(|limit| matches!(limit, Limit::MemoryLow(_)))
    }

    /// Sets the limits of the cgroup, which exists and is locked, and moves this process into it.
    ///
    /// # Errors
    /// The host refuses to move this process.
    pub fn join(&self, _locked: Lock) -> Result<()> {
        let dir = self.dir();
        for limit in &self.limits {
            let remedy = format!(
                "this kernel cannot do it, or swap accounting is off; leave resource_limits.{} null",
                limit.fields()
            );
            write(&dir.join(limit.file()), &limit.value(), ErrorKind::NotFound, &remedy)?;
        }
        if self.reserves() {
            // A greater value stays: an administrator may have set it.
            let parent = self.parent();
            let sum = reserved(&parent)?;
            if memory_low(&parent) < sum {
                protect(&parent, sum)?;
            }
        }
        write(
            &dir.join(PROCESSES),
            MYSELF,
            ErrorKind::PermissionDenied,
            "run mote as root, or in a cgroup that is delegated together with this one",
        )
    }
}

impl fmt::Display for Cgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dir().display())?;
        self.limits.iter().try_for_each(|limit| write!(f, ", {limit}"))?;
        if self.dispensable {
            write!(f, " (if this host lets mote)")?;
        }
        Ok(())
    }
}

/// The file that kills a cgroup's processes, since Linux 5.14. Only the file's owner can open it.
const KILL: &str = "cgroup.kill";
/// The file that lists a cgroup's processes, and moves in processes whose number is written to it.
const PROCESSES: &str = "cgroup.procs";
/// The writing process, all its threads included.
const MYSELF: &str = "0";

/// Makes controllers available in the children of a cgroup.
fn offer(dir: &Path, controllers: &BTreeSet<&str>) -> Result<()> {
    let read = |name| {
        let file = dir.join(name);
        fs::read_to_string(&file).map_err(|error| {
            let remedy = "limits on CPU time and memory need cgroup v2 there, not v1: boot the host with systemd.unified_cgroup_hierarchy=1, or leave resource_limits.cpu_* and memory_* null";
            explained(error, format!("read {}", file.display()), ErrorKind::NotFound, remedy)
        })
    };
    let available = read("cgroup.controllers")?;
    let offered = read("cgroup.subtree_control")?;
    let listed = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    for controller in controllers.iter().filter(|name| !listed(&offered, name)) {
        if !listed(&available, controller) {
            bail!(
                "{}/cgroup.controllers has no \"{controller}\": free it from cgroup v1 and from cgroup_disable= on the host's kernel command line, or leave resource_limits.{controller}_* null",
                dir.display()
            );
        }
        let remedy = "no process may be in that cgroup itself; move them to a child of it";
        let file = dir.join("cgroup.subtree_control");
        write(&file, &format!("+{controller}"), ErrorKind::ResourceBusy, remedy)?;
    }
    Ok(())
}

/// Creates a cgroup. An empty one of that name is a leftover of a run that was killed, and is replaced,
/// because it has that run's limits. Returns the parent's [`Lock`], which is not held while waiting, so
/// that other boxes can end meanwhile.
fn create(parent: &Path, dir: &Path, limit: Duration) -> Result<Lock> {
    let deadline = Instant::now() + limit;
    loop {
        let locked = Lock::of(parent, LOCK_LIMIT)?;
        let created = match fs::remove_dir(dir) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                drop(locked);
                thread::sleep(RETRY_STEP);
                continue;
            }
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => fs::create_dir(dir),
        };
        return created.map(|()| locked).map_err(|error| {
            let step = format!("create the cgroup {}", dir.display());
            explained(error, step, ErrorKind::ResourceBusy, "is this box running already?")
        });
    }
}

/// Bytes of memory that are protected in a cgroup.
fn memory_low(dir: &Path) -> u64 {
    match fs::read_to_string(dir.join(MEMORY_LOW)) {
        Ok(text) => text.trim().parse().unwrap_or(u64::MAX),
        Err(_) => 0,
    }
}

/// The sum of all boxes' reservations. The parent's `memory.low` is kept at this sum: the kernel protects
/// no more of a cgroup's memory than the parent's setting covers, which is 0 at first.
fn reserved(parent: &Path) -> Result<u64> {
    let children = fs::read_dir(parent)
        .with_context(|| format!("list the cgroups in {}", parent.display()))?;
    Ok(children.flatten().fold(0, |sum: u64, dir| sum.saturating_add(memory_low(&dir.path()))))
}

fn protect(parent: &Path, sum: u64) -> Result<()> {
    write(
        &parent.join(MEMORY_LOW),
        &sum.to_string(),
        ErrorKind::PermissionDenied,
        "run mote as root, or have the administrator set it to the sum of all boxes' reservations",
    )
}

/// Keeps other boxes' cgroups from being created and removed while it is held, in whichever process
/// (flock(2)).
#[derive(Debug)]
pub struct Lock(OwnedFd);

impl Lock {
    /// Opens the file to lock: `cgroup.kill`, which only a user who may use the cgroup can open. Anybody
    /// could open the directory, and keep it locked. The directory is used where there is no such file
    /// (before Linux 5.14), or where the file was not delegated with it; every mote decides alike.
    fn file(parent: &Path) -> io::Result<File> {
        let kill = parent.join(KILL);
        let owner = fs::metadata(parent)?.uid();
        if fs::metadata(&kill).is_ok_and(|file| file.uid() == owner) {
            OpenOptions::new().write(true).open(kill)
        } else {
            File::open(parent)
        }
    }

    /// Waits until no other process holds the lock, for as long as `limit` says.
    fn of(parent: &Path, limit: Duration) -> Result<Lock> {
        let file = Lock::file(parent);
        let file = file.with_context(|| format!("open the cgroup {}", parent.display()))?;
        let locked = sys::lock(&file, limit);
        if !locked.with_context(|| format!("lock the cgroup {}", parent.display()))? {
            bail!(
                "another box's mote holds the lock of the cgroup {} for {} s already: is one stopped in the middle of its start?",
                parent.display(),
                limit.as_secs()
            );
        }
        Ok(Lock(file.into()))
    }
}

impl From<OwnedFd> for Lock {
    /// A lock that another process has passed on.
    fn from(fd: OwnedFd) -> Lock {
        Lock(fd)
    }
}

impl From<Lock> for OwnedFd {
    /// The descriptor, to pass the lock on to another process.
    fn from(lock: Lock) -> OwnedFd {
        lock.0
    }
}

/// Writes to a file of a cgroup; see [`explained`].
fn write(file: &Path, text: &str, special: ErrorKind, remedy: &str) -> Result<()> {
    // Without O_CREAT: with it, a missing file would give a permission error.
    let opened = OpenOptions::new().write(true).open(file);
    opened.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|error| {
        explained(error, format!("write \"{text}\" to {}", file.display()), special, remedy)
    })
}

/// Adds to an error what was being done, and what the reader can change: `remedy` for the kind of error
/// `special`, and a general advice for missing permission.
fn explained(error: io::Error, step: String, special: ErrorKind, remedy: &str) -> anyhow::Error {
    let kind = error.kind();
    let error = anyhow::Error::new(error);
    if kind == special {
        error.context(format!("{step} ({remedy})"))
    } else if matches!(kind, ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) {
        error.context(format!("{step} ({NO_PERMISSION})"))
    } else {
        error.context(step)
    }
}

/// A cgroup to remove: only this one, not one that a later start of the box has put in its place.
#[derive(Debug)]
pub struct Remains {
    dir: PathBuf,
    inode: u64,
    /// Its `cgroup.kill`, if this Linux has that (5.14).
    kill: Option<File>,
    /// Whether it has a share in its parent's `memory.low`.
    reserves: bool,
}

impl Remains {
    fn of(dir: &Path, reserves: bool) -> io::Result<Remains> {
        let kill = OpenOptions::new().write(true).open(dir.join(KILL)).ok();
        Ok(Remains { dir: dir.into(), inode: fs::metadata(dir)?.ino(), kill, reserves })
    }

    /// Kills what is still in the cgroup, and removes it.
    pub fn remove(&mut self) {
        self.remove_within(REMOVAL_LIMIT);
    }

    fn remove_within(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let _ = self.kill.as_mut().map(|file| file.write_all(b"1"));
            if self.is_removed() || Instant::now() >= deadline {
                return;
            }
            thread::sleep(RETRY_STEP);
        }
    }

    /// Tries to remove the cgroup; `true` when it is gone.
    fn is_removed(&self) -> bool {
        let Some(parent) = self.dir.parent() else { return true };
        let Ok(_locked) = Lock::of(parent, LEAVE_LIMIT) else { return true };
        if !fs::metadata(&self.dir).is_ok_and(|found| found.ino() == self.inode) {
            return true;
        }
        let own = memory_low(&self.dir);
        if fs::remove_dir(&self.dir).is_err() {
            return false;
        }
        // Only what this box has added is taken back: any other value comes from an administrator.
        if self.reserves
            && let Ok(sum) = reserved(parent)
            && memory_low(parent) == sum.saturating_add(own)
        {
            let _ = protect(parent, sum);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a cgroup file system as far as plain files can.
    fn fake_root(name: &str, controllers: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("mote-cgroup-{name}-{}", std::process::id()));
        for dir in [root.clone(), root.join(PARENT)] {
            fs::create_dir_all(&dir).expect("directory");
            fs::write(dir.join("cgroup.controllers"), controllers).expect("file");
            fs::write(dir.join("cgroup.subtree_control"), "").expect("file");
        }
        root
    }

    fn cgroup(root: &Path, limits: &[Limit]) -> Cgroup {
        let cgroup = Cgroup::new("b", limits.to_vec(), false).expect("a name");
        Cgroup { root: root.into(), ..cgroup }
    }

    #[test]
    fn limits_have_the_contracts_text() {
        for (limit, text) in [
            (Limit::from_shares(0), "cpu.weight = 1"),
            (Limit::from_shares(2), "cpu.weight = 1"),
            (Limit::from_shares(1024), "cpu.weight = 39"),
            (Limit::from_shares(262_144), "cpu.weight = 10000"),
            (Limit::from_shares(u64::MAX), "cpu.weight = 10000"),
            (
                Limit::CpuMax { quota_us: Some(50_000), period_us: 100_000 },
                "cpu.max = 50000 100000",
            ),
            (Limit::CpuMax { quota_us: None, period_us: 1_000 }, "cpu.max = max 1000"),
            (Limit::MemoryLow(1), "memory.low = 1"),
            (Limit::MemorySwapMax(Some(0)), "memory.swap.max = 0"),
            (Limit::MemorySwapMax(None), "memory.swap.max = max"),
        ] {
            assert_eq!(limit.to_string(), text);
        }
    }

    #[test]
    fn only_one_safe_path_component_is_a_name() {
        for name in ["a", "Box_1.2-3", "...", &"x".repeat(255)] {
            assert!(Cgroup::new(name, Vec::new(), false).is_ok(), "{name}");
        }
        for name in ["", ".", "..", "a/b", "../x", "a b", "a\n", "ä", &"x".repeat(256)] {
            let error = Cgroup::new(name, Vec::new(), false).expect_err(name);
            assert!(error.contains("must be 1 to 255 of a-z"), "{error}");
        }
    }

    #[test]
    fn a_host_without_the_controllers_is_explained() {
        let limits = [Limit::CpuWeight(1), Limit::MemoryLow(1)];
        let root = fake_root("controllers", "cpuset cpu\n");
        let error = cgroup(&root, &limits).create().expect_err("no memory controller");
        assert!(error.to_string().contains("has no \"memory\": free it from"), "{error:#}");
        // The controller that exists was enabled before the error.
        let control = fs::read_to_string(root.join("cgroup.subtree_control")).expect("file");
        assert_eq!(control, "+cpu");

        fs::remove_file(root.join("cgroup.controllers")).expect("removed");
        let error = cgroup(&root, &limits).create().expect_err("not cgroup v2");
        assert!(error.to_string().contains("need cgroup v2 there, not v1"), "{error:#}");
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn a_limit_that_cannot_be_set_is_explained() {
        let root = fake_root("limit", "cpu memory\n");
        let dir = root.join(PARENT).join("b");
        fs::create_dir(&dir).expect("a leftover");
        // The files of a cgroup are the kernel's: a plain directory has none.
        let cgroup = cgroup(&root, &[Limit::MemorySwapMax(None)]);
        let (mut remains, locked) = cgroup.create().expect("created");
        let error = cgroup.join(locked).expect_err("no file");
        let expected = format!("write \"max\" to {}/memory.swap.max (this kernel", dir.display());
        assert!(error.to_string().starts_with(&expected), "{error:#}");
        remains.remove();
        assert!(!dir.exists());
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn a_populated_cgroup_is_not_replaced() {
        let root = fake_root("populated", "");
        assert!(create(&std::env::temp_dir(), &root, Duration::ZERO).is_err());
        assert!(root.join("cgroup.controllers").exists());
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn removal_kills_what_is_left_and_spares_a_successor() {
        let root = fake_root("removal", "");
        let kill = root.join("cgroup.kill");
        fs::write(&kill, "").expect("file");
        Remains::of(&root, false).expect("directory").remove_within(Duration::ZERO);
        assert_eq!(fs::read_to_string(&kill).expect("still there"), "1");

        let dir = root.join("b");
        fs::create_dir(&dir).expect("directory");
        let mut remains = Remains::of(&dir, false).expect("directory");
        // Before the first is gone, so that the second has another inode.
        fs::create_dir(root.join("c")).expect("directory");
        fs::rename(root.join("c"), &dir).expect("replaced");
        remains.remove();
        assert!(dir.exists());
        Remains::of(&dir, false).expect("directory").remove();
        assert!(!dir.exists());
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn reservations_add_up() {
        let root = fake_root("sum", "");
        for (dir, low) in [("b", "8192\n"), ("c", "4096\n")] {
            fs::create_dir_all(root.join(dir)).expect("directory");
            fs::write(root.join(dir).join(MEMORY_LOW), low).expect("file");
        }
        assert_eq!(reserved(&root).expect("a sum"), 12288);
        fs::write(root.join("c").join(MEMORY_LOW), "max\n").expect("file");
        assert_eq!(reserved(&root).expect("a sum"), u64::MAX);
        fs::remove_dir_all(root.join("b")).expect("removed");
        fs::write(root.join("c").join(MEMORY_LOW), "4096\n").expect("file");
        fs::remove_dir_all(root).expect("removed");
    }
}
