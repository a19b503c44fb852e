//! The three areas of a split virtqueue as raw memory that the driver changes at any time.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::QueueError;
use crate::memory::GuestMemory;

/// A buffer goes on in another descriptor.
pub(super) const NEXT: u16 = 1;
/// The device writes it.
pub(super) const WRITE: u16 = 2;
/// It is a table of descriptors.
pub(super) const INDIRECT: u16 = 4;

/// Bytes of one descriptor.
pub(super) const DESCRIPTOR_LEN: u64 = 16;

/// One descriptor, copied out of guest memory (2.7.5).
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// An area of guest RAM, aligned, inside host memory as long as its `GuestMemory` lives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Area {
    /// Guest-physical address.
    pub address: u64,
    base: *mut u8,
    len: u64,
}

impl Area {
    /// `what` is its name in the error.
    pub(super) fn new(
        memory: &dyn GuestMemory,
        what: &'static str,
        address: u64,
        len: u64,
        align: u64,
    ) -> Result<Self, QueueError> {
        if !address.is_multiple_of(align) {
            return Err(QueueError::Misaligned { what, address });
        }
        let base = memory
            .host(address, len)
            .map_err(|source| QueueError::Outside { what, source })?;
        // Guest pages are host pages, so alignment carries over; a memory that breaks this would
        // make the atomic accesses below undefined.
        if !(base.addr() as u64).is_multiple_of(align) {
            return Err(QueueError::Misaligned { what, address });
        }
        Ok(Self { address, base, len })
    }

    fn at(&self, offset: u64, size: u64) -> *mut u8 {
        assert!(
            offset + size <= self.len && offset.is_multiple_of(size),
            "{offset:#x} in a ring of {:#x} bytes",
            self.len
        );
        // SAFETY: just checked to lie in the area, which is one piece of mapped memory.
        unsafe { self.base.add(offset as usize) }
    }

    fn half(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: `at` has checked bounds; the area's base is aligned to 2 or more and so is
        // `offset`; guest memory is only ever reached atomically or by volatile copies.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    pub(super) fn load(&self, offset: u64, order: Ordering) -> u16 {
        u16::from_le(self.half(offset).load(order))
    }

    pub(super) fn store(&self, offset: u64, value: u16, order: Ordering) {
        self.half(offset).store(value.to_le(), order);
    }

    /// Writes a used element: `id` and `len` (2.7.8).
    pub(super) fn store_element(&self, offset: u64, id: u32, len: u32) {
        for (offset, value) in [(offset, id), (offset + 4, len)] {
            // SAFETY: as in `half`; the used ring is aligned to 4 and `offset` too (`at`).
            let word = unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) };
            word.store(value.to_le(), Ordering::Relaxed);
        }
    }

    /// Copies descriptor `index` out of a table aligned to 16.
    pub(super) fn descriptor(&self, index: u16) -> Descriptor {
        let offset = u64::from(index) * DESCRIPTOR_LEN;
        let word = |offset| {
            // SAFETY: as in `half`; the table is aligned to 16.
            let word = unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) };
            u64::from_le(word.load(Ordering::Relaxed))
        };
        Descriptor::from_words(word(offset), word(offset + 8))
    }
}

impl Descriptor {
    /// From its two little-endian words.
    fn from_words(address: u64, rest: u64) -> Self {
        Self {
            address,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    /// Copies a descriptor from `pointer`, of any alignment.
    ///
    /// # Safety
    /// 16 bytes from `pointer` are mapped.
    pub(super) unsafe fn read(pointer: *const u8) -> Self {
        // SAFETY: the caller's promise; volatile because the driver may write at the same time,
        // and whatever mixture is read is checked afterwards.
        let bytes = unsafe { pointer.cast::<[[u8; 8]; 2]>().read_volatile() };
        Self::from_words(u64::from_le_bytes(bytes[0]), u64::from_le_bytes(bytes[1]))
    }
}
