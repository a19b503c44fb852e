//! Rounds of a migration that bring it no nearer to its end.

use std::time::{Duration, Instant};

/// So many rounds without progress
const ROUNDS: u32 = 10;
/// that take at least so long: somebody may want to do something about it.
const TIME: Duration = Duration::from_secs(10);

/// Looks for progress, round by round.
#[derive(Debug)]
pub struct Stuck {
    least: u64,
    throttle: u32,
    rounds: u32,
    since: Instant,
}

impl Stuck {
    /// Nothing is known yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            least: u64::MAX,
            throttle: 0,
            rounds: 0,
            since: Instant::now(),
        }
    }

    /// A round has left so many bytes, with the guest slowed down by so many percent; whether it has gone on without
    /// progress for too long. A tenth less is progress, and so is a slower guest, of which more is to be hoped.
    pub fn goes_on(&mut self, left: u64, throttle: u32) -> bool {
        if left < self.least / 10 * 9 || throttle > self.throttle {
            *self = Self {
                least: left.min(self.least),
                throttle,
                ..Self::new()
            };
            return false;
        }
        self.rounds += 1;
        self.rounds >= ROUNDS && self.since.elapsed() >= TIME
    }
}

impl Default for Stuck {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long_ago(mut stuck: Stuck) -> Stuck {
        stuck.since = Instant::now().checked_sub(TIME).unwrap();
        stuck
    }

    #[test]
    fn only_many_rounds_without_progress_are_too_many() {
        let mut stuck = Stuck::new();
        assert!(!stuck.goes_on(1000, 0));
        let mut stuck = long_ago(stuck);
        for _ in 1..ROUNDS {
            assert!(!stuck.goes_on(990, 0));
        }
        assert!(stuck.goes_on(1010, 0));
        // Less, or slower.
        assert!(!stuck.goes_on(800, 0));
        assert_eq!(stuck.rounds, 0);
        let mut stuck = long_ago(stuck);
        stuck.rounds = ROUNDS;
        assert!(!stuck.goes_on(800, 99));
        assert_eq!(stuck.rounds, 0);
        // It has not lasted long.
        stuck.rounds = ROUNDS;
        assert!(!stuck.goes_on(800, 99));
    }
}
