//! Who wants to know what, and telling them in order.

use std::fmt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rpc::types::TypedParam;
use uuid::Uuid;

use crate::drivers::domain::state::Lifecycle;

/// How many kinds of event each sort of object has; ids are below it.
pub mod kinds {
    /// virDomainEventID of libvirt 9.0.
    pub const DOMAIN: i32 = 27;
    /// Ids below this one also have a message without a callback's id, for clients before libvirt 1.3.
    pub const DOMAIN_LEGACY: i32 = 16;
    /// virNetworkEventID.
    pub const NETWORK: i32 = 2;
    /// virStoragePoolEventID.
    pub const POOL: i32 = 2;
    /// virNodeDeviceEventID.
    pub const NODE_DEVICE: i32 = 2;
    /// virSecretEventID.
    pub const SECRET: i32 = 2;
}

/// A domain as events and answers name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainName {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: Uuid,
    /// Its id, -1 if it is off.
    pub id: i32,
}

/// Something that happened to a domain. What can't happen to one here (sleep, a failed memory) is
/// not among them; a client may register for it all the same, and waits.
#[derive(Debug, Clone, PartialEq)]
pub enum DomainEvent {
    /// VIR_DOMAIN_EVENT_ID_LIFECYCLE
    Lifecycle(Lifecycle),
    /// VIR_DOMAIN_EVENT_ID_REBOOT
    Reboot,
    /// VIR_DOMAIN_EVENT_ID_WATCHDOG with virDomainEventWatchdogAction.
    Watchdog(i32),
    /// VIR_DOMAIN_EVENT_ID_IO_ERROR and VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON.
    IoError {
        /// With its reason: these are two events.
        with_reason: bool,
        /// The image.
        path: String,
        /// The device's id.
        alias: String,
        /// virDomainEventIOErrorAction.
        action: i32,
        /// `enospc`, or empty.
        reason: String,
    },
    /// VIR_DOMAIN_EVENT_ID_CONTROL_ERROR: the VMM does not answer any more.
    ControlError,
    /// VIR_DOMAIN_EVENT_ID_BLOCK_JOB and VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2: these are two events, and both are told.
    #[allow(dead_code, reason = "block jobs tell it")]
    BlockJob {
        /// Named by its target (`vda`), not by its image: the second event.
        by_target: bool,
        /// The image's path or the disk's target.
        disk: String,
        /// virDomainBlockJobType.
        kind: i32,
        /// virConnectDomainEventBlockJobStatus.
        status: i32,
    },
    /// VIR_DOMAIN_EVENT_ID_DISK_CHANGE: a start goes on without an image that is not there.
    DiskChange {
        /// The image's path.
        path: String,
        /// The device's id.
        alias: String,
        /// virConnectDomainEventDiskChangeReason: the drive is empty (0), the disk is not there (1).
        reason: i32,
    },
    /// VIR_DOMAIN_EVENT_ID_TRAY_CHANGE
    TrayChange {
        /// The drive's id.
        alias: String,
        /// It is out.
        open: bool,
    },
    /// VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE: KiB the guest uses.
    BalloonChange(u64),
    /// VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: its id.
    DeviceRemoved(String),
    /// VIR_DOMAIN_EVENT_ID_TUNABLE: what is set now (VIR_DOMAIN_TUNABLE_*).
    Tunable(Vec<TypedParam>),
    /// VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE: virConnectDomainEventAgentLifecycleState, and reason.
    AgentLifecycle(i32, i32),
    /// VIR_DOMAIN_EVENT_ID_DEVICE_ADDED: its id.
    DeviceAdded(String),
    /// VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED: its id.
    DeviceRemovalFailed(String),
    /// VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION: which one.
    MigrationIteration(i32),
    /// VIR_DOMAIN_EVENT_ID_JOB_COMPLETED: its statistics (VIR_DOMAIN_JOB_*).
    JobCompleted(Vec<TypedParam>),
    /// VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD
    BlockThreshold {
        /// The disk's target, or `vda[2]`: one of its images.
        dev: String,
        /// The image's file.
        path: String,
        /// The offset that was asked for.
        threshold: u64,
        /// Bytes beyond it.
        excess: u64,
    },
    /// VIR_DOMAIN_EVENT_ID_METADATA_CHANGE: virDomainMetadataType, and the namespace of an element.
    MetadataChange {
        /// 0 description, 1 title, 2 element.
        kind: i32,
        /// The element's namespace.
        uri: Option<String>,
    },
}

impl DomainEvent {
    /// virDomainEventID.
    pub fn id(&self) -> i32 {
        match self {
            Self::Lifecycle(_) => 0,
            Self::Reboot => 1,
            Self::Watchdog(_) => 3,
            Self::IoError {
                with_reason: false, ..
            } => 4,
            Self::IoError { .. } => 6,
            Self::ControlError => 7,
            Self::BlockJob {
                by_target: false, ..
            } => 8,
            Self::DiskChange { .. } => 9,
            Self::TrayChange { .. } => 10,
            Self::BalloonChange(_) => 13,
            Self::DeviceRemoved(_) => 15,
            Self::BlockJob { .. } => 16,
            Self::Tunable(_) => 17,
            Self::AgentLifecycle(..) => 18,
            Self::DeviceAdded(_) => 19,
            Self::MigrationIteration(_) => 20,
            Self::JobCompleted(_) => 21,
            Self::DeviceRemovalFailed(_) => 22,
            Self::MetadataChange { .. } => 23,
            Self::BlockThreshold { .. } => 24,
        }
    }
}

/// Something that happened to a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkEvent {
    /// VIR_NETWORK_EVENT_DEFINED
    Defined,
    /// VIR_NETWORK_EVENT_UNDEFINED
    Undefined,
    /// VIR_NETWORK_EVENT_STARTED
    Started,
    /// VIR_NETWORK_EVENT_STOPPED
    Stopped,
    /// VIR_NETWORK_EVENT_ID_METADATA_CHANGE: virNetworkMetadataType, and the namespace of an element.
    MetadataChange(i32, Option<String>),
}

/// Something that happened to a storage pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolEvent {
    /// VIR_STORAGE_POOL_EVENT_DEFINED
    Defined,
    /// VIR_STORAGE_POOL_EVENT_UNDEFINED
    Undefined,
    /// VIR_STORAGE_POOL_EVENT_STARTED
    Started,
    /// VIR_STORAGE_POOL_EVENT_STOPPED
    Stopped,
    /// VIR_STORAGE_POOL_EVENT_CREATED: its folder or volume group was made.
    Created,
    /// VIR_STORAGE_POOL_EVENT_DELETED: that was removed.
    Deleted,
    /// VIR_STORAGE_POOL_EVENT_ID_REFRESH
    Refreshed,
}

/// Something that happened to a device of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeDeviceEvent {
    /// VIR_NODE_DEVICE_EVENT_CREATED
    Created,
    /// VIR_NODE_DEVICE_EVENT_DELETED
    Deleted,
    /// VIR_NODE_DEVICE_EVENT_ID_UPDATE
    Updated,
}

/// Something that happened to a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretEvent {
    /// VIR_SECRET_EVENT_DEFINED
    Defined,
    /// VIR_SECRET_EVENT_UNDEFINED
    Undefined,
    /// VIR_SECRET_EVENT_ID_VALUE_CHANGED
    ValueChanged,
}

/// A secret as events and answers name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretName {
    /// Its uuid.
    pub uuid: Uuid,
    /// virSecretUsageType.
    pub usage_type: i32,
    /// What it is for.
    pub usage_id: String,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event<'a> {
    /// To a domain.
    Domain(&'a DomainName, &'a DomainEvent),
    /// To a network: name, uuid.
    Network(&'a str, Uuid, NetworkEvent),
    /// To a storage pool: name, uuid.
    Pool(&'a str, Uuid, PoolEvent),
    /// To a device of the host: name.
    NodeDevice(&'a str, NodeDeviceEvent),
    /// To a secret.
    Secret(&'a SecretName, SecretEvent),
}

/// The sorts of objects that things happen to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    /// Domains.
    Domain,
    /// Networks.
    Network,
    /// Storage pools.
    Pool,
    /// Devices of the host.
    NodeDevice,
    /// Secrets.
    Secret,
}

/// The one object that a registration is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// That with this uuid.
    Uuid(Uuid),
    /// That with this name, where there are no uuids.
    Name(String),
}

impl Event<'_> {
    fn sort(&self) -> Sort {
        match self {
            Self::Domain(..) => Sort::Domain,
            Self::Network(..) => Sort::Network,
            Self::Pool(..) => Sort::Pool,
            Self::NodeDevice(..) => Sort::NodeDevice,
            Self::Secret(..) => Sort::Secret,
        }
    }

    fn id(&self) -> i32 {
        match self {
            Self::Domain(_, event) => event.id(),
            Self::Network(_, _, NetworkEvent::MetadataChange(..))
            | Self::Pool(_, _, PoolEvent::Refreshed)
            | Self::NodeDevice(_, NodeDeviceEvent::Updated)
            | Self::Secret(_, SecretEvent::ValueChanged) => 1,
            Self::Network(..) | Self::Pool(..) | Self::NodeDevice(..) | Self::Secret(..) => 0,
        }
    }

    fn is_about(&self, object: &Object) -> bool {
        match (self, object) {
            (Self::Domain(domain, _), Object::Uuid(uuid)) => domain.uuid == *uuid,
            (Self::Network(_, own, _) | Self::Pool(_, own, _), Object::Uuid(uuid)) => own == uuid,
            (Self::Secret(secret, _), Object::Uuid(uuid)) => secret.uuid == *uuid,
            (Self::NodeDevice(own, _), Object::Name(name)) => own == name,
            (_, Object::Uuid(_) | Object::Name(_)) => false,
        }
    }
}

/// Takes an event for one registration. Must not wait.
pub type Sink = Arc<dyn Fn(i32, &Event<'_>) + Send + Sync>;

/// What a client wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// About what.
    pub sort: Sort,
    /// The event's id.
    pub event: i32,
    /// About this one only.
    pub object: Option<Object>,
    /// In the form without a callback's id, which has one registration for each event.
    pub legacy: bool,
}

struct Registration {
    client: u64,
    callback: i32,
    wanted: Wanted,
    sink: Sink,
}

/// All registrations.
#[derive(Default)]
pub struct Hub {
    registrations: Mutex<Vec<Registration>>,
    next: AtomicI32,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hub({} registrations)", self.lock().len())
    }
}

impl Hub {
    /// Registers `client` for what it wants to know; returns the callback's id.
    pub fn register(&self, client: u64, wanted: Wanted, sink: Sink) -> i32 {
        // Under the lock, so that ids are handed out in order.
        let mut registrations = self.lock();
        let callback = self.next.fetch_add(1, Ordering::Relaxed) & i32::MAX;
        registrations.push(Registration {
            client,
            callback,
            wanted,
            sink,
        });
        callback
    }

    /// Whether `client` has a registration of the old form for that event of domains.
    pub fn has_legacy(&self, client: u64, event: i32) -> bool {
        self.lock()
            .iter()
            .any(|r| r.client == client && r.wanted.legacy && r.wanted.event == event)
    }

    /// Whether anybody wants to know of such objects.
    pub fn is_wanted(&self, sort: Sort) -> bool {
        self.lock().iter().any(|r| r.wanted.sort == sort)
    }

    /// Takes a registration of `client` back; false if it has none with that id.
    pub fn deregister(&self, client: u64, sort: Sort, callback: i32) -> bool {
        self.remove(|r| {
            r.client == client
                && r.callback == callback
                && r.wanted.sort == sort
                && !r.wanted.legacy
        })
    }

    /// Takes the registration of the old form back; false if it has none.
    pub fn deregister_legacy(&self, client: u64, event: i32) -> bool {
        self.remove(|r| r.client == client && r.wanted.legacy && r.wanted.event == event)
    }

    /// Takes all registrations of `client` back.
    pub fn forget(&self, client: u64) {
        self.remove(|r| r.client == client);
    }

    fn remove(&self, which: impl Fn(&Registration) -> bool) -> bool {
        let mut registrations = self.lock();
        let before = registrations.len();
        registrations.retain(|r| !which(r));
        registrations.len() != before
    }

    /// Something happened to a domain.
    pub fn emit(&self, domain: &DomainName, event: &DomainEvent) {
        self.tell(&Event::Domain(domain, event));
    }

    /// Something happened to a network.
    pub fn network(&self, name: &str, uuid: Uuid, event: NetworkEvent) {
        self.tell(&Event::Network(name, uuid, event));
    }

    /// Something happened to a storage pool.
    pub fn pool(&self, name: &str, uuid: Uuid, event: PoolEvent) {
        self.tell(&Event::Pool(name, uuid, event));
    }

    /// Something happened to a device of the host.
    pub fn node_device(&self, name: &str, event: NodeDeviceEvent) {
        self.tell(&Event::NodeDevice(name, event));
    }

    /// Something happened to a secret.
    pub fn secret(&self, secret: &SecretName, event: SecretEvent) {
        self.tell(&Event::Secret(secret, event));
    }

    /// Tells everybody who wants to know.
    fn tell(&self, event: &Event<'_>) {
        log::debug!("{event:?}");
        for registration in self.lock().iter() {
            let wanted = &registration.wanted;
            if wanted.sort == event.sort()
                && wanted.event == event.id()
                && wanted.object.as_ref().is_none_or(|o| event.is_about(o))
            {
                (registration.sink)(registration.callback, event);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Registration>> {
        self.registrations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(sort: Sort, event: i32, object: Option<Object>) -> Wanted {
        Wanted {
            sort,
            event,
            object,
            legacy: false,
        }
    }

    #[test]
    fn everybody_hears_what_they_asked_for() {
        let hub = Hub::default();
        let heard: Arc<Mutex<Vec<(i32, i32)>>> = Arc::default();
        let sink = || -> Sink {
            let heard = Arc::clone(&heard);
            Arc::new(move |callback, event| heard.lock().unwrap().push((callback, event.id())))
        };
        let take = || std::mem::take(&mut *heard.lock().unwrap());
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let all = hub.register(1, wanted(Sort::Domain, 0, None), sink());
        let only = Some(Object::Uuid(two));
        let only_two = hub.register(1, wanted(Sort::Domain, 0, only.clone()), sink());
        let reboots = hub.register(2, wanted(Sort::Domain, 1, None), sink());
        let network = hub.register(2, wanted(Sort::Network, 0, only), sink());
        let name = |uuid| DomainName {
            name: "d".to_owned(),
            uuid,
            id: -1,
        };
        let started = DomainEvent::Lifecycle(Lifecycle::StartedBooted);
        hub.emit(&name(one), &started);
        hub.emit(&name(two), &started);
        hub.emit(&name(two), &DomainEvent::Reboot);
        assert_eq!(take(), [(all, 0), (all, 0), (only_two, 0), (reboots, 1)]);
        hub.network("n", one, NetworkEvent::Started);
        hub.network("n", two, NetworkEvent::Started);
        hub.pool("p", two, PoolEvent::Started);
        assert_eq!(take(), [(network, 0)]);
        assert!(
            !hub.deregister(2, Sort::Domain, all),
            "another client's callback"
        );
        assert!(
            !hub.deregister(1, Sort::Network, all),
            "it is a domain's callback"
        );
        assert!(hub.deregister(1, Sort::Domain, all));
        hub.forget(2);
        hub.emit(&name(one), &started);
        hub.emit(&name(one), &DomainEvent::Reboot);
        hub.network("n", two, NetworkEvent::Stopped);
        assert_eq!(take(), []);
    }

    #[test]
    fn both_forms_are_kept_apart() {
        let hub = Hub::default();
        let nothing = || -> Sink { Arc::new(|_, _| {}) };
        let old = Wanted {
            legacy: true,
            ..wanted(Sort::Domain, 0, None)
        };
        let callback = hub.register(1, old, nothing());
        assert!(hub.has_legacy(1, 0) && !hub.has_legacy(1, 1) && !hub.has_legacy(2, 0));
        assert!(!hub.deregister(1, Sort::Domain, callback));
        let new = hub.register(1, wanted(Sort::Domain, 0, None), nothing());
        assert!(hub.deregister_legacy(1, 0));
        assert!(!hub.deregister_legacy(1, 0));
        assert!(hub.deregister(1, Sort::Domain, new));
    }
}
