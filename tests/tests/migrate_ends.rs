//! How a migration ends when a daemon dies, or somebody hangs: a definition is where its guest is, what has happened is
//! told, and whoever has had enough is heard.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use vireo_tests::moves::{
    answers, daemon, daemon_with, daemon_with_all, eventually, hangs, is_there,
};
use vireo_tests::{Rig, tiny_guest};

const RESUMED: &str = "migrate.resumed";
const GRANTED: &str = "vmm.incoming-granted";
/// No wait for somebody who hangs is longer, on a machine that does much else, too.
const LONG: Duration = Duration::from_secs(90);
/// What is said of one who does.
const SILENT: [&str; 2] = ["in vain", "keepalive"];

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
    // As soon as that is settled; when nothing is left of what ran.
    for point in ["migrate.finished", "domain.cleared-away"] {
        let (here, there) = two(Some(("VIREO_KILL_AT", point)), None);
        let run = moves(&here, &there, &how);
        assert_ne!(run.status, 0, "{point}: its daemon has died");
        eventually(&format!("{point}: it is undefined"), || {
            here.vireo(&["dominfo", "tiny"]).status != 0
        });
        runs_only(&there, &here, point);
        assert!(is_persistent(&there), "{point}");
    }
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

/// Its daemon hangs when the guest is to run there, and has not been told so yet; it comes round, or is killed.
#[test]
fn a_targets_daemon_that_hangs_before_the_guest_runs_there_is_waited_for_only_so_long() {
    std::thread::scope(|scope| {
        for how in [&["--live"][..], &["--live", "--p2p"]] {
            for (number, name) in [(libc::SIGCONT, "comes round"), (libc::SIGKILL, "dies")] {
                scope.spawn(move || {
                    let what = format!("{how:?}: it {name}");
                    let (here, there) = two(None, Some(("VIREO_STOP_AT", "migrate.finishing")));
                    let began = Instant::now();
                    let said = moves(&here, &there, how).fails();
                    assert!(began.elapsed() < LONG, "{what}: {:?}", began.elapsed());
                    assert!(
                        SILENT.iter().any(|words| said.contains(words)),
                        "{what}: {said}"
                    );
                    // It runs on here whatever the target's daemon does.
                    eventually(&what, || here.state("tiny").starts_with("running"));
                    answers(&here, "tiny");
                    let told = completed(&here);
                    assert!(told.contains("in vain"), "{what}: {told}");
                    for pid in there.processes("vireod") {
                        signal(pid, number);
                    }
                    runs_only(&here, &there, &what);
                    here.vireo(&["destroy", "tiny"]).ok();
                });
            }
        }
    });
}

/// The same when the guest runs there already.
#[test]
fn a_targets_daemon_that_hangs_when_the_guest_runs_there_keeps_nobody() {
    std::thread::scope(|scope| {
        for how in [&["--live"][..], &["--live", "--p2p"]] {
            for (number, name) in [(libc::SIGCONT, "comes round"), (libc::SIGKILL, "dies")] {
                scope.spawn(move || {
                    let what = format!("{how:?}: it {name}");
                    let (here, there) = two(None, Some(("VIREO_STOP_AT", RESUMED)));
                    let began = Instant::now();
                    let moved = moves(&here, &there, how);
                    assert!(began.elapsed() < LONG, "{what}: {:?}", began.elapsed());
                    // Whoever has both daemons' words knows that it went well.
                    assert_eq!(
                        moved.status == 0,
                        how.contains(&"--p2p"),
                        "{what}: {moved:?}"
                    );
                    assert!(here.processes("vireo-vmm").is_empty(), "{what}");
                    assert!(!is_there(&here), "{what}");
                    for pid in there.processes("vireod") {
                        signal(pid, number);
                    }
                    runs_only(&there, &here, &what);
                    there.vireo(&["destroy", "tiny"]).ok();
                });
            }
        }
    });
}

/// Nobody is to change it, and so it is a job from the beginning: which can be given up before anything moves.
#[test]
fn a_protected_migration_is_given_up_before_the_guest_moves() {
    let (here, there) = two(None, Some(("VIREO_STOP_AT", "migrate.prepared")));
    let client = begins(&here, &there, &["--live", "--change-protection"]);
    let [pid] = there.processes("vireod")[..] else {
        panic!("no daemon");
    };
    eventually("the target is being prepared", || hangs(pid));
    let job = here.vireo(&["domjobinfo", "tiny"]).ok();
    assert!(job.contains("Outgoing migration"), "{job}");
    let said = here.vireo(&["reset", "tiny"]).fails();
    assert!(said.contains("domain is being migrated"), "{said}");
    here.vireo(&["domjobabort", "tiny"]).ok();
    // It has ended by that.
    let told = completed(&here);
    assert!(told.contains("Cancelled"), "{told}");
    assert!(told.contains("operation: 5"), "{told}");
    let said = here.vireo(&["domjobabort", "tiny"]).fails();
    assert!(said.contains("no job is active"), "{said}");
    here.vireo(&["reset", "tiny"]).ok();
    signal(pid, libc::SIGCONT);
    let said = fails(client);
    assert!(said.contains("canceled by client"), "{said}");
    runs_only(&here, &there, "it is given up");
    // Nothing is in the way of another one, or left of it.
    there.kill_daemon();
    drop(daemon(&there, None));
    moves(&here, &there, &["--live", "--change-protection"]).ok();
    runs_only(&there, &here, "later");
    for words in ["Completed", "Outgoing migration"] {
        assert!(completed(&here).contains(words));
    }
}

/// Nor is it in the way when its client goes, or the target refuses.
#[test]
fn a_protected_migration_ends_with_its_client_or_with_the_targets_refusal() {
    let (here, there) = two(None, Some(("VIREO_STOP_AT", "migrate.prepared")));
    let how = ["--live", "--change-protection"];
    let mut client = begins(&here, &there, &how);
    let [pid] = there.processes("vireod")[..] else {
        panic!("no daemon");
    };
    eventually("the target is being prepared", || hangs(pid));
    client.kill().unwrap();
    client.wait().unwrap();
    eventually("its job has ended", || {
        here.vireo(&["reset", "tiny"]).status == 0
    });
    assert!(completed(&here).contains("Failed"));
    signal(pid, libc::SIGCONT);
    runs_only(&here, &there, "its client has gone");
    there.kill_daemon();
    drop(daemon(&there, None));
    // Somebody listens there already: no place for a guest.
    let taken = std::os::unix::net::UnixListener::bind(there.path("incoming")).unwrap();
    moves(&here, &there, &how).fails();
    here.vireo(&["reset", "tiny"]).ok();
    drop(taken);
    std::fs::remove_file(there.path("incoming")).unwrap();
    moves(&here, &there, &how).ok();
    runs_only(&there, &here, "later");
}

#[test]
fn a_source_that_hangs_while_its_guest_stands_still_is_given_up() {
    // A minute is too long for a test.
    let point = ("VIREO_STOP_AT", "vmm.migrate-still");
    for how in [&["--live"][..], &["--live", "--p2p"]] {
        let what = format!("{how:?}");
        let (here, there) = (Rig::new(), Rig::new());
        drop(daemon_with_all(
            &here,
            &[point, ("VIREO_LIMIT", "silence=3")],
        ));
        drop(daemon(&there, None));
        here.define(&tiny_guest(&here, "tiny", "qemu"));
        here.vireo(&["start", "tiny"]).ok();
        answers(&here, "tiny");
        let began = Instant::now();
        let said = moves(&here, &there, how).fails();
        assert!(began.elapsed() < LONG, "{what}: {:?}", began.elapsed());
        assert!(said.contains("has not answered for 3s"), "{what}: {said}");
        let [pid] = here.processes("vireo-vmm")[..] else {
            panic!("{what}: no guest");
        };
        assert!(hangs(pid), "{what}");
        assert!(completed(&here).contains("Failed"), "{what}");
        // The target does not wait for it.
        eventually(&format!("{what}: the target has nothing"), || {
            there.processes("vireo-vmm").is_empty() && !is_there(&there)
        });
        // It hears of that when it comes round.
        signal(pid, libc::SIGCONT);
        runs_only(&here, &there, &what);
        here.vireo(&["destroy", "tiny"]).ok();
    }
}
