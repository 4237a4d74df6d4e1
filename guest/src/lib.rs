//! What host and guest agree on, compiled into both sides: [`instance`] is the configuration that
//! the VMM places in the initramfs, [`protocol`] the messages on the control channel. The agent
//! itself (`main.rs` and the modules below it) is only in the `mote-agent` binary.

pub mod instance;
pub mod protocol;
