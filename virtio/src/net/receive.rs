//! Frames on their way to the guest: from the backend into receive buffers, read straight there.

use std::collections::VecDeque;
use std::time::Instant;

use super::backend::{Backend, HEADER, LONGEST_FRAME, List, MOST_BUFFERS, Trouble};
use super::filter::{Filter, LOOKED_AT};
use super::shared::Shared;
use crate::queue::{Chain, Queue, QueueError};

/// Frames taken from the backend before the thread looks after others.
const BUDGET: u32 = 256;
/// Bytes a tag and a trailer may add to an MTU.
const FRAMING: usize = 14 + 8;

/// What receiving stopped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopped {
    /// Nothing more there.
    Empty,
    /// Enough for now.
    Budget,
    /// The driver must give buffers first.
    NoBuffers,
    /// The limit is reached.
    Limit,
    /// The other end is gone.
    Gone,
}

/// The receiving half of a pair.
#[derive(Debug)]
pub(super) struct Receiver {
    pub queue: Option<Queue>,
    pub index: u16,
    mergeable: bool,
    /// Popped, not yet used; used in this order.
    held: VecDeque<Chain>,
    /// Bytes of all in `held`.
    room: usize,
    /// Chains to pop into.
    free: Vec<Chain>,
    /// What didn't fit into the held chains.
    spill: Box<[u8]>,
    /// A frame, with header, that waits for buffers.
    pending: Option<Vec<u8>>,
    list: List,
}

impl Receiver {
    pub fn new(queue: Option<Queue>, index: u16, mergeable: bool) -> Self {
        Self {
            queue,
            index,
            mergeable,
            held: VecDeque::new(),
            room: 0,
            free: Vec::new(),
            spill: vec![0; HEADER + LONGEST_FRAME + 1].into_boxed_slice(),
            pending: None,
            list: List::default(),
        }
    }

    /// Gives back the chains that were popped in advance: the queue is as if they never were.
    pub fn rest(&mut self) {
        if let Some(queue) = &mut self.queue {
            for _ in &self.held {
                queue.undo_pop();
            }
        }
        self.free.extend(self.held.drain(..));
        self.room = 0;
    }

    /// Takes chains from the driver until they have room for `wanted` bytes (or there is one, if
    /// frames aren't spread over several). `false`: there are not enough.
    fn gather(&mut self, wanted: usize) -> Result<bool, QueueError> {
        let Some(queue) = &mut self.queue else {
            return Ok(false);
        };
        while self.held.is_empty() || (self.mergeable && self.room < wanted) {
            let mut chain = self.free.pop().unwrap_or_else(|| queue.chain());
            if !queue.pop(&mut chain)? {
                self.free.push(chain);
                if !queue.enable_notifications()? {
                    return Ok(false);
                }
                continue;
            }
            self.room += chain.writable().len() as usize;
            self.held.push_back(chain);
        }
        Ok(true)
    }

    /// Lists the held chains' buffers, up to `wanted` bytes; how many bytes they have.
    fn buffers(&mut self, wanted: usize) -> usize {
        let list = &mut self.list.0;
        list.clear();
        let mut room = 0;
        for chain in &self.held {
            chain.writable().iovecs(0, u32::MAX, list);
            room += chain.writable().len() as usize;
            if room >= wanted || !self.mergeable || list.len() >= MOST_BUFFERS {
                break;
            }
        }
        // One is needed for the spill.
        for over in list.drain((MOST_BUFFERS - 1).min(list.len())..) {
            room -= over.iov_len;
        }
        room
    }

    /// Receives until something stops it. `largest`: bytes of the longest frame to be expected,
    /// without header.
    pub fn run(
        &mut self,
        backend: &mut dyn Backend,
        shared: &Shared,
        filter: &Filter,
        largest: usize,
    ) -> Result<Stopped, QueueError> {
        let counters = &shared.counters;
        if let Some(queue) = &mut self.queue {
            queue.disable_notifications();
        }
        for _ in 0..BUDGET {
            if let Some(frame) = self.pending.take()
                && !self.copy_in(&frame, shared)?
            {
                self.pending = Some(frame);
                return Ok(Stopped::NoBuffers);
            }
            if shared.inbound.is_limited() && !shared.inbound.wait(Instant::now()).is_zero() {
                return Ok(Stopped::Limit);
            }
            if !self.gather(HEADER + largest)? && self.held.is_empty() {
                return Ok(Stopped::NoBuffers);
            }
            let room = self.buffers(HEADER + largest);
            self.list.0.push(libc::iovec {
                iov_base: self.spill.as_mut_ptr().cast(),
                iov_len: self.spill.len(),
            });
            // SAFETY: the list was made just now, of chains that are held and of our own spill;
            // no reference to either exists.
            let len = match unsafe { backend.receive(&self.list.0) } {
                Ok(len) => len,
                Err(Trouble::Later) => return Ok(Stopped::Empty),
                Err(Trouble::Gone) => return Ok(Stopped::Gone),
                Err(Trouble::Refused(error)) => {
                    log::debug!("receiving: {error}");
                    counters.rx_errors.add(1);
                    continue;
                }
            };
            let mut start = [0; LOOKED_AT];
            let seen = self.peek(room, len, &mut start);
            if len < HEADER || !shared.link_up() {
                self.report(len.min(room));
                counters.rx_dropped.add(1);
            } else if !filter.wants(&start[..seen]) {
                // The guest asked not to see it: nobody's loss, nobody's count.
                self.report(len.min(room));
            } else if len <= room {
                self.give(len, shared);
            } else {
                let mut frame = vec![0; len];
                self.copy_out(room, &mut frame);
                self.report(room);
                if !self.copy_in(&frame, shared)? {
                    self.pending = Some(frame);
                }
            }
        }
        Ok(Stopped::Budget)
    }

    /// Takes frames from the backend and drops them: the cable is out.
    pub fn drain(&mut self, backend: &mut dyn Backend, shared: &Shared) -> Stopped {
        self.pending = None;
        for _ in 0..BUDGET {
            let buffer = [libc::iovec {
                iov_base: self.spill.as_mut_ptr().cast(),
                iov_len: self.spill.len(),
            }];
            // SAFETY: the buffer is our own.
            match unsafe { backend.receive(&buffer) } {
                Ok(_) => shared.counters.rx_dropped.add(1),
                Err(Trouble::Later) => return Stopped::Empty,
                Err(Trouble::Gone) => return Stopped::Gone,
                Err(Trouble::Refused(_)) => shared.counters.rx_errors.add(1),
            }
        }
        Stopped::Budget
    }

    /// Copies the frame's first bytes out of where it was just received; how many.
    fn peek(&self, room: usize, len: usize, start: &mut [u8]) -> usize {
        let count = start.len().min(len.saturating_sub(HEADER));
        let mut whole = [0; HEADER + LOOKED_AT];
        let whole = &mut whole[..HEADER + count];
        if len >= HEADER {
            self.copy_out(room, whole);
        }
        start[..count].copy_from_slice(&whole[HEADER..]);
        count
    }

    /// Copies what was just received (into `room` bytes of guest buffers, then the spill).
    fn copy_out(&self, room: usize, to: &mut [u8]) {
        let mut done = 0;
        // The last one is the spill.
        let guest = self.list.0.len() - 1;
        for buffer in &self.list.0[..guest] {
            let len = buffer.iov_len.min(to.len() - done);
            // SAFETY: the buffers are the held chains', still held and thus mapped.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    buffer.iov_base.cast::<u8>().cast_const(),
                    to[done..].as_mut_ptr(),
                    len,
                );
            }
            done += len;
        }
        debug_assert!(done == room.min(to.len()));
        let rest = to.len() - done;
        to[done..].copy_from_slice(&self.spill[..rest]);
    }

    /// Guest memory has changed although nothing of it goes to the driver.
    fn report(&self, len: usize) {
        let mut left = u32::try_from(len).unwrap_or(u32::MAX);
        for chain in &self.held {
            for segment in chain.writable().slice(0, left) {
                chain.memory().wrote(segment.address, segment.len.into());
            }
            left = left.saturating_sub(chain.writable().len());
        }
    }

    /// Gives the driver `len` bytes that are in the held chains already.
    fn give(&mut self, len: usize, shared: &Shared) {
        let Some(queue) = &mut self.queue else { return };
        let mut left = len;
        let mut chains: u16 = 0;
        for chain in &self.held {
            chains += 1;
            left = left.saturating_sub(chain.writable().len() as usize);
            if left == 0 {
                break;
            }
        }
        // The backend has written the header's other fields.
        if let Some(first) = self.held.front() {
            first.write_at(10, &chains.to_le_bytes());
        }
        let mut left = len;
        for chain in self.held.drain(..usize::from(chains)) {
            let size = chain.writable().len() as usize;
            let written = left.min(size);
            left -= written;
            self.room -= size;
            // Less than the chain's u32 length.
            queue.push(&chain, written as u32);
            self.free.push(chain);
        }
        let bytes = (len - HEADER) as u64;
        shared.inbound.take(bytes);
        shared.counters.rx_packets.add(1);
        shared.counters.rx_bytes.add(bytes);
    }

    /// Copies a frame into receive buffers and gives it to the driver. `false`: the driver must
    /// give more buffers first. A frame that can never fit is dropped.
    fn copy_in(&mut self, frame: &[u8], shared: &Shared) -> Result<bool, QueueError> {
        let enough = self.gather(frame.len())?;
        let room = if self.mergeable {
            self.room
        } else {
            let first = self.held.front();
            first.map_or(0, |c| c.writable().len() as usize)
        };
        if frame.len() > room {
            let size = self.queue.as_ref().map_or(0, |q| usize::from(q.size()));
            let can_wait = !enough && self.held.len() < size;
            if !can_wait {
                shared.counters.rx_dropped.add(1);
                // What is there can't be used for it, nor for any other of that size; but smaller
                // ones may come.
                return Ok(true);
            }
            return Ok(false);
        }
        let mut rest = frame;
        for chain in &self.held {
            let written = chain.write_at(0, rest);
            rest = &rest[written..];
            if rest.is_empty() {
                break;
            }
        }
        self.give(frame.len(), shared);
        Ok(true)
    }

    /// Shows the driver what it was given; whether to interrupt it.
    pub fn publish(&mut self) -> bool {
        self.queue.as_mut().is_some_and(Queue::publish)
    }

    /// A frame waits for buffers.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }
}

/// The longest frame to be expected with these offloads and this MTU.
pub(super) fn largest(offloads: u64, mtu: Option<u16>) -> usize {
    if offloads & super::features::GUEST_LARGE != 0 {
        LONGEST_FRAME
    } else {
        usize::from(mtu.unwrap_or(1500)) + FRAMING
    }
}
