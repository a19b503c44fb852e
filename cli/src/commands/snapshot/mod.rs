//! Snapshots: `snapshot-create`, `-create-as`, `-edit`, `-delete`, `-revert`, and what looks at them.

mod list;
mod spec;

pub use list::{SNAPSHOT_LIST, print_tree};
pub use spec::split;

use rpc::args::{
    DomainRevertToSnapshotArgs, DomainSnapshotCreateXmlArgs, DomainSnapshotCurrentArgs,
    DomainSnapshotDeleteArgs, DomainSnapshotGetParentArgs, DomainSnapshotGetXmlDescArgs,
    DomainSnapshotHasMetadataArgs, DomainSnapshotIsCurrentArgs, DomainSnapshotLookupByNameArgs,
    DomainSnapshotNumChildrenArgs,
};
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::types::{Domain, Snapshot};
use xml_schemas::dom::{self, Element};

use super::definition::print_selected;
use super::domain::flags;
use super::{ANY, find_domain, read_definition};
use crate::command::{Args, Command, DOMAIN, Opt, Values, flag, rest, text};
use crate::editor::{self, Draft};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

const NAME: Opt = text("snapshotname", "snapshot name");
const CURRENT: Opt = flag("current", "the current snapshot");
const NO_METADATA: Opt = flag("no-metadata", "take snapshot but create no metadata");
const HALT: Opt = flag("halt", "halt domain after snapshot is created");
const DISK_ONLY: Opt = flag("disk-only", "capture disk state but not vm state");
const REUSE: Opt = flag("reuse-external", "reuse any existing external files");
const QUIESCE: Opt = flag("quiesce", "quiesce guest's file systems");
const ATOMIC: Opt = flag("atomic", "require atomic operation");
const LIVE: Opt = flag("live", "take a live snapshot");
const VALIDATE: Opt = flag("validate", "refuse what libvirt's schema doesn't allow");

/// `snapshot-create`
pub const SNAPSHOT_CREATE: Command = Command {
    name: "snapshot-create",
    summary: "Create a snapshot from XML",
    description: "Makes a snapshot (disks, and memory) as XML describes it.",
    options: &[
        DOMAIN,
        text("xmlfile", "domain snapshot XML").values(Values::Files),
        flag("redefine", "redefine metadata for existing snapshot"),
        flag("current", "with redefine, set current snapshot"),
        NO_METADATA,
        HALT,
        DISK_ONLY,
        REUSE,
        QUIESCE,
        ATOMIC,
        LIVE,
        VALIDATE,
    ],
    handler: create,
    connects: true,
};

/// `snapshot-create-as`
pub const SNAPSHOT_CREATE_AS: Command = Command {
    name: "snapshot-create-as",
    summary: "Create a snapshot from a set of args",
    description: "Makes a snapshot (disks, and memory).",
    options: &[
        DOMAIN,
        text("name", "name of snapshot"),
        text("description", "description of snapshot"),
        flag("print-xml", "print XML document rather than create"),
        NO_METADATA,
        HALT,
        DISK_ONLY,
        REUSE,
        QUIESCE,
        ATOMIC,
        LIVE,
        VALIDATE,
        text("memspec", "memory attributes: [file=]name[,snapshot=type]").named_only(),
        rest(
            "diskspec",
            "disk attributes: disk[,snapshot=type][,driver=type][,stype=type][,file=name]",
        ),
    ],
    handler: create_as,
    connects: true,
};

/// `snapshot-edit`
pub const SNAPSHOT_EDIT: Command = Command {
    name: "snapshot-edit",
    summary: "edit XML for a snapshot",
    description: "Lets you edit a snapshot's description.",
    options: &[
        DOMAIN,
        NAME,
        flag("current", "also set edited snapshot as current"),
        flag("rename", "allow renaming an existing snapshot"),
        flag("clone", "allow cloning to new name"),
    ],
    handler: edit,
    connects: true,
};

/// `snapshot-current`
pub const SNAPSHOT_CURRENT: Command = Command {
    name: "snapshot-current",
    summary: "Get or set the current snapshot",
    description: "Shows the current snapshot, or makes another one current.",
    options: &[
        DOMAIN,
        flag("name", "list the name, rather than the full xml"),
        flag(
            "security-info",
            "include security sensitive information in XML dump",
        ),
        text("snapshotname", "name of existing snapshot to make current"),
    ],
    handler: current,
    connects: true,
};

/// `snapshot-info`
pub const SNAPSHOT_INFO: Command = Command {
    name: "snapshot-info",
    summary: "snapshot information",
    description: "Tells about a snapshot.",
    options: &[DOMAIN, NAME, CURRENT],
    handler: info,
    connects: true,
};

/// `snapshot-dumpxml`
pub const SNAPSHOT_DUMPXML: Command = Command {
    name: "snapshot-dumpxml",
    summary: "Dump XML for a domain snapshot",
    description: "Shows a snapshot's description.",
    options: &[
        DOMAIN,
        text("snapshotname", "snapshot name").required(),
        flag(
            "security-info",
            "include security sensitive information in XML dump",
        ),
        text("xpath", "an XPath expression that selects what is shown"),
        flag("wrap", "wrap what is selected in a root element"),
    ],
    handler: dumpxml,
    connects: true,
};

/// `snapshot-parent`
pub const SNAPSHOT_PARENT: Command = Command {
    name: "snapshot-parent",
    summary: "Get the name of the parent of a snapshot",
    description: "Names the snapshot before one.",
    options: &[DOMAIN, NAME, CURRENT],
    handler: parent,
    connects: true,
};

/// `snapshot-revert`
pub const SNAPSHOT_REVERT: Command = Command {
    name: "snapshot-revert",
    summary: "Revert a domain to a snapshot",
    description: "Brings a domain back to a snapshot. What came after is given up.",
    options: &[
        DOMAIN,
        NAME,
        CURRENT,
        flag("running", "after reverting, change state to running"),
        flag("paused", "after reverting, change state to paused"),
        flag("force", "try harder on risky reverts"),
        flag("reset-nvram", "make the NVRAM anew from its template"),
    ],
    handler: revert,
    connects: true,
};

/// `snapshot-delete`
pub const SNAPSHOT_DELETE: Command = Command {
    name: "snapshot-delete",
    summary: "Delete a domain snapshot",
    description: "Deletes a snapshot; the domain stays as it is.",
    options: &[
        DOMAIN,
        NAME,
        CURRENT,
        flag("children", "delete snapshot and all children"),
        flag("children-only", "delete children but not snapshot"),
        flag(
            "metadata",
            "delete only libvirt metadata, leaving snapshot contents behind",
        ),
    ],
    handler: delete,
    connects: true,
};

fn lookup(shell: &mut Shell, dom: &Domain, name: &str) -> Result<Snapshot> {
    let args = DomainSnapshotLookupByNameArgs {
        dom: dom.clone(),
        name: name.to_owned(),
        flags: 0,
    };
    Ok(shell
        .call(procs::DOMAIN_SNAPSHOT_LOOKUP_BY_NAME, &args)?
        .snap)
}

fn current_of(shell: &mut Shell, dom: &Domain) -> Result<Snapshot> {
    let args = DomainSnapshotCurrentArgs {
        dom: dom.clone(),
        flags: 0,
    };
    Ok(shell.call(procs::DOMAIN_SNAPSHOT_CURRENT, &args)?.snap)
}

/// The snapshot that the options name.
fn named(shell: &mut Shell, args: &Args, dom: &Domain, exclusive: bool) -> Result<Snapshot> {
    let name = args.text("snapshotname")?;
    if exclusive && args.has("current") && name.is_some() {
        return Err(Failure::new(
            "Options --current and --snapshotname are mutually exclusive",
        ));
    }
    match name {
        Some(name) => lookup(shell, dom, name),
        None if args.has("current") => current_of(shell, dom),
        None => Err(Failure::new("--snapshotname or --current is required")),
    }
}

fn xml_of(shell: &mut Shell, snap: &Snapshot, flags: u32) -> Result<String> {
    let args = DomainSnapshotGetXmlDescArgs {
        snap: snap.clone(),
        flags,
    };
    Ok(shell.call(procs::DOMAIN_SNAPSHOT_GET_XML_DESC, &args)?.xml)
}

fn parsed(shell: &mut Shell, snap: &Snapshot) -> Result<Element> {
    let xml = xml_of(shell, snap, 0)?;
    dom::parse(&xml, "(snapshot)").map_err(|error| Failure::new(error.to_string()))
}

const REDEFINE: u32 = 1 << 0;
const SET_CURRENT: u32 = 1 << 1;

fn create_flags(args: &Args) -> u32 {
    flags(
        args,
        &[
            ("no-metadata", 1 << 2),
            ("halt", 1 << 3),
            ("disk-only", 1 << 4),
            ("reuse-external", 1 << 5),
            ("quiesce", 1 << 6),
            ("atomic", 1 << 7),
            ("live", 1 << 8),
            ("validate", 1 << 9),
        ],
    )
}

fn make(shell: &mut Shell, dom: &Domain, xml: &str, flags: u32) -> Result<Snapshot> {
    let args = DomainSnapshotCreateXmlArgs {
        dom: dom.clone(),
        xml_desc: xml.to_owned(),
        flags,
    };
    Ok(shell.call(procs::DOMAIN_SNAPSHOT_CREATE_XML, &args)?.snap)
}

fn create(shell: &mut Shell, args: &Args) -> Result {
    args.requires("current", "redefine")?;
    let mut flags = create_flags(args);
    if args.has("redefine") {
        flags |= REDEFINE;
    }
    if args.has("current") {
        flags |= SET_CURRENT;
    }
    let dom = find_domain(shell, args, ANY)?;
    let from = args.text("xmlfile")?.map(str::to_owned);
    let xml = match &from {
        Some(file) => read_definition(file)?,
        None => "<domainsnapshot/>".to_owned(),
    };
    let snap = make(shell, &dom, &xml, flags)?;
    let from = from.map_or(String::new(), |file| format!(" from '{file}'"));
    let text = format!("Domain snapshot {} created{from}", snap.name);
    shell.out.print_extra(text);
    Ok(())
}

fn create_as(shell: &mut Shell, args: &Args) -> Result {
    let flags = create_flags(args);
    let dom = find_domain(shell, args, ANY)?;
    let mut root = Element::new("domainsnapshot");
    for option in ["name", "description"] {
        if let Some(value) = args.text(option)? {
            root.push(Element::with_text(option, value));
        }
    }
    if let Some(words) = args.text("memspec")? {
        root.push(spec::memory(words)?);
    }
    let disks = args.rest("diskspec");
    if !disks.is_empty() {
        let mut element = Element::new("disks");
        for words in disks {
            element.push(spec::disk(words)?);
        }
        root.push(element);
    }
    let mut xml = String::new();
    dom::format_element(&mut xml, &root, 0);
    if args.has("print-xml") {
        shell.out.print(format!("{xml}\n"));
        return Ok(());
    }
    let snap = make(shell, &dom, &xml, flags)?;
    let text = format!("Domain snapshot {} created", snap.name);
    shell.out.print_extra(text);
    Ok(())
}

fn edit(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("rename", "clone")?;
    if args.has("current") && args.text("snapshotname")?.is_none() {
        args.exclusive("current", "rename")?;
    }
    let dom = find_domain(shell, args, ANY)?;
    let snap = named(shell, args, &dom, false)?;
    let mut flags = REDEFINE;
    let is_current = DomainSnapshotIsCurrentArgs {
        snap: snap.clone(),
        flags: 0,
    };
    if args.has("current")
        || shell
            .call(procs::DOMAIN_SNAPSHOT_IS_CURRENT, &is_current)?
            .current
            > 0
    {
        flags |= SET_CURRENT;
    }
    let original = xml_of(shell, &snap, 1)?;
    let mut draft = Draft::new(&original)?;
    loop {
        draft.edit()?;
        let text = draft.read()?;
        if text == original && !args.has("current") {
            shell.out.print_extra(format!(
                "Snapshot {} XML configuration not changed.\n",
                snap.name
            ));
            return Ok(());
        }
        match make(shell, &dom, &text, flags) {
            Ok(edited) if edited.name == snap.name => {
                shell
                    .out
                    .print_extra(format!("Snapshot {} edited.\n", edited.name));
                return Ok(());
            }
            Ok(edited) if args.has("clone") => {
                shell.out.print_extra(format!(
                    "Snapshot {} cloned to {}.\n",
                    snap.name, edited.name
                ));
                return Ok(());
            }
            Ok(edited) => {
                let unwanted = if args.has("rename") { &snap } else { &edited };
                let remove = DomainSnapshotDeleteArgs {
                    snap: unwanted.clone(),
                    flags: METADATA_ONLY,
                };
                shell.call(procs::DOMAIN_SNAPSHOT_DELETE, &remove)?;
                if !args.has("rename") {
                    let why = format!(
                        "Must use --rename or --clone to change {} to {}",
                        snap.name, edited.name
                    );
                    let what = format!("Failed to update {}", snap.name);
                    return Err(Failure::new(what).context(why));
                }
                return Ok(());
            }
            Err(failure) => match editor::ask_retry(shell, &failure, false)? {
                editor::Answer::Again | editor::Answer::WithoutValidation => {}
                editor::Answer::GiveUp => return Err(Failure::silent()),
            },
        }
    }
}

const METADATA_ONLY: u32 = 1 << 1;

fn current(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("name", "snapshotname")?;
    let dom = find_domain(shell, args, ANY)?;
    if let Some(name) = args.text("snapshotname")? {
        let snap = lookup(shell, &dom, name)?;
        let xml = xml_of(shell, &snap, 1)?;
        make(shell, &dom, &xml, REDEFINE | SET_CURRENT)?;
        let text = format!("Snapshot {name} set as current");
        shell.out.print_extra(text);
        return Ok(());
    }
    let snap = match current_of(shell, &dom) {
        Err(failure) if failure.code == Some(ErrorCode::NO_DOMAIN_SNAPSHOT) => {
            return Err(Failure::new(format!(
                "domain '{}' has no current snapshot",
                dom.name
            )));
        }
        snap => snap?,
    };
    let text = if args.has("name") {
        snap.name
    } else {
        xml_of(shell, &snap, u32::from(args.has("security-info")))?
    };
    shell.out.print(text);
    Ok(())
}

fn dumpxml(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let snap = lookup(shell, &dom, args.required("snapshotname")?)?;
    let xml = xml_of(shell, &snap, u32::from(args.has("security-info")))?;
    print_selected(shell, args, &xml)
}

fn parent(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let snap = named(shell, args, &dom, true)?;
    match parent_of(shell, &snap)? {
        Some(parent) => {
            shell.out.print(parent);
            Ok(())
        }
        None => Err(Failure::new(format!(
            "snapshot '{}' has no parent",
            snap.name
        ))),
    }
}

fn parent_of(shell: &mut Shell, snap: &Snapshot) -> Result<Option<String>> {
    let args = DomainSnapshotGetParentArgs {
        snap: snap.clone(),
        flags: 0,
    };
    match shell.call(procs::DOMAIN_SNAPSHOT_GET_PARENT, &args) {
        Ok(ret) => Ok(Some(ret.snap.name)),
        Err(failure) if failure.code == Some(ErrorCode::NO_DOMAIN_SNAPSHOT) => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn info(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let snap = named(shell, args, &dom, true)?;
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let flagless = |snap: &Snapshot| DomainSnapshotIsCurrentArgs {
        snap: snap.clone(),
        flags: 0,
    };
    let current = shell.call(procs::DOMAIN_SNAPSHOT_IS_CURRENT, &flagless(&snap))?;
    let document = parsed(shell, &snap)?;
    let state = document.child_text("state").unwrap_or_default();
    let mut parts: Vec<&Element> = document.child("memory").into_iter().collect();
    if let Some(disks) = document.child("disks") {
        parts.extend(disks.elements());
    }
    let external = state == "disk-snapshot"
        || parts
            .iter()
            .any(|part| part.attr("snapshot") == Some("external"));
    let parent = parent_of(shell, &snap)?;
    let mut children = |flags| {
        let args = DomainSnapshotNumChildrenArgs {
            snap: snap.clone(),
            flags,
        };
        shell
            .call(procs::DOMAIN_SNAPSHOT_NUM_CHILDREN, &args)
            .map(|ret| ret.num.to_string())
    };
    let (near, all) = (children(0)?, children(1)?);
    let metadata = DomainSnapshotHasMetadataArgs {
        snap: snap.clone(),
        flags: 0,
    };
    let metadata = shell.call(procs::DOMAIN_SNAPSHOT_HAS_METADATA, &metadata)?;
    for (label, value) in [
        ("Name:", snap.name.clone()),
        ("Domain:", dom.name.clone()),
        ("Current:", yes(current.current > 0)),
        ("State:", state),
        (
            "Location:",
            if external { "external" } else { "internal" }.to_owned(),
        ),
        ("Parent:", parent.unwrap_or_else(|| "-".to_owned())),
        ("Children:", near),
        ("Descendants:", all),
        ("Metadata:", yes(metadata.metadata > 0)),
    ] {
        shell.out.print(format!("{label:<15} {value}\n"));
    }
    Ok(())
}

fn revert(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(
        args,
        &[
            ("running", 1 << 0),
            ("paused", 1 << 1),
            ("force", 1 << 2),
            ("reset-nvram", 1 << 3),
        ],
    );
    let dom = find_domain(shell, args, ANY)?;
    let snap = named(shell, args, &dom, true)?;
    let name = snap.name.clone();
    let call = DomainRevertToSnapshotArgs { snap, flags };
    shell
        .call(procs::DOMAIN_REVERT_TO_SNAPSHOT, &call)
        .with_context(|| format!("Failed to revert snapshot {name}"))?;
    shell
        .out
        .print_extra(format!("Domain snapshot {name} reverted\n"));
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
    let snap = named(shell, args, &dom, true)?;
    let name = snap.name.clone();
    let call = DomainSnapshotDeleteArgs { snap, flags };
    shell
        .call(procs::DOMAIN_SNAPSHOT_DELETE, &call)
        .with_context(|| format!("Failed to delete snapshot {name}"))?;
    let what = if args.has("children-only") {
        " children"
    } else {
        ""
    };
    shell
        .out
        .print_extra(format!("Domain snapshot {name}{what} deleted\n"));
    Ok(())
}
