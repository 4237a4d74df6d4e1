//! `config.json` as engines write it, and with everything wrong that can be.

use serde_json::{Value, json};

use super::cgroup::Placement;
use super::config::{Circumstances, Config, Network};
use super::devices::Devices;
use super::mounts::Mount;
use crate::spec::json::Report;

fn parse(config: &Value) -> (Config, Report) {
    let mut report = Report::default();
    let given = Circumstances { cpus: 4 };
    let config = Config::parse(&config.to_string(), given, &mut report).expect("an object");
    (config, report)
}

/// What podman 4.3 writes, with every member that mote-oci translates.
fn whole() -> Value {
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "terminal": false, "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]},
            "args": ["sh", "-c", "true"], "env": ["PATH=/bin", "container=podman"], "cwd": "/",
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]},
            "rlimits": [{"type": "RLIMIT_NPROC", "hard": 4194304, "soft": 4194304}],
            "noNewPrivileges": true, "oomScoreAdj": 0, "apparmorProfile": "containers-default"
        },
        "root": {"path": "/var/lib/containers/merged", "readonly": true},
        "hostname": "h", "domainname": "d",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/c/shm", "options": ["bind", "rprivate", "nosuid"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/c/hosts", "options": ["bind", "rprivate"]},
            {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "tmpcopyup", "size=64k"]}
        ],
        "hooks": {"prestart": [{"path": "/bin/true", "args": ["true"], "env": ["A=1"], "timeout": 5}]},
        "annotations": {"io.podman.annotations.init": "FALSE", "mote.vcpus": "3"},
        "linux": {
            "sysctl": {"net.ipv4.ping_group_range": "0 0"},
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}], "pids": {"limit": 2048},
                "memory": {"limit": 268435456, "swap": 536870912}, "cpu": {"shares": 512, "quota": 50000, "period": 100000}
            },
            "cgroupsPath": "/libpod_parent/libpod-1",
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/n"}, {"type": "ipc"}],
            "devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"], "rootfsPropagation": "private"
        }
    })
}

#[test]
fn what_podman_writes_is_understood() {
    let (config, report) = parse(&whole());
    assert_eq!(report.errors, []);
    // The seccomp and AppArmor profiles.
    assert_eq!(report.warnings.len(), 2, "{:?}", report.warnings);
    assert_eq!((config.memory_mib, config.vcpus), (256, 1));
    assert_eq!(config.network, Network::Joined("/run/netns/n".into()));
    assert_eq!(config.cgroup, Some(Placement::Path("libpod_parent/libpod-1".into())));
    assert_eq!(config.readonly_paths, ["/proc/sys", "/sys"]);
    assert_eq!(config.hooks.create.len(), 1);
    assert!(config.read_only_root && config.process.no_new_privileges);
    let [Mount::SharedMemory(_), Mount::Bind(_), Mount::Tmpfs(_)] = &config.mounts.mounts[..]
    else {
        panic!("{:?}", config.mounts)
    };
}

#[test]
fn what_runc_spec_writes_is_understood() {
    let text = include_str!("testdata/runc-spec.json");
    let (config, report) = parse(&serde_json::from_str(text).expect("JSON"));
    assert_eq!((report.errors, report.warnings), (vec![], vec![]));
    assert_eq!((config.memory_mib, config.vcpus, config.network), (512, 1, Network::New));
}

/// Calls `change` for every place in a document, with a copy of the document and the place's pointer.
fn each_place(whole: &Value, at: &str, change: &mut impl FnMut(&str)) {
    let below: Vec<(String, &Value)> = match whole {
        Value::Object(members) => members
            .iter()
            .map(|(name, value)| (format!("{at}/{}", name.replace('/', "~1")), value))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(index, value)| (format!("{at}/{index}"), value))
            .collect(),
        _ => Vec::new(),
    };
    for (pointer, value) in below {
        change(&pointer);
        each_place(value, &pointer, change);
    }
}

/// A pointer's path in messages.
fn path_of(pointer: &str) -> String {
    let mut path = String::new();
    for part in pointer.split('/').skip(1) {
        match part.parse::<usize>() {
            Ok(index) => path += &format!("[{index}]"),
            Err(_) if path.is_empty() => path += part,
            Err(_) => path += &format!(".{part}"),
        }
    }
    path.replace("~1", "/")
}

#[test]
fn each_member_of_a_wrong_type_is_named() {
    let whole = whole();
    // Members that only say what the host should have done, or that have no effect.
    let free = [
        "linux.resources.devices",
        "linux.devices[0].type",
        "linux.devices[0].m",
        "linux.seccomp",
        "linux.rootfsPropagation",
        "process.apparmorProfile",
    ];
    each_place(&whole, "", &mut |pointer| {
        let path = path_of(pointer);
        let mut wrong = whole.clone();
        let place = wrong.pointer_mut(pointer).expect("a place");
        // A value of no type that anything has.
        *place = json!(0.5);
        let (_, report) = parse(&wrong);
        if free.iter().any(|free| path.starts_with(free)) {
            return assert_eq!(report.errors, [], "{path}");
        }
        let named = report.errors.iter().any(|fault| fault.path == path);
        assert!(named, "{path}: {:?}", report.errors);
    });
}

#[test]
fn each_member_may_be_missing_or_is_named() {
    let whole = whole();
    let required = [
        "ociVersion",
        "process",
        "process.args",
        "process.cwd",
        "root",
        "root.path",
        "process.rlimits[0].type",
        "process.rlimits[0].hard",
        "process.rlimits[0].soft",
        "hooks.prestart[0].path",
        "linux.devices[0].path",
    ];
    each_place(&whole, "", &mut |pointer| {
        let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
        let path = path_of(pointer);
        let mut lacking = whole.clone();
        let Some(Value::Object(members)) = lacking.pointer_mut(parent) else { return };
        members.remove(&name.replace("~1", "/"));
        let (_, report) = parse(&lacking);
        let of_list = path.starts_with("mounts[") || path.contains("namespaces[");
        let is_required = required.contains(&path.as_str())
            || of_list && ["destination", "source", "type"].iter().any(|end| path.ends_with(end));
        if !is_required {
            // Swap is memory and swap together.
            let paths: Vec<&str> = report.errors.iter().map(|fault| &fault.path[..]).collect();
            let expected: &[&str] = if path == "linux.resources.memory.limit" {
                &["linux.resources.memory"]
            } else {
                &[]
            };
            assert_eq!(paths, expected, "without {path}");
        } else if required.contains(&path.as_str()) {
            assert_eq!(report.errors[0].path, path, "{:?}", report.errors);
        }
    });
}

#[test]
fn what_a_box_cannot_be_is_refused_by_its_path() {
    for (pointer, value) in [
        ("/ociVersion", json!("2.0.0")),
        ("/vm", json!({"kernel": {"path": "/k"}})),
        ("/windows", json!({"layerFolders": ["x"]})),
        ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_RT"})),
        ("/process/scheduler", json!({"policy": "SCHED_FIFO"})),
        ("/hooks/createContainer", json!([{"path": "/bin/true"}])),
        ("/linux/uidMappings", json!([{"containerID": 0, "hostID": 1, "size": 1}])),
        ("/linux/intelRdt", json!({"closID": "x"})),
        ("/linux/personality", json!({"domain": "LINUX32"})),
        ("/linux/timeOffsets", json!({"monotonic": {"secs": 1}})),
        ("/linux/namespaces/0", json!({"type": "user"})),
        ("/linux/namespaces/1", json!({"type": "pid"})),
        ("/linux/namespaces/2", json!({"type": "nonsense"})),
        ("/linux/devices/0", json!({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0})),
        ("/linux/cgroupsPath", json!("machine:libpod:1")),
        ("/annotations/mote.vcpus", json!("0")),
    ] {
        let mut config = whole();
        let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
        match config.pointer_mut(parent).expect("a place") {
            Value::Array(items) => items[name.parse::<usize>().expect("an index")] = value,
            place => place[name] = value,
        }
        let (_, report) = parse(&config);
        let paths: Vec<&str> = report.errors.iter().map(|fault| &fault.path[..]).collect();
        assert_eq!(paths, [path_of(pointer)]);
    }
}

#[test]
fn all_devices_of_a_privileged_container_are_no_error() {
    let mut config = whole();
    let device = |number| json!({"path": format!("/dev/tty{number}"), "type": "c", "major": 4, "minor": number});
    config["linux"]["devices"] = (0..117).map(device).collect();
    let (read, report) = parse(&config);
    assert_eq!((report.errors, read.devices), (vec![], Devices::All));
    assert!(report.warnings.iter().any(|fault| fault.path == "linux.devices"));
    config["linux"]["devices"] = json!([{"path": "/dev/net/tun"}]);
    assert_eq!(parse(&config).0.devices, Devices::Standard(vec!["/dev/net/tun".into()]));
}

#[test]
fn a_box_without_limits_is_sized_by_annotations() {
    let mut config = whole();
    config["linux"]["resources"] = json!({});
    config["annotations"]["mote.memory_mib"] = json!("2048");
    let (read, report) = parse(&config);
    assert_eq!((report.errors, read.memory_mib, read.vcpus), (vec![], 2048, 3));
    config["annotations"]["mote.vcpus"] = json!("64");
    assert_eq!(parse(&config).0.vcpus, 4, "no more than the host has");
    // Least RAM.
    config["linux"]["resources"] = json!({"memory": {"limit": 4194304}});
    assert_eq!(parse(&config).0.memory_mib, 64);
}

#[test]
fn what_is_no_object_is_refused() {
    let given = Circumstances { cpus: 1 };
    for text in ["", "[]", "null", "{", "5"] {
        assert!(Config::parse(text, given, &mut Report::default()).is_err(), "{text}");
    }
}
