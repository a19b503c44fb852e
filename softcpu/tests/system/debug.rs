//! Debug exceptions: what raises them, what doesn't, and what DR6 says.

use softcpu::state::{cr4, gpr, rflags};

use crate::rig::{CODE, DATA, Guest};

const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;

#[test]
fn a_step_and_a_data_breakpoint_of_one_instruction_are_one_trap() {
    // mov [rdi], al; nop
    let mut g = Guest::long(&[0x88, 0x07, 0x90, 0xf4]);
    g.cpu.s.gpr[gpr::RDI] = DATA;
    g.cpu.s.dr[2] = DATA;
    g.cpu.s.dr7 = 0x400 | 1 << 5 | 0b0001 << 24;
    g.cpu.s.flags |= rflags::TF;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (1, CODE + 2));
    assert_eq!(g.cpu.s.dr6 & 0xe00f, BS | 4);
    // Halted in the handler: nothing else came.
    assert_eq!(g.cpu.s.gpr[gpr::RSP], crate::rig::STACK - 56);
}

#[test]
fn software_interrupts_are_not_stepped() {
    // int3: its handler is entered without a #DB.
    let mut g = Guest::long(&[0xcc]);
    g.cpu.s.flags |= rflags::TF;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (3, CODE + 1));
}

#[test]
fn a_system_call_that_masks_the_trap_flag_is_not_stepped() {
    // syscall to ud2
    for (mask, vector) in [(rflags::TF, 6), (0, 1)] {
        let mut g = Guest::long(&[0x0f, 0x05]);
        g.put(DATA, &[0x0f, 0x0b]);
        g.cpu.s.msr.lstar = DATA;
        g.cpu.s.msr.star = 8 << 32;
        g.cpu.s.msr.sfmask = mask;
        g.cpu.s.flags |= rflags::TF;
        g.cpu.state_changed();
        let seen = g.exception();
        assert_eq!((seen.vector, seen.rip), (vector, DATA));
    }
}

#[test]
fn a_faulting_instruction_leaves_no_trap_behind() {
    // cmpsb with the first operand watched, the second not there: only #PF.
    let mut g = Guest::long(&[0xa6]);
    g.cpu.s.gpr[gpr::RSI] = DATA;
    g.cpu.s.gpr[gpr::RDI] = 0x4_0000;
    g.put64(crate::rig::PT + 8 * 0x40, 0);
    g.cpu.s.dr[0] = DATA;
    g.cpu.s.dr7 = 0x400 | 2 | 0b0011 << 16;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!(seen.vector, 14);
    assert_eq!(g.cpu.s.dr6 & 0xf, 0);
}

#[test]
fn hlt_is_woken_by_its_own_trap() {
    let mut g = Guest::long(&[0xf4, 0x90]);
    g.cpu.s.flags |= rflags::TF;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (1, CODE + 1));
}

#[test]
fn debug_registers_can_be_guarded() {
    // mov dr0, rax
    let mut g = Guest::long(&[0x0f, 0x23, 0xc0]);
    g.cpu.s.dr7 = 0x400 | BD;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (1, CODE));
    assert_eq!(g.cpu.s.dr6 & BD, BD);
    assert_eq!(g.cpu.s.dr7 & BD, 0, "the handler may use them");
}

#[test]
fn port_breakpoints_trap_after_the_access() {
    // out 0x10, al; nop
    let mut g = Guest::long(&[0xe6, 0x10, 0x90, 0xf4]);
    g.cpu.s.cr4 |= cr4::DE;
    g.cpu.s.dr[3] = 0x10;
    g.cpu.s.dr7 = 0x400 | 1 << 7 | 0b0010 << 28;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (1, CODE + 2));
    assert_eq!(g.cpu.s.dr6 & 0xf, 8);
}

#[test]
fn a_move_to_ss_holds_off_traps_until_after_the_next_instruction() {
    // mov ss, [rdi] with its operand watched; nop; nop
    let mut g = Guest::long(&[0x8e, 0x17, 0x90, 0x90, 0xf4]);
    g.put(DATA, &[0x10, 0]);
    g.cpu.s.gpr[gpr::RDI] = DATA;
    g.cpu.s.dr[0] = DATA;
    g.cpu.s.dr7 = 0x400 | 2 | 0b0111 << 16;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (1, CODE + 3));
    assert_eq!(g.cpu.s.dr6 & 0xf, 1);
    // Single step likewise.
    let mut g = Guest::long(&[0x8e, 0x17, 0x90, 0x90, 0xf4]);
    g.put(DATA, &[0x10, 0]);
    g.cpu.s.gpr[gpr::RDI] = DATA;
    g.cpu.s.flags |= rflags::TF;
    g.cpu.state_changed();
    assert_eq!(g.exception().rip, CODE + 3);
}

#[test]
fn steps_by_branch_pass_over_everything_else() {
    // nop; nop; jmp +0; nop
    let mut g = Guest::long(&[0x90, 0x90, 0xeb, 0x01, 0x90, 0x90, 0xf4]);
    g.cpu.s.msr.debugctl = 2;
    g.cpu.s.flags |= rflags::TF;
    g.cpu.state_changed();
    let seen = g.exception();
    assert_eq!((seen.vector, seen.rip), (1, CODE + 5));
    assert_eq!(g.cpu.s.msr.debugctl, 0);
}
