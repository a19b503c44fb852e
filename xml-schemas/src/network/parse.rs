//! From text to a network.

use std::net::IpAddr;

use super::{
    Bandwidth, DNSMASQ_NAMESPACE, DhcpHost, Dns, DnsHost, DomainName, Forward, ForwardMode,
    Forwarder, Ip, Lease, LeaseUnit, Nat, Network, PortGroup, Range, Rate, Route, Srv, Subnet,
    address, detail, error, unsupported, xml,
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
                Some(e) => dns(e, &name)?,
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

fn dns(e: &Element, network: &str) -> Result<Dns, XmlError> {
    let mut dns = Dns {
        enable: yes_no(e, "enable")?,
        forward_plain_names: yes_no(e, "forwardPlainNames")?,
        ..Dns::default()
    };
    for child in e.elements() {
        match child.name.as_str() {
            "forwarder" => {
                let address = match child.attr("addr") {
                    None => None,
                    Some(text) => Some(text.parse().map_err(|_| {
                        xml(format!(
                            "Invalid forwarder IP address '{text}' in network '{network}'"
                        ))
                    })?),
                };
                let domain = word(attr(child, "domain"), "forwarder's domain", network)?;
                if address.is_none() && domain.is_none() {
                    return Err(xml(
                        "Invalid forwarder element, must contain at least one of addr or domain",
                    ));
                }
                dns.forwarders.push(Forwarder { domain, address });
            }
            "txt" => dns.txts.push(txt(child, network, false)?),
            "srv" => dns.srvs.push(srv(child, network, false)?),
            "host" => dns.hosts.push(dns_host(child, network, false)?),
            _ => {}
        }
    }
    let data = !(dns.forwarders.is_empty()
        && dns.txts.is_empty()
        && dns.srvs.is_empty()
        && dns.hosts.is_empty());
    if dns.enable == Some(false) && data {
        return Err(xml(format!("Extra data in disabled network '{network}'")));
    }
    Ok(dns)
}

/// `partial`: as one that is looked for.
pub(super) fn txt(e: &Element, network: &str, partial: bool) -> Result<(String, String), XmlError> {
    let name = attr(e, "name").ok_or_else(|| {
        detail(format!(
            "missing required name attribute in DNS TXT record of network {network}"
        ))
    })?;
    if name.contains(' ') || !plain_words(&name) {
        return Err(detail(format!(
            "prohibited character in DNS TXT record name '{name}' of network {network}"
        )));
    }
    let value = attr(e, "value");
    if value.is_none() && !partial {
        return Err(detail(format!(
            "missing required value attribute in DNS TXT record named '{name}' of network {network}"
        )));
    }
    let value = value.unwrap_or_default();
    if value.contains(['\n', '\r']) {
        return Err(detail(format!(
            "prohibited character in DNS TXT record '{name}' of network {network}"
        )));
    }
    Ok((name, value))
}

pub(super) fn srv(e: &Element, network: &str, partial: bool) -> Result<Srv, XmlError> {
    let service = attr(e, "service").unwrap_or_default();
    if service.is_empty() && !partial {
        return Err(detail(format!(
            "missing required service attribute in DNS SRV record of network '{network}'"
        )));
    }
    let protocol = attr(e, "protocol").unwrap_or_default();
    if protocol.is_empty() && !partial {
        return Err(detail(format!(
            "missing required protocol attribute in DNS SRV record '{service}' of network '{network}'"
        )));
    }
    let number = |name: &str, least: u16| match e.attr(name) {
        None => Ok(None),
        Some(text) => match text.parse::<u16>() {
            Ok(value) if value >= least => Ok(Some(value)),
            _ => Err(detail(format!(
                "invalid DNS SRV {name} attribute for service '{service}' in network '{network}'"
            ))),
        },
    };
    let named = |what: &str| word(attr(e, what), "DNS SRV record", network);
    let srv = Srv {
        domain: named("domain")?,
        target: named("target")?,
        port: number("port", 1)?,
        priority: number("priority", 0)?,
        weight: number("weight", 0)?,
        service: named("service")?.unwrap_or_default(),
        protocol: named("protocol")?.unwrap_or_default(),
    };
    if srv.target.is_none()
        && let Some(what) = [
            ("port", srv.port),
            ("priority", srv.priority),
            ("weight", srv.weight),
        ]
        .iter()
        .find(|(_, value)| value.is_some())
        && !partial
    {
        return Err(detail(format!(
            "DNS SRV {} attribute not permitted without target for service '{}' in network '{network}'",
            what.0, srv.service
        )));
    }
    Ok(srv)
}

pub(super) fn dns_host(e: &Element, network: &str, partial: bool) -> Result<DnsHost, XmlError> {
    let address = match attr(e, "ip") {
        None if partial => None,
        None => {
            return Err(detail(format!(
                "Missing IP address in network '{network}' DNS HOST record"
            )));
        }
        Some(text) => Some(text.parse().map_err(|_| {
            detail(format!(
                "Invalid IP address in network '{network}' DNS HOST record"
            ))
        })?),
    };
    let mut names = Vec::new();
    for hostname in e.elements().filter(|e| e.name == "hostname") {
        let text = hostname.text();
        match word(Some(text).filter(|t| !t.is_empty()), "hostname", network)? {
            Some(name) => names.push(name),
            None => {
                return Err(detail(format!(
                    "Missing hostname in network '{network}' DNS HOST record"
                )));
            }
        }
    }
    if names.is_empty() && !partial {
        return Err(detail(format!(
            "Missing hostname in network '{network}' DNS HOST record"
        )));
    }
    if partial && names.is_empty() && address.is_none() {
        return Err(detail(format!(
            "Missing ip and hostname in network '{network}' DNS HOST record"
        )));
    }
    Ok(DnsHost { address, names })
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

/// The address, mask and prefix of an element, which agree with its family.
type Placed = (Option<String>, IpAddr, Option<IpAddr>, Option<u8>);

fn placed(e: &Element, network: &str) -> Result<Placed, XmlError> {
    let text = attr(e, "address").unwrap_or_default();
    let address: IpAddr = text
        .parse()
        .map_err(|_| xml(format!("Invalid address '{text}' in network '{network}'")))?;
    let netmask = match attr(e, "netmask") {
        None => None,
        Some(mask) => Some(
            mask.parse::<IpAddr>()
                .map_err(|_| xml(format!("Invalid netmask '{mask}' in network '{network}'")))?,
        ),
    };
    let prefix = match attr(e, "prefix") {
        None => None,
        Some(prefix) => Some(
            prefix
                .parse::<u8>()
                .map_err(|_| xml(format!("Invalid prefix in network '{network}'")))?,
        ),
    };
    let family = attr(e, "family");
    match (family.as_deref(), address) {
        (None, IpAddr::V6(_)) => {
            return Err(unsupported(format!(
                "no family specified for non-IPv4 address '{text}' in network '{network}'"
            )));
        }
        (Some("ipv4"), IpAddr::V6(_)) => {
            return Err(unsupported(format!(
                "Family 'ipv4' specified for non-IPv4 address '{text}' in network '{network}'"
            )));
        }
        (Some("ipv6"), IpAddr::V4(_)) => {
            return Err(unsupported(format!(
                "Family 'ipv6' specified for non-IPv6 address '{text}' in network '{network}'"
            )));
        }
        (None | Some("ipv4" | "ipv6"), _) => {}
        (Some(other), _) => {
            return Err(xml(format!(
                "Unrecognized family '{other}' in network '{network}'"
            )));
        }
    }
    let words = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    if netmask.is_some() && address.is_ipv6() {
        return Err(unsupported(format!(
            "netmask not allowed for IPv6 address '{text}' in network '{network}'"
        )));
    }
    if netmask.is_some() && prefix.is_some() {
        return Err(unsupported(format!(
            "Network '{network}' IP address cannot have both a prefix and a netmask"
        )));
    }
    let most = if address.is_ipv4() { 32 } else { 128 };
    if let Some(prefix) = prefix.filter(|prefix| *prefix > most) {
        return Err(unsupported(format!(
            "Invalid {words} prefix '{prefix}' in network '{network}'"
        )));
    }
    if address::subnet(address, netmask, prefix).is_none() {
        return Err(match netmask {
            Some(mask) => xml(format!("Invalid netmask '{mask}' in network '{network}'")),
            None => xml(format!(
                "network '{network}' has an invalid netmask or IP address"
            )),
        });
    }
    Ok((family, address, netmask, prefix))
}

fn ip(e: &Element, network: &str) -> Result<Ip, XmlError> {
    let (family, address, netmask, prefix) = placed(e, network)?;
    let mut ip = Ip {
        family,
        address,
        netmask,
        prefix,
        local_ptr: yes_no(e, "localPtr")?,
        tftp_root: e.child("tftp").and_then(|t| attr(t, "root")),
        ranges: Vec::new(),
        hosts: Vec::new(),
        bootp: None,
    };
    if ip
        .tftp_root
        .as_ref()
        .is_some_and(|root| root.contains(['\n', '\r']))
    {
        return Err(xml(format!("invalid tftp root in network '{network}'")));
    }
    for dhcp in e.elements().filter(|e| e.name == "dhcp") {
        for child in dhcp.elements() {
            match child.name.as_str() {
                "range" => {
                    let range = range(child, &ip, network)?;
                    ip.ranges.push(range);
                }
                "host" => ip.hosts.push(dhcp_host(child, ip.address, network, false)?),
                "bootp" if ip.bootp.is_none() && address.is_ipv4() => {
                    if let Some(file) = word(attr(child, "file"), "bootp file", network)? {
                        ip.bootp =
                            Some((file, word(attr(child, "server"), "bootp server", network)?));
                    }
                }
                _ => {}
            }
        }
    }
    Ok(ip)
}

pub(super) fn range(e: &Element, ip: &Ip, network: &str) -> Result<Range, XmlError> {
    let part = |name: &str| {
        let text = attr(e, name).ok_or_else(|| {
            xml(format!(
                "Missing '{name}' attribute in dhcp range for network '{network}'"
            ))
        })?;
        any_address(&text)
    };
    let (start, end) = (part("start")?, part("end")?);
    let internal = |message: String| Err(error(ErrorCode::Internal, message));
    let Some(subnet) = ip.subnet() else {
        return internal(format!(
            "invalid netmask or IP address in network '{network}'"
        ));
    };
    let prefix = subnet.prefix;
    if start.is_ipv4() != end.is_ipv4() || start.is_ipv4() != subnet.address.is_ipv4() {
        return internal(format!(
            "mismatch of address family in range {start} - {end} for network {}",
            ip.address
        ));
    }
    if !(subnet.contains(start) && subnet.contains(end)) {
        return internal(format!(
            "range {start} - {end} is not entirely within network {}/{prefix}",
            ip.address
        ));
    }
    if address::count(start, end).is_none() {
        return internal(format!("range {start} - {end} is reversed "));
    }
    // Networks of one or two addresses have neither.
    if start.is_ipv4() && prefix < 31 {
        let place = format!("range {start} - {end} in network {}/{prefix}", ip.address);
        if start == subnet.network() {
            return internal(format!("start of {place} is the network address"));
        }
        if subnet.broadcast().is_some_and(|b| end == IpAddr::V4(b)) {
            return internal(format!("end of {place} is the broadcast address"));
        }
    }
    Ok(Range {
        start,
        end,
        lease: lease(e)?,
    })
}

fn lease(e: &Element) -> Result<Option<Lease>, XmlError> {
    let Some(e) = e.child("lease") else {
        return Ok(None);
    };
    let text = e.attr("expiry").unwrap_or_default();
    let expiry: u32 = text.parse().map_err(|_| invalid_attr(e, "expiry", text))?;
    let unit = match e.attr("unit") {
        None => None,
        Some("seconds") => Some(LeaseUnit::Seconds),
        Some("minutes") => Some(LeaseUnit::Minutes),
        Some("hours") => Some(LeaseUnit::Hours),
        Some(other) => return Err(invalid_attr(e, "unit", other)),
    };
    let lease = Lease { expiry, unit };
    // dnsmasq takes no shorter ones.
    if expiry != 0 && lease.seconds() < 120 {
        return Err(unsupported(
            "The minimum lease time should be greater than 2 minutes",
        ));
    }
    Ok(Some(lease))
}

impl Lease {
    /// How long, seconds; 0 is for ever.
    pub fn seconds(self) -> u64 {
        let unit = match self.unit {
            Some(LeaseUnit::Seconds) => 1,
            None | Some(LeaseUnit::Minutes) => 60,
            Some(LeaseUnit::Hours) => 3600,
        };
        u64::from(self.expiry) * unit
    }
}

pub(super) fn dhcp_host(
    e: &Element,
    around: IpAddr,
    network: &str,
    partial: bool,
) -> Result<DhcpHost, XmlError> {
    let v4 = around.is_ipv4();
    let mac = match attr(e, "mac") {
        None => None,
        Some(_) if !v4 => {
            return Err(xml(format!(
                "Invalid to specify MAC address '{}' in network '{network}' IPv6 static host definition",
                attr(e, "mac").unwrap_or_default()
            )));
        }
        Some(text) => {
            let mac = mac(&text).ok_or_else(|| {
                xml(format!(
                    "Cannot parse MAC address '{text}' in network '{network}'"
                ))
            })?;
            if mac[0] & 1 != 0 {
                return Err(xml(format!(
                    "expected unicast mac address, found multicast '{text}' in network '{network}'"
                )));
            }
            Some(mac)
        }
    };
    let id = attr(e, "id");
    if let Some(id) = &id
        && !id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '.' | '_' | '*'))
    {
        return Err(xml(format!(
            "Invalid character '{}' in id '{}' of network '{network}'",
            id.chars()
                .find(|c| !c.is_ascii_alphanumeric() && *c != ':')
                .unwrap_or(' ')
                .escape_default(),
            id.escape_default()
        )));
    }
    let name = word(attr(e, "name"), "host name", network)?;
    if let Some(name) = &name
        && !name.starts_with(|c: char| c.is_alphanumeric())
    {
        return Err(xml(format!(
            "Cannot use host name '{name}' in network '{network}'"
        )));
    }
    let address: Option<IpAddr> = match attr(e, "ip") {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| {
            xml(format!(
                "Invalid IP address in static host definition for network '{network}'"
            ))
        })?),
    };
    if address.is_some_and(|a| a.is_ipv4() != v4) {
        return Err(xml(format!(
            "static host address of the wrong family in network '{network}'"
        )));
    }
    if partial {
        if mac.is_none() && id.is_none() && name.is_none() && address.is_none() {
            return Err(xml(format!(
                "At least one of name, mac, or ip attribute must be specified for static host definition in network '{network}'"
            )));
        }
    } else {
        if v4 && mac.is_none() && name.is_none() {
            return Err(xml(format!(
                "Static host definition in IPv4 network '{network}' must have mac or name attribute"
            )));
        }
        if !v4 && name.is_none() && id.is_none() {
            return Err(xml(format!(
                "Static host definition in IPv6 network '{network}' must have id or name attribute"
            )));
        }
        if address.is_none() {
            return Err(xml(format!(
                "Missing IP address in static host definition for network '{network}'"
            )));
        }
    }
    Ok(DhcpHost {
        mac,
        id,
        name,
        address,
        lease: lease(e)?,
    })
}

fn route(e: &Element, network: &str) -> Result<Route, XmlError> {
    let words = |what: &str| xml(format!("{network}: {what}"));
    if attr(e, "address").is_none() {
        return Err(words(
            "Missing required address attribute in route definition",
        ));
    }
    let Some(gateway) = attr(e, "gateway") else {
        return Err(words(
            "Missing required gateway attribute in route definition",
        ));
    };
    let (family, address, netmask, prefix) = placed(e, network)?;
    let gateway: IpAddr = gateway.parse().map_err(|_| {
        words(&format!(
            "Bad network gateway '{gateway}' in route definition"
        ))
    })?;
    if gateway.is_ipv4() != address.is_ipv4() {
        return Err(words("Bad gateway family in route definition"));
    }
    let metric = match attr(e, "metric") {
        None => None,
        Some(text) => match text.parse::<u32>() {
            Ok(metric) if metric > 0 => Some(metric),
            _ => {
                return Err(words(&format!(
                    "Invalid metric '{text}' in route definition"
                )));
            }
        },
    };
    // Without either: everything, or a host.
    let unstated = netmask.is_none() && prefix.is_none();
    let prefix = match (unstated, address.is_unspecified(), address) {
        (true, true, _) => Some(0),
        (true, false, IpAddr::V6(_)) => Some(128),
        _ => prefix,
    };
    let subnet: Option<Subnet> = address::subnet(address, netmask, prefix);
    if subnet.is_none_or(|subnet| subnet.network() != address) {
        return Err(words(&format!(
            "Address '{address}' in route definition is not a network address"
        )));
    }
    Ok(Route {
        family,
        address,
        netmask,
        prefix,
        gateway,
        metric,
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
