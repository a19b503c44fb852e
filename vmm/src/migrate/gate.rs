//! Guest memory into a socket without a copy: its pages go through a pipe by reference.
//!
//! What the guest writes to a page that is on its way may arrive or not. A migration can bear that: such a page is in the
//! dirty log, and comes again behind what is on its way (splice(2), vmsplice(2)).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use vmm_api::saved::PAGE;

use crate::num::to_usize;

/// Bytes that are worth the system calls.
pub const WORTH: usize = 64 << 10;
/// Bytes that the pipe is to hold; the system may give less.
const ROOM: i32 = 1 << 20;

/// A pipe.
#[derive(Debug)]
pub struct Gate {
    out: OwnedFd,
    into: OwnedFd,
    room: usize,
}

impl Gate {
    /// An empty one.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> io::Result<Self> {
        let (out, into) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        // SAFETY: a descriptor of ours, and an int.
        let got = unsafe { libc::fcntl(into.as_raw_fd(), libc::F_SETPIPE_SZ, ROOM) };
        // As it was made otherwise: sixteen pages (pipe(7)).
        let room = usize::try_from(got).unwrap_or(16 * to_usize(PAGE));
        Ok(Self { out, into, room })
    }

    /// Takes the first pages of these bytes, with no others in it; how many bytes.
    ///
    /// # Errors
    /// The system's. Nothing is in it then.
    ///
    /// # Safety
    /// `len` bytes from `from` on may be read. Pages of memory, which others may write meanwhile and later.
    pub unsafe fn take(&self, from: *const u8, len: usize) -> io::Result<usize> {
        let part = libc::iovec {
            iov_base: from.cast_mut().cast(),
            iov_len: len.min(self.room),
        };
        // SAFETY: one part, which the caller vouches for; the pages are read by whoever reads the pipe.
        let taken = unsafe {
            let fd = self.into.as_raw_fd();
            libc::vmsplice(fd, &raw const part, 1, libc::SPLICE_F_NONBLOCK)
        };
        match usize::try_from(taken) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(taken) => Ok(taken),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Passes at least one byte of the `len` that are in it on to a socket; how many.
    ///
    /// # Errors
    /// The socket's; it takes none for as long as it waits.
    pub fn pass(&self, socket: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
        let (none, flags) = (std::ptr::null_mut(), libc::SPLICE_F_MOVE);
        // SAFETY: two descriptors, and no offsets.
        let passed = unsafe {
            libc::splice(
                self.out.as_raw_fd(),
                none,
                socket.as_raw_fd(),
                none,
                len,
                flags,
            )
        };
        match usize::try_from(passed) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(passed) => Ok(passed),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}
