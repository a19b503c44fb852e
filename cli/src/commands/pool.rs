//! Storage pools: starting, stopping, building, looking.

use rpc::args::*;
use rpc::procs;
use rpc::types::StoragePool;

use super::definition::{FILE, print_selected};
use super::domain::flags;
use super::{format_uuid, parse_uuid, read_definition};
use crate::command::{Args, Command, Opt, Values, data, flag, text};
use crate::editor;
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

pub(super) const POOL: Opt = data("pool", "pool name or uuid").values(Values::Pools);
pub(super) const BUILD: Opt = flag("build", "build the pool before it is started");
pub(super) const OVERWRITE: Opt = flag("overwrite", "whatever is there");
pub(super) const NO_OVERWRITE: Opt = flag("no-overwrite", "only where nothing is");

const fn command(
    name: &'static str,
    summary: &'static str,
    description: &'static str,
    options: &'static [Opt],
    handler: crate::command::Handler,
) -> Command {
    Command {
        name,
        summary,
        description,
        options,
        handler,
        connects: true,
    }
}

/// `pool-autostart`
pub const POOL_AUTOSTART: Command = command(
    "pool-autostart",
    "autostart a pool",
    "Says whether a pool is started with the host.",
    &[POOL, flag("disable", "it is not")],
    autostart,
);
/// `pool-build`
pub const POOL_BUILD: Command = command(
    "pool-build",
    "build a pool",
    "Makes a pool's folder, and a file system on its device if that is asked for.",
    &[POOL, NO_OVERWRITE, OVERWRITE],
    build,
);
/// `pool-delete`
pub const POOL_DELETE: Command = command(
    "pool-delete",
    "delete a pool",
    "Removes a pool's folder, which must be empty.",
    &[POOL],
    delete,
);
/// `pool-destroy`
pub const POOL_DESTROY: Command = command(
    "pool-destroy",
    "destroy (stop) a pool",
    "Stops a pool. What is in it stays.",
    &[POOL],
    destroy,
);
/// `pool-dumpxml`
pub const POOL_DUMPXML: Command = command(
    "pool-dumpxml",
    "pool information in XML",
    "Prints a pool's definition.",
    &[
        POOL,
        flag("inactive", "as it will be at the next start"),
        text("xpath", "print only what this XPath expression selects").named_only(),
        flag("wrap", "put what was selected into one root element"),
    ],
    dumpxml,
);
/// `pool-edit`
pub const POOL_EDIT: Command = command(
    "pool-edit",
    "edit XML configuration for a storage pool",
    "Opens a pool's definition in an editor ($VISUAL, $EDITOR), and keeps what was changed.",
    &[POOL],
    edit,
);
/// `pool-info`
pub const POOL_INFO: Command = command(
    "pool-info",
    "storage pool information",
    "Shows a pool's state and sizes.",
    &[POOL, flag("bytes", "sizes in bytes")],
    info,
);
/// `pool-name`
pub const POOL_NAME: Command = command(
    "pool-name",
    "convert a pool UUID to pool name",
    "",
    &[POOL],
    name,
);
/// `pool-refresh`
pub const POOL_REFRESH: Command = command(
    "pool-refresh",
    "refresh a pool",
    "Looks at a pool's volumes anew.",
    &[POOL],
    refresh,
);
/// `pool-start`
pub const POOL_START: Command = command(
    "pool-start",
    "start a (previously defined) inactive pool",
    "Starts a pool.",
    &[POOL, BUILD, NO_OVERWRITE, OVERWRITE],
    start,
);
/// `pool-undefine`
pub const POOL_UNDEFINE: Command = command(
    "pool-undefine",
    "undefine an inactive pool",
    "Removes the definition of a pool that is not active. What is in it stays.",
    &[POOL],
    undefine,
);
/// `pool-uuid`
pub const POOL_UUID: Command = command(
    "pool-uuid",
    "convert a pool name to pool UUID",
    "",
    &[POOL],
    uuid,
);
/// `pool-capabilities`
pub const POOL_CAPABILITIES: Command = command(
    "pool-capabilities",
    "storage pool capabilities",
    "Shows which types of pools there are, and their formats.",
    &[],
    capabilities,
);
/// `pool-define`
pub const POOL_DEFINE: Command = command(
    "pool-define",
    "define an inactive persistent storage pool or modify an existing persistent one from an XML file",
    "Keeps a definition, or changes it.",
    &[
        FILE,
        flag("validate", "refuse what libvirt's schema doesn't allow"),
    ],
    define,
);
/// `pool-create`
pub const POOL_CREATE: Command = command(
    "pool-create",
    "create a pool from an XML file",
    "Starts a pool that has no definition which stays.",
    &[FILE, BUILD, NO_OVERWRITE, OVERWRITE],
    create,
);
/// `find-storage-pool-sources`
pub const FIND_SOURCES: Command = command(
    "find-storage-pool-sources",
    "discover potential storage pool sources",
    "Shows what a server offers for pools of a type.",
    &[
        data("type", "type of pool"),
        text("srcSpec", "file that says where to look").values(Values::Files),
    ],
    find_sources,
);
/// `find-storage-pool-sources-as`
pub const FIND_SOURCES_AS: Command = command(
    "find-storage-pool-sources-as",
    "find potential storage pool sources",
    "Shows what a server offers for pools of a type.",
    &[
        data("type", "type of pool"),
        text("host", "the server"),
        text("port", "its port"),
        text("initiator", "initiator's IQN"),
    ],
    find_sources_as,
);

/// Finds the pool that the option `pool` names, by UUID or name.
///
/// # Errors
///
/// There is none, or the daemon cannot be asked.
pub fn find(shell: &mut Shell, args: &Args) -> Result<StoragePool> {
    lookup(shell, args.required("pool")?)
}

/// Finds a pool by what a user calls it.
///
/// # Errors
///
/// There is none, or the daemon cannot be asked.
pub fn lookup(shell: &mut Shell, word: &str) -> Result<StoragePool> {
    if let Some(uuid) = parse_uuid(word).filter(|_| word.len() == 36) {
        let args = StoragePoolLookupByUuidArgs { uuid };
        match shell.call(procs::STORAGE_POOL_LOOKUP_BY_UUID, &args) {
            Ok(ret) => return Ok(ret.pool),
            Err(failure) if failure.disconnected => return Err(failure),
            Err(_) => {}
        }
    }
    by_name(shell, word)
}

fn by_name(shell: &mut Shell, word: &str) -> Result<StoragePool> {
    let args = StoragePoolLookupByNameArgs {
        name: word.to_owned(),
    };
    let found = shell
        .call(procs::STORAGE_POOL_LOOKUP_BY_NAME, &args)
        .with_context(|| format!("failed to get pool '{word}'"))?;
    Ok(found.pool)
}

fn autostart(shell: &mut Shell, args: &Args) -> Result {
    let pool = find(shell, args)?;
    let word = args.required("pool")?;
    let on = !args.has("disable");
    let mark = if on { "mark" } else { "unmark" };
    let asked = StoragePoolSetAutostartArgs {
        pool,
        autostart: i32::from(on),
    };
    shell
        .call(procs::STORAGE_POOL_SET_AUTOSTART, &asked)
        .with_context(|| format!("failed to {mark} pool {word} as autostarted"))?;
    shell
        .out
        .print_extra(format!("Pool {word} {mark}ed as autostarted\n"));
    Ok(())
}

/// `VIR_STORAGE_POOL_BUILD_*`
const BUILD_NO_OVERWRITE: u32 = 1 << 2;
const BUILD_OVERWRITE: u32 = 1 << 3;

/// The flags `VIR_STORAGE_POOL_CREATE_*` of what was given.
pub(super) fn start_flags(args: &Args) -> Result<u32> {
    args.exclusive("overwrite", "no-overwrite")?;
    Ok(flags(
        args,
        &[
            ("build", 1 << 0),
            ("overwrite", 1 << 1),
            ("no-overwrite", 1 << 2),
        ],
    ))
}

fn build(shell: &mut Shell, args: &Args) -> Result {
    let pool = find(shell, args)?;
    let word = args.required("pool")?;
    let flags = flags(
        args,
        &[
            ("no-overwrite", BUILD_NO_OVERWRITE),
            ("overwrite", BUILD_OVERWRITE),
        ],
    );
    shell
        .call(
            procs::STORAGE_POOL_BUILD,
            &StoragePoolBuildArgs { pool, flags },
        )
        .with_context(|| format!("Failed to build pool {word}"))?;
    shell.out.print_extra(format!("Pool {word} built\n"));
    Ok(())
}

fn start(shell: &mut Shell, args: &Args) -> Result {
    let flags = start_flags(args)?;
    let pool = find(shell, args)?;
    let word = args.required("pool")?;
    shell
        .call(
            procs::STORAGE_POOL_CREATE,
            &StoragePoolCreateArgs { pool, flags },
        )
        .with_context(|| format!("Failed to start pool {word}"))?;
    shell.out.print_extra(format!("Pool {word} started\n"));
    Ok(())
}

fn delete(shell: &mut Shell, args: &Args) -> Result {
    let pool = find(shell, args)?;
    let word = args.required("pool")?;
    shell
        .call(
            procs::STORAGE_POOL_DELETE,
            &StoragePoolDeleteArgs { pool, flags: 0 },
        )
        .with_context(|| format!("Failed to delete pool {word}"))?;
    shell.out.print_extra(format!("Pool {word} deleted\n"));
    Ok(())
}

fn destroy(shell: &mut Shell, args: &Args) -> Result {
    let pool = find(shell, args)?;
    let word = args.required("pool")?;
    shell
        .call(
            procs::STORAGE_POOL_DESTROY,
            &StoragePoolDestroyArgs { pool },
        )
        .with_context(|| format!("Failed to destroy pool {word}"))?;
    shell.out.print_extra(format!("Pool {word} destroyed\n"));
    Ok(())
}

fn refresh(shell: &mut Shell, args: &Args) -> Result {
    let pool = find(shell, args)?;
    let word = args.required("pool")?;
    shell
        .call(
            procs::STORAGE_POOL_REFRESH,
            &StoragePoolRefreshArgs { pool, flags: 0 },
        )
        .with_context(|| format!("Failed to refresh pool {word}"))?;
    shell.out.print_extra(format!("Pool {word} refreshed\n"));
    Ok(())
}

fn undefine(shell: &mut Shell, args: &Args) -> Result {
    let pool = find(shell, args)?;
    let word = args.required("pool")?;
    shell
        .call(
            procs::STORAGE_POOL_UNDEFINE,
            &StoragePoolUndefineArgs { pool },
        )
        .with_context(|| format!("Failed to undefine pool {word}"))?;
    shell
        .out
        .print_extra(format!("Pool {word} has been undefined\n"));
    Ok(())
}

fn name(shell: &mut Shell, args: &Args) -> Result {
    let word = args.required("pool")?;
    let Some(uuid) = parse_uuid(word).filter(|_| word.len() == 36) else {
        return Err(Failure::new(format!("failed to get pool '{word}'")));
    };
    let pool = shell
        .call(
            procs::STORAGE_POOL_LOOKUP_BY_UUID,
            &StoragePoolLookupByUuidArgs { uuid },
        )
        .with_context(|| format!("failed to get pool '{word}'"))?
        .pool;
    shell.out.print(format!("{}\n", pool.name));
    Ok(())
}

fn uuid(shell: &mut Shell, args: &Args) -> Result {
    let pool = by_name(shell, args.required("pool")?)?;
    shell.out.print(format!("{}\n", format_uuid(&pool.uuid)));
    Ok(())
}

fn xml(shell: &mut Shell, pool: &StoragePool, flags: u32) -> Result<String> {
    let args = StoragePoolGetXmlDescArgs {
        pool: pool.clone(),
        flags,
    };
    Ok(shell.call(procs::STORAGE_POOL_GET_XML_DESC, &args)?.xml)
}

/// `VIR_STORAGE_XML_INACTIVE`
const XML_INACTIVE: u32 = 1;

fn dumpxml(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(args, &[("inactive", XML_INACTIVE)]);
    let pool = find(shell, args)?;
    let xml = xml(shell, &pool, flags)?;
    print_selected(shell, args, &xml)
}

fn define_xml(shell: &mut Shell, xml: String, flags: u32) -> Result<StoragePool> {
    let args = StoragePoolDefineXmlArgs { xml, flags };
    Ok(shell.call(procs::STORAGE_POOL_DEFINE_XML, &args)?.pool)
}

fn edit(shell: &mut Shell, args: &Args) -> Result {
    let pool = find(shell, args)?;
    editor::edit_document(
        shell,
        &format!("Pool {}", pool.name),
        None,
        |shell| xml(shell, &pool, XML_INACTIVE),
        |shell, text, _| define_xml(shell, text, 0).map(drop),
    )
}

fn define(shell: &mut Shell, args: &Args) -> Result {
    let path = args.required("file")?;
    let xml = read_definition(path)?;
    let pool = define_xml(shell, xml, u32::from(args.has("validate")))
        .with_context(|| format!("Failed to define pool from {path}"))?;
    shell
        .out
        .print_extra(format!("Pool {} defined from {path}\n", pool.name));
    Ok(())
}

fn create(shell: &mut Shell, args: &Args) -> Result {
    let flags = start_flags(args)?;
    let path = args.required("file")?;
    let xml = read_definition(path)?;
    let pool = shell
        .call(
            procs::STORAGE_POOL_CREATE_XML,
            &StoragePoolCreateXmlArgs { xml, flags },
        )
        .with_context(|| format!("Failed to create pool from {path}"))?
        .pool;
    shell
        .out
        .print_extra(format!("Pool {} created from {path}\n", pool.name));
    Ok(())
}

fn info(shell: &mut Shell, args: &Args) -> Result {
    let pool = find(shell, args)?;
    let mut line = |name: &str, value: &str| shell.out.print(format!("{name:<15} {value}\n"));
    line("Name:", &pool.name);
    line("UUID:", &format_uuid(&pool.uuid));
    let info = shell.call(
        procs::STORAGE_POOL_GET_INFO,
        &StoragePoolGetInfoArgs { pool: pool.clone() },
    )?;
    let persistent = StoragePoolIsPersistentArgs { pool: pool.clone() };
    let persistent = match shell.call(procs::STORAGE_POOL_IS_PERSISTENT, &persistent) {
        Ok(ret) if ret.persistent != 0 => "yes",
        Ok(_) => "no",
        Err(_) => "unknown",
    };
    let autostart = match shell.call(
        procs::STORAGE_POOL_GET_AUTOSTART,
        &StoragePoolGetAutostartArgs { pool },
    ) {
        Ok(ret) if ret.autostart != 0 => "yes",
        Ok(_) => "no",
        Err(_) => "no autostart",
    };
    let bytes = args.has("bytes");
    let mut line = |name: &str, value: &str| shell.out.print(format!("{name:<15} {value}\n"));
    line("State:", state(info.state));
    line("Persistent:", persistent);
    line("Autostart:", autostart);
    // Running, or degraded.
    if matches!(info.state, 2 | 3) {
        for (name, value) in [
            ("Capacity:", info.capacity),
            ("Allocation:", info.allocation),
            ("Available:", info.available),
        ] {
            let value = if bytes {
                value.to_string()
            } else {
                pretty(value)
            };
            line(name, &value);
        }
    }
    Ok(())
}

/// virStoragePoolState in words.
pub(super) fn state(state: u32) -> &'static str {
    match state {
        0 => "inactive",
        1 => "building",
        2 => "running",
        3 => "degraded",
        4 => "inaccessible",
        _ => "unknown",
    }
}

/// A size with two decimals and the largest unit that fits.
pub(super) fn pretty(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut scaled = bytes;
    while scaled >= 1024 {
        scaled /= 1024;
        unit += 1;
    }
    // Two decimals are all that is shown: no precision is missed.
    #[allow(clippy::cast_precision_loss, reason = "shown with two decimals")]
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    format!("{value:.2} {}", UNITS[unit])
}

fn capabilities(shell: &mut Shell, _args: &Args) -> Result {
    let xml = shell
        .call(
            procs::CONNECT_GET_STORAGE_POOL_CAPABILITIES,
            &ConnectGetStoragePoolCapabilitiesArgs { flags: 0 },
        )
        .context("failed to get storage pool capabilities")?
        .capabilities;
    shell.out.print(format!("{xml}\n"));
    Ok(())
}

fn sources(shell: &mut Shell, kind: &str, src_spec: Option<String>) -> Result {
    let asked = ConnectFindStoragePoolSourcesArgs {
        kind: kind.to_owned(),
        src_spec,
        flags: 0,
    };
    let xml = shell
        .call(procs::CONNECT_FIND_STORAGE_POOL_SOURCES, &asked)
        .with_context(|| format!("Failed to find any {kind} pool sources"))?
        .xml;
    shell.out.print(xml);
    Ok(())
}

fn find_sources(shell: &mut Shell, args: &Args) -> Result {
    let kind = args.required("type")?;
    let spec = args.text("srcSpec")?.map(read_definition).transpose()?;
    sources(shell, kind, spec)
}

fn find_sources_as(shell: &mut Shell, args: &Args) -> Result {
    use xml_schemas::dom::{Element, format_element};
    let kind = args.required("type")?;
    let host = args.text("host")?;
    if host.is_none() {
        for other in ["port", "initiator"] {
            if args.has(other) {
                return Err(Failure::new(format!(
                    "missing argument: {other} needs a host"
                )));
            }
        }
    }
    let spec = match host {
        None => None,
        Some(host) => {
            let mut source = Element::new("source");
            let mut element = Element::new("host").with_attr("name", host);
            element.set_opt_attr("port", args.text("port")?);
            source.push(element);
            if let Some(initiator) = args.text("initiator")? {
                source.push(
                    Element::new("initiator")
                        .with_child(Element::new("iqn").with_attr("name", initiator)),
                );
            }
            let mut out = String::new();
            format_element(&mut out, &source, 0);
            Some(out)
        }
    };
    sources(shell, kind, spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_as_virsh_shows_them() {
        for (bytes, shown) in [
            (0, "0.00 B"),
            (1023, "1023.00 B"),
            (200_704, "196.00 KiB"),
            (10_752_000, "10.25 MiB"),
            (u64::MAX, "16.00 EiB"),
        ] {
            assert_eq!(pretty(bytes), shown);
        }
    }
}
