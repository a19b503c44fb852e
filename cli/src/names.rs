//! Names of what is there, for completion: asked of the daemon when they are needed.

use rpc::args::*;
use rpc::procs;
use xml_schemas::dom::Element;

use crate::command::Values;
use crate::commands::{self, format_uuid};
use crate::failure::Result;
use crate::shell::Shell;

/// What the options before the word that is completed say.
pub type Given = [(&'static str, String)];

/// The names that an option's value may be. None where they depend on an object that the line does not name.
///
/// # Errors
///
/// The daemon's: completion then offers nothing.
pub fn names(shell: &mut Shell, values: Values, given: &Given) -> Result<Vec<String>> {
    const ALL: i32 = 1;
    let one = |name: &str| {
        let found = given.iter().find(|(option, _)| *option == name);
        found.map(|(_, value)| value.clone())
    };
    let (need_results, flags) = (ALL, 0);
    Ok(match values {
        Values::Domains | Values::DomainsThat(_) => {
            let which = match values {
                Values::DomainsThat(are) => are,
                _ => 0,
            };
            let found = commands::list_domains(shell, which)?.into_iter();
            found.map(|domain| domain.name).collect()
        }
        Values::Networks => {
            let asked = ConnectListAllNetworksArgs {
                need_results,
                flags,
            };
            let nets = shell.call(procs::CONNECT_LIST_ALL_NETWORKS, &asked)?.nets;
            nets.0.into_iter().map(|net| net.name).collect()
        }
        Values::Pools => {
            let asked = ConnectListAllStoragePoolsArgs {
                need_results,
                flags,
            };
            let answer = shell.call(procs::CONNECT_LIST_ALL_STORAGE_POOLS, &asked)?;
            answer.pools.0.into_iter().map(|pool| pool.name).collect()
        }
        Values::Volumes => {
            let Some(name) = one("pool").or_else(|| one("inputpool")) else {
                return Ok(Vec::new());
            };
            let asked = StoragePoolLookupByNameArgs { name };
            let pool = shell.call(procs::STORAGE_POOL_LOOKUP_BY_NAME, &asked)?.pool;
            let asked = StoragePoolListAllVolumesArgs {
                pool,
                need_results,
                flags,
            };
            let answer = shell.call(procs::STORAGE_POOL_LIST_ALL_VOLUMES, &asked)?;
            answer.vols.0.into_iter().map(|vol| vol.name).collect()
        }
        Values::NodeDevices => {
            let asked = ConnectListAllNodeDevicesArgs {
                need_results,
                flags,
            };
            let answer = shell.call(procs::CONNECT_LIST_ALL_NODE_DEVICES, &asked)?;
            answer.devices.0.into_iter().map(|dev| dev.name).collect()
        }
        Values::Secrets => {
            let asked = ConnectListAllSecretsArgs {
                need_results,
                flags,
            };
            let secrets = shell.call(procs::CONNECT_LIST_ALL_SECRETS, &asked)?.secrets;
            let uuids = secrets.0.iter().map(|secret| format_uuid(&secret.uuid));
            uuids.collect()
        }
        Values::HostInterfaces => {
            let asked = ConnectListAllInterfacesArgs {
                need_results,
                flags,
            };
            let answer = shell.call(procs::CONNECT_LIST_ALL_INTERFACES, &asked)?;
            answer.ifaces.0.into_iter().map(|it| it.name).collect()
        }
        Values::Snapshots | Values::Checkpoints | Values::Disks | Values::Nics => {
            let Some(word) = one("domain") else {
                return Ok(Vec::new());
            };
            let dom = commands::lookup_domain(shell, &word, commands::ANY)?;
            if values == Values::Snapshots {
                let asked = DomainListAllSnapshotsArgs {
                    dom,
                    need_results,
                    flags,
                };
                let answer = shell.call(procs::DOMAIN_LIST_ALL_SNAPSHOTS, &asked)?;
                answer.snapshots.0.into_iter().map(|it| it.name).collect()
            } else if values == Values::Checkpoints {
                let asked = DomainListAllCheckpointsArgs {
                    dom,
                    need_results,
                    flags,
                };
                let answer = shell.call(procs::DOMAIN_LIST_ALL_CHECKPOINTS, &asked)?;
                answer.checkpoints.0.into_iter().map(|it| it.name).collect()
            } else {
                let xml = commands::domain_xml(shell, &dom, 0)?;
                device_names(&xml, values)
            }
        }
        Values::Events => owned(commands::events::NAMES),
        Values::NetworkEvents => owned(commands::events::object_events::NETWORK_NAMES),
        Values::PoolEvents => owned(commands::events::object_events::POOL_NAMES),
        Values::NodeDeviceEvents => owned(commands::events::object_events::NODE_DEVICE_NAMES),
        Values::SecretEvents => owned(commands::events::object_events::SECRET_NAMES),
        Values::Commands | Values::Files | Values::None | Values::Words(_) => Vec::new(),
    })
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Targets of disks, or MAC addresses of network interfaces.
fn device_names(xml: &str, values: Values) -> Vec<String> {
    let (kind, child, attribute) = if values == Values::Disks {
        ("disk", "target", "dev")
    } else {
        ("interface", "mac", "address")
    };
    let Ok(root) = xml_schemas::dom::parse(xml, "(domain_definition)") else {
        return Vec::new();
    };
    let name = |device: &Element| {
        let value = device.child(child)?.attr(attribute)?;
        Some(value.to_owned())
    };
    let devices = root.child("devices");
    devices
        .into_iter()
        .flat_map(|devices| devices.elements())
        .filter(|device| device.name == kind)
        .filter_map(name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_called_by_their_targets() {
        let xml = "<domain><devices><disk><target dev='vda'/></disk><disk><target dev='vdb'/></disk>\
                   <interface><mac address='52:54:00:00:00:01'/></interface></devices></domain>";
        assert_eq!(device_names(xml, Values::Disks), ["vda", "vdb"]);
        assert_eq!(device_names(xml, Values::Nics), ["52:54:00:00:00:01"]);
        assert!(device_names("<", Values::Nics).is_empty());
    }
}
