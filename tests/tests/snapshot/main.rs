//! Snapshots: trees of descriptions, new images on top, going back, merging.

mod cut_short;
mod inside;

use std::fs;
use std::path::Path;
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

/// The snapshots that qemu-img finds in an image.
fn inside(image: &str) -> Vec<String> {
    let list = qemu_img(&["snapshot", "-U", "-l", image]);
    list.lines()
        .skip(2)
        .filter_map(|line| line.split_whitespace().nth(1).map(str::to_owned))
        .collect()
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
    // The one between first: what is on top of it stands on the first image then.
    rig.vireo(&["snapshot-delete", "one", "s1"]).ok();
    assert_eq!(top(&rig, "one"), again);
    assert_eq!(content(&rig, &again), before);
    assert!(qemu_img(&["info", &again]).contains(&format!("backing file: {first}")));
    rig.vireo(&["snapshot-delete", "one", "s2"]).ok();
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
    let words = [
        "snapshot-create-as",
        "one",
        "mix",
        "--memspec",
        "/m",
        "--diskspec",
    ];
    let error = rig
        .vireo(&[&words[..], &["vda,snapshot=internal"]].concat())
        .fails();
    assert!(error.contains("mixing internal and external"), "{error}");
    let words = [
        "snapshot-create-as",
        "one",
        "mix",
        "--disk-only",
        "--diskspec",
    ];
    let error = rig
        .vireo(&[&words[..], &["vda,snapshot=internal"]].concat())
        .fails();
    assert!(error.contains("require external disk snapshots"), "{error}");
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
fn a_running_domain_has_snapshots_of_its_memory_and_runs_on() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let first = with_disk(&rig, "one");
    write(&first, "0", "1");
    let memory = rig.path("memory").display().to_string();
    let live = ["snapshot-create-as", "one", "all", "--live"];
    let full = [&live[..], &["--memspec", &memory]].concat();
    let words = "live snapshot creation is supported only during full system snapshots";
    let error = rig.vireo(&live).fails();
    assert!(error.contains(words), "off: {error}");
    rig.vireo(&["start", "one"]).ok();
    answers(&rig, "one");
    let error = rig.vireo(&live).fails();
    assert!(error.contains(words), "{error}");
    let error = rig.vireo(&[&live[..], &["--disk-only"]].concat()).fails();
    assert!(error.contains(words), "{error}");
    let events = rig.path("events");
    let mut listener = rig
        .command("vireo")
        .args(["event", "one", "--event", "lifecycle", "--loop"])
        .stdout(fs::File::create(&events).unwrap())
        .spawn()
        .unwrap();
    let told = |what: &str| fs::read_to_string(&events).unwrap().matches(what).count();
    // Registered as soon as something is told.
    let deadline = std::time::Instant::now() + SOON;
    while told("Resumed") == 0 {
        assert!(std::time::Instant::now() < deadline);
        rig.vireo(&["suspend", "one"]).ok();
        rig.vireo(&["resume", "one"]).ok();
    }
    let before = told("Suspended");
    rig.vireo(&full).ok();
    assert_eq!(rig.state("one"), "running (unpaused)");
    answers(&rig, "one");
    rig.vireo(&["suspend", "one"]).ok();
    let deadline = std::time::Instant::now() + SOON;
    while told("Suspended") == before {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(told("Suspended"), before + 1, "it was never paused before");
    rig.vireo(&["resume", "one"]).ok();
    listener.kill().unwrap();
    listener.wait().unwrap();
    assert_eq!(top(&rig, "one"), first.replace("qcow2", "all"));
    let xml = rig.vireo(&["snapshot-dumpxml", "one", "all"]).ok();
    assert!(xml.contains("<state>running</state>"), "{xml}");
    assert!(
        xml.contains(&format!("<memory snapshot='external' file='{memory}'/>")),
        "{xml}"
    );
    rig.vireo(&["snapshot-revert", "one", "all"]).ok();
    assert_eq!(rig.state("one"), "running (from snapshot)");
    answers(&rig, "one");
    // Of one that stands still, and as an image like any other.
    rig.vireo(&["suspend", "one"]).ok();
    let second = rig.path("second").display().to_string();
    let words = ["snapshot-create-as", "one", "two", "--live", "--memspec"];
    rig.vireo(&[&words[..], &[&second]].concat()).ok();
    assert_eq!(rig.state("one"), "paused (user)");
    rig.vireo(&["destroy", "one"]).ok();
    let xml = rig.vireo(&["save-image-dumpxml", &second]).ok();
    assert!(xml.contains("<name>one</name>"), "{xml}");
    rig.vireo(&["snapshot-revert", "one", "two"]).ok();
    assert_eq!(rig.state("one"), "paused (from snapshot)");
    rig.vireo(&["resume", "one"]).ok();
    answers(&rig, "one");
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(content(&rig, &top(&rig, "one"))[0], 1);
    // A file that can't be written: nothing has happened.
    rig.vireo(&["start", "one"]).ok();
    let now = top(&rig, "one");
    let words = ["snapshot-create-as", "one", "no", "--live", "--memspec"];
    rig.vireo(&[&words[..], &["/nowhere/memory"]].concat())
        .fails();
    assert_eq!(top(&rig, "one"), now);
    let stored = rig.vireo(&["dumpxml", "--inactive", "one"]).ok();
    assert!(stored.contains(&now), "{stored}");
    answers(&rig, "one");
}

#[test]
fn descriptions_are_edited_renamed_and_cloned_and_files_reused() {
    let rig = Rig::new();
    let editor = |from: &str, to: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = rig.write(
            "editor",
            format!("#!/bin/sh\nsed -i 's|{from}|{to}|' \"$1\"\n"),
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    let names = || {
        let list = rig.vireo(&["snapshot-list", "one", "--name"]).ok();
        list.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let mut said = Vec::new();
    for virsh in [false, true] {
        if virsh && !which("virsh") {
            left_out("needs virsh (libvirt-clients)");
            continue;
        }
        rig.vireo(&["snapshot-create-as", "one", "base", "of old"])
            .ok();
        rig.vireo(&["snapshot-create-as", "one", "leaf"]).ok();
        let mut all = Vec::new();
        let mut edit = |editor: &str, words: &[&str]| {
            let mut client = match virsh {
                true => rig.virsh_command(),
                false => rig.command("vireo"),
            };
            client.env("VISUAL", editor).env("EDITOR", editor);
            let run: vireo_tests::Run = client
                .arg("snapshot-edit")
                .args(words)
                .output()
                .unwrap()
                .into();
            all.push((run.status, run.out, run.err));
        };
        edit("true", &["one", "base"]);
        edit(&editor("of old", "of new"), &["one", "base", "--current"]);
        let xml = rig.vireo(&["snapshot-dumpxml", "one", "base"]).ok();
        assert!(xml.contains("<description>of new</description>"), "{xml}");
        let current = rig.vireo(&["snapshot-current", "one", "--name"]).ok();
        assert_eq!(current.trim(), "base");
        let renames = editor("<name>leaf</name>", "<name>twig</name>");
        edit(&renames, &["one", "leaf"]);
        assert_eq!(names(), ["base", "leaf"]);
        edit(&renames, &["one", "leaf", "--clone"]);
        assert_eq!(names(), ["base", "leaf", "twig"]);
        rig.vireo(&["snapshot-delete", "one", "twig", "--metadata"])
            .ok();
        edit(&renames, &["one", "leaf", "--rename"]);
        assert_eq!(names(), ["base", "twig"]);
        let parent = rig.vireo(&["snapshot-parent", "one", "twig"]).ok();
        assert_eq!(parent.trim(), "base");
        edit("true", &["one", "nobody"]);
        said.push(all);
        rig.vireo(&["snapshot-delete", "one", "base", "--children"])
            .ok();
        assert!(names().is_empty());
    }
    if let [ours, theirs] = &said[..] {
        assert_eq!(ours, theirs);
    }
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    // A file that is there already is used on request, and only then; by disk, one may be left out.
    let first = with_disk(&rig, "two");
    write(&first, "0", "1");
    let over = rig.path("over.qcow2").display().to_string();
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &first, "-F", "qcow2", &over,
    ]);
    let spec = format!("vda,file={over}");
    let words = [
        "snapshot-create-as",
        "two",
        "s",
        "--disk-only",
        "--diskspec",
    ];
    let error = rig.vireo(&[&words[..], &[&spec]].concat()).fails();
    assert!(error.contains("exists"), "{error}");
    rig.vireo(&[&words[..], &[&spec, "--reuse-external"]].concat())
        .ok();
    assert_eq!(top(&rig, "two"), over);
    assert_eq!(content(&rig, &over)[0], 1);
    rig.vireo(&["snapshot-revert", "two", "s", "--reset-nvram", "--force"])
        .ok();
    rig.vireo(&["snapshot-delete", "two", "s"]).ok();
    assert_eq!(top(&rig, "two"), first);
    let none = [
        "snapshot-create-as",
        "two",
        "s",
        "--disk-only",
        "--diskspec",
        "vda,snapshot=no",
    ];
    println!("{:?}", rig.vireo(&none));
    assert_eq!(top(&rig, "two"), first);
}

#[test]
fn external_snapshots_of_a_running_domain_are_deleted() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let first = with_disk(&rig, "one");
    for (name, pattern) in [("s1", "1"), ("s2", "2"), ("s3", "3")] {
        write(&top(&rig, "one"), &format!("{pattern}M"), pattern);
        rig.vireo(&["snapshot-create-as", "one", name, "--disk-only"])
            .ok();
    }
    let last = top(&rig, "one");
    let before = content(&rig, &last);
    rig.vireo(&["start", "one"]).ok();
    // From the middle, from the end, and the rest at once.
    rig.vireo(&["snapshot-delete", "one", "s2"]).ok();
    assert!(!Path::new(&first.replace("qcow2", "s2")).exists());
    assert_eq!(top(&rig, "one"), last);
    answers(&rig, "one");
    rig.vireo(&["snapshot-delete", "one", "s3"]).ok();
    assert!(!Path::new(&last).exists());
    assert_eq!(top(&rig, "one"), first.replace("qcow2", "s1"));
    rig.vireo(&["snapshot-create-as", "one", "s4", "--disk-only"])
        .ok();
    rig.vireo(&["snapshot-delete", "one", "s1", "--children"])
        .ok();
    assert_eq!(top(&rig, "one"), first);
    let stored = rig.vireo(&["dumpxml", "--inactive", "one"]).ok();
    assert!(stored.contains(&first), "{stored}");
    answers(&rig, "one");
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(content(&rig, &first), before);
    qemu_img(&["check", "-q", &first]);
    let list = rig.vireo(&["snapshot-list", "one", "--name"]).ok();
    assert_eq!(list.trim(), "");
}
