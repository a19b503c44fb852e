//! Guest memory: RAM full of code and tables between pages nobody may touch, and some ROM.

use std::sync::Arc;

use softcpu::Machine;

use crate::code;
use crate::random::Random;

/// RAM at 0.
pub const RAM: usize = 256 << 10;
/// Read-only memory behind a hole.
const ROM: usize = 64 << 10;
const ROM_AT: u64 = 0x20_0000;
const PAGE: usize = 4096;
/// Page tables, one page each from here on.
pub const TABLES: u64 = 0x1_0000;
pub const TABLE_COUNT: u64 = 16;
/// Tables that lead to all memory by its own address: 4 levels, 5 levels, 32-bit, PAE.
pub const IDENTITY: u64 = TABLES;
pub const IDENTITY_5: u64 = TABLES + 5 * 4096;
pub const IDENTITY_32: u64 = TABLES + 6 * 4096;
pub const IDENTITY_PAE: u64 = TABLES + 7 * 4096;
/// Descriptor tables and task states.
pub const DESCRIPTORS: u64 = 0x8000;
pub const DESCRIPTORS_LEN: u64 = 0x4000;
/// Interrupt tables with gates of both kinds.
pub const IDT_64: u64 = DESCRIPTORS + 0x1000;
pub const IDT_32: u64 = DESCRIPTORS + 0x2000;
/// A task state with stacks in RAM.
pub const TSS: u64 = DESCRIPTORS + 0x3000;
/// Selectors of the table at `DESCRIPTORS`: 64-bit, 32-bit and 16-bit code, data, the same for
/// user mode, a task.
pub const CODE_64: u64 = 8;
pub const CODE_32: u64 = 0x10;

pub struct Memory {
    base: *mut u8,
    len: usize,
    ram: *mut u8,
    rom: *mut u8,
}

impl Memory {
    pub fn new(machine: &Arc<Machine>) -> Self {
        let len = RAM + ROM + 3 * PAGE;
        // SAFETY: new mappings; the slots are taken away before they go (`unmap`).
        unsafe {
            let base = libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            assert_ne!(base, libc::MAP_FAILED);
            let base = base.cast::<u8>();
            let (ram, rom) = (base.add(PAGE), base.add(2 * PAGE + RAM));
            for (at, len) in [(ram, RAM), (rom, ROM)] {
                let rw = libc::PROT_READ | libc::PROT_WRITE;
                assert_eq!(libc::mprotect(at.cast(), len, rw), 0);
            }
            machine
                .map_memory(0, 0, RAM as u64, ram, false, true)
                .unwrap();
            machine
                .map_memory(1, ROM_AT, ROM as u64, rom, true, false)
                .unwrap();
            Self {
                base,
                len,
                ram,
                rom,
            }
        }
    }

    pub fn unmap(self, machine: &Machine) {
        machine.unmap_memory(0).unwrap();
        machine.unmap_memory(1).unwrap();
        // SAFETY: ours, and nobody uses it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= RAM);
        // SAFETY: inside the RAM, and no vCPU runs yet.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ram.add(at as usize), bytes.len());
        }
    }

    pub fn fill(&self, random: &mut Random) {
        for page in 0..RAM as u64 / 4096 {
            self.put(page * 4096, &code::page(random));
        }
        // SAFETY: inside the ROM.
        unsafe {
            for page in 0..ROM / PAGE {
                let bytes = code::page(random);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.rom.add(page * PAGE), PAGE);
            }
        }
        for table in 0..TABLE_COUNT {
            for index in 0..512 {
                let at = TABLES + table * 4096 + index * 8;
                self.put(at, &entry(random).to_le_bytes());
            }
        }
        for at in (DESCRIPTORS..DESCRIPTORS + DESCRIPTORS_LEN).step_by(8) {
            self.put(at, &descriptor(random).to_le_bytes());
        }
        if !random.one_in(4) {
            self.sound(random);
        }
        // The real-mode interrupt table leads to code.
        for vector in 0..256 {
            let target = (random.below(0xf000) as u32) << 16 | random.next() as u32 & 0xffff;
            self.put(vector * 4, &target.to_le_bytes());
        }
    }
}

impl Memory {
    /// Tables as a system would make them, with a few mistakes.
    fn sound(&self, random: &mut Random) {
        const USER: u64 = 7;
        const LARGE: u64 = 0x87;
        let put = |at: u64, value: u64| self.put(at, &value.to_le_bytes());
        let table = |n: u64| TABLES + n * 4096;
        put(table(5), table(0) | USER);
        put(table(0), table(1) | USER);
        put(table(0) + 8 * 511, table(1) | USER);
        for i in 0..4 {
            put(table(1) + 8 * i, table(2) | USER);
            put(table(7) + 8 * i, table(2) | 1);
        }
        put(table(1) + 8 * 3, table(4) | USER);
        put(table(7) + 8 * 3, table(4) | 1);
        put(table(2), table(3) | USER);
        put(table(2) + 8, ROM_AT | LARGE);
        for i in 0..RAM as u64 / 4096 {
            put(table(3) + 8 * i, (i * 4096) | USER);
        }
        for i in 0..512 {
            put(table(4) + 8 * i, 3 << 30 | i << 21 | LARGE);
        }
        for i in 0..1024_u32 {
            self.put(table(6) + 4 * u64::from(i), &(i << 22 | 0x87).to_le_bytes());
        }
        for (i, entry) in [
            0,
            0x00af_9b00_0000_ffff_u64,
            0x00cf_9b00_0000_ffff,
            0x0000_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x67 | TSS << 16 | 0x89 << 40,
            0,
        ]
        .into_iter()
        .enumerate()
        {
            put(DESCRIPTORS + 8 * i as u64, entry);
        }
        for vector in 0..256 {
            let to = random.below(RAM) as u64 & !15;
            let kind = random.pick(&[0x8e00, 0x8f00, 0xee00, 0xef00]);
            let ist = (random.next() & 7) * u64::from(random.one_in(4));
            let low = to & 0xffff | kind << 32 | (to >> 16) << 48;
            put(IDT_64 + 16 * vector, low | CODE_64 << 16 | ist << 32);
            put(IDT_64 + 16 * vector + 8, 0);
            put(IDT_32 + 8 * vector, low | CODE_32 << 16);
        }
        for i in 0..13 {
            put(
                TSS + 4 + 8 * i,
                (RAM / 2 + random.below(RAM / 2)) as u64 & !15,
            );
        }
        if random.one_in(2) {
            for _ in 0..random.below(12) {
                let at = (TABLES + random.below(8 * 4096) as u64) & !7;
                put(at, entry(random));
                let at = (DESCRIPTORS + random.below(DESCRIPTORS_LEN as usize) as u64) & !7;
                put(at, descriptor(random));
            }
        }
    }
}

/// An entry of a page table: of tables, of RAM, of devices, of nothing.
fn entry(random: &mut Random) -> u64 {
    let target = match random.below(8) {
        0..=2 => TABLES + (random.below(TABLE_COUNT as usize) as u64) * 4096,
        3..=4 => (random.below(RAM / PAGE) as u64) * 4096,
        5 => random.pick(&[0xfee0_0000, ROM_AT, ROM_AT + 0x10000 - 4096, RAM as u64]),
        6 => random.next() & 0x3f_ffff_f000,
        _ => random.next() & 0xf_ffff_ffff_f000,
    };
    let mut flags = random.next() & 0xfff;
    if !random.one_in(4) {
        // Mostly usable: present, writable, user, no large page.
        flags = flags & !0x80 | 7;
    }
    if random.one_in(8) {
        flags |= 1 << 63;
    }
    target | flags
}

/// A descriptor or gate of any kind, mostly present and usable.
fn descriptor(random: &mut Random) -> u64 {
    let base = match random.below(3) {
        0 => 0,
        1 => random.below(RAM) as u64,
        _ => random.next() & 0xffff_ffff,
    };
    let limit = match random.below(3) {
        0 => 0xf_ffff,
        1 => random.below(0x1_0000) as u64,
        _ => random.next() & 0xf_ffff,
    };
    let access = match random.below(4) {
        0 => random.next() & 0xff,
        1 => 0x80 | random.next() & 0x6f,
        _ => 0x90 | random.next() & 0x6f,
    };
    let flags = random.next() & 15;
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}
