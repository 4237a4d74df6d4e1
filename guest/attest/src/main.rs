//! `mote-attest`: the attestation server of a mote guest (contract §6). mote gives it to boxes that ask for it, and
//! the agent starts it at the first client, with the listening socket and two directories in memory; from then on it
//! accepts clients itself. Its end ends nothing else: the agent starts another for the next client.
//!
//! One thread per client, of which there are at most so many; whatever a client can make grow has a bound.
//!
//! Each module uses only those above it:
//!
//! - [`report`]: what a report says, and the simulated one
//! - [`certificate`]: the TLS certificate that carries a report
//! - [`tsm`]: real reports, from the guest's kernel
//! - [`sealing`]: data that only the same identity opens
//! - [`secrets`]: files in memory, and variables for commands
//! - [`budget`]: how much of something all clients have together
//! - [`process`]: messages to a program of the box
//! - [`request`]: what a client may ask, and the answers
//! - [`client`]: a client from its handshake to its answer
//! - [`server`]: takes clients

mod budget;
mod certificate;
mod client;
mod process;
mod report;
mod request;
mod sealing;
mod secrets;
mod server;
mod tsm;

use std::convert::Infallible;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use mote_agent::attestation::{Options, SECRETS_FD, VARIABLES_FD};

use crate::certificate::Evidence;
use crate::request::Service;
use crate::secrets::Secrets;

fn main() {
    let _ = rustix::thread::set_name(c"mote-attest");
    let options = match Options::from_arguments(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(reason) => fail("mote-attest", &reason),
    };
    let tsm = tsm::find(Path::new(tsm::DIRECTORY));
    let simulated = options.simulated && tsm.is_none();
    // In front of every line that this program writes.
    let name = if simulated { "mote-attest (SIMULATED)" } else { "mote-attest" };
    match serve(&options, tsm, name) {
        Err(reason) => fail(name, &reason),
    }
}

fn fail(name: &str, reason: &str) -> ! {
    eprintln!("{name}: {reason}");
    std::process::exit(1);
}

/// Serves clients, with reports of this directory, if there is one.
fn serve(options: &Options, tsm: Option<&Path>, name: &str) -> Result<Infallible, String> {
    let key = certificate::Key::new()?;
    let data = key.report_data(options.binding);
    let (evidence, remark) = match tsm {
        Some(directory) => (tsm::evidence(directory, &data)?, ""),
        None if options.simulated => (Evidence::simulated(&data), ", which proves nothing"),
        None => {
            return Err(format!(
                "there are no attestation reports in this guest: its kernel has no {}, and A3S_TEE_SIMULATE is neither 1 nor true; connections are closed",
                tsm::DIRECTORY
            ));
        }
    };
    let identity = evidence.report.identity();
    let config = certificate::server_config(&key, evidence)?;
    let secrets = Secrets::new(inherited(SECRETS_FD), inherited(VARIABLES_FD))
        .map_err(|e| format!("read the variables that were set before: {e}"))?;
    let service = Service { identity, secrets };
    eprintln!("{name}: serves attestation{remark}");
    server::run(Arc::new(config), Arc::new(service)).map_err(|e| format!("accept clients: {e}"))
}

/// A descriptor that the agent has left open for this program.
#[allow(unsafe_code, reason = "the number is all that there is of it")]
fn inherited(fd: RawFd) -> OwnedFd {
    // SAFETY: the agent starts this program with the descriptor open (`Attest::start`), and this is the only
    // place that takes it, once for each number. Started by hand without it, calls on it fail with EBADF.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
