//! [`Spec`] to [`Plan`]: the one place where the spec is checked against this host. Everything wrong is
//! reported at once with its path in the spec; after this stage a failure means that the host
//! refused something, not that the user mistyped.
//!
//! Planning changes nothing on the host, so `mote check` is this stage and a printout. [`Plan::new`]
//! lists the parts that are checked; each has a file of its own.

mod attestation;
mod egress;
mod environment;
mod guest_init;
mod hosts;
mod image;
mod init_files;
mod instance;
mod limits;
mod logs;
mod name_servers;
mod network;
mod networking;
mod networks_file;
mod open_files;
mod output;
mod paths;
mod ports;
mod process;
mod security;
mod shares;
mod sockets;
mod switch;
mod tee;
mod templates;
#[cfg(test)]
mod testing;
mod variables;
mod volumes;

use std::fmt;
use std::path::PathBuf;

use mote_agent::attestation::Options;
use mote_agent::flow::Protocol;
use mote_agent::instance::{Instance, Mount, ROOT_TAG, Rlimit};

pub use environment::{Environment, virtiofsd};
pub use image::{Image, attest, cold_text};
pub use init_files::StatusFile;
pub use logs::{JsonFile, LogDriver, Logs, Syslog};
pub use network::{Network, PasstSocket};
pub use networking::Networking;
pub use output::{ConsoleFile, Output};
pub use paths::MAX_SOCKET_PATH;
pub use ports::PublishedPort;
pub use process::{BIND_OPTIONS, capability};
pub use security::CAPABILITIES;
pub use shares::{Share, guests_directories};
pub use sockets::HostSocket;
pub use switch::{Switch, owner as socket_owner, socket_name};
pub use tee::Technology;
pub use templates::{Templates, plan as templates};

use guest_init::GuestInit;

use crate::cgroup::Cgroup;
use crate::confine::{Isolation, Sandbox};
use crate::cpuset::CpuSet;
use crate::memory::ColdText;
use crate::resolv_conf;
use crate::spec::Spec;
use crate::spec::json::Report;
use crate::spec::process::SignalsTo;

/// A VM to build: checked, with all defaults applied.
#[derive(Debug)]
pub struct Plan {
    /// Identity of the box, for messages.
    pub box_id: String,
    /// Number of virtual CPUs, 1 to [`crate::layout::MAX_VCPUS`].
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
    /// Where the guest's output goes.
    pub output: Output,
    /// Where the runtime looks for the exit code of a box whose init is mote's agent.
    pub status_file: Option<StatusFile>,
    /// By what the box is to be protected from its host: such a box does not start ([`crate::tee`]).
    pub tee: Option<Technology>,
    /// The attestation server that the guest has, if any.
    pub attestation: Option<Options>,
    /// What the agent is told.
    pub instance: Instance,
    /// What a signal to mote is.
    pub signals: SignalsTo,
    /// The vmlinux to boot.
    pub kernel: Image,
    /// The archive with the agent.
    pub initramfs: Image,
    /// A virtiofsd to run in place of mote's own.
    pub virtiofsd: Option<PathBuf>,
    /// Where the templates are that it may start from.
    pub templates: Templates,
    /// Whether it has no memory for the built-in kernel's text that other boxes have as well.
    pub own_text: bool,
    /// Whether the kernel prints all its messages.
    pub debug: bool,
    /// How mote is confined.
    pub sandbox: Sandbox,
}

impl Plan {
    /// What the kernel has as its cold text, if it is the built-in one.
    pub fn cold_text(&self) -> Option<ColdText> {
        let how = if self.own_text { ColdText::Own } else { ColdText::Shared };
        matches!(self.kernel, Image::BuiltIn(_)).then(|| how(cold_text()))
    }

    /// Checks a spec against this host and adds what is wrong to `report`, which has what was wrong at
    /// reading. Returns `None` if there are errors.
    pub fn new(spec: &Spec, environment: &Environment, report: &mut Report) -> Option<Plan> {
        limits::check_size(spec, report);
        let cpus = limits::plan_cpus(spec, report);
        let guests = guests_directories(spec);
        let mut init = GuestInit::new(spec, &guests, report);
        let cgroup = limits::plan_cgroup(spec, &init, report);
        let mut shares = shares::plan(spec, report);
        shares.retain(|share| !(init.has_inits_shares && init_files::is_inits_share(&share.tag)));
        let attestation = attestation::plan(spec, report);
        let sockets = sockets::plan(spec, attestation.is_some(), report);
        let published_ports = ports::plan(&spec.port_map, report);
        let output = output::plan(spec, &guests, report);
        // Read once. A box with a network of its own has name servers of its own.
        let host = spec.network.is_none().then(resolv_conf::of_host).unwrap_or_default();
        let networking = Networking::new(spec, &host, report);
        shares::warn_of_paths_that_guests_can_move(spec, &guests, report);
        let status_file = init.status.take();
        let instance =
            instance::plan(spec, init, &networking, &published_ports, &host, attestation, report);
        let tee = tee::plan(spec, report);
        let kernel =
            image::plan(environment.kernel.as_deref(), Image::kernel(), "MOTE_KERNEL", report);
        let initramfs = image::plan(
            environment.initramfs.as_deref(),
            Image::initramfs(),
            "MOTE_INITRAMFS",
            report,
        );
        let virtiofsd = virtiofsd(environment, report);
        let templates = templates::plan(environment, &guests, report);
        if !report.errors.is_empty() {
            return None;
        }
        let network = networking.access(&published_ports);
        let isolation =
            if environment.no_sandbox { Isolation::Off } else { Isolation::of_host(network) };
        let sandbox = Sandbox {
            isolation,
            network,
            open_files: open_files::limit(spec, &shares, &sockets, &published_ports),
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
            output: output?,
            status_file,
            tee,
            attestation,
            instance,
            signals: spec.signals,
            kernel: kernel?,
            initramfs: initramfs?,
            virtiofsd,
            templates,
            own_text: environment.own_text,
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
            devices,
            pids_limit,
            rlimits,
            entrypoint,
            workdir,
            user,
            start,
            process,
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
        for PublishedPort { protocol, host, guest } in &self.published_ports {
            let suffix = match protocol {
                Protocol::Tcp => "",
                Protocol::Udp => "/udp",
            };
            writeln!(f, "port       {host}{suffix} -> guest port {guest}{suffix}")?;
        }
        if let Some(network) = self.networking.own() {
            writeln!(f, "network    {network}")?;
        }
        match self.networking.policy() {
            Some(policy) => writeln!(f, "egress     {}", policy.rules())?,
            None => writeln!(f, "network    none but loopback")?,
        }
        if self.simulates_attestation() {
            writeln!(f, "attestation  SIMULATED: proves nothing")?;
        }
        writeln!(f, "console    {}", self.output)?;
        if let Some(status) = &self.status_file {
            writeln!(f, "exit code  {}", status.file.path.display())?;
        }
        for mount in mounts {
            match mount {
                Mount::Share { tag, path, read_only, .. } => {
                    let mode = if *read_only { " (read-only)" } else { "" };
                    writeln!(f, "mount      {tag} on {path}{mode}")?;
                }
                Mount::File { tag, path, read_only } => {
                    let mode = if *read_only { " (read-only)" } else { "" };
                    writeln!(f, "mount      a file of {tag} on {path}{mode}")?;
                }
                Mount::Tmpfs { path, options, .. } => {
                    writeln!(f, "mount      tmpfs on {path} {options}")?
                }
                Mount::Bind { source, path, options } => {
                    writeln!(f, "mount      {source} of the root file system on {path} {options}")?
                }
            }
        }
        if let Some(more) = devices {
            writeln!(f, "devices    the standard ones {}", more.join(" "))?;
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
        match process {
            Some(process) => writeln!(f, "as         {}:{}", process.uid, process.gid)?,
            None => writeln!(f, "as         {}", user.as_deref().unwrap_or("root"))?,
        }
        for (is_so, words) in [
            (start.stdin, "with mote's standard input"),
            (start.terminal.is_some(), "on a terminal"),
            (start.on_request, "once a client asks for its start"),
            (start.pid1, "as process 1"),
        ] {
            if is_so {
                writeln!(f, "start      {words}")?;
            }
        }
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
        writeln!(f, "kernel     {}", self.kernel)?;
        writeln!(f, "initramfs  {}", self.initramfs)?;
        match &self.virtiofsd {
            None => writeln!(f, "virtiofsd  built in")?,
            Some(path) => writeln!(f, "virtiofsd  {}", path.display())?,
        }
        write!(f, "confined   {}", self.sandbox.isolation)
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

    /// The errors of the spec that other tests change, with these members in place of its own.
    fn errors_of(members: serde_json::Value) -> Vec<String> {
        let mut spec = serde_json::json!({
            "box_id": "b", "vcpus": 1, "memory_mib": 256, "rootfs_path": "/", "exec_socket_path": "",
            "fs_mounts": [], "workdir": "/",
            "entrypoint": {"executable": "/bin/true", "args": [], "env": []},
        });
        for (name, value) in members.as_object().expect("an object") {
            spec[name] = value.clone();
        }
        let mut report = Report::default();
        let spec = Spec::parse(&spec.to_string(), &mut report).expect("an object");
        assert!(Plan::new(&spec, &testing::environment(), &mut report).is_none());
        assert_eq!(report.warnings, []);
        report.errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn errors_of_reading_do_not_hide_those_of_value() {
        let errors = errors_of(serde_json::json!({
            "vcpus": "2",
            "memory_mib": 1,
            "fs_mounts": [5, {"tag": "", "host_path": 7, "read_only": true}],
            "port_map": [1, "x", "80:80"],
            "workdir": null,
            "egress": ["deny:10.0.0.0/8", 1, "permit:1.1.1.1"],
            "resource_limits": {"pids_limit": -1, "cpu_period": 1},
            "network": {
                "ip_address": "10.0.0.300", "gateway": "127.0.0.1", "prefix_len": 40,
                "mac_address": [1, 0, 0, 0, 0, 0], "dns_servers": ["x", "0.0.0.0"],
            },
            "entrypoint": {"executable": "", "env": [["A"], ["B=", ""]]},
        }));
        let fields = [
            "vcpus: is a string",
            "fs_mounts[0]: is a number",
            "fs_mounts[1].host_path: is a number",
            "entrypoint.args: is missing",
            "entrypoint.env[0]: has 1 items",
            "workdir: is null",
            "port_map[0]: is a number",
            "network.passt_socket_path: is missing",
            "network.ip_address: is \"10.0.0.300\"",
            "network.dns_servers[0]: is \"x\"",
            "egress[1]: is a number",
            "resource_limits.pids_limit: is -1",
            // And those of value.
            "memory_mib: is 1",
            "resource_limits.cpu_period: is 1",
            "fs_mounts[1].tag: is empty",
            "port_map[1]: is \"x\"",
            "egress[2]: is \"permit",
            "network.mac_address: is 01:00:00:00:00:00",
            "network.gateway: is 127.0.0.1",
            "network.prefix_len: is 40",
            "network.dns_servers[1]: is 0.0.0.0",
            "entrypoint.executable: is empty",
            "entrypoint.env[1]: has the name \"B=\"",
        ];
        assert_eq!(errors.len(), fields.len(), "{errors:#?}");
        for (error, start) in errors.iter().zip(fields) {
            assert!(error.starts_with(start), "{error} in place of {start}");
        }
    }

    #[test]
    fn what_could_not_be_read_has_no_further_consequences() {
        let init = |executable: serde_json::Value| {
            serde_json::json!({"executable": executable, "args": [], "env": [
                ["BOX_EXEC_EXEC", "sleep"], ["BOX_EXEC_ARGC", "1"], ["BOX_SIDECAR_IMAGE", "x"],
            ]})
        };
        let network = |ip: &str, gateway: &str| {
            serde_json::json!({"passt_socket_path": "/tmp/passt", "ip_address": ip,
                "gateway": gateway, "prefix_len": 24, "mac_address": [2, 0, 0, 0, 0, 1]})
        };
        let env = |entries: serde_json::Value| serde_json::json!({"executable": "/bin/true", "args": [], "env": entries});
        for (members, expected) in [
            // Whose the variables are depends on what the image has.
            (
                serde_json::json!({"rootfs_path": 1, "user": "u", "entrypoint": init("/no".into())}),
                "rootfs_path: is a number",
            ),
            (
                serde_json::json!({"user": "u", "entrypoint": init(1.into())}),
                "entrypoint.executable: is a number",
            ),
            (
                serde_json::json!({"rootfs": {"kind": "disk"}, "rootfs_path": "/"}),
                "rootfs: is the later name",
            ),
            (
                serde_json::json!({"fs_mounts": 1, "entrypoint": env(serde_json::json!(
                    [["BOX_VOL_0", "data:/data"]]))}),
                "fs_mounts: is a number",
            ),
            (
                serde_json::json!({"network": 1, "entrypoint": env(serde_json::json!(
                    [["A3S_NET_IP", "10.0.0.2/24"]]))}),
                "network: is a number",
            ),
            (serde_json::json!({"network": network("x", "10.0.0.1")}), "network.ip_address: is"),
            (serde_json::json!({"network": network("10.0.0.2", "x")}), "network.gateway: is"),
            (
                serde_json::json!({"console_output": 1, "console_limit_bytes": 5}),
                "console_output: is a number",
            ),
            (
                serde_json::json!({"box_id": 1, "resource_limits": {"cpu_shares": 5}}),
                "box_id: is a number",
            ),
            (serde_json::json!({"egress": ["deny:10.0.0.0/8", 1]}), "egress[1]: is a number"),
        ] {
            let errors = errors_of(members);
            let [only] = &errors[..] else { panic!("{expected}: {errors:?}") };
            assert!(only.starts_with(expected), "{only}");
        }
    }
}
