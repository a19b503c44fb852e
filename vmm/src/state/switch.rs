//! A disk whose image changes under its guest: a new image is put on top of what it had.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use images::{Error, Extent, Image, ImageInfo, IoBuf, Plain};

/// Images that can be put on top of one another while a disk is in use.
const MOST: usize = 256;

/// The image on top. Those before stay open as long as this lives: they are what is behind it.
#[derive(Debug)]
pub struct Top {
    all: Box<[OnceLock<Arc<dyn Image>>; MOST]>,
    now: AtomicUsize,
}

impl Top {
    /// What a disk begins with.
    #[must_use]
    pub fn new(image: Arc<dyn Image>) -> Self {
        let all: Box<[OnceLock<Arc<dyn Image>>; MOST]> =
            Box::new(std::array::from_fn(|_| OnceLock::new()));
        // Empty a moment ago.
        let _ = all[0].set(image);
        Self {
            all,
            now: AtomicUsize::new(0),
        }
    }

    /// The image on top now.
    ///
    /// # Errors
    /// Never in practice: the first one is always there.
    pub fn image(&self) -> Result<&Arc<dyn Image>, Error> {
        self.all
            .get(self.now.load(Ordering::Acquire))
            .and_then(OnceLock::get)
            .ok_or_else(|| Error::Invalid("a disk without an image".into()))
    }

    /// Puts another image on top. Nobody uses the disk meanwhile.
    ///
    /// # Errors
    /// It has been done too often.
    pub fn put(&self, image: Arc<dyn Image>) -> Result<(), Error> {
        let next = self.now.load(Ordering::Acquire) + 1;
        let full = || Error::Invalid(format!("no more than {MOST} images on top of one another"));
        self.all
            .get(next)
            .ok_or_else(full)?
            .set(image)
            .map_err(|_| full())?;
        self.now.store(next, Ordering::Release);
        Ok(())
    }
}

impl Image for Top {
    fn size(&self) -> u64 {
        self.image().map_or(0, |image| image.size())
    }

    fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        self.image()?.read(offset, bufs)
    }

    fn write(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        self.image()?.write(offset, bufs)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        self.image()?.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.image()?.discard(offset, len)
    }

    fn flush(&self) -> Result<(), Error> {
        self.image()?.flush()
    }

    fn rest(&self) -> Result<(), Error> {
        self.image()?.rest()
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        self.image()?.extent(offset, len)
    }

    fn info(&self) -> Result<ImageInfo, Error> {
        self.image()?.info()
    }

    fn resize(&self, size: u64) -> Result<(), Error> {
        self.image()?.resize(size)
    }

    fn plain(&self, offset: u64, len: u64, write: bool) -> Option<Plain<'_>> {
        self.image().ok()?.plain(offset, len, write)
    }
}
