//! The `process` object: of a container's `config.json`, and of a file that `exec` is given.

use std::cell::RefCell;

use crate::plan::capability;
use crate::spec::json::{Json, Node, Object, Report};
use crate::spec::process::Capabilities;
use crate::sys::terminal::TerminalSize;

/// A program to run in a box, and as whom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// Whether it has a terminal.
    pub terminal: bool,
    /// The terminal's size, if somebody knows.
    pub size: Option<TerminalSize>,
    /// Program and arguments; at least one.
    pub args: Vec<String>,
    /// Environment entries in order.
    pub env: Vec<(String, String)>,
    /// The directory to start in.
    pub cwd: String,
    /// As whom.
    pub user: User,
    /// Its capabilities' names.
    pub capabilities: Capabilities,
    /// Whether programs that it executes get no more privileges than it has.
    pub no_new_privileges: bool,
    /// Resource limits, as the spec writes them (`NOFILE=1024:2048`).
    pub ulimits: Vec<String>,
    /// What is added to its chance of being killed for lack of memory.
    pub oom_score_adj: Option<i32>,
}

/// A user with groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// Which permissions new files lack.
    pub umask: u32,
    /// Numbers of further groups.
    pub additional_gids: Vec<u32>,
}

/// What the runtime specification leaves to runtimes; runc has the same.
const DEFAULT_UMASK: u32 = 0o022;

impl Default for User {
    fn default() -> Self {
        User { uid: 0, gid: 0, umask: DEFAULT_UMASK, additional_gids: Vec::new() }
    }
}

/// The limits that a box can have, by the names of getrlimit(2).
const RLIMITS: [&str; 15] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

impl Process {
    /// Parses the file that `exec --process` names.
    ///
    /// # Errors
    /// It is not JSON, or not an object; `report` has what is wrong with its members.
    pub fn parse(text: &str, report: &mut Report) -> Result<Process, String> {
        let json = Json::parse(text).map_err(|error| format!("is not JSON: {error}"))?;
        let cell = RefCell::new(std::mem::take(report));
        let process = Object::root(&json, &cell).map(read_members);
        *report = cell.into_inner();
        process
    }

    /// Reads the object.
    pub fn read(node: &Node<'_>) -> Option<Process> {
        Some(read_members(node.object()?))
    }
}

fn read_members(mut o: Object<'_>) -> Process {
    let process = Process {
        terminal: o.nullable("terminal", Node::boolean).unwrap_or_default(),
        size: o.nullable("consoleSize", read_size).flatten(),
        args: o.required("args", "the program and its arguments", read_args).unwrap_or_default(),
        env: o.nullable("env", read_env).unwrap_or_default(),
        cwd: o.required("cwd", "the directory to start in", read_cwd).unwrap_or_default(),
        user: o.nullable("user", read_user).unwrap_or_default(),
        capabilities: o.nullable("capabilities", read_capabilities).unwrap_or_default(),
        no_new_privileges: o.nullable("noNewPrivileges", Node::boolean).unwrap_or_default(),
        ulimits: o.nullable("rlimits", read_rlimits).unwrap_or_default(),
        oom_score_adj: o.nullable("oomScoreAdj", read_oom_score).flatten(),
    };
    for (name, what) in [
        ("apparmorProfile", "AppArmor profiles of the host do not reach into a box"),
        ("selinuxLabel", "SELinux labels of the host do not reach into a box"),
    ] {
        if let Some(label) = o.member(name).filter(|label| !label.is_vacant()) {
            label.warn(format!("has no effect: {what}, which has a kernel of its own"));
        }
    }
    for name in ["scheduler", "ioPriority", "execCPUAffinity"] {
        if let Some(node) = o.member(name).filter(|node| !node.is_vacant()) {
            node.error("cannot be had in a box; leave it out");
        }
    }
    // Of other systems.
    o.member("commandLine");
    o.finish();
    process
}

fn read_args(node: &Node<'_>) -> Option<Vec<String>> {
    let args = node.strings()?;
    match args.first() {
        None => node.error("is empty; its first item is the program"),
        Some(program) if program.is_empty() => {
            node.error("names no program: its first item is \"\"")
        }
        Some(_) => return Some(args),
    }
    None
}

fn read_cwd(node: &Node<'_>) -> Option<String> {
    let cwd = node.string()?;
    if cwd.starts_with('/') {
        return Some(cwd);
    }
    node.error(format!("is \"{cwd}\", must be an absolute path"));
    None
}

fn read_env(node: &Node<'_>) -> Option<Vec<(String, String)>> {
    node.array(read_variable, Default::default)
}

fn read_variable(node: &Node<'_>) -> Option<(String, String)> {
    let entry = node.string()?;
    match entry.split_once('=') {
        Some((name, value)) if !name.is_empty() => Some((name.into(), value.into())),
        _ => {
            node.error("must be NAME=VALUE");
            None
        }
    }
}

fn read_size(node: &Node<'_>) -> Option<Option<TerminalSize>> {
    let mut o = node.object()?;
    let mut side = |name| {
        let read = |node: &Node<'_>| node.integer::<u32>();
        o.nullable(name, read).and_then(|side| u16::try_from(side).ok())
    };
    let (rows, cols) = (side("height"), side("width"));
    o.finish();
    // Engines write 0 by 0 for a size that nobody knows.
    let size = rows.zip(cols).filter(|(rows, cols)| *rows > 0 && *cols > 0);
    Some(size.map(|(rows, cols)| TerminalSize { cols, rows }))
}

fn read_user(node: &Node<'_>) -> Option<User> {
    let mut o = node.object()?;
    let user = User {
        uid: o.nullable("uid", Node::integer).unwrap_or_default(),
        gid: o.nullable("gid", Node::integer).unwrap_or_default(),
        umask: o.nullable("umask", read_umask).unwrap_or(DEFAULT_UMASK),
        additional_gids: o
            .nullable("additionalGids", |node| node.array(Node::integer, u32::default))
            .unwrap_or_default(),
    };
    // Of Windows; engines write it as "".
    o.member("username");
    o.finish();
    Some(user)
}

fn read_umask(node: &Node<'_>) -> Option<u32> {
    let umask = node.integer::<u32>()?;
    if umask > 0o777 {
        node.error(format!("is {umask}, must be at most {} (0777)", 0o777));
        return None;
    }
    Some(umask)
}

fn read_oom_score(node: &Node<'_>) -> Option<Option<i32>> {
    let score = node.integer::<i32>()?;
    if !(-1000..=1000).contains(&score) {
        node.error(format!("is {score}, must be from -1000 to 1000"));
        return None;
    }
    Some(Some(score))
}

fn read_capabilities(node: &Node<'_>) -> Option<Capabilities> {
    let mut o = node.object()?;
    let mut set = |name| o.nullable(name, read_capability_set).unwrap_or_default();
    let capabilities = Capabilities {
        bounding: set("bounding"),
        effective: set("effective"),
        inheritable: set("inheritable"),
        permitted: set("permitted"),
        ambient: set("ambient"),
    };
    o.finish();
    Some(capabilities)
}

fn read_capability_set(node: &Node<'_>) -> Option<Vec<String>> {
    let names = node.items()?.into_iter().filter_map(|item| {
        let name = item.string()?.to_ascii_uppercase();
        let known = capability(&name).is_some();
        // As runc has it: what a kernel does not know yet, nobody needs there.
        if !known {
            item.warn(format!("\"{name}\" is no capability of a box's kernel, and is left out"));
        }
        known.then_some(name)
    });
    Some(names.collect())
}

fn read_rlimits(node: &Node<'_>) -> Option<Vec<String>> {
    node.array(read_rlimit, String::new)
}

fn read_rlimit(node: &Node<'_>) -> Option<String> {
    let mut o = node.object()?;
    let name = o.required("type", "a limit such as RLIMIT_NOFILE", read_rlimit_name);
    let soft = o.required("soft", "the limit", Node::integer::<u64>);
    let hard = o.required("hard", "the most that the limit may be raised to", Node::integer::<u64>);
    o.finish();
    Some(format!("{}={}:{}", name?, soft?, hard?))
}

fn read_rlimit_name(node: &Node<'_>) -> Option<String> {
    let name = node.string()?;
    let known = name.strip_prefix("RLIMIT_").filter(|name| RLIMITS.contains(name));
    if known.is_none() {
        node.error(format!("is \"{name}\", must be RLIMIT_ and one of {}", RLIMITS.join(", ")));
    }
    known.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Process, Report) {
        let mut report = Report::default();
        (Process::parse(text, &mut report).expect("an object"), report)
    }

    #[test]
    fn everything_is_taken_over() {
        let (process, report) = parsed(
            r#"{"terminal":true,"consoleSize":{"height":24,"width":80},"args":["sh","-c","x"],"env":["A=1=2","B="],
            "cwd":"/w","user":{"uid":1,"gid":2,"umask":63,"additionalGids":[3]},"noNewPrivileges":true,
            "capabilities":{"bounding":["CAP_CHOWN","CAP_NEW"],"ambient":null},"oomScoreAdj":-5,
            "rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":18446744073709551615}]}"#,
        );
        assert_eq!(report.errors, []);
        assert_eq!(report.warnings.len(), 1);
        assert_eq!(process.size, Some(TerminalSize { cols: 80, rows: 24 }));
        assert_eq!(process.env, [("A".into(), "1=2".into()), ("B".into(), String::new())]);
        assert_eq!(process.user, User { uid: 1, gid: 2, umask: 0o77, additional_gids: vec![3] });
        assert_eq!(process.capabilities.bounding, ["CAP_CHOWN"]);
        assert_eq!(process.ulimits, ["NOFILE=1:18446744073709551615"]);
        assert_eq!(process.oom_score_adj, Some(-5));
    }

    #[test]
    fn everything_wrong_is_named() {
        let (_, report) = parsed(
            r#"{"args":[],"env":["x"],"cwd":"w","user":{"uid":-1,"umask":512},"oomScoreAdj":1001,
            "rlimits":[{"type":"RLIMIT_AS","soft":1}],"ioPriority":{"class":"IOPRIO_CLASS_IDLE"},"terminal":1}"#,
        );
        let paths: Vec<&str> = report.errors.iter().map(|fault| &fault.path[..]).collect();
        assert_eq!(
            paths,
            [
                "terminal",
                "args",
                "env[0]",
                "cwd",
                "user.uid",
                "user.umask",
                "rlimits[0].type",
                "rlimits[0].hard",
                "oomScoreAdj",
                "ioPriority"
            ]
        );
    }
}
