//! Guest-physical memory: slots of host memory, dirty pages, and which pages hold code.
//!
//! Guest RAM is shared with every vCPU thread and device thread and changes at any time, so
//! it is only ever touched through raw pointers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Page size in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Mask of an offset in a page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

/// What is wrong with a slot.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not aligned to 4 KiB, empty, or past the physical address space.
    #[error("memory slot {id} ({gpa:#x}, {len:#x} bytes) is not made of whole pages")]
    Unaligned {
        /// Slot number.
        id: u32,
        /// Guest-physical start.
        gpa: u64,
        /// Length.
        len: u64,
    },
    /// Covers part of another slot.
    #[error("memory slot {id} overlaps slot {other}")]
    Overlap {
        /// The new slot.
        id: u32,
        /// The one already there.
        other: u32,
    },
    /// No such slot.
    #[error("there is no memory slot {0}")]
    NoSlot(u32),
}

/// One range of guest-physical memory backed by host memory.
#[derive(Debug)]
pub struct Slot {
    /// Slot number.
    pub id: u32,
    /// Guest-physical start.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Host address of the first byte.
    pub host: *mut u8,
    /// Guest writes go to the bus.
    pub readonly: bool,
    /// Written pages since the last `dirty_log`, where recorded.
    pub dirty: Option<Box<[AtomicU64]>>,
    /// For each page, which of its 64-byte chunks some vCPU has decoded code from.
    pub code: Arc<Box<[AtomicU64]>>,
}

// SAFETY: `host` points to memory that stays mapped while the slot exists (the contract of
// `Memory::map`) and is only accessed through raw pointers.
unsafe impl Send for Slot {}
// SAFETY: as above; everything else in it is atomic or constant.
unsafe impl Sync for Slot {}

impl Slot {
    /// Marks the page of `gpa` (inside this slot) written.
    #[inline]
    pub fn mark_dirty(&self, gpa: u64) {
        if let Some(dirty) = &self.dirty {
            let page = (gpa - self.gpa) >> PAGE_SHIFT;
            if let Some(word) = dirty.get((page / 64) as usize) {
                word.fetch_or(1 << (page % 64), Ordering::Relaxed);
            }
        }
    }

    /// The code chunks of the page of `gpa` (inside this slot).
    #[inline]
    pub fn code_map(&self, gpa: u64) -> &AtomicU64 {
        &self.code[((gpa - self.gpa) >> PAGE_SHIFT) as usize]
    }
}

/// The slots at one moment. vCPUs hold on to one and are told when there is a newer one.
#[derive(Debug, Default)]
pub struct Slots {
    /// Slots that didn't change keep their maps through `Arc`.
    shared: Vec<Arc<Slot>>,
}

impl Slots {
    /// The slot that holds `gpa`.
    #[inline]
    pub fn find(&self, gpa: u64) -> Option<&Slot> {
        self.shared
            .iter()
            .find(|s| gpa.wrapping_sub(s.gpa) < s.len)
            .map(|s| &**s)
    }

    /// Host address of `gpa`, whether the guest may write it or not.
    #[inline]
    pub fn host(&self, gpa: u64) -> Option<*mut u8> {
        let slot = self.find(gpa)?;
        // SAFETY: `find` returned the slot that contains gpa, so the offset is inside it.
        Some(unsafe { slot.host.add((gpa - slot.gpa) as usize) })
    }
}

fn zeros(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

/// All guest-physical memory of a machine.
#[derive(Debug, Default)]
pub struct Memory {
    current: RwLock<Arc<Slots>>,
}

impl Memory {
    fn lock_read(&self) -> Arc<Slots> {
        match self.current.read() {
            Ok(guard) => guard.clone(),
            Err(poisoned) => poisoned.into_inner().clone(),
        }
    }

    /// The slots now.
    pub fn snapshot(&self) -> Arc<Slots> {
        self.lock_read()
    }

    fn replace(
        &self,
        change: impl FnOnce(&mut Vec<Arc<Slot>>) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut guard = match self.current.write() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        };
        let mut shared = guard.shared.clone();
        change(&mut shared)?;
        *guard = Arc::new(Slots { shared });
        Ok(())
    }

    /// Adds a slot, or replaces the one with the same number.
    ///
    /// # Safety
    /// `host .. host + len` stays mapped, readable and writable until every vCPU has let go of
    /// the slot, and is never the target of a Rust reference.
    pub unsafe fn map(
        &self,
        id: u32,
        gpa: u64,
        len: u64,
        host: *mut u8,
        readonly: bool,
        log_dirty: bool,
    ) -> Result<(), MemoryError> {
        let end = gpa.checked_add(len);
        if len == 0
            || (gpa | len | host as u64) & PAGE_MASK != 0
            || end.is_none_or(|end| end > 1 << 52)
        {
            return Err(MemoryError::Unaligned { id, gpa, len });
        }
        self.replace(|slots| {
            slots.retain(|s| s.id != id);
            if let Some(other) = slots
                .iter()
                .find(|s| s.gpa < gpa + len && gpa < s.gpa + s.len)
            {
                return Err(MemoryError::Overlap {
                    id,
                    other: other.id,
                });
            }
            let pages = (len >> PAGE_SHIFT) as usize;
            slots.push(Arc::new(Slot {
                id,
                gpa,
                len,
                host,
                readonly,
                dirty: log_dirty.then(|| zeros(pages.div_ceil(64))),
                code: zeros(pages).into(),
            }));
            // The largest first: nearly every access is to main memory.
            slots.sort_by_key(|s| std::cmp::Reverse(s.len));
            Ok(())
        })
    }

    /// Begins to record writes to a slot anew, or ends; everything else about it stays.
    pub fn log_writes(&self, id: u32, on: bool) -> Result<(), MemoryError> {
        self.replace(|slots| {
            let slot = slots.iter_mut().find(|slot| slot.id == id);
            let slot = slot.ok_or(MemoryError::NoSlot(id))?;
            let pages = (slot.len >> PAGE_SHIFT) as usize;
            *slot = Arc::new(Slot {
                dirty: on.then(|| zeros(pages.div_ceil(64))),
                code: slot.code.clone(),
                ..**slot
            });
            Ok(())
        })
    }

    /// Takes a slot away.
    pub fn unmap(&self, id: u32) -> Result<(), MemoryError> {
        self.replace(|slots| {
            let before = slots.len();
            slots.retain(|s| s.id != id);
            if slots.len() == before {
                return Err(MemoryError::NoSlot(id));
            }
            Ok(())
        })
    }

    /// Pages of slot `id` written since the last call, one bit a page, and clears them. Empty
    /// where the slot doesn't record them.
    pub fn take_dirty(&self, id: u32) -> Result<Vec<u64>, MemoryError> {
        let slots = self.lock_read();
        let slot = slots
            .shared
            .iter()
            .find(|s| s.id == id)
            .ok_or(MemoryError::NoSlot(id))?;
        Ok(slot
            .dirty
            .iter()
            .flatten()
            .map(|word| word.swap(0, Ordering::AcqRel))
            .collect())
    }

    /// Copies out of RAM at `gpa`; `false` if any byte of it is not RAM.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let slots = self.lock_read();
        let Some(slot) = slots.find(gpa) else {
            return data.is_empty();
        };
        let offset = gpa - slot.gpa;
        if slot.len - offset < data.len() as u64 {
            return false;
        }
        // SAFETY: the range was just checked to be inside the slot's mapping.
        unsafe {
            std::ptr::copy_nonoverlapping(
                slot.host.add(offset as usize),
                data.as_mut_ptr(),
                data.len(),
            );
        }
        true
    }

    /// Copies into RAM at `gpa` and marks it dirty; `false` if any byte of it is not writable
    /// RAM. Not for memory that may hold code a vCPU has already run.
    pub fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let slots = self.lock_read();
        let Some(slot) = slots.find(gpa) else {
            return data.is_empty();
        };
        let offset = gpa - slot.gpa;
        if slot.readonly || slot.len - offset < data.len() as u64 {
            return false;
        }
        // SAFETY: the range was just checked to be inside the slot's mapping.
        unsafe {
            std::ptr::copy_nonoverlapping(
                data.as_ptr(),
                slot.host.add(offset as usize),
                data.len(),
            );
        }
        let mut page = gpa & !PAGE_MASK;
        while page < gpa + data.len() as u64 {
            slot.mark_dirty(page);
            page += PAGE_SIZE;
        }
        true
    }
}
