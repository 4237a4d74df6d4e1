//! The attestation server (contract §6), a program of its own that only boxes that ask for it have. The agent holds
//! its port from before anything else runs, starts it when the first client comes, and another one if it was killed.

use std::cell::Cell;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::{Duration, Instant};

use mote_agent::attestation::{
    self, MAX_SECRETS, MAX_SECRETS_LEN, MAX_VARIABLES_LEN, PATH, SECRETS_FD, VARIABLES,
    VARIABLES_FD,
};
use mote_agent::protocol::ATTEST_SERVER_PORT;

use crate::spawn;
use crate::sys::{self, ExitStatus, Interest, Reaped, files, net};

/// How long no other is started after one was killed, so that one that always dies takes little of the CPU.
const REST: Duration = Duration::from_millis(100);
/// Files beside those that are counted: the directory, and one that is being written.
const SPARE_FILES: u64 = 2;

/// The server.
#[derive(Debug)]
pub struct Attest {
    program: File,
    arguments: Vec<CString>,
    listener: File,
    /// A directory in memory that the server mounts at the first secret.
    secrets: File,
    /// One with the variables, in nobody's tree.
    variables: File,
    /// The process that takes clients, if there is one.
    process: Cell<Option<i32>>,
    /// It has ended of itself: there is nothing that another one could serve.
    has_given_up: Cell<bool>,
    resting_until: Cell<Option<Instant>>,
}

impl Attest {
    /// Takes the port, and the program out of the initramfs, to be started with these arguments; to be called while
    /// that is still the root.
    ///
    /// # Errors
    /// If the initramfs lacks the program, or the kernel refuses the port or directories in memory.
    pub fn stage(arguments: &[String]) -> Result<Self, String> {
        let failed = |doing: &'static str| {
            move |e: io::Error| format!("prepare the attestation server: {doing}: {e}")
        };
        let arguments = ["mote-attest"].into_iter().chain(arguments.iter().map(String::as_str));
        Ok(Attest {
            program: File::open(PATH).map_err(failed("open /mote/attest in the initramfs"))?,
            arguments: arguments
                .map(sys::c_string)
                .collect::<io::Result<_>>()
                .map_err(failed("compose its arguments"))?,
            listener: net::vsock_listen(ATTEST_SERVER_PORT).map_err(failed("take its port"))?,
            secrets: files::memory_directory(MAX_SECRETS_LEN, MAX_SECRETS + SPARE_FILES)
                .map_err(failed("make a directory in memory"))?,
            // The old ones are there until the new ones are whole.
            variables: files::memory_directory(2 * MAX_VARIABLES_LEN, 2 + SPARE_FILES)
                .map_err(failed("make a directory in memory"))?,
            process: Cell::new(None),
            has_given_up: Cell::new(false),
            resting_until: Cell::new(None),
        })
    }

    /// Its descriptor that [`Attest::variables`] needs, for a process that closes all others.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.variables.as_fd()
    }

    /// The variables that clients have set for commands.
    pub fn variables(&self) -> Vec<(OsString, OsString)> {
        let mut text = Vec::new();
        if let Ok(file) = files::read_below(&self.variables, VARIABLES) {
            // In memory, and written by nobody but the server: what cannot be read is not there.
            let _ = file.take(MAX_VARIABLES_LEN).read_to_end(&mut text);
        }
        let text_of = |bytes: &[u8]| OsString::from_vec(bytes.to_owned());
        attestation::variables(&text).map(|(name, value)| (text_of(name), text_of(value))).collect()
    }

    /// What to wait for: the first client.
    pub fn interest(&self) -> Option<Interest<'_>> {
        let idle = self.process.get().is_none() && self.resting_until.get().is_none();
        idle.then(|| Interest::read(self.listener.as_fd()))
    }

    /// When a rest is over.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.resting_until.get()
    }

    /// Starts the server if a client waits, or closes it if there is none to be had; `ready` answers
    /// [`Attest::interest`].
    pub fn serve(&self, ready: bool) {
        self.resting_until.set(self.resting_until.get().filter(|until| Instant::now() < *until));
        if ready && self.has_given_up.get() {
            self.refuse_clients();
        } else if ready && let Err(error) = self.start() {
            eprintln!("mote-agent: start the attestation server: {error}");
            self.refuse_clients();
        }
    }

    fn start(&self) -> io::Result<()> {
        let Attest { program, arguments, listener, secrets, variables, .. } = self;
        let inherited = [(SECRETS_FD, secrets.as_fd()), (VARIABLES_FD, variables.as_fd())];
        let keep = [program.as_fd(), listener.as_fd(), secrets.as_fd(), variables.as_fd()];
        let pid = sys::fork(&keep, c"mote-attest", || {
            let error = spawn::execute(program, arguments, listener.as_fd(), &inherited);
            eprintln!("mote-agent: execute the attestation server: {error}");
            spawn::fail();
        })?;
        self.process.set(Some(pid));
        Ok(())
    }

    /// Takes note of a child's end, which may be the server's.
    pub fn child_ended(&self, child: Reaped) {
        if self.process.get() != Some(child.pid) {
            return;
        }
        self.process.set(None);
        match child.status {
            ExitStatus::Signaled(_) => self.resting_until.set(Some(Instant::now() + REST)),
            ExitStatus::Exited(_) => {
                self.has_given_up.set(true);
                self.refuse_clients();
            }
        }
    }

    fn refuse_clients(&self) {
        while net::accept(&self.listener).is_ok() {}
        self.resting_until.set(Some(Instant::now() + REST));
    }

    /// Ends the server: the box is over.
    pub fn finish(&self) {
        if let Some(pid) = self.process.get() {
            sys::signal(pid, libc::SIGKILL);
        }
    }
}
