//! Limits on a disk's I/O (`<iotune>`): bytes and requests per second, with bursts.
//!
//! A leaky bucket as a meter, with QEMU's parameters and arithmetic: I/O done is water poured in,
//! the bucket leaks at the average rate, and while it holds more than its size nothing more is
//! let through. The size is a tenth of a second at the average rate, or, where a burst is
//! allowed, `burst * burst_seconds`; a burst longer than a second runs against a second bucket
//! that keeps it at the burst rate. Requests are never split: one that is let through may overfill
//! the bucket, and the next ones wait for it.
//!
//! Time is passed in, in nanoseconds from any fixed point. Levels are kept in billionths of a
//! unit, so all arithmetic is whole numbers.

use crate::Error;

/// Nanoseconds in a second, and billionths in a unit.
const NANO: u128 = 1_000_000_000;

/// The largest rate, and the largest bucket (QEMU's limit too).
pub const RATE_MAX: u64 = 1_000_000_000_000_000;

/// One limit. All zero: none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rate {
    /// Units a second in the long run; 0 for no limit.
    pub average: u64,
    /// Units a second during a burst; 0 for no bursts.
    pub burst: u64,
    /// How long a burst may last, in seconds; 0 means 1.
    pub burst_seconds: u64,
}

impl Rate {
    /// The bucket's size in billionths.
    fn size(&self) -> u128 {
        if self.burst == 0 {
            u128::from(self.average) * NANO / 10
        } else {
            u128::from(self.burst) * u128::from(self.burst_seconds.max(1)) * NANO
        }
    }
}

/// All limits of a disk, or of a group of disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes read and written a second.
    pub total_bytes: Rate,
    /// Bytes read a second.
    pub read_bytes: Rate,
    /// Bytes written a second.
    pub write_bytes: Rate,
    /// Requests a second.
    pub total_iops: Rate,
    /// Read requests a second.
    pub read_iops: Rate,
    /// Write requests a second.
    pub write_iops: Rate,
    /// A request larger than this many bytes counts as proportionally more; 0: every request is
    /// one.
    pub iops_size: u64,
}

impl Limits {
    fn rates(&self) -> [Rate; 6] {
        [
            self.total_bytes,
            self.read_bytes,
            self.write_bytes,
            self.total_iops,
            self.read_iops,
            self.write_iops,
        ]
    }

    /// Nothing is limited.
    #[must_use]
    pub fn none(&self) -> bool {
        self.rates().iter().all(|rate| rate.average == 0)
    }

    /// Whether these limits make sense together.
    ///
    /// # Errors
    /// `Error::Invalid`: a total beside a read or write limit of the same kind, a burst without an
    /// average or lower than it, a burst's length without a burst, values out of range.
    pub fn check(&self) -> Result<(), Error> {
        let invalid = |reason: String| Err(Error::Invalid(reason));
        const NAMES: [&str; 6] = [
            "total_bytes_sec",
            "read_bytes_sec",
            "write_bytes_sec",
            "total_iops_sec",
            "read_iops_sec",
            "write_iops_sec",
        ];
        let rates = self.rates();
        for (kind, group) in [("bytes", &rates[..3]), ("iops", &rates[3..])] {
            if group[0].average != 0 && group[1..].iter().any(|rate| rate.average != 0) {
                return invalid(format!(
                    "total and read/write limits of {kind} a second can't be set at the same time"
                ));
            }
        }
        for (name, rate) in NAMES.iter().zip(rates) {
            if rate.burst != 0 && rate.average == 0 {
                return invalid(format!("{name}_max needs {name}"));
            }
            if rate.burst_seconds != 0 && rate.burst == 0 {
                return invalid(format!("{name}_max_length needs {name}_max"));
            }
            if rate.burst != 0 && rate.burst < rate.average {
                return invalid(format!("{name}_max is lower than {name}"));
            }
            if rate.average > RATE_MAX || rate.size() > u128::from(RATE_MAX) * NANO {
                return invalid(format!("{name} is above {RATE_MAX}"));
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    /// Billionths of a unit.
    level: u128,
    /// The same against the burst rate.
    burst_level: u128,
}

impl Bucket {
    fn leak(&mut self, rate: &Rate, elapsed: u64) {
        let elapsed = u128::from(elapsed);
        self.level = self
            .level
            .saturating_sub(u128::from(rate.average) * elapsed);
        self.burst_level = self
            .burst_level
            .saturating_sub(u128::from(rate.burst) * elapsed);
    }

    /// Nanoseconds until something may be poured in.
    fn wait(&self, rate: &Rate) -> u64 {
        if rate.average == 0 {
            return 0;
        }
        let drain = |above: u128, rate: u64| above.div_ceil(u128::from(rate));
        let mut wait = drain(self.level.saturating_sub(rate.size()), rate.average);
        if wait == 0 && rate.burst_seconds > 1 {
            let size = u128::from(rate.burst) * NANO / 10;
            wait = drain(self.burst_level.saturating_sub(size), rate.burst);
        }
        u64::try_from(wait).unwrap_or(u64::MAX)
    }
}

/// Limits with what has been done against them so far.
#[derive(Debug, Clone)]
pub struct Throttle {
    limits: Limits,
    rates: [Rate; 6],
    buckets: [Bucket; 6],
    /// When the buckets last leaked, in nanoseconds.
    leaked: u64,
}

impl Throttle {
    /// Empty buckets.
    #[must_use]
    pub fn new(limits: Limits, now: u64) -> Self {
        Self {
            limits,
            rates: limits.rates(),
            buckets: Default::default(),
            leaked: now,
        }
    }

    /// The limits in force.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Lets a request of `bytes` through, and counts it, or says in how many nanoseconds (at
    /// least 1) to ask again.
    ///
    /// # Errors
    /// That wait.
    pub fn admit(&mut self, write: bool, bytes: u64, now: u64) -> Result<(), u64> {
        let elapsed = now.saturating_sub(self.leaked);
        self.leaked = self.leaked.max(now);
        // Total, and its own direction's, of bytes and of requests.
        let own = if write { 2 } else { 1 };
        let concerned = [0, own, 3, 3 + own];
        let mut wait = 0;
        for (bucket, rate) in self.buckets.iter_mut().zip(&self.rates) {
            bucket.leak(rate, elapsed);
        }
        for i in concerned {
            wait = wait.max(self.buckets[i].wait(&self.rates[i]));
        }
        if wait != 0 {
            return Err(wait);
        }
        let size = u128::from(bytes) * NANO;
        let ops = match u128::from(self.limits.iops_size) {
            0 => NANO,
            unit => (size / unit).max(NANO),
        };
        for i in concerned {
            if self.rates[i].average == 0 {
                continue;
            }
            let units = if i < 3 { size } else { ops };
            self.buckets[i].level += units;
            if self.rates[i].burst != 0 {
                self.buckets[i].burst_level += units;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn rate(average: u64, burst: u64, burst_seconds: u64) -> Rate {
        Rate {
            average,
            burst,
            burst_seconds,
        }
    }

    /// Requests of `bytes` let through in `seconds`, by somebody who always has one waiting.
    fn run(throttle: &mut Throttle, write: bool, bytes: u64, from: u64, seconds: u64) -> u64 {
        let (mut now, mut done) = (from, 0);
        while now < from + seconds * SECOND {
            match throttle.admit(write, bytes, now) {
                Ok(()) => done += 1,
                Err(wait) => {
                    assert!(wait > 0);
                    now += wait;
                }
            }
        }
        done
    }

    #[test]
    fn an_average_is_kept_to_the_request() {
        let limits = Limits {
            total_iops: rate(100, 0, 0),
            ..Limits::default()
        };
        let mut throttle = Throttle::new(limits, 0);
        // A tenth of a second's worth, and the one that overfills, come at once.
        assert_eq!(run(&mut throttle, false, 4096, 0, 10), 10 * 100 + 100 / 10);
        // The wait is exact: one request of a hundred a second is 10 ms.
        let mut throttle = Throttle::new(limits, 0);
        for _ in 0..11 {
            assert_eq!(throttle.admit(true, 512, 0), Ok(()));
        }
        assert_eq!(throttle.admit(true, 512, 0), Err(SECOND / 100));
        assert_eq!(throttle.admit(true, 512, SECOND / 100 - 1), Err(1));
        assert_eq!(throttle.admit(true, 512, SECOND / 100), Ok(()));
    }

    #[test]
    fn a_burst_goes_at_its_rate_for_its_seconds_then_falls_back() {
        // The example of QEMU's documentation: 100 a second, bursts of 2000 for 60 s.
        let limits = Limits {
            total_iops: rate(100, 2000, 60),
            ..Limits::default()
        };
        let mut throttle = Throttle::new(limits, 0);
        let first = run(&mut throttle, false, 4096, 0, 60);
        assert!((120_000..=120_201).contains(&first), "{first}");
        // The bucket leaked 6000 meanwhile: a little over 3 s more at the burst rate.
        let next = run(&mut throttle, false, 4096, 60 * SECOND, 3);
        assert!((5_999..=6_001).contains(&next), "{next}");
        let _ = run(&mut throttle, false, 4096, 63 * SECOND, 2);
        assert_eq!(run(&mut throttle, false, 4096, 65 * SECOND, 10), 1000);
        // A quiet time as long as the bucket needs to empty allows a burst again.
        let again = run(&mut throttle, false, 4096, 2000 * SECOND, 10);
        assert!((20_000..=20_201).contains(&again), "{again}");
    }

    #[test]
    fn a_burst_of_one_second_may_come_at_once() {
        let limits = Limits {
            read_bytes: rate(1 << 20, 4 << 20, 1),
            ..Limits::default()
        };
        let mut throttle = Throttle::new(limits, 0);
        for _ in 0..5 {
            assert_eq!(throttle.admit(false, 1 << 20, 0), Ok(()));
        }
        assert_eq!(throttle.admit(false, 1 << 20, 0), Err(SECOND));
        // Writes are not concerned.
        assert_eq!(throttle.admit(true, 1 << 30, 0), Ok(()));
        assert_eq!(throttle.admit(true, 1 << 30, 0), Ok(()));
    }

    #[test]
    fn a_large_request_passes_whole_and_is_paid_for_afterwards() {
        let limits = Limits {
            write_bytes: rate(1000, 0, 0),
            ..Limits::default()
        };
        let mut throttle = Throttle::new(limits, 0);
        assert_eq!(throttle.admit(true, 1_000_000, 0), Ok(()));
        // 1,000,000 less the bucket's 100, at 1000 a second.
        assert_eq!(throttle.admit(true, 1, 0), Err(999_900 * SECOND / 1000));
        // No request is so large that anything overflows.
        let mut throttle = Throttle::new(limits, 0);
        assert_eq!(throttle.admit(true, u64::MAX, 0), Ok(()));
        assert_eq!(throttle.admit(true, 1, 0), Err(u64::MAX));
        assert!(throttle.admit(true, 1, u64::MAX).is_err());
    }

    #[test]
    fn requests_above_iops_size_count_in_proportion() {
        let limits = Limits {
            total_iops: rate(10, 0, 0),
            iops_size: 4096,
            ..Limits::default()
        };
        let mut throttle = Throttle::new(limits, 0);
        assert_eq!(throttle.admit(false, 6144, 0), Ok(()));
        assert_eq!(throttle.admit(false, 512, 0), Err(SECOND / 20));
        assert_eq!(throttle.admit(false, 512, SECOND / 20), Ok(()));
        assert_eq!(throttle.admit(false, 512, SECOND / 20), Err(SECOND / 10));
    }

    #[test]
    fn the_strictest_limit_counts_and_total_counts_both_ways() {
        let limits = Limits {
            total_bytes: rate(4096 * 100, 0, 0),
            read_iops: rate(10, 0, 0),
            ..Limits::default()
        };
        let mut throttle = Throttle::new(limits, 0);
        assert_eq!(run(&mut throttle, false, 4096, 0, 10), 101);
        // What reads have left over, writes may use.
        let writes = run(&mut throttle, true, 4096, 10 * SECOND, 10);
        assert!((1000..=1011).contains(&writes), "{writes}");
    }

    #[test]
    fn a_clock_that_stands_or_steps_back_is_no_credit() {
        let limits = Limits {
            total_iops: rate(10, 0, 0),
            ..Limits::default()
        };
        let mut throttle = Throttle::new(limits, SECOND);
        assert_eq!(throttle.admit(false, 1, 0), Ok(()));
        assert_eq!(throttle.admit(false, 1, 0), Ok(()));
        assert!(throttle.admit(false, 1, 0).is_err());
        assert!(throttle.admit(false, 1, SECOND).is_err());
        assert_eq!(throttle.admit(false, 1, 2 * SECOND), Ok(()));
    }

    #[test]
    fn limits_that_contradict_each_other_are_refused() {
        let bad = |limits: Limits, what: &str| {
            let said = limits.check().unwrap_err().to_string();
            assert!(said.contains(what), "{said}");
        };
        let none = Limits::default();
        none.check().unwrap();
        assert!(none.none());
        bad(
            Limits {
                total_bytes: rate(1, 0, 0),
                write_bytes: rate(1, 0, 0),
                ..none
            },
            "at the same time",
        );
        bad(
            Limits {
                read_iops: rate(0, 5, 0),
                ..none
            },
            "read_iops_sec_max needs",
        );
        bad(
            Limits {
                read_iops: rate(5, 0, 2),
                ..none
            },
            "max_length needs",
        );
        bad(
            Limits {
                read_iops: rate(5, 4, 0),
                ..none
            },
            "lower than",
        );
        bad(
            Limits {
                write_bytes: rate(5, RATE_MAX, 2),
                ..none
            },
            "above",
        );
        bad(
            Limits {
                write_bytes: rate(u64::MAX, 0, 0),
                ..none
            },
            "above",
        );
    }
}
