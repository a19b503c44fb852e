//! `<os>`: what is booted, on what machine.

use crate::dom::Element;

/// `<os>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Os {
    /// `hvm` is the only one that runs.
    pub os_type: String,
    /// `x86_64` or `i686`; filled by default.
    pub arch: Option<String>,
    /// The machine's name; filled and made canonical by default.
    pub machine: Option<String>,
    /// Kernel image on the host.
    pub kernel: Option<String>,
    /// Initial RAM disk on the host.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Boot order for firmware.
    pub boot: Vec<BootDevice>,
    /// `<os firmware=…>`: `bios` or `efi`.
    pub firmware: Option<String>,
    /// Every other child (loader, nvram, bootmenu, smbios, bios, acpi, firmware…).
    pub rest: Vec<Element>,
}

impl Os {
    /// The child of `<os>` named `name`, of those without a field.
    pub fn other(&self, name: &str) -> Option<&Element> {
        self.rest.iter().find(|e| e.name == name)
    }
}

/// `<boot dev=…>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BootDevice {
    /// First hard disk.
    Hd,
    /// First CD-ROM.
    Cdrom,
    /// Network.
    Network,
    /// First floppy.
    Fd,
}

impl BootDevice {
    /// The name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hd => "hd",
            Self::Cdrom => "cdrom",
            Self::Network => "network",
            Self::Fd => "fd",
        }
    }

    /// The device of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "hd" => Self::Hd,
            "cdrom" => Self::Cdrom,
            "network" => Self::Network,
            "fd" => Self::Fd,
            _ => return None,
        })
    }
}
