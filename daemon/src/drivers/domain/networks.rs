//! Guests' cards in virtual networks, while the guests run.

use std::sync::Arc;

use uuid::Uuid;
use xml_schemas::Domain as Definition;
use xml_schemas::dom::Element;
use xml_schemas::domain::device::{self, Interface};
use xml_schemas::network::port::Plug;

use super::devices::set_port;
use super::leases::Card;
use super::machine::Made;
use super::object::Domain;
use super::record::Folder;
use super::{Driver, blocking};
use crate::drivers::network::plug::{Owner, Plugged};
use crate::error::{Error, Result};
use crate::link;

/// The network of a running card.
fn network_of(interface: &Element) -> Option<&str> {
    interface.child("source")?.attr("network")
}

/// Notes in a running card's definition what it is connected to.
pub(in crate::drivers::domain) fn note_plug(
    interface: &mut Element,
    network: &str,
    plugged: &Plugged,
) {
    let group = interface
        .child("source")
        .and_then(|source| source.attr("portgroup"))
        .map(str::to_owned);
    interface.take_child("source");
    let mut source = Element::new("source").with_attr("network", network);
    source.set_opt_attr("portgroup", group);
    source.set_attr("portid", plugged.port.to_string());
    match &plugged.plug {
        Plug::Network { bridge } => source.set_attr("bridge", bridge),
        Plug::Bridge { bridge } => {
            interface.set_attr("type", "bridge");
            source.set_attr("bridge", bridge);
        }
        Plug::Direct { dev, mode } => {
            interface.set_attr("type", "direct");
            source.set_attr("dev", dev);
            source.set_attr("mode", mode);
        }
    }
    interface.push(source);
}

impl Driver {
    /// Connects guests' cards to a network that has been away.
    pub async fn plug_again(self: &Arc<Self>, network: &str) {
        for domain in self.registry.all() {
            let Some(pinned) = self.registry.pin(&domain) else {
                continue;
            };
            let in_it = |definition: &Definition| {
                let mut cards = definition.devices.rest.iter();
                cards.any(|e| e.name == "interface" && network_of(e) == Some(network))
            };
            if !domain
                .lock()
                .live
                .as_ref()
                .is_some_and(|live| in_it(&live.definition))
            {
                continue;
            }
            let done = match pinned.job_in_migration().await {
                Ok(_job) => {
                    let (driver, target) = (Arc::clone(self), Arc::clone(&domain));
                    let network = network.to_owned();
                    let work = blocking(move || driver.plug_cards(&target, &network));
                    work.await.and_then(|done| done)
                }
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                log::error!(
                    "domain '{}' is not connected to network '{network}' again: {error}",
                    domain.name().name
                );
            }
        }
    }

    fn plug_cards(&self, domain: &Domain, network: &str) -> Result<()> {
        let Some((mut definition, folder)) = ({
            let inner = domain.lock();
            let live = inner.live.as_ref();
            live.map(|live| {
                (
                    Definition::clone(&live.definition),
                    Folder(live.folder.clone()),
                )
            })
        }) else {
            return Ok(());
        };
        let owner = Owner {
            name: definition.name.clone(),
            uuid: domain.uuid,
        };
        let cards = definition.devices.rest.iter_mut();
        let mut files = Vec::new();
        let mut fault = None;
        for element in cards.filter(|e| e.name == "interface" && network_of(e) == Some(network)) {
            match self.plug_card(element, network, &owner) {
                Ok(plugged) => {
                    let alias = device::alias(element).unwrap_or_default().to_owned();
                    files.extend(plugged.map(|plugged| (alias, plugged.file)));
                }
                Err(error) => fault = Some(error),
            }
        }
        folder
            .write_definition(&definition)
            .map_err(|e| Error::system("cannot write the domain's state", &e))?;
        let mut inner = domain.lock();
        if let Some(live) = inner.live.as_mut() {
            live.definition = Arc::new(definition);
            for (alias, file) in files {
                let made = Made {
                    sockets: vec![file],
                    ..Made::default()
                };
                live.made.add_device(&alias, made);
            }
        }
        self.write_record(&inner);
        fault.map_or(Ok(()), Err)
    }

    fn plug_card(
        &self,
        element: &mut Element,
        network: &str,
        owner: &Owner,
    ) -> Result<Option<Plugged>> {
        let card = Interface::read(element)?;
        let source = element.child("source");
        let port = source
            .and_then(|s| s.attr("portid"))
            .and_then(|id| id.parse::<Uuid>().ok());
        // A macvtap is on its device whatever becomes of the network.
        let (Some(device), Some(port), true) = (card.target, port, card.kind != "direct") else {
            return Ok(None);
        };
        let group = source.and_then(|s| s.attr("portgroup"));
        let plugged = self.networks.plug_again(
            network,
            port,
            group,
            element.child("vlan"),
            owner,
            card.mac,
        )?;
        if let Plug::Network { bridge } | Plug::Bridge { bridge } = &plugged.plug {
            attach(&device, bridge, || {
                set_port(&device, plugged.isolated, plugged.vlan.as_ref())
            })?;
        }
        if element.attr("type") == Some("bridge") {
            element.set_attr("type", "network");
        }
        note_plug(element, network, &plugged);
        Ok(Some(plugged))
    }

    /// The name that a guest has told a network of its.
    ///
    /// # Errors
    /// A file of leases cannot be read.
    pub fn leased_name(&self, definition: &Definition) -> Result<Option<String>> {
        for element in &definition.devices.rest {
            let Some(name) = network_of(element).filter(|_| element.name == "interface") else {
                continue;
            };
            let (Ok(card), Ok(network)) = (
                Interface::read(element),
                self.networks.registry.by_name(name),
            ) else {
                continue;
            };
            let mac = card.mac_text();
            let leases = self.networks.leases(&network)?.into_iter();
            let mut names = leases
                .filter(|lease| {
                    let own = lease.mac.as_deref();
                    own.is_some_and(|own| own.eq_ignore_ascii_case(&mac))
                })
                .filter_map(|lease| lease.hostname);
            if let Some(name) = names.next() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The addresses that networks have leased to a guest's cards.
    ///
    /// # Errors
    /// A file of leases cannot be read.
    pub fn leased(&self, definition: &Definition) -> Result<Vec<Card>> {
        let mut found = Vec::new();
        for element in definition
            .devices
            .rest
            .iter()
            .filter(|e| e.name == "interface")
        {
            let Some(name) = network_of(element) else {
                continue;
            };
            let (Ok(card), Ok(network)) = (
                Interface::read(element),
                self.networks.registry.by_name(name),
            ) else {
                continue;
            };
            let mac = card.mac_text();
            let definition = network.lock().definition().cloned();
            let prefix = |address: std::net::IpAddr| {
                let mut subnets = definition
                    .iter()
                    .flat_map(|d| &d.ips)
                    .filter_map(|ip| ip.subnet());
                subnets
                    .find(|subnet| subnet.contains(address))
                    .map_or(0, |subnet| u32::from(subnet.prefix))
            };
            let addresses: Vec<_> = self
                .networks
                .leases(&network)?
                .into_iter()
                .filter(|lease| {
                    lease
                        .mac
                        .as_deref()
                        .is_some_and(|m| m.eq_ignore_ascii_case(&mac))
                })
                .map(|lease| (lease.address, prefix(lease.address)))
                .collect();
            if let (Some(name), false) = (card.target, addresses.is_empty()) {
                found.push(Card {
                    name,
                    mac,
                    addresses,
                });
            }
        }
        Ok(found)
    }
}

/// Makes a tap a port of a bridge. It is down, and so reaches nobody, until `restrict` has said what it may reach; if
/// that fails it is no port.
pub(super) fn attach(
    device: &str,
    bridge: &str,
    restrict: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let cannot = |e: &std::io::Error| {
        Error::system(format!("Unable to add bridge {bridge} port {device}"), e)
    };
    let port_of = |bridge: u32, up: Option<bool>| link::Settings {
        bridge: Some(bridge),
        up,
        ..link::Settings::default()
    };
    let is = |up: bool| link::Settings {
        up: Some(up),
        ..link::Settings::default()
    };
    let bridge = link::index(bridge).map_err(|e| cannot(&e))?;
    let index = link::index(device).map_err(|e| cannot(&e))?;
    link::set(index, is(false)).map_err(|e| cannot(&e))?;
    let attached = link::set(index, port_of(bridge, None)).map_err(|e| cannot(&e));
    if let Err(error) = attached.and_then(|()| restrict()) {
        // Where even that fails it stays down.
        if let Err(error) = link::set(index, port_of(0, Some(true))) {
            log::error!("{device} cannot be detached and stays down: {error}");
        }
        return Err(error);
    }
    link::set(index, is(true)).map_err(|e| cannot(&e))
}
