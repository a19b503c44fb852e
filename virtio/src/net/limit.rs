//! Bandwidth limits: token buckets.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::life::lock;

/// A limit for one direction. All 0: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Bytes a second in the long run; 0: no limit at all.
    pub average: u64,
    /// Bytes a second while a burst lasts; 0: as fast as it goes.
    pub peak: u64,
    /// Bytes of one burst; 0: what `average` gives in 50 ms.
    pub burst: u64,
}

/// Whoever comes late may still send this much at once: a frame with all its segments, else no
/// large segment would ever go through a slow link's bucket at full speed.
const LEAST_BURST: u64 = 64 << 10;
const NANOS: i128 = 1_000_000_000;

/// Fills with `rate` bytes a second up to `capacity`; what is taken may make it negative, and
/// then nothing is given until the debt is paid.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    capacity: u64,
    /// Bytes times a thousand million.
    level: i128,
    at: Instant,
}

impl Bucket {
    fn new(rate: u64, capacity: u64, now: Instant) -> Self {
        Self {
            rate,
            capacity,
            level: i128::from(capacity) * NANOS,
            at: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let nanos = i128::try_from(passed.as_nanos()).unwrap_or(i128::from(u64::MAX));
        let more = nanos.saturating_mul(i128::from(self.rate));
        let full = i128::from(self.capacity) * NANOS;
        self.level = self.level.saturating_add(more).min(full);
    }

    /// How long until something may be taken; zero: now.
    fn wait(&self) -> Duration {
        if self.level > 0 {
            return Duration::ZERO;
        }
        let nanos = (-self.level) / i128::from(self.rate.max(1)) + 1;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, bytes: u64) {
        self.level = self.level.saturating_sub(i128::from(bytes) * NANOS);
    }
}

/// One direction's limit, shared by all queue pairs. Changeable at any time.
#[derive(Debug, Default)]
pub struct Limiter {
    limited: AtomicBool,
    buckets: Mutex<Vec<Bucket>>,
}

impl Limiter {
    /// A limiter that holds to `limit` from now on.
    #[must_use]
    pub fn new(limit: Bandwidth) -> Self {
        let limiter = Self::default();
        limiter.set(limit, Instant::now());
        limiter
    }

    /// Changes the limit; bursts start afresh.
    pub fn set(&self, limit: Bandwidth, now: Instant) {
        let mut buckets = lock(&self.buckets);
        buckets.clear();
        if limit.average > 0 {
            let burst = if limit.burst > 0 {
                limit.burst
            } else {
                limit.average / 20
            };
            buckets.push(Bucket::new(limit.average, burst.max(LEAST_BURST), now));
            if limit.peak > 0 {
                let capacity = (limit.peak / 100).max(LEAST_BURST);
                buckets.push(Bucket::new(limit.peak, capacity, now));
            }
        }
        self.limited.store(limit.average > 0, Ordering::Relaxed);
    }

    /// There is a limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// How long to wait before the next frame may go; zero: it may go now.
    #[must_use]
    pub fn wait(&self, now: Instant) -> Duration {
        if !self.is_limited() {
            return Duration::ZERO;
        }
        let mut buckets = lock(&self.buckets);
        let mut wait = Duration::ZERO;
        for bucket in buckets.iter_mut() {
            bucket.fill(now);
            wait = wait.max(bucket.wait());
        }
        wait
    }

    /// A frame of so many bytes went.
    pub fn take(&self, bytes: u64) {
        if self.is_limited() {
            for bucket in lock(&self.buckets).iter_mut() {
                bucket.take(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends frames of `frame` bytes for `seconds` as fast as allowed; bytes that went.
    fn send(limiter: &Limiter, start: Instant, frame: u64, seconds: u64) -> u64 {
        let mut now = start;
        let mut sent = 0;
        while now < start + Duration::from_secs(seconds) {
            let wait = limiter.wait(now);
            if wait.is_zero() {
                limiter.take(frame);
                sent += frame;
            } else {
                now += wait;
            }
        }
        sent
    }

    #[test]
    fn the_average_holds_in_the_long_run() {
        let limiter = Limiter::default();
        let start = Instant::now();
        limiter.set(
            Bandwidth {
                average: 1_000_000,
                peak: 0,
                burst: 500_000,
            },
            start,
        );
        let sent = send(&limiter, start, 1500, 10);
        assert!((10_490_000..10_510_000).contains(&sent), "{sent}");
    }

    #[test]
    fn a_burst_goes_at_peak_speed() {
        let limiter = Limiter::default();
        let start = Instant::now();
        limiter.set(
            Bandwidth {
                average: 1_000_000,
                peak: 2_000_000,
                burst: 10_000_000,
            },
            start,
        );
        let sent = send(&limiter, start, 1500, 5);
        assert!((9_990_000..10_080_000).contains(&sent), "{sent}");
    }

    #[test]
    fn a_limit_can_be_lifted() {
        let limiter = Limiter::new(Bandwidth {
            average: 1,
            peak: 1,
            burst: 1,
        });
        let now = Instant::now();
        limiter.take(10_000_000);
        assert!(limiter.wait(now) > Duration::from_secs(1000));
        limiter.set(Bandwidth::default(), now);
        assert!(limiter.wait(now).is_zero());
    }

    #[test]
    fn extremes_do_not_overflow() {
        let limiter = Limiter::default();
        let now = Instant::now();
        let all = Bandwidth {
            average: u64::MAX,
            peak: u64::MAX,
            burst: u64::MAX,
        };
        limiter.set(all, now);
        for _ in 0..100 {
            limiter.take(u64::MAX);
        }
        let later = now + Duration::from_secs(1 << 30);
        let _ = limiter.wait(later);
        assert!(limiter.wait(now) <= Duration::from_secs(200));
    }
}
