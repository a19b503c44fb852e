//! What a network card's other end is to its queues.

use std::io;
use std::os::fd::BorrowedFd;

/// Bytes of the header before each frame in a queue (5.1.6: with `num_buffers`, as always in the
/// modern interface).
pub const HEADER: usize = 12;
/// Longest frame without its virtio-net header: an IP packet of 65535 bytes behind an Ethernet
/// header with a VLAN tag.
pub const LONGEST_FRAME: usize = 65535 + 18;
/// Buffers one system call takes (`IOV_MAX`).
pub const MOST_BUFFERS: usize = 1024;

/// A list of buffers that is kept only for its allocation.
#[derive(Debug, Default)]
pub(super) struct List(pub Vec<libc::iovec>);

// SAFETY: each use fills it anew: pointers of an earlier use are never followed.
unsafe impl Send for List {}

/// Why no frame went.
#[derive(Debug)]
pub enum Trouble {
    /// Nothing there, or no room: when the descriptor is ready, again.
    Later,
    /// The other end is gone for good.
    Gone,
    /// This frame didn't go; the next one may.
    Refused(io::Error),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::Later,
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
            | io::ErrorKind::UnexpectedEof => Self::Gone,
            _ => Self::Refused(error),
        }
    }
}

/// One queue pair's other end. Frames have a virtio-net header of [`HEADER`] bytes before them.
pub trait Backend: Send + std::fmt::Debug {
    /// What to wait for. `None`: the other end is gone.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Offload features it can do.
    fn offloads(&self) -> u64;

    /// The offloads to the guest that are on from now on: feature bits.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn set_offloads(&mut self, offloads: u64) -> io::Result<()>;

    /// The guest uses this pair, or no longer.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn set_active(&mut self, active: bool) -> io::Result<()>;

    /// Receives one frame into `buffers`, cut to their size. How many bytes, header included,
    /// there were; at most the buffers' size.
    ///
    /// # Safety
    /// Every buffer is mapped and writable, and no Rust reference to it exists.
    ///
    /// # Errors
    /// [`Trouble`].
    unsafe fn receive(&mut self, buffers: &[libc::iovec]) -> Result<usize, Trouble>;

    /// Sends one frame: `buffers` begin with its header, have `len` bytes in all and at least
    /// [`HEADER`], and are at most [`MOST_BUFFERS`]; the first is the header by itself.
    ///
    /// # Safety
    /// Every buffer is mapped.
    ///
    /// # Errors
    /// [`Trouble`]; upon [`Trouble::Later`] nothing of it has gone.
    unsafe fn send(&mut self, buffers: &[libc::iovec], len: usize) -> Result<(), Trouble>;

    /// The descriptor is writable: sends on what was begun.
    ///
    /// # Errors
    /// [`Trouble::Later`]: there is still more.
    fn flush(&mut self) -> Result<(), Trouble>;
}
