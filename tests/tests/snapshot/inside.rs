//! Snapshots inside qcow2 images.

use super::*;

#[test]
fn snapshots_inside_images_are_taken_gone_back_to_and_deleted() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let image = with_disk(&rig, "one");
    let first_bytes = |n: usize| -> Vec<u8> {
        let bytes = content(&rig, &image);
        (0..n).map(|at| bytes[at << 16]).collect()
    };
    write(&image, "0", "1");
    // Names that are other snapshots' numbers in the image.
    rig.vireo(&["snapshot-create-as", "one", "2"]).ok();
    write(&image, "0", "2");
    write(&image, "64k", "2");
    rig.vireo(&["snapshot-create-as", "one", "1"]).ok();
    write(&image, "0", "3");
    rig.vireo(&["snapshot-create-as", "one", "leaf"]).ok();
    assert_eq!(inside(&image), ["2", "1", "leaf"]);
    let list = rig
        .vireo(&["snapshot-list", "one", "--name", "--internal"])
        .ok();
    assert_eq!(list.split_whitespace().count(), 3);
    let xml = rig.vireo(&["snapshot-dumpxml", "one", "2"]).ok();
    assert!(
        xml.contains("<disk name='vda' snapshot='internal'/>"),
        "{xml}"
    );
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    rig.vireo(&["snapshot-revert", "one", "2"]).ok();
    assert_eq!(first_bytes(2), [1, 0]);
    assert_eq!(rig.state("one"), "shut off (from snapshot)");
    write(&image, "0", "9");
    rig.vireo(&["snapshot-create-as", "one", "branch"]).ok();
    let tree = rig.vireo(&["snapshot-list", "one", "--tree"]).ok();
    let lines: Vec<&str> = tree.lines().map(str::trim_end).collect();
    let expected = [
        "2",
        "  |",
        "  +- 1",
        "  |   |",
        "  |   +- leaf",
        "  |",
        "  +- branch",
    ];
    assert_eq!(lines[..7], expected, "{tree}");
    rig.vireo(&["snapshot-revert", "one", "leaf"]).ok();
    assert_eq!(first_bytes(2), [3, 2]);
    rig.vireo(&["snapshot-delete", "one", "1", "--children-only"])
        .ok();
    assert_eq!(inside(&image), ["2", "1", "branch"]);
    rig.vireo(&["snapshot-revert", "one", "1"]).ok();
    assert_eq!(first_bytes(2), [2, 2]);
    rig.vireo(&["snapshot-delete", "one", "branch", "--metadata"])
        .ok();
    assert_eq!(inside(&image), ["2", "1", "branch"]);
    let taken = rig.vireo(&["snapshot-create-as", "one", "branch"]).fails();
    assert!(taken.contains("has a snapshot 'branch' already"), "{taken}");
    // Something on top of the image: its content must not change beneath it.
    rig.vireo(&["snapshot-create-as", "one", "over", "--disk-only"])
        .ok();
    let error = rig.vireo(&["snapshot-revert", "one", "2"]).fails();
    assert!(error.contains("delete that snapshot first"), "{error}");
    rig.vireo(&["snapshot-delete", "one", "over"]).ok();
    rig.vireo(&["snapshot-revert", "one", "2", "--paused"]).ok();
    assert!(rig.state("one").starts_with("paused"));
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(first_bytes(2), [1, 0]);
    rig.vireo(&["snapshot-delete", "one", "2", "--children"])
        .ok();
    assert_eq!(inside(&image), ["branch"]);
    qemu_img(&["check", "-q", &image]);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn a_running_domain_has_snapshots_inside_its_images() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let image = with_disk(&rig, "one");
    write(&image, "0", "1");
    rig.vireo(&["start", "one"]).ok();
    answers(&rig, "one");
    rig.vireo(&["snapshot-create-as", "one", "first"]).ok();
    assert_eq!(rig.state("one"), "running (unpaused)");
    answers(&rig, "one");
    rig.vireo(&["suspend", "one"]).ok();
    rig.vireo(&["snapshot-create-as", "one", "second"]).ok();
    assert_eq!(rig.state("one"), "paused (user)");
    assert_eq!(inside(&image), ["first", "second"]);
    let xml = rig.vireo(&["snapshot-dumpxml", "one", "first"]).ok();
    assert!(xml.contains("<memory snapshot='internal'/>"), "{xml}");
    assert!(xml.contains("<state>running</state>"), "{xml}");
    let list = rig
        .vireo(&["snapshot-list", "one", "--name", "--active"])
        .ok();
    assert_eq!(list.split_whitespace().count(), 2);
    rig.vireo(&["snapshot-revert", "one", "first"]).ok();
    assert_eq!(rig.state("one"), "running (from snapshot)");
    answers(&rig, "one");
    rig.vireo(&["snapshot-revert", "one", "second"]).ok();
    assert_eq!(rig.state("one"), "paused (from snapshot)");
    rig.vireo(&["snapshot-revert", "one", "second", "--running"])
        .ok();
    answers(&rig, "one");
    // While it runs.
    rig.vireo(&["snapshot-delete", "one", "first"]).ok();
    assert_eq!(inside(&image), ["second"]);
    answers(&rig, "one");
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(content(&rig, &image)[0], 1);
    qemu_img(&["check", "-q", &image]);
    // From off, into the memory of then.
    rig.vireo(&["snapshot-revert", "one", "second", "--running"])
        .ok();
    answers(&rig, "one");
    rig.vireo(&["snapshot-create-as", "one", "third", "--halt"])
        .ok();
    assert_eq!(rig.state("one"), "shut off (from snapshot)");
    rig.vireo(&["snapshot-delete", "one", "second", "--children"])
        .ok();
    assert!(inside(&image).is_empty());
    assert!(!rig.path("var/lib/vireo/snapshots/one").exists());
    // A raw disk has no inside.
    let raw = rig.write("two.img", vec![0; 1 << 20]);
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
         <source file='{raw}'/><target dev='vda' bus='virtio'/></disk>\n    <console"
    );
    rig.define(&tiny_guest(&rig, "two", "qemu").replace("<console", &device));
    rig.vireo(&["start", "two"]).ok();
    let error = rig.vireo(&["snapshot-create-as", "two", "x"]).fails();
    assert!(
        error.contains("unsupported for storage type raw"),
        "{error}"
    );
}

#[test]
fn a_crash_at_any_point_leaves_no_half_snapshot_inside() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    for (point, running) in [
        ("snapshot.noted", true),
        ("snapshot.memory", true),
        ("vmm.disk-snapshot", true),
        ("snapshot.inside", true),
        ("snapshot.made", true),
        ("snapshot.noted", false),
        ("snapshot.inside", false),
        ("snapshot.made", false),
    ] {
        let rig = Rig::new();
        let mut daemon = rig.daemon_killed_at(point);
        let image = with_disk(&rig, "one");
        write(&image, "0", "1");
        if running {
            rig.vireo(&["start", "one"]).ok();
        }
        let run = rig.vireo(&["snapshot-create-as", "one", "all"]);
        assert_ne!(run.status, 0, "{point}");
        if point.starts_with("vmm.") {
            rig.wait_state("one", "shut off (crashed)", SOON);
            daemon.kill().unwrap();
        }
        daemon.wait().unwrap();
        let mut next = rig.daemon();
        let list = rig.vireo(&["snapshot-list", "one", "--name"]).ok();
        assert_eq!(list.trim(), "", "{point}");
        if running && !point.starts_with("vmm.") {
            let deadline = std::time::Instant::now() + SOON;
            while !rig.state("one").starts_with("running") {
                assert!(std::time::Instant::now() < deadline, "{point}");
                std::thread::sleep(Duration::from_millis(20));
            }
            answers(&rig, "one");
        }
        // Once more, under the same name: what was left is not in the way.
        rig.vireo(&["snapshot-create-as", "one", "all"]).ok();
        assert_eq!(inside(&image), ["all"], "{point}");
        if rig.state("one").starts_with("running") {
            rig.vireo(&["destroy", "one"]).ok();
        }
        rig.vireo(&["snapshot-revert", "one", "all"]).ok();
        if running && !point.starts_with("vmm.") {
            answers(&rig, "one");
            rig.vireo(&["destroy", "one"]).ok();
        }
        assert_eq!(content(&rig, &image)[0], 1, "{point}");
        let check = Command::new("qemu-img").args(["check", &image]).output();
        let code = check.unwrap().status.code();
        // Space that nobody uses, at worst.
        assert!(matches!(code, Some(0 | 3)), "{point}: {code:?}");
        next.kill().unwrap();
        next.wait().unwrap();
    }
}
