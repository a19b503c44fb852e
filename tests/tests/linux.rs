//! Unmodified Debian kernels on the software CPU, driven as a person would.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use vireo_tests::{Guest, Kernel, Rig, Terminal, grub_disk, left_out, linux_guest, machine, which};
use vmm_api::config::{FirmwareConfig, Resource};

/// A boot under load of the whole test run can take a while, of the 32-bit kernel a long one.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(60);

/// Boots to the shell through `vireo start --console` and asks the guest who it is.
fn boots_to_a_shell(kernel: Kernel) {
    let rig = Rig::new();
    rig.define(&linux_guest("deb", kernel));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("Domain 'deb' started", SOON);
    terminal.expect("Connected to domain 'deb'", SOON);
    terminal.expect("Escape character is ^] (Ctrl + ])", SOON);
    terminal.expect("Run /init as init process", BOOT);
    terminal.expect("deb:/root# ", BOOT);
    terminal.send("uname -srm\r");
    let answer = terminal.expect(&format!(" {}\r\n", kernel.machine()), SOON);
    assert!(
        answer.contains(&format!("Linux {}", kernel.release())),
        "{answer}"
    );
    // The guest has the memory and the vCPU of its definition.
    terminal.send("grep -c ^processor /proc/cpuinfo; grep MemTotal /proc/meminfo\r");
    terminal.expect("1\r\n", SOON);
    let memory = terminal.expect(" kB", SOON);
    let kib: u64 = memory
        .split_whitespace()
        .rev()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    assert!((190_000..262_144).contains(&kib), "{memory}");
    // Its driver and the balloon came to terms.
    terminal.send("ls /sys/bus/virtio/drivers/virtio_balloon\r");
    terminal.expect("virtio0", SOON);
    // Time passes at its right speed by the guest's own clock.
    terminal.send("a=$(cut -d. -f1 /proc/uptime); sleep 3; b=$(cut -d. -f1 /proc/uptime); echo slept=$((b-a))\r");
    terminal.expect("\r\nslept=", SOON);
    let slept = terminal.expect("\r\n", SOON);
    assert!(["3", "4"].contains(&slept.trim()), "{slept}");
    // And goes on while the machine is paused, without a jump back and without a complaint.
    terminal.send("a=$(cut -d. -f1 /proc/uptime); echo rea''dy; read line; b=$(cut -d. -f1 /proc/uptime); echo paused=$((b-a))\r");
    terminal.expect("ready\r\n", SOON);
    rig.vireo(&["suspend", "deb"]).ok();
    assert_eq!(rig.state("deb"), "paused (user)");
    std::thread::sleep(Duration::from_secs(3));
    rig.vireo(&["resume", "deb"]).ok();
    terminal.send("\r");
    terminal.expect("paused=", SOON);
    let paused: u64 = terminal.expect("\r\n", SOON).trim().parse().unwrap();
    assert!(
        (3..60).contains(&paused),
        "{paused} s passed in a pause of three"
    );
    terminal.send("echo ba''d=$(dmesg | grep -cE 'stall|lockup|unstable')\r");
    terminal.expect("bad=", SOON);
    assert_eq!(terminal.expect("\r\n", SOON).trim(), "0");
    terminal.send("echo da''te=$(date +%s)\r");
    terminal.expect("date=", SOON);
    let date: u64 = terminal.expect("\r\n", SOON).trim().parse().unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(
        now.abs_diff(date) < 60,
        "{date} in the guest, {now} outside"
    );
    terminal.send("\x1d");
    assert_eq!(terminal.wait(SOON), 0);
    assert_eq!(rig.state("deb"), "running (unpaused)");
    // The power button, and a guest that obeys it.
    rig.vireo(&["shutdown", "deb"]).ok();
    rig.wait_state("deb", "shut off (shutdown)", SOON);
    assert!(rig.processes("vireo-vmm").is_empty());
}

#[test]
fn linux_6_1_boots_to_a_shell_and_shuts_down() {
    boots_to_a_shell(Kernel::V6_1);
}

#[test]
fn linux_6_12_boots_to_a_shell_and_shuts_down() {
    boots_to_a_shell(Kernel::V6_12);
}

#[test]
fn linux_32_bit_boots_to_a_shell_and_shuts_down() {
    if !Kernel::I386.is_there() {
        return left_out("needs linux-image-686-pae:i386 (make test downloads it)");
    }
    boots_to_a_shell(Kernel::I386);
}

#[test]
fn linux_generic_kernels_boot_to_a_shell_and_shut_down() {
    for kernel in [Kernel::Generic6_1, Kernel::Generic6_12] {
        if kernel.is_there() {
            boots_to_a_shell(kernel);
        } else {
            left_out("needs Debian's generic kernels (make soak downloads them)");
        }
    }
}

/// A whole Debian: systemd, udev, D-Bus, a login.
#[test]
fn linux_with_systemd_boots_to_a_login() {
    let Some(image) = Kernel::debian() else {
        return left_out("needs a Debian root (make soak makes it)");
    };
    let rig = Rig::new();
    let kernel = Kernel::V6_1.folder();
    let xml = linux_guest("deb", Kernel::V6_1)
        .replace(
            &format!("{}/initrd.img", kernel.display()),
            &image.display().to_string(),
        )
        .replace("'MiB'>256<", "'MiB'>1024<")
        .replace("<vcpu>1<", "<vcpu>2<");
    rig.define(&xml);
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("debian login: ", BOOT);
    terminal.send("root\r");
    terminal.expect("Password: ", SOON);
    terminal.send("vireo\r");
    terminal.expect("root@debian:~# ", SOON);
    terminal.send("systemctl is-system-running --wait; systemctl --failed --no-legend\r");
    // Between escape sequences of the shell.
    terminal.expect("running\r\n", BOOT);
    terminal.expect("root@debian:~# ", SOON);
    terminal.send("poweroff\r");
    rig.wait_state("deb", "shut off (shutdown)", BOOT);
}

/// What a PC does: SeaBIOS, a boot loader on the disk, and a kernel that learns of the machine
/// from the tables that firmware placed.
#[test]
fn linux_boots_from_a_disk_through_seabios_and_grub() {
    let rom = std::path::Path::new("/usr/share/seabios/bios-256k.bin");
    let rig = Rig::new();
    let Some(image) = grub_disk(&rig, Kernel::V6_1).filter(|_| rom.exists()) else {
        return left_out("needs seabios, grub-pc-bin, xorriso and mtools");
    };
    let disk = serde_json::json!({
        "id": "disk0",
        "address": { "bus": 0, "device": 3, "function": 0 },
        "kind": { "disk": { "image": { "format": "raw", "file": { "path": image }, "name": "disk" } } },
    });
    let mut config = machine(Kernel::V6_1, vec![serde_json::from_value(disk).unwrap()]);
    config.boot.kernel = None;
    config.boot.initrd = None;
    config.boot.cmdline = String::new();
    config.boot.firmware = Some(FirmwareConfig {
        rom: Resource::Path(rom.into()),
        serial_console: true,
        boot_menu_ms: None,
        boot_order: Vec::new(),
        retry_ms: None,
    });
    config.vcpus = 2;
    let mut guest = Guest::boot(&rig, &config, &[]);
    assert!(guest.terminal().seen().contains("SeaBIOS (version"));
    let seen = guest.run("grep -c ^processor /proc/cpuinfo; ls /sys/firmware/acpi/tables | grep -E 'APIC|FACP|MCFG' | wc -l; cat /sys/block/vda/ro");
    assert_eq!(seen.ok(), "2\n3\n0\n");
    guest.power_off();
}

/// The same through the stock virsh; then the guest resets itself, panics, and powers off.
#[test]
fn linux_through_stock_virsh_console_reboot_panic_poweroff() {
    if !which("virsh") {
        return left_out("needs virsh (libvirt-clients)");
    }
    let rig = Rig::new();
    let xml = linux_guest("deb", Kernel::V6_1).replace(
        "  <devices>\n",
        "  <on_crash>restart</on_crash>\n  <devices>\n    <panic model='isa'/>\n",
    );
    rig.define(&xml);
    rig.virsh(&["start", "deb"]).ok();
    let mut terminal = Terminal::start(rig.virsh_command().args(["console", "deb"]));
    terminal.expect("Connected to domain 'deb'", SOON);
    terminal.expect("deb:/root# ", BOOT);
    let id = rig.vireo(&["domid", "deb"]).ok();

    // A guest's own reboot boots it again, in the same domain.
    terminal.send("reboot -f\r");
    terminal.expect("Run /init as init process", BOOT);
    terminal.expect("deb:/root# ", BOOT);
    assert_eq!(rig.vireo(&["domid", "deb"]).ok(), id);

    // Its panic is seen through pvpanic, and on_crash=restart boots it again.
    terminal.send("echo c > /proc/sysrq-trigger\r");
    terminal.expect("Kernel panic - not syncing", SOON);
    terminal.expect("Run /init as init process", BOOT);
    terminal.expect("deb:/root# ", BOOT);

    terminal.send("poweroff -f\r");
    terminal.wait(SOON);
    rig.wait_state("deb", "shut off (shutdown)", SOON);
}

/// `make quickstart`'s script in a root of its own, without a terminal: the README's first command.
#[test]
fn linux_quickstart_reaches_the_shell_twice() {
    let script = |name| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
        folder.join(name)
    };
    let rig = Rig::new();
    let wanted = rig.path("wanted");
    let shim = format!("#!/bin/sh\necho \"$*\" >>'{}'\n", wanted.display());
    let shim = std::path::PathBuf::from(rig.write("shims/cargo", shim));
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&shim, executable).unwrap();
    let shims = shim.parent().unwrap();
    for turn in ["first", "second"] {
        let mut quickstart = std::process::Command::new(script("quickstart"));
        for (key, value) in rig.command("vireo").get_envs() {
            if let Some(value) = value {
                quickstart.env(key, value);
            }
        }
        // What it would build is there already: here it would be put in the place of the programs that other tests are
        // running. Another cargo writes down what was wanted.
        let path = std::env::var("PATH").unwrap_or_default();
        quickstart.env("PATH", format!("{}:{path}", shims.display()));
        let output = quickstart
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{turn}: {text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(text.contains("Linux linux 6.1."), "{turn}: {text}");
        assert!(text.contains("It runs. Next:"), "{turn}: {text}");
    }
    assert_eq!(rig.processes("vireo-vmm").len(), 1);
    // As scripts/test, which has built them, does.
    let built = "build --release --bins\n";
    assert_eq!(std::fs::read_to_string(wanted).unwrap(), built.repeat(2));
    let tests = std::fs::read_to_string(script("test")).unwrap();
    assert!(tests.contains(&format!("\ncargo {built}")));
}
