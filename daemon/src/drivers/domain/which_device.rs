//! Which device of a definition a client's document means.

use xml_schemas::Domain as Definition;
use xml_schemas::dom::{self, Element};
use xml_schemas::domain::device::{self, Disk, PciAddress};

use super::scsi;
use crate::error::{Error, ErrorCode, Result};

/// What people call one device of a document.
pub const DOCUMENT: &str = "(device_definition)";

/// virDomainDeviceType
const DEVICES: [&str; 29] = [
    "disk",
    "lease",
    "filesystem",
    "interface",
    "input",
    "sound",
    "video",
    "hostdev",
    "watchdog",
    "controller",
    "graphics",
    "hub",
    "redirdev",
    "smartcard",
    "serial",
    "parallel",
    "channel",
    "console",
    "memballoon",
    "nvram",
    "rng",
    "shmem",
    "tpm",
    "panic",
    "memory",
    "iommu",
    "vsock",
    "audio",
    "crypto",
];

/// A client's document of one device.
///
/// # Errors
/// VIR_ERR_XML_ERROR for what is none.
pub fn parse(xml: &str) -> Result<Element> {
    let mut document = dom::parse(xml, DOCUMENT)?;
    if !DEVICES.contains(&document.name.as_str()) {
        let text = format!("unknown device type '{}'", document.name);
        return Err(Error::unsupported(text));
    }
    if document.name == "disk" {
        // A drive with nothing in it, as `attach-disk` writes it.
        for source in document.elements_mut().filter(|e| e.name == "source") {
            source.attributes.retain(|(_, value)| !value.is_empty());
        }
    }
    Ok(document)
}

/// There is no such device.
fn missing(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::DEVICE_MISSING, text)
}

/// Whether `have` says everything that `wanted` says.
pub fn says(have: &Element, wanted: &Element) -> bool {
    let attributes = wanted.attributes.iter();
    let text = wanted.text();
    have.name == wanted.name
        && attributes
            .clone()
            .all(|(name, value)| have.attr(name) == Some(value))
        && (text.trim().is_empty() || have.text().trim() == text.trim())
        && wanted
            .elements()
            .all(|child| have.elements().any(|own| says(own, child)))
}

/// A disk's target.
pub fn target(disk: &Element) -> Option<&str> {
    disk.child("target")?.attr("dev")
}

/// A card's hardware address, in small letters.
pub fn mac(card: &Element) -> Option<String> {
    Some(card.child("mac")?.attr("address")?.to_ascii_lowercase())
}

/// The device of a definition that a document means.
///
/// # Errors
/// VIR_ERR_DEVICE_MISSING where there is none, VIR_ERR_OPERATION_FAILED where there are several.
pub fn find(definition: &Definition, wanted: &Element) -> Result<usize> {
    let all = &definition.devices.rest;
    let of_kind = || (0..all.len()).filter(|at| all[*at].name == wanted.name);
    if wanted.name == "disk" {
        let dev = target(wanted)
            .ok_or_else(|| Error::new(ErrorCode::XML_ERROR, "missing target information"))?;
        return of_kind()
            .find(|at| target(&all[*at]) == Some(dev))
            .ok_or_else(|| missing(format!("disk {dev} not found")));
    }
    if let Some(alias) = device::alias(wanted)
        && let Some(at) = of_kind().find(|at| device::alias(&all[*at]) == Some(alias))
    {
        return Ok(at);
    }
    if wanted.name == "controller" {
        let index = scsi::stated_index(wanted);
        let same = |e: &Element| {
            e.attr("type") == wanted.attr("type")
                && index.is_some()
                && scsi::stated_index(e) == index
        };
        let kind = wanted.attr("type").unwrap_or_default();
        return of_kind().find(|at| same(&all[*at])).ok_or_else(|| {
            missing(format!(
                "controller {kind}:{} not found",
                index.unwrap_or(-1)
            ))
        });
    }
    let address = PciAddress::of(wanted)?;
    if wanted.name == "interface" {
        let wanted_mac = mac(wanted);
        let matches = |at: &usize| {
            let own = &all[*at];
            wanted_mac
                .as_ref()
                .is_none_or(|mac_| mac(own).as_ref() == Some(mac_))
                && address.is_none_or(|a| PciAddress::of(own).ok().flatten() == Some(a))
        };
        let found: Vec<usize> = of_kind().filter(matches).collect();
        return match (found.as_slice(), wanted_mac) {
            ([at], _) => Ok(*at),
            ([], wanted_mac) => {
                // libvirt's words for what the document does not say.
                let or_null = |text: Option<String>| text.unwrap_or("(<null>)".to_owned());
                Err(missing(format!(
                    "no device found at address '{}' matching MAC address '{}' and alias '{}'",
                    or_null(address.map(|address| address.to_string())),
                    or_null(wanted_mac),
                    or_null(device::alias(wanted).map(str::to_owned)),
                )))
            }
            (_, Some(mac)) => Err(Error::failed(format!(
                "multiple devices matching MAC address {mac} found"
            ))),
            _ => Err(Error::failed(
                "multiple matching network devices were found",
            )),
        };
    }
    let mut plain = wanted.clone();
    plain.take_children("alias");
    let found = of_kind().find(|at| match address {
        Some(address) => PciAddress::of(&all[*at]).ok().flatten() == Some(address),
        None => says(&all[*at], &plain),
    });
    found.ok_or_else(|| match wanted.name.as_str() {
        kind @ ("channel" | "serial" | "parallel") => missing(format!(
            "chr type '{kind}' device not present in domain configuration"
        )),
        kind => missing(format!("matching {kind} device not found")),
    })
}

/// The device with an alias.
///
/// # Errors
/// VIR_ERR_INTERNAL_ERROR where there is none.
pub fn find_alias(definition: &Definition, alias: &str) -> Result<usize> {
    let mut all = definition.devices.rest.iter();
    all.position(|e| device::alias(e) == Some(alias))
        .ok_or_else(|| Error::internal(format!("no device found with alias {alias}")))
}

/// Refuses what would be there twice.
///
/// # Errors
/// VIR_ERR_OPERATION_INVALID and its like.
pub fn check_new(definition: &Definition, new: &Element, running: bool) -> Result<()> {
    let mut all = definition
        .devices
        .rest
        .iter()
        .filter(|e| e.name == new.name);
    match new.name.as_str() {
        "disk" => {
            let dev = target(new);
            let own = dev.and_then(|dev| all.find(|e| target(e) == Some(dev)));
            if let (Some(dev), Some(own)) = (dev, own) {
                let path = |e| {
                    let disk = Disk::read(e).ok();
                    let path = disk.and_then(|disk| disk.source.path().map(str::to_owned));
                    path.unwrap_or_default()
                };
                return Err(if running {
                    let (own, new) = (path(own), path(new));
                    let text =
                        format!("target '{dev}' duplicated for disk sources '{own}' and '{new}'");
                    Error::new(ErrorCode::XML_ERROR, text)
                } else {
                    Error::invalid(format!("target {dev} already exists"))
                });
            }
            let place = |disk: &Disk| Some((disk.bus.clone(), disk.drive?));
            let wanted = scsi::complete(new).ok().and_then(|disk| place(&disk));
            let wanted = wanted.filter(|(bus, _)| bus == "scsi");
            let mut disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
            if wanted.is_some()
                && disks.any(|e| Disk::read(e).is_ok_and(|disk| place(&disk) == wanted))
            {
                return Err(Error::invalid(
                    "Domain already contains a disk with that address",
                ));
            }
        }
        "controller" => {
            let same = |e: &Element| {
                e.attr("type") == new.attr("type")
                    && scsi::stated_index(e) == scsi::stated_index(new)
            };
            if scsi::stated_index(new).is_some() && all.any(same) {
                let (kind, index) = (new.attr("type"), new.attr("index"));
                let (kind, index) = (kind.unwrap_or_default(), index.unwrap_or_default());
                return Err(if running {
                    Error::failed(format!("target {kind}:{index} already exists"))
                } else {
                    Error::invalid(format!("controller index='{index}' already exists"))
                });
            }
        }
        "channel" => {
            let virtio = |e: &Element| {
                let target = e.child("target")?;
                (target.attr("type") == Some("virtio"))
                    .then(|| target.attr("name").map(str::to_owned))
            };
            let name = virtio(new).flatten();
            if name.is_some() && all.any(|e| virtio(e).flatten() == name) {
                return Err(Error::invalid("chardev already exists"));
            }
        }
        "memballoon" => {
            let how = if running { "live" } else { "persistent" };
            return Err(Error::new(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!("{how} attach of device 'memballoon' is not supported"),
            ));
        }
        "watchdog" if !running && all.next().is_some() => {
            return Err(Error::invalid("domain already has a watchdog"));
        }
        "vsock" | "tpm" if all.any(|e| e.attr("model") != Some("none")) => {
            return Err(Error::invalid(format!(
                "domain already has a {} device",
                new.name
            )));
        }
        _ => {}
    }
    Ok(())
}

/// libvirt has other words for some of what a stored definition lacks.
pub fn in_definition(mut error: Error) -> Error {
    let message = error.message.strip_prefix("device not found: ");
    let word = match message {
        Some("matching watchdog device not found") => Some("domain has no watchdog"),
        Some("matching rng device not found") => Some("no matching RNG device was found"),
        _ => None,
    };
    if let Some(word) = word {
        return missing(word);
    }
    if message.is_some_and(|text| text.starts_with("controller ")) {
        return missing("device not present in domain configuration");
    }
    let disk = message.and_then(|text| text.strip_prefix("disk ")?.strip_suffix(" not found"));
    if let Some(target) = disk {
        error = missing(format!("no target device {target}"));
    } else if message.is_some_and(|text| text.starts_with("chr type ")) {
        let text = "device not present in domain configuration";
        error = Error::new(ErrorCode::INVALID_ARG, text);
    }
    error
}
