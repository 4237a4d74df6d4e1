//! A container's process: a copy of this one that waits until it is written down, takes its place on the host, and
//! becomes mote.

use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::config::{Config, Network};
use super::console;
use super::mounts::Mount;
use super::passt;
use super::pause;
use super::root::{self, Wanted};
use super::spec::{self, Inside};
use super::state::Container;
use crate::sys::confine;
use crate::sys::container;

/// What a container's process needs to know.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// The container.
    pub container: &'a Container,
    /// What it is to be.
    pub config: &'a Config,
    /// Who gets its terminal.
    pub console_socket: Option<&'a Path>,
    /// Whether it stays on the caller's terminal, in the caller's session.
    pub in_foreground: bool,
}

/// A process that waits.
#[derive(Debug)]
pub struct Waiting {
    /// Its number.
    pub pid: u32,
    go: PipeWriter,
    fault: PipeReader,
}

/// Starts the process, which does nothing yet. It ends if this one does before [`Waiting::go`].
///
/// # Errors
/// The host has no room for another process.
pub fn start(launch: Launch<'_>) -> Result<Waiting> {
    let (gone, go) = pipe().context("make a pipe")?;
    let (fault, faults) = pipe().context("make a pipe")?;
    let mut ours = Some((go, fault));
    let pid = container::fork(|| {
        // Otherwise the copy would hold the line to itself open.
        drop(ours.take());
        run(launch, gone, faults)
    });
    let pid = pid.context("start the container's process")?;
    match ours {
        Some((go, fault)) => Ok(Waiting { pid, go, fault }),
        None => bail!("start the container's process"),
    }
}

impl Waiting {
    /// Has the process go on, and waits until it is mote.
    ///
    /// # Errors
    /// It could not become that; it has ended.
    pub fn go(mut self) -> Result<()> {
        let told = self.go.write_all(b"!");
        drop(self.go);
        let mut fault = String::new();
        self.fault.read_to_string(&mut fault).context("wait for the container's process")?;
        ensure!(fault.is_empty(), "{fault}");
        told.context("tell the container's process to go on")
    }
}

/// The process itself. Returns its exit code if it cannot become mote.
fn run(launch: Launch<'_>, mut gone: PipeReader, mut faults: PipeWriter) -> u8 {
    // Nothing comes if whoever writes this process down is gone.
    if gone.read_exact(&mut [0]).is_err() {
        return 1;
    }
    drop(gone);
    let Err(error) = become_mote(launch);
    // Nobody reads it if create was killed meanwhile.
    let _ = write!(faults, "{error:#}");
    1
}

/// Nothing: what a process that goes on as another program returns.
enum Never {}

/// What to do about namespaces that cannot be made.
const NEEDS_ROOT: &str = "it takes root, the host's or that of a user namespace: run this by podman, which makes one for a user, or below \"podman unshare\"";

fn become_mote(launch: Launch<'_>) -> Result<Never> {
    let Launch { container, config, console_socket, in_foreground } = launch;
    container::unblock_signals().context("let signals through")?;
    if !in_foreground {
        container::new_session().context("start a session")?;
    }
    if let Some(socket) = console_socket {
        console::adopt(&console::open(socket, config.process.size)?)?;
    }
    join_network(&config.network)?;
    if let Some(score) = config.process.oom_score_adj {
        set_oom_score(score)?;
    }
    if config.is_sandbox {
        return become_pause(container, config);
    }
    confine::unshare(libc::CLONE_NEWNS)
        .with_context(|| format!("make a mount namespace ({NEEDS_ROOT})"))?;
    confine::detach_mounts().context("keep mounts apart from the host's")?;
    assemble(container, config)?;
    let network = config.passt.as_ref().map(|ports| {
        passt::start(ports, container.cgroup().as_ref(), resolv_conf(config, container).as_deref())
    });
    let inside = Inside { network: network.transpose()?, sysctls: sysctls_of(&config.network) };
    container.write("spec.json", &spec::write(config, container, inside))?;
    let mut mote = Command::new(own_file());
    mote.arg0("mote").current_dir("/");
    for (option, file) in
        [("--config-file", "spec.json"), ("--log", "log"), ("--outcome", "outcome")]
    {
        mote.arg(option).arg(container.file(file));
    }
    if let Some(cgroup) = container.cgroup() {
        // By mote itself: not its janitor, nor who makes a template, and not before it has /dev/kvm, which a pod's cgroup
        // may deny it.
        mote.arg("--cgroup").arg(cgroup.dir());
    }
    Err(mote.exec()).context("execute mote's own file")
}

/// Settings of a network namespace that are about the sockets in it, and what Linux has them be.
const SOCKET_SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "1024"), ("net.core.somaxconn", "4096")];

/// Those of a namespace that somebody else has set up, a pod's sandbox say, and whose sockets are the box's.
fn sysctls_of(network: &Network) -> Vec<(String, String)> {
    let changed = |(name, usual): (&str, &str)| {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        let value = fs::read_to_string(path).ok()?.trim().to_owned();
        (value != usual).then(|| (name.to_owned(), value))
    };
    match network {
        Network::Joined(_) => SOCKET_SYSCTLS.into_iter().filter_map(changed).collect(),
        Network::Hosts | Network::New => Vec::new(),
    }
}

/// The file that an engine has for the container's `/etc/resolv.conf`.
fn resolv_conf(config: &Config, container: &Container) -> Option<PathBuf> {
    config.mounts.mounts.iter().find_map(|mount| match mount {
        Mount::Bind(bind) if bind.destination == Path::new("/etc/resolv.conf") => {
            Some(container.state.bundle.join(&bind.source))
        }
        _ => None,
    })
}

/// What a pod's sandbox is: see [`super::pause`].
fn become_pause(container: &Container, config: &Config) -> Result<Never> {
    // Those of the network are the namespace's; others are of a kernel that no box of the pod has.
    for (name, value) in config.sysctls.iter().filter(|(name, _)| name.starts_with("net.")) {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        fs::write(&path, value)
            .with_context(|| format!("linux.sysctl.{name}: write {value} to {}", path.display()))?;
    }
    if let Some(cgroup) = container.cgroup() {
        cgroup.join()?;
    }
    let error = Command::new(own_file()).arg0(pause::NAME).current_dir("/").env_clear().exec();
    Err(error).context("execute mote's own file")
}

/// This program's file: by its path, which gives the process its name, if that still leads to it.
fn own_file() -> PathBuf {
    let own = PathBuf::from("/proc/self/exe");
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    match fs::read_link(&own) {
        Ok(path) if identity(&path).is_some() && identity(&path) == identity(&own) => path,
        _ => own,
    }
}

fn join_network(network: &Network) -> Result<()> {
    match network {
        Network::Hosts => Ok(()),
        Network::New => {
            confine::unshare(libc::CLONE_NEWNET)
                .with_context(|| format!("make a network namespace ({NEEDS_ROOT})"))?;
            container::raise_loopback().context("bring up loopback")
        }
        Network::Joined(path) => {
            let path_text = path.display();
            let namespace = File::open(path)
                .with_context(|| format!("open the network namespace {path_text}"))?;
            if is_own_network(&namespace) {
                // That of a user who may not enter it: the host's.
                return Ok(());
            }
            container::join_network(&namespace)
                .with_context(|| format!("join the network namespace {path_text}"))
        }
    }
}

fn is_own_network(namespace: &File) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let own = fs::metadata("/proc/self/ns/net").map(identity).ok();
    own.is_some() && namespace.metadata().map(identity).ok() == own
}

fn assemble(container: &Container, config: &Config) -> Result<()> {
    let target = container.file("root");
    // What the guest mounts must have a place, also below a read-only root; and an engine may name a directory to
    // start in that no image has.
    let mut directories: Vec<PathBuf> = ["/proc", "/sys", "/dev"].map(PathBuf::from).into();
    directories.extend(config.mounts.mounts.iter().filter_map(|mount| match mount {
        Mount::Tmpfs(tmpfs) if !tmpfs.on_host => Some(tmpfs.destination.clone()),
        _ => None,
    }));
    directories.push(PathBuf::from(&config.process.cwd));
    directories.retain(|path| !path.parent().is_some_and(is_guests));
    root::assemble(&Wanted {
        source: &container.state.rootfs,
        target: &target,
        bundle: &container.state.bundle,
        mounts: &config.mounts.mounts,
        directories,
        read_only: config.read_only_root,
    })
}

/// Whether a path is in one of the guest's own file systems.
fn is_guests(path: &Path) -> bool {
    ["/proc", "/sys", "/dev"].iter().any(|guests| path.starts_with(guests))
}

fn set_oom_score(score: i32) -> Result<()> {
    let path = "/proc/self/oom_score_adj";
    if fs::read_to_string(path).is_ok_and(|now| now.trim().parse() == Ok(score)) {
        return Ok(());
    }
    fs::write(path, score.to_string()).with_context(|| {
        format!("write {score} to {path} (less than before needs CAP_SYS_RESOURCE)")
    })
}
