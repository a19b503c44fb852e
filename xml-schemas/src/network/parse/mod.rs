//! From text to a network.

mod dns;
mod ip;

use std::net::IpAddr;

pub(super) use self::dns::{dns_host, srv, txt};
pub(super) use self::ip::{dhcp_host, range};
use self::ip::{ip, route};
use super::{
    Bandwidth, DNSMASQ_NAMESPACE, Dns, DomainName, Forward, ForwardMode, Nat, Network, PortGroup,
    Rate, detail, error, unsupported, xml,
};
use crate::Validation;
use crate::dom::{self, Element};
use crate::error::{ErrorCode, ErrorDomain, XmlError};
use crate::grammar;

/// A hardware address as text.
pub fn mac_text(mac: [u8; 6]) -> String {
    let bytes: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
    bytes.join(":")
}

/// Bytes of a name that is a device's or a file's: what the kernel and file systems take.
const LONGEST_NAME: usize = 240;

impl Network {
    /// Reads a definition.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR and others, as libvirt has them.
    pub fn parse(text: &str, validation: Validation) -> Result<Self, XmlError> {
        let mut root = dom::parse(text, "(network_definition)")?;
        if root.name != "network" {
            return Err(xml(format!(
                "expecting root element of 'network', not '{}'",
                root.name
            )));
        }
        let metadata = root
            .child("metadata")
            .map(|m| crate::domain::kept_metadata(m, &root))
            .filter(|m| m.elements().next().is_some());
        grammar::network().normalize(&mut root);
        if validation == Validation::Strict {
            grammar::network().check(&root)?;
        }
        let network = Self::read(&root, metadata)?;
        network.validate()?;
        Ok(network)
    }

    fn read(root: &Element, metadata: Option<Element>) -> Result<Self, XmlError> {
        let name = root
            .child_text("name")
            .filter(|n| !n.is_empty())
            .ok_or_else(|| error(ErrorCode::NoName, "missing name information"))?;
        if let Some(bad) = name.chars().find(|c| *c == '/' || c.is_control()) {
            let bad = if bad == '/' {
                "/".to_owned()
            } else {
                bad.escape_default().to_string()
            };
            return Err(detail(format!("invalid char in name: {bad}")));
        }
        if name.len() > LONGEST_NAME {
            return Err(detail(format!(
                "a network's name has at most {LONGEST_NAME} bytes"
            )));
        }
        let uuid = match root.child_text("uuid") {
            None => None,
            Some(text) => Some(
                text.trim()
                    .parse()
                    .map_err(|_| error(ErrorCode::Internal, "malformed uuid element"))?,
            ),
        };
        let text = |name: &str| root.child_text(name).filter(|t| !t.is_empty());
        let title = text("title");
        if title.as_ref().is_some_and(|t| t.contains('\n')) {
            return Err(xml("Network title can't contain newlines"));
        }
        let bridge = root.child("bridge");
        let own = |name: &str| bridge.and_then(|b| b.attr(name)).filter(|v| !v.is_empty());
        let mut network = Self {
            title,
            description: text("description"),
            metadata,
            uuid,
            ipv6: yes_no(root, "ipv6")? == Some(true),
            trust_guest_rx_filters: yes_no(root, "trustGuestRxFilters")?,
            forward: Forward::default(),
            bridge: own("name").map(str::to_owned),
            stp: match own("stp") {
                None | Some("on") => true,
                // libvirt takes any other word for no.
                Some(_) => false,
            },
            delay: match own("delay") {
                None => 0,
                Some(text) => text
                    .parse()
                    .ok()
                    .filter(|delay| *delay <= 100_000)
                    .ok_or_else(|| xml(format!("Invalid delay value in network '{name}'")))?,
            },
            mac_table_manager: match own("macTableManager") {
                None => None,
                Some(word @ ("kernel" | "libvirt")) => Some(word.to_owned()),
                Some(word) => {
                    return Err(xml(format!(
                        "Invalid macTableManager setting '{word}' in network '{name}'"
                    )));
                }
            },
            zone: own("zone").map(str::to_owned),
            mtu: match root.child("mtu") {
                None => None,
                Some(e) => number(e, "size", &name)?,
            },
            mac: match root.child("mac").and_then(|m| m.attr("address")) {
                None => None,
                Some(text) => Some(bridge_mac(text, &name)?),
            },
            domain: match root.child("domain") {
                None => None,
                Some(e) => Some(DomainName {
                    name: word(attr(e, "name"), "domain name", &name)?,
                    local_only: yes_no(e, "localOnly")?,
                }),
            },
            dns: match root.child("dns") {
                None => Dns::default(),
                Some(e) => dns::dns(e, &name)?,
            },
            vlan: root.child("vlan").cloned(),
            bandwidth: bandwidth(root)?,
            isolated_ports: match root.child("port") {
                None => None,
                Some(e) => yes_no(e, "isolated")?,
            },
            ips: Vec::new(),
            routes: Vec::new(),
            virtualport: root.child("virtualport").cloned(),
            portgroups: Vec::new(),
            dnsmasq_options: options(root)?,
            name,
        };
        let name = &network.name;
        if let Some(bridge) = &network.bridge {
            device_name(&bridge.replace("%d", ""), name)?;
        }
        for element in root.elements() {
            match element.name.as_str() {
                "ip" => network.ips.push(ip(element, name)?),
                "route" => network.routes.push(route(element, name)?),
                "portgroup" => network.portgroups.push(portgroup(element)?),
                _ => {}
            }
        }
        if let Some(e) = root.child("forward") {
            network.forward = forward(e, name)?;
        }
        Ok(network)
    }
}

fn attr(element: &Element, name: &str) -> Option<String> {
    element
        .attr(name)
        .map(str::to_owned)
        .filter(|v| !v.is_empty())
}

fn yes_no(element: &Element, name: &str) -> Result<Option<bool>, XmlError> {
    match element.attr(name) {
        None => Ok(None),
        Some("yes") => Ok(Some(true)),
        Some("no") => Ok(Some(false)),
        Some(other) => Err(invalid_attr(element, name, other)),
    }
}

fn invalid_attr(element: &Element, name: &str, value: &str) -> XmlError {
    xml(format!(
        "Invalid value for attribute '{name}' in element '{}': '{value}'.",
        element.name
    ))
}

fn number<T: std::str::FromStr>(
    element: &Element,
    name: &str,
    network: &str,
) -> Result<Option<T>, XmlError> {
    match element.attr(name) {
        None => Ok(None),
        Some(text) => match text.trim().parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(xml(format!(
                "Invalid value '{text}' of {name} in element '{}' of network '{network}'",
                element.name
            ))),
        },
    }
}

/// `52:54:00:12:34:56` as bytes.
pub(super) fn mac(text: &str) -> Option<[u8; 6]> {
    crate::domain::device::parse_mac(text)
}

fn bridge_mac(text: &str, network: &str) -> Result<[u8; 6], XmlError> {
    let mac = mac(text).ok_or_else(|| {
        xml(format!(
            "Invalid bridge mac address '{text}' in network '{network}'"
        ))
    })?;
    if mac[0] & 1 != 0 {
        return Err(xml(format!(
            "Invalid multicast bridge mac address '{text}' in network '{network}'"
        )));
    }
    Ok(mac)
}

/// An address, or libvirt's words for what is none.
pub(super) fn any_address(text: &str) -> Result<IpAddr, XmlError> {
    text.parse().map_err(|_| {
        XmlError::verbatim(
            ErrorCode::System,
            ErrorDomain::None,
            format!("Cannot parse socket address '{text}': Name or service not known"),
        )
    })
}

/// Each network has its own words around this: what dnsmasq must not read as something else.
fn plain_words(value: &str) -> bool {
    !value.contains(['\n', '\r', ','])
}

/// A name that goes into a line of dnsmasq's files.
fn word(value: Option<String>, what: &str, network: &str) -> Result<Option<String>, XmlError> {
    match value {
        Some(value)
            if value.contains(|c: char| {
                c.is_whitespace() || c.is_control() || c == ',' || c == '#'
            }) =>
        {
            Err(xml(format!(
                "prohibited character in {what} '{}' of network '{network}'",
                value.escape_default()
            )))
        }
        value => Ok(value),
    }
}

fn forward(e: &Element, network: &str) -> Result<Forward, XmlError> {
    let mode = match e.attr("mode") {
        None => ForwardMode::Nat,
        Some(word) => ForwardMode::of(word)
            .ok_or_else(|| unsupported(format!("unknown forwarding type '{word}'")))?,
    };
    let mut forward = Forward {
        mode,
        managed: yes_no(e, "managed")? == Some(true),
        driver: e.child("driver").and_then(|d| attr(d, "name")),
        nat: match e.child("nat") {
            None => Nat::default(),
            Some(nat) => self::nat(nat, network)?,
        },
        ..Forward::default()
    };
    let mut pfs = 0;
    for child in e.elements() {
        match child.name.as_str() {
            "interface" => {
                let dev = attr(child, "dev").ok_or_else(|| {
                    xml(format!(
                        "Missing required dev attribute in <forward> <interface> element of network {network}"
                    ))
                })?;
                if forward.interfaces.contains(&dev) {
                    return Err(xml(format!(
                        "interface '{dev}' can only be listed once in network {network}"
                    )));
                }
                device_name(&dev, network)?;
                forward.interfaces.push(dev);
            }
            "pf" => {
                pfs += 1;
                forward.physical = attr(child, "dev");
            }
            "address" => {
                let part = |name: &str| -> Result<u32, XmlError> {
                    let text = child.attr(name).unwrap_or("0");
                    let digits = text.strip_prefix("0x").unwrap_or(text);
                    u32::from_str_radix(digits, 16).map_err(|_| invalid_attr(child, name, text))
                };
                let place = [
                    part("domain")?,
                    part("bus")?,
                    part("slot")?,
                    part("function")?,
                ];
                forward.addresses.push(place);
            }
            _ => {}
        }
    }
    if pfs > 1 {
        return Err(xml(format!(
            "Only one <pf> element is allowed in <forward> of network {network}"
        )));
    }
    if let Some(dev) = attr(e, "dev") {
        device_name(&dev, network)?;
        match forward.interfaces.first() {
            None => forward.interfaces.push(dev),
            Some(first) if *first == dev => {}
            Some(first) => {
                return Err(xml(format!(
                    "forward dev '{dev}' must match first interface element dev '{first}' in network '{network}'"
                )));
            }
        }
    }
    Ok(forward)
}

pub(super) fn device_name(name: &str, network: &str) -> Result<(), XmlError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | ':' | '-' | '@');
    if name.len() <= 64 && name.chars().all(fine) {
        return Ok(());
    }
    Err(xml(format!(
        "invalid device name '{}' in network '{network}'",
        name.escape_default()
    )))
}

fn nat(e: &Element, network: &str) -> Result<Nat, XmlError> {
    let mut nat = Nat {
        ipv6: yes_no(e, "ipv6")? == Some(true),
        ..Nat::default()
    };
    if let Some(range) = e.child("address") {
        let part = |name: &str| {
            range.attr(name).ok_or_else(|| {
                xml(format!(
                    "missing '{name}' attribute in <address> element in <nat> in <forward> in network {network}"
                ))
            })
        };
        let (start, end) = (part("start")?, part("end")?);
        let v4 = |text: &str| {
            text.parse::<std::net::Ipv4Addr>().map_err(|_| {
                xml(format!(
                    "Bad ipv4 address '{text}' in <nat> in <forward> in network '{network}'"
                ))
            })
        };
        let (start, end) = (v4(start)?, v4(end)?);
        if start > end {
            return Err(xml(format!(
                "the <nat> addresses {start} - {end} of network '{network}' are reversed"
            )));
        }
        nat.addresses = Some((start.into(), end.into()));
    }
    if let Some(range) = e.child("port") {
        let part = |name: &str| {
            let port = range.attr(name).and_then(|text| text.parse::<u16>().ok());
            port.filter(|port| *port > 0).ok_or_else(|| {
                detail(format!(
                    "Missing or invalid '{name}' attribute in <port> in <nat> in <forward> in network {network}"
                ))
            })
        };
        let (start, end) = (part("start")?, part("end")?);
        if start > end {
            return Err(detail(format!(
                "Missing or invalid 'end' attribute in <port> in <nat> in <forward> in network {network}"
            )));
        }
        nat.ports = Some((start, end));
    }
    Ok(nat)
}

pub(super) fn bandwidth(e: &Element) -> Result<Bandwidth, XmlError> {
    let in_network =
        |error: XmlError| XmlError::verbatim(error.code(), ErrorDomain::Network, error.to_string());
    let read = |direction: &str| match Rate::read(e, direction) {
        Err(error) if error.to_string().contains("Missing mandatory") => {
            Err(detail("Missing mandatory average or floor attributes"))
        }
        read => read.map_err(in_network),
    };
    let bandwidth = Bandwidth {
        inbound: read("inbound")?,
        outbound: read("outbound")?,
    };
    if bandwidth.outbound.is_some_and(|rate| rate.floor != 0) {
        return Err(unsupported(
            "'floor' attribute allowed only in <inbound> element",
        ));
    }
    Ok(bandwidth)
}

pub(super) fn portgroup(e: &Element) -> Result<PortGroup, XmlError> {
    Ok(PortGroup {
        name: attr(e, "name").ok_or_else(|| xml("Missing required name attribute in portgroup"))?,
        default: yes_no(e, "default")?,
        trust_guest_rx_filters: yes_no(e, "trustGuestRxFilters")?,
        vlan: e.child("vlan").cloned(),
        virtualport: e.child("virtualport").cloned(),
        bandwidth: bandwidth(e)?,
    })
}

fn options(root: &Element) -> Result<Vec<String>, XmlError> {
    let ours = |e: &&Element| e.namespace.as_deref() == Some(DNSMASQ_NAMESPACE);
    let mut options = Vec::new();
    for list in root
        .elements()
        .filter(ours)
        .filter(|e| e.local_name() == "options")
    {
        for option in list.elements().filter(|e| e.local_name() == "option") {
            let value = option
                .attr("value")
                .ok_or_else(|| error(ErrorCode::Internal, "No dnsmasq options value specified"))?;
            if value.contains(['\n', '\r', '\0']) {
                return Err(xml("a dnsmasq option is one line"));
            }
            options.push(value.to_owned());
        }
    }
    Ok(options)
}
