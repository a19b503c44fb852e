//! Against what libvirt 9.0 assigns for the same devices.

mod scsi;

use super::*;
use crate::Validation;
use crate::domain::{HostFacts, View};

fn define(machine: &str, devices: &str) -> Result<Domain, XmlError> {
    define_with(machine, devices, Validation::Strict)
}

fn define_with(machine: &str, devices: &str, check: Validation) -> Result<Domain, XmlError> {
    let xml = format!(
        "<domain type='qemu'><name>a</name><memory>65536</memory><os><type machine='{machine}'>\
         hvm</type><kernel>/k</kernel></os><devices>{devices}</devices></domain>"
    );
    let mut domain = Domain::parse(&xml, check)?.domain;
    domain.fill_defaults(&host())?;
    Ok(domain)
}

fn host() -> HostFacts {
    HostFacts {
        emulator: "/usr/bin/vireo-vmm".into(),
        kvm: Err("no /dev/kvm".into()),
        memory_kib: 1 << 20,
        kvm_max_vcpus: 8,
        soft_max_vcpus: 8,
    }
}

/// Every device with its address, as libvirt prints it: `disk 06:00.0`.
fn addresses(domain: &Domain) -> Vec<String> {
    let text = |e: &Element| {
        let address = PciAddress::of(e).unwrap()?.to_string();
        let multi = e.child("address").unwrap().attr("multifunction") == Some("on");
        let what = match index_of(e) {
            Some(index) if is_controller(e, "pci") => {
                let target = e.child("target").unwrap();
                assert_eq!(target.attr("chassis").unwrap(), index.to_string());
                format!("port {index} {}", target.attr("port").unwrap())
            }
            _ => e.name.to_string(),
        };
        let multi = if multi { " multi" } else { "" };
        Some(format!("{what} {}{multi}", &address[5..]))
    };
    let mut all: Vec<_> = domain.devices.rest.iter().filter_map(text).collect();
    all.sort();
    all
}

const SOME: &str = "<disk type='file'><source file='/a'/><target dev='vda'/></disk>\
    <disk type='file'><source file='/b'/><target dev='vdb'/></disk>\
    <interface type='bridge'><source bridge='br0'/></interface>\
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
    <channel type='pty'><target type='virtio' name='foo'/></channel>\
    <console type='pty'><target type='serial'/></console>\
    <console type='pty'><target type='virtio'/></console>\
    <rng model='virtio'><backend model='random'/></rng><vsock/>";

/// What libvirt 9.0 assigns for the same devices.
#[test]
fn q35_addresses_are_libvirts() {
    let domain = define("q35", SOME).unwrap();
    assert_eq!(
        addresses(&domain),
        [
            "controller 02:00.0",
            "disk 03:00.0",
            "disk 04:00.0",
            "interface 01:00.0",
            "memballoon 05:00.0",
            "port 1 0x8 00:01.0 multi",
            "port 2 0x9 00:01.1",
            "port 3 0xa 00:01.2",
            "port 4 0xb 00:01.3",
            "port 5 0xc 00:01.4",
            "port 6 0xd 00:01.5",
            "port 7 0xe 00:01.6",
            "port 8 0xf 00:01.7",
            "rng 06:00.0",
            "vsock 07:00.0",
        ]
    );
    let channels: Vec<_> = domain
        .devices
        .rest
        .iter()
        .filter(|e| e.name == "channel")
        .map(|e| channel_place(e).unwrap())
        .collect();
    assert_eq!(channels, [(0, Some(1)), (0, Some(2))]);
}

#[test]
fn i440fx_addresses_are_libvirts() {
    let domain = define("pc", SOME).unwrap();
    assert_eq!(
        addresses(&domain),
        [
            "controller 00:03.0",
            "disk 00:04.0",
            "disk 00:05.0",
            "interface 00:02.0",
            "memballoon 00:06.0",
            "rng 00:07.0",
            "vsock 00:08.0",
        ]
    );
}

#[test]
fn what_is_stated_stays_and_what_was_assigned_is_stable() {
    let stated = "<disk type='file'><source file='/a'/><target dev='vda'/>\
         <address type='pci' bus='9' slot='0'/></disk>\
         <watchdog model='i6300esb'/>";
    let domain = define("q35", stated).unwrap();
    let first = addresses(&domain);
    assert_eq!(
        first,
        [
            "disk 09:00.0",
            "memballoon 01:00.0",
            "port 1 0x8 00:01.0 multi",
            "port 2 0x9 00:01.1",
            "port 3 0xa 00:01.2",
            "port 4 0xb 00:01.3",
            "port 5 0xc 00:01.4",
            "port 6 0xd 00:01.5",
            "port 7 0xe 00:01.6",
            "port 8 0xf 00:01.7",
            "port 9 0x10 00:02.0",
            "watchdog 00:03.0",
        ]
    );
    let text = domain.format(View::Inactive);
    let mut again = Domain::parse(&text, Validation::Strict).unwrap().domain;
    super::assign(&mut again).unwrap();
    assert_eq!(addresses(&again), first);
    assert_eq!(again.format(View::Inactive), text);
}

#[test]
fn conflicts_have_libvirts_words() {
    let disk = |dev: &str, address: &str| {
        format!(
            "<disk type='file'><source file='/a'/><target dev='{dev}'/>\
             <address type='pci' {address}/></disk>"
        )
    };
    for (devices, words) in [
        (
            disk("vda", "bus='0' slot='5'") + &disk("vdb", "bus='0' slot='5'"),
            "XML error: Attempted double use of PCI Address 0000:00:05.0",
        ),
        (
            disk("vda", "bus='1' slot='3'"),
            "XML error: Invalid PCI address 0000:01:03.0. slot must be <= 0",
        ),
        (
            disk("vda", "domain='1' bus='0' slot='2'"),
            "XML error: Invalid PCI address 0001:00:02.0. Only PCI domain 0 is available",
        ),
        (
            disk("vda", "bus='1' slot='0'") + &disk("vda", "bus='2' slot='0'"),
            "XML error: target 'vda' duplicated for disk sources '/a' and '/a'",
        ),
        (
            "<channel type='pty'><target type='virtio' name='x'/><address type='virtio-serial' \
             controller='0' bus='0' port='3'/></channel><channel type='pty'><target \
             type='virtio' name='y'/><address type='virtio-serial' controller='0' bus='0' \
             port='3'/></channel>"
                .to_owned(),
            "XML error: virtio serial port 3 on controller 0 is already occupied",
        ),
    ] {
        let error = define("q35", &devices).unwrap_err().to_string();
        assert!(error.starts_with(words), "{error}");
    }
}

#[test]
fn running_devices_have_libvirts_ids() {
    let mut domain = define("q35", SOME).unwrap();
    domain.devices.assign_aliases();
    let ids: Vec<_> = domain
        .devices
        .rest
        .iter()
        .filter_map(super::super::device::alias)
        .filter(|id| !id.starts_with("pci."))
        .collect();
    assert_eq!(
        ids,
        [
            "virtio-disk0",
            "virtio-disk1",
            "virtio-serial0",
            "pcie.0",
            "net0",
            "channel0",
            "channel1",
            "balloon0",
            "rng0",
            "vsock0",
        ]
    );
    assert_eq!(
        domain.devices.consoles[1].alias.as_deref(),
        Some("console1")
    );
}

fn cdrom(dev: &str, bus: &str, rest: &str) -> String {
    format!("<disk type='file' device='cdrom'><target dev='{dev}' bus='{bus}'/>{rest}</disk>")
}

/// What drives and their controllers are, as libvirt 9.0 has it for the same definitions.
#[test]
fn drives_have_libvirts_places() {
    let places = |machine: &str, devices: &str| {
        let mut domain = define(machine, devices).unwrap();
        let text = domain.format(View::Inactive);
        let again = Domain::parse(&text, Validation::Strict).unwrap().domain;
        assert_eq!(again.format(View::Inactive), text);
        domain.devices.assign_aliases();
        let mut found = Vec::new();
        for e in &domain.devices.rest {
            let alias = crate::domain::device::alias(e).unwrap_or_default();
            if let Some(place) = crate::domain::device::DriveAddress::of(e).unwrap() {
                found.push(format!("{alias} {} {}", place.bus, place.unit));
            } else if is_controller(e, "sata") || is_controller(e, "ide") {
                let address = PciAddress::of(e).unwrap().unwrap();
                found.push(format!("{alias} {}", &address.to_string()[5..]));
            }
        }
        found
    };
    let disk = "<disk type='file'><source file='/a'/><target dev='sdf' bus='sata'/></disk>";
    assert_eq!(
        places("q35", &(cdrom("sda", "sata", "") + disk)),
        ["sata0-0-0 0 0", "sata0-0-5 0 5", "ide 00:1f.2"]
    );
    assert_eq!(
        places("q35", &cdrom("sdg", "sata", "")),
        ["sata1-0-0 0 0", "ide 00:1f.2", "sata1 00:02.0"]
    );
    let all = ["hda", "hdb", "hdc", "hdd"].map(|dev| cdrom(dev, "ide", ""));
    assert_eq!(
        places("pc", &(all.concat() + &cdrom("sda", "sata", ""))),
        [
            "ide0-0-0 0 0",
            "ide0-0-1 0 1",
            "ide0-1-0 1 0",
            "ide0-1-1 1 1",
            "sata0-0-0 0 0",
            "sata0 00:02.0",
            "ide 00:01.1",
        ]
    );
    // The machine of our own has what a client thinks it has.
    assert_eq!(
        places("vireo", &cdrom("hda", "ide", "")),
        ["ide0-0-0 0 0", "ide0 00:02.0"]
    );
    // A definition without drives has no controller for them.
    assert!(places("q35", "").is_empty());
}

#[test]
fn drives_that_cannot_be_have_libvirts_words() {
    let at = |address: &str| format!("<address type='drive' {address}/>");
    let disk = |rest: &str| {
        format!("<disk type='file'><source file='/a'/><target dev='sda' bus='sata'/>{rest}</disk>")
    };
    let config = "unsupported configuration: ";
    let internal = "internal error: ";
    for (machine, devices, kind, words) in [
        (
            "q35",
            cdrom("sda", "sata", &at("unit='3'")) + &cdrom("sdd", "sata", ""),
            config,
            "Found duplicate drive address for disk with target name 'sda' controller='0' bus='0' target='0' unit='3'",
        ),
        (
            "q35",
            cdrom("sda", "sata", &at("bus='1'")),
            config,
            "bus must be 0 for sata controller",
        ),
        (
            "pc",
            cdrom("hda", "ide", &at("target='1'")),
            config,
            "target must be 0 for ide controller",
        ),
        (
            "q35",
            cdrom("sda", "sata", "<address type='pci' slot='5'/>"),
            config,
            "Invalid address type 'pci' for the disk 'sda' with the bus type 'sata'",
        ),
        (
            "q35",
            cdrom("foo", "sata", ""),
            "XML error: ",
            "Unknown disk name 'foo' and no address specified",
        ),
        (
            "q35",
            cdrom("hda", "ide", ""),
            config,
            "IDE controllers are unsupported for this QEMU binary or machine type",
        ),
        (
            "pc",
            cdrom("hde", "ide", ""),
            internal,
            "Only 1 IDE controller is supported",
        ),
        (
            "q35",
            "<controller type='sata' index='0'><address type='pci' slot='5'/></controller>"
                .to_owned(),
            internal,
            "Primary SATA controller must have PCI address 0:0:1f.2",
        ),
        (
            "pc",
            "<controller type='ide' index='0'><address type='pci' slot='5'/></controller>"
                .to_owned(),
            internal,
            "Primary IDE controller must have PCI address 0:0:1.1",
        ),
        (
            "q35",
            cdrom("vda", "virtio", ""),
            config,
            "disk type of 'vda' does not support ejectable media",
        ),
        (
            "q35",
            disk("<readonly/>"),
            config,
            "readonly sata disks are not supported",
        ),
        (
            "q35",
            disk("<driver name='qemu' queues='2'/>"),
            config,
            "queues attribute in disk driver element is only supported by virtio-blk",
        ),
        (
            "q35",
            disk("<wwn>5000c50015ea71ad</wwn>"),
            config,
            "Only ide and scsi disk support wwn",
        ),
        (
            "q35",
            disk("").replace("bus='sata'", "bus='sata' tray='open'"),
            config,
            "tray is only valid for cdrom and floppy",
        ),
        (
            "q35",
            cdrom("sda", "sata", "").replace("'cdrom'", "'floppy'"),
            internal,
            "Invalid bus type 'sata' for floppy disk",
        ),
    ] {
        let error = define_with(machine, &devices, Validation::Lenient);
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with(&format!("{kind}{words}")), "{error}");
    }
}

/// libvirt's usual machine, which is what a client means that says nothing of it and has IDE drives.
#[test]
fn who_wants_ide_gets_the_machine_that_has_it() {
    let machine = |devices: &str| {
        let domain = define("x", devices).map(|_| ());
        assert!(domain.is_err());
        let xml = format!(
            "<domain type='qemu'><name>a</name><memory>65536</memory><os><type>hvm</type><kernel>/k</kernel></os>\
             <devices>{devices}</devices></domain>"
        );
        let mut domain = Domain::parse(&xml, Validation::Strict).unwrap().domain;
        domain.fill_defaults(&host()).unwrap();
        domain.os.machine.unwrap()
    };
    assert_eq!(machine(&cdrom("hda", "ide", "")), "pc-i440fx-7.2");
    assert_eq!(
        machine("<disk type='file'><source file='/x'/><target dev='hda'/></disk>"),
        "pc-i440fx-7.2"
    );
    assert_eq!(machine(&cdrom("hda", "sata", "")), "pc-q35-7.2");
}

/// An earlier version has stored drives without places, and CD-ROMs that were disks at a bus of their own.
#[test]
fn what_was_stored_before_gets_places() {
    let text = "<domain type='qemu'><name>a</name><memory>65536</memory><os><type machine='pc-q35-7.2'>hvm</type>\
         <kernel>/k</kernel></os><devices><disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>\
         <disk type='file' device='cdrom'><source file='/x'/><target dev='vda' bus='virtio'/><readonly/></disk>\
         </devices></domain>";
    let mut domain = Domain::parse_stored(text).unwrap();
    domain.place_drives().unwrap();
    domain.devices.assign_aliases();
    let live = domain.format(View::Live);
    for part in [
        "sata0-0-1",
        "<controller type='sata' index='0'>",
        "slot='0x1f' function='0x2'",
    ] {
        assert!(live.contains(part), "{live}");
    }
    let before = domain.clone();
    domain.place_drives().unwrap();
    assert_eq!(domain, before);
    let host = host();
    let mut stored = Domain::parse_stored(text).unwrap();
    stored.fill_stored(&host).unwrap();
    let text = stored.format(View::Inactive);
    assert!(text.contains("<disk type='file' device='disk'>"), "{text}");
    assert!(
        stored.unsupported().is_empty(),
        "{:?}",
        stored.unsupported()
    );
}
