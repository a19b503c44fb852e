//! PCI Express: the root complex, the places of its functions, and what they get of the machine.

mod host;
mod root;
#[cfg(test)]
pub(crate) mod testing;

pub use host::{Hosts, Owner, pin_slot};
pub use root::{ECAM, ECAM_LEN, Ecam, PORTS, PORTS_LEN, PciRoot, PciState, PlaceError, RESET};
pub use vmm_api::devices::PciAddress as Place;
