//! Virtio devices (OASIS virtio 1.2) and the contract between a device and its transport.
//!
//! ```text
//!   vCPU thread                                    main thread, or a back-end process
//!   mmio::MmioDevice ── activate(Activation) ──▶ device: owns its queues until reset
//!        registers                                 ▲ kick: ioeventfd    │ interrupt: irqfd
//! ```
//!
//! To add a device that the main loop serves, implement [`main_loop::MainLoopDevice`] in a file here,
//! as [`rng`] does, and add it to the list in [`devices`]. One whose queues a back-end process serves
//! implements [`device::VirtioDevice`], as [`fs`] does, and is created in `vm.rs`.

pub mod balloon;
pub mod buffers;
pub mod device;
pub mod devices;
pub mod fs;
pub mod main_loop;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod vsock;
