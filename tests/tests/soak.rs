//! Guests under load, again and again: `make soak` for an hour (`VIREO_SOAK_MINUTES` for
//! another time), `make test` once and short, with 2, 4 and 8 vCPUs.

use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, linux_guest, soak};

/// A boot on a busy host can take a while.
const BOOT: Duration = Duration::from_secs(400);
/// A guest that says nothing for so long hangs: each turn of the load says so.
const SILENCE: Duration = Duration::from_secs(300);

/// What keeps every part of a processor busy: forks and execs, pipes, page faults, signals,
/// timers, checksums that must come out right; each in several copies at once.
const LOAD: &str = r#"load() { i=0; while [ $i -lt $2 ]; do i=$((i+1)); \
for j in 1 2 3 4 5; do /bin/true & done; wait; \
[ "$(seq 1 3000 | sha256sum | cut -c1-8)" = 2e57c67a ] || echo bad-sum; \
[ "$(dd if=/dev/zero bs=4k count=256 2>/dev/null | gzip -c | gunzip -c | wc -c)" = 1048576 ] || echo bad-gzip; \
[ "$(echo 6 7 | awk '{ print $1 * $2 }')" = 42 ] || echo bad-awk; \
usleep 1000; (sleep 9 & p=$!; kill $p; wait $p 2>/dev/null); echo "turn $1 $i"; done; echo "load $1 done"; }"#;

/// One machine: boots, works with several copies of the load, powers off.
fn round(kernel: Kernel, vcpus: u32, turns: u32) {
    let rig = Rig::new();
    let xml = linux_guest("soak", kernel).replace("<vcpu>1<", &format!("<vcpu>{vcpus}<"));
    rig.define(&xml);
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "soak", "--console"]));
    terminal.expect("soak:/root# ", BOOT);
    terminal.send("grep -c ^processor /proc/cpuinfo\r");
    terminal.expect(&format!("\r\n{vcpus}\r\n"), SILENCE);
    // Typed in pieces no longer than a terminal's line.
    for line in LOAD.split("\\\n") {
        terminal.send(line);
        terminal.send("\\\r");
        terminal.expect("> ", SILENCE);
    }
    terminal.send("\r");
    terminal.expect("# ", SILENCE);
    for copy in 0..vcpus + 1 {
        terminal.send(&format!("load {copy} {turns} &\r"));
        terminal.expect("# ", SILENCE);
    }
    terminal.send("wait; echo all=done; dmesg | grep -cE 'BUG|WARNING|stall|soft lockup|hung'\r");
    let said = terminal.expect_while_talking("\r\nall=done\r\n", SILENCE);
    assert!(!said.contains("bad-"), "{said}");
    let bad = terminal.expect("\r\n", SILENCE);
    assert_eq!(bad.trim(), "0", "the kernel complained");
    terminal.send("poweroff -f\r");
    rig.wait_state("soak", "shut off (shutdown)", SILENCE);
    assert!(rig.processes("vireo-vmm").is_empty());
}

/// The short form of the other test: 8 vCPUs on however few processors the host has.
#[test]
fn linux_boots_with_2_4_and_8_vcpus_and_works() {
    for (vcpus, turns) in [(2, 1), (4, 1), (8, 2)] {
        round(Kernel::V6_1, vcpus, turns);
    }
}

#[test]
fn linux_works_under_load_without_a_hang() {
    if !soak() {
        return vireo_tests::left_out("a guest under load for long needs make soak");
    }
    let minutes = std::env::var("VIREO_SOAK_MINUTES").map_or(60, |text| {
        text.parse().expect("VIREO_SOAK_MINUTES is a number")
    });
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    let kernels = [
        Kernel::V6_1,
        Kernel::V6_12,
        Kernel::Generic6_1,
        Kernel::Generic6_12,
        Kernel::I386,
    ];
    let mut rounds = 0;
    while Instant::now() < end {
        let kernel = kernels[rounds % kernels.len()];
        let vcpus = [2, 4, 8, 1][rounds % 4];
        if kernel.is_there() {
            println!("round {rounds}: {kernel:?}, {vcpus} vCPUs");
            round(kernel, vcpus, 40);
        }
        rounds += 1;
    }
    println!("{rounds} rounds");
}
