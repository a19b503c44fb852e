//! From a network to text, in libvirt's layout.

use std::net::IpAddr;

use super::port::{Plug, Port};
use super::{
    Bandwidth, DNSMASQ_NAMESPACE, Dns, ForwardMode, Ip, Lease, LeaseUnit, Network, NetworkView,
    PortGroup, mac_text,
};
use crate::dom::{Element, format_element};

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

fn text<T: ToString>(value: Option<T>) -> Option<String> {
    value.map(|v| v.to_string())
}

impl Network {
    /// The document in libvirt's layout.
    pub fn format(&self, view: NetworkView<'_>) -> String {
        let mut out = String::new();
        format_element(&mut out, &self.element(view), 0);
        out
    }

    fn element(&self, view: NetworkView<'_>) -> Element {
        let mut root = Element::new("network");
        if !self.dnsmasq_options.is_empty() {
            root.set_attr("xmlns:dnsmasq", DNSMASQ_NAMESPACE);
        }
        let ports = match view {
            NetworkView::Inactive => &[],
            NetworkView::Active(ports) => ports,
        };
        if !ports.is_empty() {
            root.set_attr("connections", ports.len().to_string());
        }
        if self.ipv6 {
            root.set_attr("ipv6", "yes");
        }
        root.set_opt_attr(
            "trustGuestRxFilters",
            self.trust_guest_rx_filters.map(yes_no),
        );
        root.push(Element::with_text("name", &self.name));
        if let Some(uuid) = self.uuid {
            root.push(Element::with_text("uuid", uuid.to_string()));
        }
        if let Some(title) = &self.title {
            root.push(Element::with_text("title", title));
        }
        if let Some(description) = &self.description {
            root.push(Element::with_text("description", description));
        }
        if let Some(metadata) = &self.metadata {
            root.push(metadata.clone());
        }
        self.push_forward(&mut root, view);
        self.push_bridge(&mut root);
        if let Some(mtu) = self.mtu {
            root.push(Element::new("mtu").with_attr("size", mtu.to_string()));
        }
        if let Some(mac) = self.mac {
            root.push(Element::new("mac").with_attr("address", mac_text(mac)));
        }
        if let Some(domain) = &self.domain
            && (domain.name.is_some() || domain.local_only.is_some())
        {
            let mut e = Element::new("domain");
            e.set_opt_attr("name", domain.name.clone());
            e.set_opt_attr("localOnly", domain.local_only.map(yes_no));
            root.push(e);
        }
        push_dns(&mut root, &self.dns);
        root.children
            .extend(self.vlan.clone().map(crate::dom::Node::Element));
        push_bandwidth(&mut root, self.bandwidth);
        if let Some(isolated) = self.isolated_ports {
            root.push(Element::new("port").with_attr("isolated", yes_no(isolated)));
        }
        for ip in &self.ips {
            root.push(ip_element(ip));
        }
        for route in &self.routes {
            let mut e = Element::new("route");
            e.set_opt_attr("family", route.family.clone());
            e.set_attr("address", route.address.to_string());
            e.set_opt_attr("netmask", text(route.netmask));
            e.set_opt_attr("prefix", text(route.prefix));
            e.set_attr("gateway", route.gateway.to_string());
            e.set_opt_attr("metric", text(route.metric));
            root.push(e);
        }
        root.children
            .extend(self.virtualport.clone().map(crate::dom::Node::Element));
        for group in &self.portgroups {
            root.push(group.element());
        }
        if !self.dnsmasq_options.is_empty() {
            let mut list = Element::new("dnsmasq:options");
            for option in &self.dnsmasq_options {
                list.push(Element::new("dnsmasq:option").with_attr("value", option));
            }
            root.push(list);
        }
        root
    }

    fn push_forward(&self, root: &mut Element, view: NetworkView<'_>) {
        let forward = &self.forward;
        if forward.mode == ForwardMode::None {
            return;
        }
        let mut e = Element::new("forward");
        e.set_opt_attr("dev", forward.interfaces.first().cloned());
        e.set_attr("mode", forward.mode.name());
        if forward.mode == ForwardMode::Hostdev {
            e.set_attr("managed", yes_no(forward.managed));
        }
        if let Some(driver) = &forward.driver {
            e.push(Element::new("driver").with_attr("name", driver));
        }
        if forward.mode == ForwardMode::Nat {
            let mut nat = Element::new("nat");
            if forward.nat.ipv6 {
                nat.set_attr("ipv6", "yes");
            }
            if let Some((start, end)) = forward.nat.addresses {
                nat.push(range_element("address", start, end));
            }
            // What is done where nothing is stated shows while it is done.
            let default = matches!(view, NetworkView::Active(_)).then_some((1024, 65535));
            if let Some((start, end)) = forward.nat.ports.or(default) {
                nat.push(range_element("port", start, end));
            }
            if !nat.is_empty() {
                e.push(nat);
            }
        }
        if let Some(physical) = &forward.physical {
            e.push(Element::new("pf").with_attr("dev", physical));
        }
        // One that nothing but `dev` names would be said twice all the same: so does libvirt.
        for dev in &forward.interfaces {
            let mut interface = Element::new("interface").with_attr("dev", dev);
            let by =
                |port: &&Port| matches!(&port.plug, Some(Plug::Direct { dev: d, .. }) if d == dev);
            let ports = match view {
                NetworkView::Inactive => 0,
                NetworkView::Active(ports) => ports.iter().filter(by).count(),
            };
            if ports > 0 {
                interface.set_attr("connections", ports.to_string());
            }
            e.push(interface);
        }
        for [domain, bus, slot, function] in &forward.addresses {
            e.push(
                Element::new("address")
                    .with_attr("type", "pci")
                    .with_attr("domain", format!("0x{domain:04x}"))
                    .with_attr("bus", format!("0x{bus:02x}"))
                    .with_attr("slot", format!("0x{slot:02x}"))
                    .with_attr("function", format!("0x{function:x}")),
            );
        }
        root.push(e);
    }

    fn push_bridge(&self, root: &mut Element) {
        let own = self.forward.mode.has_own_bridge();
        if !own && self.bridge.is_none() && self.mac_table_manager.is_none() {
            return;
        }
        let mut e = Element::new("bridge");
        e.set_opt_attr("name", self.bridge.clone());
        e.set_opt_attr("zone", self.zone.clone());
        if own {
            e.set_attr("stp", if self.stp { "on" } else { "off" });
            e.set_attr("delay", self.delay.to_string());
        }
        e.set_opt_attr("macTableManager", self.mac_table_manager.clone());
        root.push(e);
    }
}

impl PortGroup {
    /// As an element.
    fn element(&self) -> Element {
        let mut e = Element::new("portgroup").with_attr("name", &self.name);
        if self.default == Some(true) {
            e.set_attr("default", "yes");
        }
        e.set_opt_attr(
            "trustGuestRxFilters",
            self.trust_guest_rx_filters.map(yes_no),
        );
        e.children
            .extend(self.vlan.clone().map(crate::dom::Node::Element));
        push_bandwidth(&mut e, self.bandwidth);
        e.children
            .extend(self.virtualport.clone().map(crate::dom::Node::Element));
        open(&mut e);
        e
    }
}

/// libvirt prints some elements with an end tag of their own, whatever is in them.
fn open(e: &mut Element) {
    if e.children.is_empty() {
        e.children.push(crate::dom::Node::Text("\n  ".into()));
    }
}

fn range_element<T: ToString>(name: &str, start: T, end: T) -> Element {
    Element::new(name)
        .with_attr("start", start.to_string())
        .with_attr("end", end.to_string())
}

pub(super) fn push_bandwidth(parent: &mut Element, bandwidth: Bandwidth) {
    let mut e = Element::new("bandwidth");
    for (direction, rate) in [
        ("inbound", bandwidth.inbound),
        ("outbound", bandwidth.outbound),
    ] {
        if let Some(rate) = rate {
            e.push(rate.element(direction));
        }
    }
    if !e.is_empty() {
        parent.push(e);
    }
}

fn push_dns(root: &mut Element, dns: &Dns) {
    if *dns == Dns::default() {
        return;
    }
    let mut e = Element::new("dns");
    e.set_opt_attr("enable", dns.enable.map(yes_no));
    e.set_opt_attr("forwardPlainNames", dns.forward_plain_names.map(yes_no));
    for forwarder in &dns.forwarders {
        let mut f = Element::new("forwarder");
        f.set_opt_attr("domain", forwarder.domain.clone());
        f.set_opt_attr("addr", text(forwarder.address));
        e.push(f);
    }
    for (name, value) in &dns.txts {
        e.push(
            Element::new("txt")
                .with_attr("name", name)
                .with_attr("value", value),
        );
    }
    for srv in &dns.srvs {
        let mut s = Element::new("srv")
            .with_attr("service", &srv.service)
            .with_attr("protocol", &srv.protocol);
        s.set_opt_attr("domain", srv.domain.clone());
        s.set_opt_attr("target", srv.target.clone());
        s.set_opt_attr("port", text(srv.port));
        s.set_opt_attr("priority", text(srv.priority));
        s.set_opt_attr("weight", text(srv.weight));
        e.push(s);
    }
    for host in &dns.hosts {
        let mut h = Element::new("host");
        h.set_opt_attr("ip", text(host.address));
        for name in &host.names {
            h.push(Element::with_text("hostname", name));
        }
        e.push(h);
    }
    root.push(e);
}

fn push_lease(parent: &mut Element, lease: Option<Lease>) {
    let Some(lease) = lease else { return };
    let mut e = Element::new("lease").with_attr("expiry", lease.expiry.to_string());
    if lease.expiry != 0 {
        e.set_attr(
            "unit",
            match lease.unit {
                Some(LeaseUnit::Seconds) => "seconds",
                None | Some(LeaseUnit::Minutes) => "minutes",
                Some(LeaseUnit::Hours) => "hours",
            },
        );
    }
    parent.push(e);
}

fn ip_element(ip: &Ip) -> Element {
    let mut e = Element::new("ip");
    e.set_opt_attr("family", ip.family.clone());
    e.set_attr("address", ip.address.to_string());
    e.set_opt_attr("netmask", text::<IpAddr>(ip.netmask));
    e.set_opt_attr("prefix", text(ip.prefix));
    e.set_opt_attr("localPtr", ip.local_ptr.map(yes_no));
    if let Some(root) = &ip.tftp_root {
        e.push(Element::new("tftp").with_attr("root", root));
    }
    if ip.has_dhcp() {
        let mut dhcp = Element::new("dhcp");
        for range in &ip.ranges {
            let mut r = range_element("range", range.start, range.end);
            push_lease(&mut r, range.lease);
            dhcp.push(r);
        }
        for host in &ip.hosts {
            let mut h = Element::new("host");
            h.set_opt_attr("mac", host.mac.map(mac_text));
            h.set_opt_attr("id", host.id.clone());
            h.set_opt_attr("name", host.name.clone());
            h.set_opt_attr("ip", text(host.address));
            push_lease(&mut h, host.lease);
            dhcp.push(h);
        }
        if let Some((file, server)) = &ip.bootp {
            let mut b = Element::new("bootp").with_attr("file", file);
            b.set_opt_attr("server", server.clone());
            dhcp.push(b);
        }
        e.push(dhcp);
    }
    open(&mut e);
    e
}
