//! `<disk>`.

use super::{DriveAddress, PciAddress, alias, boot_order, drive, numeric, of, owned};
use crate::dom::Element;
use crate::error::XmlError;
use crate::units::number;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// `disk`, `cdrom`, `floppy`, `lun`.
    pub device: String,
    /// What it holds.
    pub source: DiskSource,
    /// `<target dev=…>`: `vda`.
    pub target: String,
    /// `<target bus=…>`: `virtio`.
    pub bus: String,
    /// `<driver type=…>`: the image's format; `raw` by default.
    pub format: String,
    /// `<driver cache=…>`.
    pub cache: Option<String>,
    /// `<driver io=…>`.
    pub io: Option<String>,
    /// `<driver discard=…>`.
    pub discard: Option<String>,
    /// `<driver detect_zeroes=…>`.
    pub detect_zeroes: Option<String>,
    /// `<driver error_policy=…>`.
    pub error_policy: Option<String>,
    /// `<driver rerror_policy=…>`.
    pub rerror_policy: Option<String>,
    /// `<driver queues=…>`.
    pub queues: Option<u16>,
    /// `<readonly/>`.
    pub readonly: bool,
    /// `<shareable/>`.
    pub shareable: bool,
    /// `<serial>`.
    pub serial: Option<String>,
    /// `<wwn>`.
    pub wwn: Option<u64>,
    /// `<vendor>`.
    pub vendor: Option<String>,
    /// `<product>`.
    pub product: Option<String>,
    /// `<blockio logical_block_size=…>`, bytes.
    pub logical_block_size: Option<u32>,
    /// `<blockio physical_block_size=…>`, bytes.
    pub physical_block_size: Option<u32>,
    /// `<iotune>`.
    pub iotune: IoTune,
    /// `<backingStore>`: `None` where the definition leaves it to the image's own header.
    pub backing: Option<BackingImage>,
    /// `<encryption>`: what opens the image.
    pub secret: Option<SecretUse>,
    /// `<boot order=…>`.
    pub boot_order: Option<u32>,
    /// The device's id.
    pub alias: Option<String>,
    /// Its place.
    pub address: Option<PciAddress>,
    /// Its place at a controller of disks.
    pub drive: Option<DriveAddress>,
    /// `<source startupPolicy=…>`: what becomes of a start where there is no such image.
    pub startup_policy: Option<String>,
    /// `<target tray='open'>`.
    pub tray_open: bool,
}

/// What a disk holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// Nothing: an empty drive.
    None,
    /// An image file.
    File(String),
    /// A block device.
    Block(String),
    /// A volume of a pool; where it is, is known at start.
    Volume {
        /// The pool's name.
        pool: String,
        /// The volume's.
        volume: String,
    },
    /// Any other type; refused at start.
    Other(String),
}

impl DiskSource {
    /// The path, where there is one.
    pub fn path(&self) -> Option<&str> {
        match self {
            Self::File(path) | Self::Block(path) => Some(path),
            _ => None,
        }
    }
}

/// What `<backingStore>` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackingImage {
    /// Nothing is behind.
    End,
    /// This is.
    Image {
        /// Where.
        source: DiskSource,
        /// `<format type=…>`.
        format: Option<String>,
        /// What opens it.
        secret: Option<SecretUse>,
        /// What is behind it in turn; `None`: as its header says.
        backing: Option<Box<BackingImage>>,
    },
}

/// `<secret>` of an `<encryption>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretUse {
    /// `<encryption format=…>`.
    pub format: String,
    /// `uuid`.
    pub uuid: Option<String>,
    /// `usage`.
    pub usage: Option<String>,
}

/// `<iotune>`: a number for each of [`IoTune::NAMES`], 0 where there is no limit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IoTune {
    /// In the order of the names: bytes or requests a second, bursts, bytes a request, seconds.
    pub values: [u64; 19],
    /// `<group_name>`.
    pub group: Option<String>,
}

impl IoTune {
    /// Elements, and libvirt's typed parameters.
    pub const NAMES: [&'static str; 19] = [
        "total_bytes_sec",
        "read_bytes_sec",
        "write_bytes_sec",
        "total_iops_sec",
        "read_iops_sec",
        "write_iops_sec",
        "total_bytes_sec_max",
        "read_bytes_sec_max",
        "write_bytes_sec_max",
        "total_iops_sec_max",
        "read_iops_sec_max",
        "write_iops_sec_max",
        "size_iops_sec",
        "total_bytes_sec_max_length",
        "read_bytes_sec_max_length",
        "write_bytes_sec_max_length",
        "total_iops_sec_max_length",
        "read_iops_sec_max_length",
        "write_iops_sec_max_length",
    ];

    fn read(disk: &Element) -> Result<Self, XmlError> {
        let mut tune = Self::default();
        let Some(element) = disk.child("iotune") else {
            return Ok(tune);
        };
        for (value, name) in tune.values.iter_mut().zip(Self::NAMES) {
            if let Some(text) = element.child_text(name) {
                *value = number(&text).ok_or_else(|| {
                    XmlError::xml(format!("Invalid value '{text}' for element '{name}'"))
                        .at(element.line)
                })?;
            }
        }
        tune.group = element.child_text("group_name");
        tune.check()?;
        Ok(tune)
    }

    /// One value by name; 0 for an unknown one.
    pub fn get(&self, name: &str) -> u64 {
        let at = Self::NAMES.iter().position(|known| *known == name);
        at.map_or(0, |at| self.values[at])
    }

    /// libvirt's rules for what goes together.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR: totals beside limits of one direction.
    pub fn check(&self) -> Result<(), XmlError> {
        for (total, parts, words) in [
            (0, [1, 2], "bytes_sec"),
            (3, [4, 5], "iops_sec"),
            (6, [7, 8], "bytes_sec_max"),
            (9, [10, 11], "iops_sec_max"),
        ] {
            let set = |at: usize| self.values[at] != 0;
            if set(total) && parts.into_iter().any(set) {
                return Err(XmlError::xml(format!(
                    "total and read/write {words} cannot be set at the same time"
                )));
            }
        }
        Ok(())
    }

    /// The same of a call's values, for which libvirt has other words.
    ///
    /// # Errors
    /// Those words.
    pub fn check_call(&self) -> Result<(), String> {
        for (at, kind) in [
            (0, "bytes_sec"),
            (3, "iops_sec"),
            (6, "bytes_sec_max"),
            (9, "iops_sec_max"),
        ] {
            if self.values[at] != 0 && (self.values[at + 1] != 0 || self.values[at + 2] != 0) {
                return Err(format!(
                    "total and read/write of {kind} cannot be set at the same time"
                ));
            }
        }
        Ok(())
    }

    /// Writes it into a disk's element.
    pub fn write(&self, disk: &mut Element) {
        disk.take_children("iotune");
        let mut element = Element::new("iotune");
        for (value, name) in self.values.iter().zip(Self::NAMES) {
            if *value != 0 {
                element.push(Element::with_text(name, value.to_string()));
            }
        }
        if let Some(group) = self.group.as_deref().filter(|_| !element.is_empty()) {
            element.push(Element::with_text("group_name", group));
        }
        if !element.is_empty() {
            disk.push(element);
        }
    }
}

fn source(kind: &str, element: Option<&Element>) -> DiskSource {
    let attr = |name: &str| element.and_then(|e| e.attr(name)).filter(|v| !v.is_empty());
    match (kind, attr("file"), attr("dev")) {
        ("file", Some(path), _) => DiskSource::File(path.to_owned()),
        ("block", _, Some(path)) => DiskSource::Block(path.to_owned()),
        ("file" | "block", ..) => DiskSource::None,
        ("volume", ..) => match (attr("pool"), attr("volume")) {
            (Some(pool), Some(volume)) => DiskSource::Volume {
                pool: pool.to_owned(),
                volume: volume.to_owned(),
            },
            _ => DiskSource::None,
        },
        _ => DiskSource::Other(kind.to_owned()),
    }
}

fn secret(parent: &Element) -> Option<SecretUse> {
    let encryption = parent
        .child("encryption")
        .or_else(|| parent.child("source")?.child("encryption"))?;
    Some(SecretUse {
        format: encryption.attr("format").unwrap_or("default").to_owned(),
        uuid: owned(encryption, "secret", "uuid"),
        usage: owned(encryption, "secret", "usage"),
    })
}

fn backing(parent: &Element) -> Option<BackingImage> {
    let store = parent.child("backingStore")?;
    let Some(kind) = store.attr("type") else {
        return Some(BackingImage::End);
    };
    Some(BackingImage::Image {
        source: source(kind, store.child("source")),
        format: owned(store, "format", "type"),
        secret: secret(store),
        backing: backing(store).map(Box::new),
    })
}

impl Disk {
    /// Whether it is a drive with nothing in it.
    pub fn is_empty_drive(&self) -> bool {
        matches!(self.device.as_str(), "cdrom" | "floppy") && self.source == DiskSource::None
    }

    /// Reads `<disk>`, once defaults are filled.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for values that cannot be.
    pub fn read(element: &Element) -> Result<Self, XmlError> {
        let driver = |name: &str| owned(element, "driver", name);
        let target = of(element, "target", "dev").unwrap_or_default();
        let block_size = |name: &str| {
            element
                .child("blockio")
                .map_or(Ok(None), |e| numeric(e, name))
        };
        Ok(Self {
            device: element.attr("device").unwrap_or("disk").to_owned(),
            source: source(
                element.attr("type").unwrap_or("file"),
                element.child("source"),
            ),
            target: target.to_owned(),
            bus: owned(element, "target", "bus")
                .or_else(|| bus_of(target).map(str::to_owned))
                .unwrap_or_default(),
            format: driver("type").unwrap_or_else(|| "raw".to_owned()),
            cache: driver("cache").filter(|cache| cache != "default"),
            io: driver("io"),
            discard: driver("discard"),
            detect_zeroes: driver("detect_zeroes"),
            error_policy: driver("error_policy"),
            rerror_policy: driver("rerror_policy"),
            queues: element
                .child("driver")
                .map_or(Ok(None), |e| numeric(e, "queues"))?,
            readonly: element.child("readonly").is_some(),
            shareable: element.child("shareable").is_some(),
            serial: element.child_text("serial").filter(|s| !s.is_empty()),
            wwn: element.child_text("wwn").as_deref().and_then(drive::wwn),
            vendor: element.child_text("vendor"),
            product: element.child_text("product"),
            logical_block_size: block_size("logical_block_size")?,
            physical_block_size: block_size("physical_block_size")?,
            iotune: IoTune::read(element)?,
            backing: backing(element),
            secret: secret(element),
            boot_order: boot_order(element)?,
            alias: alias(element).map(str::to_owned),
            address: PciAddress::of(element)?,
            drive: DriveAddress::of(element)?,
            startup_policy: owned(element, "source", "startupPolicy"),
            tray_open: of(element, "target", "tray") == Some("open"),
        })
    }

    /// Fills what libvirt fills at define.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR without a target, or with a name that says no bus;
    /// VIR_ERR_CONFIG_UNSUPPORTED for media that a bus cannot change.
    pub(in super::super) fn fill(element: &mut Element) -> Result<(), XmlError> {
        let line = element.line;
        if element.attr("type").is_none() {
            element.set_attr("type", "file");
        }
        if element.attr("device").is_none() {
            element.set_attr("device", "disk");
        }
        let path = ["file", "dev", "name", "pool"]
            .iter()
            .find_map(|name| of(element, "source", name))
            .unwrap_or_default()
            .to_owned();
        let Some(dev) = owned(element, "target", "dev").filter(|dev| !dev.is_empty()) else {
            // VIR_ERR_NO_TARGET has words of its own.
            return Err(XmlError::verbatim(
                crate::ErrorCode::NoTarget,
                crate::ErrorDomain::Domain,
                format!("missing target information for device {path}"),
            )
            .at(line));
        };
        let floppy = element.attr("device") == Some("floppy");
        let local = matches!(element.attr("type"), Some("file" | "block"));
        if local && path.is_empty() && matches!(element.attr("device"), Some("disk" | "lun")) {
            return Err(XmlError::verbatim(
                crate::ErrorCode::NoSource,
                crate::ErrorDomain::Domain,
                format!("missing source information for device {dev}"),
            )
            .at(line));
        }
        let bus = match of(element, "target", "bus") {
            Some(bus) => bus.to_owned(),
            None => bus_of(&dev)
                .or(floppy.then_some("fdc"))
                .ok_or_else(|| {
                    XmlError::xml(format!(
                        "Unknown disk name '{dev}' and no address specified"
                    ))
                    .at(line)
                })?
                .to_owned(),
        };
        for target in element.elements_mut().filter(|e| e.name == "target") {
            target.set_attr("bus", &bus);
        }
        if element.attr("type") != Some("vhostuser") {
            if element.child("driver").is_none() {
                element.push(Element::new("driver"));
            }
            for driver in element.elements_mut().filter(|e| e.name == "driver") {
                match driver.attr("name") {
                    None => driver.set_attr("name", "qemu"),
                    Some("qemu") => {}
                    Some(other) => {
                        return Err(XmlError::unsupported(format!(
                            "unsupported driver name '{other}' for disk '{dev}'"
                        ))
                        .at(line));
                    }
                }
                if driver.attr("type").is_none() {
                    driver.set_attr("type", "raw");
                }
            }
        }
        // An empty drive says nothing of what kind its medium is, unless there is more to say of it.
        let removable = matches!(element.attr("device"), Some("cdrom" | "floppy"));
        if removable && path.is_empty() {
            for source in element.elements_mut().filter(|e| e.name == "source") {
                source.attributes.retain(|(_, value)| !value.is_empty());
            }
        }
        if removable && path.is_empty() && element.child("source").is_none_or(Element::is_empty) {
            element.set_attr("type", "file");
            element.take_children("source");
        }
        drive::fill(element).map_err(|e| e.at(line))
    }

    /// The same of a document of one device.
    ///
    /// # Errors
    /// As for a disk of a definition.
    pub fn complete(element: &mut Element) -> Result<(), XmlError> {
        Self::fill(element)
    }

    /// Whether it is at a controller that is an AHCI one in the machine.
    pub fn is_ahci(&self) -> bool {
        drive::is_ahci(&self.bus)
    }

    /// Whether it is at a controller of disks.
    pub fn has_controller(&self) -> bool {
        drive::has_controller(&self.bus)
    }

    /// A CD-ROM drive that is one in the machine.
    pub fn is_cdrom(&self) -> bool {
        self.device == "cdrom" && self.has_controller()
    }

    /// Where the name puts it among its kind: `vda` is 0, `vdaa` 26.
    pub fn index(&self) -> Option<u32> {
        index(&self.target)
    }
}

/// The bus that a name stands for.
fn bus_of(target: &str) -> Option<&'static str> {
    let prefix = target.get(..2)?;
    index(target)?;
    Some(match prefix {
        "hd" => "ide",
        "sd" => "scsi",
        "vd" => "virtio",
        "fd" => "fdc",
        "xv" => "xen",
        "ub" => "usb",
        _ => return None,
    })
}

fn index(target: &str) -> Option<u32> {
    let letters = target.strip_prefix("xvd").or_else(|| {
        let known = matches!(target.get(..2)?, "hd" | "sd" | "vd" | "fd" | "ub");
        known.then(|| &target[2..])
    })?;
    if letters.is_empty() {
        return None;
    }
    let mut value: u32 = 0;
    for letter in letters.bytes() {
        if !letter.is_ascii_lowercase() {
            return None;
        }
        value = value
            .checked_mul(26)?
            .checked_add(u32::from(letter - b'a') + 1)?;
    }
    value.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_where_a_disk_is() {
        assert_eq!(index("vda"), Some(0));
        assert_eq!(index("vdz"), Some(25));
        assert_eq!(index("sdaa"), Some(26));
        assert_eq!(index("xvdb"), Some(1));
        assert_eq!(index("vd"), None);
        assert_eq!(index("vdA"), None);
        assert_eq!(index("vdzzzzzzzzzzzzz"), None);
        assert_eq!(index("é"), None);
        assert_eq!(bus_of("hdc"), Some("ide"));
        assert_eq!(bus_of("foo"), None);
    }
}
