//! Controllers of SATA, IDE and SCSI drives.

use std::collections::BTreeSet;

use super::{index_of, is_controller};
use crate::dom::Element;
use crate::domain::Devices;
use crate::domain::device::{DriveAddress, PciAddress, check_places, numeric};
use crate::error::XmlError;

/// Where a board has its own SATA controller (Q35), and its IDE controller (i440FX).
const SATA: PciAddress = PciAddress {
    bus: 0,
    slot: 0x1f,
    function: 2,
};
const IDE: PciAddress = PciAddress {
    bus: 0,
    slot: 1,
    function: 1,
};

/// The SCSI controller that there is.
const VIRTIO_SCSI: &str = "virtio-scsi";

/// The board's own controller of disks: it is where it is.
fn own(device: &Element, i440fx: bool) -> Option<(&'static str, PciAddress)> {
    let first = index_of(device) == Some(0);
    if i440fx && first && is_controller(device, "ide") {
        return Some(("IDE", IDE));
    }
    (!i440fx && first && is_controller(device, "sata")).then_some(("SATA", SATA))
}

/// A SCSI controller that the machine has.
pub fn is_virtio_scsi(device: &Element) -> bool {
    is_controller(device, "scsi")
        && matches!(
            device.attr("model"),
            Some("virtio-scsi" | "virtio-non-transitional" | "virtio-transitional")
        )
}

/// What libvirt says of single SCSI controllers. libvirt's own choice of a model would be lsilogic, which there is
/// not: whoever states none gets the one that there is.
fn scsi(controller: &mut Element) -> Result<(), XmlError> {
    if !matches!(controller.attr("model"), Some(model) if model != "auto") {
        controller.set_attr("model", VIRTIO_SCSI);
    }
    let known = is_virtio_scsi(controller);
    let line = controller.line;
    for driver in controller.elements_mut().filter(|e| e.name == "driver") {
        // Zero says nothing.
        for name in ["queues", "cmd_per_lun", "max_sectors", "iothread"] {
            if numeric::<u32>(driver, name)? == Some(0) {
                driver.take_attr(name);
            }
        }
        if known {
            continue;
        }
        if driver.attr("iothread").is_some() {
            return Err(XmlError::xml(
                "'iothread' attribute only supported for virtio scsi controllers",
            )
            .at(line));
        }
        let names = ["queues", "cmd_per_lun", "max_sectors", "ioeventfd"];
        if let Some(name) = names.into_iter().find(|name| driver.attr(name).is_some()) {
            return Err(XmlError::unsupported(format!(
                "'{name}' is only supported by virtio-scsi controller"
            ))
            .at(line));
        }
    }
    if controller.child("driver").is_some_and(Element::is_empty) {
        controller.take_children("driver");
    }
    Ok(())
}

/// A controller of disks that is a card: it goes where conventional devices go.
pub(super) fn is_card(device: &Element, i440fx: bool) -> bool {
    let kind = is_controller(device, "sata") || is_controller(device, "ide");
    kind && own(device, i440fx).is_none()
}

/// Makes sure that every drive has a controller, and a place of its own there.
pub(super) fn controllers(
    devices: &mut Devices,
    i440fx: bool,
    has_ide: bool,
) -> Result<(), XmlError> {
    let mut wanted: BTreeSet<(&str, u32)> = BTreeSet::new();
    for disk in devices.rest.iter().filter(|e| e.name == "disk") {
        let bus = match disk.child("target").and_then(|e| e.attr("bus")) {
            Some("sata") => "sata",
            Some("ide") => "ide",
            Some("scsi") => "scsi",
            _ => continue,
        };
        if let Some(place) = DriveAddress::of(disk)? {
            wanted.insert((bus, place.controller));
        }
    }
    let listed = devices.rest.iter().filter_map(index_of_ide);
    let ide: BTreeSet<u32> = listed.chain(of(&wanted, "ide")).collect();
    if !ide.is_empty() && !has_ide {
        return Err(XmlError::unsupported(
            "IDE controllers are unsupported for this QEMU binary or machine type",
        ));
    }
    if ide.iter().any(|index| *index != 0) {
        return Err(XmlError::internal("Only 1 IDE controller is supported"));
    }
    for bus in ["sata", "ide", "scsi"] {
        let Some(last) = of(&wanted, bus).max() else {
            continue;
        };
        if last > 255 {
            return Err(XmlError::unsupported(format!(
                "{bus} controller {last} is beyond 255"
            )));
        }
        for index in 0..=last {
            let there = |e: &Element| is_controller(e, bus) && index_of(e) == Some(index);
            if !devices.rest.iter().any(there) {
                devices.rest.push(
                    Element::new("controller")
                        .with_attr("type", bus)
                        .with_attr("index", index.to_string()),
                );
            }
        }
    }
    for controller in devices.rest.iter_mut().filter(|e| is_controller(e, "scsi")) {
        scsi(controller)?;
    }
    for device in &mut devices.rest {
        let Some((name, place)) = own(device, i440fx) else {
            continue;
        };
        match PciAddress::of(device)? {
            None => place.give(device),
            Some(stated) if stated != place => {
                let (slot, function) = (place.slot, place.function);
                return Err(XmlError::internal(format!(
                    "Primary {name} controller must have PCI address 0:0:{slot:x}.{function}"
                ))
                .at(device.line));
            }
            Some(_) => {}
        }
    }
    check_places(&devices.rest)
}

fn of(wanted: &BTreeSet<(&str, u32)>, bus: &str) -> impl Iterator<Item = u32> {
    wanted
        .iter()
        .filter(move |(own, _)| *own == bus)
        .map(|(_, index)| *index)
}

fn index_of_ide(device: &Element) -> Option<u32> {
    is_controller(device, "ide").then(|| index_of(device).unwrap_or(0))
}
