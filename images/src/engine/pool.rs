//! Worker threads for requests that may take their time.

use std::collections::VecDeque;
use std::io;
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
    /// A thread has been woken or started and has not looked at the jobs yet. It calls the next
    /// one if there is more to do than one job: jobs that the page cache serves are done by few
    /// threads, which don't get in each other's way, while those that wait for the disk get as
    /// many as there are.
    coming: bool,
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
        if state.coming {
            return Ok(());
        }
        match self.call(&mut state) {
            Err(source) if state.threads == 0 => {
                state.jobs.pop_back();
                Err(Error::Io {
                    what: "starting a thread for a disk".to_owned(),
                    source,
                })
            }
            // Those there are will come to it.
            _ => Ok(()),
        }
    }

    /// Wakes or starts one more thread, if there may be one.
    fn call(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        if state.idle > 0 {
            self.work.notify_one();
        } else if state.threads < MOST {
            let pool = self.clone();
            std::thread::Builder::new()
                .name("disk".to_owned())
                .spawn(move || pool.work())?;
            state.threads += 1;
        } else {
            return Ok(());
        }
        state.coming = true;
        Ok(())
    }

    fn work(self: Arc<Self>) {
        let mut state = self.state();
        state.coming = false;
        loop {
            if let Some(job) = state.jobs.pop_front() {
                if !state.jobs.is_empty()
                    && !state.coming
                    && let Err(error) = self.call(&mut state)
                {
                    log::debug!("a disk's worker thread: {error}");
                }
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
            state.coming = false;
            if timeout.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}
