//! mote runs one sandbox ("box") as a KVM virtual machine: an `InstanceSpec` in, an exit code out.
//!
//! Data flows one way, and each arrow is one function:
//!
//! ```text
//! JSON ─Spec::parse─▶ Spec ─Plan::new─▶ Plan ─Vm::build─▶ Vm, Served ─run::run─▶ Outcome ─▶ exit code
//! ```
//!
//! The modules, in an order in which each uses only those above it (`make check` proves it). A folder's
//! `mod.rs` says what is in it.
//!
//! - [`sys`]: the system calls that no crate covers; with [`memory`] the only unsafe code
//! - [`log`], [`token`], [`event_channel`]: messages on stderr; what the main loop's events are about; how
//!   other threads reach the main loop
//! - [`spec`]: what was asked for, as written: one struct for each object of the JSON
//! - [`layout`], [`memory`]: the guest's physical addresses; its RAM
//! - [`resolv_conf`], [`policy`], [`output_file`]: the host's name servers; where the guest may connect to;
//!   files that mote writes where a guest may have been
//! - [`outcome`], [`timeline`]: how a box ended, with the table of exit codes; what happened when
//! - [`virtio`]: the transport and the devices ([`virtio::devices`] is the list of them): rng, balloon, net on passt,
//!   file systems on virtiofsd, and [`virtio::vsock`], which accepts the
//!   clients of sockets and published ports, with a connection's life and half-closes
//! - [`confine`]: what mote gives up before it runs a guest, and which system calls are left; how it
//!   reports an end that leaves no time for an outcome
//! - [`cpuset`], [`cgroup`]: the host's limits on CPUs, CPU time and memory
//! - [`plan`]: the spec checked, one file for each part of it: paths, shares, limits, ports, network, and
//!   what the agent is told
//! - [`console`], [`bus`]: the guest's output and serial port; its port and MMIO accesses
//! - [`kvm`]: KVM, its self-test, a vCPU's state and its thread
//! - [`cpio`], [`boot`]: archives; kernel, initramfs and boot parameters in the guest's memory
//! - [`template`]: starting from the state of a VM that has booted, and making that
//! - [`host`]: what a box needs on the host: its sockets, as they are bound, what its passt publishes instead,
//!   each share's virtiofsd (mote's own file as another process, which serves by the crate `src/virtiofsd`), the
//!   janitor, the processes that write its logs and exchange frames with other boxes
//! - [`vm`]: the whole VM, assembled from all of these
//! - [`run`]: the main loop, and how it decides the box's outcome
//! - [`tee`]: what this host offers for confidential VMs
//! - [`probe`]: whether this host can run boxes
//! - [`manual`]: what commands, options and the spec's members mean: help, man pages, completions
//! - [`client`]: working with a box that runs, from another process
//! - [`oci`]: containers of podman and containerd as boxes: the commands of an OCI runtime
//! - [`cli`]: the command line
//! - `fuzz`: what the fuzzers run; the unit tests run it too
//!
//! The guest's half, and the messages between host and guest, are in the `mote-agent` crate (`guest/`).

pub mod boot;
pub mod bus;
pub mod cgroup;
pub mod cli;
pub mod client;
pub mod confine;
pub mod console;
pub mod cpio;
pub mod cpuset;
pub mod event_channel;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod host;
pub mod kvm;
pub mod layout;
pub mod log;
pub mod manual;
pub mod memory;
pub mod oci;
pub mod outcome;
pub mod output_file;
pub mod plan;
pub mod policy;
pub mod probe;
pub mod resolv_conf;
pub mod run;
pub mod spec;
pub mod sys;
pub mod tee;
pub mod template;
pub mod timeline;
pub mod token;
pub mod virtio;
pub mod vm;

use std::fs::File;
use std::io::{self, Read};
use std::iter;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::cgroup::Cgroup;
use crate::cli::{Command, Config};
use crate::confine::sudden_end;
use crate::host::janitor::{Duties, HostResources, Janitor};
use crate::host::sockets;
use crate::outcome::{Outcome, Record, USAGE};
use crate::output_file::OutputFile;
use crate::plan::{Environment, Plan, Templates, guests_directories};
use crate::run::Signals;
use crate::spec::Spec;
use crate::spec::json::{Fault, Report};
use crate::sys::Interest;
use crate::sys::confine::Resource;
use crate::sys::terminal::RawMode;
use crate::template::{Shape, maker};
use crate::timeline::Timeline;
use crate::vm::Vm;

/// Carries out a command and returns the process's exit code.
pub fn execute(command: Command, environment: &Environment, mut timeline: Timeline) -> u8 {
    match command {
        Command::Print(document) => print(&document.text()),
        Command::Version => print(concat!("mote ", env!("CARGO_PKG_VERSION"), "\n")),
        Command::Probe => {
            if probe::run(environment) {
                0
            } else {
                1
            }
        }
        Command::Check(config) => check(&config, environment, &mut timeline),
        Command::Template(config) => make_template(&config, environment, &mut timeline),
        Command::Exec(exec) => client::run(|stdio| exec.run(stdio)),
        Command::Pty(pty) => client::run(|stdio| pty.run(stdio, environment.term.as_deref())),
        Command::Cp(cp) => client::run(|stdio| cp.run(stdio)),
        Command::Run { config, outcome, timeline: timeline_file, log, cgroup } => {
            let options = RunOptions {
                outcome,
                timeline: timeline_file.or_else(|| environment.timeline.clone()),
                log,
                cgroup,
            };
            run_box(&config, environment, &options, timeline)
        }
    }
}

fn print(text: &str) -> u8 {
    match io::Write::write_all(&mut io::stdout(), text.as_bytes()) {
        Ok(()) => 0,
        Err(error) => {
            log::error(&format!("write to standard output: {error}"));
            USAGE
        }
    }
}

fn check(config: &Config, environment: &Environment, timeline: &mut Timeline) -> u8 {
    match checked_plan(config, environment, timeline) {
        None => USAGE,
        Some(Plan { tee: Some(technology), .. }) => {
            log::error(&tee::refusal(technology));
            USAGE
        }
        Some(plan) => print(&format!("{plan}\ntemplate   {}\n", template::describe(&plan))),
    }
}

/// Reads and checks a spec for a command that runs no box, or says what is wrong with it.
fn checked_plan(
    config: &Config,
    environment: &Environment,
    timeline: &mut Timeline,
) -> Option<Plan> {
    let mut report = Report::default();
    let checked =
        read_spec(config, &mut report, timeline).map(|spec| make_plan(&spec, environment, report));
    match checked {
        Ok(Ok(plan)) => return Some(plan),
        Ok(Err(faults)) => {
            for fault in &faults {
                log::error(&fault.to_string());
            }
        }
        Err(error) => log::error(&format!("{error:#}")),
    }
    None
}

fn make_template(config: &Config, environment: &Environment, timeline: &mut Timeline) -> u8 {
    let Some(plan) = checked_plan(config, environment, timeline) else { return USAGE };
    let made = match &plan.templates {
        Templates::Off(why) => Err(anyhow!("{why}")),
        Templates::In(directory) => maker::make(&Shape::of(&plan), directory),
    };
    match made {
        Ok(Some(maker::Made { path, bytes })) => {
            print(&format!("{} ({} KiB)\n", path.display(), bytes >> 10))
        }
        Ok(None) => print("another process is making it\n"),
        Err(error) => {
            log::error(&format!("make the template: {error:#}"));
            1
        }
    }
}

/// Reads a spec. What is wrong with its members is in `report` then.
fn read_spec(config: &Config, report: &mut Report, timeline: &mut Timeline) -> Result<Spec> {
    let spec = Spec::parse(&read_config(config)?, report)
        .map_err(|problem| anyhow!("{config} {problem}"))?;
    timeline.mark("spec_parsed");
    Ok(spec)
}

/// Checks a spec: returns the plan, or everything that is wrong. Logs warnings at once.
fn make_plan(
    spec: &Spec,
    environment: &Environment,
    mut report: Report,
) -> Result<Plan, Vec<Fault>> {
    let plan = Plan::new(spec, environment, &mut report);
    for warning in &report.warnings {
        log::warn(&warning.to_string());
    }
    plan.ok_or(report.errors)
}

/// What a run is told beside the spec: the files that it writes about itself, and where it runs.
struct RunOptions {
    outcome: Option<PathBuf>,
    timeline: Option<PathBuf>,
    /// Where messages go in place of stderr.
    log: Option<PathBuf>,
    /// The cgroup that mote joins with all that serves its guest.
    cgroup: Option<PathBuf>,
}

fn run_box(
    config: &Config,
    environment: &Environment,
    options: &RunOptions,
    mut timeline: Timeline,
) -> u8 {
    let mut outcome_file = None;
    let mut timeline_file = None;
    let mut status = None;
    // First, so that the list has nothing that mote opens itself.
    let record = sys::confine::inherited_descriptors()
        .context("list the open descriptors in /proc/self/fd (is /proc mounted?)")
        .and_then(|inherited| {
            if let Some(path) = &options.log {
                let file = OutputFile::new(path, None).append(None);
                log::to(file.with_context(|| format!("create the log file {}", path.display()))?);
            }
            let mut report = Report::default();
            let spec = read_spec(config, &mut report, &mut timeline);
            // The reports are opened whatever is wrong with the spec, but it says where a guest has been.
            let is_whole = report.errors.is_empty();
            let guests = spec.as_ref().ok().filter(|_| is_whole).map(guests_directories);
            let mut open_reports = || -> Result<()> {
                let (outcome, timeline) = (options.outcome.as_deref(), options.timeline.as_deref());
                outcome_file = ReportFile::open(outcome, "outcome", guests.as_deref())?;
                timeline_file = ReportFile::open(timeline, "timeline", guests.as_deref())?;
                sudden_end::report(outcome_file.as_ref().map(|to| to.file.as_raw_fd()))
            };
            match open_reports() {
                // What is wrong with the spec is the outcome.
                Err(error) if guests.is_none() => log::error(&format!("{error:#}")),
                opened => opened?,
            }
            let plan = make_plan(&spec?, environment, report).map_err(|faults| {
                let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
                anyhow!("spec: {}", faults.join("; "))
            })?;
            if let Some(technology) = plan.tee {
                return Ok(Outcome::TeeUnavailable(tee::refusal(technology)).into());
            }
            if let Some(wanted) = &plan.status_file {
                let file = ReportFile::create(&wanted.file, "exit status")?;
                status = Some((wanted.clone(), file));
            }
            timeline.mark("plan_ready");
            let mut record =
                run_to_end(&plan, &inherited, options.cgroup.as_deref(), &mut timeline)?;
            record.simulated_attestation = plan.simulates_attestation();
            Ok(record)
        })
        .unwrap_or_else(|error| Outcome::NotStarted(error).into());
    let outcome = &record.outcome;
    timeline.mark("exit");
    sudden_end::decide(outcome.exit_code());
    // Each on its own: one that fails does not keep the others.
    let reported = [
        status.map_or(Ok(()), |(wanted, to)| {
            let text = wanted.text(outcome.exit_code());
            to.write(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
        }),
        outcome_file.map_or(Ok(()), |to| to.write(|file| record.write_to(file))),
        timeline_file.map_or(Ok(()), |to| to.write(|file| timeline.write_to(file))),
    ];
    // Last, because a stderr that nobody reads makes this wait for a moment.
    if let Some(message) = outcome.message() {
        log::error(&message);
    }
    for error in reported.into_iter().filter_map(Result::err) {
        log::error(&format!("{error:#}"));
    }
    outcome.exit_code()
}

/// A file for a report at the end. It is opened at the start, because a confined mote cannot open
/// files.
struct ReportFile {
    what: &'static str,
    path: PathBuf,
    file: File,
}

impl ReportFile {
    /// Opens the file; `guests` as in [`OutputFile::new`].
    fn open(
        path: Option<&Path>,
        what: &'static str,
        guests: Option<&[PathBuf]>,
    ) -> Result<Option<Self>> {
        let Some(path) = path else { return Ok(None) };
        let output = OutputFile::new(path, guests);
        if let Some(problem) = output.warning() {
            log::warn(&format!("--{what}: {problem}"));
        }
        ReportFile::create(&output, what).map(Some)
    }

    fn create(output: &OutputFile, what: &'static str) -> Result<Self> {
        let path = output.path.clone();
        let file = output
            .open(None)
            .with_context(|| format!("create the {what} file {}", path.display()))?;
        Ok(ReportFile { what, path, file })
    }

    fn write(&self, write: impl FnOnce(&File) -> io::Result<()>) -> Result<()> {
        write(&self.file)
            .with_context(|| format!("write the {} to {}", self.what, self.path.display()))
    }
}

/// For how many descriptors there is room from the start on, at eight bytes of the kernel's each: for some hundred
/// connections. Many more cost a wait each time that their number doubles.
const DESCRIPTORS: u16 = 1024;

fn run_to_end(
    plan: &Plan,
    inherited: &[RawFd],
    cgroup: Option<&Path>,
    timeline: &mut Timeline,
) -> Result<Record> {
    let signals = Rc::new(Signals::block(plan)?);
    sys::process::raise_open_file_limit();
    sys::process::reserve_descriptors(DESCRIPTORS);
    // A core dump would hold the guest's memory: nobody gets a copy of that.
    sys::confine::limit(Resource::CoreDump, 0).context("forgo core dumps")?;
    sys::confine::share_heap();
    sys::process::adopt_orphans().context("become the parent of back-ends' children")?;
    run_on_host(plan, inherited, cgroup, &signals, timeline).or_else(|error| {
        // A stop signal ends whatever waits during the start, with an error. The outcome is then the one
        // that the guest would have had from this signal.
        let mut signals = iter::from_fn(|| sys::next_signal(&signals.stop));
        let Some(first) = signals.next() else { return Err(error) };
        // As in the main loop: the same one again is one request. Which signal came first is not known.
        Ok(match signals.find(|signal| *signal != first) {
            None => Outcome::Signaled(first as u8).into(),
            Some(_) => {
                Outcome::Stopped("stopped hard by a second signal before the guest ran".into())
                    .into()
            }
        })
    })
}

/// Has the janitor make the box's resources on the host, runs the box, and has the janitor remove them.
fn run_on_host(
    plan: &Plan,
    inherited: &[RawFd],
    cgroup: Option<&Path>,
    signals: &Rc<Signals>,
    timeline: &mut Timeline,
) -> Result<Record> {
    // The host's limits on this process, before there are threads and children to inherit them.
    if let Some(cpus) = &plan.cpus {
        cpus.bind()?;
    }
    let (janitor, resources) = start_janitor(plan, &signals.stop)?;
    let run = |timeline: &mut Timeline| {
        // Before this process is in a cgroup whose devices are somebody else's choice.
        let kvm = kvm::open()?;
        if let Some(given) = cgroup {
            cgroup::join_directory(given)?;
        }
        if let (Some(cgroup), Some(lock)) = (&plan.cgroup, resources.cgroup) {
            match cgroup.join(lock) {
                Err(error) if cgroup.is_dispensable() => warn_of_limits(&error),
                joined => joined?,
            }
        }
        let listeners = sockets::listeners(plan, resources.sockets)?;
        let (vm, mut served) =
            Vm::build(plan, kvm, listeners, resources.switch, &janitor, &signals.stop, timeline)?;
        janitor.end_set_up()?;
        let raw = signals.terminal().map(RawMode::enter).transpose();
        let _raw = raw.context("set the terminal's mode")?;
        if let Some(logs) = &served.logs {
            logs.wait_until_confined(&signals.stop)?;
        }
        if let Some(switch) = &mut served.switch {
            switch.wait_until_confined(&signals.stop)?;
        }
        plan.sandbox.enter(inherited)?;
        timeline.mark("confined");
        let [is_stopped] = sys::poll([Interest::read(&signals.stop)], Some(Duration::ZERO))?;
        ensure!(!is_stopped, "stopped before the guest ran");
        run::run(vm, served, &plan.sandbox, Rc::clone(signals), timeline)
    };
    let record = run(timeline);
    // The VM is dropped and its back-ends have ended: only the janitor outlives this process, for a moment.
    janitor.dismiss();
    record
}

/// Starts the janitor, without the box's cgroup if that can neither be had nor must be.
fn start_janitor(plan: &Plan, stop: &File) -> Result<(Janitor, HostResources)> {
    let duties = Duties::from(plan);
    let started = Janitor::start(duties, stop);
    if !plan.cgroup.as_ref().is_some_and(Cgroup::is_dispensable) {
        return started;
    }
    started.or_else(|error| {
        // If something else has failed, it fails again.
        let without = Janitor::start(Duties { cgroup: None, ..duties }, stop)?;
        warn_of_limits(&error);
        Ok(without)
    })
}

fn warn_of_limits(error: &anyhow::Error) {
    log::warn(&format!(
        "the cpu_* and memory_* limits hold only inside the box, where its own init enforces them: {error:#}"
    ));
}

fn read_config(config: &Config) -> Result<String> {
    match config {
        Config::Text(text) => {
            if !sys::arguments::erase(text) {
                log::warn("the spec stays readable in /proc/PID/cmdline; use --config-file -");
            }
            Ok(text.clone())
        }
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
