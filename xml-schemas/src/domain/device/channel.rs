//! `<channel>`, and `<console>` with a virtio target.

use super::super::CharDevice;
use super::super::char_device;
use crate::dom::Element;
use crate::error::XmlError;
use crate::units::number;

/// A channel to programs in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channel {
    /// The host's end, its log, its id.
    pub device: CharDevice,
    /// `<target name=…>`: what the guest finds in /dev/virtio-ports.
    pub name: Option<String>,
    /// Index of its virtio-serial controller.
    pub controller: u32,
    /// Its port there.
    pub port: Option<u32>,
}

impl Channel {
    /// Reads a `<channel>` whose target is virtio.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR or VIR_ERR_INTERNAL_ERROR for values that cannot be.
    pub fn read(element: &Element) -> Result<Self, XmlError> {
        let mut rest = element.clone();
        // The target's name is no character device's matter, and its type another one's.
        let target = rest.take_child("target");
        let name = target.and_then(|t| t.attr("name").map(str::to_owned));
        let device = char_device::parse(rest)?;
        let (controller, port) = place(&device.rest)?;
        Ok(Self {
            device,
            name,
            controller,
            port,
        })
    }

    /// Where a virtio console is.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for numbers that cannot be.
    pub fn of_console(console: &CharDevice) -> Result<Self, XmlError> {
        let (controller, port) = place(&console.rest)?;
        Ok(Self {
            device: console.clone(),
            name: None,
            controller,
            port,
        })
    }
}

/// Controller and port of `<address type='virtio-serial'>`.
pub(in super::super) fn place(parts: &[Element]) -> Result<(u32, Option<u32>), XmlError> {
    let Some(address) = parts
        .iter()
        .find(|e| e.name == "address" && e.attr("type") == Some("virtio-serial"))
    else {
        return Ok((0, None));
    };
    let part = |name: &str| match address.attr(name) {
        None => Ok(None),
        Some(text) => number::<u32>(text).map(Some).ok_or_else(|| {
            XmlError::xml(format!("Invalid value '{text}' for attribute '{name}'")).at(address.line)
        }),
    };
    Ok((part("controller")?.unwrap_or(0), part("port")?))
}
