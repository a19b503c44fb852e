//! Every exception with its error code; which of several comes; stacks; interrupt shadows.

use softcpu::state::{cr0, cr4, gpr, rflags, seg};

use crate::rig::{CODE, DATA, Guest, IDT, PT, STACK, Seen, TSS};

fn seen(vector: u64, code: u64, rip: u64) -> Seen {
    Seen { vector, code, rip }
}

#[test]
fn every_exception_has_its_vector_and_code() {
    type Prepare = fn(&mut Guest);
    let nothing: Prepare = |_| {};
    let cases: [(&[u8], Prepare, u64, u64, u64); 16] = [
        (&[0xf7, 0xf1], |g| g.cpu.s.gpr[gpr::RCX] = 0, 0, 0, 0),
        (&[0xf1], nothing, 1, 0, 1),
        (&[0xcc], nothing, 3, 0, 1),
        (&[0x0f, 0x0b], nothing, 6, 0, 0),
        // LOCK where it may not be.
        (&[0xf0, 0x90], nothing, 6, 0, 0),
        (&[0xd9, 0xe8], |g| g.cpu.s.cr0 |= cr0::TS, 7, 0, 0),
        // lldt of a selector beyond the table
        (
            &[0x0f, 0x00, 0xd0],
            |g| g.cpu.s.gpr[0] = 0x1230,
            13,
            0x1230,
            0,
        ),
        // mov ss, ax: a code segment
        (&[0x8e, 0xd0], |g| g.cpu.s.gpr[0] = 8, 13, 8, 0),
        // mov ds, ax: not present
        (
            &[0x8e, 0xd8],
            |g| {
                g.put64(0x800 + 0x30, 0x0040_1300_0000_00ff);
                g.cpu.s.gpr[0] = 0x30;
            },
            11,
            0x30,
            0,
        ),
        // mov ss, ax: not present
        (
            &[0x8e, 0xd0],
            |g| {
                g.put64(0x800 + 0x30, 0x0040_1300_0000_00ff);
                g.cpu.s.gpr[0] = 0x30;
            },
            12,
            0x30,
            0,
        ),
        // push at an address that is none
        (&[0x50], |g| g.cpu.s.gpr[gpr::RSP] = 1 << 63, 8, 0, 0),
        // wrmsr of nothing; of EFER with bits that are none
        (
            &[0x0f, 0x30],
            |g| g.cpu.s.gpr[gpr::RCX] = 0x1234_5678,
            13,
            0,
            0,
        ),
        (
            &[0x0f, 0x32],
            |g| g.cpu.s.gpr[gpr::RCX] = 0x1234_5678,
            13,
            0,
            0,
        ),
        // int 0x80 beyond what the gate allows is #GP with the entry
        (
            &[0xcd, 0xff],
            |g| g.cpu.s.idtr.limit = 0x1ff,
            13,
            0xff << 3 | 2,
            0,
        ),
        // movaps of a misaligned operand
        (
            &[0x0f, 0x28, 0x07],
            |g| {
                g.cpu.s.cr4 |= cr4::OSFXSR;
                g.cpu.s.gpr[gpr::RDI] = DATA + 8;
            },
            13,
            0,
            0,
        ),
        // the same while the unit is switched off: that first
        (
            &[0x0f, 0x28, 0x07],
            |g| {
                g.cpu.s.cr4 |= cr4::OSFXSR;
                g.cpu.s.cr0 |= cr0::TS;
                g.cpu.s.gpr[gpr::RDI] = DATA + 8;
            },
            7,
            0,
            0,
        ),
    ];
    for (i, (code, prepare, vector, error, offset)) in cases.into_iter().enumerate() {
        let mut g = Guest::long(code);
        prepare(&mut g);
        // #DF must find a stack.
        g.put64(TSS + 36, STACK + 0x1000);
        let gate = g.get64(IDT + 16 * 8);
        g.put64(IDT + 16 * 8, gate | 1 << 32);
        g.cpu.state_changed();
        assert_eq!(
            g.exception(),
            seen(vector, error, CODE + offset),
            "case {i}"
        );
    }
}

#[test]
fn floating_point_exceptions_are_told_as_they_are_unmasked() {
    // fld1; fldz; fdivp; fwait with division by zero unmasked
    let mut g = Guest::long(&[0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0x9b]);
    g.cpu.s.cr4 |= cr4::OSFXSR;
    g.cpu.s.fp.legacy[..2].copy_from_slice(&0x37b_u16.to_le_bytes());
    g.cpu.s.fp.legacy[4] = 0;
    g.cpu.state_changed();
    assert_eq!(g.exception(), seen(16, 0, CODE + 6));
    // divps by zero: #XM, or #UD where the system hasn't said that it takes it.
    for (os, vector) in [(true, 19), (false, 6)] {
        let mut g = Guest::long(&[0x0f, 0x5e, 0xc1]);
        g.cpu.s.cr4 |= cr4::OSFXSR | if os { cr4::OSXMMEXCPT } else { 0 };
        g.cpu.s.fp.set_mxcsr(0x1f80 & !0x280);
        g.cpu.s.fp.legacy[160..164].copy_from_slice(&1f32.to_le_bytes());
        g.cpu.state_changed();
        assert_eq!(g.exception(), seen(vector, 0, CODE));
    }
}

#[test]
fn a_gate_may_name_a_stack() {
    for ist in 1..8 {
        let mut g = Guest::long(&[0x0f, 0x0b]);
        let gate = g.get64(IDT + 16 * 6);
        g.put64(IDT + 16 * 6, gate | ist << 32);
        let top = STACK + 0x1000 + 0x100 * ist + 8;
        g.put64(TSS + 28 + 8 * ist, top);
        let seen = g.exception();
        assert_eq!(seen.vector, 6);
        // Aligned down to 16, five words of a frame, and two of the stub.
        assert_eq!(g.cpu.s.gpr[gpr::RSP], (top & !15) - 56, "IST {ist}");
    }
}

#[test]
fn an_error_on_the_way_to_a_handler_says_whether_a_program_asked() {
    // ud2 whose gate is not present: EXT is set; int 6: not.
    for (code, ext) in [(&[0x0f, 0x0b][..], 1), (&[0xcd, 6], 0)] {
        let mut g = Guest::long(code);
        let gate = g.get64(IDT + 16 * 6);
        g.put64(IDT + 16 * 6, gate & !(1 << 47));
        assert_eq!(g.exception(), seen(11, 6 << 3 | 2 | ext, CODE), "{code:x?}");
        // The same with a code segment that is none.
        let mut g = Guest::long(code);
        g.put64(IDT + 16 * 6, gate & !0xffff_0000 | 0x10 << 16);
        assert_eq!(g.exception(), seen(13, 0x10 | ext, CODE), "{code:x?}");
    }
}

#[test]
fn an_instruction_of_more_than_15_bytes_is_a_general_protection_fault() {
    let mut code = vec![0x66; 15];
    code.extend([0x90, 0xf4]);
    let mut g = Guest::long(&code);
    assert_eq!(g.exception(), seen(13, 0, CODE));
    let mut g = Guest::long(&code[1..]);
    g.halt();
    // At the end of a page, with another behind it.
    let start = 0x4_1000 - 15;
    for (len, vector) in [(15, 13), (14, 0)] {
        let mut g = Guest::long(&[0xff, 0xe7]);
        let mut code = vec![0x66; len];
        code.extend([0x90, 0xf4]);
        g.put(start, &code);
        g.cpu.s.gpr[gpr::RDI] = start;
        if vector == 0 {
            g.halt();
            assert_eq!(g.cpu.s.rip, start + 16);
        } else {
            assert_eq!(g.exception(), seen(vector, 0, start));
        }
    }
    // And where the next page is missing: it doesn't get that far.
    let mut g = Guest::long(&[0xff, 0xe7]);
    g.put(start, &[0x66; 15]);
    g.put64(PT + 8 * 0x41, 0);
    g.cpu.s.gpr[gpr::RDI] = start;
    let at_end = g.exception();
    assert!(
        at_end == seen(13, 0, start) || at_end == seen(14, 0x10, start),
        "{at_end:x?}"
    );
}

#[test]
fn exchanges_with_r8_are_no_pause() {
    // f3 41 90: xchg r8d, eax; f3 49 90: xchg r8, rax; f3 90: pause
    for (code, wide) in [
        (&[0xf3, 0x41, 0x90, 0xf4][..], false),
        (&[0xf3, 0x49, 0x90, 0xf4], true),
    ] {
        let mut g = Guest::long(code);
        g.cpu.s.gpr[0] = 0x1111_2222_3333_4444;
        g.cpu.s.gpr[8] = 0x5555_6666_7777_8888;
        g.halt();
        let expected = if wide {
            0x5555_6666_7777_8888
        } else {
            0x7777_8888
        };
        assert_eq!(g.rax(), expected);
    }
}

#[test]
fn hints_of_what_is_not_there_do_nothing() {
    // rdsspq rax (libgcc asks always); wbnoinvd is wbinvd; endbr64; bnd forms are nops
    let mut g = Guest::long(&[
        0x31, 0xc0, 0xf3, 0x48, 0x0f, 0x1e, 0xc8, 0xf3, 0x0f, 0x09, 0xf3, 0x0f, 0x1e, 0xfa, 0x0f,
        0x1a, 0xc0, 0xf4,
    ]);
    g.halt();
    assert_eq!(g.rax(), 0);
    assert_eq!(g.cpu.s.rip, CODE + 18);
}

#[test]
fn a_far_call_through_a_gate_changes_stack_and_privilege() {
    // A 64-bit call gate at 0x50 to CODE + 0x100, from ring 3 with the stack of the TSS.
    let mut g = Guest::long(&[0x48, 0xcf]);
    let target = CODE + 0x100;
    g.put(target, &[0xf4]);
    // call far [rdi]
    g.put(DATA, &[0xff, 0x1f]);
    g.put(DATA + 0x100, &[0, 0, 0, 0, 0x53, 0]);
    let gate = target & 0xffff | 8 << 16 | 0xec00 << 32 | (target >> 16) << 48;
    g.put64(0x800 + 0x50, gate);
    g.put64(0x800 + 0x58, 0);
    g.cpu.s.gdtr.limit = 0x5f;
    g.cpu.s.gpr[gpr::RDI] = DATA + 0x100;
    g.cpu.s.gpr[gpr::RSP] = STACK - 40;
    for (i, value) in [DATA, 0x23, 2, STACK - 0x100, 0x2b].into_iter().enumerate() {
        g.put64(STACK - 40 + 8 * i as u64, value);
    }
    g.halt();
    assert_eq!(g.cpu.s.rip, target + 1);
    assert_eq!((g.cpu.s.cpl, g.cpu.s.seg[seg::SS].selector), (0, 0));
    let sp = g.cpu.s.gpr[gpr::RSP];
    let frame: Vec<u64> = (0..4).map(|i| g.get64(sp + 8 * i)).collect();
    assert_eq!(frame, [DATA + 2, 0x23, STACK - 0x100, 0x2b]);
}

#[test]
fn a_move_to_ss_holds_interrupts_off_for_one_instruction() {
    // sti; nop; mov ss, ax; mov al, 1 (interrupt here at the earliest); hlt
    let mut g = Guest::long(&[0x8e, 0xd0, 0xb0, 1, 0xf4]);
    g.put64(IDT + 16 * 0x41, g.get64(IDT + 16 * 3));
    g.cpu.apic.mmio_write(0xf0, 0x1ff);
    g.cpu.s.gpr[0] = 0x10;
    g.cpu.s.flags |= rflags::IF;
    g.cpu.s.shadow = true;
    g.cpu.s.shadow_rip = CODE;
    g.cpu.apic.mmio_write(0x300, 0x4_4041);
    g.cpu.state_changed();
    g.cpu.s.shadow = true;
    g.halt();
    assert_eq!(g.get64(g.cpu.s.gpr[gpr::RSP] + 16), CODE + 4);
}
