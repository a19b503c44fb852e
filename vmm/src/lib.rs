//! One domain: builds a machine from a config, boots it and runs it.
//!
//! `vireo-vmm` is a thin shell around this library; tests build machines with it in-process.
//! Threads: one for each vCPU, and the event loop ([`machine::Machine::run`]) for everything
//! else. Data goes one way: guest → vCPU exit → [`bus`] → device → [`chardev::Port`] or
//! [`devices::Requests`] → event loop.

#![deny(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

pub mod acpi;
pub mod bus;
pub mod chardev;
pub mod control;
pub mod devices;
pub mod firmware;
pub mod gdb;
pub mod killpoint;
pub mod layout;
mod leisurely;
pub mod loader;
mod logger;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod notices;
pub mod num;
pub mod pci;
pub mod program;
pub mod ram;
pub mod resource;
pub mod state;
pub mod storage;
#[cfg(test)]
mod testing;
pub mod vcpu;
