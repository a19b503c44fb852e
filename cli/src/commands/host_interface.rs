//! The host's network interfaces, where the daemon has a driver for them. vireod has none; a stock libvirtd may.

use rpc::args::*;
use rpc::procs;
use rpc::types::Interface;
use xml_schemas::dom::{self, Element, Node, format_element};

use super::definition::{FILE, VALIDATE, WRAP, XPATH, print_selected};
use super::read_definition;
use crate::command::{Args, Command, Opt, data, flag, number};
use crate::editor;
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::table::Table;

const IFACE: Opt = data("interface", "its name, or its MAC address");

/// `iface-begin`
pub const IFACE_BEGIN: Command = Command {
    name: "iface-begin",
    summary: "create a snapshot of current interfaces settings",
    description: "Begins a change of the host's network configuration that can be taken back.",
    options: &[],
    handler: begin,
    connects: true,
};

/// `iface-bridge`
pub const IFACE_BRIDGE: Command = Command {
    name: "iface-bridge",
    summary: "create a bridge device and attach an existing network device to it",
    description: "Puts an interface into a new bridge, which has its addresses from then on.",
    options: &[
        data("interface", "its name, or its MAC address"),
        data("bridge", "the new bridge's name"),
        flag("no-stp", "without the spanning tree protocol"),
        number("delay", "seconds until a port forwards anything"),
        flag("no-start", "leave the bridge down"),
    ],
    handler: bridge,
    connects: true,
};

/// `iface-unbridge`
pub const IFACE_UNBRIDGE: Command = Command {
    name: "iface-unbridge",
    summary: "undefine a bridge device after detaching its device(s)",
    description: "Takes an interface out of its bridge, which goes.",
    options: &[
        data("bridge", "the bridge's name"),
        flag("no-start", "leave the interface down"),
    ],
    handler: unbridge,
    connects: true,
};

/// `iface-commit`
pub const IFACE_COMMIT: Command = Command {
    name: "iface-commit",
    summary: "commit changes made since iface-begin and free restore point",
    description: "Keeps what was changed since iface-begin.",
    options: &[],
    handler: commit,
    connects: true,
};

/// `iface-define`
pub const IFACE_DEFINE: Command = Command {
    name: "iface-define",
    summary: "define an inactive persistent physical host interface or modify an existing persistent one from an XML file",
    description: "Defines an interface, or changes its definition.",
    options: &[FILE, VALIDATE],
    handler: define,
    connects: true,
};

/// `iface-destroy`
pub const IFACE_DESTROY: Command = Command {
    name: "iface-destroy",
    summary: "destroy a physical host interface (disable it / \"if-down\")",
    description: "Takes an interface down.",
    options: &[IFACE],
    handler: destroy,
    connects: true,
};

/// `iface-dumpxml`
pub const IFACE_DUMPXML: Command = Command {
    name: "iface-dumpxml",
    summary: "interface information in XML",
    description: "Shows an interface's definition.",
    options: &[
        IFACE,
        flag("inactive", "what is stored, not what is so now"),
        XPATH,
        WRAP,
    ],
    handler: dumpxml,
    connects: true,
};

/// `iface-edit`
pub const IFACE_EDIT: Command = Command {
    name: "iface-edit",
    summary: "edit XML configuration for a physical host interface",
    description: "Opens an interface's definition in an editor.",
    options: &[IFACE],
    handler: edit,
    connects: true,
};

/// `iface-list`
pub const IFACE_LIST: Command = Command {
    name: "iface-list",
    summary: "list physical host interfaces",
    description: "Shows the interfaces: those that are up, or the chosen ones.",
    options: &[
        flag("inactive", "only those that are down"),
        flag("all", "those that are up and those that are down"),
    ],
    handler: list,
    connects: true,
};

/// `iface-mac`
pub const IFACE_MAC: Command = Command {
    name: "iface-mac",
    summary: "convert an interface name to interface MAC address",
    description: "Shows an interface's MAC address.",
    options: &[IFACE],
    handler: mac,
    connects: true,
};

/// `iface-name`
pub const IFACE_NAME: Command = Command {
    name: "iface-name",
    summary: "convert an interface MAC address to interface name",
    description: "Shows an interface's name.",
    options: &[IFACE],
    handler: name,
    connects: true,
};

/// `iface-rollback`
pub const IFACE_ROLLBACK: Command = Command {
    name: "iface-rollback",
    summary: "rollback to previous saved configuration created via iface-begin",
    description: "Takes back what was changed since iface-begin.",
    options: &[],
    handler: rollback,
    connects: true,
};

/// `iface-start`
pub const IFACE_START: Command = Command {
    name: "iface-start",
    summary: "start a physical host interface (enable it / \"if-up\")",
    description: "Brings an interface up.",
    options: &[IFACE],
    handler: start,
    connects: true,
};

/// `iface-undefine`
pub const IFACE_UNDEFINE: Command = Command {
    name: "iface-undefine",
    summary: "undefine a physical host interface (remove it from configuration)",
    description: "Removes an interface's definition.",
    options: &[IFACE],
    handler: undefine,
    connects: true,
};

fn is_mac(word: &str) -> bool {
    let parts: Vec<&str> = word.split(':').collect();
    let byte =
        |part: &&str| matches!(part.len(), 1 | 2) && part.chars().all(|c| c.is_ascii_hexdigit());
    parts.len() == 6 && parts.iter().all(byte)
}

fn find(shell: &mut Shell, args: &Args) -> Result<Interface> {
    let word = args.required("interface")?;
    if !is_mac(word) {
        return by_name(shell, word);
    }
    let mac = word.to_owned();
    let asked = InterfaceLookupByMacStringArgs { mac };
    let found = shell.call(procs::INTERFACE_LOOKUP_BY_MAC_STRING, &asked);
    let found = found.map(|found| found.iface);
    found.context(format!("failed to get interface '{word}'"))
}

fn by_name(shell: &mut Shell, word: &str) -> Result<Interface> {
    let found = {
        let name = word.to_owned();
        let asked = InterfaceLookupByNameArgs { name };
        let found = shell.call(procs::INTERFACE_LOOKUP_BY_NAME, &asked);
        found.map(|found| found.iface)
    };
    found.context(format!("failed to get interface '{word}'"))
}

fn begin(shell: &mut Shell, _: &Args) -> Result {
    let asked = InterfaceChangeBeginArgs { flags: 0 };
    shell
        .call(procs::INTERFACE_CHANGE_BEGIN, &asked)
        .context("Failed to begin network config change transaction")?;
    let said = "Network config change transaction started\n";
    shell.out.print_extra(said);
    Ok(())
}

fn commit(shell: &mut Shell, _: &Args) -> Result {
    let asked = InterfaceChangeCommitArgs { flags: 0 };
    shell
        .call(procs::INTERFACE_CHANGE_COMMIT, &asked)
        .context("Failed to commit network config change transaction")?;
    let said = "Network config change transaction committed\n";
    shell.out.print_extra(said);
    Ok(())
}

fn rollback(shell: &mut Shell, _: &Args) -> Result {
    let asked = InterfaceChangeRollbackArgs { flags: 0 };
    shell
        .call(procs::INTERFACE_CHANGE_ROLLBACK, &asked)
        .context("Failed to rollback network config change transaction")?;
    let said = "Network config change transaction rolled back\n";
    shell.out.print_extra(said);
    Ok(())
}

fn define_xml(shell: &mut Shell, xml: String, validate: bool) -> Result<Interface> {
    let flags = u32::from(validate);
    let asked = InterfaceDefineXmlArgs { xml, flags };
    Ok(shell.call(procs::INTERFACE_DEFINE_XML, &asked)?.iface)
}

fn define(shell: &mut Shell, args: &Args) -> Result {
    let file = args.required("file")?;
    let xml = read_definition(file)?;
    let iface = define_xml(shell, xml, args.has("validate"))
        .context(format!("Failed to define interface from {file}"))?;
    shell
        .out
        .print_extra(format!("Interface {} defined from {file}\n", iface.name));
    Ok(())
}

fn undefine(shell: &mut Shell, args: &Args) -> Result {
    let iface = find(shell, args)?;
    let name = iface.name.clone();
    shell
        .call(procs::INTERFACE_UNDEFINE, &InterfaceUndefineArgs { iface })
        .context(format!("Failed to undefine interface {name}"))?;
    shell
        .out
        .print_extra(format!("Interface {name} undefined\n"));
    Ok(())
}

fn create(shell: &mut Shell, iface: Interface, failed: String) -> Result {
    let asked = InterfaceCreateArgs { iface, flags: 0 };
    shell.call(procs::INTERFACE_CREATE, &asked).context(failed)
}

fn start(shell: &mut Shell, args: &Args) -> Result {
    let iface = find(shell, args)?;
    let name = iface.name.clone();
    create(shell, iface, format!("Failed to start interface {name}"))?;
    shell.out.print_extra(format!("Interface {name} started\n"));
    Ok(())
}

fn destroy(shell: &mut Shell, args: &Args) -> Result {
    let iface = find(shell, args)?;
    let name = iface.name.clone();
    let asked = InterfaceDestroyArgs { iface, flags: 0 };
    shell
        .call(procs::INTERFACE_DESTROY, &asked)
        .context(format!("Failed to destroy interface {name}"))?;
    shell
        .out
        .print_extra(format!("Interface {name} destroyed\n"));
    Ok(())
}

/// `VIR_INTERFACE_XML_INACTIVE`
const INACTIVE: u32 = 1;

fn xml(shell: &mut Shell, iface: &Interface, flags: u32) -> Result<String> {
    let asked = InterfaceGetXmlDescArgs {
        iface: iface.clone(),
        flags,
    };
    Ok(shell.call(procs::INTERFACE_GET_XML_DESC, &asked)?.xml)
}

fn dumpxml(shell: &mut Shell, args: &Args) -> Result {
    args.requires("wrap", "xpath")?;
    let iface = find(shell, args)?;
    let flags = if args.has("inactive") { INACTIVE } else { 0 };
    let xml = xml(shell, &iface, flags)?;
    print_selected(shell, args, &xml)
}

fn edit(shell: &mut Shell, args: &Args) -> Result {
    let iface = find(shell, args)?;
    editor::edit_document(
        shell,
        &format!("Interface {}", iface.name),
        Some(true),
        |shell| xml(shell, &iface, INACTIVE),
        |shell, text, validate| define_xml(shell, text, validate).map(drop),
    )
}

/// The definition of an interface, which has a name and a type.
fn parsed(shell: &mut Shell, iface: &Interface) -> Result<(Element, String)> {
    let text = xml(shell, iface, INACTIVE)?;
    let what = "(interface definition)";
    let root = dom::parse(&text, what).map_err(|e| Failure::new(e.to_string()))?;
    match root.attr("type").map(str::to_owned) {
        Some(kind) => Ok((root, kind)),
        None => Err(Failure::new(format!(
            "Existing device {} has no type",
            iface.name
        ))),
    }
}

fn define_element(shell: &mut Shell, element: &Element) -> Result<Interface> {
    let mut text = String::new();
    format_element(&mut text, element, 0);
    define_xml(shell, text, false)
}

/// What belongs to the device itself, and not to its addresses.
fn of_the_device(node: &Node) -> bool {
    matches!(node, Node::Element(e) if matches!(e.name.as_str(), "mac" | "bond" | "vlan"))
}

fn bridge(shell: &mut Shell, args: &Args) -> Result {
    let iface = find(shell, args)?;
    let name = args.required("bridge")?.to_owned();
    let delay = args.number::<u32>("delay")?.unwrap_or(0);
    let asked = InterfaceLookupByNameArgs { name: name.clone() };
    match shell.call(procs::INTERFACE_LOOKUP_BY_NAME, &asked) {
        Ok(_) => {
            return Err(Failure::new(format!(
                "Network device {name} already exists"
            )));
        }
        Err(failure) if failure.disconnected => return Err(failure),
        Err(_) => {}
    }
    let (mut outer, kind) = parsed(shell, &iface)?;
    if kind == "bridge" {
        let text = format!("Existing device {} is already a bridge", iface.name);
        return Err(Failure::new(text));
    }
    outer.set_attr("type", "bridge");
    outer.set_attr("name", &name);
    let mut inner = Element::new("interface")
        .with_attr("type", kind)
        .with_attr("name", &iface.name);
    let stp = !args.has("no-stp");
    let mut bridge = Element::new("bridge").with_attr("stp", if stp { "on" } else { "off" });
    if stp && delay > 0 {
        bridge.set_attr("delay", delay.to_string());
    }
    let (moved, kept) = outer.children.drain(..).partition(of_the_device);
    inner.children = moved;
    outer.children = kept;
    outer.push(bridge.with_child(inner));
    let made = define_element(shell, &outer)
        .context(format!("Failed to define new bridge interface {name}"))?;
    shell.out.print_extra(format!(
        "Created bridge {name} with attached device {}\n",
        iface.name
    ));
    if !args.has("no-start") {
        create(
            shell,
            made,
            format!("Failed to start bridge interface {name}"),
        )?;
        let said = format!("Bridge interface {name} started\n");
        shell.out.print_extra(said);
    }
    Ok(())
}

fn unbridge(shell: &mut Shell, args: &Args) -> Result {
    let bridge = by_name(shell, args.required("bridge")?)?;
    let name = bridge.name.clone();
    let refused = |text: String| Err(Failure::new(text));
    let (mut outer, kind) = parsed(shell, &bridge)?;
    if kind != "bridge" {
        return refused(format!("Device {name} is not a bridge"));
    }
    let Some(mut middle) = outer.take_child("bridge") else {
        return refused(format!("No bridge node in xml document of {name}"));
    };
    let mut ports = middle.take_children("interface").into_iter();
    let inner = match (ports.next(), ports.next()) {
        (Some(inner), None) => inner,
        (None, _) => return refused(format!("No interface attached to bridge {name}")),
        (Some(_), Some(_)) => {
            return refused(format!("Multiple interfaces attached to bridge {name}"));
        }
    };
    let attr = |name: &str| inner.attr(name).map(str::to_owned);
    let (Some(kind), Some(port)) = (attr("type"), attr("name")) else {
        return refused(format!(
            "Device attached to bridge {name} has no type or name"
        ));
    };
    outer.set_attr("type", kind);
    outer.set_attr("name", &port);
    outer.children.extend(inner.children);
    let asked = InterfaceDestroyArgs {
        iface: bridge.clone(),
        flags: 0,
    };
    shell
        .call(procs::INTERFACE_DESTROY, &asked)
        .context(format!("Failed to destroy bridge interface {name}"))?;
    let asked = InterfaceUndefineArgs { iface: bridge };
    shell
        .call(procs::INTERFACE_UNDEFINE, &asked)
        .context(format!("Failed to undefine bridge interface {name}"))?;
    let made =
        define_element(shell, &outer).context(format!("Failed to define new interface {port}"))?;
    let said = format!("Device {port} un-attached from bridge {name}\n");
    shell.out.print_extra(said);
    if !args.has("no-start") {
        create(shell, made, format!("Failed to start interface {port}"))?;
        shell.out.print_extra(format!("Interface {port} started\n"));
    }
    Ok(())
}

fn name(shell: &mut Shell, args: &Args) -> Result {
    let word = args.required("interface")?;
    // Names have names already; virsh says no more than that.
    if !is_mac(word) {
        return Err(Failure::new(format!("failed to get interface '{word}'")));
    }
    let iface = find(shell, args)?;
    shell.out.print(iface.name + "\n");
    Ok(())
}

fn mac(shell: &mut Shell, args: &Args) -> Result {
    let iface = find(shell, args)?;
    shell.out.print(iface.mac + "\n");
    Ok(())
}

fn list(shell: &mut Shell, args: &Args) -> Result {
    /// VIR_CONNECT_LIST_INTERFACES_INACTIVE and _ACTIVE
    const DOWN: u32 = 1;
    const UP: u32 = 2;
    let flags = match (args.has("all"), args.has("inactive")) {
        (true, _) => UP | DOWN,
        (false, true) => DOWN,
        (false, false) => UP,
    };
    let asked = ConnectListAllInterfacesArgs {
        need_results: 1,
        flags,
    };
    let mut ifaces = match shell.call(procs::CONNECT_LIST_ALL_INTERFACES, &asked) {
        Ok(found) => found.ifaces.0,
        // As for a daemon that only lacks this way of asking: what the older one says is told.
        Err(failure) if failure.is_unsupported() => {
            if flags & UP != 0 {
                shell
                    .call(procs::CONNECT_NUM_OF_INTERFACES, &())
                    .context("Failed to list active interfaces")?;
            } else {
                shell
                    .call(procs::CONNECT_NUM_OF_DEFINED_INTERFACES, &())
                    .context("Failed to list inactive interfaces")?;
            }
            return Err(failure);
        }
        Err(failure) => return Err(failure.context("Failed to list interfaces")),
    };
    ifaces.sort_by_key(|iface| (iface.name.to_lowercase(), iface.name.clone()));
    let mut table = Table::new(&["Name", "State", "MAC Address"]);
    for iface in &ifaces {
        let asked = InterfaceIsActiveArgs {
            iface: iface.clone(),
        };
        let active = match shell.call(procs::INTERFACE_IS_ACTIVE, &asked) {
            Ok(answer) => answer.active != 0,
            Err(failure) if failure.disconnected => return Err(failure),
            // It went away since it was listed.
            Err(_) => false,
        };
        let state = if active { "active" } else { "inactive" };
        table.row([iface.name.as_str(), state, &iface.mac]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}
