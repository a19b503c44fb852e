//! The side that a guest leaves: Begin, Confirm, and what becomes of it if it does not go.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot::{self, error::RecvError};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use uuid::Uuid;
use vmm_api::control::{Answer, Call, Failure, JobStatus};
use xml_schemas::domain::View;
use xml_schemas::domain::device::Disk;

use super::settle::unknown;
use super::{Params, abi, check, flags, lock, storage};
use crate::drivers::domain::block_jobs::without_block_job;
use crate::drivers::domain::job::{self as jobs, Last, Operation};
use crate::drivers::domain::lifecycle::ask;
use crate::drivers::domain::object::{Domain, Pinned};
use crate::drivers::domain::state::{PausedReason, State};
use crate::drivers::domain::{Driver, channels};
use crate::error::{Error, ErrorCode, Result};
use crate::killpoint::killpoint;

/// How long the VMM may take to end after the guest has gone.
const SETTLE_LIMIT: Duration = Duration::from_secs(40);
/// How long it may take to take the guest back.
pub(super) const BACK_LIMIT: Duration = Duration::from_secs(15);

/// What a VMM answers to a migration.
pub(super) type Reply = oneshot::Receiver<std::result::Result<Answer, Failure>>;
/// The same, or it is gone.
pub(super) type Answered = std::result::Result<std::result::Result<Answer, Failure>, RecvError>;

/// A guest that has gone as far as it can before the target takes it.
#[derive(Debug)]
pub struct Outgoing {
    /// The connection whose end gives it up.
    pub(super) client: u64,
    /// The VMM's last word.
    pub(super) reply: Option<Reply>,
    /// The guest ran.
    pub(super) was_running: bool,
    /// Becomes true if nothing comes of it after all.
    pub(super) failed: watch::Receiver<bool>,
    /// Whoever moves it says whether it came.
    pub(super) said: watch::Sender<Option<bool>>,
}

/// Why a guest has not gone.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) error: Error,
    /// It may have, after all: it stays paused.
    pub(super) undecided: bool,
}

/// What Begin gives.
#[derive(Debug)]
pub struct Begun {
    /// The definition for the target.
    pub xml: String,
    /// For the target.
    pub cookie: Vec<u8>,
}

impl Driver {
    /// Begin: checks whether the domain can go, and gives its definition.
    ///
    /// # Errors
    /// Why it can't.
    pub async fn migrate_begin(
        self: &Arc<Self>,
        domain: &Pinned,
        client: u64,
        params: &Params,
        flags: u64,
    ) -> Result<Begun> {
        check(flags)?;
        params.connections(flags)?;
        params.packing(flags)?;
        params.converge(flags)?;
        let (definition, running, persistent) = {
            let inner = domain.lock();
            inner.check_settled()?;
            if let Some(live) = &inner.live {
                live.work.check_none()?;
                self.check_protection(domain.uuid, live.change_protection, client)?;
            }
            let definition = match flags & flags::OFFLINE {
                _ if inner.persistent.is_none() => inner.definition()?,
                0 => inner.definition()?,
                _ => inner.stored()?,
            };
            let running = inner.live.is_some();
            (definition, running, inner.persistent.is_some())
        };
        let definition = definition.ok_or_else(|| Error::invalid("domain is not running"))?;
        if !running && flags & flags::OFFLINE == 0 {
            return Err(Error::invalid("domain is not running"));
        }
        // Then only its definition goes, whether it runs or not.
        let running = running && flags & flags::OFFLINE == 0;
        let needs = |what: &str| Err(Error::invalid(what));
        if domain
            .lock()
            .live
            .as_ref()
            .is_some_and(|live| live.autodestroy)
        {
            return needs("domain is marked for auto destroy");
        }
        // They would stay behind, or be lost with the definition.
        let snapshots = self.count_snapshots(domain)?;
        if snapshots > 0 {
            return needs(&format!("cannot migrate domain with {snapshots} snapshots"));
        }
        if flags & flags::UNDEFINE_SOURCE != 0 && !running && self.has_managed_save(domain) {
            return needs("Refusing to undefine while domain managed save image exists");
        }
        if let Some(name) = &params.dname {
            xml_schemas::domain::check_name(name)?;
        }
        if flags & flags::OFFLINE != 0 && flags & flags::PERSIST_DEST == 0 {
            return needs("offline migration must be specified with the persistent flag set");
        }
        if flags & flags::UNDEFINE_SOURCE != 0 && !persistent {
            return needs("cannot undefine transient domain");
        }
        let along = storage::chosen(&definition, params, flags)?;
        if running && flags & flags::UNSAFE == 0 {
            check_disks(&definition, &along)?;
        }
        if running {
            without_block_job(domain).await?;
        }
        if running && flags & flags::CHANGE_PROTECTION != 0 {
            // It may be this client's own, of an attempt that came to nothing.
            let _job = domain.job_in_migration().await?;
            domain.lock().live()?.work.check_none()?;
            domain.lock().live_mut()?.change_protection = true;
            lock(&self.migrations.protected).insert(domain.uuid, client);
        }
        let begun = self.begun(domain, &definition, &along, params, flags).await;
        if begun.is_err() {
            self.end_protection(domain);
        }
        begun
    }

    /// Begin, by a client that makes the other calls, too: if nobody is to change the domain meanwhile, it is a job from
    /// now on.
    ///
    /// # Errors
    /// Why it can't go.
    pub async fn migrate_begin_for(
        self: &Arc<Self>,
        domain: &Pinned,
        client: u64,
        params: &Params,
        flags: u64,
    ) -> Result<Begun> {
        // It may be this client's own, which it has not gone on with.
        if self.goes_on_with(domain, client).is_ok_and(|begun| begun) {
            self.job_failed(domain, &jobs::cancelled(), JobStatus::default());
        }
        let begun = self.migrate_begin(domain, client, params, flags).await?;
        if flags & flags::CHANGE_PROTECTION != 0
            && flags & flags::OFFLINE == 0
            && let Err(error) = self.job_begun(domain, client)
        {
            self.end_protection(domain);
            return Err(error);
        }
        Ok(begun)
    }

    /// What the target is told.
    async fn begun(
        &self,
        domain: &Domain,
        definition: &xml_schemas::Domain,
        along: &[Disk],
        params: &Params,
        flags: u64,
    ) -> Result<Begun> {
        let cookie = self.storage_cookie(domain, along).await?;
        let cookie =
            serde_json::to_vec(&cookie).map_err(|error| Error::internal(error.to_string()))?;
        let xml = match &params.dxml {
            Some(text) => {
                let given = self.parse(text, false)?;
                abi::check(definition, &given)?;
                given.format(View::Inactive)
            }
            None => {
                let told = storage::for_target(definition, along, flags);
                channels::without_paths(told, &self.roots.channels()).format(View::Inactive)
            }
        };
        Ok(Begun { xml, cookie })
    }

    /// Whether a client may go on with a domain that may be protected.
    pub(super) fn check_protection(&self, uuid: Uuid, protected: bool, client: u64) -> Result<()> {
        let owner = lock(&self.migrations.protected).get(&uuid).copied();
        match protected && owner != Some(client) {
            true => Err(Error::invalid("another client migrates the domain")),
            false => Ok(()),
        }
    }

    /// The domain may be changed again.
    pub(super) fn end_protection(&self, domain: &Domain) {
        // One lock at a time: Perform takes them in the other order.
        let was = lock(&self.migrations.protected).remove(&domain.uuid);
        if was.is_some()
            && let Ok(live) = domain.lock().live_mut()
        {
            live.change_protection = false;
        }
    }

    /// A migration of the domain is a job from now on; gives what is told when it is given up.
    pub(super) fn job_begins(&self, domain: &Domain) -> Result<Arc<Notify>> {
        let mut inner = domain.lock();
        let running = matches!(inner.state, State::Running(_));
        let live = inner.live_mut()?;
        live.work.begin(Operation::MigrationOut)?;
        let given_up = live.work.given_up();
        self.note_job_begins(domain, running);
        Ok(given_up)
    }

    /// It has come to nothing.
    pub(in crate::drivers::domain) fn job_failed(
        &self,
        domain: &Domain,
        error: &Error,
        status: JobStatus,
    ) {
        let mut inner = domain.lock();
        if let Ok(live) = inner.live_mut()
            && live.work.is(Operation::MigrationOut)
        {
            live.work.fail_at(error, status);
            live.migration_ready = None;
            self.note_job_ended(domain, live.work.last());
        }
    }

    /// Confirm: the target has the guest, or it is not to have it.
    ///
    /// # Errors
    /// Where the guest is is not as was said.
    pub async fn migrate_confirm(
        self: &Arc<Self>,
        domain: &Pinned,
        flags: u64,
        cancelled: bool,
    ) -> Result<()> {
        match self.confirm(domain, flags, cancelled).await? {
            Some(kept) if kept.undecided => Err(kept.error),
            _ => Ok(()),
        }
    }

    /// The same; says why the guest is still here, where that was heard from its VMM.
    pub(super) async fn confirm(
        self: &Arc<Self>,
        domain: &Pinned,
        flags: u64,
        cancelled: bool,
    ) -> Result<Option<Kept>> {
        check(flags)?;
        self.ends_before_it_moves(domain);
        self.end_protection(domain);
        if flags & flags::OFFLINE != 0 {
            if !cancelled && flags & flags::UNDEFINE_SOURCE != 0 {
                self.undefine_moved(domain).await?;
            }
            return Ok(None);
        }
        let outgoing = lock(&self.migrations.outgoing).remove(&domain.uuid);
        let Some(mut outgoing) = outgoing else {
            // It failed before it came so far, or was given up: the guest is here.
            return match cancelled {
                true => Ok(None),
                false => Err(Error::invalid(
                    "no migration of this domain is to be confirmed",
                )),
            };
        };
        outgoing.said.send_replace(Some(!cancelled));
        if cancelled {
            return Ok(self.take_back(domain, &mut outgoing).await);
        }
        let undefine = flags & flags::UNDEFINE_SOURCE != 0;
        if undefine {
            // The other side has its definition: if this daemon dies now, the next one sees to the rest.
            self.note_undefine(domain, true);
        }
        killpoint("migrate.finished");
        let gone = self.wait_until_gone(domain, &mut outgoing).await;
        let mut done = gone.inspect_err(|error| {
            log::error!("domain '{}': {error}", domain.name().name);
        });
        if undefine {
            if done.is_ok() {
                done = self.undefine_moved(domain).await;
            }
            // What is defined by that name later is another one.
            self.note_undefine(domain, false);
        }
        done.map(|()| None)
    }

    /// It has a definition elsewhere.
    pub(in crate::drivers::domain) async fn undefine_moved(
        self: &Arc<Self>,
        domain: &Pinned,
    ) -> Result<()> {
        let all = crate::drivers::domain::define::UNDEFINE_ALL;
        match self.registry.pin(domain) {
            Some(pinned) => self.undefine(pinned, all).await,
            None => Ok(()),
        }
    }

    /// The VMM says that the guest runs elsewhere, and ends.
    async fn wait_until_gone(&self, domain: &Pinned, outgoing: &mut Outgoing) -> Result<()> {
        let ended = domain.lock().live.as_ref().map(|live| live.ended.clone());
        if let Some(reply) = outgoing.reply.take() {
            match timeout(SETTLE_LIMIT, reply).await {
                Ok(Ok(Ok(Answer::Job(status)))) => self.job_done(domain, status),
                // Its connection ends with the process.
                Ok(Err(_)) => {}
                Ok(answer) => return Err(refusal(answer)),
                Err(_) => {
                    return Err(Error::new(
                        ErrorCode::OPERATION_TIMEOUT,
                        "the guest was not taken over by the target",
                    ));
                }
            }
        }
        if let Some(mut ended) = ended {
            let end = ended.wait_for(|&ended| ended);
            if timeout(SETTLE_LIMIT, end).await.is_err() {
                return Err(Error::new(
                    ErrorCode::OPERATION_TIMEOUT,
                    "the guest has gone, but its VMM does not end",
                ));
            }
        }
        Ok(())
    }

    /// The guest runs elsewhere.
    fn job_done(&self, domain: &Domain, status: Option<JobStatus>) {
        let mut inner = domain.lock();
        let inner = &mut *inner;
        match &mut inner.live {
            Some(live) => {
                live.work.finish(status);
                self.note_job_ended(domain, live.work.last());
            }
            None => {
                let done = |status| Last::done(Operation::MigrationOut, status);
                inner.last_job = status.map(done);
                self.note_job_ended(domain, inner.last_job.as_ref());
            }
        }
    }

    /// The guest is to run on here. Whether it can is for the two VMMs to say: if the target has it
    /// already, it stays there. Gives why it has not gone.
    async fn take_back(&self, domain: &Pinned, outgoing: &mut Outgoing) -> Option<Kept> {
        let name = domain.name().name;
        outgoing.said.send_replace(Some(false));
        if let Err(error) = ask(domain, Call::AbortJob).await {
            log::debug!("domain '{name}': {error}");
        }
        let mut error = Error::failed("migration was cancelled: the guest was not taken over");
        let mut status = JobStatus::default();
        let mut undecided = false;
        if let Some(reply) = outgoing.reply.take() {
            match timeout(BACK_LIMIT, reply).await {
                Ok(Ok(Ok(answer))) => {
                    log::warn!("domain '{name}' had been taken over by the target");
                    let status = match answer {
                        Answer::Job(status) => status,
                        _ => None,
                    };
                    self.job_done(domain, Some(status.unwrap_or_default()));
                    if let Err(error) = self.wait_until_gone(domain, outgoing).await {
                        log::error!("domain '{name}': {error}");
                    }
                    return None;
                }
                Ok(answer) => {
                    status = so_far(&answer);
                    undecided = is_undecided(&answer);
                    error = match undecided {
                        true => unknown(),
                        false => refusal(answer),
                    };
                }
                // It has been given away, and the other side says nothing.
                Err(_) => {
                    error = unknown();
                    log::error!("domain '{name}': {}", error.message);
                    undecided = true;
                }
            }
        }
        self.job_failed(domain, &error, status);
        // One that was not moved live was paused before.
        if outgoing.was_running && !undecided {
            self.go_on(domain).await;
        }
        Some(Kept { error, undecided })
    }

    /// The guest stands still for a migration that came to nothing: it goes on. Where the other side still has its disks,
    /// a while later; whoever moved it may be gone by then.
    pub(in crate::drivers::domain) async fn go_on(&self, domain: &Domain) {
        const ATTEMPTS: u32 = 60;
        const INTERVAL: Duration = Duration::from_secs(1);
        let stands_still = |domain: &Domain, of: Option<i32>| {
            let inner = domain.lock();
            let still = matches!(inner.state, State::Paused(PausedReason::Migration));
            let live = inner
                .live
                .as_ref()
                .filter(|live| still && !live.suspended && of.is_none_or(|id| live.id == id));
            live.map(|live| live.id)
        };
        let Some(id) = stands_still(domain, None) else {
            return;
        };
        let Err(error) = ask(domain, Call::Resume).await else {
            return;
        };
        let name = domain.name().name;
        log::warn!("domain '{name}' can't go on yet: {error}");
        let Ok(domain) = self.find(&name, domain.uuid) else {
            return;
        };
        tokio::spawn(async move {
            for attempt in 1..=ATTEMPTS {
                tokio::time::sleep(INTERVAL).await;
                if stands_still(&domain, Some(id)).is_none() {
                    return;
                }
                match ask(&domain, Call::Resume).await {
                    Ok(_) => return,
                    Err(error) if attempt == ATTEMPTS => {
                        log::error!("domain '{name}' can't go on: {error}");
                    }
                    Err(error) => log::debug!("domain '{name}': {error}"),
                }
            }
        });
    }

    /// A connection has gone, and with it whoever would have confirmed; with a goodbye or without.
    pub fn migrations_of_gone(self: &Arc<Self>, client: u64, goodbye: bool) {
        let gone: Vec<(Uuid, Outgoing)> = {
            let mut all = lock(&self.migrations.outgoing);
            let of = |(uuid, o): (&Uuid, &Outgoing)| (o.client == client).then_some(*uuid);
            let uuids: Vec<Uuid> = all.iter().filter_map(of).collect();
            let take = |uuid: Uuid| all.remove(&uuid).map(|outgoing| (uuid, outgoing));
            uuids.into_iter().filter_map(take).collect()
        };
        self.forget_aborted(client);
        let unprotected: Vec<Uuid> = {
            let all = lock(&self.migrations.protected);
            let of = all.iter().filter(|(_, owner)| **owner == client);
            of.map(|(uuid, _)| *uuid).collect()
        };
        for uuid in unprotected {
            if let Ok(domain) = self.pin("", uuid) {
                self.ends_before_it_moves(&domain);
                self.end_protection(&domain);
            }
        }
        for (uuid, mut outgoing) in gone {
            let driver = Arc::clone(self);
            tokio::spawn(async move {
                if let Ok(domain) = driver.pin("", uuid) {
                    log::warn!(
                        "domain '{}': its migration's client has gone",
                        domain.name().name
                    );
                    driver.take_back(&domain, &mut outgoing).await;
                }
            });
        }
        self.arrivals_of_gone(client, goodbye);
    }

    /// Changes how long the guest may stand still, and how fast it may be sent.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off, for the former.
    pub async fn migrate_tune(
        &self,
        domain: &Pinned,
        bandwidth: Option<u64>,
        downtime_ms: Option<u64>,
    ) -> Result<()> {
        let running = {
            let mut inner = domain.lock();
            inner.check_settled()?;
            if let Some(downtime) = downtime_ms {
                inner.live()?;
                inner.migration.downtime_ms = downtime;
            }
            if let Some(bandwidth) = bandwidth {
                inner.migration.bandwidth = bandwidth;
            }
            self.write_record(&inner);
            let live = inner.live.as_ref();
            live.is_some_and(|live| live.work.is(Operation::MigrationOut))
        };
        if running {
            let call = Call::SetMigration {
                bandwidth,
                downtime_ms,
            };
            // It may just have come to its end.
            if let Err(error) = ask(domain, call).await {
                log::debug!("domain '{}': {error}", domain.name().name);
            }
        }
        Ok(())
    }
}

/// Whether the guest may run on the other side.
pub(super) fn is_undecided(answer: &Answered) -> bool {
    matches!(answer, Ok(Err(failure)) if failure.is_undecided())
}

/// How far a migration came that a VMM says has failed.
pub(super) fn so_far(answer: &Answered) -> JobStatus {
    match answer {
        Ok(Err(failure)) => failure.job.unwrap_or_default(),
        _ => JobStatus::default(),
    }
}

/// What a VMM says against it.
pub(super) fn refusal(answer: Answered) -> Error {
    match answer {
        Ok(Err(failure)) if failure.message.contains("it was given up") => Error::new(
            ErrorCode::OPERATION_ABORTED,
            "migration out job: canceled by client",
        ),
        Ok(Err(failure)) if failure.message.contains("lacks CPU features") => {
            Error::new(ErrorCode::CPU_INCOMPATIBLE, failure.message)
        }
        Ok(Err(failure)) => Error::failed(format!("migration failed: {}", failure.message)),
        Ok(Ok(answer)) => Error::internal(format!("the VMM answered {answer:?}")),
        Err(_) => Error::failed("domain is no longer running"),
    }
}

/// The guest's disks must be the same on both sides, and what one side has written must be there for
/// the other.
fn check_disks(definition: &xml_schemas::Domain, along: &[Disk]) -> Result<()> {
    for element in definition.devices.rest.iter() {
        if element.name != "disk" {
            continue;
        }
        let disk = Disk::read(element)?;
        if along.iter().any(|other| other.target == disk.target) {
            continue;
        }
        let shares = disk.readonly || disk.shareable;
        let through = matches!(disk.cache.as_deref(), Some("none" | "directsync"));
        if disk.source.path().is_some() && !shares && !through {
            let text = "Migration may lead to data corruption if disks use cache other than none \
                        or directsync";
            return Err(Error::new(ErrorCode::MIGRATE_UNSAFE, text));
        }
    }
    Ok(())
}
