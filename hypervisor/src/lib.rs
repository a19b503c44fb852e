//! VM and vCPU traits, and their `kvm` and `soft` backends.
//!
//! Everything above this crate is written once and doesn't know which CPU runs the guest.

pub mod cpu;
pub mod host;
pub mod kvm;
pub mod soft;
mod state;
mod traits;

use std::sync::Arc;

pub use softcpu::{Bus, Flow};
pub use state::*;
pub use traits::*;

/// Makes a VM on the backend asked for; nothing is substituted.
///
/// # Errors
/// `Unavailable` where the host cannot run it.
pub fn create(backend: Backend) -> Result<Arc<dyn Vm>> {
    Ok(match backend {
        Backend::Kvm => Arc::new(kvm::KvmVm::new()?),
        Backend::Soft => Arc::new(soft::SoftVm::new()),
    })
}

/// A slot's shape, checked the same on every backend.
fn check_slot(slot: &MemorySlot) -> Result<()> {
    const PAGE: u64 = 4096;
    let bad = |what: &str| Err(Error::Invalid(format!("memory slot {}: {what}", slot.id)));
    if slot.len == 0 || !slot.len.is_multiple_of(PAGE) || !slot.gpa.is_multiple_of(PAGE) {
        return bad("address and length must be multiples of 4 KiB, and the length not 0");
    }
    if slot.gpa.checked_add(slot.len).is_none() {
        return bad("it ends above the address space");
    }
    if slot.host.is_null() || !(slot.host.addr() as u64).is_multiple_of(PAGE) {
        return bad("the host address must be a multiple of 4 KiB");
    }
    Ok(())
}

fn not_logged(id: u32) -> Error {
    Error::Invalid(format!("memory slot {id} does not log dirty pages"))
}
