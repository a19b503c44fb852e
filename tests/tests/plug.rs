//! Devices that come, go and change: in definitions, through both clients; and in a Linux guest that runs.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use vireo_tests::{
    Kernel, Rig, Run, Terminal, grub_disk, left_out, linux_guest, namespace, tiny_guest, which,
};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(90);

/// The same command in two Vireos with the same domain, through `vireo` and through virsh.
struct Pair(Rig, Rig);

impl Pair {
    fn new() -> Self {
        let pair = Self(Rig::new(), Rig::new());
        for rig in [&pair.0, &pair.1] {
            let xml = tiny_guest(rig, "one", "qemu").replace(
                "  <memory",
                "  <uuid>06df9427-4b0f-4db9-830c-95aadc4a9064</uuid>\n  <memory",
            );
            rig.define(&xml.replace(
                "<devices>",
                "<devices><disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>",
            ));
        }
        pair
    }

    /// Runs lines of commands; a word that starts with `@` is a file below the root.
    #[track_caller]
    fn all(&self, lines: &[&str]) {
        let mut wrong = String::new();
        for line in lines {
            let run = |rig: &Rig, run: &dyn Fn(&[&str]) -> Run| {
                let root = rig.root().display().to_string();
                let words: Vec<String> = line
                    .split(' ')
                    .map(|word| word.replace('@', &format!("{root}/")))
                    .collect();
                let done = run(&words.iter().map(String::as_str).collect::<Vec<_>>());
                Run {
                    status: done.status,
                    out: done.out.replace(&root, "ROOT"),
                    err: done.err.replace(&root, "ROOT"),
                }
            };
            let ours = run(&self.0, &|args| self.0.vireo(args));
            let theirs = run(&self.1, &|args| self.1.virsh(args));
            if ours != theirs {
                wrong += &format!("{line}\n  vireo: {ours:?}\n  virsh: {theirs:?}\n");
            }
        }
        assert!(wrong.is_empty(), "\n{wrong}");
    }
}

#[test]
fn definitions_get_and_lose_devices() {
    if !which("virsh") {
        return left_out("needs virsh (libvirt-clients)");
    }
    let pair = Pair::new();
    for rig in [&pair.0, &pair.1] {
        for (name, text) in [
            (
                "rng.xml",
                "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
            ),
            (
                "card.xml",
                "<interface type='bridge'><mac address='52:54:00:00:00:09'/><source bridge='br9'/>\
                 <model type='virtio'/></interface>",
            ),
            (
                "card-down.xml",
                "<interface type='bridge'><mac address='52:54:00:00:00:09'/><source bridge='br9'/>\
                 <model type='virtio'/><link state='down'/></interface>",
            ),
            (
                "channel.xml",
                "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
            ),
            ("sound.xml", "<sound model='ich9'/>"),
            ("bad.xml", "<rng"),
            ("bogus.xml", "<bogus/>"),
            ("disk.raw", "x"),
            ("cd.iso", "x"),
        ] {
            rig.write(name, text);
        }
    }
    pair.all(&[
        "attach-device one @rng.xml --config",
        "attach-device one @rng.xml",
        "attach-device one @rng.xml --live",
        "attach-device one @channel.xml --config",
        "attach-device one @channel.xml --config",
        "attach-device one @sound.xml --config",
        "attach-device one @bad.xml --config",
        "attach-device one @missing.xml --config",
        "attach-device one @card.xml --persistent",
        "attach-disk one @disk.raw vdb --print-xml",
        "attach-disk one /dev/null vdb --print-xml",
        "attach-disk one @disk.raw vdb --print-xml --mode readonly --serial S --cache none --io threads --subdriver raw --targetbus virtio --type disk --rawio --wwn 5000c50015ea71aa",
        "attach-disk one @disk.raw vdb --print-xml --address pci:0000.00.0a.0 --multifunction",
        "attach-disk one @disk.raw vdb --print-xml --alias ua-1 --iothread 1 --driver qemu",
        "attach-disk one @disk.raw vdb --mode bogus",
        "attach-disk one @disk.raw vdb --sourcetype bogus",
        "attach-disk one @disk.raw vdb --config --targetbus virtio",
        "attach-disk one @disk.raw vdb --config --targetbus virtio",
        "attach-disk one @disk.raw vdc",
        "attach-interface one bridge br0 --print-xml",
        "attach-interface one network default --print-xml --mac 52:54:00:00:00:01 --model virtio --inbound 100,200,300 --outbound 50 --target t0 --alias ua-n --script /x",
        "attach-interface one bogus br0 --print-xml",
        "attach-interface one bridge br0 --config --mac 52:54:00:00:00:02",
        "attach-interface one bridge br0 --mac 52:54:00:00:00:03",
        "domblklist one",
        "domiflist one",
        "dumpxml one",
        "update-device one @card-down.xml --config",
        "domif-getlink one 52:54:00:00:00:09 --config",
        "update-device one @rng.xml --live",
        "update-device one @missing.xml",
        "detach-disk one nope",
        "detach-disk one vdb",
        "detach-disk one vdb --config",
        "detach-disk one vdb --config",
        "detach-interface one bridge --mac 52:54:00:00:00:02 --config",
        "detach-interface one bridge --config",
        "detach-device one @rng.xml",
        "detach-device one @rng.xml --config",
        "detach-device one @rng.xml --config",
        "detach-device one @card.xml --config",
        "detach-device-alias one net0",
        "detach-device-alias one net0 --config",
        "dumpxml one",
    ]);
    let left = pair.0.vireo(&["dumpxml", "one"]).ok();
    for gone in ["<rng", "<interface", "vdb", "cd.iso"] {
        assert!(!left.contains(gone), "{gone}: {left}");
    }
    assert!(left.contains("org.qemu.guest_agent.0"), "{left}");
}

/// A guest that does not listen to its slots keeps its devices; what is wrong is said.
#[test]
fn a_guest_that_does_not_cooperate_keeps_its_devices() {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    rig.vireo(&["start", "one"]).ok();
    let disk = rig.write("disk.raw", vec![0; 1 << 20]);
    let rng = rig.write(
        "rng.xml",
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
    );
    assert_eq!(
        rig.vireo(&["attach-disk", "one", &disk, "vda"]).ok(),
        "Disk attached successfully\n\n"
    );
    assert!(rig.vireo(&["domblklist", "one"]).ok().contains("vda"));
    // The one free slot is taken.
    let full = rig.vireo(&["attach-device", "one", &rng]).fails();
    assert!(full.contains("No more available PCI slots"), "{full}");
    let twice = rig.vireo(&["attach-disk", "one", &disk, "vda"]).fails();
    let words = format!("target 'vda' duplicated for disk sources '{disk}' and '{disk}'");
    assert!(twice.contains(&words), "{twice}");
    let sound = rig.write("sound.xml", "<sound model='ich9'/>");
    let refused = rig.vireo(&["attach-device", "one", &sound]).fails();
    assert!(
        refused.contains("live attach of device 'sound'"),
        "{refused}"
    );
    // It is asked, waited for, and not there yet.
    rig.vireo(&["detach-disk", "one", "vda"]).ok();
    assert!(rig.vireo(&["domblklist", "one"]).ok().contains("vda"));
    assert!(
        !rig.vireo(&["domblklist", "one", "--inactive"])
            .ok()
            .contains("vda")
    );
    // A reset makes it let go.
    rig.vireo(&["reset", "one"]).ok();
    let deadline = Instant::now() + SOON;
    while rig.vireo(&["domblklist", "one"]).ok().contains("vda") {
        assert!(Instant::now() < deadline, "the disk is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
    rig.vireo(&["attach-device", "one", &rng]).ok();
    assert!(
        rig.vireo(&["dumpxml", "one"])
            .ok()
            .contains("<alias name='rng0'/>")
    );
}

/// As libvirt: several cards may have one hardware address, which then does not say which of them is meant.
#[test]
fn two_cards_with_one_address() {
    let rig = Rig::new();
    let card = |more: &str| {
        format!(
            "<interface type='bridge'><mac address='52:54:00:00:00:09'/><source bridge='br9'/>\
             <model type='virtio'/>{more}</interface>"
        )
    };
    let both = format!("<devices>{}{}", card(""), card(""));
    rig.define(&tiny_guest(&rig, "one", "qemu").replace("<devices>", &both));
    let file = rig.write("card.xml", card(""));
    rig.vireo(&["attach-device", "one", &file, "--config"]).ok();
    let count = || {
        let shown = rig.vireo(&["domiflist", "one"]).ok();
        shown.matches("52:54:00:00:00:09").count()
    };
    assert_eq!(count(), 3);
    let which = rig.vireo(&["detach-device", "one", &file, "--config"]);
    let which = which.fails();
    let words = "multiple devices matching MAC address 52:54:00:00:00:09 found";
    assert!(which.contains(words), "{which}");
    let places = rig.vireo(&["dumpxml", "one", "--xpath", "//interface/address/@bus"]);
    let places = places.ok();
    for bus in places.split('"').filter(|part| part.starts_with("0x")) {
        let place = format!("<address type='pci' bus='{bus}'/>");
        let file = rig.write("placed.xml", card(&place));
        rig.vireo(&["detach-device", "one", &file, "--config"]).ok();
    }
    assert_eq!(count(), 0);
    let none = rig.vireo(&["detach-device", "one", &file, "--config"]);
    let none = none.fails();
    let words =
        "at address '(<null>)' matching MAC address '52:54:00:00:00:09' and alias '(<null>)'";
    assert!(none.contains(words), "{none}");
}

/// A daemon may die with a device on its way into a machine, or out of it.
#[test]
fn the_next_daemon_knows_the_devices() {
    let rig = Rig::new();
    let mut daemon = rig.daemon_killed_at("plug.noted");
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    rig.vireo(&["start", "one"]).ok();
    let tty = rig.vireo(&["ttyconsole", "one"]).ok().trim().to_owned();
    let disk = rig.write("disk.raw", vec![0; 1 << 20]);
    let attach = || rig.vireo(&["attach-disk", "one", &disk, "vda", "--serial", "S1"]);
    let there = || {
        let deadline = Instant::now() + SOON;
        move |rig: &Rig, want: bool| loop {
            let listed = rig.vireo(&["domblklist", "one"]).ok();
            if listed.contains("vda") == want {
                break;
            }
            assert!(Instant::now() < deadline, "{listed}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    // It was not plugged yet.
    attach().fails();
    daemon.wait().unwrap();
    let mut daemon = rig.daemon_killed_at("plug.plugged");
    there()(&rig, false);
    let noted = |rig: &Rig| {
        let folders = fs::read_dir(rig.path("run/vireo/domains")).unwrap();
        let mut folders = folders.filter_map(|entry| Some(entry.ok()?.path()));
        folders.any(|folder| folder.join("plugging.xml").exists())
    };
    let deadline = Instant::now() + SOON;
    while noted(&rig) {
        assert!(Instant::now() < deadline, "it is still on its way");
        std::thread::sleep(Duration::from_millis(50));
    }
    // It was, and nobody had been told.
    attach().fails();
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    there()(&rig, true);
    let shown = rig.vireo(&["dumpxml", "one", "--xpath", "//disk"]).ok();
    assert!(shown.contains("<serial>S1</serial>"), "{shown}");
    assert!(shown.contains("virtio-disk0"), "{shown}");
    assert!(!noted(&rig));
    let stats = rig.vireo(&["domblkstat", "one", "vda"]).ok();
    assert!(stats.contains("vda rd_req"), "{stats}");
    let twice = attach().fails();
    assert!(twice.contains("duplicated"), "{twice}");
    // The guest lets go of it (it resets itself) while there is no daemon.
    rig.vireo(&["detach-disk", "one", "vda"]).ok();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    fs::write(&tty, "r").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let mut daemon = rig.daemon();
    there()(&rig, false);
    attach().ok();
    rig.vireo(&["destroy", "one"]).ok();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

/// A network of the test's own, with what virtual networks are made of; `Err` says what is missing.
fn can_have_networks() -> Result<(), String> {
    for program in ["nft", "dnsmasq"] {
        let sbin = format!("/usr/sbin/{program}");
        if !which(program) && !std::path::Path::new(&sbin).exists() {
            return Err(format!("needs {program}"));
        }
    }
    namespace::enter()
}

/// What a card of a virtual network had there is given back when the guest has let go of it, not when the domain ends.
#[test]
fn an_unplugged_card_leaves_its_network() {
    if let Err(needs) = can_have_networks() {
        return left_out(&needs);
    }
    let rig = Rig::new();
    let network = rig.write(
        "net.xml",
        "<network><name>lab</name><bridge name='vrplug'/></network>",
    );
    rig.vireo(&["net-create", &network]).ok();
    let card = "<interface type='network'><mac address='52:54:00:00:00:21'/><source network='lab'/>\
                <model type='virtio'/></interface>";
    rig.define(&tiny_guest(&rig, "one", "qemu").replace("<devices>", &format!("<devices>{card}")));
    rig.vireo(&["start", "one"]).ok();
    rig.vireo(&[
        "attach-interface",
        "one",
        "network",
        "lab",
        "--model",
        "virtio",
        "--mac",
        "52:54:00:00:00:22",
    ])
    .ok();
    let ports = || {
        let said = rig.vireo(&["net-port-list", "lab"]).ok();
        said.lines().filter(|line| line.contains('-')).count() - 1
    };
    let taps = || namespace::ip("-o link show master vrplug").lines().count();
    assert_eq!((ports(), taps()), (2, 2));
    // The next daemon knows as well what belongs to which card.
    rig.kill_daemon();
    for (at, mac) in ["52:54:00:00:00:21", "52:54:00:00:00:22"]
        .iter()
        .enumerate()
    {
        rig.vireo(&["detach-interface", "one", "network", "--mac", mac, "--live"])
            .ok();
        // This guest lets go only when it is reset.
        rig.vireo(&["reset", "one"]).ok();
        let deadline = Instant::now() + SOON;
        while (ports(), taps()) != (1 - at, 1 - at) {
            assert!(
                Instant::now() < deadline,
                "{mac}: {} ports, {} taps",
                ports(),
                taps()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    assert_eq!(rig.state("one"), "running (booted)");
    rig.vireo(&["destroy", "one"]).ok();
}

/// What a card had made on the host when the daemon died goes with it, or stays with it: by whether the machine has it.
#[test]
fn a_card_on_its_way_leaves_nothing_behind() {
    if let Err(needs) = can_have_networks() {
        return left_out(&needs);
    }
    let rig = Rig::new();
    let network = rig.write(
        "net.xml",
        "<network><name>lab</name><bridge name='vrplugn'/></network>",
    );
    let mut daemon = rig.daemon_killed_at("plug.noted");
    rig.vireo(&["net-create", &network]).ok();
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    rig.vireo(&["start", "one"]).ok();
    let attach = || {
        let mac = "52:54:00:00:00:23";
        let how = ["one", "network", "lab", "--model", "virtio", "--mac", mac];
        rig.vireo(&[&["attach-interface"][..], &how].concat())
    };
    let seen = || {
        let said = rig.vireo(&["net-port-list", "lab"]).ok();
        let ports = said.lines().filter(|line| line.contains('-')).count() - 1;
        let taps = namespace::ip("-o link show master vrplugn").lines().count();
        let listed = rig.vireo(&["domiflist", "one"]).ok();
        (ports, taps, listed.matches("52:54:00:00:00:23").count())
    };
    let comes_to = |want: usize| {
        let deadline = Instant::now() + SOON;
        while seen() != (want, want, want) {
            let seen = seen();
            assert!(Instant::now() < deadline, "{want}: {seen:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    attach().fails();
    daemon.wait().unwrap();
    // Its tap has gone with the daemon; its port is the next one's to give back.
    let mut daemon = rig.daemon_killed_at("plug.plugged");
    comes_to(0);
    attach().fails();
    daemon.wait().unwrap();
    let mut daemon = rig.daemon();
    comes_to(1);
    let shown = rig.vireo(&["domifstat", "one", "52:54:00:00:00:23"]).ok();
    assert!(shown.contains("rx_bytes"), "{shown}");
    rig.vireo(&["destroy", "one"]).ok();
    comes_to(0);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

/// One line of a guest's shell, up to the mark that follows it.
fn shell(terminal: &mut Terminal, line: &str) -> String {
    terminal.send(&format!("{line}; echo DO''NE\r"));
    terminal.expect("DO''NE", SOON);
    terminal.expect("DONE\r\n", SOON)
}

/// Runs a line again and again until its output has, or has not, a text.
#[track_caller]
fn until(terminal: &mut Terminal, line: &str, text: &str, there: bool) -> String {
    let deadline = Instant::now() + SOON;
    loop {
        let seen = shell(terminal, line);
        if seen.contains(text) == there {
            return seen;
        }
        assert!(Instant::now() < deadline, "{line}: {seen}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn linux_finds_what_is_plugged_and_lets_go_of_it() {
    let rig = Rig::new();
    let port = |index| format!("<controller type='pci' index='{index}' model='pcie-root-port'/>");
    let ports: String = (1..=5).map(port).collect();
    let channel =
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
    rig.define(
        &linux_guest("deb", Kernel::V6_1)
            .replace("</devices>", &format!("{ports}{channel}</devices>")),
    );
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    // Long lines are not to be broken by the guest's line editor.
    terminal.send("stty cols 500\r");
    terminal.expect("deb:/root# ", SOON);
    let mut events = rig.listen("deb");
    let disk = rig.path("disk.raw").display().to_string();
    let mut content = vec![0u8; 4 << 20];
    content[..5].copy_from_slice(b"HELLO");
    fs::write(&disk, content).unwrap();
    rig.vireo(&[
        "attach-disk",
        "deb",
        &disk,
        "vdb",
        "--serial",
        "PLUG1",
        "--persistent",
        "--targetbus",
        "virtio",
    ])
    .ok();
    events.expect("event 'device-added' for domain 'deb': virtio-disk1", SOON);
    until(&mut terminal, "cat /sys/block/vd*/serial", "PLUG1", true);
    let seen = shell(
        &mut terminal,
        "dd if=/dev/vda bs=5 count=1 2>/dev/null; echo",
    );
    assert!(seen.contains("HELLO"), "{seen}");
    shell(
        &mut terminal,
        "echo WORLD | dd of=/dev/vda bs=512 seek=1 conv=sync; sync",
    );
    assert_eq!(&fs::read(&disk).unwrap()[512..517], b"WORLD");
    let both = [
        rig.vireo(&["dumpxml", "deb"]).ok(),
        rig.vireo(&["dumpxml", "deb", "--inactive"]).ok(),
    ];
    assert!(
        both.iter()
            .all(|xml| xml.contains("<serial>PLUG1</serial>")),
        "{both:?}"
    );
    // Entropy.
    let rng = rig.write(
        "rng.xml",
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
    );
    rig.vireo(&["attach-device", "deb", &rng]).ok();
    events.expect("event 'device-added' for domain 'deb': rng0", SOON);
    until(
        &mut terminal,
        "cat /sys/class/misc/hw_random/rng_available",
        "virtio_rng",
        true,
    );
    // A network card, where there is something to connect it with.
    if which("passt") {
        let card = rig.write(
            "card.xml",
            "<interface type='user'><mac address='52:54:00:12:34:57'/><model type='virtio'/>\
             <backend type='passt'/></interface>",
        );
        rig.vireo(&["attach-device", "deb", &card]).ok();
        events.expect("event 'device-added' for domain 'deb': net0", SOON);
        until(
            &mut terminal,
            "cat /sys/class/net/*/address",
            "52:54:00:12:34:57",
            true,
        );
        assert!(
            rig.vireo(&["domiflist", "deb"])
                .ok()
                .contains("52:54:00:12:34:57")
        );
        rig.vireo(&["detach-interface", "deb", "user"]).ok();
        events.expect("event 'device-removed' for domain 'deb': net0", SOON);
        until(
            &mut terminal,
            "cat /sys/class/net/*/address",
            "52:54:00:12:34:57",
            false,
        );
    } else {
        left_out("the network card needs passt");
    }
    // The next daemon knows what was plugged.
    drop(events);
    rig.kill_daemon();
    let mut events = rig.listen("deb");
    // The console went with the daemon.
    drop(terminal);
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", "deb"]));
    terminal.expect("Escape character", SOON);
    terminal.wait_raw(SOON);
    terminal.send("\r");
    terminal.expect("deb:/root# ", SOON);
    assert!(rig.vireo(&["domblklist", "deb"]).ok().contains("vdb"));
    rig.vireo(&["detach-disk", "deb", "vdb", "--persistent"])
        .ok();
    events.expect(
        "event 'device-removed' for domain 'deb': virtio-disk1",
        SOON,
    );
    until(&mut terminal, "ls /sys/block", "vda", false);
    let both = [
        rig.vireo(&["dumpxml", "deb"]).ok(),
        rig.vireo(&["dumpxml", "deb", "--inactive"]).ok(),
    ];
    assert!(both.iter().all(|xml| !xml.contains("PLUG1")), "{both:?}");
    // The slot can be used again.
    rig.vireo(&["attach-disk", "deb", &disk, "vdc", "--serial", "PLUG2"])
        .ok();
    until(&mut terminal, "cat /sys/block/vd*/serial", "PLUG2", true);
    rig.vireo(&["detach-device-alias", "deb", "rng0"]).ok();
    until(
        &mut terminal,
        "cat /sys/class/misc/hw_random/rng_available",
        "virtio_rng",
        false,
    );
    if which("qemu-img") {
        ejected_in_a_job(&rig, &mut terminal, &mut events);
    } else {
        left_out("a disk that goes in a block job needs qemu-img (qemu-utils)");
    }
    rig.vireo(&["destroy", "deb"]).ok();
}

/// The slots of a machine whose firmware has given everything its place.
#[test]
fn linux_that_firmware_booted_gets_and_loses_a_disk() {
    let rig = Rig::new();
    let rom = std::path::Path::new("/usr/share/seabios/bios-256k.bin");
    let Some(boot) = grub_disk(&rig, Kernel::V6_1).filter(|_| rom.exists()) else {
        return left_out("needs seabios, grub-pc-bin, xorriso and mtools");
    };
    let boot = boot.display();
    let port = "<controller type='pci' model='pcie-root-port'/>".repeat(4);
    rig.define(&format!(
        "<domain type='qemu'><name>pc</name><memory unit='MiB'>256</memory>\
         <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os><features><acpi/></features>\
         <devices><controller type='pci' model='pcie-root'/>{port}\
         <disk type='file'><source file='{boot}'/><target dev='vda'/></disk><console type='pty'/></devices></domain>"
    ));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "pc", "--console"]));
    terminal.expect(":/root# ", BOOT);
    terminal.send("stty cols 500\r");
    terminal.expect(":/root# ", SOON);
    let disk = rig.write("plug.raw", [b"HELLO".as_slice(), &[0; 1 << 20]].concat());
    rig.vireo(&["attach-disk", "pc", &disk, "vdb", "--serial", "PLUG1"])
        .ok();
    until(&mut terminal, "cat /sys/block/vd*/serial", "PLUG1", true);
    let seen = shell(
        &mut terminal,
        "dd if=/dev/vdb bs=5 count=1 2>/dev/null; echo",
    );
    assert!(seen.contains("HELLO"), "{seen}");
    rig.vireo(&["detach-disk", "pc", "vdb"]).ok();
    until(&mut terminal, "ls /sys/block", "vdb", false);
    assert!(!rig.vireo(&["domblklist", "pc"]).ok().contains("vdb"));
    rig.vireo(&["destroy", "pc"]).ok();
}

/// The guest may let go of a disk at any time: its job goes with it, and not on with the next one.
fn ejected_in_a_job(rig: &Rig, terminal: &mut Terminal, events: &mut Terminal) {
    let disk = &rig.write("base.raw", vec![7; 4 << 20]);
    let top = rig.path("top.qcow2").display().to_string();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", &top])
        .status();
    assert!(made.unwrap().success());
    let attach = |image: &str, format: &str| {
        let words = ["attach-disk", "deb", image, "vdd", "--subdriver", format];
        rig.vireo(&[&words[..], &["--serial", "PLUG3", "--targetbus", "virtio"]].concat())
            .ok();
    };
    attach(&top, "qcow2");
    until(terminal, "cat /sys/block/vd*/serial", "PLUG3", true);
    rig.vireo(&["blockpull", "deb", "vdd", "1", "--bytes"]).ok();
    let error = rig.vireo(&["detach-disk", "deb", "vdd"]).fails();
    assert!(error.contains("active block job"), "{error}");
    shell(
        terminal,
        "for s in /sys/bus/pci/slots/*/power; do echo 0 > $s; done",
    );
    events.expect(
        "event 'block-job-2' for domain 'deb': Block Pull for vdd canceled",
        SOON,
    );
    events.expect("event 'device-removed' for domain 'deb'", SOON);
    until(terminal, "cat /sys/block/vd*/serial", "PLUG3", false);
    attach(&top, "qcow2");
    let said = rig.vireo(&["blockjob", "deb", "vdd"]).ok();
    assert!(said.contains("No current block job"), "{said}");
    let list = rig.vireo(&["dumpxml", "deb"]).ok();
    assert!(list.contains(&top) && list.contains(disk), "{list}");
    // Another disk's job keeps nobody from plugging.
    rig.vireo(&["blockcommit", "deb", "vdd", "--active", "--wait"])
        .ok();
    let list = rig.vireo(&["dumpxml", "deb"]).ok();
    assert!(list.contains("<mirror"), "{list}");
    let rng = rig.write(
        "another.xml",
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
    );
    rig.vireo(&["attach-device", "deb", &rng]).ok();
}

/// A guest that has something in each of its slots is saved and moved, and has the slots that it had.
#[test]
fn a_guest_without_an_empty_slot_comes_back() {
    let (rig, other) = (Rig::new(), Rig::new());
    other.vireo(&["list"]).ok();
    let image = rig.write("disk.img", vec![0; 1 << 20]);
    rig.define(&tiny_guest(&rig, "one", "qemu"));
    rig.vireo(&["start", "one"]).ok();
    let attach = ["attach-disk", "one", &image, "vda", "--targetbus", "virtio"];
    rig.vireo(&attach).ok();
    let again = ["attach-disk", "one", &image, "vdb", "--targetbus", "virtio"];
    let error = rig.vireo(&again).fails();
    assert!(error.contains("No more available PCI slots"), "{error}");
    rig.vireo(&["managedsave", "one"]).ok();
    rig.vireo(&["start", "one"]).ok();
    let disks = |rig: &Rig| rig.vireo(&["domblklist", "one"]).ok();
    assert!(disks(&rig).contains("disk.img"));
    let at = format!("unix://{}", other.path("incoming").display());
    let to = other.uri();
    rig.vireo(&[
        "migrate",
        "--live",
        "--unsafe",
        "one",
        "--migrateuri",
        &at,
        &to,
    ])
    .ok();
    assert!(disks(&other).contains("disk.img"));
    other.vireo(&["destroy", "one"]).ok();
    // Booted anew it has one to spare.
    rig.vireo(&["start", "one"]).ok();
    rig.vireo(&attach).ok();
    rig.vireo(&["destroy", "one"]).ok();
}
