//! `save`, `restore`, `dump`, and the managed save's commands.

pub mod image;
pub mod job;

use std::path::Path;

use rpc::args::{
    DomainCoreDumpArgs, DomainCoreDumpWithFormatArgs, DomainHasManagedSaveImageArgs,
    DomainManagedSaveArgs, DomainManagedSaveRemoveArgs, DomainRestoreArgs, DomainRestoreFlagsArgs,
    DomainSaveArgs, DomainSaveFlagsArgs,
};
use rpc::procs;

use super::domain::flags;
use super::{ANY, find_domain, read_definition};
use crate::command::{Args, Command, DOMAIN, Opt, Values, data, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

const BYPASS_CACHE: Opt = flag("bypass-cache", "avoid file system cache");
const RUNNING: Opt = flag("running", "the guest runs when it is restored");
const PAUSED: Opt = flag("paused", "the guest is paused when it is restored");
const VERBOSE: Opt = flag("verbose", "display the progress");

/// `save`
pub const SAVE: Command = Command {
    name: "save",
    summary: "save a domain state to a file",
    description: "Saves a running domain, and ends it.",
    options: &[
        DOMAIN,
        data("file", "where to save it").values(Values::Files),
        BYPASS_CACHE,
        text("xml", "file with another XML for the restored domain").values(Values::Files),
        RUNNING,
        PAUSED,
        VERBOSE,
    ],
    handler: save,
    connects: true,
};

/// `restore`
pub const RESTORE: Command = Command {
    name: "restore",
    summary: "restore a domain from a saved state in a file",
    description: "Starts a domain from where it was saved.",
    options: &[
        data("file", "where it is saved").values(Values::Files),
        flag(
            "bypass-cache",
            "avoid file system cache: read it all before the guest goes on",
        ),
        text("xml", "file with another XML for the domain").values(Values::Files),
        flag("running", "the guest runs"),
        flag("paused", "the guest is paused"),
        flag("reset-nvram", "make the NVRAM anew from its template"),
    ],
    handler: restore,
    connects: true,
};

/// `managedsave`
pub const MANAGEDSAVE: Command = Command {
    name: "managedsave",
    summary: "managed save of a domain state",
    description: "Saves a running domain and ends it. Its next start goes on from there.",
    options: &[DOMAIN, BYPASS_CACHE, RUNNING, PAUSED, VERBOSE],
    handler: managedsave,
    connects: true,
};

/// `managedsave-remove`
pub const MANAGEDSAVE_REMOVE: Command = Command {
    name: "managedsave-remove",
    summary: "Remove managed save of a domain",
    description: "Throws a domain's managed save away: its next start boots.",
    options: &[DOMAIN],
    handler: managedsave_remove,
    connects: true,
};

/// `dump`
pub const DUMP: Command = Command {
    name: "dump",
    summary: "dump the core of a domain to a file for analysis",
    description: "Writes a domain's memory and registers to a file.",
    options: &[
        DOMAIN,
        data("file", "where to dump the core").values(Values::Files),
        flag("live", "the guest runs meanwhile"),
        flag("crash", "the domain is ended as crashed afterwards"),
        BYPASS_CACHE,
        flag("reset", "the domain is reset afterwards"),
        VERBOSE,
        flag("memory-only", "memory and registers, no device states"),
        text("format", "how the core is written, with --memory-only")
            .values(Values::Words(FORMATS)),
    ],
    handler: dump,
    connects: true,
};

/// virDomainCoreDumpFormat, in its order.
const FORMATS: &[&str] = &["elf", "kdump-zlib", "kdump-lzo", "kdump-snappy", "win-dmp"];

/// A path as the daemon, which is elsewhere, understands it.
fn absolute(path: &str) -> Result<String> {
    let absolute = std::path::absolute(Path::new(path))
        .map_err(|error| Failure::new(format!("{path}: {error}")))?;
    Ok(absolute.display().to_string())
}

/// The bits (virDomainSaveRestoreFlags) of those of `options` that were given.
fn save_flags(args: &Args, options: &[&str]) -> u32 {
    const BITS: [(&str, u32); 4] = [
        ("bypass-cache", 1 << 0),
        ("running", 1 << 1),
        ("paused", 1 << 2),
        ("reset-nvram", 1 << 3),
    ];
    let bits: Vec<_> = BITS
        .into_iter()
        .filter(|(name, _)| options.contains(name))
        .collect();
    flags(args, &bits)
}

/// What a save may be told.
const SAVE_OPTIONS: [&str; 3] = ["bypass-cache", "running", "paused"];
/// What whoever changes an image may.
const STATE_OPTIONS: [&str; 2] = ["running", "paused"];

fn xml_file(args: &Args) -> Result<Option<String>> {
    args.text("xml")?.map(read_definition).transpose()
}

/// What libvirt's library says before it asks the daemon.
fn not_both(args: &Args) -> Result {
    if args.has("running") && args.has("paused") {
        return Err(Failure::new(
            "Flags 'VIR_DOMAIN_SAVE_RUNNING' and 'VIR_DOMAIN_SAVE_PAUSED' are mutually exclusive",
        ));
    }
    Ok(())
}

fn save(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let file = args.required("file")?.to_owned();
    not_both(args).with_context(|| format!("Failed to save domain '{}' to {file}", dom.name))?;
    let flags = save_flags(args, &SAVE_OPTIONS);
    let dxml = xml_file(args)?;
    let to = absolute(&file)?;
    let watched = args.has("verbose").then_some(("Save", &dom));
    let saved = if flags == 0 && dxml.is_none() {
        // The older call, which every daemon has.
        let args = DomainSaveArgs {
            dom: dom.clone(),
            to,
        };
        job::call(shell, watched, procs::DOMAIN_SAVE, args)
    } else {
        let args = DomainSaveFlagsArgs {
            dom: dom.clone(),
            to,
            dxml,
            flags,
        };
        job::call(shell, watched, procs::DOMAIN_SAVE_FLAGS, args)
    };
    saved.with_context(|| format!("Failed to save domain '{}' to {file}", dom.name))?;
    let text = format!("\nDomain '{}' saved to {file}\n", dom.name);
    shell.out.print_extra(text);
    Ok(())
}

fn restore(shell: &mut Shell, args: &Args) -> Result {
    let file = args.required("file")?.to_owned();
    not_both(args).with_context(|| format!("Failed to restore domain from {file}"))?;
    let flags = save_flags(args, &["bypass-cache", "running", "paused", "reset-nvram"]);
    let dxml = xml_file(args)?;
    let from = absolute(&file)?;
    let restored = if flags == 0 && dxml.is_none() {
        shell.call(procs::DOMAIN_RESTORE, &DomainRestoreArgs { from })
    } else {
        let args = DomainRestoreFlagsArgs { from, dxml, flags };
        shell.call(procs::DOMAIN_RESTORE_FLAGS, &args)
    };
    restored.with_context(|| format!("Failed to restore domain from {file}"))?;
    shell
        .out
        .print_extra(format!("Domain restored from {file}\n"));
    Ok(())
}

fn managedsave(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    not_both(args).with_context(|| format!("Failed to save domain '{}' state", dom.name))?;
    let call = DomainManagedSaveArgs {
        dom: dom.clone(),
        flags: save_flags(args, &SAVE_OPTIONS),
    };
    let watched = args.has("verbose").then_some(("Managedsave", &dom));
    job::call(shell, watched, procs::DOMAIN_MANAGED_SAVE, call)
        .with_context(|| format!("Failed to save domain '{}' state", dom.name))?;
    let text = format!("\nDomain '{}' state saved by libvirt\n", dom.name);
    shell.out.print_extra(text);
    Ok(())
}

fn managedsave_remove(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let has = DomainHasManagedSaveImageArgs {
        dom: dom.clone(),
        flags: 0,
    };
    let has = shell
        .call(procs::DOMAIN_HAS_MANAGED_SAVE_IMAGE, &has)
        .context("Failed to check for domain managed save image")?;
    if has.result == 0 {
        shell.out.print_extra(format!(
            "Domain '{}' has no manage save image; removal skipped",
            dom.name
        ));
        return Ok(());
    }
    let remove = DomainManagedSaveRemoveArgs {
        dom: dom.clone(),
        flags: 0,
    };
    shell
        .call(procs::DOMAIN_MANAGED_SAVE_REMOVE, &remove)
        .with_context(|| {
            let name = &dom.name;
            format!("Failed to remove managed save image for domain '{name}'")
        })?;
    shell.out.print_extra(format!(
        "Removed managedsave image for domain '{}'\n",
        dom.name
    ));
    Ok(())
}

fn dump(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let file = args.required("file")?.to_owned();
    let flags = flags(
        args,
        &[
            ("crash", 1 << 0),
            ("live", 1 << 1),
            ("bypass-cache", 1 << 2),
            ("reset", 1 << 3),
            ("memory-only", 1 << 4),
        ],
    );
    let format = match args.text("format")? {
        None => None,
        Some(_) if !args.has("memory-only") => {
            return Err(Failure::new("--format only works with --memory-only"));
        }
        Some(name) => {
            let known = FORMATS.iter().position(|format| *format == name);
            let unknown = || {
                Failure::new(format!(
                    "format '{name}' is not supported, expecting 'kdump-zlib', 'kdump-lzo', \
                     'kdump-snappy', 'win-dmp' or 'elf'"
                ))
            };
            Some(known.ok_or_else(unknown)? as u32).filter(|number| *number != 0)
        }
    };
    for (one, other) in [("crash", "live"), ("crash", "reset"), ("live", "reset")] {
        if args.has(one) && args.has(other) {
            // As libvirt's library says it before it asks the daemon.
            let (one, other) = (one.to_uppercase(), other.to_uppercase());
            let text =
                format!("Flags 'VIR_DUMP_{one}' and 'VIR_DUMP_{other}' are mutually exclusive");
            let what = format!("Failed to core dump domain '{}' to {file}", dom.name);
            return Err(Failure::new(text).context(what));
        }
    }
    let to = absolute(&file)?;
    let watched = args.has("verbose").then_some(("Dump", &dom));
    let dumped = match format {
        None => {
            let args = DomainCoreDumpArgs {
                dom: dom.clone(),
                to,
                flags,
            };
            job::call(shell, watched, procs::DOMAIN_CORE_DUMP, args)
        }
        Some(dumpformat) => {
            let args = DomainCoreDumpWithFormatArgs {
                dom: dom.clone(),
                to,
                dumpformat,
                flags,
            };
            job::call(shell, watched, procs::DOMAIN_CORE_DUMP_WITH_FORMAT, args)
        }
    };
    dumped.with_context(|| format!("Failed to core dump domain '{}' to {file}", dom.name))?;
    let text = format!("\nDomain '{}' dumped to {file}\n", dom.name);
    shell.out.print_extra(text);
    Ok(())
}
