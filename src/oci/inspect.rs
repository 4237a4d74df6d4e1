//! What is told of containers and of this runtime.

use anyhow::{Result, anyhow};
use serde_json::json;

use super::mounts;
use super::state::{OCI_VERSION, Status, Store};
use crate::plan::CAPABILITIES;

/// The versions, as `--version` prints them: engines show the first line.
pub const VERSION: &str =
    concat!("mote-oci version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.0.2\n");

/// The help text.
pub const HELP: &str = "\
mote-oci runs the containers of podman and containerd in mote's boxes.

mote-oci [--root DIR] [--log FILE] [--log-format text|json] [--debug] [--systemd-cgroup] COMMAND

  create [--bundle DIR] [--pid-file FILE] [--console-socket SOCKET] ID
  start ID
  run [as for create] [--detach] [--keep] ID
  state ID
  kill [--all] ID [SIGNAL]
  delete [--force] ID
  exec [--process FILE] [--detach] [--pid-file FILE] [--tty] [--console-socket SOCKET]
       [--cwd DIR] [--env NAME=VALUE] [--user UID[:GID]] ID [CMD ARG...]
  list [--format table|json] [--quiet]
  ps [--format table|json] ID
  pause ID
  resume ID
  update --resources FILE ID
  features
";

/// A container's state.
///
/// # Errors
/// It is not there.
pub fn state(store: &Store, id: &str) -> Result<String> {
    let container = store.find(id)?;
    Ok(format!("{:#}\n", container.to_json(container.status())))
}

/// All containers.
///
/// # Errors
/// Their directory cannot be read.
pub fn list(store: &Store, json: bool, quiet: bool) -> Result<String> {
    let containers = store.all()?;
    if quiet {
        return Ok(containers.iter().map(|container| container.state.id.clone() + "\n").collect());
    }
    if json {
        let states: Vec<_> =
            containers.iter().map(|container| container.to_json(container.status())).collect();
        return Ok(format!("{}\n", json!(states)));
    }
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED"].map(str::to_owned)];
    for container in &containers {
        let (status, state) = (container.status(), &container.state);
        let pid = state.pid.filter(|_| status != Status::Stopped).unwrap_or_default();
        rows.push([
            state.id.clone(),
            pid.to_string(),
            status.word().into(),
            state.bundle.display().to_string(),
            state.created.clone(),
        ]);
    }
    Ok(table(&rows))
}

/// Rows in columns as wide as they have to be.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..N).map(|column| width(column).unwrap_or_default()).collect();
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// The processes of a container on the host: mote and its helpers. What runs in the box has no numbers there.
///
/// # Errors
/// It is not there, or has no cgroup.
pub fn processes(store: &Store, id: &str, json: bool) -> Result<String> {
    let container = store.find(id)?;
    let cgroup = container.cgroup().ok_or_else(|| {
        anyhow!("the container has no cgroup of its own, by which its processes could be told")
    })?;
    let processes = cgroup.processes()?;
    if json {
        return Ok(format!("{}\n", json!(processes)));
    }
    let mut rows = vec![["PID".to_owned(), "COMMAND".to_owned()]];
    rows.extend(processes.iter().map(|pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        [pid.to_string(), name.trim_end().to_owned()]
    }));
    Ok(table(&rows))
}

/// What this runtime can do (runtime specification, features.md).
pub fn features() -> String {
    let capabilities: Vec<String> = CAPABILITIES.iter().map(|name| format!("CAP_{name}")).collect();
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "poststart", "poststop"],
        "mountOptions": mounts::known_options(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": capabilities,
            "cgroup": {
                "v1": false, "v2": true, "systemd": true, "systemdUser": true, "rdma": false
            },
            "seccomp": { "enabled": false },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } },
        },
        "potentiallyUnsafeConfigAnnotations": ["mote."],
    });
    format!("{features:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_nothing_is_a_list() {
        let store = Store::at("/nonexistent/mote-oci".into());
        assert_eq!(list(&store, true, false).expect("listed"), "[]\n");
        assert_eq!(list(&store, false, true).expect("listed"), "");
        assert_eq!(
            list(&store, false, false).expect("listed"),
            "ID  PID  STATUS  BUNDLE  CREATED\n"
        );
    }

    #[test]
    fn features_are_json() {
        let features: serde_json::Value = serde_json::from_str(&features()).expect("JSON");
        assert_eq!(features["linux"]["capabilities"].as_array().map(Vec::len), Some(41));
        let options = features["mountOptions"].as_array().expect("options");
        assert!(
            ["ro", "rro", "rbind", "tmpcopyup"].iter().all(|name| options.contains(&json!(name)))
        );
    }
}
