//! Drives of guests that are saved, moved, and copied.

use super::*;
use vireo_tests::which;

/// A guest that is saved and moved has its CD where it was, and its tray as it left it.
#[test]
fn a_guest_keeps_its_cd_when_it_is_saved_and_moved() {
    let (rig, other) = (Rig::new(), Rig::new());
    other.vireo(&["list"]).ok();
    let one = medium(&rig, "one.iso", "word of one");
    let two = medium(&rig, "two.iso", "word of two");
    let devices = cdrom("sda", &one, "") + &cdrom("sdb", "", "");
    let Some(mut terminal) = linux(&rig, "cd", &devices) else {
        return;
    };
    assert!(
        shell(
            &mut terminal,
            "mkdir /mnt; mount -t iso9660 /dev/sr0 /mnt; cat /mnt/word"
        )
        .contains("word of one")
    );
    shell(
        &mut terminal,
        "cp /mnt/eject /mnt/close /tmp; chmod +x /tmp/*; echo 3 >/proc/sys/vm/drop_caches",
    );
    drop(terminal);
    let console = |rig: &Rig| {
        let mut terminal = Terminal::start(rig.command("vireo").args(["console", "cd"]));
        terminal.expect("Escape character", SOON);
        terminal.wait_raw(SOON);
        terminal.send("\r");
        terminal.expect("cd:/root# ", SOON);
        terminal
    };
    let image = rig.path("image").display().to_string();
    rig.vireo(&["save", "cd", &image]).ok();
    rig.vireo(&["restore", &image]).ok();
    let mut terminal = console(&rig);
    assert!(shell(&mut terminal, "cat /mnt/word").contains("word of one"));
    // It still keeps the tray in.
    let error = rig.vireo(&["change-media", "cd", "sda", "--eject"]).fails();
    assert!(error.contains("timed out waiting to open tray"), "{error}");
    assert!(shell(&mut terminal, "umount /mnt; /tmp/eject; echo =$?").contains("=0\n"));
    let open = "<target dev='sda' bus='sata' tray='open'/>";
    let deadline = Instant::now() + SOON;
    while !disk(&rig, "cd", "sda", &[]).contains(open) {
        assert!(Instant::now() < deadline, "the tray is not out");
    }
    drop(terminal);
    rig.vireo(&["managedsave", "cd"]).ok();
    rig.vireo(&["start", "cd"]).ok();
    assert!(disk(&rig, "cd", "sda", &[]).contains(open));
    // A daemon that was away asks.
    rig.kill_daemon();
    let mut terminal = console(&rig);
    assert!(shell(&mut terminal, "/tmp/close; echo =$?").contains("=0\n"));
    let deadline = Instant::now() + SOON;
    while disk(&rig, "cd", "sda", &[]).contains("tray=") {
        assert!(Instant::now() < deadline, "the tray is out");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(
        shell(
            &mut terminal,
            "mount -t iso9660 /dev/sr0 /mnt; cat /mnt/word"
        )
        .contains("word of one")
    );
    shell(&mut terminal, "echo 3 >/proc/sys/vm/drop_caches");
    drop(terminal);

    // Where the medium is not, the guest does not go.
    let moves = |from: &Rig, to: &Rig| {
        let at = format!("unix://{}", to.path("incoming").display());
        from.virsh(&[
            "migrate",
            "--live",
            "--persistent",
            "cd",
            "--migrateuri",
            &at,
            &to.uri(),
        ])
    };
    let hidden = rig.path("hidden.iso");
    std::fs::rename(&one, &hidden).unwrap();
    let error = moves(&rig, &other).fails();
    assert!(error.contains("Cannot access storage file"), "{error}");
    std::fs::rename(&hidden, &one).unwrap();
    moves(&rig, &other).ok();
    let mut terminal = console(&other);
    assert!(shell(&mut terminal, "cat /mnt/word").contains("word of one"));
    shell(&mut terminal, "umount /mnt");
    other
        .vireo(&["change-media", "cd", "sda", &two, "--update"])
        .ok();
    shell_until(
        &mut terminal,
        "mount -t iso9660 /dev/sr0 /mnt; cat /mnt/word",
        "word of two",
    );
    drop(terminal);
    other.vireo(&["destroy", "cd"]).ok();
}

/// Snapshots pass over drives, and copies of a domain have the same ones.
#[test]
fn snapshots_and_copies_leave_media_alone() {
    copied("sata");
}

/// The same at a SCSI controller.
#[test]
fn snapshots_and_copies_of_scsi_disks() {
    copied("scsi");
}

fn copied(bus: &str) {
    let cdrom = |dev: &str, source: &str, rest: &str| {
        cdrom(dev, source, rest).replace("bus='sata'", &format!("bus='{bus}'"))
    };
    if !which("qemu-img") {
        return left_out("needs qemu-img");
    }
    let rig = Rig::new();
    let iso = rig.write("one.iso", vec![0; 1 << 20]);
    let image = rig.path("disk.qcow2").display().to_string();
    let made = rig
        .stock("qemu-img")
        .args(["create", "-q", "-f", "qcow2", &image, "1M"])
        .status();
    assert!(made.unwrap().success());
    let qcow2 = format!(
        "<disk type='file'><driver name='qemu' type='qcow2'/><source file='{image}'/>\
         <target dev='sdb' bus='{bus}'/></disk>"
    );
    let devices = cdrom("sda", &iso, "") + &qcow2 + &cdrom("sdc", "", "");
    rig.define(&small(&rig, "guest", &devices));
    rig.vireo(&["start", "guest"]).ok();
    // The same medium is in drives of several guests.
    rig.define(&small(&rig, "other", &cdrom("sda", &iso, "")));
    rig.vireo(&["start", "other"]).ok();
    rig.vireo(&["destroy", "other"]).ok();

    rig.virsh(&["snapshot-create-as", "guest", "s1", "--disk-only"])
        .ok();
    let snapshot = rig.vireo(&["snapshot-dumpxml", "guest", "s1"]).ok();
    for part in [
        "<disk name='sda' snapshot='no'/>",
        "<disk name='sdb' snapshot='external' type='file'>",
        "<disk name='sdc' snapshot='no'/>",
    ] {
        assert!(snapshot.contains(part), "{part}: {snapshot}");
    }
    let list = rig.vireo(&["domblklist", "guest"]).ok();
    assert!(
        list.contains(&format!(" sda      {iso}\n")) && list.contains("disk.s1"),
        "{list}"
    );
    rig.vireo(&[
        "blockcommit",
        "guest",
        "sdb",
        "--active",
        "--pivot",
        "--wait",
    ])
    .ok();
    rig.vireo(&["snapshot-delete", "guest", "s1", "--metadata"])
        .ok();
    rig.vireo(&["snapshot-create-as", "guest", "s2"]).ok();
    let snapshot = rig.vireo(&["snapshot-dumpxml", "guest", "s2"]).ok();
    assert!(
        snapshot.contains("<disk name='sda' snapshot='no'/>"),
        "{snapshot}"
    );
    assert!(
        snapshot.contains("<disk name='sdb' snapshot='internal'/>"),
        "{snapshot}"
    );
    rig.vireo(&["change-media", "guest", "sda", "--eject"]).ok();
    rig.vireo(&["snapshot-revert", "guest", "s2"]).ok();
    assert!(disk(&rig, "guest", "sda", &[]).contains("one.iso"));
    rig.vireo(&["snapshot-delete", "guest", "s2"]).ok();

    // A copy to another image, which the guest goes on with.
    let copy = rig.path("copy.qcow2").display().to_string();
    rig.vireo(&[
        "blockcopy",
        "guest",
        "sdb",
        &copy,
        "--transient-job",
        "--wait",
        "--pivot",
    ])
    .ok();
    assert!(disk(&rig, "guest", "sdb", &[]).contains("copy.qcow2"));
    let error = rig
        .vireo(&["blockcopy", "guest", "sdc", "/x", "--transient-job"])
        .fails();
    assert!(
        error.contains("has no source file") || error.contains("sdc"),
        "{error}"
    );
    rig.vireo(&["destroy", "guest"]).ok();

    if !which("virt-clone") {
        return left_out("needs virt-clone (virtinst)");
    }
    let mut clone = rig.stock("virt-clone");
    clone.args([
        "--connect",
        &rig.uri(),
        "--original",
        "guest",
        "--name",
        "copy",
    ]);
    let target = rig.path("clone.qcow2").display().to_string();
    let done = clone.args(["--file", &target]).output().unwrap();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let list = rig.vireo(&["domblklist", "copy", "--details"]).ok();
    assert!(
        list.contains(&format!(" file   cdrom    sda      {iso}\n")),
        "{list}"
    );
    assert!(list.contains(" file   cdrom    sdc      -\n"), "{list}");
    assert!(list.contains("clone.qcow2"), "{list}");
    rig.vireo(&["start", "copy"]).ok();
    rig.vireo(&["destroy", "copy"]).ok();
    rig.virsh(&["undefine", "copy", "--storage", "sdb"]).ok();
    assert!(std::path::Path::new(&iso).exists());
    assert!(!rig.path("clone.qcow2").exists());
}
