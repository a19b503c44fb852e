//! Values of subtrees that libvirt rewrites: sizes in KiB, PCI addresses in full.
//!
//! Two definitions that mean the same then read the same, which tools compare.

use crate::dom::Element;
use crate::error::XmlError;
use crate::units::{kib, number};

pub(super) fn apply(root: &mut Element) -> Result<(), XmlError> {
    for section in root.elements_mut() {
        match section.name.as_str() {
            "genid" if section.text().trim().is_empty() => {
                section.children.clear();
                section.push_text(uuid::Uuid::new_v4().to_string());
            }
            "memtune" => sizes(section, |_| true)?,
            "memoryBacking" => {
                for pages in section.elements_mut().filter(|e| e.name == "hugepages") {
                    for page in pages.elements_mut() {
                        size_attribute(page, "size")?;
                    }
                }
            }
            "cpu" => numa(section)?,
            "devices" => {
                for device in section.elements_mut() {
                    devices(device)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The memory of all NUMA cells in KiB, if there are any.
pub(super) fn numa_memory_kib(cpu: &Element) -> Option<u64> {
    let numa = cpu.child("numa")?;
    numa.elements()
        .filter(|e| e.name == "cell")
        .map(|cell| number::<u64>(cell.attr("memory")?))
        .sum()
}

fn numa(cpu: &mut Element) -> Result<(), XmlError> {
    for numa in cpu.elements_mut().filter(|e| e.name == "numa") {
        let cells = numa.elements_mut().filter(|e| e.name == "cell");
        for (index, cell) in cells.enumerate() {
            size_attribute(cell, "memory")?;
            if cell.attr("id").is_none() {
                cell.set_attr("id", index.to_string());
            }
        }
    }
    Ok(())
}

fn devices(device: &mut Element) -> Result<(), XmlError> {
    match device.name.as_str() {
        "disk" if device.attr("device") == Some("cdrom") && device.child("readonly").is_none() => {
            device.push(Element::new("readonly"));
        }
        "hostdev"
            if device.attr("mode") != Some("capabilities") && device.attr("managed").is_none() =>
        {
            device.set_attr("managed", "no");
        }
        "memory" => {
            for part in device.elements_mut() {
                sizes(part, |name| !matches!(name, "node" | "nodemask" | "path"))?;
            }
        }
        _ => {}
    }
    let hostdev = device.name == "hostdev" && device.attr("type") == Some("pci");
    addresses(device, hostdev);
    Ok(())
}

/// `pci`: an address without a type is one of PCI.
fn addresses(element: &mut Element, pci: bool) {
    for child in element.elements_mut() {
        if child.name == "address" {
            if child.attr("type").map_or(pci, |t| t == "pci") {
                pci_address(child);
            }
        } else {
            let nvme = child.name == "source" && child.attr("type") == Some("pci");
            addresses(
                child,
                nvme || child.name == "parentaddr" || (pci && child.name == "source"),
            );
        }
    }
}

fn pci_address(address: &mut Element) {
    let parts = [("domain", 4), ("bus", 2), ("slot", 2), ("function", 1)];
    if parts.iter().all(|(name, _)| address.attr(name).is_none()) {
        return;
    }
    for (name, digits) in parts {
        let value = address.attr(name).map_or(Some(0), c_number);
        if let Some(value) = value {
            address.set_attr(name, format!("0x{value:0digits$x}"));
        }
    }
}

/// A number as C reads it: `0x10`, `010`, `10`.
pub(super) fn c_number(text: &str) -> Option<u32> {
    let text = text.trim();
    if let Some(hex) = text.strip_prefix("0x") {
        return u32::from_str_radix(hex, 16).ok();
    }
    match text.strip_prefix('0') {
        Some(octal) if !octal.is_empty() => u32::from_str_radix(octal, 8).ok(),
        _ => text.parse().ok(),
    }
}

/// Rewrites the children that hold sizes.
fn sizes(parent: &mut Element, is_size: impl Fn(&str) -> bool) -> Result<(), XmlError> {
    for child in parent.elements_mut() {
        let text = child.text();
        if !is_size(&child.name) || text.trim().is_empty() {
            continue;
        }
        let Some(value) = number::<u64>(&text) else {
            return Err(bad_size(child, &text));
        };
        let value = kib(value, child.attr("unit")).map_err(|e| e.at(child.line))?;
        child.set_attr("unit", "KiB");
        child.children.clear();
        child.push_text(value.to_string());
    }
    Ok(())
}

fn size_attribute(element: &mut Element, name: &str) -> Result<(), XmlError> {
    let Some(text) = element.attr(name) else {
        return Ok(());
    };
    let Some(value) = number::<u64>(text) else {
        return Err(bad_size(element, text));
    };
    let value = kib(value, element.attr("unit")).map_err(|e| e.at(element.line))?;
    element.set_attr(name, value.to_string());
    element.set_attr("unit", "KiB");
    Ok(())
}

fn bad_size(element: &Element, text: &str) -> XmlError {
    XmlError::xml(format!(
        "Invalid value '{text}' for element or attribute '{}'",
        element.name
    ))
    .at(element.line)
}
