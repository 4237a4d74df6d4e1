//! Boot tests: the real binary, real specs, real root file systems, real VMs. `make boots` runs them
//! where /dev/kvm is complete, in the lab otherwise. Each test holds both halves of its conversation, the
//! host's and the guest's. Servers and clients that are longer are programs beside the tests, in C and in
//! `python/`.
//!
//! `outcomes` shows how a test reads. `common` has what all use: a box to change, ways to start it, and
//! what it left. `client` speaks to a box's sockets, `network` has servers for it to talk to, `processes`
//! looks at it from the host, and `traced` interferes with it.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a failed expectation is how a test fails"
)]

mod attestation;
mod bad_input;
mod client;
mod commands;
mod common;
mod containers;
mod datagrams;
mod egress;
mod entrypoint;
mod exec;
mod faults;
mod features;
mod guest;
mod hostile;
mod inits;
mod lifecycle;
mod limits;
mod logs;
mod loopback;
mod memory;
mod network;
mod oci;
mod oci_passt;
mod oci_rootless;
mod oci_systemd;
mod out_of_memory;
mod outcomes;
mod passt;
mod ports;
mod processes;
mod published_udp;
mod requests;
mod sandbox;
mod shares;
mod sockets;
mod spoofing;
mod switch;
mod templates;
mod terminal;
mod today;
mod traced;
mod tsi;
