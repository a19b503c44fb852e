//! Devices that come, go and change: in stored definitions, and in machines that run.

use std::sync::Arc;
use std::time::Duration;

use vmm_api::control::{Answer, Call};
use xml_schemas::dom::{self, Element};
use xml_schemas::domain::View;
use xml_schemas::domain::device::{self, PciAddress};
use xml_schemas::{Domain as Definition, Validation, XmlError};

use super::devices::Surroundings;
use super::lifecycle::ask;
use super::machine::{self, Made};
use super::metadata::impact;
use super::object::{Domain, Inner, Pinned};
use super::record::Folder;
use super::which_device::{
    DOCUMENT, check_new, find, find_alias, in_definition, mac, parse, target,
};
use super::{Driver, channels, image_numbers, iothreads, media, scsi, tuning};
use crate::control::{Control, ControlError};
use crate::drivers::domain::block_jobs::disk_without_block_job;
use crate::drivers::network::plug::Owner;
use crate::error::{Error, ErrorCode, Result};
use crate::events::DomainEvent;
use crate::killpoint::killpoint;

/// How long a VMM may take to make a device.
const PLUG_LIMIT: Duration = Duration::from_secs(10);
/// How long a call waits for a guest to let go of a device: five seconds go by before it begins.
const UNPLUG_LIMIT: Duration = Duration::from_secs(10);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(50);

fn unsupported(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::OPERATION_UNSUPPORTED, text)
}

/// What comes and goes while the machine runs.
fn pluggable(device: &Element) -> bool {
    match device.name.as_str() {
        "disk" | "interface" | "rng" => true,
        "controller" => scsi::is_controller(device),
        "channel" => device.child("target").and_then(|t| t.attr("type")) == Some("virtio"),
        _ => false,
    }
}

/// Puts a device among others: a disk where libvirt has it, among those of its bus by its name, others at the end.
fn insert(all: &mut Vec<Element>, new: Element) {
    let key = |e: &Element| {
        let disk = Some(e).filter(|e| e.name == "disk")?;
        let disk = device::Disk::read(disk).ok()?;
        let index = disk.index()?;
        Some((disk.bus, index))
    };
    let place = key(&new).and_then(|(bus, name)| {
        let of_bus = |e: &Element| key(e).filter(|(own, _)| *own == bus);
        let before = |e: &Element| of_bus(e).is_some_and(|(_, own)| own <= name);
        let after = all.iter().rposition(before).map(|at| at + 1);
        after.or_else(|| all.iter().position(|e| of_bus(e).is_some()))
    });
    all.insert(place.unwrap_or(all.len()), new);
}

/// A definition with one more device, which gets its defaults there.
pub(super) fn with_device(
    driver: &Driver,
    definition: &Definition,
    view: View,
    new: &Element,
) -> Result<Definition> {
    let mut root = dom::parse(&definition.format(view), DOCUMENT)?;
    let mut devices = root
        .take_child("devices")
        .unwrap_or_else(|| Element::new("devices"));
    let mut all = devices.take_elements();
    insert(&mut all, new.clone());
    all.into_iter().for_each(|device| devices.push(device));
    root.push(devices);
    let mut text = String::new();
    dom::format_element(&mut text, &root, 0);
    // Lines of a text that the client has not seen tell it nothing.
    let parsed = match view {
        View::Live => Definition::parse_live(&text),
        View::Inactive => Definition::parse(&text, Validation::Lenient),
    };
    if new.name == "disk" {
        // What runs may say what no new disk may.
        device::Disk::complete(&mut new.clone()).map_err(XmlError::nowhere)?;
    }
    let parsed = parsed.map_err(XmlError::nowhere)?;
    if let Some(warning) = parsed.warnings.first() {
        return Err(Error::new(ErrorCode::XML_ERROR, warning.to_string()));
    }
    let mut changed = parsed.domain;
    let filled = match view {
        View::Live => changed.fill_stored(&driver.host()),
        View::Inactive => changed.fill_defaults(&driver.host()),
    };
    filled.map_err(XmlError::nowhere)?;
    if view == View::Live {
        as_they_run(definition, &mut changed);
    }
    changed.check_size()?;
    if matches!(new.name.as_str(), "disk" | "controller") {
        let own = new_device(definition, &changed, &new.name);
        let own = own.map(|at| &changed.devices.rest[at]);
        iothreads::check_user(&changed, own.unwrap_or(new))?;
    }
    if new.name == "disk" {
        tuning::check_group(&changed, target(new).unwrap_or_default())?;
    }
    Ok(changed)
}

/// Disks that run stay as they are, whatever would have been filled in.
fn as_they_run(definition: &Definition, changed: &mut Definition) {
    for own in definition.devices.rest.iter().filter(|e| e.name == "disk") {
        let mut disks = changed.devices.rest.iter_mut().filter(|e| e.name == "disk");
        let same =
            |e: &&mut Element| device::alias(e).is_some() && device::alias(e) == device::alias(own);
        if let Some(disk) = disks.find(same) {
            *disk = own.clone();
        }
    }
}

/// Where the new device is: what is of its kind and was not there. Disks and cards are known by their
/// names: the rest of them may read otherwise after defaults were filled in.
pub(super) fn new_device(before: &Definition, after: &Definition, kind: &str) -> Option<usize> {
    let same = |a: &Element, b: &Element| match kind {
        "disk" => target(a) == target(b),
        "interface" => mac(a) == mac(b),
        "controller" => ["type", "index"].iter().all(|of| a.attr(of) == b.attr(of)),
        _ => a == b,
    };
    // Cards may share an address: the last of them is the new one then.
    let count = |all: &[Element], device: &Element| {
        let of_kind = all.iter().filter(|e| e.name == kind);
        of_kind.filter(|e| same(e, device)).count()
    };
    let all = &after.devices.rest;
    (0..all.len()).find(|at| {
        let (seen, device) = (&all[..=*at], &all[*at]);
        device.name == kind && count(seen, device) > count(&before.devices.rest, device)
    })
}

/// Puts a device that took the place of the one at `old` of `before` where that was among those of its kind.
pub(super) fn move_to(all: &mut Vec<Element>, now: usize, before: &Definition, old: usize) {
    let device = all.remove(now);
    let earlier = before.devices.rest[..old].iter();
    let rank = earlier.filter(|e| e.name == device.name).count();
    let mut of_kind = (0..all.len()).filter(|at| all[*at].name == device.name);
    let to = of_kind.nth(rank).unwrap_or(now);
    all.insert(to, device);
}

/// The same device with a place and an id in a running machine, which has no more root ports than before.
fn placed(
    before: &Definition,
    mut after: Definition,
    new: &Element,
) -> Result<(Definition, usize)> {
    let buses: Vec<String> = before
        .devices
        .rest
        .iter()
        .filter(|e| e.name == "controller" && e.attr("type") == Some("pci"))
        .filter_map(|e| e.attr("index").map(str::to_owned))
        .collect();
    let is_new = |e: &Element| {
        e.name == "controller"
            && e.attr("type") == Some("pci")
            && !e
                .attr("index")
                .is_some_and(|index| buses.iter().any(|own| own == index))
    };
    after.devices.rest.retain(|e| !is_new(e));
    after.devices.arrange();
    let at = named(before, &mut after, &new.name)?;
    let address = PciAddress::of(&after.devices.rest[at])?;
    let bus = address.map(|address| address.bus.to_string());
    if let Some(stated) = PciAddress::of(new)?
        && !buses.contains(&stated.bus.to_string())
    {
        let last = buses.iter().filter_map(|bus| bus.parse::<u32>().ok()).max();
        return Err(Error::new(
            ErrorCode::XML_ERROR,
            format!(
                "Invalid PCI address {stated}. Only PCI buses up to {} are available",
                last.unwrap_or_default()
            ),
        ));
    }
    if !bus.is_some_and(|bus| bus != "0" && buses.contains(&bus)) {
        return Err(Error::internal("No more available PCI slots"));
    }
    Ok((after, at))
}

/// Gives the device that `after` has and `before` has not an id that no other device has. Where it is.
pub(super) fn named(before: &Definition, after: &mut Definition, kind: &str) -> Result<usize> {
    // Those that run have ids; what else they say may be written otherwise now.
    let own = before.devices.rest.iter().filter(|e| e.name == kind);
    let known: Vec<&str> = own.filter_map(device::alias).collect();
    let is_plugged = |e: &Element| {
        e.name == kind && device::alias(e).is_none_or(|alias| !known.contains(&alias))
    };
    let at = after.devices.rest.iter().position(is_plugged);
    let at = at.ok_or_else(|| Error::internal("the new device is not in the definition"))?;
    after.devices.assign_aliases();
    // An id that was another's, who has gone meanwhile, may be a third one's.
    let own = device::alias(&after.devices.rest[at])
        .unwrap_or_default()
        .to_owned();
    let taken: Vec<String> = (0..after.devices.rest.len())
        .filter(|other| *other != at)
        .filter_map(|other| device::alias(&after.devices.rest[other]).map(str::to_owned))
        .collect();
    if taken.contains(&own) {
        let prefix = own.trim_end_matches(|c: char| c.is_ascii_digit());
        let free = (0u32..)
            .map(|n| format!("{prefix}{n}"))
            .find(|name| !taken.contains(name));
        let element = &mut after.devices.rest[at];
        element.take_children("alias");
        let free = free.unwrap_or_else(|| own.clone());
        element.push(Element::new("alias").with_attr("name", free));
    }
    Ok(at)
}

/// The definitions that a change is for.
pub(super) type Both = (Option<Arc<Definition>>, Option<Arc<Definition>>);

/// The stored and the running definition, as far as `flags` mean them.
pub(super) fn meant(inner: &Inner, flags: u32) -> Result<Both> {
    let (live, stored) = impact(inner, flags)?;
    let running = inner.live.as_ref().filter(|_| live);
    Ok((
        if stored { inner.stored()? } else { None },
        running.map(|live| Arc::clone(&live.definition)),
    ))
}

impl Driver {
    pub(super) fn surroundings(&self, domain: &Domain) -> Result<Surroundings> {
        let inner = domain.lock();
        Ok(Surroundings {
            channels: self.roots.channels(),
            folder: inner.live()?.folder.clone(),
            logs: self.roots.domain_logs(),
            taken_cids: Vec::new(),
            secrets: Arc::clone(&self.secrets),
            networks: Arc::clone(&self.networks),
            owner: Owner {
                name: inner.name.clone(),
                uuid: domain.uuid,
            },
            storage: Arc::clone(&self.storage),
        })
    }

    /// Stores a changed definition.
    pub(super) async fn keep(
        self: &Arc<Self>,
        domain: &Domain,
        changed: Option<Definition>,
    ) -> Result<()> {
        if let Some(changed) = changed {
            let stored = self.save(&Arc::new(changed)).await?;
            domain.lock().persistent = Some(stored);
        }
        Ok(())
    }

    /// Gives a domain another device.
    ///
    /// # Errors
    /// The document's; VIR_ERR_OPERATION_INVALID for what is there already; what the machine cannot have.
    pub async fn attach_device(
        self: &Arc<Self>,
        domain: Pinned,
        xml: &str,
        flags: u32,
    ) -> Result<()> {
        // Before the document, as libvirt: whoever means a running domain hears first that it is off.
        impact(&domain.lock(), flags)?;
        let new = parse(xml)?;
        let _job = domain.job().await?;
        let (stored, running) = meant(&domain.lock(), flags)?;
        let stored = match &stored {
            Some(definition) => {
                check_new(definition, &new, false)?;
                Some(with_device(self, definition, View::Inactive, &new)?)
            }
            None => None,
        };
        if let Some(definition) = running {
            if let Some(have) = drive_of(&definition, &new)? {
                // As libvirt: what is attached to a drive that is there is a medium for it.
                let mut wanted = new.clone();
                device::Disk::complete(&mut wanted).map_err(XmlError::nowhere)?;
                self.change_medium(&domain, have, &wanted, false).await?;
                return self.keep(&domain, stored).await;
            }
            check_new(&definition, &new, true)?;
            // The same hardware address for both.
            let new = match &stored {
                Some(stored) => with_mac(&new, stored),
                None => new,
            };
            self.plug(&domain, definition, &new).await?;
        }
        self.keep(&domain, stored).await
    }

    async fn plug(
        self: &Arc<Self>,
        domain: &Pinned,
        definition: Arc<Definition>,
        new: &Element,
    ) -> Result<()> {
        if new.name == "controller" {
            scsi::check_plug(new)?;
        }
        if !pluggable(new) {
            return Err(unsupported(format!(
                "live attach of device '{}' is not supported",
                new.name
            )));
        }
        if new.name == "disk" {
            let disk = scsi::complete(new)?;
            if disk.device == "floppy" {
                return Err(unsupported("floppy device hotplug isn't supported"));
            }
            if disk.is_ahci() {
                let text = format!("disk bus '{}' cannot be hotplugged.", disk.bus);
                return Err(unsupported(text));
            }
            if disk.bus == "scsi" {
                let definition = self.plug_controllers(domain, definition, new).await?;
                return self.plug_one(domain, &definition, new, true).await;
            }
        }
        self.plug_one(domain, &definition, new, true).await
    }

    /// Plugs one device, and tells of it if `told`.
    pub(super) async fn plug_one(
        self: &Arc<Self>,
        domain: &Pinned,
        definition: &Definition,
        new: &Element,
        told: bool,
    ) -> Result<()> {
        let after = with_device(self, definition, View::Live, new)?;
        let at_controller = new.name == "disk" && scsi::complete(new)?.bus == "scsi";
        let (mut after, at) = match new.name.as_str() {
            "channel" => channels::placed(definition, after)?,
            "disk" if at_controller => scsi::placed(definition, after)?,
            _ => placed(definition, after, new)?,
        };
        if let Some(refused) = after.unsupported_device(at) {
            return Err(Error::unsupported(format!(
                "Vireo does not have what this domain asks for: {refused}"
            )));
        }
        let around = self.surroundings(domain)?;
        let mut next = {
            let inner = domain.lock();
            let live = inner.live()?;
            image_numbers::next(&live.definition, live.next_image)
        };
        let made = super::blocking(move || {
            let stated = image_numbers::length(&after.devices.rest[at]);
            let device = machine::build_device(&mut after, at, around)?;
            let element = &mut after.devices.rest[at];
            if element.name == "disk" {
                next = image_numbers::plugged(element, stated, next);
            }
            channels::shut(&mut after.devices.rest[at..=at]);
            Ok::<_, Error>((after, device, next))
        });
        let (after, made, next) = made.await??;
        let device = after.devices.rest[at].clone();
        let control = match self.about_to_plug(domain, &device, &made.made, next) {
            Ok(control) => control,
            Err(error) => {
                made.made.undo();
                return Err(error);
            }
        };
        killpoint("plug.noted");
        let answer = match control.send_with(made.call, made.descriptors) {
            Ok(answer) => match tokio::time::timeout(PLUG_LIMIT, answer).await {
                Ok(Ok(Ok(_))) => Ok(()),
                Ok(Ok(Err(failure))) => Err(Error::failed(made.names.explain(&failure.message))),
                Ok(Err(_)) => Err(Error::failed(ControlError::Closed.to_string())),
                Err(_) => Err(Error::new(
                    ErrorCode::OPERATION_TIMEOUT,
                    "the domain's VMM does not answer",
                )),
            },
            Err(error) => Err(Error::failed(error.to_string())),
        };
        if let Err(error) = answer {
            self.not_plugged(domain, &made.made);
            made.made.undo();
            return Err(error);
        }
        killpoint("plug.plugged");
        self.plugged(domain, &device, told.then_some(made.id))?;
        if new.name == "channel" {
            // The guest may have opened it before anybody here knew it.
            self.look_at_ports(domain).await;
        }
        Ok(())
    }

    /// Notes a device, and what was made for it, where the next daemon finds it. The way to the VMM.
    fn about_to_plug(
        &self,
        domain: &Domain,
        device: &Element,
        made: &Made,
        next_image: u32,
    ) -> Result<Control> {
        let (control, folder) = {
            let mut inner = domain.lock();
            let live = inner.live_mut()?;
            live.next_image = next_image;
            live.made.folders.extend(made.folders.iter().cloned());
            for (alias, own) in &made.devices {
                live.made.add_device(alias, own.clone());
            }
            let found = (live.control.clone(), Folder(live.folder.clone()));
            self.write_record(&inner);
            found
        };
        // What was made goes with the domain at the latest, should this be the end.
        if let Err(error) = folder.write_plugging(device) {
            self.not_plugged(domain, made);
            return Err(Error::system("cannot note the device", &error));
        }
        Ok(control)
    }

    /// It is not in the machine, and what was made for it goes.
    fn not_plugged(&self, domain: &Domain, made: &Made) {
        let mut inner = domain.lock();
        let Ok(live) = inner.live_mut() else { return };
        live.made.forget_devices(made);
        Folder(live.folder.clone()).forget_plugging();
        self.write_record(&inner);
    }

    /// A running machine has got a device.
    fn plugged(&self, domain: &Domain, device: &Element, told: Option<String>) -> Result<()> {
        let mut inner = domain.lock();
        let name = domain.name_in(&inner);
        let live = inner.live_mut()?;
        // The definition may have changed meanwhile: only the device is new.
        let mut now = Definition::clone(&live.definition);
        insert(&mut now.devices.rest, device.clone());
        now.devices.arrange();
        write(&now, &Folder(live.folder.clone()));
        Folder(live.folder.clone()).forget_plugging();
        live.definition = Arc::new(now);
        if let Some(id) = told {
            self.emit(&name, &DomainEvent::DeviceAdded(id));
        }
        Ok(())
    }

    /// Takes a device from a domain. A guest is asked to let go of it first, and waited for a while: it may take
    /// longer, or refuse.
    ///
    /// # Errors
    /// VIR_ERR_DEVICE_MISSING for what is not there; what cannot be taken from a machine that runs.
    pub async fn detach_device(
        self: &Arc<Self>,
        domain: Pinned,
        xml: &str,
        flags: u32,
    ) -> Result<()> {
        impact(&domain.lock(), flags)?;
        let wanted = parse(xml)?;
        self.detach(domain, flags, |definition| find(definition, &wanted))
            .await
    }

    /// The same, for the device with an alias.
    ///
    /// # Errors
    /// As [`Driver::detach_device`].
    pub async fn detach_alias(
        self: &Arc<Self>,
        domain: Pinned,
        alias: &str,
        flags: u32,
    ) -> Result<()> {
        self.detach(domain, flags, |definition| find_alias(definition, alias))
            .await
    }

    async fn detach(
        self: &Arc<Self>,
        domain: Pinned,
        flags: u32,
        which: impl Fn(&Definition) -> Result<usize>,
    ) -> Result<()> {
        let _job = domain.job().await?;
        let (stored, running) = meant(&domain.lock(), flags)?;
        let stored = match stored {
            Some(definition) => {
                let at = which(&definition).map_err(in_definition)?;
                let mut changed = Definition::clone(&definition);
                changed.devices.rest.remove(at);
                Some(changed)
            }
            None => None,
        };
        if let Some(definition) = running {
            let device = &definition.devices.rest[which(&definition)?];
            if device.name == "controller" {
                scsi::check_unplug(&definition, device)?;
            }
            if !pluggable(device) {
                return Err(unsupported(format!(
                    "live detach of device '{}' is not supported",
                    device.name
                )));
            }
            let alias = device::alias(device)
                .ok_or_else(|| Error::internal("a running device has no id"))?
                .to_owned();
            if device.name == "disk" {
                check_unplug(device)?;
                disk_without_block_job(&domain, &alias).await?;
            }
            ask(&domain, Call::RemoveDevice { id: alias.clone() }).await?;
            wait_until_gone(&domain, &alias).await;
        }
        self.keep(&domain, stored).await
    }

    /// Devices may have come and gone while no daemon watched, and the last one may have died in the middle of it:
    /// the definition says what the machine has.
    ///
    /// # Errors
    /// The VMM's silence.
    pub(super) async fn catch_up_devices(
        &self,
        domain: &Pinned,
        plugging: Option<Element>,
    ) -> Result<()> {
        let _job = domain.job().await?;
        let folder = Folder(domain.lock().live()?.folder.clone());
        let Answer::Status(status) = ask(domain, Call::Query).await? else {
            return Err(Error::internal("the VMM's answer makes no sense"));
        };
        let Some(there) = status.devices else {
            return Ok(());
        };
        if let Some(device) = plugging {
            let id = device::alias(&device).unwrap_or_default().to_owned();
            let known = {
                let inner = domain.lock();
                let mut all = inner.live()?.definition.devices.rest.iter();
                all.any(|e| device::alias(e) == Some(&id))
            };
            if there.contains(&id) && !known {
                log::warn!("domain '{}': device '{id}' was plugged", domain.name().name);
                self.plugged(domain, &device, Some(id))?;
                if device.name == "channel" {
                    self.look_at_ports(domain).await;
                }
            } else {
                folder.forget_plugging();
                if !known {
                    self.clear_away_after(&mut domain.lock(), &id);
                }
            }
        }
        let mut inner = domain.lock();
        let definition = &inner.live()?.definition;
        let all = definition.devices.rest.iter();
        let behind_port = |e: &&Element| {
            let place = PciAddress::of(e).ok().flatten();
            // Those of displays are no ports here.
            let port = e.name == "channel"
                && !matches!(e.attr("type"), Some("spicevmc" | "qemu-vdagent" | "dbus"));
            let unit = scsi::is_disk(e) && !definition.is_lost_drive(e);
            port || unit || place.is_some_and(|place| place.bus != 0)
        };
        let gone: Vec<String> = all
            .filter(|e| pluggable(e))
            .filter(behind_port)
            .filter_map(|e| device::alias(e).map(str::to_owned))
            .filter(|id| !there.contains(id))
            .collect();
        for id in gone {
            log::info!("domain '{}': device '{id}' has gone", inner.name);
            self.device_removed(domain, &mut inner, &id);
        }
        Ok(())
    }

    /// The VMM has taken a device out.
    pub(super) fn device_removed(&self, domain: &Domain, inner: &mut Inner, id: &str) {
        // Who lets go of a controller lets go of what has come to it meanwhile.
        let live = inner.live.as_ref();
        for disk in live.map_or_else(Vec::new, |live| scsi::disks_of(&live.definition, id)) {
            self.device_removed(domain, inner, &disk);
        }
        let name = domain.name_in(inner);
        self.block_job_gone(domain, inner, id);
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        let definition = Arc::make_mut(&mut live.definition);
        definition
            .devices
            .rest
            .retain(|e| device::alias(e) != Some(id));
        write(definition, &Folder(live.folder.clone()));
        self.clear_away_after(inner, id);
        self.emit(&name, &DomainEvent::DeviceRemoved(id.to_owned()));
    }

    /// What was made on the host for a device goes.
    fn clear_away_after(&self, inner: &mut Inner, id: &str) {
        let live = inner.live.as_mut();
        if let Some(made) = live.and_then(|live| live.made.devices.remove(id)) {
            self.write_record(inner);
            tokio::task::spawn_blocking(move || made.clear_away());
        }
    }
}

/// The running drive that a document of a CD-ROM means.
fn drive_of<'a>(definition: &'a Definition, new: &Element) -> Result<Option<&'a Element>> {
    if new.name != "disk" || new.attr("device") != Some("cdrom") {
        return Ok(None);
    }
    let mut wanted = new.clone();
    device::Disk::complete(&mut wanted).map_err(XmlError::nowhere)?;
    let bus = |e: &Element| Some(e.child("target")?.attr("bus")?.to_owned());
    let mut all = definition.devices.rest.iter();
    Ok(all.find(|e| media::is_drive(e) && target(e) == target(&wanted) && bus(e) == bus(&wanted)))
}

/// What does not go while the machine runs, in libvirt's words.
fn check_unplug(disk: &Element) -> Result<()> {
    let disk = device::Disk::read(disk)?;
    let removable = matches!(disk.device.as_str(), "cdrom" | "floppy");
    if removable && !matches!(disk.bus.as_str(), "virtio" | "scsi") {
        return Err(unsupported(format!(
            "disk device type '{}' cannot be detached",
            disk.device
        )));
    }
    if disk.is_ahci() {
        return Err(unsupported("This type of disk cannot be hot unplugged"));
    }
    Ok(())
}

pub(super) fn write(definition: &Definition, folder: &Folder) {
    if let Err(error) = folder.write_definition(definition) {
        log::error!(
            "domain '{}': cannot write its definition: {error}",
            definition.name
        );
    }
}

/// The hardware address that the stored definition has given a card that had none.
fn with_mac(new: &Element, stored: &Definition) -> Element {
    let mut new = new.clone();
    if new.name == "interface" && new.child("mac").is_none() {
        let mut cards = stored
            .devices
            .rest
            .iter()
            .rev()
            .filter(|e| e.name == "interface");
        if let Some(mac) = cards.next().and_then(|card| card.child("mac")) {
            new.push(mac.clone());
        }
    }
    new
}

async fn wait_until_gone(domain: &Domain, alias: &str) {
    let gone = async {
        loop {
            let there = match domain.lock().live.as_ref() {
                Some(live) => {
                    let mut all = live.definition.devices.rest.iter();
                    all.any(|e| device::alias(e) == Some(alias))
                }
                None => false,
            };
            if !there {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    if tokio::time::timeout(UNPLUG_LIMIT, gone).await.is_err() {
        log::info!(
            "domain '{}': the guest has not let go of device '{alias}' yet",
            domain.name().name
        );
    }
}
