//! PCI Express: the root complex, its functions, and the places they have.

mod host_bridge;
mod root;

pub use host_bridge::HostBridge;
pub use root::{ECAM, ECAM_LEN, Ecam, PORTS, PORTS_LEN, PciRoot, PciState, PlaceError, RESET};
pub use vmm_api::devices::PciAddress as Place;

/// The buses behind a bridge, as the guest numbered them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusNumber {
    /// The bus right behind it.
    pub secondary: u8,
    /// The highest one behind it.
    pub subordinate: u8,
}

/// A PCI function.
///
/// Called on vCPU threads (the configuration space) and the event loop (the rest).
pub trait Function: Send + Sync + std::fmt::Debug {
    /// Reads `width` (1, 2, 4) bytes at `register` (aligned, below 4096).
    fn config_read(&self, register: u16, width: u8) -> u32;

    /// Writes `width` bytes at `register`.
    fn config_write(&self, register: u16, width: u8, value: u32);

    /// The header says that the slot has several functions.
    fn set_multifunction(&self);

    /// For a root port: the bus behind it as the configuration numbers them, 1 to 255.
    fn port_index(&self) -> Option<u8> {
        None
    }

    /// For a root port: the buses behind it as the guest numbered them.
    fn bus_numbers(&self) -> Option<BusNumber> {
        None
    }

    /// Power-on state. vCPUs are stopped.
    fn reset(&self);

    /// The machine is paused: vCPUs are stopped already. When it returns, the function touches
    /// guest memory no more.
    fn pause(&self) {}

    /// It goes on; vCPUs follow.
    fn resume(&self) {}
}
