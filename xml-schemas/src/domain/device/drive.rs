//! Places of drives at controllers of disks (`<address type='drive'>`), and what libvirt says of such drives.

use super::{Disk, numeric};
use crate::dom::{Element, format_compact};
use crate::error::XmlError;

/// Ports of a SATA controller.
pub const SATA_PORTS: u32 = 6;
/// Units of a SCSI controller that get disks by their names.
const SCSI_UNITS: u32 = 7;
/// The highest target of a SCSI controller, and the highest unit of a target.
const SCSI_MOST: (u32, u32) = (255, 16383);

/// `<address type='drive'>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DriveAddress {
    /// The controller's index.
    pub controller: u32,
    /// Of IDE: its channel.
    pub bus: u32,
    /// Of SCSI.
    pub target: u32,
    /// The place at the bus.
    pub unit: u32,
}

impl std::fmt::Display for DriveAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            controller,
            bus,
            target,
            unit,
        } = self;
        write!(
            f,
            "controller='{controller}' bus='{bus}' target='{target}' unit='{unit}'"
        )
    }
}

impl DriveAddress {
    /// A disk's, where it has one.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for what is no number.
    pub fn of(disk: &Element) -> Result<Option<Self>, XmlError> {
        let Some(address) = disk
            .elements()
            .find(|e| e.name == "address" && e.attr("type") == Some("drive"))
        else {
            return Ok(None);
        };
        let part = |name: &str| Ok::<u32, XmlError>(numeric(address, name)?.unwrap_or(0));
        Ok(Some(Self {
            controller: part("controller")?,
            bus: part("bus")?,
            target: part("target")?,
            unit: part("unit")?,
        }))
    }

    /// Where libvirt puts the disk of that number among those of its bus.
    fn of_number(bus: &str, number: u32) -> Option<Self> {
        let (controller, bus, unit) = match bus {
            "sata" => (number / SATA_PORTS, 0, number % SATA_PORTS),
            "ide" => (number / 4, number % 4 / 2, number % 2),
            "scsi" => (number / SCSI_UNITS, 0, number % SCSI_UNITS),
            _ => return None,
        };
        Some(Self {
            controller,
            bus,
            target: 0,
            unit,
        })
    }

    /// Gives a disk that has none the place that its name stands for; whether it has.
    ///
    /// # Errors
    /// As [`Disk::read`].
    pub(in super::super) fn give_usual(element: &mut Element) -> Result<bool, XmlError> {
        let disk = Disk::read(element)?;
        let place = disk.index().filter(|_| disk.drive.is_none());
        let place = place.and_then(|number| Self::of_number(&disk.bus, number));
        if let Some(place) = place {
            place.give(element);
        }
        Ok(place.is_some())
    }

    fn give(self, disk: &mut Element) {
        disk.take_children("address");
        disk.push(
            Element::new("address")
                .with_attr("type", "drive")
                .with_attr("controller", format_compact!("{}", self.controller))
                .with_attr("bus", format_compact!("{}", self.bus))
                .with_attr("target", format_compact!("{}", self.target))
                .with_attr("unit", format_compact!("{}", self.unit)),
        );
    }

    /// The port of the AHCI controller that stands for the controller of that bus; `None` beyond its last one.
    pub fn port(self, bus: &str) -> Option<u8> {
        let port = match bus {
            "sata" => Some(self.unit).filter(|unit| *unit < SATA_PORTS),
            "ide" if self.bus < 2 && self.unit < 2 => Some(self.bus * 2 + self.unit),
            _ => None,
        };
        port.and_then(|port| u8::try_from(port).ok())
    }

    /// Target and unit at a SCSI controller; `None` where there is none.
    pub fn unit(self) -> Option<(u8, u16)> {
        let (target, unit) = SCSI_MOST;
        let there = self.bus == 0 && self.target <= target && self.unit <= unit;
        let place = (
            u8::try_from(self.target).ok()?,
            u16::try_from(self.unit).ok()?,
        );
        there.then_some(place)
    }
}

/// Whether disks of that bus are at an AHCI controller.
pub fn is_ahci(bus: &str) -> bool {
    matches!(bus, "sata" | "ide")
}

/// Whether disks of that bus are at a controller of disks.
pub fn has_controller(bus: &str) -> bool {
    bus == "scsi" || is_ahci(bus)
}

/// A world wide name: 16 hexadecimal digits.
pub(super) fn wwn(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let plain = digits.len() == 16 && digits.bytes().all(|c| c.is_ascii_hexdigit());
    u64::from_str_radix(digits, 16).ok().filter(|_| plain)
}

/// What a disk says it is, where that is said at a bus that does not tell it.
fn check_identity(element: &Element, bus: &str) -> Result<(), XmlError> {
    if element.child("wwn").is_some() && !matches!(bus, "ide" | "scsi") {
        return Err(XmlError::unsupported("Only ide and scsi disk support wwn"));
    }
    if (element.child("vendor").is_some() || element.child("product").is_some()) && bus != "scsi" {
        return Err(XmlError::unsupported(
            "Only scsi disk supports vendor and product",
        ));
    }
    Ok(())
}

/// Gives a disk of such a bus its place, unless it has one, and holds the disk against libvirt's rules.
pub(super) fn fill(element: &mut Element) -> Result<(), XmlError> {
    let disk = Disk::read(element)?;
    let (bus, dev) = (disk.bus.as_str(), disk.target.as_str());
    let unsupported = |text: String| Err(XmlError::unsupported(text));
    let address = element.child("address").and_then(|e| e.attr("type"));
    let removable = matches!(disk.device.as_str(), "cdrom" | "floppy");
    let target = |name: &str| element.child("target").and_then(|e| e.attr(name));
    if target("tray").is_some() && !removable {
        return unsupported("tray is only valid for cdrom and floppy".to_owned());
    }
    if bus == "virtio" && removable {
        return unsupported(format!(
            "disk type of '{dev}' does not support ejectable media"
        ));
    }
    if bus == "virtio" && address == Some("drive") {
        return unsupported("virtio disk cannot have an address of type 'drive'".to_owned());
    }
    if !has_controller(bus) {
        return Ok(());
    }
    check_identity(element, bus)?;
    if disk.device == "floppy" {
        return Err(XmlError::internal(format!(
            "Invalid bus type '{bus}' for floppy disk"
        )));
    }
    if disk.device == "lun" && !matches!(element.attr("type"), Some("block" | "network" | "volume"))
    {
        return unsupported(
            "disk device='lun' is only valid for block type disk source".to_owned(),
        );
    }
    match (address, disk.index()) {
        (None, Some(_)) => drop(DriveAddress::give_usual(element)?),
        (None, None) => {
            return Err(XmlError::xml(format!(
                "Unknown disk name '{dev}' and no address specified"
            )));
        }
        (Some("drive"), None) => return unsupported(format!("invalid disk target '{dev}'")),
        (Some("drive"), Some(_)) => {
            // What it says nothing of is 0, and stands there.
            if let Some(place) = DriveAddress::of(element)? {
                place.give(element);
            }
        }
        (Some(other), _) => {
            return unsupported(format!(
                "Invalid address type '{other}' for the disk '{dev}' with the bus type '{bus}'"
            ));
        }
    }
    let place = DriveAddress::of(element)?;
    if bus == "scsi" && place.is_some_and(|place| place.bus != 0) {
        return Err(XmlError::internal("SCSI controller only supports 1 bus"));
    }
    if bus != "scsi" && place.is_some_and(|place| place.target != 0) {
        return unsupported(format!("target must be 0 for {bus} controller"));
    }
    if bus == "sata" && place.is_some_and(|place| place.bus != 0) {
        return unsupported("bus must be 0 for sata controller".to_owned());
    }
    if disk.readonly && disk.device == "disk" && bus != "scsi" {
        return unsupported(format!("readonly {bus} disks are not supported"));
    }
    if let Some(model) = element.attr("model") {
        return unsupported(format!(
            "disk model '{model}' not supported for bus '{bus}'"
        ));
    }
    if disk.queues.is_some() {
        return unsupported(
            "queues attribute in disk driver element is only supported by virtio-blk".to_owned(),
        );
    }
    let driver = |name: &str| element.child("driver").and_then(|e| e.attr(name));
    for (name, words) in [
        (
            "ioeventfd",
            "disk ioeventfd mode supported only for virtio bus",
        ),
        (
            "event_idx",
            "disk event_idx mode supported only for virtio bus",
        ),
    ] {
        if driver(name).is_some() {
            return unsupported(words.to_owned());
        }
    }
    for name in ["iommu", "ats", "packed", "page_per_vq"] {
        if driver(name).is_some() {
            return unsupported(format!(
                "{name} driver option is only supported for virtio devices"
            ));
        }
    }
    if disk.readonly && driver("copy_on_read") == Some("on") {
        return unsupported(format!(
            "copy_on_read is not compatible with read-only disk '{dev}'"
        ));
    }
    if disk.readonly && element.child("transient").is_some() {
        return unsupported(format!("transient disk '{dev}' must not be read-only"));
    }
    Ok(())
}

/// Two drives at one place, in libvirt's words.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED naming the first of them.
pub fn check_places(devices: &[Element]) -> Result<(), XmlError> {
    let mut seen: std::collections::HashMap<(String, DriveAddress), usize> = Default::default();
    let mut first: Option<usize> = None;
    for (at, device) in devices.iter().enumerate() {
        if device.name != "disk" {
            continue;
        }
        let (Some(place), Some(bus)) = (
            DriveAddress::of(device)?,
            device.child("target").and_then(|e| e.attr("bus")),
        ) else {
            continue;
        };
        if let Some(own) = seen.get(&(bus.to_owned(), place)) {
            first = Some(first.map_or(*own, |other| other.min(*own)));
        } else {
            seen.insert((bus.to_owned(), place), at);
        }
    }
    let Some(at) = first else { return Ok(()) };
    let (device, target) = (&devices[at], devices[at].child("target"));
    let place = DriveAddress::of(device)?.map(|place| place.to_string());
    Err(XmlError::unsupported(format!(
        "Found duplicate drive address for disk with target name '{}' {}",
        target.and_then(|e| e.attr("dev")).unwrap_or_default(),
        place.unwrap_or_default()
    ))
    .at(device.line))
}
