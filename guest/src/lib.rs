//! What host and guest agree on, compiled into both sides. The agent itself (`main.rs` and its modules)
//! is only in the `mote-agent` binary. Each module uses only those above it:
//!
//! - [`attestation`]: how the agent starts the attestation server (`guest/attest`), a program of its own
//! - [`instance`]: the configuration that the VMM places in the initramfs
//! - [`mailbox`]: how a guest that starts from a template gets it
//! - [`frame`]: the framing of all channels
//! - [`flow`]: how network connections travel
//! - [`protocol`]: the messages on the control channel, and the vsock ports
//! - [`text`]: words, variables and paths of the guest
//! - [`files`], [`exec`], [`pty`]: what clients of the box's sockets say

pub mod attestation;
pub mod exec;
pub mod files;
pub mod flow;
pub mod frame;
pub mod instance;
pub mod mailbox;
pub mod protocol;
pub mod pty;
pub mod text;
