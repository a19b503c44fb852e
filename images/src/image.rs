//! What every image can do.

use crate::Error;

/// A piece of memory that is read into or written from: host memory of the caller's, or guest
/// RAM, which others may change at any time. Never turned into a Rust reference.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct IoBuf(libc::iovec);

// SAFETY: an address and a length; who uses it keeps the promise made to `IoBuf::new`.
unsafe impl Send for IoBuf {}
// SAFETY: as above.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// `len` bytes at `base`.
    ///
    /// # Safety
    /// They stay mapped, readable and (for reads into them) writable until the request they are
    /// used in is complete.
    #[must_use]
    pub unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    }

    /// Address of the first byte.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// No bytes at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }
}

/// What a range of an image's content is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Guest offset, bytes.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Reads as zeroes.
    pub zero: bool,
    /// Stored in the file (a hole of a sparse raw file is not).
    pub data: bool,
    /// Decided in this image or one behind it (qcow2: allocated; raw: always).
    pub present: bool,
    /// Stored compressed.
    pub compressed: bool,
    /// How many images down the chain: 0 is this one.
    pub depth: u32,
    /// Offset in that image's file, where it is stored plainly.
    pub offset: Option<u64>,
}

/// What an image says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Size the guest sees, bytes.
    pub virtual_size: u64,
    /// Bytes the host has given to the file.
    pub allocated: u64,
    /// Highest byte offset in use in the file.
    pub end: u64,
    /// Cluster size in bytes, where there are clusters.
    pub cluster_size: Option<u64>,
}

/// An image, with everything behind it. Calls may come from several threads at once: two
/// requests that touch the same bytes happen in some order, or mixed by sectors, as on a disk.
///
/// Offsets and lengths are bytes, need no alignment, and must lie in the image (`Error::Invalid`
/// otherwise, and nothing happens). A write that was answered is seen by every later read; it is
/// on stable storage after a later [`Image::flush`] has answered.
pub trait Image: Send + Sync + std::fmt::Debug {
    /// Size the guest sees, bytes.
    fn size(&self) -> u64;

    /// Fills `bufs` from `offset`.
    ///
    /// # Errors
    /// The host's I/O, a corrupt image. Some of the bytes may have been read.
    fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error>;

    /// Writes `bufs` at `offset`.
    ///
    /// # Errors
    /// The host's I/O, a corrupt or read-only image. Some of the bytes may have been written.
    fn write(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error>;

    /// `len` bytes at `offset` read as zeroes from now on; with `unmap` their space may be given
    /// back.
    ///
    /// # Errors
    /// As [`Image::write`].
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error>;

    /// The guest does not need these bytes any more: what they read as afterwards is either the
    /// same as before or zeroes, and their space may be given back.
    ///
    /// # Errors
    /// As [`Image::write`].
    fn discard(&self, offset: u64, len: u64) -> Result<(), Error>;

    /// Everything answered so far reaches stable storage, metadata included.
    ///
    /// # Errors
    /// The host's I/O.
    fn flush(&self) -> Result<(), Error>;

    /// The extent that begins at `offset`, at most `len` bytes of it.
    ///
    /// # Errors
    /// As [`Image::read`].
    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error>;

    /// What it says of itself now.
    ///
    /// # Errors
    /// The host's I/O.
    fn info(&self) -> Result<ImageInfo, Error>;

    /// Changes the size; what is added reads as zeroes.
    ///
    /// # Errors
    /// As [`Image::write`]; `Error::Invalid` where the format can't.
    fn resize(&self, size: u64) -> Result<(), Error>;
}
