//! SATA disks and CD-ROM drives as a Linux guest and SeaBIOS see them.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vireo_tests::drives::{devices, numbered, saved_in_use};
use vireo_tests::{Control, Guest, Kernel, Rig, iso, left_out, machine};
use vmm_api::config::Resource;
use vmm_api::control::{Answer, BlockJobNews, Call, Event, Tray};
use vmm_api::devices::{ImageConfig, IoThreadConfig};

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

#[test]
fn linux_uses_sata_disks_and_cds() {
    let Some(kernel) = kernel() else {
        return left_out("needs linux-image-686-pae:i386 (make test downloads it)");
    };
    let rig = Rig::new();
    let mut expected = numbered(24576);
    let disk = rig.write("disk.img", &expected);
    let text = "read from a CD\n".repeat(5000);
    let cd = rig.write(
        "cd.iso",
        iso::image("CD", &[("text.txt", text.as_bytes())], None),
    );
    let options = json!({
        "serial": "SN-42", "discard": true, "physical_block_size": 4096, "iothread": 1,
    });
    let cdrom = json!({ "cdrom": true, "readonly": true });
    let list = vec![
        controller(),
        drive("sata0-0-0", 0, Some(&disk), options),
        drive("sata0-0-1", 1, Some(&cd), cdrom.clone()),
        drive("sata0-0-5", 5, None, cdrom),
    ];
    let mut config = machine(kernel, devices(list));
    config.iothreads = vec![IoThreadConfig::new(1)];
    config.control = Some(Resource::Path(rig.path("control")));
    let mut guest = Guest::boot(&rig, &config, &[]);
    // Whoever serves the disk does it in its I/O thread's name.
    let tasks = format!("/proc/{}/task", guest.terminal().pid());
    let names = fs::read_dir(tasks)
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    let names: Vec<String> = names.collect();
    let count = |name: &str| names.iter().filter(|own| own.trim() == name).count();
    assert!(count("iothread1") >= 2, "{names:?}");
    assert_eq!(
        (count("sata 0"), count("sata 1"), count("sata 5")),
        (0, 1, 1),
        "{names:?}"
    );
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
    // A disk of another size: guests see it when they identify it again.
    let mut control = Control::connect(&rig.path("control"));
    let resize = Call::ResizeDisk {
        id: "sata0-0-0".into(),
        bytes: 16 << 20,
    };
    control.call(resize).unwrap();
    let stats = control.stats();
    let (_, stats) = stats
        .disks
        .iter()
        .find(|(id, _)| id == "sata0-0-0")
        .unwrap();
    assert_eq!((stats.capacity, stats.errors), (16 << 20, 0));
    assert!(stats.read_requests > 0 && stats.write_bytes >= 4 << 20 && stats.flush_requests > 0);
    guest.power_off();

    expected.resize(16 << 20, 0);
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
fn linux_sees_media_that_change() {
    let Some(kernel) = kernel() else {
        return left_out("needs linux-image-686-pae:i386 (make test downloads it)");
    };
    let rig = Rig::new();
    let [first, second] = ["first", "second"].map(|name| {
        rig.write(
            &format!("{name}.iso"),
            iso::image("CD", &[("name.txt", name.as_bytes())], None),
        )
    });
    let cdrom = json!({ "cdrom": true, "readonly": true });
    let list = vec![controller(), drive("cd", 0, None, cdrom)];
    let mut config = machine(kernel, devices(list));
    config.control = Some(Resource::Path(rig.path("control")));
    let mut guest = Guest::boot(&rig, &config, &[]);
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
    let moved = |control: &mut Control, open: bool| {
        let id = "cd".to_owned();
        control.event(|event| {
            *event
                == Event::TrayMoved {
                    id: id.clone(),
                    open,
                }
        });
    };
    let name = "mount -t iso9660 -o ro /dev/sr0 /mnt && cat /mnt/name.txt && umount /mnt";
    guest.run("mkdir -p /mnt").ok();
    assert_ne!(guest.run(name).status, 0, "empty");
    assert_eq!(drive_of(&mut control, "cd"), (Tray::default(), vec![]));

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
    let (tray, media) = drive_of(&mut control, "cd");
    assert_eq!((tray.locked, media), (true, vec![second]));
    guest.run("umount /mnt").ok();
    change(&mut control, Some(&first), false).unwrap();
    guest.run("mount -t iso9660 -o ro /dev/sr0 /mnt").ok();
    change(&mut control, None, true).unwrap();
    assert_eq!(drive_of(&mut control, "cd"), (Tray::default(), vec![]));
    guest.run("umount /mnt").ok();
    assert_ne!(guest.run(name).status, 0, "taken out");

    // The guest opens the tray itself, and closes it when it reads the next time.
    change(&mut control, Some(&first), false).unwrap();
    while let (Tray { open: true, .. }, _) = drive_of(&mut control, "cd") {}
    guest
        .run("echo 1 >/proc/sys/dev/cdrom/autoeject; dd if=/dev/sr0 of=/dev/null count=1")
        .ok();
    let (tray, media) = drive_of(&mut control, "cd");
    assert_eq!((tray.open, media), (true, vec![first.clone()]));
    guest.run("echo 0 >/proc/sys/dev/cdrom/autoeject").ok();
    assert_eq!(guest.run(name).ok(), "first");
    assert!(!drive_of(&mut control, "cd").0.open);
    let stats = control.stats();
    let (_, stats) = stats.disks.iter().find(|(id, _)| id == "cd").unwrap();
    assert!(
        stats.read_requests > 0 && stats.read_bytes > 0 && stats.errors == 0,
        "{stats:?}"
    );
    guest.power_off();
}

/// Without ACPI the interrupt's way is in the MP table; without MSI it is the pin's.
#[test]
fn linux_uses_sata_drives_without_acpi_and_msi() {
    let Some(kernel) = kernel() else {
        return left_out("needs linux-image-686-pae:i386 (make test downloads it)");
    };
    for (acpi, cmdline) in [(true, "pci=nomsi"), (false, "pci=nomsi"), (false, "")] {
        let rig = Rig::new();
        let content = numbered(4096);
        let disk = rig.write("disk.img", &content);
        let list = vec![controller(), drive("disk", 0, Some(&disk), json!({}))];
        let mut config = machine(kernel, devices(list));
        config.acpi = acpi;
        config.boot.cmdline = format!("console=ttyS0 quiet {cmdline}");
        let mut guest = Guest::boot(&rig, &config, &[]);
        let line = guest.run("grep ahci /proc/interrupts").ok();
        assert_eq!(
            line.contains("PCI-MSI"),
            cmdline.is_empty(),
            "acpi={acpi} {line}"
        );
        let read =
            "dd if=/dev/sda bs=512 skip=4000 count=1 2>/dev/null | hexdump -n 4 -e '1/4 \"%d\"'";
        assert_eq!(guest.run(read).ok(), "4000", "acpi={acpi} {cmdline}");
        let complaints = "dmesg | grep -cE 'exception|failed command|timeout|nobody cared'";
        assert_eq!(guest.run(complaints).output, "0\n");
        if acpi {
            guest.power_off();
        }
    }
}

#[test]
fn linux_is_saved_while_it_uses_its_drives() {
    let Some(kernel) = kernel() else {
        return left_out("needs linux-image-686-pae:i386 (make test downloads it)");
    };
    let rig = Rig::new();
    let disk = rig.write("disk.img", numbered(16384));
    let cd = rig.write(
        "cd.iso",
        iso::image("CD", &[("text.txt", &[b'x'; 3 << 20])], None),
    );
    let list = vec![
        controller(),
        drive("disk", 0, Some(&disk), json!({})),
        drive(
            "cd",
            1,
            Some(&cd),
            json!({ "cdrom": true, "readonly": true }),
        ),
    ];
    let mut config = machine(kernel, devices(list));
    config.control = Some(Resource::Path(rig.path("control")));
    // A terminal that outlives the process would not do: the guest's shell goes on where it was.
    let mut guest = Guest::boot(&rig, &config, &[]);
    guest = saved_in_use(&rig, &mut config, guest);
    let complaints = "dmesg | grep -cE 'exception|failed command|timeout'";
    assert_eq!(guest.run(complaints).output, "0\n");
    guest.power_off();
}

/// What is done to a disk while its guest runs, whichever bus it is on: limits, and another image.
#[test]
fn linux_goes_on_while_its_sata_disk_is_limited_and_copied() {
    let Some(kernel) = kernel() else {
        return left_out("needs linux-image-686-pae:i386 (make test downloads it)");
    };
    let rig = Rig::new();
    let content = numbered(32768);
    let disk = rig.write("disk.img", &content);
    let copy = rig.write("copy.img", vec![0; content.len()]);
    let list = vec![controller(), drive("disk", 0, Some(&disk), json!({}))];
    let mut config = machine(kernel, devices(list));
    config.control = Some(Resource::Path(rig.path("control")));
    let mut guest = Guest::boot(&rig, &config, &[]);
    let mut control = Control::connect(&rig.path("control"));
    let mut limit = |control: &mut Control, rate: u64| {
        let limits = json!({ "total_bytes": { "rate": rate, "burst": 0, "burst_seconds": 0 } });
        let call = Call::SetDiskLimits {
            id: "disk".into(),
            limits: serde_json::from_value(limits).unwrap(),
            group: None,
        };
        control.call(call).unwrap();
        let begun = Instant::now();
        guest
            .run("dd if=/dev/sda of=/dev/null bs=64k iflag=direct count=64 2>/dev/null")
            .ok();
        begun.elapsed()
    };
    // 4 MiB at 1 MiB a second, of which a tenth may come at once.
    let slow = limit(&mut control, 1 << 20);
    assert!(slow > Duration::from_millis(2500), "{slow:?}");
    let fast = limit(&mut control, 0);
    assert!(fast < slow, "{fast:?} without a limit, {slow:?} with one");

    guest
        .run(
            "(while [ ! -e /stop ]; do dd if=/dev/urandom of=/dev/sda bs=64k count=16 oflag=direct 2>/dev/null || \
             echo bad >>/bad; done; touch /stopped) &",
        )
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
    // From now on it is the other file that is written.
    let last = "touch /stop; while [ ! -e /stopped ]; do sleep 0.1; done; yes after | dd of=/dev/sda bs=64k seek=100 \
                count=4 iflag=fullblock oflag=direct conv=fsync 2>/dev/null; cat /bad 2>/dev/null; true";
    assert_eq!(guest.run(last).ok(), "");
    let complaints = "dmesg | grep -cE 'exception|failed command|timeout'";
    assert_eq!(guest.run(complaints).output, "0\n");
    guest.power_off();
    let (old, new) = (fs::read(&disk).unwrap(), fs::read(&copy).unwrap());
    let at = 100 * 65536;
    assert!(new[at..].starts_with(b"after\nafter\n"));
    assert!(old[at..at + 4 * 65536] == content[at..at + 4 * 65536]);
    assert!(
        new[at + 4 * 65536..] == content[at + 4 * 65536..],
        "what was copied"
    );
    assert!(new[1 << 20..at] == content[1 << 20..at], "what was copied");
}
