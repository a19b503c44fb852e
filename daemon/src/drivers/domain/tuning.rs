//! Changing and measuring the devices of domains.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Duration;

use rpc::types::{TypedParam, TypedValue};
use vmm_api::control::{Answer, Call, Stats};
use xml_schemas::Domain as Definition;
use xml_schemas::dom::Element;
use xml_schemas::domain::LifecycleAction as XmlAction;
use xml_schemas::domain::View;
use xml_schemas::domain::device::{self, Disk, DiskSource, Interface, IoTune, Rate};

use super::devices::{bandwidth, disk_limits};
use super::lifecycle::{ask, ask_within};
use super::machine;
use super::metadata::{chosen, impact};
use super::object::{Domain, Pinned};
use super::query;
use super::record::Folder;
use super::{Driver, blocking};
use crate::drivers::domain::block_jobs::chain::is_disk;
use crate::drivers::domain::block_jobs::disk_without_block_job;
use crate::error::{Error, ErrorCode, ErrorDomain, Result};
use crate::events::DomainEvent;

/// How long a VMM may take to give its counters.
const STATS_LIMIT: Duration = Duration::from_secs(1);

/// The disk that a client means, by target or path.
///
/// # Errors
/// VIR_ERR_INVALID_ARG, in `words`, if there is none.
pub fn find_disk(definition: &Definition, name: &str, words: &str) -> Result<Disk> {
    let mut disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
    disks
        .find_map(|e| {
            let disk = Disk::read(e).ok()?;
            (disk.target == name || disk.source.path() == Some(name)).then_some(disk)
        })
        .filter(|_| !name.is_empty())
        .ok_or_else(|| Error::new(ErrorCode::INVALID_ARG, words))
}

fn only_devices() -> Error {
    Error::new(
        ErrorCode::OPERATION_UNSUPPORTED,
        "block resize to full capacity supported only with 'raw' local block devices",
    )
}

/// Bytes of a block device.
fn device_size(path: &str) -> Result<u64> {
    let cannot =
        |cause: io::Error| Error::internal(format!("cannot find the size of '{path}': {cause}"));
    let mut file = crate::drivers::storage::open_to_look(path, false).map_err(cannot)?;
    let kind = file.metadata().map_err(cannot)?.file_type();
    if !kind.is_block_device() {
        return Err(only_devices());
    }
    file.seek(SeekFrom::End(0)).map_err(cannot)
}

/// The interface that a client means, by device of the host or hardware address.
///
/// # Errors
/// VIR_ERR_INVALID_ARG if there is none.
pub fn find_interface(definition: &Definition, name: &str) -> Result<Interface> {
    let cards = definition
        .devices
        .rest
        .iter()
        .filter(|e| e.name == "interface");
    cards
        .filter_map(|e| Interface::read(e).ok())
        .find(|card| {
            card.target.as_deref() == Some(name) || card.mac_text() == name.to_ascii_lowercase()
        })
        .ok_or_else(|| {
            Error::of(
                ErrorDomain::DOMAIN,
                ErrorCode::INVALID_ARG,
                format!("'{name}' is not a known interface"),
            )
        })
}

/// A device's id in a running domain.
pub fn id(alias: Option<&String>) -> Result<String> {
    alias
        .cloned()
        .ok_or_else(|| Error::internal("a running device has no id"))
}

/// The element of the device with that name, by a test on it.
fn element(definition: &mut Definition, test: impl Fn(&Element) -> bool) -> Option<&mut Element> {
    definition.devices.rest.iter_mut().find(|e| test(e))
}

impl Driver {
    /// What the devices of a running domain have counted.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off; the VMM's silence.
    pub async fn device_stats(&self, domain: &Domain) -> Result<Stats> {
        match ask_within(domain, Call::Stats, STATS_LIMIT).await? {
            Answer::Stats(stats) => Ok(stats),
            _ => Err(Error::internal("the VMM's answer makes no sense")),
        }
    }

    /// Changes the definitions that `flags` mean: first the machine by `live`, which gets the
    /// running definition, then both by `change`, then the store.
    pub(super) async fn modify(
        self: &Arc<Self>,
        domain: &Pinned,
        flags: u32,
        live: impl AsyncFnOnce(&Definition) -> Result<()>,
        change: impl Fn(&mut Definition) -> Result<()>,
    ) -> Result<()> {
        self.modify_each(domain, flags, live, |definition, _| change(definition))
            .await
    }

    /// As [`Self::modify`], where a change of the running definition differs from one of the stored definition.
    pub(super) async fn modify_each(
        self: &Arc<Self>,
        domain: &Pinned,
        flags: u32,
        live: impl AsyncFnOnce(&Definition) -> Result<()>,
        change: impl Fn(&mut Definition, View) -> Result<()>,
    ) -> Result<()> {
        let _job = domain.job().await?;
        let (stored, running) = {
            let inner = domain.lock();
            let (to_live, to_config) = impact(&inner, flags)?;
            let stored = if to_config { inner.stored()? } else { None };
            let running = inner.live.as_ref().filter(|_| to_live);
            (stored, running.map(|live| Arc::clone(&live.definition)))
        };
        let changed = |definition: &Arc<Definition>, view| {
            let mut new = Definition::clone(definition);
            change(&mut new, view).map(|()| Arc::new(new))
        };
        // Refused before anything is done.
        let stored = stored.as_ref();
        let new_stored = stored.map(|stored| changed(stored, View::Inactive));
        let new_stored = new_stored.transpose()?;
        if let Some(running) = &running {
            changed(running, View::Live)?;
            live(running).await?;
        }
        let saved = match &new_stored {
            Some(new) => Some(self.save(new).await?),
            None => None,
        };
        let mut inner = domain.lock();
        if saved.is_some() {
            inner.persistent = saved;
        }
        if let (Some(_), Some(live)) = (running, inner.live.as_mut()) {
            // As it is now: events may have changed it meanwhile.
            let new = changed(&live.definition, View::Live)?;
            let folder = Folder(live.folder.clone());
            if let Err(error) = folder.write_definition(&new) {
                log::error!(
                    "domain '{}': cannot write its definition: {error}",
                    new.name
                );
            }
            live.definition = new;
        }
        Ok(())
    }

    /// Something of a running domain is tuned otherwise now, if `flags` meant that one (VIR_DOMAIN_TUNABLE_*).
    pub(super) fn tell_tuned(
        &self,
        domain: &Domain,
        flags: u32,
        params: Vec<TypedParam>,
    ) -> Result<()> {
        let inner = domain.lock();
        if inner.live.is_some() && impact(&inner, flags)?.0 {
            self.emit(&domain.name_in(&inner), &DomainEvent::Tunable(params));
        }
        Ok(())
    }

    /// The limits of a disk.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG without such a disk.
    pub fn io_tune(&self, domain: &Domain, disk: &str, flags: u32) -> Result<IoTune> {
        let inner = domain.lock();
        let definition = chosen(&inner, flags)?;
        let words = format!("disk '{disk}' was not found in the domain config");
        Ok(find_disk(&definition, disk, &words)?.iotune)
    }

    /// Changes those limits of a disk that `values` name; what was set otherwise goes with what
    /// replaces it (a total replaces both directions, and the other way round).
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG without such a disk or limit, VIR_ERR_XML_ERROR for what cannot be
    /// together.
    pub async fn set_io_tune(
        self: &Arc<Self>,
        domain: Pinned,
        disk: &str,
        (values, group): (&[(String, u64)], Option<String>),
        flags: u32,
    ) -> Result<()> {
        let words = format!("disk '{disk}' was not found in the domain config");
        let merged = |definition: &Definition| -> Result<IoTune> {
            let own = find_disk(definition, disk, &words)?;
            let mut tune = own.iotune;
            if let Some(name) = &group {
                // A disk that joins others has what they have.
                if tune.group.as_ref() != Some(name)
                    && let Some(others) = in_group(definition, name, &own.target)
                {
                    tune = others.iotune;
                }
                tune.group = Some(name.clone()).filter(|name| !name.is_empty());
            }
            let named = |name: &str| values.iter().any(|(n, _)| n == name);
            let groups = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]];
            for group in groups {
                let total = named(IoTune::NAMES[group[0]]);
                let parts = group[1..].iter().any(|&at| named(IoTune::NAMES[at]));
                for at in group {
                    if (total && !parts && at != group[0]) || (parts && !total && at == group[0]) {
                        tune.values[at] = 0;
                    }
                }
            }
            for (name, value) in values {
                let at = IoTune::NAMES
                    .iter()
                    .position(|known| known == name)
                    .ok_or_else(|| {
                        Error::new(
                            ErrorCode::INVALID_ARG,
                            format!("parameter '{name}' not supported"),
                        )
                    })?;
                tune.values[at] = *value;
            }
            tune.check_call()
                .map_err(|text| Error::new(ErrorCode::INVALID_ARG, text))?;
            if tune.values.iter().all(|value| *value == 0) {
                if group.as_ref().is_some_and(|name| !name.is_empty()) {
                    return Err(Error::unsupported(
                        "creating a new group/updating existing with all tune parameters zero is \
                         not supported",
                    ));
                }
                // A disk without limits is in no group: the others keep theirs.
                tune.group = None;
            }
            Ok(tune)
        };
        let machine = async |running: &Definition| {
            // The stored definition takes it, as libvirt's does.
            let tune = merged(running)?;
            let mut pairs = (0..6).map(|at| (at, at + 6));
            if let Some((at, most)) =
                pairs.find(|(at, most)| tune.values[*at] == 0 && tune.values[*most] != 0)
            {
                let names = IoTune::NAMES;
                return Err(Error::unsupported(format!(
                    "cannot reset '{}' when '{}' is set",
                    names[at], names[most]
                )));
            }
            let call = Call::SetDiskLimits {
                id: id(find_disk(running, disk, &words)?.alias.as_ref())?,
                limits: disk_limits(&tune),
                group: tune.group,
            };
            ask(&domain, call).await.map(drop)
        };
        let change = |definition: &mut Definition| {
            let tune = merged(definition)?;
            let target = find_disk(definition, disk, &words)?.target;
            for e in &mut definition.devices.rest {
                if is_disk(e, &target) || tune.group.is_some() && group_of(e) == tune.group {
                    tune.write(e);
                }
            }
            Ok(())
        };
        let target = find_disk(&*query::definition(&domain.lock())?, disk, &words)?.target;
        self.modify(&domain, flags, machine, change).await?;
        let mut params = vec![TypedParam::new(
            "blkdeviotune.disk",
            TypedValue::String(target),
        )];
        params.extend(values.iter().map(|(name, value)| {
            let name = format!("blkdeviotune.{name}");
            TypedParam::new(name.as_str(), TypedValue::ULLong(*value))
        }));
        params
            .extend(group.map(|group| {
                TypedParam::new("blkdeviotune.group_name", TypedValue::String(group))
            }));
        self.tell_tuned(&domain, flags, params)
    }

    /// Limits of an interface: to the guest, from the guest.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG without such an interface.
    pub fn bandwidth(
        &self,
        domain: &Domain,
        name: &str,
        flags: u32,
    ) -> Result<(Option<Rate>, Option<Rate>)> {
        let inner = domain.lock();
        let card = find_interface(&*chosen(&inner, flags)?, name)?;
        Ok((card.inbound, card.outbound))
    }

    /// Changes them: those that are `Some`; an average of 0 means none.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG without such an interface.
    pub async fn set_bandwidth(
        self: &Arc<Self>,
        domain: Pinned,
        name: &str,
        rates: (Option<Rate>, Option<Rate>),
        flags: u32,
    ) -> Result<()> {
        let limits = |rate: Option<Rate>| rate.map(bandwidth);
        let floor = rates.0.is_some_and(|rate| rate.floor != 0);
        let machine = async |running: &Definition| {
            let card = find_interface(running, name)?;
            if floor && card.kind != "network" {
                return Err(Error::new(
                    ErrorCode::OPERATION_UNSUPPORTED,
                    format!(
                        "Invalid use of 'floor' on interface with MAC address {} - 'floor' is only \
                         supported for interface type 'network' with forward type 'nat', 'route', \
                         'open' or none",
                        card.mac_text()
                    ),
                ));
            }
            if floor {
                return Err(Error::new(
                    ErrorCode::OPERATION_UNSUPPORTED,
                    "a guaranteed rate (floor) is not there",
                ));
            }
            let call = Call::SetBandwidth {
                id: id(find_interface(running, name)?.alias.as_ref())?,
                inbound: limits(rates.0),
                outbound: limits(rates.1),
            };
            ask(&domain, call).await.map(drop)
        };
        let change = |definition: &mut Definition| {
            let mac = find_interface(definition, name)?.mac;
            if let Some(e) = element(definition, |e| is_interface(e, mac)) {
                Interface::write_rates(e, rates.0, rates.1);
            }
            Ok(())
        };
        self.modify(&domain, flags, machine, change).await
    }

    /// Makes a disk of a running domain larger; with `whole`, as large as its block device is now
    /// (`bytes` is 0 then, or says the same).
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG without such a disk; VIR_ERR_OPERATION_UNSUPPORTED for `whole` where the
    /// guest's bytes are not a device's; the VMM's.
    pub async fn resize_disk(
        self: &Arc<Self>,
        domain: Pinned,
        disk: &str,
        mut bytes: u64,
        whole: bool,
    ) -> Result<()> {
        let _job = domain.job().await?;
        let definition = Arc::clone(&domain.lock().live()?.definition);
        let words = format!("disk '{disk}' was not found in the domain config");
        let disk = find_disk(&definition, disk, &words)?;
        if disk.readonly || disk.source == DiskSource::None {
            return Err(Error::new(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!("can't resize empty or readonly disk '{}'", disk.target),
            ));
        }
        if whole {
            let DiskSource::Block(path) = &disk.source else {
                return Err(only_devices());
            };
            // Of a LUKS volume, what its header takes is not the guest's.
            if disk.format != "raw" || disk.secret.is_some() {
                return Err(only_devices());
            }
            let path = path.clone();
            let has = blocking(move || device_size(&path)).await??;
            if bytes != 0 && bytes != has {
                return Err(Error::new(
                    ErrorCode::INVALID_ARG,
                    format!("requested size {bytes} does not match the device's capacity {has}"),
                ));
            }
            bytes = has;
        }
        let id = id(disk.alias.as_ref())?;
        disk_without_block_job(&domain, &id).await?;
        let call = Call::ResizeDisk { id, bytes };
        ask(&domain, call).await.map(drop)
    }

    /// How much memory the guest is to use, in KiB.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG beyond the domain's memory; no balloon.
    pub async fn set_memory(self: &Arc<Self>, domain: Pinned, kib: u64, flags: u32) -> Result<()> {
        if kib == 0 {
            return Err(Error::argument(
                "memory in virDomainSetMemoryFlags must not be zero",
            ));
        }
        let machine = async |running: &Definition| {
            if !has_balloon(running) {
                return Err(Error::invalid(
                    "Unable to change memory of active domain without the balloon device and \
                     guest OS balloon driver",
                ));
            }
            let target_bytes = kib.saturating_mul(1024);
            ask(&domain, Call::SetBalloon { target_bytes })
                .await
                .map(drop)
        };
        let running = domain.lock().live.is_some();
        let only_live = running && flags & super::metadata::affect::CONFIG == 0;
        let change = |definition: &mut Definition| {
            if kib > definition.memory.total_kib {
                return Err(Error::new(
                    ErrorCode::INVALID_ARG,
                    "cannot set memory higher than max memory",
                ));
            }
            // What a running guest uses it says itself (BALLOON_CHANGE).
            if !only_live {
                definition.memory.current_kib = kib;
            }
            Ok(())
        };
        self.modify(&domain, flags, machine, change).await
    }

    /// How much memory a domain may have, in KiB: for a stored definition only.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for a running one.
    pub async fn set_max_memory(
        self: &Arc<Self>,
        domain: Pinned,
        kib: u64,
        flags: u32,
    ) -> Result<()> {
        let machine = async |_: &Definition| {
            Err(Error::invalid(
                "cannot resize the maximum memory on an active domain",
            ))
        };
        let change = |definition: &mut Definition| {
            if kib == 0 {
                return Err(Error::argument(
                    "memory in virDomainSetMemoryFlags must not be zero",
                ));
            }
            definition.memory.total_kib = kib;
            definition.memory.current_kib = definition.memory.current_kib.min(kib);
            Ok(())
        };
        self.modify(&domain, flags, machine, change).await
    }

    /// How often the guest is asked for its memory's statistics.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG for a period below 0; no balloon.
    pub async fn set_memory_stats_period(
        self: &Arc<Self>,
        domain: Pinned,
        period: i32,
        flags: u32,
    ) -> Result<()> {
        let seconds = u32::try_from(period).map_err(|_| {
            Error::new(
                ErrorCode::INVALID_ARG,
                "period must be a whole number of seconds",
            )
        })?;
        let none =
            || Error::invalid("Memory balloon model must be virtio to set the collection period");
        let machine = async |running: &Definition| {
            if !has_balloon(running) {
                return Err(none());
            }
            ask(&domain, Call::SetBalloonPeriod { seconds })
                .await
                .map(drop)
        };
        let change = |definition: &mut Definition| {
            let Some(e) = element(definition, is_balloon) else {
                return Err(none());
            };
            e.take_children("stats");
            if seconds != 0 {
                e.push(Element::new("stats").with_attr("period", seconds.to_string()));
            }
            Ok(())
        };
        self.modify(&domain, flags, machine, change).await
    }

    /// What a power-off, reset or crash does from now on: virDomainLifecycle and its action.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_UNSUPPORTED for what the VMM cannot change while it runs.
    pub async fn set_lifecycle_action(
        self: &Arc<Self>,
        domain: Pinned,
        kind: u32,
        action: u32,
        flags: u32,
    ) -> Result<()> {
        let invalid = |text: &str| Error::new(ErrorCode::INVALID_ARG, text);
        if kind > 2 {
            return Err(invalid("unknown lifecycle type"));
        }
        let action = match action {
            0 => XmlAction::Destroy,
            1 => XmlAction::Restart,
            2 => XmlAction::RenameRestart,
            3 => XmlAction::Preserve,
            4 => XmlAction::CoredumpDestroy,
            5 => XmlAction::CoredumpRestart,
            _ => return Err(invalid("unknown lifecycle action")),
        };
        if kind != 2 && action.dumps() {
            let names = ["poweroff", "reboot"];
            let name = names
                .get(usize::from(kind == 1))
                .copied()
                .unwrap_or_default();
            return Err(Error::unsupported(format!(
                "Lifecycle event '{name}' doesn't support '{}' action",
                action.as_str()
            )));
        }
        let machine = async |_: &Definition| {
            let action = machine::action("on_crash", action)?;
            let call = match kind {
                0 => Call::OnPoweroff(action),
                1 => Call::OnReboot(action),
                _ => Call::OnCrash(action),
            };
            ask(&domain, call).await.map(drop)
        };
        let change = |definition: &mut Definition| {
            match kind {
                0 => definition.on_poweroff = action,
                1 => definition.on_reboot = action,
                _ => definition.on_crash = action,
            }
            Ok(definition.check_actions()?)
        };
        self.modify(&domain, flags, machine, change).await
    }
}

/// One of the disks of a group, but that one.
fn in_group(definition: &Definition, group: &str, but: &str) -> Option<Disk> {
    let disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
    let mut disks = disks.filter_map(|e| Disk::read(e).ok());
    disks.find(|disk| disk.target != but && disk.iotune.group.as_deref() == Some(group))
}

/// Refuses a disk that comes to a group whose limits are others.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED, in libvirt's words.
pub(super) fn check_group(definition: &Definition, target: &str) -> Result<()> {
    let mut devices = definition.devices.rest.iter();
    let own = devices.find(|e| is_disk(e, target));
    let Some(own) = own.and_then(|e| Disk::read(e).ok()) else {
        return Ok(());
    };
    let Some(group) = &own.iotune.group else {
        return Ok(());
    };
    match in_group(definition, group, target) {
        Some(other) if other.iotune.values != own.iotune.values => {
            Err(different(&own.target, &other.target))
        }
        _ => Ok(()),
    }
}

fn different(one: &str, other: &str) -> Error {
    Error::unsupported(format!("different iotunes for disks {one} and {other}"))
}

/// Refuses disks whose limits are others than those of their group.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED, in libvirt's words.
pub(super) fn check_groups(definition: &Definition) -> Result<()> {
    let disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
    let mut groups: HashMap<String, (String, [u64; 19])> = HashMap::new();
    for disk in disks.filter_map(|e| Disk::read(e).ok()) {
        let Some(group) = disk.iotune.group else {
            continue;
        };
        match groups.entry(group) {
            Entry::Vacant(first) => {
                first.insert((disk.target, disk.iotune.values));
            }
            Entry::Occupied(first) if first.get().1 != disk.iotune.values => {
                return Err(different(&first.get().0, &disk.target));
            }
            Entry::Occupied(_) => {}
        }
    }
    Ok(())
}

/// The disks whose limits a disk has in common.
fn group_of(e: &Element) -> Option<String> {
    let disk = Some(e).filter(|e| e.name == "disk")?;
    Disk::read(disk).ok()?.iotune.group
}

fn is_interface(e: &Element, mac: [u8; 6]) -> bool {
    e.name == "interface" && Interface::read(e).is_ok_and(|card| card.mac == mac)
}

fn is_balloon(e: &Element) -> bool {
    e.name == "memballoon" && device::Balloon::read(e).is_ok_and(|b| b.is_some())
}

/// Whether a domain has a memory balloon.
pub fn has_balloon(definition: &Definition) -> bool {
    definition.devices.rest.iter().any(is_balloon)
}
