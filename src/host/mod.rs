//! What a box needs on the host: its sockets, with what its passt publishes in place of some, the virtiofsd of
//! each share, the process that writes its logs, and the janitor, which removes all of it at the end.

pub mod janitor;
pub mod logs;
pub mod passt;
pub mod sockets;
pub mod virtiofsd;
