//! virtio-vsock (virtio 1.2, 5.10): stream connections between guest and host.
//!
//! [`packet`] is the header codec, [`conn`] one connection's state machine, [`flow`] the framing of
//! network connections, all pure; [`host_end`] is a connection's host socket, and [`mux`] the device
//! at work, with the queues and the connection table.

pub mod conn;
pub mod flow;
pub mod host_end;
pub mod mux;
pub mod packet;

use std::sync::mpsc::SyncSender;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::{
    DeviceEvent, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, MainLoopDevice, MainLoopDeviceKind,
};

/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// The vCPU side.
pub fn device(sender: SyncSender<DeviceEvent>, event: EventFd) -> MainLoopDevice {
    MainLoopDevice {
        kind: MainLoopDeviceKind::Vsock,
        id: VIRTIO_ID_VSOCK,
        features: F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX,
        queue_sizes: &QUEUE_SIZES,
        config: packet::GUEST_CID.to_le_bytes().to_vec(),
        sender,
        event,
    }
}
