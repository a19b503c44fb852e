//! Raw images: the guest's bytes are the file's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::image::{Hold, Plain, check_range};
use crate::{Error, Extent, File, Image, ImageInfo, IoBuf, iovec};

/// A raw image: a file or block device, or a part of one.
#[derive(Debug)]
pub struct Raw {
    file: Arc<File>,
    /// Where in the file the image begins, bytes.
    start: u64,
    size: AtomicU64,
    /// The image ends where the file does, so it can be resized.
    whole: bool,
}

impl Raw {
    /// All of `file`.
    ///
    /// # Errors
    /// The host's I/O.
    pub fn new(file: File) -> Result<Self, Error> {
        let size = AtomicU64::new(file.size()?);
        Ok(Self {
            file: Arc::new(file),
            start: 0,
            size,
            whole: true,
        })
    }

    /// `size` bytes of `file` from `start` on.
    ///
    /// # Errors
    /// The host's I/O; [`Error::Invalid`] when the file is shorter.
    pub fn part(file: File, start: u64, size: u64) -> Result<Self, Error> {
        let have = file.size()?;
        if start.checked_add(size).is_none_or(|end| end > have) {
            return Err(Error::Invalid(format!(
                "{}: {size} bytes at {start} are not in its {have} bytes",
                file.name()
            )));
        }
        Ok(Self {
            file: Arc::new(file),
            start,
            size: AtomicU64::new(size),
            whole: false,
        })
    }

    /// As [`Image::resize`], where the host sets the space of what is added aside, or (`full`)
    /// zeroes are written there.
    ///
    /// # Errors
    /// As [`Image::resize`]; [`Error::Invalid`] where the host can't. The size is then as it was.
    pub fn grow(&self, size: u64, full: bool) -> Result<(), Error> {
        let old = self.size();
        self.resize(size)?;
        if size <= old || self.file.is_block_device() {
            return Ok(());
        }
        let done = if full {
            self.file.write_zeroes(old, size - old)
        } else {
            match self.file.allocate(old, size - old) {
                Ok(true) => Ok(()),
                Ok(false) => Err(Error::Invalid(format!(
                    "{}: the host can't set space aside here",
                    self.file.name()
                ))),
                Err(error) => Err(error),
            }
        };
        if let Err(error) = done {
            self.resize(old)?;
            return Err(error);
        }
        Ok(())
    }

    /// The file below.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Image for Raw {
    fn own_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        check_range(self, offset, iovec::total(bufs)?)?;
        self.file.read(self.start + offset, bufs)
    }

    fn write(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        check_range(self, offset, iovec::total(bufs)?)?;
        self.file.write(self.start + offset, bufs)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        check_range(self, offset, len)?;
        self.file.zero(self.start + offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        check_range(self, offset, len)?;
        self.file.punch(self.start + offset, len).map(|_| ())
    }

    fn flush(&self) -> Result<(), Error> {
        self.file.sync()
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        check_range(self, offset, len)?;
        let (data, len) = self.file.data_at(self.start + offset, len)?;
        Ok(Extent {
            start: offset,
            len,
            zero: !data,
            data,
            present: true,
            compressed: false,
            depth: 0,
            offset: Some(self.start + offset),
        })
    }

    fn info(&self) -> Result<ImageInfo, Error> {
        Ok(ImageInfo {
            virtual_size: self.size(),
            allocated: self.file.allocated()?,
            end: self.start + self.size(),
            cluster_size: None,
        })
    }

    fn resize(&self, size: u64) -> Result<(), Error> {
        if !self.whole {
            return Err(Error::Invalid(format!(
                "{} is a part of a file: its size is fixed",
                self.file.name()
            )));
        }
        if self.file.is_block_device() {
            // The device has been resized already, or not at all.
            if size > self.file.size()? {
                return Err(Error::Invalid(format!(
                    "{} is smaller than {size} bytes",
                    self.file.name()
                )));
            }
        } else {
            self.file.set_len(size)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn plain(&self, offset: u64, len: u64, write: bool) -> Option<Plain> {
        check_range(self, offset, len).ok()?;
        (!write || self.file.writable())
            .then(|| Plain::new(self.file.clone(), self.start + offset, Hold::None))
    }
}
