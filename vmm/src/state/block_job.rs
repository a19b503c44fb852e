//! What moves content between a disk's images while its guest runs: a thread, and how it stands.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use images::commit;
use images::follow::Follow;
use images::{Image, Job, Qcow2};

use crate::devices::lock;
use crate::killpoint::killpoint;

/// What follows the guest's writes is ready when no more bytes than this are left.
const LITTLE: u64 = 1 << 20;
/// From one look at what was written to the next, when it is ready.
const LOOK: Duration = Duration::from_millis(200);

/// What is to be moved.
#[derive(Debug)]
pub enum Work {
    /// Up into `top`, down to the image at that depth.
    Pull {
        /// The image on top.
        top: Arc<Qcow2>,
        /// All, if there is none.
        depth: Option<u32>,
    },
    /// Down into `base`, of the first `depth` images from `top` on.
    Commit {
        /// The first image.
        top: Arc<dyn Image>,
        /// How many.
        depth: u32,
        /// The image that is written.
        base: Arc<dyn Image>,
        /// The same.
        base_qcow2: Option<Arc<Qcow2>>,
    },
    /// Of what the guest writes, until it is told to stop.
    Follow(Arc<dyn Follow>),
}

/// How a job stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// It copies.
    Copying,
    /// All is copied, and is kept so.
    Ready,
    /// Its thread has ended.
    Ended(Result<(), Cause>),
}

/// Why it ended before its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// It was given up.
    Cancelled,
    /// In words for the caller.
    Failed(String),
}

#[derive(Debug)]
struct Shared {
    phase: Mutex<(Phase, bool)>,
    changed: Condvar,
}

/// A job that runs.
#[derive(Debug)]
pub struct BlockJob {
    job: Arc<Job>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl BlockJob {
    /// Sets it going; `tell` is called when its phase has changed.
    ///
    /// # Errors
    /// No thread.
    pub fn start(work: Work, speed: u64, tell: impl Fn() + Send + 'static) -> io::Result<Self> {
        let job = Arc::new(Job::new());
        job.set_speed(speed);
        let shared = Arc::new(Shared {
            phase: Mutex::new((Phase::Copying, false)),
            changed: Condvar::new(),
        });
        let (own_job, own) = (job.clone(), shared.clone());
        let thread = std::thread::Builder::new()
            .name("blockjob".into())
            .spawn(move || {
                // A job that ends in no way would be waited for without end.
                let run = AssertUnwindSafe(|| run(work, &own_job, &own, &tell));
                let result = match catch_unwind(run) {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(images::Error::Cancelled)) => Err(Cause::Cancelled),
                    Ok(Err(error)) => Err(Cause::Failed(error.to_string())),
                    Err(_) => Err(Cause::Failed("the job's thread panicked".into())),
                };
                lock(&own.phase).0 = Phase::Ended(result);
                tell();
            })?;
        Ok(Self {
            job,
            shared,
            thread: Some(thread),
        })
    }

    /// How it stands.
    pub fn phase(&self) -> Phase {
        lock(&self.shared.phase).0.clone()
    }

    /// Bytes done, and to do.
    pub fn progress(&self) -> (u64, u64) {
        self.job.progress()
    }

    /// Bytes a second from now on.
    pub fn set_speed(&self, speed: u64) {
        self.job.set_speed(speed);
    }

    /// It is to end soon, as given up.
    pub fn cancel(&self) {
        self.job.cancel();
        self.shared.changed.notify_all();
    }

    /// One that is ready is to end soon, to be finished.
    pub fn leave(&self) {
        // What is left is a moment's work, and the guest waits for its end.
        self.job.set_speed(0);
        lock(&self.shared.phase).1 = true;
        self.shared.changed.notify_all();
    }

    /// Waits for its thread, which is told to end, or has.
    pub fn join(mut self) -> Phase {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            return Phase::Ended(Err(Cause::Failed("the job's thread panicked".into())));
        }
        self.phase()
    }
}

impl Drop for BlockJob {
    fn drop(&mut self) {
        self.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a block job's thread panicked");
        }
    }
}

fn run(work: Work, job: &Job, shared: &Shared, tell: &impl Fn()) -> Result<(), images::Error> {
    let follow = match work {
        Work::Pull { top, depth } => return top.pull(depth, job),
        Work::Commit {
            top,
            depth,
            base,
            base_qcow2,
        } => return commit::commit(&top, depth, &base, base_qcow2.as_ref(), job),
        Work::Follow(follow) => follow,
    };
    follow.copy(job)?;
    killpoint("vmm.commit-copied");
    while follow.catch_up(job)? > LITTLE {}
    follow.flush()?;
    lock(&shared.phase).0 = Phase::Ready;
    tell();
    loop {
        {
            let mut phase = lock(&shared.phase);
            if !phase.1 && !job.is_cancelled() {
                phase = shared
                    .changed
                    .wait_timeout(phase, LOOK)
                    .map_or_else(|broken| broken.into_inner().0, |(phase, _)| phase);
            }
            if job.is_cancelled() {
                return Err(images::Error::Cancelled);
            }
            if phase.1 {
                break;
            }
        }
        follow.catch_up(job)?;
    }
    follow.catch_up(job)?;
    // What is left to be synced with the guest at rest is little then.
    follow.flush()?;
    follow.catch_up(job).map(drop)
}
