//! Every combination of page size, permissions, privilege and control bits, against a model
//! that is written down from the manual's rules alone (Intel SDM vol. 3, 4.6 and 4.7).

use softcpu::state::{Segment, cr0, cr4, efer, gpr, rflags, seg};

use crate::rig::{CODE, DATA, Guest, PD, PDPT, PML4, PT, STACK, TSS};

/// Tables that only the probed address uses, from the last level up.
const TABLES: u64 = 0xb000;
const USER_CODE: u64 = CODE + 0x1000;
/// Offset of data from `DATA`.
const BESIDE: u64 = 0x100;
const NX: u64 = 1 << 63;
const LARGE: u64 = 1 << 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Legacy,
    Pae,
    Long,
    Long5,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Fetch,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    mode: Mode,
    /// Level of the entry that maps the page: 1, 2 (2 or 4 MiB), 3 (1 GiB).
    leaf_level: usize,
    /// Flags of the leaf: present, R/W, U/S, NX.
    leaf: u64,
    /// Flags of one entry above.
    upper: u64,
    /// Which.
    upper_level: usize,
    kind: Kind,
    user: bool,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
    nxe: bool,
}

impl Case {
    fn levels(&self) -> usize {
        match self.mode {
            Mode::Legacy | Mode::Pae => 2,
            Mode::Long => 4,
            Mode::Long5 => 5,
        }
    }

    /// The error code the manual asks for, if the access faults.
    fn expected(&self) -> Option<u64> {
        let mut code = 0;
        if self.kind == Kind::Write {
            code |= 2;
        }
        if self.user {
            code |= 4;
        }
        let has_nx = self.mode != Mode::Legacy;
        if self.kind == Kind::Fetch && (self.smep || has_nx && self.nxe) {
            code |= 16;
        }
        let above = self.leaf_level < self.levels();
        let upper = if above { self.upper } else { !NX };
        if upper & 1 == 0 || self.leaf & 1 == 0 {
            // A reserved bit of an entry above is found first.
            if above && upper & 1 != 0 && upper & NX != 0 && has_nx && !self.nxe {
                return Some(code | 9);
            }
            return Some(code);
        }
        let nx = has_nx && (upper | self.leaf) & NX != 0;
        if nx && !self.nxe {
            return Some(code | 9);
        }
        let user_page = upper & self.leaf & 4 != 0;
        let writable = upper & self.leaf & 2 != 0;
        let allowed = match (self.kind, self.user) {
            (Kind::Fetch, true) => user_page && !nx,
            (Kind::Fetch, false) => !(nx || self.smep && user_page),
            (kind, true) => user_page && (kind == Kind::Read || writable),
            (kind, false) => {
                let open = !(user_page && self.smap && !self.ac);
                open && (kind == Kind::Read || writable || !self.wp)
            }
        };
        (!allowed).then_some(code | 1)
    }
}

/// A guest whose own memory is the supervisor's, but for one page of user code.
fn guest(mode: Mode) -> Guest {
    let long = matches!(mode, Mode::Long | Mode::Long5);
    let mut g = if long {
        Guest::long(&[])
    } else {
        Guest::protected(&[])
    };
    if !long {
        g.put(TSS + 4, &(STACK as u32).to_le_bytes());
        g.put(TSS + 8, &0x10u32.to_le_bytes());
    } else {
        g.put64(TSS + 4, STACK);
    }
    // read: mov al, [edi]; write: mov [edi], al; fetch: jmp edi; each followed by ud2.
    for code in [CODE, USER_CODE] {
        g.put(code, &[0x8a, 0x07, 0x0f, 0x0b]);
        g.put(code + 16, &[0x88, 0x07, 0x0f, 0x0b]);
        g.put(code + 32, &[0xff, 0xe7]);
    }
    g.put(DATA, &[0x0f, 0x0b]);
    if mode == Mode::Legacy {
        for i in 0..512u32 {
            let user = u32::from(u64::from(i) == USER_CODE >> 12) * 4;
            g.put(PT + 4 * u64::from(i), &(i << 12 | 3 | user).to_le_bytes());
        }
        g.put(PD, &(PT as u32 | 7).to_le_bytes());
    } else {
        for i in 0..512 {
            let user = u64::from(i == USER_CODE >> 12) * 4;
            g.put64(PT + 8 * i, i << 12 | 3 | user);
        }
        g.put64(PD, PT | 7);
        let present = if mode == Mode::Pae { 1 } else { 7 };
        g.put64(PDPT, PD | present);
    }
    // The fifth level, right behind the probed address's tables.
    g.put64(TABLES + 0x4000, PML4 | 7);
    g.cpu.s.gpr[gpr::RDI] = 0;
    g
}

/// Builds the way to the probed address; its linear address, and the leaf's place.
fn map(g: &Guest, case: &Case) -> (u64, u64) {
    let levels = case.levels();
    let shift = |level: usize| match (case.mode, level) {
        (Mode::Legacy, 2) => 22,
        (_, level) => 12 + 9 * (level - 1),
    };
    // Slot 1 of the highest table, slot 0 below, but for the page's own offset.
    let root = match case.mode {
        Mode::Legacy => PD,
        Mode::Pae => PDPT,
        Mode::Long => PML4,
        Mode::Long5 => TABLES + 0x4000,
    };
    let top = if case.mode == Mode::Pae { 3 } else { levels };
    let leaf_shift = shift(case.leaf_level);
    let page_mask = (1u64 << leaf_shift) - 1;
    let addr = 1u64 << shift(top) | DATA & page_mask;
    let mut table = root;
    let mut level = top;
    loop {
        let width = if case.mode == Mode::Legacy { 4 } else { 8 };
        let index = addr >> shift(level) & if width == 4 { 0x3ff } else { 0x1ff };
        let slot = table + index * width;
        let value = if level == case.leaf_level {
            let large = if level > 1 { LARGE } else { 0 };
            DATA & !page_mask | large | case.leaf
        } else {
            table = TABLES + (level as u64 - 2) * 0x1000;
            let flags = match () {
                () if case.mode == Mode::Pae && level == 3 => 1,
                () if level == case.upper_level => case.upper,
                () => 7,
            };
            table | flags
        };
        if width == 4 {
            g.put(slot, &(value as u32).to_le_bytes());
        } else {
            g.put64(slot, value);
        }
        if level == case.leaf_level {
            return (addr, slot);
        }
        level -= 1;
    }
}

/// Runs the access; its vector and error code.
fn run(g: &mut Guest, case: &Case, addr: u64) -> (u64, u64) {
    let long = matches!(case.mode, Mode::Long | Mode::Long5);
    let s = &mut g.cpu.s;
    s.halted = false;
    s.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | if case.wp { cr0::WP } else { 0 };
    s.cr4 = 0;
    for (on, bit) in [
        (case.smep, cr4::SMEP),
        (case.smap, cr4::SMAP),
        (case.mode != Mode::Legacy, cr4::PAE),
        (case.mode == Mode::Legacy, cr4::PSE),
        (case.mode == Mode::Long5, cr4::LA57),
    ] {
        if on {
            s.cr4 |= bit;
        }
    }
    s.efer = if case.nxe { efer::NXE } else { 0 };
    if long {
        s.efer |= efer::LME | efer::LMA;
    }
    s.cr3 = match case.mode {
        Mode::Legacy => PD,
        Mode::Pae => PDPT,
        Mode::Long => PML4,
        Mode::Long5 => TABLES + 0x4000,
    };
    let dpl = if case.user { 3 } else { 0 };
    let flat = |access: u32, selector: u16| Segment {
        base: 0,
        limit: u32::MAX,
        access: access | dpl << 5,
        selector: selector | dpl as u16,
    };
    s.cpl = dpl as u8;
    s.seg[seg::CS] = if long {
        flat(0xa09b, 8)
    } else {
        flat(0xc09b, 0x18)
    };
    for i in [seg::SS, seg::DS, seg::ES] {
        s.seg[i] = flat(0xc093, 0x10);
    }
    s.flags = 2 | if case.ac { rflags::AC } else { 0 };
    s.gpr[gpr::RSP] = STACK;
    // Data lie beside the code that is there to be fetched.
    s.gpr[gpr::RDI] = if case.kind == Kind::Fetch {
        addr
    } else {
        addr + BESIDE
    };
    s.rip = if case.user { USER_CODE } else { CODE }
        + match case.kind {
            Kind::Read => 0,
            Kind::Write => 16,
            Kind::Fetch => 32,
        };
    g.cpu.restore_pdptes();
    g.cpu.state_changed();
    g.halt();
    let sp = g.cpu.s.gpr[gpr::RSP];
    if long {
        (g.get64(sp), g.get64(sp + 8))
    } else {
        let both = g.get64(sp);
        (both & 0xffff_ffff, both >> 32)
    }
}

fn check(g: &mut Guest, case: &Case) {
    let (addr, leaf) = map(g, case);
    let (vector, code) = run(g, case, addr);
    let Some(expected) = case.expected() else {
        assert_eq!(vector, 6, "{case:x?}: code {code:#x}");
        let marks = if case.kind == Kind::Write { 0x60 } else { 0x20 };
        assert_eq!(g.get64(leaf) & 0x60, marks, "{case:x?}: accessed and dirty");
        return;
    };
    assert_eq!((vector, code), (14, expected), "{case:x?}");
    let at = if case.kind == Kind::Fetch { 0 } else { BESIDE };
    assert_eq!(g.cpu.s.cr2, addr + at, "{case:x?}");
    assert_eq!(g.get64(leaf) & 0x40, 0, "{case:x?}: dirty");
}

/// One case in this many; all of them in a soak.
fn stride() -> u64 {
    if std::env::var("VIREO_SOAK").is_ok_and(|v| v == "1") {
        1
    } else {
        11
    }
}

fn all(mode: Mode, leaf_level: usize) {
    let mut g = guest(mode);
    let stride = stride();
    let mut number = 0;
    let flags = |bits: u64| (bits & 7) | if bits & 8 != 0 { NX } else { 0 };
    let levels = match mode {
        Mode::Legacy | Mode::Pae => 2,
        Mode::Long => 4,
        Mode::Long5 => 5,
    };
    for leaf in 0..16 {
        for upper in 0..16 {
            if leaf_level == levels && upper != 7 {
                continue;
            }
            for bits in 0..64 {
                for kind in [Kind::Read, Kind::Write, Kind::Fetch] {
                    number += 1;
                    if number % stride != 0 {
                        continue;
                    }
                    let bit = |n: u32| bits >> n & 1 != 0;
                    let above = levels - leaf_level;
                    let case = Case {
                        mode,
                        leaf_level,
                        leaf: flags(leaf),
                        upper: flags(upper),
                        upper_level: leaf_level + 1 + (number as usize % above.max(1)),
                        kind,
                        user: bit(0),
                        wp: bit(1),
                        smep: bit(2),
                        smap: bit(3),
                        ac: bit(4),
                        nxe: bit(5),
                    };
                    // Outside of PAE entries have no bit 63.
                    if mode != Mode::Legacy || (case.leaf | case.upper) & NX == 0 {
                        check(&mut g, &case);
                    }
                }
            }
        }
    }
}

#[test]
fn pages_of_4_kib_in_long_mode() {
    all(Mode::Long, 1);
}

#[test]
fn pages_of_2_mib_in_long_mode() {
    all(Mode::Long, 2);
}

#[test]
fn pages_of_1_gib_in_long_mode() {
    all(Mode::Long, 3);
}

#[test]
fn pages_of_five_levels() {
    all(Mode::Long5, 1);
}

#[test]
fn pages_of_pae() {
    all(Mode::Pae, 1);
    all(Mode::Pae, 2);
}

#[test]
fn pages_of_32_bit_paging() {
    all(Mode::Legacy, 1);
    all(Mode::Legacy, 2);
}

#[test]
fn reserved_bits_of_large_pages_fault() {
    let base = Case {
        mode: Mode::Long,
        leaf_level: 2,
        leaf: 7,
        upper: 7,
        upper_level: 3,
        kind: Kind::Read,
        user: false,
        wp: true,
        smep: false,
        smap: false,
        ac: false,
        nxe: true,
    };
    for (leaf_level, bit) in [(2, 13), (2, 20), (3, 13), (3, 29), (1, 45), (2, 51)] {
        let mut g = guest(Mode::Long);
        let case = Case {
            leaf_level,
            leaf: 7 | 1 << bit,
            ..base
        };
        let (addr, _) = map(&g, &case);
        assert_eq!(
            run(&mut g, &case, addr),
            (14, 9),
            "level {leaf_level}, {bit}"
        );
    }
    // A large page at a level that has none.
    let mut g = guest(Mode::Long);
    let case = Case {
        upper: 7 | LARGE,
        upper_level: 4,
        ..base
    };
    let (addr, _) = map(&g, &case);
    assert_eq!(run(&mut g, &case, addr), (14, 9));
    // 32-bit paging: bit 21 of a 4 MiB page.
    let mut g = guest(Mode::Legacy);
    let case = Case {
        mode: Mode::Legacy,
        leaf: 7 | 1 << 21,
        ..base
    };
    let (addr, _) = map(&g, &case);
    assert_eq!(run(&mut g, &case, addr), (14, 9));
}

#[test]
fn a_4_mib_page_may_lie_beyond_4_gib() {
    // PSE-36: bits 13..20 of the entry are address bits 32..39. Nothing is there.
    let mut g = guest(Mode::Legacy);
    let case = Case {
        mode: Mode::Legacy,
        leaf_level: 2,
        leaf: 7 | 1 << 13,
        upper: 7,
        upper_level: 3,
        kind: Kind::Read,
        user: false,
        wp: true,
        smep: false,
        smap: false,
        ac: false,
        nxe: false,
    };
    let (addr, _) = map(&g, &case);
    assert_eq!(run(&mut g, &case, addr).0, 6);
    // A device answered.
    assert_eq!(g.rax() & 0xff, 0xa5);
}
