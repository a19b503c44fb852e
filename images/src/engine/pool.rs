//! Worker threads for requests that may take their time.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Error;

/// The most threads of a pool, unless it is told otherwise: as many requests wait for the host's disk at a time.
pub const MOST: usize = 64;
/// A thread without work ends after this.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// So many stay, with or without work.
    least: usize,
    most: usize,
    idle: usize,
    /// A thread has been woken or started and has not looked at the jobs yet. It calls the next
    /// one if there is more to do than one job: jobs that the page cache serves are done by few
    /// threads, which don't get in each other's way, while those that wait for the disk get as
    /// many as there are.
    coming: bool,
}

/// Threads, and what they have to do: of one engine, or of several that share them.
pub struct Pool {
    name: String,
    state: Mutex<State>,
    work: Condvar,
}

impl Default for Pool {
    fn default() -> Self {
        Self::named("disk")
    }
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
    /// Without threads so far; they will have that name. A thread has the CPUs, scheduler and control group of the
    /// queue's whose request it is started for.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            state: Mutex::new(State {
                jobs: VecDeque::new(),
                threads: 0,
                least: 0,
                most: MOST,
                idle: 0,
                coming: false,
            }),
            work: Condvar::new(),
        }
    }

    /// At least so many threads are there from now on, work or not, and at most so many (at least 1). Those that are
    /// missing are started here, by this thread; those that are too many end when they have nothing to do.
    ///
    /// # Errors
    /// The kernel's refusal of a thread.
    pub fn set_size(self: &Arc<Self>, least: usize, most: usize) -> Result<(), Error> {
        let mut state = self.state();
        state.most = most.max(1);
        state.least = least.min(state.most);
        while state.threads < state.least {
            self.start(&mut state).map_err(no_thread)?;
        }
        self.work.notify_all();
        Ok(())
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
                Err(no_thread(source))
            }
            // Those there are will come to it.
            _ => Ok(()),
        }
    }

    /// Wakes or starts one more thread, if there may be one.
    fn call(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        if state.idle > 0 {
            self.work.notify_one();
        } else if state.threads < state.most {
            self.start(state)?;
        } else {
            return Ok(());
        }
        state.coming = true;
        Ok(())
    }

    fn start(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let pool = self.clone();
        std::thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || pool.work())?;
        state.threads += 1;
        Ok(())
    }

    fn work(self: Arc<Self>) {
        let mut state = self.state();
        state.coming = false;
        loop {
            if state.threads > state.most {
                // The others come to what there is: one of them at least.
                state.threads -= 1;
                if !state.jobs.is_empty() {
                    self.work.notify_one();
                }
                return;
            }
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
            let spare = state.threads > state.least;
            if timeout.timed_out() && spare && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

fn no_thread(source: io::Error) -> Error {
    Error::Io {
        what: "starting a thread for a disk".to_owned(),
        source,
    }
}
