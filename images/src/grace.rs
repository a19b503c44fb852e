//! Who still uses a place in a file that is about to be freed.
//!
//! Data I/O takes a [`Stay`] before it looks up where its bytes are, and holds it until it is
//! done. A place is first taken out of the map, then [`Grace::mark`]ed, and may be used for
//! something else only once everybody who might have looked it up before has left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts who is in.
#[derive(Debug, Default)]
pub struct Grace {
    /// Which of the two counters newcomers use: the lowest bit.
    turn: AtomicU64,
    inside: [AtomicU64; 2],
}

/// Holds a place in use as long as it lives.
#[derive(Debug)]
pub struct Stay {
    grace: Arc<Grace>,
    turn: usize,
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.grace.inside[self.turn].fetch_sub(1, Ordering::SeqCst);
    }
}

/// A point in time: how many turns have to end before all who were in have left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

impl Grace {
    /// Comes in.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Stay {
        let turn = (self.turn.load(Ordering::SeqCst) & 1) as usize;
        self.inside[turn].fetch_add(1, Ordering::SeqCst);
        Stay {
            grace: self.clone(),
            turn,
        }
    }

    /// Now. Two turns have to begin from here on, so that both counters have been seen empty
    /// since: somebody may be in either, having read the turn long before he counted himself in.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(self.turn.load(Ordering::SeqCst) + 2)
    }

    /// Whether all who were in at `mark` have left. Called by one thread at a time.
    pub fn passed(&self, mark: Mark) -> bool {
        loop {
            let turn = self.turn.load(Ordering::SeqCst);
            if turn >= mark.0 {
                return true;
            }
            // The counter that the next turn uses must be empty, or old and new would mix.
            let next = ((turn + 1) & 1) as usize;
            if self.inside[next].load(Ordering::SeqCst) != 0 {
                return false;
            }
            self.turn.store(turn + 1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_only_when_all_who_were_in_have_left() {
        let grace = Arc::new(Grace::default());
        assert!(grace.passed(grace.mark()));
        let first = grace.enter();
        let mark = grace.mark();
        assert!(!grace.passed(mark));
        let later = grace.enter();
        drop(first);
        assert!(
            grace.passed(mark),
            "who came after the mark and the turn doesn't matter"
        );
        let mark = grace.mark();
        assert!(!grace.passed(mark));
        drop(later);
        assert!(grace.passed(mark));
    }
}
