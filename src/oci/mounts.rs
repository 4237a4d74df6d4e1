//! `mounts` of `config.json`: which of them are made on the host, below the directory that the box gets as its root,
//! and which are the guest's.
//!
//! | type | destination | what becomes of it |
//! |---|---|---|
//! | bind | anywhere else | on the host, with its options; a directory or a single file. A directory, and what has options that the guest's kernel has to heed, such as `noexec`: there, too |
//! | bind | `/dev/shm` | a tmpfs of the guest as large as the host's there |
//! | bind | `/proc`, `/sys`, `/sys/fs/cgroup`, `/dev/mqueue` | the guest's own |
//! | bind | of the host's `/dev/X` on `/dev/X` | as a device that is asked for, see [`super::devices`] |
//! | bind | elsewhere below `/dev` | on the host in the image's own `/dev`, and from there into the guest's |
//! | bind | `/dev`, and elsewhere in `/proc` and `/sys` | refused: the guest's own file systems would hide it |
//! | tmpfs | `/dev` | the guest's own, see [`super::devices`] |
//! | tmpfs | elsewhere | the guest's, with its options; on the host, if a later bind lies below it |
//! | proc, sysfs, devpts, mqueue, cgroup | where they belong | the guest's own; `ro` makes it read-only |
//!
//! Mounts do not propagate between host and box after its start, whatever the options say.

use std::path::{Component, Path, PathBuf};

use super::devices::{self, Devices};
use crate::plan::BIND_OPTIONS;
use crate::spec::json::Node;
use crate::sys::mounts::{Attributes, Extent};

/// A mount that a box is to have beside its root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mount {
    /// A file or directory of the host.
    Bind(Bind),
    /// A tmpfs.
    Tmpfs(Tmpfs),
    /// A tmpfs at `/dev/shm`, as large as the one at this path on the host.
    SharedMemory(PathBuf),
}

/// A file or directory of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Where it is on the host, from the bundle on.
    pub source: PathBuf,
    /// Where in the box, an absolute path.
    pub destination: PathBuf,
    /// Whether what is mounted below it comes, too.
    pub extent: Extent,
    /// What it may be used for.
    pub attributes: Attributes,
    /// The same for what is mounted below it, too.
    pub tree_attributes: Attributes,
}

/// A tmpfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    /// Where in the box, an absolute path.
    pub destination: PathBuf,
    /// Its options (tmpfs(5), mount(8)), and `tmpcopyup`.
    pub options: Vec<String>,
    /// Whether it is made on the host: something else is mounted below it.
    pub on_host: bool,
}

impl Bind {
    /// The options that the guest's kernel heeds.
    pub fn guest_options(&self) -> Vec<&'static str> {
        let set = self.attributes.set | self.tree_attributes.set;
        let of_bind = ATTRIBUTES.iter().filter(|(name, ..)| BIND_OPTIONS.contains(name));
        of_bind.filter(|(_, bit, _)| set & bit != 0).map(|(name, ..)| *name).collect()
    }
}

impl Tmpfs {
    /// Those that the guest's kernel heeds of one that is on the host.
    pub fn guest_options(&self) -> Vec<&str> {
        let options = self.options.iter().map(String::as_str);
        options.filter(|option| BIND_OPTIONS.contains(option)).collect()
    }
}

/// All of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mounts {
    /// In order.
    pub mounts: Vec<Mount>,
    /// File systems of the guest's own that are to be read-only.
    pub read_only: Vec<String>,
    /// What is had of its devices because it was bound.
    pub devices: Devices,
}

/// Directories whose file systems are the guest's own.
const GUESTS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// The guest's own file systems that a bind of the host's may stand for: engines write them for `--privileged`,
/// `--pid host` or `--ipc host`.
const STAND_INS: [&str; 4] = ["/proc", "/sys", "/sys/fs/cgroup", "/dev/mqueue"];

const SHARED_MEMORY: &str = "/dev/shm";

/// What may be in a host's `/dev` and is no device.
const NO_DEVICES: [&str; 3] = [SHARED_MEMORY, "/dev/hugepages", "/dev/log"];

/// The options that are known, for `features`.
pub fn known_options() -> Vec<String> {
    let attributes =
        ATTRIBUTES.iter().flat_map(|(name, ..)| [(*name).to_owned(), format!("r{name}")]);
    let others = WITHOUT_EFFECT.iter().chain(&PROPAGATION).chain(&["tmpcopyup"]);
    let mut all: Vec<String> = attributes.chain(others.map(|name| (*name).to_owned())).collect();
    all.sort();
    all
}

/// Reads the array.
pub fn read(node: &Node<'_>) -> Option<Mounts> {
    let mut all = Mounts::default();
    let mut devices = Vec::new();
    for item in node.items()? {
        if let Some(what) = item.read(read_mount) {
            match what {
                Read::Mount(mount) => all.mounts.push(mount),
                Read::Guests { destination, read_only: true } => all.read_only.push(destination),
                Read::Guests { .. } => {}
                Read::Device(path) => devices.push((item, path)),
            }
        }
    }
    all.devices = devices::judge(node, &devices);
    decide_sides(&mut all.mounts, Path::to_owned);
    Some(all)
}

/// Decides which tmpfs are made on the host: those in which something of the host is mounted later. A destination's links
/// may lead into one: `resolve` says where they do.
pub fn decide_sides(mounts: &mut [Mount], resolve: impl Fn(&Path) -> PathBuf) {
    // From the end on, so that each tmpfs meets what comes after it.
    let mut later: Vec<PathBuf> = Vec::new();
    for mount in mounts.iter_mut().rev() {
        match mount {
            Mount::Bind(bind) => later.push(resolve(&bind.destination)),
            Mount::Tmpfs(tmpfs) => {
                let place = resolve(&tmpfs.destination);
                tmpfs.on_host |= later.iter().any(|path| path.starts_with(&place));
                if tmpfs.on_host {
                    later.push(place);
                }
            }
            Mount::SharedMemory(_) => {}
        }
    }
}

/// What one item says.
enum Read {
    Mount(Mount),
    /// The guest has its own there.
    Guests {
        destination: String,
        read_only: bool,
    },
    /// A device of the host.
    Device(String),
}

fn read_mount(node: &Node<'_>) -> Option<Read> {
    let mut o = node.object()?;
    let destination = o.required("destination", "a path in the box", read_destination);
    let kind = o.nullable("type", Node::string).unwrap_or_default();
    let source = o.nullable("source", Node::string).unwrap_or_default();
    let options_node = o.member("options").filter(|options| !options.is_vacant());
    let options = o.nullable("options", Node::strings).unwrap_or_default();
    for name in ["uidMappings", "gidMappings"] {
        if let Some(node) = o.member(name).filter(|node| !node.is_vacant()) {
            node.error("cannot be had: a box's users are its own kernel's; leave it out");
        }
    }
    o.finish();
    let destination = destination?;
    // Behind a bad option, reading goes on with the next mount.
    let options_node = options_node.as_ref().unwrap_or(node);
    let is_bind = options.iter().any(|option| option == "bind" || option == "rbind");
    let read_only = options.iter().rfind(|option| ["ro", "rw"].contains(&option.as_str()));
    let read_only = read_only.is_some_and(|option| option == "ro");
    let path = destination.to_string_lossy();
    let guests = || Read::Guests { destination: path.clone().into_owned(), read_only };
    match kind.as_str() {
        "bind" => read_bind(node, options_node, source, &destination, &options),
        "none" | "" if is_bind => read_bind(node, options_node, source, &destination, &options),
        "tmpfs" if path == "/dev" => Some(guests()),
        "tmpfs" => {
            let options = tmpfs_options(options_node, &options)?;
            Some(Read::Mount(Mount::Tmpfs(Tmpfs { destination, options, on_host: false })))
        }
        _ => {
            let place = match kind.as_str() {
                "proc" => "/proc",
                "sysfs" => "/sys",
                "devtmpfs" => "/dev",
                "devpts" => "/dev/pts",
                "mqueue" => "/dev/mqueue",
                "cgroup" | "cgroup2" => "/sys/fs/cgroup",
                _ => {
                    node.error(format!(
                        "type \"{kind}\" cannot be mounted in a box; bind, tmpfs, and the kernel's own file systems can"
                    ));
                    return None;
                }
            };
            if path == place {
                return Some(guests());
            }
            node.error(format!("a box has its {kind} at {place}, and no other at {path}"));
            None
        }
    }
}

fn read_destination(node: &Node<'_>) -> Option<PathBuf> {
    let text = node.string()?;
    if text.contains('\0') {
        node.error("contains a zero byte");
        return None;
    }
    // runc takes a path without `/` in front as one from the root on.
    let mut path = PathBuf::from("/");
    for component in Path::new(&text).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => drop(path.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if path.as_os_str() == "/" {
        node.error(format!("is \"{text}\", the root itself; that is root.path"));
        return None;
    }
    Some(path)
}

fn read_bind(
    node: &Node<'_>,
    options_node: &Node<'_>,
    source: String,
    destination: &Path,
    options: &[String],
) -> Option<Read> {
    let path = destination.to_string_lossy();
    if STAND_INS.contains(&&*path) {
        node.warn(format!("{path} is the guest's own, not the host's"));
        return Some(Read::Guests { destination: path.into_owned(), read_only: false });
    }
    if source.is_empty() || source.contains('\0') {
        node.error("has no source; a bind mount needs a path of the host");
        return None;
    }
    if path == SHARED_MEMORY {
        return Some(Read::Mount(Mount::SharedMemory(source.into())));
    }
    let is_none = |path: &&str| destination.starts_with(path);
    if is_below_dev(destination)
        && destination == Path::new(&source)
        && !NO_DEVICES.iter().any(is_none)
    {
        return Some(Read::Device(source));
    }
    let hides = |guests: &&&str| destination.starts_with(guests) && !is_below_dev(destination);
    if let Some(guests) = GUESTS.iter().find(hides) {
        node.error(format!(
            "{path} lies in {guests}, where the guest's own file system would hide it; choose another destination"
        ));
        return None;
    }
    bind_options(options_node, options).map(|(extent, attributes, tree_attributes)| {
        let (source, destination) = (source.into(), destination.into());
        Read::Mount(Mount::Bind(Bind { source, destination, extent, attributes, tree_attributes }))
    })
}

/// Whether a destination is below `/dev`, where what is mounted on the host is hidden until the guest mounts it again.
pub fn is_below_dev(destination: &Path) -> bool {
    destination.parent().is_some_and(|parent| parent.starts_with("/dev"))
}

/// Options that set or clear an attribute: name, bits to set, bits to clear.
const ATTRIBUTES: [(&str, u64, u64); 15] = [
    ("ro", libc::MOUNT_ATTR_RDONLY, 0),
    ("rw", 0, libc::MOUNT_ATTR_RDONLY),
    ("nosuid", libc::MOUNT_ATTR_NOSUID, 0),
    ("suid", 0, libc::MOUNT_ATTR_NOSUID),
    ("nodev", libc::MOUNT_ATTR_NODEV, 0),
    ("dev", 0, libc::MOUNT_ATTR_NODEV),
    ("noexec", libc::MOUNT_ATTR_NOEXEC, 0),
    ("exec", 0, libc::MOUNT_ATTR_NOEXEC),
    ("nosymfollow", libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
    ("symfollow", 0, libc::MOUNT_ATTR_NOSYMFOLLOW),
    ("nodiratime", libc::MOUNT_ATTR_NODIRATIME, 0),
    ("diratime", 0, libc::MOUNT_ATTR_NODIRATIME),
    ("noatime", libc::MOUNT_ATTR_NOATIME, libc::MOUNT_ATTR__ATIME),
    ("relatime", libc::MOUNT_ATTR_RELATIME, libc::MOUNT_ATTR__ATIME),
    ("strictatime", libc::MOUNT_ATTR_STRICTATIME, libc::MOUNT_ATTR__ATIME),
];

/// Options of mount(8) that change nothing of a bind mount, or what is so anyway.
const WITHOUT_EFFECT: [&str; 26] = [
    "defaults",
    "bind",
    "rbind",
    "private",
    "rprivate",
    "async",
    "sync",
    "dirsync",
    "mand",
    "nomand",
    "iversion",
    "noiversion",
    "lazytime",
    "nolazytime",
    "loud",
    "silent",
    "acl",
    "noacl",
    "remount",
    "atime",
    "norelatime",
    "nostrictatime",
    "ratime",
    "rnorelatime",
    "rnostrictatime",
    "notmpcopyup",
];

/// Options that would have later mounts propagate.
const PROPAGATION: [&str; 6] =
    ["shared", "rshared", "slave", "rslave", "unbindable", "runbindable"];

fn bind_options(node: &Node<'_>, options: &[String]) -> Option<(Extent, Attributes, Attributes)> {
    let mut extent = Extent::One;
    let (mut one, mut tree) = (Attributes::default(), Attributes::default());
    let find = |name: &str| ATTRIBUTES.iter().find(|(known, ..)| *known == name);
    let mut all_known = true;
    for option in options {
        if option == "rbind" {
            extent = Extent::Tree;
        }
        let recursive = option.strip_prefix('r').and_then(find);
        if let Some((_, set, clear)) = find(option) {
            add(&mut one, *set, *clear);
        } else if let Some((_, set, clear)) = recursive {
            add(&mut tree, *set, *clear);
        } else if PROPAGATION.contains(&option.as_str()) {
            node.warn(format!(
                "\"{option}\" has no effect: what is mounted after a box's start does not appear in it"
            ));
        } else if !WITHOUT_EFFECT.contains(&option.as_str()) {
            node.error(format!("\"{option}\" is no option of a bind mount that mote-oci knows"));
            all_known = false;
        }
    }
    all_known.then_some((extent, one, tree))
}

/// Adds an option to those before it, of which it may take one back.
fn add(attributes: &mut Attributes, set: u64, clear: u64) {
    attributes.set = attributes.set & !clear | set;
    attributes.clear = attributes.clear & !set | clear;
}

/// Those options of a tmpfs that say something.
fn tmpfs_options(node: &Node<'_>, options: &[String]) -> Option<Vec<String>> {
    // Those that say something of a tmpfs.
    const FLAGS: [&str; 7] =
        ["ro", "nosuid", "nodev", "noexec", "noatime", "relatime", "tmpcopyup"];
    const VALUES: [&str; 6] = ["size", "nr_blocks", "nr_inodes", "mode", "uid", "gid"];
    const DEFAULTS: [&str; 7] =
        ["rw", "suid", "dev", "exec", "diratime", "nodiratime", "strictatime"];
    let mut kept = Vec::new();
    let mut all_known = true;
    for option in options {
        let has_value = option.split_once('=').is_some_and(|(name, value)| {
            VALUES.contains(&name) && !value.is_empty() && !value.contains(',')
        });
        let name = option.as_str();
        if has_value || FLAGS.contains(&name) {
            kept.push(option.clone());
        } else if DEFAULTS.contains(&name) {
            // A later option takes an earlier one back.
            let opposite = if name == "rw" { "ro".to_owned() } else { format!("no{name}") };
            kept.retain(|earlier| *earlier != opposite);
        } else if !WITHOUT_EFFECT.contains(&name) && !PROPAGATION.contains(&name) {
            node.error(format!("\"{option}\" is no option of a tmpfs that mote-oci knows"));
            all_known = false;
        }
    }
    all_known.then_some(kept)
}
