//! The `InstanceSpec` as written: the fields of the contract (§1), the aliases and additions of
//! later contract versions (§1.8), and nothing else. No I/O, and no checks of what the values mean:
//! [`crate::plan`] does that.

pub mod json;

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use crate::spec::json::{Json, Node, Object, Report};

/// What the box runtime asks for. Field order and defaults are the contract's (§1.2).
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
    /// Further host directories for the guest.
    pub fs_mounts: Vec<FsMount>,
    /// The program to run.
    pub entrypoint: Entrypoint,
    /// File that receives the guest's output; `None` is mote's own stdout and stderr.
    pub console_output: Option<PathBuf>,
    /// Most bytes of `console_output`; mote's own.
    pub console_limit_bytes: Option<u64>,
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
    /// Whose agent serves the box's sockets.
    pub guest_agent: GuestAgent,
    /// Rules for where the box may connect to; `None` is no rules.
    pub egress: Option<Vec<String>>,
    /// Limits on the box.
    pub resource_limits: ResourceLimits,
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsMount {
    /// Name by which the guest mounts it.
    pub tag: String,
    /// Directory on the host.
    pub host_path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// A program, its arguments and environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entrypoint {
    /// Path in the guest, or a name to look up in `PATH`.
    pub executable: String,
    /// Arguments after `argv[0]`.
    pub args: Vec<String>,
    /// Environment entries in order.
    pub env: Vec<(String, String)>,
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

/// A passt network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// passt's Unix stream socket.
    pub passt_socket_path: PathBuf,
    /// The guest's address.
    pub ip_address: Ipv4Addr,
    /// The gateway's address.
    pub gateway: Ipv4Addr,
    /// Length of the subnet prefix in bits.
    pub prefix_len: u8,
    /// The guest interface's hardware address.
    pub mac_address: [u8; 6],
    /// Name servers.
    pub dns_servers: Vec<Ipv4Addr>,
    /// A descriptor that mote was started with: a stream of frames like passt's (§1.8).
    pub socket_fd: Option<i32>,
    /// The other end of `socket_fd`, for a shim that puts a switch of its own between that and passt.
    pub proxy_fd: Option<i32>,
    /// Directory in which the switches of one network find each other.
    pub bridge_socket_dir: Option<PathBuf>,
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
    /// Parses the JSON text of a spec and adds everything wrong with it to `report`. Returns `None`
    /// when there are errors.
    pub fn parse(text: &str, report: &mut Report) -> Option<Spec> {
        let json = match Json::parse(text) {
            Ok(json) => json,
            Err(error) => {
                report.error("", format!("is not JSON: {error}"));
                return None;
            }
        };
        let errors_before = report.errors.len();
        let cell = RefCell::new(std::mem::take(report));
        let spec = Node::root(&json, &cell).object().and_then(read_spec);
        *report = cell.into_inner();
        spec.filter(|_| report.errors.len() == errors_before)
    }
}

/// Reads every member before giving up on any, so that all errors are found.
fn read_spec(mut o: Object<'_>) -> Option<Spec> {
    let box_id = o.required("box_id", "the box's identity, a string").and_then(|n| n.string());
    let vcpus = o.required("vcpus", "the number of virtual CPUs").and_then(|n| n.integer());
    let memory_mib = o.required("memory_mib", "the guest's RAM in MiB").and_then(|n| n.integer());
    let rootfs_path = read_rootfs(&mut o);
    let exec_socket_path = o
        .required("exec_socket_path", "a socket path, or \"\" for none")
        .and_then(|n| n.string().map(PathBuf::from));
    let pty_socket_path = read_or_default(o.optional("pty_socket_path"), path);
    let attest_socket_path = read_or_default(o.optional("attest_socket_path"), path);
    let fs_mounts = o
        .required("fs_mounts", "an array of shares, [] for none")
        .and_then(|n| n.array(read_fs_mount));
    let entrypoint = o
        .required("entrypoint", "an object with executable, args and env")
        .and_then(read_entrypoint);
    let console_output = read_nullable(o.optional("console_output"), path);
    let console_limit_bytes = read_nullable(o.optional("console_limit_bytes"), Node::integer);
    let workdir =
        o.required("workdir", "the entrypoint's directory, \"/\"").and_then(|n| n.string());
    let tee_config = read_nullable(o.optional("tee_config"), read_tee_config);
    let port_map = read_or_default(o.optional("port_map"), |n| n.array(Node::string));
    let user = read_nullable(o.optional("user"), Node::string);
    let network = read_nullable(o.optional("network"), read_network);
    let guest_agent = read_or_default(o.optional("guest_agent"), read_guest_agent);
    let egress = read_nullable(o.optional("egress"), |n| n.array(Node::string));
    let resource_limits = read_or_default(o.optional("resource_limits"), read_resource_limits);
    refuse_later_fields(&mut o);
    o.finish();
    Some(Spec {
        box_id: box_id?,
        vcpus: vcpus?,
        memory_mib: memory_mib?,
        rootfs_path: rootfs_path?,
        exec_socket_path: exec_socket_path?,
        pty_socket_path: pty_socket_path?,
        attest_socket_path: attest_socket_path?,
        fs_mounts: fs_mounts?,
        entrypoint: entrypoint?,
        console_output: console_output?,
        console_limit_bytes: console_limit_bytes?,
        workdir: workdir?,
        tee_config: tee_config?,
        port_map: port_map?,
        user: user?,
        network: network?,
        guest_agent: guest_agent?,
        egress: egress?,
        resource_limits: resource_limits?,
    })
}

fn path(node: &Node<'_>) -> Option<PathBuf> {
    node.string().map(PathBuf::from)
}

/// Absent is the default; `null` is an error like any other wrong type (contract §1.1).
fn read_or_default<'a, T: Default>(
    node: Option<Node<'a>>,
    read: impl Fn(&Node<'a>) -> Option<T>,
) -> Option<T> {
    node.map_or_else(|| Some(T::default()), |node| read(&node))
}

/// Absent and `null` are both `None`.
fn read_nullable<'a, T>(
    node: Option<Node<'a>>,
    read: impl Fn(&Node<'a>) -> Option<T>,
) -> Option<Option<T>> {
    node.map_or(Some(None), |node| node.nullable(&read))
}

/// `rootfs_path`, or `rootfs` as later versions write it: a string or `{"kind":"directory",…}`.
fn read_rootfs(o: &mut Object<'_>) -> Option<PathBuf> {
    let later = o.optional("rootfs");
    match (o.optional("rootfs_path"), later) {
        (Some(_), Some(later)) => {
            later.error("is the later name of rootfs_path, which is given too; keep one");
            None
        }
        (Some(node), None) => path(&node),
        (None, Some(node)) if node.as_str().is_some() => path(&node),
        (None, Some(node)) => {
            let mut o = node.object()?;
            let kind = o.required("kind", "\"directory\"")?;
            match kind.string()?.as_str() {
                "directory" => {
                    let path = o.required("path", "a host directory").and_then(|n| n.string());
                    o.finish();
                    path.map(PathBuf::from)
                }
                other => {
                    kind.error(format!(
                        "is \"{other}\", which mote cannot boot; use \"directory\""
                    ));
                    None
                }
            }
        }
        (None, None) => {
            o.required("rootfs_path", "the host directory of the root file system").and(None)
        }
    }
}

fn read_fs_mount(node: &Node<'_>) -> Option<FsMount> {
    let mut o = node.object()?;
    let tag = o.required("tag", "the share's name").and_then(|n| n.string());
    let host_path = o.required("host_path", "a host directory").and_then(|n| path(&n));
    let read_only = o.required("read_only", "true or false").and_then(|n| n.boolean());
    o.finish();
    Some(FsMount { tag: tag?, host_path: host_path?, read_only: read_only? })
}

fn read_entrypoint(node: Node<'_>) -> Option<Entrypoint> {
    let mut o = node.object()?;
    let executable = o.required("executable", "a program's path or name").and_then(|n| n.string());
    let args = o.required("args", "an array of strings, [] for none");
    let args = args.and_then(|n| n.array(Node::string));
    let env = o.required("env", "an array of [name, value] pairs, [] for none");
    let env = env.and_then(|n| n.array(read_pair));
    o.finish();
    Some(Entrypoint { executable: executable?, args: args?, env: env? })
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

fn read_pair(node: &Node<'_>) -> Option<(String, String)> {
    match node.items()?.as_slice() {
        [name, value] => Some((name.string()?, value.string()?)),
        other => {
            node.error(format!("has {} items, must be [name, value]", other.len()));
            None
        }
    }
}

fn read_tee_config(node: &Node<'_>) -> Option<TeeConfig> {
    let mut o = node.object()?;
    let config_path = o.required("config_path", "a file path").and_then(|n| path(&n));
    let tee_type = o.required("tee_type", "a string").and_then(|n| n.string());
    o.finish();
    Some(TeeConfig { config_path: config_path?, tee_type: tee_type? })
}

fn read_network(node: &Node<'_>) -> Option<Network> {
    let mut o = node.object()?;
    let later = o.optional("net_socket_path");
    let passt_socket_path = match (o.optional("passt_socket_path"), later) {
        (Some(_), Some(later)) => {
            later.error("is the later name of passt_socket_path, which is given too; keep one");
            None
        }
        (Some(node), None) | (None, Some(node)) => path(&node),
        (None, None) => o.required("passt_socket_path", "passt's socket path").and(None),
    };
    let ip_address = o.required("ip_address", "an IPv4 address").and_then(|n| ipv4(&n));
    let gateway = o.required("gateway", "an IPv4 address").and_then(|n| ipv4(&n));
    let prefix_len =
        o.required("prefix_len", "the subnet's prefix length").and_then(|n| n.integer());
    let mac_address = o.required("mac_address", "an array of 6 numbers").and_then(|n| mac(&n));
    let dns_servers = read_or_default(o.optional("dns_servers"), |n| n.array(ipv4));
    let socket_fd = read_nullable(o.optional("net_socket_fd"), Node::integer);
    let proxy_fd = read_nullable(o.optional("net_proxy_fd"), Node::integer);
    let bridge_socket_dir = read_nullable(o.optional("bridge_socket_dir"), path);
    // Names for the runtime's own proxy; with passt there is no such proxy.
    for name in ["networks_json", "network_name"] {
        read_nullable(o.optional(name), Node::string);
    }
    refuse_unless_vacant(o.optional("net_stats_path"));
    o.finish();
    Some(Network {
        passt_socket_path: passt_socket_path?,
        ip_address: ip_address?,
        gateway: gateway?,
        prefix_len: prefix_len?,
        mac_address: mac_address?,
        dns_servers: dns_servers?,
        socket_fd: socket_fd?,
        proxy_fd: proxy_fd?,
        bridge_socket_dir: bridge_socket_dir?,
    })
}

fn ipv4(node: &Node<'_>) -> Option<Ipv4Addr> {
    let text = node.string()?;
    text.parse().ok().or_else(|| {
        node.error(format!("is \"{text}\", must be an IPv4 address like \"10.88.0.2\""));
        None
    })
}

fn mac(node: &Node<'_>) -> Option<[u8; 6]> {
    let bytes = node.array(Node::integer::<u8>)?;
    let count = bytes.len();
    bytes.try_into().ok().or_else(|| {
        node.error(format!("has {count} usable numbers, must have 6, each from 0 to 255"));
        None
    })
}

fn read_resource_limits(node: &Node<'_>) -> Option<ResourceLimits> {
    let mut o = node.object()?;
    let pids_limit = read_nullable(o.optional("pids_limit"), Node::integer);
    let cpuset_cpus = read_nullable(o.optional("cpuset_cpus"), Node::string);
    let ulimits = read_or_default(o.optional("ulimits"), |n| n.array(Node::string));
    let cpu_shares = read_nullable(o.optional("cpu_shares"), Node::integer);
    let cpu_quota = read_nullable(o.optional("cpu_quota"), Node::integer);
    let cpu_period = read_nullable(o.optional("cpu_period"), Node::integer);
    let memory_reservation = read_nullable(o.optional("memory_reservation"), Node::integer);
    let memory_swap = read_nullable(o.optional("memory_swap"), Node::integer);
    refuse_unless_vacant(o.optional("sandbox_memory_limit_bytes"));
    o.finish();
    Some(ResourceLimits {
        pids_limit: pids_limit?,
        cpuset_cpus: cpuset_cpus?,
        ulimits: ulimits?,
        cpu_shares: cpu_shares?,
        cpu_quota: cpu_quota?,
        cpu_period: cpu_period?,
        memory_reservation: memory_reservation?,
        memory_swap: memory_swap?,
    })
}

/// Refuses fields of later contract versions (§1.8), unless their values ask for nothing.
fn refuse_later_fields(o: &mut Object<'_>) {
    for name in [
        "block_devices",
        "port_forward_socket_path",
        "ksm",
        "snapshot_mem_file",
        "snapshot_sock",
        "restore_from",
        "disable_tsi",
    ] {
        refuse_unless_vacant(o.optional(name));
    }
    let Some(mut log) = o.optional("log_config").and_then(|node| node.object()) else { return };
    let driver = log.optional("driver");
    log.optional("options");
    log.finish();
    let Some(driver) = driver else { return };
    match driver.string().as_deref() {
        // The runtime's default, sent with every spec. Only a warning: console_output is unaffected.
        Some("json-file") => driver.warn(
            "asks for a JSON log beside console_output, which mote does not write; console_output holds the output as it is",
        ),
        Some("none") | None => {}
        Some(other) => {
            driver.error(format!("is \"{other}\", which mote cannot do; use \"none\" and read console_output"));
        }
    }
}

fn refuse_unless_vacant(node: Option<Node<'_>>) {
    if let Some(node) = node.filter(|node| !node.is_vacant()) {
        node.error("asks for something mote cannot do; leave it out");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"box_id":"b","vcpus":1,"memory_mib":256,"rootfs_path":"/r",
        "exec_socket_path":"","fs_mounts":[],
        "entrypoint":{"executable":"/bin/true","args":[],"env":[]},"workdir":"/"}"#;

    fn parse(text: &str) -> (Option<Spec>, Report) {
        let mut report = Report::default();
        let spec = Spec::parse(text, &mut report);
        (spec, report)
    }

    fn with(extra: &str) -> String {
        MINIMAL.replacen('{', &format!("{{{extra},"), 1)
    }

    fn errors(text: &str) -> Vec<String> {
        let (spec, report) = parse(text);
        assert_eq!(spec.is_none(), !report.errors.is_empty());
        report.errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn required_fields_are_enough() {
        let (spec, report) = parse(MINIMAL);
        assert_eq!(report, Report::default());
        let spec = spec.expect("a spec");
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
        let (spec, report) = parse(&with(r#""worksdir":"/x","zzz":1"#));
        assert!(spec.is_some());
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
            "snapshot_mem_file":null,"snapshot_sock":null,"restore_from":null,
            "log_config":{"driver":"none","options":{}}"#;
        let (spec, report) = parse(&with(later));
        assert!(spec.is_some());
        assert_eq!(report, Report::default());
        for (extra, path) in [
            (r#""ksm":true"#, "ksm"),
            (r#""block_devices":[{"id":"a","path":"/d"}]"#, "block_devices"),
            (r#""restore_from":"/snap""#, "restore_from"),
            (r#""log_config":{"driver":"syslog"}"#, "log_config.driver"),
            (
                r#""resource_limits":{"sandbox_memory_limit_bytes":1}"#,
                "resource_limits.sandbox_memory_limit_bytes",
            ),
        ] {
            let errors = errors(&with(extra));
            assert!(matches!(errors.as_slice(), [e] if e.starts_with(path)), "{errors:?}");
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
        let network = spec.and_then(|spec| spec.network).expect("a network");
        assert_eq!((network.socket_fd, network.proxy_fd), (Some(7), Some(8)));
    }

    #[test]
    fn not_json_says_where() {
        assert!(
            errors("{\"a\":")
                .iter()
                .any(|e| e.contains("is not JSON: EOF") && e.contains("line 1"))
        );
        assert_eq!(errors("[]"), ["is an array, must be an object"]);
    }

    /// The reference runtime's own type: its serialised form must parse to the same values.
    #[test]
    fn specs_of_a3s_box_core_parse() {
        use a3s_box_core::vmm as a3s;
        let text = serde_json::to_string(&a3s::InstanceSpec::default()).expect("serialises");
        let (spec, report) = parse(&text);
        assert_eq!(report, Report::default());
        assert_eq!(spec.expect("a spec").memory_mib, 512);

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
        let spec = spec.expect("a spec");
        assert_eq!(spec.entrypoint.env, full.entrypoint.env);
        assert_eq!(spec.network.expect("a network").mac_address, [2, 66, 10, 88, 0, 2]);
        assert_eq!(spec.resource_limits.memory_reservation, Some(1 << 40));
        assert_eq!(spec.tee_config.expect("tee").tee_type, "snp");
    }
}
