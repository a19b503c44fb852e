//! CD-ROM drives and SATA disks: what stock clients make of them, and what guests see.

mod install;
mod kept;
mod media;
mod policy;
mod scsi;

use std::io::BufRead;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, iso, left_out, linux_guest, tiny_guest};

const BOOT: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(60);

/// Linux's CDROMEJECT and CDROMCLOSETRAY.
const EJECT: u32 = 0x5309;
const CLOSE: u32 = 0x5319;

fn with(xml: &str, devices: &str) -> String {
    xml.replace("  <devices>\n", &format!("  <devices>\n{devices}\n"))
}

/// A small guest without an operating system, with those devices.
fn small(rig: &Rig, name: &str, devices: &str) -> String {
    with(&tiny_guest(rig, name, "qemu"), devices)
}

fn cdrom(dev: &str, source: &str, rest: &str) -> String {
    let source = match source {
        "" => String::new(),
        path => format!("<source file='{path}'/>"),
    };
    format!(
        "<disk type='file' device='cdrom'>{source}<target dev='{dev}' bus='sata'/>{rest}</disk>"
    )
}

/// The element of a disk in a domain's document.
fn disk(rig: &Rig, name: &str, dev: &str, args: &[&str]) -> String {
    let xml = rig.vireo(&[&["dumpxml", name][..], args].concat()).ok();
    let disks = xml.split("    <disk ").skip(1);
    let disks = disks.map(|disk| disk.split("    </disk>").next().unwrap());
    let target = format!("<target dev='{dev}'");
    let mut found = disks.filter(|disk| disk.contains(&target));
    found
        .next()
        .unwrap_or_else(|| panic!("no {dev} in {xml}"))
        .to_owned()
}

/// An image with a file `word`, and programs that take the medium out of a Linux guest's drive and put it in.
fn medium(rig: &Rig, name: &str, word: &str) -> String {
    let (eject, close) = (
        iso::ioctl_program("/dev/sr0", EJECT),
        iso::ioctl_program("/dev/sr0", CLOSE),
    );
    let files: [(&str, &[u8]); 3] = [
        ("WORD", word.as_bytes()),
        ("EJECT", &eject),
        ("CLOSE", &close),
    ];
    rig.write(
        name,
        iso::image(name.split('.').next().unwrap(), &files, None),
    )
}

/// A Linux guest that has drivers of such drives, at its shell; `None` where there is no such kernel.
fn linux(rig: &Rig, name: &str, devices: &str) -> Option<Terminal> {
    if !Kernel::I386.is_there() {
        left_out("needs linux-image-686-pae:i386 (make test downloads it)");
        return None;
    }
    rig.define(&with(&linux_guest(name, Kernel::I386), devices));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", name, "--console"]));
    terminal.expect(&format!("{name}:/root# "), BOOT);
    Some(terminal)
}

/// What a line says in a guest's shell.
fn shell(terminal: &mut Terminal, line: &str) -> String {
    terminal.send(&format!("{line}; echo DO''NE\r"));
    terminal.expect("DO''NE", SOON);
    let said = terminal.expect("DONE\r\n", SOON);
    said.trim_end_matches("DONE\r\n")
        .replace('\r', "")
        .trim_start()
        .to_owned()
}

/// A guest's answer, which may take a moment to be so.
#[track_caller]
fn shell_until(terminal: &mut Terminal, line: &str, wanted: &str) {
    let deadline = Instant::now() + SOON;
    loop {
        let said = shell(terminal, line);
        if said.contains(wanted) {
            return;
        }
        assert!(Instant::now() < deadline, "{line}: {said}, not {wanted}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What `virsh event` tells of a daemon's domains.
struct Events {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Events {
    fn of(rig: &Rig) -> Self {
        let mut command = rig.command("vireo");
        let mut child = command
            .args(["event", "--all", "--loop"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = std::io::BufReader::new(child.stdout.take().unwrap());
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                kept.lock().unwrap().push(line);
            }
        });
        // It has registered when it hears of something.
        let events = Self { child, lines };
        let deadline = Instant::now() + SOON;
        rig.define(&small(rig, "herald", ""));
        while events.lines.lock().unwrap().is_empty() {
            assert!(Instant::now() < deadline, "no events");
            rig.vireo(&["desc", "herald", "--config", "x"]).ok();
            std::thread::sleep(Duration::from_millis(50));
        }
        rig.vireo(&["undefine", "herald"]).ok();
        events.take("herald", "Undefined");
        events
    }

    /// Waits for an event with that in its line, and gives all until then of the domain that are about disks and trays.
    #[track_caller]
    fn take(&self, name: &str, last: &str) -> Vec<String> {
        let all = self.all_until(name, last).into_iter();
        all.filter(|line| line.contains("tray-change") || line.contains("disk-change"))
            .collect()
    }

    /// The same with all other events.
    #[track_caller]
    fn all_until(&self, name: &str, last: &str) -> Vec<String> {
        let deadline = Instant::now() + SOON;
        let of = format!("for domain '{name}'");
        loop {
            let mut lines = self.lines.lock().unwrap();
            let end = lines
                .iter()
                .position(|line| line.contains(&of) && line.contains(last));
            if let Some(end) = end {
                let all = lines.drain(..=end).filter(|line| line.contains(&of));
                return all.collect();
            }
            drop(lines);
            assert!(
                Instant::now() < deadline,
                "no {last}: {:?}",
                self.lines.lock().unwrap()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
