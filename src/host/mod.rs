//! What a box needs on the host: its sockets, with what its passt publishes in place of some, the virtiofsd of
//! each share, what publishes the ports on which it listens, the processes that write its logs and that exchange frames with other boxes, and the janitor, which
//! removes all of it at the end.

mod helper;
pub mod janitor;
pub mod logs;
pub mod passt;
pub mod passt_line;
pub mod publisher;
pub mod sockets;
pub mod switch;
pub mod virtiofsd;
