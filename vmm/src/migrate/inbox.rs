//! What comes on a connection, read in large pieces: most frames are much smaller than what has come by the time that
//! somebody looks, and each look is a system call.

use std::io::{self, Read};

use super::link::Link;
use crate::memory::{MemoryError, Scratch};

/// Stays in the processor's cache between the connection and guest memory.
const BYTES: usize = 128 << 10;

/// A connection's receiving end.
#[derive(Debug)]
pub struct Inbox<'a> {
    link: &'a Link,
    buffer: Scratch,
    /// What has come and was not taken yet.
    start: usize,
    end: usize,
}

impl<'a> Inbox<'a> {
    /// Of a connection from which nobody else reads any more.
    ///
    /// # Errors
    /// No memory.
    pub fn new(link: &'a Link) -> Result<Self, MemoryError> {
        Ok(Self {
            link,
            buffer: Scratch::new(BYTES)?,
            start: 0,
            end: 0,
        })
    }

    /// Whether all that has come was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// At least one byte and at most `most`, as many as have come.
    ///
    /// # Errors
    /// The connection's; it ends or stalls.
    pub fn part(&mut self, most: usize) -> io::Result<&[u8]> {
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
            let got = (&mut &*self.link).read(&mut self.buffer)?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.end = got;
        }
        let start = self.start;
        self.start += most.min(self.end - start);
        Ok(self.buffer.get(start..self.start).unwrap_or(&[]))
    }
}

impl Inbox<'_> {
    /// Exactly `len` bytes, to `to`.
    ///
    /// # Errors
    /// The connection's; it ends or stalls.
    ///
    /// # Safety
    /// `len` bytes from `to` on may be written until this returns, and are no reference's target.
    pub unsafe fn read_to(&mut self, to: *mut u8, len: usize) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            if self.is_empty() && len - done >= BYTES {
                // SAFETY: inside the bytes that the caller vouches for.
                done += unsafe { self.link.receive_to(to.wrapping_add(done), len - done)? };
                continue;
            }
            let part = self.part(len - done)?;
            // SAFETY: as above, and not more than there are.
            unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr(), to.wrapping_add(done), part.len());
            }
            done += part.len();
        }
        Ok(())
    }
}

impl Read for Inbox<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        // What is as long as the buffer need not go through it.
        if self.is_empty() && out.len() >= BYTES {
            return (&mut &*self.link).read(out);
        }
        if out.is_empty() {
            return Ok(0);
        }
        let taken = match self.part(out.len()) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
            taken => taken?,
        };
        let len = taken.len();
        if let Some(out) = out.get_mut(..len) {
            out.copy_from_slice(taken);
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn small_and_large_reads_get_everything_in_order() {
        let (one, other) = UnixStream::pair().unwrap();
        let link = Link::new(other.into()).unwrap();
        let data: Vec<u8> = (0..2_000_000u32).map(|n| (n % 251) as u8).collect();
        let expected = data.clone();
        let sender = std::thread::spawn(move || (&one).write_all(&data).unwrap());
        let mut inbox = Inbox::new(&link).unwrap();
        let mut got = vec![0; 7];
        inbox.read_exact(&mut got).unwrap();
        got.resize(7 + 600_000, 0);
        inbox.read_exact(&mut got[7..]).unwrap();
        while got.len() < 1_500_000 {
            let most = 1 + got.len() % 4099;
            let part = inbox.part(most).unwrap();
            assert!((1..=most).contains(&part.len()));
            got.extend_from_slice(part);
        }
        inbox.read_to_end(&mut got).unwrap();
        assert!(got == expected);
        assert!(inbox.is_empty());
        let error = inbox.part(1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        sender.join().unwrap();
    }
}
