//! How a migration ends when a daemon dies, or somebody hangs: a definition is where its guest is, what has happened is
//! told, and whoever has had enough is heard.

use std::process::{Child, Stdio};

use vireo_tests::moves::{answers, daemon, daemon_with, eventually, hangs, is_there};
use vireo_tests::{Rig, tiny_guest};

const RESUMED: &str = "migrate.resumed";
const GRANTED: &str = "vmm.incoming-granted";

fn place(rig: &Rig) -> String {
    format!("unix://{}", rig.path("incoming").display())
}

/// A running guest, and another Vireo for it.
fn two(here_has: Option<(&str, &str)>, there_has: Option<(&str, &str)>) -> (Rig, Rig) {
    let (here, there) = (Rig::new(), Rig::new());
    drop(daemon_with(&here, here_has));
    drop(daemon_with(&there, there_has));
    here.define(&tiny_guest(&here, "tiny", "qemu"));
    here.vireo(&["start", "tiny"]).ok();
    answers(&here, "tiny");
    (here, there)
}

fn arguments(there: &Rig, how: &[&str]) -> Vec<String> {
    let (uri, at) = (there.uri(), place(there));
    let fixed = ["migrate", "tiny", &uri, "--migrateuri", &at];
    let all = fixed.iter().chain(how);
    all.map(|word| (*word).to_owned()).collect()
}

fn moves(here: &Rig, there: &Rig, how: &[&str]) -> vireo_tests::Run {
    let args = arguments(there, how);
    here.vireo(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn begins(here: &Rig, there: &Rig, how: &[&str]) -> Child {
    let mut client = here.command("vireo");
    client.args(arguments(there, how)).stderr(Stdio::piped());
    client.spawn().unwrap()
}

fn fails(client: Child) -> String {
    let output = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    said
}

fn signal(pid: i32, number: i32) {
    // SAFETY: takes numbers; the process is this test's own.
    unsafe { libc::kill(pid, number) };
}

fn is_persistent(rig: &Rig) -> bool {
    let info = rig.vireo(&["dominfo", "tiny"]);
    info.status == 0 && info.ok().contains("Persistent:     yes")
}

fn runs_only(here: &Rig, there: &Rig, what: &str) {
    eventually(&format!("{what}: the other side has nothing"), || {
        there.processes("vireo-vmm").is_empty() && !is_there(there)
    });
    eventually(&format!("{what}: it runs"), || {
        here.state("tiny").starts_with("running")
    });
    answers(here, "tiny");
}

/// What the last job came to: its type, and everything about it.
fn completed(rig: &Rig) -> String {
    let raw = ["domjobinfo", "tiny", "--completed", "--keep-completed"];
    let shown = rig.vireo(&raw).ok();
    let all = rig.vireo(&[&raw[..], &["--rawstats"]].concat()).ok();
    shown + &all
}

#[test]
fn a_target_that_hangs_when_it_has_built_the_machine_is_waited_for_only_so_long() {
    let stops = Some(("VIREO_STOP_AT", "vmm.incoming-ready"));
    let words = "waited 20 s in vain for the domain's VMM to say that its machine is built";
    for how in [&["--live"][..], &["--live", "--p2p"]] {
        let (here, there) = two(None, stops);
        let said = moves(&here, &there, how).fails();
        assert!(said.contains(words), "{how:?}: {said}");
        runs_only(&here, &there, &format!("{how:?}"));
        here.vireo(&["destroy", "tiny"]).ok();
    }
}

#[test]
fn whoever_gives_up_a_migration_is_heard_while_the_target_hangs() {
    // Its VMM, when the machine is built; its daemon, when the guest is to run there.
    for (point, how) in [
        ("vmm.incoming-ready", &["--live"][..]),
        ("vmm.incoming-ready", &["--live", "--p2p"]),
        ("migrate.finishing", &["--live", "--p2p"]),
    ] {
        let what = format!("{point} {how:?}");
        let (here, there) = two(None, Some(("VIREO_STOP_AT", point)));
        let client = begins(&here, &there, how);
        eventually(&format!("{what}: it stands still"), || {
            here.state("tiny") == "paused (migrating)"
        });
        eventually(&format!("{what}: it is given up"), || {
            here.vireo(&["domjobabort", "tiny"]).status == 0
        });
        let said = fails(client);
        // A client in the middle tells what the target says: that, or on a slow machine that it has waited long enough.
        let words = match how.contains(&"--p2p") {
            true => &["canceled by client"][..],
            false => &["the source of the migration has gone", "in vain"],
        };
        assert!(
            words.iter().any(|words| said.contains(words)),
            "{what}: {said}"
        );
        eventually(&what, || here.state("tiny").starts_with("running"));
        let told = completed(&here);
        assert!(told.contains("Cancelled"), "{what}: {told}");
        assert!(told.contains("operation: 5"), "{what}: {told}");
        for pid in there.processes("vireod") {
            signal(pid, libc::SIGCONT);
        }
        runs_only(&here, &there, &what);
        here.vireo(&["destroy", "tiny"]).ok();
    }
}

#[test]
fn whoever_gives_up_a_migration_is_heard_while_the_source_hangs() {
    for how in [&["--live"][..], &["--live", "--p2p"]] {
        let what = format!("{how:?}");
        let (here, there) = two(Some(("VIREO_STOP_AT", "vmm.migrate-greeted")), None);
        let client = begins(&here, &there, how);
        let [pid] = here.processes("vireo-vmm")[..] else {
            panic!("{what}: no guest");
        };
        eventually(&format!("{what}: it hangs"), || hangs(pid));
        here.vireo(&["domjobabort", "tiny"]).ok();
        let said = fails(client);
        assert!(said.contains("canceled by client"), "{what}: {said}");
        assert!(completed(&here).contains("Cancelled"), "{what}");
        eventually(&format!("{what}: the target has nothing"), || {
            there.processes("vireo-vmm").is_empty() && !is_there(&there)
        });
        signal(pid, libc::SIGCONT);
        runs_only(&here, &there, &what);
        here.vireo(&["destroy", "tiny"]).ok();
    }
}

#[test]
fn a_peer_that_does_not_answer_is_given_up_on_request() {
    let (here, there) = two(None, None);
    let [pid] = there.processes("vireod")[..] else {
        panic!("no daemon");
    };
    signal(pid, libc::SIGSTOP);
    let client = begins(&here, &there, &["--live", "--p2p"]);
    eventually("it is a job already", || {
        let job = here.vireo(&["domjobinfo", "tiny"]).ok();
        job.contains("Outgoing migration")
    });
    // Nobody else moves it, or changes it.
    let said = moves(&here, &there, &["--live", "--p2p"]).fails();
    assert!(said.contains("another job is running"), "{said}");
    let said = here.vireo(&["reset", "tiny"]).fails();
    assert!(said.contains("domain is being migrated"), "{said}");
    here.vireo(&["domjobabort", "tiny"]).ok();
    let said = fails(client);
    assert!(said.contains("canceled by client"), "{said}");
    assert!(here.state("tiny").starts_with("running"));
    assert!(completed(&here).contains("Cancelled"));
    signal(pid, libc::SIGCONT);
    moves(&here, &there, &["--live", "--p2p"]).ok();
    runs_only(&there, &here, "later");
}

#[test]
fn a_definition_is_where_its_guest_is_though_the_targets_daemon_dies_as_it_begins() {
    for how in [
        &["--live", "--persistent"][..],
        &["--live", "--persistent", "--p2p"],
    ] {
        let (here, there) = two(None, Some(("VIREO_KILL_AT", RESUMED)));
        moves(&here, &there, how);
        runs_only(&there, &here, &format!("{how:?}"));
        eventually(&format!("{how:?}: it is defined"), || is_persistent(&there));
        // What was not acknowledged is not gone here either.
        assert!(is_persistent(&here), "{how:?}");
        // It is so for good.
        there.vireo(&["destroy", "tiny"]).ok();
        there.kill_daemon();
        assert!(is_persistent(&there), "{how:?}");
    }
    // One that is to stay paused.
    let (here, there) = two(None, Some(("VIREO_KILL_AT", RESUMED)));
    moves(&here, &there, &["--live", "--persistent", "--suspend"]);
    eventually("it is here, paused", || {
        there.state("tiny") == "paused (user)"
    });
    eventually("it is defined", || is_persistent(&there));
    eventually("it is not there any more", || !is_there(&here));
    there.vireo(&["resume", "tiny"]).ok();
    answers(&there, "tiny");
}

#[test]
fn a_definition_is_where_its_guest_is_though_the_control_connection_ends_as_it_begins() {
    let (here, there) = two(None, Some(("VIREO_STOP_AT", GRANTED)));
    let client = begins(
        &here,
        &there,
        &["--live", "--persistent", "--undefinesource"],
    );
    // It hangs with the guest in its hands when its daemon goes.
    let vmm = || there.processes("vireo-vmm");
    eventually("it hangs", || matches!(vmm()[..], [pid] if hangs(pid)));
    there.kill_daemon();
    fails(client);
    let [pid] = vmm()[..] else {
        panic!("the target's VMM is gone");
    };
    // The next daemon is there before it comes round.
    drop(daemon(&there, None));
    signal(pid, libc::SIGCONT);
    runs_only(&there, &here, "it goes on there");
    eventually("it is defined there", || is_persistent(&there));
    assert!(
        is_persistent(&here),
        "nobody has said that it is defined there"
    );
}

#[test]
fn a_source_whose_daemon_dies_at_the_end_undefines_what_has_gone() {
    let how = ["--live", "--persistent", "--undefinesource"];
    let (here, there) = two(Some(("VIREO_KILL_AT", "migrate.finished")), None);
    moves(&here, &there, &how);
    eventually("it is undefined", || {
        here.vireo(&["dominfo", "tiny"]).status != 0
    });
    runs_only(&there, &here, "there");
    assert!(is_persistent(&there));
}

#[test]
fn the_next_daemon_tells_what_became_of_a_migration() {
    // Its daemon dies while it moves: live, or not.
    for how in [&[][..], &["--live"], &["--live", "--p2p"]] {
        let (here, there) = two(Some(("VIREO_KILL_AT", "migrate.moving")), None);
        moves(&here, &there, how);
        runs_only(&here, &there, &format!("{how:?}"));
        let mut told = String::new();
        eventually(&format!("{how:?}: it is told"), || {
            told = completed(&here);
            told.contains("Failed")
        });
        assert!(told.contains("operation: 5"), "{how:?}: {told}");
        assert!(
            told.contains("the source ended meanwhile"),
            "{how:?}: {told}"
        );
        // Not for ever: who has heard it has heard it.
        here.vireo(&["domjobinfo", "tiny", "--completed"]).ok();
        here.kill_daemon();
        assert!(!completed(&here).contains("Failed"), "{how:?}");
        // A new one is a new one.
        moves(&here, &there, how).ok();
        answers(&there, "tiny");
        there.vireo(&["destroy", "tiny"]).ok();
    }
    // When the guest has gone.
    let (here, there) = two(Some(("VIREO_KILL_AT", "migrate.finished")), None);
    moves(&here, &there, &["--live"]);
    runs_only(&there, &here, "it has gone");
    for _ in 0..2 {
        let told = completed(&here);
        assert!(told.contains("Completed"), "{told}");
        assert!(told.contains("Outgoing migration"), "{told}");
        assert!(told.contains("memory_total: "), "{told}");
        here.kill_daemon();
    }
    // Long after it.
    for (rig, way) in [(&here, "Outgoing"), (&there, "Incoming")] {
        rig.kill_daemon();
        let told = completed(rig);
        assert!(told.contains("Completed"), "{told}");
        assert!(told.contains(&format!("{way} migration")), "{told}");
    }
    // A new start is not that guest.
    there.vireo(&["destroy", "tiny"]).ok();
    here.vireo(&["start", "tiny"]).ok();
    here.kill_daemon();
    assert!(!completed(&here).contains("Completed"));
}
