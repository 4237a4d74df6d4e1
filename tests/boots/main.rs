//! Boot tests: the real binary, real specs, real root file systems, real VMs. `make boots` runs them
//! where /dev/kvm is complete, in the lab otherwise. Each test holds both halves of its
//! conversation, host's and guest's.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a failed expectation is how a test fails"
)]

mod bad_input;
mod client;
mod commands;
mod common;
mod datagrams;
mod exec;
mod faults;
mod guest;
mod hostile;
mod lifecycle;
mod limits;
mod loopback;
mod network;
mod outcomes;
mod passt;
mod ports;
mod processes;
mod sandbox;
mod shares;
mod sockets;
mod terminal;
mod traced;
mod tsi;
