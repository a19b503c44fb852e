//! `domblkthreshold`: told once when a guest's write goes beyond an offset in an image's file.

use std::process::Command;
use std::time::Duration;

use vireo_tests::{Kernel, Rig, Terminal, both_refuse, left_out, linux_guest, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(90);

fn shell(terminal: &mut Terminal, line: &str) {
    terminal.send(&format!("{line}; echo DO''NE\r"));
    terminal.expect("DO''NE", SOON);
    terminal.expect("DONE\r\n", SOON);
}

#[test]
fn a_write_beyond_a_threshold_is_told_once() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let raw = rig.write("raw.img", vec![0; 4 << 20]);
    let base = rig.write("base.img", vec![0; 4 << 20]);
    let top = rig.path("top.qcow2").display().to_string();
    let made = Command::new("qemu-img")
        .args([
            "create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top,
        ])
        .status();
    assert!(made.unwrap().success());
    // One disk by io_uring, past the page cache; one by threads.
    let disk = |path: &str, format: &str, more: &str, target: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}' {more}/>\
             <source file='{path}'/><target dev='{target}' bus='virtio'/></disk>"
        )
    };
    let disks =
        disk(&raw, "raw", "cache='none' io='io_uring'", "vda") + &disk(&top, "qcow2", "", "vdb");
    rig.define(
        &linux_guest("deb", Kernel::V6_1).replace("</devices>", &format!("{disks}</devices>")),
    );
    let error = rig.vireo(&["domblkthreshold", "deb", "vda", "1M"]).fails();
    assert!(error.contains("domain is not running"), "{error}");
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    let threshold = |dev: &str| {
        let stats = rig.vireo(&["domstats", "deb", "--block"]).ok();
        let at = if dev == "vda" { "block.0" } else { "block.1" };
        let prefix = format!("{at}.threshold=");
        let own = stats
            .lines()
            .find_map(|line| line.trim().strip_prefix(&prefix).map(str::to_owned));
        own.map(|value| value.parse::<u64>().unwrap())
    };
    assert_eq!(threshold("vda"), None);
    let mut events = rig.listen("deb");
    rig.vireo(&["domblkthreshold", "deb", "vda", "1M"]).ok();
    rig.vireo(&["domblkthreshold", "deb", "vdb", "512K"]).ok();
    assert_eq!(
        (threshold("vda"), threshold("vdb")),
        (Some(1 << 20), Some(512 << 10))
    );
    // Up to there is not beyond.
    shell(
        &mut terminal,
        "dd if=/dev/urandom of=/dev/vda bs=4k count=256 conv=fsync 2>/dev/null",
    );
    assert_eq!(threshold("vda"), Some(1 << 20));
    shell(
        &mut terminal,
        "dd if=/dev/urandom of=/dev/vda bs=4k seek=300 count=1 conv=fsync 2>/dev/null",
    );
    let beyond = 301 * 4096 - (1 << 20);
    for dev in ["vda", "vda[2]"] {
        events.expect(
            &format!(
                "event 'block-threshold' for domain 'deb': dev: {dev}({raw}) 1048576 {beyond}"
            ),
            SOON,
        );
    }
    // Once.
    assert_eq!(threshold("vda"), None);
    shell(
        &mut terminal,
        "dd if=/dev/urandom of=/dev/vda bs=4k seek=400 count=1 conv=fsync 2>/dev/null",
    );
    // A qcow2 image's file is what counts: its clusters go where there is room.
    shell(
        &mut terminal,
        "dd if=/dev/urandom of=/dev/vdb bs=64k seek=40 count=16 conv=fsync 2>/dev/null",
    );
    events.expect(
        &format!("event 'block-threshold' for domain 'deb': dev: vdb({top}) 524288"),
        SOON,
    );
    assert_eq!(threshold("vdb"), None);
    // By an image's own name; and back.
    rig.vireo(&["domblkthreshold", "deb", "vda[2]", "2M"]).ok();
    assert_eq!(threshold("vda"), Some(2 << 20));
    rig.vireo(&["domblkthreshold", "deb", "vda", "0"]).ok();
    assert_eq!(threshold("vda"), None);
    // An image behind the top one, with its own sizes.
    rig.vireo(&["domblkthreshold", "deb", "vdb[3]", "3M"]).ok();
    let stats = rig.vireo(&["domstats", "deb", "--block", "--backing"]);
    let stats = stats.ok();
    for line in [
        format!("block.2.path={base}"),
        "block.2.allocation=0".to_owned(),
        "block.2.capacity=4194304".to_owned(),
        "block.2.physical=4194304".to_owned(),
        "block.2.threshold=3145728".to_owned(),
        "block.count=3".to_owned(),
    ] {
        assert!(stats.contains(&format!("  {line}\n")), "{line}: {stats}");
    }
    if which("virsh") {
        for dev in ["vdz", "vda[9]"] {
            both_refuse(&rig, &["domblkthreshold", "deb", dev, "1"]);
        }
    }
    rig.vireo(&["destroy", "deb"]).ok();
}
