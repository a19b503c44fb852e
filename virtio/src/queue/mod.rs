//! The split virtqueue (2.7), device's side.
//!
//! One thread owns a [`Queue`]. It pops chains until there are none, pushes what is done, and
//! [`Queue::publish`]es a batch at once, which says whether the driver wants an interrupt:
//!
//! ```text
//! loop {
//!     queue.disable_notifications();
//!     while queue.pop(&mut chain)? { ...; queue.push(&chain, written); }
//!     if queue.publish() { interrupt.queue(index); }
//!     if !queue.enable_notifications()? { break }      // else: more came meanwhile
//! }
//! ```
//!
//! The driver is hostile. What it can put in memory ends in a [`QueueError`], upon which the device
//! calls [`crate::Interrupt::needs_reset`]; the queue then gives nothing out and writes nothing
//! any more.

mod chain;
mod ring;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

pub use chain::{Buffers, Chain, Segment};
use ring::{Area, DESCRIPTOR_LEN, Descriptor, INDIRECT, NEXT, WRITE};

use crate::device::QueueSetup;
use crate::feature;
use crate::memory::{GuestMemory, OutsideRam};

/// Most descriptors an indirect table may have; drivers may use no more than the queue's size
/// (2.7.5.3.1), which is at most this.
pub const INDIRECT_MAX: u64 = 1024;

/// The driver wants no interrupts (available ring) or the device no notifications (used ring).
const SUPPRESS: u16 = 1;
/// Bytes of a ring before its entries: flags and index.
const RING_HEAD: u64 = 4;
const INDEX: u64 = 2;

/// What a driver did wrong with its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Size 0, not a power of two, or beyond 32768.
    #[error("queue of {0} entries")]
    Size(u16),
    /// A ring or a buffer is not in RAM.
    #[error("{what}: {source}")]
    Outside {
        /// Which.
        what: &'static str,
        /// Where.
        source: OutsideRam,
    },
    /// A ring at an odd address (2.7).
    #[error("{what} at {address:#x} is not aligned")]
    Misaligned {
        /// Which.
        what: &'static str,
        /// Guest-physical.
        address: u64,
    },
    /// More buffers given to the device than the queue has entries.
    #[error("available index {available} runs away from {next}, given back so far")]
    RanAway {
        /// What the driver wrote.
        available: u16,
        /// Buffers the device has given back.
        next: u16,
    },
    /// A descriptor's number is beyond its table.
    #[error("descriptor {index} of {count}")]
    Index {
        /// The number.
        index: u16,
        /// The table's length.
        count: u16,
    },
    /// A chain has more descriptors than its table: it goes round in circles.
    #[error("descriptor chain from {head} doesn't end")]
    Loop {
        /// First descriptor.
        head: u16,
    },
    /// A readable descriptor after a writable one (2.7.4.2).
    #[error("descriptor chain from {head} has a readable part after a writable one")]
    Order {
        /// First descriptor.
        head: u16,
    },
    /// A chain of 4 GiB or more in one direction.
    #[error("descriptor chain from {head} is too long")]
    Length {
        /// First descriptor.
        head: u16,
    },
    /// An indirect table inside another, with a `next`, of an odd length, or not negotiated
    /// (2.7.5.3.1).
    #[error("descriptor chain from {head} has a bad indirect table: {reason}")]
    Indirect {
        /// First descriptor.
        head: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// A split virtqueue. See the module's text for its use.
#[derive(Debug)]
pub struct Queue {
    memory: Arc<dyn GuestMemory>,
    setup: QueueSetup,
    descriptors: Area,
    driver: Area,
    device: Area,
    indirect: bool,
    event_idx: bool,
    /// The driver's index as last read.
    available: u16,
    next_available: u16,
    next_used: u16,
    /// The used index the driver can see.
    published: u16,
    /// What the used ring's flags hold (without `EVENT_IDX`).
    suppressed: bool,
    broken: bool,
}

// SAFETY: the areas point into memory that `memory` keeps mapped, on whatever thread.
unsafe impl Send for Queue {}

impl Queue {
    /// A queue as the driver set it up, going on where `setup` says.
    ///
    /// # Errors
    /// A bad size, rings outside RAM or not aligned.
    pub fn new(
        memory: &Arc<dyn GuestMemory>,
        setup: &QueueSetup,
        features: u64,
    ) -> Result<Self, QueueError> {
        if !setup.size.is_power_of_two() {
            return Err(QueueError::Size(setup.size));
        }
        let size = u64::from(setup.size);
        let event_idx = features & feature::EVENT_IDX != 0;
        let tail = if event_idx { 2 } else { 0 };
        let area = |what, address, len, align| Area::new(&**memory, what, address, len, align);
        let (descriptors, driver, device) = (setup.descriptors, setup.driver, setup.device);
        Ok(Self {
            descriptors: area("descriptor table", descriptors, size * DESCRIPTOR_LEN, 16)?,
            driver: area("available ring", driver, RING_HEAD + 2 * size + tail, 2)?,
            device: area("used ring", device, RING_HEAD + 8 * size + tail, 4)?,
            memory: Arc::clone(memory),
            setup: *setup,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx,
            available: setup.next_available,
            next_available: setup.next_available,
            next_used: setup.next_used,
            published: setup.next_used,
            suppressed: false,
            broken: false,
        })
    }

    /// How the driver set it up, with the indices where the device is now: what to save.
    #[must_use]
    pub fn setup(&self) -> QueueSetup {
        QueueSetup {
            next_available: self.next_available,
            next_used: self.published,
            ..self.setup
        }
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// An empty chain to pop into.
    #[must_use]
    pub fn chain(&self) -> Chain {
        Chain::new(Arc::clone(&self.memory))
    }

    /// The driver broke it: nothing comes out and nothing is written any more.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Chains popped and not yet pushed back, modulo 65536.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.next_available.wrapping_sub(self.next_used)
    }

    fn broke<T>(&mut self, error: QueueError) -> Result<T, QueueError> {
        self.broken = true;
        self.report_elements();
        Err(error)
    }

    /// Whether the driver has more; reads its index only when the last one read is used up.
    ///
    /// # Errors
    /// [`QueueError::RanAway`].
    pub fn has_available(&mut self) -> Result<bool, QueueError> {
        if self.broken {
            return Ok(false);
        }
        if self.available == self.next_available {
            // Acquire: the ring's entries and descriptors are read after the index that covers
            // them (2.7.13.1).
            self.available = self.driver.load(INDEX, Ordering::Acquire);
            // What the device has popped and not given back counts too: a driver has no more than
            // its queue's entries out, and can't make the device keep more.
            let out = self.available.wrapping_sub(self.next_used);
            if out > self.setup.size || out < self.in_flight() {
                return self.broke(QueueError::RanAway {
                    available: self.available,
                    next: self.next_used,
                });
            }
        }
        Ok(self.available != self.next_available)
    }

    /// Takes the next chain into `chain`; `false` if there is none.
    ///
    /// # Errors
    /// What the driver did wrong. The queue is broken then.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if !self.has_available()? {
            return Ok(false);
        }
        let slot = self.next_available & (self.setup.size - 1);
        let head = self
            .driver
            .load(RING_HEAD + 2 * u64::from(slot), Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        self.pop_head(head, chain)?;
        Ok(true)
    }

    /// Puts the chain popped last back, to be popped again later: nothing of it may have been used.
    pub fn undo_pop(&mut self) {
        if !self.broken {
            self.next_available = self.next_available.wrapping_sub(1);
        }
    }

    /// Reads the chain from descriptor `head` again: for one that was popped before the device was
    /// saved, and is in flight still.
    ///
    /// # Errors
    /// As `pop`.
    pub fn pop_head(&mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        match self.walk(head, chain) {
            Ok(()) => Ok(()),
            Err(error) => self.broke(error),
        }
    }

    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        let (mut index, mut left) = (head, self.setup.size);
        loop {
            if index >= self.setup.size {
                return Err(QueueError::Index {
                    index,
                    count: self.setup.size,
                });
            }
            let descriptor = self.descriptors.descriptor(index);
            if descriptor.flags & INDIRECT != 0 {
                return self.walk_indirect(&descriptor, chain);
            }
            self.add(&descriptor, chain)?;
            left -= 1;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            if left == 0 {
                return Err(QueueError::Loop { head });
            }
            index = descriptor.next;
        }
    }

    fn walk_indirect(&self, table: &Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        let head = chain.head;
        let bad = |reason| Err(QueueError::Indirect { head, reason });
        let len = u64::from(table.len);
        if !self.indirect {
            return bad("not negotiated");
        }
        if table.flags & NEXT != 0 {
            return bad("it has a next one");
        }
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_LEN) || len > INDIRECT_MAX * DESCRIPTOR_LEN {
            return bad("its length");
        }
        let base = self
            .memory
            .host(table.address, len)
            .map_err(|source| QueueError::Outside {
                what: "indirect table",
                source,
            })?;
        let count = (len / DESCRIPTOR_LEN) as u16;
        let (mut index, mut left) = (0, count);
        loop {
            if index >= count {
                return Err(QueueError::Index { index, count });
            }
            // SAFETY: the whole table is RAM, and `index` is inside it.
            let descriptor =
                unsafe { Descriptor::read(base.add(usize::from(index) * DESCRIPTOR_LEN as usize)) };
            if descriptor.flags & INDIRECT != 0 {
                return bad("it is inside another");
            }
            self.add(&descriptor, chain)?;
            left -= 1;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            if left == 0 {
                return Err(QueueError::Loop { head });
            }
            index = descriptor.next;
        }
    }

    fn add(&self, descriptor: &Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        let head = chain.head;
        let writable = descriptor.flags & WRITE != 0;
        if !writable && !chain.writable.is_empty() {
            return Err(QueueError::Order { head });
        }
        let pointer = match self
            .memory
            .host(descriptor.address, u64::from(descriptor.len))
        {
            Ok(pointer) => pointer,
            // No byte of it is ever touched.
            Err(_) if descriptor.len == 0 => std::ptr::null_mut(),
            Err(source) => {
                return Err(QueueError::Outside {
                    what: "buffer",
                    source,
                });
            }
        };
        let segment = Segment {
            address: descriptor.address,
            pointer,
            len: descriptor.len,
        };
        let part = if writable {
            &mut chain.writable
        } else {
            &mut chain.readable
        };
        if part.push(segment) {
            Ok(())
        } else {
            Err(QueueError::Length { head })
        }
    }

    /// Gives a chain back, its first `written` writable bytes written. The driver sees it at the
    /// next [`Self::publish`].
    pub fn push(&mut self, chain: &Chain, written: u32) {
        if self.broken {
            return;
        }
        for segment in chain.writable.slice(0, written) {
            self.memory.wrote(segment.address, u64::from(segment.len));
        }
        let slot = u64::from(self.next_used & (self.setup.size - 1));
        self.device
            .store_element(RING_HEAD + 8 * slot, u32::from(chain.head), written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Tells the memory of the used elements written since the last `publish`.
    fn report_elements(&self) {
        let (old, new) = (self.published, self.next_used);
        let size = self.setup.size;
        let (first, last) = (old & (size - 1), new.wrapping_sub(1) & (size - 1));
        if old == new {
            return;
        }
        let spans = if first <= last && new.wrapping_sub(old) <= size {
            [(first, last), (1, 0)]
        } else {
            [(first, size - 1), (0, last)]
        };
        for (first, last) in spans {
            if first <= last {
                self.memory.wrote(
                    self.device.address + RING_HEAD + 8 * u64::from(first),
                    8 * (u64::from(last - first) + 1),
                );
            }
        }
    }

    /// Shows the driver everything pushed so far; whether it wants an interrupt for that.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        if self.broken || self.next_used == self.published {
            return false;
        }
        self.report_elements();
        let (old, new) = (self.published, self.next_used);
        // Release: elements and buffers are there before the index that covers them (2.7.8.2).
        self.device.store(INDEX, new, Ordering::Release);
        self.memory.wrote(self.device.address + INDEX, 2);
        self.published = new;
        // The index is out before the driver's wish is read; the driver writes its wish before it
        // reads the index (2.7.7.2).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.driver.load(
                RING_HEAD + 2 * u64::from(self.setup.size),
                Ordering::Relaxed,
            );
            need_event(event, new, old)
        } else {
            self.driver.load(0, Ordering::Relaxed) & SUPPRESS == 0
        }
    }

    /// The device is about to look at the queue anyway: the driver need not notify (2.7.10).
    /// With `EVENT_IDX` this costs nothing: the event index stays behind.
    pub fn disable_notifications(&mut self) {
        if !self.event_idx && !self.suppressed && !self.broken {
            self.set_flags(true);
        }
    }

    /// The device is about to sleep: the driver is to notify from now on. `true` if buffers came
    /// meanwhile: then look again first.
    ///
    /// # Errors
    /// As `pop`.
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        if self.broken {
            return Ok(false);
        }
        if self.event_idx {
            let offset = RING_HEAD + 8 * u64::from(self.setup.size);
            self.device
                .store(offset, self.next_available, Ordering::Relaxed);
            self.memory.wrote(self.device.address + offset, 2);
        } else if self.suppressed {
            self.set_flags(false);
        }
        // The wish is out before the index is read again; the driver writes the index before it
        // reads the wish.
        fence(Ordering::SeqCst);
        self.has_available()
    }

    fn set_flags(&mut self, suppressed: bool) {
        let flags = if suppressed { SUPPRESS } else { 0 };
        self.device.store(0, flags, Ordering::Relaxed);
        self.memory.wrote(self.device.address, 2);
        self.suppressed = suppressed;
    }
}

/// Whether going from `old` to `new` passes `event` (2.7.7.2).
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
