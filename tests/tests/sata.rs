//! SATA disks and CD-ROM drives as a Linux guest and SeaBIOS see them.

use std::fs;

use serde_json::{Value, json};
use vireo_tests::{Guest, Kernel, Rig, left_out, machine};
use vmm_api::devices::DeviceConfig;

fn devices(list: Vec<Value>) -> Vec<DeviceConfig> {
    let parsed = list.into_iter().map(serde_json::from_value);
    parsed.collect::<Result<_, _>>().unwrap()
}

fn place() -> Value {
    json!({ "bus": 0, "device": 31, "function": 2 })
}

fn controller() -> Value {
    json!({ "id": "sata0", "address": place(), "kind": { "ahci": { "ports": 6 } } })
}

/// A drive at a port; `more` is what else its configuration says.
fn drive(id: &str, port: u8, image: Option<&str>, more: Value) -> Value {
    let mut disk = json!({ "bus": { "sata": { "controller": "sata0", "port": port } } });
    if let Some(path) = image {
        disk["image"] = json!({ "format": "raw", "file": { "path": path }, "name": path });
    }
    for (key, value) in more.as_object().unwrap() {
        disk[key] = value.clone();
    }
    json!({ "id": id, "address": place(), "kind": { "disk": disk } })
}

/// A kernel with the drivers, if it is there.
fn kernel() -> Option<Kernel> {
    [Kernel::I386, Kernel::Generic6_1]
        .into_iter()
        .find(|kernel| kernel.is_there())
}

/// Sectors, each with its own number in it.
fn numbered(sectors: u32) -> Vec<u8> {
    (0..sectors)
        .flat_map(|n| [n.to_le_bytes(); 128].concat())
        .collect()
}

/// A CD (ISO 9660) with one file in its root.
fn iso(name: &str, content: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 2048;
    let blocks = 20 + content.len().div_ceil(BLOCK);
    let mut image = vec![0; blocks * BLOCK];
    let both = |n: usize| {
        let n = u32::try_from(n).unwrap();
        [n.to_le_bytes(), n.to_be_bytes()].concat()
    };
    // A directory record (ECMA-119, 9.1).
    let record = |block: usize, len: usize, directory: bool, name: &[u8]| {
        let mut record = vec![0, 0];
        record.extend(both(block));
        record.extend(both(len));
        record.extend([126, 1, 1, 0, 0, 0, 0]);
        record.extend([if directory { 2 } else { 0 }, 0, 0, 1, 0, 0, 1]);
        record.push(u8::try_from(name.len()).unwrap());
        record.extend(name);
        record.resize(record.len().next_multiple_of(2), 0);
        record[0] = u8::try_from(record.len()).unwrap();
        record
    };
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let volume = 16 * BLOCK;
    put(volume, b"\x01CD001\x01");
    put(volume + 80, &both(blocks));
    put(volume + 120, &[1, 0, 0, 1, 1, 0, 0, 1, 0, 8, 8, 0]);
    put(volume + 156, &record(18, BLOCK, true, &[0]));
    put(volume + 881, &[1]);
    put(17 * BLOCK, b"\xffCD001\x01");
    let entries = [
        record(18, BLOCK, true, &[0]),
        record(18, BLOCK, true, &[1]),
        record(20, content.len(), false, format!("{name};1").as_bytes()),
    ];
    put(18 * BLOCK, &entries.concat());
    put(20 * BLOCK, content);
    image
}

#[test]
fn linux_uses_sata_disks_and_cds() {
    let Some(kernel) = kernel() else {
        return left_out("needs linux-image-686-pae:i386 (make test downloads it)");
    };
    let rig = Rig::new();
    let mut expected = numbered(24576);
    let disk = rig.write("disk.img", &expected);
    let text = "read from a CD\n".repeat(5000);
    let cd = rig.write("cd.iso", iso("TEXT.TXT", text.as_bytes()));
    let options = json!({ "serial": "SN-42", "discard": true, "physical_block_size": 4096 });
    let cdrom = json!({ "cdrom": true, "readonly": true });
    let list = vec![
        controller(),
        drive("sata0-0-0", 0, Some(&disk), options),
        drive("sata0-0-1", 1, Some(&cd), cdrom.clone()),
        drive("sata0-0-5", 5, None, cdrom),
    ];
    let mut guest = Guest::boot(&rig, &machine(kernel, devices(list)), &[]);
    let facts = "cd /sys/block/sda; cat size device/queue_depth queue/physical_block_size device/model; \
                 tail -c +5 device/vpd_pg80 | tr -d ' '; echo; cat queue/write_cache";
    assert_eq!(
        guest.run(facts).ok(),
        "24576\n32\n4096\nVIREO HARDDISK  \nSN-42\nwrite back\n"
    );
    let sum = guest
        .run("sha256sum </dev/sda; dd if=/dev/sda bs=4k count=16 skip=7 2>/dev/null | sha256sum")
        .ok();
    let path = rig.path("part").display().to_string();
    fs::write(&path, &expected[7 * 4096..][..16 * 4096]).unwrap();
    let own = |path: &str| {
        let out = std::process::Command::new("sha256sum")
            .arg(path)
            .output()
            .unwrap();
        String::from_utf8(out.stdout).unwrap()[..64].to_owned()
    };
    assert_eq!(sum, format!("{}  -\n{}  -\n", own(&disk), own(&path)));
    // Several at a time, past the guest's cache, flushed.
    let write = "for i in 1 2 3 4; do yes vireo | dd of=/dev/sda bs=64k seek=$((i * 16)) count=16 \
                 iflag=fullblock oflag=direct conv=fsync 2>/dev/null || echo bad & done; wait; sync";
    assert_eq!(guest.run(write).ok(), "");
    guest.run("blkdiscard -o 8388608 -l 1048576 /dev/sda").ok();

    let mounted =
        "mkdir /cd && mount -t iso9660 -o ro /dev/sr0 /cd && ls /cd && sha256sum </cd/text.txt";
    fs::write(&path, &text).unwrap();
    assert_eq!(
        guest.run(mounted).ok(),
        format!("text.txt\n{}  -\n", own(&path))
    );
    assert_ne!(guest.run("dd if=/dev/zero of=/dev/sr0 count=1").status, 0);
    let empty = guest.run("dd if=/dev/sr1 of=/dev/null count=1");
    assert!(empty.output.contains("No medium found"), "{}", empty.output);
    let complaints = "dmesg | grep -cE 'exception|error|failed command|timeout|lost interrupt'";
    assert_eq!(guest.run(complaints).output, "0\n");
    guest.power_off();

    let written: Vec<u8> = b"vireo\n".iter().copied().cycle().take(1 << 20).collect();
    for i in 1..5 {
        expected[i << 20..][..1 << 20].copy_from_slice(&written);
    }
    let now = fs::read(&disk).unwrap();
    assert!(now[..8 << 20] == expected[..8 << 20], "what was written");
    assert!(now[9 << 20..] == expected[9 << 20..], "what was left alone");
    assert!(
        now[8 << 20..9 << 20].iter().all(|byte| *byte == 0),
        "what was discarded"
    );
}
