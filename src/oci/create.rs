//! `create`: from a bundle to a box that has booted and waits for its start.
//!
//! ```text
//! config.json checked ─▶ ROOT/ID, state.json ─▶ cgroup ─▶ process, written down before it does anything
//!   ─▶ mote boots ─▶ the agent answers: user, directory and program are there ─▶ hooks ─▶ ready, pid-file
//! ```
//!
//! Whatever fails on the way, all before it is taken back. What a create leaves that is killed on the way, `delete
//! --force` finds in the state.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use mote_agent::exec::kind;

use super::agent::{Agent, Answer};
use super::arguments::{self, Global};
use super::cgroup::{Cgroup, Placement};
use super::config::{Circumstances, Config};
use super::launch::{self, Launch};
use super::report;
use super::state::{Container, Lock, OCI_VERSION, State, Status, Store, write_whole};
use super::systemd::Member;
use super::{console, end, hooks, mounts, root};
use crate::spec::json::Report;
use crate::sys;
use crate::sys::{process, stat};

/// Others may read a pid-file.
const PID_FILE_MODE: u32 = 0o644;

/// Reads a bundle's `config.json`: the config and its text. Every error in it is one error; warnings are returned.
///
/// # Errors
/// It cannot be read, or is wrong.
pub fn read_config(path: &Path) -> Result<(Config, String, Vec<String>)> {
    let name = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("read {name}"))?;
    let cpus = process::cpu_affinity().map_or(1, |cpus| cpus.len() as u64);
    let given = Circumstances { cpus };
    let mut report = Report::default();
    let config =
        Config::parse(&text, given, &mut report).map_err(|error| anyhow!("{name} {error}"))?;
    let faults: Vec<String> = report.errors.iter().map(ToString::to_string).collect();
    ensure!(faults.is_empty(), "{name}: {}", faults.join("; "));
    let warnings = report.warnings.iter().map(|fault| format!("{name}: {fault}")).collect();
    Ok((config, text, warnings))
}

/// Makes a container, which waits for its start then. The lock is held on.
///
/// # Errors
/// What is wrong with it, or with this host. Nothing of it is left.
pub fn create(
    store: &Store,
    global: &Global,
    wanted: &arguments::Create,
    in_foreground: bool,
) -> Result<(Container, Config, Lock)> {
    ensure!(
        wanted.preserve_fds == 0,
        "--preserve-fds is {}, and descriptors of the host cannot be passed into a box; leave it out",
        wanted.preserve_fds
    );
    let bundle = wanted.bundle.canonicalize();
    let bundle =
        bundle.with_context(|| format!("look at the bundle {}", wanted.bundle.display()))?;
    let (mut config, text, warnings) = read_config(&bundle.join("config.json"))?;
    ensure!(
        global.systemd_cgroup || !matches!(config.cgroup, Some(Placement::Scope(_))),
        "linux.cgroupsPath names a scope of systemd's (SLICE:PREFIX:NAME), which is made with --systemd-cgroup only: give that, or a path"
    );
    // What cannot be looked at cannot be mounted either, which says why.
    if let Ok(root) = fs::File::open(bundle.join(&config.root)) {
        mounts::decide_sides(&mut config.mounts.mounts, |path| {
            root::resolve(&root, path).unwrap_or_else(|_| path.to_owned())
        });
    }
    console::check(config.process.terminal, wanted.console_socket.as_deref(), in_foreground)?;
    let signals = sys::signal_file(&sys::STOP_SIGNALS).context("take signals")?;
    let (dir, locked) = store.make(&wanted.id)?;
    let mut container = Container::new(
        dir,
        State {
            oci_version: OCI_VERSION.into(),
            id: wanted.id.clone(),
            rootfs: bundle.join(&config.root),
            bundle,
            created: report::now(),
            annotations: config.annotations.iter().cloned().collect(),
            cgroup: match &config.cgroup {
                Some(Placement::Path(path)) => Some(Cgroup::at(path).dir().to_owned()),
                // Nobody knows yet where that will be.
                Some(Placement::Scope(_)) | None => None,
            },
            scope: match &config.cgroup {
                Some(Placement::Scope(scope)) => Some(scope.unit().to_owned()),
                Some(Placement::Path(_)) | None => None,
            },
            memory_mib: config.memory_mib,
            is_sandbox: config.is_sandbox,
            ..State::default()
        },
    );
    let mut make = || -> Result<()> {
        prepare(&mut container, &text, &warnings)?;
        // Until the container's process is in it.
        let _member = make_cgroup(&mut container, &config)?;
        boot(&mut container, &config, wanted, in_foreground, &signals)?;
        let state = container.to_json(Status::Creating).to_string();
        hooks::run(&config.hooks.create, &state)?;
        container.mark("ready")?;
        if let Some(path) = &wanted.pid_file {
            let pid = container.state.pid.unwrap_or_default();
            write_whole(path, &pid.to_string(), PID_FILE_MODE)?;
        }
        Ok(())
    };
    if let Err(error) = make() {
        // The first error is the one to tell.
        let _ = end::remove(&container);
        return Err(error);
    }
    for warning in &warnings {
        report::warn(global, warning);
    }
    Ok((container, config, locked))
}

/// Makes everything that does not run: files and the sockets' directory.
fn prepare(container: &mut Container, text: &str, warnings: &[String]) -> Result<()> {
    container.choose_sockets()?;
    // First of all, so that what is made from here on is found again.
    container.save()?;
    container.make_sockets()?;
    container.write("config.json", text)?;
    let lines: String = warnings.iter().map(|warning| format!("warning: {warning}\n")).collect();
    container.write("log", &lines)?;
    let root = container.file("root");
    fs::create_dir(&root).with_context(|| format!("create {}", root.display()))?;
    Ok(())
}

/// Makes its cgroup, with its limits. What is returned is in it, if it must not be empty.
fn make_cgroup(container: &mut Container, config: &Config) -> Result<Option<Member>> {
    let ram = config.resources.memory.map(|_| u64::from(config.memory_mib) << 20);
    let files = config.resources.files(ram);
    match &config.cgroup {
        Some(Placement::Path(path)) => {
            let made = || {
                // What somebody else has made is never taken down, nor who is in it.
                container.state.owns_cgroup = true;
                container.save()
            };
            Cgroup::at(path).create(&files, made).map(|()| None)
        }
        Some(Placement::Scope(scope)) => {
            let description = format!("mote-oci container {}", container.state.id);
            let member = scope.start(&description, &config.unit_properties, &files)?;
            let cgroup = Cgroup::at(&member.cgroup);
            container.state.cgroup = Some(cgroup.dir().to_owned());
            container.state.owns_cgroup = true;
            container.save()?;
            cgroup.limit(&files)?;
            Ok(Some(member))
        }
        None => {
            let names = config.resources.beyond_a_box(config.vcpus);
            ensure!(
                names.is_empty(),
                "linux.resources asks for limits ({}), which need a cgroup: give linux.cgroupsPath (podman: cgroup_manager = \"systemd\"), or only limits of memory, processes and whole CPUs",
                names.join(", ")
            );
            Ok(None)
        }
    }
}

/// Starts mote, and waits until its box has booted and could start the program.
fn boot(
    container: &mut Container,
    config: &Config,
    wanted: &arguments::Create,
    in_foreground: bool,
    signals: &fs::File,
) -> Result<()> {
    let console_socket = wanted.console_socket.as_deref();
    let waiting = launch::start(Launch { container, config, console_socket, in_foreground })?;
    container.state.pid = Some(waiting.pid);
    container.state.start_time = stat::start_time(waiting.pid).unwrap_or_default();
    container.save()?;
    let process = process::process_file(waiting.pid).context("watch the container's process")?;
    waiting.go()?;
    if config.is_sandbox {
        return Ok(());
    }
    let socket = container.socket("exec.sock");
    let agent = Agent { socket: &socket, process: &process, signals: Some(signals) };
    match agent.wait_until_ready()? {
        Answer::Frame(kind::HEARTBEAT, _) => Ok(()),
        Answer::Frame(..) => {
            bail!("{} answers no heartbeat: another program listens there", socket.display())
        }
        Answer::Signal(number) => bail!("broken off by signal {number}"),
        Answer::Ended => bail!("{}", why_ended(container)),
        Answer::None | Answer::Late => bail!("the box did not answer on {}", socket.display()),
    }
}

/// How long mote may take from its last word to its end.
const LAST_WORD: Duration = Duration::from_millis(100);

/// What a box has ended of before it was started, in words that engines look for.
pub fn why_ended(container: &Container) -> String {
    let outcome = end::outcome(container);
    let log = || {
        let log = fs::read_to_string(container.file("log")).ok()?;
        let last = log.lines().rfind(|line| !line.starts_with("warning: "))?;
        Some(last.trim_start_matches("mote: ").to_owned())
    };
    // The log is written after the outcome.
    if outcome.is_none() {
        std::thread::sleep(LAST_WORD);
    }
    let message = outcome.as_ref().and_then(|outcome| outcome.message.clone()).or_else(log);
    let message = message.unwrap_or_else(|| "mote ended without a word: was it killed?".into());
    report::in_engines_words(outcome.map(|outcome| outcome.exit_code), &message)
}
