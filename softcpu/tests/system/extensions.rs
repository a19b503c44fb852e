//! Process-context identifiers, alignment checks, virtual-8086 extensions, 5-level addresses.

use softcpu::Exit;
use softcpu::state::{cr0, cr4, gpr, rflags, seg};

use crate::rig::{CODE, DATA, Guest, PD, PDPT, PML4, PT, STACK, TSS};

/// A second address space, the same as the first but for the page at `PROBE`.
const PML4_2: u64 = 0xb000;
const PROBE: u64 = 0x4_0000;

/// Two address spaces in which `PROBE` leads to pages that hold 1 and 2, with PCIDs on.
fn two_spaces(code: &[u8]) -> Guest {
    let mut g = Guest::long(code);
    for (from, to, next) in [
        (PML4, PML4_2, PML4_2 + 0x1000),
        (PDPT, PML4_2 + 0x1000, PML4_2 + 0x2000),
        (PD, PML4_2 + 0x2000, PML4_2 + 0x3000),
    ] {
        for i in 0..512 {
            g.put64(to + 8 * i, g.get64(from + 8 * i));
        }
        g.put64(to, next | 7);
    }
    for i in 0..512 {
        g.put64(PML4_2 + 0x3000 + 8 * i, g.get64(PT + 8 * i));
    }
    g.put64(PML4_2 + 0x3000 + 8 * (PROBE >> 12), 0x5_0000 | 7);
    g.put(PROBE, &[1]);
    g.put(0x5_0000, &[2]);
    g.put(0x5_1000, &[3]);
    g.cpu.s.cr4 |= cr4::PCIDE;
    g.cpu.s.cr3 = PML4 | 1;
    let s = &mut g.cpu.s;
    s.gpr[gpr::RDI] = PROBE;
    s.gpr[gpr::RBX] = PML4 | 1;
    s.gpr[gpr::RCX] = PML4_2 | 2;
    s.gpr[8] = PML4 | 1 | 1 << 63;
    s.gpr[9] = PML4_2 | 2 | 1 << 63;
    // Where the second space's entry is, and another page for it.
    s.gpr[gpr::RSI] = PML4_2 + 0x3000 + 8 * (PROBE >> 12);
    s.gpr[gpr::RDX] = 0x5_1000 | 7;
    g.cpu.state_changed();
    g
}

/// mov al, [rdi]; shl rax, 8
const LOOK: [u8; 6] = [0x8a, 0x07, 0x48, 0xc1, 0xe0, 0x08];
const TO_2: [u8; 3] = [0x0f, 0x22, 0xd9];
const TO_1_KEEP: [u8; 4] = [0x41, 0x0f, 0x22, 0xd8];
const TO_2_KEEP: [u8; 4] = [0x41, 0x0f, 0x22, 0xd9];
/// mov [rsi], rdx
const CHANGE: [u8; 3] = [0x48, 0x89, 0x16];

#[test]
fn every_address_space_has_its_own_translations() {
    let mut code = Vec::new();
    for part in [
        &LOOK[..],
        &TO_2,
        &LOOK,
        &TO_1_KEEP,
        &LOOK,
        &TO_2_KEEP,
        &LOOK,
        &[0xf4],
    ] {
        code.extend(part);
    }
    let mut g = two_spaces(&code);
    g.halt();
    assert_eq!(g.rax() >> 8, 0x0102_0102);
}

#[test]
fn a_load_of_cr3_without_bit_63_forgets_what_was_known() {
    let mut code = Vec::new();
    for part in [&TO_2[..], &LOOK, &TO_1_KEEP, &CHANGE, &TO_2, &LOOK, &[0xf4]] {
        code.extend(part);
    }
    let mut g = two_spaces(&code);
    g.halt();
    assert_eq!(g.rax() >> 8, 0x0203);
}

#[test]
fn invpcid_of_every_kind_reaches_an_address_space_that_is_not_running() {
    // 0: one address; 1: one space; 2: everything; 3: all but global pages.
    for kind in 0..4u8 {
        let mut code = Vec::new();
        // mov ebp, kind; invpcid rbp, [r10]
        let invpcid = [0xbd, kind, 0, 0, 0, 0x66, 0x41, 0x0f, 0x38, 0x82, 0x2a];
        for part in [
            &TO_2[..],
            &LOOK,
            &TO_1_KEEP,
            &CHANGE,
            &invpcid,
            &TO_2_KEEP,
            &LOOK,
            &[0xf4],
        ] {
            code.extend(part);
        }
        let mut g = two_spaces(&code);
        g.cpu.s.gpr[10] = DATA;
        g.put64(DATA, if kind < 2 { 2 } else { 0 });
        g.put64(DATA + 8, PROBE);
        g.halt();
        assert_eq!(g.rax() >> 8, 0x0203, "kind {kind}");
    }
}

#[test]
fn invlpg_of_a_global_page_reaches_all_address_spaces() {
    let mut code = Vec::new();
    // invlpg [rdi]
    for part in [
        &TO_2[..],
        &LOOK,
        &TO_1_KEEP,
        &CHANGE,
        &[0x0f, 0x01, 0x3f],
        &TO_2_KEEP,
        &LOOK,
        &[0xf4],
    ] {
        code.extend(part);
    }
    let mut g = two_spaces(&code);
    g.put64(PML4_2 + 0x3000 + 8 * (PROBE >> 12), 0x5_0000 | 0x107);
    g.halt();
    assert_eq!(g.rax() >> 8, 0x0203);
}

#[test]
fn code_of_another_address_space_is_noticed_when_written() {
    // The page with code at PROBE (space 2) is written through its own address in space 1.
    // space 2: call rdi; space 1: mov byte [r11], 7; space 2: call rdi
    let mut code = Vec::new();
    for part in [
        &TO_2[..],
        &[0xff, 0xd7],
        &TO_1_KEEP,
        &[0x41, 0xc6, 0x03, 7],
        &TO_2_KEEP,
        &[0xff, 0xd7, 0xf4],
    ] {
        code.extend(part);
    }
    let mut g = two_spaces(&code);
    // add r12d, 1; ret
    g.put(0x5_0000, &[0x41, 0x83, 0xc4, 0x01, 0xc3]);
    g.cpu.s.gpr[11] = 0x5_0003;
    g.halt();
    assert_eq!(g.cpu.s.gpr[12], 8);
}

#[test]
fn identifiers_can_only_be_switched_on_and_off_in_order() {
    // mov cr4, rax with PCIDE while CR3 has low bits: #GP
    let mut g = Guest::long(&[0x0f, 0x22, 0xe0]);
    g.cpu.s.cr3 |= 0x18;
    g.cpu.s.gpr[gpr::RAX] = g.cpu.s.cr4 | cr4::PCIDE;
    g.cpu.state_changed();
    assert_eq!(g.exception().vector, 13);
    // And paging cannot be switched off with it.
    let mut g = two_spaces(&[0x0f, 0x22, 0xc0]);
    g.cpu.s.gpr[gpr::RAX] = g.cpu.s.cr0 & !cr0::PG;
    assert_eq!(g.exception().vector, 13);
    // INVPCID of an identifier while there are none: #GP; of a fourth kind likewise.
    for (kind, pcid, on) in [(1, 1, false), (4, 0, true), (1, 0x1000, true)] {
        let mut g = two_spaces(&[0x66, 0x0f, 0x38, 0x82, 0x01]);
        if !on {
            g.cpu.s.cr4 &= !cr4::PCIDE;
            g.cpu.s.cr3 = PML4;
            g.cpu.state_changed();
        }
        g.cpu.s.gpr[gpr::RCX] = DATA;
        g.cpu.s.gpr[gpr::RAX] = kind;
        g.put64(DATA, pcid);
        assert_eq!(g.exception().vector, 13, "{kind} {pcid}");
    }
}

/// In user mode at DATA with `flags`.
fn user(code: &[u8], flags: u64) -> Guest {
    let mut g = Guest::long(&[0x48, 0xcf]);
    g.put(DATA, code);
    g.cpu.s.cr0 |= cr0::AM;
    g.cpu.s.gpr[gpr::RSP] = STACK - 40;
    for (i, value) in [DATA, 0x23, flags, STACK - 0x100, 0x2b]
        .into_iter()
        .enumerate()
    {
        g.put64(STACK - 40 + 8 * i as u64, value);
    }
    g
}

#[test]
fn alignment_is_checked_for_user_programs_that_ask_for_it() {
    // mov eax, [rdi]
    let code = &[0x8b, 0x07];
    for (offset, flags, am, vector) in [
        (1, rflags::AC, true, 17),
        (0, rflags::AC, true, 6),
        (1, 0, true, 6),
        (1, rflags::AC, false, 6),
    ] {
        let mut g = user(&[code, &[0x0f, 0x0b][..]].concat(), flags | 2);
        if !am {
            g.cpu.s.cr0 &= !cr0::AM;
        }
        g.cpu.s.gpr[gpr::RDI] = 0x4_0000 + offset;
        let seen = g.exception();
        assert_eq!(
            (seen.vector, seen.code),
            (vector, 0),
            "{offset} {flags:#x} {am}"
        );
    }
}

#[test]
fn the_kernel_itself_need_not_align() {
    let mut g = Guest::long(&[0x8b, 0x07, 0xf4]);
    g.cpu.s.cr0 |= cr0::AM;
    g.cpu.s.flags |= rflags::AC;
    g.cpu.s.gpr[gpr::RDI] = 0x4_0001;
    g.cpu.state_changed();
    g.halt();
    assert_eq!(g.cpu.s.rip, CODE + 3);
}

/// Virtual-8086 code at 3000:0, IOPL 0, extensions on; its HLT ends in the monitor's #GP.
fn v86(code: &[u8], flags: u64) -> Guest {
    let mut g = Guest::protected(&[0xcf]);
    g.put(DATA, code);
    g.cpu.s.cr4 |= cr4::VME;
    let frame = [0, 0x3000, 0x2_0002 | flags, 0x1000, 0x3000, 1, 2, 3, 4];
    let sp = STACK - 4 * frame.len() as u64;
    for (i, value) in frame.into_iter().enumerate() {
        g.put(sp + 4 * i as u64, &(value as u32).to_le_bytes());
    }
    g.cpu.s.gpr[gpr::RSP] = sp;
    g.put(TSS + 4, &(STACK as u32 + 0x2000).to_le_bytes());
    g.put(TSS + 8, &0x10u32.to_le_bytes());
    // The I/O map begins at 0x88, the redirection map right before it: all to the program.
    g.put(TSS + 102, &[0x88, 0]);
    g.put(TSS + 0x68, &[0; 32]);
    g.cpu.s.tr.limit = 0x8fff;
    g.cpu.state_changed();
    g
}

/// What the monitor sees: vector, error code, EIP, EFLAGS.
fn monitor(g: &mut Guest) -> (u64, u64, u64, u64) {
    g.halt();
    let sp = g.cpu.s.gpr[gpr::RSP];
    let word = |i: u64| g.get64(sp + 4 * i) & 0xffff_ffff;
    (word(0), word(1), word(2), word(4))
}

#[test]
fn virtual_8086_programs_have_an_interrupt_flag_of_their_own() {
    // sti; pushf; cli; hlt
    let mut g = v86(&[0xfb, 0x9c, 0xfa, 0xf4], 0);
    let (vector, code, ip, flags) = monitor(&mut g);
    assert_eq!((vector, code, ip), (13, 0, 3));
    assert_eq!(flags & (rflags::VIF | rflags::IF), 0);
    // PUSHF showed IF and IOPL 3.
    assert_eq!(g.get64(0x3_0ffe) & 0x3200, 0x3200);
    // STI with an interrupt waiting goes to the monitor.
    let mut g = v86(&[0xfb, 0xf4], rflags::VIP);
    assert_eq!(monitor(&mut g).2, 0);
    // POPF: VIF from IF. (mov ax, 0x200; push ax; popf; hlt)
    let mut g = v86(&[0xb8, 0, 2, 0x50, 0x9d, 0xf4], 0);
    let (_, _, ip, flags) = monitor(&mut g);
    assert_eq!(ip, 5);
    assert_eq!(flags & (rflags::VIF | rflags::IF), rflags::VIF);
    // Without the extensions it is the monitor's.
    let mut g = v86(&[0xfb, 0xf4], 0);
    g.cpu.s.cr4 &= !cr4::VME;
    assert_eq!(monitor(&mut g).2, 0);
}

#[test]
fn interrupts_of_virtual_8086_programs_are_redirected_by_the_map() {
    // int 0x20; hlt: the handler at 3000:0010 is mov bl, 9; iret
    let code = [0xcd, 0x20, 0xf4];
    let mut g = v86(&code, rflags::VIF);
    g.put(DATA + 0x10, &[0xb3, 9, 0xcf]);
    g.put(4 * 0x20, &[0x10, 0, 0, 0x30]);
    let (_, _, ip, flags) = monitor(&mut g);
    assert_eq!((ip, g.cpu.s.gpr[gpr::RBX] & 0xff), (2, 9));
    assert_ne!(flags & rflags::VIF, 0);
    // Its bit set: to the monitor.
    let mut g = v86(&code, 0);
    g.put(TSS + 0x68 + 4, &[1]);
    assert_eq!((monitor(&mut g).0, monitor_ip(&g)), (13, 0));
}

fn monitor_ip(g: &Guest) -> u64 {
    g.get64(g.cpu.s.gpr[gpr::RSP] + 8) & 0xffff_ffff
}

#[test]
fn protected_mode_programs_have_one_too_where_asked_for() {
    for (pvi, vector) in [(true, 6), (false, 13)] {
        // In ring 3: sti; ud2
        let mut g = Guest::protected(&[0xfb, 0x0f, 0x0b]);
        g.put(TSS + 4, &(STACK as u32).to_le_bytes());
        g.put(TSS + 8, &0x10u32.to_le_bytes());
        let s = &mut g.cpu.s;
        s.cr4 |= if pvi { cr4::PVI } else { 0 };
        s.cpl = 3;
        for segment in &mut s.seg {
            segment.access |= 0x60;
            segment.selector |= 3;
        }
        g.cpu.state_changed();
        g.halt();
        let sp = g.cpu.s.gpr[gpr::RSP];
        assert_eq!(g.get64(sp) & 0xffff_ffff, vector);
        let flags = g.get64(sp + 16) & 0xffff_ffff;
        assert_eq!(flags & rflags::VIF != 0, pvi);
    }
}

#[test]
fn five_levels_widen_addresses_and_four_do_not() {
    // mov al, [rdi]
    let wide = 1 << 50;
    let mut g = Guest::long(&[0x8a, 0x07]);
    g.cpu.s.gpr[gpr::RDI] = wide;
    assert_eq!(g.exception().vector, 13);
    let mut g = Guest::long(&[0x8a, 0x07]);
    g.put64(0xb000, PML4 | 7);
    g.cpu.s.cr3 = 0xb000;
    g.cpu.s.cr4 |= cr4::LA57;
    g.cpu.s.gpr[gpr::RDI] = wide;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.code), (14, 0));
    assert_eq!(g.cpu.s.cr2, wide);
    // It cannot be changed while in long mode.
    let mut g = Guest::long(&[0x0f, 0x22, 0xe0]);
    g.cpu.s.gpr[gpr::RAX] = g.cpu.s.cr4 | cr4::LA57;
    assert_eq!(g.exception().vector, 13);
}

#[test]
fn code_ends_with_its_segment_even_when_it_ran_beyond_before() {
    // The same bytes first in a segment of 64 KiB, then in one that ends within them.
    let mut g = Guest::protected(&[0x90, 0x90, 0x90, 0x90, 0xf4]);
    g.cpu.s.seg[seg::CS].base = 0x1_0000;
    g.cpu.s.seg[seg::CS].limit = 0xffff;
    g.cpu.s.rip = 0;
    g.cpu.state_changed();
    g.halt();
    assert_eq!(g.cpu.s.rip, 5);
    g.cpu.s.seg[seg::CS].limit = 2;
    g.cpu.s.rip = 0;
    g.cpu.s.halted = false;
    g.cpu.state_changed();
    assert_eq!(g.run(), Exit::DeadHalt);
    let sp = g.cpu.s.gpr[gpr::RSP];
    assert_eq!(g.get64(sp) & 0xffff_ffff, 13);
    assert_eq!(g.get64(sp + 8) & 0xffff_ffff, 3);
}
