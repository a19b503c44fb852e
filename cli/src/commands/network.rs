//! Virtual networks.

use rpc::args::*;
use rpc::procs;
use rpc::types::Network;

use super::definition::{WRAP, XPATH, print_selected};
use super::{format_uuid, parse_uuid, read_definition};
use crate::command::{Args, Command, Opt, Values, data, flag, text};
use crate::editor;
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::table::Table;

/// The network that a command is about.
pub const NETWORK: Opt = data("network", "network name or uuid").values(Values::Networks);
const FILE: Opt = data("file", "file with the definition in XML").values(Values::Files);
const VALIDATE: Opt = flag("validate", "refuse what libvirt's schema doesn't allow");

macro_rules! command {
    ($constant:ident, $name:literal, $summary:literal, $description:literal, $options:expr, $handler:expr) => {
        #[doc = concat!("`", $name, "`")]
        pub const $constant: Command = Command {
            name: $name,
            summary: $summary,
            description: $description,
            options: $options,
            handler: $handler,
            connects: true,
        };
    };
}

command!(
    NET_AUTOSTART,
    "net-autostart",
    "autostart a network",
    "Has a network started with the host, or not any longer.",
    &[NETWORK, flag("disable", "not any longer")],
    autostart
);
command!(
    NET_CREATE,
    "net-create",
    "create a network from an XML file",
    "Starts a network that has no definition which stays.",
    &[FILE, VALIDATE],
    create
);
command!(
    NET_DEFINE,
    "net-define",
    "define an inactive persistent virtual network or modify an existing persistent one from an XML file",
    "Keeps a definition, or changes it.",
    &[FILE, VALIDATE],
    define
);
command!(
    NET_DESTROY,
    "net-destroy",
    "destroy (stop) a network",
    "Stops a network. Guests in it run on without it, until it is started again.",
    &[NETWORK],
    destroy
);
command!(
    NET_DHCP_LEASES,
    "net-dhcp-leases",
    "print lease info for a given network",
    "Shows the addresses that a network has given to guests.",
    &[
        NETWORK,
        text("mac", "only this hardware address").named_only()
    ],
    leases
);
command!(
    NET_DUMPXML,
    "net-dumpxml",
    "network information in XML",
    "Prints a network's definition.",
    &[
        NETWORK,
        flag("inactive", "as it will be at the next start"),
        XPATH,
        WRAP,
    ],
    dumpxml
);
command!(
    NET_EDIT,
    "net-edit",
    "edit XML configuration for a network",
    "Opens a network's definition in an editor ($VISUAL, $EDITOR), and keeps what was changed.",
    &[NETWORK],
    edit
);
command!(
    NET_INFO,
    "net-info",
    "network information",
    "Shows what there is to know of a network.",
    &[NETWORK],
    info
);
command!(
    NET_LIST,
    "net-list",
    "list networks",
    "Shows the networks that are up, or others.",
    &[
        flag("inactive", "those that are not up"),
        flag("all", "all of them"),
        flag("persistent", "those with a definition that stays"),
        flag("transient", "those without"),
        flag("autostart", "those that are started with the host"),
        flag("no-autostart", "those that are not"),
        flag("uuid", "uuids only"),
        flag("name", "names only"),
        flag("table", "a table (default)"),
    ],
    list
);
command!(
    NET_NAME,
    "net-name",
    "convert a network UUID to network name",
    "",
    &[data("network", "network uuid").values(Values::Networks)],
    name
);
command!(
    NET_START,
    "net-start",
    "start a (previously defined) inactive network",
    "Starts a network.",
    &[NETWORK],
    start
);
command!(
    NET_UNDEFINE,
    "net-undefine",
    "undefine a persistent network",
    "Removes the definition of a network. One that is up stays so, until it is stopped.",
    &[NETWORK],
    undefine
);
command!(
    NET_UUID,
    "net-uuid",
    "convert a network name to network UUID",
    "",
    &[data("network", "network name").values(Values::Networks)],
    uuid
);

/// Finds the network that the option `network` names.
///
/// # Errors
///
/// There is none, or the daemon cannot be asked.
pub fn find(shell: &mut Shell, args: &Args) -> Result<Network> {
    lookup(shell, args.required("network")?, true, true)
}

fn lookup(shell: &mut Shell, word: &str, by_uuid: bool, by_name: bool) -> Result<Network> {
    let mut last = None;
    if by_uuid
        && word.len() == 36
        && let Some(uuid) = parse_uuid(word)
    {
        let asked = NetworkLookupByUuidArgs { uuid };
        match shell.call(procs::NETWORK_LOOKUP_BY_UUID, &asked) {
            Ok(ret) => return Ok(ret.net),
            Err(failure) if failure.disconnected => return Err(failure),
            Err(failure) => last = Some(failure),
        }
    }
    if by_name {
        let name = word.to_owned();
        match shell.call(
            procs::NETWORK_LOOKUP_BY_NAME,
            &NetworkLookupByNameArgs { name },
        ) {
            Ok(ret) => return Ok(ret.net),
            Err(failure) if failure.disconnected => return Err(failure),
            Err(failure) => last = Some(failure),
        }
    }
    let what = format!("failed to get network '{word}'");
    Err(match last {
        Some(failure) => failure.context(what),
        None => Failure::new(what),
    })
}

fn autostart(shell: &mut Shell, args: &Args) -> Result {
    let net = find(shell, args)?;
    let (on, name) = (!args.has("disable"), args.required("network")?);
    let asked = NetworkSetAutostartArgs {
        net,
        autostart: i32::from(on),
    };
    let (failing, done) = if on {
        ("mark", "marked as autostarted")
    } else {
        ("unmark", "unmarked as autostarted")
    };
    shell
        .call(procs::NETWORK_SET_AUTOSTART, &asked)
        .with_context(|| format!("failed to {failing} network {name} as autostarted"))?;
    shell.out.print_extra(format!("Network {name} {done}\n"));
    Ok(())
}

fn create(shell: &mut Shell, args: &Args) -> Result {
    let path = args.required("file")?;
    let xml = read_definition(path)?;
    let made = if args.has("validate") {
        let asked = NetworkCreateXmlFlagsArgs { xml, flags: 1 };
        shell
            .call(procs::NETWORK_CREATE_XML_FLAGS, &asked)
            .map(|ret| ret.net)
    } else {
        let asked = NetworkCreateXmlArgs { xml };
        shell
            .call(procs::NETWORK_CREATE_XML, &asked)
            .map(|ret| ret.net)
    };
    let net = made.with_context(|| format!("Failed to create network from {path}"))?;
    shell
        .out
        .print_extra(format!("Network {} created from {path}\n", net.name));
    Ok(())
}

fn define_xml(shell: &mut Shell, xml: String, validate: bool) -> Result<Network> {
    if validate {
        let asked = NetworkDefineXmlFlagsArgs { xml, flags: 1 };
        return Ok(shell.call(procs::NETWORK_DEFINE_XML_FLAGS, &asked)?.net);
    }
    Ok(shell
        .call(procs::NETWORK_DEFINE_XML, &NetworkDefineXmlArgs { xml })?
        .net)
}

fn define(shell: &mut Shell, args: &Args) -> Result {
    let path = args.required("file")?;
    let xml = read_definition(path)?;
    let net = define_xml(shell, xml, args.has("validate"))
        .with_context(|| format!("Failed to define network from {path}"))?;
    shell
        .out
        .print_extra(format!("Network {} defined from {path}\n", net.name));
    Ok(())
}

fn destroy(shell: &mut Shell, args: &Args) -> Result {
    let (net, name) = (find(shell, args)?, args.required("network")?);
    shell
        .call(procs::NETWORK_DESTROY, &NetworkDestroyArgs { net })
        .with_context(|| format!("Failed to destroy network {name}"))?;
    shell.out.print_extra(format!("Network {name} destroyed\n"));
    Ok(())
}

fn start(shell: &mut Shell, args: &Args) -> Result {
    let net = find(shell, args)?;
    let name = net.name.clone();
    shell
        .call(procs::NETWORK_CREATE, &NetworkCreateArgs { net })
        .with_context(|| format!("Failed to start network {name}"))?;
    shell.out.print_extra(format!("Network {name} started\n"));
    Ok(())
}

fn undefine(shell: &mut Shell, args: &Args) -> Result {
    let (net, name) = (find(shell, args)?, args.required("network")?);
    shell
        .call(procs::NETWORK_UNDEFINE, &NetworkUndefineArgs { net })
        .with_context(|| format!("Failed to undefine network {name}"))?;
    shell
        .out
        .print_extra(format!("Network {name} has been undefined\n"));
    Ok(())
}

fn leases(shell: &mut Shell, args: &Args) -> Result {
    let mac = args.text("mac")?.map(str::to_owned);
    let name = args.required("network")?.to_owned();
    let net = find(shell, args)?;
    let asked = NetworkGetDhcpLeasesArgs {
        net,
        mac,
        need_results: 1,
        flags: 0,
    };
    let mut leases = shell
        .call(procs::NETWORK_GET_DHCP_LEASES, &asked)
        .with_context(|| format!("Failed to get leases info for {name}"))?
        .leases
        .0;
    leases.sort_by_key(|lease| lease.mac.as_deref().unwrap_or_default().to_lowercase());
    let mut table = Table::new(&[
        "Expiry Time",
        "MAC address",
        "Protocol",
        "IP address",
        "Hostname",
        "Client ID or DUID",
    ]);
    let or_dash = |text: Option<String>| match text {
        Some(text) if !text.is_empty() => text,
        _ => "-".to_owned(),
    };
    for lease in leases {
        table.row([
            crate::time::local_at("%Y-%m-%d %H:%M:%S", lease.expirytime),
            or_dash(lease.mac),
            if lease.kind == 0 { "ipv4" } else { "ipv6" }.to_owned(),
            format!("{}/{}", lease.ipaddr, lease.prefix),
            or_dash(lease.hostname),
            or_dash(lease.clientid),
        ]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

/// `VIR_NETWORK_XML_INACTIVE`
const INACTIVE: u32 = 1;

fn xml(shell: &mut Shell, net: &Network, flags: u32) -> Result<String> {
    let asked = NetworkGetXmlDescArgs {
        net: net.clone(),
        flags,
    };
    Ok(shell.call(procs::NETWORK_GET_XML_DESC, &asked)?.xml)
}

fn dumpxml(shell: &mut Shell, args: &Args) -> Result {
    let net = find(shell, args)?;
    let flags = if args.has("inactive") { INACTIVE } else { 0 };
    let xml = xml(shell, &net, flags)?;
    print_selected(shell, args, &xml)
}

fn edit(shell: &mut Shell, args: &Args) -> Result {
    let net = find(shell, args)?;
    editor::edit_document(
        shell,
        &format!("Network {}", net.name),
        Some(true),
        |shell| xml(shell, &net, INACTIVE),
        |shell, text, validate| define_xml(shell, text, validate).map(drop),
    )
}

/// What `net-info` and `net-list` tell.
struct State {
    active: bool,
    persistent: bool,
    autostart: Option<bool>,
}

impl State {
    fn ask(shell: &mut Shell, net: &Network) -> Result<Self> {
        let active = shell
            .call(
                procs::NETWORK_IS_ACTIVE,
                &NetworkIsActiveArgs { net: net.clone() },
            )?
            .active;
        let persistent = shell
            .call(
                procs::NETWORK_IS_PERSISTENT,
                &NetworkIsPersistentArgs { net: net.clone() },
            )?
            .persistent;
        let asked = NetworkGetAutostartArgs { net: net.clone() };
        let autostart = match shell.call(procs::NETWORK_GET_AUTOSTART, &asked) {
            Ok(ret) => Some(ret.autostart != 0),
            Err(failure) if failure.disconnected => return Err(failure),
            Err(_) => None,
        };
        Ok(Self {
            active: active != 0,
            persistent: persistent != 0,
            autostart,
        })
    }
}

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

fn info(shell: &mut Shell, args: &Args) -> Result {
    let net = find(shell, args)?;
    let state = State::ask(shell, &net)?;
    let mut line = |name: &str, value: &str| shell.out.print(format!("{name:<15} {value}\n"));
    line("Name:", &net.name);
    line("UUID:", &format_uuid(&net.uuid));
    line("Active:", yes_no(state.active));
    line("Persistent:", yes_no(state.persistent));
    line("Autostart:", state.autostart.map_or("no autostart", yes_no));
    let asked = NetworkGetBridgeNameArgs { net };
    match shell.call(procs::NETWORK_GET_BRIDGE_NAME, &asked) {
        Ok(ret) => shell.out.print(format!("{:<15} {}\n", "Bridge:", ret.name)),
        Err(failure) if failure.disconnected => return Err(failure),
        // Some have none.
        Err(_) => {}
    }
    Ok(())
}

/// The filters that options ask for (`VIR_CONNECT_LIST_NETWORKS_*`).
fn filters(args: &Args) -> u32 {
    let shown = if args.has("all") {
        1 | 2
    } else if args.has("inactive") {
        1
    } else {
        2
    };
    [
        ("persistent", 4),
        ("transient", 8),
        ("autostart", 16),
        ("no-autostart", 32),
    ]
    .iter()
    .filter(|(name, _)| args.has(name))
    .fold(shown, |flags, (_, flag)| flags | flag)
}

fn list(shell: &mut Shell, args: &Args) -> Result {
    let kinds = ["table", "name", "uuid"]
        .iter()
        .filter(|kind| args.has(kind));
    if kinds.count() > 1 {
        return Err(Failure::new(
            "Only one argument from --table, --name and --uuid may be specified.",
        ));
    }
    let asked = ConnectListAllNetworksArgs {
        need_results: 1,
        flags: filters(args),
    };
    let mut nets = shell
        .call(procs::CONNECT_LIST_ALL_NETWORKS, &asked)
        .context("Failed to list networks")?
        .nets
        .0;
    nets.sort_by_key(|net| (net.name.to_lowercase(), net.name.clone()));
    if args.has("uuid") || args.has("name") {
        for net in &nets {
            let line = if args.has("uuid") {
                format_uuid(&net.uuid)
            } else {
                net.name.clone()
            };
            shell.out.print(line + "\n");
        }
        return Ok(());
    }
    let mut table = Table::new(&["Name", "State", "Autostart", "Persistent"]);
    for net in &nets {
        let state = match State::ask(shell, net) {
            Ok(state) => state,
            Err(failure) if failure.disconnected => return Err(failure),
            // It went away since it was listed.
            Err(_) => continue,
        };
        table.row([
            net.name.as_str(),
            if state.active { "active" } else { "inactive" },
            state.autostart.map_or("no autostart", yes_no),
            yes_no(state.persistent),
        ]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

fn name(shell: &mut Shell, args: &Args) -> Result {
    let net = lookup(shell, args.required("network")?, true, false)?;
    shell.out.print(net.name + "\n");
    Ok(())
}

fn uuid(shell: &mut Shell, args: &Args) -> Result {
    let net = lookup(shell, args.required("network")?, false, true)?;
    shell.out.print(format_uuid(&net.uuid) + "\n");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::GROUPS;
    use crate::parser::parse_line;

    #[test]
    fn options_become_filters() {
        let flags = |line: &str| filters(&parse_line(GROUPS, line).unwrap()[0].args);
        assert_eq!(flags("net-list"), 2);
        assert_eq!(flags("net-list --inactive"), 1);
        assert_eq!(flags("net-list --all --transient"), 3 | 8);
        assert_eq!(flags("net-list --autostart"), 2 | 16);
    }
}
