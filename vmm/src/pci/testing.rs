//! Hosts of functions that stand alone.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio::pci::{BarMapper, Doorbells, Host, IntxLine, MsiSink, SlotHost};

/// Takes everything, does nothing.
#[derive(Debug)]
pub struct Nothing;

impl MsiSink for Nothing {
    fn send(&self, _address: u64, _data: u32) {}
}

impl IntxLine for Nothing {
    fn set(&self, _asserted: bool) {}
}

impl BarMapper for Nothing {
    fn map(&self, _bar: u8, _address: u64, _len: u64) {}
    fn unmap(&self, _bar: u8) {}
}

impl Doorbells for Nothing {
    fn register(&self, _fd: BorrowedFd<'_>, _address: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn unregister(&self, _fd: BorrowedFd<'_>, _address: u64) {}
}

impl SlotHost for Nothing {
    fn powered_off(&self) {}
    fn reset_secondary(&self) {}
}

/// A host that does nothing.
pub fn host() -> Host {
    Host {
        msi: Arc::new(Nothing),
        intx: Arc::new(Nothing),
        bars: Arc::new(Nothing),
        doorbells: Arc::new(Nothing),
    }
}
