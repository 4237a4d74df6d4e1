//! The spec that mote runs for a container: its `InstanceSpec`, with the members that are for boxes like these.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use super::config::{Config, Network};
use super::devices::Devices;
use super::mounts::{Mount, is_below_dev};
use super::process::Process;
use super::state::Container;
use crate::sys::mounts::tmpfs_size;

/// Size of the guest's `/dev/shm` if it is to be like one of the host's that is no tmpfs (POSIX shared memory, as
/// engines have it by default).
const DEFAULT_SHARED_MEMORY: u64 = 64 << 20;

/// What is only known in a container's network namespace.
#[derive(Debug, Default)]
pub struct Inside {
    /// The spec's `network`, if the box is to have one of its own.
    pub network: Option<Value>,
    /// The namespace's own settings, as far as they hold for a box's sockets.
    pub sysctls: Vec<(String, String)>,
}

/// The spec's text.
pub fn write(config: &Config, container: &Container, inside: Inside) -> String {
    let process = &config.process;
    let (program, args) =
        process.args.split_first().map_or(("", &[][..]), |(program, args)| (program, args));
    // The container's own last.
    let sysctls = [inside.sysctls, config.sysctls.clone()].concat();
    let mut spec = json!({
        "box_id": container.state.id,
        "vcpus": config.vcpus,
        "memory_mib": config.memory_mib,
        "rootfs_path": container.file("root"),
        "exec_socket_path": container.socket("exec.sock"),
        "pty_socket_path": container.socket("pty.sock"),
        "fs_mounts": [],
        "workdir": process.cwd,
        "entrypoint": {
            "executable": program,
            "args": args,
            "env": process.env,
            "stdin": true,
            "terminal": process.terminal,
            "start": "on-request",
            "pid1": true,
        },
        "process": write_process(process),
        "sysctls": sysctls,
        "guest_mounts": guest_mounts(config, &container.state.bundle),
        "devices": match &config.devices {
            Devices::All => Value::Null,
            Devices::Standard(more) => json!(more),
        },
        "masked_paths": config.masked_paths,
        "readonly_paths": config.readonly_paths,
        "signals": "entrypoint",
        "resource_limits": { "ulimits": process.ulimits },
    });
    for (name, value) in [("hostname", &config.hostname), ("domainname", &config.domainname)] {
        if let Some(value) = value {
            spec[name] = json!(value);
        }
    }
    match inside.network {
        Some(network) => spec["network"] = network,
        None => {
            spec["publish"] = json!("listeners");
            // Its loopback is the namespace's, which it may share with others of a pod; the host's is nobody's.
            if !is_hosts(&config.network) {
                spec["loopback"] = json!("netns");
            }
        }
    }
    if let Some(Some(pids)) = config.resources.pids {
        spec["resource_limits"]["pids_limit"] = json!(pids);
    }
    spec.to_string()
}

/// The network namespace of this process.
const OWN_NETWORK: &str = "/proc/self/ns/net";

/// Whether a container is on the host's own network.
fn is_hosts(network: &Network) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    match network {
        Network::Hosts => true,
        Network::New => false,
        Network::Joined(path) => {
            let joined = identity(path);
            // Who may not look at the host's is on it as a rule.
            let hosts =
                ["/proc/1/ns/net", OWN_NETWORK].iter().find_map(|file| identity(Path::new(file)));
            joined.is_some() && joined == hosts
        }
    }
}

fn write_process(process: &Process) -> Value {
    let (user, capabilities) = (&process.user, &process.capabilities);
    json!({
        "uid": user.uid,
        "gid": user.gid,
        "additional_gids": user.additional_gids,
        "umask": user.umask,
        "capabilities": {
            "bounding": capabilities.bounding,
            "effective": capabilities.effective,
            "inheritable": capabilities.inheritable,
            "permitted": capabilities.permitted,
            "ambient": capabilities.ambient,
        },
        "no_new_privileges": process.no_new_privileges,
    })
}

fn guest_mounts(config: &Config, bundle: &Path) -> Vec<Value> {
    let mounts = config.mounts.mounts.iter().filter_map(|mount| match mount {
        Mount::Tmpfs(tmpfs) if !tmpfs.on_host => Some(
            json!({"type": "tmpfs", "destination": tmpfs.destination, "options": tmpfs.options}),
        ),
        Mount::SharedMemory(source) => Some(shared_memory(source)),
        Mount::Tmpfs(tmpfs) => Some(on_itself(&tmpfs.destination, tmpfs.guest_options())),
        Mount::Bind(bind) => {
            let options = bind.guest_options();
            let is_guests = !options.is_empty() || is_below_dev(&bind.destination);
            // Images' programs look whether somebody has mounted a directory for their data.
            (is_guests || bundle.join(&bind.source).is_dir())
                .then(|| on_itself(&bind.destination, options))
        }
    });
    mounts.collect()
}

/// What the host has mounted there, once more: so that the guest sees it, or a mount, or that its kernel heeds the options.
fn on_itself(path: &Path, options: Vec<&str>) -> Value {
    json!({"type": "bind", "source": path, "destination": path, "options": options})
}

fn shared_memory(source: &Path) -> Value {
    let size = tmpfs_size(source).ok().flatten().filter(|size| *size > 0);
    let size = size.unwrap_or(DEFAULT_SHARED_MEMORY);
    let options = [
        "nosuid".into(),
        "nodev".into(),
        "noexec".into(),
        "mode=1777".into(),
        format!("size={size}"),
    ];
    json!({"type": "tmpfs", "destination": "/dev/shm", "options": options})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::config::Circumstances;
    use crate::oci::state::State;
    use crate::spec::Spec;
    use crate::spec::json::Report;

    #[test]
    fn a_container_becomes_a_spec() {
        let text = r#"{"ociVersion":"1.0.2","root":{"path":"rootfs","readonly":true},"hostname":"h",
            "process":{"terminal":true,"args":["sh","-c","x"],"env":["A=1"],"cwd":"/w","user":{"uid":5,"gid":6},
            "capabilities":{"bounding":["CAP_CHOWN"]},"rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":2}]},
            "mounts":[{"destination":"/t","type":"tmpfs","options":["size=64k"]},
            {"destination":"/dev/shm","type":"bind","source":"/nonexistent","options":["bind"]}],
            "linux":{"sysctl":{"net.core.somaxconn":"1"},"maskedPaths":["/proc/kcore"],
            "resources":{"pids":{"limit":7},"memory":{"limit":104857601},"cpu":{"quota":250000}}}}"#;
        let mut report = Report::default();
        let given = Circumstances { cpus: 2 };
        let config = Config::parse(text, given, &mut report).expect("an object");
        assert_eq!(report.errors, []);
        let state = State { id: "x".into(), ..State::default() };
        let spec = write(&config, &Container::new("/s/x".into(), state), Inside::default());
        let json: Value = serde_json::from_str(&spec).expect("JSON");
        assert_eq!((&json["vcpus"], &json["memory_mib"]), (&json!(2), &json!(101)));
        assert_eq!(json["rootfs_path"], "/s/x/root");
        assert_eq!(json["entrypoint"]["args"], json!(["-c", "x"]));
        assert_eq!(json["entrypoint"]["terminal"], true);
        assert_eq!(json["process"]["uid"], 5);
        assert_eq!(json["guest_mounts"][1]["options"][4], "size=67108864");
        assert_eq!(json["resource_limits"], json!({"ulimits": ["NOFILE=1:2"], "pids_limit": 7}));
        assert_eq!((&json["publish"], &json["loopback"]), (&json!("listeners"), &Value::Null));
        for (network, is_host) in
            [(Network::New, false), (Network::Joined("/nonexistent".into()), false)]
        {
            assert_eq!(is_hosts(&network), is_host, "{network:?}");
        }
        // mote reads it.
        let mut report = Report::default();
        Spec::parse(&spec, &mut report).expect("a spec");
        assert_eq!(report.errors, []);
    }
}
