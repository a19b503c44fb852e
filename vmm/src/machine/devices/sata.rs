//! SATA controllers with their drives, and media that change.

use std::sync::{Arc, PoisonError};

use images::{Error, Extent, Image, ImageInfo, IoBuf};
use virtio::block::{Failure, Hooks};
use virtio::scsi::DriveHooks;
use vmm_api::control::{Event, Tray};
use vmm_api::devices::{
    AhciConfig, DeviceConfig, DeviceKind, DiskBus, DiskConfig, ImageConfig, PciAddress,
};

use super::disk::{Disk, Failures, Front};
use super::layers::{self, Access, Layer};
use super::{Builder, failed};
use crate::devices::ahci::{Ahci, Drive, DriveOptions, PORTS_MOST};
use crate::machine::MachineError;
use crate::notices::Notice;
use crate::storage::EngineStorage;

/// What a drive without a medium has for an image.
#[derive(Debug)]
pub struct NoMedium;

fn no_medium<T>() -> Result<T, Error> {
    Err(Error::Io {
        what: "a drive".to_owned(),
        source: std::io::Error::from_raw_os_error(libc::ENOMEDIUM),
    })
}

impl Image for NoMedium {
    fn size(&self) -> u64 {
        0
    }

    fn read(&self, _offset: u64, _bufs: &[IoBuf]) -> Result<(), Error> {
        no_medium()
    }

    fn write(&self, _offset: u64, _bufs: &[IoBuf]) -> Result<(), Error> {
        no_medium()
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> Result<(), Error> {
        no_medium()
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<(), Error> {
        no_medium()
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    fn extent(&self, _offset: u64, _len: u64) -> Result<Extent, Error> {
        no_medium()
    }

    fn info(&self) -> Result<ImageInfo, Error> {
        Ok(ImageInfo::default())
    }

    fn resize(&self, _size: u64) -> Result<(), Error> {
        no_medium()
    }
}

/// Who hears of what a drive does.
#[derive(Debug)]
pub(super) struct TrayFailures(pub Failures);

impl Hooks for TrayFailures {
    fn failed(&self, failure: Failure) {
        self.0.failed(failure);
    }
}

impl DriveHooks for TrayFailures {
    fn tray_moved(&self, open: bool) {
        let id = self.0.id.clone();
        let notices = &self.0.notices;
        notices.send(Notice::Tell(Event::TrayMoved { id, open }));
    }

    fn let_go(&self) {
        self.0.notices.send(Notice::UnitGone(self.0.id.clone()));
    }
}

impl Builder {
    /// A controller, and all drives of `devices` that name it.
    pub(super) fn ahci(
        &mut self,
        device: &DeviceConfig,
        config: AhciConfig,
        devices: &[&DeviceConfig],
    ) -> Result<(), MachineError> {
        if !(1..=PORTS_MOST).contains(&config.ports) {
            return Err(failed(device, "a SATA controller has 1 to 32 ports"));
        }
        let mut drives: Vec<Option<Arc<Drive>>> = vec![None; usize::from(config.ports)];
        for own in devices {
            let DeviceKind::Disk(disk) = &own.kind else {
                continue;
            };
            let DiskBus::Sata { controller, port } = &disk.bus else {
                continue;
            };
            if *controller != device.id {
                continue;
            }
            match drives.get_mut(usize::from(*port)) {
                Some(seat @ None) => *seat = Some(self.drive(own, disk, *port)?),
                Some(_) => return Err(failed(own, format!("port {port} is taken"))),
                None => return Err(failed(own, format!("there is no port {port}"))),
            }
        }
        // Guests look for other functions only where there is a first one: on ICH9 the way to the ISA bus, which
        // firmware would set up if it were that.
        let first = PciAddress {
            function: 0,
            ..device.address
        };
        let has_first = devices.iter().any(|other| other.address == first);
        if !has_first && self.root.placed().all(|(place, _)| place != first) {
            self.host_bridge(first)?;
        }
        let (host, owner) = self.host(device.address);
        let ahci = Ahci::new(drives, self.ram.clone(), host);
        let ahci = ahci.map_err(|error| failed(device, error))?;
        self.function(device, &owner, Arc::new(ahci))
    }

    fn drive(
        &mut self,
        device: &DeviceConfig,
        config: &DiskConfig,
        port: u8,
    ) -> Result<Arc<Drive>, MachineError> {
        if config.logical_block_size != 512 {
            return Err(failed(
                device,
                "SATA drives have logical blocks of 512 bytes",
            ));
        }
        let physical = config.physical_block_size;
        if !physical.is_power_of_two() || !(512..=1 << 16).contains(&physical) {
            return Err(failed(
                device,
                "physical blocks of SATA drives are a power of two, 512 bytes to 64 KiB",
            ));
        }
        let content = self.content(device, config, config.iothread)?;
        let options = DriveOptions {
            cdrom: config.cdrom,
            read_only: config.readonly || config.cdrom,
            serial: match config.serial.as_str() {
                "" => format!("VM{:05}", u32::from(port) + 1),
                given => given.to_owned(),
            },
            physical_block_size: physical,
            policy: content.policy,
            starter: content.starter.clone(),
            medium: config.image.is_some(),
        };
        let hooks = Arc::new(TrayFailures(content.hooks.clone()));
        let storage = Arc::new(EngineStorage(content.engine.clone()));
        let drive = Drive::new(options, storage, hooks);
        let disk = content.disk(Front::Sata(drive.clone()));
        self.disks.push((device.id.clone(), disk));
        Ok(drive)
    }
}

/// Opens a medium for a drive.
///
/// # Errors
/// It can't be opened, in words for the caller.
pub fn open_medium(device: &DeviceConfig, image: &ImageConfig) -> Result<Vec<Layer>, String> {
    let DeviceKind::Disk(config) = &device.kind else {
        return Err(format!("'{}' is no drive", device.id));
    };
    let access = Access {
        writable: false,
        shareable: config.shareable,
        direct: super::disk::options(config).cache.direct(),
    };
    layers::open(device, image, access).map_err(|error| error.to_string())
}

impl Disk {
    /// Whether media come and go.
    #[must_use]
    pub fn is_cdrom(&self) -> bool {
        self.front.is_cdrom()
    }

    /// Its tray, if it has one.
    #[must_use]
    pub fn tray(&self) -> Option<Tray> {
        let (open, locked) = self.front.tray()?;
        Some(Tray { open, locked })
    }

    /// Whether the medium may be taken out; if not, the guest is asked for it.
    #[must_use]
    pub fn ask_for_medium(&self) -> bool {
        self.front.ask_for_medium()
    }

    /// Has another medium, or none. No request is in flight. The one before.
    pub fn put_medium(&self, layers: Vec<Layer>) -> Vec<Layer> {
        let there = !layers.is_empty();
        let image = layers.first().map(|first| first.opened.image.clone());
        self.top
            .replace(image.unwrap_or_else(|| Arc::new(NoMedium)));
        let mut own = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *own, layers);
        drop(own);
        self.front.medium_changed(there);
        before
    }
}
