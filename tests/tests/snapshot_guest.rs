//! A Linux guest that computes, writes what it computes, and talks on a network, is saved, killed, restored,
//! snapshotted, reverted, merged and pulled at random moments: it never notices but for the clock.

use std::fs;
use std::process::{Child, Command};
use std::time::Duration;

use vireo_tests::{Kernel, Rig, Terminal, left_out, linux_guest, namespace, soak, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(60);
const DISK: usize = 16 << 20;

fn seed() -> u64 {
    let seed = std::env::var("VIREO_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("VIREO_SEED={seed}");
    seed | 1
}

fn random(state: &mut u64, below: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % below
}

fn qemu_img(args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "qemu-img {args:?}: {text}{errors}");
    text
}

fn console(rig: &Rig, name: &str) -> Terminal {
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", name]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal
}

fn leave(mut terminal: Terminal) {
    terminal.send("\x1d");
    terminal.wait(SOON);
}

/// A bridge and a web server in a network of the test's own, where that can be.
fn server(rig: &Rig) -> Option<Child> {
    if !which("busybox") {
        left_out("the network needs busybox");
        return None;
    }
    if let Err(needs) = namespace::enter() {
        left_out(&format!("the network {needs}"));
        return None;
    }
    for words in [
        "link add br9 type bridge",
        "link set br9 up",
        "addr add 10.79.0.1/24 dev br9",
    ] {
        namespace::ip(words);
    }
    rig.write("www/hello", "hello from afar");
    let mut command = Command::new("busybox");
    command.args(["httpd", "-f", "-p", "10.79.0.1:80", "-h"]);
    Some(command.arg(rig.path("www")).spawn().unwrap())
}

/// What is done to the guest, each kind in turn at first.
const KINDS: u64 = 8;

fn turn(rig: &Rig, kind: u64, name: &str, state: &mut u64) {
    let mut pause = || std::thread::sleep(Duration::from_millis(random(state, 1200)));
    let image = rig.path("deb.save").display().to_string();
    match kind {
        // Inside, and back.
        0 | 3 => {
            rig.vireo(&["snapshot-create-as", "deb", name]).ok();
            pause();
            if kind == 0 {
                rig.vireo(&["snapshot-revert", "deb", name]).ok();
                pause();
            }
        }
        // On top, and merged.
        1 => drop(
            rig.vireo(&["snapshot-create-as", "deb", name, "--disk-only"])
                .ok(),
        ),
        // On top, and pulled up.
        2 => {
            let words = ["snapshot-create-as", "deb", name, "--disk-only"];
            rig.vireo(&[&words[..], &["--no-metadata"]].concat()).ok();
            pause();
            rig.vireo(&["blockpull", "deb", "vda", "--wait"]).ok();
            return;
        }
        4 => {
            rig.vireo(&["save", "deb", &image]).ok();
            rig.vireo(&["restore", &image]).ok();
            fs::remove_file(&image).unwrap();
            return;
        }
        5 => {
            rig.vireo(&["managedsave", "deb"]).ok();
            rig.kill_daemon();
            rig.vireo(&["start", "deb"]).ok();
            return;
        }
        // With its memory, killed, and back; then while it runs.
        _ => {
            let mut words = vec!["snapshot-create-as", "deb", name, "--memspec", &image];
            words.extend((kind == 7).then_some("--live"));
            rig.vireo(&words).ok();
            pause();
            for pid in rig.processes("vireo-vmm") {
                // SAFETY: kill takes and returns plain numbers.
                assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
            }
            rig.wait_state("deb", "shut off (crashed)", SOON);
            rig.vireo(&["snapshot-revert", "deb", name]).ok();
        }
    }
    pause();
    rig.vireo(&["snapshot-delete", "deb", name]).ok();
}

#[test]
fn a_linux_guest_goes_through_snapshots_and_block_jobs_and_never_notices() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let mut server = server(&rig);
    let image = rig.path("disk.qcow2").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &image, &DISK.to_string()]);
    let card = match server {
        Some(_) => "<interface type='bridge'><source bridge='br9'/></interface>",
        None => "",
    };
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{image}'/><target dev='vda' bus='virtio'/></disk>{card}\n    <console"
    );
    rig.define(&linux_guest("deb", Kernel::V6_1).replace("<console", &device));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    // A chain of checksums, each of the one before, and each on the disk at once.
    terminal.send(
        "chain() { s=start; n=0; while :; do \
         s=$(echo $s | sha256sum | cut -c1-64); n=$((n+1)); echo $s | \
         dd of=/dev/vda bs=512 seek=$n conv=notrunc,fsync 2>/dev/null; echo $n $s >/run/new; \
         mv /run/new /run/chain; done; }\r",
    );
    terminal.send("chain & \r");
    terminal.expect("deb:/root# ", SOON);
    if server.is_some() {
        terminal.send("ip addr add 10.79.0.2/24 dev eth0; ip link set eth0 up\r");
        // What a talk is when the guest goes back in time is lost, as with any cut; the next is not.
        terminal.send(
            "talk() { k=0; while :; do r=$(timeout 3 wget -q -O - http://10.79.0.1/hello 2>/dev/null); \
             case \"$r\" in 'hello from afar') k=$((k+1)); echo $k >/run/talk;; '') ;; \
             *) echo \"$r\" >>/run/garbled;; esac; usleep 50000; done; }\r",
        );
        terminal.send("talk & \r");
        terminal.expect("deb:/root# ", SOON);
    }
    leave(terminal);
    let mut state = seed();
    let rounds = if soak() { 100 } else { KINDS };
    for round in 0..rounds {
        std::thread::sleep(Duration::from_millis(random(&mut state, 1200)));
        let kind = match round {
            0..KINDS => round,
            _ => random(&mut state, KINDS),
        };
        println!("round {round}: {kind}");
        turn(&rig, kind, &format!("r{round}"), &mut state);
        assert!(rig.state("deb").starts_with("running"), "round {round}");
    }
    let mut terminal = console(&rig, "deb");
    terminal.send("\r");
    terminal.expect("deb:/root# ", SOON);
    if let Some(server) = &mut server {
        terminal.send(
            "a=$(cat /run/talk); i=0; while [ \"$(cat /run/talk)\" = \"$a\" ] && [ $i -lt 600 ]; do usleep 100000; \
             i=$((i+1)); done; [ \"$(cat /run/talk)\" != \"$a\" ] && echo still-$((20+3))-talking\r",
        );
        terminal.expect("still-23-talking", SOON * 2);
        terminal.send("cat /run/garbled | wc -l; echo garb-$((20+3))-led\r");
        let garbled = terminal.expect("garb-23-led", SOON);
        assert!(garbled.contains("\n0\r\n"), "{garbled}");
        server.kill().unwrap();
        server.wait().unwrap();
    }
    terminal.send("kill %1; sync; echo said=$(cat /run/chain) end\r");
    terminal.expect("\nsaid=", SOON);
    let said = terminal.expect(" end", SOON);
    terminal.send("dmesg | grep -ciE 'bug:|I/O error|hung'\r");
    terminal.expect("\n0\r\n", SOON);
    leave(terminal);
    let mut words = said.split_whitespace();
    let count: usize = words.next().unwrap().parse().unwrap();
    let sum = words.next().unwrap().to_owned();
    println!("{count} steps");
    assert!(count > 0);
    let list = rig.vireo(&["domblklist", "deb"]).ok();
    let line = list.lines().find(|line| line.contains("vda")).unwrap();
    let top = line.split_whitespace().nth(1).unwrap().to_owned();
    rig.vireo(&["destroy", "deb"]).ok();
    let chain = format!(
        "s=start; n=0; while [ $n -lt {count} ]; do s=$(echo $s | sha256sum | cut -c1-64); \
         n=$((n+1)); echo $s; done"
    );
    let own = Command::new("sh").args(["-c", &chain]).output().unwrap();
    let own = String::from_utf8(own.stdout).unwrap();
    let own: Vec<&str> = own.lines().collect();
    assert_eq!(own.last(), Some(&sum.as_str()), "after {count} steps");
    let raw = rig.path("disk.raw").display().to_string();
    qemu_img(&["convert", "-O", "raw", &top, &raw]);
    let disk = fs::read(raw).unwrap();
    for (step, sum) in own.iter().enumerate().take(DISK / 512 - 1) {
        let sector = &disk[(step + 1) * 512..][..64];
        assert_eq!(String::from_utf8_lossy(sector), *sum, "step {step}");
    }
    // Nothing wrong with it but, at worst, space that nobody uses.
    let check = Command::new("qemu-img").args(["check", &top]).output();
    let code = check.unwrap().status.code();
    assert!(matches!(code, Some(0 | 3)), "{code:?}");
}
