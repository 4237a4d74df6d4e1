//! What a box needs on the host: its sockets, the virtiofsd of each share, and the janitor, which
//! removes all of it at the end.

pub mod janitor;
pub mod sockets;
pub mod virtiofsd;
