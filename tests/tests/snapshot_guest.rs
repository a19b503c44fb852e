//! A Linux guest that computes, and writes what it computes, under snapshots and block jobs at random
//! moments: it never notices.

use std::fs;
use std::process::Command;
use std::time::Duration;

use vireo_tests::{Kernel, Rig, Terminal, left_out, linux_guest, soak, which};

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

#[test]
fn a_linux_guest_goes_through_snapshots_and_block_jobs_and_never_notices() {
    if !which("qemu-img") {
        return left_out("needs qemu-img (qemu-utils)");
    }
    let rig = Rig::new();
    let image = rig.path("disk.qcow2").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &image, &DISK.to_string()]);
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{image}'/><target dev='vda' bus='virtio'/></disk>\n    <console"
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
    leave(terminal);
    let mut state = seed();
    let rounds = if soak() { 100 } else { 6 };
    for round in 0..rounds {
        let pause = |state: &mut u64| {
            std::thread::sleep(Duration::from_millis(random(state, 1200)));
        };
        pause(&mut state);
        // Each kind in turn at first, then as it comes.
        let kind = if round < 4 {
            round
        } else {
            random(&mut state, 4)
        };
        println!("round {round}: {kind}");
        let name = format!("r{round}");
        match kind {
            // Inside, and back.
            0 | 3 => {
                rig.vireo(&["snapshot-create-as", "deb", &name]).ok();
                pause(&mut state);
                if kind == 0 {
                    rig.vireo(&["snapshot-revert", "deb", &name]).ok();
                    pause(&mut state);
                }
                rig.vireo(&["snapshot-delete", "deb", &name]).ok();
            }
            // On top, and merged.
            1 => {
                rig.vireo(&["snapshot-create-as", "deb", &name, "--disk-only"])
                    .ok();
                pause(&mut state);
                rig.vireo(&["snapshot-delete", "deb", &name]).ok();
            }
            // On top, and pulled up.
            _ => {
                let words = [
                    "snapshot-create-as",
                    "deb",
                    &name,
                    "--disk-only",
                    "--no-metadata",
                ];
                rig.vireo(&words).ok();
                pause(&mut state);
                rig.vireo(&["blockpull", "deb", "vda", "--wait"]).ok();
            }
        }
        assert!(rig.state("deb").starts_with("running"), "round {round}");
    }
    let mut terminal = console(&rig, "deb");
    terminal.send("\r");
    terminal.expect("deb:/root# ", SOON);
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
