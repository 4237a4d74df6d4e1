//! How many descriptors a box may need.

use super::{HostSocket, PublishedPort, Share};
use crate::spec::Spec;
use crate::virtio::vsock::table::MAX_CONNECTIONS;

/// The descriptors that a box may need at once: one for every connection, and a few for each thing that
/// it has from the start.
pub(super) fn limit(
    spec: &Spec,
    shares: &[Share],
    sockets: &[HostSocket],
    ports: &[PublishedPort],
) -> u64 {
    /// Standard streams, KVM, memory, the main loop with its devices, the control channel.
    const FIXED: usize = 80;
    const PER_VCPU: usize = 4;
    /// Connection, process, its stderr, two queues and their copies, the interrupt.
    const PER_SHARE: usize = 16;
    /// IPv4 and IPv6.
    const PER_PORT: usize = 2;
    /// Of the ports on which the box listens, if they are published.
    const MAX_LISTENERS: usize = 512;
    let started = FIXED
        + usize::from(spec.vcpus) * PER_VCPU
        + if spec.publish_listeners { MAX_LISTENERS } else { 0 }
        + shares.len() * PER_SHARE
        + sockets.len()
        + ports.len() * PER_PORT;
    (started + MAX_CONNECTIONS) as u64
}
