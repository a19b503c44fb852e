//! Virtual networks as virsh's users know them, in network namespaces of the tests' own.

mod cards;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use vireo_tests::namespace::{self, Peer, ip};
use vireo_tests::{Kernel, Rig, Terminal, both, both_refuse, left_out, linux_guest, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(60);

/// A namespace, and the programs that networks need; false after saying what is missing.
fn prepared() -> bool {
    for program in ["dnsmasq", "nft", "virsh", "nsenter", "unshare"] {
        let sbin = format!("/usr/sbin/{program}");
        if !which(program) && !std::path::Path::new(&sbin).exists() {
            left_out(&format!("needs {program}"));
            return false;
        }
    }
    match namespace::enter() {
        Ok(()) => true,
        Err(needs) => {
            left_out(&needs);
            false
        }
    }
}

#[track_caller]
fn define(rig: &Rig, inside: &str) {
    let file = rig.write("net.xml", format!("<network>{inside}</network>"));
    rig.vireo(&["net-define", &file]).ok();
}

fn nft(words: &str) -> String {
    let output = Command::new("/usr/sbin/nft")
        .args(words.split(' '))
        .output()
        .unwrap();
    vireo_tests::Run::from(output).ok()
}

#[track_caller]
fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Nothing of a network is left on the host.
#[track_caller]
fn assert_clean(rig: &Rig, bridge: &str) {
    assert!(
        !ip("-o link").contains(&format!(": {bridge}:")),
        "{}",
        ip("-o link")
    );
    assert!(
        !nft("list tables").contains("vireo_net_"),
        "{}",
        nft("list tables")
    );
    assert_eq!(rig.processes("dnsmasq"), [0i32; 0]);
    let left: Vec<_> = fs::read_dir(rig.path("run/vireo/networks"))
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

fn kill(mut daemon: Child) {
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn a_network_lives_through_all_its_commands() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    // The network that every installation begins with is there, and not up.
    assert!(
        rig.vireo(&["net-list", "--all"])
            .ok()
            .contains(" default   inactive   no          yes\n")
    );
    both(&rig, &["net-dumpxml", "default"]);
    define(
        &rig,
        "<name>lab</name><forward mode='nat'/><domain name='lab'/><ip address='192.168.150.1' netmask='255.255.255.0'>\
         <dhcp><range start='192.168.150.2' end='192.168.150.99'/></dhcp></ip>",
    );
    assert!(both(&rig, &["net-dumpxml", "lab"]).contains("<forward mode='nat'/>\n"));
    assert_eq!(
        rig.vireo(&["net-start", "lab"]).ok().trim(),
        "Network lab started"
    );
    let error = rig.virsh(&["net-start", "lab"]).fails();
    assert!(
        error.contains("Requested operation is not valid: network is already active"),
        "{error}"
    );
    let live = both(&rig, &["net-dumpxml", "lab"]);
    assert!(live.contains("<port start='1024' end='65535'/>"), "{live}");
    assert!(!both(&rig, &["net-dumpxml", "lab", "--inactive"]).contains("<port"));
    let info = both(&rig, &["net-info", "lab"]);
    assert!(
        info.contains(
            "Active:         yes\nPersistent:     yes\nAutostart:      no\nBridge:         virbr1\n"
        ),
        "{info}"
    );
    for list in [
        &["net-list"][..],
        &["net-list", "--all"],
        &["net-list", "--inactive"],
        &["net-list", "--all", "--uuid"],
        &["net-list", "--name", "--persistent"],
        &["net-list", "--transient"],
        &["net-dhcp-leases", "lab"],
        &["net-port-list", "lab"],
        &["net-uuid", "lab"],
    ] {
        both(&rig, list);
    }
    assert!(ip("addr show virbr1").contains("inet 192.168.150.1/24 brd 192.168.150.255"));
    assert!(nft("list ruleset").contains("ip daddr != 192.168.150.0/24"));
    assert_eq!(rig.processes("dnsmasq").len(), 1);
    if which("xmllint") && std::path::Path::new("/usr/share/libvirt/schemas/network.rng").exists() {
        for flag in ["--inactive", "--xpath=/network"] {
            let file = rig.write("out.xml", rig.vireo(&["net-dumpxml", "lab", flag]).ok());
            let checked = Command::new("xmllint")
                .args([
                    "--noout",
                    "--relaxng",
                    "/usr/share/libvirt/schemas/network.rng",
                    &file,
                ])
                .output()
                .unwrap();
            vireo_tests::Run::from(checked).ok();
        }
    } else {
        left_out("the schema: needs xmllint and libvirt0");
    }

    // Parts are changed while it is up.
    let host = "<host mac='52:54:00:00:00:01' name='one' ip='192.168.150.7'/>";
    rig.virsh(&[
        "net-update",
        "lab",
        "add",
        "ip-dhcp-host",
        host,
        "--live",
        "--config",
    ])
    .ok();
    let again = rig
        .vireo(&["net-update", "lab", "add", "ip-dhcp-host", host, "--live"])
        .fails();
    assert!(
        again.contains("there is an existing dhcp host entry"),
        "{again}"
    );
    rig.vireo(&[
        "net-update",
        "lab",
        "add",
        "dns-txt",
        "<txt name='t' value='v'/>",
        "--live",
    ])
    .ok();
    let live = both(&rig, &["net-dumpxml", "lab"]);
    assert!(
        live.contains("name='one'") && live.contains("<txt name='t'"),
        "{live}"
    );
    let stored = both(&rig, &["net-dumpxml", "lab", "--inactive"]);
    assert!(
        stored.contains("name='one'") && !stored.contains("<txt"),
        "{stored}"
    );
    rig.virsh(&["net-autostart", "lab"]).ok();
    assert!(rig.path("etc/vireo/networks/autostart/lab.xml").exists());
    rig.vireo(&["net-autostart", "lab", "--disable"]).ok();
    rig.vireo(&["net-desc", "lab", "--config", "--title", "The lab"])
        .ok();
    let title = rig.vireo(&["net-desc", "lab", "--config", "--title"]).ok();
    assert_eq!(title.trim(), "The lab");

    // Undefined while it is up, it is transient, and gone when it stops.
    rig.vireo(&["net-undefine", "lab"]).ok();
    assert!(both(&rig, &["net-info", "lab"]).contains("Persistent:     no"));
    assert!(
        rig.virsh(&["net-autostart", "lab"])
            .fails()
            .contains("cannot set autostart for transient network")
    );
    rig.virsh(&["net-destroy", "lab"]).ok();
    assert!(
        rig.vireo(&["net-info", "lab"])
            .fails()
            .contains("no network with matching name 'lab'")
    );
    assert_clean(&rig, "virbr1");
    assert_eq!(
        fs::read_dir(rig.path("var/lib/vireo/dnsmasq"))
            .unwrap()
            .count(),
        0
    );
    let file = rig.write("t.xml", "<network><name>t</name></network>");
    rig.virsh(&["net-create", &file]).ok();
    assert!(both(&rig, &["net-list", "--transient", "--name"]).contains("t\n"));
    rig.vireo(&["net-destroy", "t"]).ok();
    let left = rig.vireo(&["net-list", "--all", "--name"]).ok();
    assert!(!left.lines().any(|name| name == "t"), "{left}");
}

#[test]
fn a_network_survives_its_daemon_and_other_peoples_flushes() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    let daemon = rig.daemon();
    nft("add table inet others");
    rig.vireo(&["net-start", "default"]).ok();
    let dnsmasq = rig.processes("dnsmasq");
    assert_eq!(dnsmasq.len(), 1);
    // Somebody else's table is theirs, and ours is ours.
    nft("flush table inet others");
    nft("delete table inet others");
    assert!(nft("list ruleset").contains("masquerade"));
    nft("flush ruleset");
    wait_for("the rules do not come back", || {
        nft("list ruleset").contains("masquerade")
    });

    kill(daemon);
    let daemon = rig.daemon();
    assert!(rig.vireo(&["net-list"]).ok().contains(" default   active "));
    assert_eq!(rig.processes("dnsmasq"), dnsmasq);
    // Without dnsmasq: a change that it is to be told of finds that out.
    let end = |dnsmasq: &[i32]| {
        Command::new("kill")
            .args(["-9", &dnsmasq[0].to_string()])
            .status()
            .unwrap();
        wait_for("dnsmasq lives", || {
            fs::read_to_string(format!("/proc/{}/stat", dnsmasq[0]))
                .map_or(true, |stat| stat.contains(") Z "))
        });
    };
    end(&dnsmasq);
    let host = "<host mac='52:54:00:00:00:21' ip='192.168.122.21'/>";
    rig.vireo(&[
        "net-update",
        "default",
        "add",
        "ip-dhcp-host",
        host,
        "--live",
    ])
    .ok();
    assert!(rig.vireo(&["net-dumpxml", "default"]).ok().contains(":21'"));
    let before = dnsmasq;
    let dnsmasq = rig.processes("dnsmasq");
    assert_eq!(dnsmasq.len(), 1);
    assert_ne!(before, dnsmasq);

    // Without a daemon, and without dnsmasq and rules.
    kill(daemon);
    end(&dnsmasq);
    nft("flush ruleset");
    let daemon = rig.daemon();
    let again = rig.processes("dnsmasq");
    assert_eq!(again.len(), 1);
    assert_ne!(again, dnsmasq);
    assert!(nft("list ruleset").contains("masquerade"));
    rig.vireo(&["net-destroy", "default"]).ok();
    assert_clean(&rig, "virbr0");
    kill(daemon);

    // Killed in the middle of a start: the next daemon takes back what was there.
    for point in [
        "network.recorded",
        "network.bridge-made",
        "network.rules-made",
        "network.dnsmasq-started",
    ] {
        let mut command = rig.command("vireod");
        let mut daemon = command.env("VIREO_KILL_AT", point).spawn().unwrap();
        wait_for("the daemon does not listen", || {
            std::os::unix::net::UnixStream::connect(rig.socket()).is_ok()
        });
        assert_eq!(rig.vireo(&["net-start", "default"]).status, 1, "{point}");
        daemon.wait().unwrap();
        let daemon = rig.daemon();
        assert!(
            rig.vireo(&["net-list", "--all"])
                .ok()
                .contains(" default   inactive "),
            "{point}"
        );
        assert_clean(&rig, "virbr0");
        kill(daemon);
    }
    let daemon = rig.daemon();
    rig.vireo(&["net-start", "default"]).ok();
    rig.vireo(&["net-destroy", "default"]).ok();
    assert_clean(&rig, "virbr0");
    kill(daemon);
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_nothing() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    rig.vireo(&["net-start", "default"]).ok();
    let net = |name: &str, rest: &str, address: &str| {
        format!("<name>{name}</name>{rest}<ip address='{address}' netmask='255.255.255.0'/>")
    };
    ip("link add eth7 type veth peer name eth7p");
    ip("addr add 10.77.0.9/16 dev eth7");
    ip("link set eth7 up");
    ip("link add taken type bridge");
    let options = "<dnsmasq:options xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>\
                   <dnsmasq:option value='no-such-option=1'/></dnsmasq:options>";
    for (definition, words) in [
        (
            net("a", "", "192.168.122.129"),
            "internal error: Network is already in use by interface virbr0",
        ),
        (
            net("a", "", "10.77.5.1"),
            "internal error: Network is already in use by interface eth7",
        ),
        (
            net("a", "<bridge name='taken'/>", "10.5.0.1"),
            "Unable to create bridge taken: File exists",
        ),
        (net("a", options, "10.5.0.1"), "bad option"),
        // What dnsmasq finds only when it is a daemon.
        (
            "<name>a</name><ip address='10.5.0.1' netmask='255.255.255.0'>\
             <tftp root='/nope'/></ip>"
                .to_owned(),
            "TFTP directory /nope inaccessible: No such file or directory",
        ),
        (
            "<name>a</name><ip address='10.5.0.1' prefix='22' localPtr='yes'/>".to_owned(),
            "unsupported configuration: PTR domain for IPv4 network with prefix 22 cannot be \
             automatically created",
        ),
        (
            net("a", "<bridge name='a234567890123456'/>", "10.5.0.1"),
            "Unable to create bridge a234567890123456",
        ),
        (
            net(
                "a",
                "<bridge name='vb' macTableManager='libvirt'/>",
                "10.5.0.1",
            ),
            "macTableManager='libvirt'",
        ),
    ] {
        define(&rig, &definition);
        let error = rig.vireo(&["net-start", "a"]).fails();
        assert!(error.contains(words), "{error}");
        rig.vireo(&["net-undefine", "a"]).ok();
        assert!(!ip("-o link").contains("virbr1"), "{error}");
        assert_eq!(
            nft("list tables").matches("vireo_net_").count(),
            1,
            "{error}"
        );
        assert_eq!(rig.processes("dnsmasq").len(), 1, "{error}");
    }
    for (definition, words) in [
        (net("b", "<bridge name='virbr0'/>", "10.5.0.1"), "bridge name 'virbr0' already in use."),
        (
            "<name>b</name><ip address='10.5.0.1' prefix='24'><dhcp><range start='10.6.0.1' end='10.6.0.9'/></dhcp></ip>".to_owned(),
            "is not entirely within network 10.5.0.1/24",
        ),
        (
            "<name>b</name><ip address='10.5.0.1' prefix='24'><dhcp><host mac='52:54:00:00:00:01' ip='10.5.0.3'/>\
             <host mac='52:54:00:00:00:01' ip='10.5.0.4'/></dhcp></ip>".to_owned(),
            "two static hosts with MAC address",
        ),
        (
            "<name>b</name><forward mode='hostdev'><address type='pci' domain='0x00ff' bus='0xff' slot='0x1f' function='0x7'/></forward>".to_owned(),
            "is not an SR-IOV Virtual Function",
        ),
    ] {
        let file = rig.write("net.xml", format!("<network>{definition}</network>"));
        let error = rig.vireo(&["net-define", &file]).fails();
        assert!(error.contains(words), "{error}");
        assert_eq!(rig.virsh(&["net-define", &file]).fails(), error.replace("'vireo'", "'virsh'"));
    }
    rig.vireo(&["net-destroy", "default"]).ok();
    assert_clean(&rig, "virbr0");

    // Programs that are not there, or that hang: that holds up nobody else.
    let hangs = rig.write("hangs", "#!/bin/sh\nexec sleep 3600\n");
    Command::new("chmod")
        .args(["755", &hangs])
        .status()
        .unwrap();
    define(&rig, "<name>quiet</name>");
    let daemon_sees = |program: &str, with: &str| {
        // A daemon of this thread's mounts.
        for pid in rig.processes("vireod") {
            Command::new("kill")
                .args(["-9", &pid.to_string()])
                .status()
                .unwrap();
        }
        wait_for("the daemon lives", || rig.processes("vireod").is_empty());
        namespace::replace_program(program, with);
    };
    daemon_sees("/usr/sbin/dnsmasq", &hangs);
    rig.vireo(&["net-list"]).ok();
    let mut slow = rig
        .command("vireo")
        .args(["net-start", "default"])
        .spawn()
        .unwrap();
    wait_for("the bridge does not come", || {
        ip("-o link").contains("virbr0")
    });
    rig.vireo(&["net-start", "quiet"]).ok();
    assert!(
        rig.vireo(&["net-list", "--all"])
            .ok()
            .contains(" quiet     active ")
    );
    rig.vireo(&["net-destroy", "quiet"]).ok();
    assert_eq!(slow.wait().unwrap().code(), Some(1));
    assert_clean(&rig, "virbr0");
    daemon_sees("/usr/sbin/nft", "/dev/null");
    let error = rig.vireo(&["net-start", "default"]).fails();
    assert!(error.contains("Cannot find 'nft' in path"), "{error}");
    assert!(!ip("-o link").contains("virbr0"));
}

/// One line of a guest's shell, up to the mark that follows it.
fn shell(terminal: &mut Terminal, line: &str) -> String {
    terminal.send(&format!("{line}; echo DO''NE\r"));
    terminal.expect("DO''NE", SOON);
    terminal.expect("DONE\r\n", SOON)
}

#[test]
fn guests_get_leases_names_and_the_world_unless_isolated() {
    if !prepared() {
        return;
    }
    if !Kernel::V6_1.is_there() {
        return left_out("needs a guest's kernel (make test)");
    }
    let rig = Rig::new();
    let peer = Peer::new(&rig, "wan", "10.99.0.1/24", "10.99.0.2/24");
    let network = |forward: &str| {
        format!(
            "<name>lab</name><uuid>7e5c3a8e-4f0b-4b6b-9d3b-0a1f7f0a0151</uuid>{forward}<bridge name='vlab' stp='off'/><domain name='lab'/>\
             <ip address='192.168.151.1' netmask='255.255.255.0'><dhcp>\
             <range start='192.168.151.2' end='192.168.151.99'/>\
             <host mac='52:54:00:15:00:02' name='two' ip='192.168.151.77'/></dhcp></ip>"
        )
    };
    define(&rig, &network("<forward mode='nat'/>"));
    rig.vireo(&["net-start", "lab"]).ok();
    let mut guests = Vec::new();
    for (name, mac) in [("one", "52:54:00:15:00:01"), ("two", "52:54:00:15:00:02")] {
        rig.define(&linux_guest(name, Kernel::V6_1).replace(
            "</devices>",
            &format!("<interface type='network'><mac address='{mac}'/><source network='lab'/></interface></devices>"),
        ));
        guests.push(Terminal::start(rig.command("vireo").args([
            "start",
            name,
            "--console",
        ])));
    }
    for (guest, name) in guests.iter_mut().zip(["one", "two"]) {
        guest.expect(&format!("{name}:/root# "), BOOT);
        let lease = shell(
            guest,
            &format!(
                "ip link set eth0 up; udhcpc -i eth0 -q -n -t 10 -x hostname:{name} -s /etc/udhcpc.script 2>&1"
            ),
        );
        assert!(lease.contains("lease of 192.168.151."), "{lease}");
    }
    let xml = both(&rig, &["dumpxml", "one"]);
    assert!(xml.contains("<source network='lab' portid='"), "{xml}");
    assert!(xml.contains("bridge='vlab'/>"), "{xml}");
    let leases = both(&rig, &["net-dhcp-leases", "lab"]);
    assert!(leases.contains("192.168.151.77/24"), "{leases}");
    assert!(
        leases.contains("52:54:00:15:00:01") && leases.contains("   one "),
        "{leases}"
    );
    let addresses = both(&rig, &["domifaddr", "two", "--source", "lease"]);
    assert!(addresses.contains("192.168.151.77/24"), "{addresses}");
    assert!(both(&rig, &["net-dumpxml", "lab"]).starts_with("<network connections='2'>"));
    assert_eq!(
        both(&rig, &["net-port-list", "lab", "--uuid"])
            .lines()
            .filter(|l| !l.is_empty())
            .count(),
        2
    );

    let reach = |guest: &mut Terminal, who: &str| {
        shell(guest, &format!("ping -c 2 -W 5 {who} 2>&1")).contains(" 0% packet loss")
    };
    assert!(
        reach(&mut guests[0], "two.lab"),
        "one does not reach two by its name"
    );
    assert!(
        reach(&mut guests[1], "one"),
        "two does not reach one by its name"
    );
    assert!(reach(&mut guests[0], "10.99.0.2"), "no way out");
    // The peer knows no way to the guests: what it heard came from the host's address.
    assert!(!peer.run("ip route").ok().contains("192.168.151"));
    assert!(nft("list ruleset").contains("masquerade"));

    // Made an isolated network under the running guests, which stay connected to it.
    define(&rig, &network(""));
    rig.vireo(&["net-destroy", "lab"]).ok();
    assert!(!reach(&mut guests[0], "192.168.151.77"));
    rig.vireo(&["net-start", "lab"]).ok();
    assert!(
        reach(&mut guests[0], "192.168.151.77"),
        "not connected again"
    );
    assert!(
        !reach(&mut guests[0], "10.99.0.2"),
        "an isolated network has a way out"
    );
    assert!(both(&rig, &["net-dumpxml", "lab"]).starts_with("<network connections='2'>"));

    // Ports go with their guests.
    drop(guests);
    rig.vireo(&["destroy", "one"]).ok();
    assert!(both(&rig, &["net-dumpxml", "lab"]).starts_with("<network connections='1'>"));
    rig.vireo(&["destroy", "two"]).ok();
    assert!(both(&rig, &["net-dumpxml", "lab"]).starts_with("<network>"));
    rig.vireo(&["net-destroy", "lab"]).ok();
    assert_clean(&rig, "vlab");
    let error = rig.vireo(&["start", "one"]).fails();
    assert!(error.contains("network 'lab' is not active"), "{error}");
}

#[test]
fn a_user_without_rights_has_a_network_by_passt() {
    if !prepared() {
        return;
    }
    if !which("passt") || !which("busybox") {
        return left_out("needs passt and busybox");
    }
    if !Kernel::V6_1.is_there() {
        return left_out("needs a guest's kernel (make test)");
    }
    let rig = Rig::new();
    let peer = Peer::new(&rig, "wan", "10.98.0.2/24", "10.98.0.1/24");
    ip("route add default via 10.98.0.1");
    // passt takes the gateway's own address for the host's.
    peer.run("ip addr add 10.97.0.1/32 dev lo").ok();
    rig.write("www/hello", "hello from afar\n");
    let mut server = peer
        .command(&format!(
            "exec busybox httpd -f -p 80 -h {}",
            rig.path("www").display()
        ))
        .spawn()
        .unwrap();
    let xml = linux_guest("user", Kernel::V6_1).replace(
        "</devices>",
        "<interface type='user'><mac address='52:54:00:16:00:01'/></interface></devices>",
    );
    let file = rig.write("guest.xml", xml);
    let nobody = 65534;
    Command::new("chown")
        .args(["-R", &format!("{nobody}:{nobody}")])
        .arg(rig.root())
        .status()
        .unwrap();
    let user = |args: &[&str]| {
        let mut command = rig.command("vireo");
        command.args(args).uid(nobody).gid(nobody);
        command
    };
    let defined: vireo_tests::Run = user(&["define", &file]).output().unwrap().into();
    defined.ok();
    let mut guest = Terminal::start(&mut user(&["start", "user", "--console"]));
    guest.expect("user:/root# ", BOOT);
    let lease = shell(
        &mut guest,
        "ip link set eth0 up; udhcpc -i eth0 -q -n -t 10 -s /etc/udhcpc.script 2>&1",
    );
    assert!(lease.contains("lease of 10.98.0.2 obtained"), "{lease}");
    let page = shell(&mut guest, "wget -q -O - http://10.97.0.1/hello");
    assert!(page.contains("hello from afar"), "{page}");
    // Its networks can be kept, and not be started.
    let net: vireo_tests::Run = user(&["net-list", "--all", "--name"])
        .output()
        .unwrap()
        .into();
    assert_eq!(net.ok().trim(), "");
    let file = rig.write("net.xml", "<network><name>n</name></network>");
    let refused: vireo_tests::Run = user(&["net-create", &file]).output().unwrap().into();
    let error = refused.fails();
    assert!(
        error.contains("Unable to create bridge virbr0: Operation not permitted"),
        "{error}"
    );
    server.kill().unwrap();
    server.wait().unwrap();
}
