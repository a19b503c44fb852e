//! Definitions: `create`, `define`, `undefine`, `dumpxml`, `edit`.

use rpc::args::{
    DomainCreateXmlArgs, DomainDefineXmlArgs, DomainDefineXmlFlagsArgs,
    DomainHasManagedSaveImageArgs, DomainIsActiveArgs, DomainManagedSaveRemoveArgs,
    DomainSnapshotNumArgs, DomainUndefineArgs, DomainUndefineFlagsArgs,
};
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::types::Domain;

use super::domain::{
    START_AUTODESTROY, START_PAUSED, START_RESET_NVRAM, START_VALIDATE, flags, refuse_descriptors,
};
use super::undefine_storage::Volumes;
use super::{ANY, console, domain_xml, find_domain, read_definition};
use crate::command::{Args, Command, DOMAIN, Opt, Values, data, flag, text};
use crate::editor::{self, Draft};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::xpath;

/// A file with a definition.
pub(super) const FILE: Opt = data("file", "file with the definition in XML").values(Values::Files);
/// Strictness.
pub(super) const VALIDATE: Opt = flag("validate", "refuse what libvirt's schema doesn't allow");
/// Only looking at what would be defined.
pub(super) const PRINT: Opt = flag("print-xml", "print the definition, and do nothing else");
/// A part of a document.
pub(super) const XPATH: Opt =
    text("xpath", "print only what this XPath expression selects").named_only();
/// Several parts.
pub(super) const WRAP: Opt = flag("wrap", "put what was selected into one root element");

/// `create`
pub const CREATE: Command = Command {
    name: "create",
    summary: "create a domain from an XML file",
    description: "Starts a domain that has no definition which stays.",
    options: &[
        FILE,
        flag("console", "connect to its console at once"),
        flag("paused", "leave the guest paused"),
        flag(
            "autodestroy",
            "destroy the guest when this program's connection ends",
        ),
        text("pass-fds", "descriptors N,M,... to hand to the guest"),
        VALIDATE,
        flag("reset-nvram", "make the NVRAM anew from its template"),
    ],
    handler: create,
    connects: true,
};

/// `define`
pub const DEFINE: Command = Command {
    name: "define",
    summary: "define (but don't start) a domain from an XML file",
    description: "Keeps a definition, or changes it.",
    options: &[FILE, VALIDATE],
    handler: define,
    connects: true,
};

/// `undefine`
pub const UNDEFINE: Command = Command {
    name: "undefine",
    summary: "undefine a domain",
    description: "Removes the definition of a domain. A running domain runs on, until it stops.",
    options: &[
        DOMAIN,
        flag("managed-save", "remove its managed save image"),
        text(
            "storage",
            "remove these volumes of it (targets or source paths, separated by commas)",
        ),
        flag("remove-all-storage", "remove all of its volumes"),
        flag(
            "delete-storage-volume-snapshots",
            "remove the volumes' snapshots as well, with --remove-all-storage",
        ),
        flag(
            "wipe-storage",
            "overwrite the volumes before they are removed",
        ),
        flag(
            "snapshots-metadata",
            "forget its snapshots (it must be off)",
        ),
        flag(
            "checkpoints-metadata",
            "forget its checkpoints (it must be off)",
        ),
        flag("nvram", "remove its NVRAM file"),
        flag("keep-nvram", "keep its NVRAM file"),
        flag("tpm", "remove its TPM's state"),
        flag("keep-tpm", "keep its TPM's state"),
    ],
    handler: undefine,
    connects: true,
};

/// `dumpxml`
pub const DUMPXML: Command = Command {
    name: "dumpxml",
    summary: "domain information in XML",
    description: "Prints a domain's definition.",
    options: &[
        DOMAIN,
        flag("inactive", "as it will be at the next start"),
        flag("security-info", "with what is secret"),
        flag("update-cpu", "with the CPU that the host makes of it"),
        flag("migratable", "as another host needs it for a migration"),
        XPATH,
        WRAP,
    ],
    handler: dumpxml,
    connects: true,
};

/// `edit`
pub const EDIT: Command = Command {
    name: "edit",
    summary: "edit XML configuration for a domain",
    description: "Opens a domain's definition in an editor ($VISUAL, $EDITOR), and keeps what was changed.",
    options: &[
        DOMAIN,
        flag("skip-validate", "take what libvirt's schema doesn't allow"),
    ],
    handler: edit,
    connects: true,
};

fn create(shell: &mut Shell, args: &Args) -> Result {
    let path = args.required("file")?;
    let xml_desc = read_definition(path)?;
    refuse_descriptors(args)?;
    let flags = flags(
        args,
        &[
            ("paused", START_PAUSED),
            ("autodestroy", START_AUTODESTROY),
            ("validate", START_VALIDATE),
            ("reset-nvram", START_RESET_NVRAM),
        ],
    );
    let dom = shell
        .call(
            procs::DOMAIN_CREATE_XML,
            &DomainCreateXmlArgs { xml_desc, flags },
        )
        .with_context(|| format!("Failed to create domain from {path}"))?
        .dom;
    shell
        .out
        .print_extra(format!("Domain '{}' created from {path}\n", dom.name));
    if args.has("console") {
        console::run(shell, &dom, None, 0)?;
    }
    Ok(())
}

/// `VIR_DOMAIN_DEFINE_VALIDATE`
const DEFINE_VALIDATE: u32 = 1 << 0;

fn define_xml(shell: &mut Shell, xml: String, validate: bool) -> Result<Domain> {
    if validate {
        let args = DomainDefineXmlFlagsArgs {
            xml,
            flags: DEFINE_VALIDATE,
        };
        Ok(shell.call(procs::DOMAIN_DEFINE_XML_FLAGS, &args)?.dom)
    } else {
        Ok(shell
            .call(procs::DOMAIN_DEFINE_XML, &DomainDefineXmlArgs { xml })?
            .dom)
    }
}

fn define(shell: &mut Shell, args: &Args) -> Result {
    let path = args.required("file")?;
    let xml = read_definition(path)?;
    let dom = define_xml(shell, xml, args.has("validate"))
        .with_context(|| format!("Failed to define domain from {path}"))?;
    shell
        .out
        .print_extra(format!("Domain '{}' defined from {path}\n", dom.name));
    Ok(())
}

/// `VIR_DOMAIN_UNDEFINE_*`
const UNDEFINE_MANAGED_SAVE: u32 = 1 << 0;
const UNDEFINE_SNAPSHOTS: u32 = 1 << 1;
const UNDEFINE_NVRAM: u32 = 1 << 2;

/// `VIR_DOMAIN_SNAPSHOT_LIST_METADATA`
const SNAPSHOTS_WITH_METADATA: u32 = 1 << 1;

fn undefine(shell: &mut Shell, args: &Args) -> Result {
    args.requires("delete-storage-volume-snapshots", "remove-all-storage")?;
    args.exclusive("nvram", "keep-nvram")?;
    args.exclusive("tpm", "keep-tpm")?;
    let storage = args.text("storage")?.is_some();
    let all_storage = args.has("remove-all-storage");
    if args.has("wipe-storage") && !(storage || all_storage) {
        return Err(Failure::new(
            "'--wipe-storage' requires '--storage <string>' or '--remove-all-storage'",
        ));
    }
    let mut flags = flags(
        args,
        &[
            ("managed-save", UNDEFINE_MANAGED_SAVE),
            ("snapshots-metadata", UNDEFINE_SNAPSHOTS),
            ("nvram", UNDEFINE_NVRAM),
            ("keep-nvram", 1 << 3),
            ("checkpoints-metadata", 1 << 4),
            ("tpm", 1 << 5),
            ("keep-tpm", 1 << 6),
        ],
    );
    let name = args.required("domain")?.to_owned();
    let dom = find_domain(shell, args, ANY)?;
    let active = shell
        .call(
            procs::DOMAIN_IS_ACTIVE,
            &DomainIsActiveArgs { dom: dom.clone() },
        )?
        .active
        != 0;
    if storage || all_storage {
        if active {
            return Err(Failure::new(
                "Storage volume deletion is supported only on stopped domains",
            ));
        }
        if storage && all_storage {
            return Err(Failure::new(
                "Specified both --storage and --remove-all-storage",
            ));
        }
    }
    let volumes = if storage || all_storage {
        Volumes::find(shell, args, &dom)?
    } else {
        Volumes::default()
    };
    let kept = if active {
        Kept::default()
    } else {
        Kept::ask(shell, &dom)?
    };
    // An older daemon may not know a flag: one that changes nothing is left out.
    if !kept.managed_save {
        flags &= !UNDEFINE_MANAGED_SAVE;
    }
    if kept.snapshots == 0 {
        flags &= !UNDEFINE_SNAPSHOTS;
    }
    let covered = (!kept.managed_save || flags & UNDEFINE_MANAGED_SAVE != 0)
        && (kept.snapshots == 0 || flags & UNDEFINE_SNAPSHOTS != 0);
    remove(shell, &dom, flags, covered, &kept).map_err(|failure| match failure.code {
        // What this side refuses says everything already.
        None if !failure.disconnected => failure,
        _ => failure.context(format!("Failed to undefine domain '{name}'")),
    })?;
    shell
        .out
        .print_extra(format!("Domain '{name}' has been undefined\n"));
    volumes.remove(shell)
}

/// What a domain that is off has beside its definition.
#[derive(Debug, Default)]
struct Kept {
    managed_save: bool,
    snapshots: i32,
}

impl Kept {
    fn ask(shell: &mut Shell, dom: &Domain) -> Result<Self> {
        let or_none = |result: Result<i32>| match result {
            Err(failure) if failure.is_unsupported() => Ok(0),
            result => result,
        };
        let saved = DomainHasManagedSaveImageArgs {
            dom: dom.clone(),
            flags: 0,
        };
        let saved = shell
            .call(procs::DOMAIN_HAS_MANAGED_SAVE_IMAGE, &saved)
            .map(|ret| ret.result);
        let mut snapshots = |flags| {
            let args = DomainSnapshotNumArgs {
                dom: dom.clone(),
                flags,
            };
            or_none(
                shell
                    .call(procs::DOMAIN_SNAPSHOT_NUM, &args)
                    .map(|ret| ret.num),
            )
        };
        let with_metadata = match snapshots(0)? {
            0 => 0,
            _ => snapshots(SNAPSHOTS_WITH_METADATA)?,
        };
        Ok(Self {
            managed_save: or_none(saved)? > 0,
            snapshots: with_metadata,
        })
    }
}

fn remove(shell: &mut Shell, dom: &Domain, flags: u32, covered: bool, kept: &Kept) -> Result {
    if covered || flags & UNDEFINE_NVRAM != 0 {
        let args = DomainUndefineFlagsArgs {
            dom: dom.clone(),
            flags,
        };
        match shell.call(procs::DOMAIN_UNDEFINE_FLAGS, &args) {
            Err(failure)
                if flags & UNDEFINE_NVRAM == 0
                    && matches!(
                        failure.code,
                        Some(ErrorCode::NO_SUPPORT | ErrorCode::INVALID_ARG)
                    ) => {}
            result => return result,
        }
    }
    // The daemon is too old for flags, or the user did not agree to lose what is kept: step by step.
    if kept.managed_save {
        if flags & UNDEFINE_MANAGED_SAVE == 0 {
            return Err(Failure::new(
                "Refusing to undefine while domain managed save image exists",
            ));
        }
        let args = DomainManagedSaveRemoveArgs {
            dom: dom.clone(),
            flags: 0,
        };
        shell.call(procs::DOMAIN_MANAGED_SAVE_REMOVE, &args)?;
    }
    if kept.snapshots > 0 {
        return Err(Failure::new(if flags & UNDEFINE_SNAPSHOTS == 0 {
            format!(
                "Refusing to undefine while {} snapshots exist",
                kept.snapshots
            )
        } else {
            format!("Unable to remove metadata of {} snapshots", kept.snapshots)
        }));
    }
    shell.call(
        procs::DOMAIN_UNDEFINE,
        &DomainUndefineArgs { dom: dom.clone() },
    )
}

/// `VIR_DOMAIN_XML_*`
const XML_SECURE: u32 = 1 << 0;
const XML_INACTIVE: u32 = 1 << 1;

fn dumpxml(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(
        args,
        &[
            ("security-info", XML_SECURE),
            ("inactive", XML_INACTIVE),
            ("update-cpu", 1 << 2),
            ("migratable", 1 << 3),
        ],
    );
    args.text("xpath")?;
    let dom = find_domain(shell, args, ANY)?;
    let xml = domain_xml(shell, &dom, flags)?;
    print_selected(shell, args, &xml)
}

/// Prints a document, or what `--xpath` selects of it.
///
/// # Errors
///
/// The expression is none.
pub fn print_selected(shell: &mut Shell, args: &Args, xml: &str) -> Result {
    match args.text("xpath")? {
        None => shell.out.print(xml),
        Some(expression) => {
            let selected = match xpath::select(xml, expression) {
                Ok(selected) => selected,
                // virsh leaves the word to libxml2 here, and takes nothing for found.
                Err(why) if why.starts_with("XPath error : ") => {
                    eprintln!("{why}");
                    return Ok(());
                }
                Err(why) => return Err(Failure::new(why)),
            };
            let text = if args.has("wrap") {
                selected.wrapped()
            } else {
                selected.plain()
            };
            shell.out.print(text);
        }
    }
    Ok(())
}

fn edit(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let current = |shell: &mut Shell| domain_xml(shell, &dom, XML_SECURE | XML_INACTIVE);
    let original = current(shell)?;
    let mut validate = !args.has("skip-validate");
    let mut draft = Draft::new(&original)?;
    loop {
        draft.edit()?;
        let text = draft.read()?;
        if text == original {
            shell.out.print_extra(format!(
                "Domain '{}' XML configuration not changed.\n",
                dom.name
            ));
            return Ok(());
        }
        let stored = if current(shell)? == original {
            define_xml(shell, text, validate)
        } else {
            Err(Failure::new(
                "ERROR: the XML configuration was changed by another user",
            ))
        };
        match stored {
            Ok(dom) => {
                shell
                    .out
                    .print_extra(format!("Domain '{}' XML configuration edited.\n", dom.name));
                return Ok(());
            }
            Err(failure) => {
                let failure = failure.context(format!("Failed to define domain '{}'", dom.name));
                match editor::ask_retry(shell, &failure, validate)? {
                    editor::Answer::Again => {}
                    editor::Answer::WithoutValidation => validate = false,
                    editor::Answer::GiveUp => return Err(Failure::silent()),
                }
            }
        }
    }
}
