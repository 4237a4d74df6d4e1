//! Serves one share to one guest, by the virtiofsd crate, in a process that is confined already. A crate of its own,
//! because virtiofsd's are other versions of the crates that mote uses.

mod unchanged;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, PassthroughFs};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::unchanged::Unchanged;

/// Version of virtiofsd.
pub const VERSION: &str = "1.14.0";

/// Extended attributes, under these names of the host's: `trusted.*`, which only root in the guest may use and
/// which overlayfs keeps its own in, is `user.virtiofs.trusted.*`, which any owner of a file may write on the host, and
/// nobody in the guest may name. So virtiofsd needs no CAP_SYS_ADMIN, and the host believes nothing that it
/// reads there. The host's own `trusted.*` are not the guest's. The rest is as it is.
pub const ATTRIBUTES: &str = ":map:trusted.:user.virtiofs.:";

/// How long the guest may believe what it knows of a file's name and attributes, without asking again.
const BELIEVED: Duration = Duration::from_secs(1);

/// Descriptors that virtiofsd may need for itself: one for each region of guest memory that there can be, and some.
const OWN_DESCRIPTORS: u64 = 509 + 100 + 1;

/// What to serve.
#[derive(Debug)]
pub struct Share {
    /// The directory, as this process sees it.
    pub directory: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// This process's `/proc/self/fd`, by which virtiofsd opens a file again.
    pub descriptors: File,
    /// This process's limit on open files.
    pub open_files: u64,
    /// The clock by which the host's kernel gives files their times, since 1970 (`CLOCK_REALTIME_COARSE`).
    pub clock: fn() -> Duration,
}

/// Serves a share to the one client that connects, until that goes. Says when it can: what the client has sent before that
/// waits in the socket. Errors that the library only logs go to stderr, a line each.
///
/// # Errors
/// The directory cannot be served, or the client breaks the protocol: a text for people.
pub fn serve(
    listener: UnixListener,
    share: Share,
    ready: impl FnOnce() -> io::Result<()>,
) -> Result<(), String> {
    // Fails only if there is a logger, which mote has none of.
    let _ = log::set_logger(&Stderr).map(|()| log::set_max_level(log::LevelFilter::Error));
    let (read_only, clock) = (share.read_only, share.clock);
    let config = config(share)?;
    let failed = |error: io::Error| format!("serve the directory: {error}");
    if read_only {
        run(Unchanged::new(PassthroughFsRo::new(config).map_err(failed)?, clock), listener, ready)
    } else {
        run(Unchanged::new(PassthroughFs::new(config).map_err(failed)?, clock), listener, ready)
    }
}

fn config(share: Share) -> Result<Config, String> {
    let guest_fd_limit = share.open_files.checked_sub(OWN_DESCRIPTORS).ok_or_else(|| {
        format!(
            "the limit on open files is {}, and must be above {OWN_DESCRIPTORS}",
            share.open_files
        )
    })?;
    Ok(Config {
        entry_timeout: BELIEVED,
        attr_timeout: BELIEVED,
        // What may be kept from one open to the next, `Unchanged` decides.
        cache_policy: CachePolicy::Auto,
        root_dir: share.directory,
        xattr: true,
        xattrmap: Some(
            XattrMap::try_from(ATTRIBUTES).map_err(|e| format!("map {ATTRIBUTES}: {e}"))?,
        ),
        proc_sfd_rawfd: Some(share.descriptors),
        announce_submounts: true,
        inode_file_handles: InodeFileHandlesMode::Never,
        uid_map: Some(Vec::new()),
        gid_map: Some(Vec::new()),
        guest_fd_limit,
        ..Config::default()
    })
}

fn run<F>(
    file_system: F,
    listener: UnixListener,
    ready: impl FnOnce() -> io::Result<()>,
) -> Result<(), String>
where
    F: FileSystem + SerializableFileSystem + Send + Sync + 'static,
{
    let backend = VhostUserFsBackendBuilder::default()
        .build(file_system)
        .map_err(|e| format!("set up the device: {e}"))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("virtiofsd".into(), Arc::new(backend), memory)
        .map_err(|e| format!("set up vhost-user: {e}"))?;
    ready().map_err(|e| format!("say that the share can be served: {e}"))?;
    daemon.start(&mut Listener::from(listener)).map_err(|e| format!("take the client: {e}"))?;
    match daemon.wait() {
        Ok(()) | Err(DaemonError::HandleRequest(ProtocolError::Disconnected)) => Ok(()),
        Err(error) => Err(format!("serve the client: {error}")),
    }
}

/// Where the library's errors go: mote reads it.
struct Stderr;

impl log::Log for Stderr {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() == log::Level::Error
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            // Nobody reads it if mote is gone.
            let _ = writeln!(io::stderr(), "{}", record.args());
        }
    }

    fn flush(&self) {}
}
