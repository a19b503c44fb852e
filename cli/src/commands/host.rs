//! The host, and what its daemon can do.

use rpc::args::{
    ConnectGetDomainCapabilitiesArgs, ConnectGetMaxVcpusArgs, ConnectGetSysinfoArgs,
    NodeGetCellsFreeMemoryArgs, NodeGetCpuMapArgs,
};
use rpc::procs;

use crate::command::{Args, Command, flag, number, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::validate;

/// The release of libvirt whose interface this program speaks.
pub const API: &str = "9.0.0";

/// `capabilities`
pub const CAPABILITIES: Command = Command {
    name: "capabilities",
    summary: "capabilities",
    description: "Shows what the host has and what guests can be made of, in XML.",
    options: &[],
    handler: capabilities,
    connects: true,
};

/// `domcapabilities`
pub const DOMCAPABILITIES: Command = Command {
    name: "domcapabilities",
    summary: "domain capabilities",
    description: "Shows what a domain of one kind can have on this host, in XML.",
    options: &[
        text("virttype", "the kind: what runs it (/domain/@type)"),
        text(
            "emulatorbin",
            "the kind: its program (/domain/devices/emulator)",
        ),
        text("arch", "the kind: its processor (/domain/os/type/@arch)"),
        text(
            "machine",
            "the kind: its machine (/domain/os/type/@machine)",
        ),
    ],
    handler: domcapabilities,
    connects: true,
};

/// `freecell`
pub const FREECELL: Command = Command {
    name: "freecell",
    summary: "NUMA free memory",
    description: "Shows how much memory is free on the host, or in its NUMA cells.",
    options: &[
        number("cellno", "one cell"),
        flag("all", "every cell, and the sum"),
    ],
    handler: freecell,
    connects: true,
};

/// `host-validate`
pub const HOST_VALIDATE: Command = Command {
    name: "host-validate",
    summary: "check what this host can do for guests",
    description: "Checks this host for what guests run on, and tells which CPU they will get and why.",
    options: &[text(
        "hvtype",
        "qemu, as for virt-host-validate; there is nothing else",
    )],
    handler: host_validate,
    connects: false,
};

/// `hostname`
pub const HOSTNAME: Command = Command {
    name: "hostname",
    summary: "print the hypervisor hostname",
    description: "",
    options: &[],
    handler: hostname,
    connects: true,
};

/// `maxvcpus`
pub const MAXVCPUS: Command = Command {
    name: "maxvcpus",
    summary: "connection vcpu maximum",
    description: "Shows how many virtual CPUs a guest can have at most.",
    options: &[text("type", "kind of domain")],
    handler: maxvcpus,
    connects: true,
};

/// `nodecpumap`
pub const NODECPUMAP: Command = Command {
    name: "nodecpumap",
    summary: "node cpu map",
    description: "Shows how many CPUs the host has, how many of them are online, and which.",
    options: &[flag("pretty", "as ranges of numbers")],
    handler: nodecpumap,
    connects: true,
};

/// `nodeinfo`
pub const NODEINFO: Command = Command {
    name: "nodeinfo",
    summary: "node information",
    description: "Shows the host's processors and memory.",
    options: &[],
    handler: nodeinfo,
    connects: true,
};

/// `sysinfo`
pub const SYSINFO: Command = Command {
    name: "sysinfo",
    summary: "print the hypervisor sysinfo",
    description: "Shows what the host's firmware tells about it, in XML.",
    options: &[],
    handler: sysinfo,
    connects: true,
};

/// `uri`
pub const URI: Command = Command {
    name: "uri",
    summary: "print the hypervisor canonical URI",
    description: "",
    options: &[],
    handler: uri,
    connects: true,
};

/// `version`
pub const VERSION: Command = Command {
    name: "version",
    summary: "show version",
    description: "Shows the versions of this program and of what it talks to.",
    options: &[flag("daemon", "that of the daemon, too")],
    handler: version,
    connects: true,
};

fn capabilities(shell: &mut Shell, _: &Args) -> Result {
    let ret = shell
        .call(procs::CONNECT_GET_CAPABILITIES, &())
        .context("failed to get capabilities")?;
    shell.out.print(ret.capabilities + "\n");
    Ok(())
}

fn domcapabilities(shell: &mut Shell, args: &Args) -> Result {
    let option = |name| args.text(name).map(|value| value.map(str::to_owned));
    let asked = ConnectGetDomainCapabilitiesArgs {
        emulatorbin: option("emulatorbin")?,
        arch: option("arch")?,
        machine: option("machine")?,
        virttype: option("virttype")?,
        flags: 0,
    };
    let ret = shell
        .call(procs::CONNECT_GET_DOMAIN_CAPABILITIES, &asked)
        .context("failed to get emulator capabilities")?;
    shell.out.print(ret.capabilities + "\n");
    Ok(())
}

/// How many NUMA cells are asked for at once: as many as the protocol carries.
const CELLS_MAX: i32 = 1024;

fn freecell(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("all", "cellno")?;
    let cell: Option<i32> = args.number("cellno")?;
    if let Some(cell) = cell {
        let asked = NodeGetCellsFreeMemoryArgs {
            start_cell: cell,
            maxcells: 1,
        };
        let cells = shell.call(procs::NODE_GET_CELLS_FREE_MEMORY, &asked)?.cells;
        let free = cells
            .first()
            .copied()
            .ok_or_else(|| Failure::new("the daemon knows nothing about this cell"))?;
        shell.out.print(format!("{cell}: {} KiB\n", free / 1024));
    } else if args.has("all") {
        let nodes = shell
            .call(procs::NODE_GET_INFO, &())
            .context("failed to get NUMA free memory")?
            .nodes;
        let asked = NodeGetCellsFreeMemoryArgs {
            start_cell: 0,
            maxcells: nodes.clamp(1, CELLS_MAX),
        };
        let cells = shell.call(procs::NODE_GET_CELLS_FREE_MEMORY, &asked)?.cells;
        let mut total = 0u64;
        for (number, free) in cells.iter().enumerate() {
            shell
                .out
                .print(format!("{number:5}: {:10} KiB\n", free / 1024));
            total = total.saturating_add(free / 1024);
        }
        shell.out.print_extra("--------------------\n");
        shell
            .out
            .print_extra(format!("{:5}: {total:10} KiB\n", "Total"));
    } else {
        let free = shell.call(procs::NODE_GET_FREE_MEMORY, &())?.free_mem;
        shell.out.print(format!("Total: {} KiB\n", free / 1024));
    }
    Ok(())
}

fn host_validate(shell: &mut Shell, args: &Args) -> Result {
    match args.text("hvtype")? {
        None | Some("qemu" | "vireo") => {}
        Some(other) => return Err(Failure::new(format!("unsupported hypervisor name {other}"))),
    }
    let report = validate::check_host();
    let text = report.format(std::io::IsTerminal::is_terminal(&std::io::stdout()));
    shell.out.print(text);
    if report.failed() {
        Err(Failure::silent())
    } else {
        Ok(())
    }
}

fn hostname(shell: &mut Shell, _: &Args) -> Result {
    let ret = shell
        .call(procs::CONNECT_GET_HOSTNAME, &())
        .context("failed to get hostname")?;
    shell.out.print(ret.hostname + "\n");
    Ok(())
}

fn maxvcpus(shell: &mut Shell, args: &Args) -> Result {
    let kind = args.text("type")?.map(str::to_owned);
    // What a domain can have is the better answer where the daemon knows it.
    let asked = ConnectGetDomainCapabilitiesArgs {
        virttype: kind.clone(),
        ..Default::default()
    };
    let from_domain = match shell.call(procs::CONNECT_GET_DOMAIN_CAPABILITIES, &asked) {
        Ok(ret) => max_vcpus(&ret.capabilities),
        Err(failure) if failure.disconnected => return Err(failure),
        Err(_) => None,
    };
    if let Some(max) = from_domain {
        shell.out.print(format!("{max}\n"));
        return Ok(());
    }
    let ret = shell.call(
        procs::CONNECT_GET_MAX_VCPUS,
        &ConnectGetMaxVcpusArgs { kind },
    )?;
    shell.out.print(format!("{}\n", ret.max_vcpus));
    Ok(())
}

/// The attribute `max` of the element `vcpu` in domain capabilities.
fn max_vcpus(xml: &str) -> Option<u32> {
    let tree = xml_schemas::dom::parse(xml, "(domainCapabilities)").ok()?;
    tree.child("vcpu")?
        .attr("max")?
        .parse()
        .ok()
        .filter(|max| *max > 0)
}

fn nodecpumap(shell: &mut Shell, args: &Args) -> Result {
    let asked = NodeGetCpuMapArgs {
        need_map: 1,
        need_online: 1,
        flags: 0,
    };
    let ret = shell
        .call(procs::NODE_GET_CPU_MAP, &asked)
        .context("Unable to get cpu map")?;
    let present = usize::try_from(ret.ret)
        .unwrap_or(0)
        .min(ret.cpumap.len() * 8);
    let online: Vec<bool> = (0..present)
        .map(|cpu| {
            ret.cpumap
                .get(cpu / 8)
                .is_some_and(|byte| byte >> (cpu % 8) & 1 != 0)
        })
        .collect();
    let map = if args.has("pretty") {
        ranges(&online)
    } else {
        online
            .iter()
            .map(|online| if *online { 'y' } else { '-' })
            .collect()
    };
    shell.out.print(format!(
        "{:<15} {present}\n{:<15} {}\n{:<15} {map}\n",
        "CPUs present:", "CPUs online:", ret.online, "CPU map:"
    ));
    Ok(())
}

/// The numbers of what is true: `0-2,4`.
fn ranges(set: &[bool]) -> String {
    let mut parts = Vec::new();
    let mut start = None;
    for index in 0..=set.len() {
        match (set.get(index).copied().unwrap_or(false), start) {
            (true, None) => start = Some(index),
            (false, Some(first)) => {
                let last = index - 1;
                parts.push(if first == last {
                    first.to_string()
                } else {
                    format!("{first}-{last}")
                });
                start = None;
            }
            _ => {}
        }
    }
    parts.join(",")
}

fn nodeinfo(shell: &mut Shell, _: &Args) -> Result {
    let info = shell
        .call(procs::NODE_GET_INFO, &())
        .context("failed to get node information")?;
    let mut line = |name: &str, value: String| shell.out.print(format!("{name:<20} {value}\n"));
    line("CPU model:", info.model.text());
    line("CPU(s):", info.cpus.to_string());
    if info.mhz != 0 {
        line("CPU frequency:", format!("{} MHz", info.mhz));
    }
    line("CPU socket(s):", info.sockets.to_string());
    line("Core(s) per socket:", info.cores.to_string());
    line("Thread(s) per core:", info.threads.to_string());
    line("NUMA cell(s):", info.nodes.to_string());
    line("Memory size:", format!("{} KiB", info.memory));
    Ok(())
}

fn sysinfo(shell: &mut Shell, _: &Args) -> Result {
    let ret = shell.call(
        procs::CONNECT_GET_SYSINFO,
        &ConnectGetSysinfoArgs { flags: 0 },
    );
    shell
        .out
        .print(ret.context("failed to get sysinfo")?.sysinfo);
    Ok(())
}

fn uri(shell: &mut Shell, _: &Args) -> Result {
    let uri = shell.connection()?.uri().to_owned();
    shell.out.print(uri + "\n");
    Ok(())
}

/// A version as libvirt carries it in one number: 1,000,000 a major, 1,000 a minor release.
fn dotted(version: u64) -> String {
    format!(
        "{}.{}.{}",
        version / 1_000_000,
        version / 1000 % 1000,
        version % 1000
    )
}

fn version(shell: &mut Shell, args: &Args) -> Result {
    let kind = shell
        .call(procs::CONNECT_GET_TYPE, &())
        .context("failed to get hypervisor type")?
        .kind;
    let own = env!("CARGO_PKG_VERSION");
    shell
        .out
        .print(format!("Compiled against library: vireo {own}\n"));
    shell.out.print(format!("Using library: vireo {own}\n"));
    shell.out.print(format!("Using API: {kind} {API}\n"));
    let hypervisor = shell
        .call(procs::CONNECT_GET_VERSION, &())
        .map(|ret| ret.hv_ver);
    match hypervisor {
        Ok(0) => shell.out.print(format!(
            "Cannot extract running {kind} hypervisor version\n"
        )),
        Ok(version) => shell
            .out
            .print(format!("Running hypervisor: {kind} {}\n", dotted(version))),
        Err(failure) if failure.is_unsupported() => {
            shell.out.print(format!(
                "Cannot extract running {kind} hypervisor version\n"
            ));
        }
        Err(failure) => return Err(failure.context("failed to get the hypervisor version")),
    }
    if args.has("daemon") {
        match shell.call(procs::CONNECT_GET_LIB_VERSION, &()) {
            Ok(ret) => shell
                .out
                .print(format!("Running against daemon: {}\n", dotted(ret.lib_ver))),
            Err(failure) => return Err(failure.context("failed to get the daemon version")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_become_ranges() {
        assert_eq!(ranges(&[true, false, true, false, true]), "0,2,4");
        assert_eq!(ranges(&[true, true, true, false, true]), "0-2,4");
        assert_eq!(ranges(&[false, true, true]), "1-2");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn versions_are_dotted() {
        assert_eq!(dotted(9_000_000), "9.0.0");
        assert_eq!(dotted(7_002_022), "7.2.22");
    }
}
