//! SeaBIOS and drives at a SATA controller: what it boots from, and what the BIOS's calls read.

mod common;

use std::path::{Path, PathBuf};

use common::{Rig, backends};
use serde_json::{Value, json};
use vmm_api::config::{FirmwareConfig, Resource};

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
fn disk(text: &str) -> Vec<u8> {
    let mut image = vec![0; 1 << 20];
    let code = boot_code(1);
    image[..code.len()].copy_from_slice(&code);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    image[512..512 + text.len()].copy_from_slice(text.as_bytes());
    image
}

/// A CD that boots (El Torito, no emulation) and prints its block 21.
fn cd(text: &str) -> Vec<u8> {
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

fn place() -> Value {
    json!({ "bus": 0, "device": 31, "function": 2 })
}

fn drive(id: &str, port: u8, image: Option<&Path>, cdrom: bool) -> Value {
    let image = image.map(|path| json!({ "format": "raw", "file": { "path": path }, "name": id }));
    let bus = json!({ "sata": { "controller": "sata0", "port": port } });
    json!({
        "id": id, "address": place(),
        "kind": { "disk": { "bus": bus, "cdrom": cdrom, "readonly": cdrom, "image": image } },
    })
}

/// A machine with SeaBIOS, and a disk, a CD and an empty drive at a controller; it boots from the first of `order`.
fn machine(rig: &mut Rig, order: &[&str]) {
    rig.config.memory_bytes = 128 << 20;
    rig.config.boot.kernel = None;
    rig.config.boot.firmware = Some(FirmwareConfig {
        rom: Resource::Path("/usr/share/seabios/bios-256k.bin".into()),
        serial_console: false,
        boot_menu_ms: None,
        boot_order: order.iter().copied().map(str::to_owned).collect(),
        retry_ms: None,
    });
    let file = |name: &str, content: Vec<u8>| -> PathBuf {
        let path = rig.path(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let disk = file("disk.img", disk("read from a disk"));
    let cd = file("cd.iso", cd("read from a CD"));
    let list = json!([
        { "id": "sata0", "address": place(), "kind": { "ahci": {} } },
        drive("disk", 0, Some(&disk), false),
        drive("cd", 1, Some(&cd), true),
        drive("empty", 5, None, true),
    ]);
    rig.config.devices = serde_json::from_value(list).unwrap();
}

fn has_seabios() -> bool {
    let there = Path::new("/usr/share/seabios/bios-256k.bin").exists();
    if !there {
        println!("left out: SeaBIOS needs the package seabios");
    }
    there
}

#[test]
fn seabios_boots_from_disk_and_cd_in_the_order_it_is_told() {
    if !has_seabios() {
        return;
    }
    for backend in backends() {
        for (order, expected) in [
            (&["disk", "cd"][..], "read from a disk"),
            (&["cd", "disk"], "read from a CD"),
            // An empty drive is passed over.
            (&["empty", "cd"], "read from a CD"),
        ] {
            let mut rig = Rig::new(backend, b"");
            machine(&mut rig, order);
            let code = rig.run();
            assert_eq!(code, 0x21, "{backend:?} {order:?}: {}", rig.stderr());
            assert_eq!(rig.serial(), expected, "{backend:?} {order:?}");
        }
    }
}

/// What can't be a SATA drive is refused by name.
#[test]
fn drives_without_their_place_are_refused() {
    let refused = |change: &dyn Fn(&mut Value), words: &str| {
        let mut rig = Rig::new(vmm_api::config::Backend::Soft, b"");
        machine(&mut rig, &[]);
        let mut list = serde_json::to_value(&rig.config.devices).unwrap();
        change(&mut list);
        rig.config.devices = serde_json::from_value(list).unwrap();
        assert_eq!(rig.run(), 1, "{words}");
        let said = rig.stderr();
        assert!(said.contains(words), "{words}: {said}");
    };
    if !has_seabios() {
        return;
    }
    let port =
        |list: &mut Value, port: u8| list[2]["kind"]["disk"]["bus"]["sata"]["port"] = port.into();
    refused(&|list| port(list, 0), "device cd: port 0 is taken");
    refused(&|list| port(list, 6), "device cd: there is no port 6");
    refused(
        &|list| list[2]["kind"]["disk"]["bus"]["sata"]["controller"] = "sata7".into(),
        "device cd: there is no SATA controller 'sata7'",
    );
    refused(
        &|list| list[1]["kind"]["disk"]["image"] = Value::Null,
        "device disk: a drive without a medium",
    );
    refused(
        &|list| list[1]["kind"]["disk"]["logical_block_size"] = 4096.into(),
        "device disk: SATA drives have logical blocks of 512 bytes",
    );
    refused(
        &|list| {
            list[2]["kind"]["disk"]["bus"] = "virtio".into();
            list[2]["address"]["device"] = 4.into();
        },
        "device cd: CD-ROM drives are at SATA controllers",
    );
}
