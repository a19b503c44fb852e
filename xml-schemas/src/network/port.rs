//! A port: one guest's card in a network.

use uuid::Uuid;

use super::format::push_bandwidth;
use super::parse::{bandwidth, mac};
use super::{Bandwidth, error, mac_text, xml};
use crate::dom::{self, Element, Node, format_element};
use crate::error::{ErrorCode, XmlError};

/// A port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its UUID.
    pub uuid: Uuid,
    /// The domain's name.
    pub owner: String,
    /// The domain's UUID.
    pub owner_uuid: Uuid,
    /// The group that it is in.
    pub group: Option<String>,
    /// The card's hardware address.
    pub mac: [u8; 6],
    /// As written.
    pub virtualport: Option<Element>,
    /// The card's limits.
    pub bandwidth: Bandwidth,
    /// As written.
    pub vlan: Option<Element>,
    /// It does not reach other isolated ports.
    pub isolated: Option<bool>,
    /// The guest may set up what the card receives.
    pub trust_guest_rx_filters: Option<bool>,
    /// How it is connected.
    pub plug: Option<Plug>,
}

/// How a port is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plug {
    /// To the network's own bridge.
    Network {
        /// Its name.
        bridge: String,
    },
    /// To a bridge of the host's.
    Bridge {
        /// Its name.
        bridge: String,
    },
    /// By a macvtap.
    Direct {
        /// The host's device.
        dev: String,
        /// `bridge`, `private`, `vepa` or `passthrough`.
        mode: String,
    },
}

impl Port {
    /// Reads one that a client gives, or that was stored.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR.
    pub fn parse(text: &str) -> Result<Self, XmlError> {
        let root = dom::parse(text, "(networkport)")?;
        if root.name != "networkport" {
            return Err(xml(format!(
                "unexpected root element <{}>, expecting <networkport>",
                root.name
            )));
        }
        let uuid = |e: &Element, what: &str| match e.child_text("uuid") {
            None => Ok(None),
            Some(text) => match text.trim().parse::<Uuid>() {
                Ok(uuid) => Ok(Some(uuid)),
                Err(_) => Err(xml(format!("Unable to parse {what} '{text}'"))),
            },
        };
        let owner = root.child("owner");
        let name = owner
            .and_then(|o| o.child_text("name"))
            .filter(|n| !n.is_empty())
            .ok_or_else(|| xml("Missing network port owner name"))?;
        let owner_uuid = match owner {
            Some(owner) => uuid(owner, "owner UUID")?,
            None => None,
        }
        .ok_or_else(|| xml("Missing network port owner UUID"))?;
        let text = root
            .child("mac")
            .and_then(|m| m.attr("address"))
            .ok_or_else(|| xml("Missing network port mac"))?;
        let mac = mac(text).ok_or_else(|| xml(format!("Unable to parse MAC address '{text}'")))?;
        let flag = |element: &str, name: &str| match root.child(element).and_then(|e| e.attr(name))
        {
            None => Ok(None),
            Some("yes") => Ok(Some(true)),
            Some("no") => Ok(Some(false)),
            Some(other) => Err(xml(format!(
                "Invalid value for attribute '{name}' in element '{element}': '{other}'."
            ))),
        };
        Ok(Self {
            uuid: uuid(&root, "UUID")?.unwrap_or_else(Uuid::new_v4),
            owner: name,
            owner_uuid,
            group: root.child_text("group").filter(|g| !g.is_empty()),
            mac,
            virtualport: root.child("virtualport").cloned(),
            bandwidth: bandwidth(&root)?,
            vlan: root.child("vlan").cloned(),
            isolated: flag("port", "isolated")?,
            trust_guest_rx_filters: flag("rxfilters", "trustGuest")?,
            plug: match root.child("plug") {
                None => None,
                Some(plug) => Some(Plug::read(plug)?),
            },
        })
    }

    /// The document in libvirt's layout.
    pub fn format(&self) -> String {
        let yes_no = |yes: bool| if yes { "yes" } else { "no" };
        let mut root = Element::new("networkport")
            .with_child(Element::with_text("uuid", self.uuid.to_string()))
            .with_child(
                Element::new("owner")
                    .with_child(Element::with_text("name", &self.owner))
                    .with_child(Element::with_text("uuid", self.owner_uuid.to_string())),
            );
        if let Some(group) = &self.group {
            root.push(Element::with_text("group", group));
        }
        root.push(Element::new("mac").with_attr("address", mac_text(self.mac)));
        root.children
            .extend(self.virtualport.clone().map(Node::Element));
        push_bandwidth(&mut root, self.bandwidth);
        root.children.extend(self.vlan.clone().map(Node::Element));
        if let Some(isolated) = self.isolated {
            root.push(Element::new("port").with_attr("isolated", yes_no(isolated)));
        }
        if let Some(trust) = self.trust_guest_rx_filters {
            root.push(Element::new("rxfilters").with_attr("trustGuest", yes_no(trust)));
        }
        if let Some(plug) = &self.plug {
            root.push(plug.element());
        }
        let mut out = String::new();
        format_element(&mut out, &root, 0);
        out
    }
}

impl Plug {
    fn read(e: &Element) -> Result<Self, XmlError> {
        let part = |name: &str| {
            e.attr(name)
                .filter(|v| !v.is_empty())
                .map(str::to_owned)
                .ok_or_else(|| xml(format!("Missing network port {name}")))
        };
        Ok(match e.attr("type") {
            Some("network") => Self::Network {
                bridge: part("bridge")?,
            },
            Some("bridge") => Self::Bridge {
                bridge: part("bridge")?,
            },
            Some("direct") => Self::Direct {
                dev: part("dev")?,
                mode: part("mode")?,
            },
            Some(other) => {
                return Err(error(
                    ErrorCode::ConfigUnsupported,
                    format!("network port plug type '{other}'"),
                ));
            }
            None => return Err(xml("Missing network port plug type")),
        })
    }

    fn element(&self) -> Element {
        let e = Element::new("plug");
        match self {
            Self::Network { bridge } => e.with_attr("type", "network").with_attr("bridge", bridge),
            Self::Bridge { bridge } => e.with_attr("type", "bridge").with_attr("bridge", bridge),
            Self::Direct { dev, mode } => e
                .with_attr("type", "direct")
                .with_attr("dev", dev)
                .with_attr("mode", mode),
        }
    }
}
