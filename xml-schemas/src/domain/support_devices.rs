//! Which devices the machine has, of those that a definition can name.

use super::assign;
use super::device::{
    Balloon, Disk, DiskSource, DriveAddress, Interface, PciAddress, Rng, Watchdog, is_ahci,
};
use super::support::{Unsupported, named};
use super::{CharDevice, CharSource, Domain, TcpProtocol};
use crate::dom::Element;

/// What becomes of a device at start.
pub(super) enum Fate {
    /// The machine has it, or nobody could tell.
    Fine,
    /// A guest with a text console does without.
    LeftOut(Unsupported),
    /// The domain cannot run without it.
    Refused(Unsupported),
}

/// What is missing of a device that there is in principle.
type Fault = Option<String>;

pub(super) fn fate(device: &Element) -> Fate {
    let child = |name: &str, attribute: &str| {
        device
            .child(name)
            .and_then(|e| e.attr(attribute))
            .map(|value| format!("{} '{value}'", device.name))
    };
    let kind = || named(device, "type").name;
    let model = || named(device, "model").name;
    let judge = |name: String, fault: Fault| match fault {
        None => Fate::Fine,
        Some(reason) => Fate::Refused(Unsupported { name, reason }),
    };
    let refused = |name: String| Fate::Refused(Unsupported::new(name));
    match device.name.as_str() {
        "graphics" | "input" | "audio" | "hub" => Fate::LeftOut(named(device, "type")),
        "sound" => Fate::LeftOut(named(device, "model")),
        "redirdev" | "redirfilter" => Fate::LeftOut(named(device, "bus")),
        "video" => match child("model", "type") {
            Some(what) if what.ends_with("'none'") => Fate::Fine,
            Some(what) => Fate::LeftOut(Unsupported::new(what)),
            None => Fate::LeftOut(Unsupported::new("video")),
        },
        "controller" => controller(device),
        // The agents of displays: nothing without one.
        "channel"
            if matches!(
                device.attr("type"),
                Some("spicevmc" | "qemu-vdagent" | "dbus")
            ) =>
        {
            Fate::LeftOut(named(device, "type"))
        }
        "channel" => judge(
            child("target", "name").unwrap_or_else(kind),
            channel_fault(device),
        ),
        "disk" => {
            let name = child("target", "dev").unwrap_or_else(|| device.name.to_string());
            match Disk::read(device) {
                // With something in it the guest may need it.
                Ok(disk) if disk.is_empty_drive() && !disk.is_cdrom() => {
                    Fate::LeftOut(Unsupported {
                        name,
                        reason: format!("an empty {} drive", disk.device),
                    })
                }
                _ => judge(name, disk_fault(device)),
            }
        }
        "interface" => judge(
            child("mac", "address").unwrap_or_else(kind),
            interface_fault(device),
        ),
        "memballoon" => match Balloon::read(device) {
            Ok(None) => Fate::Fine,
            Ok(Some(_)) => judge(model(), virtio_fault(device)),
            Err(error) => judge(model(), Some(error.to_string())),
        },
        "rng" => judge(model(), rng_fault(device)),
        "vsock" => judge(model(), virtio_fault(device)),
        // libvirt gives every q35 machine that one, asked for or not.
        "watchdog" if device.attr("model") == Some("itco") => Fate::LeftOut(named(device, "model")),
        "watchdog" => judge(model(), watchdog_fault(device)),
        "panic" if matches!(device.attr("model"), None | Some("isa")) => Fate::Fine,
        "filesystem" => refused(child("target", "dir").unwrap_or_else(|| device.name.to_string())),
        "hostdev" | "parallel" => refused(kind()),
        "tpm" => refused("tpm".to_owned()),
        "shmem" => refused(named(device, "name").name),
        "smartcard" => refused(named(device, "mode").name),
        _ => refused(model()),
    }
}

fn controller(device: &Element) -> Fate {
    let model = device.attr("model").unwrap_or_default();
    match device.attr("type").unwrap_or_default() {
        "pci" if model.ends_with("expander-bus") => Fate::Refused(named(device, "model")),
        // Bridges with nothing behind them: what is behind one is named itself.
        "pci" => Fate::Fine,
        "usb" if model == "none" => Fate::Fine,
        // There where a drive is at it; nobody could do anything with it otherwise.
        "sata" | "ide" => Fate::Fine,
        kind @ ("virtio-serial" | "scsi") => {
            let scsi = kind == "scsi";
            let unknown = scsi && !assign::is_virtio_scsi(device);
            match driver_fault(device).or_else(|| scsi_fault(device).filter(|_| scsi)) {
                // As below.
                _ if unknown => Fate::LeftOut(named(device, "type")),
                None => Fate::Fine,
                Some(reason) => Fate::Refused(Unsupported {
                    name: format!("controller '{kind}'"),
                    reason,
                }),
            }
        }
        // A controller does nothing on its own, and every disk is named itself.
        _ => Fate::LeftOut(named(device, "type")),
    }
}

/// Names an attribute's value, unless it is one of those that are there.
fn unless(device: &Element, attribute: &str, there: &[&str]) -> Fault {
    let value = device.attr(attribute)?;
    (!there.contains(&value)).then(|| format!("{attribute} '{value}'"))
}

/// Names the first of these children.
fn first_child(device: &Element, names: &[&str]) -> Fault {
    device
        .elements()
        .find(|e| names.contains(&e.name.as_str()))
        .map(|e| e.name.to_string())
}

/// Most queues of one device.
const MOST_QUEUES: u32 = 16;

const VIRTIO: &[&str] = &["virtio", "virtio-non-transitional"];

/// Of any virtio device: its model, and ways of virtio that are not there.
fn virtio_fault(device: &Element) -> Fault {
    unless(device, "model", VIRTIO).or_else(|| driver_fault(device))
}

fn driver_fault(device: &Element) -> Fault {
    let driver = device.child("driver")?;
    ["iommu", "ats", "packed", "page_per_vq"]
        .into_iter()
        .find(|name| driver.attr(name) == Some("on"))
        .map(|name| format!("driver {name}='on'"))
}

fn scsi_fault(controller: &Element) -> Fault {
    let model = controller.attr("model");
    if model == Some("virtio-transitional") {
        return Some("model 'virtio-transitional'".to_owned());
    }
    let queues = controller.child("driver").and_then(|e| e.attr("queues"));
    let queues = queues.and_then(crate::units::number::<u32>);
    queues
        .filter(|queues| *queues > MOST_QUEUES)
        .map(|_| format!("more than {MOST_QUEUES} queues"))
}

fn disk_fault(element: &Element) -> Fault {
    let disk = match Disk::read(element) {
        Ok(disk) => disk,
        Err(error) => return Some(error.to_string()),
    };
    if disk.bus != "virtio" && !disk.has_controller() {
        return Some(format!("bus '{}': use virtio, scsi or sata", disk.bus));
    }
    if !matches!(disk.device.as_str(), "disk" | "cdrom") {
        return Some(format!("device '{}'", disk.device));
    }
    let is_place = |place: &DriveAddress| match disk.bus.as_str() {
        "scsi" => place.unit().is_some(),
        bus => place.port(bus).is_some(),
    };
    if let Some(place) = disk.drive.filter(|place| !is_place(place)) {
        return Some(format!(
            "no such place at a {} controller: {place}",
            disk.bus
        ));
    }
    match &disk.source {
        DiskSource::File(_) | DiskSource::Block(_) | DiskSource::Volume { .. } => {}
        DiskSource::None if disk.is_cdrom() => {}
        DiskSource::None => return Some("it has no source".to_owned()),
        DiskSource::Other(kind) => return Some(format!("type '{kind}'")),
    }
    if !matches!(disk.format.as_str(), "raw" | "qcow2" | "luks") {
        return Some(format!("format '{}'", disk.format));
    }
    if disk.secret.as_ref().is_some_and(|s| s.format != "luks") {
        return Some("encryption other than luks".to_owned());
    }
    if disk.queues.is_some_and(|n| u32::from(n) > MOST_QUEUES) {
        return Some(format!("more than {MOST_QUEUES} queues"));
    }
    if disk.serial.as_deref().is_some_and(|s| !s.is_ascii()) {
        return Some("a serial number that is not ASCII".to_owned());
    }
    for size in [disk.logical_block_size, disk.physical_block_size] {
        if !matches!(size, None | Some(512 | 4096)) {
            return Some("block sizes other than 512 and 4096".to_owned());
        }
    }
    let driver = element.child("driver");
    unless(element, "model", VIRTIO)
        .or_else(|| unless(element, "rawio", &["no"]))
        .or_else(|| unless(element, "sgio", &["filtered"]))
        .or_else(|| unless(driver?, "copy_on_read", &["off"]))
        .or_else(|| driver_fault(element))
        .or_else(|| first_child(element, &["auth", "mirror", "transient", "geometry"]))
        .or_else(|| {
            let scsi = disk.bus == "scsi";
            first_child(element, &["wwn", "vendor", "product"]).filter(|_| !scsi)
        })
        .or_else(|| {
            first_child(
                element.child("source")?,
                &["slices", "reservations", "auth"],
            )
        })
}

fn interface_fault(element: &Element) -> Fault {
    let card = match Interface::read(element) {
        Ok(card) => card,
        Err(error) => return Some(error.to_string()),
    };
    match card.kind.as_str() {
        "bridge" | "ethernet" | "direct" | "network" => {}
        "user" if matches!(card.backend.as_deref(), None | Some("passt" | "default")) => {}
        "user" => return Some("backend other than passt".to_owned()),
        kind => return Some(format!("type '{kind}'")),
    }
    if !VIRTIO.contains(&card.model.as_str()) {
        return Some(format!("model '{}': use virtio", card.model));
    }
    if card.script.is_some() {
        return Some("script".to_owned());
    }
    if card.queues.is_some_and(|n| n > 8) {
        return Some("more than 8 queues".to_owned());
    }
    if card.kind == "user" && card.queues.is_some_and(|n| n > 1) {
        return Some("several queues of type 'user'".to_owned());
    }
    if card.kind == "direct"
        && !matches!(
            card.mode.as_deref(),
            Some("vepa" | "bridge" | "private" | "passthrough")
        )
    {
        return Some(format!("mode '{}'", card.mode.unwrap_or_default()));
    }
    if card
        .filter
        .as_deref()
        .is_some_and(|f| f != "no-mac-spoofing")
    {
        return Some("filterref other than no-mac-spoofing".to_owned());
    }
    if element.child("port").is_some() && !matches!(card.kind.as_str(), "bridge" | "network") {
        return Some("port".to_owned());
    }
    if card.inbound.is_some_and(|rate| rate.floor != 0) {
        return Some("bandwidth floor".to_owned());
    }
    if element.child("vlan").is_some() && !matches!(card.kind.as_str(), "bridge" | "network") {
        return Some(format!("vlan of type '{}'", card.kind));
    }
    driver_fault(element).or_else(|| {
        first_child(
            element,
            &["virtualport", "coalesce", "teaming", "guest", "route"],
        )
    })
}

fn channel_fault(element: &Element) -> Fault {
    let target = element.child("target").and_then(|t| t.attr("type"));
    if target != Some("virtio") {
        return Some(format!("target '{}'", target.unwrap_or_default()));
    }
    match super::device::Channel::read(element) {
        Ok(channel) => source_fault(&channel.device),
        Err(error) => Some(error.to_string()),
    }
}

/// What is missing of a character device's host end.
pub(super) fn source_fault(device: &CharDevice) -> Fault {
    match &device.source {
        CharSource::Other { kind, .. } => Some(format!("type '{kind}'")),
        CharSource::Tcp {
            tls: Some(true), ..
        }
        | CharSource::Tcp {
            protocol: TcpProtocol::Tls | TcpProtocol::Telnets,
            ..
        } => Some("TLS".to_owned()),
        _ => None,
    }
}

fn rng_fault(element: &Element) -> Fault {
    match Rng::read(element) {
        Ok(rng) if matches!(rng.backend.as_str(), "random" | "builtin") => virtio_fault(element),
        Ok(rng) => Some(format!("backend '{}'", rng.backend)),
        Err(error) => Some(error.to_string()),
    }
}

fn watchdog_fault(element: &Element) -> Fault {
    match Watchdog::read(element) {
        Ok(watchdog) if watchdog.model != "i6300esb" => {
            Some("the one there is, is i6300esb".into())
        }
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    }
}

/// Devices behind bridges that the machine does not have.
pub(super) fn places(domain: &Domain, found: &mut Vec<Unsupported>) {
    let all = domain.devices.rest.iter();
    let fine = all.filter(|device| matches!(fate(device), Fate::Fine));
    let fine = fine.filter(|device| !is_without_drives(domain, device));
    let fine = fine.filter(|device| !is_lost_drive(domain, device));
    found.extend(fine.filter_map(|device| place(domain, device)));
}

/// A controller of disks that the machine does without.
pub fn is_without_drives(domain: &Domain, controller: &Element) -> bool {
    let kind = controller.attr("type").unwrap_or_default();
    if controller.name != "controller" || !is_ahci(kind) {
        return false;
    }
    let index = controller.attr("index").and_then(crate::units::number);
    let disks = domain.devices.rest.iter().filter(|e| e.name == "disk");
    let drives = disks.filter_map(|e| Disk::read(e).ok());
    let mut here = drives.filter(|disk| disk.bus == kind);
    !here.any(|disk| disk.drive.map(|place| place.controller) == index)
}

/// The model of the SCSI controller that a disk is at, where the machine does not have it.
fn strange_controller<'a>(domain: &'a Domain, disk: &Element) -> Option<&'a str> {
    let disk = Some(disk).filter(|e| e.name == "disk")?;
    let disk = Disk::read(disk).ok().filter(|disk| disk.bus == "scsi")?;
    let index = disk.drive?.controller;
    let mut all = domain.devices.rest.iter();
    let own = all.find(|e| {
        e.name == "controller"
            && e.attr("type") == Some("scsi")
            && e.attr("index").and_then(crate::units::number) == Some(index)
    })?;
    let model = own.attr("model").unwrap_or_default();
    (!assign::is_virtio_scsi(own)).then_some(model)
}

/// A drive with nothing in it at a controller that the machine does not have.
pub fn is_lost_drive(domain: &Domain, device: &Element) -> bool {
    strange_controller(domain, device).is_some()
        && Disk::read(device).is_ok_and(|disk| disk.is_empty_drive())
}

/// What is wrong with a device's place.
pub(super) fn place(domain: &Domain, device: &Element) -> Option<Unsupported> {
    let is_there = |bus: u8| {
        bus == 0
            || domain.devices.rest.iter().any(|e| {
                e.name == "controller"
                    && e.attr("type") == Some("pci")
                    && e.attr("model") == Some("pcie-root-port")
                    && e.attr("index").and_then(crate::units::number) == Some(bus)
                    && PciAddress::of(e).ok().flatten().is_none_or(|a| a.bus == 0)
            })
    };
    if device.name == "controller" && device.attr("type") == Some("pci") {
        return None;
    }
    let kind = device.child("address").and_then(|e| e.attr("type"));
    let reason = if let Some(model) = strange_controller(domain, device) {
        format!("it is at a SCSI controller of model '{model}': use virtio-scsi")
    } else {
        match (PciAddress::of(device), kind) {
            (Ok(Some(address)), _) if !is_there(address.bus) => {
                format!("it is behind a bridge, at {address}: give it another address or none")
            }
            (_, Some("ccw" | "virtio-mmio" | "spapr-vio")) => "its address is not PCI".to_owned(),
            _ => return None,
        }
    };
    let name = match device.name.as_str() {
        "disk" => device.child("target").and_then(|t| t.attr("dev")),
        "interface" => device.child("mac").and_then(|t| t.attr("address")),
        _ => device.attr("model").or(device.attr("type")),
    };
    Some(Unsupported {
        name: format!("{} '{}'", device.name, name.unwrap_or_default()),
        reason,
    })
}
