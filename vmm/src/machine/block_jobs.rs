//! Jobs that move content between a disk's images while the guest runs, and internal snapshots.

use std::os::fd::OwnedFd;

use vmm_api::control::{
    Answer, BlockCopy, BlockJob as Wanted, BlockJobKind, BlockJobNews, BlockJobStatus, DiskImages,
    DiskSnapshot, Event,
};

use super::Machine;
use super::devices::{Disk, JobPlan, open_copy};
use super::plug::{close_unused, hand_over};
use crate::killpoint::killpoint;
use crate::notices::Notice;
use crate::state::block_job::{BlockJob, Cause, Phase, Work};
use images::Image;

/// A disk's job, and how to see it to its end.
#[derive(Debug)]
pub(super) struct DiskJob {
    pub(super) disk: String,
    kind: BlockJobKind,
    speed: u64,
    /// It has been told that it is ready.
    told: bool,
    /// Its disk is gone: nothing comes of it but its thread's end.
    abandoned: bool,
    /// Before the plan, whose images its thread uses: its drop waits for the thread.
    job: Option<BlockJob>,
    plan: JobPlan,
}

impl DiskJob {
    /// Changes its speed.
    pub(super) fn set_speed(&mut self, speed: u64) {
        self.speed = speed;
        if let Some(job) = &self.job {
            job.set_speed(speed);
        }
    }

    fn status(&self) -> BlockJobStatus {
        let (done, total) = self.job.as_ref().map_or((0, 0), BlockJob::progress);
        BlockJobStatus {
            kind: self.kind,
            done,
            total,
            speed: self.speed,
            ready: self.job.as_ref().map(BlockJob::phase) == Some(Phase::Ready),
        }
    }
}

impl Machine {
    /// Begins a job.
    pub(super) fn start_block_job(
        &mut self,
        disk: &str,
        wanted: &Wanted,
        speed: u64,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if self.job.is_some() {
            return Err("a job is running".to_owned());
        }
        self.without_block_job(disk)?;
        if self.devices.pci.disk(disk)?.is_cdrom() {
            return Err(format!(
                "'{disk}' is a CD-ROM drive: its media are not changed"
            ));
        }
        let (plan, work) = match wanted {
            Wanted::Copy(copy) => self.plan_copy(disk, copy, descriptors)?,
            other => self.devices.pci.disk(disk)?.plan_job(other, descriptors)?,
        };
        let notices = self.notices.clone();
        let job = match BlockJob::start(work, speed, move || notices.send(Notice::BlockJob)) {
            Ok(job) => job,
            Err(error) => {
                self.give_job_up(disk, plan)?;
                return Err(error.to_string());
            }
        };
        self.block_jobs.push(DiskJob {
            disk: disk.to_owned(),
            kind: plan.kind(),
            speed,
            told: false,
            abandoned: false,
            job: Some(job),
            plan,
        });
        self.ended_block_jobs.remove(disk);
        Ok(())
    }

    /// Opens what a disk is to be copied to, and has its writes noted from a moment on.
    fn plan_copy(
        &mut self,
        disk: &str,
        wanted: &BlockCopy,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(JobPlan, Work), String> {
        let mut devices = self.config.devices.iter();
        let device = devices.find(|known| known.id == disk);
        let device = device.ok_or_else(|| format!("there is no disk '{disk}'"))?;
        let mut image = wanted.image.clone();
        let handed = hand_over(image.resources_mut(), descriptors)?;
        let opened = open_copy(device, &image);
        let left = handed.into_iter().filter(|fd| close_unused(*fd)).count();
        let layers = opened?;
        if left > 0 {
            log::warn!("a copy of {disk}: {left} descriptors were not used");
        }
        self.for_a_moment(|machine| machine.devices.pci.disk(disk)?.plan_copy(wanted, layers))
    }

    /// A disk's job comes to nothing.
    fn give_job_up(&mut self, disk: &str, plan: JobPlan) -> Result<(), String> {
        if plan.kind() != BlockJobKind::Copy {
            self.devices.pci.disk(disk)?.give_job_up(plan);
            return Ok(());
        }
        self.for_a_moment(|machine| {
            machine.devices.pci.disk(disk)?.give_job_up(plan);
            Ok(())
        })
    }

    /// A disk that went on with a copy is remembered as such.
    pub(super) fn settle_block_job(&mut self, disk: &str) -> Result<(), String> {
        if !self.devices.pci.disk(disk)?.is_unsettled() {
            return Ok(());
        }
        self.for_a_moment(|machine| {
            machine.devices.pci.disk(disk)?.settle();
            Ok(())
        })
    }

    /// Disks have jobs, or have not quite done with them.
    pub(super) fn has_block_jobs(&self) -> bool {
        let mut disks = self.devices.pci.disks.iter();
        !self.block_jobs.is_empty() || disks.any(|(_, disk)| disk.is_unsettled())
    }

    /// A disk's job.
    pub(super) fn block_job(&mut self, disk: &str) -> Result<&mut DiskJob, String> {
        let mut jobs = self.block_jobs.iter_mut();
        jobs.find(|job| job.disk == disk)
            .ok_or_else(|| "the disk has no job".to_owned())
    }

    /// A disk that has a job is left alone.
    pub(super) fn without_block_job(&self, disk: &str) -> Result<(), String> {
        let unsettled = self.devices.pci.disk(disk).is_ok_and(Disk::is_unsettled);
        match unsettled || self.block_jobs.iter().any(|job| job.disk == disk) {
            true => Err("the disk has an active block job".to_owned()),
            false => Ok(()),
        }
    }

    /// Gives a job up, or sees it to its end.
    pub(super) fn end_block_job(&mut self, disk: &str, pivot: bool) -> Result<(), String> {
        let found = self.block_job(disk)?;
        let Some(job) = &found.job else {
            return Ok(());
        };
        let ready = job.phase() == Phase::Ready;
        if !pivot {
            match &mut found.plan {
                // All of it, of this very moment.
                JobPlan::Copy { stay, .. } if ready => {
                    *stay = true;
                    job.leave();
                }
                _ => job.cancel(),
            }
            return Ok(());
        }
        match &found.plan {
            JobPlan::Copy { stay: true, .. } => {
                return Err("the job has been given up".to_owned());
            }
            JobPlan::Copy { .. } => {}
            JobPlan::Commit { active, .. } if active.is_some() => {}
            _ => return Err("the job has nothing to pivot to".to_owned()),
        }
        if !ready {
            return Err("the job is not ready for pivot yet".to_owned());
        }
        job.leave();
        Ok(())
    }

    /// The disks' images and jobs.
    pub(super) fn disk_images(&self) -> Answer {
        let disks = self.devices.pci.disks.iter();
        Answer::Disks(
            disks
                .map(|(id, disk)| DiskImages {
                    id: id.clone(),
                    images: disk.image_names(),
                    tray: disk.tray(),
                    job: self
                        .block_jobs
                        .iter()
                        .find(|job| job.disk == *id)
                        .map(DiskJob::status),
                    last: self.ended_block_jobs.get(id).cloned(),
                    unsettled: disk.is_unsettled(),
                })
                .collect(),
        )
    }

    /// Gives up the jobs of disks that are going. Their threads end when what they have in hand is done, and have
    /// the disks' images until then.
    pub(super) fn abandon_block_jobs(&mut self, disks: &[String]) {
        let jobs = self.block_jobs.iter_mut();
        for job in jobs.filter(|job| disks.contains(&job.disk)) {
            job.abandoned = true;
            if let Some(thread) = &job.job {
                thread.cancel();
            }
        }
        self.ended_block_jobs
            .retain(|disk, _| !disks.contains(disk));
    }

    /// Goes on with jobs whose threads have said something.
    pub(super) fn look_at_block_jobs(&mut self) {
        let mut ended = Vec::new();
        let mut ready = Vec::new();
        for (index, job) in self.block_jobs.iter_mut().enumerate() {
            match job.job.as_ref().map(BlockJob::phase) {
                Some(Phase::Ready) if !job.told && !job.abandoned => {
                    job.told = true;
                    ready.push((job.disk.clone(), job.kind));
                }
                Some(Phase::Ended(_)) => ended.push(index),
                _ => {}
            }
        }
        for (id, kind) in ready {
            let news = BlockJobNews::Ready;
            self.event(Event::BlockJob { id, kind, news });
        }
        for index in ended.into_iter().rev() {
            let job = self.block_jobs.remove(index);
            if job.abandoned {
                let disk = job.disk.clone();
                // Its thread has ended, or is about to.
                drop(job);
                self.forget_unplugged(&disk);
            } else {
                self.finish_block_job(job);
            }
        }
    }

    fn finish_block_job(&mut self, mut job: DiskJob) {
        let phase = job.job.take().map(BlockJob::join);
        let (id, kind) = (job.disk, job.kind);
        let news = match (phase, self.devices.pci.disk(&id)) {
            (_, Err(_)) => BlockJobNews::Cancelled,
            (Some(Phase::Ended(Err(cause))), Ok(_)) => {
                if let Err(error) = self.give_job_up(&id, job.plan) {
                    log::error!("{}: {error}", self.config.name);
                }
                match cause {
                    Cause::Cancelled => BlockJobNews::Cancelled,
                    Cause::Failed(why) => BlockJobNews::Failed(why),
                }
            }
            _ => {
                let stayed = matches!(job.plan, JobPlan::Copy { stay: true, .. });
                let mut plan = Some(job.plan);
                let finished = self.for_a_moment(|machine| {
                    let disk = machine.devices.pci.disk(&id)?;
                    plan.take().map_or(Ok(()), |plan| disk.finish_job(plan))
                });
                // There was no such moment.
                if let (Some(plan), Ok(disk)) = (plan, self.devices.pci.disk(&id)) {
                    disk.give_job_up(plan);
                }
                killpoint("vmm.block-job-done");
                match finished {
                    Ok(()) if stayed => BlockJobNews::Cancelled,
                    Ok(()) => BlockJobNews::Completed,
                    Err(why) => BlockJobNews::Failed(why),
                }
            }
        };
        if let BlockJobNews::Failed(why) = &news {
            log::warn!("{}: a block job of {id} failed: {why}", self.config.name);
        }
        let ended = (kind, news.clone());
        self.ended_block_jobs.insert(id.clone(), ended);
        self.event(Event::BlockJob { id, kind, news });
    }

    /// Makes or deletes an internal snapshot in the images on top of these disks.
    pub(super) fn snapshot_disks(
        &mut self,
        disks: &[String],
        name: &str,
        date: (u32, u32),
        what: DiskSnapshot,
    ) -> Result<(), String> {
        for id in disks {
            self.without_block_job(id)?;
        }
        self.for_a_moment(|machine| machine.snapshot_images(disks, name, date, what))
    }

    fn snapshot_images(
        &self,
        disks: &[String],
        name: &str,
        date: (u32, u32),
        what: DiskSnapshot,
    ) -> Result<(), String> {
        let words = |id: &str, error: images::Error| format!("{id}: {error}");
        let mut images = Vec::new();
        for id in disks {
            images.push((id, self.devices.pci.disk(id)?.qcow2()?));
        }
        let mut made_ids = Vec::new();
        for (id, image) in &images {
            let there = image.snapshots().map_err(|error| words(id, error))?;
            let there = there.iter().find(|one| one.name == name);
            let done = match (what, there) {
                (DiskSnapshot::Delete, None) => Ok(()),
                // By its id: another one's may be this name.
                (DiskSnapshot::Delete, Some(there)) => image
                    .snapshot_delete(&there.id)
                    .map_err(|error| words(id, error)),
                (DiskSnapshot::Create, Some(_)) => {
                    Err(format!("{id}: its image has a snapshot '{name}' already"))
                }
                (DiskSnapshot::Create, None) => image
                    .snapshot_create(name, date)
                    .map(|made| made_ids.push(made.id))
                    .map_err(|error| words(id, error)),
            };
            killpoint("vmm.disk-snapshot");
            // Nothing is left to tidy up, however this process ends.
            let done = done.and_then(|()| image.rest().map_err(|error| words(id, error)));
            let Err(error) = done else { continue };
            if what == DiskSnapshot::Create {
                for ((id, image), made) in images.iter().zip(&made_ids) {
                    if let Err(error) = image.snapshot_delete(made) {
                        log::error!("{id}: {error}");
                    }
                }
            }
            return Err(error);
        }
        Ok(())
    }
}
