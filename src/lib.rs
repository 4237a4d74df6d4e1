//! mote runs one sandbox ("box") as a KVM virtual machine: an `InstanceSpec` in, an exit code out.
//!
//! Data flows one way, and each arrow is one function:
//!
//! ```text
//! JSON ─Spec::parse─▶ Spec ─Plan::new─▶ Plan ─Vm::build─▶ Vm ─run::run─▶ Outcome ─▶ exit code
//! ```
//!
//! Modules in reading order:
//! - the request: [`cli`], [`json`], [`spec`], [`guest_init`], [`network`], [`plan`]
//! - the answer: [`outcome`], [`timeline`], [`log`]
//! - the machine: [`vm`] assembles it from [`layout`], [`memory`], [`kvm`], [`cpu`], [`boot`] (with
//!   [`image`] and [`cpio`]), [`vcpu`], [`bus`], [`console`]
//! - its devices: [`virtio`], and what serves them on the host: [`virtiofsd`], [`sockets`],
//!   [`passt`]
//! - what the guest may reach through them: [`policy`]
//! - the host's limits on all that: [`cpuset`], [`cgroup`]
//! - its life: [`run`], with the events named in [`token`]
//! - the host's fitness: [`probe`]
//! - working with a box that runs, from another process: [`client`]
//! - what the fuzzers run, and the unit tests too: `fuzz`
//! - the system: [`sys`]; with [`memory`] the only unsafe code
//!
//! The guest's half, and the messages between the two, are in the `mote-agent` crate (`guest/`).

pub mod boot;
pub mod bus;
pub mod cgroup;
pub mod cli;
pub mod client;
pub mod console;
pub mod cpio;
pub mod cpu;
pub mod cpuset;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod guest_init;
pub mod image;
pub mod json;
pub mod kvm;
pub mod layout;
pub mod log;
pub mod memory;
pub mod network;
pub mod outcome;
pub mod passt;
pub mod plan;
pub mod policy;
pub mod probe;
pub mod run;
pub mod sockets;
pub mod spec;
pub mod sys;
pub mod timeline;
pub mod token;
pub mod vcpu;
pub mod virtio;
pub mod virtiofsd;
pub mod vm;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::cgroup::{Cgroup, Membership};
use crate::cli::{Command, Config};
use crate::json::Report;
use crate::outcome::{Outcome, USAGE};
use crate::plan::{Environment, Plan};
use crate::spec::Spec;
use crate::timeline::Timeline;
use crate::vm::Vm;

/// Carries out a command and returns the process's exit code.
pub fn execute(command: Command, environment: &Environment, timeline: Timeline) -> u8 {
    match command {
        Command::Help => print(cli::HELP),
        Command::Version => print(concat!("mote ", env!("CARGO_PKG_VERSION"), "\n")),
        Command::Probe => {
            if probe::run(environment) {
                0
            } else {
                1
            }
        }
        Command::Check(config) => check(&config, environment),
        Command::Exec(exec) => client::run(|stdio| exec.run(stdio)),
        Command::Pty(pty) => client::run(|stdio| pty.run(stdio, environment.term.as_deref())),
        Command::Cp(cp) => client::run(|stdio| cp.run(stdio)),
        Command::Run { config, outcome, timeline: timeline_file } => {
            let timeline_file = timeline_file.or_else(|| environment.timeline.clone());
            run_box(&config, environment, outcome.as_deref(), timeline_file.as_deref(), timeline)
        }
    }
}

fn print(text: &str) -> u8 {
    let written = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
    if written.is_ok() { 0 } else { USAGE }
}

fn check(config: &Config, environment: &Environment) -> u8 {
    let mut report = Report::default();
    let text = match read_config(config) {
        Ok(text) => text,
        Err(error) => {
            log::error(&format!("{error:#}"));
            return USAGE;
        }
    };
    let plan =
        Spec::parse(&text, &mut report).and_then(|spec| Plan::new(&spec, environment, &mut report));
    for warning in &report.warnings {
        log::warn(&warning.to_string());
    }
    for error in &report.errors {
        log::error(&error.to_string());
    }
    match plan {
        Some(plan) => print(&format!("{plan}\n")),
        None => USAGE,
    }
}

fn run_box(
    config: &Config,
    environment: &Environment,
    outcome_file: Option<&Path>,
    timeline_file: Option<&Path>,
    mut timeline: Timeline,
) -> u8 {
    let mut exits = Default::default();
    let outcome = run_to_end(config, environment, &mut timeline, &mut exits)
        .unwrap_or_else(Outcome::NotStarted);
    timeline.mark("exit");
    let files = outcome_file
        .map_or(Ok(()), |path| outcome.write_to(path))
        .and_then(|()| timeline_file.map_or(Ok(()), |path| timeline.write_to(path, &exits)));
    // Last, because a stderr that nobody reads makes this wait for a moment.
    if let Some(message) = outcome.message() {
        log::error(&message);
    }
    if let Err(error) = files {
        log::error(&format!("{error:#}"));
    }
    outcome.exit_code()
}

fn run_to_end(
    config: &Config,
    environment: &Environment,
    timeline: &mut Timeline,
    exits: &mut BTreeMap<&'static str, u64>,
) -> Result<Outcome> {
    let mut report = Report::default();
    let text = read_config(config)?;
    let spec = Spec::parse(&text, &mut report);
    timeline.mark("spec_parsed");
    let plan = spec.and_then(|spec| Plan::new(&spec, environment, &mut report));
    for warning in &report.warnings {
        log::warn(&warning.to_string());
    }
    let Some(plan) = plan else {
        let faults: Vec<String> = report.errors.iter().map(ToString::to_string).collect();
        return Err(anyhow!("spec: {}", faults.join("; ")));
    };
    timeline.mark("plan_ready");
    let signals = run::block_signals()?;
    sys::raise_open_file_limit();
    sys::adopt_orphans().context("become the parent of back-ends' children")?;
    let outcome = confine(&plan).and_then(|membership| {
        let outcome = Vm::build(&plan, timeline).and_then(|vm| {
            let counts = Arc::clone(&vm.exit_counts);
            let outcome = run::run(vm, signals, timeline);
            *exits = counts.read();
            outcome
        });
        drop(membership);
        outcome
    });
    // The VM is dropped: its back-ends were killed, and nothing shall outlive this process.
    sys::reap_children(REAP_LIMIT);
    outcome
}

/// Puts the host's limits on this process, before there are threads and children to inherit them.
fn confine(plan: &Plan) -> Result<Option<Membership>> {
    if let Some(cpus) = &plan.cpus {
        cpus.bind()?;
    }
    plan.cgroup.as_ref().map(Cgroup::enter).transpose()
}

/// How long killed back-ends may take to vanish; one that is stuck in the kernel never will.
const REAP_LIMIT: Duration = Duration::from_secs(1);

fn read_config(config: &Config) -> Result<String> {
    match config {
        Config::Text(text) => Ok(text.clone()),
        Config::File(path) if path.as_os_str() == "-" => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .context("read the spec from standard input")?;
            Ok(text)
        }
        Config::File(path) => std::fs::read_to_string(path)
            .with_context(|| format!("read the spec from {}", path.display())),
    }
}
