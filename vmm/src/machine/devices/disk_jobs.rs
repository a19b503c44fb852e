//! What block jobs do to a disk's images, at their beginning and at their end.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use images::chain::{self, Opened};
use images::commit::Active;
use images::convert::Target;
use images::copy::{Copy, CopyOptions};
use images::follow::Follow;
use images::lock::Usage;
use images::qcow2::{self, NoBacking};
use images::{File, Image, Job, Qcow2};
use vmm_api::control::{BlockCopy, BlockJob as Wanted, BlockJobKind};
use vmm_api::devices::{DeviceConfig, DeviceKind, ImageConfig, ImageFormat};

use super::disk::Disk;
use super::layers::{self, Access, Layer, Lock};
use crate::devices::lock;
use crate::killpoint::killpoint;
use crate::machine::MachineError;
use crate::num::to_usize;
use crate::state::block_job::Work;

/// What is needed to see a job to its end.
#[derive(Debug)]
pub enum JobPlan {
    /// A pull.
    Pull {
        /// The image that is right behind the one on top then.
        base: Option<usize>,
        /// What the one on top calls it.
        name: Option<String>,
    },
    /// A commit.
    Commit {
        /// The first image that goes.
        top: usize,
        /// The image that is written.
        base: usize,
        /// What the image above them calls it.
        name: String,
        /// It, open for writing.
        writer: Box<Layer>,
        /// The image above them, open for writing, where that is not the one on top.
        above: Option<OwnedFd>,
        /// Of the image on top.
        active: Option<Arc<Active>>,
    },
    /// A copy.
    Copy {
        /// What makes it.
        copy: Arc<Copy>,
        /// The images it is made to.
        layers: Vec<Layer>,
        /// The disk is to stay with the images it has.
        stay: bool,
    },
}

impl JobPlan {
    /// What the job does.
    pub fn kind(&self) -> BlockJobKind {
        match self {
            Self::Pull { .. } => BlockJobKind::Pull,
            Self::Commit { active: None, .. } => BlockJobKind::Commit,
            Self::Commit { .. } => BlockJobKind::ActiveCommit,
            Self::Copy { .. } => BlockJobKind::Copy,
        }
    }
}

fn words(error: images::Error) -> String {
    error.to_string()
}

impl Disk {
    /// Prepares a job.
    ///
    /// # Errors
    /// It is not possible with these images, in words for the caller.
    pub fn plan_job(
        &self,
        wanted: &Wanted,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(JobPlan, Work), String> {
        let layers = lock(&self.layers);
        let at = |index: u32| {
            let index = to_usize(index.into());
            let layer = layers.get(index);
            layer.map(|layer| (index, layer)).ok_or_else(|| {
                format!(
                    "there is no image {index}: the disk has {} images",
                    layers.len()
                )
            })
        };
        if let Some(other) = layers.iter().find(|layer| !layer.simple) {
            return Err(format!(
                "{}: block jobs of encrypted images, and of images with data files of their own, \
                 are not supported",
                other.name
            ));
        }
        match wanted {
            Wanted::Pull { base, name } => {
                let top = self.top_of(&layers)?;
                without_snapshots(layers.get(..1))?;
                let index = base.map(&at).transpose()?.map(|(index, _)| index);
                if index == Some(0) || base.is_some() != name.is_some() {
                    return Err("the image on top can't be behind itself".to_owned());
                }
                let work = Work::Pull { top, depth: *base };
                let plan = JobPlan::Pull {
                    base: index,
                    name: name.clone(),
                };
                Ok((plan, work))
            }
            Wanted::Commit { top, base, name } => {
                let (first, top_layer) = at(*top)?;
                let (last, base_layer) = at(*base)?;
                if first >= last {
                    return Err("an image is merged into one behind it".to_owned());
                }
                // One in the image that is written stays what it is, and one above reads the same.
                without_snapshots(layers.get(first..last))?;
                let mut descriptors = descriptors.into_iter();
                let fd = descriptors
                    .next()
                    .ok_or("the image to write is not there")?;
                let above = descriptors.next();
                if (first > 1) != above.is_some() {
                    return Err("the image above needs a descriptor".to_owned());
                }
                if let (Some(fd), Some(layer)) = (&above, layers.get(first.saturating_sub(1))) {
                    layer.same_file(fd)?;
                }
                let writer = open_writer(base_layer, layers.get(last + 1), fd)?;
                let (base, base_qcow2) = (writer.opened.image.clone(), writer.opened.qcow2.clone());
                let active = match first {
                    0 => Some(Arc::new(Active::new(
                        self.top_of(&layers)?,
                        u32::try_from(last).unwrap_or(u32::MAX),
                        base.clone(),
                        base_qcow2.clone(),
                    ))),
                    _ => None,
                };
                let work = match &active {
                    Some(active) => Work::Follow(active.clone()),
                    None => Work::Commit {
                        top: top_layer.opened.image.clone(),
                        depth: u32::try_from(last - first).unwrap_or(u32::MAX),
                        base,
                        base_qcow2,
                    },
                };
                let plan = JobPlan::Commit {
                    top: first,
                    base: last,
                    name: name.clone(),
                    writer: Box::new(writer),
                    above,
                    active,
                };
                Ok((plan, work))
            }
            Wanted::Copy(_) => Err("a copy's images are opened first".to_owned()),
        }
    }

    /// Prepares a copy to images that are open, while no request is in flight.
    pub fn plan_copy(
        &self,
        wanted: &BlockCopy,
        layers: Vec<Layer>,
    ) -> Result<(JobPlan, Work), String> {
        let first = layers.first().ok_or("a copy without an image")?;
        let target = Target {
            image: first.opened.image.clone(),
            qcow2: first.opened.qcow2.clone(),
            zeroed: wanted.zeroed,
        };
        let options = CopyOptions {
            shallow: wanted.shallow,
            synchronous: wanted.synchronous,
            buffer: wanted.buffer,
        };
        match wanted.granularity {
            0 => self.noting.note(true),
            bytes => self
                .noting
                .note_by(bytes.clamp(GRANULE_LEAST, GRANULE_MOST)),
        }
        let copy = Arc::new(Copy::new(self.noting.clone(), target, options));
        let work = Work::Follow(copy.clone());
        let stay = false;
        Ok((JobPlan::Copy { copy, layers, stay }, work))
    }

    fn top_of(&self, layers: &[Layer]) -> Result<Arc<Qcow2>, String> {
        let first = layers.first().ok_or("a disk without an image")?;
        let qcow2 = first.opened.qcow2.clone();
        qcow2.ok_or_else(|| format!("{} is not a qcow2 image", first.name))
    }

    /// The job came to nothing: images are as they were, but for what was copied.
    /// Of a copy: no request is in flight.
    pub fn give_job_up(&self, plan: JobPlan) {
        if matches!(plan, JobPlan::Copy { .. }) {
            self.follow_no_more();
        }
        let JobPlan::Commit {
            base,
            writer,
            active,
            ..
        } = plan
        else {
            return;
        };
        drop(active);
        // It closes, and its lock is gone.
        drop(writer);
        if let Some(layer) = lock(&self.layers).get(base)
            && let Err(error) = layer.lock_file(true)
        {
            log::error!("{}: {error}", layer.name);
        }
    }

    /// All is copied, and nobody uses the disk: its images change.
    ///
    /// # Errors
    /// In words for the caller; the disk goes on with the images it has.
    pub fn finish_job(&self, plan: JobPlan) -> Result<(), String> {
        match plan {
            JobPlan::Pull { base, name } => self.finish_pull(base, name),
            JobPlan::Commit {
                base,
                name,
                writer,
                active: Some(active),
                ..
            } => self.pivot(base, &name, *writer, active),
            JobPlan::Commit {
                top,
                base,
                name,
                writer,
                above,
                active: None,
            } => self.finish_commit(top, base, &name, *writer, above),
            JobPlan::Copy { copy, layers, stay } => self.finish_copy(&copy, layers, stay),
        }
    }

    fn follow_no_more(&self) {
        self.noting.note(false);
        self.noting.mirror_no_more();
    }

    /// The disk goes on with the copy. Until that is remembered somewhere ([`Disk::settle`]) the
    /// images it had get every write, too: whoever still names those is right as well.
    fn finish_copy(&self, copy: &Copy, layers: Vec<Layer>, stay: bool) -> Result<(), String> {
        let image = layers.first().map(|first| first.opened.image.clone());
        let image = image.ok_or("a copy without an image")?;
        let finished = copy.finish(&Job::new()).and_then(|()| image.rest());
        self.follow_no_more();
        finished.map_err(words)?;
        killpoint("vmm.copied");
        if stay {
            return Ok(());
        }
        self.noting.mirror_to(self.top.replace(image));
        let before = std::mem::replace(&mut *lock(&self.layers), layers);
        *lock(&self.leaving) = Some(before);
        killpoint("vmm.switched");
        Ok(())
    }

    /// It has gone on with a copy, and nobody may know that yet.
    pub fn is_unsettled(&self) -> bool {
        lock(&self.leaving).is_some()
    }

    /// The images it had before are closed. No request is in flight.
    pub fn settle(&self) {
        let Some(before) = lock(&self.leaving).take() else {
            return;
        };
        self.noting.mirror_no_more();
        if let Some(first) = before.first()
            && let Err(error) = first.opened.image.rest()
        {
            log::warn!("{}: closing it: {error}", first.name);
        }
    }

    fn finish_pull(&self, base: Option<usize>, name: Option<String>) -> Result<(), String> {
        let mut layers = lock(&self.layers);
        let top = self.top_of(&layers)?;
        let format = base.and_then(|base| layers.get(base)).map(|l| l.format);
        let backing = name.map(|name| {
            let format = format.map(|format| layers::format(format).name().to_owned());
            (OsString::from(name), format)
        });
        killpoint("vmm.pulled");
        let before = named(&top);
        top.set_backing(backing).map_err(words)?;
        killpoint("vmm.rebased");
        let end = base.unwrap_or(layers.len());
        let kept = self.keep(&mut layers, 1..end);
        or_back(&top, before, kept)
    }

    /// Goes on with the disk's images but these, which the headers do not name any more.
    fn keep(&self, layers: &mut Vec<Layer>, without: std::ops::Range<usize>) -> Result<(), String> {
        // Header and all: nothing is left to write for who closes it.
        self.top_of(layers)?.rest().map_err(words)?;
        let kept: Vec<&Layer> = layers
            .iter()
            .enumerate()
            .filter(|(index, _)| !without.contains(index))
            .map(|(_, layer)| layer)
            .collect();
        // The one on top is written to, as before.
        let opened = layers::reopen(&kept, true)?;
        let first = opened.first().map(|first| first.image.clone());
        self.top.replace(first.ok_or("a disk without an image")?);
        layers.drain(without);
        for (layer, opened) in layers.iter_mut().zip(opened) {
            layer.opened = opened;
        }
        Ok(())
    }

    fn finish_commit(
        &self,
        top: usize,
        base: usize,
        name: &str,
        writer: Layer,
        above: Option<OwnedFd>,
    ) -> Result<(), String> {
        let mut layers = lock(&self.layers);
        let rebased = self.rebase(&layers, top, name, &writer, above);
        // It closes, and its lock is gone.
        drop(writer);
        let locked = layers
            .get(base)
            .map_or(Ok(()), |layer| layer.lock_file(true));
        let (image, before) = rebased?;
        let kept = locked.and_then(|()| self.keep(&mut layers, top..base));
        or_back(&image, before, kept)
    }

    /// Has the image above `top` name the one that was merged into; that image, and what it named.
    fn rebase(
        &self,
        layers: &[Layer],
        top: usize,
        name: &str,
        writer: &Layer,
        above: Option<OwnedFd>,
    ) -> Result<(Arc<Qcow2>, Backing), String> {
        let format = layers::format(writer.format).name().to_owned();
        writer.opened.image.rest().map_err(words)?;
        killpoint("vmm.committed");
        let image = match above {
            // Read only so far: for this moment it is open a second time.
            Some(fd) => {
                let options = qcow2::Options {
                    backing: Some(Arc::new(NoBacking)),
                    ..qcow2::Options::default()
                };
                let called = layers.get(top - 1).map_or("", |layer| &layer.name);
                let file = File::new(fd, called).map_err(words)?;
                Arc::new(Qcow2::open(file, options).map_err(words)?)
            }
            None => self.top_of(layers)?,
        };
        let before = named(&image);
        let backing = Some((OsString::from(name), Some(format)));
        image.set_backing(backing).map_err(words)?;
        killpoint("vmm.rebased");
        Ok((image, before))
    }

    /// The disk goes on with the image that everything was copied into. The one that was on top is
    /// emptied, so that it reads as that image for good: whoever still names it is right, too.
    fn pivot(
        &self,
        base: usize,
        name: &str,
        writer: Layer,
        active: Arc<Active>,
    ) -> Result<(), String> {
        let mut layers = lock(&self.layers);
        // At rest, as whoever opens it next wants to find it.
        let finished = active.finish(&Job::new());
        let finished = finished.and_then(|()| writer.opened.image.rest());
        let finished = finished.map_err(words);
        drop(active);
        let old = self.top_of(&layers)?;
        let format = layers::format(writer.format).name().to_owned();
        let finished = finished.and_then(|()| {
            killpoint("vmm.committed");
            old.set_backing(Some((OsString::from(name), Some(format))))
                .map_err(words)
        });
        if let Err(error) = finished {
            drop(writer);
            if let Some(layer) = layers.get(base) {
                layer.lock_file(true)?;
            }
            return Err(error);
        }
        killpoint("vmm.rebased");
        self.top.replace(writer.opened.image.clone());
        let emptied = old.empty();
        killpoint("vmm.emptied");
        layers.drain(..=base);
        layers.insert(0, writer);
        // The disk has gone on; but whoever names the image that was merged finds it as it was.
        emptied.map_err(|error| format!("merged, but not emptied then: {error}"))
    }
}

/// What one bit of a copy's log stands for at least and at most, bytes.
const GRANULE_LEAST: u64 = 4 << 10;
const GRANULE_MOST: u64 = 64 << 20;

/// Opens what a disk is to be copied to.
///
/// # Errors
/// It is not possible, in words for the caller.
pub fn open_copy(device: &DeviceConfig, image: &ImageConfig) -> Result<Vec<Layer>, String> {
    let DeviceKind::Disk(config) = &device.kind else {
        return Err(format!("{} is no disk", device.id));
    };
    let access = Access {
        writable: true,
        shareable: false,
        direct: super::disk::options(config).cache.direct(),
    };
    layers::open(device, image, access).map_err(|error| match error {
        // It is no device's configuration that is wrong.
        MachineError::Config(words) => {
            let device = format!("device {}: ", device.id);
            words.strip_prefix(&device).unwrap_or(&words).to_owned()
        }
        other => other.to_string(),
    })
}

/// What an image's header says is behind it.
type Backing = Option<(OsString, Option<String>)>;

fn named(image: &Qcow2) -> Backing {
    let header = image.header();
    Some((header.backing?, header.backing_format))
}

/// The images did not change after all: then the header must not say so. Either way the image reads
/// the same.
fn or_back(image: &Qcow2, before: Backing, kept: Result<(), String>) -> Result<(), String> {
    if kept.is_err()
        && let Err(error) = image.set_backing(before).and_then(|()| image.rest())
    {
        log::error!("{error}");
    }
    kept
}

/// A snapshot inside an image that goes would go with it, and one in an image that something is
/// pulled into would have nothing behind it any more.
fn without_snapshots(layers: Option<&[Layer]>) -> Result<(), String> {
    for layer in layers.unwrap_or_default() {
        let Some(image) = &layer.opened.qcow2 else {
            continue;
        };
        if let Some(one) = image.snapshots().map_err(words)?.first() {
            return Err(format!(
                "{} has a snapshot '{}' inside, which the block job would damage",
                layer.name, one.name
            ));
        }
    }
    Ok(())
}

/// Opens an image that was only read once more, for writing: its own lock makes room for the new
/// descriptor's, which keeps everybody else away.
fn open_writer(layer: &Layer, behind: Option<&Layer>, fd: OwnedFd) -> Result<Layer, String> {
    layer.same_file(&fd)?;
    let file = File::new(fd, &layer.name).map_err(words)?;
    if !file.writable() {
        return Err(format!("{} is not open for writing", layer.name));
    }
    let usage = match layer.format {
        ImageFormat::Raw => Usage::WRITE_RAW,
        _ => Usage::WRITE,
    };
    layer.lock_file(false)?;
    let opened = Lock::new(&file, usage).map_err(words).and_then(|held| {
        let opened = open_over(layer.format, file, behind)?;
        Ok(Layer::new(&layer.name, layer.format, opened, held))
    });
    if opened.is_err() {
        layer.lock_file(true)?;
    }
    opened
}

fn open_over(format: ImageFormat, file: File, behind: Option<&Layer>) -> Result<Opened, String> {
    match format {
        ImageFormat::Qcow2 => {
            let options = qcow2::Options {
                backing: behind.map(|behind| behind.opened.image.clone()),
                ..qcow2::Options::default()
            };
            let qcow2 = Arc::new(Qcow2::open(file, options).map_err(words)?);
            Ok(Opened {
                image: qcow2.clone(),
                qcow2: Some(qcow2),
            })
        }
        other => {
            let config = chain::ImageConfig::new(layers::format(other), file);
            let all = chain::open_all(config).map_err(words)?;
            all.into_iter().next().ok_or_else(|| "no image".to_owned())
        }
    }
}
