//! The guests: assembled by the compiler, loaded at `CODE` (0x1000).

use std::arch::global_asm;

/// Declares a guest's code between two symbols, and a function that returns its bytes.
/// Within the text, `{at}` of a label is written `label - name + 0x1000`.
macro_rules! guest {
    ($(#[$doc:meta])* $name:ident, $bits:literal, $($line:literal),* $(,)?) => {
        global_asm!(
            ".pushsection .rodata.guests, \"a\"",
            // Seen from whichever object the compiler puts the function below into.
            concat!(".globl guest_", stringify!($name)),
            concat!(".globl guest_", stringify!($name), "_end"),
            concat!("guest_", stringify!($name), ":"),
            concat!(".code", $bits),
            $($line,)*
            concat!("guest_", stringify!($name), "_end:"),
            ".code64",
            ".popsection",
        );
        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("guest_", stringify!($name), "_end")]
                static END: u8;
            }
            // SAFETY: both symbols bound one run of read-only bytes emitted just above.
            unsafe {
                let start = &raw const START;
                std::slice::from_raw_parts(start, (&raw const END).offset_from(start) as usize)
            }
        }
    };
}

guest! {
    /// Port I/O of every width, both ways, immediate and in DX.
    ports, "16",
    "in al, 0x60",
    "mov dx, 0x3f8",
    "in al, dx",
    "in ax, dx",
    "in eax, dx",
    "mov ebx, eax",
    "mov eax, 0x44332211",
    "out 0x80, al",
    "out dx, al",
    "out dx, ax",
    "out dx, eax",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// String port I/O, with and without REP.
    string_ports, "16",
    "cld",
    "mov dx, 0x100",
    "mov di, 0x2000",
    "mov cx, 5",
    "rep insb",
    "mov cx, 3",
    "rep insw",
    "insd",
    "mov si, 0x2000",
    "mov cx, 4",
    "rep outsb",
    "mov cx, 2",
    "rep outsd",
    "outsw",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// MMIO reads and writes of 1, 2, 4 and 8 bytes.
    mmio, "64",
    "mov rdi, 0x30000000",
    "mov al, [rdi]",
    "movzx ebx, word ptr [rdi + 2]",
    "mov ecx, [rdi + 4]",
    "mov rdx, [rdi + 8]",
    "mov [rdi], dl",
    "mov [rdi + 2], dx",
    "mov [rdi + 4], edx",
    "mov [rdi + 8], rdx",
    "mov dword ptr [rdi + 0x10], 0x12345678",
    "add dword ptr [rdi + 0x14], 1",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// Arithmetic whose final registers are compared.
    arithmetic, "32",
    "mov eax, 0x12345678",
    "mov ecx, 10",
    "xor edx, edx",
    "2: add edx, eax",
    "rol eax, 3",
    "imul ebx, edx, 7",
    "dec ecx",
    "jnz 2b",
    "bsr esi, ebx",
    "shld edi, ebx, 9",
    "push ebx",
    "pop ebp",
    "cmp eax, edx",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// Waits in HLT for vector 0x40, which the host sends on port 0x81; handler at +0x100.
    /// Says 0x40 on port 0x80 in the handler, 1 after it.
    wait_for_interrupt, "64",
    "mov edi, 0xfee00000",
    "mov dword ptr [rdi + 0xf0], 0x1ff",
    "cli",
    "out 0x81, al",
    "sti",
    "hlt",
    "cli",
    "mov al, 1",
    "out 0x80, al",
    "out 0xf4, al",
    "hlt",
    ".org guest_wait_for_interrupt + 0x100",
    "mov al, 0x40",
    "out 0x80, al",
    "mov dword ptr [rdi + 0xb0], 0",
    "iretq",
}

guest! {
    /// The same in 32-bit protected mode. (No IRET: a KVM without hardware lacks it there.)
    wait_for_interrupt_32, "32",
    "mov edi, 0xfee00000",
    "mov dword ptr [edi + 0xf0], 0x1ff",
    "cli",
    "out 0x81, al",
    "sti",
    "hlt",
    "2: mov al, 1",
    "out 0x80, al",
    "out 0xf4, al",
    "hlt",
    ".org guest_wait_for_interrupt_32 + 0x100",
    "mov al, 0x40",
    "out 0x80, al",
    "mov dword ptr [edi + 0xb0], 0",
    "pop ebx",
    "add esp, 8",
    "jmp 2b",
}

guest! {
    /// Two interrupts at once: 0x52 before 0x31, and the second only after the EOI.
    two_interrupts, "64",
    "mov edi, 0xfee00000",
    "mov dword ptr [rdi + 0xf0], 0x1ff",
    "cli",
    "out 0x81, al",
    "sti",
    "2: pause",
    "cmp byte ptr [0x4000], 1",
    "jne 2b",
    "cli",
    "out 0xf4, al",
    "hlt",
    ".org guest_two_interrupts + 0x100",
    "mov al, 0x31",
    "out 0x80, al",
    "mov byte ptr [0x4000], 1",
    "mov dword ptr [rdi + 0xb0], 0",
    "iretq",
    ".org guest_two_interrupts + 0x140",
    "mov al, 0x52",
    "out 0x80, al",
    "mov dword ptr [rdi + 0xb0], 0",
    "iretq",
}

guest! {
    /// #DE, #UD, #PF and #GP; each handler says its vector, error code and (for #PF) CR2 on
    /// port 0x80, and goes on at R15.
    exceptions, "64",
    "xor ecx, ecx",
    "mov eax, 5",
    "xor edx, edx",
    "lea r15, [rip + 2f]",
    "div ecx",
    "2: lea r15, [rip + 3f]",
    "ud2",
    "3: lea r15, [rip + 4f]",
    "mov ebx, 0x80000123",
    "mov [rbx], eax",
    "4: lea r15, [rip + 5f]",
    "mov eax, 0xfff8",
    "mov ds, eax",
    "5: out 0xf4, al",
    "hlt",
    ".org guest_exceptions + 0x100",
    "mov al, 0",
    "out 0x80, al",
    "mov [rsp], r15",
    "iretq",
    ".org guest_exceptions + 0x120",
    "mov al, 6",
    "out 0x80, al",
    "mov [rsp], r15",
    "iretq",
    ".org guest_exceptions + 0x140",
    "mov al, 14",
    "out 0x80, al",
    "pop rax",
    "out 0x80, eax",
    "mov rax, cr2",
    "out 0x80, eax",
    "mov [rsp], r15",
    "iretq",
    ".org guest_exceptions + 0x180",
    "mov al, 13",
    "out 0x80, al",
    "pop rax",
    "out 0x80, eax",
    "mov [rsp], r15",
    "iretq",
}

guest! {
    /// An exception without an IDT.
    triple_fault, "64",
    "mov word ptr [0x3000], 0",
    "mov qword ptr [0x3002], 0",
    "lidt [0x3000]",
    "ud2",
}

guest! {
    /// Writes to pages 0x20, 0x21 and 0x40.
    dirty, "64",
    "mov byte ptr [0x20000], 1",
    "mov word ptr [0x20fff], 2",
    "lock inc dword ptr [0x40010]",
    "mov eax, [0x50000]",
    "out 0xf4, al",
    "mov byte ptr [0x60000], 1",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// Runs for ever.
    spin, "64",
    "2: inc rax",
    "jmp 2b",
}

guest! {
    /// Adds up a pseudo-random sequence in memory and registers; a stop every 1000 rounds.
    compute, "64",
    "xor eax, eax",
    "mov ebx, 12345",
    "mov esi, 0x100000",
    "xor ebp, ebp",
    "2: mov ecx, 1000",
    "3: imul rbx, rbx, 1103515245",
    "add rbx, 12345",
    "mov rdx, rbx",
    "shr rdx, 16",
    "and edx, 0xff8",
    "add [rsi + rdx], rbx",
    "adc rax, [rsi + rdx]",
    "rol rax, 7",
    "dec ecx",
    "jnz 3b",
    "inc ebp",
    "out 0xf4, al",
    "jmp 2b",
}

guest! {
    /// One-shot APIC timer (vector 0x41), then TSC-deadline (the same vector).
    timers, "64",
    "mov edi, 0xfee00000",
    "mov dword ptr [rdi + 0xf0], 0x1ff",
    "mov dword ptr [rdi + 0x3e0], 0xb",
    "mov dword ptr [rdi + 0x320], 0x41",
    "cli",
    "mov dword ptr [rdi + 0x380], 1000000",
    "sti",
    "hlt",
    "cli",
    "mov dword ptr [rdi + 0x320], 0x40041",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "add rax, 3000000",
    "mov rdx, rax",
    "shr rdx, 32",
    "mov ecx, 0x6e0",
    "wrmsr",
    "sti",
    "hlt",
    "cli",
    "mov ecx, 0x6e0",
    "rdmsr",
    "or eax, edx",
    "out 0x80, eax",
    "out 0xf4, al",
    "hlt",
    ".org guest_timers + 0x100",
    "mov al, 0x41",
    "out 0x80, al",
    "mov dword ptr [rdi + 0xb0], 0",
    "iretq",
}

guest! {
    /// Into x2APIC mode; a self-IPI; its id and LDR; then MSRs that do not exist: #GP.
    x2apic, "64",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0x400",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x802",
    "rdmsr",
    "out 0x80, eax",
    "mov ecx, 0x80d",
    "rdmsr",
    "out 0x80, eax",
    "cli",
    "mov ecx, 0x83f",
    "mov eax, 0x40",
    "xor edx, edx",
    "wrmsr",
    "sti",
    "hlt",
    "cli",
    "lea r15, [rip + 2f]",
    "mov ecx, 0x12345678",
    "rdmsr",
    "2: lea r15, [rip + 3f]",
    "mov ecx, 0x12345678",
    "wrmsr",
    "3: out 0xf4, al",
    "hlt",
    ".org guest_x2apic + 0x100",
    "mov al, 0x40",
    "out 0x80, al",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "iretq",
    ".org guest_x2apic + 0x140",
    "mov al, 13",
    "out 0x80, al",
    "pop rax",
    "out 0x80, eax",
    "mov [rsp], r15",
    "iretq",
}

guest! {
    /// Reads from and writes to read-only memory at 0x10000000.
    rom, "64",
    "mov ebx, 0x10000000",
    "mov eax, [rbx + 8]",
    "out 0x80, eax",
    "mov dword ptr [rbx + 8], 0x55555555",
    "mov eax, [rbx + 8]",
    "out 0x80, eax",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// Starts processor 1 at 0x3000 by INIT and start-up IPI, waits for its flag at 0x4000.
    start_other, "64",
    "mov edi, 0xfee00000",
    "mov dword ptr [rdi + 0xf0], 0x1ff",
    "mov dword ptr [rdi + 0x310], 0x1000000",
    "mov dword ptr [rdi + 0x300], 0x4500",
    "mov dword ptr [rdi + 0x310], 0x1000000",
    "mov dword ptr [rdi + 0x300], 0x4603",
    "2: pause",
    "cmp dword ptr [0x4000], 0x600d",
    "jne 2b",
    "mov al, 2",
    "out 0x80, al",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// What processor 1 runs, in real mode at 0300:0000.
    other, "16",
    "mov ax, cs",
    "out 0x80, ax",
    "xor ax, ax",
    "mov ds, ax",
    "mov dword ptr [0x4000], 0x600d",
    "2: hlt",
    "jmp 2b",
}

guest! {
    /// Spins until an NMI; the handler at +0x100 says 2 and leaves through R15.
    wait_for_nmi, "64",
    "lea r15, [rip + 3f]",
    "out 0x81, al",
    "2: jmp 2b",
    "3: out 0xf4, al",
    "hlt",
    ".org guest_wait_for_nmi + 0x100",
    "mov al, 2",
    "out 0x80, al",
    "mov [rsp], r15",
    "iretq",
}

guest! {
    /// Rings at MMIO 0x30000000 (4 bytes, value 7) and port 0x90, and beside them.
    doorbells, "64",
    "mov ebx, 0x30000000",
    "mov dword ptr [rbx], 7",
    "mov dword ptr [rbx], 8",
    "mov dword ptr [rbx + 4], 7",
    "mov ax, 1",
    "out 0x90, ax",
    "out 0x90, al",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// The vendor of the CPUID leaf the backend is known by, the APIC id, an absent leaf.
    cpuid, "64",
    "mov eax, 0x40000000",
    "cpuid",
    "mov eax, ebx",
    "out 0x80, eax",
    "mov eax, ecx",
    "out 0x80, eax",
    "mov eax, 1",
    "cpuid",
    "mov eax, ebx",
    "shr eax, 24",
    "out 0x80, eax",
    "mov eax, ecx",
    "shr eax, 31",
    "out 0x80, eax",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// Real-mode interrupts: INT 0x21 through the table at 0.
    real_interrupt, "16",
    "xor ax, ax",
    "mov ds, ax",
    "mov word ptr [0x84], 0x1080",
    "mov word ptr [0x86], 0",
    "mov bx, 5",
    "int 0x21",
    "mov al, bl",
    "out 0x80, al",
    "out 0xf4, al",
    "hlt",
    ".org guest_real_interrupt + 0x80",
    "add bx, 3",
    "iret",
}

guest! {
    /// From real mode to 32-bit protected mode and back into a loop of calls.
    mode_switch, "16",
    "cli",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    // A far jump to 0x18:next, 32-bit.
    ".byte 0x66, 0xea",
    ".long 0x1000 + 2f - guest_mode_switch",
    ".word 0x18",
    ".code32",
    "2: mov ax, 0x10",
    "mov ds, ax",
    "mov ss, ax",
    "mov esp, 0x5000",
    "mov ecx, 5",
    "3: call 4f",
    "loop 3b",
    "mov [0x123456], eax",
    "out 0x80, eax",
    "mov ax, cs",
    "out 0x80, ax",
    "out 0xf4, al",
    "hlt",
    "4: add eax, ecx",
    "ret",
}

guest! {
    /// CMPXCHG16B, which a KVM without hardware does not know.
    cmpxchg16b, "64",
    "mov esi, 0x20000",
    "cmpxchg16b [rsi]",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// HLT with interrupts off.
    dead_halt, "64",
    "cli",
    "hlt",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// Switches on the paravirtual clock with its page at 0x4000 and the wall clock at 0x4040.
    pv_clock, "64",
    "mov ecx, 0x4b564d00",
    "mov eax, 0x4040",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x4b564d01",
    "mov eax, 0x4001",
    "wrmsr",
    "rdmsr",
    "out 0x80, eax",
    "out 0xf4, al",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// Sends itself vector 0x40 by hypercall, and says its result.
    pv_ipi, "64",
    "mov edi, 0xfee00000",
    "mov dword ptr [rdi + 0xf0], 0x1ff",
    "cli",
    "mov eax, 10",
    "mov ebx, 1",
    "xor ecx, ecx",
    "xor edx, edx",
    "mov esi, 0x40",
    "vmmcall",
    "out 0x80, eax",
    "mov eax, 0x12345",
    "vmmcall",
    "out 0x80, eax",
    "sti",
    "hlt",
    "cli",
    "out 0xf4, al",
    "hlt",
    ".org guest_pv_ipi + 0x100",
    "mov al, 0x40",
    "out 0x80, al",
    "mov dword ptr [rdi + 0xb0], 0",
    "iretq",
}

guest! {
    /// Interrupts 0x40, ended by clearing PV EOI's word; 0x31, below it, which came before the
    /// end of another 0x40 and takes the word back; both told with what the word was.
    pv_eoi, "64",
    "mov edi, 0xfee00000",
    "mov dword ptr [rdi + 0xf0], 0x1ff",
    "mov ecx, 0x4b564d04",
    "mov eax, 0x4001",
    "xor edx, edx",
    "wrmsr",
    "cli",
    "xor esi, esi",
    "out 0x81, al",
    "sti",
    "hlt",
    "cli",
    "out 0x81, al",
    "mov esi, 1",
    "sti",
    "2: pause",
    "cmp esi, 3",
    "jne 2b",
    "cli",
    // Nothing is in service any more: PPR.
    "mov eax, [rdi + 0xa0]",
    "out 0x80, al",
    "out 0xf4, al",
    "hlt",
    ".org guest_pv_eoi + 0x100",
    "mov al, 0x40",
    "out 0x80, al",
    "mov al, [0x4000]",
    "out 0x80, al",
    "test esi, esi",
    "jz 3f",
    // 0x31 comes now, behind this one.
    "out 0x82, al",
    "sti",
    "nop",
    "nop",
    "cli",
    "mov al, [0x4000]",
    "out 0x80, al",
    "inc esi",
    "3: btr dword ptr [0x4000], 0",
    "jc 4f",
    "mov dword ptr [rdi + 0xb0], 0",
    "4: iretq",
    ".org guest_pv_eoi + 0x180",
    "mov al, 0x31",
    "out 0x80, al",
    "mov al, [0x4000]",
    "out 0x80, al",
    "inc esi",
    "btr dword ptr [0x4000], 0",
    "jc 5f",
    "mov dword ptr [rdi + 0xb0], 0",
    "5: iretq",
}

guest! {
    /// MCG_CAP, the first bank's control, a refused write to its status, a cleared one.
    machine_check_banks, "64",
    "lea r15, [rip + 2f]",
    "mov ecx, 0x179",
    "rdmsr",
    "out 0x80, eax",
    "mov ecx, 0x424",
    "rdmsr",
    "out 0x80, eax",
    "mov ecx, 0x425",
    "xor edx, edx",
    "xor eax, eax",
    "wrmsr",
    "mov eax, 1",
    "wrmsr",
    "mov al, 0xee",
    "out 0x80, al",
    "2: mov ecx, 0x426",
    "mov eax, 0x12345678",
    "wrmsr",
    "out 0xf4, al",
    "hlt",
    ".org guest_machine_check_banks + 0x100",
    "mov al, 13",
    "out 0x80, al",
    "add rsp, 8",
    "mov [rsp], r15",
    "iretq",
}

guest! {
    /// 32-bit with PAE paging: stops, then uses memory.
    pae, "32",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, 0xc000",
    "mov cr3, eax",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "out 0xf4, al",
    "mov dword ptr [0x100000], 0x1234",
    "add dword ptr [0x100000], 1",
    "mov eax, [0x100000]",
    "out 0x80, eax",
    "out 0xf4, al",
    "hlt",
}

guest! {
    /// Calls a routine at 0x20000 over and over; its `ret` returns AL to port 0x80. A write to
    /// port 0x81 lets a device change it.
    called, "64",
    "mov ebx, 0x20000",
    "mov ecx, 3",
    "1:",
    "call rbx",
    "out 0x80, al",
    "call rbx",
    "out 0x80, al",
    "out 0x81, al",
    "dec ecx",
    "jnz 1b",
    "out 0xf4, al",
    "hlt",
}
