//! Guest memory as devices see it.

/// Part of a range is not RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest memory {start:#x}..+{len:#x} is not RAM")]
pub struct OutsideRam {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// Guest RAM. Implemented by the VMM.
///
/// The guest's vCPUs change it at any time, so it is only ever reached through raw pointers:
/// copied out once, then checked, then used.
pub trait GuestMemory: Send + Sync + std::fmt::Debug {
    /// Host address of guest-physical `start`, if all `len` bytes from there are RAM and lie side
    /// by side in host memory; they stay mapped as long as this value lives.
    ///
    /// # Errors
    /// [`OutsideRam`].
    fn host(&self, start: u64, len: u64) -> Result<*mut u8, OutsideRam>;

    /// A device has written these bytes: dirty logs record it, and a software CPU forgets code it
    /// decoded there. To be called after the bytes are there and before the guest is told.
    fn wrote(&self, start: u64, len: u64);

    /// Gives whole 4 KiB pages inside the range back to the host: they read as zeroes from now on.
    ///
    /// # Errors
    /// [`OutsideRam`].
    fn discard(&self, start: u64, len: u64) -> Result<(), OutsideRam>;
}
