//! The machine described to the guest: ACPI tables (ACPI 6.5), or an Intel MP table without.

mod cpus;
mod dsdt;
mod loader;
pub mod mptable;

pub use dsdt::{PCI_PINS, PciPins};
pub use loader::files;

use std::collections::BTreeSet;

use acpi_tables::sdt::Sdt;

use crate::devices::{ioapic, pm, rtc};
use crate::layout::{ACPI_END, LOCAL_APIC, RSDP};
use crate::memory::{GuestMemory, MemoryError};
use crate::num::{low32, to_usize};
use crate::pci;

const OEM: [u8; 6] = *b"VIREO ";
const OEM_TABLE: [u8; 8] = *b"VIREOVMM";
const OEM_REVISION: u32 = 1;

/// What the tables describe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The APIC ids of the possible vCPUs, by their numbers.
    pub apic_ids: Vec<u32>,
    /// Those that are not there now, where they may come and go.
    pub absent: Option<BTreeSet<u32>>,
    /// Serial ports, COM1 first.
    pub serials: usize,
    /// A PC/AT's interrupt controllers and timer are there.
    pub pc: bool,
    /// pvpanic is there.
    pub pvpanic: bool,
    /// 64-bit PCI window.
    pub pci_high: Option<std::ops::Range<u64>>,
    /// Virtual machine generation id, in memory order.
    pub generation_id: Option<[u8; 16]>,
}

impl Description {
    /// How many vCPUs are possible.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        low32(self.apic_ids.len() as u64)
    }

    /// How many vCPUs are there.
    #[must_use]
    pub fn present(&self) -> u32 {
        let absent = self.absent.iter().flatten();
        absent.fold(self.vcpus(), |count, _| count.saturating_sub(1))
    }
}

/// Tables that do not fit.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More vCPUs than the tables' area has room for.
    #[error("{0} vCPUs do not fit into the machine's tables")]
    TooLarge(u32),
    /// Guest memory ends below the tables.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn table(signature: [u8; 4], length: u32, revision: u8) -> Sdt {
    Sdt::new(signature, length, revision, OEM, OEM_TABLE, OEM_REVISION)
}

/// Writes all tables into guest memory; returns the address of the root pointer.
///
/// # Errors
/// No room for them.
pub fn write(memory: &GuestMemory, machine: &Description) -> Result<u64, AcpiError> {
    let base = RSDP + 64;
    let tables = Tables::new(machine);
    if base + tables.bytes.len() as u64 > ACPI_END {
        return Err(AcpiError::TooLarge(machine.vcpus()));
    }
    memory.write(RSDP, &rsdp(base + tables.xsdt))?;
    memory.write(base, &tables.at(base))?;
    Ok(RSDP)
}

/// A place in the tables that holds an address, as long as they have none themselves an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pointer {
    at: usize,
    /// Bytes: 4 or 8.
    size: u8,
}

/// All tables but the root pointer, one after the other, without an address.
#[derive(Debug)]
struct Tables {
    bytes: Vec<u8>,
    pointers: Vec<Pointer>,
    /// What sums to zero: start and length of each table.
    sums: Vec<(usize, usize)>,
    /// Offset of the table of tables.
    xsdt: u64,
}

impl Tables {
    fn new(machine: &Description) -> Self {
        let mut tables = Self {
            bytes: Vec::new(),
            pointers: Vec::new(),
            sums: Vec::new(),
            xsdt: 0,
        };
        let facs = tables.put(&facs());
        let generation = machine.generation_id.map(|id| tables.put(&id));
        let mut dsdt = table(*b"DSDT", 36, 6);
        let (aml, address) = dsdt::aml(machine, generation);
        dsdt.append_slice(&aml);
        let pointers = address.map(|at| (36 + at, 4));
        let dsdt = tables.put_table(&dsdt, pointers);
        let fadt = tables.put_table(
            &fadt(facs, dsdt, machine.absent.is_some()),
            [(36, 4), (40, 4), (140, 8)],
        );
        let madt = tables.put_table(&madt(machine), []);
        let mcfg = tables.put_table(&mcfg(), []);
        let mut xsdt = table(*b"XSDT", 36, 1);
        for address in [fadt, madt, mcfg] {
            xsdt.append_slice(&address.to_le_bytes());
        }
        tables.xsdt = tables.put_table(&xsdt, [(36, 8), (44, 8), (52, 8)]);
        tables
    }

    /// Each on a 64-byte boundary (FACS needs that); its offset.
    fn put(&mut self, table: &[u8]) -> u64 {
        let at = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(at, 0);
        self.bytes.extend(table);
        at as u64
    }

    /// One with a header, and pointers at these offsets.
    fn put_table(&mut self, table: &Sdt, pointers: impl IntoIterator<Item = (usize, u8)>) -> u64 {
        let start = self.put(table.as_slice());
        let at = to_usize(start);
        self.sums.push((at, table.as_slice().len()));
        let pointers = pointers.into_iter();
        self.pointers.extend(pointers.map(|(offset, size)| Pointer {
            at: at + offset,
            size,
        }));
        start
    }

    /// As they are at `base`.
    fn at(&self, base: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for pointer in &self.pointers {
            let place = &mut bytes[pointer.at..][..pointer.size.into()];
            let mut value = [0; 8];
            value[..place.len()].copy_from_slice(place);
            let value = u64::from_le_bytes(value).wrapping_add(base).to_le_bytes();
            place.copy_from_slice(&value[..place.len()]);
        }
        for &(start, len) in &self.sums {
            checksum(&mut bytes[start..start + len], 9);
        }
        bytes
    }
}

/// Makes the bytes sum to zero with the one at `at`.
fn checksum(bytes: &mut [u8], at: usize) {
    bytes[at] = 0;
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = sum.wrapping_neg();
}

/// What sums to zero in the root pointer, and where the sum's byte is.
const RSDP_SUMS: [(usize, usize); 2] = [(20, 8), (36, 32)];
/// Where the root pointer points.
const RSDP_XSDT: usize = 24;

/// Root pointer, revision 2 (5.2.5.3).
fn rsdp(xsdt: u64) -> [u8; 36] {
    let mut rsdp = [0; 36];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(&OEM);
    rsdp[15] = 2;
    rsdp[20..24].copy_from_slice(&36_u32.to_le_bytes());
    rsdp[RSDP_XSDT..][..8].copy_from_slice(&xsdt.to_le_bytes());
    for (len, at) in RSDP_SUMS {
        checksum(&mut rsdp[..len], at);
    }
    rsdp
}

/// Firmware control structure (5.2.10): the global lock lives here.
fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4..8].copy_from_slice(&64_u32.to_le_bytes());
    facs[32] = 2;
    facs
}

/// Generic address of a port (5.2.3.2): `bits` wide, accessed in units of 1, 2 or 4 bytes.
fn port(address: u16, bits: u8, access: u8) -> [u8; 12] {
    let mut gas = [0; 12];
    gas[0] = 1;
    gas[1] = bits;
    gas[3] = access;
    gas[4..6].copy_from_slice(&address.to_le_bytes());
    gas
}

/// Fixed description table (5.2.9), with or without general-purpose events.
fn fadt(facs: u64, dsdt: u64, events: bool) -> Sdt {
    let mut fadt = table(*b"FACP", 276, 6);
    let (event, control, timer) = (pm::BASE, pm::BASE + pm::CONTROL, pm::BASE + pm::TIMER);
    fadt.write_u32(36, low32(facs));
    fadt.write_u32(40, low32(dsdt));
    fadt.write_u16(46, u16::from(pm::SCI));
    // No SMI command port: the machine is always in ACPI mode.
    fadt.write_u32(56, u32::from(event));
    fadt.write_u32(64, u32::from(control));
    fadt.write_u32(76, u32::from(timer));
    fadt.write_u8(88, 4);
    fadt.write_u8(89, 2);
    fadt.write_u8(91, 4);
    // Latencies beyond these limits: no C2 and C3.
    fadt.write_u16(96, 0x65);
    fadt.write_u16(98, 0x3e9);
    fadt.write_u8(108, rtc::CENTURY);
    // Boot architecture: legacy devices (serial ports), a keyboard controller, no VGA.
    fadt.write_u16(109, 1 | 1 << 1 | 1 << 2);
    // WBINVD works; C1 everywhere; no sleep button; no RTC wake; 32-bit timer; reset register.
    fadt.write_u32(112, 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10);
    fadt.write_bytes(116, &port(pci::RESET, 8, 1));
    fadt.write_u8(128, 6);
    fadt.write_u8(131, 5);
    fadt.write_u64(140, dsdt);
    fadt.write_bytes(148, &port(event, 32, 2));
    fadt.write_bytes(172, &port(control, 16, 2));
    fadt.write_bytes(208, &port(timer, 32, 3));
    if events {
        fadt.write_u32(80, u32::from(pm::GPE_BASE));
        fadt.write_u8(92, pm::GPE_LEN);
        fadt.write_bytes(220, &port(pm::GPE_BASE, pm::GPE_LEN * 8, 1));
    }
    fadt.write_bytes(268, b"VireoVMM");
    fadt.update_checksum();
    fadt
}

/// A vCPU's entry in the table of interrupt controllers (5.2.12.2, 5.2.12.12): one that is there, or one
/// that may come.
fn processor(id: u32, apic_id: u32, present: bool) -> Vec<u8> {
    let flags: u8 = if present { 1 } else { 1 << 1 };
    match (u8::try_from(id), u8::try_from(apic_id)) {
        (Ok(id), Ok(apic_id)) if apic_id < 255 => vec![0, 8, id, apic_id, flags, 0, 0, 0],
        _ => {
            let mut entry = vec![9, 16, 0, 0];
            entry.extend(apic_id.to_le_bytes());
            entry.extend(u32::from(flags).to_le_bytes());
            entry.extend(id.to_le_bytes());
            entry
        }
    }
}

/// Interrupt controllers (5.2.12).
fn madt(machine: &Description) -> Sdt {
    let mut madt = table(*b"APIC", 44, 5);
    madt.write_u32(36, low32(LOCAL_APIC));
    // Flags at 40: whether there are a PC/AT's interrupt controllers beside the APICs.
    madt.write_u32(40, machine.pc.into());
    let mut entries = Vec::new();
    for (id, apic_id) in (0..).zip(&machine.apic_ids) {
        let absent = machine.absent.as_ref();
        let present = !absent.is_some_and(|all| all.contains(&id));
        entries.extend(processor(id, *apic_id, present));
    }
    entries.extend([1, 12, 0, 0]);
    entries.extend(low32(ioapic::BASE).to_le_bytes());
    entries.extend(0_u32.to_le_bytes());
    if machine.pc {
        // The interval timer's line is on pin 2.
        entries.extend([2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    }
    // The SCI is level-triggered, active high.
    entries.extend([2, 10, 0, pm::SCI]);
    entries.extend(u32::from(pm::SCI).to_le_bytes());
    entries.extend(0x000d_u16.to_le_bytes());
    // NMI at every local APIC's LINT1.
    entries.extend([4, 6, 0xff, 0, 0, 1]);
    madt.append_slice(&entries);
    madt
}

/// PCI Express configuration space (PCI Firmware 3.2, 4.1.2).
fn mcfg() -> Sdt {
    let mut mcfg = table(*b"MCFG", 60, 1);
    mcfg.write_u64(44, pci::ECAM);
    mcfg.write_u8(55, 255);
    mcfg.update_checksum();
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::Fields;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn description(vcpus: u32) -> Description {
        Description {
            apic_ids: (0..vcpus).collect(),
            absent: None,
            serials: 4,
            pc: false,
            pvpanic: true,
            pci_high: Some(1 << 32..1 << 40),
            generation_id: Some([7; 16]),
        }
    }

    #[test]
    fn tables_hang_together() {
        let memory = GuestMemory::new(2 << 20).unwrap();
        assert_eq!(write(&memory, &description(2)).unwrap(), RSDP);
        let mut area = vec![0; to_usize(ACPI_END - RSDP)];
        memory.read(RSDP, &mut area).unwrap();
        assert_eq!(sum(&area[..20]), 0);
        assert_eq!(sum(&area[..36]), 0);
        let at = |address: u64| &area[to_usize(address - RSDP)..];
        let xsdt = at(area.u64_at(24).unwrap());
        let mut seen = Vec::new();
        for entry in 0..3 {
            let table = at(xsdt.u64_at(36 + entry * 8).unwrap());
            let length = usize::try_from(table.u32_at(4).unwrap()).unwrap();
            assert_eq!(sum(&table[..length]), 0);
            seen.push(table[..4].to_vec());
            if &table[..4] == b"FACP" {
                let dsdt = at(table.u64_at(140).unwrap());
                let length = usize::try_from(dsdt.u32_at(4).unwrap()).unwrap();
                assert_eq!(&dsdt[..4], b"DSDT");
                assert_eq!(sum(&dsdt[..length]), 0);
                assert_eq!(&at(u64::from(table.u32_at(36).unwrap()))[..4], b"FACS");
            }
        }
        assert_eq!(seen, [b"FACP", b"APIC", b"MCFG"]);
    }

    #[test]
    fn many_cpus_fit_or_are_refused() {
        let memory = GuestMemory::new(2 << 20).unwrap();
        write(&memory, &description(1024)).unwrap();
        let mut pluggable = description(512);
        pluggable.absent = Some((1..512).collect());
        write(&memory, &pluggable).unwrap();
        assert!(matches!(
            write(&memory, &description(100_000)),
            Err(AcpiError::TooLarge(100_000))
        ));
        let small = GuestMemory::new(64 << 10).unwrap();
        assert!(matches!(
            write(&small, &description(1)),
            Err(AcpiError::Memory(_))
        ));
    }
}
