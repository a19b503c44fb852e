//! Devices as libvirt's users know them: XML in, a guest that has them, and the commands about them.

use std::fs;
use std::process::Command;
use std::time::Duration;

use vireo_tests::{Kernel, Rig, Terminal, both, left_out, linux_guest, tiny_guest, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(60);

fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// The definition with more devices.
fn with(xml: &str, devices: &str) -> String {
    xml.replace("</devices>", &format!("{devices}</devices>"))
}

/// One line of a guest's shell, up to the mark that follows it.
fn shell(terminal: &mut Terminal, line: &str) -> String {
    terminal.send(&format!("{line}; echo DO''NE\r"));
    terminal.expect("DO''NE", SOON);
    terminal.expect("DONE\r\n", SOON)
}

#[test]
fn linux_has_the_devices_of_its_definition() {
    for program in ["qemu-img", "virsh", "passt"] {
        if !which(program) {
            return left_out(&format!("needs {program}"));
        }
    }
    let rig = Rig::new();
    let path = |name: &str| rig.path(name).display().to_string();
    let (base, image, raw) = (path("base.qcow2"), path("disk.qcow2"), path("disk.raw"));
    qemu_img(&["create", "-q", "-f", "qcow2", &base, "16M"]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        &image,
    ]);
    qemu_img(&["create", "-q", "-f", "raw", &raw, "8M"]);
    let mac = "52:54:00:12:34:56";
    rig.define(&with(
        &linux_guest("deb", Kernel::V6_1),
        &format!(
            "<disk type='file'><driver name='qemu' type='qcow2'/><source file='{image}'/>\
             <target dev='vda'/></disk>\
             <disk type='file'><source file='{raw}'/><target dev='vdb'/><serial>S1</serial></disk>\
             <interface type='user'><mac address='{mac}'/></interface>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
        ),
    ));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    let seen = shell(
        &mut terminal,
        "cat /sys/block/vdb/serial; echo; ls /dev/virtio-ports",
    );
    assert!(seen.contains("S1\r\n"), "{seen}");
    assert!(seen.contains("org.qemu.guest_agent.0"), "{seen}");
    shell(
        &mut terminal,
        "dd if=/dev/urandom of=/dev/vda bs=4k count=64; sync; dd if=/dev/vdb of=/dev/null bs=4k",
    );
    let network = shell(
        &mut terminal,
        "ip link set eth0 up; udhcpc -i eth0 -q -n -s /etc/udhcpc.script 2>&1; cat /sys/class/net/eth0/address",
    );
    assert!(network.contains(mac), "{network}");
    // passt gives an address only where the host itself has one to copy.
    if !network.contains("lease of") {
        left_out("the guest's address: needs a host with a network");
    }

    let xml = both(&rig, &["dumpxml", "deb"]);
    for part in [
        "<alias name='virtio-disk0'/>",
        "<alias name='net0'/>",
        "<alias name='channel0'/>",
        "<backingStore type='file' index='3'>",
        "/org.qemu.guest_agent.0'/>",
    ] {
        assert!(xml.contains(part), "no {part} in {xml}");
    }
    let list = both(&rig, &["domblklist", "deb", "--details"]);
    assert!(
        list.contains(&format!(" file   disk     vda      {image}\n")),
        "{list}"
    );
    let stats = both(&rig, &["domblkstat", "deb", "vda"]);
    assert!(stats.contains("vda wr_bytes 262144\n"), "{stats}");
    let info = both(&rig, &["domblkinfo", "deb", "vdb"]);
    assert!(info.contains("Capacity:       8388608\n"), "{info}");
    both(&rig, &["domblkinfo", "deb", "--all", "--human"]);
    both(&rig, &["domblkerror", "deb"]);
    both(&rig, &["domiflist", "deb"]);
    both(&rig, &["domifaddr", "deb"]);
    let all = rig.virsh(&["domstats", "deb", "--block", "--backing"]).ok();
    assert!(all.contains("block.count=3"), "{all}");
    assert!(all.contains(&format!("block.1.path={base}")), "{all}");

    rig.vireo(&["domif-setlink", "deb", mac, "down"]).ok();
    assert_eq!(
        both(&rig, &["domif-getlink", "deb", mac]).trim(),
        format!("{mac} down")
    );
    assert!(shell(&mut terminal, "cat /sys/class/net/eth0/carrier").contains("0\r\n"));
    rig.virsh(&["domif-setlink", "deb", mac, "up"]).ok();
    assert!(shell(&mut terminal, "cat /sys/class/net/eth0/carrier").contains("1\r\n"));
    rig.vireo(&[
        "blkdeviotune",
        "deb",
        "vdb",
        "--total-iops-sec",
        "500",
        "--live",
    ])
    .ok();
    let tune = both(&rig, &["blkdeviotune", "deb", "vdb"]);
    assert!(tune.contains("total_iops_sec : 500\n"), "{tune}");
    let tune = both(&rig, &["blkdeviotune", "deb", "vdb", "--config"]);
    assert!(tune.contains("total_iops_sec : 0\n"), "{tune}");
    rig.virsh(&["domiftune", "deb", mac, "--inbound", "1000,2000,300"])
        .ok();
    let tune = both(&rig, &["domiftune", "deb", mac]);
    assert!(tune.contains("inbound.peak   : 2000\n"), "{tune}");
    rig.vireo(&["blockresize", "deb", "vdb", "12M"]).ok();
    assert!(shell(&mut terminal, "cat /sys/block/vdb/size").contains("24576\r\n"));

    rig.virsh(&["setmem", "deb", "200M"]).ok();
    let deadline = std::time::Instant::now() + SOON;
    while !rig
        .virsh(&["dommemstat", "deb"])
        .ok()
        .contains("actual 204800\n")
    {
        assert!(
            std::time::Instant::now() < deadline,
            "the balloon does not grow"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(both(&rig, &["dumpxml", "deb"]).contains("<currentMemory unit='KiB'>204800<"));

    assert_eq!(rig.processes("vireo-vmm").len(), 1);
    drop(terminal);
    rig.vireo(&["destroy", "deb"]).ok();
    let deadline = std::time::Instant::now() + SOON;
    // The daemon stays; the VMM, the console's client and passt go.
    while rig.processes("").len() > 1 {
        assert!(
            std::time::Instant::now() < deadline,
            "something runs on: {:?}",
            rig.processes("")
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let channels = rig.path("var/lib/vireo/channel/target");
    assert_eq!(fs::read_dir(channels).unwrap().count(), 0);
    qemu_img(&["check", "-q", &image]);
    assert!(both(&rig, &["domblkinfo", "deb", "vda"]).contains("Capacity:       16777216\n"));
}

#[test]
fn a_start_that_cannot_be_says_why_and_leaves_nothing() {
    if !which("qemu-img") {
        return left_out("needs qemu-img");
    }
    let rig = Rig::new();
    let path = |name: &str| rig.path(name).display().to_string();
    let (a, b) = (path("a.qcow2"), path("b.qcow2"));
    for image in [&a, &b] {
        qemu_img(&["create", "-q", "-f", "qcow2", image, "1M"]);
    }
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", &a,
    ]);
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", &b,
    ]);
    let raw = rig.write("raw.img", vec![0; 1 << 20]);
    let channel = "<channel type='unix'><target type='virtio' name='x'/></channel>";
    let disk = |format: &str, source: &str, rest: &str| {
        format!(
            "{channel}<disk type='file'><driver name='qemu' type='{format}'/>\
             <source file='{source}'/><target dev='vda'/>{rest}</disk>"
        )
    };
    let uuid = "22222222-2222-2222-2222-222222222221";
    let locked =
        format!("<encryption format='luks'><secret type='passphrase' uuid='{uuid}'/></encryption>");
    for (devices, words) in [
        (
            disk("raw", "/nonexistent/x.img", ""),
            "Cannot access storage file '/nonexistent/x.img'",
        ),
        (disk("qcow2", &a, ""), "is self-referential"),
        (disk("qcow2", &raw, ""), "this is not a qcow2 image"),
        (disk("luks", &raw, &locked), "no secret with matching uuid"),
        (
            format!(
                "{channel}<rng model='virtio'><backend model='random'>/nonexistent</backend></rng>"
            ),
            "cannot open the source of entropy",
        ),
        (
            "<interface type='bridge'><source bridge='nosuchbridge'/></interface>".to_owned(),
            "Cannot get interface index on nosuchbridge",
        ),
        (
            "<interface type='network'><source network='nosuchnet'/></interface>".to_owned(),
            "no network with matching name 'nosuchnet'",
        ),
    ] {
        let xml = tiny_guest(&rig, "guest", "qemu");
        let xml = xml.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
        rig.define(&with(&xml, &devices));
        let error = rig.vireo(&["start", "guest"]).fails();
        assert!(error.contains(words), "{error}");
        assert!(rig.processes("vireo-vmm").is_empty());
        assert!(!rig.path(&format!("run/vireo/domains/{uuid}")).exists());
        let channels = fs::read_dir(rig.path("var/lib/vireo/channel/target"));
        assert!(channels.map_or(0, Iterator::count) == 0);
    }
}

#[test]
fn secrets_are_kept_and_kept_secret() {
    if !which("virsh") {
        return left_out("needs virsh");
    }
    let rig = Rig::new();
    let uuid = "22222222-2222-2222-2222-222222222221";
    let define = |private: &str| {
        rig.write(
            "secret.xml",
            format!(
                "<secret private='{private}'><uuid>{uuid}</uuid><usage type='volume'>\
                 <volume>/x</volume></usage></secret>"
            ),
        )
    };
    let file = define("no");
    assert_eq!(
        rig.vireo(&["secret-define", &file]).ok().trim(),
        format!("Secret {uuid} created")
    );
    let list = both(&rig, &["secret-list"]);
    assert!(list.contains(&format!(" {uuid}   volume /x\n")), "{list}");
    both(&rig, &["secret-dumpxml", uuid]);
    assert!(
        rig.vireo(&["secret-get-value", uuid])
            .fails()
            .contains("does not have a value")
    );
    let value = rig.write("value", "aGVsbG8=");
    rig.vireo(&["secret-set-value", uuid, "--file", &value])
        .ok();
    assert_eq!(both(&rig, &["secret-get-value", uuid]).trim(), "aGVsbG8=");
    assert_eq!(
        both(&rig, &["secret-get-value", uuid, "--plain"]).trim(),
        "hello"
    );
    rig.virsh(&["secret-define", &define("yes")]).ok();
    assert!(
        rig.virsh(&["secret-get-value", uuid])
            .fails()
            .contains("secret is private")
    );
    assert_eq!(
        rig.virsh(&["secret-undefine", uuid]).ok().trim(),
        format!("Secret {uuid} deleted")
    );
    assert!(
        rig.vireo(&["secret-dumpxml", uuid])
            .fails()
            .contains("Secret not found")
    );
}

/// A disk whose boot sector says `word` and stands still.
fn boot_disk(word: &str) -> Vec<u8> {
    // xor ax,ax; mov ds,ax; mov si,0x7c18
    let mut sector = vec![0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x18, 0x7c];
    // 1: lodsb; test al,al; jz 2; mov ah,0x0e; mov bx,7; int 0x10; jmp 1
    sector.extend([
        0xac, 0x84, 0xc0, 0x74, 0x09, 0xb4, 0x0e, 0xbb, 7, 0, 0xcd, 0x10,
    ]);
    sector.extend([0xeb, 0xf2]);
    // 2: hlt; jmp 2
    sector.extend([0xf4, 0xeb, 0xfd]);
    sector.extend(word.as_bytes());
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}

/// No kernel in the definition: SeaBIOS boots what the definition puts first, behind a bridge too, and nothing that
/// it does not name.
#[test]
fn disks_boot_in_the_order_of_the_definition() {
    if ![
        "/usr/share/seabios/bios-256k.bin",
        "/usr/share/qemu/bios-256k.bin",
    ]
    .iter()
    .any(|path| std::path::Path::new(path).exists())
    {
        return left_out("needs seabios");
    }
    let rig = Rig::new();
    let near = rig.write("near.img", boot_disk("near disk"));
    let far = rig.write("far.img", boot_disk("far disk"));
    let blank = rig.write("blank.img", vec![0; 1 << 20]);
    let mut number = 0;
    let mut boots = |os: &str, orders: [&str; 3], says: &str| {
        number += 1;
        let name = format!("guest{number}");
        let boot = |order: &str| match order {
            "" => String::new(),
            order => format!("<boot order='{order}'/>"),
        };
        let [first, second, third] = orders.map(boot);
        rig.define(&format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>\
             <os><type arch='x86_64' machine='q35'>hvm</type>{os}</os><features><acpi/></features><devices>\
             <controller type='pci' model='pcie-root-port' index='1'/>\
             <disk type='file'><source file='{blank}'/><target dev='vda'/>{first}<address type='pci' slot='3'/></disk>\
             <disk type='file'><source file='{near}'/><target dev='vdb'/>{second}<shareable/><address type='pci' slot='4'/></disk>\
             <disk type='file'><source file='{far}'/><target dev='vdc'/>{third}<shareable/><address type='pci' bus='1' slot='0'/></disk>\
             <console type='pty'/></devices></domain>"
        ));
        let mut terminal =
            Terminal::start(rig.command("vireo").args(["start", &name, "--console"]));
        terminal.expect(says, BOOT);
        drop(terminal);
        rig.vireo(&["destroy", &name]).ok();
    };
    boots("", ["", "2", "1"], "far disk");
    boots("", ["", "1", "2"], "near disk");
    // The first disk only, and there is nothing on it.
    boots("<boot dev='hd'/>", ["", "", ""], "No bootable device");
    boots(
        "<bootmenu enable='yes' timeout='300'/>",
        ["", "1", ""],
        "near disk",
    );
    let capabilities = rig.vireo(&["domcapabilities"]).ok();
    assert!(
        capabilities.contains("<value>bios</value>"),
        "{capabilities}"
    );
}

#[test]
fn disks_of_a_group_share_their_limits() {
    let rig = Rig::new();
    let mut disks = String::new();
    for name in ["vda", "vdb", "vdc"] {
        let path = rig.write(&format!("{name}.img"), vec![0; 1 << 20]);
        let group = match name {
            "vdc" => "",
            _ => {
                "<iotune><total_iops_sec>100</total_iops_sec><group_name>both</group_name></iotune>"
            }
        };
        disks += &format!(
            "<disk type='file'><driver name='qemu' type='raw'/><source file='{path}'/><target dev='{name}'/>{group}</disk>"
        );
    }
    rig.define(&with(&tiny_guest(&rig, "guest", "qemu"), &disks));
    rig.vireo(&["start", "guest"]).ok();
    rig.vireo(&[
        "blkdeviotune",
        "guest",
        "vda",
        "--total-iops-sec",
        "300",
        "--live",
    ])
    .ok();
    let of = |disk: &str| rig.vireo(&["blkdeviotune", "guest", disk]).ok();
    assert!(
        of("vdb").contains("total_iops_sec : 300\n"),
        "{}",
        of("vdb")
    );
    assert!(
        of("vdb").contains("group_name     : both\n"),
        "{}",
        of("vdb")
    );
    assert!(of("vdc").contains("total_iops_sec : 0\n"), "{}", of("vdc"));
    let join = |how: &str| {
        let limit = ["--total-iops-sec", "300", "--group-name", "both"];
        rig.vireo(&[&["blkdeviotune", "guest", "vdc", how][..], &limit].concat())
    };
    join("--config").ok();
    // While it runs: it has what they have, and what is set through it they have too; without limits it has left.
    let tune = |disk: &str, args: &[&str]| {
        rig.vireo(&[&["blkdeviotune", "guest", disk, "--live"][..], args].concat())
    };
    tune("vdc", &["--group-name", "both"]).ok();
    assert!(
        of("vdc").contains("total_iops_sec : 300\n"),
        "{}",
        of("vdc")
    );
    tune("vdc", &["--total-iops-sec", "500"]).ok();
    assert!(
        of("vda").contains("total_iops_sec : 500\n"),
        "{}",
        of("vda")
    );
    tune("vdb", &["--total-iops-sec", "0"]).ok();
    assert!(
        of("vda").contains("total_iops_sec : 500\n"),
        "{}",
        of("vda")
    );
    assert!(!of("vdb").contains("both"), "{}", of("vdb"));
    let error = tune("vdb", &["--group-name", "other"]).fails();
    assert!(
        error.contains(
            "creating a new group/updating existing with all tune parameters zero is not supported"
        ),
        "{error}"
    );
    tune(
        "vdb",
        &["--group-name", "other", "--total-bytes-sec", "100000"],
    )
    .ok();
    tune("vdb", &["--group-name", "both"]).ok();
    assert!(of("vdb").contains("total_bytes_sec: 0\n"), "{}", of("vdb"));
    assert!(
        of("vdb").contains("total_iops_sec : 500\n"),
        "{}",
        of("vdb")
    );
    let odd = rig.vireo(&["dumpxml", "guest", "--inactive"]).ok();
    let odd = odd.replacen("<total_iops_sec>300<", "<total_iops_sec>301<", 1);
    let odd = rig.write("odd.xml", odd);
    let error = rig.vireo(&["define", &odd]).fails();
    assert!(
        error.contains("unsupported configuration: different iotunes for disks vda and vdb"),
        "{error}"
    );
    let stored = rig.vireo(&["dumpxml", "guest", "--inactive"]).ok();
    assert_eq!(stored.matches("<group_name>both</group_name>").count(), 3);
    assert_eq!(
        stored.matches("<total_iops_sec>300<").count(),
        3,
        "{stored}"
    );
    rig.vireo(&["destroy", "guest"]).ok();
}

/// As virt-manager leaves a definition behind: with a drive that is there, and one that nobody makes any more.
#[test]
fn a_guest_with_empty_drives_starts() {
    let rig = Rig::new();
    rig.define(&with(
        &tiny_guest(&rig, "one", "qemu"),
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>\
         <target dev='sda' bus='sata'/><readonly/>\
         <address type='drive' controller='0' bus='0' target='0' unit='3'/></disk>\
         <disk type='file' device='floppy'><driver name='qemu' type='raw'/><target dev='fda' bus='fdc'/></disk>\
         <controller type='sata' index='0'/>",
    ));
    rig.vireo(&["start", "one"]).ok();
    let left = "left out of the machine: disk 'fda' (an empty floppy drive)";
    let shown = rig.vireo(&["dominfo", "one"]).ok();
    assert!(shown.contains(left), "{shown}");
    assert!(!shown.contains("sda") && !shown.contains("sata"), "{shown}");
    let live = rig.vireo(&["dumpxml", "one"]).ok();
    assert!(live.contains("<alias name='sata0-0-3'/>"), "{live}");
    let list = rig.vireo(&["domblklist", "one"]).ok();
    assert!(list.contains(" sda      -\n"), "{list}");
    let stats = rig.vireo(&["domstats", "one", "--block"]).ok();
    assert!(stats.contains("block.0.name=sda\n"), "{stats}");
    let iso = rig.write("x.iso", vec![0; 1 << 20]);
    // The machine has no floppy drive: that is said, and the definition may have a disk in it.
    let floppy = |how: &str| rig.vireo(&["change-media", "one", "fda", &iso, how]);
    let error = floppy("--live").fails();
    assert!(error.contains("left out of the machine"), "{error}");
    let error = rig.vireo(&["blockpull", "one", "sda"]).fails();
    assert!(error.contains("disk sda has no source file"), "{error}");
    // It is kept with the guest, and comes back with it.
    rig.vireo(&["managedsave", "one"]).ok();
    rig.vireo(&["start", "one"]).ok();
    let shown = rig.vireo(&["dominfo", "one"]).ok();
    assert!(shown.contains(left), "{shown}");
    rig.vireo(&["change-media", "one", "sda", &iso, "--live"])
        .ok();
    rig.vireo(&["destroy", "one"]).ok();
    floppy("--config").ok();
    let error = rig.vireo(&["start", "one"]).fails();
    assert!(
        error.contains("disk 'fda' (bus 'fdc': use virtio, scsi or sata)"),
        "{error}"
    );
}
