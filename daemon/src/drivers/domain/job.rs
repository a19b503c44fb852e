//! Jobs: what takes long on a running domain, and what is told of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rpc::types::{TypedParam, TypedValue};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, oneshot};
use vmm_api::control::{Answer, Call, JobStatus, MigrationStatus};

use super::Driver;
use super::lifecycle::{ask, ask_within};
use super::object::{Domain, Pinned};
use super::state::{PausedReason, State};
use crate::control::ControlError;
use crate::error::{Error, ErrorCode, Result, check_flags};
use crate::killpoint;

/// What a job does (virDomainJobOperation).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Saves the domain.
    Save = 2,
    /// Comes from another host.
    MigrationIn = 4,
    /// Goes to another host.
    MigrationOut = 5,
    /// Makes a snapshot with memory.
    Snapshot = 6,
    /// Dumps it.
    Dump = 8,
}

/// How a job stands (virDomainJobType).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// There is none.
    None = 0,
    /// Its end is not known.
    Unbounded = 2,
    /// Done.
    Completed = 3,
    /// It came to nothing.
    Failed = 4,
    /// It was given up.
    Cancelled = 5,
}

/// How a domain's process ends after a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It is saved.
    Saved,
    /// It was dumped and is to be taken for crashed.
    Crashed,
    /// It makes room for a snapshot's state.
    Reverted,
}

/// A save that is being written: what a later daemon needs to see it to its end, or undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saving {
    /// The unfinished file.
    pub temp: PathBuf,
    /// What it becomes.
    pub path: PathBuf,
    /// What tells it from another save at that path.
    pub id: [u8; 16],
    /// The guest ran.
    pub was_running: bool,
}

/// A domain's job, the one before it, and what follows from them.
#[derive(Debug, Clone, Default)]
pub struct Work {
    /// The save that is being written.
    pub saving: Option<Saving>,
    /// Why the process is about to end, where a job ends it.
    pub end: Option<End>,
    running: Option<(Operation, Instant)>,
    last: Option<Last>,
    /// Told when a VMM that does not answer is not to be waited for any longer.
    given_up: Arc<Notify>,
}

/// The job before.
#[derive(Debug, Clone)]
pub struct Last {
    /// How it ended.
    pub kind: Kind,
    /// What there is to tell of it.
    pub statistics: Statistics,
    /// Why it came to nothing.
    pub error: Option<String>,
}

impl Last {
    /// One that was done, by what is said of it.
    pub fn done(operation: Operation, status: JobStatus) -> Self {
        Self {
            kind: Kind::Completed,
            statistics: Statistics {
                operation,
                elapsed: Duration::from_millis(status.elapsed_ms),
                status,
            },
            error: None,
        }
    }
}

impl Work {
    /// What a daemon finds that its predecessor left.
    pub fn left(saving: Option<Saving>) -> Self {
        Self {
            saving,
            ..Self::default()
        }
    }

    /// The job that a predecessor began so long ago may still be under way.
    pub fn goes_on(&mut self, operation: Operation, since: Duration) {
        let now = Instant::now();
        self.running = Some((operation, now.checked_sub(since).unwrap_or(now)));
    }

    /// Told when nobody is to wait for the job any longer.
    pub fn given_up(&self) -> Arc<Notify> {
        Arc::clone(&self.given_up)
    }

    /// The job before.
    pub fn last(&self) -> Option<&Last> {
        self.last.as_ref()
    }

    /// What is known of it from before this daemon.
    pub fn remember(&mut self, last: Last) {
        self.last = Some(last);
    }

    /// Why the guest stands still, if a job is why.
    pub fn pauses(&self) -> Option<PausedReason> {
        Some(match self.running?.0 {
            Operation::Save => PausedReason::Save,
            Operation::MigrationIn | Operation::MigrationOut => PausedReason::Migration,
            Operation::Snapshot => PausedReason::Snapshot,
            Operation::Dump => PausedReason::Dump,
        })
    }

    /// Whether this job runs.
    pub fn is(&self, operation: Operation) -> bool {
        self.running
            .is_some_and(|(running, _)| running == operation)
    }

    /// The job that was done elsewhere, by what the other side says of it.
    pub fn took_over(&mut self, status: JobStatus) {
        self.last = Some(Last::done(Operation::MigrationIn, status));
    }

    /// The job has come to nothing.
    pub fn fail(&mut self, error: &Error) {
        self.fail_at(error, JobStatus::default());
    }

    /// As [`Work::fail`], after it had come so far.
    pub fn fail_at(&mut self, error: &Error, status: JobStatus) {
        let Some((operation, began)) = self.running.take() else {
            return;
        };
        self.last = Some(Last {
            kind: match error.code {
                ErrorCode::OPERATION_ABORTED => Kind::Cancelled,
                _ => Kind::Failed,
            },
            statistics: Statistics {
                operation,
                elapsed: began.elapsed(),
                status,
            },
            error: Some(error.message.clone()),
        });
    }

    /// What outlives the domain's process; whether that ended because the guest goes on elsewhere.
    pub fn into_last(mut self, migrated: bool) -> Option<Last> {
        let moves = self.is(Operation::MigrationOut) || self.is(Operation::MigrationIn);
        if moves && migrated {
            self.finish(Some(JobStatus::default()));
        } else if moves {
            self.fail(&Error::failed("domain is no longer running"));
        }
        self.last
    }

    /// Since when a job runs, if one does.
    pub fn since(&self) -> Option<Instant> {
        self.running.map(|(_, since)| since)
    }

    /// # Errors
    /// VIR_ERR_OPERATION_INVALID: there is one.
    pub fn check_none(&self) -> Result<()> {
        match self.running {
            None => Ok(()),
            Some(_) => Err(Error::invalid("another job is running")),
        }
    }

    /// A job begins.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID: there is one, which goes on as it was.
    pub fn begin(&mut self, operation: Operation) -> Result<()> {
        self.check_none()?;
        self.running = Some((operation, Instant::now()));
        self.given_up = Arc::default();
        Ok(())
    }

    /// It has ended, well where there is a status.
    pub fn finish(&mut self, status: Option<JobStatus>) -> Option<Statistics> {
        let (operation, began) = self.running.take()?;
        let statistics = Statistics {
            operation,
            elapsed: began.elapsed(),
            status: status?,
        };
        self.last = Some(Last {
            kind: Kind::Completed,
            statistics,
            error: None,
        });
        Some(statistics)
    }
}

/// The answer to how a job stands.
#[derive(Debug)]
pub struct Told {
    /// How it stands.
    pub kind: Kind,
    /// Where there is one.
    pub statistics: Option<Statistics>,
    /// Why it came to nothing.
    pub error: Option<String>,
}

impl Told {
    fn nothing() -> Self {
        Self {
            kind: Kind::None,
            statistics: None,
            error: None,
        }
    }

    /// libvirt's names and types.
    pub fn params(&self) -> Vec<TypedParam> {
        let Some(statistics) = &self.statistics else {
            return Vec::new();
        };
        let mut params = statistics.params(self.kind == Kind::Completed);
        if let Some(error) = &self.error {
            params.push(TypedParam::new("success", TypedValue::Boolean(false)));
            params.push(TypedParam::new("errmsg", TypedValue::String(error.clone())));
        }
        params
    }
}

/// What is told of a job.
#[derive(Debug, Clone, Copy)]
pub struct Statistics {
    /// What it does.
    pub operation: Operation,
    /// Since when.
    pub elapsed: Duration,
    /// How far it is.
    pub status: JobStatus,
}

/// Bytes of a page, as the statistics count them.
const PAGE: u64 = 4096;

impl Statistics {
    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX)
    }

    /// Total, processed and remaining bytes of memory.
    pub fn memory(&self) -> (u64, u64, u64) {
        let JobStatus {
            total, processed, ..
        } = self.status;
        (total, processed, total.saturating_sub(processed))
    }

    /// Milliseconds since it began.
    pub fn milliseconds(&self) -> u64 {
        self.elapsed_ms()
    }

    /// libvirt's names and types (VIR_DOMAIN_JOB_*).
    pub fn params(&self, completed: bool) -> Vec<TypedParam> {
        if let Some(migration) = self.status.migration {
            return self.migration_params(&migration, completed);
        }
        let (total, processed, remaining) = self.memory();
        let elapsed = self.elapsed_ms();
        let normal = processed.saturating_sub(self.status.zero);
        let rate = (u128::from(normal) * 1000 / u128::from(elapsed.max(1))) as u64;
        let mut params = vec![TypedParam::new(
            "operation",
            TypedValue::Int(self.operation as i32),
        )];
        for (name, value) in [
            ("time_elapsed", elapsed),
            ("data_total", total),
            ("data_processed", processed),
            ("data_remaining", remaining),
            ("memory_total", total),
            ("memory_processed", processed),
            ("memory_remaining", remaining),
            ("memory_constant", self.status.zero / PAGE),
            ("memory_normal", normal / PAGE),
            ("memory_normal_bytes", normal),
            ("memory_bps", rate),
            ("memory_page_size", PAGE),
        ] {
            params.push(TypedParam::new(name, TypedValue::ULLong(value)));
        }
        if completed {
            params.push(TypedParam::new("success", TypedValue::Boolean(true)));
        }
        params
    }
}

impl Statistics {
    fn migration_params(&self, of: &MigrationStatus, completed: bool) -> Vec<TypedParam> {
        let total = self.status.total;
        let disks = of.disk_total > 0;
        let normal = of.pages * PAGE;
        let constant = (total / PAGE).saturating_sub(of.pages);
        let operation = TypedValue::Int(self.operation as i32);
        let mut params = vec![TypedParam::new("operation", operation)];
        for (name, value) in [
            ("time_elapsed", self.elapsed_ms()),
            ("downtime", of.downtime_ms),
            ("setup_time", of.setup_ms),
            ("data_total", total + of.disk_total),
            ("data_processed", of.transferred),
            ("data_remaining", of.remaining + of.disk_left),
            ("memory_total", total),
            (
                "memory_processed",
                of.transferred.saturating_sub(of.disk_sent),
            ),
            ("memory_remaining", of.remaining),
            ("memory_constant", constant),
            ("memory_normal", of.pages),
            ("memory_normal_bytes", normal),
            ("memory_bps", of.rate),
            ("memory_dirty_rate", of.dirty_rate),
            ("memory_iteration", of.iteration.into()),
            ("memory_page_size", PAGE),
        ] {
            params.push(TypedParam::new(name, TypedValue::ULLong(value)));
        }
        if disks {
            for (name, value) in [
                ("disk_total", of.disk_total),
                ("disk_processed", of.disk_sent),
                ("disk_remaining", of.disk_left),
                ("disk_bps", of.rate),
            ] {
                params.push(TypedParam::new(name, TypedValue::ULLong(value)));
            }
        }
        if of.throttle > 0 {
            let throttle = TypedValue::Int(of.throttle.into());
            params.push(TypedParam::new("auto_converge_throttle", throttle));
        }
        if completed {
            params.push(TypedParam::new("success", TypedValue::Boolean(true)));
        }
        params
    }
}

/// How long a VMM may be silent while it does a job.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// How long who looks at a job, or ends it, waits for the VMM.
const LOOK_LIMIT: Duration = Duration::from_secs(2);

/// What a job is told of that was given up before its VMM had begun with it.
pub fn cancelled() -> Error {
    Error::new(
        ErrorCode::OPERATION_ABORTED,
        "migration out job: canceled by client",
    )
}

/// What has to be done first for a migration, unless that is given up meanwhile.
///
/// # Errors
/// VIR_ERR_OPERATION_ABORTED: it was; else what went wrong.
pub async fn unless<T>(given_up: &Notify, first: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        done = first => done,
        () = given_up.notified() => Err(cancelled()),
    }
}

/// A job's end, for who waits for it: as long as the VMM answers at all, and nobody has given the job up.
pub async fn wait(
    domain: &Arc<Domain>,
    mut answer: oneshot::Receiver<std::result::Result<Answer, vmm_api::control::Failure>>,
) -> Result<JobStatus> {
    let aborted = || {
        let what = format!("{} job: canceled by client", operation_name(domain));
        Error::new(ErrorCode::OPERATION_ABORTED, what)
    };
    let (given_up, was_running) = {
        let inner = domain.lock();
        let work = &inner.live()?.work;
        let ran = work
            .saving
            .as_ref()
            .is_some_and(|saving| saving.was_running);
        (Arc::clone(&work.given_up), ran)
    };
    let told = tokio::select! {
        told = &mut answer => told,
        () = given_up.notified() => {
            late_end(domain, answer, was_running);
            return Err(aborted());
        }
        error = silence(domain) => {
            // It hears of that when it listens again.
            if let Ok(live) = domain.lock().live() {
                let _ = live.control.send(Call::AbortJob);
            }
            late_end(domain, answer, was_running);
            return Err(error);
        }
    };
    match told {
        Ok(Ok(Answer::Job(Some(status)))) => Ok(status),
        Ok(Ok(other)) => Err(Error::internal(format!("the VMM answered {other:?}"))),
        Ok(Err(failure)) if failure.message == "it was given up" => Err(aborted()),
        Ok(Err(failure)) => Err(Error::failed(failure.message)),
        Err(_) => Err(Error::failed("domain is no longer running")),
    }
}

/// Comes back when the VMM has been silent for too long.
pub async fn silence(domain: &Domain) -> Error {
    const EVERY: Duration = Duration::from_secs(5);
    let limit = killpoint::limit("silence", SILENCE_LIMIT);
    loop {
        tokio::time::sleep(EVERY).await;
        match ask_within(domain, Call::JobStatus, limit).await {
            Err(error) if error.code == ErrorCode::OPERATION_TIMEOUT => return error,
            // That it has ended its answer tells, too.
            _ => {}
        }
    }
}

/// A job that nobody waits for any more may be done all the same when its VMM wakes up: the guest, which stands still
/// then if it ran before, goes on.
fn late_end(
    domain: &Arc<Domain>,
    answer: oneshot::Receiver<std::result::Result<Answer, vmm_api::control::Failure>>,
    was_running: bool,
) {
    let domain = Arc::clone(domain);
    tokio::spawn(async move {
        let done = matches!(answer.await, Ok(Ok(_))) && was_running;
        let stands = matches!(domain.lock().state, State::Paused(_));
        if done
            && stands
            && let Err(error) = ask(&domain, Call::Resume).await
        {
            log::warn!("domain '{}': {error}", domain.name().name);
        }
    });
}

fn operation_name(domain: &Domain) -> &'static str {
    let inner = domain.lock();
    match inner.live.as_ref().and_then(|live| live.work.running) {
        Some((Operation::Dump, _)) => "dump",
        Some((Operation::MigrationIn | Operation::MigrationOut, _)) => "migration out",
        Some((Operation::Snapshot, _)) => "snapshot",
        _ => "domain save",
    }
}

/// What the VMM's refusal to take a job up is in libvirt's words.
pub fn not_begun(error: ControlError) -> Error {
    match error {
        ControlError::Refused(message) => Error::failed(message),
        _ => Error::failed("domain is no longer running"),
    }
}

/// VIR_DOMAIN_JOB_STATS_COMPLETED
const STATS_COMPLETED: u32 = 1;
/// VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
const STATS_KEEP: u32 = 2;
/// VIR_DOMAIN_ABORT_JOB_POSTCOPY
const ABORT_POSTCOPY: u32 = 1;

impl Driver {
    /// How the domain's job stands. Never waits for it.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off.
    pub async fn job(&self, domain: &Domain, flags: u32) -> Result<Told> {
        check_flags(flags, STATS_COMPLETED | STATS_KEEP, "qemuDomainGetJobStats")?;
        let running = {
            let mut inner = domain.lock();
            let inner = &mut *inner;
            if flags & STATS_COMPLETED != 0 {
                let last = match &mut inner.live {
                    Some(live) => &mut live.work.last,
                    None => &mut inner.last_job,
                };
                let last = match flags & STATS_KEEP {
                    0 => {
                        self.forget_job(domain);
                        last.take()
                    }
                    _ => last.clone(),
                };
                return Ok(last.map_or_else(Told::nothing, |last| Told {
                    kind: last.kind,
                    statistics: Some(last.statistics),
                    error: last.error,
                }));
            }
            if let Some(coming) = &inner.coming {
                return Ok(Told {
                    kind: Kind::Unbounded,
                    statistics: Some(Statistics {
                        operation: Operation::MigrationIn,
                        elapsed: coming.began.elapsed(),
                        status: JobStatus::default(),
                    }),
                    error: None,
                });
            }
            inner.live_mut()?.work.running
        };
        let Some((operation, began)) = running else {
            return Ok(Told::nothing());
        };
        let status = match ask_within(domain, Call::JobStatus, LOOK_LIMIT).await {
            Ok(Answer::Job(Some(status))) => status,
            // Before its first step, or after its last.
            _ => JobStatus::default(),
        };
        let statistics = Statistics {
            operation,
            elapsed: began.elapsed(),
            status,
        };
        Ok(Told {
            kind: Kind::Unbounded,
            statistics: Some(statistics),
            error: None,
        })
    }

    /// Gives the domain's job up; the guest runs on. Never waits for it.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off, or there is no job.
    pub async fn abort_job(&self, domain: Pinned, flags: u32) -> Result<()> {
        check_flags(flags, ABORT_POSTCOPY, "qemuDomainAbortJobFlags")?;
        if flags & ABORT_POSTCOPY != 0 {
            return Err(Error::invalid(
                "current job is not outgoing migration in post-copy mode",
            ));
        }
        if domain.lock().coming.is_some() {
            return Err(Error::invalid(
                "cannot abort incoming migration; use virDomainDestroy instead",
            ));
        }
        let (running, given_up) = {
            let inner = domain.lock();
            let work = &inner.live()?.work;
            (work.running, Arc::clone(&work.given_up))
        };
        let Some((operation, _)) = running else {
            return Err(Error::invalid("no job is active on the domain"));
        };
        let migrates = matches!(operation, Operation::MigrationIn | Operation::MigrationOut);
        if migrates && self.abort_begun(&domain) {
            return Ok(());
        }
        match ask_within(&domain, Call::AbortJob, LOOK_LIMIT).await {
            Ok(_) => Ok(()),
            // It hears of that when it listens again; whoever waits for the job does not wait for it.
            Err(error) if error.code == ErrorCode::OPERATION_TIMEOUT => {
                given_up.notify_one();
                Ok(())
            }
            // Before its VMM has begun with it.
            Err(error) if error.message.contains("no job is running") && migrates => {
                given_up.notify_one();
                Ok(())
            }
            Err(error) if error.message.contains("no job is running") => {
                Err(Error::invalid("no job is active on the domain"))
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_have_libvirts_names_and_add_up() {
        let statistics = Statistics {
            operation: Operation::Save,
            elapsed: Duration::from_millis(500),
            status: JobStatus {
                total: 10 << 20,
                processed: 6 << 20,
                zero: 4 << 20,
                ..JobStatus::default()
            },
        };
        let params = statistics.params(true);
        let get = |name: &str| params.iter().find(|p| p.field == name).map(|p| &p.value);
        assert_eq!(get("operation"), Some(&TypedValue::Int(2)));
        assert_eq!(get("memory_remaining"), Some(&TypedValue::ULLong(4 << 20)));
        assert_eq!(get("memory_constant"), Some(&TypedValue::ULLong(1024)));
        assert_eq!(get("memory_bps"), Some(&TypedValue::ULLong(4 << 20)));
        assert_eq!(get("success"), Some(&TypedValue::Boolean(true)));
    }
}
