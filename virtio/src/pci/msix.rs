//! MSI-X (PCI Express Base Specification 5.0, 6.1.4 and 7.7.2).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::MsiSink;
use super::config::Config;
use crate::device::DeviceError;

/// "No vector", as virtio writes it (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

pub(super) const CAPABILITY: u8 = 0x11;
/// Bytes of a table entry.
pub(super) const ENTRY_LEN: u32 = 16;
/// An entry's control word: masked.
const MASKED: u32 = 1;
/// Message control's bits.
const ENABLE: u16 = 1 << 15;
pub(super) const FUNCTION_MASK: u16 = 1 << 14;

/// One vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

const FRESH: Entry = Entry {
    address: 0,
    data: 0,
    control: MASKED,
    pending: false,
};

#[derive(Debug)]
struct State {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
}

/// What the guest has put into the table, and what is pending.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    entries: Vec<Entry>,
}

/// A function's MSI-X table.
#[derive(Debug)]
pub struct Msix {
    sink: Arc<dyn MsiSink>,
    enabled: AtomicBool,
    state: Mutex<State>,
}

impl Msix {
    /// A table of `vectors` (1 to 2048) vectors.
    #[must_use]
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Self {
        Self {
            sink,
            enabled: AtomicBool::new(false),
            state: Mutex::new(State {
                entries: vec![FRESH; usize::from(vectors.clamp(1, 2048))],
                enabled: false,
                masked: false,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.lock().entries.len() as u16
    }

    /// Adds the capability; table and pending bits lie in `bar` at these offsets (multiples of 8).
    #[must_use]
    pub(super) fn add_capability(
        &self,
        config: &mut Config,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Option<u16> {
        let mut body = (self.vectors() - 1).to_le_bytes().to_vec();
        body.extend((table | u32::from(bar)).to_le_bytes());
        body.extend((pending | u32::from(bar)).to_le_bytes());
        let offset = config.add_capability(CAPABILITY, &body)?;
        config.allow16(offset + 2, ENABLE | FUNCTION_MASK);
        Some(offset)
    }

    /// The guest has switched it on: the pin is not used then.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Sends vector `vector`, or keeps it pending where it is masked; nothing where MSI-X is off
    /// or there is no such vector.
    pub fn notify(&self, vector: u16) {
        let mut state = self.lock();
        if !state.enabled {
            return;
        }
        let masked = state.masked;
        let Some(entry) = state.entries.get_mut(usize::from(vector)) else {
            return;
        };
        if masked || entry.control & MASKED != 0 {
            entry.pending = true;
            return;
        }
        let (address, data) = (entry.address, entry.data);
        drop(state);
        self.sink.send(address, data);
    }

    /// Message control was written.
    pub(super) fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.enabled = control & ENABLE != 0;
        state.masked = control & FUNCTION_MASK != 0;
        self.enabled.store(state.enabled, Ordering::Release);
        self.send_pending(state);
    }

    fn send_pending(&self, mut state: MutexGuard<'_, State>) {
        if !state.enabled || state.masked {
            return;
        }
        let mut due = Vec::new();
        for entry in &mut state.entries {
            if entry.pending && entry.control & MASKED == 0 {
                entry.pending = false;
                due.push((entry.address, entry.data));
            }
        }
        drop(state);
        for (address, data) in due {
            self.sink.send(address, data);
        }
    }

    /// Reads the table.
    pub(super) fn read_table(&self, offset: u32, width: u8) -> u32 {
        let state = self.lock();
        let Some(entry) = state.entries.get((offset / ENTRY_LEN) as usize) else {
            return 0;
        };
        let value = match offset % ENTRY_LEN / 4 {
            0 => entry.address as u32,
            1 => (entry.address >> 32) as u32,
            2 => entry.data,
            _ => entry.control,
        };
        super::cut(u64::from(value), offset % 4, width)
    }

    /// Writes the table. Accesses narrower than 4 bytes, which software doesn't make (6.1.4.2),
    /// change the bytes they name.
    pub(super) fn write_table(&self, offset: u32, width: u8, value: u32) {
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut((offset / ENTRY_LEN) as usize) else {
            return;
        };
        let shift = 8 * (offset % 4);
        let bits = super::mask(width) << shift;
        let merge = |old: u32| old & !bits | (value << shift) & bits;
        match offset % ENTRY_LEN / 4 {
            0 => {
                // Messages are aligned to 4.
                let low = merge(entry.address as u32) & !3;
                entry.address = entry.address & !0xffff_ffff | u64::from(low);
            }
            1 => {
                let high = merge((entry.address >> 32) as u32);
                entry.address = entry.address & 0xffff_ffff | u64::from(high) << 32;
            }
            2 => entry.data = merge(entry.data),
            _ => entry.control = merge(entry.control) & MASKED,
        }
        self.send_pending(state);
    }

    /// Reads the pending bits.
    pub(super) fn read_pending(&self, offset: u32, width: u8) -> u32 {
        let state = self.lock();
        let first = offset as usize * 8;
        (0..usize::from(width) * 8)
            .filter(|bit| state.entries.get(first + bit).is_some_and(|e| e.pending))
            .fold(0, |value, bit| value | 1 << bit)
    }

    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.entries.fill(FRESH);
        (state.enabled, state.masked) = (false, false);
        self.enabled.store(false, Ordering::Release);
    }

    pub(super) fn save(&self) -> Saved {
        Saved {
            entries: self.lock().entries.clone(),
        }
    }

    pub(super) fn load(&self, saved: &Saved, kind: &'static str) -> Result<(), DeviceError> {
        let mut state = self.lock();
        if saved.entries.len() != state.entries.len() {
            return Err(DeviceError::State {
                kind,
                reason: format!("{} MSI-X vectors", saved.entries.len()),
            });
        }
        state.entries.clone_from(&saved.entries);
        Ok(())
    }
}
