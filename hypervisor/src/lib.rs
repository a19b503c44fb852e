//! VM and vCPU traits, and their `kvm` and `soft` backends.
//!
//! Everything above this crate is written once and doesn't know which CPU runs the guest.

mod state;
mod traits;

pub use softcpu::{Bus, Flow};
pub use state::*;
pub use traits::*;
