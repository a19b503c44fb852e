//! Disks whose content goes along: on the source what the guest writes meanwhile is noted, and sent
//! again; on the target images are written before there is a machine.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use images::iovec::{AlignedBuf, is_zero, total};
use images::{Error, Extent, Image, ImageInfo, IoBuf, Plain, read_bytes};
use vmm_api::migrate::{self, HEADER, Header, HelloDisk, Kind, StreamError};
use vmm_api::saved::CHUNK;

use super::link::{Link, part};
use crate::devices::lock;
use crate::num::to_usize;

/// What one bit of the log stands for, bytes.
pub const BLOCK: u64 = 64 << 10;
/// What one word of the log stands for, bytes.
pub const WORD: u64 = 64 * BLOCK;
/// Bytes of a disk frame's body before the content.
const PLACE: usize = 12;

/// Blocks that were written, a bit each.
#[derive(Debug)]
struct Log(Box<[AtomicU64]>);

/// A disk's image that can note where it is written.
#[derive(Debug)]
pub struct Noting {
    image: Arc<dyn Image>,
    on: AtomicBool,
    log: Mutex<Option<Arc<Log>>>,
}

impl Noting {
    /// One that notes nothing yet.
    #[must_use]
    pub fn new(image: Arc<dyn Image>) -> Self {
        Self {
            image,
            on: AtomicBool::new(false),
            log: Mutex::default(),
        }
    }

    /// Begins to note, or ends. The disk is at rest when it begins: what is in flight is not noted.
    pub fn note(&self, on: bool) {
        let words = to_usize(self.image.size().div_ceil(WORD));
        let log = on.then(|| Arc::new(Log((0..words).map(|_| AtomicU64::new(0)).collect())));
        *lock(&self.log) = log;
        self.on.store(on, Ordering::Release);
    }

    /// Blocks that were written since the last call.
    #[must_use]
    pub fn written(&self) -> Vec<u64> {
        let log = lock(&self.log).clone();
        log.map_or_else(Vec::new, |log| {
            log.0.iter().map(|w| w.swap(0, Ordering::AcqRel)).collect()
        })
    }

    /// All blocks, or only those that this very image has, and none behind it.
    ///
    /// # Errors
    /// The image's.
    pub fn content(&self, own_only: bool) -> Result<Vec<u64>, Error> {
        let size = self.image.size();
        let mut blocks = vec![0u64; to_usize(size.div_ceil(WORD))];
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
            mark(at, len, |word, bits| {
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
        if !self.on.load(Ordering::Acquire) {
            return;
        }
        let log = lock(&self.log).clone();
        if let Some(log) = log {
            mark(offset, len, |word, bits| {
                if let Some(word) = log.0.get(word) {
                    word.fetch_or(bits, Ordering::AcqRel);
                }
            });
        }
    }
}

/// Calls `set` with each word of the log, and its bits, that the bytes touch.
fn mark(offset: u64, len: u64, mut set: impl FnMut(usize, u64)) {
    if len == 0 {
        return;
    }
    let last = offset.saturating_add(len - 1) / BLOCK;
    let mut block = offset / BLOCK;
    while block <= last {
        let (word, from) = (block / 64, block % 64);
        let upto = (last - word * 64).min(63);
        set(
            to_usize(word),
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
        let result = self.image.write(offset, bufs);
        self.wrote(offset, total(bufs)?);
        result
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        let result = self.image.write_zeroes(offset, len, unmap);
        self.wrote(offset, len);
        result
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        let result = self.image.discard(offset, len);
        self.wrote(offset, len);
        result
    }

    fn flush(&self) -> Result<(), Error> {
        self.image.flush()
    }

    fn rest(&self) -> Result<(), Error> {
        self.image.rest()
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

/// A disk that goes along.
#[derive(Debug, Clone)]
pub struct Leaving {
    /// Its id.
    pub id: String,
    /// Its content.
    pub image: Arc<Noting>,
}

impl Leaving {
    fn failed(&self, error: impl std::fmt::Display) -> StreamError {
        StreamError::Refused(format!("reading disk {}: {error}", self.id))
    }

    /// The blocks to begin with.
    ///
    /// # Errors
    /// The image's.
    pub fn content(&self, own_only: bool) -> Result<Vec<u64>, StreamError> {
        self.image
            .content(own_only)
            .map_err(|error| self.failed(error))
    }

    /// Sends `len` bytes at `start` of the disk that is number `index`, and says how many bytes
    /// were sent.
    ///
    /// # Errors
    /// The connection's; the image's.
    pub fn send(
        &self,
        link: &Link,
        index: u32,
        start: u64,
        len: u64,
        buffer: &mut AlignedBuf,
    ) -> Result<u64, StreamError> {
        let end = start.saturating_add(len).min(self.image.size());
        let (mut at, mut sent) = (start, 0);
        while at < end {
            let extent = self.image.extent(at, end - at);
            let extent = extent.map_err(|error| self.failed(error))?;
            let mut len = extent.len.clamp(1, end - at);
            if !extent.zero {
                len = len.min(CHUNK);
                let data = buffer.get_mut(..to_usize(len)).unwrap_or(&mut []);
                read_bytes(&*self.image, at, data).map_err(|error| self.failed(error))?;
                if !is_zero(data) {
                    let mut head = [0u8; HEADER + PLACE];
                    let body = PLACE + data.len();
                    head[..HEADER].copy_from_slice(&Header::new(Kind::Disk, body)?.encode());
                    head[HEADER..HEADER + 4].copy_from_slice(&index.to_le_bytes());
                    head[HEADER + 4..].copy_from_slice(&at.to_le_bytes());
                    let mut parts = [
                        part(head.as_ptr(), head.len() as u64),
                        part(data.as_ptr(), data.len() as u64),
                    ];
                    // SAFETY: both live here, and longer than the call.
                    unsafe { link.send_parts(&mut parts)? };
                    sent += (head.len() + data.len()) as u64;
                    at += len;
                    continue;
                }
            }
            let mut body = index.to_le_bytes().to_vec();
            body.extend(at.to_le_bytes());
            body.extend(len.to_le_bytes());
            migrate::send(&mut &*link, Kind::DiskZero, &body)?;
            sent += (HEADER + body.len()) as u64;
            at += len;
        }
        Ok(sent)
    }
}

/// A disk that comes.
#[derive(Debug)]
pub struct Coming {
    id: String,
    image: Arc<dyn Image>,
    touched: AtomicBool,
}

impl Coming {
    /// If it fits what the source says of it.
    ///
    /// # Errors
    /// In words for the source.
    pub fn new(hello: &HelloDisk, image: Arc<dyn Image>) -> Result<Self, String> {
        let (id, size) = (&hello.id, image.size());
        if size != hello.bytes {
            return Err(format!(
                "disk {id} has {} bytes there, {size} here",
                hello.bytes
            ));
        }
        Ok(Self {
            id: id.clone(),
            image,
            touched: AtomicBool::new(false),
        })
    }

    fn failed(&self, what: &str, error: &Error) -> StreamError {
        StreamError::Refused(format!("{what} disk {}: {error}", self.id))
    }

    /// Everything that has come reaches the disk.
    ///
    /// # Errors
    /// The image's.
    pub fn flush(&self) -> Result<(), StreamError> {
        if !self.touched.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let flushed = self.image.flush();
        flushed.map_err(|error| self.failed("flushing", &error))
    }

    /// The same; the machine that is built next opens it anew.
    ///
    /// # Errors
    /// The image's.
    pub fn close(self) -> Result<(), StreamError> {
        let closed = self.image.rest();
        closed.map_err(|error| self.failed("flushing", &error))
    }
}

/// Takes a frame's content over.
///
/// # Errors
/// The connection's; the image's; what the source should not have sent.
pub fn receive(
    disks: &[Coming],
    from: &mut impl Read,
    header: Header,
    buffer: &mut Option<AlignedBuf>,
) -> Result<(), StreamError> {
    let bad = || StreamError::Protocol(format!("{:?} of {} bytes", header.kind, header.len));
    let mut place = [0u8; PLACE];
    let rest = (header.len as usize)
        .checked_sub(PLACE)
        .filter(|rest| *rest > 0)
        .ok_or_else(bad)?;
    from.read_exact(&mut place)?;
    let [i0, i1, i2, i3, offset @ ..] = place;
    let disk = u32::from_le_bytes([i0, i1, i2, i3]) as usize;
    let disk = disks.get(disk).ok_or_else(bad)?;
    let offset = u64::from_le_bytes(offset);
    let written = match header.kind {
        Kind::Disk => {
            let buffer = match buffer {
                Some(buffer) => buffer,
                none => none.insert(AlignedBuf::new(to_usize(CHUNK)).map_err(io::Error::other)?),
            };
            from.read_exact(buffer.get_mut(..rest).ok_or_else(bad)?)?;
            disk.image.write(offset, &[buffer.io(rest)])
        }
        _ => {
            let mut len = [0u8; 8];
            if rest != len.len() {
                return Err(bad());
            }
            from.read_exact(&mut len)?;
            // What is not there need not be.
            let len = u64::from_le_bytes(len);
            disk.image.write_zeroes(offset, len, true)
        }
    };
    disk.touched.store(true, Ordering::Release);
    written.map_err(|error| disk.failed("writing", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_has_every_block_that_is_touched() {
        let marked = |offset, len| {
            let mut words = vec![0u64; 4];
            mark(offset, len, |word, bits| words[word] |= bits);
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
