//! One open file or block device below an image.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::iovec::{self, AlignedBuf};
use crate::{Error, IoBuf};

/// The longest bounce buffer, bytes.
const BOUNCE: u64 = 1 << 20;
/// The most buffers the kernel takes in one call.
const IOV_MAX: usize = 1024;

/// What O_DIRECT demands: bytes, powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    /// Of addresses in memory.
    pub memory: u64,
    /// Of offsets and lengths.
    pub offset: u64,
}

/// An open regular file or block device, buffered or O_DIRECT (as its descriptor was opened).
/// Requests need no alignment: what O_DIRECT can't take goes through a buffer in between.
#[derive(Debug)]
pub struct File {
    file: std::fs::File,
    name: String,
    block: bool,
    writable: bool,
    direct: Option<Alignment>,
    /// Nobody waits for stable storage.
    volatile: bool,
    /// With O_DIRECT: held for writing by what reads a block, changes a part of it and writes it
    /// back; for reading by every other write.
    rmw: RwLock<()>,
    no_punch: AtomicBool,
    no_zero: AtomicBool,
    /// The offset of `mark`; 0: there is none.
    marked: AtomicU64,
    mark: Mutex<Option<Arc<dyn Mark>>>,
}

/// Who wants to know when a file is first written beyond a place in it.
pub trait Mark: Send + Sync + std::fmt::Debug {
    /// A write that ends at `end`, beyond `at`, begins. Called once, by the thread that writes.
    fn passed(&self, at: u64, end: u64);
}

impl File {
    /// Takes over an open descriptor; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is neither a regular file nor a block device or can't be read;
    /// [`Error::Io`] if the system doesn't tell.
    pub fn new(fd: OwnedFd, name: impl Into<String>) -> Result<Self, Error> {
        let (file, name) = (std::fs::File::from(fd), name.into());
        let said = |source| Error::Io {
            what: format!("looking at {name}"),
            source,
        };
        let meta = file.metadata().map_err(said)?;
        let block = meta.file_type().is_block_device();
        if !block && !meta.file_type().is_file() {
            return Err(Error::Invalid(format!(
                "{name} is neither a regular file nor a block device"
            )));
        }
        // SAFETY: F_GETFL has no argument and changes nothing.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(said(io::Error::last_os_error()));
        }
        if flags & libc::O_PATH != 0 || flags & libc::O_ACCMODE == libc::O_WRONLY {
            return Err(Error::Invalid(format!("{name} is not open for reading")));
        }
        let direct = (flags & libc::O_DIRECT != 0).then(|| alignment(&file, block));
        Ok(Self {
            writable: flags & libc::O_ACCMODE == libc::O_RDWR,
            file,
            name,
            block,
            direct,
            volatile: false,
            rmw: RwLock::new(()),
            no_punch: AtomicBool::new(false),
            no_zero: AtomicBool::new(false),
            marked: AtomicU64::new(0),
            mark: Mutex::default(),
        })
    }

    /// Opens `path`, buffered. For tools and tests: a VMM is handed its descriptors.
    ///
    /// # Errors
    /// The system's, and those of [`File::new`].
    pub fn open(path: &Path, writable: bool) -> Result<Self, Error> {
        let name = path.display().to_string();
        let file = OpenOptions::new()
            .read(true)
            .write(writable)
            .open(path)
            .map_err(|source| Error::Io {
                what: format!("opening {name}"),
                source,
            })?;
        Self::new(file.into(), name)
    }

    /// Creates `path` (which must not exist), empty, readable and writable.
    ///
    /// # Errors
    /// The system's.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let name = path.display().to_string();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|source| Error::Io {
                what: format!("creating {name}"),
                source,
            })?;
        Self::new(file.into(), name)
    }

    /// Nothing written to it has to be on stable storage at any time: the kernel writes it when it
    /// likes (QEMU's cache mode `unsafe`).
    #[must_use]
    pub fn volatile(mut self) -> Self {
        self.volatile = true;
        self
    }

    /// The name for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the descriptor was opened for writing too.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Whether it is a block device.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.block
    }

    /// What O_DIRECT demands; none when buffered.
    #[must_use]
    pub fn direct(&self) -> Option<Alignment> {
        self.direct
    }

    /// The descriptor, for locks and for I/O that others submit. Such writes must be aligned as
    /// [`File::is_aligned`] says.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn error(&self, what: &str, source: io::Error) -> Error {
        Error::Io {
            what: format!("{what} {}", self.name),
            source,
        }
    }

    /// Has the first write that ends beyond `at` told, once; in place of what was asked for before. 0: none is.
    pub fn set_mark(&self, at: u64, mark: Arc<dyn Mark>) {
        let mut own = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        *own = (at > 0).then_some(mark);
        self.marked.store(at, Ordering::Release);
    }

    /// The offset that no write has passed yet; 0: nobody asked.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.marked.load(Ordering::Acquire)
    }

    /// A write that ends at `end` begins.
    pub(crate) fn writing(&self, end: u64) {
        let at = self.marked.load(Ordering::Relaxed);
        if at == 0 || end <= at {
            return;
        }
        let mut own = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        // Another may have been asked for meanwhile, or another write was first.
        let at = self.marked.load(Ordering::Acquire);
        if at == 0 || end <= at {
            return;
        }
        self.marked.store(0, Ordering::Release);
        let mark = own.take();
        drop(own);
        if let Some(mark) = mark {
            mark.passed(at, end);
        }
    }

    fn check_writable(&self) -> Result<(), Error> {
        if self.writable {
            return Ok(());
        }
        Err(self.error("writing", io::Error::from_raw_os_error(libc::EROFS)))
    }

    /// Whether a request can go to the descriptor as it is.
    #[must_use]
    pub fn is_aligned(&self, offset: u64, bufs: &[IoBuf]) -> bool {
        let Some(align) = self.direct else {
            return true;
        };
        let mask = align.offset - 1;
        offset & mask == 0
            && bufs.iter().all(|buf| {
                buf.len() as u64 & mask == 0 && buf.base() as u64 & (align.memory - 1) == 0
            })
    }

    /// Size now, bytes.
    ///
    /// # Errors
    /// The system's.
    pub fn size(&self) -> Result<u64, Error> {
        if self.block {
            return self
                .seek(0, libc::SEEK_END)
                .map_err(|e| self.error("finding the size of", e));
        }
        Ok(self
            .file
            .metadata()
            .map_err(|e| self.error("finding the size of", e))?
            .len())
    }

    /// Bytes the host has given to it (a block device: all).
    ///
    /// # Errors
    /// The system's.
    pub fn allocated(&self) -> Result<u64, Error> {
        if self.block {
            return self.size();
        }
        let meta = self
            .file
            .metadata()
            .map_err(|e| self.error("finding the size of", e))?;
        Ok(meta.blocks().saturating_mul(512))
    }

    fn seek(&self, offset: u64, whence: i32) -> io::Result<u64> {
        let offset =
            i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: moves the descriptor's position, which nothing here uses.
        let at = unsafe { libc::lseek64(self.file.as_raw_fd(), offset, whence) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    }

    /// Fills `bufs` from `offset`; what lies past the end reads as zeroes.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        let len = iovec::total(bufs)?;
        let end = range_end(offset, len)?;
        if self.is_aligned(offset, bufs) {
            return self
                .read_plain(offset, bufs, len)
                .map_err(|e| self.error("reading", e));
        }
        let mask = self.direct.map_or(0, |align| align.offset - 1);
        let mut bounce = AlignedBuf::new((len + 2 * mask).min(BOUNCE) as usize)?;
        let mut at = offset;
        while at < end {
            let start = at & !mask;
            let stop = ((end + mask) & !mask).min((start + bounce.len() as u64) & !mask);
            let io = bounce.io((stop - start) as usize);
            self.read_plain(start, &[io], stop - start)
                .map_err(|e| self.error("reading", e))?;
            let next = stop.min(end);
            iovec::scatter(
                &iovec::part(bufs, at - offset, next - at),
                &bounce[(at - start) as usize..(next - start) as usize],
            );
            at = next;
        }
        Ok(())
    }

    fn read_plain(&self, offset: u64, bufs: &[IoBuf], len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let now = iovec::part(bufs, done, len - done);
            let count = now.len().min(IOV_MAX) as i32;
            // SAFETY: `IoBuf` is an iovec, each describing memory that is writable until this
            // request is complete; the call is synchronous.
            let got = unsafe {
                libc::preadv64(
                    self.file.as_raw_fd(),
                    now.as_ptr().cast(),
                    count,
                    (offset + done) as i64,
                )
            };
            match got {
                0 => {
                    iovec::zero(&now);
                    return Ok(());
                }
                1.. => done += got as u64,
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
            // O_DIRECT answers short only at the file's end.
            if done < len
                && self
                    .direct
                    .is_some_and(|align| done & (align.offset - 1) != 0)
            {
                iovec::zero(&iovec::part(bufs, done, len - done));
                return Ok(());
            }
        }
        Ok(())
    }

    /// Writes `bufs` at `offset`, past the end as well.
    ///
    /// # Errors
    /// The system's. Some of the bytes may have been written.
    pub fn write(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        self.check_writable()?;
        let len = iovec::total(bufs)?;
        let end = range_end(offset, len)?;
        self.writing(end);
        let Some(align) = self.direct else {
            return self
                .write_plain(offset, bufs, len)
                .map_err(|e| self.error("writing", e));
        };
        if self.is_aligned(offset, bufs) {
            let _shared = self.rmw.read().unwrap_or_else(PoisonError::into_inner);
            return self
                .write_plain(offset, bufs, len)
                .map_err(|e| self.error("writing", e));
        }
        let _alone = self.rmw.write().unwrap_or_else(PoisonError::into_inner);
        let mask = align.offset - 1;
        let size = self.size()?;
        let mut bounce = AlignedBuf::new((len + 2 * mask).min(BOUNCE) as usize)?;
        let mut at = offset;
        while at < end {
            let start = at & !mask;
            let stop = ((end + mask) & !mask).min((start + bounce.len() as u64) & !mask);
            let next = stop.min(end);
            let unit = (mask + 1) as usize;
            let length = (stop - start) as usize;
            if at != start {
                let io = bounce.io(unit);
                self.read_plain(start, &[io], mask + 1)
                    .map_err(|e| self.error("reading", e))?;
            }
            if next != stop && (length > unit || at == start) {
                let mut last = AlignedBuf::new(unit)?;
                let io = last.io(unit);
                self.read_plain(stop - mask - 1, &[io], mask + 1)
                    .map_err(|e| self.error("reading", e))?;
                bounce[length - unit..length].copy_from_slice(&last[..unit]);
            }
            iovec::gather(
                &iovec::part(bufs, at - offset, next - at),
                &mut bounce[(at - start) as usize..(next - start) as usize],
            );
            let io = bounce.io(length);
            self.write_plain(start, &[io], stop - start)
                .map_err(|e| self.error("writing", e))?;
            if stop > size.max(end) && !self.block {
                self.file
                    .set_len(size.max(end))
                    .map_err(|e| self.error("writing", e))?;
            }
            at = next;
        }
        Ok(())
    }

    fn write_plain(&self, offset: u64, bufs: &[IoBuf], len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let now = iovec::part(bufs, done, len - done);
            let count = now.len().min(IOV_MAX) as i32;
            // SAFETY: `IoBuf` is an iovec, each describing memory that is readable until this
            // request is complete; the call is synchronous.
            let put = unsafe {
                libc::pwritev64(
                    self.file.as_raw_fd(),
                    now.as_ptr().cast(),
                    count,
                    (offset + done) as i64,
                )
            };
            match put {
                0 => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                1.. => done += put as u64,
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Fills `data` from `offset`, as [`File::read`].
    ///
    /// # Errors
    /// As [`File::read`].
    pub fn read_bytes(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.read(offset, &[IoBuf::from_slice(data)])
    }

    /// Writes `data` at `offset`, as [`File::write`].
    ///
    /// # Errors
    /// As [`File::write`].
    pub fn write_bytes(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        // SAFETY: only read from, and borrowed until the call returns.
        self.write(
            offset,
            &[unsafe { IoBuf::new(data.as_ptr().cast_mut(), data.len()) }],
        )
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        loop {
            // SAFETY: works on our own descriptor only; no memory is involved.
            if unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, offset as i64, len as i64) }
                == 0
            {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Gives the space of whole blocks in the range back to the host; they read as zeroes then.
    /// False, and nothing has happened, where the host can't.
    ///
    /// # Errors
    /// The system's.
    pub fn punch(&self, offset: u64, len: u64) -> Result<bool, Error> {
        self.check_writable()?;
        range_end(offset, len)?;
        if len == 0 {
            return Ok(true);
        }
        if self.no_punch.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match self.fallocate(
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            len,
        ) {
            Ok(()) => Ok(true),
            Err(e) if unsupported(&e) => {
                // A block device says EINVAL to what is not aligned.
                if e.raw_os_error() != Some(libc::EINVAL) {
                    self.no_punch.store(true, Ordering::Relaxed);
                }
                Ok(false)
            }
            Err(e) => Err(self.error("punching a hole into", e)),
        }
    }

    /// Makes the range read as zeroes; with `unmap` its space may be given back. A regular file
    /// grows to its end if it is shorter.
    ///
    /// # Errors
    /// The system's.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        self.check_writable()?;
        let end = range_end(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.writing(end);
        let shared = self
            .direct
            .map(|_| self.rmw.read().unwrap_or_else(PoisonError::into_inner));
        let grow = !self.block && self.size()? < end;
        if unmap && self.punch(offset, len)? {
            return if grow { self.set_len(end) } else { Ok(()) };
        }
        if !self.no_zero.load(Ordering::Relaxed) {
            match self.fallocate(libc::FALLOC_FL_ZERO_RANGE, offset, len) {
                Ok(()) => return Ok(()),
                Err(e) if unsupported(&e) => {
                    if e.raw_os_error() != Some(libc::EINVAL) {
                        self.no_zero.store(true, Ordering::Relaxed);
                    }
                }
                Err(e) => return Err(self.error("zeroing", e)),
            }
        }
        drop(shared);
        let mut zeroes = AlignedBuf::new(len.min(BOUNCE) as usize)?;
        let mut at = offset;
        while at < end {
            // Pieces end on the buffer's size so that only the ends are misaligned.
            let stop = ((at / BOUNCE + 1) * BOUNCE)
                .min(end)
                .min(at + zeroes.len() as u64);
            let io = zeroes.io((stop - at) as usize);
            self.write(at, &[io])?;
            at = stop;
        }
        Ok(())
    }

    /// Writes zeroes, so that the host has given their space.
    ///
    /// # Errors
    /// The system's.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Error> {
        let end = range_end(offset, len)?;
        let mut zeroes = AlignedBuf::new(len.min(BOUNCE) as usize)?;
        let mut at = offset;
        while at < end {
            let count = (end - at).min(BOUNCE);
            let io = zeroes.io(count as usize);
            self.write(at, &[io])?;
            at += count;
        }
        Ok(())
    }

    /// What was just written is on its way to the disk from now on, which whoever is going to wait
    /// for all of it is glad of.
    pub(crate) fn begin_sync(&self, offset: u64, len: u64) {
        if self.volatile || self.direct.is_some() {
            return;
        }
        // SAFETY: works on our own descriptor only; no memory is involved. It is a hint: what
        // fails here is said by the sync.
        unsafe {
            libc::sync_file_range(
                self.file.as_raw_fd(),
                offset as i64,
                len as i64,
                libc::SYNC_FILE_RANGE_WRITE,
            )
        };
    }

    /// Has the host set aside space for the range, whose content stays; a regular file grows to
    /// its end if it is shorter. False where the host can't.
    ///
    /// # Errors
    /// The system's: a full disk.
    pub fn allocate(&self, offset: u64, len: u64) -> Result<bool, Error> {
        self.check_writable()?;
        range_end(offset, len)?;
        if self.block || len == 0 {
            return Ok(true);
        }
        match self.fallocate(0, offset, len) {
            Ok(()) => Ok(true),
            Err(e) if unsupported(&e) => Ok(false),
            Err(e) => Err(self.error("setting space aside for", e)),
        }
    }

    /// Whether there is data at `offset` (else a hole), and for how many bytes, at most `len`.
    /// Where the host doesn't know it is all data.
    ///
    /// # Errors
    /// The system's.
    pub fn data_at(&self, offset: u64, len: u64) -> Result<(bool, u64), Error> {
        if self.block {
            return Ok((true, len));
        }
        match self.seek(offset, libc::SEEK_DATA) {
            Ok(data) if data > offset => Ok((false, (data - offset).min(len))),
            Ok(_) => match self.seek(offset, libc::SEEK_HOLE) {
                Ok(hole) if hole > offset => Ok((true, (hole - offset).min(len))),
                _ => Ok((true, len)),
            },
            // Nothing but a hole up to the end, or the end.
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok((false, len)),
            Err(e) if unsupported(&e) => Ok((true, len)),
            Err(e) => Err(self.error("looking for data in", e)),
        }
    }

    /// Everything written so far reaches stable storage, unless the file is
    /// [volatile](File::volatile).
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&self) -> Result<(), Error> {
        if self.volatile {
            return Ok(());
        }
        self.file.sync_data().map_err(|e| self.error("flushing", e))
    }

    /// Changes a regular file's size; what is added is a hole.
    ///
    /// # Errors
    /// The system's; [`Error::Invalid`] for a block device.
    pub fn set_len(&self, len: u64) -> Result<(), Error> {
        self.check_writable()?;
        if self.block {
            return Err(Error::Invalid(format!(
                "{} is a block device: its size is fixed",
                self.name
            )));
        }
        self.file
            .set_len(len)
            .map_err(|e| self.error("changing the size of", e))
    }
}

/// Offsets in a file are signed.
fn range_end(offset: u64, len: u64) -> Result<u64, Error> {
    offset
        .checked_add(len)
        .filter(|&end| end <= i64::MAX as u64 - 2 * BOUNCE)
        .ok_or_else(|| {
            Error::Invalid(format!(
                "{len} bytes at {offset} are out of any file's range"
            ))
        })
}

fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY | libc::EINVAL)
    )
}

fn alignment(file: &std::fs::File, block: bool) -> Alignment {
    const MOST: u64 = AlignedBuf::ALIGN as u64;
    let sane = |value: u32| {
        let value = u64::from(value);
        (value.is_power_of_two() && value <= MOST).then_some(value)
    };
    if block {
        let mut sector: libc::c_int = 0;
        // SAFETY: BLKSSZGET writes one int at the address given.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET as _, &raw mut sector) };
        if let (0, Some(size)) = (done, u32::try_from(sector).ok().and_then(sane)) {
            return Alignment {
                memory: 512,
                offset: size.max(512),
            };
        }
        return Alignment {
            memory: MOST,
            offset: MOST,
        };
    }
    let mut said = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string (the descriptor itself is meant), and the kernel
    // writes one statx structure at the address given.
    let done = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            said.as_mut_ptr(),
        )
    };
    // SAFETY: zeroed above, which is a valid value; the kernel may have filled it.
    let said = unsafe { said.assume_init() };
    if done == 0
        && said.stx_mask & libc::STATX_DIOALIGN != 0
        && let (Some(memory), Some(offset)) = (
            sane(said.stx_dio_mem_align),
            sane(said.stx_dio_offset_align),
        )
    {
        return Alignment { memory, offset };
    }
    Alignment {
        memory: MOST,
        offset: MOST,
    }
}
