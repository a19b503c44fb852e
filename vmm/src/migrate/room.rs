//! Room for guest memory before it comes: where the host gives memory slowly, two threads get it in half of the time.
//!
//! One goes down from the end of what the source says it has, while whoever receives goes up from the start.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::{GuestMemory, HUGE};

/// How far memory has come.
#[derive(Debug, Default)]
pub struct Room {
    /// What is below has come, or comes just now, or nothing more is to be done.
    reached: AtomicU64,
}

impl Room {
    /// What comes next comes behind `offset` of [`GuestMemory::bytes`].
    pub fn reached(&self, offset: u64) {
        self.reached.fetch_max(offset, Ordering::Relaxed);
    }

    /// No more room is needed.
    pub fn enough(&self) {
        self.reached(u64::MAX);
    }

    /// Makes room in these ranges, from the last one's end downwards, until it comes to where memory has come.
    pub fn make(&self, memory: &GuestMemory, ranges: &[(u64, u64)]) {
        /// Whoever receives is about to get there.
        const NEAR: u64 = 4 * HUGE;
        // Other guests, and whoever receives this one, come first.
        crate::state::idle();
        for (start, len) in ranges.iter().rev() {
            let mut end = start.saturating_add(*len);
            while end > *start {
                let from = end.saturating_sub(HUGE).max(*start);
                let reached = self.reached.load(Ordering::Relaxed);
                if from < reached.saturating_add(NEAR) {
                    return;
                }
                if let Err(error) = memory.make_room(from..end) {
                    log::debug!("room for guest memory: {error}");
                    return;
                }
                end = from;
            }
        }
    }
}
