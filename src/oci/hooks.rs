//! Hooks: programs of the host's that an engine wants to be run at points of a container's life. Each gets the
//! container's state on its standard input.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::spec::json::Node;

/// The hooks of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Before the start, in the order of `prestart` and `createRuntime`.
    pub create: Vec<Hook>,
    /// After the start.
    pub poststart: Vec<Hook>,
    /// After the removal.
    pub poststop: Vec<Hook>,
}

/// A program of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    path: PathBuf,
    /// Its arguments, with its name in front.
    args: Vec<String>,
    env: Vec<(String, String)>,
    timeout: Option<Duration>,
}

impl Hooks {
    /// Reads the object.
    pub fn read(node: &Node<'_>) -> Option<Hooks> {
        let mut o = node.object()?;
        let mut list = |name| o.nullable(name, read_list).unwrap_or_default();
        let create = [list("prestart"), list("createRuntime")].concat();
        let (poststart, poststop) = (list("poststart"), list("poststop"));
        for name in ["createContainer", "startContainer"] {
            if let Some(node) = o.member(name).filter(|node| !node.is_vacant()) {
                node.error("would run inside the container, where a box has no programs of the host's; use createRuntime");
            }
        }
        o.finish();
        Some(Hooks { create, poststart, poststop })
    }
}

fn read_list(node: &Node<'_>) -> Option<Vec<Hook>> {
    Some(node.items()?.iter().filter_map(|item| item.read(read_hook)).collect())
}

fn read_hook(node: &Node<'_>) -> Option<Hook> {
    let mut o = node.object()?;
    let path = o.required("path", "an absolute path of a program", |node| {
        let path = node.string()?;
        if !path.starts_with('/') || path.contains('\0') {
            node.error(format!("is \"{path}\", must be an absolute path"));
            return None;
        }
        Some(path)
    });
    let args = o.nullable("args", Node::strings).unwrap_or_default();
    let env = o.nullable("env", Node::strings).unwrap_or_default();
    let timeout = o.nullable("timeout", |node| {
        let seconds = node.integer::<u32>()?;
        if seconds == 0 {
            node.error("is 0, must be more");
            return None;
        }
        Some(Duration::from_secs(seconds.into()))
    });
    o.finish();
    let split =
        |entry: String| entry.split_once('=').map(|(name, value)| (name.into(), value.into()));
    let env = env.into_iter().filter_map(split).collect();
    Some(Hook { path: path?.into(), args, env, timeout })
}

/// How often a hook with a time limit is looked at.
const STEP: Duration = Duration::from_millis(5);

/// Runs hooks in order, with this state on their standard input and their output on this process's standard error.
///
/// # Errors
/// One of them cannot be run, fails, or takes too long: the rest does not run.
pub fn run(hooks: &[Hook], state: &str) -> Result<()> {
    for hook in hooks {
        let path = hook.path.display();
        let status = run_one(hook, state).with_context(|| format!("run the hook {path}"))?;
        if !status.success() {
            bail!("the hook {path} failed: {status}");
        }
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &str) -> Result<ExitStatus> {
    let mut command = Command::new(&hook.path);
    if let Some((name, rest)) = hook.args.split_first() {
        command.arg0(name).args(rest);
    }
    // Standard output is the container's.
    let output = File::options().write(true).open("/dev/null")?;
    command.env_clear().envs(hook.env.iter().cloned());
    command.stdin(Stdio::piped()).stdout(output);
    let mut child = command.spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // One that does not want to know closes its end.
        let _ = input.write_all(state.as_bytes());
    }
    wait(&mut child, hook.timeout)
}

fn wait(child: &mut Child, timeout: Option<Duration>) -> Result<ExitStatus> {
    let Some(timeout) = timeout else { return Ok(child.wait()?) };
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("it took longer than its timeout, {timeout:?}");
        }
        thread::sleep(STEP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<Duration>) -> Hook {
        let args = ["sh", "-c", script].map(str::to_owned).into();
        Hook { path: "/bin/sh".into(), args, env: vec![("A".into(), "1".into())], timeout }
    }

    #[test]
    fn a_hook_gets_the_state_and_its_environment() {
        let script =
            r#"read -r state; [ "$state" = '{"id":"x"}' ] && [ "$A" = 1 ] && [ -z "$HOME" ]"#;
        run(&[hook(script, None)], "{\"id\":\"x\"}\n").expect("succeeds");
    }

    #[test]
    fn a_hook_that_fails_or_hangs_is_told() {
        let error = run(&[hook("exit 3", None), hook("exit 0", None)], "{}").expect_err("fails");
        assert_eq!(error.to_string(), "the hook /bin/sh failed: exit status: 3");
        let limit = Some(Duration::from_millis(50));
        let error = run(&[hook("exec sleep 600", limit)], "{}").expect_err("is stopped");
        assert!(format!("{error:#}").contains("longer than its timeout, 50ms"), "{error:#}");
        let missing = Hook { path: "/nonexistent".into(), ..hook("", None) };
        let error = run(&[missing], "{}").expect_err("is missing");
        assert!(format!("{error:#}").starts_with("run the hook /nonexistent: "), "{error:#}");
    }
}
