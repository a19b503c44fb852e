//! SeaBIOS and drives at a virtio-scsi controller: what it boots from, and what the BIOS's calls read.

mod common;

use std::path::{Path, PathBuf};

use common::bios::{cd, disk, has_seabios};
use common::{Rig, backends};
use serde_json::{Value, json};
use vmm_api::config::{FirmwareConfig, Resource};

fn place() -> Value {
    json!({ "bus": 0, "device": 5, "function": 0 })
}

fn drive(id: &str, (target, lun): (u8, u16), image: Option<&Path>, cdrom: bool) -> Value {
    let image = image.map(|path| json!({ "format": "raw", "file": { "path": path }, "name": id }));
    let bus = json!({ "scsi": { "controller": "scsi0", "target": target, "lun": lun } });
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
        { "id": "scsi0", "address": place(), "kind": { "scsi": {} } },
        drive("disk", (0, 0), Some(&disk), false),
        drive("cd", (1, 2), Some(&cd), true),
        drive("empty", (3, 0), None, true),
    ]);
    rig.config.devices = serde_json::from_value(list).unwrap();
}

#[test]
fn seabios_boots_from_scsi_disk_and_cd_in_the_order_it_is_told() {
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

/// What can't be at a SCSI controller is refused by name.
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
    let bus = |list: &mut Value, key: &str, value: Value| {
        list[2]["kind"]["disk"]["bus"]["scsi"][key] = value;
    };
    refused(
        &|list| {
            bus(list, "target", 0.into());
            bus(list, "lun", 0.into());
        },
        "device cd: SCSI: unit 0 of target 0 is taken",
    );
    refused(
        &|list| bus(list, "lun", 16384.into()),
        "device cd: SCSI: there is no unit 16384",
    );
    refused(
        &|list| bus(list, "controller", "scsi7".into()),
        "device cd: there is no SCSI controller 'scsi7'",
    );
    refused(
        &|list| list[1]["kind"]["disk"]["image"] = Value::Null,
        "device disk: a drive without a medium",
    );
    refused(
        &|list| list[1]["kind"]["disk"]["logical_block_size"] = 8192.into(),
        "device disk: SCSI: the logical block size is not a power of two between 512 and 4096",
    );
    refused(
        &|list| list[0]["kind"]["scsi"]["queues"] = 257.into(),
        "device scsi0: virtio-scsi: the number of queues is not between 1 and 256",
    );
    refused(
        &|list| list[0]["kind"]["scsi"]["iothread"] = 4.into(),
        "device scsi0",
    );
}
