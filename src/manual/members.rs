//! The members of the spec. Types and defaults are contract §1.2; the tests hold both against the parser.

use super::Member;

/// All members; those of an object come after it.
pub const MEMBERS: &[Member] = &[
    Member {
        path: "box_id",
        kind: "string",
        default: None,
        words: "the box's identity, for messages and as the name of its cgroup",
    },
    Member { path: "vcpus", kind: "1–64", default: None, words: "virtual CPUs" },
    Member {
        path: "memory_mib",
        kind: "≥ 64",
        default: None,
        words: "guest RAM in MiB, at most what the host has",
    },
    Member {
        path: "rootfs_path",
        kind: "path",
        default: None,
        words: r#"host directory that becomes the guest's `/`, read-write (also `rootfs`, as a string or `{"kind":"directory","path":…}`)"#,
    },
    Member {
        path: "exec_socket_path",
        kind: "path",
        default: None,
        words: r#"Unix socket for commands and files; `""` for none"#,
    },
    Member {
        path: "pty_socket_path",
        kind: "path",
        default: Some(r#""""#),
        words: "the same for terminals",
    },
    Member {
        path: "attest_socket_path",
        kind: "path",
        default: Some(r#""""#),
        words: "the same for attestation, for boxes that ask for it",
    },
    Member {
        path: "port_forward_socket_path",
        kind: "path",
        default: Some(r#""""#),
        words: "the same for forwarded ports, which only a guest init of the image's own serves",
    },
    Member {
        path: "fs_mounts",
        kind: "array",
        default: None,
        words: r#"further shares: `{"tag", "host_path", "read_only"}`; a tag has 1 to 36 bytes; `read_only` is enforced on the host. The tag `workspace` is mounted on `/workspace`, others where `BOX_VOL_n` says or by `mount -t virtiofs TAG DIR`"#,
    },
    Member {
        path: "fs_mounts[].tag",
        kind: "string",
        default: None,
        words: "the name by which the guest mounts it",
    },
    Member {
        path: "fs_mounts[].host_path",
        kind: "path",
        default: None,
        words: "the directory of the host",
    },
    Member {
        path: "fs_mounts[].read_only",
        kind: "boolean",
        default: None,
        words: "whether the guest may only read",
    },
    Member {
        path: "entrypoint",
        kind: "object",
        default: None,
        words: r#"`{"executable", "args", "env"}`; a name without `/` is looked up in `PATH`; `env` is an array of `[name, value]`, over `HOME=/` (or `user`'s own), `TERM=linux` and a usual `PATH`"#,
    },
    Member {
        path: "entrypoint.executable",
        kind: "string",
        default: None,
        words: "a path in the guest, or a name to look up in `PATH`",
    },
    Member {
        path: "entrypoint.args",
        kind: "array",
        default: None,
        words: "the arguments, without the program's name",
    },
    Member {
        path: "entrypoint.env",
        kind: "array",
        default: None,
        words: "variables, `[name, value]` each; of two with one name, the last counts",
    },
    Member {
        path: "entrypoint.stdin",
        kind: "boolean",
        default: Some("false"),
        words: "whether mote's standard input is the entrypoint's, which else has /dev/null",
    },
    Member {
        path: "entrypoint.terminal",
        kind: "boolean",
        default: Some("false"),
        words: "whether it runs on a terminal of its own, whose screen is mote's stdout and, with `stdin`, whose keyboard is mote's stdin; a terminal there becomes raw, and its size is followed",
    },
    Member {
        path: "entrypoint.start",
        kind: "string",
        default: Some(r#""at-once""#),
        words: r#"`"on-request"`: the box boots, makes the entrypoint ready, and starts it when a client of `exec_socket_path` sends the frame `start-entrypoint`. A program that is missing is told of before"#,
    },
    Member {
        path: "entrypoint.pid1",
        kind: "boolean",
        default: Some("false"),
        words: "whether it is process 1 of what it and commands see, as some inits need",
    },
    Member {
        path: "console_output",
        kind: "path",
        default: Some("null"),
        words: "file for the entrypoint's output and the kernel's errors, created 0600 or emptied; without it they go to mote's stdout and stderr. A FIFO must have a reader within 5 s",
    },
    Member {
        path: "console_limit_bytes",
        kind: "≥ 1",
        default: Some("null"),
        words: "most bytes of `console_output`, if that is a regular file; 1 GiB by default. What comes after is dropped, with one line on stderr, and the box runs on",
    },
    Member {
        path: "log_config",
        kind: "object",
        default: Some("null"),
        words: r#"how the output is logged: `{"driver", "options"}`; without it, in `console_output` alone. With it that file gets stdout and is not emptied, `console.err.log` beside it gets stderr, and the kernel's errors go to mote's stderr"#,
    },
    Member {
        path: "log_config.driver",
        kind: "string",
        default: None,
        words: r#"`"json-file"`: each line is an object in `container.json` beside `console_output`; `"syslog"`: it is sent to a server; or `"none"`"#,
    },
    Member {
        path: "log_config.options",
        kind: "object",
        default: Some("{}"),
        words: "strings; one that mote does not have, or that it cannot honour, is an error",
    },
    Member {
        path: "log_config.options.max-size",
        kind: "string",
        default: Some("null"),
        words: "bytes with which `container.json` is packed and begun anew, such as `512k`; 10m by default",
    },
    Member {
        path: "log_config.options.max-file",
        kind: "string",
        default: Some("null"),
        words: "most files of that log, with those that are packed; 3 by default. A console file that gets `max-size` times as many bytes is emptied, whatever the driver is",
    },
    Member {
        path: "log_config.options.syslog-address",
        kind: "string",
        default: Some("null"),
        words: "`udp://ADDRESS:PORT`; udp://localhost:514 by default",
    },
    Member {
        path: "log_config.options.syslog-facility",
        kind: "string",
        default: Some("null"),
        words: "syslog's name for the kind of program; daemon by default",
    },
    Member {
        path: "log_config.options.tag",
        kind: "string",
        default: Some("null"),
        words: "the program's name in syslog; a3s-box by default",
    },
    Member {
        path: "workdir",
        kind: "path",
        default: None,
        words: "directory the entrypoint starts in; must exist in the guest. A guest init of the image's own starts in `/`",
    },
    Member {
        path: "user",
        kind: "string",
        default: Some("null"),
        words: "`uid`, `uid:gid`, `name` or `name:group`, resolved in the guest; with supplementary groups. Not for an init of the image's own, which runs as root",
    },
    Member {
        path: "resource_limits.ulimits",
        kind: "array",
        default: Some("[]"),
        words: "`NAME=SOFT:HARD` or `NAME=LIMIT`, each a number, `-1` or `unlimited`. Without one, `nofile` is 1048576 and `nproc` is 4096:8192 (or `pids_limit`); the others are the guest kernel's own",
    },
    Member {
        path: "resource_limits.pids_limit",
        kind: "number",
        default: Some("null"),
        words: "most processes in the box, by the guest's pids cgroup, which binds root too, and by `nproc`; an exec'd command itself can always start. Without it, no more than `nproc`, which does not bind root",
    },
    Member {
        path: "resource_limits.cpuset_cpus",
        kind: "string",
        default: Some("null"),
        words: "host CPUs on which vCPUs, mote and virtiofsd run, like `0-3,6`; each must be online and allowed to mote",
    },
    Member {
        path: "resource_limits.cpu_shares",
        kind: "number",
        default: Some("null"),
        words: "CPU time relative to other boxes, 2 to 262144, scaled to a `cpu.weight` of 1 to 10000",
    },
    Member {
        path: "resource_limits.cpu_quota",
        kind: "number",
        default: Some("null"),
        words: "microseconds of CPU time per period: `cpu.max`; at least 1000; negative, 0 or none is unlimited",
    },
    Member {
        path: "resource_limits.cpu_period",
        kind: "number",
        default: Some("null"),
        words: "microseconds in a period, 1000 to 1000000; without it 100000",
    },
    Member {
        path: "resource_limits.memory_reservation",
        kind: "number",
        default: Some("null"),
        words: "bytes to protect from reclaim: `memory.low`",
    },
    Member {
        path: "resource_limits.memory_swap",
        kind: "number",
        default: Some("null"),
        words: "bytes of swap, without the memory: `memory.swap.max`; negative is unlimited",
    },
    Member {
        path: "port_map",
        kind: "array",
        default: Some("[]"),
        words: r#"ports to publish on all addresses of the host, IPv4 and IPv6: `"HOST:GUEST"`, with `/tcp` (which is also meant without) or `/udp` after it, each port once, at most 4096. They are bound before the guest runs; clients wait until it can take them"#,
    },
    Member {
        path: "network",
        kind: "object",
        default: Some("null"),
        words: r#"a network interface of the box's own, on passt: `{"passt_socket_path", "ip_address", "gateway", "prefix_len", "mac_address", "dns_servers"}`"#,
    },
    Member {
        path: "network.passt_socket_path",
        kind: "path",
        default: None,
        words: "passt's Unix socket (also `net_socket_path`)",
    },
    Member {
        path: "network.ip_address",
        kind: "string",
        default: None,
        words: "the box's IPv4 address",
    },
    Member {
        path: "network.gateway",
        kind: "string",
        default: None,
        words: "the gateway's IPv4 address",
    },
    Member {
        path: "network.prefix_len",
        kind: "number",
        default: None,
        words: "length of the subnet's prefix in bits",
    },
    Member {
        path: "network.mac_address",
        kind: "array",
        default: None,
        words: "the interface's hardware address, six numbers",
    },
    Member {
        path: "network.dns_servers",
        kind: "array",
        default: Some("[]"),
        words: "IPv4 addresses of name servers",
    },
    Member {
        path: "network.net_socket_fd",
        kind: "number",
        default: Some("null"),
        words: "an inherited stream socket to use in place of the path",
    },
    Member {
        path: "network.net_proxy_fd",
        kind: "number",
        default: Some("null"),
        words: "the other end of `net_socket_fd`: mote goes to the path by itself",
    },
    Member {
        path: "network.bridge_socket_dir",
        kind: "string",
        default: Some("null"),
        words: "the directory in which the boxes of one network meet, each with a socket named by its `mac_address`",
    },
    Member {
        path: "network.joinable",
        kind: "boolean",
        default: Some("false"),
        words: "whether mote stays in its network namespace, for those who join that by its process; without it, mote leaves it before the guest runs",
    },
    Member {
        path: "disable_tsi",
        kind: "boolean",
        default: Some("false"),
        words: "without `network`, `true` leaves the box loopback alone",
    },
    Member {
        path: "guest_agent",
        kind: "string",
        default: Some(r#""mote""#),
        words: r#"`"mote"` (default), or `"image"`: an agent of the image's own gets the connections of these sockets"#,
    },
    Member {
        path: "egress",
        kind: "array",
        default: Some("null"),
        words: "rules for where the box may connect to; without it, everywhere but to the host itself",
    },
    Member {
        path: "process",
        kind: "object",
        default: Some("null"),
        words: "who the entrypoint runs as, in place of `user`: ids that are not looked up. Such a box has only the environment that it is given and `HOME`, its `workdir` is made if it is missing, and mote leaves /etc as it is in the image",
    },
    Member { path: "process.uid", kind: "number", default: None, words: "user id" },
    Member { path: "process.gid", kind: "number", default: None, words: "primary group id" },
    Member {
        path: "process.additional_gids",
        kind: "array",
        default: Some("[]"),
        words: "ids of supplementary groups",
    },
    Member {
        path: "process.umask",
        kind: "number",
        default: Some("null"),
        words: "mode bits that its files do not get; 18 (022) by default",
    },
    Member {
        path: "process.capabilities",
        kind: "object",
        default: Some("null"),
        words: "names like `CAP_CHOWN` in `bounding`, `effective`, `inheritable`, `permitted` and `ambient`; without it, those that the kernel gives to the user",
    },
    Member {
        path: "process.capabilities.bounding",
        kind: "array",
        default: Some("[]"),
        words: "what execve(2) may ever grant",
    },
    Member {
        path: "process.capabilities.effective",
        kind: "array",
        default: Some("[]"),
        words: "what is in force",
    },
    Member {
        path: "process.capabilities.inheritable",
        kind: "array",
        default: Some("[]"),
        words: "what execve(2) keeps, if the file agrees",
    },
    Member {
        path: "process.capabilities.permitted",
        kind: "array",
        default: Some("[]"),
        words: "what may be put in force",
    },
    Member {
        path: "process.capabilities.ambient",
        kind: "array",
        default: Some("[]"),
        words: "what execve(2) keeps, as far as it is permitted and inheritable",
    },
    Member {
        path: "process.no_new_privileges",
        kind: "boolean",
        default: Some("false"),
        words: "whether set-user-ID files and file capabilities grant nothing",
    },
    Member {
        path: "hostname",
        kind: "string",
        default: Some("null"),
        words: "the guest's host name; without it, `HOSTNAME` of the environment, or localhost",
    },
    Member {
        path: "domainname",
        kind: "string",
        default: Some("null"),
        words: "its NIS domain name",
    },
    Member {
        path: "sysctls",
        kind: "array",
        default: Some("[]"),
        words: r#"`[name, value]` each, such as `["net.core.somaxconn", "1024"]`, set in the guest before anything runs"#,
    },
    Member {
        path: "guest_mounts",
        kind: "array",
        default: Some("[]"),
        words: r#"file systems in the guest's memory: `{"type": "tmpfs", "destination", "options"}`; or what the root file system has, once more, with options that the guest's kernel heeds, or where the guest's /dev, /proc or /sys hide it: `{"type": "bind", "source", "destination", "options"}`"#,
    },
    Member {
        path: "guest_mounts[].type",
        kind: "string",
        default: None,
        words: r#"`"tmpfs"`, or `"bind"`"#,
    },
    Member {
        path: "guest_mounts[].source",
        kind: "path",
        default: Some("null"),
        words: "of a bind: a file or directory of the root file system, as that is before anything is mounted in the guest",
    },
    Member {
        path: "guest_mounts[].destination",
        kind: "path",
        default: None,
        words: "where, in the guest; made if it is missing",
    },
    Member {
        path: "guest_mounts[].options",
        kind: "array",
        default: Some("[]"),
        words: "as of mount(8). Of a tmpfs such as `size=64m`, `mode=1777`, `nosuid`; with `tmpcopyup` it gets what the image has there. Of a bind `ro`, `nosuid`, `nodev`, `noexec`, `nosymfollow`",
    },
    Member {
        path: "devices",
        kind: "array",
        default: Some("null"),
        words: r#"the guest's `/dev` has only the devices that every program expects (`null`, `zero`, `full`, `random`, `urandom`, `tty`, `ptmx`, with a terminal `console`), and those named here, such as `["/dev/fuse", "/dev/net/tun"]`; `null` is all that its kernel has"#,
    },
    Member {
        path: "masked_paths",
        kind: "array",
        default: Some("[]"),
        words: "files and directories that the box's programs find empty",
    },
    Member {
        path: "readonly_paths",
        kind: "array",
        default: Some("[]"),
        words: "those that they cannot change",
    },
    Member {
        path: "read_only_root",
        kind: "boolean",
        default: Some("false"),
        words: "whether `/` is read-only in the guest once everything is mounted",
    },
    Member {
        path: "signals",
        kind: "string",
        default: Some(r#""stop""#),
        words: r#"what SIGTERM, SIGINT, SIGHUP and SIGQUIT to mote are: `"stop"`, the end of the box within 8 s; or `"entrypoint"`, signals to the entrypoint, as are SIGUSR1 and SIGUSR2 then, whatever it makes of them"#,
    },
    Member {
        path: "publish",
        kind: "string",
        default: Some(r#""listed""#),
        words: r#"`"listeners"`: every TCP port on which a program of the box listens, on all addresses or on loopback, is also one of mote's network namespace, as long as it does; at most 256. One that somebody else has there is told of, and not published. Not with `network` or UDP ports"#,
    },
    Member {
        path: "loopback",
        kind: "string",
        default: Some(r#""own""#),
        words: r#"`"netns"`: the box shares the loopback and the addresses of the network namespace that mote runs in, which must not be the host's own, with others there: what nobody in the box listens to is theirs. Not with `network`"#,
    },
    Member {
        path: "tee_config",
        kind: "object",
        default: Some("null"),
        words: "checked, with its file, and refused: mote runs no confidential VMs. What the host lacks for one is said, as `mote probe` says it",
    },
];

/// Who enforces the limits on the host.
pub const CGROUP: &str = "The `cpu_*` and `memory_*` limits bind mote, its vCPUs and virtiofsd together, in the cgroup `/sys/fs/cgroup/a3s-box/<box_id>`, for which `box_id` must be a plain name (letters, digits, `.`, `_`, `-`). That needs cgroup v2, and root or delegation; a box whose limits cannot be enforced does not start, unless a guest init of the image's own enforces them inside (`A3S_SEC_*`): then mote warns.";

/// What is wrong with a spec.
pub const FAULTS: &str =
    "A missing or wrong field is an error that names its path; an unknown field is a warning.";

/// What rules look like.
pub const RULES: &str = "Each rule is `allow:CIDR[:tcp|udp[:PORT]]` or `deny:…`. The first that matches decides; of what none matches, all is denied, unless the last entry is just `allow`. At most 1,024.";

/// A whole spec.
pub const EXAMPLE: &str = r#"{
    "box_id": "hello", "vcpus": 1, "memory_mib": 256,
    "rootfs_path": "/srv/debian", "fs_mounts": [], "exec_socket_path": "", "workdir": "/",
    "entrypoint": {"executable": "/bin/sh", "args": ["-c", "uname -r; exit 7"], "env": []}
}"#;
