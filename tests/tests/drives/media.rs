//! Media that change while a guest runs.

use super::*;
use vireo_tests::{both, both_refuse};

fn tray(name: &str, open: bool) -> String {
    let reason = if open { "opened" } else { "closed" };
    format!("event 'tray-change' for domain '{name}' disk sata0-0-0: {reason}")
}

/// A Linux guest mounts what virsh puts in; it locks the tray, and lets go; it takes the medium out by itself.
#[test]
fn a_guest_sees_media_come_and_go() {
    let rig = Rig::new();
    let one = medium(&rig, "one.iso", "word of one");
    let two = medium(&rig, "two.iso", "word of two");
    rig.vireo(&["list"]).ok();
    let events = Events::of(&rig);
    let data = rig.write("data.img", vec![0; 4 << 20]);
    let sata = format!(
        "<disk type='file'><source file='{data}'/><target dev='sdb' bus='sata'/><serial>S1</serial></disk>"
    );
    let Some(mut terminal) = linux(&rig, "cd", &(cdrom("sda", &one, "") + &sata)) else {
        return;
    };
    let guest = &mut terminal;
    assert!(
        shell(
            guest,
            "mkdir /mnt; mount -t iso9660 /dev/sr0 /mnt; cat /mnt/word"
        )
        .contains("word of one")
    );
    assert!(shell(guest, "cat /sys/block/sda/size").contains("8192\n"));
    shell(guest, "cp /mnt/eject /mnt/close /tmp; chmod +x /tmp/*");

    // The guest keeps the tray in: it is asked, and waited for.
    let change = |args: &[&str]| rig.vireo(&[&["change-media", "cd", "sda"][..], args].concat());
    let began = Instant::now();
    let error = change(&["--eject"]).fails();
    assert!(
        error.contains("operation failed: timed out waiting to open tray of 'sda'"),
        "{error}"
    );
    assert!(
        began.elapsed() >= Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    assert!(disk(&rig, "cd", "sda", &[]).contains("one.iso"));
    assert!(shell(guest, "cat /mnt/word").contains("word of one"));

    // It lets go, and has another one.
    shell(guest, "umount /mnt");
    let done = rig
        .virsh(&["change-media", "cd", "sda", &two, "--update"])
        .ok();
    assert_eq!(done.trim(), "Successfully updated media.");
    let moved = events.take("cd", "closed");
    assert_eq!(moved, [tray("cd", true), tray("cd", false)]);
    assert!(shell(guest, "mount -t iso9660 /dev/sr0 /mnt; cat /mnt/word").contains("word of two"));
    // By force, from under the mount.
    assert_eq!(
        change(&["--eject", "--force"]).ok().trim(),
        "Successfully ejected media."
    );
    events.take("cd", "closed");
    let list = both(&rig, &["domblklist", "cd"]);
    assert!(list.contains(" sda      -\n"), "{list}");
    shell(guest, "umount /mnt");
    assert!(shell(guest, "mount -t iso9660 /dev/sr0 /mnt 2>&1").contains("No medium found"));
    assert_eq!(
        change(&["--insert", &one]).ok().trim(),
        "Successfully inserted media."
    );
    events.take("cd", "closed");
    shell_until(
        guest,
        "mount -t iso9660 /dev/sr0 /mnt; cat /mnt/word",
        "word of one",
    );

    // The guest's own eject: the tray is out, what lies in it is known still.
    assert!(shell(guest, "umount /mnt; /tmp/eject; echo =$?").contains("=0\n"));
    assert_eq!(events.take("cd", "opened"), [tray("cd", true)]);
    let open = disk(&rig, "cd", "sda", &[]);
    assert!(
        open.contains("<target dev='sda' bus='sata' tray='open'/>"),
        "{open}"
    );
    assert!(open.contains("one.iso"), "{open}");
    assert!(shell(guest, "/tmp/close; echo =$?").contains("=0\n"));
    assert_eq!(events.take("cd", "closed"), [tray("cd", false)]);
    assert!(!disk(&rig, "cd", "sda", &[]).contains("tray="));
    shell_until(
        guest,
        "mount -t iso9660 /dev/sr0 /mnt; cat /mnt/word",
        "word of one",
    );
    // A tray that is out already takes the other medium in.
    shell(guest, "umount /mnt; /tmp/eject");
    events.take("cd", "opened");
    change(&[&two]).ok();
    assert_eq!(events.take("cd", "closed"), [tray("cd", false)]);
    shell_until(
        guest,
        "mount -t iso9660 /dev/sr0 /mnt; cat /mnt/word",
        "word of two",
    );

    // The disk is one like any other.
    shell(guest, "dd if=/dev/urandom of=/dev/sda bs=1M count=4; sync");
    let stats = both(&rig, &["domblkstat", "cd", "sdb"]);
    assert!(stats.contains("sdb wr_bytes 4194304\n"), "{stats}");
    assert!(std::fs::read(&data).unwrap().iter().any(|byte| *byte != 0));
    drop(terminal);
    rig.vireo(&["destroy", "cd"]).ok();
}

/// What may change, in which definition, and in whose words it may not.
#[test]
fn changes_are_made_and_refused_as_by_libvirt() {
    let rig = Rig::new();
    let one = rig.write("one.iso", vec![0; 1 << 20]);
    let two = rig.write("two.iso", vec![0; 2 << 20]);
    let odd = "<address type='drive' controller='0' bus='0' target='0' unit='3'/>";
    let data = rig.write("data.img", vec![0; 1 << 20]);
    let sata =
        format!("<disk type='file'><source file='{data}'/><target dev='sdc' bus='sata'/></disk>");
    let devices = cdrom("sda", &one, "") + &cdrom("sdb", "", odd) + &sata;
    rig.define(&small(&rig, "guest", &devices));
    rig.vireo(&["start", "guest"]).ok();

    // As it starts: numbers of images, nothing of the format of what is not there.
    let empty = disk(&rig, "guest", "sdb", &[]);
    assert!(empty.contains("<driver name='qemu'/>"), "{empty}");
    assert!(!empty.contains("<source"), "{empty}");
    assert!(disk(&rig, "guest", "sda", &[]).contains(&format!("<source file='{one}' index='3'/>")));
    let live = rig.vireo(&["dumpxml", "guest"]).ok();
    assert!(live.contains("<alias name='sata0-0-3'/>"), "{live}");

    both_refuse(&rig, &["change-media", "guest", "sda"]);
    both_refuse(&rig, &["change-media", "guest", "sda", &two, "--insert"]);
    both_refuse(&rig, &["change-media", "guest", "sdb", "--eject"]);
    both_refuse(&rig, &["change-media", "guest", "sdb", "--update"]);
    both_refuse(&rig, &["change-media", "guest", "sdc", "--eject"]);
    let missing = both_refuse(
        &rig,
        &["change-media", "guest", "sda", "/nonexist", "--update"],
    );
    assert!(
        missing.contains("Cannot access storage file '/nonexist': No such file or directory"),
        "{missing}"
    );
    for args in [
        &["--eject"][..],
        &[&two, "--config"],
        &[&two, "--block"],
        &[],
    ] {
        let words = [&["change-media", "guest", "sda", "--print-xml"][..], args].concat();
        match args {
            [] => drop(both_refuse(&rig, &words)),
            _ => drop(both(&rig, &words)),
        }
    }
    // Each new medium has a number of its own, and the one that is not there, too.
    rig.virsh(&["change-media", "guest", "sda", "--eject"]).ok();
    let ejected = disk(&rig, "guest", "sda", &[]);
    assert!(ejected.contains("      <source index='"), "{ejected}");
    assert!(
        ejected.contains("<driver name='qemu' type='raw'/>"),
        "{ejected}"
    );
    both(
        &rig,
        &[
            "change-media",
            "guest",
            "sda",
            &two,
            "--insert",
            "--print-xml",
        ],
    );
    // Taking out what is not there is no error, once it was.
    rig.virsh(&["change-media", "guest", "sda", "--eject"]).ok();
    rig.vireo(&["change-media", "guest", "sda", &two, "--insert", "--live"])
        .ok();
    assert!(disk(&rig, "guest", "sda", &["--inactive"]).contains("one.iso"));
    rig.virsh(&["change-media", "guest", "sda", &two, "--update", "--config"])
        .ok();
    assert!(disk(&rig, "guest", "sda", &["--inactive"]).contains("two.iso"));
    rig.vireo(&[
        "change-media",
        "guest",
        "sdb",
        &one,
        "--insert",
        "--live",
        "--config",
    ])
    .ok();
    for view in [&[][..], &["--inactive"]] {
        assert!(disk(&rig, "guest", "sdb", view).contains("one.iso"));
    }
    let sizes = both(&rig, &["domblkinfo", "guest", "sda"]);
    assert!(sizes.contains("Capacity:       2097152\n"), "{sizes}");

    // By document.
    let update = |xml: &str, how: &str| {
        let file = rig.write("update.xml", xml);
        rig.virsh(&["update-device", "guest", &file, how])
    };
    let doc = |source: &str, target: &str, rest: &str| {
        format!(
            "<disk type='file' device='cdrom'><source file='{source}'/><target {target}/>{rest}</disk>"
        )
    };
    let sda = "dev='sda' bus='sata'";
    update(&doc(&one, sda, ""), "--live").ok();
    assert!(disk(&rig, "guest", "sda", &[]).contains("one.iso"));
    let field =
        |name: &str| format!("Operation not supported: cannot modify field '{name}' of the disk");
    for (xml, words) in [
        (doc(&two, "dev='sda'", ""), field("bus")),
        (doc(&two, "dev='sdb' bus='sata'", ""), field("address")),
        (doc(&two, sda, "<serial>x</serial>"), field("serial")),
        (doc(&two, sda, "<shareable/>"), field("shared")),
        (
            doc(&two, "dev='sda' bus='sata' tray='open'", ""),
            field("tray"),
        ),
        (
            doc(&two, sda, "<driver name='qemu' cache='none'/>"),
            field("cache"),
        ),
        (
            doc(
                &two,
                sda,
                "<iotune><total_iops_sec>5</total_iops_sec></iotune>",
            ),
            field("blkdeviotune total_iops_sec"),
        ),
        (
            doc(&two, sda, "<alias name='ua-x'/>"),
            "operation forbidden: changing device alias is not allowed".to_owned(),
        ),
        (doc(&two, "dev='sdc' bus='sata'", ""), field("device")),
        (
            doc(&two, "dev='sdx' bus='sata'", ""),
            "internal error: disk 'sdx' not found".to_owned(),
        ),
        (
            doc(&two, sda, "").replace("'cdrom'", "'floppy'"),
            "internal error: Invalid bus type 'sata' for floppy disk".to_owned(),
        ),
        (
            doc(&two, "dev='sdc' bus='sata'", "").replace("'cdrom'", "'disk'"),
            "unsupported configuration: disk source can be changed only in removable drives"
                .to_owned(),
        ),
        (
            doc(&two, "dev='vdx' bus='virtio'", ""),
            "internal error: disk 'vdx' not found".to_owned(),
        ),
    ] {
        let error = update(&xml, "--live").fails();
        assert!(error.contains(&words), "{xml}: {error}");
        assert!(disk(&rig, "guest", "sda", &[]).contains("one.iso"), "{xml}");
    }

    // What is attached to a drive is a medium; drives themselves stay.
    let attach = |args: &[&str]| rig.virsh(&[&["attach-disk", "guest", &two][..], args].concat());
    attach(&[
        "sda",
        "--targetbus",
        "sata",
        "--type",
        "cdrom",
        "--mode",
        "readonly",
    ])
    .ok();
    assert!(disk(&rig, "guest", "sda", &[]).contains("two.iso"));
    for (args, words) in [
        (
            &["sdd", "--targetbus", "sata", "--type", "cdrom"][..],
            "disk bus 'sata' cannot be hotplugged.",
        ),
        (
            &["sdd", "--targetbus", "sata"],
            "disk bus 'sata' cannot be hotplugged.",
        ),
        (
            &["vdc", "--targetbus", "virtio", "--type", "cdrom"],
            "disk type of 'vdc' does not support ejectable media",
        ),
        (
            &["fda", "--type", "floppy"],
            "floppy device hotplug isn't supported",
        ),
        (
            &["sda", "--targetbus", "sata", "--type", "cdrom", "--config"],
            "target sda already exists",
        ),
    ] {
        let error = attach(args).fails();
        assert!(error.contains(words), "{args:?}: {error}");
    }
    attach(&[
        "sde",
        "--targetbus",
        "sata",
        "--type",
        "cdrom",
        "--mode",
        "readonly",
        "--sourcetype",
        "file",
        "--config",
    ])
    .ok();
    let kept = disk(&rig, "guest", "sde", &["--inactive"]);
    assert!(
        kept.contains("<readonly/>") && kept.contains("unit='4'"),
        "{kept}"
    );
    // A drive with nothing in it.
    let nothing = [
        "attach-disk",
        "guest",
        "",
        "sdf",
        "--targetbus",
        "sata",
        "--type",
        "cdrom",
    ];
    both(&rig, &[&nothing[..], &["--print-xml"]].concat());
    rig.vireo(&[&nothing[..], &["--config"]].concat()).ok();
    let kept = disk(&rig, "guest", "sdf", &["--inactive"]);
    assert!(!kept.contains("<source"), "{kept}");
    rig.virsh(&["detach-disk", "guest", "sdf", "--config"]).ok();
    for (target, place) in [
        ("sdf", "sata:0.0.5"),
        ("sdf", "sata:0.5"),
        ("sdf", "pci:0.0.5.0"),
        ("hdc", "ide:0.1.0"),
        ("hdc", "sata:0.0.1"),
        ("vdc", "scsi:0.0.1"),
        ("vdc", "ccw:fe.0.0001"),
        ("sdf", "nowhere"),
    ] {
        let words = [
            "attach-disk",
            "guest",
            &two,
            target,
            "--address",
            place,
            "--print-xml",
        ];
        let (ours, theirs) = (rig.vireo(&words), rig.virsh(&words));
        assert_eq!(ours, theirs, "{target} {place}");
    }
    let detach = |dev: &str| rig.virsh(&["detach-disk", "guest", dev]).fails();
    assert!(detach("sda").contains("disk device type 'cdrom' cannot be detached"));
    assert!(detach("sdc").contains("This type of disk cannot be hot unplugged"));
    rig.virsh(&["detach-disk", "guest", "sde", "--config"]).ok();

    // Sizes and jobs of drives and disks.
    let error = both_refuse(&rig, &["blockresize", "guest", "sda", "3M"]);
    assert!(
        error.contains("can't resize empty or readonly disk 'sda'"),
        "{error}"
    );
    rig.vireo(&["blockresize", "guest", "sdc", "2M"]).ok();
    assert_eq!(std::fs::metadata(&data).unwrap().len(), 2 << 20);
    rig.vireo(&[
        "blkdeviotune",
        "guest",
        "sda",
        "--total-iops-sec",
        "100",
        "--live",
    ])
    .ok();
    let tune = both(&rig, &["blkdeviotune", "guest", "sda"]);
    assert!(tune.contains("total_iops_sec : 100\n"), "{tune}");
    rig.vireo(&["change-media", "guest", "sda", &one, "--update"])
        .ok();
    assert!(disk(&rig, "guest", "sda", &[]).contains("<total_iops_sec>100<"));
    let stats = both(&rig, &["domstats", "guest", "--block"]);
    assert!(stats.contains("block.count=3\n"), "{stats}");
    rig.vireo(&["destroy", "guest"]).ok();
}

/// A daemon that dies between the VMM and its record: the next one knows what is in the drive.
#[test]
fn a_medium_is_known_whenever_the_daemon_dies() {
    for (point, changed) in [("media.noted", false), ("media.changed", true)] {
        let rig = Rig::new();
        let one = rig.write("one.iso", vec![0; 1 << 20]);
        let two = rig.write("two.iso", vec![0; 2 << 20]);
        rig.define(&small(&rig, "guest", &cdrom("sda", &one, "")));
        rig.vireo(&["start", "guest"]).ok();
        rig.kill_daemon();
        let mut daemon = rig.daemon_killed_at(point);
        rig.vireo(&["change-media", "guest", "sda", &two, "--update"])
            .fails();
        daemon.wait().unwrap();
        let expected = if changed { "two.iso" } else { "one.iso" };
        let deadline = Instant::now() + SOON;
        while !disk(&rig, "guest", "sda", &[]).contains(expected) {
            assert!(Instant::now() < deadline, "{point}");
            std::thread::sleep(Duration::from_millis(50));
        }
        let sizes = rig.vireo(&["domblkinfo", "guest", "sda"]).ok();
        let capacity = if changed { 2 << 20 } else { 1 << 20 };
        assert!(
            sizes.contains(&format!("Capacity:       {capacity}\n")),
            "{point}: {sizes}"
        );
        // It can be changed as ever.
        rig.vireo(&["change-media", "guest", "sda", "--eject"]).ok();
        rig.vireo(&["change-media", "guest", "sda", &one, "--insert"])
            .ok();
        let folders = std::fs::read_dir(rig.path("run/vireo/domains")).unwrap();
        for folder in folders.flatten() {
            assert!(!folder.path().join("changing.xml").exists(), "{point}");
        }
        rig.vireo(&["destroy", "guest"]).ok();
    }
}

/// What Python's binding hears.
const LISTENER: &str = r#"
import libvirt, sys
libvirt.virEventRegisterDefaultImpl()
connection = libvirt.open(sys.argv[1])
def told(what):
    return lambda _, domain, *rest: print(what, domain.name(), *rest[:-1], flush=True)
for event in ["DISK_CHANGE", "TRAY_CHANGE"]:
    number = getattr(libvirt, "VIR_DOMAIN_EVENT_ID_" + event)
    connection.domainEventRegisterAny(None, number, told(event), None)
print("ready", flush=True)
while True:
    libvirt.virEventRunDefaultImpl()
"#;

#[test]
fn stock_clients_hear_of_trays_and_of_media_that_are_missing() {
    let has = std::process::Command::new("/usr/bin/python3")
        .args(["-c", "import libvirt"])
        .output();
    if !has.is_ok_and(|done| done.status.success()) {
        return left_out("needs python3-libvirt");
    }
    let rig = Rig::new();
    rig.vireo(&["list"]).ok();
    let mut python = rig
        .stock("/usr/bin/python3")
        .args(["-c", LISTENER, &rig.uri()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(python.stdout.take().unwrap()).lines();
    let mut heard = || lines.next().unwrap().unwrap();
    assert_eq!(heard(), "ready");
    let gone = rig.path("gone.iso").display().to_string();
    let iso = rig.write("one.iso", vec![0; 1 << 20]);
    // The seventh drive is at a second controller.
    let missing = cdrom("sdg", &gone, "").replace("<source ", "<source startupPolicy='optional' ");
    rig.define(&small(&rig, "guest", &(cdrom("sda", "", "") + &missing)));
    rig.virsh(&["start", "guest"]).ok();
    assert_eq!(
        heard(),
        format!("DISK_CHANGE guest {gone} None sata1-0-0 0")
    );
    rig.virsh(&["change-media", "guest", "sdg", &iso, "--insert"])
        .ok();
    assert_eq!(heard(), "TRAY_CHANGE guest sata1-0-0 0");
    assert_eq!(heard(), "TRAY_CHANGE guest sata1-0-0 1");
    rig.virsh(&["change-media", "guest", "sda", &iso, "--insert"])
        .ok();
    assert_eq!(heard(), "TRAY_CHANGE guest sata0-0-0 0");
    assert_eq!(heard(), "TRAY_CHANGE guest sata0-0-0 1");
    python.kill().unwrap();
    python.wait().unwrap();
    rig.vireo(&["destroy", "guest"]).ok();
}
