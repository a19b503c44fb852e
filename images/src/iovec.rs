//! Lists of buffers: parts of them, and copies to and from memory of our own.

use std::borrow::Cow;

use crate::{Error, IoBuf};

/// Bytes in all of `bufs`.
///
/// # Errors
/// [`Error::Invalid`] when they are more than a request can have.
pub fn total(bufs: &[IoBuf]) -> Result<u64, Error> {
    let mut sum = 0_u64;
    for buf in bufs {
        sum = sum
            .checked_add(buf.len() as u64)
            .filter(|&sum| i64::try_from(sum).is_ok())
            .ok_or_else(|| Error::Invalid("the buffers are too long".into()))?;
    }
    Ok(sum)
}

/// `len` bytes of `bufs` from byte `start` on; fewer when they end sooner.
#[must_use]
pub fn part(bufs: &[IoBuf], start: u64, len: u64) -> Cow<'_, [IoBuf]> {
    if start == 0 && bufs.iter().map(|buf| buf.len() as u64).sum::<u64>() <= len {
        return Cow::Borrowed(bufs);
    }
    let mut parts = Vec::new();
    let (mut skip, mut left) = (start, len);
    for buf in bufs {
        let here = buf.len() as u64;
        if skip >= here {
            skip -= here;
            continue;
        }
        let take = (here - skip).min(left);
        if take == 0 {
            break;
        }
        parts.push(buf.part(skip as usize, take as usize));
        skip = 0;
        left -= take;
    }
    Cow::Owned(parts)
}

/// Makes all of `bufs` zero.
pub fn zero(bufs: &[IoBuf]) {
    for buf in bufs {
        // SAFETY: the bytes are writable for as long as the request lasts (`IoBuf::new`).
        unsafe { std::ptr::write_bytes(buf.base(), 0, buf.len()) }
    }
}

/// Copies `from` into `bufs`, as far as both go.
pub fn scatter(bufs: &[IoBuf], mut from: &[u8]) {
    for buf in bufs {
        let count = buf.len().min(from.len());
        // SAFETY: the destination is writable while the request lasts (`IoBuf::new`) and no
        // Rust reference to it exists; `from` is at least `count` long.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), buf.base(), count) }
        from = &from[count..];
    }
}

/// Copies `bufs` into `to`, as far as both go.
pub fn gather(bufs: &[IoBuf], mut to: &mut [u8]) {
    for buf in bufs {
        let count = buf.len().min(to.len());
        // SAFETY: the source is readable while the request lasts (`IoBuf::new`); `to` is memory
        // of our own, at least `count` long.
        unsafe { std::ptr::copy_nonoverlapping(buf.base(), to.as_mut_ptr(), count) }
        to = &mut to[count..];
    }
}

/// Whether every byte of `data` is zero.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    // SAFETY: any bytes are a valid u128.
    let (head, middle, tail) = unsafe { data.align_to::<u128>() };
    head.iter().chain(tail).all(|&byte| byte == 0)
        && middle
            .chunks(16)
            .all(|chunk| chunk.iter().fold(0, |all, word| all | word) == 0)
}

/// Memory of our own, aligned for O_DIRECT, zeroed.
#[derive(Debug)]
pub struct AlignedBuf {
    base: std::ptr::NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: owned memory, like a `Vec<u8>`'s.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// Alignment in bytes: enough for every disk's O_DIRECT.
    pub const ALIGN: usize = 4096;

    /// `len` bytes of zeroes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is not that much memory.
    pub fn new(len: usize) -> Result<Self, Error> {
        let lack = || Error::Invalid(format!("no memory for {len} bytes"));
        let layout =
            std::alloc::Layout::from_size_align(len.max(1), Self::ALIGN).map_err(|_| lack())?;
        // SAFETY: the layout's size is not 0.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        let base = std::ptr::NonNull::new(base).ok_or_else(lack)?;
        Ok(Self { base, layout })
    }

    /// The first `len` bytes as a buffer of a request (all of it if it is shorter).
    #[must_use]
    pub fn io(&mut self, len: usize) -> IoBuf {
        // SAFETY: the memory is ours and lives as long as `self`, whose users wait for the
        // request's end.
        unsafe { IoBuf::new(self.base.as_ptr(), len.min(self.layout.size())) }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: allocated and initialised with exactly that size.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.layout.size()) }
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cross_buffers() {
        let mut memory: Vec<u8> = (0..32).collect();
        let bufs = [
            IoBuf::from_slice(&mut memory[..10]),
            IoBuf::from_slice(&mut memory[10..12]),
        ];
        let mut out = [0; 4];
        gather(&part(&bufs, 8, 4), &mut out);
        assert_eq!(out, [8, 9, 10, 11]);
        assert_eq!(total(&part(&bufs, 9, 100)).unwrap(), 3);
        assert!(part(&bufs, 12, 1).is_empty());
        scatter(&part(&bufs, 9, 2), &[77, 78]);
        assert_eq!(memory[9..11], [77, 78]);
    }

    #[test]
    fn zeroes_are_told_from_anything_else() {
        let mut data = vec![0; 1000];
        assert!(is_zero(&data) && is_zero(&[]));
        for at in [0, 1, 500, 999] {
            data[at] = 1;
            assert!(!is_zero(&data), "{at}");
            data[at] = 0;
        }
    }
}
