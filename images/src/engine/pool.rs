//! Worker threads for requests that may take their time.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Error;

/// The most threads of one engine: as many requests wait for the host's disk at a time.
const MOST: usize = 64;
/// A thread without work ends after this.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Idle threads that have been woken and not yet looked.
    woken: usize,
}

/// The threads, and what they have to do.
#[derive(Default)]
pub struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state();
        f.debug_struct("Pool")
            .field("jobs", &state.jobs.len())
            .field("threads", &state.threads)
            .finish()
    }
}

impl Pool {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a thread run `job`, now or when one is free.
    ///
    /// # Errors
    /// There is no thread, and the kernel gives none; `job` is dropped.
    pub fn run(self: &Arc<Self>, job: Job) -> Result<(), Error> {
        let mut state = self.state();
        state.jobs.push_back(job);
        if state.idle > state.woken {
            state.woken += 1;
            drop(state);
            self.work.notify_one();
            return Ok(());
        }
        if state.threads >= MOST {
            return Ok(());
        }
        let pool = self.clone();
        let spawned = std::thread::Builder::new()
            .name("disk".to_owned())
            .spawn(move || pool.work());
        match spawned {
            Ok(_) => state.threads += 1,
            // Those there are will come to it.
            Err(error) if state.threads > 0 => log::debug!("a disk's worker thread: {error}"),
            Err(source) => {
                state.jobs.pop_back();
                return Err(Error::Io {
                    what: "starting a thread for a disk".to_owned(),
                    source,
                });
            }
        }
        Ok(())
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state();
                continue;
            }
            state.idle += 1;
            let (back, timeout) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = back;
            state.idle -= 1;
            // More may be woken than are idle for a moment, never for long.
            state.woken = state.woken.saturating_sub(1);
            if timeout.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}
