//! Guests' cards in networks.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::PoisonError;

use uuid::Uuid;
use xml_schemas::dom::Element;
use xml_schemas::network::port::{Plug, Port};
use xml_schemas::network::vlan::Vlan;
use xml_schemas::network::{Bandwidth, ForwardMode, Network as Definition, Rate};

use super::object::{Live, Network};
use super::record::Folder;
use super::{Driver, cannot, error, invalid, unsupported};
use crate::error::{ErrorCode, Result};

/// Whose card it is.
#[derive(Debug, Clone)]
pub struct Owner {
    /// The domain's name.
    pub name: String,
    /// Its uuid.
    pub uuid: Uuid,
}

/// A card's place in a network.
#[derive(Debug)]
pub struct Plugged {
    /// The port's uuid.
    pub port: Uuid,
    /// The port is there as long as this file is.
    pub file: PathBuf,
    /// How the card is connected.
    pub plug: Plug,
    /// It does not reach other isolated ports.
    pub isolated: bool,
    /// The network's longest packet.
    pub mtu: Option<u16>,
    /// Limits of its group.
    pub bandwidth: Bandwidth,
    /// The VLANs that it is in.
    pub vlan: Option<Vlan>,
}

impl Driver {
    /// Gives a card a place.
    ///
    /// # Errors
    /// There is no such network or group, it is not up, or has no device to give.
    pub fn plug(
        &self,
        name: &str,
        group: Option<&str>,
        vlan: Option<&Element>,
        owner: &Owner,
        mac: [u8; 6],
    ) -> Result<Plugged> {
        let network = self.registry.by_name(name)?;
        let port = Port {
            uuid: Uuid::new_v4(),
            owner: owner.name.clone(),
            owner_uuid: owner.uuid,
            group: group.map(str::to_owned),
            mac,
            virtualport: None,
            bandwidth: Bandwidth::default(),
            vlan: vlan.cloned(),
            isolated: None,
            trust_guest_rx_filters: None,
            plug: None,
        };
        let (live, port) = self.make_port(&network, port)?;
        Ok(Plugged {
            port: port.uuid,
            file: live.folder.port(port.uuid),
            isolated: port.isolated == Some(true),
            mtu: live.definition.mtu.and_then(|mtu| u16::try_from(mtu).ok()),
            bandwidth: port.bandwidth,
            vlan: port.vlan.as_ref().map(Vlan::read).transpose()?,
            plug: port.plug.ok_or_else(|| no_device(&network.name))?,
        })
    }

    /// Fills what a port gets from its network, and keeps it.
    ///
    /// # Errors
    /// As [`Driver::plug`].
    pub fn make_port(&self, network: &Network, mut port: Port) -> Result<(Live, Port)> {
        let live = running(network)?;
        let definition = &live.definition;
        let group = definition.portgroup(port.group.as_deref())?;
        let virtualport = group
            .and_then(|g| g.virtualport.as_ref())
            .or(definition.virtualport.as_ref());
        if let Some(kind) = virtualport.and_then(|v| v.attr("type")) {
            return Err(unsupported(format!(
                "network '{}': virtualport type='{kind}' is not offered",
                network.name
            )));
        }
        if let Some(group) = group {
            port.group = Some(group.name.clone());
            if port.bandwidth == Bandwidth::default() {
                port.bandwidth = group.bandwidth;
            }
        }
        port.trust_guest_rx_filters = port
            .trust_guest_rx_filters
            .or(group.and_then(|g| g.trust_guest_rx_filters))
            .or(definition.trust_guest_rx_filters);
        port.isolated = port.isolated.or(definition.isolated_ports);
        // The card's own come first, then its group's, then the network's.
        port.vlan = port
            .vlan
            .take()
            .or_else(|| group.and_then(|g| g.vlan.clone()))
            .or_else(|| definition.vlan.clone());
        let _plugging = self.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let ports = live.folder.ports();
        if ports.iter().any(|known| known.uuid == port.uuid) {
            return Err(error(
                ErrorCode::NETWORK_PORT_EXIST,
                format!("network port with UUID {} already exists", port.uuid),
            ));
        }
        let plug = choose(&network.name, definition, &ports)?;
        if let Some(vlan) = &port.vlan {
            check_vlan(&network.name, &plug, &Vlan::read(vlan)?)?;
        }
        port.plug = Some(plug);
        live.folder.write_port(&port).map_err(|e| {
            cannot(
                format!("cannot write a port of network '{}'", network.name),
                &e,
            )
        })?;
        // It may have gone meanwhile, and its folder with it; then this file is nobody's.
        running(network)?;
        Ok((live, port))
    }

    /// The ports of a network.
    ///
    /// # Errors
    /// It is not up.
    pub fn ports(&self, network: &Network) -> Result<Vec<Port>> {
        Ok(running(network)?.folder.ports())
    }

    /// One port.
    ///
    /// # Errors
    /// VIR_ERR_NO_NETWORK_PORT; the network is not up.
    pub fn port(&self, network: &Network, uuid: Uuid) -> Result<Port> {
        let found = self
            .ports(network)?
            .into_iter()
            .find(|port| port.uuid == uuid);
        found.ok_or_else(|| no_port(uuid))
    }

    /// Changes a port's limits, inbound and outbound: those that are `Some`; an average of 0 means
    /// none. As in libvirt, what the card itself keeps to is the domain's (`domiftune`).
    ///
    /// # Errors
    /// VIR_ERR_NO_NETWORK_PORT; the system's.
    pub fn limit_port(
        &self,
        network: &Network,
        uuid: Uuid,
        rates: [Option<Rate>; 2],
    ) -> Result<()> {
        let _plugging = self.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut port = self.port(network, uuid)?;
        let [inbound, outbound] = rates;
        let limits = &mut port.bandwidth;
        for (limit, rate) in [
            (&mut limits.inbound, inbound),
            (&mut limits.outbound, outbound),
        ] {
            if rate.is_some() {
                *limit = rate.filter(|rate| rate.average != 0 || rate.floor != 0);
            }
        }
        let folder = running(network)?.folder;
        folder.write_port(&port).map_err(|e| {
            cannot(
                format!("cannot write a port of network '{}'", network.name),
                &e,
            )
        })
    }

    /// Removes a port; the card that may be behind it is left as it is.
    ///
    /// # Errors
    /// VIR_ERR_NO_NETWORK_PORT; the system's.
    pub fn delete_port(&self, network: &Network, uuid: Uuid) -> Result<()> {
        let Live { folder, .. } = running(network)?;
        self.port(network, uuid)?;
        remove(&folder, uuid)
    }

    /// Takes a card's place away: it has another one, or none. The file that it was there by.
    pub fn leave(&self, name: &str, port: Uuid) -> Option<PathBuf> {
        let network = self.registry.by_name(name).ok()?;
        let folder = running(&network).ok()?.folder;
        if let Err(error) = remove(&folder, port) {
            log::warn!("{error}");
        }
        Some(folder.port(port))
    }

    /// Keeps a port again whose network has been away, for a card that is still there.
    ///
    /// # Errors
    /// The network is not up, or has no bridge of its own; the system's.
    pub fn plug_again(
        &self,
        name: &str,
        port: Uuid,
        group: Option<&str>,
        vlan: Option<&Element>,
        owner: &Owner,
        mac: [u8; 6],
    ) -> Result<Plugged> {
        let network = self.registry.by_name(name)?;
        let folder = running(&network)?.folder;
        if folder.port(port).exists() {
            remove(&folder, port)?;
        }
        let wanted = Port {
            uuid: port,
            owner: owner.name.clone(),
            owner_uuid: owner.uuid,
            group: group.map(str::to_owned),
            mac,
            virtualport: None,
            bandwidth: Bandwidth::default(),
            vlan: vlan.cloned(),
            isolated: None,
            trust_guest_rx_filters: None,
            plug: None,
        };
        let (live, port) = self.make_port(&network, wanted)?;
        Ok(Plugged {
            port: port.uuid,
            file: live.folder.port(port.uuid),
            isolated: port.isolated == Some(true),
            mtu: None,
            bandwidth: port.bandwidth,
            vlan: port.vlan.as_ref().map(Vlan::read).transpose()?,
            plug: port.plug.ok_or_else(|| no_device(&network.name))?,
        })
    }
}

fn remove(folder: &Folder, uuid: Uuid) -> Result<()> {
    crate::files::remove_if_there(&folder.port(uuid))
        .map_err(|e| cannot(format!("cannot remove port {uuid}"), &e))
}

fn no_port(uuid: Uuid) -> crate::error::Error {
    error(
        ErrorCode::NO_NETWORK_PORT,
        format!("Network port with UUID {uuid} does not exist"),
    )
}

fn no_device(name: &str) -> crate::error::Error {
    error(
        ErrorCode::INTERNAL_ERROR,
        format!("network '{name}' requires exclusive access to interfaces, but none are available"),
    )
}

fn running(network: &Network) -> Result<Live> {
    let live = network.lock().live.clone();
    live.ok_or_else(|| invalid(format!("network '{}' is not active", network.name)))
}

/// Whether what a card is connected to can put it into VLANs.
fn check_vlan(network: &str, plug: &Plug, vlan: &Vlan) -> Result<()> {
    let (Plug::Network { bridge } | Plug::Bridge { bridge }) = plug else {
        return Err(unsupported(format!(
            "an interface connecting to network '{network}' is requesting a vlan tag, but that is \
             not supported for this type of network"
        )));
    };
    if !crate::link::filters_vlans(bridge) {
        return Err(unsupported(format!(
            "an interface connecting to network '{network}' is requesting a vlan tag, but its \
             bridge '{bridge}' does not filter VLANs (its vlan_filtering is off)"
        )));
    }
    vlan.for_bridge().map_err(|id| {
        unsupported(format!(
            "network '{network}': a bridge has no VLAN {id}, only 1 to 4094"
        ))
    })
}

/// What a card is connected to.
fn choose(name: &str, definition: &Definition, ports: &[Port]) -> Result<Plug> {
    let mode = definition.forward.mode;
    match (mode, definition.bridge.clone()) {
        (_, Some(bridge)) if mode.has_own_bridge() => return Ok(Plug::Network { bridge }),
        (ForwardMode::Bridge, Some(bridge)) => return Ok(Plug::Bridge { bridge }),
        (ForwardMode::Hostdev, _) => {
            return Err(unsupported(format!(
                "network '{name}': forward mode='hostdev' is not offered"
            )));
        }
        _ => {}
    }
    let mut used: HashMap<&str, usize> = HashMap::new();
    for port in ports {
        if let Some(Plug::Direct { dev, .. }) = &port.plug {
            *used.entry(dev).or_default() += 1;
        }
    }
    let count = |dev: &String| used.get(dev.as_str()).copied().unwrap_or(0);
    let devices = &definition.forward.interfaces;
    if devices.is_empty() {
        return Err(error(
            ErrorCode::INTERNAL_ERROR,
            format!(
                "network '{name}' uses a direct mode, but has no forward dev and no interface pool"
            ),
        ));
    }
    let chosen = if mode == ForwardMode::Passthrough {
        devices.iter().find(|dev| count(dev) == 0)
    } else {
        devices.iter().min_by_key(|dev| count(dev))
    };
    Ok(Plug::Direct {
        dev: chosen.cloned().ok_or_else(|| no_device(name))?,
        mode: mode.name().to_owned(),
    })
}
