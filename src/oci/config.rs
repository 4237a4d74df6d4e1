//! `config.json`: what an engine asks for (OCI runtime specification 1.0 to 1.2), read and checked. Everything that is
//! wrong is told at once, each with its path.
//!
//! A box is a virtual machine: what a container gets by namespaces of the host's kernel, a box has by a kernel of its
//! own. For every member there is a rule:
//!
//! | member | what becomes of it |
//! |---|---|
//! | `ociVersion` | must be 1.x |
//! | `root.path`, `root.readonly` | the box's `/`; read-only on the host's side, so that mounts below may be writable |
//! | `mounts` | see [`super::mounts`] |
//! | `process` | the entrypoint; `apparmorProfile`, `selinuxLabel`: a warning; `scheduler`, `ioPriority`, `execCPUAffinity`: refused |
//! | `hostname`, `domainname` | the guest's |
//! | `hooks` | `prestart`, `createRuntime`, `poststart` and `poststop` run on the host; `createContainer` and `startContainer` are refused, since they would run inside |
//! | `annotations` | kept for `state`; `mote.memory_mib` and `mote.vcpus` size a box without limits; `mote.passt` gives it an interface ([`super::passt`]); `org.systemd.property.NAME` is a property of the unit that systemd makes; those of a pod's sandbox make it no box ([`super::pause`]) |
//! | `linux.namespaces`, network | without a path a new one with loopback alone, with a path that one, without the item the host's |
//! | `linux.namespaces`, user | refused, and so are `uidMappings` and `gidMappings` |
//! | `linux.namespaces`, others | without effect; a warning, if one with a path was to be shared |
//! | `linux.cgroupsPath`, `linux.resources` | a cgroup (v2) for mote, see [`super::resources`], which systemd makes under `--systemd-cgroup`; `resources.devices` has no effect |
//! | `linux.devices` | the standard ones are there anyway; `/dev/fuse` and `/dev/net/tun` are the guest's own; others are refused. More than 20, as engines write for `--privileged`, are a warning, and all of the guest's |
//! | `linux.sysctl` | the guest's |
//! | `linux.maskedPaths`, `linux.readonlyPaths` | the guest's |
//! | `linux.seccomp` | a warning: the profile is not applied; capabilities and `noNewPrivileges` are |
//! | `linux.rootfsPropagation` | without effect; mounts do not propagate |
//! | `linux.mountLabel` | a warning |
//! | `linux.intelRdt`, `linux.personality`, `linux.timeOffsets`, `linux.netDevices`, `linux.memoryPolicy` | refused |
//! | `solaris`, `windows`, `vm`, `zos`, `freebsd` | refused |
//! | anything else | a warning, as the specification demands |
//!
//! Warnings are in `ROOT/ID/log` and, with `--debug`, in the file that `--log` names.

use std::cell::RefCell;
use std::path::PathBuf;

use super::cgroup::{self, Placement};
use super::devices::{self, Devices};
use super::hooks::Hooks;
use super::mounts::{self, Mounts};
use super::passt::{self, Ports};
use super::process::Process;
use super::resources::Resources;
use super::systemd::{PROPERTY_ANNOTATION, Property};
use crate::spec::json::{Json, Node, Object, Report};

/// A container, as it is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// The directory that becomes its `/`, from the bundle on.
    pub root: PathBuf,
    /// Whether that is read-only.
    pub read_only_root: bool,
    /// What is mounted below it.
    pub mounts: Mounts,
    /// What it has of the guest's devices.
    pub devices: Devices,
    /// The program to run.
    pub process: Process,
    /// The guest's host name, if given.
    pub hostname: Option<String>,
    /// The guest's NIS domain name, if given.
    pub domainname: Option<String>,
    /// Programs to run on the host.
    pub hooks: Hooks,
    /// Whether it is a pod's sandbox, in which nothing runs: see [`super::pause`].
    pub is_sandbox: bool,
    /// What engines note.
    pub annotations: Vec<(String, String)>,
    /// The network that it is on.
    pub network: Network,
    /// The ports that its own interface has, if it is to have one.
    pub passt: Option<Ports>,
    /// Where its cgroup is to be.
    pub cgroup: Option<Placement>,
    /// Further properties of its unit, where systemd makes its cgroup.
    pub unit_properties: Vec<Property>,
    /// Its limits.
    pub resources: Resources,
    /// Names and values.
    pub sysctls: Vec<(String, String)>,
    /// Paths that are to look empty.
    pub masked_paths: Vec<String>,
    /// Paths that are to be read-only.
    pub readonly_paths: Vec<String>,
    /// The box's RAM in MiB.
    pub memory_mib: u32,
    /// The box's virtual CPUs.
    pub vcpus: u8,
}

/// The network that a container is on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Network {
    /// That of whoever makes it.
    #[default]
    Hosts,
    /// A new one, with loopback alone.
    New,
    /// That of the namespace which this file stands for.
    Joined(PathBuf),
}

/// What the reading depends on beside the text.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances {
    /// How many CPUs this process may use.
    pub cpus: u64,
}

/// RAM of a box that is given no limit.
const DEFAULT_MEMORY_MIB: u32 = 512;
/// Less RAM than that, a box cannot have.
const MIN_MEMORY_MIB: u32 = 64;
/// The most virtual CPUs of a box.
const MAX_VCPUS: u64 = 64;
impl Config {
    /// Parses the text. What is wrong with its members is added to `report`: with errors there, the config is of no
    /// use.
    ///
    /// # Errors
    /// It is not JSON, or not an object. The message goes on behind the file's name.
    pub fn parse(text: &str, given: Circumstances, report: &mut Report) -> Result<Config, String> {
        let json = Json::parse(text).map_err(|error| format!("is not JSON: {error}"))?;
        let cell = RefCell::new(std::mem::take(report));
        let config = Object::root(&json, &cell).map(|o| read_config(o, given));
        *report = cell.into_inner();
        config
    }
}

fn read_config(mut o: Object<'_>, given: Circumstances) -> Config {
    o.required("ociVersion", "the version of the specification, such as 1.0.2", read_version);
    let mut config = Config::default();
    if let Some((path, read_only)) = o.required("root", "the root file system", read_root) {
        (config.root, config.read_only_root) = (path, read_only);
    }
    config.process = o.required("process", "the program to run", Process::read).unwrap_or_default();
    config.mounts = o.nullable("mounts", mounts::read).unwrap_or_default();
    config.hostname = o.nullable("hostname", Node::string).filter(|name| !name.is_empty());
    config.domainname = o.nullable("domainname", Node::string).filter(|name| !name.is_empty());
    config.hooks = o.nullable("hooks", Hooks::read).unwrap_or_default();
    let (annotations, asked) = o.nullable("annotations", read_annotations).unwrap_or_default();
    config.unit_properties = asked.unit_properties;
    config.passt = asked.passt;
    config.is_sandbox = SANDBOX.iter().any(|(name, value)| {
        annotations.iter().any(|(known, given)| known == name && given == value)
    });
    config.annotations = annotations;
    if let Some(node) = o.member("linux").filter(|node| !node.is_vacant()) {
        read_linux(&node, &mut config);
    }
    for name in ["solaris", "windows", "vm", "zos", "freebsd"] {
        if let Some(node) = o.member(name).filter(|node| !node.is_vacant()) {
            node.error("is for another kind of runtime; mote-oci runs Linux containers");
        }
    }
    o.finish();
    config.memory_mib = match config.resources.memory {
        Some(bytes) => u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX),
        None => asked.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
    }
    .max(MIN_MEMORY_MIB);
    let vcpus = config.resources.cpus().or(asked.vcpus).unwrap_or(1);
    config.vcpus = vcpus.clamp(1, given.cpus.clamp(1, MAX_VCPUS)) as u8;
    config
}

fn read_version(node: &Node<'_>) -> Option<String> {
    let version = node.string()?;
    if version.starts_with("1.") {
        return Some(version);
    }
    node.error(format!("is \"{version}\"; mote-oci knows the versions 1.x"));
    None
}

fn read_root(node: &Node<'_>) -> Option<(PathBuf, bool)> {
    let mut o = node.object()?;
    let path = o.required("path", "the directory of the root file system", |node| {
        let path = node.string()?;
        if path.is_empty() || path.contains('\0') {
            node.error("must be the path of a directory");
            return None;
        }
        Some(PathBuf::from(path))
    });
    let read_only = o.nullable("readonly", Node::boolean).unwrap_or_default();
    o.finish();
    Some((path.unwrap_or_default(), read_only))
}

/// By what containerd and CRI-O (and podman) mark the container that holds a pod's namespaces.
const SANDBOX: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "sandbox"),
    ("io.kubernetes.cri-o.ContainerType", "sandbox"),
];

/// What annotations ask of mote.
#[derive(Default)]
struct Asked {
    memory_mib: Option<u32>,
    vcpus: Option<u64>,
    passt: Option<Ports>,
    unit_properties: Vec<Property>,
}

type Annotations = Vec<(String, String)>;

fn read_annotations(node: &Node<'_>) -> Option<(Annotations, Asked)> {
    let mut all = Vec::new();
    let mut asked = Asked::default();
    for (name, node) in node.object()?.members() {
        let Some(value) = node.string() else { continue };
        let number = |most: u64| {
            let number = value.parse().ok().filter(|number| (1..=most).contains(number));
            if number.is_none() {
                node.error(format!("is \"{value}\", must be a number from 1 to {most}"));
            }
            number
        };
        match name.as_str() {
            "mote.memory_mib" => {
                asked.memory_mib = number(u32::MAX.into()).and_then(|mib| u32::try_from(mib).ok());
            }
            "mote.vcpus" => asked.vcpus = number(MAX_VCPUS),
            passt::ANNOTATION => match Ports::parse(&value) {
                Ok(ports) => asked.passt = Some(ports),
                Err(problem) => node.error(problem),
            },
            other if other.starts_with(PROPERTY_ANNOTATION) => {
                let property = &other[PROPERTY_ANNOTATION.len()..];
                match Property::of_annotation(property, &value) {
                    Ok(property) => asked.unit_properties.push(property),
                    Err(problem) => node.error(problem),
                }
            }
            other if other.starts_with("mote.") => {
                node.warn("is no annotation that mote-oci knows; there are mote.memory_mib, mote.vcpus and mote.passt");
            }
            _ => {}
        }
        all.push((name, value));
    }
    Some((all, asked))
}

fn read_linux(node: &Node<'_>, config: &mut Config) {
    let Some(mut o) = node.object() else { return };
    config.network = o.nullable("namespaces", read_namespaces).unwrap_or_default();
    config.resources = o.nullable("resources", Resources::read).unwrap_or_default();
    config.cgroup = o.nullable("cgroupsPath", cgroup::read_placement).flatten();
    let devices = o.nullable("devices", read_devices).unwrap_or_default();
    config.devices = devices.and(std::mem::take(&mut config.mounts.devices));
    config.sysctls = o.nullable("sysctl", read_sysctls).unwrap_or_default();
    config.masked_paths = o.nullable("maskedPaths", Node::strings).unwrap_or_default();
    config.readonly_paths = o.nullable("readonlyPaths", Node::strings).unwrap_or_default();
    config.readonly_paths.append(&mut config.mounts.read_only);
    for (name, why) in [
        (
            "seccomp",
            "is not applied: a box's kernel is its own; capabilities and noNewPrivileges are applied",
        ),
        ("mountLabel", "has no effect: labels of the host do not reach into a box"),
    ] {
        if let Some(node) = o.member(name).filter(|node| !node.is_vacant()) {
            node.warn(why);
        }
    }
    // Nothing propagates between a box and its host.
    o.member("rootfsPropagation");
    for name in ["uidMappings", "gidMappings"] {
        if let Some(node) = o.member(name).filter(|node| !node.is_vacant()) {
            node.error(
                "cannot be had: a box's users are its own kernel's; run without a user namespace",
            );
        }
    }
    for name in ["intelRdt", "timeOffsets", "netDevices", "memoryPolicy"] {
        if let Some(node) = o.member(name).filter(|node| !node.is_vacant()) {
            node.error("cannot be had in a box; leave it out");
        }
    }
    o.nullable("personality", |node| {
        let mut o = node.object()?;
        let domain = o.required("domain", "LINUX", Node::string)?;
        if domain != "LINUX" || o.member("flags").is_some_and(|flags| !flags.is_vacant()) {
            node.error("cannot be had in a box, which is of the domain LINUX without flags");
        }
        Some(())
    });
    o.finish();
}

fn read_namespaces(node: &Node<'_>) -> Option<Network> {
    let mut network = Network::Hosts;
    let mut seen = Vec::new();
    for item in node.items()? {
        let Some(mut o) = item.object() else { continue };
        let kind = o.required("type", "a kind of namespace", Node::string);
        let path = o.nullable("path", Node::string).filter(|path| !path.is_empty());
        o.finish();
        let Some(kind) = kind else { continue };
        if seen.contains(&kind) {
            item.error(format!("is the second of type \"{kind}\"; keep one"));
        }
        match (kind.as_str(), path) {
            ("network", None) => network = Network::New,
            ("network", Some(path)) => network = Network::Joined(path.into()),
            ("user", _) => item.error(
                "cannot be had: a box's users are its own kernel's; run without a user namespace",
            ),
            ("pid" | "mount" | "ipc" | "uts" | "cgroup" | "time", None) => {}
            ("pid" | "mount" | "ipc" | "uts" | "cgroup" | "time", Some(_)) => {
                item.warn("is not shared: a box has a kernel of its own");
            }
            _ => item.error(format!("\"{kind}\" is no kind of namespace")),
        }
        seen.push(kind);
    }
    Some(network)
}

fn read_devices(node: &Node<'_>) -> Option<Devices> {
    let mut all = Vec::new();
    for item in node.items()? {
        let Some(mut o) = item.object() else { continue };
        let path = o.required("path", "the device's path in the container", Node::string);
        for name in ["type", "major", "minor", "fileMode", "uid", "gid"] {
            o.member(name);
        }
        o.finish();
        all.extend(path.map(|path| (item, path)));
    }
    Some(devices::judge(node, &all))
}

fn read_sysctls(node: &Node<'_>) -> Option<Vec<(String, String)>> {
    let members = node.object()?.members().into_iter();
    Some(members.filter_map(|(name, node)| Some((name, node.string()?))).collect())
}
