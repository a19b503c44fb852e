//! Devices of a running guest that change: a card's bridge, limits and cable, a disk's group; and what is refused.

use std::fs;
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Terminal, left_out, linux_guest, namespace, tiny_guest};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(90);

fn master(tap: &str) -> String {
    let link = fs::read_link(format!("/sys/class/net/{tap}/master"));
    let name = link
        .ok()
        .and_then(|link| link.file_name().map(|n| n.to_owned()));
    name.unwrap_or_default().into_string().unwrap()
}

/// The host's end of the only card.
fn tap(rig: &Rig) -> String {
    let shown = rig.vireo(&["domiflist", "one"]).ok();
    let row = shown.lines().nth(2).unwrap();
    row.split_whitespace().next().unwrap().to_owned()
}

const CARD: &str = "<interface type='bridge'><source bridge='vrupA'/><mac address='52:54:00:11:22:33'/>\
                    <model type='virtio'/></interface>";

#[test]
fn a_running_card_moves_to_another_bridge() {
    if let Err(needs) = namespace::enter() {
        return left_out(&needs);
    }
    let rig = Rig::new();
    for bridge in ["vrupA", "vrupB"] {
        namespace::ip(&format!("link add {bridge} type bridge"));
        namespace::ip(&format!("link set {bridge} up"));
    }
    let network = rig.write(
        "net.xml",
        "<network><name>lab</name><bridge name='vruplab'/></network>",
    );
    rig.vireo(&["net-create", &network]).ok();
    rig.define(&tiny_guest(&rig, "one", "qemu").replace("<devices>", &format!("<devices>{CARD}")));
    rig.vireo(&["start", "one"]).ok();
    let tap = tap(&rig);
    assert_eq!(master(&tap), "vrupA");
    let index = || fs::read_to_string(format!("/sys/class/net/{tap}/ifindex")).unwrap();
    let before = index();
    let update = |from: &str, to: &str, how: &str| {
        let file = rig.write("card.xml", CARD.replace(from, to));
        rig.vireo(&["update-device", "one", &file, how])
    };
    let ports = || {
        let said = rig.vireo(&["net-port-list", "lab"]).ok();
        said.lines().filter(|line| line.contains('-')).count() - 1
    };
    let live = || rig.vireo(&["dumpxml", "one"]).ok();

    update("vrupA", "vrupB", "--live").ok();
    assert_eq!(master(&tap), "vrupB");
    assert!(live().contains("<source bridge='vrupB'/>"), "{}", live());
    let stored = rig.vireo(&["dumpxml", "one", "--inactive"]).ok();
    assert!(stored.contains("<source bridge='vrupA'/>"), "{stored}");
    // What can't be leaves it where it is.
    for (to, words) in [
        ("nope", "operation failed: bridge nope doesn't exist"),
        ("lo", "Unable to add bridge lo port"),
    ] {
        let error = update("vrupA", to, "--live").fails();
        assert!(error.contains(words), "{to}: {error}");
        assert_eq!(master(&tap), "vrupB");
    }
    // To a network and back: the port comes and goes with it; the next daemon knows.
    let to_network = "<interface type='network'><source network='lab'/>";
    update(
        "<interface type='bridge'><source bridge='vrupA'/>",
        to_network,
        "--live",
    )
    .ok();
    assert_eq!((master(&tap).as_str(), ports()), ("vruplab", 1));
    rig.kill_daemon();
    assert!(live().contains("network='lab'"), "{}", live());
    update("vrupA", "vrupA", "--live").ok();
    assert_eq!((master(&tap).as_str(), ports()), ("vrupA", 0));
    let flags = fs::read_to_string(format!("/sys/class/net/{tap}/flags")).unwrap();
    let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap();
    assert_eq!(flags & libc::IFF_UP as u32, libc::IFF_UP as u32, "it is up");

    // Limits, the cable, isolation: as the document says.
    let rates = "<bandwidth><inbound average='1000'/><outbound average='500' peak='800' burst='10'/></bandwidth>";
    let more = |parts: &str| format!("{parts}<model");
    update(
        "<model",
        &more(&format!(
            "{rates}<link state='down'/><port isolated='yes'/>"
        )),
        "--live",
    )
    .ok();
    let shown = rig.vireo(&["domiftune", "one", &tap]).ok();
    for line in ["inbound.average: 1000", "outbound.peak  : 800"] {
        assert!(shown.contains(line), "no {line}: {shown}");
    }
    let cable = rig.vireo(&["domif-getlink", "one", &tap]).ok();
    assert!(cable.contains(" down"), "{cable}");
    let isolated = || fs::read_to_string(format!("/sys/class/net/{tap}/brport/isolated")).unwrap();
    assert_eq!(isolated().trim(), "1");
    update("vrupA", "vrupA", "--live").ok();
    assert_eq!(isolated().trim(), "0");
    let shown = rig.vireo(&["domiftune", "one", &tap]).ok();
    assert!(shown.contains("inbound.average: 0"), "{shown}");
    let cable = rig.vireo(&["domif-getlink", "one", &tap]).ok();
    assert!(cable.contains(" up"), "{cable}");

    // libvirt's refusals, in its words.
    for (from, to, words) in [
        (
            "virtio",
            "e1000",
            "cannot modify network device model from virtio to e1000",
        ),
        ("<model", "<mtu size='1400'/><model", "cannot modify MTU"),
        (
            "<model",
            "<target dev='tapx'/><model",
            "cannot modify network device tap name",
        ),
        (
            "<model",
            "<driver queues='3'/><model",
            "cannot modify virtio network device driver attributes",
        ),
        (
            "<model",
            "<script path='/bin/true'/><model",
            "cannot modify network device script attribute",
        ),
        (
            "<model",
            "<rom bar='off'/><model",
            "cannot modify network device rom bar setting",
        ),
        (
            "type='bridge'><source bridge='vrupA'/>",
            "type='user'>",
            "unable to change config on 'user' network type",
        ),
        (
            "type='bridge'><source bridge='vrupA'/>",
            "type='direct'><source dev='lo'/>",
            "unable to change config on 'direct' network type",
        ),
        (
            "type='bridge'><source bridge='vrupA'/>",
            "type='network'><source network='none'/>",
            "Network not found: no network with matching name 'none'",
        ),
        (
            "<model",
            "<bandwidth><inbound average='9' floor='1'/></bandwidth><model",
            "floor attribute is not supported for this config",
        ),
        (
            "<model",
            "<filterref filter='no-mac-spoofing'/><model",
            "unable to change config on 'bridge' network type",
        ),
    ] {
        let error = update(from, to, "--live").fails();
        assert!(error.contains(words), "{to}: {error}");
    }
    let error = rig
        .vireo(&["domiftune", "one", &tap, "--inbound", "100,0,0,50"])
        .fails();
    assert!(
        error.contains("Invalid use of 'floor' on interface with MAC address 52:54:00:11:22:33"),
        "{error}"
    );
    assert_eq!((master(&tap).as_str(), index()), ("vrupA", before));
    assert_eq!(rig.state("one"), "running (booted)");
    rig.vireo(&["destroy", "one"]).ok();
    assert_eq!(ports(), 0);
}

#[test]
fn of_a_running_disk_little_can_be_changed() {
    let rig = Rig::new();
    let image = rig.write("vda.img", vec![1; 1 << 20]);
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{image}'/>\
         <target dev='vda' bus='virtio'/></disk>"
    );
    rig.define(&tiny_guest(&rig, "one", "qemu").replace("<devices>", &format!("<devices>{disk}")));
    rig.vireo(&["start", "one"]).ok();
    let update = |from: &str, to: &str| {
        let file = rig.write("disk.xml", disk.replace(from, to));
        rig.vireo(&["update-device", "one", &file, "--live"])
    };
    update("x", "x").ok();
    update("device='disk'", "device='disk' snapshot='no'").ok();
    let live = rig.vireo(&["dumpxml", "one"]).ok();
    assert!(live.contains("snapshot='no'"), "{live}");
    let field =
        |name: &str| format!("Operation not supported: cannot modify field '{name}' of the disk");
    for (from, to, words) in [
        (
            "vda.img",
            "vdb.img",
            "disk source can be changed only in removable drives".to_owned(),
        ),
        (
            "type='raw'/>",
            "type='raw' discard='unmap'/>",
            field("discard"),
        ),
        ("type='raw'/>", "type='raw' cache='none'/>", field("cache")),
        (
            "type='raw'/>",
            "type='raw' error_policy='stop'/>",
            field("error_policy"),
        ),
        ("bus='virtio'/>", "bus='sata'/>", field("bus")),
        ("</disk>", "<readonly/></disk>", field("readonly")),
        ("</disk>", "<shareable/></disk>", field("shared")),
        ("</disk>", "<serial>x</serial></disk>", field("serial")),
        (
            "</disk>",
            "<blockio logical_block_size='4096'/></disk>",
            field("blockio logical_block_size"),
        ),
        (
            "</disk>",
            "<iotune><total_iops_sec>300</total_iops_sec></iotune></disk>",
            field("blkdeviotune total_iops_sec"),
        ),
        (
            "</disk>",
            "<alias name='ua-y'/></disk>",
            "operation forbidden: changing device alias is not allowed".to_owned(),
        ),
        (
            "device='disk'",
            "device='cdrom'",
            "disk type of 'vda' does not support ejectable media".to_owned(),
        ),
    ] {
        let error = update(from, to).fails();
        assert!(error.contains(&words), "{to}: {error}");
    }
    rig.vireo(&["destroy", "one"]).ok();
}

/// Two disks that share their limits read no more together than one alone might; the second joins while it reads.
#[test]
fn a_disk_joins_a_group_and_shares_its_rate() {
    let rig = Rig::new();
    let mut disks = String::new();
    for (name, tune) in [
        (
            "vda",
            "<iotune><total_bytes_sec>1048576</total_bytes_sec><group_name>g</group_name></iotune>",
        ),
        ("vdb", ""),
    ] {
        let path = rig.write(&format!("{name}.img"), vec![7; 32 << 20]);
        disks += &format!(
            "<disk type='file'><driver name='qemu' type='raw'/><source file='{path}'/>\
             <target dev='{name}' bus='virtio'/>{tune}</disk>"
        );
    }
    let xml = linux_guest("one", Kernel::V6_12);
    rig.define(&xml.replace("<devices>", &format!("<devices>{disks}")));
    let mut start = rig.command("vireo");
    let mut terminal = Terminal::start(start.args(["start", "one", "--console"]));
    terminal.expect("one:/root# ", BOOT);
    terminal.send(
        "for d in vda vdb; do (while :; do dd if=/dev/$d of=/dev/null bs=64k iflag=direct \
         2>/dev/null; done) & done\r",
    );
    terminal.expect("one:/root# ", SOON);
    let read = |disk: &str| -> u64 {
        let shown = rig.vireo(&["domblkstat", "one", disk]).ok();
        let line = shown.lines().find_map(|line| line.split_once("rd_bytes "));
        line.unwrap().1.trim().parse().unwrap()
    };
    // Bytes of both that were read in a time, and what 1 MiB a second would be.
    let both = || {
        let (began, a, b) = (Instant::now(), read("vda"), read("vdb"));
        std::thread::sleep(Duration::from_secs(5));
        let (a, b) = (read("vda") - a, read("vdb") - b);
        (a, b, began.elapsed().as_secs_f64() * f64::from(1 << 20))
    };
    let (a, b, rate) = both();
    assert!((a as f64) < 2.0 * rate && a > 0, "{a} of {rate}");
    assert!((b as f64) > 4.0 * rate, "nothing limits it: {b} of {rate}");
    rig.vireo(&["blkdeviotune", "one", "vdb", "--group-name", "g", "--live"])
        .ok();
    let (a, b, rate) = both();
    assert!(((a + b) as f64) < 2.0 * rate, "{a} + {b} of {rate}");
    assert!(a > 0 && b > 0, "{a}, {b}");
    // It leaves, and the first one keeps its limits.
    rig.vireo(&[
        "blkdeviotune",
        "one",
        "vdb",
        "--total-bytes-sec",
        "0",
        "--live",
    ])
    .ok();
    let (a, b, rate) = both();
    assert!((a as f64) < 2.0 * rate, "{a} of {rate}");
    assert!((b as f64) > 4.0 * rate, "nothing limits it: {b} of {rate}");
    rig.vireo(&["destroy", "one"]).ok();
}
