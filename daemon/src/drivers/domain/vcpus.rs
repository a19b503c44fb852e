//! Virtual CPUs: how many, and on which CPUs of the host their threads and the others run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rpc::types::{TypedParam, TypedValue};
use vmm_api::devices::IoThreadConfig;
use xml_schemas::Domain as Definition;
use xml_schemas::cpuset;
use xml_schemas::dom::Element;
use xml_schemas::domain::{VcpuState, View};

use super::Driver;
use super::iothreads;
use super::metadata::{affect, chosen};
use super::object::{Domain, Pinned};
use super::sections::{self, section};
use crate::error::{Error, ErrorCode, Result};
use crate::node;

/// Which threads of a domain are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// A virtual CPU's.
    Vcpu(u32),
    /// An I/O thread's.
    IoThread(u32),
    /// All others.
    Emulator,
}

/// Threads of the kernel's for the asynchronous I/O of the one whose number follows.
const HELPER: &str = "iou-wrk-";

/// Most vCPUs a definition may have: as many as any machine here.
pub(super) const MOST: u32 = xml_schemas::domain::MAX_VCPUS;

fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::INVALID_ARG, text)
}

/// The CPUs of the host that a definition lets these threads run on; `None`: any.
pub fn cpus(definition: &Definition, threads: Threads) -> Option<BTreeSet<u32>> {
    let all = || cpuset::parse(definition.vcpu.cpuset.as_deref()?);
    let tune = section(definition, "cputune");
    let own = match threads {
        Threads::Vcpu(number) => {
            let number = number.to_string();
            let mut pins = tune.into_iter().flat_map(Element::elements);
            pins.find(|e| e.name == "vcpupin" && e.attr("vcpu") == Some(&number))
        }
        Threads::IoThread(number) => {
            let number = number.to_string();
            let mut pins = tune.into_iter().flat_map(Element::elements);
            pins.find(|e| e.name == "iothreadpin" && e.attr("iothread") == Some(&number))
        }
        Threads::Emulator => tune.and_then(|tune| tune.child("emulatorpin")),
    };
    own.and_then(|pin| cpuset::parse(pin.attr("cpuset")?))
        .or_else(all)
}

/// All kinds of threads that a definition has.
pub(super) fn kinds(definition: &Definition) -> Vec<Threads> {
    let online = definition.online_vcpus().into_iter().map(Threads::Vcpu);
    let own = iothreads::ids(definition).into_iter();
    online
        .chain(own.map(Threads::IoThread))
        .chain([Threads::Emulator])
        .collect()
}

/// Threads of a process: vCPUs and I/O threads with their numbers, and the rest.
pub(super) fn threads(pid: u32) -> io::Result<Vec<(i32, Threads)>> {
    let thread = |task: io::Result<fs::DirEntry>| -> Option<(i32, String)> {
        let task = task.ok()?;
        let id = task.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        Some((id, name.trim().to_owned()))
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?;
    let all: BTreeMap<i32, String> = tasks.filter_map(thread).collect();
    let numbered = |name: &str, of: &str| name.strip_prefix(of)?.parse().ok();
    let kind = |name: &str| {
        // What the kernel has begun to do a thread's asynchronous I/O.
        let helped = name.strip_prefix(HELPER).and_then(|of| of.parse().ok());
        let name = helped
            .and_then(|of: i32| all.get(&of))
            .map_or(name, |of| of);
        numbered(name, "vcpu")
            .map(Threads::Vcpu)
            .or_else(|| numbered(name, IoThreadConfig::NAME).map(Threads::IoThread))
            .unwrap_or(Threads::Emulator)
    };
    Ok(all.iter().map(|(id, name)| (*id, kind(name))).collect())
}

/// The CPUs that the kernel lets the first of these threads run on; `None`: there is none.
pub(super) fn affinity(pid: u32, wanted: Threads) -> Result<Option<BTreeSet<u32>>> {
    let read = || -> io::Result<Option<BTreeSet<u32>>> {
        let all = threads(pid)?;
        let Some((thread, _)) = all.into_iter().find(|(_, kind)| *kind == wanted) else {
            return Ok(None);
        };
        let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"))?;
        let mut lines = status.lines();
        let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Ok(list.and_then(|list| cpuset::parse(list.trim())))
    };
    read().map_err(|error| Error::system("cannot get CPU affinity of the domain's threads", &error))
}

/// What the host's scheduler says of a process's vCPUs, by their numbers: nanoseconds that they waited in its queue,
/// as counted by its statistics (0 where it keeps none) and as each thread's own delay.
pub fn vcpu_waits(pid: u32) -> BTreeMap<u32, (u64, u64)> {
    let waits = |(id, kind)| {
        let Threads::Vcpu(number) = kind else {
            return None;
        };
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/task/{id}/{name}")).ok();
        let delay = read("schedstat").and_then(|text| text.split_whitespace().nth(1)?.parse().ok());
        // `se.statistics.wait_sum : 12.345678`, in milliseconds.
        let wait = read("sched").and_then(|text| {
            let line = text.lines().find(|line| {
                let name = line.split(':').next().unwrap_or_default().trim_end();
                name == "wait_sum" || name.ends_with(".wait_sum")
            })?;
            let (whole, part) = line.split_once(':')?.1.trim().split_once('.')?;
            let part = format!("{part:0<6}");
            let nanos: u64 = part.get(..6)?.parse().ok()?;
            whole
                .parse::<u64>()
                .ok()?
                .checked_mul(1_000_000)?
                .checked_add(nanos)
        });
        Some((number, (wait.unwrap_or(0), delay.unwrap_or(0))))
    };
    // A process that has gone has none.
    let all = threads(pid).unwrap_or_default();
    all.into_iter().filter_map(waits).collect()
}

/// As [`threads`], for those that have just come: a VMM of an older build says so before they have their names.
pub(super) fn new_threads(wanted: &[Threads], pid: u32) -> Result<Vec<(i32, Threads)>> {
    const LIMIT: Duration = Duration::from_secs(5);
    let deadline = Instant::now() + LIMIT;
    loop {
        let all =
            threads(pid).map_err(|e| Error::system("cannot list the domain's threads", &e))?;
        let there = |wanted: &Threads| all.iter().any(|(_, kind)| kind == wanted);
        if wanted.iter().all(there) {
            return Ok(all);
        }
        if Instant::now() >= deadline {
            return Err(Error::new(
                ErrorCode::OPERATION_TIMEOUT,
                "the threads of the domain do not begin",
            ));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Puts a thread onto CPUs.
fn put(thread: i32, cpus: &BTreeSet<u32>) -> io::Result<()> {
    // As long as the highest number needs, in whole words, which the kernel wants.
    let bytes = cpus.last().map_or(1, |last| *last as usize / 8 + 1);
    let map = cpuset::to_map(cpus, bytes.next_multiple_of(size_of::<libc::c_ulong>()));
    // SAFETY: the kernel reads `map.len()` bytes of the map, which lives here.
    let failed =
        unsafe { libc::syscall(libc::SYS_sched_setaffinity, thread, map.len(), map.as_ptr()) };
    match failed {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_helper(thread: i32) -> bool {
    let name = fs::read_to_string(format!("/proc/{thread}/comm"));
    name.is_ok_and(|name| name.starts_with(HELPER))
}

/// Puts the threads that are meant onto CPUs.
pub(super) fn pin(pid: u32, wanted: Threads, cpus: &BTreeSet<u32>) -> Result<()> {
    // Those that came while the first ones were put have their CPUs or their starter's of before.
    for _ in 0..2 {
        let all =
            threads(pid).map_err(|e| Error::system("cannot list the domain's threads", &e))?;
        pin_some(&all, wanted, cpus)?;
    }
    Ok(())
}

fn pin_some(all: &[(i32, Threads)], wanted: Threads, cpus: &BTreeSet<u32>) -> Result<()> {
    for &(thread, kind) in all {
        if kind != wanted {
            continue;
        }
        match put(thread, cpus) {
            // One that ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            // Linux before 6.4 does not let anybody move those.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && is_helper(thread) => {}
            Err(error) => {
                let text = format!("cannot set CPU affinity on process {thread}");
                return Err(Error::system(text, &error));
            }
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Puts a machine's threads where its definition wants them, and gives them the scheduler it wants, before it runs.
///
/// # Errors
/// The host has none of those CPUs, or not that scheduler for us.
pub fn place(definition: &Definition, pid: u32) -> Result<()> {
    if !is_placed(definition) {
        return Ok(());
    }
    let all = new_threads(&kinds(definition), pid)?;
    schedule(definition, &all)?;
    for kind in kinds(definition) {
        if let Some(cpus) = cpus(definition, kind) {
            pin_some(&all, kind, &cpus)?;
        }
    }
    Ok(())
}

/// The same for the thread of one vCPU or I/O thread that has come: it began as the one that made it runs.
///
/// # Errors
/// As [`place`].
pub fn place_one(definition: &Definition, pid: u32, kind: Threads) -> Result<()> {
    let mut own = new_threads(&[kind], pid)?;
    own.retain(|(_, other)| *other == kind);
    let of_others = || {
        let pinned = cpus(definition, Threads::Emulator);
        pinned.map(|_| node::cpus_present().into_iter().collect())
    };
    if let Some(cpus) = cpus(definition, kind).or_else(of_others) {
        pin_some(&own, kind, &cpus)?;
    }
    let usual = (libc::SCHED_OTHER, 0);
    let scheduler = match scheduler(definition, kind)? {
        None => scheduler(definition, Threads::Emulator)?.map(|_| usual),
        own => own,
    };
    match scheduler {
        Some(scheduler) => set_scheduler(&own, &[(kind, scheduler)]),
        None => Ok(()),
    }
}

/// Whether a definition says anything of where and how threads run.
pub fn is_placed(definition: &Definition) -> bool {
    let mut parts = section(definition, "cputune")
        .into_iter()
        .flat_map(Element::elements);
    let known = [
        "vcpupin",
        "emulatorpin",
        "iothreadpin",
        "vcpusched",
        "emulatorsched",
        "iothreadsched",
    ];
    definition.vcpu.cpuset.is_some() || parts.any(|part| known.contains(&part.name.as_str()))
}

/// `scheduler=` and its number (sched(7)), and whether it has priorities.
const SCHEDULERS: [(&str, libc::c_int, bool); 4] = [
    ("batch", libc::SCHED_BATCH, false),
    ("idle", libc::SCHED_IDLE, false),
    ("fifo", libc::SCHED_FIFO, true),
    ("rr", libc::SCHED_RR, true),
];

/// The scheduler that `<vcpusched>`, `<iothreadsched>` or `<emulatorsched>` gives some threads, and their priority.
fn scheduler(definition: &Definition, threads: Threads) -> Result<Option<(libc::c_int, i32)>> {
    let mut all = section(definition, "cputune")
        .into_iter()
        .flat_map(Element::elements);
    let found = match threads {
        Threads::Vcpu(number) => all.find(|e| {
            let list = e.attr("vcpus").and_then(cpuset::parse);
            e.name == "vcpusched" && list.is_some_and(|list| list.contains(&number))
        }),
        Threads::IoThread(number) => all.find(|e| {
            let list = e.attr("iothreads").and_then(cpuset::parse);
            e.name == "iothreadsched" && list.is_some_and(|list| list.contains(&number))
        }),
        Threads::Emulator => all.find(|e| e.name == "emulatorsched"),
    };
    let Some(element) = found else {
        return Ok(None);
    };
    let name = element.attr("scheduler").unwrap_or_default();
    let known = SCHEDULERS.into_iter().find(|(known, ..)| *known == name);
    let (_, number, with_priority) = known
        .ok_or_else(|| Error::unsupported(format!("scheduler '{name}' of <{}>", element.name)))?;
    let priority = element.attr("priority").map_or("0", str::trim);
    let (least, most) = (1, 99);
    match priority.parse::<i32>() {
        _ if !with_priority => Ok(Some((number, 0))),
        Ok(priority) if (least..=most).contains(&priority) => Ok(Some((number, priority))),
        _ => Err(Error::unsupported(format!(
            "Scheduler priority {priority} out of range [{least}, {most}]"
        ))),
    }
}

/// Gives a machine's threads the schedulers that its definition wants.
fn schedule(definition: &Definition, all: &[(i32, Threads)]) -> Result<()> {
    let mut schedulers = Vec::new();
    for kind in kinds(definition) {
        if let Some(scheduler) = scheduler(definition, kind)? {
            schedulers.push((kind, scheduler));
        }
    }
    set_scheduler(all, &schedulers)
}

fn set_scheduler(all: &[(i32, Threads)], schedulers: &[(Threads, (i32, i32))]) -> Result<()> {
    for &(thread, kind) in all {
        let wanted = schedulers.iter().find(|(wanted, _)| *wanted == kind);
        let Some((_, (policy, priority))) = wanted else {
            continue;
        };
        let param = libc::sched_param {
            sched_priority: *priority,
        };
        // SAFETY: the kernel reads the parameter, which lives here.
        if unsafe { libc::sched_setscheduler(thread, *policy, &param) } != 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::ESRCH) {
                continue;
            }
            let text = format!("Cannot set scheduler parameters for pid {thread}");
            return Err(Error::system(text, &error));
        }
    }
    Ok(())
}

impl Driver {
    /// How many vCPUs a domain can have.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for a running one.
    pub async fn set_max_vcpus(
        self: &Arc<Self>,
        domain: Pinned,
        count: u32,
        flags: u32,
    ) -> Result<()> {
        if count == 0 || count > MOST {
            return Err(invalid(format!(
                "requested vcpu count is greater than the count of enabled vcpus in the domain: {count} > {MOST}"
            )));
        }
        let live = async |_: &Definition| {
            Err(Error::invalid(
                "maximum vcpu count of a live domain can't be modified",
            ))
        };
        let change = |definition: &mut Definition| {
            let cpu = definition.cpu.as_ref();
            if let Some(topology) = cpu.and_then(|cpu| cpu.topology)
                && topology.vcpus() != Some(count)
            {
                return Err(invalid("CPU topology doesn't match the desired vcpu count"));
            }
            let listed = definition.lists_vcpus().then(|| definition.vcpus());
            let online = definition.vcpu.online().min(count);
            definition.vcpu.max = count;
            match listed {
                None => definition.first_vcpus(online),
                Some(mut states) => {
                    let new = VcpuState {
                        online: false,
                        hotpluggable: true,
                        order: None,
                    };
                    states.resize(count as usize, new);
                    definition.list_vcpus(&states);
                }
            }
            Ok(())
        };
        self.modify(&domain, flags, live, change).await
    }

    /// Which CPUs of the host threads may run on.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG for an empty map, a vCPU that is not there, or CPUs the host has not.
    pub async fn pin_threads(
        self: &Arc<Self>,
        domain: Pinned,
        threads: Threads,
        map: &[u8],
        flags: u32,
    ) -> Result<()> {
        let cpus = cpuset::from_map(map);
        if cpus.is_empty() {
            return Err(invalid("Empty cpu list for pinning"));
        }
        let process = domain
            .lock()
            .live
            .as_ref()
            .map(|live| Arc::clone(&live.process));
        let live = async |_: &Definition| {
            let Some(process) = process else {
                return Err(super::object::not_running());
            };
            pin(process.identity().pid, threads, &cpus)
        };
        let text = cpuset::format(&cpus);
        let change = |definition: &mut Definition, view| {
            let Threads::Vcpu(number) = threads else {
                // (I/O threads have a call of their own.)
                let pin = Element::new("emulatorpin").with_attr("cpuset", &text);
                sections::set_child(definition, "cputune", "emulatorpin", Some(pin));
                return Ok(());
            };
            let count = definition.vcpu.max;
            if number >= count {
                let which = match view {
                    View::Inactive => "persistent",
                    _ => "live",
                };
                return Err(invalid(format!(
                    "vcpu {number} is out of range of {which} cpu count {count}"
                )));
            }
            sections::change(definition, "cputune", |tune| {
                let id = |e: &Element| e.attr("vcpu").and_then(|n| n.parse::<u32>().ok());
                let mut pins = tune.take_children("vcpupin");
                pins.retain(|pin| id(pin) != Some(number));
                pins.push(
                    Element::new("vcpupin")
                        .with_attr("vcpu", number.to_string())
                        .with_attr("cpuset", &text),
                );
                pins.sort_by_key(id);
                pins.into_iter().for_each(|pin| tune.push(pin));
            });
            Ok(())
        };
        self.modify_each(&domain, flags, live, change).await?;
        let what = match threads {
            Threads::Vcpu(number) => format!("cputune.vcpupin{number}"),
            Threads::IoThread(_) | Threads::Emulator => "cputune.emulatorpin".to_owned(),
        };
        let pinned = TypedParam::new(what.as_str(), TypedValue::String(text));
        self.tell_tuned(&domain, flags, vec![pinned])
    }

    /// Maps of the CPUs that each of the first `most` vCPUs may run on.
    ///
    /// # Errors
    /// There is no such definition.
    pub fn vcpu_pins(
        &self,
        domain: &Domain,
        most: usize,
        flags: u32,
    ) -> Result<Vec<BTreeSet<u32>>> {
        let inner = domain.lock();
        let definition = chosen(&inner, flags & (affect::LIVE | affect::CONFIG))?;
        let host: BTreeSet<u32> = node::cpus_present().into_iter().collect();
        let count = definition.vcpu.max;
        Ok((0..count)
            .take(most)
            .map(|n| cpus(&definition, Threads::Vcpu(n)).unwrap_or_else(|| host.clone()))
            .collect())
    }

    /// The CPUs that the other threads may run on.
    ///
    /// # Errors
    /// There is no such definition.
    pub fn emulator_pin(&self, domain: &Domain, flags: u32) -> Result<BTreeSet<u32>> {
        let inner = domain.lock();
        let definition = chosen(&inner, flags & (affect::LIVE | affect::CONFIG))?;
        Ok(cpus(&definition, Threads::Emulator)
            .unwrap_or_else(|| node::cpus_present().into_iter().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_told_apart_and_put() {
        let own = threads(std::process::id()).unwrap();
        assert!(own.iter().all(|(_, kind)| *kind == Threads::Emulator));
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("vcpu7".into());
        let thread = thread.spawn(move || receiver.recv().ok()).unwrap();
        let found = || {
            let all = threads(std::process::id()).unwrap();
            all.into_iter().find(|(_, kind)| *kind == Threads::Vcpu(7))
        };
        while found().is_none() {
            std::thread::yield_now();
        }
        let first = node::cpus_online()[0];
        pin(
            std::process::id(),
            Threads::Vcpu(7),
            &BTreeSet::from([first]),
        )
        .unwrap();
        let status = fs::read_to_string(format!("/proc/self/task/{}/status", found().unwrap().0));
        let allowed = format!("Cpus_allowed_list:\t{first}\n");
        assert!(status.unwrap().contains(&allowed));
        assert!(
            pin(
                std::process::id(),
                Threads::Vcpu(7),
                &BTreeSet::from([9999])
            )
            .is_err()
        );
        drop(sender);
        thread.join().unwrap();
    }
}
