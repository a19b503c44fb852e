//! Character devices' host side: pseudo-terminals, sockets, files, standard input and output.
//!
//! A device (vCPU thread) and its host side (event loop) meet at a [`Port`]. Neither ever waits
//! for the other: output goes into a bounded ring, input waits until the device has room.

mod channel;
mod link;
mod port;
mod pty;
mod stdio;
mod telnet;

pub use channel::{Channel, Outcome, Receiver, TOKENS};
pub use link::Link;
pub use port::Port;
pub use pty::Pty;
pub use stdio::Stdio;

use std::collections::VecDeque;

use nix::errno::Errno;

/// Bytes kept for a reader that is slow or not there; the oldest go first.
pub const BACKLOG: usize = 64 << 10;

/// What goes wrong while a host side is opened.
#[derive(Debug, thiserror::Error)]
pub enum CharError {
    /// The kernel refused.
    #[error("{what}: {errno}")]
    Os {
        /// What was being done.
        what: String,
        /// The error.
        errno: Errno,
    },
    /// The descriptor or path itself.
    #[error(transparent)]
    Resource(#[from] crate::resource::ResourceError),
}

pub(crate) fn os<W: Into<String>>(what: W) -> impl FnOnce(Errno) -> CharError {
    move |errno| CharError::Os {
        what: what.into(),
        errno,
    }
}

/// Appends to a queue that never grows beyond [`BACKLOG`].
pub(crate) fn push_bounded(queue: &mut VecDeque<u8>, bytes: &[u8]) {
    let bytes = &bytes[bytes.len().saturating_sub(BACKLOG)..];
    let excess = (queue.len() + bytes.len()).saturating_sub(BACKLOG);
    queue.drain(..excess.min(queue.len()));
    queue.extend(bytes);
}
