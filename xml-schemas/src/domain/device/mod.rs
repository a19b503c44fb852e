//! Devices as the machine is built from them, read from their elements.
//!
//! The elements stay what is stored and printed; these are views of them. Unlike
//! [`CharDevice`](super::CharDevice), a view leaves out what the machine does not act on.

mod channel;
mod disk;
mod drive;
mod interface;
mod simple;

pub use channel::Channel;
pub(super) use channel::place;
pub use disk::{BackingImage, Disk, DiskSource, IoTune, SecretUse};
pub use drive::{DriveAddress, SATA_PORTS, check_places, has_controller, is_ahci};
pub(crate) use interface::mac as parse_mac;
pub use interface::{Interface, Rate};
pub use simple::{Balloon, Rng, Vsock, Watchdog};

use super::parse::bad_attribute;
use crate::dom::{Element, format_compact};
use crate::error::XmlError;

/// Whether a text is a hardware address.
pub fn is_mac(text: &str) -> bool {
    interface::mac(text).is_some()
}

/// `<address type='pci'>`: segment 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// The `index` of the controller it is behind.
    pub bus: u8,
    /// 0 to 31.
    pub slot: u8,
    /// 0 to 7.
    pub function: u8,
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            bus,
            slot,
            function,
        } = self;
        write!(f, "0000:{bus:02x}:{slot:02x}.{function}")
    }
}

impl PciAddress {
    /// A device's address; `None` where it has none, or one of zeroes only, which libvirt takes
    /// for none.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for numbers out of range.
    pub fn of(device: &Element) -> Result<Option<Self>, XmlError> {
        let Some(address) = device
            .elements()
            .find(|e| e.name == "address" && e.attr("type") == Some("pci"))
        else {
            return Ok(None);
        };
        let part = |name: &str, most: u32| -> Result<u8, XmlError> {
            let value = match address.attr(name) {
                None => 0,
                Some(text) => {
                    super::canonical::c_number(text).ok_or_else(|| bad_attribute(address, name))?
                }
            };
            u8::try_from(value)
                .ok()
                .filter(|_| value <= most)
                .ok_or_else(|| {
                    XmlError::xml(format!(
                        "Invalid PCI address {name}='0x{value:x}', must be <= 0x{most:X}"
                    ))
                    .at(address.line)
                })
        };
        let found = Self {
            bus: part("bus", 0xff)?,
            slot: part("slot", 0x1f)?,
            function: part("function", 7)?,
        };
        let domain = address
            .attr("domain")
            .map_or(Some(0), super::canonical::c_number);
        if domain != Some(0) {
            return Err(XmlError::xml(format!(
                "Invalid PCI address {:04x}:{:02x}:{:02x}.{}. Only PCI domain 0 is available",
                domain.unwrap_or(u32::MAX),
                found.bus,
                found.slot,
                found.function
            ))
            .at(address.line));
        }
        let nowhere = Self {
            bus: 0,
            slot: 0,
            function: 0,
        };
        Ok((found != nowhere).then_some(found))
    }

    /// Gives it to a device, in place of any other address.
    pub(super) fn give(self, device: &mut Element) {
        device.take_children("address");
        device.push(
            Element::new("address")
                .with_attr("type", "pci")
                .with_attr("domain", "0x0000")
                .with_attr("bus", format_compact!("0x{:02x}", self.bus))
                .with_attr("slot", format_compact!("0x{:02x}", self.slot))
                .with_attr("function", format_compact!("0x{:x}", self.function)),
        );
    }
}

/// A device's id: `<alias name=…>`.
pub fn alias(device: &Element) -> Option<&str> {
    device.child("alias")?.attr("name")
}

/// Gives a device its id, unless the user gave it one.
pub(super) fn give_alias(device: &mut Element, name: String) {
    if device.child("alias").is_none() {
        device.push(Element::new("alias").with_attr("name", name));
    }
}

/// Controller and port of a channel's address.
pub(super) fn channel_place(channel: &Element) -> Result<(u32, Option<u32>), XmlError> {
    let address = channel.elements().find(|e| e.name == "address").cloned();
    place(address.as_slice())
}

/// An attribute of a child.
fn of<'e>(device: &'e Element, child: &str, attribute: &str) -> Option<&'e str> {
    device.child(child)?.attr(attribute)
}

/// The same, owned.
fn owned(device: &Element, child: &str, attribute: &str) -> Option<String> {
    of(device, child, attribute).map(str::to_owned)
}

/// An attribute that is a number, if it is there.
pub(super) fn numeric<T: std::str::FromStr>(
    element: &Element,
    attribute: &str,
) -> Result<Option<T>, XmlError> {
    match element.attr(attribute) {
        None => Ok(None),
        Some(text) => crate::units::number(text)
            .map(Some)
            .ok_or_else(|| bad_attribute(element, attribute)),
    }
}

/// A child's attribute that is a number, if it is there.
fn numeric_of<T: std::str::FromStr>(
    device: &Element,
    child: &str,
    attribute: &str,
) -> Result<Option<T>, XmlError> {
    device
        .child(child)
        .map_or(Ok(None), |e| numeric(e, attribute))
}

/// `<boot order=…>`.
fn boot_order(device: &Element) -> Result<Option<u32>, XmlError> {
    numeric_of(device, "boot", "order")
}
