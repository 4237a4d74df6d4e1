//! What the spec says of the box's programs beyond the contract: all optional, mote's own.

use super::json::Node;

/// How a box's entrypoint starts; the members of `entrypoint` beside those of the contract.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Start {
    /// Whether mote's standard input is the entrypoint's.
    pub stdin: bool,
    /// Whether it runs on a terminal of its own, which mote's standard input and output show.
    pub terminal: bool,
    /// Whether it waits until a client asks for its start.
    pub on_request: bool,
    /// Whether it is process 1 of what it and commands see.
    pub pid1: bool,
}

/// Who the entrypoint runs as and what it may do, exactly.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
    /// Mode bits that its files do not get.
    pub umask: Option<u32>,
    /// Its capabilities; `None` is those of its user.
    pub capabilities: Option<Capabilities>,
    /// Whether `execve` grants no privileges.
    pub no_new_privileges: bool,
}

/// Names of capabilities, `CAP_…`, by set (capabilities(7)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The bounding set.
    pub bounding: Vec<String>,
    /// The effective set.
    pub effective: Vec<String>,
    /// The inheritable set.
    pub inheritable: Vec<String>,
    /// The permitted set.
    pub permitted: Vec<String>,
    /// The ambient set.
    pub ambient: Vec<String>,
}

/// Something that the guest mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestMount {
    /// A file system in its memory.
    Tmpfs {
        /// Where.
        destination: String,
        /// Options of mount(8) and of tmpfs(5), and `tmpcopyup`.
        options: Vec<String>,
    },
    /// A file or directory of the root file system, in another place.
    Bind {
        /// Where it is, before the guest's own file systems are mounted.
        source: String,
        /// Where it is to be, once they are.
        destination: String,
        /// Options of mount(8) that a bind may have.
        options: Vec<String>,
    },
}

/// What a signal to mote is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SignalsTo {
    /// A request to stop the box.
    #[default]
    Box,
    /// One to the entrypoint.
    Entrypoint,
}

/// Whether `publish` asks for the box's listeners.
pub(super) fn read_publish(node: &Node<'_>) -> Option<bool> {
    match node.string()?.as_str() {
        "listed" => Some(false),
        "listeners" => Some(true),
        other => {
            node.error(format!("is \"{other}\", must be \"listed\" or \"listeners\""));
            None
        }
    }
}

/// Whether `loopback` asks for that of the network namespace.
pub(super) fn read_loopback(node: &Node<'_>) -> Option<bool> {
    match node.string()?.as_str() {
        "own" => Some(false),
        "netns" => Some(true),
        other => {
            node.error(format!("is \"{other}\", must be \"own\" or \"netns\""));
            None
        }
    }
}

/// Whether `entrypoint.start` asks for a start on request.
pub(super) fn read_on_request(node: &Node<'_>) -> Option<bool> {
    match node.string()?.as_str() {
        "at-once" => Some(false),
        "on-request" => Some(true),
        other => {
            node.error(format!("is \"{other}\", must be \"at-once\" or \"on-request\""));
            None
        }
    }
}

pub(super) fn read_signals(node: &Node<'_>) -> Option<SignalsTo> {
    match node.string()?.as_str() {
        "stop" => Some(SignalsTo::Box),
        "entrypoint" => Some(SignalsTo::Entrypoint),
        other => {
            node.error(format!("is \"{other}\", must be \"stop\" or \"entrypoint\""));
            None
        }
    }
}

pub(super) fn read_process(node: &Node<'_>) -> Option<Process> {
    let mut o = node.object()?;
    let process = Process {
        uid: o.required("uid", "a user id", Node::integer).unwrap_or_default(),
        gid: o.required("gid", "a group id", Node::integer).unwrap_or_default(),
        additional_gids: o.optional("additional_gids", |n| n.array(Node::integer, || 0)),
        umask: o.nullable("umask", Node::integer),
        capabilities: o.nullable("capabilities", read_capabilities),
        no_new_privileges: o.nullable("no_new_privileges", Node::boolean).unwrap_or_default(),
    };
    o.finish();
    Some(process)
}

fn read_capabilities(node: &Node<'_>) -> Option<Capabilities> {
    let mut o = node.object()?;
    let sets = Capabilities {
        bounding: o.optional("bounding", Node::strings),
        effective: o.optional("effective", Node::strings),
        inheritable: o.optional("inheritable", Node::strings),
        permitted: o.optional("permitted", Node::strings),
        ambient: o.optional("ambient", Node::strings),
    };
    o.finish();
    Some(sets)
}

pub(super) fn read_guest_mount(node: &Node<'_>) -> Option<GuestMount> {
    let mut o = node.object()?;
    let kind = o.required("type", "\"tmpfs\" or \"bind\"", |node| {
        let kind = node.string()?;
        if !["tmpfs", "bind"].contains(&kind.as_str()) {
            node.error(format!("is \"{kind}\", must be \"tmpfs\" or \"bind\""));
        }
        Some(kind)
    });
    let destination = o
        .required("destination", "an absolute path in the guest", Node::string)
        .unwrap_or_default();
    let source = o.nullable("source", Node::string);
    let options = o.optional("options", Node::strings);
    let mount = match (kind.as_deref(), source) {
        (Some("bind"), source) => {
            if source.is_none() {
                node.error("has no source, a path in the root file system, which a bind needs");
            }
            GuestMount::Bind { source: source.unwrap_or_default(), destination, options }
        }
        (_, source) => {
            if source.is_some() {
                node.error("has a source, which is a bind's; leave it out");
            }
            GuestMount::Tmpfs { destination, options }
        }
    };
    o.finish();
    Some(mount)
}

/// What stands for one that could not be read.
pub(super) fn no_guest_mount() -> GuestMount {
    GuestMount::Tmpfs { destination: String::new(), options: Vec::new() }
}

pub(super) fn read_sysctls(node: &Node<'_>) -> Option<Vec<(String, String)>> {
    node.array(Node::pair, Default::default)
}
