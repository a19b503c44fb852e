//! Limits of running domains: from what a definition says to control groups, and back.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rpc::types::TypedParam;
use xml_schemas::Domain as Definition;
use xml_schemas::cpuset;
use xml_schemas::dom::Element;

use super::iothreads;
use super::object::{Domain, not_running};
use super::sections::section;
use super::tunables::{DEVICES, SCHEDULER, Tunable, UNLIMITED, memory_limit, numa_memory};
use super::vcpus::{self, Threads};
use super::{Driver, blocking};
use crate::cgroups::{
    self, Controller, DEFAULT_PERIOD, DeviceLimit, Group, Groups, Host, MemoryLimits,
};
use crate::error::{Error, ErrorCode, Result};
use crate::node;

/// The part of a group for threads that are no vCPUs.
const EMULATOR: &str = "emulator";
/// What the parts of I/O threads are called, before their numbers.
const IOTHREAD: &str = "iothread";

/// `<numatune><memory>` modes that the kernel knows as policies (set_mempolicy(2)).
const POLICIES: [(&str, libc::c_int); 3] = [
    ("strict", libc::MPOL_BIND),
    ("preferred", libc::MPOL_PREFERRED),
    ("interleave", libc::MPOL_INTERLEAVE),
];

impl Tunable {
    /// What limits it; performance events are no limits.
    fn controller(self) -> Option<Controller> {
        match self {
            Self::Scheduler => Some(Controller::Cpu),
            Self::Memory => Some(Controller::Memory),
            Self::Block => Some(Controller::Block),
            Self::Numa => Some(Controller::Cpuset),
            Self::Perf => None,
        }
    }

    /// In libvirt's messages.
    fn title(self) -> &'static str {
        match self {
            Self::Scheduler => "CPU tuning",
            Self::Memory => "Memory tuning",
            Self::Block => "Block I/O tuning",
            Self::Numa => "NUMA tuning",
            Self::Perf => "Performance tuning",
        }
    }

    /// Whether a definition asks for a group.
    fn is_asked(self, definition: &Definition) -> bool {
        match self {
            Self::Scheduler => SCHEDULER
                .iter()
                .any(|(_, element, _)| cpu_value(definition, element) != 0),
            Self::Memory => memory_limits(definition) != MemoryLimits::default(),
            Self::Block => {
                weight(definition).is_some() || device_limits(definition).next().is_some()
            }
            Self::Numa => matches!(
                numa_memory(definition),
                Some(("strict" | "restrictive", Some(_)))
            ),
            Self::Perf => false,
        }
    }
}

/// Kinds that groups are for.
const KINDS: [Tunable; 4] = [
    Tunable::Scheduler,
    Tunable::Memory,
    Tunable::Block,
    Tunable::Numa,
];

fn cpu_value(definition: &Definition, element: &str) -> i64 {
    let text = section(definition, "cputune").and_then(|tune| tune.child_text(element));
    text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn memory_limits(definition: &Definition) -> MemoryLimits {
    let limit = |name| memory_limit(definition, name).filter(|kib| *kib < UNLIMITED);
    MemoryLimits {
        hard: limit("hard_limit"),
        soft: limit("soft_limit"),
        swap: limit("swap_hard_limit"),
    }
}

fn weight(definition: &Definition) -> Option<u64> {
    let text = section(definition, "blkiotune")?.child_text("weight")?;
    text.trim().parse().ok().filter(|weight| *weight != 0)
}

/// Limits of block devices: path, limit, value.
fn device_limits(
    definition: &Definition,
) -> impl Iterator<Item = (String, DeviceLimit, u64)> + use<'_> {
    const LIMITS: [DeviceLimit; 5] = [
        DeviceLimit::Weight,
        DeviceLimit::ReadOps,
        DeviceLimit::WriteOps,
        DeviceLimit::ReadBytes,
        DeviceLimit::WriteBytes,
    ];
    let tune = section(definition, "blkiotune").into_iter();
    let devices = tune
        .flat_map(Element::elements)
        .filter(|e| e.name == "device");
    devices.flat_map(|device| {
        let path = device.child_text("path").unwrap_or_default();
        let path = path.trim().to_owned();
        let limits = DEVICES.iter().zip(LIMITS);
        limits.filter_map(move |((_, element), limit)| {
            let value: u64 = device.child_text(element)?.trim().parse().ok()?;
            (value != 0).then(|| (path.clone(), limit, value))
        })
    })
}

/// Shares of both versions of control groups.
const SHARES: (i64, i64) = (2, 262_144);

/// Refuses shares that neither version of control groups has, as libvirt does when a domain is defined. Other values
/// out of range are refused when a definition is read.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED.
pub fn check(definition: &Definition) -> Result<()> {
    let (least, most) = SHARES;
    let shares = cpu_value(definition, "shares");
    if shares != 0 && !(least..=most).contains(&shares) {
        return Err(Error::unsupported(format!(
            "Value of cputune 'shares' must be in range [{least}, {most}]"
        )));
    }
    Ok(())
}

/// CFS's limits for periods, and for quotas, in microseconds.
pub const PERIOD: (i64, i64) = (1000, 1_000_000);
/// See [`PERIOD`].
pub const QUOTA: (i64, i64) = (1000, 17_592_186_044_415);

/// Which groups a domain with that definition starts in; none of them is made yet.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED for what this host has not.
pub fn plan(driver: &Driver, definition: &Definition, id: i32) -> Result<Groups> {
    let mut groups = Groups::default();
    check(definition)?;
    if let Some((_, Some(nodes))) = numa_memory(definition) {
        available(nodes)?;
    }
    let asked: Vec<Tunable> = KINDS
        .into_iter()
        .filter(|kind| kind.is_asked(definition))
        .collect();
    if asked.is_empty() {
        return Ok(groups);
    }
    let host = Host::look();
    let below = below(driver, definition, id)?;
    for kind in asked {
        let Some(controller) = kind.controller() else {
            continue;
        };
        if !driver.roots.session && groups.plan(&host, controller, &below) {
            continue;
        }
        let strict = matches!(numa_memory(definition), Some(("strict", _)));
        return Err(match kind {
            // The policy does that as well.
            Tunable::Numa if strict => continue,
            _ if driver.roots.session => in_session(kind, ErrorCode::CONFIG_UNSUPPORTED),
            Tunable::Memory => Error::unsupported("Memory cgroup is not available on this host"),
            _ => Error::unsupported(format!("{} is not available on this host", kind.title())),
        });
    }
    Ok(groups)
}

fn in_session(kind: Tunable, code: ErrorCode) -> Error {
    Error::new(
        code,
        format!("{} is not available in session mode", kind.title()),
    )
}

fn below(driver: &Driver, definition: &Definition, id: i32) -> Result<PathBuf> {
    let partition = section(definition, "resource").and_then(|e| e.child_text("partition"));
    let partition = partition
        .as_deref()
        .map(str::trim)
        .filter(|p| !p.is_empty());
    cgroups::below(partition, id, &definition.name, &driver.roots.suffix())
}

/// A NUMA node that the host has not is refused.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED.
pub fn available(nodes: &str) -> Result<()> {
    let wanted = cpuset::parse(nodes).unwrap_or_default();
    let there = node::nodes();
    match wanted.iter().find(|node| !there.contains(node)) {
        Some(node) => Err(Error::unsupported(format!(
            "NUMA node {node} is unavailable"
        ))),
        None => Ok(()),
    }
}

/// Makes the groups and sets their limits, before there is a process in them.
///
/// # Errors
/// What the kernel refuses.
pub fn make(groups: &Groups, definition: &Definition) -> Result<()> {
    for group in groups.iter() {
        group.make()?;
    }
    for kind in KINDS {
        let group = kind.controller().and_then(|c| groups.get(c));
        if let Some(group) = group {
            if kind == Tunable::Scheduler {
                make_parts(group, definition)?;
            }
            set(kind, group, definition)?;
        }
    }
    Ok(())
}

/// From which NUMA nodes the process's memory comes: a policy of the kernel, and a map of nodes.
pub fn policy(definition: &Definition) -> Option<(libc::c_int, Vec<libc::c_ulong>)> {
    const BITS: u32 = libc::c_ulong::BITS;
    let (mode, nodes) = numa_memory(definition)?;
    let (_, number) = POLICIES.into_iter().find(|(name, _)| *name == mode)?;
    let nodes = cpuset::parse(nodes?)?;
    let mut map = vec![0; (nodes.last()? / BITS) as usize + 1];
    for node in nodes {
        map[(node / BITS) as usize] |= 1 << (node % BITS);
    }
    Some((number, map))
}

fn part_of(threads: Threads) -> String {
    match threads {
        Threads::Vcpu(number) => format!("vcpu{number}"),
        Threads::IoThread(number) => format!("{IOTHREAD}{number}"),
        Threads::Emulator => EMULATOR.to_owned(),
    }
}

fn make_parts(group: &Group, definition: &Definition) -> Result<()> {
    for number in definition.online_vcpus() {
        group.make_part(&part_of(Threads::Vcpu(number)))?;
    }
    for id in iothreads::ids(definition) {
        group.make_part(&part_of(Threads::IoThread(id)))?;
    }
    group.make_part(EMULATOR)
}

/// Puts the threads of a process into their parts of its group.
///
/// # Errors
/// The system's.
pub fn place(groups: &Groups, definition: &Definition, pid: u32) -> Result<()> {
    let Some(group) = groups.get(Controller::Cpu) else {
        return Ok(());
    };
    for (thread, kind) in vcpus::new_threads(&vcpus::kinds(definition), pid)? {
        group.take_thread(&part_of(kind), thread)?;
    }
    Ok(())
}

/// The same for the thread of one vCPU or I/O thread that has come.
///
/// # Errors
/// The system's.
pub fn place_one(groups: &Groups, definition: &Definition, pid: u32, kind: Threads) -> Result<()> {
    let Some(group) = groups.get(Controller::Cpu) else {
        return Ok(());
    };
    group.make_part(&part_of(kind))?;
    set_cpu(group, definition)?;
    let threads = vcpus::new_threads(&[kind], pid)?;
    for (thread, _) in threads.into_iter().filter(|(_, other)| *other == kind) {
        group.take_thread(&part_of(kind), thread)?;
    }
    Ok(())
}

/// Sets all limits of a kind as a definition has them; what it has not is as the kernel starts with.
fn set(kind: Tunable, group: &Group, definition: &Definition) -> Result<()> {
    match kind {
        Tunable::Scheduler => set_cpu(group, definition),
        Tunable::Memory => group.set_memory(memory_limits(definition)),
        Tunable::Block => {
            group.set_weight(weight(definition))?;
            for (path, limit, value) in device_limits(definition) {
                group.set_device(&path, limit, value)?;
            }
            Ok(())
        }
        Tunable::Numa => match numa_memory(definition) {
            Some((_, Some(nodes))) => match cpuset::parse(nodes) {
                Some(nodes) => group.set_nodes(&cpuset::format(&nodes)),
                None => Err(Error::unsupported(format!("nodeset '{nodes}'"))),
            },
            _ => Ok(()),
        },
        Tunable::Perf => Ok(()),
    }
}

/// What is said of shares that the kernel has not.
fn no_shares<T: Display>(shares: T, (least, most): (T, T)) -> Error {
    Error::new(
        ErrorCode::INVALID_ARG,
        format!("shares '{shares}' must be in range [{least}, {most}]"),
    )
}

/// As [`check`], for shares that are set.
///
/// # Errors
/// VIR_ERR_INVALID_ARG.
pub fn check_set(definition: &Definition) -> Result<()> {
    let shares = cpu_value(definition, "shares");
    check(definition).map_err(|_| no_shares(shares, SHARES))
}

/// What is said of no shares at all, which a definition may have, and no running domain.
pub fn zero_shares() -> Error {
    let mut planned = Groups::default();
    planned.plan(&Host::look(), Controller::Cpu, Path::new("none"));
    match planned.get(Controller::Cpu) {
        Some(group) => {
            let (least, most, _) = group.shares_range();
            no_shares(0, (least, most))
        }
        None => Tunable::Scheduler.missing(),
    }
}

fn set_cpu(group: &Group, definition: &Definition) -> Result<()> {
    let (least, most, default) = group.shares_range();
    let value = |element: &str| cpu_value(definition, element);
    let shares = match u64::try_from(value("shares")) {
        Ok(0) | Err(_) => default,
        Ok(shares) => shares,
    };
    if shares < least || shares > most {
        return Err(no_shares(shares, (least, most)));
    }
    group.set_shares(shares)?;
    let set = |part: Option<&str>, of: &str| {
        let period = u64::try_from(value(&format!("{of}period"))).unwrap_or(0);
        let period = if period == 0 { DEFAULT_PERIOD } else { period };
        group.set_bandwidth(part, period, value(&format!("{of}quota")))
    };
    // A part may have no more than the whole: where that gets less, its parts come first.
    let whole = set(None, "global_");
    for part in group.parts()? {
        let of = match &*part {
            EMULATOR => "emulator_",
            part if part.starts_with(IOTHREAD) => "iothread_",
            _ => "",
        };
        set(Some(&part), of)?;
    }
    whole.or_else(|_| set(None, "global_"))
}

/// What is in force for a running domain.
fn in_force(kind: Tunable, group: &Group, values: &mut [TypedParam]) -> Result<()> {
    match kind {
        Tunable::Scheduler => {
            let whole = group.bandwidth(None)?;
            let vcpus = group.bandwidth(Some(&part_of(Threads::Vcpu(0))))?;
            let emulator = group.bandwidth(Some(EMULATOR))?;
            let mut parts = group.parts()?.into_iter();
            if let Some(part) = parts.find(|part| part.starts_with(IOTHREAD)) {
                let (period, quota) = group.bandwidth(Some(&part))?;
                give(values, "iothread_period", period);
                give(values, "iothread_quota", quota);
            }
            give(values, "cpu_shares", group.shares()?);
            for (of, (period, quota)) in
                [("global", whole), ("vcpu", vcpus), ("emulator", emulator)]
            {
                give(values, &format!("{of}_period"), period);
                give(values, &format!("{of}_quota"), quota);
            }
        }
        Tunable::Memory => {
            let limits = group.memory()?;
            give(values, "hard_limit", limits.hard.unwrap_or(UNLIMITED));
            give(values, "soft_limit", limits.soft.unwrap_or(UNLIMITED));
            give(values, "swap_hard_limit", limits.swap.unwrap_or(UNLIMITED));
        }
        Tunable::Block => {
            if let Some(weight) = group.weight()?.and_then(|w| u32::try_from(w).ok()) {
                give(values, "weight", weight);
            }
        }
        Tunable::Numa | Tunable::Perf => {}
    }
    Ok(())
}

fn give(values: &mut [TypedParam], name: &str, value: impl Into<rpc::types::TypedValue>) {
    if let Some(param) = values.iter_mut().find(|param| param.field == name) {
        param.value = value.into();
    }
}

/// What the kernel starts with, where a definition says nothing and there is no group.
fn at_first(kind: Tunable, planned: &Group, values: &mut [TypedParam]) {
    if kind != Tunable::Scheduler {
        return;
    }
    let quota = planned.no_quota();
    give(values, "cpu_shares", planned.shares_range().2);
    for of in ["global", "vcpu", "emulator", "iothread"] {
        give(values, &format!("{of}_period"), DEFAULT_PERIOD);
        give(values, &format!("{of}_quota"), quota);
    }
}

impl Driver {
    /// Values of a running domain: those of its definition, with what is in force instead where that can be seen.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID where this host cannot limit it; the system's.
    pub(super) fn live_tunables(
        &self,
        domain: &Domain,
        kind: Tunable,
        mut values: Vec<TypedParam>,
    ) -> Result<Vec<TypedParam>> {
        let Some(controller) = kind.controller() else {
            return Ok(values);
        };
        if self.roots.session && kind == Tunable::Numa {
            // Threads' own policy needs no group.
            return Ok(values);
        }
        if self.roots.session {
            return Err(in_session(kind, ErrorCode::OPERATION_UNSUPPORTED));
        }
        let groups = domain.lock().live()?.made.groups.clone();
        if let Some(group) = groups.ready(controller) {
            if kind == Tunable::Scheduler {
                at_first(kind, group, &mut values);
            }
            in_force(kind, group, &mut values)?;
            return Ok(values);
        }
        let mut planned = Groups::default();
        planned.plan(&Host::look(), controller, Path::new("none"));
        match planned.get(controller) {
            Some(group) => at_first(kind, group, &mut values),
            // What is asked of it is kept by threads' own policy.
            None if kind == Tunable::Numa => {}
            None => return Err(kind.missing()),
        }
        Ok(values)
    }

    /// Sets the limits of a kind that `new` has and `old` had not. Nothing has changed if that fails.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID where this host cannot limit it; what the kernel refuses.
    pub(super) async fn limit(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        kind: Tunable,
        old: Arc<Definition>,
        new: Definition,
    ) -> Result<()> {
        let Some(controller) = kind.controller() else {
            return Err(kind.missing());
        };
        if self.roots.session {
            return Err(in_session(kind, ErrorCode::OPERATION_UNSUPPORTED));
        }
        let (driver, domain) = (Arc::clone(self), Arc::clone(domain));
        blocking(move || {
            let group = driver.group(&domain, controller, kind, &old)?;
            set_changed(kind, &group, &old, &new).inspect_err(|_| {
                if let Err(error) = set_changed(kind, &group, &new, &old) {
                    log::warn!("domain '{}': limits as before: {error}", new.name);
                }
            })
        })
        .await?
    }

    /// The group of a running domain, which is made if it is not there.
    fn group(
        &self,
        domain: &Domain,
        controller: Controller,
        kind: Tunable,
        running: &Definition,
    ) -> Result<Group> {
        let (groups, id, process) = {
            let inner = domain.lock();
            let live = inner.live()?;
            (live.made.groups.clone(), live.id, live.process.identity())
        };
        if let Some(group) = groups.ready(controller) {
            return Ok(group.clone());
        }
        let mut all = groups;
        let folder = match all.below() {
            Some(folder) => folder.to_owned(),
            None => below(self, running, id)?,
        };
        if !all.plan(&Host::look(), controller, &folder) {
            return Err(kind.missing());
        }
        let Some(group) = all.get(controller).cloned() else {
            return Err(kind.missing());
        };
        let note = |groups: Groups| -> Result<()> {
            let mut inner = domain.lock();
            let live = inner.live.as_mut().filter(|live| live.id == id);
            live.ok_or_else(not_running)?.made.groups = groups;
            self.write_record(&inner);
            Ok(())
        };
        // First: whatever happens, it is removed with the domain.
        note(all.clone())?;
        // All of it can be repeated, and is if an earlier attempt failed or was cut short.
        let make = || -> Result<()> {
            group.make()?;
            // Where it is another controller's as well, threads may be in parts of it by now.
            if !all.is_in(controller) {
                group.take(process)?;
            }
            if controller == Controller::Cpu {
                make_parts(&group, running)?;
                place(&all, running, process.pid)?;
            }
            if controller == Controller::Cpuset {
                // A group of this controller has its own idea of where threads run.
                vcpus::place(running, process.pid)?;
            }
            Ok(())
        };
        let made = make();
        let planned = all.clone();
        match made {
            Ok(()) => all.mark_ready(controller),
            Err(_) => all.discard(controller),
        }
        // The domain may have ended, and its groups with it, before this one was made again.
        note(all).inspect_err(|_| planned.remove())?;
        made.map(|()| group)
    }
}

/// Sets what differs; a device without a limit any longer is told so.
fn set_changed(kind: Tunable, group: &Group, old: &Definition, new: &Definition) -> Result<()> {
    if kind != Tunable::Block {
        return set(kind, group, new);
    }
    if weight(old) != weight(new) {
        group.set_weight(weight(new))?;
    }
    let before: Vec<_> = device_limits(old).collect();
    let after: Vec<_> = device_limits(new).collect();
    for (path, limit, value) in &after {
        if !before.contains(&(path.clone(), *limit, *value)) {
            group.set_device(path, *limit, *value)?;
        }
    }
    for (path, limit, _) in before {
        if !after.iter().any(|(p, l, _)| *p == path && *l == limit) {
            group.set_device(&path, limit, 0)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use xml_schemas::Validation;

    fn domain(inside: &str) -> Definition {
        let xml = format!(
            "<domain type='qemu'><name>a</name><memory>65536</memory>{inside}\
             <os><type>hvm</type></os></domain>"
        );
        Definition::parse(&xml, Validation::Lenient).unwrap().domain
    }

    #[test]
    fn what_asks_for_nothing_gets_no_group() {
        let none = domain(
            "<cputune><vcpupin vcpu='0' cpuset='0'/></cputune><blkiotune/>\
             <numatune><memory mode='preferred' nodeset='0'/></numatune>",
        );
        assert!(KINDS.iter().all(|kind| !kind.is_asked(&none)));
        let all = domain(
            "<cputune><quota>-1</quota></cputune><memtune><soft_limit>5</soft_limit></memtune>\
             <blkiotune><device><path>/d</path><weight>500</weight></device></blkiotune>\
             <numatune><memory mode='strict' nodeset='0'/></numatune>",
        );
        assert!(KINDS.iter().all(|kind| kind.is_asked(&all)));
    }

    #[test]
    fn shares_out_of_range_are_refused() {
        let with = |shares: u32| {
            let tune = format!("<cputune><shares>{shares}</shares></cputune>");
            check(&domain(&tune)).map_err(|error| error.message)
        };
        let range =
            "unsupported configuration: Value of cputune 'shares' must be in range [2, 262144]";
        assert_eq!(with(1).unwrap_err(), range);
        assert_eq!(with(262_145).unwrap_err(), range);
        with(2).unwrap();
        check(&domain("")).unwrap();
        let set = check_set(&domain("<cputune><shares>1</shares></cputune>")).unwrap_err();
        assert_eq!(set.code, ErrorCode::INVALID_ARG);
    }

    #[test]
    fn nodes_become_a_policy() {
        let of =
            |memory: &str| policy(&domain(&format!("<numatune><memory {memory}/></numatune>")));
        assert_eq!(
            of("mode='strict' nodeset='0,2'"),
            Some((libc::MPOL_BIND, vec![5]))
        );
        let wide = of("mode='interleave' nodeset='0,65'");
        assert_eq!(wide, Some((libc::MPOL_INTERLEAVE, vec![1, 2])));
        assert_eq!(of("mode='restrictive' nodeset='0'"), None);
        assert_eq!(policy(&domain("")), None);
        assert!(available("0-1000").is_err());
    }

    #[test]
    fn limits_of_devices_are_found() {
        let d = domain(
            "<blkiotune><device><path>/d</path><read_iops_sec>7</read_iops_sec>\
             <write_bytes_sec>8</write_bytes_sec></device></blkiotune>",
        );
        let found: Vec<_> = device_limits(&d).collect();
        let path = || "/d".to_owned();
        let wanted = [
            (path(), DeviceLimit::ReadOps, 7),
            (path(), DeviceLimit::WriteBytes, 8),
        ];
        assert_eq!(found, wanted);
    }
}
