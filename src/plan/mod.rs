//! [`Spec`] to [`Plan`]: the one place where what was asked for is judged. Everything wrong is
//! reported at once with its path in the spec; after this stage a failure means that the host
//! refused something, not that the user mistyped.
//!
//! Planning changes nothing on the host, so `mote check` is this stage and a printout.

pub mod guest_init;
pub mod image;
pub mod network;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use mote_agent::instance::{Entrypoint, Instance, Mount, ROOT_TAG, Rlimit, Security};
use mote_agent::protocol::{EXEC_SERVER_PORT, PTY_SERVER_PORT};

use crate::cgroup::{Cgroup, Limit};
use crate::confine::{Isolation, Sandbox};
use crate::cpuset::CpuSet;
use crate::layout;
use crate::policy::Policy;
use crate::spec::json::Report;
use crate::spec::{self, Spec};
use crate::virtio::vsock::mux::MAX_CONNECTIONS;
use guest_init::{GuestInit, Main};
use network::{Network, PasstSocket};

/// Longest Unix socket path (`sun_path` less its terminator, unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;
/// Longest virtio-fs tag (virtio 1.2, 5.11.4: a 36-byte field, no terminator when full).
pub const MAX_TAG: usize = 36;
/// Smallest guest in which kernel, agent and a small program fit.
const MIN_MEMORY_MIB: u32 = 64;
/// Longest host name (`HOST_NAME_MAX`, gethostname(2)).
const MAX_HOSTNAME: usize = 64;

/// Guest vsock ports of the box services (contract §3).
const EXEC_PORT: u32 = 4089;
const PTY_PORT: u32 = 4090;
const ATTEST_PORT: u32 = 4091;

/// What of mote's own environment matters; read once, in `main`.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `PATH`, to find virtiofsd.
    pub path: Option<OsString>,
    /// `MOTE_VIRTIOFSD`: the virtiofsd to run.
    pub virtiofsd: Option<PathBuf>,
    /// `MOTE_KERNEL`: a vmlinux to boot instead of the built-in one.
    pub kernel: Option<PathBuf>,
    /// `MOTE_INITRAMFS`: an archive to boot with instead of the built-in one.
    pub initramfs: Option<PathBuf>,
    /// `MOTE_DEBUG`: all kernel messages.
    pub debug: bool,
    /// `MOTE_NO_SANDBOX`: no confinement, for debugging mote.
    pub no_sandbox: bool,
    /// `MOTE_TIMELINE`: where to write the timeline.
    pub timeline: Option<PathBuf>,
    /// `TERM`: the type of the terminal that a box's terminal is shown on.
    pub term: Option<String>,
}

impl Environment {
    /// Reads the process environment.
    pub fn from_process() -> Self {
        let path = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        Environment {
            path: std::env::var_os("PATH"),
            virtiofsd: path("MOTE_VIRTIOFSD"),
            kernel: path("MOTE_KERNEL"),
            initramfs: path("MOTE_INITRAMFS"),
            debug: path("MOTE_DEBUG").is_some(),
            no_sandbox: path("MOTE_NO_SANDBOX").is_some(),
            timeline: path("MOTE_TIMELINE"),
            term: std::env::var("TERM").ok().filter(|term| !term.is_empty()),
        }
    }
}

/// A VM to build: checked, with all defaults applied.
#[derive(Debug)]
pub struct Plan {
    /// Identity of the box, for messages.
    pub box_id: String,
    /// Number of virtual CPUs, 1 to [`layout::MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest RAM in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// The host CPUs to run on; `None` is all that mote may.
    pub cpus: Option<CpuSet>,
    /// The cgroup to run in; `None` is the one that mote was started in.
    pub cgroup: Option<Cgroup>,
    /// Virtio-fs shares, the root file system first.
    pub shares: Vec<Share>,
    /// Host sockets and the guest ports behind them.
    pub sockets: Vec<HostSocket>,
    /// Published ports, in the spec's order.
    pub published_ports: Vec<PublishedPort>,
    /// Where the guest's own connections may go when they are made with host sockets (TSI); `None`
    /// when the guest has a network interface instead.
    pub outgoing: Option<Policy>,
    /// The box's own network, if it has one.
    pub network: Option<Network>,
    /// File for the guest's output; `None` is mote's own stdout and stderr.
    pub console_output: Option<PathBuf>,
    /// What the agent is told.
    pub instance: Instance,
    /// The vmlinux to boot.
    pub kernel: Image,
    /// The archive with the agent.
    pub initramfs: Image,
    /// The virtio-fs daemon.
    pub virtiofsd: PathBuf,
    /// Whether the kernel shall say everything.
    pub debug: bool,
    /// How mote is confined.
    pub sandbox: Sandbox,
}

/// One virtio-fs share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Its tag, 1 to [`MAX_TAG`] bytes.
    pub tag: String,
    /// The host directory, absolute.
    pub host_path: PathBuf,
    /// Whether virtiofsd refuses writes.
    pub read_only: bool,
}

/// A Unix socket whose connections go to a port of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSocket {
    /// Where mote listens.
    pub path: PathBuf,
    /// Guest vsock port of the contract, for an agent of the image's own.
    pub guest_port: u32,
    /// Guest vsock port of mote's own agent, for when nobody listens on the first.
    pub fallback_port: Option<u32>,
}

/// A TCP port of the host whose connections go to a TCP port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedPort {
    /// The host's port, not 0.
    pub host: u16,
    /// The guest's port, not 0.
    pub guest: u16,
}

/// Bytes to load, and where they come from.
#[derive(Clone)]
pub struct Image {
    /// The bytes.
    pub bytes: Cow<'static, [u8]>,
    /// "built in", or the file's path.
    pub origin: String,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({}, {} bytes)", self.origin, self.bytes.len())
    }
}

impl Plan {
    /// The socket on which passt is found again when it has gone.
    pub fn passt_socket(&self) -> Option<&Path> {
        match &self.network.as_ref()?.passt {
            PasstSocket::Path(path) => Some(path),
            PasstSocket::Inherited(_) => None,
        }
    }

    /// Judges a spec against this host. `None` when `report` has errors.
    pub fn new(spec: &Spec, environment: &Environment, report: &mut Report) -> Option<Plan> {
        let errors_before = report.errors.len();
        check_size(spec, report);
        let cpus = plan_cpus(spec, report);
        let cgroup = plan_cgroup(spec, report);
        let shares = plan_shares(spec, report);
        let sockets = plan_sockets(spec, report);
        let published_ports = plan_ports(&spec.port_map, report);
        check_console(spec.console_output.as_deref(), report);
        let network = Network::new(spec, report);
        warn_of_paths_that_guests_can_move(spec, &shares, report);
        let instance = plan_instance(spec, network.as_ref(), report);
        refuse_unsupported(spec, report);
        let kernel =
            plan_image(environment.kernel.as_deref(), image::kernel(), "MOTE_KERNEL", report);
        let initramfs = plan_image(
            environment.initramfs.as_deref(),
            image::initramfs(),
            "MOTE_INITRAMFS",
            report,
        );
        let virtiofsd = find_virtiofsd(environment, report);
        if report.errors.len() > errors_before {
            return None;
        }
        let outgoing = spec.network.is_none();
        let isolation =
            if environment.no_sandbox { Isolation::Off } else { Isolation::of_host(outgoing) };
        let sandbox = Sandbox {
            isolation,
            outgoing,
            open_files: open_files(spec.vcpus, &shares, &sockets, &published_ports),
        };
        Some(Plan {
            box_id: spec.box_id.clone(),
            vcpus: spec.vcpus,
            memory_bytes: u64::from(spec.memory_mib) << 20,
            cpus,
            cgroup,
            shares,
            sockets,
            published_ports,
            outgoing: spec.network.is_none().then(plan_outgoing),
            network,
            console_output: spec.console_output.clone(),
            instance,
            kernel: kernel?,
            initramfs: initramfs?,
            virtiofsd: virtiofsd?,
            debug: environment.debug,
            sandbox,
        })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Instance {
            hostname,
            mounts,
            read_only_root,
            pids_limit,
            rlimits,
            entrypoint,
            workdir,
            user,
            ..
        } = &self.instance;
        writeln!(f, "box        {}", self.box_id)?;
        writeln!(f, "vcpus      {}", self.vcpus)?;
        writeln!(f, "memory     {} MiB", self.memory_bytes >> 20)?;
        if let Some(cpus) = &self.cpus {
            writeln!(f, "host cpus  {cpus}")?;
        }
        if let Some(cgroup) = &self.cgroup {
            writeln!(f, "cgroup     {cgroup}")?;
        }
        for share in &self.shares {
            let name = if share.tag == ROOT_TAG { "/" } else { &share.tag };
            let mode = if share.read_only { "read-only" } else { "read-write" };
            writeln!(f, "share      {name} = {} ({mode})", share.host_path.display())?;
        }
        for socket in &self.sockets {
            writeln!(
                f,
                "socket     {} -> guest port {}",
                socket.path.display(),
                socket.guest_port
            )?;
        }
        for PublishedPort { host, guest } in &self.published_ports {
            writeln!(f, "port       {host} -> guest port {guest}")?;
        }
        if let Some(network) = &self.network {
            writeln!(f, "network    {network}")?;
        }
        match &self.console_output {
            Some(path) => writeln!(f, "console    {}", path.display())?,
            None => writeln!(f, "console    mote's stdout and stderr")?,
        }
        for mount in mounts {
            match mount {
                Mount::Share { tag, path, read_only } => {
                    let mode = if *read_only { " (read-only)" } else { "" };
                    writeln!(f, "mount      {tag} on {path}{mode}")?;
                }
                Mount::Tmpfs { path, options } => {
                    writeln!(f, "mount      tmpfs on {path} {options}")?
                }
            }
        }
        if *read_only_root {
            writeln!(f, "mount      / is made read-only")?;
        }
        let command: Vec<String> = [&entrypoint.executable]
            .into_iter()
            .chain(&entrypoint.args)
            .map(|word| format!("{word:?}"))
            .collect();
        writeln!(f, "run        {}", command.join(" "))?;
        writeln!(f, "in         {workdir}")?;
        writeln!(f, "as         {}", user.as_deref().unwrap_or("root"))?;
        writeln!(f, "hostname   {hostname}")?;
        for (name, value) in &entrypoint.env {
            writeln!(f, "env        {name}={value:?}")?;
        }
        if let Some(limit) = pids_limit {
            writeln!(f, "processes  at most {limit}")?;
        }
        for Rlimit { resource, soft, hard } in rlimits {
            let name =
                ULIMITS.iter().find(|(_, number)| number == resource).map_or("?", |(n, _)| n);
            writeln!(f, "ulimit     {name}={}:{}", limit_text(*soft), limit_text(*hard))?;
        }
        writeln!(f, "kernel     {}", self.kernel.origin)?;
        writeln!(f, "initramfs  {}", self.initramfs.origin)?;
        writeln!(f, "virtiofsd  {}", self.virtiofsd.display())?;
        write!(f, "confined   {}", self.sandbox.isolation)
    }
}

/// The descriptors that a box may need at once: for every connection one, for what there is from the
/// start a few each.
fn open_files(vcpus: u8, shares: &[Share], sockets: &[HostSocket], ports: &[PublishedPort]) -> u64 {
    /// Standard streams, KVM, memory, the main loop, the control channel, vsock, rng and net.
    const FIXED: usize = 64;
    const PER_VCPU: usize = 4;
    /// Connection, process, its stderr, two queues and their copies, the interrupt.
    const PER_SHARE: usize = 16;
    /// IPv4 and IPv6.
    const PER_PORT: usize = 2;
    let started = FIXED
        + usize::from(vcpus) * PER_VCPU
        + shares.len() * PER_SHARE
        + sockets.len()
        + ports.len() * PER_PORT;
    (started + MAX_CONNECTIONS) as u64
}

fn check_size(spec: &Spec, report: &mut Report) {
    let max = layout::MAX_VCPUS;
    if !(1..=max).contains(&spec.vcpus) {
        report.error("vcpus", format!("is {}, must be from 1 to {max}", spec.vcpus));
    }
    let mib = spec.memory_mib;
    if mib < MIN_MEMORY_MIB {
        report.error("memory_mib", format!("is {mib}, must be at least {MIN_MEMORY_MIB}"));
    } else if let Some(host_mib) = host_memory_mib().filter(|host| u64::from(mib) > *host) {
        report.error("memory_mib", format!("is {mib}, but this host has {host_mib} MiB of memory"));
    }
}

/// `MemTotal` of proc(5); `None` where /proc does not say.
fn host_memory_mib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

fn plan_cpus(spec: &Spec, report: &mut Report) -> Option<CpuSet> {
    let text = spec.resource_limits.cpuset_cpus.as_deref()?;
    let planned = CpuSet::parse(text).and_then(|cpus| {
        let available = CpuSet::available().map_err(|error| format!("{error:#}"))?;
        match cpus.first_missing(&available) {
            None => Ok(cpus),
            Some(cpu) => Err(format!(
                "has the CPU {cpu}, which is offline or not allowed to this process; available are {available}"
            )),
        }
    });
    planned.map_err(|problem| report.error("resource_limits.cpuset_cpus", problem)).ok()
}

/// What the kernel takes for `cpu.max`, in microseconds (kernel/sched/core.c, `tg_set_cfs_bandwidth`).
const CPU_QUOTA_US: RangeInclusive<i64> = 1_000..=(1 << 44) - 1;
const CPU_PERIOD_US: RangeInclusive<u64> = 1_000..=1_000_000;
/// The kernel's own default, and the contract's.
const DEFAULT_CPU_PERIOD_US: u64 = 100_000;

fn plan_cgroup(spec: &Spec, report: &mut Report) -> Option<Cgroup> {
    let limits = &spec.resource_limits;
    if let Some(quota) = limits.cpu_quota.filter(|us| *us >= 0 && !CPU_QUOTA_US.contains(us)) {
        report.error(
            "resource_limits.cpu_quota",
            format!(
                "is {quota} microseconds, must be from {} to {}, or -1 for no limit",
                CPU_QUOTA_US.start(),
                CPU_QUOTA_US.end()
            ),
        );
    }
    if let Some(period) = limits.cpu_period.filter(|us| !CPU_PERIOD_US.contains(us)) {
        report.error(
            "resource_limits.cpu_period",
            format!(
                "is {period} microseconds, must be from {} to {}",
                CPU_PERIOD_US.start(),
                CPU_PERIOD_US.end()
            ),
        );
    }
    let cpu_max = (limits.cpu_quota.is_some() || limits.cpu_period.is_some()).then(|| {
        let quota_us = limits.cpu_quota.and_then(unless_negative);
        Limit::CpuMax { quota_us, period_us: limits.cpu_period.unwrap_or(DEFAULT_CPU_PERIOD_US) }
    });
    let planned: Vec<Limit> = [
        limits.cpu_shares.map(Limit::from_shares),
        cpu_max,
        limits.memory_reservation.map(Limit::MemoryLow),
        limits.memory_swap.map(|bytes| Limit::MemorySwapMax(unless_negative(bytes))),
    ]
    .into_iter()
    .flatten()
    .collect();
    if planned.is_empty() {
        return None;
    }
    Cgroup::new(&spec.box_id, planned).map_err(|problem| report.error("box_id", problem)).ok()
}

/// A limit of which every negative value means none.
fn unless_negative(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok()
}

fn plan_shares(spec: &Spec, report: &mut Report) -> Vec<Share> {
    let mut shares = Vec::new();
    if let Some(host_path) = directory(&spec.rootfs_path, "rootfs_path", report) {
        shares.push(Share { tag: ROOT_TAG.into(), host_path, read_only: false });
    }
    if spec.fs_mounts.len() > layout::MAX_SHARES {
        report.error(
            "fs_mounts",
            format!("has {} shares, mote can have {}", spec.fs_mounts.len(), layout::MAX_SHARES),
        );
    }
    let mut tags = HashSet::from([ROOT_TAG]);
    for (index, mount) in spec.fs_mounts.iter().enumerate() {
        let path = |field| format!("fs_mounts[{index}].{field}");
        let tag = mount.tag.as_str();
        if tag.is_empty() {
            report.error(path("tag"), format!("is empty, must have 1 to {MAX_TAG} bytes"));
        } else if tag.len() > MAX_TAG {
            let len = tag.len();
            report.error(path("tag"), format!("has {len} bytes, must have 1 to {MAX_TAG}"));
        } else if tag.contains('\0') {
            report.error(path("tag"), "contains a NUL character");
        } else if tag == ROOT_TAG {
            report.error(
                path("tag"),
                format!("\"{ROOT_TAG}\" is the root file system's own tag; choose another"),
            );
        } else if !tags.insert(tag) {
            report.error(
                path("tag"),
                format!("\"{tag}\" is used by an earlier share; choose another"),
            );
        }
        if let Some(host_path) = directory(&mount.host_path, &path("host_path"), report) {
            shares.push(Share { tag: tag.into(), host_path, read_only: mount.read_only });
        }
    }
    shares
}

/// Warns of what mote opens by name inside a share that the guest can write to: it can have put a symbolic
/// link there, which the next start follows with this user's rights.
fn warn_of_paths_that_guests_can_move(spec: &Spec, shares: &[Share], report: &mut Report) {
    let mounts = spec.fs_mounts.iter().enumerate();
    let mut paths: Vec<(String, &Path)> = mounts
        .map(|(index, mount)| (format!("fs_mounts[{index}].host_path"), mount.host_path.as_path()))
        .collect();
    let network = spec.network.as_ref();
    for (field, path) in [
        ("rootfs_path", Some(spec.rootfs_path.as_path())),
        ("console_output", spec.console_output.as_deref()),
        ("exec_socket_path", Some(spec.exec_socket_path.as_path())),
        ("pty_socket_path", Some(spec.pty_socket_path.as_path())),
        ("attest_socket_path", Some(spec.attest_socket_path.as_path())),
        ("network.passt_socket_path", network.map(|network| network.passt_socket_path.as_path())),
    ] {
        paths.extend(path.map(|path| (field.into(), path)));
    }
    let writable = |share: &&Share| !share.read_only && share.host_path != Path::new("/");
    for share in shares.iter().filter(writable) {
        for (field, path) in &paths {
            let inside =
                |path: &Path| path != share.host_path && path.starts_with(&share.host_path);
            if [as_written(path), as_it_is(path)].iter().flatten().any(|path| inside(path)) {
                report.warn(
                    field,
                    format!(
                        "{} is inside {}, where the guest can put a link to another file of yours in its place; choose a path outside",
                        path.display(),
                        share.host_path.display()
                    ),
                );
            }
        }
    }
}

/// A path as the spec has it, from the root; none when it goes back up.
fn as_written(path: &Path) -> Option<PathBuf> {
    let goes_up = path.components().any(|part| part == Component::ParentDir);
    std::path::absolute(path).ok().filter(|_| !goes_up)
}

/// A path without the symbolic links on the way to its last part.
fn as_it_is(path: &Path) -> Option<PathBuf> {
    let directory = std::path::absolute(path).ok()?.parent()?.canonicalize().ok()?;
    Some(directory.join(path.file_name()?))
}

/// An existing directory that can be read, as an absolute path.
fn directory(path: &Path, field: &str, report: &mut Report) -> Option<PathBuf> {
    let shown = path.display();
    let checked = fs::metadata(path).and_then(|metadata| {
        if metadata.is_dir() {
            fs::read_dir(path).map(drop)
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        }
    });
    match checked.and_then(|()| fs::canonicalize(path)) {
        Ok(absolute) => Some(absolute),
        Err(error) => {
            report.error(
                field,
                match error.kind() {
                    _ if path.as_os_str().is_empty() => "is empty, must be a host directory".into(),
                    io::ErrorKind::NotFound => format!("{shown} does not exist; name a host directory"),
                    io::ErrorKind::NotADirectory => format!("{shown} is not a directory; name one"),
                    io::ErrorKind::PermissionDenied => {
                        format!("{shown} may not be read by this user; change its permissions or run as its owner")
                    }
                    _ => format!("{shown} cannot be read: {error}"),
                },
            );
            None
        }
    }
}

fn plan_sockets(spec: &Spec, report: &mut Report) -> Vec<HostSocket> {
    let mut sockets: Vec<HostSocket> = Vec::new();
    for (field, path, guest_port, fallback_port) in [
        ("exec_socket_path", &spec.exec_socket_path, EXEC_PORT, Some(EXEC_SERVER_PORT)),
        ("pty_socket_path", &spec.pty_socket_path, PTY_PORT, Some(PTY_SERVER_PORT)),
        ("attest_socket_path", &spec.attest_socket_path, ATTEST_PORT, None),
    ] {
        if path.as_os_str().is_empty() {
            continue;
        }
        if let Some(problem) = socket_problem(path) {
            report.error(field, problem);
        } else if sockets.iter().any(|socket| socket.path == *path) {
            report.error(
                field,
                format!("{} is another socket's path too; give each its own", path.display()),
            );
        } else {
            sockets.push(HostSocket { path: path.clone(), guest_port, fallback_port });
        }
    }
    sockets
}

fn socket_problem(path: &Path) -> Option<String> {
    let len = path.as_os_str().len();
    if len > MAX_SOCKET_PATH {
        return Some(format!(
            "has {len} bytes, a Unix socket's path can have {MAX_SOCKET_PATH}; use a shorter directory"
        ));
    }
    // A socket of an earlier run is replaced; anything else is somebody's file.
    if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.file_type().is_socket()) {
        return Some(format!(
            "{} exists and is not a socket; remove it or choose another path",
            path.display()
        ));
    }
    parent_problem(path)
}

/// Most published ports (contract §1.6).
const MAX_PUBLISHED_PORTS: usize = 4096;

fn plan_ports(port_map: &[String], report: &mut Report) -> Vec<PublishedPort> {
    if port_map.len() > MAX_PUBLISHED_PORTS {
        let len = port_map.len();
        report.error(
            "port_map",
            format!("has {len} entries, mote can publish {MAX_PUBLISHED_PORTS} ports"),
        );
        return Vec::new();
    }
    let mut ports = Vec::new();
    let (mut host_ports, mut guest_ports) = (HashMap::new(), HashMap::new());
    for (index, text) in port_map.iter().enumerate() {
        let path = format!("port_map[{index}]");
        let port = match parse_published_port(text) {
            Ok(port) => port,
            Err(problem) => {
                report.error(path, format!("is \"{text}\", {problem}"));
                continue;
            }
        };
        for (side, number, known) in
            [("host", port.host, &mut host_ports), ("guest", port.guest, &mut guest_ports)]
        {
            let first = *known.entry(number).or_insert(index);
            if first != index {
                report.error(
                    &path,
                    format!(
                        "is \"{text}\", but {side} port {number} is in port_map[{first}] already; give each entry ports of its own"
                    ),
                );
            }
        }
        ports.push(port);
    }
    ports
}

/// Parses `HOST:GUEST`. What is not understood is told apart from what mote does not do.
fn parse_published_port(text: &str) -> Result<PublishedPort, String> {
    let (pair, protocol) = text.split_once('/').map_or((text, None), |(p, q)| (p, Some(q)));
    let mut from_the_end = pair.rsplitn(3, ':');
    let (guest, host) = (from_the_end.next(), from_the_end.next());
    let (Some(guest), Some(host)) = (guest, host) else {
        return Err("must be HOST:GUEST, two port numbers like \"8080:80\"".into());
    };
    match protocol {
        None => {}
        Some(protocol) if protocol.eq_ignore_ascii_case("tcp") => {
            return Err(format!("but ports are always TCP's here; write \"{host}:{guest}\""));
        }
        Some(protocol) => {
            return Err(format!("but only TCP ports can be published, not those of {protocol}"));
        }
    }
    if from_the_end.next().is_some() {
        return Err(format!(
            "but a port is published on all of the host's addresses; write \"{host}:{guest}\""
        ));
    }
    let port = |text: &str| {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err("must be HOST:GUEST, two port numbers like \"8080:80\"".into());
        }
        text.parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| format!("but {text} is not a port; those are from 1 to {}", u16::MAX))
    };
    Ok(PublishedPort { host: port(host)?, guest: port(guest)? })
}

/// The name servers are the host's at this time; a host that has none is one without resolv.conf.
fn plan_outgoing() -> Policy {
    Policy::new(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}

fn check_console(path: Option<&Path>, report: &mut Report) {
    let Some(path) = path else { return };
    let problem = if path.is_dir() {
        Some(format!("{} is a directory; name a file", path.display()))
    } else {
        parent_problem(path)
    };
    if let Some(problem) = problem {
        report.error("console_output", problem);
    }
}

/// Why a file cannot be created at `path`, as far as its directory goes.
pub fn parent_problem(path: &Path) -> Option<String> {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Some("is not the path of a file".into()),
    };
    match fs::metadata(parent) {
        Ok(metadata) if metadata.is_dir() => None,
        Ok(_) => Some(format!("{} is not a directory; name a file in one", parent.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some(format!("its directory {} does not exist; create it first", parent.display()))
        }
        Err(error) => Some(format!("its directory {} cannot be used: {error}", parent.display())),
    }
}

fn plan_instance(spec: &Spec, network: Option<&Network>, report: &mut Report) -> Instance {
    let spec::Entrypoint { executable, args, env } = &spec.entrypoint;
    if executable.is_empty() {
        report.error("entrypoint.executable", "is empty; name a program");
    }
    if !spec.workdir.starts_with('/') {
        report.error(
            "workdir",
            format!("is \"{}\", must be an absolute path like \"/\"", spec.workdir),
        );
    }
    for (index, (name, _)) in env.iter().enumerate() {
        if name.is_empty() || name.contains('=') {
            report.error(
                format!("entrypoint.env[{index}]"),
                format!("has the name \"{name}\", which must not be empty or contain ="),
            );
        }
    }
    let strings =
        [("entrypoint.executable".to_owned(), executable), ("workdir".to_owned(), &spec.workdir)];
    let args_named = args.iter().enumerate().map(|(i, arg)| (format!("entrypoint.args[{i}]"), arg));
    let env_named = env.iter().enumerate().flat_map(|(i, (name, value))| {
        [name, value].map(|text| (format!("entrypoint.env[{i}]"), text))
    });
    for (path, text) in strings.into_iter().chain(args_named).chain(env_named) {
        if text.contains('\0') {
            report.error(path, "contains a NUL character, which no program can receive");
        }
    }

    let hostname = env.iter().rev().find(|(name, _)| name == "HOSTNAME").map(|(_, value)| value);
    let hostname = hostname.filter(|name| !name.is_empty()).map_or("localhost", String::as_str);
    if hostname.len() > MAX_HOSTNAME {
        report.error(
            "entrypoint.env",
            format!("HOSTNAME has {} bytes, a host name can have {MAX_HOSTNAME}", hostname.len()),
        );
    }
    if spec.resource_limits.pids_limit == Some(0) {
        report.error("resource_limits.pids_limit", "is 0, must be at least 1");
    }
    let GuestInit { mounts, read_only_root, main, image_init, container_env } =
        GuestInit::new(spec, report);
    let Main { entrypoint, workdir, user, security } = main.unwrap_or_else(|| Main {
        entrypoint: Entrypoint {
            executable: executable.clone(),
            args: args.clone(),
            env: env.clone(),
        },
        workdir: spec.workdir.clone(),
        user: None,
        security: Security::default(),
    });
    let user = [spec.user.clone(), user].into_iter().flatten().find(|user| !user.is_empty());
    if let Some(user) = user.as_ref().filter(|_| image_init) {
        report.warn(
            "user",
            format!("is \"{user}\", but the image's own init runs as root; it takes BOX_EXEC_USER for its main process"),
        );
    }
    Instance {
        hostname: hostname.into(),
        mounts,
        read_only_root,
        pids_limit: spec.resource_limits.pids_limit,
        rlimits: plan_rlimits(&spec.resource_limits, report),
        entrypoint,
        workdir,
        user: user.filter(|_| !image_init),
        exec_env: container_env,
        exec_workdir: spec.workdir.clone(),
        outgoing: spec.network.is_none(),
        outgoing_ip6: host_has_global_ip6(),
        syn_retries: unusual_syn_retries(),
        published: !spec.port_map.is_empty(),
        security,
        interface: network.map(|network| network.interface),
        resolv_conf: network::resolv_conf(spec),
    }
}

/// Whether an interface of this host has an IPv6 address of more than its own link (proc(5),
/// `if_inet6`).
fn host_has_global_ip6() -> bool {
    const SCOPE_COLUMN: usize = 3;
    const GLOBAL: &str = "00";
    let addresses = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    addresses.lines().any(|line| line.split_whitespace().nth(SCOPE_COLUMN) == Some(GLOBAL))
}

/// How often this host repeats a SYN, unless as often as any Linux.
fn unusual_syn_retries() -> Option<u8> {
    const USUAL: u8 = 6;
    let text = fs::read_to_string("/proc/sys/net/ipv4/tcp_syn_retries").ok()?;
    text.trim().parse().ok().filter(|retries| *retries != USUAL)
}

/// Names of `ulimits` and their `RLIMIT_*` numbers (contract §1.4; `as` is not one of them).
const ULIMITS: [(&str, u32); 15] = [
    ("cpu", 0),
    ("fsize", 1),
    ("data", 2),
    ("stack", 3),
    ("core", 4),
    ("rss", 5),
    ("nproc", 6),
    ("nofile", 7),
    ("memlock", 8),
    ("locks", 10),
    ("sigpending", 11),
    ("msgqueue", 12),
    ("nice", 13),
    ("rtprio", 14),
    ("rttime", 15),
];

fn plan_rlimits(limits: &spec::ResourceLimits, report: &mut Report) -> Vec<Rlimit> {
    // Contract §1.4: always set, in this order, before the spec's own.
    let (soft, hard) = limits.pids_limit.map_or((4096, 8192), |limit| (limit, limit));
    let mut rlimits = vec![
        Rlimit { resource: 7, soft: 1 << 20, hard: 1 << 20 },
        Rlimit { resource: 6, soft, hard },
    ];
    for (index, text) in limits.ulimits.iter().enumerate() {
        match parse_ulimit(text) {
            Ok(rlimit) => rlimits.push(rlimit),
            Err(problem) => report.error(format!("resource_limits.ulimits[{index}]"), problem),
        }
    }
    rlimits
}

fn parse_ulimit(text: &str) -> Result<Rlimit, String> {
    let wanted = "must be NAME=SOFT:HARD or NAME=LIMIT, each a number, -1 or unlimited";
    let (name, limits) = text.split_once('=').ok_or_else(|| format!("is \"{text}\", {wanted}"))?;
    let known = ULIMITS.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
    let (_, resource) = known.ok_or_else(|| {
        let names: Vec<&str> = ULIMITS.iter().map(|(name, _)| *name).collect();
        format!("\"{name}\" is not a limit; known are {}", names.join(", "))
    })?;
    let limit = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        text => text.parse().map_err(|_| format!("is \"{name}={limits}\", {wanted}")),
    };
    let (soft, hard) = match limits.split_once(':') {
        Some((soft, hard)) => (limit(soft)?, limit(hard)?),
        None => (limit(limits)?, limit(limits)?),
    };
    if soft > hard {
        return Err(format!("is \"{text}\", but the soft limit must not exceed the hard limit"));
    }
    Ok(Rlimit { resource: *resource, soft, hard })
}

fn limit_text(limit: u64) -> String {
    if limit == u64::MAX { "unlimited".into() } else { limit.to_string() }
}

/// What the contract has and this version of mote has not. Refused by name: a limit that is not
/// enforced is worse than none.
fn refuse_unsupported(spec: &Spec, report: &mut Report) {
    if spec.tee_config.is_some() {
        report.error(
            "tee_config",
            "asks for a confidential VM, which mote cannot run; leave it null",
        );
    }
}

fn plan_image(
    path: Option<&Path>,
    built_in: &'static [u8],
    variable: &str,
    report: &mut Report,
) -> Option<Image> {
    let Some(path) = path else {
        return Some(Image { bytes: Cow::Borrowed(built_in), origin: "built in".into() });
    };
    match fs::read(path) {
        Ok(bytes) => Some(Image { bytes: Cow::Owned(bytes), origin: path.display().to_string() }),
        Err(error) => {
            report.error(
                variable,
                format!(
                    "{} cannot be read: {error}; unset it to use the built-in one",
                    path.display()
                ),
            );
            None
        }
    }
}

/// Where distributions put it outside `PATH`.
const VIRTIOFSD_PLACES: [&str; 3] =
    ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd/virtiofsd", "/usr/lib/virtiofsd"];

/// Finds the virtio-fs daemon.
pub fn find_virtiofsd(environment: &Environment, report: &mut Report) -> Option<PathBuf> {
    if let Some(path) = &environment.virtiofsd {
        if is_executable(path) {
            return Some(path.clone());
        }
        report.error("MOTE_VIRTIOFSD", format!("{} is not an executable file", path.display()));
        return None;
    }
    let path = environment.path.as_deref().unwrap_or(OsStr::new(""));
    let on_path = path
        .as_bytes()
        .split(|&byte| byte == b':')
        .filter(|dir| !dir.is_empty())
        .map(|dir| Path::new(OsStr::from_bytes(dir)).join("virtiofsd"));
    let found = on_path.chain(VIRTIOFSD_PLACES.map(PathBuf::from)).find(|file| is_executable(file));
    if found.is_none() {
        report.error(
            "virtiofsd",
            format!(
                "is not installed: it is in no directory of PATH and not at {}; run 'cargo install virtiofsd' or name it in MOTE_VIRTIOFSD",
                VIRTIOFSD_PLACES.join(", ")
            ),
        );
    }
    found
}

fn is_executable(path: &Path) -> bool {
    // Not opened: where no more files may be, it would seem not to be there.
    fs::metadata(path)
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        let mut report = Report::default();
        let text = r#"{"box_id":"b","vcpus":1,"memory_mib":256,"rootfs_path":"/",
            "exec_socket_path":"","fs_mounts":[],"workdir":"/",
            "entrypoint":{"executable":"/bin/true","args":[],"env":[]}}"#;
        Spec::parse(text, &mut report).expect("a spec")
    }

    fn environment() -> Environment {
        // Any executable will do: planning never runs it.
        Environment { virtiofsd: Some("/bin/sh".into()), ..Environment::default() }
    }

    fn plan(change: impl FnOnce(&mut Spec)) -> Result<Plan, Vec<String>> {
        let mut spec = spec();
        change(&mut spec);
        let mut report = Report::default();
        let plan = Plan::new(&spec, &environment(), &mut report);
        assert_eq!(plan.is_none(), !report.errors.is_empty());
        plan.ok_or_else(|| report.errors.iter().map(ToString::to_string).collect())
    }

    fn errors(change: impl FnOnce(&mut Spec)) -> Vec<String> {
        plan(change).expect_err("must be refused")
    }

    fn share(tag: &str, host_path: &str) -> spec::FsMount {
        spec::FsMount { tag: tag.into(), host_path: host_path.into(), read_only: true }
    }

    #[test]
    fn paths_that_the_guest_can_move_are_warned_of() {
        let root = fs::canonicalize(std::env::temp_dir()).expect("a directory");
        let mut spec = spec();
        spec.rootfs_path.clone_from(&root);
        spec.console_output = Some(root.join("console.log"));
        spec.exec_socket_path = PathBuf::from("/run/mote-outside.sock");
        spec.pty_socket_path = root.join("../mote-outside.sock");
        let mut report = Report::default();
        Plan::new(&spec, &environment(), &mut report).expect("a plan");
        let [warning] = &report.warnings[..] else { panic!("{:?}", report.warnings) };
        let expected = format!("console_output: {}/console.log is inside", root.display());
        assert!(warning.to_string().starts_with(&expected), "{warning}");
    }

    #[test]
    fn defaults_are_applied() {
        let plan = plan(|_| ()).expect("a plan");
        assert_eq!(plan.memory_bytes, 256 << 20);
        assert_eq!(plan.shares[0].tag, ROOT_TAG);
        assert_eq!(plan.instance.hostname, "localhost");
        assert!(plan.sockets.is_empty());
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for (vcpus, mib, expected) in [
            (0, 256, "vcpus: is 0, must be from 1 to 64"),
            (65, 256, "vcpus: is 65, must be from 1 to 64"),
            (1, 0, "memory_mib: is 0, must be at least 64"),
            (1, 1, "memory_mib: is 1, must be at least 64"),
        ] {
            assert_eq!(errors(|s| (s.vcpus, s.memory_mib) = (vcpus, mib)), [expected]);
        }
        let errors = errors(|s| s.memory_mib = u32::MAX);
        assert!(errors[0].contains("but this host has"), "{errors:?}");
    }

    #[test]
    fn paths_that_are_no_directories_are_refused() {
        assert_eq!(
            errors(|s| s.rootfs_path = "/no/such".into()),
            ["rootfs_path: /no/such does not exist; name a host directory"]
        );
        assert_eq!(
            errors(|s| s.rootfs_path = "/etc/passwd".into()),
            ["rootfs_path: /etc/passwd is not a directory; name one"]
        );
        assert_eq!(
            errors(|s| s.fs_mounts = vec![share("a", "/no/such")]),
            ["fs_mounts[0].host_path: /no/such does not exist; name a host directory"]
        );
    }

    #[test]
    fn bad_tags_are_refused_with_their_index() {
        let long = "x".repeat(37);
        let errors = errors(|s| {
            s.fs_mounts = ["a", "", &long, "a", ROOT_TAG].map(|tag| share(tag, "/")).to_vec();
        });
        for (index, start) in [
            (1, "is empty"),
            (2, "has 37 bytes"),
            (3, "\"a\" is used by an earlier share"),
            (4, "\"mote-root\" is the root"),
        ] {
            let expected = format!("fs_mounts[{index}].tag: {start}");
            assert!(errors.iter().any(|e| e.starts_with(&expected)), "{expected}: {errors:?}");
        }
        assert_eq!(errors.len(), 4);
        assert!(plan(|s| s.fs_mounts = vec![share(&long[1..], "/")]).is_ok());
    }

    #[test]
    fn socket_and_console_paths_are_checked() {
        let long = format!("/tmp/{}", "s".repeat(103));
        for (change, expected) in [
            (long.as_str(), "exec_socket_path: has 108 bytes"),
            ("/etc/passwd", "exec_socket_path: /etc/passwd exists and is not a socket"),
            ("/no/such/s", "exec_socket_path: its directory /no/such does not exist"),
        ] {
            let errors = errors(|s| s.exec_socket_path = change.into());
            assert!(errors[0].starts_with(expected), "{errors:?}");
        }
        let errors = errors(|s| {
            s.exec_socket_path = "/tmp/s".into();
            s.pty_socket_path = "/tmp/s".into();
            s.console_output = Some("/no/such/console".into());
        });
        assert!(errors[0].starts_with("pty_socket_path: /tmp/s is another socket's"), "{errors:?}");
        assert!(errors[1].starts_with("console_output: its directory /no/such"), "{errors:?}");
    }

    #[test]
    fn published_ports_are_judged_strictly() {
        let ports = |entries: &[&str]| {
            let port_map: Vec<String> = entries.iter().map(|text| (*text).to_owned()).collect();
            plan(|s| s.port_map = port_map)
        };
        let planned = ports(&["8080:80", "1:65535", "65535:1"]).expect("a plan");
        assert_eq!(planned.published_ports[1], PublishedPort { host: 1, guest: 65_535 });
        assert!(planned.to_string().contains("port       8080 -> guest port 80\n"));
        let wanted = "must be HOST:GUEST, two port numbers like \"8080:80\"";
        for (text, problem) in [
            ("", wanted),
            ("8080", wanted),
            (":", wanted),
            ("8080:", wanted),
            (":80", wanted),
            (" 8080:80", wanted),
            ("+8080:80", wanted),
            ("-1:80", wanted),
            ("8080-8090:80", wanted),
            ("http:80", wanted),
            ("8080:80/", "but only TCP ports can be published, not those of "),
            ("8080:80/udp", "but only TCP ports can be published, not those of udp"),
            ("8080:80/tcp", "but ports are always TCP's here; write \"8080:80\""),
            (
                "127.0.0.1:8080:80",
                "but a port is published on all of the host's addresses; write \"8080:80\"",
            ),
            (
                "[::1]:8080:80",
                "but a port is published on all of the host's addresses; write \"8080:80\"",
            ),
            ("0:80", "but 0 is not a port; those are from 1 to 65535"),
            ("8080:0", "but 0 is not a port; those are from 1 to 65535"),
            ("65536:80", "but 65536 is not a port; those are from 1 to 65535"),
            (
                "8080:99999999999999999999",
                "but 99999999999999999999 is not a port; those are from 1 to 65535",
            ),
        ] {
            let errors = ports(&["1:1", text]).expect_err(text);
            assert_eq!(errors, [format!("port_map[1]: is \"{text}\", {problem}")]);
        }
        assert_eq!(
            ports(&["80:80", "443:443", "80:8080", "81:443"]).expect_err("repeated"),
            [
                "port_map[2]: is \"80:8080\", but host port 80 is in port_map[0] already; give each entry ports of its own",
                "port_map[3]: is \"81:443\", but guest port 443 is in port_map[1] already; give each entry ports of its own",
            ]
        );
        let many: Vec<String> = (1..=4097).map(|port| format!("{port}:{port}")).collect();
        assert_eq!(
            errors(|s| s.port_map = many.clone()),
            ["port_map: has 4097 entries, mote can publish 4096 ports"]
        );
        assert!(plan(|s| s.port_map = many[1..].to_vec()).is_ok());
    }

    #[test]
    fn without_a_network_of_its_own_the_guest_uses_the_hosts() {
        assert!(plan(|_| ()).expect("a plan").outgoing.is_some());
    }

    #[test]
    fn every_error_is_reported_at_once() {
        let errors = errors(|s| {
            s.vcpus = 0;
            s.memory_mib = 0;
            s.rootfs_path = "/no".into();
            s.workdir = "here".into();
            s.entrypoint.executable.clear();
            s.entrypoint.env = vec![("A=B".into(), String::new())];
            s.port_map = vec!["1".into()];
            s.resource_limits.pids_limit = Some(0);
        });
        assert_eq!(errors.len(), 8, "{errors:?}");
    }

    #[test]
    fn a_user_is_not_the_images_own_inits() {
        let user = |env: &str| {
            let plan = plan(|s| {
                s.entrypoint.executable = "/bin/sh".into();
                s.entrypoint.env = vec![(env.into(), "sleep".into())];
                s.user = Some("app".into());
            });
            plan.expect("a plan").instance.user
        };
        assert_eq!(user("BOX_EXEC_EXEC"), None);
        assert_eq!(user("OTHER"), Some("app".into()));
    }

    #[test]
    fn ulimits_follow_the_defaults() {
        let limits = |text: &str| plan(|s| s.resource_limits.ulimits = vec![text.into()]);
        for (text, soft, hard) in [
            ("NoFile=10:20", 10, 20),
            ("nofile=5", 5, 5),
            ("nofile=-1:unlimited", u64::MAX, u64::MAX),
        ] {
            let plan = limits(text).expect(text);
            assert_eq!(plan.instance.rlimits[2], Rlimit { resource: 7, soft, hard });
        }
        for text in ["nofile", "as=1:1", "nofile=x", "nofile=2:1", "nofile=1:2:3"] {
            let errors = limits(text).expect_err(text);
            assert!(errors[0].starts_with("resource_limits.ulimits[0]: "), "{errors:?}");
        }
    }

    #[test]
    fn cpus_are_checked_against_the_host() {
        let cpus = |text: &str| plan(|s| s.resource_limits.cpuset_cpus = Some(text.into()));
        let available = CpuSet::available().expect("affinity");
        let all = cpus(&available.to_string()).expect("a plan");
        assert!(all.to_string().contains(&format!("\nhost cpus  {available}\n")), "{all}");
        for (text, problem) in [
            ("", "is \"\", must be a list of CPUs like \"0-3,6\"".into()),
            (
                "0-1023",
                format!(
                    "which is offline or not allowed to this process; available are {available}"
                ),
            ),
        ] {
            let errors = cpus(text).expect_err(text);
            assert!(errors[0].starts_with("resource_limits.cpuset_cpus: "), "{errors:?}");
            assert!(errors[0].ends_with(&problem), "{errors:?}");
        }
    }

    #[test]
    fn cgroup_limits_are_judged() {
        let shown = |change: fn(&mut spec::ResourceLimits)| {
            let plan = plan(|s| change(&mut s.resource_limits)).expect("a plan");
            plan.cgroup.map(|cgroup| cgroup.to_string())
        };
        assert_eq!(shown(|_| ()), None);
        assert_eq!(
            shown(|l| {
                (l.cpu_shares, l.cpu_quota) = (Some(0), Some(50_000));
                (l.memory_reservation, l.memory_swap) = (Some(1 << 20), Some(-5));
            })
            .expect("a cgroup"),
            "/sys/fs/cgroup/a3s-box/b, cpu.weight = 1, cpu.max = 50000 100000, memory.low = 1048576, memory.swap.max = max"
        );
        for (quota, period, expected) in [
            (Some(-1), None, "cpu.max = max 100000"),
            (None, Some(1_000), "cpu.max = max 1000"),
            (Some(1_000), Some(1_000_000), "cpu.max = 1000 1000000"),
        ] {
            let limited = |s: &mut Spec| {
                (s.resource_limits.cpu_quota, s.resource_limits.cpu_period) = (quota, period);
            };
            let cgroup = plan(limited).expect("a plan").cgroup.expect("a cgroup");
            assert!(cgroup.to_string().ends_with(expected), "{cgroup}");
        }
        for (quota, period, field) in [
            (Some(0), None, "quota: is 0 microseconds, must be from 1000 to "),
            (Some(999), None, "quota: is 999 "),
            (Some(1 << 44), None, "quota: is 17592186044416 "),
            (None, Some(999), "period: is 999 microseconds, must be from 1000 to 1000000"),
            (None, Some(1_000_001), "period: is 1000001 "),
        ] {
            let errors = errors(|s| {
                (s.resource_limits.cpu_quota, s.resource_limits.cpu_period) = (quota, period);
            });
            assert!(errors[0].starts_with(&format!("resource_limits.cpu_{field}")), "{errors:?}");
        }
        let errors = errors(|s| {
            s.box_id = "../b".into();
            s.resource_limits.memory_swap = Some(0);
        });
        assert!(errors[0].starts_with("box_id: is \"../b\", but with limits"), "{errors:?}");
        assert!(plan(|s| s.box_id = "../b".into()).is_ok(), "a name only matters with limits");
    }

    #[test]
    fn a_missing_virtiofsd_says_how_to_get_it() {
        let mut report = Report::default();
        let environment =
            Environment { virtiofsd: Some("/no/virtiofsd".into()), ..Environment::default() };
        assert!(Plan::new(&spec(), &environment, &mut report).is_none());
        assert_eq!(
            report.errors[0].to_string(),
            "MOTE_VIRTIOFSD: /no/virtiofsd is not an executable file"
        );
    }
}
