//! What is cut short, can't begin, or would take something from others.

use super::*;

#[test]
fn a_crash_at_any_point_leaves_no_half_snapshot() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    for (point, live) in [
        ("snapshot.memory", false),
        ("snapshot.redirected", false),
        ("snapshot.switched", false),
        ("snapshot.made", false),
        ("snapshot.redirected", true),
        ("vmm.live-round", true),
        ("vmm.live-still", true),
        ("vmm.live-switched", true),
        ("snapshot.memory", true),
        ("snapshot.made", true),
    ] {
        println!("{point} {live}");
        let rig = Rig::new();
        let mut daemon = rig.daemon_killed_at(point);
        let first = with_disk(&rig, "one");
        write(&first, "0", "1");
        rig.vireo(&["start", "one"]).ok();
        let memory = rig.path("memory").display().to_string();
        let mut words = vec!["snapshot-create-as", "one", "all", "--memspec", &memory];
        words.extend(live.then_some("--live"));
        let run = rig.vireo(&words);
        assert_ne!(run.status, 0, "{point}");
        if point.starts_with("vmm.") {
            rig.wait_state("one", "shut off (crashed)", SOON);
            daemon.kill().unwrap();
        }
        daemon.wait().unwrap();
        let mut next = rig.daemon();
        assert_eq!(
            rig.vireo(&["snapshot-list", "one", "--name"]).ok().trim(),
            ""
        );
        if !point.starts_with("vmm.") {
            let deadline = std::time::Instant::now() + SOON;
            while !rig.state("one").starts_with("running") {
                let state = rig.state("one");
                assert!(std::time::Instant::now() < deadline, "{point}: {state}");
                std::thread::sleep(Duration::from_millis(20));
            }
            answers(&rig, "one");
            rig.vireo(&["destroy", "one"]).ok();
        }
        let left = fs::read_dir(rig.root()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        let is_memory = |name: &&std::ffi::OsString| name.to_string_lossy().contains("memory");
        // Between the whole file and its description it may stay.
        let kept = left.iter().any(|name| is_memory(&name));
        assert!(!kept || point == "snapshot.made", "{point}: {left:?}");
        let now = top(&rig, "one");
        assert_eq!(content(&rig, &now)[0], 1, "{point}");
        rig.vireo(&["start", "one"]).ok();
        answers(&rig, "one");
        next.kill().unwrap();
        next.wait().unwrap();
    }
}

#[test]
fn a_deletion_that_could_not_begin_leaves_the_snapshot_as_it_was() {
    if !which("qemu-io") {
        return left_out("needs qemu-io (qemu-utils)");
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let first = with_disk(&rig, "one");
    write(&first, "0", "1");
    rig.vireo(&["snapshot-create-as", "one", "s1", "--disk-only"])
        .ok();
    write(&top(&rig, "one"), "0", "2");
    for running in [false, true] {
        if running {
            rig.vireo(&["start", "one"]).ok();
        }
        // Somebody reads the image that would be written.
        let mut reader = Command::new("qemu-io");
        let mut reader = Terminal::start(reader.args(["-r", &first]));
        reader.expect("qemu-io>", SOON);
        let error = rig.vireo(&["snapshot-delete", "one", "s1"]).fails();
        assert!(error.contains("in use by"), "{error}");
        reader.send("quit\r");
        reader.wait(SOON);
        if running {
            rig.vireo(&["destroy", "one"]).ok();
        }
    }
    // One can still go back to it.
    rig.vireo(&["snapshot-revert", "one", "s1"]).ok();
    assert_eq!(content(&rig, &top(&rig, "one"))[0], 1);
    rig.vireo(&["snapshot-delete", "one", "s1"]).ok();
    assert_eq!(top(&rig, "one"), first);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn a_crash_on_the_way_back_loses_no_snapshot() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    for (point, outside) in ["revert.stopped", "revert.images", "revert.defined"]
        .into_iter()
        .flat_map(|point| [(point, false), (point, true)])
    {
        println!("{point}, outside: {outside}");
        let rig = Rig::new();
        let mut daemon = rig.daemon_killed_at(point);
        let first = with_disk(&rig, "one");
        write(&first, "0", "1");
        rig.vireo(&["start", "one"]).ok();
        answers(&rig, "one");
        let memory = rig.path("memory").display().to_string();
        let mut words = vec!["snapshot-create-as", "one", "then"];
        if outside {
            words.extend(["--memspec", &memory]);
        }
        rig.vireo(&words).ok();
        answers(&rig, "one");
        assert_ne!(rig.vireo(&["snapshot-revert", "one", "then"]).status, 0);
        daemon.wait().unwrap();
        let mut next = rig.daemon();
        let list = rig.vireo(&["snapshot-list", "one", "--name"]).ok();
        assert_eq!(list.trim(), "then", "{point}");
        // It was ended for that; what it starts from is an image that is there.
        assert!(rig.state("one").starts_with("shut off"), "{point}");
        assert_eq!(content(&rig, &top(&rig, "one"))[0], 1, "{point}");
        rig.vireo(&["snapshot-revert", "one", "then"]).ok();
        assert_eq!(rig.state("one"), "running (from snapshot)", "{point}");
        answers(&rig, "one");
        rig.vireo(&["destroy", "one"]).ok();
        let now = top(&rig, "one");
        assert_eq!(content(&rig, &now)[0], 1, "{point}");
        let check = Command::new("qemu-img").args(["check", &now]).output();
        let code = check.unwrap().status.code();
        assert!(matches!(code, Some(0 | 3)), "{point}: {code:?}");
        rig.vireo(&["snapshot-delete", "one", "then"]).ok();
        assert_eq!(content(&rig, &top(&rig, "one"))[0], 1, "{point}");
        next.kill().unwrap();
        next.wait().unwrap();
    }
}

#[test]
fn nothing_that_others_need_is_merged_away() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let create = |words: &[&str]| {
        rig.vireo(&[&["snapshot-create-as", "one"], words].concat())
            .ok()
    };
    // A snapshot inside the image that would go.
    let first = with_disk(&rig, "one");
    write(&first, "0", "1");
    create(&["s1", "--disk-only"]);
    let over = top(&rig, "one");
    write(&over, "0", "2");
    create(&["s2"]);
    assert_eq!(inside(&over), ["s2"]);
    let error = rig.vireo(&["snapshot-delete", "one", "s1"]).fails();
    assert!(error.contains("snapshot 's2' is inside"), "{error}");
    rig.vireo(&["start", "one"]).ok();
    let error = rig.vireo(&["snapshot-delete", "one", "s1"]).fails();
    assert!(error.contains("snapshot 's2' is inside"), "{error}");
    // Nor does a block job.
    let error = rig
        .vireo(&["blockcommit", "one", "vda", "--active"])
        .fails();
    assert!(error.contains("has a snapshot 's2' inside"), "{error}");
    let error = rig.vireo(&["blockpull", "one", "vda"]).fails();
    assert!(error.contains("has a snapshot 's2' inside"), "{error}");
    assert!(!rig.vireo(&["dumpxml", "one"]).ok().contains("<mirror"));
    rig.vireo(&["destroy", "one"]).ok();
    rig.vireo(&["snapshot-revert", "one", "s2"]).ok();
    rig.vireo(&["snapshot-delete", "one", "s2"]).ok();
    assert_eq!(content(&rig, &over)[0], 2);
    // A branch on the same base as what would go into it.
    create(&["s3", "--disk-only"]);
    write(&top(&rig, "one"), "0", "3");
    rig.vireo(&["snapshot-revert", "one", "s1"]).ok();
    let branch = top(&rig, "one");
    assert_eq!(content(&rig, &branch)[0], 1);
    for running in [false, true] {
        if running {
            rig.vireo(&["start", "one"]).ok();
        }
        let error = rig.vireo(&["snapshot-delete", "one", "s1"]).fails();
        assert!(
            error.contains("goes on from") && error.contains("can't be merged"),
            "{error}"
        );
    }
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(content(&rig, &branch)[0], 1);
    rig.vireo(&["snapshot-revert", "one", "s3"]).ok();
    // Two on the same image: both stand on what it was merged into.
    let third = top(&rig, "one");
    assert_eq!(content(&rig, &third)[0], 2);
    rig.vireo(&["snapshot-delete", "one", "s1"]).ok();
    assert_eq!(content(&rig, &third)[0], 2);
    assert!(!Path::new(&over).exists());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn a_deletion_that_was_cut_short_is_gone_on_with() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    for (point, running) in [
        ("snapshot.marked", false),
        ("snapshot.merged-one", false),
        ("snapshot.committed", false),
        ("snapshot.merged", false),
        ("snapshot.marked", true),
        ("blockjob.ended", true),
        ("blockjob.settled", true),
        ("snapshot.merged-one", true),
        ("snapshot.committed", true),
    ] {
        let rig = Rig::new();
        let mut daemon = rig.daemon_killed_at(point);
        let first = with_disk(&rig, "one");
        write(&first, "0", "1");
        rig.vireo(&["snapshot-create-as", "one", "s1", "--disk-only"])
            .ok();
        let over = top(&rig, "one");
        write(&over, "0", "2");
        if running {
            rig.vireo(&["start", "one"]).ok();
        }
        let run = rig.vireo(&["snapshot-delete", "one", "s1"]);
        assert_ne!(run.status, 0, "{point}");
        daemon.wait().unwrap();
        let mut next = rig.daemon();
        let error = rig.vireo(&["snapshot-revert", "one", "s1"]).fails();
        assert!(error.contains("deleted in part"), "{point}: {error}");
        // What the guest writes meanwhile is not written over by the second attempt.
        if !running {
            write(&top(&rig, "one"), "64k", "3");
        }
        rig.vireo(&["snapshot-delete", "one", "s1"]).ok();
        assert_eq!(top(&rig, "one"), first, "{point}");
        assert!(!Path::new(&over).exists(), "{point}");
        if running {
            answers(&rig, "one");
            rig.vireo(&["destroy", "one"]).ok();
        }
        let now = content(&rig, &first);
        let expected = if running { [2, 0] } else { [2, 3] };
        assert_eq!([now[0], now[64 << 10]], expected, "{point}");
        assert!(!rig.path("var/lib/vireo/snapshots/one").exists());
        next.kill().unwrap();
        next.wait().unwrap();
    }
}
