//! The host's devices.

use rpc::args::*;
use rpc::procs;

use super::read_definition;
use crate::command::{Args, Command, Opt, Values, data, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

const DEVICE: Opt = data("device", "its name").values(Values::NodeDevices);
const FILE: Opt = data("file", "a file with its definition").values(Values::Files);
const VALIDATE: Opt = flag("validate", "hold the file against the schema");

macro_rules! command {
    ($(#[$doc:meta])* $name:ident = $text:literal, $summary:literal, $description:literal, $options:expr, $handler:ident) => {
        $(#[$doc])*
        pub const $name: Command = Command {
            name: $text,
            summary: $summary,
            description: $description,
            options: $options,
            handler: $handler,
            connects: true,
        };
    };
}

command!(
    /// `nodedev-list`
    NODEDEV_LIST = "nodedev-list", "enumerate devices on this host", "Shows the host's devices.",
    &[
        flag("tree", "each below the one it is behind"),
        text("cap", "only these kinds: pci,net"),
        flag("inactive", "those that are defined only"),
        flag("all", "these too"),
    ],
    nodedev_list
);
command!(
    /// `nodedev-dumpxml`
    NODEDEV_DUMPXML = "nodedev-dumpxml", "node device details in XML", "Shows all about a device, in XML.",
    &[
        DEVICE,
        text("xpath", "only what this expression finds").named_only(),
        flag("wrap", "put what is found into one element"),
    ],
    nodedev_dumpxml
);
command!(
    /// `nodedev-info`
    NODEDEV_INFO = "nodedev-info", "node device information", "Shows what a device is.",
    &[DEVICE], nodedev_info
);
command!(
    /// `nodedev-detach`
    NODEDEV_DETACH = "nodedev-detach", "detach node device from its device driver",
    "Takes a device from the host's driver, for a guest.",
    &[DEVICE, text("driver", "what gives it to guests: vfio").named_only()],
    nodedev_detach
);
command!(
    /// `nodedev-reattach`
    NODEDEV_REATTACH = "nodedev-reattach", "reattach node device to its device driver",
    "Gives a device back to the host's driver.", &[DEVICE], nodedev_reattach
);
command!(
    /// `nodedev-reset`
    NODEDEV_RESET = "nodedev-reset", "reset node device", "Resets a device.", &[DEVICE], nodedev_reset
);
command!(
    /// `nodedev-create`
    NODEDEV_CREATE = "nodedev-create", "create a device defined by an XML file on the node",
    "Makes a device on the host.", &[FILE, VALIDATE], nodedev_create
);
command!(
    /// `nodedev-destroy`
    NODEDEV_DESTROY = "nodedev-destroy", "destroy (stop) a device on the node",
    "Removes a device that was made.", &[DEVICE], nodedev_destroy
);
command!(
    /// `nodedev-define`
    NODEDEV_DEFINE = "nodedev-define", "Define a device by an xml file on a node",
    "Keeps the definition of a device.", &[FILE, VALIDATE], nodedev_define
);
command!(
    /// `nodedev-undefine`
    NODEDEV_UNDEFINE = "nodedev-undefine", "Undefine an inactive node device",
    "Forgets the definition of a device.", &[DEVICE], nodedev_undefine
);
command!(
    /// `nodedev-start`
    NODEDEV_START = "nodedev-start", "Start an inactive node device",
    "Makes a device that is defined.", &[DEVICE], nodedev_start
);
command!(
    /// `nodedev-autostart`
    NODEDEV_AUTOSTART = "nodedev-autostart", "autostart a defined node device",
    "Has a device made with the host's start, or not.",
    &[DEVICE, flag("disable", "not any more")], nodedev_autostart
);

/// virConnectListAllNodeDeviceFlags by libvirt's names of capabilities.
const CAPS: [&str; 22] = [
    "system",
    "pci",
    "usb_device",
    "usb",
    "net",
    "scsi_host",
    "scsi_target",
    "scsi",
    "storage",
    "fc_host",
    "vports",
    "scsi_generic",
    "drm",
    "mdev_types",
    "mdev",
    "ccw",
    "css",
    "vdpa",
    "ap_card",
    "ap_queue",
    "ap_matrix",
    "vpd",
];

/// A device that the option names.
fn find(shell: &mut Shell, args: &Args) -> Result<String> {
    let name = args.required("device")?.to_owned();
    let by_wwn = name.split_once(',');
    let found = match by_wwn {
        Some((wwnn, wwpn)) => {
            let asked = NodeDeviceLookupScsiHostByWwnArgs {
                wwnn: wwnn.to_owned(),
                wwpn: wwpn.to_owned(),
                flags: 0,
            };
            shell
                .call(procs::NODE_DEVICE_LOOKUP_SCSI_HOST_BY_WWN, &asked)
                .map(|ret| ret.dev.name)
        }
        None => {
            let asked = NodeDeviceLookupByNameArgs { name: name.clone() };
            shell
                .call(procs::NODE_DEVICE_LOOKUP_BY_NAME, &asked)
                .map(|ret| ret.dev.name)
        }
    };
    found.with_context(|| format!("Could not find matching device '{name}'"))
}

fn nodedev_list(shell: &mut Shell, args: &Args) -> Result {
    const INACTIVE: u32 = 1 << 30;
    const ACTIVE: u32 = 1 << 31;
    args.exclusive("inactive", "all")?;
    let tree = args.has("tree");
    let mut flags = 0;
    if let Some(list) = args.text("cap")? {
        if tree {
            return Err(Failure::new(
                "Option --tree is incompatible with --cap and --inactive",
            ));
        }
        for name in list.split(',') {
            let at = CAPS.iter().position(|known| *known == name);
            let at = at.ok_or_else(|| Failure::new("Invalid capability type"))?;
            flags |= 1 << at;
        }
    }
    if tree && args.has("inactive") {
        return Err(Failure::new(
            "Option --tree is incompatible with --cap and --inactive",
        ));
    }
    if args.has("inactive") {
        flags |= INACTIVE;
    } else if !args.has("all") {
        flags |= ACTIVE;
    }
    let asked = ConnectListAllNodeDevicesArgs {
        need_results: 1,
        flags,
    };
    let found = shell
        .call(procs::CONNECT_LIST_ALL_NODE_DEVICES, &asked)
        .context("Failed to list node devices")?;
    let mut names: Vec<String> = found
        .devices
        .0
        .into_iter()
        .map(|device| device.name)
        .collect();
    names.sort();
    if !tree {
        for name in names {
            shell.out.print(name + "\n");
        }
        return Ok(());
    }
    let mut parents = Vec::new();
    for name in &names {
        let asked = NodeDeviceGetParentArgs { name: name.clone() };
        let parent = shell
            .call(procs::NODE_DEVICE_GET_PARENT, &asked)?
            .parent_name;
        // The root's own place is none, whatever a daemon says of it.
        parents.push(parent.filter(|_| name != "computer"));
    }
    let mut text = String::new();
    for (at, parent) in parents.iter().enumerate() {
        if parent.is_none() {
            branch(
                &mut text,
                &names,
                &parents,
                at,
                at,
                true,
                &mut String::new(),
            );
        }
    }
    shell.out.print(text);
    Ok(())
}

/// A device and what is behind it. `last`: the last one at its level.
fn branch(
    text: &mut String,
    names: &[String],
    parents: &[Option<String>],
    at: usize,
    last: usize,
    root: bool,
    indent: &mut String,
) {
    /// Deeper than any host's devices; ends a ring that a strange daemon tells.
    const DEPTH: usize = 512;
    let mark = if root { "" } else { "+- " };
    text.push_str(&format!("{indent}{mark}{}\n", names[at]));
    let level = indent.len();
    if !root {
        indent.push(if at == last { ' ' } else { '|' });
        indent.push(' ');
    }
    let behind: Vec<usize> = (0..names.len())
        .filter(|child| parents[*child].as_ref() == Some(&names[at]))
        .collect();
    if let Some(&last) = behind.last().filter(|_| level < DEPTH) {
        text.push_str(&format!("{indent}  |\n"));
        indent.push_str("  ");
        for &child in &behind {
            branch(text, names, parents, child, last, false, indent);
        }
        indent.truncate(indent.len() - 2);
    } else if at == last {
        text.push_str(&format!("{indent}\n"));
    }
    indent.truncate(level);
}

fn nodedev_dumpxml(shell: &mut Shell, args: &Args) -> Result {
    args.requires("wrap", "xpath")?;
    let name = find(shell, args)?;
    let asked = NodeDeviceGetXmlDescArgs { name, flags: 0 };
    let xml = shell.call(procs::NODE_DEVICE_GET_XML_DESC, &asked)?.xml;
    super::definition::print_selected(shell, args, &xml)
}

fn nodedev_info(shell: &mut Shell, args: &Args) -> Result {
    let name = find(shell, args)?;
    let yes = |yes: i32| if yes != 0 { "yes" } else { "no" };
    let asked = NodeDeviceGetParentArgs { name: name.clone() };
    let parent = shell
        .call(procs::NODE_DEVICE_GET_PARENT, &asked)?
        .parent_name;
    shell.out.print(format!("{:<15} {name}\n", "Name:"));
    let parent = parent.unwrap_or_default();
    shell.out.print(format!("{:<15} {parent}\n", "Parent:"));
    let asked = NodeDeviceIsActiveArgs { name: name.clone() };
    if let Ok(found) = shell.call(procs::NODE_DEVICE_IS_ACTIVE, &asked) {
        shell
            .out
            .print(format!("{:<15} {}\n", "Active:", yes(found.active)));
    }
    let asked = NodeDeviceIsPersistentArgs { name: name.clone() };
    match shell.call(procs::NODE_DEVICE_IS_PERSISTENT, &asked) {
        Ok(found) => shell
            .out
            .print(format!("{:<15} {}\n", "Persistent:", yes(found.persistent))),
        Err(failure) if failure.disconnected => return Err(failure),
        Err(_) => shell.out.print(format!("{:<15} unknown\n", "Persistent:")),
    }
    let asked = NodeDeviceGetAutostartArgs { name };
    match shell.call(procs::NODE_DEVICE_GET_AUTOSTART, &asked) {
        Ok(found) => shell
            .out
            .print(format!("{:<15} {}\n", "Autostart:", yes(found.autostart))),
        Err(failure) if failure.disconnected => return Err(failure),
        Err(_) => shell
            .out
            .print(format!("{:<15} no autostart\n", "Autostart:")),
    }
    Ok(())
}

fn nodedev_detach(shell: &mut Shell, args: &Args) -> Result {
    let name = find(shell, args)?;
    let driver = args.text("driver")?.map(str::to_owned);
    let done = if driver.is_some() {
        let asked = NodeDeviceDetachFlagsArgs {
            name: name.clone(),
            driver_name: driver,
            flags: 0,
        };
        shell.call(procs::NODE_DEVICE_DETACH_FLAGS, &asked)
    } else {
        let asked = NodeDeviceDettachArgs { name: name.clone() };
        shell.call(procs::NODE_DEVICE_DETTACH, &asked)
    };
    done.with_context(|| format!("Failed to detach device {name}"))?;
    shell.out.print_extra(format!("Device {name} detached\n"));
    Ok(())
}

fn nodedev_reattach(shell: &mut Shell, args: &Args) -> Result {
    let name = find(shell, args)?;
    let asked = NodeDeviceReAttachArgs { name: name.clone() };
    shell
        .call(procs::NODE_DEVICE_RE_ATTACH, &asked)
        .with_context(|| format!("Failed to re-attach device {name}"))?;
    shell
        .out
        .print_extra(format!("Device {name} re-attached\n"));
    Ok(())
}

fn nodedev_reset(shell: &mut Shell, args: &Args) -> Result {
    let name = find(shell, args)?;
    let asked = NodeDeviceResetArgs { name: name.clone() };
    shell
        .call(procs::NODE_DEVICE_RESET, &asked)
        .with_context(|| format!("Failed to reset device {name}"))?;
    shell.out.print_extra(format!("Device {name} reset\n"));
    Ok(())
}

fn nodedev_create(shell: &mut Shell, args: &Args) -> Result {
    let file = args.required("file")?.to_owned();
    let asked = NodeDeviceCreateXmlArgs {
        xml_desc: read_definition(&file)?,
        flags: u32::from(args.has("validate")),
    };
    let found = shell
        .call(procs::NODE_DEVICE_CREATE_XML, &asked)
        .with_context(|| format!("Failed to create node device from {file}"))?;
    let text = format!("Node device {} created from {file}\n", found.dev.name);
    shell.out.print_extra(text);
    Ok(())
}

fn nodedev_destroy(shell: &mut Shell, args: &Args) -> Result {
    let name = find(shell, args)?;
    let asked = NodeDeviceDestroyArgs { name: name.clone() };
    shell
        .call(procs::NODE_DEVICE_DESTROY, &asked)
        .with_context(|| format!("Failed to destroy node device '{name}'"))?;
    shell
        .out
        .print_extra(format!("Destroyed node device '{name}'\n"));
    Ok(())
}

fn nodedev_define(shell: &mut Shell, args: &Args) -> Result {
    let file = args.required("file")?.to_owned();
    let asked = NodeDeviceDefineXmlArgs {
        xml_desc: read_definition(&file)?,
        flags: u32::from(args.has("validate")),
    };
    let found = shell
        .call(procs::NODE_DEVICE_DEFINE_XML, &asked)
        .with_context(|| format!("Failed to define node device from '{file}'"))?;
    let text = format!("Node device '{}' defined from '{file}'\n", found.dev.name);
    shell.out.print_extra(text);
    Ok(())
}

fn nodedev_undefine(shell: &mut Shell, args: &Args) -> Result {
    let name = find(shell, args)?;
    let asked = NodeDeviceUndefineArgs {
        name: name.clone(),
        flags: 0,
    };
    shell
        .call(procs::NODE_DEVICE_UNDEFINE, &asked)
        .with_context(|| format!("Failed to undefine node device '{name}'"))?;
    shell
        .out
        .print_extra(format!("Undefined node device '{name}'\n"));
    Ok(())
}

fn nodedev_start(shell: &mut Shell, args: &Args) -> Result {
    let name = find(shell, args)?;
    let asked = NodeDeviceCreateArgs {
        name: name.clone(),
        flags: 0,
    };
    shell
        .call(procs::NODE_DEVICE_CREATE, &asked)
        .with_context(|| format!("Failed to start device {name}"))?;
    shell.out.print_extra(format!("Device {name} started\n"));
    Ok(())
}

fn nodedev_autostart(shell: &mut Shell, args: &Args) -> Result {
    let name = find(shell, args)?;
    let enable = !args.has("disable");
    let asked = NodeDeviceSetAutostartArgs {
        name: name.clone(),
        autostart: i32::from(enable),
    };
    let what = if enable { "mark" } else { "unmark" };
    shell
        .call(procs::NODE_DEVICE_SET_AUTOSTART, &asked)
        .with_context(|| format!("failed to {what} device {name} as autostarted"))?;
    shell
        .out
        .print_extra(format!("Device {name} {what}ed as autostarted\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_are_drawn_as_virshs() {
        let names: Vec<String> = ["a", "b", "c", "computer"].map(str::to_owned).into();
        let of = |name: &str| Some(name.to_owned());
        let parents = [of("computer"), of("a"), of("computer"), None];
        let mut text = String::new();
        branch(&mut text, &names, &parents, 3, 3, true, &mut String::new());
        assert_eq!(
            text,
            "computer\n  |\n  +- a\n  |   |\n  |   +- b\n  |     \n  +- c\n    \n"
        );
    }
}
