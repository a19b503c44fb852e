//! What SeaBIOS boots.

use std::path::Path;

/// The firmware is installed.
pub fn has_seabios() -> bool {
    let there = Path::new("/usr/share/seabios/bios-256k.bin").exists();
    if !there {
        println!("left out: SeaBIOS needs the package seabios");
    }
    there
}

/// Real-mode code at 0x7c00 that has the BIOS read block `block` of the drive it was started from, prints what is there
/// to the first serial port, and ends the machine with 0x21, or with 0x23 if the BIOS could not read.
fn boot_code(block: u8) -> Vec<u8> {
    let mut code: Vec<u8> = vec![
        0x31, 0xc0, 0x8e, 0xd8, // ds = 0
    ];
    // A disk address packet at 0x600: one block to 0:0x8000.
    let packet = [0x10, 1, 0x8000, 0, u16::from(block), 0, 0, 0];
    for (at, word) in (0x600_u16..).step_by(2).zip(packet) {
        code.extend([0xc7, 0x06]);
        code.extend(at.to_le_bytes());
        code.extend(word.to_le_bytes());
    }
    code.extend([
        0xbe, 0x00, 0x06, // mov si, 0x600
        0xb4, 0x42, // mov ah, 0x42
        0xcd, 0x13, // int 0x13
        0x72, 0x12, // jc to the end below
        0xbe, 0x00, 0x80, // mov si, 0x8000
        0xac, // lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x06, // jz
        0xba, 0xf8, 0x03, 0xee, // out 0x3f8, al
        0xeb, 0xf5, // jmp to the lodsb
        0xb0, 0x10, 0xe6, 0xf4, // end with 0x21
        0xb0, 0x11, 0xe6, 0xf4, // end with 0x23
    ]);
    code
}

/// A disk whose first sector prints its second.
pub fn disk(text: &str) -> Vec<u8> {
    let mut image = vec![0; 1 << 20];
    let code = boot_code(1);
    image[..code.len()].copy_from_slice(&code);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    image[512..512 + text.len()].copy_from_slice(text.as_bytes());
    image
}

/// A CD that boots (El Torito, no emulation) and prints its block 21.
pub fn cd(text: &str) -> Vec<u8> {
    let mut image = vec![0; 2048 * 64];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(16 * 2048, b"\x01CD001\x01");
    put(17 * 2048, b"\x00CD001\x01EL TORITO SPECIFICATION");
    put(17 * 2048 + 0x47, &19u32.to_le_bytes());
    put(18 * 2048, b"\xffCD001\x01");
    // The catalog: a validation entry, and the one to boot: one block of 2048 bytes at block 20.
    put(19 * 2048, &[1]);
    put(19 * 2048 + 28, &[0xaa, 0x55, 0x55, 0xaa]);
    put(19 * 2048 + 32, &[0x88, 0, 0, 0, 0, 0, 4, 0, 20]);
    put(20 * 2048, &boot_code(21));
    put(21 * 2048, text.as_bytes());
    image
}
