//! The guests: assembled by the compiler, loaded at `CODE` (0x1000).

use std::arch::global_asm;

/// Declares a guest's code between two symbols, and a function that returns its bytes.
/// Within the text, `{at}` of a label is written `label - name + 0x1000`.
macro_rules! guest {
    ($(#[$doc:meta])* $name:ident, $bits:literal, $($line:literal),* $(,)?) => {
        global_asm!(
            ".pushsection .rodata.guests, \"a\"",
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
