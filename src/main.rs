//! `mote`: reads the arguments and the environment, calls [`mote::execute`], exits with its code.
//! The only exit point. Its name may make it something else: under `virtiofsd` it serves a share ([`server`]), under
//! `mote-template` it makes a template ([`maker`]), under `mote-pause` it holds a pod ([`pause`]), and under `mote-oci`,
//! or as `mote oci`, it is an OCI runtime ([`oci`]).

use std::process::ExitCode;

use mote::confine::sudden_end;
use mote::host::virtiofsd::server;
use mote::oci::pause;
use mote::plan::Environment;
use mote::template::maker;
use mote::timeline::Timeline;
use mote::{cli, log, oci, outcome};

fn main() -> ExitCode {
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
        Some(name) if oci::is_name(&name) => return ExitCode::from(oci::main(arguments)),
        _ => {}
    }
    if arguments.next_if(|word| word == oci::COMMAND).is_some() {
        return ExitCode::from(oci::main(arguments));
    }
    let environment = Environment::from_process();
    match cli::parse(arguments) {
        Ok(command) => ExitCode::from(mote::execute(command, &environment, timeline)),
        Err(problem) => {
            log::error(&problem);
            ExitCode::from(outcome::USAGE)
        }
    }
}
