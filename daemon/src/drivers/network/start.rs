//! Starting a network, from a definition to a bridge with everything about it or to nothing at
//! all; and stopping it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::{Arc, PoisonError};

use uuid::Uuid;
use xml_schemas::network::{ForwardMode, Network as Definition, Subnet};

use super::object::{Live, Network};
use super::record::{Folder, Record};
use super::{Driver, cannot, dnsmasq, error, firewall, invalid, program, unsupported};
use crate::drivers::domain::blocking;
use crate::error::{ErrorCode, Result, plain};
use crate::events::NetworkEvent;
use crate::killpoint::killpoint;
use crate::link;

impl Driver {
    /// Starts a network.
    ///
    /// # Errors
    /// It is up; why it cannot be: nothing of the attempt is left then.
    pub async fn start(self: &Arc<Self>, network: &Arc<Network>) -> Result<()> {
        let _job = network.job().await?;
        let definition = {
            let inner = network.lock();
            if inner.live.is_some() {
                return Err(invalid("network is already active"));
            }
            let stored = inner.persistent.clone();
            stored
                .ok_or_else(|| super::no_network(format!("network '{}' is gone", network.name)))?
        };
        let (driver, target) = (Arc::clone(self), Arc::clone(network));
        blocking(move || driver.bring_up(&target, &definition)).await??;
        self.emit(network, NetworkEvent::Started);
        Ok(())
    }

    /// Stops a network. Guests in it stay, without it.
    ///
    /// # Errors
    /// It is not up; something of it does not go.
    pub async fn stop(self: &Arc<Self>, network: &Arc<Network>) -> Result<()> {
        let _job = network.job().await?;
        let live = network
            .lock()
            .live
            .clone()
            .ok_or_else(|| invalid(format!("network '{}' is not active", network.name)))?;
        let (driver, target) = (Arc::clone(self), Arc::clone(network));
        blocking(move || driver.bring_down(&target, &live)).await??;
        self.emit(network, NetworkEvent::Stopped);
        Ok(())
    }

    /// The work of a start. The caller holds the network's job.
    pub(super) fn bring_up(&self, network: &Network, definition: &Arc<Definition>) -> Result<()> {
        check_offered(definition)?;
        let own = definition.forward.mode.has_own_bridge();
        if own {
            self.claim(network, definition)?;
        }
        let brought = self.bring_up_claimed(network, definition);
        if brought.is_err() {
            self.release(network.uuid);
        }
        brought
    }

    fn bring_up_claimed(&self, network: &Network, definition: &Arc<Definition>) -> Result<()> {
        let own = definition.forward.mode.has_own_bridge();
        let bridge = definition.bridge.as_deref().unwrap_or_default();
        if own {
            // Before anything says that it is ours.
            if link::index(bridge).is_ok() {
                return Err(error(
                    ErrorCode::SYSTEM_ERROR,
                    format!("Unable to create bridge {bridge}: File exists"),
                ));
            }
            if dnsmasq::needed(definition) {
                dnsmasq::check(definition)?;
                program::find("dnsmasq")?;
            }
            if firewall::needed(definition) {
                program::find("nft")?;
            }
        }
        let folder = Folder::make(self.folder(network.uuid))
            .map_err(|e| cannot("cannot make the network's state folder", &e))?;
        let record = Record::new(self.boot_id.clone());
        let mut live = Live {
            definition: Arc::clone(definition),
            record,
            folder,
        };
        let written = live
            .folder
            .write_definition(definition)
            .and_then(|()| live.folder.write_record(&live.record))
            .map_err(|e| cannot("cannot write the network's state", &e));
        killpoint("network.recorded");
        let made = written.and_then(|()| {
            if own {
                self.make(network, &mut live)
            } else {
                Ok(())
            }
        });
        let noted = made.and_then(|()| {
            live.record.started = true;
            let written = live.folder.write_record(&live.record);
            written.map_err(|e| cannot("cannot write the network's state", &e))
        });
        if let Err(error) = noted {
            for again in self.take_back(network, &live) {
                log::error!("network '{}': {again}", network.name);
            }
            return Err(error);
        }
        network.lock().live = Some(live);
        killpoint("network.started");
        Ok(())
    }

    /// Bridge, rules, and what [`Self::make_served`] makes.
    fn make(&self, network: &Network, live: &mut Live) -> Result<()> {
        let definition = Arc::clone(&live.definition);
        let bridge = definition.bridge.as_deref().unwrap_or_default();
        let settings = link::Bridge {
            name: bridge,
            mac: definition.mac.unwrap_or([0x52, 0x54, 0, 0, 0, 1]),
            mtu: definition.mtu,
            stp: definition.stp,
            delay: definition.delay,
            vlans: definition.has_vlans(),
        };
        link::make_bridge(settings).map_err(|e| {
            if settings.vlans && e.raw_os_error() == Some(libc::EOPNOTSUPP) {
                return unsupported(format!(
                    "network '{}' has VLANs, which bridges of this host's kernel do not filter \
                     (CONFIG_BRIDGE_VLAN_FILTERING)",
                    network.name
                ));
            }
            match settings
                .mtu
                .filter(|_| e.raw_os_error() == Some(libc::EINVAL))
            {
                Some(_) => cannot(format!("Cannot set interface MTU on '{bridge}'"), &e),
                None => cannot(format!("Unable to create bridge {bridge}"), &e),
            }
        })?;
        killpoint("network.bridge-made");
        // The kernel takes its time for rules, and dnsmasq to come up: both at once. Nobody is on
        // the bridge before both are there.
        let rules = || firewall::make(network.uuid, &definition);
        let (made, ruled) = beside(&rules, || self.make_served(network, live, bridge));
        made.and(ruled)?;
        killpoint("network.rules-made");
        if live.record.dnsmasq.is_some() {
            killpoint("network.dnsmasq-started");
        }
        Ok(())
    }

    /// The addresses of a bridge that is there, its routes, dnsmasq.
    fn make_served(&self, network: &Network, live: &mut Live, bridge: &str) -> Result<()> {
        let definition = Arc::clone(&live.definition);
        let index = link::index(bridge)
            .map_err(|e| cannot(format!("Cannot get interface index on {bridge}"), &e))?;
        let v6 = definition.ips.iter().any(|ip| ip.address.is_ipv6());
        host_ipv6(bridge, v6 || definition.ipv6)?;
        for subnet in definition.ips.iter().filter_map(|ip| ip.subnet()) {
            link::add_address(index, subnet).map_err(|e| {
                cannot(
                    format!("cannot give bridge {bridge} the address {}", subnet.address),
                    &e,
                )
            })?;
        }
        let up = link::Settings {
            up: Some(true),
            ..link::Settings::default()
        };
        link::set(index, up).map_err(|e| cannot(format!("cannot set bridge {bridge} up"), &e))?;
        for route in &definition.routes {
            let Some(to) = route.subnet() else { continue };
            /// As libvirt has it where a definition does not say.
            const METRIC: u32 = 1;
            link::add_route(index, to, route.gateway, route.metric.unwrap_or(METRIC)).map_err(
                |e| {
                    cannot(
                        format!("cannot add the route to {to} by {}", route.gateway),
                        &e,
                    )
                },
            )?;
        }
        if definition.forward.mode != ForwardMode::None {
            if definition.ips.iter().any(|ip| ip.address.is_ipv4()) {
                program::set_kernel("/proc/sys/net/ipv4/ip_forward", "1")?;
            }
            if v6 {
                check_accepted_routes()?;
                program::set_kernel("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
            }
        }
        if dnsmasq::needed(&definition) {
            let place = self.place(network, &live.folder);
            dnsmasq::write(&place, &definition)?;
            live.record.dnsmasq = Some(dnsmasq::start(&place)?);
        }
        Ok(())
    }

    /// The work of a stop. The caller holds the network's job.
    pub(super) fn bring_down(&self, network: &Network, live: &Live) -> Result<()> {
        let faults = self.take_back(network, live);
        let transient = {
            let mut inner = network.lock();
            inner.live = None;
            inner.persistent.is_none()
        };
        if transient {
            self.forget_leases(network);
        }
        match faults.into_iter().next() {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Takes back everything a start made, as far as it is there; says what did not go.
    pub(super) fn take_back(&self, network: &Network, live: &Live) -> Vec<crate::error::Error> {
        let mut faults = Vec::new();
        let definition = &live.definition;
        if definition.forward.mode.has_own_bridge() {
            let bridge = definition.bridge.as_deref().unwrap_or_default();
            // While the network was not up yet, one of that name may be somebody else's.
            let ours = live.record.started
                || link::mac(bridge).is_some_and(|mac| Some(mac) == definition.mac);
            // Each waits for somebody else: dnsmasq, the kernel.
            let end_dnsmasq = || match live.record.dnsmasq {
                Some(identity) => dnsmasq::stop(identity),
                None => {
                    dnsmasq::stop_unknown(&self.place(network, &live.folder));
                    Ok(())
                }
            };
            let remove_rules = || match firewall::needed(definition) {
                true => firewall::remove(network.uuid),
                false => Ok(()),
            };
            let remove_bridge = || match ours {
                true => link::remove(bridge)
                    .map_err(|e| cannot(format!("Unable to delete bridge {bridge}"), &e)),
                false => Ok(()),
            };
            let ((bridge, rules), dnsmasq) =
                beside(&end_dnsmasq, || beside(&remove_rules, remove_bridge));
            let all = [dnsmasq, rules, bridge];
            faults.extend(all.into_iter().filter_map(Result::err));
        }
        live.folder.remove();
        self.release(network.uuid);
        faults
    }

    /// Makes sure that nobody else has the network's addresses, and keeps them.
    fn claim(&self, network: &Network, definition: &Definition) -> Result<()> {
        let wanted: Vec<Subnet> = definition.ips.iter().filter_map(|ip| ip.subnet()).collect();
        let targets = definition.routes.iter().filter_map(|route| route.subnet());
        let all: Vec<Subnet> = wanted.iter().copied().chain(targets).collect();
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        for (uuid, taken) in claims.iter() {
            let clash = taken.iter().any(|t| wanted.iter().any(|w| w.overlaps(*t)));
            if *uuid != network.uuid && clash {
                let other = self.registry.by_uuid(*uuid);
                let bridge = other
                    .ok()
                    .and_then(|n| n.lock().definition()?.bridge.clone());
                return Err(error(
                    ErrorCode::INTERNAL_ERROR,
                    format!(
                        "Network is already in use by interface {}",
                        bridge.as_deref().unwrap_or("of another network")
                    ),
                ));
            }
        }
        if let Some(device) = routed(&all)? {
            return Err(error(
                ErrorCode::INTERNAL_ERROR,
                format!("Network is already in use by interface {device}"),
            ));
        }
        claims.insert(network.uuid, wanted);
        Ok(())
    }

    /// Keeps the addresses of a network that an earlier daemon started.
    pub(super) fn claim_running(&self, network: &Network, definition: &Definition) {
        let subnets = definition.ips.iter().filter_map(|ip| ip.subnet()).collect();
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        claims.insert(network.uuid, subnets);
    }

    fn release(&self, uuid: Uuid) {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        claims.remove(&uuid);
    }
}

/// Does `work` on a thread of its own while `own` runs; after it where the system has no thread.
fn beside<T>(work: &(dyn Fn() -> Result<()> + Sync), own: impl FnOnce() -> T) -> (T, Result<()>) {
    std::thread::scope(|scope| {
        let named = std::thread::Builder::new().name("network".to_owned());
        let thread = named.spawn_scoped(scope, work);
        let done = own();
        let worked = match thread {
            Ok(thread) => thread.join().unwrap_or_else(|_| {
                Err(error(
                    ErrorCode::INTERNAL_ERROR,
                    "a network's thread ended badly",
                ))
            }),
            Err(error) => {
                log::warn!("no thread for a network: {error}");
                work()
            }
        };
        (done, worked)
    })
}

/// What is not there is refused by its name.
fn check_offered(definition: &Definition) -> Result<()> {
    let name = &definition.name;
    if definition.forward.mode == ForwardMode::Hostdev {
        return Err(unsupported(format!(
            "network '{name}': forward mode='hostdev' needs host devices in guests, which there are not yet"
        )));
    }
    if definition.mac_table_manager.as_deref() == Some("libvirt") {
        return Err(unsupported(format!(
            "network '{name}': macTableManager='libvirt' is not offered, only 'kernel'"
        )));
    }
    if let Some(zone) = &definition.zone {
        return Err(unsupported(format!(
            "zone {zone} requested for network {name} but firewalld is not used"
        )));
    }
    let mode = definition.forward.mode;
    let needs_device = matches!(
        mode,
        ForwardMode::Private | ForwardMode::Vepa | ForwardMode::Passthrough
    );
    let bridge = mode == ForwardMode::Bridge;
    if (needs_device && definition.forward.interfaces.is_empty())
        || (bridge && definition.forward.interfaces.is_empty() && definition.bridge.is_none())
    {
        log::warn!("network '{name}' is up, and guests can't use it: it names no device");
    }
    Ok(())
}

/// What the host's IPv6 does on the bridge: as a router it learns nothing from others, and where
/// it has no address it keeps out.
fn host_ipv6(bridge: &str, on: bool) -> Result<()> {
    let folder = format!("/proc/sys/net/ipv6/conf/{bridge}");
    if !Path::new(&folder).exists() {
        return if on {
            Err(error(
                ErrorCode::INTERNAL_ERROR,
                format!("the kernel has no IPv6, which bridge {bridge} needs"),
            ))
        } else {
            Ok(())
        };
    }
    program::set_kernel(
        &format!("{folder}/disable_ipv6"),
        if on { "0" } else { "1" },
    )?;
    program::set_kernel(&format!("{folder}/accept_ra"), "0")?;
    program::set_kernel(&format!("{folder}/autoconf"), "0")
}

/// A host that becomes a router forgets the routes it has learnt from routers, unless it is told
/// to keep them (the kernel's ip-sysctl, accept_ra).
fn check_accepted_routes() -> Result<()> {
    /// RTF_ADDRCONF
    const LEARNT: u32 = 0x0004_0000;
    let text = match fs::read_to_string("/proc/net/ipv6_route") {
        Ok(text) => text,
        Err(_) => return Ok(()),
    };
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(flags), Some(device)) = (words.get(8), words.get(9)) else {
            continue;
        };
        let learnt = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & LEARNT != 0);
        let kept = || fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{device}/accept_ra"));
        if learnt && kept().is_ok_and(|value| value.trim() != "2") {
            return Err(error(
                ErrorCode::INTERNAL_ERROR,
                format!(
                    "Check the host setup: interface {device} has kernel autoconfigured IPv6 routes and \
                     enabling forwarding without accept_ra set to 2 will cause the kernel to flush them, \
                     breaking networking."
                ),
            ));
        }
    }
    Ok(())
}

/// The device of a route of the host's that one of these networks would take over. A wider route
/// by a gateway is none: the network is a part of what is behind it, and the nearer one counts.
fn routed(wanted: &[Subnet]) -> Result<Option<String>> {
    let unreadable = |e: std::io::Error| {
        error(
            ErrorCode::SYSTEM_ERROR,
            format!("cannot read the host's routes: {}", plain(&e)),
        )
    };
    let mut routes = parse_v4(&fs::read_to_string("/proc/net/route").map_err(unreadable)?);
    match fs::read_to_string("/proc/net/ipv6_route") {
        Ok(text) => routes.extend(parse_v6(&text)),
        // A kernel without IPv6.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(unreadable(error)),
    }
    let clash = routes.into_iter().find(|(route, by_gateway, _)| {
        wanted
            .iter()
            .any(|wanted| wanted.overlaps(*route) && !(*by_gateway && route.prefix < wanted.prefix))
    });
    Ok(clash.map(|(_, _, device)| device))
}

type HostRoute = (Subnet, bool, String);

/// Lines of /proc/net/route (proc(5)): device, destination, gateway, flags…, mask; numbers are in
/// the machine's byte order.
fn parse_v4(text: &str) -> Vec<HostRoute> {
    let route = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let hex = |at: usize| u32::from_str_radix(words.get(at)?, 16).ok();
        let address = |value: u32| Ipv4Addr::from(value.to_ne_bytes());
        let prefix = address(hex(7)?).to_bits().leading_ones() as u8;
        let subnet = Subnet {
            address: IpAddr::V4(address(hex(1)?)),
            prefix,
        };
        (prefix > 0).then(|| (subnet, hex(2) != Some(0), words[0].to_owned()))
    };
    text.lines().skip(1).filter_map(route).collect()
}

/// Lines of /proc/net/ipv6_route: destination, prefix, source, prefix, gateway, metric, …, flags,
/// device.
fn parse_v6(text: &str) -> Vec<HostRoute> {
    let route = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let address = |at: usize| {
            Some(Ipv6Addr::from_bits(
                u128::from_str_radix(words.get(at)?, 16).ok()?,
            ))
        };
        let prefix = u8::from_str_radix(words.get(1)?, 16).ok()?;
        let to = address(0)?;
        // Every device has these.
        let local = to.is_multicast() || to.is_unicast_link_local();
        let subnet = Subnet {
            address: IpAddr::V6(to),
            prefix,
        };
        let by_gateway = !address(4)?.is_unspecified();
        let device = *words.get(9)?;
        (prefix > 0 && !local && device != "lo").then(|| (subnet, by_gateway, device.to_owned()))
    };
    text.lines().filter_map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_routes_are_read() {
        let text = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                    eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                    eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
                    tun0\t0000000A\t0100A8C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0\n";
        let routes = parse_v4(text);
        assert_eq!(routes.len(), 2);
        assert_eq!(
            (routes[0].0.to_string().as_str(), routes[0].1),
            ("192.168.0.0/16", false)
        );
        assert_eq!(
            (routes[1].0.to_string().as_str(), routes[1].1),
            ("10.0.0.0/8", true)
        );
        let text = "fd000000000000000000000000000000 40 00000000000000000000000000000000 00 \
                    00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n\
                    fe800000000000000000000000000000 40 00000000000000000000000000000000 00 \
                    00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n";
        let routes = parse_v6(text);
        assert_eq!(routes.len(), 1);
        assert_eq!(routes[0].0.to_string(), "fd00::/64");
    }
}
