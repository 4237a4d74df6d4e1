//! `mote`: reads the arguments and the environment, calls [`mote::execute`], exits with its code.
//! The only exit point. Its name may make it something else: under `virtiofsd` it serves a share ([`server`]), under
//! `mote-template` it makes a template ([`maker`]), under `mote-pause` it holds a pod ([`pause`]), and under `mote-oci`,
//! or as `mote oci`, it is an OCI runtime ([`oci`]).

#![cfg_attr(not(test), no_main)]

use std::ffi::{c_char, c_int};

use mote::confine::sudden_end;
use mote::host::virtiofsd::server;
use mote::oci::pause;
use mote::plan::Environment;
use mote::sys::fatal::HandlerStack;
use mote::template::maker;
use mote::timeline::Timeline;
use mote::{cli, log, oci, outcome, sys};

/// The program, in place of Rust's own ([`sys::runtime::start`] says why). The C library has passed the arguments on by now.
#[allow(unsafe_code, reason = "the C library calls it by this name")]
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    let started = sys::runtime::start().and_then(|()| HandlerStack::new().take());
    if let Err(error) = started {
        log::error(&format!("start a process: {error}"));
        return outcome::BROKEN.into();
    }
    // Not by returning: what is still to be written to standard output is written by this.
    std::process::exit(run().into())
}

fn run() -> u8 {
    // A panic is a bug: it ends in one line that says where, not in a signal that says nothing.
    std::panic::set_hook(Box::new(|panic| {
        sudden_end::end(
            "internal-error",
            format_args!("internal error, please report it: {panic}"),
        );
    }));
    let timeline = Timeline::start();
    let mut arguments = std::env::args_os().peekable();
    match arguments.next() {
        Some(name) if name == server::NAME => return server::main(arguments),
        Some(name) if name == maker::NAME => return maker::main(arguments),
        Some(name) if name == pause::NAME => return pause::main(),
        Some(name) if oci::is_name(&name) => return oci::main(arguments),
        _ => {}
    }
    if arguments.next_if(|word| word == oci::COMMAND).is_some() {
        return oci::main(arguments);
    }
    let environment = Environment::from_process();
    match cli::parse(arguments) {
        Ok(command) => mote::execute(command, &environment, timeline),
        Err(problem) => {
            log::error(&problem);
            outcome::USAGE
        }
    }
}
