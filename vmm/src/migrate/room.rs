//! Room for guest memory before it comes: where the host gives memory slowly, two threads get it in half of the time.
//!
//! One goes down from the end of what the source says it has, while whoever receives goes up from the start.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::devices::lock;
use crate::memory::{GuestMemory, HUGE};

/// How far memory has come.
#[derive(Debug, Default)]
pub struct Room {
    /// What is below has come, or comes just now, or nothing more is to be done.
    reached: AtomicU64,
    /// Somebody makes room.
    busy: Mutex<bool>,
    ended: Condvar,
}

impl Room {
    /// What comes next comes behind `offset` of [`GuestMemory::bytes`].
    pub fn reached(&self, offset: u64) {
        self.reached.fetch_max(offset, Ordering::Relaxed);
    }

    /// Somebody will [`Room::make`] it, or does not any more.
    pub fn set_busy(&self, busy: bool) {
        *lock(&self.busy) = busy;
        self.ended.notify_all();
    }

    /// No more room is needed. Returns when nobody makes any: while the guest stands still nobody is to wait for that, nor
    /// for the locks of an address space that the host is just giving memory to.
    pub fn enough(&self) {
        self.reached(u64::MAX);
        let mut busy = lock(&self.busy);
        while *busy {
            busy = self
                .ended
                .wait(busy)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes room in these ranges, from the last one's end downwards, until it comes to where memory has come.
    pub fn make(&self, memory: &GuestMemory, ranges: &[(u64, u64)]) {
        let _busy = Busy(self);
        // Other guests, and whoever receives this one, come first.
        yield_to_others();
        let units = ranges
            .iter()
            .rev()
            .flat_map(|(start, len)| units(*start, *len));
        for (from, to) in units {
            /// Whoever receives is about to get there.
            const NEAR: u64 = 4 * HUGE;
            if from < self.reached.load(Ordering::Relaxed).saturating_add(NEAR) {
                break;
            }
            if let Err(error) = memory.make_room(from..to) {
                log::debug!("room for guest memory: {error}");
                break;
            }
        }
    }
}

/// While it lives.
struct Busy<'a>(&'a Room);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.set_busy(false);
    }
}

/// The parts of a range, from its end downwards.
fn units(start: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut end = start.saturating_add(len);
    std::iter::from_fn(move || {
        let from = end.saturating_sub(HUGE).max(start);
        let unit = (from < end).then_some((from, end));
        end = from;
        unit
    })
}

/// This thread gets less processor time than others; but some, as others may wait for it.
fn yield_to_others() {
    const NICE: i32 = 10;
    // SAFETY: no pointers. On Linux 0 is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        log::debug!("setpriority: {}", std::io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_from_the_end_down_to_where_memory_has_come() {
        let all: Vec<_> = units(HUGE, 2 * HUGE + 5).collect();
        assert_eq!(all[0], (2 * HUGE + 5, 3 * HUGE + 5));
        assert_eq!(all[2], (HUGE, HUGE + 5));
        assert_eq!(units(7, 0).count(), 0);
        let memory = GuestMemory::arriving(16 * HUGE).unwrap();
        if memory.is_file() {
            return println!("left out: needs anonymous memory");
        }
        let room = Room::default();
        room.reached(2 * HUGE);
        room.set_busy(true);
        // What is beyond RAM, or nothing, is no harm.
        room.make(
            &memory,
            &[(0, 16 * HUGE), (1 << 60, HUGE), (u64::MAX, u64::MAX)],
        );
        assert_eq!(memory.next_content(0), None);
        room.make(&memory, &[(0, 16 * HUGE), (3, 0)]);
        let found = memory.next_content(0);
        match found {
            Some(found) => assert_eq!(found, 6 * HUGE..16 * HUGE),
            None => println!("left out: needs Linux 5.14"),
        }
        room.enough();
    }
}
