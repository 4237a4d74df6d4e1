//! The instance configuration: what the host asks of the guest, written by the VMM as one JSON
//! file in a second initramfs archive. It is in memory before the agent starts, so that the start does
//! not wait for messages about it.
//!
//! Everything here has been checked by the host's `Plan`; the agent only reports what the guest's
//! own file system makes impossible.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Where the agent finds the file in its initramfs.
pub const PATH: &str = "/mote/instance.json";

/// Virtio-fs tag of the share that becomes `/`. Shares of the spec may not use it.
pub const ROOT_TAG: &str = "mote-root";

/// Everything the agent needs to run the box.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Guest host name (contract §7.1: `$HOSTNAME` of the spec's environment, or `localhost`).
    pub hostname: String,
    /// NIS domain name (setdomainname(2)), if it has one.
    pub domainname: Option<String>,
    /// Mounts beside the root, in order.
    pub mounts: Vec<Mount>,
    /// Whether the root file system becomes read-only once everything is mounted.
    pub read_only_root: bool,
    /// Which of the kernel's devices are in `/dev` beside those that every program expects; `None` is all.
    pub devices: Option<Vec<String>>,
    /// Most processes in the box.
    pub pids_limit: Option<u64>,
    /// Resource limits of every program, in the order they are set; a later entry for a resource
    /// wins.
    pub rlimits: Vec<Rlimit>,
    /// The program to run.
    pub entrypoint: Entrypoint,
    /// How it starts.
    pub start: Start,
    /// Who it runs as and what it may do, where the spec says that exactly: `user` is `None` then.
    pub process: Option<Process>,
    /// Directory the entrypoint starts in; must exist in the guest.
    pub workdir: String,
    /// Whether that directory is made when the guest lacks it.
    pub make_workdir: bool,
    /// User and group to run as (contract §1.5): `uid`, `uid:gid`, `name` or `name:group`.
    pub user: Option<String>,
    /// Environment of exec'd commands, below what their requests add.
    pub exec_env: Vec<(String, String)>,
    /// Directory that exec'd commands start in unless their requests name one.
    pub exec_workdir: String,
    /// How the box is on the network.
    pub networking: Networking,
    /// Where the host carries no datagrams to, as far as that is known beforehand: for an address the longest
    /// prefix counts.
    pub datagrams: Vec<Prefix>,
    /// How often the host repeats a SYN, where that is not Linux's default: connect(2) times out in
    /// the guest when it does on the host (tcp(7), `tcp_syn_retries`).
    pub syn_retries: Option<u8>,
    /// Whether the host takes clients to ports of the box (contract §1.6).
    pub published: PublishedPorts,
    /// What every program of the box gives up.
    pub security: Security,
    /// Files and directories that the box's programs find empty.
    pub masked_paths: Vec<String>,
    /// Those that they cannot change.
    pub read_only_paths: Vec<String>,
    /// Name servers.
    pub resolv_conf: ResolvConf,
    /// Files of `/etc` by name, and the texts that the guest is to see there, whatever the image has.
    pub etc: Vec<(String, String)>,
    /// Names of sysctl(8) with dots, and their values.
    pub sysctls: Vec<(String, String)>,
    /// Arguments of the attestation server ([`crate::attestation::Options`]), if the box has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attestation: Option<Vec<String>>,
}

impl Instance {
    /// Whether the box's programs see other mounts than the agent.
    pub fn has_own_view(&self) -> bool {
        self.start.pid1 || !self.masked_paths.is_empty() || !self.read_only_paths.is_empty()
    }
}

/// Which ports of a box the host takes clients to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPorts {
    /// Some.
    pub any: bool,
    /// UDP ports among them.
    pub udp: bool,
    /// All TCP ports on which the box's programs listen.
    pub listeners: bool,
}

/// How a box is on the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Networking {
    /// By an interface of its own.
    Own(Interface),
    /// Its sockets reach the outside through the host's (TSI, contract §8).
    Hosts {
        /// Whether the host has an IPv6 address that the outside may know: programs then look IPv6
        /// addresses up.
        ip6: bool,
        /// The addresses of a network that the box shares with others, and its loopback with them; `None` if it has a
        /// loopback of its own.
        shared: Option<Vec<IpAddr>>,
    },
    /// Not at all: there is loopback.
    None,
}

/// Addresses with a common prefix, and what becomes of datagrams to them from sockets without a network of the box's
/// own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefix {
    /// The first of them, IPv4 as IPv4-mapped.
    pub ip: Ipv6Addr,
    /// How many bits they have in common.
    pub len: u8,
    /// Whether the host refuses them.
    pub refused: bool,
    /// Ports at which it is the other way round, at most [`MAX_EXCEPTIONS`].
    pub except: Vec<u16>,
}

/// How many ports of a [`Prefix`] have room in the guest's kernel.
pub const MAX_EXCEPTIONS: usize = 8;

/// The network interface `eth0`. Its MTU is the device's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its address.
    pub address: Ipv4Addr,
    /// Length of the subnet's prefix in bits, 1 to 31.
    pub prefix_len: u8,
    /// The router, in the same subnet.
    pub gateway: Ipv4Addr,
}

/// Text for `/etc/resolv.conf` (resolv.conf(5)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResolvConf {
    /// Whatever the image has there.
    Always(String),
    /// Unless the image's file names a server.
    IfUnserved(String),
    /// Whatever the image has there, or nothing.
    OfImage,
}

/// Restrictions on programs, for life (contract §2.10 `A3S_SEC_*`, §7.2 step 8).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    /// Whether `execve` grants no privileges (no_new_privs, prctl(2)).
    pub no_new_privs: bool,
    /// Whether system calls that change the whole guest are refused with `EPERM`.
    pub seccomp: bool,
    /// Numbers of the capabilities that leave the bounding set (capabilities(7)).
    pub drop_capabilities: Vec<u32>,
}

/// How the entrypoint starts, beside what it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Whether its standard input comes from the host.
    pub stdin: bool,
    /// The size of the terminal that it runs on, if it runs on one.
    pub terminal: Option<TerminalSize>,
    /// Whether it is made ready, and starts when a client asks for it ([`crate::exec::control::START`]).
    pub on_request: bool,
    /// Whether it is process 1 of a namespace of its own (pid_namespaces(7)), which commands then run in too.
    pub pid1: bool,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// Who a program runs as and what it may do, given exactly instead of being looked up in the image's files.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Ids of all supplementary groups.
    pub groups: Vec<u32>,
    /// Mode bits that new files do not get; the agent's by default.
    pub umask: Option<u32>,
    /// Its capabilities; by default those that the kernel gives to the user.
    pub capabilities: Option<Capabilities>,
    /// Whether `execve` grants no privileges (no_new_privs, prctl(2)).
    pub no_new_privs: bool,
}

/// The five sets of capabilities(7), with bit n for the capability of number n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Capabilities {
    /// What `execve` may ever grant.
    pub bounding: u64,
    /// What is in force.
    pub effective: u64,
    /// What `execve` keeps, if the file agrees.
    pub inheritable: u64,
    /// What may be put in force.
    pub permitted: u64,
    /// What `execve` keeps.
    pub ambient: u64,
}

/// A program with its arguments and its environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entrypoint {
    /// Path, or a name that is looked up in the environment's `PATH`.
    pub executable: String,
    /// Arguments after `argv[0]`.
    pub args: Vec<String>,
    /// Environment in order, over the agent's defaults for `HOME`, `TERM` and `PATH`; a later entry
    /// for a name wins.
    pub env: Vec<(String, String)>,
}

/// One mount in the guest. Its directory is created when the image lacks it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mount {
    /// A virtio-fs share.
    Share {
        /// The share's tag.
        tag: String,
        /// Where to mount it.
        path: String,
        /// Whether the guest's mount is read-only.
        read_only: bool,
        /// Whether a share that is empty gets what the image has at the path, before it is mounted there.
        copy_up: bool,
    },
    /// One file of a virtio-fs share: the one with the name that the path ends in.
    File {
        /// The share's tag.
        tag: String,
        /// The file to mount it on, which is created when the image lacks it.
        path: String,
        /// Whether the guest's mount is read-only.
        read_only: bool,
    },
    /// An empty file system in memory.
    Tmpfs {
        /// Where to mount it.
        path: String,
        /// Comma-separated options, of mount(8) and of tmpfs.
        options: String,
        /// Whether it gets what the image has at the path, before it is mounted there.
        copy_up: bool,
    },
    /// A file or directory of the root file system in another place.
    Bind {
        /// Where it is, even if one of the kernel's file systems is mounted over it.
        source: String,
        /// The file or directory to mount it on, which is created when it is missing.
        path: String,
        /// Comma-separated options of mount(8) that are flags.
        options: String,
    },
}

/// One `setrlimit` call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*` number of Linux on x86-64.
    pub resource: u32,
    /// Soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}
