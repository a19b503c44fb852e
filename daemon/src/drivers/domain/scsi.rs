//! SCSI controllers and their disks in machines that run.

use std::collections::BTreeSet;
use std::sync::Arc;

use xml_schemas::dom::Element;
use xml_schemas::domain::View;
use xml_schemas::domain::device::{self, Disk, PciAddress};
use xml_schemas::{Domain as Definition, XmlError};

use super::Driver;
use super::object::Pinned;
use super::plug::{named, with_device};
use crate::error::{Error, ErrorCode, Result};

/// Whether a device is a SCSI controller.
pub(super) fn is_controller(device: &Element) -> bool {
    device.name == "controller" && device.attr("type") == Some("scsi")
}

/// The SCSI controller that a disk is at.
fn controller_of(disk: &Element) -> Option<u32> {
    let disk = Some(disk).filter(|e| e.name == "disk")?;
    let disk = Disk::read(disk).ok().filter(|disk| disk.bus == "scsi")?;
    Some(disk.drive?.controller)
}

fn index(controller: &Element) -> Option<u32> {
    controller.attr("index")?.parse().ok()
}

/// Whether a device is a disk at a SCSI controller, which needs no slot.
pub(super) fn is_disk(device: &Element) -> bool {
    controller_of(device).is_some()
}

/// Ids of the disks at the controller with an id.
pub(super) fn disks_of(definition: &Definition, controller: &str) -> Vec<String> {
    let mut all = definition.devices.rest.iter();
    let own = all.find(|e| is_controller(e) && device::alias(e) == Some(controller));
    let Some(own) = own.and_then(index) else {
        return Vec::new();
    };
    let disks = definition.devices.rest.iter();
    let disks = disks.filter(|e| controller_of(e) == Some(own));
    disks.filter_map(device::alias).map(str::to_owned).collect()
}

/// Refuses what does not come while the machine runs, in libvirt's words.
///
/// # Errors
/// VIR_ERR_OPERATION_UNSUPPORTED, VIR_ERR_CONFIG_UNSUPPORTED.
pub(super) fn check_plug(controller: &Element) -> Result<()> {
    if !is_controller(controller) {
        let kind = controller.attr("type").unwrap_or_default();
        let text = format!("'{kind}' controller cannot be hot plugged.");
        return Err(Error::new(ErrorCode::OPERATION_UNSUPPORTED, text));
    }
    match controller.attr("model") {
        None | Some("auto" | "virtio-scsi" | "virtio-non-transitional") => Ok(()),
        Some(model) => Err(Error::unsupported(format!(
            "Vireo does not have what this domain asks for: SCSI controller model '{model}': use virtio-scsi"
        ))),
    }
}

/// Refuses what does not go while the machine runs, in libvirt's words.
///
/// # Errors
/// VIR_ERR_OPERATION_UNSUPPORTED, and VIR_ERR_OPERATION_FAILED where it has disks.
pub(super) fn check_unplug(definition: &Definition, controller: &Element) -> Result<()> {
    if !is_controller(controller) {
        let kind = controller.attr("type").unwrap_or_default();
        let text = format!("'{kind}' controller cannot be hot unplugged.");
        return Err(Error::new(ErrorCode::OPERATION_UNSUPPORTED, text));
    }
    let own = index(controller);
    let mut devices = definition.devices.rest.iter();
    if devices.any(|e| own.is_some() && controller_of(e) == own) {
        return Err(Error::failed("device cannot be detached: device is busy"));
    }
    Ok(())
}

/// Takes out of the definition of a guest that goes on what an earlier version left out of its machine: SCSI controllers,
/// which had no addresses then, and empty drives.
pub(super) fn as_it_was(definition: &mut Definition) {
    definition.devices.rest.retain(|e| match e.name.as_str() {
        "controller" if xml_schemas::domain::is_virtio_scsi(e) => e.child("address").is_some(),
        "disk" => Disk::read(e).map_or(true, |disk| {
            disk.bus != "scsi" || !disk.is_empty_drive() || disk.drive.is_some()
        }),
        _ => true,
    });
}

/// The same definition with the disk at a controller that is there, and with an id. Where it is.
///
/// # Errors
/// There is no such controller.
pub(super) fn placed(before: &Definition, mut after: Definition) -> Result<(Definition, usize)> {
    let known: Vec<&str> = {
        let all = before.devices.rest.iter();
        let all = all.filter(|e| e.name == "controller");
        all.filter_map(device::alias).collect()
    };
    // Those that would come with it, and slots for them.
    after.devices.rest.retain(|e| {
        e.name != "controller" || device::alias(e).is_some_and(|own| known.contains(&own))
    });
    after.devices.arrange();
    let at = named(before, &mut after, "disk")?;
    let wanted = controller_of(&after.devices.rest[at]);
    let mut all = after.devices.rest.iter().filter(|e| is_controller(e));
    let own = all.find(|e| index(e) == wanted);
    if own.is_none_or(|own| PciAddress::of(own).ok().flatten().is_none()) {
        return Err(Error::failed(
            "the machine does not have the disk's SCSI controller",
        ));
    }
    Ok((after, at))
}

/// The controllers that come with a disk, as libvirt has them: of the model of those that are there.
fn missing(before: &Definition, after: &Definition) -> Vec<Element> {
    let there = before.devices.rest.iter().filter(|e| is_controller(e));
    let model = there.clone().filter_map(|e| e.attr("model")).next_back();
    let known: BTreeSet<u32> = there.filter_map(index).collect();
    let new = after.devices.rest.iter().filter(|e| is_controller(e));
    let mut new: Vec<u32> = new
        .filter_map(index)
        .filter(|index| !known.contains(index))
        .collect();
    new.sort_unstable();
    let element = |index: u32| {
        Element::new("controller")
            .with_attr("type", "scsi")
            .with_attr("index", index.to_string())
            .with_attr("model", model.unwrap_or("virtio-scsi"))
    };
    new.into_iter().map(element).collect()
}

impl Driver {
    /// Plugs the controllers that a new disk needs and that are not there. As of libvirt's, nothing is told of them, and
    /// they stay whatever becomes of the disk. The definition with them.
    ///
    /// # Errors
    /// The document's; no slot is free.
    pub(super) async fn plug_controllers(
        self: &Arc<Self>,
        domain: &Pinned,
        definition: Arc<Definition>,
        disk: &Element,
    ) -> Result<Arc<Definition>> {
        let mut definition = definition;
        let after = with_device(self, &definition, View::Live, disk)?;
        for controller in missing(&definition, &after) {
            check_plug(&controller)?;
            self.plug_one(domain, &definition, &controller, false)
                .await?;
            definition = Arc::clone(&domain.lock().live()?.definition);
        }
        Ok(definition)
    }
}

/// A controller that comes by name only: its index, where it says one.
pub(super) fn stated_index(controller: &Element) -> Option<i64> {
    controller.attr("index")?.trim().parse().ok()
}

/// The disk of a document, filled.
///
/// # Errors
/// The document's.
pub(super) fn complete(disk: &Element) -> Result<Disk> {
    let mut disk = disk.clone();
    Disk::complete(&mut disk).map_err(XmlError::nowhere)?;
    Ok(Disk::read(&disk)?)
}
