//! `blockcopy`: a running disk's content goes to another image, and the disk may go on with that one.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use images::luks::{self, FilePart, Passphrase, Spec};
use images::qcow2::{self, Create, Encrypt};
use vmm_api::control::{BlockCopy, BlockJob};
use xml_schemas::dom::{self, Element};
use xml_schemas::domain::device::{BackingImage, Disk, DiskSource, SecretUse};

use super::chain::{self, Link};
use super::{Known, Order, busy, disk_of, images_of, speed};
use crate::drivers::domain::machine::{self, CopyImage};
use crate::drivers::domain::object::Pinned;
use crate::drivers::domain::{Driver, blocking, image_numbers};
use crate::drivers::storage::probe;
use crate::error::{Error, ErrorCode, ErrorDomain, Result, check_flags};
use crate::files;

/// virDomainBlockCopyFlags
mod copy_flags {
    pub const SHALLOW: u32 = 1;
    pub const REUSE_EXT: u32 = 2;
    pub const TRANSIENT_JOB: u32 = 4;
    pub const SYNCHRONOUS_WRITES: u32 = 8;
    pub const ALL: u32 = 15;
}

/// What a bit of the copy's log may stand for, bytes, as QEMU has it.
const GRANULARITY: std::ops::RangeInclusive<u64> = 512..=64 << 20;
/// The formats that libvirt knows.
const FORMATS: [&str; 17] = [
    "none", "raw", "dir", "bochs", "cloop", "dmg", "iso", "vpc", "vdi", "fat", "vhd", "ploop",
    "cow", "qcow", "qcow2", "qed", "vmdk",
];
/// How long trying a passphrase takes, as qemu-img has it.
const PASSPHRASE_TIME: Duration = Duration::from_secs(2);

/// What a copy keeps to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Bytes a second; 0: none.
    pub bandwidth: u64,
    /// What a bit of its log stands for, bytes; 0: as usual.
    pub granularity: u64,
    /// What may be on its way at once, bytes; 0: as usual.
    pub buffer: u64,
}

/// Where a disk is copied to.
#[derive(Debug)]
struct Destination {
    /// `file` or `block`
    kind: &'static str,
    path: PathBuf,
    format: Option<String>,
    secret: Option<SecretUse>,
    /// What is said to be behind it.
    backing: Option<BackingImage>,
    /// `<encryption>`
    encryption: Option<Element>,
}

fn argument(words: impl Into<String>) -> Error {
    Error::new(ErrorCode::INVALID_ARG, words)
}

impl Destination {
    fn new(kind: &'static str, path: &str, format: Option<&str>) -> Self {
        Self {
            kind,
            path: PathBuf::from(path),
            format: format.map(str::to_owned),
            secret: None,
            backing: None,
            encryption: None,
        }
    }

    /// A `<disk>` of which source, format and what is behind it count.
    fn read(xml: &str) -> Result<Self> {
        let mut element = dom::parse(xml, "(disk_definition)")?;
        if element.name != "disk" {
            let words = format!("expecting root element of 'disk', not '{}'", element.name);
            return Err(Error::new(ErrorCode::XML_ERROR, words));
        }
        if element.attr("type").is_none() {
            element.set_attr("type", "file");
        }
        let driver = element.child("driver");
        let format = driver.and_then(|driver| driver.attr("type"));
        let format = format.map(str::to_owned);
        if let Some(unknown) = format.as_deref().filter(|f| !FORMATS.contains(f)) {
            return Err(Error::unsupported(format!(
                "unknown driver format value '{unknown}'"
            )));
        }
        let disk = Disk::read(&element)?;
        let encryption = element
            .child("source")
            .and_then(|source| source.child("encryption"))
            .or_else(|| element.child("encryption"));
        let (kind, path) = match &disk.source {
            DiskSource::File(path) => ("file", path),
            DiskSource::Block(path) => ("block", path),
            DiskSource::None => {
                // It has no name to say.
                return Err(Error {
                    code: ErrorCode::NO_SOURCE,
                    domain: ErrorDomain::DOMAIN,
                    message: "missing source information for device".to_owned(),
                });
            }
            DiskSource::Volume { pool, volume } => {
                return Err(Error::internal(format!(
                    "storage source pool '{pool}' volume '{volume}' is not translated"
                )));
            }
            DiskSource::Other(kind) => {
                return Err(Error::unsupported(format!(
                    "copying a disk to a source of type '{kind}'"
                )));
            }
        };
        Ok(Self {
            encryption: encryption.cloned(),
            secret: disk.secret.clone(),
            backing: disk.backing.clone(),
            ..Self::new(kind, path, format.as_deref())
        })
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Whether it has to be made, or is only written to; and that what is there fits what was asked for.
    fn look(&self, target: &str, reuse: bool) -> Result<Found> {
        let name = self.name();
        let metadata = match std::fs::metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if reuse || self.kind == "block" {
                    let what = format!("missing destination file for disk {target}: {name}");
                    return Err(Error::system(what, &error));
                }
                return Ok(Found::Nothing);
            }
            Err(error) => {
                let what = format!("unable to stat for disk {target}: {name}");
                // A part of its path is no folder, say.
                return match reuse {
                    true => Err(Error::system(what, &error)),
                    false => Err(Error::system("failed to create copy target", &error)),
                };
            }
        };
        if metadata.file_type().is_block_device() {
            return Ok(Found::Device);
        }
        if metadata.is_file() && metadata.len() > 0 && !reuse {
            return Err(Error::unsupported(format!(
                "external destination file for disk {target} already exists and is not a block \
                 device: {name}"
            )));
        }
        if self.kind == "block" {
            return Err(argument(format!(
                "blockdev flag requested for disk {target}, but file '{name}' is not a block device"
            )));
        }
        Ok(Found::File)
    }

    /// Says what it is, where nobody did: as the disk's own image, or what is there looks like.
    fn settle_format(&mut self, disk: &Known, reuse: bool) -> Result<()> {
        if self.format.is_some() {
            return Ok(());
        }
        let own = disk.links.first().map_or("raw", |link| &link.format);
        let mut format = own.to_owned();
        if reuse {
            let cannot = |e: &io::Error| Error::system(format!("cannot read '{}'", self.name()), e);
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(&self.path)
                .map_err(|e| cannot(&e))?;
            let found = probe::probe(&file, &self.path).map_err(|e| cannot(&e))?;
            format = found.format.to_owned();
        }
        // An encrypted one is raw to libvirt.
        self.format = Some(match format.as_str() {
            "luks" => "raw".to_owned(),
            _ => format,
        });
        Ok(())
    }

    /// Makes the image (on the disk), of so many bytes.
    fn make(
        &self,
        found: Found,
        size: u64,
        behind: Option<&Link>,
        passphrase: Option<&Passphrase>,
    ) -> Result<()> {
        let cannot = |e: &io::Error| Error::system("failed to create copy target", e);
        let failed = |e: images::Error| match e {
            images::Error::Io { source, .. } => cannot(&source),
            other => Error::failed(format!("failed to create copy target: {other}")),
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(found == Found::Nothing)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&self.path)
            .map_err(|e| cannot(&e))?;
        let image = |file: &File| {
            let own = file.try_clone().map_err(|e| cannot(&e))?;
            images::File::new(own.into(), self.name()).map_err(failed)
        };
        match (self.format.as_deref(), passphrase) {
            (Some("qcow2"), _) => {
                let mut options = Create::new(size);
                options.backing =
                    behind.map(|link| (OsString::from(&link.path), link.format.clone()));
                options.encryption = passphrase.map(|passphrase| Encrypt {
                    spec: Spec::default(),
                    passphrase: passphrase.clone(),
                    time: PASSPHRASE_TIME,
                });
                qcow2::create(image(&file)?, None, &options).map_err(failed)?;
            }
            (_, Some(passphrase)) => {
                let spec = Spec::default();
                let header = luks::header_len(&spec).map_err(failed)?;
                let len = header.saturating_add(size);
                file.set_len(len).map_err(|e| cannot(&e))?;
                let image = image(&file)?;
                let part = FilePart {
                    file: &image,
                    start: 0,
                    len,
                };
                luks::Volume::create(&part, spec, passphrase.as_bytes(), PASSPHRASE_TIME)
                    .map_err(failed)?;
            }
            _ => file.set_len(size).map_err(|e| cannot(&e))?,
        }
        file.sync_all().map_err(|e| cannot(&e))?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        files::sync_folder(folder).map_err(|e| cannot(&e))
    }

    /// libvirt's `<mirror>`.
    fn mirror(&self, index: u32, full: bool) -> Element {
        let format = self.format.as_deref().unwrap_or("raw");
        let (name, mut mirror) = (self.name(), Element::new("mirror"));
        mirror.set_attr("type", self.kind);
        let attribute = match self.kind {
            "block" => "dev",
            _ => {
                mirror.set_attr("file", name.as_str());
                mirror.set_attr("format", format);
                "file"
            }
        };
        mirror.set_attr("job", "copy");
        let mut source = Element::new("source").with_attr(attribute, name);
        source.set_attr("index", index.to_string());
        if let Some(encryption) = &self.encryption {
            source.push(encryption.clone());
        }
        mirror.push(Element::new("format").with_attr("type", format));
        mirror.push(source);
        if full {
            mirror.push(Element::new("backingStore"));
        }
        mirror
    }
}

/// What is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    File,
    Device,
}

/// A copy's image, made and opened.
struct Opened {
    destination: Destination,
    image: CopyImage,
    zeroed: bool,
    /// A file that was not there before.
    made: bool,
}

impl Opened {
    fn undo(&self) {
        if self.made
            && let Err(error) = files::remove_if_there(&self.destination.path)
        {
            log::warn!("cannot remove '{}': {error}", self.destination.name());
        }
    }
}

/// Everything that a copy's image is made and opened by.
struct Wish {
    destination: Destination,
    disk: Known,
    size: u64,
    reuse: bool,
    shallow: bool,
}

impl Wish {
    fn carry_out(self, around: crate::drivers::domain::devices::Surroundings) -> Result<Opened> {
        let (mut destination, disk) = (self.destination, self.disk);
        let found = destination.look(&disk.target, self.reuse)?;
        destination.settle_format(&disk, self.reuse)?;
        let format = destination.format.clone().unwrap_or_default();
        if self.shallow && format == "raw" {
            return Err(Error::unsupported(format!(
                "shallow copy of disk '{}' into a raw file is not possible",
                disk.target
            )));
        }
        if !matches!(format.as_str(), "raw" | "qcow2") {
            return Err(Error::unsupported(format!(
                "disk '{}': format '{format}' of '{}'",
                disk.target,
                destination.name()
            )));
        }
        let passphrase = match &destination.secret {
            Some(secret) => Some(around.secrets.value_of(secret)?),
            None => None,
        };
        let passphrase = passphrase.map(Passphrase::from);
        let make = match found {
            _ if self.reuse => false,
            Found::Device if format == "raw" && passphrase.is_none() => false,
            Found::Device => {
                return Err(Error::unsupported(format!(
                    "'{}' is a block device: a {} image on it must be there already",
                    destination.name(),
                    if format == "raw" { "luks" } else { &format }
                )));
            }
            Found::Nothing | Found::File => true,
        };
        let behind = disk.links.get(1).filter(|_| self.shallow);
        let made = make && found == Found::Nothing;
        let opened = match make {
            true => destination.make(found, self.size, behind, passphrase.as_ref()),
            false => Ok(()),
        };
        let backing = match self.shallow {
            true => destination.backing.clone(),
            false => Some(BackingImage::End),
        };
        let opened = opened.and_then(|()| {
            let wanted = machine::CopyWish {
                target: disk.target.clone(),
                path: destination.path.clone(),
                format: format.clone(),
                secret: destination.secret.clone(),
                backing,
                direct: disk.direct,
            };
            machine::build_copy(wanted, around)
        });
        let zeroed = make && !self.shallow && (format == "qcow2" || passphrase.is_none());
        match opened {
            Ok(image) => Ok(Opened {
                destination,
                image,
                zeroed,
                made,
            }),
            Err(error) => {
                if made && let Err(error) = files::remove_if_there(&destination.path) {
                    log::warn!("cannot remove '{}': {error}", destination.name());
                }
                Err(error)
            }
        }
    }
}

impl Driver {
    /// Copies a disk to where a `<disk>` says.
    ///
    /// # Errors
    /// The document's; it is not possible; the VMM's refusal.
    pub async fn block_copy(
        self: &Arc<Self>,
        domain: Pinned,
        path: &str,
        xml: &str,
        limits: Limits,
        flags: u32,
    ) -> Result<()> {
        check_flags(flags, copy_flags::ALL, "qemuDomainBlockCopy")?;
        if limits.granularity != 0 && !limits.granularity.is_power_of_two() {
            return Err(argument("granularity must be power of 2"));
        }
        if limits.bandwidth > i64::MAX as u64 {
            return Err(argument(format!(
                "bandwidth must be less than '{}' bytes/s ({} MiB/s)",
                i64::MAX,
                i64::MAX >> 20
            )));
        }
        let destination = Destination::read(xml)?;
        self.copy_to(domain, path, destination, limits, flags).await
    }

    /// The same by the older call, for a file or a device: `rebase` are its flags.
    ///
    /// # Errors
    /// As [`Driver::block_copy`].
    pub(super) async fn block_rebase_copy(
        self: &Arc<Self>,
        domain: Pinned,
        path: &str,
        dest: Option<&str>,
        bandwidth: u64,
        rebase: u32,
    ) -> Result<()> {
        use super::rebase_flags::{BANDWIDTH_BYTES, COPY_DEV, COPY_RAW, RELATIVE};
        let Some(dest) = dest else {
            return Err(argument("base in virDomainBlockRebase must not be NULL"));
        };
        if rebase & RELATIVE != 0 {
            return Err(Error::new(
                ErrorCode::ARGUMENT_UNSUPPORTED,
                "Relative backing during copy not supported yet",
            ));
        }
        if !dest.starts_with('/') {
            return Err(argument("absolute path must be used as block copy target"));
        }
        let kind = match rebase & COPY_DEV {
            0 => "file",
            _ => "block",
        };
        let format = (rebase & COPY_RAW != 0).then_some("raw");
        let limits = Limits {
            bandwidth: speed(bandwidth, rebase & BANDWIDTH_BYTES != 0)?,
            ..Limits::default()
        };
        let flags = rebase & (copy_flags::SHALLOW | copy_flags::REUSE_EXT);
        let destination = Destination::new(kind, dest, format);
        self.copy_to(domain, path, destination, limits, flags).await
    }

    async fn copy_to(
        self: &Arc<Self>,
        domain: Pinned,
        path: &str,
        destination: Destination,
        limits: Limits,
        flags: u32,
    ) -> Result<()> {
        use copy_flags::{REUSE_EXT, SHALLOW, SYNCHRONOUS_WRITES, TRANSIENT_JOB};
        let _job = domain.job().await?;
        let disk = disk_of(&domain, path)?;
        if let Some(job) = images_of(&domain, &disk.id).await?.job {
            return Err(busy(&disk.target, job.kind));
        }
        if !destination.path.is_absolute() {
            return Err(argument("absolute path must be used as block copy target"));
        }
        if flags & TRANSIENT_JOB == 0 && domain.lock().persistent.is_some() {
            return Err(Error::invalid("domain is not transient"));
        }
        if limits.granularity != 0 && !GRANULARITY.contains(&limits.granularity) {
            return Err(Error::internal(
                "Parameter 'granularity' expects a value in range [512B, 64MB]",
            ));
        }
        if limits.buffer > i64::MAX as u64 {
            return Err(Error::internal("Invalid parameter 'buf-size'"));
        }
        let shallow = flags & SHALLOW != 0 && disk.links.len() > 1;
        if destination.backing.is_some() && !shallow {
            return Err(argument(
                "backingStore of mirror without VIR_DOMAIN_BLOCK_COPY_SHALLOW doesn't make sense",
            ));
        }
        let stats = self.device_stats(&domain).await?;
        let stats = stats.disks.into_iter().find(|(id, _)| *id == disk.id);
        let size = stats.map(|(_, stats)| stats.capacity);
        let wish = Wish {
            destination,
            disk: disk.clone(),
            size: size.ok_or_else(|| Error::internal("the disk is gone"))?,
            reuse: flags & REUSE_EXT != 0,
            shallow,
        };
        let around = self.surroundings(&domain)?;
        let mut opened = blocking(move || wish.carry_out(around)).await??;
        let index = self.next_image(&domain)?;
        let copy = BlockCopy {
            image: opened.image.config.clone(),
            shallow,
            zeroed: opened.zeroed,
            synchronous: flags & SYNCHRONOUS_WRITES != 0,
            granularity: limits.granularity,
            buffer: limits.buffer,
        };
        let order = Order {
            job: BlockJob::Copy(Box::new(copy)),
            speed: limits.bandwidth,
            opened: std::mem::take(&mut opened.image.descriptors),
            names: std::mem::take(&mut opened.image.names),
            mirror: Some(opened.destination.mirror(index, !shallow)),
            ..Order::default()
        };
        self.begin_block_job(&domain, &disk, order)
            .await
            .map_err(|failure| {
                // What may be in use by a machine that does not answer stays.
                if !failure.begun {
                    opened.undo();
                }
                failure.error
            })
    }

    /// The number of one more image.
    fn next_image(&self, domain: &Pinned) -> Result<u32> {
        let mut inner = domain.lock();
        let live = inner.live_mut()?;
        let index = image_numbers::next(&live.definition, live.next_image);
        live.next_image = index.saturating_add(1);
        self.write_record(&inner);
        Ok(index)
    }
}

/// The disk is its mirror from now on. Its own chain is as headers say if that has no end here.
pub fn become_mirror(disk: &mut Element, mirror: &Element) {
    let kind = mirror.attr("type").unwrap_or("file").to_owned();
    disk.set_attr("type", kind);
    let format = mirror
        .child("format")
        .and_then(|format| format.attr("type"));
    let format = format.unwrap_or("raw").to_owned();
    let source = mirror.child("source").cloned();
    disk.take_children("backingStore");
    disk.take_children("encryption");
    let rest = disk.take_elements();
    if !rest.iter().any(|child| child.name == "driver") {
        let driver = Element::new("driver").with_attr("name", "qemu");
        disk.push(driver.with_attr("type", format.as_str()));
    }
    for mut child in rest {
        match child.name.as_str() {
            "driver" => child.set_attr("type", format.as_str()),
            "source" => {
                disk.push(source.clone().unwrap_or(child));
                if let Some(end) = mirror.child("backingStore") {
                    disk.push(end.clone());
                }
                continue;
            }
            _ => {}
        }
        disk.push(child);
    }
}

/// Puts a disk's mirror where libvirt has it: after what is behind the disk's image.
pub fn put_mirror(disk: &mut Element, mirror: Element) {
    disk.take_children("mirror");
    let rest = disk.take_elements();
    let after = |name: &str| rest.iter().rposition(|child| child.name == name);
    let at = after("backingStore").or_else(|| after("source"));
    let at = at.map_or(rest.len(), |at| at + 1);
    let mut mirror = Some(mirror);
    for (index, child) in rest.into_iter().enumerate() {
        if index == at
            && let Some(mirror) = mirror.take()
        {
            disk.push(mirror);
        }
        disk.push(child);
    }
    if let Some(mirror) = mirror {
        disk.push(mirror);
    }
}

/// What libvirt calls the job of a disk's mirror.
pub fn job_name(target: &str, links: &[Link]) -> String {
    let index = links.first().and_then(|link| link.index).unwrap_or(0);
    format!("copy-{target}-libvirt-{index}-format")
}

/// The disk's mirror, if it has one that a copy is made to.
pub fn mirror_of<'a>(definition: &'a xml_schemas::Domain, target: &str) -> Option<&'a Element> {
    let mut disks = definition.devices.rest.iter();
    let disk = disks.find(|element| chain::is_disk(element, target))?;
    let mirror = disk.child("mirror")?;
    (mirror.attr("job") == Some("copy")).then_some(mirror)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ELEMENT: &str = "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
        <source file='/a' index='2'/><backingStore type='file' index='3'><format type='raw'/>\
        <source file='/b'/><backingStore/></backingStore><target dev='vda' bus='virtio'/></disk>";

    fn text(element: &Element) -> String {
        let mut out = String::new();
        dom::format_element(&mut out, element, 0);
        out.lines().map(str::trim).collect()
    }

    #[test]
    fn a_mirror_becomes_the_disk() {
        let mut disk = dom::parse(ELEMENT, "(disk)").unwrap();
        let to = Destination::new("block", "/dev/x", Some("raw"));
        put_mirror(&mut disk, to.mirror(4, true));
        let mirror = disk.child("mirror").unwrap().clone();
        assert_eq!(
            text(&mirror),
            "<mirror type='block' job='copy'><format type='raw'/><source dev='/dev/x' index='4'/>\
             <backingStore/></mirror>"
        );
        let order: Vec<&str> = disk.elements().map(|child| child.name.as_str()).collect();
        let there = ["driver", "source", "backingStore", "mirror", "target"];
        assert_eq!(order, there);
        disk.take_children("mirror");
        become_mirror(&mut disk, &mirror);
        assert_eq!(
            text(&disk),
            "<disk type='block' device='disk'><driver name='qemu' type='raw'/>\
             <source dev='/dev/x' index='4'/><backingStore/><target dev='vda' bus='virtio'/></disk>"
        );
    }

    #[test]
    fn documents_are_refused_in_libvirts_words() {
        let read = |xml: &str| Destination::read(xml).map_err(|error| error.message);
        assert_eq!(
            read("<domain/>").unwrap_err(),
            "XML error: expecting root element of 'disk', not 'domain'"
        );
        assert_eq!(
            read("<disk><source file='/a'/><driver type='foo'/></disk>").unwrap_err(),
            "unsupported configuration: unknown driver format value 'foo'"
        );
        let missing = read("<disk type='file'/>").unwrap_err();
        assert_eq!(missing, "missing source information for device");
        let found = read("<disk><source file='/a'/></disk>").unwrap();
        assert_eq!((found.kind, found.format), ("file", None));
        let volume = "<disk type='volume'><source pool='a' volume='b'/></disk>";
        assert!(read(volume).unwrap_err().contains("is not translated"));
    }
}
