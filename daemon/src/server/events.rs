//! Registering for events, and sending them.

use std::sync::Arc;

use rpc::args::*;
use rpc::error::{ErrorCode, RemoteError};
use rpc::procs;
use rpc::server::{Connection, EventError, Router};
use rpc::types;
use uuid::Uuid;

use super::{Answer, Call, Daemon, reference};
use crate::drivers::domain::blocking;
use crate::error::Error;
use crate::events::{
    DomainEvent, DomainName, Event, NetworkEvent, NodeDeviceEvent, Object, PoolEvent, SecretEvent,
    Sink, Sort, Wanted, kinds,
};

/// The functions for events.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::CONNECT_DOMAIN_EVENT_REGISTER, legacy_register)
        .on(procs::CONNECT_DOMAIN_EVENT_DEREGISTER, legacy_deregister)
        .on(
            procs::CONNECT_DOMAIN_EVENT_REGISTER_ANY,
            legacy_register_any,
        )
        .on(
            procs::CONNECT_DOMAIN_EVENT_DEREGISTER_ANY,
            legacy_deregister_any,
        )
        .on(procs::CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY, domain)
        .on(
            procs::CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY,
            forget_domain,
        )
        .on(procs::CONNECT_NETWORK_EVENT_REGISTER_ANY, network)
        .on(procs::CONNECT_NETWORK_EVENT_DEREGISTER_ANY, forget_network)
        .on(procs::CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY, pool)
        .on(
            procs::CONNECT_STORAGE_POOL_EVENT_DEREGISTER_ANY,
            forget_pool,
        )
        .on(procs::CONNECT_NODE_DEVICE_EVENT_REGISTER_ANY, node_device)
        .on(
            procs::CONNECT_NODE_DEVICE_EVENT_DEREGISTER_ANY,
            forget_node_device,
        )
        .on(procs::CONNECT_SECRET_EVENT_REGISTER_ANY, secret)
        .on(procs::CONNECT_SECRET_EVENT_DEREGISTER_ANY, forget_secret)
}

fn by_uuid(uuid: [u8; 16]) -> Object {
    Object::Uuid(Uuid::from_bytes(uuid))
}

fn refused(text: String) -> RemoteError {
    Error::new(ErrorCode::INTERNAL_ERROR, text).into()
}

/// Registers the caller if there are such events.
fn register(call: &Call, wanted: Wanted) -> Answer<i32> {
    let (kinds, sort) = match wanted.sort {
        Sort::Domain if wanted.legacy => (kinds::DOMAIN_LEGACY, ""),
        Sort::Domain => (kinds::DOMAIN, ""),
        Sort::Network => (kinds::NETWORK, "network "),
        Sort::Pool => (kinds::POOL, "storage pool "),
        Sort::NodeDevice => (kinds::NODE_DEVICE, "node device "),
        Sort::Secret => (kinds::SECRET, "secret "),
    };
    if !(0..kinds).contains(&wanted.event) {
        let event = wanted.event;
        return Err(refused(format!("unsupported {sort}event ID {event}")));
    }
    let connection = call.connection();
    let hub = &call.state().domains.hub;
    let legacy = wanted.legacy;
    if legacy && hub.has_legacy(connection.id(), wanted.event) {
        let event = wanted.event;
        return Err(refused(format!("domain event {event} already registered")));
    }
    let callback = hub.register(connection.id(), wanted, sink(connection, legacy));
    if connection.is_closed() {
        // It may have been seen off before it was registered.
        hub.forget(connection.id());
    }
    Ok(callback)
}

fn deregister(call: &Call, sort: Sort, callback: i32) -> Answer<()> {
    if call
        .state()
        .domains
        .hub
        .deregister(call.connection().id(), sort, callback)
    {
        return Ok(());
    }
    let sort = match sort {
        Sort::Domain => "domain",
        Sort::Network => "network",
        Sort::Pool => "storage pool",
        Sort::NodeDevice => "node device",
        Sort::Secret => "secret",
    };
    Err(refused(format!(
        "{sort} event callback {callback} not registered"
    )))
}

async fn domain(
    call: Call,
    args: ConnectDomainEventCallbackRegisterAnyArgs,
) -> Answer<ConnectDomainEventCallbackRegisterAnyRet> {
    let wanted = Wanted {
        sort: Sort::Domain,
        event: args.event_id,
        object: args.dom.map(|dom| by_uuid(dom.uuid)),
        legacy: false,
    };
    let callback_id = register(&call, wanted)?;
    Ok(ConnectDomainEventCallbackRegisterAnyRet { callback_id })
}

async fn forget_domain(
    call: Call,
    args: ConnectDomainEventCallbackDeregisterAnyArgs,
) -> Answer<()> {
    deregister(&call, Sort::Domain, args.callback_id)
}

async fn network(
    call: Call,
    args: ConnectNetworkEventRegisterAnyArgs,
) -> Answer<ConnectNetworkEventRegisterAnyRet> {
    let wanted = Wanted {
        sort: Sort::Network,
        event: args.event_id,
        object: args.net.map(|net| by_uuid(net.uuid)),
        legacy: false,
    };
    let callback_id = register(&call, wanted)?;
    Ok(ConnectNetworkEventRegisterAnyRet { callback_id })
}

async fn forget_network(call: Call, args: ConnectNetworkEventDeregisterAnyArgs) -> Answer<()> {
    deregister(&call, Sort::Network, args.callback_id)
}

async fn pool(
    call: Call,
    args: ConnectStoragePoolEventRegisterAnyArgs,
) -> Answer<ConnectStoragePoolEventRegisterAnyRet> {
    let wanted = Wanted {
        sort: Sort::Pool,
        event: args.event_id,
        object: args.pool.map(|pool| by_uuid(pool.uuid)),
        legacy: false,
    };
    let callback_id = register(&call, wanted)?;
    Ok(ConnectStoragePoolEventRegisterAnyRet { callback_id })
}

async fn forget_pool(call: Call, args: ConnectStoragePoolEventDeregisterAnyArgs) -> Answer<()> {
    deregister(&call, Sort::Pool, args.callback_id)
}

async fn node_device(
    call: Call,
    args: ConnectNodeDeviceEventRegisterAnyArgs,
) -> Answer<ConnectNodeDeviceEventRegisterAnyRet> {
    let wanted = Wanted {
        sort: Sort::NodeDevice,
        event: args.event_id,
        object: args.dev.map(|dev| Object::Name(dev.name)),
        legacy: false,
    };
    let callback_id = register(&call, wanted)?;
    let watch = Arc::clone(&call.state().node_devices);
    if let Err(error) = blocking(move || watch.ensure()).await? {
        deregister(&call, Sort::NodeDevice, callback_id)?;
        return Err(error.into());
    }
    Ok(ConnectNodeDeviceEventRegisterAnyRet { callback_id })
}

async fn forget_node_device(
    call: Call,
    args: ConnectNodeDeviceEventDeregisterAnyArgs,
) -> Answer<()> {
    deregister(&call, Sort::NodeDevice, args.callback_id)
}

async fn secret(
    call: Call,
    args: ConnectSecretEventRegisterAnyArgs,
) -> Answer<ConnectSecretEventRegisterAnyRet> {
    let wanted = Wanted {
        sort: Sort::Secret,
        event: args.event_id,
        object: args.secret.map(|secret| by_uuid(secret.uuid)),
        legacy: false,
    };
    let callback_id = register(&call, wanted)?;
    Ok(ConnectSecretEventRegisterAnyRet { callback_id })
}

async fn forget_secret(call: Call, args: ConnectSecretEventDeregisterAnyArgs) -> Answer<()> {
    deregister(&call, Sort::Secret, args.callback_id)
}

/// VIR_DOMAIN_EVENT_ID_LIFECYCLE, all that there was before there were others.
const LIFECYCLE: i32 = 0;

fn legacy(event: i32) -> Wanted {
    Wanted {
        sort: Sort::Domain,
        event,
        object: None,
        legacy: true,
    }
}

fn legacy_end(call: &Call, event: i32) -> Answer<()> {
    let hub = &call.state().domains.hub;
    if hub.deregister_legacy(call.connection().id(), event) {
        return Ok(());
    }
    Err(refused(format!("domain event {event} not registered")))
}

async fn legacy_register(call: Call, (): ()) -> Answer<ConnectDomainEventRegisterRet> {
    register(&call, legacy(LIFECYCLE))?;
    Ok(ConnectDomainEventRegisterRet { cb_registered: 1 })
}

async fn legacy_deregister(call: Call, (): ()) -> Answer<ConnectDomainEventDeregisterRet> {
    legacy_end(&call, LIFECYCLE)?;
    Ok(ConnectDomainEventDeregisterRet { cb_registered: 0 })
}

async fn legacy_register_any(call: Call, args: ConnectDomainEventRegisterAnyArgs) -> Answer<()> {
    register(&call, legacy(args.event_id)).map(drop)
}

async fn legacy_deregister_any(
    call: Call,
    args: ConnectDomainEventDeregisterAnyArgs,
) -> Answer<()> {
    legacy_end(&call, args.event_id)
}

/// Sends events to a connection, which queues them or, if its client does not read, is closed.
fn sink(connection: &Connection, legacy: bool) -> Sink {
    let connection = connection.clone();
    Arc::new(move |callback, event| {
        let callback = (!legacy).then_some(callback);
        if let Err(error) = send(&connection, callback, event) {
            log::debug!("client {}: {error}", connection.id());
        }
    })
}

/// Sends an event; without a callback's id in the old form.
fn send(
    connection: &Connection,
    callback: Option<i32>,
    event: &Event<'_>,
) -> Result<(), EventError> {
    let callback_id = callback.unwrap_or_default();
    match event {
        Event::Domain(domain, event) => send_domain(connection, callback, domain, event),
        Event::Network(name, uuid, event) => {
            let net = types::Network {
                name: (*name).to_owned(),
                uuid: uuid.into_bytes(),
            };
            let event = match event {
                NetworkEvent::Defined => 0,
                NetworkEvent::Undefined => 1,
                NetworkEvent::Started => 2,
                NetworkEvent::Stopped => 3,
                NetworkEvent::MetadataChange(kind, nsuri) => {
                    let msg = NetworkEventCallbackMetadataChangeMsg {
                        callback_id,
                        net,
                        kind: *kind,
                        nsuri: nsuri.clone(),
                    };
                    return connection
                        .send_event(procs::NETWORK_EVENT_CALLBACK_METADATA_CHANGE, &msg);
                }
            };
            let msg = NetworkEventLifecycleMsg {
                callback_id,
                net,
                event,
                detail: 0,
            };
            connection.send_event(procs::NETWORK_EVENT_LIFECYCLE, &msg)
        }
        Event::Pool(name, uuid, event) => {
            let pool = types::StoragePool {
                name: (*name).to_owned(),
                uuid: uuid.into_bytes(),
            };
            let event = match event {
                PoolEvent::Defined => 0,
                PoolEvent::Undefined => 1,
                PoolEvent::Started => 2,
                PoolEvent::Stopped => 3,
                PoolEvent::Created => 4,
                PoolEvent::Deleted => 5,
                PoolEvent::Refreshed => {
                    let msg = StoragePoolEventRefreshMsg { callback_id, pool };
                    return connection.send_event(procs::STORAGE_POOL_EVENT_REFRESH, &msg);
                }
            };
            let msg = StoragePoolEventLifecycleMsg {
                callback_id,
                pool,
                event,
                detail: 0,
            };
            connection.send_event(procs::STORAGE_POOL_EVENT_LIFECYCLE, &msg)
        }
        Event::NodeDevice(name, event) => {
            let dev = types::NodeDevice {
                name: (*name).to_owned(),
            };
            let event = match event {
                NodeDeviceEvent::Created => 0,
                NodeDeviceEvent::Deleted => 1,
                NodeDeviceEvent::Updated => {
                    let msg = NodeDeviceEventUpdateMsg { callback_id, dev };
                    return connection.send_event(procs::NODE_DEVICE_EVENT_UPDATE, &msg);
                }
            };
            let msg = NodeDeviceEventLifecycleMsg {
                callback_id,
                dev,
                event,
                detail: 0,
            };
            connection.send_event(procs::NODE_DEVICE_EVENT_LIFECYCLE, &msg)
        }
        Event::Secret(secret, event) => {
            let secret = types::Secret {
                uuid: secret.uuid.into_bytes(),
                usage_type: secret.usage_type,
                usage_id: secret.usage_id.clone(),
            };
            let event = match event {
                SecretEvent::Defined => 0,
                SecretEvent::Undefined => 1,
                SecretEvent::ValueChanged => {
                    let msg = SecretEventValueChangedMsg {
                        callback_id,
                        secret,
                    };
                    return connection.send_event(procs::SECRET_EVENT_VALUE_CHANGED, &msg);
                }
            };
            let msg = SecretEventLifecycleMsg {
                callback_id,
                secret,
                event,
                detail: 0,
            };
            connection.send_event(procs::SECRET_EVENT_LIFECYCLE, &msg)
        }
    }
}

/// An event that has two forms: with the callback's id around it, and alone.
macro_rules! send_either {
    ($connection:expr, $callback:expr, $old:ident, $new:ident, $wrapper:ident, $msg:expr) => {
        match $callback {
            None => $connection.send_event(procs::$old, &$msg),
            Some(callback_id) => $connection.send_event(
                procs::$new,
                &$wrapper {
                    callback_id,
                    msg: $msg,
                },
            ),
        }
    };
}

fn send_domain(
    connection: &Connection,
    callback: Option<i32>,
    domain: &DomainName,
    event: &DomainEvent,
) -> Result<(), EventError> {
    let dom = reference(domain.clone());
    // The old form has only the events of its time.
    let callback_id = callback.unwrap_or_default();
    match event {
        DomainEvent::Lifecycle(lifecycle) => {
            let (event, detail) = lifecycle.numbers();
            send_either!(
                connection,
                callback,
                DOMAIN_EVENT_LIFECYCLE,
                DOMAIN_EVENT_CALLBACK_LIFECYCLE,
                DomainEventCallbackLifecycleMsg,
                DomainEventLifecycleMsg { dom, event, detail }
            )
        }
        DomainEvent::Reboot => send_either!(
            connection,
            callback,
            DOMAIN_EVENT_REBOOT,
            DOMAIN_EVENT_CALLBACK_REBOOT,
            DomainEventCallbackRebootMsg,
            DomainEventRebootMsg { dom }
        ),
        DomainEvent::Watchdog(action) => send_either!(
            connection,
            callback,
            DOMAIN_EVENT_WATCHDOG,
            DOMAIN_EVENT_CALLBACK_WATCHDOG,
            DomainEventCallbackWatchdogMsg,
            DomainEventWatchdogMsg {
                dom,
                action: *action,
            }
        ),
        DomainEvent::IoError {
            with_reason,
            path,
            alias,
            action,
            reason,
        } => {
            let (src_path, dev_alias, action) = (path.clone(), alias.clone(), *action);
            if *with_reason {
                send_either!(
                    connection,
                    callback,
                    DOMAIN_EVENT_IO_ERROR_REASON,
                    DOMAIN_EVENT_CALLBACK_IO_ERROR_REASON,
                    DomainEventCallbackIoErrorReasonMsg,
                    DomainEventIoErrorReasonMsg {
                        dom,
                        src_path,
                        dev_alias,
                        action,
                        reason: reason.clone(),
                    }
                )
            } else {
                send_either!(
                    connection,
                    callback,
                    DOMAIN_EVENT_IO_ERROR,
                    DOMAIN_EVENT_CALLBACK_IO_ERROR,
                    DomainEventCallbackIoErrorMsg,
                    DomainEventIoErrorMsg {
                        dom,
                        src_path,
                        dev_alias,
                        action,
                    }
                )
            }
        }
        DomainEvent::ControlError => send_either!(
            connection,
            callback,
            DOMAIN_EVENT_CONTROL_ERROR,
            DOMAIN_EVENT_CALLBACK_CONTROL_ERROR,
            DomainEventCallbackControlErrorMsg,
            DomainEventControlErrorMsg { dom }
        ),
        DomainEvent::BlockJob {
            by_target: false,
            disk,
            kind,
            status,
        } => send_either!(
            connection,
            callback,
            DOMAIN_EVENT_BLOCK_JOB,
            DOMAIN_EVENT_CALLBACK_BLOCK_JOB,
            DomainEventCallbackBlockJobMsg,
            DomainEventBlockJobMsg {
                dom,
                path: disk.clone(),
                kind: *kind,
                status: *status,
            }
        ),
        DomainEvent::BlockJob {
            disk, kind, status, ..
        } => connection.send_event(
            procs::DOMAIN_EVENT_BLOCK_JOB_2,
            &DomainEventBlockJob2Msg {
                callback_id,
                dom,
                dst: disk.clone(),
                kind: *kind,
                status: *status,
            },
        ),
        DomainEvent::BlockThreshold {
            dev,
            path,
            threshold,
            excess,
        } => connection.send_event(
            procs::DOMAIN_EVENT_BLOCK_THRESHOLD,
            &DomainEventBlockThresholdMsg {
                callback_id,
                dom,
                dev: dev.clone(),
                path: Some(path.clone()),
                threshold: *threshold,
                excess: *excess,
            },
        ),
        DomainEvent::DiskChange {
            path,
            alias,
            reason,
        } => send_either!(
            connection,
            callback,
            DOMAIN_EVENT_DISK_CHANGE,
            DOMAIN_EVENT_CALLBACK_DISK_CHANGE,
            DomainEventCallbackDiskChangeMsg,
            DomainEventDiskChangeMsg {
                dom,
                old_src_path: Some(path.clone()),
                new_src_path: None,
                dev_alias: alias.clone(),
                reason: *reason,
            }
        ),
        DomainEvent::TrayChange { alias, open } => send_either!(
            connection,
            callback,
            DOMAIN_EVENT_TRAY_CHANGE,
            DOMAIN_EVENT_CALLBACK_TRAY_CHANGE,
            DomainEventCallbackTrayChangeMsg,
            DomainEventTrayChangeMsg {
                dom,
                dev_alias: alias.clone(),
                // virConnectDomainEventTrayChangeReason
                reason: i32::from(!open),
            }
        ),
        DomainEvent::BalloonChange(kib) => send_either!(
            connection,
            callback,
            DOMAIN_EVENT_BALLOON_CHANGE,
            DOMAIN_EVENT_CALLBACK_BALLOON_CHANGE,
            DomainEventCallbackBalloonChangeMsg,
            DomainEventBalloonChangeMsg { dom, actual: *kib }
        ),
        DomainEvent::DeviceRemoved(alias) => send_either!(
            connection,
            callback,
            DOMAIN_EVENT_DEVICE_REMOVED,
            DOMAIN_EVENT_CALLBACK_DEVICE_REMOVED,
            DomainEventCallbackDeviceRemovedMsg,
            DomainEventDeviceRemovedMsg {
                dom,
                dev_alias: alias.clone(),
            }
        ),
        DomainEvent::Tunable(params) => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_TUNABLE,
            &DomainEventCallbackTunableMsg {
                callback_id,
                dom,
                params: params.clone().into(),
            },
        ),
        DomainEvent::AgentLifecycle(state, reason) => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_AGENT_LIFECYCLE,
            &DomainEventCallbackAgentLifecycleMsg {
                callback_id,
                dom,
                state: *state,
                reason: *reason,
            },
        ),
        DomainEvent::DeviceAdded(alias) => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_DEVICE_ADDED,
            &DomainEventCallbackDeviceAddedMsg {
                callback_id,
                dom,
                dev_alias: alias.clone(),
            },
        ),
        DomainEvent::DeviceRemovalFailed(alias) => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_DEVICE_REMOVAL_FAILED,
            &DomainEventCallbackDeviceRemovalFailedMsg {
                callback_id,
                dom,
                dev_alias: alias.clone(),
            },
        ),
        DomainEvent::MigrationIteration(iteration) => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_MIGRATION_ITERATION,
            &DomainEventCallbackMigrationIterationMsg {
                callback_id,
                dom,
                iteration: *iteration,
            },
        ),
        DomainEvent::JobCompleted(params) => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_JOB_COMPLETED,
            &DomainEventCallbackJobCompletedMsg {
                callback_id,
                dom,
                params: params.clone().into(),
            },
        ),
        DomainEvent::MetadataChange { kind, uri } => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_METADATA_CHANGE,
            &DomainEventCallbackMetadataChangeMsg {
                callback_id,
                dom,
                kind: *kind,
                nsuri: uri.clone(),
            },
        ),
    }
}
