//! The software x86-64 CPU: decode, execute, MMU, local APIC.
//!
//! Knows no device and no KVM. Everything outside RAM goes through [`Bus`].

mod bus;

pub use bus::{Bus, Flow};
