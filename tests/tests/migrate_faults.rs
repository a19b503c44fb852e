//! What goes wrong while a guest moves, at every phase: it runs on one side, or nowhere where the side died that had
//! the right to run it; and nothing is left behind.

use vireo_tests::moves::{answers, daemon, daemon_with, eventually, is_there};
use vireo_tests::{Rig, tiny_guest};

/// Where the guest is to be after all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Runs {
    /// Where it was.
    Here,
    /// Where it was to go.
    There,
    /// Its side died, and had the right to run it.
    Nowhere,
}

/// Moves a guest from one Vireo to another, which die at these points, and looks where it runs.
fn fault(how: &[&str], here_dies: Option<&str>, there_dies: Option<&str>, runs: Runs) {
    let what = format!("{how:?} {here_dies:?} {there_dies:?}");
    let (here, there) = (Rig::new(), Rig::new());
    // qcow2: it shows whether somebody went on with what another has written.
    let disk = here.path("disk.qcow2").display().to_string();
    let made = here.vireo(&["image", "create", "-q", "-f", "qcow2", &disk, "1M"]);
    made.ok();
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>\
         <target dev='vda' bus='virtio'/></disk><console"
    );
    let xml = tiny_guest(&here, "tiny", "qemu").replace("<console", &device);
    let _daemons = [daemon(&here, here_dies), daemon(&there, there_dies)];
    here.define(&xml);
    here.vireo(&["start", "tiny"]).ok();
    answers(&here, "tiny");
    let at = format!("unix://{}", there.path("incoming").display());
    let uri = there.uri();
    let mut args = vec![
        "migrate",
        "--live",
        "--unsafe",
        "tiny",
        &uri,
        "--migrateuri",
        &at,
    ];
    args.extend(how);
    let moved = here.vireo(&args);
    // The next command starts a daemon where one died.
    let killed = there_dies.is_some_and(|point| !point.starts_with("vmm."));
    let (one, other) = match runs {
        Runs::There => (&there, &here),
        _ => (&here, &there),
    };
    eventually(&format!("{what}: the other side has nothing"), || {
        other.processes("vireo-vmm").is_empty() && !is_there(other)
    });
    if runs == Runs::Nowhere {
        eventually(&format!("{what}: nor has the one"), || {
            one.processes("vireo-vmm").is_empty() && !is_there(one)
        });
    } else {
        eventually(&format!("{what}: it runs"), || {
            one.state("tiny").starts_with("running")
        });
        assert_eq!(one.processes("vireo-vmm").len(), 1, "{what}");
        answers(one, "tiny");
        // Its disk is its own, and nobody else's.
        let busy = one.vireo(&["image", "check", "-q", &disk]);
        assert_ne!(busy.status, 0, "{what}: {busy:?}");
        if killed && runs == Runs::Here {
            // That is no obstacle.
            here.vireo(&args).ok();
            answers(&there, "tiny");
            there.vireo(&["destroy", "tiny"]).ok();
        } else {
            one.vireo(&["destroy", "tiny"]).ok();
        }
    }
    if runs == Runs::Here {
        assert_ne!(moved.status, 0, "{what}: {moved:?}");
    }
    here.vireo(&["image", "check", "-q", &disk]).ok();
    // Nothing is left where it did not come, or has gone; but a daemon that dies leaves its socket.
    eventually(&format!("{what}: nobody listens"), || {
        killed || !there.path("incoming").exists()
    });
    for rig in [&here, &there] {
        let left: Vec<_> = std::fs::read_dir(rig.path("run/vireo/domains"))
            .unwrap()
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .collect();
        assert!(left.is_empty(), "{what}: {left:?}");
    }
}

#[test]
fn the_sources_vmm_dies() {
    for (point, runs) in [
        ("vmm.migrate-greeted", Runs::Nowhere),
        ("vmm.migrate-code", Runs::Nowhere),
        ("vmm.migrate-still", Runs::Nowhere),
        ("vmm.migrate-sent", Runs::Nowhere),
        ("vmm.migrate-asked", Runs::Nowhere),
        ("vmm.migrate-given", Runs::There),
    ] {
        for how in [&[][..], &["--p2p"]] {
            fault(how, Some(point), None, runs);
        }
    }
}

#[test]
fn the_targets_vmm_dies() {
    for (point, runs) in [
        ("vmm.incoming-greeted", Runs::Here),
        ("vmm.incoming-code", Runs::Here),
        ("vmm.incoming-received", Runs::Here),
        ("vmm.incoming-ready", Runs::Here),
        ("vmm.incoming-asked", Runs::Here),
        ("vmm.incoming-granted", Runs::Here),
        // It may have run, and written to its disks.
        ("vmm.incoming-taken", Runs::Nowhere),
    ] {
        for how in [&[][..], &["--p2p"]] {
            fault(how, None, Some(point), runs);
        }
    }
}

#[test]
fn the_sources_daemon_dies() {
    for (point, runs) in [
        ("migrate.connected", Runs::Here),
        ("migrate.moving", Runs::Here),
        ("migrate.performed", Runs::Here),
        ("migrate.finished", Runs::There),
    ] {
        for how in [&[][..], &["--p2p"]] {
            fault(how, Some(point), None, runs);
        }
    }
}

#[test]
fn the_targets_daemon_dies() {
    for (point, runs) in [
        ("migrate.prepared", Runs::Here),
        ("migrate.gathered", Runs::Here),
        ("start.spawned", Runs::Here),
        ("start.recorded", Runs::Here),
        ("migrate.finishing", Runs::Here),
        ("migrate.arrived", Runs::Here),
        ("migrate.resumed", Runs::There),
    ] {
        for how in [&[][..], &["--p2p"]] {
            fault(how, None, Some(point), runs);
        }
    }
}

#[test]
fn a_name_or_a_uuid_that_is_taken_there_keeps_it_here() {
    let (here, there) = (Rig::new(), Rig::new());
    let _daemons = [daemon(&here, None), daemon(&there, None)];
    let uuid = "<uuid>7c3c5f54-8f7b-4f4c-9df0-6f1d3f6f0a51</uuid>";
    let with = |rig: &Rig, name: &str| {
        let named = format!("</name>{uuid}");
        tiny_guest(rig, name, "qemu").replace("</name>", &named)
    };
    here.define(&with(&here, "tiny"));
    here.vireo(&["start", "tiny"]).ok();
    let (uri, at) = (there.uri(), there.path("incoming").display().to_string());
    let at = format!("unix://{at}");
    let args = ["migrate", "--live", "tiny", &uri, "--migrateuri", &at];
    let refused = |words: &str| {
        let said = here.vireo(&args).fails();
        assert!(said.contains(words), "{said}");
        assert!(here.state("tiny").starts_with("running"));
        answers(&here, "tiny");
    };
    there.define(&tiny_guest(&there, "tiny", "qemu"));
    refused("'tiny'");
    there.vireo(&["undefine", "tiny"]).ok();
    there.define(&with(&there, "another"));
    refused("'another'");
    // The same domain, running.
    there.vireo(&["undefine", "another"]).ok();
    there.define(&with(&there, "tiny"));
    there.vireo(&["start", "tiny"]).ok();
    refused("already active");
    there.vireo(&["destroy", "tiny"]).ok();
    // The same domain, off: it goes there.
    here.vireo(&args).ok();
    answers(&there, "tiny");
    assert!(!there.path("incoming").exists());
}

#[test]
fn a_device_that_is_not_there_keeps_it_here() {
    let (here, there) = (Rig::new(), Rig::new());
    let _daemons = [daemon(&here, None), daemon(&there, None)];
    here.define(&tiny_guest(&here, "tiny", "qemu"));
    here.vireo(&["start", "tiny"]).ok();
    let (uri, at) = (there.uri(), there.path("incoming").display().to_string());
    let at = format!("unix://{at}");
    let nowhere = there.path("nowhere.img").display().to_string();
    let device = format!(
        "<disk type='file' device='disk'><source file='{nowhere}'/><target dev='vda' bus='virtio'/></disk><console"
    );
    let xml = here.vireo(&["dumpxml", "--migratable", "tiny"]).ok();
    let file = here.write("other.xml", xml.replace("<console", &device));
    let args = [
        "migrate",
        "--live",
        "--unsafe",
        "tiny",
        &uri,
        "--migrateuri",
        &at,
    ];
    let mut changed = args.to_vec();
    changed.extend(["--xml", &file]);
    // Another machine than the guest has.
    here.vireo(&changed).fails();
    assert!(here.state("tiny").starts_with("running"));
    answers(&here, "tiny");
    // A file that the target lacks.
    let kernel = here.path("tiny.elf");
    let gone = here.path("gone.elf");
    std::fs::rename(&kernel, &gone).unwrap();
    let said = here.vireo(&args).fails();
    assert!(said.contains("tiny.elf"), "{said}");
    answers(&here, "tiny");
    std::fs::rename(&gone, &kernel).unwrap();
    // A target may say what it likes, even this: as long as it was not given the guest, the guest is here.
    let odd = here.path("whether the guest runs on the other side is not known");
    let named = odd.display().to_string();
    let file = here.write(
        "other.xml",
        xml.replace(&kernel.display().to_string(), &named),
    );
    let mut still: Vec<&str> = args.into_iter().filter(|arg| *arg != "--live").collect();
    still.extend(["--xml", &file]);
    let said = here.vireo(&still).fails();
    assert!(said.contains(&named), "{said}");
    assert!(here.state("tiny").starts_with("running"));
    answers(&here, "tiny");
    here.vireo(&args).ok();
    answers(&there, "tiny");
}

#[test]
fn a_volume_that_was_made_for_a_guest_that_did_not_come_goes() {
    let (here, there) = (Rig::new(), Rig::new());
    let dies = [
        "migrate.volume-made",
        "migrate.prepared",
        "migrate.gathered",
    ];
    let pool = |rig: &Rig| {
        let folder = rig.path("images");
        std::fs::create_dir_all(&folder).unwrap();
        let folder = folder.display().to_string();
        rig.vireo(&["pool-define-as", "p", "dir", "--target", &folder])
            .ok();
        rig.vireo(&["pool-start", "p"]).ok();
    };
    pool(&here);
    pool(&there);
    here.vireo(&["vol-create-as", "p", "v", "1M", "--format", "qcow2"])
        .ok();
    let device = "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>\
                  <source pool='p' volume='v'/><target dev='vda' bus='virtio'/></disk><console";
    here.define(&tiny_guest(&here, "tiny", "qemu").replace("<console", device));
    here.vireo(&["start", "tiny"]).ok();
    let at = format!("unix://{}", there.path("incoming").display());
    let uri = there.uri();
    let args = [
        "migrate",
        "--live",
        "--copy-storage-all",
        "tiny",
        &uri,
        "--migrateuri",
        &at,
    ];
    let made = there.path("images/v");
    for point in dies {
        there.kill_daemon();
        let mut dying = there.daemon_killed_at(point);
        assert_ne!(here.vireo(&args).status, 0, "{point}");
        dying.wait().unwrap();
        assert!(made.exists(), "{point}: nothing was made");
        // The next daemon takes it away before it serves.
        assert!(
            !there.vireo(&["vol-list", "p"]).ok().contains(" v "),
            "{point}"
        );
        assert!(!made.exists(), "{point}");
        eventually(point, || here.state("tiny").starts_with("running"));
        answers(&here, "tiny");
    }
    here.vireo(&args).ok();
    answers(&there, "tiny");
    assert!(made.exists());
    there.kill_daemon();
    assert!(there.vireo(&["vol-list", "p"]).ok().contains(" v "));
    there.vireo(&["destroy", "tiny"]).ok();
    there
        .vireo(&["image", "check", "-q", &made.display().to_string()])
        .ok();
}

/// A target's VMM that hangs at a point while it takes the guest over, and what becomes of it when it comes round.
fn hangs(point: &str, how: &[&str], runs: Runs) {
    let what = format!("{point} {how:?}");
    let (here, there) = (Rig::new(), Rig::new());
    let _daemons = [
        daemon(&here, None),
        daemon_with(&there, Some(("VIREO_STOP_AT", point))),
    ];
    here.define(&tiny_guest(&here, "tiny", "qemu"));
    here.vireo(&["start", "tiny"]).ok();
    answers(&here, "tiny");
    let at = format!("unix://{}", there.path("incoming").display());
    let uri = there.uri();
    let mut args = vec!["migrate", "--live", "tiny", &uri, "--migrateuri", &at];
    args.extend(how);
    let said = here.vireo(&args).fails();
    assert!(said.contains("has not answered for 10 s"), "{what}: {said}");
    // Whoever may have the guest is left alone, and seen.
    let [pid] = there.processes("vireo-vmm")[..] else {
        panic!("{what}: the target's VMM is gone");
    };
    assert_eq!(there.state("tiny"), "paused (migrating)", "{what}");
    let state = here.state("tiny");
    match runs {
        Runs::There => assert_eq!(state, "paused (migrating)", "{what}"),
        _ => assert!(state.starts_with("running"), "{what}: {state}"),
    }
    // SAFETY: takes numbers; the process is this test's own.
    unsafe { libc::kill(pid, libc::SIGCONT) };
    let (one, other) = match runs {
        Runs::There => (&there, &here),
        _ => (&here, &there),
    };
    eventually(&format!("{what}: the other side has nothing"), || {
        other.processes("vireo-vmm").is_empty() && !is_there(other)
    });
    eventually(&format!("{what}: it runs"), || {
        one.state("tiny").starts_with("running")
    });
    answers(one, "tiny");
    // It is persistent where that was wanted, though nobody waited for it.
    if how.contains(&"--persistent") && runs == Runs::There {
        eventually(&format!("{what}: it is defined"), || {
            one.vireo(&["dominfo", "tiny"])
                .ok()
                .contains("Persistent:     yes")
        });
    }
    one.vireo(&["destroy", "tiny"]).ok();
}

#[test]
fn a_target_that_hangs_while_it_takes_over_keeps_what_it_was_given_and_gets_nothing_else() {
    // It had not asked yet: the guest stays here.
    hangs("vmm.incoming-asking", &[], Runs::Here);
    // It has been given the guest, which therefore stands still here.
    hangs("vmm.incoming-granted", &["--persistent"], Runs::There);
}

#[test]
fn a_target_that_hangs_before_it_takes_over_is_waited_for_only_so_long() {
    for how in [&[][..], &["--p2p"]] {
        let (here, there) = (Rig::new(), Rig::new());
        let stops = ("VIREO_STOP_AT", "vmm.incoming-received");
        let _daemons = [daemon(&here, None), daemon_with(&there, Some(stops))];
        here.define(&tiny_guest(&here, "tiny", "qemu"));
        here.vireo(&["start", "tiny"]).ok();
        answers(&here, "tiny");
        let at = format!("unix://{}", there.path("incoming").display());
        let uri = there.uri();
        let mut args = vec!["migrate", "--live", "tiny", &uri, "--migrateuri", &at];
        args.extend(how);
        let said = here.vireo(&args).fails();
        let words = "waited 15 s in vain for the other side to build the machine";
        assert!(said.contains(words), "{how:?}: {said}");
        assert!(here.state("tiny").starts_with("running"), "{how:?}");
        answers(&here, "tiny");
        assert!(there.processes("vireo-vmm").is_empty(), "{how:?}");
        assert!(!is_there(&there), "{how:?}");
        here.vireo(&["destroy", "tiny"]).ok();
    }
}

/// Its machine is built there, disks and all, when the other side hangs, and therefore does not let go of them: the guest
/// stands still here until it has them again, and whoever moved it is long gone by then.
#[test]
fn disks_that_the_other_side_still_holds_are_taken_back_when_it_lets_go() {
    let (here, there) = (Rig::new(), Rig::new());
    let stops = ("VIREO_STOP_AT", "vmm.incoming-asking");
    let _daemons = [daemon(&here, None), daemon_with(&there, Some(stops))];
    let disk = here.path("disk.qcow2").display().to_string();
    here.vireo(&["image", "create", "-q", "-f", "qcow2", &disk, "1M"])
        .ok();
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>\
         <target dev='vda' bus='virtio'/></disk><console"
    );
    here.define(&tiny_guest(&here, "tiny", "qemu").replace("<console", &device));
    here.vireo(&["start", "tiny"]).ok();
    answers(&here, "tiny");
    let at = format!("unix://{}", there.path("incoming").display());
    let uri = there.uri();
    let args = ["migrate", "--live", "--unsafe", "tiny", &uri];
    let said = here
        .vireo(&[&args[..], &["--migrateuri", &at]].concat())
        .fails();
    assert!(said.contains("has not answered for 10 s"), "{said}");
    let [pid] = there.processes("vireo-vmm")[..] else {
        panic!("the target's VMM is gone");
    };
    assert_eq!(here.state("tiny"), "paused (migrating)");
    let log = || std::fs::read_to_string(here.path("daemon.log")).unwrap();
    eventually("it is tried", || log().contains("is in use by process"));
    assert_eq!(here.state("tiny"), "paused (migrating)");
    // SAFETY: takes numbers; the process is this test's own.
    unsafe { libc::kill(pid, libc::SIGCONT) };
    eventually("the target has nothing", || {
        there.processes("vireo-vmm").is_empty() && !is_there(&there)
    });
    eventually("it runs", || here.state("tiny").starts_with("running"));
    answers(&here, "tiny");
    let busy = here.vireo(&["image", "check", "-q", &disk]);
    assert_ne!(busy.status, 0, "{busy:?}");
    here.vireo(&["destroy", "tiny"]).ok();
    here.vireo(&["image", "check", "-q", &disk]).ok();
}
