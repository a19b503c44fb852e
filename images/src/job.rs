//! A long operation as seen from outside: how far it is, how fast it may go, whether it is to stop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Error;

/// How long a job that is too fast sleeps at most before it looks again.
const NAP: Duration = Duration::from_millis(50);
/// A job may be so much ahead of its speed.
const BURST: Duration = Duration::from_millis(100);

/// Called with what is done and what there is to do, bytes.
type Watch = Box<dyn Fn(u64, u64) + Send + Sync>;

/// Whoever runs a long operation shares this with who watches it.
#[derive(Default)]
pub struct Job {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    speed: AtomicU64,
    /// Since when, at which speed, how many bytes.
    pace: Mutex<Option<(Instant, u64, u64)>>,
    watch: Option<Watch>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("progress", &self.progress())
            .field("cancelled", &self.is_cancelled())
            .finish_non_exhaustive()
    }
}

impl Job {
    /// One that nobody is told about.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One that tells `watch` after every step, from whatever thread made it.
    #[must_use]
    pub fn watched(watch: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        Self {
            watch: Some(Box::new(watch)),
            ..Self::default()
        }
    }

    /// It is to stop soon, with [`Error::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Whether it is to stop.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// What is done and what there is to do, bytes.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (
            self.done.load(Ordering::Relaxed),
            self.total.load(Ordering::Relaxed),
        )
    }

    /// Bytes a second from now on; 0 for as fast as it can.
    pub fn set_speed(&self, speed: u64) {
        self.speed.store(speed, Ordering::Relaxed);
    }

    /// There are so many bytes more to do.
    pub(crate) fn more(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes were looked at, `moved` of them moved. Waits as its speed demands.
    pub(crate) fn advance(&self, bytes: u64, moved: u64) -> Result<(), Error> {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(watch) = &self.watch {
            watch(done, self.total.load(Ordering::Relaxed));
        }
        self.keep_pace(moved);
        self.check()
    }

    /// [`Error::Cancelled`] if it is to stop.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.is_cancelled() {
            return Err(Error::Cancelled);
        }
        Ok(())
    }

    fn keep_pace(&self, bytes: u64) {
        let speed = self.speed.load(Ordering::Relaxed);
        if speed == 0 || bytes == 0 {
            return;
        }
        let due = {
            let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let took = |moved: u64| Duration::from_secs_f64(moved as f64 / speed as f64);
            let (since, moved) = match *pace {
                // Time that was not used is not saved up.
                Some((since, at, moved)) if at == speed && since + took(moved) + BURST > now => {
                    (since, moved)
                }
                _ => (now, 0),
            };
            *pace = Some((since, speed, moved + bytes));
            since + took(moved + bytes)
        };
        while !self.is_cancelled() && self.speed.load(Ordering::Relaxed) == speed {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancelled_job_stops_even_when_it_waits() {
        let job = std::sync::Arc::new(Job::new());
        job.set_speed(1);
        job.more(1 << 40);
        let other = job.clone();
        let thread = std::thread::spawn(move || other.advance(1 << 40, 1 << 40));
        job.cancel();
        assert!(matches!(thread.join().unwrap(), Err(Error::Cancelled)));
        assert_eq!(job.progress(), (1 << 40, 1 << 40));
    }
}
