//! What tests of migrations share.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use crate::{Rig, Terminal};

const SOON: Duration = Duration::from_secs(60);

/// Waits until something holds.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A tiny guest runs: it echoes what is typed.
pub fn answers(rig: &Rig, name: &str) {
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", name]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("xyz");
    terminal.expect("xyz", SOON);
    terminal.send("\x1d");
    terminal.wait(SOON);
}

/// Whether the guest called `tiny` runs or comes there.
pub fn is_there(rig: &Rig) -> bool {
    let list = rig.vireo(&["list", "--name"]).ok();
    list.lines().any(|line| line == "tiny")
}

/// A daemon that, or one of whose VMMs, dies at a point.
pub fn daemon(rig: &Rig, dies_at: Option<&str>) -> Child {
    daemon_with(rig, dies_at.map(|point| ("VIREO_KILL_AT", point)))
}

/// A daemon with something in its environment.
pub fn daemon_with(rig: &Rig, variable: Option<(&str, &str)>) -> Child {
    daemon_with_all(rig, variable.as_slice())
}

/// A daemon with these in its environment.
pub fn daemon_with_all(rig: &Rig, variables: &[(&str, &str)]) -> Child {
    let log = File::create(rig.path("daemon.log")).unwrap();
    let mut command = rig.command("vireod");
    let child = command
        .envs(variables.iter().copied())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    eventually("a daemon", || UnixStream::connect(rig.socket()).is_ok());
    child
}

/// A process stands still.
pub fn hangs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| rest.starts_with(" T"))
}
