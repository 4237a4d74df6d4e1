//! Which boxes may start from the same template.

use crate::plan::Plan;

/// What VMs of one template have in common, beside the host and mote, with the kernel and the initramfs in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Whether the guest has the attestation server.
    pub attests: bool,
}

impl Shape {
    /// The shape of this box's VM.
    pub fn of(plan: &Plan) -> Shape {
        Shape {
            vcpus: plan.vcpus,
            memory_bytes: plan.memory_bytes,
            attests: plan.attestation.is_some(),
        }
    }
}
