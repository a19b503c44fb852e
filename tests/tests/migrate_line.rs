//! The line between two hosts while a guest goes over it, frame by frame: it breaks, it stalls, or brings what the target
//! can't take. A middleman on the target's socket sees to that; the guest is on one side afterwards.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use vireo_tests::moves::{answers, daemon, daemon_with_all, eventually, hangs, is_there};
use vireo_tests::{Rig, tiny_guest};

// As `vmm_api::migrate::Kind` has them.
const HELLO: u16 = 2;
const VERDICT: u16 = 3;
const ZERO: u16 = 5;
const ROUND: u16 = 7;
const STATE: u16 = 8;
const ASK: u16 = 9;
const GRANT: u16 = 10;
const RUNNING: u16 = 11;

/// What happens to a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The line breaks instead of passing it on.
    Before,
    /// It breaks when that has been passed on.
    After,
    /// Nothing is passed on any more.
    Stall,
    /// It tells of a processor that nobody has.
    Richer,
}

/// The frame with this number among those of a kind, and its fate.
#[derive(Debug, Clone, Copy)]
struct Rule {
    kind: u16,
    number: u32,
    fate: Fate,
}

/// Everything is passed on.
const NONE: Rule = Rule {
    kind: 0,
    number: 0,
    fate: Fate::Before,
};

/// Passes frames on, one way.
fn pass(mut from: UnixStream, mut to: UnixStream, rule: Rule, seen: &AtomicU32) {
    loop {
        let mut head = [0; 8];
        if from.read_exact(&mut head).is_err() {
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
        let kind = u16::from_le_bytes([head[0], head[1]]);
        let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let mut body = vec![0; len as usize];
        if from.read_exact(&mut body).is_err() {
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
        let meant = kind == rule.kind && seen.fetch_add(1, Ordering::Relaxed) + 1 == rule.number;
        let fate = meant.then_some(rule.fate);
        if fate == Some(Fate::Stall) {
            // Until the test is over and its sockets are closed.
            let _ = from.read_to_end(&mut Vec::new());
            return;
        }
        if fate == Some(Fate::Richer) {
            let mut hello: serde_json::Value = serde_json::from_slice(&body).unwrap();
            for leaf in hello["cpuid"].as_array_mut().unwrap() {
                if leaf[0] == 7 {
                    leaf[2] = serde_json::json!([0, u32::MAX, u32::MAX, u32::MAX]);
                }
            }
            body = serde_json::to_vec(&hello).unwrap();
            head[4..].copy_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
        }
        let passed = fate == Some(Fate::Before)
            || to
                .write_all(&head)
                .and_then(|()| to.write_all(&body))
                .is_err();
        if passed || fate == Some(Fate::After) {
            for end in [&from, &to] {
                let _ = end.shutdown(Shutdown::Both);
            }
            return;
        }
    }
}

/// The middleman, in the place where the target listened.
struct Line {
    /// The guest's connection, both of its ends.
    ends: [UnixStream; 2],
    over: Arc<AtomicBool>,
}

impl Line {
    /// Whoever comes after the guest is passed on as it is, unless the line is `cut` for good.
    fn new(path: &Path, real: &Path, rule: Rule, cut: bool, source: i32) -> Self {
        std::fs::rename(path, real).unwrap();
        let middle = UnixListener::bind(path).unwrap();
        // SAFETY: takes numbers; the process is this test's own.
        unsafe { libc::kill(source, libc::SIGCONT) };
        middle.set_nonblocking(true).unwrap();
        let mut accepted = None;
        eventually("the source comes", || {
            accepted = middle.accept().ok();
            accepted.is_some()
        });
        let (from, _) = accepted.unwrap();
        let to = UnixStream::connect(real).unwrap();
        join(&from, &to, rule);
        let over = Arc::new(AtomicBool::new(false));
        if !cut {
            let (real, over) = (real.to_owned(), Arc::clone(&over));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    match middle.accept() {
                        Ok((from, _)) => {
                            // Nobody there: nobody here either.
                            if let Ok(to) = UnixStream::connect(&real) {
                                join(&from, &to, NONE);
                            }
                        }
                        Err(error) => {
                            assert_eq!(error.kind(), ErrorKind::WouldBlock);
                            std::thread::sleep(Duration::from_millis(10));
                        }
                    }
                }
            });
        }
        Self {
            ends: [from, to],
            over,
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

fn join(from: &UnixStream, to: &UnixStream, rule: Rule) {
    from.set_nonblocking(false).unwrap();
    let seen = Arc::new(AtomicU32::new(0));
    for (one, other) in [(from, to), (to, from)] {
        let (one, other) = (one.try_clone().unwrap(), other.try_clone().unwrap());
        let seen = Arc::clone(&seen);
        std::thread::spawn(move || pass(one, other, rule, &seen));
    }
}

/// A guest that goes over such a line, and what its client has said when it is done.
fn goes(how: &[&str], rule: Rule, cut: bool) -> (Rig, Rig, Output, Line) {
    goes_while(how, rule, cut, |_| {})
}

/// As [`goes`]; this is done on the source meanwhile.
fn goes_while(
    how: &[&str],
    rule: Rule,
    cut: bool,
    meanwhile: impl FnOnce(&Rig),
) -> (Rig, Rig, Output, Line) {
    goes_with(how, rule, cut, None, meanwhile)
}

/// As [`goes_while`], with a point at which the source's daemon dies.
fn goes_with(
    how: &[&str],
    rule: Rule,
    cut: bool,
    dies_at: Option<&str>,
    meanwhile: impl FnOnce(&Rig),
) -> (Rig, Rig, Output, Line) {
    // It stops when the target listens.
    let mut points = vec![("VIREO_STOP_AT", LISTENS)];
    points.extend(dies_at.map(|point| ("VIREO_KILL_AT", point)));
    goes_at(how, rule, cut, &points, meanwhile)
}

/// Where the source's daemon stops for a line.
const LISTENS: &str = "migrate.connecting";

/// As [`goes_while`], with points at which the source's processes stop and die: [`LISTENS`] among them.
fn goes_at(
    how: &[&str],
    rule: Rule,
    cut: bool,
    points: &[(&str, &str)],
    meanwhile: impl FnOnce(&Rig),
) -> (Rig, Rig, Output, Line) {
    let what = format!("{how:?} {rule:?}");
    let (here, there) = (Rig::new(), Rig::new());
    drop(daemon_with_all(&here, points));
    drop(daemon(&there, None));
    here.define(&tiny_guest(&here, "tiny", "qemu"));
    here.vireo(&["start", "tiny"]).ok();
    answers(&here, "tiny");
    let path = there.path("incoming");
    let (uri, at) = (there.uri(), format!("unix://{}", path.display()));
    let mut client = here.command("vireo");
    client
        .args(["migrate", "--live", "tiny", &uri, "--migrateuri", &at])
        .args(how)
        .stderr(Stdio::piped());
    let client = client.spawn().unwrap();
    let [source] = here.processes("vireod")[..] else {
        panic!("{what}: no daemon");
    };
    eventually(&format!("{what}: the target listens"), || hangs(source));
    let line = Line::new(&path, &there.path("real"), rule, cut, source);
    meanwhile(&here);
    let output = client.wait_with_output().unwrap();
    (here, there, output, line)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The guest runs on the one side, and nothing of it is left on the other.
fn only_on(one: &Rig, other: &Rig, what: &str) {
    eventually(&format!("{what}: the other side has nothing"), || {
        other.processes("vireo-vmm").is_empty() && !is_there(other)
    });
    eventually(&format!("{what}: it runs"), || {
        one.state("tiny").starts_with("running")
    });
    answers(one, "tiny");
    assert_eq!(one.processes("vireo-vmm").len(), 1, "{what}");
    assert!(
        other.processes("vireo-vmm").is_empty(),
        "{what}: it runs on both sides"
    );
    let folders = |rig: &Rig| {
        let all = std::fs::read_dir(rig.path("run/vireo/domains")).unwrap();
        all.flatten().filter(|entry| entry.path().is_dir()).count()
    };
    eventually(&format!("{what}: the other side's folder is gone"), || {
        folders(other) == 0
    });
    assert_eq!(folders(one), 1, "{what}");
}

/// Nobody listens for a guest any more.
fn is_closed(there: &Rig, what: &str) {
    eventually(&format!("{what}: the target's socket is closed"), || {
        UnixStream::connect(there.path("real")).is_err() && !there.path("incoming").exists()
    });
}

/// Moves a guest over such a line, and it stays; what the client says.
fn moved(how: &[&str], rule: Rule) -> String {
    let what = format!("{how:?} {rule:?}");
    let (here, there, output, line) = goes(how, rule, false);
    let said = said(&output);
    assert!(!output.status.success(), "{what}: {said}");
    only_on(&here, &there, &what);
    let told = here
        .vireo(&["domjobinfo", "tiny", "--completed", "--rawstats"])
        .ok();
    assert!(told.contains("errmsg: "), "{what}: {told}");
    is_closed(&there, &what);
    drop(line);
    here.vireo(&["destroy", "tiny"]).ok();
    said
}

/// The same, but it goes.
fn gone(how: &[&str], rule: Rule, cut: bool) {
    let what = format!("{how:?} {rule:?} {cut}");
    let (here, there, output, line) = goes(how, rule, cut);
    assert!(output.status.success(), "{what}: {}", said(&output));
    only_on(&there, &here, &what);
    for (rig, way) in [(&here, "Outgoing"), (&there, "Incoming")] {
        let told = rig.vireo(&["domjobinfo", "tiny", "--completed"]).ok();
        assert!(told.contains("Completed"), "{what}: {told}");
        assert!(told.contains(way), "{what}: {told}");
    }
    is_closed(&there, &what);
    drop(line);
    there.vireo(&["destroy", "tiny"]).ok();
}

const WAYS: [&[&str]; 2] = [&[], &["--p2p"]];

#[test]
fn a_line_that_breaks_before_the_target_asks_for_the_guest_leaves_it_here() {
    let frames = [
        (HELLO, 1, Fate::Before),
        (VERDICT, 1, Fate::Before),
        (VERDICT, 1, Fate::After),
        (ZERO, 1, Fate::After),
        (ROUND, 1, Fate::Before),
        (STATE, 1, Fate::Before),
        (STATE, 1, Fate::After),
        (VERDICT, 2, Fate::Before),
        (VERDICT, 2, Fate::After),
    ];
    for (kind, number, fate) in frames {
        let rule = Rule { kind, number, fate };
        for how in WAYS {
            moved(how, rule);
        }
    }
}

#[test]
fn a_line_that_breaks_before_the_guest_is_given_away_leaves_it_here() {
    let rule = Rule {
        kind: ASK,
        number: 1,
        fate: Fate::Before,
    };
    for how in WAYS {
        moved(how, rule);
    }
}

/// It was given away, and that never arrived: the source's VMM can't know, but the target does.
#[test]
fn a_line_that_breaks_as_the_guest_is_given_away_leaves_it_here() {
    let rule = Rule {
        kind: GRANT,
        number: 1,
        fate: Fate::Before,
    };
    for how in WAYS {
        let said = moved(how, rule);
        assert!(
            said.contains("the source keeps the guest"),
            "{how:?}: {said}"
        );
    }
}

/// It has arrived, and the source does not hear of that.
#[test]
fn a_line_that_breaks_when_the_target_may_run_the_guest_leaves_it_there() {
    for (kind, fate) in [
        (GRANT, Fate::After),
        (RUNNING, Fate::Before),
        (RUNNING, Fate::After),
    ] {
        let rule = Rule {
            kind,
            number: 1,
            fate,
        };
        for how in WAYS {
            gone(how, rule, false);
        }
    }
}

/// Whether the right to run still gets through is chance. It is on one side all the same.
#[test]
fn a_line_that_breaks_when_the_target_has_asked_for_the_guest_leaves_it_on_one_side() {
    let rule = Rule {
        kind: ASK,
        number: 1,
        fate: Fate::After,
    };
    for how in WAYS {
        let (here, there, output, _line) = goes(how, rule, false);
        let (one, other) = match output.status.success() {
            true => (&there, &here),
            false => (&here, &there),
        };
        only_on(one, other, &format!("{how:?} {}", said(&output)));
        is_closed(&there, &format!("{how:?}"));
        one.vireo(&["destroy", "tiny"]).ok();
    }
}

/// The target can't be asked, but whoever moves the guest has heard from its daemon that it runs there.
#[test]
fn whoever_moves_the_guest_tells_that_it_has_come() {
    for fate in [Fate::Before, Fate::Stall] {
        let rule = Rule {
            kind: RUNNING,
            number: 1,
            fate,
        };
        for how in WAYS {
            gone(how, rule, true);
        }
    }
}

/// Nobody can tell: it stands still, and its owner decides.
#[test]
fn a_guest_that_may_be_elsewhere_stays_paused() {
    let rule = Rule {
        kind: GRANT,
        number: 1,
        fate: Fate::Before,
    };
    for how in WAYS {
        let what = format!("{how:?}");
        let (here, there, output, line) = goes_while(how, rule, true, |here| {
            // Nor before it is known that nobody knows.
            let resume = || here.vireo(&["resume", "tiny"]);
            eventually(&format!("{what}: nobody has it go on"), || {
                let said = resume().fails();
                said.contains("is being found out")
            });
        });
        let said = said(&output);
        assert!(!output.status.success(), "{what}: {said}");
        assert!(
            said.contains("is not known; it stays paused here"),
            "{what}: {said}"
        );
        let told = here
            .vireo(&["domjobinfo", "tiny", "--completed", "--rawstats"])
            .ok();
        assert!(told.contains("resume has it go on here"), "{what}: {told}");
        assert_eq!(here.state("tiny"), "paused (migrating)", "{what}");
        eventually(&format!("{what}: the target has nothing"), || {
            there.processes("vireo-vmm").is_empty() && !is_there(&there)
        });
        here.vireo(&["resume", "tiny"]).ok();
        only_on(&here, &there, &what);
        drop(line);
        here.vireo(&["destroy", "tiny"]).ok();
    }
}

/// The right to run does not get through, and the line does not break either.
#[test]
fn a_line_that_stalls_as_the_guest_is_given_away_leaves_it_here() {
    let rule = Rule {
        kind: GRANT,
        number: 1,
        fate: Fate::Stall,
    };
    std::thread::scope(|scope| {
        for how in WAYS {
            scope.spawn(move || {
                let said = moved(how, rule);
                assert!(!said.contains("panicked"), "{how:?}: {said}");
            });
        }
    });
}

/// The line ends, and the source's VMM is slow to say that it does not know who has the guest: the target has said so by
/// then.
#[test]
fn a_vmm_that_hears_late_that_the_guest_has_not_gone_has_it_go_on() {
    let rule = Rule {
        kind: GRANT,
        number: 1,
        fate: Fate::Before,
    };
    let points = [("VIREO_STOP_AT", &*format!("{LISTENS},vmm.migrate-unknown"))];
    let (here, there, output, line) = goes_at(&["--p2p"], rule, false, &points, |here| {
        let mut stopped = 0;
        eventually("the VMM stops", || {
            let all = here.processes("vireo-vmm");
            stopped = all.into_iter().find(|pid| hangs(*pid)).unwrap_or_default();
            stopped != 0
        });
        // So long after the target's word the daemon does not wait for the VMM's.
        std::thread::sleep(Duration::from_secs(5));
        // SAFETY: plain numbers.
        unsafe { libc::kill(stopped, libc::SIGCONT) };
    });
    assert!(!output.status.success(), "{}", said(&output));
    only_on(&here, &there, "it has not gone");
    drop(line);
    here.vireo(&["destroy", "tiny"]).ok();
}

#[test]
fn a_line_that_stalls_at_any_phase_is_waited_for_only_so_long() {
    let frames = [
        (HELLO, 1, ""),
        (VERDICT, 1, "nothing moved for 30 s"),
        (ROUND, 1, ""),
        (STATE, 1, "waited 15 s in vain"),
        (VERDICT, 2, "waited 15 s in vain"),
        (ASK, 1, ""),
    ];
    std::thread::scope(|scope| {
        for (kind, number, words) in frames {
            scope.spawn(move || {
                let fate = Fate::Stall;
                let said = moved(&[], Rule { kind, number, fate });
                assert!(said.contains(words), "{kind} {number}: {said}");
            });
        }
    });
}

#[test]
fn a_processor_that_the_target_lacks_keeps_the_guest_here() {
    let rule = Rule {
        kind: HELLO,
        number: 1,
        fate: Fate::Richer,
    };
    for how in [&[][..], &["--p2p"]] {
        let said = moved(how, rule);
        assert!(said.contains("lacks CPU features: "), "{how:?}: {said}");
    }
}

/// The source's daemon dies before it knows where the guest is. The next one asks, and nothing runs until it has heard.
#[test]
fn the_next_daemon_asks_where_the_guest_is() {
    for (kind, came) in [(RUNNING, true), (GRANT, false)] {
        let what = format!("{kind}");
        let rule = Rule {
            kind,
            number: 1,
            fate: Fate::Before,
        };
        let dies_at = Some("migrate.undecided");
        let (here, there, output, line) = goes_with(&["--p2p"], rule, true, dies_at, |_| {});
        assert!(!output.status.success(), "{what}: {}", said(&output));
        // Nobody can be asked yet.
        assert_eq!(here.state("tiny"), "paused (migrating)", "{what}");
        let resumed = here.vireo(&["resume", "tiny"]).fails();
        assert!(resumed.contains("is being found out"), "{what}: {resumed}");
        std::fs::rename(there.path("real"), there.path("incoming")).unwrap();
        let (one, other) = match came {
            true => (&there, &here),
            false => (&here, &there),
        };
        only_on(one, other, &what);
        let told = there.vireo(&["domjobinfo", "tiny", "--completed"]);
        assert!(told.out.contains("Incoming") == came, "{what}: {told:?}");
        if !came {
            let info = ["domjobinfo", "tiny", "--completed", "--rawstats"];
            let told = here.vireo(&info).ok();
            assert!(
                told.contains("of the source ended meanwhile"),
                "{what}: {told}"
            );
        }
        drop(line);
        one.vireo(&["destroy", "tiny"]).ok();
    }
}

/// The same, and nobody can be asked: it stays paused for its owner.
#[test]
fn the_next_daemon_has_no_guest_go_on_that_may_be_elsewhere() {
    let rule = Rule {
        kind: RUNNING,
        number: 1,
        fate: Fate::Before,
    };
    let dies_at = Some("migrate.undecided");
    let (here, there, output, line) = goes_with(&["--p2p"], rule, true, dies_at, |_| {});
    assert!(!output.status.success(), "{}", said(&output));
    let told = || {
        let info = ["domjobinfo", "tiny", "--completed", "--keep-completed"];
        here.vireo(&[&info[..], &["--rawstats"]].concat())
    };
    eventually("it is said", || {
        told().out.contains("resume has it go on here")
    });
    assert_eq!(here.state("tiny"), "paused (migrating)");
    answers(&there, "tiny");
    here.vireo(&["destroy", "tiny"]).ok();
    only_on(&there, &here, "its owner has decided");
    drop(line);
    there.vireo(&["destroy", "tiny"]).ok();
}
