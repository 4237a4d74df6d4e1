//! What the tests of this folder share: a good spec, which each test changes.

use super::{Environment, Plan};
use crate::spec::Spec;
use crate::spec::json::Report;

pub fn spec() -> Spec {
    let mut report = Report::default();
    let text = r#"{"box_id":"b","vcpus":1,"memory_mib":256,"rootfs_path":"/",
        "exec_socket_path":"","fs_mounts":[],"workdir":"/",
        "entrypoint":{"executable":"/bin/true","args":[],"env":[]}}"#;
    Spec::parse(text, &mut report).expect("a spec")
}

pub fn environment() -> Environment {
    // Any executable will do: planning never runs it.
    Environment { virtiofsd: Some("/bin/sh".into()), ..Environment::default() }
}

pub fn plan(change: impl FnOnce(&mut Spec)) -> Result<Plan, Vec<String>> {
    let mut spec = spec();
    change(&mut spec);
    let mut report = Report::default();
    let plan = Plan::new(&spec, &environment(), &mut report);
    assert_eq!(plan.is_none(), !report.errors.is_empty());
    plan.ok_or_else(|| report.errors.iter().map(ToString::to_string).collect())
}

pub fn errors(change: impl FnOnce(&mut Spec)) -> Vec<String> {
    plan(change).expect_err("must be refused")
}
