//! Block jobs on running domains: images merged and pulled, what is told of it, what a crash leaves.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use vireo_tests::{Rig, Terminal, left_out, tiny_guest, which};

const SOON: Duration = Duration::from_secs(60);

fn qemu_img(args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "qemu-img {args:?}: {text}{errors}");
    text
}

fn write(image: &str, at: &str, len: &str, pattern: &str) {
    let command = format!("write -P {pattern} {at} {len}");
    let out = Command::new("qemu-io")
        .args(["-c", &command, image])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{errors}");
}

/// The bytes of a disk as its guest sees them.
fn content(rig: &Rig, image: &str) -> Vec<u8> {
    let raw = rig.path("content.raw").display().to_string();
    qemu_img(&["convert", "-O", "raw", image, &raw]);
    fs::read(raw).unwrap()
}

fn backing(image: &str) -> Option<String> {
    let info = qemu_img(&["info", "-U", image]);
    let line = info.lines().find(|l| l.starts_with("backing file:"))?;
    line.split_whitespace().nth(2).map(str::to_owned)
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

/// Four images on top of one another, each with something of its own; the first is raw. A domain
/// that runs on the last.
struct Chain {
    images: Vec<String>,
    content: Vec<u8>,
}

const SIZE: usize = 24 << 20;

fn chain(rig: &Rig, name: &str) -> Chain {
    let image = |n: u32| rig.path(&format!("{name}.{n}")).display().to_string();
    let images: Vec<String> = (0..4).map(image).collect();
    let raw = &images[0];
    fs::write(raw, vec![0x11; SIZE]).unwrap();
    for n in 1..4 {
        let format = if n == 1 { "raw" } else { "qcow2" };
        let (below, own) = (&images[n - 1], &images[n]);
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-b", below, "-F", format, own,
        ]);
        // Something of its own, something over what is behind it, and zeroes.
        write(own, &format!("{n}M"), "1536k", &format!("0x{n}{n}"));
        write(own, "8M", "64k", &format!("0x{n}f"));
        let zeroes = format!("write -z {}M 256k", 12 + n);
        let out = Command::new("qemu-io").args(["-c", &zeroes, own]).output();
        assert!(out.unwrap().status.success());
    }
    let content = content(rig, &images[3]);
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{}'/><target dev='vda' bus='virtio'/></disk>\n    <console",
        images[3]
    );
    rig.define(&tiny_guest(rig, name, "qemu").replace("<console", &device));
    Chain { images, content }
}

fn top(rig: &Rig, name: &str, inactive: bool) -> String {
    let mut words = vec!["domblklist", name];
    words.extend(inactive.then_some("--inactive"));
    let list = rig.vireo(&words).ok();
    let line = list.lines().find(|line| line.contains("vda"));
    let image = line.and_then(|line| line.split_whitespace().nth(1));
    image.unwrap_or_else(|| panic!("no vda: {list}")).to_owned()
}

/// The images that the running domain's XML lists, the one on top first.
fn listed(rig: &Rig, name: &str) -> Vec<String> {
    let xml = rig.vireo(&["dumpxml", name]).ok();
    let disk = xml.split("<disk").nth(1).unwrap();
    let disk = disk.split("</disk>").next().unwrap();
    let disk = match disk.split_once("<mirror") {
        Some((before, rest)) => {
            format!("{before}{}", rest.split_once("</mirror>").unwrap().1)
        }
        None => disk.to_owned(),
    };
    disk.split("<source file='")
        .skip(1)
        .map(|rest| rest.split('\'').next().unwrap().to_owned())
        .collect()
}

fn reversed(images: &[String]) -> Vec<String> {
    images.iter().rev().cloned().collect()
}

fn waited(what: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !what() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_image_on_top_is_merged_and_pivoted_from() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let chain = chain(&rig, "one");
    let images = &chain.images;
    rig.vireo(&["start", "one"]).ok();
    assert_eq!(listed(&rig, "one"), reversed(images));
    let error = rig.vireo(&["blockcommit", "one", "vda"]).fails();
    assert!(error.contains("requires active flag"), "{error}");
    let error = rig
        .vireo(&["blockcommit", "one", "vda", "--active", "--base", "/none"])
        .fails();
    assert!(error.contains("could not find image '/none'"), "{error}");
    let said = rig.vireo(&["blockjob", "one", "vda"]).ok();
    assert!(said.contains("No current block job for vda"), "{said}");
    let error = rig.vireo(&["blockjob", "one", "vda", "--abort"]).fails();
    assert!(
        error.contains("does not have an active block job"),
        "{error}"
    );

    // Kept: the domain goes on as before.
    let words = [
        "blockcommit",
        "one",
        "vda",
        "--shallow",
        "--keep-overlay",
        "--verbose",
    ];
    let run = rig.vireo(&words);
    assert!(run.err.contains("Block commit: [100 %]"), "{}", run.err);
    assert!(run.ok().contains("Commit complete, overlay image kept"));
    assert_eq!(listed(&rig, "one"), reversed(images));

    // Synchronized, then pivoted: stock tools see what libvirt shows.
    rig.vireo(&[
        "blockcommit",
        "one",
        "vda",
        "--active",
        "--base",
        "vda[3]",
        "--wait",
    ])
    .ok();
    let info = rig.vireo(&["blockjob", "one", "vda", "--raw"]).ok();
    assert!(info.contains(" type=Active Block Commit\n"), "{info}");
    let xml = rig.vireo(&["dumpxml", "one"]).ok();
    let mirror = |xml: &str| -> Vec<bool> {
        let mirror = xml.split_once("<mirror ").map(|(_, rest)| rest);
        let mirror = mirror.and_then(|rest| rest.split_once("</mirror>"));
        let mirror = mirror.map(|(mirror, _)| mirror).unwrap_or_default();
        let base = format!("<source file='{}' index='3'/>", images[1]);
        [&base, "type='file' job='active-commit'", "ready='yes'"]
            .map(|part| mirror.contains(part))
            .to_vec()
    };
    assert_eq!(mirror(&xml), [true; 3], "{xml}");
    assert!(
        !rig.vireo(&["dumpxml", "one", "--inactive"])
            .ok()
            .contains("mirror")
    );
    let error = rig
        .vireo(&["snapshot-create-as", "one", "x", "--disk-only"])
        .fails();
    assert!(error.contains("block job"), "{error}");
    // Through the daemon's death.
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let mut next = rig.daemon();
    let xml = rig.vireo(&["dumpxml", "one"]).ok();
    assert_eq!(mirror(&xml), [true; 3], "{xml}");
    rig.vireo(&["blockjob", "one", "vda", "--pivot"]).ok();
    assert_eq!(top(&rig, "one", false), images[1]);
    assert_eq!(top(&rig, "one", true), images[1]);
    assert_eq!(listed(&rig, "one"), reversed(&images[..2]));
    answers(&rig, "one");
    // A second one, all the way down into the raw image, and what was merged goes.
    rig.vireo(&["blockcommit", "one", "vda", "--pivot", "--delete"])
        .ok();
    assert!(!Path::new(&images[1]).exists());
    assert_eq!(listed(&rig, "one"), &images[..1]);
    let stored = rig.vireo(&["dumpxml", "one", "--inactive"]).ok();
    assert!(stored.contains("type='raw'"), "{stored}");
    answers(&rig, "one");
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(fs::read(&images[0]).unwrap(), chain.content);
    rig.vireo(&["start", "one"]).ok();
    answers(&rig, "one");
    next.kill().unwrap();
    next.wait().unwrap();
}

#[test]
fn images_between_are_merged_and_pulled() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let chain = chain(&rig, "one");
    let images = &chain.images;
    rig.vireo(&["start", "one"]).ok();
    // 2 into 1, under the running 3.
    let said = rig
        .vireo(&[
            "blockcommit",
            "one",
            "vda",
            "--top",
            &images[2],
            "--base",
            &images[1],
            "--wait",
        ])
        .ok();
    assert!(said.contains("Commit complete"), "{said}");
    let now = [images[3].clone(), images[1].clone(), images[0].clone()];
    assert_eq!(listed(&rig, "one"), now);
    assert_eq!(backing(&images[3]), Some(images[1].clone()));
    // Nobody needs 2 any more.
    fs::remove_file(&images[2]).unwrap();
    // What is in 1 into 3, which stands on 0 then.
    rig.vireo(&["blockpull", "one", "vda", "--base", &images[0], "--wait"])
        .ok();
    assert_eq!(backing(&images[3]), Some(images[0].clone()));
    assert_eq!(listed(&rig, "one"), [images[3].clone(), images[0].clone()]);
    fs::remove_file(&images[1]).unwrap();
    let said = rig
        .vireo(&["blockpull", "one", "vda", "--wait", "--verbose"])
        .ok();
    assert!(said.contains("Pull complete"), "{said}");
    assert_eq!(backing(&images[3]), None);
    assert_eq!(listed(&rig, "one"), &images[3..]);
    fs::remove_file(&images[0]).unwrap();
    answers(&rig, "one");
    // And on top of that once more.
    rig.vireo(&[
        "snapshot-create-as",
        "one",
        "s",
        "--disk-only",
        "--no-metadata",
    ])
    .ok();
    assert_eq!(listed(&rig, "one").len(), 2);
    rig.vireo(&["blockcommit", "one", "vda", "--pivot"]).ok();
    assert_eq!(listed(&rig, "one"), &images[3..]);
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(content(&rig, &images[3]), chain.content);
    qemu_img(&["check", "-q", &images[3]]);
}

#[test]
fn deep_images_are_merged_under_two_others() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let chain = chain(&rig, "one");
    let images = &chain.images;
    rig.vireo(&["start", "one"]).ok();
    rig.vireo(&[
        "blockcommit",
        "one",
        "vda",
        "--top",
        &images[1],
        "--shallow",
        "--wait",
    ])
    .ok();
    assert_eq!(backing(&images[2]), Some(images[0].clone()));
    let now = [images[3].clone(), images[2].clone(), images[0].clone()];
    assert_eq!(listed(&rig, "one"), now);
    fs::remove_file(&images[1]).unwrap();
    answers(&rig, "one");
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(content(&rig, &images[3]), chain.content);
}

#[test]
fn files_that_are_others_by_now_are_left_alone_and_locks_kept() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let chain = chain(&rig, "one");
    let images = &chain.images;
    rig.vireo(&["start", "one"]).ok();
    let locked = |image: &str| {
        let command = "write -P 0x77 0 512";
        let mut qemu_io = Command::new("qemu-io");
        let out = qemu_io.args(["-c", command, image]).output().unwrap();
        String::from_utf8_lossy(&out.stderr).contains("lock")
    };
    let commit = |base: &str, top: &str| {
        let words = ["blockcommit", "one", "vda", "--wait", "--base", base];
        rig.vireo(&[&words[..], &["--top", top]].concat())
    };
    // In the place of an image there is another file: the one to be written, the one above those that go.
    for (replaced, base, top) in [(1, 1, 2), (2, 0, 1)] {
        let (image, aside) = (&images[replaced], format!("{}.aside", images[replaced]));
        fs::rename(image, &aside).unwrap();
        fs::copy(&aside, image).unwrap();
        let before = fs::read(image).unwrap();
        let error = commit(&images[base], &images[top]).fails();
        assert!(error.contains("is not the file any more"), "{error}");
        assert!(fs::read(image).unwrap() == before, "{image} was written");
        fs::rename(&aside, image).unwrap();
    }
    // Somebody reads what would be written: refused, and everything stays locked as it was.
    let mut reader = Command::new("qemu-io");
    let mut reader = Terminal::start(reader.args(["-r", &images[1]]));
    reader.expect("qemu-io>", SOON);
    let error = commit(&images[1], &images[2]).fails();
    assert!(error.contains("in use by"), "{error}");
    reader.send("quit\r");
    reader.wait(SOON);
    for image in images {
        assert!(locked(image), "{image}");
    }
    answers(&rig, "one");
    commit(&images[1], &images[2]).ok();
    for image in [&images[0], &images[1], &images[3]] {
        assert!(locked(image), "{image}");
    }
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(content(&rig, &images[3]), chain.content);
}

#[test]
fn a_job_is_slowed_given_up_and_told_of() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let chain = chain(&rig, "one");
    rig.vireo(&["start", "one"]).ok();
    let events = rig.path("events");
    let mut listener = rig
        .command("vireo")
        .args(["event", "one", "--event", "block-job-2", "--loop"])
        .stdout(fs::File::create(&events).unwrap())
        .spawn()
        .unwrap();
    let told = |what: &str| fs::read_to_string(&events).unwrap().contains(what);
    // Registered as soon as the first news come: until then they are made anew.
    waited(|| {
        rig.vireo(&["blockcommit", "one", "vda", "--keep-overlay"])
            .ok();
        told("Active Block Commit for vda ready") && told("Active Block Commit for vda canceled")
    });
    let slow = ["blockpull", "one", "vda", "1", "--bytes"];
    rig.vireo(&slow).ok();
    let info = rig.vireo(&["blockjob", "one", "vda", "--info"]);
    assert!(info.err.contains("Block Pull: ["), "{}", info.err);
    assert!(
        info.out.contains("Bandwidth limit: 1 bytes/s (1.000 B/s)"),
        "{}",
        info.out
    );
    let error = rig.vireo(&slow).fails();
    assert!(error.contains("already in active block job"), "{error}");
    let error = rig.vireo(&["managedsave", "one"]).fails();
    assert!(error.contains("active block job"), "{error}");
    let error = rig.vireo(&["blockjob", "one", "vda", "--pivot"]).fails();
    assert!(error.contains("does not support pivot"), "{error}");
    rig.vireo(&["blockjob", "one", "vda", "--abort"]).ok();
    waited(|| told("Block Pull for vda canceled"));
    assert_eq!(listed(&rig, "one").len(), 4);
    // A limit of time.
    let said = rig.vireo(&["blockpull", "one", "vda", "1", "--bytes", "--timeout", "1"]);
    assert_eq!(said.status, 1, "{}", said.err);
    assert!(said.out.contains("Pull aborted"), "{}", said.out);
    // And on, at full speed.
    rig.vireo(&slow).ok();
    rig.vireo(&["blockjob", "one", "vda", "--bandwidth", "0"])
        .ok();
    waited(|| told("Block Pull for vda completed"));
    assert_eq!(listed(&rig, "one").len(), 1);
    listener.kill().unwrap();
    listener.wait().unwrap();
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(content(&rig, &chain.images[3]), chain.content);
}

#[test]
fn both_clients_say_the_same_of_jobs() {
    if !which("virsh") || !which("qemu-img") {
        return left_out("needs virsh (libvirt-clients) and qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let ours = chain(&rig, "one");
    let theirs = chain(&rig, "two");
    rig.vireo(&["start", "one"]).ok();
    rig.vireo(&["start", "two"]).ok();
    for words in [
        &["blockjob", "NAME", "vda"][..],
        &["blockjob", "NAME", "vdz"],
        &["blockjob", "NAME", "vda", "--raw"],
        &["blockjob", "NAME", "vda", "--abort"],
        &["blockjob", "NAME", "vda", "--pivot", "--info"],
        &["blockjob", "NAME", "vda", "--bandwidth", "1"],
        &["blockcommit", "NAME", "vda"],
        &["blockcommit", "NAME", "vda", "--shallow", "--base", "/x"],
        &["blockcommit", "NAME", "vda", "--active", "--base", "/x"],
        &["blockpull", "NAME", "vda", "--base", "/x"],
        &[
            "blockcommit",
            "NAME",
            "vda",
            "--active",
            "--shallow",
            "--wait",
        ],
        &["blockjob", "NAME", "vda", "--raw"],
        &["blockjob", "NAME", "vda", "--info"],
        &["blockpull", "NAME", "vda"],
        &["blockjob", "NAME", "vda", "--pivot"],
        &["blockcommit", "NAME", "vda", "--shallow", "--keep-overlay"],
        &[
            "blockcommit",
            "NAME",
            "vda",
            "--shallow",
            "--pivot",
            "--wait",
        ],
        &["blockpull", "NAME", "vda", "--wait"],
    ] {
        let with = |name: &str| -> Vec<String> {
            words
                .iter()
                .map(|word| word.replace("NAME", name))
                .collect()
        };
        let (one, two) = (with("one"), with("two"));
        let one: Vec<&str> = one.iter().map(String::as_str).collect();
        let two: Vec<&str> = two.iter().map(String::as_str).collect();
        let (a, b) = (rig.vireo(&one), rig.virsh(&two));
        let alike = |text: &str| {
            let text = text.replace("one", "NAME").replace("two", "NAME");
            // What was copied need not be alike to the byte.
            text.lines()
                .filter(|line| !line.starts_with(" cur=") && !line.starts_with(" end="))
                .collect::<Vec<_>>()
                .join("\n")
        };
        assert_eq!(alike(&a.out), alike(&b.out), "{}", words.join(" "));
        assert_eq!(alike(&a.err), alike(&b.err), "{}", words.join(" "));
        assert_eq!(a.status, b.status, "{}", words.join(" "));
    }
    for (name, chain) in [("one", ours), ("two", theirs)] {
        let now = top(&rig, name, false);
        rig.vireo(&["destroy", name]).ok();
        assert_eq!(content(&rig, &now), chain.content);
    }
}

#[test]
fn a_vmm_or_daemon_that_dies_in_a_job_leaves_the_guests_data() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let pivot: &[&str] = &["blockcommit", "one", "vda", "--pivot"];
    let pull: &[&str] = &["blockpull", "one", "vda", "--wait"];
    let between: &[&str] = &["blockcommit", "one", "vda", "--top", "vda[2]", "--wait"];
    for (words, point) in [
        (pivot, "vmm.commit-copied"),
        (pivot, "vmm.committed"),
        (pivot, "vmm.rebased"),
        (pivot, "vmm.emptied"),
        (pivot, "vmm.block-job-done"),
        (pivot, "blockjob.ended"),
        (pivot, "blockjob.settled"),
        (pull, "vmm.pulled"),
        (pull, "vmm.rebased"),
        (between, "vmm.committed"),
        (between, "vmm.rebased"),
        (between, "blockjob.ended"),
    ] {
        let rig = Rig::new();
        let mut daemon = rig.daemon_killed_at(point);
        let chain = chain(&rig, "one");
        rig.vireo(&["start", "one"]).ok();
        let run = rig.vireo(words);
        if point.starts_with("blockjob.") {
            assert_ne!(run.status, 0, "{point}");
            daemon.wait().unwrap();
        } else {
            rig.wait_state("one", "shut off (crashed)", SOON);
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
        let mut next = rig.daemon();
        // Whatever the definition names now, the guest's disk is in it.
        if rig.state("one").starts_with("running") {
            answers(&rig, "one");
            let first = |inactive| top(&rig, "one", inactive);
            waited(|| first(false) == first(true) && listed(&rig, "one").len() < 4);
            rig.vireo(&["destroy", "one"]).ok();
        }
        let now = top(&rig, "one", true);
        assert_eq!(content(&rig, &now), chain.content, "{point}: {now}");
        if now != chain.images[0] {
            // Nothing wrong with it but, at worst, space that nobody uses.
            let check = Command::new("qemu-img").args(["check", &now]).output();
            let code = check.unwrap().status.code();
            assert!(matches!(code, Some(0 | 3)), "{point}: {code:?}");
        }
        rig.vireo(&["start", "one"]).ok();
        answers(&rig, "one");
        next.kill().unwrap();
        next.wait().unwrap();
    }
}

/// The numbers that a running domain's XML gives its images, disk by disk, the one on top first.
fn numbers(rig: &Rig, name: &str) -> String {
    let xml = rig.vireo(&["dumpxml", name]).ok();
    let disks = xml.split("<disk").skip(1).map(|disk| {
        let disk = disk.split("</disk>").next().unwrap();
        let numbers = disk.split(" index='").skip(1);
        let numbers = numbers.map(|rest| rest.split('\'').next().unwrap());
        numbers.collect::<Vec<_>>().join(" ")
    });
    disks.collect::<Vec<_>>().join(", ")
}

/// As libvirt with QEMU numbers them: at start, when a disk is plugged, and when there is a new image on top.
#[test]
fn images_of_several_disks_are_numbered_as_by_libvirt() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let disk = |target: &str, images: usize| {
        let image = |n: usize| rig.path(&format!("{target}.{n}")).display().to_string();
        qemu_img(&["create", "-q", "-f", "raw", &image(1), "1M"]);
        for n in 2..=images {
            let format = if n == 2 { "raw" } else { "qcow2" };
            let (below, own) = (image(n - 1), image(n));
            qemu_img(&[
                "create", "-q", "-f", "qcow2", "-b", &below, "-F", format, &own,
            ]);
        }
        let format = if images == 1 { "raw" } else { "qcow2" };
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{}'/>\
             <target dev='{target}' bus='virtio'/></disk>",
            image(images)
        )
    };
    let ports = "<controller type='pci' index='0' model='pcie-root'/>".to_owned()
        + &"<controller type='pci' model='pcie-root-port'/>".repeat(6);
    let devices = format!("{}{}{ports}\n    <console", disk("vda", 3), disk("vdb", 2));
    rig.define(&tiny_guest(&rig, "one", "qemu").replace("<console", &devices));
    rig.vireo(&["start", "one"]).ok();
    // Those that the definition names from the last disk to the first, then what their headers name.
    assert_eq!(numbers(&rig, "one"), "2 4 5, 1 3");
    let plug = |target, images| {
        let file = rig.write("disk.xml", disk(target, images));
        rig.vireo(&["attach-device", "one", &file]).ok();
    };
    plug("vdc", 3);
    assert_eq!(numbers(&rig, "one"), "2 4 5, 1 3, 8 9 10");
    plug("vdd", 1);
    assert_eq!(numbers(&rig, "one"), "2 4 5, 1 3, 8 9 10, 11");
    // The next daemon goes on counting.
    rig.kill_daemon();
    let words = "snapshot-create-as one s --disk-only --no-metadata --diskspec vdc,snapshot=no \
                 --diskspec vdd,snapshot=no";
    rig.vireo(&words.split_whitespace().collect::<Vec<_>>())
        .ok();
    assert_eq!(numbers(&rig, "one"), "12 2 4 5, 13 1 3, 8 9 10, 11");
    rig.vireo(&["blockcommit", "one", "vda", "--active", "--pivot", "--wait"])
        .ok();
    assert_eq!(numbers(&rig, "one"), "5, 13 1 3, 8 9 10, 11");
    // By number, and of the disk that has it only.
    let pull = |base: &str| rig.vireo(&["blockpull", "one", "vdb", "--base", base, "--wait"]);
    let error = pull("vdb[4]").fails();
    assert!(error.contains("could not find image 'vdb[4]'"), "{error}");
    pull("vdb[3]").ok();
    assert_eq!(numbers(&rig, "one"), "5, 13 3, 8 9 10, 11");
}
