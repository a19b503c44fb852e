//! Power management and PCI Express capabilities.

use super::config::Config;

/// What a function is in the Express hierarchy (PCI Express Base Specification 5.0, 7.5.3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Express {
    /// Behind a root port.
    Endpoint,
    /// On the root bus itself.
    Integrated,
    /// A root port with a slot of this number.
    RootPort {
        /// Slot number, as it is shown to the user (13 bits).
        slot: u16,
        /// The slot's occupant may come and go.
        hotplug: bool,
    },
}

/// Registers of the Express capability, from its start.
pub(super) mod express {
    pub const DEVICE_CONTROL: u16 = 0x08;
    /// Device control's bit: function-level reset.
    pub const FLR: u16 = 1 << 15;
    pub const LINK_STATUS: u16 = 0x12;
    /// Link status' bit: the data link layer is up.
    pub const LINK_ACTIVE: u16 = 1 << 13;
    pub const SLOT_CONTROL: u16 = 0x18;
    pub const SLOT_STATUS: u16 = 0x1a;
}

const POWER_MANAGEMENT: u8 = 0x01;
const EXPRESS: u8 = 0x10;

impl Config {
    /// Adds the power management capability (PCI Bus Power Management 1.2): D0 and D3hot, state
    /// kept in D3hot. Its offset, or `None` if it doesn't fit.
    #[must_use]
    pub fn add_power_management(&mut self) -> Option<u16> {
        // Version 3; then control and status: no soft reset.
        let offset = self.add_capability(POWER_MANAGEMENT, &[3, 0, 1 << 3, 0, 0, 0])?;
        self.allow8(offset + 4, 3);
        Some(offset)
    }

    /// Adds the PCI Express capability (version 2). Its offset, or `None` if it doesn't fit.
    #[must_use]
    pub fn add_express(&mut self, kind: Express) -> Option<u16> {
        let (port_type, slot) = match kind {
            Express::Endpoint => (0x0, None),
            Express::Integrated => (0x9, None),
            Express::RootPort { slot, hotplug } => (0x4, Some((slot, hotplug))),
        };
        let mut body = [0; 0x3a];
        let mut put = |offset: usize, bytes: &[u8]| {
            body[offset - 2..][..bytes.len()].copy_from_slice(bytes);
        };
        let implemented = u16::from(slot.is_some()) << 8;
        put(0x02, &(2 | port_type << 4 | implemented).to_le_bytes());
        // Role-based error reporting; endpoints can be reset on their own.
        let reset = u32::from(slot.is_none()) << 28;
        put(0x04, &(1 << 15 | reset).to_le_bytes());
        if kind != Express::Integrated {
            // 2.5 GT/s, one lane; a port says when the link is up.
            let reports = u32::from(slot.is_some()) << 20;
            put(0x0c, &(1 | 1 << 4 | reports).to_le_bytes());
            put(0x12, &(1_u16 | 1 << 4).to_le_bytes());
            put(0x2c, &(1_u32 << 1).to_le_bytes());
            put(0x30, &1_u16.to_le_bytes());
        }
        if let Some((number, hotplug)) = slot {
            // Button, power controller, both indicators, hot-plug; commands complete at once.
            let hotplug = if hotplug { 0b101_1011 | 1 << 18 } else { 0 };
            let number = u32::from(number & 0x1fff) << 19;
            put(0x14, &(hotplug | number).to_le_bytes());
        }
        let offset = self.add_capability(EXPRESS, &body)?;
        // Error reporting enables, relaxed ordering, sizes, no snoop.
        self.allow16(offset + express::DEVICE_CONTROL, 0x7fff);
        // Completion timeouts are of no consequence, but software sets them.
        self.allow16(offset + 0x28, 0x1f);
        if slot.is_some() {
            self.allow16(offset + 0x10, 0x00c3);
            self.allow16(offset + express::SLOT_CONTROL, 0x17ff);
            self.allow_clear16(offset + express::SLOT_STATUS, 0x011f);
            // Root control: error and PME interrupts.
            self.allow16(offset + 0x1c, 0x001f);
        }
        Some(offset)
    }
}
