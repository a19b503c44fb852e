//! Firmware: a PC/AT's devices under a ROM of a few bytes, and SeaBIOS.

mod common;

use std::io::{Read, Write};
use std::path::Path;

use common::{Rig, backends};
use vmm_api::config::{Backend, CharBackend, FirmwareConfig, Resource};

/// A ROM that starts in real mode at the reset vector, lets the interval timer interrupt it
/// through the 8259As five times while it is in `hlt`, then says so and ends.
fn timer_rom() -> Vec<u8> {
    let mut code: Vec<u8> = vec![
        0xfa, // cli
        0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, // ds = ss = 0
        0xbc, 0x00, 0x70, // mov sp, 0x7000
        0xc7, 0x06, 0x20, 0x00, 0, 0, // mov word [8 * 4], handler (below)
        0xc7, 0x06, 0x22, 0x00, 0x00, 0xf0, // mov word [8 * 4 + 2], 0xf000
        0xc7, 0x06, 0x00, 0x05, 0x00, 0x00, // mov word [0x500], 0
    ];
    let handler_at = 14;
    let out = |code: &mut Vec<u8>, port: u8, value: u8| code.extend([0xb0, value, 0xe6, port]);
    for (port, value) in [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, 0x08),
        (0xa1, 0x70),
        (0x21, 0x04),
        (0xa1, 0x02),
        (0x21, 0x01),
        (0xa1, 0x01),
        (0x21, 0xfe),
        (0xa1, 0xff),
        // Channel 0 as a rate generator, every millisecond.
        (0x43, 0x34),
        (0x40, 0xa9),
        (0x40, 0x04),
    ] {
        out(&mut code, port, value);
    }
    code.extend([
        0xfb, // sti
        0xf4, // hlt
        0x83, 0x3e, 0x00, 0x05, 0x05, // cmp word [0x500], 5
        0x7c, 0xf8, // jl to the hlt
        0xba, 0xf8, 0x03, 0xb0, b't', 0xee, // 't' to COM1
    ]);
    out(&mut code, 0xf4, 0x10);
    code.extend([0xf4, 0xeb, 0xfd]);
    let handler = u16::try_from(code.len()).unwrap().to_le_bytes();
    code[handler_at..handler_at + 2].copy_from_slice(&handler);
    code.extend([0x50, 0xff, 0x06, 0x00, 0x05]); // push ax; inc word [0x500]
    out(&mut code, 0x20, 0x20);
    code.extend([0x58, 0xcf]); // pop ax; iret
    let mut rom = vec![0xff; 64 << 10];
    rom[..code.len()].copy_from_slice(&code);
    // The reset vector: into the copy below 1 MiB.
    rom[0xfff0..0xfff5].copy_from_slice(&[0xea, 0x00, 0x00, 0x00, 0xf0]);
    rom
}

fn firmware(rig: &mut Rig, rom: &Path) {
    rig.config.boot.kernel = None;
    rig.config.boot.firmware = Some(FirmwareConfig {
        rom: Resource::Path(rom.into()),
        serial_console: true,
        boot_menu_ms: Some(60_000),
        boot_order: Vec::new(),
        retry_ms: None,
    });
}

#[test]
fn timer_interrupts_a_rom_in_real_mode() {
    for backend in backends() {
        let mut rig = Rig::new(backend, b"");
        let path = rig.path("rom");
        std::fs::write(&path, timer_rom()).unwrap();
        firmware(&mut rig, &path);
        assert_eq!(rig.run(), 0x21, "{backend:?}: {}", rig.stderr());
        assert_eq!(rig.serial(), "t");
    }
}

/// Reads until `text` has come, whatever escape sequences stand around it.
fn until(screen: &mut impl Read, text: &str) {
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(text) {
        let mut byte = [0];
        let count = screen.read(&mut byte).unwrap();
        let so_far = String::from_utf8_lossy(&seen).into_owned();
        assert_eq!(count, 1, "ended without {text:?}: {so_far}");
        seen.push(byte[0]);
    }
}

#[test]
fn seabios_shows_its_boot_menu_on_the_serial_port() {
    let rom = Path::new("/usr/share/seabios/bios-256k.bin");
    if !rom.exists() {
        return println!("left out: SeaBIOS needs the package seabios");
    }
    let mut rig = Rig::new(Backend::Soft, b"");
    rig.config.memory_bytes = 128 << 20;
    rig.config.serials[0].backend = CharBackend::Stdio;
    firmware(&mut rig, rom);
    let child = rig.start();
    let mut keys = child.stdin.take().unwrap();
    let mut screen = child.stdout.take().unwrap();
    until(&mut screen, "SeaBIOS (version");
    until(&mut screen, "Press ESC for boot menu.");
    keys.write_all(b"\x1b").unwrap();
    until(&mut screen, "Select boot device:");
    rig.signal(15);
    assert_eq!(rig.wait().code(), Some(0));
}

#[test]
fn what_is_no_firmware_is_refused() {
    let mut rig = Rig::new(Backend::Soft, b"");
    let path = rig.path("rom");
    std::fs::write(&path, [0; 100]).unwrap();
    firmware(&mut rig, &path);
    assert_eq!(rig.run(), 1);
    assert!(rig.stderr().contains("not firmware: its size"));
    rig.config.boot.kernel = Some(Resource::Path(path));
    assert_eq!(rig.run(), 1);
    assert!(rig.stderr().contains("a kernel and firmware"));
    rig.config.boot.kernel = None;
    rig.config.boot.firmware = None;
    assert_eq!(rig.run(), 1);
    assert!(rig.stderr().contains("neither a kernel nor firmware"));
}
