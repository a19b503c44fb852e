//! What a disk's content is kept in, as the device sees it.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::memory::GuestMemory;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Fills the buffers.
    Read,
    /// Writes the buffers.
    Write,
    /// What was answered before becomes durable.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range reads as zeroes from now on.
    WriteZeroes {
        /// Its space may be given back.
        unmap: bool,
    },
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// What.
    pub op: Op,
    /// Where, in bytes; a multiple of the logical block size, as the length is.
    pub offset: u64,
    /// Bytes. For reads and writes that of all buffers together.
    pub len: u64,
    /// Memory of reads and writes: guest RAM, which others may change at any time. Valid until the
    /// request's [`Completion`] has been taken (the list itself only during the call), and as long
    /// as the memory that [`Storage::queue`] got is kept.
    pub buffers: &'a [libc::iovec],
    /// Comes back in the completion.
    pub token: u64,
}

/// A request's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The request's token.
    pub token: u64,
    /// How it went; else an `errno`.
    pub result: Result<(), i32>,
}

/// A disk's content. Shared by the device's queues.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Bytes.
    fn capacity(&self) -> u64;

    /// A queue of requests, for one thread. `memory` is kept as long as any request may touch a
    /// buffer, even beyond the queue's drop.
    ///
    /// # Errors
    /// The host's refusal.
    fn queue(&self, memory: Arc<dyn GuestMemory>) -> io::Result<Box<dyn StorageQueue>>;

    /// Whether writes are durable when answered.
    fn writethrough(&self) -> bool;

    /// Changes that. What was answered before is durable when a call that turns it on returns.
    ///
    /// # Errors
    /// The flush failed: nothing has changed.
    fn set_writethrough(&self, on: bool) -> io::Result<()>;
}

/// Requests of one thread.
pub trait StorageQueue: Send + fmt::Debug {
    /// Begins a request. It may be done when this returns; its completion is taken by
    /// [`Self::complete`] in any case. At most as many are in flight as the device's queue has
    /// entries times the ranges of a discard.
    fn submit(&mut self, request: &Request<'_>);

    /// Sends off what `submit` has gathered, and adds everything that is done to `done`. Never
    /// waits.
    fn complete(&mut self, done: &mut Vec<Completion>);

    /// Readable when `complete` has something to give; `complete` takes the signal.
    fn fd(&self) -> BorrowedFd<'_>;

    /// When `complete` is to be called although `fd` says nothing: requests that limits hold back.
    fn deadline(&self) -> Option<Instant> {
        None
    }
}
