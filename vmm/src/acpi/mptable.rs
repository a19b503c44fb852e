//! Intel MultiProcessor table (specification 1.4, chapter 4), for machines without ACPI.

use std::collections::BTreeSet;

use super::{PCI_PINS, checksum};
use crate::devices::{ioapic, pm};
use crate::layout::{LOCAL_APIC, MP_TABLE};
use crate::memory::{GuestMemory, MemoryError};
use crate::num::{low8, low16, low32, to_usize};

/// More vCPUs need ACPI: the table has 1 KiB.
pub const MAX_VCPUS: u32 = 32;

/// PCI's bus has its own number there, the other one comes after it.
const PCI_BUS: u8 = 0;
const ISA_BUS: u8 = 1;
/// All there is room for.
const MOST: usize = 1024;

/// Writes the floating pointer and the table, with the vCPUs of these APIC ids, and the pins (INTA#) of the devices in these
/// slots of PCI's root bus: as many as there is room for.
///
/// # Errors
/// Guest memory ends below it.
pub fn write(
    memory: &GuestMemory,
    vcpus: impl IntoIterator<Item = u32>,
    slots: &BTreeSet<u8>,
) -> Result<(), MemoryError> {
    // The I/O APIC has one of those ids, too.
    let vcpus = vcpus.into_iter().filter(|id| *id < 254);
    let vcpus = vcpus.take(to_usize(MAX_VCPUS.into()));
    let vcpus: Vec<u8> = vcpus.map(low8).collect();
    let ioapic_id = vcpus.iter().max().map_or(1, |last| last + 1);
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in vcpus {
        let flags = if id == 0 { 3 } else { 1 };
        let mut cpu = [0; 20];
        cpu[..4].copy_from_slice(&[0, id, 0x14, flags]);
        // Signature and features: family 6, with FPU and APIC.
        cpu[4..8].copy_from_slice(&0x600_u32.to_le_bytes());
        cpu[8..12].copy_from_slice(&0x201_u32.to_le_bytes());
        add(&cpu);
    }
    add(&[1, PCI_BUS, b'P', b'C', b'I', b' ', b' ', b' ']);
    add(&[1, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut controller = [2, ioapic_id, 0x11, 1, 0, 0, 0, 0];
    controller[4..].copy_from_slice(&low32(ioapic::BASE).to_le_bytes());
    add(&controller);
    for irq in 0..16 {
        // Edge, active high, but the SCI's pin, which is level.
        let flags = if irq == pm::SCI { 0x0d } else { 0 };
        add(&[3, 0, flags, 0, ISA_BUS, irq, ioapic_id, irq]);
    }
    add(&[4, 3, 0, 0, ISA_BUS, 0, 0xff, 0]);
    add(&[4, 1, 0, 0, ISA_BUS, 0, 0xff, 1]);
    let room = MOST.saturating_sub(16 + 44 + entries.len()) / 8;
    for slot in slots.iter().take(room) {
        let line = PCI_PINS.first + slot % PCI_PINS.count;
        // Level, active high, as everything here.
        entries.extend([3, 0, 0x0d, 0, PCI_BUS, slot << 2, ioapic_id, line]);
        count += 1;
    }

    let mut table = vec![0; 44];
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&low16(low32(44 + entries.len() as u64)).to_le_bytes());
    table[6] = 4;
    table[8..16].copy_from_slice(b"VIREO   ");
    table[16..28].copy_from_slice(b"VIREO VMM   ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&low32(LOCAL_APIC).to_le_bytes());
    table.extend(entries);
    checksum(&mut table, 7);

    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&low32(MP_TABLE + 16).to_le_bytes());
    pointer[8] = 1;
    pointer[9] = 4;
    checksum(&mut pointer, 10);
    memory.write(MP_TABLE, &pointer)?;
    memory.write(MP_TABLE + 16, &table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::Fields;

    #[test]
    fn sums_to_zero_and_stays_below_640k() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        write(&memory, 0..1000, &(0..32).collect()).unwrap();
        let mut area = vec![0; 1024];
        memory.read(MP_TABLE, &mut area).unwrap();
        let length = usize::from(area.u16_at(20).unwrap());
        assert!(16 + length <= 1024, "{length}");
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum(&area[..16]), 0);
        assert_eq!(sum(&area[16..16 + length]), 0);
        // 19 of the slots.
        assert_eq!(area.u16_at(50), Some(32 + 3 + 16 + 2 + 19));
    }
}
