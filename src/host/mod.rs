//! What stands beside the box on the host: its sockets, the virtiofsd of each share, and the janitor
//! that clears all of it away.

pub mod janitor;
pub mod sockets;
pub mod virtiofsd;
