//! What boots a domain that names no kernel: SeaBIOS, and what it is told.

use std::path::Path;

use vmm_api::config::FirmwareConfig;
use xml_schemas::Domain;
use xml_schemas::dom::Element;
use xml_schemas::domain::BootDevice;
use xml_schemas::domain::device::{self, Disk, Interface};

use super::machine::Builder;
use crate::error::{Error, Result};

/// Where distributions have it: the seabios package of Debian and Fedora, QEMU's own copy.
const PLACES: [&str; 3] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/share/seabios/bios.bin",
];
/// How long the menu waits where the definition does not say, in milliseconds: SeaBIOS's own time.
const MENU_WAIT: u32 = 2500;

/// This host's SeaBIOS.
#[must_use]
pub fn bios() -> Option<&'static str> {
    PLACES.into_iter().find(|path| Path::new(path).is_file())
}

impl Builder {
    /// The BIOS of a domain without a kernel.
    pub(super) fn firmware(&mut self, live: &Domain) -> Result<FirmwareConfig> {
        let os = &live.os;
        let named = os.other("loader").map(Element::text).unwrap_or_default();
        let named = Some(named.trim()).filter(|path| !path.is_empty());
        let path = named.or(bios()).ok_or_else(|| {
            Error::unsupported(format!(
                "boot from disk needs firmware, and there is no SeaBIOS here ({}): install it, or \
                 give <kernel> in <os>",
                PLACES[0]
            ))
        })?;
        let bios = os.other("bios");
        let menu = os
            .other("bootmenu")
            .filter(|menu| menu.attr("enable") == Some("yes"))
            .map(|menu| {
                menu.attr("timeout")
                    .and_then(|wait| wait.parse().ok())
                    .unwrap_or(MENU_WAIT)
            });
        Ok(FirmwareConfig {
            rom: self.input("firmware", path)?,
            // There is no screen: without it nobody would see what it, or a boot loader, says.
            serial_console: bios.and_then(|bios| bios.attr("useserial")) != Some("no"),
            boot_menu_ms: menu,
            boot_order: boot_order(live)?,
            // -1 is what libvirt's users write for "never".
            retry_ms: bios
                .and_then(|bios| bios.attr("rebootTimeout"))
                .and_then(|wait| wait.parse().ok()),
        })
    }
}

/// Ids of the devices to boot from: by the order that they state themselves, or the first one of
/// each kind that `<os>` names.
fn boot_order(live: &Domain) -> Result<Vec<String>> {
    let mut stated = Vec::new();
    let mut kinds = Vec::new();
    for element in &live.devices.rest {
        let (order, kind) = match element.name.as_str() {
            "disk" => {
                let disk = Disk::read(element)?;
                if disk.is_empty_drive() && !disk.is_cdrom() || live.is_lost_drive(element) {
                    continue;
                }
                let kind = match disk.device.as_str() {
                    "cdrom" => BootDevice::Cdrom,
                    _ => BootDevice::Hd,
                };
                (disk.boot_order, kind)
            }
            "interface" => (Interface::read(element)?.boot_order, BootDevice::Network),
            _ => continue,
        };
        let Some(id) = device::alias(element) else {
            continue;
        };
        stated.extend(order.map(|order| (order, id)));
        kinds.push((kind, id));
    }
    stated.sort_by_key(|(order, _)| *order);
    let ids: Vec<&str> = if stated.is_empty() {
        let first = |wanted: &BootDevice| {
            let found = kinds.iter().find(|(kind, _)| kind == wanted);
            found.map(|(_, id)| *id)
        };
        live.os.boot.iter().filter_map(first).collect()
    } else {
        stated.into_iter().map(|(_, id)| id).collect()
    };
    Ok(ids.into_iter().map(str::to_owned).collect())
}
