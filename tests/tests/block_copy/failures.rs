//! What fails in a copy, and what deaths leave.

use std::fs;
use std::path::Path;
use std::process::Command;

use vireo_tests::{Kernel, Rig, left_out, linux_guest};

use super::*;

#[test]
fn a_full_destination_is_nothing_to_the_guest() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    let small = rig.path("small");
    fs::create_dir(&small).unwrap();
    let folder = small.display().to_string();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=6m", "tmpfs", &folder])
        .output();
    if !mount.is_ok_and(|out| out.status.success()) {
        return left_out("needs a file system of its own to fill (root)");
    }
    let (images, before) = tiny(&rig, "one", true);
    let mut listener = rig.listen("one");
    let dest = format!("{folder}/copy");
    for more in [&[][..], &["--synchronous-writes"]] {
        let words = [
            "blockcopy",
            "one",
            "vda",
            "--dest",
            &dest,
            "--transient-job",
            "--wait",
        ];
        let run = rig.virsh(&[&words[..], more].concat());
        assert!(
            run.out.contains("Copy failed") && run.status == 1,
            "{run:?}"
        );
        listener.expect("Block Copy for vda failed", SOON);
        assert!(Path::new(&dest).exists());
        fs::remove_file(&dest).unwrap();
    }
    assert!(rig.state("one").starts_with("running"));
    assert!(element(&rig, "one", false).contains(&images[1]));
    assert!(!element(&rig, "one", false).contains("mirror"));
    answers(&rig, "one");
    rig.vireo(&["destroy", "one"]).ok();
    tool("umount", &[&folder]);
    assert!(content(&rig, &images[1]) == before);
}

#[test]
fn whoever_dies_in_a_copy_leaves_the_guests_data() {
    if !prepared() {
        return;
    }
    let pivot: &[&str] = &["--pivot"];
    let finish: &[&str] = &["--finish"];
    for (words, point) in [
        (pivot, "vmm.commit-copied"),
        (pivot, "vmm.copied"),
        (pivot, "vmm.switched"),
        (pivot, "vmm.block-job-done"),
        (pivot, "blockjob.ended"),
        (pivot, "blockjob.settled"),
        (pivot, "blockjob.let-go"),
        (finish, "vmm.copied"),
        (finish, "blockjob.ended"),
    ] {
        let rig = Rig::new();
        let mut daemon = rig.daemon_killed_at(point);
        let (images, before) = tiny(&rig, "one", true);
        let dest = rig.path("copy").display().to_string();
        let all = [
            "blockcopy",
            "one",
            "vda",
            "--dest",
            &dest,
            "--transient-job",
        ];
        let run = rig.vireo(&[&all[..], words].concat());
        if point.starts_with("blockjob.") {
            assert_ne!(run.status, 0, "{point}");
            daemon.wait().unwrap();
        } else {
            rig.wait_state("one", "shut off (crashed)", SOON);
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
        let mut next = rig.daemon();
        let named = |inactive| {
            let disk = element(&rig, "one", inactive);
            assert!(!disk.contains("mirror"), "{point}: {disk}");
            [&images[1], &dest]
                .into_iter()
                .find(|image| disk.contains(&format!("<source file='{image}'")))
                .unwrap_or_else(|| panic!("{point}: {disk}"))
                .clone()
        };
        if rig.state("one").starts_with("running") {
            answers(&rig, "one");
            let gone_on = words == pivot;
            waited(point, || {
                let disk = element(&rig, "one", false);
                !disk.contains("mirror") && disk.contains(&dest) == gone_on
            });
            assert_eq!(named(false), named(true), "{point}");
            let left = if gone_on { &images[1] } else { &dest };
            let locked = || {
                Command::new("qemu-img")
                    .args(["check", left])
                    .output()
                    .unwrap()
            };
            waited(point, || {
                !String::from_utf8_lossy(&locked().stderr).contains("lock")
            });
            // Jobs go on with it.
            let more = rig.path("more").display().to_string();
            let all = [
                "blockcopy",
                "one",
                "vda",
                "--dest",
                &more,
                "--transient-job",
                "--finish",
            ];
            rig.vireo(&all).ok();
            assert!(content(&rig, &more) == before, "{point}");
            rig.vireo(&["destroy", "one"]).ok();
        }
        let now = named(true);
        assert!(content(&rig, &now) == before, "{point}: {now}");
        if words == finish || point.starts_with("blockjob.") || point == "vmm.block-job-done" {
            assert!(content(&rig, &dest) == before, "{point}: the copy");
        }
        rig.vireo(&["start", "one"]).ok();
        answers(&rig, "one");
        next.kill().unwrap();
        next.wait().unwrap();
    }
}

#[test]
fn a_copy_goes_on_when_its_daemon_dies() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let (_, before) = tiny(&rig, "one", true);
    let dest = rig.path("copy").display().to_string();
    let slow = [
        "blockcopy",
        "one",
        "vda",
        "--dest",
        &dest,
        "--transient-job",
        "--bandwidth",
        "1",
        "--bytes",
    ];
    rig.vireo(&slow).ok();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let mut next = rig.daemon();
    assert!(
        info(&rig, "one").contains("type=Block Copy\n bandwidth=1\n")
            || info(&rig, "one").contains("Block Copy")
    );
    assert!(element(&rig, "one", false).contains("job='copy'>"));
    rig.vireo(&["blockjob", "one", "vda", "--bandwidth", "0"])
        .ok();
    waited("ready", || {
        element(&rig, "one", false).contains("job='copy' ready='yes'")
    });
    next.kill().unwrap();
    next.wait().unwrap();
    assert!(element(&rig, "one", false).contains("job='copy' ready='yes'"));
    rig.vireo(&["blockjob", "one", "vda", "--pivot"]).ok();
    assert!(element(&rig, "one", true).contains(&format!("<source file='{dest}'/>")));
    rig.vireo(&["destroy", "one"]).ok();
    assert!(content(&rig, &dest) == before);
}

/// The disk has gone on with the copy, nobody has written that down, and everybody dies: the definition names the
/// image before, and nothing that the guest was told is written is missing there.
#[test]
fn until_it_is_written_down_both_images_have_everything() {
    if !prepared() {
        return;
    }
    if !Kernel::V6_1.is_there() {
        return left_out("needs a guest's kernel (make test)");
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon_killed_at("blockjob.ended");
    let images = chain(&rig, "deb");
    rig.define(
        &linux_guest("deb", Kernel::V6_1).replace("<console", &disk("qcow2", &images[1], "vda")),
    );
    let mut guest = Writing::start(&rig, "deb");
    let before = guest.last();
    let dest = rig.path("copy").display().to_string();
    let words = [
        "blockcopy",
        "deb",
        "vda",
        "--dest",
        &dest,
        "--transient-job",
        "--pivot",
    ];
    rig.vireo(&words).fails();
    daemon.wait().unwrap();
    waited("it goes on in the copy", || {
        written(&content(&rig, &dest)) > before + 30
    });
    for pid in rig.processes("vireo-vmm") {
        // SAFETY: a number and a signal; the process is this test's own.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    rig.wait_state("deb", "shut off (crashed)", SOON);
    assert!(element(&rig, "deb", true).contains(&images[1]));
    let both = [&images[1], &dest].map(|image| written(&content(&rig, image)));
    assert!(both[1] > before + 30, "{both:?}");
    // The last one may not have been answered.
    assert!(both[0].abs_diff(both[1]) <= 1, "{both:?}");
}
