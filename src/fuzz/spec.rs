//! The spec: any text gives a plan, or errors with their positions. Planning only reads from the host.

use std::path::PathBuf;

use super::Input;
use crate::plan::{Environment, Plan};
use crate::spec::Spec;
use crate::spec::json::Report;

pub fn run(data: &[u8]) {
    let input = Input(data);
    let Ok(text) = str::from_utf8(input.0) else { return };
    let mut report = Report::default();
    let spec = Spec::parse(text, &mut report);
    let mut second = Report::default();
    assert_eq!(Spec::parse(text, &mut second), spec);
    assert_eq!(second, report);
    let Ok(spec) = spec else { return assert_eq!(report, Report::default()) };
    // Planning never runs it.
    let environment =
        Environment { virtiofsd: Some(PathBuf::from("/bin/sh")), ..Environment::default() };
    let plan = Plan::new(&spec, &environment, &mut report);
    assert_eq!(plan.is_none(), !report.errors.is_empty());
    for fault in report.errors.iter().chain(&report.warnings) {
        assert!(!fault.path.is_empty(), "{fault} says where");
    }
    if let Some(plan) = plan {
        assert!(plan.to_string().contains("virtiofsd"));
        assert_eq!(plan.shares.len(), 1 + spec.fs_mounts.len());
        assert!((1..=64).contains(&plan.vcpus) && plan.memory_bytes >= 64 << 20);
        assert!(plan.published_ports.len() <= spec.port_map.len());
    }
}
