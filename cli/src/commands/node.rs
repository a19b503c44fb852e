//! The host in numbers: CPU times, memory, pages.

use std::time::Duration;

use rpc::args::*;
use rpc::procs;
use rpc::types::TypedParam;
use xml_schemas::dom::{self, Element};

use super::params;
use crate::command::{Args, Command, data, flag, number};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::size;

/// `nodecpustats`
pub const NODECPUSTATS: Command = Command {
    name: "nodecpustats",
    summary: "Prints cpu stats of the node.",
    description: "Shows what the host's CPUs did, in nanoseconds.",
    options: &[
        number("cpu", "only this one"),
        flag("percent", "during one second, in hundredths"),
    ],
    handler: nodecpustats,
    connects: true,
};

/// `nodememstats`
pub const NODEMEMSTATS: Command = Command {
    name: "nodememstats",
    summary: "Prints memory stats of the node.",
    description: "Shows the host's memory.",
    options: &[number("cell", "only this NUMA cell's")],
    handler: nodememstats,
    connects: true,
};

/// `freepages`
pub const FREEPAGES: Command = Command {
    name: "freepages",
    summary: "NUMA free pages",
    description: "Shows how many pages of memory are free.",
    options: &[
        number("cellno", "in this NUMA cell"),
        number("pagesize", "of this size (KiB without a unit)"),
        flag("all", "in every cell"),
    ],
    handler: freepages,
    connects: true,
};

/// `allocpages`
pub const ALLOCPAGES: Command = Command {
    name: "allocpages",
    summary: "Manipulate pages pool size",
    description: "Changes how many huge pages the host keeps.",
    options: &[
        number("pagesize", "their size (KiB without a unit)").required(),
        number("pagecount", "how many").required(),
        number("cellno", "in this NUMA cell"),
        flag("add", "so many more"),
        flag("all", "in every cell"),
    ],
    handler: allocpages,
    connects: true,
};

/// `nodesuspend`
pub const NODESUSPEND: Command = Command {
    name: "nodesuspend",
    summary: "suspend the host node for a given time duration",
    description: "Puts the host to sleep for some time.",
    options: &[
        data("target", "mem, disk or hybrid"),
        number("duration", "seconds, at least 60").required(),
    ],
    handler: nodesuspend,
    connects: true,
};

/// `node-memory-tune`
pub const NODE_MEMORY_TUNE: Command = Command {
    name: "node-memory-tune",
    summary: "Get or set node memory parameters",
    description: "Shows or changes how the host merges equal pages.",
    options: &[
        number("shm-pages-to-scan", "pages looked at in a row"),
        number("shm-sleep-millisecs", "pause after them"),
        number(
            "shm-merge-across-nodes",
            "pages of different NUMA nodes, too",
        ),
    ],
    handler: node_memory_tune,
    connects: true,
};

/// `nodesevinfo`
pub const NODESEVINFO: Command = Command {
    name: "nodesevinfo",
    summary: "Prints SEV info on the node.",
    description: "Shows what the host can do to protect guests' memory.",
    options: &[],
    handler: nodesevinfo,
    connects: true,
};

fn cpu_times(shell: &mut Shell, cpu_num: i32) -> Result<Vec<NodeCpuStat>> {
    let asked = |nparams| NodeGetCpuStatsArgs {
        cpu_num,
        nparams,
        flags: 0,
    };
    let count = shell
        .call(procs::NODE_GET_CPU_STATS, &asked(0))
        .context("Unable to get number of cpu stats")?
        .nparams;
    let found = shell
        .call(procs::NODE_GET_CPU_STATS, &asked(count))
        .context("Unable to get node cpu stats")?;
    Ok(found.params.0)
}

fn nodecpustats(shell: &mut Shell, args: &Args) -> Result {
    /// What is shown, and the name it has on the wire.
    const SHOWN: [(&str, &str); 5] = [
        ("user:", "user"),
        ("system:", "kernel"),
        ("idle:", "idle"),
        ("iowait:", "iowait"),
        ("intr:", "intr"),
    ];
    let cpu: i32 = args.number("cpu")?.unwrap_or(-1);
    let first = cpu_times(shell, cpu)?;
    let value = |stats: &[NodeCpuStat], field: &str| {
        stats
            .iter()
            .find(|stat| stat.field == field)
            .map(|stat| stat.value)
    };
    if !args.has("percent") {
        for (title, field) in SHOWN {
            if let Some(value) = value(&first, field) {
                shell.out.print(format!("{title:<15} {value:>20}\n"));
            }
        }
        return Ok(());
    }
    std::thread::sleep(Duration::from_secs(1));
    let second = cpu_times(shell, cpu)?;
    let line = |title: &str, part: f64| format!("{title:<15} {part:>5.1}%\n");
    if let (Some(usage), None) = (value(&second, "utilization"), value(&second, "user")) {
        shell.out.print(line("usage:", usage as f64));
        return Ok(());
    }
    let delta = |field: &str| -> f64 {
        let (before, after) = (value(&first, field), value(&second, field));
        after.unwrap_or(0).saturating_sub(before.unwrap_or(0)) as f64
    };
    let total: f64 = SHOWN.iter().map(|(_, field)| delta(field)).sum();
    let part = |time: f64| {
        if total > 0.0 {
            time / total * 100.0
        } else {
            0.0
        }
    };
    let busy = delta("user") + delta("kernel");
    shell.out.print(line("usage:", part(busy)));
    for (title, field) in SHOWN {
        if value(&second, field).is_some() {
            shell.out.print(line(title, part(delta(field))));
        }
    }
    Ok(())
}

fn nodememstats(shell: &mut Shell, args: &Args) -> Result {
    let cell_num: i32 = args.number("cell")?.unwrap_or(-1);
    let asked = |nparams| NodeGetMemoryStatsArgs {
        nparams,
        cell_num,
        flags: 0,
    };
    let count = shell
        .call(procs::NODE_GET_MEMORY_STATS, &asked(0))
        .context("Unable to get number of memory stats")?
        .nparams;
    let found = shell
        .call(procs::NODE_GET_MEMORY_STATS, &asked(count))
        .context("Unable to get memory stats")?;
    for stat in &found.params.0 {
        let text = format!("{:<7}: {:>20} KiB\n", stat.field, stat.value);
        shell.out.print(text);
    }
    Ok(())
}

fn kibibytes(args: &Args, option: &str) -> Result<Option<u32>> {
    let Some(text) = args.text(option)? else {
        return Ok(None);
    };
    let bytes = size::parse(text, 1024).ok();
    let kib = bytes.and_then(|bytes| u32::try_from(bytes.div_ceil(1024)).ok());
    kib.map(Some).ok_or_else(|| {
        Failure::new(format!(
            "Scaled numeric value '{text}' for <{option}> option is malformed or out of range"
        ))
    })
}

/// Page sizes in KiB and cells, as the capabilities have them.
fn pages_and_cells(shell: &mut Shell) -> Result<(Vec<u32>, Vec<i32>)> {
    let xml = shell
        .call(procs::CONNECT_GET_CAPABILITIES, &())
        .context("unable to get node capabilities")?
        .capabilities;
    let tree = dom::parse(&xml, "(capabilities)");
    let tree = tree.map_err(|error| Failure::new(error.to_string()))?;
    let host = tree.child("host");
    let cpu = host.and_then(|host| host.child("cpu"));
    let sizes = cpu
        .into_iter()
        .flat_map(Element::elements)
        .filter(|e| e.name == "pages");
    let cells = host
        .and_then(|host| host.child("topology")?.child("cells"))
        .into_iter()
        .flat_map(Element::elements);
    let mut sizes: Vec<u32> = sizes.filter_map(|e| e.attr("size")?.parse().ok()).collect();
    sizes.sort_unstable();
    sizes.dedup();
    Ok((
        sizes,
        cells.filter_map(|e| e.attr("id")?.parse().ok()).collect(),
    ))
}

fn freepages(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("all", "cellno")?;
    let wanted = kibibytes(args, "pagesize")?;
    let ask = |shell: &mut Shell, sizes: &[u32], cell: i32| {
        let asked = NodeGetFreePagesArgs {
            pages: sizes.to_vec().into(),
            start_cell: cell,
            cell_count: 1,
            flags: 0,
        };
        let counts = shell.call(procs::NODE_GET_FREE_PAGES, &asked)?.counts.0;
        let line = |(size, count): (&u32, &u64)| format!("{size}KiB: {count}\n");
        let text: String = sizes.iter().zip(&counts).map(line).collect();
        shell.out.print(text);
        Ok::<(), Failure>(())
    };
    if args.has("all") {
        let (sizes, cells) = pages_and_cells(shell)?;
        let sizes = wanted.map_or(sizes, |size| vec![size]);
        for cell in cells {
            shell.out.print(format!("Node {cell}:\n"));
            ask(shell, &sizes, cell)?;
            shell.out.print("\n");
        }
        return Ok(());
    }
    let Some(cell) = args.number::<i32>("cellno")? else {
        return Err(Failure::new("missing cellno argument"));
    };
    if cell < -1 {
        return Err(Failure::new(
            "cell number must be non-negative integer or -1",
        ));
    }
    let Some(size) = wanted else {
        return Err(Failure::new("missing pagesize argument"));
    };
    ask(shell, &[size], cell)
}

fn allocpages(shell: &mut Shell, args: &Args) -> Result {
    /// VIR_NODE_ALLOC_PAGES_SET
    const SET: u32 = 1;
    args.exclusive("all", "cellno")?;
    let start_cell = args.number("cellno")?.unwrap_or(-1);
    let kib = kibibytes(args, "pagesize")?.unwrap_or(0);
    let pages: u64 = args.number("pagecount")?.unwrap_or(0);
    let (start_cell, cell_count) = if args.has("all") {
        let cells = pages_and_cells(shell)?.1.len();
        (0, u32::try_from(cells).unwrap_or(1))
    } else {
        (start_cell, 1)
    };
    let asked = NodeAllocPagesArgs {
        page_sizes: vec![kib].into(),
        page_counts: vec![pages].into(),
        start_cell,
        cell_count,
        flags: if args.has("add") { 0 } else { SET },
    };
    shell.call(procs::NODE_ALLOC_PAGES, &asked)?;
    Ok(())
}

fn nodesuspend(shell: &mut Shell, args: &Args) -> Result {
    let duration: i64 = args.number("duration")?.unwrap_or(0);
    let target = match args.required("target")? {
        "mem" => 0,
        "disk" => 1,
        "hybrid" => 2,
        _ => return Err(Failure::new("Invalid target")),
    };
    let duration = u64::try_from(duration).map_err(|_| Failure::new("Invalid duration"))?;
    let asked = NodeSuspendForDurationArgs {
        target,
        duration,
        flags: 0,
    };
    shell
        .call(procs::NODE_SUSPEND_FOR_DURATION, &asked)
        .context("The host was not suspended")
}

fn node_memory_tune(shell: &mut Shell, args: &Args) -> Result {
    let mut values = Vec::new();
    for option in [
        "shm-pages-to-scan",
        "shm-sleep-millisecs",
        "shm-merge-across-nodes",
    ] {
        if let Some(value) = args.number::<u32>(option)? {
            values.push(TypedParam::new(option.replace('-', "_"), value));
        }
    }
    if !values.is_empty() {
        let params = values.into();
        let asked = NodeSetMemoryParametersArgs { params, flags: 0 };
        return shell
            .call(procs::NODE_SET_MEMORY_PARAMETERS, &asked)
            .context("Unable to change memory parameters");
    }
    let asked = |nparams| NodeGetMemoryParametersArgs { nparams, flags: 4 };
    let count = shell
        .call(procs::NODE_GET_MEMORY_PARAMETERS, &asked(0))
        .context("Unable to get number of memory parameters")?
        .nparams;
    let found = shell
        .call(procs::NODE_GET_MEMORY_PARAMETERS, &asked(count))
        .context("Unable to get memory parameters")?;
    shell.out.print("Shared memory:\n");
    for param in &found.params.0 {
        let value = params::text(&param.value);
        shell.out.print(format!("\t{:<15} {value}\n", param.field));
    }
    Ok(())
}

fn nodesevinfo(shell: &mut Shell, _: &Args) -> Result {
    let asked = |nparams| NodeGetSevInfoArgs { nparams, flags: 4 };
    let failed = "Unable to get host SEV information";
    let count = shell
        .call(procs::NODE_GET_SEV_INFO, &asked(0))
        .context(failed)?
        .nparams;
    let found = shell
        .call(procs::NODE_GET_SEV_INFO, &asked(count))
        .context(failed)?;
    for param in &found.params.0 {
        let value = params::text(&param.value);
        shell.out.print(format!("{:<18}: {value}\n", param.field));
    }
    Ok(())
}
