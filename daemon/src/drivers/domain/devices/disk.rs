//! Disks: an image with everything behind it, opened.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use images::qcow2::Header;
use vmm_api::config::Resource;
use vmm_api::devices::{
    CacheMode, DetectZeroes, DiskBus, DiskConfig, DiskLimits, ErrorPolicy, ImageConfig,
    ImageFormat, IoMode, Limit,
};
use xml_schemas::dom::Element;
use xml_schemas::domain::device::{BackingImage, Disk, DiskSource, IoTune, SecretUse};

use crate::drivers::domain::iothreads;
use crate::drivers::domain::machine::{Builder, CopyWish};
use crate::error::{Error, ErrorCode, ErrorDomain, Result, plain};

/// Most images of one chain, as in libvirt.
const LONGEST_CHAIN: usize = 200;

/// A chain that is being opened.
struct Chain<'a> {
    /// The disk's target, for messages.
    target: &'a str,
    direct: bool,
    /// Device and inode of every file so far.
    seen: HashSet<(u64, u64)>,
}

/// One image of a chain as it is stated, or as the image before it states it.
struct Wanted {
    path: PathBuf,
    format: String,
    secret: Option<SecretUse>,
    writable: bool,
    backing: Option<BackingImage>,
    /// Who names it.
    parent: Option<PathBuf>,
}

impl Builder {
    /// Opens a disk, and notes in its element what is behind the image.
    pub(super) fn disk(&mut self, element: &mut Element, bus: DiskBus) -> Result<DiskConfig> {
        let disk = Disk::read(element)?;
        let target = disk.target.clone();
        let unsupported = |what: &str| Err(Error::unsupported(format!("disk '{target}': {what}")));
        let cache = match disk.cache.as_deref() {
            None | Some("writeback") => CacheMode::Writeback,
            Some("none") => CacheMode::None,
            Some("writethrough") => CacheMode::Writethrough,
            Some("directsync") => CacheMode::Directsync,
            Some("unsafe") => CacheMode::Unsafe,
            Some(other) => return unsupported(&format!("cache '{other}'")),
        };
        let io = match disk.io.as_deref() {
            None | Some("threads") => IoMode::Threads,
            Some("native") => IoMode::Native,
            Some("io_uring") => IoMode::IoUring,
            Some(other) => return unsupported(&format!("io '{other}'")),
        };
        let direct = matches!(cache, CacheMode::None | CacheMode::Directsync);
        if io == IoMode::Native && !direct {
            // libvirt's own rule.
            return Err(Error::unsupported(
                "native I/O needs either no disk cache or directsync cache mode, QEMU will \
                 fallback to aio=threads",
            ));
        }
        let image = self.content(element, &disk, direct)?;
        let policy = |policy: &Option<String>| match policy.as_deref() {
            Some("stop") => ErrorPolicy::Stop,
            Some("ignore") => ErrorPolicy::Ignore,
            Some("enospace") => ErrorPolicy::Enospace,
            _ => ErrorPolicy::Report,
        };
        let logical = disk.logical_block_size.unwrap_or(512);
        let bus_has_names = matches!(bus, DiskBus::Scsi { .. });
        Ok(DiskConfig {
            bus,
            cdrom: disk.is_cdrom(),
            image,
            readonly: disk.readonly,
            shareable: disk.shareable,
            cache,
            io,
            // As QEMU does for virtio-blk: not unless it is asked for.
            discard: disk.discard.as_deref() == Some("unmap"),
            detect_zeroes: match disk.detect_zeroes.as_deref() {
                Some("on") => DetectZeroes::On,
                Some("unmap") => DetectZeroes::Unmap,
                _ => DetectZeroes::Off,
            },
            serial: disk
                .serial
                .as_deref()
                .unwrap_or_default()
                .chars()
                .take(if bus_has_names { 36 } else { 20 })
                .collect(),
            vendor: disk.vendor.clone().unwrap_or_default(),
            product: disk.product.clone().unwrap_or_default(),
            wwn: disk.wwn.filter(|_| bus_has_names),
            queues: disk.queues.unwrap_or(0),
            logical_block_size: logical,
            physical_block_size: disk.physical_block_size.unwrap_or(logical),
            limits: limits(&disk.iotune),
            limits_group: disk.iotune.group.clone(),
            iothread: iothreads::of_device(element),
            on_read_error: match (&disk.rerror_policy, &disk.error_policy) {
                (None, Some(both)) if both != "enospace" => policy(&disk.error_policy),
                _ => policy(&disk.rerror_policy),
            },
            on_write_error: match &disk.error_policy {
                None => ErrorPolicy::Enospace,
                stated => policy(stated),
            },
        })
    }

    /// Opens what a disk holds, and notes in its element what is behind it. Of a CD-ROM drive it may be nothing.
    fn content(
        &mut self,
        element: &mut Element,
        disk: &Disk,
        direct: bool,
    ) -> Result<Option<ImageConfig>> {
        let target = &disk.target;
        let unsupported = |what: &str| Err(Error::unsupported(format!("disk '{target}': {what}")));
        let path = match &disk.source {
            DiskSource::File(path) | DiskSource::Block(path) => PathBuf::from(path),
            DiskSource::Volume { pool, volume } => {
                PathBuf::from(self.around.storage.disk_path(pool, volume)?)
            }
            DiskSource::None if disk.is_cdrom() => {
                element.take_children("backingStore");
                return Ok(None);
            }
            DiskSource::None => return unsupported("it has no source"),
            DiskSource::Other(kind) => return unsupported(&format!("type '{kind}'")),
        };
        let mut chain = Chain {
            target,
            direct,
            seen: HashSet::new(),
        };
        let wanted = Wanted {
            path,
            format: disk.format.clone(),
            secret: disk.secret.clone(),
            writable: !disk.readonly,
            backing: disk.backing.clone(),
            parent: None,
        };
        let (image, store) = self.image(&mut chain, wanted)?;
        element.take_children("backingStore");
        element.push(store);
        Ok(Some(image))
    }

    /// Opens the medium that a running drive gets, and notes in its element what is behind it.
    pub(in crate::drivers::domain) fn medium(
        &mut self,
        element: &mut Element,
    ) -> Result<Option<ImageConfig>> {
        let disk = Disk::read(element)?;
        let direct = matches!(disk.cache.as_deref(), Some("none" | "directsync"));
        self.content(element, &disk, direct)
    }

    /// Opens what a running disk is copied to.
    pub(in crate::drivers::domain) fn copy(&mut self, wish: CopyWish) -> Result<ImageConfig> {
        let mut chain = Chain {
            target: &wish.target,
            direct: wish.direct,
            seen: HashSet::new(),
        };
        let wanted = Wanted {
            path: wish.path,
            format: wish.format,
            secret: wish.secret,
            writable: true,
            backing: wish.backing,
            parent: None,
        };
        Ok(self.image(&mut chain, wanted)?.0)
    }

    /// Opens one image and what is behind it; also the element that says so.
    fn image(&mut self, chain: &mut Chain<'_>, wanted: Wanted) -> Result<(ImageConfig, Element)> {
        let format = match wanted.format.as_str() {
            "raw" if wanted.secret.is_some() => ImageFormat::Luks,
            "raw" => ImageFormat::Raw,
            "qcow2" => ImageFormat::Qcow2,
            "luks" => ImageFormat::Luks,
            other => {
                return Err(Error::unsupported(format!(
                    "disk '{}': format '{other}' of '{}'",
                    chain.target,
                    wanted.path.display()
                )));
            }
        };
        let file = open(&wanted, false)?;
        let metadata = file.metadata().map_err(|e| cannot_access(&wanted, &e))?;
        if !chain.seen.insert((metadata.dev(), metadata.ino())) || chain.seen.len() > LONGEST_CHAIN
        {
            return Err(Error::internal(format!(
                "backing store for '{}' is self-referential or too long",
                wanted.path.display()
            )));
        }
        let header = match format {
            ImageFormat::Qcow2 => Some(header(&file, &wanted.path)?),
            ImageFormat::Raw | ImageFormat::Luks => None,
        };
        let file = if chain.direct {
            open(&wanted, true)?
        } else {
            file
        };
        let name = wanted.path.display().to_string();
        let file = self.pass_as(file, &name);
        let data_file = match header.as_ref().and_then(|h| h.data_file.as_ref()) {
            Some(data) => Some(self.data_file(chain, &wanted, data)?),
            None => None,
        };
        let passphrase = match &wanted.secret {
            Some(secret) => {
                let value = self.around.secrets.value_of(secret)?;
                Some(
                    self.pass(
                        sealed(&value)
                            .map_err(|e| Error::system("cannot hand over a passphrase", &e))?,
                    ),
                )
            }
            None if format == ImageFormat::Luks => {
                return Err(Error::unsupported(format!(
                    "disk '{}': '{name}' is encrypted: its <encryption> must name a <secret>",
                    chain.target
                )));
            }
            None => None,
        };
        let behind = behind(&wanted, header.as_ref())?;
        let (backing, store) = match behind {
            Some(behind) => {
                let path = behind.path.display().to_string();
                let format = behind.format.clone();
                let (image, store) = self.image(chain, behind)?;
                let element = Element::new("backingStore")
                    .with_attr("type", "file")
                    .with_child(Element::new("format").with_attr("type", format))
                    .with_child(Element::new("source").with_attr("file", path))
                    .with_child(store);
                (Some(Box::new(image)), element)
            }
            None => (None, Element::new("backingStore")),
        };
        let image = ImageConfig {
            format,
            file,
            name,
            data_file,
            backing,
            passphrase,
        };
        Ok((image, store))
    }

    fn data_file(
        &mut self,
        chain: &mut Chain<'_>,
        image: &Wanted,
        name: &OsStr,
    ) -> Result<Resource> {
        let path = resolve(&image.path, name)?;
        let wanted = Wanted {
            path,
            format: "raw".to_owned(),
            secret: None,
            writable: image.writable,
            backing: None,
            parent: Some(image.path.clone()),
        };
        let file = open(&wanted, chain.direct)?;
        let metadata = file.metadata().map_err(|e| cannot_access(&wanted, &e))?;
        if !chain.seen.insert((metadata.dev(), metadata.ino())) {
            return Err(Error::internal(format!(
                "the data file of '{}' is in use by the same disk",
                image.path.display()
            )));
        }
        let name = wanted.path.display().to_string();
        Ok(self.pass_as(file, &name))
    }
}

/// What a qcow2 image says of itself and of other files.
fn header(file: &File, path: &Path) -> Result<Header> {
    let name = path.display().to_string();
    let cannot = |error: &io::Error| Error::system(format!("cannot look at '{name}'"), error);
    let copy = file.try_clone().map_err(|e| cannot(&e))?;
    images::File::new(copy.into(), &name)
        .and_then(|file| Header::read(&file))
        .map_err(|error| match error {
            images::Error::Unsupported { .. } => Error::unsupported(error.to_string()),
            error => Error::internal(format!("cannot read the header of '{name}': {error}")),
        })
}

/// The next image of a chain: as the definition says, else as the header says.
fn behind(image: &Wanted, header: Option<&Header>) -> Result<Option<Wanted>> {
    match &image.backing {
        Some(BackingImage::End) => Ok(None),
        Some(BackingImage::Image {
            source,
            format,
            secret,
            backing,
        }) => {
            let (DiskSource::File(path) | DiskSource::Block(path)) = source else {
                return Err(Error::unsupported(format!(
                    "the backing store of '{}': only files and block devices",
                    image.path.display()
                )));
            };
            Ok(Some(Wanted {
                path: PathBuf::from(path),
                format: format.clone().unwrap_or_else(|| "raw".to_owned()),
                secret: secret.clone(),
                writable: false,
                backing: backing.as_deref().cloned(),
                parent: Some(image.path.clone()),
            }))
        }
        None => {
            let Some((header, name)) = header.and_then(|h| Some((h, h.backing.as_ref()?))) else {
                return Ok(None);
            };
            let path = resolve(&image.path, name)?;
            let Some(format) = header.backing_format.clone() else {
                return Err(Error::invalid(format!(
                    "format of backing image '{}' of image '{}' was not specified in the image \
                     metadata (See https://libvirt.org/kbase/backing_chains.html for \
                     troubleshooting)",
                    path.display(),
                    image.path.display()
                )));
            };
            Ok(Some(Wanted {
                path,
                format,
                secret: None,
                writable: false,
                backing: None,
                parent: Some(image.path.clone()),
            }))
        }
    }
}

/// A file that an image names: relative names begin at the image's folder.
fn resolve(image: &Path, name: &OsStr) -> Result<PathBuf> {
    let bytes = name.as_bytes();
    let bytes = bytes.strip_prefix(b"file:").unwrap_or(bytes);
    let before_slash = bytes.split(|&b| b == b'/').next().unwrap_or_default();
    if bytes.is_empty() || before_slash.contains(&b':') {
        return Err(Error::unsupported(format!(
            "image '{}' names '{}', and only files can be behind an image",
            image.display(),
            name.to_string_lossy()
        )));
    }
    let path = Path::new(OsStr::from_bytes(bytes));
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    let folder = image.parent().unwrap_or(Path::new("/"));
    // A link leads to where the image really is, as for QEMU.
    let real = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    Ok(real.join(path))
}

fn cannot_access(wanted: &Wanted, error: &io::Error) -> Error {
    let path = wanted.path.display();
    let what = match &wanted.parent {
        Some(parent) => format!(
            "Cannot access backing file '{path}' of storage file '{}'",
            parent.display()
        ),
        None => format!("Cannot access storage file '{path}'"),
    };
    Error::of(
        ErrorDomain::STORAGE,
        ErrorCode::SYSTEM_ERROR,
        format!("{what}: {}", plain(error)),
    )
}

fn open(wanted: &Wanted, direct: bool) -> Result<File> {
    // Without O_NONBLOCK a FIFO would block here; for what is allowed it means nothing.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | if direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(wanted.writable)
        .custom_flags(flags)
        .open(&wanted.path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) if direct => Error::unsupported(format!(
                "'{}': its file system has no direct I/O, which this cache mode needs",
                wanted.path.display()
            )),
            _ => cannot_access(wanted, &error),
        })?;
    let kind = file
        .metadata()
        .map_err(|e| cannot_access(wanted, &e))?
        .file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::unsupported(format!(
            "'{}' is neither a file nor a block device",
            wanted.path.display()
        )));
    }
    Ok(file)
}

/// Opens an image that a running disk only reads so far, for writing.
///
/// # Errors
/// The system's; it is no file or block device.
pub fn open_writable(path: &Path, direct: bool) -> Result<File> {
    let wanted = Wanted {
        path: path.to_owned(),
        format: String::new(),
        secret: None,
        writable: true,
        backing: None,
        parent: None,
    };
    open(&wanted, direct)
}

/// What is behind an image by its header, and that one's format.
///
/// # Errors
/// The header's.
pub fn behind_image(path: &Path, format: &str) -> Result<Option<(PathBuf, String)>> {
    let wanted = Wanted {
        path: path.to_owned(),
        format: format.to_owned(),
        secret: None,
        writable: false,
        backing: None,
        parent: None,
    };
    if format != "qcow2" {
        return Ok(None);
    }
    let header = header(&open(&wanted, false)?, path)?;
    Ok(behind(&wanted, Some(&header))?.map(|behind| (behind.path, behind.format)))
}

/// A file in memory that holds `value` and can be changed by nobody.
fn sealed(value: &[u8]) -> io::Result<OwnedFd> {
    let name = CString::new("secret")?;
    // SAFETY: memfd_create(2) reads the name, which lives here, and returns a descriptor or -1.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(value)?;
    file.seek(SeekFrom::Start(0))?;
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: fcntl(2) with numbers only.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

/// libvirt's `<iotune>` as the VMM has it.
pub fn limits(tune: &IoTune) -> DiskLimits {
    let limit = |name: &str| Limit {
        rate: tune.get(name),
        burst: tune.get(&format!("{name}_max")),
        burst_seconds: tune.get(&format!("{name}_max_length")),
    };
    DiskLimits {
        total_bytes: limit("total_bytes_sec"),
        read_bytes: limit("read_bytes_sec"),
        write_bytes: limit("write_bytes_sec"),
        total_iops: limit("total_iops_sec"),
        read_iops: limit("read_iops_sec"),
        write_iops: limit("write_iops_sec"),
        iops_size: tune.get("size_iops_sec"),
    }
}

/// An image's sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// What the guest sees.
    pub capacity: u64,
    /// What the host has given to the file.
    pub allocation: u64,
    /// How long the file is.
    pub physical: u64,
}

/// The sizes of a disk that nobody uses.
///
/// # Errors
/// It has no image, or it cannot be read.
pub fn image_info(disk: &Disk) -> Result<Sizes> {
    let wanted = to_look_at(disk)?;
    let mut file = open(&wanted, false)?;
    let metadata = file.metadata().map_err(|e| cannot_access(&wanted, &e))?;
    // A block device's length is where it ends.
    let physical = if metadata.is_file() {
        metadata.len()
    } else {
        file.seek(SeekFrom::End(0))
            .map_err(|e| cannot_access(&wanted, &e))?
    };
    let capacity = match disk.format.as_str() {
        "qcow2" => header(&file, &wanted.path)?.size,
        _ => physical,
    };
    Ok(Sizes {
        capacity,
        allocation: if metadata.is_file() {
            metadata.blocks() * 512
        } else {
            physical
        },
        physical,
    })
}

/// A disk's image, to be read only.
fn to_look_at(disk: &Disk) -> Result<Wanted> {
    let Some(path) = disk.source.path() else {
        return Err(Error::new(
            ErrorCode::INVALID_ARG,
            format!(
                "disk '{}' does not currently have a source assigned",
                disk.target
            ),
        ));
    };
    Ok(Wanted {
        path: PathBuf::from(path),
        format: disk.format.clone(),
        secret: None,
        writable: false,
        backing: None,
        parent: None,
    })
}

/// So many bytes of a disk, from there; what is beyond its end is zero.
///
/// # Errors
/// It has a format other than raw; it has no image, or it cannot be read.
pub fn peek(disk: &Disk, offset: u64, size: usize) -> Result<Vec<u8>> {
    if disk.format != "raw" {
        return Err(Error::new(
            ErrorCode::OPERATION_UNSUPPORTED,
            format!(
                "peeking is only supported for disk with 'raw' format not '{}'",
                disk.format
            ),
        ));
    }
    let wanted = to_look_at(disk)?;
    let mut file = open(&wanted, false)?;
    let mut bytes = Vec::with_capacity(size);
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| file.take(size as u64).read_to_end(&mut bytes))
        .map_err(|e| cannot_access(&wanted, &e))?;
    bytes.resize(size, 0);
    Ok(bytes)
}
