//! The network driver: definitions in files, bridges with dnsmasq and rules of their own.

pub mod define;
pub mod dnsmasq;
pub mod firewall;
pub mod leases;
pub mod metadata;
pub mod object;
pub mod plug;
mod program;
mod record;
pub mod recover;
mod start;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use uuid::Uuid;
use xml_schemas::network::Subnet;

use self::dnsmasq::Place;
use self::object::{Network, Registry};
use self::record::Folder;
use crate::drivers::domain::record::boot_id;
use crate::error::{Error, ErrorCode, ErrorDomain, Result, plain};
use crate::events::{Hub, NetworkEvent};
use crate::files;
use crate::roots::Roots;
use crate::store::Store;

/// Everything about networks.
#[derive(Debug)]
pub struct Driver {
    roots: Roots,
    store: Store,
    /// All networks.
    pub registry: Registry,
    hub: Arc<Hub>,
    boot_id: String,
    /// The addresses of networks that are up or about to be.
    claims: Mutex<HashMap<Uuid, Vec<Subnet>>>,
    /// Held while a definition is stored: bridges' names are chosen among all definitions.
    defining: Mutex<()>,
    /// Held while a port gets its device.
    plugging: Mutex<()>,
    /// The folder of definitions was not there before.
    fresh: bool,
}

fn error(code: ErrorCode, detail: impl Into<String>) -> Error {
    Error::of(ErrorDomain::NETWORK, code, detail)
}

fn no_network(detail: String) -> Error {
    error(ErrorCode::NO_NETWORK, detail)
}

fn invalid(detail: impl Into<String>) -> Error {
    error(ErrorCode::OPERATION_INVALID, detail)
}

fn unsupported(detail: impl Into<String>) -> Error {
    error(ErrorCode::CONFIG_UNSUPPORTED, detail)
}

fn cannot(what: impl std::fmt::Display, cause: &io::Error) -> Error {
    error(ErrorCode::SYSTEM_ERROR, format!("{what}: {}", plain(cause)))
}

impl Driver {
    /// A driver without networks yet; see [`recover`].
    ///
    /// # Errors
    /// The store cannot be opened.
    pub fn new(roots: Roots, hub: Arc<Hub>) -> io::Result<Self> {
        let fresh = !roots.networks().exists();
        let store = Store::open(roots.networks(), &boot_id())?;
        files::make_folder(&roots.live_networks(), 0o755)?;
        files::make_folder(&roots.leases(), 0o700)?;
        Ok(Self {
            roots,
            store,
            registry: Registry::default(),
            hub,
            boot_id: boot_id(),
            claims: Mutex::default(),
            defining: Mutex::default(),
            plugging: Mutex::default(),
            fresh,
        })
    }

    fn folder(&self, uuid: Uuid) -> PathBuf {
        self.roots.live_networks().join(uuid.to_string())
    }

    fn place(&self, network: &Network, folder: &Folder) -> Place {
        Place {
            folder: folder.0.clone(),
            leases: self.leases_file(network),
        }
    }

    fn leases_file(&self, network: &Network) -> PathBuf {
        // Not its name, which may be anything: this goes into dnsmasq's configuration.
        self.roots.leases().join(format!("{}.leases", network.uuid))
    }

    fn emit(&self, network: &Network, event: NetworkEvent) {
        self.hub.network(&network.name, network.uuid, event);
    }

    /// The leases of a network that is up.
    ///
    /// # Errors
    /// The system's.
    pub fn leases(&self, network: &Network) -> Result<Vec<leases::Lease>> {
        leases::read(&self.leases_file(network)).map_err(|e| cannot("cannot read the leases", &e))
    }

    /// How many networks are up.
    pub fn running(&self) -> usize {
        let all = self.registry.all();
        all.iter().filter(|n| n.lock().live.is_some()).count()
    }
}
