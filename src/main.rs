//! `mote`: reads the arguments and the environment, calls [`mote::execute`], exits with its code.
//! The only exit point. Under the name `virtiofsd` it serves a share instead ([`server`]), under the name
//! `mote-template` it makes a template ([`maker`]).

use std::process::ExitCode;

use mote::confine::sudden_end;
use mote::host::virtiofsd::server;
use mote::plan::Environment;
use mote::template::maker;
use mote::timeline::Timeline;
use mote::{cli, log, outcome};

fn main() -> ExitCode {
    // A panic is a bug: it ends in one line that says where, not in a signal that says nothing.
    std::panic::set_hook(Box::new(|panic| {
        sudden_end::end(
            "internal-error",
            format_args!("internal error, please report it: {panic}"),
        );
    }));
    let timeline = Timeline::start();
    let mut arguments = std::env::args_os();
    match arguments.next() {
        Some(name) if name == server::NAME => return server::main(arguments),
        Some(name) if name == maker::NAME => return maker::main(arguments),
        _ => {}
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
