//! `<interface>`.

use super::{PciAddress, alias, boot_order, numeric, numeric_of, of, owned};
use crate::dom::Element;
use crate::error::XmlError;

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// `bridge`, `ethernet`, `direct`, `user`, `network`…
    pub kind: String,
    /// `<source bridge=…>`, `dev` or `network`, whichever the type has.
    pub source: Option<String>,
    /// `<source mode=…>` of type `direct`: `vepa` by default.
    pub mode: Option<String>,
    /// `<target dev=…>`.
    pub target: Option<String>,
    /// `<target managed='no'>` is false: the device is somebody else's.
    pub managed: bool,
    /// `<script path=…>` or `<downscript path=…>`.
    pub script: Option<String>,
    /// `<backend type=…>`.
    pub backend: Option<String>,
    /// `<model type=…>`.
    pub model: String,
    /// The hardware address.
    pub mac: [u8; 6],
    /// `<mtu size=…>`.
    pub mtu: Option<u16>,
    /// `<link state=…>` is not `down`.
    pub link_up: bool,
    /// `<driver queues=…>`.
    pub queues: Option<u16>,
    /// `<filterref filter=…>`.
    pub filter: Option<String>,
    /// To the guest.
    pub inbound: Option<Rate>,
    /// From the guest.
    pub outbound: Option<Rate>,
    /// `<boot order=…>`.
    pub boot_order: Option<u32>,
    /// The device's id.
    pub alias: Option<String>,
    /// Its place.
    pub address: Option<PciAddress>,
}

/// One direction of `<bandwidth>`, as libvirt counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// Kilobytes (1000) a second in the long run.
    pub average: u64,
    /// Kilobytes a second during a burst; 0: no limit of its own.
    pub peak: u64,
    /// Kibibytes of one burst; 0: not stated.
    pub burst: u64,
    /// Kilobytes a second that are always there (type `network` only); 0: none.
    pub floor: u64,
}

impl Rate {
    pub(crate) fn read(interface: &Element, direction: &str) -> Result<Option<Self>, XmlError> {
        let Some(e) = interface
            .child("bandwidth")
            .and_then(|bandwidth| bandwidth.child(direction))
        else {
            return Ok(None);
        };
        let part = |name: &str| numeric(e, name).map(Option::unwrap_or_default);
        let rate = Self {
            average: part("average")?,
            peak: part("peak")?,
            burst: part("burst")?,
            floor: part("floor")?,
        };
        if rate.average == 0 && rate.floor == 0 {
            return Err(XmlError::xml("Missing mandatory average or floor attributes").at(e.line));
        }
        Ok(Some(rate))
    }

    pub(crate) fn element(self, direction: &str) -> Element {
        let mut e = Element::new(direction);
        for (name, value) in [
            ("average", self.average),
            ("peak", self.peak),
            ("burst", self.burst),
            ("floor", self.floor),
        ] {
            if value != 0 {
                e.set_attr(name, value.to_string());
            }
        }
        e
    }
}

/// `52:54:00:12:34:56` as bytes.
pub(crate) fn mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.trim().split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|p| matches!(p.len(), 1 | 2))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(bytes)
}

impl Interface {
    /// Reads `<interface>`, once defaults are filled.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for values that cannot be.
    pub fn read(element: &Element) -> Result<Self, XmlError> {
        let kind = element.attr("type").unwrap_or_default();
        let source = match kind {
            "bridge" => "bridge",
            "network" => "network",
            "internal" => "name",
            _ => "dev",
        };
        let text = of(element, "mac", "address").unwrap_or_default();
        let mac = mac(text).ok_or_else(|| {
            XmlError::xml(format!("unable to parse mac address '{text}'")).at(element.line)
        })?;
        if mac[0] & 1 != 0 {
            return Err(XmlError::xml(format!(
                "expected unicast mac address, found multicast '{text}'"
            ))
            .at(element.line));
        }
        Ok(Self {
            kind: kind.to_owned(),
            source: owned(element, "source", source),
            mode: owned(element, "source", "mode"),
            target: owned(element, "target", "dev"),
            managed: of(element, "target", "managed") != Some("no"),
            script: owned(element, "script", "path")
                .or_else(|| owned(element, "downscript", "path")),
            backend: owned(element, "backend", "type"),
            model: owned(element, "model", "type").unwrap_or_default(),
            mac,
            mtu: numeric_of(element, "mtu", "size")?,
            link_up: of(element, "link", "state") != Some("down"),
            queues: numeric_of(element, "driver", "queues")?,
            filter: owned(element, "filterref", "filter"),
            inbound: Rate::read(element, "inbound")?,
            outbound: Rate::read(element, "outbound")?,
            boot_order: boot_order(element)?,
            alias: alias(element).map(str::to_owned),
            address: PciAddress::of(element)?,
        })
    }

    /// Its hardware address as text.
    pub fn mac_text(&self) -> String {
        let bytes: Vec<String> = self.mac.iter().map(|b| format!("{b:02x}")).collect();
        bytes.join(":")
    }

    /// Fills what is filled at define: the model, which is virtio where none is named (the one
    /// that there is), and macvtap's mode.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for a missing or impossible part.
    pub(in super::super) fn fill(element: &mut Element) -> Result<(), XmlError> {
        let line = element.line;
        let kind = element.attr("type").unwrap_or_default().to_owned();
        let source = match kind.as_str() {
            "bridge" => Some("bridge"),
            "network" => Some("network"),
            "direct" => Some("dev"),
            _ => None,
        };
        if let Some(attribute) = source {
            let Some(found) = element.child("source") else {
                return Err(XmlError::xml(format!(
                    "interface type='{kind}' requires a 'source' element"
                ))
                .at(line));
            };
            if found.attr(attribute).is_none_or(str::is_empty) {
                return Err(XmlError::xml(format!(
                    "Missing required attribute '{attribute}' in element 'source'"
                ))
                .at(line));
            }
        }
        if kind == "direct" {
            for source in element.elements_mut().filter(|e| e.name == "source") {
                if source.attr("mode").is_none() {
                    source.set_attr("mode", "vepa");
                }
            }
        }
        if element.child("model").is_none() && kind != "hostdev" {
            element.push(Element::new("model").with_attr("type", "virtio"));
        }
        Self::read(element).map(drop).map_err(|e| e.at(line))
    }

    /// Writes limits into an element: those that are `Some`; with an average of 0, none.
    pub fn write_rates(element: &mut Element, inbound: Option<Rate>, outbound: Option<Rate>) {
        let mut bandwidth = element
            .take_child("bandwidth")
            .unwrap_or_else(|| Element::new("bandwidth"));
        for (direction, rate) in [("inbound", inbound), ("outbound", outbound)] {
            let Some(rate) = rate else { continue };
            bandwidth.take_children(direction);
            if rate.average != 0 || rate.floor != 0 {
                bandwidth.push(rate.element(direction));
            }
        }
        if !bandwidth.is_empty() {
            element.push(bandwidth);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses() {
        assert_eq!(mac("52:54:00:a:0b:ff"), Some([0x52, 0x54, 0, 10, 11, 255]));
        for bad in [
            "",
            "52:54:00:00:00",
            "52:54:00:00:00:00:00",
            "52:54:00:00:00:gg",
        ] {
            assert_eq!(mac(bad), None, "{bad}");
        }
    }
}
