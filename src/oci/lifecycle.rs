//! What is done with a container that has been made: start, signals, pauses, new limits, removal.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use mote_agent::exec::{FileOp, FileRequest, FileResponse, control, kind, to_base64};

use super::agent::{Agent, Answer};
use super::arguments::{self, Global};
use super::config::Config;
use super::create::{create, read_config, why_ended};
use super::resources::{Resources, with_overhead};
use super::state::{Container, Status, Store};
use super::{end, hooks, report, systemd};
use crate::log;
use crate::spec::json::Report;
use crate::sys::container::send_signal;
use crate::sys::{self, Interest, process};

/// How long an agent may take to pass a signal on. One that does not is not worth waiting for.
const SIGNAL_LIMIT: Duration = Duration::from_secs(2);
/// How long a box may take to end once its connections are closed.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Starts a container that has been made.
///
/// # Errors
/// It is not there, runs already or has ended, or its program cannot be started.
pub fn start(store: &Store, id: &str) -> Result<()> {
    let (container, _locked) = store.find_locked(id)?;
    match container.status() {
        Status::Created => {}
        Status::Running | Status::Paused => bail!("cannot start an already running container"),
        Status::Stopped => bail!("cannot start a container that has stopped"),
        Status::Creating => {
            bail!("cannot start a container that is not complete: its create was broken off")
        }
    }
    let config = read_config(&container.file("config.json"))?.0;
    start_made(&container, &config)
}

fn start_made(container: &Container, config: &Config) -> Result<()> {
    let process =
        container.process().ok_or_else(|| anyhow!("cannot start a container that has stopped"))?;
    if !container.state.is_sandbox {
        start_program(container, &process)?;
    }
    container.mark("started")?;
    let state = container.to_json(Status::Running).to_string();
    hooks::run(&config.hooks.poststart, &state)
}

/// Has the box that waits start its program.
fn start_program(container: &Container, process: &OwnedFd) -> Result<()> {
    let socket = container.socket("exec.sock");
    let agent = Agent { socket: &socket, process, signals: None };
    let has_ended = |limit| -> Result<bool> {
        let [ended] =
            sys::poll([Interest::read(process)], Some(limit)).context("wait for the box")?;
        Ok(ended)
    };
    match agent.ask(kind::CONTROL, control::START, None)? {
        Answer::Frame(kind::CONTROL, text) if text == control::START_ACK => {}
        Answer::Frame(kind::ERROR, text) => {
            // The box ends of it, with an exit code that says what kind of error it is.
            let code = has_ended(END_LIMIT)?.then(|| end::outcome(container)).flatten();
            let code = code.map(|outcome| outcome.exit_code);
            bail!("{}", report::in_engines_words(code, &String::from_utf8_lossy(&text)))
        }
        Answer::Frame(..) => bail!("{} speaks another protocol", socket.display()),
        // A program may have ended before its start was confirmed.
        Answer::None | Answer::Ended if has_ended(END_LIMIT)? => {
            let ran = end::outcome(container).is_some_and(|outcome| outcome.has_run());
            ensure!(ran, "{}", why_ended(container));
        }
        _ => bail!("the box's agent does not answer on {}", socket.display()),
    }
    Ok(())
}

/// Makes a container and starts it; unless detached, waits for its end, removes it and returns its exit code.
///
/// # Errors
/// As for [`create`] and [`start`].
pub fn run(
    store: &Store,
    global: &Global,
    wanted: &arguments::Create,
    detach: bool,
    keep: bool,
) -> Result<u8> {
    let (container, config, locked) = create(store, global, wanted, !detach)?;
    if let Err(error) = start_made(&container, &config) {
        let _ = end::remove(&container);
        return Err(error);
    }
    drop(locked);
    if detach {
        return Ok(0);
    }
    let code = wait(&container)?;
    if !keep {
        remove(&container, &config)?;
    }
    Ok(code)
}

/// Waits for the end of a container that is this process's child, and passes signals on to it.
fn wait(container: &Container) -> Result<u8> {
    let pid = container.state.pid.unwrap_or_default();
    let process = process::process_file(pid).context("watch the container's process")?;
    // Those that are for this process alone: of its child's, of a terminal, and of a stop.
    let own =
        [libc::SIGCHLD, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU, libc::SIGCONT, libc::SIGWINCH];
    let signals: Vec<i32> = (1..=libc::SIGSYS).filter(|number| !own.contains(number)).collect();
    let signals = sys::signal_file(&signals).context("take signals")?;
    loop {
        let interests = [Interest::read(&process), Interest::read(&signals)];
        let [ended, signal] = sys::poll(interests, None).context("wait for the container")?;
        if signal && let Some(number) = sys::next_signal(&signals) {
            // One that has just ended needs no signal.
            let _ = send(container, number);
        }
        if ended {
            break;
        }
    }
    use std::os::unix::process::ExitStatusExt;
    let status = process::wait(pid).context("wait for the container's process")?;
    let signal = || status.signal().map_or(u8::MAX, |signal| 128 + signal as u8);
    Ok(status.code().map_or_else(signal, |code| code as u8))
}

/// Sends a signal to a container's program.
///
/// # Errors
/// It is not there or has ended. The words are runc's, which containerd looks for.
pub fn kill(store: &Store, id: &str, signal: i32, all: bool) -> Result<()> {
    let container = store.find(id)?;
    if all && container.status() == Status::Stopped {
        return Ok(());
    }
    send(&container, signal)
}

fn send(container: &Container, signal: i32) -> Result<()> {
    let process = container.process().ok_or_else(|| anyhow!("container not running"))?;
    let send_to_process = |signal| {
        send_signal(&process, signal).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => anyhow!("process already finished"),
            _ => anyhow::Error::new(error).context("signal the container's process"),
        })
    };
    let end = || send_to_process(libc::SIGKILL);
    if signal == libc::SIGKILL || container.state.is_sandbox {
        return send_to_process(signal);
    }
    let status = container.status();
    ensure!(
        status != Status::Paused,
        "the container is paused, and would get signal {signal} when it goes on: resume it first, or send SIGKILL"
    );
    let socket = container.socket("exec.sock");
    let agent = Agent { socket: &socket, process: &process, signals: None };
    let order = [control::SIGNAL_MAIN, signal.to_string().as_bytes()].concat();
    let deadline = Instant::now() + SIGNAL_LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match agent.ask(kind::CONTROL, &order, Some(left))? {
            Answer::Frame(kind::CONTROL, text) if text == control::SIGNAL_MAIN_ACK => return Ok(()),
            Answer::Ended => bail!("process already finished"),
            Answer::Frame(_, text) => {
                bail!("container not running: {}", String::from_utf8_lossy(&text));
            }
            Answer::None if !left.is_zero() => {
                let pause = Duration::from_millis(10).min(left);
                let [ended] = sys::poll([Interest::read(&process)], Some(pause))
                    .context("wait for the box")?;
                ensure!(!ended, "process already finished");
            }
            // A guest that hangs.
            Answer::None | Answer::Late | Answer::Signal(_) => return end(),
        }
    }
}

/// Removes a container. With `force` one that runs is killed, and one that is not there is no error.
///
/// # Errors
/// It is not there or runs, or something of it cannot be removed.
pub fn delete(store: &Store, id: &str, force: bool) -> Result<()> {
    if force {
        // A create that waits for a box holds the lock until the box answers or ends, and some boxes do neither.
        if let Some(process) = store.find(id).ok().and_then(|container| container.process()) {
            // ESRCH says that it has ended meanwhile.
            let _ = send_signal(&process, libc::SIGKILL);
        }
        let Some((container, _locked)) = store.find_leftover(id)? else { return Ok(()) };
        let config = read_config(&container.file("config.json"));
        return match config {
            Ok((config, ..)) => remove(&container, &config),
            // Nothing is known of hooks, and nothing must keep it.
            Err(_) => end::remove(&container),
        };
    }
    let (container, _locked) = store.find_locked(id)?;
    let status = container.status();
    // As runc has it: one that was never started goes with its box.
    if matches!(status, Status::Running | Status::Paused) {
        bail!(
            "cannot delete container {id} that is not stopped: {} (kill it first, or use --force)",
            status.word()
        );
    }
    let config = read_config(&container.file("config.json"));
    match config {
        Ok((config, ..)) => remove(&container, &config),
        Err(_) => end::remove(&container),
    }
}

fn remove(container: &Container, config: &Config) -> Result<()> {
    end::remove(container)?;
    let state = container.to_json(Status::Stopped).to_string();
    // The specification: what is removed is removed, and the others run.
    for hook in &config.hooks.poststop {
        if let Err(error) = hooks::run(std::slice::from_ref(hook), &state) {
            log::warn(&format!("{error:#}"));
        }
    }
    Ok(())
}

/// Stops a container's time, or lets it go on.
///
/// # Errors
/// It does not run, or has no cgroup of its own.
pub fn freeze(store: &Store, id: &str, frozen: bool) -> Result<()> {
    let (container, _locked) = store.find_locked(id)?;
    let (word, right) = if frozen {
        ("pause", &[Status::Running, Status::Created][..])
    } else {
        ("resume", &[Status::Paused][..])
    };
    let status = container.status();
    ensure!(right.contains(&status), "cannot {word} a container that is {}", status.word());
    let cgroup = container.cgroup().ok_or_else(|| {
        anyhow!("cannot {word} a container without a cgroup of its own: give it linux.cgroupsPath")
    })?;
    cgroup.freeze(frozen)?;
    if !frozen && let Some(process) = container.process() {
        // As after any stop, so that the guest learns the time.
        let _ = send_signal(&process, libc::SIGCONT);
    }
    Ok(())
}

/// Changes a container's limits.
///
/// # Errors
/// The limits are wrong or ask for more memory than the box has, or the container has ended.
pub fn update(store: &Store, id: &str, from: &Path) -> Result<()> {
    let (container, _locked) = store.find_locked(id)?;
    let status = container.status();
    ensure!(status != Status::Stopped, "cannot update a container that is stopped");
    let (name, text) = if from.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("read limits from standard input")?;
        ("standard input".to_owned(), text)
    } else {
        let name = from.display().to_string();
        (name.clone(), fs::read_to_string(from).with_context(|| format!("read {name}"))?)
    };
    let mut report = Report::default();
    let limits = Resources::parse(&text, &mut report).map_err(|error| anyhow!("{name} {error}"))?;
    let faults: Vec<String> = report.errors.iter().map(ToString::to_string).collect();
    ensure!(faults.is_empty(), "{name}: {}", faults.join("; "));
    let cgroup = container
        .cgroup()
        .ok_or_else(|| anyhow!("cannot update a container without a cgroup of its own"))?;
    if let Some(wanted) = limits.memory {
        check_memory(wanted, container.state.memory_mib, cgroup.number("memory.current"))?;
    }
    let files = limits.files(limits.memory);
    if let Some(unit) = &container.state.scope {
        systemd::update(unit, &files)?;
    }
    cgroup.write_all(&files)?;
    match limits.pids {
        // Without a process there is nothing to be limited any more.
        Some(pids) if !container.state.is_sandbox => {
            container.process().map_or(Ok(()), |process| limit_pids(&container, &process, pids))
        }
        _ => Ok(()),
    }
}

/// Limits the processes in the box, by the guest's cgroup of them.
fn limit_pids(container: &Container, process: &OwnedFd, pids: Option<u64>) -> Result<()> {
    let value = pids.map_or("max".into(), |pids| pids.to_string());
    let request = FileRequest {
        op: FileOp::Upload,
        guest_path: "/sys/fs/cgroup/pids.max".into(),
        data: Some(to_base64(value.as_bytes())),
        offset: None,
        length: None,
        mode: None,
    };
    let request = serde_json::to_vec(&request).context("write a request")?;
    let socket = container.socket("exec.sock");
    let agent = Agent { socket: &socket, process, signals: None };
    let refused = match agent.ask(kind::DATA, &request, Some(END_LIMIT))? {
        Answer::Frame(kind::DATA, reply) => {
            let reply: FileResponse =
                serde_json::from_slice(&reply).context("read the box's answer")?;
            if reply.success {
                return Ok(());
            }
            reply.error.unwrap_or_default()
        }
        Answer::Frame(_, text) => String::from_utf8_lossy(&text).into_owned(),
        _ => "its agent does not answer; is it paused?".into(),
    };
    bail!("limit the processes in the box to {value}: {refused}")
}

/// Whether a box with this RAM, which uses so much on the host, can have this limit.
fn check_memory(wanted: u64, memory_mib: u32, used: Option<u64>) -> Result<()> {
    let ram = u64::from(memory_mib) << 20;
    ensure!(
        wanted <= ram,
        "memory.limit is {wanted} bytes, and the box has {ram}, which cannot grow while it runs: make a new container with more"
    );
    let most = with_overhead(wanted);
    ensure!(
        used.is_none_or(|used| used <= most),
        "memory.limit is {wanted} bytes, with which the box might take {most} of the host's, and it takes {} now",
        used.unwrap_or_default()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_down_and_not_up() {
        const MIB: u64 = 1 << 20;
        check_memory(512 * MIB, 512, Some(300 * MIB)).expect("as it is");
        check_memory(256 * MIB, 512, Some(300 * MIB)).expect("down, with the overhead");
        let error = check_memory(513 * MIB, 512, None).expect_err("up");
        assert!(error.to_string().contains("cannot grow"), "{error}");
        let error = check_memory(128 * MIB, 512, Some(400 * MIB)).expect_err("in use");
        assert!(error.to_string().ends_with("takes 419430400 now"), "{error}");
    }
}
