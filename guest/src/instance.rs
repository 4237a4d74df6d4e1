//! The instance configuration: what the host asks of the guest, written by the VMM as one JSON
//! file in a second initramfs archive (design §2, "no handshake to configure the guest").
//!
//! Everything here has been checked by the host's `Plan`; the agent only reports what the guest's
//! own file system makes impossible.

use serde::{Deserialize, Serialize};

/// Where the agent finds the file in its initramfs.
pub const PATH: &str = "/mote/instance.json";

/// Virtio-fs tag of the share that becomes `/`. Shares of the spec may not use it.
pub const ROOT_TAG: &str = "mote-root";

/// `PATH` of an entrypoint whose environment names none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Everything the agent needs to start the entrypoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Guest host name (contract §7.1: `$HOSTNAME` of the spec's environment, or `localhost`).
    pub hostname: String,
    /// The program to run.
    pub entrypoint: Entrypoint,
    /// Directory the entrypoint starts in; must exist in the guest.
    pub workdir: String,
    /// User and group to run as (contract §1.5): `uid`, `uid:gid`, `name` or `name:group`.
    pub user: Option<String>,
    /// Resource limits in the order they are set; a later entry for a resource wins.
    pub rlimits: Vec<Rlimit>,
}

/// A program with its arguments and its whole environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entrypoint {
    /// Path, or a name that is looked up in the environment's `PATH`.
    pub executable: String,
    /// Arguments after `argv[0]`.
    pub args: Vec<String>,
    /// Environment in order; a later entry for a name wins.
    pub env: Vec<(String, String)>,
}

/// One `setrlimit` call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*` number of Linux on x86-64.
    pub resource: u32,
    /// Soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}
