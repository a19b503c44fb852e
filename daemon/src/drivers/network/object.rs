//! One network in memory, and the list of all.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;
use xml_schemas::Network as Definition;

use super::record::{Folder, Record};
use super::{error, no_network};
use crate::error::{ErrorCode, Result};

/// How long a call waits for another one that changes the same network.
const JOB_LIMIT: Duration = Duration::from_secs(60);

/// A network.
#[derive(Debug)]
pub struct Network {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Held by whoever changes it: at most one at a time, in order of arrival.
    job: Arc<tokio::sync::Mutex<()>>,
    inner: Mutex<Inner>,
}

/// What is known of a network. Locked for moments only, never across a wait.
#[derive(Debug, Default)]
pub struct Inner {
    /// The definition in the store.
    pub persistent: Option<Arc<Definition>>,
    /// It is started with the host.
    pub autostart: bool,
    /// What there is while it is up.
    pub live: Option<Live>,
}

/// A network that is up.
#[derive(Debug, Clone)]
pub struct Live {
    /// The definition it is up with.
    pub definition: Arc<Definition>,
    /// What the next daemon must know.
    pub record: Record,
    /// Its folder below `run`.
    pub folder: Folder,
}

impl Inner {
    /// Whether clients see it.
    pub fn visible(&self) -> bool {
        self.persistent.is_some() || self.live.is_some()
    }

    /// The definition in effect.
    pub fn definition(&self) -> Option<&Arc<Definition>> {
        match &self.live {
            Some(live) => Some(&live.definition),
            None => self.persistent.as_ref(),
        }
    }
}

impl Network {
    /// Looks at it, or changes what is known of it.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no other call changes it.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_TIMEOUT after a minute.
    pub async fn job(&self) -> Result<tokio::sync::OwnedMutexGuard<()>> {
        match tokio::time::timeout(JOB_LIMIT, Arc::clone(&self.job).lock_owned()).await {
            Ok(guard) => Ok(guard),
            Err(_) => Err(error(
                ErrorCode::OPERATION_TIMEOUT,
                format!("network '{}' is held by another call", self.name),
            )),
        }
    }
}

impl Network {
    /// As [`Network::job`], for a thread that has nothing else to do, and without a limit.
    pub fn job_blocking(&self) -> tokio::sync::OwnedMutexGuard<()> {
        Arc::clone(&self.job).blocking_lock_owned()
    }
}

/// All networks, by name.
#[derive(Debug, Default)]
pub struct Registry {
    by_name: Mutex<BTreeMap<String, Arc<Network>>>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Network>>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what clients don't see and no call works on.
    fn sweep(map: &mut BTreeMap<String, Arc<Network>>) {
        // Copies are made under the map's lock only.
        map.retain(|_, network| Arc::strong_count(network) > 1 || network.lock().visible());
    }

    /// All that clients see, by name.
    pub fn all(&self) -> Vec<Arc<Network>> {
        let mut map = self.lock();
        Self::sweep(&mut map);
        map.values()
            .filter(|n| n.lock().visible())
            .cloned()
            .collect()
    }

    /// The network with that name.
    ///
    /// # Errors
    /// VIR_ERR_NO_NETWORK.
    pub fn by_name(&self, name: &str) -> Result<Arc<Network>> {
        let found = self
            .lock()
            .get(name)
            .filter(|n| n.lock().visible())
            .cloned();
        found.ok_or_else(|| no_network(format!("no network with matching name '{name}'")))
    }

    /// The network with that uuid.
    ///
    /// # Errors
    /// VIR_ERR_NO_NETWORK.
    pub fn by_uuid(&self, uuid: Uuid) -> Result<Arc<Network>> {
        let map = self.lock();
        let found = map.values().find(|n| n.uuid == uuid && n.lock().visible());
        found
            .cloned()
            .ok_or_else(|| no_network(format!("no network with matching uuid '{uuid}'")))
    }

    /// The network with that name, made if there is none; clients don't see it yet.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_FAILED: only the name or only the uuid is another network's.
    pub fn get_or_make(&self, name: &str, uuid: Option<Uuid>) -> Result<Arc<Network>> {
        let failed = |text| Err(error(ErrorCode::OPERATION_FAILED, text));
        let mut map = self.lock();
        Self::sweep(&mut map);
        if let Some(known) = map.get(name) {
            if uuid != Some(known.uuid) {
                return failed(format!(
                    "network '{name}' already exists with uuid {}",
                    known.uuid
                ));
            }
            return Ok(Arc::clone(known));
        }
        let uuid = uuid.unwrap_or_else(Uuid::new_v4);
        if let Some(other) = map.values().find(|n| n.uuid == uuid) {
            return failed(format!(
                "network '{}' is already defined with uuid {uuid}",
                other.name
            ));
        }
        let network = Arc::new(Network {
            uuid,
            name: name.to_owned(),
            job: Arc::default(),
            inner: Mutex::default(),
        });
        map.insert(name.to_owned(), Arc::clone(&network));
        Ok(network)
    }

    /// Whether a bridge's name is taken by another network than that one.
    pub fn bridge_in_use(&self, bridge: &str, except: Uuid) -> bool {
        let map = self.lock();
        map.values().filter(|n| n.uuid != except).any(|network| {
            let inner = network.lock();
            let live = inner.live.as_ref().map(|live| &live.definition);
            live.into_iter()
                .chain(inner.persistent.as_ref())
                .any(|definition| definition.bridge.as_deref() == Some(bridge))
        })
    }
}
