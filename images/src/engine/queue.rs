//! One thread's way into an engine.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::ring::{Ring, Transfer};
use super::{Aio, Completion, DetectZeroes, Engine, Meter, Op, Request};
use crate::image::Hold;
use crate::{Error, File, IoBuf, iovec};

/// The longest request that is done in `submit` itself, in bytes: longer ones copy for too long.
const INLINE: u64 = 256 << 10;
/// The longest when nothing else is under way: to wake a worker takes longer than to copy it.
const INLINE_ALONE: u64 = 1 << 20;
/// After so many requests in a row, each made when the one before had been answered, another is not
/// expected while one is under way.
const LONELY: u32 = 8;
/// So many writes that make a file longer are in the ring at once: more would only be in one another's
/// way at the file's lock, each with a thread of the kernel's.
const GROWING: usize = 1;
/// Where more wait, so many are done in `submit` or `complete` themselves for each that goes through
/// the ring: to wake that thread takes longer than the write.
const GROWN_HERE: usize = 8;
/// A write in `submit` that takes longer than this had to wait for the disk (on a busy host it may
/// merely have lost the CPU for as long): the next ones are left to others for a while.
const SLOW: Duration = Duration::from_millis(4);
/// That while at first; it doubles each time the next one is slow again.
const SLOW_FOR: Duration = Duration::from_millis(20);
/// The longest.
const SLOW_MOST: Duration = Duration::from_secs(1);
/// Limits may change meanwhile, so held-back requests are looked at at least this often.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How long a queue that is dropped waits for what is in flight.
const LAST_WAIT: Duration = Duration::from_secs(30);
/// The most buffers that the kernel takes in one call.
const IOV_MAX: usize = 1024;

/// What is known of a request besides what its I/O needs.
#[derive(Debug)]
struct Pending {
    op: Op,
    token: u64,
    offset: u64,
    bytes: u64,
    started: Instant,
}

#[derive(Default)]
struct Done {
    list: Vec<Completion>,
    /// The eventfd has been signalled since the list was last taken.
    signalled: bool,
}

/// What a queue shares with the threads that work for it.
struct Shared {
    engine: Arc<Engine>,
    done: Mutex<Done>,
    event: EventFd,
    _keeper: Arc<dyn Send + Sync>,
}

impl Shared {
    fn done(&self) -> MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn completion(&self, pending: &Pending, result: Result<(), Error>) -> Completion {
        let nanos = pending.started.elapsed().as_nanos() as u64;
        self.engine
            .stats
            .count(pending.op, pending.bytes, nanos, result.is_ok());
        Completion {
            token: pending.token,
            result,
        }
    }

    /// A worker thread's part.
    fn work(&self, request: &Request, pending: &Pending) {
        // A request must end, whatever is wrong with the image's code.
        let result = catch_unwind(AssertUnwindSafe(|| self.engine.perform(request)))
            .unwrap_or_else(|_| Err(Error::Invalid("an image's code panicked".to_owned())));
        let completion = self.completion(pending, result);
        let signal = {
            let mut done = self.done();
            done.list.push(completion);
            !std::mem::replace(&mut done.signalled, true)
        };
        if signal {
            match self.event.write(1) {
                // Full is signalled.
                Ok(_) | Err(Errno::EAGAIN) => {}
                Err(error) => log::error!("a disk's eventfd: {error}"),
            }
        }
    }
}

/// A queue of requests, for one thread at a time. When [`Queue::fd`] is ready or
/// [`Queue::deadline`] has passed, and after having submitted something, call
/// [`Queue::complete`]:
///
/// ```text
///   loop { wait for fd, deadline, or the guest's kick;
///          submit(request) for each new one;
///          complete(&mut done); answer them }
/// ```
///
/// The thread that has submitted must not end before what is in flight has (the kernel would
/// cancel it): [`Queue::drain`] first. Dropping a queue waits up to 30 s for what is in flight;
/// what then still is never ends, and its memory stays alive by the queue's keeper.
pub struct Queue {
    ring: Option<Ring<(Pending, Hold)>>,
    shared: Arc<Shared>,
    /// Done in `submit` already.
    ready: Vec<Completion>,
    /// Held back by limits: what reads, what changes the image.
    waiting: [VecDeque<(Request, Pending)>; 2],
    deadline: Option<Instant>,
    /// The engine's limits, and how often they had changed for others then.
    meter: Arc<Meter>,
    meters: u64,
    /// Submitted, and not yet given back.
    in_flight: usize,
    /// Writes in the ring that make a file longer, and those that wait for their turn.
    growing: usize,
    /// Those done without it since the last that was.
    grown_here: usize,
    grow_next: VecDeque<(Request, Pending)>,
    /// So many in a row found nothing else under way.
    lonely: u32,
    /// The files take RWF_NOWAIT.
    nowait: bool,
    /// Writes into the page cache wait for the disk, at least until then.
    slow_until: Option<Instant>,
    /// How long they are believed to when it happens again.
    slow_for: Duration,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("in_flight", &self.in_flight)
            .field("ring", &self.ring)
            .finish_non_exhaustive()
    }
}

impl Queue {
    pub(super) fn new(engine: Arc<Engine>, keeper: Arc<dyn Send + Sync>) -> Result<Self, Error> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(
            |errno| Error::Io {
                what: "making an eventfd".to_owned(),
                source: errno.into(),
            },
        )?;
        let wants_ring = engine.options.aio == Aio::Ring;
        let meters = engine.meters.load(Ordering::Acquire);
        let meter = engine.meter();
        let shared = Arc::new(Shared {
            engine,
            done: Mutex::default(),
            event,
            _keeper: keeper,
        });
        let ring = wants_ring
            .then(|| Ring::new(shared.clone()))
            .and_then(|ring| {
                ring.inspect_err(|error| {
                    log::info!("no io_uring here ({error}): worker threads do its work");
                })
                .ok()
            });
        Ok(Self {
            ring,
            shared,
            ready: Vec::new(),
            waiting: Default::default(),
            deadline: None,
            meter,
            meters,
            in_flight: 0,
            growing: 0,
            grown_here: 0,
            grow_next: VecDeque::new(),
            lonely: 0,
            nowait: true,
            slow_until: None,
            slow_for: SLOW_FOR,
        })
    }

    /// Ready for reading (level-triggered) when [`Queue::complete`] has something to do. The same
    /// for the queue's whole life.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.ring {
            Some(ring) => ring.fd(),
            None => self.shared.event.as_fd(),
        }
    }

    /// When [`Queue::complete`] is to be called at the latest: requests wait for their turn under
    /// the limits.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Requests submitted whose completions have not been taken yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The engine it belongs to.
    #[must_use]
    pub fn engine(&self) -> &Arc<Engine> {
        &self.shared.engine
    }

    /// Takes a request. Waits for the disk for no longer than a few short writes take, and for that
    /// only if they are quick; what goes wrong is in its completion. Call [`Queue::complete`] after
    /// the last one of a batch.
    pub fn submit(&mut self, request: Request) {
        self.in_flight += 1;
        let pending = Pending {
            op: request.op,
            token: request.token,
            offset: request.offset,
            bytes: request.bytes(),
            started: Instant::now(),
        };
        if self.meter().limited() && request.op != Op::Flush {
            let line = usize::from(request.op.changes());
            if !self.waiting[line].is_empty() || !self.admit(&pending) {
                self.waiting[line].push_back((request, pending));
                return;
            }
        }
        self.start(request, pending);
    }

    /// The engine's limits, which may be others by now.
    fn meter(&mut self) -> &Meter {
        let meters = self.shared.engine.meters.load(Ordering::Acquire);
        if meters != self.meters {
            self.meters = meters;
            self.meter = self.shared.engine.meter();
        }
        &self.meter
    }

    /// Asks the limits; false if it has to wait, and the deadline is set.
    fn admit(&mut self, pending: &Pending) -> bool {
        let asked = self.meter().admit(pending.op.changes(), pending.bytes);
        let Err(wait) = asked else { return true };
        let again = Instant::now() + Duration::from_nanos(wait).min(LOOK_AGAIN);
        self.deadline = Some(self.deadline.map_or(again, |other| other.min(again)));
        false
    }

    /// Begins what the limits have held back and now let through (all of it with `force`).
    fn release(&mut self, force: bool) {
        self.deadline = None;
        for line in 0..2 {
            while let Some((request, pending)) = self.waiting[line].pop_front() {
                let free = force || !self.meter().limited();
                if !free && !self.admit(&pending) {
                    self.waiting[line].push_front((request, pending));
                    break;
                }
                self.start(request, pending);
            }
        }
    }

    fn start(&mut self, mut request: Request, pending: Pending) {
        let shared = self.shared.clone();
        let options = &shared.engine.options;
        if options.read_only && request.op.changes() {
            let error = Error::Io {
                what: "writing to a read-only disk".to_owned(),
                source: io::Error::from_raw_os_error(libc::EROFS),
            };
            return self.finish(&pending, Err(error));
        }
        match request.op {
            Op::Flush if options.cache == super::Cache::Unsafe => {
                return self.finish(&pending, Ok(()));
            }
            Op::Discard if !options.discard => return self.finish(&pending, Ok(())),
            Op::WriteZeroes { unmap } => {
                request.op = Op::WriteZeroes {
                    unmap: unmap && options.discard,
                };
            }
            Op::Write
                if options.detect_zeroes != DetectZeroes::Off
                    && request.bufs.iter().all(is_zero) =>
            {
                request.op = Op::WriteZeroes {
                    unmap: options.detect_zeroes == DetectZeroes::Unmap && options.discard,
                };
                request.len = pending.bytes;
            }
            Op::Read | Op::Write => return self.transfer(&shared, request, pending),
            Op::Flush | Op::Discard => {}
        }
        self.delegate(request, pending);
    }

    /// A read or write: the shortest way there is.
    fn transfer(&mut self, shared: &Arc<Shared>, mut request: Request, pending: Pending) {
        let write = request.op == Op::Write;
        let sync = write && shared.engine.writethrough();
        let image = &shared.engine.image;
        let mut claimed = false;
        let mut plain = image.plain(request.offset, pending.bytes, write);
        let alone = self.in_flight <= self.ready.len() + 1;
        self.lonely = if alone {
            self.lonely.saturating_add(1)
        } else {
            0
        };
        let most = if alone { INLINE_ALONE } else { INLINE };
        let claims = if shared.engine.options.cache.direct() {
            self.ring.is_some()
        } else {
            pending.bytes <= most && !self.is_slow()
        };
        if plain.is_none() && write && !sync && claims {
            if self.growing >= GROWING {
                self.grow_next.push_back((request, pending));
                return;
            }
            plain = image.clone().claim(request.offset, pending.bytes);
            claimed = plain.is_some();
        }
        let Some(plain) = plain.filter(|plain| {
            !request.bufs.is_empty()
                && request.bufs.len() <= IOV_MAX
                && plain.file().is_aligned(plain.offset(), &request.bufs)
        }) else {
            return self.delegate(request, pending);
        };
        if write {
            plain.file().writing(plain.offset() + pending.bytes);
        }
        let direct = plain.file().direct().is_some();
        // To make a file longer takes a thread, of ours or of the kernel's: to wake it costs a
        // writer who waits for each of its writes a third of the time.
        let turn = self.growing == 0 && self.grown_here < GROWN_HERE;
        let here = !direct || claimed && (turn || self.lonely >= LONELY);
        if here && pending.bytes <= most && !sync {
            let (file, offset) = (plain.file(), plain.offset());
            let done = if write {
                self.write_here(file, offset, &request.bufs)
            } else {
                self.read_cached(file, offset, &request.bufs)
            };
            if done == Some(pending.bytes) {
                self.grown_here += usize::from(direct);
                let result = plain.end();
                return self.finish(&pending, result);
            }
            if let (Some(got @ 1..), false) = (done, claimed) {
                // The rest waits for the disk.
                drop(plain);
                request.offset += got;
                request.bufs = iovec::part(&request.bufs, got, pending.bytes - got).into_owned();
                return self.delegate(request, pending);
            }
        }
        // The kernel leaves buffered writes to threads of its own, one for a file.
        let Some(ring) = self.ring.as_mut().filter(|_| direct || !write) else {
            drop(plain);
            return self.delegate(request, pending);
        };
        let transfer = Transfer {
            write,
            fd: plain.file().fd().as_raw_fd(),
            offset: plain.offset(),
            bufs: request.bufs,
            sync,
        };
        let hold = plain.into_hold();
        if claimed {
            self.growing += 1;
            self.grown_here = 0;
        }
        if let Err((transfer, (pending, hold), error)) = ring.start(transfer, (pending, hold)) {
            log::debug!("io_uring: {error}");
            self.growing -= usize::from(claimed);
            drop(hold);
            let request = Request {
                bufs: transfer.bufs,
                ..request
            };
            self.delegate(request, pending);
        }
    }

    /// Bytes read without having waited for the disk.
    fn read_cached(&mut self, file: &File, offset: u64, bufs: &[IoBuf]) -> Option<u64> {
        if !self.nowait {
            return None;
        }
        // SAFETY: `IoBuf` is an iovec, each describing memory that is writable until the request
        // is complete; no more than IOV_MAX of them.
        let got = unsafe {
            libc::preadv2(
                file.fd().as_raw_fd(),
                bufs.as_ptr().cast(),
                bufs.len() as i32,
                offset as i64,
                libc::RWF_NOWAIT,
            )
        };
        if got < 0 {
            let error = Errno::last();
            self.nowait = !matches!(error, Errno::EOPNOTSUPP | Errno::ENOSYS);
        }
        u64::try_from(got).ok()
    }

    fn is_slow(&self) -> bool {
        self.slow_until.is_some_and(|until| Instant::now() < until)
    }

    /// Bytes written by this thread, if that has not taken long lately.
    fn write_here(&mut self, file: &File, offset: u64, bufs: &[IoBuf]) -> Option<u64> {
        if self.is_slow() {
            return None;
        }
        let begun = Instant::now();
        // SAFETY: as in `read_cached`, memory that is readable.
        let put = unsafe {
            libc::pwritev2(
                file.fd().as_raw_fd(),
                bufs.as_ptr().cast(),
                bufs.len() as i32,
                offset as i64,
                0,
            )
        };
        let end = Instant::now();
        if end - begun > SLOW {
            self.slow_until = Some(end + self.slow_for);
            self.slow_for = (self.slow_for * 2).min(SLOW_MOST);
        } else {
            self.slow_until = None;
            self.slow_for = SLOW_FOR;
        }
        u64::try_from(put).ok()
    }

    /// Leaves a request to a worker thread.
    fn delegate(&mut self, request: Request, pending: Pending) {
        let shared = self.shared.clone();
        let (token, op) = (pending.token, pending.op);
        let job = Box::new(move || shared.work(&request, &pending));
        if let Err(error) = self.shared.engine.pool.run(job) {
            self.shared.engine.stats.count(op, 0, 0, false);
            self.ready.push(Completion {
                token,
                result: Err(error),
            });
        }
    }

    fn finish(&mut self, pending: &Pending, result: Result<(), Error>) {
        let completion = self.shared.completion(pending, result);
        self.ready.push(completion);
    }

    /// Sends what was submitted on its way, and appends what is complete to `done`.
    pub fn complete(&mut self, done: &mut Vec<Completion>) {
        if self
            .deadline
            .is_some_and(|deadline| deadline <= Instant::now())
        {
            self.release(false);
        }
        let before = done.len();
        if let Some(mut ring) = self.ring.take() {
            let mut again = Vec::new();
            let mut grown = 0;
            let result = ring.submit().and_then(|()| {
                ring.take(
                    self.shared.event.as_fd(),
                    |transfer, (pending, hold), got| {
                        grown += usize::from(matches!(hold, Hold::Mapping(_)));
                        if u64::try_from(got) == Ok(pending.bytes) {
                            let result = hold.end();
                            done.push(self.shared.completion(&pending, result));
                        } else {
                            again.push((transfer, pending));
                        }
                    },
                )
            });
            if let Err(error) = result {
                log::error!("io_uring: {error}");
            }
            self.ring = Some(ring);
            self.growing -= grown;
            // Short ones (the file's end) and errors go the ordinary way once more, which knows
            // what to do and what to say.
            for (transfer, pending) in again {
                let request = Request {
                    op: pending.op,
                    offset: pending.offset,
                    len: 0,
                    bufs: transfer.bufs,
                    token: pending.token,
                };
                self.delegate(request, pending);
            }
            self.grow();
        }
        done.append(&mut self.ready);
        {
            let mut shared = self.shared.done();
            done.append(&mut shared.list);
            if std::mem::take(&mut shared.signalled) && self.ring.is_none() {
                let _ = self.shared.event.read();
            }
        }
        self.in_flight -= done.len() - before;
    }

    /// Begins as many of the writes that make a file longer as have room beside those under way.
    fn grow(&mut self) {
        let mut room = GROWING.saturating_sub(self.growing);
        let shared = self.shared.clone();
        while room > 0
            && let Some((request, pending)) = self.grow_next.pop_front()
        {
            let ready = self.ready.len();
            self.transfer(&shared, request, pending);
            // One that has ended already calls nobody for the next.
            room -= usize::from(self.ready.len() == ready);
        }
        if let Some(ring) = &mut self.ring
            && let Err(error) = ring.submit()
        {
            log::error!("io_uring: {error}");
        }
    }

    /// Lets through what limits hold back, and waits up to `limit` until nothing is in flight.
    /// Completions are appended to `done`. False if the time was too short.
    pub fn drain(&mut self, limit: Duration, done: &mut Vec<Completion>) -> bool {
        let end = Instant::now() + limit;
        self.release(true);
        loop {
            self.complete(done);
            if self.in_flight == 0 {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let mut fds = [PollFd::new(self.fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(error) => {
                    log::error!("waiting for a disk: {error}");
                    return false;
                }
            }
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.in_flight > 0 && !self.drain(LAST_WAIT, &mut Vec::new()) {
            log::error!("{} requests of a disk are given up", self.in_flight);
            return;
        }
        // A worker that has answered may not have let go yet: whoever drops the last queue and
        // the engine can rely on the image's being closed then.
        let own = 1 + usize::from(self.ring.is_some());
        let end = Instant::now() + Duration::from_secs(1);
        while Arc::strong_count(&self.shared) > own && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Whether every byte is zero. Guest memory may change meanwhile: it then was, or was not.
fn is_zero(buf: &IoBuf) -> bool {
    const WORD: usize = size_of::<u64>();
    let (base, len) = (buf.base(), buf.len());
    let words = len / WORD;
    // SAFETY: all reads are within the buffer, which is readable until the request is complete;
    // unaligned words are read as arrays of bytes, and nothing is kept as a reference.
    unsafe {
        let word = |i: usize| {
            let bytes = base.add(i * WORD).cast::<[u8; WORD]>();
            u64::from_ne_bytes(bytes.read_volatile())
        };
        let mut i = 0;
        // Data shows itself at once, nearly always; zeroes are gone through in larger steps.
        while i + 8 <= words {
            let all = (0..8).fold(0, |all, k| all | word(i + k));
            if all != 0 {
                return false;
            }
            i += 8;
        }
        (i..words).all(|i| word(i) == 0)
            && (words * WORD..len).all(|at| base.add(at).read_volatile() == 0)
    }
}
