//! An OCI runtime's input: any text as `config.json`, as a process and as limits gives errors with their positions, or
//! what is safe to carry out, and a spec that mote reads.

use std::path::{Component, Path};

use super::Input;
use crate::oci::cgroup::Placement;
use crate::oci::config::{Circumstances, Config};
use crate::oci::mounts::Mount;
use crate::oci::process::Process;
use crate::oci::resources::Resources;
use crate::oci::spec::{self, Inside};
use crate::oci::state::{Container, State};
use crate::spec::Spec;
use crate::spec::json::Report;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let given = Circumstances { cpus: input.u8().into() };
    let Ok(text) = str::from_utf8(input.0) else { return };
    let mut report = Report::default();
    if let Ok(config) = Config::parse(text, given, &mut report)
        && is_sound(&report)
    {
        look_at(&config);
    }
    let mut report = Report::default();
    if let Ok(process) = Process::parse(text, &mut report)
        && is_sound(&report)
    {
        assert!(!process.args.is_empty() && process.cwd.starts_with('/'));
    }
    let mut report = Report::default();
    if let Ok(limits) = Resources::parse(text, &mut report)
        && is_sound(&report)
    {
        check_files(&limits);
    }
}

/// Whether there are no errors; those that there are say where.
fn is_sound(report: &Report) -> bool {
    for fault in report.errors.iter().chain(&report.warnings) {
        assert!(!fault.path.is_empty(), "{fault} says where");
    }
    report.errors.is_empty()
}

fn check_files(limits: &Resources) {
    for (name, _) in limits.files(limits.memory) {
        assert!(!name.contains('/') && !name.starts_with("cgroup."), "{name} is a controller's");
    }
}

fn look_at(config: &Config) {
    let is_safe = |path: &Path| {
        let mut components = path.components();
        components.next() == Some(Component::RootDir)
            && components.clone().next().is_some()
            && components.all(|component| matches!(component, Component::Normal(_)))
    };
    for mount in &config.mounts.mounts {
        match mount {
            Mount::Bind(bind) => assert!(is_safe(&bind.destination), "{bind:?}"),
            Mount::Tmpfs(tmpfs) => assert!(is_safe(&tmpfs.destination), "{tmpfs:?}"),
            Mount::SharedMemory(_) => {}
        }
    }
    if let Some(Placement::Path(path)) = &config.cgroup {
        assert!(is_safe(&Path::new("/").join(path)), "{path:?}");
    }
    check_files(&config.resources);
    assert!(config.memory_mib >= 64 && (1..=64).contains(&config.vcpus));
    let text =
        spec::write(config, &Container::new("/r/x".into(), State::default()), Inside::default());
    let mut report = Report::default();
    Spec::parse(&text, &mut report).expect("a spec");
    assert_eq!(report.errors, []);
}
