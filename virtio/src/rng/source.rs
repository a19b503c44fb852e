//! Where random bytes come from.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use crate::queue::{Chain, Segment};

/// A source of random bytes.
#[derive(Debug)]
pub enum Source {
    /// The host's kernel (`getrandom`).
    System,
    /// A file, as `/dev/hwrng`: opened for reading, non-blocking.
    File(OwnedFd),
}

impl Source {
    /// Fills up to `len` bytes of the chain's writable part; how many.
    pub(super) fn fill(&self, chain: &Chain, len: u32) -> u32 {
        let mut done = 0;
        for segment in chain.writable().slice(0, len) {
            let filled = self.fill_segment(&segment);
            done += filled;
            if filled < segment.len {
                break;
            }
        }
        done
    }

    fn fill_segment(&self, segment: &Segment) -> u32 {
        let mut done = 0;
        while done < segment.len {
            let left = (segment.len - done) as usize;
            // SAFETY: `done` is inside the segment.
            let target = unsafe { segment.pointer.add(done as usize) };
            let result = match self {
                // SAFETY: `left` bytes of guest RAM from `target` are mapped as long as the chain
                // is; the kernel writes no more.
                Self::System => unsafe {
                    libc::getrandom(target.cast(), left, libc::GRND_NONBLOCK)
                },
                // SAFETY: as above.
                Self::File(file) => unsafe { libc::read(file.as_raw_fd(), target.cast(), left) },
            };
            match Errno::result(result) {
                Ok(0) => break,
                Ok(count) => done += count as u32,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => {
                    log::error!("random bytes: {error}");
                    break;
                }
            }
        }
        done
    }
}
