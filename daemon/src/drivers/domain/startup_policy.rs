//! Disks whose images need not be there (`<source startupPolicy=…>`).

use std::collections::{HashMap, HashSet};

use xml_schemas::Domain as Definition;
use xml_schemas::dom::Element;
use xml_schemas::domain::device::{self, Disk, DiskSource};

use crate::drivers::storage;
use crate::events::DomainEvent;

/// Takes out of a definition that is about to run what may be missing, and is: media of drives, and whole disks. `cold`:
/// the machine boots; one that goes on can do without more. What is told of it.
pub fn apply(live: &mut Definition, storage: &storage::Driver, cold: bool) -> Vec<DomainEvent> {
    let mut told = Vec::new();
    // As they would be called if all of them were there.
    let aliases: HashMap<String, String> = {
        let mut named = live.clone();
        // What cannot be placed is refused later.
        let _ = named.place_drives();
        named.devices.assign_aliases();
        let disks = named.devices.rest.iter().filter(|e| e.name == "disk");
        let name = |e: &Element| Some((target(e)?.to_owned(), device::alias(e)?.to_owned()));
        disks.filter_map(name).collect()
    };
    let mut gone = HashSet::new();
    // From the last to the first, as libvirt goes through them.
    for at in (0..live.devices.rest.len()).rev() {
        let element = &live.devices.rest[at];
        let Some(path) = missing(element, storage, cold) else {
            continue;
        };
        let alias = target(element).and_then(|target| aliases.get(target));
        let alias = alias.cloned().unwrap_or_default();
        let drive = matches!(element.attr("device"), Some("cdrom" | "floppy"));
        if drive {
            let element = &mut live.devices.rest[at];
            for part in ["source", "backingStore", "encryption"] {
                element.take_children(part);
            }
            element.set_attr("type", "file");
        } else {
            gone.insert(at);
        }
        told.push(DomainEvent::DiskChange {
            path,
            alias,
            // virConnectDomainEventDiskChangeReason
            reason: i32::from(!drive),
        });
    }
    let mut at = 0..;
    live.devices
        .rest
        .retain(|_| at.next().is_none_or(|at| !gone.contains(&at)));
    told
}

fn target(disk: &Element) -> Option<&str> {
    disk.child("target")?.attr("dev")
}

/// Whether there is anything to look for.
pub fn is_stated(definition: &Definition) -> bool {
    let mut disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
    disks.any(|disk| {
        let source = disk.child("source");
        source.is_some_and(|source| source.attr("startupPolicy").is_some())
    })
}

/// The path of an image that is not there and need not be.
fn missing(element: &Element, storage: &storage::Driver, cold: bool) -> Option<String> {
    let disk = Some(element).filter(|e| e.name == "disk")?;
    let disk = Disk::read(disk).ok()?;
    match disk.startup_policy.as_deref()? {
        "optional" => {}
        "requisite" if !cold => {}
        _ => return None,
    }
    let path = match disk.source {
        DiskSource::File(path) | DiskSource::Block(path) => path,
        DiskSource::Volume { pool, volume } => match storage.disk_path(&pool, &volume) {
            Ok(path) => path,
            Err(_) => return Some(format!("{pool}/{volume}")),
        },
        DiskSource::None | DiskSource::Other(_) => return None,
    };
    (!std::path::Path::new(&path).exists()).then_some(path)
}
