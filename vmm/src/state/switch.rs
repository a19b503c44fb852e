//! A disk whose image changes under its guest: the engine sees one image all the time.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use images::{Error, Extent, Image, ImageInfo, IoBuf, Plain};

/// The image on top now.
#[derive(Debug)]
pub struct Top(RwLock<Arc<dyn Image>>);

impl Top {
    /// What a disk begins with.
    #[must_use]
    pub fn new(image: Arc<dyn Image>) -> Self {
        Self(RwLock::new(image))
    }

    fn image(&self) -> RwLockReadGuard<'_, Arc<dyn Image>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts another image of the same content in its place: the one before. No request is in flight.
    pub fn replace(&self, image: Arc<dyn Image>) -> Arc<dyn Image> {
        let mut now = self.0.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *now, image)
    }
}

impl Image for Top {
    fn size(&self) -> u64 {
        self.image().size()
    }

    fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        self.image().read(offset, bufs)
    }

    fn write(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        self.image().write(offset, bufs)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        self.image().write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.image().discard(offset, len)
    }

    fn flush(&self) -> Result<(), Error> {
        self.image().flush()
    }

    fn rest(&self) -> Result<(), Error> {
        self.image().rest()
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        self.image().extent(offset, len)
    }

    fn info(&self) -> Result<ImageInfo, Error> {
        self.image().info()
    }

    fn resize(&self, size: u64) -> Result<(), Error> {
        self.image().resize(size)
    }

    fn plain(&self, offset: u64, len: u64, write: bool) -> Option<Plain> {
        self.image().plain(offset, len, write)
    }

    fn claim(self: Arc<Self>, offset: u64, len: u64) -> Option<Plain> {
        let image = self.image().clone();
        image.claim(offset, len)
    }
}
