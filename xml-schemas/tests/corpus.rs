//! Documents of the tools people use, and libvirt's own output, through the whole crate.

mod common;

use common::{files, host, inactive, read};
use xml_schemas::domain::View;
use xml_schemas::{Domain, Validation};

#[test]
fn every_document_passes_the_strict_check_and_is_stable() {
    for path in files("") {
        let name = path.display();
        let text = read(&path);
        let mut domain = match Domain::parse(&text, Validation::Strict) {
            Ok(parsed) => parsed.domain,
            Err(e) => panic!("{name}: {e}"),
        };
        domain
            .fill_defaults(&host())
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let first = domain.format(View::Inactive);
        let again = Domain::parse(&first, Validation::Strict)
            .unwrap_or_else(|e| panic!("{name}: {e}\n{first}"))
            .domain;
        assert_eq!(again, inactive(domain), "{name}");
        assert_eq!(again.format(View::Inactive), first, "{name}");
        let identity = Domain::identify(&first).unwrap();
        assert_eq!(identity, (again.name.clone(), again.uuid), "{name}");
        assert_eq!(Domain::parse_stored(&first).unwrap(), again, "{name}");
        let mut filled = again.clone();
        filled.fill_defaults(&host()).unwrap();
        assert_eq!(again, filled, "{name}: nothing is left to fill");
    }
}

#[test]
fn who_a_definition_is_needs_no_more_than_its_beginning() {
    let text =
        "<domain><title/><uuid>00000000-0000-0000-0000-000000000001</uuid><name>a&amp;b</name><bad";
    let (name, uuid) = Domain::identify(text).unwrap();
    assert_eq!((name.as_str(), uuid.unwrap().as_u128()), ("a&b", 1));
    let refused = |text: &str| Domain::identify(text).unwrap_err().to_string();
    assert!(refused("<network><name>a</name><uuid/></network>").contains("expecting root element"));
    assert!(refused("<domain><name>a/b</name><uuid/><bad").contains("cannot contain '/'"));
    assert!(
        refused("<domain><uuid>00000000-0000-0000-0000-000000000001</uuid>").contains("Premature")
    );
    // A name that is not the domain's own.
    let text = "<domain><devices><name>x</name></devices><name>a</name></domain>";
    assert_eq!(Domain::identify(text).unwrap(), ("a".to_owned(), None));
}

#[test]
fn what_libvirt_prints_is_printed_the_same() {
    for path in files("libvirt") {
        let text = read(&path);
        let parsed = Domain::parse(&text, Validation::Lenient)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(parsed.warnings, [], "{}", path.display());
        let ours = parsed.domain.format(View::Inactive);
        assert_eq!(ours, text, "{}", path.display());
    }
}

/// Places, controllers and all else of drives, which libvirt was given the same.
#[test]
fn drives_get_what_libvirt_gives_them() {
    for name in ["drives-q35.xml", "drives-i440fx.xml", "drives-scsi.xml"] {
        let mut domain = Domain::parse(&read(&common::data().join(name)), Validation::Strict)
            .unwrap()
            .domain;
        domain.fill_defaults(&host()).unwrap();
        let ours = domain.format(View::Inactive);
        let theirs = read(&common::data().join("libvirt").join(name));
        let part = |text: &str, kind: &str, mark: &str| {
            let (begin, end) = (format!("    <{kind} "), format!("    </{kind}>"));
            let mut parts = text.split(&begin).skip(1);
            let found = parts.find(|part| part.split(&end).next().unwrap().contains(mark));
            let found = found.unwrap_or_else(|| panic!("no {mark} in {text}"));
            found.split(&end).next().unwrap().to_owned()
        };
        let marks = theirs
            .match_indices("<target dev='")
            .map(|(at, _)| &theirs[at..at + 17]);
        // A floppy drive has no place here, and a volume's format is its definition's.
        for mark in marks.filter(|mark| !mark.ends_with("fda'") && !mark.ends_with("sde'")) {
            assert_eq!(
                part(&ours, "disk", mark),
                part(&theirs, "disk", mark),
                "{name}"
            );
        }
        for mark in [
            "type='sata' index='0'",
            "type='ide' index='0'",
            "type='scsi' index='0'",
            "type='scsi' index='1'",
        ] {
            // libvirt has SATA controllers without drives, too.
            let kind = format!("bus='{}'", &mark[6..10].trim_end_matches('\''));
            if theirs.contains(&kind) && theirs.contains(mark) {
                let of = |text| part(text, "controller", mark);
                assert_eq!(of(&ours), of(&theirs), "{name}");
            }
        }
        assert_eq!(ours.contains("type='ide'"), theirs.contains("type='ide'"));
    }
}

#[test]
fn a_running_domain_is_printed_as_libvirt_prints_one() {
    let text = include_str!("data/libvirt/running.live");
    let domain = Domain::parse_live(text).unwrap().domain;
    assert_eq!(domain.id, Some(1));
    assert_eq!(domain.format(View::Live), text);
    let stored = domain.format(View::Inactive);
    assert!(stored.starts_with("<domain type='qemu'>\n"));
    for live in ["tty=", "/dev/pts", "alias"] {
        assert!(!stored.contains(live), "{live}");
    }
    // A client's live document loses the same when it is defined.
    let defined = Domain::parse(text, Validation::Lenient).unwrap().domain;
    assert_eq!(defined.format(View::Inactive), stored);
}

#[test]
fn what_a_running_domain_got_at_start_is_not_defined() {
    let text = "<domain type='kvm' id='5'><name>a</name><memory>65536</memory>\
                <os><type>hvm</type></os><devices>\
                <disk type='file'><source file='/x' index='3'/><target dev='vda'/>\
                <alias name='virtio-disk0'/></disk>\
                <interface type='bridge'><source bridge='br0'/><target dev='vnet4'/></interface>\
                <interface type='bridge'><source bridge='br0'/><target dev='mine'/></interface>\
                <channel type='pty'><source path='/dev/pts/4'/>\
                <target type='virtio' name='x'/><alias name='ua-mine'/></channel>\
                </devices><seclabel type='dynamic' model='dac'><label>+0:+0</label></seclabel>\
                </domain>";
    let domain = Domain::parse(text, Validation::Strict).unwrap().domain;
    let printed = domain.format(View::Live);
    for gone in [
        "index=",
        "virtio-disk0",
        "vnet4",
        "/dev/pts",
        "+0:+0",
        "id='5'",
    ] {
        assert!(!printed.contains(gone), "{gone}\n{printed}");
    }
    for kept in [
        "<target dev='mine'/>",
        "ua-mine",
        "<seclabel type='dynamic' model='dac'/>",
    ] {
        assert!(printed.contains(kept), "{kept}\n{printed}");
    }
}

#[test]
fn starting_adds_ids_and_paths_to_the_live_document_only() {
    let text = read(&common::data().join("minimal-kernel.xml"));
    let mut domain = Domain::parse(&text, Validation::Strict).unwrap().domain;
    let console = "<domain type='qemu'><name>c</name><memory>65536</memory><os><type>hvm</type>\
                   </os><devices><console type='pty'/></devices></domain>";
    let with_console = Domain::parse(console, Validation::Strict).unwrap().domain;
    domain.devices = with_console.devices;
    domain.fill_defaults(&host()).unwrap();
    let stored = domain.format(View::Inactive);
    domain.id = Some(3);
    domain.devices.assign_aliases();
    domain.devices.set_pty_path(0, "/dev/pts/9");
    assert_eq!(domain.format(View::Inactive), stored);
    let live = domain.format(View::Live);
    let part = |from: &str, to: &str| {
        let start = live.find(from).unwrap();
        let end = live[start..].find(to).unwrap() + start + to.len();
        live[start..end].to_owned()
    };
    assert_eq!(
        part("<serial", "</serial>"),
        "<serial type='pty'>\n      <source path='/dev/pts/9'/>\n      \
         <target type='isa-serial' port='0'>\n        <model name='isa-serial'/>\n      \
         </target>\n      <alias name='serial0'/>\n    </serial>"
    );
    assert_eq!(
        part("<console", "</console>"),
        "<console type='pty' tty='/dev/pts/9'>\n      <source path='/dev/pts/9'/>\n      \
         <target type='serial' port='0'/>\n      <alias name='serial0'/>\n    </console>"
    );
    assert!(live.starts_with("<domain type='qemu' id='3'>\n"));
    assert_eq!(Domain::parse_live(&live).unwrap().domain, domain);
}

#[test]
fn secrets_are_only_in_the_whole_document() {
    let text = read(&common::data().join("virt-install-win11.xml"));
    let domain = Domain::parse(&text, Validation::Strict).unwrap().domain;
    assert!(domain.format(View::Inactive).contains("hunter2"));
    assert!(!domain.format_public(View::Inactive).contains("hunter2"));
}
