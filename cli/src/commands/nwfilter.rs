//! Network filters and their bindings, where the daemon has a driver for them. vireod has none; a stock libvirtd may.

use rpc::args::*;
use rpc::procs;
use rpc::types::{NwFilter, NwFilterBinding};

use super::definition::{FILE, VALIDATE, WRAP, XPATH, print_selected};
use super::{format_uuid, parse_uuid, read_definition};
use crate::command::{Args, Command, Opt, data};
use crate::editor;
use crate::failure::{Context, Result};
use crate::shell::Shell;
use crate::table::Table;

const FILTER: Opt = data("nwfilter", "its name or UUID");
const BINDING: Opt = data("binding", "the network port's device");

/// `nwfilter-define`
pub const NWFILTER_DEFINE: Command = Command {
    name: "nwfilter-define",
    summary: "define or update a network filter from an XML file",
    description: "Defines a network filter, or changes it.",
    options: &[FILE, VALIDATE],
    handler: define,
    connects: true,
};

/// `nwfilter-dumpxml`
pub const NWFILTER_DUMPXML: Command = Command {
    name: "nwfilter-dumpxml",
    summary: "network filter information in XML",
    description: "Shows a network filter's definition.",
    options: &[FILTER, XPATH, WRAP],
    handler: dumpxml,
    connects: true,
};

/// `nwfilter-edit`
pub const NWFILTER_EDIT: Command = Command {
    name: "nwfilter-edit",
    summary: "edit XML configuration for a network filter",
    description: "Opens a network filter's definition in an editor.",
    options: &[FILTER],
    handler: edit,
    connects: true,
};

/// `nwfilter-list`
pub const NWFILTER_LIST: Command = Command {
    name: "nwfilter-list",
    summary: "list network filters",
    description: "Shows the network filters.",
    options: &[],
    handler: list,
    connects: true,
};

/// `nwfilter-undefine`
pub const NWFILTER_UNDEFINE: Command = Command {
    name: "nwfilter-undefine",
    summary: "undefine a network filter",
    description: "Removes a network filter.",
    options: &[FILTER],
    handler: undefine,
    connects: true,
};

/// `nwfilter-binding-create`
pub const NWFILTER_BINDING_CREATE: Command = Command {
    name: "nwfilter-binding-create",
    summary: "create a network filter binding from an XML file",
    description: "Binds a filter to a network port.",
    options: &[FILE, VALIDATE],
    handler: binding_create,
    connects: true,
};

/// `nwfilter-binding-delete`
pub const NWFILTER_BINDING_DELETE: Command = Command {
    name: "nwfilter-binding-delete",
    summary: "delete a network filter binding",
    description: "Takes a filter off a network port.",
    options: &[BINDING],
    handler: binding_delete,
    connects: true,
};

/// `nwfilter-binding-dumpxml`
pub const NWFILTER_BINDING_DUMPXML: Command = Command {
    name: "nwfilter-binding-dumpxml",
    summary: "network filter information in XML",
    description: "Shows which filter a network port has.",
    options: &[BINDING, XPATH, WRAP],
    handler: binding_dumpxml,
    connects: true,
};

/// `nwfilter-binding-list`
pub const NWFILTER_BINDING_LIST: Command = Command {
    name: "nwfilter-binding-list",
    summary: "list network filter bindings",
    description: "Shows which network ports have filters.",
    options: &[],
    handler: binding_list,
    connects: true,
};

fn find(shell: &mut Shell, args: &Args) -> Result<NwFilter> {
    let word = args.required("nwfilter")?;
    if let Some(uuid) = parse_uuid(word).filter(|_| word.len() == 36) {
        let asked = NwfilterLookupByUuidArgs { uuid };
        match shell.call(procs::NWFILTER_LOOKUP_BY_UUID, &asked) {
            Ok(found) => return Ok(found.nwfilter),
            Err(failure) if failure.disconnected => return Err(failure),
            Err(_) => {}
        }
    }
    let asked = NwfilterLookupByNameArgs {
        name: word.to_owned(),
    };
    let found = shell.call(procs::NWFILTER_LOOKUP_BY_NAME, &asked);
    Ok(found
        .context(format!("failed to get nwfilter '{word}'"))?
        .nwfilter)
}

fn define_xml(shell: &mut Shell, xml: String, validate: bool) -> Result<NwFilter> {
    if validate {
        let asked = NwfilterDefineXmlFlagsArgs { xml, flags: 1 };
        let defined = shell.call(procs::NWFILTER_DEFINE_XML_FLAGS, &asked)?;
        return Ok(defined.nwfilter);
    }
    let asked = NwfilterDefineXmlArgs { xml };
    Ok(shell.call(procs::NWFILTER_DEFINE_XML, &asked)?.nwfilter)
}

fn define(shell: &mut Shell, args: &Args) -> Result {
    let file = args.required("file")?;
    let xml = read_definition(file)?;
    let filter = define_xml(shell, xml, args.has("validate"))
        .context(format!("Failed to define network filter from {file}"))?;
    shell.out.print_extra(format!(
        "Network filter {} defined from {file}\n",
        filter.name
    ));
    Ok(())
}

fn undefine(shell: &mut Shell, args: &Args) -> Result {
    let nwfilter = find(shell, args)?;
    let name = nwfilter.name.clone();
    shell
        .call(procs::NWFILTER_UNDEFINE, &NwfilterUndefineArgs { nwfilter })
        .context(format!("Failed to undefine network filter {name}"))?;
    shell
        .out
        .print_extra(format!("Network filter {name} undefined\n"));
    Ok(())
}

fn xml(shell: &mut Shell, nwfilter: &NwFilter) -> Result<String> {
    let asked = NwfilterGetXmlDescArgs {
        nwfilter: nwfilter.clone(),
        flags: 0,
    };
    Ok(shell.call(procs::NWFILTER_GET_XML_DESC, &asked)?.xml)
}

fn dumpxml(shell: &mut Shell, args: &Args) -> Result {
    args.requires("wrap", "xpath")?;
    let nwfilter = find(shell, args)?;
    let xml = xml(shell, &nwfilter)?;
    print_selected(shell, args, &xml)
}

fn edit(shell: &mut Shell, args: &Args) -> Result {
    let nwfilter = find(shell, args)?;
    editor::edit_document(
        shell,
        &format!("Network filter {}", nwfilter.name),
        Some(true),
        |shell| xml(shell, &nwfilter),
        |shell, text, validate| define_xml(shell, text, validate).map(drop),
    )
}

fn list(shell: &mut Shell, _: &Args) -> Result {
    let asked = ConnectListAllNwfiltersArgs {
        need_results: 1,
        flags: 0,
    };
    let mut filters = match shell.call(procs::CONNECT_LIST_ALL_NWFILTERS, &asked) {
        Ok(found) => found.filters.0,
        // As for a daemon that only lacks this way of asking: what the older one says is told.
        Err(failure) if failure.is_unsupported() => {
            shell
                .call(procs::CONNECT_NUM_OF_NWFILTERS, &())
                .context("Failed to count network filters")?;
            return Err(failure);
        }
        Err(failure) => return Err(failure.context("Failed to list network filters")),
    };
    filters.sort_by_key(|filter| (filter.name.to_lowercase(), filter.name.clone()));
    let mut table = Table::new(&["UUID", "Name"]);
    for filter in filters {
        table.row([format_uuid(&filter.uuid), filter.name]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

fn find_binding(shell: &mut Shell, args: &Args) -> Result<NwFilterBinding> {
    let word = args.required("binding")?;
    let asked = NwfilterBindingLookupByPortDevArgs {
        name: word.to_owned(),
    };
    let found = shell.call(procs::NWFILTER_BINDING_LOOKUP_BY_PORT_DEV, &asked);
    Ok(found
        .context(format!("failed to get nwfilter binding '{word}'"))?
        .nwfilter)
}

fn binding_create(shell: &mut Shell, args: &Args) -> Result {
    let file = args.required("file")?;
    let asked = NwfilterBindingCreateXmlArgs {
        xml: read_definition(file)?,
        flags: u32::from(args.has("validate")),
    };
    let binding = shell
        .call(procs::NWFILTER_BINDING_CREATE_XML, &asked)
        .context(format!("Failed to create network filter from {file}"))?
        .nwfilter;
    shell.out.print_extra(format!(
        "Network filter binding on {} created from {file}\n",
        binding.port_dev
    ));
    Ok(())
}

fn binding_delete(shell: &mut Shell, args: &Args) -> Result {
    let nwfilter = find_binding(shell, args)?;
    let port = nwfilter.port_dev.clone();
    shell
        .call(
            procs::NWFILTER_BINDING_DELETE,
            &NwfilterBindingDeleteArgs { nwfilter },
        )
        .context(format!("Failed to delete network filter binding on {port}"))?;
    shell
        .out
        .print_extra(format!("Network filter binding on {port} deleted\n"));
    Ok(())
}

fn binding_dumpxml(shell: &mut Shell, args: &Args) -> Result {
    args.requires("wrap", "xpath")?;
    let nwfilter = find_binding(shell, args)?;
    let asked = NwfilterBindingGetXmlDescArgs { nwfilter, flags: 0 };
    let xml = shell
        .call(procs::NWFILTER_BINDING_GET_XML_DESC, &asked)?
        .xml;
    print_selected(shell, args, &xml)
}

fn binding_list(shell: &mut Shell, _: &Args) -> Result {
    let asked = ConnectListAllNwfilterBindingsArgs {
        need_results: 1,
        flags: 0,
    };
    let mut bindings = shell
        .call(procs::CONNECT_LIST_ALL_NWFILTER_BINDINGS, &asked)
        .context("Failed to list network filter bindings")?
        .bindings
        .0;
    bindings.sort_by_key(|binding| (binding.port_dev.to_lowercase(), binding.port_dev.clone()));
    let mut table = Table::new(&["Port Dev", "Filter"]);
    for binding in bindings {
        table.row([binding.port_dev, binding.filter_name]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}
