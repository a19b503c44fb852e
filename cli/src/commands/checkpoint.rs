//! Checkpoints and backups, where the daemon has them. vireod does not yet; a stock libvirtd does.

use rpc::args::{
    DomainBackupBeginArgs, DomainBackupGetXmlDescArgs, DomainCheckpointCreateXmlArgs,
    DomainCheckpointDeleteArgs, DomainCheckpointGetParentArgs, DomainCheckpointGetXmlDescArgs,
    DomainCheckpointListAllChildrenArgs, DomainCheckpointLookupByNameArgs,
    DomainListAllCheckpointsArgs,
};
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::types::{Checkpoint, Domain};
use xml_schemas::dom::{self, Element};

use super::definition::{WRAP, XPATH, print_selected};
use super::domain::flags;
use super::snapshot::{print_tree, split};
use super::{ANY, find_domain, read_definition};
use crate::command::{Args, Command, DOMAIN, Opt, Values, flag, rest, text};
use crate::editor::{self, Draft};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::table::Table;
use crate::time;

const NAME: Opt = text("checkpointname", "checkpoint name");
const QUIESCE: Opt = flag("quiesce", "quiesce guest's file systems");

/// `checkpoint-create`
pub const CHECKPOINT_CREATE: Command = Command {
    name: "checkpoint-create",
    summary: "Create a checkpoint from XML",
    description: "Begins to note what is written to disks, as XML describes it.",
    options: &[
        DOMAIN,
        text("xmlfile", "domain checkpoint XML").values(Values::Files),
        flag("redefine", "redefine metadata for existing checkpoint"),
        flag("redefine-validate", "validate the redefined checkpoint"),
        QUIESCE,
    ],
    handler: create,
    connects: true,
};

/// `checkpoint-create-as`
pub const CHECKPOINT_CREATE_AS: Command = Command {
    name: "checkpoint-create-as",
    summary: "Create a checkpoint from a set of args",
    description: "Begins to note what is written to disks.",
    options: &[
        DOMAIN,
        text("name", "name of checkpoint"),
        text("description", "description of checkpoint"),
        flag("print-xml", "print XML document rather than create"),
        QUIESCE,
        rest(
            "diskspec",
            "disk attributes: disk[,checkpoint=type][,bitmap=name]",
        ),
    ],
    handler: create_as,
    connects: true,
};

/// `checkpoint-edit`
pub const CHECKPOINT_EDIT: Command = Command {
    name: "checkpoint-edit",
    summary: "edit XML for a checkpoint",
    description: "Lets you edit a checkpoint's description.",
    options: &[DOMAIN, NAME],
    handler: edit,
    connects: true,
};

/// `checkpoint-info`
pub const CHECKPOINT_INFO: Command = Command {
    name: "checkpoint-info",
    summary: "checkpoint information",
    description: "Tells about a checkpoint.",
    options: &[DOMAIN, NAME],
    handler: info,
    connects: true,
};

/// `checkpoint-list`
pub const CHECKPOINT_LIST: Command = Command {
    name: "checkpoint-list",
    summary: "List checkpoints for a domain",
    description: "Lists a domain's checkpoints.",
    options: &[
        DOMAIN,
        flag("parent", "add a column showing parent checkpoint"),
        flag("roots", "list only checkpoints without parents"),
        flag("leaves", "list only checkpoints without children"),
        flag(
            "no-leaves",
            "list only checkpoints that are not leaves (with children)",
        ),
        flag("tree", "list checkpoints in a tree"),
        text("from", "limit list to children of given checkpoint"),
        flag("descendants", "with --from, list all descendants"),
        flag("name", "list checkpoint names only"),
        flag("topological", "sort list topologically rather than by name"),
    ],
    handler: list,
    connects: true,
};

/// `checkpoint-dumpxml`
pub const CHECKPOINT_DUMPXML: Command = Command {
    name: "checkpoint-dumpxml",
    summary: "Dump XML for a domain checkpoint",
    description: "Shows a checkpoint's description.",
    options: &[
        DOMAIN,
        NAME,
        flag(
            "security-info",
            "include security sensitive information in XML dump",
        ),
        flag("no-domain", "exclude <domain> from XML"),
        flag("size", "include backup size estimate in XML dump"),
        XPATH,
        WRAP,
    ],
    handler: dumpxml,
    connects: true,
};

/// `checkpoint-parent`
pub const CHECKPOINT_PARENT: Command = Command {
    name: "checkpoint-parent",
    summary: "Get the name of the parent of a checkpoint",
    description: "Names the checkpoint before one.",
    options: &[DOMAIN, NAME],
    handler: parent,
    connects: true,
};

/// `checkpoint-delete`
pub const CHECKPOINT_DELETE: Command = Command {
    name: "checkpoint-delete",
    summary: "Delete a domain checkpoint",
    description: "Deletes a checkpoint; what it noted goes to the one before it.",
    options: &[
        DOMAIN,
        NAME,
        flag("children", "delete checkpoint and all children"),
        flag("children-only", "delete children but not checkpoint"),
        flag(
            "metadata",
            "delete only libvirt metadata, leaving checkpoint contents behind",
        ),
    ],
    handler: delete,
    connects: true,
};

/// `backup-begin`
pub const BACKUP_BEGIN: Command = Command {
    name: "backup-begin",
    summary: "Start a disk backup of a live domain",
    description: "Begins to copy a running domain's disks, or to serve them to who copies them.",
    options: &[
        DOMAIN,
        text("backupxml", "domain backup XML").values(Values::Files),
        text("checkpointxml", "domain checkpoint XML").values(Values::Files),
        flag("reuse-external", "reuse files provided by caller"),
    ],
    handler: backup_begin,
    connects: true,
};

/// `backup-dumpxml`
pub const BACKUP_DUMPXML: Command = Command {
    name: "backup-dumpxml",
    summary: "Dump XML for an ongoing domain block backup job",
    description: "Shows the backup that goes on.",
    options: &[DOMAIN, XPATH, WRAP],
    handler: backup_dumpxml,
    connects: true,
};

/// `VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE`
const REDEFINE: u32 = 1 << 0;
/// `VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY`
const METADATA_ONLY: u32 = 1 << 1;
/// `VIR_DOMAIN_CHECKPOINT_LIST_DESCENDANTS`
const DESCENDANTS: u32 = 1 << 0;
/// `VIR_DOMAIN_CHECKPOINT_XML_SECURE`
const SECURE: u32 = 1 << 0;

fn make(shell: &mut Shell, dom: &Domain, xml: &str, flags: u32) -> Result<Checkpoint> {
    let asked = DomainCheckpointCreateXmlArgs {
        dom: dom.clone(),
        xml_desc: xml.to_owned(),
        flags,
    };
    Ok(shell
        .call(procs::DOMAIN_CHECKPOINT_CREATE_XML, &asked)?
        .checkpoint)
}

fn create(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(
        args,
        &[
            ("redefine", REDEFINE),
            ("quiesce", 1 << 1),
            ("redefine-validate", 1 << 2),
        ],
    );
    let dom = find_domain(shell, args, ANY)?;
    let from = args.text("xmlfile")?.map(str::to_owned);
    let xml = match &from {
        Some(file) => read_definition(file)?,
        None => "<domaincheckpoint/>".to_owned(),
    };
    let made = make(shell, &dom, &xml, flags)?;
    let from = from.map_or(String::new(), |file| format!(" from '{file}'"));
    let text = format!("Domain checkpoint {} created{from}", made.name);
    shell.out.print_extra(text);
    Ok(())
}

/// `disk[,checkpoint=type][,bitmap=name]`
fn disk(words: &str) -> Result<Element> {
    let bad = || Failure::new(format!("unable to parse diskspec: {words}"));
    let mut parts = split(words).into_iter();
    let name = parts.next().filter(|name| !name.is_empty());
    let mut element = Element::new("disk").with_attr("name", name.ok_or_else(bad)?);
    for part in parts {
        let (key, value) = part.split_once('=').ok_or_else(bad)?;
        if !matches!(key, "checkpoint" | "bitmap") || element.attr(key).is_some() {
            return Err(bad());
        }
        element.set_attr(key, value);
    }
    Ok(element)
}

fn create_as(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(args, &[("quiesce", 1 << 1)]);
    let dom = find_domain(shell, args, ANY)?;
    let mut xml = String::from("<domaincheckpoint>\n");
    for option in ["name", "description"] {
        if let Some(value) = args.text(option)? {
            dom::format_element(&mut xml, &Element::with_text(option, value), 1);
        }
    }
    let disks = args.rest("diskspec");
    if !disks.is_empty() {
        let mut element = Element::new("disks");
        for words in disks {
            element.push(disk(words)?);
        }
        dom::format_element(&mut xml, &element, 1);
    }
    xml.push_str("</domaincheckpoint>\n");
    if args.has("print-xml") {
        shell.out.print(format!("{xml}\n"));
        return Ok(());
    }
    let made = make(shell, &dom, &xml, flags)?;
    let text = format!("Domain checkpoint {} created", made.name);
    shell.out.print_extra(text);
    Ok(())
}

fn lookup(shell: &mut Shell, dom: &Domain, name: &str) -> Result<Checkpoint> {
    let asked = DomainCheckpointLookupByNameArgs {
        dom: dom.clone(),
        name: name.to_owned(),
        flags: 0,
    };
    Ok(shell
        .call(procs::DOMAIN_CHECKPOINT_LOOKUP_BY_NAME, &asked)?
        .checkpoint)
}

/// The checkpoint that the options name.
fn named(shell: &mut Shell, args: &Args, dom: &Domain) -> Result<Checkpoint> {
    match args.text("checkpointname")? {
        Some(name) => lookup(shell, dom, name),
        None => Err(Failure::new("--checkpointname is required")),
    }
}

fn xml_of(shell: &mut Shell, checkpoint: &Checkpoint, flags: u32) -> Result<String> {
    let asked = DomainCheckpointGetXmlDescArgs {
        checkpoint: checkpoint.clone(),
        flags,
    };
    Ok(shell
        .call(procs::DOMAIN_CHECKPOINT_GET_XML_DESC, &asked)?
        .xml)
}

fn parent_of(shell: &mut Shell, checkpoint: &Checkpoint) -> Result<Option<String>> {
    let asked = DomainCheckpointGetParentArgs {
        checkpoint: checkpoint.clone(),
        flags: 0,
    };
    match shell.call(procs::DOMAIN_CHECKPOINT_GET_PARENT, &asked) {
        Ok(found) => Ok(Some(found.parent.name)),
        Err(failure) if failure.code == Some(ErrorCode::NO_DOMAIN_CHECKPOINT) => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn edit(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let checkpoint = named(shell, args, &dom)?;
    let name = checkpoint.name.clone();
    let original = xml_of(shell, &checkpoint, SECURE)?;
    let mut draft = Draft::new(&original)?;
    loop {
        draft.edit()?;
        let text = draft.read()?;
        if text == original {
            shell.out.print_extra(format!(
                "Checkpoint {name} XML configuration not changed.\n"
            ));
            return Ok(());
        }
        match make(shell, &dom, &text, REDEFINE) {
            Ok(edited) if edited.name == name => {
                shell
                    .out
                    .print_extra(format!("Checkpoint {name} edited.\n"));
                return Ok(());
            }
            Ok(edited) => {
                let other = edited.name.clone();
                let asked = DomainCheckpointDeleteArgs {
                    checkpoint: edited,
                    flags: METADATA_ONLY,
                };
                shell
                    .call(procs::DOMAIN_CHECKPOINT_DELETE, &asked)
                    .with_context(|| format!("Failed to clean up {other}"))?;
                return Err(Failure::new(format!(
                    "Cannot rename checkpoint {name} to {other}"
                )));
            }
            Err(failure) => match editor::ask_retry(shell, &failure, false)? {
                editor::Answer::Again | editor::Answer::WithoutValidation => {}
                editor::Answer::GiveUp => return Err(Failure::silent()),
            },
        }
    }
}

fn children(
    shell: &mut Shell,
    checkpoint: &Checkpoint,
    results: bool,
    flags: u32,
) -> Result<(Vec<Checkpoint>, i32)> {
    let asked = DomainCheckpointListAllChildrenArgs {
        checkpoint: checkpoint.clone(),
        need_results: results.into(),
        flags,
    };
    let found = shell.call(procs::DOMAIN_CHECKPOINT_LIST_ALL_CHILDREN, &asked)?;
    Ok((found.checkpoints.0, found.ret))
}

fn info(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let checkpoint = named(shell, args, &dom)?;
    let parent = parent_of(shell, &checkpoint)?;
    let near = children(shell, &checkpoint, false, 0)?.1;
    let all = children(shell, &checkpoint, false, DESCENDANTS)?.1;
    for (label, value) in [
        ("Name:", checkpoint.name),
        ("Domain:", dom.name),
        ("Parent:", parent.unwrap_or_else(|| "-".to_owned())),
        ("Children:", near.to_string()),
        ("Descendants:", all.to_string()),
    ] {
        shell.out.print(format!("{label:<15} {value}\n"));
    }
    Ok(())
}

fn list(shell: &mut Shell, args: &Args) -> Result {
    for (one, other) in [
        ("tree", "name"),
        ("parent", "roots"),
        ("parent", "tree"),
        ("roots", "tree"),
        ("roots", "from"),
    ] {
        args.exclusive(one, other)?;
    }
    let from = args.text("from")?.map(str::to_owned);
    if args.has("descendants") && from.is_none() {
        return Err(Failure::new("--descendants requires --from"));
    }
    // With --from, the bit of the roots means the descendants.
    let bits = flags(
        args,
        &[
            ("roots", 1 << 0),
            ("descendants", DESCENDANTS),
            ("topological", 1 << 1),
            ("leaves", 1 << 2),
            ("no-leaves", 1 << 3),
        ],
    );
    let dom = find_domain(shell, args, ANY)?;
    let start = match &from {
        Some(name) => Some(lookup(shell, &dom, name)?),
        None => None,
    };
    let mut found = match &start {
        Some(start) => children(shell, start, true, bits)?.0,
        None => {
            let asked = DomainListAllCheckpointsArgs {
                dom,
                need_results: 1,
                flags: bits,
            };
            let all = shell.call(procs::DOMAIN_LIST_ALL_CHECKPOINTS, &asked);
            let all = all.map_err(|failure| match failure.is_unsupported() {
                true => failure.context("unexpected problem querying checkpoints"),
                false => failure,
            })?;
            all.checkpoints.0
        }
    };
    if !args.has("topological") {
        found.sort_by(|a, b| a.name.cmp(&b.name));
    }
    if args.has("name") {
        for checkpoint in found {
            shell.out.print(format!("{}\n", checkpoint.name));
        }
        return Ok(());
    }
    if args.has("tree") {
        found.splice(0..0, start);
        let mut nodes = Vec::new();
        for checkpoint in &found {
            nodes.push((checkpoint.name.clone(), parent_of(shell, checkpoint)?));
        }
        print_tree(shell, nodes);
        return Ok(());
    }
    let with_parent = args.has("parent");
    let mut table = Table::new(if with_parent {
        &["Name", "Creation Time", "Parent"]
    } else {
        &["Name", "Creation Time"]
    });
    for checkpoint in &found {
        let xml = xml_of(shell, checkpoint, 0)?;
        let document =
            dom::parse(&xml, "(checkpoint)").map_err(|error| Failure::new(error.to_string()))?;
        let created = document.child_text("creationTime");
        let created = created.and_then(|text| text.trim().parse().ok());
        let mut cells = vec![
            checkpoint.name.clone(),
            time::local_at("%Y-%m-%d %H:%M:%S %z", created.unwrap_or(0)),
        ];
        if with_parent {
            cells.push(parent_of(shell, checkpoint)?.unwrap_or_default());
        }
        table.row(cells);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

fn dumpxml(shell: &mut Shell, args: &Args) -> Result {
    args.requires("wrap", "xpath")?;
    let flags = flags(
        args,
        &[
            ("security-info", SECURE),
            ("no-domain", 1 << 1),
            ("size", 1 << 2),
        ],
    );
    let dom = find_domain(shell, args, ANY)?;
    let checkpoint = named(shell, args, &dom)?;
    let xml = xml_of(shell, &checkpoint, flags)?;
    print_selected(shell, args, &xml)
}

fn parent(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let checkpoint = named(shell, args, &dom)?;
    let Some(parent) = parent_of(shell, &checkpoint)? else {
        return Err(Failure::new(format!(
            "checkpoint '{}' has no parent",
            checkpoint.name
        )));
    };
    shell.out.print(parent);
    Ok(())
}

fn delete(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(
        args,
        &[
            ("children", 1 << 0),
            ("metadata", METADATA_ONLY),
            ("children-only", 1 << 2),
        ],
    );
    let dom = find_domain(shell, args, ANY)?;
    let checkpoint = named(shell, args, &dom)?;
    let name = checkpoint.name.clone();
    let asked = DomainCheckpointDeleteArgs { checkpoint, flags };
    shell
        .call(procs::DOMAIN_CHECKPOINT_DELETE, &asked)
        .with_context(|| format!("Failed to delete checkpoint {name}"))?;
    let what = if args.has("children-only") {
        " children"
    } else {
        ""
    };
    shell
        .out
        .print_extra(format!("Domain checkpoint {name}{what} deleted\n"));
    Ok(())
}

fn backup_begin(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let backup_xml = match args.text("backupxml")? {
        Some(file) => read_definition(file)?,
        None => "<domainbackup/>".to_owned(),
    };
    let checkpoint_xml = match args.text("checkpointxml")? {
        Some(file) => Some(read_definition(file)?),
        None => None,
    };
    let asked = DomainBackupBeginArgs {
        dom,
        backup_xml,
        checkpoint_xml,
        flags: args.has("reuse-external").into(),
    };
    shell.call(procs::DOMAIN_BACKUP_BEGIN, &asked)?;
    shell.out.print("Backup started\n");
    Ok(())
}

fn backup_dumpxml(shell: &mut Shell, args: &Args) -> Result {
    args.requires("wrap", "xpath")?;
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainBackupGetXmlDescArgs { dom, flags: 0 };
    let xml = shell.call(procs::DOMAIN_BACKUP_GET_XML_DESC, &asked)?.xml;
    print_selected(shell, args, &xml)
}
