//! `pool-list`, `pool-define-as`, `pool-create-as`.

use rpc::args::*;
use rpc::procs;
use rpc::types::StoragePool;
use xml_schemas::dom::{Element, format_element};

use super::definition::PRINT;
use super::format_uuid;
use super::pool::{BUILD, NO_OVERWRITE, OVERWRITE, pretty, start_flags, state};
use crate::command::{Args, Command, Opt, data, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::table::Table;

/// `pool-list`
pub const POOL_LIST: Command = Command {
    name: "pool-list",
    summary: "list pools",
    description: "Shows the pools: those that are active, or the chosen ones.",
    options: &[
        flag("inactive", "only pools that are not active"),
        flag("all", "active pools and others"),
        flag("transient", "pools without a definition that stays"),
        flag("persistent", "pools with a definition that stays"),
        flag("autostart", "pools that start with the host"),
        flag("no-autostart", "pools that don't start with the host"),
        text("type", "pools of these types, separated by commas"),
        flag("details", "with their sizes"),
        flag("uuid", "print UUIDs only"),
        flag("name", "print names only"),
    ],
    handler: list,
    connects: true,
};

const NAME: Opt = data("name", "name of the pool");
const TYPE: Opt = data("type", "type of the pool");

macro_rules! source_options {
    ($($more:expr),* $(,)?) => {
        &[
            NAME,
            TYPE,
            PRINT,
            text("source-host", "the server"),
            text("source-path", "the folder on the server"),
            text("source-dev", "the device"),
            text("source-name", "the name of the source"),
            text("target", "where the volumes are"),
            text("source-format", "the format of the source"),
            text("auth-type", "how to prove who one is"),
            text("auth-username", "as whom"),
            text("secret-usage", "the secret's usage"),
            text("secret-uuid", "the secret's UUID"),
            text("adapter-name", "the adapter's name"),
            text("adapter-wwnn", "the adapter's wwnn"),
            text("adapter-wwpn", "the adapter's wwpn"),
            text("adapter-parent", "the adapter's parent"),
            text("adapter-parent-wwnn", "the parent's wwnn"),
            text("adapter-parent-wwpn", "the parent's wwpn"),
            text("adapter-parent-fabric-wwn", "the parent's fabric_wwn"),
            text("source-protocol-ver", "the version of NFS"),
            text("source-initiator", "the initiator's IQN"),
            $($more,)*
        ]
    };
}

/// `pool-define-as`
pub const POOL_DEFINE_AS: Command = Command {
    name: "pool-define-as",
    summary: "define a pool from a set of args",
    description: "Keeps a definition made of options.",
    options: source_options![],
    handler: define_as,
    connects: true,
};

/// `pool-create-as`
pub const POOL_CREATE_AS: Command = Command {
    name: "pool-create-as",
    summary: "create a pool from a set of args",
    description: "Starts a pool made of options, without a definition that stays.",
    options: source_options![BUILD, NO_OVERWRITE, OVERWRITE],
    handler: create_as,
    connects: true,
};

/// Types of pools with their bits in `VIR_CONNECT_LIST_STORAGE_POOLS_*`.
const TYPES: &[(&str, u32)] = &[
    ("dir", 1 << 6),
    ("fs", 1 << 7),
    ("netfs", 1 << 8),
    ("logical", 1 << 9),
    ("disk", 1 << 10),
    ("iscsi", 1 << 11),
    ("scsi", 1 << 12),
    ("mpath", 1 << 13),
    ("rbd", 1 << 14),
    ("sheepdog", 1 << 15),
    ("gluster", 1 << 16),
    ("zfs", 1 << 17),
    ("vstorage", 1 << 18),
    ("iscsi-direct", 1 << 19),
];

/// All pools that pass the filters (`VIR_CONNECT_LIST_STORAGE_POOLS_*`; 0: all), by name.
///
/// # Errors
///
/// The daemon cannot be asked.
pub fn all(shell: &mut Shell, flags: u32) -> Result<Vec<StoragePool>> {
    let asked = ConnectListAllStoragePoolsArgs {
        need_results: 1,
        flags,
    };
    let mut pools = shell
        .call(procs::CONNECT_LIST_ALL_STORAGE_POOLS, &asked)
        .context("Failed to list pools")?
        .pools
        .0;
    pools.sort_by_cached_key(|pool| pool.name.to_lowercase());
    Ok(pools)
}

fn list(shell: &mut Shell, args: &Args) -> Result {
    const INACTIVE: u32 = 1;
    const ACTIVE: u32 = 2;
    let mut flags = if args.has("all") {
        ACTIVE | INACTIVE
    } else if args.has("inactive") {
        INACTIVE
    } else {
        ACTIVE
    };
    flags |= super::domain::flags(
        args,
        &[
            ("persistent", 1 << 2),
            ("transient", 1 << 3),
            ("autostart", 1 << 4),
            ("no-autostart", 1 << 5),
        ],
    );
    if let Some(types) = args.text("type")? {
        for word in types.split(',') {
            let known = TYPES.iter().find(|(name, _)| *name == word);
            let (_, bit) =
                known.ok_or_else(|| Failure::new(format!("Invalid pool type '{word}'")))?;
            flags |= bit;
        }
    }
    let (uuids, names) = (args.has("uuid"), args.has("name"));
    let details = args.has("details");
    if details && (uuids || names) {
        return Err(Failure::new(
            "--details can't be used with --uuid or --name",
        ));
    }
    let pools = all(shell, flags)?;
    if uuids || names {
        for pool in pools {
            if uuids {
                let end = if names { ' ' } else { '\n' };
                shell
                    .out
                    .print(format!("{:<36}{end}", format_uuid(&pool.uuid)));
            }
            if names {
                shell.out.print(format!("{:<20}\n", pool.name));
            }
        }
        return Ok(());
    }
    let mut table = if details {
        Table::new(&[
            "Name",
            "State",
            "Autostart",
            "Persistent",
            "Capacity",
            "Allocation",
            "Available",
        ])
    } else {
        Table::new(&["Name", "State", "Autostart"])
    };
    for pool in pools {
        let asked = StoragePoolGetAutostartArgs { pool: pool.clone() };
        let autostart = match shell.call(procs::STORAGE_POOL_GET_AUTOSTART, &asked) {
            Ok(ret) if ret.autostart != 0 => "yes",
            Ok(_) => "no",
            Err(_) => "no autostart",
        };
        if !details {
            let asked = StoragePoolIsActiveArgs { pool: pool.clone() };
            let state = match shell.call(procs::STORAGE_POOL_IS_ACTIVE, &asked) {
                Ok(ret) if ret.active != 0 => "active",
                Ok(_) => "inactive",
                Err(_) => "unknown",
            };
            table.row([&pool.name, state, autostart]);
            continue;
        }
        let asked = StoragePoolIsPersistentArgs { pool: pool.clone() };
        let persistent = match shell.call(procs::STORAGE_POOL_IS_PERSISTENT, &asked) {
            Ok(ret) if ret.persistent != 0 => "yes",
            Ok(_) => "no",
            Err(_) => "unknown",
        };
        let asked = StoragePoolGetInfoArgs { pool: pool.clone() };
        let info = shell
            .call(procs::STORAGE_POOL_GET_INFO, &asked)
            .context("Could not get pool information")?;
        let running = matches!(info.state, 2 | 3);
        let size = |bytes| {
            if running {
                pretty(bytes)
            } else {
                "-".to_owned()
            }
        };
        table.row([
            pool.name.clone(),
            state(info.state).to_owned(),
            autostart.to_owned(),
            persistent.to_owned(),
            size(info.capacity),
            size(info.allocation),
            size(info.available),
        ]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

/// The definition that the options make.
fn definition(args: &Args) -> Result<(String, String)> {
    let name = args.required("name")?;
    let mut root = Element::new("pool")
        .with_attr("type", args.required("type")?)
        .with_child(Element::with_text("name", name));
    let mut source = Element::new("source");
    for (option, element, attribute) in [
        ("source-host", "host", "name"),
        ("source-path", "dir", "path"),
        ("source-dev", "device", "path"),
    ] {
        if let Some(value) = args.text(option)? {
            source.push(Element::new(element).with_attr(attribute, value));
        }
    }
    if let Some(iqn) = args.text("source-initiator")? {
        source
            .push(Element::new("initiator").with_child(Element::new("iqn").with_attr("name", iqn)));
    }
    adapter(args, &mut source)?;
    if let (Some(kind), Some(user)) = (args.text("auth-type")?, args.text("auth-username")?) {
        let mut secret = Element::new("secret");
        match args.text("secret-uuid")? {
            Some(uuid) => secret.set_attr("uuid", uuid),
            None => secret.set_opt_attr("usage", args.text("secret-usage")?),
        }
        source.push(
            Element::new("auth")
                .with_attr("type", kind)
                .with_attr("username", user)
                .with_child(secret),
        );
    }
    if let Some(value) = args.text("source-name")? {
        source.push(Element::with_text("name", value));
    }
    if let Some(value) = args.text("source-format")? {
        source.push(Element::new("format").with_attr("type", value));
    }
    if let Some(value) = args.text("source-protocol-ver")? {
        source.push(Element::new("protocol").with_attr("ver", value));
    }
    if !source.is_empty() {
        root.push(source);
    }
    if let Some(target) = args.text("target")? {
        root.push(Element::new("target").with_child(Element::with_text("path", target)));
    }
    let mut out = String::new();
    format_element(&mut out, &root, 0);
    Ok((name.to_owned(), out))
}

fn adapter(args: &Args, source: &mut Element) -> Result {
    args.requires("adapter-wwnn", "adapter-wwpn")?;
    args.requires("adapter-wwpn", "adapter-wwnn")?;
    let mut adapter = Element::new("adapter");
    if let Some(wwnn) = args.text("adapter-wwnn")? {
        adapter.set_attr("type", "fc_host");
        adapter.set_opt_attr("parent", args.text("adapter-parent")?);
        adapter.set_opt_attr("parent_wwnn", args.text("adapter-parent-wwnn")?);
        adapter.set_opt_attr("parent_wwpn", args.text("adapter-parent-wwpn")?);
        adapter.set_opt_attr("parent_fabric_wwn", args.text("adapter-parent-fabric-wwn")?);
        adapter.set_attr("wwnn", wwnn);
        adapter.set_opt_attr("wwpn", args.text("adapter-wwpn")?);
    } else if let Some(name) = args.text("adapter-name")? {
        adapter.set_attr("type", "scsi_host");
        adapter.set_attr("name", name);
    } else {
        return Ok(());
    }
    source.push(adapter);
    Ok(())
}

fn define_as(shell: &mut Shell, args: &Args) -> Result {
    let (name, xml) = definition(args)?;
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    let asked = StoragePoolDefineXmlArgs { xml, flags: 0 };
    let pool = shell
        .call(procs::STORAGE_POOL_DEFINE_XML, &asked)
        .with_context(|| format!("Failed to define pool {name}"))?
        .pool;
    shell
        .out
        .print_extra(format!("Pool {} defined\n", pool.name));
    Ok(())
}

fn create_as(shell: &mut Shell, args: &Args) -> Result {
    let flags = start_flags(args)?;
    let (name, xml) = definition(args)?;
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    let asked = StoragePoolCreateXmlArgs { xml, flags };
    let pool = shell
        .call(procs::STORAGE_POOL_CREATE_XML, &asked)
        .with_context(|| format!("Failed to create pool {name}"))?
        .pool;
    shell
        .out
        .print_extra(format!("Pool {} created\n", pool.name));
    Ok(())
}
