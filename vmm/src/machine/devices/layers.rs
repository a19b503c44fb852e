//! A disk's images: opened, locked, exchanged while nobody uses the disk.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use images::chain::{self, Opened};
use images::lock::{self as file_lock, Usage};
use images::luks::Passphrase;
use images::{File, Image, Qcow2, qcow2};
use vmm_api::devices::{DeviceConfig, ImageConfig, ImageFormat};

use super::disk::Disk;
use super::failed;
use crate::devices::lock;
use crate::machine::MachineError;
use crate::resource;

/// One image of a disk.
#[derive(Debug)]
pub struct Layer {
    /// How people call it.
    pub name: String,
    /// How it is stored.
    pub format: ImageFormat,
    /// It, with what is behind it.
    pub opened: Opened,
    /// Its file's lock, and after it its data file's.
    locks: Vec<Lock>,
    /// Nothing but its file is needed to open it.
    pub simple: bool,
}

/// The lock of a file.
#[derive(Debug)]
pub struct Lock {
    /// Another descriptor of the same open file: locks are the file's.
    fd: OwnedFd,
    name: String,
    usage: Usage,
}

impl Lock {
    /// Takes it.
    ///
    /// # Errors
    /// Somebody else's lock, in words for the caller.
    pub fn new(file: &File, usage: Usage) -> Result<Self, images::Error> {
        let name = file.name().to_owned();
        file_lock::change(file.fd(), &name, Usage::NONE, usage)?;
        let fd = file.fd().try_clone_to_owned();
        let fd = fd.map_err(|source| images::Error::Io {
            what: format!("locking {name}"),
            source,
        })?;
        Ok(Self { fd, name, usage })
    }

    fn take(&self) -> Result<(), String> {
        file_lock::change(&self.fd, &self.name, Usage::NONE, self.usage)
            .map_err(|error| error.to_string())
    }

    fn let_go(&self) -> Result<(), String> {
        file_lock::change(&self.fd, &self.name, self.usage, Usage::NONE)
            .map_err(|error| error.to_string())
    }
}

impl Layer {
    /// One whose file is `file`, which is locked for `usage`.
    pub fn new(name: &str, format: ImageFormat, opened: Opened, locked: Lock) -> Self {
        Self {
            name: name.to_owned(),
            format,
            opened,
            locks: vec![locked],
            simple: true,
        }
    }

    /// Its own lock is taken again, or let go of while somebody else in this process has the file.
    ///
    /// # Errors
    /// Somebody has it, in words for the caller.
    pub fn lock_file(&self, on: bool) -> Result<(), String> {
        match self.locks.first() {
            Some(own) if on => own.take(),
            Some(own) => own.let_go(),
            None => Ok(()),
        }
    }

    /// `fd`, which was opened by the image's name, is its file still.
    ///
    /// # Errors
    /// It is another, in words for the caller.
    pub fn same_file(&self, fd: &OwnedFd) -> Result<(), String> {
        let own = self.locks.first().ok_or("an image without a file")?;
        let stat = |fd: &OwnedFd| nix::sys::stat::fstat(fd).map_err(|error| error.to_string());
        let (own, other) = (stat(&own.fd)?, stat(fd)?);
        // A device may have several names.
        let device = own.st_rdev != 0 && own.st_rdev == other.st_rdev;
        match device || (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino) {
            true => Ok(()),
            false => Err(format!(
                "{} is not the file any more that the disk has under this name",
                self.name
            )),
        }
    }

    /// Its file once more.
    fn file(&self) -> Result<File, String> {
        let own = self.locks.first().ok_or("an image without a file")?;
        let fd = own.fd.try_clone().map_err(|error| error.to_string())?;
        File::new(fd, &self.name).map_err(|error| error.to_string())
    }
}

/// Opens these images anew, by what their headers say now. Nobody may use the old ones any more.
///
/// # Errors
/// In words for the caller.
pub fn reopen(layers: &[&Layer], writable: bool) -> Result<Vec<Opened>, String> {
    let mut config: Option<chain::ImageConfig> = None;
    for (index, layer) in layers.iter().enumerate().rev() {
        if !layer.simple {
            return Err(format!("{} can't be opened again", layer.name));
        }
        config = Some(chain::ImageConfig {
            // What has nothing behind it here had nothing before.
            alone: config.is_none(),
            backing: config.take().map(Box::new),
            read_only: index > 0 || !writable,
            ..chain::ImageConfig::new(format(layer.format), layer.file()?)
        });
    }
    let config = config.ok_or("a disk without an image")?;
    chain::open_all(config).map_err(|error| error.to_string())
}

/// The format, as `images` has it.
pub fn format(format: ImageFormat) -> chain::Format {
    match format {
        ImageFormat::Raw => chain::Format::Raw,
        ImageFormat::Qcow2 => chain::Format::Qcow2,
        ImageFormat::Luks => chain::Format::Luks,
    }
}

/// How an image's files are opened and locked.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    /// Written to.
    pub writable: bool,
    /// By others too.
    pub shareable: bool,
    /// Past the page cache.
    pub direct: bool,
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

/// What is known of an image before it is opened.
struct Known {
    name: String,
    format: ImageFormat,
    locks: Vec<Lock>,
    simple: bool,
}

/// Opens an image and everything behind it. Locks follow the descriptors: the image's own keeps
/// writers away, those behind it are only read.
pub(super) fn open(
    device: &DeviceConfig,
    config: &ImageConfig,
    access: Access,
) -> Result<Vec<Layer>, MachineError> {
    let mut known = Vec::new();
    let files = open_files(device, config, access, &mut known)?;
    let opened = chain::open_all(files).map_err(|error| failed(device, error))?;
    let layer = |(known, opened): (Known, Opened)| Layer {
        name: known.name,
        format: known.format,
        opened,
        locks: known.locks,
        simple: known.simple,
    };
    Ok(known.into_iter().zip(opened).map(layer).collect())
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
    locks.push(Lock::new(&file, usage).map_err(|error| failed(device, error))?);
    Ok(file)
}

fn open_files(
    device: &DeviceConfig,
    config: &ImageConfig,
    access: Access,
    known: &mut Vec<Known>,
) -> Result<chain::ImageConfig, MachineError> {
    let mut locks = Vec::new();
    let usage = access.usage(config.format);
    let file = open_file(
        device,
        &config.file,
        &config.name,
        access,
        usage,
        &mut locks,
    )?;
    let data_file = match &config.data_file {
        Some(at) => {
            let name = format!("{} (data file)", config.name);
            let usage = access.usage(ImageFormat::Raw);
            Some(open_file(device, at, &name, access, usage, &mut locks)?)
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
    known.push(Known {
        name: config.name.clone(),
        format: config.format,
        locks,
        simple: data_file.is_none() && passphrase.is_none(),
    });
    let backing = match &config.backing {
        Some(backing) => {
            let access = Access {
                writable: false,
                shareable: false,
                ..access
            };
            Some(Box::new(open_files(device, backing, access, known)?))
        }
        None => None,
    };
    Ok(chain::ImageConfig {
        data_file,
        // Whoever opened the files looked at what the header names.
        alone: backing.is_none(),
        backing,
        passphrase,
        read_only: !access.writable,
        ..chain::ImageConfig::new(format(config.format), file)
    })
}

impl Disk {
    /// Its files are somebody else's from now on: everything is written, nothing locked. No
    /// request is in flight, and none comes before [`Disk::take_back`].
    ///
    /// # Errors
    /// In words for the caller; the locks are as they were.
    pub fn let_go(&self) -> Result<(), String> {
        self.flush()?;
        let layers = lock(&self.layers);
        let all: Vec<&Lock> = layers.iter().flat_map(|layer| &layer.locks).collect();
        for (index, held) in all.iter().enumerate() {
            if let Err(error) = held.let_go() {
                all.iter().take(index).try_for_each(|lost| lost.take())?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Undoes [`Disk::let_go`]; nobody has written the files meanwhile.
    ///
    /// # Errors
    /// In words for the caller: somebody has them.
    pub fn take_back(&self) -> Result<(), String> {
        let layers = lock(&self.layers);
        let mut all = layers.iter().flat_map(|layer| &layer.locks);
        all.try_for_each(Lock::take)
    }

    /// Opens an image that will be on top of what the disk has now. The disk is at rest.
    ///
    /// # Errors
    /// It is no such image, in words for the caller.
    pub fn open_top(&self, fd: OwnedFd, name: &str) -> Result<Layer, String> {
        if self.is_cdrom() {
            return Err(format!("{name}: nothing goes on top of a medium"));
        }
        let words = |error: images::Error| error.to_string();
        let file = File::new(fd, name).map_err(words)?;
        let held = Lock::new(&file, Usage::WRITE).map_err(words)?;
        let layers = lock(&self.layers);
        if layers.len() >= chain::DEPTH_MOST {
            return Err("too many images behind one another".to_owned());
        }
        let backing = layers.first().ok_or("a disk without an image")?;
        let backing = backing.opened.image.clone();
        let size = backing.size();
        let options = qcow2::Options {
            backing: Some(backing),
            ..qcow2::Options::default()
        };
        let qcow2 = Arc::new(Qcow2::open(file, options).map_err(words)?);
        if qcow2.size() != size {
            return Err(format!("{name} is not of the disk's size"));
        }
        let opened = Opened {
            image: qcow2.clone(),
            qcow2: Some(qcow2),
        };
        Ok(Layer::new(name, ImageFormat::Qcow2, opened, held))
    }

    /// Puts it there. What was on top is only read from now on.
    ///
    /// # Errors
    /// In words for the caller.
    pub fn put_top(&self, top: Layer) -> Result<(), String> {
        self.top.replace(top.opened.image.clone());
        lock(&self.layers).insert(0, top);
        Ok(())
    }

    /// The image on top.
    ///
    /// # Errors
    /// There is none, in words for the caller.
    pub fn top_image(&self) -> Result<Arc<dyn Image>, String> {
        let layers = lock(&self.layers);
        let first = layers.first().ok_or("a disk without an image")?;
        Ok(first.opened.image.clone())
    }

    /// Names of its images, the one on top first.
    pub fn image_names(&self) -> Vec<String> {
        lock(&self.layers)
            .iter()
            .map(|layer| layer.name.clone())
            .collect()
    }

    /// The image on top, which must be qcow2.
    ///
    /// # Errors
    /// It is not, in words for the caller.
    pub fn qcow2(&self) -> Result<Arc<Qcow2>, String> {
        let layers = lock(&self.layers);
        let first = layers.first().ok_or("a disk without an image")?;
        let qcow2 = first.opened.qcow2.clone();
        qcow2.ok_or_else(|| format!("{} is not a qcow2 image", first.name))
    }
}
