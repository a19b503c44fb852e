//! What does not go together in a network.

use super::{Dns, ForwardMode, Network, unsupported, xml};
use crate::error::XmlError;

impl Network {
    /// Checks what parts of a definition say about each other.
    pub(super) fn validate(&self) -> Result<(), XmlError> {
        let name = &self.name;
        let mode = self.forward.mode;
        let own = mode.has_own_bridge();
        if !own {
            if !self.ips.is_empty() {
                return Err(forbidden(name, mode, "ip"));
            }
            if self.domain.is_some() {
                return Err(forbidden(name, mode, "domain"));
            }
            if self.dns != Dns::default() {
                return Err(forbidden(name, mode, "dns"));
            }
            if !self.routes.is_empty() {
                return Err(forbidden(name, mode, "route"));
            }
            if self.mtu.is_some() {
                return Err(forbidden(name, mode, "mtu"));
            }
            if self.bandwidth.inbound.is_some() || self.bandwidth.outbound.is_some() {
                return Err(unsupported(format!(
                    "unsupported <bandwidth> element in network '{name}' with forward mode='{}'",
                    mode.name()
                )));
            }
        }
        match mode {
            ForwardMode::Nat | ForwardMode::Route if self.ips.is_empty() => {
                return Err(xml(format!(
                    "{} forwarding requested, but no IP address provided for network '{name}'",
                    mode.name()
                )));
            }
            ForwardMode::Nat | ForwardMode::Route if self.forward.interfaces.len() > 1 => {
                return Err(xml(format!(
                    "multiple forwarding interfaces specified for network '{name}', only one is supported"
                )));
            }
            ForwardMode::Open if !self.forward.interfaces.is_empty() => {
                return Err(xml(format!(
                    "forward dev not allowed for network '{name}' with forward mode='open'"
                )));
            }
            ForwardMode::Bridge if self.bridge.is_some() && !self.forward.interfaces.is_empty() => {
                return Err(xml(format!(
                    "A network with forward mode='bridge' can specify a bridge name or a forward dev, \
                     but not both (network '{name}')"
                )));
            }
            ForwardMode::Private | ForwardMode::Vepa | ForwardMode::Passthrough
                if self.bridge.is_some() =>
            {
                return Err(xml(format!(
                    "bridge name not allowed in {} mode (network '{name}')",
                    mode.name()
                )));
            }
            _ => {}
        }
        let nat = &self.forward.nat;
        if mode != ForwardMode::Nat && (nat.ports.is_some() || nat.addresses.is_some() || nat.ipv6)
        {
            return Err(xml(format!(
                "The <nat> element can only be used when <forward> 'mode' is 'nat' in network {name}"
            )));
        }
        if self.mtu.is_some_and(|mtu| mtu == 0 || mtu > 65535) {
            return Err(xml(format!(
                "Invalid mtu size '{}' in network '{name}'",
                self.mtu.unwrap_or_default()
            )));
        }
        self.validate_addresses()?;
        self.validate_groups()?;
        let groups = self
            .portgroups
            .iter()
            .filter_map(|group| group.vlan.as_ref());
        for vlan in self.vlan.iter().chain(groups) {
            super::vlan::Vlan::read(vlan)?;
        }
        let switch = |port: &Option<crate::dom::Element>| {
            port.as_ref().and_then(|p| p.attr("type")) == Some("openvswitch")
        };
        // A Linux bridge filters VLANs, ours and the host's (as libvirt has it since 11.0).
        let bridge = mode.has_own_bridge() || mode == ForwardMode::Bridge && self.bridge.is_some();
        let can = bridge || switch(&self.virtualport) || mode == ForwardMode::Hostdev;
        if self.has_vlans() && !can {
            return Err(unsupported(format!(
                "<vlan> element specified for network {name}, whose type doesn't support vlan configuration"
            )));
        }
        Ok(())
    }

    fn validate_addresses(&self) -> Result<(), XmlError> {
        let name = &self.name;
        for (v6, words) in [(false, "IPv4"), (true, "IPv6")] {
            let with_dhcp = self
                .ips
                .iter()
                .filter(|ip| ip.address.is_ipv6() == v6 && ip.has_dhcp());
            if with_dhcp.count() > 1 {
                return Err(unsupported(format!(
                    "Multiple {words} dhcp sections found -- dhcp is supported only for a single \
                     {words} address on each network"
                )));
            }
        }
        for route in &self.routes {
            let reached = self
                .ips
                .iter()
                .filter_map(super::Ip::subnet)
                .any(|subnet| subnet.contains(route.gateway));
            if !reached {
                return Err(unsupported(format!(
                    "unreachable static route gateway '{}' specified for network '{name}'",
                    route.gateway
                )));
            }
        }
        for ip in &self.ips {
            for (at, host) in ip.hosts.iter().enumerate() {
                let twice =
                    |same: &dyn Fn(&super::DhcpHost) -> bool| ip.hosts[..at].iter().any(same);
                if let Some(mac) = host.mac
                    && twice(&|h| h.mac == Some(mac))
                {
                    return Err(xml(format!(
                        "network '{name}' has two static hosts with MAC address '{}'",
                        super::mac_text(mac)
                    )));
                }
                if host.address.is_some() && twice(&|h| h.address == host.address) {
                    return Err(xml(format!(
                        "network '{name}' has two static hosts with IP address '{}'",
                        host.address.map(|a| a.to_string()).unwrap_or_default()
                    )));
                }
            }
        }
        Ok(())
    }

    fn validate_groups(&self) -> Result<(), XmlError> {
        let name = &self.name;
        let mut default: Option<&str> = None;
        for (at, group) in self.portgroups.iter().enumerate() {
            if self.portgroups[..at].iter().any(|g| g.name == group.name) {
                return Err(unsupported(format!(
                    "multiple <portgroup> elements with the same name ({}) in network '{name}'",
                    group.name
                )));
            }
            if group.default == Some(true) {
                if let Some(first) = default {
                    return Err(unsupported(format!(
                        "network '{name}' has multiple default <portgroup> elements ({first} and {}), \
                         but only one default is allowed",
                        group.name
                    )));
                }
                default = Some(&group.name);
            }
        }
        Ok(())
    }
}

fn forbidden(name: &str, mode: ForwardMode, element: &str) -> XmlError {
    unsupported(format!(
        "Unsupported <{element}> element in network {name} with forward mode='{}'",
        mode.name()
    ))
}
