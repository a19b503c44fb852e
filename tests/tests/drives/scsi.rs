//! SCSI disks and CD-ROM drives, which come and go while the guest runs.

use super::*;
use vireo_tests::{both, both_refuse, which};

const VIRTIO: &str = "<controller type='scsi' index='0' model='virtio-scsi'/>";

fn scsi(dev: &str, source: &str, rest: &str) -> String {
    format!(
        "<disk type='file'><source file='{source}'/><target dev='{dev}' bus='scsi'/>{rest}</disk>"
    )
}

fn scsi_cd(dev: &str, source: &str) -> String {
    cdrom(dev, source, "").replace("bus='sata'", "bus='scsi'")
}

/// Kinds of events that were told of a domain's devices.
fn device_events(events: &Events, name: &str, last: &str) -> Vec<String> {
    let told = events.all_until(name, last);
    let kinds = ["device-added", "device-removed", "device-removal-failed"];
    let mine = told.into_iter().filter(|line| {
        let kind = line.split('\'').nth(1).unwrap_or_default();
        kinds.contains(&kind)
    });
    mine.collect()
}

/// The SCSI controllers of a running domain: index, model, id.
fn controllers(rig: &Rig, name: &str, args: &[&str]) -> Vec<String> {
    let xml = rig.vireo(&[&["dumpxml", name][..], args].concat()).ok();
    let all = xml.split("<controller type='scsi' ").skip(1);
    all.map(|own| {
        let own = own.split("</controller>").next().unwrap();
        let first = own.split('>').next().unwrap();
        let id = own.split("<alias name='").nth(1);
        let id = id.map_or("", |id| id.split('\'').next().unwrap());
        format!("{first} {id}").trim().to_owned()
    })
    .collect()
}

/// A kernel with the drivers: one that was made before there were SCSI controllers has none.
fn linux_with_scsi(rig: &Rig, name: &str, devices: &str) -> Option<Terminal> {
    let modules = Kernel::I386.folder().join("modules");
    if !std::fs::read_to_string(modules).is_ok_and(|list| list.contains("virtio_scsi")) {
        left_out("needs linux-image-686-pae:i386 with virtio_scsi (make test)");
        return None;
    }
    let mut terminal = linux(rig, name, devices)?;
    // What the kernel says of disks that come and go would be in the middle of other lines.
    terminal.send("echo 1 >/proc/sys/kernel/printk; echo QUI''ET\r");
    terminal.expect("QUIET\r\n", SOON);
    Some(terminal)
}

fn console(rig: &Rig, name: &str) -> Terminal {
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", name]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("\r");
    terminal.expect(&format!("{name}:/root# "), SOON);
    terminal
}

/// The size in sectors of the unit at that place, until it is so; "none" where there is none.
#[track_caller]
fn unit_is(guest: &mut Terminal, place: &str, wanted: &str) {
    let look = format!("cat /sys/bus/scsi/devices/{place}/block/*/size 2>/dev/null || echo none");
    shell_until(guest, &look, &format!("{wanted}\n"));
}

/// What libvirt says of new ones, and of those that go, is said in its words; where it has controllers, so do we.
#[test]
fn disks_and_controllers_come_and_go_as_by_libvirt() {
    let rig = Rig::new();
    let image = |name: &str| rig.write(name, vec![0; 1 << 20]);
    let (a, b, c) = (image("a.img"), image("b.img"), image("c.img"));
    let (iso, other) = (image("one.iso"), image("two.iso"));
    rig.vireo(&["list"]).ok();
    let events = Events::of(&rig);
    let ports: String = (1..=6)
        .map(|n| format!("<controller type='pci' index='{n}' model='pcie-root-port'/>"))
        .collect();
    let names = "<serial>S1</serial><wwn>5000c50015ea71aa</wwn><vendor>ACME</vendor><product>DISK</product>";
    let driver = "<driver queues='2' cmd_per_lun='9' iothread='1'/>";
    let controller = VIRTIO.replace("/>", &format!(">{driver}</controller>"));
    let devices = controller + &ports + &scsi("sda", &a, names);
    let xml = small(&rig, "guest", &devices);
    rig.define(&xml.replace("  <memory", "  <iothreads>1</iothreads>\n  <memory"));
    rig.virsh(&["start", "guest"]).ok();
    let shown = disk(&rig, "guest", "sda", &[]);
    for part in [
        "<wwn>5000c50015ea71aa</wwn>",
        "<vendor>ACME</vendor>",
        "<alias name='scsi0-0-0-0'/>",
        "<address type='drive' controller='0' bus='0' target='0' unit='0'/>",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let first = "index='0' model='virtio-scsi' scsi0";
    assert_eq!(controllers(&rig, "guest", &[]), [first]);

    // A name is enough; both definitions get it.
    let attach = |args: &[&str]| rig.virsh(&[&["attach-disk", "guest"][..], args].concat());
    attach(&[&b, "sdb", "--live", "--config"]).ok();
    for args in [&[][..], &["--inactive"]] {
        assert!(disk(&rig, "guest", "sdb", args).contains("target='0' unit='1'"));
    }
    let list = both(&rig, &["domblklist", "guest"]);
    assert!(list.contains(&format!(" sdb      {b}\n")), "{list}");
    let stats = both(&rig, &["domblkstat", "guest", "sdb"]);
    assert!(stats.contains("sdb rd_req 0\n"), "{stats}");
    rig.virsh(&["detach-disk", "guest", "sdb", "--live"]).ok();
    assert_eq!(
        device_events(&events, "guest", "device-removed"),
        [
            "event 'device-added' for domain 'guest': scsi0-0-0-1",
            "event 'device-removed' for domain 'guest': scsi0-0-0-1",
        ]
    );
    let refuse = |args: &[&str], words: &str| {
        let said = both_refuse(&rig, args);
        assert!(said.contains(words), "{args:?}: {said}");
    };
    refuse(
        &["detach-disk", "guest", "sdb", "--live"],
        "No disk found whose source path or target is sdb",
    );

    // One whose controller is not there brings it along, without a word of it.
    attach(&[&b, "sdh"]).ok();
    assert_eq!(
        controllers(&rig, "guest", &[]),
        [first, "index='1' model='virtio-scsi' scsi1"]
    );
    assert_eq!(controllers(&rig, "guest", &["--inactive"]).len(), 1);
    assert_eq!(
        device_events(&events, "guest", "device-added"),
        ["event 'device-added' for domain 'guest': scsi1-0-0-0"]
    );
    let file = |name: &str, xml: &str| rig.write(name, xml);
    let device = |what: &str, xml: &str, words: &str| {
        let path = file("device.xml", xml);
        refuse(&[what, "guest", &path, "--live"], words);
    };
    let second = VIRTIO.replace("'0'", "'1'");
    device(
        "detach-device",
        &second,
        "operation failed: device cannot be detached: device is busy",
    );
    device(
        "detach-device",
        &VIRTIO.replace("'0'", "'9'"),
        "device not found: controller scsi:9 not found",
    );
    device(
        "attach-device",
        VIRTIO,
        "operation failed: target scsi:0 already exists",
    );
    let sata = "<controller type='sata' index='1'/>";
    device(
        "attach-device",
        sata,
        "Operation not supported: 'sata' controller cannot be hot plugged.",
    );
    let lsilogic = "<controller type='scsi' model='lsilogic'/>";
    device(
        "attach-device",
        lsilogic,
        "model 'lsilogic': use virtio-scsi",
    );
    let thread = "<controller type='scsi' model='virtio-scsi'><driver iothread='7'/></controller>";
    device(
        "attach-device",
        thread,
        "controller iothread '7' not defined in iothreadid",
    );
    let place = "<address type='drive' controller='0' bus='0' target='0' unit='0'/>";
    device(
        "attach-device",
        &scsi("sdd", &c, place),
        "Requested operation is not valid: Domain already contains a disk with that address",
    );
    let place = place.replace("bus='0'", "bus='1'");
    device(
        "attach-device",
        &scsi("sdd", &c, &place),
        "SCSI controller only supports 1 bus",
    );
    let thread = scsi("sdd", &c, "<driver name='qemu' iothread='1'/>");
    device(
        "attach-device",
        &thread,
        "IOThreads not available for bus scsi target sdd",
    );
    let lun = "<disk type='block' device='lun'><source dev='/dev/null'/><target dev='sdd' bus='scsi'/></disk>";
    device("attach-device", lun, "disk 'sdd' (device 'lun')");
    let wwn = scsi("sda", &a, "<wwn>5000c50015ea71ab</wwn>");
    device(
        "update-device",
        &wwn,
        "cannot modify field 'wwn' of the disk",
    );
    refuse(
        &["iothreaddel", "guest", "1", "--live"],
        "cannot remove IOThread '1' since it is being used by controller",
    );
    // Nothing of that has come.
    assert_eq!(
        rig.vireo(&["domblklist", "guest"])
            .ok()
            .matches(" sd")
            .count(),
        2
    );

    // A place of its own far out, and a controller by itself.
    let place = "<address type='drive' controller='1' bus='0' target='200' unit='300'/>";
    let path = file("far.xml", &scsi("sdx", &c, place));
    rig.virsh(&["attach-device", "guest", &path]).ok();
    assert!(disk(&rig, "guest", "sdx", &[]).contains("<alias name='scsi1-0-200-300'/>"));
    let own = "<controller type='scsi'><driver queues='3'/></controller>";
    let path = file("own.xml", own);
    rig.virsh(&["attach-device", "guest", &path]).ok();
    assert_eq!(
        controllers(&rig, "guest", &[])[2],
        "index='2' model='virtio-scsi' scsi2"
    );
    assert_eq!(
        device_events(&events, "guest", ": scsi2"),
        [
            "event 'device-added' for domain 'guest': scsi1-0-200-300",
            "event 'device-added' for domain 'guest': scsi2",
        ]
    );

    // A CD-ROM drive comes empty or with a medium, and goes; what is attached to one that is there is its medium.
    attach(&["", "sde", "--type", "cdrom", "--targetbus", "scsi"]).ok();
    attach(&[&iso, "sdf", "--type", "cdrom", "--targetbus", "scsi"]).ok();
    attach(&[&other, "sde", "--type", "cdrom", "--targetbus", "scsi"]).ok();
    rig.virsh(&["change-media", "guest", "sdf", "--eject"]).ok();
    let list = both(&rig, &["domblklist", "guest"]);
    assert!(list.contains(&format!(" sde      {other}\n")), "{list}");
    assert!(list.contains(" sdf      -\n"), "{list}");
    for dev in ["sde", "sdf", "sdx"] {
        rig.virsh(&["detach-disk", "guest", dev]).ok();
    }
    let list = both(&rig, &["domblklist", "guest"]);
    assert_eq!(list.matches(" sd").count(), 2, "{list}");
    rig.vireo(&["destroy", "guest"]).ok();

    // The definition has the same, in words for definitions.
    let config = |what: &str, xml: &str, words: &str| {
        let path = file("device.xml", xml);
        refuse(&[what, "guest", &path, "--config"], words);
    };
    config(
        "attach-device",
        VIRTIO,
        "Requested operation is not valid: controller index='0' already exists",
    );
    config(
        "update-device",
        VIRTIO,
        "persistent update of device 'controller' is not supported",
    );
    config(
        "detach-device",
        &second,
        "device not found: device not present in domain configuration",
    );
    let place = "<address type='drive' controller='0' bus='0' target='0' unit='1'/>";
    config(
        "attach-device",
        &scsi("sdd", &c, place),
        "Requested operation is not valid: Domain already contains a disk with that address",
    );
    attach(&[&c, "sdo", "--config"]).ok();
    let all: Vec<String> = (0..3)
        .map(|index| format!("index='{index}' model='virtio-scsi'"))
        .collect();
    assert_eq!(controllers(&rig, "guest", &["--inactive"]), all);
    let caps = both(&rig, &["domcapabilities"]);
    assert!(caps.contains("<value>scsi</value>"), "{caps}");
}

/// Linux has disks and CD-ROM drives of a definition, and such that come while it runs; they go, too. It keeps them when it is
/// saved and moved.
#[test]
fn a_guest_sees_scsi_disks_and_drives_come_and_go() {
    let (rig, other) = (Rig::new(), Rig::new());
    other.vireo(&["list"]).ok();
    let one = medium(&rig, "one.iso", "word of one");
    let two = medium(&rig, "two.iso", "word of two");
    let image = |name: &str, mib: usize| rig.write(name, vec![0; mib << 20]);
    let (a, b, c) = (image("a.img", 4), image("b.img", 6), image("c.img", 8));
    let names = "<serial>S1</serial><wwn>5000c50015ea71aa</wwn><vendor>ACME</vendor><product>ROCKET</product>";
    let ports: String = (1..=6)
        .map(|n| format!("<controller type='pci' index='{n}' model='pcie-root-port'/>"))
        .collect();
    let devices = ports + &scsi("sda", &a, names) + &scsi_cd("sdb", &one);
    let Some(mut terminal) = linux_with_scsi(&rig, "scsi", &devices) else {
        return;
    };
    let guest = &mut terminal;
    unit_is(guest, "*:0:0:0", "8192");
    let facts = shell(
        guest,
        "cd /sys/bus/scsi/devices/*:0:0:0; cat vendor model wwid; tail -c +5 vpd_pg80; echo; cd",
    );
    // What was typed may be there twice, before and after the shell's own line editing begins.
    let said = "ACME    \nROCKET          \nnaa.5000c50015ea71aa\nS1\n";
    assert!(facts.ends_with(said), "{facts}");
    let mount = "mkdir -p /mnt; mount -t iso9660 /dev/sr0 /mnt && cat /mnt/word";
    shell_until(guest, mount, "word of one");
    shell(guest, "cp /mnt/eject /mnt/close /tmp; chmod +x /tmp/*");

    // The guest keeps the tray in, lets go, and has another medium; it opens the tray itself.
    let error = rig
        .virsh(&["change-media", "scsi", "sdb", "--eject"])
        .fails();
    assert!(
        error.contains("timed out waiting to open tray of 'sdb'"),
        "{error}"
    );
    shell(guest, "umount /mnt");
    rig.virsh(&["change-media", "scsi", "sdb", &two, "--update"])
        .ok();
    shell_until(guest, mount, "word of two");
    assert!(shell(guest, "umount /mnt; /tmp/eject; echo =$?").contains("=0\n"));
    let open = "<target dev='sdb' bus='scsi' tray='open'/>";
    let deadline = Instant::now() + SOON;
    while !disk(&rig, "scsi", "sdb", &[]).contains(open) {
        assert!(Instant::now() < deadline, "the tray is not out");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(shell(guest, "/tmp/close; echo =$?").contains("=0\n"));

    // A disk comes: at the controller that is there, then at one that comes with it.
    rig.virsh(&["attach-disk", "scsi", &b, "sdc"]).ok();
    unit_is(guest, "*:0:0:2", "12288");
    rig.virsh(&["attach-disk", "scsi", &c, "sdh"]).ok();
    unit_is(guest, "[1-9]*:0:0:0", "16384");
    let write = "cd /sys/bus/scsi/devices/*:0:0:2/block; yes vireo | dd of=/dev/$(echo *) bs=64k count=16 iflag=fullblock conv=fsync 2>/dev/null; cd";
    shell(guest, write);
    let stats = both(&rig, &["domblkstat", "scsi", "sdc"]);
    assert!(stats.contains("sdc wr_bytes 1048576\n"), "{stats}");
    assert!(std::fs::read(&b).unwrap().starts_with(b"vireo\nvireo\n"));
    // It grows.
    rig.virsh(&["blockresize", "scsi", "sdc", "8M"]).ok();
    unit_is(guest, "*:0:0:2", "16384");

    // Saved and moved, it has all of them still.
    drop(terminal);
    let saved = rig.path("saved").display().to_string();
    rig.vireo(&["save", "scsi", &saved]).ok();
    rig.vireo(&["restore", &saved]).ok();
    let mut terminal = console(&rig, "scsi");
    shell_until(&mut terminal, mount, "word of two");
    unit_is(&mut terminal, "*:0:0:2", "16384");
    let sum = "cd /sys/bus/scsi/devices/*:0:0:2/block; dd if=/dev/$(echo *) iflag=direct bs=64k count=1 2>/dev/null | head -c 11; cd";
    assert!(shell(&mut terminal, sum).contains("vireo\nvireo"));
    drop(terminal);
    let at = format!("unix://{}", other.path("incoming").display());
    let to = other.uri();
    let moved = [
        "migrate",
        "--live",
        "--unsafe",
        "scsi",
        "--migrateuri",
        &at,
        &to,
    ];
    rig.virsh(&moved).ok();
    let mut terminal = console(&other, "scsi");
    let guest = &mut terminal;
    assert!(shell(guest, sum).contains("vireo\nvireo"));
    assert!(shell(guest, "cat /mnt/word").contains("word of two"));

    // They go: the guest is told, and need not do anything. The controller goes after its disk, and with the guest's help.
    for (dev, place) in [("sdc", "*:0:0:2"), ("sdh", "[1-9]*:0:0:0")] {
        other.virsh(&["detach-disk", "scsi", dev]).ok();
        unit_is(guest, place, "none");
    }
    let file = other.write("second.xml", VIRTIO.replace("'0'", "'1'"));
    other.virsh(&["detach-device", "scsi", &file]).ok();
    let deadline = Instant::now() + SOON;
    while controllers(&other, "scsi", &[]).len() > 1 {
        assert!(Instant::now() < deadline, "the controller stays");
        std::thread::sleep(Duration::from_millis(50));
    }
    shell_until(guest, "ls /sys/class/scsi_host | wc -l", "1\n");
    // So does a drive, mounted or not.
    shell(guest, "umount /mnt");
    other.virsh(&["detach-disk", "scsi", "sdb"]).ok();
    shell_until(guest, "ls /sys/bus/scsi/devices | grep -c ':0:0:1$'", "0\n");
    other
        .virsh(&[
            "attach-disk",
            "scsi",
            &one,
            "sdb",
            "--type",
            "cdrom",
            "--targetbus",
            "scsi",
        ])
        .ok();
    shell_until(guest, mount, "word of one");
    drop(terminal);
    other.vireo(&["destroy", "scsi"]).ok();
}

/// Where controllers can't come, disks still do.
#[test]
fn machines_without_root_ports_have_disks_come_and_go() {
    let rig = Rig::new();
    let image = rig.write("a.img", vec![0; 1 << 20]);
    let xml = small(&rig, "guest", VIRTIO);
    let (before, after) = xml.split_once("<type").unwrap();
    let (_, after) = after.split_once('>').unwrap();
    rig.define(&format!("{before}<type machine='pc'>{after}"));
    rig.vireo(&["start", "guest"]).ok();
    let attach = |dev: &str| rig.virsh(&["attach-disk", "guest", &image, dev]);
    let error = attach("sdh").fails();
    assert!(
        error.contains("internal error: No more available PCI slots"),
        "{error}"
    );
    attach("sda").ok();
    let file = rig.write("controller.xml", VIRTIO);
    let error = rig.vireo(&["detach-device", "guest", &file]).fails();
    assert!(error.contains("device is busy"), "{error}");
    let stats = both(&rig, &["domstats", "guest", "--block"]);
    assert!(stats.contains("block.0.name=sda\n"), "{stats}");
    rig.virsh(&["blkdeviotune", "guest", "sda", "--total-iops-sec", "100"])
        .ok();
    let tuned = both(&rig, &["blkdeviotune", "guest", "sda"]);
    assert!(tuned.contains("total_iops_sec : 100\n"), "{tuned}");
    rig.virsh(&["detach-disk", "guest", "sda"]).ok();
    let list = both(&rig, &["domblklist", "guest"]);
    assert!(!list.contains(" sda "), "{list}");
    assert!(rig.vireo(&["detach-device", "guest", &file]).status != 0);
    // What is gone may be used by others: nobody holds the image's lock.
    rig.define(&small(&rig, "other", &scsi("sda", &image, "")));
    rig.vireo(&["start", "other"]).ok();
    rig.vireo(&["destroy", "other"]).ok();
    rig.vireo(&["destroy", "guest"]).ok();
}

/// A daemon may die with a disk, or the controller that it needs, on its way.
#[test]
fn the_next_daemon_knows_the_scsi_devices() {
    let rig = Rig::new();
    let image = rig.write("a.img", vec![0; 1 << 20]);
    let mut daemon = rig.daemon_killed_at("plug.noted");
    rig.define(&small(&rig, "guest", ""));
    rig.vireo(&["start", "guest"]).ok();
    let attach = || rig.vireo(&["attach-disk", "guest", &image, "sda"]);
    let seen = || {
        let disks = rig.vireo(&["domblklist", "guest"]).ok();
        (
            controllers(&rig, "guest", &[]).len(),
            disks.matches(" sd").count(),
        )
    };
    #[track_caller]
    fn comes_to(seen: impl Fn() -> (usize, usize), wanted: (usize, usize)) {
        let deadline = Instant::now() + SOON;
        while seen() != wanted {
            assert!(Instant::now() < deadline, "{:?}, not {wanted:?}", seen());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    // The controller is not there yet; then it is, and the disk is not; then both are.
    attach().fails();
    daemon.wait().unwrap();
    let mut daemon = rig.daemon_killed_at("plug.plugged");
    comes_to(seen, (0, 0));
    attach().fails();
    daemon.wait().unwrap();
    let mut daemon = rig.daemon_killed_at("plug.plugged");
    comes_to(seen, (1, 0));
    attach().fails();
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    comes_to(seen, (1, 1));
    let shown = disk(&rig, "guest", "sda", &[]);
    assert!(shown.contains("<alias name='scsi0-0-0-0'/>"), "{shown}");
    let stats = rig.vireo(&["domblkstat", "guest", "sda"]).ok();
    assert!(stats.contains("sda rd_req"), "{stats}");
    rig.vireo(&["detach-disk", "guest", "sda"]).ok();
    comes_to(seen, (1, 0));
    attach().ok();
    rig.vireo(&["destroy", "guest"]).ok();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn virt_install_imports_a_scsi_disk_and_the_bios_boots_it() {
    if !which("virt-install") || !install::bios() {
        return left_out("needs virt-install (virtinst) and seabios");
    }
    let rig = Rig::new();
    rig.vireo(&["list"]).ok();
    let mut disk = install::boot_sector("the SCSI disk begins");
    disk.resize(1 << 20, 0);
    let image = rig.write("disk.img", disk);
    let cd = iso::image("CD", &[], Some(&install::boot_sector("the CD begins")));
    let cd = rig.write("cd.iso", cd);
    for (name, more, says) in [
        (
            "one",
            &["--controller", "scsi,model=virtio-scsi"][..],
            "the SCSI disk begins",
        ),
        ("two", &[], "the SCSI disk begins"),
        ("three", &["--boot", "cdrom"], "the CD begins"),
    ] {
        let mut install = rig.stock("virt-install");
        let how = "--name NAME --memory 64 --virt-type qemu --osinfo detect=off,require=off --graphics none \
                   --network none --noautoconsole --wait 0 --import --disk";
        let how = how
            .split_whitespace()
            .map(|word| word.replace("NAME", name));
        install.arg("--connect").arg(rig.uri()).args(how);
        install.arg(format!("path={image},bus=scsi")).args(more);
        install
            .arg("--disk")
            .arg(format!("{cd},device=cdrom,bus=scsi"));
        let done = install.output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(
            said.contains("Domain is still running") || done.status.success(),
            "{said}\n{}",
            String::from_utf8_lossy(&done.stderr)
        );
        let mut console = Terminal::start(rig.command("vireo").args(["console", name]));
        console.expect(says, BOOT);
        drop(console);
        let live = rig.vireo(&["dumpxml", name]).ok();
        for part in [
            "<target dev='sda' bus='scsi'/>",
            "<target dev='sdb' bus='scsi'/>",
            "<controller type='scsi' index='0' model='virtio-scsi'>",
            "<alias name='scsi0-0-0-1'/>",
        ] {
            assert!(live.contains(part), "{part}: {live}");
        }
        rig.vireo(&["destroy", name]).ok();
        rig.vireo(&["undefine", name]).ok();
    }
}
