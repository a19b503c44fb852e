//! Channels that come and go while a Linux guest runs, and what is said through them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, linux_guest};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(90);

/// One line of a guest's shell, up to the mark that follows it.
fn shell(terminal: &mut Terminal, line: &str) -> String {
    terminal.send(&format!("{line}; echo DO''NE\r"));
    terminal.expect("DO''NE", SOON);
    terminal.expect("DONE\r\n", SOON)
}

/// Waits until the guest has, or has not, a port of that name.
#[track_caller]
fn until_port(terminal: &mut Terminal, name: &str, there: bool) {
    let deadline = Instant::now() + SOON;
    loop {
        let seen = shell(terminal, "cat /sys/class/virtio-ports/*/name");
        if seen.contains(name) == there {
            return;
        }
        assert!(Instant::now() < deadline, "{name}: {seen}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What follows `before` in the definition's channel `name`, up to the next quote.
fn of_channel(rig: &Rig, name: &str, before: &str) -> Option<String> {
    let xml = rig.vireo(&["dumpxml", "deb"]).ok();
    let mut channels = xml.split("<channel").skip(1);
    let own = channels.find(|text| {
        let own = text.split("</channel>").next().unwrap_or_default();
        own.contains(&format!("name='{name}'"))
    })?;
    let own = own.split("</channel>").next()?;
    let value = own.split(before).nth(1)?.split('\'').next()?;
    Some(value.to_owned())
}

#[track_caller]
fn until_state(rig: &Rig, name: &str, state: &str) {
    let deadline = Instant::now() + SOON;
    while of_channel(rig, name, "state='").as_deref() != Some(state) {
        assert!(Instant::now() < deadline, "{name} is not {state}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What it makes of a line.
#[track_caller]
fn turns_around(path: &str, text: &str) {
    let mut host = UnixStream::connect(path).unwrap();
    host.set_read_timeout(Some(SOON)).unwrap();
    host.write_all(format!("{text}\n").as_bytes()).unwrap();
    let mut back = vec![0; text.len() + 1];
    host.read_exact(&mut back).unwrap();
    let turned: String = text.chars().rev().chain(['\n']).collect();
    assert_eq!(String::from_utf8_lossy(&back), turned);
}

/// A program that turns each line around; with nobody at the other end it reads nothing.
fn start_program(terminal: &mut Terminal, name: &str) {
    shell(
        terminal,
        &format!(
            "for p in /sys/class/virtio-ports/*; do grep -qx {name} $p/name && d=/dev/${{p##*/}}; done; \
             (exec 3<>$d; while :; do if read -r l <&3; then echo \"$l\" | rev >&3; else sleep 1; fi; done) & true"
        ),
    );
}

fn console(rig: &Rig) -> Terminal {
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", "deb"]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("\r");
    terminal.expect("deb:/root# ", SOON);
    terminal
}

#[test]
fn linux_finds_a_channel_that_is_plugged_and_talks_through_it() {
    let rig = Rig::new();
    rig.define(&linux_guest("deb", Kernel::V6_1).replace(
        "</devices>",
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices>",
    ));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    // Long lines are not to be broken by the guest's line editor.
    terminal.send("stty cols 500\r");
    terminal.expect("deb:/root# ", SOON);
    let mut events = rig.listen("deb");
    let channel = |name: &str| {
        let xml = format!(
            "<channel type='unix'><target type='virtio' name='org.example.{name}'/></channel>"
        );
        rig.write(&format!("{name}.xml"), &xml)
    };
    let (live, twice) = (channel("live"), channel("twice"));
    rig.vireo(&["attach-device", "deb", &live, "--persistent"])
        .ok();
    events.expect("event 'device-added' for domain 'deb': channel1", SOON);
    let name = "org.example.live";
    let of = |rig: &Rig, before: &str| of_channel(rig, name, before);
    assert_eq!(of(&rig, "alias name='").as_deref(), Some("channel1"));
    assert_eq!(of(&rig, "state='").as_deref(), Some("disconnected"));
    let path = of(&rig, "path='").unwrap();
    let stored = rig.vireo(&["dumpxml", "deb", "--inactive"]).ok();
    assert!(stored.contains(name) && !stored.contains(&path), "{stored}");
    // What is there is not there twice.
    let error = rig
        .vireo(&["attach-device", "deb", &live, "--live"])
        .fails();
    assert!(error.contains("chardev already exists"), "{error}");
    assert!(Path::new(&path).exists());
    until_port(&mut terminal, name, true);
    start_program(&mut terminal, name);
    until_state(&rig, name, "connected");
    turns_around(&path, "forwards");
    // The next daemon knows it, with the guest's end open.
    drop(events);
    rig.kill_daemon();
    let events = rig.listen("deb");
    drop(terminal);
    until_state(&rig, name, "connected");
    turns_around(&path, "after the daemon");
    // So does a machine that was saved meanwhile, and one that it is moved to.
    rig.vireo(&["managedsave", "deb"]).ok();
    rig.vireo(&["start", "deb"]).ok();
    until_state(&rig, name, "connected");
    turns_around(&of(&rig, "path='").unwrap(), "after the save");
    // Clients are told a socket, not a root: the daemon is there before.
    let other = Rig::new();
    other.vireo(&["list"]).ok();
    let at = format!("unix://{}", other.path("incoming").display());
    let uri = other.uri();
    let moving = [
        "migrate",
        "--live",
        "--unsafe",
        "deb",
        &uri,
        "--migrateuri",
        &at,
    ];
    rig.vireo(&[&moving[..], &["--undefinesource", "--persistent"]].concat())
        .ok();
    drop(events);
    let mut events = other.listen("deb");
    until_state(&other, name, "connected");
    let path = of(&other, "path='").unwrap();
    turns_around(&path, "after the journey");
    // Another one beside it, and the first one goes, open as it is.
    let mut terminal = console(&other);
    other.vireo(&["attach-device", "deb", &twice]).ok();
    events.expect("event 'device-added' for domain 'deb': channel2", SOON);
    until_port(&mut terminal, "org.example.twice", true);
    other
        .vireo(&["detach-device", "deb", &live, "--persistent"])
        .ok();
    events.expect("event 'device-removed' for domain 'deb': channel1", SOON);
    until_port(&mut terminal, name, false);
    assert!(!Path::new(&path).exists());
    for view in [&["dumpxml", "deb"][..], &["dumpxml", "deb", "--inactive"]] {
        let xml = other.vireo(view).ok();
        assert!(!xml.contains(name), "{xml}");
    }
    // What is left still works, and so does one in the place of the one that has gone.
    start_program(&mut terminal, "org.example.twice");
    turns_around(
        &of_channel(&other, "org.example.twice", "path='").unwrap(),
        "the second one",
    );
    other.vireo(&["attach-device", "deb", &live]).ok();
    events.expect("event 'device-added' for domain 'deb': channel1", SOON);
    until_port(&mut terminal, name, true);
    start_program(&mut terminal, name);
    turns_around(&of(&other, "path='").unwrap(), "again");
    other
        .vireo(&["detach-device-alias", "deb", "channel1"])
        .ok();
    until_port(&mut terminal, name, false);
    other.vireo(&["destroy", "deb"]).ok();
}
