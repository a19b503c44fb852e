//! The tables as firmware gets them: files of fw_cfg, and a script that says how they are to be
//! placed and linked (QEMU, hw/acpi/bios-linker-loader.c and docs/specs; read by SeaBIOS and
//! OVMF).

use super::{Description, RSDP_SUMS, RSDP_XSDT, Tables, rsdp};
use crate::num::low32;

/// Names of the files.
const TABLES: &str = "etc/acpi/tables";
const ROOT: &str = "etc/acpi/rsdp";
const SCRIPT: &str = "etc/table-loader";

/// Bytes of a command, and of a file's name in it.
const COMMAND: usize = 128;
const NAME: usize = 56;

/// Where a file goes: anywhere below 4 GiB; where a root pointer is looked for.
const HIGH: u8 = 1;
const BELOW_1_MIB: u8 = 2;

#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    /// A command and its operands, names among them.
    fn command(&mut self, number: u32, operands: &[&[u8]]) {
        let start = self.0.len();
        self.0.extend(number.to_le_bytes());
        for operand in operands {
            self.0.extend(*operand);
        }
        self.0.resize(start + COMMAND, 0);
    }

    fn allocate(&mut self, file: &str, align: u32, zone: u8) {
        self.command(1, &[&name(file), &align.to_le_bytes(), &[zone]]);
    }

    /// Adds the address of the tables to what is in `file`.
    fn add_pointer(&mut self, file: &str, at: usize, size: u8) {
        let at = low32(at as u64).to_le_bytes();
        self.command(2, &[&name(file), &name(TABLES), &at, &[size]]);
    }

    fn add_checksum(&mut self, file: &str, at: usize, start: usize, len: usize) {
        let [at, start, len] = [at, start, len].map(|n| low32(n as u64).to_le_bytes());
        self.command(3, &[&name(file), &at, &start, &len]);
    }
}

fn name(file: &str) -> [u8; NAME] {
    let mut field = [0; NAME];
    field[..file.len()].copy_from_slice(file.as_bytes());
    field
}

/// The files: name and content.
#[must_use]
pub fn files(machine: &Description) -> [(&'static str, Vec<u8>); 3] {
    let tables = Tables::new(machine);
    let mut root = rsdp(tables.xsdt);
    let mut script = Script::default();
    script.allocate(TABLES, 64, HIGH);
    script.allocate(ROOT, 16, BELOW_1_MIB);
    for pointer in &tables.pointers {
        script.add_pointer(TABLES, pointer.at, pointer.size);
    }
    script.add_pointer(ROOT, RSDP_XSDT, 8);
    // Sums are computed over what is there: with their own bytes zero.
    let mut bytes = tables.bytes;
    for &(start, len) in &tables.sums {
        bytes[start + 9] = 0;
        script.add_checksum(TABLES, start + 9, start, len);
    }
    for (_, at) in RSDP_SUMS {
        root[at] = 0;
    }
    for (len, at) in RSDP_SUMS {
        script.add_checksum(ROOT, at, 0, len);
    }
    [(TABLES, bytes), (ROOT, root.to_vec()), (SCRIPT, script.0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::RSDP;
    use crate::acpi::write;
    use crate::memory::GuestMemory;
    use crate::num::{Fields, to_usize};

    /// Does what firmware does with the script; memory with the tables at `at`, and the root.
    fn load(files: &[(&'static str, Vec<u8>); 3], at: u64) -> (Vec<u8>, Vec<u8>) {
        let [(_, tables), (_, root), (_, script)] = files;
        let (mut tables, mut root) = (tables.clone(), root.clone());
        let text = |bytes: &[u8]| {
            let end = bytes.iter().position(|&b| b == 0).unwrap();
            String::from_utf8(bytes[..end].to_vec()).unwrap()
        };
        assert!(script.len().is_multiple_of(COMMAND));
        for command in script.chunks(COMMAND) {
            let file = text(&command[4..]);
            let content = if file == TABLES {
                &mut tables
            } else {
                &mut root
            };
            let number = |at: usize| usize::try_from(command.u32_at(at).unwrap()).unwrap();
            match number(0) {
                1 => assert!(number(4 + NAME).is_power_of_two()),
                2 => {
                    assert_eq!(text(&command[4 + NAME..]), TABLES);
                    let (offset, size) = (number(4 + 2 * NAME), command[8 + 2 * NAME]);
                    let place = &mut content[offset..offset + usize::from(size)];
                    let mut value = [0; 8];
                    value[..place.len()].copy_from_slice(place);
                    let value = (u64::from_le_bytes(value) + at).to_le_bytes();
                    place.copy_from_slice(&value[..usize::from(size)]);
                }
                3 => {
                    let [result, start, len] = [0, 4, 8].map(|n| number(4 + NAME + n));
                    let sum = content[start..start + len].iter();
                    content[result] = content[result]
                        .wrapping_sub(sum.fold(0, |sum: u8, byte| sum.wrapping_add(*byte)));
                }
                other => panic!("command {other}"),
            }
        }
        (tables, root)
    }

    #[test]
    fn firmware_that_follows_the_script_gets_the_same_tables() {
        let machine = Description {
            apic_ids: vec![0, 1, 2],
            absent: Some([2].into()),
            serials: 2,
            pc: true,
            pvpanic: true,
            pci_high: None,
            generation_id: Some([7; 16]),
        };
        let memory = GuestMemory::new(2 << 20).unwrap();
        write(&memory, &machine).unwrap();
        let (tables, root) = load(&files(&machine), RSDP + 64);
        let mut expected = vec![0; tables.len()];
        memory.read(RSDP + 64, &mut expected).unwrap();
        assert_eq!(tables, expected);
        let mut expected = vec![0; root.len()];
        memory.read(RSDP, &mut expected).unwrap();
        assert_eq!(root, expected);
        // The generation id is where its device says.
        let at = tables.windows(4).position(|w| w == b"ADDR").unwrap();
        let package = &tables[at + 4..];
        let dword = package.iter().position(|&b| b == 0x0c).unwrap();
        let address = u64::from(package.u32_at(dword + 1).unwrap());
        assert_eq!(tables[to_usize(address - RSDP - 64)..][..16], [7; 16]);
    }
}
