//! `net-event`, `pool-event`, `nodedev-event`, `secret-event`: what happens to everything but domains.

use rpc::args::*;
use rpc::client::Event;
use rpc::procs;
use rpc::types::{Network, NodeDevice, Secret, StoragePool};

use super::{kind, name, wait};
use crate::command::{Args, Command, Opt, Values, flag, number, text};
use crate::commands::{format_uuid, parse_uuid};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

/// The network events by number (`VIR_NETWORK_EVENT_ID_*`).
pub const NETWORK_NAMES: &[&str] = &["lifecycle"];
/// The storage pool events by number (`VIR_STORAGE_POOL_EVENT_ID_*`).
pub const POOL_NAMES: &[&str] = &["lifecycle", "refresh"];
/// The node device events by number (`VIR_NODE_DEVICE_EVENT_ID_*`).
pub const NODE_DEVICE_NAMES: &[&str] = &["lifecycle", "update"];
/// The secret events by number (`VIR_SECRET_EVENT_ID_*`).
pub const SECRET_NAMES: &[&str] = &["lifecycle", "value-changed"];

const LOOP: Opt = flag("loop", "go on after the first event");
const TIMEOUT: Opt = number("timeout", "seconds to wait at most");
const LIST: Opt = flag("list", "list what can be waited for");
const TIMESTAMP: Opt = flag("timestamp", "print when it happened");

const fn event(values: Values) -> Opt {
    text("event", "what to wait for").values(values)
}

/// `net-event`
pub const NET_EVENT: Command = Command {
    name: "net-event",
    summary: "Network Events",
    description: "Waits for something to happen to networks, or lists what could.",
    options: &[
        text("network", "only this network (name or uuid)").values(Values::Networks),
        event(Values::NetworkEvents),
        LOOP,
        TIMEOUT,
        LIST,
        TIMESTAMP,
    ],
    handler: network,
    connects: true,
};

/// `pool-event`
pub const POOL_EVENT: Command = Command {
    name: "pool-event",
    summary: "Storage Pool Events",
    description: "Waits for something to happen to storage pools, or lists what could.",
    options: &[
        text("pool", "only this pool (name or uuid)").values(Values::Pools),
        event(Values::PoolEvents),
        LOOP,
        TIMEOUT,
        LIST,
        TIMESTAMP,
    ],
    handler: pool,
    connects: true,
};

/// `nodedev-event`
pub const NODEDEV_EVENT: Command = Command {
    name: "nodedev-event",
    summary: "Node Device Events",
    description: "Waits for something to happen to the host's devices, or lists what could.",
    options: &[
        text("device", "only this device (its name)").values(Values::NodeDevices),
        event(Values::NodeDeviceEvents),
        LOOP,
        TIMEOUT,
        LIST,
        TIMESTAMP,
    ],
    handler: node_device,
    connects: true,
};

/// `secret-event`
pub const SECRET_EVENT: Command = Command {
    name: "secret-event",
    summary: "Secret Events",
    description: "Waits for something to happen to secrets, or lists what could.",
    options: &[
        text("secret", "only this secret (its uuid)").values(Values::Secrets),
        event(Values::SecretEvents),
        LOOP,
        TIMEOUT,
        LIST,
        TIMESTAMP,
    ],
    handler: secret,
    connects: true,
};

/// What to wait for; nothing if it was only to be listed.
fn wanted(shell: &mut Shell, args: &Args, names: &[&str]) -> Result<Option<usize>> {
    if args.has("list") {
        for name in names {
            shell.out.print(format!("{name}\n"));
        }
        return Ok(None);
    }
    match args.text("event")? {
        Some(name) => kind(names, name).map(Some),
        None => Err(Failure::new("either --list or --event <type> is required")),
    }
}

fn network(shell: &mut Shell, args: &Args) -> Result {
    let Some(kind) = wanted(shell, args, NETWORK_NAMES)? else {
        return Ok(());
    };
    let net: Option<Network> = match args.text("network")? {
        None => None,
        Some(word) => {
            let by_uuid = parse_uuid(word).filter(|_| word.len() == 36).map(|uuid| {
                let asked = NetworkLookupByUuidArgs { uuid };
                shell.call(procs::NETWORK_LOOKUP_BY_UUID, &asked)
            });
            let found = match by_uuid {
                Some(Ok(found)) => found.net,
                _ => {
                    let name = word.to_owned();
                    shell
                        .call(
                            procs::NETWORK_LOOKUP_BY_NAME,
                            &NetworkLookupByNameArgs { name },
                        )
                        .context(format!("failed to get network '{word}'"))?
                        .net
                }
            };
            Some(found)
        }
    };
    let register = |shell: &mut Shell, event_id: i32| {
        let net = net.clone();
        let asked = ConnectNetworkEventRegisterAnyArgs { event_id, net };
        let answer = shell.call(procs::CONNECT_NETWORK_EVENT_REGISTER_ANY, &asked)?;
        Ok(Some(answer.callback_id))
    };
    let deregister = |shell: &mut Shell, callback_id: i32| {
        let asked = ConnectNetworkEventDeregisterAnyArgs { callback_id };
        shell.call(procs::CONNECT_NETWORK_EVENT_DEREGISTER_ANY, &asked)
    };
    wait(shell, args, &[kind], register, deregister)
}

fn pool(shell: &mut Shell, args: &Args) -> Result {
    let Some(kind) = wanted(shell, args, POOL_NAMES)? else {
        return Ok(());
    };
    let pool: Option<StoragePool> = match args.text("pool")? {
        None => None,
        Some(word) => {
            let by_uuid = parse_uuid(word).filter(|_| word.len() == 36).map(|uuid| {
                let asked = StoragePoolLookupByUuidArgs { uuid };
                shell.call(procs::STORAGE_POOL_LOOKUP_BY_UUID, &asked)
            });
            let found = match by_uuid {
                Some(Ok(found)) => found.pool,
                _ => {
                    let asked = StoragePoolLookupByNameArgs {
                        name: word.to_owned(),
                    };
                    shell
                        .call(procs::STORAGE_POOL_LOOKUP_BY_NAME, &asked)
                        .context(format!("failed to get pool '{word}'"))?
                        .pool
                }
            };
            Some(found)
        }
    };
    let register = |shell: &mut Shell, event_id: i32| {
        let pool = pool.clone();
        let asked = ConnectStoragePoolEventRegisterAnyArgs { event_id, pool };
        let answer = shell.call(procs::CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY, &asked)?;
        Ok(Some(answer.callback_id))
    };
    let deregister = |shell: &mut Shell, callback_id: i32| {
        let asked = ConnectStoragePoolEventDeregisterAnyArgs { callback_id };
        shell.call(procs::CONNECT_STORAGE_POOL_EVENT_DEREGISTER_ANY, &asked)
    };
    wait(shell, args, &[kind], register, deregister)
}

fn node_device(shell: &mut Shell, args: &Args) -> Result {
    let Some(kind) = wanted(shell, args, NODE_DEVICE_NAMES)? else {
        return Ok(());
    };
    let dev: Option<NodeDevice> = match args.text("device")? {
        None => None,
        Some(word) => {
            let asked = NodeDeviceLookupByNameArgs {
                name: word.to_owned(),
            };
            let found = shell
                .call(procs::NODE_DEVICE_LOOKUP_BY_NAME, &asked)
                .context(format!("Could not find matching device '{word}'"))?;
            Some(found.dev)
        }
    };
    let register = |shell: &mut Shell, event_id: i32| {
        let dev = dev.clone();
        let asked = ConnectNodeDeviceEventRegisterAnyArgs { event_id, dev };
        let answer = shell.call(procs::CONNECT_NODE_DEVICE_EVENT_REGISTER_ANY, &asked)?;
        Ok(Some(answer.callback_id))
    };
    let deregister = |shell: &mut Shell, callback_id: i32| {
        let asked = ConnectNodeDeviceEventDeregisterAnyArgs { callback_id };
        shell.call(procs::CONNECT_NODE_DEVICE_EVENT_DEREGISTER_ANY, &asked)
    };
    wait(shell, args, &[kind], register, deregister)
}

fn secret(shell: &mut Shell, args: &Args) -> Result {
    let Some(kind) = wanted(shell, args, SECRET_NAMES)? else {
        return Ok(());
    };
    let secret: Option<Secret> = match args.text("secret")? {
        None => None,
        Some(word) => Some(crate::commands::secret::lookup(shell, word)?),
    };
    let register = |shell: &mut Shell, event_id: i32| {
        let secret = secret.clone();
        let asked = ConnectSecretEventRegisterAnyArgs { event_id, secret };
        let answer = shell.call(procs::CONNECT_SECRET_EVENT_REGISTER_ANY, &asked)?;
        Ok(Some(answer.callback_id))
    };
    let deregister = |shell: &mut Shell, callback_id: i32| {
        let asked = ConnectSecretEventDeregisterAnyArgs { callback_id };
        shell.call(procs::CONNECT_SECRET_EVENT_DEREGISTER_ANY, &asked)
    };
    wait(shell, args, &[kind], register, deregister)
}

/// What an event says, in virsh's words; nothing if it is about something else, or cannot be understood.
pub(super) fn describe(event: &Event) -> Option<String> {
    macro_rules! message {
        ($procedure:ident) => {
            event.get(procs::$procedure).transpose().ok().flatten()
        };
    }
    if let Some(m) = message!(NETWORK_EVENT_LIFECYCLE) {
        let what = name(&["Defined", "Undefined", "Started", "Stopped"], m.event);
        return Some(format!(
            "event 'lifecycle' for network {}: {what}\n",
            m.net.name
        ));
    }
    if let Some(m) = message!(STORAGE_POOL_EVENT_LIFECYCLE) {
        let whats = [
            "Defined",
            "Undefined",
            "Started",
            "Stopped",
            "Created",
            "Deleted",
        ];
        let what = name(&whats, m.event);
        return Some(format!(
            "event 'lifecycle' for storage pool {}: {what}\n",
            m.pool.name
        ));
    }
    if let Some(m) = message!(STORAGE_POOL_EVENT_REFRESH) {
        return Some(format!(
            "event 'refresh' for storage pool {}\n",
            m.pool.name
        ));
    }
    if let Some(m) = message!(NODE_DEVICE_EVENT_LIFECYCLE) {
        let what = name(&["Created", "Deleted", "Defined", "Undefined"], m.event);
        return Some(format!(
            "event 'lifecycle' for node device {}: {what}\n",
            m.dev.name
        ));
    }
    if let Some(m) = message!(NODE_DEVICE_EVENT_UPDATE) {
        return Some(format!("event 'update' for node device {}\n", m.dev.name));
    }
    if let Some(m) = message!(SECRET_EVENT_LIFECYCLE) {
        let what = name(&["Defined", "Undefined"], m.event);
        let uuid = format_uuid(&m.secret.uuid);
        return Some(format!("event 'lifecycle' for secret {uuid}: {what}\n"));
    }
    if let Some(m) = message!(SECRET_EVENT_VALUE_CHANGED) {
        let uuid = format_uuid(&m.secret.uuid);
        return Some(format!("event 'value-changed' for secret {uuid}\n"));
    }
    None
}
