//! A job in which a domain's VMM writes a file: a save, a dump, a snapshot's memory.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use vmm_api::control::{Call, JobStatus};

use super::Driver;
use super::job::{self, Operation, Saving};
use super::object::Domain;
use super::state::State;
use crate::error::{Error, Result};
use crate::files::NewFile;
use crate::killpoint::killpoint;

/// What is written, and what becomes of it.
pub(super) struct Writing {
    /// The job.
    pub operation: Operation,
    /// What has the VMM write.
    pub call: Call,
    /// What it gets besides the file.
    pub more: Vec<OwnedFd>,
    /// Whether the guest ran; without it, whether it does now.
    pub was_running: Option<bool>,
    /// What tells the file from another one at its place, if a later daemon is to take a whole
    /// one for finished. Without it, whoever finds it removes it.
    pub id: Option<[u8; 16]>,
    /// Where a test may end the daemon: when the job has begun, and when the file is written.
    pub points: [&'static str; 2],
}

impl Driver {
    /// Has the VMM write `file`, and puts it at `to`, which is its place. What is inside the
    /// result is what became of the job, which goes on: its end, and the note of it in the
    /// domain's record, are the caller's.
    ///
    /// # Errors
    /// The job has not begun: another one is running, the domain is off, the system's reason.
    pub(super) async fn written(
        &self,
        domain: &Arc<Domain>,
        file: NewFile,
        to: &Path,
        writing: Writing,
    ) -> Result<Result<JobStatus>> {
        let passed = file.file().try_clone().map_err(|error| {
            Error::system(format!("Failed to create file '{}'", to.display()), &error)
        })?;
        let control = {
            let mut inner = domain.lock();
            let runs = matches!(inner.state, State::Running(_));
            let live = inner.live_mut()?;
            live.work.begin(writing.operation)?;
            live.work.saving = Some(Saving {
                temp: file.temp().to_owned(),
                path: match writing.id {
                    Some(_) => to.to_owned(),
                    None => file.temp().to_owned(),
                },
                id: writing.id.unwrap_or_default(),
                was_running: writing.was_running.unwrap_or(runs),
            });
            let control = live.control.clone();
            self.write_record(&inner);
            control
        };
        let [begun, written] = writing.points;
        killpoint(begun);
        let files = std::iter::once(passed.into()).chain(writing.more);
        let result = match control.send_with(writing.call, files.collect()) {
            Ok(answer) => job::wait(domain, answer).await,
            Err(error) => Err(job::not_begun(error)),
        };
        killpoint(written);
        Ok(result.and_then(|status| {
            let put = file.put().map(|()| status);
            put.map_err(|e| Error::system(format!("cannot write '{}'", to.display()), &e))
        }))
    }
}
