//! Small guests: 32-bit protected mode at 1 MiB, entered through PVH (EBX: start info).

use std::arch::global_asm;

/// Declares a guest between two symbols, and a function that returns its bytes. It is linked
/// for nowhere: labels are reached relative to EBP, which holds its first byte's address.
macro_rules! guest {
    ($(#[$doc:meta])* $name:ident, $($line:literal),* $(,)?) => {
        global_asm!(
            ".pushsection .rodata.guests, \"a\"",
            // Seen from whichever object the compiler puts the function below into.
            concat!(".globl guest_", stringify!($name)),
            concat!(".globl guest_", stringify!($name), "_end"),
            concat!("guest_", stringify!($name), ":"),
            ".code32",
            "mov ebp, 0x100000",
            "mov esp, 0x90000",
            $($line,)*
            concat!("guest_", stringify!($name), "_end:"),
            ".code64",
            ".popsection",
        );
        $(#[$doc])*
        #[allow(dead_code)]
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
                let length = usize::try_from((&raw const END).offset_from(start)).unwrap_or(0);
                std::slice::from_raw_parts(start, length)
            }
        }
    };
}

guest! {
    /// Says a word on COM1 and exits through the debug port with 0x21.
    hello,
    "mov dx, 0x3f8",
    "mov al, 'h'", "out dx, al",
    "mov al, 'i'", "out dx, al",
    "mov al, 10", "out dx, al",
    "mov al, 0x21",
    "out 0xf4, al",
    "2: jmp 2b",
}

guest! {
    /// Prints its command line and powers off through ACPI.
    cmdline,
    "mov esi, [ebx + 24]",
    "mov dx, 0x3f8",
    "2: lodsb",
    "test al, al",
    "jz 3f",
    "out dx, al",
    "jmp 2b",
    "3: mov dx, 0x604",
    "mov ax, 0x3400",
    "out dx, ax",
    "4: jmp 4b",
}

guest! {
    /// First run: dirties RAM, remembers in CMOS that it ran, and does as the first letter of
    /// the command line says: k(eyboard controller), r(eset register), t(riple fault),
    /// p(anic), o(ff). Second run: prints "again" if RAM is clean, "dirty" if not; powers off.
    twice,
    "mov dx, 0x3f8",
    "mov al, 0x40", "out 0x70, al", "in al, 0x71",
    "cmp al, 0x5a",
    "je 3f",
    "mov al, '1'", "out dx, al",
    "mov al, 0x40", "out 0x70, al",
    "mov al, 0x5a", "out 0x71, al",
    "mov dword ptr [0x200000], 0x12345678",
    "mov esi, [ebx + 24]",
    "lodsb",
    "cmp al, 'k'", "jne 2f",
    "mov al, 0xfe", "out 0x64, al",
    "2: cmp al, 'r'", "jne 2f",
    "mov dx, 0xcf9", "mov al, 6", "out dx, al",
    "2: cmp al, 't'", "jne 2f",
    "push 0", "push 0", "lidt [esp]", "ud2",
    "2: cmp al, 'p'", "jne 2f",
    "mov dx, 0x505", "mov al, 1", "out dx, al",
    "2: cmp al, 'o'", "jne 2f",
    "mov dx, 0x604", "mov ax, 0x3400", "out dx, ax",
    "2: mov al, '?'", "out 0xf4, al",
    "2: jmp 2b",
    "3: mov al, '2'",
    "cmp dword ptr [0x200000], 0", "je 4f",
    "mov al, 'd'",
    "4: out dx, al",
    "mov dx, 0x604", "mov ax, 0x3400", "out dx, ax",
    "5: jmp 5b",
}

guest! {
    /// Says "> ", then writes each byte that the keyboard's controller has for it to COM1.
    typist,
    "mov dx, 0x3f8",
    "mov al, '>'", "out dx, al",
    "mov al, ' '", "out dx, al",
    "2: in al, 0x64",
    "test al, 1",
    "jz 2b",
    "in al, 0x60",
    "mov dx, 0x3f8",
    "out dx, al",
    "jmp 2b",
}

guest! {
    /// Says "> ", then sends back what it receives on COM1, a letter higher; 'q' powers off.
    echo,
    "mov dx, 0x3f8",
    "mov al, '>'", "out dx, al",
    "mov al, ' '", "out dx, al",
    "2: mov dx, 0x3fd",
    "in al, dx",
    "test al, 1",
    "jz 2b",
    "mov dx, 0x3f8",
    "in al, dx",
    "cmp al, 'q'",
    "je 3f",
    "inc al",
    "out dx, al",
    "jmp 2b",
    "3: mov dx, 0x604",
    "mov ax, 0x3400",
    "out dx, ax",
    "4: jmp 4b",
}

guest! {
    /// Says 'w' and looks after vCPUs 1 and 2: one that has come ('i') is started, and says 'A'; of
    /// one that is to go ('r') it lets go ('e'), unless the machine's command line is "keep": then it
    /// says so (`_OST`).
    pluggable,
    // What a vCPU does, in real mode: says its letter, halts.
    "mov dword ptr [0x8000], 0xb003f8ba",
    "mov dword ptr [0x8004], 0xf4faee41",
    "mov dword ptr [0x8008], 0x0000fdeb",
    "mov esi, [ebx + 24]",
    "mov dx, 0x3f8", "mov al, 'w'", "out dx, al",
    "2: mov ecx, 1",
    "3: mov dx, 0x620", "mov eax, ecx", "out dx, eax",
    "mov dx, 0x624", "in al, dx",
    "test al, 2", "jnz 4f",
    "test al, 4", "jnz 5f",
    "6: inc ecx", "cmp ecx, 3", "jb 3b",
    "jmp 2b",
    "4: mov al, 2", "out dx, al",
    "mov dx, 0x3f8", "mov al, 'i'", "out dx, al",
    // INIT, and the start-up message for page 8.
    "mov eax, ecx", "shl eax, 24",
    "mov dword ptr [0xfee00310], eax", "mov dword ptr [0xfee00300], 0x4500",
    "mov dword ptr [0xfee00310], eax", "mov dword ptr [0xfee00300], 0x4608",
    "jmp 6b",
    "5: mov al, 4", "out dx, al",
    "mov dx, 0x3f8", "mov al, 'r'", "out dx, al",
    "cmp byte ptr [esi], 'k'", "je 7f",
    "mov dx, 0x624", "mov al, 8", "out dx, al",
    "mov dx, 0x3f8", "mov al, 'e'", "out dx, al",
    "jmp 6b",
    "7: mov dx, 0x625", "mov al, 1", "out dx, al",
    "mov dx, 0x628", "mov eax, 0x103", "out dx, eax",
    "mov dx, 0x625", "mov al, 2", "out dx, al",
    "mov dx, 0x628", "mov eax, 0x82", "out dx, eax",
    "jmp 6b",
}

guest! {
    /// Writes dots to COM1 for ever.
    chatter,
    "mov dx, 0x3f8",
    "2: mov al, '.'",
    "out dx, al",
    "jmp 2b",
}

guest! {
    /// Says '!' and stops with interrupts off.
    stuck,
    "mov dx, 0x3f8",
    "mov al, '!'", "out dx, al",
    "2: cli",
    "hlt",
    "jmp 2b",
}

guest! {
    /// Waits for the power button by polling, then powers off.
    button,
    "mov dx, 0x602", "mov ax, 0x100", "out dx, ax",
    "mov dx, 0x3f8", "mov al, 'w'", "out dx, al",
    "2: mov dx, 0x600",
    "in ax, dx",
    "test ax, 0x100",
    "jz 2b",
    "mov dx, 0x3f8", "mov al, 'b'", "out dx, al",
    "mov dx, 0x604",
    "mov ax, 0x3400",
    "out dx, ax",
    "4: jmp 4b",
}

/// A 32-bit ELF kernel with a PVH note, its text at 1 MiB.
#[allow(dead_code)]
pub fn elf(text: &[u8]) -> Vec<u8> {
    const TEXT_AT: u32 = 52 + 2 * 32 + 20;
    let length = u32::try_from(text.len()).unwrap();
    let mut image = b"\x7fELF\x01\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 3, 0, 1, 0, 0, 0]);
    for word in [0x10_0000_u32, 52, 0, 0] {
        image.extend(word.to_le_bytes());
    }
    for half in [52_u16, 32, 2, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let headers = [
        [1, TEXT_AT, 0x10_0000, 0x10_0000, length, length, 7, 4096],
        [4, TEXT_AT - 20, 0, 0, 20, 20, 4, 4],
    ];
    for word in headers.as_flattened() {
        image.extend(word.to_le_bytes());
    }
    for word in [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000] {
        image.extend(word.to_le_bytes());
    }
    image.extend(text);
    image
}

/// A Multiboot 1 kernel: header, then text at 2 MiB, entered at 2 MiB + 32.
#[allow(dead_code)]
pub fn multiboot(text: &[u8]) -> Vec<u8> {
    let flags = 1_u32 << 16;
    let sum = 0_u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    let mut image = Vec::new();
    for word in [
        0x1bad_b002,
        flags,
        sum,
        0x20_0000,
        0x20_0000,
        0,
        0,
        0x20_0020,
    ] {
        image.extend(word.to_le_bytes());
    }
    image.extend(text);
    image
}

guest! {
    /// Says the alphabet again and again, counting in memory (at 2 MiB) and registers.
    alphabet,
    "mov dx, 0x3f8",
    "mov edi, 0x200000",
    "mov dword ptr [edi], 0",
    "xor esi, esi",
    "2: mov eax, [edi]",
    "cmp eax, esi",
    "jne 5f",
    "cmp eax, 26",
    "jb 3f",
    "xor eax, eax",
    "xor esi, esi",
    "3: mov ecx, eax",
    "add al, 'a'",
    "out dx, al",
    "inc ecx",
    "mov [edi], ecx",
    "inc esi",
    "mov ecx, 20000",
    "4: dec ecx",
    "jnz 4b",
    "jmp 2b",
    // Memory and registers are not of the same moment.
    "5: mov al, '!'",
    "out dx, al",
    "jmp 5b",
}

guest! {
    /// The same in 64-bit mode.
    alphabet_long,
    // Tables of pages of 2 MiB at 0x10000, of segments at 0x13000.
    "mov edi, 0x10000",
    "xor eax, eax",
    "mov ecx, 0x1000",
    "cld",
    "rep stosd",
    "mov dword ptr [0x10000], 0x11003",
    "mov dword ptr [0x11000], 0x12003",
    "mov dword ptr [0x12000], 0x83",
    "mov dword ptr [0x12008], 0x200083",
    "mov dword ptr [0x13008], 0x0000ffff",
    "mov dword ptr [0x1300c], 0x00af9b00",
    "mov dword ptr [0x13010], 0x3000000f",
    "mov dword ptr [0x13014], 0x00000001",
    "lgdt [0x13010]",
    "mov eax, 0x10000", "mov cr3, eax",
    "mov eax, cr4", "or eax, 0x20", "mov cr4, eax",
    "mov ecx, 0xc0000080", "rdmsr", "or eax, 0x100", "wrmsr",
    "mov eax, cr0", "or eax, 0x80000000", "mov cr0, eax",
    // The return to what follows is a far one.
    "push 8",
    "call 6f",
    ".code64",
    "mov dx, 0x3f8",
    "mov edi, 0x200000",
    "mov dword ptr [rdi], 0",
    "xor esi, esi",
    "2: mov eax, [rdi]",
    "cmp eax, esi",
    "jne 5f",
    "cmp eax, 26",
    "jb 3f",
    "xor eax, eax",
    "xor esi, esi",
    "3: mov ecx, eax",
    "add al, 'a'",
    "out dx, al",
    "inc ecx",
    "mov [rdi], ecx",
    "inc esi",
    "mov ecx, 20000",
    "4: dec ecx",
    "jnz 4b",
    "jmp 2b",
    "5: mov al, '!'",
    "out dx, al",
    "jmp 5b",
    ".code32",
    "6: retf",
}
