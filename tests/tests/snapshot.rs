//! Snapshots: trees of descriptions, new images on top, going back, merging.

use std::fs;
use std::process::Command;
use std::time::Duration;

use vireo_tests::{Rig, Terminal, left_out, tiny_guest, which};

const SOON: Duration = Duration::from_secs(60);

fn qemu_img(args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "qemu-img {args:?}: {text}{errors}");
    text
}

/// The bytes of a disk as its guest sees them.
fn content(rig: &Rig, image: &str) -> Vec<u8> {
    let raw = rig.path("content.raw").display().to_string();
    qemu_img(&["convert", "-O", "raw", image, &raw]);
    fs::read(raw).unwrap()
}

/// As the guest would: through whatever is on top.
fn write(image: &str, at: &str, pattern: &str) {
    let command = format!("write -P {pattern} {at} 64k");
    let out = Command::new("qemu-io")
        .args(["-c", &command, image])
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

fn answers(rig: &Rig, name: &str) {
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", name]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("xyz");
    terminal.expect("xyz", SOON);
    terminal.send("\x1d");
    terminal.wait(SOON);
}

/// A domain with one disk; the disk's image.
fn with_disk(rig: &Rig, name: &str) -> String {
    let image = rig.path(&format!("{name}.qcow2")).display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "4M"]);
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{image}'/><target dev='vda' bus='virtio'/></disk>\n    <console"
    );
    rig.define(&tiny_guest(rig, name, "qemu").replace("<console", &device));
    image
}

/// The image that a domain's disk has now.
fn top(rig: &Rig, name: &str) -> String {
    let list = rig.vireo(&["domblklist", name]).ok();
    let line = list.lines().find(|line| line.contains("vda"));
    let image = line.and_then(|line| line.split_whitespace().nth(1));
    image.unwrap_or_else(|| panic!("no vda: {list}")).to_owned()
}

#[test]
fn a_tree_of_descriptions_is_kept_listed_and_edited() {
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    for name in ["base", "left", "leaf"] {
        rig.vireo(&["snapshot-create-as", "one", name, &format!("about {name}")])
            .ok();
    }
    rig.vireo(&["snapshot-current", "one", "base"]).ok();
    rig.vireo(&["snapshot-create-as", "one", "right"]).ok();
    let again = rig.vireo(&["snapshot-create-as", "one", "right"]).fails();
    assert!(again.contains("already exists"), "{again}");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    let names = |filter: &[&str]| {
        let words = [&["snapshot-list", "one", "--name"][..], filter].concat();
        rig.vireo(&words)
            .ok()
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&[]), ["base", "leaf", "left", "right"]);
    assert_eq!(names(&["--topological"])[0], "base");
    assert_eq!(names(&["--roots"]), ["base"]);
    assert_eq!(names(&["--leaves"]), ["leaf", "right"]);
    assert_eq!(names(&["--no-leaves"]), ["base", "left"]);
    assert_eq!(names(&["--from", "base"]), ["left", "right"]);
    assert_eq!(
        names(&["--from", "base", "--descendants"]),
        ["leaf", "left", "right"]
    );
    assert_eq!(names(&["--inactive"]).len(), 4);
    assert!(names(&["--active"]).is_empty());
    assert_eq!(
        rig.vireo(&["snapshot-current", "one", "--name"])
            .ok()
            .trim(),
        "right"
    );
    assert_eq!(
        rig.vireo(&["snapshot-parent", "one", "leaf"]).ok().trim(),
        "left"
    );
    let info = rig.vireo(&["snapshot-info", "one", "base"]).ok();
    assert!(info.contains("Children:       2"), "{info}");
    assert!(info.contains("Descendants:    3"), "{info}");
    let xml = rig.vireo(&["snapshot-dumpxml", "one", "left"]).ok();
    assert!(
        xml.contains("<description>about left</description>"),
        "{xml}"
    );
    assert!(xml.contains("<domain type='qemu'>"), "{xml}");
    let changed = rig.write("left.xml", xml.replace("about left", "renewed"));
    rig.vireo(&["snapshot-create", "one", &changed, "--redefine"])
        .ok();
    assert!(
        rig.vireo(&["snapshot-dumpxml", "one", "left"])
            .ok()
            .contains("renewed")
    );
    let circle = rig.write(
        "circle.xml",
        xml.replace("<name>base</name>", "<name>leaf</name>"),
    );
    let error = rig
        .vireo(&["snapshot-create", "one", &circle, "--redefine"])
        .fails();
    assert!(error.contains("cycle"), "{error}");
    let error = rig.vireo(&["undefine", "one"]).fails();
    assert!(error.contains("4 snapshots"), "{error}");
    if which("virsh") {
        for words in [
            &["snapshot-list", "one"][..],
            &["snapshot-list", "one", "--parent"],
            &["snapshot-list", "one", "--tree"],
            &["snapshot-list", "one", "--tree", "--from", "left"],
            &["snapshot-info", "one", "left"],
            &["snapshot-info", "one", "--current"],
            &["snapshot-dumpxml", "one", "leaf"],
            &["snapshot-current", "one"],
            &["snapshot-current", "one", "--name"],
            &["snapshot-parent", "one", "base"],
            &["snapshot-parent", "one", "leaf"],
            &["snapshot-info", "one", "nobody"],
            &["snapshot-revert", "one"],
            &[
                "snapshot-create-as",
                "one",
                "x",
                "y",
                "--print-xml",
                "--memspec",
                "/m",
                "--diskspec",
                "vda,snapshot=no",
            ],
            &["snapshot-delete", "one", "nobody"],
        ] {
            let (ours, theirs) = (rig.vireo(words), rig.virsh(words));
            assert_eq!(ours, theirs, "{}", words.join(" "));
        }
    } else {
        left_out("needs virsh (libvirt-clients)");
    }
    rig.vireo(&["snapshot-delete", "one", "left", "--children"])
        .ok();
    assert_eq!(names(&[]), ["base", "right"]);
    rig.vireo(&["snapshot-revert", "one", "base"]).ok();
    assert_eq!(
        rig.vireo(&["snapshot-current", "one", "--name"])
            .ok()
            .trim(),
        "base"
    );
    rig.vireo(&["undefine", "one", "--snapshots-metadata"]).ok();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn external_snapshots_are_taken_gone_back_to_and_merged() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let first = with_disk(&rig, "one");
    write(&first, "0", "1");
    rig.vireo(&["snapshot-create-as", "one", "s1", "--disk-only"])
        .ok();
    let second = top(&rig, "one");
    assert_eq!(second, first.replace("qcow2", "s1"));
    assert!(qemu_img(&["info", &second]).contains("backing file"));
    write(&second, "64k", "2");
    rig.vireo(&["snapshot-create-as", "one", "s2", "--disk-only"])
        .ok();
    let third = top(&rig, "one");
    write(&third, "128k", "3");
    // Back: what came after is gone, what was before is there.
    rig.vireo(&["snapshot-revert", "one", "s2"]).ok();
    assert!(!std::path::Path::new(&third).exists());
    let again = top(&rig, "one");
    let bytes = content(&rig, &again);
    assert_eq!((bytes[0], bytes[64 << 10], bytes[128 << 10]), (1, 2, 0));
    write(&again, "128k", "4");
    // Deleting merges, and what the guest sees stays.
    let before = content(&rig, &again);
    let error = rig.vireo(&["snapshot-delete", "one", "s1"]).fails();
    assert!(error.contains("later snapshots"), "{error}");
    rig.vireo(&["snapshot-delete", "one", "s2"]).ok();
    assert_eq!(top(&rig, "one"), second);
    assert_eq!(content(&rig, &second), before);
    rig.vireo(&["snapshot-delete", "one", "s1"]).ok();
    assert_eq!(top(&rig, "one"), first);
    assert_eq!(content(&rig, &first), before);
    qemu_img(&["check", "-q", &first]);
    assert!(!std::path::Path::new(&second).exists());
    assert_eq!(
        rig.vireo(&["snapshot-list", "one", "--name"]).ok().trim(),
        ""
    );
    // An image of that name that is somebody else's.
    let taken = first.replace("qcow2", "s3");
    fs::write(&taken, "mine").unwrap();
    let error = rig
        .vireo(&["snapshot-create-as", "one", "s3", "--disk-only"])
        .fails();
    assert!(error.contains("already exists"), "{error}");
    assert_eq!(fs::read(&taken).unwrap(), b"mine");
    assert_eq!(top(&rig, "one"), first);
}

#[test]
fn a_running_domain_has_snapshots_with_and_without_memory() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let first = with_disk(&rig, "one");
    write(&first, "0", "1");
    rig.vireo(&["start", "one"]).ok();
    answers(&rig, "one");
    rig.vireo(&[
        "snapshot-create-as",
        "one",
        "disks",
        "--disk-only",
        "--atomic",
    ])
    .ok();
    assert_eq!(rig.state("one"), "running (booted)");
    answers(&rig, "one");
    let second = top(&rig, "one");
    assert_ne!(second, first);
    let memory = rig.path("memory").display().to_string();
    rig.vireo(&["snapshot-create-as", "one", "all", "--memspec", &memory])
        .ok();
    answers(&rig, "one");
    let xml = rig.vireo(&["snapshot-dumpxml", "one", "all"]).ok();
    assert!(xml.contains("<state>running</state>"), "{xml}");
    assert!(
        xml.contains(&format!("<memory snapshot='external' file='{memory}'/>")),
        "{xml}"
    );
    let third = top(&rig, "one");
    let stored = rig.vireo(&["dumpxml", "--inactive", "one"]).ok();
    assert!(stored.contains(&third), "the next start uses it too");
    let error = rig.vireo(&["snapshot-create-as", "one", "inside"]).fails();
    assert!(error.contains("--memspec"), "{error}");
    let error = rig.vireo(&["snapshot-delete", "one", "all"]).fails();
    assert!(error.contains("off"), "{error}");
    rig.vireo(&["snapshot-revert", "one", "all"]).ok();
    assert_eq!(rig.state("one"), "running (from snapshot)");
    answers(&rig, "one");
    rig.vireo(&["snapshot-revert", "one", "all", "--paused"])
        .ok();
    assert_eq!(rig.state("one"), "paused (from snapshot)");
    rig.vireo(&["resume", "one"]).ok();
    rig.vireo(&["destroy", "one"]).ok();
    rig.vireo(&["start", "one"]).ok();
    answers(&rig, "one");
    rig.vireo(&["destroy", "one"]).ok();
    rig.vireo(&["snapshot-delete", "one", "all"]).ok();
    assert!(!std::path::Path::new(&memory).exists());
    rig.vireo(&["snapshot-delete", "one", "disks"]).ok();
    assert_eq!(top(&rig, "one"), first);
    assert_eq!(content(&rig, &first)[0], 1);
}

#[test]
fn a_crash_at_any_point_leaves_no_half_snapshot() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    for point in [
        "snapshot.memory",
        "snapshot.redirected",
        "snapshot.switched",
        "snapshot.made",
    ] {
        let rig = Rig::new();
        let mut daemon = rig
            .command("vireod")
            .env("VIREO_KILL_AT", point)
            .spawn()
            .unwrap();
        while std::os::unix::net::UnixStream::connect(rig.socket()).is_err() {
            assert!(daemon.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(5));
        }
        let first = with_disk(&rig, "one");
        write(&first, "0", "1");
        rig.vireo(&["start", "one"]).ok();
        let memory = rig.path("memory").display().to_string();
        let run = rig.vireo(&["snapshot-create-as", "one", "all", "--memspec", &memory]);
        assert_ne!(run.status, 0, "{point}");
        daemon.wait().unwrap();
        let mut next = rig.daemon();
        assert_eq!(
            rig.vireo(&["snapshot-list", "one", "--name"]).ok().trim(),
            ""
        );
        let deadline = std::time::Instant::now() + SOON;
        while point == "snapshot.memory" && !rig.state("one").starts_with("running") {
            assert!(
                std::time::Instant::now() < deadline,
                "{point}: {}",
                rig.state("one")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        if rig.state("one").starts_with("paused") {
            rig.vireo(&["resume", "one"]).ok();
        }
        answers(&rig, "one");
        rig.vireo(&["destroy", "one"]).ok();
        let now = top(&rig, "one");
        assert_eq!(content(&rig, &now)[0], 1, "{point}");
        rig.vireo(&["start", "one"]).ok();
        answers(&rig, "one");
        next.kill().unwrap();
        next.wait().unwrap();
    }
}
