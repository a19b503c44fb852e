//! Guest-virtual memory, through the guest's own page tables (Intel SDM vol. 3, 4.2 to 4.5).

use hypervisor::{Sregs, Vm};

use crate::memory::{GuestMemory, PAGE};

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Bits of an entry that are an address.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

fn entry(memory: &GuestMemory, at: u64, size: usize) -> Option<u64> {
    let mut bytes = [0; 8];
    memory.read(at, &mut bytes[..size]).ok()?;
    Some(u64::from_le_bytes(bytes)).filter(|entry| entry & PRESENT != 0)
}

/// Guest-physical address of linear `address`; `None` where it is not mapped. Permissions are
/// not a debugger's concern.
pub fn translate(memory: &GuestMemory, sregs: &Sregs, address: u64) -> Option<u64> {
    if sregs.cr0 & CR0_PG == 0 {
        return Some(address & 0xffff_ffff);
    }
    let long = sregs.efer & EFER_LMA != 0;
    if !long && sregs.cr4 & CR4_PAE == 0 {
        return two_level(memory, sregs, address & 0xffff_ffff);
    }
    let (mut table, levels, address) = if !long {
        // Four entries, in a table that need not fill a page.
        (sregs.cr3 & 0xffff_ffe0, 3, address & 0xffff_ffff)
    } else if sregs.cr4 & CR4_LA57 != 0 {
        (sregs.cr3 & FRAME, 5, address)
    } else {
        (sregs.cr3 & FRAME, 4, address)
    };
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let index = address >> shift & if !long && level == 2 { 3 } else { 511 };
        let found = entry(memory, table + index * 8, 8)?;
        let page = level == 0 || (level == 1 || long && level == 2) && found & LARGE != 0;
        if page {
            let offset = (1 << shift) - 1;
            return Some(found & FRAME & !offset | address & offset);
        }
        table = found & FRAME;
    }
    None
}

fn two_level(memory: &GuestMemory, sregs: &Sregs, address: u64) -> Option<u64> {
    let directory = entry(memory, (sregs.cr3 & 0xffff_f000) + (address >> 22) * 4, 4)?;
    if directory & LARGE != 0 && sregs.cr4 & CR4_PSE != 0 {
        // PSE-36: bits 13..21 are the address's upper part.
        return Some(
            directory & 0xffc0_0000 | (directory >> 13 & 0xff) << 32 | address & 0x3f_ffff,
        );
    }
    let table = directory & 0xffff_f000;
    let found = entry(memory, table + (address >> 12 & 1023) * 4, 4)?;
    Some(found & 0xffff_f000 | address & 0xfff)
}

/// Pieces of `len` bytes at linear `address` that lie in one page each: offset and length.
fn pieces(address: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = address.wrapping_add(done as u64);
        let piece = crate::num::to_usize(PAGE - at % PAGE).min(len - done);
        let start = done;
        done += piece;
        (piece > 0).then_some((start, piece))
    })
}

/// Reads as many bytes from linear `address` on as are mapped RAM.
pub fn read(memory: &GuestMemory, sregs: &Sregs, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (start, piece) in pieces(address, len) {
        let physical = translate(memory, sregs, address.wrapping_add(start as u64));
        let got = physical.and_then(|at| memory.read(at, &mut bytes[start..start + piece]).ok());
        if got.is_none() {
            bytes.truncate(start);
            break;
        }
    }
    bytes
}

/// Writes to linear `address`; false where not all of it is mapped RAM.
pub fn write(memory: &GuestMemory, vm: &dyn Vm, sregs: &Sregs, address: u64, bytes: &[u8]) -> bool {
    pieces(address, bytes.len()).all(|(start, piece)| {
        let Some(at) = translate(memory, sregs, address.wrapping_add(start as u64)) else {
            return false;
        };
        let written = memory.write(at, &bytes[start..start + piece]).is_ok();
        if written {
            vm.memory_written(at, piece as u64);
        }
        written
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(memory: &GuestMemory, at: u64, entry: u64) {
        memory.write(at, &entry.to_le_bytes()).unwrap();
    }

    #[test]
    fn walks_every_kind_of_table() {
        let memory = GuestMemory::new(8 << 20).unwrap();
        let mut sregs = Sregs::default();
        assert_eq!(translate(&memory, &sregs, 0x1234), Some(0x1234));
        // Long mode: 4 KiB and 2 MiB pages.
        sregs.cr0 = CR0_PG;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LMA;
        sregs.cr3 = 0x1000;
        put(&memory, 0x1ff8, 0x2003);
        put(&memory, 0x2ff0, 0x3003);
        put(&memory, 0x3000, 0x4003);
        put(&memory, 0x3008, 0x60_0083);
        put(&memory, 0x4010, 1 << 63 | 0x5003);
        let top = 0xffff_ffff_8000_0000;
        assert_eq!(translate(&memory, &sregs, top + 0x2abc), Some(0x5abc));
        assert_eq!(translate(&memory, &sregs, top + 0x20_1234), Some(0x60_1234));
        assert_eq!(translate(&memory, &sregs, top + 0x3000), None);
        memory.write(0x5ffe, b"ab").unwrap();
        assert_eq!(
            read(&memory, &sregs, top + 0x2ffe, 4),
            b"ab",
            "up to the hole"
        );
        // PAE without long mode: the first table has four entries.
        sregs.efer = 0;
        sregs.cr3 = 0x6020;
        put(&memory, 0x6020 + 24, 0x3001);
        assert_eq!(translate(&memory, &sregs, 0xc000_2abc), Some(0x5abc));
        // Two levels, with a 4 MiB page.
        sregs.cr4 = CR4_PSE;
        sregs.cr3 = 0x7000;
        memory.write(0x7000, &0x8003_u32.to_le_bytes()).unwrap();
        memory.write(0x8004, &0x5003_u32.to_le_bytes()).unwrap();
        memory.write(0x7004, &0x40_0083_u32.to_le_bytes()).unwrap();
        assert_eq!(translate(&memory, &sregs, 0x1abc), Some(0x5abc));
        assert_eq!(translate(&memory, &sregs, 0x40_1234), Some(0x40_1234));
        assert_eq!(translate(&memory, &sregs, 0x80_0000), None);
    }
}
