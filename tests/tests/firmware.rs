//! A guest that lives by its firmware: it is saved, moved and reset, and goes on.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vireo_tests::{Rig, Terminal, left_out};

const SOON: Duration = Duration::from_secs(120);

/// A boot sector that says the alphabet for ever through the firmware's video service (which
/// SeaBIOS has at the serial port), a letter for each tick of the firmware's clock.
fn disk() -> Vec<u8> {
    // xor ax,ax; mov ds,ax; mov si,'a'
    let mut sector = vec![0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x61, 0x00];
    // 1: mov ah,0; int 0x1a; cmp dx,bp; je 1b; mov bp,dx
    sector.extend([0xb4, 0x00, 0xcd, 0x1a, 0x39, 0xea, 0x74, 0xf8, 0x89, 0xd5]);
    // mov ax,si; mov ah,0x0e; mov bx,7; int 0x10; inc si
    sector.extend([0x89, 0xf0, 0xb4, 0x0e, 0xbb, 0x07, 0x00, 0xcd, 0x10, 0x46]);
    // cmp si,'z'+1; jne 2f; mov si,'a'; 2: jmp 1b
    sector.extend([0x83, 0xfe, 0x7b, 0x75, 0x03, 0xbe, 0x61, 0x00, 0xeb, 0xe2]);
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}

fn domain(disk: &str, serial: &str) -> String {
    format!(
        "<domain type='qemu'><name>guest</name><memory unit='MiB'>64</memory>\
         <os><type arch='x86_64' machine='q35'>hvm</type><bios useserial='yes'/><boot dev='hd'/></os>\
         <features><acpi/></features><devices>\
         <disk type='file'><driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda'/><shareable/></disk>\
         <serial type='file'><source path='{serial}' append='on'/></serial></devices></domain>"
    )
}

/// What the guest has said since it last booted: what its firmware said before, and terminal
/// sequences, are left out.
fn said(serial: &str) -> String {
    let all = String::from_utf8_lossy(&std::fs::read(serial).unwrap_or_default()).into_owned();
    let Some((_, since)) = all.rsplit_once("Booting from Hard Disk...") else {
        return String::new();
    };
    let mut letters = String::new();
    let mut rest = since.chars();
    while let Some(c) = rest.next() {
        match c {
            '\u{1b}' => {
                rest.find(|c| c.is_ascii_alphabetic());
            }
            'a'..='z' => letters.push(c),
            _ => {}
        }
    }
    letters
}

/// It says more, and nothing is missing or twice.
fn goes_on(serial: &str) {
    let before = said(serial).len();
    let deadline = Instant::now() + SOON;
    while said(serial).len() < before + 5 {
        assert!(Instant::now() < deadline, "{}", said(serial));
        std::thread::sleep(Duration::from_millis(20));
    }
    let said = said(serial);
    for pair in said.as_bytes().windows(2) {
        let next = if pair[0] == b'z' { b'a' } else { pair[0] + 1 };
        assert_eq!(pair[1], next, "in {said}");
    }
    assert!(said.starts_with('a'), "{said}");
}

fn rom() -> Option<PathBuf> {
    ["/usr/share/seabios", "/usr/share/qemu"]
        .map(|at| Path::new(at).join("bios-256k.bin"))
        .into_iter()
        .find(|path| path.exists())
}

#[test]
fn a_guest_of_seabios_is_saved_moved_and_reset() {
    if rom().is_none() {
        return left_out("needs seabios");
    }
    let (one, other) = (Rig::new(), Rig::new());
    one.vireo(&["list"]).ok();
    other.vireo(&["list"]).ok();
    let disk = one.write("disk.img", disk());
    let serial = one.write("serial", "");
    one.define(&domain(&disk, &serial));
    one.vireo(&["start", "guest"]).ok();
    goes_on(&serial);

    let image = one.path("image").display().to_string();
    one.vireo(&["save", "guest", &image]).ok();
    one.vireo(&["restore", &image]).ok();
    goes_on(&serial);
    one.vireo(&["managedsave", "guest"]).ok();
    one.vireo(&["start", "guest"]).ok();
    goes_on(&serial);

    let at = |rig: &Rig| format!("unix://{}", rig.path("incoming").display());
    let to = |rig: &Rig| {
        let words = ["migrate", "--live", "--persistent", "guest", "--migrateuri"];
        let mut words = words.map(str::to_owned).to_vec();
        words.extend([at(rig), rig.uri()]);
        words
    };
    one.vireo(&to(&other).iter().map(String::as_str).collect::<Vec<_>>())
        .ok();
    goes_on(&serial);

    // The firmware is there after the move: it begins once more.
    let boots = || {
        let all = std::fs::read(&serial).unwrap();
        String::from_utf8_lossy(&all)
            .matches("Booting from Hard Disk...")
            .count()
    };
    assert_eq!(boots(), 1);
    other.vireo(&["reset", "guest"]).ok();
    let deadline = Instant::now() + SOON;
    while boots() < 2 {
        assert!(Instant::now() < deadline, "no second boot");
        std::thread::sleep(Duration::from_millis(20));
    }
    goes_on(&serial);
    other
        .virsh(&to(&one).iter().map(String::as_str).collect::<Vec<_>>())
        .ok();
    goes_on(&serial);
    one.vireo(&["destroy", "guest"]).ok();
    other.vireo(&["destroy", "guest"]).fails();
}

/// With nothing to boot from it tries again after a while, if the definition says so; the firmware
/// may be a file of one's own.
#[test]
fn firmware_of_ones_own_tries_again() {
    let Some(rom) = rom() else {
        return left_out("needs seabios");
    };
    let rig = Rig::new();
    let own = rig.write("own.bin", std::fs::read(rom).unwrap());
    let blank = rig.write("blank.img", vec![0; 1 << 20]);
    let domain = |name: &str, loader: &str| {
        format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>\
             <os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='rom'>{loader}</loader>\
             <bios useserial='yes' rebootTimeout='100'/><boot dev='hd'/></os>\
             <features><acpi/></features><devices>\
             <disk type='file'><driver name='qemu' type='raw'/><source file='{blank}'/><target dev='vda'/></disk>\
             <console type='pty'/></devices></domain>"
        )
    };
    rig.define(&domain("guest", &own));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "guest", "--console"]));
    for _ in 0..2 {
        terminal.expect("SeaBIOS (version", SOON);
        terminal.expect("No bootable device.  Retrying in", SOON);
    }
    drop(terminal);
    rig.vireo(&["destroy", "guest"]).ok();
    let missing = rig.path("missing.bin").display().to_string();
    rig.define(&domain("none", &missing));
    let said = rig.vireo(&["start", "none"]).fails();
    assert!(said.contains(&missing), "{said}");
    let junk = rig.write("junk.bin", vec![0; 100]);
    rig.define(&domain("junk", &junk));
    let said = rig.vireo(&["start", "junk"]).fails();
    assert!(said.contains("junk.bin"), "{said}");
}
