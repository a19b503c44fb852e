//! The definition of a virtual network.

mod address;
mod format;
mod parse;
pub mod port;
#[cfg(test)]
mod tests;
mod update;
mod validate;
pub mod vlan;

use std::net::IpAddr;

use uuid::Uuid;

use crate::dom::Element;
use crate::error::{ErrorCode, ErrorDomain, XmlError};

pub use address::Subnet;
pub use parse::mac_text;
pub use update::{Command, Section};

/// The namespace of what is handed to dnsmasq as it is.
pub const DNSMASQ_NAMESPACE: &str = "http://libvirt.org/schemas/network/dnsmasq/1.0";

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its UUID; made when it is first defined.
    pub uuid: Option<Uuid>,
    /// A line for people.
    pub title: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// Each child in a namespace of its own.
    pub metadata: Option<Element>,
    /// IPv6 between guests although the host has no such address in it.
    pub ipv6: bool,
    /// `trustGuestRxFilters`, where it is stated.
    pub trust_guest_rx_filters: Option<bool>,
    /// How packets leave it.
    pub forward: Forward,
    /// The bridge's name.
    pub bridge: Option<String>,
    /// The bridge takes part in the spanning tree protocol.
    pub stp: bool,
    /// The bridge's forward delay, seconds.
    pub delay: u64,
    /// Who keeps the bridge's table of addresses: `kernel` or `libvirt`.
    pub mac_table_manager: Option<String>,
    /// The firewalld zone of the bridge.
    pub zone: Option<String>,
    /// The longest packet, bytes.
    pub mtu: Option<u32>,
    /// The bridge's own hardware address.
    pub mac: Option<[u8; 6]>,
    /// The domain of its names.
    pub domain: Option<DomainName>,
    /// Names that it knows.
    pub dns: Dns,
    /// VLAN tags, as written.
    pub vlan: Option<Element>,
    /// Limits of the network as a whole.
    pub bandwidth: Bandwidth,
    /// Guests cannot reach each other.
    pub isolated_ports: Option<bool>,
    /// The host's addresses in it.
    pub ips: Vec<Ip>,
    /// Other networks behind it.
    pub routes: Vec<Route>,
    /// How guests' cards are joined to a switch, as written.
    pub virtualport: Option<Element>,
    /// Sorts of guests' cards.
    pub portgroups: Vec<PortGroup>,
    /// Lines for dnsmasq's configuration.
    pub dnsmasq_options: Vec<String>,
}

/// How packets leave a network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Forward {
    /// The mode.
    pub mode: ForwardMode,
    /// `managed`, for devices that are handed to guests.
    pub managed: bool,
    /// The driver of such devices.
    pub driver: Option<String>,
    /// What addresses and ports packets get, with mode `nat`.
    pub nat: Nat,
    /// The host's devices that they leave by.
    pub interfaces: Vec<String>,
    /// The physical function whose virtual ones are handed to guests.
    pub physical: Option<String>,
    /// PCI addresses of devices handed to guests: domain, bus, slot, function.
    pub addresses: Vec<[u32; 4]>,
}

/// A forward mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ForwardMode {
    /// Not at all.
    #[default]
    None,
    /// With the host's address.
    Nat,
    /// With the guests' own addresses.
    Route,
    /// As the host's own firewall says.
    Open,
    /// By a bridge that is there, or a macvtap in bridge mode.
    Bridge,
    /// By a macvtap in private mode.
    Private,
    /// By a macvtap in VEPA mode.
    Vepa,
    /// By a macvtap that has its device for itself.
    Passthrough,
    /// By a device of the guest's own.
    Hostdev,
}

impl ForwardMode {
    const NAMES: [(&'static str, Self); 9] = [
        ("none", Self::None),
        ("nat", Self::Nat),
        ("route", Self::Route),
        ("open", Self::Open),
        ("bridge", Self::Bridge),
        ("private", Self::Private),
        ("vepa", Self::Vepa),
        ("passthrough", Self::Passthrough),
        ("hostdev", Self::Hostdev),
    ];

    /// Its name in documents.
    pub fn name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(_, mode)| *mode == self)
            .map_or("none", |(name, _)| name)
    }

    fn of(name: &str) -> Option<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, mode)| *mode)
    }

    /// The network has a bridge of its own.
    pub fn has_own_bridge(self) -> bool {
        matches!(self, Self::None | Self::Nat | Self::Route | Self::Open)
    }
}

/// `<nat>`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Nat {
    /// IPv6 as well.
    pub ipv6: bool,
    /// The first and the last of the addresses that packets get.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// The first and the last port.
    pub ports: Option<(u16, u16)>,
}

/// `<domain>`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DomainName {
    /// Its name.
    pub name: Option<String>,
    /// Nobody else is asked about names in it.
    pub local_only: Option<bool>,
}

/// `<dns>`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dns {
    /// `enable`, where it is stated.
    pub enable: Option<bool>,
    /// `forwardPlainNames`, where it is stated.
    pub forward_plain_names: Option<bool>,
    /// Whom to ask.
    pub forwarders: Vec<Forwarder>,
    /// TXT records: name and value.
    pub txts: Vec<(String, String)>,
    /// SRV records.
    pub srvs: Vec<Srv>,
    /// Addresses with names.
    pub hosts: Vec<DnsHost>,
}

/// `<forwarder>`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarder {
    /// For names in this domain only.
    pub domain: Option<String>,
    /// The server; without one, as for all other names.
    pub address: Option<IpAddr>,
}

/// `<srv>`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Srv {
    /// `ldap`
    pub service: String,
    /// `tcp`
    pub protocol: String,
    /// Whose service it is.
    pub domain: Option<String>,
    /// Who has it.
    pub target: Option<String>,
    /// Where.
    pub port: Option<u16>,
    /// Lowest first.
    pub priority: Option<u16>,
    /// Among those of one priority.
    pub weight: Option<u16>,
}

/// `<host>` in `<dns>`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsHost {
    /// Its address.
    pub address: Option<IpAddr>,
    /// Its names.
    pub names: Vec<String>,
}

/// `<bandwidth>`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bandwidth {
    /// To the guests.
    pub inbound: Option<Rate>,
    /// From the guests.
    pub outbound: Option<Rate>,
}

pub use crate::domain::device::Rate;

/// `<ip>`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ip {
    /// `family` as written.
    pub family: Option<String>,
    /// The host's address.
    pub address: IpAddr,
    /// `netmask` was written, not `prefix`.
    pub netmask: Option<IpAddr>,
    /// `prefix` as written.
    pub prefix: Option<u8>,
    /// `localPtr`, where it is stated.
    pub local_ptr: Option<bool>,
    /// What is served by TFTP.
    pub tftp_root: Option<String>,
    /// Addresses that guests get.
    pub ranges: Vec<Range>,
    /// Guests that always get the same.
    pub hosts: Vec<DhcpHost>,
    /// The file guests boot, and who has it.
    pub bootp: Option<(String, Option<String>)>,
}

/// `<range>`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// The first address.
    pub start: IpAddr,
    /// The last.
    pub end: IpAddr,
    /// How long they are kept.
    pub lease: Option<Lease>,
}

impl Range {
    /// How many addresses are in it.
    pub fn size(&self) -> u32 {
        address::count(self.start, self.end).unwrap_or(0)
    }
}

/// `<lease>`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// In units; 0: for ever.
    pub expiry: u32,
    /// Seconds, minutes or hours, as written; minutes by default.
    pub unit: Option<LeaseUnit>,
}

/// A unit of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseUnit {
    /// Seconds.
    Seconds,
    /// Minutes.
    Minutes,
    /// Hours.
    Hours,
}

/// `<host>` in `<dhcp>`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DhcpHost {
    /// Its hardware address.
    pub mac: Option<[u8; 6]>,
    /// Its DUID.
    pub id: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// The address it gets.
    pub address: Option<IpAddr>,
    /// For how long.
    pub lease: Option<Lease>,
}

/// `<route>`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// `family` as written.
    pub family: Option<String>,
    /// Where to.
    pub address: IpAddr,
    /// `netmask` as written.
    pub netmask: Option<IpAddr>,
    /// `prefix` as written.
    pub prefix: Option<u8>,
    /// By whom.
    pub gateway: IpAddr,
    /// Its cost, where it is stated.
    pub metric: Option<u32>,
}

/// `<portgroup>`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortGroup {
    /// Its name.
    pub name: String,
    /// Cards that name none are in it.
    pub default: Option<bool>,
    /// `trustGuestRxFilters`, where it is stated.
    pub trust_guest_rx_filters: Option<bool>,
    /// VLAN tags, as written.
    pub vlan: Option<Element>,
    /// As written.
    pub virtualport: Option<Element>,
    /// Limits of each card.
    pub bandwidth: Bandwidth,
}

/// Which form of a network is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkView<'a> {
    /// The stored one.
    Inactive,
    /// The running one, with its ports.
    Active(&'a [port::Port]),
}

fn error(code: ErrorCode, message: impl std::fmt::Display) -> XmlError {
    XmlError::new(code, ErrorDomain::Network, message)
}

fn xml(message: impl std::fmt::Display) -> XmlError {
    error(ErrorCode::Xml, message)
}

fn detail(message: impl std::fmt::Display) -> XmlError {
    error(ErrorCode::XmlDetail, message)
}

fn unsupported(message: impl std::fmt::Display) -> XmlError {
    error(ErrorCode::ConfigUnsupported, message)
}

impl Ip {
    /// The network it is in.
    pub fn subnet(&self) -> Option<Subnet> {
        address::subnet(self.address, self.netmask, self.prefix)
    }

    /// It has anything to do with DHCP.
    pub fn has_dhcp(&self) -> bool {
        !self.ranges.is_empty() || !self.hosts.is_empty()
    }
}

impl Route {
    /// Where to.
    pub fn subnet(&self) -> Option<Subnet> {
        address::subnet(self.address, self.netmask, self.prefix)
    }
}

impl Network {
    /// Cards may be in VLANs, so its bridge tells them apart.
    pub fn has_vlans(&self) -> bool {
        self.vlan.is_some() || self.portgroups.iter().any(|group| group.vlan.is_some())
    }

    /// The group that a card is in that names `wanted`, or none.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn portgroup(&self, wanted: Option<&str>) -> Result<Option<&PortGroup>, XmlError> {
        match wanted {
            None => Ok(self.portgroups.iter().find(|g| g.default == Some(true))),
            Some(name) => match self.portgroups.iter().find(|g| g.name == name) {
                Some(group) => Ok(Some(group)),
                None => Err(error(
                    ErrorCode::Internal,
                    format!("network '{}' does not have a portgroup '{name}'", self.name),
                )),
            },
        }
    }
}
