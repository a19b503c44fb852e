//! `<dns>`.

use super::super::{Dns, DnsHost, Forwarder, Srv, detail, xml};
use super::{attr, plain_words, word, yes_no};
use crate::dom::Element;
use crate::error::XmlError;

pub(super) fn dns(e: &Element, network: &str) -> Result<Dns, XmlError> {
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
pub(in super::super) fn txt(
    e: &Element,
    network: &str,
    partial: bool,
) -> Result<(String, String), XmlError> {
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

pub(in super::super) fn srv(e: &Element, network: &str, partial: bool) -> Result<Srv, XmlError> {
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

pub(in super::super) fn dns_host(
    e: &Element,
    network: &str,
    partial: bool,
) -> Result<DnsHost, XmlError> {
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
