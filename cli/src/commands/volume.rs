//! Storage volumes: finding, looking, changing, removing.

use rpc::args::*;
use rpc::procs;
use rpc::types::{StoragePool, StorageVol};

use super::definition::print_selected;
use super::domain::flags;
use super::format_uuid;
use super::pool::{self, POOL, pretty};
use crate::command::{Args, Command, Handler, Opt, Values, data, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::size;
use crate::table::Table;

pub(super) const VOL: Opt = data("vol", "volume name, key or path").values(Values::Volumes);
pub(super) const IN_POOL: Opt = text("pool", "pool name or uuid").values(Values::Pools);

const fn command(
    name: &'static str,
    summary: &'static str,
    description: &'static str,
    options: &'static [Opt],
    handler: Handler,
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

/// `vol-delete`
pub const VOL_DELETE: Command = command(
    "vol-delete",
    "delete a vol",
    "Removes a volume.",
    &[
        VOL,
        IN_POOL,
        flag(
            "delete-snapshots",
            "with its snapshots, where the pool has such",
        ),
    ],
    delete,
);
/// `vol-dumpxml`
pub const VOL_DUMPXML: Command = command(
    "vol-dumpxml",
    "vol information in XML",
    "Prints what is known of a volume.",
    &[
        VOL,
        IN_POOL,
        text("xpath", "print only what this XPath expression selects").named_only(),
        flag("wrap", "put what was selected into one root element"),
    ],
    dumpxml,
);
/// `vol-info`
pub const VOL_INFO: Command = command(
    "vol-info",
    "storage vol information",
    "Shows a volume's type and sizes.",
    &[
        VOL,
        IN_POOL,
        flag("bytes", "sizes in bytes"),
        flag("physical", "the file's size instead of what is allocated"),
    ],
    info,
);
/// `vol-key`
pub const VOL_KEY: Command = command(
    "vol-key",
    "returns the volume key for a given volume name or path",
    "",
    &[VOL, IN_POOL],
    key,
);
/// `vol-list`
pub const VOL_LIST: Command = command(
    "vol-list",
    "list vols",
    "Shows the volumes of a pool.",
    &[POOL, flag("details", "with their sizes")],
    list,
);
/// `vol-name`
pub const VOL_NAME: Command = command(
    "vol-name",
    "returns the volume name for a given volume key or path",
    "",
    &[VOL],
    name,
);
/// `vol-path`
pub const VOL_PATH: Command = command(
    "vol-path",
    "returns the volume path for a given volume name or key",
    "",
    &[VOL, IN_POOL],
    path,
);
/// `vol-pool`
pub const VOL_POOL: Command = command(
    "vol-pool",
    "returns the storage pool for a given volume key or path",
    "",
    &[VOL, flag("uuid", "its UUID rather than its name")],
    pool_of,
);
/// `vol-resize`
pub const VOL_RESIZE: Command = command(
    "vol-resize",
    "resize a vol",
    "Changes a volume's capacity. Only safe while no guest uses it: see blockresize.",
    &[
        VOL,
        data(
            "capacity",
            "the new capacity, with a unit (bytes without one)",
        ),
        IN_POOL,
        flag("allocate", "set the space aside"),
        flag("delta", "the capacity is what is added"),
        flag("shrink", "make it smaller"),
    ],
    resize,
);
/// `vol-wipe`
pub const VOL_WIPE: Command = command(
    "vol-wipe",
    "wipe a vol",
    "Overwrites a volume, so that what was on it cannot be read any more.",
    &[
        VOL,
        IN_POOL,
        text("algorithm", "how").values(Values::Words(ALGORITHMS)),
    ],
    wipe,
);

/// virStorageVolWipeAlgorithm
const ALGORITHMS: &[&str] = &[
    "zero",
    "nnsa",
    "dod",
    "bsi",
    "gutmann",
    "schneier",
    "pfitzner7",
    "pfitzner33",
    "random",
    "trim",
];

/// What a volume may be named by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    /// Name (in the pool given), key or path.
    Any,
    /// Key or path.
    KeyOrPath,
}

/// Finds the volume that an option names.
///
/// # Errors
///
/// There is none, or the daemon cannot be asked.
pub(super) fn find(shell: &mut Shell, args: &Args, by: By) -> Result<StorageVol> {
    let pool = match by {
        By::Any => args.text("pool")?.map(str::to_owned),
        By::KeyOrPath => None,
    };
    lookup(shell, args.required("vol")?, pool.as_deref(), by, "pool")
}

/// Finds a volume by what a user calls it; `option` is what names its pool.
///
/// # Errors
///
/// There is none, or the daemon cannot be asked.
pub(super) fn lookup(
    shell: &mut Shell,
    word: &str,
    pool: Option<&str>,
    by: By,
    option: &str,
) -> Result<StorageVol> {
    let pool = match pool {
        Some(name) => Some(active_pool(shell, name)?),
        None => None,
    };
    if let Some(pool) = &pool {
        let asked = StorageVolLookupByNameArgs {
            pool: pool.clone(),
            name: word.to_owned(),
        };
        match shell.call(procs::STORAGE_VOL_LOOKUP_BY_NAME, &asked) {
            Ok(ret) => return Ok(ret.vol),
            Err(failure) if failure.disconnected => return Err(failure),
            Err(_) => {}
        }
    }
    let vol = by_key_or_path(shell, word).with_context(|| {
        if by == By::Any && pool.is_none() {
            format!("failed to get vol '{word}', specifying --{option} might help")
        } else {
            format!("failed to get vol '{word}'")
        }
    })?;
    match pool {
        Some(pool) if pool.name != vol.pool => Err(Failure::new(format!(
            "Requested volume '{word}' is not in pool '{}'",
            pool.name
        ))),
        _ => Ok(vol),
    }
}

/// Finds a volume by its key or path.
///
/// # Errors
///
/// There is none, or the daemon cannot be asked.
pub(super) fn by_key_or_path(shell: &mut Shell, word: &str) -> Result<StorageVol> {
    let asked = StorageVolLookupByKeyArgs {
        key: word.to_owned(),
    };
    match shell.call(procs::STORAGE_VOL_LOOKUP_BY_KEY, &asked) {
        Ok(ret) => return Ok(ret.vol),
        Err(failure) if failure.disconnected => return Err(failure),
        Err(_) => {}
    }
    let asked = StorageVolLookupByPathArgs {
        path: word.to_owned(),
    };
    Ok(shell.call(procs::STORAGE_VOL_LOOKUP_BY_PATH, &asked)?.vol)
}

fn active_pool(shell: &mut Shell, name: &str) -> Result<StoragePool> {
    let pool = pool::lookup(shell, name)?;
    let asked = StoragePoolIsActiveArgs { pool: pool.clone() };
    if shell.call(procs::STORAGE_POOL_IS_ACTIVE, &asked)?.active == 0 {
        return Err(Failure::new(format!("pool '{name}' is not active")));
    }
    Ok(pool)
}

/// Removes a volume (`VIR_STORAGE_VOL_DELETE_*`).
///
/// # Errors
///
/// The daemon's.
pub(super) fn remove(shell: &mut Shell, vol: StorageVol, flags: u32) -> Result {
    let asked = StorageVolDeleteArgs { vol, flags };
    shell.call(procs::STORAGE_VOL_DELETE, &asked)
}

fn delete(shell: &mut Shell, args: &Args) -> Result {
    let vol = find(shell, args, By::Any)?;
    let word = args.required("vol")?;
    let flags = flags(args, &[("delete-snapshots", 1 << 1)]);
    remove(shell, vol, flags).with_context(|| format!("Failed to delete vol {word}"))?;
    shell.out.print_extra(format!("Vol {word} deleted\n"));
    Ok(())
}

/// A volume's document.
///
/// # Errors
///
/// The daemon's.
pub(super) fn xml(shell: &mut Shell, vol: &StorageVol) -> Result<String> {
    let asked = StorageVolGetXmlDescArgs {
        vol: vol.clone(),
        flags: 0,
    };
    Ok(shell.call(procs::STORAGE_VOL_GET_XML_DESC, &asked)?.xml)
}

fn dumpxml(shell: &mut Shell, args: &Args) -> Result {
    let vol = find(shell, args, By::Any)?;
    let xml = xml(shell, &vol)?;
    print_selected(shell, args, &xml)
}

fn kind(number: i32) -> &'static str {
    match number {
        0 => "file",
        1 => "block",
        2 => "dir",
        3 => "network",
        4 => "net-dir",
        5 => "ploop",
        _ => "unknown",
    }
}

fn info(shell: &mut Shell, args: &Args) -> Result {
    let vol = find(shell, args, By::Any)?;
    let (bytes, physical) = (args.has("bytes"), args.has("physical"));
    shell.out.print(format!("{:<15} {}\n", "Name:", vol.name));
    let (number, capacity, allocation) = if physical {
        let asked = StorageVolGetInfoFlagsArgs { vol, flags: 1 };
        let info = shell.call(procs::STORAGE_VOL_GET_INFO_FLAGS, &asked)?;
        (info.kind, info.capacity, info.allocation)
    } else {
        let info = shell.call(procs::STORAGE_VOL_GET_INFO, &StorageVolGetInfoArgs { vol })?;
        (info.kind, info.capacity, info.allocation)
    };
    let size = |value: u64| {
        if bytes {
            format!("{value} bytes")
        } else {
            pretty(value)
        }
    };
    let second = if physical { "Physical:" } else { "Allocation:" };
    let mut line = |name: &str, value: &str| shell.out.print(format!("{name:<15} {value}\n"));
    line("Type:", kind(number));
    line("Capacity:", &size(capacity));
    line(second, &size(allocation));
    Ok(())
}

fn key(shell: &mut Shell, args: &Args) -> Result {
    let vol = find(shell, args, By::Any)?;
    shell.out.print(format!("{}\n", vol.key));
    Ok(())
}

fn name(shell: &mut Shell, args: &Args) -> Result {
    let vol = find(shell, args, By::KeyOrPath)?;
    shell.out.print(format!("{}\n", vol.name));
    Ok(())
}

/// A volume's path.
///
/// # Errors
///
/// The daemon's.
pub(super) fn path_of(shell: &mut Shell, vol: &StorageVol) -> Result<String> {
    let asked = StorageVolGetPathArgs { vol: vol.clone() };
    Ok(shell.call(procs::STORAGE_VOL_GET_PATH, &asked)?.name)
}

fn path(shell: &mut Shell, args: &Args) -> Result {
    let vol = find(shell, args, By::Any)?;
    let path = path_of(shell, &vol)?;
    shell.out.print(format!("{path}\n"));
    Ok(())
}

fn pool_of(shell: &mut Shell, args: &Args) -> Result {
    let vol = find(shell, args, By::KeyOrPath)?;
    let asked = StoragePoolLookupByVolumeArgs { vol };
    let pool = shell
        .call(procs::STORAGE_POOL_LOOKUP_BY_VOLUME, &asked)
        .context("failed to get parent pool")?
        .pool;
    let text = if args.has("uuid") {
        format_uuid(&pool.uuid)
    } else {
        pool.name
    };
    shell.out.print(format!("{text}\n"));
    Ok(())
}

fn list(shell: &mut Shell, args: &Args) -> Result {
    let pool = pool::find(shell, args)?;
    let asked = StoragePoolListAllVolumesArgs {
        pool,
        need_results: 1,
        flags: 0,
    };
    let mut vols = shell
        .call(procs::STORAGE_POOL_LIST_ALL_VOLUMES, &asked)
        .context("Failed to list volumes")?
        .vols
        .0;
    vols.sort_by_cached_key(|vol| vol.name.to_lowercase());
    let details = args.has("details");
    let mut table = if details {
        Table::new(&["Name", "Path", "Type", "Capacity", "Allocation"])
    } else {
        Table::new(&["Name", "Path"])
    };
    let asked = vols
        .iter()
        .map(|vol| StorageVolGetPathArgs { vol: vol.clone() });
    let asked: Vec<_> = asked.collect();
    let connection = shell.connection()?;
    let paths = connection.call_each(procs::STORAGE_VOL_GET_PATH, asked)?;
    let mut infos = if details {
        let asked: Vec<_> = vols
            .iter()
            .map(|vol| StorageVolGetInfoArgs { vol: vol.clone() })
            .collect();
        connection.call_each(procs::STORAGE_VOL_GET_INFO, asked)?
    } else {
        Vec::new()
    }
    .into_iter();
    for (vol, path) in vols.into_iter().zip(paths) {
        // Gone in the meantime at worst.
        let path = path.map_or_else(|_| "-".to_owned(), |answer| answer.name);
        if !details {
            table.row([&vol.name, &path]);
            continue;
        }
        let [kind, capacity, allocation] = match infos.next() {
            Some(Ok(info)) => [
                kind(info.kind).to_owned(),
                pretty(info.capacity),
                pretty(info.allocation),
            ],
            Some(Err(failure)) if failure.disconnected => return Err(failure),
            _ => ["unknown", "unknown", "unknown"].map(str::to_owned),
        };
        table.row([vol.name, path, kind, capacity, allocation]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

/// A size that a user gave.
///
/// # Errors
///
/// It is none.
pub(super) fn bytes(text: &str) -> Result<u64> {
    size::parse(text, 1).map_err(|why| {
        let failure = Failure::new(format!("Malformed size {text}"));
        match why {
            Some(why) => Failure::new(why).context(failure.lines.join("")),
            None => failure,
        }
    })
}

fn resize(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(
        args,
        &[("allocate", 1 << 0), ("delta", 1 << 1), ("shrink", 1 << 2)],
    );
    let given = args.required("capacity")?;
    let (delta, shrink) = (args.has("delta"), args.has("shrink"));
    let vol = find(shell, args, By::Any)?;
    let text = given.trim_start();
    let text = match text.strip_prefix('-') {
        // The sign says what the two options say.
        Some(rest) if delta && shrink => rest,
        Some(_) => {
            return Err(Failure::new("negative size requires --delta and --shrink"));
        }
        None => text,
    };
    let capacity = bytes(text)?;
    let name = vol.name.clone();
    let how = if delta { "by" } else { "to" };
    let asked = StorageVolResizeArgs {
        vol,
        capacity,
        flags,
    };
    shell
        .call(procs::STORAGE_VOL_RESIZE, &asked)
        .with_context(|| format!("Failed to change size of volume '{name}' {how} {text}"))?;
    shell.out.print_extra(format!(
        "Size of volume '{name}' successfully changed {how} {text}\n"
    ));
    Ok(())
}

/// Overwrites a volume with zeroes.
///
/// # Errors
///
/// The daemon's.
pub(super) fn wipe_with_zeroes(shell: &mut Shell, vol: StorageVol) -> Result {
    shell.call(
        procs::STORAGE_VOL_WIPE,
        &StorageVolWipeArgs { vol, flags: 0 },
    )
}

fn wipe(shell: &mut Shell, args: &Args) -> Result {
    let vol = find(shell, args, By::Any)?;
    let name = vol.name.clone();
    let failed = || format!("Failed to wipe vol {name}");
    match args.text("algorithm")? {
        None => wipe_with_zeroes(shell, vol).with_context(failed)?,
        Some(word) => {
            let algorithm = ALGORITHMS
                .iter()
                .position(|known| *known == word)
                .and_then(|at| u32::try_from(at).ok())
                .ok_or_else(|| Failure::new(format!("Unsupported algorithm '{word}'")))?;
            let asked = StorageVolWipePatternArgs {
                vol,
                algorithm,
                flags: 0,
            };
            shell
                .call(procs::STORAGE_VOL_WIPE_PATTERN, &asked)
                .with_context(failed)?;
        }
    }
    shell.out.print_extra(format!("Vol {name} wiped\n"));
    Ok(())
}
