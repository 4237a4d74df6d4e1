//! virtio-vsock (virtio 1.2, 5.10): stream connections between guest and host.
//!
//! [`packet`] is the header codec, [`conn`] one connection's state machine, half-closes included, [`flow`]
//! the framing of network connections, all three pure; [`endpoint`] is a connection's host socket, of
//! which it closes each direction when `conn` says so; [`client`] stands for a client of a published UDP port, which
//! has no socket of its own; [`table`] holds all connections, [`listeners`] accepts clients, and [`source`]
//! numbers what the device watches. [`mux`] is the device: it moves packets between the queues and the connections.

pub mod client;
pub mod conn;
pub mod endpoint;
pub mod flow;
pub mod listeners;
pub mod mux;
pub mod packet;
pub mod source;
pub mod table;
