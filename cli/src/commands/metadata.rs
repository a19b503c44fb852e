//! A domain's description, title and custom metadata: `desc`, `metadata`.

use rpc::args::{DomainGetMetadataArgs, DomainSetMetadataArgs};
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::types::Domain;

use super::{AFFECT_CONFIG, ANY, affected, find_domain};
use crate::command::{Args, Command, DOMAIN, data, flag, rest, text};
use crate::editor::Draft;
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

/// `desc`
pub const DESC: Command = Command {
    name: "desc",
    summary: "show or set domain's description or title",
    description: "Shows what people wrote about a domain, or writes it.",
    options: &[
        DOMAIN,
        flag("live", "that of the running domain"),
        flag("config", "that of the definition"),
        flag("current", "that of the domain as it is now"),
        flag("title", "the title instead of the description"),
        flag("edit", "write it in an editor"),
        rest("new-desc", "the new text").allow_empty(),
    ],
    handler: desc,
    connects: true,
};

/// `metadata`
pub const METADATA: Command = Command {
    name: "metadata",
    summary: "show or set domain's custom XML metadata",
    description: "Shows the XML that some program keeps with a domain, or changes it.",
    options: &[
        DOMAIN,
        data("uri", "the namespace that names the program"),
        flag("live", "that of the running domain"),
        flag("config", "that of the definition"),
        flag("current", "that of the domain as it is now"),
        flag("edit", "change it in an editor"),
        text("key", "the prefix for the namespace"),
        text("set", "the new XML"),
        flag("remove", "remove it"),
    ],
    handler: metadata,
    connects: true,
};

/// `VIR_DOMAIN_METADATA_*`
const DESCRIPTION: i32 = 0;
/// See [`DESCRIPTION`].
pub const TITLE: i32 = 1;
const ELEMENT: i32 = 2;

fn get(
    shell: &mut Shell,
    dom: &Domain,
    kind: i32,
    uri: Option<&str>,
    flags: u32,
) -> Result<String> {
    let args = DomainGetMetadataArgs {
        dom: dom.clone(),
        kind,
        uri: uri.map(str::to_owned),
        flags,
    };
    Ok(shell.call(procs::DOMAIN_GET_METADATA, &args)?.metadata)
}

fn desc(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    // Only one text can be shown.
    let shown = flags & AFFECT_CONFIG;
    let dom = find_domain(shell, args, ANY)?;
    let title = args.has("title");
    let (kind, what) = if title {
        (TITLE, "title")
    } else {
        (DESCRIPTION, "description")
    };
    let given = args.rest("new-desc").join(" ");
    if !args.has("new-desc") && !args.has("edit") {
        let text = match get(shell, &dom, kind, None, shown) {
            Ok(text) => text,
            Err(failure) if failure.code == Some(ErrorCode::NO_DOMAIN_METADATA) => String::new(),
            Err(failure) => return Err(failure),
        };
        shell.out.print(if text.is_empty() {
            format!("No {what} for domain: {}", dom.name)
        } else {
            text
        });
        return Ok(());
    }
    let text = if args.has("edit") {
        let before = if args.has("new-desc") {
            given
        } else {
            get(shell, &dom, kind, None, shown).or_else(|failure| match failure.code {
                Some(ErrorCode::NO_DOMAIN_METADATA) => Ok(String::new()),
                _ => Err(failure),
            })?
        };
        let mut draft = Draft::new(&before)?;
        draft.edit()?;
        let after = draft.read()?;
        // Editors end the last line.
        let after = after.strip_suffix('\n').unwrap_or(&after).to_owned();
        if after == before {
            shell.out.print(format!("Domain {what} not changed\n"));
            return Ok(());
        }
        after
    } else {
        given
    };
    let set = DomainSetMetadataArgs {
        dom,
        kind,
        metadata: Some(text),
        key: None,
        uri: None,
        flags,
    };
    shell
        .call(procs::DOMAIN_SET_METADATA, &set)
        .with_context(|| format!("Failed to set new domain {what}"))?;
    let what = if title { "title" } else { "description" };
    shell
        .out
        .print_extra(format!("Domain {what} updated successfully"));
    Ok(())
}

fn metadata(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    args.exclusive("edit", "set")?;
    args.exclusive("remove", "set")?;
    args.exclusive("remove", "edit")?;
    let dom = find_domain(shell, args, ANY)?;
    let uri = args.required("uri")?;
    let key = args.text("key")?.map(str::to_owned);
    if key.is_none() && (args.has("set") || args.has("edit")) {
        // The daemon makes up no prefix.
        return Err(Failure::new(
            "namespace key is required when modifying metadata",
        ));
    }
    let change = |shell: &mut Shell, metadata: Option<String>| {
        let uri = Some(uri.to_owned());
        let set = DomainSetMetadataArgs {
            dom: dom.clone(),
            kind: ELEMENT,
            metadata,
            key: key.clone(),
            uri,
            flags,
        };
        shell.call(procs::DOMAIN_SET_METADATA, &set)
    };
    if args.has("remove") {
        change(shell, None)?;
        shell.out.print_extra("Metadata removed\n");
    } else if let Some(xml) = args.text("set")? {
        change(shell, Some(xml.to_owned()))?;
        shell.out.print_extra("Metadata modified\n");
    } else if args.has("edit") {
        let before = match get(shell, &dom, ELEMENT, Some(uri), flags) {
            Ok(xml) => xml,
            Err(failure) if failure.code == Some(ErrorCode::NO_DOMAIN_METADATA) => "\n".into(),
            Err(failure) => return Err(failure),
        };
        let mut draft = Draft::new(&before)?;
        draft.edit()?;
        let after = draft.read()?;
        if after == before {
            shell.out.print_extra("Metadata not changed");
            return Ok(());
        }
        change(shell, Some(after))?;
        shell.out.print_extra("Metadata modified\n");
    } else {
        let xml = get(shell, &dom, ELEMENT, Some(uri), flags)?;
        shell.out.print(xml + "\n");
    }
    Ok(())
}
