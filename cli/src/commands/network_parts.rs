//! Parts of networks: `net-update`, ports, description and metadata.

use rpc::args::*;
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::types::{Network, NetworkPort};

use super::definition::print_selected;
use super::network::{NETWORK, find};
use super::{AFFECT_CONFIG, AFFECT_LIVE, affected, format_uuid, parse_uuid, read_definition};
use crate::command::{Args, Command, Opt, Values, data, flag, number, rest, text};
use crate::editor::Draft;
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::table::Table;

const COMMANDS: &[&str] = &["add", "add-first", "add-last", "delete", "modify"];
const SECTIONS: &[&str] = &[
    "bridge",
    "domain",
    "ip",
    "ip-dhcp-host",
    "ip-dhcp-range",
    "forward",
    "forward-interface",
    "forward-pf",
    "portgroup",
    "dns-host",
    "dns-txt",
    "dns-srv",
];
const PORT: Opt = data("port", "port UUID");
const LIVE: Opt = flag("live", "affect running network");
const CONFIG: Opt = flag("config", "affect next network startup");
const CURRENT: Opt = flag("current", "affect current state of network");

/// `net-update`
pub const NET_UPDATE: Command = Command {
    name: "net-update",
    summary: "update parts of an existing network's configuration",
    description: "Adds a part to a network, changes it or takes it out, at once or from the next start on.",
    options: &[
        NETWORK,
        data("command", "add-first, add-last (add), delete or modify")
            .values(Values::Words(COMMANDS)),
        data("section", "which part").values(Values::Words(SECTIONS)),
        data("xml", "the part in XML, or a file with it"),
        number("parent-index", "in which of several <ip>").named_only(),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: update,
    connects: true,
};

/// `net-port-list`
pub const NET_PORT_LIST: Command = Command {
    name: "net-port-list",
    summary: "list network ports",
    description: "Shows the ports of a network: one for each guest's card in it.",
    options: &[
        NETWORK,
        flag("uuid", "uuids only"),
        flag("table", "a table (default)"),
    ],
    handler: port_list,
    connects: true,
};

/// `net-port-create`
pub const NET_PORT_CREATE: Command = Command {
    name: "net-port-create",
    summary: "create a network port from an XML file",
    description: "Makes a port in a network.",
    options: &[
        NETWORK,
        data("file", "file with the port in XML").values(Values::Files),
        flag("validate", "refuse what libvirt's schema doesn't allow"),
    ],
    handler: port_create,
    connects: true,
};

/// `net-port-dumpxml`
pub const NET_PORT_DUMPXML: Command = Command {
    name: "net-port-dumpxml",
    summary: "network port information in XML",
    description: "Prints a port.",
    options: &[
        NETWORK,
        PORT,
        text("xpath", "print only what this XPath expression selects").named_only(),
        flag("wrap", "put what was selected into one root element"),
    ],
    handler: port_dumpxml,
    connects: true,
};

/// `net-port-delete`
pub const NET_PORT_DELETE: Command = Command {
    name: "net-port-delete",
    summary: "delete the specified network port",
    description: "Removes a port from a network.",
    options: &[NETWORK, PORT],
    handler: port_delete,
    connects: true,
};

/// `net-desc`
pub const NET_DESC: Command = Command {
    name: "net-desc",
    summary: "show or set network's description or title",
    description: "Shows what people wrote about a network, or writes it.",
    options: &[
        NETWORK,
        LIVE,
        CONFIG,
        CURRENT,
        flag("title", "the title instead of the description"),
        flag("edit", "write it in an editor"),
        rest("new-desc", "the new text").allow_empty(),
    ],
    handler: desc,
    connects: true,
};

/// `net-metadata`
pub const NET_METADATA: Command = Command {
    name: "net-metadata",
    summary: "show or set network's custom XML metadata",
    description: "Shows the XML that some program keeps with a network, or changes it.",
    options: &[
        NETWORK,
        data("uri", "the namespace that names the program"),
        LIVE,
        CONFIG,
        CURRENT,
        flag("edit", "change it in an editor"),
        text("key", "the prefix for the namespace"),
        text("set", "the new XML"),
        flag("remove", "remove it"),
    ],
    handler: metadata,
    connects: true,
};

fn update(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("current", "live")?;
    args.exclusive("current", "config")?;
    let net = find(shell, args)?;
    let word = args.required("command")?;
    // virNetworkUpdateCommand
    let command = match word {
        "modify" => 1,
        "delete" => 2,
        "add" | "add-last" => 3,
        "add-first" => 4,
        _ => return Err(Failure::new(format!("unrecognized command name '{word}'"))),
    };
    let word = args.required("section")?;
    let section = SECTIONS.iter().position(|known| *known == word);
    let section = section
        .and_then(|at| u32::try_from(at + 1).ok())
        .ok_or_else(|| Failure::new(format!("unrecognized section name '{word}'")))?;
    let given = args.required("xml")?;
    let xml = if given.starts_with('<') {
        given.to_owned()
    } else {
        read_definition(given)?
    };
    let parent_index = args.number::<i32>("parent-index")?.unwrap_or(-1);
    let (live, config) = (args.has("live"), args.has("config"));
    let flags = if live { AFFECT_LIVE } else { 0 } | if config { AFFECT_CONFIG } else { 0 };
    let affected = if config {
        if live {
            "persistent config and live state"
        } else {
            "persistent config"
        }
    } else {
        let asked = NetworkIsActiveArgs { net: net.clone() };
        let active = shell.call(procs::NETWORK_IS_ACTIVE, &asked)?.active != 0;
        if live || active {
            "live state"
        } else {
            "persistent config"
        }
    };
    let name = net.name.clone();
    /// VIR_DRV_FEATURE_NETWORK_UPDATE_HAS_CORRECT_ORDER: daemons without it (libvirt before 7.2)
    /// take the two the wrong way round.
    const CORRECT_ORDER: i32 = 16;
    let feature = ConnectSupportsFeatureArgs {
        feature: CORRECT_ORDER,
    };
    let asked = shell.call(procs::CONNECT_SUPPORTS_FEATURE, &feature);
    let (command, section) = match asked {
        Ok(ret) if ret.supported > 0 => (command, section),
        Err(failure) if failure.disconnected => return Err(failure),
        Ok(_) | Err(_) => (section, command),
    };
    let asked = NetworkUpdateArgs {
        net,
        command,
        section,
        parent_index,
        xml,
        flags,
    };
    shell
        .call(procs::NETWORK_UPDATE, &asked)
        .with_context(|| format!("Failed to update network {name}"))?;
    shell
        .out
        .print_extra(format!("Updated network {name} {affected}"));
    Ok(())
}

fn port(shell: &mut Shell, args: &Args) -> Result<NetworkPort> {
    let network = find(shell, args)?;
    let word = args.required("port")?;
    let what = format!("failed to get network port '{word}'");
    let Some(uuid) = parse_uuid(word) else {
        return Err(Failure::new(what));
    };
    let asked = NetworkPortLookupByUuidArgs { network, uuid };
    let found = shell.call(procs::NETWORK_PORT_LOOKUP_BY_UUID, &asked);
    Ok(found.context(what)?.port)
}

fn port_list(shell: &mut Shell, args: &Args) -> Result {
    if args.has("uuid") && args.has("table") {
        return Err(Failure::new(
            "Only one argument from --table and --uuid may be specified.",
        ));
    }
    let network = find(shell, args)?;
    let asked = NetworkListAllPortsArgs {
        network,
        need_results: 1,
        flags: 0,
    };
    let mut ports = shell.call(procs::NETWORK_LIST_ALL_PORTS, &asked)?.ports.0;
    ports.sort_by_key(|port| port.uuid);
    if args.has("uuid") {
        for port in &ports {
            shell.out.print(format_uuid(&port.uuid) + "\n");
        }
        return Ok(());
    }
    let mut table = Table::new(&["UUID"]);
    for port in &ports {
        table.row([format_uuid(&port.uuid)]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

fn port_create(shell: &mut Shell, args: &Args) -> Result {
    let path = args.required("file")?;
    let network = find(shell, args)?;
    let asked = NetworkPortCreateXmlArgs {
        network,
        xml: read_definition(path)?,
        flags: if args.has("validate") { 2 } else { 0 },
    };
    let port = shell
        .call(procs::NETWORK_PORT_CREATE_XML, &asked)
        .with_context(|| format!("Failed to create network from {path}"))?
        .port;
    shell.out.print_extra(format!(
        "Network port {} created from {path}\n",
        format_uuid(&port.uuid)
    ));
    Ok(())
}

fn port_dumpxml(shell: &mut Shell, args: &Args) -> Result {
    let port = port(shell, args)?;
    let asked = NetworkPortGetXmlDescArgs { port, flags: 0 };
    let xml = shell.call(procs::NETWORK_PORT_GET_XML_DESC, &asked)?.xml;
    print_selected(shell, args, &xml)
}

fn port_delete(shell: &mut Shell, args: &Args) -> Result {
    let port = port(shell, args)?;
    let uuid = format_uuid(&port.uuid);
    shell
        .call(
            procs::NETWORK_PORT_DELETE,
            &NetworkPortDeleteArgs { port, flags: 0 },
        )
        .with_context(|| format!("Failed to delete network port {uuid}"))?;
    shell
        .out
        .print_extra(format!("Network port {uuid} deleted\n"));
    Ok(())
}

/// `VIR_NETWORK_METADATA_*`
const DESCRIPTION: i32 = 0;
const TITLE: i32 = 1;
const ELEMENT: i32 = 2;

/// What is kept with a network; `None` if there is none.
fn get(
    shell: &mut Shell,
    net: &Network,
    kind: i32,
    uri: Option<&str>,
    flags: u32,
) -> Result<Option<String>> {
    let asked = NetworkGetMetadataArgs {
        net: net.clone(),
        kind,
        uri: uri.map(str::to_owned),
        flags,
    };
    match shell.call(procs::NETWORK_GET_METADATA, &asked) {
        Ok(ret) => Ok(Some(ret.metadata)),
        Err(failure) if failure.code == Some(ErrorCode::NO_NETWORK_METADATA) => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn desc(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    // Only one text can be shown.
    let shown = flags & AFFECT_CONFIG;
    let net = find(shell, args)?;
    let (kind, what) = if args.has("title") {
        (TITLE, "title")
    } else {
        (DESCRIPTION, "description")
    };
    let given = args.rest("new-desc").join(" ");
    let known = get(shell, &net, kind, None, shown)?.unwrap_or_default();
    if !args.has("new-desc") && !args.has("edit") {
        shell.out.print(if known.is_empty() {
            format!("No {what} for network: {}", net.name)
        } else {
            known
        });
        return Ok(());
    }
    let text = if args.has("edit") {
        let before = if args.has("new-desc") { given } else { known };
        let mut draft = Draft::new(&before)?;
        draft.edit()?;
        let after = draft.read()?;
        // Editors end the last line.
        let after = after.strip_suffix('\n').unwrap_or(&after).to_owned();
        if after == before {
            shell.out.print(format!("Network {what} not changed\n"));
            return Ok(());
        }
        after
    } else {
        given
    };
    let set = NetworkSetMetadataArgs {
        net,
        kind,
        metadata: Some(text),
        key: None,
        uri: None,
        flags,
    };
    shell
        .call(procs::NETWORK_SET_METADATA, &set)
        .with_context(|| format!("Failed to set new network {what}"))?;
    shell
        .out
        .print_extra(format!("Network {what} updated successfully"));
    Ok(())
}

fn metadata(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    args.exclusive("edit", "set")?;
    args.exclusive("remove", "set")?;
    args.exclusive("remove", "edit")?;
    let net = find(shell, args)?;
    let uri = args.required("uri")?;
    let key = args.text("key")?.map(str::to_owned);
    if key.is_none() && (args.has("set") || args.has("edit")) {
        return Err(Failure::new(
            "namespace key is required when modifying metadata",
        ));
    }
    let change = |shell: &mut Shell, metadata: Option<String>| {
        let set = NetworkSetMetadataArgs {
            net: net.clone(),
            kind: ELEMENT,
            metadata,
            key: key.clone(),
            uri: Some(uri.to_owned()),
            flags,
        };
        shell.call(procs::NETWORK_SET_METADATA, &set)
    };
    if args.has("remove") {
        change(shell, None)?;
        shell.out.print_extra("Metadata removed\n");
    } else if let Some(xml) = args.text("set")? {
        change(shell, Some(xml.to_owned()))?;
        shell.out.print_extra("Metadata modified\n");
    } else if args.has("edit") {
        let before = get(shell, &net, ELEMENT, Some(uri), flags)?.unwrap_or_else(|| "\n".into());
        let mut draft = Draft::new(&before)?;
        draft.edit()?;
        let after = draft.read()?;
        if after == before {
            shell.out.print_extra("Metadata not changed\n");
            return Ok(());
        }
        change(shell, Some(after))?;
        shell.out.print_extra("Metadata modified\n");
    } else {
        let asked = NetworkGetMetadataArgs {
            net: net.clone(),
            kind: ELEMENT,
            uri: Some(uri.to_owned()),
            flags,
        };
        let xml = shell.call(procs::NETWORK_GET_METADATA, &asked)?.metadata;
        shell.out.print(xml + "\n");
    }
    Ok(())
}
