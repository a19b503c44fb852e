//! An image whose changes are followed while somebody copies it: noted, or made to the copy at once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::convert::with_buffer;
use crate::iovec::{gather, part, total};
use crate::{Error, Extent, Image, ImageInfo, IoBuf, Plain};

/// What one bit of the log stands for unless something else is asked for, bytes.
pub const BLOCK: u64 = 64 << 10;
/// What is written to two images at once, bytes.
const PIECE: u64 = 1 << 20;

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Blocks that were written, a bit each.
#[derive(Debug)]
struct Log {
    block: u64,
    words: Box<[AtomicU64]>,
}

/// An image that is changed together with another one, range by range.
#[derive(Debug)]
pub struct Mirror {
    image: Arc<dyn Image>,
    /// Ranges that somebody is at, the end not included.
    busy: Mutex<Vec<(u64, u64)>>,
    freed: Condvar,
    /// Why it is not what it should be any more.
    failed: Mutex<Option<String>>,
}

/// A range of a [`Mirror`] that nobody else is at.
#[derive(Debug)]
pub struct Range<'a> {
    mirror: &'a Mirror,
    range: (u64, u64),
}

impl Mirror {
    fn new(image: Arc<dyn Image>) -> Self {
        Self {
            image,
            busy: Mutex::default(),
            freed: Condvar::new(),
            failed: Mutex::default(),
        }
    }

    /// Waits until nobody is at a range, and keeps others from it.
    pub fn take(&self, offset: u64, len: u64) -> Range<'_> {
        let range = (offset, offset.saturating_add(len));
        let mut busy = lock(&self.busy);
        while busy.iter().any(|one| one.0 < range.1 && range.0 < one.1) {
            busy = self
                .freed
                .wait(busy)
                .unwrap_or_else(PoisonError::into_inner);
        }
        busy.push(range);
        Range {
            mirror: self,
            range,
        }
    }

    /// What went wrong with it.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        lock(&self.failed).clone()
    }

    /// Does to it what was done to the other one. It is left alone from its first error on.
    fn follow(&self, what: impl FnOnce(&dyn Image) -> Result<(), Error>) {
        if lock(&self.failed).is_some() {
            return;
        }
        if let Err(error) = what(&*self.image) {
            log::warn!("a disk's other image is given up: {error}");
            *lock(&self.failed) = Some(error.to_string());
        }
    }
}

impl Drop for Range<'_> {
    fn drop(&mut self) {
        let mut busy = lock(&self.mirror.busy);
        if let Some(at) = busy.iter().position(|one| *one == self.range) {
            busy.swap_remove(at);
        }
        drop(busy);
        self.mirror.freed.notify_all();
    }
}

/// A disk's image whose changes can be followed. Changes go by [`Image`]'s calls then, and by no
/// shorter way.
#[derive(Debug)]
pub struct Noting {
    image: Arc<dyn Image>,
    /// There is a log, or a mirror.
    on: AtomicBool,
    log: Mutex<Option<Arc<Log>>>,
    mirror: Mutex<Option<Arc<Mirror>>>,
}

impl Noting {
    /// One that notes nothing yet.
    #[must_use]
    pub fn new(image: Arc<dyn Image>) -> Self {
        Self {
            image,
            on: AtomicBool::new(false),
            log: Mutex::default(),
            mirror: Mutex::default(),
        }
    }

    /// Begins to note, or ends. The disk is at rest when it begins: what is in flight is not noted.
    pub fn note(&self, on: bool) {
        match on {
            true => self.note_by(BLOCK),
            false => {
                *lock(&self.log) = None;
                self.look();
            }
        }
    }

    /// Begins to note, `block` bytes a bit.
    pub fn note_by(&self, block: u64) {
        let words = self.image.size().div_ceil(block.saturating_mul(64).max(1));
        *lock(&self.log) = Some(Arc::new(Log {
            block: block.max(1),
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }));
        self.look();
    }

    /// Has `image` get every change, too, before it is answered. While changes are noted as well,
    /// those that both have got are not. An error of the other image is nobody's but
    /// [`Mirror::failure`]'s.
    pub fn mirror_to(&self, image: Arc<dyn Image>) -> Arc<Mirror> {
        let mirror = Arc::new(Mirror::new(image));
        *lock(&self.mirror) = Some(mirror.clone());
        self.look();
        mirror
    }

    /// No other image any more. The disk is at rest, if that image is used for something then.
    pub fn mirror_no_more(&self) {
        *lock(&self.mirror) = None;
        self.look();
    }

    fn look(&self) {
        let on = lock(&self.log).is_some() || lock(&self.mirror).is_some();
        self.on.store(on, Ordering::Release);
    }

    /// The image that gets every change, too.
    #[must_use]
    pub fn mirror(&self) -> Option<Arc<Mirror>> {
        lock(&self.mirror).clone()
    }

    /// Blocks that were written since the last call.
    #[must_use]
    pub fn written(&self) -> Vec<u64> {
        let log = lock(&self.log).clone();
        log.map_or_else(Vec::new, |log| {
            let words = log.words.iter();
            words.map(|w| w.swap(0, Ordering::AcqRel)).collect()
        })
    }

    /// The same, as ranges in bytes.
    #[must_use]
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let block = lock(&self.log).as_ref().map_or(BLOCK, |log| log.block);
        let size = self.image.size();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (index, word) in (0u64..).zip(self.written()) {
            let mut left = word;
            while left != 0 {
                let bit = u64::from(left.trailing_zeros());
                let count = u64::from((left >> bit).trailing_ones());
                let from = (index * 64 + bit).saturating_mul(block);
                let to = from.saturating_add(count * block).min(size);
                match runs.last_mut() {
                    Some(last) if last.1 == from => last.1 = to,
                    _ => runs.push((from, to)),
                }
                if bit + count == 64 {
                    break;
                }
                left &= u64::MAX << (bit + count);
            }
        }
        runs
    }

    /// All blocks, or only those that this very image has, and none behind it.
    ///
    /// # Errors
    /// The image's.
    pub fn content(&self, own_only: bool) -> Result<Vec<u64>, Error> {
        let size = self.image.size();
        let mut blocks = vec![0u64; size.div_ceil(BLOCK * 64) as usize];
        let mut at = 0;
        while at < size {
            let len = match own_only {
                true => {
                    let extent = self.image.extent(at, size - at)?;
                    if !extent.present || extent.depth > 0 {
                        at += extent.len.max(1);
                        continue;
                    }
                    extent.len.max(1)
                }
                false => size - at,
            };
            mark(BLOCK, at, len, |word, bits| {
                if let Some(word) = blocks.get_mut(word) {
                    *word |= bits;
                }
            });
            at += len;
        }
        Ok(blocks)
    }

    /// Only after it has happened: whoever takes the log reads the content afterwards.
    fn wrote(&self, offset: u64, len: u64) {
        let log = lock(&self.log).clone();
        if let Some(log) = log {
            mark(log.block, offset, len, |word, bits| {
                if let Some(word) = log.words.get(word) {
                    word.fetch_or(bits, Ordering::AcqRel);
                }
            });
        }
    }

    /// A change of these bytes.
    fn change(
        &self,
        offset: u64,
        len: u64,
        what: impl Fn(&dyn Image) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if !self.on.load(Ordering::Acquire) {
            return what(&*self.image);
        }
        let Some(mirror) = self.mirror() else {
            let result = what(&*self.image);
            self.wrote(offset, len);
            return result;
        };
        // Two that overlap are made in the same order to both.
        let _range = mirror.take(offset, len);
        match what(&*self.image) {
            Ok(()) => {
                mirror.follow(what);
                Ok(())
            }
            Err(error) => {
                // A part of it may have happened.
                self.wrote(offset, len);
                Err(error)
            }
        }
    }

    /// Whether both images are to be as durable as one: nobody copies any more.
    fn both(&self) -> Option<Arc<Mirror>> {
        if !self.on.load(Ordering::Acquire) || lock(&self.log).is_some() {
            return None;
        }
        self.mirror()
    }
}

/// Calls `set` with each word of the log, and its bits, that the bytes touch.
fn mark(size: u64, offset: u64, len: u64, mut set: impl FnMut(usize, u64)) {
    if len == 0 {
        return;
    }
    let last = offset.saturating_add(len - 1) / size;
    let mut block = offset / size;
    while block <= last {
        let (word, from) = (block / 64, block % 64);
        let upto = (last - word * 64).min(63);
        set(
            word as usize,
            (u64::MAX << from) & (u64::MAX >> (63 - upto)),
        );
        block = (word + 1) * 64;
    }
}

impl Image for Noting {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        self.image.read(offset, bufs)
    }

    fn write(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        let len = total(bufs)?;
        if !self.on.load(Ordering::Acquire) || self.mirror().is_none() {
            return self.change(offset, len, |image| image.write(offset, bufs));
        }
        // The guest may change its memory meanwhile: both are to get the same.
        let mut done = 0;
        while done < len {
            let now = (len - done).min(PIECE);
            with_buffer(PIECE, |buffer| {
                let own = buffer.io(now as usize);
                gather(&part(bufs, done, now), &mut buffer[..now as usize]);
                self.change(offset + done, now, |image| {
                    image.write(offset + done, &[own])
                })
            })?;
            done += now;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        self.change(offset, len, |image| image.write_zeroes(offset, len, unmap))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        if self.both().is_some() {
            return self.change(offset, len, |image| image.discard(offset, len));
        }
        // What it reads as afterwards is this image's choice: a copy has to look.
        let result = self.image.discard(offset, len);
        if self.on.load(Ordering::Acquire) {
            self.wrote(offset, len);
        }
        result
    }

    fn flush(&self) -> Result<(), Error> {
        self.image.flush()?;
        if let Some(mirror) = self.both() {
            mirror.follow(|image| image.flush());
        }
        Ok(())
    }

    fn rest(&self) -> Result<(), Error> {
        self.image.rest()?;
        if let Some(mirror) = self.both() {
            mirror.follow(|image| image.rest());
        }
        Ok(())
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        self.image.extent(offset, len)
    }

    fn info(&self) -> Result<ImageInfo, Error> {
        self.image.info()
    }

    fn resize(&self, size: u64) -> Result<(), Error> {
        if self.on.load(Ordering::Acquire) {
            return Err(Error::Invalid("a disk that is being copied".into()));
        }
        self.image.resize(size)
    }

    fn plain(&self, offset: u64, len: u64, write: bool) -> Option<Plain> {
        // Its end could not be noted.
        if write && self.on.load(Ordering::Acquire) {
            return None;
        }
        self.image.plain(offset, len, write)
    }

    fn claim(self: Arc<Self>, offset: u64, len: u64) -> Option<Plain> {
        if self.on.load(Ordering::Acquire) {
            return None;
        }
        self.image.clone().claim(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_has_every_block_that_is_touched() {
        const WORD: u64 = BLOCK * 64;
        let marked = |offset, len| {
            let mut words = vec![0u64; 4];
            mark(BLOCK, offset, len, |word, bits| words[word] |= bits);
            words
        };
        assert_eq!(marked(0, 0), [0, 0, 0, 0]);
        assert_eq!(marked(0, 1), [1, 0, 0, 0]);
        assert_eq!(marked(BLOCK - 1, 2), [3, 0, 0, 0]);
        assert_eq!(marked(63 * BLOCK, BLOCK), [1 << 63, 0, 0, 0]);
        assert_eq!(marked(63 * BLOCK, 2 * BLOCK), [1 << 63, 1, 0, 0]);
        assert_eq!(marked(0, 3 * WORD), [u64::MAX, u64::MAX, u64::MAX, 0]);
        assert_eq!(marked(2 * WORD + BLOCK, 5), [0, 0, 2, 0]);
    }
}
