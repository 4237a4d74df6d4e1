//! virtio-fs (virtio 1.2, 5.11): the guest's file systems. virtiofsd serves the queues in guest memory;
//! this is only the vhost-user front-end, which tells virtiofsd where they are.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, anyhow, ensure};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as Broken, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::virtio::device::{Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice};
use crate::virtio::main_loop::Properties;

/// Longest tag in bytes (5.11.4: a 36-byte field, no terminator when full).
pub const MAX_TAG: usize = 36;
/// The high-priority queue (FORGET, INTERRUPT) and one request queue.
const QUEUE_SIZES: [u16; 2] = [64, 256];
/// The request queue's index. The other one is not used before there are answers from this.
const REQUESTS: usize = 1;
/// What is offered to the driver, if the back-end has it.
const FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// What the driver reads of the device of a share with this tag, whose back-end has everything.
pub fn properties(tag: &str) -> Properties {
    let (id, queue_sizes) = (VIRTIO_ID_FS, &QUEUE_SIZES);
    Properties {
        id,
        features: FEATURES,
        queue_sizes,
        config: config_space(tag),
        late: false,
        busy: true,
    }
}

/// One share's front-end.
#[derive(Debug)]
pub struct Fs {
    config: Vec<u8>,
    features: u64,
    connection: Connection,
    /// Whether protocol features are agreed on: then each queue is enabled by a message, and else all are from the start.
    has_protocol_features: bool,
    /// Where the driver announces its requests, if the back-end waits for that already.
    asked: Option<EventFd>,
    /// Where requests are announced while the back-end has the queues.
    in_use: Option<EventFd>,
}

/// The vhost crate's front-end has no `Debug`.
struct Connection(Frontend);

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frontend({})", self.0.as_raw_fd())
    }
}

impl Fs {
    /// The front-end of a back-end that has everything, mote's own, and may not be ready yet: it is asked for no answer. What
    /// it is told waits in the socket, and the driver's requests in their queue. They are announced at `asked`, if that is
    /// what the back-end waits for.
    ///
    /// # Errors
    /// The host refuses to pass the memory on.
    pub fn new(
        tag: &str,
        connection: UnixStream,
        ram: &GuestRam,
        asked: Option<EventFd>,
    ) -> Result<Self> {
        let frontend = Frontend::from_stream(connection, QUEUE_SIZES.len() as u64);
        let set_up = || {
            frontend.set_owner()?;
            frontend.set_mem_table(&regions(ram)?).map(drop)
        };
        unless_gone(set_up())?;
        Ok(Fs {
            config: config_space(tag),
            features: FEATURES,
            connection: Connection(frontend),
            has_protocol_features: false,
            asked,
            in_use: None,
        })
    }

    /// Negotiates with a back-end that may have less, and waits until it has answered.
    ///
    /// # Errors
    /// The back-end does not answer, or lacks a feature.
    pub fn negotiate(tag: &str, connection: UnixStream, ram: &GuestRam) -> Result<Self> {
        let mut frontend = Frontend::from_stream(connection, QUEUE_SIZES.len() as u64);
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_owner().map_err(protocol)?;
        let offered = frontend.get_features().map_err(protocol)?;
        ensure!(
            offered & protocol_bit != 0,
            "virtiofsd does not speak vhost-user protocol features"
        );
        ensure!(offered & F_VERSION_1 != 0, "virtiofsd does not offer virtio 1.0");
        // The vhost crate refuses to ask for protocol features before features are acknowledged.
        frontend.set_features(offered & (protocol_bit | F_VERSION_1)).map_err(protocol)?;
        let protocol_offered = frontend.get_protocol_features().map_err(protocol)?;
        let wanted = VhostUserProtocolFeatures::MQ;
        frontend.set_protocol_features(protocol_offered & wanted).map_err(protocol)?;
        let regions = regions(ram).map_err(protocol)?;
        frontend.set_mem_table(&regions).map_err(protocol)?;

        Ok(Fs {
            config: config_space(tag),
            features: offered & FEATURES,
            connection: Connection(frontend),
            has_protocol_features: true,
            asked: None,
            in_use: None,
        })
    }

    fn hand_over(&mut self, activation: &Activation) -> Result<()> {
        let Activation { ram, features, queues, interrupt, .. } = activation;
        let frontend = &mut self.connection.0;
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let more = if self.has_protocol_features { protocol_bit } else { 0 };
        unless_gone(frontend.set_features(features | more))?;
        let host_address = |guest: u64| {
            let address = ram.get_host_address(GuestAddress(guest));
            address.map(|a| a as u64).context("a queue is outside guest memory")
        };
        for (index, ready) in queues.iter().enumerate() {
            let queue = &ready.queue;
            let config = VringConfigData {
                queue_max_size: queue.max_size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: host_address(queue.desc_table())?,
                used_ring_addr: host_address(queue.used_ring())?,
                avail_ring_addr: host_address(queue.avail_ring())?,
                log_addr: None,
            };
            let mut set_up = || {
                frontend.set_vring_num(index, queue.size())?;
                frontend.set_vring_addr(index, &config)?;
                frontend.set_vring_base(index, 0)?;
                frontend.set_vring_call(index, interrupt)?;
                frontend.set_vring_kick(index, &ready.kick)?;
                if self.has_protocol_features {
                    frontend.set_vring_enable(index, true)?;
                }
                Ok(())
            };
            unless_gone(set_up())?;
        }
        Ok(())
    }
}

fn regions(ram: &GuestRam) -> Result<Vec<VhostUserMemoryRegionInfo>, vhost::Error> {
    ram.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect()
}

/// That a back-end has ended is no error here: the main loop sees its end, and says what it was.
fn unless_gone(told: Result<(), vhost::Error>) -> Result<()> {
    match told {
        Err(vhost::Error::VhostUserProtocol(Broken::SocketBroken(_) | Broken::Disconnected)) => {
            Ok(())
        }
        told => told.map_err(protocol),
    }
}

fn protocol(error: vhost::Error) -> anyhow::Error {
    anyhow!("talk to virtiofsd: {error}")
}

/// `struct virtio_fs_config`: the tag, filled with zeros, and the number of request queues.
fn config_space(tag: &str) -> Vec<u8> {
    let mut config = tag.as_bytes().to_vec();
    config.resize(MAX_TAG, 0);
    config.extend((QUEUE_SIZES.len() as u32 - 1).to_le_bytes());
    config
}

impl VirtioDevice for Fs {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn take_kick(&mut self, queue: usize) -> Option<EventFd> {
        self.asked.take_if(|_| queue == REQUESTS)
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let requests = activation.queues.get(REQUESTS).context("there is no request queue")?;
        // Set before anything can fail, so that reset stops every queue that was handed over.
        self.in_use = Some(requests.kick.try_clone().context("duplicate an eventfd")?);
        self.hand_over(&activation)
    }

    fn reset(&mut self) {
        let Some(requests) = self.in_use.take() else { return };
        // One that has not been asked for anything yet answers only then.
        let _ = requests.write(1);
        for index in 0..QUEUE_SIZES.len() {
            // GET_VRING_BASE stops the queue. If it fails, the back-end has died, and the main loop
            // notices that itself.
            let _ = self.connection.0.get_vring_base(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_space_holds_tag_and_queue_count() {
        let config = config_space("data");
        assert_eq!(config.len(), 40);
        assert_eq!(&config[..5], b"data\0");
        assert_eq!(config[36..], [1, 0, 0, 0]);
        assert_eq!(config_space(&"x".repeat(36))[35..37], [b'x', 1]);
    }
}
