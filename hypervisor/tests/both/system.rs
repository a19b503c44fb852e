//! Paging, stacks of gates, and interrupt shadows, as far as a KVM without hardware plays along.

use std::arch::global_asm;

use crate::rig::{Access, Mode, Rig};
use crate::same;

guest! {
    /// Maps 4 MiB to 0 read-only, then not at all, then not executable, and says each fault's
    /// code and address on port 0x80.
    permissions, "64",
    "mov rax, cr0",
    "or eax, 0x10000",
    "mov cr0, rax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x800",
    "wrmsr",
    "mov ebx, 0x400000",
    "mov ecx, 0x100000",
    "mov qword ptr [0xa010], 0x81",
    "invlpg [rbx]",
    "mov eax, [rbx + rcx]",
    "lea r15, [rip + 2f]",
    "mov [rbx + rcx], eax",
    "2: mov qword ptr [0xa010], 0x80",
    "invlpg [rbx]",
    "lea r15, [rip + 3f]",
    "mov eax, [rbx + rcx]",
    "3: lea r15, [rip + 4f]",
    "mov [rbx + rcx], eax",
    "4: mov rax, 0x8000000000000083",
    "mov [0xa010], rax",
    "mov byte ptr [rcx], 0xf4",
    "mov [rbx + rcx], eax",
    "lea r15, [rip + 5f]",
    "lea rdx, [rbx + rcx]",
    "jmp rdx",
    "5: mov rax, [0xa010]",
    "out 0x80, al",
    "out 0xf4, al",
    "hlt",
    ".org guest_permissions + 0x140",
    "pop rax",
    "out 0x80, eax",
    "mov rax, cr2",
    "out 0x80, eax",
    "mov [rsp], r15",
    "iretq",
}

guest! {
    /// #UD on the first stack of the interrupt stack table, misaligned; its handler says where
    /// the stack is.
    stack_table, "64",
    "mov qword ptr [36], 0x4808",
    "mov byte ptr [0x6064], 1",
    "lea r15, [rip + 2f]",
    "ud2",
    "2: mov eax, esp",
    "out 0x80, eax",
    "out 0xf4, al",
    "hlt",
    ".org guest_stack_table + 0x120",
    "mov eax, esp",
    "out 0x80, eax",
    "mov [rsp], r15",
    "iretq",
}

guest! {
    /// An interrupt waits, but between STI and CLI there is no room for it; between STI and HLT
    /// neither, so that HLT is woken by it.
    shadow, "64",
    "mov edi, 0xfee00000",
    "mov dword ptr [rdi + 0xf0], 0x1ff",
    "cli",
    "mov dword ptr [rdi + 0x300], 0x44040",
    "xor ebx, ebx",
    "sti",
    "cli",
    "sti",
    "cli",
    "inc ebx",
    "sti",
    "hlt",
    "cli",
    "mov al, 7",
    "out 0x80, al",
    "out 0xf4, al",
    "hlt",
    ".org guest_shadow + 0x100",
    "mov eax, ebx",
    "out 0x80, al",
    "mov dword ptr [rdi + 0xb0], 0",
    "iretq",
}

fn words(rig: &Rig) -> Vec<Vec<u8>> {
    let outs = rig
        .bus
        .seen()
        .into_iter()
        .filter_map(|access| match access {
            Access::Out(0x80, data) => Some(data),
            _ => None,
        });
    outs.collect()
}

#[test]
fn page_faults_have_the_same_codes() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, permissions());
        rig.gate(Mode::Long, 14, 0x140);
        rig.run_to_stop();
        words(&rig)
    });
    let word = |value: u32| value.to_le_bytes().to_vec();
    let at = word(0x50_0000);
    assert_eq!(
        got,
        [
            word(3),
            at.clone(),
            word(0),
            at.clone(),
            word(2),
            at.clone(),
            word(0x11),
            at,
            // Accessed and dirty.
            vec![0xe3],
        ]
    );
}

#[test]
fn gates_find_their_stack_in_the_table() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, stack_table());
        rig.gate(Mode::Long, 6, 0x120);
        rig.run_to_stop();
        words(&rig)
    });
    let word = |value: u32| value.to_le_bytes().to_vec();
    assert_eq!(got, [word(0x4800 - 40), word(0x5000)]);
}

#[test]
fn no_interrupt_comes_right_after_sti() {
    let got = same(|backend| {
        let mut rig = Rig::new(backend, Mode::Long, shadow());
        rig.gate(Mode::Long, 0x40, 0x100);
        rig.run_to_stop();
        words(&rig)
    });
    assert_eq!(got, [[1], [7]]);
}
