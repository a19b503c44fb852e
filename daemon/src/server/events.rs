//! Registering for events, and sending them.

use std::sync::Arc;

use rpc::args::*;
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::server::{Connection, EventError, Router};
use uuid::Uuid;

use super::{Answer, Call, Daemon, reference};
use crate::error::Error;
use crate::events::{DOMAIN_EVENT_IDS, DomainEvent, DomainName, Sink};

/// The functions for events.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY, register)
        .on(
            procs::CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY,
            deregister,
        )
}

async fn register(
    call: Call,
    args: ConnectDomainEventCallbackRegisterAnyArgs,
) -> Answer<ConnectDomainEventCallbackRegisterAnyRet> {
    if !(0..DOMAIN_EVENT_IDS).contains(&args.event_id) {
        let text = format!("unsupported event ID {}", args.event_id);
        return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
    }
    let domain = args.dom.map(|dom| Uuid::from_bytes(dom.uuid));
    let connection = call.connection();
    let hub = &call.state().domains.hub;
    let callback_id = hub.register(connection.id(), args.event_id, domain, sink(connection));
    if connection.is_closed() {
        // It may have been seen off before it was registered.
        hub.forget(connection.id());
    }
    Ok(ConnectDomainEventCallbackRegisterAnyRet { callback_id })
}

async fn deregister(call: Call, args: ConnectDomainEventCallbackDeregisterAnyArgs) -> Answer<()> {
    let hub = &call.state().domains.hub;
    if hub.deregister(call.connection().id(), args.callback_id) {
        return Ok(());
    }
    let text = format!("domain event callback {} not registered", args.callback_id);
    Err(Error::new(ErrorCode::INVALID_ARG, text).into())
}

/// Sends events to a connection, which queues them or, if its client does not read, is closed.
fn sink(connection: &Connection) -> Sink {
    let connection = connection.clone();
    Arc::new(move |callback, domain, event| {
        if let Err(error) = send(&connection, callback, domain, event) {
            log::debug!("client {}: {error}", connection.id());
        }
    })
}

fn send(
    connection: &Connection,
    callback_id: i32,
    domain: &DomainName,
    event: &DomainEvent,
) -> Result<(), EventError> {
    let dom = reference(domain.clone());
    match event {
        DomainEvent::Lifecycle(lifecycle) => {
            let (event, detail) = lifecycle.numbers();
            let msg = DomainEventLifecycleMsg { dom, event, detail };
            connection.send_event(
                procs::DOMAIN_EVENT_CALLBACK_LIFECYCLE,
                &DomainEventCallbackLifecycleMsg { callback_id, msg },
            )
        }
        DomainEvent::Reboot => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_REBOOT,
            &DomainEventCallbackRebootMsg {
                callback_id,
                msg: DomainEventRebootMsg { dom },
            },
        ),
        DomainEvent::Watchdog(action) => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_WATCHDOG,
            &DomainEventCallbackWatchdogMsg {
                callback_id,
                msg: DomainEventWatchdogMsg {
                    dom,
                    action: *action,
                },
            },
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
                let msg = DomainEventIoErrorReasonMsg {
                    dom,
                    src_path,
                    dev_alias,
                    action,
                    reason: reason.clone(),
                };
                connection.send_event(
                    procs::DOMAIN_EVENT_CALLBACK_IO_ERROR_REASON,
                    &DomainEventCallbackIoErrorReasonMsg { callback_id, msg },
                )
            } else {
                let msg = DomainEventIoErrorMsg {
                    dom,
                    src_path,
                    dev_alias,
                    action,
                };
                connection.send_event(
                    procs::DOMAIN_EVENT_CALLBACK_IO_ERROR,
                    &DomainEventCallbackIoErrorMsg { callback_id, msg },
                )
            }
        }
        DomainEvent::BalloonChange(kib) => connection.send_event(
            procs::DOMAIN_EVENT_CALLBACK_BALLOON_CHANGE,
            &DomainEventCallbackBalloonChangeMsg {
                callback_id,
                msg: DomainEventBalloonChangeMsg { dom, actual: *kib },
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
