//! Configuration space: registers and the bits of them that software may write (PCI Express Base
//! Specification 5.0, 7.5; PCI Local Bus Specification 3.0, 6.1).

use serde::{Deserialize, Serialize};

use super::mask;
use crate::device::DeviceError;

/// Command register.
pub(super) const COMMAND: u16 = 0x04;
/// Its bit: memory BARs answer.
pub(super) const MEMORY: u16 = 1 << 1;
/// Its bit: the function may reach memory, messages among it.
pub(super) const MASTER: u16 = 1 << 2;
/// Its bit: the pin stays silent.
pub(super) const INTX_DISABLE: u16 = 1 << 10;
/// Status register's bit: the pin wants to be asserted.
pub(super) const STATUS_INTX: u32 = 1 << 3;
/// Bytes of the conventional part; the rest is Express' extended space.
const CONVENTIONAL: usize = 256;
/// First byte after the header.
const FIRST_CAPABILITY: u16 = 0x40;
const CAPABILITIES: usize = 0x34;
const BARS: u16 = 0x10;

/// What a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass, programming interface: 0xCCSSPP.
    pub class: u32,
    /// Subsystem vendor (endpoints).
    pub subsystem_vendor: u16,
    /// Subsystem (endpoints).
    pub subsystem: u16,
}

/// What kind of memory a BAR is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Below 4 GiB.
    Memory32,
    /// Anywhere, prefetchable; takes two registers.
    Memory64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Bar {
    pub index: u8,
    pub kind: BarKind,
    pub len: u64,
}

/// What software has written, by register: `(offset, value)` of every 32-bit register that it can
/// write.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Saved {
    registers: Vec<(u16, u32)>,
}

/// The first 256 bytes of a function's configuration space; the extended ones read as zero (no
/// extended capability).
#[derive(Debug, Clone)]
pub struct Config {
    bytes: [u8; CONVENTIONAL],
    /// Bits software may set and clear.
    writable: [u8; CONVENTIONAL],
    /// Bits software clears by writing ones.
    clears: [u8; CONVENTIONAL],
    /// As after power-on.
    initial: [u8; CONVENTIONAL],
    bars: Vec<Bar>,
    bar_registers: u8,
    next_capability: u16,
    last_pointer: usize,
}

impl Config {
    fn new(ids: &Ids, header: u8, bar_registers: u8) -> Self {
        let mut config = Self {
            bytes: [0; CONVENTIONAL],
            writable: [0; CONVENTIONAL],
            clears: [0; CONVENTIONAL],
            initial: [0; CONVENTIONAL],
            bars: Vec::new(),
            bar_registers,
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES,
        };
        config.set16(0x00, ids.vendor);
        config.set16(0x02, ids.device);
        config.set32(0x08, ids.class << 8 | u32::from(ids.revision));
        config.set8(0x0e, header);
        // Memory, bus master, parity and SERR reporting, pin disable; ports where a BAR needs them.
        config.allow16(COMMAND, MEMORY | MASTER | 1 << 6 | 1 << 8 | INTX_DISABLE);
        config.allow8(0x0c, 0xff);
        config
    }

    /// An endpoint's header (type 0).
    #[must_use]
    pub fn endpoint(ids: &Ids) -> Self {
        let mut config = Self::new(ids, 0, 6);
        config.set16(0x2c, ids.subsystem_vendor);
        config.set16(0x2e, ids.subsystem);
        config.allow8(0x3c, 0xff);
        config
    }

    /// A bridge's header (type 1), without a window for ports.
    #[must_use]
    pub fn bridge(ids: &Ids) -> Self {
        let mut config = Self::new(ids, 1, 2);
        // Primary, secondary, subordinate bus.
        for offset in 0x18..0x1b {
            config.allow8(offset, 0xff);
        }
        // Memory window; prefetchable window, 64 bits wide. Closed: the base above the limit.
        for offset in [0x20, 0x22, 0x24, 0x26] {
            config.allow16(offset, 0xfff0);
        }
        for (offset, value) in [(0x20, 0xfff0), (0x24, 0xfff1), (0x26, 1)] {
            config.set16(offset, value);
        }
        config.allow32(0x28, u32::MAX);
        config.allow32(0x2c, u32::MAX);
        config.allow8(0x3c, 0xff);
        // Bridge control: parity, SERR, VGA routing isn't there; secondary bus reset.
        config.allow16(0x3e, 1 << 0 | 1 << 1 | 1 << 6);
        config
    }

    /// Sets a byte as after power-on.
    pub fn set8(&mut self, offset: u16, value: u8) {
        self.bytes[usize::from(offset)] = value;
        self.initial[usize::from(offset)] = value;
    }

    /// Sets two bytes as after power-on.
    pub fn set16(&mut self, offset: u16, value: u16) {
        for (offset, byte) in (offset..).zip(value.to_le_bytes()) {
            self.set8(offset, byte);
        }
    }

    /// Sets four bytes as after power-on.
    pub fn set32(&mut self, offset: u16, value: u32) {
        for (offset, byte) in (offset..).zip(value.to_le_bytes()) {
            self.set8(offset, byte);
        }
    }

    /// Lets software write these bits of a byte.
    pub fn allow8(&mut self, offset: u16, bits: u8) {
        self.writable[usize::from(offset)] |= bits;
    }

    /// Lets software write these bits of two bytes.
    pub fn allow16(&mut self, offset: u16, bits: u16) {
        for (offset, byte) in (offset..).zip(bits.to_le_bytes()) {
            self.allow8(offset, byte);
        }
    }

    /// Lets software write these bits of four bytes.
    pub fn allow32(&mut self, offset: u16, bits: u32) {
        for (offset, byte) in (offset..).zip(bits.to_le_bytes()) {
            self.allow8(offset, byte);
        }
    }

    /// Lets software clear these bits of two bytes by writing ones.
    pub fn allow_clear16(&mut self, offset: u16, bits: u16) {
        for (offset, byte) in (offset..).zip(bits.to_le_bytes()) {
            self.clears[usize::from(offset)] |= byte;
        }
    }

    /// The function has an interrupt pin: 1 is INTA#.
    pub fn set_pin(&mut self, pin: u8) {
        self.set8(0x3d, pin);
    }

    /// Adds a BAR of `len` bytes, a power of two of at least 16. A 64-bit one takes register
    /// `index + 1` too. `false` if that doesn't fit the header.
    #[must_use]
    pub fn add_bar(&mut self, index: u8, kind: BarKind, len: u64) -> bool {
        let last = index + u8::from(kind == BarKind::Memory64);
        let free = self
            .bars
            .iter()
            .all(|bar| last < bar.index || bar.last() < index);
        let fits = match kind {
            BarKind::Memory32 => len <= 1 << 31,
            BarKind::Memory64 => len <= 1 << 62,
        };
        if last >= self.bar_registers || !len.is_power_of_two() || len < 16 || !fits || !free {
            return false;
        }
        let offset = BARS + 4 * u16::from(index);
        let bits = !(len - 1);
        match kind {
            BarKind::Memory32 => self.allow32(offset, bits as u32),
            BarKind::Memory64 => {
                self.set32(offset, 0b1100);
                self.allow32(offset, bits as u32);
                self.allow32(offset + 4, (bits >> 32) as u32);
            }
        }
        self.bars.push(Bar { index, kind, len });
        true
    }

    /// Adds a capability with its body (what follows id and next pointer) and returns its offset;
    /// `None` if it doesn't fit any more.
    #[must_use]
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> Option<u16> {
        let offset = self.next_capability;
        let end = usize::from(offset) + 2 + body.len();
        if end > CONVENTIONAL {
            return None;
        }
        self.set8(offset, id);
        for (offset, &byte) in (offset + 2..).zip(body) {
            self.set8(offset, byte);
        }
        self.set8(self.last_pointer as u16, offset as u8);
        self.last_pointer = usize::from(offset) + 1;
        self.next_capability = end.next_multiple_of(4) as u16;
        // Status: there is a list.
        self.set16(0x06, 1 << 4);
        Some(offset)
    }

    /// Reads `width` bytes at `offset`.
    #[must_use]
    pub fn read(&self, offset: u16, width: u8) -> u32 {
        (0..u16::from(width)).rev().fold(0, |value, i| {
            let byte = self.bytes.get(usize::from(offset.saturating_add(i)));
            value << 8 | u32::from(byte.copied().unwrap_or(0))
        })
    }

    /// Writes `width` bytes at `offset`: only the bits that software may.
    pub fn write(&mut self, offset: u16, width: u8, value: u32) {
        let bytes = (value & mask(width)).to_le_bytes();
        for (i, byte) in bytes.into_iter().take(usize::from(width)).enumerate() {
            let at = usize::from(offset) + i;
            if at >= CONVENTIONAL {
                return;
            }
            let (writable, clears) = (self.writable[at], self.clears[at]);
            let kept = self.bytes[at] & !writable & !(clears & byte);
            self.bytes[at] = kept | byte & writable;
        }
    }

    /// Sets or clears bits of two bytes from the device's side.
    pub fn change16(&mut self, offset: u16, clear: u16, set: u16) {
        let value = self.read(offset, 2) as u16 & !clear | set;
        self.bytes[usize::from(offset)..][..2].copy_from_slice(&value.to_le_bytes());
    }

    /// Everything as after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// Where each BAR answers: its number, address and length; `None` as address while memory
    /// decoding is off, or it can't answer where it was put.
    pub(super) fn places(&self) -> impl Iterator<Item = (u8, Option<u64>, u64)> {
        let on = self.read(COMMAND, 2) as u16 & MEMORY != 0;
        self.bars.iter().map(move |bar| {
            let offset = BARS + 4 * u16::from(bar.index);
            let low = u64::from(self.read(offset, 4) & !0xf);
            let address = match bar.kind {
                BarKind::Memory32 => low,
                BarKind::Memory64 => low | u64::from(self.read(offset + 4, 4)) << 32,
            };
            // While a BAR is being sized all its writable bits are ones: nobody means that place.
            let sizing = match bar.kind {
                BarKind::Memory32 => address == u64::from(!(bar.len - 1) as u32),
                BarKind::Memory64 => {
                    address == !(bar.len - 1) || address == u64::from(!(bar.len - 1) as u32)
                }
            };
            let there = on && address != 0 && !sizing && address.checked_add(bar.len).is_some();
            (bar.index, there.then_some(address), bar.len)
        })
    }

    /// Registers that change while the function runs.
    fn variable(&self) -> impl Iterator<Item = u16> {
        (0..CONVENTIONAL as u16).step_by(4).filter(|&offset| {
            let at = usize::from(offset);
            (at..at + 4).any(|i| self.writable[i] | self.clears[i] != 0)
        })
    }

    /// What to save.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved {
            registers: self.variable().map(|at| (at, self.read(at, 4))).collect(),
        }
    }

    /// Takes over what was saved: of each register the bits that can change.
    ///
    /// # Errors
    /// Other registers than this function has.
    pub fn load(&mut self, saved: &Saved, kind: &'static str) -> Result<(), DeviceError> {
        let ours: Vec<u16> = self.variable().collect();
        let theirs: Vec<u16> = saved.registers.iter().map(|&(offset, _)| offset).collect();
        if ours != theirs {
            return Err(DeviceError::State {
                kind,
                reason: "configuration space of another layout".into(),
            });
        }
        for &(offset, value) in &saved.registers {
            for (at, byte) in (usize::from(offset)..).zip(value.to_le_bytes()) {
                let bits = self.writable[at] | self.clears[at];
                self.bytes[at] = self.bytes[at] & !bits | byte & bits;
            }
        }
        Ok(())
    }
}

impl Bar {
    /// Last register it takes.
    fn last(&self) -> u8 {
        self.index + u8::from(self.kind == BarKind::Memory64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: Ids = Ids {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_0000,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    #[test]
    fn bars_are_sized_and_placed() {
        let mut config = Config::endpoint(&IDS);
        assert!(config.add_bar(0, BarKind::Memory64, 0x8000));
        assert!(config.add_bar(2, BarKind::Memory32, 0x1000));
        assert!(!config.add_bar(1, BarKind::Memory32, 0x1000), "taken");
        assert!(!config.add_bar(5, BarKind::Memory64, 0x1000), "no room");
        assert!(!config.add_bar(3, BarKind::Memory32, 0x1001));
        config.write(0x10, 4, u32::MAX);
        config.write(0x14, 4, u32::MAX);
        config.write(0x18, 4, u32::MAX);
        assert_eq!(config.read(0x10, 4), 0xffff_800c);
        assert_eq!(config.read(0x14, 4), u32::MAX);
        assert_eq!(config.read(0x18, 4), 0xffff_f000);
        config.write(COMMAND, 2, u32::from(MEMORY));
        assert!(config.places().all(|place| place.1.is_none()), "sizing");
        config.write(0x10, 4, 0x4000_0000);
        config.write(0x14, 4, 0x1);
        config.write(0x18, 4, 0xfe00_0000);
        let places: Vec<_> = config.places().collect();
        let expected = [
            (0, Some(0x1_4000_0000), 0x8000),
            (2, Some(0xfe00_0000), 0x1000),
        ];
        assert_eq!(places, expected);
        config.write(COMMAND, 1, 0);
        assert!(config.places().all(|place| place.1.is_none()), "off");
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut config = Config::endpoint(&IDS);
        assert_eq!(config.read(0x34, 1), 0);
        assert_eq!(config.add_capability(1, &[0; 6]), Some(0x40));
        assert_eq!(config.add_capability(9, &[0; 3]), Some(0x48));
        assert_eq!(config.add_capability(9, &[0; 1]), Some(0x50));
        assert_eq!(config.add_capability(9, &[0; 0xc0]), None);
        assert_eq!(config.read(0x34, 1), 0x40);
        assert_eq!(config.read(0x41, 1), 0x48);
        assert_eq!(config.read(0x49, 1), 0x50);
        assert_eq!(config.read(0x51, 1), 0);
        assert_eq!(config.read(0x06, 2) & 0x10, 0x10);
    }

    #[test]
    fn read_only_bits_stay_and_saved_state_cannot_change_them() {
        let mut config = Config::endpoint(&IDS);
        config.write(0x00, 4, 0xdead_beef);
        assert_eq!(config.read(0x00, 4), 0x1042_1af4);
        config.write(0x3c, 1, 11);
        let mut saved = config.save();
        for register in &mut saved.registers {
            register.1 |= 0xffff_0000;
        }
        let mut other = Config::endpoint(&IDS);
        other.load(&saved, "test").unwrap();
        assert_eq!(other.read(0x3c, 4), 11);
        assert_eq!(other.read(0x06, 2), 0, "status");
        saved.registers.push((0, 0));
        assert!(other.load(&saved, "test").is_err());
    }

    #[test]
    fn beyond_the_end_there_is_nothing() {
        let mut config = Config::endpoint(&IDS);
        assert_eq!(config.read(0xfff, 4), 0);
        assert_eq!(config.read(u16::MAX, 4), 0);
        config.write(0xfe, 4, u32::MAX);
        config.write(u16::MAX, 4, u32::MAX);
        assert_eq!(config.read(0x100, 4), 0, "no extended capability");
    }

    #[test]
    fn bits_are_cleared_by_ones() {
        let mut config = Config::bridge(&IDS);
        config.allow_clear16(0x1e, 0x4000);
        config.change16(0x1e, 0, 0x4000);
        config.write(0x1e, 2, 0);
        assert_eq!(config.read(0x1e, 2), 0x4000);
        config.write(0x1e, 2, 0xffff);
        assert_eq!(config.read(0x1e, 2), 0);
    }
}
