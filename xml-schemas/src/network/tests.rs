use super::*;
use crate::Validation;

fn parse(text: &str) -> Result<Network, XmlError> {
    Network::parse(text, Validation::Lenient)
}

/// What libvirt 9.0 prints for the documents in `data/network`, to the byte.
#[test]
fn documents_are_printed_as_libvirt_prints_them() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/network");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "xml") {
            continue;
        }
        let mut network =
            Network::parse(&std::fs::read_to_string(&path).unwrap(), Validation::Strict)
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let expected = std::fs::read_to_string(path.with_extension("libvirt")).unwrap();
        // What is chosen when a network is first defined is libvirt's own there.
        let chosen = parse(&expected).unwrap();
        network.uuid = chosen.uuid;
        network.bridge = network.bridge.or(chosen.bridge);
        network.mac = network.mac.or(chosen.mac);
        assert_eq!(
            network.format(NetworkView::Inactive),
            expected,
            "{}",
            path.display()
        );
        seen += 1;
    }
    assert!(seen > 10, "{seen}");
}

#[test]
fn bad_documents_get_libvirts_words() {
    let ip = |inside: &str| {
        format!(
            "<network><name>e</name><ip address='192.168.70.1' netmask='255.255.255.0'>{inside}</ip></network>"
        )
    };
    let dhcp = |inside: &str| ip(&format!("<dhcp>{inside}</dhcp>"));
    let net = |inside: &str| format!("<network><name>e</name>{inside}</network>");
    for (text, code, words) in [
        ("<network/>".to_owned(), 21, "missing name information"),
        (
            "<domain/>".to_owned(),
            27,
            "XML error: expecting root element of 'network', not 'domain'",
        ),
        (
            "<network><name>a/b</name></network>".to_owned(),
            35,
            "invalid char in name: /",
        ),
        (
            net("<uuid>x</uuid>"),
            1,
            "internal error: malformed uuid element",
        ),
        (
            net("<forward mode='foo'/>"),
            67,
            "unsupported configuration: unknown forwarding type 'foo'",
        ),
        (
            net("<forward mode='nat'/>"),
            27,
            "XML error: nat forwarding requested, but no IP address provided for network 'e'",
        ),
        (
            net("<forward mode='bridge'/><ip address='1.2.3.4'/>"),
            67,
            "unsupported configuration: Unsupported <ip> element in network e with forward mode='bridge'",
        ),
        (
            net("<bridge delay='x'/>"),
            27,
            "XML error: Invalid delay value in network 'e'",
        ),
        (
            net("<mac address='zz'/>"),
            27,
            "XML error: Invalid bridge mac address 'zz' in network 'e'",
        ),
        (
            net("<ip address='192.168.70.300'/>"),
            27,
            "XML error: Invalid address '192.168.70.300' in network 'e'",
        ),
        (
            net("<ip address='192.168.70.1' prefix='33'/>"),
            67,
            "unsupported configuration: Invalid IPv4 prefix '33' in network 'e'",
        ),
        (
            net("<ip address='fd00::1' prefix='64'/>"),
            67,
            "unsupported configuration: no family specified for non-IPv4 address 'fd00::1' in network 'e'",
        ),
        (
            dhcp("<range start='192.168.71.2' end='192.168.71.9'/>"),
            1,
            "internal error: range 192.168.71.2 - 192.168.71.9 is not entirely within network 192.168.70.1/24",
        ),
        (
            dhcp("<range start='192.168.70.20' end='192.168.70.9'/>"),
            1,
            "internal error: range 192.168.70.20 - 192.168.70.9 is reversed ",
        ),
        (
            dhcp("<range start='192.168.70.0' end='192.168.70.9'/>"),
            1,
            "internal error: start of range 192.168.70.0 - 192.168.70.9 in network 192.168.70.1/24 is the network address",
        ),
        (
            dhcp("<range start='192.168.70.9' end='192.168.70.255'/>"),
            1,
            "internal error: end of range 192.168.70.9 - 192.168.70.255 in network 192.168.70.1/24 is the broadcast address",
        ),
        (
            dhcp("<range start='x' end='y'/>"),
            38,
            "Cannot parse socket address 'x': Name or service not known",
        ),
        (
            dhcp("<host mac='zz' ip='192.168.70.5'/>"),
            27,
            "XML error: Cannot parse MAC address 'zz' in network 'e'",
        ),
        (
            dhcp("<host ip='192.168.70.5'/>"),
            27,
            "XML error: Static host definition in IPv4 network 'e' must have mac or name attribute",
        ),
        (
            dhcp(
                "<host mac='52:54:00:00:00:01' ip='192.168.70.5'/><host mac='52:54:00:00:00:01' ip='192.168.70.6'/>",
            ),
            27,
            "XML error: network 'e' has two static hosts with MAC address '52:54:00:00:00:01'",
        ),
        (
            dhcp(
                "<host mac='52:54:00:00:00:01' ip='192.168.70.5'/><host mac='52:54:00:00:00:02' ip='192.168.70.5'/>",
            ),
            27,
            "XML error: network 'e' has two static hosts with IP address '192.168.70.5'",
        ),
        (
            dhcp("<host mac='52:54:00:00:00:01' name='a&#10;b' ip='192.168.70.5'/>"),
            27,
            "XML error: prohibited character in host name 'a\\nb' of network 'e'",
        ),
        (
            net("<dns><host ip='1.2.3.4'/></dns>"),
            35,
            "Missing hostname in network 'e' DNS HOST record",
        ),
        (
            net("<dns><txt name='a b' value='x'/></dns>"),
            35,
            "prohibited character in DNS TXT record name 'a b' of network e",
        ),
        (
            net("<dns enable='no'><forwarder addr='1.1.1.1'/></dns>"),
            27,
            "XML error: Extra data in disabled network 'e'",
        ),
        (
            net("<portgroup name='a'/><portgroup name='a'/>"),
            67,
            "unsupported configuration: multiple <portgroup> elements with the same name (a) in network 'e'",
        ),
        (
            net("<forward mode='vepa'><interface dev='eth7'/></forward><vlan><tag id='5'/></vlan>"),
            67,
            "unsupported configuration: <vlan> element specified for network e, whose type doesn't support vlan configuration",
        ),
        (
            net("<bandwidth><inbound peak='5'/></bandwidth>"),
            35,
            "Missing mandatory average or floor attributes",
        ),
        (
            net("<route address='192.168.222.0' netmask='255.255.255.0' gateway='192.168.50.2'/>"),
            67,
            "unsupported configuration: unreachable static route gateway '192.168.50.2' specified for network 'e'",
        ),
    ] {
        let error = parse(&text).expect_err(&text);
        assert_eq!(
            (error.code().number(), error.to_string().as_str()),
            (code, words),
            "{text}"
        );
    }
    let strict = Network::parse(
        "<network><name>x</name><bogus/></network>",
        Validation::Strict,
    );
    assert_eq!(strict.unwrap_err().code().number(), 92);
    assert_eq!(
        parse("<network><name>x</name><bogus/></network>")
            .unwrap()
            .name,
        "x"
    );
}

fn updated(text: &str, command: Command, section: Section, with: &str) -> Result<Network, String> {
    let mut network = parse(text).unwrap();
    network
        .update(command, section, -1, with)
        .map(|()| network)
        .map_err(|e| e.to_string())
}

#[test]
fn parts_are_added_changed_and_taken_out() {
    let text = "<network><name>n</name><ip address='10.0.0.1' prefix='24'><dhcp>\
                <range start='10.0.0.2' end='10.0.0.9'/>\
                <host mac='52:54:00:00:00:01' name='a' ip='10.0.0.3'/></dhcp></ip></network>";
    let host = "<host mac='52:54:00:00:00:02' ip='10.0.0.4'/>";
    let first = updated(text, Command::AddFirst, Section::DhcpHost, host).unwrap();
    assert_eq!(first.ips[0].hosts[0].mac, Some([0x52, 0x54, 0, 0, 0, 2]));
    let last = updated(text, Command::AddLast, Section::DhcpHost, host).unwrap();
    assert_eq!(last.ips[0].hosts[1].mac, Some([0x52, 0x54, 0, 0, 0, 2]));
    assert_eq!(
        updated(
            text,
            Command::AddLast,
            Section::DhcpHost,
            "<host mac='52:54:00:00:00:01' ip='10.0.0.5'/>"
        )
        .unwrap_err(),
        "Requested operation is not valid: there is an existing dhcp host entry in network 'n' that \
         matches \"<host mac='52:54:00:00:00:01' ip='10.0.0.5'/>\""
    );
    let changed = updated(
        text,
        Command::Modify,
        Section::DhcpHost,
        "<host mac='52:54:00:00:00:01' name='b' ip='10.0.0.7'/>",
    )
    .unwrap();
    assert_eq!(changed.ips[0].hosts[0].name.as_deref(), Some("b"));
    let gone = updated(
        text,
        Command::Delete,
        Section::DhcpHost,
        "<host ip='10.0.0.3'/>",
    )
    .unwrap();
    assert!(gone.ips[0].hosts.is_empty());
    assert_eq!(
        updated(
            text,
            Command::Delete,
            Section::DhcpHost,
            "<host ip='10.0.0.8'/>"
        )
        .unwrap_err(),
        "Requested operation is not valid: couldn't locate a matching dhcp host entry in network 'n'"
    );
    assert_eq!(
        updated(
            text,
            Command::Modify,
            Section::DhcpRange,
            "<range start='10.0.0.2' end='10.0.0.9'/>"
        )
        .unwrap_err(),
        "Operation not supported: dhcp ranges cannot be modified, only added or deleted"
    );
    assert_eq!(
        updated(
            text,
            Command::AddLast,
            Section::Fixed("bridge"),
            "<bridge/>"
        )
        .unwrap_err(),
        "Operation not supported: can't update 'bridge' section of network 'n'"
    );
    assert!(
        updated(text, Command::AddLast, Section::DhcpHost, "<foo/>")
            .unwrap_err()
            .starts_with("XML error: unexpected element <foo>, expecting <host>")
    );
}
