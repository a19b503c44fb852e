//! Disks.

use std::sync::{Arc, Mutex, PoisonError};

use images::engine::{Aio, Cache, DetectZeroes, Engine, Meter, Op, Options};
use images::limits::{Limits, Rate};
use images::noting::Noting;
use virtio::block::{self, Action, Block, Failure, Handle, Hooks, OnError, Policy};
use virtio::scsi::Unit;
use virtio::worker::Starter;
use vmm_api::config::Resource;
use vmm_api::control::{DiskStats, Event};
use vmm_api::devices::{self as api, DeviceConfig, DiskConfig};

use super::layers::{self, Access, Layer};
use super::sata::NoMedium;
use super::{Builder, Kit, PciDevices, failed};
use crate::devices::ahci::Drive;
use crate::machine::MachineError;
use crate::notices::{Notice, Notices};
use crate::num::to_usize;
use crate::state::switch::Top;
use crate::storage::EngineStorage;

/// Queues of a disk whose number is left to us: one a vCPU up to here.
pub(super) const QUEUES_MAX: u16 = 16;
/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;

/// How the guest sees a disk.
#[derive(Debug)]
pub enum Front {
    /// As virtio-blk.
    Virtio(Handle),
    /// As a drive at a SATA port.
    Sata(Arc<Drive>),
    /// As a unit of a SCSI controller.
    Scsi(Arc<Unit>),
}

impl Front {
    fn capacity(&self) -> u64 {
        match self {
            Self::Virtio(handle) => handle.capacity(),
            Self::Sata(drive) => drive.capacity(),
            Self::Scsi(unit) => unit.capacity(),
        }
    }

    fn set_capacity(&self, bytes: u64) {
        match self {
            Self::Virtio(handle) => handle.set_capacity(bytes),
            Self::Sata(drive) => drive.set_capacity(bytes),
            Self::Scsi(unit) => unit.set_capacity(bytes),
        }
    }

    /// Whether media come and go.
    pub(super) fn is_cdrom(&self) -> bool {
        match self {
            Self::Virtio(_) => false,
            Self::Sata(drive) => drive.is_cdrom(),
            Self::Scsi(unit) => unit.is_cdrom(),
        }
    }

    /// A CD-ROM drive's tray: out, locked.
    pub(super) fn tray(&self) -> Option<(bool, bool)> {
        match self {
            _ if !self.is_cdrom() => None,
            Self::Virtio(_) => None,
            Self::Sata(drive) => Some(drive.tray()),
            Self::Scsi(unit) => Some(unit.tray()),
        }
    }

    /// Whether the medium may be taken out; if not, the guest is asked for it.
    pub(super) fn ask_for_medium(&self) -> bool {
        match self {
            _ if !self.is_cdrom() => true,
            Self::Virtio(_) => true,
            Self::Sata(drive) => drive.ask_for_medium(),
            Self::Scsi(unit) => unit.ask_for_medium(),
        }
    }

    /// A CD-ROM drive has another medium, or none.
    pub(super) fn medium_changed(&self, there: bool) {
        match self {
            Self::Sata(drive) if drive.is_cdrom() => drive.medium_changed(there),
            Self::Scsi(unit) if unit.is_cdrom() => unit.medium_changed(there),
            _ => {}
        }
    }
}

/// What is behind a disk, however the guest sees it.
pub(super) struct Content {
    /// All but the way to the guest.
    pub engine: Arc<Engine>,
    top: Arc<Top>,
    noting: Arc<Noting>,
    layers: Vec<Layer>,
    /// Who hears of failures.
    pub hooks: Failures,
    /// What becomes of them.
    pub policy: Policy,
    /// Who starts its threads.
    pub starter: Option<Starter>,
}

impl Content {
    /// The disk, for changes while its guest runs.
    pub fn disk(self, front: Front) -> Disk {
        Disk {
            front,
            engine: self.engine,
            top: self.top,
            noting: self.noting,
            layers: Mutex::new(self.layers),
            leaving: Mutex::default(),
        }
    }
}

/// A disk, for changes while its guest runs.
#[derive(Debug)]
pub struct Disk {
    pub(super) front: Front,
    engine: Arc<Engine>,
    pub(super) top: Arc<Top>,
    /// Its images, the one on top first.
    pub(super) layers: Mutex<Vec<Layer>>,
    pub(super) noting: Arc<Noting>,
    /// The images it had before it went on with a copy, which are kept as that one is: nobody may know yet.
    pub(super) leaving: Mutex<Option<Vec<Layer>>>,
}

impl Disk {
    /// Its counters.
    pub fn stats(&self) -> DiskStats {
        let of = |op| self.engine.stats().get(op);
        let (read, write, flush, discard) =
            (of(Op::Read), of(Op::Write), of(Op::Flush), of(Op::Discard));
        let info = self.engine.image().info().unwrap_or_else(|error| {
            log::warn!("a disk's size: {error}");
            images::ImageInfo::default()
        });
        DiskStats {
            read_requests: read.requests,
            read_bytes: read.bytes,
            read_ns: read.nanos,
            write_requests: write.requests,
            write_bytes: write.bytes,
            write_ns: write.nanos,
            flush_requests: flush.requests,
            flush_ns: flush.nanos,
            errors: read.failed + write.failed + flush.failed + discard.failed,
            capacity: self.front.capacity(),
            allocation: info.allocated,
            physical: info.end,
            threshold: self.file_of(0, images::File::mark).unwrap_or(0),
        }
    }

    /// The offsets that are watched in the files of images behind the one on top.
    pub fn marks_behind(&self) -> Vec<(u32, u64)> {
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let files = (0u32..).zip(layers.iter()).skip(1);
        let marks = files.filter_map(|(at, layer)| {
            let mark = layer.opened.image.own_file()?.mark();
            (mark > 0).then_some((at, mark))
        });
        marks.collect()
    }

    /// What `of` says of the file of image `index`, the one on top being 0.
    fn file_of<T>(&self, index: usize, of: impl FnOnce(&images::File) -> T) -> Option<T> {
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.get(index)?.opened.image.own_file().map(of)
    }

    /// The first write beyond an offset in the file of image `index` is told.
    ///
    /// # Errors
    /// It has no such image, in words for the caller.
    pub fn set_threshold(
        &self,
        id: &str,
        index: u32,
        bytes: u64,
        notices: &Arc<Notices>,
    ) -> Result<(), String> {
        let threshold = Arc::new(Threshold {
            id: id.to_owned(),
            image: index,
            notices: notices.clone(),
        });
        self.file_of(to_usize(index.into()), |file| {
            file.set_mark(bytes, threshold)
        })
        .ok_or_else(|| format!("disk '{id}' has no image {index} in a file"))
    }

    /// Its content, where writes can be noted.
    #[must_use]
    pub fn noting(&self) -> &Arc<Noting> {
        &self.noting
    }

    /// Puts what the guest was told is written where it outlives this process.
    ///
    /// # Errors
    /// The image's, in words for the caller.
    pub fn flush(&self) -> Result<(), String> {
        self.engine
            .image()
            .rest()
            .map_err(|error| error.to_string())
    }

    /// Its image, whichever is on top.
    pub fn content(&self) -> Arc<dyn images::Image> {
        self.noting.clone()
    }

    /// Changes its limits, which it has with all that have the same meter.
    ///
    /// # Errors
    /// Limits that contradict each other, in words for the caller.
    pub fn set_limits(&self, to: &api::DiskLimits, meter: Arc<Meter>) -> Result<(), String> {
        let limits = limits(to);
        limits.check().map_err(|error| error.to_string())?;
        self.engine.share(meter);
        self.engine
            .set_limits(limits)
            .map_err(|error| error.to_string())
    }

    /// What its limits are measured by.
    pub fn meter(&self) -> Arc<Meter> {
        self.engine.meter()
    }

    /// Changes its size.
    ///
    /// # Errors
    /// What the image or the host says, in words for the caller.
    pub fn resize(&self, bytes: u64) -> Result<(), String> {
        if !bytes.is_multiple_of(512) {
            return Err(format!("{bytes} bytes are not whole sectors of 512"));
        }
        let image = self.engine.image();
        let before = image.size();
        // A guest must not reach for what is gone: it is told of less before, of more after.
        if bytes < before {
            self.front.set_capacity(bytes);
        }
        if let Err(error) = image.resize(bytes) {
            self.front.set_capacity(image.size());
            return Err(error.to_string());
        }
        self.front.set_capacity(bytes);
        Ok(())
    }
}

/// Tells of a write beyond an offset.
#[derive(Debug)]
struct Threshold {
    id: String,
    image: u32,
    notices: Arc<Notices>,
}

impl images::Mark for Threshold {
    fn passed(&self, at: u64, end: u64) {
        self.notices.send(Notice::Tell(Event::BlockThreshold {
            id: self.id.clone(),
            image: self.image,
            threshold: at,
            excess: end.saturating_sub(at),
        }));
    }
}

/// Who hears of failures.
#[derive(Debug, Clone)]
pub(super) struct Failures {
    /// The disk's id.
    pub id: String,
    /// Where it goes.
    pub notices: Arc<Notices>,
}

impl Hooks for Failures {
    fn failed(&self, failure: Failure) {
        let policy = match failure.action {
            Action::Ignore => api::ErrorPolicy::Ignore,
            Action::Report => api::ErrorPolicy::Report,
            Action::Stop => api::ErrorPolicy::Stop,
        };
        let what = if failure.write { "write" } else { "read" };
        let error = std::io::Error::from_raw_os_error(failure.errno);
        let event = Event::IoError {
            id: self.id.clone(),
            policy,
            reason: if failure.errno == libc::ENOSPC {
                "enospc".into()
            } else {
                String::new()
            },
            message: format!("{what}: {error}"),
        };
        self.notices.send(match failure.action {
            Action::Stop => Notice::Pause(event),
            Action::Ignore | Action::Report => Notice::Tell(event),
        });
    }
}

fn rate(limit: api::Limit) -> Rate {
    Rate {
        average: limit.rate,
        burst: limit.burst,
        burst_seconds: limit.burst_seconds,
    }
}

fn limits(of: &api::DiskLimits) -> Limits {
    Limits {
        total_bytes: rate(of.total_bytes),
        read_bytes: rate(of.read_bytes),
        write_bytes: rate(of.write_bytes),
        total_iops: rate(of.total_iops),
        read_iops: rate(of.read_iops),
        write_iops: rate(of.write_iops),
        iops_size: of.iops_size,
    }
}

fn on_error(policy: api::ErrorPolicy) -> OnError {
    match policy {
        api::ErrorPolicy::Report => OnError::Report,
        api::ErrorPolicy::Stop => OnError::Stop,
        api::ErrorPolicy::Ignore => OnError::Ignore,
        api::ErrorPolicy::Enospace => OnError::Enospace,
    }
}

pub(super) fn options(config: &DiskConfig) -> Options {
    Options {
        cache: match config.cache {
            api::CacheMode::None => Cache::None,
            api::CacheMode::Writeback => Cache::Writeback,
            api::CacheMode::Writethrough => Cache::Writethrough,
            api::CacheMode::Directsync => Cache::DirectSync,
            api::CacheMode::Unsafe => Cache::Unsafe,
        },
        aio: match config.io {
            api::IoMode::Threads => Aio::Threads,
            api::IoMode::Native | api::IoMode::IoUring => Aio::Ring,
        },
        discard: config.discard,
        detect_zeroes: match config.detect_zeroes {
            api::DetectZeroes::Off => DetectZeroes::Off,
            api::DetectZeroes::On => DetectZeroes::On,
            api::DetectZeroes::Unmap => DetectZeroes::Unmap,
        },
        read_only: config.readonly,
    }
}

/// Opens the image of disk `id` before there is a disk: for content that comes along with its guest.
/// Its locks are those of the files, which the disk takes over later.
///
/// # Errors
/// There is none, or it can't be opened, in words for the source.
pub fn open_image(devices: &[DeviceConfig], id: &str) -> Result<Arc<dyn images::Image>, String> {
    let mut device = devices
        .iter()
        .find(|device| device.id == id)
        .cloned()
        .ok_or_else(|| format!("there is no disk {id} here"))?;
    let mut originals = Vec::new();
    for resource in device.resources_mut() {
        if let Resource::Fd(fd) = resource {
            originals.push(*fd);
            // SAFETY: makes a second number for what the first one is, or fails.
            *fd = unsafe { libc::fcntl(*fd, libc::F_DUPFD, 3) };
            if *fd < 0 {
                let error = std::io::Error::last_os_error();
                return Err(format!("disk {id}: {error}"));
            }
        }
    }
    let api::DeviceKind::Disk(config) = &device.kind else {
        return Err(format!("{id} is no disk here"));
    };
    let Some(image) = config.image.as_ref().filter(|_| !config.readonly) else {
        return Err(format!("disk {id} can't be written here"));
    };
    let access = Access {
        writable: true,
        shareable: config.shareable,
        direct: options(config).cache.direct(),
    };
    // Its locks are held as long as the files are open, here or by the disk that follows.
    let words = |error: MachineError| error.to_string();
    let layers = layers::open(&device, image, access).map_err(words)?;
    for fd in originals {
        // SAFETY: moves the place that a passphrase is read from back to its start; images have no
        // use for it. Where there is no such place nothing happens.
        unsafe { libc::lseek(fd, 0, libc::SEEK_SET) };
    }
    let first = layers.into_iter().next();
    first
        .map(|first| first.opened.image)
        .ok_or_else(|| format!("disk {id}: no image"))
}

impl PciDevices {
    /// Changes the limits of a disk, and of the others in its group.
    ///
    /// # Errors
    /// There is no such disk, or limits that contradict each other, in words for the caller.
    pub fn set_limits(
        &self,
        id: &str,
        limits: &api::DiskLimits,
        group: Option<&str>,
    ) -> Result<(), String> {
        let disk = self.disk(id)?;
        let meter = match group {
            Some(group) => self.kit.meter(group),
            None if self.kit.is_shared(&disk.meter()) => Arc::default(),
            None => disk.meter(),
        };
        disk.set_limits(limits, meter)
    }
}

impl Kit {
    /// Whether a meter is a group's.
    fn is_shared(&self, meter: &Arc<Meter>) -> bool {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let own = Arc::downgrade(meter);
        groups.iter().any(|(_, meter)| meter.ptr_eq(&own))
    }

    /// The limits of a group of disks.
    fn meter(&self, group: &str) -> Arc<Meter> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|(_, meter)| meter.strong_count() > 0);
        let known = groups.iter().find(|(name, _)| name == group);
        if let Some(meter) = known.and_then(|(_, meter)| meter.upgrade()) {
            return meter;
        }
        let meter = Arc::default();
        groups.push((group.to_owned(), Arc::downgrade(&meter)));
        meter
    }
}

impl Builder {
    /// Opens what a disk is made of. Its host I/O is the I/O thread's, if there is one.
    pub(super) fn content(
        &mut self,
        device: &DeviceConfig,
        config: &DiskConfig,
        iothread: Option<u32>,
    ) -> Result<Content, MachineError> {
        let options = options(config);
        let access = Access {
            writable: !config.readonly,
            shareable: config.shareable,
            direct: options.cache.direct(),
        };
        let (layers, image): (Vec<Layer>, Arc<dyn images::Image>) = match &config.image {
            Some(image) => {
                let layers = layers::open(device, image, access)?;
                let image = layers.first().map(|first| first.opened.image.clone());
                (layers, image.ok_or_else(|| failed(device, "no image"))?)
            }
            None if config.cdrom => (Vec::new(), Arc::new(NoMedium)),
            None => {
                return Err(failed(
                    device,
                    "a drive without a medium: only CD-ROM drives go without",
                ));
            }
        };
        let top = Arc::new(Top::new(image));
        let noting = Arc::new(Noting::new(top.clone()));
        let meter = match &config.limits_group {
            Some(name) => self.meter(name),
            None => Arc::default(),
        };
        let thread = iothread.map(|id| self.iothreads.get(id)).transpose();
        let thread = thread.map_err(|error| failed(device, error))?;
        let pool = thread.map_or_else(Arc::default, |thread| Arc::clone(&thread.pool));
        let starter = thread.map(|thread| thread.starter.clone());
        let engine = Engine::sharing(noting.clone(), options, meter, pool);
        let limits = limits(&config.limits);
        if !limits.none() {
            engine
                .set_limits(limits)
                .map_err(|error| failed(device, error))?;
        }
        Ok(Content {
            engine,
            top,
            noting,
            layers,
            hooks: Failures {
                id: device.id.clone(),
                notices: self.notices.clone(),
            },
            policy: Policy {
                read: on_error(config.on_read_error),
                write: on_error(config.on_write_error),
            },
            starter,
        })
    }

    /// A virtio disk.
    pub(super) fn disk(
        &mut self,
        device: &DeviceConfig,
        config: &DiskConfig,
    ) -> Result<(), MachineError> {
        if config.cdrom {
            return Err(failed(
                device,
                "CD-ROM drives are at SATA or SCSI controllers",
            ));
        }
        let mut content = self.content(device, config, config.iothread)?;
        let block = block::Options {
            read_only: config.readonly,
            serial: config.serial.clone(),
            queues: if config.queues == 0 {
                self.vcpus.min(QUEUES_MAX)
            } else {
                config.queues
            },
            queue_size: QUEUE_SIZE,
            logical_block_size: config.logical_block_size,
            physical_block_size: config.physical_block_size,
            policy: content.policy,
            starter: content.starter.take(),
            ..block::Options::default()
        };
        let storage = Arc::new(EngineStorage(content.engine.clone()));
        let hooks = Arc::new(content.hooks.clone());
        let block = Block::new(block, storage, hooks).map_err(|error| failed(device, error))?;
        let disk = content.disk(Front::Virtio(block.handle()));
        self.disks.push((device.id.clone(), disk));
        self.virtio(device, Box::new(block))
    }
}
