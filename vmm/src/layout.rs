//! Where things are in guest-physical memory.
//!
//! ```text
//! 0x0000_0000  RAM
//! 0x0009_0000  what a kernel is told at its entry (boot data)
//! 0x0009_fc00  reserved; MP table
//! 0x000e_0000  ACPI tables
//! 0x0010_0000  RAM, to 3 GiB at most
//! 0xc000_0000  32-bit PCI window
//! 0xe000_0000  ECAM
//! 0xf000_0000  32-bit PCI window, to the I/O APIC
//! 0xfec0_0000  I/O APIC; 0xfee0_0000 local APICs
//! 0x1_0000_0000 RAM that did not fit below; 64-bit PCI window after it
//! ```

use std::ops::Range;

use crate::devices::ioapic;
use crate::memory::{GuestMemory, LOW_MAX};
use crate::pci;

/// Boot data: nothing a kernel file brings may be loaded over it.
pub const BOOT_DATA: Range<u64> = 0x9_0000..0x10_0000;
/// hvm_start_info, its module list and memory map.
pub const START_INFO: u64 = 0x9_0000;
/// Linux's boot_params.
pub const ZERO_PAGE: u64 = 0x9_1000;
/// GDT for kernels that expect one.
pub const GDT: u64 = 0x9_2000;
/// Multiboot information.
pub const MULTIBOOT: u64 = 0x9_3000;
/// Command line.
pub const CMDLINE: u64 = 0x9_8000;
/// Longest command line with its terminating zero.
pub const CMDLINE_MAX: u64 = 0x4000;
/// MP floating pointer and table.
pub const MP_TABLE: u64 = 0x9_fc00;
/// ACPI's root pointer, with the tables behind it.
pub const RSDP: u64 = 0xe_0000;
/// End of the ACPI tables' area.
pub const ACPI_END: u64 = 0x10_0000;
/// Where RAM goes on after the area of ROMs and video memory.
pub const HIMEM: u64 = 0x10_0000;
/// Local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;

/// Windows in which the guest may place PCI memory below 4 GiB.
pub const PCI_LOW: [Range<u64>; 2] = [
    LOW_MAX..pci::ECAM,
    pci::ECAM + pci::ECAM_LEN as u64..ioapic::BASE,
];

/// Kinds of memory (ACPI 6.5, table 15.10), as E820 and PVH number them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// For the guest to use.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables: usable once they have been read.
    Acpi = 3,
}

impl Kind {
    /// Its number.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
            Self::Acpi => 3,
        }
    }
}

/// One line of the memory map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Addresses.
    pub range: Range<u64>,
    /// What is there.
    pub kind: Kind,
}

/// The memory map a guest is given, in order of address.
#[must_use]
pub fn memory_map(memory: &GuestMemory) -> Vec<Region> {
    let low = memory.low().end;
    let plan = [
        (0..MP_TABLE.min(low), Kind::Ram),
        (MP_TABLE..0xa_0000, Kind::Reserved),
        (RSDP..ACPI_END, Kind::Acpi),
        (HIMEM..low, Kind::Ram),
        (
            pci::ECAM..pci::ECAM + u64::from(pci::ECAM_LEN),
            Kind::Reserved,
        ),
        (memory.high(), Kind::Ram),
    ];
    plan.into_iter()
        .filter(|(range, _)| !range.is_empty())
        .map(|(range, kind)| Region { range, kind })
        .collect()
}

/// The 64-bit PCI window: after RAM, whole 4 GiB, within `address_bits` of physical address;
/// `None` where there is no room.
#[must_use]
pub fn pci_high(memory: &GuestMemory, address_bits: u32) -> Option<Range<u64>> {
    let start = crate::num::align_up(memory.high().end.max(1 << 32), 1 << 32)?;
    let end = 1_u64 << address_bits.clamp(32, 46);
    (start < end).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_is_ordered_and_disjoint() {
        for size in [1 << 20, 64 << 20] {
            let memory = GuestMemory::new(size).unwrap();
            let map = memory_map(&memory);
            for pair in map.windows(2) {
                assert!(pair[0].range.end <= pair[1].range.start, "{pair:x?}");
            }
        }
        let memory = GuestMemory::new(64 << 20).unwrap();
        assert_eq!(pci_high(&memory, 40), Some(1 << 32..1 << 40));
        assert_eq!(pci_high(&memory, 32), None);
    }
}
