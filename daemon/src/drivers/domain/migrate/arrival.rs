//! The side that a guest comes to: whether it has come, and what is left to be done then.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use vmm_api::control::{Call, JobStatus};

use super::flags;
use super::target::{Answered, Arriving};
use crate::drivers::domain::Driver;
use crate::drivers::domain::lifecycle::ask;
use crate::drivers::domain::object::Domain;
use crate::drivers::domain::record::ArrivalNote;
use crate::drivers::domain::state::{Lifecycle, PausedReason, State};
use crate::error::{Error, ErrorCode, Result};
use crate::events::DomainEvent;

/// From the end of a VMM's connection to the end of the process.
const GONE_LIMIT: Duration = Duration::from_secs(1);
/// From one attempt to have a guest to the next.
const CLAIM_INTERVAL: Duration = Duration::from_secs(1);

impl Driver {
    /// The VMM has answered whether it has taken the guest over.
    pub(super) async fn taken(
        self: &Arc<Self>,
        mut arriving: Arriving,
        flags: u64,
        mut status: JobStatus,
        began: Instant,
        answered: Answered,
    ) -> Result<Arc<Domain>> {
        let domain = Arc::clone(&arriving.domain);
        let paused = flags & flags::PAUSED != 0;
        let telling = arriving.telling.take();
        let mut may_have_run = false;
        let taken = match answered {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(failure)) => Err(Error::failed(failure.message)),
            Err(_) => {
                let ended = domain.lock().live.as_ref().map(|live| live.ended.clone());
                if let Some(mut ended) = ended
                    && timeout(GONE_LIMIT, ended.wait_for(|&ended| ended))
                        .await
                        .is_err()
                {
                    // It lives, and may have the guest: who watches it finds out.
                    let error = Error::failed(
                        "the domain's VMM has closed its control connection: whether it has taken the guest over is \
                         not known",
                    );
                    self.is_left_to_itself(&domain, &error);
                    if let Some(id) = arriving.id {
                        self.tell_what_is_seen(&domain, telling, id);
                    }
                    return Err(error);
                }
                // What it has told was heard before its end.
                may_have_run = arriving.taken.load(Ordering::Acquire);
                Err(Error::failed("domain is no longer running"))
            }
        };
        if let Some(moved) = &mut status.migration {
            // The guest has stood still at least since then.
            let since = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            moved.downtime_ms = moved.downtime_ms.max(since).max(1);
        }
        {
            let mut inner = domain.lock();
            if let Ok(live) = inner.live_mut() {
                match &taken {
                    Ok(()) => {
                        live.work.finish(None);
                        live.work.took_over(status);
                        self.note_job_ended(&domain, live.work.last());
                    }
                    Err(error) => live.work.fail(error),
                }
            }
        }
        if let Err(error) = taken {
            let id = arriving.id;
            self.cancel(arriving).await;
            // Nobody has it if it can't run here any more, and never did.
            let is_there = (domain.lock().live.as_ref()).is_some_and(|live| Some(live.id) == id);
            if !is_there {
                self.migrations.tell(telling, may_have_run);
            }
            return Err(error);
        }
        self.migrations.tell(telling, true);
        if paused {
            self.is_here_paused(&domain);
        }
        if flags & flags::PERSIST_DEST != 0 {
            // It runs here whatever comes of this.
            self.store(&arriving, flags)
                .await
                .map_err(|error| Error::new(ErrorCode::MIGRATE_PERSIST_FAILED, error.message))?;
        }
        let mut inner = domain.lock();
        if let Ok(live) = inner.live_mut() {
            live.arrival = None;
        }
        self.write_record(&inner);
        drop(inner);
        Ok(domain)
    }

    /// Nobody waits for it any more. It may be known by now that it has come.
    fn is_left_to_itself(self: &Arc<Self>, domain: &Arc<Domain>, why: &Error) {
        let mut inner = domain.lock();
        let came = matches!(inner.state, State::Running(_));
        let Ok(live) = inner.live_mut() else { return };
        live.work.fail(why);
        let paused = live.arrival.as_ref().is_some_and(|arrival| arrival.paused);
        let arrival = live.arrival.take_if(|_| came);
        drop(inner);
        if let Some(arrival) = arrival {
            self.see_arrival_through(domain, arrival);
        } else if paused {
            self.claim_arrival(domain);
        }
    }

    /// It has come, and is to stay paused.
    fn is_here_paused(&self, domain: &Domain) {
        let mut inner = domain.lock();
        inner.state = State::Paused(PausedReason::User);
        let event = DomainEvent::Lifecycle(Lifecycle::SuspendedPaused);
        self.emit(&domain.name_in(&inner), &event);
        self.write_record(&inner);
    }

    /// What is left to be done for a guest that turned out to be this side's when nobody waited for it any more.
    pub(in crate::drivers::domain) fn see_arrival_through(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        arrival: ArrivalNote,
    ) {
        let (driver, domain) = (Arc::clone(self), Arc::clone(domain));
        tokio::spawn(async move {
            let name = domain.name().name;
            log::info!("domain '{name}' has come after all");
            driver.keep_volumes(domain.uuid);
            if let Some(xml) = &arrival.persistent
                && let Err(error) = driver.define(xml, 0).await
            {
                log::error!("domain '{name}' runs here, but can't be made persistent: {error}");
            }
            driver.write_record(&domain.lock());
        });
    }

    /// A guest that was to come and to stay paused is this side's, or never will be: its VMM knows.
    pub(in crate::drivers::domain) fn claim_arrival(self: &Arc<Self>, domain: &Arc<Domain>) {
        let (driver, domain) = (Arc::clone(self), Arc::clone(domain));
        tokio::spawn(async move {
            // Its control connection may have to be made again first.
            const ATTEMPTS: u32 = 10;
            for attempt in 1..=ATTEMPTS {
                tokio::time::sleep(CLAIM_INTERVAL).await;
                match ask(&domain, Call::Claim).await {
                    Ok(_) => break,
                    Err(error) if attempt == ATTEMPTS || domain.lock().live.is_none() => {
                        log::warn!("domain '{}' has not come: {error}", domain.name().name);
                        return;
                    }
                    Err(error) => log::debug!("domain '{}': {error}", domain.name().name),
                }
            }
            // Somebody may have resumed it by now.
            if domain.lock().state == State::Paused(PausedReason::Migration) {
                driver.is_here_paused(&domain);
            }
            let arrival = domain
                .lock()
                .live
                .as_mut()
                .and_then(|live| live.arrival.take());
            if let Some(arrival) = arrival {
                driver.see_arrival_through(&domain, arrival);
            }
        });
    }
}
