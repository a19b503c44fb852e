//! Definitions: define, create, undefine, autostart, update.

use std::sync::{Arc, PoisonError};

use uuid::Uuid;
use xml_schemas::Validation;
use xml_schemas::network::{Command, ForwardMode, Network as Definition, NetworkView, Section};

use super::object::{Live, Network};
use super::{Driver, cannot, dnsmasq, error, firewall, invalid, unsupported};
use crate::drivers::domain::blocking;
use crate::error::{ErrorCode, Result, check_flags};
use crate::events::NetworkEvent;
use crate::files;
use crate::link;

/// VIR_NETWORK_DEFINE_VALIDATE and VIR_NETWORK_CREATE_VALIDATE
const VALIDATE: u32 = 1;
/// VIR_NETWORK_XML_INACTIVE
const XML_INACTIVE: u32 = 1;

/// Which definition is meant.
pub mod affect {
    /// The running one.
    pub const LIVE: u32 = 1;
    /// The stored one.
    pub const CONFIG: u32 = 2;
}

fn validation(flags: u32) -> Validation {
    if flags & VALIDATE != 0 {
        Validation::Strict
    } else {
        Validation::Lenient
    }
}

/// An address of the kind that libvirt gives bridges.
fn random_mac() -> [u8; 6] {
    let bytes = Uuid::new_v4().into_bytes();
    [0x52, 0x54, 0, bytes[0], bytes[1], bytes[2]]
}

impl Driver {
    /// Fills what is chosen when a network is first seen: uuid, bridge, hardware address.
    fn fill(&self, network: &Network, definition: &mut Definition) -> Result<()> {
        definition.uuid = Some(network.uuid);
        if definition.forward.mode == ForwardMode::Hostdev {
            check_devices(definition)?;
        }
        if !definition.forward.mode.has_own_bridge() {
            return Ok(());
        }
        // A network that is defined again keeps what it had.
        if definition.mac.is_none() {
            definition.mac = Some(random_mac());
        }
        match definition.bridge.as_deref() {
            Some(name) if !name.contains("%d") => {
                if self.registry.bridge_in_use(name, network.uuid) {
                    return Err(error(
                        ErrorCode::INTERNAL_ERROR,
                        format!("bridge name '{name}' already in use."),
                    ));
                }
            }
            template => {
                /// As libvirt: more would be nobody's.
                const MOST: u32 = 256;
                let template = template.unwrap_or("virbr%d").to_owned();
                let free = (0..MOST)
                    .map(|n| template.replacen("%d", &n.to_string(), 1))
                    .find(|name| {
                        !self.registry.bridge_in_use(name, network.uuid)
                            && link::index(name).is_err()
                    });
                definition.bridge = Some(free.ok_or_else(|| {
                    error(
                        ErrorCode::INTERNAL_ERROR,
                        format!("Bridge generation exceeded max id {MOST}"),
                    )
                })?);
            }
        }
        Ok(())
    }

    /// Stores a definition.
    ///
    /// # Errors
    /// A bad document; a name or uuid of another network; the disk.
    pub async fn define(self: &Arc<Self>, xml: &str, flags: u32) -> Result<Arc<Network>> {
        check_flags(flags, VALIDATE, "networkDefineXMLFlags")?;
        let definition = Definition::parse(xml, validation(flags))?;
        let network = self
            .registry
            .get_or_make(&definition.name, definition.uuid)?;
        let _job = network.job().await?;
        let (driver, target) = (Arc::clone(self), Arc::clone(&network));
        blocking(move || driver.store_definition(&target, definition)).await??;
        self.emit(&network, NetworkEvent::Defined);
        Ok(network)
    }

    /// The work of [`Driver::define`], and of the definition that comes with the first start.
    pub(super) fn store_definition(
        &self,
        network: &Network,
        mut definition: Definition,
    ) -> Result<()> {
        let _defining = self.defining.lock().unwrap_or_else(PoisonError::into_inner);
        self.fill(network, &mut definition)?;
        self.save(&definition)?;
        network.lock().persistent = Some(Arc::new(definition));
        Ok(())
    }

    fn save(&self, definition: &Definition) -> Result<()> {
        let name = &definition.name;
        let text = definition.format(NetworkView::Inactive);
        self.store.save(name, &text).map_err(|e| {
            cannot(
                format!("cannot write {}", self.store.path(name).display()),
                &e,
            )
        })
    }

    /// Starts a network that has no definition which stays.
    ///
    /// # Errors
    /// As [`Driver::define`] and [`Driver::start`].
    pub async fn create(self: &Arc<Self>, xml: &str, flags: u32) -> Result<Arc<Network>> {
        check_flags(flags, VALIDATE, "networkCreateXMLFlags")?;
        let mut definition = Definition::parse(xml, validation(flags))?;
        let known = self.registry.by_name(&definition.name);
        if let Ok(known) = &known
            && known.lock().live.is_some()
            && definition.uuid == Some(known.uuid)
        {
            return Err(invalid(format!(
                "network is already active as '{}'",
                known.name
            )));
        }
        let network = self
            .registry
            .get_or_make(&definition.name, definition.uuid)?;
        let _job = network.job().await?;
        if network.lock().live.is_some() {
            return Err(invalid(format!(
                "network is already active as '{}'",
                network.name
            )));
        }
        let (driver, target) = (Arc::clone(self), Arc::clone(&network));
        blocking(move || {
            {
                let _defining = driver
                    .defining
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                driver.fill(&target, &mut definition)?;
            }
            driver.bring_up(&target, &Arc::new(definition))
        })
        .await??;
        self.emit(&network, NetworkEvent::Started);
        Ok(network)
    }

    /// Removes a definition; a network that is up stays so.
    ///
    /// # Errors
    /// There is none; the disk.
    pub async fn undefine(self: &Arc<Self>, network: &Arc<Network>) -> Result<()> {
        let _job = network.job().await?;
        if network.lock().persistent.is_none() {
            return Err(invalid("can't undefine transient network"));
        }
        let (driver, target) = (Arc::clone(self), Arc::clone(network));
        blocking(move || {
            driver.store.remove(&target.name).map_err(|e| {
                cannot(
                    format!(
                        "cannot remove {}",
                        driver.store.path(&target.name).display()
                    ),
                    &e,
                )
            })?;
            let active = {
                let mut inner = target.lock();
                inner.persistent = None;
                inner.autostart = false;
                inner.live.is_some()
            };
            if !active {
                driver.forget_leases(&target);
            }
            Result::Ok(())
        })
        .await??;
        self.emit(network, NetworkEvent::Undefined);
        Ok(())
    }

    pub(super) fn forget_leases(&self, network: &Network) {
        let file = self.leases_file(network);
        if let Err(error) = files::remove_if_there(&file) {
            log::warn!("cannot remove {}: {error}", file.display());
        }
    }

    /// Has a network started with the host, or not.
    ///
    /// # Errors
    /// It is transient; the disk.
    pub async fn set_autostart(self: &Arc<Self>, network: &Arc<Network>, on: bool) -> Result<()> {
        let _job = network.job().await?;
        if network.lock().persistent.is_none() {
            return Err(invalid("cannot set autostart for transient network"));
        }
        let (driver, target) = (Arc::clone(self), Arc::clone(network));
        blocking(move || {
            driver.store.set_autostart(&target.name, on).map_err(|e| {
                cannot(
                    format!("cannot write the autostart link of '{}'", target.name),
                    &e,
                )
            })?;
            target.lock().autostart = on;
            Ok(())
        })
        .await?
    }

    /// The document.
    ///
    /// # Errors
    /// Unknown flags.
    pub fn xml(&self, network: &Network, flags: u32) -> Result<String> {
        check_flags(flags, XML_INACTIVE, "networkGetXMLDesc")?;
        let (stored, live) = {
            let inner = network.lock();
            (inner.persistent.clone(), inner.live.clone())
        };
        let inactive = flags & XML_INACTIVE != 0;
        match (stored, live) {
            (None, Some(live)) if inactive => Ok(live.definition.format(NetworkView::Inactive)),
            (Some(stored), live) if inactive || live.is_none() => {
                Ok(stored.format(NetworkView::Inactive))
            }
            (_, Some(live)) => {
                let ports = live.folder.ports();
                Ok(live.definition.format(NetworkView::Active(&ports)))
            }
            (_, None) => Err(super::no_network(format!(
                "network '{}' is gone",
                network.name
            ))),
        }
    }

    /// Changes parts of a network.
    ///
    /// # Errors
    /// The definition meant is not there; the change does not fit; the disk; dnsmasq.
    pub async fn update(
        self: &Arc<Self>,
        network: &Arc<Network>,
        command: u32,
        section: u32,
        index: i32,
        xml: String,
        flags: u32,
    ) -> Result<()> {
        check_flags(flags, affect::LIVE | affect::CONFIG, "networkUpdate")?;
        let command = Command::from_number(command).ok_or_else(|| {
            error(
                ErrorCode::INVALID_ARG,
                format!("unknown update command {command}"),
            )
        })?;
        let section = Section::from_number(section).ok_or_else(|| {
            unsupported(format!(
                "can't update unknown section {section} of network '{}'",
                network.name
            ))
        })?;
        let _job = network.job().await?;
        let (to_live, to_config) = impact(network, flags)?;
        let (driver, target) = (Arc::clone(self), Arc::clone(network));
        blocking(move || {
            let change = |definition: &Arc<Definition>| -> Result<Definition> {
                let mut changed = Definition::clone(definition);
                changed.update(command, section, index, &xml)?;
                Ok(changed)
            };
            let (stored, live) = {
                let inner = target.lock();
                let stored = inner.persistent.as_ref().filter(|_| to_config);
                (
                    stored.map(change).transpose()?,
                    inner.live.clone().filter(|_| to_live),
                )
            };
            let live = match live {
                None => None,
                Some(live) => Some((change(&live.definition)?, live)),
            };
            if let Some((definition, live)) = live {
                driver.change_live(&target, live, definition, section)?;
            }
            if let Some(definition) = stored {
                driver.save(&definition)?;
                target.lock().persistent = Some(Arc::new(definition));
            }
            Ok(())
        })
        .await?
    }

    fn change_live(
        &self,
        network: &Network,
        mut live: Live,
        definition: Definition,
        section: Section,
    ) -> Result<()> {
        let place = self.place(network, &live.folder);
        let before = Arc::clone(&live.definition);
        let served = |network: &Definition| dnsmasq::needed(network);
        match section {
            Section::PortGroup | Section::Fixed(_) => {}
            Section::ForwardInterface => {
                if definition.forward.mode.has_own_bridge() {
                    firewall::apply(network.uuid, &definition)?;
                }
            }
            Section::DhcpHost | Section::DnsHost
                if served(&definition)
                    && before.ips.iter().any(|ip| ip.has_dhcp())
                        == definition.ips.iter().any(|ip| ip.has_dhcp()) =>
            {
                if let Some(identity) = live.record.dnsmasq {
                    live.record.dnsmasq = Some(dnsmasq::reload(&place, &definition, identity)?);
                }
            }
            _ => {
                // What it reads only when it starts.
                dnsmasq::write(&place, &definition)?;
                if let Some(identity) = live.record.dnsmasq.take() {
                    dnsmasq::stop(identity)?;
                }
                if served(&definition) {
                    let started = dnsmasq::start(&place);
                    let identity = match started {
                        Ok(identity) => identity,
                        Err(error) => {
                            // Back to what worked.
                            let back = dnsmasq::write(&place, &before)
                                .and_then(|()| dnsmasq::start(&place));
                            match back {
                                Ok(identity) => live.record.dnsmasq = Some(identity),
                                Err(again) => log::error!("network '{}': {again}", network.name),
                            }
                            self.note(network, live)?;
                            return Err(error);
                        }
                    };
                    live.record.dnsmasq = Some(identity);
                }
            }
        }
        live.definition = Arc::new(definition);
        self.note(network, live)
    }

    /// Keeps what is known of a network that is up, also for the next daemon.
    pub(super) fn note(&self, network: &Network, live: Live) -> Result<()> {
        live.folder
            .write_definition(&live.definition)
            .and_then(|()| live.folder.write_record(&live.record))
            .map_err(|e| cannot("cannot write the network's state", &e))?;
        network.lock().live = Some(live);
        Ok(())
    }

    /// Keeps changed definitions.
    pub(super) fn keep(
        &self,
        network: &Network,
        stored: Option<Definition>,
        running: Option<Definition>,
    ) -> Result<()> {
        if let Some(definition) = stored {
            self.save(&definition)?;
            network.lock().persistent = Some(Arc::new(definition));
        }
        let live = network.lock().live.clone();
        if let (Some(definition), Some(mut live)) = (running, live) {
            live.definition = Arc::new(definition);
            self.note(network, live)?;
        }
        Ok(())
    }
}

/// Which definitions a change is for: the running one, the stored one.
pub(super) fn impact(network: &Network, flags: u32) -> Result<(bool, bool)> {
    let inner = network.lock();
    let active = inner.live.is_some();
    let (mut live, mut config) = (flags & affect::LIVE != 0, flags & affect::CONFIG != 0);
    if !live && !config {
        live = active;
        config = !active;
    }
    if live && !active {
        return Err(invalid("network is not running"));
    }
    if config && inner.persistent.is_none() {
        return Err(invalid(
            "cannot change persistent config of a transient network",
        ));
    }
    Ok((live, config))
}

/// A network of devices that are handed to guests needs such devices.
fn check_devices(definition: &Definition) -> Result<()> {
    for [domain, bus, slot, function] in &definition.forward.addresses {
        let path = format!("/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.{function:x}");
        if !std::path::Path::new(&path).join("physfn").exists() {
            return Err(unsupported(format!(
                "device '{path}' in network '{}' is not an SR-IOV Virtual Function",
                definition.name
            )));
        }
    }
    if let Some(physical) = &definition.forward.physical
        && link::index(physical).is_err()
    {
        return Err(unsupported(format!(
            "device '{physical}' in network '{}' does not exist",
            definition.name
        )));
    }
    Ok(())
}
