//! Random states: mostly of a mode that exists, at times of none at all.

use softcpu::Cpu;
use softcpu::cpuid::Leaf;
use softcpu::state::{Segment, cr0, cr4, efer, rflags};

use crate::memory::{
    DESCRIPTORS, DESCRIPTORS_LEN, IDENTITY, IDENTITY_5, IDENTITY_32, IDENTITY_PAE, IDT_32, IDT_64,
    RAM, TABLE_COUNT, TABLES, TSS,
};
use crate::random::Random;

/// Everything there could be, at times without some of it.
pub fn leaves(random: &mut Random) -> Vec<Leaf> {
    let mut all = [
        (0, None, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (1, None, [0x106c0, 0, !(1 << 5 | 1 << 27), u32::MAX]),
        (7, Some(0), [0, u32::MAX, u32::MAX, u32::MAX]),
        (0xd, Some(0), [7, 832, 832, 0]),
        (0xd, Some(1), [0xf, 0, 0, 0]),
        (0xd, Some(2), [256, 576, 0, 0]),
        (0x4000_0000, None, [0x4000_0001, 0, 0, 0]),
        (0x4000_0001, None, [u32::MAX, 0, 0, 0]),
        (0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        (0x8000_0001, None, [0, 0, u32::MAX, u32::MAX]),
        (0x8000_0008, None, [46, u32::MAX, 0, 0]),
    ];
    if random.one_in(4) {
        for (function, _, regs) in &mut all {
            if matches!(function, 1 | 7 | 0x8000_0001) {
                for reg in regs {
                    *reg &= (random.next() | random.next()) as u32;
                }
            }
        }
    }
    all.into_iter()
        .map(|(function, index, regs)| Leaf {
            function,
            index,
            regs,
        })
        .collect()
}

fn segment(random: &mut Random, kind: u32) -> Segment {
    let flat = !random.one_in(4);
    Segment {
        base: if flat { 0 } else { random.integer() },
        limit: if flat {
            u32::MAX
        } else {
            random.integer() as u32
        },
        access: if random.one_in(16) {
            random.next() as u32 & 0x1_f0ff
        } else {
            kind
        },
        selector: (random.next() % DESCRIPTORS_LEN) as u16,
    }
}

fn table(random: &mut Random) -> softcpu::state::Table {
    softcpu::state::Table {
        base: if random.one_in(16) {
            random.integer()
        } else {
            DESCRIPTORS + ((random.next() % DESCRIPTORS_LEN) & !7) / 2
        },
        limit: random.pick(&[0xffff, 0xfff, 0x7ff, 0x1ff, 7, 0]),
    }
}

/// Gives the vCPU a new state, as a restored one would be.
pub fn random(cpu: &mut Cpu, random: &mut Random) {
    let s = &mut cpu.s;
    let mode = random.below(6);
    let (code, ring) = match mode {
        0 => (0x9b, 0),
        1 => (0x9b, 0),
        2 => (0xc09b, 0),
        3 => (0xc0fb, 3),
        4 => (0xa09b, 0),
        _ => (0xa0fb, 3),
    };
    for value in &mut s.gpr {
        *value = match random.below(4) {
            0 => random.integer(),
            1 => TABLES + random.next() % (TABLE_COUNT * 4096),
            _ => random.below(RAM) as u64,
        };
    }
    for (i, seg) in s.seg.iter_mut().enumerate() {
        let kind = if i == 1 {
            code
        } else {
            0xc093 | u32::from(ring == 3) << 5 | u32::from(ring == 3) << 6
        };
        *seg = segment(random, kind);
    }
    if mode == 0 {
        for seg in &mut s.seg {
            seg.base = u64::from(seg.selector) << 4;
            seg.limit = 0xffff;
        }
    }
    s.cpl = ring;
    s.tr = segment(random, 0x8b);
    s.tr.base = TSS;
    s.ldtr = segment(random, 0x82);
    let wild = random.one_in(8);
    s.gdtr.base = DESCRIPTORS;
    s.gdtr.limit = 0x4f;
    s.idtr.base = match mode {
        0 => 0,
        1..=3 => IDT_32,
        _ => IDT_64,
    };
    s.idtr.limit = 0xfff;
    if wild {
        s.gdtr = table(random);
        s.idtr = table(random);
        s.tr.base = DESCRIPTORS + random.next() % DESCRIPTORS_LEN / 2;
    }
    s.cr0 = cr0::ET | cr0::NE | random.next() & (cr0::WP | cr0::AM | cr0::MP);
    s.cr4 = random.next() & 0x37_ffff & !(cr4::LA57 | cr4::PCIDE) | cr4::OSFXSR;
    s.efer = random.next() & (efer::SCE | efer::NXE);
    if mode > 0 {
        s.cr0 |= cr0::PE;
    }
    if mode > 3 {
        s.cr0 |= cr0::PG;
        s.cr4 |= cr4::PAE;
        s.efer |= efer::LME | efer::LMA;
        s.cr4 |= random.next() & (cr4::LA57 | cr4::PCIDE);
    } else if mode > 0 && random.one_in(2) {
        s.cr0 |= cr0::PG;
        s.cr4 |= cr4::PSE;
    }
    s.cr3 = match mode {
        _ if random.one_in(8) => TABLES + (random.below(TABLE_COUNT as usize) as u64) * 4096,
        4.. if s.cr4 & cr4::LA57 != 0 => IDENTITY_5,
        4.. => IDENTITY,
        _ if s.cr4 & cr4::PAE != 0 => IDENTITY_PAE,
        _ => IDENTITY_32,
    };
    if random.one_in(2) {
        // Supervisor and user pages are the same ones.
        s.cr4 &= !(cr4::SMEP | cr4::SMAP);
    }
    s.flags = 2 | random.next() & (rflags::IF | rflags::DF | rflags::AC | rflags::IOPL);
    if mode == 3 && random.one_in(2) {
        s.flags |= rflags::VM;
    }
    if random.one_in(16) {
        s.flags |= rflags::TF;
    }
    s.xcr0 = random.pick(&[1, 3, 7, 7, 7]);
    s.rip = random.below(if mode == 0 { 0x1_0000 } else { RAM }) as u64;
    if random.one_in(4) {
        // Right before a page's end.
        s.rip |= 0xff0;
    }
    s.msr.lstar = random.below(RAM) as u64;
    s.msr.star = random.next();
    s.msr.sysenter_cs = random.next() & 0xffff;
    s.msr.sysenter_eip = random.below(RAM) as u64;
    s.dr7 = 0x400;
    if random.one_in(8) {
        s.dr = [0; 4].map(|_: u64| random.below(RAM) as u64);
        s.dr7 |= random.next() & 0xffff_00ff;
    }
    s.halted = false;
    s.waiting_for_sipi = false;
    s.nmi_masked = false;
    if random.one_in(8) {
        nonsense(cpu, random);
    }
    cpu.restore_pdptes();
    cpu.state_changed();
    let exception = (random.next() as u8 & 31, random.one_in(2).then_some(0));
    cpu.inject(random.one_in(16).then_some(exception));
}

/// What no processor could be in, but a damaged file could say.
fn nonsense(cpu: &mut Cpu, random: &mut Random) {
    let s = &mut cpu.s;
    for _ in 0..1 + random.below(4) {
        let value = random.integer();
        match random.below(16) {
            0 => s.cr0 = value,
            1 => s.cr3 = value,
            2 => s.cr4 = value,
            3 => s.efer = value,
            4 => s.flags = value & !rflags::STATUS,
            5 => s.rip = value,
            6 => s.cpl = value as u8 & 3,
            7 => s.xcr0 = value,
            8 => s.dr7 = value,
            9 => s.gdtr.base = value,
            10 => s.idtr.base = value,
            11 => s.tr.base = value,
            12 => s.pdpte = [value; 4],
            13 => s.seg[random.below(6)].access = value as u32,
            14 => s.fp.set_mxcsr(value as u32),
            _ => s.fp.legacy[random.below(512)] = value as u8,
        }
    }
}
