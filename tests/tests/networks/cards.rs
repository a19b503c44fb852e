//! What guests' cards get of a network: devices, VLANs, limits.

use std::fs;

use vireo_tests::{Rig, left_out};

use super::{assert_clean, both, both_refuse, define, ip, nft, prepared, wait_for};

#[test]
fn every_forward_mode_gives_cards_what_it_says() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    ip("link add eth8 type veth peer name eth9");
    ip("link add hostbr type bridge");
    define(
        &rig,
        "<name>hosts</name><forward mode='bridge'/><bridge name='hostbr'/>",
    );
    define(
        &rig,
        "<name>tap</name><forward mode='passthrough'><interface dev='eth8'/><interface dev='eth9'/></forward>",
    );
    define(
        &rig,
        "<name>six</name><forward mode='route'/><mtu size='1400'/><port isolated='yes'/>\
         <ip family='ipv6' address='fd00:151::1' prefix='64'><dhcp><range start='fd00:151::10' end='fd00:151::20'/></dhcp></ip>\
         <ip address='192.168.152.1' prefix='24'/>\
         <route address='192.168.153.0' prefix='24' gateway='192.168.152.9'/>\
         <portgroup name='slow' default='yes'><bandwidth><inbound average='100'/></bandwidth></portgroup>",
    );
    define(
        &rig,
        "<name>open</name><forward mode='open'/><bandwidth><outbound average='500'/></bandwidth>\
         <ip address='192.168.154.1' prefix='24'/>",
    );
    for name in ["hosts", "tap", "six", "open"] {
        rig.vireo(&["net-start", name]).ok();
        both(&rig, &["net-dumpxml", name]);
        both(&rig, &["net-info", name]);
    }
    let bridge = rig.vireo(&["net-info", "six"]).ok();
    let bridge = bridge
        .lines()
        .find_map(|l| l.strip_prefix("Bridge:"))
        .unwrap()
        .trim()
        .to_owned();
    let shown = ip(&format!("addr show {bridge}"));
    assert!(
        shown.contains("mtu 1400") && shown.contains("inet6 fd00:151::1/64"),
        "{shown}"
    );
    assert!(ip("route").contains("192.168.153.0/24 via 192.168.152.9"));
    let sysctl = |name: &str| fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap();
    assert_eq!(sysctl("ipv6/conf/all/forwarding").trim(), "1");
    assert_eq!(sysctl("ipv4/ip_forward").trim(), "1");
    let rules = nft("list ruleset");
    assert!(!rules.contains("masquerade"), "{rules}");
    // Limits are an open network's only rules.
    assert!(rules.contains("limit rate over 500"), "{rules}");
    assert_eq!(rules.matches("reject").count(), 2, "{rules}");

    // A guest on the host's bridge, and one on an isolated port.
    for (name, network) in [("on-hosts", "hosts"), ("on-six", "six")] {
        let guest = vireo_tests::tiny_guest(&rig, name, "qemu");
        let card = format!(
            "<interface type='network'><source network='{network}'/></interface></devices>"
        );
        rig.define(&guest.replace("</devices>", &card));
        rig.virsh(&["start", name]).ok();
    }
    assert!(ip("-o link show master hostbr").contains("vnet"));
    let ports = ip(&format!("-d -o link show master {bridge}"));
    assert!(
        ports.contains("isolated on") && ports.contains("mtu 1400"),
        "{ports}"
    );
    let xml = both(&rig, &["dumpxml", "on-hosts"]);
    assert!(
        xml.contains("<interface type='bridge'>")
            && xml.contains("<source network='hosts' portid="),
        "{xml}"
    );
    assert!(
        both(&rig, &["dumpxml", "on-hosts", "--inactive"]).contains("<source network='hosts'/>")
    );
    let port = rig.vireo(&["net-port-list", "six", "--uuid"]).ok();
    let port = both(&rig, &["net-port-dumpxml", "six", port.trim()]);
    for part in [
        "<name>on-six</name>",
        "<group>slow</group>",
        "average='100'",
        "<port isolated='yes'/>",
    ] {
        assert!(port.contains(part), "no {part} in {port}");
    }

    // Each device once, where a guest has it for itself.
    let wanted = |uuid: &str| {
        rig.write(
            "port.xml",
            format!(
                "<networkport><uuid>{uuid}</uuid><owner><name>d</name><uuid>11111111-1111-1111-1111-111111111111</uuid></owner>\
                 <mac address='52:54:00:00:00:01'/></networkport>"
            ),
        )
    };
    let (first, second) = (
        "22222222-2222-2222-2222-222222222221",
        "22222222-2222-2222-2222-222222222222",
    );
    rig.virsh(&["net-port-create", "tap", &wanted(first)]).ok();
    rig.vireo(&["net-port-create", "tap", &wanted(second)]).ok();
    let error = rig
        .vireo(&[
            "net-port-create",
            "tap",
            &wanted("22222222-2222-2222-2222-222222222223"),
        ])
        .fails();
    assert!(
        error.contains("requires exclusive access to interfaces, but none are available"),
        "{error}"
    );
    assert!(
        both(&rig, &["net-port-dumpxml", "tap", second])
            .contains("<plug type='direct' dev='eth9' mode='passthrough'/>")
    );
    rig.virsh(&["net-port-delete", "tap", first]).ok();
    assert!(both(&rig, &["net-dumpxml", "tap"]).starts_with("<network connections='1'>"));
    rig.vireo(&["destroy", "on-hosts"]).ok();
    rig.vireo(&["destroy", "on-six"]).ok();
    for name in ["hosts", "tap", "six", "open"] {
        rig.virsh(&["net-destroy", name]).ok();
    }
    assert_clean(&rig, &bridge);
    assert!(
        ip("-o link").contains("hostbr"),
        "somebody else's bridge is gone"
    );
}

#[test]
fn cards_are_in_the_vlans_that_they_or_their_network_name() {
    if !prepared() {
        return;
    }
    let rig = Rig::new();
    // As libvirt refuses them: a macvtap can't.
    let file = rig.write(
        "no.xml",
        "<network><name>no</name><forward mode='vepa'><interface dev='eth7'/></forward>\
         <vlan><tag id='5'/></vlan></network>",
    );
    let why = rig.vireo(&["net-define", &file]).fails();
    assert!(why.contains("doesn't support vlan configuration"), "{why}");
    define(
        &rig,
        "<name>apart</name><vlan><tag id='42'/></vlan><ip address='192.168.155.1' prefix='24'/>\
         <portgroup name='trunk'><vlan trunk='yes'><tag id='47'/><tag id='48' nativeMode='untagged'/></vlan></portgroup>",
    );
    both(&rig, &["net-dumpxml", "apart"]);
    let filters = std::process::Command::new("ip")
        .args([
            "link",
            "add",
            "probe0",
            "type",
            "bridge",
            "vlan_filtering",
            "1",
        ])
        .output()
        .unwrap();
    if !filters.status.success() {
        let why = both_refuse(&rig, &["net-start", "apart"]);
        assert!(why.contains("CONFIG_BRIDGE_VLAN_FILTERING"), "{why}");
        return left_out("guests in VLANs: needs a kernel whose bridges filter VLANs");
    }
    rig.vireo(&["net-start", "apart"]).ok();
    ip("link add plain0 type bridge");
    for (name, card) in [
        ("one", "<source network='apart'/>"),
        ("both", "<source network='apart' portgroup='trunk'/>"),
        (
            "own",
            "<source network='apart'/><vlan><tag id='99'/></vlan>",
        ),
    ] {
        let guest = vireo_tests::tiny_guest(&rig, name, "qemu");
        let card = format!(
            "<interface type='network'>{card}<target dev='v{name}'/></interface></devices>"
        );
        rig.define(&guest.replace("</devices>", &card));
        rig.vireo(&["start", name]).ok();
    }
    let vlans = |port: &str| {
        let shown = std::process::Command::new("bridge")
            .args(["vlan", "show", "dev", port])
            .output()
            .unwrap();
        let text = String::from_utf8(shown.stdout).unwrap();
        let words = text.split_whitespace().skip_while(|word| *word != port);
        words
            .skip(1)
            .map(str::to_owned)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(vlans("vone"), "42 PVID Egress Untagged");
    assert_eq!(vlans("vboth"), "47 48 PVID Egress Untagged");
    assert_eq!(vlans("vown"), "99 PVID Egress Untagged");
    // Connected again, they are in the same.
    rig.vireo(&["net-destroy", "apart"]).ok();
    rig.vireo(&["net-start", "apart"]).ok();
    wait_for("the card's VLAN", || {
        vlans("vone") == "42 PVID Egress Untagged"
    });
    // A bridge that does not tell them apart is no place for them.
    let guest = vireo_tests::tiny_guest(&rig, "plain", "qemu");
    let card = "<interface type='bridge'><source bridge='plain0'/><vlan><tag id='7'/></vlan></interface></devices>";
    rig.define(&guest.replace("</devices>", card));
    let why = rig.vireo(&["start", "plain"]).fails();
    assert!(why.contains("vlan_filtering is off"), "{why}");
    for name in ["one", "both", "own"] {
        rig.vireo(&["destroy", name]).ok();
    }
    rig.vireo(&["net-destroy", "apart"]).ok();
}

#[test]
fn a_ports_limits_can_be_read_and_changed() {
    if !prepared() {
        return;
    }
    let has = std::process::Command::new("/usr/bin/python3")
        .args(["-c", "import libvirt"])
        .output();
    if !has.is_ok_and(|out| out.status.success()) {
        return left_out("needs python3-libvirt");
    }
    let rig = Rig::new();
    define(
        &rig,
        "<name>limited</name><ip address='192.168.156.1' prefix='24'/>\
         <portgroup name='slow' default='yes'><bandwidth><inbound average='100'/></bandwidth></portgroup>",
    );
    rig.vireo(&["net-start", "limited"]).ok();
    let uuid = "22222222-2222-2222-2222-222222222221";
    let port = rig.write(
        "port.xml",
        format!(
            "<networkport><uuid>{uuid}</uuid><owner><name>d</name><uuid>11111111-1111-1111-1111-111111111111</uuid></owner>\
             <mac address='52:54:00:00:00:01'/></networkport>"
        ),
    );
    rig.vireo(&["net-port-create", "limited", &port]).ok();
    let code = r#"
import libvirt, sys
conn = libvirt.open(sys.argv[1])
port = conn.networkLookupByName("limited").portLookupByUUIDString(sys.argv[2])
now = port.parameters()
assert now["inbound.average"] == 100 and now["outbound.average"] == 0, now
port.setParameters({"inbound.average": 300, "inbound.peak": 500, "outbound.average": 70, "outbound.burst": 9})
now = port.parameters()
assert (now["inbound.average"], now["inbound.peak"], now["outbound.burst"]) == (300, 500, 9), now
port.setParameters({"outbound.average": 0})
assert port.parameters()["outbound.average"] == 0
try:
    port.setParameters({"inbound.peak": 5})
    sys.exit("a peak without an average was taken")
except libvirt.libvirtError as e:
    assert e.get_error_code() == libvirt.VIR_ERR_INVALID_ARG, e
"#;
    let uri = rig.uri();
    let done = std::process::Command::new("/usr/bin/python3")
        .args(["-c", code, &uri, uuid])
        .output()
        .unwrap();
    vireo_tests::Run::from(done).ok();
    let xml = both(&rig, &["net-port-dumpxml", "limited", uuid]);
    assert!(
        xml.contains("<inbound average='300' peak='500'/>") && !xml.contains("<outbound"),
        "{xml}"
    );
    rig.vireo(&["net-destroy", "limited"]).ok();
}
