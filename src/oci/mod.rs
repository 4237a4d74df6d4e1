//! `mote-oci`, by which podman and containerd run their containers in mote's boxes: the commands of an OCI runtime.
//!
//! It is mote's own file under another name, and a translator: it turns a bundle into a spec, assembles the root file
//! system, and becomes `mote --config-file` in a child process. What a box can do is mote's; what a container has on the
//! host (its state, its cgroup, its mounts, its place in a network namespace) is here.
//!
//! [`config`] reads what an engine asks for, with [`process`], [`resources`], [`mounts`], [`devices`] and [`hooks`]; [`spec`] writes
//! what mote runs; [`state`] is what outlives a command; [`create`] makes a container, whose process [`launch`] starts
//! on a file system from [`root`], or which is a pod's [`pause`]; [`lifecycle`], [`exec`] and [`inspect`] are the other commands.

pub mod agent;
pub mod arguments;
pub mod cgroup;
pub mod config;
#[cfg(test)]
mod config_tests;
pub mod console;
pub mod copy_up;
pub mod create;
pub mod devices;
pub mod end;
pub mod exec;
pub mod hooks;
pub mod inspect;
pub mod launch;
pub mod lifecycle;
pub mod mounts;
#[cfg(test)]
mod mounts_tests;
pub mod passt;
pub mod pause;
pub mod process;
pub mod report;
pub mod resources;
pub mod root;
pub mod spec;
pub mod state;
pub mod systemd;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use self::arguments::{Command, Global};
use self::state::Store;
use crate::sys::confine;

/// The program's name, under which mote's file is an OCI runtime.
pub const NAME: &str = "mote-oci";
/// The same as mote's own command.
pub const COMMAND: &str = "oci";

/// Whether a program was started under this module's name, whatever its path.
pub fn is_name(argument: &OsStr) -> bool {
    Path::new(argument).file_name() == Some(OsStr::new(NAME))
}

/// Carries out a command line, which is what follows the program's name, and returns the exit code.
///
/// Must be called first of all, while there is one thread and no open file but those that the process was started with.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    // Engines leave descriptors open, even of their own sockets, which neither a box nor a relay must keep.
    let closed = confine::inherited_descriptors().map(|fds| confine::close_inherited(&fds));
    let (global, command) = arguments::parse(arguments);
    let done = closed
        .context("list the open descriptors in /proc/self/fd (is /proc mounted?)")
        .and_then(|()| execute(&global, command?));
    done.unwrap_or_else(|error| {
        report::error(&global, &format!("{error:#}"));
        1
    })
}

fn execute(global: &Global, command: Command) -> Result<u8> {
    let root = global.root.clone().unwrap_or_else(default_root);
    let store = Store::at(root);
    let text = match command {
        Command::Help => inspect::HELP.to_owned(),
        Command::Version => inspect::VERSION.to_owned(),
        Command::Features => inspect::features(),
        Command::State(id) => inspect::state(&store, &id)?,
        Command::List { json, quiet } => inspect::list(&store, json, quiet)?,
        Command::Processes { id, json } => inspect::processes(&store, &id, json)?,
        Command::Create(wanted) => {
            return create::create(&store, global, &wanted, false).map(|_| 0);
        }
        Command::Run { create, detach, keep } => {
            return lifecycle::run(&store, global, &create, detach, keep);
        }
        Command::Exec(wanted) => return exec::exec(&store, &wanted),
        Command::Start(id) => return lifecycle::start(&store, &id).map(|()| 0),
        Command::Kill { id, signal, all } => {
            return lifecycle::kill(&store, &id, signal, all).map(|()| 0);
        }
        Command::Delete { id, force } => {
            return lifecycle::delete(&store, &id, force).map(|()| 0);
        }
        Command::Pause(id) => return lifecycle::freeze(&store, &id, true).map(|()| 0),
        Command::Resume(id) => return lifecycle::freeze(&store, &id, false).map(|()| 0),
        Command::Update { id, resources } => {
            return lifecycle::update(&store, &id, &resources).map(|()| 0);
        }
    };
    std::io::stdout().write_all(text.as_bytes()).context("write to standard output")?;
    Ok(0)
}

fn default_root() -> PathBuf {
    state::runtime_directory().join(NAME)
}
