//! A PC's firmware: its ROM, and what it is told about the machine.

use std::fmt::Write as _;

use vmm_api::config::{FirmwareConfig, MachineConfig};
use vmm_api::devices::{DeviceConfig, DeviceKind, DiskBus, PciAddress};

use crate::acpi::{self, Description};
use crate::devices::fw_cfg::Items;
use crate::devices::uart;
use crate::layout::{self, Kind};
use crate::loader::{LoadError, Named};
use crate::memory::{GuestMemory, PAGE, Scratch};
use crate::num::to_usize;

/// Where it ends.
const TOP: u64 = 1 << 32;
/// Largest image: below it are pages that KVM needs on some processors.
const MAX: u64 = 256 << 10;
const MIN: u64 = 64 << 10;
/// Memory slot of the ROM.
const SLOT: u32 = 16;

// Numbers of items that firmware knows from before files had names.
const RAM_SIZE: u16 = 0x03;
const CPUS: u16 = 0x05;
const BOOT_MENU: u16 = 0x0e;
const MAX_CPUS: u16 = 0x0f;
/// The interval timer is on pin 2 of the I/O APIC.
const IRQ0_OVERRIDE: u16 = 0x8002;

/// The ROM.
#[derive(Debug)]
pub struct Rom {
    image: Scratch,
}

impl Rom {
    /// Reads an image.
    ///
    /// # Errors
    /// It can't be read, or has a size no ROM here can have.
    pub fn read(file: &Named) -> Result<Self, LoadError> {
        let size = file.size()?;
        if !(MIN..=MAX).contains(&size) || !size.is_multiple_of(PAGE) {
            return Err(LoadError::NotFirmware {
                name: file.name.clone(),
                reason: "its size is not whole pages, 64 to 256 KiB",
            });
        }
        let mut image = Scratch::new(to_usize(size))?;
        file.read_at(0, &mut image)?;
        Ok(Self { image })
    }

    /// What to hand to the hypervisor. The ROM must live as long as the VM.
    pub fn slot(&mut self) -> hypervisor::MemorySlot {
        let len = self.image.len() as u64;
        hypervisor::MemorySlot {
            id: SLOT,
            gpa: TOP - len,
            len,
            host: self.image.as_mut_ptr(),
            readonly: true,
            log_dirty: false,
        }
    }

    /// Puts the copy below 1 MiB, in RAM: the chipset's shadowing, already done.
    ///
    /// # Errors
    /// Too little memory.
    pub fn shadow(&self, memory: &GuestMemory) -> Result<(), LoadError> {
        let start = layout::HIMEM - self.image.len() as u64;
        Ok(memory.write(start, &self.image)?)
    }
}

/// What the firmware is told. The RAM's map leaves out what firmware reserves itself.
pub fn items(
    config: &MachineConfig,
    firmware: &FirmwareConfig,
    description: &Description,
    memory: &GuestMemory,
) -> Items {
    let mut items = Items::default();
    items.number(RAM_SIZE, memory.size().to_le_bytes());
    let cpus = |count: u32| u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
    items.number(CPUS, cpus(description.present()));
    // As QEMU has it: one above the highest APIC id.
    let highest = description.apic_ids.iter().max();
    items.number(MAX_CPUS, cpus(highest.map_or(0, |id| id.saturating_add(1))));
    items.number(IRQ0_OVERRIDE, [1]);
    let mut map = Vec::new();
    for range in [memory.low(), memory.high()] {
        if !range.is_empty() {
            map.extend(range.start.to_le_bytes());
            map.extend((range.end - range.start).to_le_bytes());
            map.extend(Kind::Ram.number().to_le_bytes());
        }
    }
    items.file("etc/e820", map);
    if config.acpi {
        for (name, content) in acpi::files(description) {
            items.file(name, content);
        }
    }
    if firmware.serial_console {
        items.file("etc/sercon-port", uart::COM[0].0.to_le_bytes());
    }
    if let Some(wait) = firmware.boot_menu_ms {
        items.number(BOOT_MENU, 1_u16.to_le_bytes());
        items.file("etc/boot-menu-wait", wait.to_le_bytes());
    } else {
        items.number(BOOT_MENU, 0_u16.to_le_bytes());
    }
    if !firmware.boot_order.is_empty() {
        items.file("bootorder", boot_order(firmware, &config.devices));
    }
    // No end of waiting is what it does without being told.
    if let Some(wait) = firmware.retry_ms {
        items.file("etc/boot-fail-wait", u32::from(wait).to_le_bytes());
    }
    items
}

/// The devices to boot from, a line each, as Open Firmware would name them (SeaBIOS, docs/Runtime_config.md):
/// whatever is not among them is not tried.
fn boot_order(firmware: &FirmwareConfig, devices: &[DeviceConfig]) -> Vec<u8> {
    let mut lines = String::new();
    for id in &firmware.boot_order {
        let device = devices.iter().find(|device| device.id == *id);
        match device.and_then(|device| open_firmware_path(device, devices)) {
            Some(path) => {
                lines += &path;
                lines.push('\n');
            }
            None => log::warn!("'{id}' is nothing to boot from"),
        }
    }
    lines += "HALT";
    let mut file = lines.into_bytes();
    file.push(0);
    file
}

fn open_firmware_path(device: &DeviceConfig, devices: &[DeviceConfig]) -> Option<String> {
    let mut path = "/pci@i0cf8".to_owned();
    let mut node = |name: &str, at: PciAddress| {
        // Writing to a String does not fail.
        let _ = write!(path, "/{name}@{:x}", at.device);
        if at.function != 0 {
            let _ = write!(path, ",{:x}", at.function);
        }
    };
    if device.address.bus != 0 {
        let port = devices.iter().find(|other| match &other.kind {
            DeviceKind::RootPort(port) => port.index == device.address.bus,
            _ => false,
        })?;
        node("pci-bridge", port.address);
    }
    let (name, unit) = match &device.kind {
        DeviceKind::Disk(disk) => match &disk.bus {
            DiskBus::Virtio => ("scsi", "/disk@0,0".to_owned()),
            // Its controller's address. SeaBIOS doesn't look at the name there.
            DiskBus::Sata { port, .. } => ("*", format!("/drive@{port:x}/disk@0")),
            DiskBus::Scsi { target, lun, .. } => {
                ("scsi", format!("/channel@0/disk@{target:x},{lun:x}"))
            }
        },
        DeviceKind::Net(_) => ("ethernet", "/ethernet-phy@0".to_owned()),
        _ => return None,
    };
    node(name, device.address);
    Some(path + &unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_open_firmware_would() {
        let devices: Vec<DeviceConfig> = serde_json::from_value(serde_json::json!([
            { "id": "port", "address": { "bus": 0, "device": 2, "function": 3 },
              "kind": { "root_port": { "index": 4, "chassis": 4, "port": 1 } } },
            { "id": "near", "address": { "bus": 0, "device": 26, "function": 0 },
              "kind": { "disk": {} } },
            { "id": "far", "address": { "bus": 4, "device": 0, "function": 0 },
              "kind": { "disk": {} } },
            { "id": "lost", "address": { "bus": 5, "device": 0, "function": 0 },
              "kind": { "disk": {} } },
            { "id": "cd", "address": { "bus": 0, "device": 31, "function": 2 },
              "kind": { "disk": { "cdrom": true, "bus": { "sata": { "controller": "sata0", "port": 1 } } } } },
            { "id": "unit", "address": { "bus": 4, "device": 0, "function": 0 },
              "kind": { "disk": { "bus": { "scsi": { "controller": "scsi0", "target": 17, "lun": 300 } } } } },
        ]))
        .unwrap();
        let firmware = FirmwareConfig {
            rom: vmm_api::config::Resource::Fd(3),
            serial_console: false,
            boot_menu_ms: None,
            boot_order: ["far", "port", "lost", "cd", "unit", "near", "none"]
                .map(str::to_owned)
                .into(),
            retry_ms: None,
        };
        assert_eq!(
            String::from_utf8(boot_order(&firmware, &devices)).unwrap(),
            "/pci@i0cf8/pci-bridge@2,3/scsi@0/disk@0,0\n/pci@i0cf8/*@1f,2/drive@1/disk@0\n\
             /pci@i0cf8/pci-bridge@2,3/scsi@0/channel@0/disk@11,12c\n/pci@i0cf8/scsi@1a/disk@0,0\nHALT\0"
        );
    }
}
