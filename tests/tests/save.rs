//! Save, restore, managed save, dump: guests that notice nothing, files that are whole or not there.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Run, Terminal, left_out, linux_guest, soak, tiny_guest, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(60);

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

/// The tiny guest, with something typed so that it has a state of its own.
fn running_tiny(rig: &Rig, name: &str) {
    rig.define(&tiny_guest(rig, name, "qemu"));
    rig.vireo(&["start", name]).ok();
    answers(rig, name);
}

/// It echoes what is typed.
fn answers(rig: &Rig, name: &str) {
    let mut terminal = console(rig, name);
    terminal.send("xyz");
    terminal.expect("xyz", SOON);
    leave(terminal);
}

#[test]
fn a_linux_guest_is_saved_and_restored_and_never_notices() {
    let rig = Rig::new();
    let disk = rig.write("disk.img", vec![0; 4 << 20]);
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
         <source file='{disk}'/><target dev='vda' bus='virtio'/></disk>\n    <console"
    );
    let xml = linux_guest("deb", Kernel::V6_1).replace("<console", &device);
    rig.define(&xml);
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
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
    let rounds = if soak() { 100 } else { 5 };
    let mut state = seed();
    let image = rig.path("deb.save").display().to_string();
    for round in 0..rounds {
        std::thread::sleep(Duration::from_millis(random(&mut state, 1500)));
        if round % 2 == 0 {
            let said = rig.vireo(&["save", "deb", &image]).ok();
            assert_eq!(said, format!("\nDomain 'deb' saved to {image}\n\n"));
            assert_eq!(rig.state("deb"), "shut off (saved)");
            rig.vireo(&["restore", &image]).ok();
            assert_eq!(rig.state("deb"), "running (restored)");
            // The guest's memory must not hang on the file's name.
            fs::remove_file(&image).unwrap();
        } else {
            rig.vireo(&["managedsave", "deb"]).ok();
            assert_eq!(rig.state("deb"), "shut off (saved)");
            assert!(
                rig.vireo(&["dominfo", "deb"])
                    .ok()
                    .contains("Managed save:   yes")
            );
            rig.vireo(&["start", "deb"]).ok();
            assert_eq!(rig.state("deb"), "running (restored)");
            assert!(
                rig.vireo(&["dominfo", "deb"])
                    .ok()
                    .contains("Managed save:   no")
            );
        }
    }
    let mut terminal = console(&rig, "deb");
    terminal.send("\r");
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
    // What it wrote to its disk is there, all of it.
    terminal.send("dmesg | grep -ciE 'bug:|stall|lockup|hung'\r");
    terminal.expect("\n0\r\n", SOON);
    leave(terminal);
    rig.vireo(&["destroy", "deb"]).ok();
    let disk = fs::read(&disk).unwrap();
    for (step, sum) in own.iter().enumerate().take((4 << 20) / 512 - 1) {
        let sector = &disk[(step + 1) * 512..][..64];
        assert_eq!(String::from_utf8_lossy(sector), *sum, "step {step}");
    }
}

#[test]
fn saved_images_carry_their_xml_and_how_they_are_to_go_on() {
    let rig = Rig::new();
    running_tiny(&rig, "one");
    let image = rig.path("one.save").display().to_string();
    rig.vireo(&["save", "one", &image, "--paused"]).ok();
    let xml = rig.vireo(&["save-image-dumpxml", &image]).ok();
    assert!(xml.contains("<name>one</name>"), "{xml}");
    let name = rig
        .vireo(&[
            "save-image-dumpxml",
            &image,
            "--xpath",
            "/domain/name/text()",
        ])
        .ok();
    assert_eq!(name.trim(), "one");
    rig.vireo(&["restore", &image]).ok();
    assert_eq!(rig.state("one"), "paused (user)");
    rig.vireo(&["resume", "one"]).ok();
    answers(&rig, "one");
    rig.vireo(&["save", "one", &image]).ok();
    // Another title goes in, another machine doesn't.
    let titled = xml.replace("<name>one</name>", "<name>one</name><title>later</title>");
    let file = rig.write("titled.xml", &titled);
    rig.vireo(&["save-image-define", &image, &file, "--paused"])
        .ok();
    let error = rig.write(
        "other.xml",
        xml.replace("unit='KiB'>16384", "unit='KiB'>32768"),
    );
    let error = rig.vireo(&["save-image-define", &image, &error]).fails();
    assert!(error.contains("memory"), "{error}");
    rig.vireo(&["restore", &image, "--running"]).ok();
    assert_eq!(rig.state("one"), "running (restored)");
    assert!(
        rig.vireo(&["dumpxml", "one"])
            .ok()
            .contains("<title>later</title>")
    );
    answers(&rig, "one");
    // It runs: once more is refused.
    let error = rig.vireo(&["restore", &image]).fails();
    assert!(error.contains("already active"), "{error}");
    // Another XML when it is saved, and yet another when it is restored; past the cache.
    let titled = |title: &str| {
        let title = format!("<name>one</name><title>{title}</title>");
        rig.write("xml", xml.replace("<name>one</name>", &title))
    };
    let saved = titled("as saved");
    rig.vireo(&["save", "one", &image, "--xml", &saved]).ok();
    let stored = rig.vireo(&["save-image-dumpxml", &image]).ok();
    assert!(stored.contains("<title>as saved</title>"), "{stored}");
    let other = rig.write(
        "other.xml",
        xml.replace(
            "<serial type",
            "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng><serial type",
        ),
    );
    let error = rig.vireo(&["restore", &image, "--xml", &other]);
    assert_ne!(error.status, 0, "another machine");
    let again = titled("as restored");
    rig.vireo(&["restore", &image, "--xml", &again, "--paused"])
        .ok();
    assert_eq!(rig.state("one"), "paused (user)");
    let now = rig.vireo(&["dumpxml", "one"]).ok();
    assert!(now.contains("<title>as restored</title>"), "{now}");
    rig.vireo(&["resume", "one"]).ok();
    answers(&rig, "one");
    let past = rig.vireo(&["save", "one", &image, "--bypass-cache"]);
    if past.status == 0 {
        rig.vireo(&["restore", &image, "--bypass-cache"]).ok();
    } else {
        // tmpfs has no O_DIRECT before Linux 6.6.
        assert!(past.err.contains("Invalid argument"), "{}", past.err);
    }
    answers(&rig, "one");
}

#[test]
fn what_is_no_whole_image_is_refused_and_kept() {
    let rig = Rig::new();
    running_tiny(&rig, "one");
    let image = rig.path("one.save").display().to_string();
    rig.vireo(&["save", "one", &image]).ok();
    let whole = fs::read(&image).unwrap();
    let mut state = seed();
    let mut cases: Vec<(Vec<u8>, &str)> = vec![
        (b"not an image".to_vec(), "not a saved image"),
        (Vec::new(), "not a saved image"),
        (whole[..whole.len() - 4096].to_vec(), "truncated"),
        (whole[..4096].to_vec(), "truncated"),
        (vec![0; whole.len()], "not finished"),
    ];
    for _ in 0..4 {
        let mut damaged = whole.clone();
        // The header.
        damaged[8 + usize::try_from(random(&mut state, 100)).unwrap()] ^= 0x10;
        cases.push((damaged, "one.save"));
    }
    for (content, words) in cases {
        fs::write(&image, &content).unwrap();
        let error = rig.vireo(&["restore", &image]).fails();
        assert!(error.contains(words), "{error}");
        assert_eq!(fs::read(&image).unwrap(), content, "it is left alone");
        assert!(
            rig.vireo(&["save-image-dumpxml", &image])
                .fails()
                .contains("one.save")
        );
    }
    // A changed bit of guest memory is found when it is all read.
    let mut damaged = whole.clone();
    let at = whole.len() - (15 << 20);
    damaged[at] ^= 1;
    fs::write(&image, &damaged).unwrap();
    let error = rig.vireo(&["restore", &image, "--bypass-cache"]).fails();
    assert!(error.contains("another checksum"), "{error}");
    fs::write(&image, &whole).unwrap();
    rig.vireo(&["restore", &image, "--bypass-cache"]).ok();
    answers(&rig, "one");
    assert!(rig.processes("vireo-vmm").len() == 1);
}

#[test]
fn managed_saves_are_managed() {
    let rig = Rig::new();
    running_tiny(&rig, "one");
    rig.vireo(&["managedsave", "one"]).ok();
    assert_eq!(rig.state("one"), "shut off (saved)");
    let list = rig.vireo(&["list", "--all", "--managed-save"]).ok();
    assert!(list.contains("saved"), "{list}");
    let xml = rig.vireo(&["managedsave-dumpxml", "one"]).ok();
    assert!(xml.contains("<name>one</name>"));
    let titled = rig.write(
        "titled.xml",
        xml.replace("<name>one</name>", "<name>one</name><title>later</title>"),
    );
    rig.vireo(&["managedsave-define", "one", &titled]).ok();
    let error = rig.vireo(&["undefine", "one"]).fails();
    assert!(error.contains("managed save image exists"), "{error}");
    let error = rig.vireo(&["domrename", "one", "two"]).fails();
    assert!(error.contains("managed saved state"), "{error}");
    rig.vireo(&["start", "one", "--paused"]).ok();
    assert_eq!(rig.state("one"), "paused (user)");
    assert!(rig.vireo(&["dumpxml", "one"]).ok().contains("later"));
    rig.vireo(&["resume", "one"]).ok();
    answers(&rig, "one");
    rig.vireo(&["managedsave", "one"]).ok();
    rig.vireo(&["start", "one", "--force-boot"]).ok();
    assert_eq!(rig.state("one"), "running (booted)");
    rig.vireo(&["managedsave", "one"]).ok();
    let said = rig.vireo(&["managedsave-remove", "one"]).ok();
    assert_eq!(said, "Removed managedsave image for domain 'one'\n\n");
    let said = rig.vireo(&["managedsave-remove", "one"]).ok();
    assert!(said.contains("has no manage save image; removal skipped"));
    rig.vireo(&["start", "one"]).ok();
    assert_eq!(rig.state("one"), "running (booted)");
    rig.vireo(&["managedsave", "one"]).ok();
    rig.vireo(&["undefine", "one", "--managed-save"]).ok();
    let left = fs::read_dir(rig.path("var/lib/vireo/save"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
}

/// A job ends when it is given up, even if its VMM hears of nothing: the guest goes on later, and can be dumped then.
#[test]
fn a_job_of_a_vmm_that_does_not_answer_can_be_given_up() {
    let rig = Rig::new();
    running_tiny(&rig, "one");
    let vmm = rig.processes("vireo-vmm");
    let send = |signal| {
        for pid in &vmm {
            // SAFETY: kill takes and returns plain numbers.
            assert_eq!(unsafe { libc::kill(*pid, signal) }, 0);
        }
    };
    send(libc::SIGSTOP);
    fs::create_dir(rig.path("cores")).unwrap();
    let core = rig.path("cores/core").display().to_string();
    let dump = rig
        .command("vireo")
        .args(["dump", "one", &core, "--live"])
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + SOON;
    while !rig.vireo(&["domjobinfo", "one"]).out.contains("Dump") {
        assert!(Instant::now() < until, "the dump does not begin");
    }
    rig.vireo(&["domjobabort", "one"]).ok();
    let done = dump.wait_with_output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(said.contains("dump job: canceled by client"), "{said}");
    let told = rig.vireo(&["domjobinfo", "one"]).ok();
    assert!(told.contains("None"), "{told}");
    let left: Vec<_> = fs::read_dir(rig.path("cores")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    send(libc::SIGCONT);
    answers(&rig, "one");
    // The VMM may still be about to give the first one up.
    let until = Instant::now() + SOON;
    while rig.vireo(&["dump", "one", &core, "--live"]).status != 0 {
        assert!(Instant::now() < until, "no further dump");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(fs::read(&core).unwrap().starts_with(b"\x7fELF"));
}

#[test]
fn dumps_are_elf_cores() {
    let rig = Rig::new();
    running_tiny(&rig, "one");
    let core = rig.path("core").display().to_string();
    for options in [
        &["--memory-only"][..],
        &["--live"],
        &["--memory-only", "--bypass-cache"],
        &[],
    ] {
        let mut words = vec!["dump", "one", &core];
        words.extend(options);
        let run = rig.vireo(&words);
        if options.contains(&"--bypass-cache") && run.status != 0 {
            // tmpfs has no O_DIRECT before Linux 6.6.
            assert!(run.err.contains("Invalid argument"), "{}", run.err);
            continue;
        }
        assert_eq!(run.ok(), format!("\nDomain 'one' dumped to {core}\n\n"));
        assert_eq!(&fs::read(&core).unwrap()[..4], b"\x7fELF");
        answers(&rig, "one");
        if which("readelf") {
            let notes = Command::new("readelf")
                .args(["-lnW", &core])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&notes.stdout).into_owned();
            assert!(text.contains("NT_PRSTATUS"), "{text}");
            assert!(text.contains("LOAD"), "{text}");
            assert_eq!(String::from_utf8_lossy(&notes.stderr), "");
        } else {
            left_out("needs readelf (binutils)");
        }
        if which("gdb") {
            let commands = [
                "-ex",
                "info threads",
                "-ex",
                "p/x $rip",
                "-ex",
                "info registers eflags",
            ];
            let out = Command::new("gdb")
                .args(["-batch", "-nx"])
                .args(commands)
                .args(["-c", &core])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            // In the tiny kernel's few bytes.
            assert!(
                text.contains("$1 = 0x1000") || text.contains("$1 = 0x1001"),
                "{text}"
            );
            assert!(text.contains("eflags"), "{text}");
        } else {
            left_out("needs gdb");
        }
    }
    rig.vireo(&["dump", "one", &core, "--crash"]).ok();
    assert_eq!(rig.state("one"), "shut off (crashed)");
}

/// The events of dumps, in the order in which libvirt with QEMU tells them.
#[test]
fn what_follows_a_dump_is_told_before_the_guest_goes_on() {
    if !which("virsh") {
        return left_out("needs virsh (libvirt-clients)");
    }
    let rig = Rig::new();
    running_tiny(&rig, "one");
    let xml = rig.vireo(&["dumpxml", "one", "--inactive"]).ok();
    let told = rig.path("events");
    let mut listener = rig
        .virsh_command()
        .args(["event", "--all", "--loop"])
        .stdout(fs::File::create(&told).unwrap())
        .spawn()
        .unwrap();
    let until = |what: &str, again: &dyn Fn()| {
        let deadline = Instant::now() + SOON;
        loop {
            let text = fs::read_to_string(&told).unwrap();
            if text.contains(what) {
                return text;
            }
            assert!(Instant::now() < deadline, "no {what}: {text}");
            again();
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    until("Defined Updated", &|| rig.define(&xml));
    let core = rig.path("core").display().to_string();
    let dump = |flags: &[&str]| rig.vireo(&[&["dump", "one", &core], flags].concat()).ok();
    let last_job = || rig.vireo(&["domjobinfo", "one", "--completed"]).ok();
    dump(&[]);
    dump(&["--reset"]);
    assert!(last_job().contains("Completed"));
    // Who asks for them has them once. A dump of memory only has none.
    dump(&["--memory-only"]);
    let after = last_job();
    assert!(after.contains("Job type:         None"), "{after}");
    assert!(
        rig.state("one").starts_with("running"),
        "{}",
        rig.state("one")
    );
    rig.vireo(&["suspend", "one"]).ok();
    dump(&[]);
    assert_eq!(rig.state("one"), "paused (user)");
    rig.vireo(&["resume", "one"]).ok();
    dump(&["--crash"]);
    assert_eq!(rig.state("one"), "shut off (crashed)");
    let text = until("Stopped Crashed", &|| ());
    listener.kill().unwrap();
    listener.wait().unwrap();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("event") && !line.contains("Defined"))
        .map(|line| line.trim_start_matches("event ").trim_end_matches(':'))
        .map(|line| line.trim_start_matches("'lifecycle' for domain 'one': "))
        .collect();
    let (paused, runs) = ("Suspended Paused", "Resumed Unpaused");
    let (done, reset) = (
        "'job-completed' for domain 'one'",
        "'reboot' for domain 'one'",
    );
    let expected = [
        &[paused, done, runs][..],
        &[paused, done, reset, runs],
        &[paused, runs],
        &[paused, done, runs],
        &[paused, done, "Stopped Crashed"],
    ];
    assert_eq!(lines, expected.concat());
}

/// An editor that puts one word in another's place.
fn editor(rig: &Rig, name: &str, from: &str, to: &str) -> String {
    let path = rig.write(name, format!("#!/bin/sh\nsed -i 's|{from}|{to}|' \"$1\"\n"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn images_are_edited_and_progress_is_shown() {
    let rig = Rig::new();
    running_tiny(&rig, "one");
    let image = rig.path("one.save").display().to_string();
    let core = rig.path("core").display().to_string();
    let run = |mut client: Command, editor: &str, words: &[&str]| -> Run {
        client.env("VISUAL", editor).env("EDITOR", editor);
        client.args(words).output().unwrap().into()
    };
    let clients: [&dyn Fn() -> Command; 2] = [&|| rig.command("vireo"), &|| rig.virsh_command()];
    let mut said = Vec::new();
    for (number, client) in clients.iter().enumerate() {
        if number == 1 && !which("virsh") {
            left_out("needs virsh (libvirt-clients)");
            continue;
        }
        let titled = format!("title-{number}");
        let titles = |name: &str| {
            let to = format!("<name>one</name><title>{titled}-{name}</title>");
            editor(&rig, name, "<name>one</name>", &to)
        };
        let untitled = editor(&rig, "none", "<title>.*</title>", "");
        let mut all = Vec::new();
        let mut ok = |editor: &str, words: &[&str]| {
            let done = run(client(), editor, words);
            assert_eq!(done.status, 0, "{words:?}: {}", done.err);
            all.push((done.out, done.err));
        };
        ok("", &["dump", "one", &core, "--memory-only", "--verbose"]);
        ok("", &["save", "one", &image, "--verbose"]);
        // Nothing changed, then something, for when it runs.
        ok("true", &["save-image-edit", &image]);
        ok(&titles("a"), &["save-image-edit", &image, "--paused"]);
        ok("", &["restore", &image]);
        assert_eq!(rig.state("one"), "paused (user)");
        let xml = rig.vireo(&["dumpxml", "one"]).ok();
        assert!(xml.contains(&format!("<title>{titled}-a</title>")), "{xml}");
        rig.vireo(&["resume", "one"]).ok();
        ok("", &["managedsave", "one", "--verbose"]);
        ok("true", &["managedsave-edit", "one"]);
        ok(&untitled, &["managedsave-edit", "one"]);
        ok(&titles("b"), &["managedsave-edit", "one"]);
        ok("", &["start", "one"]);
        let xml = rig.vireo(&["dumpxml", "one"]).ok();
        assert!(xml.contains(&format!("<title>{titled}-b</title>")), "{xml}");
        answers(&rig, "one");
        rig.vireo(&["destroy", "one"]).ok();
        rig.vireo(&["start", "one"]).ok();
        answers(&rig, "one");
        for (_, err) in &mut all {
            // How often it looks is a matter of time: the end is what counts.
            if let Some(at) = err.rfind('\r') {
                *err = err[at..].to_owned();
            }
        }
        assert!(all[1].1.contains("Save: [100 %]"), "{:?}", all[1]);
        said.push(all);
    }
    if let [ours, theirs] = &said[..] {
        assert_eq!(ours, theirs);
    }
}

#[test]
fn both_clients_say_the_same() {
    if !which("virsh") {
        return left_out("needs virsh (libvirt-clients)");
    }
    let rig = Rig::new();
    running_tiny(&rig, "one");
    let image = rig.path("one.save").display().to_string();
    let core = rig.path("core").display().to_string();
    let missing = rig.path("missing").display().to_string();
    for words in [
        &["domjobinfo", "one"][..],
        &["domjobabort", "one"],
        &["managedsave-remove", "one"],
        &["managedsave-dumpxml", "one"],
        &["dump", "one", &core, "--memory-only"],
        &[
            "domjobinfo",
            "one",
            "--completed",
            "--keep-completed",
            "--rawstats",
        ],
        &["domjobinfo", "one", "--completed", "--keep-completed"],
        &["dump", "one", &core, "--format", "elf"],
        &[
            "dump",
            "one",
            &core,
            "--memory-only",
            "--format",
            "kdump-zlib",
        ],
        &["dump", "one", &core, "--live", "--crash"],
        &["save", "one", "/nowhere/at/all"],
        &["restore", &missing],
        &["save-image-dumpxml", &missing],
        &["restore", &image, "--running", "--paused"],
    ] {
        let (ours, theirs) = (rig.vireo(words), rig.virsh(words));
        let words = words.join(" ");
        assert_eq!(
            ours.status, theirs.status,
            "{words}: {} {}",
            ours.err, theirs.err
        );
        if !words.contains("completed") {
            assert_eq!(ours.out, theirs.out, "{words}");
        } else {
            let labels = |text: &str| -> Vec<String> {
                let label = |line: &str| line.split(':').next().unwrap_or_default().to_owned();
                text.lines().map(label).collect()
            };
            assert_eq!(
                labels(&ours.out),
                labels(&theirs.out),
                "{}\n{}",
                ours.out,
                theirs.out
            );
        }
        assert_eq!(ours.err, theirs.err, "{words}");
    }
    rig.virsh(&["save", "one", &image]).ok();
    rig.virsh(&["restore", &image]).ok();
    rig.virsh(&["managedsave", "one", "--running"]).ok();
    rig.virsh(&["start", "one"]).ok();
    answers(&rig, "one");
}

#[test]
fn a_save_can_be_given_up_and_others_look_meanwhile() {
    let rig = Rig::new();
    // Enough memory in use that writing it takes a while.
    let xml = tiny_guest(&rig, "one", "qemu").replace("'MiB'>16", "'MiB'>2048");
    rig.define(&xml);
    rig.vireo(&["start", "one"]).ok();
    answers(&rig, "one");
    let image = rig.path("one.save").display().to_string();
    let mut given_up = 0;
    for round in 0..10 {
        let mut save = rig
            .command("vireo")
            .args(["save", "one", &image])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(round * 2));
        let abort = rig.vireo(&["domjobabort", "one"]);
        rig.vireo(&["domstate", "one"]).ok();
        let done = save.wait().unwrap().success();
        if done {
            rig.vireo(&["restore", &image]).ok();
        } else {
            assert!(abort.status == 0 || !std::path::Path::new(&image).exists());
            given_up += 1;
        }
        let _ = fs::remove_file(&image);
        answers(&rig, "one");
    }
    println!("{given_up} of 10 given up");
    let left: Vec<_> = fs::read_dir(rig.root())
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".vireo-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Each point at which a daemon or a VMM may die, and whether the save had been made by then.
const POINTS: [(&str, bool); 8] = [
    ("save.begun", false),
    ("vmm.states-written", false),
    ("vmm.ram-half", false),
    ("vmm.ram-written", false),
    ("vmm.image-finished", false),
    ("save.written", false),
    ("save.put", true),
    ("dump.written", false),
];

#[test]
fn nothing_half_done_is_left_by_a_crash_at_any_point() {
    for (point, made) in POINTS {
        let rig = Rig::new();
        let mut daemon = rig.daemon_killed_at(point);
        running_tiny(&rig, "one");
        let in_vmm = point.starts_with("vmm.");
        let run = if point.starts_with("dump") {
            rig.vireo(&["dump", "one", &rig.path("core").display().to_string()])
        } else {
            rig.vireo(&["managedsave", "one"])
        };
        assert_ne!(run.status, 0, "{point}");
        if in_vmm {
            assert_eq!(rig.state("one"), "shut off (crashed)", "{point}");
            daemon.kill().unwrap();
        }
        daemon.wait().unwrap();
        let mut next = rig.daemon();
        if made {
            rig.wait_state("one", "shut off (saved)", SOON);
            rig.vireo(&["start", "one"]).ok();
        } else if in_vmm {
            assert!(
                rig.vireo(&["dominfo", "one"])
                    .ok()
                    .contains("Managed save:   no")
            );
            rig.vireo(&["start", "one"]).ok();
            assert_eq!(rig.state("one"), "running (booted)", "{point}");
        } else {
            let deadline = Instant::now() + SOON;
            while !rig.state("one").starts_with("running") {
                assert!(Instant::now() < deadline, "{point}: {}", rig.state("one"));
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        answers(&rig, "one");
        let saves = rig.path("var/lib/vireo/save");
        let left: Vec<_> = fs::read_dir(&saves).map_or_else(
            |_| Vec::new(),
            |entries| entries.flatten().map(|e| e.file_name()).collect(),
        );
        assert!(left.is_empty(), "{point}: {left:?}");
        next.kill().unwrap();
        next.wait().unwrap();
    }
}

/// Points of a start from an image at which the daemon may die.
const RESTORES: [&str; 4] = [
    "start.prepared",
    "start.spawned",
    "start.recorded",
    "start.image-taken",
];

#[test]
fn a_crash_in_a_restore_leaves_the_image() {
    for (point, managed) in RESTORES
        .into_iter()
        .flat_map(|point| [(point, true), (point, false)])
    {
        println!("{point}, managed: {managed}");
        let rig = Rig::new();
        let mut first = rig.daemon();
        running_tiny(&rig, "one");
        let image = rig.path("one.save").display().to_string();
        if managed {
            rig.vireo(&["managedsave", "one"]).ok();
        } else {
            rig.vireo(&["save", "one", &image]).ok();
        }
        first.kill().unwrap();
        first.wait().unwrap();
        let mut daemon = rig.daemon_killed_at(point);
        let words = match managed {
            true => ["start", "one"],
            false => ["restore", &image],
        };
        assert_ne!(rig.vireo(&words).status, 0, "{point}");
        daemon.wait().unwrap();
        let mut next = rig.daemon();
        // Not an instruction of it has run: it can be had again, and no process is left.
        let state = rig.state("one");
        assert!(state.starts_with("shut off"), "{point}: {state}");
        // A daemon serves while it ends what was left.
        let deadline = Instant::now() + SOON;
        while !rig.processes("vireo-vmm").is_empty() {
            assert!(Instant::now() < deadline, "{point}");
            std::thread::sleep(Duration::from_millis(20));
        }
        rig.vireo(&words).ok();
        assert_eq!(rig.state("one"), "running (restored)", "{point}");
        answers(&rig, "one");
        let info = rig.vireo(&["dominfo", "one"]).ok();
        assert!(info.contains("Managed save:   no"), "{point}: {info}");
        assert_eq!(rig.processes("vireo-vmm").len(), 1, "{point}");
        next.kill().unwrap();
        next.wait().unwrap();
    }
}
