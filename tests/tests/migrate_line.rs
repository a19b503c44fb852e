//! The line between two hosts while a guest goes over it, frame by frame: it breaks, it stalls, or brings what the target
//! can't take. A middleman on the target's socket sees to that; the guest stays where it is.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vireo_tests::moves::{answers, daemon, daemon_with, eventually, hangs, is_there};
use vireo_tests::{Rig, tiny_guest};

// As `vmm_api::migrate::Kind` has them.
const HELLO: u16 = 2;
const VERDICT: u16 = 3;
const ZERO: u16 = 5;
const ROUND: u16 = 7;
const STATE: u16 = 8;
const ASK: u16 = 9;

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

/// Moves a guest over such a line; where it runs then, and what the client says.
fn moved(how: &[&str], rule: Rule) -> String {
    let what = format!("{how:?} {rule:?}");
    let (here, there) = (Rig::new(), Rig::new());
    // It stops when the target listens.
    drop(daemon_with(
        &here,
        Some(("VIREO_STOP_AT", "migrate.connecting")),
    ));
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
    let real = there.path("real");
    std::fs::rename(&path, &real).unwrap();
    let middle = UnixListener::bind(&path).unwrap();
    // SAFETY: takes numbers; the process is this test's own.
    unsafe { libc::kill(source, libc::SIGCONT) };
    middle.set_nonblocking(true).unwrap();
    let mut accepted = None;
    eventually(&format!("{what}: the source comes"), || {
        accepted = middle.accept().ok();
        accepted.is_some()
    });
    let (from, _) = accepted.unwrap();
    from.set_nonblocking(false).unwrap();
    let to = UnixStream::connect(&real).unwrap();
    let seen = Arc::new(AtomicU32::new(0));
    for (one, other) in [(&from, &to), (&to, &from)] {
        let (one, other) = (one.try_clone().unwrap(), other.try_clone().unwrap());
        let seen = Arc::clone(&seen);
        std::thread::spawn(move || pass(one, other, rule, &seen));
    }
    let output = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let (one, other) = (&here, &there);
    assert!(!output.status.success(), "{what}: {said}");
    eventually(&format!("{what}: the other side has nothing"), || {
        other.processes("vireo-vmm").is_empty() && !is_there(other)
    });
    eventually(&format!("{what}: it runs"), || {
        one.state("tiny").starts_with("running")
    });
    answers(one, "tiny");
    let told = here
        .vireo(&["domjobinfo", "tiny", "--completed", "--rawstats"])
        .ok();
    assert!(told.contains("errmsg: "), "{what}: {told}");
    for end in [from, to] {
        let _ = end.shutdown(Shutdown::Both);
    }
    one.vireo(&["destroy", "tiny"]).ok();
    said
}

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
        for how in [&[][..], &["--p2p"]] {
            moved(how, rule);
        }
    }
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
