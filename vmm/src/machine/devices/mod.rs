//! The PCI devices of a machine: made from their configuration, reached by their ids.

mod balloon;
mod console;
mod disk;
mod disk_jobs;
mod iothreads;
mod layers;
pub mod net;
mod sata;
mod scsi;

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use hypervisor::Vm;
use images::engine::Meter;
use virtio::balloon::BalloonHandle;
use virtio::console::ConsoleHandle;
use virtio::net::NetHandle;
use virtio::pci::{Express, Function, Host, Ids, Passive, RootPort, SlotHost, VirtioPci};
use virtio::rng::{Rate, Rng, Source};
use virtio::vsock::{Vsock, VsockOptions};
use vmm_api::config::MachineConfig;
use vmm_api::control::Stats;
use vmm_api::devices::{
    ConsolePort, DeviceConfig, DeviceKind, DiskBus, DiskConfig, PciAddress, RngConfig,
    RootPortConfig, VsockConfig, WatchdogAction, WatchdogConfig,
};

pub use self::console::PendingPort;
pub use self::disk::Disk;
pub use self::disk::open_image;
pub use self::disk_jobs::{JobPlan, open_copy};
use self::iothreads::IoThreads;
pub use self::layers::Layer;
pub use self::sata::open_medium;
pub use self::scsi::unit_of;
use super::MachineError;
use crate::bus::Movable;
use crate::devices::i6300esb::I6300esb;
use crate::devices::{Interrupt, Requests, lock};
use crate::memory::GuestMemory;
use crate::notices::{Notice, Notices};
use crate::pci::{Hosts, PciRoot, pin_slot};
use crate::ram::Ram;
use crate::resource;

/// A watchdog, and what happens when it is not fed.
#[derive(Debug)]
pub struct Watchdog {
    /// The device.
    pub device: Arc<I6300esb>,
    /// libvirt's action.
    pub action: WatchdogAction,
}

/// Every PCI device that is more than a function to the machine.
#[derive(Debug)]
pub struct PciDevices {
    /// The functions.
    pub root: Arc<PciRoot>,
    /// Disks, by id.
    pub disks: Vec<(String, Disk)>,
    /// Network cards, by id.
    pub nets: Vec<(String, NetHandle)>,
    /// The balloon, where there is one.
    pub balloon: Option<BalloonHandle>,
    /// virtio-serial devices, by id.
    consoles: Vec<(String, ConsoleHandle)>,
    /// SCSI controllers, by id.
    scsis: Vec<(String, scsi::Controller)>,
    /// Ports of virtio-serial devices, whose host sides go onto the event loop.
    pub ports: Vec<PendingPort>,
    /// Watchdogs.
    pub watchdogs: Vec<Watchdog>,
    kit: Kit,
}

/// What devices are made of.
#[derive(Debug)]
pub struct Parts {
    /// Their VM.
    pub vm: Arc<dyn Vm>,
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// Where BARs go.
    pub bars: Arc<Movable>,
    /// Where pins go.
    pub controller: Arc<dyn Interrupt>,
    /// Where resets go.
    pub requests: Arc<dyn Requests>,
    /// What devices tell the event loop.
    pub notices: Arc<Notices>,
}

/// A root port's slot.
#[derive(Debug)]
struct PortSlot {
    /// The bus behind the port.
    index: u8,
    functions: Mutex<Vec<Weak<dyn Function>>>,
    notices: Arc<Notices>,
}

impl SlotHost for PortSlot {
    fn powered_off(&self) {
        self.notices.send(Notice::SlotOff(self.index));
    }

    fn reset_secondary(&self) {
        let functions = lock(&self.functions).clone();
        for function in functions.iter().filter_map(Weak::upgrade) {
            function.reset();
        }
    }
}

/// The limits that the disks of a group have together, as long as there is one.
type Group = (String, Weak<Meter>);

/// What later devices are made with.
#[derive(Debug, Clone)]
struct Kit {
    hosts: Arc<Hosts>,
    root: Arc<PciRoot>,
    /// Slots of root ports, by the bus behind them.
    slots: Vec<(u8, Arc<PortSlot>)>,
    ram: Arc<dyn virtio::GuestMemory>,
    ram_bytes: u64,
    vcpus: u16,
    notices: Arc<Notices>,
    /// Limits that several disks have together, by the group's name.
    groups: Arc<Mutex<Vec<Group>>>,
    iothreads: IoThreads,
}

struct Builder {
    kit: Kit,
    disks: Vec<(String, Disk)>,
    nets: Vec<(String, NetHandle)>,
    balloon: Option<BalloonHandle>,
    consoles: Vec<(String, ConsoleHandle)>,
    scsis: Vec<(String, scsi::Controller)>,
    ports: Vec<PendingPort>,
    watchdogs: Vec<Watchdog>,
}

impl std::ops::Deref for Builder {
    type Target = Kit;

    fn deref(&self) -> &Kit {
        &self.kit
    }
}

impl Builder {
    fn new(kit: Kit) -> Self {
        Self {
            kit,
            disks: Vec::new(),
            nets: Vec::new(),
            balloon: None,
            consoles: Vec::new(),
            scsis: Vec::new(),
            ports: Vec::new(),
            watchdogs: Vec::new(),
        }
    }
}

impl PciDevices {
    /// Makes the root complex and all devices of `config`.
    ///
    /// # Errors
    /// What can't be made, by its id.
    pub fn new(config: &MachineConfig, parts: &Parts) -> Result<Self, MachineError> {
        let mut iothreads = IoThreads::default();
        for thread in &config.iothreads {
            iothreads.set(*thread).map_err(MachineError::Config)?;
        }
        let hosts = Hosts::new(
            parts.vm.clone(),
            parts.bars.clone(),
            parts.controller.clone(),
        );
        let mut builder = Builder::new(Kit {
            hosts: Arc::new(hosts),
            root: Arc::new(PciRoot::new(parts.requests.clone())),
            slots: Vec::new(),
            ram: Arc::new(Ram::new(parts.memory.clone(), parts.vm.clone())),
            ram_bytes: parts.memory.size(),
            vcpus: u16::try_from(config.vcpus).unwrap_or(u16::MAX),
            notices: parts.notices.clone(),
            groups: Arc::default(),
            iothreads,
        });
        builder.host_bridge(PciAddress::default())?;
        // Root ports first: the rest may be behind them.
        let (ports, others): (Vec<_>, Vec<_>) = config
            .devices
            .iter()
            .partition(|device| matches!(device.kind, DeviceKind::RootPort(_)));
        for device in ports {
            if let DeviceKind::RootPort(port) = device.kind {
                let occupied = others.iter().any(|other| other.address.bus == port.index);
                builder.root_port(device, port, occupied)?;
            }
        }
        for device in &others {
            match &device.kind {
                DeviceKind::Ahci(ahci) => builder.ahci(device, *ahci, &others)?,
                DeviceKind::Scsi(scsi) => builder.scsi(device, *scsi, &others)?,
                // They come with their controllers.
                DeviceKind::Disk(disk) if !disk.bus.is_virtio() => {
                    has_controller(disk, &others).map_err(|error| failed(device, error))?
                }
                _ => builder.device(device)?,
            }
        }
        Ok(Self {
            root: builder.kit.root.clone(),
            kit: builder.kit,
            disks: builder.disks,
            nets: builder.nets,
            balloon: builder.balloon,
            consoles: builder.consoles,
            scsis: builder.scsis,
            ports: builder.ports,
            watchdogs: builder.watchdogs,
        })
    }
}

impl PciDevices {
    /// Makes a device behind a root port whose slot is empty, and tells the guest.
    ///
    /// # Errors
    /// What can't be made or plugged, in words for the caller.
    pub fn plug(&mut self, device: &DeviceConfig) -> Result<Arc<dyn Function>, String> {
        let index = device.address.bus;
        let port = self.root.port(index).filter(|_| index != 0);
        let port = port.ok_or("only slots of root ports take devices while the guest runs")?;
        let mut builder = Builder::new(self.kit.clone());
        match &device.kind {
            DeviceKind::Disk(disk) if !disk.bus.is_virtio() => {
                return Err("SATA drives can't be plugged while the guest runs".into());
            }
            DeviceKind::Disk(_) | DeviceKind::Net(_) | DeviceKind::Rng(_) | DeviceKind::Scsi(_) => {
            }
            _ => return Err("devices of this kind can't be plugged while the guest runs".into()),
        }
        builder.device(device).map_err(|error| error.to_string())?;
        self.disks.append(&mut builder.disks);
        self.nets.append(&mut builder.nets);
        self.scsis.append(&mut builder.scsis);
        let function = self
            .root
            .placed()
            .find(|(place, _)| *place == device.address)
            .map(|(_, function)| function)
            .ok_or("the device has no place")?;
        port.set_present(true);
        Ok(function)
    }

    /// Asks the guest to let go of what is in the slot of the root port that leads to bus `index`.
    ///
    /// # Errors
    /// There is no such slot, in words for the caller.
    pub fn press_button(&self, index: u8) -> Result<(), String> {
        let port = self.root.port(index).filter(|_| index != 0);
        let port = port.ok_or("only devices behind root ports can be unplugged")?;
        port.press_button();
        Ok(())
    }

    /// Takes out what is behind the root port that leads to bus `index`, of which these are the ids.
    pub fn unplug(&mut self, index: u8, ids: &[String]) {
        let functions = self.root.take_behind(index);
        if let Some((_, slot)) = self.kit.slots.iter().find(|slot| slot.0 == index) {
            lock(&slot.functions).clear();
        }
        if let Some(port) = self.root.port(index) {
            port.set_present(false);
        }
        for function in &functions {
            function.reset();
        }
        // What refers to a device's insides goes with it.
        self.disks.retain(|(id, _)| !ids.contains(id));
        self.nets.retain(|(id, _)| !ids.contains(id));
        self.consoles.retain(|(id, _)| !ids.contains(id));
        self.scsis.retain(|(id, _)| !ids.contains(id));
        drop(functions);
    }

    /// Gives the virtio-serial device `controller` another port; its host side is for the caller to serve.
    ///
    /// # Errors
    /// What can't be opened or plugged, in words for the caller.
    pub fn plug_port(&self, controller: &str, port: &ConsolePort) -> Result<PendingPort, String> {
        let console = find(&self.consoles, controller);
        let console = console.ok_or_else(|| format!("there is no device '{controller}'"))?;
        console::plug(console, port, &self.kit.notices)
    }

    /// Takes a port from the virtio-serial device `controller`.
    ///
    /// # Errors
    /// It has none of that number, in words for the caller.
    pub fn unplug_port(&self, controller: &str, number: u32) -> Result<(), String> {
        let console = find(&self.consoles, controller);
        let console = console.ok_or_else(|| format!("there is no device '{controller}'"))?;
        console
            .remove_port(number)
            .map_err(|error| error.to_string())
    }

    /// The network card `id`.
    ///
    /// # Errors
    /// There is none of that name, in words for the caller.
    pub fn net(&self, id: &str) -> Result<&NetHandle, String> {
        find(&self.nets, id).ok_or_else(|| format!("there is no network card '{id}'"))
    }

    /// The I/O threads.
    pub fn iothreads(&mut self) -> &mut IoThreads {
        &mut self.kit.iothreads
    }

    /// The disk `id`.
    ///
    /// # Errors
    /// There is none of that name, in words for the caller.
    pub fn disk(&self, id: &str) -> Result<&Disk, String> {
        find(&self.disks, id).ok_or_else(|| format!("there is no disk '{id}'"))
    }

    /// All disks' files are somebody else's from now on, but for those whose content goes along.
    ///
    /// # Errors
    /// In words for the caller; they are this machine's as before.
    pub fn let_go_of_disks(&self, but: &[String]) -> Result<(), String> {
        for (index, (id, disk)) in self.disks.iter().enumerate() {
            if but.contains(id) {
                continue;
            }
            if let Err(error) = disk.let_go() {
                for (_, disk) in self.disks.iter().take(index) {
                    disk.take_back()?;
                }
                return Err(format!("{id}: {error}"));
            }
        }
        Ok(())
    }

    /// Undoes [`PciDevices::let_go_of_disks`].
    ///
    /// # Errors
    /// In words for the caller: somebody has them.
    pub fn take_disks_back(&self) -> Result<(), String> {
        self.disks
            .iter()
            .try_for_each(|(id, disk)| disk.take_back().map_err(|error| format!("{id}: {error}")))
    }

    /// Disks' images as guests see them, for their end.
    pub fn images(&self) -> Vec<(String, Arc<dyn images::Image>)> {
        let disks = self.disks.iter();
        disks
            .map(|(id, disk)| (id.clone(), disk.content()))
            .collect()
    }

    /// The balloon.
    ///
    /// # Errors
    /// There is none, in words for the caller.
    pub fn balloon(&self) -> Result<&BalloonHandle, String> {
        let balloon = self.balloon.as_ref();
        balloon.ok_or_else(|| "this machine has no balloon".to_owned())
    }

    /// What all devices have counted.
    pub fn stats(&self) -> Stats {
        let disk = |(id, disk): &(String, Disk)| (id.clone(), disk.stats());
        let net = |(id, handle): &(String, NetHandle)| (id.clone(), net::stats(handle));
        Stats {
            disks: self.disks.iter().map(disk).collect(),
            nets: self.nets.iter().map(net).collect(),
            balloon: self.balloon.as_ref().map(balloon::stats),
            thresholds: self
                .disks
                .iter()
                .flat_map(|(id, disk)| {
                    let marks = disk.marks_behind().into_iter();
                    marks.map(move |(image, bytes)| (id.clone(), image, bytes))
                })
                .collect(),
        }
    }
}

fn find<'a, T>(list: &'a [(String, T)], id: &str) -> Option<&'a T> {
    list.iter()
        .find(|entry| entry.0 == id)
        .map(|entry| &entry.1)
}

/// The controller that a drive names is there.
fn has_controller(disk: &DiskConfig, devices: &[&DeviceConfig]) -> Result<(), String> {
    let named = |id: &String| {
        let device = devices.iter().find(|device| device.id == *id);
        device.map(|device| &device.kind)
    };
    match &disk.bus {
        DiskBus::Virtio => Ok(()),
        DiskBus::Sata { controller, .. } => match named(controller) {
            Some(DeviceKind::Ahci(_)) => Ok(()),
            _ => Err(format!("there is no SATA controller '{controller}'")),
        },
        DiskBus::Scsi { controller, .. } => match named(controller) {
            Some(DeviceKind::Scsi(_)) => Ok(()),
            _ => Err(format!("there is no SCSI controller '{controller}'")),
        },
    }
}

fn failed(device: &DeviceConfig, error: impl std::fmt::Display) -> MachineError {
    MachineError::Config(format!("device {}: {error}", device.id))
}

impl Builder {
    /// What a function at `place` gets of the machine.
    fn host(&self, place: PciAddress) -> (Host, crate::pci::Owner) {
        let port = self.root.port_to(place.bus).filter(|_| place.bus != 0);
        self.hosts.host(pin_slot(place, port))
    }

    /// A function that is nothing but there.
    fn host_bridge(&mut self, place: PciAddress) -> Result<(), MachineError> {
        let (host, _) = self.host(place);
        let ids = Ids {
            // Red Hat's generic PCI Express host bridge: known to every guest, driven by none.
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let bridge = Arc::new(Passive::new("host-bridge", &ids, host));
        self.root
            .insert(place, bridge)
            .map_err(|error| MachineError::Config(error.to_string()))
    }

    fn root_port(
        &mut self,
        device: &DeviceConfig,
        config: RootPortConfig,
        occupied: bool,
    ) -> Result<(), MachineError> {
        let (host, owner) = self.host(device.address);
        let slot = Arc::new(PortSlot {
            index: config.index,
            functions: Mutex::default(),
            notices: self.notices.clone(),
        });
        self.kit.slots.push((config.index, slot.clone()));
        let port = RootPort::new(
            u16::from(config.chassis),
            config.hotplug,
            occupied,
            slot,
            host,
        )
        .map_err(|error| failed(device, error))?;
        let port = Arc::new(port);
        let function: Arc<dyn Function> = port.clone();
        owner.set(&function);
        self.root
            .insert_port(device.address, config.index, port)
            .map_err(|error| failed(device, error))
    }

    fn function(
        &mut self,
        device: &DeviceConfig,
        owner: &crate::pci::Owner,
        function: Arc<dyn Function>,
    ) -> Result<(), MachineError> {
        owner.set(&function);
        if let Some((_, slot)) = self.slots.iter().find(|slot| slot.0 == device.address.bus) {
            lock(&slot.functions).push(Arc::downgrade(&function));
        }
        self.root
            .insert(device.address, function)
            .map_err(|error| failed(device, error))
    }

    /// Puts a virtio device behind a function of its own.
    fn virtio(
        &mut self,
        device: &DeviceConfig,
        virtio: Box<dyn virtio::Device>,
    ) -> Result<(), MachineError> {
        let (host, owner) = self.host(device.address);
        let express = if device.address.bus == 0 {
            Express::Integrated
        } else {
            Express::Endpoint
        };
        let function = VirtioPci::new(virtio, express, self.ram.clone(), host)
            .map_err(|error| failed(device, error))?;
        self.function(device, &owner, Arc::new(function))
    }

    fn device(&mut self, device: &DeviceConfig) -> Result<(), MachineError> {
        match &device.kind {
            DeviceKind::RootPort(_) => Err(failed(device, "a root port behind a root port")),
            DeviceKind::Ahci(_) => Err(failed(device, "a SATA controller comes with its drives")),
            DeviceKind::Scsi(config) => self.scsi(device, *config, &[]),
            DeviceKind::Disk(config) => self.disk(device, config),
            DeviceKind::Net(config) => self.net(device, config),
            DeviceKind::Rng(config) => self.rng(device, config),
            DeviceKind::Watchdog(config) => self.watchdog(device, *config),
            DeviceKind::Console(config) => self.console(device, config),
            DeviceKind::Balloon(config) => self.balloon(device, config),
            DeviceKind::Vsock(config) => self.vsock(device, config),
        }
    }

    fn vsock(&mut self, device: &DeviceConfig, config: &VsockConfig) -> Result<(), MachineError> {
        let listener = config.listener.as_ref().map(resource::listen).transpose()?;
        let options = VsockOptions {
            cid: config.cid,
            listener,
            prefix: config.prefix.clone(),
        };
        let vsock = Vsock::new(options).map_err(|error| failed(device, error))?;
        self.virtio(device, Box::new(vsock))
    }

    fn rng(&mut self, device: &DeviceConfig, config: &RngConfig) -> Result<(), MachineError> {
        let source = resource::open_read(&config.source)?;
        // A hardware generator that has nothing now must not hold up the device's thread.
        resource::set_nonblocking(&source).map_err(|error| failed(device, error))?;
        let rate = (config.max_bytes > 0).then(|| Rate {
            bytes: config.max_bytes.into(),
            period: Duration::from_millis(config.period_ms.into()),
        });
        let rng =
            Rng::new(Source::File(source.into()), rate).map_err(|error| failed(device, error))?;
        self.virtio(device, Box::new(rng))
    }

    fn watchdog(
        &mut self,
        device: &DeviceConfig,
        config: WatchdogConfig,
    ) -> Result<(), MachineError> {
        let (host, owner) = self.host(device.address);
        let watchdog = Arc::new(I6300esb::new(host).map_err(|error| failed(device, error))?);
        self.function(device, &owner, watchdog.clone())?;
        self.watchdogs.push(Watchdog {
            device: watchdog,
            action: config.action,
        });
        Ok(())
    }
}
