//! Disks.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use images::engine::{Aio, Cache, DetectZeroes, Engine, Op, Options};
use images::limits::{Limits, Rate};
use images::lock::{self as file_lock, Usage};
use images::luks::Passphrase;
use images::{File, Qcow2, chain, qcow2};
use virtio::block::{self, Action, Block, Failure, Handle, Hooks, OnError, Policy};
use vmm_api::config::Resource;
use vmm_api::control::{DiskStats, Event};
use vmm_api::devices::{self as api, DeviceConfig, DiskConfig, ImageConfig, ImageFormat};

use super::{Builder, failed};
use crate::devices::lock;
use crate::machine::MachineError;
use crate::migrate::disks::Noting;
use crate::notices::{Notice, Notices};
use crate::resource;
use crate::state::switch::Top;
use crate::storage::EngineStorage;

/// Queues of a disk whose number is left to us: one a vCPU up to here.
const QUEUES_MAX: u16 = 16;
/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;

/// A disk, for changes while its guest runs.
#[derive(Debug)]
pub struct Disk {
    handle: Handle,
    engine: Arc<Engine>,
    locks: Mutex<Vec<Lock>>,
    top: Arc<Top>,
    noting: Arc<Noting>,
}

/// The lock of one of its files.
#[derive(Debug)]
struct Lock {
    /// Another descriptor of the same open file: locks are the file's.
    fd: OwnedFd,
    name: String,
    usage: Usage,
}

/// An image that is ready to be put on top of a disk.
#[derive(Debug)]
pub struct NewTop(Arc<dyn images::Image>, Lock);

fn take(locks: &[Lock]) -> Result<(), String> {
    for lost in locks {
        file_lock::change(&lost.fd, &lost.name, Usage::NONE, lost.usage)
            .map_err(|error| error.to_string())?;
    }
    Ok(())
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
            capacity: self.handle.capacity(),
            allocation: info.allocated,
            physical: info.end,
        }
    }

    /// Its files are somebody else's from now on: everything is written, nothing locked. No
    /// request is in flight, and none comes before [`Disk::take_back`].
    ///
    /// # Errors
    /// In words for the caller; the locks are as they were.
    pub fn let_go(&self) -> Result<(), String> {
        self.engine
            .image()
            .rest()
            .map_err(|error| error.to_string())?;
        let locks = lock(&self.locks);
        for (index, held) in locks.iter().enumerate() {
            if let Err(error) = file_lock::change(&held.fd, &held.name, held.usage, Usage::NONE) {
                take(&locks[..index])?;
                return Err(error.to_string());
            }
        }
        Ok(())
    }

    /// Undoes [`Disk::let_go`]; nobody has written the files meanwhile.
    ///
    /// # Errors
    /// In words for the caller: somebody has them.
    pub fn take_back(&self) -> Result<(), String> {
        take(&lock(&self.locks))
    }

    /// Its content, where writes can be noted.
    #[must_use]
    pub fn noting(&self) -> &Arc<Noting> {
        &self.noting
    }

    /// Opens an image that will be on top of what the disk has now. The disk is at rest.
    ///
    /// # Errors
    /// It is no such image, in words for the caller.
    pub fn open_top(&self, fd: OwnedFd, name: &str) -> Result<NewTop, String> {
        let words = |error: images::Error| error.to_string();
        let usage = Usage::WRITE;
        let held = Lock {
            fd: fd.try_clone().map_err(|error| error.to_string())?,
            name: name.to_owned(),
            usage,
        };
        let file = File::new(fd, name).map_err(words)?;
        file_lock::change(file.fd(), name, Usage::NONE, usage).map_err(words)?;
        let backing = self.top.image().map_err(words)?.clone();
        let size = backing.size();
        let options = qcow2::Options {
            backing: Some(backing),
            data_file: None,
            cipher: None,
            l2_cache: 0,
            read_only: false,
            snapshot: None,
        };
        let image = Qcow2::open(file, options).map_err(words)?;
        if images::Image::size(&image) != size {
            return Err(format!("{name} is not of the disk's size"));
        }
        Ok(NewTop(Arc::new(image), held))
    }

    /// Puts it there.
    ///
    /// # Errors
    /// It has been done too often.
    pub fn put_top(&self, top: NewTop) -> Result<(), String> {
        self.top.put(top.0).map_err(|error| error.to_string())?;
        lock(&self.locks).push(top.1);
        Ok(())
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

    /// Changes its limits.
    ///
    /// # Errors
    /// Limits that contradict each other, in words for the caller.
    pub fn set_limits(&self, to: &api::DiskLimits) -> Result<(), String> {
        self.engine
            .set_limits(limits(to))
            .map_err(|error| error.to_string())
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
            self.handle.set_capacity(bytes);
        }
        if let Err(error) = image.resize(bytes) {
            self.handle.set_capacity(image.size());
            return Err(error.to_string());
        }
        self.handle.set_capacity(bytes);
        Ok(())
    }
}

#[derive(Debug)]
struct Failures {
    id: String,
    notices: Arc<Notices>,
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

fn options(config: &DiskConfig) -> Options {
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

/// How an image's files are opened and locked.
#[derive(Debug, Clone, Copy)]
struct Access {
    writable: bool,
    shareable: bool,
    direct: bool,
}

impl Access {
    fn usage(self, format: ImageFormat) -> Usage {
        match (self.writable, self.shareable, format) {
            (true, true, ImageFormat::Raw) => Usage::SHARED,
            (true, _, ImageFormat::Raw) => Usage::WRITE_RAW,
            (true, ..) => Usage::WRITE,
            (false, ..) => Usage::READ,
        }
    }
}

fn open_file(
    device: &DeviceConfig,
    at: &vmm_api::config::Resource,
    name: &str,
    access: Access,
    usage: Usage,
    locks: &mut Vec<Lock>,
) -> Result<File, MachineError> {
    let fd: OwnedFd = resource::open_disk(at, access.writable, access.direct)?;
    let file = File::new(fd, name).map_err(|error| failed(device, error))?;
    file_lock::change(file.fd(), name, Usage::NONE, usage)
        .map_err(|error| failed(device, error))?;
    locks.push(Lock {
        fd: file
            .fd()
            .try_clone_to_owned()
            .map_err(|error| failed(device, error))?,
        name: name.to_owned(),
        usage,
    });
    Ok(file)
}

/// Opens the files of an image and of everything behind it. Locks follow the descriptors: the
/// image's own keeps writers away, those behind it are only read.
fn open_files(
    device: &DeviceConfig,
    config: &ImageConfig,
    access: Access,
    locks: &mut Vec<Lock>,
) -> Result<chain::ImageConfig, MachineError> {
    let usage = access.usage(config.format);
    let data_file = match &config.data_file {
        Some(at) => {
            let name = format!("{} (data file)", config.name);
            let usage = access.usage(ImageFormat::Raw);
            Some(open_file(device, at, &name, access, usage, locks)?)
        }
        None => None,
    };
    let backing = match &config.backing {
        Some(backing) => {
            let access = Access {
                writable: false,
                shareable: false,
                ..access
            };
            Some(Box::new(open_files(device, backing, access, locks)?))
        }
        None => None,
    };
    let passphrase = match &config.passphrase {
        Some(at) => {
            let passphrase = Passphrase::read(resource::open_read(at)?)
                .map_err(|error| failed(device, format!("passphrase: {error}")))?;
            Some(passphrase)
        }
        None => None,
    };
    Ok(chain::ImageConfig {
        format: match config.format {
            ImageFormat::Raw => chain::Format::Raw,
            ImageFormat::Qcow2 => chain::Format::Qcow2,
            ImageFormat::Luks => chain::Format::Luks,
        },
        data_file,
        backing,
        passphrase,
        read_only: !access.writable,
        ..chain::ImageConfig::new(
            chain::Format::Raw,
            open_file(device, &config.file, &config.name, access, usage, locks)?,
        )
    })
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
    // Held as long as the files are open, here or by the disk that follows.
    let mut locks = Vec::new();
    let words = |error: MachineError| error.to_string();
    let files = open_files(&device, image, access, &mut locks).map_err(words)?;
    for fd in originals {
        // SAFETY: moves the place that a passphrase is read from back to its start; images have no
        // use for it. Where there is no such place nothing happens.
        unsafe { libc::lseek(fd, 0, libc::SEEK_SET) };
    }
    chain::open(files).map_err(|error| format!("disk {id}: {error}"))
}

impl Builder {
    pub(super) fn disk(
        &mut self,
        device: &DeviceConfig,
        config: &DiskConfig,
    ) -> Result<(), MachineError> {
        let Some(image) = &config.image else {
            return Err(failed(
                device,
                "a drive without a medium: virtio disks have one",
            ));
        };
        let options = options(config);
        let access = Access {
            writable: !config.readonly,
            shareable: config.shareable,
            direct: options.cache.direct(),
        };
        let mut locks = Vec::new();
        let files = open_files(device, image, access, &mut locks)?;
        let image = chain::open(files).map_err(|error| failed(device, error))?;
        let top = Arc::new(Top::new(image));
        let noting = Arc::new(Noting::new(top.clone()));
        let engine = Engine::new(noting.clone(), options);
        engine
            .set_limits(limits(&config.limits))
            .map_err(|error| failed(device, error))?;
        let hooks = Arc::new(Failures {
            id: device.id.clone(),
            notices: self.notices.clone(),
        });
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
            policy: Policy {
                read: on_error(config.on_read_error),
                write: on_error(config.on_write_error),
            },
            ..block::Options::default()
        };
        let storage = Arc::new(EngineStorage(engine.clone()));
        let block = Block::new(block, storage, hooks).map_err(|error| failed(device, error))?;
        let disk = Disk {
            handle: block.handle(),
            engine,
            locks: Mutex::new(locks),
            top,
            noting,
        };
        self.disks.push((device.id.clone(), disk));
        self.virtio(device, Box::new(block))
    }
}
