//! Disks copied to elsewhere while their guests run: what the copy has, what becomes of the disk, what is told, what
//! failures and crashes leave.

mod failures;
mod ways;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, left_out, linux_guest, tiny_guest, which};

const SOON: Duration = Duration::from_secs(60);
const BOOT: Duration = Duration::from_secs(120);
const SIZE: usize = 24 << 20;

fn tool(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {text}{errors}");
    text
}

fn qemu_img(args: &[&str]) -> String {
    tool("qemu-img", args)
}

fn prepared() -> bool {
    if !which("qemu-img") || !which("virsh") {
        left_out("needs qemu-img (qemu-utils) and virsh (libvirt-clients)");
        return false;
    }
    true
}

/// The bytes of a disk as its guest sees them.
fn content(rig: &Rig, image: &str) -> Vec<u8> {
    let raw = rig.path("content.raw").display().to_string();
    qemu_img(&["convert", "-U", "-O", "raw", image, &raw]);
    fs::read(raw).unwrap()
}

fn waited(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn disk(format: &str, image: &str, target: &str) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{image}'/>\
         <target dev='{target}' bus='virtio'/></disk>\n    <console"
    )
}

/// A raw image, and a qcow2 one on top of it: `NAME.base`, `NAME.top`.
fn chain(rig: &Rig, name: &str) -> [String; 2] {
    let [base, top] =
        ["base", "top"].map(|end| rig.path(&format!("{name}.{end}")).display().to_string());
    fs::write(&base, vec![0x11; SIZE]).unwrap();
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top,
    ]);
    for command in ["write -P 0x22 1M 3M", "write -z 12M 256k"] {
        tool("qemu-io", &["-c", command, &top]);
    }
    [base, top]
}

/// A domain of a few bytes that runs on such a chain, transient or not.
fn tiny(rig: &Rig, name: &str, persistent: bool) -> ([String; 2], Vec<u8>) {
    let images = chain(rig, name);
    let content = content(rig, &images[1]);
    let xml = tiny_guest(rig, name, "qemu").replace("<console", &disk("qcow2", &images[1], "vda"));
    if persistent {
        rig.define(&xml);
        rig.vireo(&["start", name]).ok();
    } else {
        let file = rig.write(&format!("{name}.xml"), xml);
        rig.vireo(&["create", &file]).ok();
    }
    (images, content)
}

/// The disk's element in the running domain's XML, or the stored one's.
fn element(rig: &Rig, name: &str, inactive: bool) -> String {
    let mut words = vec!["dumpxml", name];
    words.extend(inactive.then_some("--inactive"));
    let xml = rig.vireo(&words).ok();
    let disk = xml.split("<disk").nth(1).unwrap();
    let disk = disk.split("</disk>").next().unwrap();
    let lines = disk.lines().map(str::trim);
    lines.filter(|line| !line.starts_with("<address")).collect()
}

fn info(rig: &Rig, name: &str) -> String {
    rig.vireo(&["blockjob", name, "vda", "--raw"]).ok()
}

fn answers(rig: &Rig, name: &str) {
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", name]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("xyz");
    terminal.expect("xyz", SOON);
    terminal.send("\x1d");
    terminal.wait(SOON);
}

/// Somebody who holds no lock may open it.
fn free(image: &str) -> bool {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-c", "write -P 0x77 0 512", image]);
    qemu_io.output().unwrap().status.success()
}

/// What a guest does all the time: block N of the disk says N, one after the other, for good when it is answered.
const WRITER: &str = "rm -f /stop; ( n=0; while [ ! -e /stop ] && [ $n -lt 8000 ]; do printf '%08d' $n | \
    dd of=/dev/vda bs=512 seek=$n conv=notrunc,sync,fsync oflag=direct 2>/dev/null; echo $n >/last; \
    n=$((n+1)); done ) &\r";

struct Writing {
    terminal: Terminal,
}

impl Writing {
    fn start(rig: &Rig, name: &str) -> Self {
        let mut start = rig.command("vireo");
        let mut terminal = Terminal::start(start.args(["start", name, "--console"]));
        terminal.expect(&format!("{name}:/root# "), BOOT);
        terminal.send(WRITER);
        terminal.expect("# ", SOON);
        let mut writing = Self { terminal };
        waited("the guest writes", || writing.last() > 3);
        writing
    }

    fn say(&mut self, line: &str) -> String {
        // What is typed has other words than what is said.
        self.terminal.send(&format!("{line}; echo that''-was-it\r"));
        self.terminal.expect("that-was-it", SOON)
    }

    /// The last block that was answered.
    fn last(&mut self) -> usize {
        let mut last = None;
        // The file is empty for a moment each time.
        waited("the guest's count", || {
            let said = self.say("echo $(cat /last)=la''st");
            let number = said.split("=last").next().unwrap_or_default();
            let digits = number.rsplit(|c: char| !c.is_ascii_digit()).next();
            last = digits.and_then(|digits| digits.parse().ok());
            last.is_some()
        });
        last.unwrap()
    }

    /// Ends it; the checksum of the whole disk as the guest reads it.
    fn stop(&mut self) -> String {
        self.say("touch /stop; wait; sync; echo 3 >/proc/sys/vm/drop_caches");
        let said = self.say("md5sum /dev/vda");
        let word = said
            .split_whitespace()
            .find(|word| word.len() == 32 && word.chars().all(|c| c.is_ascii_hexdigit()));
        word.unwrap_or_else(|| panic!("{said}")).to_owned()
    }
}

/// How many blocks say their number, one after the other from the first.
fn written(content: &[u8]) -> usize {
    let blocks = content.chunks(512).enumerate();
    let own = |(n, block): &(usize, &[u8])| block.starts_with(format!("{n:08}").as_bytes());
    blocks.take_while(own).count()
}

fn md5(rig: &Rig, image: &str) -> String {
    let raw = rig.write("sum.raw", content(rig, image));
    let said = tool("md5sum", &[&raw]);
    said.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_disk_moves_while_its_guest_writes() {
    if !prepared() {
        return;
    }
    if !Kernel::V6_1.is_there() {
        return left_out("needs a guest's kernel (make test)");
    }
    let rig = Rig::new();
    let images = chain(&rig, "deb");
    rig.define(
        &linux_guest("deb", Kernel::V6_1).replace("<console", &disk("qcow2", &images[1], "vda")),
    );
    let mut guest = Writing::start(&rig, "deb");
    let to = |name: &str| rig.path(name).display().to_string();

    // A copy of one moment, by the stock client.
    let once = to("once");
    let words = [
        "blockcopy",
        "deb",
        "vda",
        "--dest",
        &once,
        "--transient-job",
        "--wait",
        "--verbose",
    ];
    let run = rig.virsh(&words);
    assert!(
        run.err.contains("100 %") || run.out.contains("100 %"),
        "{run:?}"
    );
    assert!(run.ok().contains("Now in mirroring phase"));
    let before = guest.last();
    waited("the guest goes on", || guest.last() > before + 5);
    let before = guest.last();
    rig.virsh(&["blockjob", "deb", "vda", "--abort"]).ok();
    let after = guest.last();
    let copied = written(&content(&rig, &once));
    assert!(copied > before, "{copied} of {before}..{after}");
    assert!(copied <= after + 2, "{copied} of {before}..{after}");
    qemu_img(&["check", "-q", &once]);
    assert!(free(&once), "it is nobody's any more");

    // Its disk is another image from then on, three times: whole, in step, and only what is on top.
    let mut stood = images[1].clone();
    for (name, words) in [
        ("second", &["--format", "raw", "--pivot"][..]),
        (
            "third",
            &["--format", "qcow2", "--pivot", "--synchronous-writes"],
        ),
        (
            "fourth",
            &["--wait", "--granularity", "4096", "--buf-size", "65536"],
        ),
    ] {
        let dest = to(name);
        let all = [
            "blockcopy",
            "deb",
            "vda",
            "--dest",
            &dest,
            "--transient-job",
        ];
        rig.vireo(&[&all[..], words].concat()).ok();
        if name == "fourth" {
            waited("in step", || info(&rig, "deb").contains("type=Block Copy"));
            rig.vireo(&["blockjob", "deb", "vda", "--pivot"]).ok();
        }
        let before = guest.last();
        for inactive in [false, true] {
            let disk = element(&rig, "deb", inactive);
            assert!(disk.contains(&format!("<source file='{dest}'")), "{disk}");
        }
        waited("the guest goes on", || guest.last() > before + 5);
        // What was left is not written any more, and free.
        let left = written(&content(&rig, &stood));
        assert!(left <= before + 2, "{left} of {before}");
        assert!(free(&stood), "{stood} is nobody's any more");
        assert!(!free(&dest));
        stood = dest;
    }
    let sum = guest.stop();
    assert_eq!(md5(&rig, &stood), sum);
    let last = guest.last();
    assert!(written(&content(&rig, &stood)) > last);
    rig.vireo(&["destroy", "deb"]).ok();
    assert_eq!(md5(&rig, &stood), sum);
    qemu_img(&["check", "-q", &stood]);
    // Its next start is from there.
    let mut start = rig.command("vireo");
    let mut terminal = Terminal::start(start.args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    terminal.send("md5sum /dev/vda\r");
    terminal.expect(&sum, SOON);
    rig.vireo(&["destroy", "deb"]).ok();
}

#[test]
fn a_copy_of_what_is_on_top_keeps_what_is_behind() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    let (images, before) = tiny(&rig, "one", true);
    let [base, top] = &images;
    let copy = rig.path("copy").display().to_string();
    let words = [
        "blockcopy",
        "one",
        "vda",
        "--dest",
        &copy,
        "--shallow",
        "--transient-job",
        "--wait",
    ];
    rig.virsh(&words).ok();
    let mirror = format!(
        "<mirror type='file' file='{copy}' format='qcow2' job='copy' ready='yes'><format type='qcow2'/>\
         <source file='{copy}' index='3'/></mirror>"
    );
    let disk = element(&rig, "one", false);
    assert!(disk.contains(&mirror), "{disk}");
    rig.virsh(&["blockjob", "one", "vda", "--pivot"]).ok();
    let behind = format!(
        "<driver name='qemu' type='qcow2'/><source file='{copy}' index='3'/><backingStore type='file' index='2'>\
         <format type='raw'/><source file='{base}'/><backingStore/></backingStore><target"
    );
    let disk = element(&rig, "one", false);
    assert!(disk.contains(&behind), "{disk}");
    let stored = element(&rig, "one", true);
    assert!(
        stored.contains(&format!("<source file='{copy}'/><target")),
        "{stored}"
    );
    assert!(qemu_img(&["info", "-U", &copy]).contains(&format!("backing file: {base}")));
    // Only what was on top.
    assert!(fs::metadata(&copy).unwrap().len() < 6 << 20);
    assert!(content(&rig, &copy) == before);
    // What was left may go; jobs go on with what is there now.
    fs::remove_file(top).unwrap();
    answers(&rig, "one");
    rig.vireo(&["blockcommit", "one", "vda", "--pivot"]).ok();
    rig.vireo(&["destroy", "one"]).ok();
    assert!(fs::read(base).unwrap() == before);
}

#[test]
fn a_copy_is_limited_given_up_and_told_of() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    let (images, before) = tiny(&rig, "one", true);
    let copy = rig.path("copy").display().to_string();
    let mut listener = rig.listen("one");
    let mut told = |what: &str| listener.expect(what, SOON);
    let slow = [
        "blockcopy",
        "one",
        "vda",
        "--dest",
        &copy,
        "--transient-job",
        "--bandwidth",
        "1",
        "--bytes",
    ];
    rig.vireo(&slow).ok();
    assert!(info(&rig, "one").contains(" type=Block Copy\n bandwidth="));
    let disk = element(&rig, "one", false);
    assert!(disk.contains("job='copy'>"), "{disk}");
    // Meanwhile the disk is left alone.
    let busy = "block copy still active: disk 'vda' already in active block job";
    for words in [
        &["blockcopy", "one", "vda", "--dest", "/x", "--transient-job"][..],
        &["blockpull", "one", "vda"],
        &["blockcommit", "one", "vda", "--active"],
        &["snapshot-create-as", "one", "s", "--disk-only"],
        &["detach-disk", "one", "vda"],
        &["blockresize", "one", "vda", "30M"],
    ] {
        let error = rig.virsh(words).fails();
        assert!(error.contains(busy), "{words:?}: {error}");
    }
    let active = "Requested operation is not valid: domain has active block job";
    let saved = rig.path("saved").display().to_string();
    for words in [&["managedsave", "one"][..], &["save", "one", &saved]] {
        let error = rig.virsh(words).fails();
        assert!(error.contains(active), "{words:?}: {error}");
    }
    let error = rig.virsh(&["blockjob", "one", "vda", "--pivot"]).fails();
    let early =
        "block copy still active: block job 'copy-vda-libvirt-1-format' not ready for pivot yet";
    assert!(error.contains(early), "{error}");
    // A reset is no end of it.
    rig.vireo(&["reset", "one"]).ok();
    assert!(info(&rig, "one").contains("Block Copy"));
    rig.virsh(&["blockjob", "one", "vda", "--abort"]).ok();
    told("Block Copy for vda canceled");
    assert!(!element(&rig, "one", false).contains("mirror"));
    assert!(Path::new(&copy).exists(), "it is left as it is");
    fs::remove_file(&copy).unwrap();
    // Faster, and on to the end.
    rig.vireo(&slow).ok();
    rig.virsh(&["blockjob", "one", "vda", "--bandwidth", "0"])
        .ok();
    told("Block Copy for vda ready");
    let blocks = rig.virsh(&["domblklist", "one"]).ok();
    assert!(blocks.contains(&images[1]), "{blocks}");
    rig.virsh(&["blockjob", "one", "vda", "--pivot"]).ok();
    told("Block Copy for vda completed");
    let stats = rig.virsh(&["domstats", "one", "--block"]).ok();
    assert!(stats.contains(&format!("block.0.path={copy}\n")), "{stats}");
    // A limit of time.
    let late = rig.path("late").display().to_string();
    let words = [
        "blockcopy",
        "one",
        "vda",
        "--dest",
        &late,
        "--transient-job",
        "--bandwidth",
        "1",
        "--bytes",
    ];
    let run = rig.virsh(&[&words[..], &["--timeout", "1"]].concat());
    assert!(
        run.out.contains("Copy aborted") && run.status == 1,
        "{run:?}"
    );
    // An end in the middle of it.
    fs::remove_file(&late).unwrap();
    rig.virsh(&words).ok();
    rig.vireo(&["destroy", "one"]).ok();
    assert!(content(&rig, &copy) == before);
    assert!(content(&rig, &images[1]) == before);
    rig.vireo(&["start", "one"]).ok();
    answers(&rig, "one");
    assert_eq!(info(&rig, "one").trim(), "");
}
