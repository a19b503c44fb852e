//! Live migration between two daemons on one machine: guests that notice nothing, and run on one side
//! whatever goes wrong.

use std::fs;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, linux_guest, soak, tiny_guest};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(60);

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

/// It echoes what is typed.
fn answers(rig: &Rig, name: &str) {
    let mut terminal = console(rig, name);
    terminal.send("xyz");
    terminal.expect("xyz", SOON);
    leave(terminal);
}

/// Where the guest is to go: a socket of the target's own.
fn place(rig: &Rig) -> String {
    format!("unix://{}", rig.path("incoming").display())
}

/// The arguments that move a domain live to `to`.
fn moving<'a>(name: &'a str, uri: &'a str, at: &'a str) -> Vec<&'a str> {
    vec![
        "migrate",
        "--live",
        "--unsafe",
        name,
        uri,
        "--migrateuri",
        at,
    ]
}

fn running_here_only(here: &Rig, there: &Rig, name: &str) {
    assert!(
        here.state(name).starts_with("running"),
        "{}",
        here.state(name)
    );
    let list = there.vireo(&["list", "--name"]).ok();
    assert!(!list.lines().any(|line| line == name), "{list}");
    assert!(there.processes("vireo-vmm").is_empty());
    assert_eq!(here.processes("vireo-vmm").len(), 1);
}

fn two() -> (Rig, Rig) {
    let (one, other) = (Rig::new(), Rig::new());
    // Clients are told a socket, not a root: the daemons are there before.
    one.vireo(&["list"]).ok();
    other.vireo(&["list"]).ok();
    (one, other)
}

#[test]
fn a_linux_guest_moves_to_and_fro_and_never_notices() {
    let (one, other) = two();
    let disk = one.write("disk.img", vec![0; 4 << 20]);
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
         <source file='{disk}'/><target dev='vda' bus='virtio'/></disk>\n    <console"
    );
    let xml = linux_guest("deb", Kernel::V6_1).replace("<console", &device);
    one.define(&xml);
    let mut terminal = Terminal::start(one.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    // A chain of checksums, each of the one before, and each on the disk; and a clock that ticks.
    terminal.send(
        "chain() { s=start; n=0; while :; do \
         s=$(echo $s | sha256sum | cut -c1-64); n=$((n+1)); echo $s | \
         dd of=/dev/vda bs=512 seek=$n conv=notrunc 2>/dev/null; echo $n $s >/run/new; \
         mv /run/new /run/chain; done; }\r",
    );
    terminal.send(
        "chain & tick() { while :; do sleep 1; t=$((t+1)); echo $t >/run/ticks; done; }; tick &\r",
    );
    terminal.expect("deb:/root# ", SOON);
    leave(terminal);
    let ways: [&[&str]; 5] = [
        &[],
        &["--p2p"],
        &["--parallel", "--parallel-connections", "3"],
        &["--compressed", "--comp-methods", "zstd"],
        &[
            "--p2p",
            "--auto-converge",
            "--persistent",
            "--undefinesource",
        ],
    ];
    let rounds = if soak() { 100 } else { 5 };
    let mut sides = [&one, &other];
    for round in 0..rounds {
        let [from, to] = sides;
        let (uri, at) = (to.uri(), place(to));
        let mut args = moving("deb", &uri, &at);
        args.extend(ways[round % ways.len()]);
        // The stock client now and then.
        let moved = match round % 2 {
            0 => from.vireo(&args),
            _ => from.virsh(&args),
        };
        moved.ok();
        running_here_only(to, from, "deb");
        sides = [to, from];
    }
    let [here, _] = sides;
    let mut terminal = console(here, "deb");
    terminal.send("\r");
    terminal.expect("deb:/root# ", SOON);
    // On an idle host all of it takes less than a tick: its clock goes on, whenever it began.
    terminal.send("until [ -s /run/ticks ]; do sleep 0.1; done\r");
    terminal.expect("deb:/root# ", SOON);
    terminal.send("kill %1; sync; echo said=$(cat /run/chain) ticks=$(cat /run/ticks)\r");
    terminal.expect("\nsaid=", SOON);
    let said = terminal.expect("ticks=", SOON);
    let ticks: u32 = terminal.expect("\r\n", SOON).trim().parse().unwrap();
    assert!(ticks > 0);
    let mut words = said.split_whitespace();
    let count: usize = words.next().unwrap().parse().unwrap();
    let sum = words.next().unwrap().to_owned();
    let chain = format!(
        "s=start; n=0; while [ $n -lt {count} ]; do s=$(echo $s | sha256sum | cut -c1-64); \
         n=$((n+1)); echo $s; done"
    );
    let own = Command::new("sh").args(["-c", &chain]).output().unwrap();
    let own: Vec<String> = String::from_utf8(own.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    assert_eq!(own.last(), Some(&sum), "after {count} steps");
    terminal.send("dmesg | grep -ciE 'bug:|stall|lockup|hung'\r");
    terminal.expect("\n0\r\n", SOON);
    leave(terminal);
    here.vireo(&["destroy", "deb"]).ok();
    // What it wrote to its disk is there, from both sides.
    let disk = fs::read(&disk).unwrap();
    for (step, sum) in own.iter().enumerate().take((4 << 20) / 512 - 1) {
        let sector = &disk[(step + 1) * 512..][..64];
        assert_eq!(String::from_utf8_lossy(sector), *sum, "step {step}");
    }
}

/// A running guest that takes a while to move, and the client that moves it.
fn slow_move(one: &Rig, other: &Rig, name: &str, how: &[&str]) -> Child {
    one.vireo(&["migrate-setspeed", name, "1"]).ok();
    let (uri, at) = (other.uri(), place(other));
    let mut command = one.command("vireo");
    command.args(moving(name, &uri, &at)).args(how);
    let child = command.spawn().unwrap();
    let deadline = Instant::now() + SOON;
    // On both sides: the target's VMM is there before the source's has sent the first page, but not long before.
    while other.processes("vireo-vmm").is_empty()
        || !one
            .vireo(&["domjobinfo", name])
            .ok()
            .contains("Outgoing migration")
    {
        assert!(Instant::now() < deadline, "the migration does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

/// A guest with more memory in use than moves in a moment.
fn busy_guest(rig: &Rig, name: &str) {
    busy_guest_of(rig, name, 24);
}

/// One that takes a second for each of so many MiB at the slowest.
fn busy_guest_of(rig: &Rig, name: &str, mib: usize) {
    // Its initrd is not looked at, but is there, and not empty.
    let mut noise = vec![0u8; mib << 20];
    let mut state = 1u64;
    for word in noise.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    let initrd = rig.write("noise", noise);
    let xml = tiny_guest(rig, name, "qemu")
        .replace("</kernel>", &format!("</kernel><initrd>{initrd}</initrd>"));
    let xml = with_memory(&xml, mib + 40);
    rig.define(&xml);
    rig.vireo(&["start", name]).ok();
    answers(rig, name);
}

/// The same definition with so much memory.
fn with_memory(xml: &str, mib: usize) -> String {
    let start = xml.find("<memory").unwrap();
    let end = xml[start..].find("</memory>").unwrap() + start + "</memory>".len();
    format!(
        "{}<memory unit='MiB'>{mib}</memory>{}",
        &xml[..start],
        &xml[end..]
    )
}

#[test]
fn whatever_goes_wrong_it_runs_on_one_side() {
    let (one, other) = two();
    busy_guest(&one, "tiny");
    // Given up.
    for how in [&[][..], &["--p2p"]] {
        let mut child = slow_move(&one, &other, "tiny", how);
        assert!(one.state("tiny").starts_with("running"), "while it moves");
        one.vireo(&["domjobabort", "tiny"]).ok();
        assert!(!child.wait().unwrap().success());
        running_here_only(&one, &other, "tiny");
    }
    // The target's VMM dies.
    let mut child = slow_move(&one, &other, "tiny", &[]);
    for pid in other.processes("vireo-vmm") {
        Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status()
            .unwrap();
    }
    assert!(!child.wait().unwrap().success());
    running_here_only(&one, &other, "tiny");
    // The client dies.
    let mut child = slow_move(&one, &other, "tiny", &[]);
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + SOON;
    while !other.processes("vireo-vmm").is_empty() {
        assert!(Instant::now() < deadline, "the target waits for ever");
        std::thread::sleep(Duration::from_millis(50));
    }
    while one
        .vireo(&["domjobinfo", "tiny"])
        .ok()
        .contains("Outgoing migration")
    {
        assert!(Instant::now() < deadline, "the source goes on for ever");
        std::thread::sleep(Duration::from_millis(50));
    }
    answers(&one, "tiny");
    // It is made faster, and goes.
    let mut child = slow_move(&one, &other, "tiny", &["--persistent"]);
    one.vireo(&["migrate-setspeed", "tiny", "10000"]).ok();
    assert!(child.wait().unwrap().success());
    running_here_only(&other, &one, "tiny");
    answers(&other, "tiny");
    assert_eq!(one.state("tiny"), "shut off (migrated)");
    let done = other.vireo(&["domjobinfo", "tiny", "--completed"]).ok();
    assert!(done.contains("Incoming migration"), "{done}");
    assert!(done.contains("Total downtime:"), "{done}");
    // The source dies: nobody is left, but nobody is there twice.
    let mut child = slow_move(&other, &one, "tiny", &[]);
    for pid in other.processes("vireo-vmm") {
        Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status()
            .unwrap();
    }
    assert!(!child.wait().unwrap().success());
    assert!(
        one.state("tiny").starts_with("shut off"),
        "{}",
        one.state("tiny")
    );
    assert!(one.processes("vireo-vmm").is_empty());
}

/// All of a host's processes at once.
fn dies(rig: &Rig) {
    for program in ["vireod", "vireo-vmm"] {
        for pid in rig.processes(program) {
            // SAFETY: takes numbers; the process is this test's own.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
    let deadline = Instant::now() + SOON;
    while !rig.processes("vireo-vmm").is_empty() {
        assert!(Instant::now() < deadline, "it does not die");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_host_that_dies_takes_only_along_what_ran_there() {
    for how in [&[][..], &["--p2p"]] {
        let (one, other) = two();
        busy_guest(&one, "tiny");
        let mut child = slow_move(&one, &other, "tiny", how);
        dies(&other);
        assert!(!child.wait().unwrap().success());
        running_here_only(&one, &other, "tiny");
        answers(&one, "tiny");
        let told = one
            .vireo(&["domjobinfo", "tiny", "--completed", "--rawstats"])
            .ok();
        assert!(told.contains("errmsg: "), "{told}");
        // It is up again, and the guest can go.
        let mut child = slow_move(&one, &other, "tiny", how);
        dies(&one);
        assert!(!child.wait().unwrap().success());
        let deadline = Instant::now() + SOON;
        while !other.processes("vireo-vmm").is_empty() {
            assert!(Instant::now() < deadline, "the target waits for ever");
            std::thread::sleep(Duration::from_millis(20));
        }
        let list = other.vireo(&["list", "--all", "--name"]).ok();
        assert_eq!(list.trim(), "", "{list}");
        let state = one.state("tiny");
        assert!(state.starts_with("shut off"), "{state}");
        let told = one
            .vireo(&["domjobinfo", "tiny", "--completed", "--rawstats"])
            .ok();
        assert!(
            told.contains("errmsg: migration failed: domain is no longer running"),
            "{told}"
        );
    }
}

#[test]
fn only_one_moves_it_and_nobody_changes_it_meanwhile() {
    let (one, other) = two();
    busy_guest(&one, "tiny");
    let (uri, at) = (other.uri(), place(&other));
    let moves = |rig: &Rig| {
        let info = rig.vireo(&["domjobinfo", "tiny"]).ok();
        assert!(info.contains("Outgoing migration"), "{info}");
        assert!(info.contains("Expected downtime:"), "{info}");
    };
    let mut child = slow_move(&one, &other, "tiny", &["--change-protection"]);
    // A second one, by whatever way, is refused, and the first goes on.
    let again = moving("tiny", &uri, &at);
    let peer = [&again[..], &["--p2p"]].concat();
    for said in [
        one.vireo(&again).fails(),
        one.vireo(&peer).fails(),
        one.virsh(&again).fails(),
    ] {
        assert!(said.contains("another job is running"), "{said}");
    }
    let file = one.path("saved").display().to_string();
    let snapshot = ["snapshot-create-as", "tiny", "s", "--memspec", &file];
    for change in [
        &["undefine", "tiny"][..],
        &["save", "tiny", &file],
        &["reset", "tiny"],
        &["setmem", "tiny", "32M", "--live"],
        &["dump", "tiny", &file],
        &["detach-device-alias", "tiny", "serial0"],
        &snapshot,
    ] {
        let said = one.vireo(change).fails();
        assert!(
            said.contains("domain is being migrated"),
            "{change:?}: {said}"
        );
    }
    moves(&one);
    one.vireo(&["suspend", "tiny"]).ok();
    one.vireo(&["resume", "tiny"]).ok();
    // Whoever gives up hears why, with any client.
    one.vireo(&["domjobabort", "tiny"]).ok();
    assert!(!child.wait().unwrap().success());
    running_here_only(&one, &other, "tiny");
    // Whoever suspends it meanwhile does so for good.
    let mut child = slow_move(&one, &other, "tiny", &[]);
    one.vireo(&["suspend", "tiny"]).ok();
    one.vireo(&["domjobabort", "tiny"]).ok();
    assert!(!child.wait().unwrap().success());
    let state = one.state("tiny");
    assert!(state.starts_with("paused"), "{state}");
    one.vireo(&["resume", "tiny"]).ok();
    running_here_only(&one, &other, "tiny");
    let said = std::thread::scope(|scope| {
        let client = scope.spawn(|| one.virsh(&again));
        let deadline = Instant::now() + SOON;
        while one.vireo(&["domjobabort", "tiny"]).status != 0 {
            assert!(Instant::now() < deadline, "it does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        client.join().unwrap().fails()
    });
    assert!(
        said.contains("migration out job: canceled by client"),
        "{said}"
    );
    running_here_only(&one, &other, "tiny");
    // It can be changed again, and moved.
    let mut child = slow_move(&one, &other, "tiny", &["--change-protection"]);
    one.vireo(&["migrate-setspeed", "tiny", "10000"]).ok();
    assert!(child.wait().unwrap().success());
    running_here_only(&other, &one, "tiny");
    one.vireo(&["undefine", "tiny"]).ok();
    // A file in the way is no socket that somebody has left.
    let file = one.write("mine", "mine");
    let at = format!("unix://{file}");
    let said = other.vireo(&moving("tiny", &one.uri(), &at)).fails();
    assert!(said.contains("Address already in use"), "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    // Only the definition goes, of one that runs, too.
    other
        .vireo(&["migrate", "--offline", "--persistent", "tiny", &one.uri()])
        .ok();
    assert_eq!(one.state("tiny"), "shut off (unknown)");
    running_here_only(&other, &one, "tiny");
}

#[test]
fn what_does_not_fit_is_refused_and_it_runs_on() {
    let (one, other) = (Rig::new(), Rig::new());
    let nowhere = "migrate_tls_x509_cert_dir = \"/nowhere\"\n";
    other.write("etc/vireo/vireod.conf", nowhere);
    one.vireo(&["list"]).ok();
    other.vireo(&["list"]).ok();
    one.define(&tiny_guest(&one, "tiny", "qemu"));
    one.vireo(&["start", "tiny"]).ok();
    let (uri, at) = (other.uri(), place(&other));
    let refused = |how: &[&str], words: &str| {
        let mut args = moving("tiny", &uri, &at);
        args.extend(how);
        let said = one.vireo(&args).fails();
        assert!(said.contains(words), "{how:?}: {said}");
        running_here_only(&one, &other, "tiny");
    };
    refused(&["--postcopy"], "post-copy migration is not supported");
    refused(
        &["--copy-storage-all", "--copy-storage-synchronous-writes"],
        "synchronous writes",
    );
    refused(&["--copy-storage-all", "--copy-storage-inc"], "exclusive");
    refused(
        &["--copy-storage-all", "--migrate-disks", "vdz"],
        "disk target vdz not found",
    );
    refused(&["--tls"], "TLS for migration");
    refused(&["--compressed", "--comp-methods", "xbzrle"], "'xbzrle'");
    refused(
        &["--comp-methods", "zstd"],
        "Turn compression on to tune it",
    );
    refused(&["--parallel-connections", "2"], "parallel");
    // A name that another domain has there.
    other.define(&tiny_guest(&other, "taken", "qemu"));
    refused(&["--dname", "taken"], "taken");
    refused(&["--dname", "../../evil"], "cannot contain '/'");
    // Another machine.
    let xml = one.vireo(&["dumpxml", "tiny"]).ok();
    let more = xml.replace("</devices>", "<serial type='pty'/></devices>");
    let file = one.write("other.xml", more);
    refused(
        &["--xml", &file],
        "Target domain serial count 2 does not match source 1",
    );
    // No such daemon.
    let nowhere = format!(
        "qemu+unix:///system?socket={}",
        one.path("nowhere").display()
    );
    let mut args = moving("tiny", &nowhere, &at);
    one.vireo(&args).fails();
    args.push("--p2p");
    one.vireo(&args).fails();
    // One that is off goes only as a definition.
    one.vireo(&["destroy", "tiny"]).ok();
    one.vireo(&moving("tiny", &uri, &at)).fails();
    let offline = ["migrate", "--offline", "--copy-storage-all", "tiny", &uri];
    assert!(one.vireo(&offline).fails().contains("non-shared storage"));
    let offline = ["migrate", "--offline", "tiny", &uri];
    assert!(one.vireo(&offline).fails().contains("persistent"));
    one.vireo(&["snapshot-create-as", "tiny", "s"]).ok();
    let offline = ["migrate", "--offline", "--persistent", "tiny", &uri];
    let said = one.vireo(&offline).fails();
    assert!(
        said.contains("cannot migrate domain with 1 snapshots"),
        "{said}"
    );
    one.vireo(&["snapshot-delete", "tiny", "s"]).ok();
    one.virsh(&offline).ok();
    other.vireo(&["undefine", "tiny"]).ok();
    one.vireo(&[
        "migrate",
        "--offline",
        "--persistent",
        "--undefinesource",
        "tiny",
        &uri,
    ])
    .ok();
    assert_eq!(other.state("tiny"), "shut off (unknown)");
    one.vireo(&["domstate", "tiny"]).fails();
}

#[test]
fn a_guest_on_its_way_is_seen_where_it_goes_and_can_be_given_up_there() {
    let (one, other) = two();
    busy_guest_of(&one, "tiny", 100);
    let mut events =
        Terminal::start(
            other
                .command("vireo")
                .args(["event", "--event", "lifecycle", "--loop"]),
        );
    // It has subscribed when it hears of another domain.
    let heard = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let began = Instant::now();
            while !heard.load(Ordering::Relaxed) && began.elapsed() < SOON {
                other.define(&tiny_guest(&other, "another", "qemu"));
                other.vireo(&["undefine", "another"]).ok();
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        events.expect("Undefined Removed", SOON);
        heard.store(true, Ordering::Relaxed);
    });
    let mut child = slow_move(&one, &other, "tiny", &[]);
    for list in [other.vireo(&["list"]).ok(), other.virsh(&["list"]).ok()] {
        let line = list.lines().find(|line| line.contains(" tiny ")).unwrap();
        assert!(line.ends_with("paused"), "{list}");
    }
    assert_eq!(other.state("tiny"), "paused (migrating)");
    let id = other.vireo(&["domid", "tiny"]).ok().trim().to_owned();
    assert!(id.parse::<u32>().unwrap() > 0);
    assert_eq!(other.vireo(&["domname", &id]).ok().trim(), "tiny");
    let xml = other.vireo(&["dumpxml", "tiny"]).ok();
    assert!(xml.contains(&format!(" id='{id}'")), "{xml}");
    assert!(xml.contains("<memory unit='KiB'>143360</memory>"), "{xml}");
    let info = other.vireo(&["dominfo", "tiny"]).ok();
    assert!(info.contains("State:          paused"), "{info}");
    assert!(info.contains("Persistent:     no"), "{info}");
    for job in [
        other.vireo(&["domjobinfo", "tiny"]).ok(),
        other.virsh(&["domjobinfo", "tiny"]).ok(),
    ] {
        assert!(job.contains("Unbounded"), "{job}");
        assert!(job.contains("Incoming migration"), "{job}");
        assert!(job.contains("Time elapsed:"), "{job}");
    }
    // It keeps its name, and its own state.
    let mine = other.write("tiny.xml", &xml);
    let file = other.path("saved").display().to_string();
    for change in [
        &["resume", "tiny"][..],
        &["suspend", "tiny"],
        &["reset", "tiny"],
        &["shutdown", "tiny"],
        &["save", "tiny", &file],
        &["setmem", "tiny", "32M", "--live"],
        &["undefine", "tiny"],
        &["define", &mine],
        &["migrate-setspeed", "tiny", "7"],
        &["migrate", "--live", "tiny", &one.uri()],
    ] {
        let said = other.vireo(change).fails();
        assert!(
            said.contains("held by incoming migration"),
            "{change:?}: {said}"
        );
    }
    let namesake = other.write("namesake.xml", tiny_guest(&other, "tiny", "qemu"));
    let said = other.vireo(&["define", &namesake]).fails();
    assert!(said.contains("already exists with uuid"), "{said}");
    let said = other.vireo(&["domjobabort", "tiny"]).fails();
    assert!(said.contains("cannot abort incoming migration"), "{said}");
    assert_eq!(other.state("tiny"), "paused (migrating)");
    other.vireo(&["destroy", "tiny"]).ok();
    assert!(!other.vireo(&["list", "--name"]).ok().contains("tiny"));
    assert!(!child.wait().unwrap().success());
    running_here_only(&one, &other, "tiny");
    answers(&one, "tiny");
    let failed = one
        .vireo(&["domjobinfo", "tiny", "--completed", "--rawstats"])
        .ok();
    assert!(
        failed.contains("migration failed: domain was destroyed on the target host"),
        "{failed}"
    );
    // What had gone until then is told, too.
    let sent = failed
        .lines()
        .find_map(|line| line.strip_prefix("memory_processed: "));
    assert!(sent.unwrap().parse::<u64>().unwrap() > 0, "{failed}");
    // Its name is free again, and it can come.
    let mut child = slow_move(&one, &other, "tiny", &[]);
    one.vireo(&["migrate-setspeed", "tiny", "10000"]).ok();
    assert!(child.wait().unwrap().success());
    running_here_only(&other, &one, "tiny");
    answers(&other, "tiny");
    for event in [
        "'tiny': Started Migrated",
        "'tiny': Stopped Destroyed",
        "'tiny': Started Migrated",
        "'tiny': Resumed Migrated",
    ] {
        events.expect(event, SOON);
    }
    events.send("\x03");
    events.wait(SOON);
}

#[test]
fn speeds_are_kept_and_the_same_daemon_is_no_target() {
    let (one, other) = two();
    one.define(&tiny_guest(&one, "tiny", "qemu"));
    let speed = |rig: &Rig| {
        rig.vireo(&["migrate-getspeed", "tiny"])
            .ok()
            .trim()
            .to_owned()
    };
    assert_eq!(speed(&one), "8796093022207");
    one.vireo(&["migrate-setspeed", "tiny", "6"]).ok();
    assert_eq!(speed(&one), "6");
    let said = one.vireo(&["migrate-setmaxdowntime", "tiny", "50"]).fails();
    assert!(said.contains("not running"), "{said}");
    one.vireo(&["start", "tiny"]).ok();
    assert_eq!(speed(&one), "6");
    one.vireo(&["migrate-setmaxdowntime", "tiny", "50"]).ok();
    one.kill_daemon();
    assert_eq!(speed(&one), "6");
    assert_eq!(
        one.vireo(&["migrate-getmaxdowntime", "tiny"]).ok().trim(),
        "50"
    );
    let (uri, at) = (one.uri(), place(&one));
    for run in [
        one.vireo(&moving("tiny", &uri, &at)),
        one.virsh(&moving("tiny", &uri, &at)),
        one.vireo(&[&moving("tiny", &uri, &at)[..], &["--p2p"]].concat()),
    ] {
        let said = run.fails();
        assert!(
            said.contains("Attempt to migrate guest to the same host"),
            "{said}"
        );
    }
    running_here_only(&one, &other, "tiny");
    let (uri, at) = (other.uri(), place(&other));
    // As stock virsh words it.
    for (how, words) in [
        (
            &["--timeout-suspend"][..],
            "Unexpected --timeout-* option without --timeout",
        ),
        (
            &["--postcopy-resume"],
            "Option --postcopy is required by option --postcopy-resume",
        ),
        (
            &["--timeout-postcopy"],
            "Option --postcopy is required by option --timeout-postcopy",
        ),
        (
            &["--tls-destination", "x"],
            "Option --tls is required by option --tls-destination",
        ),
        (
            &["--persistent-xml", "/x"],
            "Option --persistent is required by option --persistent-xml",
        ),
        (
            &["--bandwidth", "8796093022208"],
            "bandwidth must be less than 8796093022208",
        ),
    ] {
        let args = [&moving("tiny", &uri, &at)[..], how].concat();
        for run in [one.vireo(&args), one.virsh(&args)] {
            let said = run.fails();
            assert!(said.contains(words), "{how:?}: {said}");
        }
    }
    for run in [
        one.vireo(&["migrate-compcache", "tiny"]),
        one.virsh(&["migrate-compcache", "tiny", "--size", "4096"]),
    ] {
        let said = run.fails();
        assert!(said.contains("there is no compression cache"), "{said}");
    }
}
