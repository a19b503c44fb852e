//! What takes long, on a thread of its own: how far it is, and giving it up.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vmm_api::control::JobStatus;

use crate::leisurely::Leisurely;

/// What a job says of itself, and is told.
#[derive(Debug)]
pub struct Progress {
    total: u64,
    processed: AtomicU64,
    zero: AtomicU64,
    aborted: AtomicBool,
    began: Instant,
}

impl Progress {
    /// Of a job that goes through `total` bytes.
    #[must_use]
    pub fn new(total: u64) -> Self {
        Self {
            total,
            processed: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            aborted: AtomicBool::new(false),
            began: Instant::now(),
        }
    }

    /// So many more bytes are done, of which so many were zero.
    pub fn add(&self, bytes: u64, zero: u64) {
        self.processed.fetch_add(bytes, Ordering::Relaxed);
        self.zero.fetch_add(zero, Ordering::Relaxed);
    }

    /// It is to be given up.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
    }

    /// Between two steps: whether to go on.
    ///
    /// # Errors
    /// It was given up.
    pub fn check(&self) -> io::Result<()> {
        if self.aborted.load(Ordering::Relaxed) {
            return Err(io::Error::other("it was given up"));
        }
        Ok(())
    }

    /// How far it is.
    #[must_use]
    pub fn status(&self) -> JobStatus {
        JobStatus {
            total: self.total,
            processed: self.processed.load(Ordering::Relaxed),
            zero: self.zero.load(Ordering::Relaxed),
            elapsed_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            migration: None,
        }
    }
}

/// A job that runs.
#[derive(Debug)]
pub struct Job {
    /// How far it is.
    pub progress: Arc<Progress>,
    thread: JoinHandle<Result<(), String>>,
    done: Arc<EventFd>,
}

impl Job {
    /// Sets `work` going.
    ///
    /// # Errors
    /// No thread, or no eventfd.
    pub fn start(
        progress: Progress,
        work: impl FnOnce(&Arc<Progress>) -> Result<(), String> + Send + 'static,
    ) -> io::Result<Self> {
        let progress = Arc::new(progress);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let done = Arc::new(EventFd::from_flags(flags)?);
        let (own, tell) = (progress.clone(), done.clone());
        let thread = std::thread::Builder::new()
            .name("job".into())
            .spawn(move || {
                let _slices = Leisurely::begin();
                let result = work(&own);
                if let Err(error) = tell.write(1) {
                    log::error!("eventfd: {error}");
                }
                result
            })?;
        Ok(Self {
            progress,
            thread,
            done,
        })
    }

    /// Readable when it is done.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }

    /// What came of it; waits for its end.
    ///
    /// # Errors
    /// Why it failed.
    pub fn finish(self) -> Result<JobStatus, String> {
        match self.thread.join() {
            Ok(result) => result.map(|()| self.progress.status()),
            Err(_) => Err("the job's thread panicked".to_owned()),
        }
    }
}
