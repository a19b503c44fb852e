//! virtio devices and their PCI transport, for any VMM.
//!
//! Knows queues and guest memory, and no hypervisor. virtio 1.2 (OASIS committee specification
//! 01, 2022) is the specification meant wherever only a section is named.

pub mod balloon;
pub mod block;
pub mod console;
pub mod device;
pub mod feature;
pub mod life;
pub mod memory;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod scsi;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod worker;

pub use device::{Activation, Device, DeviceError, Interrupt, Payload, QueueSetup};
pub use memory::{GuestMemory, OutsideRam};
pub use queue::{Chain, Queue, QueueError};
pub use worker::{Handler, Interest, Poll, Worker};
