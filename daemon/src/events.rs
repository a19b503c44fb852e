//! Who wants to know what, and telling them in order.

use std::fmt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::drivers::domain::state::Lifecycle;

/// Domain event ids are below this (virDomainEventID of libvirt 9.0).
pub const DOMAIN_EVENT_IDS: i32 = 27;

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

/// Something that happened to a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE: KiB the guest uses.
    BalloonChange(u64),
    /// VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE: virConnectDomainEventAgentLifecycleState, and reason.
    AgentLifecycle(i32, i32),
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
            Self::BalloonChange(_) => 13,
            Self::AgentLifecycle(..) => 18,
            Self::MetadataChange { .. } => 23,
        }
    }
}

/// Takes an event for one registration. Must not wait.
pub type Sink = Arc<dyn Fn(i32, &DomainName, &DomainEvent) + Send + Sync>;

struct Registration {
    client: u64,
    callback: i32,
    event: i32,
    domain: Option<Uuid>,
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
    /// Registers `client` for events `event`, of one domain or of all; returns the callback's id.
    pub fn register(&self, client: u64, event: i32, domain: Option<Uuid>, sink: Sink) -> i32 {
        // Under the lock, so that ids are handed out in order.
        let mut registrations = self.lock();
        let callback = self.next.fetch_add(1, Ordering::Relaxed) & i32::MAX;
        registrations.push(Registration {
            client,
            callback,
            event,
            domain,
            sink,
        });
        callback
    }

    /// Takes a registration of `client` back; false if it has none with that id.
    pub fn deregister(&self, client: u64, callback: i32) -> bool {
        let mut registrations = self.lock();
        let before = registrations.len();
        registrations.retain(|r| r.client != client || r.callback != callback);
        registrations.len() != before
    }

    /// Takes all registrations of `client` back.
    pub fn forget(&self, client: u64) {
        self.lock().retain(|r| r.client != client);
    }

    /// Tells everybody who wants to know.
    pub fn emit(&self, domain: &DomainName, event: &DomainEvent) {
        log::debug!("event for domain '{}': {event:?}", domain.name);
        for registration in self.lock().iter() {
            if registration.event == event.id()
                && registration.domain.is_none_or(|uuid| uuid == domain.uuid)
            {
                (registration.sink)(registration.callback, domain, event);
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

    #[test]
    fn everybody_hears_what_they_asked_for() {
        let hub = Hub::default();
        let heard: Arc<Mutex<Vec<(i32, i32)>>> = Arc::default();
        let sink = || -> Sink {
            let heard = Arc::clone(&heard);
            Arc::new(move |callback, _, event| heard.lock().unwrap().push((callback, event.id())))
        };
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let all = hub.register(1, 0, None, sink());
        let only_two = hub.register(1, 0, Some(two), sink());
        let reboots = hub.register(2, 1, None, sink());
        let name = |uuid| DomainName {
            name: "d".to_owned(),
            uuid,
            id: -1,
        };
        hub.emit(
            &name(one),
            &DomainEvent::Lifecycle(Lifecycle::StartedBooted),
        );
        hub.emit(
            &name(two),
            &DomainEvent::Lifecycle(Lifecycle::StartedBooted),
        );
        hub.emit(&name(two), &DomainEvent::Reboot);
        assert_eq!(
            *heard.lock().unwrap(),
            [(all, 0), (all, 0), (only_two, 0), (reboots, 1)]
        );
        heard.lock().unwrap().clear();
        assert!(!hub.deregister(2, all), "another client's callback");
        assert!(hub.deregister(1, all));
        hub.forget(2);
        hub.emit(
            &name(one),
            &DomainEvent::Lifecycle(Lifecycle::StartedBooted),
        );
        hub.emit(&name(one), &DomainEvent::Reboot);
        assert!(heard.lock().unwrap().is_empty());
    }
}
