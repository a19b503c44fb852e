//! The system side of the processor, seen from guests of a few bytes: paging, exceptions,
//! self-modifying code, debug registers, segments, tasks.

mod debug;
mod exceptions;
mod extensions;
mod features;
mod kick;
mod paging;
mod rig;
mod smp;

use rig::{CODE, DATA, Guest, PT, STACK, Seen, TSS};
use softcpu::Exit;
use softcpu::state::{gpr, rflags, seg};

#[test]
fn code_that_rewrites_the_next_instruction_runs_the_new_one() {
    // mov byte [rip+2], 0x22 (the immediate of the next); mov al, 0x11; hlt
    let mut g = Guest::long(&[0xc6, 0x05, 0x01, 0, 0, 0, 0x22, 0xb0, 0x11, 0xf4]);
    g.halt();
    assert_eq!(g.rax() & 0xff, 0x22);
}

#[test]
fn code_rewritten_through_another_mapping_is_decoded_anew() {
    // call f; mov byte [rdi], 2; call f; hlt; f: mov al, 1; add bl, al; ret
    let mut g = Guest::long(&[
        0xe8, 0x09, 0, 0, 0, 0xc6, 0x07, 2, 0xe8, 0x01, 0, 0, 0, 0xf4, 0xb0, 1, 0, 0xc3, 0xc3,
    ]);
    // The page of the code appears once more at DATA.
    g.put64(PT + 8 * (DATA >> 12), CODE | 7);
    g.cpu.s.gpr[gpr::RDI] = DATA + 15;
    g.cpu.s.gpr[gpr::RBX] = 0;
    g.halt();
    assert_eq!(g.cpu.s.gpr[gpr::RBX], 3);
}

#[test]
fn a_loop_that_patches_itself_ten_thousand_times_counts_right() {
    // mov ecx, 10000; xor ebx, ebx
    // l: mov [rip+imm], cl; add ebx, imm8 (sign-extended); dec ecx; jnz l; hlt
    let mut g = Guest::long(&[
        0xb9, 0x10, 0x27, 0, 0, 0x31, 0xdb, 0x88, 0x0d, 0x02, 0, 0, 0, 0x83, 0xc3, 0, 0xff, 0xc9,
        0x75, 0xf3, 0xf4,
    ]);
    g.halt();
    let expected = (1..=10_000i64).map(|i| i64::from(i as i8)).sum::<i64>() as u32;
    assert_eq!(g.cpu.s.gpr[gpr::RBX] as u32, expected);
}

#[test]
fn page_faults_tell_what_was_wrong() {
    let addr = 0x4_0000;
    let entry = PT + 8 * (addr >> 12);
    let write: &[u8] = &[0xc6, 0x07, 1];
    let read: &[u8] = &[0x8a, 0x07];
    let jump: &[u8] = &[0xff, 0xe7];
    for (flags, code, expected) in [
        (0, read, 0),
        (0, write, 2),
        (1, write, 3),
        (0x8000_0000_0000_0003, jump, 0x11),
        (1 << 51 | 7, read, 9),
        (0, jump, 0x10),
    ] {
        let mut g = Guest::long(code);
        g.put64(entry, addr | flags);
        g.cpu.s.gpr[gpr::RDI] = addr;
        let seen = g.exception();
        assert_eq!(
            (seen.vector, seen.code),
            (14, expected),
            "{flags:#x} {code:x?}"
        );
        assert_eq!(seen.rip, if code == jump { addr } else { CODE });
        assert_eq!(g.cpu.s.cr2, addr);
    }
}

/// iretq to user mode at DATA, where `code` is put.
fn user(code: &[u8]) -> Guest {
    let mut g = Guest::long(&[0x48, 0xcf]);
    g.put(DATA, code);
    g.cpu.s.gpr[gpr::RSP] = STACK - 40;
    for (i, value) in [DATA, 0x23, 2, STACK - 0x100, 0x2b].into_iter().enumerate() {
        g.put64(STACK - 40 + 8 * i as u64, value);
    }
    g
}

#[test]
fn user_mode_may_not_touch_supervisor_pages_nor_privileged_instructions() {
    let addr = 0x4_0000;
    let mut g = user(&[0x8a, 0x07]);
    g.put64(PT + 8 * (addr >> 12), addr | 3);
    g.cpu.s.gpr[gpr::RDI] = addr;
    let seen = g.exception();
    assert_eq!((seen.vector, seen.code, seen.rip), (14, 5, DATA));
    // It came in on the stack of the TSS.
    assert_eq!(g.cpu.s.gpr[gpr::RSP], STACK + 0x2000 - 56);
    for code in [
        &[0xf4][..],
        &[0xfa],
        &[0x0f, 0x22, 0xd8],
        &[0xe6, 0x10],
        &[0x0f, 0x30],
    ] {
        let seen = user(code).exception();
        assert_eq!(
            (seen.vector, seen.code, seen.rip),
            (13, 0, DATA),
            "{code:x?}"
        );
    }
}

#[test]
fn smap_and_smep_keep_the_supervisor_out_of_user_pages() {
    let addr = 0x4_0000;
    // With SMAP all of the guest's own pages but the probed one are supervisor pages.
    let build = |code: &[u8]| {
        let mut g = Guest::long(code);
        for i in 0..512 {
            g.put64(PT + 8 * i, i << 12 | 3);
        }
        g.put64(PT + 8 * (addr >> 12), addr | 7);
        g.cpu.s.cr4 |= 1 << 20 | 1 << 21;
        g.cpu.s.gpr[gpr::RDI] = addr;
        g.cpu.state_changed();
        g
    };
    let seen = build(&[0x8a, 0x07]).exception();
    assert_eq!((seen.vector, seen.code), (14, 1));
    // stac; mov al, [rdi]; clac; mov al, [rdi]
    let seen = build(&[0x0f, 0x01, 0xcb, 0x8a, 0x07, 0x0f, 0x01, 0xca, 0x8a, 0x07]).exception();
    assert_eq!((seen.vector, seen.rip), (14, CODE + 8));
    let seen = build(&[0xff, 0xe7]).exception();
    assert_eq!((seen.vector, seen.code, seen.rip), (14, 0x11, addr));
}

#[test]
fn accessed_and_dirty_bits_are_set_when_due() {
    let addr = 0x4_0000;
    let entry = PT + 8 * (addr >> 12);
    // mov al, [rdi]; hlt; mov [rdi], al; hlt
    let mut g = Guest::long(&[0x8a, 0x07, 0xf4, 0x88, 0x07, 0xf4]);
    g.cpu.s.gpr[gpr::RDI] = addr;
    g.halt();
    assert_eq!(g.get64(entry) & 0x60, 0x20);
    g.cpu.s.halted = false;
    g.halt();
    assert_eq!(g.get64(entry) & 0x60, 0x60);
}

#[test]
fn invlpg_makes_a_changed_mapping_seen() {
    let (addr, entry) = (0x4_0000u64, PT + 8 * 0x40);
    // mov al, [rdi]; mov [rsi], rdx; invlpg [rdi]; mov ah, [rdi]; hlt
    let mut g = Guest::long(&[
        0x8a, 0x07, 0x48, 0x89, 0x16, 0x0f, 0x01, 0x3f, 0x8a, 0x27, 0xf4,
    ]);
    g.put(addr, &[1]);
    g.put(0x5_0000, &[2]);
    g.cpu.s.gpr[gpr::RDI] = addr;
    g.cpu.s.gpr[gpr::RSI] = entry;
    g.cpu.s.gpr[gpr::RDX] = 0x5_0000 | 7;
    g.halt();
    assert_eq!(g.rax() & 0xffff, 0x201);
}

#[test]
fn an_access_over_a_page_end_is_all_or_nothing() {
    let addr = 0x4_0ffc;
    let mut g = Guest::long(&[0x48, 0x89, 0x07]);
    g.put64(PT + 8 * 0x41, 0);
    g.cpu.s.gpr[gpr::RDI] = addr;
    g.cpu.s.gpr[gpr::RAX] = u64::MAX;
    let seen = g.exception();
    assert_eq!((seen.vector, seen.code, seen.rip), (14, 2, CODE));
    assert_eq!(g.cpu.s.cr2, 0x4_1000);
    assert_eq!(g.get64(addr - 4), 0);
}

#[test]
fn an_instruction_over_a_page_end_runs_and_faults_by_its_second_page() {
    let start = 0x4_0ffe;
    let code = [0x48, 0xc7, 0xc0, 0x2a, 0, 0, 0, 0xf4]; // mov rax, 42; hlt
    let mut g = Guest::long(&[0xff, 0xe7]);
    g.put(start, &code);
    g.cpu.s.gpr[gpr::RDI] = start;
    g.halt();
    assert_eq!(g.rax(), 42);
    let mut g = Guest::long(&[0xff, 0xe7]);
    g.put(start, &code);
    g.put64(PT + 8 * 0x41, 0);
    g.cpu.s.gpr[gpr::RDI] = start;
    let seen = g.exception();
    assert_eq!((seen.vector, seen.code, seen.rip), (14, 0x10, start));
    assert_eq!(g.cpu.s.cr2, 0x4_1000);
}

#[test]
fn addresses_that_are_not_canonical_are_general_or_stack_faults() {
    let bad = 0x8000_0000_0000;
    let mut g = Guest::long(&[0x8a, 0x07]);
    g.cpu.s.gpr[gpr::RDI] = bad;
    assert_eq!(g.exception().vector, 13);
    let mut g = Guest::long(&[0x8a, 0x45, 0]);
    g.cpu.s.gpr[gpr::RBP] = bad;
    assert_eq!(g.exception().vector, 12);
    let mut g = Guest::long(&[0xff, 0xe7]);
    g.cpu.s.gpr[gpr::RDI] = bad;
    assert_eq!(
        g.exception(),
        Seen {
            vector: 13,
            code: 0,
            rip: CODE
        }
    );
}

#[test]
fn single_step_traps_after_each_instruction() {
    // nop; nop; hlt with TF set: the trap comes after the first.
    let mut g = Guest::long(&[0x90, 0x90, 0xf4]);
    g.cpu.s.flags |= rflags::TF;
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (1, CODE + 1));
    assert_eq!(g.cpu.s.dr6 & 0x400f, 0x4000);
}

#[test]
fn a_data_breakpoint_traps_after_the_access() {
    // mov al, [rdi]; mov [rdi], al; nop; hlt
    let mut g = Guest::long(&[0x8a, 0x07, 0x88, 0x07, 0x90, 0xf4]);
    g.cpu.s.gpr[gpr::RDI] = DATA + 2;
    g.cpu.s.dr[1] = DATA;
    g.cpu.s.dr7 = 0x400 | 1 << 3 | 0b1101 << 20; // DR1: writes, 4 bytes
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (1, CODE + 4));
    assert_eq!(g.cpu.s.dr6 & 0xf, 2);
}

#[test]
fn an_instruction_breakpoint_faults_before_it_unless_resumed() {
    let mut g = Guest::long(&[0x90, 0xb0, 7, 0xf4]);
    g.cpu.s.dr[0] = CODE + 1;
    g.cpu.s.dr7 = 0x402;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (1, CODE + 1));
    assert_eq!(g.cpu.s.dr6 & 0xf, 1);
    let mut g = Guest::long(&[0xb0, 7, 0xf4]);
    g.cpu.s.dr[0] = CODE;
    g.cpu.s.dr7 = 0x402;
    g.cpu.s.flags |= rflags::RF;
    g.cpu.state_changed();
    g.halt();
    assert_eq!(g.rax() & 0xff, 7);
}

#[test]
fn a_debugger_steps_and_stops_without_the_guest_noticing() {
    let mut g = Guest::long(&[0x90, 0x90, 0x90, 0xf4]);
    g.cpu.set_debug(softcpu::DebugRequest {
        single_step: false,
        breakpoints: vec![CODE + 2],
        ..softcpu::DebugRequest::default()
    });
    assert_eq!(g.run(), Exit::Debug { watch: None });
    assert_eq!(g.cpu.s.rip, CODE + 2);
    g.cpu.set_debug(softcpu::DebugRequest {
        single_step: true,
        breakpoints: vec![],
        ..softcpu::DebugRequest::default()
    });
    assert_eq!(g.run(), Exit::Debug { watch: None });
    assert_eq!(g.cpu.s.rip, CODE + 3);
}

#[test]
fn a_device_that_stops_the_machine_stops_it_after_the_instruction() {
    // mov [rdi], al; inc rbx; hlt
    let mut g = Guest::long(&[0x88, 0x07, 0x48, 0xff, 0xc3, 0xf4]);
    g.cpu.s.gpr[gpr::RDI] = 0xf000_0000;
    assert_eq!(g.run(), Exit::Stopped);
    assert_eq!((g.cpu.s.rip, g.cpu.s.gpr[gpr::RBX]), (CODE + 2, 0));
}

#[test]
fn faults_while_delivering_faults_end_in_a_double_then_a_triple_fault() {
    // ud2 without a gate for #UD: a #GP on top of a benign fault is delivered as itself.
    let mut g = Guest::long(&[0x0f, 0x0b]);
    g.put64(0x4000 + 16 * 6, 0);
    assert_eq!(g.exception().vector, 13);
    // And without one for #GP: contributory twice, so a double fault.
    let mut g = Guest::long(&[0x0f, 0x0b]);
    g.put64(0x4000 + 16 * 6, 0);
    g.put64(0x4000 + 16 * 13, 0);
    let seen = g.exception();
    assert_eq!((seen.vector, seen.code), (8, 0));
    g = Guest::long(&[0x0f, 0x0b]);
    g.cpu.s.idtr.limit = 0;
    assert_eq!(g.run(), Exit::Shutdown);
}

#[test]
fn repeated_moves_that_overlap_copy_element_by_element() {
    // rep movsb; hlt
    let mut g = Guest::long(&[0xf3, 0xa4, 0xf4]);
    g.put(DATA, b"abc");
    g.cpu.s.gpr[gpr::RSI] = DATA;
    g.cpu.s.gpr[gpr::RDI] = DATA + 3;
    g.cpu.s.gpr[gpr::RCX] = 9000;
    g.halt();
    let mut bytes = [0; 9003];
    assert!(g.machine.memory.read(DATA, &mut bytes));
    assert!(bytes.chunks(3).all(|c| c == b"abc"));
    assert_eq!(g.cpu.s.gpr[gpr::RDI], DATA + 9003);
    assert_eq!(g.cpu.s.gpr[gpr::RCX], 0);
}

#[test]
fn a_repeated_store_stops_exactly_at_the_page_that_is_not_there() {
    let mut g = Guest::long(&[0xf3, 0x48, 0xab, 0xf4]);
    g.put64(PT + 8 * 0x41, 0);
    g.cpu.s.gpr[gpr::RDI] = 0x4_0000;
    g.cpu.s.gpr[gpr::RCX] = 1000;
    g.cpu.s.gpr[gpr::RAX] = 0x0101_0101_0101_0101;
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (14, CODE));
    assert_eq!(g.cpu.s.gpr[gpr::RDI], 0x4_1000);
    assert_eq!(g.cpu.s.gpr[gpr::RCX], 1000 - 512);
    assert_eq!(g.get64(0x4_0ff8), 0x0101_0101_0101_0101);
}

#[test]
fn segment_limits_and_types_are_checked_in_protected_mode() {
    // mov ax, 0x30; mov ds, ax; mov al, [0xff]; mov al, [0x100]
    let mut g = Guest::protected(&[
        0x66, 0xb8, 0x30, 0, 0x8e, 0xd8, 0xa0, 0xff, 0, 0, 0, 0xa0, 0, 1, 0, 0,
    ]);
    g.halt();
    let sp = g.cpu.s.gpr[gpr::RSP];
    assert_eq!(g.get64(sp) & 0xffff_ffff, 13);
    assert_eq!(g.get64(sp + 8) & 0xffff_ffff, CODE + 11);
    // mov eax, [-2]; mov eax, [0]: even a segment of 4 GiB has an end.
    let mut g = Guest::protected(&[0xa1, 0xfe, 0xff, 0xff, 0xff, 0xa1, 0, 0, 0, 0]);
    g.halt();
    assert_eq!(g.get64(g.cpu.s.gpr[gpr::RSP]) & 0xffff_ffff, 13);
    // lea edi, [-1]; mov [edi+DATA+1], esp: addresses wrap there.
    let mut code = vec![0x8d, 0x3d, 0xff, 0xff, 0xff, 0xff, 0x89, 0xa7];
    code.extend_from_slice(&(DATA as u32 + 1).to_le_bytes());
    code.push(0xf4);
    let mut g = Guest::protected(&code);
    let sp = g.cpu.s.gpr[gpr::RSP];
    g.halt();
    assert_eq!(g.get64(DATA) & 0xffff_ffff, sp & 0xffff_ffff);
    // mov byte [cs:0], 1: a code segment cannot be written.
    let mut g = Guest::protected(&[0x2e, 0xc6, 0x05, 0, 0, 0, 0, 1]);
    g.halt();
    assert_eq!(g.get64(g.cpu.s.gpr[gpr::RSP]) & 0xffff_ffff, 13);
}

#[test]
fn a_far_jump_to_a_tss_switches_tasks_and_iret_goes_back() {
    let new = TSS + 0x100;
    // call 0x48:0; hlt
    let mut g = Guest::protected(&[0x9a, 0, 0, 0, 0, 0x48, 0, 0xf4]);
    // The new task: inc ebx; iret
    g.put(DATA, &[0x43, 0xcf]);
    let put32 = |offset: u64, value: u32| g.put(new + offset, &value.to_le_bytes());
    put32(32, DATA as u32);
    put32(36, 2);
    put32(52, 41);
    put32(56, STACK as u32 - 0x800);
    for (i, selector) in [0x10, 0x18, 0x10, 0x10, 0x10, 0x10].into_iter().enumerate() {
        put32(72 + 4 * i as u64, selector);
    }
    g.cpu.s.gpr[gpr::RBX] = 5;
    g.halt();
    // Back in the first task, with its own registers; the second one's are in its TSS.
    assert_eq!(g.cpu.s.rip, CODE + 8);
    assert_eq!(g.cpu.s.gpr[gpr::RBX], 5);
    assert_eq!(g.cpu.s.tr.selector, 0x38);
    assert_eq!(g.get64(new + 52) & 0xffff_ffff, 42);
    assert_eq!(g.get64(new) & 0xffff, 0x38);
    assert_ne!(g.cpu.s.cr0 & 8, 0);
}

#[test]
fn real_mode_wraps_addresses_and_interrupts_through_its_table() {
    // int 0x20; hlt
    let mut g = Guest::real(&[0xcd, 0x20, 0xf4]);
    // Handler at 0:0x7000: mov al, 9; iret
    g.put(0x80, &[0, 0x70, 0, 0]);
    g.put(0x7000, &[0xb0, 9, 0xcf]);
    g.halt();
    assert_eq!(g.rax() & 0xff, 9);
    assert_eq!(g.cpu.s.rip, 3);
    assert_eq!(g.cpu.s.seg[seg::CS].selector, 0x1000);
    // A word at offset 0xffff does not fit the segment: #GP, vector 13.
    let mut g = Guest::real(&[0xa1, 0xff, 0xff, 0xf4]);
    g.put(13 * 4, &[0, 0x70, 0, 0]);
    g.put(0x7000, &[0xb0, 13, 0xf4]);
    g.halt();
    assert_eq!(g.rax() & 0xff, 13);
}

#[test]
fn protected_mode_enters_and_leaves_virtual_8086_mode() {
    // iretd with VM set; the 8086 code at 0x3000:0 does hlt, which faults to the monitor.
    let mut g = Guest::protected(&[0xcf]);
    g.put(DATA, &[0xb0, 5, 0xf4]);
    let frame = [0, 0x3000, 0x2_0002, 0x1000, 0x3000, 1, 2, 3, 4];
    let sp = STACK - 4 * frame.len() as u64;
    for (i, value) in frame.into_iter().enumerate() {
        g.put(sp + 4 * i as u64, &u32::to_le_bytes(value));
    }
    g.cpu.s.gpr[gpr::RSP] = sp;
    g.put(TSS + 4, &(STACK as u32 + 0x2000).to_le_bytes());
    g.put(TSS + 8, &0x10u32.to_le_bytes());
    g.halt();
    let sp = g.cpu.s.gpr[gpr::RSP];
    let word = |i: u64| g.get64(sp + 4 * i) & 0xffff_ffff;
    assert_eq!((word(0), word(1), word(2), word(3)), (13, 0, 2, 0x3000));
    assert_eq!(word(4) & 0x2_0000, 0x2_0000);
    assert_eq!((word(5), word(6)), (0x1000, 0x3000));
    assert_eq!([word(7), word(8), word(9), word(10)], [1, 2, 3, 4]);
    assert_eq!(g.rax() & 0xff, 5);
    assert_eq!(g.cpu.s.flags & rflags::VM, 0);
}

#[test]
fn sti_holds_interrupts_off_for_one_instruction() {
    // sti; mov al, 1; hlt with an interrupt waiting.
    let mut g = Guest::long(&[0xfb, 0xb0, 1, 0xf4]);
    g.put64(0x4000 + 16 * 0x41, g.get64(0x4000 + 16 * 3));
    // Software-enable the APIC and send vector 0x41 to itself.
    g.cpu.apic.mmio_write(0xf0, 0x1ff);
    g.cpu.apic.mmio_write(0x300, 0x4_4041);
    assert_eq!(g.run(), Exit::DeadHalt);
    assert_eq!(g.rax() & 0xff, 1);
    // Delivered after the instruction behind STI.
    assert_eq!(g.get64(g.cpu.s.gpr[gpr::RSP] + 16), CODE + 3);
}

#[test]
fn code_is_still_watched_after_writes_began_to_be_recorded() {
    // start: mov al, 1; hlt; mov [rdi], bl; hlt; jmp start. DI leads to the 1.
    let mut g = Guest::long(&[0xb0, 1, 0xf4, 0x88, 0x1f, 0xf4, 0xeb, 0xf8]);
    g.cpu.s.gpr[gpr::RDI] = CODE + 1;
    g.cpu.s.gpr[gpr::RBX] = 3;
    let halt = |g: &mut Guest| {
        g.cpu.s.halted = false;
        g.halt();
        g.rax() & 0xff
    };
    assert_eq!(halt(&mut g), 1);
    g.machine.log_writes(0, true).unwrap();
    halt(&mut g);
    assert_eq!(halt(&mut g), 3, "the guest has overwritten it");
    assert_eq!(g.machine.dirty_log(0).unwrap()[0] >> (CODE >> 12) & 1, 1);
    halt(&mut g);
    g.machine.log_writes(0, false).unwrap();
    let code = g.get64(CODE);
    g.put64(CODE, code & !0xff00 | 0x700);
    g.machine.memory_written(CODE + 1, 1);
    assert_eq!(halt(&mut g), 7, "a device has overwritten it");
}

#[test]
fn code_decoded_ahead_is_run_until_it_is_overwritten() {
    // mov al, 1; hlt
    let mut g = Guest::long(&[0xb0, 1, 0xf4]);
    // Whatever else is said to be code.
    let ram = rig::RAM as u64;
    let mut places = vec![CODE, 1, ram - 1, ram, u64::MAX, CODE];
    places.extend((0..0x3000).map(|offset| DATA + offset));
    g.cpu.decode_ahead(&places, &|| true);
    // Nobody says that this is overwritten: the vCPU can't know.
    g.put(CODE + 1, &[3]);
    g.halt();
    // (Translating reads it once more.)
    assert_eq!(g.rax() & 0xff, if rig::TRANSLATED { 3 } else { 1 });
    let mut g = Guest::long(&[0xb0, 1, 0xf4]);
    g.cpu.decode_ahead(&[CODE], &|| true);
    g.put(CODE + 1, &[3]);
    g.machine.memory_written(CODE + 1, 1);
    g.halt();
    assert_eq!(g.rax() & 0xff, 3);
    // Not what there was no time for.
    let mut g = Guest::long(&[0xb0, 1, 0xf4]);
    g.cpu.decode_ahead(&[CODE], &|| false);
    g.put(CODE + 1, &[3]);
    g.halt();
    assert_eq!(g.rax() & 0xff, 3);
}

#[test]
fn written_pages_are_in_the_dirty_log_once_and_again() {
    // mov [rdi], al; hlt; mov [rdi], al; hlt
    let mut g = Guest::long(&[0x88, 0x07, 0xf4, 0x88, 0x07, 0xf4]);
    g.cpu.s.gpr[gpr::RDI] = DATA;
    g.machine.dirty_log(0).unwrap();
    g.halt();
    let dirty = |g: &Guest| g.machine.dirty_log(0).unwrap()[0] >> (DATA >> 12) & 1;
    assert_eq!(dirty(&g), 1);
    assert_eq!(dirty(&g), 0);
    g.cpu.s.halted = false;
    g.halt();
    assert_eq!(dirty(&g), 1);
}
