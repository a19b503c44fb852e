//! A snapshot's memory, on its way into a file.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use vmm_api::control::Call;

use crate::drivers::domain::job::{Operation, Saving};
use crate::drivers::domain::object::Pinned;
use crate::drivers::domain::written::Writing;
use crate::drivers::domain::{Driver, saved_image};
use crate::error::Result;

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
    // A daemon that dies now leaves no snapshot: the file goes, the guest runs on.
    let writing = Writing {
        operation: Operation::Snapshot,
        call,
        more,
        was_running: Some(was_running),
        id: None,
        points: ["snapshot.begun", "snapshot.memory"],
    };
    let put = driver.written(domain, file, path, writing).await?;
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
