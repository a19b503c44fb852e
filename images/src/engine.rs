//! Runs requests against an image, many at a time.
//!
//! ```text
//!   a virtio queue's thread:  Queue::submit ... submit, Queue::complete, wait for Queue::fd
//!                                |
//!        limits hold it back? -- waits in the Queue until Queue::deadline
//!                                |
//!     a plain place in a file?   |      else
//!       page cache: done at once |    Pool: worker threads call the Image
//!       io_uring, O_DIRECT: Ring |
//! ```
//!
//! What the page cache can serve without waiting is done in `submit` itself: two system calls and
//! two switches between threads less. Everything else is done elsewhere, and never makes the
//! caller wait. Requests in flight are in no order to each other, as on a disk.
//!
//! System calls beyond those of [`crate::File`], for whoever filters them: `io_uring_setup`,
//! `io_uring_enter`, `preadv2`, `pwritev2`, `eventfd2`, `poll`.

mod pool;
mod queue;
mod ring;
mod stats;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::limits::{Limits, Throttle};
use crate::{Error, Image, IoBuf};

pub use pool::Pool;
pub use queue::Queue;
pub use stats::{OpStats, Stats};

/// A disk's cache mode (`<driver cache=...>`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// No page cache of the host's; durable after a flush.
    None,
    /// The host's page cache; durable after a flush.
    #[default]
    Writeback,
    /// The host's page cache; a write is durable when it is answered.
    Writethrough,
    /// No page cache; a write is durable when it is answered.
    DirectSync,
    /// The host's page cache; flushes are not carried out. For images that can be thrown away.
    Unsafe,
}

impl Cache {
    /// Whether the image's files are to be opened with O_DIRECT.
    #[must_use]
    pub fn direct(self) -> bool {
        matches!(self, Self::None | Self::DirectSync)
    }

    /// Whether every write is flushed before it is answered, so that the guest sees a disk
    /// without a write cache.
    #[must_use]
    pub fn writethrough(self) -> bool {
        matches!(self, Self::Writethrough | Self::DirectSync)
    }
}

/// How I/O is done (`<driver io=...>`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Aio {
    /// Worker threads.
    #[default]
    Threads,
    /// The kernel's asynchronous I/O: io_uring, where what `native` promises is done too.
    Ring,
}

/// What to do with writes of zeroes (`<driver detect_zeroes=...>`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Written like anything else.
    #[default]
    Off,
    /// Turned into "write zeroes", which needs less I/O.
    On,
    /// The same, and their space is given back (where discarding is allowed).
    Unmap,
}

/// How a disk is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Cache mode. The files must have been opened to match: [`Cache::direct`].
    pub cache: Cache,
    /// Mechanism.
    pub aio: Aio,
    /// Discards reach the image (else they are answered and nothing happens).
    pub discard: bool,
    /// Writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Whatever would change the image fails with EROFS.
    pub read_only: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Fills the buffers.
    Read,
    /// Writes the buffers.
    Write,
    /// What was answered before becomes durable.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range reads as zeroes from now on.
    WriteZeroes {
        /// Its space may be given back.
        unmap: bool,
    },
}

impl Op {
    fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Flush)
    }
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// What.
    pub op: Op,
    /// Where, in bytes.
    pub offset: u64,
    /// Bytes, for [`Op::Discard`] and [`Op::WriteZeroes`] (else 0).
    pub len: u64,
    /// Memory, for [`Op::Read`] and [`Op::Write`] (else empty): valid until the request's
    /// [`Completion`] has been taken, or the queue's keeper is dropped.
    pub bufs: Vec<IoBuf>,
    /// Whatever the caller wants to find again in the completion.
    pub token: u64,
}

impl Request {
    /// Bytes it is about.
    fn bytes(&self) -> u64 {
        match self.op {
            Op::Read | Op::Write => self
                .bufs
                .iter()
                .fold(0_u64, |sum, buf| sum.saturating_add(buf.len() as u64)),
            _ => self.len,
        }
    }
}

/// A request's end.
#[derive(Debug)]
pub struct Completion {
    /// The request's token.
    pub token: u64,
    /// How it went; [`Error::errno`] for those who answer with a number.
    pub result: Result<(), Error>,
}

/// An image with the means to run requests on it. Shared by a disk's queues.
#[derive(Debug)]
pub struct Engine {
    image: Arc<dyn Image>,
    options: Options,
    writethrough: AtomicBool,
    stats: Stats,
    meter: Mutex<Arc<Meter>>,
    /// How often that has changed.
    meters: AtomicU64,
    pool: Arc<Pool>,
}

/// Limits with what was done against them: of one engine, or of several that share them.
#[derive(Debug)]
pub struct Meter {
    /// There are limits: `throttle` has to be asked.
    limited: AtomicBool,
    throttle: Mutex<Throttle>,
    /// What the throttle's times count from.
    epoch: Instant,
}

impl Default for Meter {
    /// Without limits.
    fn default() -> Self {
        Self {
            limited: AtomicBool::new(false),
            throttle: Mutex::new(Throttle::new(Limits::default(), 0)),
            epoch: Instant::now(),
        }
    }
}

impl Meter {
    fn limited(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    /// [`Throttle::admit`], now.
    fn admit(&self, write: bool, bytes: u64) -> Result<(), u64> {
        self.throttle().admit(write, bytes, self.now())
    }

    fn set(&self, limits: Limits) {
        *self.throttle() = Throttle::new(limits, self.now());
        self.limited.store(!limits.none(), Ordering::Release);
    }

    fn throttle(&self) -> MutexGuard<'_, Throttle> {
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nanoseconds since it was made: enough for 584 years.
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }
}

impl Engine {
    /// An engine at rest: threads begin with the first requests that need them.
    #[must_use]
    pub fn new(image: Arc<dyn Image>, options: Options) -> Arc<Self> {
        Self::sharing(image, options, Arc::default(), Arc::default())
    }

    /// The same, with limits and threads that other engines may have too.
    #[must_use]
    pub fn sharing(
        image: Arc<dyn Image>,
        options: Options,
        meter: Arc<Meter>,
        pool: Arc<Pool>,
    ) -> Arc<Self> {
        Arc::new(Self {
            image,
            options,
            writethrough: AtomicBool::new(options.cache.writethrough()),
            stats: Stats::default(),
            meter: Mutex::new(meter),
            meters: AtomicU64::new(0),
            pool,
        })
    }

    /// A queue to submit requests to, for one thread. `keeper` is kept alive as long as any
    /// request may touch its memory, even beyond the queue's drop.
    ///
    /// # Errors
    /// The kernel's refusal of an eventfd.
    pub fn queue(self: &Arc<Self>, keeper: Arc<dyn Send + Sync>) -> Result<Queue, Error> {
        Queue::new(self.clone(), keeper)
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &Arc<dyn Image> {
        &self.image
    }

    /// How it is run.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// What has been done so far.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Whether writes are durable when answered.
    #[must_use]
    pub fn writethrough(&self) -> bool {
        self.writethrough.load(Ordering::Acquire)
    }

    /// The guest turns the disk's write cache off (`true`) or on. Turning it off concerns writes
    /// submitted from now on: flush what was answered before.
    pub fn set_writethrough(&self, on: bool) {
        self.writethrough.store(on, Ordering::Release);
    }

    /// Changes the limits, for all who share them; what was done so far is forgotten. Requests that wait are looked at
    /// again within the time they were told.
    ///
    /// # Errors
    /// [`Limits::check`].
    pub fn set_limits(&self, limits: Limits) -> Result<(), Error> {
        limits.check()?;
        self.meter().set(limits);
        Ok(())
    }

    /// Has other limits from now on, which other engines may have too. Requests that wait are looked at again within
    /// the time they were told.
    pub fn share(&self, meter: Arc<Meter>) {
        *self.meter.lock().unwrap_or_else(PoisonError::into_inner) = meter;
        self.meters.fetch_add(1, Ordering::Release);
    }

    /// What its limits are measured by.
    #[must_use]
    pub fn meter(&self) -> Arc<Meter> {
        let meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&meter)
    }

    /// The limits in force.
    #[must_use]
    pub fn limits(&self) -> Limits {
        *self.meter().throttle().limits()
    }

    /// Runs a request by the image's own calls, waiting for it.
    fn perform(&self, request: &Request) -> Result<(), Error> {
        let image = &*self.image;
        match request.op {
            Op::Read => return image.read(request.offset, &request.bufs),
            Op::Flush => return image.flush(),
            Op::Discard => return image.discard(request.offset, request.len),
            Op::Write => image.write(request.offset, &request.bufs)?,
            Op::WriteZeroes { unmap } => image.write_zeroes(request.offset, request.len, unmap)?,
        }
        if self.writethrough() {
            image.flush()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
