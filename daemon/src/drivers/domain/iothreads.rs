//! I/O threads: groups of threads of the machine's, which serve the disks that are assigned to them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rpc::types::{TypedParam, TypedValue};
use vmm_api::control::{Answer, Call};
use vmm_api::devices::IoThreadConfig;
use xml_schemas::Domain as Definition;
use xml_schemas::cpuset;
use xml_schemas::dom::Element;
use xml_schemas::domain::View;

use super::Driver;
use super::lifecycle::ask;
use super::metadata::{chosen, impact};
use super::object::{Domain, Pinned};
use super::sections::{self, section};
use super::vcpus::{self, Threads};
use super::{blocking, limits};
use crate::error::{Error, ErrorCode, Result};

/// An I/O thread of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoThread {
    /// Its number, from 1.
    pub id: u32,
    /// The CPUs it may run on; `None`: any.
    pub cpus: Option<BTreeSet<u32>>,
}

/// What is done to one.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// It is new.
    Add,
    /// It goes.
    Remove,
    /// Where it runs.
    Pin(BTreeSet<u32>),
    /// How it polls, and how many workers it has.
    Set(Settings),
}

/// What is said of one: `None` leaves it as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    poll_max_ns: Option<u64>,
    poll_grow: Option<u32>,
    poll_shrink: Option<u32>,
    /// -1: nothing is said.
    pool_min: Option<i32>,
    /// -1: nothing is said.
    pool_max: Option<i32>,
}

fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::INVALID_ARG, text)
}

impl Settings {
    /// From a call's parameters.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG for what is none of them.
    pub fn read(params: &[TypedParam]) -> Result<Self> {
        let mut settings = Self::default();
        for param in params {
            match (param.field.as_str(), &param.value) {
                ("poll_max_ns", TypedValue::ULLong(value)) => settings.poll_max_ns = Some(*value),
                ("poll_grow", TypedValue::UInt(value)) => settings.poll_grow = Some(*value),
                ("poll_shrink", TypedValue::UInt(value)) => settings.poll_shrink = Some(*value),
                ("thread_pool_min", TypedValue::Int(value)) => settings.pool_min = Some(*value),
                ("thread_pool_max", TypedValue::Int(value)) => settings.pool_max = Some(*value),
                ("poll_max_ns" | "poll_grow" | "poll_shrink", _)
                | ("thread_pool_min" | "thread_pool_max", _) => {
                    return Err(invalid(format!(
                        "invalid type for parameter '{}'",
                        param.field
                    )));
                }
                (name, _) => {
                    return Err(Error::new(
                        ErrorCode::ARGUMENT_UNSUPPORTED,
                        format!("parameter '{name}' not supported"),
                    ));
                }
            }
        }
        // QEMU's own limits: it keeps them as signed numbers.
        let over = |name: &str, most: i64| {
            Err(Error::new(
                ErrorCode::OPERATION_FAILED,
                format!("value of '{name}' is above {most}"),
            ))
        };
        if settings.poll_max_ns.is_some_and(|ns| ns > i64::MAX as u64) {
            return over("poll_max_ns", i64::MAX);
        }
        if let Some(min) = settings.pool_min.filter(|min| *min < -1) {
            return Err(Error::unsupported(format!(
                "thread_pool_min ({min}) must be equal to or greater than -1"
            )));
        }
        if let Some(max) = settings.pool_max.filter(|max| *max < -1 || *max == 0) {
            return Err(Error::unsupported(format!(
                "thread_pool_max ({max}) must be a positive number or -1"
            )));
        }
        Ok(settings)
    }

    fn polls(&self) -> bool {
        self.poll_max_ns.is_some() || self.poll_grow.is_some() || self.poll_shrink.is_some()
    }

    /// Sets the workers of the one with that number.
    fn write(&self, definition: &mut Definition, id: u32) -> Result<()> {
        let mut all = known(definition);
        let pool = all.entry(id).or_default();
        let set = |value: &mut Option<u32>, new: Option<i32>| {
            if let Some(new) = new {
                *value = u32::try_from(new).ok();
            }
        };
        set(&mut pool.min, self.pool_min);
        set(&mut pool.max, self.pool_max);
        let shown = |value: Option<u32>| value.map_or(-1, i64::from);
        if shown(pool.min) > shown(pool.max) {
            return Err(Error::invalid(format!(
                "thread_pool_min ({}) can't be greater than thread_pool_max ({})",
                shown(pool.min),
                shown(pool.max)
            )));
        }
        write(definition, &all);
        Ok(())
    }
}

fn number(element: &Element, name: &str) -> Option<u32> {
    element.attr(name)?.parse().ok()
}

/// How many workers one has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Pool {
    min: Option<u32>,
    max: Option<u32>,
}

fn listed(definition: &Definition) -> impl Iterator<Item = (u32, Pool)> {
    let list = section(definition, "iothreadids").into_iter();
    list.flat_map(Element::elements).filter_map(|thread| {
        let pool = Pool {
            min: number(thread, "thread_pool_min"),
            max: number(thread, "thread_pool_max"),
        };
        Some((number(thread, "id")?, pool))
    })
}

/// All of a definition.
fn known(definition: &Definition) -> BTreeMap<u32, Pool> {
    let mut all: BTreeMap<u32, Pool> = listed(definition).collect();
    let count =
        section(definition, "iothreads").and_then(|e| e.text().trim().parse::<usize>().ok());
    // Those without a number of their own get the lowest free ones.
    for id in 1..=cpuset::MAX {
        if all.len() >= count.unwrap_or(0) {
            break;
        }
        all.entry(id).or_default();
    }
    all
}

pub(super) fn ids(definition: &Definition) -> BTreeSet<u32> {
    known(definition).into_keys().collect()
}

/// Whether a definition has any.
pub fn has_any(definition: &Definition) -> bool {
    !known(definition).is_empty()
}

/// A definition's, for the machine.
pub(super) fn configs(definition: &Definition) -> Vec<IoThreadConfig> {
    let config = |(id, pool): (u32, Pool)| IoThreadConfig {
        pool_min: pool.min,
        pool_max: pool.max,
        ..IoThreadConfig::new(id)
    };
    known(definition).into_iter().map(config).collect()
}

/// The one that serves a disk or controller.
pub(super) fn of_device(device: &Element) -> Option<u32> {
    number(device.child("driver")?, "iothread")
}

fn target(disk: &Element) -> &str {
    let target = disk.child("target").and_then(|target| target.attr("dev"));
    target.unwrap_or_default()
}

/// Refuses what names an I/O thread that is not there, or twice, as libvirt does when a domain is defined.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED, VIR_ERR_XML_ERROR.
pub(super) fn check(definition: &Definition) -> Result<()> {
    let wrong = |text: String| Err(Error::new(ErrorCode::XML_ERROR, text));
    let mut seen = BTreeSet::new();
    for (id, pool) in listed(definition) {
        if id == 0 {
            return wrong(
                "Invalid value for attribute 'id' in element 'iothread': Zero is not permitted"
                    .to_owned(),
            );
        }
        if !seen.insert(id) {
            return wrong(format!("duplicate iothread id '{id}' found"));
        }
        if id > IoThreadConfig::MOST {
            return Err(too_high(id));
        }
        if let (Some(min), Some(max)) = (pool.min, pool.max)
            && min > max
        {
            return Err(Error::unsupported(
                "thread_pool_min must be smaller or equal to thread_pool_max",
            ));
        }
    }
    let all = ids(definition);
    let mut scheduled = BTreeSet::new();
    let tune = section(definition, "cputune").into_iter();
    for part in tune.flat_map(Element::elements) {
        let named = match &*part.name {
            "iothreadpin" => BTreeSet::from_iter(number(part, "iothread")),
            "iothreadsched" => part
                .attr("iothreads")
                .and_then(cpuset::parse)
                .unwrap_or_default(),
            _ => continue,
        };
        if let Some(id) = named.iter().find(|id| !all.contains(id)) {
            return Err(Error::unsupported(format!("Cannot find 'iothread' : {id}")));
        }
        if part.name == "iothreadsched" {
            if !named.is_disjoint(&scheduled) {
                return Err(Error::new(
                    ErrorCode::XML_DETAIL,
                    "'iothreadsched' attributes 'iothreads' must not overlap",
                ));
            }
            scheduled.extend(named);
        }
    }
    let mut devices = definition.devices.rest.iter();
    devices.try_for_each(|device| check_one(&all, device))
}

/// The same of one device.
///
/// # Errors
/// As [`check`].
pub(super) fn check_user(definition: &Definition, device: &Element) -> Result<()> {
    check_one(&ids(definition), device)
}

fn check_one(all: &BTreeSet<u32>, device: &Element) -> Result<()> {
    let Some(id) = of_device(device) else {
        return Ok(());
    };
    let unknown = |what: &str| {
        let text = format!("{what} iothread '{id}' not defined in iothreadid");
        Err(Error::unsupported(text))
    };
    match device.name.as_str() {
        "controller" if !all.contains(&id) => return unknown("controller"),
        "disk" => {}
        _ => return Ok(()),
    }
    if id == 0 {
        return Err(Error::new(
            ErrorCode::XML_ERROR,
            "Invalid value for attribute 'iothread' in element 'driver': Zero is not permitted",
        ));
    }
    let bus = device.child("target").and_then(|target| target.attr("bus"));
    if let Some(bus) = bus.filter(|bus| *bus != "virtio") {
        return Err(Error::unsupported(format!(
            "IOThreads not available for bus {bus} target {}",
            target(device)
        )));
    }
    if !all.contains(&id) {
        return unknown("Disk");
    }
    Ok(())
}

fn too_high(id: u32) -> Error {
    Error::unsupported(format!(
        "iothread id '{id}' is above {}",
        IoThreadConfig::MOST
    ))
}

fn write(definition: &mut Definition, all: &BTreeMap<u32, Pool>) {
    definition
        .rest
        .retain(|e| e.name != "iothreads" && e.name != "iothreadids");
    if all.is_empty() {
        return;
    }
    let count = Element::with_text("iothreads", all.len().to_string());
    definition.rest.push(count);
    let plain = (1..)
        .zip(all)
        .all(|(n, (id, pool))| *id == n && *pool == Pool::default());
    if plain {
        return;
    }
    let mut list = Element::new("iothreadids");
    for (id, pool) in all {
        let mut thread = Element::new("iothread").with_attr("id", id.to_string());
        for (name, value) in [("thread_pool_min", pool.min), ("thread_pool_max", pool.max)] {
            if let Some(value) = value {
                thread.set_attr(name, value.to_string());
            }
        }
        list.push(thread);
    }
    definition.rest.push(list);
}

fn drop_pin(definition: &mut Definition, id: u32) {
    sections::change(definition, "cputune", |tune| {
        let mut pins = tune.take_children("iothreadpin");
        pins.retain(|pin| number(pin, "iothread") != Some(id));
        pins.into_iter().for_each(|pin| tune.push(pin));
    });
}

/// `<iothreadsched>` without one that goes.
fn drop_scheduler(definition: &mut Definition, id: u32) {
    sections::change(definition, "cputune", |tune| {
        for mut part in tune.take_children("iothreadsched") {
            let mut list = part.attr("iothreads").and_then(cpuset::parse);
            if let Some(list) = &mut list
                && list.remove(&id)
            {
                if list.is_empty() {
                    continue;
                }
                part.set_attr("iothreads", cpuset::format(list));
            }
            tune.push(part);
        }
    });
}

/// Changes a definition.
fn apply(definition: &mut Definition, view: View, id: u32, what: &Change) -> Result<()> {
    let mut all = known(definition);
    if id == 0 {
        return Err(invalid(format!("invalid value of 0 for iothread_id: {id}")));
    }
    let is_there = all.contains_key(&id);
    match what {
        Change::Add if is_there => {
            let text = format!("an IOThread is already using iothread_id '{id}'");
            return Err(invalid(text));
        }
        Change::Add if id > IoThreadConfig::MOST => return Err(too_high(id)),
        Change::Add => {
            all.insert(id, Pool::default());
            write(definition, &all);
        }
        Change::Pin(_) if !is_there => {
            let name = match view {
                View::Live => "iothread",
                View::Inactive => "iothreadid",
            };
            return Err(invalid(format!("{name} {id} not found")));
        }
        Change::Remove if !is_there => {
            return Err(invalid(format!(
                "cannot find IOThread '{id}' in iothreadids list"
            )));
        }
        Change::Set(_) if !is_there => {
            return Err(invalid(format!(
                "cannot find IOThread '{id}' in iothreadids"
            )));
        }
        Change::Remove => {
            let mut devices = definition.devices.rest.iter();
            let users = ["disk", "controller"];
            if let Some(user) =
                devices.find(|e| users.contains(&e.name.as_str()) && of_device(e) == Some(id))
            {
                return Err(invalid(match user.name.as_str() {
                    "disk" => format!(
                        "cannot remove IOThread {id} since it is being used by disk '{}'",
                        target(user)
                    ),
                    _ => format!(
                        "cannot remove IOThread '{id}' since it is being used by controller"
                    ),
                }));
            }
            all.remove(&id);
            write(definition, &all);
            drop_pin(definition, id);
            drop_scheduler(definition, id);
        }
        Change::Pin(cpus) => {
            if cpus.is_empty() {
                return Err(invalid("Empty iothread cpumap list for pinning"));
            }
            drop_pin(definition, id);
            sections::change(definition, "cputune", |tune| {
                let mut pins = tune.take_children("iothreadpin");
                pins.push(
                    Element::new("iothreadpin")
                        .with_attr("iothread", id.to_string())
                        .with_attr("cpuset", cpuset::format(cpus)),
                );
                pins.sort_by_key(|pin| number(pin, "iothread"));
                pins.into_iter().for_each(|pin| tune.push(pin));
            });
        }
        Change::Set(settings) if settings.polls() && view == View::Inactive => {
            return Err(Error::new(
                ErrorCode::OPERATION_UNSUPPORTED,
                "configuring persistent polling values is not supported",
            ));
        }
        Change::Set(settings) => settings.write(definition, id)?,
    }
    Ok(())
}

impl Driver {
    /// The I/O threads of a definition, or of a running domain: where they run then is what the kernel says.
    ///
    /// # Errors
    /// There is no such definition; the system's.
    pub fn iothreads(&self, domain: &Domain, flags: u32) -> Result<Vec<IoThread>> {
        let (definition, pid) = {
            let inner = domain.lock();
            let (live, _) = impact(&inner, flags)?;
            let pid = inner.live.as_ref().filter(|_| live);
            let pid = pid.map(|live| live.process.identity().pid);
            (chosen(&inner, flags)?, pid)
        };
        let thread = |id| {
            let own = Threads::IoThread(id);
            let cpus = match pid {
                Some(pid) => vcpus::affinity(pid, own)?,
                None => vcpus::cpus(&definition, own),
            };
            Ok(IoThread { id, cpus })
        };
        ids(&definition).into_iter().map(thread).collect()
    }

    /// Changes an I/O thread.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG where it is there already or not at all, or in use; the machine's, the system's.
    pub async fn change_iothread(
        self: &Arc<Self>,
        domain: Pinned,
        id: u32,
        what: Change,
        flags: u32,
    ) -> Result<()> {
        let live = async |running: &Definition| match &what {
            Change::Add => self.add(&domain, running, id).await,
            Change::Remove => ask(&domain, Call::RemoveIoThread { id }).await.map(drop),
            Change::Pin(cpus) => {
                let pid = domain.lock().live()?.process.identity().pid;
                vcpus::pin(pid, Threads::IoThread(id), cpus)
            }
            Change::Set(settings) => {
                let mut new = running.clone();
                settings.write(&mut new, id)?;
                let now = all(&domain).await?.into_iter().find(|own| own.id == id);
                let mut config = now.unwrap_or_else(|| IoThreadConfig::new(id));
                let pool = known(&new).remove(&id).unwrap_or_default();
                (config.pool_min, config.pool_max) = (pool.min, pool.max);
                config.poll_max_ns = settings.poll_max_ns.unwrap_or(config.poll_max_ns);
                config.poll_grow = settings.poll_grow.unwrap_or(config.poll_grow);
                config.poll_shrink = settings.poll_shrink.unwrap_or(config.poll_shrink);
                ask(&domain, Call::SetIoThread(config)).await.map(drop)
            }
        };
        let change = |definition: &mut Definition, view| apply(definition, view, id, &what);
        self.modify_each(&domain, flags, live, change).await?;
        if let Change::Pin(cpus) = &what {
            let name = format!("cputune.iothreadpin{id}");
            let pinned = TypedParam::new(name.as_str(), TypedValue::String(cpuset::format(cpus)));
            return self.tell_tuned(&domain, flags, vec![pinned]);
        }
        Ok(())
    }

    async fn add(&self, domain: &Pinned, running: &Definition, id: u32) -> Result<()> {
        ask(domain, Call::SetIoThread(IoThreadConfig::new(id))).await?;
        let (groups, pid) = {
            let inner = domain.lock();
            let live = inner.live()?;
            (live.made.groups.clone(), live.process.identity().pid)
        };
        let mut new = running.clone();
        apply(&mut new, View::Live, id, &Change::Add)?;
        if groups.is_empty() && !vcpus::is_placed(&new) {
            return Ok(());
        }
        let placed = blocking(move || {
            let own = Threads::IoThread(id);
            limits::place_one(&groups, &new, pid, own)?;
            vcpus::place_one(&new, pid, own)
        })
        .await;
        let placed = placed.and_then(|placed| placed);
        if placed.is_err() {
            drop(ask(domain, Call::RemoveIoThread { id }).await);
        }
        placed
    }
}

/// What the machine has.
///
/// # Errors
/// The machine's.
pub async fn all(domain: &Domain) -> Result<Vec<IoThreadConfig>> {
    match ask(domain, Call::IoThreads).await? {
        Answer::IoThreads(threads) => Ok(threads),
        _ => Err(Error::internal("the VMM's answer is none to the question")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xml_schemas::Validation;

    fn domain(inside: &str, disks: &str) -> Definition {
        let xml = format!(
            "<domain type='qemu'><name>a</name><memory>65536</memory>{inside}\
             <os><type>hvm</type></os><devices>{disks}</devices></domain>"
        );
        Definition::parse(&xml, Validation::Lenient).unwrap().domain
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let refused = |inside: &str, disks: &str| {
            let error = check(&domain(inside, disks)).unwrap_err();
            error.message
        };
        let disk = |id: u32, bus: &str| {
            format!(
                "<disk type='file'><driver name='qemu' iothread='{id}'/><source file='/d'/>\
                 <target dev='vda' bus='{bus}'/></disk>"
            )
        };
        let two = "<iothreads>2</iothreads>";
        check(&domain(two, &disk(2, "virtio"))).unwrap();
        assert!(refused(two, &disk(3, "virtio")).ends_with("'3' not defined in iothreadid"));
        assert!(refused(two, &disk(1, "sata")).ends_with("not available for bus sata target vda"));
        let pin = format!("{two}<cputune><iothreadpin iothread='5' cpuset='0'/></cputune>");
        assert!(refused(&pin, "").ends_with("Cannot find 'iothread' : 5"));
        let controller = |id: u32| {
            format!("<controller type='scsi' index='0'><driver iothread='{id}'/></controller>")
        };
        let mut fine = domain(two, &controller(2));
        check(&fine).unwrap();
        let error = apply(&mut fine, View::Live, 2, &Change::Remove).unwrap_err();
        assert!(
            error
                .message
                .ends_with("'2' since it is being used by controller")
        );
        assert!(
            refused(two, &controller(3))
                .ends_with("controller iothread '3' not defined in iothreadid")
        );
        let twice = "<iothreadsched iothreads='1-2' scheduler='batch'/>";
        let twice = format!("{two}<cputune>{twice}{twice}</cputune>");
        assert!(refused(&twice, "").contains("must not overlap"));
        let ids =
            "<iothreadids><iothread id='4' thread_pool_min='5' thread_pool_max='2'/></iothreadids>";
        assert!(refused(ids, "").contains("thread_pool_min must be smaller"));
        let twice = "<iothreadids><iothread id='4'/><iothread id='4'/></iothreadids>";
        assert!(refused(twice, "").contains("duplicate iothread id '4' found"));
    }

    #[test]
    fn one_that_goes_takes_what_is_said_of_it() {
        let mut d = domain(
            "<iothreads>3</iothreads><cputune><iothreadpin iothread='2' cpuset='0'/>\
             <iothreadsched iothreads='2-3' scheduler='batch'/></cputune>",
            "",
        );
        apply(&mut d, View::Live, 2, &Change::Remove).unwrap();
        assert_eq!(ids(&d), BTreeSet::from([1, 3]));
        check(&d).unwrap();
        let settings = Settings {
            pool_max: Some(8),
            ..Settings::default()
        };
        apply(&mut d, View::Inactive, 3, &Change::Set(settings)).unwrap();
        apply(&mut d, View::Inactive, 2, &Change::Add).unwrap();
        let configs = configs(&d);
        assert_eq!(configs[2].pool_max, Some(8), "{configs:?}");
        assert_eq!(ids(&d), BTreeSet::from([1, 2, 3]));
    }
}
