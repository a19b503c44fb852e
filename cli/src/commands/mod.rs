//! The commands: one file a group of related ones, and what they share.

pub mod agent;
pub mod block;
pub mod block_jobs;
mod checkpoint;
pub mod completion;
pub mod console;
pub mod cpu;
pub mod definition;
pub mod domain;
pub mod events;
pub mod host;
mod host_interface;
pub mod interface;
pub mod list;
pub mod metadata;
pub mod migrate;
pub mod monitor;
pub mod network;
pub mod network_parts;
pub mod node;
pub mod nodedev;
mod nwfilter;
pub mod params;
pub mod plug;
pub mod pool;
pub mod pool_list;
pub mod rarely;
pub mod resources;
pub mod save;
pub mod secret;
pub mod snapshot;
pub mod ssh_helper;
pub mod stats;
pub mod tunables;
mod undefine_storage;
pub mod vcpus;
pub mod virsh;
pub mod volume;
pub mod volume_make;
pub mod volume_transfer;

use std::fs;
use std::path::Path;

use rpc::args::{
    ConnectListAllDomainsArgs, DomainLookupByIdArgs, DomainLookupByNameArgs, DomainLookupByUuidArgs,
};
use rpc::procs;
use rpc::types::Domain;
use rpc::xdr::Uuid;

use crate::command::{Args, Command, Group};
use crate::failure::{Failure, Result};
use crate::shell::Shell;

/// All commands.
pub const GROUPS: &[Group] = &[
    Group {
        title: "Domain Management",
        keyword: "domain",
        commands: DOMAIN_COMMANDS,
    },
    Group {
        title: "Domain Monitoring",
        keyword: "monitor",
        commands: &[
            block::DOMBLKERROR,
            block::DOMBLKINFO,
            block::DOMBLKLIST,
            block::DOMBLKSTAT,
            monitor::DOMCONTROL,
            interface::DOMIF_GETLINK,
            interface::DOMIFADDR,
            interface::DOMIFLIST,
            interface::DOMIFSTAT,
            monitor::DOMINFO,
            stats::DOMMEMSTAT,
            monitor::DOMSTATE,
            stats::DOMSTATS,
            agent::DOMTIME,
            list::LIST,
        ],
    },
    Group {
        title: "Domain Events",
        keyword: "events",
        commands: &[events::EVENT],
    },
    Group {
        title: "Host and Hypervisor",
        keyword: "host",
        commands: &[
            node::ALLOCPAGES,
            host::CAPABILITIES,
            cpu::CPU_BASELINE,
            cpu::CPU_COMPARE,
            cpu::CPU_MODELS,
            host::DOMCAPABILITIES,
            host::FREECELL,
            node::FREEPAGES,
            host::HOST_VALIDATE,
            host::HOSTNAME,
            cpu::HYPERVISOR_CPU_BASELINE,
            cpu::HYPERVISOR_CPU_COMPARE,
            host::MAXVCPUS,
            node::NODE_MEMORY_TUNE,
            host::NODECPUMAP,
            node::NODECPUSTATS,
            host::NODEINFO,
            node::NODEMEMSTATS,
            node::NODESEVINFO,
            node::NODESUSPEND,
            host::SYSINFO,
            host::URI,
            host::VERSION,
        ],
    },
    Group {
        title: "Checkpoint",
        keyword: "checkpoint",
        commands: &[
            checkpoint::CHECKPOINT_CREATE,
            checkpoint::CHECKPOINT_CREATE_AS,
            checkpoint::CHECKPOINT_DELETE,
            checkpoint::CHECKPOINT_DUMPXML,
            checkpoint::CHECKPOINT_EDIT,
            checkpoint::CHECKPOINT_INFO,
            checkpoint::CHECKPOINT_LIST,
            checkpoint::CHECKPOINT_PARENT,
        ],
    },
    Group {
        title: "Interface",
        keyword: "interface",
        commands: &[
            host_interface::IFACE_BEGIN,
            host_interface::IFACE_BRIDGE,
            host_interface::IFACE_COMMIT,
            host_interface::IFACE_DEFINE,
            host_interface::IFACE_DESTROY,
            host_interface::IFACE_DUMPXML,
            host_interface::IFACE_EDIT,
            host_interface::IFACE_LIST,
            host_interface::IFACE_MAC,
            host_interface::IFACE_NAME,
            host_interface::IFACE_ROLLBACK,
            host_interface::IFACE_START,
            host_interface::IFACE_UNBRIDGE,
            host_interface::IFACE_UNDEFINE,
        ],
    },
    Group {
        title: "Network Filter",
        keyword: "filter",
        commands: &[
            nwfilter::NWFILTER_DEFINE,
            nwfilter::NWFILTER_DUMPXML,
            nwfilter::NWFILTER_EDIT,
            nwfilter::NWFILTER_LIST,
            nwfilter::NWFILTER_UNDEFINE,
            nwfilter::NWFILTER_BINDING_CREATE,
            nwfilter::NWFILTER_BINDING_DELETE,
            nwfilter::NWFILTER_BINDING_DUMPXML,
            nwfilter::NWFILTER_BINDING_LIST,
        ],
    },
    Group {
        title: "Networking",
        keyword: "network",
        commands: &[
            network::NET_AUTOSTART,
            network::NET_CREATE,
            network::NET_DEFINE,
            network_parts::NET_DESC,
            network::NET_DESTROY,
            network::NET_DHCP_LEASES,
            network::NET_DUMPXML,
            network::NET_EDIT,
            events::object_events::NET_EVENT,
            network::NET_INFO,
            network::NET_LIST,
            network_parts::NET_METADATA,
            network::NET_NAME,
            network_parts::NET_PORT_CREATE,
            network_parts::NET_PORT_DELETE,
            network_parts::NET_PORT_DUMPXML,
            network_parts::NET_PORT_LIST,
            network::NET_START,
            network::NET_UNDEFINE,
            network_parts::NET_UPDATE,
            network::NET_UUID,
        ],
    },
    Group {
        title: "Node Device",
        keyword: "nodedev",
        commands: &[
            nodedev::NODEDEV_AUTOSTART,
            nodedev::NODEDEV_CREATE,
            nodedev::NODEDEV_DEFINE,
            nodedev::NODEDEV_DESTROY,
            nodedev::NODEDEV_DETACH,
            nodedev::NODEDEV_DUMPXML,
            events::object_events::NODEDEV_EVENT,
            nodedev::NODEDEV_INFO,
            nodedev::NODEDEV_LIST,
            nodedev::NODEDEV_REATTACH,
            nodedev::NODEDEV_RESET,
            nodedev::NODEDEV_START,
            nodedev::NODEDEV_UNDEFINE,
        ],
    },
    Group {
        title: "Secret",
        keyword: "secret",
        commands: &[
            secret::SECRET_DEFINE,
            secret::SECRET_DUMPXML,
            events::object_events::SECRET_EVENT,
            secret::SECRET_GET_VALUE,
            secret::SECRET_LIST,
            secret::SECRET_SET_VALUE,
            secret::SECRET_UNDEFINE,
        ],
    },
    Group {
        title: "Snapshot",
        keyword: "snapshot",
        commands: &[
            snapshot::SNAPSHOT_CREATE,
            snapshot::SNAPSHOT_CREATE_AS,
            snapshot::SNAPSHOT_CURRENT,
            snapshot::SNAPSHOT_DELETE,
            snapshot::SNAPSHOT_DUMPXML,
            snapshot::SNAPSHOT_EDIT,
            snapshot::SNAPSHOT_INFO,
            snapshot::SNAPSHOT_LIST,
            snapshot::SNAPSHOT_PARENT,
            snapshot::SNAPSHOT_REVERT,
        ],
    },
    Group {
        title: "Backup",
        keyword: "backup",
        commands: &[checkpoint::BACKUP_BEGIN, checkpoint::BACKUP_DUMPXML],
    },
    Group {
        title: "Storage Pool",
        keyword: "pool",
        commands: &[
            pool::FIND_SOURCES_AS,
            pool::FIND_SOURCES,
            pool::POOL_AUTOSTART,
            pool::POOL_BUILD,
            pool_list::POOL_CREATE_AS,
            pool::POOL_CREATE,
            pool_list::POOL_DEFINE_AS,
            pool::POOL_DEFINE,
            pool::POOL_DELETE,
            pool::POOL_DESTROY,
            pool::POOL_DUMPXML,
            pool::POOL_EDIT,
            pool::POOL_INFO,
            pool_list::POOL_LIST,
            pool::POOL_NAME,
            pool::POOL_REFRESH,
            pool::POOL_START,
            pool::POOL_UNDEFINE,
            pool::POOL_UUID,
            events::object_events::POOL_EVENT,
            pool::POOL_CAPABILITIES,
        ],
    },
    Group {
        title: "Storage Volume",
        keyword: "volume",
        commands: &[
            volume_make::VOL_CLONE,
            volume_make::VOL_CREATE_AS,
            volume_make::VOL_CREATE,
            volume_make::VOL_CREATE_FROM,
            volume::VOL_DELETE,
            volume_transfer::VOL_DOWNLOAD,
            volume::VOL_DUMPXML,
            volume::VOL_INFO,
            volume::VOL_KEY,
            volume::VOL_LIST,
            volume::VOL_NAME,
            volume::VOL_PATH,
            volume::VOL_POOL,
            volume::VOL_RESIZE,
            volume_transfer::VOL_UPLOAD,
            volume::VOL_WIPE,
        ],
    },
    Group {
        title: "Vireo itself",
        keyword: "vireo",
        commands: &[
            virsh::CD,
            virsh::ECHO,
            virsh::EXIT,
            virsh::HELP,
            virsh::PWD,
            virsh::QUIT,
            virsh::CONNECT,
            completion::COMPLETION,
        ],
    },
    // For programs only.
    Group {
        title: "",
        keyword: "",
        commands: &[
            completion::COMPLETE,
            completion::COMPATIBILITY,
            ssh_helper::SSH_HELPER,
        ],
    },
];

const DOMAIN_COMMANDS: &[Command] = &[
    plug::ATTACH_DEVICE,
    plug::ATTACH_DISK,
    plug::ATTACH_INTERFACE,
    domain::AUTOSTART,
    block::BLKDEVIOTUNE,
    tunables::BLKIOTUNE,
    block_jobs::BLOCKCOMMIT,
    block_jobs::BLOCKCOPY,
    block_jobs::BLOCKJOB,
    block_jobs::BLOCKPULL,
    block::BLOCKRESIZE,
    plug::CHANGE_MEDIA,
    console::CONSOLE,
    vcpus::CPU_STATS,
    definition::CREATE,
    definition::DEFINE,
    metadata::DESC,
    domain::DESTROY,
    plug::DETACH_DEVICE,
    plug::DETACH_DEVICE_ALIAS,
    plug::DETACH_DISK,
    plug::DETACH_INTERFACE,
    rarely::DOM_FD_ASSOCIATE,
    rarely::DOMBLKTHRESHOLD,
    rarely::DOMDIRTYRATE_CALC,
    rarely::DOMDISPLAY,
    agent::DOMFSFREEZE,
    agent::DOMFSINFO,
    agent::DOMFSTHAW,
    agent::DOMFSTRIM,
    agent::DOMHOSTNAME,
    domain::DOMID,
    save::job::DOMJOBABORT,
    save::job::DOMJOBINFO,
    interface::DOMIF_SETLINK,
    interface::DOMIFTUNE,
    rarely::DOMLAUNCHSECINFO,
    domain::DOMNAME,
    rarely::DOMPMSUSPEND,
    rarely::DOMPMWAKEUP,
    domain::DOMRENAME,
    rarely::DOMSETLAUNCHSECSTATE,
    domain::DOMUUID,
    save::DUMP,
    rarely::DOMXML_FROM_NATIVE,
    rarely::DOMXML_TO_NATIVE,
    definition::DUMPXML,
    definition::EDIT,
    vcpus::EMULATORPIN,
    agent::GET_USER_SSHKEYS,
    agent::GUEST_AGENT_TIMEOUT,
    agent::GUESTINFO,
    vcpus::GUESTVCPUS,
    domain::INJECT_NMI,
    save::MANAGEDSAVE,
    save::image::MANAGEDSAVE_DEFINE,
    save::image::MANAGEDSAVE_DUMPXML,
    save::image::MANAGEDSAVE_EDIT,
    save::MANAGEDSAVE_REMOVE,
    vcpus::IOTHREADADD,
    vcpus::IOTHREADDEL,
    vcpus::IOTHREADINFO,
    vcpus::IOTHREADPIN,
    vcpus::IOTHREADSET,
    rarely::LXC_ENTER_NAMESPACE,
    tunables::MEMTUNE,
    metadata::METADATA,
    migrate::MIGRATE,
    migrate::COMPCACHE,
    migrate::GETMAXDOWNTIME,
    migrate::GETSPEED,
    migrate::POSTCOPY_NOW,
    migrate::SETMAXDOWNTIME,
    migrate::SETSPEED,
    tunables::NUMATUNE,
    tunables::PERF,
    agent::QEMU_AGENT_COMMAND,
    rarely::QEMU_ATTACH,
    rarely::QEMU_MONITOR_COMMAND,
    events::monitor::QEMU_MONITOR_EVENT,
    domain::REBOOT,
    domain::RESET,
    save::RESTORE,
    domain::RESUME,
    save::SAVE,
    save::image::SAVE_IMAGE_DEFINE,
    save::image::SAVE_IMAGE_DUMPXML,
    save::image::SAVE_IMAGE_EDIT,
    tunables::SCHEDINFO,
    rarely::SCREENSHOT,
    rarely::SEND_KEY,
    rarely::SEND_PROCESS_SIGNAL,
    stats::SET_LIFECYCLE_ACTION,
    agent::SET_USER_PASSWORD,
    agent::SET_USER_SSHKEYS,
    resources::SETMAXMEM,
    resources::SETMEM,
    vcpus::SETVCPU,
    vcpus::SETVCPUS,
    domain::SHUTDOWN,
    domain::START,
    domain::SUSPEND,
    console::TTYCONSOLE,
    definition::UNDEFINE,
    plug::UPDATE_DEVICE,
    rarely::UPDATE_MEMORY_DEVICE,
    resources::VCPUCOUNT,
    vcpus::VCPUINFO,
    vcpus::VCPUPIN,
    rarely::VNCDISPLAY,
];

/// What a domain may be named by.
#[derive(Debug, Clone, Copy)]
pub struct By {
    id: bool,
    uuid: bool,
    name: bool,
}

/// By id, UUID or name.
pub const ANY: By = By {
    id: true,
    uuid: true,
    name: true,
};
/// By UUID or name, where an id makes no sense.
pub const NAME_OR_UUID: By = By { id: false, ..ANY };
/// By id or name.
pub const NAME_OR_ID: By = By { uuid: false, ..ANY };
/// By id or UUID.
pub const ID_OR_UUID: By = By { name: false, ..ANY };

/// Finds the domain that the option `domain` names.
///
/// # Errors
///
/// There is none, or the daemon cannot be asked.
pub fn find_domain(shell: &mut Shell, args: &Args, by: By) -> Result<Domain> {
    lookup_domain(shell, args.required("domain")?, by)
}

/// Finds a domain by what a user calls it: an id, if it is a number of a running domain; a UUID; or a name.
///
/// # Errors
///
/// There is none, or the daemon cannot be asked.
pub fn lookup_domain(shell: &mut Shell, word: &str, by: By) -> Result<Domain> {
    // Only "no such domain" leads to the next way of looking; a lost connection is told as it is.
    let found = |result: Result<Domain>| match result {
        Ok(domain) => Some(Ok(domain)),
        Err(failure) if failure.disconnected => Some(Err(failure)),
        Err(_) => None,
    };
    if by.id
        && let Ok(id) = word.parse::<i32>()
        && id >= 0
    {
        let looked_up = shell.call(procs::DOMAIN_LOOKUP_BY_ID, &DomainLookupByIdArgs { id });
        if let Some(result) = found(looked_up.map(|ret| ret.dom)) {
            return result;
        }
    }
    if by.uuid
        && word.len() == 36
        && let Some(uuid) = parse_uuid(word)
    {
        let looked_up = shell.call(
            procs::DOMAIN_LOOKUP_BY_UUID,
            &DomainLookupByUuidArgs { uuid },
        );
        if let Some(result) = found(looked_up.map(|ret| ret.dom)) {
            return result;
        }
    }
    if by.name {
        let args = DomainLookupByNameArgs {
            name: word.to_owned(),
        };
        let looked_up = shell.call(procs::DOMAIN_LOOKUP_BY_NAME, &args);
        if let Some(result) = found(looked_up.map(|ret| ret.dom)) {
            return result;
        }
    }
    Err(Failure::new(format!("failed to get domain '{word}'")))
}

/// All domains that pass the filters (`VIR_CONNECT_LIST_DOMAINS_*`; 0: all).
///
/// # Errors
///
/// The daemon cannot be asked.
pub fn list_domains(shell: &mut Shell, flags: u32) -> Result<Vec<Domain>> {
    let args = ConnectListAllDomainsArgs {
        need_results: 1,
        flags,
    };
    Ok(shell
        .call(procs::CONNECT_LIST_ALL_DOMAINS, &args)?
        .domains
        .0)
}

/// A UUID as people write it; dashes and blanks are optional.
pub fn parse_uuid(text: &str) -> Option<Uuid> {
    let digits: Vec<u32> = text
        .chars()
        .filter(|c| !matches!(c, '-' | ' '))
        .map(|c| c.to_digit(16))
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits
        .chunks(2)
        .map(|pair| u8::try_from(pair[0] * 16 + pair.get(1)?).ok())
        .collect::<Option<_>>()?;
    bytes.try_into().ok()
}

/// A UUID in its usual form.
pub fn format_uuid(uuid: &Uuid) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The largest file that is read as a definition, in bytes: the protocol's limit for one string is 4 MiB.
const DEFINITION_MAX: u64 = 4 * 1024 * 1024;

/// Reads a file with a definition.
///
/// # Errors
///
/// It cannot be opened, is no text, or is larger than the protocol could carry.
pub fn read_definition(path: &str) -> Result<String> {
    use std::io::Read;
    let file = fs::File::open(Path::new(path)).map_err(|error| {
        Failure::new(format!(
            "Failed to open file '{path}': {}",
            os_message(&error)
        ))
    })?;
    let unreadable = |error: std::io::Error| {
        Failure::new(format!(
            "Failed to read file '{path}': {}",
            os_message(&error)
        ))
    };
    let mut bytes = Vec::new();
    file.take(DEFINITION_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > DEFINITION_MAX {
        return Err(Failure::new(format!(
            "Failed to read file '{path}': Value too large for defined data type"
        )));
    }
    let document = rpc::xdr::latin1_document(&bytes);
    if let Some(document) = document.or_else(|| rpc::xdr::utf16_document(&bytes)) {
        return Ok(document);
    }
    String::from_utf8(bytes).map_err(|_| {
        Failure::new(format!(
            "Failed to read file '{path}': it is not UTF-8 text"
        ))
    })
}

/// The system's message of an error, without the number that Rust adds.
pub fn os_message(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" (os error ") {
        Some((message, _)) => message.to_owned(),
        None => text,
    }
}

/// The domain's XML with these flags (`VIR_DOMAIN_XML_*`).
///
/// # Errors
///
/// The daemon's.
pub fn domain_xml(shell: &mut Shell, dom: &Domain, flags: u32) -> Result<String> {
    let args = rpc::args::DomainGetXmlDescArgs {
        dom: dom.clone(),
        flags,
    };
    Ok(shell.call(procs::DOMAIN_GET_XML_DESC, &args)?.xml)
}

/// `VIR_DOMAIN_AFFECT_LIVE` and `_CONFIG`; 0 is the current state.
pub const AFFECT_LIVE: u32 = 1;
/// See [`AFFECT_LIVE`].
pub const AFFECT_CONFIG: u32 = 2;

/// The flags of `--live`, `--config` and `--current`, of which the last excludes the others.
///
/// # Errors
///
/// They contradict each other.
pub fn affected(args: &Args) -> Result<u32> {
    args.exclusive("current", "live")?;
    args.exclusive("current", "config")?;
    let live = if args.has("live") { AFFECT_LIVE } else { 0 };
    let config = if args.has("config") { AFFECT_CONFIG } else { 0 };
    Ok(live | config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_read_and_written() {
        let text = "6695eb01-f6a4-8304-79aa-97f2502e193f";
        let uuid = parse_uuid(text).unwrap();
        assert_eq!(format_uuid(&uuid), text);
        assert_eq!(parse_uuid("6695eb01f6a4830479aa97f2502e193f"), Some(uuid));
        assert_eq!(parse_uuid("6695eb01-f6a4-8304-79aa-97f2502e193"), None);
        assert_eq!(parse_uuid("6695eb01-f6a4-8304-79aa-97f2502e193g"), None);
        assert_eq!(parse_uuid(""), None);
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let error = read_definition("/nonexistent/x.xml").unwrap_err();
        assert_eq!(
            error.lines,
            ["Failed to open file '/nonexistent/x.xml': No such file or directory"]
        );
        let error = read_definition("/").unwrap_err();
        assert_eq!(error.lines, ["Failed to read file '/': Is a directory"]);
    }
}
