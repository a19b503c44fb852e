//! `kill -9` at any moment: of the daemon, of a VMM. Nothing acknowledged is lost.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use vireo_tests::{Kernel, Rig, Terminal, left_out, linux_guest, namespace, soak, tiny_guest};

const SOON: Duration = Duration::from_secs(60);

fn kill(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn guests_run_on_without_their_daemon_and_are_found_again() {
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    for name in ["one", "two", "three"] {
        rig.define(&tiny_guest(&rig, name, "qemu"));
        rig.vireo(&["start", name]).ok();
    }
    let file = rig.write("transient.xml", tiny_guest(&rig, "transient", "qemu"));
    rig.vireo(&["create", &file]).ok();
    rig.vireo(&["suspend", "two"]).ok();
    rig.vireo(&["destroy", "three"]).ok();
    let before = rig.vireo(&["list", "--all"]).ok();
    let live = rig.vireo(&["dumpxml", "one"]).ok();
    let vmms = rig.processes("vireo-vmm");
    assert_eq!(vmms.len(), 3);
    kill(&mut daemon);
    assert_eq!(rig.processes("vireo-vmm"), vmms, "the guests run on");

    let mut daemon = rig.daemon();
    assert_eq!(rig.processes("vireo-vmm"), vmms);
    assert_eq!(rig.vireo(&["list", "--all"]).ok(), before, "ids and states");
    assert_eq!(rig.vireo(&["dumpxml", "one"]).ok(), live);
    assert_eq!(rig.state("one"), "running (booted)");
    assert_eq!(rig.state("two"), "paused (user)");
    assert!(
        rig.vireo(&["dominfo", "transient"])
            .ok()
            .contains("Persistent:     no")
    );
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", "one"]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("hello");
    terminal.expect("hello", SOON);
    terminal.send("\x1d");
    terminal.wait(SOON);
    rig.vireo(&["resume", "two"]).ok();
    // A domain started now does not get an id that is taken.
    rig.vireo(&["start", "three"]).ok();
    let ids = rig.vireo(&["list", "--id"]).ok();
    let mut ids: Vec<&str> = ids.split_whitespace().collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 4);
    // Their ends are still noticed.
    for name in ["one", "two", "transient"] {
        rig.vireo(&["destroy", name]).ok();
    }
    assert_eq!(rig.state("one"), "shut off (destroyed)");
    kill(&mut daemon);
}

#[test]
fn what_happened_while_the_daemon_was_away_is_told_by_the_next() {
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let mut consoles = Vec::new();
    for name in ["powers-off", "is-killed", "stays"] {
        rig.define(&tiny_guest(&rig, name, "qemu"));
        rig.vireo(&["start", name]).ok();
        let tty = rig.vireo(&["ttyconsole", name]).ok().trim().to_owned();
        consoles.push(tty);
    }
    kill(&mut daemon);
    // The guest's own power-off, asked for through its pty.
    fs::write(&consoles[0], "q").unwrap();
    let deadline = std::time::Instant::now() + SOON;
    while rig.processes("vireo-vmm").len() > 2 {
        assert!(
            std::time::Instant::now() < deadline,
            "the guest did not power off"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let victim = rig.processes("vireo-vmm").into_iter().find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .unwrap_or_default()
            .contains("is-killed")
            || fs::read_to_string(format!("/proc/{pid}/comm"))
                .unwrap_or_default()
                .contains("is-killed")
    });
    let victim = victim.expect("a VMM's command line or name tells its domain");
    // SAFETY: kill has no memory effects.
    unsafe { libc::kill(victim, libc::SIGKILL) };
    while rig.processes("vireo-vmm").len() > 1 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut daemon = rig.daemon();
    assert_eq!(rig.state("powers-off"), "shut off (shutdown)");
    assert_eq!(rig.state("is-killed"), "shut off (crashed)");
    assert_eq!(rig.state("stays"), "running (booted)");
    kill(&mut daemon);
}

#[test]
fn a_killed_vmm_is_reported_as_crashed() {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "guest", "qemu"));
    for _ in 0..3 {
        rig.vireo(&["start", "guest"]).ok();
        let vmm = rig.processes("vireo-vmm");
        assert_eq!(vmm.len(), 1);
        // SAFETY: kill has no memory effects.
        unsafe { libc::kill(vmm[0], libc::SIGKILL) };
        rig.wait_state("guest", "shut off (crashed)", SOON);
    }
}

/// A process that has got the number of a VMM that is gone is not taken for it.
#[test]
fn a_stranger_with_a_vmms_number_is_left_alone() {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "guest", "qemu"));
    rig.vireo(&["start", "guest"]).ok();
    let vmm = rig.processes("vireo-vmm");
    rig.kill_daemon();
    // SAFETY: kill has no memory effects.
    unsafe { libc::kill(vmm[0], libc::SIGKILL) };
    let mut stranger = Command::new("sleep").arg("600").spawn().unwrap();
    let folder = rig.path("run/vireo/domains");
    let mut folders = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let folder = folders.find(|path| path.is_dir()).unwrap();
    let mut changed = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        let Ok(mut record) = serde_json::from_str::<serde_json::Value>(&text) else {
            continue;
        };
        if record.pointer("/process/pid") == Some(&vmm[0].into()) {
            record["process"]["pid"] = stranger.id().into();
            fs::write(&path, record.to_string()).unwrap();
            changed += 1;
        }
    }
    assert_eq!(changed, 1);
    rig.wait_state("guest", "shut off (crashed)", SOON);
    rig.vireo(&["start", "guest"]).ok();
    rig.vireo(&["destroy", "guest"]).ok();
    assert!(stranger.try_wait().unwrap().is_none(), "it was killed");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

/// The Linux guest does not notice its daemon's death: its clock and console go on.
#[test]
fn linux_lives_through_its_daemons_death() {
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    rig.define(&linux_guest("deb", Kernel::V6_1));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", Duration::from_secs(200));
    terminal.send("mark=survived\r");
    terminal.expect("deb:/root# ", SOON);
    kill(&mut daemon);
    terminal.wait(SOON);
    let mut daemon = rig.daemon();
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", "deb"]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("\recho it $mark\r");
    terminal.expect("it survived", SOON);
    terminal.send("\x1d");
    terminal.wait(SOON);
    kill(&mut daemon);
}

/// `kill -9` of the daemon in the middle of define and undefine, at random moments: every
/// definition is afterwards there whole or not at all, and none that was acknowledged is lost.
#[test]
fn definitions_survive_the_daemons_death_at_any_moment() {
    let rounds = if soak() { 1000 } else { 200 };
    let mut seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
        | 1;
    if let Some(given) = std::env::var("VIREO_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
    {
        seed = given;
    }
    println!("seed {seed} (VIREO_SEED repeats it)");
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let rig = Rig::new();
    // Large enough that a half-written file would be seen.
    let padding = "x".repeat(30_000);
    let xml = |version: u64| {
        tiny_guest(&rig, "victim", "qemu").replace(
            "  <memory",
            &format!("  <uuid>11111111-2222-3333-4444-555555555555</uuid>\n  <title>v{version}</title>\n  <description>{padding}</description>\n  <memory"),
        )
    };
    rig.define(&tiny_guest(&rig, "bystander", "qemu"));
    let bystander = rig.vireo(&["dumpxml", "bystander"]).ok();
    rig.kill_daemon();
    let mut known: Option<u64> = None;
    for round in 0..rounds {
        let mut daemon = rig.daemon();
        // What is there must be what was acknowledged before, or what was in flight.
        let defining = known.is_none() || random(2) == 0;
        let file = rig.write("victim.xml", xml(round));
        let args: Vec<&str> = if defining {
            vec!["define", &file]
        } else {
            vec!["undefine", "victim"]
        };
        let mut client = rig
            .command("vireo")
            // A client that finds no daemon must not start another here.
            .env("VIREOD", "/bin/false")
            .args(&args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(random(12_000)));
        kill(&mut daemon);
        let acknowledged = client.wait().unwrap().success();
        let mut daemon = rig.daemon();
        let run = rig.vireo(&["dumpxml", "victim"]);
        let found = (run.status == 0).then(|| {
            let text = run.out;
            assert!(
                text.contains(&padding) && text.ends_with("</domain>\n\n"),
                "half a definition in round {round}"
            );
            let at = text.find("<title>v").unwrap() + 8;
            text[at..]
                .split('<')
                .next()
                .unwrap()
                .parse::<u64>()
                .unwrap()
        });
        let wanted = if defining { Some(round) } else { None };
        if acknowledged {
            assert_eq!(
                found, wanted,
                "an acknowledged change was lost in round {round}"
            );
        } else {
            assert!(
                found == wanted || found == known,
                "round {round}: found {found:?}, was {known:?}"
            );
        }
        known = found;
        assert_eq!(rig.vireo(&["dumpxml", "bystander"]).ok(), bystander);
        kill(&mut daemon);
    }
    // No temporary files are left either.
    let mut daemon = rig.daemon();
    let mut names: Vec<_> = fs::read_dir(rig.path("etc/vireo/domains"))
        .unwrap()
        .flatten()
        .map(|e| e.file_name().into_string().unwrap())
        .filter(|n| n != "autostart" && n != ".journal")
        .collect();
    names.sort();
    let expected: &[&str] = if known.is_some() {
        &["bystander.xml", "victim.xml"]
    } else {
        &["bystander.xml"]
    };
    assert_eq!(names, expected);
    kill(&mut daemon);
}

/// A change is on the disk before its file is: after a crash of the host it is brought into the file, and while the
/// host has not been booted since, what is in the files counts.
#[test]
fn what_was_promised_is_kept_after_a_crash_of_the_host() {
    if let Err(needs) = namespace::enter() {
        return left_out(&needs);
    }
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    for name in ["kept", "changed", "gone"] {
        rig.define(&tiny_guest(&rig, name, "qemu"));
    }
    kill(&mut daemon);
    let file = |name: &str| rig.path(&format!("etc/vireo/domains/{name}.xml"));
    // Each change is cut short between its promise and its file.
    let cut_short = |args: &[&str]| {
        let mut daemon = rig.daemon_killed_at("store.promised");
        let client = rig
            .command("vireo")
            .env("VIREOD", "/bin/false")
            .args(args)
            .output()
            .unwrap();
        assert!(!client.status.success(), "{client:?}");
        daemon.wait().unwrap();
    };
    let mut boots = 0;
    let mut boot_again = || {
        boots += 1;
        let id = format!("00000000-0000-4000-8000-{boots:012}\n");
        let id = rig.write(&format!("boot-{boots}"), id);
        namespace::replace_program("/proc/sys/kernel/random/boot_id", &id);
        // As after a boot of the host: the folder under run is empty.
        let _ = fs::remove_dir_all(rig.path("run"));
    };
    let titled = tiny_guest(&rig, "changed", "qemu").replace(
        "  <memory",
        &format!(
            "  <uuid>{}</uuid>\n  <title>after</title>\n  <memory",
            fs::read_to_string(file("changed"))
                .unwrap()
                .split("<uuid>")
                .nth(1)
                .unwrap()
                .split('<')
                .next()
                .unwrap()
        ),
    );
    let titled = rig.write("titled.xml", titled);
    let new = rig.write("new.xml", tiny_guest(&rig, "new", "qemu"));
    // Within one boot a removal is not brought back: nobody was told. A new text may have been acknowledged.
    cut_short(&["undefine", "gone"]);
    cut_short(&["define", &new]);
    let mut daemon = rig.daemon();
    assert_eq!(
        rig.vireo(&["list", "--all", "--name"]).ok().trim(),
        "changed\ngone\nkept\nnew"
    );
    rig.vireo(&["undefine", "new"]).ok();
    kill(&mut daemon);
    for (args, check) in [
        (vec!["define", &new], "new"),
        (vec!["define", &titled], "changed"),
        (vec!["undefine", "gone"], "gone"),
    ] {
        cut_short(&args);
        boot_again();
        let mut daemon = rig.daemon();
        let there = rig.vireo(&["dumpxml", check]);
        match check {
            "new" => assert!(there.ok().contains("<name>new</name>")),
            "changed" => assert!(there.ok().contains("<title>after</title>")),
            _ => assert!(there.fails().contains("failed to get domain")),
        }
        assert_eq!(file(check).exists(), check != "gone");
        kill(&mut daemon);
    }
    let mut daemon = rig.daemon();
    assert_eq!(
        rig.vireo(&["list", "--all", "--name"]).ok().trim(),
        "changed\nkept\nnew"
    );
    kill(&mut daemon);
}

#[test]
fn autostart_starts_once_and_damaged_files_are_kept_and_reported() {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "auto", "qemu"));
    rig.define(&tiny_guest(&rig, "damaged", "qemu"));
    rig.vireo(&["autostart", "auto"]).ok();
    rig.kill_daemon();
    // As after a boot of the host: the folder under run is empty.
    let _ = fs::remove_dir_all(rig.path("run"));
    fs::write(
        rig.path("etc/vireo/domains/damaged.xml"),
        "<domain type='qemu'><na",
    )
    .unwrap();
    let mut daemon = rig.daemon();
    rig.wait_state("auto", "running (booted)", SOON);
    assert_eq!(rig.vireo(&["list", "--all", "--name"]).ok(), "auto\n\n");
    assert!(rig.path("etc/vireo/domains/damaged.xml").exists());
    let log = fs::read_to_string(rig.path("daemon.log")).unwrap();
    assert!(log.contains("damaged"), "{log}");
    // A second daemon start in the same boot leaves a stopped domain alone.
    rig.vireo(&["destroy", "auto"]).ok();
    kill(&mut daemon);
    let mut daemon = rig.daemon();
    assert_eq!(rig.vireo(&["domstate", "auto"]).ok(), "shut off\n\n");
    kill(&mut daemon);
}

#[test]
fn a_second_daemon_on_the_same_root_is_refused() {
    let rig = Rig::new();
    let mut daemon = rig.daemon();
    let output = rig.command("vireod").output().unwrap();
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        error.contains(&daemon.id().to_string()),
        "it says who holds the place: {error}"
    );
    rig.vireo(&["list"]).ok();
    kill(&mut daemon);
}
