//! Copying an image's content into another one: read, looked through for zeroes and written in
//! pieces, by several threads.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use crate::iovec::{self, AlignedBuf};
use crate::workers::{self, Turns};
use crate::{Error, Extent, Image, ImageInfo, IoBuf, Job, Qcow2};

/// What moves at once, bytes: small enough to stay in a processor's cache.
const PIECE: u64 = 1 << 20;
/// The least that moves at once, bytes.
const PIECE_LEAST: u64 = 64 << 10;
/// The least that the host is asked to set aside at once, bytes.
const SET_ASIDE: u64 = 256 << 10;
/// The most that is compressed at once, bytes.
const COMPRESSED_PIECE: u64 = 2 << 20;

/// Called for what could not be read, and is taken as zeroes: where, and why.
pub type Salvage<'a> = &'a (dyn Fn(u64, &Error) + Sync);

/// Where the content goes.
#[derive(Debug, Clone)]
pub struct Target {
    /// The image.
    pub image: Arc<dyn Image>,
    /// The same, if it is a qcow2 image.
    pub qcow2: Option<Arc<Qcow2>>,
    /// All of it reads as zeroes, so that zeroes need not be written.
    pub zeroed: bool,
}

/// How it is copied.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Runs of so many zero bytes are not stored; 0 to look for none, and to write everything.
    pub sparse: u64,
    /// Threads.
    pub parallel: usize,
    /// What each of them moves at once, bytes: a power of two of 64 KiB at least.
    pub piece: u64,
    /// Pieces may be written in another order than that of their offsets.
    pub any_order: bool,
    /// Written in compressed form.
    pub compress: bool,
    /// Only what is decided in the first so many images of the source; the rest of the target
    /// stays as it is.
    pub depth: Option<u32>,
    /// The kernel copies from file to file where it can; sharing the data where the file system
    /// can. Zeroes are then not looked for.
    pub copy_range: bool,
    /// What can't be read is taken as zeroes.
    pub salvage: Option<Salvage<'a>>,
}

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("sparse", &self.sparse)
            .field("parallel", &self.parallel)
            .finish_non_exhaustive()
    }
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            sparse: 4096,
            parallel: threads(8),
            piece: PIECE,
            any_order: false,
            compress: false,
            depth: None,
            copy_range: false,
            salvage: None,
        }
    }
}

/// At most `most` threads, and no more than are of use on this host.
#[must_use]
pub fn threads(most: usize) -> usize {
    let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    most.clamp(1, processors.max(2))
}

/// One after another, seen as one image that can be read.
#[derive(Debug)]
pub struct Concat {
    parts: Vec<(u64, Arc<dyn Image>)>,
    size: u64,
}

impl Concat {
    /// All of `images`.
    #[must_use]
    pub fn new(images: Vec<Arc<dyn Image>>) -> Self {
        let mut size = 0;
        let parts = images
            .into_iter()
            .map(|image| {
                let start = size;
                size += image.size();
                (start, image)
            })
            .collect();
        Self { parts, size }
    }

    /// The image that has this offset, and where it begins.
    fn part(&self, offset: u64) -> Option<&(u64, Arc<dyn Image>)> {
        self.parts
            .iter()
            .find(|(start, image)| (*start..start + image.size()).contains(&offset))
    }
}

fn read_only() -> Error {
    Error::Io {
        what: "writing to images one after another".into(),
        source: std::io::Error::from_raw_os_error(libc::EROFS),
    }
}

impl Image for Concat {
    fn size(&self) -> u64 {
        self.size
    }
    fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        let len = iovec::total(bufs)?;
        crate::image::check_range(self, offset, len)?;
        let mut done = 0;
        while done < len {
            let Some((start, image)) = self.part(offset + done) else {
                break;
            };
            let within = offset + done - start;
            let count = (image.size() - within).min(len - done);
            image.read(within, &iovec::part(bufs, done, count))?;
            done += count;
        }
        Ok(())
    }
    fn write(&self, _: u64, _: &[IoBuf]) -> Result<(), Error> {
        Err(read_only())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), Error> {
        Err(read_only())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), Error> {
        Err(read_only())
    }
    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }
    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        crate::image::check_range(self, offset, len)?;
        let (start, image) = self
            .part(offset)
            .ok_or_else(|| Error::Invalid("an extent has at least one byte".into()))?;
        let within = offset - start;
        let extent = image.extent(within, len.min(image.size() - within))?;
        Ok(Extent {
            start: offset,
            ..extent
        })
    }
    fn info(&self) -> Result<ImageInfo, Error> {
        Ok(ImageInfo {
            virtual_size: self.size,
            ..ImageInfo::default()
        })
    }
    fn resize(&self, _: u64) -> Result<(), Error> {
        Err(read_only())
    }
}

/// A part of the image that is handled in one way.
#[derive(Debug, Clone, Copy)]
struct Piece {
    turn: u64,
    offset: u64,
    len: u64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Zero,
}

/// The extent at `offset`, joined with those after it that are alike; `cut` must say what matters.
pub(crate) fn joined<T: PartialEq>(
    image: &dyn Image,
    offset: u64,
    most: u64,
    kind: impl Fn(&Extent) -> T,
) -> Result<(T, u64), Error> {
    let first = image.extent(offset, most)?;
    let what = kind(&first);
    let mut len = first.len;
    while len < most {
        let next = image.extent(offset + len, most - len)?;
        if kind(&next) != what {
            break;
        }
        len += next.len;
    }
    Ok((what, len))
}

/// How far ahead the source's tables are looked at, bytes.
const AHEAD: u64 = 64 << 30;

/// Copies all of `source` to the beginning of the target.
///
/// # Errors
/// [`Error::Invalid`] if the target is smaller, [`Error::Cancelled`], the host's I/O. Some of it
/// may have been copied.
pub fn convert(
    source: &Arc<dyn Image>,
    target: &Target,
    options: &Options<'_>,
    job: &Job,
) -> Result<(), Error> {
    let size = source.size();
    if target.image.size() < size {
        return Err(Error::Invalid(
            "the target is smaller than the source".into(),
        ));
    }
    let packer = match (&target.qcow2, options.compress) {
        (Some(qcow2), true) if qcow2.header().has_data_file() => {
            return Err(Error::Invalid(
                "nothing in an external data file is compressed".into(),
            ));
        }
        (Some(qcow2), true) => Some(qcow2),
        (None, true) => {
            return Err(Error::Invalid(
                "only qcow2 images are written in compressed form".into(),
            ));
        }
        _ => None,
    };
    job.more(size);
    let unit = target.qcow2.as_ref().map_or(1, |qcow2| qcow2.unit());
    let cluster = packer.map_or(0, |qcow2| 1 << qcow2.header().cluster_bits);
    let piece = if packer.is_some() {
        COMPRESSED_PIECE.max(cluster)
    } else {
        options.piece.next_power_of_two().clamp(PIECE_LEAST, PIECE)
    };
    // `None` is not to be touched.
    let kind = |extent: &Extent| {
        // What is not there above `depth` is past the end of a shorter image, and reads as zeroes.
        if options.depth.is_some_and(|depth| extent.depth >= depth) {
            None
        } else if extent.zero && options.sparse > 0 {
            Some(Kind::Zero)
        } else {
            Some(Kind::Data)
        }
    };
    let (mut at, mut turn) = (0, 0);
    // What the tables say from `at` on, as far as it was looked at.
    let mut known = (None, 0);
    let next = || {
        while at < size {
            if known.1 == 0 {
                known = joined(&**source, at, (size - at).min(AHEAD), kind)?;
            }
            let mut now = known.0;
            let mut len = if now == Some(Kind::Data) {
                // Pieces end where clusters do.
                known.1.min(piece - at % piece)
            } else {
                known.1
            };
            if cluster > 0 {
                // Whole clusters, of which a part may be data.
                let end = (at + len).min(size);
                let whole = if end == size {
                    end
                } else {
                    end & !(cluster - 1)
                };
                if whole <= at || now == Some(Kind::Data) && end % cluster != 0 && end < size {
                    now = Some(Kind::Data);
                    len = end.next_multiple_of(cluster).min(size) - at;
                } else {
                    len = whole - at;
                }
            }
            let offset = at;
            at += len;
            known.1 = known.1.saturating_sub(len);
            let kind = match now {
                Some(kind) if kind == Kind::Data || !target.zeroed => kind,
                // Nobody has to wait for what is not done.
                _ => {
                    job.advance(len, 0)?;
                    continue;
                }
            };
            turn += 1;
            return Ok(Some(Piece {
                turn: turn - 1,
                offset,
                len,
                kind,
            }));
        }
        Ok(None)
    };
    let turns = Turns::default();
    // What has clusters gets them in the order of their offsets, unless that doesn't matter.
    let in_order = !options.any_order && target.qcow2.is_some();
    let copy = Copy {
        source: &**source,
        target,
        options,
        packer: packer.map(|qcow2| (&**qcow2, cluster)),
        granule: options.sparse.max(unit).next_power_of_two().min(piece),
        turns: in_order.then_some(&turns),
        job,
    };
    workers::run(options.parallel, next, |one| {
        let done = copy.piece(one);
        if done.is_err() {
            turns.fail();
        }
        done
    })
}

thread_local! {
    static BUFFER: RefCell<Option<AlignedBuf>> = const { RefCell::new(None) };
}

/// Each thread's buffer, `len` bytes at least.
pub(crate) fn with_buffer<T>(
    len: u64,
    run: impl FnOnce(&mut AlignedBuf) -> Result<T, Error>,
) -> Result<T, Error> {
    BUFFER.with(|cell| {
        let mut buffer = match cell.take() {
            Some(buffer) if buffer.len() as u64 >= len => buffer,
            _ => AlignedBuf::new(len as usize)?,
        };
        let result = run(&mut buffer);
        cell.replace(Some(buffer));
        result
    })
}

struct Copy<'a> {
    source: &'a dyn Image,
    target: &'a Target,
    options: &'a Options<'a>,
    packer: Option<(&'a Qcow2, u64)>,
    granule: u64,
    turns: Option<&'a Turns>,
    job: &'a Job,
}

impl Copy<'_> {
    fn piece(&self, one: Piece) -> Result<(), Error> {
        self.job.check()?;
        let moved = match one.kind {
            Kind::Zero => {
                self.in_turn(one.turn, || self.zero(one.offset, one.len))?;
                0
            }
            Kind::Data if self.copied_by_kernel(&one)? => one.len,
            Kind::Data => with_buffer(one.len, |buffer| {
                let data = &mut buffer[..one.len as usize];
                self.read(one.offset, data)?;
                match self.packer {
                    Some((qcow2, cluster)) => self.pack(qcow2, cluster, &one, data),
                    None => self.in_turn(one.turn, || self.write(one.offset, data)),
                }?;
                Ok(one.len)
            })?,
        };
        self.job.advance(one.len, moved)
    }

    /// Runs `what` after all pieces before this one, where that matters.
    fn in_turn(&self, turn: u64, what: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let Some(turns) = self.turns else {
            return what();
        };
        if !turns.wait(turn) {
            return Err(Error::Cancelled);
        }
        what()?;
        turns.done(turn);
        Ok(())
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let buf = IoBuf::from_slice(data);
        match (self.source.read(offset, &[buf]), self.options.salvage) {
            (Ok(()), _) => Ok(()),
            (Err(error), None) => Err(error),
            (Err(_), Some(salvage)) => {
                for at in (0..data.len()).step_by(512) {
                    let sector = buf.part(at, 512);
                    if let Err(error) = self.source.read(offset + at as u64, &[sector]) {
                        salvage(offset + at as u64, &error);
                        iovec::zero(&[sector]);
                    }
                }
                Ok(())
            }
        }
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), Error> {
        if self.target.zeroed {
            return Ok(());
        }
        self.target.image.write_zeroes(offset, len, true)
    }

    /// Writes what is not zero in runs.
    fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let len = data.len() as u64;
        let all = IoBuf::from_slice(data);
        if self.options.sparse == 0 {
            return self.target.image.write(offset, &[all]);
        }
        let mut at = 0;
        // None so far; else whether it is of zeroes, and where it began.
        let mut run: Option<(bool, u64)> = None;
        let put = |zero: bool, from: u64, to: u64| {
            if zero {
                self.zero(offset + from, to - from)
            } else {
                let part = all.part(from as usize, (to - from) as usize);
                self.set_aside(offset + from, to - from)?;
                self.target.image.write(offset + from, &[part])
            }
        };
        while at < len {
            // Runs begin at the target's granules.
            let stop = len.min(at + self.granule - (offset + at) % self.granule);
            let zero = iovec::is_zero(&data[at as usize..stop as usize]);
            match run {
                Some((was, _)) if was == zero => {}
                Some((was, from)) => {
                    put(was, from, at)?;
                    run = Some((zero, at));
                }
                None => run = Some((zero, at)),
            }
            at = stop;
        }
        match run {
            Some((zero, from)) => put(zero, from, len),
            None => Ok(()),
        }
    }

    /// Has the host set space aside in a new raw image: one call for all of it, and a write that
    /// costs less. (A qcow2 image does it for itself.)
    fn set_aside(&self, offset: u64, len: u64) -> Result<(), Error> {
        let raw = self.target.zeroed && self.target.qcow2.is_none();
        if !raw || len < SET_ASIDE {
            return Ok(());
        }
        match self.target.image.plain(offset, len, true) {
            Some(place) => place.file().allocate(place.offset(), len).map(drop),
            None => Ok(()),
        }
    }

    fn pack(&self, qcow2: &Qcow2, cluster: u64, one: &Piece, data: &mut [u8]) -> Result<(), Error> {
        let mut packed = Vec::new();
        for part in data.chunks(cluster as usize) {
            packed.push(if iovec::is_zero(part) && self.options.sparse > 0 {
                None
            } else {
                Some(qcow2.compress(part))
            });
        }
        self.in_turn(one.turn, || {
            let parts = data.chunks(cluster as usize).zip(packed);
            for (n, (part, packed)) in parts.enumerate() {
                let at = one.offset + n as u64 * cluster;
                match packed {
                    None => self.zero(at, part.len() as u64)?,
                    Some(packed) => qcow2.write_packed(at, part, packed)?,
                }
            }
            Ok(())
        })
    }

    /// Whether the kernel has copied the piece from file to file.
    fn copied_by_kernel(&self, one: &Piece) -> Result<bool, Error> {
        if !self.options.copy_range {
            return Ok(false);
        }
        let (Some(from), Some(to)) = (
            self.source.plain(one.offset, one.len, false),
            self.target.image.plain(one.offset, one.len, true),
        ) else {
            return Ok(false);
        };
        let (mut read, mut write) = (from.offset() as i64, to.offset() as i64);
        let mut left = one.len;
        while left > 0 {
            // SAFETY: two descriptors that are open as long as `from` and `to` live, and two
            // offsets that the call changes.
            let done = unsafe {
                libc::copy_file_range(
                    from.file().fd().as_raw_fd(),
                    &raw mut read,
                    to.file().fd().as_raw_fd(),
                    &raw mut write,
                    left as usize,
                    0,
                )
            };
            match u64::try_from(done) {
                // The source's file ends here, or the two can't: the ordinary way.
                Ok(0) => return Ok(false),
                Ok(done) => left -= done.min(left),
                Err(_) => {
                    let error = std::io::Error::last_os_error();
                    match error.raw_os_error() {
                        Some(libc::EINTR) => {}
                        Some(
                            libc::EXDEV
                            | libc::ENOSYS
                            | libc::EOPNOTSUPP
                            | libc::EINVAL
                            | libc::ETXTBSY,
                        ) => return Ok(false),
                        _ => {
                            return Err(Error::Io {
                                what: format!("copying to {}", to.file().name()),
                                source: error,
                            });
                        }
                    }
                }
            }
        }
        drop((from, to));
        self.in_turn(one.turn, || Ok(()))?;
        Ok(true)
    }
}
