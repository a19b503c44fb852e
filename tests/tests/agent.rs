//! QEMU's guest agent, as Debian has it, in a Linux guest: the commands that need one, through vireo and through virsh.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, left_out, linux_guest, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(90);

const AGENT: &str = "/usr/sbin/qemu-ga";

/// What the agent calls, and busybox has otherwise.
const SHUTDOWN: &str = "#!/bin/sh\necho \"shutdown $*\" >/dev/console\npoweroff -f\n";
const OS_RELEASE: &str =
    "NAME=\"Vireo guest\"\nID=vireo\nVERSION_ID=\"1\"\nPRETTY_NAME=\"Vireo's test guest\"\n";

/// The guest's initramfs with the agent and its libraries in it: the kernel unpacks one archive after the other.
fn initrd(rig: &Rig) -> String {
    let tree = rig.path("agent");
    let copy = |from: &str| {
        let to = tree.join(from.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    };
    copy(AGENT);
    let libraries = Command::new("ldd").arg(AGENT).output().unwrap();
    for word in String::from_utf8(libraries.stdout)
        .unwrap()
        .split_whitespace()
    {
        if word.starts_with('/') {
            copy(word);
        }
    }
    let write = |path: &str, text: &str, mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    write("sbin/shutdown", SHUTDOWN, 0o755);
    write(
        "sbin/hwclock",
        "#!/bin/sh\nexec busybox hwclock \"$@\"\n",
        0o755,
    );
    write(
        "bin/hook",
        "#!/bin/sh\necho \"hook-$1\" >>/run/q/hooks\n",
        0o755,
    );
    write("etc/os-release", OS_RELEASE, 0o644);
    let archive = Command::new("sh")
        .args([
            "-c",
            "find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0",
        ])
        .current_dir(&tree)
        .stdout(Stdio::piped())
        .output()
        .unwrap();
    assert!(archive.status.success());
    let mut whole = fs::read(Kernel::V6_1.folder().join("initrd.img")).unwrap();
    // Each begins at a multiple of four bytes.
    whole.resize(whole.len().next_multiple_of(4), 0);
    whole.extend(archive.stdout);
    rig.write("initrd.img", whole)
}

#[track_caller]
fn wait_for(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn the_guests_agent_answers_and_acts() {
    for program in ["virsh", "cpio", "ldd"] {
        if !which(program) {
            return left_out(&format!("needs {program}"));
        }
    }
    if !Path::new(AGENT).exists() {
        return left_out("needs qemu-ga (qemu-guest-agent)");
    }
    let rig = Rig::new();
    let own = Kernel::V6_1.folder().join("initrd.img");
    let channel =
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
    let disk = rig.write("disk.raw", vec![0; 1 << 20]);
    let disk = format!(
        "<disk type='file'><driver name='qemu' type='raw'/><source file='{disk}'/>\
         <target dev='vda' bus='virtio'/><serial>AGENTS</serial></disk>"
    );
    rig.define(
        &linux_guest("deb", Kernel::V6_1)
            .replace(&own.display().to_string(), &initrd(&rig))
            .replace("</devices>", &format!("{channel}{disk}</devices>")),
    );
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    let silent = rig.vireo(&["domtime", "deb"]).fails();
    assert!(
        silent.contains("QEMU guest agent is not connected"),
        "{silent}"
    );
    // Without an agent nothing is quiesced, and nothing made.
    let quiesced = [
        "snapshot-create-as",
        "deb",
        "still",
        "--disk-only",
        "--quiesce",
    ];
    let silent = rig.vireo(&quiesced).fails();
    assert!(silent.contains("agent is not connected"), "{silent}");
    assert!(!rig.path("disk.still").exists());
    let mut events = rig.listen("deb");
    // Whenever it ends it is started again.
    terminal.send(
        "A=/dev/virtio-ports/org.qemu.guest_agent.0; mkdir -p /run/q /var/log /usr/local/var; \
         (while :; do /usr/sbin/qemu-ga -p $A -t /run/q -F/bin/hook -f /run/q/pid 2>/run/q/log; sleep 1; done) &\r",
    );
    terminal.expect("deb:/root# ", SOON);
    events.expect("state: 'connected' reason: 'channel event'", SOON);
    wait_for("the agent does not answer", || {
        rig.vireo(&["qemu-agent-command", "deb", r#"{"execute":"guest-ping"}"#])
            .status
            == 0
    });
    terminal.send("killall qemu-ga\r");
    events.expect("state: 'disconnected' reason: 'channel event'", SOON);
    events.expect("state: 'connected' reason: 'channel event'", SOON);
    drop(events);
    let both = |args: &[&str]| {
        let (ours, theirs) = (rig.vireo(args), rig.virsh(args));
        assert_eq!(ours, theirs, "{args:?}");
        ours.ok()
    };
    let info = both(&["qemu-agent-command", "deb", r#"{"execute": "guest-info"}"#]);
    assert!(info.contains("\"guest-sync-delimited\""), "{info}");
    assert_eq!(
        both(&["domhostname", "deb", "--source", "agent"]),
        "deb\n\n"
    );
    // The guest's own clock is shown, and set.
    let time = rig.vireo(&["domtime", "deb"]).ok();
    assert!(time.starts_with("Time: "), "{time}");
    rig.vireo(&["domtime", "deb", "--time", "2000000000"]).ok();
    terminal.send("date -u +%Y-%m\r");
    terminal.expect("2033-05", SOON);
    rig.virsh(&["domtime", "deb", "--now"]).ok();
    let pretty = rig.vireo(&["domtime", "deb", "--pretty"]).ok();
    let as_long = "Time: 2033-05-18 03:33:20\n";
    assert!(
        pretty.starts_with("Time: 20") && pretty.len() == as_long.len(),
        "{pretty}"
    );
    // What it is, and has.
    let told = rig.vireo(&["guestinfo", "deb"]).ok();
    for line in [
        "os.id               : vireo",
        "os.pretty-name      : Vireo's test guest",
        "hostname            : deb",
        "user.count          : 0",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
    assert!(both(&["guestinfo", "deb", "--os"]).contains("os.kernel-release   : 6.1"));
    assert!(both(&["guestvcpus", "deb"]).contains("online         : 0"));
    both(&["domfsinfo", "deb"]);
    let cards = both(&["domifaddr", "deb", "--source", "agent", "--full"]);
    assert!(cards.contains("lo "), "{cards}");
    // This guest has no file system that could be frozen: its agent says so.
    assert_eq!(both(&["domfsfreeze", "deb"]), "Froze 0 filesystem(s)\n\n");
    let status = r#"{"execute":"guest-fsfreeze-status"}"#;
    let status = both(&["qemu-agent-command", "deb", status]);
    assert_eq!(status, "{\"return\":\"thawed\"}\n\n");
    assert_eq!(both(&["domfsthaw", "deb"]), "Thawed 0 filesystem(s)\n\n");
    both(&["domfstrim", "deb"]);
    // A snapshot of a guest whose file systems are frozen for it, and thawed after it.
    terminal.send("rm -f /run/q/hooks; echo go''ne\r");
    terminal.expect("gone", SOON);
    rig.vireo(&quiesced).ok();
    assert!(rig.path("disk.still").exists());
    terminal.send("cat /run/q/hooks; echo hooks''-end\r");
    let hooks = terminal.expect("hooks-end", SOON);
    let (frozen, thawed) = (hooks.find("hook-freeze"), hooks.find("hook-thaw"));
    assert!(frozen.is_some() && frozen < thawed, "{hooks}");
    rig.vireo(&["snapshot-delete", "deb", "still"]).ok();
    let refused = rig
        .vireo(&["set-user-password", "deb", "nobody", "x"])
        .fails();
    assert!(refused.contains("guest-set-user-password"), "{refused}");
    // How long it may take outlives the daemon.
    rig.vireo(&["guest-agent-timeout", "deb", "--timeout", "7"])
        .ok();
    rig.kill_daemon();
    drop(terminal);
    assert_eq!(rig.vireo(&["domhostname", "deb"]).ok(), "deb\n\n");
    let state = fs::read_dir(rig.path("run/vireo/domains"))
        .unwrap()
        .flatten();
    let records: Vec<_> = state
        .filter_map(|entry| fs::read_to_string(entry.path().join("state.json")).ok())
        .collect();
    assert!(
        records
            .iter()
            .any(|json| json.contains("\"agent_timeout\": 7")),
        "{records:?}"
    );
    // An agent that hangs is given up after that time, and says so.
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", "deb"]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("\rkillall -STOP qemu-ga; echo stop''ped\r");
    terminal.expect("stopped", SOON);
    let silent = rig.vireo(&["domhostname", "deb"]).fails();
    assert!(silent.contains("did not answer within"), "{silent}");
    terminal.send("killall -CONT qemu-ga; echo go''es\r");
    terminal.expect("goes", SOON);
    wait_for("the agent does not answer again", || {
        rig.vireo(&["domhostname", "deb"]).status == 0
    });
    rig.virsh(&["shutdown", "deb", "--mode", "agent"]).ok();
    terminal.expect("shutdown -h -P", SOON);
    rig.wait_state("deb", "shut off (shutdown)", SOON);
}
