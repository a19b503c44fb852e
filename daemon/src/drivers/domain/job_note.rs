//! What the next daemon is told of a migration: beside the folders of what runs, `UUID.job`.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmm_api::control::{Answer, Call, JobStatus};

use super::Driver;
use super::job::{Kind, Last, Operation, Statistics};
use super::lifecycle::ask;
use super::migrate::{self, TargetNote};
use super::object::{Domain, Pinned};
use super::state::{ShutoffReason, State};
use crate::error::{Error, ErrorCode, Result};
use crate::files::{self, Durability};

/// After a domain's uuid.
const NOTE: &str = ".job";
/// From one look at whether a VMM has come to the end of a job to the next.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long it may take: no longer than one waits for a sign of a guest that was given away.
const SETTLE_LIMIT: Duration = Duration::from_secs(660);
/// Why nothing came of a migration that its daemon did not see to its end.
const LEFT: &str = "migration failed: the daemon (vireod) of the source ended meanwhile";

/// A migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct JobNote {
    operation: Operation,
    /// When it began.
    began: SystemTime,
    /// The guest ran.
    was_running: bool,
    /// How far it is known to have come.
    status: JobStatus,
    /// Its definition is where it goes: here it is to have none when it has gone.
    #[serde(default)]
    undefine: bool,
    /// Where it went, once it had been sent there.
    #[serde(default)]
    target: Option<TargetNote>,
    /// How it ended.
    end: Option<End>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct End {
    kind: Kind,
    elapsed_ms: u64,
    error: Option<String>,
}

impl JobNote {
    fn elapsed(&self) -> Duration {
        SystemTime::now()
            .duration_since(self.began)
            .unwrap_or_default()
    }

    /// As it ended, or as it must have.
    fn last(&self, otherwise: impl FnOnce() -> (Kind, Option<String>)) -> Last {
        let (kind, error, elapsed) = match &self.end {
            Some(end) => (
                end.kind,
                end.error.clone(),
                Duration::from_millis(end.elapsed_ms),
            ),
            None => {
                let (kind, error) = otherwise();
                (kind, error, self.elapsed())
            }
        };
        Last {
            kind,
            statistics: Statistics {
                operation: self.operation,
                elapsed,
                status: self.status,
            },
            error,
        }
    }
}

impl Driver {
    fn job_note(&self, uuid: Uuid) -> PathBuf {
        self.roots.live_domains().join(format!("{uuid}{NOTE}"))
    }

    fn write_job_note(&self, uuid: Uuid, note: &JobNote) {
        let path = self.job_note(uuid);
        let written = serde_json::to_vec(note)
            .map_err(io::Error::other)
            .and_then(|text| files::write_atomically(&path, &text, Durability::Process));
        if let Err(error) = written {
            // Only the next daemon would know less.
            log::error!("cannot write '{}': {error}", path.display());
        }
    }

    fn read_job_note(&self, uuid: Uuid) -> Option<JobNote> {
        let path = self.job_note(uuid);
        match fs::read(&path).and_then(|text| Ok(serde_json::from_slice(&text)?)) {
            Ok(note) => Some(note),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                log::warn!("{}: {error}", path.display());
                None
            }
        }
    }

    /// A domain is to go.
    pub(super) fn note_job_begins(&self, domain: &Domain, was_running: bool) {
        let note = JobNote {
            operation: Operation::MigrationOut,
            began: SystemTime::now(),
            was_running,
            status: JobStatus::default(),
            undefine: false,
            target: None,
            end: None,
        };
        self.write_job_note(domain.uuid, &note);
    }

    /// It has come so far.
    pub(super) fn note_job_so_far(&self, domain: &Domain, status: JobStatus, target: TargetNote) {
        // Whoever changes the note has the lock.
        let _inner = domain.lock();
        if let Some(mut note) = self.read_job_note(domain.uuid) {
            note.status = status;
            note.target = Some(target);
            self.write_job_note(domain.uuid, &note);
        }
    }

    /// Whether its definition is to go with it.
    pub(super) fn note_undefine(&self, domain: &Domain, undefine: bool) {
        let _inner = domain.lock();
        if let Some(mut note) = self.read_job_note(domain.uuid) {
            note.undefine = undefine;
            self.write_job_note(domain.uuid, &note);
        }
    }

    /// A migration has ended, to or from here.
    pub(super) fn note_job_ended(&self, domain: &Domain, last: Option<&Last>) {
        let Some(last) = last else { return };
        let elapsed = last.statistics.elapsed;
        let note = JobNote {
            operation: last.statistics.operation,
            began: SystemTime::now()
                .checked_sub(elapsed)
                .unwrap_or(SystemTime::UNIX_EPOCH),
            was_running: false,
            status: last.statistics.status,
            undefine: self
                .read_job_note(domain.uuid)
                .is_some_and(|before| before.undefine),
            target: None,
            end: Some(End {
                kind: last.kind,
                elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
                error: last.error.clone(),
            }),
        };
        self.write_job_note(domain.uuid, &note);
    }

    /// Nobody is to hear of it again.
    pub(super) fn forget_job(&self, domain: &Domain) {
        let path = self.job_note(domain.uuid);
        if let Err(error) = files::remove_if_there(&path) {
            log::warn!("cannot remove '{}': {error}", path.display());
        }
    }

    /// Says how the migrations of an earlier daemon ended, and sees to those that have not.
    ///
    /// # Errors
    /// The folder can't be read.
    pub async fn settle_jobs(self: &Arc<Self>) -> io::Result<()> {
        for entry in fs::read_dir(self.roots.live_domains())? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let uuid = name.and_then(|name| name.strip_suffix(NOTE)?.parse::<Uuid>().ok());
            let Some(uuid) = uuid else { continue };
            let domain = self.pin("", uuid);
            match (domain, self.read_job_note(uuid)) {
                (Ok(domain), Some(note)) => {
                    // Where its process is about to end, that is waited for.
                    if let Err(error) = domain.job_of_arrival().await.map(drop) {
                        log::warn!("domain '{}': {error}", domain.name().name);
                    }
                    let undefine = note.undefine;
                    let done = self.settle_job(&domain, note);
                    if undefine {
                        self.see_undefined(domain, done).await;
                    }
                }
                _ => {
                    if let Err(error) = files::remove_if_there(&path) {
                        log::warn!("cannot remove '{}': {error}", path.display());
                    }
                }
            }
        }
        Ok(())
    }

    /// A domain that was to be undefined when it had gone is, if it has; otherwise it is not.
    async fn see_undefined(self: &Arc<Self>, domain: Pinned, gone: bool) {
        let ended = domain.lock().live.as_ref().map(|live| live.ended.clone());
        let Some(mut ended) = ended else {
            return self.undefine_gone(&domain, gone).await;
        };
        let driver = Arc::clone(self);
        tokio::spawn(async move {
            let end = ended.wait_for(|&ended| ended);
            let known = tokio::time::timeout(SETTLE_LIMIT, end)
                .await
                .is_ok_and(|ended| ended.is_ok());
            let state = domain.lock().state;
            let gone = known && state == State::Shutoff(ShutoffReason::Migrated);
            driver.undefine_gone(&domain, gone).await;
        });
    }

    async fn undefine_gone(self: &Arc<Self>, domain: &Pinned, gone: bool) {
        if gone && let Err(error) = self.undefine_moved(domain).await {
            log::error!("domain '{}': {error}", domain.name().name);
        }
        self.note_undefine(domain, false);
    }

    /// Whether it is known to have gone.
    fn settle_job(self: &Arc<Self>, domain: &Pinned, note: JobNote) -> bool {
        let mut inner = domain.lock();
        let state = inner.state;
        let Some(live) = inner.live.as_mut() else {
            let last = note.last(|| match state {
                State::Shutoff(ShutoffReason::Migrated) => (Kind::Completed, None),
                _ => {
                    let text = "migration failed: domain is no longer running";
                    (Kind::Failed, Some(text.to_owned()))
                }
            });
            self.note_job_ended(domain, Some(&last));
            let gone = last.kind == Kind::Completed && note.operation == Operation::MigrationOut;
            inner.last_job = Some(last);
            return gone;
        };
        if note.end.is_some() || note.operation != Operation::MigrationOut {
            let left = || (Kind::Failed, Some(LEFT.to_owned()));
            live.work.remember(note.last(left));
            return false;
        }
        // It gives the migration up by itself, unless the guest has gone by now.
        live.work.goes_on(note.operation, note.elapsed());
        drop(inner);
        let (driver, domain) = (Arc::clone(self), Arc::clone(&**domain));
        tokio::spawn(async move {
            if let Err(error) = driver.see_job_end(&domain, &note).await {
                log::error!("domain '{}': its migration: {error}", domain.name().name);
            }
        });
        false
    }

    async fn see_job_end(self: &Arc<Self>, domain: &Arc<Domain>, note: &JobNote) -> Result<()> {
        let Some(id) = domain.lock().live.as_ref().map(|live| live.id) else {
            return Ok(());
        };
        let job = async {
            let mut status = note.status;
            loop {
                match ask(domain, Call::JobStatus).await {
                    Ok(Answer::Job(Some(now))) => {
                        status = now;
                        // It waits for a sign of the guest, which may never come.
                        if migrate::is_undecided_still(domain).await {
                            return status;
                        }
                    }
                    Ok(_) => return status,
                    // Who watches it hears of its end, and how.
                    Err(_) if domain.lock().live.is_none() => return status,
                    Err(error) => log::debug!("{error}"),
                }
                tokio::time::sleep(INTERVAL).await;
            }
        };
        let ended = tokio::time::timeout(SETTLE_LIMIT, job).await;
        let status = ended.map_err(|_| {
            let text = "its VMM does not say what came of it";
            Error::new(ErrorCode::OPERATION_TIMEOUT, text)
        })?;
        // It may have been given away, and whether it has arrived is for the target to say.
        let target = note.target.as_ref();
        let gone = self.has_gone(domain, id, target, note.was_running).await;
        let why = match gone {
            // Who watches its VMM hears of its end.
            Some(true) => return Ok(()),
            Some(false) => Error::failed(LEFT),
            None => migrate::unknown(),
        };
        self.job_failed(domain, &why, status);
        if gone.is_some() && note.was_running {
            self.go_on(domain).await;
        }
        Ok(())
    }
}
