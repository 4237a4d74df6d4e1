//! [`Spec`] to [`Plan`]: the one place where the spec is checked against this host. Everything wrong is
//! reported at once with its path in the spec; after this stage a failure means that the host
//! refused something, not that the user mistyped.
//!
//! Planning changes nothing on the host, so `mote check` is this stage and a printout. [`Plan::new`]
//! lists the parts that are checked; each has a file of its own.

mod egress;
mod environment;
mod guest_init;
mod image;
mod instance;
mod limits;
mod name_servers;
mod network;
mod paths;
mod ports;
mod shares;
mod sockets;
#[cfg(test)]
mod testing;

use std::fmt;
use std::fs;
use std::path::PathBuf;

use mote_agent::instance::{Instance, Mount, ROOT_TAG, Rlimit};

pub use environment::{Environment, find_virtiofsd};
pub use image::Image;
pub use network::{Network, Networking, PasstSocket};
pub use paths::{ConsoleFile, MAX_SOCKET_PATH};
pub use ports::PublishedPort;
pub use shares::{Share, guests_directories};
pub use sockets::HostSocket;

use crate::cgroup::Cgroup;
use crate::confine::{Isolation, Sandbox};
use crate::cpuset::CpuSet;
use crate::layout;
use crate::resolv_conf;
use crate::spec::Spec;
use crate::spec::json::Report;
use crate::virtio::vsock::table::MAX_CONNECTIONS;

/// Smallest guest memory in which kernel, agent and a small program fit.
const MIN_MEMORY_MIB: u32 = 64;

/// A VM to build: checked, with all defaults applied.
#[derive(Debug)]
pub struct Plan {
    /// Identity of the box, for messages.
    pub box_id: String,
    /// Number of virtual CPUs, 1 to [`layout::MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest RAM in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// The host CPUs to run on; `None` means all that mote may use.
    pub cpus: Option<CpuSet>,
    /// The cgroup to run in; `None` means the one that mote was started in.
    pub cgroup: Option<Cgroup>,
    /// Virtio-fs shares, the root file system first.
    pub shares: Vec<Share>,
    /// Host sockets and the guest ports behind them.
    pub sockets: Vec<HostSocket>,
    /// Published ports, in the spec's order.
    pub published_ports: Vec<PublishedPort>,
    /// How the box reaches the network.
    pub networking: Networking,
    /// File for the guest's output; `None` is mote's own stdout and stderr.
    pub console_output: Option<ConsoleFile>,
    /// What the agent is told.
    pub instance: Instance,
    /// The vmlinux to boot.
    pub kernel: Image,
    /// The archive with the agent.
    pub initramfs: Image,
    /// The virtio-fs daemon.
    pub virtiofsd: PathBuf,
    /// Whether the kernel prints all its messages.
    pub debug: bool,
    /// How mote is confined.
    pub sandbox: Sandbox,
}

impl Plan {
    /// Checks a spec against this host. Returns `None` if that adds errors to `report`.
    pub fn new(spec: &Spec, environment: &Environment, report: &mut Report) -> Option<Plan> {
        let errors_before = report.errors.len();
        check_size(spec, report);
        let cpus = limits::plan_cpus(spec, report);
        let cgroup = limits::plan_cgroup(spec, report);
        let shares = shares::plan(spec, report);
        let sockets = sockets::plan(spec, report);
        let published_ports = ports::plan(&spec.port_map, report);
        let guests = guests_directories(spec);
        let console_output = paths::plan_console(spec, &guests, report);
        // Read once. A box with a network of its own has name servers of its own.
        let host = spec.network.is_none().then(resolv_conf::of_host).unwrap_or_default();
        let networking = Networking::new(spec, &host, report);
        shares::warn_of_paths_that_guests_can_move(spec, &guests, report);
        let instance = instance::plan(spec, &networking, &host, report);
        refuse_unsupported(spec, report);
        let kernel =
            image::plan(environment.kernel.as_deref(), image::kernel(), "MOTE_KERNEL", report);
        let initramfs = image::plan(
            environment.initramfs.as_deref(),
            image::initramfs(),
            "MOTE_INITRAMFS",
            report,
        );
        let virtiofsd = find_virtiofsd(environment, report);
        if report.errors.len() > errors_before {
            return None;
        }
        let network = networking.access();
        let isolation =
            if environment.no_sandbox { Isolation::Off } else { Isolation::of_host(network) };
        let sandbox = Sandbox {
            isolation,
            network,
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
            networking,
            console_output,
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
            let path = socket.path.display();
            match (socket.guest_port, socket.fallback_port) {
                (Some(port), Some(own)) => {
                    writeln!(f, "socket     {path} -> guest port {port}, or {own} (mote's agent)")?
                }
                (Some(port), None) => writeln!(f, "socket     {path} -> guest port {port}")?,
                (None, _) => writeln!(f, "socket     {path} -> nobody")?,
            }
        }
        for PublishedPort { host, guest } in &self.published_ports {
            writeln!(f, "port       {host} -> guest port {guest}")?;
        }
        if let Some(network) = self.networking.own() {
            writeln!(f, "network    {network}")?;
        }
        writeln!(f, "egress     {}", self.networking.policy().rules())?;
        match &self.console_output {
            Some(ConsoleFile { file, limit_bytes }) => {
                writeln!(f, "console    {} (at most {limit_bytes} bytes)", file.path.display())?
            }
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
            let name = limits::ULIMITS
                .iter()
                .find(|(_, number)| number == resource)
                .map_or("?", |(n, _)| n);
            writeln!(
                f,
                "ulimit     {name}={}:{}",
                limits::limit_text(*soft),
                limits::limit_text(*hard)
            )?;
        }
        writeln!(f, "kernel     {}", self.kernel.origin)?;
        writeln!(f, "initramfs  {}", self.initramfs.origin)?;
        writeln!(f, "virtiofsd  {}", self.virtiofsd.display())?;
        write!(f, "confined   {}", self.sandbox.isolation)
    }
}

/// The descriptors that a box may need at once: one for every connection, and a few for each thing that
/// it has from the start.
fn open_files(vcpus: u8, shares: &[Share], sockets: &[HostSocket], ports: &[PublishedPort]) -> u64 {
    /// Standard streams, KVM, memory, the main loop with its devices, the control channel.
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

/// `MemTotal` of proc(5); `None` if it cannot be read.
fn host_memory_mib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

/// Refuses, by name, what the contract has and this version of mote has not: protection that is not
/// enforced is worse than none.
fn refuse_unsupported(spec: &Spec, report: &mut Report) {
    if spec.tee_config.is_some() {
        report.error(
            "tee_config",
            "asks for a confidential VM, which mote cannot run; leave it null",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{errors, plan};
    use super::*;

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
    fn without_a_network_of_its_own_the_guest_uses_the_hosts() {
        assert_eq!(plan(|_| ()).expect("a plan").networking.own(), None);
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
}
