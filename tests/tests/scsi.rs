//! virtio-scsi: disks and CD-ROM drives as a Linux guest sees them, and how they come and go.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vireo_tests::drives::{devices, numbered, saved_in_use};
use vireo_tests::{Control, Guest, Kernel, Rig, iso, left_out, machine};
use vmm_api::config::{MachineConfig, Resource};
use vmm_api::control::{Answer, BlockJobNews, Call, Event, Tray};
use vmm_api::devices::{DeviceConfig, ImageConfig, IoThreadConfig};

fn place(bus: u8) -> Value {
    json!({ "bus": bus, "device": if bus == 0 { 3 } else { 0 }, "function": 0 })
}

fn controller(more: Value) -> Value {
    json!({ "id": "scsi0", "address": place(0), "kind": { "scsi": more } })
}

/// A drive of controller `scsi0`; `more` is what else its configuration says.
fn drive(id: &str, (target, lun): (u8, u16), image: Option<&str>, more: Value) -> Value {
    let bus = json!({ "scsi": { "controller": "scsi0", "target": target, "lun": lun } });
    let mut disk = json!({ "bus": bus });
    if let Some(path) = image {
        disk["image"] = json!({ "format": "raw", "file": { "path": path }, "name": path });
    }
    for (key, value) in more.as_object().unwrap() {
        disk[key] = value.clone();
    }
    json!({ "id": id, "address": place(0), "kind": { "disk": disk } })
}

/// The same with its image among the descriptors that are passed along.
fn passed(id: &str, place: (u8, u16), image: Option<&str>, more: Value) -> DeviceConfig {
    let mut drive = drive(id, place, image, more);
    if image.is_some() {
        drive["kind"]["disk"]["image"]["file"] = json!({ "fd": 0 });
    }
    serde_json::from_value(drive).unwrap()
}

fn cdrom() -> Value {
    json!({ "cdrom": true, "readonly": true })
}

/// A kernel with the drivers, if it is there.
fn kernel() -> Option<Kernel> {
    let needed = |kernel: &Kernel| {
        let modules = kernel.folder().join("modules");
        kernel.is_there()
            && fs::read_to_string(modules).is_ok_and(|list| list.contains("virtio_scsi"))
    };
    [Kernel::I386, Kernel::Generic6_1]
        .into_iter()
        .find(|kernel| needed(kernel))
}

macro_rules! kernel_or_leave {
    () => {
        match kernel() {
            Some(kernel) => kernel,
            None => {
                return left_out("needs linux-image-686-pae:i386 with virtio_scsi (make test)");
            }
        }
    };
}

fn configured(rig: &Rig, kernel: Kernel, list: Vec<Value>) -> MachineConfig {
    let mut config = machine(kernel, devices(list));
    config.control = Some(Resource::Path(rig.path("control")));
    config
}

fn sum(path: &str) -> String {
    let out = std::process::Command::new("sha256sum").arg(path).output();
    String::from_utf8(out.unwrap().stdout).unwrap()[..64].to_owned()
}

/// The guest's kernel has nothing to say about its drives.
fn no_complaints(guest: &mut Guest) {
    let complaints = "dmesg | grep -E '(sd|sr)[a-z0-9]*[ :]|virtio_scsi|scsi' | \
                      grep -iE 'error|sense key|abort|timeout|timing out|warning|not found'; true";
    assert_eq!(guest.run(complaints).ok(), "");
}

/// Waits in the guest until a command succeeds.
fn until(guest: &mut Guest, what: &str) {
    let wait = format!(
        "i=0; until {what}; do sleep 0.05; i=$((i + 1)); [ $i -lt 400 ] || {{ echo never; break; }}; done"
    );
    assert_eq!(guest.run(&wait).ok(), "", "{what}");
}

/// Where the guest has a unit. Linux numbers units as they are written in eight bytes.
fn folder_of((target, lun): (u8, u16)) -> String {
    let lun = if lun < 256 { lun } else { lun | 0x4000 };
    format!("/sys/bus/scsi/devices/*:0:{target}:{lun}")
}

/// Waits until the guest has a unit no more. Its name may be another's by then.
fn left(guest: &mut Guest, place: (u8, u16)) {
    let folder = folder_of(place);
    until(guest, &format!("! ls -d {folder} >/dev/null 2>&1"));
}

/// The name that a unit has in the guest.
fn name_of(guest: &mut Guest, place: (u8, u16)) -> String {
    let folder = format!("{}/block", folder_of(place));
    until(guest, &format!("ls {folder}/ >/dev/null 2>&1"));
    let name = guest.run(&format!("ls {folder}")).ok().trim().to_owned();
    until(guest, &format!("[ -b /dev/{name} ]"));
    name
}

#[test]
fn linux_uses_scsi_disks_and_cds() {
    let kernel = kernel_or_leave!();
    let rig = Rig::new();
    let mut expected = numbered(24576);
    let disk = rig.write("disk.img", &expected);
    let large = rig.write("large.img", vec![0; 4 << 20]);
    let text = "read from a CD\n".repeat(5000);
    let cd = rig.write(
        "cd.iso",
        iso::image("CD", &[("text.txt", text.as_bytes())], None),
    );
    let options = json!({
        "serial": "SN-42", "wwn": 0x5000_c500_15ea_71ab_u64, "vendor": "ACME", "product": "ROCKET",
        "discard": true, "physical_block_size": 4096,
    });
    let list = vec![
        controller(json!({ "queues": 2, "iothread": 1, "cmd_per_lun": 16, "max_sectors": 256 })),
        drive("scsi0-0-0-0", (0, 0), Some(&disk), options),
        drive(
            "scsi0-0-0-300",
            (0, 300),
            Some(&large),
            json!({ "logical_block_size": 4096, "physical_block_size": 4096 }),
        ),
        drive("scsi0-0-2-1", (2, 1), Some(&cd), cdrom()),
        drive("scsi0-0-3-0", (3, 0), None, cdrom()),
    ];
    let mut config = configured(&rig, kernel, list);
    config.iothreads = vec![IoThreadConfig::new(1)];
    config.vcpus = 2;
    let mut guest = Guest::boot(&rig, &config, &[]);
    // Whoever serves the controller does it in its I/O thread's name.
    let tasks = format!("/proc/{}/task", guest.terminal().pid());
    let names = fs::read_dir(tasks)
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    let names: Vec<String> = names.collect();
    let count = |name: &str| names.iter().filter(|own| own.trim() == name).count();
    assert!(count("iothread1") >= 3 && count("scsi 0") == 0, "{names:?}");
    let first = name_of(&mut guest, (0, 0));
    let second = name_of(&mut guest, (0, 300));
    let (first_cd, empty_cd) = (name_of(&mut guest, (2, 1)), name_of(&mut guest, (3, 0)));
    let facts = format!(
        "cd /sys/block/{first}; cat size device/queue_depth queue/physical_block_size \
         queue/max_hw_sectors_kb device/vendor device/model; tail -c +5 device/vpd_pg80; echo; \
         cat device/wwid queue/write_cache device/scsi_level; ls mq | wc -l; \
         cat queue/discard_max_bytes queue/write_zeroes_max_bytes"
    );
    // 1 GiB at a time.
    let max_ws = 1u64 << 30;
    assert_eq!(
        guest.run(&facts).ok(),
        format!(
            "24576\n16\n4096\n128\nACME    \nROCKET          \nSN-42\n\
             naa.5000c50015ea71ab\nwrite back\n6\n2\n{max_ws}\n{max_ws}\n"
        )
    );
    let other =
        format!("cat /sys/block/{second}/size /sys/block/{second}/queue/logical_block_size");
    assert_eq!(guest.run(&other).ok(), "8192\n4096\n");
    let sums = format!(
        "sha256sum </dev/{first}; dd if=/dev/{first} bs=4k count=16 skip=7 2>/dev/null | sha256sum"
    );
    let path = rig.path("part").display().to_string();
    fs::write(&path, &expected[7 * 4096..][..16 * 4096]).unwrap();
    assert_eq!(
        guest.run(&sums).ok(),
        format!("{}  -\n{}  -\n", sum(&disk), sum(&path))
    );
    // Several at a time, past the guest's cache, flushed.
    let write = format!(
        "yes vireo | dd of=/pattern bs=64k count=16 iflag=fullblock 2>/dev/null; \
         for i in 1 2 3 4; do dd if=/pattern of=/dev/{first} bs=64k seek=$((i * 16)) count=16 \
         oflag=direct conv=fsync 2>/dev/null || echo bad & done; wait; sync"
    );
    assert_eq!(guest.run(&write).ok(), "");
    guest
        .run(&format!("blkdiscard -o 8388608 -l 1048576 /dev/{first}"))
        .ok();
    let zeroes = format!("blkdiscard -z -o 9437184 -l 1048576 /dev/{first} 2>&1 || echo no");
    let has_zeroes = !guest.run(&zeroes).ok().contains("no");
    let small = format!(
        "yes small | dd of=/dev/{second} bs=4k count=4 seek=9 conv=fsync iflag=fullblock 2>/dev/null"
    );
    guest.run(&small).ok();

    let mounted = format!(
        "mkdir /cd && mount -t iso9660 -o ro /dev/{first_cd} /cd && sha256sum </cd/text.txt"
    );
    fs::write(&path, &text).unwrap();
    assert_eq!(guest.run(&mounted).ok(), format!("{}  -\n", sum(&path)));
    assert_ne!(
        guest
            .run(&format!("dd if=/dev/zero of=/dev/{first_cd} count=1"))
            .status,
        0
    );
    let empty = guest.run(&format!("dd if=/dev/{empty_cd} of=/dev/null count=1"));
    assert!(empty.output.contains("No medium found"), "{}", empty.output);
    no_complaints(&mut guest);

    // A disk of another size: the guest is told.
    let mut control = Control::connect(&rig.path("control"));
    let resize = Call::ResizeDisk {
        id: "scsi0-0-0-0".into(),
        bytes: 16 << 20,
    };
    control.call(resize).unwrap();
    until(
        &mut guest,
        &format!("[ $(cat /sys/block/{first}/size) = 32768 ]"),
    );
    // The cache is turned off and on by the guest.
    let cache = format!("/sys/block/{first}/device/scsi_disk/*/cache_type");
    let turn = format!(
        "echo 'write through' >$(echo {cache}); cat {cache}; echo 'write back' >$(echo {cache}); cat {cache}"
    );
    assert_eq!(guest.run(&turn).ok(), "write through\nwrite back\n");
    let stats = control.stats();
    let (_, stats) = stats
        .disks
        .iter()
        .find(|(id, _)| id == "scsi0-0-0-0")
        .unwrap();
    assert_eq!((stats.capacity, stats.errors), (16 << 20, 0));
    assert!(stats.read_requests > 0 && stats.write_bytes >= 4 << 20 && stats.flush_requests > 0);
    guest.power_off();

    expected.resize(16 << 20, 0);
    let written: Vec<u8> = b"vireo\n".iter().copied().cycle().take(1 << 20).collect();
    for i in 1..5 {
        expected[i << 20..][..1 << 20].copy_from_slice(&written);
    }
    if has_zeroes {
        expected[9 << 20..10 << 20].fill(0);
    }
    let now = fs::read(&disk).unwrap();
    assert!(now[..8 << 20] == expected[..8 << 20], "what was written");
    assert!(now[9 << 20..] == expected[9 << 20..], "what was left alone");
    assert!(
        now[8 << 20..9 << 20].iter().all(|byte| *byte == 0),
        "what was discarded"
    );
    let now = fs::read(&large).unwrap();
    assert!(now[9 * 4096..13 * 4096].starts_with(b"small\nsmall\n"));
}

fn plug(control: &mut Control, device: DeviceConfig, image: &str) -> Result<(), String> {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let call = Call::AddDevice(Box::new(device));
    match control.ask(call, &[&file]) {
        Ok(_) => Ok(()),
        Err(failure) => Err(failure.message),
    }
}

fn unplug(control: &mut Control, id: &str) {
    control
        .call(Call::RemoveDevice { id: id.to_owned() })
        .unwrap();
    gone(control, id);
}

fn gone(control: &mut Control, id: &str) {
    control.event(|event| matches!(event, Event::DeviceRemoved { id: own } if own == id));
}

#[test]
fn scsi_disks_come_and_go_while_linux_runs() {
    let kernel = kernel_or_leave!();
    let rig = Rig::new();
    let [first, second, third] = [1, 2, 3].map(|n| {
        let name = format!("{n}.img");
        rig.write(&name, numbered(4096 * n))
    });
    let list = vec![
        controller(json!({})),
        drive("first", (0, 0), Some(&first), json!({})),
    ];
    let mut guest = Guest::boot(&rig, &configured(&rig, kernel, list), &[]);
    let mut control = Control::connect(&rig.path("control"));
    let is_there = |control: &mut Control, id: &str| match control.call(Call::Query).unwrap() {
        Answer::Status(status) => status.devices.unwrap().iter().any(|own| own == id),
        other => panic!("{other:?}"),
    };
    for round in 0..3 {
        plug(
            &mut control,
            passed("second", (0, 1), Some(&second), json!({ "serial": "two" })),
            &second,
        )
        .unwrap();
        assert!(is_there(&mut control, "second"));
        // A target of its own, beyond 255 units.
        plug(
            &mut control,
            passed("third", (200, 4000), Some(&third), json!({})),
            &third,
        )
        .unwrap();
        let two = name_of(&mut guest, (0, 1));
        let three = name_of(&mut guest, (200, 4000));
        let work = format!(
            "cat /sys/block/{two}/size /sys/block/{three}/size; echo round {round} | dd of=/dev/{two} conv=fsync 2>/dev/null; \
             dd if=/dev/{three} bs=512 skip=12000 count=1 2>/dev/null | hexdump -n 4 -e '1/4 \"%d\"'"
        );
        assert_eq!(guest.run(&work).ok(), "8192\n12288\n12000");
        unplug(&mut control, "second");
        assert!(!is_there(&mut control, "second"));
        left(&mut guest, (0, 1));
        unplug(&mut control, "third");
        left(&mut guest, (200, 4000));
        let text = fs::read(&second).unwrap();
        assert!(text.starts_with(format!("round {round}\n").as_bytes()));
    }
    // Places and names that are taken; a controller that is not there; what comes with its controller.
    let words = |result: Result<(), String>| result.unwrap_err();
    let at = |id: &str, place| passed(id, place, Some(&second), json!({}));
    assert_eq!(
        words(plug(&mut control, at("other", (0, 0)), &second)),
        "its place at the SCSI controller is taken"
    );
    assert_eq!(
        words(plug(&mut control, at("first", (0, 9)), &second)),
        "there is a device 'first' already"
    );
    let mut nowhere = serde_json::to_value(at("other", (0, 9))).unwrap();
    nowhere["kind"]["disk"]["bus"]["scsi"]["controller"] = "scsi7".into();
    let nowhere = serde_json::from_value(nowhere).unwrap();
    assert_eq!(
        words(plug(&mut control, nowhere, &second)),
        "there is no SCSI controller 'scsi7'"
    );
    // One that is in use when it goes; the guest sees errors, and goes on.
    guest.run("dmesg -n 1").ok();
    plug(&mut control, at("second", (0, 1)), &second).unwrap();
    let two = name_of(&mut guest, (0, 1));
    guest
        .run(&format!(
            "(while dd if=/dev/{two} of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done; touch /ended) &"
        ))
        .ok();
    unplug(&mut control, "second");
    until(&mut guest, "[ -e /ended ]");
    left(&mut guest, (0, 1));
    // A machine that stands still lets go at once, and tells its guest later.
    plug(&mut control, at("second", (0, 1)), &second).unwrap();
    name_of(&mut guest, (0, 1));
    control.call(Call::Pause).unwrap();
    unplug(&mut control, "second");
    plug(
        &mut control,
        passed("third", (1, 0), Some(&third), json!({})),
        &third,
    )
    .unwrap();
    control.call(Call::Resume).unwrap();
    left(&mut guest, (0, 1));
    name_of(&mut guest, (1, 0));
    let name = name_of(&mut guest, (0, 0));
    guest
        .run(&format!(
            "dd if=/dev/{name} of=/dev/null bs=64k 2>/dev/null"
        ))
        .ok();
    guest.power_off();
}

/// A controller of its own, plugged behind a root port, with a disk that follows.
#[test]
fn a_scsi_controller_comes_and_goes_while_linux_runs() {
    let kernel = kernel_or_leave!();
    let rig = Rig::new();
    let disk = rig.write("disk.img", numbered(4096));
    let port = json!({
        "id": "pci.1", "address": { "bus": 0, "device": 2, "function": 0 },
        "kind": { "root_port": { "index": 1, "chassis": 1, "port": 1, "hotplug": true } },
    });
    let list = vec![port, controller(json!({}))];
    let mut guest = Guest::boot(&rig, &configured(&rig, kernel, list), &[]);
    let mut control = Control::connect(&rig.path("control"));
    let plugged =
        json!({ "id": "scsi1", "address": place(1), "kind": { "scsi": { "queues": 1 } } });
    let own = |target: u8| {
        let mut device =
            serde_json::to_value(passed("disk", (target, 0), Some(&disk), json!({}))).unwrap();
        device["kind"]["disk"]["bus"]["scsi"]["controller"] = "scsi1".into();
        device["address"] = place(1);
        serde_json::from_value::<DeviceConfig>(device).unwrap()
    };
    for target in [5, 6] {
        let call = Call::AddDevice(Box::new(serde_json::from_value(plugged.clone()).unwrap()));
        control.call(call).unwrap();
        plug(&mut control, own(target), &disk).unwrap();
        let name = name_of(&mut guest, (target, 0));
        let read = format!(
            "dd if=/dev/{name} bs=512 skip=99 count=1 2>/dev/null | hexdump -n 4 -e '1/4 \"%d\"'"
        );
        assert_eq!(guest.run(&read).ok(), "99");
        // Its disk goes with it.
        control
            .call(Call::RemoveDevice { id: "scsi1".into() })
            .unwrap();
        gone(&mut control, "scsi1");
        gone(&mut control, "disk");
        left(&mut guest, (target, 0));
    }
    guest.power_off();
}

/// A drive's tray and media as the machine tells them.
fn drive_of(control: &mut Control, id: &str) -> (Tray, Vec<String>) {
    match control.call(Call::Disks).unwrap() {
        Answer::Disks(disks) => {
            let disk = disks.into_iter().find(|disk| disk.id == id).unwrap();
            (disk.tray.unwrap(), disk.images)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn linux_sees_scsi_media_that_change() {
    let kernel = kernel_or_leave!();
    let rig = Rig::new();
    let [first, second] = ["first", "second"].map(|name| {
        let image = iso::image("CD", &[("name.txt", name.as_bytes())], None);
        rig.write(&format!("{name}.iso"), image)
    });
    let list = vec![controller(json!({})), drive("cd", (0, 0), None, cdrom())];
    let mut guest = Guest::boot(&rig, &configured(&rig, kernel, list), &[]);
    let mut control = Control::connect(&rig.path("control"));
    let change = |control: &mut Control, path: Option<&str>, force: bool| {
        let file = path.map(|path| File::open(path).unwrap());
        let image = path.map(|path| {
            let image = json!({ "format": "raw", "file": { "fd": 0 }, "name": path });
            Box::new(serde_json::from_value::<ImageConfig>(image).unwrap())
        });
        let call = Call::ChangeMedium {
            id: "cd".into(),
            image,
            force,
        };
        let files: Vec<&File> = file.iter().collect();
        control.ask(call, &files)
    };
    let moved = |control: &mut Control, wanted: bool| {
        control.event(
            |event| matches!(event, Event::TrayMoved { id, open } if id == "cd" && *open == wanted),
        );
    };
    let name = "mount -t iso9660 -o ro /dev/sr0 /mnt && cat /mnt/name.txt && umount /mnt";
    assert_eq!(name_of(&mut guest, (0, 0)), "sr0");
    guest.run("mkdir -p /mnt").ok();
    assert_ne!(guest.run(name).status, 0, "empty");
    change(&mut control, Some(&first), false).unwrap();
    moved(&mut control, true);
    moved(&mut control, false);
    assert_eq!(drive_of(&mut control, "cd").1, vec![first.clone()]);
    assert_eq!(guest.run(name).ok(), "first");
    change(&mut control, Some(&second), false).unwrap();
    assert_eq!(guest.run(name).ok(), "second");
    // Mounted, the guest locks the tray: not without force.
    guest.run("mount -t iso9660 -o ro /dev/sr0 /mnt").ok();
    let refused = change(&mut control, Some(&first), false).unwrap_err();
    assert!(refused.locked, "{refused:?}");
    assert!(drive_of(&mut control, "cd").0.locked);
    change(&mut control, None, true).unwrap();
    assert_eq!(drive_of(&mut control, "cd"), (Tray::default(), vec![]));
    guest.run("umount /mnt").ok();
    assert_ne!(guest.run(name).status, 0, "taken out");
    // The guest opens the tray itself.
    change(&mut control, Some(&first), false).unwrap();
    while let (Tray { open: true, .. }, _) = drive_of(&mut control, "cd") {}
    guest
        .run("echo 1 >/proc/sys/dev/cdrom/autoeject; dd if=/dev/sr0 of=/dev/null count=1")
        .ok();
    assert!(drive_of(&mut control, "cd").0.open);
    guest.run("echo 0 >/proc/sys/dev/cdrom/autoeject").ok();
    assert_eq!(guest.run(name).ok(), "first");
    // The whole drive goes, medium and all.
    unplug(&mut control, "cd");
    left(&mut guest, (0, 0));
    guest.power_off();
}

#[test]
fn linux_is_saved_while_it_uses_its_scsi_drives() {
    let kernel = kernel_or_leave!();
    let rig = Rig::new();
    let disk = rig.write("disk.img", numbered(16384));
    let cd = rig.write(
        "cd.iso",
        iso::image("CD", &[("text.txt", &[b'x'; 3 << 20])], None),
    );
    let list = vec![
        controller(json!({ "queues": 2 })),
        drive("disk", (0, 0), Some(&disk), json!({})),
        drive("cd", (1, 0), Some(&cd), cdrom()),
    ];
    let mut config = configured(&rig, kernel, list);
    let mut guest = Guest::boot(&rig, &config, &[]);
    assert_eq!(name_of(&mut guest, (0, 0)), "sda");
    assert_eq!(name_of(&mut guest, (1, 0)), "sr0");
    guest = saved_in_use(&rig, &mut config, guest);
    no_complaints(&mut guest);
    guest.power_off();
}

/// A disk that its limits slow down holds up no other at the same controller.
#[test]
fn a_scsi_disk_that_is_limited_holds_up_no_other() {
    let kernel = kernel_or_leave!();
    let rig = Rig::new();
    let [slow, fast] =
        ["slow", "fast"].map(|name| rig.write(&format!("{name}.img"), vec![1; 8 << 20]));
    let list = vec![
        controller(json!({ "queues": 1 })),
        drive("slow", (0, 0), Some(&slow), json!({})),
        drive("fast", (0, 1), Some(&fast), json!({})),
    ];
    let mut guest = Guest::boot(&rig, &configured(&rig, kernel, list), &[]);
    let mut control = Control::connect(&rig.path("control"));
    let limits = json!({ "total_bytes": { "rate": 65536, "burst": 0, "burst_seconds": 0 } });
    let call = Call::SetDiskLimits {
        id: "slow".into(),
        limits: serde_json::from_value(limits).unwrap(),
        group: None,
    };
    control.call(call).unwrap();
    let (slow, fast) = (name_of(&mut guest, (0, 0)), name_of(&mut guest, (0, 1)));
    // 8 MiB at 64 KiB a second: two minutes.
    guest
        .run(&format!(
            "(dd if=/dev/{slow} of=/dev/null bs=1M; touch /slow) 2>/dev/null &"
        ))
        .ok();
    let begun = Instant::now();
    guest
        .run(&format!(
            "dd if=/dev/{fast} of=/dev/null bs=1M iflag=direct"
        ))
        .ok();
    assert_eq!(guest.run("ls /slow 2>/dev/null; true").ok(), "");
    assert!(
        begun.elapsed() < Duration::from_secs(60),
        "{:?}",
        begun.elapsed()
    );
    guest.kill();
}

/// A block job is to a disk what it is on any other bus: another image is written from now on.
#[test]
fn a_scsi_disk_goes_on_with_a_copy() {
    let kernel = kernel_or_leave!();
    let rig = Rig::new();
    let content = numbered(16384);
    let disk = rig.write("disk.img", &content);
    let copy = rig.write("copy.img", vec![0; content.len()]);
    let list = vec![
        controller(json!({})),
        drive("disk", (0, 0), Some(&disk), json!({})),
    ];
    let mut guest = Guest::boot(&rig, &configured(&rig, kernel, list), &[]);
    let mut control = Control::connect(&rig.path("control"));
    let name = name_of(&mut guest, (0, 0));
    guest
        .run(&format!(
            "(while [ ! -e /stop ]; do dd if=/dev/zero of=/dev/{name} bs=64k count=16 oflag=direct 2>/dev/null || \
             echo bad >>/bad; done; touch /stopped) &"
        ))
        .ok();
    let to = json!({ "format": "raw", "file": { "fd": 0 }, "name": copy });
    let job = json!({ "copy": {
        "image": to, "shallow": false, "zeroed": true, "synchronous": true, "granularity": 0, "buffer": 0,
    } });
    let start = Call::StartBlockJob {
        disk: "disk".into(),
        job: serde_json::from_value(job).unwrap(),
        speed: 0,
    };
    let file = File::options().read(true).write(true).open(&copy).unwrap();
    control.ask(start, &[&file]).unwrap();
    // A disk with a job does not go.
    let remove = Call::RemoveDevice { id: "disk".into() };
    control.call(remove).unwrap_err();
    let wait = |control: &mut Control, wanted: BlockJobNews| {
        control.event(|event| matches!(event, Event::BlockJob { news, .. } if *news == wanted));
    };
    wait(&mut control, BlockJobNews::Ready);
    let disk_name = || "disk".to_owned();
    let end = Call::EndBlockJob {
        disk: disk_name(),
        pivot: true,
    };
    control.call(end).unwrap();
    wait(&mut control, BlockJobNews::Completed);
    control
        .call(Call::SettleBlockJob { disk: disk_name() })
        .unwrap();
    let last = format!(
        "touch /stop; while [ ! -e /stopped ]; do sleep 0.1; done; echo after | dd of=/dev/{name} bs=64k seek=100 \
         conv=fsync 2>/dev/null; cat /bad 2>/dev/null; true"
    );
    assert_eq!(guest.run(&last).ok(), "");
    no_complaints(&mut guest);
    guest.power_off();
    let (old, new) = (fs::read(&disk).unwrap(), fs::read(&copy).unwrap());
    let at = 100 * 65536;
    assert!(new[at..].starts_with(b"after\n"));
    assert!(old[at..] == content[at..]);
    assert!(new[at + 4096..] == content[at + 4096..], "what was copied");
    assert!(new[1 << 20..at] == content[1 << 20..at], "what was copied");
}
