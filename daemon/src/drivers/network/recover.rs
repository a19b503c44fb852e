//! Networks that are there when the daemon starts: stored ones, and those that an earlier daemon
//! left up.

use std::fs;
use std::io;
use std::sync::Arc;

use uuid::Uuid;
use xml_schemas::network::Network as Definition;
use xml_schemas::{Validation, network};

use super::object::{Live, Network};
use super::record::Folder;
use super::{Driver, dnsmasq, firewall};
use crate::drivers::domain::blocking;
use crate::files::{self, Durability};
use crate::link;
use crate::store::Identity;

/// The network that every installation begins with, as libvirt's does.
const DEFAULT: &str = "<network><name>default</name><forward mode='nat'/>\
    <ip address='192.168.122.1' netmask='255.255.255.0'><dhcp>\
    <range start='192.168.122.2' end='192.168.122.254'/></dhcp></ip></network>";

/// Reads what is stored and takes up what is up.
///
/// # Errors
/// The definitions cannot be read.
pub fn load(driver: &Arc<Driver>) -> io::Result<()> {
    let loaded = driver.store.load(|text| {
        let definition =
            Definition::parse(text.xml, Validation::Lenient).map_err(|e| e.to_string())?;
        let uuid = definition.uuid.ok_or("it has no uuid")?;
        let identity = Identity {
            name: definition.name.clone(),
            uuid,
        };
        Ok((identity, definition))
    })?;
    for stored in loaded {
        let definition: Definition = stored.object;
        match driver
            .registry
            .get_or_make(&definition.name, definition.uuid)
        {
            Ok(network) => {
                let mut inner = network.lock();
                inner.persistent = Some(Arc::new(definition));
                inner.autostart = stored.autostart;
            }
            Err(error) => log::error!("network '{}': left out: {error}", definition.name),
        }
    }
    take_up_all(driver)?;
    if driver.fresh && !driver.roots.session {
        define_default(driver);
    }
    let watching = Arc::clone(driver);
    let started = std::thread::Builder::new()
        .name("nftables".to_owned())
        .spawn(move || {
            if let Err(error) = firewall::watch(|| assert_rules(&watching)) {
                log::warn!("the networks' rules are not put back if somebody flushes all: {error}");
            }
        });
    started.map(drop)
}

fn define_default(driver: &Driver) {
    let defined = network::Network::parse(DEFAULT, Validation::Lenient)
        .map_err(crate::error::Error::from)
        .and_then(|definition| {
            let network = driver.registry.get_or_make(&definition.name, None)?;
            driver.store_definition(&network, definition)
        });
    if let Err(error) = defined {
        log::error!("network 'default': {error}");
    }
}

fn take_up_all(driver: &Driver) -> io::Result<()> {
    let folder = driver.roots.live_networks();
    files::remove_leftovers(&folder)?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let uuid = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse::<Uuid>().ok());
        let (Some(uuid), true) = (uuid, path.is_dir()) else {
            continue;
        };
        if let Err(why) = take_up(driver, uuid, Folder(path.clone())) {
            log::error!("{}: {why}", path.display());
        }
    }
    Ok(())
}

fn take_up(driver: &Driver, uuid: Uuid, folder: Folder) -> Result<(), String> {
    let (definition, record) = match (folder.read_definition(), folder.read_record()) {
        (Ok(definition), Ok(record)) => (Arc::new(definition), record),
        (Err(error), _) | (_, Err(error)) => {
            // It is written before anything is made.
            folder.remove();
            return Err(format!("removed: {error}"));
        }
    };
    if record.boot_id != driver.boot_id {
        folder.remove();
        return Ok(());
    }
    let network = driver
        .registry
        .get_or_make(&definition.name, Some(uuid))
        .map_err(|e| e.to_string())?;
    let mut live = Live {
        definition: Arc::clone(&definition),
        record,
        folder,
    };
    let own = definition.forward.mode.has_own_bridge();
    let bridge = definition.bridge.as_deref().unwrap_or_default();
    let there = !own || link::index(bridge).is_ok();
    if !live.record.started || !there {
        log::info!(
            "network '{}': what is left of it is taken back",
            network.name
        );
        for error in driver.take_back(&network, &live) {
            log::error!("network '{}': {error}", network.name);
        }
        return Ok(());
    }
    if own {
        driver.claim_running(&network, &definition);
        // They may have been flushed while nobody watched.
        if let Err(error) = firewall::apply(uuid, &definition) {
            log::error!("network '{}': {error}", network.name);
        }
        let runs = live.record.dnsmasq.is_some_and(dnsmasq::runs);
        if dnsmasq::needed(&definition) && !runs {
            log::warn!(
                "network '{}': its dnsmasq is gone, and started again",
                network.name
            );
            let place = driver.place(&network, &live.folder);
            match dnsmasq::write(&place, &definition).and_then(|()| dnsmasq::start(&place)) {
                Ok(identity) => live.record.dnsmasq = Some(identity),
                Err(error) => log::error!("network '{}': {error}", network.name),
            }
        }
    }
    log::info!("network '{}' is up", network.name);
    driver.note(&network, live).map_err(|e| e.to_string())
}

/// Puts back the rules of networks whose table is gone.
fn assert_rules(driver: &Driver) {
    for network in driver.registry.all() {
        let gone = |network: &Network| {
            let definition = Arc::clone(&network.lock().live.as_ref()?.definition);
            if !firewall::needed(&definition) {
                return None;
            }
            match firewall::tables() {
                Ok(tables) if tables.contains(&firewall::table(network.uuid)) => None,
                Ok(_) => Some(definition),
                Err(error) => {
                    log::error!("cannot look after the networks' rules: {error}");
                    None
                }
            }
        };
        if gone(&network).is_none() {
            continue;
        }
        // It may be stopping just now, and its rules gone for that.
        let _job = network.job_blocking();
        let Some(definition) = gone(&network) else {
            continue;
        };
        log::warn!(
            "network '{}': somebody has removed its rules; they are put back",
            network.name
        );
        if let Err(error) = firewall::apply(network.uuid, &definition) {
            log::error!("network '{}': {error}", network.name);
        }
    }
}

/// Starts what is to be started with the host, once a boot.
pub async fn autostart(driver: &Arc<Driver>) {
    let marker = driver.roots.live_networks().join("autostarted");
    if fs::read_to_string(&marker).is_ok_and(|id| id == driver.boot_id) {
        return;
    }
    let boot = driver.boot_id.clone();
    let written =
        blocking(move || files::write_atomically(&marker, boot.as_bytes(), Durability::Process))
            .await;
    match written {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return log::error!("no autostart of networks: cannot note it: {error}"),
        Err(error) => return log::error!("no autostart of networks: {error}"),
    }
    for network in driver.registry.all() {
        {
            let inner = network.lock();
            if !inner.autostart || inner.live.is_some() {
                continue;
            }
        }
        match driver.start(&network).await {
            Ok(()) => log::info!("network '{}' started with the host", network.name),
            Err(error) => log::error!("autostart of network '{}': {error}", network.name),
        }
    }
}
