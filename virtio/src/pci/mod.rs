//! PCI functions, and virtio's PCI transport (4.1).
//!
//! # How a VMM plugs a function in
//!
//! Every function is an `Arc<dyn Function>` made with a [`Host`]: what it needs of the machine,
//! one set of trait objects per function, so that they know whose they are.
//!
//! - **Configuration space.** The VMM decodes ECAM or 0xcf8/0xcfc to (bus, device, function,
//!   register) and calls [`Function::read_config`] / [`Function::write_config`] with accesses of
//!   1, 2 or 4 bytes, aligned to their size. Where no function is, reads give all ones.
//!   Behind a root port: the port whose [`RootPort::secondary`] is the bus asked for has the one
//!   function (device 0) that is plugged into it. Bridge windows are kept as the guest programs
//!   them, but don't filter: BARs answer where they lie.
//! - **BARs.** When the guest moves a BAR, or switches memory decoding, the function calls
//!   [`BarMapper`]; the VMM then has its bus send accesses in that range to
//!   [`Function::read_bar`] / [`Function::write_bar`]: 1, 2 or 4 bytes, aligned. A guest can put a
//!   BAR anywhere, over RAM and other devices too: who wins there is the VMM's choice. A VMM that starts
//!   without firmware may place BARs itself by writing the registers as firmware would, or leave
//!   it to the guest.
//! - **Locks.** [`BarMapper`], [`IntxLine`], [`MsiSink`] and [`Doorbells`] are called with a lock
//!   of the function held, from vCPU threads (within `write_config`, `write_bar`) and, `MsiSink`
//!   and `IntxLine`, from device threads. They never call into a function, and the VMM holds no
//!   lock that they take while it calls into a function: a bus finds its target, lets its lock go,
//!   and calls.
//! - **Doorbells.** A virtio function registers one eventfd per queue at the queue's notify address
//!   (writes of 2 bytes, any value). A VMM without ioeventfds returns an error from
//!   [`Doorbells::register`]: the write then comes by `write_bar` and does the same.
//! - **Interrupts.** MSI-X goes to [`MsiSink`]; the pin, where MSI-X is off, to [`IntxLine`]
//!   (level-triggered, active as long as `set(true)` was last).
//! - **Running devices.** What the VMM changes while the guest runs (a disk's size, a link's state) goes
//!   by the handle that a device's constructor gives out, not by the function.
//! - **Bus mastering.** A virtio device runs only while Bus Master Enable is set; messages wait too.
//! - **Life cycle.** Machine reset: vCPUs stopped, then [`Function::reset`] each (BARs are unmapped
//!   by it). Pause: vCPUs stopped, then `pause` each; resume: `resume` each, then vCPUs. `save`
//!   only while paused; `load` into a function made from the same configuration, never run, then
//!   `resume`. `load` maps BARs and registers doorbells again. Dropping a function resets it:
//!   its BARs are unmapped, its doorbells unregistered.
//!
//! A VMM's own functions build on [`Core`] (configuration space, BARs, MSI-X, pin, saved state);
//! one that has nothing but its header, as a host bridge, is a [`Passive`].

mod capability;
mod config;
mod core;
mod msix;
mod passive;
mod root_port;
mod virtio;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use self::core::{Core, Event, Saved as SavedCore};
pub use capability::Express;
pub use config::{BarKind, Config, Ids, Saved as SavedConfig};
pub use msix::{Msix, NO_VECTOR};
pub use passive::Passive;
pub use root_port::{RootPort, SlotHost};
pub use virtio::VirtioPci;

use crate::device::{DeviceError, Payload};

/// A PCI function. See the module's text for who calls what.
pub trait Function: Send + Sync + fmt::Debug {
    /// Reads `width` (1, 2, 4) bytes of configuration space at `offset` (aligned, below 4096).
    fn read_config(&self, offset: u16, width: u8) -> u32;

    /// Writes them; bits of `value` above the width are ignored.
    fn write_config(&self, offset: u16, width: u8, value: u32);

    /// Reads `width` (1, 2, 4) bytes of a BAR at `offset` (aligned, inside the BAR).
    fn read_bar(&self, bar: u8, offset: u32, width: u8) -> u32;

    /// Writes them.
    fn write_bar(&self, bar: u8, offset: u32, width: u8, value: u32);

    /// As after power-on. In any state; returns when nothing of it touches guest memory.
    fn reset(&self);

    /// See [`crate::Device`].
    fn pause(&self) {}

    /// See [`crate::Device`].
    fn resume(&self) {}

    /// The function's whole state, its device's included.
    ///
    /// # Errors
    /// A value that can't be written down.
    fn save(&self) -> Result<Payload, DeviceError>;

    /// Takes over a saved state; it is paused then.
    ///
    /// # Errors
    /// [`DeviceError::State`] for one that isn't this function's; the host's refusal.
    fn load(&self, payload: &Payload) -> Result<(), DeviceError>;
}

/// Where message-signalled interrupts go.
pub trait MsiSink: Send + Sync + fmt::Debug {
    /// Delivers the message now. A failure is the sink's to log.
    fn send(&self, address: u64, data: u32);
}

/// A function's interrupt pin.
pub trait IntxLine: Send + Sync + fmt::Debug {
    /// The pin is asserted or not. Called on changes only.
    fn set(&self, asserted: bool);
}

/// Where a function's BARs appear.
pub trait BarMapper: Send + Sync + fmt::Debug {
    /// BAR `bar` answers at guest-physical `address ..+ len` from now on. It was unmapped before.
    fn map(&self, bar: u8, address: u64, len: u64);

    /// It answers no more.
    fn unmap(&self, bar: u8);
}

/// Notify addresses served without leaving the hypervisor.
pub trait Doorbells: Send + Sync + fmt::Debug {
    /// A 2-byte write to guest-physical `address`, of any value, signals `fd` from now on.
    ///
    /// # Errors
    /// The hypervisor can't: the write reaches the function as any other then.
    fn register(&self, fd: BorrowedFd<'_>, address: u64) -> io::Result<()>;

    /// Undoes `register`, with the same arguments.
    fn unregister(&self, fd: BorrowedFd<'_>, address: u64);
}

/// What a function needs of the machine.
#[derive(Debug, Clone)]
pub struct Host {
    /// For MSI-X.
    pub msi: Arc<dyn MsiSink>,
    /// For the pin.
    pub intx: Arc<dyn IntxLine>,
    /// For BARs.
    pub bars: Arc<dyn BarMapper>,
    /// For notify addresses.
    pub doorbells: Arc<dyn Doorbells>,
}

/// Cuts a register's value out: the `width` bytes at `offset` of a value that starts at 0.
pub(crate) fn cut(value: u64, offset: u32, width: u8) -> u32 {
    let value = value.checked_shr(8 * offset).unwrap_or(0) as u32;
    value & mask(width)
}

/// All ones in `width` (1, 2, 4) bytes.
pub(crate) fn mask(width: u8) -> u32 {
    u32::MAX >> (32 - 8 * u32::from(width.clamp(1, 4)))
}
