//! Changing parts of a network (`net-update`).

use super::parse;
use super::{DhcpHost, Ip, Network, error, mac_text, xml};
use crate::dom::{self, Element, format_element};
use crate::error::{ErrorCode, XmlError};

/// What is done (virNetworkUpdateCommand).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// What is there gets another value.
    Modify,
    /// It goes.
    Delete,
    /// It comes, after the others.
    AddLast,
    /// It comes, before the others.
    AddFirst,
}

impl Command {
    /// From virNetworkUpdateCommand.
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Modify),
            2 => Some(Self::Delete),
            3 => Some(Self::AddLast),
            4 => Some(Self::AddFirst),
            _ => None,
        }
    }
}

/// To what (virNetworkUpdateSection).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// `<host>` in `<dhcp>`.
    DhcpHost,
    /// `<range>`
    DhcpRange,
    /// `<interface>` in `<forward>`.
    ForwardInterface,
    /// `<portgroup>`
    PortGroup,
    /// `<host>` in `<dns>`.
    DnsHost,
    /// `<txt>`
    DnsTxt,
    /// `<srv>`
    DnsSrv,
    /// What cannot be changed so, by its name.
    Fixed(&'static str),
}

impl Section {
    /// From virNetworkUpdateSection.
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Fixed("bridge"),
            2 => Self::Fixed("domain"),
            3 => Self::Fixed("ip"),
            4 => Self::DhcpHost,
            5 => Self::DhcpRange,
            6 => Self::Fixed("forward"),
            7 => Self::ForwardInterface,
            8 => Self::Fixed("forward-pf"),
            9 => Self::PortGroup,
            10 => Self::DnsHost,
            11 => Self::DnsTxt,
            12 => Self::DnsSrv,
            _ => return None,
        })
    }

    fn element(self) -> &'static str {
        match self {
            Self::DhcpHost | Self::DnsHost => "host",
            Self::DhcpRange => "range",
            Self::ForwardInterface => "interface",
            Self::PortGroup => "portgroup",
            Self::DnsTxt => "txt",
            Self::DnsSrv => "srv",
            Self::Fixed(name) => name,
        }
    }
}

fn invalid(message: impl std::fmt::Display) -> XmlError {
    error(ErrorCode::OperationInvalid, message)
}

fn fixed(what: &str) -> XmlError {
    error(
        ErrorCode::OperationUnsupported,
        format!("{what} cannot be modified, only added or deleted"),
    )
}

/// Adds to a list, at one of its ends.
fn add<T>(list: &mut Vec<T>, item: T, command: Command) {
    match command {
        Command::AddFirst => list.insert(0, item),
        _ => list.push(item),
    }
}

impl Network {
    /// Does one change; `index` says to which `<ip>`, -1 leaves the choice.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID: there is such a thing already, or none; VIR_ERR_XML_ERROR and
    /// others for what the result would be. The network may be half changed then.
    pub fn update(
        &mut self,
        command: Command,
        section: Section,
        index: i32,
        text: &str,
    ) -> Result<(), XmlError> {
        if let Section::Fixed(what) = section {
            return Err(error(
                ErrorCode::OperationUnsupported,
                format!("can't update '{what}' section of network '{}'", self.name),
            ));
        }
        let e = dom::parse(text, "(network_update_xml)")?;
        if e.name != section.element() {
            return Err(xml(format!(
                "unexpected element <{}>, expecting <{}>, while updating network '{}'",
                e.name,
                section.element(),
                self.name
            )));
        }
        match section {
            Section::DhcpHost => self.update_dhcp_host(command, index, &e)?,
            Section::DhcpRange => self.update_range(command, index, &e)?,
            Section::ForwardInterface => self.update_interface(command, &e)?,
            Section::PortGroup => self.update_portgroup(command, &e)?,
            Section::DnsHost => self.update_dns_host(command, &e)?,
            Section::DnsTxt => self.update_txt(command, &e)?,
            Section::DnsSrv => self.update_srv(command, &e)?,
            Section::Fixed(_) => {}
        }
        self.validate()
    }

    /// The `<ip>` that is meant.
    fn ip_at(&mut self, index: i32, what: &str) -> Result<&mut Ip, XmlError> {
        let name = self.name.clone();
        if let Ok(index) = usize::try_from(index) {
            return self.ips.get_mut(index).ok_or_else(|| {
                invalid(format!(
                    "couldn't update {what} entry - no <ip> element found at index {index} in network '{name}'"
                ))
            });
        }
        // The one that has DHCP, else the first IPv4 one.
        let with = self.ips.iter().position(Ip::has_dhcp);
        let first = || self.ips.iter().position(|ip| ip.address.is_ipv4());
        let at = with
            .or_else(first)
            .or(if self.ips.is_empty() { None } else { Some(0) });
        match at.and_then(|at| self.ips.get_mut(at)) {
            Some(ip) => Ok(ip),
            None => Err(invalid(format!(
                "couldn't update {what} entry - no <ip> element found in network '{name}'"
            ))),
        }
    }

    fn update_dhcp_host(
        &mut self,
        command: Command,
        index: i32,
        e: &Element,
    ) -> Result<(), XmlError> {
        let name = self.name.clone();
        let ip = self.ip_at(index, "dhcp host")?;
        let host = parse::dhcp_host(e, ip.address, &name, command == Command::Delete)?;
        match command {
            Command::Modify => {
                let same = |known: &&mut DhcpHost| {
                    (host.mac.is_some() && known.mac == host.mac)
                        || (host.id.is_some() && known.id == host.id)
                        || (host.name.is_some() && known.name == host.name)
                        || (host.address.is_some() && known.address == host.address)
                };
                match ip.hosts.iter_mut().find(same) {
                    Some(known) => *known = host,
                    None => {
                        return Err(invalid(format!(
                            "couldn't locate an existing dhcp host entry with \"mac='{}'\" \"name='{}'\" \
                             \"ip='{}'\" in network '{name}'",
                            host.mac.map_or("unknown".into(), mac_text),
                            host.name.unwrap_or_else(|| "(null)".into()),
                            host.address.map_or("unknown".into(), |a| a.to_string()),
                        )));
                    }
                }
            }
            Command::AddFirst | Command::AddLast => {
                let same = |known: &DhcpHost| {
                    (host.mac.is_some() && known.mac == host.mac)
                        || (host.id.is_some() && known.id == host.id)
                        // IPv4 hosts of one name may have several cards.
                        || (host.mac.is_none() && host.name.is_some() && known.name == host.name)
                        || (host.address.is_some() && known.address == host.address)
                };
                if ip.hosts.iter().any(same) {
                    return Err(invalid(format!(
                        "there is an existing dhcp host entry in network '{name}' that matches \"{}\"",
                        one_line(e)
                    )));
                }
                add(&mut ip.hosts, host, command);
            }
            Command::Delete => {
                let same = |known: &DhcpHost| {
                    (host.mac.is_none() || known.mac == host.mac)
                        && (host.id.is_none() || known.id == host.id)
                        && (host.name.is_none() || known.name == host.name)
                        && (host.address.is_none() || known.address == host.address)
                };
                match ip.hosts.iter().position(same) {
                    Some(at) => drop(ip.hosts.remove(at)),
                    None => {
                        return Err(invalid(format!(
                            "couldn't locate a matching dhcp host entry in network '{name}'"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    fn update_range(&mut self, command: Command, index: i32, e: &Element) -> Result<(), XmlError> {
        if command == Command::Modify {
            return Err(fixed("dhcp ranges"));
        }
        let name = self.name.clone();
        let ip = self.ip_at(index, "dhcp range")?;
        let range = parse::range(e, ip, &name)?;
        let at = ip
            .ranges
            .iter()
            .position(|known| known.start == range.start && known.end == range.end);
        match (command, at) {
            (Command::Delete, Some(at)) => drop(ip.ranges.remove(at)),
            (Command::Delete, None) => {
                return Err(invalid(format!(
                    "couldn't locate a matching dhcp range entry in network '{name}'"
                )));
            }
            (_, Some(_)) => {
                return Err(invalid(format!(
                    "there is an existing dhcp range entry in network '{name}' that matches \
                     \"<range start='{}' end='{}'/>\"",
                    range.start, range.end
                )));
            }
            (_, None) => add(&mut ip.ranges, range, command),
        }
        Ok(())
    }

    fn update_interface(&mut self, command: Command, e: &Element) -> Result<(), XmlError> {
        if command == Command::Modify {
            return Err(fixed("forward interface entries"));
        }
        let name = &self.name;
        let dev = e.attr("dev").unwrap_or_default().to_owned();
        if dev.is_empty() {
            return Err(xml(format!(
                "Missing required dev attribute in <forward> <interface> element of network {name}"
            )));
        }
        parse::device_name(&dev, name)?;
        let list = &mut self.forward.interfaces;
        let at = list.iter().position(|known| *known == dev);
        match (command, at) {
            (Command::Delete, Some(at)) => drop(list.remove(at)),
            (Command::Delete, None) => {
                return Err(invalid(format!(
                    "couldn't find an interface entry in network '{name}' matching <interface dev='{dev}'>"
                )));
            }
            (_, Some(_)) => {
                return Err(invalid(format!(
                    "there is an existing interface entry in network '{name}' that matches \
                     \"<interface dev='{dev}'>\""
                )));
            }
            (_, None) => add(list, dev, command),
        }
        Ok(())
    }

    fn update_portgroup(&mut self, command: Command, e: &Element) -> Result<(), XmlError> {
        let group = parse::portgroup(e)?;
        let (name, wanted) = (&self.name, group.name.clone());
        let list = &mut self.portgroups;
        let at = list.iter().position(|known| known.name == wanted);
        match (command, at) {
            (Command::Modify | Command::Delete, None) => {
                return Err(invalid(format!(
                    "couldn't find a portgroup entry in network '{name}' matching <portgroup name='{wanted}'>"
                )));
            }
            (Command::AddFirst | Command::AddLast, Some(_)) => {
                return Err(invalid(format!(
                    "there is an existing portgroup entry in network '{name}' that matches \
                     \"<portgroup name='{wanted}'>\""
                )));
            }
            (Command::Modify, Some(at)) => list[at] = group,
            (Command::Delete, Some(at)) => drop(list.remove(at)),
            (_, None) => add(list, group, command),
        }
        Ok(())
    }

    fn update_dns_host(&mut self, command: Command, e: &Element) -> Result<(), XmlError> {
        if command == Command::Modify {
            return Err(fixed("DNS HOST records"));
        }
        let delete = command == Command::Delete;
        let host = parse::dns_host(e, &self.name, delete)?;
        let (name, list) = (&self.name, &mut self.dns.hosts);
        let shared = |known: &super::DnsHost| host.names.iter().any(|n| known.names.contains(n));
        let matches: Vec<usize> = list
            .iter()
            .enumerate()
            .filter(|(_, known)| {
                let at_address = host.address.is_some() && known.address == host.address;
                if delete {
                    (host.address.is_none() || at_address)
                        && (host.names.is_empty() || shared(known))
                } else {
                    at_address || shared(known)
                }
            })
            .map(|(at, _)| at)
            .collect();
        match (delete, matches.as_slice()) {
            (true, [at]) => drop(list.remove(*at)),
            (true, []) => {
                return Err(invalid(format!(
                    "couldn't locate a matching DNS HOST record in network {name}"
                )));
            }
            (true, _) => {
                return Err(invalid(format!(
                    "multiple matching DNS HOST records were found in network {name}"
                )));
            }
            (false, []) => add(list, host, command),
            (false, _) => {
                return Err(invalid(format!(
                    "there is already at least one DNS HOST record with a matching field in network {name}"
                )));
            }
        }
        Ok(())
    }

    fn update_txt(&mut self, command: Command, e: &Element) -> Result<(), XmlError> {
        if command == Command::Modify {
            return Err(fixed("DNS TXT records"));
        }
        let txt = parse::txt(e, &self.name, command == Command::Delete)?;
        let (name, list) = (&self.name, &mut self.dns.txts);
        let at = list.iter().position(|known| known.0 == txt.0);
        match (command, at) {
            (Command::Delete, Some(at)) => drop(list.remove(at)),
            (Command::Delete, None) => {
                return Err(invalid(format!(
                    "couldn't locate a matching DNS TXT record in network {name}"
                )));
            }
            (_, Some(_)) => {
                return Err(invalid(format!(
                    "there is already a DNS TXT record with name '{}' in network {name}",
                    txt.0
                )));
            }
            (_, None) => add(list, txt, command),
        }
        Ok(())
    }

    fn update_srv(&mut self, command: Command, e: &Element) -> Result<(), XmlError> {
        if command == Command::Modify {
            return Err(fixed("DNS SRV records"));
        }
        let delete = command == Command::Delete;
        let srv = parse::srv(e, &self.name, delete)?;
        let (name, list) = (&self.name, &mut self.dns.srvs);
        let fits = |known: &super::Srv| {
            (srv.service.is_empty() || known.service == srv.service)
                && (srv.protocol.is_empty() || known.protocol == srv.protocol)
                && (srv.domain.is_none() || known.domain == srv.domain)
                && (srv.target.is_none() || known.target == srv.target)
                && (srv.port.is_none() || known.port == srv.port)
                && (srv.priority.is_none() || known.priority == srv.priority)
                && (srv.weight.is_none() || known.weight == srv.weight)
        };
        let matches: Vec<usize> = (0..list.len()).filter(|at| fits(&list[*at])).collect();
        match (delete, matches.as_slice()) {
            (true, [at]) => drop(list.remove(*at)),
            (true, []) => {
                return Err(invalid(format!(
                    "couldn't locate a matching DNS SRV record in network {name}"
                )));
            }
            (true, _) => {
                return Err(invalid(format!(
                    "multiple DNS SRV records matching all specified fields were found in network {name}"
                )));
            }
            (false, []) => add(list, srv, command),
            (false, _) => {
                return Err(invalid(format!(
                    "there is already at least one DNS SRV record matching all specified fields in network {name}"
                )));
            }
        }
        Ok(())
    }
}

/// As libvirt shows an element without children in a message.
fn one_line(e: &Element) -> String {
    let mut bare = e.clone();
    bare.children.clear();
    let mut out = String::new();
    format_element(&mut out, &bare, 0);
    out.trim_end().to_owned()
}
