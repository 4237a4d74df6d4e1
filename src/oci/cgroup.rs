//! A container's cgroup: where an engine wants it, with the container's limits, and mote in it with all its helpers.
//! cgroup v2 only (Documentation/admin-guide/cgroup-v2.rst).

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::systemd::Scope;
use crate::spec::json::Node;
use crate::sys::{mounts, process, stat};

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// How long a container's last processes may take to end by themselves: its janitor removes its sockets.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// How long to try to remove a cgroup whose processes have been killed.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);
/// How long the kernel may take to stop or continue every process.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// Time between two attempts.
const STEP: Duration = Duration::from_millis(2);
/// Controllers that every container's cgroup has, for the engine's statistics, where there are any.
const USUAL: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Where an engine wants a container's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// At this path from the root of cgroups on, to be made.
    Path(PathBuf),
    /// Wherever systemd makes it.
    Scope(Scope),
}

/// Reads `linux.cgroupsPath`: a path from the root of cgroups on, or `SLICE:PREFIX:NAME`.
pub fn read_placement(node: &Node<'_>) -> Option<Option<Placement>> {
    let text = node.string()?;
    match Scope::parse(&text) {
        Some(Ok(scope)) => return Some(Some(Placement::Scope(scope))),
        Some(Err(problem)) => {
            node.error(format!("is \"{text}\", {problem}"));
            return None;
        }
        None => {}
    }
    let mut path = PathBuf::new();
    for component in Path::new(&text).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                node.error(format!("is \"{text}\", must not contain \"..\""));
                return None;
            }
        }
    }
    Some((!path.as_os_str().is_empty()).then_some(Placement::Path(path)))
}

/// A container's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// The one at this path from the root of cgroups on.
    pub fn at(path: &Path) -> Cgroup {
        Cgroup { dir: Path::new(ROOT).join(path) }
    }

    /// The one whose directory this is.
    pub fn of(dir: PathBuf) -> Cgroup {
        Cgroup { dir }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes it, calls `made`, and writes these files. One that is empty is a leftover, and is replaced.
    ///
    /// # Errors
    /// The host has no cgroup v2 or lacks a controller, somebody else uses the cgroup, or this user may not make it.
    pub fn create(
        &self,
        files: &[(String, String)],
        made: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        ensure!(
            mounts::is_cgroup2(Path::new(ROOT)),
            "{ROOT} is not cgroup v2, and mote-oci knows no other: boot the host with systemd.unified_cgroup_hierarchy=1, or run without cgroups (podman run --cgroups=disabled)"
        );
        self.create_below(Path::new(ROOT), files, made)
    }

    fn create_below(
        &self,
        root: &Path,
        files: &[(String, String)],
        made: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let dir = self.dir.display();
        let parent = self.dir.parent().unwrap_or(root);
        fs::create_dir_all(parent).with_context(|| {
            format!("create the cgroup {} (is this root, or is it delegated?)", parent.display())
        })?;
        self.have_controllers(root, files, &USUAL)?;
        match fs::remove_dir(&self.dir) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                bail!(
                    "the cgroup {dir} is in use: remove the container that has it, or choose another"
                );
            }
            _ => fs::create_dir(&self.dir).with_context(|| format!("create the cgroup {dir}"))?,
        }
        made()?;
        self.write_all(files)
    }

    /// Writes these files of a cgroup that somebody else has made.
    ///
    /// # Errors
    /// The host lacks a controller, or refuses a value.
    pub fn limit(&self, files: &[(String, String)]) -> Result<()> {
        self.have_controllers(Path::new(ROOT), files, &[])?;
        self.write_all(files)
    }

    /// Makes controllers available in it, by what is above it: those that these files are of, and `usual` ones as far as
    /// they can be had.
    fn have_controllers(
        &self,
        root: &Path,
        files: &[(String, String)],
        usual: &[&str],
    ) -> Result<()> {
        let needed: BTreeSet<&str> =
            files.iter().filter_map(|(name, _)| Some(name.split_once('.')?.0)).collect();
        let below = self.dir.parent().and_then(|parent| parent.strip_prefix(root).ok());
        let mut on_the_way = root.to_owned();
        offer(&on_the_way, &needed, usual)?;
        for name in below.unwrap_or(Path::new("")) {
            on_the_way.push(name);
            offer(&on_the_way, &needed, usual)?;
        }
        Ok(())
    }

    /// Removes it if nobody is in it.
    pub fn remove_if_empty(&self) {
        let _ = fs::remove_dir(&self.dir);
    }

    /// Writes files of it.
    ///
    /// # Errors
    /// The kernel has no such file, or refuses the value.
    pub fn write_all(&self, files: &[(String, String)]) -> Result<()> {
        for (name, value) in files {
            match self.write(name, value) {
                // Without accounting of swap, nothing of it can be limited; runc and crun go on as well.
                Err(error) if name == "memory.swap.max" && error.kind() == ErrorKind::NotFound => {}
                written => written.with_context(|| {
                    format!(
                        "write \"{value}\" to {} (does this kernel have that limit?)",
                        self.dir.join(name).display()
                    )
                })?,
            }
        }
        Ok(())
    }

    fn write(&self, name: &str, value: &str) -> io::Result<()> {
        // Without O_CREAT: with it, a missing file would give a permission error.
        let mut file = OpenOptions::new().write(true).open(self.dir.join(name))?;
        file.write_all(value.as_bytes())
    }

    fn read(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.dir.join(name))
    }

    /// A number in a file of it; `None` for `max`, and without the file.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.read(name).ok()?.trim().parse().ok()
    }

    /// Moves this process into it.
    ///
    /// # Errors
    /// Those of writing to `cgroup.procs`.
    pub fn join(&self) -> Result<()> {
        let joined = self.write("cgroup.procs", "0");
        joined.with_context(|| format!("join the cgroup {}", self.dir.display()))
    }

    /// The processes in it, without the kernel's own threads.
    ///
    /// # Errors
    /// It is gone.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let mut all = self.members()?;
        all.retain(|pid| !stat::is_kernel_thread(*pid));
        Ok(all)
    }

    fn members(&self) -> Result<Vec<u32>> {
        let list = self.read("cgroup.procs");
        let list = list.with_context(|| format!("list the cgroup {}", self.dir.display()))?;
        Ok(list.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Puts the kernel's own threads out of it, into the root of cgroups. KVM has one for each VM, in the cgroup of
    /// whoever makes the VM (virt/kvm/kvm_main.c, `kvm_vm_worker_thread`, before Linux 6.14), and cannot freeze it: with
    /// it a cgroup never becomes frozen as a whole (kernel/cgroup/freezer.c).
    fn put_kernel_threads_out(&self) -> Result<()> {
        for pid in self.members()?.into_iter().filter(|pid| stat::is_kernel_thread(*pid)) {
            let root = Cgroup::of(ROOT.into());
            // One that has ended is out, and who may not move it finds that freezing takes too long.
            let _ = root.write("cgroup.procs", &pid.to_string());
        }
        Ok(())
    }

    /// Whether its processes are stopped, or being stopped.
    pub fn is_frozen(&self) -> bool {
        self.number("cgroup.freeze") == Some(1)
    }

    /// Stops all its processes, or lets them go on, and waits until that is so.
    ///
    /// # Errors
    /// The kernel refuses, or takes too long.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let (value, doing) = if frozen { ("1", "stop") } else { ("0", "continue") };
        let dir = self.dir.display();
        self.put_kernel_threads_out()?;
        self.write("cgroup.freeze", value)
            .with_context(|| format!("{doing} the processes of the cgroup {dir}"))?;
        let deadline = Instant::now() + FREEZE_LIMIT;
        while !self.has_event("frozen", value) {
            if Instant::now() >= deadline {
                // Not half of them.
                let _ = self.write("cgroup.freeze", "0");
                bail!(
                    "the kernel did not {doing} the processes of the cgroup {dir} within {FREEZE_LIMIT:?}"
                );
            }
            thread::sleep(STEP);
        }
        Ok(())
    }

    fn has_event(&self, name: &str, value: &str) -> bool {
        let Ok(events) = self.read("cgroup.events") else { return false };
        events.lines().any(|line| line.split_once(' ') == Some((name, value)))
    }

    /// Removes it once its processes have ended, which are killed if they do not soon. One that is gone is no error.
    ///
    /// # Errors
    /// A process in it cannot be killed.
    pub fn remove(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            match fs::remove_dir(&self.dir) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error)
                    if error.kind() != ErrorKind::ResourceBusy
                        || start.elapsed() >= REMOVAL_LIMIT =>
                {
                    return Err(error)
                        .with_context(|| format!("remove the cgroup {}", self.dir.display()));
                }
                Err(_) => {}
            }
            if start.elapsed() >= DRAIN_LIMIT {
                self.kill();
            }
            thread::sleep(STEP);
        }
    }

    /// Kills what is in it; before Linux 5.14, which has no `cgroup.kill`, one by one.
    fn kill(&self) {
        if self.write("cgroup.kill", "1").is_err() {
            for pid in self.processes().unwrap_or_default() {
                if let Ok(process) = process::process_file(pid) {
                    process::kill_process(&process);
                }
            }
        }
    }
}

/// Makes controllers available in the children of a cgroup: those that are needed, and the usual ones as far as they
/// can be had.
fn offer(dir: &Path, needed: &BTreeSet<&str>, usual: &[&str]) -> Result<()> {
    let read = |name| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let (available, offered) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    let listed = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    let usual = usual.iter().copied();
    let usual = usual.filter(|name| !needed.contains(name) && listed(&available, name));
    let wanted = needed.iter().copied().filter(|name| *name != "cgroup").map(|name| (name, true));
    for (controller, is_needed) in wanted.chain(usual.map(|name| (name, false))) {
        if listed(&offered, controller) {
            continue;
        }
        if !listed(&available, controller) {
            bail!(
                "{}/cgroup.controllers has no \"{controller}\", which a limit of the container needs: enable it on the host, or leave the limit out",
                dir.display()
            );
        }
        let file = dir.join("cgroup.subtree_control");
        let written = OpenOptions::new()
            .write(true)
            .open(&file)
            .and_then(|mut file| file.write_all(format!("+{controller}").as_bytes()));
        if is_needed {
            written.with_context(|| {
                format!(
                    "write \"+{controller}\" to {} (no process may be in that cgroup itself)",
                    file.display()
                )
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::spec::json::{Json, Object, Report};

    fn read(text: &str) -> Result<Option<Placement>, String> {
        let json = Json::parse(&format!("{{\"p\":\"{text}\"}}")).expect("JSON");
        let report = RefCell::new(Report::default());
        let mut o = Object::root(&json, &report).expect("an object");
        let place = o.nullable("p", read_placement);
        match report.into_inner().errors.pop() {
            None => Ok(place.flatten()),
            Some(fault) => Err(fault.problem),
        }
    }

    #[test]
    fn places_are_paths_below_the_root_or_scopes() {
        let path = |path: &str| Ok(Some(Placement::Path(path.into())));
        assert_eq!(read("/libpod_parent/libpod-x"), path("libpod_parent/libpod-x"));
        assert_eq!(read("a/b"), path("a/b"));
        assert_eq!((read(""), read("/")), (Ok(None), Ok(None)));
        assert!(read("/a/../../b").expect_err("leads out").contains("\"..\""));
        assert!(matches!(read("machine.slice:libpod:x"), Ok(Some(Placement::Scope(_)))));
        let error = read("machine:libpod:x").expect_err("no slice");
        assert!(
            error.starts_with("is \"machine:libpod:x\", whose \"machine\" is no slice"),
            "{error}"
        );
    }

    /// A directory that looks like a cgroup file system as far as plain files can.
    fn fake_root(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("mote-oci-{name}-{}", std::process::id()));
        fs::create_dir_all(&root).expect("directory");
        fs::write(root.join("cgroup.controllers"), "cpu pids").expect("file");
        fs::write(root.join("cgroup.subtree_control"), "cpu").expect("file");
        root
    }

    #[test]
    fn a_controller_that_is_missing_is_named() {
        let root = fake_root("missing");
        let cgroup = Cgroup::of(root.join("b"));
        let files = [("memory.max".to_owned(), "1".to_owned())];
        let error = cgroup.create_below(&root, &files, || Ok(())).expect_err("no memory");
        assert!(error.to_string().contains("has no \"memory\""), "{error:#}");
        assert!(!cgroup.dir.exists());
        cgroup.create_below(&root, &[], || Ok(())).expect("created");
        assert_eq!(fs::read_to_string(root.join("cgroup.subtree_control")).expect("file"), "+pids");
        cgroup.remove().expect("removed");
        cgroup.remove().expect("gone is no error");
        fs::remove_dir_all(root).expect("removed");
    }
}
