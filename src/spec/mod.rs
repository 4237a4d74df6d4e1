//! The `InstanceSpec` as written: the fields of the contract (§1), the aliases and additions of
//! later contract versions (§1.8), and nothing else. No I/O, and no checks of what the values mean:
//! [`crate::plan`] does that.

pub mod json;
mod network;
pub mod process;

use std::cell::RefCell;
use std::path::PathBuf;

pub use network::Network;

use crate::spec::json::{Json, Node, Object, Report};
use crate::spec::process::{GuestMount, Process, SignalsTo, Start};

/// What the box runtime asks for. Field order and defaults are the contract's (§1.2). Where a value could not
/// be read, there is a placeholder, of which the report knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Identity of the box, for messages and names.
    pub box_id: String,
    /// Number of virtual CPUs.
    pub vcpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// Host directory that becomes the guest's `/`.
    pub rootfs_path: PathBuf,
    /// Host Unix socket for exec; empty for none.
    pub exec_socket_path: PathBuf,
    /// Host Unix socket for terminals; empty for none.
    pub pty_socket_path: PathBuf,
    /// Host Unix socket for attestation; empty for none.
    pub attest_socket_path: PathBuf,
    /// Host Unix socket for the forwarding of ports by the image's own guest init (§1.8); empty for none.
    pub port_forward_socket_path: PathBuf,
    /// Further host directories for the guest.
    pub fs_mounts: Vec<FsMount>,
    /// The program to run.
    pub entrypoint: Entrypoint,
    /// File that receives the guest's output; `None` is mote's own stdout and stderr.
    pub console_output: Option<PathBuf>,
    /// Most bytes of `console_output`; mote's own.
    pub console_limit_bytes: Option<u64>,
    /// How the output is logged beside `console_output`; `None` is not at all.
    pub log_config: Option<LogConfig>,
    /// Directory the entrypoint starts in.
    pub workdir: String,
    /// Confidential computing.
    pub tee_config: Option<TeeConfig>,
    /// Published TCP ports, `"HOST:GUEST"`.
    pub port_map: Vec<String>,
    /// User to run the entrypoint as.
    pub user: Option<String>,
    /// Virtual network interface; `None` is TSI.
    pub network: Option<Network>,
    /// Whether there is no network but loopback, if there is no interface either (§1.8).
    pub disable_tsi: bool,
    /// Whose agent serves the box's sockets.
    pub guest_agent: GuestAgent,
    /// Rules for where the box may connect to; `None` is no rules.
    pub egress: Option<Vec<String>>,
    /// Limits on the box.
    pub resource_limits: ResourceLimits,
    /// Who the entrypoint runs as, exactly; mote's own, as all that follow.
    pub process: Option<Process>,
    /// The guest's host name; `None` is what contract §7.1 says.
    pub hostname: Option<String>,
    /// Its NIS domain name.
    pub domainname: Option<String>,
    /// Names of sysctl(8) and their values in the guest.
    pub sysctls: Vec<(String, String)>,
    /// File systems that the guest mounts.
    pub guest_mounts: Vec<GuestMount>,
    /// Which devices are in the guest's `/dev` beside those that every program expects; `None` is all that its kernel has.
    pub devices: Option<Vec<String>>,
    /// Paths that the box's programs find empty.
    pub masked_paths: Vec<String>,
    /// Paths that they cannot change.
    pub readonly_paths: Vec<String>,
    /// Whether the guest's `/` is read-only once everything is mounted.
    pub read_only_root: bool,
    /// What a signal to mote is.
    pub signals: SignalsTo,
    /// Whether all TCP ports on which the box's programs listen are published, beside those of `port_map`.
    pub publish_listeners: bool,
    /// Whether the box shares the loopback and the addresses of mote's network namespace.
    pub shares_loopback: bool,
}

/// How the entrypoint's output is logged (§2.11): the driver and its options, as they are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// What writes the log.
    pub driver: LogDriver,
    /// Size at which a file is full.
    pub max_size: Option<String>,
    /// Most files of one log.
    pub max_file: Option<String>,
    /// Where the syslog server listens.
    pub syslog_address: Option<String>,
    /// Syslog's name for the kind of program.
    pub syslog_facility: Option<String>,
    /// The program's name in syslog.
    pub tag: Option<String>,
}

/// What writes the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogDriver {
    /// A file of JSON objects.
    JsonFile,
    /// A syslog server.
    Syslog,
    /// Nothing.
    None,
}

/// Whose agent serves the box's sockets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GuestAgent {
    /// mote's own.
    #[default]
    Mote,
    /// One that a program of the image starts; mote's own until it listens.
    Image,
}

/// One shared directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FsMount {
    /// Name by which the guest mounts it.
    pub tag: String,
    /// Directory on the host.
    pub host_path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// A program, its arguments and environment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entrypoint {
    /// Path in the guest, or a name to look up in `PATH`.
    pub executable: String,
    /// Arguments after `argv[0]`.
    pub args: Vec<String>,
    /// Environment entries in order.
    pub env: Vec<(String, String)>,
    /// How it starts; mote's own.
    pub start: Start,
}

impl Entrypoint {
    /// The index in `env` of the variable of this name: the last one counts.
    pub fn variable(&self, name: &str) -> Option<usize> {
        self.env.iter().rposition(|(known, _)| known == name)
    }
}

/// Confidential computing settings; parsed so that they can be refused by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TeeConfig {
    /// Runtime-written configuration file.
    pub config_path: PathBuf,
    /// Kind of TEE.
    pub tee_type: String,
}

/// Limits; every one is optional.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResourceLimits {
    /// Most processes in the box.
    pub pids_limit: Option<u64>,
    /// Host CPUs the VM may use, e.g. `0-3,6`.
    pub cpuset_cpus: Option<String>,
    /// `NAME=SOFT:HARD`.
    pub ulimits: Vec<String>,
    /// Relative CPU weight (cgroup v1 scale, 2 to 262144).
    pub cpu_shares: Option<u64>,
    /// CPU time per period in microseconds; negative is unlimited.
    pub cpu_quota: Option<i64>,
    /// Length of the period in microseconds.
    pub cpu_period: Option<u64>,
    /// Memory to protect from reclaim, in bytes.
    pub memory_reservation: Option<u64>,
    /// Swap limit in bytes; negative is unlimited.
    pub memory_swap: Option<i64>,
}

impl Spec {
    /// Parses the JSON text of a spec. What is wrong with its members is added to `report`: with errors
    /// there, the spec is only good for finding further ones.
    ///
    /// # Errors
    /// The text has no members: it is not JSON, or not an object. The message goes on behind the name of
    /// what was read.
    pub fn parse(text: &str, report: &mut Report) -> Result<Spec, String> {
        let json = Json::parse(text).map_err(|error| format!("is not JSON: {error}"))?;
        let cell = RefCell::new(std::mem::take(report));
        let spec = Object::root(&json, &cell).map(read_spec);
        *report = cell.into_inner();
        spec
    }
}

fn read_spec(mut o: Object<'_>) -> Spec {
    let spec = Spec {
        box_id: o
            .required("box_id", "the box's identity, a string", Node::string)
            .unwrap_or_default(),
        vcpus: o.required("vcpus", "the number of virtual CPUs", Node::integer).unwrap_or_default(),
        memory_mib: o
            .required("memory_mib", "the guest's RAM in MiB", Node::integer)
            .unwrap_or_default(),
        rootfs_path: read_rootfs(&mut o).unwrap_or_default(),
        exec_socket_path: o
            .required("exec_socket_path", "a socket path, or \"\" for none", path)
            .unwrap_or_default(),
        pty_socket_path: o.optional("pty_socket_path", path),
        attest_socket_path: o.optional("attest_socket_path", path),
        port_forward_socket_path: o.nullable("port_forward_socket_path", path).unwrap_or_default(),
        fs_mounts: o
            .required("fs_mounts", "an array of shares, [] for none", |n| {
                n.array(read_fs_mount, FsMount::default)
            })
            .unwrap_or_default(),
        entrypoint: o
            .required("entrypoint", "an object with executable, args and env", read_entrypoint)
            .unwrap_or_default(),
        console_output: o.nullable("console_output", path),
        console_limit_bytes: o.nullable("console_limit_bytes", Node::integer),
        log_config: o.nullable("log_config", read_log_config),
        workdir: o
            .required("workdir", "the entrypoint's directory, \"/\"", Node::string)
            .unwrap_or_default(),
        tee_config: o.nullable("tee_config", read_tee_config),
        port_map: o.optional("port_map", Node::strings),
        user: o.nullable("user", Node::string),
        network: o.nullable("network", network::read),
        disable_tsi: o.nullable("disable_tsi", Node::boolean).unwrap_or_default(),
        guest_agent: o.optional("guest_agent", read_guest_agent),
        egress: o.nullable("egress", Node::strings),
        resource_limits: o.optional("resource_limits", read_resource_limits),
        process: o.nullable("process", process::read_process),
        hostname: o.nullable("hostname", Node::string),
        domainname: o.nullable("domainname", Node::string),
        sysctls: o.optional("sysctls", process::read_sysctls),
        guest_mounts: o.optional("guest_mounts", |n| {
            n.array(process::read_guest_mount, process::no_guest_mount)
        }),
        devices: o.nullable("devices", Node::strings),
        masked_paths: o.optional("masked_paths", Node::strings),
        readonly_paths: o.optional("readonly_paths", Node::strings),
        read_only_root: o.nullable("read_only_root", Node::boolean).unwrap_or_default(),
        signals: o.optional("signals", process::read_signals),
        publish_listeners: o.optional("publish", process::read_publish),
        shares_loopback: o.optional("loopback", process::read_loopback),
    };
    refuse_later_fields(&mut o);
    o.finish();
    spec
}

fn path(node: &Node<'_>) -> Option<PathBuf> {
    node.string().map(PathBuf::from)
}

/// `rootfs_path`, or `rootfs` as later versions write it: a string or `{"kind":"directory",…}`.
fn read_rootfs(o: &mut Object<'_>) -> Option<PathBuf> {
    let later = o.member("rootfs");
    match (o.member("rootfs_path"), later) {
        (Some(_), Some(later)) => {
            later.error("is the later name of rootfs_path, which is given too; keep one");
            o.unread("rootfs_path")
        }
        (Some(node), None) => node.read(path),
        (None, Some(node)) => read_later_rootfs(&node).or_else(|| o.unread("rootfs_path")),
        (None, None) => {
            o.required("rootfs_path", "the host directory of the root file system", path)
        }
    }
}

fn read_later_rootfs(node: &Node<'_>) -> Option<PathBuf> {
    if node.as_str().is_some() {
        return path(node);
    }
    let mut o = node.object()?;
    let is_directory = o.required("kind", "\"directory\"", |kind| {
        let name = kind.string()?;
        if name != "directory" {
            kind.error(format!("is \"{name}\", which mote cannot boot; use \"directory\""));
        }
        Some(name == "directory")
    });
    // Other kinds have other members.
    if !is_directory? {
        return None;
    }
    let path = o.required("path", "a host directory", path);
    o.finish();
    path
}

fn read_fs_mount(node: &Node<'_>) -> Option<FsMount> {
    let mut o = node.object()?;
    let mount = FsMount {
        tag: o.required("tag", "the share's name", Node::string).unwrap_or_default(),
        host_path: o.required("host_path", "a host directory", path).unwrap_or_default(),
        read_only: o.required("read_only", "true or false", Node::boolean).unwrap_or(true),
    };
    o.finish();
    Some(mount)
}

fn read_entrypoint(node: &Node<'_>) -> Option<Entrypoint> {
    let mut o = node.object()?;
    let executable = o.required("executable", "a program's path or name", Node::string);
    let args = o.required("args", "an array of strings, [] for none", Node::strings);
    let env = o.required("env", "an array of [name, value] pairs, [] for none", |n| {
        n.array(Node::pair, Default::default)
    });
    let start = Start {
        stdin: o.nullable("stdin", Node::boolean).unwrap_or_default(),
        terminal: o.nullable("terminal", Node::boolean).unwrap_or_default(),
        on_request: o.optional("start", process::read_on_request),
        pid1: o.nullable("pid1", Node::boolean).unwrap_or_default(),
    };
    o.finish();
    Some(Entrypoint {
        start,
        executable: executable.unwrap_or_default(),
        args: args.unwrap_or_default(),
        env: env.unwrap_or_default(),
    })
}

fn read_guest_agent(node: &Node<'_>) -> Option<GuestAgent> {
    match node.string()?.as_str() {
        "mote" => Some(GuestAgent::Mote),
        "image" => Some(GuestAgent::Image),
        other => {
            node.error(format!("is \"{other}\", must be \"mote\" or \"image\""));
            None
        }
    }
}

fn read_log_config(node: &Node<'_>) -> Option<LogConfig> {
    let mut o = node.object()?;
    let driver = o.required("driver", "\"json-file\", \"syslog\" or \"none\"", |node| {
        match node.string()?.as_str() {
            "json-file" => Some(LogDriver::JsonFile),
            "syslog" => Some(LogDriver::Syslog),
            "none" => Some(LogDriver::None),
            other => {
                node.error(format!(
                    "is \"{other}\", must be \"json-file\", \"syslog\" or \"none\""
                ));
                None
            }
        }
    });
    let mut options = o.member("options").and_then(|node| node.object());
    let mut option = |name| options.as_mut().and_then(|o| o.nullable(name, Node::string));
    let config = LogConfig {
        driver: driver.unwrap_or(LogDriver::None),
        max_size: option("max-size"),
        max_file: option("max-file"),
        syslog_address: option("syslog-address"),
        syslog_facility: option("syslog-facility"),
        tag: option("tag"),
    };
    if let Some(options) = options {
        options.refuse_others(
            "is an option that mote does not have; it has max-size, max-file, syslog-address, syslog-facility and tag",
        );
    }
    o.finish();
    Some(config)
}

fn read_tee_config(node: &Node<'_>) -> Option<TeeConfig> {
    let mut o = node.object()?;
    let config_path = o.required("config_path", "a file path", path);
    let tee_type = o.required("tee_type", "a string", Node::string);
    o.finish();
    Some(TeeConfig {
        config_path: config_path.unwrap_or_default(),
        tee_type: tee_type.unwrap_or_default(),
    })
}

fn read_resource_limits(node: &Node<'_>) -> Option<ResourceLimits> {
    let mut o = node.object()?;
    let limits = ResourceLimits {
        pids_limit: o.nullable("pids_limit", Node::integer),
        cpuset_cpus: o.nullable("cpuset_cpus", Node::string),
        ulimits: o.optional("ulimits", Node::strings),
        cpu_shares: o.nullable("cpu_shares", Node::integer),
        cpu_quota: o.nullable("cpu_quota", Node::integer),
        cpu_period: o.nullable("cpu_period", Node::integer),
        memory_reservation: o.nullable("memory_reservation", Node::integer),
        memory_swap: o.nullable("memory_swap", Node::integer),
    };
    o.nullable("sandbox_memory_limit_bytes", |node| {
        let limit: u64 = node.integer()?;
        node.warn("is not applied: the guest's memory is memory_mib, and mote bounds its own");
        Some(limit)
    });
    o.finish();
    Some(limits)
}

/// Refuses fields of later contract versions (§1.8), unless their values ask for nothing. What is only an
/// optimisation is warned of.
fn refuse_later_fields(o: &mut Object<'_>) {
    for name in ["block_devices", "snapshot_mem_file", "snapshot_sock", "restore_from"] {
        o.refuse(name);
    }
    o.nullable("ksm", |node| {
        let on = node.boolean()?;
        if on {
            node.warn("is not done: pages that guests share tell them of each other");
        }
        Some(on)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const MINIMAL: &str = r#"{"box_id":"b","vcpus":1,"memory_mib":256,"rootfs_path":"/r",
        "exec_socket_path":"","fs_mounts":[],
        "entrypoint":{"executable":"/bin/true","args":[],"env":[]},"workdir":"/"}"#;

    fn parse(text: &str) -> (Spec, Report) {
        let mut report = Report::default();
        let spec = Spec::parse(text, &mut report).expect("an object");
        (spec, report)
    }

    fn with(extra: &str) -> String {
        MINIMAL.replacen('{', &format!("{{{extra},"), 1)
    }

    fn errors(text: &str) -> Vec<String> {
        let (_, report) = parse(text);
        report.errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn required_fields_are_enough() {
        let (spec, report) = parse(MINIMAL);
        assert_eq!(report, Report::default());
        assert_eq!((spec.vcpus, spec.memory_mib), (1, 256));
        assert_eq!(spec.port_map, Vec::<String>::new());
        assert_eq!(spec.resource_limits, ResourceLimits::default());
    }

    #[test]
    fn every_missing_field_is_reported_at_once() {
        let errors = errors("{}");
        for name in [
            "box_id",
            "vcpus",
            "memory_mib",
            "rootfs_path",
            "exec_socket_path",
            "fs_mounts",
            "entrypoint",
            "workdir",
        ] {
            assert!(errors.iter().any(|e| e.starts_with(&format!("{name}: is missing"))), "{name}");
        }
        assert_eq!(errors.len(), 8);
    }

    #[test]
    fn wrong_types_name_their_path() {
        for (extra, expected) in [
            (r#""port_map":null"#, "port_map: is null, must be an array"),
            (r#""pty_socket_path":null"#, "pty_socket_path: is null, must be a string"),
            (r#""resource_limits":null"#, "resource_limits: is null, must be an object"),
            (r#""user":5"#, "user: is a number, must be a string"),
            (
                r#""resource_limits":{"pids_limit":-1}"#,
                "resource_limits.pids_limit: is -1, must be from 0 to 18446744073709551615",
            ),
            (
                r#""tee_config":{"config_path":"/x"}"#,
                "tee_config.tee_type: is missing; give a string",
            ),
            (r#""port_map":["1:2",3]"#, "port_map[1]: is a number, must be a string"),
        ] {
            assert_eq!(errors(&with(extra)), [expected]);
        }
        for (from, to, expected) in [
            ("\"vcpus\":1", "\"vcpus\":300", "vcpus: is 300, must be from 0 to 255"),
            (
                "\"vcpus\":1",
                "\"vcpus\":2.0",
                "vcpus: is 2, must be a whole number without a fraction or exponent",
            ),
            (
                "\"env\":[]",
                "\"env\":[[\"A\"]]",
                "entrypoint.env[0]: has 1 items, must be [name, value]",
            ),
            ("\"rootfs_path\"", "\"vcpus\":1,\"rootfs_path\"", "vcpus: is given twice; keep one"),
        ] {
            assert_eq!(errors(&MINIMAL.replacen(from, to, 1)), [expected]);
        }
    }

    #[test]
    fn nulls_are_absent_where_the_contract_says_so() {
        let nulls = r#""console_output":null,"tee_config":null,"user":null,"network":null"#;
        assert_eq!(parse(&with(nulls)).0, parse(MINIMAL).0);
    }

    #[test]
    fn unknown_fields_are_warnings_with_a_guess() {
        let (_, report) = parse(&with(r#""worksdir":"/x","zzz":1"#));
        let warnings: Vec<String> = report.warnings.iter().map(ToString::to_string).collect();
        assert_eq!(
            warnings,
            [
                "worksdir: is not a field of the spec and is ignored; did you mean workdir?",
                "zzz: is not a field of the spec and is ignored",
            ]
        );
    }

    #[test]
    fn later_fields_are_accepted_while_they_ask_for_nothing() {
        let later = r#""block_devices":[],"port_forward_socket_path":"","ksm":false,"disable_tsi":false,
            "snapshot_mem_file":null,"snapshot_sock":null,"restore_from":null"#;
        let (_, report) = parse(&with(later));
        assert_eq!(report, Report::default());
        for (extra, path) in [
            (r#""block_devices":[{"id":"a","path":"/d"}]"#, "block_devices"),
            (r#""restore_from":"/snap""#, "restore_from"),
        ] {
            let errors = errors(&with(extra));
            assert!(matches!(errors.as_slice(), [e] if e.starts_with(path)), "{errors:?}");
        }
        for (extra, path) in [
            (r#""ksm":true"#, "ksm"),
            (
                r#""resource_limits":{"sandbox_memory_limit_bytes":1}"#,
                "resource_limits.sandbox_memory_limit_bytes",
            ),
        ] {
            let (_, report) = parse(&with(extra));
            let [warning] = &report.warnings[..] else { panic!("{report:?}") };
            assert!(warning.to_string().starts_with(&format!("{path}: is not ")), "{warning}");
            assert!(report.errors.is_empty());
        }
    }

    #[test]
    fn logs_have_a_driver_and_its_options() {
        let (spec, report) = parse(&with(
            r#""log_config":{"driver":"json-file","options":{"max-size":"1m","tag":"t"}}"#,
        ));
        assert_eq!(report, Report::default());
        let log = spec.log_config.expect("a log");
        assert_eq!(log.driver, LogDriver::JsonFile);
        assert_eq!((log.max_size.as_deref(), log.tag.as_deref()), (Some("1m"), Some("t")));
        assert_eq!(parse(&with(r#""log_config":{"driver":"none"}"#)).1, Report::default());
        for (config, expected) in [
            ("{}", "log_config.driver: is missing; give"),
            (r#"{"driver":"journald"}"#, "log_config.driver: is \"journald\", must be"),
            (
                r#"{"driver":"none","options":{"compress":"true"}}"#,
                "log_config.options.compress: is an option that mote does not have",
            ),
            (
                r#"{"driver":"none","options":{"max-size":1}}"#,
                "log_config.options.max-size: is a number, must be a string",
            ),
            (r#"{"driver":"none","options":[]}"#, "log_config.options: is an array"),
        ] {
            let errors = errors(&with(&format!("\"log_config\":{config}")));
            assert!(matches!(&errors[..], [e] if e.starts_with(expected)), "{errors:?}");
        }
    }

    #[test]
    fn rootfs_has_two_names_and_two_shapes() {
        let renamed = |value: &str| MINIMAL.replace(r#""rootfs_path":"/r""#, value);
        for value in [r#""rootfs":"/r""#, r#""rootfs":{"kind":"directory","path":"/r"}"#] {
            assert_eq!(parse(&renamed(value)).0, parse(MINIMAL).0);
        }
        assert_eq!(
            errors(&renamed(r#""rootfs":{"kind":"ext4_disk","path":"/d"}"#)),
            [r#"rootfs.kind: is "ext4_disk", which mote cannot boot; use "directory""#]
        );
    }

    #[test]
    fn network_socket_has_two_names() {
        let network = |name: &str| {
            with(&format!(
                r#""network":{{"{name}":"/p","ip_address":"10.0.0.2","gateway":"10.0.0.1",
                "prefix_len":24,"mac_address":[2,66,10,0,0,2]}}"#
            ))
        };
        let (spec, report) = parse(&network("passt_socket_path"));
        assert_eq!(report, Report::default());
        assert_eq!(parse(&network("net_socket_path")).0, spec);
        assert!(errors(&network("socket"))[0].starts_with("network.passt_socket_path: is missing"));
        // As runtime 3.3 writes it.
        let later = r#"net_socket_fd":7,"net_proxy_fd":8,"bridge_socket_dir":"/s","networks_json":"/n",
            "network_name":"bridge","net_socket_path"#;
        let (spec, report) = parse(&network(later));
        assert_eq!(report, Report::default());
        let network = spec.network.expect("a network");
        assert_eq!((network.socket_fd, network.proxy_fd), (Some(7), Some(8)));
    }

    #[test]
    fn what_has_no_members_says_so() {
        let refused = |text| Spec::parse(text, &mut Report::default()).expect_err(text);
        let cut = refused("{\"a\":");
        assert!(cut.starts_with("is not JSON: EOF") && cut.contains("line 1"), "{cut}");
        assert_eq!(refused("[]"), "is an array, must be an object");
    }

    /// The reference runtime's own type: its serialised form must parse to the same values.
    #[test]
    fn specs_of_a3s_box_core_parse() {
        use a3s_box_core::vmm as a3s;
        let text = serde_json::to_string(&a3s::InstanceSpec::default()).expect("serialises");
        let (spec, report) = parse(&text);
        assert_eq!(report, Report::default());
        assert_eq!(spec.memory_mib, 512);

        let full = a3s::InstanceSpec {
            box_id: "3f0c".into(),
            vcpus: 4,
            memory_mib: 2048,
            rootfs_path: "/boxes/merged".into(),
            exec_socket_path: "/boxes/exec.sock".into(),
            pty_socket_path: "/boxes/pty.sock".into(),
            attest_socket_path: "/boxes/attest.sock".into(),
            fs_mounts: vec![a3s::FsMount {
                tag: "vol0".into(),
                host_path: "/srv".into(),
                read_only: true,
            }],
            entrypoint: a3s::Entrypoint {
                executable: "/sbin/init".into(),
                args: vec!["a b".into()],
                env: vec![("K".into(), "v=\"1\"\n".into())],
            },
            console_output: Some("/boxes/console.log".into()),
            workdir: "/work".into(),
            tee_config: Some(a3s::TeeInstanceConfig {
                config_path: "/tee".into(),
                tee_type: "snp".into(),
            }),
            port_map: vec!["8080:80".into()],
            user: Some("1000:1000".into()),
            network: Some(a3s::NetworkInstanceConfig {
                passt_socket_path: "/passt".into(),
                ip_address: Ipv4Addr::new(10, 88, 0, 2),
                gateway: Ipv4Addr::new(10, 88, 0, 1),
                prefix_len: 24,
                mac_address: [2, 66, 10, 88, 0, 2],
                dns_servers: vec![Ipv4Addr::new(8, 8, 8, 8)],
            }),
            resource_limits: a3s_box_core::config::ResourceLimits {
                pids_limit: Some(50),
                cpuset_cpus: Some("0-1".into()),
                ulimits: vec!["nofile=1:2".into()],
                cpu_shares: Some(512),
                cpu_quota: Some(-1),
                cpu_period: Some(100_000),
                memory_reservation: Some(1 << 40),
                memory_swap: Some(-1),
            },
        };
        let (spec, report) = parse(&serde_json::to_string(&full).expect("serialises"));
        assert_eq!(report, Report::default());
        assert_eq!(spec.entrypoint.env, full.entrypoint.env);
        assert_eq!(spec.network.expect("a network").mac_address, [2, 66, 10, 88, 0, 2]);
        assert_eq!(spec.resource_limits.memory_reservation, Some(1 << 40));
        assert_eq!(spec.tee_config.expect("tee").tee_type, "snp");
    }

    /// The same type as the runtime of today has it.
    #[test]
    fn specs_of_a3s_box_core_3_parse() {
        use a3s_box_core_3::{log, vmm as a3s};
        let text = serde_json::to_string(&a3s::InstanceSpec::default()).expect("serialises");
        assert_eq!(parse(&text).1, Report::default());

        let full = a3s::InstanceSpec {
            rootfs: a3s::RootfsSource::directory("/boxes/merged"),
            port_forward_socket_path: "/boxes/portfwd.sock".into(),
            port_map: vec!["8080:80".into(), "5300:53/udp".into()],
            disable_tsi: true,
            ksm: true,
            log_config: log::LogConfig {
                driver: log::LogDriver::JsonFile,
                options: [("max-size".to_owned(), "1m".to_owned())].into(),
            },
            network: Some(a3s::NetworkInstanceConfig {
                net_socket_path: "/passt".into(),
                net_stats_path: None,
                net_socket_fd: Some(42),
                net_proxy_fd: Some(43),
                bridge_socket_dir: Some("/switch".into()),
                ip_address: Ipv4Addr::new(10, 88, 0, 2),
                gateway: Ipv4Addr::new(10, 88, 0, 1),
                prefix_len: 24,
                mac_address: [2, 66, 10, 88, 0, 2],
                dns_servers: Vec::new(),
                networks_json: Some("/networks.json".into()),
                network_name: Some("one".into()),
            }),
            resource_limits: a3s_box_core_3::config::ResourceLimits {
                sandbox_memory_limit_bytes: Some(1 << 30),
                ..Default::default()
            },
            ..Default::default()
        };
        let (spec, report) = parse(&serde_json::to_string(&full).expect("serialises"));
        assert_eq!(report.errors, []);
        assert_eq!(spec.rootfs_path, std::path::Path::new("/boxes/merged"));
        assert_eq!(spec.port_map, full.port_map);
        assert!(spec.disable_tsi);
        let network = spec.network.expect("a network");
        assert_eq!(network.networks_json.as_deref(), Some("/networks.json".as_ref()));
    }
}
