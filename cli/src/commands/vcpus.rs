//! Virtual CPUs and threads: how many, where they run, what they use.

use std::collections::BTreeSet;

use rpc::args::*;
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::types::{Domain, TypedParam};
use xml_schemas::cpuset;

use super::{AFFECT_CONFIG, AFFECT_LIVE, ANY, affected, domain_xml, find_domain, params};
use crate::command::{Args, Command, DOMAIN, data, flag, number, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::table::Table;

const CONFIG: crate::command::Opt = flag("config", "from the next boot on");
const LIVE: crate::command::Opt = flag("live", "for the running domain");
const CURRENT: crate::command::Opt = flag("current", "for the domain as it is now");

/// `setvcpus`
pub const SETVCPUS: Command = Command {
    name: "setvcpus",
    summary: "change number of virtual CPUs",
    description: "Changes how many virtual CPUs a domain has.",
    options: &[
        DOMAIN,
        number("count", "how many").required(),
        flag(
            "maximum",
            "how many it can have at most, from the next boot on",
        ),
        CONFIG,
        LIVE,
        CURRENT,
        flag("guest", "ask the guest to use as many"),
        flag("hotpluggable", "those that are added can be removed again"),
    ],
    handler: setvcpus,
    connects: true,
};

/// `setvcpu`
pub const SETVCPU: Command = Command {
    name: "setvcpu",
    summary: "attach/detach vcpu or groups of threads",
    description: "Says which virtual CPUs a domain has.",
    options: &[
        DOMAIN,
        data("vcpulist", "the virtual CPUs: 1,3-4"),
        flag("enable", "the domain has them"),
        flag("disable", "the domain does not have them"),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: setvcpu,
    connects: true,
};

/// `guestvcpus`
pub const GUESTVCPUS: Command = Command {
    name: "guestvcpus",
    summary: "query or modify state of vcpu in the guest (via agent)",
    description: "Shows which virtual CPUs the guest uses, or changes it, through its agent.",
    options: &[
        DOMAIN,
        text("cpulist", "the virtual CPUs").named_only(),
        flag("enable", "the guest is to use them"),
        flag("disable", "the guest is to do without them"),
    ],
    handler: guestvcpus,
    connects: true,
};

/// `vcpuinfo`
pub const VCPUINFO: Command = Command {
    name: "vcpuinfo",
    summary: "detailed domain vcpu information",
    description: "Shows a domain's virtual CPUs.",
    options: &[DOMAIN, flag("pretty", "CPUs as ranges of numbers")],
    handler: vcpuinfo,
    connects: true,
};

/// `vcpupin`
pub const VCPUPIN: Command = Command {
    name: "vcpupin",
    summary: "control or query domain vcpu affinity",
    description: "Shows on which CPUs of the host virtual CPUs may run, or changes it.",
    options: &[
        DOMAIN,
        number("vcpu", "the virtual CPU"),
        text("cpulist", "CPUs of the host; without it, they are shown").allow_empty(),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: vcpupin,
    connects: true,
};

/// `emulatorpin`
pub const EMULATORPIN: Command = Command {
    name: "emulatorpin",
    summary: "control or query domain emulator affinity",
    description: "Shows on which CPUs of the host a domain's other threads may run, or changes it.",
    options: &[
        DOMAIN,
        text("cpulist", "CPUs of the host; without it, they are shown").allow_empty(),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: emulatorpin,
    connects: true,
};

/// `iothreadinfo`
pub const IOTHREADINFO: Command = Command {
    name: "iothreadinfo",
    summary: "view domain IOThreads",
    description: "Shows a domain's I/O threads.",
    options: &[DOMAIN, CONFIG, LIVE, CURRENT],
    handler: iothreadinfo,
    connects: true,
};

/// `iothreadadd`
pub const IOTHREADADD: Command = Command {
    name: "iothreadadd",
    summary: "add an IOThread to the guest domain",
    description: "Gives a domain another I/O thread.",
    options: &[
        DOMAIN,
        number("id", "its number").required(),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: iothreadadd,
    connects: true,
};

/// `iothreadset`
pub const IOTHREADSET: Command = Command {
    name: "iothreadset",
    summary: "modifies an existing IOThread of the guest domain",
    description: "Changes how an I/O thread works.",
    options: &[
        DOMAIN,
        number("id", "its number").required(),
        number("poll-max-ns", "how long it polls at most, in nanoseconds"),
        number("poll-grow", "how fast that grows"),
        number("poll-shrink", "how fast that shrinks"),
        number("thread-pool-min", "fewest worker threads"),
        number("thread-pool-max", "most worker threads"),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: iothreadset,
    connects: true,
};

/// `iothreadpin`
pub const IOTHREADPIN: Command = Command {
    name: "iothreadpin",
    summary: "control domain IOThread affinity",
    description: "Says on which CPUs of the host an I/O thread may run.",
    options: &[
        DOMAIN,
        number("iothread", "its number").required(),
        data("cpulist", "CPUs of the host"),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: iothreadpin,
    connects: true,
};

/// `iothreaddel`
pub const IOTHREADDEL: Command = Command {
    name: "iothreaddel",
    summary: "delete an IOThread from the guest domain",
    description: "Takes an I/O thread from a domain.",
    options: &[
        DOMAIN,
        number("id", "its number").required(),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: iothreaddel,
    connects: true,
};

/// `cpu-stats`
pub const CPU_STATS: Command = Command {
    name: "cpu-stats",
    summary: "show domain cpu statistics",
    description: "Shows how much CPU time a domain used, in all and on each CPU of the host.",
    options: &[
        DOMAIN,
        flag("total", "in all only"),
        number("start", "from this CPU on"),
        number("count", "for so many CPUs"),
    ],
    handler: cpu_stats,
    connects: true,
};

fn setvcpus(shell: &mut Shell, args: &Args) -> Result {
    /// virDomainVcpuFlags
    const MAXIMUM: u32 = 4;
    const GUEST: u32 = 8;
    const HOTPLUGGABLE: u32 = 16;
    args.exclusive("current", "live")?;
    args.exclusive("current", "config")?;
    args.exclusive("guest", "config")?;
    args.exclusive("hotpluggable", "guest")?;
    args.requires("maximum", "config")?;
    let mut flags = affected(args)?;
    for (name, bit) in [
        ("guest", GUEST),
        ("maximum", MAXIMUM),
        ("hotpluggable", HOTPLUGGABLE),
    ] {
        if args.has(name) {
            flags |= bit;
        }
    }
    let dom = find_domain(shell, args, ANY)?;
    let nvcpus: u32 = args.number("count")?.unwrap_or(0);
    if nvcpus == 0 {
        return Err(Failure::new("Can't set 0 processors for a VM"));
    }
    if flags == 0 && !args.has("current") {
        let asked = DomainSetVcpusArgs { dom, nvcpus };
        return shell.call(procs::DOMAIN_SET_VCPUS, &asked);
    }
    let asked = DomainSetVcpusFlagsArgs { dom, nvcpus, flags };
    shell.call(procs::DOMAIN_SET_VCPUS_FLAGS, &asked)
}

fn setvcpu(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("enable", "disable")?;
    let flags = affected(args)?;
    if !args.has("enable") && !args.has("disable") {
        return Err(Failure::new("one of --enable, --disable is required"));
    }
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainSetVcpuArgs {
        dom,
        cpumap: args.required("vcpulist")?.to_owned(),
        state: i32::from(args.has("enable")),
        flags,
    };
    shell.call(procs::DOMAIN_SET_VCPU, &asked)
}

fn guestvcpus(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("enable", "disable")?;
    args.requires("enable", "cpulist")?;
    args.requires("disable", "cpulist")?;
    let list = args.text("cpulist")?.map(str::to_owned);
    if list.is_some() && !args.has("enable") && !args.has("disable") {
        return Err(Failure::new(
            "One of options --enable or --disable is required by option --cpulist",
        ));
    }
    let dom = find_domain(shell, args, ANY)?;
    if let Some(cpumap) = list {
        let state = i32::from(args.has("enable"));
        let asked = DomainSetGuestVcpusArgs {
            dom,
            cpumap,
            state,
            flags: 0,
        };
        return shell.call(procs::DOMAIN_SET_GUEST_VCPUS, &asked);
    }
    let asked = DomainGetGuestVcpusArgs { dom, flags: 0 };
    let found = shell.call(procs::DOMAIN_GET_GUEST_VCPUS, &asked)?;
    shell.out.print(params::lines(&found.params.0));
    Ok(())
}

/// How many CPUs the host has.
fn host_cpus(shell: &mut Shell) -> Result<u32> {
    let asked = NodeGetCpuMapArgs::default();
    let ret = shell.call(procs::NODE_GET_CPU_MAP, &asked)?.ret;
    Ok(u32::try_from(ret).unwrap_or(0))
}

/// Bytes of a map of so many CPUs.
fn map_length(cpus: u32) -> i32 {
    i32::try_from(cpus.div_ceil(8)).unwrap_or(i32::MAX)
}

/// A list of CPUs as a map; `r` is all of them.
fn cpu_list(list: &str, cpus: u32) -> Result<Vec<u8>> {
    let set: BTreeSet<u32> = if list == "r" {
        (0..cpus).collect()
    } else {
        // As large a map as virsh makes.
        let fits = |set: &BTreeSet<u32>| set.last().is_none_or(|last| *last < 1024);
        let bad = || Failure::new(format!("Invalid cpulist '{list}'"));
        let set = cpuset::parse(list).filter(fits).ok_or_else(|| {
            let mut failure = bad();
            let why = format!("invalid argument: Failed to parse bitmap '{list}'");
            failure.lines.push(why);
            failure
        })?;
        if set.is_empty() {
            return Err(bad());
        }
        set
    };
    if let Some(last) = set.last().filter(|last| **last >= cpus) {
        return Err(Failure::new(format!(
            "CPU {last} in cpulist '{list}' exceed the maxcpu {cpus}"
        )));
    }
    Ok(cpuset::to_map(&set, cpus.div_ceil(8) as usize))
}

/// The vCPUs that a domain that is off will have.
fn vcpus_of(xml: &str) -> Vec<u32> {
    let Ok(root) = xml_schemas::dom::parse(xml, "(domain)") else {
        return Vec::new();
    };
    if let Some(list) = root.child("vcpus") {
        let on = list.elements().filter(|v| v.attr("enabled") == Some("yes"));
        return on.filter_map(|v| v.attr("id")?.parse().ok()).collect();
    }
    let vcpu = root.child("vcpu");
    let current = vcpu.and_then(|v| v.attr("current")?.parse().ok());
    let most = vcpu.and_then(|v| v.text().trim().parse().ok());
    (0..current.or(most).unwrap_or(1)).collect()
}

fn affinity(map: &[u8], cpus: u32, pretty: bool) -> String {
    let set = cpuset::from_map(map);
    if pretty {
        return format!(
            "{:<15} {} (out of {cpus})\n",
            "CPU Affinity:",
            cpuset::format(&set)
        );
    }
    let bit = |cpu| if set.contains(&cpu) { 'y' } else { '-' };
    let bits: String = (0..cpus).map(bit).collect();
    format!("{:<15} {bits}\n", "CPU Affinity:")
}

fn vcpuinfo(shell: &mut Shell, args: &Args) -> Result {
    /// VIR_DOMAIN_SHUTOFF
    const SHUTOFF: u32 = 5;
    let pretty = args.has("pretty");
    let dom = find_domain(shell, args, ANY)?;
    let cpus = host_cpus(shell)?;
    let info = shell.call(
        procs::DOMAIN_GET_INFO,
        &DomainGetInfoArgs { dom: dom.clone() },
    )?;
    let count = i32::try_from(info.nr_virt_cpu).unwrap_or(i32::MAX);
    let maplen = map_length(cpus);
    let length = maplen as usize;
    let asked = DomainGetVcpusArgs {
        dom: dom.clone(),
        maxinfo: count,
        maplen,
    };
    let mut blocks = Vec::new();
    match shell.call(procs::DOMAIN_GET_VCPUS, &asked) {
        Ok(found) => {
            for (at, vcpu) in found.info.0.iter().enumerate() {
                let mut text = format!("{:<15} {}\n", "VCPU:", vcpu.number);
                let cpu = match vcpu.cpu {
                    -2 | -1 => "N/A".to_owned(),
                    cpu => cpu.to_string(),
                };
                text.push_str(&format!("{:<15} {cpu}\n", "CPU:"));
                let state = match vcpu.state {
                    0 => "offline",
                    1 => "running",
                    2 => "blocked",
                    _ => "no state",
                };
                text.push_str(&format!("{:<15} {state}\n", "State:"));
                if vcpu.cpu_time != 0 {
                    let seconds = vcpu.cpu_time as f64 / 1e9;
                    text.push_str(&format!("{:<15} {seconds:.1}s\n", "CPU time:"));
                }
                let map = found.cpumaps.get(at * length..(at + 1) * length);
                text.push_str(&affinity(map.unwrap_or_default(), cpus, pretty));
                blocks.push(text);
            }
        }
        Err(failure) if info.state != SHUTOFF || failure.disconnected => return Err(failure),
        Err(_) => {
            let vcpus = vcpus_of(&domain_xml(shell, &dom, 2)?);
            let ncpumaps = vcpus.last().map_or(1, |last| last + 1);
            let asked = DomainGetVcpuPinInfoArgs {
                dom,
                ncpumaps: i32::try_from(ncpumaps).unwrap_or(i32::MAX),
                maplen,
                flags: AFFECT_CONFIG,
            };
            let found = shell.call(procs::DOMAIN_GET_VCPU_PIN_INFO, &asked)?;
            for vcpu in vcpus {
                let mut text = format!("{:<15} {vcpu}\n", "VCPU:");
                for name in ["CPU:", "State:", "CPU time"] {
                    text.push_str(&format!("{name:<15} N/A\n"));
                }
                let at = vcpu as usize;
                let map = found.cpumaps.get(at * length..(at + 1) * length);
                text.push_str(&affinity(map.unwrap_or_default(), cpus, pretty));
                blocks.push(text);
            }
        }
    }
    shell.out.print(blocks.join("\n"));
    Ok(())
}

fn vcpupin(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let list = args.text("cpulist")?.map(str::to_owned);
    let vcpu: Option<u32> = args.number("vcpu")?;
    if list.is_some() && vcpu.is_none() {
        return Err(Failure::new("vcpupin: Missing vCPU number in pin mode."));
    }
    let dom = find_domain(shell, args, ANY)?;
    let cpus = host_cpus(shell)?;
    if let (Some(list), Some(vcpu)) = (list, vcpu) {
        let cpumap = cpu_list(&list, cpus)?.into();
        if flags == 0 && !args.has("current") {
            let asked = DomainPinVcpuArgs { dom, vcpu, cpumap };
            return shell.call(procs::DOMAIN_PIN_VCPU, &asked);
        }
        let asked = DomainPinVcpuFlagsArgs {
            dom,
            vcpu,
            cpumap,
            flags,
        };
        return shell.call(procs::DOMAIN_PIN_VCPU_FLAGS, &asked);
    }
    let count = maximum(shell, &dom, flags)?;
    if let Some(vcpu) = vcpu.filter(|vcpu| i64::from(*vcpu) >= i64::from(count)) {
        let live = flags & AFFECT_LIVE != 0 || (flags & AFFECT_CONFIG == 0 && dom.id >= 0);
        let which = if live { "live" } else { "persistent" };
        return Err(Failure::new(format!(
            "vcpu {vcpu} is out of range of {which} cpu count {count}"
        )));
    }
    let maplen = map_length(cpus);
    let asked = DomainGetVcpuPinInfoArgs {
        dom,
        ncpumaps: count,
        maplen,
        flags,
    };
    let found = shell.call(procs::DOMAIN_GET_VCPU_PIN_INFO, &asked)?;
    let mut table = Table::new(&["VCPU", "CPU Affinity"]);
    for (at, map) in found.cpumaps.chunks(maplen.max(1) as usize).enumerate() {
        if vcpu.is_none_or(|vcpu| vcpu as usize == at) {
            table.row([at.to_string(), cpuset::format(&cpuset::from_map(map))]);
        }
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

fn maximum(shell: &mut Shell, dom: &Domain, flags: u32) -> Result<i32> {
    /// VIR_DOMAIN_VCPU_MAXIMUM
    const MAXIMUM: u32 = 4;
    let asked = DomainGetVcpusFlagsArgs {
        dom: dom.clone(),
        flags: flags | MAXIMUM,
    };
    let counted = shell.call(procs::DOMAIN_GET_VCPUS_FLAGS, &asked);
    match counted {
        Ok(found) => Ok(found.num),
        Err(failure) if failure.disconnected => Err(failure),
        // Only a failure that says why not is worth its line.
        Err(failure)
            if !matches!(
                failure.code,
                Some(ErrorCode::OPERATION_INVALID | ErrorCode::INVALID_ARG)
            ) =>
        {
            Err(failure)
        }
        Err(_) => Err(Failure::new(if flags & AFFECT_LIVE != 0 {
            "cannot get vcpupin for offline domain"
        } else {
            "cannot get vcpupin for transient domain"
        })),
    }
}

fn emulatorpin(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let list = args.text("cpulist")?.map(str::to_owned);
    let cpus = host_cpus(shell)?;
    if let Some(list) = list {
        let cpumap = cpu_list(&list, cpus)?.into();
        let flags = match flags {
            0 if !args.has("current") => AFFECT_LIVE,
            flags => flags,
        };
        let asked = DomainPinEmulatorArgs { dom, cpumap, flags };
        return shell.call(procs::DOMAIN_PIN_EMULATOR, &asked);
    }
    let asked = DomainGetEmulatorPinInfoArgs {
        dom,
        maplen: map_length(cpus),
        flags,
    };
    let found = shell.call(procs::DOMAIN_GET_EMULATOR_PIN_INFO, &asked)?;
    shell.out.print_extra("emulator: CPU Affinity\n");
    shell
        .out
        .print_extra("----------------------------------\n");
    shell.out.print_extra("       *: ");
    let set = cpuset::format(&cpuset::from_map(&found.cpumaps));
    shell.out.print(format!("{set}\n"));
    Ok(())
}

fn iothreadinfo(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    host_cpus(shell)?;
    let asked = DomainGetIothreadInfoArgs { dom, flags };
    let found = shell
        .call(procs::DOMAIN_GET_IOTHREAD_INFO, &asked)
        .context("Unable to get domain IOThreads information")?;
    if found.info.is_empty() {
        shell.out.print_extra("No IOThreads found for the domain");
        return Ok(());
    }
    let mut table = Table::new(&["IOThread ID", "CPU Affinity"]);
    for thread in &found.info.0 {
        let cpus = cpuset::format(&cpuset::from_map(&thread.cpumap));
        table.row([thread.iothread_id.to_string(), cpus]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

/// The number of an I/O thread.
fn thread_id(args: &Args, option: &str) -> Result<u32> {
    let id: i32 = args.number(option)?.unwrap_or(0);
    u32::try_from(id)
        .ok()
        .filter(|id| *id > 0)
        .ok_or_else(|| Failure::new(format!("Invalid IOThread id value: '{id}'")))
}

fn iothreadadd(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let iothread_id = thread_id(args, "id")?;
    let asked = DomainAddIothreadArgs {
        dom,
        iothread_id,
        flags,
    };
    shell.call(procs::DOMAIN_ADD_IOTHREAD, &asked)
}

fn iothreaddel(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let iothread_id = thread_id(args, "id")?;
    let asked = DomainDelIothreadArgs {
        dom,
        iothread_id,
        flags,
    };
    shell.call(procs::DOMAIN_DEL_IOTHREAD, &asked)
}

fn iothreadset(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let iothread_id = thread_id(args, "id")?;
    let mut values: Vec<TypedParam> = Vec::new();
    if let Some(value) = args.number::<u64>("poll-max-ns")? {
        values.push(TypedParam::new("poll_max_ns", value));
    }
    for (option, field) in [("poll-grow", "poll_grow"), ("poll-shrink", "poll_shrink")] {
        if let Some(value) = args.number::<u32>(option)? {
            values.push(TypedParam::new(field, value));
        }
    }
    for (option, field) in [
        ("thread-pool-min", "thread_pool_min"),
        ("thread-pool-max", "thread_pool_max"),
    ] {
        if let Some(value) = args.number::<i32>(option)? {
            values.push(TypedParam::new(field, value));
        }
    }
    if values.is_empty() {
        return Err(Failure::new("Not enough arguments passed, nothing to set"));
    }
    let asked = DomainSetIothreadParamsArgs {
        dom,
        iothread_id,
        params: values.into(),
        flags,
    };
    shell.call(procs::DOMAIN_SET_IOTHREAD_PARAMS, &asked)
}

fn iothreadpin(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let list = args.required("cpulist")?.to_owned();
    let iothreads_id: u32 = args.number("iothread")?.unwrap_or(0);
    let cpus = host_cpus(shell)?;
    let asked = DomainPinIothreadArgs {
        dom,
        iothreads_id,
        cpumap: cpu_list(&list, cpus)?.into(),
        flags,
    };
    shell.call(procs::DOMAIN_PIN_IOTHREAD, &asked)
}

fn cpu_stats(shell: &mut Shell, args: &Args) -> Result {
    let start: Option<i32> = args.number("start")?;
    let wanted: Option<i32> = args.number("count")?;
    let dom = find_domain(shell, args, ANY)?;
    if start.is_some_and(|start| start < 0) {
        return Err(Failure::new("Invalid value for start CPU"));
    }
    if wanted.is_some_and(|count| count < 0) {
        return Err(Failure::new("Invalid value for number of CPUs to show"));
    }
    let mut total = args.has("total");
    let mut each = start.is_some() || wanted.is_some();
    if !total && !each {
        (total, each) = (true, true);
    }
    let failed = format!(
        "Failed to retrieve CPU statistics for domain '{}'",
        dom.name
    );
    let ask = |shell: &mut Shell, nparams: u32, start_cpu: i32, ncpus: u32| {
        let asked = DomainGetCpuStatsArgs {
            dom: dom.clone(),
            nparams,
            start_cpu,
            ncpus,
            flags: 0,
        };
        shell
            .call(procs::DOMAIN_GET_CPU_STATS, &asked)
            .context(failed.clone())
    };
    if each {
        let most = ask(shell, 0, 0, 0)?.nparams;
        let first = start.unwrap_or(0);
        if first > 0 && first >= most {
            return Err(Failure::new(format!(
                "Start CPU {first} is out of range (min: 0, max: {})",
                most - 1
            )));
        }
        let count = match wanted {
            Some(count) if count <= most => count,
            Some(_) => {
                shell
                    .out
                    .print(format!("Only {most} CPUs available to show\n"));
                most - first
            }
            None => most - first,
        };
        let nparams = u32::try_from(ask(shell, 0, 0, 1)?.nparams).unwrap_or(0);
        if nparams == 0 {
            shell.out.print("No per-CPU stats available");
            if !total {
                return Err(Failure::silent());
            }
        } else {
            for cpu in first..first.saturating_add(count) {
                let found = ask(shell, nparams, cpu, 1)?.params.0;
                shell.out.print(format!("CPU{cpu}:\n"));
                shell.out.print(times(&found));
            }
        }
    }
    if total {
        let nparams = u32::try_from(ask(shell, 0, -1, 1)?.nparams).unwrap_or(0);
        if nparams == 0 {
            shell.out.print("No total stats available");
            return Ok(());
        }
        let found = ask(shell, nparams, -1, 1)?.params.0;
        shell.out.print("Total:\n");
        shell.out.print(times(&found));
    }
    Ok(())
}

/// CPU times, in seconds.
fn times(params: &[TypedParam]) -> String {
    let line = |param: &TypedParam| match param.value {
        rpc::types::TypedValue::ULLong(ns) => format!(
            "\t{:<12} {:>9}.{:09} seconds\n",
            param.field,
            ns / 1_000_000_000,
            ns % 1_000_000_000
        ),
        ref value => format!("\t{:<12} {}\n", param.field, params::text(value)),
    };
    params.iter().map(line).collect()
}
