//! The containers of this host, as far as they must outlive the commands: a directory for each.
//!
//! ```text
//! ROOT/ID/lock            held by whoever changes the container (flock(2))
//!         state.json      who it is: its process, its cgroup, its sockets
//!         config.json     as it was at create, for the hooks
//!         spec.json       what mote runs
//!         ready, started  marks: create is complete, start was
//!         root            where its root file system is assembled, in a mount namespace of its own
//!         log, outcome    of its mote
//!         exec.sock, pty.sock
//! ```
//!
//! Whether a container runs is never stored: it is seen from its process, which is known by its number and the moment
//! of its start together, so that another process of the same number is not taken for it.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::cgroup::Cgroup;
use crate::sys;
use crate::sys::confine::Identity;
use crate::sys::{process, stat};

/// The version of the runtime specification that states are of.
pub const OCI_VERSION: &str = "1.0.2";

/// The longest id: a file's name.
const MAX_ID: usize = 255;
/// How long another command may hold a container's lock: a create takes as long as a box's start.
const LOCK_LIMIT: Duration = Duration::from_secs(60);
/// The host's short-lived files.
const RUN: &str = "/run";
/// Longest path of a Unix socket.
const MAX_SOCKET_PATH: usize = 107;

/// What is known of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// [`OCI_VERSION`].
    pub oci_version: String,
    /// Its name.
    pub id: String,
    /// The directory with its `config.json`.
    pub bundle: PathBuf,
    /// The directory of its root file system.
    pub rootfs: PathBuf,
    /// Its process; `None` before there is one.
    pub pid: Option<u32>,
    /// When that started, in clock ticks since the host's start.
    pub start_time: u64,
    /// When it was made.
    pub created: String,
    /// The engine's notes.
    pub annotations: BTreeMap<String, String>,
    /// Its cgroup's directory, if it has one of its own.
    pub cgroup: Option<PathBuf>,
    /// The unit of systemd's that the cgroup is.
    #[serde(default)]
    pub scope: Option<String>,
    /// Whether its create has made that: nobody else is in it.
    #[serde(default)]
    pub owns_cgroup: bool,
    /// The directory of its sockets, if that is not its own.
    pub sockets: Option<PathBuf>,
    /// Its RAM.
    pub memory_mib: u32,
    /// Whether it is a pod's sandbox, which is no box.
    #[serde(default)]
    pub is_sandbox: bool,
}

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is being made, or that was broken off.
    Creating,
    /// It waits for its start.
    Created,
    /// It runs.
    Running,
    /// Its time is stopped.
    Paused,
    /// It has ended.
    Stopped,
}

impl Status {
    /// The specification's word.
    pub fn word(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// The directory of all containers.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// A container's directory and what is known of it.
#[derive(Debug)]
pub struct Container {
    dir: PathBuf,
    /// What is known.
    pub state: State,
}

/// Keeps other commands from changing a container while it lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Refuses what cannot be the name of a directory and of a cgroup.
///
/// # Errors
/// The id is none.
pub fn check_id(id: &str) -> Result<()> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+._-".contains(&byte);
    let is_id = (1..=MAX_ID).contains(&id.len())
        && id.bytes().all(is_plain)
        && !id.starts_with('-')
        && ![".", ".."].contains(&id);
    ensure!(
        is_id,
        "the id {id:?} is invalid: it must be 1 to {MAX_ID} of a-z, A-Z, 0-9, \"+\", \".\", \"_\" and \"-\", not start with \"-\", and not be \".\" or \"..\""
    );
    Ok(())
}

impl Store {
    /// The containers below this directory.
    pub fn at(root: PathBuf) -> Store {
        Store { root }
    }

    fn dir(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// Makes the directory of a new container, and locks it.
    ///
    /// # Errors
    /// There is a container of this id, or the directory cannot be made.
    pub fn make(&self, id: &str) -> Result<(PathBuf, Lock)> {
        check_id(id)?;
        let root = self.root.display();
        let mut private = DirBuilder::new();
        private.mode(0o700);
        private.recursive(true).create(&self.root).with_context(|| {
            format!("create {root}, where containers' states are (--root or XDG_RUNTIME_DIR names another directory)")
        })?;
        let dir = self.dir(id);
        match private.recursive(false).create(&dir) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                bail!("container with id {id} already exists: delete it, or choose another id");
            }
            made => made.with_context(|| format!("create {}", dir.display()))?,
        }
        let locked = lock(&dir)?;
        // Absolute, since mote and the guest's mounts are elsewhere.
        let dir = dir.canonicalize().with_context(|| format!("look at {}", dir.display()))?;
        Ok((dir, locked))
    }

    /// A container.
    ///
    /// # Errors
    /// There is none of this id, or its state cannot be read.
    pub fn find(&self, id: &str) -> Result<Container> {
        check_id(id)?;
        match self.load(id)? {
            Some(container) => Ok(container),
            None => bail!("container does not exist: {id}"),
        }
    }

    /// A container that no other command changes meanwhile.
    ///
    /// # Errors
    /// As for [`Store::find`]; or another command holds its lock for too long.
    pub fn find_locked(&self, id: &str) -> Result<(Container, Lock)> {
        check_id(id)?;
        let dir = self.dir(id);
        if !dir.is_dir() {
            bail!("container does not exist: {id}");
        }
        let locked = lock(&dir)?;
        // Whoever had the lock may have removed it.
        Ok((self.find(id)?, locked))
    }

    /// A container's directory although nothing may be known of it: one whose create was killed at once.
    ///
    /// # Errors
    /// Another command holds its lock for too long.
    pub fn find_leftover(&self, id: &str) -> Result<Option<(Container, Option<Lock>)>> {
        check_id(id)?;
        let dir = self.dir(id);
        if !dir.is_dir() {
            return Ok(None);
        }
        let locked = match lock(&dir) {
            Ok(locked) => Some(locked),
            Err(_) if !dir.is_dir() => return Ok(None),
            Err(error) => return Err(error),
        };
        let known = self.load(id).ok().flatten();
        let unknown = || Container { dir: dir.clone(), state: State::default() };
        Ok(dir.is_dir().then(|| (known.unwrap_or_else(unknown), locked)))
    }

    fn load(&self, id: &str) -> Result<Option<Container>> {
        let dir = self.dir(id);
        let path = dir.join("state.json");
        match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            read => {
                let text = read.with_context(|| format!("read {}", path.display()))?;
                let state = serde_json::from_slice(&text);
                let state = state.with_context(|| {
                    format!("read {} (delete --force {id} removes the container)", path.display())
                })?;
                Ok(Some(Container { dir, state }))
            }
        }
    }

    /// All containers of which something is known, by id.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn all(&self) -> Result<Vec<Container>> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("list {}", self.root.display()))?,
        };
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        let valid = names.iter().filter(|name| check_id(name).is_ok());
        Ok(valid.filter_map(|name| self.load(name).ok().flatten()).collect())
    }
}

fn lock(dir: &Path) -> Result<Lock> {
    let path = dir.join("lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    if !sys::lock(&file, LOCK_LIMIT).with_context(|| format!("lock {}", path.display()))? {
        bail!(
            "another command works on the container since more than {} s: wait for it, or kill it",
            LOCK_LIMIT.as_secs()
        );
    }
    Ok(Lock { _file: file })
}

impl Container {
    /// A container that is being made in this directory.
    pub fn new(dir: PathBuf, state: State) -> Container {
        Container { dir, state }
    }

    /// A file in its directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Chooses a directory for sockets, for as long as their paths in its own would be too long.
    ///
    /// # Errors
    /// There is no random name to be had.
    pub fn choose_sockets(&mut self) -> Result<()> {
        if self.file("exec.sock").as_os_str().len() <= MAX_SOCKET_PATH {
            return Ok(());
        }
        let mut random = [0; 8];
        sys::fill_random(&mut random).context("choose a name for sockets")?;
        let name = format!("mote-oci-{:016x}", u64::from_ne_bytes(random));
        self.state.sockets = Some(runtime_directory().join(name));
        Ok(())
    }

    /// Makes the directory that [`Container::choose_sockets`] has chosen.
    ///
    /// # Errors
    /// Those of mkdir(2).
    pub fn make_sockets(&self) -> Result<()> {
        let Some(dir) = &self.state.sockets else { return Ok(()) };
        DirBuilder::new()
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("create {}", dir.display()))
    }

    /// One of its sockets.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.state.sockets.as_deref().unwrap_or(&self.dir).join(name)
    }

    /// Its cgroup, if it has one of its own.
    pub fn cgroup(&self) -> Option<Cgroup> {
        self.state.cgroup.clone().map(Cgroup::of)
    }

    /// Writes down what is known.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self) -> Result<()> {
        let text = serde_json::to_string(&self.state).context("write the state")?;
        self.write("state.json", &text)
    }

    /// Writes a file whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        write_whole(&self.file(name), text, 0o600)
    }

    /// Marks a step as done.
    ///
    /// # Errors
    /// The mark cannot be written.
    pub fn mark(&self, name: &str) -> Result<()> {
        self.write(name, "")
    }

    /// Its process, if that has not ended.
    pub fn process(&self) -> Option<OwnedFd> {
        let pid = self.state.pid?;
        let file = process::process_file(pid).ok()?;
        // In this order: the file stands for whoever has the number now.
        (stat::start_time(pid) == Some(self.state.start_time)).then_some(file)
    }

    /// What it is doing.
    pub fn status(&self) -> Status {
        if self.state.pid.is_some() && self.process().is_none() {
            return Status::Stopped;
        }
        if !self.file("ready").exists() {
            return Status::Creating;
        }
        if self.cgroup().is_some_and(|cgroup| cgroup.is_frozen()) {
            return Status::Paused;
        }
        if self.file("started").exists() { Status::Running } else { Status::Created }
    }

    /// The specification's state (runtime.md, "State").
    pub fn to_json(&self, status: Status) -> serde_json::Value {
        let State { oci_version, id, bundle, rootfs, pid, created, annotations, .. } = &self.state;
        let pid = pid.filter(|_| status != Status::Stopped).unwrap_or_default();
        json!({
            "ociVersion": oci_version, "id": id, "status": status.word(), "pid": pid, "bundle": bundle,
            "rootfs": rootfs, "created": created, "annotations": annotations, "owner": "",
        })
    }

    /// Removes its directories.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn remove(&self) -> Result<()> {
        for dir in self.state.sockets.iter().chain([&self.dir]) {
            match fs::remove_dir_all(dir) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", dir.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Writes a file, which is there whole or not at all.
///
/// # Errors
/// It cannot be written.
pub fn write_whole(path: &Path, text: &str, mode: u32) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let write = || -> io::Result<()> {
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(mode);
        options.open(&new)?.write_all(text.as_bytes())?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Where a user's short-lived files are: `/run`, if that is this user's, else `XDG_RUNTIME_DIR`, which the root of a user
/// namespace has from the host's user.
pub fn runtime_directory() -> PathBuf {
    let user = Identity::own().user();
    if fs::metadata(RUN).is_ok_and(|run| run.uid() == user) {
        return PathBuf::from(RUN);
    }
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        // As pam_systemd(8) has it; what others may write to would be no place for states.
        .unwrap_or_else(|| PathBuf::from(format!("{RUN}/user/{user}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(name: &str) -> Store {
        let root =
            std::env::temp_dir().join(format!("mote-oci-state-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        Store::at(root)
    }

    #[test]
    fn ids_are_one_safe_path_component() {
        for id in ["a", "Box_1.2-3+x", "...", &"x".repeat(255)] {
            check_id(id).expect(id);
        }
        for id in ["", ".", "..", "a/b", "../x", "a b", "a\n", "ä", "-x", &"x".repeat(256)] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn an_id_is_given_once_and_is_free_again() {
        let store = store("once");
        let (dir, locked) = store.make("x").expect("made");
        let error = store.make("x").expect_err("taken");
        assert!(error.to_string().contains("already exists"), "{error}");
        // Killed before it could write anything down.
        drop(locked);
        assert!(store.find("x").expect_err("unknown").to_string().contains("does not exist"));
        let (leftover, _) = store.find_leftover("x").expect("free").expect("there");
        leftover.remove().expect("removed");
        assert!(!dir.exists() && store.find_leftover("x").expect("free").is_none());
        store.make("x").expect("free again");
        fs::remove_dir_all(store.root).expect("removed");
    }

    #[test]
    fn what_a_container_does_is_seen_from_its_process() {
        let store = store("status");
        let (dir, _locked) = store.make("x").expect("made");
        let mut container = Container::new(dir, State::default());
        assert_eq!(container.status(), Status::Creating);
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("starts");
        container.state.pid = Some(child.id());
        container.state.start_time = stat::start_time(child.id()).expect("runs");
        assert_eq!(container.status(), Status::Creating);
        container.mark("ready").expect("marked");
        assert_eq!(container.status(), Status::Created);
        container.mark("started").expect("marked");
        container.save().expect("saved");
        let found = store.find("x").expect("there");
        assert_eq!((found.status(), &found.state), (Status::Running, &container.state));
        assert_eq!(found.to_json(Status::Running)["pid"], child.id());
        // Another process of this number.
        container.state.start_time -= 1;
        assert_eq!(container.status(), Status::Stopped);
        container.state.start_time += 1;
        // One that has ended, and that nobody has asked for yet.
        child.kill().expect("killed");
        let file = process::process_file(child.id()).expect("a zombie");
        sys::poll([sys::Interest::read(&file)], None).expect("waits");
        assert_eq!(container.status(), Status::Stopped);
        assert_eq!(container.to_json(Status::Stopped)["pid"], 0);
        child.wait().expect("reaped");
        assert_eq!(store.all().expect("listed").len(), 1);
        fs::remove_dir_all(store.root).expect("removed");
    }

    #[test]
    fn sockets_with_long_paths_are_elsewhere() {
        let long = PathBuf::from("/run").join("x".repeat(100));
        let mut container = Container::new(long, State::default());
        container.choose_sockets().expect("chosen");
        let socket = container.socket("exec.sock");
        assert!(socket.as_os_str().len() <= MAX_SOCKET_PATH, "{}", socket.display());
        let mut container = Container::new("/run/x".into(), State::default());
        container.choose_sockets().expect("chosen");
        assert_eq!(container.socket("exec.sock"), Path::new("/run/x/exec.sock"));
    }
}
