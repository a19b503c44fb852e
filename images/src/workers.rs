//! Pieces of an image handed to a few threads in order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::Error;

/// Numbers from 0 on, whose holders can wait for each other in order.
#[derive(Debug, Default)]
pub struct Turns {
    next: Mutex<u64>,
    changed: Condvar,
    broken: AtomicBool,
}

impl Turns {
    /// Waits until all numbers before `turn` are done; false if one of them failed.
    pub fn wait(&self, turn: u64) -> bool {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        while *next < turn && !self.broken.load(Ordering::Acquire) {
            next = self
                .changed
                .wait(next)
                .unwrap_or_else(PoisonError::into_inner);
        }
        !self.broken.load(Ordering::Acquire)
    }

    /// This number is done.
    pub fn done(&self, turn: u64) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = (*next).max(turn + 1);
        self.changed.notify_all();
    }

    /// Nobody waits any longer.
    pub fn fail(&self) {
        let _next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.broken.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

/// Runs `work` on each of what `next` gives, on `threads` threads (this one among them). `next` is
/// called by one thread at a time. The first error ends it all.
pub fn run<T: Send>(
    threads: usize,
    next: impl FnMut() -> Result<Option<T>, Error> + Send,
    work: impl Fn(T) -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    let next = Mutex::new(next);
    let stop = AtomicBool::new(false);
    let failed = Mutex::new(None);
    let one = || {
        while !stop.load(Ordering::Acquire) {
            let item = (*next.lock().unwrap_or_else(PoisonError::into_inner))();
            let done = match item {
                Ok(Some(item)) => work(item),
                Ok(None) => break,
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                stop.store(true, Ordering::Release);
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                // Whoever waited for one that failed says no more than that it was given up.
                if failed
                    .as_ref()
                    .is_none_or(|known| matches!(known, Error::Cancelled))
                {
                    *failed = Some(error);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            // Without a further thread the others do it all.
            let _ = std::thread::Builder::new()
                .name("image-worker".into())
                .spawn_scoped(scope, one);
        }
        one();
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_told_and_not_that_others_gave_up_for_it() {
        for _ in 0..50 {
            let (turns, mut left) = (Turns::default(), 0..8u64);
            let done = run(
                4,
                || Ok(left.next()),
                |turn| {
                    if turn == 2 {
                        turns.fail();
                        std::thread::sleep(std::time::Duration::from_millis(1));
                        return Err(Error::Invalid("no space".into()));
                    }
                    match turns.wait(turn) {
                        true => turns.done(turn),
                        false => return Err(Error::Cancelled),
                    }
                    Ok(())
                },
            );
            assert!(matches!(done, Err(Error::Invalid(_))), "{done:?}");
        }
    }
}
