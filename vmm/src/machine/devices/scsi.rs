//! SCSI controllers with their units.

use std::sync::Arc;

use virtio::scsi::{Address, Scsi, ScsiHandle, ScsiOptions, Unit, UnitOptions};
use vmm_api::devices::{DeviceConfig, DeviceKind, DiskBus, DiskConfig, ScsiConfig};

use super::disk::{Front, QUEUES_MAX};
use super::sata::TrayFailures;
use super::{Builder, PciDevices, failed};
use crate::machine::MachineError;
use crate::storage::EngineStorage;

/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;

/// A controller, for changes while its guest runs.
#[derive(Debug)]
pub struct Controller {
    handle: ScsiHandle,
    /// Whose threads serve it.
    iothread: Option<u32>,
}

/// The controller that a disk is at, and its place there.
pub fn unit_of(device: &DeviceConfig) -> Option<(&str, Address)> {
    match &device.kind {
        DeviceKind::Disk(disk) => match &disk.bus {
            DiskBus::Scsi {
                controller,
                target,
                lun,
            } => Some((controller, (*target, *lun))),
            _ => None,
        },
        _ => None,
    }
}

impl Builder {
    /// A controller, and all units of `devices` that name it.
    pub(super) fn scsi(
        &mut self,
        device: &DeviceConfig,
        config: ScsiConfig,
        devices: &[&DeviceConfig],
    ) -> Result<(), MachineError> {
        let thread = config.iothread.map(|id| self.iothreads.get(id)).transpose();
        let thread = thread.map_err(|error| failed(device, error))?;
        let usual = ScsiOptions::default();
        let options = ScsiOptions {
            queues: match config.queues {
                0 => self.vcpus.clamp(1, QUEUES_MAX),
                stated => stated,
            },
            queue_size: QUEUE_SIZE,
            max_sectors: config.max_sectors.unwrap_or(usual.max_sectors),
            cmd_per_lun: config.cmd_per_lun.unwrap_or(usual.cmd_per_lun),
            starter: thread.map(|thread| thread.starter.clone()),
        };
        let scsi = Scsi::new(options).map_err(|error| failed(device, error))?;
        let controller = Controller {
            handle: scsi.handle(),
            iothread: config.iothread,
        };
        for own in devices {
            if unit_of(own).is_some_and(|(name, _)| name == device.id) {
                self.unit(own, &controller)?;
            }
        }
        self.scsis.push((device.id.clone(), controller));
        self.virtio(device, Box::new(scsi))
    }

    /// A unit of a controller.
    pub(super) fn unit(
        &mut self,
        device: &DeviceConfig,
        controller: &Controller,
    ) -> Result<(), MachineError> {
        let (DeviceKind::Disk(config), Some((_, address))) = (&device.kind, unit_of(device)) else {
            return Err(failed(device, "it is no SCSI disk"));
        };
        let (unit, disk) = self.make_unit(device, config, controller)?;
        controller
            .handle
            .plug(address, &unit)
            .map_err(|error| failed(device, error))?;
        self.disks.push((device.id.clone(), disk));
        Ok(())
    }

    fn make_unit(
        &mut self,
        device: &DeviceConfig,
        config: &DiskConfig,
        controller: &Controller,
    ) -> Result<(Arc<Unit>, super::Disk), MachineError> {
        let content = self.content(device, config, controller.iothread)?;
        let options = UnitOptions {
            cdrom: config.cdrom,
            read_only: config.readonly,
            vendor: config.vendor.clone(),
            product: config.product.clone(),
            serial: config.serial.clone(),
            // What QEMU calls one of libvirt's: links in /dev/disk/by-id have it.
            name: format!("drive-{}", device.id),
            wwn: config.wwn,
            logical_block_size: config.logical_block_size,
            physical_block_size: config.physical_block_size,
            policy: content.policy,
            medium: config.image.is_some(),
        };
        let storage = Arc::new(EngineStorage(content.engine.clone()));
        let hooks = Arc::new(TrayFailures(content.hooks.clone()));
        let unit = Unit::new(options, storage, hooks).map_err(|error| failed(device, error))?;
        let disk = content.disk(Front::Scsi(unit.clone()));
        Ok((unit, disk))
    }
}

impl PciDevices {
    /// Makes a unit of a controller, and tells the guest.
    ///
    /// # Errors
    /// What can't be made or plugged, in words for the caller.
    pub fn plug_unit(&mut self, device: &DeviceConfig) -> Result<(), String> {
        let (name, _) = unit_of(device).ok_or("it is no SCSI disk")?;
        let controller = super::find(&self.scsis, name);
        let controller =
            controller.ok_or_else(|| format!("there is no SCSI controller '{name}'"))?;
        let mut builder = Builder::new(self.kit.clone());
        builder
            .unit(device, controller)
            .map_err(|error| error.to_string())?;
        self.disks.append(&mut builder.disks);
        Ok(())
    }

    /// Takes a unit from its controller, and tells the guest. It has gone when
    /// [`crate::notices::Notice::UnitGone`] says so.
    ///
    /// # Errors
    /// There is no such controller, in words for the caller.
    pub fn unplug_unit(&mut self, device: &DeviceConfig) -> Result<(), String> {
        let (name, address) = unit_of(device).ok_or("it is no SCSI disk")?;
        let controller = super::find(&self.scsis, name);
        let controller =
            controller.ok_or_else(|| format!("there is no SCSI controller '{name}'"))?;
        // What is done with disks is not done with this one any more.
        self.disks.retain(|(id, _)| *id != device.id);
        controller.handle.unplug(address);
        Ok(())
    }
}
