//! A descriptor chain as lists of host buffers.

use std::sync::Arc;

use crate::memory::GuestMemory;

/// A piece of guest memory that a chain names.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// The same bytes in the host, mapped as long as the chain's memory.
    pub pointer: *mut u8,
    /// Bytes, at least 1.
    pub len: u32,
}

/// One direction of a chain: its segments, seen as one run of bytes.
#[derive(Debug, Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    len: u32,
}

impl Buffers {
    /// All bytes.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Nothing there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces in order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The pieces of `offset .. offset + len`, cut to what is there.
    pub fn slice(&self, offset: u32, len: u32) -> impl Iterator<Item = Segment> {
        let (mut skip, mut left) = (offset, len);
        self.segments.iter().filter_map(move |segment| {
            let start = skip.min(segment.len);
            skip -= start;
            let len = (segment.len - start).min(left);
            left -= len;
            (len > 0).then(|| Segment {
                address: segment.address + u64::from(start),
                // SAFETY: `start` is within the segment.
                pointer: unsafe { segment.pointer.add(start as usize) },
                len,
            })
        })
    }

    /// Adds the host buffers of `offset .. offset + len` to `list`, cut to what is there. They are
    /// valid as long as the chain isn't reused or dropped.
    pub fn iovecs(&self, offset: u32, len: u32, list: &mut Vec<libc::iovec>) {
        list.extend(self.slice(offset, len).map(|s| libc::iovec {
            iov_base: s.pointer.cast(),
            iov_len: s.len as usize,
        }));
    }

    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
    }

    /// `false` if all together would be 4 GiB or more (2.7.4.2).
    pub(super) fn push(&mut self, segment: Segment) -> bool {
        let Some(len) = self.len.checked_add(segment.len) else {
            return false;
        };
        self.len = len;
        if segment.len > 0 {
            self.segments.push(segment);
        }
        true
    }
}

/// A descriptor chain taken from a queue. Filled by [`super::Queue::pop`]; reused for the next one,
/// so that popping allocates nothing. Goes back by [`super::Queue::push`], exactly once.
#[derive(Debug)]
pub struct Chain {
    /// Keeps the buffers mapped.
    memory: Arc<dyn GuestMemory>,
    pub(super) head: u16,
    pub(super) readable: Buffers,
    pub(super) writable: Buffers,
}

// SAFETY: the pointers are into memory that `memory` keeps mapped, on whatever thread.
unsafe impl Send for Chain {}

impl Chain {
    /// An empty chain, to pop into.
    #[must_use]
    pub fn new(memory: Arc<dyn GuestMemory>) -> Self {
        Self {
            memory,
            head: 0,
            readable: Buffers::default(),
            writable: Buffers::default(),
        }
    }

    /// Number of its first descriptor: what the driver knows it by.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver has written for the device.
    #[must_use]
    pub fn readable(&self) -> &Buffers {
        &self.readable
    }

    /// Where the device writes.
    #[must_use]
    pub fn writable(&self) -> &Buffers {
        &self.writable
    }

    /// Copies from `offset` in the readable part into `data`; how many bytes there were.
    pub fn read_at(&self, offset: u32, data: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in self.readable.slice(offset, length(data)) {
            let len = segment.len as usize;
            // SAFETY: the segment was checked to be guest RAM when the chain was walked, and
            // `memory` keeps it mapped. `data` is not guest memory: no reference to that exists.
            unsafe {
                std::ptr::copy_nonoverlapping(segment.pointer, data[done..].as_mut_ptr(), len);
            }
            done += len;
        }
        done
    }

    /// Exactly `N` bytes at `offset` of the readable part, or `None`.
    #[must_use]
    pub fn read_array<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.read_at(offset, &mut bytes) == N).then_some(bytes)
    }

    /// Copies `data` to `offset` in the writable part; how many bytes there was room for.
    /// [`super::Queue::push`] tells the memory of it.
    pub fn write_at(&self, offset: u32, data: &[u8]) -> usize {
        let mut done = 0;
        for segment in self.writable.slice(offset, length(data)) {
            let len = segment.len as usize;
            // SAFETY: as in `read_at`, the other way round.
            unsafe {
                std::ptr::copy_nonoverlapping(data[done..].as_ptr(), segment.pointer, len);
            }
            done += len;
        }
        done
    }

    /// The guest memory it lies in.
    #[must_use]
    pub fn memory(&self) -> &Arc<dyn GuestMemory> {
        &self.memory
    }
}

fn length(data: &[u8]) -> u32 {
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}
