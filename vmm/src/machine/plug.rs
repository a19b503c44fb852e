//! Devices that come and go while the guest runs, through the slots of PCI Express root ports (PCI Express Base
//! Specification 5.0, 6.7).

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use vmm_api::config::Resource;
use vmm_api::control::Event;
use vmm_api::devices::{ConsolePort, DeviceConfig, DeviceKind, ImageConfig};

use super::Machine;
use super::build::token;
use super::devices::{open_medium, unit_of};
use crate::chardev::Channel;
use crate::num::to_usize;

/// Within five seconds another press of the button tells the guest to keep the device after all (6.7.1.5).
const SECOND_THOUGHTS: Duration = Duration::from_secs(8);

impl Machine {
    /// Plugs a device. A resource that is a descriptor has its number among those passed along.
    pub(super) fn add_device(
        &mut self,
        config: &DeviceConfig,
        passed: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if self
            .config
            .devices
            .iter()
            .any(|known| known.id == config.id)
        {
            return Err(format!("there is a device '{}' already", config.id));
        }
        let is_unit = unit_of(config).is_some();
        if is_unit
            && self
                .config
                .devices
                .iter()
                .any(|known| unit_of(known) == unit_of(config))
        {
            return Err("its place at the SCSI controller is taken".to_owned());
        }
        let behind = |known: &&DeviceConfig| !is_unit && known.address.bus == config.address.bus;
        if let Some(known) = self.config.devices.iter().find(behind) {
            return Err(format!("its slot is taken by device '{}'", known.id));
        }
        let mut own = config.clone();
        let handed = hand_over(own.resources_mut(), passed)?;
        let pci = &mut self.devices.pci;
        let made = match is_unit {
            true => pci.plug_unit(&own).map(|()| None),
            false => pci.plug(&own).map(Some),
        };
        let left = handed.into_iter().filter(|fd| close_unused(*fd)).count();
        let function = made?;
        if left > 0 {
            log::warn!("device {}: {left} descriptors were not used", own.id);
        }
        // A unit is as its controller.
        if let Some(function) = function.filter(|_| self.devices_paused) {
            function.pause();
        }
        self.config.devices.push(own);
        Ok(())
    }

    /// Puts another medium into a CD-ROM drive, or takes it out. Descriptors as for [`Machine::add_device`]. False: the
    /// guest has locked the tray, and is asked to let go of the medium.
    pub(super) fn change_medium(
        &mut self,
        id: &str,
        image: Option<&ImageConfig>,
        force: bool,
        passed: Vec<OwnedFd>,
    ) -> Result<bool, String> {
        let disk = self.devices.pci.disk(id)?;
        if !disk.is_cdrom() {
            return Err(format!("'{id}' is no CD-ROM drive"));
        }
        if self.job.is_some() {
            return Err("a job is running".to_owned());
        }
        if !force && !disk.ask_for_medium() {
            return Ok(false);
        }
        let mut devices = self.config.devices.iter();
        let device = devices.find(|known| known.id == id);
        let device = device.ok_or_else(|| format!("there is no device '{id}'"))?;
        let mut own = image.cloned();
        let mut layers = Vec::new();
        if let Some(own) = &mut own {
            let handed = hand_over(own.resources_mut(), passed)?;
            let opened = open_medium(device, own);
            let left = handed.into_iter().filter(|fd| close_unused(*fd)).count();
            layers = opened?;
            if left > 0 {
                log::warn!("{id}: {left} descriptors were not used");
            }
        }
        let before = self.for_a_moment(|machine| {
            let disk = machine.devices.pci.disk(id)?;
            Ok(disk.put_medium(layers))
        })?;
        drop(before);
        for device in &mut self.config.devices {
            if device.id == id
                && let DeviceKind::Disk(disk) = &mut device.kind
            {
                disk.image = own.take();
            }
        }
        Ok(true)
    }

    /// Gives a virtio-serial device another port, with its host side on the event loop.
    pub(super) fn add_port(
        &mut self,
        controller: &str,
        port: &ConsolePort,
        passed: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let named = |known: &DeviceConfig| known.id == port.id;
        let has = |ports: &[ConsolePort]| ports.iter().any(|known| known.id == port.id);
        if self.config.devices.iter().any(|known| {
            named(known) || matches!(&known.kind, DeviceKind::Console(own) if has(&own.ports))
        }) {
            return Err(format!("there is a device '{}' already", port.id));
        }
        let mut own = port.clone();
        let handed = hand_over(own.resources_mut(), passed)?;
        let made = self.devices.pci.plug_port(controller, &own);
        let left = handed.into_iter().filter(|fd| close_unused(*fd)).count();
        let pending = made?;
        if left > 0 {
            log::warn!("port {}: {left} descriptors were not used", own.id);
        }
        let index = self.next_channel;
        let (receiver, link, log) = (Some(pending.end as _), pending.link, pending.log);
        let channel = Channel::new(&self.epoll, token(index), pending.port, receiver, link, log);
        let channel = match channel {
            Ok(channel) => channel,
            Err(error) => {
                self.devices.pci.unplug_port(controller, own.number)?;
                return Err(error.to_string());
            }
        };
        self.next_channel += 1;
        self.channels.insert(index, channel);
        self.port_channels.push((own.id.clone(), index));
        let mut devices = self.config.devices.iter_mut();
        if let Some(device) = devices.find(|known| known.id == controller)
            && let DeviceKind::Console(console) = &mut device.kind
        {
            console.ports.push(own);
        }
        Ok(())
    }

    /// Takes an I/O thread away.
    pub(super) fn remove_iothread(&mut self, id: u32) -> Result<(), String> {
        let serves = |known: &&DeviceConfig| match &known.kind {
            DeviceKind::Disk(disk) => disk.iothread == Some(id),
            DeviceKind::Scsi(scsi) => scsi.iothread == Some(id),
            _ => false,
        };
        match self.config.devices.iter().find(serves) {
            Some(of) if matches!(of.kind, DeviceKind::Scsi(_)) => {
                Err(format!("I/O thread {id} serves controller '{}'", of.id))
            }
            Some(disk) => Err(format!("I/O thread {id} serves disk '{}'", disk.id)),
            None => self.devices.pci.iothreads().remove(id),
        }
    }

    /// What can be plugged and is there, by id.
    pub(super) fn pluggable(&self) -> Vec<String> {
        let mut ids = Vec::new();
        for device in &self.config.devices {
            if device.address.bus != 0 || unit_of(device).is_some() {
                ids.push(device.id.clone());
            }
            if let DeviceKind::Console(console) = &device.kind {
                ids.extend(console.ports.iter().map(|port| port.id.clone()));
            }
        }
        ids
    }

    /// Takes a port from its virtio-serial device, as a plug is pulled. False: there is no such port.
    pub(super) fn remove_port(&mut self, id: &str) -> Result<bool, String> {
        let mut found = None;
        for device in &self.config.devices {
            if let DeviceKind::Console(console) = &device.kind
                && let Some(port) = console.ports.iter().find(|port| port.id == id)
            {
                found = Some((device.id.clone(), port.number));
            }
        }
        let Some((controller, number)) = found else {
            return Ok(false);
        };
        self.devices.pci.unplug_port(&controller, number)?;
        // That somebody in the guest had it open is over before it is.
        self.handle_notices();
        for device in &mut self.config.devices {
            if let DeviceKind::Console(console) = &mut device.kind {
                console.ports.retain(|port| port.id != id);
            }
        }
        self.close_port(id);
        self.event(Event::DeviceRemoved { id: id.to_owned() });
        Ok(true)
    }

    /// virtio-serial devices that are gone have taken their ports along.
    fn close_ports_of(&mut self, ids: &[String]) {
        let mut ports = Vec::new();
        for device in &self.config.devices {
            if let DeviceKind::Console(console) = &device.kind
                && ids.contains(&device.id)
            {
                ports.extend(console.ports.iter().map(|port| port.id.clone()));
            }
        }
        for id in ports {
            self.close_port(&id);
            self.event(Event::DeviceRemoved { id });
        }
    }

    /// The host side of a port that is gone.
    fn close_port(&mut self, id: &str) {
        let Some(at) = self.port_channels.iter().position(|(own, _)| own == id) else {
            return;
        };
        let (_, index) = self.port_channels.remove(at);
        self.open_ports.remove(id);
        if let Some(channel) = self.channels.remove(&index) {
            channel.close(&self.epoll);
        }
    }

    /// Asks the guest to let go of a device; [`Event::DeviceRemoved`] tells when it has.
    pub(super) fn remove_device(&mut self, id: &str) -> Result<(), String> {
        let known = self.config.devices.iter().find(|known| known.id == id);
        if let Some(unit) = known.filter(|known| unit_of(known).is_some()) {
            if !self.units_going.contains(&unit.id) {
                self.devices.pci.unplug_unit(unit)?;
                self.units_going.push(unit.id.clone());
            }
            // Of a machine that stands still it has gone by now.
            self.handle_notices();
            return Ok(());
        }
        let sata = |known: &DeviceConfig| match &known.kind {
            DeviceKind::Disk(disk) => !disk.bus.is_virtio(),
            _ => false,
        };
        if known.is_some_and(sata) {
            return Err("SATA drives can't be unplugged while the guest runs".to_owned());
        }
        let index = known
            .map(|known| known.address.bus)
            .ok_or_else(|| format!("there is no device '{id}'"))?;
        let now = Instant::now();
        let pressed = self.unplugging.iter().find(|(bus, _)| *bus == index);
        if pressed.is_some_and(|(_, when)| now.duration_since(*when) < SECOND_THOUGHTS) {
            return Ok(());
        }
        self.devices.pci.press_button(index)?;
        self.unplugging.retain(|(bus, _)| *bus != index);
        self.unplugging.push((index, now));
        Ok(())
    }

    /// Nothing of a SCSI disk is in use any more.
    pub(super) fn unit_gone(&mut self, id: &str) {
        let Some(place) = self.units_going.iter().position(|going| going == id) else {
            // With its controller, which tells of it.
            return;
        };
        self.units_going.remove(place);
        self.config.devices.retain(|known| known.id != id);
        self.event(Event::DeviceRemoved { id: id.to_owned() });
    }

    /// The guest has let go of what is behind the root port that leads to bus `index`.
    pub(super) fn slot_off(&mut self, index: u8) {
        self.unplugging.retain(|(bus, _)| *bus != index);
        let behind = |known: &DeviceConfig| index != 0 && known.address.bus == index;
        let ids: Vec<String> = self
            .config
            .devices
            .iter()
            .filter(|known| behind(known))
            .map(|known| known.id.clone())
            .collect();
        self.abandon_block_jobs(&ids);
        self.units_going.retain(|going| !ids.contains(going));
        self.devices.pci.unplug(index, &ids);
        self.close_ports_of(&ids);
        if let Some(first) = ids.first() {
            self.forget_unplugged(first);
        }
    }

    /// A device that has been taken out of its slot, and all that were there with it, are gone for good: as soon as
    /// no block job has their images any more. Until then nothing else comes into the slot, nor under their ids.
    pub(super) fn forget_unplugged(&mut self, id: &str) {
        let devices = &self.config.devices;
        let Some(bus) = devices.iter().find(|known| known.id == id) else {
            return;
        };
        let bus = bus.address.bus;
        let behind = |known: &DeviceConfig| known.address.bus == bus;
        let ids: Vec<String> = devices
            .iter()
            .filter(|known| behind(known))
            .map(|known| known.id.clone())
            .collect();
        if self.block_jobs.iter().any(|job| ids.contains(&job.disk)) {
            return;
        }
        self.config.devices.retain(|known| !behind(known));
        for id in ids {
            self.event(Event::DeviceRemoved { id });
        }
    }
}

/// Turns numbers of passed descriptors into those they have here, as if they had been inherited: whoever opens the
/// resource takes each over, once.
pub(super) fn hand_over(
    resources: Vec<&mut Resource>,
    passed: Vec<OwnedFd>,
) -> Result<Vec<i32>, String> {
    let numbers: Vec<i32> = passed.iter().map(AsRawFd::as_raw_fd).collect();
    let mut used = vec![false; numbers.len()];
    for resource in resources {
        let Resource::Fd(number) = resource else {
            return Err("a device of a running machine is made from descriptors only".into());
        };
        let at = u32::try_from(*number).map_or(usize::MAX, |at| to_usize(at.into()));
        match (numbers.get(at), used.get_mut(at)) {
            (Some(own), Some(used)) if !*used => {
                *number = *own;
                *used = true;
            }
            _ => {
                return Err(format!(
                    "descriptor {number} was not passed, or is named twice"
                ));
            }
        }
    }
    for fd in &passed {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|error| error.to_string())?;
    }
    Ok(passed.into_iter().map(IntoRawFd::into_raw_fd).collect())
}

/// Closes a handed descriptor that nobody has taken over: such a one still lacks close-on-exec, which everything else
/// in this process has.
pub(super) fn close_unused(fd: i32) -> bool {
    // SAFETY: F_GETFD only reads a flag, and fails on what is not open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    let unused = flags >= 0 && flags & libc::FD_CLOEXEC == 0;
    if unused {
        // SAFETY: without the flag it is the one that was handed over, and has no other owner.
        unsafe { libc::close(fd) };
    }
    unused
}
