//! A definition's devices as the VMM's configuration, with everything they need opened or made.

mod disk;
mod net;
mod passt;
mod tap;

use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vmm_api::devices::{
    AhciConfig, BalloonConfig, ConsoleConfig, ConsolePort, DeviceConfig, DeviceKind, DiskBus,
    PciAddress, RngConfig, RootPortConfig, ScsiConfig, VsockConfig, WatchdogAction, WatchdogConfig,
};
use xml_schemas::Domain;
use xml_schemas::dom::Element;
use xml_schemas::domain::device::{self, Balloon, Channel, Disk, Rng, Vsock, Watchdog};
use xml_schemas::domain::{CharSource, SocketMode};

pub use self::disk::{behind_image, image_info, limits as disk_limits, open_writable, peek};
pub use self::net::{bandwidth, check_vlan, set_port};

use super::channels::made_up;
use super::iothreads;
use super::machine::Builder;
use crate::error::{Error, Result};
use crate::files;

/// Ports of a SATA controller, as ICH9 has them.
const AHCI_PORTS: u8 = 6;
/// Ports of a virtio-serial device where its definition does not say.
const PORTS: u32 = 31;

/// What devices are made from beside the definition.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Where channels' sockets are made, a folder for each domain.
    pub channels: PathBuf,
    /// The domain's folder below `run`.
    pub folder: PathBuf,
    /// Where passt's words go.
    pub logs: PathBuf,
    /// Guest ids of vsock that other domains have.
    pub taken_cids: Vec<u32>,
    /// Values of secrets.
    pub secrets: std::sync::Arc<crate::drivers::secret::Driver>,
    /// What cards are connected to.
    pub networks: std::sync::Arc<crate::drivers::network::Driver>,
    /// Whose machine it is.
    pub owner: crate::drivers::network::plug::Owner,
    /// Pools whose volumes are disks.
    pub storage: std::sync::Arc<crate::drivers::storage::Driver>,
}

/// A device's place for the VMM. A drive has its controller's.
fn place(live: &Domain, element: &Element) -> Result<PciAddress> {
    let element = match element.name.as_str() {
        "disk" => controller_of(live, &Disk::read(element)?)?.unwrap_or(element),
        _ => element,
    };
    let address = device::PciAddress::of(element)?
        .ok_or_else(|| Error::internal(format!("a device has no PCI address: {}", element.name)))?;
    Ok(PciAddress {
        bus: address.bus,
        device: address.slot,
        function: address.function,
    })
}

/// The controller that a drive is at; `None` of a disk that is a PCI device itself.
fn controller_of<'a>(live: &'a Domain, disk: &Disk) -> Result<Option<&'a Element>> {
    if !disk.has_controller() {
        return Ok(None);
    }
    let wanted = disk.drive.map(|place| place.controller.to_string());
    let mut all = live.devices.rest.iter();
    let found = all.find(|e| {
        e.name == "controller"
            && e.attr("type") == Some(&disk.bus)
            && e.attr("index") == wanted.as_deref()
    });
    found
        .map(Some)
        .ok_or_else(|| Error::internal(format!("disk '{}' has no controller", disk.target)))
}

/// Where a disk is.
fn disk_bus(live: &Domain, disk: &Disk) -> Result<DiskBus> {
    let Some(controller) = controller_of(live, disk)? else {
        return Ok(DiskBus::Virtio);
    };
    let nowhere = || Error::unsupported(format!("disk '{}': there is no such place", disk.target));
    let controller = id(controller)?;
    if disk.bus == "scsi" {
        let place = disk.drive.and_then(|place| place.unit());
        let (target, lun) = place.ok_or_else(nowhere)?;
        return Ok(DiskBus::Scsi {
            controller,
            target,
            lun,
        });
    }
    let port = disk.drive.and_then(|place| place.port(&disk.bus));
    Ok(DiskBus::Sata {
        controller,
        port: port.ok_or_else(nowhere)?,
    })
}

/// The id that [`xml_schemas::domain::Devices::assign_aliases`] has given.
fn id(element: &Element) -> Result<String> {
    device::alias(element)
        .map(str::to_owned)
        .ok_or_else(|| Error::internal(format!("a device has no id: {}", element.name)))
}

impl Builder {
    /// All PCI devices of `live`, which gets what is chosen here.
    pub(super) fn devices(&mut self, live: &mut Domain) -> Result<Vec<DeviceConfig>> {
        let mut configs = Vec::new();
        for at in 0..live.devices.rest.len() {
            let kind = self.device(live, at)?;
            if let Some(kind) = kind {
                let element = &live.devices.rest[at];
                configs.push(DeviceConfig {
                    id: id(element)?,
                    address: place(live, element)?,
                    kind,
                });
            }
        }
        // Buses before what is behind them, controllers before their drives.
        configs.sort_by_key(|config| {
            let port = matches!(config.kind, DeviceKind::RootPort(_));
            let drive = matches!(config.kind, DeviceKind::Disk(_));
            (!port, config.address, drive)
        });
        Ok(configs)
    }

    /// The device at `at` of `live`.
    pub(super) fn one_device(&mut self, live: &mut Domain, at: usize) -> Result<DeviceConfig> {
        let kind = self.device(live, at)?;
        let element = &live.devices.rest[at];
        Ok(DeviceConfig {
            id: id(element)?,
            address: place(live, element)?,
            kind: kind.ok_or_else(|| {
                Error::unsupported(format!("the machine has no device '{}'", element.name))
            })?,
        })
    }

    /// A device, with what was made for it kept apart.
    fn device(&mut self, live: &mut Domain, at: usize) -> Result<Option<DeviceKind>> {
        let before = std::mem::take(&mut self.made);
        let kind = self.device_kind(live, at);
        let own = std::mem::replace(&mut self.made, before);
        let alias = device::alias(&live.devices.rest[at]).unwrap_or_default();
        self.made.add_device(alias, own);
        kind
    }

    fn device_kind(&mut self, live: &mut Domain, at: usize) -> Result<Option<DeviceKind>> {
        let element = &live.devices.rest[at];
        Ok(Some(match element.name.as_str() {
            "controller" if element.attr("type") == Some("pci") => match root_port(element) {
                Some(port) => DeviceKind::RootPort(port),
                None => return Ok(None),
            },
            "controller" if element.attr("type") == Some("virtio-serial") => {
                DeviceKind::Console(self.console(live, at)?)
            }
            "controller" if matches!(element.attr("type"), Some("sata" | "ide")) => {
                if live.is_without_drives(element) {
                    return Ok(None);
                }
                DeviceKind::Ahci(AhciConfig { ports: AHCI_PORTS })
            }
            "controller" if xml_schemas::domain::is_virtio_scsi(element) => {
                DeviceKind::Scsi(scsi(element)?)
            }
            "disk" => {
                let disk = Disk::read(element)?;
                if disk.is_empty_drive() && !disk.is_cdrom() || live.is_lost_drive(element) {
                    return Ok(None);
                }
                let bus = disk_bus(live, &disk)?;
                DeviceKind::Disk(Box::new(self.disk(&mut live.devices.rest[at], bus)?))
            }
            "interface" => {
                let log = format!("{}-passt.log", live.name);
                DeviceKind::Net(self.net(&mut live.devices.rest[at], &log)?)
            }
            "rng" => DeviceKind::Rng(self.rng(element)?),
            "memballoon" => match Balloon::read(element)? {
                None => return Ok(None),
                Some(balloon) => {
                    let full = live.memory.current_kib >= live.memory.total_kib;
                    DeviceKind::Balloon(BalloonConfig {
                        target_bytes: if full {
                            0
                        } else {
                            live.memory.current_kib * 1024
                        },
                        stats_period_seconds: balloon.stats_period,
                        free_page_reporting: balloon.free_page_reporting,
                        deflate_on_oom: balloon.autodeflate,
                    })
                }
            },
            "watchdog" => DeviceKind::Watchdog(WatchdogConfig {
                action: watchdog_action(&Watchdog::read(element)?.action)?,
            }),
            "vsock" => {
                let vsock = Vsock::read(element)?;
                let cid = self.cid(vsock)?;
                Vsock::give_cid(&mut live.devices.rest[at], cid);
                let socket = self.around.folder.join("vsock");
                DeviceKind::Vsock(VsockConfig {
                    cid,
                    listener: Some(self.listen_unix(&socket)?),
                    prefix: Some(socket),
                })
            }
            _ => return Ok(None),
        }))
    }

    fn cid(&self, vsock: Vsock) -> Result<u32> {
        let taken = &self.around.taken_cids;
        match vsock.cid {
            Some(cid) if !vsock.auto => {
                if taken.contains(&cid) {
                    return Err(Error::failed(format!(
                        "guest CID {cid} is in use by another domain"
                    )));
                }
                Ok(cid)
            }
            // A stated one is a wish beside auto='yes'.
            wish => wish
                .into_iter()
                .chain(3..u32::MAX)
                .find(|cid| !taken.contains(cid))
                .ok_or_else(|| Error::failed("no guest CID is free")),
        }
    }

    fn rng(&mut self, element: &Element) -> Result<RngConfig> {
        let rng = Rng::read(element)?;
        let path = if rng.backend == "builtin" {
            "/dev/urandom"
        } else {
            rng.source.as_str()
        };
        let cannot = |error: &std::io::Error| {
            Error::system(format!("cannot open the source of entropy '{path}'"), error)
        };
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|e| cannot(&e))?;
        let kind = file.metadata().map_err(|e| cannot(&e))?.file_type();
        if !kind.is_char_device() {
            return Err(Error::unsupported(format!(
                "the source of entropy '{path}' is no character device"
            )));
        }
        Ok(RngConfig {
            source: self.pass_as(file, path),
            max_bytes: rng.rate_bytes,
            period_ms: rng.rate_period_ms,
        })
    }

    /// A virtio-serial device with the channels and consoles that are its ports.
    fn console(&mut self, live: &mut Domain, at: usize) -> Result<ConsoleConfig> {
        let controller = &live.devices.rest[at];
        let number = |name: &str| {
            controller
                .attr(name)
                .and_then(|text| text.parse::<u32>().ok())
        };
        let index = number("index").unwrap_or(0);
        let max_ports = number("ports").unwrap_or(PORTS).clamp(1, 511);
        let mut ports: Vec<ConsolePort> = Vec::new();
        for at in 0..live.devices.rest.len() {
            let element = &live.devices.rest[at];
            let virtio = element.child("target").and_then(|t| t.attr("type")) == Some("virtio");
            let display = matches!(
                element.attr("type"),
                Some("spicevmc" | "qemu-vdagent" | "dbus")
            );
            if element.name != "channel" || !virtio || display {
                continue;
            }
            if Channel::read(element)?.controller != index {
                continue;
            }
            ports.push(self.port(live, at)?);
        }
        for at in 0..live.devices.consoles.len() {
            let console = live.devices.consoles[at].clone();
            let channel = Channel::of_console(&console)?;
            if console.target.target_type.as_deref() != Some("virtio")
                || channel.controller != index
            {
                continue;
            }
            let (backend, pty) = self.backend(&format!("console {at}"), &console)?;
            if let (CharSource::Pty { path }, Some(pty)) =
                (&mut live.devices.consoles[at].source, pty)
            {
                *path = Some(pty);
            }
            let log = self.log_file(&console)?;
            ports.push(ConsolePort {
                id: console
                    .alias
                    .clone()
                    .unwrap_or_else(|| format!("console{at}")),
                number: channel.port.unwrap_or(u32::MAX),
                console: true,
                name: String::new(),
                backend,
                log,
            });
        }
        // Those without a number (consoles) get the lowest free ones.
        for at in 0..ports.len() {
            if ports[at].number == u32::MAX {
                let free = (0..max_ports).find(|n| ports.iter().all(|port| port.number != *n));
                ports[at].number =
                    free.ok_or_else(|| Error::failed("no virtio serial port is free"))?;
            }
        }
        ports.sort_by_key(|port| port.number);
        Ok(ConsoleConfig { ports, max_ports })
    }

    /// The channel at `at` of `live`, with what was made for it kept apart.
    fn port(&mut self, live: &mut Domain, at: usize) -> Result<ConsolePort> {
        let before = std::mem::take(&mut self.made);
        let port = self.channel(live, at);
        let mut own = std::mem::replace(&mut self.made, before);
        // The folder is for all channels.
        self.made.folders.append(&mut own.folders);
        let alias = device::alias(&live.devices.rest[at]).unwrap_or_default();
        self.made.add_device(alias, own);
        port
    }

    fn channel(&mut self, live: &mut Domain, at: usize) -> Result<ConsolePort> {
        let element = &live.devices.rest[at];
        let mut channel = Channel::read(element)?;
        let id = id(element)?;
        let name = channel.name.clone().unwrap_or_default();
        if name.len() > 63 {
            return Err(Error::unsupported(format!(
                "channel '{name}': its name has more than 63 bytes"
            )));
        }
        if let CharSource::Unix { mode, path } = &mut channel.device.source
            && *mode == SocketMode::Bind
            && path
                .as_deref()
                .is_none_or(|path| made_up(&self.around.channels, path))
        {
            let socket = self.channel_path(live, &name, &id)?;
            set_source(
                &mut live.devices.rest[at],
                "path",
                &socket.display().to_string(),
            );
            *path = Some(socket.display().to_string());
        }
        let what = format!("channel '{name}'");
        let (backend, pty) = self.backend(&what, &channel.device)?;
        if let Some(pty) = pty {
            set_source(&mut live.devices.rest[at], "path", &pty);
        }
        let log = self.log_file(&channel.device)?;
        Ok(ConsolePort {
            id,
            number: channel.port.unwrap_or(u32::MAX),
            console: false,
            name,
            backend,
            log,
        })
    }

    /// The channel at `at` of `live`, and the id of the virtio-serial device whose port it is.
    pub(super) fn one_port(
        &mut self,
        live: &mut Domain,
        at: usize,
    ) -> Result<(String, ConsolePort)> {
        let index = Channel::read(&live.devices.rest[at])?
            .controller
            .to_string();
        let mut all = live.devices.rest.iter();
        let controller = all.find(|e| {
            e.name == "controller"
                && e.attr("type") == Some("virtio-serial")
                && e.attr("index") == Some(&index)
        });
        let controller = controller.ok_or_else(|| {
            Error::internal(format!("there is no virtio-serial controller {index}"))
        })?;
        let controller = id(controller)?;
        Ok((controller, self.port(live, at)?))
    }

    fn channel_path(&mut self, live: &Domain, name: &str, id: &str) -> Result<PathBuf> {
        let folder = self.channel_folder(live)?;
        let usable = !name.is_empty() && !name.contains('/') && name != "." && name != "..";
        Ok(folder.join(if usable { name } else { id }))
    }

    /// The folder of this domain's channels, made if it is missing.
    fn channel_folder(&mut self, live: &Domain) -> Result<PathBuf> {
        let id = live.id.map_or_else(|| "-1".to_owned(), |id| id.to_string());
        let name: String = live.name.chars().take(20).collect();
        let folder = self.around.channels.join(format!("domain-{id}-{name}"));
        if !folder.is_dir() {
            files::make_folder(&folder, 0o700)
                .map_err(|e| Error::system("cannot make the folder for channels", &e))?;
            self.made.folders.push(folder.clone());
        }
        Ok(folder)
    }

    fn log_file(
        &mut self,
        device: &xml_schemas::domain::CharDevice,
    ) -> Result<Option<vmm_api::config::Resource>> {
        match &device.log {
            Some(log) => self
                .output(Path::new(&log.file), log.append.unwrap_or(false))
                .map(Some),
            None => Ok(None),
        }
    }
}

/// Writes an attribute of `<source>`.
fn set_source(element: &mut Element, name: &str, value: &str) {
    if element.child("source").is_none() {
        element.push(Element::new("source"));
    }
    let unix = element.attr("type") == Some("unix");
    for source in element.elements_mut().filter(|e| e.name == "source") {
        if unix && source.attr("mode").is_none() {
            source.set_attr("mode", "bind");
        }
        source.set_attr(name, value);
    }
}

fn root_port(element: &Element) -> Option<RootPortConfig> {
    if element.attr("model") != Some("pcie-root-port") {
        return None;
    }
    let index: u8 = element.attr("index")?.parse().ok()?;
    let target = element.child("target");
    let number = |name: &str| {
        let text = target?.attr(name)?;
        match text.strip_prefix("0x") {
            Some(hex) => u8::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        }
    };
    Some(RootPortConfig {
        index,
        chassis: number("chassis").unwrap_or(index),
        port: number("port").unwrap_or(0),
        hotplug: target.and_then(|t| t.attr("hotplug")) != Some("off"),
    })
}

/// A SCSI controller, as its `<driver>` says.
fn scsi(controller: &Element) -> Result<ScsiConfig> {
    let driver = controller.child("driver");
    let number = |name: &str| -> Result<Option<u32>> {
        let text = driver.and_then(|driver| driver.attr(name));
        let parsed = text.map(|text| text.trim().parse()).transpose();
        let parsed = parsed.map_err(|_| Error::internal(format!("{name} is no number")))?;
        Ok(parsed.filter(|number| *number != 0))
    };
    let queues = number("queues")?.unwrap_or(0);
    Ok(ScsiConfig {
        queues: u16::try_from(queues)
            .map_err(|_| Error::unsupported(format!("{queues} queues of a SCSI controller")))?,
        iothread: iothreads::of_device(controller).filter(|id| *id != 0),
        max_sectors: number("max_sectors")?,
        cmd_per_lun: number("cmd_per_lun")?,
    })
}

fn watchdog_action(action: &str) -> Result<WatchdogAction> {
    Ok(match action {
        "reset" => WatchdogAction::Reset,
        "shutdown" => WatchdogAction::Shutdown,
        "poweroff" => WatchdogAction::Poweroff,
        "pause" => WatchdogAction::Pause,
        "none" => WatchdogAction::None,
        "inject-nmi" => WatchdogAction::InjectNmi,
        "dump" => WatchdogAction::Dump,
        other => return Err(Error::unsupported(format!("watchdog action '{other}'"))),
    })
}
