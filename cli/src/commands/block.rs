//! Disks of domains: `domblklist`, `domblkstat`, `domblkinfo`, `domblkerror`, `blkdeviotune`, `blockresize`.

use rpc::args::{
    DomainBlockResizeArgs, DomainBlockStatsArgs, DomainBlockStatsFlagsArgs, DomainGetBlockInfoArgs,
    DomainGetBlockIoTuneArgs, DomainGetDiskErrorsArgs, DomainSetBlockIoTuneArgs,
};
use rpc::procs;
use rpc::types::{Domain, TypedParam};
use xml_schemas::dom::Element;

use super::{ANY, affected, domain_xml, find_domain, params};
use crate::command::{Args, Command, DOMAIN, Opt, data, flag, number, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::size;
use crate::table::Table;

/// `domblklist`
pub const DOMBLKLIST: Command = Command {
    name: "domblklist",
    summary: "list all domain blocks",
    description: "Shows the disks of a domain.",
    options: &[
        DOMAIN,
        flag("inactive", "those of the stored definition"),
        flag("details", "their types and devices too"),
    ],
    handler: domblklist,
    connects: true,
};

/// `domblkstat`
pub const DOMBLKSTAT: Command = Command {
    name: "domblkstat",
    summary: "get device block stats for a domain",
    description: "Shows what a running domain has read from and written to a disk, or all of them.",
    options: &[
        DOMAIN,
        text("device", "the disk: its target or path").allow_empty(),
        flag("human", "in words"),
    ],
    handler: domblkstat,
    connects: true,
};

/// `domblkinfo`
pub const DOMBLKINFO: Command = Command {
    name: "domblkinfo",
    summary: "domain block device size information",
    description: "Shows how large a disk is for the guest, and how much of the host it takes.",
    options: &[
        DOMAIN,
        text("device", "the disk: its target or path"),
        flag("human", "in larger units"),
        flag("all", "all disks"),
    ],
    handler: domblkinfo,
    connects: true,
};

/// `domblkerror`
pub const DOMBLKERROR: Command = Command {
    name: "domblkerror",
    summary: "Show errors on block devices",
    description: "Shows the disks of a running domain whose requests failed.",
    options: &[DOMAIN],
    handler: domblkerror,
    connects: true,
};

/// `blkdeviotune`
pub const BLKDEVIOTUNE: Command = Command {
    name: "blkdeviotune",
    summary: "Set or query a block device I/O tuning parameters.",
    description: "Shows or changes how much a domain may read from and write to a disk.",
    options: &TUNING,
    handler: blkdeviotune,
    connects: true,
};

/// `blockresize`
pub const BLOCKRESIZE: Command = Command {
    name: "blockresize",
    summary: "Resize block device of domain.",
    description: "Makes a disk of a running domain larger.",
    options: &[
        DOMAIN,
        data("path", "the disk: its target or path"),
        number("size", "its new size, with a unit (KiB without one)"),
        flag("capacity", "all of its block device"),
    ],
    handler: blockresize,
    connects: true,
};

const LIMITS: [&str; 19] = [
    "total-bytes-sec",
    "read-bytes-sec",
    "write-bytes-sec",
    "total-iops-sec",
    "read-iops-sec",
    "write-iops-sec",
    "total-bytes-sec-max",
    "read-bytes-sec-max",
    "write-bytes-sec-max",
    "total-iops-sec-max",
    "read-iops-sec-max",
    "write-iops-sec-max",
    "size-iops-sec",
    "total-bytes-sec-max-length",
    "read-bytes-sec-max-length",
    "write-bytes-sec-max-length",
    "total-iops-sec-max-length",
    "read-iops-sec-max-length",
    "write-iops-sec-max-length",
];

const TUNING: [Opt; 25] = {
    const fn limit(at: usize) -> Opt {
        number(LIMITS[at], "the limit of that name; 0: none")
    }
    [
        DOMAIN,
        data("device", "the disk: its target or path"),
        limit(0),
        limit(1),
        limit(2),
        limit(3),
        limit(4),
        limit(5),
        limit(6),
        limit(7),
        limit(8),
        limit(9),
        limit(10),
        limit(11),
        limit(12),
        text("group-name", "disks of that group share their limits"),
        limit(13),
        limit(14),
        limit(15),
        limit(16),
        limit(17),
        limit(18),
        flag("config", "from the next boot on"),
        flag("live", "for the running domain"),
        flag("current", "for the domain as it is now"),
    ]
};

/// `VIR_DOMAIN_XML_INACTIVE`
const XML_INACTIVE: u32 = 2;
/// `VIR_TYPED_PARAM_STRING_OKAY`
const STRINGS: u32 = 4;

/// A device of a domain's definition as lists show it.
pub(super) fn devices(
    shell: &mut Shell,
    dom: &Domain,
    flags: u32,
    name: &str,
) -> Result<Vec<Element>> {
    let xml = domain_xml(shell, dom, flags)?;
    let root = xml_schemas::dom::parse(&xml, "(domain_definition)")
        .map_err(|error| Failure::new(error.to_string()))?;
    let devices = root.child("devices");
    Ok(devices
        .into_iter()
        .flat_map(|devices| devices.elements())
        .filter(|e| e.name == name)
        .cloned()
        .collect())
}

/// An attribute of a child.
pub(super) fn part<'e>(device: &'e Element, child: &str, attribute: &str) -> Option<&'e str> {
    device.child(child)?.attr(attribute)
}

fn source(disk: &Element) -> String {
    let source = disk.child("source");
    let attribute = |name: &str| source.and_then(|s| s.attr(name));
    match disk.attr("type") {
        Some("block") => attribute("dev"),
        Some("dir") => attribute("dir"),
        Some("network") => attribute("name"),
        Some("volume") => {
            return match (attribute("pool"), attribute("volume")) {
                (Some(pool), Some(volume)) => format!("{pool}/{volume}"),
                _ => "-".to_owned(),
            };
        }
        _ => attribute("file"),
    }
    .unwrap_or("-")
    .to_owned()
}

fn domblklist(shell: &mut Shell, args: &Args) -> Result {
    let flags = if args.has("inactive") {
        XML_INACTIVE
    } else {
        0
    };
    let dom = find_domain(shell, args, ANY)?;
    let details = args.has("details");
    let mut table = if details {
        Table::new(&["Type", "Device", "Target", "Source"])
    } else {
        Table::new(&["Target", "Source"])
    };
    for disk in devices(shell, &dom, flags, "disk")? {
        let target = part(&disk, "target", "dev").unwrap_or("-").to_owned();
        let source = source(&disk);
        if details {
            let kind = disk.attr("type").unwrap_or("-").to_owned();
            let device = disk.attr("device").unwrap_or("disk").to_owned();
            table.row([kind, device, target, source]);
        } else {
            table.row([target, source]);
        }
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

/// A counter's name in answers, in raw output, and in words.
const COUNTERS: [(&str, &str, &str); 9] = [
    ("rd_operations", "rd_req", "number of read operations:"),
    ("rd_bytes", "rd_bytes", "number of bytes read:"),
    ("wr_operations", "wr_req", "number of write operations:"),
    ("wr_bytes", "wr_bytes", "number of bytes written:"),
    ("errs", "errs", "error count:"),
    (
        "flush_operations",
        "flush_operations",
        "number of flush operations:",
    ),
    (
        "rd_total_times",
        "rd_total_times",
        "total duration of reads (ns):",
    ),
    (
        "wr_total_times",
        "wr_total_times",
        "total duration of writes (ns):",
    ),
    (
        "flush_total_times",
        "flush_total_times",
        "total duration of flushes (ns):",
    ),
];

/// What a daemon that only knows the older call says.
fn few_counters(shell: &mut Shell, dom: &Domain, device: &str) -> Result<Vec<TypedParam>> {
    let asked = DomainBlockStatsArgs {
        dom: dom.clone(),
        path: device.to_owned(),
    };
    let found = shell
        .call(procs::DOMAIN_BLOCK_STATS, &asked)
        .context(format!("Failed to get block stats {} {device}", dom.name))?;
    let counters = [
        ("rd_operations", found.rd_req),
        ("rd_bytes", found.rd_bytes),
        ("wr_operations", found.wr_req),
        ("wr_bytes", found.wr_bytes),
        ("errs", found.errs),
    ];
    // Below 0: not known.
    let known = counters.into_iter().filter(|(_, value)| *value >= 0);
    Ok(known
        .map(|(name, value)| TypedParam::new(name, value))
        .collect())
}

fn domblkstat(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let device = args.text("device")?.unwrap_or_default().to_owned();
    let human = args.has("human");
    let asked = |nparams| DomainBlockStatsFlagsArgs {
        dom: dom.clone(),
        path: device.clone(),
        nparams,
        flags: STRINGS,
    };
    let count = shell.call(procs::DOMAIN_BLOCK_STATS_FLAGS, &asked(0));
    let found = match count {
        Ok(count) => {
            let asked = asked(count.nparams);
            let found = shell.call(procs::DOMAIN_BLOCK_STATS_FLAGS, &asked)?;
            found.params.0
        }
        Err(failure) if failure.is_unsupported() => few_counters(shell, &dom, &device)?,
        Err(failure) => return Err(failure),
    };
    if human {
        shell.out.print(format!("Device: {device}\n"));
    }
    for (field, raw, words) in COUNTERS {
        let Some(param) = found.iter().find(|param| param.field == field) else {
            continue;
        };
        let value = params::text(&param.value);
        shell.out.print(if human {
            format!(" {words:<31} {value}\n")
        } else {
            format!("{device} {raw} {value}\n")
        });
    }
    Ok(())
}

fn domblkinfo(shell: &mut Shell, args: &Args) -> Result {
    let all = args.has("all");
    if !all && !args.has("device") {
        return Err(Failure::new(
            "command 'domblkinfo' requires <device> option",
        ));
    }
    args.exclusive("all", "device")?;
    let dom = find_domain(shell, args, ANY)?;
    let number = |bytes: u64| {
        if args.has("human") {
            params::human(bytes)
        } else {
            bytes.to_string()
        }
    };
    let info = |shell: &mut Shell, path: &str| {
        let asked = DomainGetBlockInfoArgs {
            dom: dom.clone(),
            path: path.to_owned(),
            flags: 0,
        };
        shell.call(procs::DOMAIN_GET_BLOCK_INFO, &asked)
    };
    if !all {
        let found = info(shell, args.required("device")?)?;
        for (name, value) in [
            ("Capacity:", found.capacity),
            ("Allocation:", found.allocation),
            ("Physical:", found.physical),
        ] {
            shell.out.print(format!("{name:<15} {}\n", number(value)));
        }
        return Ok(());
    }
    let mut table = Table::new(&["Target", "Capacity", "Allocation", "Physical"]);
    for disk in devices(shell, &dom, 0, "disk")? {
        let target = part(&disk, "target", "dev").unwrap_or_default().to_owned();
        if source(&disk) == "-" {
            table.row([target.as_str(), "-", "-", "-"]);
            continue;
        }
        let found = info(shell, &target)?;
        table.row([
            target,
            number(found.capacity),
            number(found.allocation),
            number(found.physical),
        ]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

fn domblkerror(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let asked = |maxerrors| DomainGetDiskErrorsArgs {
        dom: dom.clone(),
        maxerrors,
        flags: 0,
    };
    let most = shell
        .call(procs::DOMAIN_GET_DISK_ERRORS, &asked(0))?
        .nerrors;
    let errors = match u32::try_from(most) {
        Ok(most @ 1..) => {
            let ret = shell.call(procs::DOMAIN_GET_DISK_ERRORS, &asked(most))?;
            ret.errors.0
        }
        _ => Vec::new(),
    };
    if errors.is_empty() {
        shell.out.print("No errors found\n");
    }
    for error in errors {
        let words = match error.error {
            0 => "no error",
            2 => "no space",
            _ => "unspecified error",
        };
        shell.out.print(format!("{}: {words}\n", error.disk));
    }
    Ok(())
}

fn blkdeviotune(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let disk = args.required("device")?.to_owned();
    let mut values: Vec<TypedParam> = Vec::new();
    for name in LIMITS {
        let Some(text) = args.text(name)? else {
            continue;
        };
        let value = size::parse(text, 1).map_err(|_| {
            let mut failure = Failure::new(format!(
                "Scaled numeric value '{text}' for <{name}> option is malformed or out of range"
            ));
            failure
                .lines
                .push("Unable to parse integer parameter".into());
            failure
        })?;
        values.push(TypedParam::new(name.replace('-', "_"), value));
    }
    if let Some(group) = args.text("group-name")? {
        let group = rpc::types::TypedValue::String(group.to_owned());
        values.push(TypedParam::new("group_name", group));
    }
    if !values.is_empty() {
        let asked = DomainSetBlockIoTuneArgs {
            dom,
            disk,
            params: values.into(),
            flags,
        };
        return shell
            .call(procs::DOMAIN_SET_BLOCK_IO_TUNE, &asked)
            .context("Unable to change block I/O throttle");
    }
    let asked = |nparams| DomainGetBlockIoTuneArgs {
        dom: dom.clone(),
        disk: (nparams != 0).then(|| disk.clone()),
        nparams,
        flags: flags | STRINGS,
    };
    let failed = "Unable to get number of block I/O throttle parameters";
    let count = shell
        .call(procs::DOMAIN_GET_BLOCK_IO_TUNE, &asked(0))
        .context(failed)?
        .nparams;
    let found = shell
        .call(procs::DOMAIN_GET_BLOCK_IO_TUNE, &asked(count))
        .context("Unable to get block I/O throttle parameters")?;
    shell.out.print(params::lines(&found.params.0));
    Ok(())
}

fn blockresize(shell: &mut Shell, args: &Args) -> Result {
    /// `VIR_DOMAIN_BLOCK_RESIZE_BYTES`
    const BYTES: u32 = 1;
    /// `VIR_DOMAIN_BLOCK_RESIZE_CAPACITY`
    const CAPACITY: u32 = 2;
    let dom = find_domain(shell, args, ANY)?;
    let disk = args.required("path")?.to_owned();
    let bytes = match args.text("size")? {
        Some(text) => size::parse(text, 1024).map_err(|_| {
            Failure::new(format!(
                "Scaled numeric value '{text}' for <size> option is malformed or out of range"
            ))
        })?,
        None if args.has("capacity") => 0,
        None => {
            return Err(Failure::new(
                "either --size or --capacity says how large it is to be",
            ));
        }
    };
    // As virsh: whole KiB need no flag, which old daemons don't know.
    let (size, mut flags) = if bytes % 1024 == 0 {
        (bytes / 1024, 0)
    } else {
        (bytes, BYTES)
    };
    if args.has("capacity") {
        flags |= CAPACITY;
    }
    let asked = DomainBlockResizeArgs {
        dom,
        disk: disk.clone(),
        size,
        flags,
    };
    shell
        .call(procs::DOMAIN_BLOCK_RESIZE, &asked)
        .context(format!("Failed to resize block device '{disk}'"))?;
    shell
        .out
        .print_extra(format!("Block device '{disk}' is resized\n"));
    Ok(())
}
