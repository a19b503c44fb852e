//! A client's migration between Begin and Perform, where nobody is to change the domain meanwhile: it is a job from Begin on,
//! and can be given up.

use super::lock;
use crate::drivers::domain::Driver;
use crate::drivers::domain::job::{self as jobs, Operation};
use crate::drivers::domain::object::Domain;
use crate::error::{Error, Result};
use vmm_api::control::JobStatus;

/// Such a job.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    client: u64,
    /// Somebody has given it up.
    aborted: bool,
}

impl Driver {
    /// A client has begun.
    pub(super) fn job_begun(&self, domain: &Domain, client: u64) -> Result<()> {
        self.job_begins(domain)?;
        let begun = Begun {
            client,
            aborted: false,
        };
        lock(&self.migrations.begun).insert(domain.uuid, begun);
        Ok(())
    }

    /// It goes on; whether its job has begun already.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_ABORTED: that was given up.
    pub(super) fn goes_on_with(&self, domain: &Domain, client: u64) -> Result<bool> {
        let begun = {
            let mut all = lock(&self.migrations.begun);
            match all.get(&domain.uuid) {
                Some(begun) if begun.client == client => all.remove(&domain.uuid),
                _ => None,
            }
        };
        match begun {
            Some(begun) if begun.aborted => Err(jobs::cancelled()),
            // The guest may have ended since.
            Some(_) => Ok(domain.lock().live()?.work.is(Operation::MigrationOut)),
            None => Ok(false),
        }
    }

    /// A client has gone, which would have heard that its job was given up.
    pub(super) fn forget_aborted(&self, client: u64) {
        let of = |begun: &Begun| begun.client == client && begun.aborted;
        lock(&self.migrations.begun).retain(|_, begun| !of(begun));
    }

    /// It does not go on.
    pub(super) fn ends_before_it_moves(&self, domain: &Domain) {
        let begun = lock(&self.migrations.begun).remove(&domain.uuid);
        if begun.is_some_and(|begun| !begun.aborted) {
            let error = Error::failed("migration was cancelled before the guest could move");
            self.job_failed(domain, &error, JobStatus::default());
        }
    }

    /// Somebody gives it up; false if there is none.
    pub(in crate::drivers::domain) fn abort_begun(&self, domain: &Domain) -> bool {
        {
            let mut all = lock(&self.migrations.begun);
            let Some(begun) = all.get_mut(&domain.uuid).filter(|begun| !begun.aborted) else {
                return false;
            };
            begun.aborted = true;
        }
        self.end_protection(domain);
        self.job_failed(domain, &jobs::cancelled(), JobStatus::default());
        true
    }
}
