//! What sessions for commands and for terminals have in common: the box that they work in, the
//! program that a request asks for, and the exit code that the client is told.

use std::path::Path;

use mote_agent::instance::Instance;

use crate::cgroup::BoxCgroup;
use crate::launch::Program;
use crate::sys::ExitStatus;

/// What a session needs of the box.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// What the box is.
    pub instance: &'a Instance,
    /// Its cgroup.
    pub cgroup: &'a BoxCgroup,
    /// Process id of the entrypoint.
    pub entrypoint: i32,
    /// Number of the session, which no other has had.
    pub session: u64,
}

/// The program that a request asks for, with what the box has for all of them.
pub fn program<'a>(
    cmd: &'a [String],
    env: &'a [(String, String)],
    workdir: &'a str,
    user: Option<&'a str>,
    context: &Context<'a>,
) -> Program<'a> {
    let (executable, args) = cmd.split_first().map_or(("", &[][..]), |(e, a)| (e.as_str(), a));
    let Instance { rlimits, security, .. } = context.instance;
    let user = user.filter(|user| !user.is_empty());
    let (terminal, by_session) = (false, true);
    Program { executable, args, env, workdir, user, rlimits, terminal, by_session, security }
}

/// The box's environment with a request's own entries over it.
pub fn environment(request: &[String], context: &Context<'_>) -> Vec<(String, String)> {
    let own = request.iter().map(|entry| match entry.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (entry.clone(), String::new()),
    });
    context.instance.exec_env.iter().cloned().chain(own.filter(|(n, _)| !n.is_empty())).collect()
}

/// A request's directory, seen from the box's own.
pub fn working_dir(request: Option<&str>, context: &Context<'_>) -> String {
    let own = Path::new(&context.instance.exec_workdir);
    own.join(request.unwrap_or("")).to_string_lossy().into_owned()
}

/// As a shell has it: a status, or 128+n for signal n.
pub fn exit_code(status: ExitStatus) -> i32 {
    match status {
        ExitStatus::Exited(code) => i32::from(code),
        ExitStatus::Signaled(signal) => 128 + i32::from(signal),
    }
}
