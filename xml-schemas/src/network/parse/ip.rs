//! `<ip>` with its DHCP, and `<route>`.

use std::net::IpAddr;

use super::super::{
    DhcpHost, Ip, Lease, LeaseUnit, Range, Route, Subnet, address, error, unsupported, xml,
};
use super::{any_address, attr, invalid_attr, mac, word, yes_no};
use crate::dom::Element;
use crate::error::{ErrorCode, XmlError};

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

pub(super) fn ip(e: &Element, network: &str) -> Result<Ip, XmlError> {
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

pub(in super::super) fn range(e: &Element, ip: &Ip, network: &str) -> Result<Range, XmlError> {
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

pub(in super::super) fn dhcp_host(
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

pub(super) fn route(e: &Element, network: &str) -> Result<Route, XmlError> {
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
