//! A snapshot's memory, on its way into a file.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use vmm_api::control::Call;

use crate::drivers::domain::job::{self, Operation, Saving};
use crate::drivers::domain::object::Pinned;
use crate::drivers::domain::{Driver, saved_image};
use crate::error::{Error, Result};
use crate::killpoint::killpoint;

/// Has the domain's memory written by that call, into a file that is at `path` when it is whole.
pub(super) async fn written(
    driver: &Arc<Driver>,
    domain: &Pinned,
    path: &Path,
    was_running: bool,
    call: Call,
    more: Vec<OwnedFd>,
) -> Result<()> {
    let file = saved_image::create(path, false)?;
    let cannot = |e: &std::io::Error| {
        Error::system(format!("Failed to create file '{}'", path.display()), e)
    };
    let passed = file.file().try_clone().map_err(|e| cannot(&e))?;
    let control = {
        let mut inner = domain.lock();
        let live = inner.live_mut()?;
        live.work.begin(Operation::Snapshot)?;
        // A daemon that dies now leaves no snapshot: the file goes, the guest runs on.
        live.work.saving = Some(Saving {
            temp: file.temp().to_owned(),
            path: file.temp().to_owned(),
            id: [0; 16],
            was_running,
        });
        let control = live.control.clone();
        driver.write_record(&inner);
        control
    };
    let passed = std::iter::once(passed.into()).chain(more).collect();
    let result = match control.send_with(call, passed) {
        Ok(answer) => job::wait(domain, answer).await,
        Err(error) => Err(job::not_begun(error)),
    };
    killpoint("snapshot.memory");
    let put = match result {
        Ok(status) => file.put().map(|()| status).map_err(|e| cannot(&e)),
        Err(error) => Err(error),
    };
    let mut inner = domain.lock();
    if let Ok(live) = inner.live_mut() {
        live.work.saving = match (&put, live.work.saving.take()) {
            // Until it is seen to that the guest runs on, and the snapshot is there.
            (Ok(_), Some(saving)) => Some(Saving {
                temp: path.to_owned(),
                ..saving
            }),
            _ => None,
        };
        match &put {
            Ok(status) => drop(live.work.finish(Some(*status))),
            Err(error) => live.work.fail(error),
        }
    }
    driver.write_record(&inner);
    put.map(drop)
}

/// The guest runs as it should, and the file is a snapshot's, or gone.
pub(super) fn settled(driver: &Arc<Driver>, domain: &Pinned) {
    let mut inner = domain.lock();
    if let Ok(live) = inner.live_mut() {
        live.work.saving = None;
    }
    driver.write_record(&inner);
}
