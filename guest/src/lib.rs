//! What host and guest agree on, compiled into both sides: [`instance`] is the configuration that
//! the VMM places in the initramfs, [`protocol`] the messages on the control channel, [`exec`] and
//! [`pty`] what clients of the box's sockets say, all in the frames of [`frame`]; [`flow`] is how
//! network connections travel. The agent itself (`main.rs` and the modules below it) is only in the
//! `mote-agent` binary.

pub mod exec;
pub mod flow;
pub mod frame;
pub mod instance;
pub mod protocol;
pub mod pty;
