//! From the wire to the drivers.

mod agent;
mod block_jobs;
mod connect;
mod device_stats;
mod devices;
mod domain;
mod events;
mod host;
mod migrate;
mod monitor;
mod network;
mod nodedev;
mod plug;
mod rarely;
mod save;
mod secret;
mod snapshot;
mod storage;
mod tunables;
mod vcpus;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
use rpc::procs::{self, ProcedureInfo};
use rpc::server::{self, Connection, Request, ResponseFuture, Router, Service};
use rpc::types;
use uuid::Uuid;

use crate::drivers::domain::object::{CALL, Domain, Pinned};
use crate::drivers::domain::{Driver, lifecycle};
use crate::drivers::nodedev_watch::Watch;
use crate::events::DomainName;

/// What all calls share.
#[derive(Debug)]
pub struct Daemon {
    /// Domains.
    pub domains: Arc<Driver>,
    /// Who tells of the host's devices.
    node_devices: Arc<Watch>,
    clients: Mutex<HashMap<u64, Client>>,
}

/// What a connection leaves to do when it goes.
#[derive(Debug, Default)]
struct Client {
    /// The URI it opened.
    uri: String,
    /// Domains that end with it.
    autodestroy: Vec<Uuid>,
}

/// A call as the functions here see it.
type Call = server::Call<Daemon>;
/// What they answer.
type Answer<T> = Result<T, RemoteError>;

impl Daemon {
    /// A daemon with these domains.
    pub fn new(domains: Arc<Driver>) -> Self {
        Self {
            node_devices: Watch::new(Arc::clone(&domains.hub)),
            domains,
            clients: Mutex::default(),
        }
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<u64, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The domain a client means.
    fn find(&self, dom: &types::Domain) -> Answer<Arc<Domain>> {
        Ok(self.domains.find(&dom.name, Uuid::from_bytes(dom.uuid))?)
    }

    /// The same, kept in the list meanwhile.
    fn pin(&self, dom: &types::Domain) -> Answer<Pinned> {
        Ok(self.domains.pin(&dom.name, Uuid::from_bytes(dom.uuid))?)
    }

    fn secrets(&self) -> Arc<crate::drivers::secret::Driver> {
        Arc::clone(&self.domains.secrets)
    }

    fn vmm(&self) -> PathBuf {
        self.domains.vmm.clone()
    }

    /// A domain's end goes with this connection's.
    fn tie(&self, connection: &Connection, uuid: Uuid) {
        let mut clients = self.clients();
        clients
            .entry(connection.id())
            .or_default()
            .autodestroy
            .push(uuid);
        drop(clients);
        if connection.is_closed() {
            // It went while the domain was being started, and may have been seen off already.
            self.see_off(connection);
        }
    }

    fn see_off(&self, connection: &Connection) {
        self.domains.hub.forget(connection.id());
        let goodbye = connection.said_goodbye();
        self.domains.migrations_of_gone(connection.id(), goodbye);
        let Some(client) = self.clients().remove(&connection.id()) else {
            return;
        };
        for uuid in client.autodestroy {
            let Ok(domain) = self.domains.pin("", uuid) else {
                continue;
            };
            // Since then it may have been started again, without that flag.
            if !domain
                .lock()
                .live
                .as_ref()
                .is_some_and(|live| live.autodestroy)
            {
                continue;
            }
            tokio::spawn(async move {
                if let Err(error) = lifecycle::end(&domain, false).await {
                    log::error!("domain '{}': {error}", domain.name().name);
                }
            });
        }
    }
}

/// A domain on the wire.
fn reference(name: DomainName) -> types::Domain {
    types::Domain {
        name: name.name,
        uuid: name.uuid.into_bytes(),
        id: name.id,
    }
}

/// A number of things on the wire.
fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// Answers what the router has functions for, and speaks for the drivers that are not there.
#[derive(Debug)]
pub struct Calls {
    router: Router<Daemon>,
    known: HashSet<i32>,
}

impl Calls {
    /// Everything the daemon answers.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        let router = Router::new(daemon);
        let router = connect::routes(router);
        let router = domain::routes(router);
        let router = monitor::routes(router);
        let router = events::routes(router);
        let router = secret::routes(router);
        let router = network::routes(router);
        let router = storage::routes(router);
        let router = save::routes(router);
        let router = snapshot::routes(router);
        let router = block_jobs::routes(router);
        let router = devices::routes(router);
        let router = vcpus::routes(router);
        let router = agent::routes(router);
        let router = tunables::routes(router);
        let router = rarely::routes(router);
        let router = plug::routes(router);
        let router = host::routes(router);
        let router = nodedev::routes(router);
        let router = migrate::routes(router);
        let router = router.on_disconnect(|daemon, connection| daemon.see_off(connection));
        let known = router.procedures().into_iter().collect();
        Self { router, known }
    }

    /// The names of all procedures that have a function or are answered by the connection itself, and whether they are
    /// answered by more than a refusal.
    pub fn names(&self) -> Vec<(&'static str, bool)> {
        let own = [
            procs::AUTH_LIST.number(),
            procs::AUTH_POLKIT.number(),
            procs::CONNECT_CLOSE.number(),
        ];
        procs::PROCEDURES
            .iter()
            .chain(procs::QEMU_PROCEDURES)
            .filter(|info| self.known.contains(&info.number) || own.contains(&info.number))
            .map(|info| (info.name, !rarely::REFUSED.contains(&info.number)))
            .collect()
    }
}

/// The driver that a procedure belongs to, of those that are not there yet.
fn absent_driver(info: &ProcedureInfo) -> Option<ErrorDomain> {
    let name = info.name;
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    if has(&["CHECKPOINT", "BACKUP"]) {
        Some(info.error_domain())
    } else if name.starts_with("DOMAIN_") || name.starts_with("NODE_GET") {
        None
    } else if has(&["NWFILTER"]) {
        Some(ErrorDomain::NWFILTER)
    } else if has(&["NODE_DEVICE", "NODE_NUM_OF_DEVICES", "NODE_LIST_DEVICES"]) {
        Some(ErrorDomain::NODEDEV)
    } else if has(&["STORAGE"]) {
        Some(ErrorDomain::STORAGE)
    } else if has(&["NETWORK"]) {
        Some(ErrorDomain::NETWORK)
    } else if has(&["INTERFACE"]) {
        Some(ErrorDomain::INTERFACE)
    } else if has(&["SECRET"]) {
        Some(ErrorDomain::SECRET)
    } else {
        None
    }
}

impl Service for Calls {
    fn call(&self, request: Request) -> ResponseFuture {
        if !self.known.contains(&request.procedure)
            && let Some(info) = procs::info(request.procedure)
            && let Some(driver) = absent_driver(info)
        {
            let error = RemoteError::new(ErrorCode::NO_SUPPORT, driver, info.function());
            return Box::pin(std::future::ready(Err(error)));
        }
        let name = procs::info(request.procedure).map_or_else(String::new, ProcedureInfo::function);
        Box::pin(CALL.scope(name, self.router.call(request)))
    }

    fn disconnected(&self, connection: &Connection) {
        self.router.disconnected(connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_drivers_are_named() {
        /// DOMAIN_LIST_ALL_CHECKPOINTS
        const LIST_ALL_CHECKPOINTS: i32 = 413;
        let of = |number| procs::info(number).and_then(absent_driver);
        assert_eq!(of(283), Some(ErrorDomain::NETWORK));
        assert_eq!(of(281), Some(ErrorDomain::STORAGE));
        assert_eq!(of(284), Some(ErrorDomain::INTERFACE));
        assert_eq!(of(285), Some(ErrorDomain::NODEDEV));
        assert_eq!(of(286), Some(ErrorDomain::NWFILTER));
        assert_eq!(of(287), Some(ErrorDomain::SECRET));
        assert!(of(LIST_ALL_CHECKPOINTS).is_some());
        assert_eq!(of(273), None);
        assert_eq!(
            of(353),
            None,
            "virDomainInterfaceAddresses is the domain driver's"
        );
    }
}
