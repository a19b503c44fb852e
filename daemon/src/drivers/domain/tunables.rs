//! How much of the host a domain gets: scheduler, memory, block devices, NUMA nodes, performance events.
//!
//! All of it is kept in definitions; for running domains it is in force through control groups ([`super::limits`]).

use std::sync::Arc;

use rpc::types::{TypedParam, TypedValue};
use xml_schemas::cpuset;
use xml_schemas::dom::Element;
use xml_schemas::domain::View;
use xml_schemas::{Domain as Definition, Validation};

use super::Driver;
use super::limits::{self, PERIOD, QUOTA};
use super::metadata::{chosen, impact};
use super::object::{Domain, Pinned};
use super::sections::{self, section};
use crate::error::{Error, ErrorCode, Result};
use crate::events::DomainEvent;

/// VIR_DOMAIN_MEMORY_PARAM_UNLIMITED, in KiB.
pub(super) const UNLIMITED: u64 = 9_007_199_254_740_991;

/// A kind of tunable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunable {
    /// `<cputune>`: shares and quotas.
    Scheduler,
    /// `<memtune>`.
    Memory,
    /// `<blkiotune>`.
    Block,
    /// `<numatune>`.
    Numa,
    /// `<perf>`.
    Perf,
}

/// The scheduler's parameters, the elements they are kept in, and whether -1 is a value.
pub(super) const SCHEDULER: [(&str, &str, bool); 9] = [
    ("cpu_shares", "shares", false),
    ("vcpu_period", "period", false),
    ("vcpu_quota", "quota", true),
    ("emulator_period", "emulator_period", false),
    ("emulator_quota", "emulator_quota", true),
    ("global_period", "global_period", false),
    ("global_quota", "global_quota", true),
    ("iothread_period", "iothread_period", false),
    ("iothread_quota", "iothread_quota", true),
];

const MEMORY: [&str; 3] = ["hard_limit", "soft_limit", "swap_hard_limit"];

/// Parameters of single devices, and the elements of `<device>` they are kept in.
pub(super) const DEVICES: [(&str, &str); 5] = [
    ("device_weight", "weight"),
    ("device_read_iops_sec", "read_iops_sec"),
    ("device_write_iops_sec", "write_iops_sec"),
    ("device_read_bytes_sec", "read_bytes_sec"),
    ("device_write_bytes_sec", "write_bytes_sec"),
];

/// `<memory mode=…>` by virDomainNumatuneMemMode.
const MODES: [&str; 4] = ["strict", "preferred", "interleave", "restrictive"];

/// virPerfEventType's names.
const EVENTS: [&str; 22] = [
    "cmt",
    "mbmt",
    "mbml",
    "cpu_cycles",
    "instructions",
    "cache_references",
    "cache_misses",
    "branch_instructions",
    "branch_misses",
    "bus_cycles",
    "stalled_cycles_frontend",
    "stalled_cycles_backend",
    "ref_cpu_cycles",
    "cpu_clock",
    "task_clock",
    "page_faults",
    "context_switches",
    "cpu_migrations",
    "page_faults_min",
    "page_faults_maj",
    "alignment_faults",
    "emulation_faults",
];

fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::INVALID_ARG, text)
}

impl Tunable {
    /// What is said where a running domain is meant, if that is not to be had.
    pub fn missing(self) -> Error {
        match self {
            Self::Scheduler => Error::invalid("cgroup CPU controller is not mounted"),
            Self::Memory => Error::invalid("cgroup memory controller is not mounted"),
            Self::Block => Error::invalid("blkio cgroup isn't mounted"),
            Self::Numa => Error::invalid("cgroup cpuset controller is not mounted"),
            Self::Perf => Error::new(
                ErrorCode::ARGUMENT_UNSUPPORTED,
                "performance events of running domains are not counted",
            ),
        }
    }

    fn values(self, definition: &Definition) -> Vec<TypedParam> {
        match self {
            Self::Scheduler => scheduler(definition),
            Self::Memory => memory(definition),
            Self::Block => block(definition),
            Self::Numa => numa(definition),
            Self::Perf => perf(definition),
        }
    }

    fn set(self, definition: &mut Definition, params: &[TypedParam]) -> Result<()> {
        for param in params {
            match self {
                Self::Scheduler => set_scheduler(definition, param)?,
                Self::Memory => set_memory(definition, param)?,
                Self::Block => set_block(definition, param)?,
                Self::Numa => set_numa(definition, param)?,
                Self::Perf => set_perf(definition, param)?,
            }
        }
        if self == Self::Memory {
            let limit = |name| memory_limit(definition, name).unwrap_or(UNLIMITED);
            if limit("hard_limit") > limit("swap_hard_limit") {
                return Err(invalid(
                    "memory hard_limit tunable value must be lower than or equal to swap_hard_limit",
                ));
            }
        }
        Ok(())
    }
}

fn number(value: &TypedValue) -> Option<i64> {
    match value {
        TypedValue::Int(value) => Some((*value).into()),
        TypedValue::UInt(value) => Some((*value).into()),
        TypedValue::LLong(value) => Some(*value),
        TypedValue::ULLong(value) => i64::try_from(*value).ok(),
        _ => None,
    }
}

fn wrong(param: &TypedParam) -> Error {
    invalid(format!("invalid type for parameter '{}'", param.field))
}

fn unknown(param: &TypedParam) -> Error {
    Error::new(
        ErrorCode::ARGUMENT_UNSUPPORTED,
        format!("parameter '{}' not supported", param.field),
    )
}

fn text(param: &TypedParam) -> Result<&str> {
    match &param.value {
        TypedValue::String(text) => Ok(text),
        _ => Err(wrong(param)),
    }
}

fn scheduler(definition: &Definition) -> Vec<TypedParam> {
    let tune = section(definition, "cputune");
    let value = |name: &str| tune.and_then(|tune| tune.child_text(name));
    let param = |(name, element, signed): (&str, &str, bool)| {
        let text = value(element).unwrap_or_default();
        if signed {
            TypedParam::new(name, text.trim().parse::<i64>().unwrap_or(0))
        } else {
            TypedParam::new(name, text.trim().parse::<u64>().unwrap_or(0))
        }
    };
    SCHEDULER.into_iter().map(param).collect()
}

fn set_scheduler(definition: &mut Definition, param: &TypedParam) -> Result<()> {
    let known = SCHEDULER.iter().find(|(name, ..)| *name == param.field);
    let (name, element, signed) = known.ok_or_else(|| unknown(param))?;
    let value = number(&param.value).ok_or_else(|| wrong(param))?;
    let range = if *signed { QUOTA } else { PERIOD };
    let out = (value > 0 && value < range.0) || value > range.1 || (value < 0 && !signed);
    if *name != "cpu_shares" && out {
        return Err(invalid(format!(
            "value of '{name}' is out of range [{}, {}]",
            range.0, range.1
        )));
    }
    // Any negative quota is none; one form of it is read again.
    let value = value.max(-1);
    let child = (value != 0).then(|| Element::with_text(*element, value.to_string()));
    sections::set_child(definition, "cputune", element, child);
    Ok(())
}

/// A limit of memory in KiB.
pub(super) fn memory_limit(definition: &Definition, name: &str) -> Option<u64> {
    let text = section(definition, "memtune")?.child_text(name)?;
    text.trim().parse().ok()
}

fn memory(definition: &Definition) -> Vec<TypedParam> {
    let limit = |name| memory_limit(definition, name).unwrap_or(UNLIMITED);
    MEMORY
        .into_iter()
        .map(|name| TypedParam::new(name, limit(name)))
        .collect()
}

fn set_memory(definition: &mut Definition, param: &TypedParam) -> Result<()> {
    if !MEMORY.contains(&param.field.as_str()) {
        return Err(unknown(param));
    }
    let TypedValue::ULLong(kib) = param.value else {
        return Err(wrong(param));
    };
    let child = (kib < UNLIMITED).then(|| {
        Element::with_text(param.field.as_str(), kib.to_string()).with_attr("unit", "KiB")
    });
    sections::set_child(definition, "memtune", &param.field, child);
    Ok(())
}

fn block(definition: &Definition) -> Vec<TypedParam> {
    let tune = section(definition, "blkiotune");
    let weight = tune.and_then(|tune| tune.child_text("weight")?.trim().parse::<u32>().ok());
    let mut params = vec![TypedParam::new("weight", weight.unwrap_or(0))];
    for (name, element) in DEVICES {
        let devices = tune
            .into_iter()
            .flat_map(Element::elements)
            .filter(|e| e.name == "device");
        let of = |device: &Element| {
            let value = device.child_text(element)?;
            Some(format!(
                "{},{}",
                device.child_text("path")?.trim(),
                value.trim()
            ))
        };
        let list: Vec<String> = devices.filter_map(of).collect();
        params.push(TypedParam::new(name, list.join(",")));
    }
    params
}

fn set_block(definition: &mut Definition, param: &TypedParam) -> Result<()> {
    if param.field == "weight" {
        let weight = number(&param.value).ok_or_else(|| wrong(param))?;
        let child = (weight != 0).then(|| Element::with_text("weight", weight.to_string()));
        sections::set_child(definition, "blkiotune", "weight", child);
        return Ok(());
    }
    let known = DEVICES.iter().find(|(name, _)| *name == param.field);
    let (_, element) = known.ok_or_else(|| unknown(param))?;
    let list = text(param)?;
    let parts: Vec<&str> = list.split(',').filter(|part| !part.is_empty()).collect();
    let bad = || {
        invalid(format!(
            "unable to parse blkio device '{}' '{list}'",
            param.field
        ))
    };
    if parts.is_empty() || !parts.len().is_multiple_of(2) {
        return Err(bad());
    }
    for pair in parts.chunks(2) {
        let path = pair[0];
        let value = pair[1].parse::<u64>().map_err(|_| {
            invalid(format!(
                "invalid value '{}' for parameter '{}' of device '{path}'",
                pair[1], param.field
            ))
        })?;
        set_device(definition, path, element, value);
    }
    Ok(())
}

fn set_device(definition: &mut Definition, path: &str, element: &str, value: u64) {
    sections::change(definition, "blkiotune", |tune| {
        let mut devices = tune.take_children("device");
        let is = |device: &Element| device.child_text("path").is_some_and(|p| p.trim() == path);
        let at = devices.iter().position(is).unwrap_or_else(|| {
            devices.push(Element::new("device").with_child(Element::with_text("path", path)));
            devices.len() - 1
        });
        let device = &mut devices[at];
        device.take_children(element);
        if value != 0 {
            device.push(Element::with_text(element, value.to_string()));
        }
        // One that only has its path says nothing.
        devices.retain(|device| device.elements().count() > 1);
        devices.into_iter().for_each(|device| tune.push(device));
    });
}

/// `<numatune><memory>`: mode and nodes.
pub(super) fn numa_memory(definition: &Definition) -> Option<(&str, Option<&str>)> {
    let memory = section(definition, "numatune")?.child("memory")?;
    Some((
        memory.attr("mode").unwrap_or(MODES[0]),
        memory.attr("nodeset"),
    ))
}

fn numa(definition: &Definition) -> Vec<TypedParam> {
    let (mode, nodes) = numa_memory(definition).unwrap_or((MODES[0], None));
    let mode = MODES.iter().position(|known| *known == mode).unwrap_or(0);
    let nodes = nodes.unwrap_or_default();
    vec![
        TypedParam::new("numa_mode", i32::try_from(mode).unwrap_or(0)),
        TypedParam::new("numa_nodeset", nodes),
    ]
}

fn set_numa(definition: &mut Definition, param: &TypedParam) -> Result<()> {
    let (name, value) = match param.field.as_str() {
        "numa_mode" => {
            let number = number(&param.value).ok_or_else(|| wrong(param))?;
            let mode = usize::try_from(number).ok().and_then(|at| MODES.get(at));
            let mode =
                mode.ok_or_else(|| invalid(format!("unsupported numatune mode: '{number}'")))?;
            ("mode", (*mode).to_owned())
        }
        "numa_nodeset" => {
            let text = text(param)?;
            let nodes = cpuset::parse(text)
                .ok_or_else(|| invalid(format!("Failed to parse bitmap '{text}'")))?;
            ("nodeset", cpuset::format(&nodes))
        }
        _ => return Err(unknown(param)),
    };
    sections::change(definition, "numatune", |tune| {
        let mut memory = tune
            .take_child("memory")
            .unwrap_or_else(|| Element::new("memory"));
        memory.set_attr(name, value);
        if memory.attr("mode").is_none() {
            memory.set_attr("mode", MODES[0]);
        }
        tune.push(memory);
    });
    Ok(())
}

fn perf(definition: &Definition) -> Vec<TypedParam> {
    let events = section(definition, "perf");
    let enabled = |name: &str| {
        let mut all = events.into_iter().flat_map(Element::elements);
        all.any(|e| e.attr("name") == Some(name) && e.attr("enabled") == Some("yes"))
    };
    EVENTS
        .iter()
        .map(|name| TypedParam::new(*name, enabled(name)))
        .collect()
}

fn set_perf(definition: &mut Definition, param: &TypedParam) -> Result<()> {
    if !EVENTS.contains(&param.field.as_str()) {
        return Err(unknown(param));
    }
    let TypedValue::Boolean(enabled) = param.value else {
        return Err(wrong(param));
    };
    sections::change(definition, "perf", |perf| {
        let mut events = perf.take_elements();
        events.retain(|event| event.attr("name") != Some(&param.field));
        events.push(
            Element::new("event")
                .with_attr("name", &param.field)
                .with_attr("enabled", if enabled { "yes" } else { "no" }),
        );
        events.sort_by_key(|e| EVENTS.iter().position(|name| Some(*name) == e.attr("name")));
        events.into_iter().for_each(|event| perf.push(event));
    });
    Ok(())
}

/// What cannot change of a running domain's NUMA nodes: its mode, and in most modes the nodes.
fn check_numa(running: &Definition, params: &[TypedParam]) -> Result<()> {
    let given = |name: &str| params.iter().find(|param| param.field == name);
    let known = numa_memory(running);
    let (mode, nodes) = known.unwrap_or((MODES[0], None));
    let wanted = given("numa_mode").and_then(|param| number(&param.value));
    let wanted = wanted.and_then(|n| MODES.get(usize::try_from(n).ok()?));
    if wanted.is_some_and(|wanted| *wanted != mode) {
        return Err(Error::invalid(
            "can't change numatune mode for running domain",
        ));
    }
    let Some(param) = given("numa_nodeset") else {
        return Err(Error::invalid(format!(
            "can't change nodeset for {mode} mode for running domain"
        )));
    };
    let same = cpuset::parse(text(param)?) == nodes.and_then(cpuset::parse);
    if known.is_some() && !same && mode != "restrictive" {
        return Err(Error::invalid(
            "change of nodeset for running domain requires restrictive numa mode",
        ));
    }
    limits::available(text(param)?)
}

/// What listeners are told of the new values (VIR_DOMAIN_TUNABLE_CPU_*).
fn told(params: &[TypedParam]) -> Vec<TypedParam> {
    let of = |param: TypedParam| TypedParam::new(format!("cputune.{}", param.field), param.value);
    let set = for_running(Tunable::Scheduler, params).into_iter();
    set.map(of).collect()
}

fn is_zero(param: &TypedParam) -> bool {
    number(&param.value) == Some(0)
}

/// What of the parameters changes a running domain: 0 leaves a period or quota as it is there, as in libvirt. In a
/// definition it takes them away.
fn for_running(kind: Tunable, params: &[TypedParam]) -> Vec<TypedParam> {
    let mut params = params.to_vec();
    params.retain(|param| kind != Tunable::Scheduler || !is_zero(param));
    params
}

impl Driver {
    /// The values of a kind.
    ///
    /// # Errors
    /// There is no such definition; a running domain's are not to be had.
    pub fn tunables(&self, domain: &Domain, kind: Tunable, flags: u32) -> Result<Vec<TypedParam>> {
        let (live, values) = {
            let inner = domain.lock();
            let (live, _) = impact(&inner, flags)?;
            (live, kind.values(&*chosen(&inner, flags)?))
        };
        if live {
            return self.live_tunables(domain, kind, values);
        }
        Ok(values)
    }

    /// Changes values of a kind.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG for what is no value; what the kernel refuses.
    pub async fn set_tunables(
        self: &Arc<Self>,
        domain: Pinned,
        kind: Tunable,
        params: &[TypedParam],
        flags: u32,
    ) -> Result<()> {
        let live = async |running: &Definition| {
            if kind == Tunable::Numa {
                check_numa(running, params)?;
            }
            if params
                .iter()
                .any(|param| param.field == "cpu_shares" && is_zero(param))
            {
                return Err(limits::zero_shares());
            }
            let mut new = running.clone();
            kind.set(&mut new, &for_running(kind, params))?;
            self.limit(&domain, kind, Arc::new(running.clone()), new)
                .await
        };
        let change = |definition: &mut Definition, view: View| {
            match view {
                View::Inactive => kind.set(definition, params)?,
                View::Live => kind.set(definition, &for_running(kind, params))?,
            }
            // What no start would accept.
            let sets = |what: &str| params.iter().any(|param| param.field.starts_with(what));
            if kind == Tunable::Scheduler && sets("cpu_shares") {
                limits::check_set(definition)?;
            }
            // What could not be read again would be lost with the daemon.
            let text = definition.format(View::Inactive);
            let read = Definition::parse(&text, Validation::Lenient);
            read.map(drop).map_err(|error| invalid(error.to_string()))
        };
        let was_live = impact(&domain.lock(), flags)?.0;
        self.modify_each(&domain, flags, live, change).await?;
        if was_live && kind == Tunable::Scheduler {
            let event = DomainEvent::Tunable(told(params));
            self.emit(&domain.name(), &event);
        }
        Ok(())
    }
}
