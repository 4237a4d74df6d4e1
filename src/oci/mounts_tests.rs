//! `mounts` of `config.json`, as engines write it and as it cannot be had.

use std::cell::RefCell;

use super::devices::Devices;
use super::mounts::{self, Mount, Mounts};
use crate::spec::json::{Json, Object, Report};
use crate::sys::mounts::{Attributes, Extent};

fn parsed(text: &str) -> (Mounts, Report) {
    let json = Json::parse(&format!("{{\"mounts\":{text}}}")).expect("JSON");
    let report = RefCell::new(Report::default());
    let mut o = Object::root(&json, &report).expect("an object");
    let mounts = o.nullable("mounts", mounts::read).unwrap_or_default();
    (mounts, report.into_inner())
}

#[test]
fn what_every_container_has_is_the_guests() {
    let (mounts, report) = parsed(
        r#"[{"destination":"/proc","type":"proc","source":"proc"},
        {"destination":"/dev","type":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},
        {"destination":"/sys","type":"sysfs","options":["ro","nosuid"]},
        {"destination":"/dev/pts","type":"devpts","options":["newinstance","gid=5"]},
        {"destination":"/dev/mqueue","type":"mqueue"},
        {"destination":"/sys/fs/cgroup","type":"cgroup","options":["rprivate","relatime","ro"]},
        {"destination":"/dev/shm","type":"bind","source":"/c/shm","options":["bind","rprivate"]},
        {"destination":"/dev/mqueue","type":"bind","source":"/dev/mqueue","options":["bind"]}]"#,
    );
    assert_eq!(report.errors, []);
    assert_eq!(mounts.mounts, [Mount::SharedMemory("/c/shm".into())]);
    assert_eq!(mounts.read_only, ["/sys", "/sys/fs/cgroup"]);
}

#[test]
fn options_of_binds_are_kept() {
    let (mounts, report) = parsed(
        r#"[{"destination":"//a/./b/../c","type":"bind","source":"s","options":["rbind","ro","nosuid","noatime","rro","slave"]},
        {"destination":"d","type":"none","source":"/t","options":["bind","ro","rw"]}]"#,
    );
    assert_eq!(report.errors, []);
    assert_eq!(report.warnings.len(), 1);
    let [Mount::Bind(first), Mount::Bind(second)] = &mounts.mounts[..] else {
        panic!("{mounts:?}")
    };
    assert_eq!((first.destination.to_str(), first.extent), (Some("/a/c"), Extent::Tree));
    let set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOATIME;
    assert_eq!(first.attributes.set, set);
    assert_eq!(first.tree_attributes.set, libc::MOUNT_ATTR_RDONLY);
    assert_eq!((second.destination.to_str(), second.extent), (Some("/d"), Extent::One));
    assert_eq!(second.attributes, Attributes { set: 0, clear: libc::MOUNT_ATTR_RDONLY });
    assert_eq!(first.guest_options(), ["ro", "nosuid"]);
    assert_eq!(second.guest_options(), [""; 0]);
}

#[test]
fn a_tmpfs_with_something_below_it_is_the_hosts() {
    let (mounts, report) = parsed(
        r#"[{"destination":"/run","type":"tmpfs","options":["rw","noexec","exec","nodev","size=1m","tmpcopyup","rprivate"]},
        {"destination":"/t","type":"tmpfs"},
        {"destination":"/run/.containerenv","type":"bind","source":"/c/e","options":["bind"]}]"#,
    );
    assert_eq!(report.errors, []);
    let on_host = mounts.mounts.iter().filter_map(|mount| match mount {
        Mount::Tmpfs(tmpfs) => Some(tmpfs.on_host),
        _ => None,
    });
    assert_eq!(on_host.collect::<Vec<_>>(), [true, false]);
    let Mount::Tmpfs(run) = &mounts.mounts[0] else { panic!("{mounts:?}") };
    assert_eq!(run.options, ["nodev", "size=1m", "tmpcopyup"]);
    assert_eq!(run.guest_options(), ["nodev"]);
}

#[test]
fn devices_of_the_host_are_no_mounts() {
    let item = |name: &str| {
        format!(
            r#"{{"destination":"/dev/{name}","type":"bind","source":"/dev/{name}","options":["rbind"]}}"#
        )
    };
    let all = [item("null"), item("fuse"), item("sda")].join(",");
    let (mounts, report) = parsed(&format!("[{all}]"));
    assert_eq!(mounts.mounts, []);
    assert_eq!(mounts.devices, Devices::Standard(vec!["/dev/fuse".into()]));
    let [fault] = &report.errors[..] else { panic!("{:?}", report.errors) };
    assert_eq!(fault.path, "mounts[2]");
    assert!(fault.problem.starts_with("/dev/sda is a device of the host"), "{fault}");
    let all: Vec<String> = (0..21).map(|number| item(&format!("d{number}"))).collect();
    let (mounts, report) = parsed(&format!("[{}]", all.join(",")));
    assert_eq!((mounts.mounts.len(), report.errors.len(), report.warnings.len()), (0, 0, 1));
    assert_eq!(mounts.devices, Devices::All);
}

#[test]
fn what_cannot_be_mounted_is_named() {
    let (_, report) = parsed(
        r#"[{"destination":"/","type":"bind","source":"/"},{"destination":"/x","type":"overlay"},
        {"destination":"/proc/x","type":"bind","source":"/s"},{"destination":"/x","type":"bind"},
        {"destination":"/x","type":"bind","source":"/s","options":["idmap"]},{"type":"tmpfs"},
        {"destination":"/x","type":"bind","source":"/s","uidMappings":[{}]},
        {"destination":"/x","type":"tmpfs","options":["size=1,mode=0"]},{"destination":"/y","type":"proc"}, 5]"#,
    );
    let paths: Vec<&str> = report.errors.iter().map(|fault| &fault.path[..]).collect();
    assert_eq!(
        paths,
        [
            "mounts[0].destination",
            "mounts[1]",
            "mounts[2]",
            "mounts[3]",
            "mounts[4].options",
            "mounts[5].destination",
            "mounts[6].uidMappings",
            "mounts[7].options",
            "mounts[8]",
            "mounts[9]"
        ]
    );
}

#[test]
fn ten_thousand_are_read_soon() {
    let item = |number| {
        format!(r#"{{"destination":"/m/{number}","type":"bind","source":"/s","options":["bind"]}}"#)
    };
    let items: Vec<String> = (0..10_000).map(item).collect();
    let (mounts, report) = parsed(&format!("[{}]", items.join(",")));
    assert_eq!((mounts.mounts.len(), report.errors.len()), (10_000, 0));
}
