//! What every image can do.

use std::sync::Arc;

use crate::{Error, File};

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

    /// All of `memory`. The borrow ends with this call: who uses the buffer keeps the memory
    /// until the request is complete, as every synchronous request does by itself.
    #[must_use]
    pub(crate) fn from_slice(memory: &mut [u8]) -> Self {
        // SAFETY: inside this crate a buffer made from a slice is used in synchronous requests
        // only, within the slice's life.
        unsafe { Self::new(memory.as_mut_ptr(), memory.len()) }
    }

    /// `len` bytes of it from byte `start` on; fewer when it ends sooner.
    #[must_use]
    pub fn part(&self, start: usize, len: usize) -> Self {
        let start = start.min(self.len());
        Self(libc::iovec {
            iov_base: self.base().wrapping_add(start).cast(),
            iov_len: len.min(self.len() - start),
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

/// Where a request can go as one plain read or write of a file. As long as this is kept, the
/// place belongs to those guest bytes: the request must be complete before it is dropped.
#[derive(Debug)]
pub struct Plain {
    file: Arc<File>,
    offset: u64,
    hold: Hold,
}

/// What keeps the place of a [`Plain`].
#[derive(Debug)]
pub(crate) enum Hold {
    /// Nothing has to.
    None,
    /// It is the bytes' own for now.
    Stay { _stay: crate::grace::Stay },
    /// It becomes theirs.
    Mapping(Box<dyn Mapping>),
}

/// The second step of a write to a new place. Dropped instead, the place is given back.
pub(crate) trait Mapping: Send + std::fmt::Debug {
    /// The bytes are there: the place becomes that of the guest's bytes.
    fn written(self: Box<Self>) -> Result<(), Error>;
}

impl Hold {
    /// The request is complete, all of it.
    pub(crate) fn end(self) -> Result<(), Error> {
        match self {
            Self::None | Self::Stay { .. } => Ok(()),
            Self::Mapping(mapping) => mapping.written(),
        }
    }
}

impl Plain {
    pub(crate) fn new(file: Arc<File>, offset: u64, hold: Hold) -> Self {
        Self { file, offset, hold }
    }

    /// The file. A request that [`File::is_aligned`] refuses must go the ordinary way.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Offset in the file, bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The request is complete, all of it.
    ///
    /// # Errors
    /// A write's place could not be made that of the guest's bytes: it has not happened.
    pub fn end(self) -> Result<(), Error> {
        self.hold.end()
    }

    /// What keeps the place, for who keeps the image himself.
    pub(crate) fn into_hold(self) -> Hold {
        self.hold
    }
}

/// Encrypts what an image stores, sector by sector of 512 bytes.
pub trait Cipher: Send + Sync + std::fmt::Debug {
    /// Decrypts `data`, whole sectors, in place. `offset` in bytes, a multiple of 512, says which
    /// sector is the first: for a LUKS image the offset in its payload, for qcow2 the offset in
    /// the file that stores the sector (its specification's "physical disk sector").
    fn decrypt(&self, offset: u64, data: &mut [u8]);

    /// The reverse of [`Cipher::decrypt`].
    fn encrypt(&self, offset: u64, data: &mut [u8]);
}

/// `len` bytes at `offset` must lie in the image.
pub(crate) fn check_range(
    image: &(impl Image + ?Sized),
    offset: u64,
    len: u64,
) -> Result<(), Error> {
    let size = image.size();
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(Error::Invalid(format!(
            "{len} bytes at {offset} are not in the image of {size} bytes"
        )));
    }
    Ok(())
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

    /// Everything is written, and the files are as if this image had been closed: somebody else may
    /// open them. It may be used again if nobody has written them meanwhile.
    ///
    /// # Errors
    /// The host's I/O.
    fn rest(&self) -> Result<(), Error> {
        self.flush()
    }

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

    /// Changes the size; what is added reads as zeroes (of a LUKS volume: as noise, as all of a new
    /// one does).
    ///
    /// # Errors
    /// As [`Image::write`]; `Error::Invalid` where the format can't.
    fn resize(&self, size: u64) -> Result<(), Error>;

    /// The file that stores it; none where it is no single image.
    fn own_file(&self) -> Option<&File> {
        None
    }

    /// Where a request for these bytes can go as one plain I/O, without this image's help; none
    /// when it can't. Nothing but the bytes themselves may have to change for a write.
    fn plain(&self, offset: u64, len: u64, write: bool) -> Option<Plain> {
        let _ = (offset, len, write);
        None
    }

    /// As [`Image::plain`] for a write to bytes that have no place yet, where one can be found
    /// without waiting for anything: it becomes theirs with [`Plain::end`], and is given back if
    /// the [`Plain`] is dropped instead. Until then whoever else writes to the same clusters waits.
    fn claim(self: Arc<Self>, offset: u64, len: u64) -> Option<Plain> {
        let _ = (offset, len);
        None
    }
}

/// Fills `data` from `offset` of an image.
///
/// # Errors
/// As [`Image::read`].
pub fn read_bytes(image: &dyn Image, offset: u64, data: &mut [u8]) -> Result<(), Error> {
    image.read(offset, &[IoBuf::from_slice(data)])
}
