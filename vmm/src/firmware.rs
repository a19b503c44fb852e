//! A PC's firmware: its ROM, and what it is told about the machine.

use vmm_api::config::{FirmwareConfig, MachineConfig};

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
    let cpus = u16::try_from(config.vcpus).unwrap_or(u16::MAX);
    items.number(CPUS, cpus.to_le_bytes());
    items.number(MAX_CPUS, cpus.to_le_bytes());
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
    items
}
