//! How much of the host a domain gets: `schedinfo`, `memtune`, `blkiotune`, `numatune`, `perf`.

use rpc::args::*;
use rpc::procs;
use rpc::types::{TypedParam, TypedValue};

use super::{ANY, affected, find_domain, params};
use crate::command::{Args, Command, DOMAIN, Opt, flag, number, rest, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::size;

/// `VIR_TYPED_PARAM_STRING_OKAY`
const STRINGS: u32 = 4;
/// `VIR_DOMAIN_MEMORY_PARAM_UNLIMITED`
const UNLIMITED: u64 = 9_007_199_254_740_991;

const CONFIG: Opt = flag("config", "from the next boot on");
const LIVE: Opt = flag("live", "for the running domain");
const CURRENT: Opt = flag("current", "for the domain as it is now");

/// `schedinfo`
pub const SCHEDINFO: Command = Command {
    name: "schedinfo",
    summary: "show/set scheduler parameters",
    description: "Shows or changes how much CPU time a domain gets.",
    options: &[
        DOMAIN,
        number("weight", "Xen's weight").named_only(),
        number("cap", "Xen's cap").named_only(),
        CURRENT,
        CONFIG,
        LIVE,
        rest("set", "NAME=VALUE"),
    ],
    handler: schedinfo,
    connects: true,
};

/// `memtune`
pub const MEMTUNE: Command = Command {
    name: "memtune",
    summary: "Get or set memory parameters",
    description: "Shows or changes a domain's limits of memory.",
    options: &[
        DOMAIN,
        number("hard-limit", "most memory (KiB without a unit)"),
        number("soft-limit", "most memory while it is scarce"),
        number("swap-hard-limit", "most memory and swap"),
        number("min-guarantee", "least memory"),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: memtune,
    connects: true,
};

/// `blkiotune`
pub const BLKIOTUNE: Command = Command {
    name: "blkiotune",
    summary: "Get or set blkio parameters",
    description: "Shows or changes how much of the host's block devices a domain gets.",
    options: &[
        DOMAIN,
        number("weight", "its weight"),
        text("device-weights", "DEVICE,WEIGHT,..."),
        text("device-read-iops-sec", "DEVICE,READS A SECOND,..."),
        text("device-write-iops-sec", "DEVICE,WRITES A SECOND,..."),
        text("device-read-bytes-sec", "DEVICE,BYTES READ A SECOND,..."),
        text(
            "device-write-bytes-sec",
            "DEVICE,BYTES WRITTEN A SECOND,...",
        ),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: blkiotune,
    connects: true,
};

/// `numatune`
pub const NUMATUNE: Command = Command {
    name: "numatune",
    summary: "Get or set numa parameters",
    description: "Shows or changes from which NUMA nodes a domain's memory comes.",
    options: &[
        DOMAIN,
        text("mode", "strict, preferred, interleave or restrictive"),
        text("nodeset", "the nodes"),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: numatune,
    connects: true,
};

/// `perf`
pub const PERF: Command = Command {
    name: "perf",
    summary: "Get or set perf event",
    description: "Shows or changes which performance events of a domain are counted.",
    options: &[
        DOMAIN,
        text("enable", "events to be counted"),
        text("disable", "events not to be counted"),
        CONFIG,
        LIVE,
        CURRENT,
    ],
    handler: perf,
    connects: true,
};

fn schedinfo(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainGetSchedulerTypeArgs { dom: dom.clone() };
    let kind = match shell.call(procs::DOMAIN_GET_SCHEDULER_TYPE, &asked) {
        Ok(kind) => kind,
        Err(failure) => {
            shell.out.print(format!("{:<15}: Unknown\n", "Scheduler"));
            return Err(failure);
        }
    };
    shell
        .out
        .print(format!("{:<15}: {}\n", "Scheduler", kind.kind));
    let asked = DomainGetSchedulerParametersFlagsArgs {
        dom: dom.clone(),
        nparams: kind.nparams,
        flags: flags | STRINGS,
    };
    let get = |shell: &mut Shell| {
        let found = shell.call(procs::DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS, &asked);
        found.map(|ret| ret.params.0)
    };
    let mut known = get(shell)?;
    let mut values = Vec::new();
    let given: Vec<(String, String)> = ["weight", "cap"]
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), args.text(name).ok()??.to_owned())))
        .collect();
    let mut wanted = given;
    for word in args.rest("set") {
        let (name, value) = word
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| Failure::new("Invalid syntax for --set, expecting name=value"))?;
        wanted.push((name.to_owned(), value.to_owned()));
    }
    for (name, value) in wanted {
        let Some(param) = known.iter().find(|param| param.field == name) else {
            return Err(Failure::new(format!("invalid scheduler option: {name}")));
        };
        let bad = || {
            Failure::new(format!(
                "invalid argument: Invalid value for field '{name}': expected {}",
                kind_of(&param.value)
            ))
        };
        values.push(TypedParam::new(
            name.clone(),
            like(&param.value, &value).ok_or_else(bad)?,
        ));
    }
    if !values.is_empty() {
        if flags != 0 || args.has("current") {
            let asked = DomainSetSchedulerParametersFlagsArgs {
                dom,
                params: values.into(),
                flags,
            };
            shell.call(procs::DOMAIN_SET_SCHEDULER_PARAMETERS_FLAGS, &asked)?;
        } else {
            let params = values.into();
            let asked = DomainSetSchedulerParametersArgs { dom, params };
            shell.call(procs::DOMAIN_SET_SCHEDULER_PARAMETERS, &asked)?;
        }
        known = get(shell)?;
    }
    shell.out.print(params::lines(&known));
    Ok(())
}

fn kind_of(value: &TypedValue) -> &'static str {
    match value {
        TypedValue::Int(_) => "int",
        TypedValue::UInt(_) => "unsigned int",
        TypedValue::LLong(_) => "long long",
        TypedValue::ULLong(_) => "unsigned long long",
        TypedValue::Double(_) => "double",
        TypedValue::Boolean(_) => "boolean",
        TypedValue::String(_) => "string",
    }
}

/// A value of the same type.
fn like(model: &TypedValue, text: &str) -> Option<TypedValue> {
    Some(match model {
        TypedValue::Int(_) => TypedValue::Int(text.parse().ok()?),
        TypedValue::UInt(_) => TypedValue::UInt(text.parse().ok()?),
        TypedValue::LLong(_) => TypedValue::LLong(text.parse().ok()?),
        TypedValue::ULLong(_) => TypedValue::ULLong(text.parse().ok()?),
        TypedValue::Double(_) => TypedValue::Double(text.parse().ok()?),
        TypedValue::Boolean(_) => TypedValue::Boolean(text.parse::<i32>().ok()? != 0),
        TypedValue::String(_) => TypedValue::String(text.to_owned()),
    })
}

fn memtune(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let mut values = Vec::new();
    for (option, field) in [
        ("hard-limit", "hard_limit"),
        ("soft-limit", "soft_limit"),
        ("swap-hard-limit", "swap_hard_limit"),
        ("min-guarantee", "min_guarantee"),
    ] {
        let Some(text) = args.text(option)? else {
            continue;
        };
        let value = if text.starts_with('-') {
            text.parse::<i64>().ok().map(|_| UNLIMITED)
        } else {
            size::parse(text, 1024)
                .ok()
                .map(|bytes| bytes.div_ceil(1024))
        };
        let value = value
            .ok_or_else(|| Failure::new(format!("Unable to parse integer parameter {option}")))?;
        values.push(TypedParam::new(field, value));
    }
    if !values.is_empty() {
        let params = values.into();
        let asked = DomainSetMemoryParametersArgs { dom, params, flags };
        return shell
            .call(procs::DOMAIN_SET_MEMORY_PARAMETERS, &asked)
            .context("Unable to change memory parameters");
    }
    let asked = |nparams| DomainGetMemoryParametersArgs {
        dom: dom.clone(),
        nparams,
        flags: flags | STRINGS,
    };
    let count = shell
        .call(procs::DOMAIN_GET_MEMORY_PARAMETERS, &asked(0))
        .context("Unable to get number of memory parameters")?
        .nparams;
    let found = shell
        .call(procs::DOMAIN_GET_MEMORY_PARAMETERS, &asked(count))
        .context("Unable to get memory parameters")?;
    for param in &found.params.0 {
        let value = match param.value {
            TypedValue::ULLong(UNLIMITED) => "unlimited".to_owned(),
            ref value => params::text(value),
        };
        shell.out.print(format!("{:<15}: {value}\n", param.field));
    }
    Ok(())
}

fn blkiotune(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let mut values = Vec::new();
    if let Some(text) = args.text("weight")? {
        let weight: i32 = text.parse().map_err(|_| {
            Failure::new(format!(
                "Numeric value '{text}' for <weight> option is malformed or out of range"
            ))
        })?;
        let weight = u32::try_from(weight).ok().filter(|weight| *weight > 0);
        let weight = weight
            .ok_or_else(|| Failure::new(format!("Invalid value of {text} for I/O weight")))?;
        values.push(TypedParam::new("weight", weight));
    }
    for (option, field) in [
        ("device-weights", "device_weight"),
        ("device-read-iops-sec", "device_read_iops_sec"),
        ("device-write-iops-sec", "device_write_iops_sec"),
        ("device-read-bytes-sec", "device_read_bytes_sec"),
        ("device-write-bytes-sec", "device_write_bytes_sec"),
    ] {
        if let Some(list) = args.text(option)? {
            values.push(TypedParam::new(field, list));
        }
    }
    if !values.is_empty() {
        let params = values.into();
        let asked = DomainSetBlkioParametersArgs { dom, params, flags };
        return shell
            .call(procs::DOMAIN_SET_BLKIO_PARAMETERS, &asked)
            .context("Unable to change blkio parameters");
    }
    let asked = |nparams| DomainGetBlkioParametersArgs {
        dom: dom.clone(),
        nparams,
        flags: flags | STRINGS,
    };
    let count = shell
        .call(procs::DOMAIN_GET_BLKIO_PARAMETERS, &asked(0))
        .context("Unable to get number of blkio parameters")?
        .nparams;
    let found = shell
        .call(procs::DOMAIN_GET_BLKIO_PARAMETERS, &asked(count))
        .context("Unable to get blkio parameters")?;
    shell.out.print(params::lines(&found.params.0));
    Ok(())
}

/// virDomainNumatuneMemMode
const MODES: [&str; 4] = ["strict", "preferred", "interleave", "restrictive"];

fn numatune(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let mut values = Vec::new();
    if let Some(nodes) = args.text("nodeset")? {
        values.push(TypedParam::new("numa_nodeset", nodes));
    }
    if let Some(mode) = args.text("mode")? {
        let number = MODES.iter().position(|known| *known == mode);
        let number = number
            .and_then(|at| i32::try_from(at).ok())
            .or_else(|| mode.parse().ok());
        let number = number.ok_or_else(|| Failure::new(format!("Invalid mode: {mode}")))?;
        values.push(TypedParam::new("numa_mode", number));
    }
    if !values.is_empty() {
        let params = values.into();
        let asked = DomainSetNumaParametersArgs { dom, params, flags };
        return shell
            .call(procs::DOMAIN_SET_NUMA_PARAMETERS, &asked)
            .context("Unable to change numa parameters");
    }
    let asked = |nparams| DomainGetNumaParametersArgs {
        dom: dom.clone(),
        nparams,
        flags: flags | STRINGS,
    };
    let count = shell
        .call(procs::DOMAIN_GET_NUMA_PARAMETERS, &asked(0))
        .context("Unable to get number of memory parameters")?
        .nparams;
    let found = shell
        .call(procs::DOMAIN_GET_NUMA_PARAMETERS, &asked(count))
        .context("Unable to get numa parameters")?;
    for param in &found.params.0 {
        let value = match param.value {
            TypedValue::Int(mode) if param.field == "numa_mode" => {
                let name = usize::try_from(mode).ok().and_then(|at| MODES.get(at));
                name.map_or_else(|| "?".to_owned(), |name| (*name).to_owned())
            }
            ref value => params::text(value),
        };
        shell.out.print(format!("{:<15}: {value}\n", param.field));
    }
    Ok(())
}

fn perf(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let mut values = Vec::new();
    for (option, enabled) in [("enable", true), ("disable", false)] {
        let list = args.text(option)?.unwrap_or_default();
        for name in list.split(',').filter(|name| !name.is_empty()) {
            values.push(TypedParam::new(name, enabled));
        }
    }
    let word = |param: &TypedParam| match param.value {
        TypedValue::Boolean(true) => "enabled",
        _ => "disabled",
    };
    if !values.is_empty() {
        let lines: Vec<String> = values
            .iter()
            .map(|param| format!("{:<15}: {}\n", param.field, word(param)))
            .collect();
        let params = values.into();
        let asked = DomainSetPerfEventsArgs { dom, params, flags };
        shell
            .call(procs::DOMAIN_SET_PERF_EVENTS, &asked)
            .context("Unable to enable/disable perf events")?;
        shell.out.print_extra(lines.concat());
        return Ok(());
    }
    let asked = DomainGetPerfEventsArgs {
        dom,
        flags: flags | STRINGS,
    };
    let found = shell
        .call(procs::DOMAIN_GET_PERF_EVENTS, &asked)
        .context("Unable to get perf events")?;
    for param in &found.params.0 {
        shell
            .out
            .print(format!("{:<15}: {}\n", param.field, word(param)));
    }
    Ok(())
}
