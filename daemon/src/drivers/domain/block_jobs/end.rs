//! What follows from a block job's news.

use std::sync::Arc;

use vmm_api::control::{Answer, BlockJobKind, BlockJobNews, Call, DiskImages};
use xml_schemas::Domain as Definition;
use xml_schemas::dom::Element;

use super::{Pending, chain, copy, kind_number};
use crate::drivers::domain::lifecycle::ask;
use crate::drivers::domain::object::{Domain, Inner, Pinned};
use crate::drivers::domain::record::Folder;
use crate::drivers::domain::snapshot::{redirect_disk, set_definitions};
use crate::drivers::domain::{Driver, blocking, image_numbers};
use crate::error::{Error, Result};
use crate::events::DomainEvent;
use crate::files;
use crate::killpoint::killpoint;

/// virConnectDomainEventBlockJobStatus
fn status_number(news: &BlockJobNews) -> i32 {
    match news {
        BlockJobNews::Completed => 0,
        BlockJobNews::Failed(_) => 1,
        BlockJobNews::Cancelled => 2,
        BlockJobNews::Ready => 3,
    }
}

impl Driver {
    /// A domain's VMM has told of a disk's job.
    pub fn block_job_news(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        inner: &mut Inner,
        id: &str,
        kind: BlockJobKind,
        news: &BlockJobNews,
    ) {
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        let pending = live.block_jobs.iter_mut().find(|job| job.disk == id);
        if *news == BlockJobNews::Ready {
            if let Some(ready) = pending.and_then(|job| job.ready.take()) {
                // Whoever worked with it may have gone.
                let _ = ready.send(());
            }
            let definition = Arc::make_mut(&mut live.definition);
            if let Some(target) = chain::target_of(definition, id)
                && let Some(disk) = chain::disk_mut(definition, &target)
            {
                for mirror in disk.elements_mut().filter(|e| e.name == "mirror") {
                    mirror.set_attr("ready", "yes");
                }
            }
            if let Err(error) = Folder(live.folder.clone()).write_definition(&live.definition) {
                log::error!("cannot write the domain's state: {error}");
            }
            return self.tell_block_job(domain, inner, id, kind, news);
        }
        if let Some(owner) = pending.and_then(|job| job.owner.take()) {
            // He sees to it; if he has gone, nobody knows what he wanted: the rest is done here.
            if owner.send(news.clone()).is_ok() {
                return;
            }
        }
        let (driver, domain) = (Arc::clone(self), Arc::clone(domain));
        let (id, news) = (id.to_owned(), news.clone());
        tokio::spawn(async move {
            let Some(pinned) = driver.registry.pin(&domain) else {
                return;
            };
            // Whatever takes so long may be working with the definitions.
            let _job = loop {
                match pinned.job().await {
                    Ok(job) => break job,
                    Err(error) => log::warn!("domain '{}': {error}", pinned.name().name),
                }
            };
            let done = driver.block_job_ended(&pinned, &id, kind, news).await;
            if let Err(error) = done {
                log::error!("domain '{}': a block job: {error}", pinned.name().name);
            }
        });
    }

    fn tell_block_job(
        &self,
        domain: &Domain,
        inner: &Inner,
        id: &str,
        kind: BlockJobKind,
        news: &BlockJobNews,
    ) {
        let Some(live) = &inner.live else { return };
        let Some(target) = chain::target_of(&live.definition, id) else {
            return;
        };
        let links = chain::links(&live.definition, &target);
        let path = links.first().map_or("", |link| &link.path).to_owned();
        let name = domain.name_in(inner);
        for (by_target, disk) in [(false, path), (true, target)] {
            let event = DomainEvent::BlockJob {
                by_target,
                disk,
                kind: kind_number(kind),
                status: status_number(news),
            };
            self.hub.emit(&name, &event);
        }
    }

    /// A disk is gone, and its job with it. Its definition is still there.
    pub fn block_job_gone(&self, domain: &Domain, inner: &mut Inner, id: &str) {
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        let jobs = std::mem::take(&mut live.block_jobs);
        let (gone, left) = jobs.into_iter().partition(|job| job.disk == id);
        live.block_jobs = left;
        let gone: Vec<Pending> = gone;
        for job in gone {
            let news = BlockJobNews::Cancelled;
            self.tell_block_job(domain, inner, id, job.kind, &news);
            for waiting in job.owner.into_iter().chain(job.waiting) {
                // Whoever waited may have gone.
                let _ = waiting.send(news.clone());
            }
        }
    }

    /// Has the definitions say what a disk's images are now, tells of the job's end, and removes what
    /// nobody needs any more. The caller has the domain's job.
    ///
    /// # Errors
    /// A definition can't be written.
    pub(super) async fn block_job_ended(
        self: &Arc<Self>,
        domain: &Pinned,
        id: &str,
        kind: BlockJobKind,
        news: BlockJobNews,
    ) -> Result<()> {
        killpoint("blockjob.ended");
        let settled = self.settle_images(domain, id, kind).await;
        killpoint("blockjob.settled");
        if kind == BlockJobKind::Copy && settled.is_ok() {
            let disk = id.to_owned();
            // The images from before go on with the disk until it is said that nobody names them.
            if let Err(error) = ask(domain, Call::SettleBlockJob { disk }).await {
                log::warn!("domain '{}': {error}", domain.name().name);
            }
            killpoint("blockjob.let-go");
        }
        let pending = {
            let mut inner = domain.lock();
            let live = inner.live_mut()?;
            let at = live.block_jobs.iter().position(|job| job.disk == id);
            let pending = at.map(|at| live.block_jobs.remove(at));
            self.tell_block_job(domain, &inner, id, kind, &news);
            pending
        };
        let Some(pending) = pending else {
            return settled;
        };
        if news == BlockJobNews::Completed && settled.is_ok() {
            for path in pending.delete {
                if let Err(error) = files::remove_if_there(&path) {
                    log::warn!("cannot remove '{}': {error}", path.display());
                }
            }
        }
        let told = match &settled {
            Ok(()) => news,
            Err(error) => BlockJobNews::Failed(format!(
                "the domain's definition does not say what its images are: {error}"
            )),
        };
        for waiting in pending.waiting {
            // Whoever waited may have gone.
            let _ = waiting.send(told.clone());
        }
        settled
    }

    /// Has the definitions name the images that a disk has.
    async fn settle_images(
        self: &Arc<Self>,
        domain: &Pinned,
        id: &str,
        kind: BlockJobKind,
    ) -> Result<()> {
        let disk = super::images_of(domain, id).await?;
        let (persistent, live, mut next) = {
            let inner = domain.lock();
            let live = inner.live()?;
            let next = image_numbers::next(&live.definition, live.next_image);
            (inner.stored()?, live.definition.clone(), next)
        };
        let Some(target) = chain::target_of(&live, id) else {
            return Ok(());
        };
        let before = chain::links(&live, &target);
        let (Some(old), Some(new)) = (before.first(), disk.images.first()) else {
            return Ok(());
        };
        let format = before
            .iter()
            .find(|link| link.path == *new)
            .map_or(&old.format, |link| &link.format);
        let mut changed = Definition::clone(&live);
        let moved = old.path != *new;
        let mirror = copy::mirror_of(&live, &target).cloned();
        if let Some(element) = chain::disk_mut(&mut changed, &target) {
            element.take_children("mirror");
        }
        if kind == BlockJobKind::Copy {
            if let Some(mirror) = mirror.filter(|_| moved) {
                return self
                    .settle_copy(domain, &target, &mirror, changed, persistent)
                    .await;
            }
            return set_definitions(self, domain, None, Some(Arc::new(changed))).await;
        }
        if moved {
            redirect_disk(&mut changed, &target, new, format);
        }
        chain::refresh(&mut changed, &target, &before, &mut next)?;
        {
            let mut inner = domain.lock();
            inner.live_mut()?.next_image = next;
            self.write_record(&inner);
        }
        // The stored definition follows if it names one of the images that are gone.
        let persistent = persistent.and_then(|persistent| {
            let stored = chain::links(&persistent, &target);
            let stored = stored.first()?.path.clone();
            if !before.iter().any(|link| link.path == stored) {
                return None;
            }
            let mut changed = Definition::clone(&persistent);
            if moved && !disk.images.contains(&stored) {
                redirect_disk(&mut changed, &target, new, format);
            } else {
                // What it says is behind the image may be there no more; the headers know.
                let element = chain::disk_mut(&mut changed, &target)?;
                if element.take_children("backingStore").is_empty() {
                    return None;
                }
            }
            Some(Arc::new(changed))
        });
        set_definitions(self, domain, persistent, Some(Arc::new(changed))).await
    }

    /// The same of a disk that has gone on with its mirror, which `changed` has lost.
    async fn settle_copy(
        self: &Arc<Self>,
        domain: &Pinned,
        target: &str,
        mirror: &Element,
        mut changed: Definition,
        persistent: Option<Arc<Definition>>,
    ) -> Result<()> {
        let before = chain::links(&changed, target);
        if let Some(element) = chain::disk_mut(&mut changed, target) {
            copy::become_mirror(element, mirror);
        }
        let whole = mirror.child("backingStore").is_some();
        if !whole {
            let mut next = {
                let inner = domain.lock();
                let live = inner.live()?;
                image_numbers::next(&changed, live.next_image)
            };
            let mut known = before.clone();
            known.extend(chain::links(&changed, target).into_iter().next());
            chain::refresh(&mut changed, target, &known, &mut next)?;
            let mut inner = domain.lock();
            inner.live_mut()?.next_image = next;
            self.write_record(&inner);
        }
        // The stored definition follows if it names the image that was left.
        let persistent = persistent.and_then(|persistent| {
            let stored = chain::links(&persistent, target);
            if stored.first()?.path != before.first()?.path {
                return None;
            }
            let mut stored = Definition::clone(&persistent);
            let element = chain::disk_mut(&mut stored, target)?;
            copy::become_mirror(element, mirror);
            for source in element.elements_mut().filter(|e| e.name == "source") {
                source.take_attr("index");
            }
            Some(Arc::new(stored))
        });
        set_definitions(self, domain, persistent, Some(Arc::new(changed))).await
    }

    /// The running definition, for the next daemon.
    pub(super) async fn write_live(&self, domain: &Pinned) {
        let (folder, definition) = match domain.lock().live() {
            Ok(live) => (Folder(live.folder.clone()), live.definition.clone()),
            Err(_) => return,
        };
        let written = blocking(move || folder.write_definition(&definition)).await;
        if let Ok(Err(error)) = written {
            log::error!("cannot write the domain's state: {error}");
        }
    }

    /// What disks' jobs did while no daemon watched.
    ///
    /// # Errors
    /// The VMM does not answer; a definition can't be written.
    pub async fn catch_up_block_jobs(self: &Arc<Self>, domain: &Pinned) -> Result<()> {
        let _job = domain.job().await?;
        let Answer::Disks(disks) = ask(domain, Call::Disks).await? else {
            return Err(Error::internal("the VMM does not know its disks"));
        };
        for disk in disks {
            let (behind, mirrored) = {
                let inner = domain.lock();
                let definition = &inner.live()?.definition;
                let Some(target) = chain::target_of(definition, &disk.id) else {
                    continue;
                };
                let links = chain::links(definition, &target);
                if links.is_empty() {
                    continue;
                }
                let same = links.iter().map(|link| &link.path).eq(&disk.images);
                let mut elements = definition.devices.rest.iter();
                let mirrored = elements.any(|element| {
                    xml_schemas::domain::device::alias(element) == Some(&disk.id)
                        && element.child("mirror").is_some()
                });
                (!same, mirrored)
            };
            match &disk.job {
                // Said once more: it may have been said to nobody.
                Some(status) if status.ready => {
                    let mut inner = domain.lock();
                    let news = BlockJobNews::Ready;
                    self.block_job_news(domain, &mut inner, &disk.id, status.kind, &news);
                }
                Some(_) => {}
                None if behind || mirrored || disk.unsettled => {
                    let (kind, news) = missed(&disk, mirrored, behind);
                    let ended = self.block_job_ended(domain, &disk.id, kind, news).await;
                    if let Err(error) = ended {
                        log::error!("domain '{}': disk {}: {error}", domain.name().name, disk.id);
                    }
                }
                None => {}
            }
        }
        Ok(())
    }
}

/// How a disk's job ended that nobody heard of.
fn missed(disk: &DiskImages, mirrored: bool, behind: bool) -> (BlockJobKind, BlockJobNews) {
    if let Some(last) = &disk.last {
        return last.clone();
    }
    // An older VMM does not remember. A merge under the image on top leaves one beneath it.
    let kind = match mirrored {
        true => BlockJobKind::ActiveCommit,
        false if disk.images.len() == 1 => BlockJobKind::Pull,
        false => BlockJobKind::Commit,
    };
    let news = match behind {
        true => BlockJobNews::Completed,
        false => BlockJobNews::Cancelled,
    };
    (kind, news)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_missed_is_told_as_what_it_was() {
        let mut disk = DiskImages {
            id: "virtio-disk0".into(),
            images: vec!["/top".into(), "/base".into()],
            tray: None,
            job: None,
            last: Some((BlockJobKind::Pull, BlockJobNews::Completed)),
            unsettled: false,
        };
        let pull = (BlockJobKind::Pull, BlockJobNews::Completed);
        assert_eq!(missed(&disk, false, true), pull);
        let failed = BlockJobNews::Failed("no space".into());
        disk.last = Some((BlockJobKind::ActiveCommit, failed.clone()));
        assert_eq!(
            missed(&disk, true, false),
            (BlockJobKind::ActiveCommit, failed)
        );
        // By a VMM that does not say it.
        disk.last = None;
        let commit = (BlockJobKind::Commit, BlockJobNews::Completed);
        assert_eq!(missed(&disk, false, true), commit);
        let given_up = (BlockJobKind::ActiveCommit, BlockJobNews::Cancelled);
        assert_eq!(missed(&disk, true, false), given_up);
    }
}
