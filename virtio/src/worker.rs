//! A device's own thread: an event loop over kicks and other descriptors.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// How long a device may take to come to rest (see [`crate::Device`]).
pub const LIMIT: Duration = Duration::from_secs(30);

/// The worker's own wake-up.
const WAKE: u64 = u64::MAX;

/// A new non-blocking eventfd, closed on exec.
///
/// # Errors
/// The kernel's refusal.
pub fn eventfd() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(
        EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
    )?)
}

/// Signals an eventfd. One that is full is signalled already.
pub fn signal(fd: impl AsFd) {
    match nix::unistd::write(fd, &1_u64.to_ne_bytes()) {
        Ok(_) | Err(Errno::EAGAIN) => {}
        Err(error) => log::error!("eventfd: {error}"),
    }
}

/// Takes an eventfd's signal; `false` if there was none.
pub fn take(fd: impl AsFd) -> bool {
    matches!(nix::unistd::read(fd, &mut [0; 8]), Ok(8))
}

/// What to wait for on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Nothing but errors and hang-ups, which always count.
    None,
    /// Something to read.
    Read,
    /// Room to write.
    Write,
    /// Either.
    Both,
}

impl Interest {
    fn flags(self) -> EpollFlags {
        match self {
            Self::None => EpollFlags::empty(),
            Self::Read => EpollFlags::EPOLLIN,
            Self::Write => EpollFlags::EPOLLOUT,
            Self::Both => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
        }
    }
}

/// The descriptors a worker waits for (level-triggered).
#[derive(Debug)]
pub struct Poll {
    epoll: Epoll,
    abandoned: Arc<AtomicBool>,
}

impl Poll {
    /// Waits for `fd` too; [`Handler::ready`] is called with `token` (any but `u64::MAX`).
    ///
    /// # Errors
    /// The kernel's refusal: `fd` is there already, or can't be waited for.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self
            .epoll
            .add(fd, EpollEvent::new(interest.flags(), token))?)
    }

    /// Changes what is waited for on `fd`.
    ///
    /// # Errors
    /// `fd` isn't there.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        let mut event = EpollEvent::new(interest.flags(), token);
        Ok(self.epoll.modify(fd, &mut event)?)
    }

    /// No longer waits for `fd`.
    ///
    /// # Errors
    /// `fd` isn't there.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }

    /// [`Worker::stop`] has given up waiting: the handler may finish what it has begun on the host,
    /// but no longer touches guest memory or the interrupt.
    #[must_use]
    pub fn abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }
}

/// What a worker thread does.
pub trait Handler: Send + 'static {
    /// The thread begins, for the first time or after a [`Worker::stop`]: registers its
    /// descriptors, and looks at its queues (a kick may have come before).
    ///
    /// # Errors
    /// The kernel's refusal; the thread ends then, and [`Worker::start`] says so.
    fn begin(&mut self, poll: &Poll) -> io::Result<()>;

    /// The descriptor with `token` is ready (or has an error or a hang-up). Must not block.
    fn ready(&mut self, token: u64, poll: &Poll);

    /// When [`Self::timer`] is to be called, if at all. Asked before every wait.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The deadline has passed.
    fn timer(&mut self, poll: &Poll) {
        let _ = poll;
    }

    /// The thread is to end: begins nothing new. `true` when nothing is in flight; asked again
    /// after every event until then.
    fn end(&mut self, poll: &Poll) -> bool {
        let _ = poll;
        true
    }
}

type Call<H> = Box<dyn FnOnce(&mut H, &Poll) + Send>;

/// A worker didn't answer in time, or its thread has panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a device's thread doesn't answer")]
pub struct Stuck;

/// A thread that runs a [`Handler`]. Pausing is [`Worker::stop`], which gives the handler back;
/// going on is [`Worker::start`] with it.
#[derive(Debug)]
pub struct Worker<H> {
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    abandoned: Arc<AtomicBool>,
    calls: Sender<Call<H>>,
    done: Receiver<H>,
    thread: Option<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread that starts others: a thread has its starter's CPUs, scheduler and control group. It ends with its handle.
#[derive(Debug, Clone)]
pub struct Starter {
    name: Arc<str>,
    jobs: Sender<Job>,
    polling: Arc<Polling>,
}

impl Starter {
    /// Starts it; it has its name when this returns. `name` is cut to the 15 bytes the kernel shows.
    ///
    /// # Errors
    /// The kernel's refusal; it doesn't come up.
    pub fn new(name: &str) -> io::Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let thread = std::thread::Builder::new().name(short(name));
        thread.spawn(move || queue.into_iter().for_each(|job| job()))?;
        let starter = Self {
            name: name.into(),
            jobs,
            polling: Arc::default(),
        };
        // A thread names itself when it first runs; others tell it by that name.
        starter.run(|| ())?;
        Ok(starter)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How the workers that it starts wait.
    #[must_use]
    pub fn polling(&self) -> &Polling {
        &self.polling
    }

    /// Runs `job` on it, and waits for its end.
    ///
    /// # Errors
    /// It doesn't answer.
    pub fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce() -> R + Send + 'static,
    ) -> io::Result<R> {
        let (tell, told) = channel();
        let job = Box::new(move || {
            // Whoever asked may have given up.
            let _ = tell.send(job());
        });
        self.jobs.send(job).map_err(|_| io::Error::other(Stuck))?;
        told.recv_timeout(LIMIT)
            .map_err(|_| io::Error::other(Stuck))
    }

    fn start(
        &self,
        name: String,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        self.run(move || std::thread::Builder::new().name(name).spawn(work))?
    }
}

/// How long a worker looks for something to do before it sleeps, which whoever wakes it pays for. It adapts, as QEMU's
/// I/O threads do: longer while what comes would have come in that time, shorter when nothing does.
#[derive(Debug, Default)]
pub struct Polling {
    max_nanos: AtomicU64,
    grow: AtomicU64,
    shrink: AtomicU64,
}

impl Polling {
    /// The time it begins with.
    const FIRST: u64 = 4000;

    /// Changes the longest time in nanoseconds (0: none), the factor it grows by (0: 2) and the divisor it shrinks by
    /// (0: at once to nothing).
    pub fn set(&self, max_nanos: u64, grow: u64, shrink: u64) {
        self.grow.store(grow, Ordering::Relaxed);
        self.shrink.store(shrink, Ordering::Relaxed);
        self.max_nanos.store(max_nanos, Ordering::Relaxed);
    }

    /// How long to look next, after it was `now` and something came after `waited`.
    fn next(&self, now: u64, waited: u64) -> u64 {
        let max = self.max_nanos.load(Ordering::Relaxed);
        let next = if waited <= now {
            now
        } else if waited > max {
            match self.shrink.load(Ordering::Relaxed) {
                0 => 0,
                by => now / by,
            }
        } else {
            match self.grow.load(Ordering::Relaxed) {
                _ if now == 0 => Self::FIRST,
                0 => now.saturating_mul(2),
                by => now.saturating_mul(by),
            }
        };
        next.min(max)
    }
}

fn short(name: &str) -> String {
    name.chars().filter(char::is_ascii).take(15).collect()
}

/// Starts threads for others.
static STARTER: OnceLock<Starter> = OnceLock::new();

/// From now on, workers are started by a thread that is started here, or by one of their own.
///
/// A device is activated by the vCPU whose guest asks for it, and what limits that vCPU is not meant for the device.
///
/// # Errors
/// The kernel's refusal.
pub fn start_from_a_thread_of_its_own() -> io::Result<()> {
    if STARTER.get().is_none() {
        // Another one has just come: this one ends.
        drop(STARTER.set(Starter::new("starter")?));
    }
    Ok(())
}

/// Starts a thread as workers are started (see [`start_from_a_thread_of_its_own`]).
///
/// # Errors
/// The kernel's refusal.
pub fn start_thread(
    name: String,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    match STARTER.get() {
        Some(starter) => starter.start(name, work),
        None => std::thread::Builder::new().name(name).spawn(work),
    }
}

impl<H: Handler> Worker<H> {
    /// Starts a thread. `name` is cut to the 15 bytes the kernel shows.
    ///
    /// # Errors
    /// The kernel's refusal, or the handler's own.
    pub fn start(name: &str, handler: H) -> io::Result<Self> {
        Self::start_by(None, name, handler)
    }

    /// The same, by a starter of its own, whose name the thread has.
    ///
    /// # Errors
    /// As [`Worker::start`].
    pub fn start_by(starter: Option<&Starter>, name: &str, handler: H) -> io::Result<Self> {
        let abandoned = Arc::new(AtomicBool::new(false));
        let poll = Poll {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            abandoned: Arc::clone(&abandoned),
        };
        let wake = Arc::new(eventfd()?);
        poll.add(&*wake, WAKE, Interest::Read)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (calls, call_queue) = channel();
        let (finished, done) = channel();
        let (begun, beginning) = channel();
        let mut run = Run {
            handler,
            poll,
            wake: Arc::clone(&wake),
            stop: Arc::clone(&stop),
            calls: call_queue,
            polling: starter.map(|starter| Arc::clone(&starter.polling)),
            poll_nanos: 0,
        };
        let work = move || {
            let result = run.handler.begin(&run.poll);
            let failed = result.is_err();
            // The starter waits for this.
            let _ = begun.send(result);
            if !failed {
                run.run();
                // Nobody listens if `stop` has given up.
                let _ = finished.send(run.handler);
            }
        };
        let thread = match starter {
            Some(starter) => starter.start(short(starter.name()), work),
            None => start_thread(short(name), work),
        }?;
        beginning
            .recv_timeout(LIMIT)
            .map_err(|_| io::Error::other(Stuck))??;
        Ok(Self {
            wake,
            stop,
            abandoned,
            calls,
            done,
            thread: Some(thread),
        })
    }

    /// Runs `call` on the worker's thread, between two events, and waits for its result.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn call<R: Send + 'static>(
        &self,
        call: impl FnOnce(&mut H, &Poll) -> R + Send + 'static,
    ) -> Result<R, Stuck> {
        let (answer, result) = channel();
        self.calls
            .send(Box::new(move |handler, poll| {
                // The caller may have given up.
                let _ = answer.send(call(handler, poll));
            }))
            .map_err(|_| Stuck)?;
        signal(&*self.wake);
        result.recv_timeout(LIMIT).map_err(|_| Stuck)
    }

    /// Asks the thread to end without waiting: to stop several at a time.
    pub fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::Release);
        signal(&*self.wake);
    }

    /// Ends the thread when nothing is in flight any more ([`Handler::end`]) and gives the handler
    /// back. After [`LIMIT`] the thread is left to itself with everything it holds.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn stop(mut self) -> Result<H, Stuck> {
        self.ask_to_stop();
        let result = self.done.recv_timeout(LIMIT);
        if matches!(result, Err(RecvTimeoutError::Timeout)) {
            self.abandoned.store(true, Ordering::Release);
            self.thread = None;
            return Err(Stuck);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a device's thread panicked");
        }
        result.map_err(|_| Stuck)
    }
}

impl<H> Drop for Worker<H> {
    /// Not stopped: the thread ends by itself, but nobody waits.
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.abandoned.store(true, Ordering::Release);
            self.stop.store(true, Ordering::Release);
            signal(&*self.wake);
        }
    }
}

/// What the thread has.
struct Run<H> {
    handler: H,
    poll: Poll,
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    calls: Receiver<Call<H>>,
    polling: Option<Arc<Polling>>,
    /// How long it looks before it sleeps.
    poll_nanos: u64,
}

impl<H: Handler> Run<H> {
    /// Waits for events, at first awake if it is to.
    fn wait(&mut self, events: &mut [EpollEvent], deadline: Option<Instant>) -> nix::Result<usize> {
        let sleep =
            |epoll: &Epoll, events: &mut [EpollEvent]| epoll.wait(events, timeout(deadline));
        let Some(polling) = &self.polling else {
            return sleep(&self.poll.epoll, events);
        };
        if polling.max_nanos.load(Ordering::Relaxed) == 0 {
            self.poll_nanos = 0;
            return sleep(&self.poll.epoll, events);
        }
        let began = Instant::now();
        let until = began + Duration::from_nanos(self.poll_nanos);
        let until = deadline.map_or(until, |deadline| deadline.min(until));
        let mut count = 0;
        while count == 0 && Instant::now() < until {
            count = self.poll.epoll.wait(events, EpollTimeout::ZERO)?;
        }
        if count == 0 {
            count = sleep(&self.poll.epoll, events)?;
        }
        let waited = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.poll_nanos = polling.next(self.poll_nanos, waited);
        Ok(count)
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 16];
        loop {
            if self.stop.load(Ordering::Acquire) && self.handler.end(&self.poll) {
                return;
            }
            let deadline = self.handler.deadline();
            let count = match self.wait(&mut events, deadline) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => {
                    // Can't happen with a valid epoll; ending beats spinning.
                    log::error!("epoll_wait: {error}");
                    return;
                }
            };
            for event in &events[..count] {
                if event.data() == WAKE {
                    take(&*self.wake);
                    while let Ok(call) = self.calls.try_recv() {
                        call(&mut self.handler, &self.poll);
                    }
                } else {
                    self.handler.ready(event.data(), &self.poll);
                }
            }
            if deadline.is_some_and(|at| Instant::now() >= at) {
                self.handler.timer(&self.poll);
            }
        }
    }
}

/// Rounded up, so that the deadline has passed when the wait ends.
fn timeout(deadline: Option<Instant>) -> EpollTimeout {
    let Some(deadline) = deadline else {
        return EpollTimeout::NONE;
    };
    let left = deadline.saturating_duration_since(Instant::now());
    let millis = left.as_nanos().div_ceil(1_000_000);
    EpollTimeout::try_from(i32::try_from(millis).unwrap_or(i32::MAX)).unwrap_or(EpollTimeout::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts kicks; ends after a number of them.
    struct Counter {
        kick: Arc<EventFd>,
        seen: u32,
        timed: u32,
        until: u32,
        deadline: Option<Instant>,
    }

    impl Handler for Counter {
        fn begin(&mut self, poll: &Poll) -> io::Result<()> {
            poll.add(&*self.kick, 1, Interest::Read)
        }

        fn ready(&mut self, token: u64, _poll: &Poll) {
            assert_eq!(token, 1);
            assert!(take(&*self.kick));
            self.seen += 1;
        }

        fn deadline(&self) -> Option<Instant> {
            self.deadline
        }

        fn timer(&mut self, _poll: &Poll) {
            self.timed += 1;
            self.deadline = None;
        }

        fn end(&mut self, _poll: &Poll) -> bool {
            self.seen >= self.until
        }
    }

    fn counter(until: u32) -> (Arc<EventFd>, Counter) {
        let kick = Arc::new(eventfd().unwrap());
        let counter = Counter {
            kick: Arc::clone(&kick),
            seen: 0,
            timed: 0,
            until,
            deadline: Some(Instant::now()),
        };
        (kick, counter)
    }

    #[test]
    fn workers_do_not_inherit_what_limits_whoever_starts_them() {
        // SAFETY: numbers in, numbers out; it is the calling thread's own.
        let niceness = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = niceness();
        start_from_a_thread_of_its_own().unwrap();
        let limited = std::thread::spawn(move || {
            // SAFETY: as above.
            assert_eq!(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) }, 0);
            assert_eq!(niceness(), 19);
            let worker = Worker::start("counter", counter(0).1).unwrap();
            let its = worker.call(move |_, _| niceness());
            drop(worker.stop());
            its
        });
        assert_eq!(limited.join().unwrap().unwrap(), before);
    }

    #[test]
    fn stops_only_when_nothing_is_in_flight_and_starts_again() {
        let (kick, handler) = counter(1);
        let worker = Worker::start("counter", handler).unwrap();
        worker.ask_to_stop();
        signal(&*kick);
        let mut handler = worker.stop().unwrap();
        assert_eq!((handler.seen, handler.timed), (1, 1));
        handler.until = 2;
        signal(&*kick);
        let handler = Worker::start("counter", handler).unwrap().stop().unwrap();
        assert_eq!(handler.seen, 2, "a kick sent in between is not lost");
    }

    #[test]
    fn polling_adapts() {
        let polling = Polling::default();
        assert_eq!(polling.next(0, 10), 0, "none is asked for");
        polling.set(20_000, 0, 0);
        assert_eq!(polling.next(0, 10), 4000);
        assert_eq!(polling.next(4000, 5000), 8000);
        assert_eq!(polling.next(16_000, 17_000), 20_000, "no more than it may");
        assert_eq!(polling.next(8000, 7000), 8000);
        assert_eq!(polling.next(8000, 1_000_000), 0);
        polling.set(20_000, 3, 2);
        assert_eq!(polling.next(4000, 5000), 12_000);
        assert_eq!(polling.next(8000, 1_000_000), 4000);
    }

    #[test]
    fn a_starters_workers_have_its_name_and_poll() {
        let starter = Starter::new("group1").unwrap();
        starter.polling().set(50_000_000, 0, 0);
        let (kick, handler) = counter(0);
        let worker = Worker::start_by(Some(&starter), "counter", handler).unwrap();
        let own = |_: &mut Counter, _: &Poll| std::thread::current().name().map(str::to_owned);
        assert_eq!(worker.call(own).unwrap().as_deref(), Some("group1"));
        signal(&*kick);
        while worker.call(|handler, _| handler.seen).unwrap() == 0 {}
        assert_eq!(worker.stop().unwrap().seen, 1);
    }

    #[test]
    fn calls_run_on_the_thread() {
        let (_kick, handler) = counter(0);
        let worker = Worker::start("counter", handler).unwrap();
        let name = worker
            .call(|_, _| std::thread::current().name().map(str::to_owned))
            .unwrap();
        assert_eq!(name.as_deref(), Some("counter"));
        worker.stop().unwrap();
    }

    #[test]
    fn a_handler_that_cannot_begin_is_an_error_of_start() {
        struct Refuses;
        impl Handler for Refuses {
            fn begin(&mut self, _poll: &Poll) -> io::Result<()> {
                Err(io::Error::other("no"))
            }
            fn ready(&mut self, _token: u64, _poll: &Poll) {}
        }
        let error = Worker::start("refuses", Refuses).err().unwrap();
        assert_eq!(error.to_string(), "no");
    }
}
